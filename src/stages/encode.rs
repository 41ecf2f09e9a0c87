//! Parsed rows → Arrow columns → Parquet pages, on every core.
//!
//! Rows of a type gather in open batches that any worker may take up and put back, so there are never more
//! open batches of a type than workers. A batch is closed when it is large enough, when the batches
//! together outgrow their budget (the largest goes), when merge asks for the type, or at the end.

mod settings;

pub use self::settings::{EncodeSection, FileColumns, OPEN_BATCHES};
use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::runtime::Handle;

use crate::error::Result;
use crate::messages::{
    ControlEvent, EncodedBatch, FileRows, FlushRequests, Layouts, LineHash, MergeInput, ResourceType, RowKey, Rows,
};
use delta_upsert::{PageEncoder, add_line_hashes, with_line_hash};
use fhir_arrow::{ColumnPruning, Encoder, PresentColumns};
use flow::{Receiver, Sender};

/// Columns of a batch, and their levels, may take so many times the bytes of JSON at which it is closed, in tenths.
/// Usual resources take once or twice; at 2.5 lists that spread keep a run to `memory` and 250 MB.
const COLUMNS_TO_JSON: usize = 25;

/// A batch that still gathers rows.
struct OpenBatch {
    encoder: Encoder,
    keys: Vec<RowKey>,
    lines: Vec<Option<LineHash>>,
    by_file: BTreeMap<u32, FileRows>,
    /// Rows and bytes of JSON that `by_file` has.
    counted: (u64, u64),
}

impl OpenBatch {
    fn new(encoder: Encoder, rows: usize) -> Self {
        Self {
            encoder,
            keys: Vec::with_capacity(rows),
            lines: Vec::with_capacity(rows),
            by_file: BTreeMap::new(),
            counted: (0, 0),
        }
    }

    /// Enters that the rows since the last call are of this file.
    fn came_from(&mut self, file: u32) {
        let (rows, json_bytes) = (self.keys.len() as u64, self.encoder.json_bytes() as u64);
        let more = FileRows {
            rows: rows - self.counted.0,
            json_bytes: json_bytes - self.counted.1,
            unmapped: self.encoder.take_unmapped(),
        };
        if more.rows > 0 {
            self.by_file.entry(file).or_default().add(&more);
            self.counted = (rows, json_bytes);
        }
    }
}

/// Open batches of all types.
#[derive(Default)]
struct Bench {
    idle: HashMap<ResourceType, Vec<OpenBatch>>,
    /// Weight of the idle batches.
    idle_bytes: usize,
    /// Rows seen, by type; those in a worker's hands not yet.
    seen: HashMap<ResourceType, u64>,
    /// Columns that the type's batches had so far: a file's row groups must agree.
    known: HashMap<ResourceType, PresentColumns>,
}

/// State that the encode workers share.
pub struct Shared {
    bench: Mutex<Bench>,
    layouts: Layouts,
    requests: FlushRequests,
    /// JSON bytes at which a batch is closed.
    batch_bytes: usize,
    /// JSON bytes that all open batches may stand for.
    budget: usize,
    /// Which columns files have.
    columns: ColumnPruning,
    /// True if files keep the hash of each row's line.
    line_hashes: bool,
}

impl Shared {
    /// Batches are closed at `batch_bytes` bytes of JSON, or when all open ones together pass `budget`.
    /// `columns` says which columns files have, and `line_hashes` whether the hash of each row's line is among them.
    pub fn new(
        layouts: Layouts,
        requests: FlushRequests,
        batch_bytes: usize,
        budget: usize,
        columns: ColumnPruning,
        line_hashes: bool,
    ) -> Arc<Self> {
        Arc::new(Self { bench: Mutex::default(), layouts, requests, batch_bytes, budget, columns, line_hashes })
    }

