//! The folder of tables: `<tables>/<Type>.parquet`, one Delta table a resource type.

mod features;
pub(crate) mod log_store;
pub(crate) mod reader;
pub(crate) mod schema_adapter;
pub(crate) mod schema_evolution;
pub(crate) mod snapshot_files;

use std::collections::HashMap;
use std::sync::Arc;

use arrow::datatypes::Schema;
use deltalake::DeltaTable;
use deltalake::kernel::StructType;
use deltalake::kernel::engine::arrow_conversion::{TryIntoArrow, TryIntoKernel};
use deltalake::logstore::LogStoreRef;
use object_store::ObjectStore;
use url::Url;

use crate::commit::deletion_vectors;
use crate::staging::StagedParquet;
use foundation::error::{Context, Error, ErrorKind, Result};
use foundation::fault_points::reached;

/// Place of the tables.
#[derive(Clone)]
pub struct Tables {
    root: Url,
    guard: Guard,
}

/// Asked before every commit: whether it may still be made.
pub(crate) type Guard = Arc<dyn Fn() -> Result<()> + Send + Sync>;

impl std::fmt::Debug for Tables {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Tables in {}", self.display())
    }
}

/// Settings of tables.
#[derive(Debug, Clone)]
pub struct TableSettings {
    /// True if rows are marked as deleted by deletion vectors, so that nothing is rewritten.
    pub deletion_vectors: bool,
    /// True if deletion vectors are turned on in tables that exist and have them off.
    pub upgrade: bool,
}

/// One table, which may not exist yet.
#[derive(Clone)]
pub struct Table {
    /// Its type.
    pub resource_type: Arc<str>,
    pub(crate) log_store: LogStoreRef,
    /// The table's place, as others name it.
    pub(crate) root: Url,
    /// True if its checkpoints cannot be read: the next commit writes a good one.
    wants_checkpoint: bool,
    /// The newest snapshot that was read; `None` where the table does not exist.
    pub(crate) delta: Option<DeltaTable>,
    pub(crate) guard: Guard,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Table of {}", self.resource_type)
    }
}

pub(crate) fn storage(error: impl std::fmt::Display, what: &str) -> Error {
    Error::new(ErrorKind::Storage, format!("{what}: {}", without_queries(&error.to_string())))
}

