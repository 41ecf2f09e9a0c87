//! Records of a run's rows in a file that outlives the process, by the first byte of the key: read where they are.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::ops::Range;
use std::path::{Path, PathBuf};

use twox_hash::XxHash3_64;

use crate::staging::spill::{Arrived, PARTITIONS, Spill};
use foundation::error::{Context, Error, ErrorKind, Result};
use foundation::secure_fs::{private_append, private_dir};

const MAGIC: &[u8; 8] = b"fhlkeys1";
/// Of each partition: where it begins, its records, and the hash of its bytes.
const ENTRY: usize = 24;
const HEADER: usize = MAGIC.len() + PARTITIONS * ENTRY + 8;

/// The records.
#[derive(Debug)]
pub(crate) struct KeyFile<T> {
    path: PathBuf,
    partitions: Vec<Partition>,
    /// Indexes of the export's files whose rows count; `None` for all.
    counts: Option<HashSet<u32>>,
    rows: u64,
    records: PhantomData<T>,
}

#[derive(Debug, Clone, Copy)]
struct Partition {
    at: u64,
    records: u64,
    hash: u64,
}

impl<T: Arrived> KeyFile<T> {
    /// Writes records into a new file at `path`, durable when this returns.
    pub(crate) fn save(keys: &mut Spill<T>, path: &Path) -> Result<Self> {
        let failed = || format!("{} cannot be written", path.display());
        if let Some(folder) = path.parent() {
            private_dir(folder)?;
        }
        // What a killed run left under the name.
        let _ = std::fs::remove_file(path);
        drop(private_append(path)?);
        let file = File::options().write(true).open(path).context(ErrorKind::State, failed())?;
        let mut file = BufWriter::with_capacity(1 << 18, file);
        file.write_all(&[0; HEADER]).context(ErrorKind::State, failed())?;
        let mut partitions = Vec::with_capacity(PARTITIONS);
        let (mut at, mut bytes) = (HEADER as u64, Vec::new());
        keys.sort();
        for partition in 0..PARTITIONS {
            bytes.clear();
            keys.read(partition..partition + 1, |record| {
                record.write(&mut bytes);
                Ok(())
            })?;
            file.write_all(&bytes).context(ErrorKind::State, failed())?;
            let records = (bytes.len() / T::BYTES) as u64;
            partitions.push(Partition { at, records, hash: XxHash3_64::oneshot(&bytes) });
            at += bytes.len() as u64;
        }
        let mut header = MAGIC.to_vec();
        for partition in &partitions {
            for number in [partition.at, partition.records, partition.hash] {
                header.extend_from_slice(&number.to_le_bytes());
            }
        }
        header.extend_from_slice(&XxHash3_64::oneshot(&header).to_le_bytes());
        let done = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&header)).and_then(|()| file.flush());
        done.and_then(|()| file.get_ref().sync_all()).context(ErrorKind::State, failed())?;
        Ok(Self { path: path.to_path_buf(), rows: keys.rows(), partitions, counts: None, records: PhantomData })
    }

    /// The records in the file at `path`. An error of kind `Data` says that the file is not what was written.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let failed = || format!("{} cannot be read", path.display());
        let mut header = vec![0; HEADER];
        let mut file = File::open(path).context(ErrorKind::State, failed())?;
        match file.read_exact(&mut header) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Err(damaged(path)),
            read => read.context(ErrorKind::State, failed())?,
        }
        let (said, hash) = header.split_at(HEADER - 8);
        if !said.starts_with(MAGIC) || XxHash3_64::oneshot(said).to_le_bytes() != hash {
            return Err(damaged(path));
        }
        let mut numbers = said[MAGIC.len()..].as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        let mut partitions = Vec::with_capacity(PARTITIONS);
        while let (Some(at), Some(records), Some(hash)) = (numbers.next(), numbers.next(), numbers.next()) {
            partitions.push(Partition { at, records, hash });
        }
        let rows = partitions.iter().map(|partition| partition.records).sum();
        Ok(Self { path: path.to_path_buf(), partitions, counts: None, rows, records: PhantomData })
    }

    /// Lets only rows of the export's files with these indexes count; the others' records are given to `void`.
    pub(crate) fn count_only(&mut self, indexes: HashSet<u32>, mut void: impl FnMut(T)) -> Result<()> {
        let mut rows = 0;
        self.read(0..PARTITIONS, |record| {
            if indexes.contains(&record.arrival().file()) {
                rows += 1;
            } else {
                void(record);
            }
            Ok(())
        })?;
        (self.rows, self.counts) = (rows, Some(indexes));
        Ok(())
    }

    /// Records that count.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// Goes through the records of some partitions.
    pub(crate) fn read(&self, partitions: Range<usize>, mut each: impl FnMut(T) -> Result<()>) -> Result<()> {
        let failed = || format!("{} cannot be read", self.path.display());
        let mut file = File::open(&self.path).context(ErrorKind::State, failed())?;
        let mut bytes = Vec::new();
        for partition in &self.partitions[partitions] {
            bytes.resize(partition.records as usize * T::BYTES, 0);
            file.seek(SeekFrom::Start(partition.at)).context(ErrorKind::State, failed())?;
            match file.read_exact(&mut bytes) {
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Err(damaged(&self.path)),
                read => read.context(ErrorKind::State, failed())?,
            }
            if XxHash3_64::oneshot(&bytes) != partition.hash {
                return Err(damaged(&self.path));
            }
            let records = bytes.chunks_exact(T::BYTES).map(T::read);
            let counts =
                |record: &T| self.counts.as_ref().is_none_or(|counts| counts.contains(&record.arrival().file()));
            records.filter(counts).try_for_each(&mut each)?;
        }
        Ok(())
    }
}

