//! `mode: reconcile` and `mode: overwrite`: what a full export does not name goes, and never more than is allowed.

use bulk_data_server::{DemoServer, Faults, Population};
use fhirlake::error::ErrorKind;
use fhirlake::stages::merge::{KEYS, MATCHING};
use fhirlake::topology::RunOptions;

use super::support::{Lake, folder, lake};

/// Patients `ids` at a version, one a line.
fn patients(ids: impl Iterator<Item = u32>, version: u32) -> String {
    ids.map(|id| {
        format!(
            "{{\"resourceType\":\"Patient\",\"id\":\"p{id}\",\"meta\":{{\"versionId\":\"{version}\",\"lastUpdated\":\"2026-01-0{version}T00:00:00Z\"}}}}\n"
        )
    })
    .collect()
}

fn mode(name: &str, rest: &str) -> String {
    format!("stages: {{ merge: {{ mode: {name}{rest} }} }}\n")
}

async fn ids(lake: &Lake) -> Vec<String> {
    lake.versions("Patient").await.into_keys().collect()
}

/// A lake with Patients p0 to p19 at version 2.
async fn twenty() -> Lake {
    let lake = lake();
    let (_data, source) = folder(&[("Patient.ndjson", &patients(0..20, 2))]);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    lake
}

// Breaks if a row that the export names is deleted, or one that it does not name stays.
#[tokio::test(flavor = "multi_thread")]
async fn reconcile_deletes_what_the_export_does_not_name() {
    for (vectors, in_memory) in [(true, true), (false, true), (true, false), (false, false)] {
        let lake = lake();
        let (_data, source) = folder(&[("Patient.ndjson", &patients(0..20, 2))]);
        let setting = format!("stages: {{ merge: {{ deletion_vectors: {vectors} }} }}\n");
        assert!(lake.run(&source, &setting).await.unwrap().succeeded);
        // p0 and p1 are gone; p2 is new as 3; p3 comes older than the table has it; p20 arrives.
        let text = patients(2..3, 3) + &patients(3..4, 1) + &patients(4..21, 2);
        let (_data, source) = folder(&[("Patient.ndjson", &text)]);
        let mut plan = lake.plan(&source, &mode("reconcile", ""));
        if !in_memory {
            plan.memory.set(&KEYS, 0);
            plan.memory.set(&MATCHING, 0);
        }
        let report = lake.run_with(plan, RunOptions::default()).await.unwrap();
        let outcome = &report.types["Patient"];
        assert!(report.succeeded, "{report:#?}");
        assert_eq!((outcome.inserted, outcome.updated, outcome.deleted, outcome.skipped), (1, 1, 2, 17));
        let versions = lake.versions("Patient").await;
        assert_eq!(versions.len(), 19);
        assert!(!versions.contains_key("p0") && !versions.contains_key("p1"));
        assert_eq!((versions["p2"].as_deref(), versions["p3"].as_deref()), (Some("3"), Some("2")));
        // Again: nothing more to do.
        let again = lake.run(&source, &mode("reconcile", "")).await.unwrap();
        assert!(!again.types["Patient"].committed);
    }
}

// Breaks if a server that answers with a fraction of its resources can empty a table.
#[tokio::test(flavor = "multi_thread")]
async fn never_more_than_max_deleted() {
    let lake = twenty().await;
    let (_data, source) = folder(&[
        ("Patient.ndjson", &patients(0..17, 2)),
        ("Device.ndjson", "{\"resourceType\":\"Device\",\"id\":\"d\"}\n"),
    ]);
    for name in ["reconcile", "overwrite"] {
        let report = lake.run(&source, &mode(name, "")).await.unwrap();
        let error = report.types["Patient"].error.as_deref().unwrap();
        assert!(error.contains("3 of the table's 20 rows") && error.contains("max_deleted allows 2"), "{error}");
        assert!(report.types["Device"].error.is_none());
        assert_eq!(ids(&lake).await.len(), 20);
    }
    assert!(lake.run(&source, &mode("reconcile", ", max_deleted: 3")).await.unwrap().succeeded);
    assert_eq!(ids(&lake).await.len(), 17);
}

// Every guard: a bad line, an empty answer.
#[tokio::test(flavor = "multi_thread")]
async fn only_where_the_export_surely_names_all() {
    let lake = twenty().await;
    for (text, why) in
        [(patients(0..19, 2) + "{\n", "1 lines could not be read"), (String::new(), "brings no resource")]
    {
        let (_data, source) = folder(&[("Patient.ndjson", &text)]);
        let report = lake.run(&source, &mode("reconcile", "")).await.unwrap();
        let error = report.types["Patient"].error.as_deref().unwrap();
        assert!(error.contains(why), "{error}");
        assert_eq!(ids(&lake).await.len(), 20);
    }
}

