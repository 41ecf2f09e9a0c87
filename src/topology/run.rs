//! A run: export → download → parse → encode → merge.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use chrono::{DateTime, Utc};
use tracing::Instrument;

use super::connect::{client, own_folders, source_folder, state_of, tables_of};
use super::prepare::{self, Prepared, prepare};
use super::recovery::{clean_up, replay};
use super::report::{self, RunOutcome, RunReport};
use super::resume_point::{self, ResumePoint};
use super::watch::{RunEvent, Watch};
use super::{Ends, RunPlan, SourcePlan, maintenance, spawn_between};
use crate::config::{DeleteExport, ExportErrors};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::export_log::ExportLog;
use crate::jobs::checkpoint::CheckpointStore;
use crate::jobs::{self, ExportEventSink};
use crate::messages::{BadLineSink, ExportFile, FlushRequests, Layouts, LineIndexReport, MergeInput, instant_text};
use crate::stages::download::replay::Replayed;
use crate::stages::download::{Origin, ShortFile};
use crate::stages::export::ServerExport;
use crate::stages::export::folder::{FolderExport, PassedOver};
use crate::stages::merge::TypeOutcome;
use crate::stages::merge::ledger::Ledger;
use crate::stages::merge::{KEYS, MATCHING, Merge, MergeReport, MergeSettings, Mode, Staging, StagingSettings};
use crate::stages::parse::{KnownLines, KnownLinesSettings, LINE_INDEX};
use crate::stages::{RunContext, Stages};
use crate::state::{Journal, JournalEntry, Lease, StateFile, StateStore};
use crate::telemetry;
use crate::values::Types;
use bulk_data_client::{Client, Links};
use delta_upsert::{IndexMemory, NotMatchedBySource, OrderRules, TableSettings};
use flow::{Cancellation, Receiver, Sender, TaskGroup};

/// Options of a run on the command line.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunOptions {
    /// Export everything, and rewrite rows whose content differs.
    pub full_refresh: bool,
    /// Start a new export though one is in flight.
    pub new_export: bool,
    /// Request nothing from the source: only retry the lines in quarantine.
    pub replay_only: bool,
    /// This is a part of a run whose other types failed: it completes nothing.
    pub part: bool,
}

/// Runs a pipeline once. The report comes even when types failed; `Err` is for what ended the run itself. Where an
/// earlier run ended without all of its export, the run first merges the rest of that, and then starts an incremental
/// export.
pub async fn run(plan: RunPlan, options: RunOptions, watch: &Watch, stop: &Cancellation) -> Result<RunReport> {
    let report = run_passes(plan, options, watch, stop).await?;
    // One that failed as a whole has said so itself.
    report.log();
    Ok(report)
}

async fn run_passes(plan: RunPlan, options: RunOptions, watch: &Watch, stop: &Cancellation) -> Result<RunReport> {
    let (first, incomplete) = run_pass(plan.clone(), options, watch, stop).await?;
    if !incomplete || stop.is_cancelled() {
        return Ok(first);
    }
    let failed = |name: &String| first.types.get(name).is_some_and(|outcome| outcome.error.is_some());
    let rest: Vec<String> = plan.types().names().iter().filter(|name| !failed(name)).cloned().collect();
    let part = !first.succeeded;
    if part && rest.is_empty() {
        return Ok(first);
    }
    // The rest of the earlier export is merged, as the server was when it made that; types that fail again and again
    // must not keep the others from what changed since.
    tracing::info!("the rest of an earlier export is merged; starting the next incremental export");
    let state = state_of(&plan)?;
    let mut plan = plan;
    if part {
        plan.request.types = Types::Only(rest);
    }
    let second = run_pass(plan, RunOptions { part, ..options }, watch, stop).await;
    // A server with one slot has it taken as long as the first export is not whole: no news, and no failure of its own.
    let (second, _) = match second {
        Err(error) if part && error.kind() == ErrorKind::Throttled => return Ok(first),
        second => second?,
    };
    let report = first.merge(second);
    report.save(&state)?;
    Ok(report)
}

/// Target of the log's word that a run failed, for those who say it in their own way too.
pub const RUN_FAILED: &str = "fhirlake::run_failed";

