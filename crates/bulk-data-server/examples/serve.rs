//! Serves a synthetic population until Ctrl-C; `--once` only says where, for a test.

use std::io::Write;

use bulk_data_server::{DemoServer, Faults, Population};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server = DemoServer::start(Population::new(42, 30), 0, 10).await?;
    // The first kick-off is answered 429, as a busy server does.
    server.set_faults(Faults { kickoffs_throttled: 1, ..Faults::default() });
    writeln!(std::io::stdout(), "30 patients at {}", server.base())?;
    if std::env::args().nth(1).as_deref() != Some("--once") {
        tokio::signal::ctrl_c().await?;
    }
    Ok(())
}
