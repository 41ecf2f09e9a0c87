//! Exports that outlive a run: remembered as soon as the server accepts them, gone on with by the next run, given back when
//! all of it is merged.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use chrono::{DateTime, TimeDelta, Utc};
use url::Url;

use crate::config::Plan;
use crate::error::{Error, ErrorKind, Result};
use crate::messages::{ResourceType, watermark_of};
use crate::stages::export::{Accepted, ExportNote, Kickoff, Remember};
use crate::state::{AllRefused, Exports, Floor, InFlight, NotBefore, SetAside, StateFolder, Unanswered};
use bulk_data_client::{Client, ExportRequest};
use delta_upsert::Tables;
use flow::{Board, Stop};

/// Runs in which the server may fail to give all of an export before another is asked for: it may never give the rest.
const MAX_FAILURES: u32 = 3;

/// How long a server is told that an export is merged.
const FORGOTTEN_AFTER: TimeDelta = TimeDelta::days(30);

/// How long a server that refuses without saying how long is left alone.
const USUAL_WAIT: TimeDelta = TimeDelta::hours(1);

/// Everything that is asked, as a text that is the same for the same.
fn asked(request: &ExportRequest) -> String {
    let mut types = request.types.clone();
    types.sort();
    let until = request.options.until.as_deref().unwrap_or_default();
    format!("{:?}|{}|{}{}", request.level, types.join(","), until, request.options.scope())
}

/// Whether too many runs ended without all of an export.
fn is_given_up(export: &InFlight) -> bool {
    export.failures >= MAX_FAILURES
}

/// Whether a run of `scope` may go on with an export.
pub(super) fn can_be_resumed(export: &InFlight, scope: &str) -> bool {
    export.scope == scope && !export.merged && !is_given_up(export)
}

/// What a run asks for, and goes on with.
pub(super) struct Resumed {
    pub kickoffs: Vec<Kickoff>,
    /// Whether an earlier run ended by itself without all of what it goes on with.
    pub behind: bool,
    /// Whether a full refresh asked for some of it.
    pub full_refresh: bool,
}

/// The exports in flight that a run of `scope` can go on with, instead of asking for the same again. `kickoffs` are those
/// that it would make; what it goes on with covers types of several of them.
pub(super) fn resume(
    exports: &Exports,
    scope: &str,
    kickoffs: Vec<Kickoff>,
    full_refresh: bool,
    tables: &BTreeMap<ResourceType, i64>,
) -> Resumed {
    let mut resumed = Resumed { kickoffs: Vec::new(), behind: false, full_refresh };
    let mut rest = kickoffs;
    let Some(like) = rest.first().map(|kickoff| kickoff.request.clone()) else { return resumed };
    for export in exports.in_flight.iter().filter(|export| export.scope == scope && !export.merged) {
        let request = ExportRequest { types: export.types.clone(), since: export.since, ..like.clone() };
        let Ok(status) = Url::parse(&export.status) else { continue };
        if asked(&request) != export.asked || is_given_up(export) || (full_refresh && export.since.is_some()) {
            let why = match is_given_up(export) {
                true => "too many runs failed with it",
                false => "it was asked for otherwise",
            };
            tracing::warn!(
                types = export.types.join(","),
                why,
                "an export in flight is not gone on with; `fhirlake jobs` can cancel it"
            );
            continue;
        }
        let types: Vec<ResourceType> = export.types.iter().map(|name| name.as_str().into()).collect();
        let wanted = |name: &ResourceType| rest.iter().any(|kickoff| kickoff.asked.contains(name));
        // All types of it, or none: with other types asked for, the answer would be another.
        let covers_all = types.is_empty() && rest.iter().any(|kickoff| kickoff.asked.is_empty());
        if !covers_all && (types.is_empty() || !types.iter().all(wanted)) {
            continue;
        }
        let mixed = export.mixed.iter().map(|name| name.as_str().into()).collect();
        // Of other types the export says nothing.
        let of_export = |name: &ResourceType| types.is_empty() || types.contains(name);
        let ours = tables.iter().filter(|(name, _)| of_export(name)).map(|(name, time)| (name.clone(), *time));
        let (separate, tables) = (export.separate, ours.collect());
        let in_flight = Accepted { status, separate, tables, mixed, staged: Arc::default() };
        let known = rest.iter().flat_map(|kickoff| kickoff.known.clone()).collect();
        for kickoff in &mut rest {
            kickoff.asked.retain(|name| !types.contains(name));
            kickoff.request.types.retain(|name| !export.types.contains(name));
        }
        rest.retain(|kickoff| !kickoff.asked.is_empty());
        resumed.behind |= export.behind;
        resumed.full_refresh |= export.full_refresh;
        resumed.kickoffs.push(Kickoff { request, asked: types, known, in_flight: Some(in_flight) });
        if covers_all {
            break;
        }
    }
    resumed.kickoffs.extend(rest);
    resumed
}

