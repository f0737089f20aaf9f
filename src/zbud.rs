//! Zbud: the allocator that puts several zpages ("buddies") into one frame.
//!
//! After Dan Magenheimer's zbud of 2012, in which a frame held two buddies in 64-byte chunks; here
//! up to [`BUDDIES_MAX`](crate::frame::BUDDIES_MAX) share one in granules of 16 bytes, because on real heaps two a frame waste
//! a third of the memory. What is kept: no zpage crosses a frame, the frame is the unit of
//! allocation and of the LRU, ephemeral and persistent frames never mix, and zbud neither allocates
//! nor frees frames: they are handed in and handed back.
//!
//! One `Zbud` holds the frames of one class in one shard. Frames that can take another zpage are
//! binned by how many granules they have free; a zpage goes into the fullest frame that still has
//! room for it. Where the room is in several holes, the frame is compacted: its zpages are copied
//! to the shard's spare frame, without holes, and each owner's slot is changed to the copy before
//! the old frame becomes the spare. At no instant is a zpage without an intact copy that its slot
//! points at, and that is listed in its frame's table entry: so a process that dies here loses nothing. What is
//! listed and no slot points at, is not there ([`crate::recovery`]).
//!
//! A zpage that was read can be moved to frames of such zpages ([`Zbud::retire`]), which are *spent*: they are the first
//! of the LRU, and what is put comes beside them only if there is no other room. It is moved in the same order.
//!
//! Who owns a zpage is in its header, which can be corrupt like the rest of it. So whoever asks for
//! an owner compares it with the owner's slot, and a frame with a header that is wrong is closed: it
//! takes no more zpages and is neither compacted nor evicted, until its last zpage is freed.

mod lru;
mod side;

use self::side::Side;
use crate::arena::Arena;
use crate::frame::{Buddies, Extent, FrameMeta, GRANULE, Use};
use crate::handle::{Handle, PAGE_SIZE, Page};
use crate::list::{List, Through};
use crate::stats::ClassCounters;
use crate::zpage::{HEADER_BYTES, Header};

/// The largest zpage, header included, that is stored compressed: 7/8 of a frame, as in the seed
/// (`zbud_max_zsize`). Above that a page is stored raw, so that reading it costs a copy only.
pub(crate) const ZPAGE_BYTES_MAX: usize = PAGE_SIZE / 8 * 7;

/// Where a zpage was put.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Placed {
    pub(crate) frame: u32,
    pub(crate) granule: u8,
}

/// What freeing a zpage left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Freed {
    /// Bytes of the frame that the zpage took.
    pub(crate) bytes: u64,
    /// Whether it was a raw page.
    pub(crate) raw: bool,
    /// The block of the log that has a copy of it.
    pub(crate) block: Option<u32>,
    /// The frame, if nothing is left in it: it is the caller's again.
    pub(crate) frame: Option<u32>,
}

/// What was found at a place.
pub(crate) enum Fetched {
    /// A payload of so many bytes, in the scratch buffer.
    Payload(Header, usize),
    /// A raw page, in the page buffer.
    Raw(Header),
    /// A header that cannot be one.
    Corrupt,
}

/// The slots of zpages' owners, for which zbud cares by way of this.
pub(crate) trait Slots {
    /// Whether the owner's slot points at the place.
    fn names(&self, owner: Handle, placed: Placed) -> bool;

    /// Makes the owner's slot, which points at `from`, point at `to`.
    fn move_to(&self, owner: Handle, from: Placed, to: Placed);
}

/// See the module's description.
pub(crate) struct Zbud {
    class: Use,
    fresh: Side,
    /// Frames of zpages that were read since they were put, a raw page's too: the first to go.
    spent: Side,
    /// Persistent frames with a raw page: those that cost most, and are first to go of what is not spent.
    raw: List,
    /// Frames of which the log has a copy: least recently used ones, the first to go when frames are needed.
    clean: List,
    /// The time, in ticks of whoever evicts by age; it wraps.
    tick: u8,
    counters: ClassCounters,
}

