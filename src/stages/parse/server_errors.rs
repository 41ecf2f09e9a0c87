//! Errors of a server about its own export: issues of OperationOutcomes, and the resource types that they concern.

use std::sync::Arc;

use super::{Line, Names, add, add_many, type_of};
use crate::messages::{ExportFile, FileKind, ParsedChunk, ResourceType};
use bulk_data_client::ISSUE_TYPES;
use fhir_arrow::EXCLUDED_TYPES;
use fhir_arrow::tape::{Kind, Value};

/// The server's messages about its export, as they are met.
pub(super) struct Said<'a> {
    pub names: &'a Names,
    pub ignored_codes: &'a [String],
    /// Issues, by severity and code.
    pub issues: Vec<(Arc<str>, u64)>,
}

impl Said<'_> {
    /// Reads a line of an output file that is the server's word on its export, and no resource of it: an
    /// OperationOutcome, or an error object. An outcome that has an id and tells of no error is a resource.
    pub(crate) fn message(&mut self, file: &ExportFile, value: Value<'_>, tally: &mut ParsedChunk) -> Option<Line> {
        if file.replayed {
            return None;
        }
        if is_error_object(value) {
            tally.foreign += 1;
            tally.errors += 1;
            concern(file, Vec::new(), self.names, &mut tally.server_errors);
            return Some(Line::ServerMessage);
        }
        // In a folder, those of a file of outcomes are resources: there is no server whose messages they could be.
        let is_stored = file.location.is_some() && file.declared.as_deref() == Some("OperationOutcome");
        if type_of(value) != Some("OperationOutcome") || is_stored {
            return None;
        }
        let issues = issues_of(self.names, value, file, self.ignored_codes);
        if issues.errors == 0 && value.get(b"id").is_some() {
            return None;
        }
        tally.foreign += u64::from(!issues.concerns.is_empty());
        self.count(issues, tally);
        Some(Line::ServerMessage)
    }

    /// Counts the issues of a line of an error file.
    pub(crate) fn outcome(&mut self, file: &ExportFile, value: Value<'_>, tally: &mut ParsedChunk) {
        let issues = issues_of(self.names, value, file, self.ignored_codes);
        self.count(issues, tally);
    }

    fn count(&mut self, issues: Issues, tally: &mut ParsedChunk) {
        tally.errors += issues.errors;
        for (label, count) in issues.counts {
            add_many(&mut self.issues, label, count);
        }
        for (name, count) in issues.concerns {
            add_many(&mut tally.server_errors, name, count);
        }
    }
}

/// The issues of one OperationOutcome.
#[derive(Debug, Default, PartialEq, Eq)]
struct Issues {
    /// All, by severity and code: `error not-found`.
    pub counts: Vec<(Arc<str>, u64)>,
    /// Issues of severity fatal or error.
    pub errors: u64,
    /// Of those, the ones whose code is not ignored, by the type that each concerns; `None` for all types of the
    /// export.
    pub concerns: Vec<(Option<ResourceType>, u64)>,
}

/// Reads the issues of an OperationOutcome that a line of `file` holds. Issues of the codes `ignored` hold no
/// watermark.
///
/// An issue without a severity, or with one that FHIR does not have, counts as an error: `severity` is required, and
/// what cannot be understood must not be taken for harmless.
fn issues_of(names: &Names, value: Value<'_>, file: &ExportFile, ignored: &[String]) -> Issues {
    let mut found = Issues::default();
    for issue in value.get(b"issue").iter().flat_map(Value::items) {
        let severity = text(issue.get(b"severity")).to_ascii_lowercase();
        let severity =
            ["fatal", "error", "warning", "information", "success"].into_iter().find(|known| *known == severity);
        let severity = severity.unwrap_or("error");
        let code = text(issue.get(b"code"));
        // Anything might stand in place of a code, and any number of things: only FHIR's (IssueType) are labels.
        let label = if ISSUE_TYPES.contains(&code) { format!("{severity} {code}") } else { severity.to_owned() };
        add(&mut found.counts, label.into());
        if !matches!(severity, "fatal" | "error") {
            continue;
        }
        found.errors += 1;
        let details = issue.get(b"details");
        let codings = || details.and_then(|details| details.get(b"coding")).into_iter().flat_map(|list| list.items());
        let is_ignored =
            |code: &str| !code.is_empty() && ignored.iter().any(|ignored| ignored.eq_ignore_ascii_case(code));
        if is_ignored(code) || codings().any(|coding| is_ignored(text(coding.get(b"code")))) {
            continue;
        }
        let mut types = Vec::new();
        let words = [issue.get(b"diagnostics"), details.and_then(|details| details.get(b"text"))];
        let words = words.into_iter().chain(codings().map(|coding| coding.get(b"display")));
        words.for_each(|words| types_in(names, text(words), &mut types));
        for path in [b"expression".as_slice(), b"location"].iter().filter_map(|key| issue.get(key)) {
            // `Condition.code`: the first segment of a FHIRPath is a type.
            let first = |path: Value<'_>| {
                names.get(text(Some(path)).split(['.', '[', '(']).next().unwrap_or_default().as_bytes()).cloned()
            };
            types.extend(path.items().filter_map(first));
        }
        concern(file, types, names, &mut found.concerns);
    }
    found
}

