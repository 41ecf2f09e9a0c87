//! Rows as a merge sees them: their keys and ranks, and the row groups that they come in.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use bytes::Bytes;
use parquet::file::metadata::ParquetMetaData;
use serde::{Deserialize, Serialize};

/// Order of arrival: index of the file in the manifests, then line. Packed, since there is one for each row of a
/// run: 24 bits for the file, 40 for the line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowPosition(u64);

impl RowPosition {
    /// The place of line `line` in file `file`. Beyond 16 million files or a trillion lines, places coincide: then
    /// copies of equal version tie, and one of them wins.
    pub fn new(file: u32, line: u64) -> Self {
        Self(u64::from(file.min(0xff_ffff)) << 40 | line.min((1 << 40) - 1))
    }

    /// The file, where there are no more than 16 million.
    pub const fn file(self) -> u32 {
        (self.0 >> 40) as u32
    }

    /// As a number that keeps the order.
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// The place of such a number.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// A row as a merge sees it: which resource it is and how it ranks among its copies.
#[derive(Debug, Clone, Copy)]
pub struct RowKey {
    /// 128-bit hash of the logical id.
    pub key: u128,
    /// `meta.lastUpdated` in microseconds since the epoch; [`RowKey::ABSENT`] where absent.
    pub last_updated: i64,
    /// `meta.versionId` where it is a number; [`RowKey::ABSENT`] where absent.
    pub version: i64,
    /// Order of arrival.
    pub arrival: RowPosition,
    /// True if `meta.tag` says SUBSETTED: an incomplete copy, which ranks below every complete one.
    pub subsetted: bool,
    /// True if it was quarantined by an earlier run, so that it does not come from the newest export.
    pub replayed: bool,
}

impl RowKey {
    /// An absent `lastUpdated` or `versionId`: ranks lowest.
    pub const ABSENT: i64 = i64::MIN;

    /// Total order of the copies of a resource that one run brings; the newest is the greatest.
    pub fn rank(&self) -> (bool, i64, i64, RowPosition) {
        (!self.subsetted, self.last_updated, self.version, self.arrival)
    }
}

/// The 128-bit hash of a logical id that rows are matched by.
///
/// ```
/// use delta_upsert::{RowKey, RowPosition, key_of};
///
/// let copy = |version, line| RowKey {
///     key: key_of(b"patient-1"),
///     last_updated: RowKey::ABSENT,
///     version,
///     arrival: RowPosition::new(0, line),
///     subsetted: false,
///     replayed: false,
/// };
/// // Of two copies the newer version wins, wherever it stands; of equal ones the later line.
/// assert!(copy(2, 1).rank() > copy(1, 9).rank());
/// assert!(copy(2, 9).rank() > copy(2, 1).rank());
/// ```
pub fn key_of(id: &[u8]) -> u128 {
    twox_hash::XxHash3_128::oneshot(id)
}

/// Rows of one type as the bytes of a Parquet row group.
#[derive(Debug)]
pub struct EncodedBatch {
    /// The table's name, such as `Patient`.
    pub resource_type: Arc<str>,
    /// Its columns. A Parquet file takes only row groups with equal columns.
    pub columns: SchemaRef,
    /// A Parquet file of one row group.
    pub parquet: Bytes,
    /// Its footer.
    pub metadata: ParquetMetaData,
    /// The rows' keys, in row order.
    pub keys: Vec<RowKey>,
    /// Its rows by export file ([`RowPosition::file`]).
    pub by_file: BTreeMap<u32, FileRows>,
}

/// Rows of one file of an export: their number, and what came with them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FileRows {
    /// Rows.
    pub rows: u64,
    /// Bytes of NDJSON.
    pub json_bytes: u64,
    /// Values that the layout could not hold, by path.
    #[serde(rename = "not_held")]
    pub unmapped: BTreeMap<String, u64>,
}

impl FileRows {
    /// Adds more of the same type.
    pub fn add(&mut self, more: &FileRows) {
        self.rows += more.rows;
        self.json_bytes += more.json_bytes;
        more.unmapped.iter().for_each(|(path, count)| count_unmapped(&mut self.unmapped, path, *count));
    }
}

/// Paths of unmapped values that are counted each for itself.
pub const MAX_UNMAPPED_PATHS: usize = 1000;

/// Counts values that a table's columns could not take, at most [`MAX_UNMAPPED_PATHS`] paths of them.
pub fn count_unmapped(counts: &mut BTreeMap<String, u64>, path: &str, more: u64) {
    let is_full = counts.len() >= MAX_UNMAPPED_PATHS && !counts.contains_key(path);
    let other = || path.split('.').take(1).chain(["?"]).collect::<Vec<_>>().join(".");
    *counts.entry(if is_full { other() } else { path.to_owned() }).or_default() += more;
}
