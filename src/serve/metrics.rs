//! Metrics of `/metrics` and of an OTLP receiver: Prometheus' text format, with OpenTelemetry's names and units as that
//! format writes them.

use std::fmt::Write;

use chrono::Utc;

use super::scheduler::PipelineScheduler;
use super::status::PipelineStatus;
use crate::telemetry::{self, Instrument, METRICS, Sample};
use flow::Counts;

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\n', "\\n").replace('"', "\\\"")
}

/// Samples as Prometheus reads them; a metric that has no value yet has no place.
pub(super) fn text(samples: &[Sample]) -> String {
    let mut text = String::new();
    for metric in METRICS {
        let name = metric.prometheus();
        let mut of = samples.iter().filter(|sample| sample.metric == metric.name).peekable();
        if of.peek().is_none() {
            continue;
        }
        let kind = match metric.instrument {
            Instrument::Counter => "counter",
            Instrument::Gauge => "gauge",
        };
        // Writing into a string does not fail.
        let _ = write!(text, "# HELP {name} {}\n# TYPE {name} {kind}\n", metric.what);
        for sample in of {
            let labels: Vec<String> =
                sample.labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let _ = writeln!(text, "{name}{labels} {}", sample.value);
        }
    }
    text
}

/// Returns a pipeline's metrics.
pub fn of_counts(pipeline: &str, counts: &Counts) -> Vec<Sample> {
    let sample = |((name, label), value): (&(&'static str, std::sync::Arc<str>), &u64)| {
        let metric = METRICS.iter().find(|metric| metric.name == *name)?;
        let own = metric.label.map(|of| (of, label.to_string()));
        let labels = [("pipeline", pipeline.to_owned())].into_iter().chain(own).collect();
        Some(Sample { metric: name, labels, value: *value as f64 })
    };
    counts.iter().filter_map(sample).collect()
}

/// Everything there is to say now.
pub(super) fn samples<'k>(schedulers: impl Iterator<Item = &'k PipelineScheduler>) -> Vec<Sample> {
    let plain = |metric, labels, value| Sample { metric, labels, value };
    let mut all = vec![plain(telemetry::BUILD, vec![("version", env!("CARGO_PKG_VERSION").to_owned())], 1.0)];
    all.extend(telemetry::memory("VmRSS").map(|bytes| plain(telemetry::MEMORY, Vec::new(), bytes as f64)));
    let now = Utc::now();
    for scheduler in schedulers {
        let status = PipelineStatus::of(scheduler, now);
        let live = scheduler.live();
        let mut counts = live.counts();
        // What has not happened yet is zero: from nothing to one is no growth to those who watch for it.
        let types = live
            .plan
            .types()
            .names()
            .iter()
            .map(String::as_str)
            .chain(status.tables.iter().map(|table| table.name.as_str()));
        for name in types.chain([telemetry::NO_TYPE]) {
            for metric in [telemetry::BYTES, telemetry::BAD_LINES, telemetry::PARSED] {
                counts.entry((metric, name.into())).or_default();
            }
        }
        counts.entry((telemetry::RETRIES, telemetry::NO_TYPE.into())).or_default();
        all.extend(of_counts(&status.name, &counts));
        let mut add = |metric: &'static str, labels: &[(&'static str, &str)], value: f64| {
            let own = labels.iter().map(|(name, value)| (*name, (*value).to_owned()));
            let labels = [("pipeline", status.name.clone())].into_iter().chain(own).collect();
            all.push(Sample { metric, labels, value });
        };
        add(telemetry::HEALTHY, &[], f64::from(u8::from(status.health.is_healthy())));
        add(telemetry::RUN_ACTIVE, &[], f64::from(u8::from(status.running.is_some())));
        add(telemetry::MISSED, &[], live.missed as f64);
        add(telemetry::QUARANTINED, &[], status.quarantined as f64);
        add(telemetry::EXPORTS, &[], status.exports_in_flight as f64);
        for (metric, time) in
            [(telemetry::LAST_SUCCESS, status.health.last_sync()), (telemetry::NEXT_RUN, status.next_run)]
        {
            if let Some(time) = time {
                add(metric, &[], time.timestamp() as f64);
            }
        }
        if let Some(run) = status.runs.first() {
            add(telemetry::LAST_DURATION, &[], run.seconds);
        }
        for outcome in ["succeeded", "failed", "interrupted", "locked"] {
            add(telemetry::RUNS, &[("outcome", outcome)], live.ended.get(outcome).copied().unwrap_or(0) as f64);
        }
        for ((resource_type, outcome), count) in &live.merged {
            add(telemetry::MERGED, &[("resource_type", resource_type), ("outcome", outcome)], *count as f64);
        }
        for table in &status.tables {
            let of = [("resource_type", table.name.as_str())];
            add(telemetry::TABLE_VERSION, &of, table.version as f64);
            if let Some(rows) = table.rows {
                add(telemetry::TABLE_ROWS, &of, rows as f64);
            }
            // Of a type that is not asked for any more the watermark stands still.
            let is_asked_for = live.plan.types().contains(&table.name);
            if let Some(lag) = table.lag_seconds.filter(|_| is_asked_for) {
                add(telemetry::TABLE_LAG, &of, lag as f64);
            }
        }
        for edge in status.running.iter().flat_map(|running| &running.edges) {
            let of = [("edge", edge.name.as_str())];
            add(telemetry::EDGE_ITEMS, &of, edge.items as f64);
            add(telemetry::EDGE_BYTES, &of, edge.bytes as f64);
            add(telemetry::EDGE_CAPACITY, &of, edge.max_bytes as f64);
        }
    }
    all
}
