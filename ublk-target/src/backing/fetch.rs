//! Fetches: blocks that a thread reads from the backing file for pages that it was asked for.
//!
//! What is wanted is noted first, and read when the request that it is for has nothing else to do: so
//! neighbours in the log come in one read. Who reads on in the order of the log, as a swapoff does, gets more with each
//! read, and finds there what it wants next; and so does who wants another page of a block that was read just now. What is read is in memory of the thread's own ([`super::images`]). Reads
//! go through the thread's ring, which is its business: [`Fetches::begin`] says what to queue there, and
//! [`Fetches::ended`] is told how that went.
//!
//! Nothing here allocates after [`Fetches::new`].

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Instant;

use io_uring::{opcode, squeue, types};
use rustix::io::Errno;
use tmem::{Backed, Engine, Image, PAGE_SIZE};

use super::images::{IMAGES, Images};
use super::shared::Backing;
use super::transfer::{Next, Transfer};
use super::unanswered::Began;

/// Reads that a thread has under way at most.
pub const FETCHES_MAX: usize = IMAGES;

/// Blocks that one read has at most: what the kernel reads ahead when it swaps in, uncompressed.
const RUN_BLOCKS: u64 = 8;

/// Blocks between two that are wanted which are read with them all the same.
const GAP_BLOCKS: u64 = 2;

/// Blocks of a read for who reads on in the order of the log, at most. Those that are kept leave images for others.
const AHEAD_BLOCKS_MAX: u64 = 24;

/// Blocks between where a read has ended and where the next begins, for it to read on.
const STRIDE_BLOCKS: u64 = 4;

/// Reads one after the other from which on more is read than is wanted: two may be so by chance.
const AHEAD_FROM: u32 = 2;

/// Reads whose blocks are kept for what may be wanted next: the other pages of a block, which were put at the same time as
/// the one it was read for, and what was read ahead.
const KEPT: usize = 8;

const BLOCK_BYTES: u64 = PAGE_SIZE as u64;

/// A thread's fetches, for pages that it knows as `W`.
pub struct Fetches<W> {
    backing: Arc<Backing>,
    wanted: Vec<Wanted<W>>,
    images: Images,
    /// By their first image.
    runs: [Run; IMAGES],
    /// Reads that are over, whose images are kept; the newest first.
    kept: [Option<usize>; KEPT],
    /// Where the last read has ended, in bytes of the log, and how many have been one after the other.
    ahead: (u64, u32),
}

/// A read.
#[derive(Clone, Copy)]
struct Run {
    /// Its first block's place in the log, in bytes.
    start: u64,
    blocks: usize,
    transfer: Transfer,
    failed: Option<Errno>,
    /// When it began, while it has no answer.
    began: Option<Began>,
    /// Which use of their segment all blocks are of, if they may be kept: a block alone, for a slot has named it, and
    /// those that were read ahead. Of others some may have been read before they were written.
    sequence: Option<u64>,
}

impl Run {
    fn new(start: u64, blocks: usize, sequence: Option<u64>) -> Self {
        let transfer = Transfer::new(start, blocks * PAGE_SIZE);
        Self { start, blocks, transfer, failed: None, began: None, sequence }
    }

    fn end(&self) -> u64 {
        self.start + self.blocks as u64 * BLOCK_BYTES
    }

    /// Nobody waits for the answer any more.
    fn answered(&mut self, backing: &Backing) {
        if let Some(began) = self.began.take() {
            backing.unanswered().ended(began);
        }
    }

    /// The number of a block among this read's, if it is there once this is over and kept.
    fn find(&self, backed: Backed) -> Option<usize> {
        let is_there = (self.start..self.end()).contains(&backed.offset())
            && self.sequence == Some(backed.sequence());
        is_there.then(|| ((backed.offset() - self.start) / BLOCK_BYTES) as usize)
    }
}

