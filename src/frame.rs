//! The frame table's entry: everything known of a frame that is not in the frame.
//!
//! ```text
//!  0          8          16     20                       32
//! +----------+----------+------+------------------------+
//! | LRU links| bin links| state|          body          |
//! | prev next| prev next|      | 6 x (offset, length-1) |
//! +----------+----------+------+------------------------+
//! ```
//!
//! `state` is {use, buddies, flags, tick}, a byte each; the tick is when the frame was last at the most recently used
//! end of its queue. `body` lists the frame's zpages in granules,
//! in no order; in a frame that holds one raw page, which leaves no room for a header in the frame
//! itself, it is that header. Both together are the frame's [`Layout`], which goes with what is in
//! the frame wherever that goes. 32 bytes a frame are 0.8 % of it.
//!
//! Entries are made of relaxed atomics, which compile to plain moves, because the table is memory
//! that outlives the process: it needs no constructor and no `unsafe`. They are not how threads
//! talk to each other. An entry belongs to the shard whose lists the frame is on and is touched
//! only under that shard's lock; a free frame's LRU link belongs to the arena's free stack.

use std::sync::atomic::Ordering::Relaxed;

use crate::durable::DurableU32;
use crate::handle::PAGE_SIZE;

/// Unit of space inside a frame, in bytes. The seed's zbud used chunks of 64.
pub(crate) const GRANULE: usize = if cfg!(feature = "seed-zbud") { 64 } else { 16 };

/// Granules of a frame.
pub(crate) const FRAME_GRANULES: usize = PAGE_SIZE / GRANULE;

/// Zpages that a frame can hold. The seed's zbud held two.
pub(crate) const BUDDIES_MAX: usize = if cfg!(feature = "seed-zbud") { 2 } else { 6 };

/// No frame: the end of a list.
pub(crate) const NIL: u32 = u32::MAX;

/// Bytes of the body.
pub(crate) const BODY_BYTES: usize = 12;

const FLAG_REFERENCED: u32 = 1 << 16;
const FLAG_RAW: u32 = 1 << 17;
const FLAG_CLOSED: u32 = 1 << 18;
const FLAG_HELD: u32 = 1 << 19;
const FLAG_CLEAN: u32 = 1 << 20;
const FLAG_CLAIMED: u32 = 1 << 21;
const FLAG_SPENT: u32 = 1 << 22;
/// Of a block's zpages, those that recovery has come to, a bit each: where a frame's has other flags.
const FOUND_SHIFT: usize = 18;
const FOUND: u32 = ((1 << BUDDIES_MAX) - 1) << FOUND_SHIFT;
/// In what recovery has found of a frame: that it has memory.
const FOUND_MEMORY: u32 = 1 << 31;
const TICK_SHIFT: u32 = 24;

const _: () = assert!(size_of::<FrameMeta>() == 32);
const _: () = assert!(BUDDIES_MAX * 2 <= BODY_BYTES);
const _: () = assert!(FOUND < 1 << TICK_SHIFT);
// An entry's length is stored less one, so that a whole frame fits in a byte.
const _: () = assert!(FRAME_GRANULES <= 256);

/// What a frame is used for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Use {
    /// On the free stack, in somebody's hand, or without memory.
    Free = 0,
    /// Holds zpages of ephemeral pools.
    Ephemeral = 1,
    /// Holds zpages of persistent pools.
    Persistent = 2,
    /// Holds an object's slot words.
    Leaf = 3,
    /// A shard's spare.
    Spare = 4,
    /// Holds entries of the log's blocks.
    Blocks = 5,
}

impl Use {
    fn from_byte(byte: u8) -> Option<Self> {
        let all =
            [Self::Free, Self::Ephemeral, Self::Persistent, Self::Leaf, Self::Spare, Self::Blocks];
        all.get(usize::from(byte)).copied()
    }
}

/// Where a zpage lies in its frame, in granules.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Extent {
    pub(crate) offset: usize,
    pub(crate) length: usize,
}

