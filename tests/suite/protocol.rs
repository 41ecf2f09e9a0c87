//! The duties of a Bulk Data client and the troubles of real servers, each against the embedded server. A test's name
//! begins with the ids of the rows that it covers.

use std::time::Duration;

use bulk_data_client::{KeyAlgorithm, generate_key};
use bulk_data_server::{DemoServer, Faults, Population, Registration};
use fhirlake::error::{Advice, ErrorKind};
use fhirlake::jobs::ExportJobs;
use fhirlake::state::StateFile;
use fhirlake::topology::RunOptions;

use super::support::{Lake, assert_is, lake, strings};

pub(crate) const TYPES: [&str; 3] = ["Patient", "Immunization", "Claim"];

pub(crate) async fn server(faults: Faults) -> DemoServer {
    let server = DemoServer::start(Population::new(5, 24), 0, 6).await.unwrap();
    server.set_faults(faults);
    server
}

/// A source of the three types with further keys.
pub(crate) fn source(server: &DemoServer, more: &str) -> String {
    format!("{{ url: \"{}\", types: [{}], retry_for: 20s{more} }}", server.base(), TYPES.join(", "))
}

/// Runs against a server with these faults; the tables must be right.
async fn right(faults: Faults, more: &str) -> (DemoServer, Lake) {
    let (server, lake) = (server(faults).await, lake());
    let report = lake.run(&source(&server, more), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_is(&lake, &server.population(), &TYPES).await;
    (server, lake)
}

/// Registers a client with a new key; the key's folder, and the `auth` of a source.
pub(crate) fn register(server: &DemoServer, algorithm: KeyAlgorithm) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let (private, public) = generate_key(algorithm).unwrap();
    let path = folder.path().join("key.jwk");
    std::fs::write(&path, private.to_string()).unwrap();
    server.register(Registration { client_id: "me".into(), jwks: Some(public), secret: None });
    let auth = format!(", auth: {{ client_id: me, private_key: \"${{file:{}}}\" }}", path.display());
    (folder, auth)
}

// T2, T4 to T10, T13: a backend service by discovery, with both algorithms.
#[tokio::test(flavor = "multi_thread")]
async fn t2_t4_t5_t9_t13_a_backend_service_is_authorized_by_discovery() {
    for algorithm in [KeyAlgorithm::Es384, KeyAlgorithm::Rs384] {
        let (server, lake) = (server(Faults::default()).await, lake());
        let (_key, auth) = register(&server, algorithm);
        assert!(lake.run(&source(&server, &auth), "").await.unwrap().succeeded);
        assert_is(&lake, &server.population(), &TYPES).await;
        let seen = server.seen();
        assert_eq!((seen.tokens, seen.scope.as_str()), (1, "system/*.rs"), "one token for all who ask");
    }
}

// T11: tokens of two seconds, over polls and downloads that take longer: renewed ahead and on 401.
#[tokio::test(flavor = "multi_thread")]
async fn t11_tokens_that_end_are_renewed_in_the_middle_of_everything() {
    let (server, lake) = (
        server(Faults { token_life: Some(1), polls: 2, slow: Some(Duration::from_millis(300)), ..Faults::default() })
            .await,
        lake(),
    );
    let (_key, auth) = register(&server, KeyAlgorithm::Es384);
    let more = format!("{auth}, max_poll_interval: 1s");
    let report = lake.run(&source(&server, &more), "stages: { download: { concurrency: 2 } }\n").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_is(&lake, &server.population(), &TYPES).await;
    assert!(server.seen().tokens >= 2, "{}", server.seen().tokens);
}

