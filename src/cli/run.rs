//! `fhirlake run PIPELINE.yaml` and `fhirlake sync`.

use std::path::PathBuf;

use clap::Args;

use super::PipelineArgs;
use super::drive::drive;
use super::output::Output;
use crate::config::{AuthSection, Problem, Read, SecretPlace, Text, environment, read_pipeline};
use crate::error::{Error, ErrorKind, Result};
use crate::stages::encode::OPEN_BATCHES;
use crate::stages::{EdgeBytes, Memory, Stages};
use crate::topology::{self, Node, RunOptions, RunPlan, SourcePlan, Topology};
use bulk_data_client::{AuthSettings, Level, Proof};

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    pub file: PipelineArgs,
    /// Export everything, and rewrite rows whose content differs.
    #[arg(long)]
    full_refresh: bool,
    /// Start a new export instead of resuming the one in flight (see `fhirlake jobs`).
    #[arg(long)]
    new_export: bool,
    /// Print the plan only; send no request to the server and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print the report as one JSON document, without progress.
    #[arg(long, conflicts_with = "dry_run")]
    pub json: bool,
}

/// Arguments of the Python sync script, with its names and defaults.
#[derive(Debug, Args)]
pub(super) struct SyncArgs {
    /// FHIR base URL.
    #[arg(long, value_name = "URL")]
    fhir_endpoint: String,
    /// Folder (or URL) of the Delta tables.
    #[arg(long, value_name = "FOLDER")]
    delta_path: String,
    /// State file with the time of the last sync. Its folder holds the state.
    #[arg(long, value_name = "FILE", default_value = "/var/lib/fhir-sync/state.json")]
    state_file: PathBuf,
    /// Resource types to sync.
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "TYPE",
        default_values = ["Patient", "Condition", "Observation", "Encounter"])]
    resource_types: Vec<String>,
    /// Export this group of patients only.
    #[arg(long, value_name = "ID")]
    group_id: Option<String>,
    /// Export everything, and rewrite rows whose content differs.
    #[arg(long)]
    full_refresh: bool,
    /// Client id of the backend service [env: FHIR_CLIENT_ID].
    #[arg(long, value_name = "ID")]
    auth_client_id: Option<String>,
    /// Private key of the backend service: a JWK, JWKS or PEM file, or the JWK itself [env: FHIR_PRIVATE_KEY].
    #[arg(long, value_name = "FILE-OR-JWK")]
    auth_private_key: Option<String>,
    /// Azure Key Vault (name or host) with the secrets `fhir-client-id` and `fhir-private-key`, read where neither
    /// flags nor environment give them. Needs a build with `--features keyvault` [env: FHIR_KEY_VAULT].
    #[arg(long, value_name = "VAULT")]
    key_vault: Option<String>,
    /// Set a key of the pipeline, such as `memory=1GiB`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print the plan only; send no request to the server and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print the report as one JSON document, without progress.
    #[arg(long, conflicts_with = "dry_run")]
    pub json: bool,
}

/// Reads and resolves a pipeline file.
pub(super) fn plan_of(path: &PathBuf, sets: &[String]) -> Result<RunPlan> {
    let name = path.display().to_string();
    let text = super::read_file(path)?;
    let read = read_pipeline(&text, sets).map_err(|problems| Problem::error(&name, &problems))?;
    RunPlan::resolve(&read).map_err(|problems| Problem::error(&name, &problems))
}

pub(super) async fn run(args: RunArgs, output: &Output) -> Result<()> {
    let plan = args.file.plan()?;
    let options = RunOptions { full_refresh: args.full_refresh, new_export: args.new_export, ..RunOptions::default() };
    start(plan, options, args.dry_run, output).await
}

/// Prints what a run would do.
pub(super) async fn explain_run(args: RunArgs, output: &Output) -> Result<()> {
    run(RunArgs { dry_run: true, ..args }, output).await
}

pub(super) async fn sync(args: SyncArgs, output: &Output) -> Result<()> {
    let (full_refresh, dry_run) = (args.full_refresh, args.dry_run);
    let plan = sync_plan(args)?;
    start(plan, RunOptions { full_refresh, ..RunOptions::default() }, dry_run, output).await
}

async fn start(plan: RunPlan, options: RunOptions, dry_run: bool, output: &Output) -> Result<()> {
    if dry_run {
        return explain(plan, options, output).await;
    }
    drive(plan, options, output).await.map(|_| ())
}

