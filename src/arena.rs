//! The arena: all frames, and the only place that allocates or frees one.
//!
//! Frames live in one memory file that is reserved at its largest and backed with memory in steps,
//! ahead of demand, by [`Arena::grow`]; [`Arena::release`] gives memory back. Neither is called on
//! the I/O path. What the I/O path does is [`Arena::pop`] and [`Arena::push`] on the free stack: a
//! Treiber stack of frame numbers with a tag against ABA, without a lock and without a system call.
//!
//! Frames are conserved: a frame with memory is either on the free stack or was popped and not yet
//! pushed. `allocated - free` is therefore what the rest of the engine must be able to account for.
//!
//! Reading and writing a frame's bytes is `unsafe` here, because only the shard that owns the frame
//! may do it, and the arena does not know owners.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use crate::backing::{BLOCKS_PER_FRAME, BlockMeta};
use crate::frame::{FrameMeta, NIL, Use};
use crate::handle::{OBJECT_PAGES, PAGE_SIZE};
use crate::region::Region;
use crate::slot::SlotCell;
use crate::store::Store;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering};

/// Frames by which the arena grows and shrinks at a time: 1 MiB.
pub(crate) const STEP_FRAMES: u32 = 256;

const META_BYTES: usize = size_of::<FrameMeta>();

const _: () = assert!(PAGE_SIZE.is_multiple_of(META_BYTES));
const _: () = assert!(BLOCKS_PER_FRAME * size_of::<BlockMeta>() == PAGE_SIZE);
const _: () = assert!(OBJECT_PAGES as usize * size_of::<SlotCell>() == PAGE_SIZE);

/// The slot words of one object: a frame full.
pub(crate) type Leaf = [SlotCell; OBJECT_PAGES as usize];

/// See the module's description.
pub(crate) struct Arena {
    frames: Region,
    table: Region,
    frames_max: u32,
    stack: Stack,
    allocated: AtomicU64,
    limit: AtomicU64,
    /// Frames that can be had by evicting what is ephemeral in them.
    evictable: AtomicU64,
    /// Frames from this number on have no memory, as far as recovery has found.
    found: AtomicU64,
    /// Frames from this number on never had memory. Changes only under `backing`.
    top: AtomicU64,
    backing: Mutex<Backing>,
}

/// The free stack. Every thread writes it, so it has its cache lines to itself.
#[repr(align(128))]
struct Stack {
    /// {tag, number of the first frame}, 32 bits each.
    head: AtomicU64,
    /// Frames on it.
    free: AtomicU64,
}

/// Frames of a store that a new process takes in, in the order of their numbers: those between the last one and the
/// next have no memory.
pub(crate) struct Adoption<'a> {
    arena: &'a Arena,
    backing: MutexGuard<'a, Backing>,
    last_hole: u32,
}

impl Adoption<'_> {
    /// Takes in a frame that is in use.
    pub(crate) fn take_used(&mut self, frame: u32) {
        for hole in self.arena.top()..frame {
            let meta = self.arena.meta(hole);
            meta.reset(Use::Free);
            meta.lru.next.store(NIL, Relaxed);
            // In ascending order, so that growing finds runs.
            match self.last_hole {
                NIL => self.backing.holes = hole,
                last => self.arena.meta(last).lru.next.store(hole, Relaxed),
            }
            self.last_hole = hole;
        }
        self.arena.top.store(u64::from(frame) + 1, Ordering::Release);
        self.arena.allocated.fetch_add(1, Ordering::AcqRel);
    }

    /// Takes in a frame that is free.
    pub(crate) fn take_free(&mut self, frame: u32) {
        self.take_used(frame);
        self.arena.push(frame);
    }
}

/// Which frames have no memory. Held while the kernel looks for memory, so only growing and
/// releasing wait for it.
struct Backing {
    /// First of the frames whose memory was given back, linked like the free stack.
    holes: u32,
}

