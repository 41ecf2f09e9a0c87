//! The rules that a reader relies on, held by reading the source.

use std::path::{Path, PathBuf};

/// Rust files below `src` and the crates' `src`, with their text.
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
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut out = Vec::new();
    walk(&root.join("src"), &mut out);
    for entry in std::fs::read_dir(root.join("crates")).unwrap().flatten() {
        walk(&entry.path().join("src"), &mut out);
    }
    out
}

/// The first step of a path below the application's `src`: the module. `None` in a crate.
fn module(path: &Path) -> Option<String> {
    let below = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).ok()?;
    let first = below.components().next().unwrap().as_os_str().to_str().unwrap();
    Some(first.trim_end_matches(".rs").to_owned())
}

/// Modules of the application that each module may name with `crate::`. `fuzzing` may name everything.
/// Cargo holds what the crates may name.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("heap", &[]),
    ("telemetry", &[]),
    ("messages", &["error"]),
    ("export_log", &["state"]),
    ("values", &["config", "values"]),
    ("jobs", &["error", "messages", "state"]),
    ("state", &["error", "messages", "state"]),
    ("stages", &["error", "export_log", "jobs", "messages", "stages", "telemetry", "values"]),
    ("config", &["config", "error", "stages", "values"]),
    (
        "topology",
        &["config", "error", "export_log", "jobs", "messages", "stages", "state", "telemetry", "topology", "values"],
    ),
    ("serve", &["config", "error", "heap", "jobs", "serve", "stages", "state", "telemetry", "topology"]),
    ("cli", &["cli", "config", "error", "jobs", "messages", "serve", "stages", "state", "telemetry", "topology"]),
];

// Breaks if a crate depends on one that it must not know: the four libraries meet in Arrow types and do not know each
// other.
#[test]
fn crates_know_only_what_is_below_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates");
    let allowed: &[(&str, &[&str])] = &[
        ("foundation", &[]),
        ("flow", &["foundation"]),
        ("fhir-arrow", &["foundation"]),
        ("delta-upsert", &["foundation", "flow"]),
        ("bulk-data-client", &["foundation", "flow"]),
        ("bulk-data-server", &["foundation", "flow"]),
    ];
    let crates: Vec<String> =
        std::fs::read_dir(&root).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap()).collect();
    assert_eq!(crates.len(), allowed.len(), "{crates:?}");
    for (name, allowed) in allowed {
        let manifest = std::fs::read_to_string(root.join(name).join("Cargo.toml")).unwrap();
        let dependencies = manifest.split("\n[dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
        for known in crates.iter().filter(|known| dependencies.contains(&format!("\n{known}.workspace"))) {
            assert!(allowed.contains(&known.as_str()), "{name} must not know {known}");
        }
    }
}

// Breaks if the log filter passes over a crate of ours: what it says would be seen by nobody.
#[test]
fn the_log_filter_names_every_crate() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates");
    for entry in std::fs::read_dir(&root).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap().replace('-', "_");
        assert!(fhirlake::telemetry::CRATES.contains(&&*name), "{name}");
    }
    let filter = fhirlake::telemetry::filter_of_crates("error,fhirlake=info,fhirlake::run_failed=off");
    assert!(filter.starts_with("error,fhirlake=info,bulk_data_client=info,"), "{filter}");
    assert!(filter.ends_with(",foundation=info,fhirlake::run_failed=off"), "{filter}");
}

// Breaks if a module names one that it must not know.
#[test]
fn who_may_import_whom() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let Some(module) = module(&path) else { continue };
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

// Stages meet in `messages` and in what they declare. What a stage shares with nobody is in its own folder.
#[test]
fn stages_never_import_each_other() {
    let stages = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/stages");
    for (path, text) in sources() {
        let Ok(below) = path.strip_prefix(&stages) else { continue };
        let first = below.components().next().unwrap().as_os_str().to_str().unwrap();
        let stage = first.trim_end_matches(".rs");
        if stage == "mod" {
            continue;
        }
        let code = text.split("#[cfg(test)]").next().unwrap();
        for line in code.lines().filter(|line| line.contains("crate::stages::")) {
            let named = line.split("crate::stages::").nth(1).unwrap().split([':', '{', ';']).next().unwrap();
            // Types of the stages' own module: what a stage declares.
            let is_declared = named.is_empty() || named.starts_with(|letter: char| letter.is_ascii_uppercase());
            assert!(is_declared || named == stage, "{}: {line}", path.display());
        }
        // `super::` of a stage's own file is the stages' module.
        if below.components().count() == 1 {
            let leaves =
                code.lines().any(|line| line.starts_with("use super::") || line.starts_with("pub use super::"));
            assert!(!leaves, "{} names another stage", path.display());
        }
    }
}

#[test]
fn no_file_is_longer_than_a_person_reads() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= 520, "{} has {lines} lines: give it submodules", path.display());
    }
}

// Nothing from outside may end the process: no unwrap or expect before a file's tests.
#[test]
fn no_unwrap_outside_tests() {
    for (path, text) in sources().into_iter().filter(|(path, _)| path.file_stem().is_none_or(|name| name != "tests")) {
        let code = text.split("#[cfg(test)]").next().unwrap();
        for (number, line) in code.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            assert!(!line.contains(".unwrap()") && !line.contains(".expect("), "{}:{}", path.display(), number + 1);
        }
    }
}

// rustfmt holds the width of code. A comment, or a text that could be broken, is not wider either; JSON and URLs may
// be.
#[test]
fn lines_are_at_most_120_columns_wide() {
    let mut wide = Vec::new();
    for (path, text) in sources() {
        for (number, line) in text.lines().enumerate().filter(|(_, line)| line.chars().count() > 120) {
            let is_data = ["\":", "r#\"", "://", "\\\"", "%2C"].iter().any(|mark| line.contains(mark));
            if line.trim_start().starts_with("//") || !is_data {
                wide.push(format!("{}:{}", path.display(), number + 1));
            }
        }
    }
    assert!(wide.is_empty(), "{}", wide.join("\n"));
}

// A doc comment names the thing or says what it does; a question is not its name.
#[test]
fn doc_comments_begin_with_a_verb_or_a_noun() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let mut before = "";
        for (number, line) in text.lines().enumerate() {
            let line = line.trim_start();
            let comment = line.strip_prefix("/// ").or_else(|| line.strip_prefix("//! "));
            // The first line of a comment, or of a paragraph of one.
            let is_first = !before.starts_with("///") && !before.starts_with("//!") || before.len() == 3;
            let word = comment.filter(|_| is_first).and_then(|comment| comment.split(' ').next()).unwrap_or_default();
            if ["What", "Whether", "How", "Who", "Where", "When"].contains(&word.trim_end_matches('.')) {
                wrong.push(format!("{}:{}: {line}", path.display(), number + 1));
            }
            before = line.trim_end();
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
