//! Folders of NDJSON, in every shape that files come in.

use std::io::Write;

use fhirlake::error::ErrorKind;
use fhirlake::topology::RunOptions;
use proptest::prelude::*;

use super::support::{Lake, folder_source, lake, strings};

fn patient(id: &str, family: &str) -> String {
    format!(r#"{{"resourceType":"Patient","id":"{id}","name":[{{"family":"{family}"}}]}}"#)
}

async fn ids(lake: &Lake, resource_type: &str) -> Vec<String> {
    lake.versions(resource_type).await.into_keys().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_shape_of_file() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let put = |name: &str, bytes: &[u8]| std::fs::write(data.path().join(name), bytes).unwrap();
    put("Patient.bom.ndjson", format!("\u{feff}{}\r\n\r\n  \n{}", patient("a", "A"), patient("b", "B")).as_bytes());
    put("Patient.ndjson", format!("\n{}\n", patient("c", "C")).as_bytes());
    put("Patient.empty.ndjson", b"");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(format!("{}\n", patient("d", "D")).as_bytes()).unwrap();
    put("Patient.001.ndjson.gz", &gzip.finish().unwrap());
    put("Patient.002.ndjson.zst", &zstd::encode_all(patient("e", "E").as_bytes(), 1).unwrap());
    // Packed, and its name does not say so.
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(patient("f", "F").as_bytes()).unwrap();
    put("Patient.003.ndjson", &gzip.finish().unwrap());
    put("notes.txt", b"not ours");
    put("Bundle.ndjson", b"{\"resourceType\":\"Bundle\",\"id\":\"1\",\"type\":\"collection\"}\n");
    let report = lake.run(&folder_source(data.path()), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(ids(&lake, "Patient").await, ["a", "b", "c", "d", "e", "f"]);
    assert_eq!(report.types["Patient"].files, 6);
    assert_eq!(report.excluded["Bundle"], 1);
    assert!(!lake.tables().join("Bundle.parquet").exists(), "an excluded type gets no table");
    assert!(report.transaction_time.is_none(), "a folder has no transactionTime");
}

// Breaks if lines are routed by the file's name instead of their own resourceType.
#[tokio::test(flavor = "multi_thread")]
async fn lines_go_to_the_table_of_their_own_type() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let mixed = format!("{}\n{{\"resourceType\":\"Encounter\",\"id\":\"e1\"}}\n", patient("p1", "A"));
    std::fs::write(data.path().join("Observation.ndjson"), mixed).unwrap();
    let report = lake.run(&folder_source(data.path()), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(ids(&lake, "Patient").await, ["p1"]);
    assert_eq!(ids(&lake, "Encounter").await, ["e1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_is_too_long_goes_to_quarantine_and_its_neighbours_do_not() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let long = patient("long", &"x".repeat(300_000));
    let text = format!("{}\n{long}\n{}\n{}\n", patient("a", "A"), patient("b", &"y".repeat(5000)), patient("c", "C"));
    std::fs::write(data.path().join("Patient.ndjson"), &text).unwrap();
    let rest = "stages: { parse: { max_line: 64KiB }, download: { chunk: 4KiB } }\n";
    let report = lake.run(&folder_source(data.path()), rest).await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(report.types["Patient"].quarantined, 1);
    assert_eq!(ids(&lake, "Patient").await, ["a", "b", "c"]);
    let file = lake.state().join("quarantine").join(format!("{}.ndjson", report.run));
    let kept: serde_json::Value = serde_json::from_str(std::fs::read_to_string(file).unwrap().trim()).unwrap();
    assert_eq!((kept["line"].as_u64(), kept["full_length"].as_u64()), (Some(2), Some(long.len() as u64)));
    assert_eq!(kept["offset"].as_u64(), Some(patient("a", "A").len() as u64 + 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_packed_file_that_is_cut_short_fails_its_type() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for number in 0..500 {
        gzip.write_all(format!("{}\n", patient(&number.to_string(), "A")).as_bytes()).unwrap();
    }
    let packed = gzip.finish().unwrap();
    std::fs::write(data.path().join("Patient.ndjson.gz"), &packed[..packed.len() / 2]).unwrap();
    std::fs::write(data.path().join("Encounter.ndjson"), "{\"resourceType\":\"Encounter\",\"id\":\"e\"}").unwrap();
    let report = lake.run(&folder_source(data.path()), "").await.unwrap();
    assert!(report.types["Patient"].error.as_ref().unwrap().contains("cut short"), "{report:#?}");
    assert!(report.types["Encounter"].error.is_none());
}

// A zstd file that ends in the middle of a frame is not whole, even where a line happens to end there.
#[tokio::test(flavor = "multi_thread")]
async fn a_zstd_file_that_is_cut_short_fails_its_type() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let text: String = (0..20_000).map(|number| format!("{}\n", patient(&number.to_string(), "A"))).collect();
    let packed = zstd::encode_all(text.as_bytes(), 1).unwrap();
    let file = data.path().join("Patient.ndjson.zst");
    std::fs::write(&file, &packed[..packed.len() / 2]).unwrap();
    let report = lake.run(&folder_source(data.path()), "").await.unwrap();
    assert!(report.types["Patient"].error.as_ref().unwrap().contains("cut short"), "{report:#?}");
    // Several frames one after the other are one file.
    std::fs::write(&file, [packed.clone(), zstd::encode_all(patient("x", "B").as_bytes(), 1).unwrap()].concat())
        .unwrap();
    assert!(lake.run(&folder_source(data.path()), "").await.unwrap().succeeded);
    assert_eq!(lake.count("Patient").await, 20_001);
}

#[tokio::test(flavor = "multi_thread")]
async fn file_names_with_odd_letters_and_folders_below() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    for (number, name) in
        ["Patient.ü.ndjson", "Patient.100%.ndjson", "Patient.a#b.ndjson", "Patient.a [1].ndjson"].iter().enumerate()
    {
        std::fs::write(data.path().join(name), patient(&number.to_string(), "A")).unwrap();
    }
    std::fs::create_dir(data.path().join("below")).unwrap();
    std::fs::write(data.path().join("below/Patient.ndjson"), patient("below", "A")).unwrap();
    let report = lake.run(&folder_source(data.path()), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(ids(&lake, "Patient").await, ["0", "1", "2", "3", "below"]);
}

// Copies within a run: the newest wins, whatever the order of files and lines.
#[tokio::test(flavor = "multi_thread")]
async fn duplicates_within_a_run_leave_the_newest() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let copy = |id: &str, meta: &str, family: &str| {
        format!(r#"{{"resourceType":"Patient","id":"{id}","meta":{{{meta}}},"name":[{{"family":"{family}"}}]}}"#)
    };
    let lines = [
        copy("t", r#""lastUpdated":"2026-01-02T00:00:00Z","versionId":"2""#, "new"),
        copy("t", r#""lastUpdated":"2026-01-01T00:00:00Z","versionId":"9""#, "old"),
        copy("v", r#""versionId":"10""#, "new"),
        copy("v", r#""versionId":"9""#, "old"),
        copy("n", "", "old"),
        copy("n", "", "new"),
        copy("s", r#""lastUpdated":"2026-01-01T00:00:00Z""#, "new"),
        copy("s", r#""lastUpdated":"2026-01-09T00:00:00Z","tag":[{"code":"SUBSETTED"}]"#, "old"),
    ];
    std::fs::write(data.path().join("Patient.ndjson"), lines.join("\n")).unwrap();
    let report = lake.run(&folder_source(data.path()), "").await.unwrap();
    assert_eq!((report.types["Patient"].inserted, report.types["Patient"].skipped), (4, 4));
    let batches = lake.sql("SELECT id, name[1]['family'] AS f FROM Patient ORDER BY id").await;
    let families: Vec<_> = batches.iter().flat_map(|batch| strings(batch, "f")).collect();
    assert_eq!(families, vec![Some("new".to_owned()); 4]);
    // And against the table: the older copy alone changes nothing, the newer one does.
    std::fs::write(data.path().join("Patient.ndjson"), &lines[1]).unwrap();
    assert_eq!(lake.run(&folder_source(data.path()), "").await.unwrap().types["Patient"].skipped, 1);
    std::fs::write(data.path().join("Patient.ndjson"), copy("t", r#""lastUpdated":"2026-01-03T00:00:00Z""#, "newer"))
        .unwrap();
    assert_eq!(lake.run(&folder_source(data.path()), "").await.unwrap().types["Patient"].updated, 1);
    assert_eq!(lake.count("Patient").await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_folder_is_an_error_that_says_what_was_looked_for() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let error = lake.run(&folder_source(data.path()), "").await.unwrap_err();
    assert!(error.kind() == ErrorKind::Config && error.to_string().contains("*.ndjson"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    // Any chunking of the bytes gives the same rows; lines, bad ones and blank ones included.
    #[test]
    fn any_chunking_gives_the_same_rows(chunk in 4096usize..20_000, lengths in prop::collection::vec(0usize..9000, 1..40), ends in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let (data, lake) = (tempfile::tempdir().unwrap(), lake());
            let mut text = String::new();
            let (mut good, mut bad) = (Vec::new(), 0);
            for (number, length) in lengths.iter().enumerate() {
                match length % 5 {
                    0 => text.push_str("\r\n"),
                    1 => { text.push_str("{\"resourceType\":\"Patient\"}\n"); bad += 1; }
                    _ => {
                        let id = format!("{number:04}");
                        text.push_str(&format!("{}\n", patient(&id, &"é".repeat(*length / 2))));
                        good.push(id);
                    }
                }
            }
            if !ends { text.truncate(text.trim_end().len()); }
            if good.is_empty() { return Ok(()); }
            std::fs::write(data.path().join("Patient.ndjson"), text).unwrap();
            let report = lake.run(&folder_source(data.path()), &format!("stages: {{ download: {{ chunk: {chunk}B }} }}\n")).await.unwrap();
            prop_assert_eq!(ids(&lake, "Patient").await, good);
            prop_assert_eq!(report.types["Patient"].quarantined, bad);
            Ok(())
        })?;
    }
}

// Breaks if an unchanged line is encoded, if a changed one is not, or if what a run skips is taken for absent: in merge
// and reconcile mode, with versions and without.
#[tokio::test(flavor = "multi_thread")]
async fn what_did_not_change_is_not_encoded() {
    let meta = |versioned: bool| match versioned {
        true => r#","meta":{"versionId":"1","lastUpdated":"2024-01-01T00:00:00Z"}"#,
        false => "",
    };
    for (versioned, mode) in [(false, "merge"), (true, "merge"), (false, "reconcile"), (true, "reconcile")] {
        let line = |number: usize, gender: &str| {
            format!(r#"{{"resourceType":"Patient","id":"p{number}"{},"gender":"{gender}"}}"#, meta(versioned))
        };
        let lines: Vec<String> = (0..50).map(|number| line(number, "male")).collect();
        let data = tempfile::tempdir().unwrap();
        std::fs::write(data.path().join("Patient.ndjson"), lines.join("\n")).unwrap();
        let source = folder_source(data.path());
        let (lake, stages) = (lake(), format!("stages: {{ merge: {{ mode: {mode} }} }}\n"));
        let first = lake.run(&source, &stages).await.unwrap();
        assert_eq!((first.types["Patient"].inserted, first.types["Patient"].unchanged), (50, 0));
        let again = lake.run(&source, &stages).await.unwrap();
        let again = &again.types["Patient"];
        assert_eq!((again.skipped, again.unchanged, again.committed), (50, 50, false), "{versioned} {mode}");
        assert_eq!((again.resources, again.bytes_written), (50, 0));
        assert_eq!(again.line_index.as_deref(), Some("memory"));
        // One changes, one comes twice, one is gone, and one is written in another way.
        let mut changed = lines.clone();
        changed[7] = line(7, "female").replace("\"1\"", "\"2\"");
        changed[8] = changed[8].replace("\"gender\":", "\"gender\": ");
        changed[9] = changed[10].clone();
        std::fs::write(data.path().join("Patient.ndjson"), changed.join("\n")).unwrap();
        let third = lake.run(&source, &stages).await.unwrap();
        let third = &third.types["Patient"];
        let gone = u64::from(mode == "reconcile");
        assert_eq!((third.updated, third.deleted, third.skipped), (1, gone, 49), "{versioned} {mode}");
        // Of a row with a version the form of its line does not matter.
        assert_eq!(third.unchanged, if versioned { 49 } else { 48 });
        assert_eq!(ids(&lake, "Patient").await.len() as u64, 50 - gone);
        // A full refresh trusts no hash.
        let options = RunOptions { full_refresh: true, ..RunOptions::default() };
        let refreshed = lake.run_with(lake.plan(&source, &stages), options).await.unwrap();
        assert_eq!(refreshed.types["Patient"].unchanged, 0);
    }
}
