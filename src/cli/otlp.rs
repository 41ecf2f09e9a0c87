//! Where traces, metrics and logs are sent to: the standard `OTEL_*` variables, else the pipeline file.

use super::Command;
use crate::config::{environment, read_pipeline};
use crate::telemetry::OtlpSettings;

/// What a command sends, and where; `None` where nobody asks for it.
pub(super) fn settings(command: &Command) -> Option<OtlpSettings> {
    let (file, sets) = match command {
        Command::Run(args) => (Some(&args.pipeline), args.sets.as_slice()),
        Command::Serve(args) => (args.pipelines.first(), args.sets.as_slice()),
        Command::Sync(_) => (None, [].as_slice()),
        _ => return None,
    };
    let said = |name: &str| environment(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    if said("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return None;
    }
    let signals = ["", "_TRACES", "_METRICS", "_LOGS"];
    let by_environment = signals.iter().find_map(|signal| said(&format!("OTEL_EXPORTER_OTLP{signal}_ENDPOINT")));
    // What is wrong with the file is said when it is read for the run.
    let by_file = || {
        let text = std::fs::read_to_string(file?).ok()?;
        let read = read_pipeline(&text, sets).ok()?;
        read.file.telemetry.as_ref()?.otlp.resolve().ok()
    };
    let endpoint = if by_environment.is_some() { None } else { Some(by_file()?) };
    let port = |endpoint: &String| url::Url::parse(endpoint).ok().and_then(|url| url.port());
    let grpc = match said("OTEL_EXPORTER_OTLP_PROTOCOL") {
        Some(protocol) => protocol == "grpc",
        None => endpoint.as_ref().or(by_environment.as_ref()).and_then(port) == Some(4317),
    };
    let names_service = said("OTEL_SERVICE_NAME").is_some()
        || said("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|attributes| attributes.contains("service.name="));
    let sends = |signal: &str| said(&format!("OTEL_{signal}_EXPORTER")).is_none_or(|exporter| exporter != "none");
    Some(OtlpSettings { endpoint, grpc, names_service, traces: sends("TRACES"), metrics: sends("METRICS"), logs: sends("LOGS") })
}