impl Arena {
    /// The arena of a store that was made for `frames_max` frames, with a limit of `limit` for now. It has no frames:
    /// those that are in the store already have to be taken in by [`crate::recovery`].
    pub(crate) fn new(store: &Store, frames_max: u32, limit: u32) -> io::Result<Self> {
        assert!(limit <= frames_max);
        Ok(Self {
            frames: store.frames(frames_max)?,
            table: store.table(frames_max)?,
            frames_max,
            stack: Stack { head: AtomicU64::new(u64::from(NIL)), free: AtomicU64::new(0) },
            allocated: AtomicU64::new(0),
            limit: AtomicU64::new(u64::from(limit)),
            evictable: AtomicU64::new(0),
            found: AtomicU64::new(0),
            top: AtomicU64::new(0),
            backing: Mutex::new(Backing { holes: NIL }),
        })
    }

    /// The same, with a store of its own.
    #[cfg(test)]
    pub(crate) fn alone(frames_max: u32, limit: u32) -> io::Result<Self> {
        let store = Store::new()?;
        store.format(crate::store::Geometry { frames_max, shards: 1, limit_max: 0 })?;
        Self::new(&store, frames_max, limit)
    }

    /// Frames with memory behind them.
    pub(crate) fn allocated(&self) -> u32 {
        self.allocated.load(Ordering::Acquire) as u32
    }

    /// Frames on the free stack. Exact when nobody pops or pushes.
    pub(crate) fn free(&self) -> u32 {
        self.stack.free.load(Ordering::Acquire) as u32
    }

    /// Frames that can be had by evicting what is ephemeral in them.
    pub(crate) fn evictable(&self) -> u32 {
        self.evictable.load(Ordering::Acquire) as u32
    }

    /// Counts one that there is from now on,
    pub(crate) fn add_evictable(&self) {
        self.evictable.fetch_add(1, Ordering::AcqRel);
    }

    /// or is no more.
    pub(crate) fn sub_evictable(&self) {
        self.evictable.fetch_sub(1, Ordering::AcqRel);
    }

    pub(crate) fn limit(&self) -> u32 {
        self.limit.load(Ordering::Acquire) as u32
    }

    /// Frames that there is room for.
    pub(crate) fn frames_max(&self) -> u32 {
        self.frames_max
    }

    pub(crate) fn set_limit(&self, frames: u32) {
        assert!(frames <= self.frames_max);
        self.limit.store(u64::from(frames), Ordering::Release);
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.frames.is_locked() && self.table.is_locked()
    }

    /// Bytes of memory behind the frame table.
    pub(crate) fn table_bytes(&self) -> u64 {
        (self.top() as usize * META_BYTES).next_multiple_of(PAGE_SIZE) as u64
    }

    /// For recovery: whether there is a frame of that number among those that were found. One that has no memory is a
    /// free one.
    pub(crate) fn has(&self, frame: u32) -> bool {
        u64::from(frame) < self.found.load(Ordering::Acquire)
    }

    fn top(&self) -> u32 {
        self.top.load(Ordering::Acquire) as u32
    }

    /// The table's entry for a frame.
    pub(crate) fn meta(&self, frame: u32) -> &FrameMeta {
        assert!(frame < self.frames_max, "frame {frame} is not in the arena");
        // SAFETY: the table has an entry for each of `frames_max` frames, page-aligned at its
        // start; an entry consists of atomics, for which every bit pattern is valid.
        unsafe { self.table.start().cast::<FrameMeta>().add(frame as usize).as_ref() }
    }

    /// Takes a free frame, unless there is none or as many as the limit allows are in use. Its
    /// contents are whatever was there last.
    pub(crate) fn pop(&self) -> Option<u32> {
        let in_use = self.allocated().saturating_sub(self.free());
        if in_use >= self.limit() {
            return None;
        }
        self.pop_any()
    }

    /// The same whatever the limit, for what is in use all the time.
    pub(crate) fn pop_any(&self) -> Option<u32> {
        let mut head = self.stack.head.load(Ordering::Acquire);
        loop {
            let frame = head as u32;
            if frame == NIL {
                return None;
            }
            // Another thread may have popped this frame and be using the link for something
            // else; then the tag has changed and the exchange fails.
            let next = self.meta(frame).lru.next.load(Relaxed);
            match self.exchange_head(head, next) {
                Ok(()) => {
                    self.stack.free.fetch_sub(1, Ordering::AcqRel);
                    debug_assert_eq!(self.meta(frame).used_for(), Use::Free);
                    return Some(frame);
                }
                Err(now) => head = now,
            }
        }
    }

