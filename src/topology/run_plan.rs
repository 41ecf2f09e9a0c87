//! The resolved pipeline file: references read, counts chosen, memory split.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use url::Url;

use super::Topology;
use crate::config::{
    LevelName, OptimizeSection, PipelineFile, Problem, Read, SchedulePlan, SecretPlace, SourceSection, TlsSection,
    VacuumSection,
};
use crate::stages::{Memory, Stages};
use crate::values::{Text, Types, environment, is_of_server, warn_if_loose};
use bulk_data_client::{Access, AuthSettings, ClientSettings, ExportOptions, HttpSettings, Level, Proof, TlsSettings};
use fhir_arrow::LayoutOptions;

/// Source of a run's resources.
#[derive(Clone)]
#[expect(clippy::large_enum_variant, reason = "there is one of it in a process")]
pub enum SourcePlan {
    /// A FHIR server.
    Server {
        /// Its base.
        base: Url,
        /// Whose data.
        level: Level,
        /// Authentication.
        auth: AuthSettings,
        /// Settings of requests.
        http: HttpSettings,
        /// Time for which it may work.
        timeout: Duration,
        /// Parameters beside types and time.
        options: ExportOptions,
    },
    /// A folder of NDJSON.
    Folder(Url),
}

/// A pipeline, ready to run: the file with its references read.
#[derive(Clone)]
pub struct RunPlan {
    /// Its name.
    pub name: String,
    /// Source of resources.
    pub source: SourcePlan,
    /// Request to the source, as the file has it.
    pub request: SourceSection,
    /// The stages' settings.
    pub stages: Arc<Stages>,
    /// The memory budget.
    pub memory: Memory,
    /// Compaction of the tables' files.
    pub optimize: OptimizeSection,
    /// Removal of old files.
    pub vacuum: VacuumSection,
    /// The tables' folder.
    pub tables: String,
    /// The state's folder, or its URL in an object store.
    pub state: String,
    /// Time for which a lease in an object store outlives its holder's last renewal.
    pub lock_expiry: Duration,
    /// A state file of its own, for users of the Python sync script.
    pub state_file: Option<PathBuf>,
    /// Times at which it runs by itself.
    pub schedules: Vec<SchedulePlan>,
    /// Age that the last successful run may have.
    pub max_age: Duration,
}

/// Returns the place of a pipeline's state unless the file says otherwise: beside the tables, whose readers pass it
/// over.
pub fn default_state_folder(tables: &str, name: &str) -> Option<String> {
    let tables = delta_upsert::Tables::at(tables).ok()?;
    match tables.local() {
        Some(folder) => Some(folder.join(".fhirlake").join(name).display().to_string()),
        None => Some(format!("{}/.fhirlake/{name}", tables.display().trim_end_matches('/'))),
    }
}

/// Hosts that somebody who may has named: the server's words may lead there, wherever that is.
fn named_hosts(file: &PipelineFile, auth: &AuthSettings) -> Vec<String> {
    let host = |text: &str| Some(Url::parse(text).ok()?.host_str()?.to_owned());
    let mut named: Vec<String> = file.source.token_origins.iter().filter_map(|origin| host(origin)).collect();
    if let AuthSettings::Client(client) = auth {
        named.extend(client.token_url.as_ref().and_then(|url| url.host_str().map(str::to_owned)));
    }
    if let Some(attachments) = &file.stages.attachments {
        named.extend(attachments.origins.iter().filter_map(|origin| host(origin)));
    }
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        named.extend(environment(name).and_then(|proxy| host(&proxy).or_else(|| host(&format!("http://{proxy}")))));
    }
    named
}

/// Returns true if the environment says that no host is asked by a proxy. The HTTP library takes `*` for all names and
/// not for addresses.
fn no_proxy() -> bool {
    let all = |name: &str| environment(name).is_some_and(|hosts| hosts.split(',').any(|host| host.trim() == "*"));
    all("NO_PROXY") || all("no_proxy")
}

impl RunPlan {
    /// Returns the types that are asked for.
    pub fn types(&self) -> &Types {
        &self.request.types
    }

    /// Returns the layout of tables that are created, and of those that get columns.
    pub fn layout(&self) -> LayoutOptions {
        self.stages.encode.layout(self.stages.merge.adds_columns())
    }

    /// Returns the stages and edges of its runs.
    pub fn topology(&self) -> Topology {
        Topology::new(&self.stages, &self.memory)
    }