impl Extent {
    pub(crate) const WHOLE: Self = Self { offset: 0, length: FRAME_GRANULES };

    pub(crate) fn end(self) -> usize {
        self.offset + self.length
    }

    pub(crate) fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    fn pack(self) -> u32 {
        assert!(self.length > 0 && self.end() <= FRAME_GRANULES, "{self:?} is not in a frame");
        self.offset as u32 | (self.length as u32 - 1) << 8
    }

    fn unpack(half: u32) -> Self {
        Self { offset: (half & 0xff) as usize, length: (half >> 8 & 0xff) as usize + 1 }
    }
}

/// The zpages of one frame, copied out of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buddies {
    extents: [Extent; BUDDIES_MAX],
    count: usize,
}

impl Buddies {
    pub(crate) const NONE: Self = Self { extents: [Extent::WHOLE; BUDDIES_MAX], count: 0 };

    pub(crate) fn as_slice(&self) -> &[Extent] {
        &self.extents[..self.count]
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    pub(crate) fn used_granules(&self) -> usize {
        self.as_slice().iter().map(|extent| extent.length).sum()
    }

    pub(crate) fn push(&mut self, extent: Extent) {
        self.extents[self.count] = extent;
        self.count += 1;
    }

    /// Which of them begins at a granule.
    pub(crate) fn position(&self, granule: u8) -> Option<usize> {
        self.as_slice().iter().position(|extent| extent.offset == usize::from(granule))
    }

    /// Takes out the zpage that starts at `offset`.
    pub(crate) fn take(&mut self, offset: usize) -> Option<Extent> {
        let at = self.as_slice().iter().position(|extent| extent.offset == offset)?;
        let extent = self.extents[at];
        self.count -= 1;
        self.extents[at] = self.extents[self.count];
        Some(extent)
    }

    pub(crate) fn sort_by_offset(&mut self) {
        self.extents[..self.count].sort_unstable_by_key(|extent| extent.offset);
    }

    /// Offset of the smallest hole that `length` granules fit into.
    ///
    /// A hole begins at the frame's start or where a zpage ends, so there are few to look at.
    pub(crate) fn hole(&self, length: usize) -> Option<usize> {
        let mut best: Option<Extent> = None;
        for start in std::iter::once(0).chain(self.as_slice().iter().map(|e| e.end())) {
            let covered = self.as_slice().iter().any(|e| e.offset <= start && start < e.end());
            let next = self.as_slice().iter().map(|e| e.offset).filter(|&o| o >= start).min();
            let end = next.unwrap_or(FRAME_GRANULES);
            let hole = Extent { offset: start, length: end - start };
            let better = best.is_none_or(|best| hole.length < best.length);
            if !covered && hole.length >= length && better {
                best = Some(hole);
            }
        }
        best.map(|hole| hole.offset)
    }
}

/// A pair of list links.
#[repr(C)]
pub(crate) struct Links {
    pub(crate) prev: DurableU32,
    pub(crate) next: DurableU32,
}

/// What lies where in 4 KiB of zpages: in a frame, or in its image on the backing file.
#[repr(C)]
pub(crate) struct Layout {
    state: DurableU32,
    body: [DurableU32; 3],
}

/// See the module's description.
#[repr(C)]
pub(crate) struct FrameMeta {
    /// The class's LRU queue; for a free frame, `next` links the free stack.
    pub(crate) lru: Links,
    /// The list of frames with as much free space as this one.
    pub(crate) bin: Links,
    pub(crate) layout: Layout,
}

impl Layout {
    /// Becomes what `other` is. What a frame's says of the frame itself stays there.
    pub(crate) fn copy_from(&self, other: &Self) {
        self.state.store(other.state.load(Relaxed) & (FLAG_RAW | 0xff00), Relaxed);
        for (word, theirs) in self.body.iter().zip(&other.body) {
            word.store(theirs.load(Relaxed), Relaxed);
        }
    }

    /// Of a block's zpages, how many slots point at; this is where a frame's has its use.
    pub(crate) fn live(&self) -> u32 {
        self.state.load(Relaxed) & 0xff
    }

