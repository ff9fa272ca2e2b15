//! Log lines and traces of one process, coordinator or worker alike.
//!
//! Log lines go to standard error or, where something else is shown there, to a file. Spans go
//! to an OpenTelemetry collector where `OTEL_EXPORTER_OTLP_ENDPOINT` (or
//! `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`) names one, by OTLP over gRPC.
//!
//! Training comes first: spans wait in a bounded queue and are dropped when it is full; the
//! exporter has a thread and a runtime of its own, so it works whatever runtime the process has
//! and blocks none of it; that a collector cannot be reached is said once, not once a batch.

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{self as sdk, SdkTracerProvider, SpanData};
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Runtime;
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{ParseError, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt};

/// What is logged where neither variable says otherwise.
const DEFAULT_FILTER: &str = "info";

/// What filters log lines; the first one that is set counts.
const FILTERS: [&str; 2] = ["CARAVAN_LOG", "RUST_LOG"];

/// What names the collector; the first one that is set counts, as OpenTelemetry has it.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];

/// How long the end of the process waits for the last spans. Long enough for a collector on the
/// same network; short enough that nobody who pressed Ctrl-C presses it again.
const FLUSH: Duration = Duration::from_secs(2);

/// Where log lines go.
#[derive(Clone, Debug)]
pub enum LogTarget {
    /// To standard error.
    Stderr,
    /// To the end of this file.
    File(PathBuf),
}

