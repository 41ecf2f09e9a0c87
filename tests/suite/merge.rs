//! DESIGN section 5 as a model: any sequence of runs leaves the newest version of every resource, once.

use fhirlake::stages::merge::{KEYS, MATCHING};
use fhirlake::stages::parse::LINE_INDEX;
use std::collections::BTreeMap;

use fhirlake::topology::RunOptions;
use proptest::prelude::*;

use super::support::{folder, lake, strings};

/// A copy of a resource, as a line says it.
#[derive(Debug, Clone, PartialEq)]
struct Copy {
    id: u8,
    /// Day of `meta.lastUpdated`.
    updated: Option<u8>,
    version: Option<u8>,
    content: u8,
}

impl Copy {
    fn line(&self) -> String {
        let mut meta = Vec::new();
        meta.extend(self.version.map(|version| format!(r#""versionId":"{version}""#)));
        meta.extend(self.updated.map(|day| format!(r#""lastUpdated":"2026-01-{:02}T00:00:00Z""#, day + 1)));
        let meta = if meta.is_empty() { String::new() } else { format!(r#","meta":{{{}}}"#, meta.join(",")) };
        format!(r#"{{"resourceType":"Patient","id":"p{}"{meta},"language":"c{}"}}"#, self.id, self.content)
    }
    fn order(&self) -> (Option<u8>, Option<u8>) {
        (self.updated, self.version)
    }
}

fn a_copy() -> impl Strategy<Value = Copy> {
    let version = prop_oneof![Just(None), (8u8..12).prop_map(Some)];
    (0u8..10, prop::option::of(0u8..3), version, 0u8..3).prop_map(|(id, updated, version, content)| Copy {
        id,
        updated,
        version,
        content,
    })
}

/// What a run does to the table, by the words of DESIGN section 5.
fn merge(table: &mut BTreeMap<u8, Copy>, run: &[Copy], full_refresh: bool) {
    let mut winners: BTreeMap<u8, &Copy> = BTreeMap::new();
    for copy in run {
        let best = winners.entry(copy.id).or_insert(copy);
        // Newest wins; of equal ones the last to arrive.
        if copy.order() >= best.order() {
            *best = copy;
        }
    }
    for (id, staged) in winners {
        let replaced = match table.get(&id) {
            None => true,
            // From a folder, what says nothing of its age is not newer, and what does is judged by it.
            Some(held) if !full_refresh && staged.updated.is_none() && held.updated.is_some() => false,
            Some(held) if !full_refresh && held.updated.is_some() && staged.updated != held.updated => {
                staged.updated > held.updated
            }
            Some(held)
                if !full_refresh && staged.updated.is_none() && staged.version.is_none() && held.version.is_some() =>
            {
                false
            }
            Some(held) if staged.updated.is_none() && held.updated.is_some() => true,
            Some(held) if staged.version.is_none() && held.version.is_some() => true,
            Some(held) if staged.order() != held.order() => staged.order() > held.order(),
            // Equal and both with a version: skipped, unless the run is a full refresh.
            Some(_) => staged.version.is_none() || full_refresh,
        };
        if replaced {
            table.insert(id, staged.clone());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    // Breaks if a row is lost, stands twice, or an older copy wins, whether the keys fit into memory or not and
    // whether rows are marked or files rewritten.
    #[test]
    fn any_sequence_of_runs_leaves_the_newest_copy_of_each_resource(
        runs in prop::collection::vec((prop::collection::vec(a_copy(), 1..14), any::<bool>()), 1..5),
        in_memory in any::<bool>(),
        vectors in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let lake = lake();
            let mut model = BTreeMap::new();
            for (run, full_refresh) in &runs {
                let text: Vec<String> = run.iter().map(Copy::line).collect();
                let (_data, source) = folder(&[("Patient.ndjson", &text.join("\n"))]);
                let mut plan = lake.plan(&source, &format!("stages: {{ merge: {{ deletion_vectors: {vectors} }} }}\n"));
                if !in_memory {
                    plan.memory.set(&KEYS, 0);
                    plan.memory.set(&MATCHING, 0);
                    plan.memory.set(&LINE_INDEX, 0);
                }
                let report = lake.run_with(plan, RunOptions { full_refresh: *full_refresh, ..RunOptions::default() }).await.unwrap();
                let before = model.clone();
                merge(&mut model, run, *full_refresh);
                let outcome = &report.types["Patient"];
                let new = model.keys().filter(|id| !before.contains_key(id)).count() as u64;
                let changed = model.iter().filter(|(id, copy)| before.get(id).is_some_and(|old| old != *copy)).count() as u64;
                assert_eq!((outcome.inserted, outcome.resources), (new, run.len() as u64));
                // A copy without a version that says the same is no change; nor is one that only lost its version.
                assert!(outcome.updated >= changed, "{outcome:?} for {changed} changes");
                assert_eq!(outcome.inserted + outcome.updated + outcome.skipped, run.len() as u64);
            }
            let batches = lake
                .sql("SELECT id, language AS c, meta['versionId'] AS v, CAST(date_part('day', meta['lastUpdated']) AS \
                    VARCHAR) AS u FROM Patient")
                .await;
            let mut found = BTreeMap::new();
            for batch in &batches {
                let column = |name: &str| strings(batch, name);
                let number = |text: &Option<String>| text.as_ref().map(|text| text.trim_start_matches(['c', 'p']).parse::<u8>().unwrap());
                for (((id, content), version), updated) in
                    column("id").iter().zip(column("c")).zip(column("v")).zip(column("u"))
                {
                    let id = number(id).unwrap();
                    let updated = number(&updated).map(|day| day - 1);
                    let copy = Copy { id, updated, version: number(&version), content: number(&content).unwrap() };
                    assert!(found.insert(id, copy).is_none(), "p{id} stands twice");
                }
            }
            assert_eq!(found, model);
        });
    }
}

// Breaks if a type that commits twice in a run, since more of its rows came in another type's file, loses its first
// commit's deletion vector, or takes its own commit for another writer's.
#[tokio::test(flavor = "multi_thread")]
async fn a_type_may_commit_twice_in_a_run() {
    let lake = lake();
    let patient = |id: u32, version: u32| {
        format!("{{\"resourceType\":\"Patient\",\"id\":\"p{id}\",\"meta\":{{\"versionId\":\"{version}\"}}}}\n")
    };
    let first: String = (0..100).map(|id| patient(id, 1)).collect();
    let (_data, source) = folder(&[("Patient.ndjson", &first)]);
    assert!(lake.run(&source, "").await.unwrap().succeeded);
    // Long enough for Patient to commit before the end of it is read.
    let note = "x".repeat(1000);
    let mut observations: String = (0..40_000)
        .map(|id| format!("{{\"resourceType\":\"Observation\",\"id\":\"o{id}\",\"note\":[{{\"text\":\"{note}\"}}]}}\n"))
        .collect();
    observations.extend((3..8).map(|id| patient(id, 3)));
    let second: String = (0..5).map(|id| patient(id, 2)).collect();
    let (_data, source) = folder(&[("Patient.ndjson", &second), ("Observation.ndjson", &observations)]);
    let report = lake.run(&source, "stages: { parse: { workers: 1 } }\n").await.unwrap();
    assert!(report.succeeded, "{report:#?}");
    let versions = lake.versions("Patient").await;
    let with = |version: &str| versions.values().filter(|found| found.as_deref() == Some(version)).count();
    assert_eq!((versions.len(), with("1"), with("2"), with("3")), (100, 92, 3, 5));
}
