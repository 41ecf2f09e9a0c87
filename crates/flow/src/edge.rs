//! The bounded edge between two stages.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Weight of an item in memory, in bytes, while it travels.
pub trait ByteSized {
    /// Bytes held by the item, its heap included.
    fn weight(&self) -> usize;
}

impl<T: ByteSized + ?Sized> ByteSized for std::sync::Arc<T> {
    fn weight(&self) -> usize {
        T::weight(self)
    }
}

/// Bytes are counted in units of this size, so that a semaphore's `u32` permits reach past 4 TiB.
const UNIT: usize = 1024;

/// Fill of an edge at this moment. Cheap to clone; read by metrics and progress.
#[derive(Debug, Clone)]
pub struct EdgeGauge {
    name: Arc<str>,
    max_items: usize,
    max_bytes: usize,
    items: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
    passed: Arc<AtomicU64>,
}

impl EdgeGauge {
    /// The edge's name, `from->to`.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Items and bytes that wait on the edge or are in the hands of a receiver.
    pub fn level(&self) -> (u64, u64) {
        (self.items.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
    /// The most that the edge holds: items, bytes.
    pub fn capacity(&self) -> (usize, usize) {
        (self.max_items, self.max_bytes)
    }
    /// Items that have crossed the edge since the run began.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }
}

/// An item together with its share of the edge's byte budget. The share goes back to the edge when
/// the parcel is dropped, not when it is received: what a worker holds still counts.
#[derive(Debug)]
pub struct Weighted<T> {
    item: T,
    _share: Share,
}

#[derive(Debug)]
struct Share {
    _permit: OwnedSemaphorePermit,
    gauge: EdgeGauge,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.gauge.items.fetch_sub(1, Ordering::Relaxed);
        self.gauge.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl<T> Weighted<T> {
    /// The item; its share of the budget is released now.
    pub fn into_inner(self) -> T {
        self.item
    }
}

impl<T> Deref for Weighted<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.item
    }
}

/// The sending end. Cloned by every worker that feeds the edge; the edge closes when the last clone
/// is dropped.
pub struct Sender<T> {
    queue: async_channel::Sender<Weighted<T>>,
    budget: Arc<Semaphore>,
    gauge: EdgeGauge,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), budget: self.budget.clone(), gauge: self.gauge.clone() }
    }
}

/// The receiving end. Workers share it by cloning; each item goes to one of them.
pub struct Receiver<T> {
    queue: async_channel::Receiver<Weighted<T>>,
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

/// A new edge that holds at most `max_items` items and `max_bytes` bytes.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// struct Line(String);
/// impl flow::ByteSized for Line {
///     fn weight(&self) -> usize {
///         self.0.len()
///     }
/// }
///
/// let (sender, receiver, gauge) = flow::edge("read->print", 64, 1 << 20);
/// assert!(sender.send(Line("a line".into())).await.is_ok());
/// drop(sender);
/// while let Some(line) = receiver.recv().await {
///     // What a worker holds counts until it is dropped.
///     assert_eq!((line.0.as_str(), gauge.level()), ("a line", (1, 6)));
/// }
/// # }
/// ```
pub fn edge<T: ByteSized>(
    name: impl Into<Arc<str>>,
    max_items: usize,
    max_bytes: usize,
) -> (Sender<T>, Receiver<T>, EdgeGauge) {
    let (sender, receiver) = async_channel::bounded(max_items.max(1));
    let gauge = EdgeGauge {
        name: name.into(),
        max_items: max_items.max(1),
        max_bytes,
        items: Arc::default(),
        bytes: Arc::default(),
        passed: Arc::default(),
    };
    let budget = Arc::new(Semaphore::new((max_bytes / UNIT).clamp(1, u32::MAX as usize)));
    (Sender { queue: sender, budget, gauge: gauge.clone() }, Receiver { queue: receiver }, gauge)
}

impl<T: ByteSized> Sender<T> {
    /// Sends some items, one after the other; `Err` as for one.
    pub async fn send_all(&self, items: impl IntoIterator<Item = T>) -> Result<(), T> {
        for item in items {
            self.send(item).await?;
        }
        Ok(())
    }

    /// Sends `item`, waiting while the edge is full. `Err` gives the item back: every receiver is
    /// gone, which only happens when the run is failing for a reason recorded elsewhere.
    pub async fn send(&self, item: T) -> Result<(), T> {
        let bytes = item.weight();
        let capacity = (self.gauge.max_bytes / UNIT).clamp(1, u32::MAX as usize);
        // An item larger than the whole budget takes all of it and crosses alone: asking for more
        // than there is would wait for ever.
        let units = bytes.div_ceil(UNIT).clamp(1, capacity) as u32;
        let Ok(permit) = self.budget.clone().acquire_many_owned(units).await else {
            return Err(item);
        };
        self.gauge.items.fetch_add(1, Ordering::Relaxed);
        self.gauge.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let share = Share { _permit: permit, gauge: self.gauge.clone(), bytes: bytes as u64 };
        match self.queue.send(Weighted { item, _share: share }).await {
            Ok(()) => {
                self.gauge.passed.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Err(refused) => Err(refused.0.item),
        }
    }
}

impl<T> Receiver<T> {
    /// The next item, or `None` when the edge is closed and empty.
    pub async fn recv(&self) -> Option<Weighted<T>> {
        self.queue.recv().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[derive(Debug)]
    struct Item(usize);
    impl ByteSized for Item {
        fn weight(&self) -> usize {
            self.0
        }
    }

    // Breaks if the byte budget stops binding, or if the permit is released on receive.
    #[tokio::test]
    async fn bytes_hold_the_sender_until_the_parcel_is_dropped() {
        let (tx, rx, gauge) = edge("a->b", 100, 10 * 1024);
        tx.send(Item(6 * 1024)).await.unwrap();
        #[expect(clippy::disallowed_methods, reason = "the test's own task")]
        let second = tokio::spawn({
            let tx = tx.clone();
            async move { tx.send(Item(6 * 1024)).await.is_ok() }
        });
        let held = rx.recv().await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!second.is_finished(), "the receiver still holds the first item's bytes");
        assert_eq!(gauge.level(), (1, 6 * 1024));
        drop(held);
        assert!(second.await.unwrap());
    }

    // Breaks if the clamp goes: the send would wait for ever.
    #[tokio::test]
    async fn an_item_larger_than_the_budget_crosses_alone() {
        let (tx, rx, gauge) = edge("a->b", 4, 1024);
        tx.send(Item(1 << 20)).await.unwrap();
        drop(rx.recv().await);
        tx.send(Item(1)).await.unwrap();
        drop(tx);
        assert!(rx.recv().await.is_some());
        assert!(rx.recv().await.is_none(), "closed and empty");
        assert_eq!(gauge.level(), (0, 0));
        assert_eq!(gauge.passed(), 2);
    }
}
