//! What a pipeline file resolves to: references read, counts chosen, memory split.

use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::check::{Problem, Read};
use super::file::{
    AttachmentsSection, Bad, FileColumns, MaxBad, Mode, OptimizeSection, SchemaEvolution, ShortFile, VacuumSection,
};
use super::schedule::SchedulePlan;
use super::source::{
    DeleteExport, ExportErrors, LevelName, ListStyle, MethodName, SecretPlace, SourceSection, TlsSection, is_of_server,
};
use super::values::{Instant, Text, environment, warn_if_loose};
use crate::messages::Limit;
use bulk_data_client::{Access, AuthSettings, ClientSettings, ExportOptions, HttpSettings, Level, Method, Proof, TlsSettings};
use fhir_arrow::{Columns, LayoutOptions};

/// Where a run's resources come from.
#[derive(Clone)]
#[expect(clippy::large_enum_variant, reason = "there is one of it in a process")]
pub enum SourcePlan {
    /// A FHIR server.
    Server {
        /// Its base.
        base: Url,
        /// Whose data.
        level: Level,
        /// Who we are.
        auth: AuthSettings,
        /// How requests behave.
        http: HttpSettings,
        /// How long it may work.
        timeout: Duration,
        /// What is asked beside types and time.
        options: ExportOptions,
    },
    /// A folder of NDJSON.
    Folder(Url),
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// What changed since the tables' watermark.
    LastSync,
    /// Everything.
    Everything,
    /// What changed since; microseconds since the epoch.
    At(i64),
}

/// How `memory:` is divided. Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySplit {
    /// Edge download → parse.
    pub chunks: usize,
    /// Edge parse → encode.
    pub rows: usize,
    /// Edge encode → merge.
    pub batches: usize,
    /// JSON that open batches may stand for.
    pub open_batches: usize,
    /// JSON at which a batch is closed.
    pub row_group: usize,
    /// Keys of staged rows; beyond it they go to disk.
    pub keys: usize,
    /// Matching, all tables at once together; beyond it, by parts of the key space.
    pub matching: usize,
    /// Columns of one resource.
    pub row: usize,
    /// Footers of the files that are open.
    pub footers: usize,
    /// All of it.
    pub total: usize,
}

impl MemorySplit {
    /// Divides `memory`. Weights by what was measured: a byte of NDJSON weighs about 1.6 bytes with its tape, about
    /// one as columns, and a fifth of that as pages; closing a batch needs its columns and pages at once.
    pub fn of(memory: u64, encode_workers: usize, row_group: u64) -> Self {
        let share = |percent: u64| usize::try_from(memory / 100 * percent).unwrap_or(usize::MAX);
        let open_batches = share(36);
        // Each worker may be closing a batch while the others are open.
        let row_group = usize::try_from(row_group).unwrap_or(usize::MAX).min(open_batches / (encode_workers + 1));
        Self {
            chunks: share(14),
            rows: share(18),
            batches: share(9),
            open_batches,
            row_group,
            keys: share(11),
            matching: share(12),
            row: usize::try_from(memory / 8).unwrap_or(usize::MAX),
            // Of what the process has beside `memory`.
            footers: usize::try_from(memory / 8).unwrap_or(usize::MAX).min(64 << 20),
            total: share(100),
        }
    }
}