    /// Notes that a block's zpage was read, by its place among them; says whether it had been before. A block's has
    /// these bits where a frame's has its tick.
    pub(crate) fn note_read(&self, zpage: usize) -> bool {
        assert!(zpage < BUDDIES_MAX, "a block has no zpage {zpage}");
        let bit = 1 << (TICK_SHIFT as usize + zpage);
        self.state.fetch_or(bit, Relaxed) & bit != 0
    }

    /// Counts none of a block's zpages as one that a slot points at.
    pub(crate) fn deaden_all(&self) {
        self.state.store(self.state.load(Relaxed) & !(0xff | FOUND), Relaxed);
    }

    /// For recovery: a slot points at a block's zpage that begins there. False if there is none, or another slot has it.
    pub(crate) fn find_zpage(&self, granule: u8) -> bool {
        let Some(buddies) = self.known_buddies() else { return false };
        let Some(zpage) = buddies.position(granule) else { return false };
        let bit = 1 << (FOUND_SHIFT + zpage);
        self.state.fetch_or(bit, Relaxed) & bit == 0
    }

    /// Counts one more of a block's zpages that a slot points at.
    pub(crate) fn enliven_one(&self) {
        self.state.fetch_add(1, Relaxed);
        debug_assert!(self.live() as usize <= BUDDIES_MAX);
    }

    /// Counts one less.
    pub(crate) fn deaden_one(&self) {
        let before = self.state.fetch_sub(1, Relaxed);
        assert!(before & 0xff > 0, "a block has less than nothing alive");
    }

    /// Forgets all buddies, and that there was a raw page.
    pub(crate) fn empty(&self) {
        self.state.store(self.state.load(Relaxed) & !(FLAG_RAW | 0xff00), Relaxed);
    }

    /// Becomes that of a frame in which nothing was ever put.
    pub(crate) fn clear(&self) {
        self.state.store(0, Relaxed);
    }

    /// Becomes that of a frame with this raw page.
    pub(crate) fn lay_out_raw(&self, header: [u8; BODY_BYTES]) {
        self.clear();
        self.set_raw(header);
    }

    /// Becomes that of a frame with these buddies.
    pub(crate) fn lay_out(&self, buddies: &Buddies) {
        self.clear();
        self.set_buddies(buddies);
    }

    pub(crate) fn buddies(&self) -> Buddies {
        let state = self.state.load(Relaxed);
        let buddies = self.known_buddies();
        buddies.unwrap_or_else(|| panic!("frame table: no frame can hold this: {state:#x}"))
    }

    /// The zpages that are listed; none if that is nothing that is ever written.
    pub(crate) fn known_buddies(&self) -> Option<Buddies> {
        let mut buddies = Buddies::NONE;
        if self.is_raw() {
            buddies.push(Extent::WHOLE);
            return Some(buddies);
        }
        let count = (self.state.load(Relaxed) >> 8 & 0xff) as usize;
        if count > BUDDIES_MAX {
            return None;
        }
        for at in 0..count {
            let pair = self.body[at / 2].load(Relaxed);
            let extent = Extent::unpack(pair >> (16 * (at % 2)) & 0xffff);
            if extent.end() > FRAME_GRANULES {
                return None;
            }
            buddies.push(extent);
        }
        Some(buddies)
    }

    /// Lists these zpages. One that was listed, and is to be, is so at each moment, for one may be the last of the
    /// process: what is beyond the new ones is left as it is, and their number comes last.
    pub(crate) fn set_buddies(&self, buddies: &Buddies) {
        assert!(!self.is_raw(), "a raw page has no buddies");
        for (word, pair) in self.body.iter().zip(buddies.as_slice().chunks(2)) {
            let halves = pair.iter().enumerate().map(|(at, extent)| extent.pack() << (16 * at));
            let kept = if pair.len() == 2 { 0 } else { word.load(Relaxed) & !0xffff };
            word.store(kept | halves.sum::<u32>(), Relaxed);
        }
        let state = self.state.load(Relaxed) & !0xff00;
        self.state.store(state | (buddies.count() as u32) << 8, Relaxed);
    }

