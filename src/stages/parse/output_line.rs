//! A line of an output file: which resource it is, and how it ranks among its copies.

use super::deletions::is_soft_deleted;
use super::{Line, Names, UNKNOWN_TYPE};
use crate::messages::{RowKey, RowPosition, key_of};
use fhir_arrow::EXCLUDED_TYPES;
use fhir_arrow::tape::{Kind, Value};
use foundation::instant::parse_instant;

/// A line of an output file.
pub(super) fn output(names: &Names, value: Value<'_>) -> Result<Line, &'static str> {
    if value.kind() != Kind::Object {
        return Err("not a JSON object");
    }
    let (mut resource_type, mut id, mut meta) = (None, None, None);
    for (name, member) in value.entries() {
        match name {
            b"resourceType" => resource_type = resource_type.or(Some(member)),
            b"id" => id = id.or(Some(member)),
            b"meta" => meta = meta.or(Some(member)),
            _ => continue,
        }
        if resource_type.is_some() && id.is_some() && meta.is_some() {
            break;
        }
    }
    let resource_type = resource_type.ok_or("no resourceType")?.str_bytes().ok_or("resourceType is not a string")?;
    let resource_type = names.get(resource_type).ok_or(UNKNOWN_TYPE)?.clone();
    if EXCLUDED_TYPES.contains(&&*resource_type) {
        return Ok(Line::Excluded(resource_type));
    }
    let id = id.ok_or("no id")?.str_bytes().ok_or("id is not a string")?;
    if id.is_empty() {
        return Err("id is empty");
    }
    let mut key = RowKey {
        key: key_of(id),
        last_updated: RowKey::ABSENT,
        version: RowKey::ABSENT,
        arrival: RowPosition::default(),
        subsetted: false,
        replayed: false,
    };
    if let Some(meta) = meta {
        rank(meta, &mut key);
        if is_soft_deleted(meta) {
            return Ok(Line::SoftDeleted(resource_type, key));
        }
    }
    Ok(Line::Row(resource_type, key))
}

fn rank(meta: Value<'_>, key: &mut RowKey) {
    for (name, member) in meta.entries() {
        match name {
            b"lastUpdated" => {
                key.last_updated = member.str_bytes().and_then(parse_instant).unwrap_or(RowKey::ABSENT);
            }
            b"versionId" => {
                let number = member.as_str().and_then(|text| text.parse::<i64>().ok()).filter(|number| *number >= 0);
                key.version = number.unwrap_or(RowKey::ABSENT);
            }
            b"tag" => {
                // K12: the server marks a resource that `_elements` cut down.
                key.subsetted =
                    member.items().any(|tag| tag.get(b"code").and_then(|code| code.str_bytes()) == Some(b"SUBSETTED"));
            }
            _ => {}
        }
    }
}
