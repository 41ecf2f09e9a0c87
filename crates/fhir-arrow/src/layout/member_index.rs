//! Member names of a struct, told apart by their first and last eight bytes.
//!
//! Every member of every object is looked up, so this is the encoder's innermost step: a guess that holds costs
//! three comparisons of integers, any other name a multiplication and a probe or two.

/// The names of a struct's members, by place.
#[derive(Debug, PartialEq)]
pub(crate) struct MemberIndex {
    names: Vec<Name>,
    /// Open addressing; place plus one, 0 for none. At most half full.
    table: Vec<u16>,
    shift: u32,
}

#[derive(Debug, PartialEq)]
struct Name {
    head: u64,
    tail: u64,
    text: Box<[u8]>,
}

/// A name to look for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MemberKey<'a> {
    head: u64,
    tail: u64,
    text: &'a [u8],
}

/// First and last eight bytes; of a shorter text enough to tell it from every other of its length.
#[inline]
fn ends(text: &[u8]) -> (u64, u64) {
    if let (Some(head), Some(tail)) = (text.first_chunk::<8>(), text.last_chunk::<8>()) {
        (u64::from_le_bytes(*head), u64::from_le_bytes(*tail))
    } else if let (Some(head), Some(tail)) = (text.first_chunk::<4>(), text.last_chunk::<4>()) {
        (u64::from(u32::from_le_bytes(*head)), u64::from(u32::from_le_bytes(*tail)))
    } else {
        let byte = |at: usize| u64::from(text.get(at).copied().unwrap_or(0));
        (byte(0) | byte(1) << 8 | byte(2) << 16, 0)
    }
}

impl<'a> MemberKey<'a> {
    /// The key of a member's name.
    #[inline]
    pub(crate) fn new(text: &'a [u8]) -> Self {
        let (head, tail) = ends(text);
        Self { head, tail, text }
    }

    #[inline]
    fn hash(&self, shift: u32) -> usize {
        let mixed = self.head ^ self.tail.rotate_left(29) ^ self.text.len() as u64;
        (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> shift) as usize
    }
}

impl MemberIndex {
    /// The names in the order of their places. Of two equal ones the first is found.
    pub(crate) fn new<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let name = |text: &str| {
            let (head, tail) = ends(text.as_bytes());
            Name { head, tail, text: text.as_bytes().into() }
        };
        let names: Vec<Name> = names.map(name).collect();
        let bits = (names.len() * 2).next_power_of_two().trailing_zeros().max(2);
        let mut table = vec![0; 1 << bits];
        let shift = 64 - bits;
        for (place, name) in names.iter().enumerate() {
            let mut at = MemberKey::new(&name.text).hash(shift);
            while table[at] != 0 {
                at = (at + 1) & (table.len() - 1);
            }
            // A table of Delta Lake has far fewer columns in one struct; those beyond are not found, so counted as
            // lost.
            table[at] = u16::try_from(place + 1).unwrap_or(0);
        }
        Self { names, table, shift }
    }

    /// Returns true if `key` is the name at `place`.
    #[inline]
    pub(crate) fn is(&self, place: usize, key: MemberKey<'_>) -> bool {
        let Some(name) = self.names.get(place) else { return false };
        let length = key.text.len();
        name.head == key.head
            && name.tail == key.tail
            && name.text.len() == length
            && (length <= 16 || name.text[8..length - 8] == key.text[8..length - 8])
    }

    /// The place of `key`.
    #[inline]
    pub(crate) fn find(&self, key: MemberKey<'_>) -> Option<usize> {
        let mut at = key.hash(self.shift);
        loop {
            let place = usize::from(self.table[at]).checked_sub(1)?;
            if self.is(place, key) {
                return Some(place);
            }
            at = (at + 1) & (self.table.len() - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        // Names that share heads, tails and lengths, of which some are asked for that are not there.
        #[test]
        fn finds_what_is_there_and_nothing_else(
            names in prop::collection::btree_set("[ab]{0,3}|[ab]{4,8}|effective[A-C]{0,20}Time|[a-c]{15,18}", 0..60),
            asked in prop::collection::vec("[ab]{0,3}|[ab]{4,8}|effective[A-C]{0,20}Time|[a-c]{15,18}|", 0..60),
        ) {
            let list: Vec<&str> = names.iter().map(String::as_str).collect();
            let index = MemberIndex::new(list.iter().copied());
            for (place, name) in list.iter().enumerate() {
                prop_assert_eq!(index.find(MemberKey::new(name.as_bytes())), Some(place));
                prop_assert!(index.is(place, MemberKey::new(name.as_bytes())));
            }
            for name in &asked {
                prop_assert_eq!(index.find(MemberKey::new(name.as_bytes())),
                    list.iter().position(|known| known == name));
            }
        }
    }
}
