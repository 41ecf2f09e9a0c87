//! What the benchmarks share: the data, and what a process has used.

#![allow(dead_code, reason = "each benchmark uses a part of it")]

use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::Arc;

use bulk_data_server::{DEMO_TYPES, Population};
use fhir_arrow::{EXCLUDED_TYPES, Model};
use fhirlake::messages::{BadLine, BadLines, Deletion, ExportFile, FileKind};

/// A file as an export lists it.
pub(crate) fn export_file(index: u32, resource_type: &str) -> Arc<ExportFile> {
    Arc::new(ExportFile {
        index,
        export: 0,
        name: format!("{resource_type}.ndjson"),
        url: url::Url::parse("file:///bench").expect("a URL"),
        location: None,
        kind: FileKind::Output,
        declared: Some(resource_type.into()),
        count: None,
        requires_access_token: false,
        replayed: false,
        place: fhirlake::messages::ManifestEntryId { page: 0, kind: FileKind::Output, at: 0 },
    })
}

/// Longest line.
pub(crate) const MAX_LINE: usize = 64 << 20;

/// The demo's population, Synthea's shape: about `bytes` of `types` in the proportions that patients have.
pub(crate) fn population(types: &[&str], bytes: usize) -> Vec<(Arc<str>, Vec<u8>)> {
    let population = Population::new(42, u32::MAX / 2);
    let mut files: Vec<(Arc<str>, String)> = types.iter().map(|name| (Arc::from(*name), String::new())).collect();
    for patient in 0.. {
        for (name, text) in &mut files {
            let kind = DEMO_TYPES.iter().position(|known| **known == **name).expect("a type of the demo");
            population.for_each(kind, patient, |number, fate| population.write(kind, patient, number, fate, text));
        }
        if files.iter().map(|(_, text)| text.len()).sum::<usize>() >= bytes {
            break;
        }
    }
    files.into_iter().map(|(name, text)| (name, text.into_bytes())).collect()
}

/// `<Type>.ndjson` of a folder, repeated with other values until there are about `bytes`.
pub(crate) fn folder(folder: &Path, types: Option<&str>, bytes: usize) -> Vec<(Arc<str>, Vec<u8>)> {
    let mut files: Vec<(Arc<str>, Vec<u8>)> = Vec::new();
    for name in Model::r4().resource_types() {
        if EXCLUDED_TYPES.contains(&name.as_str()) || types.is_some_and(|only| only != name) {
            continue;
        }
        if let Ok(text) = std::fs::read(folder.join(format!("{name}.ndjson"))) {
            files.push((Arc::from(name.as_str()), text));
        }
    }
    let base: usize = files.iter().map(|(_, text)| text.len()).sum();
    assert!(base > 0, "{} has no NDJSON file of {}", folder.display(), types.unwrap_or("any type"));
    for (_, text) in &mut files {
        let original = text.clone();
        for copy in 1..bytes.div_ceil(base) as u64 {
            vary(&original, copy, text);
        }
    }
    files
}

fn hash(parts: impl Hash) -> u64 {
    #[allow(deprecated)]
    let mut hasher = std::hash::SipHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

/// Appends `text` with other UUIDs (the same for the same), dates, times and decimals.
pub(crate) fn vary(text: &[u8], copy: u64, out: &mut Vec<u8>) {
    let digits = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_digit);
    let is_uuid = |bytes: &[u8]| {
        bytes
            .iter()
            .enumerate()
            .all(|(at, b)| if matches!(at, 8 | 13 | 18 | 23) { *b == b'-' } else { b.is_ascii_hexdigit() })
    };
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let starts_value = at > 0 && matches!(text[at - 1], b'"' | b'/' | b':' | b'|');
        if starts_value && rest.len() > 36 && is_uuid(&rest[..36]) {
            let (a, b) = (hash((copy, &rest[..36])), hash((&rest[..36], copy)));
            let hex = format!("{a:016x}{b:016x}");
            out.extend_from_slice(
                format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]).as_bytes(),
            );
            at += 36;
        } else if starts_value
            && rest.len() > 10
            && digits(&rest[..4])
            && rest[4] == b'-'
            && digits(&rest[5..7])
            && rest[7] == b'-'
        {
            let year = 1950 + hash((copy, &rest[..10])) % 75;
            out.extend_from_slice(year.to_string().as_bytes());
            out.extend_from_slice(&rest[4..10]);
            at += 10;
            if rest.len() > 19 && rest[10] == b'T' {
                let moment = hash((copy, &rest[..19]));
                out.extend_from_slice(
                    format!("T{:02}:{:02}:{:02}", moment % 24, moment / 24 % 60, moment / 1440 % 60).as_bytes(),
                );
                at += 9;
            }
        } else if starts_value && text[at - 1] == b':' && (rest[0].is_ascii_digit() || rest[0] == b'-') {
            let end = rest.iter().position(|b| !matches!(b, b'0'..=b'9' | b'.' | b'-')).unwrap_or(rest.len());
            let point = rest[..end].iter().position(|b| *b == b'.');
            let random = hash((copy, at));
            for (place, b) in rest[..end].iter().enumerate() {
                let varies = point.is_some_and(|point| place > point) && b.is_ascii_digit();
                out.push(if varies { b'0' + (random >> (place % 16 * 4)) as u8 % 10 } else { *b });
            }
            at += end;
        } else {
            out.push(rest[0]);
            at += 1;
        }
    }
}

pub(crate) struct NoBadLines;

impl BadLines for NoBadLines {
    fn quarantine(&self, bad: &BadLine<'_>) -> fhirlake::error::Result<()> {
        panic!("{} line {}: {}", bad.file.name, bad.line, bad.reason);
    }
    fn message(&self, _: &ExportFile, _: u64, _: &[u8]) -> fhirlake::error::Result<()> {
        Ok(())
    }
    fn deleted(&self, _: &[Deletion]) -> fhirlake::error::Result<()> {
        Ok(())
    }
    fn sync(&self) -> fhirlake::error::Result<()> {
        Ok(())
    }
}

/// `VmHWM` of this process, where the system tells.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// The Synthea sample, unpacked, where it lies beside the project.
pub(crate) fn synthea() -> Option<tempfile::TempDir> {
    let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/synthea-100.tar.gz");
    let folder = archive.exists().then(tempfile::tempdir)?.ok()?;
    let unpacked = std::process::Command::new("tar").arg("xzf").arg(&archive).arg("-C").arg(folder.path()).status();
    unpacked.is_ok_and(|status| status.success()).then_some(folder)
}
