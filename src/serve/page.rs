//! The status page: HTML of what [`ServerStatus`] says, with the diagram of a run. No script is needed to read it.

use chrono::{DateTime, Utc};
use maud::{DOCTYPE, Markup, html};

use super::health::Health;
use super::status::{EdgeStatus, PipelineStatus, RunStatus, RunningStatus, ServerStatus, StageStatus, TypeStatus};
use crate::topology::RunOutcome;

/// Errors that are shown.
const ERRORS: usize = 5;
/// Runs in the table below the plot.
const RUNS: usize = 10;

/// A number with thin spaces between thousands.
fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

fn bytes(value: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (value as f64, 0);
    while value >= 1000.0 && unit + 1 < units.len() {
        (value, unit) = (value / 1000.0, unit + 1);
    }
    if unit == 0 || value >= 100.0 {
        format!("{value:.0} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

fn span(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..120 => format!("{whole} s"),
        120..7200 => format!("{} min", whole / 60),
        7200..172_800 => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} days", whole / 86_400),
    }
}

fn time(time: DateTime<Utc>) -> Markup {
    html! { time datetime=(time.to_rfc3339()) { (time.format("%Y-%m-%d %H:%M:%S UTC")) } }
}

fn ago(then: DateTime<Utc>, now: DateTime<Utc>) -> Markup {
    let seconds = (now - then).as_seconds_f64();
    let words = if seconds >= 0.0 { format!("{} ago", span(seconds)) } else { format!("in {}", span(-seconds)) };
    html! { time datetime=(then.to_rfc3339()) title=(then.format("%Y-%m-%d %H:%M:%S UTC")) { (words) } }
}

/// Returns the whole page.
pub(super) fn page(status: &ServerStatus) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                title { "fhirlake" }
                meta name="viewport" content="width=device-width, initial-scale=1";
                link rel="stylesheet" href="/page.css";
                noscript { meta http-equiv="refresh" content="10"; }
                script src="/page.js" defer {}
            }
            body {
                header { h1 { "fhirlake" } span class="quiet" { "FHIR → Delta Lake" } }
                main {
                    @for (at, pipeline) in status.pipelines.iter().enumerate() {
                        (pipeline_section(at, pipeline, status.now))
                    }
                    footer {
                        "fhirlake " (status.version) ", up for " (span((status.now - status.started).as_seconds_f64()))
                        ", as of " (time(status.now)) ". "
                        a href="/status.json" { "status.json" } " · " a href="/metrics" { "metrics" } " · "
                        a href="/health" { "health" }
                    }
                }
            }
        }
    }
}

fn pipeline_section(at: usize, pipeline: &PipelineStatus, now: DateTime<Utc>) -> Markup {
    let (class, words) = match &pipeline.health {
        Health::Healthy { .. } => ("good", "healthy".to_owned()),
        Health::Unhealthy { last_sync: Some(_) } => ("bad", "unhealthy: the last success is too long ago".to_owned()),
        Health::Unhealthy { last_sync: None } => {
            let has_failed = pipeline.runs.iter().any(|run| run.outcome == RunOutcome::Failed);
            (if has_failed { "bad" } else { "wait" }, "no run has succeeded yet".to_owned())
        }
        Health::Error { message } => ("bad", format!("the state cannot be read: {message}")),
    };
    let id = format!("p{at}");
    html! {
        section class="pipeline" aria-labelledby=(id) data-running[pipeline.running.is_some()] {
            div class="title" { h2 id=(id) { (pipeline.name) } strong class=(class) { (words) } }
            dl { @for (name, value) in facts(pipeline, now) { div { dt { (name) } dd { (value) } } } }
            @if let Some(running) = &pipeline.running { (diagram(running)) }
            (tables(at, pipeline, now))
            (runs(at, &pipeline.runs, now))
            (errors(&pipeline.runs, now))
        }
    }
}

fn facts(pipeline: &PipelineStatus, now: DateTime<Utc>) -> Vec<(&'static str, Markup)> {
    let mut facts = Vec::new();
    if let Some(last) = pipeline.health.last_sync() {
        facts.push(("last success", ago(last, now)));
    }
    facts.push(match (&pipeline.running, pipeline.next_run) {
        (Some(running), _) => ("now", html! { (kind(running.full)) ", for " (span(running.seconds)) }),
        (None, Some(next)) => ("next run", html! { (ago(next, now)) " (" (kind(pipeline.next_is_full)) ")" }),
        (None, None) => ("next run", html! { "none is scheduled" }),
    });
    if let Some(retry) = pipeline.again {
        facts.push(("retry", ago(retry, now)));
    }
    if let Some(until) = pipeline.not_before {
        facts.push(("rate limited", html! { "until " (time(until)) }));
    }
    if pipeline.exports_in_flight > 0 {
        facts.push(("exports in flight", html! { (pipeline.exports_in_flight) }));
    }
    if pipeline.quarantined > 0 {
        facts.push(("quarantine", html! { span class="wait" { (number(pipeline.quarantined)) " lines" } }));
    }
    facts
}

