//! Units: blocks that are written or read by one I/O, and the buffers for that.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::frame::{BUDDIES_MAX, Buddies, Extent, FRAME_GRANULES};
use crate::handle::{PAGE_SIZE, Page};
use crate::region::Region;
use crate::shard::Passage;
use crate::zpage::Header;

/// Blocks of a unit at most: 256 KiB.
pub(crate) const UNIT_BLOCKS: u32 = 64;

/// Blocks of a unit where the pool is small: 32 KiB, which is not so much less for a disk to do at a time.
const UNIT_BLOCKS_LEAST: u32 = 8;

/// A unit is this part of the pool limit, or less: there are some, and what they take is missing to pages.
const UNIT_PART: u64 = 512;

/// Blocks of a unit, as they were noted when the log was made; none if that cannot be. A program that noted nothing had the
/// largest.
pub(crate) fn noted_unit_blocks(noted: u64) -> Option<u32> {
    let blocks = if noted == 0 { UNIT_BLOCKS } else { u32::try_from(noted).ok()? };
    let is_one = blocks.is_power_of_two() && (UNIT_BLOCKS_LEAST..=UNIT_BLOCKS).contains(&blocks);
    is_one.then_some(blocks)
}

/// Blocks of a unit in a pool of this limit, in bytes: a power of two, so that units fill a segment. All processes that have the log
/// have the same, whatever becomes of the limit: what its buffers take is part of that.
pub(crate) fn unit_blocks(limit: u64) -> u32 {
    let blocks = limit / PAGE_SIZE as u64 / UNIT_PART;
    1 << blocks.clamp(UNIT_BLOCKS_LEAST.into(), UNIT_BLOCKS.into()).ilog2()
}

/// What becomes of a unit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum State {
    /// Nothing is in it.
    Idle,
    /// Zpages are packed into it.
    Filling,
    /// It is to be written.
    Ready,
    /// It is being written.
    Writing,
    /// It is being read.
    Reading,
}

/// Some blocks of one segment.
pub(crate) struct Unit {
    pub(crate) state: State,
    /// The first block.
    pub(crate) first: u32,
    /// How many there are.
    pub(crate) blocks: u32,
    /// When its I/O was begun, in nanoseconds.
    pub(crate) since: u64,
    /// How often its write has failed.
    pub(crate) tries: u32,
    /// How many blocks there can be, where it is.
    room: u32,
    /// How many there can be anywhere.
    most: u32,
    /// The zpages in it, with their block.
    pub(crate) passages: Vec<(u32, Passage)>,
    /// The frames that it has images of, each with its shard.
    pub(crate) frames: Vec<(usize, u32)>,
    /// Segments that zpages in it come from.
    pub(crate) sources: Vec<u32>,
    /// What was packed into which block.
    drafts: Box<[(Buddies, Option<Header>)]>,
}

impl Unit {
    /// One of so many blocks at most, with zpages from so many segments.
    pub(crate) fn new(most: u32, sources: usize) -> Self {
        let blocks = most as usize;
        Self {
            state: State::Idle,
            first: 0,
            blocks: 0,
            since: 0,
            tries: 0,
            room: 0,
            most,
            passages: Vec::with_capacity(blocks * BUDDIES_MAX),
            frames: Vec::with_capacity(blocks),
            sources: Vec::with_capacity(sources),
            drafts: vec![(Buddies::NONE, None); blocks].into(),
        }
    }

    /// Begins with blocks from `first` on; there is room for so many.
    pub(crate) fn begin(&mut self, first: u32, room: u32) {
        assert_eq!(self.state, State::Idle, "a unit is begun that is in use");
        self.state = State::Filling;
        self.first = first;
        self.room = room.min(self.most);
    }

    pub(crate) fn has_room(&self) -> bool {
        self.blocks < self.room
    }

    /// Takes the next block in use.
    pub(crate) fn add(&mut self) {
        assert!(self.has_room(), "a unit is overfull");
        self.blocks += 1;
    }

    /// Finds a place for a zpage of so many granules, or for a raw page, which has a header apart: which block of
    /// the unit, and where in it. The fullest block that it fits into is chosen.
    pub(crate) fn place(&mut self, granules: usize, raw: Option<Header>) -> Option<(u32, usize)> {
        let fits = |(buddies, raw): &(Buddies, Option<Header>)| {
            raw.is_none()
                && buddies.count() < BUDDIES_MAX
                && buddies.used_granules() + granules <= FRAME_GRANULES
        };
        let drafts = self.drafts[..self.blocks as usize].iter().enumerate();
        let partner = drafts
            .filter(|(_, draft)| raw.is_none() && fits(draft))
            .max_by_key(|(_, (buddies, _))| buddies.used_granules());
        let n = match partner {
            Some((n, _)) => n,
            None if self.has_room() => {
                let n = self.blocks as usize;
                self.add();
                self.drafts[n] = (Buddies::NONE, raw);
                n
            }
            None => return None,
        };
        let buddies = &mut self.drafts[n].0;
        let offset = buddies.used_granules();
        buddies.push(Extent { offset, length: granules });
        Some((n as u32, offset))
    }

    /// What was placed in a block.
    pub(crate) fn draft(&self, n: u32) -> &(Buddies, Option<Header>) {
        &self.drafts[n as usize]
    }

