//! An embedded Bulk Data server with a synthetic population. It is the demo's other side and, with scripted
//! faults, the double that tests run against: real HTTP on loopback.

mod population;
mod resources;
mod server;

pub use population::{DEMO_TYPES, Population};
pub use server::{DemoServer, Faults, Seen};
