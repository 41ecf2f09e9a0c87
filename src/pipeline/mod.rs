//! A run: export → download → parse → encode → merge.
//!
//! ```text
//!            files           chunks            rows              batches
//!  export ──────────▶ download ──────▶ parse ──────────▶ encode ──────────▶ merge ──▶ Delta tables
//!     └─────────────────┴──────────────┴──── facts: pages, ends, counts ──────▲
//! ```

mod attachments;
mod in_flight;
mod inspect;
mod leftovers;
mod maintain;
mod prepare;
mod report;
mod staged;

pub use crate::stages::merge::STOPPED;
pub use in_flight::cancel as cancel_exports;
pub use inspect::{Dependency, TableState, check_dependencies, table_states};
pub use maintain::run_id;
pub use maintain::{ByTable, OptimizeOptions, VacuumOptions, optimize, vacuum};
pub use prepare::{Prepared, prepare};
pub use report::{RunReport, of_failed as leave_report, outcome_of};

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use chrono::{DateTime, Utc};
use tracing::Instrument;
use url::Url;

use self::in_flight::OfServer;
use self::leftovers::{clean_up, replay};
use self::staged::TakenUp;
use crate::config::{Mode, Plan, SourcePlan};
use crate::error::{Advice, Context, Error, ErrorKind, Result};
use crate::export_log::ExportLog;
use crate::messages::{BadLineSink, Chunk, FlushRequests, MergeInput, Rows, instant_text};
use crate::mirror::Mirror;
use crate::stages::download::{Download, Origin};
use crate::stages::encode::{Encode, Shared};
use crate::stages::export::{ExportNote, ServerExport};
use crate::stages::folder::{FolderExport, PassedOver};
use crate::stages::ledger::Ledger;
use crate::stages::merge::{Merge, MergeSettings, Staging, StagingSettings};
use crate::stages::parse::Parse;
use crate::state::{JournalEntry, StateFolder};
use crate::telemetry;
use bulk_data_client::{Auth, Client, Links};
use delta_upsert::{Absent, OrderRules, TableSettings, Tables};
use flow::{Board, Crew, EdgeGauge, Stop, edge};

/// What a run may be told on the command line.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunOptions {
    /// Ask for everything, and rewrite rows whose content differs.
    pub full_refresh: bool,
    /// Ask for a new export though one is in flight.
    pub new_export: bool,
    /// Ask the source for nothing: only try the lines in quarantine again.
    pub replay_only: bool,
    /// This is a part of a run whose other types failed: it completes nothing.
    pub part: bool,
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
    /// Whether the run asks for everything, by its own choice or for want of a watermark.
    pub full: Arc<AtomicBool>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The state of a plan: a folder, or this process's copy of one in an object store.
pub fn state_of(plan: &Plan) -> Result<StateFolder> {
    if !plan.state.contains("://") {
        return Ok(StateFolder::at(std::path::Path::new(&plan.state), plan.state_file.as_deref()));
    }
    let mirror = Mirror::at(&plan.state, plan.lock_expiry, || Tables::at(&plan.state)?.store())?;
    Ok(StateFolder::mirrored(mirror))
}

