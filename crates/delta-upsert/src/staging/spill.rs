//! Records by the first byte of their key: in memory, and on disk beyond what memory may take.
//!
//! A join of two sets of any size is made group by group: both sides are gathered this way, and each range of
//! [`PARTITIONS`] is then read by itself.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::row::{RowKey, RowPosition};
use foundation::error::{Context, ErrorKind, Result};
use foundation::secure_fs::unnamed_file;

/// Number of parts of the key space: keys are hashes, so each part has about the same share.
pub(crate) const PARTITIONS: usize = 256;

/// Record of a [`Spill`].
pub(crate) trait Record: Copy {
    /// Length of a record on disk.
    const BYTES: usize;
    /// Key that it is found by.
    fn key(&self) -> u128;
    /// Appends [`Record::BYTES`] bytes.
    fn write(&self, to: &mut Vec<u8>);
    /// Reads them back.
    fn read(from: &[u8]) -> Self;
}

/// Record of a row that a run brings.
pub(crate) trait Arrived: Record {
    /// Its place in the export.
    fn arrival(&self) -> RowPosition;
}

/// Place and rank of a row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyAt {
    pub key: u128,
    pub last_updated: i64,
    pub version: i64,
    pub arrival: RowPosition,
    /// Index of its file among the run's or the table's.
    pub file: u32,
    /// The row in the file, [`KeyAt::SUBSETTED`] and [`KeyAt::REPLAYED`].
    row: u32,
}

impl KeyAt {
    const SUBSETTED: u32 = 1 << 31;
    const REPLAYED: u32 = 1 << 30;
    /// Rows that a file may have.
    pub(crate) const MAX_ROWS: u64 = (1 << 30) - 1;

    pub(crate) fn new(key: RowKey, file: u32, row: u32) -> Self {
        let subsetted = if key.subsetted { Self::SUBSETTED } else { 0 };
        let replayed = if key.replayed { Self::REPLAYED } else { 0 };
        Self {
            key: key.key,
            last_updated: key.last_updated,
            version: key.version,
            arrival: key.arrival,
            file,
            row: row & Self::MAX_ROWS as u32 | subsetted | replayed,
        }
    }

    pub(crate) fn row(&self) -> u64 {
        u64::from(self.row) & Self::MAX_ROWS
    }

    /// The same row, with the index of its file.
    pub(crate) fn of_file(self, file: usize) -> Self {
        Self { file: file as u32, ..self }
    }

    pub(crate) fn row_key(&self) -> RowKey {
        RowKey {
            key: self.key,
            last_updated: self.last_updated,
            version: self.version,
            arrival: self.arrival,
            subsetted: self.row & Self::SUBSETTED != 0,
            replayed: self.row & Self::REPLAYED != 0,
        }
    }
}

/// Reads the bytes of a field off the front.
pub(crate) fn take<const N: usize>(from: &mut &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    if let Some((first, rest)) = from.split_first_chunk::<N>() {
        (bytes, *from) = (*first, rest);
    }
    bytes
}

impl Record for KeyAt {
    const BYTES: usize = 48;
    fn key(&self) -> u128 {
        self.key
    }
    fn write(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.key.to_le_bytes());
        to.extend_from_slice(&self.last_updated.to_le_bytes());
        to.extend_from_slice(&self.version.to_le_bytes());
        to.extend_from_slice(&self.arrival.to_bits().to_le_bytes());
        to.extend_from_slice(&self.file.to_le_bytes());
        to.extend_from_slice(&self.row.to_le_bytes());
    }
    fn read(mut from: &[u8]) -> Self {
        let from = &mut from;
        Self {
            key: u128::from_le_bytes(take(from)),
            last_updated: i64::from_le_bytes(take(from)),
            version: i64::from_le_bytes(take(from)),
            arrival: RowPosition::from_bits(u64::from_le_bytes(take(from))),
            file: u32::from_le_bytes(take(from)),
            row: u32::from_le_bytes(take(from)),
        }
    }
}

impl Arrived for KeyAt {
    fn arrival(&self) -> RowPosition {
        self.arrival
    }
}

/// Meaning of a row, to be compared with another's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ContentAt {
    pub key: u128,
    pub content: u128,
    pub file: u32,
    pub row: u32,
}

