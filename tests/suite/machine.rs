//! Faults of the machine: a disk that is full or cannot be written, a clock that is set back, names that do not
//! resolve, memory that is limited. Each ends in a clear error and a run that can simply be repeated.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bulk_data_server::{DemoServer, Faults, Population};
use chrono::{TimeDelta, Utc};

use super::support::{Lake, assert_is, lake};

const TYPES: [&str; 3] = ["Patient", "Observation", "Condition"];

fn fhirlake(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fhirlake"));
    command.args(arguments).env_remove("FHIRLAKE_LOG");
    tokio::task::block_in_place(|| command.output().unwrap())
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn skipped(why: &str) {
    #[expect(clippy::disallowed_macros, reason = "a skipped test must be seen")]
    {
        eprintln!("SKIPPED: {why}");
    }
}

/// A disk of its own, in memory.
struct Disk(PathBuf);

impl Disk {
    fn at(path: &Path, kilobytes: usize) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let options = format!("size={kilobytes}k,mode=700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self(path.to_owned()))
    }
    fn change(&self, options: &str) {
        let changed = Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.0).status().unwrap();
        assert!(changed.success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

async fn server() -> DemoServer {
    DemoServer::start(Population::new(9, 60), 0, 10).await.unwrap()
}

fn file(lake: &Lake, server: &DemoServer, rest: &str) -> String {
    let source = format!("{{ url: \"{}\", types: [{}], retry_for: 1s }}", server.base(), TYPES.join(", "));
    let file = lake.pipeline_file(&source);
    let yaml = std::fs::read_to_string(&file).unwrap() + rest;
    std::fs::write(&file, yaml).unwrap();
    file.display().to_string()
}

// Breaks if a full disk leaves half a table, a message without a cause, or a state that the next run cannot use. From a
// disk on which nothing fits to one on which all does: it is full while files are staged, while a table is committed,
// and while state, journal and report are written.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_at_any_moment() {
    let server = server().await;
    let (mut failed, mut codes) = (0, std::collections::BTreeMap::<i32, usize>::new());
    for kilobytes in [4, 16, 40, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 4096] {
        let lake = lake();
        // Tables and state are on it.
        let Some(disk) = Disk::at(lake.folder.path(), 50_000) else {
            return skipped("no disk can be mounted here, so none is full");
        };
        let file = file(
            &lake,
            &server,
            "stages: { encode: { row_group: 64KiB }, merge: { checkpoint: 20ms, checkpoint_size: 4KiB } }\n",
        );
        let filler = lake.folder.path().join("filler");
        std::fs::write(&filler, vec![1; (50_000 - 8 - kilobytes) << 10]).unwrap();
        let output = fhirlake(&["run", &file]);
        let code = output.status.code().unwrap_or(-1);
        *codes.entry(code).or_default() += 1;
        let words = said(&output);
        if code != 0 {
            failed += 1;
            assert!([6, 8, 10].contains(&code), "{kilobytes} kB: exit code {code}: {words}");
            assert!(words.contains("No space left") && !words.contains("panicked"), "{kilobytes} kB: {words}");
        }
        std::fs::remove_file(&filler).unwrap();
        let output = fhirlake(&["run", &file]);
        assert!(output.status.success(), "{kilobytes} kB, then room: {}", said(&output));
        assert_is(&lake, &server.population(), &TYPES).await;
        for name in TYPES {
            let (there, named) = lake.files(name).await;
            assert_eq!(there, named, "{kilobytes} kB: {name}");
        }
        drop(disk);
    }
    assert!(failed >= 5, "the disk was full {failed} times only");
    skipped(&format!("(not skipped) full disks ended in exit codes {codes:?}"));
}

// Breaks if a full disk ends a run as if somebody had stopped it, because an export that is still waited for is stopped
// with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_while_another_export_is_waited_for() {
    let (server, lake) = (DemoServer::start(Population::new(9, 300), 0, 20).await.unwrap(), lake());
    let Some(disk) = Disk::at(lake.folder.path(), 50_000) else {
        return skipped("no disk can be mounted here, so none is full");
    };
    let of = |types: &str| format!("{{ url: \"{}\", types: [{types}], retry_for: 1s, timeout: 60s }}", server.base());
    assert!(lake.run(&of("Patient"), "").await.unwrap().succeeded);
    // Observation and Claim have no table yet: they are asked for first. Their files come slowly, so that Patient is
    // asked for before the disk is full.
    let slow = Some(std::time::Duration::from_millis(20));
    server.set_faults(Faults { endless_type: Some("Patient".into()), slow, ..Faults::default() });
    let file = lake.pipeline_file(&of("Patient, Observation, Claim"));
    let yaml = std::fs::read_to_string(&file).unwrap()
        + "stages: { encode: { row_group: 64KiB }, merge: { checkpoint: 1h } }\n";
    std::fs::write(&file, yaml).unwrap();
    let file = file.display().to_string();
    let filler = lake.folder.path().join("filler");
    // Room for 96 kB.
    let mut full = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut full, &[1; 4096]).is_ok() {}
    full.set_len(full.metadata().unwrap().len() - (96 << 10)).unwrap();
    drop(full);
    let output = fhirlake(&["run", &file]);
    let words = said(&output);
    assert!(matches!(output.status.code(), Some(6 | 8 | 10)), "{:?}: {words}", output.status);
    assert!(words.contains("No space left"), "{words}");
    assert_eq!(server.seen().kickoffs.len(), 3, "{words}");
    std::fs::remove_file(&filler).unwrap();
    server.set_faults(Faults::default());
    server.finish_polls();
    let output = fhirlake(&["run", &file]);
    assert!(output.status.success(), "{}", said(&output));
    assert_is(&lake, &server.population(), &["Patient", "Observation", "Claim"]).await;
    drop(disk);
}

