//! The way of a request to an honest handler: the gate, the notes for tests, and the faults.
//!
//! A handler answers as the guide asks. A fault either answers in its place ([`instead`]) or distorts what it answered
//! ([`distort`]).

use std::collections::HashMap;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use chrono::Utc;
use serde_json::Value;
use std::time::Duration;
use tokio_stream::StreamExt;

use crate::faults::Faults;
use crate::manifest;
use crate::server::{Shop, World, outcome};

/// Bytes of a request or of a manifest that are read.
const MOST: usize = 64 << 20;

/// Kind of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    KickOff,
    /// The status of an export, or a page of its manifest.
    Status(usize),
    Delete,
    /// A file of an export, at the server's own origin or at the other one.
    File {
        job: usize,
        name: String,
        is_elsewhere: bool,
    },
    Binary,
    Token,
    Discovery,
    Other,
}

impl Call {
    fn of(request: &Request) -> Self {
        let path = request.uri().path();
        let file = |rest: &str, is_elsewhere| {
            let (job, name) = rest.split_once('/')?;
            Some(Self::File { job: job.parse().ok()?, name: name.to_owned(), is_elsewhere })
        };
        let known = || match path.strip_prefix("/fhir/") {
            None => file(path.strip_prefix("/elsewhere/")?, true),
            Some("token") => Some(Self::Token),
            Some(".well-known/smart-configuration") => Some(Self::Discovery),
            Some(below) if below.ends_with("$export") => Some(Self::KickOff),
            Some(below) => {
                if let Some(job) = below.strip_prefix("jobs/") {
                    let job = job.split('/').next().and_then(|job| job.parse().ok())?;
                    return Some(if request.method() == Method::DELETE { Self::Delete } else { Self::Status(job) });
                }
                below
                    .strip_prefix("files/")
                    .map_or_else(|| below.starts_with("Binary/").then_some(Self::Binary), |rest| file(rest, false))
            }
        };
        known().unwrap_or(Self::Other)
    }

    /// Returns true for what a token is needed for where clients are registered.
    fn is_protected(&self) -> bool {
        match self {
            Self::KickOff | Self::Status(_) | Self::Binary => true,
            Self::File { is_elsewhere, .. } => !is_elsewhere,
            Self::Delete | Self::Token | Self::Discovery | Self::Other => false,
        }
    }
}

/// The parameters of a kick-off.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parameters(pub HashMap<String, String>);

/// Refuses what needs a token and has none, notes what was asked, and plays the faults.
pub(crate) async fn pass(State((shared, base)): Shop, request: Request, next: Next) -> Response {
    let call = Call::of(&request);
    let (mut parts, body) = request.into_parts();
    let (parameters, body) = match call {
        Call::KickOff => {
            let Ok(body) = to_bytes(body, MOST).await else { return StatusCode::PAYLOAD_TOO_LARGE.into_response() };
            let parameters = Parameters(parameters(parts.uri.query().unwrap_or_default(), &body));
            parts.extensions.insert(parameters.clone());
            (parameters, Body::empty())
        }
        _ => (Parameters::default(), body),
    };
    let (instead, faults) = {
        let mut world = shared.lock();
        if call.is_protected() && !world.tokens.allow(&parts.headers) {
            return outcome(StatusCode::UNAUTHORIZED, "login", "no valid token");
        }
        if call == Call::KickOff && world.faults.post_only && parts.method != Method::POST {
            return outcome(StatusCode::METHOD_NOT_ALLOWED, "not-supported", "the kick-off is a POST");
        }
        note(&mut world, &call, &parameters, &parts.headers);
        let query = parts.uri.query().unwrap_or_default();
        (instead(&mut world, &base, &call, &parameters, query), world.faults.clone())
    };
    let answer = match instead {
        Some(answer) => answer,
        None => {
            let answer = next.run(Request::from_parts(parts, body)).await;
            let is_broken = match call {
                Call::KickOff if answer.status() == StatusCode::ACCEPTED => {
                    played(&mut shared.lock().faults.kickoffs_lost)
                }
                Call::File { .. } if answer.status().is_success() => played(&mut shared.lock().faults.files_cut),
                _ => false,
            };
            distort(&faults, &call, answer, is_broken).await
        }
    };
    match call {
        Call::Token | Call::Discovery => dated(answer, faults.clock_ahead),
        _ => answer,
    }
}

