//! Preparation of a run: the tables as they are, their watermarks, and what is asked of the server.

use parking_lot::RwLock;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};

use super::report::{RunOutcome, RunReport};
use super::run::RunOptions;
use super::{RunPlan, SourcePlan};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::jobs::{ExportJobs, Kickoff};
use crate::jobs::{Resumed, rejected_lately, resume};
use crate::messages::{Layouts, ResourceType, has_table};
use crate::stages::merge::Mode;
use crate::state::{StateFile, StateStore};
use crate::values::Instant;
use bulk_data_client::{ExportRequest, Level};
use delta_upsert::{Table, Tables, deletions_id};
use fhir_arrow::{Layout, LayoutOptions, layout_for};
use foundation::instant::parse_instant;

/// Distance of watermarks that are asked for together.
const CLOSE_MICROS: i64 = 60 * 60 * 1_000_000;

/// Runs before this one among which the last is looked for that was not stopped.
const REPORT_HISTORY: usize = 10;

/// Overlap of the time in the Python sync script's state file: it is a client's clock.
const CLIENT_CLOCK_OVERLAP_MICROS: i64 = 5 * 60 * 1_000_000;

/// A prepared run, drawn up before anything is asked of the server.
pub struct Prepared {
    pub(super) plan: RunPlan,
    pub(super) tables: Tables,
    pub(super) opened: HashMap<ResourceType, Table>,
    pub(super) kickoffs: Vec<Kickoff>,
    /// Types that the server refused one by one not long ago.
    pub(super) rejected_lately: HashSet<String>,
    pub(super) app_id: String,
    pub(super) full: bool,
    pub(super) full_refresh: bool,
    /// True if it resumes an export that an earlier run ended without.
    pub(super) is_catch_up: bool,
    /// Newest `transactionTime` that a watermark may have: what changed after `_until` was not asked for.
    pub(super) until: Option<i64>,
    /// Types that are asked for by name and whose tables cannot be written, and why: they fail, and the others go on.
    pub(super) unwritable: Vec<(ResourceType, Error)>,
}

impl Prepared {
    /// Types whose tables cannot be written, and why.
    pub fn unwritable(&self) -> &[(ResourceType, Error)] {
        &self.unwritable
    }

    /// The exports that will be asked for.
    pub fn kickoffs(&self) -> &[Kickoff] {
        &self.kickoffs
    }
    /// Types whose table exists already.
    pub fn existing(&self) -> Vec<&ResourceType> {
        let mut names: Vec<_> =
            self.opened.iter().filter(|(_, table)| table.version().is_some()).map(|(name, _)| name).collect();
        names.sort();
        names
    }
}

/// Pipeline and scope: a changed scope has a watermark of its own and starts again.
pub(super) fn app_id(plan: &RunPlan) -> String {
    let scope = match &plan.source {
        SourcePlan::Server { base, level, options, .. } => {
            format!("{}|{level:?}{}", base.as_str().trim_end_matches('/'), options.scope())
        }
        SourcePlan::Folder(url) => url.to_string(),
    };
    format!("fhirlake:{}:{:016x}", plan.name, twox_hash::XxHash3_128::oneshot(scope.as_bytes()) as u64)
}

