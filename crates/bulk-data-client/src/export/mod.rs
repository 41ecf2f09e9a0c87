//! Kick-off, polling and the end of an export.

pub(crate) mod links;
pub(crate) mod manifest;
pub(crate) mod options;
pub(crate) mod request;
pub(crate) mod response;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::header::{ACCEPT, DATE, HeaderMap, HeaderValue};
use reqwest::{Method, Response, StatusCode};
use serde_json::Value;
use url::Url;

use crate::export::manifest::Manifest;
use crate::export::options::Method as KickOffMethod;
use crate::export::request::ExportRequest;
use crate::export::response::{one_line, refusal, refused_with, server_words};
use crate::http::read_to_limit::MANIFEST;
use crate::http::{Client, RequestSpec, RetryPolicy};
use foundation::error::{Context, Error, ErrorKind, Result};
use foundation::fault_points::reached;

/// The answer to a kick-off.
#[derive(Debug)]
pub enum KickOff {
    /// The server works on it.
    Accepted {
        /// Status URL.
        status: Url,
        /// True if a poll's own status and the export's are apart (K5).
        separate: bool,
    },
    /// Not now.
    Later {
        /// Wait that the server asks for, where it says.
        wait: Option<Duration>,
        /// Its words.
        why: String,
    },
}

/// The answer to one poll.
#[derive(Debug)]
pub enum PollStatus {
    /// The server still works.
    InProgress {
        /// Its own words on how far it is.
        progress: Option<String>,
        /// Wait that it asks for.
        wait: Option<Duration>,
        /// Files that are final already (S8).
        partial: Option<Box<Manifest>>,
    },
    /// The poll failed, and the export may not have (S6, S7).
    Transient {
        /// Error.
        error: Error,
        /// Wait that the server asks for.
        wait: Option<Duration>,
        /// True if the server only wants to be asked less often.
        throttled: bool,
    },
    /// The manifest.
    Done(Box<Manifest>),
    /// The server knows no such export, or whoever answers for it.
    NotFound {
        /// Its text.
        error: Error,
        /// True if it is the server that says so.
        definitive: bool,
    },
    /// The export failed, and will not come.
    Failed(Error),
}

/// Issue types of the hierarchy `transient`: what was asked failed, and may not the next time.
const TRANSIENT: [&str; 7] = ["transient", "lock-error", "no-store", "exception", "timeout", "incomplete", "throttled"];

/// Returns true if an OperationOutcome says that the trouble passes; `None` where the body is none.
fn is_transient(body: &[u8]) -> Option<bool> {
    let json: Value = serde_json::from_slice(body).ok()?;
    let issues = json.get("issue")?.as_array()?;
    let codes: Vec<&str> = issues.iter().filter_map(|issue| issue.get("code").and_then(Value::as_str)).collect();
    if codes.is_empty() { None } else { Some(codes.iter().any(|code| TRANSIENT.contains(code))) }
}

impl Client {
    /// Asks for an export (K1 to K21). Sets `lost` where an answer may have been one that did not reach us: the server may
    /// have made an export then, whatever a later try says.
    ///
    /// A server that says that it is busy is asked again as it says, within `max_kick_off_wait`.
    pub async fn kick_off(&self, request: &ExportRequest, lost: &AtomicBool) -> Result<KickOff> {
        let mut left = self.settings().max_kick_off_wait;
        loop {
            let (wait, why) = match self.try_kick_off(request, lost).await? {
                Tried::Answered(answer) => return Ok(answer),
                Tried::Busy { wait, why } => (wait, why),
            };
            let pause = wait.unwrap_or(BUSY_PAUSE).max(Duration::from_secs(1));
            if pause > left {
                return Ok(KickOff::Later { wait: Some(wait.unwrap_or(BUSY_WAIT)), why });
            }
            left -= pause;
            tracing::warn!(why, wait_seconds = pause.as_secs(), "the server is busy; the kick-off is sent again");
            if self.stop().or(tokio::time::sleep(pause)).await.is_none() {
                return Err(Error::new(ErrorKind::Interrupted, "the kick-off: stopped while waiting"));
            }
        }
    }

