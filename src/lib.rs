//! fhirlake keeps a folder of Delta Lake tables in step with a FHIR server.
//!
//! The modules, in the order in which data meets them:
//!
//! * [`cli`] reads arguments, [`config`] the pipeline file; [`pipeline`] wires a run and reads like its picture.
//! * [`stages`]: export, download, parse, encode, merge, one file each, and the ledger that knows when a type is
//!   complete. They meet in [`messages`] and never import each other.
//! * [`fhir`] speaks Bulk Data; [`tape`] is JSON as offsets; [`schema`] turns FHIR's definitions into columns and
//!   fills them; [`delta`] stages files, matches keys and commits.
//! * [`flow`] holds the bounded edges and the crew of workers, and knows neither FHIR nor Delta.
//! * [`state`] is what a pipeline remembers, in [`private`] files, of which [`mirror`] keeps those in step that are in an object
//!   store; [`error`] the one table of errors; [`export_log`] the log that Bulk Data clients share; [`telemetry`] logs and
//!   metric names.
//! * [`fault_points`] are where tests kill the process; no release has any.
//! * [`fuzzing`] is what fuzzers, and the tests over their corpora, run.
//! * `unpack` is gzip, deflate and Zstandard as they come.
//! * [`serve`] runs pipelines by their schedules, and shows how they stand.
//! * [`demo`] is an embedded Bulk Data server with a synthetic population.
//!
//! A test (`tests/architecture.rs`) holds who may import whom.

pub mod cli;
pub mod config;
pub mod error;
pub mod export_log;
pub mod fuzzing;
pub mod heap;
pub mod jobs;
pub mod messages;
pub mod mirror;
pub mod serve;
pub mod stages;
pub mod state;
pub mod telemetry;
pub mod topology;
pub mod values;
