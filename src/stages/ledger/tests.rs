use super::*;
use crate::messages::{FileDone, FilePlace, ManifestPage};

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
        place: FilePlace { page: 0, kind: FileKind::Output, at: index as usize },
    })
}
fn end() -> Fact {
    Fact::ExportEnd(ExportEnd {
        export: 0,
        asked: vec!["Patient".into()],
        all_types: false,
        known: vec![],
        transaction_time: Some(1),
        full: true,
        merged: Vec::new(),
    })
}
fn parsed(file: u32, lines: u64, rows: &[(&str, u64)], bad: u64) -> Fact {
    Fact::Parsed(ParsedChunk {
        file,
        lines,
        rows: rows.iter().map(|(name, rows)| ((*name).into(), *rows)).collect(),
        bad: if bad > 0 { vec![(Some("Patient".into()), bad)] } else { vec![] },
        ..Default::default()
    })
}
fn patient() -> ResourceType {
    "Patient".into()
}

// Breaks if a type commits before the manifest's end, a file's end, or its last row is staged.
#[test]
fn a_type_is_complete_only_when_all_is_accounted_for() {
    let mut books = Ledger::new(1, None);
    books.enter(Fact::Page(ManifestPage { export: 0, status: None, files: vec![file(0, Some("Patient"))] }));
    books.enter(parsed(0, 5, &[("Patient", 5)], 0));
    assert_eq!(books.standing(&patient()), Standing::Open, "the file has not ended");
    books.enter(Fact::FileDone(FileDone { file: 0, lines: 5 }));
    assert_eq!(books.standing(&patient()), Standing::Open, "the manifest has not ended");
    books.enter(end());
    assert_eq!(books.standing(&patient()), Standing::Parsed(5));
    books.staged(&patient(), 5);
    assert_eq!(books.standing(&patient()), Standing::Complete);
    books.committed(&patient());
    assert_eq!(books.standing(&patient()), Standing::Done);
}

// Breaks if a type that strayed into the files of another gets that export's watermark: its history would never come.
#[test]
fn an_export_answers_for_what_was_asked_only() {
    let mut books = Ledger::new(1, None);
    let Fact::ExportEnd(end) = end() else { unreachable!() };
    let resumed = ExportEnd { asked: vec![], merged: vec![patient()], ..end.clone() };
    books.enter(Fact::ExportEnd(resumed));
    let claim = "Claim".into();
    assert!(books.end_of(&claim).is_none() && !books.is_answered_for(&claim));
    assert_eq!((books.is_answered_for(&patient()), books.transaction_time()), (true, Some(1)));

    let mut books = Ledger::new(1, None);
    books.enter(Fact::ExportEnd(ExportEnd { asked: vec![], all_types: true, ..end }));
    assert!(books.is_answered_for(&claim));
}

#[test]
fn a_stray_row_makes_its_type_wait_for_every_file() {
    let mut books = Ledger::new(1, None);
    let files = vec![file(0, Some("Observation")), file(1, Some("Condition"))];
    books.enter(Fact::Page(ManifestPage { export: 0, status: None, files }));
    books.enter(end());
    books.enter(parsed(0, 1, &[("Patient", 1)], 0));
    books.enter(Fact::FileDone(FileDone { file: 0, lines: 1 }));
    assert_eq!(books.standing(&patient()), Standing::Open);
    books.enter(Fact::FileDone(FileDone { file: 1, lines: 0 }));
    assert_eq!(books.standing(&patient()), Standing::Parsed(1));
}

#[test]
fn lines_that_do_not_balance_or_too_many_bad_ones_fail_the_type() {
    let mut books = Ledger::new(1, Some(AtMost::Share(0.1)));
    books.enter(Fact::Page(ManifestPage { export: 0, status: None, files: vec![file(0, Some("Patient"))] }));
    books.enter(end());
    books.enter(parsed(0, 10, &[("Patient", 8)], 2));
    books.enter(Fact::FileDone(FileDone { file: 0, lines: 10 }));
    assert!(matches!(books.standing(&patient()), Standing::Failed(why) if why.contains("2 bad lines of 10")));

    let mut books = Ledger::new(1, None);
    books.enter(Fact::Page(ManifestPage { export: 0, status: None, files: vec![file(0, Some("Patient"))] }));
    books.enter(end());
    books.enter(parsed(0, 10, &[("Patient", 9)], 0));
    books.enter(Fact::FileDone(FileDone { file: 0, lines: 10 }));
    assert!(matches!(books.standing(&patient()), Standing::Failed(why) if why.contains("balance")));
}