/// Returns the parameters of a GET's query, or of a POST's `Parameters`; what is repeated is joined by commas, but for
/// `_typeFilter`, whose values may have some.
fn parameters(query: &str, body: &[u8]) -> HashMap<String, String> {
    let mut all: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let json: Value = serde_json::from_slice(body).unwrap_or_default();
    for parameter in json.get("parameter").and_then(Value::as_array).into_iter().flatten() {
        let name = parameter.get("name").and_then(Value::as_str).unwrap_or_default();
        let value = parameter
            .as_object()
            .into_iter()
            .flatten()
            .find(|(key, _)| key.starts_with("value"))
            .map(|(_, value)| value);
        let value = match value {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Object(reference)) => {
                reference.get("reference").and_then(Value::as_str).unwrap_or_default().to_owned()
            }
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

/// Notes a request for tests.
fn note(world: &mut World, call: &Call, parameters: &Parameters, headers: &HeaderMap) {
    let seen = &mut world.seen;
    match call {
        Call::KickOff => {
            seen.kickoffs.push(parameters.0.clone());
            seen.accepts("kick-off", headers);
            seen.prefer.push(headers.get("prefer").and_then(|text| text.to_str().ok()).unwrap_or_default().to_owned());
        }
        Call::Status(_) => seen.accepts("status", headers),
        Call::File { is_elsewhere, .. } => {
            if !is_elsewhere {
                seen.accepts("file", headers);
            } else if headers.contains_key(header::AUTHORIZATION) {
                seen.leaked += 1;
            }
        }
        _ => {}
    }
}

/// Returns true if a fault is played once more, and counts it.
fn played(left: &mut usize) -> bool {
    std::mem::replace(left, left.saturating_sub(1)) > 0
}

/// Returns what a fault answers in place of the handler.
fn instead(world: &mut World, base: &str, call: &Call, parameters: &Parameters, query: &str) -> Option<Response> {
    let World { faults, jobs, .. } = world;
    match call {
        Call::KickOff => {
            if played(&mut faults.kickoffs_throttled) {
                let wait = faults.kickoff_retry_after.clone().unwrap_or_else(|| "1".to_owned());
                return Some(after(outcome(StatusCode::TOO_MANY_REQUESTS, "throttled", "one export at a time"), &wait));
            }
            let forbidden = faults.forbidden_type.as_ref()?;
            let requested = parameters.0.get("_type")?;
            let is_forbidden = requested.split(',').any(|name| name == forbidden);
            is_forbidden.then(|| outcome(StatusCode::FORBIDDEN, "forbidden", "not for this client"))
        }
        Call::Status(id) => {
            let job = jobs.get(*id)?.as_ref()?;
            if !faults.polls_script.is_empty() {
                let code = StatusCode::from_u16(faults.polls_script.remove(0)).unwrap_or(StatusCode::ACCEPTED);
                return Some(match code {
                    StatusCode::ACCEPTED => code.into_response(),
                    StatusCode::NOT_FOUND => outcome(code, "not-found", "no such export, it seems"),
                    StatusCode::SERVICE_UNAVAILABLE => after(outcome(code, "processing", "busy"), "1"),
                    code => outcome(code, "processing", "scripted"),
                });
            }
            if played(&mut faults.polls_missing) {
                return Some(outcome(StatusCode::NOT_FOUND, "not-found", "no such export, it seems"));
            }
            if played(&mut faults.polls_transient) {
                return Some(outcome(StatusCode::INTERNAL_SERVER_ERROR, "exception", "the status cannot be told now"));
            }
            if played(&mut faults.polls_bad_gateway) {
                let page = [(header::CONTENT_TYPE, "text/html")];
                return Some((StatusCode::BAD_GATEWAY, page, "<html>Bad Gateway</html>").into_response());
            }
            if played(&mut faults.polls_throttled) {
                return Some(after(outcome(StatusCode::TOO_MANY_REQUESTS, "throttled", "not so often"), "1"));
            }
            faults.export_fails.then(|| {
                let code = if job.separate { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR };
                let mut answer = outcome(code, "processing", "the export failed");
                if job.separate {
                    answer.headers_mut().insert("x-export-status", HeaderValue::from_static("500"));
                }
                answer
            })
        }
        Call::Delete => played(&mut faults.deletes_refused).then(|| StatusCode::SERVICE_UNAVAILABLE.into_response()),
        Call::Token => played(&mut faults.tokens_refused).then(|| StatusCode::BAD_REQUEST.into_response()),
        Call::File { job, name, is_elsewhere } => {
            if faults.redirect && !is_elsewhere {
                let separator = if query.is_empty() { "" } else { "&" };
                let to = format!("{}/{job}/{name}?{query}{separator}signature=secret", manifest::elsewhere(base));
                return Some((StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, to)]).into_response());
            }
            let is_missing =
                faults.missing_type.as_deref() == name.split('.').next() || Faults::names(&faults.missing_files, name);
            let is_expired = faults.links_end && links_of(query) < 2;
            if jobs.get(*job).is_none_or(Option::is_none) || !(is_missing || is_expired || faults.files_unavailable > 0)
            {
                return None;
            }
            world.seen.requested(*job, name);
            if is_expired {
                let body = ([(header::CONTENT_TYPE, "application/xml")], "<Error>Request has expired</Error>");
                return Some((StatusCode::FORBIDDEN, body).into_response());
            }
            if played(&mut faults.files_unavailable) {
                return Some((StatusCode::SERVICE_UNAVAILABLE, "try again").into_response());
            }
            Some(outcome(StatusCode::NOT_FOUND, "not-found", "no such file"))
        }
        Call::Binary | Call::Discovery | Call::Other => None,
    }
}

