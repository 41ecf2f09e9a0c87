//! Upserts two batches of rows with a string column `id` into a table in a temporary folder: the second replaces a row
//! and adds one, and nothing is rewritten.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use delta_upsert::{
    Commit, Deletions, EncodedBatch, FileRows, Incoming, NotMatchedBySource, OrderRules, PageEncoder, RowKey,
    RowPosition, Scratch, StagingFile, TableSettings, Tables, Upsert, key_of,
};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// Stages rows of `(id, name)` and merges them; what happened.
async fn upsert(tables: &Tables, scratch: &Path, version: i64, rows: &[(&str, &str)]) -> Fallible<Commit> {
    let fields = ["id", "name"].map(|name| Field::new(name, DataType::Utf8, true));
    let schema: SchemaRef = Arc::new(Schema::new(fields.to_vec()));
    let ids: ArrayRef = Arc::new(StringArray::from_iter_values(rows.iter().map(|row| row.0)));
    let names: ArrayRef = Arc::new(StringArray::from_iter_values(rows.iter().map(|row| row.1)));
    let batch = RecordBatch::try_new(schema.clone(), vec![ids, names])?;
    let (parquet, metadata) = PageEncoder.encode(&batch, &schema, &[true, false])?;
    let key = |(at, row): (usize, &(&str, &str))| RowKey {
        key: key_of(row.0.as_bytes()),
        last_updated: RowKey::ABSENT,
        version,
        arrival: RowPosition::new(0, at as u64),
        subsetted: false,
        replayed: false,
    };
    let keys = rows.iter().enumerate().map(key).collect();
    let by_file = BTreeMap::from([(0, FileRows { rows: rows.len() as u64, ..FileRows::default() })]);

    let mut table = tables.open(&"People".into()).await?;
    let path = format!("part-{version}.parquet").as_str().into();
    let mut file = StagingFile::create(&table, path, schema.clone(), scratch).await?;
    file.append(EncodedBatch {
        resource_type: "People".into(),
        columns: schema.clone(),
        parquet,
        metadata,
        keys,
        by_file,
    })
    .await?;
    let mut upsert = Upsert {
        incoming: Incoming { files: vec![file.close(&table).await?], ..Incoming::default() },
        deletions: Deletions::new(scratch),
        schema,
        add_columns: false,
        watermark: None,
        // The table has no column that says which copy is newer, so the later one is.
        order: OrderRules { full_refresh: true, undated_is_older: false },
        absent: NotMatchedBySource::Keep,
        scratch: Scratch { folder: scratch.to_path_buf(), memory: 64 << 20 },
        settings: TableSettings { deletion_vectors: true, upgrade: false },
        info: BTreeMap::new(),
        run: format!("example-{version}"),
        earlier_commits: 0,
    };
    Ok(upsert.commit(&mut table).await?)
}

#[tokio::main]
async fn main() -> Fallible<()> {
    let folder = tempfile::tempdir()?;
    let tables = Tables::at(&folder.path().join("lake").display().to_string())?;
    let mut out = std::io::stdout();
    for (version, rows) in [(1, [("1", "Ada"), ("2", "Grace")]), (2, [("2", "Grace Hopper"), ("3", "Edsger")])] {
        match upsert(&tables, folder.path(), version, &rows).await? {
            Commit::Done(merged, _) => writeln!(out, "{} inserted, {} updated", merged.inserted, merged.updated)?,
            other => return Err(format!("{other:?}").into()),
        }
    }
    let table = tables.open(&"People".into()).await?;
    writeln!(out, "version {:?}, {:?} rows", table.version(), table.row_count())?;
    Ok(())
}
