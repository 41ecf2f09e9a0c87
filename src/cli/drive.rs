//! Drives a run: signals, progress, report.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use super::output::{Output, report};
use crate::error::{Advice, Context, Error, ErrorKind, Result};
use crate::serve::of_counts;
use crate::telemetry::{self, Sample};
use crate::topology::{self, RunEvent, RunOptions, RunPlan, RunReport, Watch};
use flow::Cancellation;

/// Runs a plan to its end, with progress, and shows the report. A type that failed is an error.
pub(super) async fn drive(plan: RunPlan, options: RunOptions, output: &Output) -> Result<RunReport> {
    let remark = output.clone();
    let watch = Watch::with_listener(move |event| {
        if let RunEvent::Draining(names) = event {
            remark.remark(&format!("still waiting for: {}", names.join(", ")));
        }
    });
    let stop = Cancellation::default();
    let (counters, name) = (watch.counters.clone(), plan.name.clone());
    // A process of one run: what a scheduler's users watch is said at its end.
    let ended: Arc<Mutex<Vec<Sample>>> = Arc::default();
    let at_the_end = ended.clone();
    output.telemetry().observe(Arc::new(move || {
        let mut samples = of_counts(&name, &counters.read());
        samples.extend(at_the_end.lock().iter().cloned());
        samples
    }));
    let name = plan.name.clone();
    let began = std::time::Instant::now();
    let state = topology::state_of(&plan)?;
    let run = topology::run(plan, options, &watch, &stop);
    let mut progress = Progress::new(output);
    let mut run = std::pin::pin!(run);
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    let mut signals = Signals::new()?;
    let outcome = loop {
        tokio::select! {
            outcome = &mut run => break outcome,
            () = signals.next() => {
                let stopping = "stopping: draining the stages; press Ctrl-C again to stop at once";
                stop_or_exit(&stop, output, stopping, "stopped at once; the next run cleans up and resumes");
            }
            _ = tick.tick() => progress.show(&watch),
        }
    };
    progress.end();
    *ended.lock() = of_ended(&name, began.elapsed(), outcome.as_ref().is_ok_and(|report| report.succeeded));
    let outcome = outcome?;
    if output.is_json() {
        let report = serde_json::to_string(&outcome).context(ErrorKind::Internal, "the report")?;
        output.line(&report)?;
    }
    output.remark(&report(&outcome));
    if outcome.other_bad_lines > 0 || outcome.types.values().any(|kept| kept.quarantined > 0) {
        let place = state.quarantine_location(&outcome.run);
        output.remark(&format!("quarantined lines, each with its place and reason: {place}"));
    }
    output.remark(&format!("report: {}", state.report_location(&outcome.run)));
    if let Some(peak) = telemetry::memory("VmHWM") {
        output.remark(&format!("peak memory {:.0} MB", peak as f64 / 1e6));
    }
    if !outcome.succeeded {
        let failed: Vec<&str> =
            outcome.types.iter().filter(|(_, kept)| kept.error.is_some()).map(|(name, _)| name.as_str()).collect();
        if failed.is_empty() {
            let held =
                outcome.types.iter().filter(|(_, kept)| kept.watermark_hold.is_some()).map(|(name, _)| name.as_str());
            let held: Vec<&str> = held.collect();
            let names = if held.is_empty() { "the export".to_owned() } else { held.join(", ") };
            let why = format!("the export is incomplete; watermark not advanced for {names}");
            let mut reasons = outcome.types.values().filter_map(|kept| kept.watermark_hold.as_deref());
            let hint = match held.is_empty() || reasons.any(|why| why.starts_with("the server reports")) {
                true => {
                    "what came is merged, and the next run asks from the same time again; for errors that the server \
                        always \
                     reports: source.ignored_issue_codes, or source.export_errors: ignore"
                }
                false => {
                    "what came is merged, and the next run asks from the same time again; where the server always \
                        does so: \
                     source.export_errors: ignore"
                }
            };
            return Err(Error::new(ErrorKind::Partial, why).with_hint(hint));
        }
        return Err(Error::new(ErrorKind::Partial, format!("failed: {}", failed.join(", "))));
    }
    Ok(outcome)
}

/// The first signal stops what is under way, a second one the process.
pub(super) fn stop_or_exit(stop: &Cancellation, output: &Output, stopping: &str, at_once: &str) {
    if stop.is_cancelled() {
        output.remark(at_once);
        std::process::exit(i32::from(ErrorKind::Interrupted.exit_code()));
    }
    output.tell(stopping);
    stop.cancel();
}

