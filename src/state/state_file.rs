//! `state.json`: the watermark for people, health checks and those who come from the Python sync script.

use std::collections::BTreeMap;
use std::path::Path;

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value, json};

use crate::error::{Context, Error, ErrorKind, Result};
use foundation::secure_fs::{private_dir, write_atomically};

/// What to do with a file that is none.
const REBUILT: &str = "move the file away: the tables have their own watermarks, and the next run writes a new one";

/// What `state.json` says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StateFile {
    /// `last_sync_time`: the server's `transactionTime`, or, in a file that the Python sync script wrote, its client's clock.
    pub last_sync_time: Option<DateTime<Utc>>,
    /// When the last run completed, by our clock; absent in a file that the Python sync script wrote.
    pub last_completed: Option<DateTime<Utc>>,
    /// `transactionTime` by type: what the tables' own transactions say, repeated.
    pub watermarks: BTreeMap<String, DateTime<Utc>>,
    /// Successful runs since the tables were last optimized, and vacuumed, by the pipeline itself.
    pub runs_since_optimize: u64,
    /// See `runs_since_optimize`.
    pub runs_since_vacuum: u64,
    /// The scope that `last_sync_time` belongs to; absent in a file that the Python sync script wrote.
    pub scope: Option<String>,
    /// Whether the run that it is of exported all types, and none by name.
    pub all_types: bool,
}

impl StateFile {
    /// Whether the Python sync script wrote it: its time is a client's clock.
    pub fn is_of_sync_script(&self) -> bool {
        self.last_sync_time.is_some() && self.scope.is_none()
    }

    /// Reads the file; nothing where there is none.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error).context(ErrorKind::State, format!("{} cannot be read", path.display())),
        };
        let json = serde_json::from_slice(&bytes).context(ErrorKind::State, format!("{} is not JSON", path.display()));
        let json: Value = json.map_err(|error| error.with_hint(REBUILT))?;
        if !json.is_object() {
            return Err(Error::new(ErrorKind::State, format!("{}: not a fhirlake state file", path.display())).with_hint(REBUILT));
        }
        let time = |key: &str| match json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_str().and_then(parse_time).map(Some).ok_or_else(|| {
                Error::new(ErrorKind::State, format!("{}: {key} is not an instant", path.display())).with_hint(REBUILT)
            }),
        };
        Ok(Self {
            last_sync_time: time("last_sync_time")?,
            last_completed: time("last_completed")?,
            watermarks: json
                .get("watermarks")
                .and_then(Value::as_object)
                .into_iter()
                .flatten()
                .filter_map(|(name, time)| Some((name.clone(), parse_time(time.as_str()?)?)))
                .collect(),
            runs_since_optimize: json.get("runs_since_optimize").and_then(Value::as_u64).unwrap_or(0),
            runs_since_vacuum: json.get("runs_since_vacuum").and_then(Value::as_u64).unwrap_or(0),
            scope: json.get("scope").and_then(Value::as_str).map(str::to_owned),
            // Files of earlier versions do not say so: then one full export makes sure.
            all_types: json.get("all_types").and_then(Value::as_bool).unwrap_or(false),
        })
    }

    /// Writes the file; members that others put there stay.
    pub fn write(&self, path: &Path) -> Result<()> {
        let old = std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<Map<String, Value>>(&bytes).ok());
        let mut members = old.unwrap_or_default();
        if let Some(time) = &self.last_sync_time {
            members.insert("last_sync_time".into(), json!(python_time(time)));
        }
        if let Some(time) = &self.last_completed {
            members.insert("last_completed".into(), json!(python_time(time)));
        }
        for (key, runs) in [("runs_since_optimize", self.runs_since_optimize), ("runs_since_vacuum", self.runs_since_vacuum)] {
            if runs > 0 || members.contains_key(key) {
                members.insert(key.into(), json!(runs));
            }
        }
        if let Some(scope) = &self.scope {
            members.insert("scope".into(), json!(scope));
            members.insert("all_types".into(), json!(self.all_types));
            let times = self.watermarks.iter().map(|(name, time)| (name.clone(), json!(python_time(time))));
            members.insert("watermarks".into(), Value::Object(times.collect()));
        }
        if let Some(folder) = path.parent() {
            private_dir(folder)?;
        }
        write_atomically(path, format!("{:#}\n", Value::Object(members)).as_bytes())
    }
}

/// As Python's `datetime.fromisoformat` of every age reads it: `+00:00`, never `Z`.
fn python_time(time: &DateTime<Utc>) -> String {
    // Its `fromisoformat` wants three digits or six before 3.11.
    let time = DateTime::from_timestamp_micros(time.timestamp_micros()).unwrap_or(*time);
    time.to_rfc3339_opts(SecondsFormat::AutoSi, false)
}

/// An instant, or Python's `isoformat()` or `str()` of a naive time, which the Python sync script may have written in UTC.
fn parse_time(text: &str) -> Option<DateTime<Utc>> {
    let text = text.replacen(' ', "T", 1);
    let zoned = DateTime::parse_from_rfc3339(&text).ok().map(|time| time.to_utc());
    zoned.or_else(|| text.parse::<chrono::NaiveDateTime>().ok().map(|naive| naive.and_utc()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Advice;

    #[test]
    fn the_recipes_file_is_read_and_what_others_wrote_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        std::fs::write(&path, r#"{"last_sync_time": "2025-03-01T10:15:00.123456", "note": 1}"#).unwrap();
        let mut state = StateFile::read(&path).unwrap();
        assert!(state.is_of_sync_script());
        assert_eq!(state.last_sync_time.unwrap().timestamp_micros(), 1_740_824_100_123_456);
        state.scope = Some("s".into());
        state.write(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("2025-03-01T10:15:00.123456+00:00") && text.contains("\"note\": 1"), "{text}");
        assert_eq!(StateFile::read(&path).unwrap(), state);
    }

    #[test]
    fn a_file_that_is_none_is_an_error_not_a_full_export() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        assert_eq!(StateFile::read(&path).unwrap(), StateFile::default());
        for text in ["{", "[]", r#"{"last_sync_time": "yesterday"}"#] {
            std::fs::write(&path, text).unwrap();
            let error = StateFile::read(&path).unwrap_err();
            assert!(error.kind() == ErrorKind::State && error.advice().contains("move the file away"), "{error}");
        }
        for text in ["2025-03-01 10:15:00.5", "2025-03-01 10:15:00.500000+00:00", "2025-03-01T10:15:00.5Z"] {
            assert_eq!(parse_time(text).map(|time| time.timestamp_millis()), Some(1_740_824_100_500), "{text}");
        }
    }
}
