//! Delta tables: open and create, stage files, match keys, mark rows, commit once.

mod absent;
mod adds;
mod content;
mod deletions;
mod filter;
mod keys;
mod matching;
mod order;
mod pages;
mod reader;
mod spill;
mod staging;
mod table;
mod targets;
mod upsert;
mod vectors;

pub use absent::Absent;
pub use deletions::{Deletions, Scratch};
pub use pages::PageEncoder;
pub use staging::{StagedFile, StagingFile};
pub use table::{Table, TableSettings, Tables, delta_schema};
pub use upsert::{Commit, Merged, Upsert, Watermark};