// A token endpoint that refuses without a reason, and a clock that is an hour ahead.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_endpoint_that_refuses_at_first_and_a_clock_that_is_off() {
    for faults in [
        Faults { tokens_refused: 2, ..Faults::default() },
        Faults { clock_ahead: 3600, ..Faults::default() },
        Faults { clock_ahead: -3600, ..Faults::default() },
    ] {
        let (server, lake) = (server(faults).await, lake());
        let (_key, auth) = register(&server, KeyAlgorithm::Es384);
        assert!(lake.run(&source(&server, &auth), "").await.unwrap().succeeded);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_secret_in_the_header_and_in_the_form_and_a_wrong_one() {
    let server = server(Faults::default()).await;
    server.register(Registration { client_id: "me".into(), jwks: None, secret: Some("s3cret".into()) });
    for place in ["basic", "form"] {
        let auth = format!(", auth: {{ client_id: me, client_secret: s3cret, client_secret_in: {place} }}");
        let lake = lake();
        assert!(lake.run(&source(&server, &auth), "").await.unwrap().succeeded, "{place}");
    }
    let lake = lake();
    let error = lake.run(&source(&server, ", auth: { client_id: me, client_secret: wr0ng }"), "").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Auth);
    assert!(
        error.to_string().contains("secret is not the client's") && !error.to_string().contains("wr0ng"),
        "{error}"
    );
    let error = lake.run(&source(&server, ""), "").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Auth, "{error}");
}

// T13: a server that lists its scopes type by type.
#[tokio::test(flavor = "multi_thread")]
async fn t13_scopes_type_by_type() {
    let listed = ["system/Patient.rs", "system/Immunization.read", "system/Claim.rs", "system/Device.rs"];
    let scopes = Some(listed.iter().map(|scope| (*scope).to_owned()).collect());
    let (server, lake) = (server(Faults { scopes, ..Faults::default() }).await, lake());
    let (_key, auth) = register(&server, KeyAlgorithm::Es384);
    assert!(lake.run(&source(&server, &auth), "").await.unwrap().succeeded);
    assert_eq!(server.seen().scope, "system/Patient.rs system/Immunization.read system/Claim.rs");
}

// K2, K13: what a GET cannot say, and a server that takes no GET.
#[tokio::test(flavor = "multi_thread")]
async fn k2_k13_a_post_where_one_is_needed() {
    let (server, _lake) = right(Faults { post_only: true, stu4: true, ..Faults::default() }, "").await;
    assert_eq!(server.seen().kickoffs.len(), 1);
    let (server, _lake) = right(Faults::default(), ", level: patient, patients: [\"1\", Patient/2]").await;
    assert_eq!(server.seen().kickoffs[0]["patient"], "Patient/1,Patient/2");
}

// K6: what a lenient server ignored is read back; a strict one's words reach the operator.
#[tokio::test(flavor = "multi_thread")]
async fn k6_k11_parameters_that_the_server_does_not_support() {
    let faults = Faults { unsupported: vec!["_elements".into()], ..Faults::default() };
    let (server, lake) = (server(faults).await, lake());
    let error = lake.run(&source(&server, ", elements: [id]"), "").await.unwrap_err();
    assert!(error.to_string().contains("the parameter _elements is not supported"), "{error}");
    assert!(error.advice().contains("lenient"), "{}", error.advice());
    let report = lake.run(&source(&server, ", elements: [id], lenient: true"), "").await.unwrap();
    assert!(report.succeeded && report.outcome_issues["warning not-supported"] == 1, "{report:#?}");
    assert_eq!(server.seen().prefer.last().unwrap(), "respond-async, handling=lenient");
}

// K7, K10, K12, K14, K15, K18: the parameters as the server gets them.
#[tokio::test(flavor = "multi_thread")]
async fn k7_k10_k12_k14_k15_parameters_arrive_as_they_are_meant() {
    let more = ", until: 2030-01-01T00:00:00Z, elements: [id, meta], type_filters: [\"Claim?code=a,b&x=y z\", \
        \"Patient?active=true\"], \
                include_associated_data: [LatestProvenanceResources], parameters: { _x: [\"1\", \"2\"] }, headers: \
                { X-Own: \"yes\" }";
    for method in ["get", "post"] {
        let (server, _lake) = right(Faults::default(), &format!("{more}, method: {method}")).await;
        let query = &server.seen().kickoffs[0];
        for (name, value) in [
            ("_until", "2030-01-01T00:00:00Z"),
            ("_elements", "id,meta"),
            ("_typeFilter", "Claim?code=a,b&x=y z\nPatient?active=true"),
            ("includeAssociatedData", "LatestProvenanceResources"),
            ("_x", "1,2"),
        ] {
            assert_eq!(query[name], value, "{method} {name}");
        }
    }
}

