//! `optimize` and `vacuum`: no answer changes, nothing that is needed goes.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use fhirlake::topology::RunPlan;
use fhirlake::topology::{OptimizeOptions, VacuumOptions, optimize, vacuum};
use flow::Cancellation;
use foundation::Limit;

use super::support::{Lake, folder, lake, strings};

/// Patients `ids` at a version; those of an odd version fill other columns than the rest.
fn patients(ids: impl Iterator<Item = u32>, version: u32) -> String {
    ids.map(|id| {
        let more = if version % 2 == 1 {
            r#""name":[{"family":"F","given":["G",null]}]"#
        } else {
            r#""maritalStatus":{"text":"m"},"extension":[{"url":"u","valueString":"x"}]"#
        };
        let number = id * 7919 % 1000;
        format!(
            "{{\"resourceType\":\"Patient\",\"id\":\"p{number:03}\",\"meta\":{{\"versionId\":\"{version}\",\"lastUpdated\":\"2026-01-0{version}T00:00:00Z\"}},{more}}}\n"
        )
    })
    .collect()
}

/// As many as it takes for maintenance to last.
fn many(ids: std::ops::Range<u32>, version: u32) -> String {
    let line = |id: u32| {
        let number = id * 7919 % 65_521;
        format!(
            "{{\"resourceType\":\"Patient\",\"id\":\"p{number:05}\",\"meta\":{{\"versionId\":\"{version}\"}},\"name\":[{{\"family\":\"F{id}\"}}]}}\n"
        )
    };
    ids.map(line).collect()
}

/// A table of many small files, some of them with deletion vectors.
async fn worn() -> (Lake, RunPlan) {
    let lake = lake();
    let mut plan = None;
    for (from, until, version) in [(0, 300, 1), (200, 400, 2), (250, 260, 3), (390, 500, 4), (0, 5, 5)] {
        let (_data, source) = folder(&[("Patient.ndjson", &patients(from..until, version))]);
        assert!(lake.run(&source, "").await.unwrap().succeeded);
        plan = Some(lake.plan(&source, ""));
    }
    (lake, plan.unwrap())
}

/// All that a reader can see, row by row.
async fn everything(lake: &Lake) -> BTreeSet<String> {
    let sql = "SELECT id, id_versioned AS iv, meta['versionId'] AS v, CAST(meta['lastUpdated'] AS VARCHAR) AS u, \
        name[1]['family'] AS f, \
               name[1]['given'][1] AS g, CAST(name IS NULL AS VARCHAR) AS n, maritalStatus['text'] AS m, \
               CAST(maritalStatus IS NULL AS VARCHAR) AS mn, \
               map_extract(_extension, _fid)[1][1]['valueString'] AS e, CAST(_extension IS NULL AS VARCHAR) AS en, \
               CAST(array_length(name[1]['given']) AS VARCHAR) AS l FROM Patient";
    let mut rows = BTreeSet::new();
    for batch in lake.sql(sql).await {
        let columns: Vec<Vec<Option<String>>> =
            batch.schema().fields().iter().map(|field| strings(&batch, field.name())).collect();
        for row in 0..batch.num_rows() {
            assert!(rows.insert(format!("{:?}", columns.iter().map(|column| &column[row]).collect::<Vec<_>>())));
        }
    }
    rows
}

fn options(cluster: bool) -> OptimizeOptions {
    OptimizeOptions { types: Default::default(), cluster, min_deleted: Limit::Count(1) }
}

/// What `optimize` did to Patient.
async fn optimized(plan: &RunPlan, options: &OptimizeOptions) -> delta_upsert::Optimized {
    optimize(plan, options, &Cancellation::default()).await.unwrap().remove("Patient").unwrap().unwrap()
}

