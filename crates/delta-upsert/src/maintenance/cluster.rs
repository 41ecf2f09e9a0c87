//! A table's rows in the order of their ids, with bounded memory.
//!
//! The ids are cut into parts of which each fits into memory. Rows are read once, sorted a memory full at a time, and
//! put on disk part by part; then each part is read back from everywhere, sorted and written. Parts are worked on by
//! all cores.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::{SortOptions, sort_to_indices, take_record_batch};
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use deltalake::kernel::Add;

use crate::maintenance::rewrite::{GROUP_BYTES, GROUP_ROWS, Place, RowGroup, RowRewriter, Shape, bytes_of};
use crate::matching::deletions::Scratch;
use crate::matching::keys::{DataFile, OpenFile};
use crate::table::reader::read_at;
use crate::table::{Table, storage};
use flow::on_all_cores;
use foundation::error::{Context, Error, ErrorKind, Result};
use foundation::secure_fs::unnamed_file;

/// Ids that are kept to cut by.
const SAMPLES: u64 = 64 * 1024;

/// Less than this a core cannot work with; and more than this makes texts longer than Arrow's offsets reach.
const MIN_BYTES: usize = 4 << 20;
const MAX_BYTES: usize = 256 << 20;

struct Sorter<'a> {
    place: &'a Place<'a>,
    shape: &'a Shape,
    scratch: &'a Scratch,
    /// Bytes of rows that a core gathers, sorts, and writes: a fourth of what it may hold, since they are there as they
    /// came, in one piece, and in their order.
    bytes: usize,
    /// The first id of each part but the first.
    bounds: Vec<Box<str>>,
}

/// Sorted rows on disk: of each memory full its parts, as Arrow's IPC format in Zstandard.
struct Runs {
    file: File,
    /// For each part: where its pieces are, and how long.
    pieces: Vec<Vec<(u64, usize)>>,
}

/// Writes the live rows of `files` in the order of their ids.
pub(crate) async fn sorted(
    place: &Place<'_>,
    shape: &Shape,
    files: &[&DataFile],
    scratch: &Scratch,
) -> Result<Vec<Add>> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let bytes = (scratch.memory / cores / 4).clamp(MIN_BYTES, MAX_BYTES);
    let mut sorter = Sorter { place, shape, scratch, bytes, bounds: Vec::new() };
    sorter.bounds = sorter.cut(files)?;
    // As few files on disk as keep the cores busy: each stays open.
    let tasks: Vec<&[&DataFile]> = files.chunks(files.len().div_ceil(4 * cores).max(1)).collect();
    let handle = tokio::runtime::Handle::current();
    let runs = on_all_cores(&tasks, |_, files| handle.block_on(sorter.runs(files)))?;
    let parts: Vec<usize> = (0..=sorter.bounds.len()).collect();
    let mut copies = RowRewriter::new(place, shape);
    for parts in parts.chunks(cores) {
        let work = match on_all_cores(parts, |_, part| sorter.part(*part, &runs)) {
            Ok(groups) => copies.append_all(groups.into_iter().flatten()).await,
            Err(error) => Err(error),
        };
        if work.is_err() {
            return copies.finish(work).await;
        }
    }
    copies.finish(Ok(())).await
}

