//! `/health`, as the Python sync script's: whether the last successful run is recent enough.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use serde_json::{Value, json};

use crate::state::{StateFile, StateStore};

/// Difference that clocks may have.
const AHEAD: TimeDelta = TimeDelta::minutes(5);

/// Health of a pipeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub enum Health {
    /// A run completed recently enough.
    Healthy {
        /// Time.
        last_sync: DateTime<Utc>,
    },
    /// None did.
    Unhealthy {
        /// Time at which the last one did.
        last_sync: Option<DateTime<Utc>>,
    },
    /// The state cannot be read.
    Error {
        /// Why.
        message: String,
    },
}

impl Health {
    /// Judges a pipeline by its state.
    pub fn of(state: &StateStore, max_age: Duration, now: DateTime<Utc>) -> Self {
        if state.is_missing() {
            // `serve` makes it when it begins: a disk is not mounted, or somebody took it away.
            return Health::Error { message: "the state's folder is not there".to_owned() };
        }
        match state.read::<StateFile>() {
            // Without a token anybody may ask; where a store is, and its own words, are for the log.
            Err(error) if state.folder().is_none() => {
                tracing::warn!(%error, "the state cannot be read");
                Health::Error { message: "the state cannot be read: the log says why".to_owned() }
            }
            Err(error) => Health::Error { message: error.to_string() },
            Ok(state) if state.last_completed.or(state.last_sync_time).is_some_and(|last| last > now + AHEAD) => {
                Health::Error { message: "the last sync lies in the future: one of the clocks is wrong".to_owned() }
            }
            // A file that the Python sync script wrote says when its client began.
            Ok(state) => match state.last_completed.or(state.last_sync_time) {
                Some(last_sync) if (now - last_sync).to_std().unwrap_or_default() < max_age => {
                    Health::Healthy { last_sync }
                }
                last_sync => Health::Unhealthy { last_sync },
            },
        }
    }

    /// Returns true if it is well.
    pub fn is_healthy(&self) -> bool {
        matches!(self, Health::Healthy { .. })
    }

    /// Returns the time at which the last run completed.
    pub fn last_sync(&self) -> Option<DateTime<Utc>> {
        match self {
            Health::Healthy { last_sync } => Some(*last_sync),
            Health::Unhealthy { last_sync } => *last_sync,
            Health::Error { .. } => None,
        }
    }

    /// The status and body of the answer for one pipeline.
    pub fn answer(&self) -> (u16, Value) {
        let code = if self.is_healthy() { 200 } else { 503 };
        (code, json!(self))
    }

    /// The same for several: the worst of them, with the oldest sync, and each by its name.
    pub fn answer_of<N: ToString>(all: &[(N, Health)]) -> (u16, Value) {
        let worst = |health: &Health| match health {
            Health::Error { .. } => 2,
            Health::Unhealthy { .. } => 1,
            Health::Healthy { .. } => 0,
        };
        let Some((_, health)) =
            all.iter().max_by_key(|(_, health)| (worst(health), std::cmp::Reverse(health.last_sync())))
        else {
            return (200, json!({"status": "healthy"}));
        };
        let (code, mut body) = health.answer();
        if all.len() > 1 {
            let each = all.iter().map(|(name, health)| (name.to_string(), json!(health)));
            body["pipelines"] = Value::Object(each.collect());
        }
        (code, body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_the_recipe_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        let now = DateTime::parse_from_rfc3339("2026-01-01T12:00:00Z").unwrap().to_utc();
        let health = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Health::of(&StateStore::local(folder.path(), None), Duration::from_secs(7200), now)
        };
        let (code, body) =
            health(r#"{"last_sync_time":"2025-12-31T00:00:00Z","last_completed":"2026-01-01T10:00:01Z"}"#).answer();
        assert_eq!((code, &body), (200, &json!({"status": "healthy", "last_sync": "2026-01-01T10:00:01Z"})));
        let (code, body) = health(r#"{"last_sync_time":"2026-01-01T10:00:00Z"}"#).answer();
        assert_eq!((code, body["status"].as_str()), (503, Some("unhealthy")), "two hours are too long");
        let (code, body) = health("{").answer();
        assert_eq!((code, body["status"].as_str(), body["message"].is_string()), (503, Some("error"), true));
        std::fs::remove_file(&path).unwrap();
        let never = Health::of(&StateStore::local(folder.path(), None), Duration::from_secs(7200), now);
        assert_eq!(never.answer(), (503, json!({"status": "unhealthy", "last_sync": null})));
        let well = Health::Healthy { last_sync: now };
        let (code, body) = Health::answer_of(&[("a", well.clone()), ("b", never)]);
        assert_eq!(
            (code, body["status"].as_str(), body["pipelines"]["a"]["status"].as_str()),
            (503, Some("unhealthy"), Some("healthy"))
        );
        assert_eq!(
            Health::answer_of(&[("a", well)]).1,
            json!({"status": "healthy", "last_sync": "2026-01-01T12:00:00Z"})
        );
    }
}