impl Zbud {
    pub(crate) fn new(class: Use) -> Self {
        assert!(matches!(class, Use::Ephemeral | Use::Persistent));
        Self {
            class,
            fresh: Side::new(),
            spent: Side::new(),
            raw: List::new(Through::Lru),
            clean: List::new(Through::Lru),
            tick: 0,
            counters: ClassCounters::default(),
        }
    }

    pub(crate) fn set_tick(&mut self, tick: u8) {
        self.tick = tick;
    }

    pub(crate) fn counters(&self) -> &ClassCounters {
        &self.counters
    }

    pub(crate) fn counters_mut(&mut self) -> &mut ClassCounters {
        &mut self.counters
    }

    /// Puts a zpage (header and payload) into a frame beside others, spent ones or not, if one has room. When the
    /// frame has to be compacted for it, `spare` is exchanged and the owners' slots are changed; without a
    /// spare that is not to be had.
    pub(crate) fn place_beside(
        &mut self,
        arena: &Arena,
        is_spent: bool,
        zpage: &[u8],
        spare: &mut Option<u32>,
        slots: &impl Slots,
    ) -> Option<Placed> {
        let length = granules(zpage.len());
        // Each round but the last closes a frame.
        loop {
            let frame = self.side(is_spent).partner(length)?;
            let mut buddies = arena.meta(frame).layout.buddies();
            let hole = buddies.hole(length);
            let to = if hole.is_none() { Some((*spare)?) } else { None };
            if to.is_some() && !self.knows_owners(arena, frame, &buddies, slots) {
                self.close(arena, frame);
                continue;
            }
            self.unbin(arena, frame, &buddies);
            if buddies.count() == 1 {
                self.counters.unbuddied_count -= 1;
                self.counters.buddied_count += 1;
            }
            let (frame, offset) = match (hole, to) {
                (Some(offset), _) => (frame, offset),
                (None, Some(to)) => {
                    *spare = Some(frame);
                    (to, self.compact(arena, frame, to, &mut buddies, slots))
                }
                (None, None) => unreachable!("asked for above"),
            };
            buddies.push(Extent { offset, length });
            return Some(self.store(arena, frame, &buddies, offset, zpage));
        }
    }

    /// Puts a zpage into a frame that the caller hands over.
    pub(crate) fn place_alone(&mut self, arena: &Arena, frame: u32, zpage: &[u8]) -> Placed {
        let mut buddies = Buddies::NONE;
        buddies.push(Extent { offset: 0, length: granules(zpage.len()) });
        self.take_over(arena, frame);
        self.store(arena, frame, &buddies, 0, zpage)
    }

    /// Puts a raw page into a frame that the caller hands over.
    pub(crate) fn place_raw(
        &mut self,
        arena: &Arena,
        frame: u32,
        header: Header,
        page: &Page,
    ) -> Placed {
        self.take_over(arena, frame);
        // SAFETY: the frame was handed over and is on this class's LRU list, which only the holder
        // of the shard's lock (whence `&mut self`) gets at.
        unsafe { arena.write(frame, 0, page) };
        arena.meta(frame).layout.set_raw(header.to_bytes());
        self.push_back(arena, frame);
        self.count_stored(PAGE_SIZE as u64);
        Placed { frame, granule: 0 }
    }

    /// Takes in a frame of which zpages were found alive: those whose bit is set in `alive` are what it holds. It
    /// is the most recently used one then. For recovery.
    pub(crate) fn adopt(&mut self, arena: &Arena, frame: u32, alive: u32) {
        let meta = self.own(arena, frame);
        meta.clear_flags();
        let (raw, listed) = (meta.layout.is_raw(), meta.layout.buddies());
        let mut buddies = Buddies::NONE;
        for (at, extent) in listed.as_slice().iter().enumerate() {
            if alive & 1 << at != 0 {
                buddies.push(*extent);
            }
        }
        assert!(buddies.count() > 0, "frame {frame} is taken in with nothing alive");
        if self.class == Use::Ephemeral {
            arena.add_evictable();
        }
        self.counters.pageframes += 1;
        self.counters.zpages += buddies.count() as u64;
        self.counters.zbytes += (buddies.used_granules() * GRANULE) as u64;
        match buddies.count() {
            1 => self.counters.unbuddied_count += 1,
            _ => self.counters.buddied_count += 1,
        }
        if !raw {
            // In the same order, so that each is listed at each moment.
            meta.layout.set_buddies(&buddies);
            self.bin(arena, frame, &buddies);
        }
        self.push_back(arena, frame);
    }