/// Types that the server refused one by one lately: whether it gives some of them is not asked again so soon.
pub(super) fn refused_lately(exports: &Exports, scope: &str, now: DateTime<Utc>) -> HashSet<String> {
    let lately = |refused: &&AllRefused| refused.scope == scope && refused.holds(now);
    exports.all_refused.iter().filter(lately).flat_map(|refused| refused.types.iter().cloned()).collect()
}

/// A server that was asked too often is not asked again before it may be: only what is in flight is gone on with then, and
/// where nothing is, there is nothing to do.
pub(super) fn check_not_before(state: &StateFolder, scope: &str, kickoffs: &mut Vec<Kickoff>) -> Result<()> {
    let Some(until) = state.exports()?.not_before.filter(|until| until.scope == scope && until.time > Utc::now()) else {
        return Ok(());
    };
    if kickoffs.iter().any(|kickoff| kickoff.in_flight.is_some()) {
        kickoffs.retain(|kickoff| kickoff.in_flight.is_some());
        tracing::warn!(until = %until.time, "the server is not to be asked yet: only exports in flight are gone on with");
        return Ok(());
    }
    let time = until.time.format("%Y-%m-%d %H:%M:%S UTC");
    Err(Error::new(ErrorKind::Throttled, format!("the server is not to be asked before {time}: {}", until.why)))
}

/// Writes down what happens to exports. `lost` is set where one that was gone on with is there no more.
pub(super) fn remember(state: StateFolder, scope: String, full_refresh: bool, lost: Arc<AtomicBool>) -> Remember {
    Arc::new(move |note| {
        if let ExportNote::Lost { .. } = note {
            lost.store(true, Ordering::Relaxed);
        }
        state.change_exports(|exports| match note {
            ExportNote::Asking => exports.unanswered.push(Unanswered { time: Utc::now(), scope: scope.clone() }),
            ExportNote::Refused => drop(exports.unanswered.pop()),
            ExportNote::Accepted { kickoff, status, separate } => {
                (exports.not_before, exports.all_refused) = (None, None);
                exports.set_aside.retain(|aside| aside.scope != scope || !kickoff.request.types.contains(&aside.resource_type));
                exports.unanswered.retain(|kick_off| kick_off.scope != scope);
                exports.in_flight.push(InFlight {
                    status: status.to_string(),
                    separate: *separate,
                    accepted: Utc::now(),
                    scope: scope.clone(),
                    asked: asked(&kickoff.request),
                    types: kickoff.request.types.clone(),
                    since: kickoff.request.since,
                    full_refresh,
                    transaction_time: None,
                    failures: 0,
                    behind: false,
                    mixed: Vec::new(),
                    merged: false,
                });
            }
            ExportNote::SetAside(refused) => {
                let is_known = |aside: &SetAside| refused.iter().any(|(name, _)| *name == aside.resource_type);
                exports.set_aside.retain(|aside| aside.scope == scope && !is_known(aside));
                exports.set_aside.extend(refused.iter().map(|(name, why)| SetAside {
                    resource_type: name.clone(),
                    scope: scope.clone(),
                    time: Utc::now(),
                    why: why.clone(),
                }));
            }
            ExportNote::AllRefused(types) => {
                exports.all_refused = Some(AllRefused { time: Utc::now(), scope: scope.clone(), types: types.to_vec() });
            }
            ExportNote::Complete { status, transaction_time } => {
                let found = exports.in_flight.iter_mut().filter(|export| export.status == status.as_str());
                found.for_each(|export| export.transaction_time = Some(*transaction_time));
            }
            ExportNote::Lost { status } => exports.in_flight.retain(|export| export.status != status.as_str()),
            ExportNote::Mixed { resource_type } => {
                for export in exports.in_flight.iter_mut().filter(|export| export.scope == scope) {
                    if !export.mixed.iter().any(|known| **known == ***resource_type) {
                        export.mixed.push(resource_type.to_string());
                    }
                }
            }
            ExportNote::Useless { status } => {
                let found = exports.in_flight.iter_mut().filter(|export| export.status == status.as_str());
                found.for_each(|export| export.failures += 1);
            }
            ExportNote::Later { wait, why } => {
                let wait = wait.and_then(|wait| TimeDelta::from_std(wait).ok()).unwrap_or(USUAL_WAIT);
                let time: DateTime<Utc> = Utc::now() + wait.min(TimeDelta::days(7));
                exports.not_before = Some(NotBefore { time, scope: scope.clone(), why: (*why).to_owned() });
            }
        })
    })
}

