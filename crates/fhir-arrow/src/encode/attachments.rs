//! Places of attachments in a resource.

use crate::model::{Definition, Element, Model};
use crate::tape::{Kind, Value};

/// Calls `each` for every Attachment of a resource, in the order in which they stand; those in extensions and contained
/// resources among them.
pub fn for_each_attachment<'a>(resource_type: &str, resource: Value<'a>, each: &mut impl FnMut(Value<'a>)) {
    walk(resource_type, resource, each);
}

fn walk<'a>(path: &str, value: Value<'a>, each: &mut impl FnMut(Value<'a>)) {
    if value.kind() == Kind::Array {
        value.items().for_each(|item| walk(path, item, each));
        return;
    }
    if value.kind() != Kind::Object {
        return;
    }
    match path {
        "Attachment" => return each(value),
        // A contained resource says itself what it is.
        "Resource" => {
            let name = value.get(b"resourceType").and_then(|name| name.as_str());
            return name
                .filter(|name| Model::r4().is_resource_type(name))
                .into_iter()
                .for_each(|name| walk(name, value, each));
        }
        _ => {}
    }
    let Some(definition) = Model::r4().definition(path) else { return };
    for (name, member) in value.entries().filter(|(_, member)| matches!(member.kind(), Kind::Object | Kind::Array)) {
        let Ok(name) = std::str::from_utf8(name) else { continue };
        if let Some(next) = meant(definition, name) {
            walk(next, member, each);
        }
    }
}

/// Path of the definition of a member; `None` where the definition has no such member.
fn meant<'d>(definition: &'d Definition, name: &str) -> Option<&'d str> {
    let plain = |element: &&Element| !element.choice && element.name == name;
    if let Some(element) = definition.elements.iter().find(plain) {
        return element.block.as_deref().or_else(|| element.types.first().map(String::as_str));
    }
    definition.elements.iter().filter(|element| element.choice).find_map(|element| {
        let rest = name.strip_prefix(element.name.as_str())?;
        // Of a choice, the name ends in the type with a capital.
        element.types.iter().map(String::as_str).find(|of| of.eq_ignore_ascii_case(rest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::{Tape, parse_value};

    // Breaks if an attachment is overlooked, or something else that has a url is taken for one.
    #[test]
    fn attachments_are_found_wherever_they_are() {
        let json = br#"{"resourceType":"DocumentReference","url":"no","photo":{"url":"no"},
            "content":[{"attachment":{"url":"a"},"format":{"url":"no"}},{"attachment":{"url":"b"}}],
            "extension":[{"url":"no","valueAttachment":{"url":"c"}},{"url":"no","extension":[{"url":"no","valueAttachment":{"url":"d"}}]}],
            "contained":[{"resourceType":"Patient","photo":[{"url":"e"}]},{"resourceType":"Questionnaire","item":[{"item":[{"initial":[{"valueAttachment":{"url":"f"}}]}]}]}]}"#;
        let mut tape = Tape::default();
        let root = parse_value(&mut tape, json, 0, json.len()).unwrap();
        let document = tape.over(json);
        let mut found = Vec::new();
        for_each_attachment("DocumentReference", document.value(root), &mut |attachment| {
            found.push(attachment.get(b"url").unwrap().as_str().unwrap().to_owned());
        });
        assert_eq!(found, ["a", "b", "c", "d", "e", "f"]);
    }
}
