//! HTTP as real servers need it: retries with back-off, `Retry-After` in every form that was met,
//! redirects by hand.

pub(crate) mod concurrency;
pub mod content_encoding;
pub(crate) mod egress;
pub(crate) mod read_to_limit;
pub(crate) mod settings;
pub(crate) mod tls;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap, HeaderValue, IF_RANGE, LOCATION, RANGE,
    RETRY_AFTER,
};
use reqwest::{Method, Response, StatusCode};
use serde_json::Value;
use url::Url;

use crate::capabilities::Capabilities;
use crate::export::response::{LONGEST_WAIT, Resume, file_refusal, is_whole, parse_retry_after, refusal};
use crate::http::concurrency::AdaptiveConcurrency;
use crate::http::egress::SsrfGuard;
use crate::http::read_to_limit::{Bounds, METADATA, whole};
use crate::http::settings::HttpSettings;
use crate::metrics;
use crate::smart::auth::{Auth, Granted};
use flow::{Cancellation, Counters, random_fraction};
use foundation::error::{Context, Error, ErrorKind, Result};

/// Longest pause between tries that a server did not ask for itself.
const OUR_LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Pauses that a server asks for and that go beyond the time for trouble, for one request.
const DEADLINE_EXTENSIONS: u32 = 3;
/// Redirects that are followed for one request.
const MAX_REDIRECTS: usize = 10;
/// Refused tokens that are renewed for one request.
const MAX_REFUSALS: usize = 3;

/// A client of one FHIR server.
#[derive(Debug, Clone)]
pub struct Client {
    web: Web,
    auth: Auth,
    settings: HttpSettings,
    counters: Counters,
    pace: AdaptiveConcurrency,
}

/// Client that sends requests.
#[derive(Debug, Clone)]
pub(crate) struct Web {
    pub http: reqwest::Client,
    /// The FHIR base, with a slash at its end.
    pub base: Url,
    pub reach: SsrfGuard,
    pub stop: Cancellation,
}

/// One request, as often as it is tried.
pub(crate) struct RequestSpec<'a> {
    pub method: Method,
    pub url: &'a Url,
    pub headers: HeaderMap,
    /// A body of JSON, where there is one.
    pub body: Option<&'a Value>,
    /// True if the token goes with it.
    pub with_token: bool,
    /// Which answers the caller judges though they may be others soon.
    pub retry_policy: RetryPolicy,
    /// Name of the request, for errors: "the kick-off".
    pub what: &'a str,
    /// Hosts that redirects may lead to; anywhere by default.
    pub may_go: Option<&'a (dyn Fn(&Url) -> bool + Sync)>,
    /// True if it is a file of the export: trouble with one slows all of them.
    pub is_file: bool,
    /// Set where a request may have reached the server, and its answer did not reach us.
    pub lost: Option<&'a AtomicBool>,
}

/// Answers that are not retried by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RetryPolicy {
    /// Those that will not be others soon.
    Final,
    /// Throttling that asks for a longer pause than this, too.
    Throttling(Duration),
    /// All: whoever asks comes back anyway.
    All,
    /// All, and a connection that fails: one try is enough.
    Once,
}

impl<'a> RequestSpec<'a> {
    /// A GET with the token, retried while it fails for a transient reason.
    pub(crate) fn get(url: &'a Url, accept: &'static str, what: &'a str) -> Self {
        let accept = Some(accept).filter(|accept| !accept.is_empty());
        let headers = accept.map(|accept| (ACCEPT, HeaderValue::from_static(accept))).into_iter().collect();
        let (body, may_go, lost) = (None, None, None);
        let retry_policy = RetryPolicy::Final;
        Self {
            method: Method::GET,
            url,
            headers,
            body,
            with_token: true,
            retry_policy,
            what,
            may_go,
            is_file: false,
            lost,
        }
    }
}

impl RequestSpec<'_> {
    /// Returns its URL, for messages. The link of an attachment is an element of a resource: only its host is told.
    fn shown(&self, url: &Url) -> String {
        match self.may_go {
            Some(_) => format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default()),
            None => shown(url),
        }
    }

    /// The error that a refusal stands for: with the server's own words, where they cannot be about a file's content.
    async fn refused(&self, response: Response) -> Error {
        match self.is_file || self.may_go.is_some() {
            true => {
                let place = self.shown(response.url());
                file_refusal(response, self.what, place).await
            }
            false => refusal(response, self.what).await,
        }
    }
}

