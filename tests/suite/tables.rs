//! Tables that others made, and what readers see.

use arrow::datatypes::{DataType, Field, Schema};
use fhir_arrow::{Layout, LayoutOptions, arrow_schema};

use super::support::{lake, strings};

fn write(folder: &std::path::Path, name: &str, lines: &[String]) -> String {
    std::fs::write(folder.join(name), lines.join("\n")).unwrap();
    format!("{{ url: \"file://{}\" }}", folder.display())
}

fn patient(id: &str, version: u32, more: &str) -> String {
    format!(r#"{{"resourceType":"Patient","id":"{id}","meta":{{"versionId":"{version}"}}{more}}}"#)
}

// Breaks if rows are marked where the table has no deletion vectors, or if a rewrite loses or reorders rows.
#[tokio::test(flavor = "multi_thread")]
async fn without_deletion_vectors_only_touched_files_are_rewritten() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let rest = "stages: { merge: { deletion_vectors: false } }\n";
    let rows: Vec<String> = (0..50).map(|n| patient(&format!("{n:02}"), 1, "")).collect();
    lake.run(&write(data.path(), "Patient.ndjson", &rows), rest).await.unwrap();
    let more: Vec<String> = (50..60).map(|n| patient(&format!("{n:02}"), 1, "")).collect();
    lake.run(&write(data.path(), "Patient.ndjson", &more), rest).await.unwrap();
    let (_, before) = lake.files("Patient").await;
    // Twice the same id in one run, so that a staged row loses too.
    let changed = vec![patient("07", 2, ""), patient("07", 3, r#","gender":"other""#), patient("99", 1, "")];
    let report = lake.run(&write(data.path(), "Patient.ndjson", &changed), rest).await.unwrap();
    assert_eq!(
        (report.types["Patient"].updated, report.types["Patient"].inserted, report.types["Patient"].skipped),
        (1, 1, 1)
    );
    let (there, after) = lake.files("Patient").await;
    assert_eq!(before.iter().filter(|file| after.contains(file)).count(), 1, "the untouched file stays");
    assert!(
        std::fs::read_dir(lake.tables().join("Patient.parquet"))
            .unwrap()
            .flatten()
            .all(|entry| !entry.file_name().to_string_lossy().contains("deletion_vector"))
    );
    assert!(there.len() >= after.len());
    let versions = lake.versions("Patient").await;
    assert_eq!(versions.len(), 61);
    assert_eq!(versions["07"].as_deref(), Some("3"));
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_vectors_mark_and_grow_and_a_file_without_rows_goes() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let rows: Vec<String> = (0..20).map(|n| patient(&format!("{n:02}"), 1, "")).collect();
    lake.run(&write(data.path(), "Patient.ndjson", &rows), "").await.unwrap();
    let (_, first) = lake.files("Patient").await;
    for version in 2..5 {
        let changed: Vec<String> = (0..version).map(|n| patient(&format!("{n:02}"), version, "")).collect();
        lake.run(&write(data.path(), "Patient.ndjson", &changed), "").await.unwrap();
        let (_, named) = lake.files("Patient").await;
        assert!(named.contains(&first[0]), "marked, not rewritten");
        assert_eq!(lake.count("Patient").await, 20);
    }
    // As Spark counts them: a file whose rows are marked is neither removed nor added.
    let metrics = &lake.history("Patient").await[0]["operationMetrics"];
    let expected = [
        ("numSourceRows", "4"),
        ("numTargetRowsUpdated", "4"),
        ("numTargetRowsInserted", "0"),
        ("numTargetRowsDeleted", "0"),
        ("numOutputRows", "4"),
        ("numTargetFilesAdded", "1"),
        ("numTargetFilesRemoved", "1"),
        ("numTargetDeletionVectorsAdded", "0"),
        ("numTargetDeletionVectorsUpdated", "1"),
    ];
    for (name, value) in expected {
        assert_eq!(metrics[name], value, "{name} of {metrics}");
    }
    let all: Vec<String> = (0..20).map(|n| patient(&format!("{n:02}"), 9, "")).collect();
    lake.run(&write(data.path(), "Patient.ndjson", &all), "").await.unwrap();
    let (_, named) = lake.files("Patient").await;
    assert_eq!(named.len(), 1, "files whose rows are all gone are removed: {named:?}");
    assert!(lake.versions("Patient").await.values().all(|version| version.as_deref() == Some("9")));
}

// A table as the recipe's Python default makes it: no `_fid`, no `_extension`. Its schema stays.
#[tokio::test(flavor = "multi_thread")]
async fn an_existing_table_without_extensions_is_conformed_to() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let source = write(data.path(), "Patient.ndjson", &[patient("a", 1, "")]);
    lake.run(&source, "stages: { encode: { extensions: false } }\n").await.unwrap();
    let extension = r#","extension":[{"url":"u","valueString":"x"}],"gender":"male""#;
    let source = write(data.path(), "Patient.ndjson", &[patient("b", 1, extension)]);
    let report = lake.run(&source, "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(report.types["Patient"].unmapped["Patient.extension"], 1);
    let expected =
        arrow_schema(&Layout::pathling("Patient", &LayoutOptions { extensions: false, ..Default::default() }).unwrap());
    let tables = delta_upsert::Tables::at(&lake.tables().display().to_string()).unwrap();
    assert_eq!(tables.open(&"Patient".into()).await.unwrap().schema().unwrap().unwrap(), expected);
    assert_eq!(lake.count("Patient").await, 2);
}

// Files leave out what they do not fill; readers must see null there, nested columns included.
#[tokio::test(flavor = "multi_thread")]
async fn columns_that_files_leave_out_read_as_null() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let rows = [
        patient("a", 1, r#","name":[{"family":"A"}]"#),
        patient("b", 1, r#","name":[{"given":["B",null,"C"]}],"maritalStatus":{"text":"x"}"#),
    ];
    lake.run(&write(data.path(), "Patient.ndjson", &rows[..1]), "").await.unwrap();
    lake.run(&write(data.path(), "Patient.ndjson", &rows[1..]), "").await.unwrap();
    let batches = lake
        .sql(
            "SELECT id, name[1]['family'] AS f, name[1]['given'][3] AS g, maritalStatus['text'] AS m, maritalStatus \
            IS NULL AS n, _extension IS NULL AS e FROM Patient ORDER BY id",
        )
        .await;
    let column = |name: &str| batches.iter().flat_map(|batch| strings(batch, name)).collect::<Vec<_>>();
    assert_eq!(column("f"), [Some("A".to_owned()), None]);
    assert_eq!(column("g"), [None, Some("C".to_owned())]);
    assert_eq!(column("m"), [None, Some("x".to_owned())]);
    assert_eq!(column("n"), [Some("true".to_owned()), Some("false".to_owned())]);
    // Pathling's decoder fails on a row whose map is null.
    assert_eq!(column("e"), [Some("false".to_owned()), Some("false".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn extensions_land_in_the_map_under_the_fid_of_their_element() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let nested = r#","extension":[{"url":"race","extension":[{"url":"omb","valueCode":"x"}]}],"name":[{"family":"A","extension":[{"url":"onname","valueString":"y"}]}]"#;
    lake.run(&write(data.path(), "Patient.ndjson", &[patient("a", 1, nested)]), "").await.unwrap();
    let batches = lake
        .sql(
            "SELECT map_extract(_extension, _fid)[1][1]['url'] AS top, map_extract(_extension, \
            map_extract(_extension, _fid)[1][1]['_fid'])[1][1]['valueCode'] AS inner_code, map_extract(_extension, \
            name[1]['_fid'])[1][1]['valueString'] AS on_name FROM Patient",
        )
        .await;
    let column = |name: &str| strings(&batches[0], name);
    assert_eq!(column("top"), [Some("race".to_owned())]);
    assert_eq!(column("inner_code"), [Some("x".to_owned())]);
    assert_eq!(column("on_name"), [Some("y".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn values_of_every_kind() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let line = r#"{"resourceType":"Observation","id":"o","meta":{"lastUpdated":"2026-01-02T03:04:05.678901+01:00"},"status":"final","code":{"text":"é\n\"q\""},"valueQuantity":{"value":1.00,"unit":"kg"},"referenceRange":[{"low":{"value":1E3}},{"low":{"value":-0.0000005}}],"unknown":{"x":1},"_status":{"id":"1"},"valueBoolean":"yes","contained":[{}]}"#;
    let report = lake
        .run(
            &write(data.path(), "Observation.ndjson", &[line.to_owned()]),
            "stages: { encode: { source_json: true } }\n",
        )
        .await
        .unwrap();
    let batches = lake
        .sql("SELECT CAST(valueQuantity['value'] AS VARCHAR) AS v, valueQuantity['value_scale'] AS s, CAST(referenceRange[1]['low']['value'] AS VARCHAR) AS e, referenceRange[1]['low']['value_scale'] AS es, CAST(referenceRange[2]['low']['value'] AS VARCHAR) AS r, code['text'] AS t, id_versioned AS i, CAST(meta['lastUpdated'] AS VARCHAR) AS u, _source AS j FROM Observation")
        .await;
    let value = |name: &str| strings(&batches[0], name)[0].clone().unwrap();
    assert_eq!((value("v").as_str(), value("s").as_str()), ("1.000000", "2"));
    assert_eq!((value("e").as_str(), value("es").as_str()), ("1000.000000", "0"));
    assert_eq!(value("r"), "-0.000001");
    assert_eq!(value("t"), "é\n\"q\"");
    assert_eq!(value("i"), "Observation/o");
    assert!(value("u").starts_with("2026-01-02T02:04:05.678901"), "{}", value("u"));
    assert_eq!(value("j"), line);
    let lost = &report.types["Observation"].unmapped;
    for path in ["Observation.unknown", "Observation._status", "Observation.valueBoolean", "Observation.contained"] {
        assert_eq!(lost.get(path), Some(&1), "{path} in {lost:?}");
    }
}

// `id_versioned` is the full id; the partner of any other id is that id.
#[tokio::test(flavor = "multi_thread")]
async fn only_the_resources_own_id_is_versioned_in_full() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let line = r#"{"resourceType":"ImplementationGuide","id":"g","meta":{"versionId":"3"},"packageId":"a.b"}"#;
    lake.run(&write(data.path(), "ImplementationGuide.ndjson", &[line.to_owned()]), "").await.unwrap();
    let sql =
        "SELECT id_versioned AS i, packageId_versioned AS p, meta['versionId_versioned'] AS v FROM ImplementationGuide";
    let batches = lake.sql(sql).await;
    let value = |name: &str| strings(&batches[0], name)[0].clone().unwrap();
    assert_eq!(
        (value("i").as_str(), value("p").as_str(), value("v").as_str()),
        ("ImplementationGuide/g/_history/3", "a.b", "3")
    );
}

// Breaks if a feature that our commits would break is passed over.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_cannot_be_written_is_refused_before_any_work() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let source = write(data.path(), "Patient.ndjson", &[patient("a", 1, "")]);
    std::fs::create_dir_all(lake.tables().join("Patient.parquet")).unwrap();
    let schema = Schema::new(vec![Field::new("id", DataType::Utf8, true)]);
    deltalake::operations::create::CreateBuilder::new()
        .with_location(lake.tables().join("Patient.parquet").display().to_string())
        .with_columns(delta_upsert::delta_schema(&schema).unwrap().fields().cloned())
        .with_configuration_property(deltalake::TableProperty::EnableChangeDataFeed, Some("true"))
        .await
        .unwrap();
    let error = lake.run(&source.replace("}", ", types: [Patient] }"), "").await.unwrap_err();
    assert_eq!(error.kind(), fhirlake::error::ErrorKind::Table);
    assert!(error.to_string().to_lowercase().contains("changedatafeed"), "{error}");
}

/// A table of Patient made by the protocol's own words: an `id` column, and what `change` makes of the first commit.
fn by_hand(lake: &super::support::Lake, change: impl Fn(&mut serde_json::Value, &mut serde_json::Value)) {
    let log = lake.tables().join("Patient.parquet/_delta_log");
    std::fs::create_dir_all(&log).unwrap();
    let field = serde_json::json!({ "name": "id", "type": "string", "nullable": true, "metadata": {} });
    let mut protocol = serde_json::json!({ "minReaderVersion": 1, "minWriterVersion": 2 });
    let mut metadata = serde_json::json!({
        "id": "5fba94ed-9794-4965-ba6e-6ee3c0d22af9", "format": { "provider": "parquet", "options": {} },
        "schema": { "type": "struct", "fields": [field] }, "partitionColumns": [], "configuration": {}, "createdTime": 0
    });
    change(&mut protocol, &mut metadata);
    let schema = metadata.as_object_mut().unwrap().remove("schema").unwrap();
    metadata["schemaString"] = schema.to_string().into();
    let lines = [serde_json::json!({ "protocol": protocol }), serde_json::json!({ "metaData": metadata })];
    std::fs::write(log.join("00000000000000000000.json"), lines.map(|line| line.to_string()).join("\n")).unwrap();
}

// Breaks if a feature that we do not keep is passed over, or one that asks nothing of us is refused.
#[tokio::test(flavor = "multi_thread")]
async fn features_are_refused_by_name_or_asked_nothing_of() {
    type Change = fn(&mut serde_json::Value, &mut serde_json::Value);
    fn features(protocol: &mut serde_json::Value, writer: &[&str]) {
        *protocol = serde_json::json!({ "minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": writer });
    }
    let refused: [(&str, Change); 9] = [
        ("rowTracking", |protocol, _| features(protocol, &["rowTracking", "domainMetadata"])),
        ("clustering", |protocol, _| features(protocol, &["clustering", "domainMetadata"])),
        ("identityColumns.future", |protocol, _| features(protocol, &["identityColumns.future"])),
        ("delta.enableChangeDataFeed=true", |protocol, metadata| {
            protocol["minWriterVersion"] = 4.into();
            metadata["configuration"]["delta.enableChangeDataFeed"] = "true".into();
        }),
        ("delta.columnMapping.mode=name", |protocol, metadata| {
            *protocol = serde_json::json!({ "minReaderVersion": 2, "minWriterVersion": 5 });
            let field = &mut metadata["schema"]["fields"][0]["metadata"];
            *field = serde_json::json!({ "delta.columnMapping.id": 1, "delta.columnMapping.physicalName": "c" });
            metadata["configuration"]["delta.columnMapping.mode"] = "name".into();
        }),
        ("delta.constraints.c", |protocol, metadata| {
            protocol["minWriterVersion"] = 3.into();
            metadata["configuration"]["delta.constraints.c"] = "id > 'a'".into();
        }),
        ("column id with delta.generationExpression", |protocol, metadata| {
            protocol["minWriterVersion"] = 4.into();
            metadata["schema"]["fields"][0]["metadata"]["delta.generationExpression"] = "'a'".into();
        }),
        ("partition columns", |_, metadata| metadata["partitionColumns"] = serde_json::json!(["id"])),
        ("column gender that must not be null", |_, metadata| {
            let fields = metadata["schema"]["fields"].as_array_mut().unwrap();
            fields.push(serde_json::json!({ "name": "gender", "type": "string", "nullable": false, "metadata": {} }));
        }),
    ];
    let (data, source) = super::support::folder(&[("Patient.ndjson", &patient("a", 1, ""))]);
    let named = source.replace("}", ", types: [Patient] }");
    for (name, change) in refused {
        let lake = lake();
        by_hand(&lake, change);
        let error = lake.run(&named, "").await.unwrap_err();
        assert_eq!(error.kind(), fhirlake::error::ErrorKind::Table, "{name}: {error}");
        assert!(error.to_string().contains(name), "{name}: {error}");
        assert_eq!(
            std::fs::read_dir(lake.tables().join("Patient.parquet")).unwrap().count(),
            1,
            "{name}: half-written"
        );
    }
    let taken: [Change; 3] = [
        |_, _| {},
        |protocol, _| features(protocol, &["appendOnly", "changeDataFeed", "generatedColumns", "checkConstraints"]),
        |protocol, metadata| {
            *protocol = serde_json::json!({ "minReaderVersion": 1, "minWriterVersion": 5 });
            metadata["configuration"]["delta.enableChangeDataFeed"] = "false".into();
        },
    ];
    for change in taken {
        let lake = lake();
        by_hand(&lake, change);
        let report = lake.run(&named, "").await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        assert_eq!(lake.ids("Patient").await, ["a"]);
    }
    drop(data);
}

// Breaks if columns are added unasked, if what they would hold is dropped in silence, or if old rows change.
#[tokio::test(flavor = "multi_thread")]
async fn columns_are_added_when_asked_for() {
    let lake = lake();
    // Pathling's older shape of a reference: `reference` and `display` only.
    by_hand(&lake, |_, metadata| {
        let text = |name: &str| serde_json::json!({ "name": name, "type": "string", "nullable": true, "metadata": {} });
        let reference = serde_json::json!({ "type": "struct", "fields": [text("reference"), text("display")] });
        let fields = metadata["schema"]["fields"].as_array_mut().unwrap();
        fields.push(
            serde_json::json!({ "name": "managingOrganization", "type": reference, "nullable": true, "metadata": {} }),
        );
    });
    let line = |id: &str| {
        patient(
            id,
            1,
            r#","gender":"male","managingOrganization":{"reference":"Organization/1","type":"Organization"}"#,
        )
    };
    let run = async |id: &str, rest: &str| {
        let (_data, source) = super::support::folder(&[("Patient.ndjson", &line(id))]);
        let report = lake.run(&source, rest).await.unwrap();
        assert!(report.succeeded, "{report:#?}");
        report.types["Patient"].unmapped.clone()
    };
    let lost = run("a", "").await;
    let paths = ["Patient.gender", "Patient.managingOrganization.type", "Patient.meta"];
    assert!(paths.iter().all(|path| lost.get(*path) == Some(&1)), "{lost:?}");
    let evolve = "stages: { merge: { schema_evolution: add-columns } }\n";
    assert!(run("b", evolve).await.is_empty());
    assert!(run("c", evolve).await.is_empty());
    let sql = "SELECT id, gender, managingOrganization['reference'] AS r, managingOrganization['type'] AS t, \
        meta['versionId'] AS v FROM Patient ORDER BY id";
    let batches = lake.sql(sql).await;
    let column = |name: &str| batches.iter().flat_map(|batch| strings(batch, name)).collect::<Vec<_>>();
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(column("gender"), [None, some("male"), some("male")]);
    assert_eq!(column("r"), [some("Organization/1"), some("Organization/1"), some("Organization/1")]);
    assert_eq!(column("t"), [None, some("Organization"), some("Organization")]);
    assert_eq!(column("v"), [None, some("1"), some("1")]);
    let added: Vec<_> =
        lake.history("Patient").await.into_iter().filter(|info| info["operation"] == "ADD COLUMN").collect();
    assert_eq!(added.len(), 1, "once: {added:?}");
}

// Breaks if a table's protocol is raised unasked, or loses what its version stood for.
#[tokio::test(flavor = "multi_thread")]
async fn a_setting_and_nothing_else_turns_deletion_vectors_on() {
    let lake = lake();
    by_hand(&lake, |protocol, _| protocol["minWriterVersion"] = 4.into());
    let run = async |version: u32, rest: &str| {
        let lines = [patient("a", version, ""), patient(&format!("b{version}"), 1, "")];
        let (_data, source) = super::support::folder(&[("Patient.ndjson", &lines.join("\n"))]);
        assert!(lake.run(&source, rest).await.unwrap().succeeded);
    };
    let evolve = "schema_evolution: add-columns";
    run(1, &format!("stages: {{ merge: {{ {evolve} }} }}\n")).await;
    run(2, &format!("stages: {{ merge: {{ {evolve}, deletion_vectors: true }} }}\n")).await;
    let vectors = || {
        let entries = std::fs::read_dir(lake.tables().join("Patient.parquet")).unwrap().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("deletion_vector")).count()
    };
    assert_eq!(vectors(), 0);
    run(3, &format!("stages: {{ merge: {{ {evolve}, upgrade_deletion_vectors: true }} }}\n")).await;
    run(4, &format!("stages: {{ merge: {{ {evolve}, upgrade_deletion_vectors: true }} }}\n")).await;
    assert_eq!(vectors(), 2);
    assert_eq!(lake.versions("Patient").await["a"].as_deref(), Some("4"));
    assert_eq!(lake.count("Patient").await, 5);
    let tables = delta_upsert::Tables::at(&lake.tables().display().to_string()).unwrap();
    let table = tables.open(&"Patient".into()).await.unwrap();
    let protocol = table.delta().unwrap().snapshot().unwrap().protocol().clone();
    let features: Vec<String> = protocol.writer_features().unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(
        features,
        ["appendOnly", "changeDataFeed", "checkConstraints", "deletionVectors", "generatedColumns", "invariants"],
        "what version 4 stood for, and deletion vectors"
    );
}

// Checkpoints are made apart from commits, at the table's own interval.
#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_come_at_the_tables_interval_and_their_failure_is_not_the_commits() {
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    let place = lake.tables().join("Patient.parquet");
    std::fs::create_dir_all(&place).unwrap();
    let schema = arrow_schema(&Layout::pathling("Patient", &LayoutOptions::default()).unwrap());
    deltalake::operations::create::CreateBuilder::new()
        .with_location(place.display().to_string())
        .with_columns(delta_upsert::delta_schema(&schema).unwrap().fields().cloned())
        .with_configuration_property(deltalake::TableProperty::CheckpointInterval, Some("2"))
        .await
        .unwrap();
    for version in 1..=2 {
        lake.run(&write(data.path(), "Patient.ndjson", &[patient("a", version, "")]), "").await.unwrap();
    }
    assert!(place.join("_delta_log/_last_checkpoint").exists());
    // A folder where the next checkpoint's file would go.
    lake.run(&write(data.path(), "Patient.ndjson", &[patient("a", 3, "")]), "").await.unwrap();
    std::fs::create_dir_all(place.join("_delta_log/00000000000000000004.checkpoint.parquet/x")).unwrap();
    let report = lake.run(&write(data.path(), "Patient.ndjson", &[patient("a", 4, "")]), "").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    assert_eq!(report.types["Patient"].version, Some(4));
    let (there, named) = lake.files("Patient").await;
    assert!(named.iter().all(|file| there.contains(file)), "a committed file is gone: {named:?} of {there:?}");
}

// Breaks if a folder is made under one name and looked for under another.
#[tokio::test(flavor = "multi_thread")]
async fn folders_of_any_name() {
    for name in
        ["a%20b", "a\\b", "100%", "%25", "a%2Fb", "a b", "ä", "a#b?c", "[x]*", "tab\tin", "q'\"", "..x", "~", "a:b"]
    {
        let all = tempfile::tempdir().unwrap();
        let (data, tables) = (all.path().join(name), all.path().join(format!("{name}-t")).join(name));
        std::fs::create_dir(&data).unwrap();
        let yaml = |text: String| serde_json::to_string(&text).unwrap();
        let pipeline = |url: String| {
            let text = format!(
                "version: 1\nname: x\nsource: {{ url: {} }}\ntables: {}\n",
                yaml(url),
                yaml(tables.display().to_string())
            );
            let read = fhirlake::config::read_pipeline(&text, &[]).unwrap();
            fhirlake::topology::RunPlan::resolve(&read).unwrap()
        };
        let url = url::Url::from_directory_path(&data).unwrap().to_string();
        for version in 1..4 {
            std::fs::write(data.join("Patient.ndjson"), patient("a", version, "")).unwrap();
            let (watch, stop) = (Default::default(), Default::default());
            let run = fhirlake::topology::run(pipeline(url.clone()), Default::default(), &watch, &stop).await;
            let report = run.unwrap_or_else(|error| panic!("{name}: {error}"));
            let of = &report.types["Patient"];
            assert!(report.succeeded && of.inserted + of.updated == 1, "{name}: {report:#?}");
        }
        assert!(tables.join("Patient.parquet/_delta_log/00000000000000000002.json").is_file(), "{name}");
        let rows = super::support::sql(&tables, "SELECT id FROM Patient").await;
        assert_eq!(rows.iter().map(|batch| batch.num_rows()).sum::<usize>(), 1, "{name}");
        let names: Vec<_> = std::fs::read_dir(all.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(names.len(), 2, "{name}: {names:?}");
    }
}

// Breaks if a checkpoint that cannot be read keeps out of a table whose commits are all there, or stays bad.
#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_that_cannot_be_read_are_passed_over() {
    type Break = fn(&std::path::Path);
    async fn with_checkpoint(lake: &super::support::Lake) {
        let url = url::Url::from_directory_path(lake.tables().join("Patient.parquet")).unwrap();
        let table = deltalake::open_table(url).await.unwrap();
        deltalake::checkpoints::create_checkpoint(&table, None).await.unwrap();
    }
    let checkpoint = |log: &std::path::Path| {
        let names = std::fs::read_dir(log).unwrap().flatten().map(|entry| entry.path());
        let mut found: Vec<_> = names.filter(|path| path.to_string_lossy().ends_with(".checkpoint.parquet")).collect();
        found.sort();
        found.pop().unwrap()
    };
    let breaks: [(&str, Break); 5] = [
        ("cut", |path| {
            let bytes = std::fs::read(path).unwrap();
            std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("empty", |path| std::fs::write(path, b"").unwrap()),
        ("rubbish", |path| std::fs::write(path, b"not a checkpoint").unwrap()),
        ("missing, and named", |path| std::fs::remove_file(path).unwrap()),
        ("named wrongly", |path| {
            let hint = path.with_file_name("_last_checkpoint");
            std::fs::write(hint, r#"{"version":7,"size":3}"#).unwrap();
        }),
    ];
    for (what, broken) in breaks {
        let (data, lake) = (tempfile::tempdir().unwrap(), lake());
        let source = |version: u32| {
            write(data.path(), "Patient.ndjson", &[patient("a", version, ""), patient("b", version, "")])
        };
        for version in 1..=4 {
            assert!(lake.run(&source(version), "").await.unwrap().succeeded);
        }
        with_checkpoint(&lake).await;
        let log = lake.tables().join("Patient.parquet/_delta_log");
        let first = checkpoint(&log);
        broken(&first);
        let report = lake.run(&source(5), "").await.unwrap();
        assert!(report.succeeded && report.types["Patient"].updated == 2, "{what}: {report:#?}");
        assert_eq!(lake.count("Patient").await, 2, "{what}");
        // From now on there is a good one: the log can be read from it alone.
        if what != "named wrongly" {
            let good = checkpoint(&log);
            assert!(good > first || what.starts_with("missing"), "{what}: {}", good.display());
            for version in 0..4 {
                std::fs::remove_file(log.join(format!("{version:020}.json"))).unwrap();
            }
            assert!(lake.run(&source(6), "").await.unwrap().succeeded, "{what}");
            assert_eq!(lake.count("Patient").await, 2, "{what}");
        }
    }
    // Where older commits are gone, the checkpoint is what there is: its type fails, and says why.
    let (data, lake) = (tempfile::tempdir().unwrap(), lake());
    for version in 1..=4 {
        let source = write(data.path(), "Patient.ndjson", &[patient("a", version, "")]);
        assert!(lake.run(&source, "").await.unwrap().succeeded);
    }
    with_checkpoint(&lake).await;
    let log = lake.tables().join("Patient.parquet/_delta_log");
    std::fs::remove_file(log.join(format!("{:020}.json", 1))).unwrap();
    std::fs::write(checkpoint(&log), b"cut").unwrap();
    std::fs::write(data.path().join("Device.ndjson"), r#"{"resourceType":"Device","id":"d"}"#).unwrap();
    let report = lake.run(&format!("{{ url: \"file://{}\" }}", data.path().display()), "").await.unwrap();
    let error = report.types["Patient"].error.as_deref().unwrap_or_default();
    assert!(error.contains("checkpoint") && report.types["Device"].error.is_none(), "{report:#?}");
}
