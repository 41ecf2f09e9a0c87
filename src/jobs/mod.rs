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
mod job;
mod tracking;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use self::job::MAX_FAILURES;
use crate::state::{Document, OnDamage};

pub use events::{ExportEvent, ExportEventSink, ExportHandle, Kickoff};
pub use job::{ExportJob, JobState};
pub use tracking::OfServer;
pub(crate) use tracking::{
    Resumed, can_be_resumed, check_throttled, failed, merged, merged_in_part, note, note_floors, rejected_lately,
    resume, settle, sink,
};

/// Time for which a job whose DELETE fails is tried to be released: what a server keeps so long it has forgotten
/// itself.
const FORGOTTEN_AFTER: TimeDelta = TimeDelta::days(30);

/// Time for which a server that throttles without a time is left alone.
const USUAL_WAIT: TimeDelta = TimeDelta::hours(1);

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
                    state: JobState::Accepted,
                    failures: 0,
                    incomplete: false,
                    mixed_types,
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
                found.for_each(|job| job.state = job.state.completed(*transaction_time));
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
                self.jobs.iter_mut().filter(|job| is_it(job)).for_each(|job| job.fail(job.failures + 1));
            }
            ExportEvent::Throttled { wait, why } => {
                let wait = wait.and_then(|wait| TimeDelta::from_std(wait).ok()).unwrap_or(USUAL_WAIT);
                let time = now + wait.min(TimeDelta::days(7));
                self.throttled = Some(ThrottledUntil { time, scope: scope.to_owned(), why: (*why).to_owned() });
            }
            ExportEvent::RunFailed { jobs, given } => {
                let used = |job: &&mut ExportJob| jobs.contains(&job.status.as_str()) && job.scope == scope;
                for job in self.jobs.iter_mut().filter(used).filter(|job| job.state.is_unmerged_and_complete()) {
                    job.incomplete = true;
                    job.fail(match given {
                        OfServer::Nothing => job.failures,
                        OfServer::FilesFailed => job.failures + 1,
                        // It will not give them the next time either: the next run starts a new export.
                        OfServer::FilesGone => MAX_FAILURES,
                    });
                }
            }
            ExportEvent::FloorsChanged { incomplete, whole } => self.change_floors(scope, incomplete, whole),
            ExportEvent::Merged { jobs } => {
                let done = |job: &&mut ExportJob| jobs.contains(&job.status.as_str());
                self.jobs.iter_mut().filter(done).for_each(|job| job.state = job.state.merged());
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
