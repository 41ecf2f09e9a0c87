//! RFC 8259 JSON → tape. Strict: what it takes, every other parser takes too.

use std::fmt;

use super::{Kind, MAX_LENGTH, Node, Tape};

/// Deepest nesting of objects and arrays that is read. Real resources stay far below; hostile ones
/// must not reach the end of a thread's stack.
pub const MAX_DEPTH: usize = 128;

/// Why a text is not JSON that we read, and where in it. Says nothing of the text itself: it may be
/// patient data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// A problem.
    pub reason: &'static str,
    /// Bytes from the start of the line.
    pub offset: usize,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {} of the line", self.reason, self.offset)
    }
}

impl std::error::Error for Fault {}

/// Parses the one JSON value in `bytes[start..end]`, which must be UTF-8, and appends it to `tape`;
/// returns the index of its node. On a fault the tape is as it was.
///
/// ```
/// use fhir_arrow::tape::{Tape, parse_value};
///
/// let line = br#"{"resourceType":"Patient","multipleBirthInteger":2}"#;
/// let mut tape = Tape::default();
/// let root = parse_value(&mut tape, line, 0, line.len())?;
/// let document = tape.over(line);
/// let patient = document.value(root);
/// assert_eq!(patient.get(b"resourceType").and_then(|value| value.str_bytes()), Some(&b"Patient"[..]));
/// # Ok::<(), fhir_arrow::tape::Fault>(())
/// ```
pub fn parse_value(tape: &mut Tape, bytes: &[u8], start: usize, end: usize) -> Result<usize, Fault> {
    let (nodes, text) = (tape.nodes.len(), tape.text.len());
    // No string or number is longer than its line, and no line has more nodes than bytes: what a node can hold is
    // looked at once here and not at every node.
    if end - start > MAX_LENGTH || end > u32::MAX as usize || nodes + (end - start) >= u32::MAX as usize {
        return Err(Fault { reason: "line too long", offset: 0 });
    }
    let mut parser = Parser { bytes: &bytes[..end], at: start, tape };
    let outcome = parser.document();
    let at = parser.at;
    outcome.map_err(|reason| {
        tape.nodes.truncate(nodes);
        tape.text.truncate(text);
        Fault { reason, offset: at - start }
    })?;
    Ok(nodes)
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
    tape: &'a mut Tape,
}

type Step = Result<(), &'static str>;

const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
const HIGHS: u64 = u64::from_ne_bytes([0x80; 8]);

/// Sets the high bit of each byte of `word` that is a quote, a backslash or a control character. Bits
/// above the first true hit may be wrong (a borrow runs upwards), so only the lowest is used.
#[inline]
fn string_ends(word: u64) -> u64 {
    let quote = word ^ (ONES * b'"' as u64);
    let slash = word ^ (ONES * b'\\' as u64);
    let quote = quote.wrapping_sub(ONES) & !quote;
    let slash = slash.wrapping_sub(ONES) & !slash;
    let control = word.wrapping_sub(ONES * 0x20) & !word;
    (quote | slash | control) & HIGHS
}

