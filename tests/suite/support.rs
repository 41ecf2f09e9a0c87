//! What the tests share: a pipeline on a temporary folder, and the tables read back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use arrow::array::{Array, AsArray, RecordBatch};
use bulk_data_server::{DEMO_TYPES, Population};
use delta_upsert::Tables;
use deltalake::datafusion::common::TableReference;
use deltalake::datafusion::prelude::{SessionConfig, SessionContext};
use fhirlake::config::{Problem, read_pipeline};
use fhirlake::error::Result;
use fhirlake::state::StateStore;
use fhirlake::topology::RunPlan;
use fhirlake::topology::{RunOptions, RunReport, Watch, run};
use flow::Cancellation;

/// A folder with tables and state of its own.
pub(crate) struct Lake {
    pub folder: tempfile::TempDir,
}

pub(crate) fn lake() -> Lake {
    Lake { folder: tempfile::tempdir().unwrap() }
}

impl Lake {
    pub(crate) fn tables(&self) -> PathBuf {
        self.folder.path().join("tables")
    }
    pub(crate) fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }
    /// What the pipeline remembers.
    pub(crate) fn state_store(&self) -> StateStore {
        StateStore::local(&self.state(), None)
    }
    /// A pipeline with `source` for its source and `rest` behind it, both YAML.
    fn yaml(&self, source: &str, rest: &str) -> String {
        format!(
            "version: 1\nname: test\nsource: {source}\ntables: {}\nstate: {}\n{rest}",
            self.tables().display(),
            self.state().display()
        )
    }
    /// The pipeline as a file, for the binary.
    pub(crate) fn pipeline_file(&self, source: &str) -> PathBuf {
        let file = self.folder.path().join("p.yaml");
        std::fs::write(&file, self.yaml(source, "")).unwrap();
        file
    }
    /// The pipeline's plan.
    pub(crate) fn plan(&self, source: &str, rest: &str) -> RunPlan {
        let error = |problems: Vec<Problem>| Problem::error("test", &problems).to_string();
        let read = read_pipeline(&self.yaml(source, rest), &[]).map_err(error).unwrap();
        RunPlan::resolve(&read).map_err(error).unwrap()
    }
    pub(crate) async fn run(&self, source: &str, rest: &str) -> Result<RunReport> {
        self.run_with(self.plan(source, rest), RunOptions::default()).await
    }
    pub(crate) async fn run_with(&self, plan: RunPlan, options: RunOptions) -> Result<RunReport> {
        run(plan, options, &Watch::default(), &Cancellation::default()).await
    }
    pub(crate) async fn sql(&self, question: &str) -> Vec<RecordBatch> {
        sql(&self.tables(), question).await
    }
    /// Version by id.
    pub(crate) async fn versions(&self, resource_type: &str) -> BTreeMap<String, Option<String>> {
        let batches = self.sql(&format!("SELECT id, meta['versionId'] AS v FROM {resource_type}")).await;
        let mut found = BTreeMap::new();
        for batch in batches {
            let ids = strings(&batch, "id");
            for (id, version) in ids.into_iter().zip(strings(&batch, "v")) {
                let id = id.unwrap();
                assert!(found.insert(id.clone(), version).is_none(), "{resource_type}/{id} stands twice");
            }
        }
        found
    }
    /// Ids, sorted.
    pub(crate) async fn ids(&self, resource_type: &str) -> Vec<String> {
        let batches = self.sql(&format!("SELECT id FROM {resource_type} ORDER BY id")).await;
        batches.iter().flat_map(|batch| strings(batch, "id")).flatten().collect()
    }
    pub(crate) async fn count(&self, resource_type: &str) -> i64 {
        let batches = self.sql(&format!("SELECT count(*) AS n FROM {resource_type}")).await;
        batches[0].column(0).as_primitive::<arrow::datatypes::Int64Type>().value(0)
    }
    /// The table's commit infos, the newest first.
    pub(crate) async fn history(&self, resource_type: &str) -> Vec<serde_json::Value> {
        let log = self.tables().join(format!("{resource_type}.parquet/_delta_log"));
        let mut commits: Vec<PathBuf> = std::fs::read_dir(log).unwrap().flatten().map(|entry| entry.path()).collect();
        commits.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        commits.sort();
        let info = |path: &PathBuf| {
            let text = std::fs::read_to_string(path).unwrap();
            let mut lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
            lines.find_map(|mut line| line.get_mut("commitInfo").map(serde_json::Value::take))
        };
        commits.iter().rev().filter_map(info).collect()
    }
    /// Rows at a version of the past.
    pub(crate) async fn count_at(&self, resource_type: &str, version: u64) -> i64 {
        let folder = self.tables().join(format!("{resource_type}.parquet"));
        let url = url::Url::from_directory_path(folder).unwrap();
        let table = deltalake::open_table_with_version(url, version).await.unwrap();
        let session = SessionContext::new();
        session.register_table("t", table.table_provider().await.unwrap()).unwrap();
        let batches = session.sql("SELECT count(id) FROM t").await.unwrap().collect().await.unwrap();
        batches[0].column(0).as_primitive::<arrow::datatypes::Int64Type>().value(0)
    }
    /// Files in a table's folder, and files that its log names.
    pub(crate) async fn files(&self, resource_type: &str) -> (Vec<String>, Vec<String>) {
        let folder = self.tables().join(format!("{resource_type}.parquet"));
        let mut there: Vec<String> = std::fs::read_dir(&folder)
            .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
            .unwrap_or_default();
        // Those still being written have a suffix of the store's own.
        there.retain(|name| name.contains(".parquet"));
        there.sort();
        let table =
            Tables::at(&self.tables().display().to_string()).unwrap().open(&resource_type.into()).await.unwrap();
        let mut named: Vec<String> = match table.delta() {
            Some(delta) => {
                let snapshot = delta.snapshot().unwrap();
                snapshot.log_data().iter().map(|file| file.path().into_owned()).collect()
            }
            None => Vec::new(),
        };
        named.sort();
        (there, named)
    }
}

