//! Unchanged rows that a run brings, by where the table has them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use roaring::RoaringTreemap;

use crate::row::{FileRows, RowPosition};
use crate::staging::key_file::KeyFile;
use crate::staging::spill::{Arrived, PARTITIONS, Record, Spill, partition, take};
use crate::staging::{Keys, StagedParquet};
use crate::table::Table;
use crate::table::snapshot_files::TargetFile;
use crate::unchanged::{IndexedFile, RowPlace};
use foundation::error::{Error, ErrorKind, Result};

/// A row that came and that the table has already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnchangedRow {
    /// Its place in the table.
    pub place: RowPlace,
    /// Its place in the export.
    pub arrival: RowPosition,
}

impl Record for UnchangedRow {
    const BYTES: usize = 16;
    // Rows of one file of the table lie in one partition: they are asked for together.
    fn key(&self) -> u128 {
        u128::from(self.place.file as u8) << 120
    }
    fn write(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.place.file.to_le_bytes());
        to.extend_from_slice(&self.place.row.to_le_bytes());
        to.extend_from_slice(&self.arrival.to_bits().to_le_bytes());
    }
    fn read(mut from: &[u8]) -> Self {
        let from = &mut from;
        Self {
            place: RowPlace { file: u32::from_le_bytes(take(from)), row: u32::from_le_bytes(take(from)) },
            arrival: RowPosition::from_bits(u64::from_le_bytes(take(from))),
        }
    }
}

impl Arrived for UnchangedRow {
    fn arrival(&self) -> RowPosition {
        self.arrival
    }
}

/// Unchanged rows of one type out of one file of the export.
#[derive(Debug)]
pub struct UnchangedBatch {
    /// The table's name, such as `Patient`.
    pub resource_type: Arc<str>,
    /// Files that [`RowPlace::file`] counts.
    pub files: Arc<[IndexedFile]>,
    /// The rows.
    pub rows: Vec<UnchangedRow>,
    /// Bytes of NDJSON that they came from.
    pub json_bytes: u64,
}

/// All unchanged rows of one type that a run, or a part of it, brings.
#[derive(Debug)]
pub struct UnchangedRows {
    /// A name among the run's staged files.
    pub name: String,
    files: Arc<[IndexedFile]>,
    /// Rows by file, as places: those only that are still where they were found.
    places: BTreeMap<u32, RoaringTreemap>,
    records: Keys<UnchangedRow>,
    /// Places that are not unchanged any more: their rows are in staged files.
    moved: BTreeMap<u32, RoaringTreemap>,
    /// Rows by file of the export.
    pub by_file: BTreeMap<u32, FileRows>,
}

impl UnchangedRows {
    /// None yet, of the table's files `files`. What does not fit into memory goes into the folder `scratch`.
    pub fn new(name: String, files: Arc<[IndexedFile]>, scratch: &Path) -> Self {
        let records = Keys::Fresh(Spill::new(scratch, usize::MAX));
        Self { name, files, places: BTreeMap::new(), records, moved: BTreeMap::new(), by_file: BTreeMap::new() }
    }

    /// Returns true if rows that were found among these files can be added.
    pub fn takes(&self, files: &Arc<[IndexedFile]>) -> bool {
        Arc::ptr_eq(&self.files, files) && matches!(self.records, Keys::Fresh(_))
    }

    /// Adds rows, which are of one file of the export.
    pub fn add(&mut self, batch: &UnchangedBatch) -> Result<()> {
        let Keys::Fresh(records) = &mut self.records else {
            return Err(Error::new(ErrorKind::Internal, "unchanged rows were added after their checkpoint"));
        };
        for row in &batch.rows {
            self.places.entry(row.place.file).or_default().insert(row.place.row.into());
            records.push(*row)?;
        }
        if let Some(row) = batch.rows.first() {
            let of_file = self.by_file.entry(row.arrival.file()).or_default();
            of_file.rows += batch.rows.len() as u64;
            of_file.json_bytes += batch.json_bytes;
        }
        Ok(())
    }

