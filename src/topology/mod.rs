//! The run as data: [`RunPlan`] is what the pipeline file resolves to, [`Topology`] the stages that it declares and the
//! edges between them, [`run`] one run of it.
//!
//! The list of stages is here and nowhere else. Spawning, the split of `memory`, `explain`, the status page, metrics
//! and the diagrams of the documents walk it.

mod connect;
mod exports;
mod inspect;
mod maintenance;
mod prepare;
mod recovery;
mod report;
mod resume_point;
mod run;
mod run_plan;
mod watch;

use std::sync::Arc;

use crate::error::Result;
use crate::messages::{ExportFile, MergeInput};
use crate::stages::export::EXPORT;
use crate::stages::merge::MERGE;
use crate::stages::{EdgeBytes, Memory, RunContext, Stage, StageSpec, Stages, attach, download, encode, parse};
use flow::{ByteSized, EdgeGauge, Receiver, Sender, edge};

pub use connect::{client, location, state_of};
pub use exports::cancel_exports;
pub use inspect::{Dependency, TableState, check_dependencies, table_states};
pub use maintenance::{ByTable, OptimizeOptions, VacuumOptions, optimize, run_id, vacuum};
pub use prepare::{Prepared, prepare};
pub use report::{RunOutcome, RunReport, for_failure as report_failure};
pub use run::{RUN_FAILED, RunOptions, run};
pub use run_plan::{RunPlan, SourcePlan, default_state_folder};
pub use watch::{RunEvent, Watch};

/// The stages between the source and merge, in the order in which data meets them. An optional stage sends what it
/// receives, and is left out where it has no workers.
macro_rules! stages {
    ($($stage:ty $(: $optional:ident)?,)+; $last:ty) => {
        /// Returns what each stage between source and merge declares, and its workers.
        fn between(stages: &Stages) -> Vec<(&'static StageSpec, usize)> {
            vec![
                $((<$stage as Stage>::SPEC, <$stage as Stage>::workers(stages)),)+
                (<$last as Stage>::SPEC, <$last as Stage>::workers(stages)),
            ]
        }

        /// Starts the workers of each stage between source and merge.
        fn spawn_between(run: &mut RunContext, edges: &mut Edges, files: Receiver<Arc<ExportFile>>) -> Result<()> {
            let input = files;
            $(let input = stages!(@spawn run, edges, input, $stage $(, $optional)?);)+
            let control = run.control.clone();
            <$last as Stage>::spawn(run, input, control)
        }
    };
    (@spawn $run:ident, $edges:ident, $input:ident, $stage:ty) => {{
        let (output, next) = $edges.next();
        <$stage as Stage>::spawn($run, $input, output)?;
        next
    }};
    (@spawn $run:ident, $edges:ident, $input:ident, $stage:ty, optional) => {
        match <$stage as Stage>::workers(&$run.stages) {
            0 => $input,
            _ => stages!(@spawn $run, $edges, $input, $stage),
        }
    };
}

stages! {
    download::Download,
    parse::Parse,
    attach::Attach: optional,
    ;
    encode::Encode
}

/// A stage of a pipeline.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its declaration.
    pub spec: &'static StageSpec,
    /// Its workers.
    pub workers: usize,
    /// The edge that it receives from; the source has none.
    pub input: Option<Edge>,
}

impl Node {
    /// Returns the percent of `memory` that is its input edge's; 0 where the edge has no share of its own.
    fn edge_percent(&self) -> u64 {
        self.spec.input.as_ref().map_or(0, |input| input.bytes.percent())
    }

    /// Returns the percent of `memory` that it holds itself.
    fn own_percent(&self) -> u64 {
        self.spec.shares.iter().map(|share| share.percent).sum()
    }
}

/// An edge between two stages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edge {
    /// `from->to`.
    pub name: Arc<str>,
    /// Items that cross it.
    pub carries: &'static str,
    /// The most items that it holds.
    pub items: usize,
    /// The most bytes that it holds.
    pub bytes: usize,
}

