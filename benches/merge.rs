//! What a merge costs, beside delta-rs's own on the same rows in the same run.
//!
//! ```text
//! cargo bench --bench merge                          # 200 k and 1 M rows beside delta-rs, 10 M ours alone, growth, clustered
//! cargo bench --bench merge -- --rows 200000         # one size
//! cargo bench --bench merge -- --bounded 30000000    # that many rows into a table of as many, memory: 256MiB
//! ```
//!
//! The rows are Observations of the Synthea sample of the tests where it lies beside the project, else of the demo's
//! population, in the full schema; each copy has ids of its own (random UUIDs). Of every hundred rows of the table one
//! comes again in a newer version, from all over the table; one in ten of those that come is new.
//!
//! Ours: pages of the rows that come, staging, match, commit. Theirs: `MergeBuilder` with the same rows as record
//! batches, update and insert of every column. The table is the same but for deletion vectors, which theirs does not
//! write. Each is a process of its own, so that its peak memory is its own. `grown by` is what it needs beyond the rows
//! that come, which both hold before the clock starts. Every figure is the median of three processes, each on a fresh
//! copy of the table.

#![allow(clippy::disallowed_macros, clippy::unwrap_used, missing_docs)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray, StructArray};
use arrow::datatypes::SchemaRef;
use bytes::Bytes;
use common::{MAX_LINE, NoBadLines, export_file, folder, peak_memory, population, synthea};
use delta_upsert::{
    Commit, Deletions, Incoming, NotMatchedBySource, OrderRules, PageEncoder, Scratch, StagingFile, TableSettings,
    Tables, Upsert, adapt,
};
use deltalake::datafusion::prelude::{SessionContext, col};
use fhir_arrow::{ColumnPruning, Encoder, Layout, LayoutOptions, PresentColumns, arrow_schema};
use fhirlake::config::{Problem, read_pipeline};
use fhirlake::messages::{Chunk, EncodedBatch, RowKey, RowPosition, key_of};
use fhirlake::stages::parse::ChunkParser;
use fhirlake::topology::RunPlan;
use fhirlake::topology::{OptimizeOptions, optimize};
use flow::Cancellation;

const TYPE: &str = "Observation";
/// Bytes at which a staged file is closed, as in a pipeline.
const TARGET: u64 = 128 << 20;

/// Real rows, again and again with ids of their own.
struct Rows {
    base: RecordBatch,
    schema: SchemaRef,
    filtered: Vec<bool>,
}

impl Rows {
    /// So many bytes of real rows; with every column of the type, or those that they fill.
    fn new(every_column: bool, bytes: usize) -> Self {
        let sample = synthea();
        let files = match &sample {
            Some(sample) => folder(sample.path(), Some(TYPE), bytes),
            None => population(&[TYPE], bytes),
        };
        let file = export_file(0, TYPE);
        let bytes = Bytes::from(files.into_iter().next().unwrap().1);
        let chunk = Chunk { file, first_line: 1, offset: 0, bytes, oversized: None };
        let parsed = ChunkParser::new(MAX_LINE, Arc::new(NoBadLines)).parse(&chunk).unwrap();
        let layout = Arc::new(Layout::pathling(TYPE, &LayoutOptions::default()).unwrap());
        let mut encoder = Encoder::new(layout);
        let document = parsed.rows.tape.over(&parsed.rows.bytes);
        for row in &parsed.rows.by_type[0].1 {
            encoder.push(document.value(row.root), &parsed.rows.bytes[row.line.clone()]);
        }
        let columns = if every_column { ColumnPruning::None } else { ColumnPruning::default() };
        let encoded = encoder.finish(&mut PresentColumns::default(), columns).unwrap();
        Self { base: encoded.batch, schema: encoded.schema, filtered: encoded.filtered }
    }

    fn len(&self) -> usize {
        self.base.num_rows()
    }

    /// The rows `numbers` of the population at a version, as many as there are real rows at most.
    fn batch(&self, numbers: &[u64], version: i64) -> (RecordBatch, Vec<RowKey>) {
        let base = self.base.slice(0, numbers.len());
        let ids: Vec<String> = numbers.iter().map(|number| id(*number)).collect();
        let updated = 1_700_000_000_000_000 + version * 1_000_000;
        let schema = base.schema();
        let columns = schema.fields().iter().zip(base.columns()).map(|(field, column)| -> ArrayRef {
            match field.name().as_str() {
                "id" => Arc::new(StringArray::from_iter_values(&ids)),
                "id_versioned" => Arc::new(StringArray::from_iter_values(
                    ids.iter().map(|id| format!("{TYPE}/{id}/_history/{version}")),
                )),
                "meta" => meta(column, version, updated),
                _ => column.clone(),
            }
        });
        let columns = columns.collect();
        let keys = ids.iter().zip(numbers).map(|(id, number)| RowKey {
            key: key_of(id.as_bytes()),
            last_updated: updated,
            version,
            arrival: RowPosition::new(0, *number),
            subsetted: false,
            replayed: false,
        });
        (RecordBatch::try_new(schema.clone(), columns).unwrap(), keys.collect())
    }
}

