//! What people read, as snapshots, so that words are reviewed: errors, `explain`, `status`, and the report of a run.
//! `INSTA_UPDATE=always cargo test --release words` writes them again.

use std::path::Path;
use std::process::Command;

/// Runs fhirlake in `folder`; what it printed, without what differs from run to run.
fn said(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_fhirlake"))
        .args(arguments)
        .args(["--log", "off"])
        .current_dir(folder)
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    let shown = folder.display().to_string();
    let mut lines: Vec<String> = Vec::new();
    for line in text.replace(&shown, "FOLDER").lines() {
        // Ids of runs, times and memory.
        let words = line.split(' ').map(|word| match word {
            word if word.contains("T") && word.contains("Z-") => "RUN".to_owned(),
            word if word.starts_with("20") && word.contains('T') && word.ends_with('Z') => "TIME".to_owned(),
            word => word.to_owned(),
        });
        let line = words.collect::<Vec<_>>().join(" ");
        if line.starts_with("peak memory") || line.starts_with("report:") {
            continue;
        }
        lines.push(line.trim_end().to_owned());
    }
    format!("$ fhirlake {}\n{}\n[exit code {}]\n", arguments.join(" "), lines.join("\n"), output.status.code().unwrap())
}

fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text.replace("FOLDER", &folder.path().display().to_string())).unwrap();
    }
    folder
}

const FOLDER: &str = "version: 1\nname: archive\nsource: { url: \"file://FOLDER/in\" }\ntables: FOLDER/lake\nstages: \
    { download: { concurrency: 1 }, parse: { workers: 1 }, encode: { workers: 1 } }\n";
const SERVER: &str = "version: 1\nname: hospital\nsource: \
    { url: \"http://127.0.0.1:9/fhir\", types: [Patient, Claim], retry_for: 0s }\ntables: FOLDER/lake\nstages: \
    { parse: { workers: 2 }, encode: { workers: 2 } }\nschedule: []\n";

#[test]
fn errors() {
    let wrong =
        "version: 2\nname: x\nsource:\n  url: nonsense\n  level: grup\n  types: [Pateint]\nmemry: 1GiB\ntables: t\n";
    let folder = folder_with(&[
        ("wrong.yaml", wrong),
        ("folder.yaml", FOLDER),
        ("server.yaml", SERVER),
        ("in/notes.txt", "not NDJSON"),
    ]);
    let commands: [&[&str]; 10] = [
        &["run", "missing.yaml"],
        &["run", "wrong.yaml"],
        &["run", "folder.yaml"],
        &["run", "server.yaml"],
        &["jobs", "cancel", "server.yaml", "7"],
        &["quarantine", "dismiss", "folder.yaml", "--all"],
        &["query", "SELECT 1 FROM Patient", "--tables", "lake"],
        &["schema", "Patiente"],
        &["optimize", "folder.yaml", "--types", "Patient"],
        &["run"],
    ];
    insta::assert_snapshot!(commands.map(|arguments| said(folder.path(), arguments)).join("\n"));
}

#[test]
fn explain() {
    let attachments = SERVER.replace("stages: {", "stages: { attachments: { concurrency: 3 },");
    let folder = folder_with(&[("server.yaml", SERVER), ("attachments.yaml", &attachments), ("folder.yaml", FOLDER)]);
    let explained =
        ["server.yaml", "attachments.yaml", "folder.yaml"].map(|file| said(folder.path(), &["explain", file]));
    insta::assert_snapshot!(explained.join("\n"));
}

#[test]
fn reports() {
    let patients = "{\"resourceType\":\"Patient\",\"id\":\"1\",\"contained\":[{\"resourceType\":\"Organization\"}]}\nnot JSON\n{\"resourceType\":\"Patient\",\"id\":\"2\"}\n";
    let folder = folder_with(&[
        ("folder.yaml", FOLDER),
        ("in/Patient.ndjson", patients),
        ("in/Claim.ndjson", "<html>no export file</html>\n"),
        ("in/.hidden.ndjson", "{}"),
    ]);
    let run = said(folder.path(), &["run", "folder.yaml"]);
    // Seconds and rates differ from run to run.
    let numbers = |line: &str| -> String {
        let name =
            line.trim_start_matches("Claim (failed)").trim_start_matches(|letter: char| letter.is_ascii_alphabetic());
        let is_row = name.trim_start().starts_with(|letter: char| letter.is_ascii_digit()) && name.starts_with("  ");
        if is_row { line.split_whitespace().take(8).collect::<Vec<_>>().join(" ") } else { line.to_owned() }
    };
    let run: Vec<String> = run.lines().map(numbers).collect();
    let status = said(folder.path(), &["status", "folder.yaml"]);
    let status: Vec<&str> = status.lines().filter(|line| !line.starts_with("last run")).collect();
    let quarantine = said(folder.path(), &["quarantine", "list", "folder.yaml"]);
    insta::assert_snapshot!(format!("{}\n\n{}\n\n{quarantine}", run.join("\n"), status.join("\n")));
}
