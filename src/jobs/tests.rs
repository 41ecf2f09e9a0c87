//! No sequence of events and crashes makes a second kick-off, forgets a job, or releases one that is not merged.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use url::Url;

use super::*;
use bulk_data_client::{ExportOptions, ExportRequest, Level};

/// Two pipelines' scopes in one document, as after a change of `source.group`.
const SCOPES: [&str; 2] = ["fhirlake:test:0", "fhirlake:test:1"];

fn origin() -> EventOrigin<'static> {
    of(SCOPES[0])
}

fn of(scope: &'static str) -> EventOrigin<'static> {
    EventOrigin { scope, full_refresh: false, now: DateTime::UNIX_EPOCH }
}

fn kickoff() -> Kickoff {
    let request = ExportRequest {
        level: Level::System,
        types: vec!["Patient".into()],
        since: None,
        options: ExportOptions::default(),
    };
    Kickoff { request, requested: vec!["Patient".into()], known: Vec::new(), in_flight: None }
}

/// Action of the server, the disk or the operator at the next step of a run.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// The process dies; another run begins.
    Crash,
    /// The next request succeeds.
    Succeed,
    /// The server accepts the kick-off, and its answer is lost with the process.
    AnswerLost,
    /// The server rejects or loses what is asked for next.
    Refuse,
    /// It asks to come back later.
    Throttle,
    /// It rejects the type.
    RejectType,
    /// It rejects every type.
    RejectAll,
    /// The server's answer is no use.
    Unusable,
    /// The server does not give a file.
    FileFails,
    /// The server says that each missing file is gone for good.
    FilesGone,
    /// Something fails here, such as a disk.
    FailHere,
    /// The operator cancels all jobs of the pipeline.
    Cancel,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::Crash),
        12 => Just(Step::Succeed),
        1 => Just(Step::AnswerLost),
        2 => Just(Step::Refuse),
        1 => Just(Step::Throttle),
        1 => Just(Step::RejectType),
        1 => Just(Step::RejectAll),
        2 => Just(Step::Unusable),
        2 => Just(Step::FileFails),
        2 => Just(Step::FilesGone),
        2 => Just(Step::FailHere),
        1 => Just(Step::Cancel),
    ]
}

/// The world beside the document, which the document must agree with: what the server has made, what is in the tables,
/// and how often the server failed to give a job.
#[derive(Default)]
struct World {
    made: usize,
    held: BTreeSet<String>,
    merged: BTreeSet<String>,
    failures: BTreeMap<String, u32>,
    /// Scopes with a kick-off that nobody was told the answer of, since the last that was answered by an export.
    unanswered: BTreeSet<&'static str>,
}

impl World {
    /// Deletes a job on the server. It must be in the tables, or the server must have failed to give it three times.
    fn delete(&mut self, status: &str) -> Result<(), TestCaseError> {
        let failures = self.failures.get(status).copied().unwrap_or(0);
        prop_assert!(self.merged.contains(status) || failures >= 3, "{status} is deleted: {failures} failures");
        self.held.remove(status);
        Ok(())
    }
}

/// The document as a crash leaves it: what was persisted, and nothing else.
fn persisted(jobs: &ExportJobs) -> ExportJobs {
    serde_json::from_slice(&serde_json::to_vec(jobs).unwrap()).unwrap()
}