/// A random UUID, the same for the same number.
fn id(number: u64) -> String {
    let bits = key_of(&number.to_le_bytes());
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// `meta` with another version and time.
fn meta(column: &ArrayRef, version: i64, updated: i64) -> ArrayRef {
    let meta = column.as_struct();
    let rows = meta.len();
    let children = meta.fields().iter().zip(meta.columns()).map(|(field, child)| -> ArrayRef {
        match field.name().as_str() {
            "versionId" | "versionId_versioned" => Arc::new(StringArray::from(vec![version.to_string(); rows])),
            "lastUpdated" => Arc::new(
                arrow::array::TimestampMicrosecondArray::from(vec![updated; rows])
                    .with_data_type(field.data_type().clone()),
            ),
            _ => child.clone(),
        }
    });
    let children = children.collect();
    Arc::new(StructArray::new(meta.fields().clone(), children, meta.nulls().cloned()))
}

/// What comes: every hundredth row of `rows` in a newer version, and a tenth as many new ones.
fn changes(rows: u64, changed: u64) -> Vec<u64> {
    let old = changed * 9 / 10;
    let step = rows / old;
    (0..old).map(|at| at * step).chain(rows..rows + changed - old).collect()
}

fn upsert(files: Vec<delta_upsert::StagedFile>, scratch: &Path, vectors: bool) -> Upsert {
    let layout = Layout::pathling(TYPE, &LayoutOptions::default()).unwrap();
    Upsert {
        incoming: Incoming { files, ..Incoming::default() },
        deletions: Deletions::new(scratch),
        schema: Arc::new(arrow_schema(&layout)),
        add_columns: false,
        watermark: None,
        order: OrderRules::default(),
        absent: NotMatchedBySource::Keep,
        scratch: Scratch { folder: scratch.to_path_buf(), memory: 30 << 20 },
        settings: TableSettings { deletion_vectors: vectors, upgrade: false },
        info: Default::default(),
        run: "bench".into(),
        earlier_commits: 0,
    }
}

/// Stages rows and commits them; bytes that the commit added.
async fn commit(
    tables: &Path,
    batches: impl Iterator<Item = (RecordBatch, Vec<RowKey>)>,
    rows: &Rows,
    vectors: bool,
) -> u64 {
    let scratch = tables.join("scratch");
    let mut table = Tables::at(&tables.display().to_string()).unwrap().open(&TYPE.into()).await.unwrap();
    let (mut files, mut open) = (Vec::new(), None);
    for (batch, keys) in batches {
        let (parquet, metadata) = PageEncoder.encode(&batch, &rows.schema, &rows.filtered).unwrap();
        let mut file = match open.take() {
            Some(file) => file,
            None => {
                let path = format!("part-{}.zstd.parquet", uuid::Uuid::new_v4());
                StagingFile::create(&table, path.into(), rows.schema.clone(), &scratch).await.unwrap()
            }
        };
        let (columns, by_file) = (rows.schema.clone(), Default::default());
        file.append(EncodedBatch { resource_type: TYPE.into(), columns, parquet, metadata, keys, by_file })
            .await
            .unwrap();
        if file.size() >= TARGET {
            files.push(file.close(&table).await.unwrap());
        } else {
            open = Some(file);
        }
    }
    if let Some(file) = open {
        files.push(file.close(&table).await.unwrap());
    }
    match upsert(files, &scratch, vectors).commit(&mut table).await.unwrap() {
        Commit::Done(merged, _) => merged.bytes_written,
        other => panic!("{other:?}"),
    }
}

/// A table of `rows` rows.
async fn build(tables: &Path, rows: u64, vectors: bool) {
    // As many as a row group of the pipeline's has.
    let real = Rows::new(false, 16 << 20);
    let numbers: Vec<u64> = (0..rows).collect();
    commit(tables, numbers.chunks(real.len()).map(|numbers| real.batch(numbers, 1)), &real, vectors).await;
}

/// A copy whose data files are the same on disk.
fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-al").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// One measured merge, in a process of its own: seconds, peak and growth in kB, bytes written.
async fn child(who: &str, tables: &Path, rows: u64, changed: u64) {
    let real = Rows::new(who == "theirs", 2 << 20);
    let numbers = changes(rows, changed);
    let batches: Vec<_> = numbers.chunks(real.len()).map(|numbers| real.batch(numbers, 2)).collect();
    // Theirs takes rows with every column of the table.
    let full =
        (who == "theirs").then(|| batches.iter().map(|(batch, _)| adapt(batch, &real.schema).unwrap()).collect());
    let before = resident();
    let started = Instant::now();
    let written = match who {
        "ours" => commit(tables, batches.into_iter(), &real, true).await,
        "theirs" => theirs(tables, full.unwrap_or_default()).await,
        other => panic!("{other}"),
    };
    let seconds = started.elapsed().as_secs_f64();
    let peak = peak_memory().unwrap();
    println!("{seconds} {peak} {} {written}", peak.saturating_sub(before));
}

async fn theirs(tables: &Path, batches: Vec<RecordBatch>) -> u64 {
    let url = url::Url::from_directory_path(tables.join(format!("{TYPE}.parquet"))).unwrap();
    let table = deltalake::open_table(url).await.unwrap();
    let names: Vec<String> = batches[0].schema().fields().iter().map(|field| field.name().clone()).collect();
    let source = SessionContext::new().read_batches(batches).unwrap();
    let quoted = |name: &str| format!("source.\"{name}\"");
    let (table, metrics) = table
        .merge(source, col("target.id").eq(col("source.id")))
        .with_source_alias("source")
        .with_target_alias("target")
        .when_matched_update(|update| {
            names.iter().fold(update, |update, name| update.update(name.as_str(), quoted(name)))
        })
        .unwrap()
        .when_not_matched_insert(|insert| {
            names.iter().fold(insert, |insert, name| insert.set(name.as_str(), quoted(name)))
        })
        .unwrap()
        .await
        .unwrap();
    assert!(metrics.num_target_rows_updated > 0 && metrics.num_target_rows_inserted > 0, "{metrics:?}");
    let names = table
        .snapshot()
        .unwrap()
        .log_data()
        .iter()
        .map(|file| (file.path().into_owned(), file.size() as u64))
        .collect::<Vec<_>>();
    let new = names.into_iter().filter(|(path, _)| path.starts_with("part-0"));
    new.map(|(_, size)| size).sum()
}

struct Measured {
    seconds: f64,
    peak: f64,
    grown: f64,
    written: f64,
}

/// Medians of three processes, or what the first that failed said.
fn measure(who: &str, table: &Path, rows: u64, changed: u64, rounds: usize) -> Result<Measured, String> {
    let mut found: Vec<Vec<f64>> = vec![Vec::new(); 4];
    for _ in 0..rounds {
        let fresh = tempfile::tempdir_in(table.parent().unwrap()).unwrap();
        let tables = fresh.path().join("tables");
        copy(table, &tables);
        let mut command = Command::new(std::env::current_exe().unwrap());
        let numbers = [rows.to_string(), changed.to_string()];
        let output = command.arg("--child").arg(who).arg(&tables).args(&numbers).output().unwrap();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("killed").to_owned());
        }
        let text = String::from_utf8(output.stdout).unwrap();
        for (list, number) in found.iter_mut().zip(text.split_whitespace()) {
            list.push(number.parse().unwrap());
        }
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let [seconds, peak, grown, written] = &mut found[..] else { unreachable!() };
    Ok(Measured {
        seconds: median(seconds),
        peak: median(peak) / 1000.0,
        grown: median(grown) / 1000.0,
        written: median(written) / 1e6,
    })
}

