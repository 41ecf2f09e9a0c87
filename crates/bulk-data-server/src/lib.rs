//! An embedded Bulk Data server with a synthetic population. It is the demo's other side and, with scripted
//! faults, the double that tests run against: real HTTP on loopback.
//!
//! ```
//! use bulk_data_server::{DemoServer, Faults, Population};
//!
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! // Ten patients of seed 42, on a free port, four patients a file.
//! let server = DemoServer::start(Population::new(42, 10), 0, 4).await.unwrap();
//! server.set_faults(Faults { kickoffs_throttled: 1, ..Faults::default() });
//! assert!(server.base().starts_with("http://127.0.0.1:"));
//! assert_eq!(server.exports(), 0);
//! # });
//! ```

mod faults;
mod files;
mod manifest;
mod middleware;
mod population;
mod resources;
mod server;
mod tokens;

pub use faults::Faults;
pub use foundation::error::{Error, ErrorKind, Result};
pub use population::{DEMO_TYPES, Population};
pub use server::{DemoServer, Seen};
pub use tokens::Registration;
