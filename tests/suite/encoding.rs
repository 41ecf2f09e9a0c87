//! What becomes of values: through the whole pipeline, from lines to answers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fhirlake::error::ErrorKind;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::support::{Lake, folder, folder_source, lake, strings};

async fn answer(lake: &Lake, question: &str) -> Vec<Vec<Option<String>>> {
    let batches = lake.sql(question).await;
    let mut rows = Vec::new();
    for batch in &batches {
        let columns: Vec<_> = batch.schema().fields().iter().map(|field| strings(batch, field.name())).collect();
        rows.extend(
            (0..batch.num_rows()).map(|row| columns.iter().map(|column| column[row].clone()).collect::<Vec<_>>()),
        );
    }
    rows
}

fn some(row: &[&str]) -> Vec<Option<String>> {
    row.iter().map(|text| (*text != "NULL").then(|| (*text).to_owned())).collect()
}

/// The Parquet files of a table's folder.
fn parquet_files(lake: &Lake, resource_type: &str) -> Vec<PathBuf> {
    let folder = lake.tables().join(format!("{resource_type}.parquet"));
    let files = std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "parquet")).collect()
}

fn metadata(path: &Path) -> ParquetMetaData {
    SerializedFileReader::new(std::fs::File::open(path).unwrap()).unwrap().metadata().clone()
}

// Breaks if a decimal loses its scale or a digit that the table has room for, or if its exponent is misread.
#[tokio::test(flavor = "multi_thread")]
async fn decimals_keep_value_and_scale() {
    let written = [
        ("a", "1.00", "1.000000", "2"),
        ("b", "-0.5", "-0.500000", "1"),
        ("c", "1E3", "1000.000000", "0"),
        ("d", "1.23e-4", "0.000123", "6"),
        ("e", "0.0000005", "0.000001", "7"),
        ("f", "12345678901234567890123456", "12345678901234567890123456.000000", "0"),
        ("g", "123456789012345678901234567.5", "NULL", "1"),
        ("h", "1e400", "NULL", "0"),
    ];
    let lines: String = written
        .iter()
        .map(|(id, text, ..)| {
            format!("{{\"resourceType\":\"Observation\",\"id\":\"{id}\",\"valueQuantity\":{{\"value\":{text}}}}}\n")
        })
        .collect();
    let (_data, source) = folder(&[("Observation.ndjson", &lines)]);
    let lake = lake();
    let report = lake.run(&source, "").await.unwrap();
    let found = answer(
        &lake,
        "SELECT id, CAST(\"valueQuantity\"['value'] AS VARCHAR) AS v, CAST(\"valueQuantity\"['value_scale'] AS \
            VARCHAR) AS s FROM \"Observation\" ORDER BY id",
    )
    .await;
    let expected: Vec<_> = written.iter().map(|(id, _, value, scale)| some(&[id, value, scale])).collect();
    assert_eq!(found, expected);
    assert_eq!(
        report.types["Observation"].unmapped,
        BTreeMap::from([("Observation.valueQuantity.value".to_owned(), 3)])
    );
}

// 76 kg is 76000 g, in every place where a quantity can stand; what is not UCUM has no canonical form.
#[tokio::test(flavor = "multi_thread")]
async fn quantities_have_their_canonical_form() {
    let lines = concat!(
        r#"{"resourceType":"Observation","id":"a","valueQuantity":{"value":76,"unit":"kg","code":"kg"},"component":[{"valueQuantity":{"value":1.0,"code":"mm"}},{"valueQuantity":{"value":120,"code":"mm[Hg]"}}]}"#,
        "\n",
        r#"{"resourceType":"Observation","id":"b","valueQuantity":{"value":3,"unit":"tablets","code":"TAB"},"referenceRange":[{"low":{"value":36.6,"code":"Cel"}}]}"#,
        "\n",
        r#"{"resourceType":"Observation","id":"c","valueQuantity":{"unit":"kg","code":"kg"}}"#,
        "\n",
    );
    let (_data, source) = folder(&[("Observation.ndjson", lines)]);
    let lake = lake();
    lake.run(&source, "").await.unwrap();
    let shown = |column: &str| {
        format!(
            "CAST({column}['_value_canonicalized']['value'] AS VARCHAR) || '/' || \
                CAST({column}['_value_canonicalized']['scale'] AS VARCHAR) || ' ' || {column}['_code_canonicalized']"
        )
    };
    let question = format!(
        "SELECT id, {} AS q, {} AS c1, {} AS c2, {} AS low FROM \"Observation\" ORDER BY id",
        shown("\"valueQuantity\""),
        shown("\"component\"[1]['valueQuantity']"),
        shown("\"component\"[2]['valueQuantity']"),
        shown("\"referenceRange\"[1]['low']"),
    );
    assert_eq!(
        answer(&lake, &question).await,
        [
            some(&["a", "76000/0 g", "1/3 m", "15998640/0 g.m-1.s-2", "NULL"]),
            some(&["b", "NULL", "NULL", "NULL", "30975/2 K"]),
            some(&["c", "NULL", "NULL", "NULL", "NULL"]),
        ]
    );
}