/// The plan that the Python sync script's arguments stand for.
fn sync_plan(args: SyncArgs) -> Result<RunPlan> {
    let text = |value: &str| serde_json::Value::String(value.to_owned()).to_string();
    let mut yaml = format!(
        "version: 1\nname: sync\nsource:\n  url: {}\n  types: {}\n",
        text(&args.fhir_endpoint),
        serde_json::json!(args.resource_types)
    );
    if let Some(group) = &args.group_id {
        yaml.push_str(&format!("  level: group\n  group: {}\n", text(group)));
    }
    let state =
        args.state_file.parent().map(|folder| folder.to_path_buf()).filter(|folder| !folder.as_os_str().is_empty());
    let state = state.unwrap_or_else(|| PathBuf::from("."));
    yaml.push_str(&format!("tables: {}\nstate: {}\n", text(&args.delta_path), text(&state.display().to_string())));
    // Pathling's MERGE without extensions, as the Python sync script makes it, fails on a table that has `_fid` and
    // `_extension`.
    yaml.push_str("stages: { encode: { extensions: false } }\n");
    let read = read_pipeline(&yaml, &args.sets).map_err(|problems| sync_error(&problems))?;
    let read = with_auth(read, args.auth_client_id.map(Text), args.auth_private_key, args.key_vault)?;
    let mut plan = RunPlan::resolve(&read).map_err(|problems| sync_error(&problems))?;
    plan.state_file = Some(args.state_file);
    Ok(plan)
}

fn with_auth(
    mut read: Read,
    client_id: Option<Text>,
    private_key: Option<String>,
    vault: Option<String>,
) -> Result<Read> {
    let by_environment =
        |name: &str| environment(name).filter(|value| !value.is_empty()).map(|_| Text(format!("${{env:{name}}}")));
    let vault = vault.or_else(|| environment("FHIR_KEY_VAULT")).filter(|vault| !vault.is_empty());
    let by_vault = |secret: &str| vault.as_ref().map(|vault| Text(format!("${{azure-key-vault:{vault}/{secret}}}")));
    let client_id = client_id.or_else(|| by_environment("FHIR_CLIENT_ID")).or_else(|| by_vault("fhir-client-id"));
    let private_key = match private_key {
        Some(key) if key.trim_start().starts_with('{') => Some(Text(key)),
        Some(path) => Some(Text(format!("${{file:{path}}}"))),
        None => by_environment("FHIR_PRIVATE_KEY").or_else(|| by_vault("fhir-private-key")),
    };
    read.file.source.auth = match (client_id, private_key) {
        (None, None) => read.file.source.auth,
        (Some(client_id), Some(private_key)) => Some(AuthSection {
            client_id: Some(client_id),
            private_key: Some(private_key),
            key_id: None,
            client_secret: None,
            client_secret_in: SecretPlace::Basic,
            scope: None,
            token_url: None,
            audience: None,
            bearer_token: None,
            // The recipe, whose flags these are, takes any URL.
            plain_http: true,
        }),
        (Some(_), None) => {
            return Err(Error::new(
                ErrorKind::Config,
                "client id without a key: set --auth-private-key or FHIR_PRIVATE_KEY",
            ));
        }
        (None, Some(_)) => {
            return Err(Error::new(
                ErrorKind::Config,
                "a private key without a client id: set --auth-client-id or FHIR_CLIENT_ID",
            ));
        }
    };
    Ok(read)
}

fn sync_error(problems: &[Problem]) -> Error {
    let name = |path: &str| match path.split('.').take(2).collect::<Vec<_>>().join(".").as_str() {
        "source.url" => "--fhir-endpoint".to_owned(),
        "source.types" => "--resource-types".to_owned(),
        "source.group" => "--group-id".to_owned(),
        "tables" => "--delta-path".to_owned(),
        "state" => "--state-file".to_owned(),
        other => other.to_owned(),
    };
    let lines: Vec<String> = problems
        .iter()
        .map(|problem| {
            let hint = problem.hint.as_ref().map_or_else(String::new, |hint| format!(" ({hint})"));
            format!("{}: {}{hint}", name(&problem.path), problem.what)
        })
        .collect();
    Error::new(ErrorKind::Config, lines.join("\n"))
}