    /// Empties it.
    pub(crate) fn clear(&mut self) {
        self.state = State::Idle;
        self.blocks = 0;
        self.tries = 0;
        self.passages.clear();
        self.frames.clear();
        self.sources.clear();
    }
}

/// The buffers of all units: locked memory, page aligned.
pub(crate) struct Buffers {
    memory: Arc<Region>,
    /// Bytes of each.
    unit_bytes: usize,
    /// Whether somebody else has a unit's buffer.
    lent: Box<[bool]>,
}

impl Buffers {
    /// Of so many units, of so many blocks each.
    pub(crate) fn new(units: usize, blocks: u32) -> io::Result<Self> {
        let unit_bytes = blocks as usize * PAGE_SIZE;
        let memory = Region::new("tmem-writeback", units * unit_bytes)?;
        memory.populate(0, memory.bytes())?;
        Ok(Self { memory: Arc::new(memory), unit_bytes, lent: vec![false; units].into() })
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.memory.is_locked()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.memory.bytes() as u64
    }

    /// A unit's buffer.
    pub(crate) fn of(&self, unit: usize) -> NonNull<u8> {
        assert!(unit < self.lent.len(), "there is no unit {unit}");
        // SAFETY: the region has room for so many units.
        unsafe { self.memory.start().add(unit * self.unit_bytes) }
    }

    /// Lends a buffer to who does I/O with it.
    pub(crate) fn lend(&mut self, unit: usize) {
        assert!(!std::mem::replace(&mut self.lent[unit], true), "a buffer is lent twice");
    }

    /// It is back.
    pub(crate) fn take_back(&mut self, unit: usize) {
        assert!(
            std::mem::replace(&mut self.lent[unit], false),
            "a buffer comes back that was not lent"
        );
    }

    /// The image of a unit's block.
    pub(crate) fn image(&mut self, unit: usize, n: u32) -> &mut Page {
        let offset = n as usize * PAGE_SIZE;
        assert!(!self.lent[unit] && offset < self.unit_bytes, "not an image that can be touched");
        // SAFETY: it is in the unit's buffer, which nobody else has; references to it are made here only, by way
        // of `&mut self`.
        unsafe { self.of(unit).add(offset).cast().as_mut() }
    }
}

impl Drop for Buffers {
    /// What somebody else still reads or writes stays where it is.
    fn drop(&mut self) {
        if self.lent.contains(&true) {
            std::mem::forget(Arc::clone(&self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(not(feature = "seed-zbud"))]
    fn zpages_go_to_the_fullest_block_that_they_fit_into() {
        use crate::handle::{Handle, PoolId};
        use crate::zpage::Encoding;

        let mut unit = Unit::new(UNIT_BLOCKS, 1);
        unit.begin(512, 3);
        assert_eq!(unit.place(200, None), Some((0, 0)));
        assert_eq!(unit.place(100, None), Some((1, 0)));
        assert_eq!(unit.place(50, None), Some((0, 200)));
        assert_eq!(unit.place(7, None), Some((1, 100)));
        let raw = Header::new(Handle::from_page(PoolId(0), 1), Encoding::Raw, &[0; PAGE_SIZE]);
        assert_eq!(unit.place(FRAME_GRANULES, Some(raw)), Some((2, 0)));
        assert!(unit.draft(2).1.is_some());
        assert_eq!((unit.blocks, unit.place(200, None)), (3, None));
        assert_eq!(unit.place(FRAME_GRANULES, Some(raw)), None);
        // As many as a layout can tell of.
        let small: Vec<_> = std::iter::from_fn(|| unit.place(1, None)).collect();
        assert_eq!(small.len(), 2 * BUDDIES_MAX - 4);
        unit.clear();
        unit.begin(0, UNIT_BLOCKS + 1);
        assert_eq!((unit.place(1, None), unit.blocks), (Some((0, 0)), 1));
    }

    #[test]
    fn a_small_pool_has_small_units_and_none_has_more_blocks_than_it_can() {
        assert_eq!([0, 60 << 20, 64 << 20, 1 << 40].map(unit_blocks), [8, 16, 32, 64]);
        assert_eq!([0, 8, 64].map(noted_unit_blocks), [Some(64), Some(8), Some(64)]);
        assert_eq!([4, 9, 128, 1 << 33].map(noted_unit_blocks), [None; 4]);
        let mut unit = Unit::new(unit_blocks(0), 1);
        unit.begin(512, UNIT_BLOCKS);
        while unit.has_room() {
            unit.add();
        }
        assert_eq!(unit.blocks, 8);
    }

    #[test]
    #[cfg_attr(miri, ignore = "what is lent when it is dropped is leaked, which is meant")]
    #[should_panic(expected = "not an image that can be touched")]
    fn a_buffer_that_is_lent_cannot_be_touched() {
        let mut buffers = Buffers::new(2, 64).unwrap();
        buffers.image(1, 0)[0] = 7;
        buffers.lend(0);
        assert_eq!(buffers.image(1, 0)[0], 7);
        buffers.take_back(0);
        buffers.image(0, 63);
        buffers.lend(1);
        buffers.image(1, 0);
    }
}
