//! A server that means harm, or is broken as if it did: each attack is bounded, named in the error, and leaves the
//! other types alone.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use fhirlake::error::ErrorKind;

use super::support::{Lake, lake, strings};

type Answer = Arc<dyn Fn(&Request) -> Response + Send + Sync>;

/// A server that accepts an export, and answers everything else as it is told.
pub(crate) struct Mock {
    pub address: SocketAddr,
    pub requested: Arc<AtomicUsize>,
    pub deleted: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Shop {
    answer: Answer,
    requested: Arc<AtomicUsize>,
    deleted: Arc<AtomicUsize>,
}

async fn serve_one(State(shop): State<Shop>, request: Request) -> Response {
    shop.requested.fetch_add(1, Ordering::Relaxed);
    if request.method() == "DELETE" {
        shop.deleted.fetch_add(1, Ordering::Relaxed);
    }
    if request.uri().path().ends_with("/$export") {
        let query = request.uri().query().unwrap_or_default();
        // To itself, where somebody asks for that.
        let location = if query.contains("circle=") { "" } else { "/status" };
        return (StatusCode::ACCEPTED, [(header::CONTENT_LOCATION, location)]).into_response();
    }
    (shop.answer)(&request)
}

async fn mock_at(address: &str, answer: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Mock {
    let listener = tokio::net::TcpListener::bind((address, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (requested, deleted) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let shop = Shop { answer: Arc::new(answer), requested: requested.clone(), deleted: deleted.clone() };
    let app = Router::new().fallback(serve_one).with_state(shop);
    #[expect(clippy::disallowed_methods, reason = "the test's own task")]
    let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    Mock { address, requested, deleted, task }
}

pub(crate) async fn mock(answer: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Mock {
    mock_at("127.0.0.1", answer).await
}

fn manifest(output: &str) -> Response {
    let body =
        format!("{{\"transactionTime\":\"2026-01-01T00:00:00Z\",\"requiresAccessToken\":false,\"output\":[{output}]}}");
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// `count` resources whose ids begin with `prefix`.
pub(crate) fn lines(resource_type: &str, prefix: &str, count: usize) -> String {
    (0..count).map(|id| format!("{{\"resourceType\":\"{resource_type}\",\"id\":\"{prefix}{id}\"}}\n")).collect()
}

fn source(mock: &Mock, more: &str) -> String {
    let common = "types: [Patient, Condition], retry_for: 1s, max_poll_interval: 1s";
    format!("{{ url: \"http://{}/fhir\", {common}{more} }}", mock.address)
}

/// Condition is good, whatever Patient is: it must be merged, and Patient fail with these words.
async fn fails_alone(lake: &Lake, source: &str, rest: &str, words: &str) {
    let report = lake.run(source, rest).await.unwrap();
    assert!(!report.succeeded);
    assert_eq!(report.types["Condition"].error, None, "the good type");
    assert_eq!(lake.ids("Condition").await.len(), 3);
    let error = report.types["Patient"].error.as_deref().unwrap_or_default();
    assert!(error.contains(words), "`{words}` is not in: {error}");
    assert!(!error.chars().any(|letter| letter.is_control()), "{error:?}");
}

fn condition(request: &Request) -> Option<Response> {
    (request.uri().path() == "/condition").then(|| lines("Condition", "c", 3).into_response())
}

const CONDITION: &str = r#"{"type":"Condition","url":"/condition"}"#;

// Breaks if a file that only its query or its host tells from another is never asked for.
#[tokio::test(flavor = "multi_thread")]
async fn files_that_look_alike_are_all_read() {
    let server = mock(|request| {
        let uri = request.uri();
        match (uri.path(), uri.query().unwrap_or_default()) {
            ("/dl", query) => lines("Patient", &query.replace('=', "-"), 2).into_response(),
            ("/f/1", _) => {
                let host = request.headers()["host"].to_str().unwrap();
                lines("Condition", if host.starts_with("localhost") { "l" } else { "n" }, 2).into_response()
            }
            _ => {
                let port = request.headers()["host"].to_str().unwrap().rsplit_once(':').unwrap().1.to_owned();
                let mut output: Vec<String> = ["token=a", "token=b", "sig=a", "sig=b", "Signature=a", "Signature=b"]
                    .map(|query| format!(r#"{{"type":"Patient","url":"/dl?{query}"}}"#))
                    .to_vec();
                output.extend(
                    ["127.0.0.1", "localhost"]
                        .map(|host| format!(r#"{{"type":"Condition","url":"http://{host}:{port}/f/1"}}"#)),
                );
                manifest(&output.join(","))
            }
        }
    })
    .await;
    let lake = lake();
    let report = lake.run(&source(&server, ""), "").await.unwrap();
    assert!(report.succeeded, "{report:?}");
    assert_eq!(lake.ids("Patient").await.len(), 12);
    assert_eq!(lake.ids("Condition").await, ["l0", "l1", "n0", "n1"]);
}

// Breaks if one entry of a manifest that names no file holds every type up.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_names_no_file_fails_its_type_alone() {
    for (entry, words) in [
        (r#"{"type":"Patient","url":"file:///etc/passwd"}"#, "scheme file"),
        (r#"{"type":"Patient","url":"data:text/plain,x"}"#, "scheme data"),
        (r#"{"type":"Patient"}"#, "no url"),
        (r#"{"type":"Patient","url":"http://["}"#, "no usable url"),
    ] {
        let output = format!("{entry},{CONDITION}");
        let server = mock(move |request| condition(request).unwrap_or_else(|| manifest(&output))).await;
        fails_alone(&lake(), &source(&server, ""), "", words).await;
    }
}

// Breaks if a time that no clock has shown becomes the tables' watermark: nothing would come in any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_time_from_the_future_is_refused() {
    let server = mock(|request| {
        condition(request).unwrap_or_else(|| {
            let body = format!("{{\"transactionTime\":\"9999-12-31T23:59:59Z\",\"output\":[{CONDITION}]}}");
            body.into_response()
        })
    })
    .await;
    let lake = lake();
    let error = lake.run(&source(&server, ""), "").await.unwrap_err();
    assert!(error.kind() == ErrorKind::Server && error.to_string().contains("transactionTime is 9999"), "{error}");
    assert!(!lake.tables().join("Condition.parquet").exists());
}

/// A body that does not end, and the pieces that were taken of it.
fn endless(piece: &'static [u8], pause: Duration) -> Response {
    let stream = futures::stream::unfold((), move |()| async move {
        tokio::time::sleep(pause).await;
        Some((Ok::<_, std::io::Error>(Bytes::from_static(piece)), ()))
    });
    Body::from_stream(stream).into_response()
}

static SPACES: [u8; 1 << 20] = [b' '; 1 << 20];
static LETTERS: [u8; 1 << 20] = [b'x'; 1 << 20];

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_end_is_cut_off() {
    let server = mock(|request| condition(request).unwrap_or_else(|| endless(&SPACES, Duration::ZERO))).await;
    let error = lake().run(&source(&server, ""), "").await.unwrap_err();
    assert!(error.to_string().contains("exceeds the 64 MiB limit"), "a manifest: {error}");
    for (body, words) in [(&LETTERS, "no end"), (&SPACES, "max_file")] {
        let server = mock(move |request| match request.uri().path() {
            "/patient" => endless(body, Duration::ZERO),
            "/status" => manifest(&format!(r#"{{"type":"Patient","url":"/patient"}},{CONDITION}"#)),
            _ => condition(request).unwrap(),
        })
        .await;
        let rest = "stages: { download: { max_file: 200MiB }, parse: { max_line: 1MiB } }\n";
        let rest = if words == "no end" { rest.to_owned() } else { rest.replace("1MiB", "64MiB") };
        fails_alone(&lake(), &source(&server, ""), &rest, words).await;
    }
    // Gibberish of refusals is cut, and neither moves a terminal nor makes lines of its own.
    let server = mock(|_| {
        let body = "{\"issue\":[{\"diagnostics\":\"a\\u001b[2J\\nERROR injected\\u0007\\u202e\"}]}";
        (StatusCode::BAD_REQUEST, body).into_response()
    })
    .await;
    let error = lake().run(&source(&server, ""), "").await.unwrap_err().to_string();
    assert!(error.contains("a [2J ERROR injected") && !error.chars().any(|letter| letter.is_control()), "{error:?}");
}

// Breaks if what a store says of a file that it refuses is shown: it may be of the file.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_file_gives_a_code_and_no_words() {
    let server = mock(|request| match request.uri().path() {
        "/patient" => {
            let body = "{\"issue\":[{\"code\":\"not-found\",\"diagnostics\":\"Zebediah Quux is gone\"}]}";
            (StatusCode::NOT_FOUND, body).into_response()
        }
        "/status" => manifest(&format!(r#"{{"type":"Patient","url":"/patient"}},{CONDITION}"#)),
        _ => condition(request).unwrap(),
    })
    .await;
    let lake = lake();
    fails_alone(&lake, &source(&server, ""), "", "404 Not Found: not-found").await;
    let report = std::fs::read_dir(lake.state().join("runs")).unwrap().next().unwrap().unwrap();
    assert!(!std::fs::read_to_string(report.path()).unwrap().contains("Zebediah"));
}

// Breaks if what is no file, or a part of one, is taken for a file without more resources: its type would be passed as
// up to date, and a reconcile would delete the others.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_whole_file_fails_its_type_alone() {
    let range =
        |range: &'static str| (StatusCode::PARTIAL_CONTENT, [(header::CONTENT_RANGE, range)], lines("Patient", "p", 2));
    let html = ([(header::CONTENT_TYPE, "Text/HTML; charset=utf-8")], "<html>Sign in</html>\n");
    let outcome = r#"{"resourceType":"OperationOutcome","issue":[{"severity":"fatal","code":"exception"}]}"#;
    let pretty = "{\n  \"resourceType\": \"Patient\",\n  \"id\": \"p\"\n}\n";
    type Answers = Box<dyn Fn() -> Response + Send + Sync>;
    let answers: Vec<(Answers, &str)> = vec![
        (Box::new(move || range("bytes 5000-5073/99999").into_response()), "206"),
        (Box::new(move || range("bytes 0-73/99999").into_response()), "206"),
        (Box::new(|| (StatusCode::PARTIAL_CONTENT, lines("Patient", "p", 2)).into_response()), "206"),
        (Box::new(|| StatusCode::RESET_CONTENT.into_response()), "205"),
        (Box::new(|| StatusCode::NO_CONTENT.into_response()), "204"),
        (Box::new(move || html.clone().into_response()), "not an export file"),
        (Box::new(|| "<html>\n<body>Sign in</body>\n".into_response()), "not an export file"),
        (Box::new(move || outcome.into_response()), "not an export file"),
        (
            Box::new(move || outcome.replace("\"issue\"", "\"id\":\"o\",\"issue\"").into_response()),
            "not an export file",
        ),
        (Box::new(|| r#"{"resourceType":"Bundle","id":"b","type":"searchset"}"#.into_response()), "not an export file"),
        (Box::new(|| r#"{"message":"Forbidden"}"#.into_response()), "not an export file"),
        (Box::new(|| "Service unavailable".into_response()), "not an export file"),
        (Box::new(move || pretty.into_response()), "not an export file"),
        (Box::new(|| r#"[{"resourceType":"Patient","id":"p"}]"#.into_response()), "not an export file"),
    ];
    for (answer, words) in answers {
        let server = mock(move |request| match request.uri().path() {
            "/patient" => answer(),
            "/status" => manifest(&format!(r#"{{"type":"Patient","url":"/patient","count":2}},{CONDITION}"#)),
            _ => condition(request).unwrap(),
        })
        .await;
        let lake = lake();
        fails_alone(&lake, &source(&server, ""), "", words).await;
        assert!(!lake.tables().join("Patient.parquet/_delta_log").exists(), "{words}: a table would have a watermark");
    }
    // What is odd, and honest: a header that says HTML, an outcome that is a remark, nothing at all, a type beside its
    // own.
    let remark = r#"{"resourceType":"OperationOutcome","issue":[{"severity":"information","code":"informational"}]}"#;
    for (body, patients) in
        [(lines("Patient", "p", 2), 2), (String::new(), 0), (remark.to_owned(), 0), (lines("Device", "d", 1), 0)]
    {
        let server = mock(move |request| match request.uri().path() {
            "/patient" => ([(header::CONTENT_TYPE, "text/html")], body.clone()).into_response(),
            "/status" => manifest(&format!(r#"{{"type":"Patient","url":"/patient"}},{CONDITION}"#)),
            _ => condition(request).unwrap(),
        })
        .await;
        let lake = lake();
        let report = lake.run(&source(&server, ""), "").await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        assert_eq!(lake.ids("Patient").await.len(), patients);
    }
}

// Breaks if a server that gives the kick-off's own place for the export's status is asked for one export after the
// other.
#[tokio::test(flavor = "multi_thread")]
async fn a_status_that_is_the_kick_off_itself_is_refused() {
    let server = mock(|_| StatusCode::ACCEPTED.into_response()).await;
    let error = lake().run(&source(&server, ", parameters: { circle: \"1\" }"), "").await.unwrap_err();
    assert!(error.kind() == ErrorKind::Server && error.to_string().contains("Content-Location"), "{error}");
    assert_eq!(server.requested.load(Ordering::Relaxed), 1);
}

// Breaks if the link of an attachment, which is an element of a resource, gets into the log, or a store's words that
// are no code.
#[tokio::test(flavor = "multi_thread")]
async fn links_of_attachments_are_not_told() {
    let server = mock(|request| match request.uri().path() {
        "/patient" => "{\"resourceType\":\"Patient\",\"id\":\"p\",\"photo\":[{\"url\":\"Binary/Zebediah-Quux\"}]}\n"
            .into_response(),
        "/status" => manifest(&format!(r#"{{"type":"Patient","url":"/patient"}},{CONDITION}"#)),
        "/condition" => condition(request).unwrap(),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "{\"issue\":[{\"code\":\"Zebediah-Quux\"}]}").into_response(),
    })
    .await;
    let lake = lake();
    let file = lake.pipeline_file(&source(&server, ""));
    let yaml = std::fs::read_to_string(&file).unwrap() + "stages: { attachments: {} }\n";
    std::fs::write(&file, yaml).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_fhirlake"));
    command.args(["--log", "trace", "run"]).arg(&file);
    let output = tokio::task::block_in_place(|| command.output().unwrap());
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("the attachment: the server answered 503"), "{said}");
    assert!(!said.contains("Zebediah"), "{}", said.lines().find(|line| line.contains("Zebediah")).unwrap());
}

// Breaks if a part of an attachment, or nothing at all, is taken for it: its link must stay, and the resource with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_an_attachment_is_not_taken_for_it() {
    type Answers = fn() -> Response;
    let part = || (StatusCode::PARTIAL_CONTENT, [(header::CONTENT_RANGE, "bytes 0-4/100")], "hello").into_response();
    let whole = || (StatusCode::PARTIAL_CONTENT, [(header::CONTENT_RANGE, "bytes 0-4/5")], "hello").into_response();
    let answers: [(Answers, &str); 5] = [
        (part, "failed"),
        (|| (StatusCode::PARTIAL_CONTENT, "hello").into_response(), "failed"),
        (|| StatusCode::NO_CONTENT.into_response(), "failed"),
        (|| StatusCode::RESET_CONTENT.into_response(), "failed"),
        (whole, "inline"),
    ];
    for (answer, becomes) in answers {
        let server = mock(move |request| match request.uri().path() {
            "/patient" => r#"{"resourceType":"Patient","id":"p","photo":[{"url":"Binary/1"}]}"#.into_response(),
            "/status" => manifest(&format!(r#"{{"type":"Patient","url":"/patient"}},{CONDITION}"#)),
            "/condition" => condition(request).unwrap(),
            _ => answer(),
        })
        .await;
        let lake = lake();
        let report = lake.run(&source(&server, ""), "stages: { attachments: { inline_up_to: 1KiB } }\n").await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        assert_eq!(report.attachments, [(becomes.to_owned(), 1)].into(), "{report:#?}");
        let photo = lake.sql("SELECT p['url'] AS url FROM (SELECT unnest(photo) AS p FROM Patient)").await;
        let url = photo.iter().flat_map(|batch| strings(batch, "url")).next().unwrap();
        assert_eq!(url.is_some(), becomes == "failed", "{url:?}");
    }
}

// Breaks if three thousand missing files wait for each other.
#[tokio::test(flavor = "multi_thread")]
async fn missing_files_do_not_wait_for_each_other() {
    let server = mock(|request| match request.uri().path() {
        "/status" => {
            let missing: Vec<String> =
                (0..300).map(|at| format!(r#"{{"type":"Patient","url":"/missing/{at}"}}"#)).collect();
            manifest(&format!("{},{CONDITION}", missing.join(",")))
        }
        path if path.starts_with("/missing") => StatusCode::NOT_FOUND.into_response(),
        _ => condition(request).unwrap(),
    })
    .await;
    let began = std::time::Instant::now();
    fails_alone(&lake(), &source(&server, ""), "", "404").await;
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}

/// An address of this machine that is not its loopback.
fn other_address() -> Option<String> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent: it only chooses a way.
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then(|| address.to_string())
}

// Breaks if a server elsewhere can have this machine, or its link, asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_elsewhere_does_not_lead_to_this_machine() {
    let Some(address) = other_address() else {
        #[expect(clippy::disallowed_macros, reason = "a skipped test must be seen")]
        {
            eprintln!("SKIPPED: this machine has no address but its loopback");
        }
        return;
    };
    let victim = mock(|_| lines("Patient", "v", 2).into_response()).await;
    let port = victim.address.port();
    for host in [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "127.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
    ] {
        for way in ["link", "redirect", "status"] {
            let to = format!("http://{host}:{port}/x");
            let server = mock_at(&address, move |request| match request.uri().path() {
                "/status" if way == "status" => (StatusCode::FOUND, [(header::LOCATION, to.clone())]).into_response(),
                "/status" if way == "link" => manifest(&format!(r#"{{"type":"Patient","url":"{to}"}},{CONDITION}"#)),
                "/status" => manifest(&format!(r#"{{"type":"Patient","url":"/away"}},{CONDITION}"#)),
                "/away" => (StatusCode::FOUND, [(header::LOCATION, to.clone())]).into_response(),
                _ => condition(request).unwrap(),
            })
            .await;
            let lake = lake();
            if way == "status" {
                let error = lake.run(&source(&server, ""), "").await.unwrap_err().to_string();
                assert!(error.contains("not followed"), "{host}, {way}: {error}");
            } else {
                fails_alone(&lake, &source(&server, ""), "", "not followed").await;
            }
        }
    }
    assert_eq!(victim.requested.load(Ordering::Relaxed), 0, "the victim was asked");
    // Whoever writes the pipeline file may.
    let server = mock_at(&address, move |request| match request.uri().path() {
        "/status" => manifest(&format!(r#"{{"type":"Patient","url":"http://127.0.0.1:{port}/x"}},{CONDITION}"#)),
        _ => condition(request).unwrap(),
    })
    .await;
    let lake = lake();
    lake.run(&source(&server, &format!(", token_origins: [\"http://127.0.0.1:{port}\"]")), "").await.unwrap();
    assert_eq!(lake.ids("Patient").await, ["v0", "v1"]);
}

// Breaks if what changes something is sent to a host that it was not meant for.
#[tokio::test(flavor = "multi_thread")]
async fn a_delete_is_not_led_to_another_host() {
    let victim = mock(|_| StatusCode::OK.into_response()).await;
    let to = format!("http://{}/admin", victim.address);
    let server = mock(move |request| match (request.method().as_str(), request.uri().path()) {
        ("DELETE", _) => (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, to.clone())]).into_response(),
        (_, "/patient") => lines("Patient", "p", 1).into_response(),
        (_, "/status") => manifest(&format!(r#"{{"type":"Patient","url":"/patient"}},{CONDITION}"#)),
        _ => condition(request).unwrap(),
    })
    .await;
    let report = lake().run(&source(&server, ""), "").await.unwrap();
    assert!(report.succeeded && server.deleted.load(Ordering::Relaxed) == 1);
    assert_eq!(victim.requested.load(Ordering::Relaxed), 0);
}

// Lines that are meant to break a reader: each is read or kept in quarantine with a reason, and the lines beside it are
// read.
#[tokio::test(flavor = "multi_thread")]
async fn lines_that_mean_harm() {
    let patient = |rest: &str| format!("{{\"resourceType\":\"Patient\",\"id\":\"x\"{rest}}}").into_bytes();
    let deep = |open: &str, close: &str| format!("{}{}", open.repeat(100_000), close.repeat(100_000));
    let digits = "9".repeat(1_000_000);
    let bad: Vec<Vec<u8>> = vec![
        patient(&format!(",\"name\":{}", deep("[", "]"))),
        patient(&format!(",\"contact\":{}1{}", "{\"a\":".repeat(100_000), "}".repeat(100_000))),
        patient(&format!(",\"contained\":[{}", "[".repeat(100_000))),
        patient(",\"birthDate\":\"\\ud800\""),
        b"{\"resourceType\":\"Patient\",\"id\":\"\xff\xfe\"}".to_vec(),
        patient(",\"multipleBirthInteger\":NaN"),
        b"\x00\x01\x02".to_vec(),
        b"[]".to_vec(),
        b"{\"resourceType\":\"../../etc\",\"id\":\"x\"}".to_vec(),
        b"{\"resourceType\":\"Patient\",\"id\":\"\"}".to_vec(),
        b"{\"resourceType\":\"Patient\",\"id\":7}".to_vec(),
    ];
    let odd: Vec<Vec<u8>> = vec![
        patient(&format!(",\"multipleBirthInteger\":{digits}")),
        patient(",\"multipleBirthInteger\":1e999999999"),
        patient(",\"multipleBirthInteger\":-0"),
        patient(",\"gender\":\"a\",\"gender\":\"b\""),
        b"{\"resourceType\":\"Patient\",\"id\":\"../../etc/passwd\"}".to_vec(),
        b"{\"resourceType\":\"Patient\",\"id\":\"a/b\\\\c\\u0000\\n\"}".to_vec(),
        format!("{{\"resourceType\":\"Patient\",\"id\":\"{}\"}}", "i".repeat(1_000_000)).into_bytes(),
        b"{\"resourceType\":\"Condition\",\"id\":\"of another type\"}".to_vec(),
        patient(",\"birthDate\":\"0000-99-99\",\"deceasedDateTime\":\"99999-01-01T00:00:00Z\""),
    ];
    let folder = tempfile::tempdir().unwrap();
    let mut file = Vec::new();
    for line in bad.iter().chain(&odd) {
        file.extend_from_slice(line);
        file.extend_from_slice(b"\n");
        file.extend_from_slice(b"{\"resourceType\":\"Patient\",\"id\":\"good\"}\n");
    }
    std::fs::write(folder.path().join("Patient.ndjson"), &file).unwrap();
    let lake = lake();
    let folder_source = format!("{{ url: \"file://{}\" }}", folder.path().display());
    let report = lake.run(&folder_source, "").await.unwrap();
    assert!(report.succeeded, "{report:?}");
    assert_eq!(report.types["Patient"].quarantined + report.other_bad_lines, bad.len() as u64);
    let ids = lake.ids("Patient").await;
    for id in ["good", "x", "../../etc/passwd", "a/b\\c\0\n"] {
        assert!(
            ids.iter().any(|there| there == id),
            "{id:?} is not in {:?}",
            ids.iter().map(|id| id.len()).collect::<Vec<_>>()
        );
    }
    assert_eq!(ids.len(), 5);
    assert_eq!(lake.ids("Condition").await, ["of another type"]);
    let mut there: Vec<_> = std::fs::read_dir(lake.tables()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    there.sort();
    assert_eq!(there, ["Condition.parquet", "Patient.parquet"], "no folder of another name");
}

// Breaks if downloads that gather long lines wait for each other for ever: one connection that breaks off is enough.
#[tokio::test(flavor = "multi_thread")]
async fn long_lines_in_many_files_of_which_one_breaks_off() {
    let line = |number: &str| {
        format!("{{\"resourceType\":\"Patient\",\"id\":\"p{number}\",\"note\":\"{}\"}}\n", "x".repeat(6 << 20))
    };
    let broken = AtomicUsize::new(0);
    let server = mock(move |request| match request.uri().path() {
        "/status" => {
            let files: Vec<String> = (0..8).map(|at| format!(r#"{{"type":"Patient","url":"/p/{at}"}}"#)).collect();
            manifest(&format!("{},{CONDITION}", files.join(",")))
        }
        path if path.starts_with("/p/") => {
            let line = Bytes::from(line(&path[3..]));
            if broken.fetch_add(1, Ordering::Relaxed) < 3 {
                let parts = [Ok(line.slice(..5 << 20)), Err(std::io::Error::other("cut"))];
                // What is cut was on its way for a while: the others wait by then.
                let parts = futures::stream::iter(parts);
                return Body::from_stream(futures::StreamExt::then(parts, async |part| {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    part
                }))
                .into_response();
            }
            line.into_response()
        }
        _ => condition(request).unwrap(),
    })
    .await;
    let lake = lake();
    let source = source(&server, "");
    let run =
        tokio::time::timeout(Duration::from_secs(90), lake.run(&source, "stages: { download: { concurrency: 8 } }\n"));
    let report = run.await.expect("the downloads wait for each other").unwrap();
    assert!(report.succeeded, "{report:?}");
    assert_eq!(lake.ids("Patient").await.len(), 8);
}
