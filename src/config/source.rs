//! `source:` of the pipeline file: the server, what is asked of it, and who we are to it.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::values::{Instant, Span, Text, instant_schema, resource_types_schema};

/// Where resources come from.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
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
    /// Resource types; empty for all that the server has (`_type`). Those that the server refuses together are asked for
    /// by halves: one that it does not give fails alone.
    #[serde(default)]
    #[schemars(schema_with = "resource_types_schema")]
    pub types: Vec<String>,
    /// What is asked for: since the tables' watermark, everything, or since an instant (`_since`). Types whose
    /// watermarks lie within an hour are asked for together, from the oldest of them.
    #[serde(default = "defaults::since")]
    pub since: Instant,
    /// Taken off the watermark before it is asked with.
    #[serde(default = "defaults::overlap")]
    pub overlap: Span,
    /// Nothing that changed after this instant (`_until`, STU 3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "instant_schema")]
    pub until: Option<String>,
    /// Elements that resources are cut down to (`_elements`): `id`, or `Patient.id`. Tables keep complete resources over
    /// such ones.
    #[serde(default)]
    pub elements: Vec<String>,
    /// FHIR searches that resources must match (`_typeFilter`), unencoded: `Observation?category=laboratory`.
    #[serde(default)]
    pub type_filters: Vec<String>,
    /// Only the data of these patients (`patient`): `Patient/7`, or ids. Needs a POST, and level patient or group.
    #[serde(default)]
    pub patients: Vec<String>,
    /// Resources that come along (`includeAssociatedData`): LatestProvenanceResources, RelevantProvenanceResources, or the
    /// server's own.
    #[serde(default)]
    pub include_associated_data: Vec<String>,
    /// A type by whose instances files are organised (`organizeOutputBy`, STU 3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organize_output_by: Option<String>,
    /// Lets the server page its manifest, and list files while it still works (`allowPartialManifests`, STU 3).
    #[serde(default)]
    pub allow_partial_manifests: bool,
    /// Format of the files (`_outputFormat`). Default: the parameter is not sent, since some servers refuse the usual value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_format: Option<String>,
    /// Further parameters of the kick-off.
    #[serde(default)]
    pub parameters: BTreeMap<String, OneOrMore>,
    /// Further headers of every request to the server.
    #[serde(default)]
    pub headers: BTreeMap<String, Text>,
    /// How the kick-off is sent; `auto`: POST where a parameter needs it, else GET.
    #[serde(default)]
    pub method: MethodName,
    /// How a parameter with several values is written; a POST always repeats it.
    #[serde(default)]
    pub lists: ListStyle,
    /// Lets the server pass over what it does not support (`Prefer: handling=lenient`); what it ignored is read back and
    /// reported.
    #[serde(default)]
    pub lenient: bool,
    /// Asks for the export's own status apart from the poll's (`Prefer: separate-export-status`, STU 3).
    #[serde(default)]
    pub separate_export_status: bool,
    /// Who we are to the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<AuthSection>,
    /// Certificates: the CA that the server's is of, and ours where it asks for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSection>,
    /// Origins beside the server's own that may get the token for files that require it: `https://files.example.org`.
    #[serde(default)]
    pub token_origins: Vec<String>,
    /// How long the server may work on an export.
    #[serde(default = "defaults::timeout")]
    pub timeout: Span,
    /// How long a request that fails for a passing reason is tried again.
    #[serde(default = "defaults::retry_for")]
    pub retry_for: Span,
    /// Statuses of polls and files that pass by themselves with this server, beside 408, 425, 429, 500, 502, 503 and 504.
    #[serde(default)]
    pub retry_status: Vec<u16>,
    /// Longest pause between polls, and longest that a server may ask for.
    #[serde(default = "defaults::max_poll_interval")]
    pub max_poll_interval: Span,
    /// Pauses before a kick-off that a server's refusal (429) may ask for within a run; a longer one ends the run, and the
    /// next is not before it.
    #[serde(default = "defaults::max_kick_off_wait")]
    pub max_kick_off_wait: Span,
    /// Writes the log that Bulk Data clients share (`log.ndjson`, version 2) of each run into `export-logs` of the state.
    #[serde(default)]
    pub export_log: bool,
    /// When the server is told that its files are no longer needed.
    #[serde(default)]
    pub delete_export: DeleteExport,
    /// What an error that the server reports of its own export leads to: an issue of severity `error` or `fatal` in an error
    /// file or among the rows, an error file that cannot be read, a file that breaks off.
    #[serde(default)]
    pub export_errors: ExportErrors,
    /// Codes of issues (`issue.code`, `issue.details.coding.code`) that do not hold watermarks, for servers that always report
    /// them: `[forbidden, not-supported]`.
    #[serde(default)]
    pub ignored_issue_codes: Vec<String>,
}

/// What an error that the server reports of its own export leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ExportErrors {
    /// What came is merged, the watermarks of the types concerned stay, and the run ends with exit code 10.
    #[default]
    Hold,
    /// It is reported, and watermarks move: what the server did not give is not asked for again.
    Ignore,
}

/// A value, or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMore {
    /// One.
    One(String),
    /// Several: the parameter is repeated.
    More(Vec<String>),
}

impl OneOrMore {
    /// The values.
    pub fn values(&self) -> &[String] {
        match self {
            OneOrMore::One(value) => std::slice::from_ref(value),
            OneOrMore::More(values) => values,
        }
    }
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

/// How the kick-off is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MethodName {
    /// POST where a parameter needs it, else GET.
    #[default]
    Auto,
    /// GET, with the parameters in the URL (STU 1 to 3).
    Get,
    /// POST, with the parameters in a `Parameters` resource (the only form of STU 4).
    Post,
}

/// How a parameter with several values is written in a GET.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ListStyle {
    /// `_type=Patient,Condition`; `_typeFilter` is always repeated, since a search may hold commas.
    #[default]
    Comma,
    /// `_type=Patient&_type=Condition`
    Repeat,
}

/// When the server is told that its files are no longer needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeleteExport {
    /// Once every type has committed.
    #[default]
    AfterCommit,
    /// Never.
    Never,
}

/// Who we are to the server: a client with a private key (a SMART backend service) or a secret, or the bearer of a token.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuthSection {
    /// The client id that the server knows us by.
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
    /// Where the secret goes.
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
    /// What is wrong with the source's URL, and what may help: of one that is written out, and of what a reference stands for.
    pub(super) fn wrong_with(&self, url: &url::Url) -> Option<(String, &'static str)> {
        if !is_of_server(url) && url.scheme() != "file" {
            // An object store's, where this build has it.
            let hint = "http, https, file, or an object store of NDJSON: s3, abfss, gs";
            return delta_upsert::Tables::at(url.as_str()).err().map(|error| (error.to_string(), hint));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Some(("no user and password in a URL: it would be logged".to_owned(), "use source.auth"));
        }
        let hint = "https, or source.auth.plain_http: true";
        self.is_too_open(url)
            .then(|| ("the token and the data would go by http, for everybody on the way to read".to_owned(), hint))
    }

    /// Whether a token would go unencrypted to another machine (T1) though nothing allows it.
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

/// Whether a URL is a server's, and no folder's.
pub(super) fn is_of_server(url: &url::Url) -> bool {
    matches!(url.scheme(), "http" | "https")
}

/// Where a client's secret goes.
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
