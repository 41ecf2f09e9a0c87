//! Resources that are rewritten, with what was fetched in the place of links.

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine;
use bytes::Bytes;

use super::Fetched;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::messages::{ExportFile, ParsedRow, ResourceType, Rows};
use fhir_arrow::tape::{Kind, Tape, Value, parse_value};

/// A row, and where its new JSON stands.
type Written = (ParsedRow, std::ops::Range<usize>);

/// Rows that were rewritten.
pub(super) struct Gathered {
    file: Arc<ExportFile>,
    pub bytes: Vec<u8>,
    pub by_type: Vec<(ResourceType, Vec<Written>)>,
}

impl Gathered {
    pub(crate) fn new(file: &Arc<ExportFile>) -> Self {
        Self { file: file.clone(), bytes: Vec::new(), by_type: Vec::new() }
    }

    pub(crate) fn add(
        &mut self,
        name: &ResourceType,
        row: &ParsedRow,
        resource: Value<'_>,
        line: &[u8],
        fetched: &HashMap<usize, Fetched>,
    ) -> Result<()> {
        // The line as it came stays with the row: `_source` is what the server said.
        let came = self.bytes.len()..self.bytes.len() + line.len();
        self.bytes.extend_from_slice(line);
        self.bytes.push(b'\n');
        let from = self.bytes.len();
        write_json(resource, fetched, &mut self.bytes)?;
        let new = from..self.bytes.len();
        self.bytes.push(b'\n');
        let added = new.len().saturating_sub(line.len());
        // The row holds attachments that its line does not.
        let row = ParsedRow { root: 0, line: came, key: row.key, added, line_hash: None };
        match self.by_type.iter_mut().find(|(known, _)| known == name) {
            Some((_, rows)) => rows.push((row, new)),
            None => self.by_type.push((name.clone(), vec![(row, new)])),
        }
        Ok(())
    }

    pub(crate) fn rows(self) -> Result<Rows> {
        let bytes = Bytes::from(self.bytes);
        let mut tape = Tape::default();
        let mut by_type = Vec::with_capacity(self.by_type.len());
        for (name, rows) in self.by_type {
            let mut parsed = Vec::with_capacity(rows.len());
            for (row, new) in rows {
                let root = parse_value(&mut tape, &bytes, new.start, new.end);
                let root =
                    root.map_err(|fault| Error::new(ErrorKind::Internal, format!("a rewritten row: {fault}")))?;
                parsed.push(ParsedRow { root, ..row });
            }
            by_type.push((name, parsed));
        }
        Ok(Rows { file: self.file, bytes, tape, by_type })
    }
}

/// Writes a value as it is, with what was fetched in the place of links.
fn write_json(value: Value<'_>, fetched: &HashMap<usize, Fetched>, out: &mut Vec<u8>) -> Result<()> {
    match value.kind() {
        Kind::Null => out.extend_from_slice(b"null"),
        Kind::False => out.extend_from_slice(b"false"),
        Kind::True => out.extend_from_slice(b"true"),
        Kind::Number => out.extend_from_slice(value.number_text().unwrap_or(b"0")),
        Kind::String | Kind::Unescaped => write_text(value.as_str().unwrap_or_default(), out)?,
        Kind::Array => {
            out.push(b'[');
            for (at, item) in value.items().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                write_json(item, fetched, out)?;
            }
            out.push(b']');
        }
        Kind::Object => {
            let found = fetched.get(&value.index());
            out.push(b'{');
            let mut first = true;
            for (name, member) in value.entries() {
                if !std::mem::take(&mut first) {
                    out.push(b',');
                }
                match found.filter(|_| name == b"url") {
                    Some(Fetched::File(path)) => {
                        out.extend_from_slice(b"\"url\":");
                        write_text(path.as_ref(), out)?;
                    }
                    Some(Fetched::Inline(content)) => {
                        out.extend_from_slice(b"\"data\":\"");
                        out.extend_from_slice(base64::engine::general_purpose::STANDARD.encode(content).as_bytes());
                        out.push(b'"');
                    }
                    None => {
                        write_text(std::str::from_utf8(name).unwrap_or_default(), out)?;
                        out.push(b':');
                        write_json(member, fetched, out)?;
                    }
                }
            }
            out.push(b'}');
        }
    }
    Ok(())
}

fn write_text(text: &str, out: &mut Vec<u8>) -> Result<()> {
    serde_json::to_writer(out, text).context(ErrorKind::Internal, "a text")
}

#[cfg(test)]
mod tests {
    use object_store::path::Path;

    use super::*;

    // Breaks if anything but the link changes when a row is rewritten: numbers keep their digits, texts their letters.
    #[test]
    fn a_row_is_written_as_it_was_but_for_the_links() {
        let json = r#"{"a":1.00,"b":[null,true,false,-0.5e10],"c":"é\n\"\\\u0001","d":{"url":"x","contentType":"t"},"e":{"url":"y"}}"#;
        let mut tape = Tape::default();
        let root = parse_value(&mut tape, json.as_bytes(), 0, json.len()).unwrap();
        let document = tape.over(json.as_bytes());
        let value = document.value(root);
        let at = |name: &[u8]| value.get(name).unwrap().index();
        let fetched = [
            (at(b"d"), Fetched::File(Path::from("attachments/x.pdf"))),
            (at(b"e"), Fetched::Inline(b"hello".to_vec())),
        ];
        let mut out = Vec::new();
        write_json(value, &fetched.into(), &mut out).unwrap();
        let expected = json
            .replace("\"url\":\"x\"", "\"url\":\"attachments/x.pdf\"")
            .replace("\"url\":\"y\"", "\"data\":\"aGVsbG8=\"");
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
