//! Duties that show in what the server gets, and troubles from the field: rows of the guide and of real servers, each
//! against the embedded server. A test's name begins with the ids of the rows that it covers.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use bulk_data_client::KeyAlgorithm;
use bulk_data_server::{DemoServer, Faults, Registration};
use fhirlake::config::read_pipeline;
use fhirlake::error::{Advice, ErrorKind};
use fhirlake::jobs::ExportJobs;

use super::protocol::{TYPES, register, server};
use super::support::{assert_is, folder, lake, strings};

/// A source of the three types that is polled every second, with further keys.
fn source(server: &DemoServer, more: &str) -> String {
    super::protocol::source(server, &format!(", max_poll_interval: 1s{more}"))
}

/// Two words of a command, the file, and what else there is.
fn fhirlake(arguments: &[&str], file: &std::path::Path) -> (i32, String, String) {
    let (command, rest) = arguments.split_at(arguments.len().min(2));
    let run = Command::new(env!("CARGO_BIN_EXE_fhirlake")).args(command).arg(file).args(rest).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (run.status.code().unwrap(), text(run.stdout), text(run.stderr))
}

// Breaks if a header that servers insist on is missing, or one that they refuse is sent.
#[tokio::test(flavor = "multi_thread")]
async fn k3_k4_k8_s4_f3_headers_as_servers_want_them() {
    let (server, lake) = (server(Faults { polls: 1, ..Faults::default() }).await, lake());
    assert!(lake.run(&source(&server, ""), "").await.unwrap().succeeded);
    let seen = server.seen();
    assert_eq!(seen.accept["kick-off"], BTreeSet::from(["application/fhir+json".to_owned()]));
    assert_eq!(seen.accept["status"], BTreeSet::from(["application/json".to_owned()]));
    assert!(
        seen.accept["file"].iter().all(|accept| accept.starts_with("application/fhir+ndjson")),
        "{:?}",
        seen.accept
    );
    assert_eq!(seen.accept_encoding, BTreeSet::from(["gzip, deflate".to_owned()]));
    assert_eq!(seen.prefer, ["respond-async"]);
    assert!(!seen.kickoffs[0].contains_key("_outputFormat"), "some servers refuse what the guide names");
    assert!(lake.run(&source(&server, ", output_format: ndjson"), "").await.unwrap().succeeded);
    assert_eq!(server.seen().kickoffs[1]["_outputFormat"], "ndjson");
}

// T1: no token goes over plain http, unless it stays on this machine or the file says so.
#[test]
fn t1_tls_is_asked_for_where_a_token_goes() {
    let file = |url: &str| {
        format!("version: 1\nname: x\nsource:\n  url: {url}\n  auth: {{ bearer_token: x }}\ntables: /tmp/t\n")
    };
    let problems = read_pipeline(&file("http://ehr.example/fhir"), &[]).unwrap_err();
    assert!(problems[0].to_string().contains("plain_http"), "{}", problems[0]);
    assert_eq!((problems.len(), problems[0].place.0), (1, 4));
    read_pipeline(&file("http://ehr.example/fhir"), &["source.auth.plain_http=true".into()]).unwrap();
    for fine in ["https://ehr.example/fhir", "http://127.0.0.1:8080/fhir", "http://localhost/fhir"] {
        read_pipeline(&file(fine), &[]).unwrap();
    }
}

// T3, T15: what `keygen` prints is what a server registers; `validate` reads what the server says of itself.
#[tokio::test(flavor = "multi_thread")]
async fn t3_t15_a_key_is_registered_and_the_servers_capabilities_are_read() {
    let (server, lake) = (server(Faults::default()).await, lake());
    let key = lake.folder.path().join("key.jwk");
    let (code, jwks, _) = fhirlake(&["keygen"], &key);
    assert_eq!(code, 0);
    server.register(Registration {
        client_id: "me".into(),
        jwks: Some(serde_json::from_str(&jwks).unwrap()),
        secret: None,
    });
    let auth = format!(", auth: {{ client_id: me, private_key: \"${{file:{}}}\" }}", key.display());
    let file = lake.pipeline_file(&source(&server, &auth));
    let (code, said, _) = fhirlake(&["validate"], &file);
    assert!(code == 0 && said.contains("server metadata") && !said.contains("does not name"), "{said}");
    assert!(lake.run(&source(&server, &auth), "").await.unwrap().succeeded);
}