/// Returns the message of a store's client, without the query strings of URLs: a signature may be in one.
fn without_queries(said: &str) -> String {
    // Where RUST_BACKTRACE is set, some append where in themselves they failed.
    let said = said.split("backtrace:").next().unwrap_or_default().trim_end();
    let word = |word: &str| match word.split_once('?') {
        Some((url, _)) if url.contains("://") => url.to_owned(),
        _ => word.to_owned(),
    };
    said.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

impl Tables {
    /// Tables in `location`: a folder's path or a URL.
    pub fn at(location: &str) -> Result<Tables> {
        let root = folder_url(location)?;
        check_store(&root)?;
        Ok(Tables { root, guard: Arc::new(|| Ok(())) })
    }

    /// Tables to which a commit is made only when `guard` allows it: a run that has lost its lock must not.
    pub fn guarded(self, guard: Arc<dyn Fn() -> Result<()> + Send + Sync>) -> Tables {
        Tables { guard, ..self }
    }

    /// The root, for messages.
    pub fn display(&self) -> String {
        match self.root.to_file_path() {
            Ok(path) => path.display().to_string(),
            Err(()) => self.root.to_string(),
        }
    }

    /// The local folder, where it is one.
    pub fn local(&self) -> Option<std::path::PathBuf> {
        self.root.to_file_path().ok()
    }

    /// Opens the table of `resource_type`, or the place where it will be.
    pub async fn open(&self, resource_type: &Arc<str>) -> Result<Table> {
        let below = format!("{resource_type}.parquet/");
        let root = self.root.join(&below).context(ErrorKind::Config, format!("no table can be at {below}"))?;
        let log_store = log_store::open(&self.root, &below).map_err(|error| error.at(resource_type.to_string()))?;
        let guard = self.guard.clone();
        let mut table = Table {
            resource_type: resource_type.clone(),
            log_store,
            root,
            wants_checkpoint: false,
            delta: None,
            guard,
        };
        table.refresh().await?;
        Ok(table)
    }

    /// Returns the names for which `is_name` is true and that have a table here, sorted. Other tables may be in the
    /// folder.
    pub async fn existing(&self, is_name: impl Fn(&str) -> bool) -> Result<Vec<Arc<str>>> {
        let mut found = Vec::new();
        if let Ok(path) = self.root.to_file_path() {
            let entries = match std::fs::read_dir(&path) {
                Ok(entries) => entries,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
                Err(error) => return Err(storage(error, &format!("{} cannot be listed", path.display()))),
            };
            for entry in entries.flatten() {
                if entry.path().join("_delta_log").is_dir() {
                    found.extend(
                        entry.file_name().to_str().and_then(|name| name.strip_suffix(".parquet")).map(Arc::from),
                    );
                }
            }
        } else {
            let listing = self
                .store()?
                .list_with_delimiter(None)
                .await
                .map_err(|error| storage(error, "tables cannot be listed"))?;
            for prefix in listing.common_prefixes {
                found.extend(prefix.filename().and_then(|name| name.strip_suffix(".parquet")).map(Arc::from));
            }
        }
        found.retain(|name: &Arc<str>| is_name(name));
        found.sort();
        Ok(found)
    }
}

impl Tables {
    /// The store that the tables are in, from their folder on.
    pub fn store(&self) -> Result<Arc<dyn ObjectStore>> {
        Ok(log_store::open(&self.root, "")?.object_store(None))
    }

    /// Writes a file into the tables' folder and removes it.
    pub async fn check_writable(&self) -> Result<()> {
        use object_store::ObjectStoreExt;
        if let Some(path) = self.local() {
            table_folder(&path)?;
        }
        let failed = |error: &dyn std::fmt::Display| storage(error, &format!("{} cannot be written", self.display()));
        let store = self.store()?;
        let path = object_store::path::Path::from(format!(".fhirlake-check-{}", uuid::Uuid::new_v4()));
        store.put(&path, "check".into()).await.map_err(|error| failed(&error))?;
        store.delete(&path).await.map_err(|error| failed(&error))
    }

    /// Returns the names for which `is_name` is true and that have a folder here: a table, or files that a killed run
    /// left.
    pub async fn existing_folders(&self, is_name: impl Fn(&str) -> bool) -> Result<Vec<Arc<str>>> {
        let Some(path) = self.local() else { return self.existing(is_name).await };
        let entries = std::fs::read_dir(&path).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| {
            let name = entry.file_name();
            name.to_str().and_then(|name| name.strip_suffix(".parquet")).map(Arc::from)
        });
        Ok(names.filter(|name: &Arc<str>| is_name(name)).collect())
    }
}

impl Table {
    /// Removes what a killed `run` left and no commit names: staged files (also those that were still being written,
    /// which a local store keeps under another name and does not list), rewritten files and deletion vectors. How many.
    /// Those of `staged` stay.
    pub async fn remove_orphans(&self, run: &str, staged: &[StagedParquet]) -> Result<usize> {
        use object_store::path::Path;
        // Older versions need their files too: only vacuum may take those.
        let named = self.named(chrono::DateTime::UNIX_EPOCH).await?;
        let ours = staged.iter().filter(|file| file.resource_type == self.resource_type);
        let staged: std::collections::HashSet<&str> = ours.map(|file| file.path.as_str()).collect();
        let store = self.store();
        let prefix = format!("part-{run}-");
        let mut orphans = Vec::new();
        match self.local() {
            Some(folder) => {
                let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
                let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
                let orphan = |name: &String| {
                    name.starts_with(&prefix)
                        && !staged.contains(name.as_str())
                        && !named.has(&Path::from(name.as_str()))
                };
                for name in names.filter(orphan) {
                    std::fs::remove_file(folder.join(&name))
                        .map_err(|error| storage(error, &format!("{name} cannot be removed")))?;
                    reached("an orphan is removed");
                    orphans.push(name);
                }
            }
            None => {
                let listed = store
                    .list_with_delimiter(None)
                    .await
                    .map_err(|error| storage(error, "the table cannot be listed"))?;
                for object in listed.objects {
                    let name = object.location.filename().unwrap_or_default();
                    if name.starts_with(&prefix) && !staged.contains(name) && !named.has(&object.location) {
                        object_store::ObjectStoreExt::delete(&store, &object.location)
                            .await
                            .map_err(|error| storage(error, &format!("{name} cannot be removed")))?;
                        orphans.push(name.to_owned());
                    }
                }
            }
        }
        // A run commits to a table twice at most.
        for attempt in 1..=2 * crate::commit::upsert::MAX_ATTEMPTS {
            let id = deletion_vectors::file_id(run, &self.resource_type, attempt);
            let path: Path = deletion_vectors::file_path(id);
            if !named.has(&path) && object_store::ObjectStoreExt::head(&store, &path).await.is_ok() {
                object_store::ObjectStoreExt::delete(&store, &path)
                    .await
                    .map_err(|error| storage(error, &format!("{path} cannot be removed")))?;
                orphans.push(path.to_string());
            }
        }
        Ok(orphans.len())
    }

