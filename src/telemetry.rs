//! Logs and the names of every metric. Text on a terminal, JSON elsewhere. Exporters join here later.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// Files whose last byte was read, by type.
pub const FILES: &str = "fhirlake.files";
/// Files that a manifest or folder lists, by type.
pub const FILES_EXPECTED: &str = "fhirlake.files.expected";
/// Resources that a manifest promises, by type.
pub const RESOURCES_EXPECTED: &str = "fhirlake.resources.expected";
/// Bytes of NDJSON read, uncompressed, by type.
pub const BYTES: &str = "fhirlake.ndjson.bytes";
/// Resources parsed, by type.
pub const PARSED: &str = "fhirlake.resources.parsed";
/// Resources staged in Parquet files, by type.
pub const STAGED: &str = "fhirlake.resources.staged";
/// Bad lines, by type.
pub const BAD_LINES: &str = "fhirlake.lines.bad";
/// Lines of types that have no table, by type.
pub const EXCLUDED: &str = "fhirlake.lines.excluded";
/// Requests that were tried again.
pub const RETRIES: &str = "fhirlake.http.retries";
/// Attachments, by what came of them: `files`, `inline`, `left` (links that are not to be followed), `failed`, and
/// `unlike`: of those that were fetched, whose size or hash is not what their resource says.
pub const ATTACHMENTS: &str = "fhirlake.attachments";
/// Issues in the export's error files, by severity and code.
pub const OUTCOME_ISSUES: &str = "fhirlake.export.outcome_issues";
/// Ways in which the server differs from what the Bulk Data guide asks, by what it is.
pub const DEVIATIONS: &str = "fhirlake.server.deviations";
/// Label of what belongs to no type.
pub const NO_TYPE: &str = "(none)";

/// How logs look.
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

/// Sends logs to `writer`. `filter` is in `tracing`'s directive syntax.
pub fn init<W>(format: LogFormat, filter: &str, writer: W)
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
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_span_events(FmtSpan::NONE)
        .log_internal_errors(false);
    // A second call in one process (tests) keeps the first subscriber.
    let _ = if json {
        builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init()
    } else {
        builder.with_ansi(terminal).with_target(false).try_init()
    };
}
