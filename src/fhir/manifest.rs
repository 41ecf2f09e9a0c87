//! The manifest of a finished export (Bulk Data "Response - Complete Status"), read leniently: real servers
//! leave required keys out.

use serde_json::Value;
use url::Url;

use crate::error::{Error, ErrorKind, Result};
use crate::schema::parse_instant;

/// A file that a manifest lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFile {
    /// Its type; absent where output is organised otherwise.
    pub resource_type: Option<String>,
    /// Its absolute URL.
    pub url: Url,
    /// How many resources it should hold.
    pub count: Option<u64>,
}

/// A manifest.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// `transactionTime`, microseconds since the epoch.
    pub transaction_time: i64,
    /// Whether files need the access token.
    pub requires_access_token: bool,
    /// Files of resources.
    pub output: Vec<ManifestFile>,
    /// Files of deletions.
    pub deleted: Vec<ManifestFile>,
    /// Files of OperationOutcomes: `error`, or `outcome` in STU 4.
    pub outcomes: Vec<ManifestFile>,
    /// The next page of it (`link` with relation `next`).
    pub next: Option<Url>,
    /// What was missing or odd, for the log.
    pub findings: Vec<String>,
}

impl Manifest {
    /// Reads what comes while the server still works (S8): a manifest, or nothing.
    pub fn read_partial(body: &[u8], status: &Url) -> Option<Manifest> {
        let json: Value = serde_json::from_slice(body).ok()?;
        json.get("output").filter(|output| output.is_array())?;
        Manifest::read(body, status).ok()
    }

    /// Reads a manifest that came from `status`: relative URLs are taken from there.
    pub fn read(body: &[u8], status: &Url) -> Result<Manifest> {
        let bad = |why: &str| Error::new(ErrorKind::Server, format!("the manifest cannot be used: {why}"));
        let json: Value = serde_json::from_slice(body).map_err(|error| bad(&format!("not JSON ({error})")))?;
        if !json.is_object() {
            return Err(bad("not a JSON object"));
        }
        let mut findings = Vec::new();
        // Only the server's own clock can be a watermark: with any other, rows could be passed over for ever.
        let time = json.get("transactionTime").and_then(Value::as_str).ok_or_else(|| bad("no transactionTime"))?;
        let transaction_time = parse_instant(time.as_bytes()).ok_or_else(|| bad("transactionTime is not an instant"))?;
        let requires_access_token = json.get("requiresAccessToken").and_then(Value::as_bool).unwrap_or_else(|| {
            findings.push("requiresAccessToken is missing; taken as true".to_owned());
            true
        });
        let mut files = |key: &str, required: bool| -> Result<Vec<ManifestFile>> {
            let list = match json.get(key) {
                Some(Value::Array(list)) => list.as_slice(),
                Some(Value::Null) | None => {
                    if required {
                        findings.push(format!("{key} is missing; taken as empty"));
                    }
                    &[]
                }
                Some(_) => return Err(bad(&format!("{key} is not an array"))),
            };
            list.iter()
                .enumerate()
                .map(|(at, item)| {
                    let url = item.get("url").and_then(Value::as_str).ok_or_else(|| bad(&format!("{key}[{at}] has no url")))?;
                    let url = status.join(url).map_err(|error| bad(&format!("{key}[{at}].url: {error}")))?;
                    if !matches!(url.scheme(), "http" | "https") {
                        return Err(bad(&format!("{key}[{at}].url has the scheme {}", url.scheme())));
                    }
                    Ok(ManifestFile {
                        resource_type: item.get("type").and_then(Value::as_str).map(str::to_owned),
                        url,
                        count: item.get("count").and_then(Value::as_u64),
                    })
                })
                .collect()
        };
        let output = files("output", true)?;
        let deleted = files("deleted", false)?;
        let mut outcomes = files("error", false)?;
        outcomes.extend(files("outcome", false)?);
        let links = json.get("link").and_then(Value::as_array).into_iter().flatten();
        let mut next = links.filter(|link| link.get("relation").and_then(Value::as_str) == Some("next"));
        let next = next.find_map(|link| link.get("url").and_then(Value::as_str));
        let next = match next.map(|next| status.join(next)) {
            Some(Err(error)) => return Err(bad(&format!("its next page: {error}"))),
            Some(Ok(next)) if !matches!(next.scheme(), "http" | "https") => return Err(bad("its next page is no web address")),
            next => next.and_then(std::result::Result::ok),
        };
        Ok(Manifest { transaction_time, requires_access_token, output, deleted, outcomes, next, findings })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<Manifest> {
        Manifest::read(body.as_bytes(), &Url::parse("https://h.example/fhir/status/7").unwrap())
    }

    #[test]
    fn a_complete_manifest() {
        let manifest = read(
            r#"{"transactionTime":"2026-01-02T03:04:05Z","request":"x","requiresAccessToken":false,
               "output":[{"type":"Patient","url":"https://f.example/1","count":3},{"type":"Condition","url":"../files/2"}],
               "deleted":[{"type":"Bundle","url":"/d"}],"error":[{"type":"OperationOutcome","url":"/e"}],"extension":{"x":1}}"#,
        )
        .unwrap();
        assert_eq!(manifest.output[0].count, Some(3));
        assert_eq!(manifest.output[1].url.as_str(), "https://h.example/fhir/files/2");
        assert_eq!((manifest.deleted.len(), manifest.outcomes.len()), (1, 1));
        assert!(!manifest.requires_access_token && manifest.findings.is_empty());
    }

    #[test]
    fn missing_keys_are_tolerated_and_said_but_never_the_time() {
        let manifest = read(r#"{"transactionTime":"2026-01-02T03:04:05+01:00","output":null}"#).unwrap();
        assert_eq!(manifest.findings.len(), 2);
        assert!(read(r#"{"output":[]}"#).unwrap_err().to_string().contains("transactionTime"));
        assert!(read(r#"{"transactionTime":"yesterday","output":[]}"#).is_err());
        assert!(read("<html>").is_err());
    }
}