// Breaks if a disk that cannot be written is found out late, or in a library's words.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_written() {
    let (server, lake) = (server().await, lake());
    let file = file(&lake, &server, "");
    for (folder, code) in [(lake.state(), [8, 6]), (lake.tables(), [10, 6])] {
        let Some(disk) = Disk::at(&folder, 50_000) else {
            return skipped("no disk can be mounted here, so none is read-only");
        };
        disk.change("ro");
        let output = fhirlake(&["run", &file]);
        assert!(code.contains(&output.status.code().unwrap()), "{:?}: {}", output.status, said(&output));
        assert!(said(&output).contains("Read-only file system"), "{}", said(&output));
        disk.change("rw");
        let output = fhirlake(&["run", &file]);
        assert!(output.status.success(), "{}", said(&output));
        assert_is(&lake, &server.population(), &TYPES).await;
        drop(disk);
    }
}

// Breaks if what was written before the clock was set back keeps runs from being made, or rows out.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_was_set_back() {
    let (server, lake) = (server().await, lake());
    let file = file(&lake, &server, "");
    assert!(fhirlake(&["run", &file]).status.success());
    // By today's clock all of that is in the future.
    let ahead = (Utc::now() + TimeDelta::days(30)).to_rfc3339();
    let path = lake.state().join("state.json");
    let mut state: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    state["last_completed"] = ahead.clone().into();
    std::fs::write(&path, state.to_string()).unwrap();
    for folder in ["runs"] {
        for entry in std::fs::read_dir(lake.state().join(folder)).unwrap().flatten() {
            std::fs::rename(entry.path(), entry.path().with_file_name("20991231T235959999Z-ffffff.json")).unwrap();
        }
    }
    server.step(40, 10, 3);
    let output = fhirlake(&["run", &file]);
    assert!(output.status.success(), "{}", said(&output));
    assert_is(&lake, &server.population(), &TYPES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_does_not_resolve() {
    let lake = lake();
    let file = lake.pipeline_file("{ url: \"https://no-such-host.invalid/fhir\", types: [Patient], retry_for: 1s }");
    let output = fhirlake(&["run", &file.display().to_string()]);
    let words = said(&output);
    assert_eq!(output.status.code(), Some(3), "{words}");
    assert!(words.contains("no-such-host.invalid") && words.contains("reachable"), "{words}");
    // The client is a crate of its own: its warnings are in the usual log all the same.
    assert!(words.contains("trying again"), "{words}");
}

/// A control group that gives the processes in it so much memory; how a shell enters it.
fn limited(bytes: u64) -> Option<(PathBuf, String)> {
    static GROUPS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let number = GROUPS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let name = format!("fhirlake-test-{}-{number}", std::process::id());
    for (root, limit) in [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")] {
        let group = Path::new(root).join(&name);
        if std::fs::create_dir(&group).is_ok() {
            if std::fs::write(group.join(limit), bytes.to_string()).is_ok() {
                let enter = format!("echo $$ > {}/cgroup.procs", group.display());
                return Some((group, enter));
            }
            let _ = std::fs::remove_dir(&group);
        }
    }
    None
}

// `memory:` and 250 MB are what a run has: breaks if the kernel has to kill it.
#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_limited() {
    let memory = 64 << 20;
    let Some((group, enter)) = limited(memory + 250_000_000) else {
        return skipped("no control group can be made here, so memory is not limited");
    };
    let server = DemoServer::start(Population::new(9, 1200), 0, 300).await.unwrap();
    let lake = lake();
    let file = file(&lake, &server, "memory: 64MiB\n");
    let script = format!("{enter}; exec \"$0\" \"$@\"");
    for full in [&[][..], &["--full-refresh"]] {
        let mut command = Command::new("bash");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_fhirlake"), "run", &file]).args(full);
        let output = tokio::task::block_in_place(|| command.output().unwrap());
        assert!(output.status.success(), "{:?}: {}", output.status, said(&output));
        server.step(200, 20, 5);
    }
    let peak = ["memory.max_usage_in_bytes", "memory.peak"]
        .iter()
        .find_map(|name| std::fs::read_to_string(group.join(name)).ok());
    skipped(&format!(
        "(not skipped) with {} bytes allowed the group had at most {}",
        memory + 250_000_000,
        peak.unwrap_or_default().trim()
    ));
    let _ = std::fs::remove_dir(&group);
}