/// The stages of a pipeline and the edges between them.
#[derive(Debug, Clone)]
pub struct Topology {
    /// The stages, in the order in which data meets them.
    pub nodes: Vec<Node>,
}

impl Topology {
    /// Declares the stages of a pipeline with these settings.
    pub fn new(stages: &Stages, memory: &Memory) -> Self {
        let ends = |spec: &'static StageSpec| std::iter::once((spec, 1));
        let specs: Vec<(&'static StageSpec, usize)> =
            ends(EXPORT).chain(between(stages)).chain(ends(MERGE)).filter(|(_, workers)| *workers > 0).collect();
        let bytes_of = |at: usize| specs.get(at).and_then(|(spec, _)| spec.input.as_ref()).map(|input| input.bytes);
        // Edges that split a share lie one behind the other, before the edge whose share it is.
        let splits = |at: usize| bytes_of(at) == Some(EdgeBytes::SplitsNext);
        let bytes = |at: usize| {
            let whose = (at..specs.len()).find(|at| !splits(*at)).unwrap_or(at);
            let parts = 1 + (0..whose).rev().take_while(|at| splits(*at)).count();
            match bytes_of(whose) {
                Some(EdgeBytes::Fixed(bytes)) => bytes / parts,
                Some(EdgeBytes::Percent(percent)) => memory.percent(percent) / parts,
                Some(EdgeBytes::SplitsNext) | None => 0,
            }
        };
        let node = |at: usize| {
            let (spec, workers) = specs[at];
            let input = spec.input.as_ref().map(|input| Edge {
                name: format!("{}->{}", specs[at.saturating_sub(1)].0.name, spec.name).into(),
                carries: input.carries,
                items: input.items,
                bytes: bytes(at),
            });
            Node { spec, workers, input }
        };
        Self { nodes: (0..specs.len()).map(node).collect() }
    }

    /// Returns the edges, in the order in which data crosses them.
    pub fn edges(&self) -> impl Iterator<Item = &Edge> {
        self.nodes.iter().filter_map(|node| node.input.as_ref())
    }

    /// Returns the percent of `memory` of each edge that has a share of its own, then of what stages hold themselves.
    pub fn shares(&self) -> Vec<(String, u64)> {
        let edges = self.nodes.iter().filter(|node| node.edge_percent() > 0);
        let edges = edges.filter_map(|node| Some((node.input.as_ref()?.name.to_string(), node.edge_percent())));
        let own = self.nodes.iter().flat_map(|node| node.spec.shares);
        edges.chain(own.map(|share| (share.name.to_owned(), share.percent))).collect()
    }

    /// Draws the pipeline, at most 100 columns wide: what crosses each edge with its share of `memory`, the stages, and
    /// what each does.
    pub fn diagram(&self) -> String {
        let percent = |node: &Node| match node.edge_percent() {
            0 => String::new(),
            percent => format!(" {percent} %"),
        };
        let mut lines = vec![String::new(), String::new()];
        let rows = self.nodes.iter().map(|node| node.spec.summary.len()).max().unwrap_or_default() + 1;
        lines.resize(2 + rows, String::new());
        for (at, node) in self.nodes.iter().enumerate() {
            let next = self.nodes.get(at + 1);
            let label = next.and_then(|next| Some(format!("{}{}", next.input.as_ref()?.carries, percent(next))));
            let label = label.unwrap_or_default();
            let mut below: Vec<String> = node.spec.summary.iter().map(|line| (*line).to_owned()).collect();
            match node.own_percent() {
                0 => {}
                percent => below.push(format!("({percent} %)")),
            }
            let name = node.spec.name.chars().count();
            let widest = below.iter().map(|line| line.chars().count() + 2).max().unwrap_or_default();
            let width = widest.max(name + label.chars().count() + 4);
            let pad =
                |text: &str, width: usize| format!("{text}{}", " ".repeat(width.saturating_sub(text.chars().count())));
            lines[0].push_str(&pad(&format!("{}{label}", " ".repeat(name + 2)), width));
            let arrow = match next {
                Some(_) => format!("{} {}▶ ", node.spec.name, "─".repeat(width - name - 3)),
                None => format!("{} ──▶ tables", node.spec.name),
            };
            lines[1].push_str(&arrow);
            for (row, line) in lines.iter_mut().skip(2).enumerate() {
                line.push_str(&pad(below.get(row).map_or("", String::as_str), width));
            }
        }
        let lines = lines.iter().map(|line| format!(" {line}").trim_end().to_owned()).filter(|line| !line.is_empty());
        lines.map(|line| line + "\n").collect()
    }
}

/// Makes an edge; one that no stage declares holds one item at a time.
fn wire<T: ByteSized>(planned: Option<&Edge>) -> (Sender<T>, Receiver<T>, EdgeGauge) {
    match planned {
        Some(planned) => edge(planned.name.clone(), planned.items, planned.bytes),
        None => edge("", 1, 0),
    }
}

/// The edges of a run that is being wired.
struct Edges {
    planned: Vec<Edge>,
    gauges: Vec<EdgeGauge>,
}

impl Edges {
    /// Makes the next edge.
    fn next<T: ByteSized>(&mut self) -> (Sender<T>, Receiver<T>) {
        let (sender, receiver, gauge) = wire(self.planned.get(self.gauges.len()));
        self.gauges.push(gauge);
        (sender, receiver)
    }
}

/// Both ends of a pipeline that is being wired.
struct Ends {
    /// Edge into which the source sends files.
    files: Sender<Arc<ExportFile>>,
    /// Edge from which stages receive them.
    files_out: Receiver<Arc<ExportFile>>,
    edges: Edges,
    /// Edge into which stages send batches and control events.
    control: Sender<MergeInput>,
    /// Edge from which merge receives them.
    merge: Receiver<MergeInput>,
    merge_gauge: EdgeGauge,
}

impl Ends {
    fn of(topology: &Topology) -> Self {
        let mut planned: Vec<Edge> = topology.edges().cloned().collect();
        let last = planned.pop();
        let mut edges = Edges { planned, gauges: Vec::new() };
        let (files, files_out) = edges.next();
        let (control, merge, merge_gauge) = wire(last.as_ref());
        Self { files, files_out, edges, control, merge, merge_gauge }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::attach::AttachmentsSection;

    fn edges_of(stages: &Stages) -> Vec<(String, usize)> {
        let topology = Topology::new(stages, &Memory::new(100 << 20));
        topology.edges().map(|edge| (edge.name.to_string(), edge.bytes >> 20)).collect()
    }

    // Breaks if an optional stage takes memory that nobody gave it, or if an edge is named after a stage that is not
    // there.
    #[test]
    fn an_optional_stage_splits_the_share_of_the_edge_that_it_is_put_into() {
        let mut stages = Stages::default();
        let edge = |name: &str, mib| (name.to_owned(), mib);
        let rest = |edges: Vec<(String, usize)>| edges.into_iter().skip(1).collect::<Vec<_>>();
        assert_eq!(
            rest(edges_of(&stages)),
            [edge("download->parse", 14), edge("parse->encode", 18), edge("encode->merge", 9)]
        );
        stages.attachments = Some(AttachmentsSection::default());
        assert_eq!(
            rest(edges_of(&stages)),
            [
                edge("download->parse", 14),
                edge("parse->attach", 9),
                edge("attach->encode", 9),
                edge("encode->merge", 9)
            ]
        );
    }

    // Breaks if a new stage is given a share, and no other gives one up.
    #[test]
    fn the_shares_are_all_of_memory() {
        let topology = Topology::new(&Stages::default(), &Memory::new(1 << 30));
        assert_eq!(topology.nodes.iter().map(|node| node.edge_percent() + node.own_percent()).sum::<u64>(), 100);
    }
}