/// Once through the pipeline, under an id of its own; a failure leaves a report too. Returns whether an earlier run's
/// export was resumed, so that what changed since is still to be asked for.
async fn run_pass(plan: RunPlan, options: RunOptions, watch: &Watch, stop: &Cancellation) -> Result<(RunReport, bool)> {
    let (name, id, started) = (plan.name.clone(), maintenance::run_id(), Utc::now());
    let span = tracing::info_span!("run", pipeline = %name, run = %id, trace_id = tracing::field::Empty);
    if let Some(id) = telemetry::trace_id(&span) {
        span.record("trace_id", id);
    }
    let state = state_of(&plan)?;
    let once = async {
        let mut run = Run::open(plan, options, watch.clone(), stop.clone(), id.clone()).await?;
        let ended = run.flow().await?;
        run.conclude(ended).await
    };
    let outcome = once.instrument(span.clone()).await;
    if let Err(error) = &outcome {
        let _of_the_run = span.enter();
        match error.kind() {
            ErrorKind::Interrupted => tracing::info!(%error, "the run was stopped"),
            _ => tracing::error!(target: RUN_FAILED, %error, hint = error.advice(), "the run failed"),
        }
        report::for_failure(&state, &name, &id, started, error);
    }
    outcome.map_err(|error| error.at(format!("pipeline {name}")))
}

/// A run whose pipeline is locked, and that knows what it asks for.
struct Run {
    id: String,
    began: Instant,
    started: DateTime<Utc>,
    options: RunOptions,
    watch: Watch,
    stop: Cancellation,
    state: StateStore,
    journal: Journal,
    client: Option<Client>,
    prepared: Prepared,
    resume: ResumePoint,
    /// Set where an export that was resumed has expired: the run asks for it again, so that nothing is left behind it.
    expired: Arc<AtomicBool>,
    passed_over: PassedOver,
    _lease: Lease,
}

/// The source of a run, which ends when all of its files are sent.
type Source = std::pin::Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// Outcome of a run's stages.
struct Ended {
    /// The first error, which ended them early.
    outcome: Result<()>,
    /// Merge's report; `None` where it ended early.
    merged: Option<MergeReport>,
    log: ExportLog,
    /// Time until all stages had ended.
    took: std::time::Duration,
}

impl Run {
    /// Locks the pipeline, recovers what earlier runs left, and decides what is asked for.
    async fn open(plan: RunPlan, options: RunOptions, watch: Watch, stop: Cancellation, id: String) -> Result<Self> {
        let (began, started) = (Instant::now(), Utc::now());
        let state = state_of(&plan)?;
        let lease = state.acquire_lease()?;
        let journal = state.journal();
        state.clear_scratch()?;
        let staged = CheckpointStore::of(&state).read()?;
        clean_up(&journal, &tables_of(&plan, &state)?, staged.as_ref()).await?;
        let client = if options.replay_only { None } else { client(&plan, &watch.counters, &stop)? };
        let mut plan = plan;
        if client.is_none() {
            // Whom attachments are downloaded from is not there.
            Arc::make_mut(&mut plan.stages).attachments = None;
        }
        let mut prepared = prepare(plan, options).await?;
        if let Some(client) = &client {
            let delete = prepared.plan.request.delete_export == DeleteExport::AfterCommit;
            jobs::settle(&state, &prepared.app_id, client, delete).await?;
            jobs::check_throttled(&state, &prepared.app_id, &mut prepared.kickoffs)?;
        }
        let resume = match client {
            Some(_) => resume_point::resume_point(&state, staged, &mut prepared).await?,
            None => ResumePoint::default(),
        };
        watch.on(RunEvent::Planned { full: prepared.full });
        match prepared.kickoffs.iter().filter_map(|kickoff| kickoff.request.since).min() {
            _ if options.replay_only => tracing::info!("retrying quarantined lines"),
            Some(since) => tracing::info!(since = %instant_text(since), "incremental sync"),
            None => tracing::info!("full sync"),
        }
        journal.write(JournalEntry::Began { run: id.clone(), types: prepared.plan.types().names().to_vec() })?;
        let (expired, passed_over) = (Arc::default(), PassedOver::default());
        Ok(Self {
            id,
            began,
            started,
            options,
            watch,
            stop,
            state,
            journal,
            client,
            prepared,
            resume,
            expired,
            passed_over,
            _lease: lease,
        })
    }

