//! What a run is about to do: the tables as they are, their watermarks, and what is asked of the server.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};

use chrono::{DateTime, Utc};

use super::RunOptions;
use super::in_flight::{Resumed, refused_lately, resume};
use super::report::outcome_of;
use crate::config::{Mode, Plan, Since, SourcePlan};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::messages::{Layouts, ResourceType, has_table};
use crate::stages::export::Kickoff;
use crate::state::StateFile;
use bulk_data_client::{ExportRequest, Level};
use delta_upsert::{Table, Tables, deletions_id};
use fhir_arrow::{Layout, LayoutOptions, layout_for};
use foundation::instant::parse_instant;

/// How far apart watermarks may lie that are asked for together.
const CLOSE_MICROS: i64 = 60 * 60 * 1_000_000;

/// Runs before this one among which the last is looked for that was not stopped.
const LOOKED_BACK: usize = 10;

/// What is taken off the time in the recipe's state file: it is a client's clock.
const RECIPE_OVERLAP_MICROS: i64 = 5 * 60 * 1_000_000;

/// What a run is about to do, drawn up before anything is asked of the server.
pub struct Prepared {
    pub(super) plan: Plan,
    pub(super) tables: Tables,
    pub(super) opened: HashMap<ResourceType, Table>,
    pub(super) kickoffs: Vec<Kickoff>,
    /// Types that the server refused one by one not long ago.
    pub(super) refused_lately: HashSet<String>,
    pub(super) app_id: String,
    pub(super) full: bool,
    pub(super) full_refresh: bool,
    /// Whether it goes on with an export that an earlier run ended without.
    pub(super) behind: bool,
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
        let mut names: Vec<_> = self.opened.iter().filter(|(_, table)| table.version().is_some()).map(|(name, _)| name).collect();
        names.sort();
        names
    }
}

/// Pipeline and scope: a changed scope has a watermark of its own and starts anew.
pub(super) fn app_id(plan: &Plan) -> String {
    let scope = match &plan.source {
        SourcePlan::Server { base, level, options, .. } => {
            format!("{}|{level:?}{}", base.as_str().trim_end_matches('/'), options.scope())
        }
        SourcePlan::Folder(url) => url.to_string(),
    };
    format!("fhirlake:{}:{:016x}", plan.name, twox_hash::XxHash3_128::oneshot(scope.as_bytes()) as u64)
}

