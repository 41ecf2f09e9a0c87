//! Export jobs: everything that the server works on or holds for us, and that must outlive a run, so that an export of
//! days is never started twice.
//!
//! [`ExportJobs`] is the document that is persisted. It changes by one pure function, [`ExportJobs::apply`], and every
//! event is persisted before its effect is relied on:
//!
//! ```text
//!  planned ──▶ requested ──▶ accepted ──▶ complete ──▶ merged ──▶ released
//!                  │  └──▶ rejected, throttled     │        (DELETE, then forgotten)
//!                  └─────▶ unconfirmed             └──▶ lost: expired, or given up after three failures
//! ```

pub mod checkpoint;
mod events;
mod tracking;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::state::{Document, OnDamage};

pub use events::{ExportEvent, ExportEventSink, ExportHandle, Kickoff};
pub use tracking::OfServer;
pub(crate) use tracking::{
    Resumed, can_be_resumed, check_throttled, failed, merged, merged_in_part, note, note_floors, rejected_lately,
    resume, settle, sink,
};

/// Runs in which the server may fail to give all of an export before another is started: it may never give the rest.
const MAX_FAILURES: u32 = 3;

/// Time for which a job whose DELETE fails is tried to be released: what a server keeps so long it has forgotten
/// itself.
const FORGOTTEN_AFTER: TimeDelta = TimeDelta::days(30);

/// Time for which a server that throttles without a time is left alone.
const USUAL_WAIT: TimeDelta = TimeDelta::hours(1);

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
    Merged,
    /// The server failed to give all of it in too many runs: another export takes its place.
    GivenUp,
}

/// An export that the server accepted, and that is not yet released.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    #[serde(rename = "asked")]
    pub fingerprint: String,
    /// Types that were requested; empty for all.
    pub types: Vec<String>,
    /// `_since`, microseconds since the epoch.
    pub since: Option<i64>,
    /// True if rows of equal version are to be rewritten where their content differs.
    #[serde(default)]
    pub full_refresh: bool,
    /// The server's `transactionTime`, microseconds since the epoch, once its manifest came.
    pub transaction_time: Option<i64>,
    /// Runs in which the server did not give all of it.
    pub failures: u32,
    /// True if a run ended by itself and did not merge all of it, whoever's fault it was.
    #[serde(default, rename = "behind")]
    pub incomplete: bool,
    /// Types whose files hold rows of other types: they are read again though the type is merged.
    #[serde(default, skip_serializing_if = "Vec::is_empty", rename = "mixed")]
    pub mixed_types: Vec<String>,
    /// All of it is merged, and the server could not be told so yet.
    #[serde(default)]
    pub merged: bool,
}

impl ExportJob {
    /// Returns where it is in its life.
    pub fn state(&self) -> JobState {
        match (self.merged, self.failures >= MAX_FAILURES, self.transaction_time) {
            (true, ..) => JobState::Merged,
            (false, true, _) => JobState::GivenUp,
            (false, false, Some(transaction_time)) => JobState::Complete { transaction_time },
            (false, false, None) => JobState::Accepted,
        }
    }

    /// Returns true if a later run needs it no more, so that the server may delete it.
    pub fn is_releasable(&self) -> bool {
        matches!(self.state(), JobState::Merged | JobState::GivenUp)
    }
}

/// A kick-off to which no answer came: the server may have made an export whose status URL nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnconfirmedKickoff {
    /// Time at which it was sent.
    pub time: DateTime<Utc>,
    /// Pipeline and scope.
    pub scope: String,
}

/// Time from which a server that throttled a kick-off takes the next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottledUntil {
    /// Not before.
    pub time: DateTime<Utc>,
    /// Pipeline and scope.
    pub scope: String,
    /// The server's message.
    pub why: String,
}

/// A type that the server rejects while it accepts others: it is exported separately until the server accepts it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedType {
    /// The type.
    pub resource_type: String,
    /// Pipeline and scope.
    pub scope: String,
    /// Time at which it was last rejected.
    pub time: DateTime<Utc>,
    /// The server's message.
    pub why: String,
}

