//! Values that sections of the pipeline file share: sizes and spans that carry their unit, lists of resource types,
//! texts that may refer to the environment or a file; and the findings of a section's own check. A reference is
//! resolved where the value is read, never by substitution in the file's text.

use std::borrow::Cow;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Declares a section of the pipeline file: each key once, with its documentation, type and default.
macro_rules! section {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$field:meta])* pub $key:ident: $type:ty = $default:expr,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$field])* pub $key: $type,)+
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($key: $default,)+ }
            }
        }
    };
}
pub(crate) use section;

/// A number of bytes: `64KiB`, `16MiB`, `2GiB`, `500MB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

/// A span of time: `250ms`, `30s`, `5m`, `1h`, `7d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

/// A text, which may hold `${env:NAME}`, `${file:/path}` and `${azure-key-vault:VAULT/SECRET}`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Text(pub String);

impl std::fmt::Debug for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // As written: what a reference stands for is resolved elsewhere.
        f.write_str(&self.0)
    }
}

/// Resource types: all, or only some. In the file a list, empty for all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "Vec<String>", into = "Vec<String>")]
pub enum Types {
    /// All types.
    #[default]
    All,
    /// Only these, at least one.
    Only(Vec<String>),
}

impl Types {
    /// Returns true if it names no types.
    pub fn is_all(&self) -> bool {
        *self == Types::All
    }
    /// Returns true if `name` is one of them.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Types::All => true,
            Types::Only(names) => names.iter().any(|known| known == name),
        }
    }
    /// Returns the names; none for all.
    pub fn names(&self) -> &[String] {
        match self {
            Types::All => &[],
            Types::Only(names) => names,
        }
    }
}

impl From<Vec<String>> for Types {
    fn from(names: Vec<String>) -> Self {
        if names.is_empty() { Types::All } else { Types::Only(names) }
    }
}

impl From<Types> for Vec<String> {
    fn from(types: Types) -> Self {
        types.names().to_vec()
    }
}

impl JsonSchema for Types {
    fn schema_name() -> Cow<'static, str> {
        "Types".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "array", "items": { "type": "string", "format": RESOURCE_TYPE } })
    }
    fn inline_schema() -> bool {
        true
    }
}

/// Findings of a section's own check: each with the path of its key below the section.
#[derive(Debug, Default)]
pub struct Findings {
    list: Vec<Finding>,
}

/// One thing that is wrong with a section.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// Path of the key, below the section that found it; from the root of the file once [`Findings::below`] has it.
    pub path: String,
    /// Problem.
    pub what: String,
    /// Hint.
    pub hint: Option<&'static str>,
}

impl Findings {
    /// Adds one.
    pub fn add(&mut self, path: impl Into<String>, what: impl Into<String>, hint: Option<&'static str>) {
        self.list.push(Finding { path: path.into(), what: what.into(), hint });
    }
    /// Adds one if `is_wrong`.
    pub fn add_if(&mut self, is_wrong: bool, path: &str, what: &str, hint: Option<&'static str>) {
        if is_wrong {
            self.add(path, what, hint);
        }
    }
    /// Adds what a section at `at` found.
    pub fn below(&mut self, at: &str, section: impl FnOnce(&mut Findings)) {
        let mut found = Findings::default();
        section(&mut found);
        self.list.extend(found.list.into_iter().map(|finding| {
            let path = if finding.path.is_empty() { at.to_owned() } else { format!("{at}.{}", finding.path) };
            Finding { path, ..finding }
        }));
    }
    /// Returns all of them.
    pub fn into_list(self) -> Vec<Finding> {
        self.list
    }
}

/// Returns true for `https://files.example.org`.
pub fn is_origin(text: &str) -> bool {
    url::Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.path() == "/")
}

/// Returns true for the URL of a FHIR server, and false for a folder's.
pub fn is_of_server(url: &url::Url) -> bool {
    matches!(url.scheme(), "http" | "https")
}

/// Returns the number of workers that a setting stands for: 0 is one per core.
pub fn workers(number: usize) -> usize {
    if number == 0 { std::thread::available_parallelism().map_or(1, std::num::NonZero::get) } else { number }
}

/// `last-sync`, `none` or an instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Instant {
    /// Since the newest watermark of each table.
    LastSync,
    /// Everything.
    None,
    /// Since then; microseconds since the epoch.
    At(i64),
}

fn split_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let at = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let number: f64 = text[..at].parse().ok()?;
    number.is_finite().then(|| (number, text[at..].trim()))
}

