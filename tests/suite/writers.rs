//! Tables as other writers make them, and other writers at the same time.

use fhirlake::stages::merge::{KEYS, MATCHING};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fhirlake::topology::{OptimizeOptions, RunOptions, optimize};
use flow::Cancellation;
use foundation::Limit;
use parquet::data_type::{ByteArray, ByteArrayType, Int96, Int96Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::support::{Lake, folder, lake, strings};

fn patients(ids: impl Iterator<Item = u32>, version: u32) -> String {
    ids.map(|id| {
        format!(
            "{{\"resourceType\":\"Patient\",\"id\":\"p{id}\",\"meta\":{{\"versionId\":\"{version}\",\"lastUpdated\":\"2026-01-0{version}T00:00:00Z\"}}}}\n"
        )
    })
    .collect()
}

fn table(lake: &Lake) -> PathBuf {
    lake.tables().join("Patient.parquet")
}

/// Makes `change` of every action of the table's newest commit.
fn edit_newest(lake: &Lake, mut change: impl FnMut(&mut Value)) {
    let mut commits: Vec<PathBuf> =
        std::fs::read_dir(table(lake).join("_delta_log")).unwrap().map(|e| e.unwrap().path()).collect();
    commits.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    commits.sort();
    let newest = commits.last().unwrap();
    let text = std::fs::read_to_string(newest).unwrap();
    let mut actions: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    actions.iter_mut().for_each(&mut change);
    let lines: Vec<String> = actions.iter().map(Value::to_string).collect();
    std::fs::write(newest, lines.join("\n")).unwrap();
}

/// Adds a commit of another writer.
fn commit(lake: &Lake, actions: &[Value]) {
    let log = table(lake).join("_delta_log");
    let commits = std::fs::read_dir(&log).unwrap().flatten();
    let next = commits.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "json")).count();
    let lines: Vec<String> = actions.iter().map(Value::to_string).collect();
    std::fs::write(log.join(format!("{next:020}.json")), lines.join("\n")).unwrap();
}

fn add(path: &str, file: &Path) -> Value {
    let size = std::fs::metadata(file).unwrap().len();
    json!({ "add": { "path": path, "partitionValues": {}, "size": size, "modificationTime": 0, "dataChange": true } })
}

/// Version by id, and how many rows have each id.
async fn rows(lake: &Lake) -> BTreeMap<String, Vec<String>> {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for batch in lake.sql("SELECT id, meta['versionId'] AS v FROM Patient").await {
        for (id, version) in strings(&batch, "id").into_iter().zip(strings(&batch, "v")) {
            found.entry(id.unwrap()).or_default().push(version.unwrap());
        }
    }
    found
}

// Breaks if an id that stands more than once in a table, in one file or in several, does so after a run that brings it
// or deletes it, whether the keys fit into memory or not, and whether rows are marked or files rewritten; or if any
// other row goes.
#[tokio::test(flavor = "multi_thread")]
async fn duplicates_in_a_table_end_as_one() {
    for (in_memory, vectors) in [(true, true), (true, false), (false, true), (false, false)] {
        let lake = lake();
        let setting = format!("stages: {{ merge: {{ deletion_vectors: {vectors} }} }}\n");
        let run = async |text: &str, options: RunOptions| {
            let (_data, source) = folder(&[("Patient.ndjson", text)]);
            let mut plan = lake.plan(&source, &setting);
            if !in_memory {
                plan.memory.set(&KEYS, 0);
                plan.memory.set(&MATCHING, 0);
            }
            let report = lake.run_with(plan, options).await.unwrap();
            assert!(report.succeeded, "{report:#?}");
            report
        };
        run(&patients(0..10, 2), RunOptions::default()).await;
        // The same file once more, under another name: as an append of Spark's would be.
        let (_, named) = lake.files("Patient").await;
        std::fs::copy(table(&lake).join(&named[0]), table(&lake).join("again.parquet")).unwrap();
        commit(&lake, &[add("again.parquet", &table(&lake).join("again.parquet"))]);
        assert_eq!(lake.count("Patient").await, 20);
        // A newer copy, an equal one, an older one, and a new one.
        let text = patients(0..1, 3) + &patients(1..2, 2) + &patients(2..3, 1) + &patients(10..11, 2);
        let report = run(&text, RunOptions::default()).await;
        let outcome = &report.types["Patient"];
        assert_eq!((outcome.inserted, outcome.updated, outcome.skipped), (1, 1, 2), "{in_memory} {vectors}");
        let found = rows(&lake).await;
        for (id, expected) in [("p0", "3"), ("p1", "2"), ("p2", "2"), ("p10", "2")] {
            assert_eq!(found[id], [expected], "{id}: {in_memory} {vectors}");
        }
        assert!((3..10).all(|id| found[&format!("p{id}")] == ["2", "2"]), "what no run brings is as it was: {found:?}");
        // All come again.
        run(&patients(0..11, 4), RunOptions { full_refresh: true, ..RunOptions::default() }).await;
        assert!(rows(&lake).await.values().all(|versions| *versions == ["4"]), "{in_memory} {vectors}");
    }
}

