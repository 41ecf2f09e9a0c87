//! Lines that could not be read: kept once, tried again by every run, and never against the order.

use bulk_data_server::{DemoServer, Population};
use fhirlake::topology::RunOptions;

use super::support::{Lake, folder, lake};

fn patient(id: &str, version: u32, more: &str) -> String {
    format!(r#"{{"resourceType":"Patient","id":"{id}","meta":{{"versionId":"{version}"}}{more}}}"#)
}

fn kept(lake: &Lake) -> usize {
    lake.state_store().quarantined().count()
}

/// Makes every quarantined line read `new` instead of what it says: as if this version of fhirlake could read it.
fn mend(lake: &Lake, old: &str, new: &str) {
    let entries = std::fs::read_dir(lake.state().join("quarantine")).unwrap().flatten();
    for entry in entries.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "ndjson")) {
        let text = std::fs::read_to_string(entry.path()).unwrap();
        assert!(text.contains(old), "{text}");
        std::fs::write(entry.path(), text.replace(old, new)).unwrap();
    }
}

// Breaks if a bad line is kept once a run, if it holds back what is good, or if one that can be read is forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_is_kept_once_and_tried_until_it_can_be_read() {
    let lake = lake();
    let (_data, source) = folder(&[("Patient.ndjson", &[patient("a", 1, ""), patient("b", 1, ",!")].join("\n"))]);
    for run in 0..3 {
        let report = lake.run(&source, "").await.unwrap();
        assert!(report.succeeded);
        let outcome = &report.types["Patient"];
        assert_eq!((outcome.quarantined, outcome.inserted, report.replayed), (1, u64::from(run == 0), 0));
        assert_eq!(kept(&lake), 1, "the same line is kept once");
    }
    mend(&lake, ",!", r#",\"gender\":\"other\""#);
    let (_data, source) = folder(&[("Patient.ndjson", &patient("c", 1, ""))]);
    let report = lake.run(&source, "").await.unwrap();
    assert_eq!((report.replayed, report.types["Patient"].inserted, report.types["Patient"].quarantined), (1, 2, 0));
    assert_eq!(report.types["Patient"].files, 1, "the quarantine is no file of the export");
    assert_eq!(kept(&lake), 0);
    assert_eq!(lake.ids("Patient").await, ["a", "b", "c"]);
}

// Breaks if a retry, which has no server to download from, is given a stage that needs one.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_where_attachments_are_downloaded() {
    let lake = lake();
    let (_data, source) = folder(&[("Patient.ndjson", &patient("a", 1, ",!"))]);
    assert!(lake.run(&source, "").await.unwrap().types["Patient"].quarantined == 1);
    mend(&lake, ",!", r#",\"gender\":\"other\""#);
    let plan = lake.plan("{ url: \"http://127.0.0.1:9/fhir\" }", "stages: { attachments: { concurrency: 2 } }\n");
    let report = lake.run_with(plan, RunOptions { replay_only: true, ..RunOptions::default() }).await.unwrap();
    assert_eq!((report.replayed, report.types["Patient"].inserted, kept(&lake)), (1, 1, 0), "{report:#?}");
}

// Breaks if a line out of quarantine overwrites what came since.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_superseded_leaves_quarantine_and_changes_nothing() {
    let lake = lake();
    let lines = [
        patient("old", 1, ",!"),
        patient("new", 5, ",!"),
        r#"{"resourceType":"Patient","id":"unordered","language":"x",!}"#.to_owned(),
        r#"{"resourceType":"Patient","id":"unordered-and-new","language":"x",!}"#.to_owned(),
        patient("good", 1, ""),
    ];
    let (_data, source) = folder(&[("Patient.ndjson", &lines.join("\n"))]);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    let since = [
        patient("old", 2, ""),
        patient("new", 2, ""),
        r#"{"resourceType":"Patient","id":"unordered","language":"y"}"#.to_owned(),
    ];
    let (_data, source) = folder(&[("Patient.ndjson", &since.join("\n"))]);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    assert_eq!(kept(&lake), 4);
    mend(&lake, ",!", "");
    let retry = RunOptions { replay_only: true, ..RunOptions::default() };
    let report = lake.run_with(lake.plan(&source, ""), retry).await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    let outcome = &report.types["Patient"];
    assert_eq!((report.replayed, outcome.inserted, outcome.updated, outcome.skipped), (4, 1, 1, 2));
    assert_eq!(kept(&lake), 0);
    let versions = lake.versions("Patient").await;
    assert_eq!((versions["old"].as_deref(), versions["new"].as_deref()), (Some("2"), Some("5")));
    let batches = lake.sql("SELECT language FROM Patient WHERE id = 'unordered'").await;
    assert_eq!(super::support::strings(&batches[0], "language"), [Some("y".to_owned())]);
    // Nothing left to try.
    let report = lake.run_with(lake.plan(&source, ""), retry).await.unwrap();
    assert!(report.succeeded && report.types.is_empty());
}

