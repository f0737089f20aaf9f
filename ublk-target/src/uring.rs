//! A thread's io_uring, as those use it that have it to themselves.
//!
//! Nothing here allocates after a ring is made, neither does the kernel for what is submitted to it: it keeps what the
//! first entries needed for those that follow. What an entry works on is the caller's to see to:
//! [`Uring::push`] is `unsafe`.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;

use crate::process;

/// What [`Uring::signal`] writes; an eventfd adds it to its count.
static ONE: u64 = 1;

/// See the module's description.
pub struct Uring {
    ring: IoUring,
}

impl Uring {
    /// A ring that has so many entries. Only the thread that makes it may use it.
    pub fn new(entries: u32) -> io::Result<Self> {
        // Completions are run when the thread asks for them and never interrupt a put.
        let modern = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            // Or who does not wait would not see that they are there to be run.
            .setup_taskrun_flag()
            .build(entries);
        let ring = match modern {
            // Linux before 6.1.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(entries)?,
            result => result?,
        };
        // To wait with a time limit.
        if !ring.params().is_feature_ext_arg() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut uring = Self { ring };
        uring.warm_up(entries)?;
        Ok(uring)
    }

    /// Has the kernel make room for so many entries under way, which it keeps: it would wait for memory when there is none, and
    /// who should free some may wait for us.
    fn warm_up(&mut self, entries: u32) -> io::Result<()> {
        for _ in 0..entries {
            // SAFETY: it works on no memory.
            unsafe { self.push(opcode::Nop::new().build(), 0) };
        }
        let mut left = entries;
        while left > 0 {
            self.wait(None)?;
            left -= std::iter::from_fn(|| self.completed()).count() as u32;
        }
        Ok(())
    }

    /// Queues a write that wakes whoever polls `eventfd`, which must be non-blocking. It leaves with
    /// the next [`Uring::wait`].
    pub fn signal(&mut self, eventfd: RawFd, user_data: u64) {
        let ptr = (&raw const ONE).cast::<u8>();
        let write = opcode::Write::new(types::Fd(eventfd), ptr, size_of_val(&ONE) as u32);
        // SAFETY: ONE is a static that is never written, so the kernel may read it at any time.
        unsafe { self.push(write.build(), user_data) };
    }

    /// Asks to be told once when `eventfd` is written to.
    pub fn watch(&mut self, eventfd: RawFd, user_data: u64) {
        let poll = opcode::PollAdd::new(types::Fd(eventfd), libc::POLLIN as u32);
        // SAFETY: a poll works on no memory.
        unsafe { self.push(poll.build(), user_data) };
    }

    /// Cancels what is under way with the user data `of`: it completes soon, if it has not.
    pub fn cancel(&mut self, of: u64, user_data: u64) {
        // SAFETY: a cancellation works on no memory.
        unsafe { self.push(opcode::AsyncCancel::new(of).build(), user_data) };
    }

    /// Submits what is queued, and waits for a completion, but not longer than `limit`.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        let result = match limit {
            None => self.ring.submit_and_wait(1),
            Some(Duration::ZERO) => self.ring.submit_and_wait(0),
            Some(limit) => {
                let limit = types::Timespec::from(limit);
                let args = types::SubmitArgs::new().timespec(&limit);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        match result {
            // Being traced or stopped, and sleep, interrupt a wait; the kernel may want its
            // completions taken first; or the time is over.
            Err(error) if !is_passing(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Submits what is queued, and waits for nothing.
    pub fn submit(&mut self) -> io::Result<()> {
        match self.ring.submit() {
            Err(error) if !is_passing(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether something has come that the kernel has not been asked for: two looks at shared memory.
    pub fn has_news(&mut self) -> bool {
        self.ring.submission().taskrun() || !self.ring.completion().is_empty()
    }

    /// Makes a place for a file that entries name as `types::Fixed(0)`, which spares the kernel to look it up.
    pub fn reserve_file(&self) -> io::Result<()> {
        self.ring.submitter().register_files_sparse(1)
    }

    /// Puts a file there.
    pub fn set_file(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        match self.ring.submitter().register_files_update(0, &[file.as_raw_fd()])? {
            1 => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Takes a completion: its user data, and its result.
    pub fn completed(&mut self) -> Option<(u64, i32)> {
        let entry = self.ring.completion().next()?;
        Some((entry.user_data(), entry.result()))
    }

    /// Queues an entry. It leaves with the next [`Uring::wait`].
    ///
    /// # Safety
    ///
    /// What the entry points at stays there, and is not used otherwise than the kernel's use allows,
    /// until it has completed.
    pub unsafe fn push(&mut self, entry: Entry, user_data: u64) {
        let entry = entry.user_data(user_data);
        loop {
            // SAFETY: the caller's promise is the same.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // The ring has an entry for all that can be queued at a time, so this is rare.
            if let Err(error) = self.wait(Some(Duration::ZERO)) {
                process::fatal(format_args!("io_uring failed: {error}"));
            }
        }
    }
}

/// True for what an interrupted wait returns.
fn is_passing(error: &io::Error) -> bool {
    let passing = [Errno::INTR, Errno::AGAIN, Errno::BUSY, Errno::TIME];
    Errno::from_io_error(error).is_some_and(|errno| passing.contains(&errno))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::event::EventfdFlags;

    use super::*;

    fn eventfd() -> OwnedFd {
        rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap()
    }

    #[test]
    fn what_came_is_seen_without_waiting_for_it() {
        let mut ring = Uring::new(8).unwrap();
        let eventfd = eventfd();
        ring.watch(eventfd.as_raw_fd(), 5);
        ring.wait(Some(Duration::ZERO)).unwrap();
        assert_eq!(ring.completed(), None);
        rustix::io::write(&eventfd, &1_u64.to_le_bytes()).unwrap();
        let seen = (0..1000).find_map(|_| {
            ring.wait(Some(Duration::ZERO)).unwrap();
            ring.completed()
        });
        assert_eq!(seen.map(|(user_data, _)| user_data), Some(5));
    }

    #[test]
    fn a_wait_ends_in_time_and_with_a_signal() {
        let mut ring = Uring::new(8).unwrap();
        ring.wait(Some(Duration::from_millis(1))).unwrap();
        assert_eq!(ring.completed(), None);
        let eventfd = eventfd();
        ring.watch(eventfd.as_raw_fd(), 1);
        ring.signal(eventfd.as_raw_fd(), 2);
        let mut seen = Vec::new();
        while seen.len() < 2 {
            ring.wait(None).unwrap();
            seen.extend(std::iter::from_fn(|| ring.completed()).map(|(user_data, _)| user_data));
        }
        seen.sort_unstable();
        assert_eq!(seen, [1, 2]);
    }
}
