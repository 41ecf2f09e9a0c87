//! Logs, and the name of every metric. Text on a terminal, JSON elsewhere; to an OTLP receiver where one is named.

#[cfg(feature = "otlp")]
mod otlp;

use std::io::IsTerminal;
use std::sync::Arc;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

/// True if a metric only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instrument {
    /// It does, for as long as the process lives.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// A metric: OpenTelemetry's name, unit (UCUM) and label.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub instrument: Instrument,
    /// Its unit.
    pub unit: &'static str,
    /// Its label beside `pipeline`.
    pub label: Option<&'static str>,
    /// Its help text.
    pub what: &'static str,
}

impl Metric {
    /// The name that Prometheus knows it by: with its unit, and `_total` where it only grows.
    pub fn prometheus(&self) -> String {
        let name = self.name.replace('.', "_");
        let unit = match self.unit {
            "By" if !name.ends_with("bytes") => "_bytes",
            "s" => "_seconds",
            _ => "",
        };
        let total = if self.instrument == Instrument::Counter { "_total" } else { "" };
        format!("{name}{unit}{total}")
    }
}

macro_rules! metrics {
    ($($constant:ident, $name:expr, $instrument:ident, $unit:literal, $label:expr, $what:literal;)+) => {
        $(#[doc = $what]
        pub const $constant: &str = $name;)+
        /// Every metric there is.
        pub const METRICS: &[Metric] = &[
            $(Metric { name: $constant, instrument: Instrument::$instrument, unit: $unit, label: $label,
                what: $what },)+
        ];
    };
}

const TYPE: Option<&str> = Some("resource_type");

metrics! {
    BUILD, "fhirlake.build.info", Gauge, "{build}", Some("version"), "The version that runs.";
    MEMORY, "process.memory.usage", Gauge, "By", None, "Memory that the process holds.";
    HEALTHY, "fhirlake.pipeline.healthy", Gauge, "{pipeline}", None, "1 if the last success is recent enough, else 0.";
    LAST_SUCCESS, "fhirlake.run.last_success.timestamp", Gauge, "s", None, "Time at which the last successful run \
        completed, since 1970.";
    LAST_DURATION, "fhirlake.run.last.duration", Gauge, "s", None, "Duration of the newest run.";
    NEXT_RUN, "fhirlake.run.next.timestamp", Gauge, "s", None, "Time of the next run, since 1970.";
    RUN_ACTIVE, "fhirlake.run.active", Gauge, "{run}", None, "1 if a run is under way, else 0.";
    RUNS, "fhirlake.runs", Counter, "{run}", Some("outcome"), "Runs that ended: succeeded, failed, interrupted, \
        locked (another had the pipeline).";
    MISSED, "fhirlake.runs.missed", Counter, "{run}", None, "Scheduled runs that could not start in time; each got \
        one catch-up run.";
    MERGED, "fhirlake.resources.merged", Counter, "{resource}", Some("resource_type, outcome"), "Resources by what \
        came of them: inserted, updated, deleted, skipped.";
    TABLE_ROWS, "fhirlake.table.rows", Gauge, "{row}", TYPE, "Rows of a table.";
    TABLE_VERSION, "fhirlake.table.version", Gauge, "{version}", TYPE, "Version of a table.";
    TABLE_LAG, "fhirlake.table.lag", Gauge, "s", TYPE, "Lag of a table's watermark behind this machine's clock.";
    QUARANTINED, "fhirlake.quarantine.lines", Gauge, "{line}", None, "Lines in quarantine.";
    EXPORTS, "fhirlake.exports.in_flight", Gauge, "{export}", None, "Exports that the server works on or holds.";
    EDGE_ITEMS, "fhirlake.edge.items", Gauge, "{item}", Some("edge"), "Items on an edge between two stages, while a \
        run is under way.";
    EDGE_BYTES, "fhirlake.edge.usage", Gauge, "By", Some("edge"), "Bytes on an edge.";
    EDGE_CAPACITY, "fhirlake.edge.limit", Gauge, "By", Some("edge"), "Bytes that an edge holds at most.";
    FILES, "fhirlake.files", Counter, "{file}", TYPE, "Files whose last byte was read.";
    FILES_EXPECTED, "fhirlake.files.expected", Counter, "{file}", TYPE, "Files that a manifest or folder lists.";
    RESOURCES_EXPECTED, "fhirlake.resources.expected", Counter, "{resource}", TYPE, "Resources that a manifest \
        promises.";
    BYTES, "fhirlake.ndjson.bytes", Counter, "By", TYPE, "Bytes of NDJSON read, uncompressed.";
    PARSED, "fhirlake.resources.parsed", Counter, "{resource}", TYPE, "Resources parsed.";
    STAGED, "fhirlake.resources.staged", Counter, "{resource}", TYPE, "Resources staged in Parquet files.";
    UNCHANGED, "fhirlake.resources.unchanged", Counter, "{resource}", TYPE, "Resources that the table has already, of \
        the same line or version, and that were not encoded.";
    COMMITTED, "fhirlake.resources.committed", Counter, "{resource}", TYPE, "Resources of types that were committed.";
    BAD_LINES, "fhirlake.lines.bad", Counter, "{line}", TYPE, "Lines that could not be read.";
    EXCLUDED, "fhirlake.lines.excluded", Counter, "{line}", TYPE, "Lines of types that have no table.";
    RETRIES, bulk_data_client::metrics::RETRIES, Counter, "{request}", None, "Requests that were tried again.";
    ATTACHMENTS, "fhirlake.attachments", Counter, "{attachment}", Some("outcome"), "Attachments by what came of them: \
        files, inline, left (links that are not to be followed), failed; unlike: fetched, and not of the size or hash \
        that their resource says.";
    OUTCOME_ISSUES, "fhirlake.export.outcome_issues", Counter, "{issue}", Some("issue"), "Issues in the export's \
        error files, by severity and code.";
    DEVIATIONS, bulk_data_client::metrics::DEVIATIONS, Counter, "{deviation}", Some("deviation"), "Ways in which the \
        server differs from the Bulk Data IG.";
}