/// Opens the tables, reads their watermarks and groups the types by them. Requests nothing from the server.
pub async fn prepare(plan: RunPlan, options: RunOptions) -> Result<Prepared> {
    let state = super::connect::state_of(&plan)?;
    let tables = super::connect::tables_of(&plan, &state)?;
    let (remembered, jobs) = (state.read::<StateFile>()?, state.read::<ExportJobs>()?);
    let app_id = app_id(&plan);
    let mut open = open_tables(&plan, &tables, &app_id).await?;
    if open.tables.is_empty() && !open.unwritable.is_empty() && !plan.types().is_all() {
        return Err(open.unwritable.remove(0).1);
    }
    let mut groups: Groups = BTreeMap::new();
    for (name, table) in open.types.iter().filter_map(|name| Some((name, open.tables.get(name)?))) {
        let since = if options.full_refresh { None } else { since(&plan, name, table, &open, (&remembered, &app_id)) };
        groups.entry(jobs.floored(&app_id, name, since)).or_default().push(name.clone());
    }
    // Before types that are exported separately leave their groups.
    let asks_for_all = groups.is_empty() || groups.contains_key(&None);
    let kickoffs = match &plan.source {
        SourcePlan::Folder(_) => Vec::new(),
        SourcePlan::Server { level, options: requested, .. } => {
            let request = |types: Vec<String>, since| ExportRequest {
                level: level.clone(),
                types,
                since,
                options: requested.clone(),
            };
            if plan.types().is_all() {
                let since = since_of_all(&plan, options, &groups, (&remembered, &app_id));
                let known = open.types.clone();
                vec![Kickoff { request: request(Vec::new(), since), requested: Vec::new(), known, in_flight: None }]
            } else {
                let planned = plan_kickoffs(groups, &jobs, &app_id, has_held_watermark(&state)?);
                let kickoff = |(since, requested): (Option<i64>, Vec<ResourceType>)| Kickoff {
                    request: request(requested.iter().map(ToString::to_string).collect(), since),
                    requested,
                    known: Vec::new(),
                    in_flight: None,
                };
                planned.into_iter().map(kickoff).collect()
            }
        }
    };
    let Resumed { kickoffs, is_catch_up, full_refresh } = match options.replay_only || options.new_export {
        true => Resumed { kickoffs, is_catch_up: false, full_refresh: options.full_refresh },
        false => resume(&jobs, &app_id, kickoffs, options.full_refresh, &open.watermarks),
    };
    // A run is full where it asks for all of each type: one new type, or one that is rejected, makes none of the others
    // so.
    let all_are_full = kickoffs.iter().all(|kickoff| kickoff.request.since.is_none());
    let full = kickoffs.first().map_or(asks_for_all, |_| all_are_full);
    reject_unsafe_modes(&plan, all_are_full || options.replay_only)?;
    let until = plan.request.export.until.as_ref().and_then(|until| parse_instant(until.as_bytes()));
    let rejected_lately = rejected_lately(&jobs, &app_id, Utc::now());
    let OpenTables { tables: opened, unwritable, .. } = open;
    Ok(Prepared {
        plan,
        tables,
        opened,
        kickoffs,
        rejected_lately,
        app_id,
        full,
        full_refresh,
        is_catch_up,
        until,
        unwritable,
    })
}

/// Types by the `_since` that they are asked with, microseconds since the epoch; `None` asks for everything.
type Groups = BTreeMap<Option<i64>, Vec<ResourceType>>;

/// The tables of a run, and their watermarks for its scope.
#[derive(Default)]
struct OpenTables {
    /// Types whose tables can be used, in the order of the file.
    types: Vec<ResourceType>,
    tables: HashMap<ResourceType, Table>,
    watermarks: BTreeMap<ResourceType, i64>,
    /// Until when deletions are known, where that is another time than the watermark.
    deletions: BTreeMap<ResourceType, i64>,
    unwritable: Vec<(ResourceType, Error)>,
}

async fn open_tables(plan: &RunPlan, tables: &Tables, app_id: &str) -> Result<OpenTables> {
    let types: Vec<ResourceType> = match plan.types().is_all() {
        true => tables.existing(has_table).await?,
        false => plan.types().names().iter().map(|name| name.as_str().into()).collect(),
    };
    let mut open = OpenTables::default();
    for name in types {
        let looked = async {
            let table = tables.open(&name).await?;
            let own = table.transaction(app_id).await?;
            let deletions = table.transaction(&deletions_id(app_id)).await?;
            Ok::<_, Error>((table, own, deletions))
        };
        let looked = looked.await;
        let checked = looked.as_ref().map_or(Ok(()), |(table, ..)| check_table(table, plan));
        match (looked, checked) {
            (Ok((table, own, deletions)), Ok(())) => {
                open.watermarks.extend(own.map(|own| (name.clone(), own)));
                open.deletions.extend(deletions.map(|known| (name.clone(), known)));
                open.types.push(name.clone());
                open.tables.insert(name, table);
            }
            // Nobody asked for this type by name; should the server send it, it fails then, and alone.
            (Ok(_), Err(error)) if plan.types().is_all() => {
                tracing::warn!(resource_type = %name, %error, "the table cannot be written");
            }
            // One that cannot be read now, and can in a moment, must not get a later watermark: nothing was asked from
            // its own.
            (Ok(_), Err(error)) | (Err(error), _) => {
                tracing::error!(resource_type = %name, %error, hint = error.advice(), "the table cannot be used; the \
                    type fails");
                open.unwritable.push((name, error));
            }
        }
    }
    Ok(open)
}

/// Returns what a type is asked with, by the file's `since`.
fn since(
    plan: &RunPlan,
    name: &ResourceType,
    table: &Table,
    open: &OpenTables,
    (remembered, app_id): (&StateFile, &str),
) -> Option<i64> {
    match plan.request.since {
        Instant::None => None,
        Instant::At(micros) => Some(micros),
        // A missing table means a full export of its type, whatever the state file says.
        Instant::LastSync if table.version().is_none() => None,
        // After a full export over the table, deletions are asked for from before it.
        Instant::LastSync => {
            let own = open.watermarks.get(name).copied();
            let own = own.map(|own| open.deletions.get(name).map_or(own, |known| own.min(*known)));
            let overlap = i64::try_from(plan.request.overlap.0.as_micros()).unwrap_or(0);
            own.or_else(|| from_state(remembered, app_id, name)).map(|micros| micros - overlap)
        }
    }
}