impl TryFrom<String> for ByteSize {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || "not a size; write it with its unit, such as 64KiB, 16MiB, 500MB or 2GiB".to_owned();
        let (number, unit) = split_unit(&text).ok_or_else(wrong)?;
        let factor: u64 = match unit {
            "B" => 1,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            _ => return Err(wrong()),
        };
        Ok(ByteSize((number * factor as f64) as u64))
    }
}

impl ByteSize {
    /// Returns the number of bytes, at most what memory can address.
    pub fn bytes(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> String {
        let units = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        let unit = units.iter().find(|(factor, _)| size.0 >= *factor && size.0.is_multiple_of(*factor));
        unit.map_or_else(|| format!("{}B", size.0), |(factor, unit)| format!("{}{unit}", size.0 / factor))
    }
}

impl TryFrom<String> for Span {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || "not a span of time; write it with its unit, such as 250ms, 30s, 5m, 1h or 7d".to_owned();
        let (number, unit) = split_unit(&text).ok_or_else(wrong)?;
        let seconds = match unit {
            "ms" => number / 1000.0,
            "s" => number,
            "m" => number * 60.0,
            "h" => number * 3_600.0,
            "d" => number * 86_400.0,
            _ => return Err(wrong()),
        };
        Duration::try_from_secs_f64(seconds).map(Span).map_err(|_| wrong())
    }
}

impl From<Span> for String {
    fn from(span: Span) -> String {
        let millis = span.0.as_millis();
        match millis {
            m if m.is_multiple_of(3_600_000) => format!("{}h", m / 3_600_000),
            m if m.is_multiple_of(60_000) => format!("{}m", m / 60_000),
            m if m.is_multiple_of(1_000) => format!("{}s", m / 1_000),
            m => format!("{m}ms"),
        }
    }
}

impl TryFrom<String> for Instant {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "last-sync" => Ok(Instant::LastSync),
            "none" => Ok(Instant::None),
            time => foundation::instant::parse_instant(time.as_bytes())
                .map(Instant::At)
                .ok_or_else(|| "neither last-sync, none nor an instant such as 2026-01-31T00:00:00Z".to_owned()),
        }
    }
}

impl From<Instant> for String {
    fn from(instant: Instant) -> String {
        match instant {
            Instant::LastSync => "last-sync".into(),
            Instant::None => "none".into(),
            Instant::At(micros) => chrono::DateTime::from_timestamp_micros(micros)
                .map_or_else(String::new, |time| time.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true)),
        }
    }
}

/// The formats of [`check_format`], by which the schema names them.
pub(crate) const SIZE: &str = "byte-size";
pub(crate) const SPAN: &str = "time-span";
pub(crate) const SINCE: &str = "since";
pub(crate) const TEXT: &str = "text-with-references";
pub(crate) const RESOURCE_TYPE: &str = "resource-type";
pub(crate) const INSTANT: &str = "instant";

/// Returns the pattern of a format whose number needs a unit.
pub(crate) fn example_with_unit(format: &str) -> Option<&'static str> {
    match format {
        SIZE => Some("512MiB"),
        SPAN => Some("30s or 5m"),
        _ => None,
    }
}

/// Returns the problem of a text of a format; `None` where nothing is.
pub(crate) fn check_format(format: &str, text: &str) -> Option<String> {
    match format {
        SIZE => ByteSize::try_from(text.to_owned()).err(),
        SPAN => Span::try_from(text.to_owned()).err(),
        SINCE => Instant::try_from(text.to_owned()).err(),
        TEXT => parts(text).err(),
        INSTANT => {
            let instant = foundation::instant::parse_instant(text.as_bytes());
            instant.is_none().then(|| "not an instant such as 2026-01-31T00:00:00Z".to_owned())
        }
        RESOURCE_TYPE => {
            let known = fhir_arrow::Model::r4().is_resource_type(text);
            (!known).then(|| "not a resource type of FHIR R4".to_owned())
        }
        _ => None,
    }
}

macro_rules! string_schema {
    ($type:ty, $name:literal, $format:expr, $description:literal) => {
        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "format": $format, "description": $description })
            }
            fn inline_schema() -> bool {
                true
            }
        }
    };
}
string_schema!(ByteSize, "ByteSize", SIZE, "A number of bytes with its unit: 64KiB, 16MiB, 2GiB.");
string_schema!(Span, "Span", SPAN, "A span of time with its unit: 250ms, 30s, 5m, 1h, 7d.");
string_schema!(Instant, "Instant", SINCE, "last-sync, none or an instant such as 2026-01-31T00:00:00Z.");
string_schema!(Text, "Text", TEXT, "A text; may hold ${env:NAME} and ${file:/path}.");

