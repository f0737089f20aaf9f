//! The board: a queue's requests under way, on which helpers find pages to put and get.
//!
//! A request of many pages costs its queue's thread some 5 us a page to compress while other
//! processors may be idle. [`Batches`] belongs to that thread: it opens a batch a request, and works
//! on them in the order in which they came. Others who have the [`Board`] take pages of the same
//! batches by [`Engine::help`]. Nobody waits for anybody: the owner asks [`Batches::has_ended`] before
//! it takes a request for ended. Nothing here allocates after [`Batches::new`].

use std::ptr::NonNull;
use std::sync::Arc;

use crate::batch::{BATCH_PAGES, Batch, Claim};
use crate::engine::{Engine, Got, POOLS_MAX, Padded};
use crate::error::{GetError, PutError};
use crate::handle::{Handle, PAGE_SIZE, POOL_PAGES_MAX, Page, PoolId};
use crate::queue::Queue;
use crate::readback::{Backed, Image};
use crate::sync::{AtomicU64, Ordering, yield_now};

/// What is done with a batch's pages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// They are got; one that is not there reads as zeros.
    Get,
    /// They are put.
    Put,
}

/// What one step of a batch's owner did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// A page is done.
    Done,
    /// All pages are taken: by the owner, who has done his, and by helpers, who may be at it still, or
    /// may give one back yet.
    Taken,
    /// A page is on the backing file: it stays taken, until the block that is there has come
    /// ([`Batches::landed`]), or cannot be had ([`Batches::not_landed`]).
    Backed {
        /// Its place in the batch.
        page: u32,
        /// Where it is to be read.
        backed: Backed,
    },
    /// A page failed and is not taken any more; those before it are done, or helpers are at them still and may
    /// give them back. Helpers take nothing more of this batch.
    Failed {
        /// Its place in the batch.
        page: u32,
        /// Why.
        error: BatchError,
    },
}

/// Why a page of a batch failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BatchError {
    /// It is on the backing file, and cannot be read there.
    #[error("the page cannot be read from the backing file")]
    Unreadable,
    /// It could not be got.
    #[error(transparent)]
    Get(GetError),
    /// It could not be put.
    #[error(transparent)]
    Put(PutError),
}

/// A queue's batches, for the thread that owns them: one for each tag of its requests.
pub struct Batches {
    board: Arc<Board>,
}

/// What helpers see of a queue's batches.
pub struct Board {
    batches: Box<[Padded<Batch>]>,
    gets: Line,
    puts: Line,
}

/// Tags in the order in which they were opened, in a ring with a place for each. Only the owner
/// changes it. Helpers look at what may have changed meanwhile: the batch tells them.
struct Line {
    tags: Box<[AtomicU64]>,
    head: AtomicU64,
    tail: AtomicU64,
}

impl Batches {
    /// For requests with tags below `tags`, of which none is open.
    pub fn new(tags: usize) -> Self {
        let batches = (0..tags).map(|_| Padded(Batch::new())).collect();
        let board = Board { batches, gets: Line::new(tags), puts: Line::new(tags) };
        Self { board: Arc::new(board) }
    }

    /// What to give to helpers.
    pub fn board(&self) -> &Arc<Board> {
        &self.board
    }

    /// Opens a batch: `pages` pages of `pool` from page number `first` on, up to [`BATCH_PAGES`],
    /// from or to `buffer`. It goes to the end of its way's line.
    ///
    /// # Panics
    ///
    /// If the tag's batch is still in a line or at work, or the pool cannot have such pages.
    ///
    /// # Safety
    ///
    /// From here on until [`Batches::has_ended`] says that the batch is over, or until this is dropped:
    /// `buffer` points at so many pages which nobody else writes, and if they are got, nobody else
    /// reads.
    pub unsafe fn open(
        &mut self,
        tag: usize,
        way: Way,
        pool: PoolId,
        first: u64,
        pages: u32,
        buffer: NonNull<u8>,
    ) {
        assert!(first < POOL_PAGES_MAX && u64::from(pages) <= POOL_PAGES_MAX - first);
        let what = What { way, pool, first }.to_word();
        self.board.batches[tag].0.open(what, buffer.as_ptr(), pages);
        self.board.line(way).push(tag);
    }

