//! Maintenance of a table's files: small ones together, marked rows away, rows in the order of their ids.
//!
//! What a query answers does not change: the commit says so (`dataChange: false`), rows keep their values, and files are
//! exchanged in one commit or not at all.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use deltalake::datafusion::catalog::streaming::StreamingTable;
use deltalake::datafusion::execution::TaskContext;
use deltalake::datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use deltalake::datafusion::execution::memory_pool::FairSpillPool;
use deltalake::datafusion::execution::runtime_env::RuntimeEnvBuilder;
use deltalake::datafusion::physical_plan::SendableRecordBatchStream;
use deltalake::datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use deltalake::datafusion::physical_plan::streaming::PartitionStream;
use deltalake::datafusion::prelude::{SessionConfig, SessionContext, col};
use deltalake::kernel::{Action, Add};
use deltalake::protocol::DeltaOperation;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use serde_json::{Value, json};

use super::adds::filtered;
use super::commit::{self, Attempt};
use super::deletions::Scratch;
use super::keys::{OpenFile, selection};
use super::shape::{adapt, union};
use super::staging::id_range;
use super::table::{Table, storage};
use super::targets::{TargetFile, targets};
use super::writer::DataWriter;
use crate::error::{Error, ErrorKind, Result};
use crate::messages::AtMost;

/// How a table is optimized.
#[derive(Debug, Clone)]
pub struct OptimizeSettings {
    /// Bytes that a file should have.
    pub target_file_bytes: u64,
    /// Rows of a file, or the share of them, that are marked as gone from which it is written anew.
    pub min_deleted: AtMost,
    /// Whether rows are laid out in the order of their ids, so that a later match reads less.
    pub cluster: bool,
    /// Memory for sorting, and a folder for what does not fit.
    pub scratch: Scratch,
    /// The run's id: names its files.
    pub run: String,
    /// Further members of the commit's info.
    pub info: BTreeMap<String, Value>,
}

/// What optimizing a table did.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Optimized {
    /// Files that were exchanged.
    pub files_removed: u64,
    /// Files that stand for them.
    pub files_added: u64,
    /// Bytes of the one and the other.
    pub bytes_removed: u64,
    /// See `bytes_removed`.
    pub bytes_added: u64,
    /// Rows that were marked as gone and are no longer in any file.
    pub rows_purged: u64,
    /// The table's version, where it was changed.
    pub version: Option<u64>,
}

/// How often it is begun anew when other writers changed the files in between.
const MAX_ATTEMPTS: usize = 3;

impl Table {
    /// Compacts, purges and, if asked to, clusters the table's files.
    pub async fn optimize(&mut self, settings: &OptimizeSettings) -> Result<Optimized> {
        for _ in 0..MAX_ATTEMPTS {
            let targets = targets(self)?;
            let groups = groups(self, &targets, settings).await?;
            if groups.is_empty() {
                return Ok(Optimized::default());
            }
            let mut work = Work { settings, started: Instant::now(), adds: Vec::new() };
            let done = match work.write(self, &groups).await {
                Ok(()) => work.commit(self, &groups).await,
                Err(error) => Err(error),
            };
            match done {
                Ok(Attempt::Done(version)) => return Ok(Optimized { version, ..work.done(&groups) }),
                Ok(Attempt::Unknown(error)) => return Err(error),
                failed => {
                    for add in &work.adds {
                        // Unreferenced; what stays behind, vacuum takes.
                        let _ = self.store().delete(&Path::from(add.path.as_str())).await;
                    }
                    failed?;
                }
            }
            tracing::info!(resource_type = %self.resource_type, "another writer changed the files; optimizing again");
        }
        Err(Error::new(ErrorKind::Table, format!("other writers changed the files {MAX_ATTEMPTS} times in a row")))
    }
}

