//! The embedded Bulk Data server: kick-off, status, manifest, files, over real HTTP on loopback.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::faults::Faults;
use crate::files::{binary, elsewhere, file};
use crate::manifest::manifest;
use crate::population::{DEMO_TYPES, Population};
use crate::tokens::{Registration, Tokens};
use flow::{Cancellation, TaskGroup, compute, locked};
use foundation::error::{Context, ErrorKind, Result};

/// What was asked of the server, for tests.
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
    separate: bool,
    /// Parameters that were passed over.
    pub ignored: Vec<String>,
    /// Whether its files are organised by patients.
    pub organized: bool,
    /// Whether its manifest may have pages.
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
            .with_state((world.clone(), format!("http://{address}/fhir")));
        // A small file is two writes, and without this the second waits 40 ms for the client's word on the first.
        let listener = listener.tap_io(|stream| {
            let _ = stream.set_nodelay(true);
        });
        let stop = Cancellation::default();
        let mut tasks = TaskGroup::new(stop.clone());
        let pulled = stop.clone();
        tasks.spawn("demo server", async move {
            let served = axum::serve(listener, app).with_graceful_shutdown(async move { pulled.cancelled().await });
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
        let world = locked(&self.world);
        Seen { tokens: world.tokens.issued, scope: world.tokens.scope.clone(), ..world.seen.clone() }
    }

    /// Lets the exports that are under way be done.
    pub fn finish_polls(&self) {
        locked(&self.world).jobs.iter_mut().flatten().for_each(|job| job.polls = 0);
    }

    /// Forgets all exports.
    pub fn lose_exports(&self) {
        locked(&self.world).jobs.iter_mut().for_each(|job| *job = None);
    }

    /// How many exports it has: those that were neither deleted nor lost.
    pub fn exports(&self) -> usize {
        locked(&self.world).jobs.iter().flatten().count()
    }

    /// Registers a client: from now on nothing is answered without its token.
    pub fn register(&self, client: Registration) {
        locked(&self.world).tokens.registered = Some(client);
    }
}

pub(crate) type Shop = State<(Shared, String)>;

pub(crate) fn outcome(status: StatusCode, code: &str, text: &str) -> Response {
    let body = json!({"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": code, "diagnostics": text}]});
    (status, [("content-type", "application/fhir+json")], body.to_string()).into_response()
}

async fn metadata() -> Response {
    let body = json!({
        "resourceType": "CapabilityStatement", "status": "active", "kind": "instance", "fhirVersion": "4.0.1",
        "format": ["json"], "date": "2026-01-01",
        "instantiates": ["http://hl7.org/fhir/uv/bulkdata/CapabilityStatement/bulk-data"],
        "rest": [{
            "mode": "server",
            "operation": [{"name": "export", "definition": "http://hl7.org/fhir/uv/bulkdata/OperationDefinition/export"}],
            "resource": [
                {"type": "Patient", "operation": [{"name": "export", "definition": "http://hl7.org/fhir/uv/bulkdata/OperationDefinition/patient-export"}]},
                {"type": "Group", "operation": [{"name": "export", "definition": "http://hl7.org/fhir/uv/bulkdata/OperationDefinition/group-export"}]}
            ]
        }]
    });
    ([("content-type", "application/fhir+json")], body.to_string()).into_response()
}

/// What every protected answer begins with; `None` where the request may be answered.
pub(crate) fn refuse(world: &World, headers: &HeaderMap) -> Option<Response> {
    (!world.tokens.allow(headers)).then(|| outcome(StatusCode::UNAUTHORIZED, "login", "no valid token"))
}

/// `Date` as the server's clock has it: hyper leaves one that is there alone.
fn dated(mut answer: Response, ahead: i64) -> Response {
    let seconds = u64::try_from(Utc::now().timestamp() + ahead).unwrap_or(0);
    let time = std::time::UNIX_EPOCH + Duration::from_secs(seconds);
    if let Ok(date) = HeaderValue::from_str(&httpdate::fmt_http_date(time)) {
        answer.headers_mut().insert("date", date);
    }
    answer
}

async fn smart_configuration(State((world, base)): Shop) -> Response {
    let world = locked(&world);
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
    dated(([("content-type", "application/json")], body.to_string()).into_response(), world.faults.clock_ahead)
}

async fn token(State((world, base)): Shop, headers: HeaderMap, body: String) -> Response {
    let form: HashMap<String, String> = url::form_urlencoded::parse(body.as_bytes()).into_owned().collect();
    let mut world = locked(&world);
    let World { tokens, faults, .. } = &mut *world;
    let ahead = faults.clock_ahead;
    dated(tokens.issue(&format!("{base}/token"), &headers, &form, faults), ahead)
}

