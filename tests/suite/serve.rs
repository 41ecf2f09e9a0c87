//! `fhirlake serve`: schedules, health, metrics, the page, and who may see them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bulk_data_server::{DemoServer, Faults, Population};
use chrono::{TimeDelta, Utc};
use fhirlake::jobs::ExportJobs;
use fhirlake::serve::{PipelineScheduler, WebSettings, serve};
use fhirlake::state::{ScheduleTimes, StateStore};
use fhirlake::telemetry::{METRICS, Telemetry};
use fhirlake::topology::RunPlan;
use flow::Cancellation;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::support::{Lake, assert_is, lake, until};

const TYPES: [&str; 2] = ["Patient", "Claim"];

/// A service under test.
struct Service {
    address: SocketAddr,
    stop: Cancellation,
    ended: tokio::task::JoinHandle<fhirlake::error::Result<()>>,
}

/// A keeper of a plan that is in no file.
fn keeper(plan: RunPlan) -> fhirlake::error::Result<PipelineScheduler> {
    PipelineScheduler::new("/nowhere".into(), Arc::new(move || Ok(plan.clone())))
}

async fn start(plans: Vec<RunPlan>, token: Option<&str>) -> Service {
    start_with(plans.into_iter().map(|plan| keeper(plan).unwrap()).collect(), token).await
}

async fn start_with(keepers: Vec<PipelineScheduler>, token: Option<&str>) -> Service {
    let stop = Cancellation::default();
    let hosts = vec!["lake.example".to_owned()];
    let settings = WebSettings {
        listen: "127.0.0.1:0".parse().unwrap(),
        hosts,
        token: token.map(|token| token.to_owned().into()),
    };
    let (said, heard) = tokio::sync::oneshot::channel();
    let own = stop.clone();
    #[expect(clippy::disallowed_methods, reason = "the test's own task")]
    let ended = tokio::spawn(async move {
        serve(keepers, settings, own, &Telemetry::default(), |address| said.send(address).unwrap()).await
    });
    Service { address: heard.await.unwrap(), stop, ended }
}

impl Service {
    async fn get(&self, path: &str) -> (u16, String) {
        let answer = reqwest::get(format!("http://{}{path}", self.address)).await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }
    async fn status(&self) -> Value {
        serde_json::from_str(&self.get("/status.json").await.1).unwrap()
    }
    /// Asks until the answer is as it should be.
    async fn until(&self, is_so: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let status = self.status().await;
            if is_so(&status) {
                return status;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{status:#}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    async fn end(self) {
        self.stop.cancel();
        self.ended.await.unwrap().unwrap();
    }
}

async fn demo() -> DemoServer {
    DemoServer::start(Population::new(9, 30), 0, 10).await.unwrap()
}

fn plan(lake: &Lake, server: &DemoServer, rest: &str) -> RunPlan {
    lake.plan(&format!("{{ url: \"{}\", types: [Patient, Claim], retry_for: 1s }}", server.base()), rest)
}

fn runs(status: &Value) -> usize {
    status["pipelines"][0]["runs"].as_array().unwrap().len()
}

// Breaks if what is due is not run, runs overlap, or what the page, health and metrics say is not so.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_is_run_and_can_be_watched() {
    let (server, lake) = (demo().await, lake());
    let service = start(vec![plan(&lake, &server, "schedule: [{ cron: \"* * * * * *\" }]\n")], None).await;
    assert_eq!(service.get("/ready").await.0, 200);
    let status = service.until(|status| runs(status) >= 2).await;
    let pipeline = &status["pipelines"][0];
    assert_eq!(pipeline["health"]["status"], "healthy");
    assert!(pipeline["runs"].as_array().unwrap().iter().all(|run| run["succeeded"] == true), "{pipeline:#}");
    assert_eq!(pipeline["tables"][0]["name"], "Claim");
    assert!(
        pipeline["tables"][1]["rows"].as_u64().unwrap() >= 30
            && pipeline["tables"][1]["lag_seconds"].as_i64().unwrap() < 60
    );
    let (code, health) = service.get("/health").await;
    let health: Value = serde_json::from_str(&health).unwrap();
    assert_eq!(
        (code, health["status"].as_str(), health.as_object().unwrap().len()),
        (200, Some("healthy"), 2),
        "as the recipe's"
    );
    assert!(chrono::DateTime::parse_from_rfc3339(health["last_sync"].as_str().unwrap()).is_ok());
    assert_eq!((service.get("/health/test").await.0, service.get("/health/other").await.0), (200, 404));
    let (_, metrics) = service.get("/metrics").await;
    for (name, labels) in [
        ("fhirlake_runs_total", "{pipeline=\"test\",outcome=\"succeeded\"}"),
        ("fhirlake_table_rows", "{pipeline=\"test\",resource_type=\"Patient\"} 30"),
        ("fhirlake_resources_merged_total", "{pipeline=\"test\",resource_type=\"Patient\",outcome=\"inserted\"} 30"),
        ("fhirlake_ndjson_bytes_total", "{pipeline=\"test\",resource_type=\"Patient\"}"),
        ("fhirlake_pipeline_healthy", "{pipeline=\"test\"} 1"),
    ] {
        assert!(metrics.contains(&format!("{name}{labels}")), "{name} {labels}: {metrics}");
    }
    // Each line is a comment or a sample of a metric that there is.
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        assert!(METRICS.iter().any(|metric| metric.prometheus() == name), "{line}");
        assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
    }
    server.step(200, 100, 5);
    let so_far = runs(&service.status().await);
    service.until(|status| runs(status) >= so_far + 2).await;
    let (code, page) = service.get("/").await;
    assert!(
        code == 200 && page.contains("<h2 id=\"p0\">test</h2>") && page.contains("Patient") && page.contains("healthy"),
        "{page}"
    );
    service.end().await;
    assert_is(&lake, &server.population(), &TYPES).await;
}

