//! `source:` of the pipeline file: the server, what is asked of it, and who we are to it.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::values::{Findings, Instant, Span, Text, Types, is_of_server, is_origin};
use bulk_data_client::{ExportOptions, Method};
use fhir_arrow::{EXCLUDED_TYPES, Model};

/// Source of resources.
// serde cannot deny unknown keys where keys are flattened; the check of the whole file does.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("additionalProperties" = false))]
pub struct SourceSection {
    /// FHIR base URL, or a folder of NDJSON files: `file:///folder`, `s3://bucket/folder`, `abfss://…`, `gs://…`.
    pub url: Text,
    /// A server's kind: sets defaults for the other keys of `source`, and nothing else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<ProfileName>,
    /// Whose data is exported.
    #[serde(default)]
    pub level: LevelName,
    /// The group's id, for level `group`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Resource types; empty for all that the server has (`_type`). If the server rejects the list, fhirlake bisects
    /// it: only the rejected type fails.
    #[serde(default)]
    pub types: Types,
    /// From when changes are exported (`_since`): the tables' watermark, an instant, or none for everything. Types
    /// whose watermarks lie within an hour share an export, from the oldest of them.
    #[serde(default = "defaults::since")]
    pub since: Instant,
    /// Subtracted from the watermark for `_since`.
    #[serde(default = "defaults::overlap")]
    pub overlap: Span,
    /// Parameters of the kick-off beside types and time.
    #[serde(flatten)]
    pub export: ExportOptions,
    /// Further headers of every request to the server.
    #[serde(default)]
    pub headers: BTreeMap<String, Text>,
    /// Authentication.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<AuthSection>,
    /// Certificates: the CA that the server's is of, and ours where it asks for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSection>,
    /// Origins beside the server's own that may get the token for files that require it: `https://files.example.org`.
    #[serde(default)]
    pub token_origins: Vec<String>,
    /// Time for which the server may work on an export.
    #[serde(default = "defaults::timeout")]
    pub timeout: Span,
    /// Time for which a request that fails for a transient reason is retried.
    #[serde(default = "defaults::retry_for")]
    pub retry_for: Span,
    /// Further statuses of polls and files that are retried, beside 408, 425, 429, 500, 502, 503 and 504.
    #[serde(default)]
    pub retry_status: Vec<u16>,
    /// Longest pause between polls, and longest that a server may ask for.
    #[serde(default = "defaults::max_poll_interval")]
    pub max_poll_interval: Span,
    /// Longest pause before a kick-off that a rate limit (429) may ask for within a run. A longer one ends the run with
    /// exit code 12, and no run starts a kick-off before it is over.
    #[serde(default = "defaults::max_kick_off_wait")]
    pub max_kick_off_wait: Span,
    /// Writes the log that Bulk Data clients share (`log.ndjson`, version 2) of each run into `export-logs` of the
    /// state.
    #[serde(default)]
    pub export_log: bool,
    /// Time at which the export job is deleted on the server.
    #[serde(default)]
    pub delete_export: DeleteExport,
    /// Treatment of errors that the server reports of its own export: an issue of severity `error` or `fatal` in an
    /// error file or among the rows, an error file that cannot be read, a file that breaks off.
    #[serde(default)]
    pub export_errors: ExportErrors,
    /// Codes of issues (`issue.code`, `issue.details.coding.code`) that do not hold watermarks, for servers that always
    /// report them: `[forbidden, not-supported]`.
    #[serde(default)]
    pub ignored_issue_codes: Vec<String>,
}

/// Treatment of errors that the server reports of its own export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ExportErrors {
    /// Rows that came are merged, the watermarks of the types concerned stay, and the run ends with exit code 10.
    #[default]
    Hold,
    /// The report counts it, and watermarks advance: what the server did not deliver is not requested again.
    Ignore,
}

/// Servers whose ways are known; `fhirlake profiles` shows what each sets, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProfileName {
    /// Epic.
    Epic,
    /// Oracle Health (Cerner) Millennium.
    Oracle,
    /// The SMART reference server.
    Smart,
    /// HAPI FHIR.
    Hapi,
    /// CMS Beneficiary Claims Data API.
    Bcda,
    /// AWS HealthLake.
    Healthlake,
    /// athenahealth.
    Athena,
    /// Medplum.
    Medplum,
    /// Azure Health Data Services.
    Azure,
}

