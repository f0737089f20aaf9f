//! The slot word: where a page is now.
//!
//! The slot is the only truth about a page and its only commit point: whatever else a put has
//! written, the page has its new contents exactly when the slot word says so. A word is changed
//! by compare-and-swap and carries a generation, new with every put, so that work which left the
//! shard's lock (a write-out, an answer from a peer) can tell whether the page is still the one it
//! started from.
//!
//! ```text
//!  63            32 31      24 23           4 3    0
//! +----------------+----------+--------------+------+
//! | frame, block,  | granule  |  generation  | tag  |
//! | or fill        |          |              |      |
//! +----------------+----------+--------------+------+
//! ```
//!
//! All zeros is an empty slot, so that a zeroed frame is an object without pages.

use std::sync::atomic::Ordering;

use crate::durable::DurableU64;

const TAG_BITS: u32 = 4;
const GENERATION_BITS: u32 = 20;
const GRANULE_SHIFT: u32 = TAG_BITS + GENERATION_BITS;
const VALUE_SHIFT: u32 = 32;

const TAG_SAME: u64 = 1;
const TAG_FRAME: u64 = 2;
const TAG_LOG: u64 = 3;

const _: () = assert!(GRANULE_SHIFT + 8 == VALUE_SHIFT);

/// Generations wrap here; what is compared never lives through that many puts of one shard.
pub(crate) const GENERATION_MASK: u32 = (1 << GENERATION_BITS) - 1;

/// Where a page is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    /// In a frame, from the given granule on.
    Frame {
        /// The frame's number in the arena.
        frame: u32,
        /// Offset in the frame, in granules.
        granule: u8,
    },
    /// In a block of the log, from the given granule on, and nowhere else.
    Log {
        /// The block's number in the log.
        block: u32,
        /// Offset in the block, in granules.
        granule: u8,
    },
    /// No copy is held.
    Nowhere,
    /// Every 32-bit little-endian word of the page is this one.
    Same(u32),
}

/// One slot word, by value.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Slot(u64);

impl Slot {
    pub(crate) const EMPTY: Self = Self(0);

    /// A slot word for `place`; the generation is cut to its 20 bits.
    pub(crate) fn new(place: Place, generation: u32) -> Self {
        let (value, granule, tag) = match place {
            Place::Frame { frame, granule } => (frame, granule, TAG_FRAME),
            Place::Log { block, granule } => (block, granule, TAG_LOG),
            Place::Nowhere => return Self::EMPTY,
            Place::Same(fill) => (fill, 0, TAG_SAME),
        };
        Self(
            u64::from(value) << VALUE_SHIFT
                | u64::from(granule) << GRANULE_SHIFT
                | u64::from(generation & GENERATION_MASK) << TAG_BITS
                | tag,
        )
    }

    /// The same generation at another place: for a zpage that was moved, not rewritten.
    pub(crate) fn moved_to(self, place: Place) -> Self {
        let is_zpage = |place| matches!(place, Place::Frame { .. } | Place::Log { .. });
        assert!(is_zpage(self.place()) && is_zpage(place), "only a zpage can be moved");
        Self::new(place, self.generation())
    }

    pub(crate) fn generation(self) -> u32 {
        (self.0 >> TAG_BITS) as u32 & GENERATION_MASK
    }

    pub(crate) fn is_empty(self) -> bool {
        self == Self::EMPTY
    }

    /// Where the page is.
    ///
    /// # Panics
    ///
    /// On a tag that nobody writes: the slot table is overwritten, and going on would hand out
    /// other pages' data.
    pub(crate) fn place(self) -> Place {
        let place = self.known_place();
        place.unwrap_or_else(|| panic!("slot word {:#x} is not a slot word", self.0))
    }

    /// Where the page is; none if that is no slot word that anybody writes.
    pub(crate) fn known_place(self) -> Option<Place> {
        let value = (self.0 >> VALUE_SHIFT) as u32;
        let granule = (self.0 >> GRANULE_SHIFT) as u8;
        match self.0 & ((1 << TAG_BITS) - 1) {
            0 => self.is_empty().then_some(Place::Nowhere),
            TAG_FRAME => Some(Place::Frame { frame: value, granule }),
            TAG_LOG => Some(Place::Log { block: value, granule }),
            TAG_SAME => Some(Place::Same(value)),
            _ => None,
        }
    }
}

/// A slot word in memory that outlives the process.
#[repr(transparent)]
pub(crate) struct SlotCell(DurableU64);

impl SlotCell {
    pub(crate) fn load(&self) -> Slot {
        Slot(self.0.load(Ordering::Acquire))
    }

    /// Replaces `old` by `new`: the commit.
    ///
    /// # Panics
    ///
    /// If the word is not `old`. The caller holds the lock under which alone words change, so a
    /// mismatch means that somebody wrote without it.
    pub(crate) fn replace(&self, old: Slot, new: Slot) {
        let swapped = self.0.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire);
        assert!(swapped.is_ok(), "slot changed outside its lock: {swapped:?}, expected {old:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_survive_packing() {
        for place in [
            Place::Nowhere,
            Place::Same(0),
            Place::Same(u32::MAX),
            Place::Frame { frame: 0, granule: 0 },
            Place::Frame { frame: u32::MAX, granule: 255 },
            Place::Log { block: 0, granule: 0 },
            Place::Log { block: u32::MAX, granule: 255 },
        ] {
            assert_eq!(Slot::new(place, 77).place(), place);
        }
        assert_eq!(Slot::new(Place::Same(5), GENERATION_MASK + 3).generation(), 2);
    }

    #[test]
    fn a_move_keeps_the_generation_and_a_put_does_not() {
        let old = Slot::new(Place::Frame { frame: 1, granule: 2 }, 9);
        for place in [Place::Frame { frame: 3, granule: 4 }, Place::Log { block: 5, granule: 2 }] {
            let moved = old.moved_to(place);
            assert_eq!(moved.generation(), 9);
            assert_eq!(moved.place(), place);
        }
        assert_ne!(old, Slot::new(Place::Frame { frame: 1, granule: 2 }, 10));
    }

    #[test]
    #[should_panic(expected = "slot changed outside its lock")]
    fn a_commit_over_another_generation_is_refused() {
        let cell = SlotCell(DurableU64::new(Slot::new(Place::Same(1), 2).0));
        cell.replace(Slot::new(Place::Same(1), 1), Slot::EMPTY);
    }
}
