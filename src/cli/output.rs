//! Output for people and scripts: results on stdout, progress and errors on stderr. The only place that prints.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::Arc;

use indicatif::{MultiProgress, ProgressDrawTarget};
use tracing_subscriber::fmt::MakeWriter;

use crate::config::environment;
use crate::error::{Advice, Context, Error, ErrorKind, Result};
use crate::telemetry::Telemetry;
use crate::topology::RunReport;

/// Destination of output.
#[derive(Debug, Clone)]
pub(super) struct Output {
    telemetry: Arc<Telemetry>,
    quiet: bool,
    json: bool,
    bars: MultiProgress,
    colour: bool,
}

/// Log lines go above the bars, not through them.
#[derive(Debug, Clone)]
pub(super) struct LogWriter(MultiProgress);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // Whoever read the log may have gone away (`2>&1 | head`): that is no reason to end a run.
        let _ = self.0.suspend(|| std::io::stderr().write_all(bytes));
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        let _ = std::io::stderr().flush();
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = LogWriter;
    fn make_writer(&'a self) -> LogWriter {
        self.clone()
    }
}

/// Returns true if colours may be used at all (<https://no-color.org>).
pub(super) fn colours() -> bool {
    environment("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Says something on stderr before there is a log.
pub(crate) fn warn(text: &str) {
    // Nobody can be told that stderr is gone.
    let _ = writeln!(std::io::stderr(), "warning: {text}");
}

impl Output {
    /// The same, and what sends telemetry.
    pub(crate) fn with_telemetry(self, telemetry: Telemetry) -> Self {
        Self { telemetry: Arc::new(telemetry), ..self }
    }

    /// Returns the senders of telemetry.
    pub(crate) fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// Results for a person, or with `json` one document for a program.
    pub(crate) fn new(quiet: bool, json: bool) -> Self {
        let quiet = quiet || json;
        let terminal = std::io::stderr().is_terminal();
        let target =
            if quiet || !terminal { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(10) };
        let colour = terminal && colours();
        Self { telemetry: Arc::default(), quiet, json, bars: MultiProgress::with_draw_target(target), colour }
    }

    /// Returns true if the result is one JSON document.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Returns true if progress is drawn as bars.
    pub(crate) fn shows_bars(&self) -> bool {
        !self.bars.is_hidden()
    }

    /// The bars.
    pub(crate) fn bars(&self) -> &MultiProgress {
        &self.bars
    }

    /// Returns the destination of logs.
    pub(crate) fn log_writer(&self) -> LogWriter {
        LogWriter(self.bars.clone())
    }

    /// A line of a result.
    pub(crate) fn line(&self, text: &str) -> Result<()> {
        self.raw(format!("{text}\n").as_bytes())
    }

    /// A result's bytes. A reader that has gone away (`| head`) is no error.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Result<()> {
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                Err(error).context(ErrorKind::Storage, "stdout cannot be written")
            }
            _ => Ok(()),
        }
    }

    /// A remark for a person; nothing where output is quiet.
    pub(crate) fn remark(&self, text: &str) {
        if !self.quiet {
            self.bars.suspend(|| {
                // Nobody can be told that stderr is gone.
                let _ = writeln!(std::io::stderr(), "{text}");
            });
        }
    }

    /// Says something to who watches a terminal; elsewhere it is a line of the log.
    pub(crate) fn tell(&self, text: &str) {
        if self.shows_bars() { self.remark(text) } else { tracing::info!("{text}") }
    }

    /// The error that ended the command.
    pub(crate) fn error(&self, error: &Error) {
        // A run of which some types failed has shown its report.
        if self.json && error.kind() != ErrorKind::Partial {
            let kind = format!("{:?}", error.kind()).to_lowercase();
            let said = serde_json::json!({ "succeeded": false, "error": {
                "kind": kind, "message": error.to_string(), "hint": error.advice(),
                "exit_code": error.kind().exit_code(),
            }});
            // Nobody can be told that stdout is gone; the exit code says it too.
            let _ = self.line(&said.to_string());
        }
        let (red, dim, off) = if self.colour { ("\x1b[1;31m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
        self.bars.suspend(|| {
            let mut stderr = std::io::stderr();
            let _ = writeln!(stderr, "{red}error{off}: {error}");
            // That a thing that is wrong is to be corrected is no advice.
            if error.hint().is_some() || error.kind() != ErrorKind::Config {
                let _ = writeln!(stderr, "{dim}hint{off}: {}", error.advice());
            }
        });
    }

    /// A tick or a cross before a line of a checklist.
    pub(crate) fn check(&self, passed: bool, text: &str) -> Result<()> {
        let colour = colours() && std::io::stdout().is_terminal();
        let (green, red, off) = if colour { ("\x1b[32m", "\x1b[31m", "\x1b[0m") } else { ("", "", "") };
        self.line(&if passed { format!("{green}✓{off} {text}") } else { format!("{red}✗{off} {text}") })
    }
}

/// Columns of text, the first to the left and the others to the right.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|text| text.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String]| {
        let cells = cells.iter().zip(&widths).enumerate().map(|(at, (cell, width))| {
            let pad = " ".repeat(width - cell.chars().count().min(*width));
            if at == 0 { format!("{cell}{pad}") } else { format!("{pad}{cell}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let header: Vec<String> = header.iter().map(|text| (*text).to_owned()).collect();
    let rule: Vec<String> = widths.iter().map(|width| "─".repeat(*width)).collect();
    let mut lines = vec![line(&header), line(&rule)];
    lines.extend(rows.iter().map(|row| line(row)));
    lines.join("\n")
}

/// Bytes as people say them.
pub(super) fn bytes(number: u64) -> String {
    match number {
        0..1_000 => format!("{number} B"),
        1_000..1_000_000 => format!("{:.1} kB", number as f64 / 1e3),
        _ => format!("{:.1} MB", number as f64 / 1e6),
    }
}

/// A run's report as a table.
pub(super) fn report(report: &RunReport) -> String {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let rate = |bytes: u64, seconds: f64| {
        if seconds > 0.0 { format!("{:.1}", megabytes(bytes) / seconds) } else { "-".into() }
    };
    let mut rows = Vec::new();
    let mut sums = [0u64; 8];
    for (name, outcome) in &report.types {
        let numbers = [
            outcome.files,
            outcome.resources,
            outcome.inserted,
            outcome.updated,
            outcome.deleted,
            outcome.skipped,
            outcome.quarantined,
            outcome.bytes,
        ];
        for (sum, number) in sums.iter_mut().zip(numbers) {
            *sum += number;
        }
        let mut row = vec![if outcome.error.is_some() { format!("{name} (failed)") } else { name.clone() }];
        row.extend(numbers[..7].iter().map(u64::to_string));
        row.extend([
            format!("{:.1}", megabytes(outcome.bytes)),
            rate(outcome.bytes, outcome.seconds),
            format!("{:.2}", outcome.seconds),
        ]);
        rows.push(row);
    }
    let mut total = vec!["total".to_owned()];
    total.extend(sums[..7].iter().map(u64::to_string));
    total.extend([
        format!("{:.1}", megabytes(sums[7])),
        rate(sums[7], report.seconds),
        format!("{:.2}", report.seconds),
    ]);
    rows.push(total);
    let header = [
        "type",
        "files",
        "resources",
        "inserted",
        "updated",
        "deleted",
        "skipped",
        "quarantined",
        "MB",
        "MB/s",
        "seconds",
    ];
    let mut text = table(&header, &rows);
    for note in problems_of(report).into_iter().chain(remarks_of(report)) {
        text.push('\n');
        text.push_str(&note);
    }
    text
}

/// The first `most` of some names, and how many more there are.
fn some<'a>(names: impl ExactSizeIterator<Item = &'a str>, most: usize) -> String {
    let more = names.len().saturating_sub(most);
    let shown: Vec<&str> = names.take(most).collect();
    format!("{}{}", shown.join(", "), if more > 0 { format!(" and {more} more") } else { String::new() })
}

/// Counts by name, `3 error not-found, 1 warning timeout`.
fn counted(counts: &BTreeMap<String, u64>) -> String {
    counts.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
}

/// Returns a line for each part that failed, was skipped, or is not complete.
fn problems_of(report: &RunReport) -> Vec<String> {
    let mut notes = Vec::new();
    for (name, error) in report.types.iter().filter_map(|(name, outcome)| Some((name, outcome.error.as_ref()?))) {
        notes.push(format!("{name} failed, its table is unchanged: {error}"));
    }
    for (name, outcome) in report.types.iter().filter(|(_, outcome)| outcome.undated > 0) {
        notes.push(format!(
            "{name}: {} resources without the meta.lastUpdated that the table's rows have were skipped, since a \
                folder does \
             not say that they are newer; --full-refresh merges them",
            outcome.undated
        ));
    }
    if !report.excluded.is_empty() {
        let excluded: Vec<String> = report.excluded.iter().map(|(name, lines)| format!("{name}: {lines}")).collect();
        notes.push(format!("lines of types that have no table: {}", excluded.join(", ")));
    }
    let unmapped =
        report.types.values().flat_map(|outcome| outcome.unmapped.iter().map(|(path, count)| (path, *count)));
    let mut unmapped: Vec<(&String, u64)> = unmapped.collect();
    unmapped.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    if !unmapped.is_empty() {
        let shown: Vec<String> = unmapped.iter().take(8).map(|(path, count)| format!("{path}: {count}")).collect();
        let more = if unmapped.len() > 8 {
            format!(", and {} more paths in the report", unmapped.len() - 8)
        } else {
            String::new()
        };
        notes.push(format!("values without a column: {}{more}", shown.join(", ")));
    }
    if report.count_findings.len() > SHOWN_FINDINGS {
        let more = report.count_findings.len() - SHOWN_FINDINGS;
        notes.push(format!("the manifest's count differs in {more} more files; see the report"));
    }
    for (file, promised, came) in report.count_findings.iter().take(SHOWN_FINDINGS) {
        notes.push(format!("{file}: the manifest has count {promised}, the file has {came} resources"));
    }
    let held =
        report.types.iter().filter_map(|(name, outcome)| Some((outcome.watermark_hold.as_ref()?, name.as_str())));
    let mut by_reason: BTreeMap<&String, Vec<&str>> = BTreeMap::new();
    held.for_each(|(why, name)| by_reason.entry(why).or_default().push(name));
    for (why, names) in by_reason {
        // A folder has no watermark.
        let what = if report.transaction_time.is_some() { "watermark not advanced for" } else { "not complete:" };
        notes.push(format!("{what} {}: {why}", names.join(", ")));
    }
    notes
}

/// Returns a line for each remark.
fn remarks_of(report: &RunReport) -> Vec<String> {
    let mut notes = Vec::new();
    if report.other_bad_lines > 0 {
        notes.push(format!("quarantined lines that belong to no table: {}", report.other_bad_lines));
    }
    if report.replayed > 0 {
        notes.push(format!("quarantined lines merged by this run: {}", report.replayed));
    }
    for (why, names) in &report.passed_over {
        notes.push(format!("skipped, {why}: {}", some(names.iter().map(String::as_str), 4)));
    }
    if let Some(place) = &report.server_messages {
        notes.push(format!("the server's messages about its export: {place}"));
    }
    for (name, outcome) in report.types.iter().filter(|(_, outcome)| !outcome.copies.is_empty()) {
        let copies: u64 = outcome.copies.values().sum();
        let files: Vec<&str> = outcome.copies.keys().map(String::as_str).collect();
        notes.push(format!(
            "{name}: {copies} of {} resources are duplicates within this export, in {}",
            outcome.resources,
            some(files.into_iter(), 4)
        ));
    }
    if !report.outcome_issues.is_empty() {
        notes.push(format!("issues in the server's OperationOutcomes: {}", counted(&report.outcome_issues)));
    }
    if !report.server_deviations.is_empty() {
        let met: Vec<String> =
            report.server_deviations.iter().map(|(what, count)| format!("{what} ({count})")).collect();
        notes.push(format!("spec deviations of the server: {}", met.join("; ")));
    }
    if !report.attachments.is_empty() {
        notes.push(format!("attachments: {}", counted(&report.attachments)));
    }
    notes
}

/// Files whose count is shown.
const SHOWN_FINDINGS: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_the_letters() {
        let text = table(&["type", "n"], &[vec!["Ä".into(), "10".into()], vec!["Patient".into(), "2".into()]]);
        assert_eq!(text, "type      n\n───────  ──\nÄ        10\nPatient   2");
    }
}
