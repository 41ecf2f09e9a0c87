//! Polls of an export's status, by HTTP status and outcome, and the export's deletion (S1 to S10).

use std::time::Duration;

use reqwest::header::DATE;
use reqwest::{Method, StatusCode};
use serde_json::Value;
use url::Url;

use crate::export::manifest::Manifest;
use crate::export::response::{one_line, refusal, refused_with, server_words};
use crate::http::read_to_limit::MANIFEST;
use crate::http::{Client, RequestSpec, RetryPolicy};
use foundation::error::{Error, ErrorKind, Result};
use foundation::fault_points::reached;

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
    /// The server, or a gateway in front of it, knows no such export.
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
    /// Asks once how an export stands, or what is on a page of its manifest. `separate` where the server said that the
    /// export's own status is apart.
    pub async fn poll(&self, status: &Url, separate: bool) -> Result<PollStatus> {
        let ask = RequestSpec {
            retry_policy: RetryPolicy::All,
            ..RequestSpec::get(status, "application/json", "the export's status")
        };
        let response = self.send(&ask).await?;
        let own =
            response.headers().get("x-export-status").and_then(|code| code.to_str().ok()?.trim().parse::<u16>().ok());
        let own = own
            .and_then(|code| StatusCode::from_u16(code).ok())
            .filter(|_| separate && response.status() == StatusCode::OK);
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
                let date =
                    response.headers().get(DATE).and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
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
            // A gateway's, or a server's that is overloaded: it says nothing about the export, whatever its body.
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
                // Without an outcome a 500 may be the poll's or the job's; with a `Retry-After` the job is not over.
                let passes = code == StatusCode::INTERNAL_SERVER_ERROR && own.is_none();
                match is_transient(&body).unwrap_or(passes) || (wait.is_some() && code.is_server_error()) {
                    true => Ok(PollStatus::Transient { error, wait, throttled: false }),
                    // A request that is refused says nothing about the export.
                    false if error.kind() == ErrorKind::Server && code.is_server_error() => {
                        Ok(PollStatus::Failed(error))
                    }
                    false => Err(error),
                }
            }
        }
    }

    /// Tells the server that its files are no longer needed, or that the export is not wanted any more (section 1.6).
    /// Servers answer this in many ways; an error is what may be otherwise the next time. Whether it hears that or not
    /// is no reason to wait: it is asked once.
    pub async fn delete_export(&self, status: &Url) -> Result<()> {
        let what = "the export's end";
        let ask = RequestSpec {
            method: Method::DELETE,
            retry_policy: RetryPolicy::Once,
            ..RequestSpec::get(status, "", what)
        };
        reached("before the export is given back");
        let response = self.send(&ask).await?;
        reached("the export is given back");
        match response.status() {
            code if code.is_success() || matches!(code.as_u16(), 404 | 405 | 410 | 501) => Ok(()),
            code if self.is_transient(code, false) || code == StatusCode::UNAUTHORIZED => {
                Err(refusal(response, what).await)
            }
            code => {
                tracing::warn!(status = %code, "the server does not take the export back");
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s7_an_outcome_tells_a_failed_poll_from_a_failed_export() {
        let outcome = |code: &str| format!(r#"{{"resourceType":"OperationOutcome","issue":[{{"code":"{code}"}}]}}"#);
        assert_eq!(is_transient(outcome("throttled").as_bytes()), Some(true));
        assert_eq!(is_transient(outcome("exception").as_bytes()), Some(true));
        assert_eq!(is_transient(outcome("processing").as_bytes()), Some(false));
        assert_eq!(is_transient(b"<html>Bad gateway</html>"), None);
    }
}
