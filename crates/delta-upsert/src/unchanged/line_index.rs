//! Live rows of a table by id: the hash of the text that each came from, its version, and where it is.
//!
//! In memory where that suffices; else in a file without a name, of which a lookup reads one piece. Only the whole key
//! and the whole hash say that a row is unchanged: nothing here is taken for granted that is merely likely.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path as FolderPath;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use twox_hash::XxHash3_64;

use crate::matching::keys::OpenFile;
use crate::row::RowKey;
use crate::staging::spill::{PARTITIONS, Record, Spill, partition, take};
use crate::table::Table;
use crate::table::reader::read_at;
use crate::table::snapshot_files::targets;
use crate::unchanged::{IndexedFile, LineHash, RowPlace};
use foundation::error::{Context, Error, ErrorKind, Result};
use foundation::secure_fs::unnamed_file;

/// Slots for each seven rows: with fewer, lookups of ids that are not there become long.
const SLOTS_A_ROW: (u64, u64) = (10, 7);

/// Slots of an index on disk that one read brings.
const READ_SLOTS: u64 = 16;

/// Time of a lookup from which an index on disk costs more than to encode the row.
pub const MOST_LOOKUP: Duration = Duration::from_micros(25);

/// Lookups after which their time is judged.
const JUDGED: u64 = 4096;

/// Memory that all indexes of a run may take together.
#[derive(Debug, Clone)]
pub struct IndexMemory(Arc<AtomicUsize>);

impl IndexMemory {
    /// So many bytes.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(bytes)))
    }

    fn take(&self, bytes: usize) -> Option<Taken> {
        let less = |left: usize| left.checked_sub(bytes);
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok();
        taken.then(|| Taken { of: self.clone(), bytes })
    }
}

/// Part of an [`IndexMemory`], released on drop.
#[derive(Debug)]
struct Taken {
    of: IndexMemory,
    bytes: usize,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.of.0.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

/// A row in the index. Hashes of 0 equal no other.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    key: [u64; 2],
    line: u64,
    version: u64,
    /// File and row, plus one: 0 is an empty slot.
    place: u64,
}

impl Entry {
    fn key(&self) -> u128 {
        u128::from(self.key[0]) << 64 | u128::from(self.key[1])
    }
}

impl Record for Entry {
    const BYTES: usize = 40;
    fn key(&self) -> u128 {
        Entry::key(self)
    }
    fn write(&self, to: &mut Vec<u8>) {
        for number in [self.key[0], self.key[1], self.line, self.version, self.place] {
            to.extend_from_slice(&number.to_le_bytes());
        }
    }
    fn read(mut from: &[u8]) -> Self {
        let mut number = || u64::from_le_bytes(take(&mut from));
        Self { key: [number(), number()], line: number(), version: number(), place: number() }
    }
}

/// Hash of a row's version; 0 where it has none, since then only the text can tell.
fn version_hash(row: &RowKey) -> u64 {
    if row.version == RowKey::ABSENT {
        return 0;
    }
    let mut said = [0; 17];
    said[..8].copy_from_slice(&row.last_updated.to_le_bytes());
    said[8..16].copy_from_slice(&row.version.to_le_bytes());
    said[16] = row.subsetted.into();
    XxHash3_64::oneshot(&said).max(1)
}

/// A live row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Known(Entry);

impl Known {
    /// Returns true if the row came from the text with this hash.
    pub fn is_of(&self, line: LineHash) -> bool {
        self.0.line == line.to_bits() as u64
    }

    /// Returns true if the row is of this very version. A row without a number of its version is not.
    pub fn is_version(&self, row: &RowKey) -> bool {
        self.0.version != 0 && self.0.version == version_hash(row)
    }

    /// Its place.
    pub fn place(&self) -> RowPlace {
        let place = self.0.place.saturating_sub(1);
        RowPlace { file: (place >> 32) as u32, row: place as u32 }
    }
}

/// Slots of a part of the key space: a hash table of its own.
#[derive(Debug, Clone, Copy)]
struct Region {
    first: u64,
    slots: u64,
}

impl Region {
    /// The slot at which the search for a key begins.
    fn start(&self, key: u128) -> u64 {
        ((u128::from(key as u64) * u128::from(self.slots)) >> 64) as u64
    }
}