impl Parser<'_> {
    #[inline]
    fn peek(&self) -> u8 {
        self.bytes.get(self.at).copied().unwrap_or(0)
    }

    /// Passes over white space, of which NDJSON has next to none.
    #[inline]
    fn space(&mut self) {
        if self.peek() <= b' ' {
            self.spaces();
        }
    }

    #[cold]
    fn spaces(&mut self) {
        while matches!(self.peek(), b' ' | b'\t' | b'\n' | b'\r') && self.at < self.bytes.len() {
            self.at += 1;
        }
    }

    fn document(&mut self) -> Step {
        self.space();
        self.value(0)?;
        self.space();
        if self.at != self.bytes.len() {
            return Err("text after the end of the JSON value");
        }
        Ok(())
    }

    #[inline]
    fn push(&mut self, kind: Kind, length: usize, position: usize) -> Step {
        self.tape.nodes.push(Node::new(kind, length, position));
        Ok(())
    }

    fn value(&mut self, depth: usize) -> Step {
        match self.peek() {
            b'"' => self.string(),
            b'{' => self.object(depth),
            b'[' => self.array(depth),
            b'-' | b'0'..=b'9' => self.number(),
            b't' => self.word(b"true", Kind::True),
            b'f' => self.word(b"false", Kind::False),
            b'n' => self.word(b"null", Kind::Null),
            _ if self.at >= self.bytes.len() => Err("JSON ends too early"),
            _ => Err("not a JSON value"),
        }
    }

    fn word(&mut self, word: &[u8], kind: Kind) -> Step {
        if !self.bytes[self.at..].starts_with(word) {
            return Err("not a JSON value");
        }
        let at = self.at;
        self.at += word.len();
        self.push(kind, 0, at)
    }

    fn object(&mut self, depth: usize) -> Step {
        self.container(depth, Kind::Object, b'}', |parser, depth| {
            if parser.peek() != b'"' {
                return Err("a key must be a string");
            }
            parser.string()?;
            parser.space();
            if parser.peek() != b':' {
                return Err("a colon is missing after a key");
            }
            parser.at += 1;
            parser.space();
            parser.value(depth)
        })
    }

    fn array(&mut self, depth: usize) -> Step {
        self.container(depth, Kind::Array, b']', |parser, depth| parser.value(depth))
    }

    #[inline]
    fn container(&mut self, depth: usize, kind: Kind, close: u8, item: impl Fn(&mut Self, usize) -> Step) -> Step {
        if depth >= MAX_DEPTH {
            return Err("nested too deeply");
        }
        self.at += 1;
        let head = self.tape.nodes.len();
        self.push(kind, 0, 0)?;
        let mut count = 0usize;
        self.space();
        if self.peek() == close {
            self.at += 1;
        } else {
            loop {
                item(self, depth + 1)?;
                count += 1;
                self.space();
                let separator = self.peek();
                if separator == b',' {
                    self.at += 1;
                    self.space();
                } else if separator == close {
                    self.at += 1;
                    break;
                } else if self.at >= self.bytes.len() {
                    return Err("JSON ends too early");
                } else {
                    return Err("a comma or a closing bracket is missing");
                }
            }
        }
        let end = self.tape.nodes.len();
        self.tape.nodes[head] = Node::new(kind, count.min(MAX_LENGTH), end);
        Ok(())
    }

    fn number(&mut self) -> Step {
        let start = self.at;
        if self.peek() == b'-' {
            self.at += 1;
        }
        match self.peek() {
            b'0' => self.at += 1,
            b'1'..=b'9' => self.digits()?,
            _ => return Err("not a JSON number"),
        }
        if self.peek() == b'.' {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), b'e' | b'E') {
            self.at += 1;
            if matches!(self.peek(), b'+' | b'-') {
                self.at += 1;
            }
            self.digits()?;
        }
        self.push(Kind::Number, self.at - start, start)
    }

    fn digits(&mut self) -> Step {
        let start = self.at;
        while self.peek().is_ascii_digit() {
            self.at += 1;
        }
        if self.at == start { Err("not a JSON number") } else { Ok(()) }
    }

    #[inline]
    fn string(&mut self) -> Step {
        self.at += 1;
        let start = self.at;
        let end = self.run()?;
        if self.bytes[end] == b'"' {
            self.at = end + 1;
            return self.push(Kind::String, end - start, start);
        }
        self.escaped(start, end)
    }

    /// Moves to the next quote, backslash or control character; its place. A control character is a fault.
    #[inline]
    fn run(&mut self) -> Result<usize, &'static str> {
        let bytes = self.bytes;
        let mut at = self.at;
        while let Some(word) = bytes.get(at..at + 8) {
            let mut eight = [0; 8];
            eight.copy_from_slice(word);
            let hits = string_ends(u64::from_le_bytes(eight));
            if hits != 0 {
                at += hits.trailing_zeros() as usize / 8;
                self.at = at;
                return if bytes[at] < 0x20 { Err("a control character in a string") } else { Ok(at) };
            }
            at += 8;
        }
        while at < bytes.len() {
            match bytes[at] {
                b'"' | b'\\' => {
                    self.at = at;
                    return Ok(at);
                }
                0..0x20 => {
                    self.at = at;
                    return Err("a control character in a string");
                }
                _ => at += 1,
            }
        }
        self.at = at;
        Err("JSON ends too early")
    }

    /// The rest of a string that has an escape at `escape`: unescaped into the tape's own text.
    #[cold]
    fn escaped(&mut self, start: usize, escape: usize) -> Step {
        let from = self.tape.text.len();
        self.tape.text.extend_from_slice(&self.bytes[start..escape]);
        self.at = escape;
        loop {
            match self.peek() {
                b'"' => {
                    self.at += 1;
                    let length = self.tape.text.len() - from;
                    // Text gathers over the lines of a chunk.
                    if self.tape.text.len() > u32::MAX as usize {
                        return Err("line too long");
                    }
                    return self.push(Kind::Unescaped, length, from);
                }
                _ => {
                    self.at += 1;
                    self.escape()?;
                }
            }
            let run = self.at;
            let end = self.run()?;
            self.tape.text.extend_from_slice(&self.bytes[run..end]);
        }
    }

    fn escape(&mut self) -> Step {
        let plain = match self.peek() {
            b'"' => b'"',
            b'\\' => b'\\',
            b'/' => b'/',
            b'b' => 0x08,
            b'f' => 0x0c,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => {
                self.at += 1;
                let mut code = self.hex4()?;
                if (0xdc00..0xe000).contains(&code) {
                    return Err("a lone surrogate in a string");
                }
                if (0xd800..0xdc00).contains(&code) {
                    if !self.bytes[self.at..].starts_with(b"\\u") {
                        return Err("a lone surrogate in a string");
                    }
                    self.at += 2;
                    let low = self.hex4()?;
                    if !(0xdc00..0xe000).contains(&low) {
                        return Err("a lone surrogate in a string");
                    }
                    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
                }
                let character = char::from_u32(code).ok_or("a lone surrogate in a string")?;
                let mut buffer = [0; 4];
                self.tape.text.extend_from_slice(character.encode_utf8(&mut buffer).as_bytes());
                return Ok(());
            }
            _ => return Err("an unknown escape in a string"),
        };
        self.at += 1;
        self.tape.text.push(plain);
        Ok(())
    }

    fn hex4(&mut self) -> Result<u32, &'static str> {
        let digits = self.bytes.get(self.at..self.at + 4).ok_or("JSON ends too early")?;
        let mut code = 0;
        for digit in digits {
            let value = (*digit as char).to_digit(16).ok_or("an unknown escape in a string")?;
            code = code << 4 | value;
        }
        self.at += 4;
        Ok(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::Value;
    use proptest::prelude::*;

    fn to_serde(value: Value<'_>) -> serde_json::Value {
        match value.kind() {
            Kind::Null => serde_json::Value::Null,
            Kind::True => true.into(),
            Kind::False => false.into(),
            Kind::Number => {
                let text = std::str::from_utf8(value.number_text().unwrap()).unwrap();
                serde_json::from_str(text).unwrap()
            }
            Kind::String | Kind::Unescaped => value.as_str().unwrap().into(),
            Kind::Object => value
                .entries()
                .map(|(key, value)| (String::from_utf8(key.to_vec()).unwrap(), to_serde(value)))
                .collect::<serde_json::Map<_, _>>()
                .into(),
            Kind::Array => value.items().map(to_serde).collect::<Vec<_>>().into(),
        }
    }

    fn parse(text: &str) -> Result<serde_json::Value, Fault> {
        let mut tape = Tape::default();
        let root = parse_value(&mut tape, text.as_bytes(), 0, text.len())?;
        Ok(to_serde(tape.over(text.as_bytes()).value(root)))
    }

    #[test]
    fn reads_what_serde_json_reads() {
        for text in [
            r#"{"a":[1,-2.50,1E-22,0,true,false,null,"x"],"b":{},"c":[],"d":"long enough for a whole word"}"#,
            " { \"a\" : [ 1 , 2 ] } ",
            r#""\u00e9\ud83d\ude00\n\"\\\/ tail after escapes that is long""#,
            "\"é😀 not escaped\"",
            r#"{"":""}"#,
        ] {
            assert_eq!(parse(text).unwrap(), serde_json::from_str::<serde_json::Value>(text).unwrap(), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_not_json() {
        for text in [
            "",
            "{",
            "[1,]",
            "{\"a\":1,}",
            "{a:1}",
            "01",
            "1.",
            "-",
            "1e",
            "tru",
            "\"\u{1}\"",
            "\"\\x\"",
            "\"\\ud800\"",
            "\"\\udc00\"",
            "\"\\ud800\\u0041\"",
            "{} {}",
            "\"open",
            "[1 2]",
            "nul",
            "+1",
            "'a'",
        ] {
            assert!(parse(text).is_err(), "{text}");
            assert!(serde_json::from_str::<serde_json::Value>(text).is_err(), "{text}");
        }
        let deep = "[".repeat(MAX_DEPTH + 1) + &"]".repeat(MAX_DEPTH + 1);
        assert_eq!(parse(&deep).unwrap_err().reason, "nested too deeply");
    }

    #[test]
    fn a_fault_leaves_the_tape_as_it_was() {
        let mut tape = Tape::default();
        let text = br#"{"a":"\n"} {"b":"\n","c":x}"#;
        parse_value(&mut tape, text, 0, 10).unwrap();
        let (nodes, chars) = (tape.nodes.len(), tape.text.len());
        let fault = parse_value(&mut tape, text, 11, text.len()).unwrap_err();
        assert_eq!((tape.nodes.len(), tape.text.len()), (nodes, chars));
        assert_eq!(fault.offset, 14);
    }

    proptest! {
        #[test]
        fn any_string_survives(text in "\\PC*|[\\x00-\\x7f]*") {
            let json = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(parse(&json).unwrap(), serde_json::Value::String(text));
        }

        // Whatever bytes come: the same verdict as serde_json, and no panic.
        #[test]
        fn the_same_verdict_as_serde_json(text in "[\\[\\]{}\",:0-9a-z\\\\ .eE+-]{0,24}") {
            prop_assert_eq!(parse(&text).is_ok(), serde_json::from_str::<serde_json::Value>(&text).is_ok());
        }
    }
}