/// Label of what belongs to no type.
pub const NO_TYPE: &str = bulk_data_client::metrics::NO_LABEL;

/// A line of the process's own status in bytes, where the system tells: `VmRSS` is the memory that it holds, `VmHWM`
/// the most that it held.
pub fn memory(line: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let text = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':'))?;
    text.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Format of logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Receivers of traces, metrics and logs, and protocols. Read from the pipeline file and the standard `OTEL_*`
/// variables.
#[derive(Debug, Clone)]
pub struct OtlpSettings {
    /// True if the environment names the service.
    pub names_service: bool,
    /// Receiver of traces, if there is one.
    pub traces: Option<Signal>,
    /// Receiver of metrics.
    pub metrics: Option<Signal>,
    /// Receiver of logs.
    pub logs: Option<Signal>,
    /// Settings that cannot be met.
    pub problems: Vec<String>,
}

/// Receiver of one of traces, metrics and logs.
#[derive(Debug, Clone)]
pub struct Signal {
    /// The receiver; `None`: the SDK finds it in `OTEL_EXPORTER_OTLP_ENDPOINT`, or the signal's own.
    pub endpoint: Option<String>,
    /// gRPC, or HTTP with Protobuf.
    pub grpc: bool,
}

/// A metric's value at a moment.
#[derive(Debug, Clone)]
pub struct Sample {
    /// [`Metric::name`].
    pub metric: &'static str,
    /// Labels, by name.
    pub labels: Vec<(&'static str, String)>,
    /// The value.
    pub value: f64,
}

/// The telemetry that was set up: to be told what to send, and shut down at the end.
#[must_use]
#[derive(Default)]
pub struct Telemetry {
    #[cfg(feature = "otlp")]
    otlp: Option<otlp::Otlp>,
}

impl std::fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Telemetry").finish_non_exhaustive()
    }
}