    /// Copies a zpage out: a compressed payload into `scratch`, a raw page into `page`.
    pub(crate) fn fetch(
        &self,
        arena: &Arena,
        placed: Placed,
        scratch: &mut [u8; PAGE_SIZE],
        page: &mut Page,
    ) -> Fetched {
        let meta = self.own(arena, placed.frame);
        meta.set_referenced();
        if meta.layout.is_raw() {
            // SAFETY: the frame is this class's, see `place_raw`.
            unsafe { arena.read(placed.frame, 0, page) };
            return Fetched::Raw(Header::from_bytes(meta.layout.raw_header()));
        }
        let header = self.header(arena, placed);
        let start = usize::from(placed.granule) * GRANULE + HEADER_BYTES;
        let bytes = header.payload_bytes();
        if bytes > ZPAGE_BYTES_MAX - HEADER_BYTES || start + bytes > PAGE_SIZE {
            return Fetched::Corrupt;
        }
        // SAFETY: the frame is this class's, see `place_raw`.
        unsafe { arena.read(placed.frame, start, &mut scratch[..bytes]) };
        Fetched::Payload(header, bytes)
    }

    /// Frees a zpage. Its frame keeps its place in the LRU queue, unless it is empty now.
    pub(crate) fn free(&mut self, arena: &Arena, placed: Placed) -> Freed {
        let meta = self.own(arena, placed.frame);
        let raw = meta.layout.is_raw();
        let mut buddies = meta.layout.buddies();
        let block = meta.clean();
        let listed = !meta.is_closed() && !meta.is_held();
        let binned = !raw && listed && block.is_none();
        if binned {
            self.unbin(arena, placed.frame, &buddies);
        }
        let extent = buddies.take(usize::from(placed.granule));
        let extent = extent.expect("a slot points at a zpage that its frame does not know");
        let bytes = (extent.length * GRANULE) as u64;
        self.counters.zpages -= 1;
        self.counters.zbytes -= bytes;
        match buddies.count() {
            0 => self.counters.unbuddied_count -= 1,
            1 => {
                self.counters.unbuddied_count += 1;
                self.counters.buddied_count -= 1;
            }
            _ => {}
        }
        if buddies.count() > 0 {
            meta.layout.set_buddies(&buddies);
            if binned {
                self.bin(arena, placed.frame, &buddies);
            }
            return Freed { bytes, raw, block, frame: None };
        }
        if meta.is_held() {
            // Nothing else may come to be where it was, until who holds it lets it go.
            meta.layout.empty();
            return Freed { bytes, raw, block, frame: None };
        }
        if block.is_some() {
            self.clean.remove(arena, placed.frame);
            self.counters.clean_pageframes -= 1;
        } else if listed {
            self.queue(meta).remove(arena, placed.frame);
            if self.class == Use::Ephemeral {
                arena.sub_evictable();
            }
        } else {
            self.counters.closed_pageframes -= 1;
        }
        self.counters.pageframes -= 1;
        meta.reset(Use::Free);
        Freed { bytes, raw, block, frame: Some(placed.frame) }
    }