/// Ctrl-C and SIGTERM.
pub(super) struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    pub(crate) fn new() -> Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let failed = "signal handlers cannot be installed";
            Ok(Self {
                terminate: signal(SignalKind::terminate()).context(ErrorKind::Internal, failed)?,
                interrupt: signal(SignalKind::interrupt()).context(ErrorKind::Internal, failed)?,
            })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    pub(crate) async fn next(&mut self) {
        #[cfg(unix)]
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        #[cfg(not(unix))]
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Returns the lines about a run that ended.
fn of_ended(pipeline: &str, took: Duration, succeeded: bool) -> Vec<Sample> {
    let of = |metric, own: Option<(&'static str, &str)>, value| Sample {
        metric,
        labels: [("pipeline", pipeline)].into_iter().chain(own).map(|(name, value)| (name, value.to_owned())).collect(),
        value,
    };
    let outcome = if succeeded { "succeeded" } else { "failed" };
    let mut samples = vec![
        of(telemetry::RUNS, Some(("outcome", outcome)), 1.0),
        of(telemetry::LAST_DURATION, None, took.as_secs_f64()),
    ];
    if succeeded {
        samples.push(of(telemetry::LAST_SUCCESS, None, chrono::Utc::now().timestamp() as f64));
    }
    samples
}

/// Bars a type on a terminal, a line every ten seconds elsewhere.
struct Progress {
    output: Output,
    bars: BTreeMap<String, ProgressBar>,
    server: Option<ProgressBar>,
    ticks: u64,
}

impl Progress {
    fn new(output: &Output) -> Self {
        Self { output: output.clone(), bars: BTreeMap::new(), server: None, ticks: 0 }
    }

    fn show(&mut self, watch: &Watch) {
        self.ticks += 1;
        let counts = watch.counters.read();
        let words = watch.server.lock().clone();
        if !self.output.shows_bars() {
            if self.ticks.is_multiple_of(50) {
                let sum = |metric: &str| {
                    counts.iter().filter(|((name, _), _)| *name == metric).map(|(_, value)| value).sum::<u64>()
                };
                tracing::info!(
                    files = sum(telemetry::FILES),
                    files_expected = sum(telemetry::FILES_EXPECTED),
                    parsed = sum(telemetry::PARSED),
                    staged = sum(telemetry::STAGED),
                    bytes = sum(telemetry::BYTES),
                    server = words.as_deref().unwrap_or(""),
                    "progress"
                );
            }
            return;
        }
        if counts.is_empty() {
            let bar = self.server.get_or_insert_with(|| {
                let style = ProgressStyle::with_template("{spinner} exporting: {msg}");
                self.output.bars().add(
                    ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner())),
                )
            });
            bar.set_message(words.unwrap_or_else(|| "waiting".into()));
            bar.tick();
            return;
        }
        if let Some(bar) = self.server.take() {
            bar.finish_and_clear();
        }
        for ((metric, label), _) in counts.iter().filter(|((name, _), _)| *name == telemetry::FILES_EXPECTED) {
            debug_assert_eq!(*metric, telemetry::FILES_EXPECTED);
            let value = |metric| counts.get(&(metric, label.clone())).copied().unwrap_or(0);
            let expected = value(telemetry::RESOURCES_EXPECTED);
            let bar = self.bars.entry(label.to_string()).or_insert_with(|| {
                let template = if expected > 0 {
                    "{prefix:24} {bar:24} {pos:>9}/{len:9} {rate:>10} {left:>9} {msg}"
                } else {
                    "{prefix:24} {spinner} {pos:>9} {rate:>10} {msg}"
                };
                let rate = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
                    // Writing to the bar's own text cannot fail.
                    let _ = write!(text, "{:.0}/s", state.per_sec());
                };
                let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
                let left = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
                    let _ = match (state.per_sec() > 0.0, state.eta().as_secs()) {
                        (false, _) => Ok(()),
                        (true, seconds @ 0..60) => write!(text, "{seconds} s left"),
                        (true, seconds @ 60..3600) => write!(text, "{} m left", seconds.div_ceil(60)),
                        (true, seconds) => write!(text, "{:.1} h left", seconds as f64 / 3600.0),
                    };
                };
                let style = style.with_key("rate", rate).with_key("left", left);
                let bar =
                    ProgressBar::new(expected).with_style(style.progress_chars("━╸─")).with_prefix(label.to_string());
                self.output.bars().add(bar)
            });
            bar.set_length(expected.max(value(telemetry::PARSED)));
            bar.set_position(value(telemetry::PARSED));
            bar.set_message(format!("{}/{} files", value(telemetry::FILES), value(telemetry::FILES_EXPECTED)));
        }
    }

    fn end(&mut self) {
        for bar in self.bars.values() {
            bar.finish_and_clear();
        }
        if let Some(bar) = self.server.take() {
            bar.finish_and_clear();
        }
    }
}