// Breaks if compaction loses, doubles or changes a row, or leaves a small file or a deletion vector behind.
#[tokio::test(flavor = "multi_thread")]
async fn optimize_changes_files_and_no_answer() {
    for cluster in [false, true] {
        let (lake, plan) = worn().await;
        let before = everything(&lake).await;
        assert_eq!(before.len(), 500);
        let (_, files) = lake.files("Patient").await;
        let done = optimized(&plan, &options(cluster)).await;
        assert_eq!((done.files_removed, done.files_added), (files.len() as u64, 1));
        assert!(done.rows_purged > 0);
        assert_eq!(everything(&lake).await, before);
        let tables = delta_upsert::Tables::at(&lake.tables().display().to_string()).unwrap();
        let table = tables.open(&"Patient".into()).await.unwrap();
        assert_eq!(table.row_count(), Some(500));
        let snapshot = table.delta().unwrap().snapshot().unwrap();
        assert!(snapshot.log_data().iter().all(|file| file.deletion_vector_descriptor().is_none()));
        // In the order of their ids, where that was asked for.
        let ids: Vec<_> =
            lake.sql("SELECT id FROM Patient").await.iter().flat_map(|batch| strings(batch, "id")).collect();
        assert_eq!(ids.is_sorted(), cluster);
        // Again: nothing to do.
        let again = optimized(&plan, &options(cluster)).await;
        assert_eq!(again, Default::default());
        // Later runs merge into what it made.
        let (_data, source) = folder(&[("Patient.ndjson", &patients(100..105, 6))]);
        let report = lake.run(&source, "").await.unwrap();
        assert_eq!((report.types["Patient"].updated, report.types["Patient"].inserted), (5, 0));
        assert_eq!(lake.count("Patient").await, 500);
        let history = lake.history("Patient").await;
        assert_eq!(history[1]["operation"], "OPTIMIZE");
        assert_eq!(history[1]["pipeline"], "test");
    }
}

// Breaks if optimize or vacuum, killed at any moment, loses a row, or leaves a file that the next does not take.
#[tokio::test(flavor = "multi_thread")]
async fn killed_maintenance_is_made_good_by_the_next() {
    let lake = lake();
    for version in [1, 2] {
        for part in 0..12 {
            let (_data, source) =
                folder(&[("Patient.ndjson", &many(part * 2000..(part + 1) * 2000 - version * 100, version))]);
            assert!(lake.run(&source, "").await.unwrap().succeeded);
        }
    }
    let question = "SELECT id, meta['versionId'] AS v, name[1]['family'] AS f FROM Patient ORDER BY id";
    let answer = async || {
        let batches = lake.sql(question).await;
        let columns = |name: &str| batches.iter().flat_map(|batch| strings(batch, name)).collect::<Vec<_>>();
        (columns("id"), columns("v"), columns("f"))
    };
    let before = answer().await;
    assert_eq!(before.0.len(), 12 * 1900);
    let (_data, source) = folder(&[("Patient.ndjson", "")]);
    let yaml = lake.pipeline_file(&source);
    let command = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_fhirlake"));
        command
            .arg(arguments[0])
            .arg(&yaml)
            .args(&arguments[1..])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        command
    };
    let maintenance: [&[&str]; 3] =
        [&["optimize"], &["optimize", "--cluster"], &["vacuum", "--retention", "0s", "--force", "--delete"]];
    for arguments in maintenance {
        for after in [10, 40, 80, 160, 320] {
            let mut child = command(arguments).spawn().unwrap();
            tokio::time::sleep(Duration::from_millis(after)).await;
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(answer().await == before, "{arguments:?}, killed");
        let status = tokio::task::block_in_place(|| command(arguments).status().unwrap());
        assert!(status.success(), "{arguments:?}");
        assert!(answer().await == before, "{arguments:?}");
    }
    let (there, named) = lake.files("Patient").await;
    assert_eq!(there, named, "files that nothing names");
}

// Breaks if sorting needs the table in memory, or if a table without deletion vectors or with large files is not left
// alone.
#[tokio::test(flavor = "multi_thread")]
async fn optimize_leaves_alone_what_is_well() {
    let lake = lake();
    let (_data, source) = folder(&[("Patient.ndjson", &patients(0..10, 1))]);
    lake.run(&source, "").await.unwrap();
    let plan = lake.plan(&source, "");
    let done = optimized(&plan, &options(false)).await;
    assert_eq!(done.version, None);
    // Few marked rows are no reason either.
    let (_data, source) = folder(&[("Patient.ndjson", &patients(0..1, 2))]);
    lake.run(&source, "").await.unwrap();
    let few = OptimizeOptions { min_deleted: Limit::Percent(50.0), ..options(false) };
    let mut plan = plan;
    std::sync::Arc::make_mut(&mut plan.stages).merge.target_file = fhirlake::values::ByteSize(10);
    let done = optimized(&plan, &few).await;
    assert_eq!(done.version, None);
    let error =
        optimize(&plan, &OptimizeOptions { types: vec!["Group".to_owned()].into(), ..few }, &Cancellation::default())
            .await
            .unwrap_err();
    assert!(error.to_string().contains("no table of Group"), "{error}");
}