// K16: what a filter may not hold is said before the server is asked.
#[test]
fn k16_filters_choose_and_do_not_arrange() {
    let file = |filter: &str| {
        format!("version: 1\nname: x\nsource:\n  url: https://x\n  type_filters: [\"{filter}\"]\ntables: /tmp/t\n")
    };
    for parameter in ["_sort=date", "_include=Observation:subject", "_elements=id", "_count=5", "_summary=true"] {
        let problems = read_pipeline(&file(&format!("Observation?code=x&{parameter}")), &[]).unwrap_err();
        assert!(problems[0].to_string().contains("has no place in a filter"), "{}", problems[0]);
    }
    read_pipeline(&file("Observation?code=x&_lastUpdated=gt2020"), &[]).unwrap();
}

// K17: a server that passes over a filter brings more than was asked for; all of it is merged, none of it is an error.
#[tokio::test(flavor = "multi_thread")]
async fn k17_filters_that_the_server_ignores() {
    let (server, lake) = (server(Faults::default()).await, lake());
    let filtered = source(&server, ", type_filters: [\"Patient?gender=female\"]");
    assert!(lake.run(&filtered, "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
}

// S2: pauses between polls grow where the server names none, and a poll that finds nothing is not the export's end.
#[tokio::test(flavor = "multi_thread")]
async fn s2_s10_polls_back_off_and_one_that_finds_nothing_is_asked_again() {
    let faults = Faults { polls: 3, poll_retry_after: Some("soon".into()), polls_missing: 2, ..Faults::default() };
    let (server, lake) = (server(faults).await, lake());
    let began = std::time::Instant::now();
    let report = lake.run(&source(&server, ""), "").await.unwrap();
    // 0.5 s, and then a second each: the most that was set. Sooner would be no back-off.
    assert!(began.elapsed() >= Duration::from_millis(4000), "{:?}", began.elapsed());
    assert!(report.succeeded && server.seen().kickoffs.len() == 1);
    assert_eq!(report.server_deviations["Retry-After is neither seconds nor a date"], 3, "{report:#?}");
}

// S9: an export that is 200 and names failures is merged, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn s9_an_export_with_failures_is_merged_and_says_so() {
    let issue = |severity: &str| {
        format!(
            "{{\"resourceType\":\"OperationOutcome\",\"issue\":[{{\"severity\":\"{severity}\",\"code\":\"exception\"}}]}}\n"
        )
    };
    let errors = [issue("error"), issue("error"), issue("warning")].concat().into_bytes();
    let (server, lake) = (server(Faults { errors, ..Faults::default() }).await, lake());
    let report = lake.run(&source(&server, ""), "").await.unwrap();
    assert!(
        !report.succeeded && report.watermark_not_advanced && report.types.values().all(|kept| kept.error.is_none())
    );
    assert_eq!((report.outcome_issues["error exception"], report.outcome_issues["warning exception"]), (2, 1));
    assert_is(&lake, &server.population(), &TYPES).await;
}

// F9, F10: resources without meta, ids of any length, references of any form.
#[tokio::test(flavor = "multi_thread")]
async fn f9_f10_resources_without_a_version_and_references_of_any_form() {
    let long = "x".repeat(300);
    let line = |status: &str| {
        let references = ["Patient/1", "https://other.example/fhir/Patient/1", "urn:uuid:7"];
        let [subject, encounter, focus] = references;
        format!(
            "{{\"resourceType\":\"Observation\",\"id\":\"{long}\",\"status\":\"{status}\",\"subject\":{{\"reference\":\"{subject}\"}},\"encounter\":{{\"reference\":\"{encounter}\"}},\"focus\":[{{\"reference\":\"{focus}\"}}]}}\n"
        )
    };
    let lake = lake();
    for status in ["final", "amended", "amended"] {
        let (_data, source) = folder(&[("Observation.ndjson", &line(status))]);
        assert!(lake.run(&source, "").await.unwrap().succeeded);
        let rows = lake
            .sql(
                "SELECT id, status, subject['reference'] AS a, encounter['reference'] AS b, \
            focus[1]['reference'] AS c FROM Observation",
            )
            .await;
        let column = |name: &str| strings(&rows[0], name)[0].clone().unwrap();
        assert_eq!((rows[0].num_rows(), column("id"), column("status")), (1, long.clone(), status.to_owned()));
        assert_eq!(
            [column("a"), column("b"), column("c")],
            ["Patient/1", "https://other.example/fhir/Patient/1", "urn:uuid:7"]
        );
    }
    assert_eq!(lake.history("Observation").await.len(), 2, "the third run brought nothing new, and commits nothing");
}

// F8: as many files at a time as there are places, and never more.
#[tokio::test(flavor = "multi_thread")]
async fn f8_as_many_files_at_a_time_as_asked_for() {
    for most in [1, 4] {
        let (server, lake) =
            (server(Faults { slow: Some(Duration::from_millis(20)), ..Faults::default() }).await, lake());
        let stages = format!("stages: {{ download: {{ concurrency: {most} }} }}\n");
        assert!(lake.run(&source(&server, ""), &stages).await.unwrap().succeeded);
        assert_eq!(server.seen().at_once, most);
    }
}

// A kick-off whose answer is lost. Breaks if nobody learns of it, in this run or the next.
#[tokio::test(flavor = "multi_thread")]
async fn k21_a_kick_off_whose_answer_is_lost_is_told() {
    // Asked again within the run: the tables are right.
    let server = server(Faults { kickoffs_lost: 1, ..Faults::default() }).await;
    let right = lake();
    assert!(right.run(&source(&server, ""), "").await.unwrap().succeeded);
    assert_is(&right, &server.population(), &TYPES).await;
    assert!(right.state_store().read::<ExportJobs>().unwrap().unconfirmed.is_empty(), "an answer came in the end");
    // The server has one slot, and the lost export takes it.
    let faults = Faults {
        kickoffs_lost: 1,
        kickoffs_throttled: 1,
        kickoff_retry_after: Some("600".into()),
        ..Faults::default()
    };
    server.set_faults(Faults { kickoffs_throttled: 0, ..faults.clone() });
    let lake = lake();
    let hasty = source(&server, "").replace("retry_for: 20s", "retry_for: 0s");
    let error = lake.run(&hasty, "").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network, "{error}");
    assert_eq!(lake.state_store().read::<ExportJobs>().unwrap().unconfirmed.len(), 1);
    let file = lake.pipeline_file(&source(&server, ""));
    let (_, said, _) = fhirlake(&["jobs", "list"], &file);
    assert!(said.contains("was not confirmed"), "{said}");
    server.set_faults(Faults { kickoffs_lost: 0, ..faults });
    let error = lake.run(&source(&server, ""), "").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Throttled, "{error}");
    assert_eq!(lake.state_store().read::<ExportJobs>().unwrap().unconfirmed.len(), 1, "the refused one made no export");
    let (code, _, _) = fhirlake(&["jobs", "cancel", "--all"], &file);
    assert_eq!((code, lake.state_store().read::<ExportJobs>().unwrap().unconfirmed.len()), (0, 0));
    assert!(lake.run(&source(&server, ""), "").await.unwrap().succeeded);
}

