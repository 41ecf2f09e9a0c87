//! Number of files that are read at a time: fewer when the server is in trouble, and slowly more again
//! (additive increase, multiplicative decrease).

use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Halving again within this span would count one trouble twice.
const TROUBLE: Duration = Duration::from_secs(1);

/// A number of places that follows how the server does. Clones share it.
#[derive(Debug, Clone)]
pub struct AdaptiveConcurrency {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    most: usize,
    freed: Notify,
}

#[derive(Debug)]
struct State {
    taken: usize,
    /// Places that there are, in parts.
    places: f64,
    halved: Option<Instant>,
}

/// A place that is taken; released when dropped.
#[derive(Debug)]
pub struct Permit {
    concurrency: AdaptiveConcurrency,
}

impl AdaptiveConcurrency {
    /// So many places at most, and to begin with.
    pub fn new(most: usize) -> Self {
        let most = most.max(1);
        let state = State { taken: 0, places: most as f64, halved: None };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), most, freed: Notify::new() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock()
    }

    /// Waits for a place.
    pub async fn enter(&self) -> Permit {
        loop {
            let freed = self.shared.freed.notified();
            tokio::pin!(freed);
            // Before the look, so that nothing that is freed in between is missed.
            freed.as_mut().enable();
            {
                let mut state = self.state();
                if state.taken < state.places as usize {
                    state.taken += 1;
                    return Permit { concurrency: self.clone() };
                }
            }
            freed.await;
        }
    }

    /// The server is in trouble: half as many places, one at least.
    pub fn decrease(&self) {
        let mut state = self.state();
        if state.halved.is_some_and(|halved| halved.elapsed() < TROUBLE) {
            return;
        }
        state.halved = Some(Instant::now());
        state.places = (state.places / 2.0).max(1.0);
        tracing::info!(files = state.places as usize, "the server is in trouble: fewer files at a time");
    }

    /// A file went well: a part of a place more.
    pub fn increase(&self) {
        let mut state = self.state();
        if state.places < self.shared.most as f64 {
            state.places = (state.places + 1.0 / state.places).min(self.shared.most as f64);
            drop(state);
            self.shared.freed.notify_waiters();
        }
    }

    /// Returns the number of permits.
    pub fn places(&self) -> usize {
        self.state().places as usize
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.concurrency.state().taken -= 1;
        self.concurrency.shared.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn places_halve_at_trouble_and_come_back_one_by_one() {
        let concurrency = AdaptiveConcurrency::new(8);
        let held: Vec<Permit> = vec![concurrency.enter().await, concurrency.enter().await];
        concurrency.decrease();
        concurrency.decrease();
        assert_eq!(concurrency.places(), 4, "one trouble halves once");
        for _ in 0..4 {
            concurrency.increase();
        }
        assert_eq!(concurrency.places(), 4);
        concurrency.increase();
        assert_eq!(concurrency.places(), 5, "about as many files as there are places make one place more");
        for _ in 0..100 {
            concurrency.increase();
        }
        assert_eq!(concurrency.places(), 8, "never more than was asked for");
        drop(held);
        let concurrency = AdaptiveConcurrency::new(1);
        let first = concurrency.enter().await;
        let waiting = concurrency.enter();
        tokio::pin!(waiting);
        assert!(futures::poll!(waiting.as_mut()).is_pending());
        drop(first);
        let _second = waiting.await;
    }
}