// Breaks if `optimize: { after: N }` counts wrongly or its failure fails a run.
#[tokio::test(flavor = "multi_thread")]
async fn optimize_after_some_runs() {
    let lake = lake();
    let mut files = Vec::new();
    for run in 0..5 {
        let (_data, source) = folder(&[("Patient.ndjson", &patients(run * 10..run * 10 + 10, 1))]);
        assert!(lake.run(&source, "optimize: { after: 2 }\n").await.unwrap().succeeded);
        files.push(lake.files("Patient").await.1.len());
    }
    assert_eq!(files, [1, 1, 2, 1, 2]);
    assert_eq!(lake.count("Patient").await, 50);
}

/// Makes every file of the table, its log included, older.
fn age(lake: &Lake, by: Duration) {
    let folder = lake.tables().join("Patient.parquet");
    for folder in [folder.clone(), folder.join("_delta_log")] {
        for entry in std::fs::read_dir(folder).unwrap().flatten().filter(|entry| entry.path().is_file()) {
            let file = std::fs::File::options().append(true).open(entry.path()).unwrap();
            file.set_modified(file.metadata().unwrap().modified().unwrap() - by).unwrap();
        }
    }
}

fn all_files(lake: &Lake) -> BTreeSet<String> {
    let entries = std::fs::read_dir(lake.tables().join("Patient.parquet")).unwrap().flatten();
    entries.filter(|entry| entry.path().is_file()).map(|entry| entry.file_name().into_string().unwrap()).collect()
}

// Breaks if vacuum takes a file, or a deletion vector, that a version within the retention needs, or one of a run that
// has not committed yet.
#[tokio::test(flavor = "multi_thread")]
async fn vacuum_takes_what_no_version_within_the_retention_names() {
    let (lake, plan) = worn().await;
    let stray = lake.tables().join("Patient.parquet/part-someone-else.parquet");
    std::fs::write(&stray, "x").unwrap();
    // Ten days ago all of this was written; the newest commit is of today.
    age(&lake, Duration::from_secs(10 * 86400));
    let staged = lake.tables().join("Patient.parquet/part-20990101T000000000Z-aaaaaa-00001.zstd.parquet");
    std::fs::write(&staged, "x").unwrap();
    let before_optimize = all_files(&lake);
    optimize(&plan, &options(false), &Cancellation::default()).await.unwrap();
    let answer = everything(&lake).await;
    let week = VacuumOptions { retention: Some(Duration::from_secs(7 * 86400)), ..VacuumOptions::default() };
    let found = vacuum(&plan, &week, &Cancellation::default()).await.unwrap().remove("Patient").unwrap().unwrap();
    let found: BTreeSet<String> = found.files.into_iter().collect();
    // The files that optimize exchanged were the newest's until now; deletion vectors that later ones replaced were
    // not.
    assert!(found.contains("part-someone-else.parquet"));
    assert!(!found.contains("part-20990101T000000000Z-aaaaaa-00001.zstd.parquet"), "it may be of a run that goes on");
    let old_vectors: Vec<_> = found.iter().filter(|file| file.starts_with("deletion_vector")).collect();
    assert!(!old_vectors.is_empty() && found.len() == old_vectors.len() + 1, "{found:?}");
    assert_eq!(
        all_files(&lake).intersection(&before_optimize).count(),
        before_optimize.len(),
        "a dry run removes nothing"
    );
    // The version before optimize can still be read once they are gone.
    let deleted =
        vacuum(&plan, &VacuumOptions { delete: true, ..week.clone() }, &Cancellation::default()).await.unwrap();
    assert!(deleted["Patient"].as_ref().unwrap().deleted);
    assert!(found.iter().all(|file| !all_files(&lake).contains(file)));
    assert_eq!(everything(&lake).await, answer);
    assert_eq!(lake.count_at("Patient", 4).await, 500);
    let history = lake.history("Patient").await;
    assert_eq!((&history[0]["operation"], &history[1]["operation"]), (&"VACUUM END".into(), &"VACUUM START".into()));
    // A shorter retention is refused, unless it is meant.
    let now = VacuumOptions { retention: Some(Duration::ZERO), delete: true, ..VacuumOptions::default() };
    let refused = vacuum(&plan, &now, &Cancellation::default()).await.unwrap().remove("Patient").unwrap().unwrap_err();
    assert!(refused.to_string().contains("below the table's own"), "{refused}");
    let meant = VacuumOptions { below_the_tables: true, ..now };
    vacuum(&plan, &meant, &Cancellation::default()).await.unwrap().remove("Patient").unwrap().unwrap();
    assert_eq!(all_files(&lake).len(), 2, "the one data file, and what a run may be staging: {:?}", all_files(&lake));
    assert_eq!(everything(&lake).await, answer);
    assert!(SystemTime::now() > std::fs::metadata(&staged).unwrap().modified().unwrap());
}
