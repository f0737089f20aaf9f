//! The I/O loop: one thread, one hardware queue, one io_uring.
//!
//! Guarantees: once [`QueueWorker::prepare`] has returned, no allocation, no lock but the
//! engine's, no system call but io_uring's own, and no wait but for I/O. Reads are served while
//! writes wait for memory; no write waits longer than [`STARVED_MAX`], and when waiting writes have
//! taken most of the queue's tags, [`CROWDED_MAX`]. A loop that cannot go on takes the process down:
//! a device of which one queue is dead hangs whoever uses it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libublk::helpers::IoBuf;
use libublk::io::{UblkDev, UblkIOCtx, UblkQueue};
use libublk::{BufDesc, BufDescList, UblkError, UblkIORes, sys};
use rustix::io::Errno;

use super::params::PAGE_SECTORS;
use super::ring;
use crate::device::{BlockDevice, IoCounters, Op, Outcome, Request};
use crate::process;
use crate::supply::Waker;

/// How long a write may wait for the arena to grow before it fails.
const STARVED_MAX: Duration = Duration::from_secs(1);

/// How long it may wait while more than three quarters of the queue's tags wait with it. A request that has no
/// tag does not reach us, and a read is worth more than a write: who reads cannot go on without the
/// page, and what a failed write of swap has not written is still in memory.
const CROWDED_MAX: Duration = Duration::from_millis(200);

/// How long the loop waits for other I/O before it tries starved writes again.
const STARVED_RETRY: Duration = Duration::from_millis(2);

/// What a queue serves, and whom it tells.
#[derive(Clone)]
pub struct QueueContext {
    /// The device.
    pub device: Arc<BlockDevice>,
    /// The counters, one set per queue.
    pub counters: Arc<[IoCounters]>,
    /// Wakes the supply thread.
    pub waker: Arc<Waker>,
}

/// A queue thread's state.
pub struct QueueWorker {
    context: QueueContext,
    id: usize,
    engine_queue: tmem::Queue,
    bufs: Vec<IoBuf<u8>>,
    parked: Parked,
}