enum Part<'a> {
    Plain(&'a str),
    Env(&'a str),
    File(&'a str),
    #[cfg(feature = "keyvault")]
    Vault(&'a str),
}

fn parts(text: &str) -> Result<Vec<Part<'_>>, String> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        parts.push(Part::Plain(&rest[..at]));
        let end = rest[at..].find('}').ok_or("a reference `${` without its closing `}`")?;
        let reference = &rest[at + 2..at + end];
        parts.push(match reference.split_once(':') {
            Some(("env", name)) if !name.is_empty() => Part::Env(name),
            Some(("file", path)) if !path.is_empty() => Part::File(path),
            #[cfg(feature = "keyvault")]
            Some(("azure-key-vault", reference)) => Part::Vault(reference),
            #[cfg(not(feature = "keyvault"))]
            Some(("azure-key-vault", _)) => {
                return Err("azure-key-vault is not in this build; build it with `--features keyvault`, or use \
                    ${env:NAME} or ${file:/path}"
                    .into());
            }
            _ => return Err("not a reference; write ${env:NAME} or ${file:/path}".into()),
        });
        rest = &rest[at + end + 1..];
    }
    parts.push(Part::Plain(rest));
    Ok(parts)
}

/// A variable of the environment. The only place that reads it, so that every use of it is found here.
pub fn environment(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "the one reader of the environment")]
    std::env::var(name).ok()
}

/// Says where others than the owner and its group can read a file that stands for a secret, or the group can write it.
#[cfg(unix)]
pub fn warn_if_loose(path: &str) {
    use std::os::unix::fs::PermissionsExt;
    const LOOSE: u32 = 0o027;
    let Ok(metadata) = std::fs::metadata(path) else { return };
    let mode = metadata.permissions().mode() & 0o777;
    if mode & LOOSE != 0 {
        tracing::warn!(
            file = path,
            mode = format!("{mode:o}"),
            "others can read the file, and it holds a secret: chmod 600 makes it private"
        );
    }
}

/// Says nothing where files have no modes.
#[cfg(not(unix))]
pub fn warn_if_loose(_: &str) {}

impl Text {
    /// Returns true if a part of it is in a file or a vault.
    pub fn refers_elsewhere(&self) -> bool {
        parts(&self.0).is_ok_and(|parts| parts.iter().any(|part| !matches!(part, Part::Plain(_) | Part::Env(_))))
    }

    /// The text with its references resolved. Errors name the reference, never a value.
    pub fn resolve(&self) -> Result<String, String> {
        let mut out = String::new();
        for part in parts(&self.0)? {
            match part {
                Part::Plain(text) => out.push_str(text),
                Part::Env(name) => {
                    out.push_str(&environment(name).ok_or_else(|| format!("the environment has no variable {name}"))?);
                }
                #[cfg(feature = "keyvault")]
                Part::Vault(reference) => {
                    out.push_str(
                        &crate::config::vault_secret(reference)
                            .map_err(|why| format!("${{azure-key-vault:{reference}}}: {why}"))?,
                    );
                }
                Part::File(path) => {
                    warn_if_loose(path);
                    let text =
                        std::fs::read_to_string(path).map_err(|error| format!("{path} cannot be read: {error}"))?;
                    out.push_str(text.trim_end_matches(['\n', '\r']));
                }
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans_carry_their_unit() {
        assert_eq!(ByteSize::try_from("16MiB".to_owned()), Ok(ByteSize(16 << 20)));
        assert_eq!(ByteSize::try_from("1.5 GB".to_owned()), Ok(ByteSize(1_500_000_000)));
        assert!(ByteSize::try_from("16".to_owned()).is_err());
        assert!(ByteSize::try_from("MiB".to_owned()).is_err());
        assert_eq!(Span::try_from("90m".to_owned()), Ok(Span(Duration::from_secs(5400))));
        assert!(Span::try_from("-1s".to_owned()).is_err());
        assert_eq!(String::from(ByteSize(512 << 20)), "512MiB");
        assert_eq!(String::from(Span(Duration::from_secs(7200))), "2h");
    }

    #[test]
    fn references_are_resolved_and_errors_name_them_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, "abc\n").unwrap();
        let text = Text(format!("x-${{file:{}}}-y", path.display()));
        assert_eq!(text.resolve().unwrap(), "x-abc-y");
        assert!(
            Text("${env:FHIRLAKE_NO_SUCH_VARIABLE}".into())
                .resolve()
                .unwrap_err()
                .contains("FHIRLAKE_NO_SUCH_VARIABLE")
        );
        for wrong in ["${env:", "${foo:bar}", "${env:}", "${}"] {
            assert!(check_format(TEXT, wrong).is_some(), "{wrong}");
        }
    }
}
