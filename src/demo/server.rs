//! The embedded Bulk Data server: kick-off, status, manifest, files, over real HTTP on loopback.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::population::{DEMO_TYPES, Population};
use crate::error::{Context, ErrorKind, Result};
use crate::flow::{Crew, Stop, compute};

/// What the server does wrong, for tests. Counters count down as the fault is played.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// Polls that are answered 202 before the manifest.
    pub polls: usize,
    /// File requests that are answered 503.
    pub files_unavailable: usize,
    /// File responses that break off in the middle.
    pub files_cut: usize,
    /// Files of this type are answered 404, always.
    pub missing_type: Option<String>,
    /// Kick-offs that are answered 429 with `Retry-After: 1`.
    pub kickoffs_throttled: usize,
    /// Lines that are put before the first line of each file of a type.
    pub junk: HashMap<String, Vec<u8>>,
    /// The manifest promises that many more resources a file than there are.
    pub count_off_by: u64,
    /// Whether files are sent with gzip encoding.
    pub gzip: bool,
    /// Pause between two pieces of a file.
    pub slow: Option<Duration>,
    /// `transactionTime` instead of the clock's.
    pub transaction_time: Option<DateTime<Utc>>,
    /// Kick-offs that name this type are answered 403.
    pub forbidden_type: Option<String>,
    /// Content of an `error` file.
    pub errors: Vec<u8>,
    /// Ids put into `deleted`, beside the true ones: `Type/id`.
    pub also_deleted: Vec<String>,
}

/// What was asked of the server, for tests.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Query of each kick-off.
    pub kickoffs: Vec<HashMap<String, String>>,
    /// Files that were asked for.
    pub files: Vec<String>,
    /// Exports that were deleted.
    pub deleted: usize,
}

#[derive(Debug, Clone)]
struct Job {
    population: Population,
    kinds: Vec<usize>,
    since: Option<DateTime<Utc>>,
    time: DateTime<Utc>,
    polls: usize,
}

struct World {
    population: Population,
    jobs: Vec<Option<Job>>,
    faults: Faults,
    seen: Seen,
    /// Patients that one file covers.
    patients_per_file: u32,
}

type Shared = Arc<Mutex<World>>;

/// A running server; it stops when dropped.
pub struct DemoServer {
    base: String,
    world: Shared,
    stop: Stop,
    _crew: Crew,
}

fn locked(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for DemoServer {
    fn drop(&mut self) {
        self.stop.pull();
    }
}

impl DemoServer {
    /// Starts a server for `population` on a free loopback port, or on `port`.
    pub async fn start(population: Population, port: u16, patients_per_file: u32) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port))
            .await
            .context(ErrorKind::Config, format!("the demo server cannot listen on 127.0.0.1:{port}"))?;
        let address = listener.local_addr().context(ErrorKind::Internal, "the demo server has no address")?;
        let world = World {
            population,
            jobs: Vec::new(),
            faults: Faults::default(),
            seen: Seen::default(),
            patients_per_file: patients_per_file.max(1),
        };
        let world: Shared = Arc::new(Mutex::new(world));
        let app = Router::new()
            .route("/fhir/metadata", get(metadata))
            .route("/fhir/$export", get(kick_off))
            .route("/fhir/Patient/$export", get(kick_off))
            .route("/fhir/Group/{id}/$export", get(kick_off))
            .route("/fhir/jobs/{job}", get(status).delete(forget))
            .route("/fhir/files/{job}/{name}", get(file))
            .with_state((world.clone(), format!("http://{address}/fhir")));
        let stop = Stop::default();
        let mut crew = Crew::new(stop.clone());
        let pulled = stop.clone();
        crew.spawn("demo server", async move {
            let served = axum::serve(listener, app).with_graceful_shutdown(async move { pulled.pulled().await });
            served.await.context(ErrorKind::Network, "the demo server stopped")
        });
        Ok(Self { base: format!("http://{address}/fhir"), world, stop, _crew: crew })
    }

    /// The FHIR base.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Lets time pass in the population.
    pub fn step(&self, changed: u64, deleted: u64, arrivals: u32) {
        locked(&self.world).population.step(changed, deleted, arrivals, Utc::now());
    }

    /// The population as it is now.
    pub fn population(&self) -> Population {
        locked(&self.world).population.clone()
    }

    /// Sets what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        locked(&self.world).faults = faults;
    }

    /// What was asked so far.
    pub fn seen(&self) -> Seen {
        locked(&self.world).seen.clone()
    }
}

