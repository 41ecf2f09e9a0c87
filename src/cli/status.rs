//! `fhirlake status PIPELINE.yaml`

use chrono::{DateTime, SecondsFormat, Utc};
use clap::Args;

use super::PipelineArgs;
use super::output::{Output, table};
use crate::error::Result;
use crate::pipeline;
use crate::state::JournalEntry;

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    file: PipelineArgs,
}

pub(super) async fn status(args: StatusArgs, output: &Output) -> Result<()> {
    let plan = args.file.plan()?;
    let state = pipeline::state_of(&plan)?;
    output.line(&format!("pipeline    {}", plan.name))?;
    output.line(&format!("tables      {}", plan.tables))?;
    output.line(&format!("state       {}", state.place(state.path())))?;
    let running = state.lock_holder();
    match &running {
        Some(who) => output.line(&format!("now         running: {who}"))?,
        None => match state.journal().unfinished()?.first() {
            Some(JournalEntry::Began { run, .. }) => {
                output.line(&format!("now         idle; run {run} was cut off, the next run goes on with it"))?;
            }
            _ => output.line("now         idle")?,
        },
    }
    let exports = state.exports()?;
    if let Some(until) = exports.not_before.as_ref().filter(|until| until.time > Utc::now()) {
        let time = until.time.to_rfc3339_opts(SecondsFormat::Secs, true);
        output.line(&format!("not before  {time}: {}", until.why))?;
    }
    if !exports.in_flight.is_empty() {
        output.line(&format!("in flight   {} (fhirlake jobs list)", exports.in_flight.len()))?;
    }
    let remembered = state.remembered()?;
    let time =
        |time: Option<DateTime<Utc>>| time.map_or_else(|| "never".into(), |time| time.to_rfc3339_opts(SecondsFormat::Secs, true));
    output.line(&format!("last sync   {} (the server's time)", time(remembered.last_sync_time)))?;
    output.line(&format!("completed   {}", time(remembered.last_completed)))?;
    if let Some(report) = state.last_report() {
        let text = |key: &str| report.get(key).and_then(|value| value.as_str()).unwrap_or("?").to_owned();
        let outcome = pipeline::outcome_of(&report);
        let seconds = report["seconds"].as_f64().unwrap_or_default();
        output.line(&format!("last run    {} {outcome} after {seconds:.1} s", text("run")))?;
        if let Some(error) = report["error"].as_str() {
            output.line(&format!("            {error}"))?;
        }
        for (name, kept) in report["types"].as_object().into_iter().flatten() {
            if let Some(error) = kept["error"].as_str() {
                output.line(&format!("            {name}: {error}"))?;
            } else if let Some(why) = kept["watermark_hold"].as_str() {
                output.line(&format!("            {name}: watermark not advanced: {why}"))?;
            }
        }
        if let Some(place) = report["server_messages"].as_str() {
            output.line(&format!("            the server's messages about its export: {place}"))?;
        }
    }
    let kept = state.quarantined().count();
    let hint = if kept > 0 { "; see fhirlake quarantine list" } else { "" };
    output.line(&format!("quarantine  {kept} lines{hint}"))?;
    let states = pipeline::table_states(&plan).await?;
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