/// The tables of a plan, to which nothing is committed once the state's lock is lost.
pub fn tables_of(plan: &Plan, state: &StateFolder) -> Result<Tables> {
    Ok(Tables::at(&plan.tables)?.guarded(state.guard()))
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

/// The folder of a source of NDJSON, local or in an object store.
fn source_folder(url: &Url) -> Result<Arc<dyn object_store::ObjectStore>> {
    if url.scheme() != "file" {
        return Tables::at(url.as_str())?.store().map_err(|error| error.at("source.url"));
    }
    let path = url.to_file_path().map_err(|()| Error::new(ErrorKind::Config, "source.url is no folder"))?;
    if !path.is_dir() {
        return Err(Error::new(ErrorKind::Config, format!("source.url: {} is not a folder", path.display())));
    }
    // Not from the root: names on the way need not be such as objects may have.
    let store = object_store::local::LocalFileSystem::new_with_prefix(&path).context(ErrorKind::Config, "source.url")?;
    Ok(Arc::new(store))
}

/// Local folders that fhirlake writes into and that lie in the source folder, as seen from there.
fn own_folders(plan: &Plan, source: &Url, state: &StateFolder, tables: &Tables) -> Vec<object_store::path::Path> {
    let state = (!plan.state.contains("://")).then(|| state.path().to_path_buf());
    let Some(source) = source.to_file_path().ok().and_then(|source| source.canonicalize().ok()) else { return Vec::new() };
    let canonical = |folder: std::path::PathBuf| folder.canonicalize().or_else(|_| std::path::absolute(&folder)).ok();
    let folders = state.into_iter().chain(tables.local()).filter_map(canonical);
    let below = folders.filter_map(|folder| folder.strip_prefix(&source).ok()?.to_str().map(object_store::path::Path::parse));
    below.filter_map(std::result::Result::ok).filter(|folder| folder.parts().next().is_some()).collect()
}

/// Runs a pipeline once. The report comes even when types failed; `Err` is for what ended the run itself. Where an earlier run
/// ended without all of its export, that is made good first, and then what changed since is asked for.
pub async fn run(
    plan: Plan,
    options: RunOptions,
    watch: &Watch,
    stop: &Stop,
    waiting: impl Fn(&[&'static str]) + Sync,
) -> Result<RunReport> {
    let report = passes(plan, options, watch, stop, waiting).await?;
    // One that failed as a whole has said so itself.
    report.log();
    Ok(report)
}

async fn passes(
    plan: Plan,
    options: RunOptions,
    watch: &Watch,
    stop: &Stop,
    waiting: impl Fn(&[&'static str]) + Sync,
) -> Result<RunReport> {
    let (first, behind) = pass(plan.clone(), options, watch, stop, &waiting).await?;
    if !behind || stop.is_pulled() {
        return Ok(first);
    }
    let failed = |name: &String| first.types.get(name).is_some_and(|outcome| outcome.error.is_some());
    let rest: Vec<String> = plan.types.iter().filter(|name| !failed(name)).cloned().collect();
    let part = !first.succeeded;
    if part && rest.is_empty() {
        return Ok(first);
    }
    // What an earlier run had failed to bring is here now, as it was when its export was made; types that fail again and again
    // must not keep the others from what changed since.
    tracing::info!("what is there of an earlier run's export is merged; now what changed since");
    let state = state_of(&plan)?;
    let types = if part { rest } else { plan.types.clone() };
    let second = pass(Plan { types, ..plan }, RunOptions { part, ..options }, watch, stop, &waiting).await;
    // A server with one slot has it taken as long as the first export is not whole: no news, and no failure of its own.
    let (second, _) = match second {
        Err(error) if part && error.kind() == ErrorKind::Throttled => return Ok(first),
        second => second?,
    };
    let report = first.and_then(second);
    state.save_report(&report.run, &serde_json::to_value(&report).context(ErrorKind::Internal, "the report")?)?;
    Ok(report)
}

/// Target of the log's word that a run failed, for those who say it in their own way too.
pub const RUN_FAILED: &str = "fhirlake::run_failed";

/// Once through the pipeline, under an id of its own; a failure leaves a report too.
async fn pass(
    plan: Plan,
    options: RunOptions,
    watch: &Watch,
    stop: &Stop,
    waiting: &(impl Fn(&[&'static str]) + Sync),
) -> Result<(RunReport, bool)> {
    let (name, run, started) = (plan.name.clone(), maintain::run_id(), Utc::now());
    let span = tracing::info_span!("run", pipeline = %name, run = %run, trace_id = tracing::field::Empty);
    if let Some(id) = telemetry::trace_id(&span) {
        span.record("trace_id", id);
    }
    let state = state_of(&plan)?;
    let outcome = once(plan, options, watch, stop, waiting, run.clone()).instrument(span.clone()).await;
    if let Err(error) = &outcome {
        let _of_the_run = span.enter();
        match error.kind() {
            ErrorKind::Interrupted => tracing::info!(%error, "the run was stopped"),
            _ => tracing::error!(target: RUN_FAILED, %error, hint = error.advice(), "the run failed"),
        }
        report::of_failed(&state, &name, &run, started, error);
    }
    outcome.map_err(|error| error.at(format!("pipeline {name}")))
}

async fn once(
    plan: Plan,
    options: RunOptions,
    watch: &Watch,
    stop: &Stop,
    waiting: &impl Fn(&[&'static str]),
    run: String,
) -> Result<(RunReport, bool)> {
    let (began, started) = (Instant::now(), Utc::now());
    let state = state_of(&plan)?;
    let _lock = state.lock()?;
    let journal = state.journal();
    state.clear_scratch()?;
    let staged = state.staged().read()?;
    clean_up(&journal, &tables_of(&plan, &state)?, staged.as_ref()).await?;
    let client = if options.replay_only { None } else { client(&plan, &watch.board, stop)? };
    let mut prepared = prepare(plan, options).await?;
    if let Some(client) = &client {
        in_flight::settle(&state, &prepared.app_id, client).await?;
        in_flight::check_not_before(&state, &prepared.app_id, &mut prepared.kickoffs)?;
    }
    let goes_on = client.is_some() && !options.replay_only;
    let taken_up = if goes_on { staged::take_up(&state, staged, &mut prepared).await? } else { TakenUp::default() };
    let prepared = prepared;
    watch.full.store(prepared.full, Ordering::Relaxed);
    let plan = &prepared.plan;
    match prepared.kickoffs.iter().filter(|_| !options.replay_only).filter_map(|kickoff| kickoff.request.since).min() {
        Some(since) => tracing::info!(since = %instant_text(since), "incremental sync"),
        None if options.replay_only => tracing::info!("lines in quarantine are tried again"),
        None => tracing::info!("full sync"),
    }
    journal.write(&JournalEntry::Began { run: run.clone(), types: plan.types.clone() })?;

    let layouts = prepare::layouts(plan, &prepared.tables, &prepared.opened)?;
    let memory = plan.memory;
    let (files_in, files_out, files_gauge) = edge("export->download", 1024, 4 << 20);
    let (chunks_in, chunks_out, chunks_gauge) = edge::<Chunk>("download->parse", 256, memory.chunks);
    let attachments = plan.attachments.as_ref().zip(client.clone());
    // A further stage shares the budget.
    let rows_bytes = if attachments.is_some() { memory.rows / 2 } else { memory.rows };
    let (rows_in, mut rows_out, rows_gauge) =
        edge::<Rows>(if attachments.is_some() { "parse->attach" } else { "parse->encode" }, 256, rows_bytes);
    let (merge_in, merge_out, merge_gauge) = edge::<MergeInput>("encode->merge", 1024, memory.batches);
    let mut gauges = vec![files_gauge, chunks_gauge, rows_gauge];
    let mut crew = Crew::new(stop.clone());
    if let Some((section, client)) = attachments {
        let (attached_in, attached_out, gauge) = edge::<Rows>("attach->encode", 256, rows_bytes);
        gauges.push(gauge);
        let rows = std::mem::replace(&mut rows_out, attached_out);
        attachments::spawn(&mut crew, section, &prepared, client, (rows, attached_in), &watch.board)?;
    }
    gauges.push(merge_gauge);
    *locked(&watch.edges) = gauges;
    // A run that deletes what the export does not name takes the export's word for everything.
    let replays = plan.mode == Mode::Merge || options.replay_only;
    let replay = if replays { replay(plan, &state, &chunks_in, &merge_in)? } else { None };
    let first_index = replay.as_ref().map_or(0, |replay| replay.files.len() as u32);
    if let Some(replay) = replay {
        let span = tracing::Span::current();
        crew.spawn_cpu("replay", move |handle| span.in_scope(|| replay.run(handle)));
    }
    let log = match plan.export_log && client.is_some() {
        true => ExportLog::at(&state.export_log(&run), &run)?,
        false => ExportLog::default(),
    };
    let links = Links::default();
    let lost = Arc::new(AtomicBool::new(false));
    let remember = in_flight::remember(state.clone(), prepared.app_id.clone(), prepared.full_refresh, lost.clone());
    let passed_over = PassedOver::default();
    let (origin, exports) = match (&plan.source, client.clone()) {
        _ if options.replay_only => {
            drop(files_in);
            (Origin::Store(Arc::new(object_store::memory::InMemory::new())), 0)
        }
        (SourcePlan::Server { timeout, .. }, Some(client)) => {
            let words = watch.server.clone();
            let source = ServerExport {
                client: client.clone(),
                kickoffs: prepared.kickoffs.clone(),
                refused_lately: prepared.refused_lately.clone(),
                timeout: Some(*timeout),
                until: prepared.until,
                first_index: taken_up.first_index,
                files: files_in,
                merge: merge_in.clone(),
                remember: remember.clone(),
                heard: Arc::new(move |text| *locked(&words) = Some(text.to_owned())),
                links: links.clone(),
                log: log.clone(),
                board: watch.board.clone(),
                stop: stop.clone(),
            };
            crew.spawn("export", async move { source.run().await }.in_current_span());
            (Origin::Server(Box::new(client), links), prepared.kickoffs.len())
        }
        (SourcePlan::Folder(url), _) => {
            let store = source_folder(url)?;
            let source = FolderExport {
                store: store.clone(),
                url: url.clone(),
                types: plan.types.iter().map(|name| name.as_str().into()).collect(),
                excluded: own_folders(plan, url, &state, &prepared.tables),
                passed_over: passed_over.clone(),
                all_asked: plan.mode != Mode::Merge,
                first_index,
                files: files_in,
                merge: merge_in.clone(),
                stop: stop.clone(),
            };
            crew.spawn("export", async move { source.run().await }.in_current_span());
            (Origin::Store(store), 1)
        }
        _ => return Err(Error::new(ErrorKind::Internal, "a server without a client")),
    };
    let span = tracing::Span::current();
    let long_lines = Arc::new(tokio::sync::Semaphore::new(1));
    for _ in 0..plan.downloads.max(1) {
        let worker = Download {
            files: files_out.clone(),
            chunks: chunks_in.clone(),
            merge: merge_in.clone(),
            origin: origin.clone(),
            chunk_bytes: plan.chunk_bytes,
            max_line: plan.max_line,
            tries: plan.tries,
            max_file: plan.max_file,
            long_lines: long_lines.clone(),
            log: log.clone(),
            board: watch.board.clone(),
            stop: stop.clone(),
        };
        let span = span.clone();
        crew.spawn_cpu("download", move |handle| span.in_scope(|| worker.run(handle)));
    }
    let bad_lines: BadLineSink = Arc::new(state.quarantine(&run)?);
    let elements: Arc<[String]> = match &plan.source {
        SourcePlan::Server { options, .. } => options.elements.clone().into(),
        SourcePlan::Folder(_) => Arc::default(),
    };
    let ignored_codes: Arc<[String]> = plan.ignored_issue_codes.clone().into();
    for _ in 0..plan.parse_workers {
        let worker = Parse {
            chunks: chunks_out.clone(),
            rows: rows_in.clone(),
            merge: merge_in.clone(),
            bad_lines: bad_lines.clone(),
            max_line: plan.max_line,
            max_columns: memory.row,
            ignored_codes: ignored_codes.clone(),
            elements: elements.clone(),
            board: watch.board.clone(),
        };
        let span = span.clone();
        crew.spawn_cpu("parse", move |handle| span.in_scope(|| worker.run(handle)));
    }
    let requests = FlushRequests::default();
    let shared = Shared::new(layouts, requests.clone(), memory.row_group, memory.open_batches, plan.columns);
    for _ in 0..plan.encode_workers {
        let worker = Encode { rows: rows_out.clone(), merge: merge_in.clone(), shared: shared.clone() };
        let span = span.clone();
        crew.spawn_cpu("encode", move |handle| span.in_scope(|| worker.run(handle)));
    }
    // An edge closes when its last sender is gone: ours must not outlive the workers'.
    drop((files_out, chunks_in, chunks_out, rows_in, rows_out, merge_in, shared));
    let max_bad_lines = Some(plan.max_bad_lines);
    let absent = if options.replay_only { Absent::Stay } else { absent(plan) };
    let staging = StagingSettings {
        run: run.clone(),
        target_file_bytes: plan.target_file_bytes,
        footers: memory.footers,
        max_open_files: 64,
        keys_in_memory: memory.keys,
        scratch: state.path().to_path_buf(),
        layout: plan.layout.clone(),
        keep: taken_up.keep,
    };
    let mut ledger = Ledger::new(exports, max_bad_lines);
    if absent != Absent::Stay {
        ledger = ledger.wait_for_all();
    }
    for (name, error) in &prepared.unwritable {
        ledger.fail(name, error.to_string());
    }
    let merge = Merge {
        input: merge_out,
        staging: Staging::new(staging, prepared.tables.clone(), prepared.opened, taken_up.earlier),
        ledger: ledger.fail_short_files(plan.fail_short_files).ignore_errors(plan.ignore_export_errors),
        requests,
        settings: MergeSettings {
            pipeline: plan.name.clone(),
            run: run.clone(),
            app_id: prepared.app_id.clone(),
            tables_at_once: plan.tables_at_once,
            order: OrderRules {
                full_refresh: prepared.full_refresh,
                undated_is_older: matches!(plan.source, SourcePlan::Folder(_)) && !prepared.full_refresh,
            },
            absent,
            match_memory: memory.matching / plan.tables_at_once.max(1),
            scratch: state.path().to_path_buf(),
            layout: plan.layout.clone(),
            table: TableSettings { deletion_vectors: plan.deletion_vectors, upgrade: plan.upgrade_deletion_vectors },
            began,
        },
        mixed: Arc::new(move |resource_type| remember(&ExportNote::Mixed { resource_type })),
        board: watch.board.clone(),
        stop: stop.clone(),
    };
    let (report_in, report_out) = tokio::sync::oneshot::channel();
    crew.spawn("merge", async move { merge.run(report_in).await }.in_current_span());

    let ended = crew.join(waiting).await;
    let merged = report_out.await;
    if merged.is_ok() {
        // Merge has removed what it staged and did not commit, or written it down. Where it died, the next run does.
        journal.write(&JournalEntry::Ended { run: run.clone() })?;
    }
    let merged = merged.unwrap_or_default();
    report::log_exports(&log, merged.exports, &watch.board, began.elapsed());
    let of_server = match (merged.files_failed > 0, merged.files_gone) {
        (false, _) => OfServer::Nothing,
        (true, false) => OfServer::FilesFailed,
        (true, true) => OfServer::FilesGone,
    };
    // What is in a table now, or is there in a newer version, need not be kept any longer.
    state.remove_quarantined(&merged.replayed.iter().copied().collect())?;
    if absent != Absent::Stay {
        // Such a run took every resource there is, or failed: what earlier lines are about has come, or is gone.
        let whole = |name: &str| merged.types.get(name).is_some_and(|outcome| outcome.error.is_none());
        state.remove_quarantined_of(&run, whole)?;
    }
    if client.is_some() && !options.replay_only {
        let is_whole = |name: &str| {
            let of = merged.types.get(name);
            of.is_some_and(|of| of.answered_for && of.error.is_none() && of.watermark_hold.is_none())
        };
        in_flight::note_floors(&state, &prepared.app_id, &prepared.kickoffs, &merged.held, is_whole)?;
    }
    let mut report =
        report::draw_up(plan, run, (started, began.elapsed()), prepared.full, &watch.board, merged, ended.as_ref().err());
    // A stage that ends early on request ends well.
    report.stopped |= ended.is_ok() && stop.is_pulled() && !report.succeeded;
    report.passed_over = locked(&passed_over).iter().map(|(why, names)| ((*why).to_owned(), names.clone())).collect();
    report.server_messages = state.server_messages_place(&report.run);
    state.save_report(&report.run, &serde_json::to_value(&report).context(ErrorKind::Internal, "the report")?)?;
    ended?;
    if report.stopped {
        let done = report.types.values().filter(|outcome| outcome.committed).count();
        return Err(Error::new(
            ErrorKind::Interrupted,
            format!("stopped; {done} types were committed and are whole, the next run brings the others"),
        ));
    }
    if !report.is_merged() && !options.replay_only && client.is_some() {
        in_flight::failed(&state, &prepared.app_id, &prepared.kickoffs, started, of_server)?;
        if let Some(client) = &client {
            let what = (prepared.app_id.as_str(), &prepared.tables);
            in_flight::merged_in_part(&state, what, prepared.until, client, plan.delete_export).await?;
        }
    }
    if report.is_merged() {
        // A run whose watermarks did not all move completes nothing, but its export has no more to give.
        if report.succeeded && !options.part {
            remember_success(&state, &report, &prepared.app_id)?;
        }
        if let Some(client) = client.filter(|_| !options.replay_only) {
            in_flight::merged(&state, &prepared.app_id, &prepared.kickoffs, &client, plan.delete_export).await?;
        }
        journal.clear()?;
        if let Err(error) = maintain::after_run(plan, &state, stop).await {
            tracing::warn!(%error, "the run is done; the maintenance after it failed");
        }
    }
    // An export that was lost was asked for anew: nothing is behind it.
    Ok((report, prepared.behind && !lost.load(Ordering::Relaxed)))
}

fn absent(plan: &Plan) -> Absent {
    let most = plan.max_deleted;
    match plan.mode {
        Mode::Merge => Absent::Stay,
        Mode::Reconcile => Absent::Delete(most),
        Mode::Overwrite => Absent::Replace(most),
    }
}

fn remember_success(state: &StateFolder, report: &RunReport, app_id: &str) -> Result<()> {
    let mut remembered = state.remembered()?;
    remembered.last_completed = Some(Utc::now());
    if let Some(time) = report.transaction_time.as_deref().and_then(|time| DateTime::parse_from_rfc3339(time).ok()) {
        remembered.last_sync_time = Some(time.to_utc());
        remembered.scope = Some(app_id.to_owned());
        // Of a type that is not asked for any more nothing is known from here on: its table may be dropped, and made anew.
        let done = report.types.iter().filter(|(_, outcome)| outcome.answered_for);
        remembered.watermarks = done.map(|(name, _)| (name.clone(), time.to_utc())).collect();
    }
    state.remember(&remembered)
}
