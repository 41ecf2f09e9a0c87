//! fhirlake keeps a folder of Delta Lake tables in step with a FHIR server.
//!
//! The application's modules, in the order in which data meets them:
//!
//! * [`cli`] reads arguments, [`config`] the pipeline file, whose values are in [`values`]. [`topology`] has the list
//!   of stages, the resolved plan, and a run.
//! * [`stages`]: export, download, parse, attach, encode, merge, a file or folder each, and the ledger that decides
//!   when a type is complete. They meet in [`messages`] and never import each other.
//! * [`jobs`] is what outlives a run: export jobs and the checkpoint. They are documents of [`state`], which also has
//!   the lease, reports and quarantine, in a folder or in an object store.
//! * [`serve`] runs pipelines on their schedules, and shows their status. [`telemetry`] has logs and metric names,
//!   [`error`] exit codes and hints, [`export_log`] the log that Bulk Data clients share.
//! * [`fuzzing`] is what fuzzers, and the tests over their corpora, run.
//!
//! Under `crates/` are the libraries: `bulk_data_client`, `fhir_arrow`, `delta_upsert` and `bulk_data_server`, and
//! below them `flow` and `foundation`. Tests (`tests/suite/architecture.rs`) hold who may import whom.

pub mod cli;
pub mod config;
pub mod error;
pub mod export_log;
pub mod fuzzing;
pub mod heap;
pub mod jobs;
pub mod messages;
pub mod serve;
pub mod stages;
pub mod state;
pub mod telemetry;
pub mod topology;
pub mod values;