// A run that was missed is made up for once; one that fails is made again; what fails is shown with its hint.
#[tokio::test(flavor = "multi_thread")]
async fn missed_runs_are_made_up_for_once_and_failed_ones_made_again() {
    let (server, lake) = (demo().await, lake());
    // Seldom enough that none is due while the test runs.
    let yearly =
        "schedule: [{ cron: \"0 0 1 1 *\" }, { cron: \"0 0 2 1 *\", full_refresh: true, time_zone: Europe/Berlin }]\n";
    let state = StateStore::local(&lake.state(), None);
    let long_ago = Utc::now() - TimeDelta::days(3000);
    let names: Vec<String> = plan(&lake, &server, yearly).schedules.into_iter().map(|schedule| schedule.name).collect();
    state.write::<ScheduleTimes>(&names.iter().map(|name| (name.clone(), long_ago)).collect()).unwrap();
    let service = start(vec![plan(&lake, &server, yearly)], None).await;
    let status = service.until(|status| runs(status) >= 1 && status["pipelines"][0]["running"].is_null()).await;
    assert_eq!(status["pipelines"][0]["runs"][0]["full"], true, "one run for both, that asks for everything");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(runs(&service.status().await), 1, "eight years of them were missed, and one is made");
    assert!(service.get("/metrics").await.1.contains("fhirlake_runs_missed_total{pipeline=\"test\"} 1"));
    let times: BTreeMap<_, _> = state.read::<ScheduleTimes>().unwrap().times;
    assert!(times.len() == 2 && times.values().all(|time| *time > long_ago));
    service.end().await;

    let lake = super::support::lake();
    server.set_faults(Faults { export_fails: true, ..Faults::default() });
    let again = "schedule: [{ cron: \"0 0 1 1 *\", retries: 1, retry_delay: 1s }]\nhealth: { max_age: 1s }\n";
    let state = StateStore::local(&lake.state(), None);
    let name = plan(&lake, &server, again).schedules[0].name.clone();
    state.write(&ScheduleTimes::from_iter([(name, Utc::now() - TimeDelta::days(400))])).unwrap();
    let service = start(vec![plan(&lake, &server, again)], None).await;
    let status = service.until(|status| runs(status) >= 1).await;
    let failed = &status["pipelines"][0]["runs"][0];
    assert!(
        failed["errors"][0].as_str().unwrap().contains("the export failed") && failed["hint"].is_string(),
        "{failed:#}"
    );
    assert_eq!(service.get("/health").await, (503, "{\"status\":\"unhealthy\",\"last_sync\":null}".to_owned()));
    assert!(service.get("/").await.1.contains("Last errors"));
    server.set_faults(Faults::default());
    service.until(|status| runs(status) >= 2).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let status = service.status().await;
    assert_eq!(
        (runs(&status), &status["pipelines"][0]["runs"][0]["succeeded"]),
        (2, &Value::Bool(true)),
        "made again, and no more"
    );
    assert_eq!(service.get("/health").await.0, 503, "it was more than a second ago");
    std::fs::write(lake.state().join("state.json"), "{").unwrap();
    let (code, body) = service.get("/health").await;
    assert!(code == 503 && body.contains("\"status\":\"error\"") && body.contains("message"), "{body}");
    service.end().await;
}