// 1.6: an export that cannot be given back is given back by the next run, and one that cannot be cancelled stays
// listed.
#[tokio::test(flavor = "multi_thread")]
async fn d1_an_export_is_given_back_as_soon_as_the_server_hears_it() {
    let (server, lake) = (server(Faults { deletes_refused: 1, ..Faults::default() }).await, lake());
    assert!(lake.run(&source(&server, ""), "").await.unwrap().succeeded);
    let file = lake.pipeline_file(&source(&server, ""));
    let (_, said, _) = fhirlake(&["jobs", "list"], &file);
    assert!(said.contains("merged, DELETE pending"), "{said}");
    assert_eq!(server.seen().deleted, 0);
    assert!(lake.run(&source(&server, ""), "").await.unwrap().succeeded);
    assert_eq!(server.seen().deleted, 2, "the old one, and the new one");
    assert!(lake.state_store().read::<ExportJobs>().unwrap().jobs.is_empty());
    server.set_faults(Faults { polls: 1000, deletes_refused: 1, ..Faults::default() });
    lake.run(&source(&server, ", timeout: 1s"), "").await.unwrap_err();
    let (code, _, error) = fhirlake(&["jobs", "cancel", "1"], &file);
    assert!(code == 5 && error.contains("--forget"), "{code} {error}");
    assert_eq!(lake.state_store().read::<ExportJobs>().unwrap().jobs.len(), 1, "nobody told the server");
    drop(server);
    let (code, _, error) = fhirlake(&["jobs", "cancel", "1"], &file);
    assert!(code == 3 && error.contains("--forget"), "{code} {error}");
    let (code, said, _) = fhirlake(&["jobs", "cancel", "1", "--forget"], &file);
    assert!(code == 0 && said.contains("1 exports"), "{said}");
}