/// Adds the types that an error in a line of `file` concerns: those that it names, else those that the file's own place
/// names, else all (`None`).
fn concern(file: &ExportFile, mut types: Vec<ResourceType>, names: &Names, out: &mut Vec<(Option<ResourceType>, u64)>) {
    if types.is_empty() {
        types_in_url(names, file, &mut types);
    }
    // Rows of this type are what the server wrote when it met the error, or the error is what the entry is about.
    types.extend(file.declared.clone());
    types.retain(|name| is_exported(name));
    types.sort();
    types.dedup();
    match types.is_empty() {
        true => add(out, None),
        false => types.into_iter().for_each(|name| add(out, Some(name))),
    }
}

/// Returns true if an object that is no resource is the server's error: `{"error": …}`, `{"errors": […]}`.
fn is_error_object(value: Value<'_>) -> bool {
    let has = |key: &[u8]| value.get(key).is_some();
    value.kind() == Kind::Object && !has(b"resourceType") && (has(b"error") || has(b"errors") || has(b"issue"))
}

fn text<'a>(value: Option<Value<'a>>) -> &'a str {
    value.and_then(|value| value.as_str()).unwrap_or_default()
}

/// Returns true if an export brings rows of the type.
fn is_exported(name: &str) -> bool {
    name != "OperationOutcome" && !EXCLUDED_TYPES.contains(&name)
}

/// Types whose names are English words too: they are names of types only where they stand as one.
const WORDS: [&str; 13] = [
    "Account",
    "Basic",
    "Binary",
    "Endpoint",
    "Group",
    "Library",
    "List",
    "Location",
    "Media",
    "Person",
    "Schedule",
    "Subscription",
    "Task",
];

/// Types that a reference names for everything that belongs to it, and not for itself.
const COMPARTMENTS: [&str; 2] = ["Patient", "Group"];

/// Adds the types that a text names: `Failed to export 2.Condition.ndjson`. A patient that is named, `Patient/7`, names
/// no type: rows of any may be missing.
fn types_in(names: &Names, text: &str, out: &mut Vec<ResourceType>) {
    let (mut at, mut first) = (0, None);
    for token in text.split(|letter: char| !letter.is_ascii_alphanumeric()) {
        let (start, end) = (at, at + token.len());
        at = end + text[end..].chars().next().map_or(0, char::len_utf8);
        let Some(name) = names.get(token.as_bytes()) else { continue };
        let before = text[..start].chars().next_back();
        let mut after = text[end..].chars();
        let (after, behind) = (after.next(), after.next());
        let is_quoted = |letter: Option<char>| letter.is_some_and(|letter| "\"'`=<>".contains(letter));
        let is_file = after == Some('.') && behind.is_some_and(|letter| letter.is_ascii_alphanumeric());
        let is_part = |letter: Option<char>| letter.is_some_and(|letter| "._-".contains(letter));
        let stands_as_name = is_file || is_part(before) || is_quoted(before) || is_quoted(after);
        let names_one = COMPARTMENTS.contains(&token)
            && (after == Some('/')
                || (after == Some(' ')
                    && (start == 0 || text[end + 1..].starts_with(|next: char| next.is_ascii_digit()))));
        let may_name_one = names_one && start == 0 && after == Some(' ');
        first = first.or(may_name_one.then_some(name));
        if stands_as_name || (!names_one && !WORDS.contains(&token)) {
            out.push(name.clone());
        }
    }
    // `Patient and Condition …`: beside others it is one of them; `Patient x …` alone names no type.
    if !out.is_empty() {
        out.extend(first.cloned());
    }
}