    async fn try_kick_off(&self, request: &ExportRequest, lost: &AtomicBool) -> Result<Tried> {
        let post = request.is_post();
        let response = self.send_kick_off(request, post, lost).await?;
        let may_post = request.options.method == KickOffMethod::Auto && !post;
        let response = match response.status() {
            // K2: what STU 4 leaves over.
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED if may_post => {
                tracing::info!("the server takes no GET as a kick-off; asking by POST");
                self.send_kick_off(request, true, lost).await?
            }
            _ => response,
        };
        if response.status() == StatusCode::ACCEPTED {
            let applied = response.headers().get_all("preference-applied").iter().filter_map(|value| value.to_str().ok());
            let separate = applied.into_iter().any(|value| value.contains("separate-export-status"));
            let location = response.headers().get("content-location").and_then(|to| to.to_str().ok());
            let status = location.and_then(|location| response.url().join(location).ok());
            // To ask the kick-off's own place again would begin one export after the other.
            let asked = response.url();
            let is_another = |status: &Url| {
                (status.origin(), status.path()) != (asked.origin(), asked.path())
                    || status.query().is_some_and(|query| asked.query() != Some(query))
            };
            let is_usable = |status: &Url| matches!(status.scheme(), "http" | "https") && is_another(status);
            let Some(status) = status.filter(is_usable) else {
                lost.store(true, Ordering::Relaxed);
                return Err(Error::new(ErrorKind::Server, "the kick-off was accepted without a usable Content-Location to poll"));
            };
            return Ok(Tried::Answered(KickOff::Accepted { status, separate }));
        }
        let (code, wait) = (response.status(), self.retry_after(response.headers()));
        let (error, body) = refused_with(response, "the kick-off").await;
        // Epic's words for one export a client and group in a day.
        let too_soon = String::from_utf8_lossy(&body).to_lowercase().contains("too recently");
        if code == StatusCode::TOO_MANY_REQUESTS || too_soon {
            return Ok(Tried::Answered(KickOff::Later { wait, why: error.to_string() }));
        }
        // A server whose slots are taken answers with any status; they are free again long before the usual wait is over.
        if is_busy(&body) {
            return Ok(Tried::Busy { wait, why: error.to_string() });
        }
        if code == StatusCode::NOT_FOUND {
            return Err(error.with_hint(
                "check source.url, which is what stands before /Patient, and the group: nothing can be exported there",
            ));
        }
        if code == StatusCode::BAD_REQUEST || code == StatusCode::UNPROCESSABLE_ENTITY {
            return Err(error.or_hint(
                "the server's words name what it does not support: leave that key out of `source`, or set source.lenient: true",
            ));
        }
        Err(error)
    }

    async fn send_kick_off(&self, request: &ExportRequest, post: bool, lost: &AtomicBool) -> Result<Response> {
        let mut headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static("application/fhir+json"))]);
        let prefer = HeaderValue::from_str(&request.prefer()).context(ErrorKind::Internal, "a header")?;
        headers.insert("prefer", prefer);
        let (method, url, body) = match post {
            true => {
                let (url, body) = request.post(self.base())?;
                (Method::POST, url, Some(body))
            }
            false => (Method::GET, request.url(self.base())?, None),
        };
        let judges = RetryPolicy::Throttling(self.settings().max_kick_off_wait);
        let body = body.as_ref();
        self.send(&RequestSpec { method, headers, body, judges, lost: Some(lost), ..RequestSpec::get(&url, "", "the kick-off") })
            .await
    }

    /// Asks once how an export stands, or what is on a page of its manifest. `separate` where the server said that the
    /// export's own status is apart.
    pub async fn poll(&self, status: &Url, separate: bool) -> Result<PollStatus> {
        let ask = RequestSpec { judges: RetryPolicy::All, ..RequestSpec::get(status, "application/json", "the export's status") };
        let response = self.send(&ask).await?;
        let own = response.headers().get("x-export-status").and_then(|code| code.to_str().ok()?.trim().parse::<u16>().ok());
        let own =
            own.and_then(|code| StatusCode::from_u16(code).ok()).filter(|_| separate && response.status() == StatusCode::OK);
        let code = own.unwrap_or(response.status());
        let wait = self.retry_after(response.headers());
        let progress = response.headers().get("x-progress").and_then(|text| text.to_str().ok());
        let progress = progress.map(|text| one_line(text, 100));
        match code {
            StatusCode::ACCEPTED => {
                let body = self.whole(response, MANIFEST, ask.what).await.unwrap_or_default();
                let partial = Manifest::read_partial(&body, status).map(Box::new);
                Ok(PollStatus::InProgress { progress, wait, partial })
            }
            StatusCode::OK => {
                let date = response.headers().get(DATE).and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
                let body = match self.whole(response, MANIFEST, "the manifest").await {
                    Ok(body) => body,
                    Err(error) if !error.is_transient() => return Err(error),
                    Err(error) => return Ok(PollStatus::Transient { error, wait: None, throttled: false }),
                };
                let manifest = Manifest::read(&body, status)?;
                manifest.check_time(date)?;
                Ok(PollStatus::Done(Box::new(manifest)))
            }
            code if self.settings().retry_status.contains(&code.as_u16()) => {
                Ok(PollStatus::Transient { error: refusal(response, ask.what).await, wait, throttled: false })
            }
            // A gateway's, or a server's that is overloaded: no word on the export, whatever stands below it.
            code if matches!(code.as_u16(), 408 | 425 | 502 | 503 | 504) && own.is_none() => {
                Ok(PollStatus::Transient { error: refusal(response, ask.what).await, wait, throttled: false })
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => {
                let status_is_gone = response.status() == StatusCode::GONE;
                let (error, body) = refused_with(response, ask.what).await;
                match is_transient(&body) {
                    Some(true) => Ok(PollStatus::Transient { error, wait, throttled: false }),
                    of_server => Ok(PollStatus::NotFound { error, definitive: of_server.is_some() || status_is_gone }),
                }
            }
            StatusCode::TOO_MANY_REQUESTS => {
                let error = refusal(response, ask.what).await;
                Ok(PollStatus::Transient { error, wait, throttled: true })
            }
            code => {
                let (error, body) = refused_with(response, ask.what).await;
                let error = match own {
                    // The answer itself was fine.
                    Some(own) => Error::new(
                        error.kind(),
                        format!("the server says that the export ended with {own}: {}", server_words(&body)),
                    ),
                    None => error,
                };
                // Without an outcome a 500 may be the poll's or the job's; whoever asks to come back is not done.
                let passes = code == StatusCode::INTERNAL_SERVER_ERROR && own.is_none();
                match is_transient(&body).unwrap_or(passes) || (wait.is_some() && code.is_server_error()) {
                    true => Ok(PollStatus::Transient { error, wait, throttled: false }),
                    // What we may not do is no word on the export.
                    false if error.kind() == ErrorKind::Server && code.is_server_error() => Ok(PollStatus::Failed(error)),
                    false => Err(error),
                }
            }
        }
    }

    /// Tells the server that its files are no longer needed, or that the export is not wanted any more (section 1.6). Servers
    /// answer this in many ways; an error is what may be otherwise the next time. Whether it hears that or not is no reason
    /// to wait: it is asked once.
    pub async fn delete_export(&self, status: &Url) -> Result<()> {
        let what = "the export's end";
        let ask = RequestSpec { method: Method::DELETE, judges: RetryPolicy::Once, ..RequestSpec::get(status, "", what) };
        reached("before the export is given back");
        let response = self.send(&ask).await?;
        reached("the export is given back");
        match response.status() {
            code if code.is_success() || matches!(code.as_u16(), 404 | 405 | 410 | 501) => Ok(()),
            code if self.is_transient(code, false) || code == StatusCode::UNAUTHORIZED => Err(refusal(response, what).await),
            code => {
                tracing::warn!(status = %code, "the server does not take the export back");
                Ok(())
            }
        }
    }
}

