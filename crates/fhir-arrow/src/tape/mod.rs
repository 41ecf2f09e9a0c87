//! JSON as a tape of nodes over the bytes that it came in.
//!
//! Parsers from the shelf turn numbers into floats; FHIR decimals must keep the text that was written
//! (`1.00` is not `1.0`). So a node only says where in the bytes a value stands. A tape owns nothing of
//! the input, which lets it cross an edge beside the bytes it belongs to. Objects and arrays know where
//! they end, so what nobody asks for is skipped in one step.

mod column_expansion;
mod parse;

pub use column_expansion::{expanded_size, expanded_size_limit};
pub use parse::{Fault, MAX_DEPTH, parse_value};

/// One node, packed: 4 bits kind, 28 bits length or count, 32 bits offset or end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node(u64);

/// Kind of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// `null`
    Null = 0,
    /// `false`
    False = 1,
    /// `true`
    True = 2,
    /// A number, as its text.
    Number = 3,
    /// A string without escapes: it stands in the input.
    String = 4,
    /// A string that had escapes: it stands, unescaped, in the tape's own text.
    Unescaped = 5,
    /// An object: key and value nodes alternate until its end.
    Object = 6,
    /// An array: value nodes until its end.
    Array = 7,
}

const LENGTH_BITS: u32 = 28;
/// Longest string or number, in bytes, that a node can describe.
pub const MAX_LENGTH: usize = (1 << LENGTH_BITS) - 1;

impl Node {
    fn new(kind: Kind, length: usize, position: usize) -> Self {
        debug_assert!(length <= MAX_LENGTH && u32::try_from(position).is_ok());
        Self((kind as u64) << 60 | (length as u64) << 32 | position as u64)
    }
    /// The node's kind.
    #[inline]
    pub fn kind(self) -> Kind {
        match self.0 >> 60 {
            0 => Kind::Null,
            1 => Kind::False,
            2 => Kind::True,
            3 => Kind::Number,
            4 => Kind::String,
            5 => Kind::Unescaped,
            6 => Kind::Object,
            _ => Kind::Array,
        }
    }
    #[inline]
    fn length(self) -> usize {
        (self.0 >> 32) as usize & MAX_LENGTH
    }
    #[inline]
    fn position(self) -> usize {
        self.0 as u32 as usize
    }
}

/// Tapes of the lines of one chunk, one after the other.
#[derive(Debug, Default, Clone)]
pub struct Tape {
    nodes: Vec<Node>,
    /// Text of the strings that had escapes.
    text: Vec<u8>,
}

impl Tape {
    /// Bytes of heap that the tape holds.
    pub fn heap(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>() + self.text.capacity()
    }
    /// Returns the number of nodes: the index of the next line's first node.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }
    /// Returns true if nothing was parsed yet.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
    /// The tape with the bytes that it was parsed from.
    #[inline]
    pub fn over<'a>(&'a self, bytes: &'a [u8]) -> Document<'a> {
        Document { nodes: &self.nodes, text: &self.text, bytes }
    }
}

/// A tape and the bytes that it stands for.
#[derive(Clone, Copy)]
pub struct Document<'a> {
    nodes: &'a [Node],
    text: &'a [u8],
    bytes: &'a [u8],
}

impl<'a> Document<'a> {
    /// The value at `index`.
    #[inline]
    pub fn value(&'a self, index: usize) -> Value<'a> {
        Value { document: self, index, node: self.nodes[index] }
    }
}

/// A string within the bytes that it stands in: who copies it may read past its end.
#[derive(Clone, Copy)]
pub struct Text<'a> {
    source: &'a [u8],
    at: usize,
    length: usize,
}

impl<'a> Text<'a> {
    /// Its bytes. They are UTF-8.
    #[inline]
    pub fn bytes(&self) -> &'a [u8] {
        &self.source[self.at..self.at + self.length]
    }

    /// Appends it. Most of FHIR's strings are short: those are copied at a fixed width and cut, which costs a few
    /// instructions instead of a call.
    #[inline]
    pub fn append_to(&self, out: &mut Vec<u8>) {
        const WIDTH: usize = 32;
        if self.length <= WIDTH
            && let Some(wide) = self.source.get(self.at..).and_then(|rest| rest.first_chunk::<WIDTH>())
        {
            let end = out.len() + self.length;
            out.extend_from_slice(wide);
            out.truncate(end);
        } else {
            out.extend_from_slice(self.bytes());
        }
    }
}