/// Opens the tables, reads their watermarks and groups the types by them. Asks nothing of the server.
pub async fn prepare(plan: Plan, options: RunOptions) -> Result<Prepared> {
    let state = super::state_of(&plan)?;
    let tables = super::tables_of(&plan, &state)?;
    let remembered = state.remembered()?;
    let exports = state.exports()?;
    let app_id = app_id(&plan);
    let types: Vec<ResourceType> = if plan.types.is_empty() {
        tables.existing(has_table).await?
    } else {
        plan.types.iter().map(|name| name.as_str().into()).collect()
    };
    let mut opened = HashMap::new();
    let mut transactions = BTreeMap::new();
    let mut unwritable = Vec::new();
    // Watermark by type; `None` asks for everything.
    let mut groups: BTreeMap<Option<i64>, Vec<ResourceType>> = BTreeMap::new();
    for name in types {
        let looked = async {
            let table = tables.open(&name).await?;
            let own = table.transaction(&app_id).await?;
            let deletions = table.transaction(&deletions_id(&app_id)).await?;
            Ok::<_, Error>((table, own, deletions))
        };
        let looked = looked.await;
        let checked = looked.as_ref().map_or(Ok(()), |(table, ..)| check_table(table, &plan));
        let (table, own, deletions) = match (looked, checked) {
            (Ok(looked), Ok(())) => looked,
            // Nobody asked for this type by name; should the server send it, it fails then, and alone.
            (Ok(_), Err(error)) if plan.types.is_empty() => {
                tracing::warn!(resource_type = %name, %error, "the table cannot be written");
                continue;
            }
            // One that cannot be read now, and can in a moment, must not get a later watermark: nothing was asked from its own.
            (Ok(_), Err(error)) | (Err(error), _) => {
                tracing::error!(resource_type = %name, %error, hint = error.advice(), "the table cannot be used; the type fails");
                unwritable.push((name, error));
                continue;
            }
        };
        transactions.extend(own.map(|own| (name.clone(), own)));
        let since = match plan.since {
            _ if options.full_refresh => None,
            Since::Everything => None,
            Since::At(micros) => Some(micros),
            // A missing table means a full export of its type, whatever the state file says.
            Since::LastSync if table.version().is_none() => None,
            // After a full export over the table, deletions are asked for from before it.
            Since::LastSync => own
                .map(|own| deletions.map_or(own, |known| known.min(own)))
                .or_else(|| from_state(&remembered, &app_id, &name))
                .map(|micros| micros - i64::try_from(plan.overlap.as_micros()).unwrap_or(0)),
        };
        let floor = exports.floors.iter().find(|floor| floor.scope == app_id && *floor.resource_type == *name);
        // `None`, everything, is the least.
        let since = floor.map_or(since, |floor| since.min(floor.since));
        groups.entry(since).or_default().push(name.clone());
        opened.insert(name, table);
    }
    if opened.is_empty() && !unwritable.is_empty() && !plan.types.is_empty() {
        return Err(unwritable.remove(0).1);
    }
    // What the server refused while it took others is asked for by itself: what was refused longest ago first, since a refusal
    // costs no slot, and where a server has one only, what is given again would never come behind the others; the rest last.
    let refused = |name: &ResourceType| {
        let mut aside = exports.set_aside.iter().filter(|aside| aside.scope == app_id && *aside.resource_type == **name);
        aside.next().map(|aside| aside.time)
    };
    let mut set_aside: Vec<(Option<i64>, Vec<ResourceType>)> = Vec::new();
    for (since, types) in groups.iter_mut().filter(|_| !plan.types.is_empty()) {
        set_aside.extend(types.extract_if(.., |name| refused(name).is_some()).map(|name| (*since, vec![name])));
    }
    groups.retain(|_, types| !types.is_empty());
    set_aside.sort_by_key(|(_, types)| types.first().and_then(refused));
    let last = set_aside.split_off(set_aside.len().min(1));
    // The server said that its export is not whole: watermarks that can move must not be held back with others.
    let reports = state.reports(LOOKED_BACK);
    let newest = reports.iter().find(|report| outcome_of(report) != "stopped");
    let held = newest.is_some_and(|report| report["watermark_held"] == true);
    // A server that has few slots, or gives an export a day, would have each of them wait for the others.
    let throttles = exports.not_before.as_ref().is_some_and(|until| until.scope == app_id);
    let groups = match (throttles, held) {
        (true, _) => together(groups, i64::MAX),
        (false, true) => groups,
        (false, false) => together(groups, CLOSE_MICROS),
    };
    let full = groups.is_empty() || groups.contains_key(&None);
    let kickoffs = match &plan.source {
        SourcePlan::Folder(_) => Vec::new(),
        SourcePlan::Server { level, options: asked, .. } if plan.types.is_empty() => {
            // All types in one export. Which types the server has is not known beforehand, so it can only be
            // incremental when a run of this very scope has brought all of them, and each table says so itself:
            // a type that failed then has no table, and would get its changes only.
            let whole_before = remembered.scope.as_deref() == Some(app_id.as_str()) || remembered.is_the_recipes();
            let all_known = !groups.is_empty() && !groups.contains_key(&None);
            let since = match plan.since {
                Since::At(micros) if !options.full_refresh => Some(micros),
                _ => groups.keys().flatten().min().copied().filter(|_| whole_before && all_known),
            };
            let request = ExportRequest { level: level.clone(), types: Vec::new(), since, options: asked.clone() };
            let known = opened.keys().cloned().collect();
            vec![Kickoff { request, asked: Vec::new(), known, in_flight: None }]
        }
        SourcePlan::Server { level, options: wanted, .. } => set_aside
            .into_iter()
            .chain(groups)
            .chain(last)
            .map(|(since, asked)| {
                let types = asked.iter().map(ToString::to_string).collect();
                let request = ExportRequest { level: level.clone(), types, since, options: wanted.clone() };
                Kickoff { request, asked, known: Vec::new(), in_flight: None }
            })
            .collect(),
    };
    let Resumed { kickoffs, behind, full_refresh } = match options.replay_only || options.new_export {
        true => Resumed { kickoffs, behind: false, full_refresh: options.full_refresh },
        false => resume(&exports, &app_id, kickoffs, options.full_refresh, &transactions),
    };
    // A run is full where it asks for all of each type: one new type, or one that is refused, makes none of the others so.
    let all_are_full = kickoffs.iter().all(|kickoff| kickoff.request.since.is_none());
    let full = kickoffs.first().map_or(full, |_| all_are_full);
    if plan.mode != Mode::Merge && !all_are_full && !options.replay_only {
        let why = "stages.merge.mode deletes what an export does not name, and this run asks for changes only: set since: none, or run with --full-refresh";
        return Err(Error::new(ErrorKind::Config, why));
    }
    if let (true, SourcePlan::Server { level, .. }) = (plan.mode != Mode::Merge, &plan.source)
        && *level != Level::System
    {
        tracing::warn!("stages.merge.mode deletes every row that is not in the group or compartment that is exported");
    }
    let until = match &plan.source {
        SourcePlan::Server { options, .. } => options.until.as_ref().and_then(|until| parse_instant(until.as_bytes())),
        SourcePlan::Folder(_) => None,
    };
    let refused_lately = refused_lately(&exports, &app_id, Utc::now());
    Ok(Prepared { plan, tables, opened, kickoffs, refused_lately, app_id, full, full_refresh, behind, until, unwritable })
}

