//! Runs that are killed or fail, and those that go on with what they staged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fhirlake::demo::{DemoServer, Faults, Population};
use fhirlake::flow::Stop;
use fhirlake::pipeline::{RunOptions, VacuumOptions, vacuum};
use fhirlake::staged::{StagedFolder, StagedWork};

use super::support::{Lake, assert_is, lake};

const TYPES: [&str; 3] = ["Patient", "Immunization", "Claim"];

async fn server(faults: Faults) -> DemoServer {
    let server = DemoServer::start(Population::new(5, 24), 0, 6).await.unwrap();
    server.set_faults(faults);
    server
}

fn source(server: &DemoServer) -> String {
    format!("{{ url: \"{}\", types: [{}], retry_for: 2s }}", server.base(), TYPES.join(", "))
}

const OFTEN: &str = "stages: { merge: { checkpoint: 20ms }, encode: { row_group: 64KiB }, download: { tries: 1 } }\n";

fn pipeline(lake: &Lake, server: &DemoServer, rest: &str) -> PathBuf {
    let file = lake.pipeline_file(&source(server));
    let yaml = std::fs::read_to_string(&file).unwrap() + rest;
    std::fs::write(&file, yaml).unwrap();
    file
}

fn staged(lake: &Lake) -> Option<StagedWork> {
    StagedFolder::at(lake.state().join("staged")).read().unwrap()
}

/// Runs until `enough`, then kills.
async fn killed(file: &Path, mut enough: impl FnMut() -> bool) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_fhirlake"))
        .arg("run")
        .arg(file)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    for _ in 0..3000 {
        if enough() {
            break;
        }
        assert!(child.try_wait().unwrap().is_none(), "the run ended by itself");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(enough(), "it took too long");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// How often each file was asked for.
fn asked(server: &DemoServer) -> BTreeMap<String, usize> {
    let mut asked = BTreeMap::new();
    for name in server.seen().files {
        *asked.entry(name).or_default() += 1;
    }
    asked
}

async fn nothing_left_over(lake: &Lake) {
    for name in TYPES {
        let (there, named) = lake.files(name).await;
        assert_eq!(there, named, "{name}: orphans");
    }
    assert!(!lake.state().join("staged").exists(), "nothing is written down any more");
}

fn claims_held(lake: &Lake) -> usize {
    let Some(work) = staged(lake) else { return 0 };
    work.listed
        .iter()
        .filter(|file| file.held.as_ref().is_some_and(|held| held.rows.iter().any(|row| &*row.0 == "Claim")))
        .count()
}

// Breaks if a file whose rows are staged is downloaded again, if rows of one that is not come twice, or if the report of the
// run that goes on counts otherwise than that of an undisturbed one.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_staged_is_not_downloaded_again_after_a_kill() {
    let (server, lake) = (server(Faults { hanging_files: vec!["Claim.3".into()], ..Faults::default() }).await, lake());
    let file = pipeline(&lake, &server, OFTEN);
    killed(&file, || claims_held(&lake) == 3).await;
    // Half of the fourth file may be staged as well: it comes again.
    let before = asked(&server);
    server.set_faults(Faults::default());
    // In between, vacuum must spare it.
    let plan = lake.plan(&source(&server), OFTEN);
    let all = VacuumOptions { retention: Some(Duration::ZERO), below_the_tables: true, delete: true, ..VacuumOptions::default() };
    vacuum(&plan, &all, &Stop::default()).await.unwrap();
    let report = lake.run(&source(&server), OFTEN).await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_is(&lake, &server.population(), &TYPES).await;
    let after = asked(&server);
    let again: Vec<&String> =
        after.iter().filter(|(name, count)| before.get(*name) != Some(count)).map(|(name, _)| name).collect();
    assert_eq!(again, ["Claim.3.ndjson"]);
    assert_eq!(server.seen().kickoffs.len(), 1);
    nothing_left_over(&lake).await;
    // As if nothing had happened.
    let undisturbed = super::support::lake();
    let whole = undisturbed.run(&source(&server), OFTEN).await.unwrap();
    let counts = |report: &fhirlake::pipeline::RunReport| {
        let claim = &report.types["Claim"];
        (claim.files, claim.resources, claim.inserted, claim.updated, claim.skipped, claim.quarantined)
    };
    assert_eq!(counts(&report), counts(&whole));
    let rows = lake.history("Claim").await[0]["operationMetrics"]["numSourceRows"].clone();
    assert_eq!(rows, undisturbed.history("Claim").await[0]["operationMetrics"]["numSourceRows"]);
}

// Breaks if one failed file of many lets all be downloaded again.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_file_is_all_that_the_next_run_downloads() {
    let (server, lake) = (server(Faults { missing_files: vec!["Claim.1".into()], ..Faults::default() }).await, lake());
    let report = lake.run(&source(&server), "").await.unwrap();
    assert!(!report.succeeded && report.types["Claim"].error.is_some());
    assert_eq!(claims_held(&lake), 3);
    let before = server.seen().files.len();
    server.set_faults(Faults::default());
    let report = lake.run(&source(&server), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_is(&lake, &server.population(), &TYPES).await;
    // What changed since the export is asked for by a second one.
    let seen = server.seen();
    let again: Vec<_> =
        seen.files.iter().zip(&seen.jobs).skip(before).filter(|(_, job)| **job == 0).map(|(name, _)| name.as_str()).collect();
    assert_eq!((again, seen.kickoffs.len()), (vec!["Claim.1.ndjson"], 2));
    nothing_left_over(&lake).await;
}