/// A list of which the first item has every element that its columns have room for, a few levels deep, and the others
/// none.
fn spreading_line(id: usize, items: usize) -> String {
    let concept = r#"{"id":"a","text":"t","coding":[{"id":"a","system":"s","version":"v","code":"c","display":"d","userSelected":true}]}"#;
    let (money, period) = (r#"{"id":"a","value":1,"currency":"EUR"}"#, r#"{"id":"a","start":"2020","end":"2021"}"#);
    let reference = format!(
        r#"{{"id":"a","reference":"A/1","type":"A","display":"d","identifier":{{"use":"usual","system":"s","value":"v","period":{period},"type":{concept}}}}}"#
    );
    let common = format!(
        r#""id":"a","sequence":1,"revenue":{concept},"category":{concept},"productOrService":{concept},"modifier":[{concept}],"programCode":[{concept}],"unitPrice":{money},"net":{money},"factor":1,"udi":[{reference}],"noteNumber":[1],"adjudication":[{{"category":{concept},"reason":{concept},"amount":{money},"value":1}}]"#
    );
    let detail = format!(r#"{{{common},"subDetail":[{{{common}}}]}}"#);
    let item = format!(
        r#"{{{common},"servicedPeriod":{period},"bodySite":{concept},"subSite":[{concept}],"encounter":[{reference}],"detail":[{detail}]}}"#
    );
    format!("{{\"resourceType\":\"ExplanationOfBenefit\",\"id\":\"e{id}\",\"item\":[{item}{}]}}\n", ",{}".repeat(items))
}

// Breaks if what an item of a list fills, and millions of others leave empty, takes memory for each of them: in one
// line, which is bad then, or in many.
#[tokio::test(flavor = "multi_thread")]
async fn lists_that_spread_do_not_take_more_memory() {
    let memory = 64 << 20;
    let data = tempfile::tempdir().unwrap();
    let few = (0..1500).map(|id| spreading_line(id, 1000)).collect::<String>();
    let lines = few + &spreading_line(2000, 200_000) + &spreading_line(2001, 2_000_000) + &spreading_line(2002, 0);
    std::fs::write(data.path().join("ExplanationOfBenefit.ndjson"), lines).unwrap();
    let lake = lake();
    let file = lake.pipeline_file(&format!("{{ url: \"file://{}\" }}", data.path().display()));
    std::fs::write(&file, std::fs::read_to_string(&file).unwrap() + "memory: 64MiB\n").unwrap();
    let file = file.display().to_string();
    let group = limited(memory + 250_000_000);
    let enter = match &group {
        Some((_, enter)) => format!("{enter}; "),
        None => {
            skipped("no control group can be made here, so memory is not limited");
            String::new()
        }
    };
    let script = format!("{enter}exec \"$0\" \"$@\"");
    let mut command = Command::new("bash");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_fhirlake"), "run", &file]);
    let output = tokio::task::block_in_place(|| command.output().unwrap());
    assert!(output.status.success(), "{:?}: {}", output.status, said(&output));
    assert_eq!(lake.count("ExplanationOfBenefit").await, 1501);
    let reasons: Vec<String> = lake.state_store().quarantined().map(|line| line.unwrap().1.reason).collect();
    assert!(reasons.len() == 2 && reasons.iter().all(|reason| reason.contains("as columns")), "{reasons:?}");
    if let Some((group, _)) = group {
        let _ = std::fs::remove_dir(&group);
    }
}

// A machine so busy that the process hardly runs, and a reader of its log that takes a line now and then: breaks if the
// server's waiting, or a full pipe, costs a row or ends the run.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_is_slow() {
    use std::io::Read;
    use std::os::fd::AsRawFd;
    let (server, lake) = (DemoServer::start(Population::new(9, 300), 0, 300).await.unwrap(), lake());
    let file = file(&lake, &server, "");
    let mut command = Command::new(env!("CARGO_BIN_EXE_fhirlake"));
    command.args(["--log-format", "json", "--log", "trace", "run", &file]).env_remove("FHIRLAKE_LOG");
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let (process, mut log) = (child.id().to_string(), child.stderr.take().unwrap());
    // A pipe of one page, so that it is full all the time.
    #[expect(unsafe_code, reason = "fcntl has no safe form")]
    let size = unsafe { libc::fcntl(log.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) };
    // Where a page is larger, so is the pipe.
    assert!(size >= 4096);
    let signal = |name: &str| Command::new("kill").args([name, &process]).status().unwrap().success();
    let (status, bytes, stops) = tokio::task::block_in_place(|| {
        let slow = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let is_slow = slow.clone();
        let reader = std::thread::spawn(move || {
            let (mut piece, mut bytes) = (vec![0; 1 << 10], 0);
            loop {
                match log.read(&mut piece) {
                    Ok(0) | Err(_) => return bytes,
                    Ok(read) => bytes += read,
                }
                if is_slow.load(std::sync::atomic::Ordering::Relaxed) {
                    std::thread::sleep(std::time::Duration::from_millis(40));
                }
            }
        });
        let mut stops = 0;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if stops < 60 && signal("-STOP") {
                stops += 1;
                std::thread::sleep(std::time::Duration::from_millis(60));
                assert!(signal("-CONT"));
            } else {
                // Slow for long enough to have been a trial.
                slow.store(false, std::sync::atomic::Ordering::Relaxed);
            }
            std::thread::sleep(std::time::Duration::from_millis(15));
        };
        (status, reader.join().unwrap(), stops)
    });
    assert!(status.success(), "{status:?}");
    assert!(bytes > 3 * 4096 && stops > 5, "{bytes} bytes of log and {stops} stops are no trial");
    assert_is(&lake, &server.population(), &TYPES).await;
}