impl Telemetry {
    /// Sends what `read` says, every so often, where metrics are sent at all.
    #[cfg_attr(not(feature = "otlp"), expect(unused_variables, reason = "nothing is sent"))]
    pub fn observe(&self, read: Arc<dyn Fn() -> Vec<Sample> + Send + Sync>) {
        #[cfg(feature = "otlp")]
        if let Some(otlp) = &self.otlp {
            otlp.observe(read);
        }
    }

    /// Sends what is left; what could not be sent is said in words.
    pub fn shut_down(&self) -> Vec<String> {
        #[cfg(feature = "otlp")]
        if let Some(otlp) = &self.otlp {
            return otlp.shut_down();
        }
        Vec::new()
    }
}

/// The current span as W3C's `traceparent`, where traces are sent.
pub fn traceparent() -> Option<String> {
    #[cfg(feature = "otlp")]
    return otlp::traceparent();
    #[cfg(not(feature = "otlp"))]
    None
}

/// The id of a span's trace, where traces are sent.
#[cfg_attr(not(feature = "otlp"), expect(unused_variables, reason = "nothing is sent"))]
pub fn trace_id(span: &tracing::Span) -> Option<String> {
    #[cfg(feature = "otlp")]
    return otlp::trace_id(span);
    #[cfg(not(feature = "otlp"))]
    None
}

/// Our own crates, as `tracing` names them.
pub const CRATES: [&str; 7] =
    ["fhirlake", "bulk_data_client", "bulk_data_server", "delta_upsert", "fhir_arrow", "flow", "foundation"];

/// Returns a log filter in which each directive of `fhirlake`, such as `fhirlake=debug`, stands for all of our crates.
pub fn filter_of_crates(filter: &str) -> String {
    let directives = filter.split(',').flat_map(|directive| match directive.trim().strip_prefix("fhirlake=") {
        Some(level) => CRATES.iter().map(|name| format!("{name}={level}")).collect(),
        None => vec![directive.to_owned()],
    });
    directives.collect::<Vec<_>>().join(",")
}

/// Sends logs to `writer`, and traces, metrics and logs to where `settings` say; what cannot be set up is said in
/// words. `colour` is for a terminal; `filter` is in `tracing`'s directive syntax, and is the writer's only.
pub fn init<W>(
    format: LogFormat,
    colour: bool,
    filter: &str,
    writer: W,
    settings: Option<&OtlpSettings>,
) -> (Telemetry, Vec<String>)
where
    W: for<'a> tracing_subscriber::fmt::MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let terminal = std::io::stderr().is_terminal();
    let json = match format {
        LogFormat::Auto => !terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).log_internal_errors(false);
    // Every line says of which run, file or commit it is: what stands around it.
    let layer = match json {
        true => {
            layer.json().flatten_event(true).with_current_span(false).with_span_list(true).with_filter(filter).boxed()
        }
        false => layer.with_ansi(terminal && colour).with_target(false).with_filter(filter).boxed(),
    };
    let (telemetry, problems, more) = set_up(settings);
    let mut layers: Vec<Box<dyn Layer<Registry> + Send + Sync>> = vec![layer];
    layers.extend(more);
    // A second call in one process (tests) keeps the first subscriber.
    let _ = tracing_subscriber::registry().with(layers).try_init();
    (telemetry, problems)
}

/// Senders, problems, and the layers that feed them.
type SetUp = (Telemetry, Vec<String>, Vec<Box<dyn Layer<Registry> + Send + Sync>>);

#[cfg(feature = "otlp")]
fn set_up(settings: Option<&OtlpSettings>) -> SetUp {
    let Some(settings) = settings else { return SetUp::default() };
    let (otlp, mut problems) = otlp::Otlp::new(settings);
    problems.extend(settings.problems.iter().cloned());
    let layers = otlp.layers();
    (Telemetry { otlp: Some(otlp) }, problems, layers)
}

#[cfg(not(feature = "otlp"))]
fn set_up(settings: Option<&OtlpSettings>) -> SetUp {
    let built_without = "this build cannot send to an OTLP receiver: it lacks the cargo feature `otlp`";
    (Telemetry::default(), settings.map(|_| built_without.to_owned()).into_iter().collect(), Vec::new())
}