// Breaks if encode is asked for rows that it never saw, and so never answers.
#[test]
fn rows_that_are_held_are_not_asked_of_encode() {
    let mut books = Ledger::new(1, None);
    books.enter(Fact::Page(ManifestPage {
        export: 0,
        status: None,
        files: vec![file(0, Some("Patient")), file(1, Some("Patient"))],
    }));
    let Fact::Parsed(held) = parsed(0, 7, &[("Patient", 7)], 0) else { unreachable!() };
    books.enter(Fact::FileHeld(held));
    books.enter(parsed(1, 3, &[("Patient", 3)], 0));
    assert_eq!((books.behind(), books.staged_of(&patient())), (vec![(patient(), 3)], (7, 0)));
    books.enter(Fact::FileDone(FileDone { file: 1, lines: 3 }));
    books.enter(end());
    assert_eq!(books.standing(&patient()), Standing::Parsed(3));
    books.staged(&patient(), 3);
    assert_eq!((books.standing(&patient()), books.staged_of(&patient())), (Standing::Complete, (10, 3)));
}

// Breaks if a refused export's types vanish from the report, as if they had succeeded.
#[test]
fn a_failed_export_fails_the_types_that_it_was_asked_for() {
    let mut books = Ledger::new(2, None);
    books.enter(end());
    books.enter(Fact::ExportFailed { export: 1, asked: vec!["Condition".into()], why: "403".into() });
    assert_eq!(books.standing(&patient()), Standing::Complete);
    assert_eq!(books.standing(&"Condition".into()), Standing::Failed("403".into()));
}

// Breaks if a type that was merged before, of which another export's files bring a stray row, fails for an export that did
// not come: its row would be lost when the export that brought it is given back.
#[test]
fn a_failed_export_fails_no_type_that_it_was_not_asked_for() {
    let mut books = Ledger::new(2, None);
    books.enter(Fact::Page(ManifestPage { export: 0, status: None, files: vec![file(0, Some("Condition"))] }));
    let Fact::ExportEnd(end) = end() else { unreachable!() };
    books.enter(Fact::ExportEnd(ExportEnd { asked: vec!["Condition".into()], merged: vec![patient()], ..end }));
    books.enter(parsed(0, 1, &[("Patient", 1)], 0));
    books.enter(Fact::FileDone(FileDone { file: 0, lines: 1 }));
    books.enter(Fact::OneExportMore);
    books.enter(Fact::ExportFailed { export: 1, asked: vec!["Claim".into()], why: "403".into() });
    assert_eq!(books.standing(&patient()), Standing::Open, "an export has not said its last");
    books.enter(Fact::ExportFailed { export: 2, asked: vec!["Device".into()], why: "403".into() });
    books.staged(&patient(), 1);
    assert_eq!(books.standing(&patient()), Standing::Complete);
    assert_eq!(books.standing(&"Claim".into()), Standing::Failed("403".into()));
}

#[test]
fn a_failed_file_fails_its_type_and_not_the_others() {
    let mut books = Ledger::new(1, None);
    let files = vec![file(0, Some("Patient")), file(1, Some("Condition"))];
    books.enter(Fact::Page(ManifestPage { export: 0, status: None, files }));
    books.enter(end());
    books.enter(Fact::FileFailed(0, "404".into()));
    books.enter(Fact::FileDone(FileDone { file: 1, lines: 0 }));
    assert!(matches!(books.standing(&patient()), Standing::Failed(_)));
    assert_eq!(books.standing(&"Condition".into()), Standing::Complete);
}
