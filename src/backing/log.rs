//! The log: blocks by number, and whose zpages in them are alive.
//!
//! A block is number `segment * SEGMENT_BLOCKS + n`, and lies at that times 4 KiB in the backing file.
//! Slots point at blocks; the shards, which own slots, tell the log of each zpage that a slot points at
//! from now on ([`Log::enliven`]) or no longer ([`Log::deaden`]). One thread opens, takes and closes segments.
//!
//! Entries of blocks are in frames of the arena. A segment gets them when it is opened and keeps them while it is
//! in use; [`Log::trim`] gives back those of free segments.

use std::sync::Arc;

use super::block::{BLOCKS_PER_FRAME, BlockMeta};
use super::moves::{Origin, Spot};
use super::seal::{KEY_BYTES, Place, Seal};
use super::segments::{SEGMENT_BLOCKS, SEGMENT_FRAMES, Segments};
use crate::arena::Arena;
use crate::frame::{Extent, GRANULE, Use};
use crate::handle::{PAGE_SIZE, Page};
use crate::stats::LogCounters;
use crate::sync::{AtomicU64, Ordering};
use crate::zpage::Header;

/// The part of the pool limit from which on entries are worth it to clean segments for: there are as many whether a
/// segment's blocks are alive or not.
const ENTRIES_DEAR: u64 = 16;

/// See the module's description.
pub(crate) struct Log {
    arena: Arc<Arena>,
    segments: Segments,
    seal: Seal,
    /// Whether the log takes what the pool has no room for: 1 or 0.
    accepts: AtomicU64,
    /// Frames that hold entries, or are kept to.
    frames: AtomicU64,
    /// Frames that have a copy in the log.
    clean: AtomicU64,
    tally: Tally,
}

impl Log {
    /// A log; sealed by the key, or by a checksum.
    pub(crate) fn new(
        arena: Arc<Arena>,
        segments: Segments,
        key: Option<&[u8; KEY_BYTES]>,
    ) -> Self {
        let [accepts, frames, clean] = [(); 3].map(|()| AtomicU64::new(0));
        let seal = Seal::new(key);
        Self { arena, segments, seal, accepts, frames, clean, tally: Tally::new() }
    }

    /// For recovery: takes all segments in hand that have entries, claims the frames with these, and forgets what is
    /// alive. That is told next, by [`Log::find_alive`]; then [`Log::close_all`] ends it.
    pub(crate) fn recover(&self) {
        self.segments.recover(|frames| self.claim_frames(frames));
        for segment in (0..self.segments.count()).filter(|at| !self.segments.is_free(*at)) {
            (0..SEGMENT_FRAMES).for_each(|_| self.count_frame());
            let first = segment * SEGMENT_BLOCKS;
            let blocks = first..first + SEGMENT_BLOCKS;
            blocks.for_each(|block| self.entry(block).layout.deaden_all());
        }
    }

    /// Claims frames with entries, if all of them are, and are nobody else's.
    fn claim_frames(&self, frames: &[u32; SEGMENT_FRAMES]) -> bool {
        let is_free = |frame: &u32| {
            self.arena.has(*frame)
                && self.arena.meta(*frame).known_use() == Some(Use::Blocks)
                && !self.arena.meta(*frame).is_claimed()
        };
        let are_apart = frames.iter().enumerate().all(|(at, frame)| !frames[..at].contains(frame));
        let are_free = are_apart && frames.iter().all(is_free);
        if are_free {
            for frame in frames {
                self.arena.meta(*frame).claim();
            }
        }
        are_free
    }

    /// A slot points at a zpage in a block: it is counted as alive, if there is one, and no other slot has it.
    pub(crate) fn find_alive(&self, block: u32, granule: u8) -> bool {
        let segment = block / SEGMENT_BLOCKS;
        let is_known = segment < self.segments.count()
            && !self.segments.is_free(segment)
            && self.entry(block).layout.find_zpage(granule);
        if is_known {
            self.enliven(block, granule);
        }
        is_known
    }

    /// Closes what [`Log::recover`] took in hand. All slots have been looked at.
    pub(crate) fn close_all(&self) {
        // Before a segment may become free: nothing points at what was moved any more.
        self.segments.moves().forget();
        for segment in (0..self.segments.count()).filter(|at| !self.segments.is_free(*at)) {
            self.segments.close_found(segment);
        }
    }

    /// For recovery: where it was before that a slot points at, if it was moved by a cleaning that is not over.
    pub(crate) fn origin(&self, block: u32, granule: u8) -> Option<(u32, u8)> {
        let segment = block / SEGMENT_BLOCKS;
        if segment >= self.segments.count() {
            return None;
        }
        let Origin { segment, sequence, block, zpage } =
            self.segments.moves().origin(self.spot(block, granule))?;
        let is_it = segment < self.segments.count()
            && !self.segments.is_free(segment)
            && self.segments.sequence(segment) == sequence;
        if !is_it {
            return None;
        }
        let block = segment * SEGMENT_BLOCKS + block;
        let buddies = self.entry(block).layout.known_buddies()?;
        Some((block, buddies.as_slice().get(zpage)?.offset as u8))
    }