/// A pipeline, ready to run.
#[derive(Clone)]
pub struct Plan {
    /// Its name.
    pub name: String,
    /// Where resources come from.
    pub source: SourcePlan,
    /// Types; empty for all.
    pub types: Vec<String>,
    /// What is asked for.
    pub since: Since,
    /// Taken off a watermark.
    pub overlap: Duration,
    /// Whether the log that Bulk Data clients share is written.
    pub export_log: bool,
    /// Whether the server is told when its files are no longer needed.
    pub delete_export: bool,
    /// Files at the same time.
    pub downloads: usize,
    /// Bytes of a chunk.
    pub chunk_bytes: usize,
    /// How often a file is begun.
    pub tries: usize,
    /// Most bytes of a file, unpacked.
    pub max_file: u64,
    /// Whether a file with fewer resources than the manifest promises fails its type.
    pub fail_short_files: bool,
    /// Parse threads.
    pub parse_workers: usize,
    /// Longest line.
    pub max_line: usize,
    /// Bad lines that a type may have.
    pub max_bad_lines: Limit,
    /// Whether watermarks move whatever the server says of its export.
    pub ignore_export_errors: bool,
    /// Codes of issues that hold no watermark.
    pub ignored_issue_codes: Vec<String>,
    /// What becomes of attachments that resources link to; `None`: they stay links.
    pub attachments: Option<AttachmentsSection>,
    /// Encode threads.
    pub encode_workers: usize,
    /// Layout of tables that are created.
    pub layout: LayoutOptions,
    /// Which columns files have.
    pub columns: Columns,
    /// Tables at once.
    pub tables_at_once: usize,
    /// What becomes of rows that the export does not name.
    pub mode: Mode,
    /// How many of them may be deleted.
    pub max_deleted: Limit,
    /// Size at which a file is closed.
    pub target_file_bytes: u64,
    /// How often, and after how many bytes, what is staged is written down.
    pub checkpoint: (Duration, u64),
    /// Deletion vectors in new tables.
    pub deletion_vectors: bool,
    /// Deletion vectors in tables that exist and have them off.
    pub upgrade_deletion_vectors: bool,
    /// When and how the tables' files are tidied.
    pub optimize: OptimizeSection,
    /// When old files are removed.
    pub vacuum: VacuumSection,
    /// Memory.
    pub memory: MemorySplit,
    /// The tables' folder.
    pub tables: String,
    /// The state's folder, or its URL in an object store.
    pub state: String,
    /// How long a lock in an object store outlives its holder's last word.
    pub lock_expiry: Duration,
    /// A state file of its own, for the recipe's users.
    pub state_file: Option<PathBuf>,
    /// When it runs by itself.
    pub schedules: Vec<SchedulePlan>,
    /// How long ago the last successful run may have completed.
    pub max_age: Duration,
}

/// Where a pipeline's state is unless the file says otherwise: beside the tables, whose readers pass it over.
pub fn default_state_folder(tables: &str, name: &str) -> Option<String> {
    let tables = delta_upsert::Tables::at(tables).ok()?;
    match tables.local() {
        Some(folder) => Some(folder.join(".fhirlake").join(name).display().to_string()),
        None => Some(format!("{}/.fhirlake/{name}", tables.display().trim_end_matches('/'))),
    }
}