    /// Rows that an earlier run found, with their records in the file `records`. Those count that came from the
    /// export's files with the indexes `held`. An error of kind `Data` says that the records are not what was written.
    pub fn again(noted: &StagedParquet, records: &Path, held: &HashSet<u32>) -> Result<Self> {
        let mut kept: KeyFile<UnchangedRow> = KeyFile::open(records)?;
        let mut by_file = noted.by_file.clone();
        by_file.retain(|index, _| held.contains(index));
        let counted: u64 = by_file.values().map(|of| of.rows).sum();
        if counted != noted.rows {
            kept.count_only(by_file.keys().copied().collect(), |_| ())?;
        }
        let damaged = |why| Err(Error::new(ErrorKind::Data, format!("{}: {why}", records.display())));
        if kept.rows() != counted {
            return damaged("its rows are not those that the checkpoint names");
        }
        let mut places: BTreeMap<u32, RoaringTreemap> = BTreeMap::new();
        kept.read(0..PARTITIONS, |row| {
            places.entry(row.place.file).or_default().insert(row.place.row.into());
            Ok(())
        })?;
        let files: Arc<[IndexedFile]> = noted.unchanged_in.clone().into();
        if places.keys().any(|file| *file as usize >= files.len()) {
            return damaged("a row of a file that the checkpoint does not name");
        }
        let (records, moved) = (Keys::Kept(kept), BTreeMap::new());
        Ok(Self { name: noted.path.clone(), files, places, records, moved, by_file })
    }

    /// Returns the record that it takes to read them [again](Self::again). `columns` says what the table's were.
    pub fn note(&self, table: &Table, columns: &str) -> StagedParquet {
        StagedParquet {
            resource_type: table.resource_type.clone(),
            path: self.name.clone(),
            size: 0,
            rows: self.rows(),
            by_file: self.by_file.clone(),
            updated: None,
            id_range: None,
            columns: columns.to_owned(),
            unchanged_in: self.files.to_vec(),
        }
    }

    /// Rows that count, each copy of a row for itself.
    pub fn rows(&self) -> u64 {
        self.by_file.values().map(|of| of.rows).sum()
    }

    /// Writes their records into a file, durably; they are read there from then on.
    pub fn save_keys(&mut self, path: &Path) -> Result<()> {
        self.records.save(path)
    }

    /// Bytes of memory that their records take.
    pub fn keys_memory(&self) -> usize {
        self.records.memory()
    }

    /// Puts their records on disk.
    pub fn spill_keys(&mut self) -> Result<()> {
        self.records.spill()
    }

    /// Its files of the table, each with the rows that are unchanged there.
    pub(crate) fn places(&self) -> impl Iterator<Item = (&IndexedFile, &RoaringTreemap)> {
        self.places.iter().filter_map(|(file, rows)| Some((self.files.get(*file as usize)?, rows)))
    }

    /// Takes the rows out that are not where they were found: of each file of the table those that are gone there, or
    /// all where the file is gone. They are to be brought in another way.
    pub(crate) fn take_moved(&mut self, targets: &[TargetFile]) -> Vec<(IndexedFile, u32, RoaringTreemap)> {
        let by_path: HashMap<&str, &TargetFile> =
            targets.iter().map(|target| (target.data.path.as_ref(), target)).collect();
        let mut found = Vec::new();
        for (index, rows) in &mut self.places {
            let Some(file) = self.files.get(*index as usize) else { continue };
            let gone = match by_path.get(file.path.as_str()) {
                Some(target) => &*rows & &target.data.gone,
                None => rows.clone(),
            };
            if !gone.is_empty() {
                *rows -= &gone;
                *self.moved.entry(*index).or_default() |= &gone;
                found.push((file.clone(), *index, gone));
            }
        }
        self.places.retain(|_, rows| !rows.is_empty());
        found
    }

