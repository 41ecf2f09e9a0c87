//! The command line. One file a command; `output` is the only place that prints.

/// Builds the `Examples:` block of a command's help.
macro_rules! examples {
    ($($line:literal),+ $(,)?) => {
        concat!("Examples:", $("\n  ", $line),+)
    };
}

mod auth;
mod completions;
mod demo;
mod drive;
mod jobs;
mod json;
mod maintain;
mod otlp;
mod output;
mod quarantine;
mod query;
mod run;
mod schema;
mod serve;
mod status;
mod validate;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::environment;
use crate::error::{Advice, Context, Error, ErrorKind, Result};
use crate::telemetry::{self, LogFormat};
use crate::topology::RunPlan;
use output::Output;

/// Keep a folder of Delta Lake tables in step with a FHIR server.
#[derive(Debug, Parser)]
#[command(name = "fhirlake", version, about, disable_help_subcommand = true, after_help = exit_codes())]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// Log format.
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        hide_possible_values = true,
        value_name = "auto|text|json"
    )]
    log_format: LogFormat,
    /// Log filter, such as `info` or `warn,fhirlake=debug` [env: FHIRLAKE_LOG].
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    /// Print errors only.
    #[arg(long, short, global = true)]
    quiet: bool,
}

/// A pipeline file, and keys of it that the command line sets.
#[derive(Debug, Args)]
struct PipelineArgs {
    /// Pipeline file.
    #[arg(value_name = "PIPELINE")]
    pipeline: PathBuf,
    /// Set a key of the pipeline file, such as `memory=1GiB`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

impl PipelineArgs {
    /// Reads and resolves the file.
    fn plan(&self) -> Result<RunPlan> {
        run::plan_of(&self.pipeline, &self.sets)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a pipeline once.
    #[command(after_help = examples!(
        "fhirlake run hospital.yaml",
        "fhirlake run hospital.yaml --full-refresh",
        "fhirlake run hospital.yaml --set source.types=[Patient] --json"
    ))]
    Run(run::RunArgs),
    /// Run once from command-line flags, without a pipeline file.
    #[command(after_help = examples!(
        "fhirlake sync --fhir-endpoint https://fhir.example.org/fhir --delta-path /srv/lake/fhir",
        "fhirlake sync --fhir-endpoint https://fhir.example.org/fhir --delta-path /srv/lake/fhir --full-refresh"
    ))]
    Sync(Box<run::SyncArgs>),
    /// Run pipelines on their schedules, with a status page, health checks and metrics.
    #[command(after_help = examples!(
        "fhirlake serve hospital.yaml",
        "fhirlake serve hospital.yaml clinic.yaml --listen 0.0.0.0:8080 --token-file /run/secrets/token"
    ))]
    Serve(serve::ServeArgs),
    /// Print what a run would do: requests, workers, memory split. Same as `run --dry-run`.
    #[command(after_help = examples!("fhirlake explain hospital.yaml"))]
    Explain(run::RunArgs),
    /// Check a pipeline file, then its server, token, tables and state.
    #[command(after_help = examples!("fhirlake validate hospital.yaml", "fhirlake validate hospital.yaml --offline"))]
    Validate(validate::ValidateArgs),
    /// Show tables, watermarks, the last run and quarantine.
    #[command(after_help = examples!("fhirlake status hospital.yaml"))]
    Status(status::StatusArgs),
    /// List or cancel a pipeline's export jobs on the server.
    #[command(after_help = examples!("fhirlake jobs list hospital.yaml"), disable_help_subcommand = true)]
    Jobs(jobs::JobsArgs),
    /// Inspect, retry or discard unreadable lines.
    #[command(after_help = examples!("fhirlake quarantine list hospital.yaml"), disable_help_subcommand = true)]
    Quarantine(quarantine::QuarantineArgs),
    /// Run a SQL query over the tables, each named by its resource type.
    #[command(after_help = examples!(
        "fhirlake query 'SELECT gender, count(*) FROM Patient GROUP BY gender' hospital.yaml",
        "fhirlake query 'SELECT count(*) FROM Patient' --tables /srv/lake/fhir --output json"
    ))]
    Query(query::QueryArgs),
    /// Compact small files and purge deleted rows.
    #[command(after_help = examples!(
        "fhirlake optimize hospital.yaml",
        "fhirlake optimize hospital.yaml --types Observation --cluster"
    ))]
    Optimize(maintain::OptimizeArgs),
    /// List or delete unreferenced files (dry run unless --delete).
    #[command(after_help = examples!("fhirlake vacuum hospital.yaml", "fhirlake vacuum hospital.yaml --delete \
        --retention 7d"))]
    Vacuum(maintain::VacuumArgs),
    /// Run the whole job on an embedded FHIR server.
    #[command(after_help = examples!("fhirlake demo", "fhirlake demo --size 1GB", "fhirlake demo --serve --port 8000"))]
    Demo(demo::DemoArgs),
    /// Print the table schema of a resource type.
    #[command(after_help = examples!("fhirlake schema Patient", "fhirlake schema Observation --format delta"))]
    Schema(schema::SchemaArgs),
    /// List server profiles, and what each sets.
    #[command(after_help = examples!("fhirlake profiles"))]
    Profiles,
    /// Test authentication against the server.
    #[command(after_help = examples!("fhirlake auth check hospital.yaml"), disable_help_subcommand = true)]
    Auth(auth::AuthArgs),
    /// Generate a key pair for a backend service, and the JWKS to register.
    #[command(after_help = examples!("fhirlake keygen /etc/fhirlake/key.jwk", "fhirlake keygen key.jwk --algorithm \
        rs384"))]
    Keygen(auth::KeygenArgs),
    /// Print a shell completion script.
    #[command(after_help = examples!("fhirlake completions bash > /etc/bash_completion.d/fhirlake"))]
    Completions(completions::CompletionsArgs),
    /// Write the manual pages into a folder.
    #[command(after_help = examples!("fhirlake man --folder /usr/local/share/man/man1"))]
    Man(completions::ManArgs),
}

