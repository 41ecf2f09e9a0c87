//! Nothing of a patient is in what people and machines other than the tables' readers see, and what is kept is the
//! user's alone.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use bulk_data_server::{DemoServer, Faults, Population};
use serde_json::Value;

use super::support::lake;

/// Every text of a resource that tells of somebody: names, identifiers, addresses, numbers, dates, notes and ids.
fn telling(json: &Value, key: &str, found: &mut BTreeSet<String>) {
    match json {
        Value::Object(members) => members.iter().for_each(|(key, value)| telling(value, key, found)),
        Value::Array(items) => items.iter().for_each(|item| telling(item, key, found)),
        Value::String(text) => {
            let tells = [
                "family",
                "given",
                "value",
                "line",
                "city",
                "postalCode",
                "birthDate",
                "text",
                "div",
                "id",
                "reference",
                "data",
            ];
            if tells.contains(&key) && text.len() >= 4 {
                found.insert(text.clone());
            }
        }
        _ => {}
    }
}

fn modes(folder: &Path, open: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let meta = entry.metadata().unwrap();
        if meta.permissions().mode() & 0o077 != 0 {
            open.push(format!("{} {:o}", entry.path().display(), meta.permissions().mode() & 0o777));
        }
        if meta.is_dir() {
            modes(&entry.path(), open);
        }
    }
}

