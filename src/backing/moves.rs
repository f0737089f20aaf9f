//! Moves: where what was alive in a segment that is being cleaned has gone.
//!
//! It is in memory that outlives the process, so that recovery undoes each cleaning that its process did not live to
//! end: what was moved is where it was before, and the segment that it was moved to holds nothing of it. A cleaning is
//! over by one word, after which what it has done stays.
//!
//! Without that a process that dies while it cleans would leave two segments in use where there was one, and a few such
//! deaths in a row no free segment at all. [`super::cleaner`] says why there is always one.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::cleaner::VICTIMS;
use super::segments::SEGMENT_BLOCKS;
use crate::durable::{DurableU32, DurableU64};
use crate::frame::BUDDIES_MAX;

/// Segments that what is alive in one may go to. It fits into one, which need not be empty at first.
const TARGETS: usize = 4;

/// Bytes of all records.
pub(crate) const MOVES_BYTES: usize = size_of::<Records>();

const _: () = assert!(TARGETS <= 1 << (31 - TARGET_SHIFT));

const TARGET_SHIFT: u32 = 16;
const BLOCK_SHIFT: u32 = 8;
const IS_MOVED: u32 = 1 << 31;

/// A segment, in one use of it. All zeros is none.
#[repr(C)]
struct Target {
    /// Its number, plus one.
    segment: DurableU64,
    sequence: DurableU64,
}

/// What is known of a segment that is being cleaned.
#[repr(C)]
pub(super) struct Move {
    /// The segment, plus one; if zero, the rest means nothing.
    victim: DurableU64,
    /// Which use of it.
    sequence: DurableU64,
    targets: [Target; TARGETS],
    /// Where each zpage is now, by block and by its place among those of the block: which target, which block of it and
    /// which granule, or zero.
    to: [[DurableU32; BUDDIES_MAX]; SEGMENT_BLOCKS as usize],
}

/// A place in the log, as records know it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot {
    /// The segment's number.
    pub(crate) segment: u32,
    /// Which use of it.
    pub(crate) sequence: u64,
    /// Which block of it.
    pub(crate) block: u32,
    /// Where in the block.
    pub(crate) granule: u8,
}

/// A zpage of a segment that was being cleaned.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Origin {
    /// The segment's number,
    pub(crate) segment: u32,
    /// and which use of it that was.
    pub(crate) sequence: u64,
    /// Which block of it.
    pub(crate) block: u32,
    /// Which zpage of the block.
    pub(crate) zpage: usize,
}

/// A record for each segment that can be in hand to be cleaned.
pub(super) type Records = [Move; VICTIMS];

/// See the module's description. One thread has segments in hand, and writes this.
#[derive(Clone, Copy)]
pub(crate) struct Moves<'a>(pub(super) &'a Records);

impl<'a> Moves<'a> {
    /// Notes that a segment in hand is being cleaned from now on, and that nothing of it was moved yet.
    pub(crate) fn begin(&self, segment: u32, sequence: u64) {
        let record = self.0.iter().find(|record| record.victim.load(Acquire) == 0);
        let record = record.expect("a segment more is cleaned than can be");
        record.clear();
        record.sequence.store(sequence, Release);
        // Last: what is above means nothing until then.
        record.victim.store(u64::from(segment) + 1, Release);
    }

    /// Notes that a zpage of a segment that is being cleaned may be somewhere else from now on. False if it is not to be
    /// moved there, because that would be too many segments.
    pub(crate) fn note(&self, victim: u32, block: u32, zpage: usize, to: Spot) -> bool {
        let record = self.of(victim);
        let Some(target) = record.target(to.segment, to.sequence) else { return false };
        record.to[block as usize][zpage].store(packed(target, to), Release);
        true
    }

    /// Notes that the cleaning of a segment is over: what was moved is where it is now.
    pub(crate) fn end(&self, victim: u32) {
        self.of(victim).victim.store(0, Release);
    }

    /// For recovery: whose place it was before that a slot points at, if it was moved by a cleaning that is not over.
    pub(crate) fn origin(&self, at: Spot) -> Option<Origin> {
        self.0.iter().find_map(|record| record.origin(at))
    }

    /// For recovery: no cleaning is under way, and no slot points at what was moved by one.
    pub(crate) fn forget(&self) {
        for record in self.0.iter().filter(|record| record.victim.load(Acquire) != 0) {
            record.victim.store(0, Release);
        }
    }

    fn of(&self, victim: u32) -> &'a Move {
        let is_it = |record: &&Move| record.victim.load(Acquire) == u64::from(victim) + 1;
        self.0.iter().find(is_it).expect("a segment is moved from that is not cleaned")
    }
}

