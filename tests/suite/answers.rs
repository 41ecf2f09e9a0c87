//! Answers as servers and what stands before them send them: packed, under names that nobody knows, too early or too
//! busy.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use fhirlake::error::{Advice, ErrorKind};

use super::hostile::lines;
use super::support::lake;

type Answer = Arc<dyn Fn(&str, usize) -> Response + Send + Sync>;

/// A server that answers each path (with its query) as it is told, which hears for the how-many-th time it is asked;
/// what it was asked, in order.
struct Server {
    base: String,
    requested: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    fn kick_offs(&self) -> Vec<String> {
        self.requested
            .lock()
            .unwrap()
            .iter()
            .filter(|requested| requested.starts_with("GET /fhir/$export"))
            .cloned()
            .collect()
    }
    fn source(&self, more: &str) -> String {
        format!("{{ url: \"{}\", retry_for: 1s, max_poll_interval: 1s{more} }}", self.base)
    }
}

async fn server(answer: impl Fn(&str, usize) -> Response + Send + Sync + 'static) -> Server {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}/fhir", listener.local_addr().unwrap());
    let requested = Arc::<Mutex<Vec<String>>>::default();
    async fn serve(State((answer, requested)): State<(Answer, Arc<Mutex<Vec<String>>>)>, request: Request) -> Response {
        let place = format!("{} {}", request.method(), request.uri());
        let count = {
            let mut requested = requested.lock().unwrap();
            requested.push(place.clone());
            requested.iter().filter(|before| **before == place).count()
        };
        answer(&place, count)
    }
    let app = Router::new().fallback(serve).with_state((Arc::new(answer) as Answer, requested.clone()));
    #[expect(clippy::disallowed_methods, reason = "the test's own task")]
    let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    Server { base, requested, task }
}

fn accepted() -> Response {
    (StatusCode::ACCEPTED, [(header::CONTENT_LOCATION, "/status")]).into_response()
}

