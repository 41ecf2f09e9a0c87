//! A set of keys of which only a few bits are kept.

/// A split-block Bloom filter over keys that are hashes already: a key sets one bit in each of some words of one block.
/// With twelve bits a key, about one key in a hundred that was not put in is taken for one that was.
pub(crate) struct Filter {
    blocks: Vec<[u64; 8]>,
    /// Words in which a key sets a bit: the fewer, the less room there is.
    words: usize,
}

impl Filter {
    const BITS_A_KEY: u64 = 12;

    /// Room for `keys` keys, in at most `limit` bytes: with less than a key's bits, more keys are taken for others.
    pub(crate) fn new(keys: u64, limit: usize) -> Self {
        let bytes = usize::try_from(keys * Self::BITS_A_KEY / 8).unwrap_or(usize::MAX).min(limit);
        let blocks = (bytes / 64).max(1);
        let bits_a_key = blocks as u64 * 512 / keys.max(1);
        Self { blocks: vec![[0; 8]; blocks], words: (bits_a_key as usize * 7 / 10).clamp(1, 8) }
    }

    fn place(&self, key: u128) -> (usize, u64) {
        // Low half: which block. High half: which bits, past the byte that says the partition.
        let block = ((key as u64 as u128 * self.blocks.len() as u128) >> 64) as usize;
        (block, (key >> 64) as u64)
    }

    /// The bits of a key: a word of its block, and a bit in it.
    fn bits(&self, bits: u64) -> impl Iterator<Item = (usize, u64)> + use<> {
        let first = (bits >> 48) as usize;
        (0..self.words).map(move |at| ((first + at) % 8, 1 << (bits >> (at * 6) & 63)))
    }

    pub(crate) fn put(&mut self, key: u128) {
        let (block, bits) = self.place(key);
        for (word, bit) in self.bits(bits) {
            self.blocks[block][word] |= bit;
        }
    }

    /// Returns true if the key may have been put in; never `false` for one that was.
    pub(crate) fn might_contain(&self, key: u128) -> bool {
        let (block, bits) = self.place(key);
        self.bits(bits).all(|(word, bit)| self.blocks[block][word] & bit != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::key_of;

    #[test]
    fn no_key_is_forgotten_and_few_are_made_up() {
        let key = |number: u32| key_of(&number.to_le_bytes());
        for (limit, wrong) in [(usize::MAX, 0.02), (40_000, 0.35), (0, 1.0)] {
            let mut filter = Filter::new(100_000, limit);
            (0..100_000).for_each(|number| filter.put(key(number)));
            assert!((0..100_000).all(|number| filter.might_contain(key(number))));
            let made_up = (100_000..200_000).filter(|number| filter.might_contain(key(*number))).count();
            assert!(made_up as f64 <= wrong * 100_000.0, "{made_up} with {limit}");
        }
    }
}
