//! Tables that Pathling on Spark and fhirlake write by turns: the Python sync script before, beside and after us.
//!
//! `FHIRLAKE_PATHLING` names a Python with `tests/pathling.txt`, `FHIRLAKE_PATHLING_JARS` its jars and `JAVA_HOME` a
//! Java 21; without them the test is skipped. `.ci/pathling` installs all three.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use bulk_data_server::{DemoServer, Population};
use serde_json::Value;

use super::readers::expect;
use super::support::{Lake, folder_source, lake};

const TYPES: [&str; 3] = ["Patient", "Immunization", "Observation"];

/// A Spark session with Pathling, which is told what to do by its standard input.
struct Pathling {
    process: Child,
    tell: ChildStdin,
    hear: BufReader<ChildStdout>,
}

impl Pathling {
    fn start() -> Option<Self> {
        let Some(python) = std::env::var_os("FHIRLAKE_PATHLING").filter(|python| !python.is_empty()) else {
            #[expect(clippy::disallowed_macros, reason = "a skipped test must be seen")]
            {
                eprintln!(
                    "SKIPPED: FHIRLAKE_PATHLING names no Python with Pathling, so nothing is written by turns with it"
                );
            }
            return None;
        };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/by_turns.py");
        let mut process = Command::new(python)
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (tell, hear) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        let mut started = Self { process, tell, hear };
        assert!(started.answer().get("ready").is_some());
        Some(started)
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        // What a library prints there is not ours.
        while !line.starts_with('{') {
            line.clear();
            assert!(
                self.hear.read_line(&mut line).unwrap() > 0,
                "Spark ended: run tests/by_turns.py by hand to see why"
            );
        }
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, what: &str, extensions: bool, ndjson: &Path, lake: &Lake) -> Value {
        let extensions = if extensions { "on" } else { "off" };
        writeln!(self.tell, "{what}\t{extensions}\t{}\t{}", ndjson.display(), lake.tables().display()).unwrap();
        let answer = self.answer();
        assert!(answer.get("error").is_none(), "{what}: {answer:#}");
        answer
    }

    fn merge(&mut self, extensions: bool, ndjson: &Path, lake: &Lake) {
        self.ask("merge", extensions, ndjson, lake);
    }

    /// The tables are what Pathling makes of these lines, row for row.
    fn agrees(&mut self, extensions: bool, ndjson: &Path, lake: &Lake, what: &str) {
        let answer = self.ask("compare", extensions, ndjson, lake);
        for (name, of) in answer.as_object().unwrap() {
            assert!(of["rows"].as_u64().unwrap() > 0, "{what}: {name} is empty");
            assert_eq!((&of["missing"], &of["extra"]), (&0.into(), &0.into()), "{what}: {name}: {of:#}");
            assert_eq!(of["extensions differ"], false, "{what}: {name}");
        }
    }
}

impl Drop for Pathling {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a run changed, by type: inserted, updated, deleted.
type Changed = Vec<(String, [u64; 3])>;

/// A run as its users make it: `sync` where tables have no extensions, as the script's; else `run`.
async fn ours(server: &DemoServer, lake: &Lake, extensions: bool) -> Changed {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fhirlake"));
    match extensions {
        true => {
            let source = format!("{{ url: \"{}\", types: [{}] }}", server.base(), TYPES.join(", "));
            command.args(["run", "--json"]).arg(lake.pipeline_file(&source));
        }
        false => {
            command.args(["sync", "--json", "--fhir-endpoint", server.base(), "--delta-path"]).arg(lake.tables());
            command.arg("--state-file").arg(lake.state().join("state.json")).arg("--resource-types").args(TYPES);
        }
    }
    let output = tokio::task::block_in_place(|| command.output().unwrap());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let counts = |of: &Value| ["inserted", "updated", "deleted"].map(|name| of[name].as_u64().unwrap());
    let types = report["types"].as_object().unwrap();
    assert_eq!(types.len(), TYPES.len(), "{report:#}");
    types.iter().map(|(name, of)| (name.clone(), counts(of))).collect()
}

fn sum(changed: &Changed) -> [u64; 3] {
    changed.iter().fold([0; 3], |sum, (_, of)| [0, 1, 2].map(|at| sum[at] + of[at]))
}

/// Lines without versions, whose numbers and codes have more than one form that means the same.
fn unversioned() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let values = [
        "25",
        "25.0",
        "0.12345678",
        "1e-7",
        "25e3",
        "1.50",
        "0",
        "-0.0",
        "123456789.987654",
        "1E+2",
        "0.000001",
        "7.25e-3",
        "100",
    ];
    let codes = [
        "mmol/L", "10*12/L", "10*3/uL", "[in_i]", "kg", "%", "mg/dL", "Cel", "/uL", "{score}", "mm[Hg]", "[degF]",
        "mol", "no-unit",
    ];
    let mut observations = String::new();
    for (at, value) in values.iter().enumerate() {
        for (of, code) in codes.iter().enumerate() {
            observations += &format!(
                "{{\"resourceType\":\"Observation\",\"id\":\"o{at}-{of}\",\"status\":\"final\",\"code\":{{\"text\":\"x\"}},\"extension\":[{{\"url\":\"urn:x\",\"valueDecimal\":{value}}}],\"valueQuantity\":{{\"value\":{value},\"system\":\"http://unitsofmeasure.org\",\"code\":\"{code}\"}},\"referenceRange\":[{{\"low\":{{\"value\":{value},\"system\":\"http://unitsofmeasure.org\",\"code\":\"{code}\"}}}}]}}\n"
            );
        }
    }
    let benefit = |(at, value): (usize, &&str)| {
        format!(
            "{{\"resourceType\":\"ExplanationOfBenefit\",\"id\":\"e{at}\",\"payment\":{{\"amount\":{{\"value\":{value},\"currency\":\"USD\"}}}}}}\n"
        )
    };
    let patient = |at: usize| {
        let time = ["2024-02-29T12:00:00Z", "2024-02-29T13:00:00+01:00", "2024-02-29T12:00:00.000Z"][at % 3];
        format!(
            "{{\"resourceType\":\"Patient\",\"id\":\"p{at}\",\"birthDate\":\"19{:02}\",\"deceasedDateTime\":\"{time}\",\"name\":[{{\"family\":\"N{at}\",\"given\":[\"a\",\"b\"]}},{{\"text\":\"é\"}}],\"multipleBirthInteger\":{at}}}\n",
            at % 100
        )
    };
    std::fs::write(folder.path().join("Observation.ndjson"), observations).unwrap();
    std::fs::write(folder.path().join("Patient.ndjson"), (0..50).map(patient).collect::<String>()).unwrap();
    std::fs::write(
        folder.path().join("ExplanationOfBenefit.ndjson"),
        values.iter().enumerate().map(benefit).collect::<String>(),
    )
    .unwrap();
    folder
}