    /// Puts a frame on the free stack. The caller owned it and forgets it.
    pub(crate) fn push(&self, frame: u32) {
        let meta = self.meta(frame);
        assert!(
            !meta.is_claimed(),
            "frame {frame} is freed, and recovery has found something in it"
        );
        meta.reset(Use::Free);
        // Counted before it can be popped, so that the count never wraps below zero.
        self.stack.free.fetch_add(1, Ordering::AcqRel);
        let mut head = self.stack.head.load(Ordering::Acquire);
        loop {
            meta.lru.next.store(head as u32, Relaxed);
            match self.exchange_head(head, frame) {
                Ok(()) => return,
                Err(now) => head = now,
            }
        }
    }

    fn exchange_head(&self, old: u64, frame: u32) -> Result<(), u64> {
        let tag = ((old >> 32) as u32).wrapping_add(1);
        let new = u64::from(tag) << 32 | u64::from(frame);
        self.stack.head.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }

    /// Puts memory behind up to `count` more frames within the limit and makes them free; returns
    /// how many. May block in the kernel, or fail when it has no memory.
    pub(crate) fn grow(&self, count: u32) -> io::Result<u32> {
        let mut backing = self.backing.lock();
        let room = self.limit().saturating_sub(self.allocated());
        let mut grown = 0;
        while grown < count.min(room) {
            let (first, run) = self.next_unbacked(&backing, count.min(room) - grown);
            self.back(&mut backing, first, run)?;
            for frame in first..first + run {
                // In this order: frames in use are `allocated - free`, and a frame that is on its
                // way in must not look like one that is used up.
                self.push(frame);
                self.allocated.fetch_add(1, Ordering::AcqRel);
            }
            grown += run;
        }
        Ok(grown)
    }

    /// Gets one more frame, though there are as many as the limit allows. For what is needed once, at a time
    /// when there is memory: it may block in the kernel.
    pub(crate) fn grow_beyond(&self) -> io::Result<u32> {
        let mut backing = self.backing.lock();
        if let Some(frame) = self.pop_any() {
            return Ok(frame);
        }
        let (frame, _) = self.next_unbacked(&backing, 1);
        self.back(&mut backing, frame, 1)?;
        self.allocated.fetch_add(1, Ordering::AcqRel);
        Ok(frame)
    }

    /// The next run of consecutive frames without memory: holes first, so that the table and the
    /// file stay small. It is not taken yet.
    fn next_unbacked(&self, backing: &Backing, want: u32) -> (u32, u32) {
        if backing.holes == NIL {
            let top = self.top();
            assert!(top < self.frames_max, "below the limit, yet no frame is left to back");
            return (top, want.min(self.frames_max - top));
        }
        let mut run = 1;
        let mut last = backing.holes;
        while run < want && self.meta(last).lru.next.load(Relaxed) == last + 1 {
            last += 1;
            run += 1;
        }
        (backing.holes, run)
    }

    fn back(&self, backing: &mut Backing, first: u32, run: u32) -> io::Result<()> {
        let past = first + run;
        let is_new = backing.holes == NIL;
        if is_new {
            let from = (first as usize * META_BYTES).next_multiple_of(PAGE_SIZE);
            let to = (past as usize * META_BYTES).next_multiple_of(PAGE_SIZE);
            if to > from {
                self.table.populate(from, to - from)?;
            }
        }
        self.frames.populate(first as usize * PAGE_SIZE, run as usize * PAGE_SIZE)?;
        if is_new {
            self.top.store(u64::from(past), Ordering::Release);
        } else {
            backing.holes = self.meta(past - 1).lru.next.load(Relaxed);
        }
        // What its entry said of a frame without memory nobody has looked at, and in a store that was found it may be damaged.
        (first..past).for_each(|frame| self.meta(frame).reset(Use::Free));
        Ok(())
    }

