//! The command line. One file a command; `output` is the only place that prints.

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

use clap::{Args, Parser, Subcommand};

use crate::config::environment;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::telemetry::{self, LogFormat};
use output::Output;

/// Keeps a folder of Delta Lake tables in step with a FHIR server.
#[derive(Debug, Parser)]
#[command(name = "fhirlake", version, about, after_help = exit_codes())]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// How logs look.
    #[arg(long, global = true, value_enum, default_value_t)]
    log_format: LogFormat,
    /// What is logged, such as `info` or `warn,fhirlake=debug`. Also by FHIRLAKE_LOG.
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    /// No progress, no report: errors only.
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs a pipeline once.
    Run(run::RunArgs),
    /// Runs once by flags alone, as the recipe's script does.
    Sync(Box<run::SyncArgs>),
    /// Shows the whole job on an embedded server: initial sync, changes, incremental sync, a query.
    Demo(demo::DemoArgs),
    /// Runs pipelines by their schedules, and shows how they stand: status page, health, metrics.
    Serve(serve::ServeArgs),
    /// Shows what a run would do: what is asked of the server, how memory is split. As `run --dry-run`.
    Explain(run::RunArgs),
    /// Checks a pipeline file, and what it depends on.
    Validate(validate::ValidateArgs),
    /// Shows a pipeline's tables, watermarks and last run.
    Status(status::StatusArgs),
    /// Tidies a pipeline's tables: small files together, marked rows away. Changes no answer.
    Optimize(maintain::OptimizeArgs),
    /// Names, or removes, files that no version of a table needs any more.
    Vacuum(maintain::VacuumArgs),
    /// Lines that could not be read: names them, tries them again, or gives them up.
    Quarantine(quarantine::QuarantineArgs),
    /// Exports that the server works on or holds for a pipeline: names them, or cancels them.
    Jobs(jobs::JobsArgs),
    /// Who we are to the server: checks it without a run.
    Auth(auth::AuthArgs),
    /// Makes a key pair for a backend service, and the JWKS to register.
    Keygen(auth::KeygenArgs),
    /// Shows what each `source.profile` sets, and why.
    Profiles,
    /// Asks the tables a question in SQL; each is named by its resource type.
    Query(query::QueryArgs),
    /// Shows the table schema of a resource type.
    Schema(schema::SchemaArgs),
    /// Writes shell completions to stdout.
    Completions(completions::CompletionsArgs),
}

fn exit_codes() -> String {
    let mut text = "Exit codes: 0 success".to_owned();
    for kind in ErrorKind::ALL {
        text.push_str(&format!(", {} {}", kind.exit_code(), format!("{kind:?}").to_lowercase()));
    }
    text
}

/// The whole process.
pub fn main() -> ExitCode {
    // Before anything else is in memory.
    if let Err(error) = crate::private::no_core_dumps() {
        output::warn(&format!("core dumps could not be turned off ({error}): one would hold patient data"));
    }
    let cli = Cli::parse();
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
    let twice = if output.shows_bars() && !matches!(cli.command, Command::Serve(_)) { ",fhirlake::run_failed=off" } else { "" };
    // The libraries' own warnings speak of things that we handle ourselves and report in our words.
    let filter = match filter {
        None => format!("error,buoyant_kernel=off,delta_kernel=off,fhirlake={usual}{twice}"),
        // Whoever asks for information does not mean the table format's own, kilobytes a line.
        Some(filter) if filter.contains("kernel") => filter,
        Some(filter) => format!("{filter},buoyant_kernel=off,delta_kernel=off"),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let outcome = match runtime.context(ErrorKind::Internal, "the runtime cannot be started") {
        Ok(runtime) => {
            // What sends by gRPC wants the runtime.
            let entered = runtime.enter();
            let settings = otlp::settings(&cli.command);
            let (telemetry, problems) =
                telemetry::init(cli.global.log_format, output::colours(), &filter, output.log_writer(), settings.as_ref());
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
    }
}

/// Reads a pipeline file's text.
fn read_file(path: &PathBuf) -> Result<String> {
    std::fs::read_to_string(path)
        .map_err(|error| Error::new(ErrorKind::Config, format!("the pipeline file {} cannot be read: {error}", path.display())))
}
