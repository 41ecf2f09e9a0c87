//! `fhirlake status PIPELINE.yaml`

use chrono::{DateTime, SecondsFormat, Utc};
use clap::Args;

use super::PipelineArgs;
use super::output::{Output, table};
use crate::error::Result;
use crate::jobs::ExportJobs;
use crate::state::{JournalEntry, StateFile};
use crate::topology::{self, RunReport};

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    file: PipelineArgs,
}

pub(super) async fn status(args: StatusArgs, output: &Output) -> Result<()> {
    let plan = args.file.plan()?;
    let state = topology::state_of(&plan)?;
    output.line(&format!("pipeline    {}", plan.name))?;
    output.line(&format!("tables      {}", topology::location(&plan.tables)))?;
    output.line(&format!("state       {}", state.location()))?;
    let running = state.lease_holder();
    match &running {
        Some(who) => output.line(&format!("now         running: {who}"))?,
        None => match state.journal().unfinished()?.first() {
            Some(JournalEntry::Began { run, .. }) => {
                output.line(&format!("now         idle; run {run} was interrupted, the next run resumes it"))?;
            }
            _ => output.line("now         idle")?,
        },
    }
    let exports = state.read::<ExportJobs>()?;
    if let Some(until) = exports.throttled.as_ref().filter(|until| until.time > Utc::now()) {
        let time = until.time.to_rfc3339_opts(SecondsFormat::Secs, true);
        output.line(&format!("throttled   until {time}: {}", until.why))?;
    }
    if !exports.jobs.is_empty() {
        output.line(&format!("in flight   {} (fhirlake jobs list)", exports.jobs.len()))?;
    }
    let remembered = state.read::<StateFile>()?;
    let time = |time: Option<DateTime<Utc>>| {
        time.map_or_else(|| "never".into(), |time| time.to_rfc3339_opts(SecondsFormat::Secs, true))
    };
    output.line(&format!("last sync   {} (the server's time)", time(remembered.last_sync_time)))?;
    output.line(&format!("completed   {}", time(remembered.last_completed)))?;
    if let Some(report) = RunReport::newest(&state, 1)?.pop() {
        output.line(&format!("last run    {} {} after {:.1} s", report.run, report.outcome(), report.seconds))?;
        if let Some(error) = &report.error {
            output.line(&format!("            {error}"))?;
        }
        for (name, kept) in &report.types {
            if let Some(error) = &kept.error {
                output.line(&format!("            {name}: {error}"))?;
            } else if let Some(why) = &kept.watermark_hold {
                output.line(&format!("            {name}: watermark not advanced: {why}"))?;
            }
        }
        if let Some(place) = &report.server_messages {
            output.line(&format!("            the server's messages about its export: {place}"))?;
        }
    }
    let kept = state.quarantined_lines()?;
    let hint = if kept > 0 { "; see fhirlake quarantine list" } else { "" };
    output.line(&format!("quarantine  {kept} lines{hint}"))?;
    for (file, line) in state.damaged_quarantine()? {
        output.line(&format!("            {file}, line {line}: damaged, so it is not retried"))?;
    }
    let states = topology::table_states(&plan).await?;
    if states.is_empty() {
        return output.line("no tables yet");
    }
    let rows: Vec<Vec<String>> = states
        .into_iter()
        .map(|state| {
            let rows = state.rows.map_or_else(|| "?".into(), |rows| rows.to_string());
            vec![
                state.resource_type.to_string(),
                state.version.to_string(),
                rows,
                state.watermark.unwrap_or_else(|| "none".into()),
            ]
        })
        .collect();
    output.line("")?;
    output.line(&table(&["table", "version", "rows", "watermark"], &rows))
}