    fn bench(&self) -> MutexGuard<'_, Bench> {
        self.bench.lock()
    }

    fn take(&self, resource_type: &ResourceType) -> Result<OpenBatch> {
        let mut bench = self.bench();
        if let Some(batch) = bench.idle.get_mut(resource_type).and_then(Vec::pop) {
            bench.idle_bytes -= batch.encoder.weight();
            return Ok(batch);
        }
        drop(bench);
        let layout = (self.layouts)(resource_type)?;
        Ok(OpenBatch::new(Encoder::new(layout), 0))
    }

    /// An empty batch like `batch`.
    fn fresh(&self, batch: &OpenBatch) -> OpenBatch {
        OpenBatch::new(Encoder::new(batch.encoder.layout().clone()), 0)
    }

    /// Puts a batch back that saw `rows` new rows; what has to be closed now.
    fn put_back(&self, resource_type: &ResourceType, batch: OpenBatch, rows: u64) -> Vec<(ResourceType, OpenBatch)> {
        let mut due = Vec::new();
        let mut bench = self.bench();
        *bench.seen.entry(resource_type.clone()).or_default() += rows;
        if batch.encoder.json_bytes() >= self.batch_bytes {
            due.push((resource_type.clone(), batch));
        } else {
            bench.idle_bytes += batch.encoder.weight();
            bench.idle.entry(resource_type.clone()).or_default().push(batch);
        }
        while bench.idle_bytes > self.budget {
            let sizes = bench.idle.iter().flat_map(|(name, batches)| {
                batches.iter().enumerate().map(move |(at, batch)| (batch.encoder.weight(), name.clone(), at))
            });
            let Some((bytes, name, at)) = sizes.max_by_key(|(bytes, _, _)| *bytes) else { break };
            let Some(batches) = bench.idle.get_mut(&name) else { break };
            let batch = batches.swap_remove(at);
            bench.idle_bytes -= bytes;
            due.push((name, batch));
        }
        drop(bench);
        due.extend(self.requested());
        due
    }

    /// Batches of the types that merge waits for, once all of their rows were seen.
    fn requested(&self) -> Vec<(ResourceType, OpenBatch)> {
        let wanted = self.requests.wanted();
        let mut bench = self.bench();
        let complete =
            |bench: &Bench, name: &ResourceType, rows: u64| bench.seen.get(name).copied().unwrap_or(0) >= rows;
        let names = wanted.into_iter().filter(|(name, rows)| complete(&bench, name, *rows));
        let names: Vec<ResourceType> = names.map(|(name, _)| name).collect();
        let mut due = Vec::new();
        for name in names {
            for batch in bench.idle.remove(&name).unwrap_or_default() {
                bench.idle_bytes -= batch.encoder.weight();
                due.push((name.clone(), batch));
            }
        }
        due
    }

    fn all(&self) -> Vec<(ResourceType, OpenBatch)> {
        let mut bench = self.bench();
        bench.idle_bytes = 0;
        let idle = std::mem::take(&mut bench.idle);
        idle.into_iter()
            .flat_map(|(name, batches)| batches.into_iter().map(move |batch| (name.clone(), batch)))
            .collect()
    }

    /// Closes a batch: columns, pages, bytes.
    fn close(&self, resource_type: ResourceType, mut batch: OpenBatch) -> Result<Option<EncodedBatch>> {
        if batch.encoder.rows() == 0 {
            return Ok(None);
        }
        let json_bytes = batch.encoder.json_bytes();
        let mut known = self.bench().known.get(&resource_type).cloned().unwrap_or_default();
        let encoded = batch.encoder.finish(&mut known, self.columns)?;
        let mut bench = self.bench();
        bench.known.entry(resource_type.clone()).or_default().merge(&known);
        if json_bytes >= self.batch_bytes {
            // More of the type is likely: the encoder knows how large its columns become.
            let next = OpenBatch::new(batch.encoder, batch.keys.len());
            bench.idle.entry(resource_type.clone()).or_default().push(next);
        }
        drop(bench);
        // A column of the file, and none of the table.
        let (rows, columns) = match self.line_hashes {
            true => (add_line_hashes(&encoded.batch, &batch.lines)?, with_line_hash(&encoded.schema)),
            false => (encoded.batch, encoded.schema),
        };
        let (parquet, metadata) = PageEncoder
            .encode(&rows, &columns, &encoded.filtered)
            .map_err(|error| error.at(resource_type.to_string()))?;
        Ok(Some(EncodedBatch { resource_type, columns, parquet, metadata, keys: batch.keys, by_file: batch.by_file }))
    }
}

/// One encode worker; any number share `rows`.
pub struct Encode {
    /// Source of rows.
    pub rows: Receiver<Rows>,
    /// Destination of row groups.
    pub merge: Sender<MergeInput>,
    /// State that the workers share.
    pub shared: Arc<Shared>,
}

enum Next<T> {
    Rows(T),
    Request,
    End,
}

impl Encode {
    /// Encodes until the edge closes, then closes what is open.
    pub fn run(self, handle: &Handle) -> Result<()> {
        let mut requests = self.shared.requests.watch();
        loop {
            let next = handle.block_on(async {
                tokio::select! {
                    rows = self.rows.recv() => rows.map_or(Next::End, Next::Rows),
                    changed = requests.changed() => if changed.is_ok() { Next::Request } else { Next::End },
                }
            });
            match next {
                Next::Rows(parcel) => {
                    let rows: &Rows = &parcel;
                    let document = rows.tape.over(&rows.bytes);
                    for (resource_type, parsed) in &rows.by_type {
                        let mut batch = match self.shared.take(resource_type) {
                            Ok(batch) => batch,
                            // Its table cannot be written: the type fails and the others go on.
                            Err(error) => {
                                let failed = ControlEvent::TypeFailed(resource_type.clone(), error.to_string());
                                if handle.block_on(self.merge.send(MergeInput::ControlEvent(failed))).is_err() {
                                    return Ok(());
                                }
                                continue;
                            }
                        };
                        for row in parsed {
                            if batch.encoder.column_bytes()
                                > (self.shared.batch_bytes / 10).saturating_mul(COLUMNS_TO_JSON)
                            {
                                batch.came_from(rows.file.index);
                                let fresh = self.shared.fresh(&batch);
                                let full = std::mem::replace(&mut batch, fresh);
                                if !self.close_all(handle, vec![(resource_type.clone(), full)])? {
                                    return Ok(());
                                }
                            }
                            batch.encoder.push(document.value(row.root), &rows.bytes[row.line.clone()]);
                            batch.encoder.weigh(row.added);
                            batch.keys.push(row.key);
                            batch.lines.push(row.line_hash);
                        }
                        batch.came_from(rows.file.index);
                        let due = self.shared.put_back(resource_type, batch, parsed.len() as u64);
                        if !self.close_all(handle, due)? {
                            return Ok(());
                        }
                    }
                }
                Next::Request => {
                    if !self.close_all(handle, self.shared.requested())? {
                        return Ok(());
                    }
                }
                Next::End => break,
            }
        }
        // Whatever the last worker puts back, it takes here itself.
        self.close_all(handle, self.shared.all())?;
        Ok(())
    }

    /// Returns true if merge still listens.
    fn close_all(&self, handle: &Handle, due: Vec<(ResourceType, OpenBatch)>) -> Result<bool> {
        for (resource_type, batch) in due {
            if let Some(batch) = self.shared.close(resource_type, batch)?
                && handle.block_on(self.merge.send(MergeInput::Batch(Box::new(batch)))).is_err()
            {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