/// Runs a pipeline until a step is a crash or the run ends. Each event is persisted before its effect is relied on.
fn run(
    scope: &'static str,
    jobs: &mut ExportJobs,
    world: &mut World,
    steps: &mut impl Iterator<Item = Step>,
) -> Result<(), TestCaseError> {
    let mut next = || steps.next().unwrap_or(Step::Crash);
    let ours = |job: &&ExportJob| job.scope == scope;
    // What an earlier run could not release comes first.
    let releasable: Vec<String> =
        jobs.jobs.iter().filter(ours).filter(|job| job.is_releasable()).map(|job| job.status.clone()).collect();
    for status in releasable {
        match next() {
            Step::Crash => return Ok(()),
            Step::Succeed => {
                world.delete(&status)?;
                jobs.apply(&ExportEvent::Released { jobs: &[&status] }, of(scope));
            }
            _ => {}
        }
    }
    let resumed = resume(jobs, scope, vec![kickoff()], false, &Default::default());
    let handle = match resumed.kickoffs[0].in_flight.clone() {
        Some(handle) => handle,
        None => match kick_off(scope, jobs, world, next())? {
            Some(handle) => handle,
            None => return Ok(()),
        },
    };
    let status = handle.status;
    let text = status.to_string();
    match next() {
        Step::Crash | Step::FailHere | Step::AnswerLost => return Ok(()),
        Step::Refuse => {
            world.held.remove(&text);
            jobs.apply(&ExportEvent::Expired { status: &status }, of(scope));
            return Ok(());
        }
        Step::Unusable => {
            *world.failures.entry(text).or_default() += 1;
            jobs.apply(&ExportEvent::Unusable { status: &status }, of(scope));
            return Ok(());
        }
        Step::Cancel => {
            // The operator's own word: no rule protects the jobs from it.
            let all: Vec<String> = jobs.jobs.iter().filter(ours).map(|job| job.status.clone()).collect();
            world.held.retain(|status| !all.contains(status));
            let all: Vec<&str> = all.iter().map(String::as_str).collect();
            jobs.apply(&ExportEvent::Cancelled { jobs: &all }, of(scope));
            jobs.apply(&ExportEvent::Forgotten, of(scope));
            world.unanswered.clear();
            return Ok(());
        }
        _ => jobs.apply(&ExportEvent::Complete { status: &status, transaction_time: 7 }, of(scope)),
    }
    jobs.apply(&ExportEvent::UnrequestedType { resource_type: &"Patient".into() }, of(scope));
    let given = match next() {
        Step::Crash => return Ok(()),
        Step::FileFails => Some((OfServer::FilesFailed, 1)),
        Step::FilesGone => Some((OfServer::FilesGone, 3)),
        Step::Succeed => None,
        _ => Some((OfServer::Nothing, 0)),
    };
    if let Some((given, failures)) = given {
        *world.failures.entry(text.clone()).or_default() += failures;
        jobs.apply(&ExportEvent::RunFailed { jobs: &[&text], given }, of(scope));
        return Ok(());
    }
    // The tables have it now, whether or not the process lives to say so.
    world.merged.insert(text.clone());
    if matches!(next(), Step::Crash) {
        return Ok(());
    }
    jobs.apply(&ExportEvent::Merged { jobs: &[&text] }, of(scope));
    if matches!(next(), Step::Succeed) {
        world.delete(&text)?;
        jobs.apply(&ExportEvent::Released { jobs: &[&text] }, of(scope));
    }
    Ok(())
}

