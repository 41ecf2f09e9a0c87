//! The crash matrix: the real process is killed (SIGKILL) before and after every durable step, and at random moments;
//! started again, it must end in what the server had, with nothing left behind. Needs the cargo feature `fault-points`.
//!
//! `FHIRLAKE_CRASHES=N` makes N random trials instead of a few, and goes to the last time that a step is taken too.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use bulk_data_server::{DemoServer, Faults, Population};
use delta_upsert::Tables;
use fhirlake::jobs::ExportJobs;
use fhirlake::jobs::checkpoint::CheckpointStore;
use fhirlake::state::StateStore;

use super::support::{Lake, assert_is, copy, lake};

const TYPES: [&str; 3] = ["Patient", "Observation", "Claim"];

/// What a command is killed in: its name and arguments.
type Stage = (&'static str, &'static [&'static str]);

const RUN: Stage = ("run", &["run"]);
const FULL: Stage = ("full refresh", &["run", "--full-refresh"]);
const OPTIMIZE: Stage = ("optimize", &["optimize", "--cluster"]);
const VACUUM: Stage = ("vacuum", &["vacuum", "--retention", "0s", "--force", "--delete"]);

/// Points at which an export is under way, whatever their number.
const UNDER_WAY: [&str; 9] = [
    "the manifest is read",
    "a line is quarantined",
    "before the quarantine is synced",
    "before a data file is whole",
    "a data file is whole",
    "keys are saved",
    "before vectors are written",
    "vectors are written",
    "before a commit",
];

struct Bench {
    server: DemoServer,
    lake: Lake,
    file: PathBuf,
    saved: tempfile::TempDir,
    /// A line that nobody can read is there in each export, to be kept once.
    vectors: bool,
}

fn most() -> Option<usize> {
    fhirlake::config::environment("FHIRLAKE_CRASHES").and_then(|text| text.parse().ok())
}

async fn bench(seed: u64, vectors: bool) -> Bench {
    let server = DemoServer::start(Population::new(seed, 24), 0, 4).await.unwrap();
    let junk = [("Patient".to_owned(), b"{\"resourceType\":\"Patient\",\n".to_vec())];
    server.set_faults(Faults { junk: junk.into(), ..Faults::default() });
    let lake = lake();
    let source = format!("{{ url: \"{}\", types: [{}], max_poll_interval: 1s }}", server.base(), TYPES.join(", "));
    let rest = format!(
        "stages: {{ download: {{ concurrency: 2 }}, encode: {{ row_group: 64KiB }}, \
         merge: {{ deletion_vectors: {vectors}, checkpoint: 20ms, checkpoint_size: 4KiB }} }}\n"
    );
    let file = lake.pipeline_file(&source);
    let yaml = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, yaml + &rest).unwrap();
    Bench { server, lake, file, saved: tempfile::tempdir().unwrap(), vectors }
}

impl Bench {
    fn command(&self, stage: Stage) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fhirlake"));
        command.args(stage.1).arg(&self.file).env_remove("FHIRLAKE_LOG").stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }
    fn run(&self, stage: Stage, environment: &[(&str, &str)]) -> Output {
        tokio::task::block_in_place(|| self.command(stage).envs(environment.iter().copied()).output().unwrap())
    }
    /// Runs it to its end, as a scheduler would.
    fn succeed(&self, stage: Stage, when: &str) {
        let output = self.run(stage, &[]);
        assert!(output.status.success(), "{when}: {}: {}", stage.0, String::from_utf8_lossy(&output.stderr));
    }
    fn save(&self) {
        copy(&self.lake.tables(), &self.saved.path().join("tables"));
        copy(&self.lake.state(), &self.saved.path().join("state"));
    }
    fn restore(&self) {
        copy(&self.saved.path().join("tables"), &self.lake.tables());
        copy(&self.saved.path().join("state"), &self.lake.state());
    }
    /// The tables are what the server had; nothing is left of the killed run, but for what vacuum takes.
    async fn check(&self, when: &str) {
        assert_is(&self.lake, &self.server.population(), &TYPES).await;
        let state = StateStore::local(&self.lake.state(), None);
        assert_eq!(state.quarantined().count(), 1, "{when}: the bad line is kept once");
        assert_eq!(state.read::<ExportJobs>().unwrap(), Default::default(), "{when}: exports in flight");
        assert_eq!(state.journal().unfinished().unwrap(), [], "{when}: the journal");
        assert!(
            CheckpointStore::of(&state).read().unwrap().is_none_or(|staged| staged.files.is_empty()),
            "{when}: staged files"
        );
        let scratch = std::fs::read_dir(state.scratch()).map(|entries| entries.count()).unwrap_or(0);
        assert_eq!(scratch, 0, "{when}: scratch");
        self.succeed(VACUUM, when);
        for name in TYPES {
            let (there, named) = self.lake.files(name).await;
            assert_eq!(there, named, "{when}: {name}: files that no version names, or that are missing");
            let table =
                Tables::at(&self.lake.tables().display().to_string()).unwrap().open(&name.into()).await.unwrap();
            let snapshot = table.delta().unwrap().snapshot().unwrap();
            let vectors: BTreeSet<String> = snapshot
                .log_data()
                .iter()
                .filter_map(|file| file.deletion_vector_descriptor())
                .map(|vector| {
                    let encoded = &vector.path_or_inline_dv[vector.path_or_inline_dv.len() - 20..];
                    format!("deletion_vector_{}.bin", uuid::Uuid::from_slice(&z85::decode(encoded).unwrap()).unwrap())
                })
                .collect();
            assert!(self.vectors || vectors.is_empty());
            let folder = self.lake.tables().join(format!("{name}.parquet"));
            let there =
                std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let there: BTreeSet<String> = there.filter(|name| name.ends_with(".bin")).collect();
            assert_eq!(there, vectors, "{when}: {name}: vectors");
        }
    }

    /// Kills `stage` at every point that it comes to, each time from the same start.
    async fn at_every_point(&self, stage: Stage, what: &str) -> usize {
        self.save();
        let seen = self.saved.path().join("seen");
        let _ = std::fs::remove_file(&seen);
        let output = self.run(stage, &[("FHIRLAKE_FAULT_POINTS_SEEN", seen.to_str().unwrap())]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.check(what).await;
        let text = std::fs::read_to_string(&seen).unwrap();
        let mut points: Vec<(String, usize)> = Vec::new();
        for name in text.lines() {
            match points.iter_mut().find(|(known, _)| known == name) {
                Some((_, count)) => *count += 1,
                None => points.push((name.to_owned(), 1)),
            }
        }
        let (mut killed, mut requested) = (0, 0);
        for (name, count) in points {
            // The middle is where some tables have their commit and others do not.
            let numbers = match most() {
                Some(_) => BTreeSet::from([1, count.div_ceil(2), count]),
                None => BTreeSet::from([count.div_ceil(2)]),
            };
            for number in numbers {
                self.restore();
                let when = format!("{what}, killed at `{name}` number {number} of {count}");
                let kickoffs = self.server.seen().kickoffs.len();
                let output = self.run(stage, &[("FHIRLAKE_FAULT_POINT", &format!("{name}:{number}"))]);
                requested += 1;
                // With several workers a point may be come to less often.
                let was_killed = output.status.signal() == Some(9);
                killed += usize::from(was_killed);
                self.succeed(stage, &when);
                self.check(&when).await;
                // Before, nobody can know of the first export; after the last commit, what changed since is asked for.
                if was_killed && UNDER_WAY.contains(&name.as_str()) {
                    let requested = self.server.seen().kickoffs.len() - kickoffs;
                    assert!(requested <= 1, "{when}: {requested} kick-offs");
                }
            }
        }
        assert!(killed * 10 >= requested * 8, "{what}: only {killed} of {requested} points were come to again");
        self.restore();
        self.succeed(stage, what);
        killed
    }

    /// Kills `stage` at random moments, up to three times in a row.
    async fn at_random(&self, stage: Stage, what: &str, trials: usize, random: &mut impl FnMut() -> u64) -> usize {
        self.save();
        let began = Instant::now();
        self.succeed(stage, what);
        let usual = began.elapsed();
        let mut killed = 0;
        for trial in 0..trials {
            self.restore();
            let times = 1 + random() % 3;
            for _ in 0..times {
                let after = usual.mul_f64((random() % 1000) as f64 / 900.0);
                killed += usize::from(self.killed_after(stage, after).signal() == Some(9));
            }
            let when = format!("{what}, random trial {trial}");
            self.succeed(stage, &when);
            self.check(&when).await;
        }
        self.restore();
        self.succeed(stage, what);
        killed
    }

    fn killed_after(&self, stage: Stage, after: Duration) -> ExitStatus {
        tokio::task::block_in_place(|| {
            let mut process = self.command(stage).stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(after);
            process.kill().unwrap();
            process.wait().unwrap()
        })
    }
}

#[expect(clippy::disallowed_macros, reason = "how much was tried belongs into a test's output")]
fn tell(what: &str) {
    eprintln!("{what}");
}

// Breaks if a step is taken before what it rests on is durable, or if what a killed run left is taken for something
// else.
#[tokio::test(flavor = "multi_thread")]
async fn killed_before_and_after_every_durable_step() {
    for vectors in [true, false] {
        let bench = bench(9, vectors).await;
        let mut killed = bench.at_every_point(RUN, "the initial run").await;
        bench.server.step(40, 12, 2);
        killed += bench.at_every_point(RUN, "an incremental run with deletions").await;
        if vectors {
            bench.server.step(20, 5, 1);
            killed += bench.at_every_point(FULL, "a full refresh").await;
        }
        killed += bench.at_every_point(OPTIMIZE, "optimize").await;
        killed += bench.at_every_point(VACUUM, "vacuum").await;
        tell(&format!(
            "deletion vectors {vectors}: killed {killed} times at a point, each time the tables were right afterwards"
        ));
    }
}

// The same for moments that nobody thought of.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random() {
    let trials = most().map_or(4, |most| most.div_ceil(10));
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 11
    };
    let mut killed = 0;
    for vectors in [true, false] {
        let bench = bench(11, vectors).await;
        killed += bench.at_random(RUN, "the initial run", trials, &mut random).await;
        bench.server.step(40, 12, 2);
        killed += bench.at_random(RUN, "an incremental run with deletions", trials, &mut random).await;
        bench.server.step(20, 5, 1);
        killed += bench.at_random(FULL, "a full refresh", trials, &mut random).await;
        killed += bench.at_random(OPTIMIZE, "optimize", trials, &mut random).await;
        killed += bench.at_random(VACUUM, "vacuum", trials, &mut random).await;
    }
    tell(&format!("killed {killed} times at random in {} trials", trials * 10));
}