/// Files that become one another: each group is read together and written together.
async fn groups<'a>(table: &Table, targets: &'a [TargetFile], settings: &OptimizeSettings) -> Result<Vec<Vec<&'a TargetFile>>> {
    let dirty = |file: &TargetFile| {
        let gone = file.data.gone.len();
        gone > 0 && file.rows.is_none_or(|rows| gone >= settings.min_deleted.of(rows))
    };
    let small = |file: &TargetFile| file.data.size < settings.target_file_bytes / 2;
    if settings.cluster {
        let smalls = targets.iter().filter(|file| small(file)).count();
        if targets.iter().any(dirty) || smalls > 1 || !is_clustered(table, targets).await? {
            return Ok(vec![targets.iter().collect()]);
        }
        return Ok(Vec::new());
    }
    let mut groups: Vec<Vec<&TargetFile>> = Vec::new();
    let mut size = u64::MAX;
    for file in targets.iter().filter(|file| small(file) || dirty(file)) {
        // Neighbours in the log stay neighbours.
        if size.saturating_add(file.data.size) > settings.target_file_bytes {
            groups.push(Vec::new());
            size = 0;
        }
        size += file.data.size;
        if let Some(group) = groups.last_mut() {
            group.push(file);
        }
    }
    groups.retain(|group| group.len() > 1 || group.iter().any(|file| dirty(file)));
    Ok(groups)
}

/// Whether no id can be in two row groups, by their statistics.
async fn is_clustered(table: &Table, targets: &[TargetFile]) -> Result<bool> {
    let mut ranges = Vec::new();
    for target in targets {
        let file = OpenFile::open(table, &target.data).await?;
        for group in file.groups() {
            let Some(range) = id_range(std::slice::from_ref(group)) else { return Ok(false) };
            ranges.push(range);
        }
    }
    ranges.sort_unstable();
    Ok(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0))
}

struct Work<'a> {
    settings: &'a OptimizeSettings,
    started: Instant,
    adds: Vec<Add>,
}

impl Work<'_> {
    /// Writes the files of all groups.
    async fn write(&mut self, table: &Table, groups: &[Vec<&TargetFile>]) -> Result<()> {
        let schema = table.schema()?.ok_or_else(|| Error::new(ErrorKind::Internal, "a table without a schema"))?;
        for group in groups {
            let (mut schemas, mut columns) = (Vec::new(), HashSet::new());
            for target in group {
                let file = OpenFile::open(table, &target.data).await?;
                schemas.push(file.schema().clone());
                columns.extend(filtered(file.groups()));
            }
            let shape = Arc::new(union(&schema, &schemas));
            let rows = live_rows(table.clone(), group, shape.clone());
            let rows = if self.settings.cluster { self.sorted(rows, shape.clone()).await? } else { rows };
            self.write_group(table, rows, &shape, &columns).await?;
        }
        Ok(())
    }

    async fn write_group(
        &mut self,
        table: &Table,
        mut rows: BoxStream<'static, Result<RecordBatch>>,
        shape: &SchemaRef,
        columns: &HashSet<String>,
    ) -> Result<()> {
        let mut open: Option<DataWriter> = None;
        loop {
            let batch = match rows.next().await {
                Some(Ok(batch)) => batch,
                Some(Err(error)) => {
                    if let Some(writer) = open {
                        writer.discard().await;
                    }
                    return Err(error);
                }
                None => break,
            };
            let mut writer = match open.take() {
                Some(writer) => writer,
                None => DataWriter::create(table, &self.settings.run, shape, columns).await?,
            };
            if let Err(error) = writer.write(&batch).await {
                writer.discard().await;
                return Err(error);
            }
            if writer.size() >= self.settings.target_file_bytes {
                self.close(table, writer).await?;
            } else {
                open = Some(writer);
            }
        }
        match open {
            Some(writer) => self.close(table, writer).await,
            None => Ok(()),
        }
    }

    async fn close(&mut self, table: &Table, writer: DataWriter) -> Result<()> {
        let mut add = writer.close(table).await?;
        add.data_change = false;
        self.adds.push(add);
        Ok(())
    }

    /// The rows in the order of their ids, by DataFusion's sort, which puts on disk what does not fit.
    async fn sorted(
        &self,
        rows: BoxStream<'static, Result<RecordBatch>>,
        shape: SchemaRef,
    ) -> Result<BoxStream<'static, Result<RecordBatch>>> {
        let failed = |error| storage(error, "rows cannot be sorted");
        let scratch = &self.settings.scratch;
        crate::private::private_dir(&scratch.folder)?;
        let disk = DiskManagerBuilder::default().with_mode(DiskManagerMode::Directories(vec![scratch.folder.clone()]));
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(FairSpillPool::new(scratch.memory.max(MIN_SORT_BYTES))))
            .with_disk_manager_builder(disk)
            .build_arc()
            .map_err(failed)?;
        let config = SessionConfig::new().with_target_partitions(1).with_batch_size(1024);
        let session = SessionContext::new_with_config_rt(config, runtime);
        let source = Arc::new(Once { schema: shape.clone(), rows: std::sync::Mutex::new(Some(rows)) });
        let rows = StreamingTable::try_new(shape, vec![source]).map_err(failed)?;
        let rows = session.read_table(Arc::new(rows)).map_err(failed)?;
        let sorted = rows.sort(vec![col("id").sort(true, true)]).map_err(failed)?;
        let sorted = sorted.execute_stream().await.map_err(failed)?;
        Ok(sorted.map_err(failed).boxed())
    }

    /// What was done, without the version.
    fn done(&self, groups: &[Vec<&TargetFile>]) -> Optimized {
        let files = || groups.iter().flatten();
        Optimized {
            files_removed: files().count() as u64,
            files_added: self.adds.len() as u64,
            bytes_removed: files().map(|file| file.data.size).sum(),
            bytes_added: self.adds.iter().map(|add| add.size as u64).sum(),
            rows_purged: files().map(|file| file.data.gone.len()).sum(),
            version: None,
        }
    }

    /// Exchanges the files; a conflict is that another writer changed some of them.
    async fn commit(&self, table: &mut Table, groups: &[Vec<&TargetFile>]) -> Result<Attempt> {
        let files = || groups.iter().flatten();
        let done = self.done(groups);
        let metrics = json!({
            "numAddedFiles": done.files_added.to_string(),
            "numRemovedFiles": done.files_removed.to_string(),
            "numAddedBytes": done.bytes_added.to_string(),
            "numRemovedBytes": done.bytes_removed.to_string(),
            "numDeletionVectorsRemoved": files().filter(|file| file.add.deletion_vector.is_some()).count().to_string(),
            "executionTimeMs": self.started.elapsed().as_millis().to_string(),
        });
        let mut info = self.settings.info.clone();
        info.insert("operationMetrics".into(), metrics);
        let removes = files().map(|file| Action::Remove(deltalake::kernel::Remove { data_change: false, ..file.remove.clone() }));
        let actions: Vec<Action> = removes.chain(self.adds.iter().cloned().map(Action::Add)).collect();
        let operation = DeltaOperation::Optimize { predicate: None, target_size: self.settings.target_file_bytes as i64 };
        for _ in 0..super::upsert::MAX_ATTEMPTS {
            match commit::attempt(table, actions.clone(), &info, Vec::new(), operation.clone()).await? {
                // Others may have added rows; the files that are exchanged must be as they were read.
                Attempt::Conflict => {
                    table.check_writable()?;
                    let now = targets(table)?;
                    let same = |file: &TargetFile| {
                        now.iter().any(|now| now.add.path == file.add.path && now.add.deletion_vector == file.add.deletion_vector)
                    };
                    if !files().all(|file| same(file)) {
                        break;
                    }
                }
                done => return Ok(done),
            }
        }
        Ok(Attempt::Conflict)
    }
}