impl Move {
    fn clear(&self) {
        self.targets.iter().for_each(|target| target.segment.store(0, Relaxed));
        // Few are there: reading costs less.
        let moved = self.to.iter().flatten().filter(|to| to.load(Relaxed) != 0);
        moved.for_each(|to| to.store(0, Relaxed));
    }

    /// A target's place among the others; it is made one if there is room.
    fn target(&self, segment: u32, sequence: u64) -> Option<usize> {
        if let Some(known) = self.known_target(segment, sequence) {
            return Some(known);
        }
        let at = self.targets.iter().position(|target| target.segment.load(Acquire) == 0)?;
        self.targets[at].sequence.store(sequence, Release);
        self.targets[at].segment.store(u64::from(segment) + 1, Release);
        Some(at)
    }

    fn known_target(&self, segment: u32, sequence: u64) -> Option<usize> {
        self.targets.iter().position(|target| {
            target.segment.load(Acquire) == u64::from(segment) + 1
                && target.sequence.load(Acquire) == sequence
        })
    }

    fn origin(&self, at: Spot) -> Option<Origin> {
        let segment = u32::try_from(self.victim.load(Acquire).checked_sub(1)?).ok()?;
        let wanted = packed(self.known_target(at.segment, at.sequence)?, at);
        let mut zpages = self.to.iter().flatten();
        let found = zpages.position(|to| to.load(Relaxed) == wanted)?;
        let (block, zpage) = ((found / BUDDIES_MAX) as u32, found % BUDDIES_MAX);
        Some(Origin { segment, sequence: self.sequence.load(Acquire), block, zpage })
    }
}

fn packed(target: usize, Spot { block, granule, .. }: Spot) -> u32 {
    IS_MOVED | (target as u32) << TARGET_SHIFT | block << BLOCK_SHIFT | u32::from(granule)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Segments;
    use crate::store::Store;

    fn segments() -> Segments {
        Segments::new(&Store::new().unwrap(), 12).unwrap()
    }

    fn spot(segment: u32, block: u32) -> Spot {
        Spot { segment, sequence: 40, block, granule: 3 }
    }

    fn origin(segment: u32, block: u32, zpage: usize) -> Option<Origin> {
        Some(Origin { segment, sequence: 7, block, zpage })
    }

    #[test]
    fn what_was_moved_is_known_until_its_cleaning_is_over() {
        let segments = segments();
        let moves = segments.moves();
        moves.begin(5, 7);
        moves.begin(6, 7);
        assert!(moves.note(5, 255, BUDDIES_MAX - 1, spot(9, 0)));
        assert!(moves.note(6, 0, 0, spot(9, 255)));
        assert_eq!(moves.origin(spot(9, 0)), origin(5, 255, BUDDIES_MAX - 1));
        assert_eq!(moves.origin(spot(9, 255)), origin(6, 0, 0));
        assert_eq!(moves.origin(spot(9, 1)), None);
        // Another segment, another use of it, and another place in its block.
        assert_eq!(moves.origin(spot(8, 0)), None);
        assert_eq!(moves.origin(Spot { sequence: 41, ..spot(9, 0) }), None);
        assert_eq!(moves.origin(Spot { granule: 4, ..spot(9, 0) }), None);
        moves.end(5);
        assert_eq!(moves.origin(spot(9, 0)), None);
        // The record is used again, and knows nothing of what was before.
        moves.begin(1, 7);
        assert_eq!(moves.origin(spot(9, 0)), None);
        assert!(moves.note(1, 2, 0, spot(9, 2)));
        assert_eq!(moves.origin(spot(9, 2)), origin(1, 2, 0));
        moves.forget();
        assert_eq!((moves.origin(spot(9, 2)), moves.origin(spot(9, 255))), (None, None));
    }

    #[test]
    fn a_segment_goes_to_a_few_others_and_to_no_more() {
        let segments = segments();
        let moves = segments.moves();
        moves.begin(5, 7);
        let targets = 10..10 + TARGETS as u32;
        assert!(targets.clone().all(|target| moves.note(5, target, 0, spot(target, 0))));
        assert!(!moves.note(5, 9, 0, spot(9, 0)));
        assert!(moves.note(5, 9, 0, spot(10, 8)));
        for target in targets {
            assert_eq!(moves.origin(spot(target, 0)), origin(5, target, 0));
        }
    }

    #[test]
    #[should_panic(expected = "more is cleaned than can be")]
    fn no_more_are_cleaned_than_there_are_records() {
        let segments = segments();
        let moves = segments.moves();
        (0..=VICTIMS as u32).for_each(|segment| moves.begin(segment, 7));
    }
}