impl Record for ContentAt {
    const BYTES: usize = 40;
    fn key(&self) -> u128 {
        self.key
    }
    fn write(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.key.to_le_bytes());
        to.extend_from_slice(&self.content.to_le_bytes());
        to.extend_from_slice(&self.file.to_le_bytes());
        to.extend_from_slice(&self.row.to_le_bytes());
    }
    fn read(mut from: &[u8]) -> Self {
        let from = &mut from;
        Self {
            key: u128::from_le_bytes(take(from)),
            content: u128::from_le_bytes(take(from)),
            file: u32::from_le_bytes(take(from)),
            row: u32::from_le_bytes(take(from)),
        }
    }
}

/// The part of the key space that a key is in.
pub(crate) fn partition(key: u128) -> usize {
    (key >> 120) as usize
}

/// A part of the key space: some partitions, or a slice of one.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub partitions: Range<usize>,
    slice: u8,
    slices: u8,
}

impl Part {
    pub(crate) const ALL: Part = Part { partitions: 0..PARTITIONS, slice: 0, slices: 1 };

    pub(crate) fn has(&self, key: u128) -> bool {
        self.partitions.contains(&partition(key)) && (key >> 112) as u8 % self.slices == self.slice
    }

    /// Parts of at most `most` rows, where `rows` are in each partition.
    pub(crate) fn of(rows: &[u64; PARTITIONS], most: u64) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let mut gathered = 0;
        for (at, rows) in rows.iter().enumerate() {
            match parts.last_mut() {
                Some(last) if last.slices == 1 && gathered + rows <= most => {
                    last.partitions.end = at + 1;
                    gathered += rows;
                }
                _ => {
                    let slices = u8::try_from(rows.div_ceil(most.max(1)).clamp(1, 255)).unwrap_or(255);
                    parts.extend((0..slices).map(|slice| Part { partitions: at..at + 1, slice, slices }));
                    gathered = *rows;
                }
            }
        }
        parts
    }
}

/// Records of one type.
#[derive(Debug)]
pub(crate) struct Spill<T> {
    folder: PathBuf,
    memory: Vec<T>,
    /// True if those are in the order of partitions.
    sorted: bool,
    /// Bytes that records may take in memory before they go to disk.
    limit: usize,
    disk: Option<Disk>,
    rows: u64,
}

/// A file without a name: it goes with the process, however that ends.
#[derive(Debug)]
struct Disk {
    file: File,
    end: u64,
    /// By partition, pieces of the file: where, and how many records.
    pieces: Vec<Vec<(u64, u32)>>,
}

impl<T: Record> Spill<T> {
    /// Nothing yet; a file in `folder` is made when more than `limit` bytes come.
    pub(crate) fn new(folder: &Path, limit: usize) -> Self {
        Self { folder: folder.to_path_buf(), memory: Vec::new(), sorted: false, limit, disk: None, rows: 0 }
    }

    /// Records.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// Bytes that it takes of memory.
    pub(crate) fn memory(&self) -> usize {
        self.memory.capacity() * size_of::<T>()
    }

    /// Adds a record.
    pub(crate) fn push(&mut self, record: T) -> Result<()> {
        if self.memory.len() * size_of::<T>() >= self.limit {
            self.spill()?;
        }
        self.memory.push(record);
        self.sorted = false;
        self.rows += 1;
        Ok(())
    }

    /// Puts what is in memory on disk.
    pub(crate) fn spill(&mut self) -> Result<()> {
        let failed = "keys cannot be spilled";
        if self.memory.is_empty() {
            return Ok(());
        }
        let disk = match &mut self.disk {
            Some(disk) => disk,
            none => {
                let file = unnamed_file(&self.folder)?;
                none.insert(Disk { file, end: 0, pieces: vec![Vec::new(); PARTITIONS] })
            }
        };
        self.memory.sort_unstable_by_key(|record| partition(record.key()));
        disk.file.seek(SeekFrom::Start(disk.end)).context(ErrorKind::State, failed)?;
        let mut writer = BufWriter::with_capacity(1 << 18, &disk.file);
        let mut bytes = Vec::with_capacity(T::BYTES);
        for piece in self.memory.chunk_by(|a, b| partition(a.key()) == partition(b.key())) {
            disk.pieces[partition(piece[0].key())].push((disk.end, piece.len() as u32));
            for record in piece {
                bytes.clear();
                record.write(&mut bytes);
                writer.write_all(&bytes).context(ErrorKind::State, failed)?;
            }
            disk.end += (piece.len() * T::BYTES) as u64;
        }
        writer.flush().context(ErrorKind::State, failed)?;
        drop(writer);
        self.memory = Vec::new();
        Ok(())
    }