// The server says itself that its export is not whole: nothing may go. Its warnings are no reason.
#[tokio::test(flavor = "multi_thread")]
async fn not_after_errors_of_the_export() {
    let server = DemoServer::start(Population::new(7, 20), 0, 10).await.unwrap();
    let lake = lake();
    let source = format!("{{ url: \"{}\", types: [Patient], since: none }}", server.base());
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    for (severity, refused) in [("error", true), ("warning", false)] {
        let issue = format!(
            "{{\"resourceType\":\"OperationOutcome\",\"issue\":[{{\"severity\":\"{severity}\",\"code\":\"x\"}}]}}\n"
        );
        server.set_faults(Faults { errors: issue.into_bytes(), ..Default::default() });
        let report = lake.run(&source, &mode("reconcile", "")).await.unwrap();
        let error = report.types["Patient"].error.as_deref();
        assert_eq!(error.is_some_and(|error| error.contains("errors of its export")), refused, "{severity}: {error:?}");
    }
}

// Breaks if a row of the table survives an overwrite because it ranks higher.
#[tokio::test(flavor = "multi_thread")]
async fn overwrite_replaces_the_table() {
    let lake = twenty().await;
    let (_data, source) = folder(&[("Patient.ndjson", &patients(1..21, 1))]);
    let report = lake.run(&source, &mode("overwrite", "")).await.unwrap();
    let outcome = &report.types["Patient"];
    assert_eq!((outcome.inserted, outcome.updated, outcome.deleted), (1, 19, 1), "{report:#?}");
    let versions = lake.versions("Patient").await;
    assert_eq!(versions.len(), 20);
    assert!(versions.values().all(|version| version.as_deref() == Some("1")) && !versions.contains_key("p0"));
}

// An incremental run names what changed only: it must not start.
#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_run_cannot_reconcile() {
    let server = DemoServer::start(Population::new(7, 20), 0, 10).await.unwrap();
    let lake = lake();
    let source = format!("{{ url: \"{}\", types: [Patient] }}", server.base());
    let settings = mode("reconcile", "");
    assert!(lake.run(&source, &settings).await.unwrap().succeeded);
    let error = lake.run(&source, &settings).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Config && error.to_string().contains("--full-refresh"), "{error}");
}

// Breaks if a type whose rows come in another's file too is reconciled with a part of them.
#[tokio::test(flavor = "multi_thread")]
async fn rows_in_another_types_file_are_not_absent() {
    for name in ["reconcile", "overwrite"] {
        let lake = twenty().await;
        let stray = r#"{"resourceType":"Observation","id":"o"}"#.to_owned() + "\n" + &patients(20..21, 2);
        let (_data, source) = folder(&[("Patient.ndjson", &patients(0..20, 2)), ("Observation.ndjson", &stray)]);
        let report = lake.run(&source, &mode(name, ", max_deleted: \"100%\"")).await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        assert_eq!(ids(&lake).await.len(), 21, "{name}");
    }
}

// Breaks if lines out of quarantine stand for the export's own, or if they cannot be tried again at all.
#[tokio::test(flavor = "multi_thread")]
async fn lines_in_quarantine_do_not_stand_for_the_export() {
    let lake = twenty().await;
    let text = patients(0..1, 2) + "\n" + r#"{"resourceType":"Patient","id":"q",!}"#;
    let (_data, source) = folder(&[("Patient.ndjson", &text)]);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    for entry in std::fs::read_dir(lake.state().join("quarantine")).unwrap().flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap();
        std::fs::write(entry.path(), text.replace(",!", "")).unwrap();
    }
    let (_empty, nothing) = folder(&[("Patient.ndjson", "")]);
    let all = mode("reconcile", ", max_deleted: \"100%\"");
    let report = lake.run(&nothing, &all).await.unwrap();
    assert!(report.types["Patient"].error.as_ref().is_some_and(|error| error.contains("no resource")), "{report:#?}");
    assert_eq!(ids(&lake).await.len(), 20);
    let retry = fhirlake::topology::RunOptions { replay_only: true, ..Default::default() };
    let report = lake.run_with(lake.plan(&nothing, &all), retry).await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(ids(&lake).await.len(), 21);
}
