//! What a server did not give, or said in another way: watermarks do not move past it, and nothing of it is lost.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use axum::http::header;
use axum::response::{IntoResponse, Response};
use fhirlake::topology::RunReport;

use super::hostile::{Mock, lines, mock};
use super::support::{Lake, folder, lake};

/// The files of an export: list of the manifest, type, path, content.
type Files = Vec<(&'static str, &'static str, &'static str, Vec<u8>)>;

/// A server whose exports list these files; they can be changed between runs.
async fn server(files: Files) -> (Mock, Arc<Mutex<Files>>) {
    let files = Arc::new(Mutex::new(files));
    let served = files.clone();
    let mock = mock(move |request| -> Response {
        let files = served.lock().unwrap();
        let path = request.uri().path();
        if path != "/status" {
            return files.iter().find(|file| file.2 == path).unwrap().3.clone().into_response();
        }
        let list = |name: &str| {
            let entries = files.iter().filter(|file| file.0 == name);
            entries.map(|file| format!(r#"{{"type":"{}","url":"{}"}}"#, file.1, file.2)).collect::<Vec<_>>().join(",")
        };
        let body = format!(
            r#"{{"transactionTime":"2026-01-01T00:00:00Z","request":"x","requiresAccessToken":false,"output":[{}],"deleted":[{}],"error":[{}]}}"#,
            list("output"),
            list("deleted"),
            list("error")
        );
        ([(header::CONTENT_TYPE, "application/json")], body).into_response()
    });
    (mock.await, files)
}

fn source(mock: &Mock, more: &str) -> String {
    let common = "types: [Patient, Condition], retry_for: 1s, max_poll_interval: 1s";
    format!("{{ url: \"http://{}/fhir\", {common}{more} }}", mock.address)
}

fn outcome(severity: &str, words: &str) -> Vec<u8> {
    let issue = format!(r#"{{"severity":"{severity}","code":"exception","diagnostics":"{words}"}}"#);
    format!("{{\"resourceType\":\"OperationOutcome\",\"issue\":[{issue}]}}\n").into_bytes()
}

fn output(
    resource_type: &'static str,
    path: &'static str,
    text: impl Into<Vec<u8>>,
) -> (&'static str, &'static str, &'static str, Vec<u8>) {
    ("output", resource_type, path, text.into())
}

/// The types whose watermark did not advance, of a run whose types were all merged.
fn held(report: &RunReport) -> Vec<&str> {
    assert!(report.types.values().all(|kept| kept.error.is_none()), "{report:#?}");
    assert_eq!(report.succeeded, !report.watermark_not_advanced, "{report:#?}");
    report.types.iter().filter(|(_, kept)| kept.watermark_hold.is_some()).map(|(name, _)| name.as_str()).collect()
}

// Breaks if a type that the server failed to write gets a watermark: what it has would never come.
#[tokio::test(flavor = "multi_thread")]
async fn an_error_holds_the_watermark_of_the_type_that_it_names() {
    let patients = output("Patient", "/p", lines("Patient", "p", 3));
    let error = ("error", "OperationOutcome", "/e", outcome("error", "Failed to export 2.Condition.ndjson"));
    let (mock, files) = server(vec![patients.clone(), error]).await;
    let lake = lake();
    let report = lake.run(&source(&mock, ""), "").await.unwrap();
    assert_eq!(held(&report), ["Condition"]);
    assert_eq!(lake.ids("Patient").await.len(), 3, "what came is merged");
    assert_eq!(mock.deleted.load(Ordering::Relaxed), 1, "the export has no more to give");
    let words = std::fs::read_to_string(report.server_messages.as_ref().unwrap()).unwrap();
    assert!(words.contains("Failed to export"), "{words}");
    // The next run asks for all of Condition, and gets it.
    *files.lock().unwrap() = vec![patients, output("Condition", "/c", lines("Condition", "c", 4))];
    let report = lake.run(&source(&mock, ""), "").await.unwrap();
    assert!(report.succeeded && held(&report).is_empty(), "{report:#?}");
    assert_eq!(lake.ids("Condition").await.len(), 4);
}

// Breaks if an error that names no type, or a type that is not asked for, holds less than all.
#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_names_no_type_of_the_export_holds_all() {
    for (severity, words, more, expected) in [
        ("error", "disk full", "", vec!["Condition", "Patient"]),
        ("fatal", "Claim failed", "", vec!["Condition", "Patient"]),
        ("warning", "disk nearly full", "", vec![]),
        ("error", "disk full", ", export_errors: ignore", vec![]),
        ("error", "disk full", ", ignored_issue_codes: [exception]", vec![]),
        ("error", "disk full", ", ignored_issue_codes: [forbidden]", vec!["Condition", "Patient"]),
    ] {
        let both =
            [output("Patient", "/p", lines("Patient", "p", 2)), output("Condition", "/c", lines("Condition", "c", 2))];
        let error = ("error", "OperationOutcome", "/e", outcome(severity, words));
        let (mock, _) = server(both.into_iter().chain([error]).collect()).await;
        assert_eq!(held(&lake().run(&source(&mock, more), "").await.unwrap()), expected, "{severity} {words}{more}");
    }
}

// Breaks if a server that breaks off in the middle of its rows, and says so or not, is taken for one that gave all.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_end_with_something_else_hold_their_type() {
    let rows = lines("Patient", "p", 3);
    let fatal = String::from_utf8(outcome("fatal", "Zebediah-Quux timed out")).unwrap();
    let cases = [
        (fatal.as_str(), 0),
        (r#"{"error":"timeout"}"#, 0),
        (r#"{"errors":[{"message":"gone"}]}"#, 0),
        ("<html>Bad Gateway</html>", 1),
        ("upstream connect error", 1),
        (r#"{"resourceType":"Patient","id":"p3","na"#, 1),
        ("{\"resourceType\":\"Patient\",\"id\":\"p3\",\"na\n", 1),
        (r#"{"resourceType":"Patient","id":"p3","na{"error":"timeout"}"#, 1),
        ("<html>Bad Gateway</html>\n\n \r\n", 1),
        // ISO-8859-1: as bytes further down.
        ("Acc\u{e8}s refus\u{e9}\n", 1),
    ];
    for (last, bad) in cases {
        let text: Vec<u8> =
            format!("{rows}{last}").chars().map(|letter| u8::try_from(u32::from(letter)).unwrap()).collect();
        let patients = output("Patient", "/p", text);
        let (mock, _) = server(vec![patients, output("Condition", "/c", lines("Condition", "c", 2))]).await;
        let lake = lake();
        let report = lake.run(&source(&mock, ""), "").await.unwrap();
        assert_eq!(held(&report), ["Patient"], "{last}");
        assert_eq!((lake.ids("Patient").await.len(), report.types["Patient"].quarantined), (3, bad), "{last}");
    }
    // A broken resource that others follow is a bad line, which is kept and tried again.
    let patients = output("Patient", "/p", format!("{{\"resourceType\":\"Patient\",!}}\n{rows}"));
    let (mock, _) = server(vec![patients, output("Condition", "/c", lines("Condition", "c", 2))]).await;
    let report = lake().run(&source(&mock, ""), "").await.unwrap();
    assert!(report.succeeded && report.types["Patient"].quarantined == 1, "{report:#?}");
}

// Breaks if bytes that are no export file are taken for an empty one.
#[tokio::test(flavor = "multi_thread")]
async fn files_of_which_nothing_can_be_read_fail_their_type() {
    let zip = b"PK\x03\x04\x14\x00\x00\x00\x08\x00Patient.ndjson\n\x03\x00\xff\xfe".to_vec();
    let latin = b"<html>\n<body>\nAcc\xe8s refus\xe9".to_vec();
    let utf16: Vec<u8> = lines("Patient", "p", 2).encode_utf16().flat_map(u16::to_le_bytes).collect();
    for bytes in [zip, latin, utf16, b"{\"resourceType\":\"Patient\",!}".to_vec(), b"a,b\n1,2\n".to_vec()] {
        let (mock, _) =
            server(vec![output("Patient", "/p", bytes), output("Condition", "/c", lines("Condition", "c", 2))]).await;
        let lake = lake();
        let report = lake.run(&source(&mock, ""), "").await.unwrap();
        let error = report.types["Patient"].error.as_deref().unwrap_or_default();
        assert!(error.contains("not an export file"), "{report:#?}");
        assert_eq!(lake.ids("Condition").await.len(), 2);
        assert!(!lake.tables().join("Patient.parquet/_delta_log").exists());
    }
}

// Breaks if a file whose lines end with CR is one line, or if a CR within a line that ends with LF ends it.
#[tokio::test(flavor = "multi_thread")]
async fn lines_that_end_with_cr_alone() {
    let rows = lines("Patient", "p", 4000);
    let crlf = rows.replace('\n', "\r\n");
    let inner = rows.replace(",\"id\"", ",\r\"id\"");
    for (what, text) in [
        ("CR", rows.replace('\n', "\r")),
        ("CR, and none at the end", rows.trim_end().replace('\n', "\r")),
        ("CR, blanks first", format!("\r\r{}", rows.replace('\n', "\r"))),
        ("CRLF", crlf),
        ("LF first, then CR", rows.replacen('\n', "\0", 1).replace('\n', "\r").replace('\0', "\n")),
        ("CR and LF by turns", rows.replace("1\"}\n", "1\"}\r")),
        ("CR within", inner),
    ] {
        for chunk in ["4KiB", "1MiB"] {
            let lake = lake();
            let (_data, source) = folder(&[("Patient.ndjson", &text)]);
            let report = lake.run(&source, &format!("stages: {{ download: {{ chunk: {chunk} }} }}\n")).await.unwrap();
            assert!(report.succeeded && report.types["Patient"].quarantined == 0, "{what}: {report:#?}");
            assert_eq!(lake.count("Patient").await, 4000, "{what}, {chunk}");
        }
    }
}

// Breaks if a type with many bad lines is merged as if they were few, or if few fail it.
#[tokio::test(flavor = "multi_thread")]
async fn more_than_a_hundred_and_a_hundredth_of_bad_lines_fail_a_type() {
    for (good, bad, setting, fails) in [
        (1000, 100, "", false),
        (1000, 101, "", true),
        (20_000, 150, "", false),
        (1000, 101, "stages: { parse: { max_bad_lines: \"100%\" } }\n", false),
    ] {
        let text = "{\"resourceType\":\"Patient\",!}\n".repeat(bad) + &lines("Patient", "p", good);
        let (_data, source) = folder(&[("Patient.ndjson", &text)]);
        let report = lake().run(&source, setting).await.unwrap();
        assert_eq!(report.types["Patient"].error.is_some(), fails, "{good} {bad}: {report:#?}");
    }
}

/// A lake of three patients, and what a run with this file of deletions makes of it.
async fn deletions(text: &str) -> (Lake, RunReport) {
    let both =
        [output("Patient", "/p", lines("Patient", "p", 3)), output("Condition", "/c", lines("Condition", "c", 1))];
    let (mock, files) = server(both.to_vec()).await;
    let lake = lake();
    assert!(lake.run(&source(&mock, ""), "").await.unwrap().succeeded);
    *files.lock().unwrap() = vec![("deleted", "Bundle", "/d", text.as_bytes().to_vec())];
    let report = lake.run(&source(&mock, ""), "").await.unwrap();
    (lake, report)
}

// Breaks if deletions are lost since their file is none, a line of it cannot be read, or DELETE is written otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn deletions_are_applied_or_hold_the_watermark() {
    let bundle = |method: &str, url: &str| {
        format!(
            "{{\"resourceType\":\"Bundle\",\"type\":\"transaction\",\"entry\":[{{\"request\":{{\"method\":\"{method}\",\"url\":\"{url}\"}}}}]}}\n"
        )
    };
    let (_, report) = deletions("<html>\n<body>Sign in</body>\n").await;
    let error = report.types["Patient"].error.as_deref().unwrap_or_default();
    assert!(!report.succeeded && error.contains("not an export file"), "{report:#?}");

    let text = bundle("delete", "Patient/p0") + &bundle("DELETE", "Patient/p1") + &bundle("PUT", "Patient/p2");
    let (lake, report) = deletions(&text).await;
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(lake.ids("Patient").await, ["p2"]);
    assert_eq!(report.server_deviations["entries of deletion files that are not deletions of FHIR R4's types"], 1);

    // One Bundle with all there is: a type of another FHIR takes nothing away, and is no fault.
    let entry = |url: &str| format!(r#"{{"request":{{"method":"DELETE","url":"{url}"}}}}"#);
    let one = |entries: &[String]| format!("{{\"resourceType\":\"Bundle\",\"entry\":[{}]}}\n", entries.join(","));
    let (lake, report) = deletions(&one(&[entry("Citation/1"), entry("Patient/p0")])).await;
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(lake.ids("Patient").await, ["p1", "p2"]);
    // What cannot be read holds, and what can is applied.
    let (lake, report) = deletions(&one(&[entry("Patient?identifier=x"), entry("Patient/p0")])).await;
    assert_eq!((held(&report), lake.ids("Patient").await.len()), (vec!["Condition", "Patient"], 2));

    let (lake, report) = deletions(&(bundle("DELETE", "Patient/p0") + "rubbish\n")).await;
    assert_eq!(lake.ids("Patient").await, ["p1", "p2"]);
    assert_eq!(held(&report), ["Condition", "Patient"], "a line of deletions is not tried again");
}

// Breaks if a resource that Azure's service marks as deleted becomes a row, stays one, or takes what is newer.
#[tokio::test(flavor = "multi_thread")]
async fn soft_deleted_resources_are_deletions() {
    for value in ["valueString", "valueCode"] {
        soft_deleted(value).await;
    }
}

async fn soft_deleted(value: &str) {
    let marked = |id: &str, version: u32| {
        format!(
            r#"{{"resourceType":"Patient","id":"{id}","meta":{{"versionId":"{version}","lastUpdated":"2026-01-{version:02}T00:00:00Z","extension":[{{"url":"http://azurehealthcareapis.com/data-extensions/deleted-state","{value}":"soft-deleted"}}]}}}}"#
        )
    };
    let row = |id: &str, version: u32| {
        format!(
            r#"{{"resourceType":"Patient","id":"{id}","meta":{{"versionId":"{version}","lastUpdated":"2026-01-{version:02}T00:00:00Z"}}}}"#
        )
    };
    let lake = lake();
    let (_data, source) = folder(&[("Patient.ndjson", &[row("a", 1), row("b", 1), row("c", 5)].join("\n"))]);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    // `b` came back after it was deleted, `d` was there and is gone, and of `c` the table has a newer version.
    let text =
        [marked("a", 2), marked("b", 2), row("b", 3), row("d", 1), marked("d", 2), marked("c", 4), marked("e", 1)]
            .join("\n");
    let (_data, source) = folder(&[("Patient.ndjson", &text)]);
    let report = lake.run(&source, "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(lake.ids("Patient").await, ["b", "c"]);
    assert_eq!(report.types["Patient"].deleted, 1, "{report:#?}");
}

// Breaks if a server that sends the same rows in each of its files is not told of, or one that sends a few twice is.
#[tokio::test(flavor = "multi_thread")]
async fn many_copies_of_the_same_resources_are_reported_with_their_files() {
    let rows = lines("Patient", "p", 200);
    let files = [("1.Patient.ndjson", rows.as_str()), ("2.Patient.ndjson", &rows), ("3.Patient.ndjson", &rows)];
    let (_data, source) = folder(&files);
    let report = lake().run(&source, "").await.unwrap();
    assert_eq!(report.server_deviations["the same resources came more than once"], 400);
    let copies = &report.types["Patient"].copies;
    assert_eq!((copies.len(), copies.values().sum::<u64>()), (2, 400), "{copies:?}");
    let few = lines("Patient", "p", 5);
    let (_data, source) = folder(&[("1.Patient.ndjson", rows.as_str()), ("2.Patient.ndjson", &few)]);
    let report = lake().run(&source, "").await.unwrap();
    assert!(report.server_deviations.is_empty() && report.types["Patient"].copies.is_empty(), "{report:#?}");
}

// Breaks if a file of a folder is passed over in silence, or what is none of a type's stops the others.
#[tokio::test(flavor = "multi_thread")]
async fn folders_are_read_with_what_is_below_them() {
    let row = |name: &str, id: &str| format!("{{\"resourceType\":\"{name}\",\"id\":\"{id}\"}}\n");
    let data = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        let path = data.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    put("1.Patient.ndjson", &row("Patient", "a"));
    put("Patient-001.ndjson", &row("Patient", "b"));
    put("below/further/Patient.jsonl", &row("Patient", "c"));
    put("Patient/part-0.ndjson", &row("Patient", "d"));
    put("everything.jsonl", &(row("Patient", "e") + &row("Device", "f")));
    put(
        "deleted/1.Bundle.ndjson",
        "{\"resourceType\":\"Bundle\",\"entry\":[{\"request\":{\"method\":\"DELETE\",\"url\":\"Patient/gone\"}}]}\n",
    );
    put("log.ndjson", "{\"eventId\":\"kickoff\"}\n");
    put("other.ndjson", "{\"a\":1}\n");
    put(".Patient.ndjson.crc", "crc");
    put("Patient.ndjson.tmp", "half");
    put("notes.txt", "no NDJSON, and not said to be");
    put("Patient.4.txt", &row("Patient", "h"));
    put("Patient.5.json", &row("Patient", "i"));
    let lake = lake();
    let report = lake.run(&super::support::folder_source(data.path()), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(lake.ids("Patient").await, ["a", "b", "c", "d", "e"]);
    assert_eq!(lake.ids("Device").await, ["f"]);
    let passed: Vec<&str> = report.passed_over.values().flatten().map(String::as_str).collect();
    assert_eq!(passed.len(), 7, "{passed:?}");
    assert!(passed.contains(&"deleted/1.Bundle.ndjson"), "nothing says what is newer: {passed:?}");
    assert!(!passed.contains(&"notes.txt"), "{passed:?}");
    // The state and the tables may lie in the folder: what is kept there is none of it.
    std::fs::write(
        lake.folder.path().join("Patient.ndjson"),
        row("Patient", "g") + "{\"resourceType\":\"Patient\",!}\n",
    )
    .unwrap();
    let source = super::support::folder_source(lake.folder.path());
    for _ in 0..2 {
        let report = lake.run(&source, "").await.unwrap();
        assert_eq!((report.succeeded, report.types["Patient"].resources), (true, 1), "{report:#?}");
        assert!(report.passed_over.is_empty(), "{report:#?}");
    }
}

// Breaks if an old dump reverts what the server gave since, or if nobody can make it do so on purpose.
#[tokio::test(flavor = "multi_thread")]
async fn an_undated_copy_in_a_folder_does_not_replace_a_dated_row() {
    let lake = lake();
    let row = |meta: &str| format!(r#"{{"resourceType":"Patient","id":"a"{meta}}}"#);
    let (_data, source) =
        folder(&[("Patient.ndjson", &row(r#","meta":{"lastUpdated":"2026-01-01T00:00:00Z"},"language":"new""#))]);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    let (_data, source) = folder(&[("Patient.ndjson", &row(r#","language":"old""#))]);
    let report = lake.run(&source, "").await.unwrap();
    assert_eq!((report.types["Patient"].updated, report.types["Patient"].undated), (0, 1), "{report:#?}");
    let full = fhirlake::topology::RunOptions { full_refresh: true, ..Default::default() };
    let report = lake.run_with(lake.plan(&source, ""), full).await.unwrap();
    assert_eq!((report.types["Patient"].updated, report.types["Patient"].undated), (1, 0), "{report:#?}");
}

// Breaks if a table that cannot be written fails more than its type.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_cannot_be_written_fails_its_type_alone() {
    let both =
        [output("Patient", "/p", lines("Patient", "p", 3)), output("Condition", "/c", lines("Condition", "c", 2))];
    let (mock, _) = server(both.to_vec()).await;
    let lake = lake();
    assert!(lake.run(&source(&mock, ""), "").await.unwrap().succeeded);
    let log = lake.tables().join("Patient.parquet/_delta_log");
    let change = |version: u64, feature: &str| {
        let protocol = format!(
            "{{\"protocol\":{{\"minReaderVersion\":3,\"minWriterVersion\":7,\"readerFeatures\":[\"deletionVectors\"],\"writerFeatures\":[\"deletionVectors\",\"{feature}\"]}}}}"
        );
        std::fs::write(log.join(format!("{version:020}.json")), protocol).unwrap();
    };
    // A feature that is listed and not used keeps nobody out.
    change(1, "domainMetadata");
    assert!(lake.run(&source(&mock, ""), "").await.unwrap().succeeded);
    let next = std::fs::read_dir(&log)
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|ext| ext == "json"))
        .count();
    change(next as u64, "rowTracking");
    let report = lake.run(&source(&mock, ""), "").await.unwrap();
    assert!(report.types["Patient"].error.as_ref().is_some_and(|error| error.contains("rowTracking")), "{report:#?}");
    assert!(report.types["Condition"].error.is_none() && !report.succeeded, "{report:#?}");
}

// Breaks if resources of a later FHIR, which have no table, fail the types that have one.
#[tokio::test(flavor = "multi_thread")]
async fn types_that_r4_does_not_have_fail_no_other() {
    let (mock, _) = server(vec![
        output("Patient", "/p", lines("Patient", "p", 3)),
        output("Ingredient", "/i", lines("Ingredient", "i", 200)),
    ])
    .await;
    let (lake, all) =
        (lake(), format!("{{ url: \"http://{}/fhir\", retry_for: 1s, max_poll_interval: 1s }}", mock.address));
    // The second run tries the lines in quarantine again.
    for _ in 0..2 {
        let report = lake.run(&all, "").await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        assert_eq!((lake.ids("Patient").await.len(), report.other_bad_lines), (3, 200), "{report:#?}");
    }
}

// Breaks if the server's errors count only where it lists them as errors.
#[tokio::test(flavor = "multi_thread")]
async fn outcomes_that_are_listed_as_output_are_the_servers_words() {
    for (words, expected) in
        [("Failed to export 2.Condition.ndjson", vec!["Condition"]), ("disk full", vec!["Condition", "Patient"])]
    {
        for id in ["", "\"id\":\"o1\","] {
            let text =
                String::from_utf8(outcome("error", words)).unwrap().replace("\"issue\"", &format!("{id}\"issue\""));
            let files = vec![
                output("Patient", "/p", lines("Patient", "p", 3)),
                output("Condition", "/c", lines("Condition", "c", 2)),
                output("OperationOutcome", "/o", text),
            ];
            let (mock, _) = server(files).await;
            let report = lake().run(&source(&mock, ""), "").await.unwrap();
            assert_eq!(held(&report), expected, "{words} {id}: {report:#?}");
        }
    }
}

// Breaks if a file that holds nothing but an error cannot be let through, by those who know that their server always
// says it.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_errors_alone_is_let_through_where_they_are_ignored() {
    let files = vec![
        output("Patient", "/p", outcome("error", "no access")),
        output("Condition", "/c", lines("Condition", "c", 2)),
    ];
    for (more, succeeds) in [
        ("", false),
        (", export_errors: ignore", true),
        (", ignored_issue_codes: [exception]", true),
        (", ignored_issue_codes: [x]", false),
    ] {
        let (mock, _) = server(files.clone()).await;
        let report = lake().run(&source(&mock, more), "").await.unwrap();
        assert_eq!(report.succeeded, succeeds, "{more}: {report:#?}");
    }
}
