//! Values against the rows that Pathling itself wrote. Skipped, visibly, where that data is absent.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::array::{Array, AsArray};
use arrow::datatypes::{DataType, Decimal128Type, Int32Type, TimestampMicrosecondType};
use base64::Engine;
use fhir_arrow::tape::{Kind, Tape, Value, parse_value};
use fhir_arrow::{ColumnPruning, Encoder, Layout, LayoutOptions, PresentColumns};
use foundation::instant::parse_instant;

use super::support::{shared, unpack};

/// A value of a row, as both sides can be brought to.
#[derive(Debug, Clone, PartialEq)]
enum Cell {
    Flag(bool),
    /// Digits without zeros at either end and the power of ten of the last.
    Number(String, i64),
    Text(String),
    /// Microseconds.
    Instant(i64),
    Struct(BTreeMap<String, Cell>),
    List(Vec<Option<Cell>>),
}

fn number(text: &str) -> Cell {
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let (integer, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{integer}{fraction}");
    let (sign, digits) = digits.strip_prefix('-').map_or(("", &digits[..]), |rest| ("-", rest));
    let kept = digits.trim_end_matches('0');
    let exponent = exponent.parse::<i64>().unwrap() - fraction.len() as i64 + (digits.len() - kept.len()) as i64;
    let kept = kept.trim_start_matches('0');
    if kept.is_empty() { Cell::Number("0".into(), 0) } else { Cell::Number(format!("{sign}{kept}"), exponent) }
}

/// Golden JSON, numbers to the last digit.
fn golden(value: Value<'_>) -> Option<Cell> {
    Some(match value.kind() {
        Kind::Null => return None,
        Kind::True | Kind::False => Cell::Flag(value.as_bool().unwrap()),
        Kind::Number => number(std::str::from_utf8(value.number_text().unwrap()).unwrap()),
        Kind::String | Kind::Unescaped => Cell::Text(value.as_str().unwrap().to_owned()),
        Kind::Array => Cell::List(value.items().map(golden).collect()),
        Kind::Object => {
            let entries = value.entries();
            Cell::Struct(
                entries
                    .filter_map(|(name, value)| Some((String::from_utf8(name.to_vec()).unwrap(), golden(value)?)))
                    .collect(),
            )
        }
    })
}

/// A slot of an array of ours.
fn ours(array: &dyn Array, slot: usize) -> Option<Cell> {
    if array.is_null(slot) {
        return None;
    }
    Some(match array.data_type() {
        DataType::Boolean => Cell::Flag(array.as_boolean().value(slot)),
        DataType::Int32 => number(&array.as_primitive::<Int32Type>().value(slot).to_string()),
        DataType::Decimal128(_, scale) => {
            number(&format!("{}e{}", array.as_primitive::<Decimal128Type>().value(slot), -scale))
        }
        DataType::Timestamp(_, _) => Cell::Instant(array.as_primitive::<TimestampMicrosecondType>().value(slot)),
        DataType::Utf8 => Cell::Text(array.as_string::<i32>().value(slot).to_owned()),
        DataType::Binary => {
            Cell::Text(base64::engine::general_purpose::STANDARD.encode(array.as_binary::<i32>().value(slot)))
        }
        DataType::Struct(fields) => {
            let fields = fields.iter().zip(array.as_struct().columns());
            Cell::Struct(
                fields.filter_map(|(field, column)| Some((field.name().clone(), ours(column, slot)?))).collect(),
            )
        }
        DataType::List(_) => {
            let items = array.as_list::<i32>().value(slot);
            Cell::List((0..items.len()).map(|item| ours(&items, item)).collect())
        }
        DataType::Map(_, _) => {
            let entries = array.as_map().value(slot);
            let keys = entries.column(0).as_primitive::<Int32Type>();
            Cell::Struct(
                (0..entries.len())
                    .filter_map(|at| Some((keys.value(at).to_string(), ours(entries.column(1), at)?)))
                    .collect(),
            )
        }
        other => panic!("no column of ours has type {other}"),
    })
}

/// Where we differ on purpose: which rule, and why.
const DIFFERENCES: [(&str, &str); 6] = [
    (
        "canonical",
        "the UCUM library was stubbed when the rows were written; ours are tested against it (schema/ucum.rs)",
    ),
    ("scale", "the true scale is kept; the golden rows cap it at 6"),
    ("div", "a narrative is kept as it came; HAPI writes its XHTML anew"),
    (
        "subclass",
        "HAPI's class of the value is a subclass of another choice's, so both columns fill; ours fills the one that \
            the resource has",
    ),
    (
        "orphan",
        "extensions of primitives and of contained resources are under keys that nothing refers to; ours are counted \
            as lost",
    ),
    ("resourceType", "HAPI takes ExampleScenario.instance.resourceType for the type of a resource and drops it"),
];

#[derive(Default)]
struct Comparison {
    /// Golden `_fid` to ours, within a row.
    fids: HashMap<String, String>,
    used: BTreeMap<&'static str, usize>,
    unexplained: Vec<String>,
}

impl Comparison {
    fn explained(&mut self, rule: &'static str) {
        assert!(DIFFERENCES.iter().any(|(name, _)| *name == rule));
        *self.used.entry(rule).or_default() += 1;
    }

    fn wrong(&mut self, path: &str, what: &str) {
        self.unexplained.push(format!("{path}: {what}"));
    }

    fn rows(&mut self, path: &str, ours: &BTreeMap<String, Cell>, golden: &BTreeMap<String, Cell>) {
        self.fids.clear();
        let without = |row: &BTreeMap<String, Cell>| {
            let mut row = row.clone();
            let extensions = match row.remove("_extension") {
                Some(Cell::Struct(entries)) => entries,
                _ => BTreeMap::new(),
            };
            (row, extensions)
        };
        let ((ours, mut our_extensions), (golden, mut golden_extensions)) = (without(ours), without(golden));
        self.structs(path, &ours, &golden);
        // Extensions of extensions have keys that are only known once their parents were compared.
        while let Some(key) = golden_extensions.keys().find(|key| self.fids.contains_key(*key)).cloned() {
            let theirs = golden_extensions.remove(&key).unwrap();
            let path = format!("{path}._extension");
            match our_extensions.remove(&self.fids[&key]) {
                Some(found) => self.cells(&path, "_extension", Some(&found), Some(&theirs)),
                None => self.wrong(&path, "an element has lost its extensions"),
            }
        }
        if !golden_extensions.is_empty() {
            self.explained("orphan");
        }
        if !our_extensions.is_empty() {
            self.wrong(path, "extensions under a key that nothing refers to");
        }
    }

    fn structs(&mut self, path: &str, ours: &BTreeMap<String, Cell>, golden: &BTreeMap<String, Cell>) {
        for name in ours.keys().chain(golden.keys().filter(|name| !ours.contains_key(*name))) {
            let at = format!("{path}.{name}");
            if let (None, Some(theirs)) = (ours.get(name), golden.get(name))
                && is_subclass_twin(name, theirs, ours)
            {
                self.explained("subclass");
                continue;
            }
            self.cells(&at, name, ours.get(name), golden.get(name));
        }
    }

    fn cells(&mut self, path: &str, name: &str, ours: Option<&Cell>, golden: Option<&Cell>) {
        match (ours, golden) {
            (None, None) => {}
            (Some(_), None) if matches!(name, "_value_canonicalized" | "_code_canonicalized") => {
                self.explained("canonical")
            }
            (Some(_), None) if path == "ExampleScenario.instance.resourceType" => self.explained("resourceType"),
            (Some(Cell::Number(ours, 0)), Some(Cell::Number(golden, 0))) if name == "_fid" => {
                if let Some(before) = self.fids.insert(golden.clone(), ours.clone())
                    && before != *ours
                {
                    self.wrong(path, "one _fid stands for two elements");
                }
            }
            (Some(Cell::Number(a, x)), Some(Cell::Number(b, y))) if name == "_fid" => {
                // A `_fid` that ends in zeros.
                let whole = |digits: &str, zeros: i64| format!("{digits}{}", "0".repeat(zeros as usize));
                self.fids.insert(whole(b, *y), whole(a, *x));
            }
            (Some(ours), Some(golden)) if name.ends_with("_scale") && ours != golden => {
                let capped = |cell: &Cell| {
                    matches!(cell, Cell::Number(digits, 0) if digits.parse::<i64>().is_ok_and(|scale| scale > 6))
                        || matches!(cell, Cell::Number(_, 1..))
                };
                if capped(ours) && *golden == number("6") {
                    self.explained("scale");
                } else {
                    self.wrong(path, &format!("scale {ours:?}, golden {golden:?}"));
                }
            }
            (Some(Cell::Text(_)), Some(Cell::Text(_))) if path.ends_with("text.div") && ours != golden => {
                self.explained("div")
            }
            (Some(Cell::Instant(micros)), Some(Cell::Text(text))) => match parse_instant(text.as_bytes()) {
                Some(theirs) if theirs == *micros => {}
                _ => self.wrong(path, &format!("{micros} µs, golden {text}")),
            },
            (Some(Cell::Struct(ours)), Some(Cell::Struct(golden))) => self.structs(path, ours, golden),
            (Some(Cell::List(ours)), Some(Cell::List(golden))) if ours.len() == golden.len() => {
                for (ours, golden) in ours.iter().zip(golden) {
                    self.cells(path, name, ours.as_ref(), golden.as_ref());
                }
            }
            (ours, golden) if ours == golden => {}
            (ours, golden) => {
                let shown = |cell: Option<&Cell>| format!("{cell:?}").chars().take(160).collect::<String>();
                self.wrong(path, &format!("{}, golden {}", shown(ours), shown(golden)));
            }
        }
    }
}

/// Choices of which HAPI's class of one is a subclass of the other's.
const SUBCLASSES: [(&str, &[&str]); 3] = [
    ("String", &["Code", "Markdown", "Id"]),
    ("Uri", &["Canonical", "Url", "Oid", "Uuid"]),
    ("Integer", &["PositiveInt", "UnsignedInt"]),
];

/// Whether `name` is a choice that fills because a subclass's choice holds the same.
fn is_subclass_twin(name: &str, value: &Cell, ours: &BTreeMap<String, Cell>) -> bool {
    SUBCLASSES.iter().any(|(class, subclasses)| {
        let Some(choice) = name.strip_suffix(class) else { return false };
        subclasses.iter().any(|subclass| ours.get(&format!("{choice}{subclass}")) == Some(value))
    })
}

// Breaks if any value of the 1,891 golden rows comes out other than Pathling's, but for the list above; and if an
// entry of that list has become needless.
#[test]
fn rows_are_pathlings() {
    let Some(shared) = shared() else { return };
    let folder = unpack(&shared.join("golden/pathling-rows.tar.gz"));
    let mut comparison = Comparison::default();
    let mut rows = 0;
    let mut files: Vec<_> =
        std::fs::read_dir(folder.path().join("in")).unwrap().flatten().map(|entry| entry.path()).collect();
    files.sort();
    for file in files {
        let stem = file.file_stem().unwrap().to_str().unwrap().to_owned();
        let (_, resource_type) = stem.split_once('.').unwrap();
        let layout = Arc::new(Layout::pathling(resource_type, &LayoutOptions::default()).unwrap());
        let mut encoder = Encoder::new(layout);
        let text = std::fs::read(&file).unwrap();
        let mut tape = Tape::default();
        let lines = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        let roots: Vec<(usize, &[u8])> = lines
            .map(|line| {
                let start = line.as_ptr() as usize - text.as_ptr() as usize;
                (parse_value(&mut tape, &text, start, start + line.len()).unwrap(), line)
            })
            .collect();
        let document = tape.over(&text);
        for (root, line) in &roots {
            encoder.push(document.value(*root), line);
        }
        let batch = arrow::array::StructArray::from(
            encoder.finish(&mut PresentColumns::default(), ColumnPruning::default()).unwrap().batch,
        );
        let expected = std::fs::read(folder.path().join(format!("out/{stem}.jsonl"))).unwrap();
        let expected: Vec<&[u8]> = expected.split(|b| *b == b'\n').filter(|line| !line.is_empty()).collect();
        assert_eq!(batch.len(), expected.len(), "{stem}");
        for (slot, line) in expected.into_iter().enumerate() {
            let mut tape = Tape::default();
            let root = parse_value(&mut tape, line, 0, line.len()).unwrap();
            let (Some(Cell::Struct(ours)), Some(Cell::Struct(golden))) =
                (ours(&batch, slot), golden(tape.over(line).value(root)))
            else {
                panic!("{stem}: a row is no object")
            };
            comparison.rows(resource_type, &ours, &golden);
            rows += 1;
        }
    }
    let wrong = &comparison.unexplained;
    assert!(
        wrong.is_empty(),
        "{} differences without a reason:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(40)].join("\n")
    );
    assert_eq!(rows, 1_891);
    assert_eq!(comparison.used.get("orphan"), Some(&8));
    for (rule, _) in DIFFERENCES {
        assert!(comparison.used.contains_key(rule), "{rule} explains nothing any more: {:?}", comparison.used);
    }
}