    /// Wires the stages, runs them, and waits for their end.
    async fn flow(&mut self) -> Result<Ended> {
        let (prepared, plan) = (&self.prepared, &self.prepared.plan);
        let topology = plan.topology();
        let Ends { files, files_out, mut edges, control, merge, merge_gauge } = Ends::of(&topology);
        let log = match plan.request.export_log && self.client.is_some() {
            true => ExportLog::of_run(self.state.export_log(&self.id)?, &self.id),
            false => ExportLog::default(),
        };
        // A run that deletes what the export does not name treats the export as complete.
        let replays = plan.stages.merge.mode == Mode::Merge || self.options.replay_only;
        let replayed: Option<Replayed> = if replays { replay(plan, &self.state)? } else { None };
        let first_index = replayed.as_ref().map_or(0, |replayed| replayed.files.len() as u32);
        let tasks = TaskGroup::new(self.stop.clone());
        let sink = jobs::sink(self.state.clone(), prepared.app_id.clone(), prepared.full_refresh, self.expired.clone());
        let (origin, exports, source) = self.source(files, &control, first_index, &log, &sink)?;
        let requests = FlushRequests::default();
        let bad_lines: BadLineSink = Arc::new(self.state.quarantine(&self.id)?);
        // A folder was not asked to cut resources down.
        let elements = match &plan.source {
            SourcePlan::Server { options, .. } => options.elements.clone(),
            SourcePlan::Folder(_) => Vec::new(),
        };
        let layouts = prepare::layouts(plan, &prepared.tables, &prepared.opened)?;
        let known = self.known_lines(layouts.clone());
        let mut context = RunContext {
            tasks,
            stages: plan.stages.clone(),
            memory: plan.memory.clone(),
            control,
            client: self.client.clone(),
            tables: prepared.tables.clone(),
            origin,
            replayed,
            layouts,
            requests: requests.clone(),
            bad_lines,
            elements: elements.into(),
            ignored_codes: plan.request.ignored_issue_codes.clone().into(),
            log: log.clone(),
            known: known.clone(),
            counters: self.watch.counters.clone(),
        };
        spawn_between(&mut context, &mut edges, files_out)?;
        let merge = self.merge_stage(merge, requests, exports, sink, known);
        let mut tasks = context.into_tasks();
        // Last: nothing is requested from the server where the rest of the run cannot be set up.
        if let Some(source) = source {
            tasks.spawn("export", source.in_current_span());
        }
        self.watch.on(RunEvent::Wired(edges.gauges.into_iter().chain([merge_gauge]).collect()));
        let (report_in, report_out) = tokio::sync::oneshot::channel();
        tasks.spawn("merge", async move { merge.run(report_in).await }.in_current_span());
        let outcome = tasks.join(|names| self.watch.on(RunEvent::Draining(names))).await;
        Ok(Ended { outcome, merged: report_out.await.ok(), log, took: self.began.elapsed() })
    }

    /// Returns where files are read from, how many exports there are, and the source that is still to be started.
    fn source(
        &self,
        files: Sender<Arc<ExportFile>>,
        control: &Sender<MergeInput>,
        first_index: u32,
        log: &ExportLog,
        sink: &ExportEventSink,
    ) -> Result<(Origin, usize, Option<Source>)> {
        let (prepared, plan) = (&self.prepared, &self.prepared.plan);
        match (&plan.source, self.client.clone()) {
            _ if self.options.replay_only => {
                Ok((Origin::Store(Arc::new(object_store::memory::InMemory::new())), 0, None))
            }
            (SourcePlan::Server { timeout, .. }, Some(client)) => {
                let (watch, links) = (self.watch.clone(), Links::default());
                let source = ServerExport {
                    client: client.clone(),
                    kickoffs: prepared.kickoffs.clone(),
                    rejected_lately: prepared.rejected_lately.clone(),
                    timeout: Some(*timeout),
                    until: prepared.until,
                    first_index: self.resume.first_index,
                    files,
                    merge: control.clone(),
                    remember: sink.clone(),
                    heard: Arc::new(move |text| watch.on(RunEvent::ServerStatus(text))),
                    links: links.clone(),
                    log: log.clone(),
                    counters: self.watch.counters.clone(),
                    stop: self.stop.clone(),
                };
                let exports = prepared.kickoffs.len();
                Ok((Origin::Server(Box::new(client), links), exports, Some(Box::pin(source.run()))))
            }
            (SourcePlan::Folder(url), _) => {
                let store = source_folder(url)?;
                let source = FolderExport {
                    store: store.clone(),
                    url: url.clone(),
                    types: plan.types().names().iter().map(|name| name.as_str().into()).collect(),
                    excluded: own_folders(url, &self.state, &prepared.tables),
                    passed_over: self.passed_over.clone(),
                    all_requested: plan.stages.merge.mode != Mode::Merge,
                    first_index,
                    files,
                    merge: control.clone(),
                    stop: self.stop.clone(),
                };
                Ok((Origin::Store(store), 1, Some(Box::pin(source.run()))))
            }
            _ => Err(Error::new(ErrorKind::Internal, "a server without a client")),
        }
    }

