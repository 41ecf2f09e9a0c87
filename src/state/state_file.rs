//! `state.json`: the watermark for people, health checks and those who come from the Python sync script.

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::de::{DeserializeOwned, Error as _, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::{Document, OnDamage, STATE_FILE};

/// Content of `state.json`. Members that others put there stay.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StateFile {
    /// `last_sync_time`: the server's `transactionTime`, or, in a file that the Python sync script wrote, its client's
    /// clock.
    #[serde(with = "instant", skip_serializing_if = "Option::is_none")]
    pub last_sync_time: Option<DateTime<Utc>>,
    /// Time at which the last run completed, by our clock; absent in a file that the Python sync script wrote.
    #[serde(with = "instant", skip_serializing_if = "Option::is_none")]
    pub last_completed: Option<DateTime<Utc>>,
    /// `transactionTime` by type: what the tables' own transactions say, repeated.
    #[serde(with = "instants", skip_serializing_if = "BTreeMap::is_empty")]
    pub watermarks: BTreeMap<String, DateTime<Utc>>,
    /// Successful runs since the tables were last optimized, and vacuumed, by the pipeline itself.
    #[serde(deserialize_with = "lenient", skip_serializing_if = "is_zero")]
    pub runs_since_optimize: u64,
    /// See `runs_since_optimize`.
    #[serde(deserialize_with = "lenient", skip_serializing_if = "is_zero")]
    pub runs_since_vacuum: u64,
    /// The scope that `last_sync_time` belongs to; absent in a file that the Python sync script wrote.
    #[serde(deserialize_with = "lenient", skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    /// True if the run that it is of exported all types, and none by name. Files of earlier versions do not say so:
    /// then one full export makes sure.
    #[serde(deserialize_with = "lenient")]
    pub all_types: bool,
    /// Written by [`Document`].
    #[serde(skip_serializing, rename = "version")]
    _version: IgnoredAny,
    /// Members that others put there.
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl Document for StateFile {
    const NAME: &'static str = STATE_FILE;
    const ON_DAMAGE: OnDamage =
        OnDamage::Fail("move the file away: the tables have their own watermarks, and the next run writes a new one");
}

impl StateFile {
    /// Returns true if the Python sync script wrote it: its time is a client's clock.
    pub fn is_of_sync_script(&self) -> bool {
        self.last_sync_time.is_some() && self.scope.is_none()
    }
}

/// Reads a member that only fhirlake writes; one that another has put there counts as missing.
fn lenient<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).unwrap_or_default())
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// An instant as Python's `datetime.fromisoformat` of every age reads it.
mod instant {
    use super::*;

    pub(super) fn serialize<S: Serializer>(time: &Option<DateTime<Utc>>, serializer: S) -> Result<S::Ok, S::Error> {
        time.as_ref().map(python_time).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<DateTime<Utc>>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        let parse = |text: String| parse_time(&text).ok_or_else(|| D::Error::custom("not an instant"));
        text.map(parse).transpose()
    }
}

/// Instants by name. One that cannot be read counts as missing: the tables have them too.
mod instants {
    use super::*;

    pub(super) fn serialize<S: Serializer>(
        times: &BTreeMap<String, DateTime<Utc>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(times.iter().map(|(name, time)| (name, python_time(time))))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<String, DateTime<Utc>>, D::Error> {
        let members: BTreeMap<String, Value> = lenient(deserializer)?;
        Ok(members.into_iter().filter_map(|(name, time)| Some((name, parse_time(time.as_str()?)?))).collect())
    }
}

/// Returns an instant with `+00:00`, never `Z`, which `fromisoformat` did not read before Python 3.11.
fn python_time(time: &DateTime<Utc>) -> String {
    // Before 3.11 it wants three digits or six.
    let time = DateTime::from_timestamp_micros(time.timestamp_micros()).unwrap_or(*time);
    time.to_rfc3339_opts(SecondsFormat::AutoSi, false)
}

/// An instant, or Python's `isoformat()` or `str()` of a naive time, which the Python sync script may have written in
/// UTC.
fn parse_time(text: &str) -> Option<DateTime<Utc>> {
    let text = text.replacen(' ', "T", 1);
    let zoned = DateTime::parse_from_rfc3339(&text).ok().map(|time| time.to_utc());
    zoned.or_else(|| text.parse::<chrono::NaiveDateTime>().ok().map(|naive| naive.and_utc()))
}

#[cfg(test)]
mod tests {
    use super::super::StateStore;
    use super::*;
    use crate::error::{Advice, ErrorKind};

    #[test]
    fn the_recipes_file_is_read_and_what_others_wrote_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        std::fs::write(&path, r#"{"last_sync_time": "2025-03-01T10:15:00.123456", "note": 1}"#).unwrap();
        let store = StateStore::local(folder.path(), None);
        let mut state: StateFile = store.read().unwrap();
        assert!(state.is_of_sync_script());
        assert_eq!(state.last_sync_time.unwrap().timestamp_micros(), 1_740_824_100_123_456);
        state.scope = Some("s".into());
        store.write(&state).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("2025-03-01T10:15:00.123456+00:00") && text.contains("\"note\": 1"), "{text}");
        assert_eq!(store.read::<StateFile>().unwrap(), state);
    }

    // Breaks if members of others, or odd ones, keep a run from being made.
    #[test]
    fn odd_members_count_as_missing() {
        let folder = tempfile::tempdir().unwrap();
        let store = StateStore::local(folder.path(), None);
        let text = r#"{"last_sync_time":"2025-03-01T10:15:00Z","version":"1.2","all_types":null,"watermarks":null,
            "scope":7,"runs_since_vacuum":"many","mine":[1]}"#;
        std::fs::write(folder.path().join("state.json"), text).unwrap();
        let state: StateFile = store.read().unwrap();
        assert!(state.is_of_sync_script() && !state.all_types && state.watermarks.is_empty());
        store.write(&state).unwrap();
        assert!(std::fs::read_to_string(folder.path().join("state.json")).unwrap().contains("\"mine\""));
    }

    #[test]
    fn a_file_that_is_none_is_an_error_not_a_full_export() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        let store = StateStore::local(folder.path(), None);
        assert_eq!(store.read::<StateFile>().unwrap(), StateFile::default());
        for text in ["{", "[]", r#"{"last_sync_time": "yesterday"}"#] {
            std::fs::write(&path, text).unwrap();
            let error = store.read::<StateFile>().unwrap_err();
            assert!(error.kind() == ErrorKind::State && error.advice().contains("move the file away"), "{error}");
        }
        for text in ["2025-03-01 10:15:00.5", "2025-03-01 10:15:00.500000+00:00", "2025-03-01T10:15:00.5Z"] {
            assert_eq!(parse_time(text).map(|time| time.timestamp_millis()), Some(1_740_824_100_500), "{text}");
        }
    }
}