fn kind(full: bool) -> &'static str {
    if full { "full run" } else { "incremental run" }
}

/// Returns a table that scrolls by itself where the window is narrow.
fn scrolled(id: Option<&str>, label: &str, head: &Markup, rows: &Markup) -> Markup {
    html! {
        div class="scroll" id=[id] tabindex="0" role="region" aria-label=(label) {
            table { thead { tr { (head) } } tbody { (rows) } }
        }
    }
}

/// Returns the stages of a run, and how full the edges between them are.
fn diagram(running: &RunningStatus) -> Markup {
    html! {
        h3 { "This run" }
        ol class="picture" aria-label="stages, and how full the edges between them are" {
            @for (at, stage) in running.stages.iter().enumerate() {
                @if let Some(before) = at.checked_sub(1).and_then(|before| running.stages.get(before)) {
                    @let name = format!("{}->{}", before.name, stage.name);
                    @for edge in running.edges.iter().filter(|edge| edge.name == name) { (edge_item(edge)) }
                }
                li class="stage" { b { (stage.name) } span { (rate(stage)) } span { (total(stage)) } }
            }
        }
        @if let Some(words) = &running.server { p class="quiet" { "The server says: " (words) } }
        @if running.retries > 0 {
            p class="wait" { (number(running.retries)) " requests were retried: the log says why." }
        }
        @if !running.types.is_empty() { (progress(&running.types)) }
    }
}

fn progress(types: &[TypeStatus]) -> Markup {
    let of = |done: u64, all: u64| if all > 0 { format!("{} of {}", number(done), number(all)) } else { number(done) };
    let head = html! {
        th { "type" } th { "progress" } th class="number" { "files" } th class="number" { "resources" }
        th class="number" { "staged" } th class="number" { "bad lines" }
    };
    let rows = html! {
        @for of_type in types {
            tr {
                th scope="row" { (of_type.name) }
                td class="wide" {
                    @if of_type.committed > 0 { span class="good" { "committed" } }
                    @else if let Some(share) = of_type.share() { (bar(share, "level")) (format!(" {:.0} %",
                        share * 100.0)) }
                    @else { "–" }
                }
                td class="number" { (of(of_type.files, of_type.files_expected)) }
                td class="number" { (of(of_type.resources, of_type.resources_expected)) }
                td class="number" { (number(of_type.staged)) }
                td class="number" { (number(of_type.bad)) }
            }
        }
    };
    scrolled(None, "progress by type", &head, &rows)
}

fn edge_item(edge: &EdgeStatus) -> Markup {
    let share = edge.fullness();
    html! {
        li class="edge" {
            (bar(share, if share >= 0.95 { "full" } else { "level" }))
            span { (number(edge.items)) " items · " (bytes(edge.bytes)) " of " (bytes(edge.max_bytes as u64)) }
        }
    }
}

fn bar(share: f64, class: &str) -> Markup {
    let percent = share * 100.0;
    html! {
        svg viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label=(format!("{percent:.0} percent")) {
            rect class="hold" width="100" height="8" rx="2" {}
            rect class=(class) width=(format!("{percent:.1}")) height="8" rx="2" {}
        }
    }
}

fn rate(stage: &StageStatus) -> String {
    match stage.unit {
        "" => String::new(),
        "bytes" => format!("{}/s", bytes(stage.rate as u64)),
        unit => format!("{} {unit}/s", number(stage.rate as u64)),
    }
}

fn total(stage: &StageStatus) -> String {
    match stage.unit {
        "" => String::new(),
        "bytes" => bytes(stage.total),
        unit => format!("{} {unit}", number(stage.total)),
    }
}