    /// Returns what happens to rows of the tables that the run does not bring.
    fn not_matched(&self) -> NotMatchedBySource {
        if self.options.replay_only { NotMatchedBySource::Keep } else { self.prepared.plan.stages.merge.not_matched() }
    }

    /// Returns what unchanged lines are known by; `None` where each is to be encoded and compared.
    fn known_lines(&self, layouts: Layouts) -> Option<Arc<KnownLines>> {
        let (prepared, plan) = (&self.prepared, &self.prepared.plan);
        if !plan.stages.parse.skip_unchanged {
            return None;
        }
        // A full refresh compares every row by its content, and an overwrite replaces every row.
        let overwrites = matches!(self.not_matched(), NotMatchedBySource::Overwrite(_));
        let looks_up = !prepared.full_refresh && !overwrites && !self.options.replay_only;
        let attached = plan.stages.attachments.as_ref().map(|section| &section.types);
        Some(Arc::new(KnownLines::new(KnownLinesSettings {
            layouts,
            tables: prepared.tables.clone(),
            opened: if looks_up { prepared.opened.clone() } else { HashMap::new() },
            // Attachments that are fetched are no part of a line: those of other types are links.
            encoder: format!("{attached:?}"),
            looks_up,
            is_full: prepared.full,
            memory: IndexMemory::new(plan.memory.share(&LINE_INDEX)),
            scratch: self.state.scratch(),
        })))
    }

    fn merge_stage(
        &mut self,
        input: Receiver<MergeInput>,
        requests: FlushRequests,
        exports: usize,
        sink: ExportEventSink,
        known: Option<Arc<KnownLines>>,
    ) -> Merge {
        // A table's snapshot and an earlier run's checkpoint may be large: nobody else needs them from here on.
        let (opened, earlier) = (std::mem::take(&mut self.prepared.opened), std::mem::take(&mut self.resume.earlier));
        let (prepared, plan) = (&self.prepared, &self.prepared.plan);
        let Stages { download, parse, merge: section, .. } = &*plan.stages;
        let (absent, layout) = (self.not_matched(), plan.layout());
        let scratch = self.state.scratch();
        let mut ledger = Ledger::new(exports, Some(parse.bad_lines()))
            .fail_short_files(download.on_short_file == ShortFile::Fail)
            .ignore_errors(plan.request.export_errors == ExportErrors::Ignore);
        if absent != NotMatchedBySource::Keep {
            ledger = ledger.wait_for_all();
        }
        for (name, error) in &prepared.unwritable {
            ledger.fail(name, error.to_string());
        }
        let staging = StagingSettings {
            run: self.id.clone(),
            target_file_bytes: section.target_file.0,
            // Of what the process has beside `memory`.
            footers: (plan.memory.total() / 8).min(64 << 20),
            max_open_files: 64,
            keys_in_memory: plan.memory.share(&KEYS),
            scratch: scratch.clone(),
            layout: layout.clone(),
            checkpoint: self.resume.checkpoint.clone(),
        };
        let is_folder = matches!(plan.source, SourcePlan::Folder(_));
        Merge {
            input,
            staging: Staging::new(staging, prepared.tables.clone(), opened, earlier),
            ledger,
            requests,
            settings: MergeSettings {
                pipeline: plan.name.clone(),
                run: self.id.clone(),
                app_id: prepared.app_id.clone(),
                tables_at_once: section.tables_at_once,
                order: OrderRules {
                    full_refresh: prepared.full_refresh,
                    undated_is_older: is_folder && !prepared.full_refresh,
                },
                absent,
                match_memory: plan.memory.share(&MATCHING) / section.tables_at_once.max(1),
                scratch,
                layout,
                table: TableSettings {
                    deletion_vectors: section.deletion_vectors,
                    upgrade: section.upgrade_deletion_vectors,
                },
                began: self.began,
            },
            events: sink,
            known: known.map(|known| known as Arc<dyn LineIndexReport>),
            counters: self.watch.counters.clone(),
            stop: self.stop.clone(),
        }
    }

