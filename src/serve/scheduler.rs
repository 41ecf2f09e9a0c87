//! One pipeline: waits for what is due, runs it, and knows how it stands.

use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::time::Instant;

use super::health::Health;
use super::pending_runs::{PendingRun, Retry};
use crate::config::SchedulePlan;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::state::{ScheduleTimes, StateStore};
use crate::topology::{
    self, RunEvent, RunOptions, RunOutcome, RunPlan, RunReport, TableState, Topology, Watch, table_states,
};
use flow::{Cancellation, Counts, compute, random_fraction};

/// Reads a pipeline file, for each run again: secrets may have been replaced.
pub type PlanSource = Arc<dyn Fn() -> Result<RunPlan> + Send + Sync>;

/// The wall clock may be set, and a machine may sleep: it is looked at this often.
const LOOK: Duration = Duration::from_secs(5);
/// Interval at which a run's counters are sampled, and the time for which samples are kept, to tell rates.
const SAMPLE: Duration = Duration::from_secs(1);
const SAMPLES: usize = 6;
/// Age of the tables' state at which it is read again while nothing runs here: others write too.
const TABLES_AGE: Duration = Duration::from_secs(300);
/// A full run that failed is owed. It is made up for with the next run, and after so long where none is due before.
const PENDING_FULL: TimeDelta = TimeDelta::hours(1);

/// A pipeline that is kept.
pub struct PipelineScheduler {
    source: PlanSource,
    /// The pipeline file: it is looked at for changes while nothing runs.
    file: PathBuf,
    live: Mutex<Live>,
}

impl std::fmt::Debug for PipelineScheduler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PipelineScheduler").field("name", &self.name()).finish_non_exhaustive()
    }
}

/// Its state now.
pub(super) struct Live {
    pub plan: RunPlan,
    pub state: StateStore,
    /// The run that is under way.
    pub running: Option<Running>,
    /// Time of the next run, and true if it asks for everything.
    pub next: Option<(DateTime<Utc>, bool)>,
    /// A run that failed, and is made again.
    pub(super) retry: Option<Retry>,
    /// Of each schedule, the share of its jitter by which its run of that time begins later.
    jitter: HashMap<String, (DateTime<Utc>, f64)>,
    /// Counters of runs that ended.
    pub totals: Counts,
    /// Runs that ended, by `succeeded`, `failed`, `interrupted`, `locked`.
    pub ended: BTreeMap<&'static str, u64>,
    /// Resources by type and what came of them: `inserted`, `updated`, `deleted`, `skipped`.
    pub merged: BTreeMap<(String, &'static str), u64>,
    /// Time of the last try of a full refresh that is pending.
    pending_full: Option<DateTime<Utc>>,
    /// Length and time of the pipeline file when it was last read.
    file: Option<(u64, SystemTime)>,
    /// Schedules that were due while a run was under way, or nothing ran: those that were passed over.
    pub missed: u64,
    pub tables: Vec<TableState>,
    /// Why the tables could not be read.
    pub tables_error: Option<String>,
    tables_read: Option<Instant>,
    /// Newest first, as the state has them.
    pub reports: Vec<RunReport>,
    /// Lines in quarantine.
    pub quarantined: u64,
}

/// A run that is under way.
pub(super) struct Running {
    pub watch: Watch,
    pub began: DateTime<Utc>,
    pub full: bool,
    pub topology: Topology,
    pub samples: VecDeque<(Instant, Counts)>,
}

impl Live {
    /// Counters of all runs, the one that is under way among them.
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = self.totals.clone();
        let running = self.running.iter().flat_map(|running| running.watch.counters.read());
        running.for_each(|(key, value)| *counts.entry(key).or_default() += value);
        counts
    }
}

impl PipelineScheduler {
    /// Returns its health at `now`.
    pub(super) fn health(&self, now: DateTime<Utc>) -> Health {
        let max_age = self.live().plan.max_age;
        Health::of(&self.state(), max_age, now)
    }