type Shop = State<(Shared, String)>;

fn outcome(status: StatusCode, code: &str, text: &str) -> Response {
    let body = json!({"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": code, "diagnostics": text}]});
    (status, [("content-type", "application/fhir+json")], body.to_string()).into_response()
}

async fn metadata() -> Response {
    let body = json!({
        "resourceType": "CapabilityStatement", "status": "active", "kind": "instance", "fhirVersion": "4.0.1",
        "format": ["json"], "date": "2026-01-01",
        "instantiates": ["http://hl7.org/fhir/uv/bulkdata/CapabilityStatement/bulk-data"],
        "rest": [{"mode": "server", "operation": [{"name": "export", "definition": "http://hl7.org/fhir/uv/bulkdata/OperationDefinition/export"}]}]
    });
    ([("content-type", "application/fhir+json")], body.to_string()).into_response()
}

async fn kick_off(State((world, base)): Shop, Query(query): Query<HashMap<String, String>>, headers: HeaderMap) -> Response {
    let mut world = locked(&world);
    world.seen.kickoffs.push(query.clone());
    if world.faults.kickoffs_throttled > 0 {
        world.faults.kickoffs_throttled -= 1;
        let mut answer = outcome(StatusCode::TOO_MANY_REQUESTS, "throttled", "one export at a time");
        answer.headers_mut().insert("retry-after", HeaderValue::from_static("1"));
        return answer;
    }
    let prefers = headers.get("prefer").and_then(|text| text.to_str().ok()).unwrap_or_default();
    if !prefers.contains("respond-async") {
        return outcome(StatusCode::BAD_REQUEST, "invalid", "the header Prefer must contain respond-async");
    }
    if let (Some(forbidden), Some(asked)) = (&world.faults.forbidden_type, query.get("_type"))
        && asked.split(',').any(|name| name == forbidden)
    {
        return outcome(StatusCode::FORBIDDEN, "forbidden", "not for this client");
    }
    let asked: Option<Vec<&str>> = query.get("_type").map(|types| types.split(',').collect());
    let mut kinds = Vec::new();
    for (kind, name) in DEMO_TYPES.iter().enumerate() {
        if asked.as_ref().is_none_or(|asked| asked.contains(name)) {
            kinds.push(kind);
        }
    }
    let since = match query.get("_since").map(|text| DateTime::parse_from_rfc3339(text)) {
        None => None,
        Some(Ok(time)) => Some(time.to_utc()),
        Some(Err(_)) => return outcome(StatusCode::BAD_REQUEST, "invalid", "_since is not an instant"),
    };
    let time = world.faults.transaction_time.unwrap_or_else(Utc::now);
    let job = Job { population: world.population.clone(), kinds, since, time, polls: world.faults.polls };
    world.jobs.push(Some(job));
    let location = format!("{base}/jobs/{}", world.jobs.len() - 1);
    (StatusCode::ACCEPTED, [("content-location", location)]).into_response()
}

