//! What a person or a script sees: results on stdout, progress and errors on stderr. The only place that prints.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::Arc;

use indicatif::{MultiProgress, ProgressDrawTarget};
use tracing_subscriber::fmt::MakeWriter;

use crate::config::environment;
use crate::error::{Advice, Context, Error, ErrorKind, Result};
use crate::pipeline::RunReport;
use crate::telemetry::Telemetry;

/// Where output goes.
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

/// Whether colours may be used at all (<https://no-color.org>).
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

    /// What sends telemetry.
    pub(crate) fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// Results for a person, or with `json` one document for a program.
    pub(crate) fn new(quiet: bool, json: bool) -> Self {
        let quiet = quiet || json;
        let terminal = std::io::stderr().is_terminal();
        let target = if quiet || !terminal { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(10) };
        let colour = terminal && colours();
        Self { telemetry: Arc::default(), quiet, json, bars: MultiProgress::with_draw_target(target), colour }
    }

    /// Whether the result is one JSON document.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Whether progress is drawn as bars.
    pub(crate) fn shows_bars(&self) -> bool {
        !self.bars.is_hidden()
    }

    /// The bars.
    pub(crate) fn bars(&self) -> &MultiProgress {
        &self.bars
    }

    /// Where logs go.
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
                "kind": kind, "message": error.to_string(), "hint": error.advice(), "exit_code": error.kind().exit_code(),
            }});
            // Nobody can be told that stdout is gone; the exit code says it too.
            let _ = self.line(&said.to_string());
        }
        let (red, dim, off) = if self.colour { ("\x1b[1;31m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
        self.bars.suspend(|| {
            let mut stderr = std::io::stderr();
            let _ = writeln!(stderr, "{red}error{off}: {error}");
            let _ = writeln!(stderr, "{dim}hint{off}: {}", error.advice());
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
    let rate = |bytes: u64, seconds: f64| if seconds > 0.0 { format!("{:.1}", megabytes(bytes) / seconds) } else { "-".into() };
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
    total.extend([format!("{:.1}", megabytes(sums[7])), rate(sums[7], report.seconds), format!("{:.2}", report.seconds)]);
    rows.push(total);
    let header =
        ["type", "files", "resources", "inserted", "updated", "deleted", "skipped", "quarantined", "MB", "MB/s", "seconds"];
    let mut text = table(&header, &rows);
    for (name, outcome) in report.types.iter().filter_map(|(name, outcome)| Some((name, outcome.error.as_ref()?))) {
        text.push_str(&format!("\n{name} failed, its table is as it was: {outcome}"));
    }
    for (name, outcome) in report.types.iter().filter(|(_, outcome)| outcome.undated > 0) {
        text.push_str(&format!(
            "\n{name}: {} resources without the meta.lastUpdated that the table's rows have were skipped, since a folder does \
             not say that they are newer; --full-refresh merges them",
            outcome.undated
        ));
    }
    let excluded: Vec<String> = report.excluded.iter().map(|(name, lines)| format!("{name}: {lines}")).collect();
    if !excluded.is_empty() {
        text.push_str(&format!("\nlines of types that have no table: {}", excluded.join(", ")));
    }
    let mut lost: Vec<(&String, u64)> =
        report.types.values().flat_map(|outcome| outcome.not_held.iter().map(|(path, count)| (path, *count))).collect();
    lost.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    if !lost.is_empty() {
        let shown: Vec<String> = lost.iter().take(8).map(|(path, count)| format!("{path}: {count}")).collect();
        let more = if lost.len() > 8 { format!(", and {} more paths in the report", lost.len() - 8) } else { String::new() };
        text.push_str(&format!("\nvalues that the table's schema cannot hold: {}{more}", shown.join(", ")));
    }
    if report.count_findings.len() > SHOWN_FINDINGS {
        let more = report.count_findings.len() - SHOWN_FINDINGS;
        text.push_str(&format!(
            "\nthe manifest's count differs from what came in {more} more files than these; the report has all"
        ));
    }
    for (file, promised, came) in report.count_findings.iter().take(SHOWN_FINDINGS) {
        text.push_str(&format!("\n{file}: the manifest promised {promised} resources, {came} came"));
    }
    if report.other_bad_lines > 0 {
        text.push_str(&format!("\nquarantined lines that belong to no table: {}", report.other_bad_lines));
    }
    if report.replayed > 0 {
        text.push_str(&format!("\nlines out of quarantine that could be read now: {}", report.replayed));
    }
    let held = report.types.iter().filter_map(|(name, outcome)| Some((outcome.watermark_hold.as_ref()?, name.as_str())));
    let mut by_reason: BTreeMap<&String, Vec<&str>> = BTreeMap::new();
    held.for_each(|(why, name)| by_reason.entry(why).or_default().push(name));
    for (why, names) in by_reason {
        // A folder has no watermark.
        let what = match report.transaction_time {
            Some(_) => "watermark not advanced for",
            None => "not complete:",
        };
        text.push_str(&format!("\n{what} {}: {why}", names.join(", ")));
    }
    for (why, names) in &report.passed_over {
        let shown: Vec<&str> = names.iter().take(4).map(String::as_str).collect();
        let more = if names.len() > 4 { format!(" and {} more", names.len() - 4) } else { String::new() };
        text.push_str(&format!("\npassed over, {why}: {}{more}", shown.join(", ")));
    }
    if let Some(place) = &report.server_messages {
        text.push_str(&format!("\nthe server's messages about its export: {place}"));
    }
    for (name, outcome) in report.types.iter().filter(|(_, outcome)| !outcome.copies.is_empty()) {
        let copies: u64 = outcome.copies.values().sum();
        let files: Vec<&str> = outcome.copies.keys().take(4).map(String::as_str).collect();
        let more = if outcome.copies.len() > 4 { format!(" and {} more", outcome.copies.len() - 4) } else { String::new() };
        text.push_str(&format!(
            "\n{name}: {copies} of {} resources are copies of others of this export, in {}{more}",
            outcome.resources,
            files.join(", ")
        ));
    }
    if !report.outcome_issues.is_empty() {
        let issues: Vec<String> = report.outcome_issues.iter().map(|(severity, count)| format!("{count} {severity}")).collect();
        text.push_str(&format!("\nissues that the server reports of its export: {}", issues.join(", ")));
    }
    if !report.server_deviations.is_empty() {
        let met: Vec<String> = report.server_deviations.iter().map(|(what, count)| format!("{what} ({count})")).collect();
        text.push_str(&format!("\nspec deviations of the server: {}", met.join("; ")));
    }
    if !report.attachments.is_empty() {
        let counts: Vec<String> = report.attachments.iter().map(|(what, count)| format!("{count} {what}")).collect();
        text.push_str(&format!("\nattachments: {}", counts.join(", ")));
    }
    text
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