/// A page that is wanted.
struct Wanted<W> {
    who: W,
    backed: Backed,
    since: Instant,
    state: State,
    /// The block is read alone, because a read of several failed.
    alone: bool,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum State {
    /// It is not to be read yet.
    Noted,
    /// It is to be read.
    Ready,
    /// The read with this first image has it.
    Reading(usize),
}

/// A page whose block was read, or could not be.
pub struct Fetched<W> {
    /// Who wanted it.
    pub who: W,
    /// What was wanted.
    pub backed: Backed,
    /// Since when.
    pub since: Instant,
    /// The block: [`Fetches::image`], until the next is taken.
    pub image: Result<usize, Errno>,
}

/// What comes after a read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// Another one, of the rest: [`Fetches::entry`].
    Again,
    /// Its pages are to be taken: [`Fetches::take`].
    Over,
}

impl<W: Copy + Eq> Fetches<W> {
    /// For a thread that wants so many pages at a time at most.
    pub fn new(backing: Arc<Backing>, most: usize) -> Self {
        Self {
            backing,
            wanted: Vec::with_capacity(most),
            images: Images::new(),
            runs: [Run::new(0, 0, None); IMAGES],
            kept: [None; KEPT],
            ahead: (0, 0),
        }
    }

    /// Notes that a page is wanted.
    ///
    /// # Panics
    ///
    /// If more are wanted than was said.
    pub fn want(&mut self, who: W, backed: Backed, since: Instant) {
        assert!(
            self.wanted.len() < self.wanted.capacity(),
            "more pages are wanted than there can be"
        );
        self.wanted.push(Wanted { who, backed, since, state: State::Noted, alone: false });
    }

    /// What was noted for these may be read now.
    pub fn release(&mut self, whose: impl Fn(W) -> bool) {
        for wanted in self.wanted.iter_mut().filter(|wanted| whose(wanted.who)) {
            if wanted.state == State::Noted {
                wanted.state = State::Ready;
            }
        }
    }

    /// The next read, by its number, and what to queue for it; without that its blocks are there, and its pages
    /// can be taken. None if there is nothing to read, or no room.
    pub fn begin(&mut self, engine: &Engine) -> Option<(usize, Option<squeue::Entry>)> {
        let ready = self.wanted.iter().filter(|wanted| wanted.state == State::Ready);
        // They are in no order, and each has its turn.
        let first = ready.min_by_key(|wanted| wanted.since)?;
        let (backed, alone) = (first.backed, first.alone);
        if let Some(run) = self.kept_for(backed).filter(|_| !alone) {
            let Run { start, sequence, .. } = self.runs[run];
            self.assign(run, start..self.runs[run].end(), false, sequence);
            return Some((run, None));
        }
        let at = backed.offset();
        let mut range = at..at + BLOCK_BYTES;
        let (mut sequence, mut times) = (None, 0);
        if !alone {
            range = self.neighbours(at);
            times = self.times_ahead(&range);
            sequence = widen(engine, backed, times, &mut range);
        }
        let whole = range.clone();
        let run = self.take_images(at, &mut range)?;
        let (blocks, is_cut) = (blocks_of(&range), range != whole);
        if blocks == 1 && !alone {
            sequence = Some(backed.sequence());
        }
        // Only now: what waits for images is looked at again, and does not read on by that; nor does the rest of what was
        // cut.
        self.ahead = (range.end, times.saturating_sub(u32::from(is_cut)));
        self.assign(run, range.clone(), alone, None);
        self.runs[run] = Run::new(range.start, blocks, sequence);
        self.runs[run].began = Some(self.backing.unanswered().began());
        Some((run, Some(self.entry(run))))
    }

    /// Takes images for a range, of which the block at an offset is what is wanted. Where there are not enough together the
    /// range is made shorter: it does not wait for reads that may never have an answer. None if there is no image at all.
    fn take_images(&mut self, at: u64, range: &mut Range<u64>) -> Option<usize> {
        loop {
            match self.images.take(blocks_of(range)) {
                Some(run) => return Some(run),
                None if self.forget_oldest() => {}
                None if range.end - BLOCK_BYTES > at => range.end -= BLOCK_BYTES,
                None if range.start < at => range.start += BLOCK_BYTES,
                None => return None,
            }
        }
    }