// Statuses that pass by themselves with one server (BCDA's 404) and not with another.
#[tokio::test(flavor = "multi_thread")]
async fn statuses_that_pass_are_the_profiles() {
    let faults = Faults { polls_missing: 5, ..Faults::default() };
    let (server, _) = (server(faults.clone()).await, ());
    let patient = lake();
    let report = patient.run(&source(&server, ", retry_status: [404]"), "").await.unwrap();
    assert!(report.succeeded && server.seen().kickoffs.len() == 1);
    // Without it the third absence is believed, and the export asked for anew by the next run.
    server.set_faults(faults);
    let error = lake().run(&source(&server, ""), "").await.unwrap_err();
    assert_eq!(error.status(), Some(404), "{error}");
}

// A group that is not there: servers answer with an empty export, which is not taken for "in sync".
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_groups_empty_export_is_told() {
    let (server, lake) = (server(Faults { groups: Some(vec!["known".into()]), ..Faults::default() }).await, lake());
    let report = lake.run(&source(&server, ", level: group, group: other"), "").await.unwrap();
    assert_eq!(report.server_deviations["an export of everything is empty"], 1);
    let report = lake.run(&source(&server, ", level: group, group: known"), "").await.unwrap();
    assert!(report.succeeded && report.server_deviations.is_empty(), "{report:#?}");
    assert_is(&lake, &server.population(), &TYPES).await;
}

// F11: an attachment that was packed for the way is unpacked, and what is not as its resource says is told.
#[tokio::test(flavor = "multi_thread")]
async fn f11_attachments_are_unpacked_and_compared_with_what_is_said_of_them() {
    let packed = vec![0x1f, 0x8b, 1, 2, 3, 4, 5, 6];
    // Base64 of the SHA-1 of `packed`.
    let hash = "YU1ak1YNw/r0tUP9MjD91yD8Ias=";
    for (gzip, binary) in [(true, b"hello".to_vec()), (false, packed.clone()), (true, packed)] {
        let (server, lake) = (server(Faults::default()).await, lake());
        let photo = format!(
            "{{\"url\":\"Binary/1\",\"size\":5,\"hash\":\"qvTGHdzF6KLavt4PO0gs2a6pQ00=\"}},{{\"url\":\"Binary/2\",\"size\":8,\"hash\":\"{hash}\"}}"
        );
        let line = format!("{{\"resourceType\":\"Patient\",\"id\":\"with\",\"photo\":[{photo}]}}\n");
        let unlike = binary.clone();
        server.set_faults(Faults {
            gzip,
            binary,
            junk: [("Patient".to_owned(), line.into_bytes())].into(),
            ..Faults::default()
        });
        let report = lake.run(&source(&server, ""), "stages: { attachments: { inline_up_to: 1KiB } }\n").await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        let rows = lake
            .sql(
                "SELECT encode(p['data'], 'hex') AS data FROM (SELECT unnest(photo) AS p FROM Patient WHERE id = \
                'with')",
            )
            .await;
        let data: Vec<_> = rows.iter().flat_map(|batch| strings(batch, "data")).collect();
        let hex: String = unlike.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(data, [Some(hex.clone()), Some(hex)], "gzip {gzip}");
        // Each of the four files brings the line; of its two attachments one is what is said of it.
        assert_eq!(report.attachments["unlike"], 4, "{report:#?}");
    }
}

// The log that Bulk Data clients share. Breaks if an event is missing, or a secret of a link is in it.
#[tokio::test(flavor = "multi_thread")]
async fn the_export_log_has_every_event() {
    let faults = Faults {
        polls: 1,
        polls_transient: 1,
        signed_links: true,
        missing_files: vec!["Claim.0".into()],
        ..Faults::default()
    };
    let (server, lake) = (server(faults).await, lake());
    lake.run(&source(&server, ", export_log: true"), "").await.unwrap();
    let mut logs = std::fs::read_dir(lake.state().join("export-logs")).unwrap();
    let text = std::fs::read_to_string(logs.next().unwrap().unwrap().path()).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let events: Vec<&str> = lines.iter().map(|line| line["eventId"].as_str().unwrap()).collect();
    assert_eq!(events[..4], ["kickoff", "status_error", "status_progress", "status_page_complete"], "{text}");
    for (event, count) in [
        ("status_complete", 1),
        ("download_request", 12),
        ("download_complete", 11),
        ("download_error", 1),
        ("export_complete", 1),
    ] {
        assert_eq!(events.iter().filter(|named| **named == event).count(), count, "{event}: {text}");
    }
    let complete = lines.last().unwrap();
    assert!(
        complete["eventDetail"]["resources"].as_u64().unwrap() > 24 && complete["exportId"] == lines[0]["exportId"],
        "{complete}"
    );
    assert!(text.contains("Patient.0.ndjson") && !text.contains("secret") && !text.contains("signature"), "{text}");
}

