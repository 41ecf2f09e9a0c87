//! Maintenance of a pipeline's tables, under its lock: `optimize` and `vacuum`, by hand or after some runs.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::Utc;

use super::RunPlan;
use super::connect::tables_of;
use super::recovery::clean_up;
use crate::error::{Error, ErrorKind, Result};
use crate::jobs::checkpoint::CheckpointStore;
use crate::messages::{ResourceType, has_table};
use crate::state::{JournalEntry, StateFile, StateStore};
use crate::values::Types;
use delta_upsert::{OptimizeSettings, Optimized, Scratch, Table, VacuumSettings, Vacuumed, commit_info};
use flow::{Cancellation, compute};
use foundation::Limit;

/// Options of `optimize`.
#[derive(Debug, Clone)]
pub struct OptimizeOptions {
    /// Types, of those that have a table.
    pub types: Types,
    /// Rows in the order of their ids.
    pub cluster: bool,
    /// From how many marked rows a file is rewritten.
    pub min_deleted: Limit,
}

/// Options of `vacuum`.
#[derive(Debug, Clone, Default)]
pub struct VacuumOptions {
    /// Types, of those that have a table.
    pub types: Types,
    /// Time for which files stay; `None` for each table's own setting.
    pub retention: Option<Duration>,
    /// True if a retention below a table's own is allowed.
    pub below_the_tables: bool,
    /// True if files are removed, or only named.
    pub delete: bool,
}

/// Result for each table.
pub type ByTable<T> = BTreeMap<String, Result<T>>;

/// An id for files of a run that begins now; random letters too, since two pipelines that begin in one millisecond may
/// share tables.
pub fn run_id() -> String {
    let random = uuid::Uuid::new_v4().simple().to_string();
    format!("{}-{}", Utc::now().format("%Y%m%dT%H%M%S%3fZ"), &random[..6])
}

/// Optimizes the pipeline's tables, one after the other. A table that fails does not hold up the others.
pub async fn optimize(plan: &RunPlan, options: &OptimizeOptions, stop: &Cancellation) -> Result<ByTable<Optimized>> {
    let state = super::connect::state_of(plan)?;
    let _lock = state.acquire_lease()?;
    state.clear_scratch()?;
    clean_up(&state.journal(), &tables_of(plan, &state)?, CheckpointStore::of(&state).read()?.as_ref()).await?;
    optimize_locked(plan, &state, options, stop).await
}

async fn optimize_locked(
    plan: &RunPlan,
    state: &StateStore,
    options: &OptimizeOptions,
    stop: &Cancellation,
) -> Result<ByTable<Optimized>> {
    let journal = state.journal();
    let run = run_id();
    // What a killed run leaves, the next one knows by its name.
    journal.write(JournalEntry::Began { run: run.clone(), types: options.types.names().to_vec() })?;
    let settings = OptimizeSettings {
        target_file_bytes: plan.stages.merge.target_file.0,
        min_deleted: options.min_deleted,
        cluster: options.cluster,
        scratch: Scratch { folder: state.scratch(), memory: plan.memory.total() / 2 },
        run: run.clone(),
        info: commit_info(&plan.name, &run),
    };
    let done = for_each_table(plan, state, &options.types, stop, async |mut table: Table| {
        table.check_writable()?;
        let settings = settings.clone();
        let span = tracing::info_span!("optimize", resource_type = %table.resource_type);
        compute(span, async move { table.optimize(&settings).await }).await.and_then(|done| done)
    })
    .await;
    // Whatever ended it, no table is left half-way: each was done, or put back.
    journal.write(JournalEntry::Ended { run })?;
    journal.clear()?;
    let done = done?;
    for (name, done) in &done {
        match done {
            Ok(done) if done.version.is_some() => tracing::info!(
                resource_type = %name, version = done.version, files_removed = done.files_removed,
                files_added = done.files_added,
                bytes_removed = done.bytes_removed, bytes_added = done.bytes_added, rows_purged = done.rows_purged,
                "optimized"
            ),
            Ok(_) => {}
            Err(error) => tracing::warn!(resource_type = %name, %error, "the table was not optimized"),
        }
    }
    Ok(done)
}