// Breaks if a pipeline that waits to make a run again does nothing else: what comes due meanwhile, and a file that is
// corrected.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_to_be_made_again_holds_up_nothing() {
    let (server, lake) = (demo().await, lake());
    server.set_faults(Faults { export_fails: true, ..Faults::default() });
    let yearly = "{ cron: \"0 0 1 1 *\", full_refresh: true, retries: 1, retry_delay: 1h }";
    let (before, after) =
        (format!("schedule: [{yearly}]\n"), format!("schedule: [{yearly}, {{ cron: \"* * * * * *\", retries: 0 }}]\n"));
    let (before, after) = (plan(&lake, &server, &before), plan(&lake, &server, &after));
    let state = lake.state_store();
    let name = before.schedules[0].name.clone();
    state.write(&ScheduleTimes::from_iter([(name.clone(), Utc::now() - TimeDelta::days(400))])).unwrap();
    let file = lake.folder.path().join("schedule");
    std::fs::write(&file, "").unwrap();
    let read = {
        let file = file.clone();
        Arc::new(move || Ok(if std::fs::read(&file).unwrap().is_empty() { before.clone() } else { after.clone() }))
    };
    let service = start_with(vec![PipelineScheduler::new(file.clone(), read).unwrap()], None).await;
    let status = service.until(|status| status["pipelines"][0]["again"].is_string()).await;
    let again = status["pipelines"][0]["again"].clone();
    server.set_faults(Faults::default());
    std::fs::write(&file, "corrected").unwrap();
    let status =
        service.until(|status| runs(status) >= 3 && status["pipelines"][0]["runs"][0]["succeeded"] == true).await;
    assert_eq!(status["pipelines"][0]["again"], again, "the full run waits on");
    assert!(
        state.read::<ScheduleTimes>().unwrap().times[&name] < Utc::now() - TimeDelta::days(300),
        "it was not made yet"
    );
    service.end().await;
}

