//! `fhirlake quarantine list | show | retry | dismiss PIPELINE.yaml`.

use std::collections::HashSet;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::drive::drive;
use super::output::{Output, table};
use super::run::plan_of;
use crate::error::{Error, ErrorKind, Result};
use crate::pipeline::RunOptions;
use crate::state::StateFolder;

#[derive(Debug, Args)]
pub(super) struct QuarantineArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Names the lines: where each came from and what is wrong with it, never what it says.
    List(Pipeline),
    /// Writes lines to stdout as they came. They hold patient data.
    Show(Lines),
    /// Tries every line again now, as each run does; asks the server for nothing.
    Retry(Pipeline),
    /// Gives lines up.
    Dismiss(Lines),
}

#[derive(Debug, Args)]
struct Pipeline {
    /// The pipeline file.
    pipeline: PathBuf,
    /// Set a key of the file.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

#[derive(Debug, Args)]
struct Lines {
    #[command(flatten)]
    pipeline: Pipeline,
    /// Ids of lines, or their beginnings, as `list` has them.
    #[arg(required_unless_present = "all")]
    ids: Vec<String>,
    /// All lines.
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
            if rows.is_empty() {
                return output.line("no lines in quarantine");
            }
            output.line(&table(&["id", "type", "run", "file:line", "tried again", "reason"], &rows))
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
            let _lock = state.lock()?;
            let gone = if args.all {
                state.quarantined().map(|line| line.map(|(_, line)| line.id())).collect::<Result<HashSet<_>>>()?
            } else {
                state.find_quarantined(&args.ids)?
            };
            let removed = state.remove_quarantined(&gone)?;
            if removed == 0 {
                return Err(Error::new(ErrorKind::Config, "there are no lines in quarantine"));
            }
            output.line(&format!("{removed} lines dismissed"))
        }
    }
}

fn open(args: &Pipeline) -> Result<(crate::config::Plan, StateFolder)> {
    let plan = plan_of(&args.pipeline, &args.sets)?;
    let state = crate::pipeline::state_of(&plan)?;
    Ok((plan, state))
}