    /// The tag that is first in a line.
    pub fn first(&self, way: Way) -> Option<usize> {
        self.waiting(way).next()
    }

    /// All tags in a line, the first one first.
    pub fn waiting(&self, way: Way) -> impl Iterator<Item = usize> + '_ {
        self.board.line(way).iter()
    }

    /// Takes the first tag out of a line.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn leave(&mut self, way: Way) -> usize {
        self.board.line(way).pop()
    }

    /// Puts a batch that has left its line at the end of it again, for what helpers gave back of it;
    /// it is closed to them.
    ///
    /// # Panics
    ///
    /// If it is in line.
    pub fn rejoin(&mut self, way: Way, tag: usize) {
        assert!(self.waiting(way).all(|waiting| waiting != tag), "it is in line");
        self.board.line(way).push(tag);
    }

    /// Does the first page of a batch that nobody has taken.
    pub fn step(&mut self, engine: &Engine, queue: &mut Queue, tag: usize) -> Step {
        let batch = &self.board.batches[tag].0;
        let Some(claim) = batch.take_first() else { return Step::Taken };
        engine.carry_out(queue, &claim).step(batch, claim)
    }

    /// The block that a step has named was read into `image`. The page may have been
    /// moved meanwhile, and the answer then be another block.
    ///
    /// # Panics
    ///
    /// If it is not the page of such a step.
    pub fn landed(
        &mut self,
        engine: &Engine,
        queue: &mut Queue,
        tag: usize,
        (page, backed): (u32, Backed),
        image: Image<'_>,
    ) -> Step {
        let batch = &self.board.batches[tag].0;
        let claim = batch.resume(page);
        engine.land(queue, &claim, backed, image).step(batch, claim)
    }

    /// The block that a step has named cannot be read. The page may have been rewritten or moved meanwhile, and
    /// then is looked for there.
    ///
    /// # Panics
    ///
    /// If it is not the page of such a step.
    pub fn not_landed(
        &mut self,
        engine: &Engine,
        queue: &mut Queue,
        tag: usize,
        (page, backed): (u32, Backed),
    ) -> Step {
        let batch = &self.board.batches[tag].0;
        let claim = batch.resume(page);
        let carried = match engine.unreadable(claim.handle(), backed) {
            true => Carried::Failed(BatchError::Unreadable),
            false => engine.carry_out(queue, &claim),
        };
        carried.step(batch, claim)
    }

    /// Gives up the page of a step that has named a block: it is not done, and its batch ends without it.
    ///
    /// # Panics
    ///
    /// If it is not the page of such a step.
    pub fn abandon(&mut self, tag: usize, page: u32) {
        let batch = &self.board.batches[tag].0;
        batch.give_back(batch.resume(page));
    }

    /// Keeps helpers from taking more of a batch's pages.
    pub fn close(&mut self, tag: usize) {
        self.board.batches[tag].0.close();
    }

    /// Whether every page of a batch is taken.
    pub fn is_taken(&self, tag: usize) -> bool {
        self.board.batches[tag].0.is_taken()
    }

    /// Whether nobody is at work any more on a batch that is wholly taken or closed. A page may not be
    /// done all the same: one that a helper took and gave back. The batch goes in line again for it
    /// ([`Batches::rejoin`]).
    pub fn has_ended(&self, tag: usize) -> bool {
        self.board.batches[tag].0.has_ended()
    }

    /// A bit for each page of a batch that is done, the lowest for the first page; those above the
    /// last are set.
    pub fn done(&self, tag: usize) -> u32 {
        self.board.batches[tag].0.done()
    }
}

