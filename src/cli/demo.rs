//! `fhirlake demo`: the whole job on an embedded server.

use std::path::PathBuf;

use clap::Args;

use super::drive::drive;
use super::output::Output;
use super::query::answer;
use crate::config::{ByteSize, Problem, Span, read_pipeline};
use crate::error::{Context, ErrorKind, Result};
use crate::topology::{RunOptions, RunPlan};
use bulk_data_server::{DEMO_TYPES, DemoServer, Faults, Population, Registration};
use delta_upsert::Tables;

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Number of patients; each has about 74 kB of NDJSON.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    patients: u32,
    /// Size of the NDJSON, such as 50MB or 2GB, instead of a number of patients.
    #[arg(long, value_parser = size, conflicts_with = "patients")]
    size: Option<ByteSize>,
    /// Seed of the population. The same seed gives the same patients.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Folder for the tables and the pipeline file [default: a new temporary folder].
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Port of the server; 0 for a free one.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Memory budget of the pipeline.
    #[arg(long, value_parser = size, default_value = "512MiB")]
    memory: ByteSize,
    /// Write the population as NDJSON files into this folder, and stop.
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["folder", "port", "serve"])]
    write_ndjson: Option<PathBuf>,
    /// Serve only, for any Bulk Data client, until Ctrl-C.
    #[arg(long)]
    serve: bool,
    /// Interval at which the served population changes, such as 30s.
    #[arg(long, value_name = "SPAN", value_parser = span, requires = "serve")]
    changes_every: Option<Span>,
    /// Patients per NDJSON file; 1 makes many small files.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    patients_per_file: Option<u32>,
    /// YAML file with faults of the server, such as `kickoffs_throttled: 2` (docs/faults.yaml lists all).
    #[arg(long, value_name = "FILE")]
    faults: Option<PathBuf>,
    /// Register a client by its JWKS file (see `fhirlake keygen`). Requests then need its token.
    #[arg(long, value_name = "FILE")]
    register_jwks: Option<PathBuf>,
    /// Register a client by a secret instead.
    #[arg(long, value_name = "SECRET", conflicts_with = "register_jwks")]
    register_secret: Option<String>,
    /// Id of the registered client.
    #[arg(long, value_name = "ID", default_value = "demo-client")]
    client_id: String,
}

fn span(text: &str) -> std::result::Result<Span, String> {
    Span::try_from(text.to_owned())
}

fn size(text: &str) -> std::result::Result<ByteSize, String> {
    ByteSize::try_from(text.to_owned())
}

/// Measured: 300 patients of seed 42 make 22.2 MB (`--write-ndjson`).
const BYTES_PER_PATIENT: u64 = 74_000;
/// Patients whose resources of one type share a file.
const PATIENTS_PER_FILE: u32 = 2_000;

/// Per mille of the population that changes and is deleted, between the two runs.
const CHANGED: u64 = 30;
const DELETED: u64 = 10;

