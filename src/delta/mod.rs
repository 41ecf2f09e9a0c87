//! Delta tables: open and create, stage files, match keys, mark rows, commit once, keep the files in order.

mod absent;
mod adds;
mod cluster;
mod commit;
mod content;
mod copies;
mod deletions;
mod evolve;
mod features;
mod filter;
mod keys;
mod matching;
mod new_file;
mod nulls;
mod optimize;
mod order;
mod pages;
mod reader;
mod shape;
mod spill;
mod staging;
mod table;
mod targets;
mod upsert;
mod vacuum;
mod vectors;

pub use absent::Absent;
pub use commit::commit_info;
pub use deletions::{Deletions, Scratch};
pub use optimize::{OptimizeSettings, Optimized};
pub use pages::PageEncoder;
pub use shape::adapt;
pub use staging::{Fate, StagedFile, StagingFile};
pub use table::{Table, TableSettings, Tables, delta_schema};
pub use upsert::{Commit, Merged, Upsert, Watermark};
pub use vacuum::{VacuumSettings, Vacuumed};