// Instants of any offset and precision; ids longer than FHIR allows; lists with nulls, at their end too.
#[tokio::test(flavor = "multi_thread")]
async fn odd_and_held() {
    let long = "x".repeat(300);
    let lines = format!(
        concat!(
            r#"{{"resourceType":"Patient","id":"{long}","meta":{{"versionId":"7","lastUpdated":"2020-02-29T23:59:59.1234567+14:00"}},"name":[{{"given":["A",null,"B",null],"_given":[null,{{"id":"x"}}]}}]}}"#,
            "\n",
            r#"{{"resourceType":"Patient","id":"b","meta":{{"lastUpdated":"2020-02-29T23:59:59Z"}},"name":[{{"given":["C",null]}}]}}"#,
            "\n",
            r#"{{"resourceType":"Patient","id":"c","active":true}}"#,
            "\n",
        ),
        long = long
    );
    let (_data, source) = folder(&[("Patient.ndjson", &lines)]);
    let lake = lake();
    let report = lake.run(&source, "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    let found = answer(
        &lake,
        "SELECT id, id_versioned AS v, CAST(meta['lastUpdated'] AS VARCHAR) AS t, array_to_string(name[1]['given'], \
            ',', '-') AS g FROM \"Patient\" ORDER BY id",
    )
    .await;
    assert_eq!(
        found,
        [
            some(&["b", "Patient/b", "2020-02-29T23:59:59Z", "C,-"]),
            some(&["c", "Patient/c", "NULL", "NULL"]),
            some(&[&long, &format!("Patient/{long}/_history/7"), "2020-02-29T09:59:59.123456Z", "A,-,B,-"]),
        ]
    );
    assert_eq!(report.types["Patient"].unmapped, BTreeMap::from([("Patient.name._given".to_owned(), 1)]));
}

// Breaks if anything that the table cannot hold is dropped without being counted under its path.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_held_is_counted_by_path_and_kept_in_source() {
    let line = concat!(
        r#"{"resourceType":"Observation","id":"a","contained":[{"resourceType":"Patient","id":"p"}],"modifierExtension":[{"url":"u","valueCode":"c"}],"#,
        r#""status":7,"effectiveInstant":"yesterday","valueInteger":1.5,"issued":"2020-01-01","unheardOf":{"a":1},"category":{"text":"no list"},"#,
        r#""note":["no object",{"text":"t"},{}],"code":{"coding":[{"code":"1","extension":[{"url":"u","valueUri":"v"}]}],"_text":{"extension":[{"url":"w"}]}}, "focus": [] }"#
    );
    let (_data, source) = folder(&[("Observation.ndjson", &format!("{line}\n"))]);
    let lake = lake();
    let report = lake.run(&source, "stages: { encode: { source_json: true } }\n").await.unwrap();
    let unmapped = &report.types["Observation"].unmapped;
    let expected = [
        "Observation.contained",
        "Observation.modifierExtension",
        "Observation.status",
        "Observation.effectiveInstant",
        "Observation.valueInteger",
        "Observation.issued",
        "Observation.unheardOf",
        "Observation.category",
        "Observation.note",
        "Observation.extension.valueUri",
        "Observation.code._text",
    ];
    assert_eq!(unmapped.len(), expected.len(), "{unmapped:#?}");
    for path in expected {
        assert_eq!(unmapped.get(path), Some(&1), "{path}: {unmapped:#?}");
    }
    let found = answer(&lake, "SELECT _source, code['coding'][1]['code'] AS code FROM \"Observation\"").await;
    assert_eq!(found, [some(&[line, "1"])]);
}