    pub(crate) fn is_raw(&self) -> bool {
        self.state.load(Relaxed) & FLAG_RAW != 0
    }

    /// Makes the body the header of the one raw page that fills the frame.
    pub(crate) fn set_raw(&self, header: [u8; BODY_BYTES]) {
        for (word, bytes) in self.body.iter().zip(header.chunks_exact(4)) {
            word.store(u32::from_le_bytes(bytes.try_into().expect("chunks of 4")), Relaxed);
        }
        self.state.store(self.state.load(Relaxed) | FLAG_RAW | 1 << 8, Relaxed);
    }

    /// The header of the raw page.
    pub(crate) fn raw_header(&self) -> [u8; BODY_BYTES] {
        assert!(self.is_raw(), "the frame holds no raw page");
        let mut header = [0; BODY_BYTES];
        for (word, bytes) in self.body.iter().zip(header.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&word.load(Relaxed).to_le_bytes());
        }
        header
    }
}

impl FrameMeta {
    /// Declares what the frame is used for from now on; it holds no zpages.
    pub(crate) fn reset(&self, used_for: Use) {
        self.layout.state.store(used_for as u32, Relaxed);
    }

    pub(crate) fn used_for(&self) -> Use {
        let byte = self.layout.state.load(Relaxed) as u8;
        let used_for = Use::from_byte(byte);
        used_for.unwrap_or_else(|| panic!("frame table: use {byte} is none that is ever written"))
    }

    /// Marks the frame as one that is on no list, because a header in it cannot be trusted. It is so
    /// until it is reset.
    pub(crate) fn close(&self) {
        self.layout.state.store(self.layout.state.load(Relaxed) | FLAG_CLOSED, Relaxed);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.layout.state.load(Relaxed) & FLAG_CLOSED != 0
    }

    /// Makes a frame one of which a block of the log is a copy, or one of which none is. A clean frame is in no
    /// bin, so that the block's number is where those links are.
    pub(crate) fn set_clean(&self, block: Option<u32>) {
        let state = self.layout.state.load(Relaxed) & !FLAG_CLEAN;
        if let Some(block) = block {
            self.bin.next.store(block, Relaxed);
        }
        let flag = if block.is_some() { FLAG_CLEAN } else { 0 };
        self.layout.state.store(state | flag, Relaxed);
    }

    /// The block that is a copy of a clean frame.
    pub(crate) fn clean(&self) -> Option<u32> {
        let is_clean = self.layout.state.load(Relaxed) & FLAG_CLEAN != 0;
        is_clean.then(|| self.bin.next.load(Relaxed))
    }

    /// Makes a frame one of zpages that were read since they were put, or one of others.
    pub(crate) fn set_spent(&self, is_spent: bool) {
        let state = self.layout.state.load(Relaxed) & !FLAG_SPENT;
        let flag = if is_spent { FLAG_SPENT } else { 0 };
        self.layout.state.store(state | flag, Relaxed);
    }

    pub(crate) fn is_spent(&self) -> bool {
        self.layout.state.load(Relaxed) & FLAG_SPENT != 0
    }

    /// Whether it is in its class's queue, and in a bin if it can be.
    pub(crate) fn is_listed(&self) -> bool {
        self.layout.state.load(Relaxed) & (FLAG_CLOSED | FLAG_HELD | FLAG_CLEAN) == 0
    }

    pub(crate) fn set_tick(&self, tick: u8) {
        let state = self.layout.state.load(Relaxed) & !(0xff << TICK_SHIFT);
        self.layout.state.store(state | u32::from(tick) << TICK_SHIFT, Relaxed);
    }

    pub(crate) fn tick(&self) -> u8 {
        (self.layout.state.load(Relaxed) >> TICK_SHIFT) as u8
    }

