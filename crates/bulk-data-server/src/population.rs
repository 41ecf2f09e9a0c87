//! The synthetic population and its history. Everything follows from the seed: a resource's
//! content from (seed, type, patient, number), its fate from the steps that the population went through.

use chrono::{DateTime, TimeZone, Utc};

/// The types that the population has, in the order of a manifest.
pub const DEMO_TYPES: [&str; 14] = [
    "Organization",
    "Practitioner",
    "Patient",
    "Coverage",
    "Encounter",
    "Condition",
    "Observation",
    "DiagnosticReport",
    "MedicationRequest",
    "Procedure",
    "Immunization",
    "AllergyIntolerance",
    "Claim",
    "ExplanationOfBenefit",
];

/// Numbers out of a seed: SplitMix64, which is enough for a demo and the same on every machine.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(parts: &[u64]) -> Self {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for part in parts {
            random.0 ^= part.wrapping_mul(0xff51_afd7_ed55_8ccd);
            random.next();
        }
        random
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
    pub(crate) fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len() as u64) as usize]
    }
    pub(crate) fn jitter(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// A step of the population's history.
#[derive(Debug, Clone)]
struct Step {
    time: DateTime<Utc>,
    /// Per mille of the resources that changed and that were deleted.
    changed: u64,
    deleted: u64,
    /// Patients from the start of this step on.
    patients: u32,
}

/// A synthetic population.
#[derive(Debug, Clone)]
pub struct Population {
    seed: u64,
    steps: Vec<Step>,
}

/// State of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResourceState {
    /// `meta.versionId`.
    pub version: u32,
    /// `meta.lastUpdated`, or when it was deleted.
    pub updated: DateTime<Utc>,
    /// True if it is gone.
    pub deleted: bool,
}

/// Types of which nothing else refers: they may be deleted without a dangling reference.
fn may_be_deleted(kind: usize) -> bool {
    matches!(DEMO_TYPES[kind], "Immunization" | "AllergyIntolerance" | "Procedure")
}

impl Population {
    /// `patients` patients out of `seed`.
    pub fn new(seed: u64, patients: u32) -> Self {
        let time = Utc.with_ymd_and_hms(2026, 1, 1, 0, 0, 0).single().unwrap_or_default();
        Self { seed, steps: vec![Step { time, changed: 0, deleted: 0, patients }] }
    }

    /// Patients now.
    pub fn patients(&self) -> u32 {
        self.steps.last().map_or(0, |step| step.patients)
    }

    /// Time passes: per mille of the resources change and are deleted, and `arrivals` patients come. At `time`.
    pub fn step(&mut self, changed: u64, deleted: u64, arrivals: u32, time: DateTime<Utc>) {
        let patients = self.patients() + arrivals;
        self.steps.push(Step { time, changed, deleted, patients });
    }

    pub(crate) fn random(&self, tag: u64, patient: u32, number: u32) -> Random {
        Random::new(&[self.seed, tag, u64::from(patient), u64::from(number)])
    }

    /// Returns the state of a resource; `None` before its patient came.
    pub fn state(&self, kind: usize, patient: u32, number: u32) -> Option<ResourceState> {
        let born = self.steps.iter().position(|step| patient < step.patients)?;
        let mut state = ResourceState { version: 1, updated: self.steps[born].time, deleted: false };
        for (index, step) in self.steps.iter().enumerate().skip(born + 1) {
            let draw = Random::new(&[self.seed, 77, kind as u64, u64::from(patient), u64::from(number), index as u64])
                .below(1000);
            if may_be_deleted(kind) && draw < step.deleted * 4 {
                return Some(ResourceState { deleted: true, updated: step.time, ..state });
            }
            if draw >= 1000 - step.changed {
                state = ResourceState { version: state.version + 1, updated: step.time, deleted: false };
            }
        }
        Some(state)
    }

    /// Calls `f` for every resource of `kind` of `patient`, with its number and fate.
    pub fn for_each(&self, kind: usize, patient: u32, mut f: impl FnMut(u32, ResourceState)) {
        for number in self.numbers(kind, patient) {
            if let Some(state) = self.state(kind, patient, number) {
                f(number, state);
            }
        }
    }

    /// A resource as a line of NDJSON, its end included.
    pub fn write(&self, kind: usize, patient: u32, number: u32, state: ResourceState, out: &mut String) {
        crate::resources::write(self, kind, patient, number, state, out);
    }

    /// The logical id of a resource.
    pub fn id(&self, kind: usize, patient: u32, number: u32) -> String {
        crate::resources::id(self, kind, patient, number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(population: &Population) -> Vec<String> {
        let mut lines = Vec::new();
        for kind in 0..DEMO_TYPES.len() {
            for patient in 0..population.patients() {
                population.for_each(kind, patient, |number, state| {
                    if !state.deleted {
                        let mut line = String::new();
                        population.write(kind, patient, number, state, &mut line);
                        lines.push(line);
                    }
                });
            }
        }
        lines
    }

    // Breaks if a line is not JSON, an id stands twice, or a reference points to nothing.
    #[test]
    fn the_population_is_whole() {
        let mut population = Population::new(1, 12);
        population.step(100, 50, 3, Utc::now());
        let lines = all(&population);
        let mut ids = std::collections::HashSet::new();
        let mut references = Vec::new();
        for line in &lines {
            let json: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            let id = format!("{}/{}", json["resourceType"].as_str().unwrap(), json["id"].as_str().unwrap());
            assert!(ids.insert(id.clone()), "{id} stands twice");
            collect(&json, &mut references);
        }
        assert!(references.len() > lines.len());
        for reference in references.iter().filter(|reference| !reference.starts_with('#')) {
            assert!(ids.contains(reference), "{reference} points to nothing");
        }
    }

    fn collect(json: &serde_json::Value, out: &mut Vec<String>) {
        match json {
            serde_json::Value::Object(members) => {
                out.extend(members.get("reference").and_then(|to| to.as_str()).map(str::to_owned));
                members.values().for_each(|member| collect(member, out));
            }
            serde_json::Value::Array(items) => items.iter().for_each(|item| collect(item, out)),
            _ => {}
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_steps_change_only_some() {
        let (one, mut two) = (Population::new(7, 20), Population::new(7, 20));
        assert_eq!(all(&one), all(&two));
        two.step(50, 20, 1, Utc::now());
        let (before, after) = (all(&one), all(&two));
        let before: std::collections::HashSet<_> = before.into_iter().collect();
        let same = after.iter().filter(|line| before.contains(*line)).count();
        assert!(same > before.len() * 8 / 10 && same < before.len());
    }
}
