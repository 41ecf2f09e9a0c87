//! Exports some types and counts the lines of each file:
//! `cargo run --release --example export -- https://bulk-data.smarthealthit.org/fhir Patient Condition`. Without
//! arguments it exports from an embedded server.

use std::io::Write;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bulk_data_client::{
    Auth, AuthSettings, Client, ExportOptions, ExportRequest, HttpSettings, KickOffResponse, Level, Manifest,
    PollStatus,
};
use bulk_data_server::{DemoServer, Population};
use url::Url;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let server = DemoServer::start(Population::new(42, 30), 0, 10).await?;
    let base = arguments.next().unwrap_or_else(|| server.base().to_owned());
    let types: Vec<String> = arguments.collect();
    let types = if types.is_empty() { vec!["Patient".to_owned(), "Condition".to_owned()] } else { types };

    let auth = Auth::new(AuthSettings::None)?;
    let client =
        Client::new(Url::parse(&base)?, auth, HttpSettings::default(), Default::default(), Default::default())?;
    let request = ExportRequest { level: Level::System, types, since: None, options: ExportOptions::default() };
    let manifest = export(&client, &request).await?;
    let mut out = std::io::stdout();
    writeln!(out, "transactionTime {} µs", manifest.transaction_time)?;
    for file in &manifest.output {
        let body = client.open_file(&file.url, manifest.requires_access_token, None).await?.bytes().await?;
        let lines = body.iter().filter(|byte| **byte == b'\n').count();
        writeln!(out, "{} {lines}", file.resource_type.as_deref().unwrap_or("?"))?;
    }
    Ok(())
}

/// Kicks off, and polls until the manifest is complete.
async fn export(client: &Client, request: &ExportRequest) -> Result<Manifest, Box<dyn std::error::Error>> {
    let (status, separate) = match client.kick_off(request, &AtomicBool::new(false)).await? {
        KickOffResponse::Accepted { status, separate } => (status, separate),
        KickOffResponse::Later { why, .. } => return Err(why.into()),
    };
    loop {
        let wait = match client.poll(&status, separate).await? {
            PollStatus::Done(manifest) => return Ok(*manifest),
            PollStatus::InProgress { wait, .. } | PollStatus::Transient { wait, .. } => wait,
            PollStatus::NotFound { error, .. } | PollStatus::Failed(error) => return Err(error.into()),
        };
        tokio::time::sleep(wait.unwrap_or(Duration::from_millis(100))).await;
    }
}
