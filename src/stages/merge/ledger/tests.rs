//! Completeness of types.

use super::*;
use crate::messages::{ExportFile, FileFinished, ManifestEntryId, ManifestPage};

fn file(index: u32, declared: Option<&str>) -> Arc<ExportFile> {
    Arc::new(ExportFile {
        index,
        export: 0,
        name: format!("{index}.ndjson"),
        url: url::Url::parse("file:///x").unwrap(),
        location: None,
        kind: FileKind::Output,
        declared: declared.map(Into::into),
        count: None,
        requires_access_token: false,
        replayed: false,
        place: ManifestEntryId { page: 0, kind: FileKind::Output, at: index as usize },
    })
}
fn end() -> ControlEvent {
    ControlEvent::ExportEnd(ExportEnd {
        export: 0,
        requested: vec!["Patient".into()],
        all_types: false,
        known: vec![],
        transaction_time: Some(1),
        full: true,
        merged: Vec::new(),
    })
}
fn parsed(file: u32, lines: u64, rows: &[(&str, u64)], bad: u64) -> ControlEvent {
    ControlEvent::Parsed(Box::new(ParsedChunk {
        file,
        lines,
        rows: rows.iter().map(|(name, rows)| ((*name).into(), *rows)).collect(),
        bad: if bad > 0 { vec![(Some("Patient".into()), bad)] } else { vec![] },
        ..Default::default()
    }))
}
fn patient() -> ResourceType {
    "Patient".into()
}

// Breaks if a type commits before the manifest's end, a file's end, or its last row is staged.
#[test]
fn a_type_is_complete_only_when_all_is_accounted_for() {
    let mut ledger = Ledger::new(1, None);
    ledger.enter(ControlEvent::Page(ManifestPage { export: 0, status: None, files: vec![file(0, Some("Patient"))] }));
    ledger.enter(parsed(0, 5, &[("Patient", 5)], 0));
    assert_eq!(ledger.completeness(&patient()), Completeness::Open, "the file has not ended");
    ledger.enter(ControlEvent::FileFinished(FileFinished { file: 0, lines: 5 }));
    assert_eq!(ledger.completeness(&patient()), Completeness::Open, "the manifest has not ended");
    ledger.enter(end());
    assert_eq!(ledger.completeness(&patient()), Completeness::Parsed(5));
    ledger.staged(&patient(), 5);
    assert_eq!(ledger.completeness(&patient()), Completeness::Complete);
    ledger.committed(&patient());
    assert_eq!(ledger.completeness(&patient()), Completeness::Done);
}

// Breaks if a type that strayed into the files of another gets that export's watermark: its history would never come.
#[test]
fn an_export_answers_for_what_was_asked_only() {
    let mut ledger = Ledger::new(1, None);
    let ControlEvent::ExportEnd(end) = end() else { unreachable!() };
    let resumed = ExportEnd { requested: vec![], merged: vec![patient()], ..end.clone() };
    ledger.enter(ControlEvent::ExportEnd(resumed));
    let claim = "Claim".into();
    assert!(ledger.end_of(&claim).is_none() && !ledger.is_answered_for(&claim));
    assert_eq!((ledger.is_answered_for(&patient()), ledger.transaction_time()), (true, Some(1)));

    let mut ledger = Ledger::new(1, None);
    ledger.enter(ControlEvent::ExportEnd(ExportEnd { requested: vec![], all_types: true, ..end }));
    assert!(ledger.is_answered_for(&claim));
}

#[test]
fn a_stray_row_makes_its_type_wait_for_every_file() {
    let mut ledger = Ledger::new(1, None);
    let files = vec![file(0, Some("Observation")), file(1, Some("Condition"))];
    ledger.enter(ControlEvent::Page(ManifestPage { export: 0, status: None, files }));
    ledger.enter(end());
    ledger.enter(parsed(0, 1, &[("Patient", 1)], 0));
    ledger.enter(ControlEvent::FileFinished(FileFinished { file: 0, lines: 1 }));
    assert_eq!(ledger.completeness(&patient()), Completeness::Open);
    ledger.enter(ControlEvent::FileFinished(FileFinished { file: 1, lines: 0 }));
    assert_eq!(ledger.completeness(&patient()), Completeness::Parsed(1));
}

#[test]
fn lines_that_do_not_balance_or_too_many_bad_ones_fail_the_type() {
    let mut ledger = Ledger::new(1, Some(Limit::Percent(10.0)));
    ledger.enter(ControlEvent::Page(ManifestPage { export: 0, status: None, files: vec![file(0, Some("Patient"))] }));
    ledger.enter(end());
    ledger.enter(parsed(0, 10, &[("Patient", 8)], 2));
    ledger.enter(ControlEvent::FileFinished(FileFinished { file: 0, lines: 10 }));
    assert!(matches!(ledger.completeness(&patient()), Completeness::Failed(why) if why.contains("2 bad lines of 10")));

    let mut ledger = Ledger::new(1, None);
    ledger.enter(ControlEvent::Page(ManifestPage { export: 0, status: None, files: vec![file(0, Some("Patient"))] }));
    ledger.enter(end());
    ledger.enter(parsed(0, 10, &[("Patient", 9)], 0));
    ledger.enter(ControlEvent::FileFinished(FileFinished { file: 0, lines: 10 }));
    assert!(matches!(ledger.completeness(&patient()), Completeness::Failed(why) if why.contains("balance")));
}

