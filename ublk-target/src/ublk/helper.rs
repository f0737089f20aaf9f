//! Helpers: threads that serve pages of a device's requests on processors that are idle.
//!
//! A queue's thread runs on the processor whose requests it serves, so that who reads finds it
//! there. A large write then compresses page after page on that processor, and reclaim, which sent it,
//! waits with it. Helpers are bound to no processor. They sleep until a queue's thread has more work
//! than is worth calling somebody for ([`Crew::claim`]), and then take pages from the end of its
//! requests until there are none ([`tmem::Engine::help`]). A page that a helper has taken is done when
//! the helper gets to run; nothing else waits for one. So that this is soon, a helper has the weight of a
//! queue's thread, at which it may take a processor from other programs.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use rustix::event::Timespec;
use tmem::Board;

use crate::device::BlockDevice;
use crate::process;
use crate::waker::Waker;

/// Helpers of a device at most. They relieve a queue's thread of compressing, but not of its other
/// work, so more of them are of ever less use.
const HELPERS_MAX: usize = 3;

/// How soon a helper looks for work that it was not called to.
const LOOK_PERIOD: Timespec = Timespec { tv_sec: 8, tv_nsec: 0 };

/// How many helpers are of use to so many queues on so many processors.
pub fn helpers_for(cpus: usize) -> usize {
    cpus.saturating_sub(1).min(HELPERS_MAX)
}

/// The helpers of a device, as its queues see them.
pub struct Crew {
    wakers: Box<[Waker]>,
    work: OnceLock<Work>,
    helped: AtomicU64,
}

/// What helpers work on.
struct Work {
    device: Arc<BlockDevice>,
    boards: Box<[Arc<Board>]>,
}

impl Crew {
    /// A helper that the caller is now the one to wake; none if all are being woken.
    pub fn claim(&self) -> Option<&Waker> {
        self.wakers.iter().find(|waker| waker.claim())
    }

    /// Pages that helpers did.
    pub fn helped(&self) -> u64 {
        self.helped.load(Ordering::Relaxed)
    }

    fn run(&self, waker: &Waker) {
        process::become_server();
        while !waker.is_stopped() {
            let Some(work) = self.work.get() else {
                waker.wait(&LOOK_PERIOD);
                continue;
            };
            let mut queue = work.device.queue();
            while !waker.is_stopped() {
                if !self.help_all(work, &mut queue) {
                    waker.wait(&LOOK_PERIOD);
                }
            }
        }
    }

    /// Does a page for each queue that has one to spare; false if none was done.
    fn help_all(&self, work: &Work, queue: &mut tmem::Queue) -> bool {
        let engine = work.device.engine();
        let helped = work.boards.iter().filter(|board| engine.help(queue, board)).count();
        self.helped.fetch_add(helped as u64, Ordering::Relaxed);
        helped > 0
    }
}

/// Running helpers. Stops them when dropped.
pub struct Helpers {
    crew: Arc<Crew>,
    threads: Vec<JoinHandle<()>>,
}

impl Helpers {
    /// Starts `count` helpers of the device with this name. They have nothing to do yet.
    pub fn start(count: usize, name: &str) -> io::Result<Self> {
        let wakers = (0..count).map(|_| Waker::new()).collect::<io::Result<_>>()?;
        let crew = Crew { wakers, work: OnceLock::new(), helped: AtomicU64::new(0) };
        let mut helpers = Self { crew: Arc::new(crew), threads: Vec::with_capacity(count) };
        for id in 0..count {
            let crew = Arc::clone(&helpers.crew);
            let body = move || crew.run(&crew.wakers[id]);
            helpers.threads.push(process::spawn_essential(format!("{name}h{id}"), body)?);
        }
        Ok(helpers)
    }

    /// Lets them help the queues of a device that have these boards.
    ///
    /// # Panics
    ///
    /// If they help another.
    pub fn help(&self, device: Arc<BlockDevice>, boards: Box<[Arc<Board>]>) {
        assert!(self.crew.work.set(Work { device, boards }).is_ok(), "they help another device");
        self.crew.wakers.iter().for_each(Waker::wake);
    }

    /// What queues call them by.
    pub fn crew(&self) -> &Arc<Crew> {
        &self.crew
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.crew.wakers.iter().for_each(Waker::stop);
        for thread in self.threads.drain(..) {
            // A panic in it would have ended the process.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use tmem::{Batches, PAGE_SIZE, Way};

    use super::*;
    use crate::device::tests::device;

    #[test]
    fn as_many_helpers_as_there_are_other_processors_up_to_a_limit() {
        assert_eq!([0, 1, 2, 3, 4, 64].map(helpers_for), [0, 0, 1, 2, 3, 3]);
    }

    #[test]
    #[allow(unsafe_code)]
    fn a_helper_that_is_called_does_all_pages() {
        let (device, _) = device(1 << 20);
        let device = Arc::new(device);
        let mut buf = vec![7_u8; 8 * PAGE_SIZE];
        let mut batches = Batches::new(1);
        let boards = Box::new([Arc::clone(batches.board())]);
        let helpers = Helpers::start(1, "test").unwrap();
        helpers.help(Arc::clone(&device), boards);
        for round in 1..=3 {
            let start = NonNull::new(buf.as_mut_ptr()).unwrap();
            // SAFETY: `buf` is not touched until the batch has ended, and outlives the batches.
            unsafe { batches.open(0, Way::Put, device.pool(), 0, 8, start) };
            // Nobody to claim: it has been called already.
            helpers.crew().claim().into_iter().for_each(Waker::wake);
            while !batches.is_taken(0) || !batches.has_ended(0) {
                std::thread::yield_now();
            }
            assert_eq!(batches.leave(Way::Put), 0);
            assert_eq!(batches.done(0), u32::MAX);
            assert_eq!(device.pool_stats().succ_puts, 8 * round);
        }
        let crew = Arc::clone(helpers.crew());
        drop(helpers);
        assert_eq!(crew.helped(), 24);
    }
}