// Breaks if a vector that is kept in the log itself, or at a place of its own, is taken for none, or if rows that it
// marks come back when more are marked.
#[tokio::test(flavor = "multi_thread")]
async fn vectors_of_any_storage_kind_are_merged_with() {
    for kind in ["i", "p"] {
        let lake = lake();
        let run = async |text: &str| {
            let (_data, source) = folder(&[("Patient.ndjson", text)]);
            assert!(lake.run(&source, "").await.unwrap().succeeded);
        };
        run(&patients(0..40, 1)).await;
        run(&patients(0..3, 2)).await;
        let elsewhere = tempfile::tempdir().unwrap();
        edit_newest(&lake, |action| {
            let Some(vector) = action.pointer_mut("/add/deletionVector") else { return };
            let name = vector["pathOrInlineDv"].as_str().unwrap();
            let id = uuid::Uuid::from_slice(&z85::decode(&name[name.len() - 20..]).unwrap()).unwrap();
            let file = table(&lake).join(format!("deletion_vector_{id}.bin"));
            if kind == "p" {
                let moved = elsewhere.path().join("vector.bin");
                std::fs::rename(&file, &moved).unwrap();
                vector["pathOrInlineDv"] = url::Url::from_file_path(moved).unwrap().to_string().into();
            } else {
                let bytes = std::fs::read(&file).unwrap();
                let (offset, size) =
                    (vector["offset"].as_u64().unwrap() as usize, vector["sizeInBytes"].as_u64().unwrap() as usize);
                // Behind its length.
                let mut bytes = bytes[offset + 4..offset + 4 + size].to_vec();
                bytes.resize(size.next_multiple_of(4), 0);
                vector["pathOrInlineDv"] = z85::encode(bytes).into();
                vector.as_object_mut().unwrap().remove("offset");
                std::fs::remove_file(file).unwrap();
            }
            vector["storageType"] = kind.into();
        });
        assert_eq!(lake.count("Patient").await, 40, "{kind}");
        run(&patients(2..6, 3)).await;
        let found = rows(&lake).await;
        let expected = |id: u32| {
            if id < 2 {
                "2"
            } else if id < 6 {
                "3"
            } else {
                "1"
            }
        };
        assert!((0..40).all(|id| found[&format!("p{id}")] == [expected(id)]), "{kind}: {found:?}");
        let mut marked = Vec::new();
        edit_newest(&lake, |action| marked.extend(action.pointer("/add").cloned()));
        let first = marked.iter().find(|add| add["stats"].as_str().unwrap().contains("\"numRecords\":40")).unwrap();
        assert_eq!(first["deletionVector"]["cardinality"], 6, "{kind}: those marked before and now");
        let statistics: Value = serde_json::from_str(first["stats"].as_str().unwrap()).unwrap();
        assert_eq!((&statistics["tightBounds"], &statistics["nullCount"]["id"]), (&json!(false), &json!(0)));
        let whole = marked.iter().find(|add| add.get("deletionVector").is_none_or(Value::is_null)).unwrap();
        assert!(whole["stats"].as_str().unwrap().contains("\"tightBounds\":true"), "{whole}");
    }
}