// K21: a kick-off that is refused for seconds is waited for; for longer, it is remembered and nobody is asked.
#[tokio::test(flavor = "multi_thread")]
async fn k21_a_throttled_kick_off_is_waited_for_or_remembered() {
    let (server, _lake) = right(Faults { kickoffs_throttled: 1, ..Faults::default() }, "").await;
    assert_eq!(server.seen().kickoffs.len(), 2);
    let faults = Faults { kickoffs_throttled: 9, kickoff_retry_after: Some("3600".into()), ..Faults::default() };
    let server = self::server(faults).await;
    let lake = lake();
    let error = lake.run(&source(&server, ""), "").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Throttled, "{error}");
    server.set_faults(Faults::default());
    let again = lake.run(&source(&server, ""), "").await.unwrap_err();
    assert!(again.to_string().contains("rate limited until"), "{again}");
    assert_eq!((again.kind(), server.seen().kickoffs.len()), (ErrorKind::Throttled, 1), "nobody was asked");
    let file = lake.pipeline_file(&source(&server, ""));
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_fhirlake")).arg("status").arg(&file).output().unwrap();
    assert!(String::from_utf8(status.stdout).unwrap().contains("throttled   until 2"));
    // Another pipeline of the same server is another matter, and so is a changed scope.
    assert!(lake.run(&source(&server, ", level: patient"), "").await.unwrap().succeeded);
}

// S2 to S7: every way in which a poll does not bring the manifest, and the export goes on all the same.
#[tokio::test(flavor = "multi_thread")]
async fn s1_s3_s5_s6_s7_polls_that_fail_do_not_fail_the_export() {
    let soon = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(1));
    let epoch =
        (std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() + 500).to_string();
    for wait in ["0", "-1", "soon", &soon, &epoch] {
        right(Faults { polls: 1, poll_retry_after: Some(wait.into()), ..Faults::default() }, "").await;
    }
    let trouble =
        Faults { polls: 2, polls_transient: 2, polls_throttled: 1, polls_bad_gateway: 2, ..Faults::default() };
    let (server, _lake) = right(trouble, ", max_poll_interval: 1s").await;
    assert_eq!(server.seen().kickoffs.len(), 1);
    let failed = self::server(Faults { export_fails: true, ..Faults::default() }).await;
    let error = lake().run(&source(&failed, ""), "").await.unwrap_err();
    assert!(error.to_string().contains("the export failed"), "{error}");
}

// K5: the poll's own status and the export's.
#[tokio::test(flavor = "multi_thread")]
async fn k5_separate_export_status() {
    let faults = || Faults { separate_status: true, polls: 2, ..Faults::default() };
    right(faults(), ", separate_export_status: true").await;
    right(Faults { separate_status: false, ..faults() }, ", separate_export_status: true").await;
    let server = server(Faults { export_fails: true, ..faults() }).await;
    let error = lake().run(&source(&server, ", separate_export_status: true"), "").await.unwrap_err();
    assert!(error.to_string().contains("the export failed"), "{error}");
}

