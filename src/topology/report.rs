//! The report of a run, for people and for the state.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RunPlan;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::export_log::ExportLog;
use crate::messages::instant_text;
use crate::stages::merge::{MergeReport, TypeOutcome};
use crate::state::{Document, OnDamage, StateStore};
use crate::telemetry;
use fhir_arrow::EXCLUDED_TYPES;
use flow::Counters;

/// Report of a run.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RunReport {
    /// The pipeline.
    pub pipeline: String,
    /// The run's id.
    pub run: String,
    /// Time at which it began.
    #[schemars(with = "String")]
    pub started: DateTime<Utc>,
    /// Duration.
    pub seconds: f64,
    /// True if every type succeeded.
    pub succeeded: bool,
    /// True if it was stopped on request before its end; the next run resumes it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stopped: bool,
    /// True if it was a full export, by the run's own choice or for want of a watermark.
    pub full: bool,
    /// The server's `transactionTime`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transaction_time: Option<String>,
    /// Why the run ended before its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Hint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// By type.
    pub types: BTreeMap<String, TypeOutcome>,
    /// Lines of types that have no table.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub excluded: BTreeMap<String, u64>,
    /// Files whose manifest count differs from what came: file, promised, came.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub count_findings: Vec<(String, u64, u64)>,
    /// Bad lines that belong to no table: of deletion files, error files and types without a table.
    pub other_bad_lines: u64,
    /// True if the watermark of a type stays where it was, since the server reports errors of its export or what it
    /// said could not be read; each type says why.
    #[serde(rename = "watermark_held")]
    pub watermark_not_advanced: bool,
    /// File of the server's own messages about its export: they may name patients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_messages: Option<String>,
    /// Issues in the export's error files, by severity and code: `error not-found`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub outcome_issues: BTreeMap<String, u64>,
    /// Attachments by what came of them: `files`, `inline`, `left` a link, `failed`; `unlike` where size or hash are
    /// not as said.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub attachments: BTreeMap<String, u64>,
    /// Deviations of the server from the Bulk Data IG, with the number of times that each was met.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub server_deviations: BTreeMap<String, u64>,
    /// Requests that were retried.
    pub retries: u64,
    /// Files of a source folder that were not read, by the reason.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub passed_over: BTreeMap<String, Vec<String>>,
    /// Lines out of quarantine that could be read now.
    pub replayed: u64,
    /// True if every export said its last.
    #[serde(skip)]
    pub is_whole: bool,
}

/// Outcome of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RunOutcome {
    /// Every type succeeded.
    Succeeded,
    /// It was stopped on request.
    Stopped,
    /// The run or a type failed, or a watermark was not advanced.
    Failed,
}

impl std::fmt::Display for RunOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            RunOutcome::Succeeded => "succeeded",
            RunOutcome::Stopped => "stopped",
            RunOutcome::Failed => "failed",
        })
    }
}

impl Document for RunReport {
    const NAME: &'static str = "runs";
    const ON_DAMAGE: OnDamage = OnDamage::Rebuild("a report cannot be read; it is left out");
}

impl RunReport {
    /// Returns how the run ended.
    pub fn outcome(&self) -> RunOutcome {
        match (self.succeeded, self.stopped) {
            (true, _) => RunOutcome::Succeeded,
            (false, true) => RunOutcome::Stopped,
            (false, false) => RunOutcome::Failed,
        }
    }

    /// Persists it in the state.
    pub fn save(&self, state: &StateStore) -> Result<()> {
        state.save_report(&self.run, self)
    }

    /// Returns the reports of the newest runs, at most `most`, the newest first.
    pub fn newest(state: &StateStore, most: usize) -> Result<Vec<RunReport>> {
        Ok(state.reports()?.take(most).collect())
    }

    /// Returns true if all that the server gave is in the tables: its exports are used up, whatever it says of them.
    pub(super) fn is_merged(&self) -> bool {
        self.succeeded
            || (self.watermark_not_advanced
                && self.error.is_none()
                && self.is_whole
                && self.types.values().all(|of| of.error.is_none()))
    }

    /// Says in the log how the run ended, and how long it took.
    pub(super) fn log(&self) {
        let sum = |of: fn(&TypeOutcome) -> u64| self.types.values().map(of).sum::<u64>();
        tracing::info!(
            pipeline = self.pipeline,
            run = self.run,
            seconds = self.seconds,
            full = self.full,
            succeeded = self.succeeded,
            inserted = sum(|kept| kept.inserted),
            updated = sum(|kept| kept.updated),
            deleted = sum(|kept| kept.deleted),
            "{}",
            match (self.succeeded, self.is_merged()) {
                (true, _) => "the run succeeded",
                (false, true) =>
                    "the run merged the received resources; watermarks were not advanced for incomplete types",
                (false, false) => "the run ended, and some types failed",
            }
        );
    }