/// Finds files that the tables no longer need, and removes them if asked to.
pub async fn vacuum(plan: &RunPlan, options: &VacuumOptions, stop: &Cancellation) -> Result<ByTable<Vacuumed>> {
    let state = super::connect::state_of(plan)?;
    let _lock = state.acquire_lease()?;
    clean_up(&state.journal(), &tables_of(plan, &state)?, CheckpointStore::of(&state).read()?.as_ref()).await?;
    vacuum_locked(plan, &state, options, stop).await
}

async fn vacuum_locked(
    plan: &RunPlan,
    state: &StateStore,
    options: &VacuumOptions,
    stop: &Cancellation,
) -> Result<ByTable<Vacuumed>> {
    let settings = VacuumSettings {
        staged: CheckpointStore::of(state).read()?.map(|staged| staged.files).unwrap_or_default(),
        retention: options.retention,
        below_the_tables: options.below_the_tables,
        delete: options.delete,
        info: commit_info(&plan.name, &run_id()),
    };
    for_each_table(plan, state, &options.types, stop, async |mut table: Table| {
        if settings.delete {
            table.check_writable()?;
        }
        let settings = settings.clone();
        let span = tracing::info_span!("vacuum", resource_type = %table.resource_type);
        compute(span, async move { table.vacuum(&settings).await }).await.and_then(|done| done)
    })
    .await
}

/// Maintains the tables after a successful run. It cannot fail the run: the tables hold all that came.
pub(super) async fn after_run(plan: &RunPlan, state: &StateStore, stop: &Cancellation) -> Result<()> {
    let mut file = state.read::<StateFile>()?;
    file.runs_since_optimize += 1;
    file.runs_since_vacuum += 1;
    let due = |after: u64, runs: u64| after > 0 && runs >= after && !stop.is_cancelled();
    if due(plan.optimize.after, file.runs_since_optimize) {
        let options = OptimizeOptions {
            types: plan.optimize.types.clone(),
            cluster: plan.optimize.cluster,
            min_deleted: plan.optimize.min_deleted,
        };
        optimize_locked(plan, state, &options, stop).await?;
        file.runs_since_optimize = 0;
    }
    if due(plan.vacuum.after, file.runs_since_vacuum) {
        let options = VacuumOptions {
            retention: plan.vacuum.retention.map(|span| span.0),
            delete: true,
            ..VacuumOptions::default()
        };
        for (name, done) in vacuum_locked(plan, state, &options, stop).await? {
            match done {
                Ok(done) => {
                    tracing::info!(resource_type = %name, files = done.files.len(), bytes = done.bytes, "vacuumed")
                }
                Err(error) => tracing::warn!(resource_type = %name, %error, "the table was not vacuumed"),
            }
        }
        file.runs_since_vacuum = 0;
    }
    state.write(&file)
}

/// Does something to the tables of `types`, or to all that the pipeline has.
async fn for_each_table<T>(
    plan: &RunPlan,
    state: &StateStore,
    types: &Types,
    stop: &Cancellation,
    work: impl AsyncFn(Table) -> Result<T>,
) -> Result<ByTable<T>> {
    let tables = tables_of(plan, state)?;
    let existing = tables.existing(has_table).await?;
    if let Some(unknown) = types.names().iter().find(|name| !existing.iter().any(|there| **there == ***name)) {
        return Err(Error::new(ErrorKind::Config, format!("no table of {unknown} in {}", tables.display())));
    }
    let wanted = |name: &ResourceType| if types.is_all() { plan.types().contains(name) } else { types.contains(name) };
    let mut done = BTreeMap::new();
    for name in existing.into_iter().filter(|name| wanted(name)) {
        if stop.is_cancelled() {
            return Err(Error::new(ErrorKind::Interrupted, "stopped; tables that were not reached are as they were"));
        }
        let outcome = match tables.open(&name).await {
            Ok(table) => work(table).await,
            Err(error) => Err(error),
        };
        done.insert(name.to_string(), outcome.map_err(|error| error.at(name.to_string())));
    }
    Ok(done)
}
