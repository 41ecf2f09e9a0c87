//! Size of a resource's lists as columns.
//!
//! A column that one item of a list fills has a place for every other item of that list, filled or not. A line of nine
//! megabytes, one item with all that FHIR allows and three million empty ones, would take six gigabytes.

use std::collections::HashMap;

use super::{Kind, Value};

/// Bytes that a place in a column takes, about: its value and its validity.
const PLACE: usize = 6;

/// Bytes of a level of a column while its pages are written. Where a list is empty there is one all the same, of each
/// column within it.
const LEVEL: usize = 6;

/// Names that are told apart: more than FHIR has.
const MAX_NAMES: usize = 20_000;

/// An element, by its path.
#[derive(Default)]
struct Element<'a> {
    /// Items, where it repeats.
    items: usize,
    members: HashMap<&'a [u8], usize>,
}

struct Expansion<'a> {
    elements: Vec<Element<'a>>,
}

/// The resource itself, and the extensions, which are in one list wherever they stand.
const ROOT: usize = 0;
const EXTENSIONS: usize = 1;

/// Returns the most that [`expanded_size`] can give for a value of so many nodes: half of them items, half of them
/// names.
pub fn expanded_size_limit(nodes: usize) -> usize {
    (nodes / 2).saturating_mul(nodes.div_ceil(2)).saturating_mul(PLACE + LEVEL)
}

/// Bytes that the lists of `resource` take as columns, about.
pub fn expanded_size(resource: Value<'_>) -> usize {
    let mut expansion = Expansion { elements: vec![Element::default(), Element::default()] };
    expansion.walk(resource, ROOT);
    let extensions = expansion.elements[EXTENSIONS].items;
    expansion.bytes(ROOT, 1, 1).saturating_add(expansion.bytes(EXTENSIONS, extensions, extensions + 1))
}

impl<'a> Expansion<'a> {
    fn walk(&mut self, value: Value<'a>, element: usize) {
        match value.kind() {
            Kind::Object => {
                for (name, value) in value.entries() {
                    if element == ROOT && name == b"contained" {
                        // There are no columns for them.
                        continue;
                    }
                    let member = self.member(element, name);
                    self.walk(value, member);
                }
            }
            Kind::Array => {
                for item in value.items() {
                    self.elements[element].items += 1;
                    self.walk(item, element);
                }
            }
            _ => {}
        }
    }

    fn member(&mut self, element: usize, name: &'a [u8]) -> usize {
        if name == b"extension" {
            return EXTENSIONS;
        }
        if let Some(member) = self.elements[element].members.get(name) {
            return *member;
        }
        let member = self.elements.len();
        if member >= MAX_NAMES {
            // No columns are made for names that FHIR does not have.
            return element;
        }
        self.elements.push(Element::default());
        self.elements[element].members.insert(name, member);
        member
    }

    /// Bytes of what is within an element that has so many places, and levels.
    fn bytes(&self, element: usize, places: usize, levels: usize) -> usize {
        let of_member = |member: &usize| {
            let within = &self.elements[*member];
            let (places, levels) = match within.items {
                0 => (places, levels),
                items => (items, levels + items),
            };
            match within.members.is_empty() {
                true => places.saturating_mul(PLACE).saturating_add(levels.saturating_mul(LEVEL)),
                false => self.bytes(*member, places, levels),
            }
        };
        self.elements[element].members.values().map(of_member).fold(0, usize::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::{Tape, parse_value};

    fn of(json: &str) -> usize {
        let mut tape = Tape::default();
        let root = parse_value(&mut tape, json.as_bytes(), 0, json.len()).unwrap();
        expanded_size(tape.over(json.as_bytes()).value(root))
    }

    // Breaks if empty items are free, or if what is not within a list is counted by it.
    #[test]
    fn every_column_of_a_list_has_a_place_for_each_item() {
        let bytes = |places: usize, levels: usize| places * PLACE + levels * LEVEL;
        assert_eq!(of(r#"{"id":"1","gender":"male"}"#), bytes(2, 2));
        assert_eq!(of(r#"{"id":"1","item":[{"a":1,"b":{"c":2,"d":3}}]}"#), bytes(1 + 3, 1 + 3 * 2));
        let many = format!(r#"{{"id":"1","item":[{{"a":1,"b":{{"c":2,"d":3}}}}{}]}}"#, ",{}".repeat(999));
        assert_eq!(of(&many), bytes(1 + 3 * 1000, 1 + 3 * 1001));
        // A list within a list has the items of all of them, and a level where there is none.
        assert_eq!(of(r#"{"item":[{"in":[{"a":1},{}]},{"in":[{"a":1}]},{}]}"#), bytes(3, 1 + 3 + 3));
        // Extensions are in one list, wherever they stand; what has nothing else is taken for a value.
        let extensions = r#"{"extension":[{"url":"u","valueCode":"c"}],"name":[{"extension":[{"url":"v"}]}]}"#;
        assert_eq!(of(extensions), bytes(2 * 2 + 1, 2 * 3 + 2));
    }
}