/// The result of one kick-off request.
enum Tried {
    Answered(KickOff),
    Busy { wait: Option<Duration>, why: String },
}

/// After how long a server that is busy, and does not say for how long, is asked again in the same run.
const BUSY_PAUSE: Duration = Duration::from_secs(15);

/// And by the next run.
const BUSY_WAIT: Duration = Duration::from_secs(120);

/// Returns true if a kick-off's refusal says that it may be taken later, whatever its status: by the code of an issue, or in words.
fn is_busy(body: &[u8]) -> bool {
    const CODES: [&str; 5] = ["throttled", "too-costly", "transient", "lock-error", "timeout"];
    const WORDS: [&str; 16] = [
        "too many concurrent",
        "too many export",
        "too many request",
        "too many active",
        "too many running",
        "maximum number of export",
        "maximum number of concurrent",
        "maximum number of job",
        "concurrent export",
        "already in progress",
        "already running",
        "try again later",
        "retry later",
        "rate limit",
        "server is busy",
        "no free slot",
    ];
    let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let issues = json.as_ref().and_then(|json| json.get("issue")?.as_array());
    let mut codes = issues.into_iter().flatten().filter_map(|issue| issue.get("code")?.as_str());
    let words = String::from_utf8_lossy(body).to_lowercase();
    codes.any(|code| CODES.contains(&code)) || WORDS.iter().any(|word| words.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Breaks if a server whose slots are taken is thought to refuse types.
    #[test]
    fn a_busy_server_is_no_refusal() {
        for body in [
            r#"{"resourceType":"OperationOutcome","issue":[{"severity":"error","code":"invalid","diagnostics":"too many concurrent exports for this tenant (max 4)"}]}"#,
            r#"{"issue":[{"code":"processing"},{"code":"throttled"}]}"#,
            r#"{"issue":[{"code":"too-costly"}]}"#,
            r#"{"issue":[{"code":"lock-error"}]}"#,
            "Export already in progress",
            "<html>The server is busy. Please try again later.</html>",
        ] {
            assert!(is_busy(body.as_bytes()), "{body}");
        }
        for body in [
            r#"{"issue":[{"code":"not-supported","diagnostics":"unknown type Claim"}]}"#,
            "",
            "not for this client",
            "too many types",
            "the maximum number of resource types is 5",
        ] {
            assert!(!is_busy(body.as_bytes()), "{body}");
        }
    }

    #[test]
    fn s7_an_outcome_tells_a_failed_poll_from_a_failed_export() {
        let outcome = |code: &str| format!(r#"{{"resourceType":"OperationOutcome","issue":[{{"code":"{code}"}}]}}"#);
        assert_eq!(is_transient(outcome("throttled").as_bytes()), Some(true));
        assert_eq!(is_transient(outcome("exception").as_bytes()), Some(true));
        assert_eq!(is_transient(outcome("processing").as_bytes()), Some(false));
        assert_eq!(is_transient(b"<html>Bad gateway</html>"), None);
    }
}