    /// A keeper of the pipeline that `source` reads.
    pub fn new(file: PathBuf, source: PlanSource) -> Result<Self> {
        let stamp = stamp(&file);
        let plan = scheduled(source()?)?;
        let live = Live {
            state: state_of(&plan)?,
            plan,
            running: None,
            next: None,
            retry: None,
            jitter: HashMap::new(),
            totals: Counts::new(),
            ended: BTreeMap::new(),
            merged: BTreeMap::new(),
            pending_full: None,
            file: stamp,
            missed: 0,
            tables: Vec::new(),
            tables_error: None,
            tables_read: None,
            reports: Vec::new(),
            quarantined: 0,
        };
        Ok(Self { source, file, live: Mutex::new(live) })
    }

    /// The pipeline's name.
    pub fn name(&self) -> String {
        self.live().plan.name.clone()
    }

    pub(super) fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock()
    }

    pub(super) fn state(&self) -> StateStore {
        let live = self.live();
        live.state.clone()
    }

    /// Runs what is due until the stop is pulled. Whatever is waited for, the file is looked at, and what comes due
    /// meanwhile is made.
    pub(super) async fn serve(&self, stop: &Cancellation) -> Result<()> {
        while !stop.is_cancelled() {
            self.look_at_tables().await;
            self.look_at_file();
            let due = match self.due() {
                Ok(due) => due,
                // What is wrong with the disk now may not be soon, and the other pipelines go on meanwhile.
                Err(error) => {
                    tracing::error!(%error, pipeline = self.name(), "the schedule cannot be read; retrying");
                    let _ = stop.or(tokio::time::sleep(LOOK)).await;
                    continue;
                }
            };
            self.live().next = due.as_ref().map(|due| (due.time, due.full));
            let wait = due.as_ref().map_or(LOOK, |due| (due.time - Utc::now()).to_std().unwrap_or_default());
            match due {
                Some(due) if wait.is_zero() => {
                    if let Err(error) = self.run_due(due, stop).await {
                        tracing::error!(%error, pipeline = self.name(), "the time of the run cannot be persisted");
                        let _ = stop.or(tokio::time::sleep(LOOK)).await;
                    }
                }
                _ => {
                    let _ = stop.or(tokio::time::sleep(wait.min(LOOK))).await;
                }
            }
        }
        Ok(())
    }

    /// Returns the jitter by which a run of `schedule` begins after `time`: chosen once for each time.
    fn jitter_of(&self, schedule: &SchedulePlan, time: DateTime<Utc>) -> TimeDelta {
        let mut live = self.live();
        let (of, chosen) = live.jitter.entry(schedule.name.clone()).or_insert((time, random_fraction()));
        if *of != time {
            (*of, *chosen) = (time, random_fraction());
        }
        TimeDelta::from_std(schedule.jitter.mul_f64(*chosen)).unwrap_or_default()
    }

    /// Returns the next pending run; what was due since the last time, however often, is due once.
    fn due(&self) -> Result<Option<PendingRun>> {
        let now = Utc::now();
        // Whatever was persisted by a clock that was ahead is taken for now.
        let (schedules, pending_full, retry) = {
            let live = self.live();
            (
                live.plan.schedules.clone(),
                live.pending_full.map(|tried| tried.min(now)),
                live.retry.clone().map(|retry| retry.by(now)),
            )
        };
        let mut done: ScheduleTimes = self.state().read()?;
        // Before a schedule was known nothing of it was missed; from then on it is, whoever serves it.
        if schedules.iter().any(|schedule| !done.times.contains_key(&schedule.name)) {
            for schedule in &schedules {
                done.times.entry(schedule.name.clone()).or_insert(now);
            }
            self.state().write(&done)?;
        }
        let next_of_all = |time| schedules.iter().filter_map(|schedule| schedule.after(time)).min();
        let mut due: Option<PendingRun> = None;
        for schedule in schedules.iter().cloned() {
            let last = done.times.get(&schedule.name).copied().unwrap_or(now).min(now);
            // What is to be made again was made once; only a kill makes it due as if it had not been.
            let tried = retry.as_ref().filter(|retry| retry.due.has(&schedule)).map(|retry| retry.since);
            let Some(mut time) = schedule.after(tried.map_or(last, |tried| tried.max(last))) else { continue };
            if schedule.full_refresh
                && time <= now
                && let Some(tried) = pending_full
            {
                // It failed, and so often as it may be retried at once.
                time = next_of_all(tried).map_or(tried + PENDING_FULL, |next| next.min(tried + PENDING_FULL));
            }
            let time = time + self.jitter_of(&schedule, time);
            let next = PendingRun { time, full: schedule.full_refresh, schedules: vec![schedule], tried: 0 };
            due = Some(next.or(due, now));
        }
        Ok(match retry {
            Some(retry) => Some(retry.due.or(due, now)),
            None => due,
        })
    }

    async fn run_due(&self, due: PendingRun, stop: &Cancellation) -> Result<()> {
        let late = Utc::now() - due.time;
        if late > TimeDelta::from_std(LOOK * 2).unwrap_or_default() && !self.was_stopped_in(&due) {
            tracing::warn!(pipeline = self.name(), due = %due.time, "a scheduled run was missed; running it once now");
            self.live().missed += 1;
        }
        let started = Utc::now();
        let outcome = self.run_once(due.full, stop).await;
        if stop.is_cancelled() {
            // Not done: whoever starts next resumes it at once.
            return Ok(());
        }
        // Types that the server never gives must not make every run a full one.
        let succeeded = matches!(outcome, Ok(()) | Err(ErrorKind::Partial));
        let may_retry = matches!(&outcome, Err(kind) if kind.may_retry() && !matches!(kind,
            ErrorKind::Throttled | ErrorKind::Locked));
        let (retries, delay) = due.retries();
        let at = Utc::now() + delay;
        // What is due before it would be made again is made instead.
        let due_before = due.schedules.iter().filter_map(|schedule| schedule.after(Utc::now())).any(|next| next <= at);
        let again = may_retry && due.tried < retries && !due_before;
        let (made_again, covered) = self.settle_retry(&due, started, succeeded, again.then_some(at));
        // What comes due while a run is under way is made up for, once.
        let mut done: ScheduleTimes = self.state().read()?;
        let schedules = self.live().plan.schedules.clone();
        done.times.retain(|name, _| schedules.iter().any(|schedule| schedule.name == *name));
        let of_this = match (made_again, due.full && succeeded) {
            (true, _) => Vec::new(),
            // A run that took everything is what the others would have been; one that failed to is owed.
            (false, true) => schedules,
            (false, false) => due.schedules.clone(),
        };
        let answered = of_this.iter().chain(&covered).filter(|schedule| succeeded || !schedule.full_refresh);
        done.times.extend(answered.map(|schedule| (schedule.name.clone(), started)));
        if due.full && !made_again {
            self.live().pending_full = if succeeded { None } else { Some(Utc::now()) };
            if !succeeded {
                tracing::warn!(pipeline = self.name(), "the full refresh is pending: the next run makes it");
            }
        }
        self.state().write(&done)
    }

    /// Returns true if the last run was this one, and was stopped on request: it is resumed, and was not missed, nor
    /// was another since.
    fn was_stopped_in(&self, due: &PendingRun) -> bool {
        let live = self.live();
        let last = live.reports.first().filter(|report| report.outcome() == RunOutcome::Stopped);
        let began = last.map(|report| report.started);
        let is_latest =
            |began| due.schedules.iter().all(|schedule| schedule.after(began).is_none_or(|next| next > Utc::now()));
        began.is_some_and(|began| began >= due.time && is_latest(began))
    }

    /// Settles the run that waits for its retry, now that `due` was made: whether `due` is made again itself, at
    /// `again`, and schedules that need not wait any longer.
    fn settle_retry(
        &self,
        due: &PendingRun,
        since: DateTime<Utc>,
        succeeded: bool,
        again: Option<DateTime<Utc>>,
    ) -> (bool, Vec<SchedulePlan>) {
        let mut live = self.live();
        let mut covered = Vec::new();
        match live.retry.take() {
            Some(waiting) if !waiting.due.schedules.iter().any(|schedule| due.has(schedule)) => {
                let is_covered = match succeeded {
                    true => due.full || !waiting.due.full,
                    // What asks for everything is made again in its place.
                    false => again.is_some() && due.full && !waiting.due.full,
                };
                if !is_covered {
                    // When it is made it makes this one good too.
                    live.retry = Some(waiting);
                    return (false, covered);
                }
                covered = waiting.due.schedules;
            }
            // It was this one, or a part of it.
            _ => {}
        }
        let Some(time) = again else { return (false, covered) };
        let tried = due.tried + 1;
        tracing::warn!(pipeline = live.plan.name, try_number = tried, at = %time, "the run failed; it will be retried");
        live.retry = Some(Retry { since, due: PendingRun { time, tried, ..due.clone() } });
        (true, covered)
    }

    /// Reads the pipeline file where it changed. One that cannot be used is said, and what was read before stands.
    fn look_at_file(&self) {
        let now = stamp(&self.file);
        if self.live().file == now {
            return;
        }
        self.live().file = now;
        match self.read() {
            Ok((plan, state)) => {
                let mut live = self.live();
                (live.plan, live.state, live.tables_read) = (plan, state, None);
                let (known, retry) = (live.plan.schedules.clone(), live.retry.take());
                // What is no schedule any more is not made again.
                live.retry = retry
                    .filter(|retry| retry.due.schedules.iter().all(|of| known.iter().any(|own| own.name == of.name)));
                tracing::info!(pipeline = live.plan.name, "the pipeline file changed and was reloaded");
            }
            Err(error) => {
                tracing::error!(%error, pipeline = self.name(), "the pipeline file changed and cannot be used: its \
                    schedule stands as it was, and runs fail until it is corrected");
            }
        }
    }

    fn read(&self) -> Result<(RunPlan, StateStore)> {
        let (plan, name) = (scheduled((self.source)()?)?, self.name());
        if plan.name != name {
            let what = format!("the pipeline's name was {name} and is {} now", plan.name);
            return Err(Error::new(ErrorKind::Config, what).with_hint("restart `fhirlake serve`, or restore the name"));
        }
        let state = state_of(&plan)?;
        Ok((plan, state))
    }

    /// One run; `Err` says why it is no success.
    async fn run_once(&self, full: bool, stop: &Cancellation) -> std::result::Result<(), ErrorKind> {
        let (plan, state) = match self.read() {
            Ok(read) => read,
            Err(error) => {
                let (run, name) = (topology::run_id(), self.name());
                tracing::error!(%error, hint = error.advice(), pipeline = name, run, "the run failed: it could not \
                    begin");
                topology::report_failure(&self.state(), &name, &run, Utc::now(), &error);
                return self.ended(Err(error), stop).await;
            }
        };
        let watch = Watch::with_listener(|event| {
            if let RunEvent::Draining(names) = event {
                tracing::info!(waiting_for = names.join(", "), "stopping");
            }
        });
        let topology = plan.topology();
        {
            let mut live = self.live();
            (live.plan, live.state) = (plan.clone(), state);
            live.running =
                Some(Running { watch: watch.clone(), began: Utc::now(), full, topology, samples: VecDeque::new() });
        }
        let options = RunOptions { full_refresh: full, ..RunOptions::default() };
        // Its own stop: a run that fails pulls it, and the service goes on.
        let own = Cancellation::default();
        let run = topology::run(plan, options, &watch, &own);
        let mut run = std::pin::pin!(run);
        let mut tick = tokio::time::interval(SAMPLE);
        let outcome = loop {
            tokio::select! {
                outcome = &mut run => break outcome,
                () = stop.cancelled(), if !own.is_cancelled() => own.cancel(),
                _ = tick.tick() => self.sample(),
            }
        };
        self.ended(outcome, stop).await
    }

    fn sample(&self) {
        if let Some(running) = &mut self.live().running {
            let counts = running.watch.counters.read();
            running.samples.push_back((Instant::now(), counts));
            while running.samples.len() > SAMPLES {
                running.samples.pop_front();
            }
        }
    }

    async fn ended(&self, outcome: Result<RunReport>, stop: &Cancellation) -> std::result::Result<(), ErrorKind> {
        let kind = match &outcome {
            Ok(report) if report.succeeded => None,
            Ok(_) => Some(ErrorKind::Partial),
            Err(error) => Some(error.kind()),
        };
        {
            let mut live = self.live();
            live.totals = live.counts();
            live.running = None;
            let label = match kind {
                None => "succeeded",
                Some(ErrorKind::Interrupted) if stop.is_cancelled() => "interrupted",
                // Somebody else makes it.
                Some(ErrorKind::Locked) => "locked",
                Some(_) => "failed",
            };
            *live.ended.entry(label).or_default() += 1;
            if let Ok(report) = &outcome {
                for (name, kept) in &report.types {
                    let counts = [
                        ("inserted", kept.inserted),
                        ("updated", kept.updated),
                        ("deleted", kept.deleted),
                        ("skipped", kept.skipped),
                    ];
                    for (what, count) in counts {
                        *live.merged.entry((name.clone(), what)).or_default() += count;
                    }
                }
            }
            live.tables_read = None;
        }
        self.look_at_tables().await;
        // It goes through all of the heap: not on the reactor.
        let _ = compute(tracing::Span::current(), async { crate::heap::release() }).await;
        kind.map_or(Ok(()), Err)
    }

    /// Reads how tables and state stand, where that is old.
    async fn look_at_tables(&self) {
        let plan = {
            let live = self.live();
            if live.tables_read.is_some_and(|read| read.elapsed() < TABLES_AGE) {
                return;
            }
            live.plan.clone()
        };
        let state = self.state();
        let read = RunReport::newest(&state, REPORTS).and_then(|reports| Ok((reports, state.quarantined_lines()?)));
        let tables = table_states(&plan).await;
        let mut live = self.live();
        live.tables_read = Some(Instant::now());
        match read {
            Ok((reports, quarantined)) => (live.reports, live.quarantined) = (reports, quarantined),
            Err(error) => {
                tracing::warn!(%error, "reports and quarantine could not be read; those read before are shown")
            }
        }
        match tables {
            Ok(tables) => (live.tables, live.tables_error) = (tables, None),
            Err(error) => live.tables_error = Some(error.to_string()),
        }
    }
}

/// Reports that are shown.
const REPORTS: usize = 40;

/// The state of `plan`, with its folder: whoever asks at once finds a new pipeline that never ran, not a state that is
/// gone. Where it cannot be made that is told when something is due, and retried.
fn state_of(plan: &RunPlan) -> Result<StateStore> {
    let state = topology::state_of(plan)?;
    let _ = state.create();
    Ok(state)
}

/// A plan, or an error where it has no schedule: there would be nothing to do.
fn scheduled(plan: RunPlan) -> Result<RunPlan> {
    match plan.schedules.is_empty() {
        false => Ok(plan),
        true => Err(Error::new(ErrorKind::Config, format!("pipeline {} has no schedule", plan.name))
            .with_hint("add `schedule: [{ cron: \"15 * * * *\" }]`, or use `fhirlake run`")),
    }
}

fn stamp(file: &std::path::Path) -> Option<(u64, SystemTime)> {
    let metadata = std::fs::metadata(file).ok()?;
    Some((metadata.len(), metadata.modified().ok()?))
}
