//! Status of pipelines, as one document: what `/status.json` gives and the page shows. Nothing of a resource is in it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::health::Health;
use super::scheduler::{PipelineScheduler, Running};
use crate::jobs::ExportJobs;
use crate::stages::merge::{STOPPED, TypeOutcome};
use crate::telemetry;
use crate::topology::{Node, RunOutcome, RunReport};
use flow::Counts;

/// The service.
#[derive(Debug, Serialize)]
pub struct ServerStatus {
    /// fhirlake's version.
    pub version: &'static str,
    /// Time at which the service began.
    pub started: DateTime<Utc>,
    /// Now.
    pub now: DateTime<Utc>,
    /// Each pipeline.
    pub pipelines: Vec<PipelineStatus>,
}

/// A pipeline.
#[derive(Debug, Serialize)]
pub struct PipelineStatus {
    /// Its name.
    pub name: String,
    /// True if its last success is recent enough.
    pub health: Health,
    /// Time of the next run.
    pub next_run: Option<DateTime<Utc>>,
    /// True if that one asks for everything.
    pub next_is_full: bool,
    /// Time of the retry of a run that failed.
    pub again: Option<DateTime<Utc>>,
    /// The server does not want to be asked before.
    pub not_before: Option<DateTime<Utc>>,
    /// Exports that the server works on or holds.
    pub exports_in_flight: usize,
    /// Lines in quarantine.
    pub quarantined: u64,
    /// The run that is under way.
    pub running: Option<RunningStatus>,
    /// The tables.
    pub tables: Vec<TableStatus>,
    /// Why they could not be read.
    pub tables_error: Option<String>,
    /// Runs, the newest first.
    pub runs: Vec<RunStatus>,
}

/// A run that is under way.
#[derive(Debug, Serialize)]
pub struct RunningStatus {
    /// Since when.
    pub began: DateTime<Utc>,
    /// For how long, in seconds.
    pub seconds: f64,
    /// True if it asks for everything.
    pub full: bool,
    /// The server's words on its export.
    pub server: Option<String>,
    /// Requests that were retried.
    pub retries: u64,
    /// Edges, in the order in which data crosses them.
    pub edges: Vec<EdgeStatus>,
    /// Stages, in the order in which data meets them.
    pub stages: Vec<StageStatus>,
    /// Types, as far as they are.
    pub types: Vec<TypeStatus>,
}

/// An edge between two stages.
#[derive(Debug, Serialize)]
pub struct EdgeStatus {
    /// `from->to`.
    pub name: String,
    /// Items on it.
    pub items: u64,
    /// The most that it holds.
    pub max_items: usize,
    /// Bytes on it.
    pub bytes: u64,
    /// The most that it holds.
    pub max_bytes: usize,
}

impl EdgeStatus {
    /// Returns its fill, by items or bytes, whichever is more: 0 to 1. A single large item may be more than it holds.
    pub fn fullness(&self) -> f64 {
        let share = |level: u64, most: usize| level as f64 / most.max(1) as f64;
        share(self.items, self.max_items).max(share(self.bytes, self.max_bytes)).min(1.0)
    }
}

/// A stage.
#[derive(Debug, Serialize)]
pub struct StageStatus {
    /// Its name.
    pub name: &'static str,
    /// Rate a second, over the last seconds.
    pub rate: f64,
    /// Of what.
    pub unit: &'static str,
    /// Total since the run began.
    pub total: u64,
}

/// A type of a run that is under way.
#[derive(Debug, Serialize)]
pub struct TypeStatus {
    /// Its name.
    pub name: String,
    /// Files that were read to their end.
    pub files: u64,
    /// Files that are listed.
    pub files_expected: u64,
    /// Resources that were read.
    pub resources: u64,
    /// Resources that the manifest promises; 0 where it does not say.
    pub resources_expected: u64,
    /// Resources that are staged.
    pub staged: u64,
    /// Bad lines.
    pub bad: u64,
    /// Resources that are committed: all of them, or none yet.
    pub committed: u64,
}

impl TypeStatus {
    /// Returns its progress, 0 to 1, where that can be told.
    pub fn share(&self) -> Option<f64> {
        let (done, all) = match (self.resources_expected, self.files_expected) {
            (0, 0) => return None,
            (0, files) => (self.files, files),
            (resources, _) => (self.resources, resources),
        };
        Some((done as f64 / all as f64).min(1.0))
    }
}

/// A table.
#[derive(Debug, Serialize)]
pub struct TableStatus {
    /// Its type.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// Its rows, where they are known.
    pub rows: Option<u64>,
    /// The server's time that it is as new as.
    pub watermark: Option<DateTime<Utc>>,
    /// Lag behind this machine's clock, in seconds.
    pub lag_seconds: Option<i64>,
    /// Time at which a run last changed it.
    pub changed: Option<DateTime<Utc>>,
}

/// A run that ended.
#[derive(Debug, Serialize)]
pub struct RunStatus {
    /// Its id.
    pub run: String,
    /// Time at which it began.
    pub started: Option<DateTime<Utc>>,
    /// Duration.
    pub seconds: f64,
    /// True if every type succeeded.
    pub succeeded: bool,
    /// `succeeded`, `stopped` or `failed`.
    pub outcome: RunOutcome,
    /// True if everything was asked for.
    pub full: bool,
    /// Rows that it put in, replaced and took out.
    pub rows: u64,
    /// Errors, by type or as a whole.
    pub errors: Vec<String>,
    /// Hint.
    pub hint: Option<String>,
}

