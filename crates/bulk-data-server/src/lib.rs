//! An embedded Bulk Data server with a synthetic population. It is the demo's other side and, with scripted
//! faults, the double that tests run against: real HTTP on loopback.

mod faults;
mod files;
mod manifest;
mod middleware;
mod population;
mod resources;
mod server;
mod tokens;

pub use faults::Faults;
pub use population::{DEMO_TYPES, Population};
pub use server::{DemoServer, Seen};
pub use tokens::Registration;