/// `--dry-run`: the plan, in words.
async fn explain(plan: RunPlan, options: RunOptions, output: &Output) -> Result<()> {
    let (topology_of_run, memory, stages) = (plan.topology(), plan.memory.clone(), plan.stages.clone());
    output.line(&format!("pipeline  {}", plan.name))?;
    match &plan.source {
        SourcePlan::Folder(url) => output.line(&format!("source    {}", url.path()))?,
        SourcePlan::Server { base, level, .. } => {
            output.line(&format!("source    {} ({})", base.as_str(), level_words(level)))?
        }
    }
    if let SourcePlan::Server { auth, .. } = &plan.source {
        output.line(&format!("auth      {}", auth_words(auth)))?;
    }
    output.line(&format!("tables    {}", topology::location(&plan.tables)))?;
    output.line(&format!("state     {}", plan.state))?;
    let base = match &plan.source {
        SourcePlan::Server { base, .. } => Some(base.clone()),
        SourcePlan::Folder(_) => None,
    };
    for schedule in &plan.schedules {
        let next = schedule
            .after(chrono::Utc::now())
            .map_or_else(String::new, |next| format!(" (next {})", next.format("%Y-%m-%d %H:%M:%S UTC")));
        output.line(&format!("schedule  {}{next}", schedule.name))?;
    }
    let prepared = topology::prepare(plan, options).await?;
    let existing: Vec<String> = prepared.existing().iter().map(|name| name.to_string()).collect();
    output
        .line(&format!("existing  {}", if existing.is_empty() { "no tables".into() } else { existing.join(", ") }))?;
    for (name, why) in prepared.unwritable() {
        output.line(&format!("fails     {name}: {why}"))?;
    }
    for kickoff in prepared.kickoffs() {
        if let Some(accepted) = &kickoff.in_flight {
            let types =
                if kickoff.requested.is_empty() { "all types".to_owned() } else { kickoff.requested.join(", ") };
            output.line(&format!("export    resumes {} ({types})", bulk_data_client::shown(&accepted.status)))?;
        } else if let Some(base) = &base {
            let mut base = base.clone();
            if !base.path().ends_with('/') {
                base.set_path(&format!("{}/", base.path()));
            }
            if kickoff.request.is_post() {
                let (url, body) = kickoff.request.post(&base)?;
                output.line(&format!("export    POST {url}"))?;
                output.line(&format!("          {body}"))?;
            } else {
                output.line(&format!("export    GET {}", kickoff.request.url(&base)?))?;
            }
        }
    }
    let between = topology_of_run.nodes.iter().filter(|node| node.input.is_some());
    let workers: Vec<String> = between.map(|node| format!("{} {}", node.workers, node.spec.name)).collect();
    output.line(&format!("workers   {}", workers.join(", ")))?;
    output.line(&explain_memory(&topology_of_run, &memory, &stages))
}

/// Returns the method of authentication; of secrets only that they are there.
fn auth_words(auth: &AuthSettings) -> String {
    match auth {
        AuthSettings::None => "none".into(),
        AuthSettings::Bearer(_) => "bearer token ***".into(),
        AuthSettings::Client(client) => {
            let proof = match client.proof {
                Proof::Key(..) => "private key ***",
                Proof::SecretInHeader(_) | Proof::SecretInForm(_) => "client secret ***",
            };
            format!("client id ***, {proof}, scope {}", client.scope.as_deref().unwrap_or("as the server supports"))
        }
    }
}

fn level_words(level: &Level) -> String {
    match level {
        Level::System => "system level".into(),
        Level::Patient => "all patients".into(),
        Level::Group(id) => format!("group {id}"),
    }
}

/// The split of `memory`: edges that have a share of it, and what stages hold themselves.
fn explain_memory(topology: &Topology, memory: &Memory, stages: &Stages) -> String {
    let mib = |bytes: usize| format!("{} MiB", bytes >> 20);
    let is_share =
        |node: &&Node| node.spec.input.as_ref().is_some_and(|input| !matches!(input.bytes, EdgeBytes::Fixed(_)));
    let edges = topology.nodes.iter().filter(is_share).filter_map(|node| node.input.as_ref());
    let mut parts: Vec<String> = edges.map(|edge| format!("{} {}", edge.name, mib(edge.bytes))).collect();
    parts.extend(topology.nodes.iter().flat_map(|node| node.spec.shares).map(|share| {
        let row_group = format!(" (a row group at {} of NDJSON)", mib(stages.encode.row_group(memory)));
        let note = if *share == OPEN_BATCHES { row_group } else { String::new() };
        format!("{} {}{note}", share.name, mib(memory.share(share)))
    }));
    format!("memory    {}", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Breaks if the secrets that the Python sync script keeps in a vault need a name, or if they win over what is said
    // outright.
    #[test]
    fn the_recipes_vault_is_asked_for_its_names() {
        let read = || {
            read_pipeline("version: 1\nname: sync\nsource: { url: http://localhost/fhir }\ntables: /lake\n", &[])
                .unwrap()
        };
        let auth = |id: Option<&str>, vault: Option<&str>| {
            let read = with_auth(read(), id.map(|id| Text(id.into())), None, vault.map(Into::into));
            read.map(|read| read.file.source.auth.map(|auth| [auth.client_id.unwrap().0, auth.private_key.unwrap().0]))
        };
        let key = "${azure-key-vault:hospital/fhir-private-key}";
        assert_eq!(auth(None, Some("hospital")).unwrap().unwrap(), ["${azure-key-vault:hospital/fhir-client-id}", key]);
        assert_eq!(auth(Some("me"), Some("hospital")).unwrap().unwrap(), ["me", key]);
        assert!(auth(None, None).unwrap().is_none() && auth(Some("me"), None).is_err());
    }
}
