//! Receivers of traces, metrics and logs: the standard `OTEL_*` variables, else the pipeline file.

use super::Command;
use crate::config::{environment, read_pipeline};
use crate::telemetry::{OtlpSettings, Signal};

/// Returns the telemetry of a command; `None` where nobody asks for it.
pub(super) fn settings(command: &Command) -> Option<OtlpSettings> {
    let (files, sets) = match command {
        Command::Run(args) => (std::slice::from_ref(&args.file.pipeline), args.file.sets.as_slice()),
        Command::Serve(args) => (args.pipelines.as_slice(), args.sets.as_slice()),
        Command::Sync(_) => ([].as_slice(), [].as_slice()),
        _ => return None,
    };
    let said = |name: &str| environment(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    if said("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return None;
    }
    // What is wrong with a file is said when it is read for the run. One process sends to one receiver: the first that
    // is named.
    let by_file = files.iter().find_map(|file| {
        let text = std::fs::read_to_string(file).ok()?;
        let read = read_pipeline(&text, sets).ok()?;
        read.file.telemetry.as_ref()?.otlp.resolve().ok()
    });
    let mut problems = Vec::new();
    let mut signal = |name: &str| {
        if said(&format!("OTEL_{name}_EXPORTER")).is_some_and(|exporter| exporter == "none") {
            return None;
        }
        let own = |what: &str| {
            said(&format!("OTEL_EXPORTER_OTLP_{name}_{what}")).or_else(|| said(&format!("OTEL_EXPORTER_OTLP_{what}")))
        };
        let by_environment = own("ENDPOINT");
        let endpoint = if by_environment.is_some() { None } else { Some(by_file.clone()?) };
        let port = |endpoint: &String| url::Url::parse(endpoint).ok().and_then(|url| url.port());
        let grpc = match own("PROTOCOL").as_deref() {
            Some("grpc") => true,
            Some("http/protobuf") => false,
            Some(other) => {
                problems.push(format!(
                    "OTEL_EXPORTER_OTLP_PROTOCOL: {other} is not spoken here, http/protobuf and grpc are; using \
                        http/protobuf"
                ));
                false
            }
            None => endpoint.as_ref().or(by_environment.as_ref()).and_then(port) == Some(4317),
        };
        Some(Signal { endpoint, grpc })
    };
    let (traces, metrics, logs) = (signal("TRACES"), signal("METRICS"), signal("LOGS"));
    if traces.is_none() && metrics.is_none() && logs.is_none() {
        return None;
    }
    problems.dedup();
    let names_service = said("OTEL_SERVICE_NAME").is_some()
        || said("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|attributes| attributes.contains("service.name="));
    Some(OtlpSettings { names_service, traces, metrics, logs, problems })
}