// Breaks if a line out of quarantine brings back what was deleted since it came.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_since_does_not_come_back() {
    let lake = lake();
    let server = DemoServer::start(Population::new(5, 20), 0, 10).await.unwrap();
    let served = format!("{{ url: \"{}\", types: [Immunization] }}", server.base());
    assert!(lake.run(&served, "").await.unwrap().succeeded);
    let ids = lake.ids("Immunization").await;
    let mut lines: Vec<String> =
        ids.iter().map(|id| patient(id, 99, ",!").replace("Patient", "Immunization")).collect();
    // A file of which nothing can be read is none.
    lines.push(patient(&ids[0], 0, "").replace("Patient", "Immunization"));
    let (_data, source) = folder(&[("Immunization.ndjson", &lines.join("\n"))]);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    assert_eq!(kept(&lake), ids.len());
    server.step(0, 100, 0);
    assert!(lake.run(&served, "").await.unwrap().succeeded);
    let left = lake.ids("Immunization").await;
    assert!(!left.is_empty() && left.len() < ids.len(), "some were deleted: {left:?}");
    let retry = RunOptions { replay_only: true, ..RunOptions::default() };
    // As long as nobody can read them, nobody knows whose they are.
    assert_eq!((lake.run_with(lake.plan(&served, ""), retry).await.unwrap().replayed, kept(&lake)), (0, ids.len()));
    mend(&lake, ",!", "");
    let report = lake.run_with(lake.plan(&served, ""), retry).await.unwrap();
    assert_eq!((report.replayed as usize, kept(&lake)), (left.len(), 0));
    assert_eq!(lake.ids("Immunization").await, left);
    // Its line is no longer there, so its deletion need not be remembered.
    assert!(lake.run(&served, "").await.unwrap().succeeded);
    assert_eq!(std::fs::read_dir(lake.state().join("quarantine")).unwrap().count(), 0);
}

// Breaks if a line of a type that fails is taken out, or one of a type that the pipeline no longer has is tried.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_stays_until_its_type_has_committed() {
    let lake = lake();
    let (_data, source) = folder(&[("Patient.ndjson", &[patient("a", 1, ",!"), patient("z", 1, "")].join("\n"))]);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    mend(&lake, ",!", "");
    let (_data, source) =
        folder(&[("Condition.ndjson", ""), ("Patient.ndjson", &["?".to_owned(), patient("z", 1, "")].join("\n"))]);
    let only = source.replace("}", ", types: [Condition] }");
    assert!(lake.run(&only, "").await.unwrap().succeeded);
    assert_eq!(kept(&lake), 1);
    let report = lake.run(&source, "stages: { parse: { on_bad_line: fail } }\n").await.unwrap();
    assert!(report.types["Patient"].error.is_some());
    assert_eq!(kept(&lake), 2, "the line that could be read stays, since its type failed");
    let report = lake.run(&only.replace("Condition", "Patient"), "").await.unwrap();
    assert_eq!((report.replayed, report.types["Patient"].inserted), (1, 1));
    assert_eq!(kept(&lake), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_are_named_and_dismissed() {
    let lake = lake();
    let text = ["secret one", "secret two", "secret three", &patient("a", 1, "")].join("\n");
    let (_data, source) = folder(&[("Patient.ndjson", &text)]);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    let yaml = lake.pipeline_file(&source);
    let run = |arguments: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_fhirlake"))
            .arg("quarantine")
            .args(arguments)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let yaml = yaml.to_str().unwrap();
    let (code, listed, _) = run(&["list", yaml]);
    assert_eq!(code, Some(0));
    assert!(
        listed.contains("Patient.ndjson:2") && listed.contains("not JSON") && !listed.contains("secret"),
        "{listed}"
    );
    let id = listed.lines().find(|line| line.contains(":2 ")).unwrap().split_whitespace().next().unwrap().to_owned();
    let (_, shown, _) = run(&["show", yaml, &id]);
    assert_eq!(shown, "secret two\n");
    let (code, _, said) = run(&["dismiss", yaml, "ffff0000"]);
    assert_eq!(code, Some(2), "{said}");
    assert_eq!(run(&["dismiss", yaml, &id[..6]]).1, "1 lines dismissed\n");
    assert_eq!(kept(&lake), 2);
    assert_eq!(run(&["dismiss", yaml, "--all"]).1, "2 lines dismissed\n");
    assert_eq!(run(&["list", yaml]).1, "no lines in quarantine\n");
}

// Breaks if a line in quarantine that a disk has damaged is lost without a word.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_entries_are_named() {
    let lake = lake();
    let text =
        [&patient("a", 1, ",!"), &patient("b", 1, ",!"), &patient("z", 1, "")].map(|line| line.as_str()).join("\n");
    let (_data, source) = folder(&[("Patient.ndjson", &text)]);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    let file = std::fs::read_dir(lake.state().join("quarantine")).unwrap().next().unwrap().unwrap().path();
    let damaged = std::fs::read_to_string(&file).unwrap().replacen("\"file\"", "\u{0}file\"", 1);
    std::fs::write(&file, &damaged).unwrap();
    let yaml = lake.pipeline_file(&source).display().to_string();
    for arguments in [&["quarantine", "list", &yaml][..], &["status", &yaml], &["run", &yaml]] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_fhirlake")).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("damaged") && said.contains("quarantine/"), "{said}");
    }
    // The run has met the line again, and kept it again.
    assert_eq!(kept(&lake), 2);
    assert!(std::fs::read_to_string(&file).unwrap().contains("\u{0}file"), "it stays");
    // What `validate` says of the state is what a run would say.
    let validate =
        || std::process::Command::new(env!("CARGO_BIN_EXE_fhirlake")).args(["validate", &yaml]).output().unwrap();
    assert!(validate().status.success());
    std::fs::write(lake.state().join("exports.json"), "garbage").unwrap();
    let output = validate();
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stdout).contains("exports.json"), "{output:?}");
}
