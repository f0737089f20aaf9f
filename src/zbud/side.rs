//! Frames in the order of how full they are, and of how recently they were used.

use crate::arena::Arena;
use crate::frame::{BUDDIES_MAX, Buddies, FRAME_GRANULES};
use crate::list::{List, Through};

const BIN_WORDS: usize = FRAME_GRANULES.div_ceil(64);

/// Frames that zpages come to be in beside each other.
pub(super) struct Side {
    /// By how many granules they have free.
    bins: Box<[List]>,
    /// A bit for each bin that is not empty.
    filled: [u64; BIN_WORDS],
    pub(super) lru: List,
}

impl Side {
    pub(super) fn new() -> Self {
        let bins = (0..FRAME_GRANULES).map(|_| List::new(Through::Bin)).collect();
        Self { bins, filled: [0; BIN_WORDS], lru: List::new(Through::Lru) }
    }

    /// The fullest frame that has `length` granules free and room for one buddy more.
    pub(super) fn partner(&self, length: usize) -> Option<u32> {
        let mut word = length / 64;
        let mut bits = self.filled.get(word)? & (!0 << (length % 64));
        while bits == 0 {
            word += 1;
            bits = *self.filled.get(word)?;
        }
        self.bins[word * 64 + bits.trailing_zeros() as usize].front()
    }

    pub(super) fn bin(&mut self, arena: &Arena, frame: u32, buddies: &Buddies) {
        if let Some(bin) = bin_of(buddies) {
            self.bins[bin].push_front(arena, frame);
            self.filled[bin / 64] |= 1 << (bin % 64);
        }
    }

    pub(super) fn unbin(&mut self, arena: &Arena, frame: u32, buddies: &Buddies) {
        if let Some(bin) = bin_of(buddies) {
            self.bins[bin].remove(arena, frame);
            if self.bins[bin].is_empty() {
                self.filled[bin / 64] &= !(1 << (bin % 64));
            }
        }
    }
}

/// The bin of a frame with these buddies; none if it can take no more.
fn bin_of(buddies: &Buddies) -> Option<usize> {
    let free = FRAME_GRANULES - buddies.used_granules();
    (free > 0 && free < FRAME_GRANULES && buddies.count() < BUDDIES_MAX).then_some(free)
}