    /// Persists what came of the run: quarantine, report, export jobs, maintenance.
    async fn conclude(self, ended: Ended) -> Result<(RunReport, bool)> {
        let (prepared, plan, state) = (&self.prepared, &self.prepared.plan, &self.state);
        if ended.merged.is_some() {
            // Merge has removed what it staged and did not commit, or persisted it. Where it died, the next run does.
            self.journal.write(JournalEntry::Ended { run: self.id.clone() })?;
        }
        let merged = ended.merged.unwrap_or_default();
        report::log_exports(&ended.log, merged.exports, &self.watch.counters, ended.took);
        let of_server = merged.of_server();
        self.settle_quarantine(&merged)?;
        if self.client.is_some() {
            let is_whole = |of: &TypeOutcome| of.answered_for && of.error.is_none() && of.watermark_hold.is_none();
            let whole = merged.types.iter().filter(|(_, of)| is_whole(of)).map(|(name, _)| &**name);
            let incomplete = merged.held.iter().map(|name| &**name);
            jobs::note_floors(state, &prepared.app_id, &prepared.kickoffs, incomplete, whole)?;
        }
        let mut report = RunReport::build(
            plan,
            self.id.clone(),
            (self.started, self.began.elapsed()),
            prepared.full,
            &self.watch.counters,
            merged,
            ended.outcome.as_ref().err(),
        );
        // A stage that ends early on request ends well.
        report.stopped |= ended.outcome.is_ok() && self.stop.is_cancelled() && !report.succeeded;
        report.passed_over =
            self.passed_over.lock().iter().map(|(why, names)| ((*why).to_owned(), names.clone())).collect();
        report.server_messages = state.server_messages_location(&report.run);
        report.save(state)?;
        ended.outcome?;
        if report.outcome() == RunOutcome::Stopped {
            let done = report.types.values().filter(|outcome| outcome.committed).count();
            let what = format!("stopped; {done} types are committed, the next run resumes the others");
            return Err(Error::new(ErrorKind::Interrupted, what));
        }
        let delete = plan.request.delete_export == DeleteExport::AfterCommit;
        if let (Some(client), false) = (&self.client, report.is_merged()) {
            jobs::failed(state, &prepared.app_id, &prepared.kickoffs, self.started, of_server)?;
            let what = (prepared.app_id.as_str(), &prepared.tables);
            jobs::merged_in_part(state, what, prepared.until, client, delete).await?;
        }
        if report.is_merged() {
            // A run whose watermarks did not all move completes nothing, but its export has no more to give.
            if report.succeeded && !self.options.part {
                record_success(state, &report, &prepared.app_id, plan.types().is_all())?;
            }
            if let Some(client) = &self.client {
                jobs::merged(state, &prepared.app_id, &prepared.kickoffs, client, delete).await?;
            }
            self.journal.clear()?;
            if let Err(error) = maintenance::after_run(plan, state, &self.stop).await {
                tracing::warn!(%error, "the run succeeded; maintenance after it failed");
            }
        }
        // Where the export had expired, the run has asked for everything since already.
        Ok((report, prepared.is_catch_up && !self.expired.load(Ordering::Relaxed)))
    }

    /// Removes lines from quarantine that a table has now, or has in a newer version.
    fn settle_quarantine(&self, merged: &MergeReport) -> Result<()> {
        self.state.remove_quarantined(&merged.replayed.iter().copied().collect())?;
        if self.not_matched() != NotMatchedBySource::Keep {
            // Such a run took every resource there is, or failed: what earlier lines are about has come, or is gone.
            let whole = |name: &str| merged.types.get(name).is_some_and(|outcome| outcome.error.is_none());
            self.state.remove_quarantined_of(&self.id, whole)?;
        }
        Ok(())
    }
}

fn record_success(state: &StateStore, report: &RunReport, app_id: &str, all_types: bool) -> Result<()> {
    let mut file = state.read::<StateFile>()?;
    file.last_completed = Some(Utc::now());
    if let Some(time) = report.transaction_time.as_deref().and_then(|time| DateTime::parse_from_rfc3339(time).ok()) {
        file.last_sync_time = Some(time.to_utc());
        (file.scope, file.all_types) = (Some(app_id.to_owned()), all_types);
        // Of a type that is not asked for any more nothing is known from here on: its table may be dropped, and made
        // again.
        let done = report.types.iter().filter(|(_, outcome)| outcome.answered_for);
        file.watermarks = done.map(|(name, _)| (name.clone(), time.to_utc())).collect();
    }
    state.write(&file)
}