async fn status(State((world, base)): Shop, Path(id): Path<usize>) -> Response {
    let (job, faults, per_file) = {
        let mut world = locked(&world);
        let (faults, per_file) = (world.faults.clone(), world.patients_per_file);
        let Some(Some(job)) = world.jobs.get_mut(id) else {
            return outcome(StatusCode::NOT_FOUND, "not-found", "no such export");
        };
        if job.polls > 0 {
            job.polls -= 1;
            let progress = format!("{} more polls", job.polls);
            return (StatusCode::ACCEPTED, [("x-progress", progress), ("retry-after", "0".to_owned())]).into_response();
        }
        (job.clone(), faults, per_file)
    };
    // Counting the population is work: not for the reactor.
    let manifest = compute(tracing::Span::none(), async move { manifest(&job, &faults, per_file, &base, id) }).await;
    match manifest {
        Ok(manifest) => {
            let expires = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(3600));
            ([("content-type", "application/json".to_owned()), ("expires", expires)], manifest.to_string()).into_response()
        }
        Err(_) => outcome(StatusCode::INTERNAL_SERVER_ERROR, "exception", "the manifest could not be drawn up"),
    }
}

fn manifest(job: &Job, faults: &Faults, per_file: u32, base: &str, id: usize) -> Value {
    let (mut output, mut deleted) = (Vec::new(), false);
    for kind in &job.kinds {
        let name = DEMO_TYPES[*kind];
        for (part, first) in (0..job.population.patients()).step_by(per_file as usize).enumerate() {
            let mut count = 0u64;
            for patient in first..(first + per_file).min(job.population.patients()) {
                job.population.for_each(*kind, patient, |_, fate| {
                    let is_new = job.since.is_none_or(|since| fate.updated >= since);
                    count += u64::from(is_new && !fate.deleted);
                    deleted |= job.since.is_some() && is_new && fate.deleted;
                });
            }
            if count > 0 {
                output.push(json!({"type": name, "url": format!("{base}/files/{id}/{name}.{part}.ndjson"), "count": count + faults.count_off_by}));
            }
        }
    }
    let deleted: Vec<Value> = (deleted || !faults.also_deleted.is_empty())
        .then(|| json!({"type": "Bundle", "url": format!("{base}/files/{id}/deleted.0.ndjson")}))
        .into_iter()
        .collect();
    let errors: Vec<Value> = (!faults.errors.is_empty())
        .then(|| json!({"type": "OperationOutcome", "url": format!("{base}/files/{id}/errors.0.ndjson")}))
        .into_iter()
        .collect();
    json!({
        "transactionTime": job.time.to_rfc3339_opts(SecondsFormat::Millis, true),
        "request": format!("{base}/$export"), "requiresAccessToken": false,
        "output": output, "deleted": deleted, "error": errors
    })
}

async fn forget(State((world, _)): Shop, Path(id): Path<usize>) -> StatusCode {
    let mut world = locked(&world);
    match world.jobs.get_mut(id) {
        Some(job @ Some(_)) => {
            *job = None;
            world.seen.deleted += 1;
            StatusCode::ACCEPTED
        }
        _ => StatusCode::NOT_FOUND,
    }
}

/// Bytes of a file are made and sent in pieces of about this size.
const PIECE: usize = 256 * 1024;

async fn file(State((world, _)): Shop, Path((id, name)): Path<(usize, String)>) -> Response {
    let (job, faults, per_file, cut) = {
        let mut world = locked(&world);
        world.seen.files.push(name.clone());
        let Some(Some(job)) = world.jobs.get(id).cloned() else {
            return outcome(StatusCode::NOT_FOUND, "not-found", "no such export");
        };
        if world.faults.files_unavailable > 0 {
            world.faults.files_unavailable -= 1;
            return (StatusCode::SERVICE_UNAVAILABLE, "try again").into_response();
        }
        let cut = world.faults.files_cut > 0;
        world.faults.files_cut = world.faults.files_cut.saturating_sub(1);
        (job, world.faults.clone(), world.patients_per_file, cut)
    };
    let mut parts = name.split('.');
    let (kind, part) = (parts.next().unwrap_or_default().to_owned(), parts.next().and_then(|part| part.parse::<u32>().ok()));
    let Some(part) = part.filter(|_| faults.missing_type.as_deref() != Some(kind.as_str())) else {
        return outcome(StatusCode::NOT_FOUND, "not-found", "no such file");
    };
    let (pieces, body) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(4);
    let gzip = faults.gzip;
    let work = async move {
        let writer = FileWriter { job, faults, pieces, cut, sent: 0, packer: None };
        writer.write(&kind, part, per_file).await;
    };
    // The task ends by itself when the client goes away: its channel closes.
    crate::flow::detach_response(work);
    let stream = futures::stream::unfold(body, |mut body| async move { body.recv().await.map(|piece| (piece, body)) });
    let mut answer = Response::new(Body::from_stream(stream));
    answer.headers_mut().insert("content-type", HeaderValue::from_static("application/fhir+ndjson"));
    if gzip {
        answer.headers_mut().insert("content-encoding", HeaderValue::from_static("gzip"));
    }
    answer
}

