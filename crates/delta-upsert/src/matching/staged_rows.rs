//! The rows that a run brings, indexed by key.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use hashbrown::HashTable;

use crate::matching::precedence::{OrderRules, Precedence, compare_versions};
use crate::row::RowKey;
use crate::staging::spill::KeyAt;

/// Hashes a key that is a hash already.
#[derive(Default)]
pub(crate) struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64;
    }
}

pub(super) type ByKey<T> = HashMap<u128, T, BuildHasherDefault<Identity>>;

/// Returns true if a copy of a row wins against another of the same run.
pub(super) fn is_newer(new: &RowKey, old: &RowKey) -> bool {
    // A line out of quarantine must show that it is newer than what the export brings.
    match (new.replayed, old.replayed) {
        (true, false) => matches!(compare_versions(new, old, OrderRules::default()), Precedence::Newer),
        (false, true) => !matches!(compare_versions(old, new, OrderRules::default()), Precedence::Newer),
        _ => new.rank() > old.rank(),
    }
}

/// Rows of the run in a part of the key space.
#[derive(Default)]
pub(super) struct StagedRows {
    /// The newest copy of each id.
    pub(super) winners: Vec<KeyAt>,
    /// Indexes of them.
    pub(super) by_key: HashTable<u32>,
    /// A bit for each of some values of the keys' last bits: nearly all ids of the table are told apart by it alone, in
    /// the processor's nearest cache. Empty where it is not worth making.
    bits: Vec<u64>,
    /// Ids to delete, with the version that says so where one does; one that is in the output too is kept, unless that
    /// version is newer.
    pub(super) deletions: ByKey<Option<RowKey>>,
}

impl StagedRows {
    pub(super) fn winner(&self, key: u128) -> Option<usize> {
        self.by_key.find(key as u64, |at| self.winners[*at as usize].key == key).map(|at| *at as usize)
    }

    /// Takes an id out again.
    pub(super) fn forget(&mut self, key: u128) {
        if let Ok(found) = self.by_key.find_entry(key as u64, |at| self.winners[*at as usize].key == key) {
            found.remove();
        }
    }

    /// Sets the bits.
    pub(super) fn make_bits(&mut self) {
        let keys = self.winners.len() + self.deletions.len();
        self.bits = vec![0; (keys * Self::BITS_A_KEY / 64).next_power_of_two()];
        let keys = self.winners.iter().map(|winner| winner.key).chain(self.deletions.keys().copied());
        for key in keys {
            let (word, bit) = Self::bit(&self.bits, key);
            self.bits[word] |= bit;
        }
    }

    const BITS_A_KEY: usize = 16;

    pub(super) fn bit(bits: &[u64], key: u128) -> (usize, u64) {
        // The index by key takes the key's low half; so do these bits, but further up.
        ((key >> 70) as usize & (bits.len() - 1), 1 << ((key >> 64) as u64 & 63))
    }

    pub(super) fn has(&self, key: u128) -> bool {
        if !self.bits.is_empty() {
            let (word, bit) = Self::bit(&self.bits, key);
            if self.bits[word] & bit == 0 {
                return false;
            }
        }
        self.winner(key).is_some() || (!self.deletions.is_empty() && self.deletions.contains_key(&key))
    }

    /// Adds a copy; the one that loses against another.
    pub(super) fn add(&mut self, staged: KeyAt) -> Option<KeyAt> {
        if let Some(at) = self.winner(staged.key) {
            let best = &mut self.winners[at];
            let newer = is_newer(&staged.row_key(), &best.row_key());
            return Some(if newer { std::mem::replace(best, staged) } else { staged });
        }
        let at = self.winners.len() as u32;
        self.winners.push(staged);
        self.by_key.insert_unique(staged.key as u64, at, |at| self.winners[*at as usize].key as u64);
        None
    }
}