// Breaks if an export whose types were all merged before the kill is taken for one that answers for every type: a type
// that strayed into its files would get its watermark, and its history would never come.
#[tokio::test(flavor = "multi_thread")]
async fn a_stray_of_an_export_whose_own_types_are_merged_gets_no_watermark() {
    let server = DemoServer::start(Population::new(5, 24), 0, 6).await.unwrap();
    let stray = b"{\"resourceType\":\"Procedure\",\"id\":\"stray\"}\n".to_vec();
    let of = |types: &str| format!("{{ url: \"{}\", types: [{types}] }}", server.base());
    let run = |file: &Path, environment: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fhirlake"));
        command.arg("run").arg(file).envs(environment.iter().copied()).output().unwrap()
    };
    let mut tries = 0;
    let (lake, file) = loop {
        let lake = lake();
        server.set_faults(Faults { junk: [("Patient".to_owned(), stray.clone())].into(), ..Faults::default() });
        let file = lake.pipeline_file(&of("Patient"));
        let yaml = std::fs::read_to_string(&file).unwrap() + "stages: { merge: { tables_at_once: 1 } }\n";
        std::fs::write(&file, yaml).unwrap();
        let output = run(&file, &[("FHIRLAKE_FAULT_POINT", "a table is made:1")]);
        assert_eq!(output.status.signal(), Some(9), "{}", String::from_utf8_lossy(&output.stderr));
        // Both are whole at about the same time, and either may be the first.
        if lake.tables().join("Patient.parquet/_delta_log").exists() {
            break (lake, file);
        }
        tries += 1;
        assert!(tries < 50, "the stray always came first");
    };
    assert!(!lake.tables().join("Procedure.parquet/_delta_log").exists());
    let before = server.seen().kickoffs.len();
    let output = run(&file, &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!((lake.ids("Procedure").await.len(), server.seen().kickoffs.len()), (1, before));
    server.set_faults(Faults::default());
    assert!(lake.run(&of("Patient, Procedure"), "").await.unwrap().succeeded);
    let kickoffs = server.seen().kickoffs;
    assert!(
        kickoffs[before..]
            .iter()
            .any(|requested| requested["_type"] == "Procedure" && !requested.contains_key("_since")),
        "{kickoffs:?}"
    );
}
