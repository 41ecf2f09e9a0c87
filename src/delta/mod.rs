//! Delta tables: open and create, stage files, match keys, mark rows, commit once.

mod absent;
mod adds;
mod content;
mod keys;
mod order;
mod pages;
mod reader;
mod staging;
mod table;
mod upsert;
mod vectors;

pub use absent::Absent;
pub use pages::PageEncoder;
pub use staging::{StagedFile, StagingFile};
pub use table::{Table, TableSettings, Tables, delta_schema};
pub use upsert::{Commit, Merged, Upsert, Watermark};
