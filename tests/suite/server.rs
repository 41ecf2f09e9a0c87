//! Runs against the embedded server, well-behaved and not.

use std::collections::BTreeSet;
use std::time::Duration;

use bulk_data_server::{DEMO_TYPES, DemoServer, Faults, Population};
use fhirlake::error::ErrorKind;
use fhirlake::jobs::checkpoint::CheckpointStore;
use fhirlake::topology::{RunOptions, Watch, run};
use flow::Cancellation;

use super::support::{assert_is, lake, model, until};

const TYPES: [&str; 4] = ["Patient", "Observation", "Immunization", "ExplanationOfBenefit"];

async fn server(patients: u32) -> DemoServer {
    DemoServer::start(Population::new(5, patients), 0, 10).await.unwrap()
}

fn source(server: &DemoServer) -> String {
    format!("{{ url: \"{}\", types: [{}], retry_for: 20s }}", server.base(), TYPES.join(", "))
}

// The main job: breaks if a resource is lost, doubled, stale or not deleted, or if a repeat changes a table.
#[tokio::test(flavor = "multi_thread")]
async fn initial_then_incremental_then_nothing() {
    let (server, lake) = (server(40).await, lake());
    let source = format!("{{ url: \"{}\", types: [{}] }}", server.base(), DEMO_TYPES.join(", "));
    let first = lake.run(&source, "").await.unwrap();
    assert!(first.succeeded && first.full);
    assert_is(&lake, &server.population(), &DEMO_TYPES).await;
    assert!(!server.seen().kickoffs[0].contains_key("_since"));

    server.step(80, 40, 3);
    let second = lake.run(&source, "").await.unwrap();
    assert!(second.succeeded && !second.full);
    assert_is(&lake, &server.population(), &DEMO_TYPES).await;
    let deleted: u64 = second.types.values().map(|outcome| outcome.deleted).sum();
    let inserted: u64 = second.types.values().map(|outcome| outcome.inserted).sum();
    assert!(deleted > 0 && inserted > 0, "{second:#?}");
    let seen = server.seen();
    assert_eq!(seen.kickoffs.len(), 2, "types of one watermark share a kick-off");
    assert_eq!(
        seen.kickoffs[1]["_since"].replace('Z', "+00:00"),
        first.transaction_time.unwrap().replace('Z', "+00:00")
    );
    assert_eq!(seen.deleted, 2, "the server's files are given back after the commit");

    let third = lake.run(&source, "").await.unwrap();
    let moved: u64 = third.types.values().map(|outcome| outcome.inserted + outcome.updated + outcome.deleted).sum();
    assert_eq!(moved, 0, "{third:#?}");
    assert!(third.types.values().all(|outcome| outcome.committed), "a type with nothing new still gets its watermark");
}

