//! Zbud: the allocator that puts several zpages ("buddies") into one frame.
//!
//! After Dan Magenheimer's zbud of 2012, in which a frame held two buddies in 64-byte chunks; here
//! up to [`BUDDIES_MAX`] share one in granules of 16 bytes, because on real heaps two a frame waste
//! a third of the memory. What is kept: no zpage crosses a frame, the frame is the unit of
//! allocation and of the LRU, ephemeral and persistent frames never mix, and zbud neither allocates
//! nor frees frames: they are handed in and handed back.
//!
//! One `Zbud` holds the frames of one class in one shard. Frames that can take another zpage are
//! binned by how many granules they have free; a zpage goes into the fullest frame that still has
//! room for it. Where the room is in several holes, the frame is compacted: its zpages are copied
//! to the shard's spare frame, without holes, and each owner's slot is changed to the copy before
//! the old frame becomes the spare. At no instant is a zpage without an intact copy that its slot
//! points at, so a process that dies here loses nothing.

use crate::arena::Arena;
use crate::frame::{BUDDIES_MAX, Buddies, Extent, FRAME_GRANULES, FrameMeta, GRANULE, Use};
use crate::handle::{Handle, PAGE_SIZE, Page};
use crate::list::{List, Through};
use crate::stats::ClassCounters;
use crate::zpage::{HEADER_BYTES, Header};

/// The largest zpage, header included, that is stored compressed: 7/8 of a frame, as in the seed
/// (`zbud_max_zsize`). Above that a page is stored raw, so that reading it costs a copy only.
pub(crate) const ZPAGE_BYTES_MAX: usize = PAGE_SIZE / 8 * 7;

/// Second chances that one search for the least recently used frame gives.
const SECOND_CHANCES_MAX: u32 = 64;

const BIN_WORDS: usize = FRAME_GRANULES.div_ceil(64);

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

/// See the module's description.
pub(crate) struct Zbud {
    class: Use,
    bins: Box<[List]>,
    /// A bit for each bin that is not empty.
    filled: [u64; BIN_WORDS],
    lru: List,
    counters: ClassCounters,
}

impl Zbud {
    pub(crate) fn new(class: Use) -> Self {
        assert!(matches!(class, Use::Ephemeral | Use::Persistent));
        Self {
            class,
            bins: (0..FRAME_GRANULES).map(|_| List::new(Through::Bin)).collect(),
            filled: [0; BIN_WORDS],
            lru: List::new(Through::Lru),
            counters: ClassCounters::default(),
        }
    }

    pub(crate) fn counters(&self) -> &ClassCounters {
        &self.counters
    }

    pub(crate) fn counters_mut(&mut self) -> &mut ClassCounters {
        &mut self.counters
    }

