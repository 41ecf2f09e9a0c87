//! A table's file as a source of Parquet columns.

use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::error::ArrowError;
use bytes::Bytes;
use futures::future::BoxFuture;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder, RowSelection,
};
use parquet::arrow::async_reader::{AsyncFileReader, ParquetRecordBatchStream};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};
use tokio_stream::StreamExt;

use crate::table::Table;

/// Reads byte ranges of one file.
#[derive(Debug, Clone)]
pub(crate) struct StoreReader {
    store: Arc<dyn ObjectStore>,
    path: Path,
    size: u64,
    /// The file itself, where the table is in a local folder. The store would read what lies between the ranges too, in
    /// another thread: of a file of a thousand columns all of it, where four columns are asked for.
    file: Option<Arc<File>>,
}

impl StoreReader {
    /// The file itself, where the table is in a local folder.
    pub(crate) fn local(&self) -> Option<LocalFile> {
        Some(LocalFile { file: self.file.clone()?, size: self.size })
    }

    /// A reader of the file at `path` in the table's folder, `size` bytes long.
    pub(crate) fn new(table: &Table, path: &Path, size: u64) -> Self {
        // A file that is not there by its plain name is the store's to find, or to miss.
        let file = table.local().and_then(|folder| File::open(folder.join(path.as_ref())).ok()).map(Arc::new);
        Self { store: table.store(), path: path.clone(), size, file }
    }
}

fn external(error: impl std::error::Error + Send + Sync + 'static) -> ParquetError {
    ParquetError::External(Box::new(error))
}

/// Reads a range, wherever others that share the file are.
pub(crate) fn read_at(file: &File, range: Range<u64>) -> std::io::Result<Bytes> {
    let length = usize::try_from(range.end.saturating_sub(range.start)).map_err(std::io::Error::other)?;
    let mut bytes = vec![0; length];
    #[cfg(unix)]
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, range.start)?;
    #[cfg(not(unix))]
    {
        use std::io::{Seek, SeekFrom};
        let mut file = file.try_clone()?;
        file.seek(SeekFrom::Start(range.start)).and_then(|_| file.read_exact(&mut bytes))?;
    }
    Ok(bytes.into())
}

fn read(file: &File, range: Range<u64>) -> Result<Bytes> {
    read_at(file, range).map_err(external)
}

/// A local file whose pages are read one after the other, as they are needed: of a row group of another writer, which
/// may be hundreds of megabytes, only some pages are in memory.
#[derive(Debug, Clone)]
pub(crate) struct LocalFile {
    file: Arc<File>,
    size: u64,
}

impl Length for LocalFile {
    fn len(&self) -> u64 {
        self.size
    }
}

impl ChunkReader for LocalFile {
    type T = BufReader<From>;

    fn get_read(&self, start: u64) -> Result<Self::T> {
        // Pages of columns that hold nothing are shorter than this, and there are hundreds of them.
        Ok(BufReader::with_capacity(512, From { file: self.file.clone(), next: start, size: self.size }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        read(&self.file, start..start + length as u64)
    }
}

/// Reads a file from some place on.
#[derive(Debug)]
pub(crate) struct From {
    file: Arc<File>,
    next: u64,
    size: u64,
}

impl Read for From {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = (buffer.len() as u64).min(self.size.saturating_sub(self.next)) as usize;
        let bytes = read_at(&self.file, self.next..self.next + length as u64)?;
        buffer[..length].copy_from_slice(&bytes);
        self.next += length as u64;
        Ok(length)
    }
}

/// Some rows of a file, all columns.
pub(crate) enum FileRows {
    /// Page by page.
    Local(LocalRows),
    /// A row group at a time is in memory, as the store gives it.
    Store(ParquetRecordBatchStream<StoreReader>),
}

/// Bytes that a batch of rows should have.
pub(crate) const BATCH_BYTES: u64 = 8 << 20;

/// Rows that the first batch has at most: how large rows are, nobody knows before. A footer tells how large they are
/// packed, and a dictionary packs a large text that every row has into some bits.
const FIRST_ROWS: usize = 256;

/// Rows of a local file, in batches that become as large as they should be.
pub(crate) struct LocalRows {
    file: LocalFile,
    metadata: ArrowReaderMetadata,
    wanted: Option<RowSelection>,
    /// Rows that were given out.
    given: usize,
    at_once: usize,
    most: usize,
    reader: ParquetRecordBatchReader,
}

impl LocalRows {
    /// Those `wanted`, or all; `most` are the rows of a batch by the footer.
    pub(crate) fn new(
        file: LocalFile,
        metadata: ArrowReaderMetadata,
        wanted: Option<RowSelection>,
        most: usize,
    ) -> Result<Self> {
        let at_once = most.min(FIRST_ROWS);
        let reader = Self::reader(&file, &metadata, wanted.as_ref(), 0, at_once)?;
        Ok(Self { file, metadata, wanted, given: 0, at_once, most, reader })
    }

    fn reader(
        file: &LocalFile,
        metadata: &ArrowReaderMetadata,
        wanted: Option<&RowSelection>,
        given: usize,
        at_once: usize,
    ) -> Result<ParquetRecordBatchReader> {
        let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file.clone(), metadata.clone());
        if let Some(wanted) = wanted {
            builder = builder.with_row_selection(wanted.clone());
        }
        builder.with_offset(given).with_batch_size(at_once).build()
    }

    fn next(&mut self) -> std::result::Result<Option<RecordBatch>, ArrowError> {
        let Some(batch) = self.reader.next().transpose()? else { return Ok(None) };
        self.given += batch.num_rows();
        let a_row = batch.get_array_memory_size() as u64 / batch.num_rows().max(1) as u64 + 1;
        let fits = (BATCH_BYTES / a_row).clamp(1, self.most as u64) as usize;
        // To begin again costs the pages before: only for what makes a difference.
        if fits >= self.at_once * 4 || fits <= self.at_once / 4 {
            self.at_once = fits;
            self.reader = Self::reader(&self.file, &self.metadata, self.wanted.as_ref(), self.given, fits)?;
        }
        Ok(Some(batch))
    }
}

impl FileRows {
    pub(crate) async fn next(&mut self) -> foundation::error::Result<Option<RecordBatch>> {
        let failed = |error: &dyn std::fmt::Display| crate::table::storage(error, "rows of a data file cannot be read");
        match self {
            Self::Local(rows) => rows.next().map_err(|error| failed(&error)),
            Self::Store(rows) => rows.try_next().await.map_err(|error| failed(&error)),
        }
    }
}

impl AsyncFileReader for StoreReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes>> {
        Box::pin(async move {
            match &self.file {
                Some(file) => read(file, range),
                None => self.store.get_range(&self.path, range).await.map_err(external),
            }
        })
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>>> {
        Box::pin(async move {
            match &self.file {
                Some(file) => ranges.into_iter().map(|range| read(file, range)).collect(),
                None => self.store.get_ranges(&self.path, &ranges).await.map_err(external),
            }
        })
    }

    fn get_metadata<'a>(
        &'a mut self,
        _: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>>> {
        Box::pin(async move {
            let size = self.size;
            let metadata =
                ParquetMetaDataReader::new().with_prefetch_hint(Some(64 * 1024)).load_and_finish(self, size).await?;
            Ok(Arc::new(metadata))
        })
    }
}