impl Drop for Batches {
    /// The buffers may go after this.
    fn drop(&mut self) {
        self.board.batches.iter().for_each(|batch| batch.0.close());
        while !self.board.batches.iter().all(|batch| batch.0.has_ended()) {
            yield_now();
        }
    }
}

impl Board {
    /// Whether [`Engine::help`] would find something.
    pub fn needs_help(&self) -> bool {
        self.open_batch().is_some()
    }

    /// The first batch that helpers may take a page of: who reads waits for it, so gets come first.
    fn open_batch(&self) -> Option<&Batch> {
        let tags = self.gets.iter().chain(self.puts.iter());
        tags.map(|tag| &self.batches[tag].0).find(|batch| batch.is_open())
    }

    fn line(&self, way: Way) -> &Line {
        match way {
            Way::Get => &self.gets,
            Way::Put => &self.puts,
        }
    }
}

impl Line {
    fn new(places: usize) -> Self {
        let tags = (0..places).map(|_| AtomicU64::new(0)).collect();
        Self { tags, head: AtomicU64::new(0), tail: AtomicU64::new(0) }
    }

    fn push(&self, tag: usize) {
        let (head, tail) = (self.head.load(Ordering::Relaxed), self.tail.load(Ordering::Relaxed));
        assert!(tail - head < self.tags.len() as u64, "more requests than tags");
        self.place(tail).store(tag as u64, Ordering::Relaxed);
        // Sequentially consistent: a helper that goes to sleep either sees this or is seen asleep.
        self.tail.store(tail + 1, Ordering::SeqCst);
    }

    fn pop(&self) -> usize {
        let (head, tail) = (self.head.load(Ordering::Relaxed), self.tail.load(Ordering::Relaxed));
        assert!(head < tail, "nothing is in line");
        self.head.store(head + 1, Ordering::Release);
        self.place(head).load(Ordering::Relaxed) as usize
    }

    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        let head = self.head.load(Ordering::Acquire);
        let tail = self.tail.load(Ordering::SeqCst);
        // Bounded by the places whatever the owner does meanwhile.
        (head..tail).take(self.tags.len()).map(|at| self.place(at).load(Ordering::Relaxed) as usize)
    }

    fn place(&self, at: u64) -> &AtomicU64 {
        &self.tags[(at % self.tags.len() as u64) as usize]
    }
}

/// What a batch is about, in a word: way, pool and first page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct What {
    way: Way,
    pool: PoolId,
    first: u64,
}

const POOL_SHIFT: u32 = 32;
const PUT_BIT: u64 = 1 << 63;

// A pool's number stays below the way's bit.
const _: () = assert!(POOLS_MAX <= 1 << 15);

impl What {
    fn to_word(self) -> u64 {
        let put = if self.way == Way::Put { PUT_BIT } else { 0 };
        put | u64::from(self.pool.0) << POOL_SHIFT | self.first
    }

    fn from_word(word: u64) -> Self {
        let way = if word & PUT_BIT != 0 { Way::Put } else { Way::Get };
        let pool = PoolId(((word & !PUT_BIT) >> POOL_SHIFT) as u16);
        Self { way, pool, first: word & (POOL_PAGES_MAX - 1) }
    }
}

impl Engine {
    /// Does one page of a batch that is open to helpers; false if there is none, or the page failed. That
    /// one is left to the batch's owner, who will meet the same error.
    pub fn help(&self, queue: &mut Queue, board: &Board) -> bool {
        // Who finds a batch open and gets no page of it has lost the page to another, and looks on.
        while let Some(batch) = board.open_batch() {
            if let Some(claim) = batch.take_last() {
                match self.carry_out(queue, &claim) {
                    Carried::Done => {
                        batch.finish(claim);
                        return true;
                    }
                    Carried::Failed(_) => {
                        batch.give_back(claim);
                        return false;
                    }
                    // That closes this batch. There may be others.
                    Carried::Backed(_) => batch.give_back(claim),
                }
            }
        }
        false
    }

