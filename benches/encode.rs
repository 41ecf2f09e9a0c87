//! How fast NDJSON becomes Parquet, on one core, beside two yardsticks on the same bytes in the same run.
//!
//! ```text
//! cargo bench --bench encode                        # 200 MB a corpus
//! cargo bench --bench encode -- --data FOLDER       # <Type>.ndjson files of your own
//! cargo bench --bench encode -- --demo              # the demo's population
//! cargo bench --bench encode -- --megabytes 50 --rounds 3 --only Observation
//! cargo bench --bench encode -- --only mix --ours   # ours alone, for a profiler
//! ```
//!
//! The data are the Synthea sample of the tests where it lies beside the project, else the demo's population, which has
//! its shape. A folder's files are repeated to the size with other UUIDs, dates, times and decimals in every copy.
//!
//! Ours: `parse` (bytes → tape, keys), `encode` (tape → columns), `pages` (columns → Parquet, zstd), and the three
//! one after the other, a chunk at a time, as the pipeline's workers do it. The yardsticks:
//!
//! * **(b) off the shelf**: arrow-json's decoder with the full schema of the type, plus `ArrowWriter` with zstd.
//! * **(a) the limit**: simd-json building its tape, plus Parquet pages from batches that are built already and hold
//!   only their filled columns.
//!
//! Every figure is the median of the rounds; a ratio is the median of the rounds' own ratios, since all of a round is
//! measured within seconds. Megabytes are 10⁶ bytes of NDJSON. What is measured holds no more than one core.

#![allow(clippy::disallowed_macros, clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::datatypes::{DataType, Field, Schema};
use bulk_data_server::DEMO_TYPES;
use bytes::Bytes;
use common::{MAX_LINE, NoBadLines, export_file, folder, peak_memory, population, synthea};
use delta_upsert::PageEncoder;
use fhir_arrow::{ColumnPruning, EncodedRows, Encoder, Layout, LayoutOptions, PresentColumns, arrow_schema};
use fhirlake::messages::Chunk;
use fhirlake::stages::parse::{ChunkParser, Parsed};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

/// The pipeline's own sizes.
const CHUNK: usize = 1 << 20;
const ROW_GROUP: usize = 16 << 20;

struct Arguments {
    data: Option<PathBuf>,
    demo: bool,
    megabytes: usize,
    rounds: usize,
    only: Option<String>,
    ours: bool,
}

fn arguments() -> Arguments {
    let mut found = Arguments { data: None, demo: false, megabytes: 200, rounds: 5, only: None, ours: false };
    let mut given = std::env::args().skip(1);
    while let Some(argument) = given.next() {
        let mut value = || given.next().unwrap_or_else(|| panic!("{argument} needs a value"));
        match argument.as_str() {
            "--data" => found.data = Some(value().into()),
            "--megabytes" => found.megabytes = value().parse().expect("a number of megabytes"),
            "--rounds" => found.rounds = value().parse().expect("a number of rounds"),
            "--only" => found.only = Some(value()),
            "--demo" => found.demo = true,
            "--ours" => found.ours = true,
            // What cargo itself passes.
            "--bench" => {}
            other => panic!("unknown argument {other}"),
        }
    }
    found
}

/// NDJSON of one or more types, in chunks of one type each.
struct Corpus {
    name: String,
    chunks: Vec<(Arc<str>, Chunk)>,
    bytes: usize,
}

impl Corpus {
    fn new(name: &str, files: Vec<(Arc<str>, Vec<u8>)>) -> Self {
        let mut chunks = Vec::new();
        for (index, (resource_type, bytes)) in files.into_iter().enumerate() {
            let file = export_file(index as u32, &resource_type);
            let bytes = Bytes::from(bytes);
            let (mut at, mut first_line) = (0, 1);
            while at < bytes.len() {
                let end = (at + CHUNK).min(bytes.len());
                let end = memchr::memchr(b'\n', &bytes[end..]).map_or(bytes.len(), |more| end + more + 1);
                let piece = bytes.slice(at..end);
                let lines = memchr::memchr_iter(b'\n', &piece).count() as u64;
                let chunk = Chunk { file: file.clone(), first_line, offset: at as u64, bytes: piece, oversized: None };
                chunks.push((resource_type.clone(), chunk));
                (at, first_line) = (end, first_line + lines);
            }
        }
        let bytes = chunks.iter().map(|(_, chunk)| chunk.bytes.len()).sum();
        Self { name: name.into(), chunks, bytes }
    }

    fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.chunks.iter().map(|(_, chunk)| chunk)
    }

    fn types(&self) -> Vec<Arc<str>> {
        let mut types: Vec<Arc<str>> = self.chunks.iter().map(|(name, _)| name.clone()).collect();
        types.sort();
        types.dedup();
        types
    }
}

/// Ours, over a corpus.
struct Ours {
    parser: ChunkParser,
    layouts: HashMap<Arc<str>, Arc<Layout>>,
    filled: HashMap<Arc<str>, PresentColumns>,
    pages: PageEncoder,
}

impl Ours {
    fn new(types: &[Arc<str>]) -> Self {
        let layout =
            |name: &Arc<str>| Arc::new(Layout::pathling(name, &LayoutOptions::default()).expect("a type of R4"));
        Self {
            parser: ChunkParser::new(MAX_LINE, Arc::new(NoBadLines)),
            layouts: types.iter().map(|name| (name.clone(), layout(name))).collect(),
            filled: HashMap::new(),
            pages: PageEncoder,
        }
    }

    fn parse(&self, chunk: &Chunk) -> Parsed {
        self.parser.parse(chunk).expect("a chunk that is read")
    }

    /// The batches that the parsed chunks make, handed over as they are closed.
    fn encode(&mut self, parsed: impl Iterator<Item = Parsed>, mut out: impl FnMut(&PageEncoder, EncodedRows)) {
        let mut open: HashMap<Arc<str>, Encoder> = HashMap::new();
        let mut close = |name: &Arc<str>, encoder: &mut Encoder, filled: &mut HashMap<Arc<str>, PresentColumns>| {
            let encoded =
                encoder.finish(filled.entry(name.clone()).or_default(), ColumnPruning::default()).expect("columns");
            std::hint::black_box(encoder.take_unmapped());
            out(&self.pages, encoded);
        };
        for parsed in parsed {
            let rows = &parsed.rows;
            let document = rows.tape.over(&rows.bytes);
            for (name, resources) in &rows.by_type {
                let mut encoder = open.remove(name).unwrap_or_else(|| Encoder::new(self.layouts[name].clone()));
                for row in resources {
                    encoder.push(document.value(row.root), &rows.bytes[row.line.clone()]);
                }
                if encoder.json_bytes() >= ROW_GROUP {
                    close(name, &mut encoder, &mut self.filled);
                }
                open.insert(name.clone(), encoder);
            }
        }
        for (name, encoder) in &mut open {
            if encoder.rows() > 0 {
                close(name, encoder, &mut self.filled);
            }
        }
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = std::hint::black_box(work());
    (start.elapsed(), result)
}

/// The three stages, a chunk at a time.
fn together<'a>(ours: &mut Ours, chunks: impl Iterator<Item = &'a Chunk>) -> usize {
    let parser = ChunkParser::new(MAX_LINE, Arc::new(NoBadLines));
    let parsed = chunks.map(|chunk| parser.parse(chunk).expect("a chunk that is read"));
    let mut size = 0;
    ours.encode(parsed, |pages, rows| {
        size += pages.encode(&rows.batch, &rows.schema, &rows.filtered).expect("pages").0.len()
    });
    size
}

/// simd-json's tape of every line.
fn simd_json_tapes(chunks: &mut [Vec<u8>]) -> usize {
    let mut buffers = simd_json::Buffers::new(CHUNK);
    let mut nodes = 0;
    let mut tape = simd_json::Tape::null();
    for chunk in chunks {
        for line in chunk.split_mut(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            simd_json::fill_tape(line, &mut buffers, &mut tape).expect("JSON");
            nodes += std::hint::black_box(&tape).0.len();
        }
    }
    nodes
}

