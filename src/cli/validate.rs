//! `fhirlake validate PIPELINE.yaml`

use std::path::PathBuf;

use clap::Args;

use super::output::Output;
use crate::config::{Problem, pipeline_json_schema, read_pipeline};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::topology::RunPlan;
use crate::topology::check_dependencies;

#[derive(Debug, Args)]
pub(super) struct ValidateArgs {
    /// Pipeline file.
    #[arg(required_unless_present = "json_schema")]
    pipeline: Option<PathBuf>,
    /// Check the file only, without a request to the server or the tables.
    #[arg(long)]
    offline: bool,
    /// Set a key of the pipeline file, such as `memory=1GiB`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print the JSON Schema of pipeline files, for editors.
    #[arg(long)]
    json_schema: bool,
}

pub(super) async fn validate(args: ValidateArgs, output: &Output) -> Result<()> {
    let Some(path) = args.pipeline.filter(|_| !args.json_schema) else {
        return output.line(&format!("{:#}", pipeline_json_schema()));
    };
    let name = path.display().to_string();
    let text = super::read_file(&path)?;
    let read = read_pipeline(&text, &args.sets).map_err(|problems| Problem::error(&name, &problems))?;
    output.check(true, &format!("{name} is a pipeline file"))?;
    if args.offline {
        return Ok(());
    }
    let plan = RunPlan::resolve(&read).map_err(|problems| Problem::error(&name, &problems))?;
    let mut failed: Vec<(ErrorKind, &'static str)> = Vec::new();
    for dependency in check_dependencies(&plan).await {
        match dependency.outcome {
            Ok(found) => output.check(true, &format!("{}: {found}", dependency.name))?,
            Err(why) => {
                failed.push((why.kind(), why.advice()));
                output.check(false, &format!("{}: {why}", dependency.name))?;
            }
        }
    }
    // The exit code that a run would have.
    if let Some((kind, hint)) = failed.first() {
        let why = format!("{} checks failed: a run would fail", failed.len());
        return Err(Error::new(*kind, why).with_hint(hint));
    }
    Ok(())
}