    /// Forgets what somebody was doing with the frame. For recovery.
    pub(crate) fn clear_flags(&self) {
        let state = self.layout.state.load(Relaxed);
        let kept = FLAG_RAW | FLAG_REFERENCED | FLAG_CLAIMED | 0xffff;
        self.layout.state.store(state & kept, Relaxed);
    }

    /// Marks the frame as one that recovery has come to; says whether it had been. No frame is when that is over.
    pub(crate) fn claim(&self) -> bool {
        let state = self.layout.state.load(Relaxed);
        self.layout.state.store(state | FLAG_CLAIMED, Relaxed);
        state & FLAG_CLAIMED != 0
    }

    pub(crate) fn is_claimed(&self) -> bool {
        self.layout.state.load(Relaxed) & FLAG_CLAIMED != 0
    }

    pub(crate) fn unclaim(&self) {
        self.layout.state.store(self.layout.state.load(Relaxed) & !FLAG_CLAIMED, Relaxed);
    }

    /// Notes for recovery, where the links of its bin would be, that nothing in the frame was found alive yet, and whether
    /// it has memory;
    pub(crate) fn clear_found(&self, has_memory: bool) {
        self.bin.prev.store(if has_memory { FOUND_MEMORY } else { 0 }, Relaxed);
    }

    /// what was noted of that, as long as it is in no bin;
    pub(crate) fn found_memory(&self) -> bool {
        self.bin.prev.load(Relaxed) & FOUND_MEMORY != 0
    }

    /// that one of its zpages was, by its place among them, of an object of that shard. False if it cannot be, because
    /// another slot has it, or what it overlaps, or the frame is another shard's;
    pub(crate) fn find(&self, zpage: usize, shard: usize, of: &Buddies) -> bool {
        let (found, owner) = self.found();
        let it = of.as_slice()[zpage];
        let mut others = of.as_slice().iter().enumerate().filter(|(at, _)| found & 1 << at != 0);
        if found != 0 && owner != shard || others.any(|(_, other)| it.overlaps(*other)) {
            return false;
        }
        let memory = self.bin.prev.load(Relaxed) & FOUND_MEMORY;
        self.bin.prev.store(memory | found | 1 << zpage | (shard as u32) << 8, Relaxed);
        true
    }

    /// and which were, a bit each, and of which shard.
    pub(crate) fn found(&self) -> (u32, usize) {
        let found = self.bin.prev.load(Relaxed) & !FOUND_MEMORY;
        (found & 0xff, (found >> 8) as usize)
    }

    /// What it is used for, whatever is there; none if that is nothing that is ever written.
    pub(crate) fn known_use(&self) -> Option<Use> {
        Use::from_byte(self.layout.state.load(Relaxed) as u8)
    }

    /// Marks the frame as one that is on no list, because it is being written to the log, or not any
    /// more.
    pub(crate) fn set_held(&self, held: bool) {
        let state = self.layout.state.load(Relaxed);
        let state = if held { state | FLAG_HELD } else { state & !FLAG_HELD };
        self.layout.state.store(state, Relaxed);
    }

    pub(crate) fn is_held(&self) -> bool {
        self.layout.state.load(Relaxed) & FLAG_HELD != 0
    }

    /// Marks the frame as read since it was last looked at: the second-chance bit.
    pub(crate) fn set_referenced(&self) {
        let state = self.layout.state.load(Relaxed);
        // Most reads find it set already: spare the line the write.
        if state & FLAG_REFERENCED == 0 {
            self.layout.state.store(state | FLAG_REFERENCED, Relaxed);
        }
    }

