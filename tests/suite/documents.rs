//! Every pipeline file and every YAML block that we show is valid, and the committed schema is the structs'.

use std::path::Path;

use fhirlake::config::{PipelineFile, Problem, pipeline_json_schema, read_pipeline};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn check(name: &str, text: &str) {
    if let Err(problems) = read_pipeline(text, &[]) {
        panic!("{}", Problem::error(name, &problems));
    }
}

#[test]
fn pipelines_are_valid() {
    let mut checked = 0;
    for entry in std::fs::read_dir(root().join("pipelines")).unwrap().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|ext| ext == "yaml") {
            check(&path.display().to_string(), &std::fs::read_to_string(&path).unwrap());
            checked += 1;
        }
    }
    assert!(checked >= 4);
}

// A full pipeline in a document: blocks marked `yaml` that begin with `version:`.
#[test]
fn yaml_blocks_of_the_documents_are_valid() {
    let mut checked = 0;
    let folders = ["docs", "docs/how-to"].map(|name| std::fs::read_dir(root().join(name)).unwrap().flatten());
    let pages = folders
        .into_iter()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "md"));
    for path in pages.chain([root().join("README.md")]) {
        let text = std::fs::read_to_string(&path).unwrap();
        for block in text.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()) {
            if block.starts_with("version:") {
                check(&path.display().to_string(), block);
                checked += 1;
            }
        }
    }
    assert!(checked >= 8);
}

// Breaks if a key is added without a place in the full example, or a default differs from what it says there.
#[test]
fn the_full_pipeline_names_every_key_at_its_default() {
    let text = std::fs::read_to_string(root().join("pipelines/full.yaml")).unwrap();
    let full = read_pipeline(&text, &[]).unwrap().file;
    let minimal = format!(
        "version: 1\nname: {}\nsource: {{ url: {} }}\ntables: {}\n",
        full.name, full.source.url.0, full.tables.0
    );
    let defaults = read_pipeline(&minimal, &[]).unwrap().file;
    let (full_json, mut expected) = (serde_json::to_value(&full).unwrap(), serde_json::to_value(&defaults).unwrap());
    // Keys without a default, which the example shows a value for.
    let shown: PipelineFile = full.clone();
    let mut shown = serde_json::to_value(shown).unwrap();
    for path in [
        "source/auth",
        "source/types",
        "source/group",
        "source/level",
        "source/until",
        "source/organize_output_by",
        "source/output_format",
        "state",
        "schedule",
        "telemetry",
        "stages/parse/max_bad_lines",
        "stages/parse/max_line",
        "vacuum/retention",
    ] {
        let pointer = format!("/{path}");
        let value = shown.pointer_mut(&pointer).unwrap_or_else(|| panic!("{path} is not shown")).take();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        let parent = if parent.is_empty() { &mut expected } else { expected.pointer_mut(parent).unwrap() };
        parent[key] = value;
    }
    assert_eq!(full_json, expected);
    let schema = pipeline_json_schema();
    for (definition, properties) in schema["$defs"]
        .as_object()
        .unwrap()
        .iter()
        .filter_map(|(name, def)| Some((name, def["properties"].as_object()?)))
    {
        for key in properties.keys() {
            assert!(text.contains(&format!("{key}:")), "pipelines/full.yaml does not name `{key}` of {definition}");
        }
    }
}

// Editors complete from the committed file: FHIRLAKE_UPDATE=1 writes it anew.
#[test]
fn the_committed_json_schema_is_the_structs() {
    let path = root().join("pipelines/pipeline.schema.json");
    let now = format!("{:#}\n", pipeline_json_schema());
    if fhirlake::config::environment("FHIRLAKE_UPDATE").is_some() {
        std::fs::write(&path, &now).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(committed == now, "run `FHIRLAKE_UPDATE=1 cargo test --release committed_json_schema` and commit the file");
}
