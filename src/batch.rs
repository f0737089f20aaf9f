//! A batch: who does which page of a request, when several threads share its pages.
//!
//! One thread owns the batch: it opens it, takes pages from the front and says when it is over.
//! Helpers take pages from the back, as long as the batch is open to them. A page is taken by one
//! of them at a time; it ends as done, or is given back, which closes the batch to helpers: what
//! went wrong is the owner's to find out, page by page in order, as if nobody had helped.
//!
//! ```text
//! state   63       33    32    31                        0
//!        +-----------+-------+---------------------------+
//!        |   epoch   | alone | a bit a page: it is taken |
//!        +-----------+-------+---------------------------+
//! done                         a bit a page: it is done
//! ```
//!
//! Pages that the request does not have are taken and done from the start. This file knows nothing
//! of pages' contents; a buffer's address is a number to it that goes to whoever takes a page.

use std::ptr;

use crate::sync::{AtomicPtr, AtomicU64, Ordering};

/// Pages that a batch can have: 128 KiB, the largest request that the kernel's swap code makes.
pub const BATCH_PAGES: u32 = 32;

const TAKEN: u64 = (1 << BATCH_PAGES) - 1;
const ALONE: u64 = 1 << BATCH_PAGES;
/// Counts the requests that a batch has served, so that who looked at an earlier one takes nothing of
/// a later one. Wraps after 2^31 of them.
const EPOCH: u64 = ALONE << 1;

/// See the module's description.
pub(crate) struct Batch {
    state: AtomicU64,
    done: AtomicU64,
    /// What is to be done: the board's encoding.
    what: AtomicU64,
    buffer: AtomicPtr<u8>,
}

/// A page that a thread has taken. It goes to [`Batch::finish`] or [`Batch::give_back`].
#[must_use]
pub(crate) struct Claim {
    pub(crate) what: u64,
    /// The buffer of the whole batch.
    pub(crate) buffer: *mut u8,
    /// The page in it.
    pub(crate) page: u32,
}

impl Batch {
    /// A batch without pages.
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU64::new(TAKEN | ALONE),
            done: AtomicU64::new(TAKEN),
            what: AtomicU64::new(0),
            buffer: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// Makes it a batch of so many pages that nobody has taken. For its owner, when it is idle.
    pub(crate) fn open(&self, what: u64, buffer: *mut u8, pages: u32) {
        assert!((1..=BATCH_PAGES).contains(&pages), "a batch of {pages} pages");
        assert!(self.has_ended(), "a batch is opened that is at work");
        let absent = TAKEN & !((1 << pages) - 1);
        self.done.store(absent, Ordering::Relaxed);
        // Who reads these two has to see that the state changed before, so that it takes nothing by
        // an old state.
        self.what.store(what, Ordering::Release);
        self.buffer.store(buffer, Ordering::Release);
        let epoch = self.state.load(Ordering::Relaxed) & !(TAKEN | ALONE);
        self.state.store(epoch.wrapping_add(EPOCH) | absent, Ordering::Release);
    }

    /// Takes the first page that nobody has. For its owner.
    pub(crate) fn take_first(&self) -> Option<Claim> {
        self.take(|free, _| (free != 0).then(|| free.trailing_zeros()))
    }

    /// Takes the last page that nobody has, if helpers may.
    pub(crate) fn take_last(&self) -> Option<Claim> {
        self.take(|free, is_alone| (free != 0 && !is_alone).then(|| free.ilog2()))
    }

    fn take(&self, choose: impl Fn(u64, bool) -> Option<u32>) -> Option<Claim> {
        let mut state = self.state.load(Ordering::Acquire);
        // Each turn beyond the first means that somebody else got a page, or the owner closed it.
        loop {
            let page = choose(!state & TAKEN, state & ALONE != 0)?;
            // If these belong to a later request, then so does the state, and the exchange fails.
            let what = self.what.load(Ordering::Acquire);
            let buffer = self.buffer.load(Ordering::Acquire);
            let taken = state | 1 << page;
            let exchanged =
                self.state.compare_exchange(state, taken, Ordering::AcqRel, Ordering::Acquire);
            match exchanged {
                Ok(_) => return Some(Claim { what, buffer, page }),
                Err(now) => state = now,
            }
        }
    }

    /// Says that a taken page is done.
    pub(crate) fn finish(&self, claim: Claim) {
        let before = self.done.fetch_or(1 << claim.page, Ordering::AcqRel);
        debug_assert_eq!(before & 1 << claim.page, 0, "a page is done twice");
    }

    /// Gives a taken page back, and leaves what is not taken to the owner.
    pub(crate) fn give_back(&self, claim: Claim) {
        self.close();
        self.state.fetch_and(!(1 << claim.page), Ordering::AcqRel);
    }

