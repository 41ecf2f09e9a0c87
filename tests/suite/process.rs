//! The binary as a person runs it.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use bulk_data_server::{DemoServer, Faults, Population};

use super::support::{assert_is, lake, until};
use fhirlake::jobs::ExportJobs;

fn fhirlake(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fhirlake")).args(arguments).env_remove("FHIRLAKE_LOG").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_demo_does_the_main_job() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().display().to_string();
    let output = fhirlake(&["demo", "--patients", "20", "--folder", &folder]);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{err}");
    // One reason for all tables is that reason's exit code.
    let below = fhirlake(&["vacuum", &format!("{folder}/pipeline.yaml"), "--retention", "1h"]);
    assert_eq!(below.status.code(), Some(2), "{}", text(&below.stderr));
    assert!(out.contains("| gender |") && out.contains("female"), "{out}");
    assert!(err.contains("quarantined") && err.contains("peak memory") && err.contains("Try next"), "{err}");
    let pipeline = format!("{folder}/pipeline.yaml");
    let status = fhirlake(&["status", &pipeline]);
    assert!(
        status.status.success() && text(&status.stdout).contains("ExplanationOfBenefit"),
        "{}",
        text(&status.stdout)
    );
    let tables = format!("{folder}/tables");
    let json = fhirlake(&["query", "SELECT count(*) AS n FROM Patient", "--tables", &tables, "--output", "json"]);
    assert_eq!(text(&json.stdout).trim(), "{\"n\":21}");
    let all = fhirlake(&["query", "SELECT * FROM Patient LIMIT 1", &pipeline, "--output", "json"]);
    let row: serde_json::Value = serde_json::from_slice(&all.stdout).unwrap();
    assert!(row["_extension"]["0"][0]["url"].as_str().unwrap().contains("us-core-race"), "{row}");
    let csv = fhirlake(&[
        "query",
        "SELECT id, name, _extension FROM Patient ORDER BY id LIMIT 1",
        &pipeline,
        "--output",
        "csv",
    ]);
    assert!(
        text(&csv.stdout).starts_with("id,name,_extension\n") && text(&csv.stdout).contains("family"),
        "{}",
        text(&csv.stdout)
    );
    let write = fhirlake(&["query", "INSERT INTO Patient (id) VALUES ('x')", "--tables", &tables]);
    assert_eq!(write.status.code(), Some(2), "a question changes nothing");
    let wrong = fhirlake(&["query", "SELECT * FROM Pateint", "--tables", &tables]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(text(&wrong.stderr).contains("tables here:"), "{}", text(&wrong.stderr));
}

// A reader of the log that goes away must not end the run.
#[test]
fn a_closed_pipe_is_no_reason_to_fail() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_fhirlake"))
        .args(["--log", "info", "demo", "--patients", "5", "--folder"])
        .arg(folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn validate_shows_every_problem_and_exits_with_the_code_of_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.yaml");
    std::fs::write(&file, "version: 1\nname: x\nsource: { url: nonsense, typs: [] }\n").unwrap();
    let output = fhirlake(&["validate", &file.display().to_string(), "--offline"]);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("p.yaml:3:26: source.typs: unknown key (did you mean `types`?)"), "{err}");
    assert!(err.contains("tables: required and missing"), "{err}");
    assert!(
        err.contains("p.yaml:3:11: source.url: not a URL"),
        "what only has meaning beyond the schema is said too: {err}"
    );
}

#[test]
fn schema_and_completions() {
    let tree = fhirlake(&["schema", "Patient", "--no-extensions"]);
    let out = text(&tree.stdout);
    assert!(
        out.starts_with("Patient\n  id: string\n  id_versioned: string\n  meta: struct\n") && !out.contains("_fid"),
        "{out}"
    );
    let delta: serde_json::Value =
        serde_json::from_slice(&fhirlake(&["schema", "Patient", "--format", "delta"]).stdout).unwrap();
    assert_eq!(delta["fields"][0]["name"], "id");
    assert_eq!(fhirlake(&["schema", "patient"]).status.code(), Some(2));
    assert!(text(&fhirlake(&["completions", "bash"]).stdout).contains("fhirlake"));
}