pub(crate) async fn sql(tables: &Path, question: &str) -> Vec<RecordBatch> {
    // As `fhirlake query` does.
    let config = SessionConfig::new().set_bool("datafusion.sql_parser.enable_ident_normalization", false);
    let config = config.set_str("datafusion.execution.parquet.coerce_int96", "us");
    let session = SessionContext::new_with_config(config);
    let tables = Tables::at(&tables.display().to_string()).unwrap();
    for name in tables.existing(fhirlake::messages::has_table).await.unwrap() {
        let table = tables.open(&name).await.unwrap();
        let provider = table.delta().unwrap().table_provider().await.unwrap();
        session.register_table(TableReference::bare(&*name), provider).unwrap();
    }
    session.sql(question).await.unwrap().collect().await.unwrap()
}

/// Waits until it is so; not for ever.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = std::time::Instant::now();
    while !is_so() {
        assert!(began.elapsed() < std::time::Duration::from_secs(120), "{what} is waited for in vain");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

pub(crate) fn strings(batch: &RecordBatch, column: &str) -> Vec<Option<String>> {
    let column = batch.column_by_name(column).unwrap();
    let column = arrow::compute::cast(column, &arrow::datatypes::DataType::Utf8).unwrap();
    let column = column.as_string::<i32>();
    (0..column.len()).map(|row| column.is_valid(row).then(|| column.value(row).to_owned())).collect()
}

/// What a table must hold: version by id, as the population says.
pub(crate) fn model(population: &Population, resource_type: &str) -> BTreeMap<String, Option<String>> {
    let kind = DEMO_TYPES.iter().position(|name| *name == resource_type).unwrap();
    let mut expected = BTreeMap::new();
    for patient in 0..population.patients() {
        population.for_each(kind, patient, |number, fate| {
            if !fate.deleted {
                expected.insert(population.id(kind, patient, number), Some(fate.version.to_string()));
            }
        });
    }
    expected
}

pub(crate) async fn assert_is(lake: &Lake, population: &Population, types: &[&str]) {
    for name in types {
        assert_eq!(lake.versions(name).await, model(population, name), "{name}");
    }
}

/// A folder of NDJSON as a pipeline's source.
pub(crate) fn folder_source(folder: &Path) -> String {
    format!("{{ url: \"file://{}\" }}", folder.display())
}

/// A folder with these files, and it as a pipeline's source.
pub(crate) fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, String) {
    let data = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(data.path().join(name), text).unwrap();
    }
    let source = folder_source(data.path());
    (data, source)
}

/// The folder of shared data, where it is there; says so where it is not.
pub(crate) fn shared() -> Option<PathBuf> {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("shared");
    if shared.join("golden").is_dir() {
        return Some(shared);
    }
    #[expect(clippy::disallowed_macros, reason = "a skipped test must be seen")]
    {
        eprintln!("SKIPPED: the shared test data is not beside the project");
    }
    None
}

/// Unpacks a tar.gz into a temporary folder.
pub(crate) fn unpack(archive: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let status =
        std::process::Command::new("tar").arg("xzf").arg(archive).arg("-C").arg(folder.path()).status().unwrap();
    assert!(status.success());
    folder
}

/// Copies a folder to where none is afterwards but the copy.
pub(crate) fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    if from.exists() {
        assert!(std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
    }
}