    /// Gives the memory of up to `count` free frames back to the system; returns how many.
    pub(crate) fn release(&self, count: u32) -> io::Result<u32> {
        let mut backing = self.backing.lock();
        let mut frames = [NIL; STEP_FRAMES as usize];
        let mut taken = 0;
        while taken < (count as usize).min(frames.len()) {
            // In this order, for the same reason as in `grow`: else a put sees a full pool.
            self.allocated.fetch_sub(1, Ordering::AcqRel);
            let Some(frame) = self.pop_any() else {
                self.allocated.fetch_add(1, Ordering::AcqRel);
                break;
            };
            frames[taken] = frame;
            taken += 1;
        }
        let frames = &mut frames[..taken];
        frames.sort_unstable();
        let mut released = 0;
        // From the end, so that the list of holes comes out in ascending order.
        for run in frames.chunk_by(|a, b| a + 1 == *b).rev() {
            if let Err(error) = self.release_run(&mut backing, run) {
                let left = frames.len() - released;
                for &frame in &frames[..left] {
                    self.push(frame);
                    self.allocated.fetch_add(1, Ordering::AcqRel);
                }
                return Err(error);
            }
            released += run.len();
        }
        Ok(released as u32)
    }

    fn release_run(&self, backing: &mut Backing, run: &[u32]) -> io::Result<()> {
        self.frames.release(run[0] as usize * PAGE_SIZE, run.len() * PAGE_SIZE)?;
        for &frame in run.iter().rev() {
            self.meta(frame).lru.next.store(backing.holes, Relaxed);
            backing.holes = frame;
        }
        Ok(())
    }

    /// Makes the frames that have memory, from number `from` on, and their entries be at hand: see
    /// [`Region::bring_in`]. Returns the number past the last of them.
    pub(crate) fn bring_in(&self, from: u32) -> io::Result<u32> {
        let mut at = from as usize * PAGE_SIZE;
        while let Some((first, past)) = self.frames.populated(at)? {
            self.frames.bring_in(first, past - first)?;
            at = past;
        }
        let table = |frame: usize| frame * META_BYTES / PAGE_SIZE * PAGE_SIZE;
        let mut at_table = table(from as usize);
        while let Some((first, past)) = self.table.populated(at_table)? {
            self.table.bring_in(first, past - first)?;
            at_table = past;
        }
        Ok((at / PAGE_SIZE) as u32)
    }

    /// For recovery: looks which frames have memory, and notes it ([`FrameMeta::found_memory`]), makes page tables be there
    /// for them ([`Region::bring_in_tables`]), and forgets what an earlier recovery has found. Returns the number past the
    /// last of them. The kernel is asked once: it goes from page to page for it.
    pub(crate) fn find_frames(&self) -> io::Result<u32> {
        self.table.bring_in_tables()?;
        let (mut from, mut past) = (0, 0);
        while let Some((first, end)) = self.frames.populated(from)? {
            self.frames.bring_in_tables_of(first, end)?;
            let (run, after) = ((first / PAGE_SIZE) as u32, (end / PAGE_SIZE) as u32);
            for hole in past..run {
                // Nothing is in these, whatever the table says.
                self.meta(hole).reset(Use::Free);
                self.meta(hole).clear_found(false);
            }
            for frame in run..after {
                self.meta(frame).unclaim();
                self.meta(frame).clear_found(true);
            }
            (from, past) = (end, after);
        }
        self.found.store(past.into(), Ordering::Release);
        Ok(past)
    }

    /// How many frames have memory, as the kernel has it.
    #[cfg(all(test, not(any(miri, feature = "shuttle"))))]
    pub(crate) fn backed(&self) -> u32 {
        let range = |from| self.frames.populated(from).expect("the kernel says what has memory");
        let ranges = std::iter::successors(range(0), |(_, past)| range(*past));
        ranges.map(|(first, past)| ((past - first) / PAGE_SIZE) as u32).sum()
    }