/// The manifest that gave a link out, by what stands behind its question mark.
fn links_of(query: &str) -> usize {
    let pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs.into_iter().find(|(name, _)| name == "expires").and_then(|(_, links)| links.parse().ok()).unwrap_or(0)
}

/// Distorts what a handler answered. With `is_broken` the answer to a kick-off is lost, and a file is cut.
async fn distort(faults: &Faults, call: &Call, answer: Response, is_broken: bool) -> Response {
    match call {
        // A body that fails before its first byte takes the head with it.
        Call::KickOff if is_broken => {
            let nothing = tokio_stream::once(Err::<bytes::Bytes, _>(std::io::Error::other("lost")));
            Response::new(Body::from_stream(nothing))
        }
        Call::Status(_) if is_json(&answer) => {
            let (parts, body) = answer.into_parts();
            let body = to_bytes(body, MOST).await.unwrap_or_default();
            let mut manifest: Value = serde_json::from_slice(&body).unwrap_or_default();
            manifest::distort(&mut manifest, faults);
            let mut answer = Response::from_parts(parts, Body::from(manifest.to_string()));
            answer.headers_mut().remove(header::CONTENT_LENGTH);
            answer
        }
        Call::File { name, .. } if answer.status().is_success() => {
            let hangs = Faults::names(&faults.hanging_files, name);
            if !is_broken && !hangs && faults.slow.is_none() {
                return answer;
            }
            let (parts, body) = answer.into_parts();
            Response::from_parts(parts, Body::from_stream(distorted(body, faults.slow, is_broken, hangs)))
        }
        _ => answer,
    }
}

fn is_json(answer: &Response) -> bool {
    answer.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes() == b"application/json")
}

type Piece = Result<bytes::Bytes, axum::Error>;

/// Returns a file's body with a pause before each piece, broken off in the middle of its first piece, or hanging there.
fn distorted(body: Body, slow: Option<Duration>, is_cut: bool, hangs: bool) -> impl tokio_stream::Stream<Item = Piece> {
    /// Next piece of a body.
    enum Next {
        OfBody,
        BreakOff,
        Hang,
        End,
    }
    futures::stream::unfold((body.into_data_stream(), Next::OfBody), move |(mut body, next)| async move {
        match next {
            Next::OfBody => {}
            Next::BreakOff => {
                // Long enough for what was sent to be on its way.
                tokio::time::sleep(Duration::from_millis(50)).await;
                return Some((Err(axum::Error::new(std::io::Error::other("cut"))), (body, Next::End)));
            }
            // Until the client goes away, which drops this.
            Next::Hang => std::future::pending().await,
            Next::End => return None,
        }
        let piece = body.next().await?;
        if let Some(pause) = slow {
            tokio::time::sleep(pause).await;
        }
        match piece {
            Ok(mut bytes) if is_cut && bytes.len() > 1 || hangs => {
                bytes.truncate(bytes.len() / 2);
                Some((Ok(bytes), (body, if is_cut { Next::BreakOff } else { Next::Hang })))
            }
            piece => Some((piece, (body, Next::OfBody))),
        }
    })
}

/// Adds a `Retry-After`.
fn after(mut answer: Response, wait: &str) -> Response {
    if let Ok(wait) = HeaderValue::from_str(wait) {
        answer.headers_mut().insert(header::RETRY_AFTER, wait);
    }
    answer
}

/// Adds a `Date` by the server's clock: hyper leaves one that is there alone.
fn dated(mut answer: Response, ahead: i64) -> Response {
    let seconds = u64::try_from(Utc::now().timestamp() + ahead).unwrap_or(0);
    let time = std::time::UNIX_EPOCH + Duration::from_secs(seconds);
    if let Ok(date) = HeaderValue::from_str(&httpdate::fmt_http_date(time)) {
        answer.headers_mut().insert(header::DATE, date);
    }
    answer
}