    /// Gets or puts a page that was taken.
    fn carry_out(&self, queue: &mut Queue, claim: &Claim) -> Carried {
        match claim.what().way {
            Way::Put => {
                // SAFETY: by the promise that `open` was given nobody writes the page.
                let page = unsafe { claim.page().as_ref() };
                self.put(queue, claim.handle(), page).map_err(BatchError::Put).into()
            }
            Way::Get => {
                // SAFETY: by that promise and because the page is taken, nobody else touches it.
                let page = unsafe { claim.page().as_mut() };
                got(self.get(queue, claim.handle(), page), page)
            }
        }
    }

    /// Gets a page that was taken from the block that it is in.
    fn land(&self, queue: &mut Queue, claim: &Claim, backed: Backed, image: Image<'_>) -> Carried {
        assert_eq!(claim.what().way, Way::Get, "what is put is not read");
        // SAFETY: as above.
        let page = unsafe { claim.page().as_mut() };
        got(self.get_backed(queue, claim.handle(), backed, image, page), page)
    }
}

/// What a get for a batch came to; a page that is not there reads as zeros.
fn got(result: Result<Got, GetError>, page: &mut Page) -> Carried {
    match result {
        Ok(Got::Hit) => Carried::Done,
        Ok(Got::Miss) => {
            page.fill(0);
            Carried::Done
        }
        Ok(Got::Backed(backed)) => Carried::Backed(backed),
        Err(error) => Carried::Failed(BatchError::Get(error)),
    }
}

/// What became of a page that was taken.
enum Carried {
    Done,
    Backed(Backed),
    Failed(BatchError),
}

impl Carried {
    /// Says so to its batch, for the batch's owner.
    fn step(self, batch: &Batch, claim: Claim) -> Step {
        let page = claim.page;
        match self {
            Carried::Done => {
                batch.finish(claim);
                Step::Done
            }
            // The claim is taken up again when the block is there.
            Carried::Backed(backed) => Step::Backed { page, backed },
            Carried::Failed(error) => {
                batch.give_back(claim);
                Step::Failed { page, error }
            }
        }
    }
}

impl From<Result<(), BatchError>> for Carried {
    fn from(result: Result<(), BatchError>) -> Self {
        result.map_or_else(Carried::Failed, |()| Carried::Done)
    }
}

impl Claim {
    fn what(&self) -> What {
        What::from_word(self.what)
    }

    fn handle(&self) -> Handle {
        let What { pool, first, .. } = self.what();
        Handle::from_page(pool, first + u64::from(self.page))
    }

    /// Where the page is.
    fn page(&self) -> NonNull<Page> {
        debug_assert!(self.page < BATCH_PAGES);
        let start = NonNull::new(self.buffer).expect("a batch with pages has a buffer");
        // SAFETY: the page is one of the batch's, so it lies in the buffer that `open` was promised.
        unsafe { start.add(self.page as usize * PAGE_SIZE).cast() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_says_what_a_batch_is_about() {
        for way in [Way::Get, Way::Put] {
            for (pool, first) in [(0, 0), (POOLS_MAX as u16 - 1, POOL_PAGES_MAX - 1), (1, 1 << 31)]
            {
                let what = What { way, pool: PoolId(pool), first };
                assert_eq!(What::from_word(what.to_word()), what);
            }
        }
    }

    #[test]
    fn a_line_keeps_order_and_wraps() {
        let line = Line::new(3);
        for round in 0..4 {
            for tag in [2, 0, 1] {
                line.push(tag);
            }
            assert_eq!(line.iter().collect::<Vec<_>>(), [2, 0, 1], "round {round}");
            assert_eq!([line.pop(), line.pop()], [2, 0]);
            assert_eq!(line.iter().collect::<Vec<_>>(), [1]);
            assert_eq!(line.pop(), 1);
            assert_eq!(line.iter().next(), None);
        }
    }

    #[test]
    #[should_panic(expected = "more requests than tags")]
    fn a_line_has_a_place_for_each_tag_and_no_more() {
        let line = Line::new(1);
        line.push(0);
        line.push(0);
    }
}
