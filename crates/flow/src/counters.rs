//! Counters that workers move and everybody reads.

use parking_lot::RwLock;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

type Key = (&'static str, Arc<str>);

/// Counters by name and label. Names are constants of `telemetry`, labels are resource types.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    rows: Arc<RwLock<BTreeMap<Key, Arc<AtomicU64>>>>,
}

/// A reading of a [`Counters`]: value by name and label.
pub type Counts = BTreeMap<Key, u64>;

impl Counters {
    /// Adds `by` to the counter `name` of `label`, and returns what it was before.
    pub fn add(&self, name: &'static str, label: &Arc<str>, by: u64) -> u64 {
        self.counter(name, label).fetch_add(by, Ordering::Relaxed)
    }

    /// The counter itself, for a loop that moves it often.
    pub fn counter(&self, name: &'static str, label: &Arc<str>) -> Arc<AtomicU64> {
        let key = (name, label.clone());
        if let Some(counter) = self.rows.read().get(&key) {
            return counter.clone();
        }
        let mut rows = self.rows.write();
        rows.entry(key).or_default().clone()
    }

    /// One counter's value; 0 where it was never moved.
    pub fn value(&self, name: &'static str, label: &Arc<str>) -> u64 {
        let rows = self.rows.read();
        rows.get(&(name, label.clone())).map_or(0, |counter| counter.load(Ordering::Relaxed))
    }

    /// Every counter's value now.
    pub fn read(&self) -> Counts {
        let rows = self.rows.read();
        rows.iter().map(|(key, counter)| (key.clone(), counter.load(Ordering::Relaxed))).collect()
    }
}
