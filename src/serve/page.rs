//! The status page: HTML of what [`ServerStatus`] says, with the picture of a run. No script is needed to read it.

use std::fmt::Write;

use chrono::{DateTime, Utc};

use super::health::Health;
use super::status::{EdgeStatus, PipelineStatus, RunStatus, RunningStatus, ServerStatus, StageStatus};
use crate::topology::RunOutcome;

/// Errors that are shown.
const ERRORS: usize = 5;
/// Runs in the table below the plot.
const RUNS: usize = 10;

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

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
    if unit == 0 || value >= 100.0 { format!("{value:.0} {}", units[unit]) } else { format!("{value:.1} {}", units[unit]) }
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

fn time(time: DateTime<Utc>) -> String {
    format!("<time datetime=\"{}\">{}</time>", time.to_rfc3339(), time.format("%Y-%m-%d %H:%M:%S UTC"))
}

fn ago(then: DateTime<Utc>, now: DateTime<Utc>) -> String {
    let seconds = (now - then).as_seconds_f64();
    let words = if seconds >= 0.0 { format!("{} ago", span(seconds)) } else { format!("in {}", span(-seconds)) };
    format!("<time datetime=\"{}\" title=\"{}\">{words}</time>", then.to_rfc3339(), then.format("%Y-%m-%d %H:%M:%S UTC"))
}

/// The whole page.
pub(super) fn html(status: &ServerStatus) -> String {
    let mut page = String::with_capacity(32 << 10);
    page.push_str(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>fhirlake</title>\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><link rel=\"stylesheet\" href=\"/page.css\">\
         <noscript><meta http-equiv=\"refresh\" content=\"10\"></noscript><script src=\"/page.js\" defer></script></head><body>\n",
    );
    page.push_str("<header><h1>fhirlake</h1><span class=\"quiet\">FHIR → Delta Lake</span></header>\n<main>\n");
    for (at, pipeline) in status.pipelines.iter().enumerate() {
        pipeline_section(&mut page, at, pipeline, status.now);
    }
    // Writing into a string does not fail.
    let _ = write!(
        page,
        "<footer>fhirlake {}, up for {}, as of {}. <a href=\"/status.json\">status.json</a> · <a href=\"/metrics\">metrics</a> · <a href=\"/health\">health</a></footer>\n</main></body></html>\n",
        status.version,
        span((status.now - status.started).as_seconds_f64()),
        time(status.now),
    );
    page
}

fn pipeline_section(page: &mut String, at: usize, pipeline: &PipelineStatus, now: DateTime<Utc>) {
    let (class, words) = match &pipeline.health {
        Health::Healthy { .. } => ("good", "healthy".to_owned()),
        Health::Unhealthy { last_sync: Some(_) } => ("bad", "unhealthy: the last success is too long ago".to_owned()),
        Health::Unhealthy { last_sync: None } => {
            let has_failed = pipeline.runs.iter().any(|run| run.outcome == RunOutcome::Failed);
            (if has_failed { "bad" } else { "wait" }, "no run has succeeded yet".to_owned())
        }
        Health::Error { message } => ("bad", format!("the state cannot be read: {message}")),
    };
    let name = escaped(&pipeline.name);
    let _ = write!(
        page,
        "<section class=\"pipeline\" aria-labelledby=\"p{at}\"{}><div class=\"title\"><h2 id=\"p{at}\">{name}</h2><strong class=\"{class}\">{}</strong></div>\n<dl>",
        if pipeline.running.is_some() { " data-running" } else { "" },
        escaped(&words),
    );
    let mut fact = |name: &str, value: String| {
        let _ = write!(page, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    };
    if let Some(last) = pipeline.health.last_sync() {
        fact("last success", ago(last, now));
    }
    match (&pipeline.running, pipeline.next_run) {
        (Some(running), _) => fact("now", format!("{}, for {}", kind(running.full), span(running.seconds))),
        (None, Some(next)) => fact("next run", format!("{} ({})", ago(next, now), kind(pipeline.next_is_full))),
        (None, None) => fact("next run", "none is scheduled".into()),
    }
    if let Some(again) = pipeline.again {
        fact("made again", ago(again, now));
    }
    if let Some(until) = pipeline.not_before {
        fact("server asks to wait", format!("until {}", time(until)));
    }
    if pipeline.exports_in_flight > 0 {
        fact("exports in flight", pipeline.exports_in_flight.to_string());
    }
    if pipeline.quarantined > 0 {
        fact("quarantine", format!("<span class=\"wait\">{} lines</span>", number(pipeline.quarantined)));
    }
    page.push_str("</dl>\n");
    if let Some(running) = &pipeline.running {
        picture(page, running);
    }
    tables(page, at, pipeline, now);
    runs(page, at, &pipeline.runs, now);
    errors(page, &pipeline.runs, now);
    page.push_str("</section>\n");
}

fn kind(full: bool) -> &'static str {
    if full { "full run" } else { "incremental run" }
}

