//! A run's work with export jobs: resume them, persist their events, and release them once all of it is merged.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use chrono::{DateTime, Utc};
use url::Url;

use super::events::fingerprint;
use super::{
    AllRejected, EventOrigin, ExportEvent, ExportEventSink, ExportHandle, ExportJob, ExportJobs, FORGOTTEN_AFTER,
    JobState, Kickoff,
};
use crate::error::{Error, ErrorKind, Result};
use crate::messages::{ResourceType, watermark_of};
use crate::state::StateStore;
use bulk_data_client::{Client, ExportRequest};
use delta_upsert::Tables;

/// Returns true if a run of `scope` may resume an export.
pub(crate) fn can_be_resumed(export: &ExportJob, scope: &str) -> bool {
    export.scope == scope && !export.is_releasable()
}

/// Kick-offs of a run, and the exports that it resumes.
pub(crate) struct Resumed {
    pub kickoffs: Vec<Kickoff>,
    /// True if an earlier run ended by itself without all of what it resumes.
    pub is_catch_up: bool,
    /// True if a full refresh asked for some of it.
    pub full_refresh: bool,
}

/// The exports in flight that a run of `scope` can resume, instead of asking for the same again. `kickoffs` are those
/// that it would make; what it resumes covers types of several of them.
pub(crate) fn resume(
    exports: &ExportJobs,
    scope: &str,
    kickoffs: Vec<Kickoff>,
    full_refresh: bool,
    tables: &BTreeMap<ResourceType, i64>,
) -> Resumed {
    let mut resumed = Resumed { kickoffs: Vec::new(), is_catch_up: false, full_refresh };
    let mut rest = kickoffs;
    let Some(like) = rest.first().map(|kickoff| kickoff.request.clone()) else { return resumed };
    for export in exports.jobs.iter().filter(|export| export.scope == scope && !is_merged_job(export)) {
        let request = ExportRequest { types: export.types.clone(), since: export.since, ..like.clone() };
        let Ok(status) = Url::parse(&export.status) else { continue };
        let given_up = export.is_releasable();
        if given_up || fingerprint(&request) != export.fingerprint || (full_refresh && export.since.is_some()) {
            let why = match given_up {
                true => "too many runs failed with it",
                false => "its request differs from this run's",
            };
            tracing::warn!(
                types = export.types.join(","),
                why,
                "an export in flight is not resumed; `fhirlake jobs cancel` can cancel it"
            );
            continue;
        }
        let types: Vec<ResourceType> = export.types.iter().map(|name| name.as_str().into()).collect();
        let wanted = |name: &ResourceType| rest.iter().any(|kickoff| kickoff.requested.contains(name));
        // All types of it, or none: with other types asked for, the answer would be another.
        let covers_all = types.is_empty() && rest.iter().any(|kickoff| kickoff.requested.is_empty());
        if !covers_all && (types.is_empty() || !types.iter().all(wanted)) {
            continue;
        }
        let mixed_types = export.mixed_types.iter().map(|name| name.as_str().into()).collect();
        // Of other types the export says nothing.
        let of_export = |name: &ResourceType| types.is_empty() || types.contains(name);
        let ours = tables.iter().filter(|(name, _)| of_export(name)).map(|(name, time)| (name.clone(), *time));
        let (separate, tables) = (export.separate, ours.collect());
        let in_flight = ExportHandle { status, separate, tables, mixed_types, staged: Arc::default() };
        let known = rest.iter().flat_map(|kickoff| kickoff.known.clone()).collect();
        for kickoff in &mut rest {
            kickoff.requested.retain(|name| !types.contains(name));
            kickoff.request.types.retain(|name| !export.types.contains(name));
        }
        rest.retain(|kickoff| !kickoff.requested.is_empty());
        resumed.is_catch_up |= export.incomplete;
        resumed.full_refresh |= export.full_refresh;
        resumed.kickoffs.push(Kickoff { request, requested: types, known, in_flight: Some(in_flight) });
        if covers_all {
            break;
        }
    }
    resumed.kickoffs.extend(rest);
    resumed
}

/// Types that the server refused one by one lately: whether it gives some of them is not asked again so soon.
pub(crate) fn rejected_lately(exports: &ExportJobs, scope: &str, now: DateTime<Utc>) -> HashSet<String> {
    let lately = |refused: &&AllRejected| refused.scope == scope && refused.holds(now);
    exports.all_rejected.iter().filter(lately).flat_map(|refused| refused.types.iter().cloned()).collect()
}

