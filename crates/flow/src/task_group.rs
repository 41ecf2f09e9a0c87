//! The owner of every worker of a run.

use parking_lot::Mutex;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use foundation::error::{Error, ErrorKind, Result};

/// Asks the source to stop. Stages never look at it: they end when their input closes, so what is
/// under way drains. Ctrl-C, SIGTERM and a failed worker all pull it.
#[derive(Debug, Clone, Default)]
pub struct Cancellation {
    token: CancellationToken,
    failed: Arc<AtomicBool>,
}

impl Cancellation {
    /// Pulls the stop; idempotent.
    pub fn cancel(&self) {
        self.token.cancel();
    }
    /// Pulls it because a worker failed.
    fn fail(&self) {
        // Whoever asked for a stop before that did so himself.
        self.failed.fetch_or(!self.is_cancelled(), Ordering::Relaxed);
        self.cancel();
    }
    /// Returns true if it was pulled on request, and not because a worker failed.
    pub fn is_requested(&self) -> bool {
        self.is_cancelled() && !self.failed.load(Ordering::Relaxed)
    }
    /// Returns true if it was pulled.
    pub fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }
    /// Resolves when it is pulled.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }
    /// Runs `work` unless the stop is pulled first.
    pub async fn or<F: Future>(&self, work: F) -> Option<F::Output> {
        self.token.run_until_cancelled(work).await
    }
}

/// Workers of one run. The first error is the run's cause: it is recorded before the stop is pulled,
/// so the errors that follow from it cannot take its place.
pub struct TaskGroup {
    workers: JoinSet<&'static str>,
    at_work: Arc<Mutex<Vec<&'static str>>>,
    first: Arc<Mutex<Option<Error>>>,
    stop: Cancellation,
}

/// Keeps the first error, and cancels the source. One that comes after it, full disks after Ctrl-C above all, goes to
/// the log.
fn note(first: &Mutex<Option<Error>>, stop: &Cancellation, error: Error) {
    let mut first = first.lock();
    match &*first {
        None => *first = Some(error),
        Some(_) if error.kind() == ErrorKind::Interrupted => {}
        Some(_) => tracing::warn!(%error, "another part of the run failed too"),
    }
    drop(first);
    stop.fail();
}

impl TaskGroup {
    /// An empty crew that pulls `stop` when one of its workers fails.
    pub fn new(stop: Cancellation) -> Self {
        Self { workers: JoinSet::new(), at_work: Arc::default(), first: Arc::default(), stop }
    }

    /// Returns the cancellation of a worker that fails.
    pub fn stop(&self) -> &Cancellation {
        &self.stop
    }

    /// Starts a worker on the reactor: one that waits for sockets, files and edges.
    pub fn spawn(&mut self, name: &'static str, work: impl Future<Output = Result<()>> + Send + 'static) {
        let finish = self.register(name);
        self.workers.spawn(async move {
            finish(work.await);
            name
        });
    }

    /// Starts a worker on a thread of its own: one that computes. `work` may block on the edges with
    /// `tokio::runtime::Handle::block_on`.
    pub fn spawn_cpu(
        &mut self,
        name: &'static str,
        work: impl FnOnce(&tokio::runtime::Handle) -> Result<()> + Send + 'static,
    ) {
        let finish = self.register(name);
        let handle = tokio::runtime::Handle::current();
        self.workers.spawn_blocking(move || {
            finish(work(&handle));
            name
        });
    }

    fn register(&self, name: &'static str) -> impl FnOnce(Result<()>) + Send + 'static {
        self.at_work.lock().push(name);
        let (at_work, first, stop) = (self.at_work.clone(), self.first.clone(), self.stop.clone());
        move |outcome| {
            let mut names = at_work.lock();
            if let Some(at) = names.iter().position(|n| *n == name) {
                names.swap_remove(at);
            }
            drop(names);
            if let Err(error) = outcome {
                note(&first, &stop, error);
            }
        }
    }

    /// Waits for every worker. After the stop was pulled by the user, `waiting` hears every five seconds who is
    /// still at work. `Err` is the first error that a worker had, or its panic.
    pub async fn join(mut self, waiting: impl Fn(&[&'static str])) -> Result<()> {
        let mut tick = tokio::time::interval(Duration::from_secs(5));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tick.tick().await;
        loop {
            tokio::select! {
                joined = self.workers.join_next() => match joined {
                    None => break,
                    Some(Ok(_)) => {}
                    Some(Err(panic)) => {
                        let error = Error::new(ErrorKind::Internal, format!("a worker ended abnormally: {panic}"));
                        note(&self.first, &self.stop, error);
                    }
                },
                // What failed says so itself: that others wait for its end is no news.
                _ = tick.tick(), if self.stop.is_cancelled() && self.first.lock().is_none() => {
                    let mut names = self.at_work.lock().clone();
                    names.sort_unstable();
                    names.dedup();
                    waiting(&names);
                }
            }
        }
        match self.first.lock().take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Breaks if the stop is pulled before the cause is recorded, or if a later error replaces it.
    #[tokio::test]
    async fn the_first_error_is_the_cause() {
        let stop = Cancellation::default();
        let mut tasks = TaskGroup::new(stop.clone());
        tasks.spawn("follower", {
            let stop = stop.clone();
            async move {
                stop.cancelled().await;
                Err(Error::new(ErrorKind::Internal, "channel closed"))
            }
        });
        tasks.spawn("culprit", async { Err(Error::new(ErrorKind::Storage, "disk full")) });
        let error = tasks.join(|_| {}).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Storage);
        assert!(error.to_string().contains("disk full"));
    }

    // Breaks if what failed is told as a stop that somebody asked for, or the other way round.
    #[tokio::test]
    async fn a_stop_on_request_is_told_from_a_failure() {
        for (requested, kind) in [(true, ErrorKind::Interrupted), (false, ErrorKind::Storage)] {
            let stop = Cancellation::default();
            if requested {
                stop.cancel();
            }
            let mut tasks = TaskGroup::new(stop.clone());
            tasks.spawn("worker", async move { Err(Error::new(kind, "ended")) });
            assert_eq!(tasks.join(|_| {}).await.unwrap_err().kind(), kind);
            assert_eq!((stop.is_cancelled(), stop.is_requested()), (true, requested));
        }
    }

    // Breaks if a panic in a computing worker is swallowed.
    #[tokio::test]
    async fn a_panic_is_an_error() {
        let mut tasks = TaskGroup::new(Cancellation::default());
        tasks.spawn_cpu("parse", |_| panic!("boom"));
        assert_eq!(tasks.join(|_| {}).await.unwrap_err().kind(), ErrorKind::Internal);
    }
}
