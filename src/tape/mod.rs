//! JSON as a tape of nodes over the bytes that it came in.
//!
//! Parsers from the shelf turn numbers into floats; FHIR decimals must keep the text that was written
//! (`1.00` is not `1.0`). So a node only says where in the bytes a value stands. A tape owns nothing of
//! the input, which lets it cross an edge beside the bytes it belongs to. Objects and arrays know where
//! they end, so what nobody asks for is skipped in one step.

mod parse;

pub use parse::{Fault, MAX_DEPTH, parse_value};

/// One node, packed: 4 bits kind, 28 bits length or count, 32 bits offset or end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node(u64);

/// What a node is.
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
#[derive(Debug, Default)]
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
    /// How many nodes there are; the index of the next line's first node.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }
    /// Whether nothing was parsed yet.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
    /// The value at `index`, over the bytes that the tape was parsed from.
    #[inline]
    pub fn value<'a>(&'a self, bytes: &'a [u8], index: usize) -> Value<'a> {
        Value { tape: self, bytes, index }
    }
}

/// One JSON value on a tape.
#[derive(Clone, Copy)]
pub struct Value<'a> {
    tape: &'a Tape,
    bytes: &'a [u8],
    index: usize,
}

impl<'a> Value<'a> {
    #[inline]
    fn node(&self) -> Node {
        self.tape.nodes[self.index]
    }
    /// Its kind.
    #[inline]
    pub fn kind(&self) -> Kind {
        self.node().kind()
    }
    /// Its place on the tape: the argument of [`Tape::value`] that gives it again.
    #[inline]
    pub fn index(&self) -> usize {
        self.index
    }
    /// The bytes of a string, or `None` for another kind. They are UTF-8.
    #[inline]
    pub fn str_bytes(&self) -> Option<&'a [u8]> {
        let node = self.node();
        let at = node.position()..node.position() + node.length();
        match node.kind() {
            Kind::String => Some(&self.bytes[at]),
            Kind::Unescaped => Some(&self.tape.text[at]),
            _ => None,
        }
    }
    /// A string, or `None` for another kind.
    pub fn as_str(&self) -> Option<&'a str> {
        self.str_bytes().and_then(|bytes| std::str::from_utf8(bytes).ok())
    }
    /// The text of a number, or `None` for another kind.
    #[inline]
    pub fn number_text(&self) -> Option<&'a [u8]> {
        let node = self.node();
        (node.kind() == Kind::Number).then(|| &self.bytes[node.position()..node.position() + node.length()])
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
        Value { index, ..*self }
    }
    #[inline]
    fn end(&self) -> usize {
        match self.kind() {
            Kind::Object | Kind::Array => self.node().position(),
            _ => self.index + 1,
        }
    }
    /// Key and value pairs of an object; nothing for another kind.
    #[inline]
    pub fn entries(&self) -> Entries<'a> {
        let end = if self.kind() == Kind::Object { self.end() } else { 0 };
        Entries { tape: self.tape, bytes: self.bytes, next: self.index + 1, end }
    }
    /// Items of an array; nothing for another kind.
    #[inline]
    pub fn items(&self) -> Items<'a> {
        let end = if self.kind() == Kind::Array { self.end() } else { 0 };
        Items { tape: self.tape, bytes: self.bytes, next: self.index + 1, end }
    }
    /// The value of an object's first entry with this key.
    pub fn get(&self, key: &[u8]) -> Option<Value<'a>> {
        self.entries().find(|(name, _)| *name == key).map(|(_, value)| value)
    }
}

/// Iterator of an object's entries.
pub struct Entries<'a> {
    tape: &'a Tape,
    bytes: &'a [u8],
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
        let key = self.tape.value(self.bytes, self.next).str_bytes().unwrap_or_default();
        let value = self.tape.value(self.bytes, self.next + 1);
        self.next = value.end();
        Some((key, value))
    }
}

/// Iterator of an array's items.
pub struct Items<'a> {
    tape: &'a Tape,
    bytes: &'a [u8],
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
        let value = self.tape.value(self.bytes, self.next);
        self.next = value.end();
        Some(value)
    }
}