/// The parameters of a kick-off: of a GET's query, or of a POST's `Parameters`; what is repeated is joined by commas, but
/// for `_typeFilter`, whose values may have some.
fn parameters(query: &str, body: &str) -> HashMap<String, String> {
    let mut all: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let json: Value = serde_json::from_str(body).unwrap_or_default();
    for parameter in json.get("parameter").and_then(Value::as_array).into_iter().flatten() {
        let name = parameter.get("name").and_then(Value::as_str).unwrap_or_default();
        let value = parameter.as_object().into_iter().flatten().find(|(key, _)| key.starts_with("value")).map(|(_, value)| value);
        let value = match value {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Object(reference)) => reference.get("reference").and_then(Value::as_str).unwrap_or_default().to_owned(),
            other => other.map(ToString::to_string).unwrap_or_default(),
        };
        all.push((name.to_owned(), value));
    }
    let mut joined: HashMap<String, String> = HashMap::new();
    for (name, value) in all {
        let separator = if name == "_typeFilter" { "\n" } else { "," };
        joined.entry(name).and_modify(|known| *known = format!("{known}{separator}{value}")).or_insert(value);
    }
    joined
}

async fn kick_off(
    State((world, base)): Shop,
    method: Method,
    path: axum::extract::RawPathParams,
    axum::extract::RawQuery(query): axum::extract::RawQuery,
    headers: HeaderMap,
    body: String,
) -> Response {
    let mut world = locked(&world);
    if let Some(refusal) = refuse(&world, &headers) {
        return refusal;
    }
    if world.faults.post_only && method != Method::POST {
        return outcome(StatusCode::METHOD_NOT_ALLOWED, "not-supported", "the kick-off is a POST");
    }
    let query = parameters(query.as_deref().unwrap_or_default(), &body);
    world.seen.kickoffs.push(query.clone());
    world.seen.accepts("kick-off", &headers);
    let prefers = headers.get("prefer").and_then(|text| text.to_str().ok()).unwrap_or_default().to_owned();
    world.seen.prefer.push(prefers.clone());
    if world.faults.kickoffs_throttled > 0 {
        world.faults.kickoffs_throttled -= 1;
        let mut answer = outcome(StatusCode::TOO_MANY_REQUESTS, "throttled", "one export at a time");
        let wait = world.faults.kickoff_retry_after.clone().unwrap_or_else(|| "1".to_owned());
        if let Ok(wait) = HeaderValue::from_str(&wait) {
            answer.headers_mut().insert("retry-after", wait);
        }
        return answer;
    }
    if !prefers.contains("respond-async") {
        return outcome(StatusCode::BAD_REQUEST, "invalid", "the header Prefer must contain respond-async");
    }
    let ignored: Vec<String> = world.faults.unsupported.iter().filter(|name| query.contains_key(*name)).cloned().collect();
    if let (Some(name), false) = (ignored.first(), prefers.contains("handling=lenient")) {
        return outcome(StatusCode::BAD_REQUEST, "not-supported", &format!("the parameter {name} is not supported"));
    }
    if let (Some(forbidden), Some(asked)) = (&world.faults.forbidden_type, query.get("_type"))
        && asked.split(',').any(|name| name == forbidden)
    {
        return outcome(StatusCode::FORBIDDEN, "forbidden", "not for this client");
    }
    let asked: Option<Vec<&str>> = query.get("_type").map(|types| types.split(',').collect());
    let mut kinds = Vec::new();
    let group = path.iter().find(|(name, _)| *name == "id").map(|(_, id)| id.to_owned());
    let is_there = group.is_none_or(|group| world.faults.groups.as_ref().is_none_or(|groups| groups.contains(&group)));
    for (kind, name) in DEMO_TYPES.iter().enumerate().filter(|_| is_there) {
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
    let separate = world.faults.separate_status && prefers.contains("separate-export-status");
    let is_endless =
        world.faults.endless_type.as_deref().is_some_and(|endless| asked.iter().flatten().any(|name| *name == endless));
    let (population, polls) = (world.population.clone(), if is_endless { usize::MAX } else { world.faults.polls });
    let organized = query.get("organizeOutputBy").is_some_and(|name| name == "Patient");
    let paged = query.get("allowPartialManifests").is_some_and(|value| value == "true");
    world.jobs.push(Some(Job { population, kinds, since, time, polls, separate, ignored, organized, paged, links: 0 }));
    if world.faults.kickoffs_lost > 0 {
        world.faults.kickoffs_lost -= 1;
        // A body that fails before its first byte takes the head with it.
        let nothing = futures::stream::once(async { Err::<bytes::Bytes, _>(std::io::Error::other("lost")) });
        return Response::new(axum::body::Body::from_stream(nothing));
    }
    let location = format!("{base}/jobs/{}", world.jobs.len() - 1);
    let mut answer = (StatusCode::ACCEPTED, [("content-location", location)]).into_response();
    if separate {
        answer.headers_mut().insert("preference-applied", HeaderValue::from_static("separate-export-status"));
    }
    answer
}

async fn status(shop: Shop, Path(id): Path<usize>, headers: HeaderMap) -> Response {
    answer_status(shop, id, 0, headers).await
}

async fn page(shop: Shop, Path((id, page)): Path<(usize, usize)>, headers: HeaderMap) -> Response {
    answer_status(shop, id, page, headers).await
}

async fn answer_status(State((world, base)): Shop, id: usize, page: usize, headers: HeaderMap) -> Response {
    let (job, faults, per_file) = {
        let mut world = locked(&world);
        if let Some(refusal) = refuse(&world, &headers) {
            return refusal;
        }
        world.seen.accepts("status", &headers);
        let World { faults, jobs, patients_per_file, .. } = &mut *world;
        let Some(Some(job)) = jobs.get_mut(id) else {
            return outcome(StatusCode::NOT_FOUND, "not-found", "no such export");
        };
        if !faults.polls_script.is_empty() {
            let code = StatusCode::from_u16(faults.polls_script.remove(0)).unwrap_or(StatusCode::ACCEPTED);
            return match code {
                StatusCode::ACCEPTED => code.into_response(),
                StatusCode::NOT_FOUND => outcome(code, "not-found", "no such export, it seems"),
                StatusCode::SERVICE_UNAVAILABLE => {
                    let mut answer = outcome(code, "processing", "busy");
                    answer.headers_mut().insert("retry-after", HeaderValue::from_static("1"));
                    answer
                }
                code => outcome(code, "processing", "scripted"),
            };
        }
        let played = |count: &mut usize| std::mem::replace(count, count.saturating_sub(1)) > 0;
        if played(&mut faults.polls_missing) {
            return outcome(StatusCode::NOT_FOUND, "not-found", "no such export, it seems");
        }
        if played(&mut faults.polls_transient) {
            return outcome(StatusCode::INTERNAL_SERVER_ERROR, "exception", "the status cannot be told now");
        }
        if played(&mut faults.polls_bad_gateway) {
            return (StatusCode::BAD_GATEWAY, [("content-type", "text/html")], "<html>Bad Gateway</html>").into_response();
        }
        if played(&mut faults.polls_throttled) {
            let mut answer = outcome(StatusCode::TOO_MANY_REQUESTS, "throttled", "not so often");
            answer.headers_mut().insert("retry-after", HeaderValue::from_static("1"));
            return answer;
        }
        if faults.export_fails {
            let code = StatusCode::INTERNAL_SERVER_ERROR;
            let mut answer = outcome(if job.separate { StatusCode::OK } else { code }, "processing", "the export failed");
            if job.separate {
                answer.headers_mut().insert("x-export-status", HeaderValue::from_static("500"));
            }
            return answer;
        }
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
    let protected = locked(&world).tokens.registered.is_some();
    // Counting the population is work: not for the reactor.
    let made =
        compute(tracing::Span::none(), async move { manifest(&job, &faults, per_file, &base, (id, page), protected) }).await;
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
                answer.headers_mut().insert("x-export-status", HeaderValue::from_static(if still { "202" } else { "200" }));
            }
            answer
        }
        Err(_) => outcome(StatusCode::INTERNAL_SERVER_ERROR, "exception", "the manifest could not be drawn up"),
    }
}

async fn forget(State((world, _)): Shop, Path(id): Path<usize>) -> StatusCode {
    let mut world = locked(&world);
    if world.faults.deletes_refused > 0 {
        world.faults.deletes_refused -= 1;
        return StatusCode::SERVICE_UNAVAILABLE;
    }
    match world.jobs.get_mut(id) {
        Some(job @ Some(_)) => {
            *job = None;
            world.seen.deleted += 1;
            StatusCode::ACCEPTED
        }
        _ => StatusCode::NOT_FOUND,
    }
}
