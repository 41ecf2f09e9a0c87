//! Typed, versioned documents: JSON with a `version` member.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Context, Error, ErrorKind, Result};

/// Treatment of a document that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDamage {
    /// It is an error, with this hint: nothing else knows what it said.
    Fail(&'static str),
    /// It counts as missing, with a warning that says what follows: it can be rebuilt.
    Rebuild(&'static str),
}

/// A document of the state.
///
/// A file without a `version` member is of version 1. A change of its form that an older fhirlake would read wrongly
/// raises [`Document::VERSION`]; a new field with a default does not.
pub trait Document: Serialize + DeserializeOwned {
    /// Its file in the state.
    const NAME: &'static str;
    /// The version that this program writes, and the newest that it reads.
    const VERSION: u32 = 1;
    /// True if only the holder of the lease writes it.
    const IS_LEASED: bool = true;
    /// Treatment of one that cannot be read.
    const ON_DAMAGE: OnDamage;
}

#[derive(Serialize)]
struct Versioned<'a, D> {
    version: u32,
    #[serde(flatten)]
    document: &'a D,
}

#[derive(Deserialize)]
struct Probe {
    /// Others may have put a member of this name there.
    #[serde(default)]
    version: Value,
}

/// Returns a document's text.
pub(super) fn encode<D: Document>(document: &D) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(&Versioned { version: D::VERSION, document })
        .context(ErrorKind::Internal, D::NAME)?;
    text.push(b'\n');
    Ok(text)
}

/// Reads a document's text. `location` is for messages.
pub(super) fn decode<D: Document>(text: &[u8], location: &str) -> Result<Option<D>> {
    let read = || -> Result<D> {
        let is_none = |error: serde_json::Error| {
            Error::new(ErrorKind::State, format!("{location}: not a fhirlake state file: {}", without_values(&error)))
        };
        let probe: Probe = serde_json::from_slice(text).map_err(is_none)?;
        if let Some(version) = probe.version.as_u64().filter(|version| *version > u64::from(D::VERSION)) {
            let known = D::VERSION;
            let what = format!("{location} is of version {version}, and this fhirlake knows versions up to {known}");
            return Err(
                Error::new(ErrorKind::State, what).with_hint("run the newer fhirlake that wrote it, or a later one")
            );
        }
        serde_json::from_slice(text).map_err(is_none)
    };
    match (read(), D::ON_DAMAGE) {
        (Ok(document), _) => Ok(Some(document)),
        (Err(error), OnDamage::Fail(hint)) => Err(error.or_hint(hint)),
        (Err(error), OnDamage::Rebuild(what)) => {
            tracing::warn!(%error, "{what}");
            Ok(None)
        }
    }
}

/// Returns the text of a JSON error without the values that it quotes, which may be secrets.
fn without_values(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let quoted = if text.starts_with("unknown variant") { text.find('`') } else { text.find('"') };
    match quoted {
        Some(at) => format!("{}(line {}, column {})", &text[..at], error.line(), error.column()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Note {
        text: String,
        #[serde(default)]
        count: u64,
    }

    impl Document for Note {
        const NAME: &'static str = "note.json";
        const VERSION: u32 = 2;
        const ON_DAMAGE: OnDamage = OnDamage::Fail("move it away");
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Cache {
        text: String,
    }

    impl Document for Cache {
        const NAME: &'static str = "cache.json";
        const ON_DAMAGE: OnDamage = OnDamage::Rebuild("the cache is built again");
    }

    // Breaks if a document cannot be read again, if one of an earlier version cannot, or if a newer one is read
    // wrongly.
    #[test]
    fn versions() {
        let note = Note { text: "a".into(), count: 1 };
        let text = encode(&note).unwrap();
        assert!(text.starts_with(b"{\n  \"version\": 2,"), "{}", String::from_utf8_lossy(&text));
        assert_eq!(decode::<Note>(&text, "x").unwrap(), Some(note));
        assert_eq!(decode::<Note>(br#"{"text":"b"}"#, "x").unwrap(), Some(Note { text: "b".into(), count: 0 }));
        let of_others = br#"{"version":"1.2","text":"b"}"#;
        assert_eq!(decode::<Note>(of_others, "x").unwrap().unwrap().text, "b");
        let error = decode::<Note>(br#"{"version":3,"text":"b"}"#, "/s/note.json").unwrap_err();
        assert_eq!(error.to_string(), "/s/note.json is of version 3, and this fhirlake knows versions up to 2");
        assert!(error.hint().unwrap().contains("newer fhirlake"));
    }

    // Breaks if damage passes for an empty document where nothing can rebuild it, if it fails one that can be rebuilt,
    // or if a value is shown.
    #[test]
    fn damage() {
        for text in ["", "{", "[]", "3", r#"{"text": 3}"#, r#"{"text":"b","count":"secret"}"#, r#"{"version":1}"#] {
            let error = decode::<Note>(text.as_bytes(), "note.json").unwrap_err();
            assert_eq!((error.kind(), error.hint()), (ErrorKind::State, Some("move it away")));
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        assert_eq!(decode::<Cache>(b"{", "cache.json").unwrap(), None);
        assert_eq!(decode::<Cache>(br#"{"version":9,"text":"b"}"#, "cache.json").unwrap(), None);
    }
}