/// Adds the types that an error file's URL names: in its last segment, in its query, or as the folder that it is in.
fn types_in_url(names: &Names, file: &ExportFile, out: &mut Vec<ResourceType>) {
    if file.kind != FileKind::Outcome {
        return;
    }
    let mut segments = file.url.path_segments().into_iter().flatten().rev();
    let token = |text: &str, out: &mut Vec<ResourceType>| {
        let tokens = text.split(|letter: char| !letter.is_ascii_alphanumeric());
        out.extend(tokens.filter_map(|token| names.get(token.as_bytes())).filter(|name| is_exported(name)).cloned());
    };
    token(segments.next().unwrap_or_default(), out);
    for (_, value) in file.url.query_pairs() {
        token(&value, out);
    }
    if out.is_empty() {
        let folder = segments.next().filter(|folder| !COMPARTMENTS.contains(folder));
        out.extend(folder.and_then(|folder| names.get(folder.as_bytes())).cloned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::ManifestEntryId;
    use fhir_arrow::tape::{Tape, parse_value};

    fn file(kind: FileKind, url: &str, declared: Option<&str>) -> ExportFile {
        ExportFile {
            index: 0,
            export: 0,
            name: "e".into(),
            url: url::Url::parse(url).unwrap(),
            location: None,
            kind,
            declared: declared.map(Into::into),
            count: None,
            requires_access_token: false,
            replayed: false,
            place: ManifestEntryId { page: 0, kind, at: 0 },
        }
    }

    fn read(json: &str, file: &ExportFile, ignored: &[&str]) -> (u64, Vec<String>) {
        let (mut tape, bytes) = (Tape::default(), json.as_bytes());
        let root = parse_value(&mut tape, bytes, 0, bytes.len()).unwrap();
        let document = tape.over(bytes);
        let ignored: Vec<String> = ignored.iter().map(|code| (*code).to_owned()).collect();
        let issues = issues_of(&Names::new(), document.value(root), file, &ignored);
        let concerns = issues.concerns.iter().map(|(name, _)| name.as_deref().unwrap_or("all").to_owned());
        (issues.errors, concerns.collect())
    }

    fn outcome(issue: &str) -> String {
        format!(r#"{{"resourceType":"OperationOutcome","issue":[{issue}]}}"#)
    }

    // Breaks if an error holds less than what it concerns, or holds other types where it names one.
    #[test]
    fn an_error_concerns_the_types_that_it_names_or_all() {
        let plain = file(FileKind::Outcome, "https://h/errors/1.ndjson", Some("OperationOutcome"));
        for (words, types) in [
            ("Failed to export 2.Condition.ndjson", "Condition"),
            ("Failed to export Patient", "Patient"),
            ("could not write MedicationRequest_001.ndjson: disk", "MedicationRequest"),
            ("Observation and Encounter are not complete", "Encounter,Observation"),
            ("Patient and Condition are not complete", "Condition,Patient"),
            ("Patient export failed", "all"),
            ("Location header missing", "all"),
            ("failed: Location.ndjson", "Location"),
            ("type 'List' is not available", "List"),
            ("Patient/7 could not be exported", "all"),
            ("Patient 7 could not be exported", "all"),
            ("Unable to read Group/9", "all"),
            ("Observation/8 of Patient/7 could not be read", "Observation"),
            ("the patient's conditions failed", "all"),
            ("OperationOutcome Bundle Parameters", "all"),
            ("", "all"),
        ] {
            let issue = format!(r#"{{"severity":"error","code":"exception","diagnostics":"{words}"}}"#);
            assert_eq!(read(&outcome(&issue), &plain, &[]).1.join(","), types, "{words}");
        }
        for issue in [
            r#"{"severity":"fatal","details":{"text":"no Claim today"}}"#,
            r#"{"severity":"FATAL","expression":["Claim.item"]}"#,
            r#"{"severity":"error","location":["Claim"]}"#,
            r#"{"severity":"error","details":{"coding":[{"display":"Claim failed"}]}}"#,
        ] {
            assert_eq!(read(&outcome(issue), &plain, &[]).1, ["Claim"], "{issue}");
        }
        let bare = outcome(r#"{"severity":"error","code":"exception"}"#);
        for (url, types) in [
            ("https://h/e/2.Condition.ndjson", "Condition"),
            ("https://h/e?file=2.Condition.ndjson&x=1", "Condition"),
            ("https://h/job/Condition/errors.ndjson", "Condition"),
            ("https://h/Patient/errors.ndjson", "all"),
            ("https://h/OperationOutcome.ndjson", "all"),
        ] {
            assert_eq!(read(&bare, &file(FileKind::Outcome, url, None), &[]).1.join(","), types, "{url}");
        }
        // In a file of rows it concerns these, whatever else it names.
        let rows = file(FileKind::Output, "https://h/1", Some("Patient"));
        assert_eq!(read(&bare, &rows, &[]).1, ["Patient"]);
    }

    // Breaks if a warning holds a watermark, or a severity that nobody knows is taken for harmless.
    #[test]
    fn severities_and_ignored_codes() {
        let plain = file(FileKind::Outcome, "https://h/1", None);
        for (issue, errors) in [
            (r#"{"severity":"warning","code":"exception"}"#, 0),
            (r#"{"severity":"information"}"#, 0),
            (r#"{"severity":"error"}"#, 1),
            (r#"{"code":"exception"}"#, 1),
            (r#"{"severity":"disaster"}"#, 1),
        ] {
            assert_eq!(read(&outcome(issue), &plain, &[]).0, errors, "{issue}");
        }
        let two = outcome(
            r#"{"severity":"error","code":"forbidden"},{"severity":"error","details":{"coding":[{"code":"4119"}]}}"#,
        );
        assert_eq!(read(&two, &plain, &["Forbidden"]), (2, vec!["all".to_owned()]));
        assert_eq!(read(&two, &plain, &["forbidden", "4119"]), (2, vec![]));
    }
}
