//! `fhirlake quarantine list | show | retry | dismiss PIPELINE.yaml`.

use std::collections::HashSet;

use clap::{Args, Subcommand};

use super::PipelineArgs;
use super::drive::drive;
use super::output::{Output, table};
use crate::error::{Error, ErrorKind, Result};
use crate::state::StateStore;
use crate::topology::RunOptions;

#[derive(Debug, Args)]
pub(super) struct QuarantineArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List lines: where each came from and why it is unreadable, never its content.
    #[command(after_help = examples!("fhirlake quarantine list hospital.yaml"))]
    List(PipelineArgs),
    /// Print lines as they were received. They hold patient data.
    #[command(after_help = examples!("fhirlake quarantine show hospital.yaml 3f9a1c"))]
    Show(Lines),
    /// Retry all lines now, as each run does, without a request to the server.
    #[command(after_help = examples!("fhirlake quarantine retry hospital.yaml"))]
    Retry(PipelineArgs),
    /// Discard lines.
    #[command(after_help = examples!("fhirlake quarantine dismiss hospital.yaml 3f9a1c", "fhirlake quarantine dismiss \
        hospital.yaml --all"))]
    Dismiss(Lines),
}

#[derive(Debug, Args)]
struct Lines {
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Ids of lines as `list` prints them, or unique prefixes.
    #[arg(required_unless_present = "all")]
    ids: Vec<String>,
    /// Select all lines.
    #[arg(long, conflicts_with = "ids")]
    all: bool,
}

/// Letters of an id that are shown: enough to tell a million lines apart.
const SHOWN: usize = 12;

pub(super) async fn quarantine(args: QuarantineArgs, output: &Output) -> Result<()> {
    match args.action {
        Action::List(args) => {
            let (_, state) = open(&args)?;
            let mut rows = Vec::new();
            for line in state.quarantined() {
                let (run, line) = line?;
                let tried = if line.can_be_tried() { "yes" } else { "no" };
                let declared = line.resource_type.clone().unwrap_or_else(|| "-".into());
                let mut id = line.id().to_string();
                id.truncate(SHOWN);
                rows.push(vec![id, declared, run, format!("{}:{}", line.file, line.line), tried.into(), line.reason]);
            }
            for (file, line) in state.damaged_quarantine()? {
                output.remark(&format!("{file}, line {line}: damaged, so it is not listed and not retried"));
            }
            if rows.is_empty() {
                return output.line("no lines in quarantine");
            }
            output.line(&table(&["id", "type", "run", "file:line", "retry", "reason"], &rows))
        }
        Action::Show(args) => {
            let (_, state) = open(&args.pipeline)?;
            let named = if args.all { None } else { Some(state.find_quarantined(&args.ids)?) };
            for line in state.quarantined() {
                let (_, line) = line?;
                if named.as_ref().is_none_or(|named| named.contains(&line.id())) {
                    let mut bytes = line.bytes();
                    bytes.push(b'\n');
                    output.raw(&bytes)?;
                }
            }
            Ok(())
        }
        Action::Retry(args) => {
            let (plan, _) = open(&args)?;
            let options = RunOptions { replay_only: true, ..RunOptions::default() };
            drive(plan, options, output).await.map(|_| ())
        }
        Action::Dismiss(args) => {
            let (_, state) = open(&args.pipeline)?;
            let _lock = state.acquire_lease()?;
            let gone = if args.all {
                state.quarantined().map(|line| line.map(|(_, line)| line.id())).collect::<Result<HashSet<_>>>()?
            } else {
                state.find_quarantined(&args.ids)?
            };
            let removed = state.remove_quarantined(&gone)?;
            if removed == 0 {
                return Err(Error::new(ErrorKind::Config, "no lines in quarantine"));
            }
            output.line(&format!("{removed} lines dismissed"))
        }
    }
}

fn open(args: &PipelineArgs) -> Result<(crate::topology::RunPlan, StateStore)> {
    let plan = args.plan()?;
    let state = crate::topology::state_of(&plan)?;
    Ok((plan, state))
}
