//! The embedded Bulk Data server: kick-off, status, manifest, files, over real HTTP on loopback.

use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::faults::Faults;
use crate::files::{binary, elsewhere, file};
use crate::manifest::manifest;
use crate::middleware::{Parameters, pass};
use crate::population::{DEMO_TYPES, Population};
use crate::tokens::{Registration, Tokens};
use flow::{Cancellation, TaskGroup, compute};
use foundation::error::{Context, ErrorKind, Result};

/// Requests that the server has seen, for tests.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Query of each kick-off.
    pub kickoffs: Vec<HashMap<String, String>>,
    /// Files that were asked for.
    pub files: Vec<String>,
    /// The export of each of those.
    pub jobs: Vec<usize>,
    /// Binaries that were asked for.
    pub binaries: Vec<String>,
    /// Exports that were deleted.
    pub deleted: usize,
    /// `Prefer` of each kick-off.
    pub prefer: Vec<String>,
    /// Tokens that were given out.
    pub tokens: usize,
    /// The scope that was asked for last.
    pub scope: String,
    /// Requests that began in the middle of a file.
    pub ranges: usize,
    /// Requests to the files' other origin that carried an `Authorization`.
    pub leaked: usize,
    /// Most files that were being sent at a time.
    pub at_once: usize,
    /// `Accept` of each kind of request: `kick-off`, `status`, `file`.
    pub accept: BTreeMap<&'static str, BTreeSet<String>>,
    /// `traceparent` of requests.
    pub traces: BTreeSet<String>,
    /// `Accept-Encoding` of files.
    pub accept_encoding: BTreeSet<String>,
}

impl Seen {
    /// Notes that a file of an export was asked for.
    pub(crate) fn requested(&mut self, job: usize, name: &str) {
        self.files.push(name.to_owned());
        self.jobs.push(job);
    }

    /// Notes the `Accept` of a request.
    pub(crate) fn accepts(&mut self, what: &'static str, headers: &HeaderMap) {
        let text = |name: &str| headers.get(name).and_then(|text| text.to_str().ok()).unwrap_or_default().to_owned();
        self.accept.entry(what).or_default().insert(text("accept"));
        if headers.contains_key("traceparent") {
            self.traces.insert(text("traceparent"));
        }
        if what == "file" {
            self.accept_encoding.insert(text("accept-encoding"));
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub population: Population,
    pub kinds: Vec<usize>,
    pub since: Option<DateTime<Utc>>,
    pub time: DateTime<Utc>,
    polls: usize,
    pub separate: bool,
    /// Parameters that were passed over.
    pub ignored: Vec<String>,
    /// True if its files are organised by patients.
    pub organized: bool,
    /// True if its manifest may have pages.
    pub paged: bool,
    /// Which of its links are good: those that the newest manifest gave out.
    pub links: usize,
}

pub(crate) struct World {
    population: Population,
    pub jobs: Vec<Option<Job>>,
    pub faults: Faults,
    pub seen: Seen,
    pub tokens: Tokens,
    pub sending: usize,
    /// Patients that one file covers.
    pub patients_per_file: u32,
}

pub(crate) type Shared = Arc<Mutex<World>>;

/// A running server; it stops when dropped.
pub struct DemoServer {
    base: String,
    world: Shared,
    stop: Cancellation,
    _crew: TaskGroup,
}

impl Drop for DemoServer {
    fn drop(&mut self) {
        self.stop.cancel();
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
            tokens: Tokens::default(),
            sending: 0,
            patients_per_file: patients_per_file.max(1),
        };
        let world: Shared = Arc::new(Mutex::new(world));
        let shop = (world.clone(), format!("http://{address}/fhir"));
        let app = Router::new()
            .route("/fhir/metadata", get(metadata))
            .route("/fhir/.well-known/smart-configuration", get(smart_configuration))
            .route("/fhir/token", post(token))
            .route("/fhir/$export", get(kick_off).post(kick_off))
            .route("/fhir/Patient/$export", get(kick_off).post(kick_off))
            .route("/fhir/Group/{id}/$export", get(kick_off).post(kick_off))
            .route("/fhir/jobs/{job}", get(status).delete(forget))
            .route("/fhir/jobs/{job}/{page}", get(page))
            .route("/fhir/files/{job}/{name}", get(file))
            .route("/fhir/Binary/{id}", get(binary))
            .route("/elsewhere/{job}/{name}", get(elsewhere))
            .layer(from_fn_with_state(shop.clone(), pass))
            .with_state(shop);
        // A small file is two writes, and without this the second waits 40 ms for the client's word on the first.
        let listener = listener.tap_io(|stream| {
            let _ = stream.set_nodelay(true);
        });
        let stop = Cancellation::default();
        let mut tasks = TaskGroup::new(stop.clone());
        let stopped = stop.clone();
        tasks.spawn("demo server", async move {
            let served = axum::serve(listener, app).with_graceful_shutdown(async move { stopped.cancelled().await });
            served.await.context(ErrorKind::Network, "the demo server stopped")
        });
        Ok(Self { base: format!("http://{address}/fhir"), world, stop, _crew: tasks })
    }

    /// The FHIR base.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Lets time pass in the population.
    pub fn step(&self, changed: u64, deleted: u64, arrivals: u32) {
        self.world.lock().population.step(changed, deleted, arrivals, Utc::now());
    }

    /// The population as it is now.
    pub fn population(&self) -> Population {
        self.world.lock().population.clone()
    }

    /// Sets what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.world.lock().faults = faults;
    }