#[derive(Debug)]
enum Slots {
    Memory(Vec<Entry>, #[expect(dead_code, reason = "held until it is dropped")] Taken),
    Disk(File),
}

/// Live rows of a table by id.
#[derive(Debug)]
pub struct LineIndex {
    files: Arc<[IndexedFile]>,
    /// One, or one for each partition of the keys.
    regions: Vec<Region>,
    slots: Slots,
    rows: u64,
    /// Lookups on disk, and the nanoseconds that they took.
    lookups: AtomicU64,
    nanos: AtomicU64,
}

impl LineIndex {
    /// Reads the live rows of `table`: in memory where `memory` has enough left, else on disk in `folder`. Blocks while
    /// it reads.
    pub async fn load(table: &Table, memory: &IndexMemory, folder: &FolderPath) -> Result<Self> {
        let targets = targets(table)?;
        let mut live = 0;
        for target in &targets {
            let rows = match target.rows {
                Some(rows) => rows,
                None => OpenFile::open(table, &target.data).await?.rows(),
            };
            live += rows.saturating_sub(target.data.gone.len());
        }
        let slots = slots_for(live);
        let taken = usize::try_from(slots).ok().and_then(|slots| memory.take(slots.checked_mul(size_of::<Entry>())?));
        let mut build = match taken {
            Some(taken) => Build::Memory(vec![Entry::default(); slots as usize], taken),
            None => Build::Disk(Spill::new(folder, SPILL)),
        };
        let mut rows = 0;
        for (index, target) in targets.iter().enumerate() {
            let file = OpenFile::open(table, &target.data).await?;
            let each = |row: u64, key: Option<RowKey>, line: Option<LineHash>| {
                let Some(key) = key else { return Ok(()) };
                let place = u32::try_from(row).ok().map(|row| ((index as u64) << 32 | u64::from(row)) + 1);
                let place = place.ok_or_else(|| Error::new(ErrorKind::Table, "a data file of too many rows"))?;
                rows += 1;
                build.put(Entry {
                    key: [(key.key >> 64) as u64, key.key as u64],
                    line: line.map_or(0, |line| line.to_bits() as u64),
                    version: version_hash(&key),
                    place,
                })
            };
            file.for_each_line(each).await?;
        }
        let files = targets.iter();
        let files = files.map(|target| IndexedFile { path: target.data.path.to_string(), size: target.data.size });
        let (regions, slots) = build.finish(folder)?;
        let files = files.collect();
        Ok(Self { files, regions, slots, rows, lookups: AtomicU64::new(0), nanos: AtomicU64::new(0) })
    }

    /// Data files that [`RowPlace::file`] counts.
    pub fn files(&self) -> &Arc<[IndexedFile]> {
        &self.files
    }

    /// Rows.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Returns true if it is on disk, since memory did not suffice.
    pub fn is_on_disk(&self) -> bool {
        matches!(self.slots, Slots::Disk(_))
    }

    /// Returns true if it is on a disk so slow that rows are better encoded than looked up.
    pub fn is_too_slow(&self) -> bool {
        let lookups = self.lookups.load(Ordering::Relaxed);
        lookups >= JUDGED && self.nanos.load(Ordering::Relaxed) / lookups > MOST_LOOKUP.as_nanos() as u64
    }

    /// The live row with this key; of an id that the table has twice, one that equals nothing.
    pub fn get(&self, key: u128) -> Result<Option<Known>> {
        let Some(region) = self.regions.get(partition(key) * self.regions.len() / PARTITIONS) else { return Ok(None) };
        match &self.slots {
            Slots::Memory(slots, _) => {
                Ok(find(slots, region.start(key) as usize, key).and_then(Result::ok).map(|at| Known(slots[at])))
            }
            Slots::Disk(file) => {
                let started = Instant::now();
                let found = self.read(file, region, key);
                self.lookups.fetch_add(1, Ordering::Relaxed);
                self.nanos.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
                found
            }
        }
    }

    fn read(&self, file: &File, region: &Region, key: u128) -> Result<Option<Known>> {
        let (mut at, mut looked_at) = (region.start(key), 0);
        while looked_at < region.slots {
            let some = READ_SLOTS.min(region.slots - at);
            let from = (region.first + at) * Entry::BYTES as u64;
            let bytes = read_at(file, from..from + some * Entry::BYTES as u64)
                .context(ErrorKind::State, "the index of lines cannot be read back")?;
            for entry in bytes.chunks_exact(Entry::BYTES).map(Entry::read) {
                if entry.place == 0 {
                    return Ok(None);
                }
                if entry.key() == key {
                    return Ok(Some(Known(entry)));
                }
            }
            looked_at += some;
            at = (at + some) % region.slots;
        }
        Ok(None)
    }
}

fn slots_for(rows: u64) -> u64 {
    rows * SLOTS_A_ROW.0 / SLOTS_A_ROW.1 + 1
}

/// The slot of a key: `Ok` where it is there, `Err` where it would be put; `None` where all slots are taken.
fn find(slots: &[Entry], start: usize, key: u128) -> Option<std::result::Result<usize, usize>> {
    for at in (start..slots.len()).chain(0..start) {
        if slots[at].place == 0 {
            return Some(Err(at));
        }
        if slots[at].key() == key {
            return Some(Ok(at));
        }
    }
    None
}

/// Puts an entry into the slots of a region.
fn put(slots: &mut [Entry], entry: Entry) -> Result<()> {
    let region = Region { first: 0, slots: slots.len() as u64 };
    match find(slots, region.start(entry.key()) as usize, entry.key()) {
        // The id is in the table twice: matching decides which row stays.
        Some(Ok(at)) => (slots[at].line, slots[at].version) = (0, 0),
        Some(Err(at)) => slots[at] = entry,
        None => return Err(Error::new(ErrorKind::Table, "the table has more rows than its log says")),
    }
    Ok(())
}

/// Bytes of entries that are gathered before they go to disk.
const SPILL: usize = 8 << 20;

/// An index that is being made.
enum Build {
    Memory(Vec<Entry>, Taken),
    Disk(Spill<Entry>),
}

impl Build {
    fn put(&mut self, entry: Entry) -> Result<()> {
        match self {
            Build::Memory(slots, _) => put(slots, entry),
            Build::Disk(entries) => entries.push(entry),
        }
    }