/// arrow-json with the type's full schema, and `ArrowWriter` with zstd.
fn off_the_shelf(corpus: &Corpus, schemas: &HashMap<Arc<str>, Arc<Schema>>) -> usize {
    let mut size = 0;
    for name in corpus.types() {
        let schema = schemas[&name].clone();
        let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
        let mut writer = ArrowWriter::try_new(Vec::new(), schema.clone(), Some(properties)).expect("a writer");
        let mut decoder =
            arrow::json::ReaderBuilder::new(schema).with_batch_size(8192).build_decoder().expect("a decoder");
        let chunks = corpus.chunks.iter().filter(|(known, _)| *known == name);
        for (_, chunk) in chunks {
            let mut rest = &chunk.bytes[..];
            while !rest.is_empty() {
                let read = decoder.decode(rest).expect("JSON of the schema");
                rest = &rest[read..];
                if !rest.is_empty()
                    && let Some(batch) = decoder.flush().expect("a batch")
                {
                    writer.write(&batch).expect("pages");
                }
            }
        }
        if let Some(batch) = decoder.flush().expect("a batch") {
            writer.write(&batch).expect("pages");
        }
        size += writer.into_inner().expect("a footer").len();
    }
    size
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// arrow-json wants bytes in hexadecimal and fails on base64: it gets them as strings.
fn without_binary(schema: &Schema) -> Schema {
    fn as_text(field: &Field) -> Field {
        let inner = |inner: &Arc<Field>| Arc::new(as_text(inner));
        let data_type = match field.data_type() {
            DataType::Binary => DataType::Utf8,
            DataType::Struct(fields) => DataType::Struct(fields.iter().map(inner).collect()),
            DataType::List(item) => DataType::List(inner(item)),
            DataType::Map(entries, sorted) => DataType::Map(inner(entries), *sorted),
            other => other.clone(),
        };
        field.clone().with_data_type(data_type)
    }
    Schema::new(schema.fields().iter().map(|inner| as_text(inner)).collect::<Vec<_>>())
}

fn leaf_columns(schema: &Schema) -> usize {
    let schema = parquet::arrow::ArrowSchemaConverter::new().convert(schema).expect("a Parquet schema");
    schema.num_columns()
}

#[derive(Default)]
struct Rounds {
    parse: Vec<f64>,
    encode: Vec<f64>,
    pages: Vec<f64>,
    together: Vec<f64>,
    two: Vec<f64>,
    tape: Vec<f64>,
    shelf: Vec<f64>,
    to_limit: Vec<f64>,
    to_shelf: Vec<f64>,
    scaling: Vec<f64>,
}

fn measure(corpus: &Corpus, rounds: usize) -> Rounds {
    let types = corpus.types();
    let layout = |name: &Arc<str>, options: &LayoutOptions| Layout::pathling(name, options).expect("a type of R4");
    let full: HashMap<_, _> = types
        .iter()
        .map(|name| (name.clone(), Arc::new(without_binary(&arrow_schema(&layout(name, &LayoutOptions::default()))))))
        .collect();
    let rate = |time: Duration| corpus.bytes as f64 / 1e6 / time.as_secs_f64();
    let mut found = Rounds::default();
    let (mut our_size, mut shelf_size) = (0, 0);
    for _ in 0..rounds {
        let mut ours = Ours::new(&types);
        let (parse, parsed) = timed(|| corpus.chunks.iter().map(|(_, chunk)| ours.parse(chunk)).collect::<Vec<_>>());
        // Each batch's pages right after its columns, as the pipeline has it, and the two timed apart.
        let mut pages = Duration::ZERO;
        let (both, ()) = timed(|| {
            ours.encode(parsed.into_iter(), |encoder, rows| {
                pages += timed(|| encoder.encode(&rows.batch, &rows.schema, &rows.filtered).expect("pages")).0;
            });
        });
        let encode = both - pages;
        let mut ours = Ours::new(&types);
        let (all, size) = timed(|| together(&mut ours, corpus.chunks()));
        our_size = size;
        // Every other chunk for each core, so that both have the same types.
        let (two, ()) = timed(|| {
            std::thread::scope(|scope| {
                for half in [0, 1] {
                    let (types, chunks) = (&types, corpus.chunks());
                    scope.spawn(move || together(&mut Ours::new(types), chunks.skip(half).step_by(2)));
                }
            });
        });
        let mut copies: Vec<Vec<u8>> = corpus.chunks.iter().map(|(_, chunk)| chunk.bytes.to_vec()).collect();
        let (tape, _) = timed(|| simd_json_tapes(&mut copies));
        drop(copies);
        let (shelf, size) = timed(|| off_the_shelf(corpus, &full));
        shelf_size = size;
        for (list, time) in [
            (&mut found.parse, parse),
            (&mut found.encode, encode),
            (&mut found.pages, pages),
            (&mut found.together, all),
            (&mut found.two, two),
            (&mut found.tape, tape),
            (&mut found.shelf, shelf),
        ] {
            list.push(rate(time));
        }
        found.to_limit.push((tape + pages).as_secs_f64() / all.as_secs_f64());
        found.to_shelf.push(shelf.as_secs_f64() / all.as_secs_f64());
        found.scaling.push(all.as_secs_f64() / two.as_secs_f64());
    }
    let columns: usize = full.values().map(|schema| leaf_columns(schema)).sum();
    println!(
        "\n{}: {:.0} MB of NDJSON, {} types, {columns} leaf columns; Parquet {:.1} MB, by (b) {:.1} MB",
        corpus.name,
        corpus.bytes as f64 / 1e6,
        types.len(),
        our_size as f64 / 1e6,
        shelf_size as f64 / 1e6
    );
    found
}

fn report(name: &str, found: &Rounds) {
    let m = |values: &Vec<f64>| median(values.clone());
    let limit = 1.0 / (1.0 / m(&found.tape) + 1.0 / m(&found.pages));
    println!("  two cores: {:.0} MB/s, {:.2} times one", m(&found.two), m(&found.scaling));
    println!(
        "  {name} MB/s a core: parse {:.0} encode {:.0} pages {:.0} together {:.0} | (b) arrow-json, ArrowWriter \
            {:.0} ratio {:.2} | (a) simd-json {:.0}, pages: {limit:.0} ratio {:.2}",
        m(&found.parse),
        m(&found.encode),
        m(&found.pages),
        m(&found.together),
        m(&found.shelf),
        m(&found.to_shelf),
        m(&found.tape),
        m(&found.to_limit),
    );
}

/// The same bytes of Patient into a narrow and a wide layout: what a row costs must not follow the type's columns.
fn width(arguments: &Arguments, bytes: usize) {
    let files = match &arguments.data {
        Some(data) => folder(data, Some("Patient"), bytes / 2),
        None => population(&["Patient"], bytes / 2),
    };
    let corpus = Corpus::new("Patient", files);
    let all_types = [
        "Age",
        "Annotation",
        "Attachment",
        "ContactPoint",
        "Dosage",
        "HumanName",
        "Money",
        "Period",
        "Quantity",
        "Range",
    ];
    let all_types =
        all_types.into_iter().chain(["Ratio", "SampledData", "Signature", "Timing", "UsageContext", "ContactDetail"]);
    let mut wide = LayoutOptions { max_nesting_level: 5, ..LayoutOptions::default() };
    wide.open_types.extend(all_types.map(str::to_owned));
    let run = |options: &LayoutOptions| {
        let layout = Arc::new(Layout::pathling("Patient", options).expect("a type of R4"));
        let columns = leaf_columns(&arrow_schema(&layout));
        let mut ours = Ours::new(&[]);
        ours.layouts.insert("Patient".into(), layout);
        let (time, _) = timed(|| together(&mut ours, corpus.chunks()));
        (columns, corpus.bytes as f64 / 1e6 / time.as_secs_f64())
    };
    let rounds: Vec<_> = (0..arguments.rounds).map(|_| (run(&LayoutOptions::default()), run(&wide))).collect();
    let ratio = median(rounds.iter().map(|(narrow, wide)| wide.1 / narrow.1).collect());
    let (narrow, wide) = &rounds[0];
    println!("\nPatient, the same bytes: {} columns against {}: MB/s ratio {ratio:.2}", wide.0, narrow.0);
}

fn main() {
    let mut arguments = arguments();
    let synthea = if arguments.demo || arguments.data.is_some() { None } else { synthea() };
    if let Some(folder) = &synthea {
        arguments.data = Some(folder.path().to_owned());
    }
    match (&arguments.data, &synthea) {
        (_, Some(_)) => println!("data: the Synthea sample, its values varied"),
        (Some(data), _) => println!("data: {}, its values varied", data.display()),
        (None, _) => println!("data: the demo's population"),
    }
    let bytes = arguments.megabytes * 1_000_000;
    for name in ["Observation", "Encounter", "ExplanationOfBenefit", "mix"] {
        if arguments.only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let one = (name != "mix").then_some(name);
        let files = match (&arguments.data, one) {
            (Some(data), one) => folder(data, one, bytes),
            (None, Some(one)) => population(&[one], bytes),
            (None, None) => population(&DEMO_TYPES, bytes),
        };
        let corpus = Corpus::new(name, files);
        if arguments.ours {
            for _ in 0..arguments.rounds {
                let (time, _) = timed(|| together(&mut Ours::new(&corpus.types()), corpus.chunks()));
                println!("{name}: together {:.0} MB/s", corpus.bytes as f64 / 1e6 / time.as_secs_f64());
            }
            continue;
        }
        let found = measure(&corpus, arguments.rounds);
        report(name, &found);
    }
    if !arguments.ours && arguments.only.is_none() {
        width(&arguments, bytes);
    }
    if let Some(kilobytes) = peak_memory() {
        println!("peak memory of this process, the corpora included: {} MB", kilobytes / 1000);
    }
}
