//! Kick-offs, and the events of exports.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use url::Url;

use super::OfServer;
use super::checkpoint::CheckpointEntry;
use crate::error::Result;
use crate::messages::ResourceType;
use bulk_data_client::ExportRequest;

/// One kick-off: types whose watermarks lie close together share it.
#[derive(Debug, Clone)]
pub struct Kickoff {
    /// The request.
    pub request: ExportRequest,
    /// The types that it answers for; empty where all were asked for.
    pub requested: Vec<ResourceType>,
    /// Types that have a table already, where all were asked for.
    pub known: Vec<ResourceType>,
    /// The export that an earlier run asked for with this very request.
    pub in_flight: Option<ExportHandle>,
}

impl Kickoff {
    /// Returns everything that is requested, as a text that is the same for the same request.
    pub(crate) fn fingerprint(&self) -> String {
        fingerprint(&self.request)
    }

    /// A kick-off of some of the types, by their places.
    pub(crate) fn only(&self, places: &[usize]) -> Self {
        let mut some = self.clone();
        some.requested = places.iter().filter_map(|at| self.requested.get(*at).cloned()).collect();
        some.request.types.retain(|name| some.requested.iter().any(|requested| **requested == **name));
        some
    }

    /// Gives the second half of the types away, as a kick-off of their own.
    pub(crate) fn take_half(&mut self) -> Self {
        let mut second = self.clone();
        second.requested = self.requested.split_off(self.requested.len().div_ceil(2));
        let of_second = |name: &String| second.requested.iter().any(|requested| **requested == **name);
        (second.request.types, self.request.types) = self.request.types.drain(..).partition(of_second);
        second
    }
}

/// Returns everything that is requested, as a text that is the same for the same request.
pub(crate) fn fingerprint(request: &ExportRequest) -> String {
    let mut types = request.types.clone();
    types.sort();
    let until = request.options.until.as_deref().unwrap_or_default();
    format!("{:?}|{}|{}{}", request.level, types.join(","), until, request.options.scope())
}

/// An export that the server accepted.
#[derive(Debug, Clone)]
pub struct ExportHandle {
    /// Status URL.
    pub status: Url,
    /// True if a poll's own status and the export's are apart.
    pub separate: bool,
    /// `transactionTime` of each type's table for this scope: a type whose table has the export's own, or a newer
    /// one's, was merged whole.
    pub tables: BTreeMap<ResourceType, i64>,
    /// Types whose files hold rows of other types: merged or not, they are read again.
    pub mixed_types: Vec<ResourceType>,
    /// Files that it listed to earlier runs, by [`CheckpointEntry::said`], and what is staged of them.
    pub staged: Arc<HashMap<String, CheckpointEntry>>,
}

impl ExportHandle {
    pub(crate) fn new(status: Url, separate: bool) -> Self {
        Self { status, separate, tables: BTreeMap::new(), mixed_types: Vec::new(), staged: Arc::default() }
    }

    /// Types that were merged whole out of the export, whose watermark this is, or a newer one.
    pub fn merged(&self, watermark: i64) -> impl Iterator<Item = &ResourceType> {
        self.tables.iter().filter(move |(_, table)| **table >= watermark).map(|(name, _)| name)
    }
}

/// Hears what must be remembered of an export before anything else happens.
pub type ExportEventSink = Arc<dyn Fn(&ExportEvent<'_>) -> Result<()> + Send + Sync>;

/// An event of an export.
#[derive(Debug)]
pub enum ExportEvent<'a> {
    /// A kick-off is about to be sent.
    Requested,
    /// The server answered, and accepted no export.
    NotAccepted,
    /// The server's answers are no use: it may have given the export up.
    Unusable {
        /// Status URL.
        status: &'a Url,
    },
    /// The server accepted; its status URL.
    Accepted {
        /// The kick-off.
        kickoff: &'a Kickoff,
        /// Status URL.
        status: &'a Url,
        /// True if a poll's own status and the export's are apart.
        separate: bool,
    },
    /// The manifest came.
    Complete {
        /// Status URL.
        status: &'a Url,
        /// Microseconds since the epoch.
        transaction_time: i64,
    },
    /// The server refused kick-offs of these types alone, and took others: why.
    TypesRejected(&'a [(String, String)]),
    /// It refused every type that was asked for, each by itself: it is not the types.
    AllRejected(&'a [String]),
    /// The server has no such export any more, or gave it up.
    Expired {
        /// Status URL.
        status: &'a Url,
    },
    /// Files of a type hold rows of other types too, and the type is about to be merged.
    UnrequestedType {
        /// The type.
        resource_type: &'a ResourceType,
    },
    /// The server asks to come back later.
    Throttled {
        /// Wait that it asks for, where it says.
        wait: Option<Duration>,
        /// Its message.
        why: &'a str,
    },
    /// A run ended by itself, and not all of these jobs is merged.
    RunFailed {
        /// Their status URLs.
        jobs: &'a [&'a str],
        /// Files that the server did not give.
        given: OfServer,
    },
    /// A run ended: types that the server may not have given whole after their commit, and types that came whole, each
    /// with the `_since` that it was asked with.
    FloorsChanged {
        /// Not whole.
        incomplete: &'a [(String, Option<i64>)],
        /// Whole.
        whole: &'a [(String, Option<i64>)],
    },
    /// All of these jobs is merged.
    Merged {
        /// Their status URLs.
        jobs: &'a [&'a str],
    },
    /// The server was told to delete these jobs, or has forgotten them.
    Released {
        /// Their status URLs.
        jobs: &'a [&'a str],
    },
    /// The operator cancelled these jobs.
    Cancelled {
        /// Their status URLs.
        jobs: &'a [&'a str],
    },
    /// The operator had everything forgotten but the jobs.
    Forgotten,
}
