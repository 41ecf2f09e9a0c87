//! The kick-off of an export (K1 to K21).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use reqwest::{Method, Response, StatusCode};
use url::Url;

use crate::export::options::Method as KickOffMethod;
use crate::export::request::ExportRequest;
use crate::export::response::refused_with;
use crate::http::{Client, RequestSpec, RetryPolicy};
use foundation::error::{Context, Error, ErrorKind, Result};

/// The answer to a kick-off.
#[derive(Debug)]
pub enum KickOffResponse {
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

impl Client {
    /// Asks for an export (K1 to K21). Sets `lost` where an answer may have been one that did not reach us: the server
    /// may have made an export then, whatever a later try says.
    ///
    /// A server that says that it is busy is asked again as it says, within `max_kick_off_wait`.
    pub async fn kick_off(&self, request: &ExportRequest, lost: &AtomicBool) -> Result<KickOffResponse> {
        let mut left = self.settings().max_kick_off_wait;
        loop {
            let (wait, why) = match self.try_kick_off(request, lost).await? {
                Tried::Answered(answer) => return Ok(answer),
                Tried::Busy { wait, why } => (wait, why),
            };
            let pause = wait.unwrap_or(BUSY_PAUSE).max(Duration::from_secs(1));
            if pause > left {
                return Ok(KickOffResponse::Later { wait: Some(wait.unwrap_or(BUSY_WAIT)), why });
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
            let applied =
                response.headers().get_all("preference-applied").iter().filter_map(|value| value.to_str().ok());
            let separate = applied.into_iter().any(|value| value.contains("separate-export-status"));
            let location = response.headers().get("content-location").and_then(|to| to.to_str().ok());
            let status = location.and_then(|location| response.url().join(location).ok());
            // To ask the kick-off's own place again would begin one export after the other.
            let requested = response.url();
            let is_another = |status: &Url| {
                (status.origin(), status.path()) != (requested.origin(), requested.path())
                    || status.query().is_some_and(|query| requested.query() != Some(query))
            };
            let is_usable = |status: &Url| matches!(status.scheme(), "http" | "https") && is_another(status);
            let Some(status) = status.filter(is_usable) else {
                lost.store(true, Ordering::Relaxed);
                return Err(Error::new(
                    ErrorKind::Server,
                    "the kick-off was accepted without a usable Content-Location to poll",
                ));
            };
            return Ok(Tried::Answered(KickOffResponse::Accepted { status, separate }));
        }
        let (code, wait) = (response.status(), self.retry_after(response.headers()));
        let (error, body) = refused_with(response, "the kick-off").await;
        // Epic's words for one export a client and group in a day.
        let too_soon = String::from_utf8_lossy(&body).to_lowercase().contains("too recently");
        if code == StatusCode::TOO_MANY_REQUESTS || too_soon {
            return Ok(Tried::Answered(KickOffResponse::Later { wait, why: error.to_string() }));
        }
        // A server whose slots are taken answers with any status; they are free again long before the usual wait is
        // over.
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
                "the server's words name what it does not support: leave that key out of `source`, or set \
                    source.lenient: true",
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
        let retry_policy = RetryPolicy::Throttling(self.settings().max_kick_off_wait);
        let body = body.as_ref();
        self.send(&RequestSpec {
            method,
            headers,
            body,
            retry_policy,
            lost: Some(lost),
            ..RequestSpec::get(&url, "", "the kick-off")
        })
        .await
    }
}

/// The result of one kick-off request.
enum Tried {
    Answered(KickOffResponse),
    Busy { wait: Option<Duration>, why: String },
}

/// After how long a server that is busy, and does not say for how long, is asked again in the same run.
const BUSY_PAUSE: Duration = Duration::from_secs(15);

/// And by the next run.
const BUSY_WAIT: Duration = Duration::from_secs(120);

/// Returns true if a kick-off's refusal says that it may be taken later, whatever its status: by the code of an issue,
/// or in words.
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
}