    /// Writes a checkpoint where the table's interval asks for one after `version`, and removes log files that are out
    /// of their retention. Neither is part of the commit: a failure is only said.
    pub(crate) async fn checkpoint(&mut self, version: Option<u64>) {
        use deltalake::table::config::TablePropertiesExt;
        let Some(version) = version else { return };
        let Some(interval) =
            self.delta.as_ref().and_then(|delta| Some(delta.snapshot().ok()?.table_config().checkpoint_interval()))
        else {
            return;
        };
        if version == 0 || !(self.wants_checkpoint || version.is_multiple_of(interval.get())) {
            return;
        }
        let done = async {
            self.refresh().await?;
            let Some(delta) = &self.delta else { return Ok(()) };
            let failed = |error| storage(error, "the checkpoint cannot be written");
            deltalake::checkpoints::create_checkpoint(delta, None).await.map_err(failed)?;
            self.wants_checkpoint = false;
            let snapshot = delta.snapshot().map_err(failed)?;
            if snapshot.table_config().enable_expired_log_cleanup() {
                deltalake::checkpoints::cleanup_metadata(delta, None).await.map_err(failed)?;
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = done.await {
            tracing::warn!(%error, "the commit succeeded; old log files could not be removed");
        }
    }
}

/// A folder of tables: the user's alone, unless the umask lets a group read.
pub(crate) fn table_folder(path: &std::path::Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|error| storage(error, &format!("{} cannot be made", path.display())))
}

/// Schemes of an object store, the cargo feature that brings the store, and whether it is built in.
const STORES: [(&[&str], &str, bool); 3] = [
    (&["s3", "s3a"], "s3", cfg!(feature = "s3")),
    (&["az", "azure", "adl", "abfs", "abfss"], "azure", cfg!(feature = "azure")),
    (&["gs"], "gcs", cfg!(feature = "gcs")),
];

/// Returns true if tables can be at `url`.
fn check_store(url: &Url) -> Result<()> {
    let bad = |message: String| Err(Error::new(ErrorKind::Config, message));
    let scheme = url.scheme();
    if scheme == "file" {
        return Ok(());
    }
    let Some((_, feature, built_in)) = STORES.iter().find(|(schemes, _, _)| schemes.contains(&scheme)) else {
        return bad(format!("{scheme}:// is not supported for tables; use a folder, s3://, abfss:// or gs://"));
    };
    if !built_in {
        return bad(format!(
            "{scheme}:// is not in this build; build it with `cargo build --release --features {feature}`"
        ));
    }
    // What comes before @ is a container in abfss://, and elsewhere a key that is there by mistake.
    if url.password().is_some() || (*feature != "azure" && !url.username().is_empty()) {
        return bad("the URL of the tables must not have keys, since it is logged: set them in the environment".into());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return bad("the URL of the tables must not have a query: set the store's options in the environment".into());
    }
    Ok(())
}

/// A folder's URL, ending in a slash; relative paths are taken from the current directory.
pub(crate) fn folder_url(location: &str) -> Result<Url> {
    let url = if location.contains("://") {
        Url::parse(location).context(ErrorKind::Config, "not a URL")?
    } else {
        let path = std::path::absolute(location).context(ErrorKind::Config, format!("{location} is not a path"))?;
        Url::from_directory_path(&path)
            .map_err(|()| Error::new(ErrorKind::Config, format!("{location} is not a path")))?
    };
    let mut url = url;
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    Ok(url)
}

impl Table {
    /// Makes the table's folder, for those whom the umask lets in, before the first file goes into it. Not before: an
    /// empty folder of this name is no table, and Pathling would take it for one.
    pub fn make_folder(&self) -> Result<()> {
        self.local().map_or(Ok(()), |folder| table_folder(&folder))
    }

