//! Spawns, joins, counts and cancels. Knows neither FHIR nor Delta.
//!
//! An [`edge`] joins two stages and holds at most a number of items *and* a number of bytes; a full
//! edge stops its sender. A [`Crew`] owns every worker of a run: nothing is detached, so nothing can
//! be forgotten at the end. [`Board`] holds the counters that the workers move and that reports,
//! progress bars and metrics read.

mod crew;
mod edge;
mod tally;

use std::future::Future;

pub use crew::{Crew, Stop};
pub use edge::{EdgeGauge, Parcel, Receiver, Sender, Weighed, edge};
pub use tally::{Board, Counts};

/// Runs a future that computes as much as it waits on a thread of its own, off the reactor.
pub async fn compute<T: Send + 'static>(
    span: tracing::Span,
    work: impl Future<Output = T> + Send + 'static,
) -> crate::error::Result<T> {
    let handle = tokio::runtime::Handle::current();
    #[expect(clippy::disallowed_methods, reason = "flow is the one that spawns")]
    let work = tokio::task::spawn_blocking(move || span.in_scope(|| handle.block_on(work)));
    work.await.map_err(|panic| {
        crate::error::Error::new(crate::error::ErrorKind::Internal, format!("a worker ended abnormally: {panic}"))
    })
}

/// Runs the making of one HTTP response's body; it ends with its channel. Only the demo server uses it: nothing
/// of a run is ever detached.
pub(crate) fn detach_response(work: impl Future<Output = ()> + Send + 'static) {
    let handle = tokio::runtime::Handle::current();
    #[expect(clippy::disallowed_methods, reason = "flow is the one that spawns")]
    tokio::task::spawn_blocking(move || handle.block_on(work));
}
