//! View of a run for those who watch it: counters, edges, events.

use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flow::{Counters, EdgeGauge};

/// An event of a run, for those who watch it.
#[derive(Debug)]
pub enum RunEvent<'a> {
    /// The run knows what it asks for: everything, by its own choice or for want of a watermark, or changes.
    Planned {
        /// True if it asks for everything.
        full: bool,
    },
    /// The edges are made, in the order in which data crosses them.
    Wired(Vec<EdgeGauge>),
    /// The server said how far its export is.
    ServerStatus(&'a str),
    /// The run was stopped and waits for the workers of these stages.
    Draining(&'a [&'static str]),
}

/// Hears of events in a run.
type Listener = Arc<dyn Fn(&RunEvent<'_>) + Send + Sync>;

/// View of a run for those who watch it.
#[derive(Clone, Default)]
pub struct Watch {
    /// Counters by type.
    pub counters: Counters,
    /// Edges, once the run has made them.
    pub edges: Arc<Mutex<Vec<EdgeGauge>>>,
    /// The server's last message on its export.
    pub server: Arc<Mutex<Option<String>>>,
    /// True if the run asks for everything, by its own choice or for want of a watermark.
    pub full: Arc<AtomicBool>,
    listener: Option<Listener>,
}

impl Watch {
    /// A watch that tells `listener` of each event too.
    pub fn with_listener(listener: impl Fn(&RunEvent<'_>) + Send + Sync + 'static) -> Self {
        Self { listener: Some(Arc::new(listener)), ..Self::default() }
    }

    pub(super) fn on(&self, event: RunEvent<'_>) {
        if let Some(listener) = &self.listener {
            listener(&event);
        }
        match event {
            RunEvent::Planned { full } => self.full.store(full, Ordering::Relaxed),
            RunEvent::Wired(gauges) => *self.edges.lock() = gauges,
            RunEvent::ServerStatus(text) => *self.server.lock() = Some(text.to_owned()),
            RunEvent::Draining(_) => {}
        }
    }
}