    /// Removes the folder again where nothing came into it.
    pub fn remove_empty_folder(&self) {
        if let (None, Some(folder)) = (self.version(), self.local()) {
            // Refused where it holds anything.
            let _ = std::fs::remove_dir(folder);
        }
    }

    /// Reads the newest snapshot.
    pub async fn refresh(&mut self) -> Result<()> {
        // Asked first: loading what is not there is an error that the kernel logs as one.
        let there = self.log_store.is_delta_table_location().await;
        let resource_type = self.resource_type.clone();
        let failed = |error| storage(error, "the table cannot be read").at(resource_type.to_string());
        self.delta = None;
        if there.map_err(failed)? {
            let mut delta = DeltaTable::new(self.log_store.clone());
            if let Err(error) = delta.load().await {
                delta = self.load_without_checkpoints(&error).await?.ok_or_else(|| failed(error))?;
            }
            self.delta = Some(delta);
        }
        Ok(())
    }

    /// Reads a log that cannot be read without its checkpoints, which are a help to readers and no more; `None` where
    /// it is not for them that it cannot be.
    async fn load_without_checkpoints(&mut self, failed: &deltalake::DeltaTableError) -> Result<Option<DeltaTable>> {
        let log_store = match log_store::without_checkpoints(&self.log_store, failed).await {
            Ok(Some(log_store)) => log_store,
            Ok(None) => return Ok(None),
            Err(error) => return Err(error.at(self.resource_type.to_string())),
        };
        let mut delta = DeltaTable::new(log_store.clone());
        if delta.load().await.is_err() {
            return Ok(None);
        }
        tracing::warn!(
            resource_type = &*self.resource_type,
            "a checkpoint of the table cannot be read; its log is read without, and the next commit writes a good one"
        );
        (self.log_store, self.wants_checkpoint) = (log_store, true);
        Ok(Some(delta))
    }

    /// The table's version; `None` where it does not exist.
    pub fn version(&self) -> Option<u64> {
        self.delta.as_ref().and_then(DeltaTable::version)
    }

    /// The Delta table, for queries.
    pub fn delta(&self) -> Option<&DeltaTable> {
        self.delta.as_ref()
    }

    /// Store of the table's files.
    pub fn store(&self) -> Arc<dyn ObjectStore> {
        self.log_store.object_store(None)
    }

    /// The folder, where it is local: files are synced before they are committed.
    pub fn local(&self) -> Option<std::path::PathBuf> {
        self.root.to_file_path().ok()
    }

    /// The table's Arrow schema; `None` where it does not exist.
    pub fn schema(&self) -> Result<Option<Schema>> {
        let Some(delta) = &self.delta else { return Ok(None) };
        let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
        let schema: Schema = snapshot
            .schema()
            .as_ref()
            .try_into_arrow()
            .map_err(|error| Error::new(ErrorKind::Table, format!("the schema cannot be read: {error}")))?;
        Ok(Some(schema))
    }

    /// The `version` of the newest application transaction of `app_id`.
    pub async fn transaction(&self, app_id: &str) -> Result<Option<i64>> {
        let Some(delta) = &self.delta else { return Ok(None) };
        let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
        snapshot
            .transaction_version(self.log_store.as_ref(), app_id.to_owned())
            .await
            .map_err(|error| storage(error, "the watermark cannot be read"))
    }

    /// Rows in the table by its statistics, deletion vectors taken off; `None` where statistics lack.
    pub fn row_count(&self) -> Option<u64> {
        let snapshot = self.delta.as_ref()?.snapshot().ok()?;
        let mut rows = 0u64;
        for file in snapshot.log_data().iter() {
            let gone = file.deletion_vector_descriptor().map_or(0, |vector| vector.cardinality);
            rows += (file.num_records()? as u64).saturating_sub(gone as u64);
        }
        Some(rows)
    }
}

impl TableSettings {
    /// Configuration of a new table.
    pub(crate) fn configuration(&self) -> HashMap<String, Option<String>> {
        let mut settings = HashMap::new();
        if self.deletion_vectors {
            settings.insert("delta.enableDeletionVectors".to_owned(), Some("true".to_owned()));
        }
        settings
    }
}

/// The Delta schema of an Arrow schema.
pub fn delta_schema(schema: &Schema) -> Result<StructType> {
    let delta: StructType = schema
        .try_into_kernel()
        .map_err(|error| Error::new(ErrorKind::Internal, format!("the schema cannot be a Delta schema: {error}")))?;
    Ok(delta)
}