/// A server that was asked too often is not asked again before it may be: only what is in flight is resumed then, and
/// where nothing is, there is nothing to do.
pub(crate) fn check_throttled(state: &StateStore, scope: &str, kickoffs: &mut Vec<Kickoff>) -> Result<()> {
    let Some(until) =
        state.read::<ExportJobs>()?.throttled.filter(|until| until.scope == scope && until.time > Utc::now())
    else {
        return Ok(());
    };
    if kickoffs.iter().any(|kickoff| kickoff.in_flight.is_some()) {
        kickoffs.retain(|kickoff| kickoff.in_flight.is_some());
        tracing::warn!(until = %until.time, "rate limited: only exports in flight are resumed");
        return Ok(());
    }
    let time = until.time.format("%Y-%m-%d %H:%M:%S UTC");
    Err(Error::new(ErrorKind::Throttled, format!("rate limited until {time}: {}", until.why)))
}

/// Returns what persists each event of a run before anything else happens. `expired` is set where a job that was
/// resumed is there no more.
pub(crate) fn sink(state: StateStore, scope: String, full_refresh: bool, expired: Arc<AtomicBool>) -> ExportEventSink {
    Arc::new(move |event| {
        if let ExportEvent::Expired { .. } = event {
            expired.store(true, Ordering::Relaxed);
        }
        state.change::<ExportJobs>(|jobs| {
            jobs.apply(event, EventOrigin { scope: &scope, full_refresh, now: Utc::now() })
        })
    })
}

/// Persists an event that is no run's own.
pub(crate) fn note(state: &StateStore, scope: &str, event: &ExportEvent<'_>) -> Result<()> {
    state.change::<ExportJobs>(|jobs| jobs.apply(event, EventOrigin { scope, full_refresh: false, now: Utc::now() }))
}

/// Returns true if a run of `kickoffs` asks for all that an export was asked for, by itself or by newer ones.
fn is_covered(export: &ExportJob, scope: &str, kickoffs: &[Kickoff]) -> bool {
    let all = kickoffs.iter().any(|kickoff| kickoff.request.types.is_empty());
    let requested = |name: &String| kickoffs.iter().any(|kickoff| kickoff.request.types.contains(name));
    export.scope == scope && (all || !export.types.is_empty() && export.types.iter().all(requested))
}

/// Files that the server did not give of a run's exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OfServer {
    /// It gave all.
    Nothing,
    /// It did not give some files; it may the next time.
    FilesFailed,
    /// It says of each file that it did not give that it is gone for good.
    FilesGone,
}

/// A run that began at `began` ended by itself, and not all of its exports is merged. Only where the server did not
/// give some file of it does that count against an export: what fails here is repaired from the same one, however
/// often.
pub(crate) fn failed(
    state: &StateStore,
    scope: &str,
    kickoffs: &[Kickoff],
    began: DateTime<Utc>,
    of_server: OfServer,
) -> Result<()> {
    let used = |export: &ExportJob| {
        let goes_on = kickoffs.iter().filter_map(|kickoff| kickoff.in_flight.as_ref());
        export.accepted >= began || goes_on.into_iter().any(|accepted| accepted.status.as_str() == export.status)
    };
    let jobs = state.read::<ExportJobs>()?.jobs;
    let used: Vec<&str> = jobs.iter().filter(|job| used(job)).map(|job| job.status.as_str()).collect();
    note(state, scope, &ExportEvent::RunFailed { jobs: &used, given: of_server })
}

/// All is merged: the server may have its files back, and those of older exports of the same.
pub(crate) async fn merged(
    state: &StateStore,
    scope: &str,
    kickoffs: &[Kickoff],
    client: &Client,
    delete: bool,
) -> Result<()> {
    let done = |export: &ExportJob| is_covered(export, scope, kickoffs);
    let done: Vec<ExportJob> = state.read::<ExportJobs>()?.jobs.into_iter().filter(done).collect();
    merge_and_release(state, scope, &done, client, delete).await
}

/// Some types failed: exports of which none did may be released all the same.
pub(crate) async fn merged_in_part(
    state: &StateStore,
    (scope, tables): (&str, &Tables),
    until: Option<i64>,
    client: &Client,
    delete: bool,
) -> Result<()> {
    let mut done = Vec::new();
    for export in state.read::<ExportJobs>()?.jobs.into_iter().filter(|export| export.scope == scope) {
        if is_merged(&export, tables, until).await {
            done.push(export);
        }
    }
    merge_and_release(state, scope, &done, client, delete).await
}

