//! Rows that a run brings and the table has already: found before they are encoded, and never staged.
//!
//! A data file keeps, beside each row, a hash of the text that the row was encoded from. Where a text of the same id
//! has the same hash, the row would be encoded to what it is. The hash lies in a column of the Parquet file that is no
//! column of the table: readers go by the table's columns. So it cannot be parted from its row, is there in a file that
//! was staged and not yet committed, and is lost where another writer rewrites the file, which is safe: rows without it
//! are encoded and compared.

pub(crate) mod line_index;
pub(crate) mod moved;
pub(crate) mod rows;

use std::num::NonZeroU64;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use foundation::error::{Context, ErrorKind, Result};

/// Name of the Parquet column that keeps the hash of each row's text: a signed 64-bit number, null where there is none.
pub const LINE_HASH: &str = "_fhirlake_line_hash";

/// Returns columns with that of the line hashes behind them.
pub fn with_line_hash(columns: &SchemaRef) -> SchemaRef {
    let own = Arc::new(Field::new(LINE_HASH, DataType::Int64, true));
    Arc::new(Schema::new(columns.fields().iter().cloned().chain([own]).collect::<Vec<_>>()))
}

/// Returns rows with the hash of the text that each came from behind their columns.
pub fn add_line_hashes(rows: &RecordBatch, hashes: &[Option<LineHash>]) -> Result<RecordBatch> {
    let hashes = Int64Array::from_iter(hashes.iter().map(|hash| hash.map(LineHash::to_bits)));
    let columns = rows.columns().iter().cloned().chain([Arc::new(hashes) as ArrayRef]).collect();
    RecordBatch::try_new(with_line_hash(&rows.schema()), columns)
        .context(ErrorKind::Internal, "line hashes do not fit their rows")
}

/// Hash of the text that a row is encoded from, and of what it is encoded by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LineHash(NonZeroU64);

impl LineHash {
    /// Hashes a text, for rows that `encoder` makes: a number that another encoder or other columns do not have, so
    /// that rows that they made are never taken for unchanged.
    pub fn of(text: &[u8], encoder: u64) -> Self {
        // Zero stands for none.
        Self(NonZeroU64::new(XxHash3_64::oneshot(text) ^ encoder).unwrap_or(NonZeroU64::MAX))
    }

    /// Returns it as the column has it.
    pub const fn to_bits(self) -> i64 {
        self.0.get() as i64
    }

    /// Reads it from the column.
    pub const fn from_bits(bits: i64) -> Option<Self> {
        match NonZeroU64::new(bits as u64) {
            Some(hash) => Some(Self(hash)),
            None => None,
        }
    }
}

/// A data file of a table, as an index refers to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexedFile {
    /// Path in the table's folder.
    pub path: String,
    /// Bytes.
    pub size: u64,
}

/// A row of the table: the index of its file in a [`LineIndex`](line_index::LineIndex), and its place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowPlace {
    /// Index of the file.
    pub file: u32,
    /// The row, those before it that are gone counted.
    pub row: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    // Breaks if two encoders take each other's rows for unchanged, or if a hash does not survive the column.
    #[test]
    fn a_hash_is_of_a_text_and_an_encoder() {
        let hash = LineHash::of(b"{}", 7);
        assert_eq!(LineHash::from_bits(hash.to_bits()), Some(hash));
        assert_ne!(hash, LineHash::of(b"{}", 8));
        assert_ne!(hash, LineHash::of(b"{ }", 7));
        assert_eq!(LineHash::from_bits(0), None);
        let zero = XxHash3_64::oneshot(b"{}");
        assert_eq!(LineHash::from_bits(LineHash::of(b"{}", zero).to_bits()), Some(LineHash::of(b"{}", zero)));
    }
}
