//! `fhirlake query SQL`: DataFusion over the tables, by their type's name.

use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::RecordBatch;
use clap::{Args, ValueEnum};
use deltalake::datafusion::prelude::{SQLOptions, SessionConfig, SessionContext};

use super::json::{write_row, write_value};
use super::output::Output;
use super::run::plan_of;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::messages::has_table;
use delta_upsert::Tables;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Aligned columns.
    Table,
    /// Comma-separated values with a header; nested values as JSON.
    Csv,
    /// One JSON object per row.
    Json,
}

#[derive(Debug, Args)]
pub(super) struct QueryArgs {
    /// SQL statement. Write a nested field as `name[1]['family']`, not `name[1].family`.
    sql: String,
    /// Pipeline file whose tables are queried.
    #[arg(value_name = "PIPELINE", required_unless_present = "tables", conflicts_with = "tables")]
    pipeline: Option<PathBuf>,
    /// Folder (or URL) of the tables, without a pipeline file.
    #[arg(long, value_name = "FOLDER-OR-URL")]
    tables: Option<String>,
    /// Format of the result.
    #[arg(long, value_enum, default_value = "table")]
    output: Format,
}

pub(super) async fn query(args: QueryArgs, output: &Output) -> Result<()> {
    let tables = match (&args.tables, &args.pipeline) {
        (Some(tables), _) => tables.clone(),
        (None, Some(path)) => plan_of(path, &[])?.tables,
        (None, None) => return Err(Error::new(ErrorKind::Config, "name a pipeline file or --tables")),
    };
    let batches = answer(&Tables::at(&tables)?, &args.sql).await?;
    match args.output {
        Format::Table => {
            let text = arrow::util::pretty::pretty_format_batches(&batches)
                .context(ErrorKind::Internal, "the result cannot be printed")?;
            output.line(&text.to_string())
        }
        Format::Csv => output.raw(&csv(&batches)?),
        Format::Json => {
            let mut lines = String::new();
            for batch in &batches {
                for row in 0..batch.num_rows() {
                    write_row(batch, row, &mut lines)
                        .context(ErrorKind::Internal, "the result cannot be written as JSON")?;
                    lines.push('\n');
                }
            }
            output.raw(lines.as_bytes())
        }
    }
}

/// Asks; the answer's batches, at least one, so that an empty answer still has its columns.
pub(super) async fn answer(tables: &Tables, sql: &str) -> Result<Vec<RecordBatch>> {
    // Table and column names are FHIR's, so `Patient` and `birthDate` need no quotes.
    let config = SessionConfig::new().set_bool("datafusion.sql_parser.enable_ident_normalization", false);
    // Spark's INT96 as nanoseconds would reach to 2262 only.
    let config = config.set_str("datafusion.execution.parquet.coerce_int96", "us");
    let session = SessionContext::new_with_config(config);
    let existing = tables.existing(has_table).await?;
    if existing.is_empty() {
        return Err(Error::new(ErrorKind::Config, format!("no tables in {}", tables.display()))
            .with_hint("name the folder that holds <Type>.parquet folders, or run the pipeline first"));
    }
    for name in &existing {
        // Only what the question names is opened: a folder may hold a hundred tables.
        if !sql.to_lowercase().contains(&name.to_lowercase()) {
            continue;
        }
        let table = tables.open(name).await?;
        let Some(delta) = table.delta() else { continue };
        let provider =
            delta.table_provider().await.context(ErrorKind::Storage, format!("table {name} cannot be read"))?;
        session
            .register_table(deltalake::datafusion::common::TableReference::bare(&**name), provider)
            .context(ErrorKind::Internal, format!("table {name}"))?;
    }
    let requested = async {
        // A question only: nothing that writes a table or a file, or opens another.
        let questions = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
        let frame = session.sql_with_options(sql, questions).await?;
        let schema = Arc::new(frame.schema().as_arrow().clone());
        let mut batches = frame.collect().await?;
        if batches.is_empty() {
            batches.push(RecordBatch::new_empty(schema));
        }
        Ok::<_, deltalake::datafusion::error::DataFusionError>(batches)
    };
    requested.await.map_err(|error| {
        let known: Vec<&str> = existing.iter().map(|name| &**name).collect();
        let error =
            Error::new(ErrorKind::Config, format!("{}\ntables here: {}", error.strip_backtrace(), known.join(", ")));
        match has_path(sql) {
            true => error.with_hint("write a nested field as name[1]['family'], not name[1].family"),
            false => error,
        }
    })
}

/// Returns true if a question has a path as FHIR writes it: `name[1].family`, `name.family`.
fn has_path(sql: &str) -> bool {
    let bytes = sql.as_bytes();
    let dots = bytes.windows(3).filter(|window| window[1] == b'.');
    dots.into_iter().any(|window| matches!(window[0], b']' | b'a'..=b'z') && window[2].is_ascii_lowercase())
}

/// Columns that CSV cannot hold become JSON texts.
fn csv(batches: &[RecordBatch]) -> Result<Vec<u8>> {
    use arrow::array::{Array, ArrayRef, StringArray};
    use arrow::datatypes::{DataType, Field, Schema};
    let failed = "the result cannot be written as CSV";
    let mut writer = arrow::csv::WriterBuilder::new().with_header(true).build(Vec::new());
    for batch in batches {
        let (mut fields, mut columns) = (Vec::new(), Vec::<ArrayRef>::new());
        for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
            if !field.data_type().is_nested() {
                fields.push(field.as_ref().clone());
                columns.push(column.clone());
                continue;
            }
            let values = (0..column.len()).map(|row| {
                let mut text = String::new();
                let written = column.is_valid(row).then(|| write_value(column, row, &mut text)).transpose();
                written.map(|written| written.map(|()| text))
            });
            let values: Vec<Option<String>> = values.collect::<Result<_, _>>().context(ErrorKind::Internal, failed)?;
            columns.push(Arc::new(StringArray::from(values)));
            fields.push(Field::new(field.name(), DataType::Utf8, true));
        }
        let flat = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).context(ErrorKind::Internal, failed)?;
        writer.write(&flat).context(ErrorKind::Internal, failed)?;
    }
    Ok(writer.into_inner())
}