// What comes twice is kept once and counted; what is no extension is counted; nothing makes an element that has
// nothing.
#[tokio::test(flavor = "multi_thread")]
async fn twice_and_hollow() {
    let lines = concat!(
        r#"{"resourceType":"Patient","id":"a","gender":"male","gender":"female","extension":[{"url":"u"}],"extension":[{"url":"v"}],"maritalStatus":{"extension":["lost"]}}"#,
        "\n",
        r#"{"resourceType":"Patient","id":"b","maritalStatus":{"extension":[]},"extension":[7,{}],"name":[{"family":null}],"Smith_1970":1}"#,
        "\n",
    );
    let quantity = r#"{"resourceType":"Observation","id":"o","valueQuantity":{"value":1e30,"value":5.25,"code":"kg"}}"#;
    let (_data, source) = folder(&[("Patient.ndjson", lines), ("Observation.ndjson", quantity)]);
    let lake = lake();
    let report = lake.run(&source, "").await.unwrap();
    let question = "SELECT id, gender, \"maritalStatus\" IS NULL AS m, CAST(cardinality(_extension) AS VARCHAR) AS e, \
        _extension IS NULL AS n FROM \"Patient\" ORDER BY id";
    let found = answer(&lake, question).await;
    assert_eq!(found[0], some(&["a", "male", "true", "1", "false"]));
    assert_eq!(found[1][..3], some(&["b", "NULL", "true"]));
    assert_eq!(found[1][4].as_deref(), Some("false"), "an empty map, as Pathling writes it");
    // A member's name that does not look like one of FHIR's is not repeated: it may be anything.
    let expected =
        [("Patient.gender", 1), ("Patient.extension", 2), ("Patient.maritalStatus.extension", 1), ("Patient.?", 1)];
    let expected = BTreeMap::from(expected.map(|(path, count)| (path.to_owned(), count)));
    assert_eq!(report.types["Patient"].unmapped, expected);
    let question = "SELECT \"valueQuantity\"['value'] IS NULL AS v, CAST(\"valueQuantity\"['value_scale'] AS VARCHAR) \
        AS s, CAST(\"valueQuantity\"['_value_canonicalized']['value'] AS VARCHAR) AS c FROM \"Observation\"";
    assert_eq!(answer(&lake, question).await, [some(&["true", "0", "1000000000000000000000000000000000"])]);
}

// One rich row among millions of small ones must not multiply memory by its columns.
#[tokio::test(flavor = "multi_thread")]
async fn sparse_rows_close_a_batch_by_their_columns() {
    let rich: Vec<String> =
        (0..300).map(|n| format!("{{\"url\":\"u{n}\",\"valueAddress\":{{\"city\":\"c\"}}}}")).collect();
    let mut lines = format!(
        "{{\"resourceType\":\"Patient\",\"id\":\"rich\",\"extension\":[{}],\"name\":[{{\"family\":\"f\",\"period\":{{\"start\":\"2020\",\"end\":\"2021\"}}}}],\"contact\":[{{\"name\":{{\"text\":\"t\"}}}}]}}\n",
        rich.join(",")
    );
    for n in 0..40_000 {
        lines.push_str(&format!("{{\"resourceType\":\"Patient\",\"id\":\"{n}\"}}\n"));
    }
    let (_data, source) = folder(&[("Patient.ndjson", &lines)]);
    let lake = lake();
    let settings = "stages: { parse: { workers: 1 }, encode: { workers: 1, row_group: 256KiB } }\n";
    assert!(lake.run(&source, settings).await.unwrap().succeeded);
    assert_eq!(lake.count("Patient").await, 40_001);
}

