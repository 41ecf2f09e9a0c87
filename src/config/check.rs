//! Everything that is wrong with a pipeline file, at once and each with its place. Pure: no I/O.

use serde_json::Value;

use super::file::{PipelineFile, pipeline_json_schema};
use super::profiles;
use super::schedule::SchedulePlan;
use super::tree::{Place, Tree, check};
use crate::error::{Error, ErrorKind};
use crate::stages::Section;
use crate::stages::merge::Mode;
use crate::values::{Findings, is_of_server};

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line and column, from 1; (0, 0) for `--set`.
    pub place: Place,
    /// Dotted path of the key.
    pub path: String,
    /// Problem.
    pub what: String,
    /// Hint.
    pub hint: Option<String>,
    /// True if it is no fault of the file: a secret's file or vault cannot be read now.
    pub passing: bool,
}

/// A pipeline file that was read.
#[derive(Debug, Clone)]
pub struct Read {
    /// The file.
    pub file: PipelineFile,
    tree: Tree,
}

impl Read {
    /// A problem at the place of `path`.
    pub fn problem(&self, path: &str, what: impl Into<String>, hint: Option<&str>) -> Problem {
        problem(&self.tree, path, what, hint)
    }
}

fn problem(tree: &Tree, path: &str, what: impl Into<String>, hint: Option<&str>) -> Problem {
    let place = tree.place_of(path).unwrap_or((1, 1));
    Problem { place, path: path.to_owned(), what: what.into(), hint: hint.map(str::to_owned), passing: false }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.place {
            (0, _) => write!(f, "--set: ")?,
            (line, column) => write!(f, "{line}:{column}: ")?,
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.what)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

impl Problem {
    /// All problems of `file` as one error.
    pub fn error(name: &str, problems: &[Problem]) -> Error {
        let lines: Vec<String> = problems.iter().map(|problem| format!("  {name}:{problem}")).collect();
        let what = if problems.len() == 1 { "one problem" } else { "several problems" };
        // What is only not there now may be there soon.
        let kind = if problems.iter().all(|problem| problem.passing) { ErrorKind::Storage } else { ErrorKind::Config };
        Error::new(kind, format!("{what} in the pipeline file:\n{}", lines.join("\n")))
    }
}

/// Reads a pipeline file; `sets` are `--set` options, `key=value` with the value as YAML.
pub fn read_pipeline(text: &str, sets: &[String]) -> Result<Read, Vec<Problem>> {
    let whole =
        |what: String, place: Place| vec![Problem { place, path: String::new(), what, hint: None, passing: false }];
    let parsed: Result<Tree, _> = serde_saphyr::from_str(text);
    let mut tree = parsed.map_err(|error| {
        let place = error.location().map_or((1, 1), |at| (at.line(), at.column()));
        // The parser's own text shows the source around the place; one line of it is enough beside ours.
        let text = error.without_snippet().to_string();
        let what = text.lines().next().unwrap_or_default();
        whole(format!("not YAML: {what}"), place)
    })?;
    if matches!(tree, Tree::Scalar(Value::Null)) {
        return Err(whole("the file is empty".into(), (1, 1)));
    }
    for set in sets {
        // The key alone: the value may be a secret.
        let key = set.split(['=', ':']).next().unwrap_or_default().trim();
        let wrong = |what: String| whole(format!("`{key}`: {what}"), (0, 0));
        let (key, value) = set.split_once('=').ok_or_else(|| wrong("not key=value".into()))?;
        let value: Tree = serde_saphyr::from_str(value).map_err(|_| wrong("the value is not YAML".into()))?;
        tree.set(key.trim(), (0, 0), value).map_err(wrong)?;
    }
    profiles::apply(&mut tree);
    let mut problems = check(&tree, &pipeline_json_schema());
    let file = match serde_json::from_value::<PipelineFile>(tree.to_json()) {
        Ok(file) => file,
        Err(_) if !problems.is_empty() => {
            if let Ok(file) = serde_json::from_value::<PipelineFile>(mended(&tree, &problems)) {
                let known = problems.len();
                meaning(&file, &tree, &mut problems);
                let (schema, mut rest) = {
                    let rest = problems.split_off(known);
                    (problems, rest)
                };
                // What stands in for a wrong value has no problems of its own.
                rest.retain(|problem| !schema.iter().any(|known| problem.path.starts_with(&known.path)));
                problems = schema;
                problems.extend(rest);
            }
            problems.sort_by_key(|problem| problem.place);
            return Err(problems);
        }
        // The schema comes from the same structs, so this says that they disagree.
        Err(error) => return Err(whole(error.to_string(), (1, 1))),
    };
    meaning(&file, &tree, &mut problems);
    if problems.is_empty() {
        return Ok(Read { file, tree });
    }
    problems.sort_by_key(|problem| problem.place);
    Err(problems)
}

/// The file without the values that have problems, and with something harmless where one is required: so that
/// one wrong key does not hide what is wrong with the others.
fn mended(tree: &Tree, problems: &[Problem]) -> Value {
    let mut json = tree.to_json();
    for problem in problems {
        let (parent, key) = problem.path.rsplit_once('.').unwrap_or(("", &problem.path));
        let pointer = if parent.is_empty() { String::new() } else { format!("/{}", parent.replace('.', "/")) };
        match json.pointer_mut(&pointer) {
            Some(Value::Object(members)) => drop(members.remove(key)),
            // Items keep their places, which the other problems' paths count on.
            Some(Value::Array(items)) => {
                if let Some(item) = key.parse::<usize>().ok().and_then(|at| items.get_mut(at)) {
                    *item = Value::from(key);
                }
            }
            _ => {}
        }
    }
    if let Value::Object(members) = &mut json {
        members.entry("version").or_insert(1.into());
        members.entry("name").or_insert("x".into());
        members.entry("tables").or_insert("x".into());
        if let Value::Object(source) = members.entry("source").or_insert(Value::Object(serde_json::Map::new())) {
            source.entry("url").or_insert("https://host.example/fhir".into());
        }
    }
    json
}

/// Checks what the schema cannot say: each section checks itself; here is what only makes sense together.
fn meaning(file: &PipelineFile, tree: &Tree, problems: &mut Vec<Problem>) {
    let mut found = Findings::default();
    let source = &file.source;
    found.below("source", |found| source.check(found));
    found.below("stages", |found| file.stages.check(file.memory.0, found));
    for (index, schedule) in file.schedule.iter().enumerate() {
        for (key, what) in SchedulePlan::read(schedule).err().into_iter().flatten() {
            let hint = "minute, hour, day of month, month, day of week: \"15 * * * *\", \"0 3 * * SUN\"";
            found.add(format!("schedule.{index}.{key}"), what, Some(hint).filter(|_| key == "cron"));
        }
    }
    let narrowing = source.export.narrowing();
    if file.stages.merge.mode != Mode::Merge && !narrowing.is_empty() {
        let keys = narrowing.iter().map(|key| format!("source.{key}")).collect::<Vec<_>>().join(", ");
        let what = format!("deletes what the export does not name, but {keys} asks the server for a part only");
        found.add("stages.merge.mode", what, Some("remove that from source, or set stages.merge.mode: merge"));
    }
    let is_folder = url::Url::parse(&source.url.0).is_ok_and(|url| !is_of_server(&url));
    let what = "a folder has no server to fetch attachments from";
    found.add_if(file.stages.attachments.is_some() && is_folder, "stages.attachments", what, None);
    found.add_if(file.health.max_age.0.is_zero(), "health.max_age", "max_age must not be zero", None);
    let hint = "a slow store must not cost the lease";
    found.add_if(file.lock_expiry.0 < std::time::Duration::from_secs(5), "lock_expiry", "less than 5s", Some(hint));
    found.add_if(file.memory.0 < 64 << 20, "memory", "less than 64MiB", Some("edges and open batches need some room"));
    for (path, text) in [("tables", Some(&file.tables)), ("state", file.state.as_ref())] {
        found.add_if(text.is_some_and(|text| text.0.trim().is_empty()), path, "must not be empty", None);
    }
    let is_path = file.name.contains(['/', '\\', '\0']) || file.name.starts_with('.');
    found.add_if(is_path, "name", "a name with slashes, or beginning with a dot", Some("it names a folder"));
    let found = found.into_list().into_iter();
    problems.extend(found.map(|finding| problem(tree, &finding.path, finding.what, finding.hint)));
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "version: 1\nname: x\nsource:\n  url: https://h.example/fhir\ntables: /tmp/t\n";

    #[test]
    fn a_minimal_file() {
        let read = read_pipeline(MINIMAL, &[]).unwrap();
        assert_eq!(read.file.stages.download.concurrency, 10);
        assert_eq!(read.file.memory.0, 512 << 20);
    }

    // Breaks if a problem hides another, or loses its place or hint.
    #[test]
    fn every_problem_at_once_with_line_column_and_hint() {
        let text = "version: 2\nname: x\nsource:\n  url: nonsense\n  level: grup\n  types: [Patient, \
            Pateint]\nstages:\n  download: { concurency: 3 }\n  parse: { max_line: 64 }\nmemry: 1GiB\n";
        let problems = read_pipeline(text, &[]).unwrap_err();
        let shown: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let expected = [
            "1:1: tables: required and missing",
            "1:10: version: must be 1",
            "4:3: source.url: not a URL",
            "5:10: source.level: must be one of: system, patient, group (did you mean `group`?)",
            "6:20: source.types.1: not a resource type of FHIR R4 (did you mean `Patient`?)",
            "8:15: stages.download.concurency: unknown key (did you mean `concurrency`?)",
            "9:22: stages.parse.max_line: expected a number with its unit, such as 512MiB, found a number",
            "10:1: memry: unknown key (did you mean `memory`?)",
        ];
        for line in expected {
            assert!(shown.iter().any(|problem| problem.starts_with(line)), "{line}\nin {shown:#?}");
        }
        assert_eq!(shown.len(), expected.len(), "{shown:#?}");
    }

    #[test]
    fn what_only_makes_sense_together() {
        let text = "version: 1\nname: x\nsource:\n  url: https://h.example/fhir\n  level: group\n  auth: \
            { client_id: a }\ntables: t\n";
        let problems = read_pipeline(text, &[]).unwrap_err();
        assert_eq!(problems.len(), 2);
        assert_eq!((problems[0].place.0, problems[1].place.0), (5, 6));
    }

    // Breaks if a server is asked for the group `${env:GROUP}`.
    #[test]
    fn a_reference_where_none_is_read_is_a_problem() {
        let text = MINIMAL.replace("source:", "source:\n  level: group\n  group: \"${env:GROUP}\"");
        let problems = read_pipeline(&text, &[]).unwrap_err();
        let shown: Vec<String> = problems.iter().map(ToString::to_string).collect();
        assert!(
            shown.len() == 1 && shown[0].starts_with("5:10: source.group: a reference") && shown[0].contains("--set"),
            "{shown:?}"
        );
    }

    #[test]
    fn set_overrides_and_is_checked() {
        let read =
            read_pipeline(MINIMAL, &["stages.download.concurrency=3".into(), "source.types=[Patient]".into()]).unwrap();
        assert_eq!(read.file.stages.download.concurrency, 3);
        assert_eq!(read.file.source.types.names(), ["Patient"]);
        let problems = read_pipeline(MINIMAL, &["stages.downlod.concurrency=3".into()]).unwrap_err();
        assert!(problems[0].to_string().starts_with("--set: stages.downlod: unknown key"), "{}", problems[0]);
    }

    #[test]
    fn text_that_is_no_yaml_has_a_place() {
        let problems = read_pipeline("version: 1\nname: [x\n", &[]).unwrap_err();
        assert!(problems[0].place.0 >= 2, "{:?}", problems[0]);
    }
}