/// Why logs and traces could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The log file cannot be opened.
    #[error("the log file {} cannot be opened", path.display())]
    LogFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The filter cannot be understood.
    #[error(
        "{variable} is {value:?}, which is no filter: it takes levels by module, such as \"info,caravan_worker=debug\""
    )]
    Filter {
        /// The environment variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// Why.
        source: ParseError,
    },
    /// The collector's address cannot be used.
    #[error(
        "{variable} is {value:?}, where traces cannot be sent: it takes an address such as http://127.0.0.1:4317"
    )]
    Endpoint {
        /// The environment variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// Why.
        source: ExporterBuildError,
    },
    /// The exporter's runtime cannot be started.
    #[error("the thread that sends traces cannot be started")]
    Runtime(#[source] io::Error),
    /// There is a subscriber already.
    #[error("logs and traces are set up already")]
    Twice(#[source] tracing_subscriber::util::TryInitError),
}

/// Keeps telemetry going; where it is dropped, the last spans are sent, within a bound.
#[must_use = "telemetry ends when this is dropped"]
#[derive(Debug)]
pub struct Guard {
    #[allow(dead_code, reason = "it is kept to be dropped")]
    export: Option<Export>,
}

/// Sets up logs and traces for the whole process, which is a `role`: "coordinator" or "worker".
///
/// # Errors
/// Where an environment variable or the log file cannot be used. A collector that cannot be
/// reached is no error: it may come later, and training does not depend on it.
pub fn init(role: &str, log: &LogTarget) -> Result<Guard, TelemetryError> {
    let set = |name: &'static str| std::env::var(name).ok().filter(|v| !v.is_empty()).map(|v| (name, v));
    let filter = FILTERS.into_iter().find_map(set);
    let endpoint = ENDPOINTS.into_iter().find_map(set);
    let (subscriber, guard) = build(role, log, filter, endpoint)?;
    subscriber.try_init().map_err(TelemetryError::Twice)?;
    Ok(guard)
}

/// An environment variable that is set.
type Variable = (&'static str, String);

fn build(
    role: &str,
    log: &LogTarget,
    filter: Option<Variable>,
    endpoint: Option<Variable>,
) -> Result<(impl Subscriber + Send + Sync + use<>, Guard), TelemetryError> {
    let (variable, value) = filter.unwrap_or(("the default filter", DEFAULT_FILTER.to_owned()));
    let filter = EnvFilter::try_new(&value).map_err(|source| TelemetryError::Filter {
        variable,
        value: value.clone(),
        source,
    })?;
    let lines = match log {
        LogTarget::Stderr => {
            let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            fmt::layer().with_writer(io::stderr).with_ansi(colours).boxed()
        }
        LogTarget::File(path) => {
            // Opened to append: every line is one write, so several processes may share a file.
            let file = OpenOptions::new().create(true).append(true).open(path);
            let file: Arc<File> =
                file.map_err(|source| TelemetryError::LogFile { path: path.clone(), source })?.into();
            fmt::layer().with_writer(file).with_ansi(false).boxed()
        }
    };
    let export = endpoint.map(|(variable, value)| Export::start(role, variable, value)).transpose()?;
    // Our own spans only: the exporter's gRPC client would otherwise report on its own reports.
    let ours = Targets::new().with_target("caravan", LevelFilter::INFO);
    let spans = export.as_ref().map(|export| {
        tracing_opentelemetry::layer()
            .with_tracer(export.provider.tracer("caravan"))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_filter(ours)
    });
    let subscriber = tracing_subscriber::registry().with(lines.with_filter(filter)).with(spans);
    Ok((subscriber, Guard { export }))
}

#[derive(Debug)]
struct Export {
    provider: SdkTracerProvider,
    /// Taken only when this is dropped.
    runtime: Option<Runtime>,
}

impl Export {
    fn start(role: &str, variable: &'static str, value: String) -> Result<Self, TelemetryError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("telemetry")
            .enable_all()
            .build()
            .map_err(TelemetryError::Runtime)?;
        let exporter = {
            // The gRPC channel runs where it is made.
            let _inside = runtime.enter();
            SpanExporter::builder().with_tonic().with_endpoint(&value).build()
        };
        let exporter = exporter.map_err(|source| TelemetryError::Endpoint { variable, value, source })?;
        let exporter = Reporting { exporter, failing: AtomicBool::new(false) };
        let provider =
            SdkTracerProvider::builder().with_resource(resource(role)).with_batch_exporter(exporter).build();
        Ok(Self { provider, runtime: Some(runtime) })
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH) {
            tracing::warn!(%error, "the last spans may not have been sent");
        }
        // Not waited for: this may be dropped within another runtime, which must not be blocked.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Who sends the spans. `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` are heeded.
fn resource(role: &str) -> Resource {
    let process = [
        KeyValue::new("caravan.role", role.to_owned()),
        KeyValue::new("process.pid", i64::from(std::process::id())),
    ];
    let builder = Resource::builder().with_attributes(process);
    match std::env::var_os("OTEL_SERVICE_NAME") {
        Some(_) => builder.build(),
        None => builder.with_service_name(format!("caravan-{role}")).build(),
    }
}

/// Says when the collector cannot be reached any more, and when it can again. The SDK itself
/// would be silent.
#[derive(Debug)]
struct Reporting<E> {
    exporter: E,
    failing: AtomicBool,
}

impl<E: sdk::SpanExporter> sdk::SpanExporter for Reporting<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let outcome = self.exporter.export(batch).await;
        match (&outcome, self.failing.swap(outcome.is_err(), Ordering::Relaxed)) {
            (Err(error), false) => {
                tracing::warn!(%error, spans, "traces cannot be sent; training goes on without them");
            }
            (Ok(()), true) => tracing::info!("traces are sent again"),
            _ => {}
        }
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
        TraceService, TraceServiceServer,
    };
    use opentelemetry_proto::tonic::collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
    };
    use std::time::Instant;
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Status};

    /// A collector that passes on what it receives.
    struct Collector(mpsc::Sender<ExportTraceServiceRequest>);

    #[tonic::async_trait]
    impl TraceService for Collector {
        async fn export(
            &self,
            request: Request<ExportTraceServiceRequest>,
        ) -> Result<Response<ExportTraceServiceResponse>, Status> {
            self.0.send(request.into_inner()).await.map_err(|_| Status::unavailable("the test is over"))?;
            Ok(Response::new(ExportTraceServiceResponse::default()))
        }
    }

    fn endpoint(address: impl std::fmt::Display) -> Option<Variable> {
        Some((ENDPOINTS[1], format!("http://{address}")))
    }

    fn a_run_of_one_step() {
        let run = tracing::info_span!(parent: None, "run", name = "test");
        let step = tracing::info_span!(parent: &run, "step", step = 1, loss = tracing::field::Empty);
        step.record("loss", 9.5);
        step.in_scope(|| tracing::info!("committed"));
        let detail = tracing::debug_span!(parent: &step, "too fine");
        drop((detail, step, run));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn spans_reach_a_collector_with_names_parents_and_role() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (sender, mut received) = mpsc::channel(16);
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(Collector(sender)))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(server);
        // On a thread of its own: dropping the guard waits for the collector, which runs here.
        let sent = tokio::task::spawn_blocking(move || {
            let (subscriber, guard) =
                build("worker", &LogTarget::Stderr, None, endpoint(address)).expect("it is set up");
            tracing::subscriber::with_default(subscriber, a_run_of_one_step);
            drop(guard);
        });
        sent.await.expect("spans are sent");
        server.abort();
        let mut spans = Vec::new();
        let mut resource = String::new();
        while let Ok(request) = received.try_recv() {
            for of_resource in request.resource_spans {
                resource += &format!("{:?}", of_resource.resource);
                spans.extend(of_resource.scope_spans.into_iter().flat_map(|s| s.spans));
            }
        }
        let names: Vec<_> = spans.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["step", "run"]);
        assert_eq!(spans[0].parent_span_id, spans[1].span_id);
        assert!(spans[0].attributes.iter().any(|a| a.key == "loss"), "{:?}", spans[0].attributes);
        assert!(resource.contains("caravan-worker"), "{resource}");
    }

    #[test]
    fn a_collector_that_is_not_there_is_said_once_and_delays_the_end_within_the_bound() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("worker.log");
        // Port 1 of the loopback answers at once that nobody listens.
        let (subscriber, guard) =
            build("worker", &LogTarget::File(log.clone()), None, endpoint("127.0.0.1:1")).expect("no error");
        // Process-wide in this test's process, as in production: the exporter's thread logs too.
        tracing::subscriber::set_global_default(subscriber).expect("the only one in these tests");
        a_run_of_one_step();
        let provider = guard.export.as_ref().expect("it exports").provider.clone();
        assert!(provider.force_flush().is_err());
        a_run_of_one_step();
        let dropped = Instant::now();
        drop(guard);
        assert!(dropped.elapsed() < FLUSH + Duration::from_secs(1), "{:?}", dropped.elapsed());
        let log = std::fs::read_to_string(log).expect("there is a log");
        assert_eq!(log.matches("traces cannot be sent").count(), 1, "{log}");
        assert!(log.contains("run{name=\"test\"}:step{step=1 loss=9.5}: caravan"), "{log}");
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let built = |filter: Option<&str>, endpoint: Option<&str>, log: &LogTarget| {
            let filter = filter.map(|f| (FILTERS[0], f.to_owned()));
            let endpoint = endpoint.map(|e| (ENDPOINTS[1], e.to_owned()));
            build("worker", log, filter, endpoint).map(|_| ()).expect_err("it must fail").to_string()
        };
        let filter = built(Some("caravan=loud"), None, &LogTarget::Stderr);
        assert!(filter.starts_with("CARAVAN_LOG is \"caravan=loud\", which is no filter"), "{filter}");
        for address in ["https://collector:4317", "not an address"] {
            let error = built(None, Some(address), &LogTarget::Stderr);
            assert!(error.starts_with(&format!("OTEL_EXPORTER_OTLP_ENDPOINT is {address:?}")), "{error}");
        }
        let file = built(None, None, &LogTarget::File("/no/such/folder/log".into()));
        assert!(file.contains("/no/such/folder/log"), "{file}");
    }
}
