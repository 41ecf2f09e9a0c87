//! HTTP as real servers need it: retries with back-off, `Retry-After` in every form that was met,
//! redirects by hand.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode};
use url::Url;

use super::auth::Auth;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::flow::{Board, Stop};
use crate::telemetry;

/// Redirects that are followed for one request.
const MAX_REDIRECTS: usize = 10;
/// How much of an error's body is read.
const ERROR_BODY: usize = 4096;

/// How the client behaves.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// How long a request is tried again before it fails.
    pub retry_for: Duration,
    /// First pause; doubled each time.
    pub min_pause: Duration,
    /// Longest pause that we choose, and longest that a server may ask for.
    pub max_pause: Duration,
    /// How long a connection, or a response that has begun, may stand still.
    pub stall: Duration,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            retry_for: Duration::from_secs(15 * 60),
            min_pause: Duration::from_millis(500),
            max_pause: Duration::from_secs(60),
            stall: Duration::from_secs(120),
        }
    }
}

/// A client of one FHIR server.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    auth: Auth,
    settings: HttpSettings,
    board: Board,
    stop: Stop,
}

/// One request, as often as it is tried.
pub(super) struct Ask<'a> {
    pub method: Method,
    pub url: &'a Url,
    pub headers: HeaderMap,
    /// Whether the token goes with it.
    pub with_token: bool,
    /// What it is, for errors: "the kick-off".
    pub what: &'a str,
}

/// A URL for messages: without its query, which may hold a secret.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

fn network(error: &reqwest::Error, what: &str) -> Error {
    // reqwest's own text repeats the URL, query string and all.
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let why = if error.is_timeout() { "timed out".to_owned() } else { cause.to_string() };
    Error::new(ErrorKind::Network, format!("{what}: {why}"))
}

impl Client {
    /// A client of the server at `base`.
    pub fn new(base: Url, auth: Auth, settings: HttpSettings, board: Board, stop: Stop) -> Result<Self> {
        let mut base = base;
        if !base.path().ends_with('/') {
            let path = format!("{}/", base.path());
            base.set_path(&path);
        }
        let http = reqwest::Client::builder()
            .user_agent(concat!("fhirlake/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(Duration::from_secs(30))
            .read_timeout(settings.stall)
            .build()
            .context(ErrorKind::Internal, "the HTTP client cannot be set up")?;
        Ok(Self { http, base, auth, settings, board, stop })
    }

    /// The FHIR base, with a slash at its end.
    pub fn base(&self) -> &Url {
        &self.base
    }

    /// The stop that ends waiting.
    pub(super) fn stop(&self) -> &Stop {
        &self.stop
    }

    /// The settings.
    pub(super) fn settings(&self) -> &HttpSettings {
        &self.settings
    }

    /// Gets a token and forgets it: a check that authentication works.
    pub async fn check_auth(&self) -> Result<()> {
        self.auth.header(&self.http, &self.base, false).await.map(|_| ())
    }

    /// GET `path` under the base once, for checks.
    pub async fn probe(&self, path: &str) -> Result<StatusCode> {
        let url = self.base.join(path).context(ErrorKind::Config, "not a URL")?;
        let accept = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static("application/fhir+json"))]);
        let ask = Ask { method: Method::GET, url: &url, headers: accept, with_token: false, what: "the server's metadata" };
        Ok(self.once(&ask, false).await?.status())
    }

    /// The body of a file, from its first byte.
    pub async fn open_file(&self, url: &Url, with_token: bool) -> Result<Response> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("application/fhir+ndjson, application/ndjson;q=0.9, */*;q=0.1"));
        headers.insert(reqwest::header::ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
        let ask = Ask { method: Method::GET, url, headers, with_token, what: "the download" };
        let response = self.send(&ask).await?;
        if response.status().is_success() { Ok(response) } else { Err(refusal(response, ask.what).await) }
    }

    /// Sends a request, and again while it fails for a reason that passes. Any answer that is not of that
    /// kind is the caller's to judge.
    pub(super) async fn send(&self, ask: &Ask<'_>) -> Result<Response> {
        let until = tokio::time::Instant::now() + self.settings.retry_for;
        let mut pause = self.settings.min_pause;
        let mut fresh_token = false;
        loop {
            let outcome = self.once(ask, fresh_token).await;
            let (wait, error) = match outcome {
                Ok(response)
                    if response.status() == StatusCode::UNAUTHORIZED && ask.with_token && !fresh_token && self.auth.renews() =>
                {
                    fresh_token = true;
                    continue;
                }
                Ok(response) if !passes(response.status()) => return Ok(response),
                Ok(response) => {
                    let asked = retry_after(response.headers());
                    (asked.map(|asked| asked.min(self.settings.max_pause)), refusal(response, ask.what).await)
                }
                Err(error) if error.kind() == ErrorKind::Network => (None, error),
                Err(error) => return Err(error),
            };
            let wait = wait.unwrap_or_else(|| jitter(pause));
            pause = (pause * 2).min(self.settings.max_pause);
            if tokio::time::Instant::now() + wait > until {
                return Err(error);
            }
            self.board.add(telemetry::RETRIES, &telemetry::NO_TYPE.into(), 1);
            tracing::warn!(%error, wait_seconds = wait.as_secs_f64(), "trying again");
            if self.stop.or(tokio::time::sleep(wait)).await.is_none() {
                return Err(Error::new(ErrorKind::Interrupted, format!("{}: stopped while waiting", ask.what)));
            }
        }
    }

    /// One try, redirects followed by hand: the token goes to its own origin only (T12).
    async fn once(&self, ask: &Ask<'_>, fresh_token: bool) -> Result<Response> {
        let mut url = ask.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.http.request(ask.method.clone(), url.clone()).headers(ask.headers.clone());
            if ask.with_token
                && url.origin() == self.base.origin()
                && let Some(token) = self.auth.header(&self.http, &self.base, fresh_token).await?
            {
                request = request.header(AUTHORIZATION, token);
            }
            let sent = self.stop.or(request.send()).await;
            let sent = sent.ok_or_else(|| Error::new(ErrorKind::Interrupted, format!("{}: stopped", ask.what)))?;
            let response = sent.map_err(|error| network(&error, ask.what).at(shown(&url)))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|to| to.to_str().ok());
            let to = location
                .and_then(|to| url.join(to).ok())
                .ok_or_else(|| Error::new(ErrorKind::Server, format!("{}: a redirect without a usable Location", ask.what)))?;
            if !matches!(to.scheme(), "http" | "https") {
                return Err(Error::new(ErrorKind::Server, format!("{}: a redirect to scheme {}", ask.what, to.scheme())));
            }
            url = to;
        }
        Err(Error::new(ErrorKind::Server, format!("{}: more than {MAX_REDIRECTS} redirects", ask.what)))
    }
}

