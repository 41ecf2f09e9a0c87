//! `fhirlake serve`: pipelines by their schedules, and a page, health and metrics to watch them by.
//!
//! A [`PipelineScheduler`] has one pipeline: it waits for what is pending_runs, runs it, and knows how it stands. The
//! web reads what the keepers know, and changes nothing.

mod health;
mod metrics;
mod page;
mod pending_runs;
mod scheduler;
mod status;
mod web;

pub use metrics::of_counts;
pub use scheduler::{PipelineScheduler, PlanSource};
pub use status::{PipelineStatus, ServerStatus};

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::telemetry::Telemetry;
use flow::{Cancellation, TaskGroup};

/// Settings of the web server.
#[derive(Debug, Clone)]
pub struct WebSettings {
    /// Address.
    pub listen: SocketAddr,
    /// Names beside addresses and `localhost` that requests may be for (`Host`).
    pub hosts: Vec<String>,
    /// Token of requests, but for health and readiness.
    pub token: Option<bulk_data_client::Secret>,
}

/// State of the web server.
#[derive(Debug)]
struct Served {
    schedulers: Vec<Arc<PipelineScheduler>>,
    settings: WebSettings,
    started: chrono::DateTime<chrono::Utc>,
    stop: Cancellation,
}

/// Pulls its stop when it goes.
struct Last(Cancellation);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Keeps pipelines until `stop` is pulled: runs that are under way end as on Ctrl-C. `listening` hears the address.
pub async fn serve(
    schedulers: Vec<PipelineScheduler>,
    settings: WebSettings,
    stop: Cancellation,
    telemetry: &Telemetry,
    listening: impl FnOnce(SocketAddr),
) -> Result<()> {
    let schedulers: Vec<Arc<PipelineScheduler>> = schedulers.into_iter().map(Arc::new).collect();
    for (at, scheduler) in schedulers.iter().enumerate() {
        if schedulers[..at].iter().any(|other| other.name() == scheduler.name()) {
            return Err(Error::new(ErrorKind::Config, format!("two pipelines are named {}", scheduler.name())));
        }
    }
    let failed = format!("cannot listen on {}", settings.listen);
    // What has the address now may be gone soon.
    let listener = TcpListener::bind(settings.listen).await.context(ErrorKind::Network, failed).map_err(|error| {
        error.with_hint("another program has the address, or this machine does not; choose another with --listen")
    })?;
    let address = listener.local_addr().context(ErrorKind::Internal, "the listener has no address")?;
    if !address.ip().is_loopback() && settings.token.is_none() {
        tracing::warn!(%address, "anybody who reaches the address can see how the pipelines stand: set --token-file");
    }
    listening(address);
    let watched = schedulers.clone();
    telemetry.observe(Arc::new(move || metrics::samples(watched.iter().map(|scheduler| &**scheduler))));
    let started = chrono::Utc::now();
    let served = Arc::new(Served { schedulers: schedulers.clone(), settings, started, stop: stop.clone() });
    let mut tasks = TaskGroup::new(stop.clone());
    // Whoever watches sees runs end: the web stays until the last scheduler is gone.
    let last = Arc::new(Last(Cancellation::default()));
    let until = last.0.clone();
    for scheduler in schedulers {
        let (stop, last) = (stop.clone(), last.clone());
        // A thread each: the compiler cannot prove that a whole run may move between threads.
        tasks.spawn_cpu("scheduler", move |handle| {
            let _last = last;
            handle.block_on(scheduler.serve(&stop))
        });
    }
    drop(last);
    tasks.spawn("web", async move { web::run(listener, served, until).await });
    tasks.join(|names| tracing::info!(waiting_for = names.join(", "), "stopping")).await
}