/// Hosts that somebody who may has named: the server's words may lead there, wherever that is.
fn named_hosts(file: &super::file::PipelineFile, auth: &AuthSettings) -> Vec<String> {
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

/// Whether the environment says that no host is asked by a proxy. The HTTP library takes `*` for all names and not for
/// addresses.
fn no_proxy() -> bool {
    let all = |name: &str| environment(name).is_some_and(|hosts| hosts.split(',').any(|host| host.trim() == "*"));
    all("NO_PROXY") || all("no_proxy")
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The default of `stages.parse.max_bad_lines`: a few bad lines are a server's usual faults, many are another format.
const USUAL_BAD_LINES: Limit = Limit::NumberOrShare(100, 0.01);

/// The default of `stages.parse.max_line`, where memory is no reason for less.
const USUAL_MAX_LINE: usize = 64 << 20;

impl Plan {
    /// Resolves a file: reads the environment and secret files. Every problem at once.
    pub fn resolve(read: &Read) -> Result<Plan, Vec<Problem>> {
        let file = &read.file;
        let mut problems = Vec::new();
        let mut text = |path: &str, text: &Text| {
            text.resolve().unwrap_or_else(|what| {
                // Of references only a file or vault can come back by itself.
                let passing = text.refers_elsewhere() && !what.contains("the environment has no");
                problems.push(Problem { passing, ..read.problem(path, what, None) });
                String::new()
            })
        };
        let url = text("source.url", &file.source.url);
        let tables = text("tables", &file.tables);
        let state = file.state.as_ref().map(|state| text("state", state));
        let source = &file.source;
        let level = match (source.level, &source.group) {
            (LevelName::Group, Some(id)) => Level::Group(id.clone()),
            (LevelName::Patient, _) => Level::Patient,
            _ => Level::System,
        };
        let auth = match &source.auth {
            None => AuthSettings::None,
            Some(auth) => match (&auth.bearer_token, &auth.client_id) {
                (Some(token), _) => AuthSettings::Bearer(text("source.auth.bearer_token", token).into()),
                (None, Some(id)) => {
                    let proof = match (&auth.private_key, &auth.client_secret) {
                        (Some(key), _) => Proof::Key(text("source.auth.private_key", key).into(), auth.key_id.clone()),
                        (None, Some(secret)) => {
                            let secret = text("source.auth.client_secret", secret).into();
                            match auth.client_secret_in {
                                SecretPlace::Basic => Proof::SecretInHeader(secret),
                                SecretPlace::Form => Proof::SecretInForm(secret),
                            }
                        }
                        (None, None) => Proof::Key(String::new().into(), None),
                    };
                    let token_url = match auth.token_url.as_ref().map(|url| Url::parse(&text("source.auth.token_url", url))) {
                        None => None,
                        Some(Ok(url)) => Some(url),
                        Some(Err(_)) => return Err(vec![read.problem("source.auth.token_url", "not a URL", None)]),
                    };
                    AuthSettings::Client(Box::new(ClientSettings {
                        client_id: text("source.auth.client_id", id).into(),
                        proof,
                        scope: auth.scope.clone(),
                        token_url,
                        audience: auth.audience.clone(),
                        plain_http: auth.plain_http,
                        access: Access::of(&level, &source.types),
                    }))
                }
                (None, None) => AuthSettings::None,
            },
        };
        let mut headers = reqwest::header::HeaderMap::new();
        for (name, value) in &source.headers {
            let value = text(&format!("source.headers.{name}"), value);
            let parsed = reqwest::header::HeaderName::from_bytes(name.as_bytes()).ok();
            match parsed.zip(reqwest::header::HeaderValue::from_str(&value).ok()) {
                Some((name, mut value)) => {
                    value.set_sensitive(true);
                    headers.insert(name, value);
                }
                None => {
                    return Err(vec![read.problem(&format!("source.headers.{name}"), "not a header's name and value", None)]);
                }
            }
        }
        // Read when the process begins; what is wrong with it is said here.
        file.telemetry.iter().for_each(|telemetry| drop(text("telemetry.otlp", &telemetry.otlp)));
        let tls = source.tls.as_ref().map_or_else(TlsSettings::default, |tls| tls_settings(tls, read, &mut problems));
        if !problems.is_empty() {
            return Err(problems);
        }
        // What a reference stands for is checked as what is written out.
        let url = match Url::parse(&url) {
            Ok(url) => match source.wrong_with(&url) {
                Some((what, hint)) => return Err(vec![read.problem("source.url", what, Some(hint))]),
                None => url,
            },
            Err(_) => return Err(vec![read.problem("source.url", "not a URL", None)]),
        };
        if let Err(error) = delta_upsert::Tables::at(&tables) {
            return Err(vec![read.problem("tables", error.to_string(), None)]);
        }
        let Some(state) = state.or_else(|| default_state_folder(&tables, &file.name)) else {
            return Err(vec![read.problem("tables", "not a place beside which a state can be", Some("set `state`"))]);
        };
        // A URL of a folder is one's path.
        let state = match delta_upsert::Tables::at(&state) {
            Ok(folder) if state.contains("://") => folder.display(),
            Ok(_) => state,
            Err(error) => return Err(vec![read.problem("state", error.to_string().replace("tables", "the state"), None)]),
        };
        let source = if !is_of_server(&url) {
            SourcePlan::Folder(url)
        } else {
            let http = HttpSettings {
                retry_for: file.source.retry_for.0,
                max_pause: file.source.max_poll_interval.0,
                max_kick_off_wait: file.source.max_kick_off_wait.0,
                headers,
                retry_status: file.source.retry_status.clone(),
                token_origins: file.source.token_origins.iter().filter_map(|url| Some(Url::parse(url).ok()?.origin())).collect(),
                downloads: file.stages.download.concurrency,
                tls,
                no_proxy: no_proxy(),
                named_hosts: named_hosts(&read.file, &auth),
                user_agent: concat!("fhirlake/", env!("CARGO_PKG_VERSION")),
                traceparent: Some(crate::telemetry::traceparent),
                ..HttpSettings::default()
            };
            let options = export_options(&file.source);
            SourcePlan::Server { base: url, level, auth, http, timeout: file.source.timeout.0, options }
        };
        let workers = |number: usize| if number == 0 { cores() } else { number };
        let stages = &file.stages;
        let encode_workers = workers(stages.encode.workers);
        let bytes = |size: super::ByteSize| usize::try_from(size.0).unwrap_or(usize::MAX);
        let max_bad_lines = match stages.parse.on_bad_line {
            Bad::Fail => Limit::Number(0),
            Bad::Quarantine => stages.parse.max_bad_lines.map_or(USUAL_BAD_LINES, MaxBad::limit),
        };
        Ok(Plan {
            name: file.name.clone(),
            source,
            types: file.source.types.clone(),
            since: match file.source.since {
                Instant::LastSync => Since::LastSync,
                Instant::None => Since::Everything,
                Instant::At(micros) => Since::At(micros),
            },
            overlap: file.source.overlap.0,
            export_log: file.source.export_log,
            delete_export: file.source.delete_export == DeleteExport::AfterCommit,
            downloads: stages.download.concurrency,
            chunk_bytes: bytes(stages.download.chunk),
            tries: stages.download.tries,
            max_file: stages.download.max_file.0,
            fail_short_files: stages.download.on_short_file == ShortFile::Fail,
            parse_workers: workers(stages.parse.workers),
            // Several of the usual most would be more than a small memory has; who asks for another has counted.
            max_line: stages.parse.max_line.map_or(USUAL_MAX_LINE.min(bytes(file.memory) / 8), bytes),
            max_bad_lines,
            ignore_export_errors: file.source.export_errors == ExportErrors::Ignore,
            ignored_issue_codes: file.source.ignored_issue_codes.clone(),
            encode_workers,
            attachments: stages.attachments.clone(),
            layout: LayoutOptions {
                extensions: stages.encode.extensions,
                max_nesting_level: stages.encode.max_nesting_level,
                open_types: stages.encode.open_types.clone(),
                source_json: stages.encode.source_json,
                add_columns: stages.merge.schema_evolution == SchemaEvolution::AddColumns,
            },
            columns: match stages.encode.columns {
                FileColumns::Whole => Columns::Whole,
                FileColumns::Filled => Columns::Filled,
                FileColumns::All => Columns::All,
            },
            tables_at_once: stages.merge.tables_at_once,
            mode: stages.merge.mode,
            max_deleted: stages.merge.max_deleted.limit(),
            target_file_bytes: stages.merge.target_file.0,
            checkpoint: (stages.merge.checkpoint.0, stages.merge.checkpoint_size.0),
            deletion_vectors: stages.merge.deletion_vectors,
            upgrade_deletion_vectors: stages.merge.upgrade_deletion_vectors,
            optimize: file.optimize.clone(),
            vacuum: file.vacuum.clone(),
            memory: MemorySplit::of(file.memory.0, encode_workers, stages.encode.row_group.0),
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

/// What is asked beside types and time.
fn export_options(source: &SourceSection) -> ExportOptions {
    let parameters = source.parameters.iter();
    ExportOptions {
        until: source.until.clone(),
        elements: source.elements.clone(),
        type_filters: source.type_filters.clone(),
        patients: source.patients.clone(),
        include_associated_data: source.include_associated_data.clone(),
        organize_output_by: source.organize_output_by.clone(),
        allow_partial_manifests: source.allow_partial_manifests,
        output_format: source.output_format.clone(),
        parameters: parameters
            .flat_map(|(name, values)| values.values().iter().map(move |value| (name.clone(), value.clone())))
            .collect(),
        method: match source.method {
            MethodName::Auto => Method::Auto,
            MethodName::Get => Method::Get,
            MethodName::Post => Method::Post,
        },
        repeats: source.lists == ListStyle::Repeat,
        lenient: source.lenient,
        separate_export_status: source.separate_export_status,
    }
}

#[cfg(test)]
mod tests {
    use super::super::read_pipeline;
    use super::*;

    #[test]
    fn memory_bounds_a_line_that_nobody_asked_for() {
        let max_line = |rest: &str| {
            let yaml = format!("version: 1\nname: x\nsource: {{ url: \"http://127.0.0.1/fhir\" }}\ntables: t\n{rest}");
            Plan::resolve(&read_pipeline(&yaml, &[]).unwrap()).unwrap().max_line >> 20
        };
        assert_eq!(max_line("memory: 128MiB\n"), 16);
        assert_eq!(max_line("memory: 4GiB\n"), 64);
        assert_eq!(max_line("memory: 128MiB\nstages: { parse: { max_line: 64MiB } }\n"), 64);
    }
}
