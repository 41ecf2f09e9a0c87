//! Deletions of a server: Bundles in `deleted` files, and resources that it marks.

use super::{Names, type_of};
use crate::messages::{Deletion, ResourceType};
use fhir_arrow::tape::Value;

/// The deviation of deletion Bundles with entries that delete nothing.
pub(super) const NOT_DELETIONS: &str = "entries of deletion files that are not deletions of FHIR R4's types";

/// Returns true if `meta` marks its resource as deleted, as Azure's FHIR service does where `_includeDeleted` or its
/// exports ask for it: an extension, with `valueString` (its documentation says `valueCode` elsewhere) `soft-deleted`.
pub(super) fn is_soft_deleted(meta: Value<'_>) -> bool {
    meta.get(b"extension").is_some_and(|extensions| {
        extensions.items().any(|extension| {
            let of = |key: &[u8]| extension.get(key).and_then(|value| value.as_str());
            of(b"url").is_some_and(|url| url.trim_end_matches('/').ends_with(DELETED_STATE))
                && [b"valueString".as_slice(), b"valueCode"].iter().any(|key| of(key) == Some("soft-deleted"))
        })
    })
}

/// The end of the URL of Azure's extension, `http` and `https` alike.
const DELETED_STATE: &str = "://azurehealthcareapis.com/data-extensions/deleted-state";

/// A line of a `deleted` file: a transaction Bundle with one or more DELETE entries (Bulk Data 2.0,
/// "Deleted Output"). Entries that delete nothing are counted in `others`.
pub(super) fn deletions(
    names: &Names,
    value: Value<'_>,
    out: &mut Vec<Deletion>,
    others: &mut u64,
) -> Result<(), &'static str> {
    if type_of(value) != Some("Bundle") {
        return Err("not a Bundle, in a file of deletions");
    }
    // A line of which some entries cannot be read goes to quarantine, and what can be read of it is applied: deletions
    // are not retried.
    let mut wrong = Ok(());
    for entry in value.get(b"entry").iter().flat_map(Value::items) {
        let request = entry.get(b"request");
        let method = request.and_then(|request| request.get(b"method")).and_then(|method| method.as_str());
        match request.filter(|_| method.is_some_and(|method| method.trim().eq_ignore_ascii_case("DELETE"))) {
            None => *others += 1,
            Some(request) => match deletion(names, request) {
                // Of a type that has no table, and can have none.
                Ok((None, _)) => *others += 1,
                Ok((Some(resource_type), id)) => out.push(Deletion { resource_type, id, version: None }),
                Err(why) => wrong = wrong.and(Err(why)),
            },
        }
    }
    wrong
}

/// Returns the resource of a DELETE entry, with no type where it is not one of FHIR R4: `Type/id`, behind a base or
/// not, with a version behind it or not.
fn deletion(names: &Names, request: Value<'_>) -> Result<(Option<ResourceType>, Box<str>), &'static str> {
    let url = request.get(b"url").and_then(|url| url.as_str()).ok_or("a DELETE without a url")?;
    let url = url.split_once("/_history/").map_or(url, |(resource, _)| resource);
    let mut parts = url.rsplit('/');
    let (id, name) = (parts.next().unwrap_or_default(), parts.next().ok_or("a DELETE whose url is not Type/id")?);
    if id.is_empty() {
        return Err("a DELETE without an id");
    }
    let is_name =
        name.starts_with(|letter: char| letter.is_ascii_uppercase()) && name.bytes().all(|b| b.is_ascii_alphabetic());
    match names.get(name.as_bytes()) {
        None if !is_name => Err("a DELETE whose url is not Type/id"),
        known => Ok((known.cloned(), id.into())),
    }
}
