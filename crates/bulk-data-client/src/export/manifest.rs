//! The manifest of a finished export (Bulk Data "Response - Complete Status"), read leniently: real servers
//! leave required keys out.

use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use url::Url;

use crate::export::response::{instead_of_manifest, one_line};
use foundation::error::{Error, ErrorKind, Result};
use foundation::instant::{instant_text, parse_instant};

/// A file that a manifest lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFile {
    /// Its type; absent where output is organised otherwise.
    pub resource_type: Option<String>,
    /// Its absolute URL.
    pub url: Url,
    /// Number of resources it should hold.
    pub count: Option<u64>,
}

/// A manifest.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// `transactionTime`, microseconds since the epoch.
    pub transaction_time: i64,
    /// True if files need the access token.
    pub requires_access_token: bool,
    /// Files of resources.
    pub output: Vec<ManifestFile>,
    /// Files of deletions.
    pub deleted: Vec<ManifestFile>,
    /// Files of OperationOutcomes: `error`, or `outcome` in STU 4.
    pub outcomes: Vec<ManifestFile>,
    /// The next page of it (`link` with relation `next`).
    pub next: Option<Url>,
    /// Missing or odd members, for the log.
    pub findings: Vec<String>,
    /// Files that cannot be asked for: their types have not all that they should.
    pub unusable: Vec<Unusable>,
}

/// An entry of a manifest that names no file that can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unusable {
    /// Which list: 0 for output, 1 for deletions, 2 for outcomes.
    pub list: usize,
    /// Its type.
    pub resource_type: Option<String>,
    /// Why not.
    pub why: String,
}

/// A manifest as it is written. What is not here is passed over while it is read, so that a long one costs what its
/// files do.
#[derive(Deserialize)]
struct Written {
    #[serde(rename = "transactionTime")]
    transaction_time: Option<Value>,
    #[serde(rename = "requiresAccessToken")]
    requires_access_token: Option<Value>,
    output: Option<List<Item>>,
    deleted: Option<List<Item>>,
    error: Option<List<Item>>,
    outcome: Option<List<Item>>,
    link: Option<List<Link>>,
}

/// A list, or something else where one should be; read item by item.
enum List<T> {
    Items(Vec<T>),
    Other,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct Reads<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Reads<T> {
            type Value = List<T>;
            fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                to.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<Self::Value, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(List::Items(list))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> std::result::Result<Self::Value, A::Error> {
                while members.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(List::Other)
            }
            fn visit_bool<E>(self, _: bool) -> std::result::Result<Self::Value, E> {
                Ok(List::Other)
            }
            fn visit_i64<E>(self, _: i64) -> std::result::Result<Self::Value, E> {
                Ok(List::Other)
            }
            fn visit_u64<E>(self, _: u64) -> std::result::Result<Self::Value, E> {
                Ok(List::Other)
            }
            fn visit_f64<E>(self, _: f64) -> std::result::Result<Self::Value, E> {
                Ok(List::Other)
            }
            fn visit_str<E>(self, _: &str) -> std::result::Result<Self::Value, E> {
                Ok(List::Other)
            }
        }
        from.deserialize_any(Reads(std::marker::PhantomData))
    }
}

/// An entry; its members, and itself, may be of another type than they should.
#[derive(Deserialize)]
#[serde(untagged)]
enum Item {
    File(Box<Entry>),
    Other(IgnoredAny),
}

#[derive(Deserialize)]
struct Entry {
    url: Option<Value>,
    r#type: Option<Value>,
    count: Option<Value>,
}

#[derive(Deserialize)]
struct Link {
    relation: Option<Value>,
    url: Option<Value>,
}

fn text(value: &Option<Value>) -> Option<&str> {
    value.as_ref().and_then(Value::as_str)
}

/// Lead that a server's time may have over both clocks.
const AHEAD: Duration = Duration::from_secs(24 * 3600);

impl Manifest {
    /// Reads what comes while the server still works (S8): a manifest, or nothing.
    pub fn read_partial(body: &[u8], status: &Url) -> Option<Manifest> {
        let json: Written = serde_json::from_slice(body).ok()?;
        matches!(json.output, Some(List::Items(_))).then_some(())?;
        Manifest::read(body, status).ok()
    }

    /// Refuses a `transactionTime` that no clock can have shown: it becomes the tables' watermark, and one of the year
    /// 9999 would keep everything out that changes before. `date` is the answer's own.
    pub fn check_time(&self, date: Option<SystemTime>) -> Result<()> {
        let latest = date.map_or(SystemTime::now(), |date| date.max(SystemTime::now())) + AHEAD;
        let latest = latest.duration_since(SystemTime::UNIX_EPOCH).map_or(i64::MAX, |time| time.as_micros() as i64);
        if self.transaction_time > latest || self.transaction_time < EARLIEST {
            let time = instant_text(self.transaction_time);
            let why = format!(
                "the manifest cannot be used: its transactionTime is {time}, which the server's clock cannot have shown"
            );
            return Err(
                Error::new(ErrorKind::Server, why).with_hint("have the server's clock set right, then run again")
            );
        }
        Ok(())
    }