// K19, S8: pages of the manifest, each there before the next.
#[tokio::test(flavor = "multi_thread")]
async fn k19_s8_a_manifest_of_many_pages_and_partial_ones() {
    let (server, lake) =
        right(Faults { page_files: 2, polls: 1, ..Faults::default() }, ", allow_partial_manifests: true").await;
    assert!(server.seen().kickoffs[0].contains_key("allowPartialManifests"));
    server.step(100, 50, 2);
    assert!(lake.run(&source(&server, ", allow_partial_manifests: true"), "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
}

// Manifests of STU 4 and of servers that leave required keys out, with relative URLs.
#[tokio::test(flavor = "multi_thread")]
async fn manifests_of_stu_4_and_of_sloppy_servers() {
    right(Faults { stu4: true, ..Faults::default() }, "").await;
    right(Faults { sloppy_manifest: true, ..Faults::default() }, "").await;
}

// F1, F2, F6, T12: the token goes to its own origin, and follows no redirect to another.
#[tokio::test(flavor = "multi_thread")]
async fn t12_f1_f2_f6_the_token_stays_with_its_server() {
    let (server, lake) = (server(Faults { redirect: true, ..Faults::default() }).await, lake());
    let (_key, auth) = register(&server, KeyAlgorithm::Es384);
    assert!(lake.run(&source(&server, &auth), "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
    assert_eq!(server.seen().leaked, 0);
}

// A host that was named as one that may have the token, and refuses it: asked again without.
#[tokio::test(flavor = "multi_thread")]
async fn requires_access_token_with_signed_links() {
    let (server, lake) = (server(Faults { signed_links: true, ..Faults::default() }).await, lake());
    let (_key, auth) = register(&server, KeyAlgorithm::Es384);
    assert!(lake.run(&source(&server, &auth), "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
    assert_eq!(server.seen().leaked, 0, "the manifest says that files need a token; the host is none that may get it");
    // A host that may have it and refuses it is asked without.
    let lake = super::support::lake();
    let origin = server.base().replace("127.0.0.1", "localhost").replace("/fhir", "");
    let more = format!("{auth}, token_origins: [\"{origin}\"]");
    assert!(lake.run(&source(&server, &more), "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
    assert_eq!(server.seen().leaked, 12, "each file once");
}

// K18: files that are organised by patients have no type, and a header before each block, which may go on in another
// file.
#[tokio::test(flavor = "multi_thread")]
async fn k18_files_that_are_organised_by_patients() {
    let (server, lake) = right(Faults::default(), ", organize_output_by: Patient").await;
    assert_eq!(server.seen().files.len(), 4);
    let report: serde_json::Value = {
        let runs = std::fs::read_dir(lake.state().join("runs")).unwrap().flatten().next().unwrap();
        serde_json::from_slice(&std::fs::read(runs.path()).unwrap()).unwrap()
    };
    assert!(report["excluded"].is_null() && report["count_findings"].is_null(), "headers are no resources: {report:#}");
}

// F4, F5, and bodies that break off: gone on with by Range where the server can, read again where not.
#[tokio::test(flavor = "multi_thread")]
async fn f4_f5_bodies_that_break_off() {
    let (server, _lake) = right(Faults { files_cut: 4, ranges: true, ..Faults::default() }, "").await;
    assert!(server.seen().ranges >= 4, "{}", server.seen().ranges);
    let (server, _lake) = right(Faults { files_cut: 4, ..Faults::default() }, "").await;
    assert_eq!(server.seen().ranges, 0);
    right(Faults { files_cut: 3, gzip: true, ranges: true, ..Faults::default() }, "").await;
}

// F7: links that end are asked for anew.
#[tokio::test(flavor = "multi_thread")]
async fn f7_links_that_end_are_refreshed_from_the_manifest() {
    let (server, _lake) = right(Faults { links_end: true, ..Faults::default() }, "").await;
    assert_eq!(server.seen().kickoffs.len(), 1);
}

// F8. That there are fewer files at a time then, `fhir::pace` tests.
#[tokio::test(flavor = "multi_thread")]
async fn f8_files_that_are_unavailable_are_asked_for_again() {
    let (server, _lake) = right(Faults { files_unavailable: 6, ..Faults::default() }, "").await;
    assert!(server.seen().files.len() >= 12 + 6);
}

// Killed, or stopped by its own timeout, a run is gone on with: one kick-off, and what was merged is not read again.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_outlasts_its_run_is_gone_on_with() {
    let (server, lake) = (server(Faults { polls: 1000, ..Faults::default() }).await, lake());
    let error = lake.run(&source(&server, ", timeout: 1s"), "").await.unwrap_err();
    assert!(error.to_string().contains("source.timeout"), "{error}");
    assert!(error.advice().contains("resumes this export"));
    let source = source(&server, "");
    let file = lake.pipeline_file(&source);
    let jobs =
        std::process::Command::new(env!("CARGO_BIN_EXE_fhirlake")).args(["jobs", "list"]).arg(&file).output().unwrap();
    let said = String::from_utf8(jobs.stdout).unwrap();
    assert!(
        said.contains("in progress") && said.contains("/jobs/0") && said.contains("Patient,Immunization,Claim"),
        "{said}"
    );
    server.finish_polls();
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &TYPES).await;
    let seen = server.seen();
    assert_eq!((seen.kickoffs.len(), seen.deleted), (1, 1), "one kick-off, and its files given back after the commit");
    // Nothing is left to go on with.
    server.set_faults(Faults::default());
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    assert_eq!(server.seen().kickoffs.len(), 2);
}

// A server that no longer has the export is asked anew; other types, or a full refresh of what was incremental, too.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_is_gone_or_was_asked_for_otherwise_is_asked_for_anew() {
    let (server, lake) = (server(Faults { polls: 1000, ..Faults::default() }).await, lake());
    lake.run(&source(&server, ", timeout: 1s"), "").await.unwrap_err();
    server.lose_exports();
    server.set_faults(Faults::default());
    assert!(lake.run(&source(&server, ""), "").await.unwrap().succeeded);
    assert_eq!(server.seen().kickoffs.len(), 2);
    server.set_faults(Faults { polls: 1000, ..Faults::default() });
    lake.run(&source(&server, ", timeout: 1s"), "").await.unwrap_err();
    server.set_faults(Faults::default());
    let plan = lake.plan(&source(&server, ""), "");
    let full = RunOptions { full_refresh: true, ..RunOptions::default() };
    assert!(lake.run_with(plan, full).await.unwrap().succeeded);
    assert!(!server.seen().kickoffs.last().unwrap().contains_key("_since"));
}

// F11. Breaks if an attachment is not fetched, fetched without the token that it needs, fetched from a host that nobody
// named, or if a resource whose attachment cannot be had is lost.
#[tokio::test(flavor = "multi_thread")]
async fn f11_attachments_are_files_beside_the_tables_or_in_the_resource() {
    for as_fhir in [false, true] {
        let (server, lake) = (server(Faults::default()).await, lake());
        let link = |at: &str| format!("{{\"contentType\":\"text/plain\",\"url\":\"{at}\"}}");
        let base = server.base().to_owned();
        let links = [
            format!("{base}/Binary/100"),
            format!("{base}/Binary/3000000"),
            "Binary/101".into(),
            format!("{base}/Binary/none"),
        ];
        let hosts = ["http://localhost:1/x".to_owned(), "file:///etc/passwd".to_owned()];
        let photos: Vec<String> = links.iter().chain(&hosts).map(|at| link(at)).collect();
        let with = format!("{{\"resourceType\":\"Patient\",\"id\":\"with\",\"photo\":[{}]}}\n", photos.join(","));
        let junk = [("Patient".to_owned(), with.into_bytes())].into();
        server.set_faults(Faults { junk, binaries_as_fhir: as_fhir, token_life: Some(60), ..Faults::default() });
        let (_key, auth) = register(&server, KeyAlgorithm::Es384);
        let stages = "stages: { attachments: { inline_up_to: 1KiB } }\n";
        let report = lake.run(&source(&server, &auth), stages).await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        // The line is in each of the four files; each copy is fetched, or found again.
        let counts: Vec<(&str, u64)> = report.attachments.iter().map(|(what, count)| (what.as_str(), *count)).collect();
        assert_eq!(counts, [("failed", 4), ("files", 4), ("inline", 8), ("left", 8)]);
        let rows = lake
            .sql(
                "SELECT p['url'] AS url, character_length(CAST(p['data'] AS VARCHAR)) AS size FROM \
            (SELECT unnest(photo) AS p FROM Patient WHERE id = 'with')",
            )
            .await;
        let mut found: Vec<(Option<String>, Option<String>)> = Vec::new();
        for batch in &rows {
            found.extend(strings(batch, "url").into_iter().zip(strings(batch, "size")));
        }
        let file = found[1].0.clone().unwrap();
        assert!(file.starts_with("attachments/Patient/") && file.ends_with(".txt"), "{file}");
        assert_eq!(std::fs::metadata(lake.tables().join(&file)).unwrap().len(), 3_000_000);
        let inline = |size: &str| (None, Some(size.to_owned()));
        let left = |at: &String| (Some(at.clone()), None);
        let expected = [inline("100"), left(&file), inline("101"), left(&links[3]), left(&hosts[0]), left(&hosts[1])];
        assert_eq!(found, expected);
        assert_eq!(lake.count("Patient").await, 25);
    }
}

// The example of a script can be read, and names every fault that there is.
#[test]
fn the_example_of_faults_names_all_of_them() {
    let text = include_str!("../../docs/faults.yaml");
    let faults: Faults = serde_saphyr::from_str(text).unwrap();
    assert_eq!((faults.files_cut, faults.page_files), (3, 3));
    let all = format!("{:#?}", Faults::default());
    let names = all.lines().filter_map(|line| line.strip_prefix("    ")?.split_once(':').map(|(name, _)| name));
    for name in names {
        assert!(text.contains(&format!("{name}:")), "docs/faults.yaml does not name `{name}`");
    }
}

// The script of a server may be written as YAML.
#[test]
fn faults_are_a_script() {
    let text = "kickoffs_throttled: 2\nslow: 20\njunk: { Patient: \"x\\n\" }\nerrors: \"{}\"\ntransaction_time: \
        2026-01-01T00:00:00Z\nscopes: [system/*.rs]\n";
    let faults: Faults = serde_saphyr::from_str(text).unwrap();
    assert_eq!((faults.kickoffs_throttled, faults.slow), (2, Some(Duration::from_millis(20))));
    assert_eq!((faults.junk["Patient"].as_slice(), faults.errors.as_slice()), (b"x\n".as_slice(), b"{}".as_slice()));
    assert!(serde_saphyr::from_str::<Faults>("kickoff_throttled: 2").is_err(), "what is misspelt is an error");
}

// One run through a server that does everything wrong that a client can live with.
#[tokio::test(flavor = "multi_thread")]
async fn a_fault_of_every_kind_in_one_run() {
    let faults = Faults {
        polls: 2,
        poll_retry_after: Some("-3".into()),
        polls_transient: 1,
        polls_throttled: 1,
        polls_bad_gateway: 1,
        kickoffs_throttled: 1,
        post_only: true,
        separate_status: true,
        files_unavailable: 3,
        files_cut: 3,
        ranges: true,
        links_end: true,
        redirect: true,
        page_files: 3,
        stu4: true,
        sloppy_manifest: true,
        unsupported: vec!["_until".into()],
        token_life: Some(2),
        tokens_refused: 1,
        clock_ahead: 600,
        ..Faults::default()
    };
    let (server, lake) = (server(faults.clone()).await, lake());
    let (_key, auth) = register(&server, KeyAlgorithm::Rs384);
    let more = format!(
        "{auth}, lenient: true, until: 2030-01-01T00:00:00Z, separate_export_status: true, allow_partial_manifests: \
            true, max_poll_interval: 1s"
    );
    for step in 0..2 {
        server.set_faults(faults.clone());
        let report = lake.run(&source(&server, &more), "").await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        assert_is(&lake, &server.population(), &TYPES).await;
        assert_eq!(server.seen().leaked, 0);
        server.step(100, 100 * step, 2);
    }
}

// Breaks if types that came by exports of their own have an export each for ever, or if what happened between their
// watermarks is not asked for.
#[tokio::test(flavor = "multi_thread")]
async fn types_whose_watermarks_lie_close_together_share_an_export() {
    let (server, lake) = (server(Faults::default()).await, lake());
    let of = |types: &str| format!("{{ url: \"{}\", types: [{types}], retry_for: 20s }}", server.base());
    let patient = lake.run(&of("Patient"), "").await.unwrap();
    server.step(20, 5, 3);
    let claim = lake.run(&of("Claim"), "").await.unwrap();
    assert!(patient.succeeded && claim.succeeded && patient.transaction_time < claim.transaction_time);
    server.step(20, 5, 3);
    assert!(lake.run(&of("Patient, Claim"), "").await.unwrap().succeeded);
    assert_is(&lake, &server.population(), &["Patient", "Claim"]).await;
    let kickoffs = server.seen().kickoffs;
    assert_eq!(kickoffs.len(), 3, "{kickoffs:?}");
    let types: std::collections::BTreeSet<&str> = kickoffs[2]["_type"].split(',').collect();
    assert_eq!(types, ["Claim", "Patient"].into());
    // The oldest of their times: what the other has seen since comes again, and changes nothing.
    assert_eq!(kickoffs[2]["_since"].replace('Z', "+00:00"), patient.transaction_time.unwrap().replace('Z', "+00:00"));
}

// Breaks if a type that the server refuses keeps its neighbours from what changed: of one watermark, as after a first
// sync, or of several. Once it is known which it is, it costs each run one request.
#[tokio::test(flavor = "multi_thread")]
async fn a_type_that_is_refused_holds_back_no_neighbour() {
    let (server, lake) = (server(Faults::default()).await, lake());
    let types = ["Patient", "Claim", "Observation", "Condition"];
    let source = format!("{{ url: \"{}\", types: [{}], retry_for: 20s }}", server.base(), types.join(", "));
    let others = ["Patient", "Observation", "Condition"];
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    for round in 0..2 {
        server.set_faults(Faults { forbidden_type: Some("Claim".into()), ..Faults::default() });
        // All four, two of them, one, one, the other two. From then on three, and one.
        for kickoffs in [5, 2, 2] {
            server.step(20, 5, 3);
            let (before, given_back) = (server.seen().kickoffs.len(), server.seen().deleted);
            let report = lake.run(&source, "").await.unwrap();
            assert!(!report.succeeded && report.types["Claim"].error.as_ref().unwrap().contains("403"), "{report:#?}");
            assert!(others.iter().all(|name| report.types[*name].error.is_none()), "{report:#?}");
            assert_is(&lake, &server.population(), &others).await;
            assert_eq!(server.seen().kickoffs.len() - before, kickoffs, "round {round}");
            assert!(server.seen().deleted > given_back, "an export is given back though a type was refused");
            assert!(lake.state_store().read::<ExportJobs>().unwrap().jobs.is_empty());
        }
        let aside = lake.state_store().read::<ExportJobs>().unwrap().rejected;
        assert_eq!(aside.iter().map(|aside| aside.resource_type.as_str()).collect::<Vec<_>>(), ["Claim"]);
        // What is given again comes by itself first, with all that changed since, and then with the others.
        server.set_faults(Faults::default());
        for kickoffs in [2, 1] {
            server.step(20, 5, 3);
            let before = server.seen().kickoffs.len();
            assert!(lake.run(&source, "").await.unwrap().succeeded);
            assert_is(&lake, &server.population(), &types).await;
            assert_eq!(server.seen().kickoffs.len() - before, kickoffs, "round {round}");
        }
        assert!(lake.state_store().read::<ExportJobs>().unwrap().rejected.is_empty());
    }
}

// Breaks if a server that refuses whatever it is asked is asked type by type again and again, or if its first words are
// lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_everything_is_asked_type_by_type_once_a_day() {
    let (server, lake) = (server(Faults { unsupported: vec!["_type".into()], ..Faults::default() }).await, lake());
    let source = format!(
        "{{ url: \"{}\", types: [Patient, Claim, Observation], lenient: false, retry_for: 20s }}",
        server.base()
    );
    // All three, and each by itself; what is refused whatever it names is not asked for again on that day.
    for kickoffs in [4, 1, 1] {
        let before = server.seen().kickoffs.len();
        let error = lake.run(&source, "").await.unwrap_err();
        assert!(error.kind() == ErrorKind::Server && error.to_string().contains("_type"), "{error}");
        assert_eq!(server.seen().kickoffs.len() - before, kickoffs);
    }
    server.set_faults(Faults::default());
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    assert!(lake.state_store().read::<ExportJobs>().unwrap().all_rejected.is_none());
    // What is not asked for any more is not remembered: its table may be made anew by then, from strays.
    let of = |lake: &Lake| lake.state_store().read::<StateFile>().unwrap().watermarks.into_keys().collect::<Vec<_>>();
    assert_eq!(of(&lake), ["Claim", "Observation", "Patient"]);
    assert!(lake.run(&source.replace("Claim, ", ""), "").await.unwrap().succeeded);
    assert_eq!(of(&lake), ["Observation", "Patient"]);
}

// Breaks if an export that the server forgot is asked for again by each half of what it then refuses.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_is_gone_and_then_refused_is_asked_for_by_halves() {
    let (server, lake) = (server(Faults { missing_type: Some("Patient".into()), ..Faults::default() }).await, lake());
    let source = format!("{{ url: \"{}\", types: [Patient, Claim, Observation], retry_for: 20s }}", server.base());
    assert!(!lake.run(&source, "").await.unwrap().succeeded);
    assert_eq!(lake.state_store().read::<ExportJobs>().unwrap().jobs.len(), 1);
    server.lose_exports();
    server.set_faults(Faults { forbidden_type: Some("Claim".into()), ..Faults::default() });
    let report = lake.run(&source, "").await.unwrap();
    assert!(!report.succeeded && report.types["Patient"].committed, "{report:#?}");
    assert_is(&lake, &server.population(), &["Patient", "Observation"]).await;
    assert!(lake.state_store().read::<ExportJobs>().unwrap().jobs.is_empty());
    assert_eq!(server.exports(), 0, "each export is given back");
}