    /// Notes that a zpage of a segment that is being cleaned, by its block and its place among those of it, is moved to
    /// another block; false if it cannot be.
    pub(crate) fn note_move(&self, from: (u32, usize), block: u32, granule: u8) -> bool {
        let (victim, at) = (from.0 / SEGMENT_BLOCKS, from.0 % SEGMENT_BLOCKS);
        self.segments.moves().note(victim, at, from.1, self.spot(block, granule))
    }

    fn spot(&self, block: u32, granule: u8) -> Spot {
        let Place { sequence, block: at } = self.place(block);
        Spot { segment: block / SEGMENT_BLOCKS, sequence, block: at, granule }
    }

    pub(crate) fn segments(&self) -> &Segments {
        &self.segments
    }

    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// What it holds, and what was done for that.
    pub(crate) fn counters(&self) -> LogCounters {
        let count = |count: &AtomicU64| count.load(Ordering::Acquire);
        let tally = &self.tally;
        LogCounters {
            log_segments: self.segments.count().into(),
            log_segments_free: self.segments.free().into(),
            log_live_bytes: self.segments.live() * GRANULE as u64,
            log_written_bytes: count(&tally.written) * PAGE_SIZE as u64,
            log_cleaner_written_bytes: count(&tally.packed) * PAGE_SIZE as u64,
            log_cleaned_segments: count(&tally.cleaned),
            log_failed_jobs: count(&tally.failed),
            outstanding_writeback_pages: count(&tally.outstanding),
        }
    }

    /// Frames that hold entries of blocks, or are kept for that.
    pub(crate) fn frames(&self) -> u64 {
        self.frames.load(Ordering::Acquire)
    }

    /// Frames that have a copy in the log.
    pub(crate) fn clean(&self) -> u64 {
        self.clean.load(Ordering::Acquire)
    }

    /// Counts a frame that has one from now on,
    pub(crate) fn add_clean(&self) {
        self.clean.fetch_add(1, Ordering::AcqRel);
    }