#[tokio::test(flavor = "multi_thread")]
async fn sync_takes_the_recipes_flags() {
    let (server, lake) = (DemoServer::start(Population::new(3, 10), 0, 10).await.unwrap(), lake());
    let state = lake.folder.path().join("sync/state.json");
    let run = |more: Vec<String>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fhirlake"));
        command.args(["sync", "--fhir-endpoint", server.base(), "--delta-path"]).arg(lake.tables());
        command.arg("--state-file").arg(&state).args(more);
        tokio::task::block_in_place(|| command.output().unwrap())
    };
    let output = run(vec![]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(server.seen().kickoffs[0]["_type"], "Patient,Condition,Observation,Encounter");
    assert!(std::fs::read_to_string(&state).unwrap().contains("last_sync_time"));
    let output = run(vec!["--resource-types".into(), "Patient".into(), "Procedure".into(), "--full-refresh".into()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(server.seen().kickoffs[1]["_type"], "Patient,Procedure");
    let output = run(vec!["--auth-client-id".into(), "me".into()]);
    assert_eq!(output.status.code(), Some(2), "a client id without a key is an error, not an unauthenticated run");
}

// SIGKILL in the middle; the next run ends in the same tables and leaves no orphan.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_run_is_made_good_by_the_next() {
    let (server, lake) = (DemoServer::start(Population::new(9, 60), 0, 5).await.unwrap(), lake());
    server.set_faults(Faults { slow: Some(Duration::from_millis(100)), ..Default::default() });
    let file = lake.folder.path().join("p.yaml");
    let yaml = format!(
        "version: 1\nname: k\nsource: {{ url: \"{}\", types: [Patient, Observation, Claim] }}\nstages: \
            \
            \
            \
            \
            \
            {{ encode: {{ row_group: 64KiB }}, download: {{ concurrency: 2 }}, merge: {{ checkpoint: 20ms }} }}\ntables: {}\nstate: {}\n",
        server.base(),
        lake.tables().display(),
        lake.state().display()
    );
    std::fs::write(&file, yaml).unwrap();
    for after in [80, 160, 240, 320] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_fhirlake"))
            .arg("run")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // What the server says of a kick-off is lost to a process that is killed before it hears it.
        until("an export", || !lake.state_store().read::<ExportJobs>().unwrap().jobs.is_empty()).await;
        tokio::time::sleep(Duration::from_millis(after)).await;
        child.kill().unwrap();
        child.wait().unwrap();
    }
    server.set_faults(Faults::default());
    let output = tokio::task::block_in_place(|| fhirlake(&["run", &file.display().to_string()]));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_is(&lake, &server.population(), &["Patient", "Observation", "Claim"]).await;
    assert_eq!(server.seen().kickoffs.len(), 1, "the same export goes on");
    for name in ["Patient", "Observation", "Claim"] {
        let (there, named) = lake.files(name).await;
        assert_eq!(there, named, "{name}: orphans");
    }
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_says_what_it_waits_for_and_exits_with_130() {
    let (server, lake) = (DemoServer::start(Population::new(9, 60), 0, 5).await.unwrap(), lake());
    server.set_faults(Faults { polls: 1000, ..Default::default() });
    let mut child = Command::new(env!("CARGO_BIN_EXE_fhirlake"))
        .args(["sync", "--fhir-endpoint", server.base(), "--delta-path"])
        .arg(lake.tables())
        .arg("--state-file")
        .arg(lake.state().join("state.json"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It hears signals before it asks for anything.
    until("a kick-off", || !server.seen().kickoffs.is_empty() || child.try_wait().unwrap().is_some()).await;
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let output = tokio::task::block_in_place(|| child.wait_with_output().unwrap());
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{err}");
    assert!(err.contains("stopping: draining the stages"), "{err}");
}

/// A folder `in` of NDJSON, and the pipeline `x.yaml` of it.
fn one_good_line_and_a_bad_one() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::create_dir(path("in")).unwrap();
    std::fs::write(path("in/Patient.ndjson"), "{\"resourceType\":\"Patient\",\"id\":\"a\"}\n{broken\n").unwrap();
    let yaml = format!("version: 1\nname: x\nsource: {{ url: \"file://{}\" }}\ntables: {}\n", path("in"), path("lake"));
    std::fs::write(path("x.yaml"), yaml).unwrap();
    folder
}

// Breaks if a program cannot read how a run ended: one document on stdout, whatever came of it.
#[test]
fn the_report_as_json() {
    let folder = one_good_line_and_a_bad_one();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let json = |more: &[&str]| {
        let mut arguments = vec!["--log", "off", "run", "--json"];
        let file = path("x.yaml");
        arguments.extend(more);
        arguments.push(&file);
        let output = fhirlake(&arguments);
        (
            serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap(),
            output.status.code(),
            text(&output.stderr),
        )
    };
    let (report, code, err) = json(&[]);
    assert_eq!(
        (&report["succeeded"], &report["types"]["Patient"]["inserted"], code),
        (&true.into(), &1.into(), Some(0))
    );
    assert!(err.is_empty(), "{err}");
    let (report, code, _) = json(&["--set", "stages.parse.max_bad_lines=0"]);
    assert_eq!((&report["succeeded"], code), (&false.into(), Some(10)));
    assert!(report["types"]["Patient"]["error"].as_str().unwrap().contains("bad lines"), "{report}");
    std::fs::remove_dir_all(path("in")).unwrap();
    let (report, code, _) = json(&[]);
    assert_eq!((&report["error"]["kind"], &report["error"]["exit_code"], code), (&"config".into(), &2.into(), Some(2)));
}

// What a run could not read or hold must be found by who reads its last lines.
#[test]
fn a_run_says_where_quarantine_and_report_are() {
    let folder = one_good_line_and_a_bad_one();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let output = fhirlake(&["--log", "off", "run", &path("x.yaml")]);
    let err = text(&output.stderr);
    assert!(output.status.success(), "{err}");
    for (label, expected) in
        [("quarantined lines, each with its place and reason: ", "{broken"), ("report: ", "\"quarantined\": 1")]
    {
        let line = err.lines().find_map(|line| line.strip_prefix(label)).unwrap_or_else(|| panic!("{label}: {err}"));
        let kept = std::fs::read_to_string(line).unwrap();
        assert!(kept.contains(expected), "{line}: {kept}");
    }
}