// S6, S7: answers that speak of the poll, and not of the export: however many, with others in between, it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn s7_single_polls_that_fail_do_not_lose_a_running_export() {
    for script in [
        vec![404, 202, 404, 202, 404, 202, 404],
        vec![503, 503, 503, 503],
        vec![500, 500, 202, 500],
        vec![502, 202, 404, 404, 202, 404],
    ] {
        let (server, lake) = (server(Faults { polls_script: script.clone(), ..Faults::default() }).await, lake());
        assert!(lake.run(&source(&server, ""), "").await.unwrap().succeeded, "{script:?}");
        assert_eq!((server.seen().kickoffs.len(), server.seen().deleted), (1, 1), "{script:?}");
    }
    // Three times in a row it is believed.
    let (server, lake) = (server(Faults { polls_script: vec![500; 3], ..Faults::default() }).await, lake());
    lake.run(&source(&server, ""), "").await.unwrap_err();
    assert!(lake.run(&source(&server, ""), "").await.unwrap().succeeded);
    assert_eq!(server.seen().kickoffs.len(), 2);
}

// An answer that is no use, each time: after three another export is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_whose_status_is_no_use_is_given_up() {
    let (server, lake) = (server(Faults { polls_script: vec![400; 3], ..Faults::default() }).await, lake());
    for _ in 0..3 {
        let error = lake.run(&source(&server, ""), "").await.unwrap_err();
        assert!(error.advice().contains("jobs cancel"), "{}", error.advice());
        assert_eq!(server.seen().deleted, 0);
    }
    assert!(lake.run(&source(&server, ""), "").await.unwrap().succeeded);
    assert_eq!(
        (server.seen().kickoffs.len(), server.seen().deleted),
        (2, 2),
        "the old one, for it takes the slot, and the new one"
    );
}

// What fails here is no reason to ask for another export: the same one is gone on with, however often.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_never_given_up_for_what_fails_here() {
    let junk = [("Patient".to_owned(), b"{\n".to_vec())].into();
    let (server, lake) = (server(Faults { junk, ..Faults::default() }).await, lake());
    for _ in 0..5 {
        let report = lake.run(&source(&server, ""), "stages: { parse: { on_bad_line: fail } }\n").await.unwrap();
        assert!(report.types["Patient"].error.is_some());
    }
    let kickoffs = server.seen().kickoffs;
    assert_eq!(kickoffs.len(), 5, "each later run goes on with the first");
    assert!(
        kickoffs[1..]
            .iter()
            .all(|requested| requested["_type"] == "Immunization,Claim" && requested.contains_key("_since")),
        "{kickoffs:?}"
    );
    assert!(
        lake.state_store().read::<ExportJobs>().unwrap().jobs.iter().any(|export| export.status.ends_with("/jobs/0"))
    );
    assert!(lake.run(&source(&server, ""), "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
    assert!(lake.state_store().read::<ExportJobs>().unwrap().jobs.is_empty());
}

// K21: a server that says "at once" is not asked in a busy loop, and whoever is refused until the end remembers it.
#[tokio::test(flavor = "multi_thread")]
async fn k21_at_once_is_no_busy_loop() {
    for wait in ["0", "Mon, 01 Jan 2024 00:00:00 GMT"] {
        let faults =
            Faults { kickoffs_throttled: 100_000, kickoff_retry_after: Some(wait.into()), ..Faults::default() };
        let (server, lake) = (server(faults).await, lake());
        let hasty = source(&server, ", max_kick_off_wait: 2s").replace("retry_for: 20s", "retry_for: 2s");
        let error = lake.run(&hasty, "").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Throttled, "{error}");
        assert!(server.seen().kickoffs.len() < 8, "{wait}: {} kick-offs", server.seen().kickoffs.len());
        assert!(lake.state_store().read::<ExportJobs>().unwrap().throttled.is_some());
        assert!(lake.state_store().read::<ExportJobs>().unwrap().unconfirmed.is_empty(), "all were answered");
    }
    // Nobody there: nothing arrived, so nothing is unknown.
    let lake = lake();
    let error =
        lake.run("{ url: \"http://127.0.0.1:9/fhir\", types: [Patient], retry_for: 0s }", "").await.unwrap_err();
    assert_eq!(
        (error.kind(), lake.state_store().read::<ExportJobs>().unwrap().unconfirmed.len()),
        (ErrorKind::Network, 0)
    );
}