// Breaks if one of both cannot merge into what the other wrote, encodes otherwise, or takes the other's rows for
// changed.
#[tokio::test(flavor = "multi_thread")]
async fn pathling_and_we_write_by_turns() {
    let Some(mut pathling) = Pathling::start() else { return };
    for extensions in [false, true] {
        for pathling_first in [true, false] {
            let what = format!("extensions: {extensions}, Pathling first: {pathling_first}");
            let (server, lake) = (DemoServer::start(Population::new(5, 30), 0, 10).await.unwrap(), lake());
            let expected = expect(&server.population(), &TYPES);
            if pathling_first {
                pathling.merge(extensions, expected.path(), &lake);
                let same = ours(&server, &lake, extensions).await;
                assert_eq!(sum(&same), [0, 0, 0], "{what}: {same:?}");
            } else {
                let [inserted, updated, _] = sum(&ours(&server, &lake, extensions).await);
                assert!(inserted > 500 && updated == 0, "{what}");
            }
            pathling.agrees(extensions, expected.path(), &lake, &format!("{what}, at first"));
            server.step(80, 40, 3);
            let changed = ours(&server, &lake, extensions).await;
            assert!(sum(&changed).iter().all(|count| *count > 0), "{what}: {changed:?}");
            let expected = expect(&server.population(), &TYPES);
            pathling.agrees(extensions, expected.path(), &lake, &format!("{what}, after us"));
            server.step(80, 40, 3);
            // What is deleted is not in the lines that Pathling merges: that is left to us.
            let expected = expect(&server.population(), &TYPES);
            pathling.merge(extensions, expected.path(), &lake);
            let [inserted, updated, deleted] = sum(&ours(&server, &lake, extensions).await);
            assert!(inserted == 0 && updated == 0 && deleted > 0, "{what}: {inserted} {updated} {deleted}");
            pathling.agrees(extensions, expected.path(), &lake, &format!("{what}, by turns"));
        }
    }
    for extensions in [false, true] {
        for pathling_first in [true, false] {
            let what = format!("without versions, extensions: {extensions}, Pathling first: {pathling_first}");
            let (lines, lake) = (unversioned(), lake());
            let settings = format!("stages: {{ encode: {{ extensions: {extensions} }} }}\n");
            // What both write is of one meaning, and not always of one form: 25e36 at scale 38 is 25 at scale 2.
            if !pathling_first {
                assert!(lake.run(&folder_source(lines.path()), &settings).await.unwrap().succeeded);
            }
            pathling.merge(extensions, lines.path(), &lake);
            let report = lake.run(&folder_source(lines.path()), &settings).await.unwrap();
            assert_eq!(report.types.len(), 3, "{what}: {report:#?}");
            for (name, of) in &report.types {
                assert_eq!((of.inserted, of.updated), (0, 0), "{what}: {name}: {of:?}");
            }
        }
    }
}
