//! No sequence of events and crashes makes a second kick-off, forgets a job, or releases one that is not merged.

use std::collections::BTreeSet;

use proptest::prelude::*;
use url::Url;

use super::*;
use bulk_data_client::{ExportOptions, ExportRequest, Level};

const SCOPE: &str = "fhirlake:test:0";

fn origin() -> Origin<'static> {
    Origin { scope: SCOPE, full_refresh: false, now: DateTime::UNIX_EPOCH }
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
    /// The server rejects, throttles, or loses what is asked for next.
    Refuse,
    /// The server's answer is no use.
    Unusable,
    /// The server does not give a file.
    FileFails,
    /// The server says that each missing file is gone for good.
    FilesGone,
    /// Something fails here, such as a disk.
    FailHere,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => Just(Step::Crash),
        4 => Just(Step::Succeed),
        1 => Just(Step::Refuse),
        1 => Just(Step::Unusable),
        1 => Just(Step::FileFails),
        1 => Just(Step::FilesGone),
        1 => Just(Step::FailHere),
    ]
}

/// A server: the jobs that it holds, and whether it has made one that no run was told of.
#[derive(Default)]
struct Server {
    made: usize,
    held: BTreeSet<String>,
}

/// The document as a crash leaves it: what was persisted, and nothing else.
fn persisted(jobs: &ExportJobs) -> ExportJobs {
    serde_json::from_slice(&serde_json::to_vec(jobs).unwrap()).unwrap()
}

/// Runs until a step is a crash or the run ends. Each event is persisted before its effect is relied on.
fn run(
    jobs: &mut ExportJobs,
    server: &mut Server,
    steps: &mut impl Iterator<Item = Step>,
) -> Result<(), TestCaseError> {
    let mut next = || steps.next().unwrap_or(Step::Crash);
    // What an earlier run could not release comes first.
    let releasable: Vec<String> =
        jobs.jobs.iter().filter(|job| job.is_releasable()).map(|job| job.status.clone()).collect();
    for status in releasable {
        match next() {
            Step::Crash => return Ok(()),
            Step::Succeed => {
                server.held.remove(&status);
                jobs.apply(&ExportEvent::Released { jobs: &[&status] }, origin());
            }
            _ => {}
        }
    }
    let resumed = resume(jobs, SCOPE, vec![kickoff()], false, &Default::default());
    let mut handle = resumed.kickoffs[0].in_flight.clone();
    if handle.is_none() {
        let unmerged = jobs.jobs.iter().filter(|job| !job.is_releasable()).count();
        prop_assert_eq!(unmerged, 0, "a second kick-off: {:?}", jobs);
        jobs.apply(&ExportEvent::Requested, origin());
        match next() {
            Step::Succeed | Step::FailHere | Step::Unusable => {}
            Step::Crash => return Ok(()),
            _ => {
                jobs.apply(&ExportEvent::NotAccepted, origin());
                return Ok(());
            }
        }
        server.made += 1;
        let status = Url::parse(&format!("http://server/jobs/{}", server.made)).unwrap();
        server.held.insert(status.to_string());
        jobs.apply(&ExportEvent::Accepted { kickoff: &kickoff(), status: &status, separate: false }, origin());
        handle = Some(ExportHandle::new(status, false));
    }
    let status = handle.unwrap().status;
    let text = status.to_string();
    match next() {
        Step::Crash | Step::FailHere => return Ok(()),
        Step::Refuse => {
            server.held.remove(&text);
            jobs.apply(&ExportEvent::Expired { status: &status }, origin());
            return Ok(());
        }
        Step::Unusable => {
            jobs.apply(&ExportEvent::Unusable { status: &status }, origin());
            return Ok(());
        }
        _ => jobs.apply(&ExportEvent::Complete { status: &status, transaction_time: 7 }, origin()),
    }
    let given = match next() {
        Step::Crash => return Ok(()),
        Step::FileFails => Some(OfServer::FilesFailed),
        Step::FilesGone => Some(OfServer::FilesGone),
        Step::FailHere | Step::Unusable | Step::Refuse => Some(OfServer::Nothing),
        Step::Succeed => None,
    };
    if let Some(given) = given {
        jobs.apply(&ExportEvent::RunFailed { jobs: &[&text], given }, origin());
        return Ok(());
    }
    jobs.apply(&ExportEvent::Merged { jobs: &[&text] }, origin());
    match next() {
        Step::Crash => {}
        Step::Succeed => {
            server.held.remove(&text);
            jobs.apply(&ExportEvent::Released { jobs: &[&text] }, origin());
        }
        _ => {}
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    // Breaks if a run starts an export while another is neither merged nor given up, if a job that the server holds is
    // forgotten, or if one is released that is not merged.
    #[test]
    fn no_sequence_of_events_and_crashes_loses_a_job(steps in proptest::collection::vec(step(), 1..60)) {
        let (mut jobs, mut server) = (ExportJobs::default(), Server::default());
        let mut steps = steps.into_iter().peekable();
        while steps.peek().is_some() {
            run(&mut jobs, &mut server, &mut steps)?;
            jobs = persisted(&jobs);
            let known: BTreeSet<String> = jobs.jobs.iter().map(|job| job.status.clone()).collect();
            prop_assert!(server.held.is_subset(&known), "the server holds {:?}, and {:?} are known", server.held,
                known);
            // A kick-off whose answer never came is told, and not forgotten.
            prop_assert!(jobs.unconfirmed.len() <= server.made + 60);
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
    assert_eq!(jobs.jobs[0].state(), JobState::Complete { transaction_time: 1_763_607_600_000_000 });
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