/// The groups in which `fhirlake --help` lists the commands.
const GROUPS: [(&str, &[&str]); 4] = [
    ("Run", &["run", "sync", "serve"]),
    ("Inspect", &["explain", "validate", "status", "jobs", "quarantine", "query"]),
    ("Maintain", &["optimize", "vacuum"]),
    ("Tools", &["demo", "schema", "profiles", "auth", "keygen", "completions", "man"]),
];

/// The command line, with commands in groups, which clap has for arguments only.
fn command() -> clap::Command {
    use std::fmt::Write;
    let command = Cli::command();
    let header = command.get_styles().get_header();
    let literal = command.get_styles().get_literal();
    let mut template = "{about-with-newline}\n{usage-heading} {usage}\n".to_owned();
    for (group, names) in GROUPS {
        let _ = write!(template, "\n{header}{group}:{header:#}\n");
        for name in names {
            let about = command.find_subcommand(name).and_then(clap::Command::get_about).map(ToString::to_string);
            let _ = writeln!(template, "  {literal}{name:<11}{literal:#}  {}", about.unwrap_or_default());
        }
    }
    let _ = write!(template, "\n{header}Global options:{header:#}\n{{options}}{{after-help}}");
    command.help_template(template)
}

fn exit_codes() -> String {
    let mut text = "Exit codes:\n  0 success".to_owned();
    for kind in ErrorKind::ALL {
        text.push_str(&format!(", {} {}", kind.exit_code(), format!("{kind:?}").to_lowercase()));
    }
    text
}

/// The whole process.
pub fn main() -> ExitCode {
    // Before anything else is in memory.
    if let Err(error) = foundation::secure_fs::no_core_dumps() {
        output::warn(&format!("core dumps could not be turned off ({error}): one would hold patient data"));
    }
    let cli = Cli::from_arg_matches(&command().get_matches()).unwrap_or_else(|error| error.exit());
    let json = match &cli.command {
        Command::Run(args) => args.json,
        Command::Sync(args) => args.json,
        _ => false,
    };
    let output = Output::new(cli.global.quiet, json);
    let filter = cli.global.log.clone().or_else(|| environment("FHIRLAKE_LOG"));
    // Where bars show the progress, lines of information would only tear them.
    let usual = match &cli.command {
        _ if cli.global.quiet => "error",
        // The demo tells its own story.
        Command::Demo(_) => "warn",
        // It has no bars.
        Command::Serve(_) => "info",
        _ if output.shows_bars() => "warn",
        _ => "info",
    };
    // The command's last words are the same.
    let twice =
        if output.shows_bars() && !matches!(cli.command, Command::Serve(_)) { ",fhirlake::run_failed=off" } else { "" };
    // The libraries' own warnings speak of things that we handle ourselves and report in our words.
    let filter = match filter {
        None => format!("error,buoyant_kernel=off,delta_kernel=off,fhirlake={usual}{twice}"),
        // Whoever asks for information does not mean the table format's own, kilobytes a line.
        Some(filter) if filter.contains("kernel") => filter,
        Some(filter) => format!("{filter},buoyant_kernel=off,delta_kernel=off"),
    };
    let filter = telemetry::filter_of_crates(&filter);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let outcome = match runtime.context(ErrorKind::Internal, "the runtime cannot be started") {
        Ok(runtime) => {
            // What sends by gRPC wants the runtime.
            let entered = runtime.enter();
            let settings = otlp::settings(&cli.command);
            let (telemetry, problems) = telemetry::init(
                cli.global.log_format,
                output::colours(),
                &filter,
                output.log_writer(),
                settings.as_ref(),
            );
            problems.iter().for_each(|problem| tracing::warn!(problem, "telemetry"));
            drop(entered);
            let output = output.clone().with_telemetry(telemetry);
            let outcome = runtime.block_on(dispatch(cli.command, &output));
            for problem in output.telemetry().shut_down() {
                output.remark(&problem);
            }
            // Threads that still compute after a second Ctrl-C are not waited for.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(error),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

async fn dispatch(command: Command, output: &Output) -> Result<()> {
    match command {
        Command::Run(args) => run::run(args, output).await,
        Command::Sync(args) => run::sync(*args, output).await,
        Command::Explain(args) => run::explain_run(args, output).await,
        Command::Demo(args) => demo::demo(args, output).await,
        Command::Serve(args) => serve::serve(args, output).await,
        Command::Validate(args) => validate::validate(args, output).await,
        Command::Status(args) => status::status(args, output).await,
        Command::Optimize(args) => maintain::optimize(args, output).await,
        Command::Vacuum(args) => maintain::vacuum(args, output).await,
        Command::Quarantine(args) => quarantine::quarantine(args, output).await,
        Command::Jobs(args) => jobs::jobs(args, output).await,
        Command::Auth(args) => auth::auth(args, output).await,
        Command::Keygen(args) => auth::keygen(&args, output),
        Command::Profiles => output.raw(crate::config::PROFILES.as_bytes()),
        Command::Query(args) => query::query(args, output).await,
        Command::Schema(args) => schema::schema(&args, output),
        Command::Completions(args) => completions::completions(&args, output),
        Command::Man(args) => completions::man(&args, output),
    }
}

/// Reads a pipeline file's text.
fn read_file(path: &PathBuf) -> Result<String> {
    std::fs::read_to_string(path).map_err(|error| {
        Error::new(ErrorKind::Config, format!("the pipeline file {} cannot be read: {error}", path.display()))
    })
}