/// Whether a run of `kickoffs` asks for all that an export was asked for, by itself or by newer ones.
fn is_covered(export: &InFlight, scope: &str, kickoffs: &[Kickoff]) -> bool {
    let all = kickoffs.iter().any(|kickoff| kickoff.request.types.is_empty());
    let asked = |name: &String| kickoffs.iter().any(|kickoff| kickoff.request.types.contains(name));
    export.scope == scope && (all || !export.types.is_empty() && export.types.iter().all(asked))
}

/// What the server did not give of a run's exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OfServer {
    /// It gave all.
    Nothing,
    /// It did not give some files; it may the next time.
    FilesFailed,
    /// It says of each file that it did not give that it is gone for good.
    FilesGone,
}

/// A run that began at `began` ended by itself, and not all of its exports is merged. Only where the server did not give some
/// file of it does that count against an export: what fails here is made good from the same one, however often.
pub(super) fn failed(
    state: &StateFolder,
    scope: &str,
    kickoffs: &[Kickoff],
    began: DateTime<Utc>,
    of_server: OfServer,
) -> Result<()> {
    let used = |export: &InFlight| {
        let goes_on = kickoffs.iter().filter_map(|kickoff| kickoff.in_flight.as_ref());
        export.accepted >= began || goes_on.into_iter().any(|accepted| accepted.status.as_str() == export.status)
    };
    state.change_exports(|exports| {
        let done =
            |export: &&mut InFlight| export.scope == scope && !export.merged && used(export) && export.transaction_time.is_some();
        for export in exports.in_flight.iter_mut().filter(done) {
            export.behind = true;
            export.failures = match of_server {
                OfServer::Nothing => export.failures,
                OfServer::FilesFailed => export.failures + 1,
                // It will not give them the next time either: the next run starts a new export.
                OfServer::FilesGone => MAX_FAILURES,
            };
        }
    })
}

/// All is merged: the server may have its files back, and those of older exports of the same.
pub(super) async fn merged(state: &StateFolder, scope: &str, kickoffs: &[Kickoff], client: &Client, delete: bool) -> Result<()> {
    let done = |export: &InFlight| is_covered(export, scope, kickoffs);
    let done: Vec<InFlight> = state.exports()?.in_flight.into_iter().filter(done).collect();
    give_back(state, &done, client, delete).await
}

/// Some types failed: exports of which none did may be given back all the same.
pub(super) async fn merged_in_part(
    state: &StateFolder,
    (scope, tables): (&str, &Tables),
    until: Option<i64>,
    client: &Client,
    delete: bool,
) -> Result<()> {
    let mut done = Vec::new();
    for export in state.exports()?.in_flight.into_iter().filter(|export| export.scope == scope) {
        if is_merged(&export, tables, until).await {
            done.push(export);
        }
    }
    give_back(state, &done, client, delete).await
}

/// Whether the tables of all types that an export was asked for are as new as it, by their own watermarks.
async fn is_merged(export: &InFlight, tables: &Tables, until: Option<i64>) -> bool {
    let Some(time) = export.transaction_time.filter(|_| !export.types.is_empty()) else { return false };
    for name in &export.types {
        let Ok(table) = tables.open(&name.as_str().into()).await else { return false };
        if !table.transaction(&export.scope).await.is_ok_and(|own| own >= Some(watermark_of(time, until))) {
            return false;
        }
    }
    true
}

async fn give_back(state: &StateFolder, done: &[InFlight], client: &Client, delete: bool) -> Result<()> {
    let mut unheard = Vec::new();
    for export in done {
        if let (true, Ok(status)) = (delete, Url::parse(&export.status))
            && let Err(error) = client.delete_export(&status).await
        {
            // One that is not deleted may hold the only slot there is: the next run begins with it.
            tracing::warn!(%error, "the server could not be told that an export is not needed any more; the next run tells it");
            unheard.push(export.status.as_str());
        }
    }
    state.change_exports(|exports| {
        let of = |export: &InFlight| done.iter().any(|done| done.status == export.status);
        exports.in_flight.retain(|export| !of(export) || unheard.contains(&export.status.as_str()));
        exports.in_flight.iter_mut().filter(|export| of(export)).for_each(|export| export.merged = true);
    })
}

