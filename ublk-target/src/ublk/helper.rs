//! Helpers: threads that serve pages of a device's requests on processors that are idle.
//!
//! A queue's thread runs on the processor whose requests it serves, so that who reads finds it
//! there. A large write then compresses page after page on that processor, and reclaim, which sent it,
//! waits with it. Helpers run wherever there is room. They sleep until a queue's thread has more work
//! than is worth calling somebody for ([`Crew::claim`]), and then take pages from the end of its
//! requests until there are none ([`tmem::Engine::help`]). A page that a helper has taken is done when
//! the helper gets to run; nothing else waits for one.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use tmem::Board;

use crate::device::BlockDevice;
use crate::process;

/// Helpers of a device at most. What they relieve a queue's thread of is compressing; its other work,
/// for which it is alone, is a sixth of that.
const HELPERS_MAX: usize = 3;

/// How many helpers are of use to so many queues on so many processors.
pub fn helpers_for(cpus: usize) -> usize {
    cpus.saturating_sub(1).min(HELPERS_MAX)
}

/// The helpers of a device, as its queues see them.
pub struct Crew {
    members: Box<[Member]>,
    boards: Box<[Arc<Board>]>,
    helped: AtomicU64,
    stop: AtomicBool,
}

/// A helper that can be woken.
pub struct Member {
    eventfd: OwnedFd,
    sleeps: AtomicBool,
}

impl Member {
    fn new() -> io::Result<Self> {
        // Non-blocking, so that io_uring writes it inline.
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { eventfd, sleeps: AtomicBool::new(false) })
    }

    /// The eventfd to write 1 to after [`Crew::claim`].
    pub fn fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }

    /// Takes a claim back that could not be made good.
    pub fn unclaim(&self) {
        self.sleeps.store(true, Ordering::SeqCst);
    }

    /// Waits until woken.
    fn sleep(&self) {
        match poll(&mut [PollFd::new(&self.eventfd, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => process::fatal(format_args!("a helper cannot wait for work: {errno}")),
        }
        let mut count = [0; 8];
        // Would block after an interruption; the count itself says nothing.
        let _ = rustix::io::read(&self.eventfd, &mut count);
    }

    /// Wakes it with a system call: not for the I/O path.
    fn wake(&self) {
        // Fails only if the count is at its maximum, and then it is awake.
        let _ = rustix::io::write(&self.eventfd, &1_u64.to_le_bytes());
    }
}

impl Crew {
    /// A helper that sleeps, which the caller is now the one to wake.
    pub fn claim(&self) -> Option<&Member> {
        self.members.iter().find(|member| {
            member.sleeps.load(Ordering::SeqCst) && member.sleeps.swap(false, Ordering::SeqCst)
        })
    }

    /// Pages that helpers did.
    pub fn helped(&self) -> u64 {
        self.helped.load(Ordering::Relaxed)
    }

    fn run(&self, member: &Member, device: &BlockDevice) {
        let mut queue = device.queue();
        while !self.stop.load(Ordering::SeqCst) {
            if self.help_all(device, &mut queue) {
                continue;
            }
            // Whoever has work after this look sees that it sleeps.
            member.sleeps.store(true, Ordering::SeqCst);
            if !self.boards.iter().any(|board| board.needs_help()) {
                member.sleep();
            }
            member.sleeps.store(false, Ordering::SeqCst);
        }
    }

    /// Does a page for each queue that has one to spare; false if none had.
    fn help_all(&self, device: &BlockDevice, queue: &mut tmem::Queue) -> bool {
        let helped = self.boards.iter().filter(|board| device.engine().help(queue, board)).count();
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
    /// Starts `count` helpers for the queues of a device that have these boards.
    pub fn start(
        count: usize,
        number: u32,
        device: &Arc<BlockDevice>,
        boards: Box<[Arc<Board>]>,
    ) -> io::Result<Self> {
        let members = (0..count).map(|_| Member::new()).collect::<io::Result<_>>()?;
        let crew =
            Crew { members, boards, helped: AtomicU64::new(0), stop: AtomicBool::new(false) };
        let mut helpers = Self { crew: Arc::new(crew), threads: Vec::with_capacity(count) };
        for id in 0..count {
            let (crew, device) = (Arc::clone(&helpers.crew), Arc::clone(device));
            let body = move || crew.run(&crew.members[id], &device);
            let thread = process::spawn_essential(format!("tmem-b{number}h{id}"), body)?;
            helpers.threads.push(thread);
        }
        Ok(helpers)
    }

    /// What queues call them by.
    pub fn crew(&self) -> &Arc<Crew> {
        &self.crew
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.crew.stop.store(true, Ordering::SeqCst);
        self.crew.members.iter().for_each(Member::wake);
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
    fn a_helper_sleeps_until_it_is_called_and_then_does_all_pages() {
        let (device, _) = device(1 << 20);
        let device = Arc::new(device);
        let mut buf = vec![7_u8; 8 * PAGE_SIZE];
        let mut batches = Batches::new(1);
        let boards = Box::new([Arc::clone(batches.board())]);
        let helpers = Helpers::start(1, 0, &device, boards).unwrap();
        for round in 1..=3 {
            let member = loop {
                match helpers.crew().claim() {
                    Some(member) => break member,
                    None => std::thread::yield_now(),
                }
            };
            assert!(helpers.crew().claim().is_none(), "it is called twice");
            let start = NonNull::new(buf.as_mut_ptr()).unwrap();
            // SAFETY: `buf` is not touched until the batch has ended, and outlives the batches.
            unsafe { batches.open(0, Way::Put, device.pool(), 0, 8, start) };
            member.wake();
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
