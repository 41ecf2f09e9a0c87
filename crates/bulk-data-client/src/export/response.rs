//! Contents of responses: when to come again, why not, and where a file goes on.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::header::{CONTENT_ENCODING, CONTENT_RANGE, ETAG, HeaderValue};
use reqwest::{Response, StatusCode};

use crate::http::content_encoding::unpacked;
use crate::http::shown;
use crate::http::tls::WANTS_CERTIFICATE;
use foundation::error::{Error, ErrorKind};

/// Bytes of an error's body that are read.
const ERROR_BODY: usize = 4096;
/// Time for which it is waited for.
const ERROR_PATIENCE: Duration = Duration::from_secs(5);
/// A `Retry-After` of more seconds is a time: nobody asks for 30 years.
pub(crate) const LONGEST_WAIT: f64 = 1e9;

/// The codes of FHIR R4's IssueType.
pub const ISSUE_TYPES: [&str; 31] = [
    "invalid",
    "structure",
    "required",
    "value",
    "invariant",
    "security",
    "login",
    "unknown",
    "expired",
    "forbidden",
    "suppressed",
    "processing",
    "not-supported",
    "duplicate",
    "multiple-matches",
    "not-found",
    "deleted",
    "too-long",
    "code-invalid",
    "extension",
    "too-costly",
    "business-rule",
    "conflict",
    "transient",
    "lock-error",
    "no-store",
    "exception",
    "timeout",
    "incomplete",
    "throttled",
    "informational",
];

/// Position from which a file that broke off is resumed.
#[derive(Debug, Clone)]
pub struct Resume {
    /// Bytes that are here.
    pub from: u64,
    /// A strong validator (RFC 9110, section 8.8.1) of the file that they are of.
    pub validator: HeaderValue,
}

impl Resume {
    /// The validator of a response whose file can be resumed: a strong entity tag, of bytes that are not packed for
    /// the way.
    pub fn validator(response: &Response) -> Option<HeaderValue> {
        let headers = response.headers();
        let packed = headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding.as_bytes() != b"identity");
        let tag = headers.get(ETAG).filter(|tag| tag.as_bytes().starts_with(b"\""));
        tag.filter(|_| !packed).cloned()
    }

    /// Returns true if a response goes on where we are.
    pub fn is_taken_up_by(&self, response: &Response) -> bool {
        let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
        let from = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.parse::<u64>().ok());
        response.status() == StatusCode::PARTIAL_CONTENT && from == Some(self.from)
    }
}

/// Returns true if a response has a file from its first byte to its last: a part that nobody asked for is no file.
pub fn is_whole(response: &Response) -> bool {
    match response.status().as_u16() {
        200 | 203 | 204 => true,
        206 => response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok()).is_some_and(is_whole_range),
        _ => false,
    }
}

/// `bytes 0-99/100`
fn is_whole_range(range: &str) -> bool {
    let read = || {
        let (range, all) = range.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        Some((first.trim().parse::<u64>().ok()?, last.trim().parse::<u64>().ok()?, all.trim().parse::<u64>().ok()?))
    };
    read().is_some_and(|(first, last, all)| first == 0 && last.checked_add(1) == Some(all))
}

/// The error that a refusal stands for, with the server's own words.
pub(crate) async fn refusal(response: Response, what: &str) -> Error {
    refused_with(response, what).await.0
}

/// The same, and the beginning of its body.
pub(crate) async fn refused_with(response: Response, what: &str) -> (Error, Vec<u8>) {
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
    let error = Error::new(kind, format!("{what}: the server answered {status}{words}")).at(place);
    let error = error.with_status(status.as_u16());
    (if wants_certificate(&body) { error.with_hint(WANTS_CERTIFICATE) } else { error }, body)
}

/// Returns true if a gateway asks for a client certificate in an HTTP response, as nginx and IIS do after the
/// handshake.
fn wants_certificate(body: &[u8]) -> bool {
    let text = String::from_utf8_lossy(body).to_ascii_lowercase();
    ["required ssl certificate", "client certificate"].iter().any(|words| text.contains(words))
}

async fn first_bytes(mut response: Response) -> Vec<u8> {
    let encoding = response.headers().get(CONTENT_ENCODING).and_then(|encoding| encoding.to_str().ok());
    let encoding = encoding.unwrap_or_default().to_ascii_lowercase();
    let mut body = Vec::new();
    let read = async {
        while body.len() < ERROR_BODY
            && let Ok(Some(bytes)) = response.chunk().await
        {
            body.extend_from_slice(&bytes);
        }
    };
    // Words that do not come are not waited for; what came of them is kept.
    let _ = tokio::time::timeout(ERROR_PATIENCE, read).await;
    body.truncate(ERROR_BODY);
    // What is cut cannot be unpacked; its words are lost then, and its status is not.
    unpacked(&encoding, body, ERROR_BODY * 16).unwrap_or_default()
}

/// Describes the body that came instead of a manifest: the words of an outcome or a page; of other JSON only its kind
/// and size, since it may be resources.
pub(crate) fn instead_of_manifest(body: &[u8]) -> String {
    let start = body.trim_ascii_start();
    let is_json = start.starts_with(b"{") || start.starts_with(b"[");
    let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let is = |key: &str| json.as_ref().and_then(|json| json.get(key));
    let name =
        is("resourceType").and_then(|name| name.as_str()).filter(|name| name.bytes().all(|b| b.is_ascii_alphabetic()));
    match name {
        _ if start.is_empty() => "the answer is empty".to_owned(),
        Some(name) if name != "OperationOutcome" => {
            format!("the answer is a {} of {} bytes", name.get(..40).unwrap_or(name), body.len())
        }
        None if is_json && is("issue").is_none() => {
            format!("the answer is JSON of {} bytes without a resourceType", body.len())
        }
        _ => format!("the server says: {}", server_words(body)),
    }
}