/// Types whose watermarks lie at most `most` microseconds apart are asked for in one export, from the oldest of them: a server
/// works on few exports at a time, and what is read twice changes nothing. From then on they have one watermark.
fn together(groups: BTreeMap<Option<i64>, Vec<ResourceType>>, most: i64) -> BTreeMap<Option<i64>, Vec<ResourceType>> {
    let mut near: BTreeMap<Option<i64>, Vec<ResourceType>> = BTreeMap::new();
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

/// Whether a run can write `table`: its features, and its columns where it exists.
pub(super) fn check_table(table: &Table, plan: &Plan) -> Result<()> {
    layout_of(&table.resource_type, table, &plan.layout).map(drop)
}

/// The watermark of a type by the state file: the recipe's one time for all, or ours for this type.
fn from_state(state: &StateFile, app_id: &str, resource_type: &str) -> Option<i64> {
    if state.is_the_recipes() {
        return Some(state.last_sync_time?.timestamp_micros() - RECIPE_OVERLAP_MICROS);
    }
    let ours = state.scope.as_deref() == Some(app_id);
    state.watermarks.get(resource_type).filter(|_| ours).map(DateTime::timestamp_micros)
}

/// Layouts of the run: an existing table's own, Pathling's for the rest. Types that the run did not open are looked at
/// when their first row comes.
pub(super) fn layouts(plan: &Plan, tables: &Tables, opened: &HashMap<ResourceType, Table>) -> Result<Layouts> {
    let mut known: HashMap<ResourceType, Arc<Layout>> = HashMap::new();
    for (name, table) in opened {
        match layout_of(name, table, &plan.layout) {
            Ok(layout) => drop(known.insert(name.clone(), layout)),
            Err(error) if !plan.types.is_empty() => return Err(error),
            Err(error) => tracing::warn!(resource_type = %name, %error, "the table cannot be written"),
        }
    }
    let (known, options, tables) = (RwLock::new(known), plan.layout.clone(), tables.clone());
    Ok(Arc::new(move |name| {
        if let Some(layout) = known.read().unwrap_or_else(PoisonError::into_inner).get(name) {
            return Ok(layout.clone());
        }
        let table = tokio::runtime::Handle::current().block_on(tables.open(name))?;
        let layout = layout_of(name, &table, &options)?;
        let mut known = known.write().unwrap_or_else(PoisonError::into_inner);
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
        let group = |since, names: &[&str]| (since, names.iter().map(|name| (*name).into()).collect::<Vec<ResourceType>>());
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
}