/// Whether an answer of this status may be another one soon.
fn passes(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

fn jitter(pause: Duration) -> Duration {
    // Full jitter between half and all of it, from a UUID's random bits: spreads clients, needs no crate.
    let random = uuid::Uuid::new_v4().as_u128() as u32;
    pause / 2 + pause.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0)
}

/// The error that a refusal stands for, with the server's own words.
pub(super) async fn refusal(response: Response, what: &str) -> Error {
    let status = response.status();
    let kind = match status.as_u16() {
        401 | 403 => ErrorKind::Auth,
        _ => ErrorKind::Server,
    };
    let url = response.url().clone();
    let body = first_bytes(response).await;
    let words = server_words(&body);
    let place = shown(&url);
    let words = if words.is_empty() { String::new() } else { format!(": {words}") };
    Error::new(kind, format!("{what}: the server answered {status}{words}")).at(place)
}

async fn first_bytes(mut response: Response) -> Vec<u8> {
    let mut body = Vec::new();
    while body.len() < ERROR_BODY
        && let Ok(Some(bytes)) = response.chunk().await
    {
        body.extend_from_slice(&bytes);
    }
    body.truncate(ERROR_BODY);
    body
}

/// What an error's body says: an OperationOutcome's diagnostics, or the beginning of its text.
pub(super) fn server_words(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    if let Ok(json) = serde_json::from_slice::<serde_json::Value>(body) {
        let issues = json.get("issue").and_then(|issues| issues.as_array());
        let words = issues.into_iter().flatten().filter_map(|issue| {
            let text = issue.get("diagnostics").or_else(|| issue.get("details").and_then(|details| details.get("text")));
            text.and_then(|text| text.as_str()).or_else(|| issue.get("code").and_then(|code| code.as_str()))
        });
        let words: Vec<&str> = words.collect();
        if !words.is_empty() {
            return words.join("; ").chars().take(500).collect();
        }
    }
    let one_line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    one_line.chars().take(200).collect()
}

/// The pause that `Retry-After` asks for, from now.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?;
    let wait = parse_retry_after(text, SystemTime::now());
    if wait.is_none() {
        tracing::warn!(retry_after = text, "Retry-After is neither seconds nor a date; it is passed over");
    }
    wait
}

/// Reads `Retry-After`: seconds, an HTTP-date, or the epoch seconds and milliseconds that some servers send.
pub fn parse_retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(number) = text.parse::<f64>() {
        if !number.is_finite() || number < 0.0 {
            return Some(Duration::ZERO);
        }
        let at = |seconds: f64| UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(seconds).ok()?);
        return match number {
            // Nobody asks for 30 years: it is a time.
            n if n > 1e12 => Some(at(n / 1e3)?.duration_since(now).unwrap_or_default()),
            n if n > 1e9 => Some(at(n)?.duration_since(now).unwrap_or_default()),
            n => Duration::try_from_secs_f64(n).ok(),
        };
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    // S3 and the deviations of a reference server.
    #[test]
    fn retry_after_in_every_form() {
        let now = UNIX_EPOCH + Duration::from_secs(1_795_386_390);
        let seconds = |text: &str| parse_retry_after(text, now).map(|wait| wait.as_secs());
        assert_eq!(seconds("120"), Some(120));
        assert_eq!(seconds("-5"), Some(0));
        assert_eq!(seconds("1795386395"), Some(5), "epoch seconds");
        assert_eq!(seconds("1795386394073"), Some(4), "epoch milliseconds");
        assert_eq!(seconds(&httpdate::fmt_http_date(now + Duration::from_secs(30))), Some(30));
        assert_eq!(seconds(&httpdate::fmt_http_date(now - Duration::from_secs(30))), Some(0));
        assert_eq!(seconds("soon"), None);
    }

    #[test]
    fn the_servers_words() {
        let outcome = br#"{"resourceType":"OperationOutcome","issue":[{"code":"x","diagnostics":"Group unknown"}]}"#;
        assert_eq!(server_words(outcome), "Group unknown");
        assert_eq!(server_words(b"<html>\n <b>Bad</b>"), "<html> <b>Bad</b>");
    }
}