impl Sorter<'_> {
    fn table(&self) -> &Table {
        self.place.table
    }

    /// Returns the ids at which to cut, so that each part is about `bytes` long.
    fn cut(&self, files: &[&DataFile]) -> Result<Vec<Box<str>>> {
        let handle = tokio::runtime::Handle::current();
        let every = self.shape.rows.div_ceil(SAMPLES).max(1);
        let looked = on_all_cores(files, |_, file| handle.block_on(self.look(file, every)))?;
        let bytes: u64 = looked.iter().map(|(bytes, _)| bytes).sum();
        let mut ids: Vec<Box<str>> = looked.into_iter().flat_map(|(_, ids)| ids).collect();
        ids.sort_unstable();
        let parts = (bytes / self.bytes as u64 + 1) as usize;
        let mut bounds: Vec<Box<str>> =
            (1..parts).filter_map(|part| ids.get(part * ids.len() / parts).cloned()).collect();
        bounds.dedup();
        Ok(bounds)
    }

    /// Bytes that a file's rows will take, by its first ones, and some of its ids.
    async fn look(&self, file: &DataFile, every: u64) -> Result<(u64, Vec<Box<str>>)> {
        let file = OpenFile::open(self.table(), file).await?;
        let mut ids = Vec::new();
        let mut place = 0;
        file.for_each_id_text(|id| {
            place += 1;
            if place % every == 0 {
                ids.extend(id.map(Box::from));
            }
        })
        .await?;
        let bytes = match file.live_rows()?.next().await? {
            Some(first) => bytes_of(&self.shape.fit(&first)?) as u64 * file.live() / first.num_rows().max(1) as u64,
            None => 0,
        };
        Ok((bytes, ids))
    }

    /// The rows of some files on disk.
    async fn runs(&self, files: &[&DataFile]) -> Result<Runs> {
        let file = unnamed_file(&self.scratch.folder)?;
        let mut runs = Runs { file, pieces: vec![Vec::new(); self.bounds.len() + 1] };
        let (mut gathered, mut bytes) = (Vec::new(), 0);
        for file in files {
            let open = OpenFile::open(self.table(), file).await?;
            let mut rows = open.live_rows()?;
            while let Some(batch) = rows.next().await? {
                let batch = self.shape.fit(&batch)?;
                bytes += bytes_of(&batch);
                gathered.push(batch);
                if bytes >= self.bytes {
                    runs.put(&self.sort(&std::mem::take(&mut gathered))?, &self.bounds)?;
                    bytes = 0;
                }
            }
        }
        if !gathered.is_empty() {
            runs.put(&self.sort(&gathered)?, &self.bounds)?;
        }
        Ok(runs)
    }

    fn sort(&self, batches: &[RecordBatch]) -> Result<RecordBatch> {
        let batch = self.shape.join(batches)?;
        let Some(ids) = batch.column_by_name("id") else { return Ok(batch) };
        let failed = |error| storage(error, "rows cannot be sorted");
        let order =
            sort_to_indices(ids, Some(SortOptions { descending: false, nulls_first: true }), None).map_err(failed)?;
        take_record_batch(&batch, &order).map_err(failed)
    }

    /// Row groups of one part of the ids.
    fn part(&self, part: usize, runs: &[Runs]) -> Result<Vec<RowGroup>> {
        let mut batches = Vec::new();
        for runs in runs {
            for (offset, length) in &runs.pieces[part] {
                batches.extend(runs.read(*offset, *length)?);
            }
        }
        if batches.is_empty() {
            return Ok(Vec::new());
        }
        let rows = self.sort(&batches)?;
        drop(batches);
        let groups = rows.num_rows().div_ceil(GROUP_ROWS).max(bytes_of(&rows).div_ceil(GROUP_BYTES)).max(1);
        let length = rows.num_rows().div_ceil(groups);
        let starts = (0..rows.num_rows()).step_by(length.max(1));
        starts.map(|at| self.shape.encode(&[rows.slice(at, length.min(rows.num_rows() - at))])).collect()
    }
}

fn failed(error: impl std::fmt::Display) -> Error {
    storage(error, "sorted rows cannot be spilled")
}

impl Runs {
    /// Appends sorted rows, part by part.
    fn put(&mut self, rows: &RecordBatch, bounds: &[Box<str>]) -> Result<()> {
        let ids = rows.column_by_name("id").map(|ids| ids.as_string::<i32>());
        let mut from = 0;
        for (part, pieces) in self.pieces.iter_mut().enumerate() {
            let until = match (bounds.get(part), ids) {
                (Some(bound), Some(ids)) => {
                    let mut range = from..rows.num_rows();
                    while range.start < range.end {
                        let middle = range.start + range.len() / 2;
                        // Rows without an id are the first.
                        let before = ids.is_null(middle) || ids.value(middle) < &**bound;
                        range = if before { middle + 1..range.end } else { range.start..middle };
                    }
                    range.start
                }
                _ => rows.num_rows(),
            };
            if until > from {
                let mut writer = StreamWriter::try_new(Vec::new(), &rows.schema()).map_err(failed)?;
                writer.write(&rows.slice(from, until - from)).map_err(failed)?;
                let packed = zstd::bulk::compress(&writer.into_inner().map_err(failed)?, 1).map_err(failed)?;
                let offset = self.file.seek(SeekFrom::End(0)).map_err(failed)?;
                self.file.write_all(&packed).map_err(failed)?;
                pieces.push((offset, packed.len()));
            }
            from = until;
        }
        Ok(())
    }

    fn read(&self, offset: u64, length: usize) -> Result<Vec<RecordBatch>> {
        let packed = read_at(&self.file, offset..offset + length as u64).map_err(failed)?;
        let mut bytes = Vec::new();
        zstd::stream::Decoder::new(&*packed).and_then(|mut decoder| decoder.read_to_end(&mut bytes)).map_err(failed)?;
        let reader = StreamReader::try_new(std::io::Cursor::new(bytes), None).map_err(failed)?;
        reader.collect::<std::result::Result<_, _>>().context(ErrorKind::Storage, "spilled rows cannot be read back")
    }
}