fn line(name: &str, found: &Measured) -> String {
    format!(
        "{name} {:.2} s, peak {:.0} MB (grown by {:.0}), {:.1} MB written",
        found.seconds, found.peak, found.grown, found.written
    )
}

fn compare(runtime: &tokio::runtime::Runtime, folder: &Path, rows: u64) {
    let (with, without) = (folder.join(format!("with-{rows}")), folder.join(format!("without-{rows}")));
    runtime.block_on(build(&with, rows, true));
    runtime.block_on(build(&without, rows, false));
    let changed = rows / 100;
    let ours = measure("ours", &with, rows, changed, 3).unwrap();
    println!("{rows} rows, {changed} come:");
    println!("  {}", line("ours", &ours));
    match measure("theirs", &without, rows, changed, 1) {
        Ok(theirs) => {
            println!("  {}", line("delta-rs MergeBuilder", &theirs));
            println!(
                "  {rows} rows: memory ratio {:.1} (of growth {:.1}); time ratio {:.1}",
                theirs.peak / ours.peak,
                theirs.grown / ours.grown.max(1.0),
                theirs.seconds / ours.seconds
            );
        }
        Err(why) => println!("  delta-rs MergeBuilder failed: {why}"),
    }
    std::fs::remove_dir_all(with).unwrap();
    std::fs::remove_dir_all(without).unwrap();
}