    /// For recovery: takes in frames that have memory. There are none yet.
    pub(crate) fn adopt(&self) -> Adoption<'_> {
        let backing = self.backing.lock();
        assert_eq!((self.allocated(), self.top(), backing.holes), (0, 0, NIL), "it has frames");
        Adoption { arena: self, backing, last_hole: NIL }
    }

    /// Copies `bytes` into a frame.
    ///
    /// # Safety
    ///
    /// The caller owns the frame: it holds the lock of the shard whose frame it is, or popped it.
    pub(crate) unsafe fn write(&self, frame: u32, offset: usize, bytes: &[u8]) {
        let at = self.at(frame, offset, bytes.len());
        // SAFETY: `at` is valid for that many bytes; the caller's ownership excludes every other
        // access, and no reference into frames of zpages is ever made.
        unsafe { at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Copies bytes out of a frame.
    ///
    /// # Safety
    ///
    /// As for [`Arena::write`].
    pub(crate) unsafe fn read(&self, frame: u32, offset: usize, out: &mut [u8]) {
        let at = self.at(frame, offset, out.len());
        // SAFETY: as in `write`.
        unsafe { out.as_mut_ptr().copy_from_nonoverlapping(at, out.len()) };
    }

    /// Copies bytes from one frame to another.
    ///
    /// # Safety
    ///
    /// As for [`Arena::write`], for both frames.
    pub(crate) unsafe fn copy(&self, from: (u32, usize), to: (u32, usize), bytes: usize) {
        assert_ne!(from.0, to.0, "a frame is never rewritten in place");
        let (from, to) = (self.at(from.0, from.1, bytes), self.at(to.0, to.1, bytes));
        // SAFETY: both ranges are valid and in different frames, so they do not overlap.
        unsafe { to.copy_from_nonoverlapping(from, bytes) };
    }

    /// Fills a frame with zeros.
    ///
    /// # Safety
    ///
    /// As for [`Arena::write`].
    pub(crate) unsafe fn zero(&self, frame: u32) {
        // SAFETY: as in `write`.
        unsafe { self.at(frame, 0, PAGE_SIZE).write_bytes(0, PAGE_SIZE) };
    }

    /// The slot words in a frame.
    ///
    /// # Safety
    ///
    /// As for [`Arena::write`], for as long as the reference lives; and the frame is a leaf.
    pub(crate) unsafe fn leaf(&self, frame: u32) -> &Leaf {
        debug_assert_eq!(self.meta(frame).used_for(), Use::Leaf);
        // SAFETY: a frame is as large as a leaf and page aligned; slot words are atomics, for
        // which every bit pattern is valid; the caller keeps plain writes away.
        unsafe { &*self.at(frame, 0, PAGE_SIZE).cast::<Leaf>() }
    }

    /// The entries of blocks in a frame.
    ///
    /// # Safety
    ///
    /// The frame is one of entries for as long as the reference lives.
    pub(crate) unsafe fn blocks(&self, frame: u32) -> &[BlockMeta; BLOCKS_PER_FRAME] {
        debug_assert_eq!(self.meta(frame).used_for(), Use::Blocks);
        // SAFETY: a frame is as large as so many entries and page aligned; entries are atomics, for
        // which every bit pattern is valid; the caller keeps plain writes away.
        unsafe { &*self.at(frame, 0, PAGE_SIZE).cast() }
    }

    fn at(&self, frame: u32, offset: usize, bytes: usize) -> *mut u8 {
        assert!(frame < self.frames_max && offset + bytes <= PAGE_SIZE);
        // SAFETY: the offset is inside the region, which `frames_max` frames fill.
        unsafe { self.frames.start().as_ptr().add(frame as usize * PAGE_SIZE + offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::faults;

    #[test]
    fn frames_come_only_with_growth_and_within_the_limit() {
        let arena = Arena::alone(10, 4).unwrap();
        assert_eq!(arena.pop(), None);
        assert_eq!(arena.grow(3).unwrap(), 3);
        assert_eq!(arena.grow(3).unwrap(), 1);
        assert_eq!((arena.allocated(), arena.free()), (4, 4));
        let frames: Vec<_> = std::iter::from_fn(|| arena.pop()).collect();
        assert_eq!(frames.len(), 4);
        frames.into_iter().for_each(|frame| arena.push(frame));
        assert_eq!(arena.free(), 4);
    }

    #[test]
    fn what_an_entry_says_before_its_frame_has_memory_does_not_matter() {
        let arena = Arena::alone(8, 8).unwrap();
        arena.grow(1).unwrap();
        // In the same page of the table.
        arena.meta(1).claim();
        arena.meta(2).claim();
        assert_eq!(arena.grow(1).unwrap(), 1);
        let first_two = [arena.pop().unwrap(), arena.pop().unwrap()];
        assert_eq!(arena.grow_beyond().unwrap(), 2);
        for frame in first_two.into_iter().chain([2]) {
            arena.push(frame);
        }
        assert_eq!(arena.free(), 3);
    }

    #[test]
    fn released_frames_come_back_zeroed() {
        let arena = Arena::alone(8, 8).unwrap();
        arena.grow(8).unwrap();
        let kept = arena.pop().unwrap();
        // SAFETY: the frame was popped above and nobody else knows of it.
        unsafe { arena.write(kept, 100, &[1; 50]) };
        assert_eq!(arena.release(u32::MAX).unwrap(), 7);
        assert_eq!((arena.allocated(), arena.free()), (1, 0));
        assert_eq!(arena.grow(8).unwrap(), 7);
        arena.push(kept);
        assert_eq!((arena.allocated(), arena.free()), (8, 8));
        let mut byte = [9];
        for _ in 0..8 {
            let frame = arena.pop().unwrap();
            // SAFETY: as above.
            unsafe { arena.read(frame, 120, &mut byte) };
            assert_eq!(byte[0] == 1, frame == kept);
        }
    }

    #[test]
    fn growth_that_fails_leaves_what_there_was() {
        // The first call is the table's, the second the frames'.
        for calls in 0..2 {
            let arena = Arena::alone(600, 600).unwrap();
            faults::after(calls);
            assert!(arena.grow(300).is_err());
            assert_eq!((arena.allocated(), arena.free(), arena.pop()), (0, 0, None));
            assert_eq!(arena.grow(300).unwrap(), 300);
            assert_eq!((arena.allocated(), arena.free()), (300, 300));
        }
    }

    #[test]
    fn growth_into_holes_that_fails_leaves_the_holes() {
        let arena = Arena::alone(8, 8).unwrap();
        arena.grow(8).unwrap();
        arena.release(4).unwrap();
        faults::after(0);
        assert!(arena.grow(8).is_err());
        assert_eq!((arena.allocated(), arena.free()), (4, 4));
        assert_eq!(arena.grow(8).unwrap(), 4);
        let mut frames: Vec<_> = std::iter::from_fn(|| arena.pop()).collect();
        frames.sort_unstable();
        assert_eq!(frames, (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn a_release_that_fails_half_way_keeps_every_frame() {
        let arena = Arena::alone(8, 8).unwrap();
        arena.grow(8).unwrap();
        // What is free is in three runs, of which the last to be released fails.
        let mut frames: Vec<_> = std::iter::from_fn(|| arena.pop()).collect();
        frames.sort_unstable();
        [0, 1, 3, 6, 7].iter().for_each(|&at: &usize| arena.push(frames[at]));
        faults::after(2);
        assert!(arena.release(8).is_err());
        assert_eq!(arena.allocated() - arena.free(), 3, "three are in use");
        assert_eq!(arena.free(), 2);
        assert_eq!(arena.grow(8).unwrap(), 3);
        [2, 4, 5].iter().for_each(|&at: &usize| arena.push(frames[at]));
        let mut all: Vec<_> = std::iter::from_fn(|| arena.pop()).collect();
        all.sort_unstable();
        assert_eq!(all, frames);
    }

    #[test]
    fn no_more_frames_are_in_use_than_the_limit() {
        let arena = Arena::alone(8, 8).unwrap();
        arena.grow(8).unwrap();
        let first = arena.pop().unwrap();
        arena.set_limit(2);
        assert!(arena.pop().is_some());
        assert_eq!(arena.pop(), None);
        assert_eq!(arena.release(6).unwrap(), 6);
        assert_eq!(arena.pop(), None);
        arena.push(first);
        assert_eq!(arena.pop(), Some(first));
    }
}