struct FileWriter {
    job: Job,
    faults: Faults,
    pieces: tokio::sync::mpsc::Sender<std::io::Result<Bytes>>,
    cut: bool,
    sent: usize,
    packer: Option<flate2::write::GzEncoder<Vec<u8>>>,
}

impl FileWriter {
    async fn write(mut self, name: &str, part: u32, per_file: u32) {
        if self.faults.gzip {
            self.packer = Some(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        }
        if let Some(junk) = self.faults.junk.get(name).cloned()
            && !self.send(&junk).await
        {
            return;
        }
        let population = self.job.population.clone();
        let (first, since) = (part * per_file, self.job.since);
        let patients = first..(first + per_file).min(population.patients());
        let mut text = String::with_capacity(PIECE + 8192);
        if name == "errors" {
            text.push_str(&String::from_utf8_lossy(&self.faults.errors));
        } else if name == "deleted" {
            for id in &self.faults.also_deleted {
                text.push_str(&deletion(id));
            }
            for kind in self.job.kinds.clone() {
                for patient in 0..population.patients() {
                    population.for_each(kind, patient, |number, fate| {
                        if fate.deleted && since.is_some_and(|since| fate.updated >= since) {
                            text.push_str(&deletion(&format!("{}/{}", DEMO_TYPES[kind], population.id(kind, patient, number))));
                        }
                    });
                }
            }
        } else if let Some(kind) = DEMO_TYPES.iter().position(|known| *known == name) {
            for patient in patients {
                population.for_each(kind, patient, |number, fate| {
                    if !fate.deleted && since.is_none_or(|since| fate.updated >= since) {
                        population.write(kind, patient, number, fate, &mut text);
                    }
                });
                if text.len() >= PIECE {
                    if !self.send(text.as_bytes()).await {
                        return;
                    }
                    text.clear();
                }
            }
        }
        if !self.send(text.as_bytes()).await {
            return;
        }
        if let Some(packer) = self.packer.take()
            && let Ok(rest) = packer.finish()
        {
            // The client may be gone; there is nobody to tell.
            let _ = self.pieces.send(Ok(rest.into())).await;
        }
    }

    /// Whether to go on.
    async fn send(&mut self, bytes: &[u8]) -> bool {
        use std::io::Write;
        let bytes = match &mut self.packer {
            Some(packer) => {
                let _ = packer.write_all(bytes);
                std::mem::take(packer.get_mut())
            }
            None => bytes.to_vec(),
        };
        if let Some(pause) = self.faults.slow {
            tokio::time::sleep(pause).await;
        }
        let mut bytes = Bytes::from(bytes);
        if self.cut && bytes.len() > 1 {
            bytes.truncate(bytes.len() / 2);
            let _ = self.pieces.send(Ok(bytes)).await;
            let _ = self.pieces.send(Err(std::io::Error::other("cut"))).await;
            return false;
        }
        self.sent += bytes.len();
        self.pieces.send(Ok(bytes)).await.is_ok()
    }
}

fn deletion(id: &str) -> String {
    let bundle = json!({
        "resourceType": "Bundle", "type": "transaction",
        "entry": [{"request": {"method": "DELETE", "url": id}}]
    });
    format!("{bundle}\n")
}