// A server's passing troubles must not show in the tables.
#[tokio::test(flavor = "multi_thread")]
async fn unavailable_files_cut_bodies_and_throttling_are_ridden_out() {
    let (server, lake) = (server(40).await, lake());
    server.set_faults(Faults {
        files_unavailable: 3,
        files_cut: 4,
        kickoffs_throttled: 1,
        polls: 2,
        ..Default::default()
    });
    let report = lake.run(&source(&server), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert!(report.retries >= 5, "{}", report.retries);
    assert_is(&lake, &server.population(), &TYPES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gzip_by_header() {
    let (server, lake) = (server(20).await, lake());
    server.set_faults(Faults { gzip: true, files_cut: 1, ..Default::default() });
    assert!(lake.run(&source(&server), "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
}

// A bad file fails its type and not the others, and the next run makes it good.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_file_fails_its_type_alone() {
    let (server, lake) = (server(20).await, lake());
    server.set_faults(Faults { missing_type: Some("Observation".into()), ..Default::default() });
    let report = lake.run(&source(&server), "").await.unwrap();
    assert!(!report.succeeded);
    assert!(report.types["Observation"].error.as_ref().unwrap().contains("404"), "{report:#?}");
    assert!(
        !lake.tables().join("Observation.parquet").exists(),
        "not even an empty folder, which readers would take for a table"
    );
    assert_is(&lake, &server.population(), &["Patient", "Immunization"]).await;
    assert_eq!(server.seen().deleted, 0, "the server's files are kept while a type failed");

    server.set_faults(Faults::default());
    server.step(50, 0, 1);
    let report = lake.run(&source(&server), "").await.unwrap();
    assert!(report.succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
    let seen = server.seen();
    assert_eq!(seen.kickoffs.len(), 2, "the same export goes on, and then what changed since is asked for");
    assert!(seen.kickoffs[1].contains_key("_since"));
    let again = seen.files.iter().filter(|name| name.starts_with("Patient")).count();
    assert!(again <= 3, "files of what was merged are not read again: {:?}", seen.files);
    assert_eq!(seen.deleted, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_lines_are_quarantined_with_their_place_and_too_many_fail_the_type() {
    let (server, lake) = (server(8).await, lake());
    let junk = b"\n{\"resourceType\":\"Patient\"}\nnot json\n\xff\xfe\n{\"resourceType\":\"Nonsense\",\"id\":\"1\"}\n"
        .to_vec();
    server.set_faults(Faults { junk: [("Patient".to_owned(), junk)].into(), ..Default::default() });
    let strict = lake.run(&source(&server), "stages: { parse: { max_bad_lines: 3 } }\n").await.unwrap();
    assert!(strict.types["Patient"].error.as_ref().unwrap().contains("4 bad lines"), "{strict:#?}");
    assert!(!lake.tables().join("Patient.parquet/_delta_log").exists());
    let (there, named) = lake.files("Patient").await;
    assert!(there.is_empty() && named.is_empty(), "staged files of the failed type are removed: {there:?}");

    let report = lake.run(&source(&server), "stages: { parse: { max_bad_lines: 40% } }\n").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(report.types["Patient"].quarantined, 4);
    assert_is(&lake, &server.population(), &TYPES).await;
    let file = lake.state().join("quarantine").join(format!("{}.ndjson", strict.run));
    let kept = std::fs::read_dir(file.parent().unwrap()).unwrap().flatten();
    let kept = kept.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "ndjson"));
    assert_eq!(kept.count(), 1, "a line that comes again is kept once");
    let lines: Vec<serde_json::Value> =
        std::fs::read_to_string(&file).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let places: Vec<_> =
        lines.iter().map(|line| (line["line"].as_u64().unwrap(), line["offset"].as_u64().unwrap())).collect();
    assert_eq!(places, [(2, 1), (3, 28), (4, 37), (5, 40)]);
    assert_eq!(lines[1]["text"], "not json");
    assert_eq!(lines[2]["base64"], "//4=");
    assert!(lines[3]["reason"].as_str().unwrap().contains("resourceType"));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "it holds patient data");
    }
}

// A watermark never moves back: an old export that ends late must not bring deleted rows back.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_older_than_the_tables_is_refused() {
    let (server, lake) = (server(10).await, lake());
    lake.run(&source(&server), "").await.unwrap();
    let old = chrono::Utc::now() - chrono::Duration::days(1);
    server.set_faults(Faults { transaction_time: Some(old), ..Default::default() });
    let report = lake.run(&source(&server), "").await.unwrap();
    assert!(!report.succeeded);
    assert!(report.types["Patient"].error.as_ref().unwrap().contains("older"), "{report:#?}");
    assert_eq!(report.types["Patient"].version, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn deletions_of_unknown_types_and_of_what_is_in_the_output() {
    let (server, lake) = (server(12).await, lake());
    let population = server.population();
    let kept = model(&population, "Patient").into_keys().next().unwrap();
    server.set_faults(Faults {
        also_deleted: vec![format!("Patient/{kept}"), "Condition/unknown".into(), "Immunization/none".into()],
        ..Default::default()
    });
    let report = lake.run(&source(&server), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_is(&lake, &population, &TYPES).await;
    assert!(!lake.tables().join("Condition.parquet/_delta_log").exists(), "a deletion is no reason for a table");
}

#[tokio::test(flavor = "multi_thread")]
async fn group_and_patient_level_and_all_types() {
    let (server, lake) = (server(6).await, lake());
    let group = format!("{{ url: \"{}\", level: group, group: g1, types: [Patient] }}", server.base());
    assert!(lake.run(&group, "").await.unwrap().succeeded);
    let all = super::support::lake();
    let report = all.run(&format!("{{ url: \"{}\", level: patient }}", server.base()), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_is(&all, &server.population(), &DEMO_TYPES).await;
    server.step(100, 100, 1);
    assert!(all.run(&format!("{{ url: \"{}\", level: patient }}", server.base()), "").await.unwrap().succeeded);
    assert!(server.seen().kickoffs[2].contains_key("_since"));
    assert_is(&all, &server.population(), &DEMO_TYPES).await;
}

// The manifest's count is only a promise: a difference is a finding, not a failure.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_count_is_a_finding() {
    let (server, lake) = (server(6).await, lake());
    server.set_faults(Faults { count_off_by: 2, ..Default::default() });
    let report = lake.run(&source(&server), "").await.unwrap();
    assert!(report.succeeded);
    assert_eq!(report.count_findings.len(), TYPES.len());
    assert!(report.count_findings.iter().all(|(_, promised, came)| *promised == came + 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_recipes_state_file_is_used_less_five_minutes() {
    let (server, lake) = (server(6).await, lake());
    lake.run(&source(&server), "").await.unwrap();
    // As if the tables came from the recipe: they are there, without a watermark of ours.
    std::fs::write(lake.state().join("state.json"), r#"{"last_sync_time": "2026-03-01T10:05:00+00:00"}"#).unwrap();
    let mut plan = lake.plan(&source(&server), "");
    plan.name = "another".into();
    lake.run_with(plan, RunOptions::default()).await.unwrap();
    assert_eq!(server.seen().kickoffs[1]["_since"], "2026-03-01T10:00:00Z");
    let state = std::fs::read_to_string(lake.state().join("state.json")).unwrap();
    assert!(state.contains("+00:00") && !state.contains("2026-03-01"), "{state}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_refresh_asks_for_everything() {
    let (server, lake) = (server(6).await, lake());
    lake.run(&source(&server), "").await.unwrap();
    let report = lake
        .run_with(lake.plan(&source(&server), ""), RunOptions { full_refresh: true, ..RunOptions::default() })
        .await
        .unwrap();
    assert!(report.full && report.succeeded);
    assert!(!server.seen().kickoffs[1].contains_key("_since"));
    let updated: u64 = report.types.values().map(|outcome| outcome.updated).sum();
    assert_eq!(updated, 0, "equal rows are left alone even then");
    assert_is(&lake, &server.population(), &TYPES).await;
}

// Breaks if what was deleted between an incremental run and a full refresh stays for ever: a full export does not name
// it, and a later incremental one would not be asked about that time.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_refresh_loses_no_deletions() {
    let (server, lake) = (server(40).await, lake());
    let plan = || lake.plan(&source(&server), "");
    let full = RunOptions { full_refresh: true, ..RunOptions::default() };
    assert!(lake.run(&source(&server), "").await.unwrap().succeeded);
    for round in 0..3 {
        server.step(50, 150, 1);
        assert!(lake.run_with(plan(), full).await.unwrap().succeeded);
        let report = lake.run(&source(&server), "").await.unwrap();
        let deleted: u64 = report.types.values().map(|kept| kept.deleted).sum();
        assert!(report.succeeded && deleted > 0, "{round}: {report:#?}");
        assert_is(&lake, &server.population(), &TYPES).await;
        // And once they are known, they are not asked for again.
        let report = lake.run(&source(&server), "").await.unwrap();
        assert_eq!(
            report.types.values().map(|kept| kept.resources + kept.deleted).sum::<u64>(),
            0,
            "{round}: {report:#?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_runs_of_one_pipeline_exclude_each_other() {
    let (server, lake) = (server(10).await, lake());
    server.set_faults(Faults { polls: 1_000_000, ..Default::default() });
    let source = source(&server);
    let (first, second) = tokio::join!(lake.run(&source, ""), async {
        until("a kick-off", || !server.seen().kickoffs.is_empty()).await;
        let second = lake.run(&source, "").await;
        server.finish_polls();
        second
    });
    assert!(first.unwrap().succeeded);
    assert_eq!(second.unwrap_err().kind(), ErrorKind::Locked);
}

// A stop at any moment: what was committed is whole, the rest is not there.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_leaves_whole_tables_or_none() {
    let server = server(40).await;
    server.set_faults(Faults { slow: Some(Duration::from_millis(15)), polls: 1, ..Default::default() });
    let population = server.population();
    let mut stopped = 0;
    for after in [0, 20, 60, 120, 250, 400, 700] {
        let (lake, stop) = (lake(), Cancellation::default());
        let watch = Watch::default();
        let plan =
            lake.plan(&source(&server), "stages: { download: { concurrency: 1 }, merge: { tables_at_once: 1 } }\n");
        let (outcome, ()) = tokio::join!(run(plan, RunOptions::default(), &watch, &stop), async {
            tokio::time::sleep(Duration::from_millis(after)).await;
            stop.cancel();
        });
        if let Err(error) = outcome {
            assert_eq!(error.kind(), ErrorKind::Interrupted, "{error}");
            stopped += 1;
        }
        let staged = CheckpointStore::of(&lake.state_store()).read().unwrap().unwrap_or_default();
        for name in TYPES {
            let (mut there, named) = lake.files(name).await;
            there.retain(|path| !staged.files.iter().any(|file| file.path == *path && &*file.resource_type == name));
            assert_eq!(there, named, "{name}: files that neither a commit nor the next run knows");
            if lake.tables().join(format!("{name}.parquet/_delta_log")).exists() {
                assert_eq!(lake.versions(name).await, model(&population, name), "{name} after {after} ms");
            }
        }
    }
    assert!(stopped >= 3, "only {stopped} runs were stopped while under way");
}

// Without `types`, a type that has no table yet must not be asked for by its changes only.
#[tokio::test(flavor = "multi_thread")]
async fn without_types_a_type_that_failed_is_exported_in_full() {
    let (server, lake) = (server(10).await, lake());
    let source = format!("{{ url: \"{}\" }}", server.base());
    server.set_faults(Faults { missing_type: Some("Condition".into()), ..Default::default() });
    assert!(!lake.run(&source, "").await.unwrap().succeeded);
    server.set_faults(Faults::default());
    server.step(100, 0, 1);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &DEMO_TYPES).await;
    server.step(100, 0, 0);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    let since: Vec<bool> = server.seen().kickoffs.iter().map(|query| query.contains_key("_since")).collect();
    assert_eq!(since, [false, true, true]);
    assert_is(&lake, &server.population(), &DEMO_TYPES).await;
}

// Breaks if a pipeline that asked for some types gets only the changes of the others once it asks for all.
#[tokio::test(flavor = "multi_thread")]
async fn all_types_after_some_are_exported_in_full() {
    let (server, lake) = (server(10).await, lake());
    assert!(lake.run(&format!("{{ url: \"{}\", types: [Patient] }}", server.base()), "").await.unwrap().succeeded);
    server.step(100, 0, 1);
    let source = format!("{{ url: \"{}\" }}", server.base());
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &DEMO_TYPES).await;
    server.step(100, 0, 0);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    let since: Vec<bool> = server.seen().kickoffs.iter().map(|query| query.contains_key("_since")).collect();
    assert_eq!(since, [false, false, true]);
    assert_is(&lake, &server.population(), &DEMO_TYPES).await;
}

// Breaks if a type that has no table is asked for by its changes only, or if types of one watermark are asked for
// apart.
#[tokio::test(flavor = "multi_thread")]
async fn types_of_one_watermark_share_a_kick_off() {
    let (server, lake) = (server(10).await, lake());
    let source = |types: &str| format!("{{ url: \"{}\", types: [{types}] }}", server.base());
    assert!(lake.run(&source("Patient, Condition"), "").await.unwrap().succeeded);
    server.step(100, 50, 1);
    let report = lake.run(&source("Patient, Condition, Observation, Claim"), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    let requested: BTreeSet<(String, bool)> = server.seen().kickoffs[1..]
        .iter()
        .map(|query| (query["_type"].clone(), query.contains_key("_since")))
        .collect();
    let expected = [("Condition,Patient".to_owned(), true), ("Claim,Observation".to_owned(), false)];
    let sorted = |types: &str| {
        let mut types: Vec<&str> = types.split(',').collect();
        types.sort_unstable();
        types.join(",")
    };
    let requested: BTreeSet<(String, bool)> =
        requested.into_iter().map(|(types, since)| (sorted(&types), since)).collect();
    assert_eq!(requested, expected.into_iter().collect());
    assert_is(&lake, &server.population(), &["Patient", "Condition", "Observation", "Claim"]).await;
}

// Breaks if a type that the server forbids holds the others back, or is passed over in silence.
#[tokio::test(flavor = "multi_thread")]
async fn a_forbidden_type_is_reported_and_set_aside() {
    let (server, lake) = (server(10).await, lake());
    let first = format!("{{ url: \"{}\", types: [Patient] }}", server.base());
    assert!(lake.run(&first, "").await.unwrap().succeeded);
    server.step(300, 0, 1);
    server.set_faults(Faults { forbidden_type: Some("Condition".into()), ..Default::default() });
    let both = format!("{{ url: \"{}\", types: [Patient, Condition] }}", server.base());
    let report = lake.run(&both, "").await.unwrap();
    assert!(!report.succeeded);
    assert!(report.types["Condition"].error.as_ref().unwrap().contains("not for this client"), "{report:#?}");
    assert_is(&lake, &server.population(), &["Patient"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fatal_outcomes_hold_the_watermark_and_warnings_do_not() {
    let (server, lake) = (server(6).await, lake());
    let issue = |severity: &str| {
        format!(
            "{{\"resourceType\":\"OperationOutcome\",\"issue\":[{{\"severity\":\"{severity}\",\"code\":\"exception\"}}]}}\n"
        )
    };
    server.set_faults(Faults { errors: issue("fatal").into_bytes(), ..Default::default() });
    let report = lake.run(&source(&server), "").await.unwrap();
    assert!(!report.succeeded && report.watermark_not_advanced, "{report:#?}");
    assert!(report.types.values().all(|kept| kept.error.is_none() && kept.watermark_hold.is_some()));
    assert_eq!(report.outcome_issues["fatal exception"], 1);
    assert_is(&lake, &server.population(), &TYPES).await;
    server.set_faults(Faults { errors: issue("warning").into_bytes(), ..Default::default() });
    assert!(!lake.run(&source(&server), "").await.unwrap().watermark_not_advanced);
    lake.run(&source(&server), "").await.unwrap();
    let since: Vec<bool> = server.seen().kickoffs.iter().map(|query| query.contains_key("_since")).collect();
    assert_eq!(since, [false, false, true]);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_lines_of_deletion_files_are_held_against_the_types() {
    let (server, lake) = (server(6).await, lake());
    let half = r#"{"resourceType":"Bundle","entry":[{"request":{"method":"DELETE","url":"Immunization/1"}},{"request":{"method":"DELETE"}}]}"#;
    server.set_faults(Faults {
        also_deleted: vec!["Immunization/none".into()],
        junk: [("deleted".to_owned(), format!("rubbish\n{half}\n").into_bytes())].into(),
        ..Default::default()
    });
    let report = lake.run(&source(&server), "stages: { parse: { max_bad_lines: 0 } }\n").await.unwrap();
    assert!(!report.succeeded);
    let report = lake.run(&source(&server), "").await.unwrap();
    // What can be read is applied; what cannot is not tried again out of quarantine, so the watermarks stay.
    assert!(
        !report.succeeded && report.watermark_not_advanced && report.types.values().all(|kept| kept.error.is_none()),
        "{report:#?}"
    );
    // The export that the first run could not use, and the one of what changed since.
    assert_eq!(report.other_bad_lines, 4);
}

// Breaks if a type that only strayed into another's files is taken for one that was synced: its history would never
// come.
#[tokio::test(flavor = "multi_thread")]
async fn a_type_that_only_strayed_in_is_asked_for_as_a_whole_later() {
    let (server, lake) = (server(12).await, lake());
    let of = |types: &str| format!("{{ url: \"{}\", types: [{types}] }}", server.base());
    let stray = b"{\"resourceType\":\"Claim\",\"id\":\"stray\"}\n".to_vec();
    server.set_faults(Faults { junk: [("Patient".to_owned(), stray)].into(), ..Default::default() });
    assert!(lake.run(&of("Patient"), "").await.unwrap().succeeded);
    assert_eq!(lake.ids("Claim").await.len(), 1);
    server.set_faults(Faults::default());
    assert!(lake.run(&of("Patient, Claim"), "").await.unwrap().succeeded);
    let kickoffs = server.seen().kickoffs;
    assert!(
        kickoffs.iter().any(|requested| requested["_type"] == "Claim" && !requested.contains_key("_since")),
        "{kickoffs:?}"
    );
    assert!(lake.ids("Claim").await.len() > 12);
}

// Rows that nobody asked for go into the table that is there, in that table's shape.
#[tokio::test(flavor = "multi_thread")]
async fn stray_rows_take_the_shape_of_an_existing_table() {
    let (server, lake) = (server(4).await, lake());
    let only = |name: &str| format!("{{ url: \"{}\", types: [{name}] }}", server.base());
    lake.run(&only("Coverage"), "stages: { encode: { extensions: false } }\n").await.unwrap();
    let stray = r#"{"resourceType":"Coverage","id":"stray","extension":[{"url":"u","valueCode":"x"}]}"#;
    server.set_faults(Faults {
        junk: [("Patient".to_owned(), format!("{stray}\n").into_bytes())].into(),
        ..Default::default()
    });
    let report = lake.run(&only("Patient"), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(report.types["Coverage"].unmapped["Coverage.extension"], 1);
    assert!(lake.versions("Coverage").await.contains_key("stray"));
}