// Breaks if what is staged is trusted though it is not what was written down, or if a run cannot go on without it.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_staged_and_is_damaged_is_downloaded_again() {
    type Damage = fn(&Lake);
    fn each(folder: PathBuf, extension: &str, damage: impl Fn(&Path)) {
        let entries: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path()).collect();
        let hit = entries.iter().filter(|path| path.to_str().unwrap().ends_with(extension));
        assert!(hit.clone().next().is_some(), "nothing to damage");
        hit.for_each(|path| damage(path));
    }
    let damages: [(&str, Damage); 5] = [
        ("the list is no JSON", |lake| std::fs::write(lake.state().join("staged/index.json"), "{").unwrap()),
        ("another version", |lake| {
            let path = lake.state().join("staged/index.json");
            let text = std::fs::read_to_string(&path).unwrap().replace("\"fhirlake ", "\"fhirlake 99");
            std::fs::write(path, text).unwrap();
        }),
        ("keys are gone", |lake| each(lake.state().join("staged"), ".keys", |path| std::fs::remove_file(path).unwrap())),
        ("rows are gone", |lake| {
            each(lake.tables().join("Claim.parquet"), ".parquet", |path| std::fs::remove_file(path).unwrap());
        }),
        ("the table has other columns", |lake| {
            let path = lake.state().join("staged/index.json");
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(path, text.replace("\"columns\":\"", "\"columns\":\"x")).unwrap();
        }),
    ];
    for (what, damage) in damages {
        let (server, lake) = (server(Faults { missing_files: vec!["Claim.1".into()], ..Faults::default() }).await, lake());
        lake.run(&source(&server), "").await.unwrap();
        damage(&lake);
        server.set_faults(Faults::default());
        let report = lake.run(&source(&server), "").await.unwrap();
        assert!(report.succeeded, "{what}: {report:#?}");
        assert_is(&lake, &server.population(), &TYPES).await;
    }
    // Keys that are damaged are found when they are read: the type fails once, and comes with the next run.
    let (server, lake) = (server(Faults { missing_files: vec!["Claim.1".into()], ..Faults::default() }).await, lake());
    lake.run(&source(&server), "").await.unwrap();
    each(lake.state().join("staged"), ".keys", |path| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[20] ^= 1;
        std::fs::write(path, bytes).unwrap();
    });
    server.set_faults(Faults::default());
    let report = lake.run(&source(&server), "").await.unwrap();
    assert!(report.types["Claim"].error.as_ref().is_some_and(|error| error.contains("is not what was written")), "{report:#?}");
    assert!(lake.run(&source(&server), "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
    nothing_left_over(&lake).await;
}

// Breaks if a resource that came in another type's file is lost when that type was merged before the kill.
#[tokio::test(flavor = "multi_thread")]
async fn strays_in_files_of_a_merged_type_are_not_lost() {
    for rest in ["", OFTEN] {
        let stray = "{\"resourceType\":\"Claim\",\"id\":\"stray\"}\n".as_bytes().to_vec();
        let junk = [("Patient".to_owned(), stray)].into();
        let faults = Faults { junk, hanging_files: vec!["Claim.3".into()], ..Faults::default() };
        let (server, lake) = (server(faults.clone()).await, lake());
        let file = pipeline(&lake, &server, rest);
        let merged = lake.tables().join("Patient.parquet/_delta_log/00000000000000000000.json");
        killed(&file, || merged.exists() && (rest.is_empty() || claims_held(&lake) >= 3)).await;
        server.set_faults(Faults { hanging_files: Vec::new(), ..faults });
        let report = lake.run(&source(&server), rest).await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        assert!(lake.ids("Claim").await.contains(&"stray".to_owned()), "{rest}");
        assert_eq!(lake.count("Patient").await, 24);
        assert_eq!(server.seen().kickoffs.len(), 1);
        nothing_left_over(&lake).await;
    }
}

// Breaks if what is staged outlives its export, or if a run that asks for something else takes or removes it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_staged_belongs_to_its_export() {
    let (server, lake) = (server(Faults { missing_files: vec!["Claim.1".into()], ..Faults::default() }).await, lake());
    lake.run(&source(&server), "").await.unwrap();
    assert_eq!(claims_held(&lake), 3);
    // Other types: another export.
    let other = format!("{{ url: \"{}\", types: [Immunization], retry_for: 2s }}", server.base());
    assert!(lake.run(&other, "").await.unwrap().succeeded);
    assert_eq!(claims_held(&lake), 3);
    // Lines in quarantine only: nothing is asked for.
    let replay = RunOptions { replay_only: true, ..RunOptions::default() };
    lake.run_with(lake.plan(&source(&server), ""), replay).await.unwrap();
    assert_eq!(claims_held(&lake), 3);
    server.set_faults(Faults::default());
    let fresh = RunOptions { new_export: true, ..RunOptions::default() };
    let report = lake.run_with(lake.plan(&source(&server), ""), fresh).await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_is(&lake, &server.population(), &TYPES).await;
}