// Breaks if, of two that commit at once, one's rows are lost, an older copy wins, or one gives up.
#[tokio::test(flavor = "multi_thread")]
async fn two_pipelines_merge_into_one_table_at_the_same_time() {
    let lake = lake();
    for round in 0..6u32 {
        let run = |name: &str, text: String| {
            let (data, source) = folder(&[("Patient.ndjson", &text)]);
            let mut plan = lake.plan(&source, "");
            plan.name = name.to_owned();
            plan.state = lake.folder.path().join(name).display().to_string();
            let run = lake.run_with(plan, RunOptions::default());
            async move {
                let report = run.await.unwrap();
                drop(data);
                report
            }
        };
        // The same fifty by both, in other versions, and ten of their own.
        let (one, two) = (1 + round % 3, 1 + (round + 1) % 3);
        let ones = patients(0..50, one) + &patients(100 + round * 10..110 + round * 10, 1);
        let twos = patients(0..50, two) + &patients(300 + round * 10..310 + round * 10, 1);
        let (first, second) = tokio::join!(run("one", ones), run("two", twos));
        for report in [&first, &second] {
            assert!(report.succeeded, "{report:#?}");
        }
        let found = rows(&lake).await;
        let newest = if round == 0 { "2" } else { "3" };
        assert!((0..50).all(|id| found[&format!("p{id}")] == [newest]), "round {round}: {found:?}");
        assert_eq!(found.len() as u32, 50 + 20 * (round + 1));
    }
}

/// What happens to the table of patients.
#[derive(Debug, Clone)]
enum Step {
    /// A pipeline's run brings versions of ids.
    One(Vec<(u32, u32)>),
    /// Another pipeline's.
    Two(Vec<(u32, u32)>),
    /// Both at the same time.
    Both(Vec<(u32, u32)>, Vec<(u32, u32)>),
    /// Another writer deletes an id, as Spark would.
    Deletes(u32),
    /// Files are put together.
    Optimize,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let brought = || prop::collection::vec((0..12u32, 1..9u32), 1..8);
    let step = prop_oneof![
        3 => brought().prop_map(Step::One),
        3 => brought().prop_map(Step::Two),
        2 => (brought(), brought()).prop_map(|(one, two)| Step::Both(one, two)),
        2 => (0..12u32).prop_map(Step::Deletes),
        1 => Just(Step::Optimize),
    ];
    prop::collection::vec(step, 1..9)
}

async fn brings(lake: &Lake, name: &str, rows: &[(u32, u32)]) {
    let text: String = rows.iter().map(|(id, version)| patients(*id..*id + 1, *version)).collect();
    let (_data, source) = folder(&[("Patient.ndjson", &text)]);
    // Without vectors: the outside writer could not delete.
    let mut plan = lake.plan(&source, "stages: { merge: { deletion_vectors: false } }\n");
    plan.name = name.to_owned();
    plan.state = lake.folder.path().join(name).display().to_string();
    let report = lake.run_with(plan, RunOptions::default()).await.unwrap();
    assert!(report.succeeded, "{report:#?}");
}