    /// The read that is kept, and has a block as it was written.
    fn kept_for(&self, backed: Backed) -> Option<usize> {
        let has_it = |run: &usize| {
            let block = self.runs[*run].find(backed);
            block.is_some_and(|block| !self.images.is_bad(run + block))
        };
        self.kept.into_iter().flatten().find(has_it)
    }

    /// Lets a read have the pages that are in a range, of this use of the segment if that matters.
    fn assign(&mut self, run: usize, range: Range<u64>, alone: bool, sequence: Option<u64>) {
        for wanted in self.wanted.iter_mut().filter(|wanted| wanted.state == State::Ready) {
            let is_it = sequence.is_none_or(|sequence| sequence == wanted.backed.sequence());
            if is_it && wanted.alone == alone && range.contains(&wanted.backed.offset()) {
                wanted.state = State::Reading(run);
            }
        }
    }

    /// How many reads have been one after the other in the order of the log, with one of this range.
    fn times_ahead(&self, range: &Range<u64>) -> u32 {
        let (end, times) = self.ahead;
        let slack = STRIDE_BLOCKS * BLOCK_BYTES;
        let is_next = range.end > end.saturating_sub(slack) && range.start <= end + slack;
        if is_next { times + 1 } else { 0 }
    }

    /// What to queue for a read that goes on. The memory that it points at stays, and is not touched by
    /// anybody else, until [`Fetches::ended`] was told of its completion.
    pub fn entry(&self, run: usize) -> squeue::Entry {
        let file = self.backing.file().expect("pages are on the backing file, so there is one");
        let transfer = &self.runs[run].transfer;
        let at = self.images.at(run, transfer.done());
        let fd = types::Fd(file.as_fd().as_raw_fd());
        opcode::Read::new(fd, at.as_ptr(), transfer.left() as u32)
            .offset(file.start() + transfer.offset())
            .build()
    }

    /// A read has completed with this.
    pub fn ended(&mut self, run: usize, result: i32) -> Ended {
        let next = self.runs[run].transfer.ended(result);
        if next == Next::Again {
            return Ended::Again;
        }
        self.runs[run].answered(&self.backing);
        self.images.are_read(run, self.runs[run].blocks);
        match next {
            Next::Again | Next::Done => {}
            // One bad block is no reason to be without its neighbours.
            Next::Failed(_) if self.runs[run].blocks > 1 => self.separate(run),
            Next::Failed(errno) => {
                self.backing.failed_read(errno.raw_os_error());
                self.runs[run].failed = Some(errno);
            }
        }
        Ended::Over
    }

    /// Takes a page of a read that is over. After the last one the read is forgotten.
    pub fn take(&mut self, run: usize) -> Option<Fetched<W>> {
        let is_in = |wanted: &Wanted<W>| wanted.state == State::Reading(run);
        let Some(at) = self.wanted.iter().position(is_in) else {
            self.over(run);
            return None;
        };
        let Wanted { who, backed, since, .. } = self.wanted.swap_remove(at);
        let Run { start, failed, .. } = self.runs[run];
        let n = ((backed.offset() - start) / BLOCK_BYTES) as usize;
        let image = failed.map_or(Ok(run + n), Err);
        Some(Fetched { who, backed, since, image })
    }

