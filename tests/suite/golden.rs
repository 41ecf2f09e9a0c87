//! Against what Pathling itself wrote. Skipped, visibly, where that data is absent.

use delta_upsert::delta_schema;
use fhir_arrow::{EXCLUDED_TYPES, Layout, LayoutOptions, Model, arrow_schema};
use serde_json::Value;

use super::support::{lake, shared, unpack};

/// Field metadata apart, which Spark leaves empty and the kernel writes as it likes.
fn normal(schema: &Value) -> Value {
    match schema {
        Value::Object(members) => members
            .iter()
            .filter(|(key, _)| *key != "metadata")
            .map(|(key, value)| (key.clone(), normal(value)))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        Value::Array(items) => items.iter().map(normal).collect::<Vec<_>>().into(),
        other => other.clone(),
    }
}

// Breaks if a column's name, order or type differs from Pathling's in any of the 142 types.
#[test]
fn schemas_of_all_types_are_pathlings_with_and_without_extensions() {
    let Some(shared) = shared() else { return };
    let golden = unpack(&shared.join("golden/pathling-schemas.tar.gz"));
    let mut compared = 0;
    for (folder, extensions) in [("ext", true), ("noext", false)] {
        for name in Model::r4().resource_types() {
            if EXCLUDED_TYPES.contains(&name.as_str()) {
                continue;
            }
            let path = golden.path().join(format!("schemas/{folder}/{name}.json"));
            let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let theirs: Value = serde_json::from_str(&text).unwrap();
            let layout = Layout::pathling(name, &LayoutOptions { extensions, ..Default::default() }).unwrap();
            let ours = serde_json::to_value(delta_schema(&arrow_schema(&layout)).unwrap()).unwrap();
            let (ours, theirs) = (normal(&ours), normal(&theirs));
            if ours != theirs {
                panic!("{folder}/{name}: {}", difference(&ours, &theirs, String::new()));
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 2 * 142);
}

fn difference(ours: &Value, theirs: &Value, path: String) -> String {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys()) {
                if a.get(key) != b.get(key) {
                    let at = format!("{path}/{key}");
                    return difference(a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null), at);
                }
            }
            path
        }
        (Value::Array(a), Value::Array(b)) => {
            for (index, (x, y)) in a.iter().zip(b).enumerate() {
                if x != y {
                    let name = x.get("name").map(ToString::to_string).unwrap_or_default();
                    return difference(x, y, format!("{path}/{index}{name}"));
                }
            }
            format!("{path}: {} and {} items", a.len(), b.len())
        }
        _ => format!("{path}: ours {ours}, theirs {theirs}"),
    }
}

/// Lines of each NDJSON file of a folder that are not blank.
fn lines(folder: &std::path::Path) -> std::collections::BTreeMap<String, i64> {
    let files = std::fs::read_dir(folder).unwrap().flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?.strip_suffix(".ndjson")?.to_owned();
        let text = std::fs::read_to_string(entry.path()).unwrap();
        Some((name, text.lines().filter(|line| !line.trim().is_empty()).count() as i64))
    });
    files.collect()
}

// Breaks if a resource is lost, or if a second run of the same data changes anything.
#[tokio::test(flavor = "multi_thread")]
async fn synthea_counts_are_those_of_its_files_and_a_second_run_changes_nothing() {
    let Some(shared) = shared() else { return };
    let data = unpack(&shared.join("data/synthea-100.tar.gz"));
    let lake = lake();
    let source = format!("{{ url: \"file://{}\" }}", data.path().display());
    let first = lake.run(&source, "").await.unwrap();
    assert!(first.succeeded, "{first:#?}");
    let expected = lines(data.path());
    assert_eq!(expected.len(), 17);
    for (name, count) in &expected {
        assert_eq!(lake.count(name).await, *count, "{name}");
    }
    let second = lake.run(&source, "").await.unwrap();
    for (name, outcome) in &second.types {
        assert!(!outcome.committed, "{name} was committed again");
        assert_eq!((outcome.inserted, outcome.updated, outcome.version), (0, 0, Some(0)), "{name}");
        assert_eq!(outcome.skipped as i64, expected[name], "{name}");
        let (there, named) = lake.files(name).await;
        assert_eq!(there, named, "{name}: staged files were left behind");
    }
}

// Odd values of all types: none is lost, and what cannot be held is counted.
#[tokio::test(flavor = "multi_thread")]
async fn official_examples_are_all_taken() {
    let Some(shared) = shared() else { return };
    let data = unpack(&shared.join("data/r4-examples.tar.gz"));
    let lake = lake();
    let report = lake.run(&format!("{{ url: \"file://{}\" }}", data.path().display()), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    for (name, count) in lines(data.path()) {
        if EXCLUDED_TYPES.contains(&name.as_str()) {
            assert_eq!(report.excluded[&name] as i64, count, "{name}");
        } else {
            let quarantined = report.types[&name].quarantined as i64;
            assert_eq!(quarantined, 0, "{name}");
            assert_eq!(report.types[&name].resources as i64, count, "{name}");
        }
    }
}