    /// Moves a zpage that was read to where such are, so that its frame holds what is yet to be read: beside others that
    /// were, or alone into a frame that is got for it. Where there is no room, and in a frame that is not to be changed, it
    /// stays. Returns its frame, if nothing is left in it.
    pub(crate) fn retire(
        &mut self,
        arena: &Arena,
        owner: Handle,
        placed: Placed,
        spare: &mut Option<u32>,
        slots: &impl Slots,
        frame: impl FnOnce() -> Option<u32>,
    ) -> Option<u32> {
        let meta = self.own(arena, placed.frame);
        if !meta.is_listed() || meta.is_spent() || self.owner(arena, placed) != owner {
            return None;
        }
        let buddies = meta.layout.buddies();
        let mut bytes = [0; ZPAGE_BYTES_MAX];
        let to = if meta.layout.is_raw() {
            None
        } else {
            let at = buddies.as_slice().iter().find(|e| e.offset == usize::from(placed.granule));
            let length = at.expect("a slot points at a zpage that its frame does not know").length;
            let zpage = &mut bytes[..length * GRANULE];
            // SAFETY: the frame is this class's, see `place_raw`.
            unsafe { arena.read(placed.frame, usize::from(placed.granule) * GRANULE, zpage) };
            let beside = self.place_beside(arena, true, zpage, spare, slots);
            beside.or_else(|| {
                let frame = if buddies.count() > 1 { frame()? } else { return None };
                Some(self.place_spent(arena, frame, zpage))
            })
        };
        let Some(to) = to else {
            if buddies.count() == 1 {
                self.set_spent(arena, placed.frame, &buddies, true);
            }
            return None;
        };
        slots.move_to(owner, placed, to);
        // That this one was read says nothing of the others.
        meta.take_referenced();
        let Freed { bytes, frame, .. } = self.free(arena, placed);
        // It was stored before.
        self.counters.cumul_zpages -= 1;
        self.counters.cumul_zbytes -= bytes;
        frame
    }

    /// A frame with what was read is one of the others again: the most recently used one.
    pub(crate) fn revive(&mut self, arena: &Arena, frame: u32) {
        let meta = self.own(arena, frame);
        if meta.is_spent() && meta.is_listed() {
            self.set_spent(arena, frame, &meta.layout.buddies(), false);
        }
    }

    /// Puts a zpage that was read into a frame of its own.
    fn place_spent(&mut self, arena: &Arena, frame: u32, zpage: &[u8]) -> Placed {
        let mut buddies = Buddies::NONE;
        buddies.push(Extent { offset: 0, length: granules(zpage.len()) });
        self.take_over(arena, frame);
        arena.meta(frame).set_spent(true);
        self.store(arena, frame, &buddies, 0, zpage)
    }

    /// Makes a frame one of those with what was read, or of the others; it is the most recently used one there.
    fn set_spent(&mut self, arena: &Arena, frame: u32, buddies: &Buddies, is_spent: bool) {
        let meta = self.own(arena, frame);
        let raw = meta.layout.is_raw();
        if !raw {
            self.unbin(arena, frame, buddies);
        }
        self.queue(meta).remove(arena, frame);
        meta.set_spent(is_spent);
        meta.take_referenced();
        if !raw {
            self.bin(arena, frame, buddies);
        }
        self.push_back(arena, frame);
    }

    fn knows_owners(&self, arena: &Arena, frame: u32, of: &Buddies, slots: &impl Slots) -> bool {
        of.as_slice().iter().all(|extent| {
            let placed = Placed { frame, granule: extent.offset as u8 };
            slots.names(self.owner(arena, placed), placed)
        })
    }

    /// Takes a frame off all lists; see the module's description.
    fn close(&mut self, arena: &Arena, frame: u32) {
        let meta = self.own(arena, frame);
        let raw = meta.layout.is_raw();
        if !raw {
            self.unbin(arena, frame, &meta.layout.buddies());
        }
        self.queue(meta).remove(arena, frame);
        if self.class == Use::Ephemeral {
            arena.sub_evictable();
        }
        meta.close();
        self.counters.closed_pageframes += 1;
    }

    /// Whose zpage lies at a place, if its header is right.
    pub(crate) fn owner(&self, arena: &Arena, placed: Placed) -> Handle {
        self.header(arena, placed).owner()
    }

    fn header(&self, arena: &Arena, placed: Placed) -> Header {
        let meta = self.own(arena, placed.frame);
        if meta.layout.is_raw() {
            return Header::from_bytes(meta.layout.raw_header());
        }
        let mut bytes = [0; HEADER_BYTES];
        // SAFETY: the frame is this class's, see `place_raw`.
        unsafe { arena.read(placed.frame, usize::from(placed.granule) * GRANULE, &mut bytes) };
        Header::from_bytes(bytes)
    }

