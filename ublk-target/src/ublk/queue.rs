//! The I/O loop: one thread, one hardware queue, one io_uring.
//!
//! It moves requests between the kernel and the [`Schedule`], which says what is done with them.
//!
//! Guarantees: once [`QueueWorker::open`] has returned, no allocation, no lock but the
//! engine's, no system call but io_uring's own, and no wait but for I/O. A loop that cannot go on takes
//! the process down: a device of which one queue is dead hangs whoever uses it. (One other system call there is, once: a thread that
//! has gone on in the place of another becomes an ordinary one.)

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::squeue;
use libublk::sys;
use rustix::io::Errno;
use tmem::BATCH_PAGES;

use super::buffers::Buffers;
use super::helper::Crew;
use super::params::PAGE_SECTORS;
use super::port::{Completion, Port};
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
    port: Port,
}

impl QueueWorker {
    /// Asks the kernel for the first requests of a device, and makes everything that the loop needs. After this the
    /// device can be started. It is for the thread that has made the port.
    pub fn open(
        context: QueueContext,
        crew: Arc<Crew>,
        (mut port, buffers): (Port, Buffers),
        id: u16,
        (device, is_modern): (BorrowedFd<'_>, bool),
    ) -> std::io::Result<Self> {
        port.open(device, is_modern, &buffers)?;
        let QueueContext { device, counters, waker, backing } = context;
        // The first signal makes the kernel allocate what every later one uses again.
        port.signal(waker.fd());
        port.wait(Some(Duration::ZERO))?;
        let schedule =
            Schedule::new(Arc::clone(&device), counters, id, buffers, Arc::clone(&backing));
        Ok(Self { device, waker, backing, crew, schedule, port })
    }

    /// Serves requests until the kernel has stopped the device. A thread that `is_urgent`, because it goes on in the place of a dead
    /// one when there may be no memory, stays so until it has served as many as it can hold: what the kernel makes at the
    /// first use of anything is made by then.
    pub fn run(&mut self, is_urgent: bool) {
        let mut urgent_for = if is_urgent { self.schedule.buffers().tags() } else { 0 };
        let mut has_begun = false;
        while !self.port.is_down() {
            let limit = match self.schedule.rest() {
                Rest::None => Some(Duration::ZERO),
                Rest::Forever => None,
                Rest::For(limit) => Some(limit),
            };
            if let Err(error) = self.port.wait(limit) {
                process::fatal(format_args!("io_uring failed: {error}"));
            }
            while let Some((completion, result)) = self.port.completed() {
                self.completed(completion, result);
            }
            has_begun = has_begun || self.schedule.counters().begun();
            self.call_helper();
            let port = &mut self.port;
            self.schedule.serve(|| port.has_news());
            self.schedule.give_up_overdue(Instant::now);
            self.begin_fetches();
            while let Some((tag, outcome)) = self.schedule.next_ended() {
                self.end(tag, outcome);
                if urgent_for > 0 {
                    urgent_for -= 1;
                    if urgent_for == 0 {
                        process::become_calm();
                        process::become_server();
                    }
                }
            }
            let engine = self.device.engine();
            wake(&mut self.port, &self.waker, engine.supply_wanted());
            wake(&mut self.port, self.backing.waker(), engine.writeback_wanted());
        }
    }

    /// Takes a completion: a request to serve, or the end.
    fn completed(&mut self, completion: Completion, result: i32) {
        const OK: i32 = sys::UBLK_IO_RES_OK as i32;
        let tag = match completion {
            Completion::Command(tag) => tag,
            Completion::Fetch(read) => {
                if let Some(rest) = self.schedule.fetched(read, result) {
                    fetch(&mut self.port, read, rest);
                }
                return;
            }
            Completion::Signal => return,
        };
        match result {
            OK => {}
            // The port has noted it.
            sys::UBLK_IO_RES_ABORT => return,
            _ => process::fatal(format_args!("the ublk driver refused a command: {result}")),
        }
        let outcome = match decode(&self.port.request(tag)) {
            Some(request) => self.schedule.came(tag, request),
            None => Some(Outcome::Failed(Errno::INVAL)),
        };
        if let Some(outcome) = outcome {
            self.end(tag, outcome);
        }
    }

    /// Wakes a helper if there is enough to do for two.
    fn call_helper(&mut self) {
        if !self.schedule.wants_help() {
            return;
        }
        let Some(helper) = self.crew.claim() else { return };
        self.port.signal(helper.fd());
        if let Err(error) = self.port.submit() {
            process::fatal(format_args!("io_uring failed: {error}"));
        }
    }

    /// Hands a request back to the kernel with its result, and asks for the next with its tag.
    fn end(&mut self, tag: u16, outcome: Outcome) {
        let result = match outcome {
            Outcome::Done(bytes) => bytes as i32,
            Outcome::Failed(errno) => -errno.raw_os_error(),
            Outcome::TimedOut => -libc::ENOSPC,
            Outcome::Starved => unreachable!("starved requests stay in line"),
        };
        self.port.end(tag, result, self.schedule.buffers());
    }

    /// Reads what is wanted from the backing file.
    fn begin_fetches(&mut self) {
        while let Some((read, entry)) = self.schedule.next_fetch() {
            fetch(&mut self.port, read, entry);
        }
    }
}

/// Wakes a thread if there is work for it and it does not know yet.
fn wake(port: &mut Port, waker: &Waker, is_wanted: bool) {
    if is_wanted && waker.claim() {
        port.signal(waker.fd());
    }
}

/// Queues a read of the backing file.
#[allow(unsafe_code)]
fn fetch(port: &mut Port, read: usize, entry: squeue::Entry) {
    // SAFETY: the schedule keeps the memory until it is told of the completion, by the thread whose ring this is;
    // and where that never comes, for ever.
    unsafe { port.fetch(read, entry) }
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
