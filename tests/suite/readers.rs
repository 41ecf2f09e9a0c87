//! Readers that are not ours: every feature that a table of ours may have, read by DuckDB and by Sail, null for null.
//!
//! They are Python packages (`tests/readers.txt`). `FHIRLAKE_READERS` names a Python that has them; without it the test
//! is skipped.

use std::fmt::Write;

use bulk_data_server::{DEMO_TYPES, DemoServer, Population};
use fhirlake::topology::{OptimizeOptions, optimize};
use flow::Cancellation;
use foundation::Limit;

use super::support::{Lake, lake};

/// The Python that has the readers; says so where there is none.
fn python() -> Option<std::ffi::OsString> {
    let python = std::env::var_os("FHIRLAKE_READERS").filter(|python| !python.is_empty());
    if python.is_none() {
        #[expect(clippy::disallowed_macros, reason = "a skipped test must be seen")]
        {
            eprintln!(
                "SKIPPED: FHIRLAKE_READERS names no Python with tests/readers.txt, so no other reader reads our tables"
            );
        }
    }
    python
}

/// Writes what the population holds now, a file a type.
pub(crate) fn expect(population: &Population, types: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in types {
        let kind = DEMO_TYPES.iter().position(|known| known == name).unwrap();
        let mut text = String::new();
        for patient in 0..population.patients() {
            population.for_each(kind, patient, |number, fate| {
                if !fate.deleted {
                    population.write(kind, patient, number, fate, &mut text);
                }
            });
        }
        std::fs::write(folder.path().join(format!("{name}.ndjson")), text).unwrap();
    }
    folder
}

fn check(python: &std::ffi::OsStr, what: &str, lake: &Lake, expected: &tempfile::TempDir) {
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/readers.py");
    let output =
        std::process::Command::new(python).arg(script).arg(expected.path()).arg(lake.tables()).output().unwrap();
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    write!(said, "{}", String::from_utf8_lossy(&output.stderr)).unwrap();
    assert!(output.status.success(), "{what}:\n{said}");
    let rows = said.lines().filter(|line| line.ends_with(" 0 differences")).count();
    assert_eq!(rows, 2 * std::fs::read_dir(expected.path()).unwrap().count(), "both readers, every table: {said}");
}

// Breaks if a file that leaves columns out, a deletion vector, a table without extensions or with columns that were
// added later, or what optimize makes, is read otherwise than it was written.
#[tokio::test(flavor = "multi_thread")]
async fn duckdb_and_sail_read_what_we_write() {
    let Some(python) = python() else { return };
    let types = ["Patient", "Observation", "Condition", "ExplanationOfBenefit"];
    let cases = [
        ("deletion vectors", "", ""),
        ("every column in every file", "stages: { encode: { columns: all } }\n", ""),
        ("filled columns only", "stages: { encode: { columns: filled } }\n", ""),
        ("without deletion vectors", "stages: { merge: { deletion_vectors: false } }\n", ""),
        (
            "vectors turned on later",
            "stages: { merge: { deletion_vectors: false } }\n",
            "stages: { merge: { upgrade_deletion_vectors: true } }\n",
        ),
        ("without extensions", "stages: { encode: { extensions: false } }\n", ""),
        (
            "extensions added later",
            "stages: { encode: { extensions: false } }\n",
            "stages: { merge: { schema_evolution: add-columns } }\n",
        ),
    ];
    for (what, first, later) in cases {
        let server = DemoServer::start(Population::new(5, 30), 0, 10).await.unwrap();
        let lake = lake();
        let source = format!("{{ url: \"{}\", types: [{}] }}", server.base(), types.join(", "));
        assert!(lake.run(&source, first).await.unwrap().succeeded);
        for step in 0..2 {
            server.step(80, 40, 3 + step);
            assert!(lake.run(&source, if later.is_empty() { first } else { later }).await.unwrap().succeeded);
        }
        let expected = expect(&server.population(), &types);
        check(&python, what, &lake, &expected);
        let plan = lake.plan(&source, "");
        for cluster in [false, true] {
            let options = OptimizeOptions { types: Default::default(), cluster, min_deleted: Limit::Count(1) };
            for (name, done) in optimize(&plan, &options, &Cancellation::default()).await.unwrap() {
                done.unwrap_or_else(|error| panic!("{name}: {error}"));
            }
            check(&python, &format!("{what}, optimized, clustered: {cluster}"), &lake, &expected);
        }
    }
}