    /// Resolves a file: reads the environment and secret files. Every problem at once.
    pub fn resolve(read: &Read) -> Result<RunPlan, Vec<Problem>> {
        let file = &read.file;
        let mut texts = Texts { read, problems: Vec::new() };
        let url = texts.resolve("source.url", &file.source.url);
        let tables = texts.resolve("tables", &file.tables);
        let state = file.state.as_ref().map(|state| texts.resolve("state", state));
        let level = level(&file.source);
        let auth = auth(&file.source, &level, &mut texts)?;
        let headers = headers(&file.source, &mut texts)?;
        // Read when the process begins; what is wrong with it is said here.
        file.telemetry.iter().for_each(|telemetry| drop(texts.resolve("telemetry.otlp", &telemetry.otlp)));
        let mut problems = texts.problems;
        let tls =
            file.source.tls.as_ref().map_or_else(TlsSettings::default, |tls| tls_settings(tls, read, &mut problems));
        if !problems.is_empty() {
            return Err(problems);
        }
        // What a reference stands for is checked as what is written out.
        let url = match Url::parse(&url) {
            Ok(url) => match file.source.wrong_with(&url) {
                Some((what, hint)) => return Err(vec![read.problem("source.url", what, Some(hint))]),
                None => url,
            },
            Err(_) => return Err(vec![read.problem("source.url", "not a URL", None)]),
        };
        let state = state_place(read, &tables, state)?;
        let source = if is_of_server(&url) {
            let http = http_settings(file, &auth, headers, tls);
            let (timeout, options) = (file.source.timeout.0, file.source.export.clone());
            SourcePlan::Server { base: url, level, auth, http, timeout, options }
        } else {
            SourcePlan::Folder(url)
        };
        Ok(RunPlan {
            name: file.name.clone(),
            source,
            request: file.source.clone(),
            stages: Arc::new(file.stages.clone()),
            memory: Memory::new(file.memory.0),
            optimize: file.optimize.clone(),
            vacuum: file.vacuum.clone(),
            tables,
            state,
            lock_expiry: file.lock_expiry.0,
            state_file: None,
            // What cannot be read was a problem before.
            schedules: file.schedule.iter().filter_map(|schedule| SchedulePlan::read(schedule).ok()).collect(),
            max_age: file.health.max_age.0,
        })
    }
}

/// Resolves texts of a file, and gathers what is wrong with them.
struct Texts<'a> {
    read: &'a Read,
    problems: Vec<Problem>,
}

impl Texts<'_> {
    fn resolve(&mut self, path: &str, text: &Text) -> String {
        text.resolve().unwrap_or_else(|what| {
            // Of references only a file or vault can come back by itself.
            let passing = text.refers_elsewhere() && !what.contains("the environment has no");
            self.problems.push(Problem { passing, ..self.read.problem(path, what, None) });
            String::new()
        })
    }
}

fn level(source: &SourceSection) -> Level {
    match (source.level, &source.group) {
        (LevelName::Group, Some(id)) => Level::Group(id.clone()),
        (LevelName::Patient, _) => Level::Patient,
        _ => Level::System,
    }
}

/// Resolves `source.auth`.
fn auth(source: &SourceSection, level: &Level, texts: &mut Texts<'_>) -> Result<AuthSettings, Vec<Problem>> {
    let Some(auth) = &source.auth else { return Ok(AuthSettings::None) };
    if let Some(token) = &auth.bearer_token {
        return Ok(AuthSettings::Bearer(texts.resolve("source.auth.bearer_token", token).into()));
    }
    let Some(id) = &auth.client_id else { return Ok(AuthSettings::None) };
    let proof = match (&auth.private_key, &auth.client_secret) {
        (Some(key), _) => Proof::Key(texts.resolve("source.auth.private_key", key).into(), auth.key_id.clone()),
        (None, Some(secret)) => {
            let secret = texts.resolve("source.auth.client_secret", secret).into();
            match auth.client_secret_in {
                SecretPlace::Basic => Proof::SecretInHeader(secret),
                SecretPlace::Form => Proof::SecretInForm(secret),
            }
        }
        (None, None) => Proof::Key(String::new().into(), None),
    };
    let token_url = auth.token_url.as_ref().map(|url| Url::parse(&texts.resolve("source.auth.token_url", url)));
    let token_url =
        token_url.transpose().map_err(|_| vec![texts.read.problem("source.auth.token_url", "not a URL", None)])?;
    Ok(AuthSettings::Client(Box::new(ClientSettings {
        client_id: texts.resolve("source.auth.client_id", id).into(),
        proof,
        scope: auth.scope.clone(),
        token_url,
        audience: auth.audience.clone(),
        plain_http: auth.plain_http,
        access: Access::of(level, source.types.names()),
    })))
}

