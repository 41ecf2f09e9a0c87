//! The web: reads what the keepers know. It takes GET and HEAD only, for names that it was told of, and nothing that it
//! answers may be framed, sniffed, cached or scripted from elsewhere.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::{constant_time, digest};
use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use base64::Engine;
use chrono::Utc;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use secrecy::ExposeSecret;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};

use super::health::Health;
use super::status::{PipelineStatus, ServerStatus};
use super::{PipelineScheduler, Served, metrics, page};
use crate::error::Result;
use flow::{Cancellation, compute};

/// Connections at the same time; for one more the oldest has to go, so that whoever holds many keeps nobody out.
const CONNECTIONS: usize = 128;
/// Time that a request's head may take, and a connection may stand idle: whoever is slower is cut off.
const HEAD: Duration = Duration::from_secs(10);
/// Time that a connection may last.
const CONNECTION: Duration = Duration::from_secs(60);

/// Answers until `until` is pulled.
pub(super) async fn run(listener: TcpListener, served: Arc<Served>, until: Cancellation) -> Result<()> {
    let app = Router::new()
        .route("/", get(index))
        .route("/status.json", get(status))
        .route("/page.css", get(style))
        .route("/page.js", get(script))
        .route("/health", get(health))
        .route("/health/{pipeline}", get(health_of))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics_text))
        .layer(from_fn_with_state(served.clone(), guard))
        .with_state(served);
    let mut connections = JoinSet::new();
    let mut by_age: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        tokio::select! {
            () = until.cancelled() => return Ok(()),
            _ = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => {
                // One that is gone before it is taken is no reason to end; too many open files pass.
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let mut builder = hyper::server::conn::http1::Builder::new();
                builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(64 << 10);
                let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app.clone()));
                by_age.retain(|connection| !connection.is_finished());
                if by_age.len() >= CONNECTIONS
                    && let Some(oldest) = by_age.pop_front()
                {
                    oldest.abort();
                }
                by_age.push_back(connections.spawn(tokio::time::timeout(CONNECTION, connection)));
            }
        }
    }
}

type Shared = State<Arc<Served>>;

/// Returns true if a request's `Host` is one of ours: another that leads here is somebody else's page (DNS rebinding).
fn is_for_us(headers: &HeaderMap, served: &Served) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next().and_then(|host| host.to_str().ok()), hosts.next()) else { return false };
    is_ours(host, &served.settings.hosts)
}

fn is_ours(authority: &str, names: &[String]) -> bool {
    let split = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map(|(name, port)| (name, port.strip_prefix(':').unwrap_or(port))),
        None => Some(authority.rsplit_once(':').unwrap_or((authority, ""))),
    };
    let Some((name, port)) = split else { return false };
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return false;
    }
    // An address cannot be made to lead elsewhere.
    name.parse::<IpAddr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || names.iter().any(|known| known.eq_ignore_ascii_case(name))
}

/// Returns true if a page of another origin sent the request.
fn is_foreign(headers: &HeaderMap) -> bool {
    let text = |name: header::HeaderName| headers.get(name).and_then(|text| text.to_str().ok()).map(str::to_owned);
    let foreign_site = headers.get("sec-fetch-site").is_some_and(|site| site == "cross-site" || site == "same-site");
    // Following a link from elsewhere only shows the page.
    let navigates = headers.get("sec-fetch-mode").is_some_and(|mode| mode == "navigate");
    let own = text(header::HOST).map(|host| [format!("http://{host}"), format!("https://{host}")]);
    let foreign_origin = text(header::ORIGIN).is_some_and(|origin| own.is_none_or(|own| !own.contains(&origin)));
    foreign_origin || foreign_site && !navigates
}

/// Returns true if a request brings the token: as a bearer, or as the password that a browser asks for.
fn has_token(headers: &HeaderMap, token: &str) -> bool {
    let Some(text) = headers.get(header::AUTHORIZATION).and_then(|text| text.to_str().ok()) else { return false };
    let Some((scheme, rest)) = text.split_once(' ') else { return false };
    let brought = match scheme.to_ascii_lowercase().as_str() {
        "bearer" => rest.trim().as_bytes().to_vec(),
        "basic" => match base64::engine::general_purpose::STANDARD.decode(rest.trim()) {
            Ok(pair) => pair.splitn(2, |byte| *byte == b':').nth(1).unwrap_or_default().to_vec(),
            Err(_) => return false,
        },
        _ => return false,
    };
    // In constant time, and of equal length: hashes.
    let hash = |bytes: &[u8]| digest::digest(&digest::SHA256, bytes);
    constant_time::verify_slices_are_equal(hash(&brought).as_ref(), hash(token.as_bytes()).as_ref()).is_ok()
}

