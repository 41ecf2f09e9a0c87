//! The client side of FHIR Bulk Data: HTTP with retries, kick-off, polling, manifest. Tokens join in `auth`.

mod auth;
mod export;
mod http;
mod manifest;

pub use auth::{Auth, AuthSettings, Secret};
pub use export::{ExportRequest, Level, Poll};
pub use http::{Client, HttpSettings, parse_retry_after};
pub use manifest::{Manifest, ManifestFile};