/// A type that did not come whole although its table's watermark may say so, since the server reported the error after
/// the commit. Exports ask for it from this time until it comes whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Floor {
    /// The type.
    pub resource_type: String,
    /// Pipeline and scope.
    pub scope: String,
    /// `_since`, microseconds since the epoch; `None` for everything.
    pub since: Option<i64>,
}

/// A server that rejected every type, each by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllRejected {
    /// Time.
    pub time: DateTime<Utc>,
    /// Pipeline and scope.
    pub scope: String,
    /// The types.
    pub types: Vec<String>,
}

impl AllRejected {
    /// Returns true within a day: its types are not bisected again so soon.
    pub fn holds(&self, now: DateTime<Utc>) -> bool {
        (now - self.time).abs() < TimeDelta::days(1)
    }
}

/// The document of a pipeline's export jobs: `exports.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportJobs {
    /// Jobs that are not released, the oldest first.
    #[serde(default, rename = "in_flight")]
    pub jobs: Vec<ExportJob>,
    /// A server that throttles.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "not_before")]
    pub throttled: Option<ThrottledUntil>,
    /// Kick-offs without an answer, until one is answered by an export.
    #[serde(default, skip_serializing_if = "Vec::is_empty", rename = "unanswered")]
    pub unconfirmed: Vec<UnconfirmedKickoff>,
    /// Types that the server rejects, while it accepts others.
    #[serde(default, skip_serializing_if = "Vec::is_empty", rename = "set_aside")]
    pub rejected: Vec<RejectedType>,
    /// Types that did not come whole, whatever the watermarks of their tables say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub floors: Vec<Floor>,
    /// Time at which the server last rejected every type.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "all_refused")]
    pub all_rejected: Option<AllRejected>,
}

/// Whose event it is, and when it happened.
#[derive(Debug, Clone, Copy)]
pub struct EventOrigin<'a> {
    /// Pipeline and scope of the run.
    pub scope: &'a str,
    /// True if the run rewrites rows of equal version.
    pub full_refresh: bool,
    /// Time.
    pub now: DateTime<Utc>,
}