fn tables(at: usize, pipeline: &PipelineStatus, now: DateTime<Utc>) -> Markup {
    let head = html! {
        th { "table" } th class="number" { "rows" } th { "behind the server" } th { "last change" }
        th class="number" { "version" }
    };
    let rows = html! {
        @for table in &pipeline.tables {
            tr {
                th scope="row" { (table.name) }
                td class="number" { (table.rows.map_or("–".to_owned(), number)) }
                td { (table.lag_seconds.map_or("–".to_owned(), |lag| span(lag as f64))) }
                td { @if let Some(changed) = table.changed { (ago(changed, now)) } @else { "–" } }
                td class="number" { (number(table.version)) }
            }
        }
    };
    html! {
        h3 { "Tables" }
        @if let Some(error) = &pipeline.tables_error { p class="bad" { "The tables could not be read: " (error) } }
        @if pipeline.tables.is_empty() { p class="quiet" { "There are none yet." } }
        @else { (scrolled(Some(&format!("t{at}")), "tables", &head, &rows)) }
    }
}

/// Returns duration and rows of the runs that ended, the oldest first; and the newest as a table.
fn runs(at: usize, runs: &[RunStatus], now: DateTime<Utc>) -> Markup {
    if runs.is_empty() {
        return Markup::default();
    }
    let head = html! {
        th { "began" } th { "run" } th { "kind" } th class="number" { "took" } th class="number" { "rows changed" }
        th { "outcome" }
    };
    let rows = html! {
        @for run in runs.iter().take(RUNS) {
            tr {
                td { @if let Some(started) = run.started { (ago(started, now)) } }
                td { (run.run) }
                td { (kind(run.full)) }
                td class="number" { (span(run.seconds)) }
                td class="number" { (number(run.rows)) }
                td class=(if run.outcome == RunOutcome::Failed { "bad" } else { "good" }) { (run.outcome) }
            }
        }
    };
    html! {
        h3 { "Runs" }
        (plot(runs))
        details id=(format!("r{at}")) {
            summary { "The last " (runs.len().min(RUNS)) " runs as a table" }
            (scrolled(None, "runs", &head, &rows))
        }
    }
}

/// Returns two rows of bars: how long each run took, and how many rows it changed.
fn plot(runs: &[RunStatus]) -> Markup {
    let longest = runs.iter().map(|run| run.seconds).fold(0.001, f64::max);
    let most = runs.iter().map(|run| run.rows).max().unwrap_or_default().max(1);
    let (width, left, height) = (720.0, 4.0, 60.0);
    let step = (width - 2.0 * left) / runs.len().max(20) as f64;
    let wide = format!("{:.1}", (step - 2.0).clamp(1.0, 28.0));
    let baseline = |y: &str| html! { line x1="0" x2=(width) y1=(y) y2=(y) {} };
    let rect = |class: &str, x: f64, bottom: f64, tall: f64| {
        let (x, y, tall) = (format!("{x:.1}"), format!("{:.1}", bottom - tall), format!("{tall:.1}"));
        html! { rect class=(class) x=(x) y=(y) width=(wide) height=(tall) {} }
    };
    html! {
        p class="quiet caption" {
            "Above, how long each took, up to " (span(longest))
            "; below, the rows that it changed, up to " (number(most)) "."
        }
        svg class="plot" viewBox=(format!("0 0 {width} 136")) role="img"
            aria-label=(format!("duration and rows of the last {} runs", runs.len())) {
            (baseline("62.5")) (baseline("134.5"))
            @for (index, run) in runs.iter().rev().enumerate() {
                @let x = left + step * index as f64;
                @let class = if run.outcome == RunOutcome::Failed { "failed" } else { "ok" };
                g {
                    title {
                        @if let Some(started) = run.started { (started.format("%Y-%m-%d %H:%M:%S UTC")) }
                        ": " (run.outcome) ", " (span(run.seconds)) ", " (number(run.rows)) " rows"
                    }
                    (rect(class, x, 62.0, (run.seconds / longest * height).max(1.5)))
                    (rect("level", x, 134.0, run.rows as f64 / most as f64 * height))
                }
            }
        }
    }
}

fn errors(runs: &[RunStatus], now: DateTime<Utc>) -> Markup {
    let failed: Vec<&RunStatus> = runs.iter().filter(|run| !run.errors.is_empty()).take(ERRORS).collect();
    if failed.is_empty() {
        return Markup::default();
    }
    html! {
        h3 { "Last errors" }
        ul class="errors" {
            @for run in failed {
                li {
                    @if let Some(started) = run.started { (ago(started, now)) } ", run " (run.run)
                    @for error in &run.errors { br; (error) }
                    @if let Some(hint) = &run.hint { br; span class="quiet" { (hint) } }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_people_read_them() {
        assert_eq!(number(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!([bytes(999), bytes(1_500), bytes(123_456_789)], ["999 B", "1.5 kB", "123 MB"]);
        assert_eq!([span(3.21), span(75.0), span(600.0), span(10_000.0)], ["3.2 s", "75 s", "10 min", "2 h 46 min"]);
    }
}