// S8: a manifest that grows in any place. Breaks if a file is taken for another that stood in its place.
#[tokio::test(flavor = "multi_thread")]
async fn s8_a_manifest_that_grows() {
    let (server, lake) = (server(Faults { growing: true, ..Faults::default() }).await, lake());
    assert!(lake.run(&source(&server, ", allow_partial_manifests: true"), "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
    let files = server.seen().files;
    assert_eq!(files.len(), files.iter().collect::<BTreeSet<_>>().len(), "each file once");
}

// A file with fewer resources than it should have is reported, or fails its type.
#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_too_short_fail_where_that_is_asked_for() {
    let (server, lake) = (server(Faults { count_off_by: 1, ..Faults::default() }).await, lake());
    let strict = "stages: { download: { on_short_file: fail } }\n";
    let report = lake.run(&source(&server, ""), strict).await.unwrap();
    assert!(
        report
            .types
            .values()
            .all(|kept| kept.error.as_ref().is_some_and(|error| error.contains("the manifest has count"))),
        "{report:#?}"
    );
    assert!(lake.run(&source(&server, ""), "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
}

// Section 3: one run through all that servers were seen to do wrong and that a client can live with; then killed
// half-way, and gone on with.
#[tokio::test(flavor = "multi_thread")]
async fn everything_goes_wrong_and_the_run_is_killed() {
    let bad = b"\xef\xbb\xbf\r\n\n{\"resourceType\":\"Patient\",\"id\":\n".to_vec();
    let date = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(1));
    let outcome =
        b"{\"resourceType\":\"OperationOutcome\",\"issue\":[{\"severity\":\"warning\",\"code\":\"timeout\"}]}\n";
    let faults = Faults {
        kickoffs_lost: 1,
        kickoffs_throttled: 1,
        post_only: true,
        polls: 2,
        poll_retry_after: Some(date),
        polls_missing: 1,
        polls_transient: 1,
        polls_throttled: 1,
        polls_bad_gateway: 1,
        separate_status: true,
        page_files: 3,
        stu4: true,
        sloppy_manifest: true,
        reordered: true,
        count_off_by: 2,
        unsupported: vec!["_until".into()],
        errors: outcome.to_vec(),
        also_deleted: vec!["Patient/nobody".into(), "Device/7".into()],
        files_unavailable: 3,
        files_cut: 3,
        gzip: true,
        ranges: true,
        links_end: true,
        redirect: true,
        deletes_refused: 1,
        junk: [("Patient".to_owned(), bad)].into(),
        slow: Some(Duration::from_millis(120)),
        token_life: Some(2),
        tokens_refused: 1,
        clock_ahead: -900,
        ..Faults::default()
    };
    let (server, lake) = (server(faults.clone()).await, lake());
    let (_key, auth) = register(&server, KeyAlgorithm::Es384);
    let more = format!(
        "{auth}, lenient: true, until: 2030-01-01T00:00:00Z, separate_export_status: true, allow_partial_manifests: \
            true"
    );
    let file = lake.pipeline_file(&source(&server, &more));
    for step in 0..2 {
        server.set_faults(faults.clone());
        // Killed while it downloads, again and again, without a chance to say goodbye.
        let mut killed = 0;
        for _ in 0..3 {
            let mut run = Command::new(env!("CARGO_BIN_EXE_fhirlake"));
            run.arg("run").arg(&file).args([
                "--set",
                "stages.merge.checkpoint=100ms",
                "--set",
                "stages.download.concurrency=1",
            ]);
            let (mut run, files) =
                (run.stderr(std::process::Stdio::null()).spawn().unwrap(), server.seen().files.len());
            while run.try_wait().unwrap().is_none() {
                if server.seen().files.len() > files + 6 {
                    run.kill().unwrap();
                    run.wait().unwrap();
                    killed += 1;
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        let report = lake.run(&source(&server, &more), "").await.unwrap();
        assert!(report.succeeded && killed > 0, "{killed} {report:#?}");
        assert_is(&lake, &server.population(), &TYPES).await;
        let seen = server.seen();
        // Two a step: the lost one, the throttled one makes none, and the one that was gone on with.
        assert_eq!((seen.leaked, seen.kickoffs.len()), (0, 3 * (step + 1)), "no second kick-off");
        server.step(100, 100 * step as u64, 2);
    }
}