// The table cannot keep what it has no column for: asked to keep the source there, the run says so.
#[tokio::test(flavor = "multi_thread")]
async fn source_json_needs_its_column() {
    let (_data, source) = folder(&[("Patient.ndjson", "{\"resourceType\":\"Patient\",\"id\":\"a\"}\n")]);
    let lake = lake();
    lake.run(&source, "").await.unwrap();
    let settings = "stages: { encode: { source_json: true } }\n";
    // Before anything is read, where the type is asked for by name.
    let named = source.replace(" }", ", types: [Patient] }");
    let error = lake.run(&named, settings).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Table && error.to_string().contains("_source"), "{error}");
    // Else the type fails when it comes.
    let report = lake.run(&source, settings).await.unwrap();
    assert!(!report.succeeded);
    assert!(report.types["Patient"].error.as_ref().is_some_and(|error| error.contains("_source")), "{report:#?}");
}

// Breaks if a file's bytes depend on anything but its lines: with one worker a stage, in whatever order threads run.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_lines_give_the_same_bytes() {
    let lines: String = (0..5_000)
        .map(|n| {
            format!(
                "{{\"resourceType\":\"Observation\",\"id\":\"o{n}\",\"extension\":[{{\"url\":\"u\",\"valueString\":\"{n}\"}}],\"valueQuantity\":{{\"value\":{}.{n},\"code\":\"kg\"}},\"subject\":{{\"reference\":\"Patient/{}\"}}}}\n",
                n % 7,
                n % 50
            )
        })
        .collect();
    let (_data, source) = folder(&[("Observation.ndjson", &lines)]);
    let settings = "stages: { download: { concurrency: 1, chunk: 64KiB }, parse: { workers: 1 }, encode: { workers: 1, row_group: 256KiB } }\n";
    let mut seen = Vec::new();
    for _ in 0..2 {
        let lake = lake();
        lake.run(&source, settings).await.unwrap();
        let files = parquet_files(&lake, "Observation");
        let mut bytes: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
        bytes.sort();
        seen.push(bytes);
    }
    assert!(seen[0].iter().map(Vec::len).sum::<usize>() > 10_000);
    assert!(seen[0] == seen[1], "two runs of one file wrote different bytes");
}

// Files hold the top-level columns that they fill, with all that is within: Spark before 4.1 takes a group for null
// where none of the columns that a query asks for is there. A setting writes what is filled alone, another every
// column.
#[tokio::test(flavor = "multi_thread")]
async fn files_hold_the_columns_that_they_fill_or_all() {
    let lines = r#"{"resourceType":"Patient","id":"a","gender":"female","birthDate":"1970-01-01","name":[{"family":"A"}],"extension":[{"url":"u","valueCode":"c"}]}"#;
    let (_data, source) = folder(&[("Patient.ndjson", lines)]);
    let (sparse, full, usual) = (lake(), lake(), lake());
    sparse.run(&source, "stages: { encode: { columns: filled } }\n").await.unwrap();
    usual.run(&source, "").await.unwrap();
    full.run(&source, "stages: { encode: { columns: all } }\n").await.unwrap();
    let columns = |lake: &Lake| {
        let [file] = &parquet_files(lake, "Patient")[..] else { panic!("not one file") };
        metadata(file).file_metadata().schema_descr().num_columns()
    };
    // The table has 414 (its golden schema's leaves), and the file the hash of each row's line.
    assert_eq!(columns(&full), 414 + 1);
    let bare = lake();
    let section = "stages: { encode: { columns: all }, parse: { skip_unchanged: false } }\n";
    bare.run(&source, section).await.unwrap();
    assert_eq!(columns(&bare), 414);
    assert!(columns(&sparse) < 250, "{}", columns(&sparse));
    let names = |lake: &Lake| {
        let [file] = &parquet_files(lake, "Patient")[..] else { panic!("not one file") };
        let schema = metadata(file).file_metadata().schema_descr().clone();
        schema.columns().iter().map(|column| column.path().string()).collect::<std::collections::BTreeSet<_>>()
    };
    let (all, usual_names) = (names(&full), names(&usual));
    let filled = ["id", "id_versioned", "gender", "birthDate", "name", "_fid", "_extension", delta_upsert::LINE_HASH];
    let top = |name: &String| filled.contains(&name.split('.').next().unwrap());
    assert_eq!(usual_names, all.iter().filter(|name| top(name)).cloned().collect());
    assert_eq!(
        answer(&usual, "SELECT id, name[1]['period']['start'] AS p, name[1]['family'] AS f FROM \"Patient\"").await,
        answer(&full, "SELECT id, name[1]['period']['start'] AS p, name[1]['family'] AS f FROM \"Patient\"").await
    );
    let question = "SELECT id, gender, \"birthDate\", name[1]['family'] AS f, contact IS NULL AS c, \
        \"maritalStatus\"['text'] AS m FROM \"Patient\"";
    assert_eq!(answer(&sparse, question).await, answer(&full, question).await);
}