/// Returns what all types in one export are asked with. Which types the server has is not known beforehand, so the
/// export can only be incremental when a run of this very scope for all types has brought all of them, and each table
/// says so itself: a type that failed then, or that a run for some types did not ask for, has no table, and would get
/// its changes only.
fn since_of_all(
    plan: &RunPlan,
    options: RunOptions,
    groups: &Groups,
    (remembered, app_id): (&StateFile, &str),
) -> Option<i64> {
    let whole_before = remembered.scope.as_deref() == Some(app_id) && remembered.all_types;
    let all_known = !groups.is_empty() && !groups.contains_key(&None);
    match plan.request.since {
        Instant::At(micros) if !options.full_refresh => Some(micros),
        _ => groups.keys().flatten().min().copied().filter(|_| whole_before && all_known),
    }
}

/// Returns true if the newest run that was not stopped held a watermark: the server said that its export is not whole.
fn has_held_watermark(state: &StateStore) -> Result<bool> {
    let mut reports = state.reports::<RunReport>()?.take(REPORT_HISTORY);
    let newest = reports.find(|report| report.outcome() != RunOutcome::Stopped);
    Ok(newest.is_some_and(|report| report.watermark_not_advanced))
}

/// Plans one kick-off for each group of types, and one for each type that the server rejected while it accepted others.
/// Pure.
///
/// Of the rejected ones the longest known comes first, since a rejection costs no slot, and where a server has one
/// only, what it accepts again would never come behind the others; the rest come last.
fn plan_kickoffs(
    mut groups: Groups,
    jobs: &ExportJobs,
    app_id: &str,
    has_held_watermark: bool,
) -> Vec<(Option<i64>, Vec<ResourceType>)> {
    let rejected = |name: &ResourceType| {
        let known = jobs.rejected.iter().find(|known| known.scope == app_id && *known.resource_type == **name);
        known.map(|known| known.time)
    };
    let mut separate: Vec<(Option<i64>, Vec<ResourceType>)> = Vec::new();
    for (since, types) in &mut groups {
        separate.extend(types.extract_if(.., |name| rejected(name).is_some()).map(|name| (*since, vec![name])));
    }
    groups.retain(|_, types| !types.is_empty());
    separate.sort_by_key(|(_, types)| types.first().and_then(rejected));
    let last = separate.split_off(separate.len().min(1));
    // A server that has few slots, or gives an export a day, would have each group wait for the others. Where a
    // watermark was held, those that can move must not be held back with others.
    let throttles = jobs.throttled.as_ref().is_some_and(|until| until.scope == app_id);
    let groups = match (throttles, has_held_watermark) {
        (true, _) => together(groups, i64::MAX),
        (false, true) => groups,
        (false, false) => together(groups, CLOSE_MICROS),
    };
    separate.into_iter().chain(groups).chain(last).collect()
}

/// Rejects a mode that deletes what an export does not name, where the export names changes only.
fn reject_unsafe_modes(plan: &RunPlan, is_full: bool) -> Result<()> {
    if plan.stages.merge.mode == Mode::Merge {
        return Ok(());
    }
    if !is_full {
        let why = "stages.merge.mode deletes what an export does not name, and this run asks for changes only: set \
            since: none, or run with --full-refresh";
        return Err(Error::new(ErrorKind::Config, why));
    }
    if let SourcePlan::Server { level, .. } = &plan.source
        && *level != Level::System
    {
        tracing::warn!("stages.merge.mode deletes every row that is not in the group or compartment that is exported");
    }
    Ok(())
}

/// Types whose watermarks lie at most `most` microseconds apart are asked for in one export, from the oldest of them: a
/// server works on few exports at a time, and what is read twice changes nothing. From then on they have one watermark.
fn together(groups: Groups, most: i64) -> Groups {
    let mut near = Groups::new();
    for (since, types) in groups {
        let oldest = near.last_entry().filter(|oldest| match (oldest.key(), since) {
            (Some(oldest), Some(since)) => since - oldest <= most,
            _ => false,
        });
        match oldest {
            Some(mut oldest) => oldest.get_mut().extend(types),
            None => drop(near.insert(since, types)),
        }
    }
    near
}

/// Returns true if a run can write `table`: its features, and its columns where it exists.
pub(super) fn check_table(table: &Table, plan: &RunPlan) -> Result<()> {
    layout_of(&table.resource_type, table, &plan.layout()).map(drop)
}

