//! A run: export → download → parse → encode → merge.
//!
//! ```text
//!            files           chunks            rows              batches
//!  export ──────────▶ download ──────▶ parse ──────────▶ encode ──────────▶ merge ──▶ Delta tables
//!     └─────────────────┴──────────────┴──── facts: pages, ends, counts ──────▲
//! ```

mod inspect;
mod maintain;
mod report;

pub use inspect::{Dependency, TableState, check_dependencies, table_states};
pub use maintain::{ByTable, OptimizeOptions, VacuumOptions, optimize, vacuum};
pub use report::RunReport;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use chrono::{DateTime, Utc};
use tracing::Instrument;
use url::Url;

use crate::config::{MaxBad, Mode, Plan, Since, SourcePlan};
use crate::delta::{Absent, Table, TableSettings, Tables};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fhir::{Auth, Client, ExportRequest};
use crate::flow::{Board, Crew, EdgeGauge, Stop, edge};
use crate::messages::{AtMost, BadLineSink, Chunk, FlushRequests, Layouts, MergeInput, ResourceType, Rows, instant_text};
use crate::schema::{Layout, LayoutOptions, layout_for};
use crate::stages::download::{Download, Origin};
use crate::stages::encode::{Encode, Shared};
use crate::stages::export::{ExportNote, FolderExport, Kickoff, ServerExport};
use crate::stages::ledger::Ledger;
use crate::stages::merge::{Merge, MergeSettings};
use crate::stages::parse::Parse;
use crate::state::{Journal, JournalEntry, StateFile, StateFolder};

/// What is taken off the time in the recipe's state file: it is a client's clock.
const RECIPE_OVERLAP_MICROS: i64 = 5 * 60 * 1_000_000;

/// What a run may be told on the command line.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunOptions {
    /// Ask for everything, and rewrite rows whose content differs.
    pub full_refresh: bool,
}

/// What those who watch a run see of it.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    /// Counters by type.
    pub board: Board,
    /// Edges, once the run has made them.
    pub edges: Arc<Mutex<Vec<EdgeGauge>>>,
    /// The server's words on its export.
    pub server: Arc<Mutex<Option<String>>>,
}

/// What a run is about to do, drawn up before anything is asked of the server.
pub struct Prepared {
    plan: Plan,
    tables: Tables,
    opened: HashMap<ResourceType, Table>,
    kickoffs: Vec<Kickoff>,
    app_id: String,
    full: bool,
    full_refresh: bool,
}