impl RunStatus {
    fn of(report: &RunReport) -> Self {
        let outcome = report.outcome();
        // That a run was stopped is no error; what failed before it was is one.
        let is_stopped = outcome == RunOutcome::Stopped;
        let whole = report.error.clone().filter(|_| !is_stopped);
        let of_type = |kept: &TypeOutcome| {
            let not_advanced = kept.watermark_hold.as_ref().map(|why| format!("watermark not advanced: {why}"));
            kept.error.clone().filter(|error| !(is_stopped && error == STOPPED)).or(not_advanced)
        };
        let of_types = report.types.iter().filter_map(|(name, kept)| Some(format!("{name}: {}", of_type(kept)?)));
        let hint = "the next run brings what is missing; what it could not read is in its report";
        Self {
            run: report.run.clone(),
            started: Some(report.started),
            seconds: report.seconds,
            succeeded: report.succeeded,
            outcome,
            full: report.full,
            rows: report.types.values().map(|kept| kept.inserted + kept.updated + kept.deleted).sum(),
            errors: whole.into_iter().chain(of_types).collect(),
            hint: report.hint.clone().or_else(|| (!report.succeeded).then(|| hint.to_owned())),
        }
    }
}

impl PipelineStatus {
    /// Returns the status of a pipeline at `now`.
    pub(super) fn of(scheduler: &PipelineScheduler, now: DateTime<Utc>) -> Self {
        let state = scheduler.state();
        let exports = state.read::<ExportJobs>().unwrap_or_default();
        // Before anything is locked: the state may be far away.
        let max_age = scheduler.live().plan.max_age;
        let health = Health::of(&state, max_age, now);
        let live = scheduler.live();
        let changed = |name: &str| {
            let committed = |report: &&RunReport| report.types.get(name).is_some_and(|of| of.committed);
            live.reports.iter().find(committed).map(|report| report.started)
        };
        let tables = live.tables.iter().map(|table| {
            let watermark = table.watermark.as_deref().and_then(|text| DateTime::parse_from_rfc3339(text).ok());
            let watermark = watermark.map(|time| time.to_utc());
            TableStatus {
                name: table.resource_type.to_string(),
                version: table.version,
                rows: table.rows,
                watermark,
                lag_seconds: watermark.map(|time| (now - time).num_seconds()),
                changed: changed(&table.resource_type),
            }
        });
        Self {
            name: live.plan.name.clone(),
            health,
            next_run: live.next.map(|(time, _)| time),
            next_is_full: live.next.is_some_and(|(_, full)| full),
            again: live.retry.as_ref().map(|retry| retry.due.time),
            not_before: exports.throttled.map(|until| until.time).filter(|time| *time > now),
            exports_in_flight: exports.jobs.len(),
            quarantined: live.quarantined,
            running: live.running.as_ref().map(|running| RunningStatus::of(running, now)),
            tables: tables.collect(),
            tables_error: live.tables_error.clone(),
            runs: live.reports.iter().map(RunStatus::of).collect(),
        }
    }
}

fn sum(counts: &Counts, name: &str) -> u64 {
    counts.iter().filter(|((metric, _), _)| *metric == name).map(|(_, value)| value).sum()
}

impl RunningStatus {
    fn of(running: &Running, now: DateTime<Utc>) -> Self {
        let counts = running.watch.counters.read();
        let (since, before) = match running.samples.front() {
            Some((at, before)) => (at.elapsed().max(Duration::from_millis(1)), before.clone()),
            None => (Duration::from_secs(1), counts.clone()),
        };
        let stage = |node: &Node| {
            let (metric, unit) = node.spec.rate.unwrap_or(("", ""));
            let total = sum(&counts, metric);
            let rate = total.saturating_sub(sum(&before, metric)) as f64 / since.as_secs_f64();
            StageStatus { name: node.spec.name, rate, unit, total }
        };
        let edges = running.watch.edges.lock();
        let edges = edges.iter().map(|edge| {
            let ((items, bytes), (max_items, max_bytes)) = (edge.level(), edge.capacity());
            EdgeStatus { name: edge.name().to_owned(), items, max_items, bytes, max_bytes }
        });
        let mut names: Vec<&str> = counts.keys().map(|(_, label)| &**label).collect();
        names.sort_unstable();
        names.dedup();
        let value = |metric: &'static str, name: &str| counts.get(&(metric, name.into())).copied().unwrap_or_default();
        let types = names.into_iter().map(|name| TypeStatus {
            name: name.to_owned(),
            files: value(telemetry::FILES, name),
            files_expected: value(telemetry::FILES_EXPECTED, name),
            resources: value(telemetry::PARSED, name),
            resources_expected: value(telemetry::RESOURCES_EXPECTED, name),
            staged: value(telemetry::STAGED, name),
            bad: value(telemetry::BAD_LINES, name),
            committed: value(telemetry::COMMITTED, name),
        });
        let server = running.watch.server.lock().clone();
        Self {
            began: running.began,
            seconds: (now - running.began).as_seconds_f64(),
            full: running.full || running.watch.full.load(Ordering::Relaxed),
            server,
            retries: sum(&counts, telemetry::RETRIES),
            stages: running.topology.nodes.iter().map(stage).collect(),
            edges: edges.collect(),
            types: types.filter(|found| found.files_expected + found.resources + found.bad > 0).collect(),
        }
    }
}
