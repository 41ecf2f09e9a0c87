//! A client of the FHIR Bulk Data Access IG (STU 1 to 4) and of SMART Backend Services.
//!
//! * [`Client`] sends requests with retries, back-off, an adaptive limit of concurrent requests, TLS and proxy
//!   settings, and a guard that keeps a server from sending it elsewhere.
//! * [`Auth`] gets and refreshes access tokens: client assertions (RS384, ES384) or a client secret.
//! * [`ExportRequest`] is a kick-off; [`PollStatus`] is what the status endpoint answers; [`Manifest`] is the list of
//!   files.
//! * [`Links`] keeps download links fresh while files are read.
//! * [`Capabilities`] reads what a server says that it can do.

mod capabilities;
mod export;
mod http;
pub mod metrics;
mod smart;

pub use capabilities::Capabilities;
pub use export::kick_off::KickOffResponse;
pub use export::links::{LinkPlace, Links, unsigned};
pub use export::manifest::{Manifest, ManifestFile};
pub use export::options::{ExportOptions, ListStyle, Method, OneOrMore};
pub use export::poll::PollStatus;
pub use export::request::{ExportRequest, Level};
pub use export::response::{ISSUE_TYPES, Resume, is_whole, parse_retry_after, server_words};
pub use flow::{Cancellation, Counters};
pub use foundation::error::{Error, ErrorKind, Result};
pub use http::concurrency::{AdaptiveConcurrency, Permit};
pub use http::content_encoding;
pub use http::settings::HttpSettings;
pub use http::tls::TlsSettings;
pub use http::{Client, shown};
pub use smart::auth::{Auth, AuthSettings, ClientSettings, Granted, Proof, Secret};
pub use smart::keys::{KeyAlgorithm, generate_key};
pub use smart::{Access, SmartConfiguration};