/// The stages of a run, and how full the edges between them are.
fn picture(page: &mut String, running: &RunningStatus) {
    page.push_str("<h3>This run</h3>\n<ol class=\"picture\" aria-label=\"stages, and how full the edges between them are\">");
    for (at, stage) in running.stages.iter().enumerate() {
        if at > 0 {
            let name = format!("{}->{}", running.stages[at - 1].name, stage.name);
            for edge in running.edges.iter().filter(|edge| edge.name == name) {
                edge_item(page, edge);
            }
        }
        let _ = write!(
            page,
            "<li class=\"stage\"><b>{}</b><span>{}</span><span>{}</span></li>",
            stage.name,
            rate(stage),
            total(stage)
        );
    }
    page.push_str("</ol>\n");
    if let Some(words) = &running.server {
        let _ = writeln!(page, "<p class=\"quiet\">The server says: {}</p>", escaped(words));
    }
    if running.retries > 0 {
        let _ = writeln!(page, "<p class=\"wait\">{} requests were tried again: the log says why.</p>", number(running.retries));
    }
    if running.types.is_empty() {
        return;
    }
    page.push_str("<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"progress by type\"><table><thead><tr><th>type</th><th>progress</th><th class=\"number\">files</th><th class=\"number\">resources</th><th class=\"number\">staged</th><th class=\"number\">bad lines</th></tr></thead><tbody>");
    for of_type in &running.types {
        let share = of_type.share();
        let bar = match share {
            _ if of_type.committed > 0 => "<span class=\"good\">committed</span>".to_owned(),
            Some(share) => format!("{} {:.0} %", bar(share, "level"), share * 100.0),
            None => "–".to_owned(),
        };
        let of = |done: u64, all: u64| if all > 0 { format!("{} of {}", number(done), number(all)) } else { number(done) };
        let _ = write!(
            page,
            "<tr><th scope=\"row\">{}</th><td class=\"wide\">{bar}</td><td class=\"number\">{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td></tr>",
            escaped(&of_type.name),
            of(of_type.files, of_type.files_expected),
            of(of_type.resources, of_type.resources_expected),
            number(of_type.staged),
            number(of_type.bad),
        );
    }
    page.push_str("</tbody></table></div>\n");
}

fn edge_item(page: &mut String, edge: &EdgeStatus) {
    let share = edge.fullness();
    let class = if share >= 0.95 { "full" } else { "level" };
    let _ = write!(
        page,
        "<li class=\"edge\">{}<span>{} items · {} of {}</span></li>",
        bar(share, class),
        number(edge.items),
        bytes(edge.bytes),
        bytes(edge.max_bytes as u64),
    );
}