    /// What was read for a page.
    pub fn image(&mut self, image: usize) -> Image<'_> {
        self.images.image(image)
    }

    /// Gives up whatever is wanted, one after another: says whose it was.
    pub fn give_up(&mut self) -> Option<W> {
        self.wanted.pop().map(|wanted| wanted.who)
    }

    /// What of the log to read for the block at an offset, with others that are wanted: a range of offsets.
    fn neighbours(&self, at: u64) -> Range<u64> {
        let mut range = at..at + BLOCK_BYTES;
        let others = |wanted: &&Wanted<W>| wanted.state == State::Ready && !wanted.alone;
        // Each turn takes in one more.
        for _ in 1..RUN_BLOCKS {
            let offsets = self.wanted.iter().filter(others).map(|wanted| wanted.backed.offset());
            let is_near = |offset: &u64| {
                offset + (1 + GAP_BLOCKS) * BLOCK_BYTES >= range.start
                    && *offset <= range.end + GAP_BLOCKS * BLOCK_BYTES
            };
            let wider = offsets
                .filter(|offset| !range.contains(offset) && is_near(offset))
                .map(|offset| range.start.min(offset)..range.end.max(offset + BLOCK_BYTES))
                .find(|range| range.end - range.start <= RUN_BLOCKS * BLOCK_BYTES);
            match wider {
                Some(wider) => range = wider,
                None => break,
            }
        }
        range
    }

    /// Frees the images of a read that is over, or keeps them for what may be wanted next.
    fn over(&mut self, run: usize) {
        if self.kept.contains(&Some(run)) {
            return;
        }
        let Run { transfer, sequence, .. } = self.runs[run];
        if sequence.is_none() || transfer.left() > 0 {
            self.images.give_back(run, self.runs[run].blocks);
            return;
        }
        let oldest = self.kept[KEPT - 1];
        self.kept.rotate_right(1);
        self.kept[0] = Some(run);
        self.free_kept(oldest);
    }

    /// Frees the images of the oldest read that is kept; false if there is none.
    fn forget_oldest(&mut self) -> bool {
        let oldest = self.kept.iter_mut().rev().find_map(Option::take);
        self.free_kept(oldest);
        oldest.is_some()
    }

    fn free_kept(&mut self, run: Option<usize>) {
        if let Some(run) = run {
            let is_in_use = |wanted: &Wanted<W>| wanted.state == State::Reading(run);
            assert!(!self.wanted.iter().any(is_in_use), "pages of a kept read were not taken");
            self.images.give_back(run, self.runs[run].blocks);
        }
    }

    /// Lets the blocks of a read that failed be read one by one.
    fn separate(&mut self, run: usize) {
        for wanted in self.wanted.iter_mut() {
            if wanted.state == State::Reading(run) {
                wanted.state = State::Ready;
                wanted.alone = true;
            }
        }
    }
}

/// How many blocks a range of offsets has.
fn blocks_of(range: &Range<u64>) -> usize {
    ((range.end - range.start) / BLOCK_BYTES) as usize
}

/// Widens a read for who has read on in the order of the log so many times, twice as much each time. Returns the use of
/// the segment that what is behind the page's block is of then.
fn widen(engine: &Engine, first: Backed, times: u32, range: &mut Range<u64>) -> Option<u64> {
    let twice = times.checked_sub(AHEAD_FROM)?;
    let window = (RUN_BLOCKS << (1 + twice.min(8))).min(AHEAD_BLOCKS_MAX) * BLOCK_BYTES;
    let end = first.offset() + (u64::from(engine.blocks_behind(first)) + 1) * BLOCK_BYTES;
    let wide = (range.start + window).min(end);
    let is_widened = wide > range.end;
    range.end = wide.max(range.end);
    is_widened.then(|| first.sequence())
}

