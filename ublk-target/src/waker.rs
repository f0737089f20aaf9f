//! How a queue's thread wakes one that waits for work, without a system call of its own.
//!
//! A claim makes a crowd of queues wake the thread once: who has it writes to the eventfd, by io_uring.
//! The thread drops the claim before it looks for work, so that what comes after that look is claimed
//! anew and never missed.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::process;

/// See the module's description.
pub struct Waker {
    eventfd: OwnedFd,
    claimed: AtomicBool,
    stop: AtomicBool,
}

impl Waker {
    /// One that nobody has claimed.
    pub fn new() -> io::Result<Self> {
        // Non-blocking, so that io_uring writes it inline.
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { eventfd, claimed: AtomicBool::new(false), stop: AtomicBool::new(false) })
    }

    /// The eventfd to write 1 to after [`Waker::claim`].
    pub fn fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }

    /// True if the caller is the one to wake the thread.
    pub fn claim(&self) -> bool {
        // Sequentially consistent, so that this is not seen before what there is to do was made known.
        !self.claimed.load(Ordering::SeqCst) && !self.claimed.swap(true, Ordering::SeqCst)
    }

    /// Takes a claim back that could not be made good.
    pub fn unclaim(&self) {
        self.claimed.store(false, Ordering::SeqCst);
    }

    /// Wakes the thread with a system call: not for the I/O path.
    pub fn wake(&self) {
        // Fails only if the count is at its maximum, and then the thread is awake.
        // Any number but 0 wakes it.
        let _ = rustix::io::write(&self.eventfd, &1_u64.to_le_bytes());
    }

    /// Tells the thread to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Whether it is to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// For the thread itself: waits until woken, or for `limit`, and drops the claim.
    pub fn wait(&self, limit: &Timespec) {
        let mut fds = [PollFd::new(&self.eventfd, PollFlags::IN)];
        match poll(&mut fds, Some(limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => process::fatal(format_args!("cannot wait for work: {errno}")),
        }
        self.take();
    }

    /// For the thread itself, when it has seen that it was woken: drops the claim.
    pub fn take(&self) {
        let mut count = [0; 8];
        // Would block after a timeout; the count itself says nothing.
        let _ = rustix::io::read(&self.eventfd, &mut count);
        self.claimed.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_wakes_the_thread_once_until_it_looks() {
        let waker = Waker::new().unwrap();
        assert!(waker.claim());
        assert!(!waker.claim());
        waker.wake();
        waker.wait(&Timespec { tv_sec: 8, tv_nsec: 0 });
        assert!(waker.claim());
        waker.unclaim();
        assert!(waker.claim());
    }

    #[test]
    fn a_wait_ends_without_a_wake() {
        let waker = Waker::new().unwrap();
        waker.wait(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 });
    }
}