fn damaged(path: &Path) -> Error {
    Error::new(ErrorKind::Data, format!("{}: checksum mismatch", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::staging::spill::KeyAt;
    use crate::staging::spill::tests::record;

    // Breaks if what is kept comes back otherwise, if rows that come again count, or if a file that was cut or changed
    // is taken for whole.
    #[test]
    fn what_is_saved_is_read_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        for limit in [1000 * 48, usize::MAX] {
            let mut spill = Spill::new(folder.path(), limit);
            for number in 0..10_000 {
                spill.push(record(number)).unwrap();
            }
            KeyFile::save(&mut spill, &path).unwrap();
            let read = |keys: &KeyFile<KeyAt>| {
                let mut found = Vec::new();
                for first in (0..PARTITIONS).step_by(16) {
                    keys.read(first..first + 16, |record| {
                        found.push(record);
                        Ok(())
                    })?;
                }
                found.sort_by_key(KeyAt::row);
                Ok::<_, Error>(found.iter().map(|found| format!("{found:?}")).collect::<Vec<_>>())
            };
            let expected = |wanted: &dyn Fn(u32) -> bool| -> Vec<String> {
                (0..10_000).filter(|number| wanted(*number)).map(|number| format!("{:?}", record(number))).collect()
            };
            let mut keys = KeyFile::open(&path).unwrap();
            assert_eq!((keys.rows(), read(&keys).unwrap()), (10_000, expected(&|_| true)));
            let mut void = 0;
            keys.count_only([0, 2].into(), |record| void += u64::from(record.arrival().file() == 1)).unwrap();
            assert_eq!((keys.rows() + void, read(&keys).unwrap()), (10_000, expected(&|number| number % 3 != 1)));
        }
        let whole = std::fs::read(&path).unwrap();
        let changed = |at: usize| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes
        };
        for wrong in
            [whole[..whole.len() - 5].to_vec(), whole[..100].to_vec(), changed(3), changed(100), changed(300_000)]
        {
            std::fs::write(&path, wrong).unwrap();
            let error =
                KeyFile::<KeyAt>::open(&path).and_then(|keys| keys.read(0..PARTITIONS, |_| Ok(()))).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Data);
        }
    }
}