/// Certificates of a server, and ours. Each is the path of a PEM file, or the PEM itself by a reference: `${env:NAME}`,
/// `${file:/path}`. They are read when a run begins.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsSection {
    /// Certificates of CAs that are trusted beside the system's: the hospital's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<Text>,
    /// Our certificate, with its chain, for a server or gateway that asks for one (mutual TLS).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_certificate: Option<Text>,
    /// The private key of `client_certificate`, unencrypted, where that file does not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_key: Option<Text>,
}

/// Whose data is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LevelName {
    /// Everything: `[base]/$export`.
    #[default]
    System,
    /// All patients: `[base]/Patient/$export`.
    Patient,
    /// A group of patients: `[base]/Group/[id]/$export`.
    Group,
}

/// Time at which the export job is deleted on the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeleteExport {
    /// Once every type has committed.
    #[default]
    AfterCommit,
    /// Never.
    Never,
}

/// Authentication: a client with a private key (a SMART backend service) or a secret, or a bearer token.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuthSection {
    /// The registered client id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_id: Option<Text>,
    /// The private key: a JWK, a JWKS or a PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_key: Option<Text>,
    /// The `kid` of the key: which of a JWKS, and what a PEM, which has none, is registered as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// A secret, instead of a key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_secret: Option<Text>,
    /// Place of the secret.
    #[serde(default)]
    pub client_secret_in: SecretPlace,
    /// The scopes to ask for. Default: those that the server's SMART configuration supports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    /// The token endpoint, where the server's SMART configuration does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_url: Option<Text>,
    /// The assertion's audience (`aud`), where the server wants another than the token endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audience: Option<String>,
    /// A token that never changes, instead of a client id and key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bearer_token: Option<Text>,
    /// Lets the token go to another machine by http, where everybody on the way can read it and the data.
    #[serde(default)]
    pub plain_http: bool,
}

impl SourceSection {
    /// Returns the problem of the source's URL, with a hint: of one that is written out, and of what a reference stands
    /// for.
    pub(crate) fn wrong_with(&self, url: &url::Url) -> Option<(String, &'static str)> {
        if !is_of_server(url) && url.scheme() != "file" {
            // An object store's, where this build has it.
            let hint = "http, https, file, or an object store of NDJSON: s3, abfss, gs";
            return delta_upsert::Tables::at(url.as_str()).err().map(|error| (error.to_string(), hint));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Some(("a URL must not have a user and password: URLs are logged".to_owned(), "use source.auth"));
        }
        let hint = "https, or source.auth.plain_http: true";
        self.is_too_open(url).then(|| ("token and data would be sent unencrypted by http".to_owned(), hint))
    }

    /// Returns true if a token would go unencrypted to another machine (T1) though nothing allows it.
    fn is_too_open(&self, url: &url::Url) -> bool {
        let is_here = match url.host() {
            Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
            Some(url::Host::Ipv4(address)) => address.is_loopback(),
            Some(url::Host::Ipv6(address)) => address.is_loopback(),
            None => true,
        };
        url.scheme() == "http" && !is_here && self.auth.as_ref().is_some_and(|auth| !auth.plain_http)
    }
}

