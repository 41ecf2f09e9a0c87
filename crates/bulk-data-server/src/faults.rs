//! Faults and ways of the embedded server: for tests, and for trying out how a client handles them.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Deserialize;

/// The script of a server, as YAML: `fhirlake demo --serve --faults FILE`. Numbers count down as the fault is played.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// Polls that are answered 202 before the manifest.
    pub polls: usize,
    /// `Retry-After` of those polls, as it is sent; `0` by default.
    pub poll_retry_after: Option<String>,
    /// Polls that fail with 500 and an OperationOutcome of code `exception`: the poll failed, not the export.
    pub polls_transient: usize,
    /// Polls that are answered 429.
    pub polls_throttled: usize,
    /// Polls that fail with 502 and a page of HTML.
    pub polls_bad_gateway: usize,
    /// Polls that are answered 404 with an OperationOutcome, though the export is there.
    pub polls_missing: usize,
    /// Statuses of the first polls, in their order: 202, 404 with an outcome, others with an outcome of code
    /// `processing`; 503 with `Retry-After: 1`.
    pub polls_script: Vec<u16>,
    /// True if the manifest grows, where the client sends `allowPartialManifests`: a first poll is answered 202 with
    /// the last file alone.
    pub growing: bool,
    /// Kick-offs that make an export, and whose connection is then closed without an answer.
    pub kickoffs_lost: usize,
    /// Requests to delete an export that are answered 503.
    pub deletes_refused: usize,
    /// True if each page of a manifest lists its files in the reverse of the last one's order.
    pub reordered: bool,
    /// Groups that there are, where not every name is one: of others the export is empty.
    pub groups: Option<Vec<String>>,
    /// The export itself fails: 500 with an OperationOutcome of code `processing`.
    pub export_fails: bool,
    /// True if `Prefer: separate-export-status` is in effect.
    pub separate_status: bool,
    /// File requests that are answered 503.
    pub files_unavailable: usize,
    /// File responses that break off in the middle.
    pub files_cut: usize,
    /// Files of this type are answered 404, always.
    pub missing_type: Option<String>,
    /// Files that are answered 404, always: `Patient.0`, or `Patient.0.ndjson`.
    pub missing_files: Vec<String>,
    /// Files of which half comes, and then nothing, without an end.
    pub hanging_files: Vec<String>,
    /// Content of every Binary, where it is not as many letters as its id says.
    #[serde(deserialize_with = "text::bytes")]
    pub binary: Vec<u8>,
    /// True if a Binary is answered as a resource, with its content in `data`, though the content itself was asked for.
    pub binaries_as_fhir: bool,
    /// True if files have an entity tag and `Range` is understood.
    pub ranges: bool,
    /// Links of files that were given out end: files are answered 403 until the manifest is asked for again.
    pub links_end: bool,
    /// True if files are answered by a redirect to another origin, which refuses an `Authorization`.
    pub redirect: bool,
    /// True if the manifest lists links to another origin that are signed, and refuse an `Authorization`.
    pub signed_links: bool,
    /// Kick-offs that are answered 429.
    pub kickoffs_throttled: usize,
    /// `Retry-After` of those; `1` by default.
    pub kickoff_retry_after: Option<String>,
    /// True if a GET is no kick-off, as in STU 4.
    pub post_only: bool,
    /// Parameters that the server does not support: 400, or an outcome where `handling=lenient` is preferred.
    pub unsupported: Vec<String>,
    /// Lines that are put before the first line of each file of a type.
    #[serde(deserialize_with = "text::lines")]
    pub junk: HashMap<String, Vec<u8>>,
    /// The manifest promises that many more resources a file than there are.
    pub count_off_by: u64,
    /// True if files are sent with gzip encoding.
    pub gzip: bool,
    /// Pause between two pieces of a file.
    #[serde(with = "millis")]
    pub slow: Option<Duration>,
    /// `transactionTime` instead of the clock's.
    pub transaction_time: Option<DateTime<Utc>>,
    /// Kick-offs that name this type are answered 403.
    pub forbidden_type: Option<String>,
    /// Exports that name this type are never done.
    pub endless_type: Option<String>,
    /// Content of an `error` file.
    #[serde(deserialize_with = "text::bytes")]
    pub errors: Vec<u8>,
    /// Ids put into `deleted`, beside the true ones: `Type/id`.
    pub also_deleted: Vec<String>,
    /// Files a page of the manifest, where the client sends `allowPartialManifests`; 0 for one page. Each page but the
    /// last is there while the server still works.
    pub page_files: usize,
    /// True if the manifest is of STU 4: `outcome` and no `request`.
    pub stu4: bool,
    /// True if manifests leave out what they may not, `error` and `requiresAccessToken`, have relative URLs, an empty
    /// `outputOrganizedBy`, and file names alone in `continuesInFile`.
    pub sloppy_manifest: bool,
    /// Seconds that a token lives, where the server has registered keys.
    pub token_life: Option<u64>,
    /// Token requests that are answered by a bare 400.
    pub tokens_refused: usize,
    /// Seconds by which the server's clock is ahead.
    pub clock_ahead: i64,
    /// `scopes_supported`, where they are not `system/*.read system/*.rs`.
    pub scopes: Option<Vec<String>>,
}

impl Faults {
    /// Returns true if one of `files` is the file `name`.
    pub(crate) fn names(files: &[String], name: &str) -> bool {
        files.iter().any(|file| file.trim_end_matches(".ndjson") == name.trim_end_matches(".ndjson"))
    }
}

/// Bytes as texts.
mod text {
    use std::collections::HashMap;

    use serde::{Deserialize, Deserializer};

    pub(crate) fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        String::deserialize(deserializer).map(String::into_bytes)
    }

    pub(crate) fn lines<'de, D: Deserializer<'de>>(deserializer: D) -> Result<HashMap<String, Vec<u8>>, D::Error> {
        let texts = HashMap::<String, String>::deserialize(deserializer)?;
        Ok(texts.into_iter().map(|(name, text)| (name, text.into_bytes())).collect())
    }
}

/// Spans as numbers of milliseconds.
mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer};

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(deserializer)?.map(Duration::from_millis))
    }
}