/// Records a floor for each type in `held`, whose error the server may have reported after the commit. Removes the floors of
/// types that came whole in an export that asked from the floor or earlier.
pub(super) fn note_floors(
    state: &StateFolder,
    scope: &str,
    kickoffs: &[Kickoff],
    held: &[ResourceType],
    is_whole: impl Fn(&str) -> bool,
) -> Result<()> {
    let since = |name: &str| {
        let of_type = kickoffs.iter().filter(|kickoff| kickoff.asked.is_empty() || kickoff.asked.iter().any(|of| **of == *name));
        of_type.map(|kickoff| kickoff.request.since).min().unwrap_or(None)
    };
    state.change_exports(|exports| {
        let came =
            |floor: &Floor| floor.scope == scope && is_whole(&floor.resource_type) && since(&floor.resource_type) <= floor.since;
        exports.floors.retain(|floor| !came(floor));
        for name in held {
            let known = exports.floors.iter_mut().find(|floor| floor.scope == scope && *floor.resource_type == **name);
            match known {
                Some(floor) => floor.since = floor.since.min(since(name)),
                None => {
                    exports.floors.push(Floor { resource_type: name.to_string(), scope: scope.to_owned(), since: since(name) })
                }
            }
        }
    })
}

/// Before another kick-off is made: gives back what an earlier run could not, and what was given up, since what is asked for
/// now takes its place; and says what is not known of kick-offs.
pub(super) async fn settle(state: &StateFolder, scope: &str, client: &Client) -> Result<()> {
    let exports = state.exports()?;
    let mut unanswered = exports.unanswered.iter().filter(|kick_off| kick_off.scope == scope);
    if let Some(kick_off) = unanswered.next_back() {
        tracing::warn!(
            sent = %kick_off.time, others = unanswered.count(),
            "no answer came to a kick-off of an earlier run: the server may hold an export that fhirlake does not know of"
        );
    }
    // What a server keeps so long it has forgotten itself.
    let (old, rest): (Vec<InFlight>, Vec<InFlight>) = exports
        .in_flight
        .into_iter()
        .filter(|export| (export.merged || is_given_up(export)) && export.scope == scope)
        .partition(|export| Utc::now() - export.accepted > FORGOTTEN_AFTER);
    give_back(state, &old, client, false).await?;
    give_back(state, &rest, client, true).await
}

/// Cancels exports in flight, by their numbers from 1, or all of them; how many. With all, what else is remembered of the server
/// is forgotten too: a time to wait for, kick-offs without an answer, types that it refuses. Where the
/// server cannot be told, the export stays, and that is an error; with `forget` nobody is told.
pub async fn cancel(plan: &Plan, numbers: Option<&[usize]>, forget: bool) -> Result<usize> {
    let state = super::state_of(plan)?;
    let _lock = state.lock()?;
    let exports = state.exports()?;
    if let Some(unknown) = numbers.into_iter().flatten().find(|number| **number == 0 || **number > exports.in_flight.len()) {
        return Err(Error::new(ErrorKind::Config, format!("there is no export number {unknown}")));
    }
    let chosen = exports.in_flight.iter().enumerate();
    let chosen = chosen.filter(|(at, _)| numbers.is_none_or(|numbers| numbers.contains(&(at + 1))));
    let chosen: Vec<String> = chosen.map(|(_, export)| export.status.clone()).collect();
    let (mut gone, mut failed) = (Vec::new(), None);
    let client = if forget { None } else { super::client(plan, &Board::default(), &Stop::default())? };
    for status in chosen {
        if let (Some(client), Ok(url)) = (&client, Url::parse(&status))
            && let Err(error) = client.delete_export(&url).await
        {
            failed = Some(error);
            continue;
        }
        gone.push(status);
    }
    state.change_exports(|exports| {
        exports.in_flight.retain(|export| !gone.contains(&export.status));
        if numbers.is_none() && failed.is_none() {
            *exports = Exports { in_flight: std::mem::take(&mut exports.in_flight), ..Exports::default() };
        }
    })?;
    match failed {
        None => Ok(gone.len()),
        Some(error) => Err(error.with_hint(
            "the server still has the export, so it is still listed: try again, or forget it without telling the server (--forget)",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_refused_one_by_one_is_known_for_a_day() {
        let now = Utc::now();
        let all_refused = Some(AllRefused { time: now, scope: "s".into(), types: vec!["Claim".into()] });
        let exports = Exports { all_refused, ..Exports::default() };
        assert_eq!(refused_lately(&exports, "s", now + TimeDelta::hours(23)), HashSet::from(["Claim".to_owned()]));
        assert!(refused_lately(&exports, "other", now).is_empty());
        assert!(refused_lately(&exports, "s", now + TimeDelta::hours(25)).is_empty());
    }
}
