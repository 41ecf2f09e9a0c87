//! An export that the server accepted, as a state machine.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// Runs in which the server may fail to give all of an export before another is started: it may never give the rest.
pub(super) const MAX_FAILURES: u32 = 3;

/// State of a job. What is planned or requested has no status URL yet; what is released is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobState {
    /// The server accepted the kick-off.
    Accepted,
    /// Its manifest is complete.
    Complete {
        /// The server's `transactionTime`, microseconds since the epoch.
        transaction_time: i64,
    },
    /// All of it is merged; the server is still to be told.
    Merged {
        /// The server's `transactionTime`, where its manifest came.
        transaction_time: Option<i64>,
    },
    /// The server failed to give all of it in too many runs: another export takes its place.
    Lost {
        /// The server's `transactionTime`, where its manifest came.
        transaction_time: Option<i64>,
    },
}

impl JobState {
    /// Returns the server's `transactionTime`, microseconds since the epoch, once its manifest came.
    pub fn transaction_time(self) -> Option<i64> {
        match self {
            JobState::Accepted => None,
            JobState::Complete { transaction_time } => Some(transaction_time),
            JobState::Merged { transaction_time } | JobState::Lost { transaction_time } => transaction_time,
        }
    }

    /// Returns true if a run can still merge more of it.
    pub(super) fn is_unmerged_and_complete(self) -> bool {
        !matches!(self, JobState::Merged { .. }) && self.transaction_time().is_some()
    }

    pub(super) fn completed(self, transaction_time: i64) -> Self {
        match self {
            JobState::Accepted | JobState::Complete { .. } => JobState::Complete { transaction_time },
            JobState::Merged { .. } => JobState::Merged { transaction_time: Some(transaction_time) },
            JobState::Lost { .. } => JobState::Lost { transaction_time: Some(transaction_time) },
        }
    }

    pub(super) fn merged(self) -> Self {
        JobState::Merged { transaction_time: self.transaction_time() }
    }

    fn lost(self) -> Self {
        match self {
            JobState::Merged { .. } => self,
            _ => JobState::Lost { transaction_time: self.transaction_time() },
        }
    }
}

/// An export that the server accepted, and that is not yet released.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StoredJob", into = "StoredJob")]
pub struct ExportJob {
    /// Status URL. May hold a secret: the file is private.
    pub status: String,
    /// True if a poll's own status and the export's are apart.
    pub separate: bool,
    /// Time at which the server accepted it.
    pub accepted: DateTime<Utc>,
    /// Pipeline and scope, as the watermark has them.
    pub scope: String,
    /// Everything that was requested, to know the same request again.
    pub fingerprint: String,
    /// Types that were requested; empty for all.
    pub types: Vec<String>,
    /// `_since`, microseconds since the epoch.
    pub since: Option<i64>,
    /// True if rows of equal version are to be rewritten where their content differs.
    pub full_refresh: bool,
    /// Its state.
    pub state: JobState,
    /// Runs in which the server did not give all of it.
    pub failures: u32,
    /// True if a run ended by itself and did not merge all of it, whether by the server's fault or its own.
    pub incomplete: bool,
    /// Types whose files hold rows of other types: they are read again though the type is merged.
    pub mixed_types: Vec<String>,
}

impl ExportJob {
    /// Returns true if a later run needs it no more, so that the server may delete it.
    pub fn is_releasable(&self) -> bool {
        matches!(self.state, JobState::Merged { .. } | JobState::Lost { .. })
    }

    /// Notes that the server failed to give all of it in so many runs.
    pub(super) fn fail(&mut self, failures: u32) {
        self.failures = failures;
        if failures >= MAX_FAILURES {
            self.state = self.state.lost();
        }
    }
}

/// A job as `exports.json` has it since 0.1.0: flags, of which the state follows.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredJob {
    status: String,
    separate: bool,
    accepted: DateTime<Utc>,
    scope: String,
    #[serde(rename = "asked")]
    fingerprint: String,
    types: Vec<String>,
    since: Option<i64>,
    #[serde(default)]
    full_refresh: bool,
    transaction_time: Option<i64>,
    failures: u32,
    #[serde(default, rename = "behind")]
    incomplete: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty", rename = "mixed")]
    mixed_types: Vec<String>,
    #[serde(default)]
    merged: bool,
}

impl From<StoredJob> for ExportJob {
    fn from(job: StoredJob) -> Self {
        let transaction_time = job.transaction_time;
        let state = match (job.merged, job.failures >= MAX_FAILURES, transaction_time) {
            (true, ..) => JobState::Merged { transaction_time },
            (false, true, _) => JobState::Lost { transaction_time },
            (false, false, Some(transaction_time)) => JobState::Complete { transaction_time },
            (false, false, None) => JobState::Accepted,
        };
        Self {
            status: job.status,
            separate: job.separate,
            accepted: job.accepted,
            scope: job.scope,
            fingerprint: job.fingerprint,
            types: job.types,
            since: job.since,
            full_refresh: job.full_refresh,
            state,
            failures: job.failures,
            incomplete: job.incomplete,
            mixed_types: job.mixed_types,
        }
    }
}

impl From<ExportJob> for StoredJob {
    fn from(job: ExportJob) -> Self {
        Self {
            transaction_time: job.state.transaction_time(),
            merged: matches!(job.state, JobState::Merged { .. }),
            status: job.status,
            separate: job.separate,
            accepted: job.accepted,
            scope: job.scope,
            fingerprint: job.fingerprint,
            types: job.types,
            since: job.since,
            full_refresh: job.full_refresh,
            failures: job.failures,
            incomplete: job.incomplete,
            mixed_types: job.mixed_types,
        }
    }
}