impl ExportJobs {
    /// Applies an event of a run. Pure: the same document and event give the same document.
    pub fn apply(&mut self, event: &ExportEvent<'_>, origin: EventOrigin<'_>) {
        let EventOrigin { scope, full_refresh, now } = origin;
        let of = |status: &url::Url| {
            let status = status.to_string();
            move |job: &ExportJob| job.status == status
        };
        match event {
            ExportEvent::Requested => self.unconfirmed.push(UnconfirmedKickoff { time: now, scope: scope.to_owned() }),
            ExportEvent::NotAccepted => drop(self.unconfirmed.pop()),
            ExportEvent::Accepted { kickoff, status, separate } => {
                (self.throttled, self.all_rejected) = (None, None);
                self.rejected
                    .retain(|known| known.scope != scope || !kickoff.request.types.contains(&known.resource_type));
                self.unconfirmed.retain(|kick_off| kick_off.scope != scope);
                // A server that gives the same status URL again has the same job.
                let is_same = |job: &mut ExportJob| job.status == status.as_str();
                let mixed_types = self.jobs.extract_if(.., is_same).flat_map(|job| job.mixed_types).collect();
                self.jobs.push(ExportJob {
                    status: status.to_string(),
                    separate: *separate,
                    accepted: now,
                    scope: scope.to_owned(),
                    fingerprint: kickoff.fingerprint(),
                    types: kickoff.request.types.clone(),
                    since: kickoff.request.since,
                    full_refresh,
                    transaction_time: None,
                    failures: 0,
                    incomplete: false,
                    mixed_types,
                    merged: false,
                });
            }
            ExportEvent::TypesRejected(types) => {
                let is_known = |known: &RejectedType| types.iter().any(|(name, _)| *name == known.resource_type);
                self.rejected.retain(|known| known.scope == scope && !is_known(known));
                self.rejected.extend(types.iter().map(|(name, why)| RejectedType {
                    resource_type: name.clone(),
                    scope: scope.to_owned(),
                    time: now,
                    why: why.clone(),
                }));
            }
            ExportEvent::AllRejected(types) => {
                self.all_rejected = Some(AllRejected { time: now, scope: scope.to_owned(), types: types.to_vec() });
            }
            ExportEvent::Complete { status, transaction_time } => {
                let is_it = of(status);
                let found = self.jobs.iter_mut().filter(|job| is_it(job));
                found.for_each(|job| job.transaction_time = Some(*transaction_time));
            }
            ExportEvent::Expired { status } => {
                let is_it = of(status);
                self.jobs.retain(|job| !is_it(job));
            }
            ExportEvent::UnrequestedType { resource_type } => {
                for job in self.jobs.iter_mut().filter(|job| job.scope == scope) {
                    if !job.mixed_types.iter().any(|known| **known == ***resource_type) {
                        job.mixed_types.push(resource_type.to_string());
                    }
                }
            }
            ExportEvent::Unusable { status } => {
                let is_it = of(status);
                self.jobs.iter_mut().filter(|job| is_it(job)).for_each(|job| job.failures += 1);
            }
            ExportEvent::Throttled { wait, why } => {
                let wait = wait.and_then(|wait| TimeDelta::from_std(wait).ok()).unwrap_or(USUAL_WAIT);
                let time = now + wait.min(TimeDelta::days(7));
                self.throttled = Some(ThrottledUntil { time, scope: scope.to_owned(), why: (*why).to_owned() });
            }
            ExportEvent::RunFailed { jobs, given } => {
                let used =
                    |job: &&mut ExportJob| jobs.contains(&job.status.as_str()) && job.scope == scope && !job.merged;
                for job in self.jobs.iter_mut().filter(used).filter(|job| job.transaction_time.is_some()) {
                    job.incomplete = true;
                    job.failures = match given {
                        OfServer::Nothing => job.failures,
                        OfServer::FilesFailed => job.failures + 1,
                        // It will not give them the next time either: the next run starts a new export.
                        OfServer::FilesGone => MAX_FAILURES,
                    };
                }
            }
            ExportEvent::FloorsChanged { incomplete, whole } => self.change_floors(scope, incomplete, whole),
            ExportEvent::Merged { jobs } => {
                let done = |job: &&mut ExportJob| jobs.contains(&job.status.as_str());
                self.jobs.iter_mut().filter(done).for_each(|job| job.merged = true);
            }
            ExportEvent::Released { jobs } => {
                self.jobs.retain(|job| !(job.is_releasable() && jobs.contains(&job.status.as_str())));
            }
            ExportEvent::Cancelled { jobs } => self.jobs.retain(|job| !jobs.contains(&job.status.as_str())),
            ExportEvent::Forgotten => *self = Self { jobs: std::mem::take(&mut self.jobs), ..Self::default() },
        }
    }

    /// A floor is gone once its type came whole in an export that asked from it or from earlier.
    fn change_floors(&mut self, scope: &str, incomplete: &[(String, Option<i64>)], whole: &[(String, Option<i64>)]) {
        self.floors.retain(|floor| {
            let is_it = |(name, since): &&(String, Option<i64>)| *name == floor.resource_type && *since <= floor.since;
            floor.scope != scope || !whole.iter().any(|came| is_it(&came))
        });
        for (name, since) in incomplete {
            let is_it = |floor: &&mut Floor| floor.scope == scope && floor.resource_type == *name;
            match self.floors.iter_mut().find(is_it) {
                Some(floor) => floor.since = floor.since.min(*since),
                None => {
                    let (resource_type, scope, since) = (name.clone(), scope.to_owned(), *since);
                    self.floors.push(Floor { resource_type, scope, since });
                }
            }
        }
    }

    /// Returns `since`, or the floor of a type where that is earlier. `None`, everything, is the earliest.
    pub fn floored(&self, scope: &str, resource_type: &str, since: Option<i64>) -> Option<i64> {
        let floor = self.floors.iter().find(|floor| floor.scope == scope && floor.resource_type == resource_type);
        floor.map_or(since, |floor| since.min(floor.since))
    }
}

impl Document for ExportJobs {
    const NAME: &'static str = "exports.json";
    const ON_DAMAGE: OnDamage = OnDamage::Fail(
        "restore the file from a backup, or move it away: the next run then starts a new export, and the server may \
            hold jobs that \
         fhirlake no longer knows of",
    );
}

#[cfg(test)]
mod tests;
