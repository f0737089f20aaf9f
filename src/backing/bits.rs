//! A set of numbers of which one is found in a few steps, however many there are.
//!
//! ```text
//! level 2                 1                     a bit a word of level 1: it has bits
//! level 1        0 1 ...                        a bit a word of level 0: it has bits
//! level 0    0..0 1..1 ...                      a bit a number
//! ```
//!
//! Anybody may add a number. One thread takes them away and looks for them. An addition that is under way
//! may be seen late, and is never lost: who clears a bit above looks below once more.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::sync::schedule_point;

const WORD: u32 = u64::BITS;

/// Levels: enough for 2^24 numbers.
const LEVELS: usize = 4;

/// See the module's description.
pub(crate) struct Bits {
    /// The lowest first; the last has one word.
    levels: Vec<Box<[AtomicU64]>>,
    count: u32,
    /// Words that were looked at to find numbers.
    #[cfg(test)]
    looks: AtomicU64,
}

impl Bits {
    /// A set of numbers below `count`: none of them, or all.
    pub(crate) fn new(count: u32, all: bool) -> Self {
        let mut levels = Vec::with_capacity(LEVELS);
        let mut bits = count;
        loop {
            let word = |n: u32| match all {
                true if (n + 1) * WORD <= bits => u64::MAX,
                true => (1 << (bits % WORD)) - 1,
                false => 0,
            };
            let words = bits.div_ceil(WORD);
            levels.push((0..words).map(|n| AtomicU64::new(word(n))).collect::<Box<[_]>>());
            if words == 1 {
                break;
            }
            bits = words;
        }
        Self {
            levels,
            count,
            #[cfg(test)]
            looks: AtomicU64::new(0),
        }
    }

    /// Bytes of memory that it takes.
    pub(crate) fn bytes(&self) -> u64 {
        let words: usize = self.levels.iter().map(|level| level.len()).sum();
        (words * size_of::<AtomicU64>()) as u64
    }

    /// Adds a number.
    pub(crate) fn add(&self, number: u32) {
        let mut at = number;
        for level in &self.levels {
            schedule_point();
            level[(at / WORD) as usize].fetch_or(1 << (at % WORD), Ordering::AcqRel);
            at /= WORD;
        }
    }

    /// Takes a number away.
    pub(crate) fn remove(&self, number: u32) {
        if self.clear(0, number) {
            self.forget(number / WORD);
        }
    }

    /// Clears a bit; true if its word has none any more.
    fn clear(&self, level: usize, at: u32) -> bool {
        schedule_point();
        let (word, bit) = (&self.levels[level][(at / WORD) as usize], 1 << (at % WORD));
        word.fetch_and(!bit, Ordering::AcqRel) & !bit == 0
    }

    /// Notes above that a word of the lowest level has no bits.
    fn forget(&self, mut at: u32) {
        for level in 1..self.levels.len() {
            let is_empty = self.clear(level, at);
            schedule_point();
            // Something may have come since it was seen to be empty, whose bit here was there already and is cleared now.
            if self.levels[level - 1][at as usize].load(Ordering::Acquire) != 0 {
                return self.add_above(level, at);
            }
            if !is_empty {
                return;
            }
            at /= WORD;
        }
    }

    /// Notes in this level and those above that a word below has bits.
    fn add_above(&self, from: usize, mut at: u32) {
        for level in &self.levels[from..] {
            level[(at / WORD) as usize].fetch_or(1 << (at % WORD), Ordering::AcqRel);
            at /= WORD;
        }
    }

    /// The first number from `from` on.
    pub(crate) fn next(&self, from: u32) -> Option<u32> {
        if from >= self.count {
            return None;
        }
        // Upwards, until something is behind where it is looked from; then down to the first there.
        let (mut level, mut at) = (0, from);
        loop {
            match self.in_word(level, at) {
                Some(found) if level == 0 => return Some(found),
                Some(found) => (level, at) = (level - 1, found * WORD),
                None => {
                    // The word behind this one.
                    at = at / WORD + 1;
                    level += 1;
                    if level == self.levels.len() || at / WORD >= self.levels[level].len() as u32 {
                        return None;
                    }
                }
            }
        }
    }

    /// The first bit from `at` on in the word of that.
    fn in_word(&self, level: usize, at: u32) -> Option<u32> {
        #[cfg(test)]
        self.looks.fetch_add(1, Ordering::Relaxed);
        let word = self.levels[level].get((at / WORD) as usize)?.load(Ordering::Acquire);
        let left = word & u64::MAX << (at % WORD);
        (left != 0).then(|| at / WORD * WORD + left.trailing_zeros())
    }

    /// How many words were looked at since this was asked last.
    #[cfg(test)]
    pub(crate) fn looks(&self) -> u64 {
        self.looks.swap(0, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn numbers_are_found_in_order_from_anywhere() {
        let mut state = 1_u32;
        let mut random = move |bound: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % bound
        };
        let large = if cfg!(miri) { 5000 } else { 1 << 18 };
        for count in [1, 63, 64, 65, 4096, 4097, large] {
            let (bits, mut model) = (Bits::new(count, false), BTreeSet::new());
            for _ in 0..if cfg!(miri) { 100 } else { 3000 } {
                let number = random(count);
                // Mostly few, so that words above come and go.
                if model.len() < 5 && random(2) == 0 {
                    bits.add(number);
                    model.insert(number);
                } else if let Some(one) = model.range(number..).next().copied() {
                    bits.remove(one);
                    model.remove(&one);
                } else {
                    bits.remove(number);
                }
                let from = random(count);
                assert_eq!(bits.next(from), model.range(from..).next().copied(), "{count}");
            }
            assert_eq!(bits.next(count), None);
        }
    }

    #[test]
    fn all_is_all_there_are() {
        let large = if cfg!(miri) { 5000 } else { 1 << 18 };
        for count in [1, 64, 65, 4096, 4097, large] {
            let bits = Bits::new(count, true);
            assert_eq!((bits.next(0), bits.next(count - 1)), (Some(0), Some(count - 1)));
            (0..count).for_each(|number| bits.remove(number));
            assert_eq!(bits.next(0), None);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "it takes minutes there")]
    fn one_of_many_is_found_in_a_few_steps() {
        let count = 1 << 18;
        let bits = Bits::new(count, false);
        for number in [0, 1, 63, 64, 100_000, count - 1] {
            bits.add(number);
            bits.looks();
            assert_eq!(bits.next(0), Some(number));
            assert!(bits.looks() <= 5);
            bits.remove(number);
            assert_eq!(bits.next(0), None);
            assert!(bits.looks() <= 3);
        }
        assert_eq!(bits.bytes(), (4096 + 64 + 1) * 8);
    }

    /// Step by step, for it is rare.
    #[test]
    fn what_is_added_while_its_word_is_seen_to_be_empty_is_found() {
        let bits = Bits::new(1 << 18, false);
        bits.add(64);
        assert!(bits.clear(0, 64));
        bits.add(70);
        bits.forget(1);
        assert_eq!(bits.next(0), Some(70));
        // The same a level higher: another word has come.
        assert!(bits.clear(0, 70) && bits.clear(1, 1));
        bits.add(130);
        bits.forget(1);
        assert_eq!((bits.next(0), bits.next(131)), (Some(130), None));
        bits.remove(130);
        assert_eq!(bits.next(0), None);
        assert!(
            bits.levels.iter().all(|level| level.iter().all(|w| w.load(Ordering::Relaxed) == 0))
        );
    }
}