impl Prepared {
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

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pipeline and scope: a changed scope has a watermark of its own and starts anew.
fn app_id(plan: &Plan) -> String {
    let scope = match &plan.source {
        SourcePlan::Server { base, level, .. } => format!("{}|{level:?}", base.as_str().trim_end_matches('/')),
        SourcePlan::Folder(url) => url.to_string(),
    };
    format!("fhirlake:{}:{:016x}", plan.name, twox_hash::XxHash3_128::oneshot(scope.as_bytes()) as u64)
}

/// Opens the tables, reads their watermarks and groups the types by them. Asks nothing of the server.
pub async fn prepare(plan: Plan, options: RunOptions) -> Result<Prepared> {
    let tables = Tables::at(&plan.tables)?;
    let state = StateFolder::at(&plan.state, plan.state_file.as_deref());
    let remembered = StateFile::read(state.state_file())?;
    let app_id = app_id(&plan);
    let types: Vec<ResourceType> = if plan.types.is_empty() {
        tables.existing().await?
    } else {
        plan.types.iter().map(|name| name.as_str().into()).collect()
    };
    let mut opened = HashMap::new();
    // Watermark by type; `None` asks for everything.
    let mut groups: BTreeMap<Option<i64>, Vec<ResourceType>> = BTreeMap::new();
    for name in types {
        let table = tables.open(&name).await?;
        if let Err(error) = check_table(&table, &plan) {
            if !plan.types.is_empty() {
                return Err(error);
            }
            // Nobody asked for this type by name; should the server send it, it fails then, and alone.
            tracing::warn!(resource_type = %name, %error, "the table cannot be written");
            continue;
        }
        let since = match plan.since {
            _ if options.full_refresh => None,
            Since::Everything => None,
            Since::At(micros) => Some(micros),
            // A missing table means a full export of its type, whatever the state file says.
            Since::LastSync if table.version().is_none() => None,
            Since::LastSync => {
                let own = table.transaction(&app_id).await?;
                own.or_else(|| from_state(&remembered, &app_id, &name))
                    .map(|micros| micros - i64::try_from(plan.overlap.as_micros()).unwrap_or(0))
            }
        };
        groups.entry(since).or_default().push(name.clone());
        opened.insert(name, table);
    }
    let full = groups.is_empty() || groups.contains_key(&None);
    let kickoffs = match &plan.source {
        SourcePlan::Folder(_) => Vec::new(),
        SourcePlan::Server { level, .. } if plan.types.is_empty() => {
            // All types in one export. Which types the server has is not known beforehand, so it can only be
            // incremental when a run of this very scope has brought all of them, and each table says so itself:
            // a type that failed then has no table, and would get its changes only.
            let whole_before = remembered.scope.as_deref() == Some(app_id.as_str()) || remembered.is_the_recipes();
            let all_known = !groups.is_empty() && !groups.contains_key(&None);
            let since = match plan.since {
                Since::At(micros) if !options.full_refresh => Some(micros),
                _ => groups.keys().flatten().min().copied().filter(|_| whole_before && all_known),
            };
            let request = ExportRequest { level: level.clone(), types: Vec::new(), since };
            let known = opened.keys().cloned().collect();
            vec![Kickoff { request, asked: Vec::new(), known }]
        }
        SourcePlan::Server { level, .. } => groups
            .into_iter()
            .map(|(since, asked)| {
                let types = asked.iter().map(ToString::to_string).collect();
                Kickoff { request: ExportRequest { level: level.clone(), types, since }, asked, known: Vec::new() }
            })
            .collect(),
    };
    let full = kickoffs.first().map_or(full, |_| kickoffs.iter().any(|kickoff| kickoff.request.since.is_none()));
    let all_are_full = kickoffs.iter().all(|kickoff| kickoff.request.since.is_none());
    if plan.mode != Mode::Merge && !all_are_full {
        let why = "stages.merge.mode deletes what an export does not name, and this run asks for changes only: set since: none, or run with --full-refresh";
        return Err(Error::new(ErrorKind::Config, why));
    }
    Ok(Prepared { plan, tables, opened, kickoffs, app_id, full, full_refresh: options.full_refresh })
}

/// Whether a run can write `table`: its features, and its columns where it exists.
fn check_table(table: &Table, plan: &Plan) -> Result<()> {
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

/// The client of a plan's server.
pub fn client(plan: &Plan, board: &Board, stop: &Stop) -> Result<Option<Client>> {
    match &plan.source {
        SourcePlan::Folder(_) => Ok(None),
        SourcePlan::Server { base, auth, http, .. } => {
            let auth = Auth::new(auth.clone())?;
            Client::new(base.clone(), auth, http.clone(), board.clone(), stop.clone()).map(Some)
        }
    }
}

/// The local folder of a `file:` source.
fn source_folder(url: &Url) -> Result<(Arc<dyn object_store::ObjectStore>, object_store::path::Path)> {
    let path = url.to_file_path().map_err(|()| Error::new(ErrorKind::Config, "source.url is no folder"))?;
    if !path.is_dir() {
        return Err(Error::new(ErrorKind::Config, format!("source.url: {} is not a folder", path.display())));
    }
    let store = object_store::local::LocalFileSystem::new();
    let folder = object_store::path::Path::from_absolute_path(&path).context(ErrorKind::Config, "source.url")?;
    Ok((Arc::new(store), folder))
}

/// Layouts of the run: an existing table's own, Pathling's for the rest. Types that the run did not open are looked at
/// when their first row comes.
fn layouts(plan: &Plan, tables: &Tables, opened: &HashMap<ResourceType, Table>) -> Result<Layouts> {
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

/// Runs a pipeline once. The report comes even when types failed; `Err` is for what ended the run itself.
pub async fn run(
    plan: Plan,
    options: RunOptions,
    watch: &Watch,
    stop: &Stop,
    waiting: impl Fn(&[&'static str]),
) -> Result<RunReport> {
    let name = plan.name.clone();
    let run = maintain::run_id();
    let span = tracing::info_span!("run", pipeline = %name, run = %run);
    once(plan, options, watch, stop, waiting, run).instrument(span).await.map_err(|error| error.at(format!("pipeline {name}")))
}

async fn once(
    plan: Plan,
    options: RunOptions,
    watch: &Watch,
    stop: &Stop,
    waiting: impl Fn(&[&'static str]),
    run: String,
) -> Result<RunReport> {
    let (began, started) = (Instant::now(), Utc::now());
    let state = StateFolder::at(&plan.state, plan.state_file.as_deref());
    let _lock = state.lock()?;
    let journal = state.journal();
    clean_up(&journal, &Tables::at(&plan.tables)?).await?;
    let client = client(&plan, &watch.board, stop)?;
    let prepared = prepare(plan, options).await?;
    let plan = &prepared.plan;
    match prepared.kickoffs.iter().filter_map(|kickoff| kickoff.request.since).min() {
        Some(since) => tracing::info!(since = %instant_text(since), "incremental sync"),
        None => tracing::info!("full sync"),
    }
    journal.write(&JournalEntry::Began { run: run.clone(), types: plan.types.clone() })?;

    let layouts = layouts(plan, &prepared.tables, &prepared.opened)?;
    let memory = plan.memory;
    let (files_in, files_out, files_gauge) = edge("export->download", 1024, 4 << 20);
    let (chunks_in, chunks_out, chunks_gauge) = edge::<Chunk>("download->parse", 256, memory.chunks);
    let (rows_in, rows_out, rows_gauge) = edge::<Rows>("parse->encode", 256, memory.rows);
    let (merge_in, merge_out, merge_gauge) = edge::<MergeInput>("encode->merge", 1024, memory.batches);
    *locked(&watch.edges) = vec![files_gauge, chunks_gauge, rows_gauge, merge_gauge];

    let mut crew = Crew::new(stop.clone());
    let remember = remember(journal.clone());
    let statuses = Arc::new(Mutex::new(Vec::new()));
    let (origin, exports) = match (&plan.source, client.clone()) {
        (SourcePlan::Server { timeout, .. }, Some(client)) => {
            let statuses = statuses.clone();
            let words = watch.server.clone();
            let source = ServerExport {
                client: client.clone(),
                kickoffs: prepared.kickoffs.clone(),
                timeout: Some(*timeout),
                files: files_in,
                merge: merge_in.clone(),
                remember: Arc::new(move |note| {
                    if let ExportNote::Accepted { status, .. } = note {
                        locked(&statuses).push(status.clone());
                    }
                    remember(note)
                }),
                heard: Arc::new(move |text| *locked(&words) = Some(text.to_owned())),
                board: watch.board.clone(),
            };
            crew.spawn("export", async move { source.run().await }.in_current_span());
            (Origin::Server(client), prepared.kickoffs.len())
        }
        (SourcePlan::Folder(url), _) => {
            let (store, folder) = source_folder(url)?;
            let source = FolderExport {
                store: store.clone(),
                folder,
                url: url.clone(),
                types: plan.types.iter().map(|name| name.as_str().into()).collect(),
                files: files_in,
                merge: merge_in.clone(),
                board: watch.board.clone(),
                stop: stop.clone(),
            };
            crew.spawn("export", async move { source.run().await }.in_current_span());
            (Origin::Store(store), 1)
        }
        _ => return Err(Error::new(ErrorKind::Internal, "a server without a client")),
    };
    let span = tracing::Span::current();
    for _ in 0..plan.downloads.max(1) {
        let worker = Download {
            files: files_out.clone(),
            chunks: chunks_in.clone(),
            merge: merge_in.clone(),
            origin: origin.clone(),
            chunk_bytes: plan.chunk_bytes,
            max_line: plan.max_line,
            tries: plan.tries,
            board: watch.board.clone(),
            stop: stop.clone(),
        };
        let span = span.clone();
        crew.spawn_cpu("download", move |handle| span.in_scope(|| worker.run(handle)));
    }
    let bad_lines: BadLineSink = Arc::new(state.quarantine(&run));
    for _ in 0..plan.parse_workers {
        let worker = Parse {
            chunks: chunks_out.clone(),
            rows: rows_in.clone(),
            merge: merge_in.clone(),
            bad_lines: bad_lines.clone(),
            max_line: plan.max_line,
            board: watch.board.clone(),
        };
        let span = span.clone();
        crew.spawn_cpu("parse", move |handle| span.in_scope(|| worker.run(handle)));
    }
    let requests = FlushRequests::default();
    let shared = Shared::new(layouts, requests.clone(), memory.row_group, memory.open_batches, plan.all_columns);
    for _ in 0..plan.encode_workers {
        let worker = Encode { rows: rows_out.clone(), merge: merge_in.clone(), shared: shared.clone() };
        let span = span.clone();
        crew.spawn_cpu("encode", move |handle| span.in_scope(|| worker.run(handle)));
    }
    // An edge closes when its last sender is gone: ours must not outlive the workers'.
    drop((files_out, chunks_in, chunks_out, rows_in, rows_out, merge_in, shared));
    let merge = Merge {
        input: merge_out,
        tables: prepared.tables.clone(),
        opened: prepared.opened,
        ledger: Ledger::new(exports, plan.max_bad_lines.as_ref().map(at_most)),
        requests,
        settings: MergeSettings {
            pipeline: plan.name.clone(),
            run: run.clone(),
            app_id: prepared.app_id.clone(),
            tables_at_once: plan.tables_at_once,
            full_refresh: prepared.full_refresh,
            absent: absent(plan),
            target_file_bytes: plan.target_file_bytes,
            max_open_files: 64,
            keys_in_memory: memory.keys,
            match_memory: memory.matching / plan.tables_at_once.max(1),
            scratch: state.path().to_path_buf(),
            layout: plan.layout.clone(),
            exports,
            table: TableSettings { deletion_vectors: plan.deletion_vectors, upgrade: plan.upgrade_deletion_vectors },
            began,
        },
        board: watch.board.clone(),
        stop: stop.clone(),
    };
    let (report_in, report_out) = tokio::sync::oneshot::channel();
    crew.spawn("merge", async move { merge.run(report_in).await }.in_current_span());

    let ended = crew.join(waiting).await;
    let merged = report_out.await;
    if merged.is_ok() {
        // Merge has removed what it staged and did not commit. Where it died, the next run does.
        journal.write(&JournalEntry::Ended { run: run.clone() })?;
    }
    let merged = merged.unwrap_or_default();
    let report = report::draw_up(plan, run, (started, began.elapsed()), prepared.full, &watch.board, merged, ended.is_ok());
    state.save_report(&report.run, &serde_json::to_value(&report).context(ErrorKind::Internal, "the report")?)?;
    ended?;
    if stop.is_pulled() && !report.succeeded {
        let done = report.types.values().filter(|outcome| outcome.committed).count();
        return Err(Error::new(
            ErrorKind::Interrupted,
            format!("stopped; {done} types were committed and are whole, the next run brings the others"),
        ));
    }
    if report.succeeded {
        remember_success(&state, &report, &prepared.app_id)?;
        if let (Some(client), true) = (client, plan.delete_export) {
            let statuses: Vec<Url> = std::mem::take(&mut locked(&statuses));
            for status in statuses {
                client.delete_export(&status).await;
            }
        }
        journal.clear()?;
        if let Err(error) = maintain::after_run(plan, &state, stop).await {
            tracing::warn!(%error, "the run is done; the maintenance after it failed");
        }
    }
    Ok(report)
}

fn remember(journal: Journal) -> impl Fn(&ExportNote) -> Result<()> {
    move |note| {
        journal.write(&match note {
            ExportNote::Accepted { export, status } => JournalEntry::Accepted { export: *export, status: status.to_string() },
            ExportNote::Complete { export, transaction_time, files } => {
                JournalEntry::Complete { export: *export, transaction_time: *transaction_time, files: *files }
            }
        })
    }
}

/// Removes what a run left that was killed: staged files that no table's log names.
async fn clean_up(journal: &Journal, tables: &Tables) -> Result<()> {
    let steps = journal.unfinished()?;
    let Some(JournalEntry::Began { run, .. }) = steps.iter().find(|step| matches!(step, JournalEntry::Began { .. })) else {
        return Ok(());
    };
    let mut removed = 0;
    for name in tables.existing_folders()? {
        let table = tables.open(&name).await?;
        removed += table.remove_orphans(run).await?;
        table.remove_empty_folder();
    }
    tracing::warn!(run = %run, removed, "the last run ended without a word; its staged files were removed");
    journal.clear()
}

fn absent(plan: &Plan) -> Absent {
    let most = at_most(&plan.max_deleted);
    match plan.mode {
        Mode::Merge => Absent::Stay,
        Mode::Reconcile => Absent::Delete(most),
        Mode::Overwrite => Absent::Replace(most),
    }
}

fn at_most(most: &MaxBad) -> AtMost {
    match most {
        MaxBad::Lines(number) => AtMost::Number(*number),
        MaxBad::Share(text) => AtMost::Share(text.trim_end_matches('%').parse::<f64>().unwrap_or(0.0) / 100.0),
    }
}

fn remember_success(state: &StateFolder, report: &RunReport, app_id: &str) -> Result<()> {
    let mut remembered = StateFile::read(state.state_file())?;
    remembered.last_completed = Some(Utc::now());
    if let Some(time) = report.transaction_time.as_deref().and_then(|time| DateTime::parse_from_rfc3339(time).ok()) {
        if remembered.scope.as_deref() != Some(app_id) {
            remembered.watermarks.clear();
        }
        if !report.watermark_held {
            remembered.last_sync_time = Some(time.to_utc());
            remembered.scope = Some(app_id.to_owned());
            let done = report.types.keys().map(|name| (name.clone(), time.to_utc()));
            remembered.watermarks.extend(done);
        }
    }
    remembered.write(state.state_file())
}
