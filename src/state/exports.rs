//! Exports that a server works on or holds for us, and when it may be asked again: what must outlive a run, so that an
//! export of days is never begun twice.

use std::path::Path;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::error::{Context, ErrorKind, Result};
use foundation::secure_fs::write_atomically;

/// An export that was kicked off and is not yet merged whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InFlight {
    /// Where its status is asked for. May hold a secret: the file is private.
    pub status: String,
    /// Whether a poll's own status and the export's are apart.
    pub separate: bool,
    /// When the server accepted it.
    pub accepted: DateTime<Utc>,
    /// Pipeline and scope, as the watermark has them.
    pub scope: String,
    /// Everything that was asked, to know the same again.
    pub asked: String,
    /// Types that were asked for; empty for all.
    pub types: Vec<String>,
    /// `_since`, microseconds since the epoch.
    pub since: Option<i64>,
    /// Whether rows of equal version are to be rewritten where their content differs.
    #[serde(default)]
    pub full_refresh: bool,
    /// The server's `transactionTime`, microseconds since the epoch, once its manifest came.
    pub transaction_time: Option<i64>,
    /// Runs in which the server did not give all of it.
    pub failures: u32,
    /// Whether a run ended by itself and did not merge all of it, whoever's fault it was.
    #[serde(default)]
    pub behind: bool,
    /// Types whose files hold rows of other types: they are read again though the type is merged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mixed: Vec<String>,
    /// All of it is merged, and the server could not be told so yet.
    #[serde(default)]
    pub merged: bool,
}

/// A kick-off to which no answer came: the server may have made an export whose status URL nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unanswered {
    /// When it was sent.
    pub time: DateTime<Utc>,
    /// Pipeline and scope.
    pub scope: String,
}

/// When a server that refused a kick-off may be asked again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotBefore {
    /// Not before.
    pub time: DateTime<Utc>,
    /// Pipeline and scope.
    pub scope: String,
    /// The server's words.
    pub why: String,
}

/// A type that the server refuses while it takes others: it is asked for by itself until it comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAside {
    /// The type.
    pub resource_type: String,
    /// Pipeline and scope.
    pub scope: String,
    /// When it was last refused.
    pub time: DateTime<Utc>,
    /// The server's words.
    pub why: String,
}

/// A type that did not come whole although its table's watermark may say so, since the server reported the error after the
/// commit. Exports ask for it from this time until it comes whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Floor {
    /// The type.
    pub resource_type: String,
    /// Pipeline and scope.
    pub scope: String,
    /// `_since`, microseconds since the epoch; `None` for everything.
    pub since: Option<i64>,
}

/// A server that refused every type, each by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllRefused {
    /// When.
    pub time: DateTime<Utc>,
    /// Pipeline and scope.
    pub scope: String,
    /// The types.
    pub types: Vec<String>,
}

impl AllRefused {
    /// Whether that is less than a day ago: its types are not asked for one by one again so soon.
    pub fn holds(&self, now: DateTime<Utc>) -> bool {
        (now - self.time).abs() < TimeDelta::days(1)
    }
}

/// What is remembered.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exports {
    /// Exports in flight.
    #[serde(default)]
    pub in_flight: Vec<InFlight>,
    /// A server that asks to come back later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<NotBefore>,
    /// Kick-offs without an answer, until one is answered by an export.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unanswered: Vec<Unanswered>,
    /// Types that the server refuses, while it takes others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set_aside: Vec<SetAside>,
    /// Types that did not come whole, whatever the watermarks of their tables say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub floors: Vec<Floor>,
    /// When it last refused them all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub all_refused: Option<AllRefused>,
}

impl Exports {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error).context(ErrorKind::State, format!("{} cannot be read", path.display())),
        };
        serde_json::from_slice(&text).context(ErrorKind::State, format!("{} is not what a run wrote", path.display()))
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).context(ErrorKind::Internal, "the exports in flight")?;
        write_atomically(path, &text)
    }
}