    /// Puts a zpage (header and payload) into a frame beside others, if one has room. When the
    /// frame has to be compacted for it, `spare` is exchanged and `moved(owner, from, to)` is
    /// called for each zpage that was there.
    pub(crate) fn place_beside(
        &mut self,
        arena: &Arena,
        zpage: &[u8],
        spare: &mut u32,
        moved: impl FnMut(Handle, Placed, Placed),
    ) -> Option<Placed> {
        let length = granules(zpage.len());
        let frame = self.partner(length)?;
        self.unbin(arena, frame);
        let mut buddies = arena.meta(frame).buddies();
        if buddies.count() == 1 {
            self.counters.unbuddied_count -= 1;
            self.counters.buddied_count += 1;
        }
        let (frame, offset) = match buddies.hole(length) {
            Some(offset) => (frame, offset),
            None => {
                let to = std::mem::replace(spare, frame);
                let end = self.compact(arena, frame, to, &mut buddies, moved);
                (to, end)
            }
        };
        buddies.push(Extent { offset, length });
        Some(self.store(arena, frame, &buddies, offset, zpage))
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
        arena.meta(frame).set_raw(header.to_bytes());
        self.lru.push_back(arena, frame);
        self.count_stored(PAGE_SIZE as u64);
        Placed { frame, granule: 0 }
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
        if meta.is_raw() {
            // SAFETY: the frame is this class's, see `place_raw`.
            unsafe { arena.read(placed.frame, 0, page) };
            return Fetched::Raw(Header::from_bytes(meta.raw_header()));
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
        let raw = meta.is_raw();
        let mut buddies = meta.buddies();
        if !raw {
            self.unbin_if_binned(arena, placed.frame, &buddies);
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
            meta.set_buddies(&buddies);
            self.bin(arena, placed.frame, &buddies);
            return Freed { bytes, raw, frame: None };
        }
        self.lru.remove(arena, placed.frame);
        self.counters.pageframes -= 1;
        meta.reset(Use::Free);
        Freed { bytes, raw, frame: Some(placed.frame) }
    }

    /// The least recently used frame and the owners of its zpages, after giving frames that were
    /// read since a second chance.
    pub(crate) fn oldest(&mut self, arena: &Arena) -> Option<(Buddies, u32)> {
        for _ in 0..SECOND_CHANCES_MAX {
            let frame = self.lru.front()?;
            if !arena.meta(frame).take_referenced() {
                break;
            }
            self.lru.remove(arena, frame);
            self.lru.push_back(arena, frame);
        }
        let frame = self.lru.front()?;
        Some((self.own(arena, frame).buddies(), frame))
    }

    /// Whose zpage lies at a place.
    pub(crate) fn owner(&self, arena: &Arena, placed: Placed) -> Handle {
        self.header(arena, placed).owner()
    }

    fn header(&self, arena: &Arena, placed: Placed) -> Header {
        let meta = self.own(arena, placed.frame);
        if meta.is_raw() {
            return Header::from_bytes(meta.raw_header());
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
        self.own(arena, frame).set_buddies(buddies);
        self.bin(arena, frame, buddies);
        if buddies.count() > 1 {
            self.lru.remove(arena, frame);
        }
        self.lru.push_back(arena, frame);
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
        mut moved: impl FnMut(Handle, Placed, Placed),
    ) -> usize {
        arena.meta(to).reset(self.class);
        buddies.sort_by_offset();
        let mut packed = Buddies::NONE;
        let mut end = 0;
        for extent in buddies.as_slice() {
            let (source, target) = (extent.offset * GRANULE, end * GRANULE);
            // SAFETY: `from` is this class's and `to` was this shard's spare, both the lock
            // holder's.
            unsafe { arena.copy((from, source), (to, target), extent.length * GRANULE) };
            let old = Placed { frame: from, granule: extent.offset as u8 };
            moved(self.owner(arena, old), old, Placed { frame: to, granule: end as u8 });
            packed.push(Extent { offset: end, length: extent.length });
            end += extent.length;
        }
        self.lru.replace(arena, from, to);
        arena.meta(from).reset(Use::Spare);
        self.counters.compacted_pageframes += 1;
        *buddies = packed;
        end
    }

    /// The fullest frame that has `length` granules free and room for one buddy more.
    fn partner(&self, length: usize) -> Option<u32> {
        let mut word = length / 64;
        let mut bits = self.filled.get(word)? & (!0 << (length % 64));
        while bits == 0 {
            word += 1;
            bits = *self.filled.get(word)?;
        }
        self.bins[word * 64 + bits.trailing_zeros() as usize].front()
    }

    fn bin(&mut self, arena: &Arena, frame: u32, buddies: &Buddies) {
        if let Some(bin) = bin_of(buddies) {
            self.bins[bin].push_front(arena, frame);
            self.filled[bin / 64] |= 1 << (bin % 64);
        }
    }

    fn unbin(&mut self, arena: &Arena, frame: u32) {
        let buddies = self.own(arena, frame).buddies();
        self.unbin_if_binned(arena, frame, &buddies);
    }

    fn unbin_if_binned(&mut self, arena: &Arena, frame: u32, buddies: &Buddies) {
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

/// Granules that so many bytes take.
pub(crate) fn granules(bytes: usize) -> usize {
    assert!(bytes > 0 && bytes <= PAGE_SIZE);
    bytes.div_ceil(GRANULE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::PoolId;
    use crate::zpage::Encoding;

    struct Bench {
        arena: Arena,
        zbud: Zbud,
        spare: u32,
    }

    impl Bench {
        fn new() -> Self {
            let arena = Arena::new(16, 16).unwrap();
            arena.grow(16).unwrap();
            let spare = arena.pop().unwrap();
            Self { arena, zbud: Zbud::new(Use::Persistent), spare }
        }

        /// Puts a zpage of so many bytes in all; the page number is also its contents.
        fn put(&mut self, page: u64, bytes: usize) -> (Placed, Vec<(u64, Placed)>) {
            let payload = vec![page as u8; bytes - HEADER_BYTES];
            let header = Header::new(handle(page), Encoding::Lz4, &payload);
            let zpage = [&header.to_bytes()[..], &payload[..]].concat();
            let mut moves = Vec::new();
            let placed =
                self.zbud.place_beside(&self.arena, &zpage, &mut self.spare, |h, _, to| {
                    moves.push((h.page(), to))
                });
            let placed = placed.unwrap_or_else(|| {
                self.zbud.place_alone(&self.arena, self.arena.pop().unwrap(), &zpage)
            });
            (placed, moves)
        }

        fn check(&self, page: u64, placed: Placed) {
            let (mut scratch, mut out) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
            match self.zbud.fetch(&self.arena, placed, &mut scratch, &mut out) {
                Fetched::Payload(header, bytes) => {
                    assert!(header.verify(handle(page), &scratch[..bytes]));
                    assert!(scratch[..bytes].iter().all(|&b| b == page as u8));
                }
                _ => panic!("page {page} is not where it was put"),
            }
        }
    }

    fn handle(page: u64) -> Handle {
        Handle::from_page(PoolId(1), page)
    }

    #[test]
    fn the_fullest_frame_that_fits_is_chosen() {
        let mut bench = Bench::new();
        let (roomy, _) = bench.put(1, 1024);
        let (tight, _) = bench.put(2, 3500);
        assert_ne!(roomy.frame, tight.frame);
        assert_eq!(bench.put(3, 500).0.frame, tight.frame);
        assert_eq!(bench.put(4, 500).0.frame, roomy.frame);
        assert_eq!(bench.zbud.counters().buddied_count, 2);
    }

    #[test]
    #[cfg(not(feature = "seed-zbud"))]
    fn a_frame_is_compacted_when_only_its_holes_together_are_large_enough() {
        let mut bench = Bench::new();
        let (first, _) = bench.put(1, 1000);
        let (second, _) = bench.put(2, 1000);
        let (third, _) = bench.put(3, 2000);
        assert!(first.frame == second.frame && second.frame == third.frame);
        bench.zbud.free(&bench.arena, first);
        let spare = bench.spare;
        let (fourth, moves) = bench.put(4, 1072);
        assert_eq!(fourth.frame, spare);
        assert_eq!(bench.spare, first.frame);
        assert_eq!(moves.len(), 2);
        for (page, placed) in moves {
            bench.check(page, placed);
        }
        bench.check(4, fourth);
        assert_eq!(bench.zbud.counters().compacted_pageframes, 1);
        assert_eq!(bench.zbud.counters().pageframes, 1);
    }

    #[test]
    fn the_last_zpage_hands_the_frame_back() {
        let mut bench = Bench::new();
        let (first, _) = bench.put(1, 200);
        let (second, _) = bench.put(2, 100);
        assert_eq!(bench.zbud.free(&bench.arena, first).frame, None);
        bench.check(2, second);
        let freed = bench.zbud.free(&bench.arena, second);
        assert_eq!(freed.frame, Some(second.frame));
        let counters = *bench.zbud.counters();
        assert_eq!((counters.zpages, counters.zbytes, counters.pageframes), (0, 0, 0));
        assert_eq!((counters.buddied_count, counters.unbuddied_count), (0, 0));
        assert!(bench.zbud.oldest(&bench.arena).is_none());
    }

    #[test]
    fn a_read_gives_a_second_chance() {
        let mut bench = Bench::new();
        let (first, _) = bench.put(1, 3000);
        let (second, _) = bench.put(2, 3000);
        assert_eq!(bench.zbud.oldest(&bench.arena).unwrap().1, first.frame);
        bench.check(1, first);
        assert_eq!(bench.zbud.oldest(&bench.arena).unwrap().1, second.frame);
    }

    #[test]
    fn a_raw_page_fills_its_frame() {
        let mut bench = Bench::new();
        let page = [7; PAGE_SIZE];
        let header = Header::new(handle(5), Encoding::Raw, &page);
        let frame = bench.arena.pop().unwrap();
        let placed = bench.zbud.place_raw(&bench.arena, frame, header, &page);
        assert_ne!(bench.put(6, 20).0.frame, frame);
        let (mut scratch, mut out) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        match bench.zbud.fetch(&bench.arena, placed, &mut scratch, &mut out) {
            Fetched::Raw(header) => assert!(header.verify(handle(5), &out)),
            _ => panic!("not raw"),
        }
        assert_eq!(bench.zbud.owner(&bench.arena, placed), handle(5));
        let freed = bench.zbud.free(&bench.arena, placed);
        assert_eq!(freed, Freed { bytes: PAGE_SIZE as u64, raw: true, frame: Some(frame) });
    }
}