/// The watermark of a type by the state file: the Python sync script's one time for all, or ours for this type.
fn from_state(state: &StateFile, app_id: &str, resource_type: &str) -> Option<i64> {
    if state.is_of_sync_script() {
        return Some(state.last_sync_time?.timestamp_micros() - CLIENT_CLOCK_OVERLAP_MICROS);
    }
    let ours = state.scope.as_deref() == Some(app_id);
    state.watermarks.get(resource_type).filter(|_| ours).map(DateTime::timestamp_micros)
}

/// Layouts of the run: an existing table's own, Pathling's for the rest. Types that the run did not open are looked at
/// when their first row comes.
pub(super) fn layouts(plan: &RunPlan, tables: &Tables, opened: &HashMap<ResourceType, Table>) -> Result<Layouts> {
    let mut known: HashMap<ResourceType, Arc<Layout>> = HashMap::new();
    for (name, table) in opened {
        match layout_of(name, table, &plan.layout()) {
            Ok(layout) => drop(known.insert(name.clone(), layout)),
            Err(error) if !plan.types().is_all() => return Err(error),
            Err(error) => tracing::warn!(resource_type = %name, %error, "the table cannot be written"),
        }
    }
    let (known, options, tables) = (RwLock::new(known), plan.layout(), tables.clone());
    Ok(Arc::new(move |name| {
        if let Some(layout) = known.read().get(name) {
            return Ok(layout.clone());
        }
        let table = tokio::runtime::Handle::current().block_on(tables.open(name))?;
        let layout = layout_of(name, &table, &options)?;
        let mut known = known.write();
        Ok(known.entry(name.clone()).or_insert(layout).clone())
    }))
}

fn layout_of(name: &ResourceType, table: &Table, options: &LayoutOptions) -> Result<Arc<Layout>> {
    table.check_writable()?;
    Ok(Arc::new(layout_for(name, options, table.schema()?.as_ref())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Breaks if groups grow by chaining, or if types without a watermark are joined with any.
    #[test]
    fn watermarks_within_an_hour_of_the_oldest_are_one_group() {
        let minutes = |minutes: i64| Some(minutes * 60 * 1_000_000);
        let group =
            |since, names: &[&str]| (since, names.iter().map(|name| (*name).into()).collect::<Vec<ResourceType>>());
        let near = together(
            BTreeMap::from([
                group(None, &["A"]),
                group(minutes(0), &["B"]),
                group(minutes(50), &["C", "D"]),
                group(minutes(60), &["E"]),
                group(minutes(100), &["F"]),
                group(minutes(161), &["G"]),
            ]),
            CLOSE_MICROS,
        );
        let wanted = [
            group(None, &["A"]),
            group(minutes(0), &["B", "C", "D", "E"]),
            group(minutes(100), &["F"]),
            group(minutes(161), &["G"]),
        ];
        assert_eq!(near, BTreeMap::from(wanted));
    }

    // Breaks if a rejected type stays with others, if it is not first and the rest last, or if types that were held are
    // put with others.
    #[test]
    fn kickoffs() {
        use crate::jobs::{RejectedType, ThrottledUntil};
        let minutes = |minutes: i64| Some(minutes * 60 * 1_000_000);
        let types = |names: &[&str]| names.iter().map(|name| (*name).into()).collect::<Vec<ResourceType>>();
        let groups = || {
            Groups::from([(None, types(&["A", "X"])), (minutes(0), types(&["B", "Y"])), (minutes(5), types(&["C"]))])
        };
        let rejected = |name: &str, hour| RejectedType {
            resource_type: name.into(),
            scope: "s".into(),
            time: DateTime::UNIX_EPOCH + chrono::TimeDelta::hours(hour),
            why: String::new(),
        };
        let mut jobs = ExportJobs { rejected: vec![rejected("X", 2), rejected("Y", 1)], ..ExportJobs::default() };
        let (a, b, x, y) = (types(&["A"]), types(&["B", "C"]), types(&["X"]), types(&["Y"]));
        let expected = [(minutes(0), y.clone()), (None, a.clone()), (minutes(0), b.clone()), (None, x.clone())];
        assert_eq!(plan_kickoffs(groups(), &jobs, "s", false), expected);
        let apart = [(minutes(0), y), (None, a), (minutes(0), types(&["B"])), (minutes(5), types(&["C"])), (None, x)];
        assert_eq!(plan_kickoffs(groups(), &jobs, "s", true), apart);
        // Of another scope nothing is known, and a server that throttles gets as few as can be.
        jobs.throttled = Some(ThrottledUntil { time: DateTime::UNIX_EPOCH, scope: "other".into(), why: String::new() });
        assert_eq!(plan_kickoffs(groups(), &jobs, "other", true).len(), 2);
    }
}