fn plan(source: &Path, tables: &Path, rest: &str) -> RunPlan {
    let yaml = format!(
        "version: 1\nname: bench\nsource: {{ url: \"file://{}\" }}\ntables: {}\nstate: {}\n{rest}",
        source.display(),
        tables.display(),
        tables.join("state").display()
    );
    let error = |problems: Vec<Problem>| Problem::error("bench", &problems).to_string();
    RunPlan::resolve(&read_pipeline(&yaml, &[]).map_err(error).unwrap()).map_err(error).unwrap()
}

/// The same ten thousand rows into a table of `rows` and of ten times as many; then the larger one clustered.
fn growth(runtime: &tokio::runtime::Runtime, folder: &Path, rows: u64) {
    let mut seconds = Vec::new();
    for rows in [rows, rows * 10] {
        let table = folder.join(format!("growth-{rows}"));
        runtime.block_on(build(&table, rows, true));
        let found = measure("ours", &table, rows, 10_000, 3).unwrap();
        println!("10000 come into {rows} rows: {}", line("ours", &found));
        if rows >= 10_000_000 {
            let found = measure("ours", &table, rows, rows / 100, 3).unwrap();
            println!("{rows} rows, {} come: {}", rows / 100, line("ours", &found));
        }
        seconds.push(found.seconds);
    }
    println!("tenfold growth of the table: time ratio {:.2}", seconds[1] / seconds[0]);
    let table = folder.join(format!("growth-{}", rows * 10));
    let options =
        OptimizeOptions { types: Default::default(), cluster: true, min_deleted: foundation::Limit::Count(1) };
    let started = Instant::now();
    let done = runtime.block_on(optimize(&plan(folder, &table, ""), &options, &Cancellation::default())).unwrap();
    let done = done.into_values().next().unwrap().unwrap();
    println!(
        "optimize with clustering of {} rows: {:.0} s, {} -> {} files, {:.0} -> {:.0} MB",
        rows * 10,
        started.elapsed().as_secs_f64(),
        done.files_removed,
        done.files_added,
        done.bytes_removed as f64 / 1e6,
        done.bytes_added as f64 / 1e6
    );
    let found = measure("ours", &table, rows * 10, 10_000, 3).unwrap();
    println!("10000 come into {} rows, clustered: {}", rows * 10, line("ours", &found));
    println!("tenfold growth of the table, clustered: time ratio {:.2}", found.seconds / seconds[0]);
    let few = measure("ours", &table, rows * 10, 100, 3).unwrap();
    println!("100 come into {} rows, clustered: {}", rows * 10, line("ours", &few));
}

/// As many narrow rows as the table has, through the whole pipeline with little memory.
fn bounded(folder: &Path, rows: u64) {
    use std::io::Write;
    let source = folder.join("ndjson");
    let tables = folder.join("tables");
    std::fs::create_dir_all(&source).unwrap();
    for version in [1, 2] {
        let files = 30;
        for file in 0..files {
            let path = source.join(format!("Patient.{file:02}.ndjson"));
            let mut out = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
            for number in (file * rows / files)..((file + 1) * rows / files) {
                writeln!(
                    out,
                    "{{\"resourceType\":\"Patient\",\"id\":\"{}\",\"meta\":{{\"versionId\":\"{version}\",\"lastUpdated\":\"2026-01-0{version}T00:00:00Z\"}}}}",
                    id(number)
                )
                .unwrap();
            }
        }
        let yaml = folder.join("bounded.yaml");
        std::fs::write(
            &yaml,
            format!(
                "version: 1\nname: bench\nsource: {{ url: \"file://{}\" }}\ntables: {}\nmemory: 256MiB\n",
                source.display(),
                tables.display()
            ),
        )
        .unwrap();
        let started = Instant::now();
        let output = Command::new(env!("CARGO_BIN_EXE_fhirlake")).arg("run").arg(&yaml).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        let wanted = |line: &&str| line.starts_with("type") || line.starts_with("total") || line.starts_with("peak");
        println!("{rows} rows, version {version}, memory: 256MiB: {:.0} s", started.elapsed().as_secs_f64());
        said.lines().filter(wanted).for_each(|line| println!("  {line}"));
    }
}

fn main() {
    let given: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let number = |at: usize| given.get(at).and_then(|text| text.parse::<u64>().ok()).expect("a number");
    if given.first().is_some_and(|argument| argument == "--child") {
        runtime.block_on(child(&given[1], &PathBuf::from(&given[2]), number(3), number(4)));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    match given.first().map(String::as_str) {
        Some("--bounded") => bounded(folder.path(), number(1)),
        Some("--rows") => compare(&runtime, folder.path(), number(1)),
        Some("--growth") => growth(&runtime, folder.path(), number(1)),
        Some(other) => panic!("unknown argument {other}"),
        None => {
            compare(&runtime, folder.path(), 200_000);
            compare(&runtime, folder.path(), 1_000_000);
            growth(&runtime, folder.path(), 1_000_000);
        }
    }
}
