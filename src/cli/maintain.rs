//! `fhirlake optimize PIPELINE.yaml` and `fhirlake vacuum PIPELINE.yaml`.

use clap::Args;

use super::PipelineArgs;
use super::output::{Output, bytes, table};
use crate::config::{Span, Types};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::topology::{self, ByTable, OptimizeOptions, VacuumOptions};
use flow::Cancellation;
use foundation::Limit;

#[derive(Debug, Args)]
pub(super) struct OptimizeArgs {
    #[command(flatten)]
    file: PipelineArgs,
    /// Resource types [default: all of the pipeline].
    #[arg(long, value_delimiter = ',', value_name = "TYPE")]
    types: Vec<String>,
    /// Sort rows by id, so that later runs read less. Rewrites the whole table.
    #[arg(long)]
    cluster: bool,
    /// Rewrite each file that has a deletion vector, however few rows it deletes.
    #[arg(long)]
    purge: bool,
}

#[derive(Debug, Args)]
pub(super) struct VacuumArgs {
    #[command(flatten)]
    file: PipelineArgs,
    /// Resource types [default: all of the pipeline].
    #[arg(long, value_delimiter = ',', value_name = "TYPE")]
    types: Vec<String>,
    /// Age of files of older versions to keep, such as `7d` [default: each table's setting, else a week].
    #[arg(long, value_name = "SPAN")]
    retention: Option<String>,
    /// Allow a retention below the table's own. Readers of older versions lose their files.
    #[arg(long, requires = "retention")]
    force: bool,
    /// Delete the files. Without this flag they are only listed.
    #[arg(long)]
    delete: bool,
}

pub(super) async fn optimize(args: OptimizeArgs, output: &Output) -> Result<()> {
    let plan = args.file.plan()?;
    let options = OptimizeOptions {
        types: if args.types.is_empty() { plan.optimize.types.clone() } else { args.types.into() },
        cluster: args.cluster || plan.optimize.cluster,
        min_deleted: if args.purge { Limit::Count(1) } else { plan.optimize.min_deleted },
    };
    let done = topology::optimize(&plan, &options, &Cancellation::default()).await?;
    let rows = done.iter().filter_map(|(name, done)| {
        let done = done.as_ref().ok()?;
        let version = done.version.map_or_else(|| "unchanged".into(), |version| version.to_string());
        if done.version.is_none() {
            return Some(vec![name.clone(), version, String::new(), String::new(), String::new()]);
        }
        Some(vec![
            name.clone(),
            version,
            format!("{} -> {}", done.files_removed, done.files_added),
            format!("{} -> {}", bytes(done.bytes_removed), bytes(done.bytes_added)),
            done.rows_purged.to_string(),
        ])
    });
    let rows: Vec<_> = rows.collect();
    output.line(&table(&["table", "version", "files", "bytes", "rows purged"], &rows))?;
    failures(&done)
}

pub(super) async fn vacuum(args: VacuumArgs, output: &Output) -> Result<()> {
    let plan = args.file.plan()?;
    let retention = match &args.retention {
        Some(text) => {
            let span: Result<Span, _> = text.clone().try_into();
            Some(span.map(|span| span.0).context(ErrorKind::Config, "--retention")?)
        }
        None => plan.vacuum.retention.map(|span| span.0),
    };
    let options =
        VacuumOptions { types: Types::from(args.types), retention, below_the_tables: args.force, delete: args.delete };
    let done = topology::vacuum(&plan, &options, &Cancellation::default()).await?;
    for (name, done) in &done {
        for file in done.iter().flat_map(|done| &done.files) {
            output.line(&format!("{name}.parquet/{file}"))?;
        }
    }
    let found = || done.values().flatten();
    let files: usize = found().map(|done| done.files.len()).sum();
    let size = bytes(found().map(|done| done.bytes).sum());
    // Of tables that were not looked through nothing is known.
    if done.values().any(Result::is_ok) {
        output.remark(&match (args.delete, files) {
            (true, _) => format!("{files} files of {size} deleted"),
            (false, 0) => "no unreferenced files".to_owned(),
            (false, _) => format!("{files} files of {size} are unreferenced; --delete deletes them"),
        });
    }
    let is_refused = done.values().any(|done| done.as_ref().is_err_and(|error| error.kind() == ErrorKind::Config));
    let hint = "--force allows a retention below a table's own; readers of older versions lose their files";
    failures(&done).map_err(|error| if is_refused { error.with_hint(hint) } else { error })
}

/// An error that names every table that failed, and why.
fn failures<T>(done: &ByTable<T>) -> Result<()> {
    let failed: Vec<(&String, &Error)> =
        done.iter().filter_map(|(name, done)| Some((name, done.as_ref().err()?))).collect();
    match failed.as_slice() {
        [] => Ok(()),
        [(_, error)] => Err(Error::new(error.kind(), format!("{error}"))),
        several => {
            let each: Vec<String> = several.iter().map(|(_, error)| format!("{error}")).collect();
            // What none of them can do for one reason is no partial success.
            let alike =
                several.len() == done.len() && several.iter().all(|(_, error)| error.kind() == several[0].1.kind());
            let kind = if alike { several[0].1.kind() } else { ErrorKind::Partial };
            Err(Error::new(kind, each.join("\n")))
        }
    }
}