impl<W> Drop for Fetches<W> {
    /// What the kernel still reads nobody waits for.
    fn drop(&mut self) {
        self.runs.iter_mut().for_each(|run| run.answered(&self.backing));
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;
    use tmem::{BACKING_BYTES_MIN, GetError, Got, Handle, Page, Writeback};

    use super::super::file::{BackingFile, BackingSpec, FILE_BYTES_MIN};
    use super::*;
    use crate::device::BlockDevice;
    use crate::device::tests::{engine, noise};

    /// A device of which more is on a backing file than in memory. It was written there by the test itself.
    struct Filled {
        device: BlockDevice,
        queue: tmem::Queue,
        backing: Arc<Backing>,
        writeback: Writeback,
        _home: TempDir,
    }

    /// Blocks of a segment of the log.
    const SEGMENT: usize = 256;

    impl Filled {
        /// With so many pages of `contents`.
        fn new(pages: u64, contents: impl Fn(u64) -> Page) -> Self {
            let home = tempfile::tempdir().unwrap();
            let (path, bytes) = (home.path().join("backing"), FILE_BYTES_MIN + BACKING_BYTES_MIN);
            let spec = BackingSpec { path, bytes: Some(bytes), encrypt: true, force: false };
            let mut file = BackingFile::open(&spec, &[]).unwrap();
            file.keep();
            let engine = engine(8 << 20);
            let writeback = engine.attach_backing(file.bytes(), Some(&[7; 32])).unwrap();
            let backing = Arc::new(Backing::new().unwrap());
            backing.set_file(file);
            let device = BlockDevice::new(engine, pages).unwrap();
            let queue = device.queue();
            let mut filled = Self { device, queue, backing, writeback, _home: home };
            for page in 0..pages {
                let (handle, contents) = (filled.handle(page), contents(page));
                while filled.device.engine().supply().unwrap().more {}
                filled.device.engine().put(&mut filled.queue, handle, &contents).unwrap();
                filled.write();
            }
            filled
        }

        fn handle(&self, page: u64) -> Handle {
            Handle::from_page(self.device.pool(), page)
        }

        /// Does all that is to be written.
        #[allow(unsafe_code)]
        fn write(&mut self) {
            let file = self.backing.file().unwrap();
            while let Some(job) = self.writeback.next(self.device.engine(), 0) {
                assert!(job.is_write, "there is nothing to clean");
                let buffer = self.writeback.buffer(job.unit);
                // SAFETY: the job's buffer has so many bytes, and is ours until it has ended.
                let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr(), job.bytes) };
                let written = rustix::io::pwrite(file.fd(), bytes, file.start() + job.offset);
                assert_eq!(written, Ok(job.bytes));
                self.writeback.ended(self.device.engine(), job.unit, Ok(()), 0);
            }
        }

        /// Pages that are on the file, in the order of the log.
        fn backed(&mut self) -> Vec<(u64, Backed)> {
            let (mut page, pages) = ([0; PAGE_SIZE], self.device.bytes() / BLOCK_BYTES);
            let mut get = |at| {
                let handle = self.handle(at);
                match self.device.engine().get(&mut self.queue, handle, &mut page) {
                    Ok(Got::Backed(backed)) => Some((at, backed)),
                    got => {
                        assert_eq!(got, Ok(Got::Hit));
                        None
                    }
                }
            };
            let mut all: Vec<_> = (0..pages).filter_map(&mut get).collect();
            all.sort_by_key(|(_, backed)| backed.offset());
            all
        }

