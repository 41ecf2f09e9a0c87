//! Telemetry, as somebody else's receiver gets it: `oteltap` of `tests/readers.txt`, beside the Python that
//! FHIRLAKE_READERS names.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulk_data_server::{DemoServer, Population};
use fhirlake::config::environment;
use serde_json::Value;

use super::support::lake;

fn oteltap() -> Option<PathBuf> {
    let found =
        environment("FHIRLAKE_READERS").map(PathBuf::from).and_then(|python| Some(python.parent()?.join("oteltap")));
    if let Some(found) = found.filter(|path| path.exists()) {
        return Some(found);
    }
    #[expect(clippy::disallowed_macros, reason = "a skipped test must be seen")]
    {
        eprintln!("SKIPPED: no OTLP receiver; FHIRLAKE_READERS names a Python with tests/readers.txt");
    }
    None
}

/// Ends the receiver with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// Breaks if a span, metric or log line does not arrive, if they do not belong together, if the server does not hear of
// the trace, or if anything of a patient is among them.
#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_gets_the_trace_of_a_run_its_metrics_and_its_logs() {
    let Some(oteltap) = oteltap() else { return };
    let (server, lake) = (DemoServer::start(Population::new(3, 12), 0, 6).await.unwrap(), lake());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut tap = Command::new(oteltap)
        .args(["--port", &port.to_string()])
        .env("PYTHONUNBUFFERED", "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(tap.stdout.take().unwrap()).lines();
    let (told, heard) = std::sync::mpsc::sync_channel(4096);
    std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| told.send(line)));
    let _tap = Ended(tap);
    let began = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(began.elapsed() < Duration::from_secs(60), "the receiver does not listen");
        std::thread::sleep(Duration::from_millis(50));
    }
    let file = lake.pipeline_file(&format!("{{ url: \"{}\", types: [Patient, Claim] }}", server.base()));
    let endpoint = format!("telemetry.otlp=http://127.0.0.1:{port}");
    let mut run = Command::new(env!("CARGO_BIN_EXE_fhirlake"));
    let run = run.args(["run", "--log-format", "json", "--set", &endpoint]).arg(&file).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let mut got: Vec<String> = Vec::new();
    // What was sent may take a while to be printed; traces, metrics and logs come one after the other.
    let kinds = ["\"spanId\"", "\"sum\"", "committed"];
    loop {
        let has_all = kinds.iter().all(|kind| got.iter().any(|line| line.contains(kind)));
        match heard.recv_timeout(Duration::from_secs(if has_all { 3 } else { 60 })) {
            Ok(line) => got.push(line),
            Err(_) => break,
        }
    }
    let json: Vec<Value> = got.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let spans: Vec<&Value> =
        json.iter().filter(|value| value["spanId"].is_string() && value["startTimeUnixNano"].is_string()).collect();
    let named = |name: &str| spans.iter().filter(|span| span["name"] == name).count();
    assert_eq!((named("run"), named("export"), named("commit")), (1, 1, 2), "{got:#?}");
    assert!(named("file") >= 3);
    let run_span = spans.iter().find(|span| span["name"] == "run").unwrap();
    let trace = run_span["traceId"].as_str().unwrap();
    assert!(spans.iter().all(|span| span["traceId"] == trace), "one trace");
    assert!(spans.iter().filter(|span| span["name"] != "run").all(|span| span["parentSpanId"] == run_span["spanId"]));
    let metric =
        |name: &str| json.iter().find(|value| value["name"] == name && value["sum"].is_object()).cloned().unwrap();
    let points = metric("fhirlake.resources.parsed")["sum"]["dataPoints"].as_array().unwrap().clone();
    let of_patients = points.iter().find(|point| point["attributes"][1]["value"]["stringValue"] == "Patient").unwrap();
    assert_eq!(
        (&of_patients["asInt"], metric("fhirlake.ndjson.bytes")["unit"].as_str()),
        (&Value::from(12), Some("By"))
    );
    let committed = json.iter().find(|value| value["body"]["stringValue"] == "committed").unwrap();
    assert_eq!(committed["traceId"], trace, "a line of the log belongs to its trace");
    let said = String::from_utf8(run.stderr).unwrap();
    assert!(
        said.lines().any(|line| line.contains("committed") && line.contains(trace)),
        "and so it does in the log itself"
    );
    let seen = server.seen();
    assert!(
        !seen.traces.is_empty() && seen.traces.iter().all(|sent| sent.starts_with(&format!("00-{trace}-"))),
        "{:?}",
        seen.traces
    );
    // Ids and names of the population are in the tables; here they are not.
    let everything = format!("{}{said}", got.join("\n"));
    for id in lake.ids("Patient").await {
        assert!(!everything.contains(&id), "{id}");
    }
    for name in ["family", "given", "birthDate"] {
        assert!(!everything.contains(name), "{name}");
    }
}