    /// Clears the second-chance bit and says whether it was set.
    pub(crate) fn take_referenced(&self) -> bool {
        let state = self.layout.state.load(Relaxed);
        self.layout.state.store(state & !FLAG_REFERENCED, Relaxed);
        state & FLAG_REFERENCED != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> FrameMeta {
        let links = || Links { prev: DurableU32::new(0), next: DurableU32::new(0) };
        let body = [DurableU32::new(0), DurableU32::new(0), DurableU32::new(0)];
        let layout = Layout { state: DurableU32::new(0), body };
        FrameMeta { lru: links(), bin: links(), layout }
    }

    #[test]
    fn buddies_survive_the_table() {
        let meta = meta();
        meta.reset(Use::Persistent);
        let mut buddies = Buddies::NONE;
        let mut offset = 0;
        for length in 1..=BUDDIES_MAX {
            buddies.push(Extent { offset, length });
            offset += length;
        }
        meta.layout.set_buddies(&buddies);
        meta.set_referenced();
        assert_eq!(meta.layout.buddies().as_slice(), buddies.as_slice());
        assert_eq!(meta.used_for(), Use::Persistent);
        assert!(meta.take_referenced());
        assert!(!meta.take_referenced());
        assert_eq!(meta.layout.buddies().take(1), Some(Extent { offset: 1, length: 2 }));
    }

    #[test]
    fn a_raw_frame_carries_its_header_in_the_table() {
        let meta = meta();
        meta.reset(Use::Ephemeral);
        meta.layout.set_raw(*b"twelve bytes");
        assert_eq!(&meta.layout.raw_header(), b"twelve bytes");
        assert_eq!(meta.layout.buddies().as_slice(), [Extent::WHOLE]);
        assert_eq!(meta.used_for(), Use::Ephemeral);
        meta.reset(Use::Free);
        assert!(!meta.layout.is_raw());
    }

    #[test]
    fn what_no_frame_can_hold_is_not_listed() {
        let meta = meta();
        meta.reset(Use::Persistent);
        let last = Extent { offset: FRAME_GRANULES - 2, length: 2 };
        let mut buddies = Buddies::NONE;
        buddies.push(last);
        meta.layout.set_buddies(&buddies);
        assert_eq!(meta.layout.known_buddies().unwrap().as_slice(), [last]);
        let pair = meta.layout.body[0].load(Relaxed);
        meta.layout.body[0].store(pair + (1 << 8), Relaxed);
        assert!(meta.layout.known_buddies().is_none(), "it is longer than the frame");
        meta.layout.body[0].store(pair, Relaxed);
        meta.layout.state.fetch_or((BUDDIES_MAX as u32 + 1) << 8, Relaxed);
        assert!(meta.layout.known_buddies().is_none(), "there are too many");
    }

    #[test]
    fn a_zpage_is_found_once_and_by_one_shard() {
        let meta = meta();
        let of = |extents: &[(usize, usize)]| {
            let mut buddies = Buddies::NONE;
            extents.iter().for_each(|&(offset, length)| buddies.push(Extent { offset, length }));
            buddies
        };
        let buddies = of(&[(3, 4), (7, 1)]);
        meta.clear_found(true);
        assert!(meta.find(0, 1, &buddies));
        assert!(!meta.find(0, 1, &buddies) && !meta.find(1, 0, &buddies));
        assert!(meta.find(1, 1, &buddies));
        assert_eq!(meta.found(), (3, 1));
        assert!(meta.found_memory());
        let overlapping = of(&[(3, 4), (6, 2)]);
        meta.clear_found(false);
        assert!(meta.find(1, 1, &overlapping) && !meta.find(0, 1, &overlapping));
        assert!(!meta.found_memory());

        meta.layout.lay_out(&buddies);
        assert!(meta.layout.find_zpage(7) && !meta.layout.find_zpage(7));
        assert!(!meta.layout.find_zpage(4), "none begins there");
        meta.layout.deaden_all();
        assert!(meta.layout.find_zpage(7));
    }

    #[test]
    fn the_smallest_hole_that_fits_is_found() {
        let mut buddies = Buddies::NONE;
        assert_eq!(buddies.hole(FRAME_GRANULES), Some(0));
        buddies.push(Extent { offset: 10, length: 10 });
        assert_eq!(buddies.hole(10), Some(0));
        assert_eq!(buddies.hole(11), Some(20));
        buddies.push(Extent { offset: 25, length: FRAME_GRANULES - 25 });
        assert_eq!(buddies.hole(5), Some(20));
        assert_eq!(buddies.hole(11), None);
    }
}