        /// What is in the first segment that was written, a page a block. It is not where the log begins.
        fn segment(&mut self) -> Vec<Backed> {
            let all = self.backed().into_iter().map(|(_, backed)| backed);
            let blocks: Vec<_> = all.take(SEGMENT).collect();
            let first = blocks[0].offset();
            assert!(first >= STRIDE_BLOCKS * 2 * BLOCK_BYTES);
            for (n, backed) in (0..).zip(&blocks) {
                assert_eq!(backed.offset(), first + n * BLOCK_BYTES);
            }
            assert_eq!(self.device.engine().blocks_behind(blocks[0]), SEGMENT as u32 - 1);
            blocks
        }
    }

    fn raw(page: u64) -> Page {
        noise(1, page + 1).try_into().unwrap()
    }

    /// Wants blocks, and begins a read of them: its number, and how many blocks it has.
    fn begin(
        fetches: &mut Fetches<usize>,
        engine: &Engine,
        wanted: &[Backed],
    ) -> Option<(usize, usize)> {
        for (n, backed) in wanted.iter().enumerate() {
            fetches.want(n, *backed, Instant::now());
        }
        fetches.release(|_| true);
        let (run, entry) = fetches.begin(engine)?;
        assert!(entry.is_some(), "it was read before");
        Some((run, fetches.runs[run].blocks))
    }

    /// Reads what a read is to read.
    #[allow(unsafe_code)]
    fn carry_out(fetches: &mut Fetches<usize>, run: usize) {
        let bytes = fetches.runs[run].blocks * PAGE_SIZE;
        let start = fetches.images.at(run, 0).as_ptr();
        // SAFETY: so many images are the read's, and nobody else's until it has ended.
        let target = unsafe { std::slice::from_raw_parts_mut(start, bytes) };
        let file = fetches.backing.file().unwrap();
        let read = rustix::io::pread(file.fd(), target, file.start() + fetches.runs[run].start);
        assert_eq!(fetches.ended(run, read.unwrap() as i32), Ended::Over);
    }

    /// Changes a bit of what was read.
    #[allow(unsafe_code)]
    fn change(fetches: &Fetches<usize>, image: usize) {
        // SAFETY: it is not being read.
        unsafe { *fetches.images.at(image, 77).as_mut() ^= 4 };
    }

    /// What is in an image at the moment.
    #[allow(unsafe_code)]
    fn look(fetches: &Fetches<usize>, image: usize) -> Page {
        // SAFETY: it is not being read.
        unsafe { *fetches.images.at(image, 0).cast::<Page>().as_ref() }
    }

    /// A read ends, and its pages are taken: how many there were.
    fn end(fetches: &mut Fetches<usize>, run: usize) -> usize {
        let bytes = (fetches.runs[run].blocks * PAGE_SIZE) as i32;
        assert_eq!(fetches.ended(run, bytes), Ended::Over);
        std::iter::from_fn(|| fetches.take(run)).count()
    }

    /// Takes all images, by reads that are far from each other but for the last two.
    fn take_all(
        fetches: &mut Fetches<usize>,
        engine: &Engine,
        blocks: &[Backed],
    ) -> [usize; IMAGES / 8] {
        [0, 24, 48, 72, 96, 120, 144, 152].map(|at| {
            let (run, count) = begin(fetches, engine, &blocks[at..][..8]).unwrap();
            assert_eq!(count, 8);
            run
        })
    }

    #[test]
    fn what_waits_for_images_does_not_read_on_by_that() {
        let mut filled = Filled::new(4096, raw);
        let blocks = filled.segment();
        let engine = filled.device.engine();
        let mut fetches = Fetches::new(Arc::clone(&filled.backing), 100);
        let reads = take_all(&mut fetches, engine, &blocks);
        // One more reads on from the last, and would be of twice as much.
        assert_eq!(begin(&mut fetches, engine, &blocks[160..][..1]), None);
        for _ in 0..10 {
            assert!(fetches.begin(engine).is_none());
        }
        assert_eq!(end(&mut fetches, reads[0]), 8);
        assert_eq!(end(&mut fetches, reads[1]), 8);
        let (run, entry) = fetches.begin(engine).unwrap();
        assert!(entry.is_some());
        assert_eq!(fetches.runs[run].blocks, 16, "it has been looked at ten times");
    }

    #[test]
    fn nobody_waits_for_reads_that_have_no_answer() {
        let mut filled = Filled::new(4096, raw);
        let blocks = filled.segment();
        let engine = filled.device.engine();
        let mut fetches = Fetches::new(Arc::clone(&filled.backing), 100);
        // Every other one never ends, and they leave no room for what is read ahead.
        for run in take_all(&mut fetches, engine, &blocks).into_iter().skip(1).step_by(2) {
            assert_eq!(end(&mut fetches, run), 8);
        }
        let (run, count) = begin(&mut fetches, engine, &blocks[160..][..1]).unwrap();
        assert_eq!((count, fetches.runs[run].start), (8, blocks[160].offset()));
        let (run, count) = begin(&mut fetches, engine, &blocks[168..][..1]).unwrap();
        assert_eq!((count, fetches.runs[run].start), (8, blocks[168].offset()));
        // Where there is room for the block only that was wanted first, the one before it is read next.
        let spare = [8, 7].map(|count| (fetches.images.take(count).unwrap(), count));
        let (run, count) = begin(&mut fetches, engine, &[blocks[207], blocks[206]]).unwrap();
        assert_eq!((count, fetches.runs[run].start), (1, blocks[207].offset()));
        for (first, count) in spare {
            fetches.images.are_read(first, count);
            fetches.images.give_back(first, count);
        }
        let (run, _) = fetches.begin(engine).unwrap();
        assert_eq!(fetches.runs[run].start, blocks[206].offset());
        // Less and less, until there is no image.
        let more = (0..).map_while(|n| begin(&mut fetches, engine, &blocks[210 + n..][..1]));
        assert!(more.count() > 1);
        assert_eq!(fetches.images.take(1), None, "all are in use");
    }

    #[test]
    fn what_is_kept_is_of_one_use_of_its_segment() {
        let mut filled = Filled::new(4096, raw);
        let blocks = filled.segment();
        let engine = filled.device.engine();
        let mut fetches = Fetches::new(Arc::clone(&filled.backing), 100);
        let (run, _) = begin(&mut fetches, engine, &blocks[40..41]).unwrap();
        assert_eq!(end(&mut fetches, run), 1);
        // As if it had been read before the segment was written again.
        fetches.runs[run].sequence = Some(blocks[40].sequence() - 1);
        assert!(begin(&mut fetches, engine, &blocks[40..41]).is_some(), "it is read again");
    }

    /// A block that came back changed once is read again for who asks next.
    #[test]
    fn what_is_not_what_was_written_is_not_kept() {
        let mut filled = Filled::new(4096, raw);
        let blocks = filled.backed();
        let (page, backed) = blocks[40];
        let mut fetches = Fetches::new(Arc::clone(&filled.backing), 100);
        let mut get = |is_changed: bool| {
            let engine = filled.device.engine();
            let (run, _) = begin(&mut fetches, engine, &[backed]).unwrap();
            carry_out(&mut fetches, run);
            let image = fetches.take(run).unwrap().image.unwrap();
            if is_changed {
                change(&fetches, image);
            }
            let (handle, mut target) = (Handle::from_page(filled.device.pool(), page), [0; 4096]);
            let image = fetches.image(image);
            let got = engine.get_backed(&mut filled.queue, handle, backed, image, &mut target);
            assert!(fetches.take(run).is_none());
            got.map(|got| got == Got::Hit && target == raw(page))
        };
        assert_eq!(get(true), Err(GetError::Corrupt));
        assert_eq!(get(false), Ok(true));
    }

    #[test]
    fn a_block_is_kept_for_its_other_pages_and_two_neighbours_are_no_order() {
        let mut filled = Filled::new(4096, raw);
        let blocks = filled.segment();
        let engine = filled.device.engine();
        let mut fetches = Fetches::new(Arc::clone(&filled.backing), 100);
        let (first, count) = begin(&mut fetches, engine, &blocks[40..41]).unwrap();
        assert_eq!((count, end(&mut fetches, first)), (1, 1));
        // As often as it is wanted, and though others were read since.
        for at in 1..KEPT {
            let (run, count) = begin(&mut fetches, engine, &blocks[40 + 20 * at..][..1]).unwrap();
            assert_eq!((count, end(&mut fetches, run)), (1, 1));
            fetches.want(7, blocks[40], Instant::now());
            fetches.release(|_| true);
            let (again, entry) = fetches.begin(engine).unwrap();
            assert!(again == first && entry.is_none());
            assert_eq!(fetches.take(first).unwrap().image.unwrap(), first);
            assert!(fetches.take(first).is_none());
        }
        // The oldest is forgotten for one more; the block behind that is none that more is read with.
        let (run, count) = begin(&mut fetches, engine, &blocks[220..221]).unwrap();
        assert_eq!((count, end(&mut fetches, run)), (1, 1));
        let (run, count) = begin(&mut fetches, engine, &blocks[221..222]).unwrap();
        assert_eq!((count, end(&mut fetches, run)), (1, 1));
        let (run, count) = begin(&mut fetches, engine, &blocks[222..223]).unwrap();
        assert_eq!((count, end(&mut fetches, run)), (16, 1), "three are an order");
        assert!(begin(&mut fetches, engine, &blocks[40..41]).is_some());
    }

    #[test]
    fn reads_without_an_answer_are_counted_until_nobody_waits_for_them() {
        let mut filled = Filled::new(4096, raw);
        let blocks = filled.segment();
        let (engine, backing) = (filled.device.engine(), &filled.backing);
        let mut fetches = Fetches::new(Arc::clone(backing), 100);
        let [first, second, third] =
            [0, 50, 100].map(|at| begin(&mut fetches, engine, &blocks[at..][..2]).unwrap().0);
        assert_eq!(backing.unanswered().count(), 3);
        // A part of an answer is none.
        assert_eq!(fetches.ended(first, PAGE_SIZE as i32), Ended::Again);
        assert_eq!(backing.unanswered().count(), 3);
        assert_eq!(fetches.ended(first, PAGE_SIZE as i32), Ended::Over);
        assert_eq!(backing.unanswered().count(), 2);
        assert_eq!(std::iter::from_fn(|| fetches.take(first)).count(), 2);
        // One that fails is answered, and its blocks are read each.
        assert_eq!(fetches.ended(second, -libc::EIO), Ended::Over);
        assert_eq!((backing.unanswered().count(), backing.failed_reads()), (1, 0));
        assert!(fetches.take(second).is_none());
        let (alone, _) = fetches.begin(engine).unwrap();
        assert_eq!((backing.unanswered().count(), fetches.runs[alone].blocks), (2, 1));
        assert_eq!(fetches.ended(alone, -libc::EIO), Ended::Over);
        assert!(fetches.take(alone).unwrap().image.is_err());
        assert_eq!((backing.unanswered().count(), backing.failed_reads()), (1, 1));
        assert_eq!(backing.errno(), libc::EIO);
        assert_ne!(alone, third);
        drop(fetches);
        assert_eq!(backing.unanswered().count(), 0);
    }

    /// A page that compresses to a third.
    fn third(page: u64) -> Page {
        let mut third = raw(page);
        third[1200..].fill(0);
        third
    }

    /// What is opened is no longer what was sealed: if it was opened once more, that would be found.
    #[test]
    fn a_block_is_opened_once_for_all_of_its_pages() {
        let mut filled = Filled::new(8192, third);
        let mut all = filled.backed();
        // A segment that is being written is not read ahead.
        let is_sealed = |backed: &Backed| {
            let behind = filled.device.engine().blocks_behind(*backed);
            behind > 0 || backed.offset() / BLOCK_BYTES % SEGMENT as u64 == SEGMENT as u64 - 1
        };
        all.retain(|(_, backed)| is_sealed(backed));
        let page_of = |n: usize| all[n].0;
        let mut fetches = Fetches::new(Arc::clone(&filled.backing), 100);
        // In the order of the log, one by one: so most of it is read ahead.
        let (mut reads, mut opened) = (0, 0);
        let mut before: Option<(u64, usize, Page)> = None;
        for (n, (page, backed)) in all.iter().enumerate() {
            fetches.want(n, *backed, Instant::now());
            fetches.release(|_| true);
            let (run, entry) = fetches.begin(filled.device.engine()).unwrap();
            if entry.is_some() {
                carry_out(&mut fetches, run);
                (reads, before) = (reads + 1, None);
            }
            let Fetched { who, image, .. } = fetches.take(run).unwrap();
            let image = image.unwrap();
            assert_eq!(page_of(who), *page);
            let sealed = look(&fetches, image);
            let is_same = before.as_ref().is_some_and(|(at, ..)| *at == backed.offset());
            if is_same {
                let (_, was, plain) = before.as_ref().unwrap();
                assert!(*was == image && *plain == sealed);
            }
            let handle = filled.handle(*page);
            let mut target = [0; PAGE_SIZE];
            let got = filled.device.engine().get_backed(
                &mut filled.queue,
                handle,
                *backed,
                fetches.image(image),
                &mut target,
            );
            assert_eq!(got, Ok(Got::Hit));
            assert!(target == third(*page), "page {page}");
            let plain = look(&fetches, image);
            assert_eq!(plain == sealed, is_same);
            opened += usize::from(!is_same);
            before = Some((backed.offset(), image, plain));
            assert!(fetches.take(run).is_none());
        }
        let mut blocks: Vec<_> = all.iter().map(|(_, backed)| backed.offset()).collect();
        blocks.dedup();
        assert!(reads * 16 < blocks.len(), "{reads} reads of {} blocks", blocks.len());
        // Once more for the blocks that were in two reads, of which there are few.
        assert!((blocks.len()..blocks.len() + reads).contains(&opened), "{opened} times");
        assert!(opened * 2 < all.len(), "a block has several pages");
    }
}
