//! What is asked of a server, and what must be remembered of it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use url::Url;

use crate::error::Result;
use crate::messages::ResourceType;
use crate::staged::ListedFile;
use bulk_data_client::ExportRequest;

/// One kick-off: types whose watermarks lie close together share it.
#[derive(Debug, Clone)]
pub struct Kickoff {
    /// What is asked.
    pub request: ExportRequest,
    /// The types that it answers for; empty where all were asked for.
    pub asked: Vec<ResourceType>,
    /// Types that have a table already, where all were asked for.
    pub known: Vec<ResourceType>,
    /// The export that an earlier run asked for with this very request.
    pub in_flight: Option<Accepted>,
}

impl Kickoff {
    /// A kick-off of some of the types, by their places.
    pub(super) fn only(&self, places: &[usize]) -> Self {
        let mut some = self.clone();
        some.asked = places.iter().filter_map(|at| self.asked.get(*at).cloned()).collect();
        some.request.types.retain(|name| some.asked.iter().any(|asked| **asked == **name));
        some
    }

    /// Gives the second half of the types away, as a kick-off of their own.
    pub(super) fn take_half(&mut self) -> Self {
        let mut second = self.clone();
        second.asked = self.asked.split_off(self.asked.len().div_ceil(2));
        let of_second = |name: &String| second.asked.iter().any(|asked| **asked == **name);
        (second.request.types, self.request.types) = self.request.types.drain(..).partition(of_second);
        second
    }
}

/// An export that the server accepted.
#[derive(Debug, Clone)]
pub struct Accepted {
    /// Where its status is asked for.
    pub status: Url,
    /// Whether a poll's own status and the export's are apart.
    pub separate: bool,
    /// `transactionTime` of each type's table for this scope: a type whose table has the export's own, or a newer one's, was
    /// merged whole.
    pub tables: BTreeMap<ResourceType, i64>,
    /// Types whose files hold rows of other types: merged or not, they are read again.
    pub mixed: Vec<ResourceType>,
    /// Files that it listed to earlier runs, by [`ListedFile::said`], and what is staged of them.
    pub staged: Arc<HashMap<String, ListedFile>>,
}

impl Accepted {
    pub(super) fn new(status: Url, separate: bool) -> Self {
        Self { status, separate, tables: BTreeMap::new(), mixed: Vec::new(), staged: Arc::default() }
    }

    /// Types that were merged whole out of the export, whose watermark this is, or a newer one.
    pub fn merged(&self, watermark: i64) -> impl Iterator<Item = &ResourceType> {
        self.tables.iter().filter(move |(_, table)| **table >= watermark).map(|(name, _)| name)
    }
}

/// Hears what must be remembered of an export before anything else happens.
pub type Remember = Arc<dyn Fn(&ExportNote<'_>) -> Result<()> + Send + Sync>;

/// What is remembered.
#[derive(Debug)]
pub enum ExportNote<'a> {
    /// A kick-off is about to be sent.
    Asking,
    /// It was refused, or never arrived: no export came of it.
    Refused,
    /// The server's answers are no use: it may have given the export up.
    Useless {
        /// Where its status is asked for.
        status: &'a Url,
    },
    /// The server accepted; its status URL.
    Accepted {
        /// What was asked.
        kickoff: &'a Kickoff,
        /// Where its status is asked for.
        status: &'a Url,
        /// Whether a poll's own status and the export's are apart.
        separate: bool,
    },
    /// The manifest came.
    Complete {
        /// Where its status was asked for.
        status: &'a Url,
        /// Microseconds since the epoch.
        transaction_time: i64,
    },
    /// The server refused kick-offs of these types alone, and took others: why.
    SetAside(&'a [(String, String)]),
    /// It refused every type that was asked for, each by itself: it is not the types.
    AllRefused(&'a [String]),
    /// The server has no such export any more, or gave it up.
    Lost {
        /// Where its status was asked for.
        status: &'a Url,
    },
    /// Files of a type hold rows of other types too, and the type is about to be merged.
    Mixed {
        /// The type.
        resource_type: &'a ResourceType,
    },
    /// The server asks to come back later.
    Later {
        /// How long it asks to wait, where it says.
        wait: Option<Duration>,
        /// Its words.
        why: &'a str,
    },
}
