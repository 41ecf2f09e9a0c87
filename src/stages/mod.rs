//! The stages: each is a plain value with a `run` method. They never import each other: they meet in `messages`.
//!
//! Name, input, workers and share of `memory` of a stage stand with the stage, once: in its [`StageSpec`]. `topology`
//! has the list of stages.

pub mod attach;
pub mod download;
pub mod encode;
pub mod export;
pub mod merge;
pub mod parse;

use std::collections::BTreeMap;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::attach::AttachmentsSection;
use self::download::replay::Replayed;
use self::download::{DownloadSection, Origin};
use self::encode::EncodeSection;
use self::merge::MergeSection;
use self::parse::{KnownLines, ParseSection};
use crate::error::Result;
use crate::export_log::ExportLog;
use crate::messages::{BadLineSink, FlushRequests, Layouts, MergeInput};
use crate::values::Findings;
use bulk_data_client::Client;
use delta_upsert::Tables;
use flow::{Counters, Receiver, Sender, TaskGroup};

/// A stage's section of the pipeline file: its settings.
pub trait Section {
    /// Finds values that make no sense in a pipeline with `memory` bytes.
    fn check(&self, memory: u64, found: &mut Findings);
}

impl<S: Section> Section for Option<S> {
    fn check(&self, memory: u64, found: &mut Findings) {
        self.iter().for_each(|section| section.check(memory, found));
    }
}

/// Declares the sections: each with its key, documentation and type, once. Each is checked below its key.
macro_rules! sections {
    ($($(#[$meta:meta])* $key:ident: $section:ty,)+) => {
        /// Settings of each stage.
        #[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub struct Stages {
            $($(#[$meta])* pub $key: $section,)+
        }

        impl Section for Stages {
            fn check(&self, memory: u64, found: &mut Findings) {
                $(found.below(stringify!($key), |found| self.$key.check(memory, found));)+
            }
        }
    };
}

sections! {
    /// Files to bytes.
    download: DownloadSection,
    /// Bytes to resources.
    parse: ParseSection,
    /// Download of what resources link to.
    #[serde(skip_serializing_if = "Option::is_none")]
    attachments: Option<AttachmentsSection>,
    /// Resources to columns and pages.
    encode: EncodeSection,
    /// Pages to commits.
    merge: MergeSection,
}

/// Declaration of a stage. Spawning, the split of `memory`, `explain`, the status page, metrics and the diagrams
/// follow from it.
#[derive(Debug)]
pub struct StageSpec {
    /// The name: of its workers, and of the edges from and to it.
    pub name: &'static str,
    /// Its work, in lines of at most 16 letters for the diagram.
    pub summary: &'static [&'static str],
    /// The edge that it receives from; the source has none.
    pub input: Option<EdgeSpec>,
    /// Bytes that it holds itself.
    pub shares: &'static [Share],
    /// The counter that shows its progress, and the unit of that.
    pub rate: Option<(&'static str, &'static str)>,
}

/// Bound of an edge.
#[derive(Debug)]
pub struct EdgeSpec {
    /// Items that cross it, such as `chunks`.
    pub carries: &'static str,
    /// Items.
    pub items: usize,
    /// Bytes.
    pub bytes: EdgeBytes,
}

/// Bytes that an edge holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EdgeBytes {
    /// A number, beside `memory`.
    Fixed(usize),
    /// A share of `memory`, in percent.
    Percent(u64),
    /// A part of the share of the next stage's edge: for an optional stage, which sends what it receives.
    SplitsNext,
}

impl EdgeBytes {
    /// Returns the percent of `memory` that is an edge's own share; 0 where it has none.
    pub fn percent(self) -> u64 {
        match self {
            EdgeBytes::Percent(percent) => percent,
            EdgeBytes::Fixed(_) | EdgeBytes::SplitsNext => 0,
        }
    }
}

/// A share of `memory` that a stage holds itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Share {
    /// Its purpose.
    pub name: &'static str,
    /// Percent of `memory`.
    pub percent: u64,
}

/// The memory budget of a run.
#[derive(Debug, Clone)]
pub struct Memory {
    total: usize,
    set: BTreeMap<&'static str, usize>,
}

impl Memory {
    /// A budget of so many bytes.
    pub fn new(total: u64) -> Self {
        Self { total: usize::try_from(total).unwrap_or(usize::MAX), set: BTreeMap::new() }
    }
    /// Returns all of it, in bytes.
    pub fn total(&self) -> usize {
        self.total
    }
    /// Returns so many percent of it, in bytes.
    pub fn percent(&self, percent: u64) -> usize {
        usize::try_from(self.total as u64 / 100 * percent).unwrap_or(usize::MAX)
    }
    /// Returns a share, in bytes.
    pub fn share(&self, share: &Share) -> usize {
        self.set.get(share.name).copied().unwrap_or_else(|| self.percent(share.percent))
    }
    /// Sets a share to so many bytes, for tests of what happens beyond it.
    pub fn set(&mut self, share: &Share, bytes: usize) {
        self.set.insert(share.name, bytes);
    }
}

/// A stage between the source and merge.
pub trait Stage {
    /// Its declaration.
    const SPEC: &'static StageSpec;
    /// Its input.
    type Input;
    /// Its output.
    type Output;
    /// Returns the number of its workers; 0 where the pipeline does not have the stage.
    fn workers(stages: &Stages) -> usize;
    /// Starts its workers.
    fn spawn(run: &mut RunContext, input: Receiver<Self::Input>, output: Sender<Self::Output>) -> Result<()>;
}

/// A run as its stages see it.
pub struct RunContext {
    /// The run's workers.
    pub tasks: TaskGroup,
    /// The stages' settings.
    pub stages: Arc<Stages>,
    /// The memory budget.
    pub memory: Memory,
    /// The edge into merge, for control events.
    pub control: Sender<MergeInput>,
    /// The server, where there is one.
    pub client: Option<Client>,
    /// The tables' folder.
    pub tables: Tables,
    /// Origin of files.
    pub origin: Origin,
    /// Lines out of quarantine, which enter where downloaded chunks do.
    pub replayed: Option<Replayed>,
    /// The layout of each type.
    pub layouts: Layouts,
    /// Merge's requests to encode.
    pub requests: FlushRequests,
    /// Destination of bad lines.
    pub bad_lines: BadLineSink,
    /// Elements that resources are cut down to: `id`, or `Patient.id`.
    pub elements: Arc<[String]>,
    /// Codes of issues that hold no watermark.
    pub ignored_codes: Arc<[String]>,
    /// The log that Bulk Data clients share.
    pub log: ExportLog,
    /// Rows of the tables, by which unchanged lines are known; `None` where each line is to be encoded.
    pub known: Option<Arc<KnownLines>>,
    /// Counters.
    pub counters: Counters,
}

impl RunContext {
    /// Returns the workers. What else it holds is dropped: an edge closes when its last sender is gone, and ours must
    /// not outlive the workers'.
    pub fn into_tasks(self) -> TaskGroup {
        self.tasks
    }
}
