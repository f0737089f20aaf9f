//! The I/O loop: one thread, one hardware queue, one io_uring.
//!
//! It moves requests between the kernel and the [`Schedule`], which says what is done with them.
//!
//! Guarantees: once [`QueueWorker::prepare`] has returned, no allocation, no lock but the
//! engine's, no system call but io_uring's own, and no wait but for I/O. A loop that cannot go on takes
//! the process down: a device of which one queue is dead hangs whoever uses it.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use io_uring::squeue;
use libublk::io::{UblkDev, UblkIOCtx, UblkQueue};
use libublk::{BufDesc, BufDescList, UblkError, UblkIORes, sys};
use rustix::io::Errno;
use tmem::{BATCH_PAGES, Batches};

use super::buffers::Buffers;
use super::helper::Crew;
use super::params::PAGE_SECTORS;
use super::ring::{self, Kind};
use super::schedule::{Rest, Schedule};
use crate::backing::Backing;
use crate::device::{BlockDevice, IoCounters, Op, Outcome, Request};
use crate::process;
use crate::waker::Waker;

/// What a queue serves, and whom it tells.
#[derive(Clone)]
pub struct QueueContext {
    /// The device.
    pub device: Arc<BlockDevice>,
    /// The counters, one set per queue.
    pub counters: Arc<[IoCounters]>,
    /// Wakes the supply thread.
    pub waker: Arc<Waker>,
    /// The backing file, if there is one, and what wakes the thread that writes to it.
    pub backing: Arc<Backing>,
}

/// A queue thread's state.
pub struct QueueWorker {
    device: Arc<BlockDevice>,
    waker: Arc<Waker>,
    backing: Arc<Backing>,
    crew: Arc<Crew>,
    schedule: Schedule,
}

impl QueueWorker {
    /// Makes everything that the loop needs, on the thread that will run it, and asks the kernel
    /// for the first requests. After this the device can be started.
    pub fn prepare(
        context: QueueContext,
        crew: Arc<Crew>,
        batches: Batches,
        id: u16,
        dev: &UblkDev,
    ) -> Result<(Self, UblkQueue<'_>), UblkError> {
        let QueueContext { device, counters, waker, backing } = context;
        ring::init(dev.dev_info.queue_depth)?;
        let mut buffers = Buffers::new(batches, dev.alloc_queue_io_bufs());
        buffers.lock()?;
        let queue = UblkQueue::new(id, dev)?
            .submit_fetch_commands_unified(BufDescList::Slices(Some(buffers.all())))?;
        // The first signal makes the kernel allocate what every later one uses again.
        ring::signal(waker.fd());
        let mut failed = None;
        loop {
            let submitted = queue.flush_and_wake_io_tasks(
                |user_data, cqe, _| {
                    if Kind::of(user_data) == Kind::Command {
                        failed = Some(cqe.result());
                    }
                },
                0,
            );
            match submitted {
                Err(UblkError::IOError(error)) if is_passing(&error) => {}
                submitted => break submitted,
            }
        }?;
        if let Some(result) = failed {
            return Err(UblkError::UringIOError(result));
        }
        let schedule =
            Schedule::new(Arc::clone(&device), counters, id, buffers, Arc::clone(&backing));
        Ok((Self { device, waker, backing, crew, schedule }, queue))
    }

    /// Serves requests until the kernel has stopped the device.
    pub fn run(&mut self, queue: &UblkQueue) {
        loop {
            let to_wait = self.wait();
            let served = queue.flush_and_wake_io_tasks(
                |user_data, cqe, _| self.completed(queue, user_data, cqe.result()),
                to_wait,
            );
            match served {
                Ok(_) => {}
                Err(UblkError::QueueIsDown) => return,
                Err(UblkError::IOError(error)) => tolerate(&error),
                Err(error) => process::fatal(format_args!("I/O queue failed: {error}")),
            }
            self.call_helper();
            self.schedule.serve(ring::has_news);
            self.schedule.give_up_overdue(Instant::now);
            self.begin_fetches();
            while let Some((tag, outcome)) = self.schedule.next_ended() {
                self.end(queue, tag, outcome);
            }
            self.wake(&self.waker, self.device.engine().supply_wanted());
            self.wake(self.backing.waker(), self.device.engine().writeback_wanted());
        }
    }

    /// Waits for a while if something has to be looked at again then; returns for how many events
    /// the loop may wait without end.
    fn wait(&self) -> usize {
        match self.schedule.rest() {
            Rest::None => 0,
            Rest::Forever => 1,
            Rest::For(limit) => {
                if let Err(error) = ring::wait(limit) {
                    tolerate(&error);
                }
                0
            }
        }
    }

    /// Takes a completion: a request to serve, or the end.
    fn completed(&mut self, queue: &UblkQueue, user_data: u64, result: i32) {
        const OK: i32 = sys::UBLK_IO_RES_OK as i32;
        match Kind::of(user_data) {
            Kind::Command => {}
            Kind::Fetch(read) => {
                if let Some(rest) = self.schedule.fetched(read, result) {
                    push_fetch(read, rest);
                }
                return;
            }
            Kind::Signal => return,
        }
        match result {
            OK => {}
            // libublk has noted it and ends the loop after the last.
            sys::UBLK_IO_RES_ABORT => return,
            _ => process::fatal(format_args!("the ublk driver refused a command: {result}")),
        }
        let tag = UblkIOCtx::user_data_to_tag(user_data) as u16;
        let outcome = match decode(queue.get_iod(tag)) {
            Some(request) => self.schedule.came(tag, request),
            None => Some(Outcome::Failed(Errno::INVAL)),
        };
        if let Some(outcome) = outcome {
            self.end(queue, tag, outcome);
        }
    }