    /// or has none any more.
    pub(crate) fn sub_clean(&self) {
        self.clean.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether a put that finds no frame may wait for the log to take some.
    pub(crate) fn accepts(&self) -> bool {
        self.accepts.load(Ordering::Acquire) != 0
    }

    pub(crate) fn set_accepts(&self, accepts: bool) {
        self.accepts.store(accepts.into(), Ordering::Release);
    }

    /// Counts a zpage in a block of a segment in hand as alive.
    pub(crate) fn enliven(&self, block: u32, granule: u8) {
        self.segments.enliven(block / SEGMENT_BLOCKS, self.extent(block, granule).length);
        self.entry(block).layout.enliven_one();
    }

    /// Counts a zpage as dead: the slot that pointed at it does so no longer.
    pub(crate) fn deaden(&self, block: u32, granule: u8) {
        let length = self.extent(block, granule).length;
        self.entry(block).layout.deaden_one();
        // Last, for the segment may be free by this.
        self.segments.deaden(block / SEGMENT_BLOCKS, length);
    }

    /// How to read a zpage that a slot points at.
    pub(crate) fn find(&self, block: u32, granule: u8) -> Found {
        let (key, raw) = (self.key_to(block), self.raw_header(block));
        Found { key, extent: self.extent(block, granule), raw }
    }

    /// The header of a block's raw page, if it holds one: in the image there is no room for it.
    pub(crate) fn raw_header(&self, block: u32) -> Option<Header> {
        let layout = &self.entry(block).layout;
        layout.is_raw().then(|| Header::from_bytes(layout.raw_header()))
    }

    /// Notes that a zpage that a slot points at was read; whether it had been since it was written there.
    pub(crate) fn note_read(&self, block: u32, granule: u8) -> bool {
        self.entry(block).layout.note_read(self.zpage(block, granule).0)
    }

    /// A zpage's place in its block.
    fn extent(&self, block: u32, granule: u8) -> Extent {
        self.zpage(block, granule).1
    }

    /// A zpage's place among those of its block, and in it.
    fn zpage(&self, block: u32, granule: u8) -> (usize, Extent) {
        let buddies = self.entry(block).layout.buddies();
        let mut zpages = buddies.as_slice().iter().copied().enumerate();
        let zpage = zpages.find(|(_, extent)| extent.offset == usize::from(granule));
        zpage.expect("a slot points at a zpage that its block does not know")
    }

    /// A block's entry. Its segment is in use.
    pub(crate) fn entry(&self, block: u32) -> &BlockMeta {
        let (segment, at) = (block / SEGMENT_BLOCKS, (block % SEGMENT_BLOCKS) as usize);
        let frames =
            self.segments.frames(segment).expect("a block of a segment that is not in use");
        let frame = frames[at / BLOCKS_PER_FRAME];
        // SAFETY: the frame is the segment's, which gave it entries when it got it and keeps it while a
        // block of it is in use.
        let entries = unsafe { self.arena.blocks(frame) };
        &entries[at % BLOCKS_PER_FRAME]
    }

    /// Seals an image that is to be written to a block of a segment in hand, for the first time since that was
    /// opened.
    pub(crate) fn seal(&self, block: u32, image: &mut Page) {
        let tag = self.seal.close(self.place(block), image);
        self.entry(block).set_tag(tag);
    }

    /// How to open an image of a block once it is read; whatever becomes of the block meanwhile.
    pub(crate) fn key_to(&self, block: u32) -> BlockKey {
        BlockKey { place: self.place(block), tag: self.entry(block).tag() }
    }

    /// Opens an image that was read; false if it is not what was written.
    pub(crate) fn unseal(&self, key: &BlockKey, image: &mut Page) -> bool {
        self.seal.open(key.place, key.tag, image)
    }

    /// Which use of a block's segment this is.
    pub(crate) fn sequence(&self, block: u32) -> u64 {
        self.segments.sequence(block / SEGMENT_BLOCKS)
    }

    fn place(&self, block: u32) -> Place {
        Place { sequence: self.sequence(block), block: block % SEGMENT_BLOCKS }
    }

    /// Takes a free segment in hand. If it has no frames for the entries of its blocks, it gets those in `hand`.
    pub(crate) fn open(&self, segment: u32, hand: &mut Vec<u32>) {
        self.segments.open(segment);
        if self.segments.frames(segment).is_none() {
            let frames = *hand.first_chunk::<SEGMENT_FRAMES>().expect("it is openable");
            hand.drain(..SEGMENT_FRAMES);
            for frame in frames {
                // SAFETY: the hand's frames were popped from the arena and are on no list.
                unsafe { self.arena.zero(frame) };
                self.arena.meta(frame).reset(Use::Blocks);
            }
            self.segments.set_frames(segment, Some(frames));
        }
        let first = segment * SEGMENT_BLOCKS;
        (first..first + SEGMENT_BLOCKS).for_each(|block| self.entry(block).layout.clear());
    }

    /// Whether entries may take frames for one segment more: half of what the pool limit allows is the most, and `least`
    /// they may always have. (It comes to that only if the limit was lowered, for a log is made with less.)
    pub(crate) fn may_grow(&self, least: u64) -> bool {
        let most = u64::from(self.arena.limit() / 2).max(least);
        self.frames() + SEGMENT_FRAMES as u64 <= most
    }

    /// Whether entries take more of the pool than is good: more than a part of what the pool limit allows.
    pub(crate) fn is_dear(&self) -> bool {
        self.frames() > u64::from(self.arena.limit()) / ENTRIES_DEAR
    }

    /// Counts a frame of the arena that is kept for entries.
    pub(crate) fn count_frame(&self) {
        self.frames.fetch_add(1, Ordering::AcqRel);
    }

    /// Gives a frame back to the arena.
    pub(crate) fn give_back(&self, frame: u32) {
        self.arena.push(frame);
        self.frames.fetch_sub(1, Ordering::AcqRel);
    }

    /// Gives back the frames of free segments, but for `keep` of them. For the thread that opens segments.
    pub(crate) fn trim(&self, keep: usize) {
        for segment in self.segments.free_with_frames().skip(keep) {
            let frames = self.segments.frames(segment).expect("it has some");
            self.segments.set_frames(segment, None);
            frames.into_iter().for_each(|frame| self.give_back(frame));
        }
    }
}

/// What was done with the backing file.
pub(crate) struct Tally {
    /// Blocks of frames.
    written: AtomicU64,
    /// Blocks that the cleaner has packed and written.
    packed: AtomicU64,
    /// Segments cleaned.
    cleaned: AtomicU64,
    /// Jobs that failed.
    failed: AtomicU64,
    /// Zpages that are being written.
    outstanding: AtomicU64,
}

impl Tally {
    fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            written: zero(),
            packed: zero(),
            cleaned: zero(),
            failed: zero(),
            outstanding: zero(),
        }
    }

    /// Counts blocks that were written, for frames or by the cleaner.
    pub(crate) fn add_written(&self, blocks: u32, by_cleaner: bool) {
        let count = if by_cleaner { &self.packed } else { &self.written };
        count.fetch_add(blocks.into(), Ordering::AcqRel);
    }

    pub(crate) fn add_cleaned(&self) {
        self.cleaned.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn add_failed(&self) {
        self.failed.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn add_outstanding(&self, zpages: usize) {
        self.outstanding.fetch_add(zpages as u64, Ordering::AcqRel);
    }

    pub(crate) fn sub_outstanding(&self, zpages: usize) {
        self.outstanding.fetch_sub(zpages as u64, Ordering::AcqRel);
    }
}

/// What is needed to read a page from an image of its block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) key: BlockKey,
    pub(crate) extent: Extent,
    /// See [`Log::raw_header`].
    pub(crate) raw: Option<Header>,
}

/// What opens the image of one block, in one use of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct BlockKey {
    place: Place,
    tag: [u8; super::block::TAG_BYTES],
}
