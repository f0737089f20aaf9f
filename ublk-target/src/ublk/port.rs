//! A queue's end of the ublk driver: its io_uring, and the commands by which requests come and go.
//!
//! The ring and all that it needs are made before there is a device ([`Port::new`]); to take a device over then
//! takes no memory but the kernel's own. Nothing here allocates after [`Port::open`].
//!
//! This file has `unsafe` for the descriptors that the kernel writes, and the buffers that it works on.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::time::Duration;

use io_uring::{opcode, squeue, types};
use libublk::sys;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use tmem::PAGE_SIZE;

use super::buffers::Buffers;
use crate::backing::FETCHES_MAX;
use crate::uring::Uring;

/// Entries that a batch may need beyond one commit per tag: a signal to each of the supply thread, the thread that
/// writes to the backing file, and a helper; and reads of that file.
const EXTRA_ENTRIES: u32 = 3 + FETCHES_MAX as u32;

/// Marks the completion of [`Port::signal`].
const SIGNAL: u64 = 1 << 62;

/// Marks that of a read of the backing file, beside its number. What has no mark is a command, by its tag.
const FETCH: u64 = 1 << 63;

/// What a completion is of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Completion {
    /// A request has come, with this tag; or it is over with the queue.
    Command(u16),
    /// A read of the backing file has ended, by its number.
    Fetch(usize),
    /// Somebody was woken.
    Signal,
}

impl Completion {
    fn of(user_data: u64) -> Self {
        match user_data {
            SIGNAL => Self::Signal,
            read if read & FETCH != 0 => Self::Fetch((read & !FETCH) as usize),
            tag => Self::Command(tag as u16),
        }
    }
}

/// See the module's description.
pub struct Port {
    uring: Uring,
    queue: u16,
    depth: u16,
    is_modern: bool,
    descriptors: Option<Descriptors>,
    /// Commands that the driver has.
    with_driver: u32,
    /// Whether the driver gives back what it has, because the device is stopped.
    is_stopping: bool,
}

impl Port {
    /// For the queue of this number, which holds so many requests. Only the thread that makes it may use it.
    pub fn new(queue: u16, depth: u16) -> io::Result<Self> {
        // A place for every command and whatever comes with it: nothing is submitted in the middle of a batch.
        let uring = Uring::new(u32::from(depth) + EXTRA_ENTRIES)?;
        uring.reserve_file()?;
        let (with_driver, is_stopping) = (0, false);
        Ok(Self {
            uring,
            queue,
            depth,
            is_modern: true,
            descriptors: None,
            with_driver,
            is_stopping,
        })
    }

    /// Asks for the first requests of a device, and looks where they will be described.
    ///
    /// In this order, and all at once. A process that ends between the two leaves the device so that it can be taken over:
    /// Linux 6.12 refuses that as long as it knows whose the descriptors are, and no queue that was fetched for.
    pub fn open(
        &mut self,
        device: BorrowedFd<'_>,
        is_modern: bool,
        buffers: &Buffers,
    ) -> io::Result<()> {
        self.is_modern = is_modern;
        self.uring.set_file(device)?;
        for tag in 0..self.depth {
            self.push(sys::UBLK_U_IO_FETCH_REQ, tag, buffers.address(tag), -1);
        }
        self.uring.submit()?;
        self.descriptors = Some(Descriptors::map(device, self.queue, self.depth)?);
        // No request comes before the device is started, so what has come is a refusal.
        self.uring.wait(Some(Duration::ZERO))?;
        match self.uring.completed() {
            None => Ok(()),
            Some((_, result)) => Err(io::Error::from_raw_os_error(-result)),
        }
    }

    /// How the driver describes the request that has come with a tag.
    pub fn request(&self, tag: u16) -> sys::ublksrv_io_desc {
        self.descriptors.as_ref().expect("a port that is open").get(tag)
    }

    /// Hands a request back with its result and the buffer that it came in, and asks for the next with its tag.
    pub fn end(&mut self, tag: u16, result: i32, buffers: &Buffers) {
        if !self.is_stopping {
            let address = buffers.of_ended(tag).as_ptr() as u64;
            self.push(sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, address, result);
        }
    }