/// Kicks an export off; `None` where the run ends with it.
fn kick_off(
    scope: &'static str,
    jobs: &mut ExportJobs,
    world: &mut World,
    step: Step,
) -> Result<Option<ExportHandle>, TestCaseError> {
    // No second kick-off beside an export that is neither in the tables nor given up.
    for job in jobs.jobs.iter().filter(|job| job.scope == scope) {
        let failures = world.failures.get(&job.status).copied().unwrap_or(0);
        let is_over = world.merged.contains(&job.status) || failures >= 3;
        prop_assert!(is_over && job.is_releasable(), "a second kick-off beside {job:?}");
    }
    jobs.apply(&ExportEvent::Requested, of(scope));
    let refused = match step {
        Step::Succeed | Step::FailHere | Step::Unusable | Step::Cancel | Step::FileFails | Step::FilesGone => None,
        Step::Crash | Step::AnswerLost => {
            // The server may hold an export that nobody knows.
            world.made += usize::from(matches!(step, Step::AnswerLost));
            world.unanswered.insert(scope);
            return Ok(None);
        }
        Step::Throttle => Some(ExportEvent::Throttled { wait: None, why: "busy" }),
        Step::RejectAll => Some(ExportEvent::AllRejected(&[])),
        Step::RejectType | Step::Refuse => Some(ExportEvent::TypesRejected(&[])),
    };
    if let Some(refused) = refused {
        jobs.apply(&ExportEvent::NotAccepted, of(scope));
        jobs.apply(&refused, of(scope));
        return Ok(None);
    }
    world.unanswered.remove(scope);
    world.made += 1;
    let status = Url::parse(&format!("http://server/jobs/{}", world.made)).unwrap();
    world.held.insert(status.to_string());
    jobs.apply(&ExportEvent::Accepted { kickoff: &kickoff(), status: &status, separate: false }, of(scope));
    Ok(Some(ExportHandle::new(status, false)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    // Breaks if a run starts an export while another is neither merged nor given up, if a job that the server holds is
    // forgotten, or if one is deleted that is not in the tables. The model knows what is; the document does not tell
    // it.
    #[test]
    fn no_sequence_of_events_and_crashes_loses_a_job(
        steps in proptest::collection::vec(step(), 1..80),
        turns in proptest::collection::vec(0_usize..2, 1..20),
    ) {
        let (mut jobs, mut world) = (ExportJobs::default(), World::default());
        let mut steps = steps.into_iter().peekable();
        for turn in turns.iter().cycle() {
            if steps.peek().is_none() {
                break;
            }
            let (scope, others) = (SCOPES[*turn], SCOPES[1 - *turn]);
            let of_others = |jobs: &ExportJobs| -> Vec<ExportJob> {
                jobs.jobs.iter().filter(|job| job.scope == others).cloned().collect()
            };
            let before = of_others(&jobs);
            run(scope, &mut jobs, &mut world, &mut steps)?;
            jobs = persisted(&jobs);
            prop_assert_eq!(of_others(&jobs), before, "a run changes another pipeline's jobs");
            let is_known = |scope: &str| jobs.unconfirmed.iter().any(|kick_off| kick_off.scope == scope);
            prop_assert!(world.unanswered.iter().all(|scope| is_known(scope)), "a kick-off is forgotten");
            let known: BTreeSet<String> = jobs.jobs.iter().map(|job| job.status.clone()).collect();
            prop_assert!(world.held.is_subset(&known), "the server holds {:?}, {:?} are known", world.held, known);
        }
    }

    // Breaks if a release takes a job that is still to be merged, whoever asks for it.
    #[test]
    fn only_what_is_merged_or_given_up_is_released(failures in 0_u32..5, merged: bool, complete: bool) {
        let status = Url::parse("http://server/jobs/1").unwrap();
        let mut jobs = ExportJobs::default();
        jobs.apply(&ExportEvent::Accepted { kickoff: &kickoff(), status: &status, separate: false }, origin());
        if complete {
            jobs.apply(&ExportEvent::Complete { status: &status, transaction_time: 7 }, origin());
        }
        (0..failures).for_each(|_| jobs.apply(&ExportEvent::Unusable { status: &status }, origin()));
        if merged {
            jobs.apply(&ExportEvent::Merged { jobs: &[status.as_str()] }, origin());
        }
        jobs.apply(&ExportEvent::Released { jobs: &[status.as_str()] }, origin());
        prop_assert_eq!(jobs.jobs.is_empty(), merged || failures >= MAX_FAILURES);
    }
}

// Breaks if a state that an earlier version left in the middle of a run cannot be read, or is written otherwise.
#[test]
fn a_state_of_an_earlier_version_is_read() {
    let text = r#"{
  "in_flight": [
    {
      "status": "http://127.0.0.1:9/fhir/jobs/3",
      "separate": false,
      "accepted": "2026-11-20T03:00:00Z",
      "scope": "fhirlake:hospital:0123456789abcdef",
      "asked": "System|Claim,Patient||",
      "types": ["Patient", "Claim"],
      "since": 1763600000000000,
      "full_refresh": false,
      "transaction_time": 1763607600000000,
      "failures": 1,
      "behind": true,
      "mixed": ["Claim"],
      "merged": false
    }
  ],
  "not_before": { "time": "2026-11-20T04:00:00Z", "scope": "s", "why": "too recently" },
  "unanswered": [{ "time": "2026-11-20T02:00:00Z", "scope": "s" }],
  "set_aside": [{ "resource_type": "Coverage", "scope": "s", "time": "2026-11-20T02:00:00Z", "why": "403" }],
  "floors": [{ "resource_type": "Patient", "scope": "s", "since": null }],
  "all_refused": { "time": "2026-11-20T02:00:00Z", "scope": "s", "types": ["Coverage"] }
}"#;
    let jobs: ExportJobs = serde_json::from_str(text).unwrap();
    assert_eq!(jobs.jobs[0].state, JobState::Complete { transaction_time: 1_763_607_600_000_000 });
    assert!(
        jobs.jobs[0].incomplete && jobs.throttled.is_some() && jobs.unconfirmed.len() == 1 && jobs.rejected.len() == 1
    );
    let (written, read): (serde_json::Value, serde_json::Value) =
        (serde_json::to_value(&jobs).unwrap(), serde_json::from_str(text).unwrap());
    assert_eq!(written, read);
}

#[test]
fn what_was_rejected_one_by_one_is_known_for_a_day() {
    let now = Utc::now();
    let all_rejected = Some(AllRejected { time: now, scope: "s".into(), types: vec!["Claim".into()] });
    let jobs = ExportJobs { all_rejected, ..ExportJobs::default() };
    assert_eq!(rejected_lately(&jobs, "s", now + TimeDelta::hours(23)), ["Claim".to_owned()].into());
    assert!(rejected_lately(&jobs, "other", now).is_empty());
    assert!(rejected_lately(&jobs, "s", now + TimeDelta::hours(25)).is_empty());
}

// Breaks if a type whose error came after its commit is asked for from too late, or from its floor for ever.
#[test]
fn a_floor_stays_until_its_type_came_whole_from_it() {
    let mut jobs = ExportJobs::default();
    let mut change = |scope, incomplete: &[(&str, Option<i64>)], whole: &[(&str, Option<i64>)]| {
        let owned = |of: &[(&str, Option<i64>)]| of.iter().map(|(name, since)| ((*name).into(), *since)).collect();
        let (incomplete, whole): (Vec<_>, Vec<_>) = (owned(incomplete), owned(whole));
        jobs.apply(&ExportEvent::FloorsChanged { incomplete: &incomplete, whole: &whole }, of(scope));
        (jobs.floored(SCOPES[0], "Patient", Some(9)), jobs.floored(SCOPES[1], "Patient", Some(9)))
    };
    let [one, other] = SCOPES;
    assert_eq!(change(one, &[("Patient", Some(5))], &[]), (Some(5), Some(9)));
    assert_eq!(change(one, &[("Patient", Some(7))], &[]), (Some(5), Some(9)), "the earliest counts");
    assert_eq!(change(one, &[], &[("Patient", Some(6)), ("Claim", None)]), (Some(5), Some(9)), "not from the floor");
    assert_eq!(change(other, &[("Patient", None)], &[("Patient", None)]), (Some(5), None), "another pipeline's");
    assert_eq!(change(one, &[], &[("Patient", Some(5))]), (Some(9), None));
    // One that came whole in one export, and not in another of the same run.
    assert_eq!(change(other, &[("Patient", None)], &[("Patient", None)]), (Some(9), None));
}