pub(super) async fn demo(args: DemoArgs, output: &Output) -> Result<()> {
    let patients =
        args.size.map_or(args.patients, |size| u32::try_from(size.0 / BYTES_PER_PATIENT).unwrap_or(u32::MAX)).max(1);
    let population = Population::new(args.seed, patients);
    if let Some(folder) = &args.write_ndjson {
        return write_ndjson(&population, folder, output);
    }
    let per_file = args.patients_per_file.unwrap_or(PATIENTS_PER_FILE.min(patients.div_ceil(2)).max(1));
    let server = DemoServer::start(population, args.port, per_file).await?;
    set_up(&server, &args)?;
    if args.serve {
        output.line(&format!("a Bulk Data server with {patients} synthetic patients: {}", server.base()))?;
        output.remark("Ctrl-C to stop");
        let ended = tokio::signal::ctrl_c();
        tokio::pin!(ended);
        let Some(every) = args.changes_every else {
            return ended.await.context(ErrorKind::Internal, "signal handlers cannot be installed");
        };
        let mut tick = tokio::time::interval(every.0.max(std::time::Duration::from_millis(100)));
        tick.tick().await;
        loop {
            tokio::select! {
                ended = &mut ended => return ended.context(ErrorKind::Internal, "signal handlers cannot be installed"),
                _ = tick.tick() => server.step(CHANGED, DELETED, 1),
            }
        }
    }
    let folder = match &args.folder {
        Some(folder) => folder.clone(),
        None => std::env::temp_dir().join(format!("fhirlake-demo-{}", uuid::Uuid::new_v4().simple())),
    };
    // The pipeline file must work from wherever it is read.
    let folder = std::path::absolute(&folder).context(ErrorKind::Config, "the demo's folder")?;
    std::fs::create_dir_all(&folder).context(ErrorKind::Storage, format!("{} cannot be made", folder.display()))?;
    let tables = folder.join("tables");
    let yaml = pipeline_yaml(server.base(), &tables, args.memory);
    let file = folder.join("pipeline.yaml");
    std::fs::write(&file, &yaml).context(ErrorKind::Storage, format!("{} cannot be written", file.display()))?;
    let plan = plan(&yaml)?;

    output.remark(&format!("\nA FHIR server with {patients} synthetic patients runs at {}", server.base()));
    output.remark("\n1. Initial sync: full export\n");
    drive(plan.clone(), RunOptions::default(), output).await?;

    server.step(CHANGED, DELETED, (patients / 50).max(1));
    output.remark("\n2. Incremental sync: new patients, changed and deleted resources\n");
    drive(plan, RunOptions::default(), output).await?;

    let sql =
        "SELECT gender, count(*) AS patients, min(birthDate) AS oldest FROM Patient GROUP BY gender ORDER BY gender";
    output.remark(&format!("\n3. A SQL query over the tables\n\n{sql}\n"));
    let batches = answer(&Tables::at(&tables.display().to_string())?, sql).await?;
    let text = arrow::util::pretty::pretty_format_batches(&batches)
        .context(ErrorKind::Internal, "the result cannot be printed")?;
    output.line(&text.to_string())?;
    let shown = tables.display();
    // As it can be typed: a demo by `cargo run` has no `fhirlake` on the PATH.
    let program = std::env::current_exe().map_or_else(|_| "fhirlake".into(), |path| path.display().to_string());
    output.remark(&format!(
        "\nThe tables are in {shown}, one Delta table a resource type.\nTry next:\n  {program} query \"SELECT status, \
            count(*) FROM Encounter GROUP BY status\" --tables {shown}\n  {program} status {}\n  {program} schema \
            Observation\n  {program} demo --size 1GB",
        file.display()
    ));
    Ok(())
}

/// Faults and registered clients.
fn set_up(server: &DemoServer, args: &DemoArgs) -> Result<()> {
    let read = |path: &PathBuf| std::fs::read_to_string(path).context(ErrorKind::Config, format!("{}", path.display()));
    if let Some(path) = &args.faults {
        let faults: Result<Faults, _> = serde_saphyr::from_str(&read(path)?);
        server.set_faults(faults.context(ErrorKind::Config, format!("{}", path.display()))?);
    }
    let client_id = args.client_id.clone();
    if let Some(path) = &args.register_jwks {
        let jwks =
            serde_json::from_str(&read(path)?).context(ErrorKind::Config, format!("{} is no JWKS", path.display()))?;
        server.register(Registration { client_id, jwks: Some(jwks), secret: None });
    } else if let Some(secret) = &args.register_secret {
        server.register(Registration { client_id, jwks: None, secret: Some(secret.clone()) });
    }
    Ok(())
}

fn pipeline_yaml(base: &str, tables: &std::path::Path, memory: ByteSize) -> String {
    let text = |text: &str| serde_json::Value::from(text).to_string();
    format!(
        "# The demo's pipeline. Its server ran only as long as the demo.\nversion: 1\nname: demo\nsource:\n  url: \
            {}\n  types: [{}]\nmemory: {}\ntables: {}\n",
        text(base),
        DEMO_TYPES.join(", "),
        String::from(memory),
        text(&tables.display().to_string()),
    )
}

fn plan(yaml: &str) -> Result<RunPlan> {
    let problem = |problems: Vec<Problem>| Problem::error("the demo's pipeline", &problems);
    RunPlan::resolve(&read_pipeline(yaml, &[]).map_err(problem)?).map_err(problem)
}

fn write_ndjson(population: &Population, folder: &std::path::Path, output: &Output) -> Result<()> {
    use std::io::Write;
    std::fs::create_dir_all(folder).context(ErrorKind::Storage, format!("{} cannot be made", folder.display()))?;
    let mut total = 0;
    for (kind, name) in DEMO_TYPES.iter().enumerate() {
        let path = folder.join(format!("{name}.ndjson"));
        let failed = || format!("{} cannot be written", path.display());
        let file = std::fs::File::create(&path).context(ErrorKind::Storage, failed())?;
        let mut file = std::io::BufWriter::with_capacity(1 << 20, file);
        let mut line = String::new();
        for patient in 0..population.patients() {
            line.clear();
            population.for_each(kind, patient, |number, fate| population.write(kind, patient, number, fate, &mut line));
            total += line.len();
            file.write_all(line.as_bytes()).context(ErrorKind::Storage, failed())?;
        }
        file.flush().context(ErrorKind::Storage, failed())?;
    }
    output.line(&format!(
        "{} patients, {:.1} MB of NDJSON in {}",
        population.patients(),
        total as f64 / 1e6,
        folder.display()
    ))
}
