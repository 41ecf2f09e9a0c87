//! The rules that a reader relies on, held by reading the source.

use std::path::{Path, PathBuf};

fn sources() -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, out: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                out.push((path.clone(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut out = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut out);
    out
}

/// The first step of a path below `src`: the module.
fn module(path: &Path) -> String {
    let below = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    let first = below.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// Modules that each module may name with `crate::`. What is not in the table may name everything.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("tape", &[]),
    ("unpack", &["error"]),
    // Knows nothing of FHIR or Delta.
    ("fault_points", &[]),
    ("heap", &[]),
    ("flow", &["error", "flow"]),
    ("schema", &["error", "schema", "tape"]),
    ("messages", &["error", "flow", "schema", "tape"]),
    ("private", &["error", "fault_points"]),
    ("export_log", &["error", "private"]),
    ("mirror", &["error", "private"]),
    ("staged", &["error", "fault_points", "fhir", "messages", "mirror", "private"]),
    ("delta", &["delta", "error", "fault_points", "flow", "messages", "private", "schema", "staged"]),
    ("fhir", &["error", "fault_points", "fhir", "flow", "schema", "telemetry", "unpack"]),
    ("state", &["error", "fault_points", "messages", "mirror", "private", "staged", "state"]),
    (
        "stages",
        &[
            "delta",
            "error",
            "export_log",
            "fault_points",
            "fhir",
            "flow",
            "messages",
            "private",
            "schema",
            "staged",
            "tape",
            "telemetry",
            "unpack",
        ],
    ),
    ("config", &["config", "delta", "error", "fhir", "messages", "schema"]),
    ("telemetry", &[]),
    ("demo", &["demo", "error", "flow"]),
];

// Breaks if a module names one that it must not know.
#[test]
fn who_may_import_whom() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let module = module(&path);
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == module) else { continue };
        // Tests at a file's end may use what they like.
        let code = text.split("#[cfg(test)]").next().unwrap();
        for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for named in line.split("crate::").skip(1) {
                let named: String = named.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                if !named.is_empty() && !allowed.contains(&named.as_str()) {
                    wrong.push(format!("{}: {}", path.display(), line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

// Stages meet in `messages`; the ledger, and what is staged, are merge's own books.
#[test]
fn stages_never_import_each_other() {
    for (path, text) in sources().into_iter().filter(|(path, _)| module(path) == "stages") {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        // A room of a stage's own is part of it.
        if path.parent().unwrap().file_name().unwrap() != "stages" {
            continue;
        }
        let code = text.split("#[cfg(test)]").next().unwrap();
        for line in code.lines().filter(|line| line.starts_with("use super::") || line.contains("crate::stages")) {
            let own = ["ledger", "staging", "outcome"];
            let of_merge = name == "merge" || own.contains(&name.as_str());
            let named = line.trim_start_matches("use super::").split("::").next().unwrap();
            assert!(of_merge && own.contains(&named), "{}: {line}", path.display());
        }
    }
}

#[test]
fn no_file_is_longer_than_a_person_reads() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= 520, "{} has {lines} lines: give it two rooms", path.display());
    }
}

// Nothing from outside may end the process: no unwrap or expect before a file's tests.
#[test]
fn no_unwrap_outside_tests() {
    for (path, text) in sources() {
        let code = text.split("#[cfg(test)]").next().unwrap();
        for (number, line) in code.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            assert!(!line.contains(".unwrap()") && !line.contains(".expect("), "{}:{}", path.display(), number + 1);
        }
    }
}