/// Returns true if the tables of all types that an export was asked for are as new as it, by their own watermarks.
async fn is_merged(export: &ExportJob, tables: &Tables, until: Option<i64>) -> bool {
    let Some(time) = export.state.transaction_time().filter(|_| !export.types.is_empty()) else { return false };
    for name in &export.types {
        let Ok(table) = tables.open(&name.as_str().into()).await else { return false };
        if !table.transaction(&export.scope).await.is_ok_and(|own| own >= Some(watermark_of(time, until))) {
            return false;
        }
    }
    true
}

/// Deletes jobs on the server that are merged or given up, and forgets them.
async fn release(state: &StateStore, scope: &str, done: &[ExportJob], client: &Client, delete: bool) -> Result<()> {
    let mut released = Vec::new();
    for job in done {
        match Url::parse(&job.status) {
            Ok(status) if delete => match client.delete_export(&status).await {
                Ok(()) => released.push(job.status.as_str()),
                // One that is not deleted may hold the only slot there is: the next run begins with it.
                Err(error) => tracing::warn!(%error, "the export job could not be deleted; the next run retries"),
            },
            _ => released.push(job.status.as_str()),
        }
    }
    note(state, scope, &ExportEvent::Released { jobs: &released })
}

fn is_merged_job(job: &ExportJob) -> bool {
    matches!(job.state, JobState::Merged { .. })
}

/// Persists that jobs are merged, and releases them.
async fn merge_and_release(
    state: &StateStore,
    scope: &str,
    done: &[ExportJob],
    client: &Client,
    delete: bool,
) -> Result<()> {
    let merged: Vec<&str> = done.iter().map(|job| job.status.as_str()).collect();
    note(state, scope, &ExportEvent::Merged { jobs: &merged })?;
    release(state, scope, done, client, delete).await
}

/// Persists which types the server may not have given whole after their commit, and which came whole.
pub(crate) fn note_floors<'a>(
    state: &StateStore,
    scope: &str,
    kickoffs: &[Kickoff],
    incomplete: impl IntoIterator<Item = &'a str>,
    whole: impl IntoIterator<Item = &'a str>,
) -> Result<()> {
    let with_since = |name: &str| {
        let asks = |kickoff: &&Kickoff| {
            kickoff.requested.is_empty() || kickoff.requested.iter().any(|requested| **requested == *name)
        };
        let since = kickoffs.iter().filter(asks).map(|kickoff| kickoff.request.since).min().unwrap_or(None);
        (name.to_string(), since)
    };
    let incomplete: Vec<_> = incomplete.into_iter().map(with_since).collect();
    let whole: Vec<_> = whole.into_iter().map(with_since).collect();
    note(state, scope, &ExportEvent::FloorsChanged { incomplete: &incomplete, whole: &whole })
}

/// Before another kick-off is made: releases what an earlier run could not, and what was given up, since what is asked
/// for now takes its place; and says what is not known of kick-offs.
pub(crate) async fn settle(state: &StateStore, scope: &str, client: &Client, delete: bool) -> Result<()> {
    let exports = state.read::<ExportJobs>()?;
    let mut unanswered = exports.unconfirmed.iter().filter(|kick_off| kick_off.scope == scope);
    if let Some(kick_off) = unanswered.next_back() {
        tracing::warn!(
            sent = %kick_off.time, others = unanswered.count(),
            "no answer came to a kick-off of an earlier run: the server may hold an export that fhirlake does not \
                know of"
        );
    }
    // What a server keeps so long it has forgotten itself.
    let (old, rest): (Vec<ExportJob>, Vec<ExportJob>) = exports
        .jobs
        .into_iter()
        .filter(|export| export.is_releasable() && export.scope == scope)
        .partition(|export| Utc::now() - export.accepted > FORGOTTEN_AFTER);
    // One that was given up holds a slot that the next kick-off needs, whatever `delete_export` says.
    let (kept, rest): (Vec<ExportJob>, Vec<ExportJob>) =
        rest.into_iter().partition(|job| is_merged_job(job) && !delete);
    release(state, scope, &old, client, false).await?;
    release(state, scope, &kept, client, false).await?;
    release(state, scope, &rest, client, true).await
}
