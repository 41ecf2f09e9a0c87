//! Upserts of whole rows into Delta Lake tables, by key and without a join of rows.
//!
//! 1. A [`StagingFile`] takes row groups into a Parquet file inside the table's folder that no version of the table
//!    names yet, and keeps of each row its [`RowKey`]: the hash of its id, and the version that decides which copy
//!    wins.
//! 2. [`Upsert`] matches those keys with the `id` column of the table's files, marks superseded rows in deletion
//!    vectors (or rewrites the files that they are in, where a table has no deletion vectors), and makes one atomic
//!    commit.
//! 3. [`Table`] opens, creates, and checks tables; [`Table::optimize`] and [`Table::vacuum`] maintain them.
//!
//! A row whose text is that of the table's row of the same id need not be encoded at all: [`LineIndex`] finds it by id
//! and a hash of the text that data files keep beside the row ([`LINE_HASH`]), and it comes as one of
//! [`UnchangedRows`].
//!
//! Rows reach this crate as the bytes of Parquet row groups ([`EncodedBatch`]), so it knows nothing of what is in them
//! but a column `id` and, where a table has them, `meta.lastUpdated`, `meta.versionId` and `meta.tag`, which order the
//! copies of a row.

mod commit;
mod maintenance;
mod matching;
mod row;
mod staging;
mod table;
mod unchanged;

pub use commit::commit_info;
pub use commit::deletion_vectors::read_bytes as read_vector;
pub use commit::upsert::{Commit, Copies, Incoming, Merged, Upsert, Watermark, deletions_id};
pub use foundation::Limit;
pub use foundation::error::{Error, ErrorKind, Result};
pub use maintenance::optimize::{OptimizeSettings, Optimized};
pub use maintenance::vacuum::{VacuumSettings, Vacuumed};
pub use matching::deletions::{Deletions, Scratch};
pub use matching::not_matched::NotMatchedBySource;
pub use matching::precedence::OrderRules;
pub use row::{EncodedBatch, FileRows, MAX_UNMAPPED_PATHS, RowKey, RowPosition, count_unmapped, key_of};
pub use staging::page_encoder::PageEncoder;
pub use staging::{StagedFile, StagedFileState, StagedParquet, StagingFile};
pub use table::schema_adapter::adapt;
pub use table::schema_evolution::{same_types, widen};
pub use table::{Table, TableSettings, Tables, delta_schema};
pub use unchanged::line_index::{IndexMemory, Known, LineIndex, MOST_LOOKUP};
pub use unchanged::rows::{UnchangedBatch, UnchangedRow, UnchangedRows};
pub use unchanged::{IndexedFile, LINE_HASH, LineHash, RowPlace, add_line_hashes, with_line_hash};