/// Resolves `source.headers`. Their values may be secrets.
fn headers(source: &SourceSection, texts: &mut Texts<'_>) -> Result<HeaderMap, Vec<Problem>> {
    let mut headers = HeaderMap::new();
    for (name, value) in &source.headers {
        let path = format!("source.headers.{name}");
        let value = texts.resolve(&path, value);
        let parsed = HeaderName::from_bytes(name.as_bytes()).ok().zip(HeaderValue::from_str(&value).ok());
        let Some((name, mut value)) = parsed else {
            return Err(vec![texts.read.problem(&path, "not a header's name and value", None)]);
        };
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}

/// Returns where the state is, after a look at where the tables are.
fn state_place(read: &Read, tables: &str, state: Option<String>) -> Result<String, Vec<Problem>> {
    if let Err(error) = delta_upsert::Tables::at(tables) {
        return Err(vec![read.problem("tables", error.to_string(), None)]);
    }
    let Some(state) = state.or_else(|| default_state_folder(tables, &read.file.name)) else {
        return Err(vec![read.problem("tables", "not a place beside which a state can be", Some("set `state`"))]);
    };
    // A URL of a folder is one's path.
    match delta_upsert::Tables::at(&state) {
        Ok(folder) if state.contains("://") => Ok(folder.display()),
        Ok(_) => Ok(state),
        Err(error) => Err(vec![read.problem("state", error.to_string().replace("tables", "the state"), None)]),
    }
}

fn http_settings(file: &PipelineFile, auth: &AuthSettings, headers: HeaderMap, tls: TlsSettings) -> HttpSettings {
    let source = &file.source;
    HttpSettings {
        retry_for: source.retry_for.0,
        max_pause: source.max_poll_interval.0,
        max_kick_off_wait: source.max_kick_off_wait.0,
        headers,
        retry_status: source.retry_status.clone(),
        token_origins: source.token_origins.iter().filter_map(|url| Some(Url::parse(url).ok()?.origin())).collect(),
        downloads: file.stages.download.concurrency,
        tls,
        no_proxy: no_proxy(),
        named_hosts: named_hosts(file, auth),
        user_agent: concat!("fhirlake/", env!("CARGO_PKG_VERSION")),
        traceparent: Some(crate::telemetry::traceparent),
        ..HttpSettings::default()
    }
}

/// The certificates of `source.tls`, read; what is wrong with them becomes problems.
fn tls_settings(section: &TlsSection, read: &Read, problems: &mut Vec<Problem>) -> TlsSettings {
    let mut settings = TlsSettings::default();
    let mut pem = |key: &str, value: &Option<Text>, is_secret: bool| {
        let value = value.as_ref()?;
        let content = value.resolve().and_then(|text| match text.contains("-----BEGIN") {
            true => Ok(text),
            false => {
                if is_secret {
                    warn_if_loose(&text);
                }
                std::fs::read_to_string(&text).map_err(|error| match key {
                    "source.tls.ca_file" => format!("{text} cannot be read: {error}"),
                    // It may be the key itself, in a form that is not PEM: it is not shown.
                    _ => format!("the value is neither PEM (`-----BEGIN`) nor a file that can be read: {error}"),
                })
            }
        });
        content.map_err(|what| problems.push(Problem { passing: true, ..read.problem(key, what, None) })).ok()
    };
    let ca = pem("source.tls.ca_file", &section.ca_file, false);
    let certificate = pem("source.tls.client_certificate", &section.client_certificate, false);
    let client_key = pem("source.tls.client_key", &section.client_key, true);
    if let Some(Err(what)) = ca.map(|pem| settings.trust(&pem)) {
        problems.push(read.problem("source.tls.ca_file", what, None));
    }
    // Where one of them could not be read, that has been said.
    let has_key = section.client_key.is_some() == client_key.is_some();
    if let Some(certificate) = certificate.filter(|_| has_key)
        && let Err(what) = settings.identify(&format!("{certificate}\n{}", client_key.unwrap_or_default()))
    {
        problems.push(read.problem("source.tls.client_certificate", what, None));
    }
    settings
}