/// Less than this DataFusion cannot merge what it has sorted.
const MIN_SORT_BYTES: usize = 64 << 20;

/// The live rows of some files, in their order, with the columns of `shape`.
fn live_rows(table: Table, group: &[&TargetFile], shape: SchemaRef) -> BoxStream<'static, Result<RecordBatch>> {
    let files: Vec<_> = group.iter().map(|target| target.data.clone()).collect();
    let batches = futures::stream::iter(files).then(move |data| {
        let (table, shape) = (table.clone(), shape.clone());
        async move {
            let file = OpenFile::open(&table, &data).await?;
            let live = selection((0..file.rows()).filter(|row| !data.gone.contains(*row)));
            let path = data.path.clone();
            let batches = file.batches(live)?.map_err(move |error| storage(error, &format!("{path} cannot be read")));
            Ok::<_, Error>(batches.map(move |batch| adapt(&batch?, &shape)))
        }
    });
    batches.try_flatten().boxed()
}

/// A stream as DataFusion takes one.
struct Once {
    schema: SchemaRef,
    rows: std::sync::Mutex<Option<BoxStream<'static, Result<RecordBatch>>>>,
}

impl std::fmt::Debug for Once {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("rows of a table's files")
    }
}

impl PartitionStream for Once {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }
    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        use deltalake::datafusion::common::DataFusionError;
        let rows = self.rows.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let rows = rows.unwrap_or_else(|| futures::stream::empty().boxed());
        let rows = rows.map_err(|error| DataFusionError::External(error.to_string().into()));
        Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), rows))
    }
}
