//! The queue thread's io_uring: made here, and the few things done with it beside libublk.
//!
//! The ring is this thread's alone (libublk keeps it in a thread-local). Nothing here allocates
//! after [`init`].
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use libublk::io::with_task_io_ring_mut;
use libublk::{UblkError, UblkUringData, ublk_init_task_ring};
use rustix::io::Errno;

use crate::backing::FETCHES_MAX;

/// Marks completions that are not ublk commands.
const TARGET: u64 = UblkUringData::Target as u64;

/// Entries that a batch may need beyond one commit per tag: a signal to each of the supply thread, the thread that
/// writes to the backing file, and a helper; and reads of that file.
const EXTRA_ENTRIES: u32 = 3 + FETCHES_MAX as u32;

/// What [`signal`] writes; an eventfd adds it to its count.
static ONE: u64 = 1;

/// Makes this thread's ring, for a queue of `depth` tags.
///
/// It holds a submission for every tag and the signals at once: libublk enters the kernel, and
/// panics when that fails, where a submission finds no room. Completions are run when the thread
/// asks for them (`DEFER_TASKRUN`) and never interrupt a put; that there are some, it sees without
/// asking (`TASKRUN_FLAG`).
pub fn init(depth: u16) -> Result<(), UblkError> {
    ublk_init_task_ring(|cell| {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(u32::from(depth) + EXTRA_ENTRIES)?;
        cell.set(RefCell::new(ring)).map_err(|_| UblkError::OtherError(-libc::EEXIST))
    })
}

/// What a completion is of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// A ublk command.
    Command,
    /// A read of the backing file, by its number.
    Fetch(usize),
    /// [`signal`].
    Signal,
}

impl Kind {
    /// The kind that a completion's user data says.
    pub fn of(user_data: u64) -> Self {
        match user_data & !TARGET {
            _ if user_data & TARGET == 0 => Kind::Command,
            0 => Kind::Signal,
            read => Kind::Fetch(read as usize - 1),
        }
    }
}

/// Queues a read of the backing file. False if there was no room.
///
/// # Safety
///
/// What the entry points at stays there, and nobody else uses it, until it has completed.
pub unsafe fn fetch(read: usize, entry: squeue::Entry) -> bool {
    let entry = entry.user_data(TARGET | (read as u64 + 1));
    // SAFETY: the caller's promise is the same.
    with_task_io_ring_mut(|ring| unsafe { ring.submission().push(&entry) }.is_ok())
}

/// Whether something has come that the kernel has not been asked for: two looks at shared memory.
pub fn has_news() -> bool {
    with_task_io_ring_mut(|ring| ring.submission().taskrun() || !ring.completion().is_empty())
}

/// Queues a write that wakes whoever polls `eventfd`; it leaves with the next submission. False
/// if there was no room.
///
/// `eventfd` must be non-blocking, or io_uring would hand the write to a worker thread.
pub fn signal(eventfd: RawFd) -> bool {
    let ptr = (&raw const ONE).cast::<u8>();
    let entry = opcode::Write::new(types::Fd(eventfd), ptr, size_of_val(&ONE) as u32)
        .build()
        .user_data(TARGET);
    // SAFETY: ONE is a static that is never written, so the kernel may read it at any time.
    with_task_io_ring_mut(|ring| unsafe { ring.submission().push(&entry) }.is_ok())
}

/// Submits what is queued, and waits for nothing.
pub fn submit() -> io::Result<()> {
    with_task_io_ring_mut(|ring| ring.submit()).map(drop)
}

/// Submits what is queued and waits for a completion, but not longer than `limit`.
///
/// libublk can only wait for ever (or 20 s). A timeout request would do it too, but the kernel
/// allocates for each.
pub fn wait(limit: Duration) -> io::Result<()> {
    let limit = types::Timespec::from(limit);
    let args = types::SubmitArgs::new().timespec(&limit);
    match with_task_io_ring_mut(|ring| ring.submitter().submit_with_args(1, &args)) {
        Err(error) if Errno::from_io_error(&error) != Some(Errno::TIME) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn what_came_is_seen_without_a_system_call() {
        init(8).unwrap();
        let eventfd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let watch =
            opcode::PollAdd::new(types::Fd(eventfd.as_raw_fd()), libc::POLLIN as u32).build();
        // SAFETY: a poll has no memory of ours.
        with_task_io_ring_mut(|ring| unsafe { ring.submission().push(&watch) }).unwrap();
        submit().unwrap();
        assert!(!has_news());
        rustix::io::write(&eventfd, &1_u64.to_le_bytes()).unwrap();
        // Its completion waits until this thread asks for it.
        assert!(has_news());
        wait(Duration::ZERO).unwrap();
        assert!(has_news());
        assert!(with_task_io_ring_mut(|ring| ring.completion().next()).is_some());
        assert!(!has_news());
    }
}