fn manifest(types: &[&str]) -> String {
    let output: Vec<String> = types.iter().map(|name| format!(r#"{{"type":"{name}","url":"/{name}"}}"#)).collect();
    let output = output.join(",");
    format!(
        r#"{{"transactionTime":"2026-01-01T00:00:00Z","request":"x","requiresAccessToken":false,"output":[{output}]}}"#
    )
}

fn gzip(text: &str) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(text.as_bytes()).unwrap();
    gzip.finish().unwrap()
}

fn zlib(text: &str) -> Vec<u8> {
    let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    zlib.write_all(text.as_bytes()).unwrap();
    zlib.finish().unwrap()
}

fn outcome(status: StatusCode, code: &str, words: &str) -> Response {
    let issue = format!(r#"{{"severity":"error","code":"{code}","diagnostics":"{words}"}}"#);
    (status, format!(r#"{{"resourceType":"OperationOutcome","issue":[{issue}]}}"#)).into_response()
}

// Breaks if the name of a coding counts for more than the bytes, or a name that nobody knows is passed over in silence.
#[tokio::test(flavor = "multi_thread")]
async fn files_are_read_whatever_their_coding_is_called() {
    let text = lines("Patient", "p", 5);
    let plain = text.clone().into_bytes();
    for (coding, bytes, unknown) in [
        ("aws-chunked", plain.clone(), true),
        ("identity", plain.clone(), false),
        ("UTF-8", plain.clone(), true),
        ("binary", plain.clone(), true),
        ("gzip", plain.clone(), false),
        ("gzip, aws-chunked", gzip(&text), true),
        ("none", gzip(&text), true),
        ("deflate", zlib(&text), false),
    ] {
        let server = server(move |place, _| match place {
            "GET /status" => manifest(&["Patient"]).into_response(),
            "GET /Patient" => ([(header::CONTENT_ENCODING, coding)], bytes.clone()).into_response(),
            _ => accepted(),
        })
        .await;
        let report = lake().run(&server.source(", types: [Patient]"), "").await.unwrap();
        assert!(report.succeeded && report.types["Patient"].inserted == 5, "{coding}: {report:#?}");
        let counted = report.server_deviations.get("a file has an unknown Content-Encoding");
        assert_eq!(counted.copied(), unknown.then_some(1), "{coding}");
    }
    // What is packed in a way that cannot be undone is no file of bad lines: its type fails.
    let server = server(|place, _| match place {
        "GET /status" => manifest(&["Patient"]).into_response(),
        "GET /Patient" => ([(header::CONTENT_ENCODING, "br")], vec![0x1b_u8, 0x20, 0x00, 0xf8, 0x8d]).into_response(),
        _ => accepted(),
    })
    .await;
    let report = lake().run(&server.source(", types: [Patient]"), "").await.unwrap();
    assert!(
        report.types["Patient"].error.as_ref().is_some_and(|error| error.contains("Content-Encoding br")),
        "{report:#?}"
    );
}

// Breaks if an answer that is packed, which a proxy does unasked, is no JSON.
#[tokio::test(flavor = "multi_thread")]
async fn every_answer_is_unpacked() {
    let packed = |bytes: Vec<u8>, coding: &'static str| ([(header::CONTENT_ENCODING, coding)], bytes).into_response();
    let server = server(move |place, count| match place {
        "GET /fhir/.well-known/smart-configuration" => {
            packed(gzip(r#"{"token_endpoint":"token","scopes_supported":["system/*.rs"]}"#), "gzip")
        }
        "POST /fhir/token" => packed(zlib(r#"{"access_token":"t","token_type":"bearer","expires_in":300}"#), "deflate"),
        "GET /fhir/metadata" => packed(gzip(r#"{"resourceType":"CapabilityStatement"}"#), "gzip"),
        "GET /status" if count == 1 => {
            let mut response = packed(gzip("{}"), "gzip");
            *response.status_mut() = StatusCode::ACCEPTED;
            response
        }
        "GET /status" => packed(gzip(&manifest(&["Patient"])), "gzip"),
        "GET /Patient" => packed(gzip(&lines("Patient", "p", 5)), "gzip"),
        place if place.starts_with("GET /fhir/$export") => accepted(),
        _ => StatusCode::ACCEPTED.into_response(),
    })
    .await;
    let auth = ", types: [Patient], auth: { client_id: c, client_secret: s }";
    let report = lake().run(&server.source(auth), "").await.unwrap();
    assert!(report.succeeded && report.types["Patient"].inserted == 5, "{report:#?}");
    // An error's words, too.
    let refusing = self::server(move |place, _| match place.starts_with("GET /fhir/$export") {
        true => {
            let text = r#"{"resourceType":"OperationOutcome","issue":[{"severity":"error","code":"forbidden","diagnostics":"not your day"}]}"#;
            let mut response = ([(header::CONTENT_ENCODING, "gzip")], gzip(text)).into_response();
            *response.status_mut() = StatusCode::FORBIDDEN;
            response
        }
        false => StatusCode::OK.into_response(),
    })
    .await;
    let error = lake().run(&refusing.source(", types: [Patient]"), "").await.unwrap_err();
    assert!(error.to_string().contains("not your day"), "{error}");
}

const EIGHT: &str = ", types: [Patient, Condition, Observation, Encounter, Claim, Device, Procedure, Immunization], \
    max_kick_off_wait: 1s";

// Breaks if a server that has no slot free is asked for each type, or is not let alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_server_is_asked_once_and_later() {
    for (status, code, words) in [
        (StatusCode::BAD_REQUEST, "invalid", "too many concurrent exports for this tenant (max 4)"),
        (StatusCode::FORBIDDEN, "throttled", "no"),
        (StatusCode::UNPROCESSABLE_ENTITY, "too-costly", "no"),
        (StatusCode::CONFLICT, "lock-error", "no"),
        (StatusCode::BAD_REQUEST, "transient", "no"),
        (StatusCode::BAD_REQUEST, "timeout", "no"),
        (StatusCode::BAD_REQUEST, "processing", "An export is already running"),
    ] {
        let server = server(move |_, _| outcome(status, code, words)).await;
        let lake = lake();
        let error = lake.run(&server.source(EIGHT), "").await.unwrap_err();
        assert_eq!((error.kind(), server.kick_offs().len()), (ErrorKind::Throttled, 1), "{status} {code}: {error}");
        // Nothing is asked before its time.
        let error = lake.run(&server.source(EIGHT), "").await.unwrap_err();
        assert_eq!((error.kind(), server.kick_offs().len()), (ErrorKind::Throttled, 1), "{error}");
    }
}

// Breaks if a refusal that is about no type costs a kick-off for each of them, or one that is about a type is not
// found.
#[tokio::test(flavor = "multi_thread")]
async fn types_are_told_apart_only_where_a_refusal_may_be_about_them() {
    let all = server(|_, _| outcome(StatusCode::BAD_REQUEST, "invalid", "parameter not known: x")).await;
    let error = lake().run(&all.source(EIGHT), "").await.unwrap_err();
    assert!(error.to_string().contains("parameter not known"), "{error}");
    assert_eq!(all.kick_offs().len(), 4, "all of them, and three by themselves");
    // One of eight, which the refusal names or not: it alone fails.
    for words in ["Claim is not supported", "not supported"] {
        let one = server(move |place, _| match place {
            place if place.starts_with("GET /fhir/$export") && place.contains("Claim") => {
                outcome(StatusCode::BAD_REQUEST, "not-supported", words)
            }
            place if place.starts_with("GET /fhir/$export") => accepted(),
            "GET /status" => manifest(&[]).into_response(),
            _ => StatusCode::ACCEPTED.into_response(),
        })
        .await;
        let report = lake().run(&one.source(EIGHT), "").await.unwrap();
        let failed: Vec<&str> =
            report.types.iter().filter(|(_, of)| of.error.is_some()).map(|(name, _)| name.as_str()).collect();
        assert_eq!(failed, ["Claim"], "{words}: {report:#?}");
        assert!(one.kick_offs().len() <= 10, "{words}: {:#?}", one.kick_offs());
    }
}

// Breaks if an answer about the job that cannot be used does not show what it is.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_no_manifest_are_shown() {
    let cases: BTreeMap<&str, &[&str]> = [
        ("<html>Please sign in</html>", ["Please sign in"].as_slice()),
        (
            r#"{"resourceType":"OperationOutcome","issue":[{"diagnostics":"no such job"}]}"#,
            &["no transactionTime", "no such job"],
        ),
        (r#"{"transactionTime":"yesterday","output":[]}"#, &["yesterday"]),
        (r#"{"transactionTime":17,"output":[]}"#, &["17"]),
        ("", &["empty"]),
        ("[]", &["not a JSON object"]),
    ]
    .into();
    for (body, words) in cases {
        let server = server(move |place, _| match place {
            "GET /status" => body.into_response(),
            _ => accepted(),
        })
        .await;
        let error = lake().run(&server.source(", types: [Patient]"), "").await.unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?} is not in: {error}");
    }
    // An export that is gone says why.
    let server = server(move |place, _| match place {
        "GET /status" => outcome(StatusCode::GONE, "deleted", "the job was removed by an administrator"),
        _ => accepted(),
    })
    .await;
    let error = lake().run(&server.source(", types: [Patient]"), "").await.unwrap_err().to_string();
    assert!(error.contains("removed by an administrator"), "{error}");
}

// Breaks if an export whose files are gone for good is gone on with, or one whose files may come back is not.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_whose_files_are_gone_is_started_anew_by_the_next_run() {
    for (status, expected) in [(StatusCode::GONE, true), (StatusCode::NOT_FOUND, false)] {
        let gone = Arc::new(Mutex::new(true));
        let is_gone = gone.clone();
        let server = server(move |place, _| match place {
            "GET /status" => manifest(&["Patient", "Condition"]).into_response(),
            "GET /Condition" => lines("Condition", "c", 2).into_response(),
            "GET /Patient" if *is_gone.lock().unwrap() => outcome(status, "processing", "file_expired"),
            "GET /Patient" => lines("Patient", "p", 2).into_response(),
            place if place.starts_with("GET /fhir/$export") => accepted(),
            _ => StatusCode::ACCEPTED.into_response(),
        })
        .await;
        let lake = lake();
        let source = server.source(", types: [Patient, Condition]");
        let report = lake.run(&source, "").await.unwrap();
        assert!(
            !report.succeeded && report.types["Patient"].error.is_some() && report.types["Condition"].error.is_none()
        );
        *gone.lock().unwrap() = false;
        let report = lake.run(&source, "").await.unwrap();
        assert!(report.succeeded && report.types["Patient"].inserted == 2, "{report:#?}");
        // One that asks for all patients, beside one for what changed of the other type.
        let anew = server.kick_offs()[1..].iter().any(|requested| !requested.contains("_since"));
        assert_eq!(anew, expected, "{status}: {:?}", server.kick_offs());
    }
}

// Breaks if an export of seconds costs the minutes that the server's first Retry-After names.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_poll_comes_early() {
    let server = server(|place, count| match place {
        "GET /status" if count == 1 => (StatusCode::ACCEPTED, [(header::RETRY_AFTER, "120")]).into_response(),
        "GET /status" => manifest(&["Patient"]).into_response(),
        "GET /Patient" => lines("Patient", "p", 2).into_response(),
        _ => accepted(),
    })
    .await;
    let source = format!("{{ url: \"{}\", types: [Patient], max_poll_interval: 2m }}", server.base);
    let done = tokio::time::timeout(std::time::Duration::from_secs(60), lake().run(&source, "")).await;
    assert!(done.expect("it waited for all of Retry-After").unwrap().succeeded);
}

// Breaks if nobody learns that a server sends whole resources where it was asked for some elements, or if those of
// types that no element is of are taken for it.
#[tokio::test]
async fn elements_that_a_server_ignores_are_reported() {
    let cut = r#"{"resourceType":"Patient","id":"b","meta":{"tag":[{"system":"http://terminology.hl7.org/CodeSystem/v3-ObservationValue","code":"SUBSETTED"}]}}"#;
    for (elements, whole) in [("[id]", 3), ("[Patient.id]", 2), ("[Observation.id, Observation.status]", 1)] {
        let server = server(move |requested, _| match requested {
            "GET /status" => manifest(&["Patient", "Observation"]).into_response(),
            "GET /Patient" => format!("{}{cut}\n", lines("Patient", "p", 2)).into_response(),
            "GET /Observation" => lines("Observation", "o", 1).into_response(),
            _ => accepted(),
        })
        .await;
        let report = lake().run(&server.source(&format!(", elements: {elements}")), "").await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        let said: Vec<_> =
            report.server_deviations.iter().filter(|(name, _)| name.contains("source.elements")).collect();
        assert_eq!(said.len(), 1, "{elements}: {:?}", report.server_deviations);
        assert_eq!(*said[0].1, whole, "{elements}");
    }
}

// Breaks if a gateway that asks for a client certificate by HTTP, after the handshake, gets an answer that does not
// name the key.
#[tokio::test]
async fn gateways_that_want_a_certificate_by_http() {
    let nginx = "<html>\r\n<head><title>400 No required SSL certificate was \
        sent</title></head>\r\n<body>\r\n</body></html>\r\n";
    let iis = "<h2>403 - Forbidden: Access is denied.</h2>\r\n<h3>Client Certificate required.</h3>";
    for (status, words) in [(StatusCode::BAD_REQUEST, nginx), (StatusCode::FORBIDDEN, iis)] {
        for types in ["[Patient]", "[Patient, Observation]"] {
            let server = server(move |_, _| (status, words).into_response()).await;
            let error = lake().run(&server.source(&format!(", types: {types}")), "").await.unwrap_err();
            assert!(error.advice().contains("source.tls.client_certificate"), "{types}: {error}: {}", error.advice());
        }
    }
}

// Breaks if lines that the frames of a coding cut in two are taken for bad ones, and lost.
#[tokio::test]
async fn a_framed_body_fails_its_type() {
    let text = lines("Patient", "p", 240);
    let framed: String = text
        .as_bytes()
        .chunks(1000)
        .map(|frame| format!("{:x};chunk-signature=ab\r\n{}\r\n", frame.len(), String::from_utf8_lossy(frame)))
        .collect();
    let server = server(move |place, _| match place {
        "GET /status" => manifest(&["Patient"]).into_response(),
        "GET /Patient" => ([(header::CONTENT_ENCODING, "aws-chunked")], framed.clone()).into_response(),
        _ => accepted(),
    })
    .await;
    let report = lake().run(&server.source(", types: [Patient]"), "").await.unwrap();
    assert!(report.types["Patient"].error.as_ref().is_some_and(|error| error.contains("aws-chunked")), "{report:#?}");
}

// Breaks if a server that is busy for a second costs a run, whatever the status that it says so with.
#[tokio::test]
async fn a_busy_server_is_waited_for() {
    for status in [StatusCode::BAD_REQUEST, StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS] {
        let server = server(move |place, count| match place {
            "GET /status" => manifest(&["Patient"]).into_response(),
            "GET /Patient" => lines("Patient", "p", 2).into_response(),
            place if place.starts_with("GET /fhir/$export") && count == 1 => {
                let mut busy = outcome(status, "invalid", "too many concurrent exports for this tenant (max 4)");
                busy.headers_mut().insert(header::RETRY_AFTER, "1".parse().unwrap());
                busy
            }
            _ => accepted(),
        })
        .await;
        let report = lake().run(&server.source(", types: [Patient], max_kick_off_wait: 5s"), "").await.unwrap();
        assert!(report.succeeded && server.kick_offs().len() == 2, "{status}: {report:#?}");
    }
}

// Breaks if an error that comes after a type's commit, and concerns it, leaves what it lacks unasked for.
#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_comes_late_is_asked_behind() {
    let server = server(|place, count| match place {
        "GET /status" => manifest(&["Patient", "Condition"]).into_response(),
        "GET /Patient" => lines("Patient", "p", 2).into_response(),
        "GET /Condition" if count == 1 => {
            // Patient is committed meanwhile.
            std::thread::sleep(std::time::Duration::from_secs(2));
            let words = r#"{"resourceType":"OperationOutcome","issue":[{"severity":"error","diagnostics":"Patient and Condition are not complete"}]}"#;
            format!("{}{words}\n", lines("Condition", "c", 2)).into_response()
        }
        "GET /Condition" => lines("Condition", "c", 3).into_response(),
        _ => accepted(),
    })
    .await;
    let (lake, source) = (lake(), server.source(", types: [Patient, Condition]"));
    let report = lake.run(&source, "").await.unwrap();
    let held: Vec<_> =
        report.types.iter().filter(|(_, of)| of.watermark_hold.is_some()).map(|(name, _)| name.as_str()).collect();
    assert_eq!(held, ["Condition", "Patient"], "{report:#?}");
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    let since: Vec<bool> = server.kick_offs().iter().map(|requested| requested.contains("_since=")).collect();
    assert!(!since[..since.len() - 1].contains(&true) && since[since.len() - 1], "{:?}", server.kick_offs());
}

// Breaks if resources that come in place of a manifest stand in a message.
#[tokio::test]
async fn resources_in_place_of_a_manifest_are_not_shown() {
    let patient = r#"{"resourceType":"Patient","id":"a","name":[{"family":"Zebediah-Quux"}]}"#;
    let bundle = format!(r#"{{"resourceType":"Bundle","entry":[{{"resource":{patient}}}]}}"#);
    for (body, shown) in [
        (bundle, "a Bundle of"),
        (format!("{patient}\n{patient}\n"), "JSON of"),
        (format!("[{patient}]"), "JSON of"),
        (
            r#"{"resourceType":"OperationOutcome","issue":[{"code":"x","diagnostics":"wrong job"}]}"#.to_owned(),
            "wrong job",
        ),
        ("<html>Sign in</html>".to_owned(), "Sign in"),
    ] {
        let server = server(move |place, _| match place {
            "GET /status" => body.clone().into_response(),
            _ => accepted(),
        })
        .await;
        let error = lake().run(&server.source(", types: [Patient]"), "").await.unwrap_err().to_string();
        assert!(error.contains(shown) && !error.contains("Zebediah"), "{error}");
    }
}