impl QueueWorker {
    /// Makes everything that the loop needs, on the thread that will run it, and asks the kernel
    /// for the first requests. After this the device can be started.
    pub fn prepare(
        context: QueueContext,
        id: u16,
        dev: &UblkDev,
    ) -> Result<(Self, UblkQueue<'_>), UblkError> {
        ring::init(dev.dev_info.queue_depth)?;
        let mut bufs = dev.alloc_queue_io_bufs();
        // libublk does not look whether it got the memory.
        if bufs.iter().any(|buf| buf.as_ptr().is_null()) {
            std::mem::forget(bufs);
            return Err(UblkError::OtherError(-libc::ENOMEM));
        }
        // Touches every page, and makes the memory initialised.
        bufs.iter_mut().for_each(IoBuf::zero_buf);
        // libublk would lock them too, but goes on when it cannot.
        if !bufs.iter().all(IoBuf::mlock) {
            return Err(UblkError::IOError(io::Error::last_os_error()));
        }
        let queue = UblkQueue::new(id, dev)?
            .submit_fetch_commands_unified(BufDescList::Slices(Some(&bufs)))?;
        // The first signal makes the kernel allocate what every later one uses again.
        ring::signal(context.waker.fd());
        let mut failed = None;
        loop {
            let submitted = queue.flush_and_wake_io_tasks(
                |user_data, cqe, _| {
                    if !ring::is_signal(user_data) {
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
        let engine_queue = context.device.queue();
        let parked = Parked::new(dev.dev_info.queue_depth);
        Ok((Self { context, id: id.into(), engine_queue, bufs, parked }, queue))
    }

    /// Serves requests until the kernel has stopped the device.
    pub fn run(&mut self, queue: &UblkQueue) {
        loop {
            let mut to_wait = 1;
            if !self.parked.is_empty() {
                if let Err(error) = ring::wait(STARVED_RETRY) {
                    tolerate(&error);
                }
                to_wait = 0;
            }
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
            self.retry_parked(queue);
            self.wake_supply();
        }
    }

    /// Takes a completion: a request to serve, or the end.
    fn completed(&mut self, queue: &UblkQueue, user_data: u64, result: i32) {
        const OK: i32 = sys::UBLK_IO_RES_OK as i32;
        if ring::is_signal(user_data) {
            return;
        }
        match result {
            OK => {}
            // libublk has noted it and ends the loop after the last.
            sys::UBLK_IO_RES_ABORT => return,
            _ => process::fatal(format_args!("the ublk driver refused a command: {result}")),
        }
        let tag = UblkIOCtx::user_data_to_tag(user_data) as u16;
        match decode(queue.get_iod(tag)) {
            Some(request) => self.came(queue, tag, request),
            None => self.commit(queue, tag, -libc::EINVAL),
        }
    }

    /// Serves a new request; a write queues up behind writes that wait already.
    fn came(&mut self, queue: &UblkQueue, tag: u16, request: Request) {
        let counters = &self.context.counters[self.id];
        counters.came(request.op);
        if request.op == Op::Write && !self.parked.is_empty() {
            counters.ended(&request, Outcome::Starved);
            self.parked.park(tag, request, Instant::now());
        } else if let Some(request) = self.serve(queue, tag, request) {
            self.context.counters[self.id].ended(&request, Outcome::Starved);
            self.parked.park(tag, request, Instant::now());
        }
    }

    /// Serves a request and commits it, or returns it if it is starved.
    fn serve(&mut self, queue: &UblkQueue, tag: u16, mut request: Request) -> Option<Request> {
        let buf = self.bufs[usize::from(tag)].as_mut_slice();
        let outcome = self.context.device.handle(&mut self.engine_queue, &mut request, buf);
        if outcome == Outcome::Starved {
            return Some(request);
        }
        self.end(queue, tag, &request, outcome);
        None
    }

    /// Tries waiting writes again, the longest waiting first, until one finds no memory; ends
    /// those that have waited too long.
    fn retry_parked(&mut self, queue: &UblkQueue) {
        if self.parked.is_empty() {
            return;
        }
        while let Some((tag, request)) = self.parked.first() {
            match self.serve(queue, tag, request) {
                None => self.unpark(Instant::now()),
                Some(request) => {
                    self.parked.set_first(request);
                    break;
                }
            }
        }
        let now = Instant::now();
        while let Some((tag, request)) = self.parked.first_overdue(now) {
            let outcome = self.context.device.give_up(&request);
            self.end(queue, tag, &request, outcome);
            self.unpark(now);
        }
    }

    /// Takes the first of the waiting writes out, which has ended, and counts its wait.
    fn unpark(&mut self, now: Instant) {
        let since = self.parked.pop();
        self.context.counters[self.id].waited(now.saturating_duration_since(since));
    }

    fn end(&self, queue: &UblkQueue, tag: u16, request: &Request, outcome: Outcome) {
        self.context.counters[self.id].ended(request, outcome);
        let result = match outcome {
            Outcome::Done(bytes) => bytes as i32,
            Outcome::Failed(errno) => -errno.raw_os_error(),
            Outcome::TimedOut => -libc::ENOSPC,
            Outcome::Starved => unreachable!("starved requests are parked"),
        };
        self.commit(queue, tag, result);
    }

    /// Hands a request back to the kernel with its result, and asks for the next with its tag.
    fn commit(&self, queue: &UblkQueue, tag: u16, result: i32) {
        let buf = BufDesc::Slice(self.bufs[usize::from(tag)].as_slice());
        let committed = queue.complete_io_cmd_unified(tag, buf, Ok(UblkIORes::Result(result)));
        if let Err(error) = committed {
            process::fatal(format_args!("cannot complete an I/O request: {error}"));
        }
    }

    /// Wakes the supply thread if there is work for it and it does not know yet.
    fn wake_supply(&self) {
        let waker = &self.context.waker;
        if self.context.device.engine().supply_wanted()
            && waker.claim()
            && !ring::signal(waker.fd())
        {
            waker.unclaim();
        }
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
    Some(Request::new(op, iod.start_sector / PAGE_SECTORS, (sectors / PAGE_SECTORS) as u32))
}

/// Writes that wait for memory, in the order in which they came: a ring with a place per tag.
struct Parked {
    places: Box<[Option<Waiting>]>,
    first: usize,
    len: usize,
}

#[derive(Clone, Copy)]
struct Waiting {
    tag: u16,
    request: Request,
    since: Instant,
}

impl Parked {
    fn new(depth: u16) -> Self {
        Self { places: vec![None; depth.into()].into(), first: 0, len: 0 }
    }

    fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a write at the end. A tag is in here at most once, so there is always room.
    fn park(&mut self, tag: u16, request: Request, now: Instant) {
        assert!(self.len < self.places.len(), "more waiting writes than tags");
        let place = (self.first + self.len) % self.places.len();
        self.places[place] = Some(Waiting { tag, request, since: now });
        self.len += 1;
    }

    fn first(&self) -> Option<(u16, Request)> {
        self.places[self.first].map(|waiting| (waiting.tag, waiting.request))
    }

    /// The first, if it has waited as long as it may.
    fn first_overdue(&self, now: Instant) -> Option<(u16, Request)> {
        let crowded = self.len > self.places.len() * 3 / 4;
        let limit = if crowded { CROWDED_MAX } else { STARVED_MAX };
        self.places[self.first]
            .filter(|waiting| now.saturating_duration_since(waiting.since) >= limit)
            .map(|waiting| (waiting.tag, waiting.request))
    }

    /// Notes how far the first has got.
    fn set_first(&mut self, request: Request) {
        if let Some(waiting) = &mut self.places[self.first] {
            waiting.request = request;
        }
    }

    /// Takes the first out, and says when it came.
    fn pop(&mut self) -> Instant {
        let waiting = self.places[self.first].take().expect("something waits");
        self.first = (self.first + 1) % self.places.len();
        self.len -= 1;
        waiting.since
    }
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
        assert_eq!(decode(&iod(sys::UBLK_IO_OP_ZONE_APPEND, 8, 8)), None);
    }

    #[test]
    fn waiting_writes_leave_in_the_order_they_came() {
        let mut parked = Parked::new(3);
        let start = Instant::now();
        let request = |page| Request::new(Op::Write, page, 1);
        for round in 0..5_u64 {
            for tag in [2, 0, 1] {
                let now = start + Duration::from_millis(u64::from(tag));
                parked.park(tag, request(round), now);
            }
            for tag in [2, 0, 1] {
                assert_eq!(parked.first(), Some((tag, request(round))));
                assert_eq!(parked.pop(), start + Duration::from_millis(u64::from(tag)));
            }
            assert!(parked.is_empty() && parked.first().is_none());
        }
    }

    #[test]
    fn a_write_waits_no_longer_than_its_limit() {
        let mut parked = Parked::new(4);
        let start = Instant::now();
        let mut request = Request::new(Op::Write, 3, 4);
        parked.park(1, request, start);
        assert_eq!(parked.first_overdue(start), None);
        request.done = 2;
        parked.set_first(request);
        assert_eq!(parked.first_overdue(start + CROWDED_MAX), None);
        assert_eq!(parked.first_overdue(start + STARVED_MAX), Some((1, request)));
    }

    #[test]
    fn waiting_writes_leave_tags_for_reads() {
        let mut parked = Parked::new(4);
        let start = Instant::now();
        let request = Request::new(Op::Write, 3, 4);
        (0..4).for_each(|tag| parked.park(tag, request, start));
        assert_eq!(parked.first_overdue(start), None);
        assert_eq!(parked.first_overdue(start + CROWDED_MAX), Some((0, request)));
        parked.pop();
        assert_eq!(parked.first_overdue(start + CROWDED_MAX), None);
    }
}