async fn takes(lake: &Lake, steps: &[Step]) {
    let mut model: BTreeMap<String, u32> = BTreeMap::new();
    for (at, step) in steps.iter().enumerate() {
        let mut merge = |rows: &[(u32, u32)]| {
            for (id, version) in rows {
                let known = model.entry(format!("p{id}")).or_default();
                *known = (*known).max(*version);
            }
        };
        match step {
            Step::One(rows) => {
                brings(lake, "one", rows).await;
                merge(rows);
            }
            Step::Two(rows) => {
                brings(lake, "two", rows).await;
                merge(rows);
            }
            Step::Both(one, two) => {
                tokio::join!(brings(lake, "one", one), brings(lake, "two", two));
                merge(one);
                merge(two);
            }
            _ if model.is_empty() => {}
            Step::Deletes(id) => {
                let url = url::Url::from_directory_path(table(lake)).unwrap();
                let table = deltalake::open_table(url).await.unwrap();
                // delta-rs does not delete from tables with vectors: these have none.
                table.delete().with_predicate(format!("id = 'p{id}'")).await.unwrap();
                model.remove(&format!("p{id}"));
            }
            Step::Optimize => {
                let plan = lake.plan("{ url: \"file:///nowhere\" }", "");
                let options =
                    OptimizeOptions { types: Default::default(), cluster: at % 2 == 0, min_deleted: Limit::Count(1) };
                let done = optimize(&plan, &options, &Cancellation::default()).await.unwrap();
                assert!(done.values().all(Result::is_ok));
            }
        }
        if !model.is_empty() || table(lake).exists() {
            let found = rows(lake).await;
            let expected: BTreeMap<String, Vec<String>> =
                model.iter().map(|(id, version)| (id.clone(), vec![version.to_string()])).collect();
            assert_eq!(found, expected, "after step {at} of {steps:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 60, ..ProptestConfig::default() })]
    // Breaks if some interleaving of two pipelines and an outside writer loses a row, doubles it, or brings an old one
    // back.
    #[test]
    fn any_interleaving_of_writers(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let lake = lake();
            takes(&lake, &steps).await;
        });
    }
}

// Breaks if instants that Spark writes as INT96, those beyond 2262 included, rank wrongly or change when their file is
// written anew.
#[tokio::test(flavor = "multi_thread")]
async fn instants_of_twelve_bytes() {
    for vectors in [true, false] {
        let lake = lake();
        let setting = format!("stages: {{ merge: {{ deletion_vectors: {vectors} }} }}\n");
        let (_data, source) = folder(&[("Patient.ndjson", &patients(0..1, 1))]);
        assert!(lake.run(&source, &setting).await.unwrap().succeeded);
        let file = table(&lake).join("spark.parquet");
        let schema = "message spark_schema \
            \
            \
            \
            \
            \
            { optional binary id (STRING); optional group meta { optional binary versionId (STRING); optional int96 lastUpdated; } }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().build());
        let mut writer = SerializedFileWriter::new(std::fs::File::create(&file).unwrap(), schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for values in [["p1", "p2", "p3"], ["5", "5", "5"]] {
            let mut column = group.next_column().unwrap().unwrap();
            let values: Vec<ByteArray> = values.into_iter().map(ByteArray::from).collect();
            let levels = if values[0].data() == b"p1" { [1i16; 3] } else { [2; 3] };
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        // Julian days: 2026-01-05, 2026-01-05, and 9999-12-31.
        let days = [2_461_046u32, 2_461_046, 5_373_484];
        let instants: Vec<Int96> = days.iter().map(|day| Int96::from(vec![0, 0, *day])).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int96Type>().write_batch(&instants, Some(&[2; 3]), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        commit(&lake, &[add("spark.parquet", &file)]);
        // p1 comes older, p2 newer, p3 older than 9999.
        let text = patients(1..2, 4) + &patients(2..3, 6) + &patients(3..4, 6);
        let (_data, source) = folder(&[("Patient.ndjson", &text)]);
        let report = lake.run(&source, &setting).await.unwrap();
        let outcome = &report.types["Patient"];
        assert_eq!((outcome.inserted, outcome.updated, outcome.skipped), (0, 1, 2), "{report:#?}");
        let batches = lake
            .sql("SELECT id, CAST(date_part('year', meta['lastUpdated']) AS VARCHAR) AS y FROM Patient ORDER BY id")
            .await;
        let years: Vec<Option<String>> = batches.iter().flat_map(|batch| strings(batch, "y")).collect();
        assert_eq!(years, ["2026", "2026", "2026", "9999"].map(|year| Some(year.to_owned())));
    }
}