    /// Builds the report of a run that began at `time.0` and took `time.1`.
    pub(super) fn build(
        plan: &RunPlan,
        run: String,
        time: (DateTime<Utc>, Duration),
        full: bool,
        counters: &Counters,
        merged: MergeReport,
        ended: Option<&Error>,
    ) -> RunReport {
        let (mut excluded, mut outcome_issues, mut attachments) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (mut server_deviations, mut retries) = (BTreeMap::new(), 0);
        for ((metric, label), value) in counters.read() {
            match metric {
                telemetry::EXCLUDED => drop(excluded.insert(label.to_string(), value)),
                telemetry::OUTCOME_ISSUES => drop(outcome_issues.insert(label.to_string(), value)),
                telemetry::ATTACHMENTS => drop(attachments.insert(label.to_string(), value)),
                telemetry::DEVIATIONS => drop(server_deviations.insert(label.to_string(), value)),
                telemetry::RETRIES => retries += value,
                _ => {}
            }
        }
        if let Some((file, promised, came)) = merged.count_findings.first() {
            let files = merged.count_findings.len();
            tracing::warn!(
                files,
                first = file,
                promised,
                came,
                "the manifest's count differs from the resources received; the report lists each file"
            );
        }
        if !merged.count_findings.is_empty() {
            let (deviation, count) = ("count of a file differs from its resources", merged.count_findings.len() as u64);
            counters.add(telemetry::DEVIATIONS, &deviation.into(), count);
            server_deviations.insert(deviation.into(), count);
        }
        if outcome_issues.keys().any(|issue: &String| issue.starts_with("fatal") || issue.starts_with("error")) {
            tracing::warn!(?outcome_issues, "the server reports errors of its export");
        }
        let types: BTreeMap<String, TypeOutcome> =
            merged.types.into_iter().filter(|(name, _)| !EXCLUDED_TYPES.contains(&name.as_str())).collect();
        RunReport {
            pipeline: plan.name.clone(),
            run,
            started: time.0,
            seconds: time.1.as_secs_f64(),
            succeeded: ended.is_none()
                && merged.whole
                && merged.held.is_empty()
                && types.values().all(|outcome| outcome.error.is_none()),
            stopped: ended.is_some_and(|error| error.kind() == ErrorKind::Interrupted),
            full,
            transaction_time: merged.transaction_time.map(instant_text),
            error: ended.map(ToString::to_string),
            hint: ended.map(|error| error.advice().to_owned()),
            types,
            excluded,
            count_findings: merged.count_findings,
            other_bad_lines: merged.other_bad,
            watermark_not_advanced: !merged.held.is_empty(),
            server_messages: None,
            passed_over: BTreeMap::new(),
            outcome_issues,
            attachments,
            server_deviations,
            retries,
            replayed: merged.replayed.len() as u64,
            is_whole: merged.whole,
        }
    }

    /// This run and the one that followed it, as one.
    pub(super) fn merge(self, after: Self) -> Self {
        let mut types = self.types;
        for (name, outcome) in after.types {
            let before = types.remove(&name).unwrap_or_default();
            types.insert(name, before.merge(outcome));
        }
        // What is read off the counters counts both already.
        Self {
            started: self.started,
            seconds: self.seconds + after.seconds,
            full: self.full,
            succeeded: self.succeeded && after.succeeded,
            types,
            count_findings: self.count_findings.into_iter().chain(after.count_findings).collect(),
            other_bad_lines: self.other_bad_lines + after.other_bad_lines,
            replayed: self.replayed + after.replayed,
            ..after
        }
    }
}

/// Leaves a report of a run that failed before it could draw one up; of one that found the pipeline taken there is
/// nothing to say.
pub fn for_failure(state: &StateStore, pipeline: &str, run: &str, started: DateTime<Utc>, error: &Error) {
    if error.kind() == ErrorKind::Locked || state.has_report(run) {
        return;
    }
    let seconds = (Utc::now() - started).as_seconds_f64();
    let report = RunReport {
        pipeline: pipeline.to_owned(),
        run: run.to_owned(),
        started,
        seconds,
        stopped: error.kind() == ErrorKind::Interrupted,
        error: Some(error.to_string()),
        hint: Some(error.advice().to_owned()),
        ..RunReport::default()
    };
    if let Err(error) = report.save(state) {
        tracing::warn!(%error, "the run's report could not be written");
    }
}

/// The last event of each export of a run; what it did is the run's, since its exports share the stages.
pub(super) fn log_exports(log: &ExportLog, exports: usize, counters: &Counters, took: Duration) {
    let counts = counters.read();
    let sum =
        |name: &str| -> u64 { counts.iter().filter(|((metric, _), _)| *metric == name).map(|(_, value)| value).sum() };
    for export in 0..exports {
        let detail = || {
            serde_json::json!({
                "files": sum(telemetry::FILES), "resources": sum(telemetry::PARSED), "bytes": sum(telemetry::BYTES),
                "attachments": sum(telemetry::ATTACHMENTS), "duration": took.as_millis() as u64,
            })
        };
        log.note(export, "export_complete", detail);
    }
    log.sync();
}