    /// Returns the requests so far.
    pub fn seen(&self) -> Seen {
        let world = self.world.lock();
        Seen { tokens: world.tokens.issued, scope: world.tokens.scope.clone(), ..world.seen.clone() }
    }

    /// Lets the exports that are under way be done.
    pub fn finish_polls(&self) {
        self.world.lock().jobs.iter_mut().flatten().for_each(|job| job.polls = 0);
    }

    /// Forgets all exports.
    pub fn lose_exports(&self) {
        self.world.lock().jobs.iter_mut().for_each(|job| *job = None);
    }

    /// Returns the number of its exports: those that were neither deleted nor lost.
    pub fn exports(&self) -> usize {
        self.world.lock().jobs.iter().flatten().count()
    }

    /// Registers a client: from now on nothing is answered without its token.
    pub fn register(&self, client: Registration) {
        self.world.lock().tokens.registered = Some(client);
    }
}

pub(crate) type Shop = State<(Shared, String)>;

pub(crate) fn outcome(status: StatusCode, code: &str, text: &str) -> Response {
    let body = json!({"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": code,
        "diagnostics": text}]});
    (status, [("content-type", "application/fhir+json")], body.to_string()).into_response()
}

async fn metadata() -> Response {
    let body = json!({
        "resourceType": "CapabilityStatement", "status": "active", "kind": "instance", "fhirVersion": "4.0.1",
        "format": ["json"], "date": "2026-01-01",
        "instantiates": ["http://hl7.org/fhir/uv/bulkdata/CapabilityStatement/bulk-data"],
        "rest": [{
            "mode": "server",
            "operation": [{"name": "export",
                "definition": "http://hl7.org/fhir/uv/bulkdata/OperationDefinition/export"}],
            "resource": [
                {"type": "Patient", "operation": [{"name": "export",
                    "definition": "http://hl7.org/fhir/uv/bulkdata/OperationDefinition/patient-export"}]},
                {"type": "Group", "operation": [{"name": "export",
                    "definition": "http://hl7.org/fhir/uv/bulkdata/OperationDefinition/group-export"}]}
            ]
        }]
    });
    ([("content-type", "application/fhir+json")], body.to_string()).into_response()
}

async fn smart_configuration(State((world, base)): Shop) -> Response {
    let world = world.lock();
    if world.tokens.registered.is_none() {
        return StatusCode::NOT_FOUND.into_response();
    }
    let scopes = world.faults.scopes.clone().unwrap_or_else(|| vec!["system/*.read".into(), "system/*.rs".into()]);
    let body = json!({
        "token_endpoint": format!("{base}/token"),
        "token_endpoint_auth_methods_supported": ["private_key_jwt", "client_secret_basic", "client_secret_post"],
        "token_endpoint_auth_signing_alg_values_supported": ["RS384", "ES384"],
        "scopes_supported": scopes,
        "capabilities": ["client-confidential-asymmetric", "permission-v1", "permission-v2"],
    });
    ([("content-type", "application/json")], body.to_string()).into_response()
}

async fn token(State((world, base)): Shop, headers: HeaderMap, body: String) -> Response {
    let form: HashMap<String, String> = url::form_urlencoded::parse(body.as_bytes()).into_owned().collect();
    let mut world = world.lock();
    let World { tokens, faults, .. } = &mut *world;
    tokens.issue(&format!("{base}/token"), &headers, &form, faults)
}