    fn push(&mut self, number: u32, tag: u16, address: u64, result: i32) {
        /// As the kernel finds it in an entry.
        #[repr(C)]
        union Place {
            command: sys::ublksrv_io_cmd,
            bytes: [u8; 16],
        }
        let place =
            Place { command: sys::ublksrv_io_cmd { q_id: self.queue, tag, result, addr: address } };
        let number = if self.is_modern { number } else { number & 0xff };
        let entry = opcode::UringCmd16::new(types::Fixed(0), number)
            // SAFETY: a command is sixteen bytes without a gap.
            .cmd(unsafe { place.bytes })
            .build();
        // SAFETY: the buffer is the driver's until the tag's next request comes, and is not freed before the ring.
        unsafe { self.uring.push(entry, tag.into()) };
        self.with_driver += 1;
    }

    /// Takes a completion with its result.
    pub fn completed(&mut self) -> Option<(Completion, i32)> {
        let (user_data, result) = self.uring.completed()?;
        let completion = Completion::of(user_data);
        if let Completion::Command(_) = completion {
            self.with_driver -= 1;
            self.is_stopping |= result == sys::UBLK_IO_RES_ABORT;
        }
        Some((completion, result))
    }

    /// Whether the driver has given back all that it had, and nothing will come any more.
    pub fn is_down(&self) -> bool {
        self.is_stopping && self.with_driver == 0
    }

    /// Submits what is queued, and waits for a completion, but not longer than `limit`.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.uring.wait(limit)
    }

    /// Submits what is queued, and waits for nothing.
    pub fn submit(&mut self) -> io::Result<()> {
        self.uring.submit()
    }

    /// Whether something has come that the kernel has not been asked for: two looks at shared memory.
    pub fn has_news(&mut self) -> bool {
        self.uring.has_news()
    }

    /// Queues a write that wakes whoever polls `eventfd`, which must be non-blocking.
    pub fn signal(&mut self, eventfd: RawFd) {
        self.uring.signal(eventfd, SIGNAL);
    }

    /// Queues a read of the backing file.
    ///
    /// # Safety
    ///
    /// What the entry points at stays there, and nobody else uses it, until it has completed.
    pub unsafe fn fetch(&mut self, read: usize, entry: squeue::Entry) {
        // SAFETY: the caller's promise is the same.
        unsafe { self.uring.push(entry, FETCH | read as u64) };
    }
}

/// A queue's request descriptors, which the kernel writes.
struct Descriptors {
    start: NonNull<sys::ublksrv_io_desc>,
    depth: u16,
}

impl Descriptors {
    fn map(device: BorrowedFd<'_>, queue: u16, depth: u16) -> io::Result<Self> {
        let largest = bytes_of(sys::UBLK_MAX_QUEUE_DEPTH as usize) as u64;
        let offset = u64::from(sys::UBLKSRV_CMD_BUF_OFFSET) + u64::from(queue) * largest;
        let (read, flags) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start =
            unsafe { mmap(ptr::null_mut(), bytes_of(depth.into()), read, flags, device, offset)? };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, depth })
    }

    fn get(&self, tag: u16) -> sys::ublksrv_io_desc {
        assert!(tag < self.depth, "there is no tag {tag}");
        // SAFETY: it is inside of the mapping, and the kernel has written it before it completed the
        // command whose tag this is; it writes it again only after the next.
        unsafe { self.start.add(tag.into()).read_volatile() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: it is the mapping that was made, and nobody has a reference into it.
        let _ =
            unsafe { munmap(self.start.as_ptr().cast::<c_void>(), bytes_of(self.depth.into())) };
    }
}

// SAFETY: it is memory that is only read.
unsafe impl Send for Descriptors {}

/// Bytes of so many descriptors, in whole pages.
fn bytes_of(depth: usize) -> usize {
    (depth * size_of::<sys::ublksrv_io_desc>()).next_multiple_of(PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn completions_are_told_apart() {
        for (user_data, completion) in [
            (0, Completion::Command(0)),
            (127, Completion::Command(127)),
            (SIGNAL, Completion::Signal),
            (FETCH, Completion::Fetch(0)),
            (FETCH | 23, Completion::Fetch(23)),
        ] {
            assert_eq!(Completion::of(user_data), completion);
        }
    }

    #[test]
    fn who_is_signalled_hears_it_with_the_next_submission() {
        let mut port = Port::new(0, 8).unwrap();
        let eventfd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        port.signal(eventfd.as_raw_fd());
        port.wait(None).unwrap();
        assert_eq!(port.completed(), Some((Completion::Signal, 8)));
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(&eventfd, &mut count).unwrap(), 8);
        assert!(!port.is_down());
    }
}