// What readers filter by has statistics, `id` a bloom filter, pages are zstd; and no other column pays for a footer.
#[tokio::test(flavor = "multi_thread")]
async fn parquet_files_are_made_for_readers() {
    let lines: String = (0..500)
        .map(|n| {
            format!(
                "{{\"resourceType\":\"MedicationRequest\",\"id\":\"m{n:03}\",\"status\":\"active\",\"authoredOn\":\"2020-01-{:02}\",\"subject\":{{\"reference\":\"Patient/{n}\",\"display\":\"x\"}},\"note\":[{{\"text\":\"take {n}\"}}],\"medicationCodeableConcept\":{{\"coding\":[{{\"code\":\"1{n}\",\"display\":\"d\"}}]}}}}\n",
                n % 28 + 1
            )
        })
        .collect();
    let (_data, source) = folder(&[("MedicationRequest.ndjson", &lines)]);
    let lake = lake();
    lake.run(&source, "stages: { parse: { workers: 1 }, encode: { workers: 1 } }\n").await.unwrap();
    let [file] = &parquet_files(&lake, "MedicationRequest")[..] else { panic!("not one file") };
    let metadata = metadata(file);
    let mut with_statistics = Vec::new();
    for column in metadata.row_group(0).columns() {
        let path = column.column_path().string();
        let packed = column.compression().to_string().starts_with("ZSTD");
        assert_eq!(packed, path != delta_upsert::LINE_HASH, "{path}: {}", column.compression());
        assert_eq!(column.bloom_filter_offset().is_some(), path == "id", "{path}");
        let encodings: Vec<String> = column.encodings().map(|encoding| encoding.to_string()).collect();
        let has_dictionary = encodings.iter().any(|encoding| encoding.contains("DICTIONARY"));
        match path.as_str() {
            // Ids never repeat, and narratives hardly.
            "id" | "id_versioned" | "note.list.element.text" => assert!(!has_dictionary, "{path}: {encodings:?}"),
            "status" | "authoredOn" => assert!(has_dictionary, "{path}: {encodings:?}"),
            _ => {}
        }
        if column.statistics().is_some() {
            with_statistics.push(path);
        }
    }
    let expected =
        ["id", "status", "medicationCodeableConcept.coding.list.element.code", "subject.reference", "authoredOn"];
    assert_eq!(with_statistics, expected);
}

/// A Binary whose line has about `megabytes`.
fn binary(id: &str, megabytes: usize) -> String {
    format!(
        "{{\"resourceType\":\"Binary\",\"id\":\"{id}\",\"contentType\":\"application/pdf\",\"data\":\"{}\"}}\n",
        "QUJD".repeat(megabytes * 250_000)
    )
}

// A 200 MB resource passes where its limit allows it, and is refused where not; the others notice neither.
#[tokio::test(flavor = "multi_thread")]
async fn one_giant_resource_passes_or_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let patients: String = (0..2_000).map(|n| format!("{{\"resourceType\":\"Patient\",\"id\":\"p{n}\"}}\n")).collect();
    std::fs::write(data.path().join("Patient.ndjson"), patients).unwrap();
    std::fs::write(data.path().join("Binary.ndjson"), binary("small", 1) + &binary("giant", 200) + &binary("last", 1))
        .unwrap();
    for (settings, binaries, refused) in [("", 2, 1), ("stages: { parse: { max_line: 256MiB } }\n", 3, 0)] {
        let lake = lake();
        let report = lake.run(&folder_source(data.path()), settings).await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        assert_eq!(lake.count("Patient").await, 2_000);
        assert_eq!(lake.count("Binary").await, binaries);
        assert_eq!(report.types["Binary"].quarantined, refused);
    }
}