    /// Puts what is in memory in the order of partitions, so that each can be found.
    pub(crate) fn sort(&mut self) {
        self.memory.sort_unstable_by_key(|record| partition(record.key()));
        self.sorted = true;
    }

    /// Goes through the records of some partitions.
    pub(crate) fn read(&self, partitions: Range<usize>, mut each: impl FnMut(T) -> Result<()>) -> Result<()> {
        if let Some(disk) = &self.disk {
            let mut bytes = Vec::new();
            for (at, records) in disk.pieces[partitions.clone()].iter().flatten() {
                bytes.resize(*records as usize * T::BYTES, 0);
                let mut file = &disk.file;
                file.seek(SeekFrom::Start(*at))
                    .and_then(|_| file.read_exact(&mut bytes))
                    .context(ErrorKind::State, "spilled keys cannot be read back")?;
                bytes.chunks_exact(T::BYTES).try_for_each(|bytes| each(T::read(bytes)))?;
            }
        }
        let here = match self.sorted {
            true => {
                let before = |end: usize| self.memory.partition_point(|record| partition(record.key()) < end);
                &self.memory[before(partitions.start)..before(partitions.end)]
            }
            false => &self.memory,
        };
        let here = here.iter().filter(|record| partitions.contains(&partition(record.key())));
        here.copied().try_for_each(each)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::row::key_of;

    /// A record that is like no other number's, of one of three files of the export.
    pub(crate) fn record(number: u32) -> KeyAt {
        let key = RowKey {
            key: key_of(&number.to_le_bytes()),
            last_updated: i64::from(number) - 7,
            version: RowKey::ABSENT,
            arrival: RowPosition::new(number % 3, u64::from(number)),
            subsetted: number.is_multiple_of(2),
            replayed: number.is_multiple_of(3),
        };
        KeyAt::new(key, 5, number)
    }

    // Breaks if a record is lost, comes twice, or comes back as another, whatever part of it is on disk.
    #[test]
    fn what_goes_in_comes_out_partition_by_partition() {
        let folder = tempfile::tempdir().unwrap();
        for limit in [0, 48, 1000 * 48, usize::MAX] {
            let mut spill = Spill::new(folder.path(), limit);
            for number in 0..5000 {
                spill.push(record(number)).unwrap();
            }
            assert_eq!((spill.rows(), spill.disk.is_some()), (5000, limit != usize::MAX));
            let mut found = Vec::new();
            for first in (0..PARTITIONS).step_by(10) {
                let part = first..(first + 10).min(PARTITIONS);
                let each = |record: KeyAt| {
                    assert!(part.contains(&partition(record.key)));
                    found.push(record);
                    Ok(())
                };
                spill.read(part.clone(), each).unwrap();
            }
            found.sort_by_key(KeyAt::row);
            assert_eq!(found.len(), 5000);
            for (number, found) in found.iter().enumerate() {
                assert_eq!(format!("{found:?}"), format!("{:?}", record(number as u32)));
            }
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "its file has no name");
    }

    // Breaks if a key falls into no part, or into two.
    #[test]
    fn each_key_is_in_one_part() {
        let mut rows = [10; PARTITIONS];
        rows[7] = 1000;
        for most in [1, 25, 100, 10_000] {
            let parts = Part::of(&rows, most);
            assert!(
                parts
                    .iter()
                    .all(|part| part.partitions.len() == 1 || part.partitions.len() as u64 * 10 <= most.max(1000))
            );
            for number in 0..5000u32 {
                let key = key_of(&number.to_le_bytes());
                assert_eq!(parts.iter().filter(|part| part.has(key)).count(), 1);
            }
        }
    }
}
