//! Base of every other crate, which knows neither FHIR nor Delta.
//!
//! * [`Error`] says what happened, to what, and what to do about it; its [`ErrorKind`] says what kind of fault it is.
//! * [`secure_fs`] creates files and folders that only their owner can read, and replaces files atomically.
//! * [`instant`] parses and prints instants with microseconds, as FHIR and Delta write them.
//! * [`Limit`] bounds a number of things by a count or a share.
//! * [`fault_points`] are where tests kill the process; no release has any.

pub mod error;
pub mod fault_points;
pub mod instant;
mod limit;
pub mod secure_fs;

pub use error::{Context, Error, ErrorKind, Result};
pub use limit::Limit;