async fn kick_off(
    State((world, base)): Shop,
    path: axum::extract::RawPathParams,
    Extension(Parameters(query)): Extension<Parameters>,
    headers: HeaderMap,
) -> Response {
    let mut world = world.lock();
    let prefers = headers.get("prefer").and_then(|text| text.to_str().ok()).unwrap_or_default();
    if !prefers.contains("respond-async") {
        return outcome(StatusCode::BAD_REQUEST, "invalid", "the header Prefer must contain respond-async");
    }
    let ignored: Vec<String> =
        world.faults.unsupported.iter().filter(|name| query.contains_key(*name)).cloned().collect();
    if let (Some(name), false) = (ignored.first(), prefers.contains("handling=lenient")) {
        return outcome(StatusCode::BAD_REQUEST, "not-supported", &format!("the parameter {name} is not supported"));
    }
    let requested: Option<Vec<&str>> = query.get("_type").map(|types| types.split(',').collect());
    let mut kinds = Vec::new();
    let group = path.iter().find(|(name, _)| *name == "id").map(|(_, id)| id.to_owned());
    let is_there = group.is_none_or(|group| world.faults.groups.as_ref().is_none_or(|groups| groups.contains(&group)));
    for (kind, name) in DEMO_TYPES.iter().enumerate().filter(|_| is_there) {
        if requested.as_ref().is_none_or(|requested| requested.contains(name)) {
            kinds.push(kind);
        }
    }
    let since = match query.get("_since").map(|text| DateTime::parse_from_rfc3339(text)) {
        None => None,
        Some(Ok(time)) => Some(time.to_utc()),
        Some(Err(_)) => return outcome(StatusCode::BAD_REQUEST, "invalid", "_since is not an instant"),
    };
    let time = world.faults.transaction_time.unwrap_or_else(Utc::now);
    let separate = world.faults.separate_status && prefers.contains("separate-export-status");
    let is_endless = world
        .faults
        .endless_type
        .as_deref()
        .is_some_and(|endless| requested.iter().flatten().any(|name| *name == endless));
    let (population, polls) = (world.population.clone(), if is_endless { usize::MAX } else { world.faults.polls });
    let organized = query.get("organizeOutputBy").is_some_and(|name| name == "Patient");
    let paged = query.get("allowPartialManifests").is_some_and(|value| value == "true");
    world.jobs.push(Some(Job { population, kinds, since, time, polls, separate, ignored, organized, paged, links: 0 }));
    let location = format!("{base}/jobs/{}", world.jobs.len() - 1);
    let mut answer = (StatusCode::ACCEPTED, [("content-location", location)]).into_response();
    if separate {
        answer.headers_mut().insert("preference-applied", HeaderValue::from_static("separate-export-status"));
    }
    answer
}

async fn status(shop: Shop, Path(id): Path<usize>) -> Response {
    answer_status(shop, id, 0).await
}

async fn page(shop: Shop, Path((id, page)): Path<(usize, usize)>) -> Response {
    answer_status(shop, id, page).await
}

/// Answers a poll, or with a page of the manifest.
async fn answer_status(State((world, base)): Shop, id: usize, page: usize) -> Response {
    let (job, faults, per_file) = {
        let mut world = world.lock();
        let World { faults, jobs, patients_per_file, .. } = &mut *world;
        let Some(Some(job)) = jobs.get_mut(id) else {
            return outcome(StatusCode::NOT_FOUND, "not-found", "no such export");
        };
        if job.polls > 0 && page == 0 {
            job.polls -= 1;
            let progress = format!("{} more polls", job.polls);
            let wait = faults.poll_retry_after.clone().unwrap_or_else(|| "0".to_owned());
            let code = if job.separate { StatusCode::OK } else { StatusCode::ACCEPTED };
            let mut answer = (code, [("x-progress", progress), ("retry-after", wait)]).into_response();
            if job.separate {
                answer.headers_mut().insert("x-export-status", HeaderValue::from_static("202"));
            }
            return answer;
        }
        job.links += 1;
        (job.clone(), faults.clone(), *patients_per_file)
    };
    let separate = job.separate;
    let (page_files, growing, job_links) =
        (if job.paged { faults.page_files } else { 0 }, faults.growing && job.paged, job.links);
    let protected = world.lock().tokens.registered.is_some();
    // Counting the population is work: not for the reactor.
    let made =
        compute(tracing::Span::none(), async move { manifest(&job, &faults, per_file, &base, (id, page), protected) })
            .await;
    match made {
        Ok(mut manifest) => {
            let grows = growing && job_links == 1;
            if let Some(output) = manifest.get_mut("output").and_then(Value::as_array_mut).filter(|_| grows) {
                output.drain(..output.len().saturating_sub(1));
            }
            let expires = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(3600));
            // A page with a next one is final while the server still works.
            let still = grows || page_files > 0 && manifest.get("link").is_some();
            let code = if still { StatusCode::ACCEPTED } else { StatusCode::OK };
            let headers = [("content-type", "application/json".to_owned()), ("expires", expires)];
            let mut answer = (code, headers, manifest.to_string()).into_response();
            if separate {
                answer
                    .headers_mut()
                    .insert("x-export-status", HeaderValue::from_static(if still { "202" } else { "200" }));
            }
            answer
        }
        Err(_) => outcome(StatusCode::INTERNAL_SERVER_ERROR, "exception", "the manifest could not be drawn up"),
    }
}

async fn forget(State((world, _)): Shop, Path(id): Path<usize>) -> StatusCode {
    let mut world = world.lock();
    match world.jobs.get_mut(id) {
        Some(job @ Some(_)) => {
            *job = None;
            world.seen.deleted += 1;
            StatusCode::ACCEPTED
        }
        _ => StatusCode::NOT_FOUND,
    }
}