/// One JSON value on a tape.
#[derive(Clone, Copy)]
pub struct Value<'a> {
    document: &'a Document<'a>,
    index: usize,
    node: Node,
}

impl<'a> Value<'a> {
    /// Its kind.
    #[inline]
    pub fn kind(&self) -> Kind {
        self.node.kind()
    }
    /// Its place on the tape: the argument of [`Document::value`] that gives it again.
    #[inline]
    pub fn index(&self) -> usize {
        self.index
    }
    #[inline]
    fn slice(&self, source: &'a [u8]) -> &'a [u8] {
        &source[self.node.position()..self.node.position() + self.node.length()]
    }
    /// The bytes of a string, or `None` for another kind. They are UTF-8.
    #[inline]
    pub fn str_bytes(&self) -> Option<&'a [u8]> {
        match self.kind() {
            Kind::String => Some(self.slice(self.document.bytes)),
            Kind::Unescaped => Some(self.slice(self.document.text)),
            _ => None,
        }
    }
    /// Returns the range of a string, or `None` for another kind.
    #[inline]
    pub fn text(&self) -> Option<Text<'a>> {
        let source = match self.kind() {
            Kind::String => self.document.bytes,
            Kind::Unescaped => self.document.text,
            _ => return None,
        };
        Some(Text { source, at: self.node.position(), length: self.node.length() })
    }
    /// A string, or `None` for another kind.
    pub fn as_str(&self) -> Option<&'a str> {
        self.str_bytes().and_then(|bytes| std::str::from_utf8(bytes).ok())
    }
    /// The text of a number, or `None` for another kind.
    #[inline]
    pub fn number_text(&self) -> Option<&'a [u8]> {
        (self.kind() == Kind::Number).then(|| self.slice(self.document.bytes))
    }
    /// `true` or `false`, or `None` for another kind.
    #[inline]
    pub fn as_bool(&self) -> Option<bool> {
        match self.kind() {
            Kind::True => Some(true),
            Kind::False => Some(false),
            _ => None,
        }
    }
    /// Another value of the same tape, by its [`Value::index`].
    #[inline]
    pub fn at(&self, index: usize) -> Value<'a> {
        self.document.value(index)
    }
    /// The index after its last node.
    #[inline]
    fn end(&self) -> usize {
        if self.node.0 >> 60 >= Kind::Object as u64 { self.node.position() } else { self.index + 1 }
    }
    /// Key and value pairs of an object; nothing for another kind.
    #[inline]
    pub fn entries(&self) -> Entries<'a> {
        let end = if self.kind() == Kind::Object { self.end() } else { 0 };
        Entries { document: self.document, next: self.index + 1, end }
    }
    /// Items of an array; nothing for another kind.
    #[inline]
    pub fn items(&self) -> Items<'a> {
        let end = if self.kind() == Kind::Array { self.end() } else { 0 };
        Items { document: self.document, next: self.index + 1, end }
    }
    /// The value of an object's first entry with this key.
    pub fn get(&self, key: &[u8]) -> Option<Value<'a>> {
        self.entries().find(|(name, _)| *name == key).map(|(_, value)| value)
    }
}

/// Iterator of an object's entries.
pub struct Entries<'a> {
    document: &'a Document<'a>,
    next: usize,
    end: usize,
}

impl<'a> Iterator for Entries<'a> {
    type Item = (&'a [u8], Value<'a>);
    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.end {
            return None;
        }
        let [key, node] = *self.document.nodes.get(self.next..)?.first_chunk::<2>()?;
        let (from, length) = (key.position(), key.length());
        let source = if key.kind() == Kind::String { self.document.bytes } else { self.document.text };
        let value = Value { document: self.document, index: self.next + 1, node };
        self.next = value.end();
        Some((&source[from..from + length], value))
    }
}

/// Iterator of an array's items.
pub struct Items<'a> {
    document: &'a Document<'a>,
    next: usize,
    end: usize,
}

impl<'a> Iterator for Items<'a> {
    type Item = Value<'a>;
    #[inline]
    fn next(&mut self) -> Option<Value<'a>> {
        if self.next >= self.end {
            return None;
        }
        let value = self.document.value(self.next);
        self.next = value.end();
        Some(value)
    }
}