// Breaks if a name, an identifier or an id of the population is in a log, a report, an error, a metric or the page, or
// if others can read what is kept, whatever the umask.
#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story: everything that is said of the same patients")]
async fn nothing_of_a_patient_is_told() {
    let server = DemoServer::start(Population::new(31, 40), 0, 10).await.unwrap();
    let population = server.population();
    // Lines that cannot be read have the same people in them, and a refused file speaks of one.
    let mut texts = BTreeSet::new();
    let mut junk = Vec::new();
    for kind in 0..bulk_data_server::DEMO_TYPES.len() {
        for patient in 0..40 {
            population.for_each(kind, patient, |number, fate| {
                let mut line = String::new();
                population.write(kind, patient, number, fate, &mut line);
                telling(&serde_json::from_str(&line).unwrap(), "", &mut texts);
                if kind == 0 && patient % 10 == 0 {
                    let cut = line.trim_end().len() - 1;
                    junk.extend_from_slice(&line.as_bytes()[..cut]);
                    junk.push(b'\n');
                }
            });
        }
    }
    // What is a code or a word of the field as well tells nothing.
    texts.retain(|text| text.len() >= 5 && !["final", "mmol/L", "usual", "phone"].contains(&text.as_str()));
    assert!(texts.len() > 500, "{}", texts.len());
    server.set_faults(Faults { junk: [("Patient".to_owned(), junk)].into(), ..Faults::default() });
    let lake = lake();
    let source = format!(
        "{{ url: \"{}\", types: [Patient, Observation, Condition], export_log: true, retry_for: 1s }}",
        server.base()
    );
    let file = lake.pipeline_file(&source);
    let more = std::fs::read_to_string(&file).unwrap() + "schedule: [{ cron: \"* * * * * *\" }]\n";
    std::fs::write(&file, more).unwrap();
    let file = file.display().to_string();
    let mut said = String::new();
    let mut run = |arguments: &[&str], log: &str| {
        let mut command = Command::new("bash");
        let binary = env!("CARGO_BIN_EXE_fhirlake");
        // As careless a umask as there is.
        command.args(["-c", "umask 000; exec \"$0\" \"$@\"", binary]).args(arguments).env("FHIRLAKE_LOG", log);
        let output = tokio::task::block_in_place(|| command.output().unwrap());
        said.push_str(&String::from_utf8_lossy(&output.stdout));
        said.push_str(&String::from_utf8_lossy(&output.stderr));
        output.status.code()
    };
    assert_eq!(run(&["run", &file, "--log-format", "json"], "info,fhirlake=trace"), Some(0));
    server.step(30, 10, 2);
    assert_eq!(run(&["run", &file, "--log-format", "text", "--json"], "debug"), Some(0));
    server.set_faults(Faults { missing_type: Some("Observation".into()), ..Faults::default() });
    assert_eq!(run(&["run", &file, "--full-refresh"], "info,fhirlake=debug"), Some(10));
    for arguments in [
        &["status", &file][..],
        &["jobs", "list", &file],
        &["quarantine", "list", &file],
        &["validate", &file],
        &["explain", &file],
    ] {
        run(arguments, "debug");
    }
    // What is served, after a run of its own.
    let mut serve = Command::new(env!("CARGO_BIN_EXE_fhirlake"))
        .args(["serve", &file, "--listen", "127.0.0.1:0"])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(serve.stderr.take().unwrap()));
    let address = loop {
        let line = lines.next().unwrap().unwrap();
        if let Some(at) = line.find("http://127.0.0.1:") {
            break line[at..].split_whitespace().next().unwrap().trim_end_matches('/').to_owned();
        }
    };
    let began = std::time::Instant::now();
    let mut seen = String::new();
    // Until it made a run, which fails for want of a type, and read the tables.
    let says = |seen: &str, metric: &str| {
        let mut lines = seen.lines().filter(|line| line.starts_with(metric));
        lines.any(|line| line.rsplit_once(' ').is_some_and(|(_, value)| value != "0"))
    };
    let whole = |seen: &str| {
        says(seen, "fhirlake_runs_total{pipeline=\"test\",outcome=\"failed\"}")
            && says(seen, "fhirlake_table_rows{pipeline=\"test\",resource_type=\"Observation\"}")
    };
    while !whole(&seen) && began.elapsed() < std::time::Duration::from_secs(120) {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        seen.clear();
        for path in ["/", "/status.json", "/metrics", "/health", "/health/test"] {
            seen.push_str(&reqwest::get(format!("{address}{path}")).await.unwrap().text().await.unwrap());
        }
    }
    serve.kill().unwrap();
    serve.wait().unwrap();
    assert!(
        whole(&seen),
        "{}",
        seen.lines().filter(|line| line.starts_with("fhirlake_")).collect::<Vec<_>>().join("\n")
    );
    said.push_str(&seen);
    lines.map_while(Result::ok).for_each(|line| said.push_str(&line));
    for folder in ["runs", "export-logs"] {
        for entry in std::fs::read_dir(lake.state().join(folder)).unwrap().flatten() {
            said.push_str(&std::fs::read_to_string(entry.path()).unwrap());
        }
    }
    for file in ["state.json", "exports.json", "schedule.json", "journal.ndjson"] {
        said.push_str(&std::fs::read_to_string(lake.state().join(file)).unwrap_or_default());
    }
    assert!(said.len() > 20_000, "little was said, so little was looked at: {}", said.len());
    // Five digits of a postal code are in a time or an id by chance: a number is told where it stands alone.
    let is_told = |text: &str| {
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        let beside = |at: Option<u8>| is_number && at.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'.');
        let bytes = said.as_bytes();
        said.match_indices(text).any(|(at, _)| {
            let before = at.checked_sub(1).map(|at| bytes[at]);
            !beside(before) && !beside(bytes.get(at + text.len()).copied())
        })
    };
    let told: Vec<&String> = texts.iter().filter(|text| is_told(text)).collect();
    assert!(
        told.is_empty(),
        "{} of {} texts of patients are told, such as {:?}",
        told.len(),
        texts.len(),
        &told[..told.len().min(8)]
    );
    let mut open = Vec::new();
    modes(lake.folder.path(), &mut open);
    open.retain(|path| !path.contains("/p.yaml"));
    assert!(open.is_empty(), "others can read: {:#?}", &open[..open.len().min(10)]);
}

// Breaks if a process that is made to crash leaves its memory, with rows and secrets, on disk.
#[test]
fn there_is_no_core_dump() {
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new("bash")
        .args([
            "-c",
            "ulimit -c unlimited 2>/dev/null; exec \"$0\" demo --serve --patients 1",
            env!("CARGO_BIN_EXE_fhirlake"),
        ])
        .current_dir(folder.path())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let (limits, process) = (format!("/proc/{}/limits", child.id()), child.id().to_string());
    let limits = || std::fs::read_to_string(&limits).unwrap();
    let none = |limits: &str| {
        let line = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap_or_default().to_owned();
        line.split_whitespace().skip(4).take(2).eq(["0", "0"])
    };
    let began = std::time::Instant::now();
    while !none(&limits()) {
        if began.elapsed().as_secs() >= 60 {
            child.kill().unwrap();
            panic!("{}", limits());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // The limit is set right before the process is made undumpable.
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(Command::new("kill").args(["-ABRT", &process]).status().unwrap().success());
    let status = child.wait().unwrap();
    assert_eq!((status.signal(), status.core_dumped()), (Some(6), false));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
