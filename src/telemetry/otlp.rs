//! Traces, metrics and logs to an OTLP receiver. The standard `OTEL_*` variables are the SDK's own to read; the
//! pipeline file's endpoint is for whoever has none.

use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

use opentelemetry::metrics::MeterProvider as _;
use opentelemetry::trace::{TraceContextExt, TracerProvider as _};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::{LogExporter, MetricExporter, Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing_opentelemetry::{OpenTelemetryLayer, OpenTelemetrySpanExt};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::registry::LookupSpan;

use super::{Instrument, METRICS, OtlpSettings, Sample};

/// Counters and the time at which they were read.
type Reading = (Instant, Arc<Vec<Sample>>);

/// A reading is good for so long: every instrument asks for it.
const FRESH: Duration = Duration::from_millis(500);

/// Senders, until they are shut down.
pub(super) struct Otlp {
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
    logs: Option<SdkLoggerProvider>,
}

/// One exporter, by gRPC or HTTP, to the endpoint of a signal.
macro_rules! exporter {
    ($exporter:ident, $signal:expr, $path:literal) => {{
        match ($signal.grpc, &$signal.endpoint) {
            (true, Some(endpoint)) => $exporter::builder().with_tonic().with_endpoint(endpoint).build(),
            (true, None) => $exporter::builder().with_tonic().build(),
            (false, Some(endpoint)) => {
                let endpoint = format!("{}/v1/{}", endpoint.trim_end_matches('/'), $path);
                $exporter::builder().with_http().with_protocol(Protocol::HttpBinary).with_endpoint(endpoint).build()
            }
            (false, None) => $exporter::builder().with_http().with_protocol(Protocol::HttpBinary).build(),
        }
    }};
}

impl Otlp {
    /// Sets up what the settings ask for; what cannot be is said by the second value.
    pub(crate) fn new(settings: &OtlpSettings) -> (Self, Vec<String>) {
        // The SDK reads OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME itself.
        let mut resource =
            Resource::builder().with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        if !settings.names_service {
            resource = resource.with_service_name("fhirlake");
        }
        let resource = resource.build();
        let mut problems = Vec::new();
        let mut failed = |signal: &str, error: String| problems.push(format!("{signal} cannot be sent: {error}"));
        let mut otlp = Self { traces: None, metrics: None, logs: None };
        if let Some(signal) = &settings.traces {
            match exporter!(SpanExporter, signal, "traces") {
                Ok(exporter) => {
                    let provider =
                        SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.clone());
                    otlp.traces = Some(provider.build());
                }
                Err(error) => failed("traces", error.to_string()),
            }
        }
        if let Some(signal) = &settings.metrics {
            match exporter!(MetricExporter, signal, "metrics") {
                Ok(exporter) => {
                    let reader = PeriodicReader::builder(exporter).build();
                    otlp.metrics =
                        Some(SdkMeterProvider::builder().with_reader(reader).with_resource(resource.clone()).build());
                }
                Err(error) => failed("metrics", error.to_string()),
            }
        }
        if let Some(signal) = &settings.logs {
            match exporter!(LogExporter, signal, "logs") {
                Ok(exporter) => {
                    otlp.logs = Some(
                        SdkLoggerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build(),
                    );
                }
                Err(error) => failed("logs", error.to_string()),
            }
        }
        (otlp, problems)
    }

    /// The layers of the log that send: spans, and what is logged. Only our own: a sender that logs would send for
    /// ever.
    pub(crate) fn layers<S>(&self) -> Vec<Box<dyn Layer<S> + Send + Sync>>
    where
        S: tracing::Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        let ours = || Targets::new().with_targets(super::CRATES.map(|name| (name, tracing::Level::INFO)));
        let mut layers: Vec<Box<dyn Layer<S> + Send + Sync>> = Vec::new();
        if let Some(provider) = &self.traces {
            let tracer: SdkTracer = provider.tracer_with_scope(InstrumentationScope::builder("fhirlake").build());
            let layer: OpenTelemetryLayer<S, SdkTracer> = tracing_opentelemetry::layer()
                .with_tracer(tracer)
                .with_location(false)
                .with_threads(false)
                .with_tracked_inactivity(false);
            layers.push(layer.with_filter(ours()).boxed());
        }
        if let Some(provider) = &self.logs {
            layers.push(OpenTelemetryTracingBridge::new(provider).with_filter(ours()).boxed());
        }
        layers
    }

    /// Sends what `read` says, every so often.
    pub(crate) fn observe(&self, read: Arc<dyn Fn() -> Vec<Sample> + Send + Sync>) {
        let Some(provider) = &self.metrics else { return };
        let meter = provider.meter_with_scope(InstrumentationScope::builder("fhirlake").build());
        let last: Arc<Mutex<Option<Reading>>> = Arc::default();
        let now = move || {
            let mut last = last.lock();
            match &*last {
                Some((at, samples)) if at.elapsed() < FRESH => samples.clone(),
                _ => {
                    let samples = Arc::new(read());
                    *last = Some((Instant::now(), samples.clone()));
                    samples
                }
            }
        };
        for metric in METRICS {
            let (now, name) = (now.clone(), metric.name);
            let labels = |sample: &Sample| -> Vec<KeyValue> {
                sample.labels.iter().map(|(name, value)| KeyValue::new(*name, value.clone())).collect()
            };
            // The SDK keeps the callbacks; the instruments themselves need not be held.
            match metric.instrument {
                Instrument::Counter => drop(
                    meter
                        .u64_observable_counter(name)
                        .with_unit(metric.unit)
                        .with_description(metric.what)
                        .with_callback(move |observer| {
                            for sample in now().iter().filter(|sample| sample.metric == name) {
                                observer.observe(sample.value as u64, &labels(sample));
                            }
                        })
                        .build(),
                ),
                Instrument::Gauge => drop(
                    meter
                        .f64_observable_gauge(name)
                        .with_unit(metric.unit)
                        .with_description(metric.what)
                        .with_callback(move |observer| {
                            for sample in now().iter().filter(|sample| sample.metric == name) {
                                observer.observe(sample.value, &labels(sample));
                            }
                        })
                        .build(),
                ),
            }
        }
    }

    /// Sends what is left; what could not be is said.
    pub(crate) fn shut_down(&self) -> Vec<String> {
        let traces = self.traces.as_ref().map(SdkTracerProvider::shutdown);
        let metrics = self.metrics.as_ref().map(SdkMeterProvider::shutdown);
        let logs = self.logs.as_ref().map(SdkLoggerProvider::shutdown);
        let outcomes = [("traces", traces), ("metrics", metrics), ("logs", logs)];
        let failed = outcomes.into_iter().filter_map(|(signal, outcome)| Some((signal, outcome?.err()?)));
        failed
            .map(|(signal, error)| {
                format!("telemetry: not all {signal} could be sent, is the receiver there? ({error})")
            })
            .collect()
    }
}

/// The current span as W3C's `traceparent`, where there is one that is sent.
pub(super) fn traceparent() -> Option<String> {
    let context = tracing::Span::current().context();
    let span = context.span().span_context().clone();
    span.is_valid().then(|| format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8()))
}

/// The id of the current span's trace.
pub(super) fn trace_id(span: &tracing::Span) -> Option<String> {
    let context = span.context();
    let span = context.span().span_context().clone();
    span.is_valid().then(|| span.trace_id().to_string())
}