    fn finish(self, folder: &FolderPath) -> Result<(Vec<Region>, Slots)> {
        let entries = match self {
            Build::Memory(slots, taken) => {
                let all = Region { first: 0, slots: slots.len() as u64 };
                return Ok((vec![all], Slots::Memory(slots, taken)));
            }
            Build::Disk(mut entries) => {
                entries.spill()?;
                entries
            }
        };
        let failed = "the index of lines cannot be written";
        let file = unnamed_file(folder)?;
        let mut writer = BufWriter::with_capacity(1 << 18, &file);
        let (mut regions, mut first, mut bytes) = (Vec::with_capacity(PARTITIONS), 0, Vec::new());
        for partition in 0..PARTITIONS {
            let mut found = Vec::new();
            entries.read(partition..partition + 1, |entry| {
                found.push(entry);
                Ok(())
            })?;
            let mut slots = vec![Entry::default(); slots_for(found.len() as u64) as usize];
            found.into_iter().try_for_each(|entry| put(&mut slots, entry))?;
            for entry in &slots {
                bytes.clear();
                entry.write(&mut bytes);
                writer.write_all(&bytes).context(ErrorKind::State, failed)?;
            }
            regions.push(Region { first, slots: slots.len() as u64 });
            first += slots.len() as u64;
        }
        writer.flush().context(ErrorKind::State, failed)?;
        drop(writer);
        Ok((regions, Slots::Disk(file)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::{RowPosition, key_of};

    fn entry(number: u64) -> Entry {
        let key = key_of(&number.to_le_bytes());
        Entry { key: [(key >> 64) as u64, key as u64], line: number + 1, version: number + 2, place: number + 1 }
    }

    fn index(rows: u64, memory: usize, twice: u64) -> LineIndex {
        let folder = tempfile::tempdir().unwrap();
        let slots = slots_for(rows + twice);
        let mut build = match IndexMemory::new(memory).take(slots as usize * size_of::<Entry>()) {
            Some(taken) => Build::Memory(vec![Entry::default(); slots as usize], taken),
            None => Build::Disk(Spill::new(folder.path(), 1000)),
        };
        (0..rows).chain(0..twice).for_each(|number| build.put(entry(number)).unwrap());
        let (regions, slots) = build.finish(folder.path()).unwrap();
        let none = || AtomicU64::new(0);
        LineIndex { files: Arc::new([]), regions, slots, rows, lookups: none(), nanos: none() }
    }

    // Breaks if a row is lost or another's is given, in memory or on disk, or if an id that is there twice equals one.
    #[test]
    fn each_row_is_found_and_no_other() {
        for memory in [0, usize::MAX / 2] {
            let index = index(20_000, memory, 10);
            assert_eq!(index.is_on_disk(), memory == 0);
            for number in 0..20_000u64 {
                let known = index.get(key_of(&number.to_le_bytes())).unwrap().unwrap();
                let line = LineHash::from_bits(number as i64 + 1).unwrap();
                assert_eq!(known.is_of(line), number >= 10, "{number}");
                assert!(!known.is_of(LineHash::from_bits(number as i64 + 2).unwrap()));
                assert_eq!(u64::from(known.place().row), number);
            }
            assert!((20_000..40_000u64).all(|number| index.get(key_of(&number.to_le_bytes())).unwrap().is_none()));
        }
    }

    #[test]
    fn memory_is_given_back() {
        let memory = IndexMemory::new(100);
        let taken = memory.take(80).unwrap();
        assert!(memory.take(30).is_none());
        drop(taken);
        assert!(memory.take(100).is_some());
    }

    // Breaks if a row without a number of its version is taken for the same version, or if a part of a version is left
    // out.
    #[test]
    fn versions_are_equal_as_a_whole() {
        let row = |last_updated, version, subsetted| RowKey {
            key: 1,
            last_updated,
            version,
            arrival: RowPosition::default(),
            subsetted,
            replayed: false,
        };
        let known = |row: &RowKey| Known(Entry { version: version_hash(row), ..Entry::default() });
        let one = row(5, 1, false);
        assert!(known(&one).is_version(&one));
        for other in [row(6, 1, false), row(5, 2, false), row(5, 1, true), row(RowKey::ABSENT, 1, false)] {
            assert!(!known(&one).is_version(&other));
        }
        let none = row(5, RowKey::ABSENT, false);
        assert!(!known(&none).is_version(&none));
    }
}
