//! Export jobs of a pipeline, outside a run.

use url::Url;

use super::RunPlan;
use super::connect::{client, state_of};
use crate::error::{Error, ErrorKind, Result};
use crate::jobs::ExportJobs;
use crate::jobs::{self, ExportEvent};
use flow::{Cancellation, Counters};

/// Cancels exports in flight, by their numbers from 1, or all of them; how many. With all, what else is remembered of
/// the server is forgotten too: a time to wait for, kick-offs without an answer, types that it refuses. Where the
/// server cannot be told, the export stays, and that is an error; with `forget` nobody is told.
pub async fn cancel_exports(plan: &RunPlan, numbers: Option<&[usize]>, forget: bool) -> Result<usize> {
    let state = state_of(plan)?;
    let _lock = state.acquire_lease()?;
    let exports = state.read::<ExportJobs>()?;
    if let Some(unknown) = numbers.into_iter().flatten().find(|number| **number == 0 || **number > exports.jobs.len()) {
        return Err(Error::new(ErrorKind::Config, format!("no export job #{unknown}; see `fhirlake jobs list`")));
    }
    let chosen = exports.jobs.iter().enumerate();
    let chosen = chosen.filter(|(at, _)| numbers.is_none_or(|numbers| numbers.contains(&(at + 1))));
    let chosen: Vec<String> = chosen.map(|(_, export)| export.status.clone()).collect();
    let (mut gone, mut failed) = (Vec::new(), None);
    let client = if forget { None } else { client(plan, &Counters::default(), &Cancellation::default())? };
    for status in chosen {
        if let (Some(client), Ok(url)) = (&client, Url::parse(&status))
            && let Err(error) = client.delete_export(&url).await
        {
            failed = Some(error);
            continue;
        }
        gone.push(status);
    }
    let cancelled: Vec<&str> = gone.iter().map(String::as_str).collect();
    jobs::note(&state, "", &ExportEvent::Cancelled { jobs: &cancelled })?;
    if numbers.is_none() && failed.is_none() {
        jobs::note(&state, "", &ExportEvent::Forgotten)?;
    }
    match failed {
        None => Ok(gone.len()),
        Some(error) => Err(error.with_hint(
            "the server still has the export, so it is still listed: try again, or forget it without telling the \
                server (--forget)",
        )),
    }
}