/// Returns the message in an error's body: an OperationOutcome's diagnostics, or the beginning of its text.
pub fn server_words(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    if let Ok(json) = serde_json::from_slice::<serde_json::Value>(body) {
        let issues = json.get("issue").and_then(|issues| issues.as_array());
        let words = issues.into_iter().flatten().filter_map(|issue| {
            let text =
                issue.get("diagnostics").or_else(|| issue.get("details").and_then(|details| details.get("text")));
            text.and_then(|text| text.as_str()).or_else(|| issue.get("code").and_then(|code| code.as_str()))
        });
        let words: Vec<&str> = words.collect();
        if !words.is_empty() {
            return one_line(&words.join("; "), 500);
        }
    }
    one_line(&text, 200)
}

/// Somebody else's text as a part of a line: no line ends, nothing that moves a terminal, and not more than `most`
/// letters.
pub(crate) fn one_line(text: &str, most: usize) -> String {
    let is_hidden = |letter: char| {
        letter.is_control()
            || matches!(letter, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let clean: String =
        text.chars().map(|letter| if is_hidden(letter) { ' ' } else { letter }).take(most * 4).collect();
    clean.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(most).collect()
}

/// Returns the code that a store or server gives where a file cannot be read: a code only, since anything else may be
/// about the file's content.
fn code_of(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let of_json = json.as_ref().and_then(|json| json.get("issue")?.get(0)?.get("code")?.as_str());
    let of_xml = || text.split_once("<Code>")?.1.split_once("</Code>").map(|(code, _)| code);
    let code = of_json.or_else(of_xml).unwrap_or_default();
    // Any other text may be about a patient.
    if ISSUE_TYPES.contains(&code) || STORE_CODES.contains(&code) { code.to_owned() } else { String::new() }
}

/// Error codes of the clouds' stores.
const STORE_CODES: [&str; 26] = [
    "AccessDenied",
    "AuthenticationFailed",
    "AuthenticationRequired",
    "AuthorizationFailure",
    "AuthorizationPermissionMismatch",
    "BlobArchived",
    "BlobNotFound",
    "ContainerNotFound",
    "ExpiredToken",
    "InternalError",
    "InvalidAccessKeyId",
    "InvalidAuthenticationInfo",
    "InvalidObjectState",
    "InvalidRange",
    "InvalidSecurity",
    "InvalidToken",
    "NoSuchBucket",
    "NoSuchKey",
    "OperationTimedOut",
    "RequestTimeTooSkewed",
    "RequestTimeout",
    "ResourceNotFound",
    "ServerBusy",
    "ServiceUnavailable",
    "SignatureDoesNotMatch",
    "SlowDown",
];

/// The error that a refused file stands for, at `place`.
pub(crate) async fn file_refusal(response: Response, what: &str, place: String) -> Error {
    let status = response.status();
    let kind = if matches!(status.as_u16(), 401 | 403) { ErrorKind::Auth } else { ErrorKind::Server };
    let code = code_of(&first_bytes(response).await);
    let code = if code.is_empty() { code } else { format!(": {code}") };
    Error::new(kind, format!("{what}: the server answered {status}{code}")).at(place).with_status(status.as_u16())
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
            n if n > LONGEST_WAIT * 1e3 => Some(at(n / 1e3)?.duration_since(now).unwrap_or_default()),
            n if n > LONGEST_WAIT => Some(at(n)?.duration_since(now).unwrap_or_default()),
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

    // Breaks if a part of a file is taken for the file, which would then commit without the rest.
    #[test]
    fn a_part_that_nobody_asked_for_is_no_file() {
        assert!(is_whole_range("bytes 0-99/100"));
        for part in ["bytes 0-98/100", "bytes 1-99/100", "bytes 0-99/*", "bytes */100", "items 0-99/100", ""] {
            assert!(!is_whole_range(part), "{part}");
        }
    }

    #[test]
    fn the_servers_words() {
        let outcome = br#"{"resourceType":"OperationOutcome","issue":[{"code":"x","diagnostics":"Group unknown"}]}"#;
        assert_eq!(server_words(outcome), "Group unknown");
        assert_eq!(server_words(b"<html>\n <b>Bad</b>"), "<html> <b>Bad</b>");
        let moves = b"{\"issue\":[{\"diagnostics\":\"a\\u001b[2Jb\\nERROR c\\u202ed\"}]}";
        assert_eq!(server_words(moves), "a [2Jb ERROR c d");
        assert_eq!(code_of(b"<Error><Code>AccessDenied</Code><Message>Anna Smith</Message></Error>"), "AccessDenied");
        assert_eq!(code_of(br#"{"issue":[{"code":"not-found"}]}"#), "not-found");
        assert_eq!(code_of(br#"{"issue":[{"code":"Anna-Smith"}]}"#), "");
        assert_eq!(code_of(b"<Error><Code>AnnaSmith1970</Code></Error>"), "");
        assert_eq!(code_of(b"Anna Smith is gone"), "");
    }
}
