//! `fhirlake jobs list | cancel`

use chrono::{DateTime, SecondsFormat};
use clap::{Args, Subcommand};

use super::PipelineArgs;
use super::output::{Output, table};
use crate::error::Result;
use crate::jobs::checkpoint::CheckpointStore;
use crate::jobs::{ExportJobs, JobState};
use crate::topology;

#[derive(Debug, Args)]
pub(super) struct JobsArgs {
    #[command(subcommand)]
    command: JobsCommand,
}

#[derive(Debug, Subcommand)]
enum JobsCommand {
    /// List export jobs in flight, rejected types, and rate limits.
    #[command(after_help = examples!("fhirlake jobs list hospital.yaml"))]
    List {
        #[command(flatten)]
        file: PipelineArgs,
    },
    /// Cancel export jobs. With --all, also clear rate limits and rejected types.
    #[command(after_help = examples!("fhirlake jobs cancel hospital.yaml 1", "fhirlake jobs cancel hospital.yaml \
        --all"))]
    Cancel {
        #[command(flatten)]
        file: PipelineArgs,
        /// Job numbers as `list` prints them.
        #[arg(value_name = "NUMBER", required_unless_present = "all")]
        numbers: Vec<usize>,
        /// Cancel all jobs.
        #[arg(long)]
        all: bool,
        /// Forget the jobs without a request to the server, where it is gone for good.
        #[arg(long)]
        forget: bool,
    },
}

pub(super) async fn jobs(args: JobsArgs, output: &Output) -> Result<()> {
    match args.command {
        JobsCommand::List { file } => {
            let plan = file.plan()?;
            let state = topology::state_of(&plan)?;
            let (exports, staged) =
                (state.read::<ExportJobs>()?, CheckpointStore::of(&state).read()?.unwrap_or_default());
            if let Some(until) = exports.throttled.as_ref().filter(|until| until.time > chrono::Utc::now()) {
                let time = until.time.to_rfc3339_opts(SecondsFormat::Secs, true);
                output.line(&format!("rate limited until {time}: {}", until.why))?;
            }
            for kick_off in &exports.unconfirmed {
                let time = kick_off.time.to_rfc3339_opts(SecondsFormat::Secs, true);
                output.line(&format!(
                    "the kick-off of {time} was not confirmed: the server may have an export job that is not listed"
                ))?;
            }
            for aside in exports.rejected.iter().filter(|aside| plan.types().names().contains(&aside.resource_type)) {
                let time = aside.time.to_rfc3339_opts(SecondsFormat::Secs, true);
                output.line(&format!(
                    "{}: rejected at {time}, exported separately: {}",
                    aside.resource_type, aside.why
                ))?;
            }
            if let Some(refused) = exports.all_rejected.as_ref().filter(|refused| refused.holds(chrono::Utc::now())) {
                let time = refused.time.to_rfc3339_opts(SecondsFormat::Secs, true);
                let types = refused.types.join(", ");
                output.line(&format!(
                    "the server rejected each of {types} at {time}; no bisection for a day (`jobs cancel --all` \
                        clears this)"
                ))?;
            }
            if exports.jobs.is_empty() {
                return output.line("no export jobs in flight");
            }
            let instant = |micros: Option<i64>| micros.and_then(DateTime::from_timestamp_micros);
            let shown = |time: Option<DateTime<chrono::Utc>>| {
                time.map_or_else(|| "-".to_owned(), |time| time.to_rfc3339_opts(SecondsFormat::Secs, true))
            };
            let rows = exports.jobs.iter().enumerate().map(|(at, export)| {
                let types = if export.types.is_empty() { "all".to_owned() } else { export.types.join(",") };
                let manifest = match (export.state, export.state.transaction_time()) {
                    (JobState::Merged { .. }, _) => "merged, DELETE pending",
                    (_, Some(_)) => "complete",
                    (_, None) => "in progress",
                };
                let files = staged.listed.iter().filter(|file| file.status == export.status);
                let (files, held) =
                    files.fold((0, 0), |(all, held), file| (all + 1, held + u64::from(file.held.is_some())));
                // A query may hold a secret.
                let status = export.status.split(['?', '#']).next().unwrap_or_default();
                vec![
                    format!("{}", at + 1),
                    types,
                    shown(instant(export.since)),
                    shown(Some(export.accepted)),
                    manifest.to_owned(),
                    if files == 0 { "-".to_owned() } else { format!("{held} of {files} files") },
                    export.failures.to_string(),
                    status.to_owned(),
                ]
            });
            let rows: Vec<_> = rows.collect();
            output.line(&table(
                &["number", "types", "since", "accepted", "manifest", "staged", "failed runs", "status URL"],
                &rows,
            ))
        }
        JobsCommand::Cancel { file, numbers, all, forget } => {
            let plan = file.plan()?;
            let cancelled = topology::cancel_exports(&plan, (!all).then_some(numbers.as_slice()), forget).await?;
            output.line(&format!("{cancelled} exports cancelled"))
        }
    }
}