    /// The claim on a page that its owner took and has neither finished nor given back.
    pub(crate) fn resume(&self, page: u32) -> Claim {
        let at = 1 << page;
        let taken = self.state.load(Ordering::Acquire) & at != 0;
        assert!(taken && self.done.load(Ordering::Acquire) & at == 0, "page {page} is not at work");
        let what = self.what.load(Ordering::Acquire);
        Claim { what, buffer: self.buffer.load(Ordering::Acquire), page }
    }

    /// Keeps helpers from taking more pages.
    pub(crate) fn close(&self) {
        self.state.fetch_or(ALONE, Ordering::AcqRel);
    }

    /// Whether a helper could take a page.
    pub(crate) fn is_open(&self) -> bool {
        let state = self.state.load(Ordering::Acquire);
        state & TAKEN != TAKEN && state & ALONE == 0
    }

    /// Whether every page is taken.
    pub(crate) fn is_taken(&self) -> bool {
        self.state.load(Ordering::Acquire) & TAKEN == TAKEN
    }

    /// Whether nobody is at work on it, nor will be until it is opened again. What helpers did is
    /// visible then.
    pub(crate) fn has_ended(&self) -> bool {
        !self.is_open() && self.is_idle()
    }

    /// Whether nobody is at work on a page at the moment.
    pub(crate) fn is_idle(&self) -> bool {
        // In this order: a page that was taken in between would be missing otherwise.
        let taken = self.state.load(Ordering::Acquire) & TAKEN;
        taken & !self.done.load(Ordering::Acquire) == 0
    }

    /// A bit for each page that is done, and for those that the request does not have.
    pub(crate) fn done(&self) -> u32 {
        self.done.load(Ordering::Acquire) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(batch: &Batch, take: impl Fn(&Batch) -> Option<Claim>) -> Vec<u32> {
        std::iter::from_fn(|| {
            let claim = take(batch)?;
            let page = claim.page;
            batch.finish(claim);
            Some(page)
        })
        .collect()
    }

    fn open(pages: u32) -> Batch {
        let batch = Batch::new();
        batch.open(7, ptr::null_mut(), pages);
        batch
    }

    #[test]
    fn owner_and_helper_meet_in_the_middle() {
        let batch = open(5);
        let (first, last) = (batch.take_first().unwrap(), batch.take_last().unwrap());
        assert_eq!((first.page, last.page, first.what), (0, 4, 7));
        assert!(!batch.is_idle() && batch.is_open());
        batch.finish(last);
        assert_eq!(pages(&batch, Batch::take_last), [3, 2, 1]);
        assert!(batch.is_taken() && !batch.is_open() && !batch.is_idle());
        batch.finish(first);
        assert!(batch.is_idle());
        assert_eq!(batch.done(), u32::MAX);
    }

    #[test]
    fn what_a_helper_gives_back_is_the_owners_alone() {
        let batch = open(BATCH_PAGES);
        let claim = batch.take_last().unwrap();
        assert_eq!(claim.page, 31);
        batch.give_back(claim);
        assert!(batch.is_idle() && !batch.is_open() && !batch.is_taken());
        assert!(batch.take_last().is_none());
        assert_eq!(batch.done(), 0);
        assert_eq!(pages(&batch, Batch::take_first), (0..32).collect::<Vec<_>>());
    }

    #[test]
    fn a_new_batch_has_no_pages_and_a_closed_one_is_open_again_only_when_opened() {
        let batch = Batch::new();
        assert!(batch.take_first().is_none() && batch.take_last().is_none() && batch.is_idle());
        for _ in 0..3 {
            batch.open(1, ptr::null_mut(), 2);
            assert!(batch.is_open());
            batch.close();
            assert!(batch.take_last().is_none() && batch.is_idle());
        }
    }

    #[test]
    #[should_panic(expected = "at work")]
    fn a_batch_at_work_is_not_opened() {
        let batch = open(2);
        let _claim = batch.take_first();
        batch.close();
        batch.open(1, ptr::null_mut(), 2);
    }

    /// So whoever says what became of a request looks at what is done, and not only at what failed.
    #[test]
    fn a_page_before_one_that_failed_can_be_left() {
        let batch = open(4);
        let (last, other) = (batch.take_last().unwrap(), batch.take_last().unwrap());
        batch.give_back(last);
        for _ in 0..2 {
            let claim = batch.take_first().unwrap();
            batch.finish(claim);
        }
        let failed = batch.take_first().unwrap();
        assert_eq!((failed.page, other.page), (3, 2));
        batch.give_back(failed);
        assert!(!batch.has_ended());
        batch.give_back(other);
        assert!(batch.has_ended());
        assert_eq!(batch.done().trailing_ones(), 2);
    }
}
