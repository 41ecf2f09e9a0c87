//! The client side of FHIR Bulk Data: HTTP with retries, kick-off, polling, manifest, and who we are to the server.

mod answers;
mod auth;
mod body;
mod capabilities;
mod export;
mod http;
mod keys;
mod links;
mod manifest;
mod pace;
mod reach;
mod request;
mod smart;
mod tls;

pub(crate) use answers::server_words;
pub use answers::{Resume, is_whole, parse_retry_after};
pub use auth::{Auth, AuthSettings, ClientSettings, Granted, Proof, Secret};
pub use capabilities::Capabilities;
pub use export::{KickOff, Poll};
pub use http::{Client, HttpSettings, shown};
pub use keys::{KeyAlgorithm, generate_key};
pub use links::{LinkPlace, Links, unsigned};
pub use manifest::{Manifest, ManifestFile};
pub use pace::{Pace, Place};
pub use request::{ExportOptions, ExportRequest, Level, Method};
pub use smart::{Access, SmartConfiguration};
pub use tls::TlsSettings;