async fn guard(State(served): Shared, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let open = matches!(request.uri().path(), "/ready" | "/health") || request.uri().path().starts_with("/health/");
    let refused = if !matches!(*request.method(), Method::GET | Method::HEAD) {
        Some((StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are allowed\n"))
    } else if !is_for_us(headers, &served) {
        Some((StatusCode::MISDIRECTED_REQUEST, "not a name of this service; --host NAME adds one\n"))
    } else if is_foreign(headers) {
        Some((StatusCode::FORBIDDEN, "not for pages of other origins\n"))
    } else if let Some(token) = served.settings.token.as_ref().filter(|_| !open)
        && !has_token(headers, token.expose_secret())
    {
        Some((StatusCode::UNAUTHORIZED, "the token is missing or wrong\n"))
    } else {
        None
    };
    let mut answer = match refused {
        Some(refused) => refused.into_response(),
        None => next.run(request).await,
    };
    let unauthorized = answer.status() == StatusCode::UNAUTHORIZED;
    let headers = answer.headers_mut();
    let policy = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; base-uri 'none'; \
        form-action 'none'; frame-ancestors 'none'";
    let fixed: [(&'static str, &'static str); 6] = [
        ("content-security-policy", policy),
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", "no-store"),
        ("cross-origin-resource-policy", "same-origin"),
    ];
    for (name, value) in fixed {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if unauthorized {
        headers.insert(
            header::WWW_AUTHENTICATE,
            HeaderValue::from_static("Basic realm=\"fhirlake: the token is the password\""),
        );
    }
    answer
}

/// Returns the status of everything.
fn stand(served: &Served) -> ServerStatus {
    let now = Utc::now();
    ServerStatus {
        version: env!("CARGO_PKG_VERSION"),
        started: served.started,
        now,
        pipelines: served.schedulers.iter().map(|scheduler| PipelineStatus::of(scheduler, now)).collect(),
    }
}

/// Requests that may wait for a state at a time, and for how long.
static PLACES: Semaphore = Semaphore::const_new(16);
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers on a thread of its own: a state may be far away, and whoever waits for it must not hold up a run.
async fn answer(work: impl FnOnce() -> Response + Send + 'static) -> Response {
    let answered = tokio::time::timeout(PATIENCE, async {
        let place = PLACES.acquire().await;
        // The place is given back when the work ends, and not when nobody waits for it any more.
        let work = async move {
            let _place = place;
            work()
        };
        compute(tracing::Span::none(), work).await
    });
    match answered.await {
        Ok(Ok(response)) => response,
        Ok(Err(_)) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the state does not answer\n").into_response(),
    }
}

async fn index(State(served): Shared) -> Response {
    answer(move || {
        ([("content-type", "text/html; charset=utf-8")], page::page(&stand(&served)).into_string()).into_response()
    })
    .await
}

async fn status(State(served): Shared) -> Response {
    answer(move || {
        let body = serde_json::to_string(&stand(&served)).unwrap_or_default();
        ([("content-type", "application/json")], body).into_response()
    })
    .await
}

async fn style() -> Response {
    ([("content-type", "text/css; charset=utf-8")], include_str!("page.css")).into_response()
}

async fn script() -> Response {
    ([("content-type", "text/javascript; charset=utf-8")], include_str!("page.js")).into_response()
}

async fn metrics_text(State(served): Shared) -> Response {
    answer(move || {
        let text = metrics::text(&metrics::samples(served.schedulers.iter().map(|scheduler| &**scheduler)));
        ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
    })
    .await
}

fn answered((code, body): (u16, serde_json::Value)) -> Response {
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (code, [("content-type", "application/json")], body.to_string()).into_response()
}

async fn health(State(served): Shared) -> Response {
    answer(move || {
        let now = Utc::now();
        let health = |scheduler: &Arc<PipelineScheduler>| (scheduler.name(), scheduler.health(now));
        let all: Vec<(String, Health)> = served.schedulers.iter().map(health).collect();
        answered(Health::answer_of(&all))
    })
    .await
}

async fn health_of(State(served): Shared, Path(pipeline): Path<String>) -> Response {
    answer(move || match served.schedulers.iter().find(|scheduler| scheduler.name() == pipeline) {
        Some(scheduler) => answered(scheduler.health(Utc::now()).answer()),
        None => answered((404, json!({"status": "error", "message": "no such pipeline"}))),
    })
    .await
}

async fn ready(State(served): Shared) -> Response {
    match served.stop.is_cancelled() {
        false => answered((200, json!({"status": "ready"}))),
        true => answered((503, json!({"status": "stopping"}))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_requests_may_be_for() {
        let names = ["lake.example".to_owned()];
        for ours in
            ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080", "10.0.0.7", "lake.example:80", "Lake.Example"]
        {
            assert!(is_ours(ours, &names), "{ours}");
        }
        for foreign in ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", ""] {
            assert!(!is_ours(foreign, &names), "{foreign}");
        }
    }

    #[test]
    fn the_token_as_a_bearer_or_a_password() {
        let with = |text: &str| HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_str(text).unwrap())]);
        let basic = |pair: &str| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair));
        assert!(has_token(&with("Bearer s3cret"), "s3cret") && has_token(&with(&basic("any:s3cret")), "s3cret"));
        for wrong in ["Bearer s3cre", "Bearer ", "s3cret", "Digest s3cret", &basic("s3cret:"), &basic("s3cret")] {
            assert!(!has_token(&with(wrong), "s3cret"), "{wrong}");
        }
        assert!(!has_token(&HeaderMap::new(), "s3cret"));
    }
}