fn bar(share: f64, class: &str) -> String {
    let percent = share * 100.0;
    format!(
        "<svg viewBox=\"0 0 100 8\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{percent:.0} percent\"><rect class=\"hold\" width=\"100\" height=\"8\" rx=\"2\"/><rect class=\"{class}\" width=\"{percent:.1}\" height=\"8\" rx=\"2\"/></svg>"
    )
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

fn tables(page: &mut String, at: usize, pipeline: &PipelineStatus, now: DateTime<Utc>) {
    page.push_str("<h3>Tables</h3>\n");
    if let Some(error) = &pipeline.tables_error {
        let _ = writeln!(page, "<p class=\"bad\">The tables could not be read: {}</p>", escaped(error));
    }
    if pipeline.tables.is_empty() {
        page.push_str("<p class=\"quiet\">There are none yet.</p>\n");
        return;
    }
    let _ = write!(
        page,
        "<div class=\"scroll\" id=\"t{at}\" tabindex=\"0\" role=\"region\" aria-label=\"tables\"><table><thead><tr><th>table</th><th class=\"number\">rows</th><th>behind the server</th><th>last change</th><th class=\"number\">version</th></tr></thead><tbody>"
    );
    for table in &pipeline.tables {
        let lag = table.lag_seconds.map_or("–".to_owned(), |lag| span(lag as f64));
        let changed = table.changed.map_or("–".to_owned(), |changed| ago(changed, now));
        let rows = table.rows.map_or("–".to_owned(), number);
        let _ = write!(
            page,
            "<tr><th scope=\"row\">{}</th><td class=\"number\">{rows}</td><td>{lag}</td><td>{changed}</td><td class=\"number\">{}</td></tr>",
            escaped(&table.name),
            number(table.version),
        );
    }
    page.push_str("</tbody></table></div>\n");
}

/// Duration and rows of the runs that ended, the oldest first; and the newest as a table.
fn runs(page: &mut String, at: usize, runs: &[RunStatus], now: DateTime<Utc>) {
    if runs.is_empty() {
        return;
    }
    page.push_str("<h3>Runs</h3>\n");
    let longest = runs.iter().map(|run| run.seconds).fold(0.001, f64::max);
    let most = runs.iter().map(|run| run.rows).max().unwrap_or_default().max(1);
    let (width, left, height) = (720.0, 4.0, 60.0);
    let step = (width - 2.0 * left) / runs.len().max(20) as f64;
    let _ = write!(
        page,
        "<p class=\"quiet caption\">Above, how long each took, up to {}; below, the rows that it changed, up to {}.</p>\n\
         <svg class=\"plot\" viewBox=\"0 0 {width} 136\" role=\"img\" aria-label=\"duration and rows of the last {} runs\">\
         <line x1=\"0\" x2=\"{width}\" y1=\"62.5\" y2=\"62.5\"/><line x1=\"0\" x2=\"{width}\" y1=\"134.5\" y2=\"134.5\"/>",
        span(longest),
        number(most),
        runs.len(),
    );
    for (index, run) in runs.iter().rev().enumerate() {
        let x = left + step * index as f64;
        let class = if run.outcome == RunOutcome::Failed { "failed" } else { "ok" };
        let (tall, wide) = ((run.seconds / longest * height).max(1.5), (step - 2.0).clamp(1.0, 28.0));
        let rows = run.rows as f64 / most as f64 * height;
        let when = run.started.map_or_else(String::new, |started| started.format("%Y-%m-%d %H:%M:%S UTC").to_string());
        let words = run.outcome;
        let _ = write!(
            page,
            "<g><title>{when}: {words}, {}, {} rows</title><rect class=\"{class}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{wide:.1}\" height=\"{tall:.1}\"/><rect class=\"level\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{wide:.1}\" height=\"{rows:.1}\"/></g>",
            span(run.seconds),
            number(run.rows),
            62.0 - tall,
            134.0 - rows,
        );
    }
    page.push_str("</svg>\n");
    let _ = write!(
        page,
        "<details id=\"r{at}\"><summary>The last {} runs as a table</summary><div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"runs\"><table><thead><tr><th>began</th><th>run</th><th>kind</th><th class=\"number\">took</th><th class=\"number\">rows changed</th><th>outcome</th></tr></thead><tbody>",
        runs.len().min(RUNS)
    );
    for run in runs.iter().take(RUNS) {
        let words = run.outcome;
        let class = if words == RunOutcome::Failed { "bad" } else { "good" };
        let _ = write!(
            page,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td><td class=\"{class}\">{words}</td></tr>",
            run.started.map_or_else(String::new, |started| ago(started, now)),
            escaped(&run.run),
            kind(run.full),
            span(run.seconds),
            number(run.rows),
        );
    }
    page.push_str("</tbody></table></div></details>\n");
}

fn errors(page: &mut String, runs: &[RunStatus], now: DateTime<Utc>) {
    let failed: Vec<&RunStatus> = runs.iter().filter(|run| !run.errors.is_empty()).take(ERRORS).collect();
    if failed.is_empty() {
        return;
    }
    page.push_str("<h3>Last errors</h3>\n<ul class=\"errors\">");
    for run in failed {
        let when = run.started.map_or_else(String::new, |started| ago(started, now));
        let what: Vec<String> = run.errors.iter().map(|error| escaped(error)).collect();
        let hint =
            run.hint.as_deref().map_or_else(String::new, |hint| format!("<br><span class=\"quiet\">{}</span>", escaped(hint)));
        let _ = write!(page, "<li>{when}, run {}<br>{}{hint}</li>", escaped(&run.run), what.join("<br>"));
    }
    page.push_str("</ul>\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_people_read_them() {
        assert_eq!(number(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!([bytes(999), bytes(1_500), bytes(123_456_789)], ["999 B", "1.5 kB", "123 MB"]);
        assert_eq!([span(3.21), span(75.0), span(600.0), span(10_000.0)], ["3.2 s", "75 s", "10 min", "2 h 46 min"]);
        assert_eq!(escaped("<b a='\"'>&"), "&lt;b a=&#39;&quot;&#39;&gt;&amp;");
    }
}
