//! `fhirlake serve PIPELINE.yaml…`

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::drive::{Signals, stop_or_exit};
use super::output::Output;
use super::run::plan_of;
use crate::config::{environment, warn_if_loose};
use crate::error::{Error, ErrorKind, Result};
use crate::serve::{PipelineScheduler, PlanSource, WebSettings, serve as serve_all};
use flow::Cancellation;

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Pipeline files.
    #[arg(required = true, value_name = "PIPELINE")]
    pub pipelines: Vec<PathBuf>,
    /// Address of the status page, health checks and metrics.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", value_parser = listen_address)]
    listen: SocketAddr,
    /// Allow this Host header (DNS-rebinding protection).
    #[arg(long = "host", value_name = "NAME")]
    hosts: Vec<String>,
    /// File with a token that page and metrics require, as bearer token or password [env: FHIRLAKE_SERVE_TOKEN]. Health
    /// and readiness checks need none.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Set a key of each pipeline file, such as `memory=1GiB`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let named = || text.to_socket_addrs().ok()?.next();
    text.parse()
        .ok()
        .or_else(named)
        .ok_or_else(|| "write an address and a port, such as 127.0.0.1:8080 or [::]:8080".to_owned())
}

pub(super) async fn serve(args: ServeArgs, output: &Output) -> Result<()> {
    let token = match &args.token_file {
        Some(path) => {
            warn_if_loose(&path.display().to_string());
            let text = std::fs::read_to_string(path)
                .map_err(|error| Error::new(ErrorKind::Config, format!("--token-file {}: {error}", path.display())))?;
            Some(text.trim().to_owned())
        }
        None => environment("FHIRLAKE_SERVE_TOKEN"),
    };
    if token.as_ref().is_some_and(String::is_empty) {
        return Err(Error::new(ErrorKind::Config, "--token-file is empty"));
    }
    let mut schedulers = Vec::new();
    for path in &args.pipelines {
        let (path, sets) = (path.clone(), args.sets.clone());
        let file = path.clone();
        let source: PlanSource = Arc::new(move || plan_of(&path, &sets));
        schedulers.push(PipelineScheduler::new(file, source)?);
    }
    let stop = Cancellation::default();
    let settings = WebSettings { listen: args.listen, hosts: args.hosts, token: token.map(Into::into) };
    let said = output.clone();
    let serving = serve_all(schedulers, settings, stop.clone(), output.telemetry(), |address| {
        tracing::info!(%address, "serving");
        let ip = if address.ip().is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { address.ip() };
        let page = SocketAddr::new(ip, address.port());
        said.tell(&format!("status page: http://{page}/ (Ctrl-C to stop)"));
    });
    let mut serving = std::pin::pin!(serving);
    let mut signals = Signals::new()?;
    loop {
        tokio::select! {
            outcome = &mut serving => return outcome,
            () = signals.next() => {
                let stopping = "stopping: runs persist their checkpoints";
                stop_or_exit(&stop, output, stopping, "stopped at once; the next run resumes from the checkpoint");
            }
        }
    }
}
