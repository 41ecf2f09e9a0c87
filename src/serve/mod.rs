//! `fhirlake serve`: pipelines by their schedules, and a page, health and metrics to watch them by.
//!
//! A [`Keeper`] has one pipeline: it waits for what is due, runs it, and knows how it stands. The web reads what the keepers
//! know, and changes nothing.

mod due;
mod health;
mod keeper;
mod metrics;
mod page;
mod status;
mod web;

pub use keeper::{Keeper, PlanSource};
pub use metrics::of_counts;
pub use status::{PipelineStatus, ServerStatus};

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::telemetry::Telemetry;
use flow::{Crew, Stop};

/// How the web listens, and to whom.
#[derive(Debug, Clone)]
pub struct WebSettings {
    /// Where.
    pub listen: SocketAddr,
    /// Names beside addresses and `localhost` that requests may be for (`Host`).
    pub hosts: Vec<String>,
    /// What a request must bring, but for health and readiness.
    pub token: Option<bulk_data_client::Secret>,
}

/// What the web knows.
#[derive(Debug)]
struct Served {
    keepers: Vec<Arc<Keeper>>,
    settings: WebSettings,
    started: chrono::DateTime<chrono::Utc>,
    stop: Stop,
}

/// Pulls its stop when it goes.
struct Last(Stop);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.pull();
    }
}

/// Keeps pipelines until `stop` is pulled: runs that are under way end as on Ctrl-C. `listening` hears the address.
pub async fn serve(
    keepers: Vec<Keeper>,
    settings: WebSettings,
    stop: Stop,
    telemetry: &Telemetry,
    listening: impl FnOnce(SocketAddr),
) -> Result<()> {
    let keepers: Vec<Arc<Keeper>> = keepers.into_iter().map(Arc::new).collect();
    for (at, keeper) in keepers.iter().enumerate() {
        if keepers[..at].iter().any(|other| other.name() == keeper.name()) {
            return Err(Error::new(ErrorKind::Config, format!("two pipelines are named {}", keeper.name())));
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
    let watched = keepers.clone();
    telemetry.observe(Arc::new(move || metrics::samples(watched.iter().map(|keeper| &**keeper))));
    let started = chrono::Utc::now();
    let served = Arc::new(Served { keepers: keepers.clone(), settings, started, stop: stop.clone() });
    let mut crew = Crew::new(stop.clone());
    // Whoever watches sees runs end: the web stays until the last keeper is gone.
    let last = Arc::new(Last(Stop::default()));
    let until = last.0.clone();
    for keeper in keepers {
        let (stop, last) = (stop.clone(), last.clone());
        // A thread each: the compiler cannot prove that a whole run may move between threads.
        crew.spawn_cpu("keeper", move |handle| {
            let _last = last;
            handle.block_on(keeper.keep(&stop))
        });
    }
    drop(last);
    crew.spawn("web", async move { web::run(listener, served, until).await });
    crew.join(|names| tracing::info!(waiting_for = names.join(", "), "stopping")).await
}