    /// The table's entry of a frame of this class.
    fn own<'a>(&self, arena: &'a Arena, frame: u32) -> &'a FrameMeta {
        let meta = arena.meta(frame);
        assert_eq!(meta.used_for(), self.class, "frame {frame} is not of this class");
        meta
    }

    fn take_over(&mut self, arena: &Arena, frame: u32) {
        arena.meta(frame).reset(self.class);
        if self.class == Use::Ephemeral {
            arena.add_evictable();
        }
        self.counters.pageframes += 1;
        self.counters.unbuddied_count += 1;
    }

    /// Writes the zpage, and puts its frame at the most recently used end.
    fn store(
        &mut self,
        arena: &Arena,
        frame: u32,
        buddies: &Buddies,
        offset: usize,
        zpage: &[u8],
    ) -> Placed {
        // SAFETY: the frame is this class's, see `place_raw`; or the spare just turned into one.
        unsafe { arena.write(frame, offset * GRANULE, zpage) };
        self.own(arena, frame).layout.set_buddies(buddies);
        self.bin(arena, frame, buddies);
        if buddies.count() > 1 {
            self.queue(arena.meta(frame)).remove(arena, frame);
        }
        self.push_back(arena, frame);
        self.count_stored((granules(zpage.len()) * GRANULE) as u64);
        Placed { frame, granule: offset as u8 }
    }

    fn count_stored(&mut self, bytes: u64) {
        self.counters.zpages += 1;
        self.counters.zbytes += bytes;
        self.counters.cumul_zpages += 1;
        self.counters.cumul_zbytes += bytes;
    }

    /// Copies the zpages of `from` to the empty frame `to`, one after the other; returns the first
    /// free granule. `from` is then in nobody's list.
    fn compact(
        &mut self,
        arena: &Arena,
        from: u32,
        to: u32,
        buddies: &mut Buddies,
        slots: &impl Slots,
    ) -> usize {
        let is_spent = arena.meta(from).is_spent();
        arena.meta(to).reset(self.class);
        arena.meta(to).set_spent(is_spent);
        buddies.sort_by_offset();
        let mut packed = Buddies::NONE;
        let mut end = 0;
        for extent in buddies.as_slice() {
            let (source, target) = (extent.offset * GRANULE, end * GRANULE);
            // SAFETY: `from` is this class's and `to` was this shard's spare, both the lock
            // holder's.
            unsafe { arena.copy((from, source), (to, target), extent.length * GRANULE) };
            packed.push(Extent { offset: end, length: extent.length });
            end += extent.length;
        }
        // Before a slot points at any of it.
        arena.meta(to).layout.set_buddies(&packed);
        for (old, new) in buddies.as_slice().iter().zip(packed.as_slice()) {
            let old = Placed { frame: from, granule: old.offset as u8 };
            let new = Placed { frame: to, granule: new.offset as u8 };
            slots.move_to(self.owner(arena, old), old, new);
        }
        self.side(is_spent).lru.replace(arena, from, to);
        arena.meta(to).set_tick(arena.meta(from).tick());
        arena.meta(from).reset(Use::Spare);
        self.counters.compacted_pageframes += 1;
        *buddies = packed;
        end
    }

    fn bin(&mut self, arena: &Arena, frame: u32, buddies: &Buddies) {
        self.side(arena.meta(frame).is_spent()).bin(arena, frame, buddies);
    }

    fn unbin(&mut self, arena: &Arena, frame: u32, buddies: &Buddies) {
        self.side(arena.meta(frame).is_spent()).unbin(arena, frame, buddies);
    }

    fn side(&mut self, is_spent: bool) -> &mut Side {
        if is_spent { &mut self.spent } else { &mut self.fresh }
    }
}

/// Granules that so many bytes take.
pub(crate) fn granules(bytes: usize) -> usize {
    assert!(bytes > 0 && bytes <= PAGE_SIZE);
    bytes.div_ceil(GRANULE)
}

#[cfg(test)]
mod tests;