impl SourceSection {
    /// Finds values that make no sense.
    pub(super) fn check(&self, found: &mut Findings) {
        self.check_level(found);
        self.check_url(found);
        if let Some(auth) = &self.auth {
            found.below("auth", |found| auth.check(found));
        }
        let is_alone =
            self.tls.as_ref().is_some_and(|tls| tls.client_key.is_some() && tls.client_certificate.is_none());
        let hint = "set source.tls.client_certificate too";
        found.add_if(is_alone, "tls.client_key", "a key without its certificate", Some(hint));
        self.check_filters(found);
        for (index, origin) in self.token_origins.iter().enumerate() {
            let what = "not an origin such as https://files.example.org";
            found.add_if(!is_origin(origin), &format!("token_origins.{index}"), what, None);
        }
        for name in self.headers.keys() {
            let path = format!("headers.{name}");
            if reqwest::header::HeaderName::from_bytes(name.as_bytes()).is_err() {
                found.add(path, "not a header's name", None);
            } else if name.eq_ignore_ascii_case("authorization") {
                found.add(path, "tokens go into source.auth, so that they go to no other host", None);
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        for (index, name) in self.types.names().iter().enumerate() {
            let path = format!("types.{index}");
            found.add_if(!seen.insert(name), &path, "this type stands twice", None);
            let has_no_table = EXCLUDED_TYPES.contains(&name.as_str());
            found.add_if(has_no_table, &path, "Pathling's layout has no table for this type", None);
        }
    }

    fn check_level(&self, found: &mut Findings) {
        match (self.level, &self.group) {
            (LevelName::Group, None) => {
                found.add("level", "level group needs source.group", Some("the group's id, as in Group/[id]/$export"));
            }
            (LevelName::System | LevelName::Patient, Some(_)) => {
                found.add("group", "a group without level group", Some("set source.level: group"));
            }
            _ => {}
        }
        let named = !self.export.patients.is_empty();
        let hint = "set source.level: patient, or group";
        found.add_if(named && self.level == LevelName::System, "patients", "patients at level system", Some(hint));
        let what = "patients cannot be named in a GET";
        found.add_if(named && self.export.method == Method::Get, "patients", what, Some("leave source.method out"));
    }

    /// Checks nothing of a URL that is a reference: it is checked once it is resolved.
    fn check_url(&self, found: &mut Findings) {
        if self.url.0.contains("${") {
            return;
        }
        match url::Url::parse(&self.url.0) {
            Err(_) => found.add("url", "not a URL", Some("https://… of a FHIR base, or file:///folder of NDJSON")),
            Ok(url) if !is_of_server(&url) && self.auth.is_some() => {
                found.add("auth", "a folder needs no authentication", None);
            }
            Ok(url) => {
                if let Some((what, hint)) = self.wrong_with(&url) {
                    found.add("url", what, Some(hint));
                }
            }
        }
    }

    fn check_filters(&self, found: &mut Findings) {
        for (index, filter) in self.export.type_filters.iter().enumerate() {
            let path = format!("type_filters.{index}");
            let name = filter.split('?').next().unwrap_or_default();
            if !filter.contains('?') || !Model::r4().is_resource_type(name) {
                found.add(&path, "not a search such as Observation?category=laboratory", None);
            } else if !self.types.contains(name) {
                found.add(&path, "a filter of a type that source.types does not ask for", None);
            }
            // K16: what arranges an answer, rather than choosing resources, has no place in it.
            let parameters = filter.split('?').nth(1).unwrap_or_default().split('&');
            for parameter in parameters.map(|parameter| parameter.split(['=', ':']).next().unwrap_or_default()) {
                if ["_sort", "_count", "_include", "_revinclude", "_summary", "_elements", "_total", "_contained"]
                    .contains(&parameter)
                {
                    found.add(&path, format!("{parameter} has no place in a filter"), None);
                }
            }
        }
    }
}

impl AuthSection {
    fn check(&self, found: &mut Findings) {
        if let Some(token_url) = &self.token_url
            && !token_url.0.contains("${")
            && !url::Url::parse(&token_url.0).is_ok_and(|url| is_of_server(&url))
        {
            found.add("token_url", "neither an http nor an https URL", None);
        }
        let proofs = usize::from(self.private_key.is_some()) + usize::from(self.client_secret.is_some());
        match (self.bearer_token.is_some(), self.client_id.is_some(), proofs) {
            (true, false, 0) | (false, true, 1) => {}
            (true, _, _) => found.add("bearer_token", "either a bearer token or a client id and key", None),
            (false, _, 2) => found.add("client_secret", "either a private key or a secret", None),
            (false, true, _) => found.add(
                "",
                "auth.client_id needs auth.private_key or auth.client_secret",
                Some("a run never goes unauthenticated by mistake"),
            ),
            (false, false, 1) => found.add("", "auth.private_key and auth.client_secret need auth.client_id", None),
            (false, false, _) => found.add("", "auth is empty", Some("client_id and private_key, or bearer_token")),
        }
    }
}

/// Place of a client's secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SecretPlace {
    /// `Authorization: Basic` (RFC 6749, section 2.3.1).
    #[default]
    Basic,
    /// The form, as `client_id` and `client_secret`.
    Form,
}

mod defaults {
    use super::{Duration, Instant, Span};

    pub(crate) fn since() -> Instant {
        Instant::LastSync
    }
    pub(crate) fn overlap() -> Span {
        Span(Duration::ZERO)
    }
    /// The recipe's.
    pub(crate) fn timeout() -> Span {
        Span(Duration::from_secs(3600))
    }
    pub(crate) fn retry_for() -> Span {
        Span(Duration::from_secs(15 * 60))
    }
    pub(crate) fn max_poll_interval() -> Span {
        Span(Duration::from_secs(60))
    }
    pub(crate) fn max_kick_off_wait() -> Span {
        Span(Duration::from_secs(60))
    }
}