    /// Wakes a helper if there is enough to do for two.
    fn call_helper(&self) {
        if !self.schedule.wants_help() {
            return;
        }
        let Some(helper) = self.crew.claim() else { return };
        if !ring::signal(helper.fd()) {
            helper.unclaim();
        } else if let Err(error) = ring::submit() {
            // It leaves with the next submission.
            tolerate(&error);
        }
    }

    /// Hands a request back to the kernel with its result, and asks for the next with its tag.
    fn end(&self, queue: &UblkQueue, tag: u16, outcome: Outcome) {
        let result = match outcome {
            Outcome::Done(bytes) => bytes as i32,
            Outcome::Failed(errno) => -errno.raw_os_error(),
            Outcome::TimedOut => -libc::ENOSPC,
            Outcome::Starved => unreachable!("starved requests stay in line"),
        };
        let buf = BufDesc::Slice(self.schedule.buffers().of_ended(tag));
        let committed = queue.complete_io_cmd_unified(tag, buf, Ok(UblkIORes::Result(result)));
        if let Err(error) = committed {
            process::fatal(format_args!("cannot complete an I/O request: {error}"));
        }
    }

    /// Reads what is wanted from the backing file.
    fn begin_fetches(&mut self) {
        while let Some((read, entry)) = self.schedule.next_fetch() {
            push_fetch(read, entry);
        }
    }

    /// Wakes a thread if there is work for it and it does not know yet.
    fn wake(&self, waker: &Waker, is_wanted: bool) {
        if is_wanted && waker.claim() && !ring::signal(waker.fd()) {
            waker.unclaim();
        }
    }
}

/// Queues a read of the backing file.
#[allow(unsafe_code)]
fn push_fetch(read: usize, entry: squeue::Entry) {
    // SAFETY: the schedule keeps the memory until it is told of the completion, by the thread whose ring this is;
    // and where that never comes, for ever.
    if !unsafe { ring::fetch(read, entry) } {
        process::fatal(format_args!("the ring has no room for a read"));
    }
}

/// Passes over what an interrupted wait returns; anything else is the end.
fn tolerate(error: &io::Error) {
    if !is_passing(error) {
        process::fatal(format_args!("io_uring failed: {error}"));
    }
}

/// True for what an interrupted wait returns: being traced, being stopped and the system going to
/// sleep all interrupt io_uring, and libublk's own loop would end there and leave the device
/// hanging.
fn is_passing(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INTR | Errno::AGAIN | Errno::BUSY))
}

/// The request that a descriptor describes; none if it is of a kind that was never announced.
fn decode(iod: &sys::ublksrv_io_desc) -> Option<Request> {
    let op = match iod.op_flags & 0xff {
        sys::UBLK_IO_OP_READ => Op::Read,
        sys::UBLK_IO_OP_WRITE => Op::Write,
        sys::UBLK_IO_OP_FLUSH => Op::Flush,
        sys::UBLK_IO_OP_DISCARD => Op::Discard,
        sys::UBLK_IO_OP_WRITE_ZEROES => Op::WriteZeroes,
        _ => return None,
    };
    let sectors = u64::from(iod.nr_sectors);
    if op == Op::Flush {
        return Some(Request::new(op, 0, 0));
    }
    if !iod.start_sector.is_multiple_of(PAGE_SECTORS) || !sectors.is_multiple_of(PAGE_SECTORS) {
        return None;
    }
    let pages = (sectors / PAGE_SECTORS) as u32;
    if matches!(op, Op::Read | Op::Write) && !(1..=BATCH_PAGES).contains(&pages) {
        return None;
    }
    Some(Request::new(op, iod.start_sector / PAGE_SECTORS, pages))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iod(op: u32, start_sector: u64, nr_sectors: u32) -> sys::ublksrv_io_desc {
        // Flags above the op, as the kernel sets them for swap.
        sys::ublksrv_io_desc { op_flags: op | 1 << 24, nr_sectors, start_sector, addr: 0 }
    }

    #[test]
    fn descriptors_become_pages() {
        let write = decode(&iod(sys::UBLK_IO_OP_WRITE, 80, 256)).unwrap();
        assert_eq!(write, Request::new(Op::Write, 10, 32));
        let discard = decode(&iod(sys::UBLK_IO_OP_DISCARD, 8 << 32, 8_388_600)).unwrap();
        assert_eq!(discard, Request::new(Op::Discard, 1 << 32, 1_048_575));
        assert_eq!(decode(&iod(sys::UBLK_IO_OP_READ, 7, 8)), None);
        assert_eq!(decode(&iod(sys::UBLK_IO_OP_READ, 8, 9)), None);
        assert_eq!(decode(&iod(sys::UBLK_IO_OP_WRITE, 8, 0)), None);
        assert_eq!(decode(&iod(sys::UBLK_IO_OP_WRITE, 8, 264)), None);
        assert_eq!(decode(&iod(sys::UBLK_IO_OP_ZONE_APPEND, 8, 8)), None);
    }
}