// Breaks if a full run that failed is forgotten, if a schedule is only known once it had a run, or if a file that
// changes while nothing is due is not seen.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_run_is_owed_until_it_is_made() {
    let (server, lake) = (demo().await, lake());
    let both =
        "schedule: [{ cron: \"* * * * * *\", retries: 0 }, { cron: \"0 0 1 1 *\", full_refresh: true, retries: 0 }]\n";
    let state = StateStore::local(&lake.state(), None);
    let names: Vec<String> = plan(&lake, &server, both).schedules.into_iter().map(|schedule| schedule.name).collect();
    let long_ago = Utc::now() - TimeDelta::days(400);
    state.write(&ScheduleTimes::from_iter([(names[0].clone(), Utc::now()), (names[1].clone(), long_ago)])).unwrap();
    // Another holds the pipeline when it is due.
    let lock = state.acquire_lease().unwrap();
    let service = start(vec![plan(&lake, &server, both)], None).await;
    let began = Instant::now();
    while !service.get("/metrics").await.1.contains("fhirlake_runs_total{pipeline=\"test\",outcome=\"locked\"} 2") {
        assert!(began.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(state.read::<ScheduleTimes>().unwrap().times[&names[1]], long_ago, "it is owed");
    drop(lock);
    service.until(|status| status["pipelines"][0]["runs"][0]["succeeded"] == true).await;
    let made = service.status().await["pipelines"][0]["runs"].as_array().unwrap().clone();
    let first = made.iter().rev().find(|run| run["succeeded"] == true).unwrap();
    assert_eq!(first["full"], true, "{made:#?}");
    service.until(|status| status["pipelines"][0]["runs"][0]["full"] == false).await;
    assert!(state.read::<ScheduleTimes>().unwrap().times[&names[1]] > long_ago);
    service.end().await;

    // A new schedule counts from when it was first seen; one that is gone is an error, and what was stands.
    let lake = super::support::lake();
    let yearly = "schedule: [{ cron: \"0 0 1 1 *\" }]\n";
    let file = lake.folder.path().join("p.yaml");
    std::fs::write(&file, yearly).unwrap();
    let read = {
        let (file, without, soon) = (file.clone(), plan(&lake, &server, ""), plan(&lake, &server, both));
        let yearly = plan(&lake, &server, yearly);
        Arc::new(move || {
            Ok(match std::fs::read_to_string(&file).unwrap().as_str() {
                "" => without.clone(),
                "soon" => soon.clone(),
                _ => yearly.clone(),
            })
        })
    };
    let service = start_with(vec![PipelineScheduler::new(file.clone(), read).unwrap()], None).await;
    let status = service.until(|status| status["pipelines"][0]["next_run"].is_string()).await;
    let next = status["pipelines"][0]["next_run"].clone();
    let state = StateStore::local(&lake.state(), None);
    assert_eq!(state.read::<ScheduleTimes>().unwrap().times.len(), 1, "known before its first run");
    std::fs::write(&file, "").unwrap();
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(service.status().await["pipelines"][0]["next_run"], next, "an empty schedule is not taken");
    std::fs::write(&file, "soon").unwrap();
    service.until(|status| runs(status) >= 1).await;
    service.end().await;
}

// Who balances load is told before the service goes.
#[tokio::test(flavor = "multi_thread")]
async fn while_it_stops_it_is_not_ready_and_can_be_watched() {
    let (server, lake) = (demo().await, lake());
    let plan = plan(&lake, &server, "schedule: [{ cron: \"* * * * * *\" }]\n");
    // A run that takes its time to begin, and cannot be hurried.
    let (begun, released) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, flag) = (begun.clone(), released.clone());
    let source = Arc::new(move || {
        if count.fetch_add(1, Ordering::Relaxed) > 0 {
            while !flag.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(plan.clone())
    });
    let service = start_with(vec![PipelineScheduler::new("/nowhere".into(), source).unwrap()], None).await;
    /// Lets the run go on, however the test ends.
    struct Release(Arc<AtomicBool>);
    impl Drop for Release {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let release = Release(released);
    until("a run", || begun.load(Ordering::Relaxed) >= 2).await;
    assert_eq!(service.get("/ready").await.0, 200);
    service.stop.cancel();
    assert_eq!(service.get("/ready").await, (503, "{\"status\":\"stopping\"}".to_owned()));
    assert!(service.get("/metrics").await.1.contains("fhirlake_runs_total"));
    drop(release);
    service.end().await;
}

/// Runs a browser without a window, which `FHIRLAKE_CHROMIUM` names; what it says.
fn browser(arguments: &[&str]) -> Option<String> {
    let Some(chromium) = std::env::var_os("FHIRLAKE_CHROMIUM").filter(|value| !value.is_empty()) else {
        #[expect(clippy::disallowed_macros, reason = "a skipped test must be seen")]
        {
            eprintln!("SKIPPED: FHIRLAKE_CHROMIUM names no Chromium, so the page is seen by none");
        }
        return None;
    };
    let profile = tempfile::tempdir().unwrap();
    let output = tokio::task::block_in_place(|| {
        std::process::Command::new(chromium)
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .args(arguments)
            .output()
            .unwrap()
    });
    Some(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

// Breaks if the page is not one in a browser: its own script is refused by its own policy, nothing moves, or it is
// blank.
#[tokio::test(flavor = "multi_thread")]
async fn a_browser_shows_the_page_and_its_script_keeps_it_fresh() {
    let (server, lake) = (demo().await, lake());
    let service = start(vec![plan(&lake, &server, "schedule: [{ cron: \"* * * * * *\" }]\n")], None).await;
    service.until(|status| runs(status) >= 1).await;
    let url = format!("http://{}/", service.address);
    let log = "--enable-logging=stderr";
    let Some(seen) = browser(&["--virtual-time-budget=8000", "--dump-dom", log, &url]) else {
        return service.end().await;
    };
    assert!(seen.contains("Patient") && seen.contains("<main"), "{seen}");
    assert!(!seen.contains("Content Security Policy") && !seen.contains("Uncaught"), "{seen}");
    assert!(seen.contains("data-refreshed=") && !seen.contains("class=\"stale\""), "the script asked again: {seen}");
    let mut pictures = Vec::new();
    for (width, scheme) in [(1200, "1"), (400, "1"), (400, "0")] {
        let picture = lake.folder.path().join(format!("{width}-{scheme}.png"));
        let said = browser(&[
            "--virtual-time-budget=2000",
            &format!("--screenshot={}", picture.display()),
            &format!("--window-size={width},1600"),
            &format!("--blink-settings=preferredColorScheme={scheme}"),
            &url,
        ]);
        let bytes = std::fs::read(&picture).unwrap_or_else(|_| panic!("{said:?}"));
        let size = u32::from_be_bytes(bytes[16..20].try_into().unwrap());
        assert!(size == width && bytes.len() > 20_000, "{width}: {size} wide, {} bytes", bytes.len());
        pictures.push(bytes);
    }
    assert_ne!(pictures[1], pictures[2], "dark is not light");
    service.end().await;
}

// A stop in the middle of a run ends it as Ctrl-C does; the next start goes on with it at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_a_run_cleanly_and_the_next_start_goes_on() {
    let (server, lake) = (demo().await, lake());
    server.set_faults(Faults { slow: Some(Duration::from_millis(400)), ..Faults::default() });
    let soon = "schedule: [{ cron: \"* * * * * *\" }]\nstages: { download: { concurrency: 1 } }\n";
    let service = start(vec![plan(&lake, &server, soon)], None).await;
    let status = service
        .until(|status| status["pipelines"][0]["running"]["types"].as_array().is_some_and(|types| !types.is_empty()))
        .await;
    let running = &status["pipelines"][0]["running"];
    let names: Vec<&str> =
        running["stages"].as_array().unwrap().iter().map(|stage| stage["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["export", "download", "parse", "encode", "merge"]);
    assert_eq!(running["edges"].as_array().unwrap().len(), 4);
    let page = service.get("/").await.1;
    assert!(page.contains("class=\"picture\"") && page.contains("data-running"), "{page}");
    service.end().await;
    let state = StateStore::local(&lake.state(), None);
    assert_eq!(state.read::<ExportJobs>().unwrap().jobs.len(), 1);
    let report = fhirlake::topology::RunReport::newest(&state, 1).unwrap().pop().unwrap();
    assert_eq!(report.outcome(), fhirlake::topology::RunOutcome::Stopped);
    server.set_faults(Faults::default());
    let service = start(vec![plan(&lake, &server, soon)], None).await;
    service
        .until(|status| status["pipelines"][0]["runs"].as_array().unwrap().iter().any(|run| run["succeeded"] == true))
        .await;
    service.end().await;
    assert_is(&lake, &server.population(), &TYPES).await;
    let kickoffs = server.seen().kickoffs;
    assert!(
        kickoffs[1..].iter().all(|requested| requested.contains_key("_since")),
        "the first export was gone on with: {kickoffs:?}"
    );
}

// Who may see what. Breaks if a page of another origin can read, if a name that was made to lead here is answered, if
// the token is not asked for, or if anything can be changed.
#[tokio::test(flavor = "multi_thread")]
async fn the_web_is_closed_to_strangers() {
    let (server, lake) = (demo().await, lake());
    let yearly = "schedule: [{ cron: \"0 0 1 1 *\" }]\n";
    let service = start(vec![plan(&lake, &server, yearly)], Some("s3cret")).await;
    let client = reqwest::Client::new();
    let url = |path: &str| format!("http://{}{path}", service.address);
    let code = async |request: reqwest::RequestBuilder| request.send().await.unwrap().status().as_u16();
    for path in ["/", "/metrics", "/status.json", "/page.js"] {
        assert_eq!(code(client.get(url(path))).await, 401, "{path}");
        assert_eq!(code(client.get(url(path)).bearer_auth("wrong")).await, 401);
        assert_eq!(code(client.get(url(path)).bearer_auth("s3cret")).await, 200);
        assert_eq!(code(client.get(url(path)).basic_auth("any", Some("s3cret"))).await, 200);
        assert_eq!(code(client.post(url(path)).bearer_auth("s3cret")).await, 405);
    }
    for path in ["/health", "/ready", "/health/test"] {
        assert_ne!(code(client.get(url(path))).await, 401, "{path}");
        assert_eq!(code(client.get(url(path)).header("host", "evil.example")).await, 421);
    }
    let ready = || client.get(url("/ready"));
    assert_eq!(code(ready().header("host", "lake.example:80")).await, 200);
    assert_eq!(code(ready().header("origin", "https://evil.example")).await, 403);
    assert_eq!(code(ready().header("origin", format!("http://{}", service.address))).await, 200);
    assert_eq!(code(ready().header("sec-fetch-site", "cross-site").header("sec-fetch-mode", "no-cors")).await, 403);
    assert_eq!(code(ready().header("sec-fetch-site", "cross-site").header("sec-fetch-mode", "navigate")).await, 200);
    let answer = client.get(url("/")).bearer_auth("s3cret").send().await.unwrap();
    let policy = answer.headers()["content-security-policy"].to_str().unwrap();
    assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"));
    let said = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
    assert_eq!([said("x-content-type-options"), said("cache-control")], ["nosniff", "no-store"]);
    // Whoever holds as many connections as there may be keeps nobody out.
    let mut held = Vec::new();
    for _ in 0..200 {
        let mut stream = tokio::net::TcpStream::connect(service.address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nX: ").await.unwrap();
        held.push(stream);
    }
    // With a connection of its own: that of `client` may be the oldest, and gone.
    let health = tokio::time::timeout(Duration::from_secs(5), reqwest::Client::new().get(url("/health")).send()).await;
    assert!(health.is_ok_and(|answer| answer.is_ok()), "before the first of those is cut off");
    drop(held);
    // Whoever sends a letter a second is cut off, and whoever talks nonsense is answered and closed.
    for text in ["GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", "\u{0}\u{1}nonsense\r\n\r\n", "GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = tokio::net::TcpStream::connect(service.address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(75), stream.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "{text:?} was left open");
        assert!(!String::from_utf8_lossy(&answer).contains("200 OK"), "{text:?}");
    }
    service.end().await;
}

// A pipeline file that is broken while it is served fails its runs, by name, and nothing else; mended, it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_broken_meanwhile_fails_its_runs_only() {
    let (server, lake) = (demo().await, lake());
    let plan = plan(&lake, &server, "schedule: [{ cron: \"* * * * * *\", retries: 0 }]\n");
    let broken = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = broken.clone();
    let source = Arc::new(move || match flag.load(std::sync::atomic::Ordering::Relaxed) {
        true => Err(fhirlake::error::Error::new(fhirlake::error::ErrorKind::Config, "line 7 is no key")),
        false => Ok(plan.clone()),
    });
    let keeper = PipelineScheduler::new("/nowhere".into(), source);
    let service = start_with(vec![keeper.unwrap()], None).await;
    service.until(|status| runs(status) >= 1).await;
    broken.store(true, std::sync::atomic::Ordering::Relaxed);
    let is_said = |status: &Value| {
        status["pipelines"][0]["runs"][0]["errors"][0].as_str().is_some_and(|error| error.contains("line 7"))
    };
    service.until(is_said).await;
    assert!(service.get("/").await.1.contains("line 7 is no key"));
    broken.store(false, std::sync::atomic::Ordering::Relaxed);
    service.until(|status| status["pipelines"][0]["runs"][0]["succeeded"] == true).await;
    service.end().await;
}

// Two pipelines in one service, each with its own health; and what cannot be served is said.
#[tokio::test(flavor = "multi_thread")]
async fn several_pipelines_and_none_without_a_schedule() {
    let (server, first, second) = (demo().await, lake(), lake());
    let yearly = "schedule: [{ cron: \"0 0 1 1 *\" }]\n";
    let mut other = plan(&second, &server, yearly);
    other.name = "other".into();
    let service = start(vec![plan(&first, &server, yearly), other.clone()], None).await;
    let (code, body) = service.get("/health").await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, body["pipelines"]["other"]["status"].as_str()), (503, Some("unhealthy")), "{body}");
    assert_eq!(service.status().await["pipelines"].as_array().unwrap().len(), 2);
    service.end().await;
    let refused = async |plans: Vec<RunPlan>| {
        let keepers = match plans.into_iter().map(keeper).collect::<Result<Vec<_>, _>>() {
            Ok(keepers) => keepers,
            Err(error) => return error.to_string(),
        };
        let settings = WebSettings { listen: "127.0.0.1:0".parse().unwrap(), hosts: Vec::new(), token: None };
        serve(keepers, settings, Cancellation::default(), &Telemetry::default(), |_| {}).await.unwrap_err().to_string()
    };
    assert!(refused(vec![plan(&first, &server, "")]).await.contains("has no schedule"));
    assert!(refused(vec![other.clone(), other]).await.contains("two pipelines"));
}
