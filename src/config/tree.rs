//! The pipeline file as a tree that knows where each part stands, checked against the file's JSON Schema so
//! that every problem is found at once.

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use serde_saphyr::Spanned;

use super::check::Problem;
use crate::values::check_format;

/// A place in the file: line and column, from 1; (0, 0) is no place (`--set`).
pub(super) type Place = (u64, u64);

/// A part of the file.
#[derive(Debug, Clone)]
pub(super) enum Tree {
    Scalar(Value),
    List(Vec<(Place, Tree)>),
    /// Key, the key's place, the value's place, the value.
    Map(Vec<(String, Place, Place, Tree)>),
}

fn place<T>(spanned: &Spanned<T>) -> Place {
    (spanned.referenced.line(), spanned.referenced.column())
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TreeVisitor;
        impl<'de> Visitor<'de> for TreeVisitor {
            type Value = Tree;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("YAML")
            }
            fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
                Ok(Tree::Scalar(value.into()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
                Ok(Tree::Scalar(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
                Ok(Tree::Scalar(value.into()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
                Ok(Tree::Scalar(value.into()))
            }
            fn visit_str<E>(self, value: &str) -> Result<Tree, E> {
                Ok(Tree::Scalar(value.into()))
            }
            fn visit_unit<E>(self) -> Result<Tree, E> {
                Ok(Tree::Scalar(Value::Null))
            }
            fn visit_none<E>(self) -> Result<Tree, E> {
                Ok(Tree::Scalar(Value::Null))
            }
            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Tree, D::Error> {
                Tree::deserialize(deserializer)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Tree, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element::<Spanned<Tree>>()? {
                    items.push((place(&item), item.value));
                }
                Ok(Tree::List(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
                let mut members = Vec::new();
                while let Some(key) = map.next_key::<Spanned<String>>()? {
                    let value = map.next_value::<Spanned<Tree>>()?;
                    members.push((key.value.clone(), place(&key), place(&value), value.value));
                }
                Ok(Tree::Map(members))
            }
        }
        deserializer.deserialize_any(TreeVisitor)
    }
}

impl Tree {
    /// The tree as JSON.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Tree::Scalar(value) => value.clone(),
            Tree::List(items) => items.iter().map(|(_, item)| item.to_json()).collect(),
            Tree::Map(members) => {
                let members = members.iter().map(|(key, _, _, value)| (key.clone(), value.to_json()));
                Value::Object(members.collect::<Map<_, _>>())
            }
        }
    }

    /// Returns the place of the part at a dotted path; the nearest part around it where it is absent.
    pub(crate) fn place_of(&self, path: &str) -> Option<Place> {
        let (mut at, mut found) = (self, None);
        for step in path.split('.').filter(|step| !step.is_empty()) {
            match at {
                Tree::Map(members) => {
                    let Some((_, key, _, value)) = members.iter().find(|member| member.0 == step) else { return found };
                    found = Some(*key);
                    at = value;
                }
                Tree::List(items) => {
                    let Some((place, item)) = step.parse::<usize>().ok().and_then(|index| items.get(index)) else {
                        return found;
                    };
                    found = Some(*place);
                    at = item;
                }
                Tree::Scalar(_) => return found,
            }
        }
        found
    }

    /// The value at a dotted path of keys.
    pub(crate) fn get(&self, path: &str) -> Option<&Tree> {
        path.split('.').try_fold(self, |at, step| match at {
            Tree::Map(members) => members.iter().find(|member| member.0 == step).map(|member| &member.3),
            _ => None,
        })
    }

    /// Sets the value at a dotted path. `place` is what a problem with it is shown at; line 0 is `--set`.
    pub(crate) fn set(&mut self, path: &str, place: Place, value: Tree) -> Result<(), String> {
        let (step, rest) = path.split_once('.').map_or((path, None), |(step, rest)| (step, Some(rest)));
        if step.is_empty() {
            return Err("a part of the key is empty".into());
        }
        if matches!(self, Tree::Scalar(Value::Null)) {
            *self = Tree::Map(Vec::new());
        }
        let Tree::Map(members) = self else { return Err(format!("`{step}` is below a value that has no keys")) };
        let at = match members.iter().position(|member| member.0 == step) {
            Some(at) => at,
            None => {
                members.push((step.to_owned(), place, place, Tree::Scalar(Value::Null)));
                members.len() - 1
            }
        };
        match rest {
            Some(rest) => members[at].3.set(rest, place, value),
            None => {
                members[at].3 = value;
                Ok(())
            }
        }
    }
}

/// Checks a tree against a schema of `schemars`; every problem.
pub(super) fn check(tree: &Tree, schema: &Value) -> Vec<Problem> {
    let mut checker = Checker { root: schema, problems: Vec::new() };
    checker.value(tree, (1, 1), "", schema);
    checker.problems
}

struct Checker<'a> {
    root: &'a Value,
    problems: Vec<Problem>,
}

fn kind(tree: &Tree) -> &'static str {
    match tree {
        Tree::Scalar(Value::Null) => "nothing",
        Tree::Scalar(Value::Bool(_)) => "true or false",
        Tree::Scalar(Value::Number(_)) => "a number",
        Tree::Scalar(_) => "a text",
        Tree::List(_) => "a list",
        Tree::Map(_) => "keys with values",
    }
}

impl<'a> Checker<'a> {
    fn problem(&mut self, place: Place, path: &str, what: String, hint: Option<String>) {
        self.problems.push(Problem { place, path: path.to_owned(), what, hint, passing: false });
    }

    fn resolved(&self, schema: &'a Value) -> &'a Value {
        match schema.get("$ref").and_then(Value::as_str).and_then(|reference| reference.strip_prefix('#')) {
            Some(pointer) => self.root.pointer(pointer).unwrap_or(schema),
            None => schema,
        }
    }

    fn value(&mut self, tree: &Tree, place: Place, path: &str, schema: &'a Value) {
        let schema = self.resolved(schema);
        if let Some(options) = schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Value::as_array) {
            let named: Vec<&str> =
                options.iter().filter_map(|option| option.get("const").and_then(Value::as_str)).collect();
            if !named.is_empty() {
                return self.one_of(tree, place, path, &named);
            }
            return self.any_of(tree, place, path, options);
        }
        if let Some(names) = schema.get("enum").and_then(Value::as_array) {
            let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
            return self.one_of(tree, place, path, &names);
        }
        let types: Vec<&str> = match schema.get("type") {
            Some(Value::String(name)) => vec![name.as_str()],
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        let fits = types.is_empty()
            || types.iter().any(|name| match (*name, tree) {
                ("null", Tree::Scalar(Value::Null))
                | ("boolean", Tree::Scalar(Value::Bool(_)))
                | ("string", Tree::Scalar(Value::String(_)))
                | ("number", Tree::Scalar(Value::Number(_)))
                | ("array", Tree::List(_))
                | ("object", Tree::Map(_)) => true,
                ("integer", Tree::Scalar(Value::Number(number))) => number.is_i64() || number.is_u64(),
                _ => false,
            });
        if !fits {
            return self.problem(place, path, mismatch(tree, schema, &types), None);
        }
        match tree {
            Tree::Map(members) => self.map(members, place, path, schema),
            Tree::List(items) => {
                if let Some(item_schema) = schema.get("items") {
                    for (index, (place, item)) in items.iter().enumerate() {
                        self.value(item, *place, &format!("{path}.{index}"), item_schema);
                    }
                }
            }
            Tree::Scalar(Value::String(text)) => self.text(text, place, path, schema),
            Tree::Scalar(Value::Number(number)) => {
                if let Some(range) = out_of_range(number.as_f64().unwrap_or(0.0), schema) {
                    self.problem(place, path, range, None);
                }
            }
            Tree::Scalar(_) => {}
        }
    }

    /// The option that fits, or the problems of the one that comes nearest.
    fn any_of(&mut self, tree: &Tree, place: Place, path: &str, options: &'a [Value]) {
        let is_null = |option: &&Value| option.get("type").and_then(Value::as_str) == Some("null");
        if matches!(tree, Tree::Scalar(Value::Null)) && options.iter().any(|option| is_null(&option)) {
            return;
        }
        let mut nearest: Option<Vec<Problem>> = None;
        for option in options.iter().filter(|option| !is_null(option)) {
            let mut checker = Checker { root: self.root, problems: Vec::new() };
            checker.value(tree, place, path, option);
            if checker.problems.is_empty() {
                return;
            }
            // An option of the value's own kind comes nearer than any other.
            let other_kind = |problems: &[Problem]| problems.iter().any(|problem| problem.what.starts_with("expected"));
            let weight = |problems: &[Problem]| (other_kind(problems), problems.len());
            if nearest.as_ref().is_none_or(|known| weight(&checker.problems) < weight(known)) {
                nearest = Some(checker.problems);
            }
        }
        self.problems.extend(nearest.unwrap_or_default());
    }

    fn text(&mut self, text: &str, place: Place, path: &str, schema: &Value) {
        if schema.get("minLength").and_then(Value::as_u64).is_some_and(|least| (text.chars().count() as u64) < least) {
            self.problem(place, path, "must not be empty".into(), None);
        }
        // It would be asked with as it stands.
        if schema.get("format").is_none() && text.contains("${") {
            let hint = "set it from outside with --set KEY=VALUE";
            self.problem(place, path, "a reference such as ${env:NAME} has no meaning here".into(), Some(hint.into()));
        }
        if let Some(problem) =
            schema.get("format").and_then(Value::as_str).and_then(|format| check_format(format, text))
        {
            let hint = (schema.get("format").and_then(Value::as_str) == Some(crate::values::RESOURCE_TYPE))
                .then(|| nearest(text, fhir_arrow::Model::r4().resource_types().iter().map(String::as_str)))
                .flatten();
            self.problem(place, path, problem, hint);
        }
        if schema.get("pattern").is_some()
            && !text.trim_end().strip_suffix('%').is_some_and(|n| n.parse::<f64>().is_ok_and(|n| n >= 0.0))
        {
            self.problem(place, path, "neither a number of lines nor a share such as 1%".into(), None);
        }
    }

    fn one_of(&mut self, tree: &Tree, place: Place, path: &str, names: &[&str]) {
        let text = match tree {
            Tree::Scalar(Value::String(text)) => text.as_str(),
            _ => "",
        };
        if !names.contains(&text) {
            let hint = nearest(text, names.iter().copied());
            self.problem(place, path, format!("must be one of: {}", names.join(", ")), hint);
        }
    }

    fn map(&mut self, members: &[(String, Place, Place, Tree)], place: Place, path: &str, schema: &'a Value) {
        let empty = Map::new();
        let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&empty);
        let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        for (index, (key, key_place, value_place, value)) in members.iter().enumerate() {
            if members[..index].iter().any(|earlier| earlier.0 == *key) {
                self.problem(*key_place, &below(key), "this key stands twice".into(), None);
            }
            // Looked up in the schema itself, which outlives this call.
            let named = schema.get("properties").and_then(|properties| properties.get(key));
            // Keys that are the file's own to choose have a schema together.
            match named.or_else(|| schema.get("additionalProperties").filter(|schema| schema.is_object())) {
                Some(property) => self.value(value, *value_place, &below(key), property),
                None => {
                    let hint = nearest(key, properties.keys().map(String::as_str));
                    let hint = hint.or_else(|| {
                        Some(format!("known here: {}", properties.keys().cloned().collect::<Vec<_>>().join(", ")))
                    });
                    self.problem(*key_place, &below(key), "unknown key".into(), hint);
                }
            }
        }
        for required in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
        {
            if !members.iter().any(|member| member.0 == required) {
                let hint =
                    properties.get(required).and_then(|property| property.get("description")).and_then(Value::as_str);
                self.problem(place, &below(required), "required and missing".into(), hint.map(str::to_owned));
            }
        }
    }
}

/// Returns the problem of a value of another type than the schema's.
fn mismatch(tree: &Tree, schema: &Value, types: &[&str]) -> String {
    let format = schema.get("format").and_then(Value::as_str).unwrap_or_default();
    if let Some(example) = crate::values::example_with_unit(format)
        && matches!(tree, Tree::Scalar(Value::Number(_)))
    {
        return format!("expected a number with its unit, such as {example}, found {}", kind(tree));
    }
    let expected = match types.first().copied() {
        Some("boolean") => "true or false",
        Some("integer") => "a whole number",
        Some("string") => "a text",
        Some("array") => "a list",
        Some("object") => "keys with values",
        _ => "another kind of value",
    };
    format!("expected {expected}, found {}", kind(tree))
}

/// Returns the problem of a number outside of the schema's range.
fn out_of_range(number: f64, schema: &Value) -> Option<String> {
    let limit = |key: &str| schema.get(key).and_then(Value::as_f64);
    let (least, most) = (limit("minimum"), limit("maximum"));
    let is_out = least.is_some_and(|least| number < least) || most.is_some_and(|most| number > most);
    is_out.then(|| match (least, most) {
        (Some(least), Some(most)) if least == most => format!("must be {least}"),
        (Some(least), Some(most)) => format!("must be from {least} to {most}"),
        (Some(least), None) => format!("must be at least {least}"),
        (_, most) => format!("must be at most {}", most.unwrap_or_default()),
    })
}

/// The name that was probably meant.
fn nearest<'a>(text: &str, names: impl Iterator<Item = &'a str>) -> Option<String> {
    let best = names.map(|name| (strsim::levenshtein(&text.to_lowercase(), &name.to_lowercase()), name)).min()?;
    (best.0 <= 1 + text.len() / 4).then(|| format!("did you mean `{}`?", best.1))
}