    /// The newest arrival of each of these rows of one file, in their order.
    pub(crate) fn arrivals(&self, file: u32, rows: &RoaringTreemap) -> Result<Vec<RowPosition>> {
        let mut found = vec![RowPosition::default(); rows.len() as usize];
        self.for_each_of(file, |row| {
            if rows.contains(row.place.row.into()) {
                let at = (rows.rank(row.place.row.into()) - 1) as usize;
                found[at] = found[at].max(row.arrival);
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Goes through the records of one file of the table, those included that are moved.
    fn for_each_of(&self, file: u32, mut each: impl FnMut(UnchangedRow) -> Result<()>) -> Result<()> {
        let one = UnchangedRow { place: RowPlace { file, row: 0 }, arrival: RowPosition::default() };
        let at = partition(one.key());
        self.records.read(at..at + 1, |row| if row.place.file == file { each(row) } else { Ok(()) })
    }

    /// Goes through the rows that are still unchanged in the file of the table at `path`.
    pub(crate) fn for_each_in(&self, path: &str, mut each: impl FnMut(UnchangedRow) -> Result<()>) -> Result<()> {
        for (index, rows) in &self.places {
            if self.files.get(*index as usize).is_some_and(|file| file.path == path) {
                self.for_each_of(*index, |row| if rows.contains(row.place.row.into()) { each(row) } else { Ok(()) })?;
            }
        }
        Ok(())
    }

    /// Counts a row less of a file of the export: it is staged now.
    pub(crate) fn hand_over(&mut self, arrival: RowPosition) {
        if let Some(of_file) = self.by_file.get_mut(&arrival.file()) {
            of_file.rows = of_file.rows.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(files: &Arc<[IndexedFile]>, rows: &[(u32, u32, u32, u64)]) -> UnchangedBatch {
        let row = |&(file, row, from, line): &(u32, u32, u32, u64)| UnchangedRow {
            place: RowPlace { file, row },
            arrival: RowPosition::new(from, line),
        };
        UnchangedBatch {
            resource_type: "Patient".into(),
            files: files.clone(),
            rows: rows.iter().map(row).collect(),
            json_bytes: 10,
        }
    }

    // Breaks if rows of an export's file that comes again count, or if rows come back at other places.
    #[test]
    fn what_is_written_down_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = |path: &str| IndexedFile { path: path.into(), size: 1 };
        let files: Arc<[IndexedFile]> = Arc::new([file("a"), file("b")]);
        let mut rows = UnchangedRows::new("unchanged-1".into(), files.clone(), folder.path());
        rows.add(&batch(&files, &[(0, 5, 3, 1), (1, 7, 3, 2)])).unwrap();
        rows.add(&batch(&files, &[(0, 6, 4, 1), (0, 5, 4, 9)])).unwrap();
        assert_eq!(rows.rows(), 4);
        let noted = StagedParquet {
            resource_type: "Patient".into(),
            path: rows.name.clone(),
            size: 0,
            rows: rows.rows(),
            by_file: rows.by_file.clone(),
            updated: None,
            id_range: None,
            columns: String::new(),
            unchanged_in: files.to_vec(),
        };
        let path = folder.path().join("keys");
        rows.save_keys(&path).unwrap();
        let places = |rows: &UnchangedRows| {
            rows.places().map(|(file, rows)| (file.path.clone(), rows.iter().collect())).collect::<Vec<_>>()
        };
        let all = UnchangedRows::again(&noted, &path, &HashSet::from([3, 4])).unwrap();
        assert_eq!(places(&all), [("a".to_owned(), vec![5, 6]), ("b".to_owned(), vec![7])]);
        let newest = all.arrivals(0, &RoaringTreemap::from_iter([5, 6])).unwrap();
        assert_eq!(newest, [RowPosition::new(4, 9), RowPosition::new(4, 1)]);
        let some = UnchangedRows::again(&noted, &path, &HashSet::from([3])).unwrap();
        assert_eq!((places(&some), some.rows()), (vec![("a".into(), vec![5]), ("b".into(), vec![7])], 2));
        let fewer = StagedParquet { rows: 3, by_file: BTreeMap::new(), ..noted };
        assert!(UnchangedRows::again(&fewer, &path, &HashSet::from([3])).is_ok_and(|rows| rows.rows() == 0));
    }
}
