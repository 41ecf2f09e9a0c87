//! Spawns, joins, counts and cancels. Knows neither FHIR nor Delta.
//!
//! An [`edge`] joins two stages and holds at most a number of items *and* a number of bytes; a full
//! edge stops its sender. A [`TaskGroup`] owns every worker of a run: nothing is detached, so nothing can
//! be forgotten at the end. [`Counters`] holds the counters that the workers move and that reports,
//! progress bars and metrics read.

mod counters;
mod edge;
mod task_group;

use std::future::Future;

pub use counters::{Counters, Counts};
pub use edge::{ByteSized, EdgeGauge, Receiver, Sender, Weighted, edge};
pub use task_group::{Cancellation, TaskGroup};

/// A random part of one, from a UUID's bits: spreads clients, needs no crate.
pub fn random_fraction() -> f64 {
    let random = uuid::Uuid::new_v4().as_u128() as u32;
    f64::from(random) / f64::from(u32::MAX)
}

/// Runs a future that computes as much as it waits on a thread of its own, off the reactor.
pub async fn compute<T: Send + 'static>(
    span: tracing::Span,
    work: impl Future<Output = T> + Send + 'static,
) -> foundation::error::Result<T> {
    let handle = tokio::runtime::Handle::current();
    #[expect(clippy::disallowed_methods, reason = "flow is the one that spawns")]
    let work = tokio::task::spawn_blocking(move || span.in_scope(|| handle.block_on(work)));
    work.await.map_err(|panic| {
        foundation::error::Error::new(
            foundation::error::ErrorKind::Internal,
            format!("a worker ended abnormally: {panic}"),
        )
    })
}

/// Does the same to each item, on as many threads of their own as there are cores, and gives the outcomes in the items'
/// order; after an error no further item is begun. Blocks: for threads that compute, such as [`compute`]'s.
pub fn on_all_cores<I: Sync, T: Send>(
    items: &[I],
    work: impl Fn(usize, &I) -> foundation::error::Result<T> + Sync,
) -> foundation::error::Result<Vec<T>> {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(items.len());
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        while let at = next.fetch_add(1, Ordering::Relaxed)
            && let Some(item) = items.get(at)
        {
            let outcome = work(at, item);
            if outcome.is_err() {
                next.store(items.len(), Ordering::Relaxed);
            }
            done.push((at, outcome));
        }
        done
    };
    let mut done = Vec::with_capacity(items.len());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            match worker.join() {
                Ok(more) => done.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    done.sort_unstable_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Runs the making of one HTTP response's body; it ends with its channel. Only the demo server uses it: nothing
/// of a run is ever detached.
pub fn detach_response(work: impl Future<Output = ()> + Send + 'static) {
    let handle = tokio::runtime::Handle::current();
    #[expect(clippy::disallowed_methods, reason = "flow is the one that spawns")]
    tokio::task::spawn_blocking(move || handle.block_on(work));
}