    /// Reads a manifest that came from `status`: relative URLs are taken from there.
    pub fn read(body: &[u8], status: &Url) -> Result<Manifest> {
        let bad = |why: &str| Error::new(ErrorKind::Server, format!("the manifest cannot be used: {why}"));
        // It is an answer about the job: the server's own words say best what it is instead.
        let said = || format!("; {}", instead_of_manifest(body));
        let json: Written = serde_json::from_slice(body).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => bad(&format!("not a JSON object{}", said())),
            _ => bad(&format!("not JSON ({error}){}", said())),
        })?;
        let mut findings = Vec::new();
        let mut unusable = Vec::new();
        // Only the server's own clock can be a watermark: with any other, rows could be passed over for ever.
        let time = text(&json.transaction_time).ok_or_else(|| match &json.transaction_time {
            None => bad(&format!("no transactionTime{}", said())),
            Some(value) => bad(&format!("transactionTime is not an instant: {}", one_line(&value.to_string(), 100))),
        })?;
        let transaction_time = parse_instant(time.as_bytes())
            .ok_or_else(|| bad(&format!("transactionTime is not an instant: {}", one_line(time, 100))))?;
        let requires_access_token = json.requires_access_token.and_then(|value| value.as_bool()).unwrap_or_else(|| {
            findings.push("requiresAccessToken is missing; taken as true".to_owned());
            true
        });
        let mut files = |key: &str, list: usize, given: Option<List<Item>>| -> Result<Vec<ManifestFile>> {
            let items = match given {
                Some(List::Items(items)) => items,
                None if list == 0 => {
                    findings.push(format!("{key} is missing; taken as empty"));
                    Vec::new()
                }
                None => Vec::new(),
                Some(List::Other) => return Err(bad(&format!("{key} is not an array"))),
            };
            let mut files = Vec::with_capacity(items.len());
            for (at, item) in items.into_iter().enumerate() {
                let (url, resource_type, count) = match item {
                    Item::File(entry) => (entry.url, entry.r#type, entry.count),
                    Item::Other(_) => (None, None, None),
                };
                let resource_type = text(&resource_type).map(str::to_owned);
                let is_long = text(&url).is_some_and(|url| url.len() > LONGEST_URL);
                let place = match text(&url).map(|url| status.join(url)) {
                    _ if is_long => Err(format!("has a url of more than {LONGEST_URL} letters")),
                    None => Err("has no url".to_owned()),
                    Some(Err(error)) => Err(format!("has no usable url: {error}")),
                    Some(Ok(url)) if !matches!(url.scheme(), "http" | "https") => {
                        Err(format!("has a url of the scheme {}", url.scheme().chars().take(20).collect::<String>()))
                    }
                    Some(Ok(url)) => Ok(url),
                };
                match place {
                    Ok(url) => {
                        files.push(ManifestFile { resource_type, url, count: count.and_then(|count| count.as_u64()) })
                    }
                    Err(why) => unusable.push(Unusable {
                        list,
                        resource_type,
                        why: format!("{key}[{at}] of the manifest {why}"),
                    }),
                }
            }
            Ok(files)
        };
        let output = files("output", 0, json.output)?;
        let deleted = files("deleted", 1, json.deleted)?;
        let mut outcomes = files("error", 2, json.error)?;
        outcomes.extend(files("outcome", 2, json.outcome)?);
        let links = if let Some(List::Items(links)) = json.link { links } else { Vec::new() };
        let mut next = links.iter().filter(|link| text(&link.relation) == Some("next"));
        let next = next.find_map(|link| text(&link.url));
        if next.is_some_and(|next| next.len() > LONGEST_URL) {
            return Err(bad("the link to its next page has no end"));
        }
        let next = match next.map(|next| status.join(next)) {
            Some(Err(error)) => return Err(bad(&format!("its next page: {error}"))),
            Some(Ok(next)) if !matches!(next.scheme(), "http" | "https") => {
                return Err(bad("its next page is not an http URL"));
            }
            next => next.and_then(std::result::Result::ok),
        };
        Ok(Manifest { transaction_time, requires_access_token, output, deleted, outcomes, next, findings, unusable })
    }
}

/// Letters of a link. Those that the clouds sign have up to two thousand.
const LONGEST_URL: usize = 8 << 10;

/// 1990, microseconds since the epoch: before FHIR, and before any server that has it.
const EARLIEST: i64 = 631_152_000_000_000;

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
        for odd in [
            "[]",
            "7",
            "null",
            r#"{"transactionTime":7,"output":[]}"#,
            r#"{"transactionTime":"2026-01-02T03:04:05Z","output":{}}"#,
        ] {
            assert!(read(odd).is_err(), "{odd}");
        }
    }

    // One entry that names no file must not hold the others up, and a time that cannot be must not become a watermark.
    #[test]
    fn what_cannot_be_asked_for_is_set_aside() {
        let manifest = read(
            r#"{"transactionTime":"2026-01-02T03:04:05Z","requiresAccessToken":false,"output":[{"type":"Patient","url":"file:///etc/passwd"},
               {"type":"Condition","url":"/c","count":"many"},{"url":"http://["},7,{"type":5,"url":"/x"}],"error":[{}]}"#,
        )
        .unwrap();
        assert_eq!(manifest.output.len(), 2);
        let unusable: Vec<_> =
            manifest.unusable.iter().map(|file| (file.list, file.resource_type.as_deref())).collect();
        assert_eq!(unusable, [(0, Some("Patient")), (0, None), (0, None), (2, None)]);
        assert!(manifest.unusable[0].why.contains("output[0]") && manifest.unusable[0].why.contains("scheme file"));
        for (time, good) in
            [("2026-01-02T03:04:05Z", true), ("9999-12-31T23:59:59Z", false), ("0000-01-01T00:00:00Z", false)]
        {
            let manifest = read(&format!("{{\"transactionTime\":\"{time}\",\"output\":[]}}")).unwrap();
            assert_eq!(manifest.check_time(None).is_ok(), good, "{time}");
        }
    }
}