/// A URL for messages: without its query and password, which are secrets, and no longer than a line.
pub fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Only what has no host refuses these.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    let text = url.to_string();
    match text.char_indices().nth(LONGEST_SHOWN) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

/// Letters of a URL in a message.
const LONGEST_SHOWN: usize = 300;

pub(crate) fn network(error: &reqwest::Error, what: &str) -> Error {
    if let Some(fault) = tls::fault(error, what) {
        return fault;
    }
    let why = if error.is_timeout() { "timed out".to_owned() } else { tls::root(error).to_string() };
    Error::new(ErrorKind::Network, format!("{what}: {why}"))
}

impl Client {
    /// A client of the server at `base`.
    pub fn new(base: Url, auth: Auth, settings: HttpSettings, counters: Counters, stop: Cancellation) -> Result<Self> {
        let mut base = base;
        if !base.path().ends_with('/') {
            let path = format!("{}/", base.path());
            base.set_path(&path);
        }
        let reach = SsrfGuard::new(&base, settings.named_hosts.iter().cloned());
        let builder = reqwest::Client::builder();
        let builder = if settings.no_proxy { builder.no_proxy() } else { builder };
        let http = settings
            .tls
            .set_up(builder)
            .dns_resolver(reach.clone())
            .user_agent(settings.user_agent)
            // All answers are unpacked; a file that goes on at a byte asks for it as it is.
            .default_headers(HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("gzip, deflate"))]))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(Duration::from_secs(30))
            .read_timeout(settings.stall)
            .build()
            .map_err(|error| {
                let why = format!("the HTTP client cannot be set up: {}", tls::root(&error));
                let hint = "the system's CA certificates are read from SSL_CERT_FILE, SSL_CERT_DIR or the package \
                        ca-certificates";
                Error::new(ErrorKind::Config, why).with_hint(hint)
            })?;
        let pace = AdaptiveConcurrency::new(settings.downloads);
        Ok(Self { web: Web { http, base, reach, stop }, auth, settings, counters, pace })
    }

    /// The FHIR base, with a slash at its end.
    pub fn base(&self) -> &Url {
        &self.web.base
    }

    /// The settings.
    pub fn settings(&self) -> &HttpSettings {
        &self.settings
    }

    /// A body that is read whole.
    pub(crate) async fn whole(&self, response: Response, bounds: Bounds, what: &str) -> Result<Vec<u8>> {
        whole(response, bounds, &self.web.stop, what).await
    }

    /// Returns the number of files may be read at a time now.
    pub fn pace(&self) -> &AdaptiveConcurrency {
        &self.pace
    }

    /// Gets a token and tells what came with it, without it; `None` where none is needed.
    pub async fn check_auth(&self) -> Result<Option<Granted>> {
        self.auth.check(&self.web).await
    }

    /// Returns the server's CapabilityStatement: asked once, without a token.
    pub async fn capabilities(&self) -> Result<Capabilities> {
        let url = self.web.base.join("metadata").context(ErrorKind::Config, "not a URL")?;
        let what = "the server's metadata";
        let ask = RequestSpec { with_token: false, ..RequestSpec::get(&url, "application/fhir+json", what) };
        let response = self.once(&ask, None).await?.0;
        if !response.status().is_success() {
            return Err(refusal(response, what).await);
        }
        let body = self.whole(response, METADATA, what).await?;
        Ok(Capabilities::new(serde_json::from_slice(&body).unwrap_or_default()))
    }

    /// The body of a file: from its first byte, or from `resume`'s on where it is the same file still.
    pub async fn open_file(&self, url: &Url, with_token: bool, resume: Option<&Resume>) -> Result<Response> {
        let accept = "application/fhir+ndjson, application/ndjson;q=0.9, */*;q=0.1";
        let mut ask = RequestSpec { with_token, is_file: true, ..RequestSpec::get(url, accept, "the download") };
        if let Some(resume) = resume {
            let range = HeaderValue::from_str(&format!("bytes={}-", resume.from));
            ask.headers.insert(RANGE, range.context(ErrorKind::Internal, "a range")?);
            ask.headers.insert(IF_RANGE, resume.validator.clone());
            // The bytes that were counted were not packed.
            ask.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        let mut response = self.send(&ask).await?;
        let status = response.status();
        if matches!(status.as_u16(), 400 | 403)
            && self.token_goes_to(&ask, url)
            && url.origin() != self.web.base.origin()
        {
            // A signed URL of a store refuses a second authorization beside its own.
            if self.deviates("a file is said to need the token, and its host refuses it") {
                tracing::warn!(%status, "another host rejected the token; its files are requested without it");
            }
            ask.with_token = false;
            response = self.send(&ask).await?;
        }
        if response.status().is_success() { Ok(response) } else { Err(ask.refused(response).await) }
    }

    /// The body of what an Attachment links to, as `content_type` where it says one.
    /// Redirects are followed to where `may_go` allows.
    pub async fn open_attachment(
        &self,
        url: &Url,
        with_token: bool,
        content_type: &str,
        may_go: &(dyn Fn(&Url) -> bool + Sync),
    ) -> Result<Response> {
        let mut ask =
            RequestSpec { with_token, may_go: Some(may_go), ..RequestSpec::get(url, "*/*", "the attachment") };
        ask.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
        if let Ok(accept) = HeaderValue::from_str(&format!("{content_type}, */*;q=0.1")).map_err(drop)
            && !content_type.is_empty()
        {
            ask.headers.insert(ACCEPT, accept);
        }
        let response = self.send(&ask).await?;
        match (response.status(), is_whole(&response)) {
            (StatusCode::NO_CONTENT, _) | (_, false) => Err(ask.refused(response).await),
            _ => Ok(response),
        }
    }

    /// Sends a request, and again while it fails for a transient reason. Any answer that is not of that
    /// kind is the caller's to judge.
    pub(crate) async fn send(&self, ask: &RequestSpec<'_>) -> Result<Response> {
        // A pause that the caller is ready to make has its time beside that for other trouble.
        let most = if let RetryPolicy::Throttling(most) = ask.retry_policy { most } else { Duration::ZERO };
        let mut until = now_and(self.settings.retry_for);
        let throttled_until = now_and(self.settings.retry_for.max(most));
        let mut deadline_extensions = DEADLINE_EXTENSIONS;
        let mut pause = self.settings.min_pause;
        let mut refused: Option<HeaderValue> = None;
        let mut refusals = 0;
        loop {
            let outcome = self.once(ask, refused.as_ref()).await;
            let (wait, error) = match outcome {
                // A token may end between two tries, so one renewal is not always enough; a server that takes none is.
                Ok((response, Some(token)))
                    if response.status() == StatusCode::UNAUTHORIZED
                        && self.auth.renews()
                        && refusals < MAX_REFUSALS =>
                {
                    (refused, refusals) = (Some(token), refusals + 1);
                    continue;
                }
                Ok((response, _)) if response.status() == StatusCode::UNAUTHORIZED && self.auth.is_none() => {
                    let hint = "the server requires a token: set source.auth (`fhirlake keygen` generates a key)";
                    return Err(ask.refused(response).await.with_hint(hint));
                }
                Ok((response, None)) if response.status() == StatusCode::UNAUTHORIZED && ask.with_token => {
                    let hint = match self.is_plain_link(response.url()) {
                        true => PLAIN_LINK,
                        false => {
                            "the token goes to the server's own origin only; source.token_origins names others that \
                                may have it"
                        }
                    };
                    return Err(ask.refused(response).await.with_hint(hint));
                }
                Ok((response, _))
                    if !self.is_transient(response.status(), ask.is_file)
                        || matches!(ask.retry_policy, RetryPolicy::All | RetryPolicy::Once) =>
                {
                    return Ok(response);
                }
                Ok((response, _)) => {
                    // "At once" is not meant: it would be a busy loop.
                    let requested =
                        self.retry_after(response.headers()).filter(|requested| *requested >= self.settings.min_pause);
                    if let RetryPolicy::Throttling(most) = ask.retry_policy
                        && response.status() == StatusCode::TOO_MANY_REQUESTS
                        && (requested.unwrap_or(most) >= most || now_and(requested.unwrap_or(pause)) > throttled_until)
                    {
                        return Ok(response);
                    }
                    if ask.lost.is_some() && response.status() == StatusCode::TOO_MANY_REQUESTS {
                        until = until.max(throttled_until);
                    }
                    if let Some(lost) = ask.lost
                        && matches!(response.status().as_u16(), 502 | 504)
                    {
                        // The gateway does not know what came of it.
                        lost.store(true, Ordering::Relaxed);
                    }
                    if ask.is_file {
                        self.pace.decrease();
                    }
                    let requested = requested.map(|requested| requested.min(self.settings.max_pause.max(most)));
                    // A pause that the server itself asks for may be longer than the time for trouble.
                    if let Some(requested) = requested.filter(|requested| now_and(*requested) > until)
                        && deadline_extensions > 0
                    {
                        deadline_extensions -= 1;
                        until = now_and(requested) + self.settings.retry_for / 2;
                    }
                    (requested, ask.refused(response).await)
                }
                Err(error) if error.is_transient() && ask.retry_policy != RetryPolicy::Once => (None, error),
                Err(error) => return Err(error),
            };
            let wait = wait.unwrap_or_else(|| jitter(pause));
            pause = (pause * 2).min(self.settings.max_pause).min(OUR_LONGEST_PAUSE);
            if now_and(wait) > until {
                return Err(error);
            }
            self.counters.add(metrics::RETRIES, &metrics::NO_LABEL.into(), 1);
            let left = (until - tokio::time::Instant::now()).as_secs();
            tracing::warn!(%error, wait_seconds = wait.as_secs_f64(), gives_up_in_seconds = left, "trying again");
            if self.web.stop.or(tokio::time::sleep(wait)).await.is_none() {
                return Err(Error::new(ErrorKind::Interrupted, format!("{}: stopped while waiting", ask.what)));
            }
        }
    }

    /// The pause that `Retry-After` asks for, from now.
    pub(crate) fn retry_after(&self, headers: &HeaderMap) -> Option<Duration> {
        let text = headers.get(RETRY_AFTER)?.to_str().ok()?;
        // A date is by the server's clock, which its answer tells.
        let date = headers.get(DATE).and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
        let by_date = httpdate::parse_http_date(text.trim()).is_ok();
        let wait = parse_retry_after(text, date.filter(|_| by_date).unwrap_or_else(SystemTime::now));
        let deviation = match (wait, text.trim().parse::<f64>()) {
            (None, _) => Some("Retry-After is neither seconds nor a date"),
            (_, Ok(number)) if number > LONGEST_WAIT => Some("Retry-After is a time since the epoch"),
            (_, Ok(number)) if number < 0.0 => Some("Retry-After is negative"),
            _ => None,
        };
        if let Some(how) = deviation {
            self.deviates(how);
        }
        wait
    }

    pub(crate) fn stop(&self) -> &Cancellation {
        &self.web.stop
    }

    /// Counts a way in which the server differs from what the guide asks. Returns whether this is the first time in the
    /// run: the log gets one line, and the report the number.
    pub(crate) fn deviates(&self, how: &str) -> bool {
        self.counters.add(metrics::DEVIATIONS, &how.into(), 1) == 0
    }

    /// Returns true if an answer of this status may be another one soon.
    pub(crate) fn is_transient(&self, status: StatusCode, is_file: bool) -> bool {
        let code = status.as_u16();
        matches!(code, 408 | 425 | 429 | 500 | 502 | 503 | 504) || is_file && self.settings.retry_status.contains(&code)
    }

    /// T12, F1, F2: the token goes where it is asked for, and to the server's own origin or those that were named only.
    fn token_goes_to(&self, ask: &RequestSpec<'_>, url: &Url) -> bool {
        let origin = url.origin();
        ask.with_token && (origin == self.web.base.origin() || self.settings.token_origins.contains(&origin))
    }

    /// Returns true if a server with an `https` base URL links to itself by `http`, as one behind a TLS proxy may.
    fn is_plain_link(&self, url: &Url) -> bool {
        url.scheme() == "http" && self.web.base.scheme() == "https" && url.host_str() == self.web.base.host_str()
    }

    /// One try, redirects followed by hand: the answer, and the token that went with the last request.
    async fn once(
        &self,
        ask: &RequestSpec<'_>,
        refused: Option<&HeaderValue>,
    ) -> Result<(Response, Option<HeaderValue>)> {
        let mut url = ask.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            self.web.reach.check(&url, ask.what).await?;
            let mut request = self.web.http.request(ask.method.clone(), url.clone()).headers(ask.headers.clone());
            if let Some(body) = ask.body {
                request = request.header(CONTENT_TYPE, "application/fhir+json").body(body.to_string());
            }
            if url.origin() == self.web.base.origin() {
                request = request.headers(self.settings.headers.clone());
                if let Some(trace) = self.settings.traceparent.and_then(|of| of()) {
                    request = request.header("traceparent", trace);
                }
            }
            let mut token = None;
            if self.token_goes_to(ask, &url) {
                let header = self.web.stop.or(self.auth.header(&self.web, refused)).await;
                token =
                    header.ok_or_else(|| Error::new(ErrorKind::Interrupted, format!("{}: stopped", ask.what)))??;
                if let Some(token) = &token {
                    request = request.header(AUTHORIZATION, token);
                }
            }
            let sent = self.web.stop.or(request.send()).await;
            let sent = sent.ok_or_else(|| {
                ask.lost.inspect(|lost| lost.store(true, Ordering::Relaxed));
                Error::new(ErrorKind::Interrupted, format!("{}: stopped", ask.what))
            })?;
            let response = sent.map_err(|error| {
                if let Some(lost) = ask.lost.filter(|_| !error.is_connect()) {
                    lost.store(true, Ordering::Relaxed);
                }
                let failed = network(&error, ask.what).at(ask.shown(&url));
                if self.is_plain_link(&url) { failed.with_hint(PLAIN_LINK) } else { failed }
            })?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, token));
            }
            let location = response.headers().get(LOCATION).and_then(|to| to.to_str().ok());
            let to = location.and_then(|to| url.join(to).ok()).ok_or_else(|| {
                Error::new(ErrorKind::Server, format!("{}: a redirect without a usable Location", ask.what))
            })?;
            if !matches!(to.scheme(), "http" | "https") {
                return Err(Error::new(
                    ErrorKind::Server,
                    format!("{}: a redirect to scheme {}", ask.what, to.scheme()),
                ));
            }
            // What changes something is for the server that it was meant for.
            let upgrade = url.scheme() == "http" && to.scheme() == "https" && to.host_str() == url.host_str();
            if ask.method != Method::GET && to.origin() != url.origin() && !upgrade {
                let (what, method) = (ask.what, &ask.method);
                return Err(Error::new(
                    ErrorKind::Server,
                    format!("{what}: a redirect of a {method} to another host, which is not followed"),
                ));
            }
            if ask.may_go.is_some_and(|may_go| !may_go(&to)) {
                return Err(Error::new(
                    ErrorKind::Server,
                    format!("{}: a redirect to a host that was not named", ask.what),
                ));
            }
            if url.scheme() == "https" && to.scheme() == "http" {
                return Err(Error::new(ErrorKind::Server, format!("{}: a redirect from https to http", ask.what)));
            }
            url = to;
        }
        Err(Error::new(ErrorKind::Server, format!("{}: more than {MAX_REDIRECTS} redirects", ask.what)))
    }
}

const PLAIN_LINK: &str = "the server is asked by https and gives links by http: the proxy before it has to tell it so \
    (X-Forwarded-Proto), or its own base URL has to be set; the token does not go by http";

fn now_and(wait: Duration) -> tokio::time::Instant {
    tokio::time::Instant::now() + wait
}

fn jitter(pause: Duration) -> Duration {
    // Full jitter between half and all of it.
    pause / 2 + pause.mul_f64(random_fraction() / 2.0)
}