// Breaks if a page of HTML, or an outcome, is taken for a file without resources: its type would be passed as up to
// date.
#[test]
fn a_file_that_is_no_ndjson_fails_its_type() {
    let of = |bad: u64, foreign: u64, rows: &[(&str, u64)]| {
        let mut ledger = Ledger::new(1, None);
        ledger.enter(ControlEvent::Page(ManifestPage {
            export: 0,
            status: None,
            files: vec![file(0, Some("Patient"))],
        }));
        let lines = bad + rows.iter().map(|row| row.1).sum::<u64>();
        let ControlEvent::Parsed(chunk) = parsed(0, lines, rows, bad) else { unreachable!() };
        ledger.enter(ControlEvent::Parsed(ParsedChunk { foreign, ..*chunk }.into()));
        ledger.enter(ControlEvent::FileFinished(FileFinished { file: 0, lines }));
        ledger.enter(end());
        ledger.completeness(&patient())
    };
    assert!(matches!(of(9, 9, &[]), Completeness::Failed(why) if why.contains("not an export file")));
    assert!(
        matches!(of(0, 1, &[("OperationOutcome", 1)]), Completeness::Failed(why) if why.contains("not an export file"))
    );
    assert!(matches!(of(9, 8, &[]), Completeness::Failed(_)), "nothing of it could be read");
    assert!(!matches!(of(9, 8, &[("Patient", 1)]), Completeness::Failed(_)), "a resource that is broken is a bad line");
    assert!(!matches!(of(9, 9, &[("Patient", 1)]), Completeness::Failed(_)));
    assert!(!matches!(of(0, 0, &[("Condition", 1)]), Completeness::Failed(_)), "types that are mixed are no finding");
}

// Breaks if encode is asked for rows that it never saw, and so never answers.
#[test]
fn rows_that_are_held_are_not_asked_of_encode() {
    let mut ledger = Ledger::new(1, None);
    ledger.enter(ControlEvent::Page(ManifestPage {
        export: 0,
        status: None,
        files: vec![file(0, Some("Patient")), file(1, Some("Patient"))],
    }));
    let ControlEvent::Parsed(held) = parsed(0, 7, &[("Patient", 7)], 0) else { unreachable!() };
    ledger.enter(ControlEvent::FileResumed(held));
    ledger.enter(parsed(1, 3, &[("Patient", 3)], 0));
    assert_eq!((ledger.unstaged(), ledger.staged_of(&patient())), (vec![(patient(), 3)], (7, 0)));
    ledger.enter(ControlEvent::FileFinished(FileFinished { file: 1, lines: 3 }));
    ledger.enter(end());
    assert_eq!(ledger.completeness(&patient()), Completeness::Parsed(3));
    ledger.staged(&patient(), 3);
    assert_eq!((ledger.completeness(&patient()), ledger.staged_of(&patient())), (Completeness::Complete, (10, 3)));
}

// Breaks if a refused export's types vanish from the report, as if they had succeeded.
#[test]
fn a_failed_export_fails_the_types_that_it_was_asked_for() {
    let mut ledger = Ledger::new(2, None);
    ledger.enter(end());
    ledger.enter(ControlEvent::ExportFailed { export: 1, requested: vec!["Condition".into()], why: "403".into() });
    assert_eq!(ledger.completeness(&patient()), Completeness::Complete);
    assert_eq!(ledger.completeness(&"Condition".into()), Completeness::Failed("403".into()));
}

// Breaks if a type that was merged before, of which another export's files bring a stray row, fails for an export that
// did not come: its row would be lost when the export that brought it is released.
#[test]
fn a_failed_export_fails_no_type_that_it_was_not_asked_for() {
    let mut ledger = Ledger::new(2, None);
    ledger.enter(ControlEvent::Page(ManifestPage { export: 0, status: None, files: vec![file(0, Some("Condition"))] }));
    let ControlEvent::ExportEnd(end) = end() else { unreachable!() };
    ledger.enter(ControlEvent::ExportEnd(ExportEnd {
        requested: vec!["Condition".into()],
        merged: vec![patient()],
        ..end
    }));
    ledger.enter(parsed(0, 1, &[("Patient", 1)], 0));
    ledger.enter(ControlEvent::FileFinished(FileFinished { file: 0, lines: 1 }));
    ledger.enter(ControlEvent::ExportBisected { export: 1, parts: 2 });
    ledger.enter(ControlEvent::ExportFailed { export: 2, requested: vec!["Claim".into()], why: "403".into() });
    assert_eq!(ledger.completeness(&patient()), Completeness::Open, "an export has not said its last");
    ledger.enter(ControlEvent::ExportFailed { export: 3, requested: vec!["Device".into()], why: "403".into() });
    ledger.staged(&patient(), 1);
    assert_eq!(ledger.completeness(&patient()), Completeness::Complete);
    assert_eq!(ledger.completeness(&"Claim".into()), Completeness::Failed("403".into()));
}

#[test]
fn a_failed_file_fails_its_type_and_not_the_others() {
    let mut ledger = Ledger::new(1, None);
    let files = vec![file(0, Some("Patient")), file(1, Some("Condition"))];
    ledger.enter(ControlEvent::Page(ManifestPage { export: 0, status: None, files }));
    ledger.enter(end());
    ledger.enter(ControlEvent::FileFailed(0, "404".into(), Some(404)));
    ledger.enter(ControlEvent::FileFinished(FileFinished { file: 1, lines: 0 }));
    assert!(matches!(ledger.completeness(&patient()), Completeness::Failed(_)));
    assert_eq!(ledger.completeness(&"Condition".into()), Completeness::Complete);
}
