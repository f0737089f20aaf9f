//! A pool of the engine as a block device of 4 KiB pages, whatever front end serves it.
//!
//! Guarantees: a write that fails leaves none of its pages readable as what they were before; a
//! discard is effective when [`BlockDevice::carry_out`] returns. Nothing here allocates, blocks or makes
//! a system call. It must not know of ublk, of sockets or of threads: a front end brings its own
//! [`tmem::Queue`] and buffers, moves reads' and writes' pages by the engine, and is told here what
//! becomes of the request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use serde::Serialize;
use tmem::{
    BatchError, ClientId, Engine, Handle, PAGE_SIZE, PoolError, PoolId, PoolInfo, PoolKind,
    PutError,
};

/// What a request asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Op {
    /// Drop the pages; they read as zeros afterwards.
    Discard,
    /// Nothing to do: there is no volatile cache.
    Flush,
    /// Copy the pages out.
    Read,
    /// Store the pages.
    Write,
    /// Make the pages read as zeros.
    WriteZeroes,
}

/// A request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Request {
    /// What is asked for.
    pub op: Op,
    /// The first page.
    pub first_page: u64,
    /// How many pages.
    pub pages: u32,
}

impl Request {
    /// A request for pages from `first_page` on.
    pub fn new(op: Op, first_page: u64, pages: u32) -> Self {
        Self { op, first_page, pages }
    }
}

/// What kept a read or write from being done whole.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Trouble {
    /// The page at this place in the request, the first that could not be done; those before it are.
    Page(u32, BatchError),
    /// It waited too long for a frame, and was given up.
    Starved,
}

/// How a request ended, or that it has not.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// The first so many bytes are done: at least one page of a read or write, 0 of a request
    /// without data, which is always done whole. Fewer than asked for means that the rest met an
    /// error: asking for the rest alone tells which.
    Done(u32),
    /// Nothing is done, and this is why.
    Failed(Errno),
    /// The engine has no frame at the moment: it is to be tried again soon, or given up.
    Starved,
    /// It has waited too long for a frame and was given up; to the kernel that is ENOSPC, too.
    TimedOut,
}

/// One engine pool as a block device. Dropping it leaves the pool as it is: another process may go on with it.
pub struct BlockDevice {
    engine: Arc<Engine>,
    client: ClientId,
    pool: PoolId,
    pages: u64,
}

impl BlockDevice {
    /// Makes a persistent pool of `pages` pages and a device on it.
    pub fn new(engine: Arc<Engine>, pages: u64) -> Result<Self, PoolError> {
        let client = engine.create_client()?;
        match engine.create_pool(client, PoolKind::Persistent, pages) {
            Ok(pool) => Ok(Self { engine, client, pool, pages }),
            Err(error) => {
                let _ = engine.destroy_client(client);
                Err(error)
            }
        }
    }

    /// A device on a pool that there is.
    pub fn resume(engine: Arc<Engine>, pool: &PoolInfo) -> Self {
        Self { engine, client: pool.client, pool: pool.id, pages: pool.pages }
    }

    /// Forgets all pages. It is of no use afterwards.
    pub fn destroy(&self) {
        // Fails only for a client that is not there, which leaves nothing to do.
        let _ = self.engine.destroy_client(self.client);
    }

    /// Its size in pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The engine that holds the pages.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The pool that the pages are in.
    pub(crate) fn pool(&self) -> PoolId {
        self.pool
    }

    /// What a thread needs to serve requests: see [`tmem::Engine::queue`].
    pub fn queue(&self) -> tmem::Queue {
        self.engine.queue(self.client)
    }

    /// The latencies of its pages, on all its queues.
    pub fn latencies(&self) -> tmem::Latencies {
        self.engine.client_latencies(self.client)
    }

    /// The pool's counters.
    pub fn pool_stats(&self) -> tmem::PoolCounters {
        self.engine.pool_stats(self.pool).unwrap_or_default()
    }

    /// The device's size in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE as u64
    }

    /// Whether a request is within the device.
    pub fn admits(&self, request: &Request) -> bool {
        let end = request.first_page.checked_add(u64::from(request.pages));
        end.is_some_and(|end| end <= self.pages)
    }

    /// Carries out a request without data.
    pub fn carry_out(&self, request: &Request) -> Outcome {
        match request.op {
            Op::Discard | Op::WriteZeroes if self.admits(request) => {
                self.engine.flush_range(self.pool, request.first_page, request.pages.into());
                Outcome::Done(0)
            }
            Op::Flush => Outcome::Done(0),
            _ => Outcome::Failed(Errno::INVAL),
        }
    }

    /// How a read or write ends that met with this. `done` has a bit for each page that is done, the
    /// lowest for the first. What a failed write has not written is lost now, never older data.
    ///
    /// # Panics
    ///
    /// If a page is to be acknowledged that is not done.
    pub fn conclude(&self, request: &Request, trouble: Option<Trouble>, done: u32) -> Outcome {
        let acknowledged = match trouble {
            None => request.pages,
            Some(Trouble::Page(page, _)) => page,
            Some(Trouble::Starved) => 0,
        };
        assert!(acknowledged <= done.trailing_ones(), "{acknowledged} pages of {done:#b} done");
        match trouble {
            None => Outcome::Done(bytes_of(request.pages)),
            // The rest comes back as a request of its own, and is then the first page.
            Some(Trouble::Page(page @ 1.., _)) => Outcome::Done(bytes_of(page)),
            Some(Trouble::Page(0, BatchError::Put(PutError::Full))) => {
                // The first page the engine has lost, and counted.
                self.lose(request, |page| page > 0);
                Outcome::Failed(Errno::NOSPC)
            }
            Some(Trouble::Page(0, _)) => Outcome::Failed(Errno::IO),
            Some(Trouble::Starved) => {
                self.lose(request, |page| done & 1 << page == 0);
                Outcome::TimedOut
            }
        }
    }

    fn lose(&self, request: &Request, which: impl Fn(u32) -> bool) {
        for page in (0..request.pages).filter(|page| which(*page)) {
            self.engine.lose(self.page(request, page));
        }
    }

    fn page(&self, request: &Request, page: u32) -> Handle {
        Handle::from_page(self.pool, request.first_page + u64::from(page))
    }
}

/// Bytes of so many pages of a buffer; buffers are far below 4 GiB.
fn bytes_of(pages: u32) -> u32 {
    debug_assert!(pages <= u32::MAX / PAGE_SIZE as u32);
    pages * PAGE_SIZE as u32
}

/// What one queue did. Each queue has its own, so that counting costs no shared cache line.
#[derive(Default)]
#[repr(align(128))]
pub struct IoCounters {
    reads: AtomicU64,
    writes: AtomicU64,
    discards: AtomicU64,
    deferred: AtomicU64,
    deferred_ns_total: AtomicU64,
    deferred_ns_max: AtomicU64,
    partial: AtomicU64,
    enospc: AtomicU64,
    starved: AtomicU64,
    eio: AtomicU64,
    first: AtomicU64,
}

impl IoCounters {
    /// Counts a request that came in.
    pub fn came(&self, op: Op) {
        match op {
            Op::Read => bump(&self.reads),
            Op::Write => bump(&self.writes),
            Op::Discard | Op::WriteZeroes => bump(&self.discards),
            Op::Flush => {}
        }
    }

    /// Takes the requests that have come so far for those that were there when the queue began to be served. False if none has.
    pub fn begun(&self) -> bool {
        let came = [&self.reads, &self.writes, &self.discards];
        let count = came.map(|counter| counter.load(Ordering::Relaxed)).iter().sum();
        self.first.store(count, Ordering::Relaxed);
        count > 0
    }

    /// Counts how a request ended, or that it has to wait.
    pub fn ended(&self, request: &Request, outcome: Outcome) {
        match outcome {
            Outcome::Starved => bump(&self.deferred),
            Outcome::TimedOut => bump(&self.starved),
            Outcome::Failed(Errno::NOSPC) => bump(&self.enospc),
            Outcome::Failed(_) => bump(&self.eio),
            Outcome::Done(bytes)
                if matches!(request.op, Op::Read | Op::Write)
                    && bytes < bytes_of(request.pages) =>
            {
                bump(&self.partial);
            }
            Outcome::Done(_) => {}
        }
    }

    /// Counts how long a write has waited for memory, once it has ended, well or not.
    pub fn waited(&self, time: Duration) {
        // A u64 holds centuries.
        let ns = time.as_nanos() as u64;
        self.deferred_ns_total.fetch_add(ns, Ordering::Relaxed);
        self.deferred_ns_max.fetch_max(ns, Ordering::Relaxed);
    }

    /// Adds these counts to `sum`.
    pub fn add_to(&self, sum: &mut IoStats) {
        sum.reads += self.reads.load(Ordering::Relaxed);
        sum.writes += self.writes.load(Ordering::Relaxed);
        sum.discards += self.discards.load(Ordering::Relaxed);
        sum.deferred_writes += self.deferred.load(Ordering::Relaxed);
        sum.deferred_ns_total += self.deferred_ns_total.load(Ordering::Relaxed);
        let longest = self.deferred_ns_max.load(Ordering::Relaxed);
        sum.deferred_ns_max = sum.deferred_ns_max.max(longest);
        sum.partial_requests += self.partial.load(Ordering::Relaxed);
        sum.enospc_errors += self.enospc.load(Ordering::Relaxed);
        sum.starved_errors += self.starved.load(Ordering::Relaxed);
        sum.io_errors += self.eio.load(Ordering::Relaxed);
        sum.first_requests += self.first.load(Ordering::Relaxed);
    }
}

fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What all queues of a device did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[non_exhaustive]
pub struct IoStats {
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Discard and write-zeroes requests.
    pub discards: u64,
    /// Pages of reads and writes that helpers did, beside the queues' own threads.
    pub helped_pages: u64,
    /// Writes that waited for the arena to grow, those that still do included.
    pub deferred_writes: u64,
    /// How long they waited, added up, once each has ended.
    pub deferred_ns_total: u64,
    /// The longest that one of them waited.
    pub deferred_ns_max: u64,
    /// Requests that were there when this process began to serve: after a take-over those that the dead one had, and those
    /// that had come since.
    pub first_requests: u64,
    /// Requests of which only the first pages succeeded; the kernel asks for the rest again.
    pub partial_requests: u64,
    /// Writes failed with ENOSPC because the pool was full.
    pub enospc_errors: u64,
    /// Writes failed with ENOSPC because they had waited too long for the arena to grow: the pool
    /// was not full, but the system gave no memory in time.
    pub starved_errors: u64,
    /// Requests failed for any other reason: a lost or corrupt page, or that they made no sense.
    pub io_errors: u64,
}

impl IoStats {
    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.discards += other.discards;
        self.helped_pages += other.helped_pages;
        self.deferred_writes += other.deferred_writes;
        self.deferred_ns_total += other.deferred_ns_total;
        self.deferred_ns_max = self.deferred_ns_max.max(other.deferred_ns_max);
        self.partial_requests += other.partial_requests;
        self.enospc_errors += other.enospc_errors;
        self.starved_errors += other.starved_errors;
        self.io_errors += other.io_errors;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::ptr::NonNull;

    use tmem::{Batches, Step, Way};

    use super::*;

    /// Serves a request in `buf` as a front end does, with batches of its own.
    #[allow(unsafe_code)]
    fn serve(
        device: &BlockDevice,
        queue: &mut tmem::Queue,
        request: Request,
        buf: &mut [u8],
    ) -> Outcome {
        let way = match request.op {
            Op::Read => Way::Get,
            Op::Write => Way::Put,
            _ => return device.carry_out(&request),
        };
        assert!(device.admits(&request) && buf.len() >= request.pages as usize * PAGE_SIZE);
        let mut batches = Batches::new(1);
        let start = NonNull::new(buf.as_mut_ptr()).unwrap();
        // SAFETY: `buf` is long enough, and is not touched until the batches are gone.
        unsafe { batches.open(0, way, device.pool, request.first_page, request.pages, start) };
        let trouble = loop {
            match batches.step(&device.engine, queue, 0) {
                Step::Done => {}
                Step::Taken => break None,
                Step::Failed { page, error } => break Some(Trouble::Page(page, error)),
                Step::Backed { .. } => unreachable!("there is no backing file"),
            }
        };
        device.conclude(&request, trouble, batches.done(0))
    }

    /// A device of 64 pages on a pool of so many bytes above the least, of which the supply step
    /// has brought all.
    pub(crate) fn device(room: u64) -> (BlockDevice, tmem::Queue) {
        let device = dry_device(room);
        while device.engine.supply().unwrap().more {}
        let queue = device.queue();
        (device, queue)
    }

    /// The same before the supply step has brought any.
    pub(crate) fn dry_device(room: u64) -> BlockDevice {
        BlockDevice::new(engine(room), 64).unwrap()
    }

    /// An engine with so many bytes above the least.
    pub(crate) fn engine(room: u64) -> Arc<Engine> {
        let limit = tmem::Config::limit_min(1) + room;
        let config = tmem::Config { limit, limit_max: limit, shards: 1 };
        Arc::new(Engine::new(&config).unwrap())
    }

    /// Pages that do not compress, each different.
    pub(crate) fn noise(pages: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        };
        std::iter::repeat_with(next).take(pages * PAGE_SIZE).collect()
    }

    #[test]
    fn what_was_never_written_reads_as_zeros_and_not_as_the_buffer() {
        let (device, mut queue) = device(1 << 20);
        let mut buf = noise(4, 1);
        let written = buf[..PAGE_SIZE].to_vec();
        let write = Request::new(Op::Write, 6, 1);
        assert_eq!(serve(&device, &mut queue, write, &mut buf), Outcome::Done(4096));
        buf.fill(0xee);
        let read = Request::new(Op::Read, 5, 3);
        assert_eq!(serve(&device, &mut queue, read, &mut buf), Outcome::Done(3 * 4096));
        assert!(buf[..PAGE_SIZE].iter().all(|byte| *byte == 0));
        assert_eq!(buf[PAGE_SIZE..2 * PAGE_SIZE], written);
        assert!(buf[2 * PAGE_SIZE..3 * PAGE_SIZE].iter().all(|byte| *byte == 0));
        assert!(buf[3 * PAGE_SIZE..].iter().all(|byte| *byte == 0xee));
    }

    #[test]
    fn a_discard_is_effective_at_once_whatever_its_size() {
        let (device, mut queue) = device(1 << 20);
        for op in [Op::Discard, Op::WriteZeroes] {
            let mut buf = noise(8, 2);
            let write = Request::new(Op::Write, 0, 8);
            assert_eq!(serve(&device, &mut queue, write, &mut buf), Outcome::Done(8 * 4096));
            let discard = Request::new(op, 0, 64);
            assert_eq!(serve(&device, &mut queue, discard, &mut []), Outcome::Done(0));
            let read = Request::new(Op::Read, 0, 8);
            assert_eq!(serve(&device, &mut queue, read, &mut buf), Outcome::Done(8 * 4096));
            assert!(buf.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn a_full_pool_takes_what_it_can_and_loses_the_rest() {
        let (device, mut queue) = device(64 << 10);
        // Old data everywhere that a failed write could expose.
        let mut same = vec![7; 32 * PAGE_SIZE];
        let write = Request::new(Op::Write, 0, 32);
        assert_eq!(serve(&device, &mut queue, write, &mut same), Outcome::Done(32 * 4096));

        let new = noise(32, 3);
        let mut buf = new.clone();
        let Outcome::Done(bytes) = serve(&device, &mut queue, write, &mut buf) else {
            panic!("not even one page was taken");
        };
        let stored = bytes / 4096;
        assert!((1..32).contains(&stored), "{stored}");
        // The kernel asks for the rest again.
        let rest = Request::new(Op::Write, stored.into(), 32 - stored);
        let buf_rest = &mut buf[bytes as usize..];
        let before = device.pool_stats();
        let failed = serve(&device, &mut queue, rest, buf_rest);
        assert_eq!(failed, Outcome::Failed(Errno::NOSPC));
        // Each page of it has failed once: the first was refused, and the others given up.
        let after = device.pool_stats();
        assert_eq!(after.failed_puts, before.failed_puts + 1);
        assert_eq!(after.given_up_puts, u64::from(32 - stored - 1));

        for page in 0..32 {
            let at = page as usize * PAGE_SIZE;
            let read = Request::new(Op::Read, page, 1);
            let outcome = serve(&device, &mut queue, read, &mut buf[at..]);
            if page < u64::from(stored) {
                assert_eq!(outcome, Outcome::Done(4096));
                assert_eq!(buf[at..at + PAGE_SIZE], new[at..at + PAGE_SIZE]);
            } else {
                assert_eq!(outcome, Outcome::Failed(Errno::IO), "page {page}");
            }
        }
        // A read that begins well ends short, and its rest is the error.
        let read = Request::new(Op::Read, 0, 32);
        assert_eq!(serve(&device, &mut queue, read, &mut buf), Outcome::Done(bytes));
    }

    #[test]
    fn giving_a_starved_write_up_loses_what_was_not_written() {
        let (device, mut queue) = device(1 << 20);
        let mut buf = vec![9; 4 * PAGE_SIZE];
        let write = Request::new(Op::Write, 0, 4);
        assert_eq!(serve(&device, &mut queue, write, &mut buf), Outcome::Done(4 * 4096));
        // The first and the last page had been written when it was given up.
        assert_eq!(device.conclude(&write, Some(Trouble::Starved), 0b1001), Outcome::TimedOut);
        let counters = device.pool_stats();
        assert_eq!((counters.failed_puts, counters.given_up_puts), (0, 2));
        let mut read = |page| serve(&device, &mut queue, Request::new(Op::Read, page, 1), &mut buf);
        assert_eq!([0, 3].map(&mut read), [Outcome::Done(4096); 2]);
        assert_eq!([1, 2].map(&mut read), [Outcome::Failed(Errno::IO); 2]);
    }

    #[test]
    #[should_panic(expected = "2 pages of 0b101 done")]
    fn what_is_not_done_is_not_acknowledged() {
        let (device, _) = device(1 << 20);
        let error = BatchError::Put(PutError::Full);
        let trouble = |page| Some(Trouble::Page(page, error));
        assert_eq!(
            device.conclude(&Request::new(Op::Write, 0, 3), trouble(1), 0b101),
            Outcome::Done(4096)
        );
        device.conclude(&Request::new(Op::Write, 0, 3), trouble(2), 0b101);
    }

    #[test]
    fn devices_on_one_engine_have_their_own_latencies() {
        let (device, mut queue) = device(1 << 20);
        let other = BlockDevice::new(Arc::clone(&device.engine), 64).unwrap();
        let mut buf = vec![9; 3 * PAGE_SIZE];
        serve(&device, &mut queue, Request::new(Op::Write, 0, 3), &mut buf);
        serve(&other, &mut other.queue(), Request::new(Op::Write, 0, 1), &mut buf);
        serve(&other, &mut other.queue(), Request::new(Op::Read, 0, 2), &mut buf);
        let counts =
            |latencies: tmem::Latencies| (latencies.put_latency.count, latencies.get_latency.count);
        assert_eq!(counts(device.latencies()), (3, 0));
        assert_eq!(counts(other.latencies()), (1, 2));
        assert_eq!(counts(device.engine.stats().latencies), (4, 2));
    }

    #[test]
    fn requests_beyond_the_device_are_refused() {
        let (device, _) = device(1 << 20);
        for (op, first_page, pages) in [
            (Op::Read, 64, 1),
            (Op::Write, 63, 2),
            (Op::Discard, u64::MAX, 1),
            (Op::Discard, 60, 5),
        ] {
            let request = Request::new(op, first_page, pages);
            assert!(!device.admits(&request), "{op:?} {first_page} {pages}");
            assert_eq!(device.carry_out(&request), Outcome::Failed(Errno::INVAL));
        }
        assert!(device.admits(&Request::new(Op::Read, 63, 1)));
        // What has data is not carried out here.
        let write = Request::new(Op::Write, 0, 1);
        assert_eq!(device.carry_out(&write), Outcome::Failed(Errno::INVAL));
    }

    #[test]
    fn counters_add_up_by_kind() {
        let queues = [IoCounters::default(), IoCounters::default()];
        let write = Request::new(Op::Write, 0, 2);
        let discard = Request::new(Op::Discard, 0, u32::MAX);
        for queue in &queues {
            queue.came(Op::Write);
            queue.came(Op::Discard);
            queue.ended(&write, Outcome::Starved);
            queue.ended(&write, Outcome::Done(4096));
            queue.ended(&write, Outcome::Done(8192));
            queue.ended(&discard, Outcome::Done(0));
            queue.ended(&write, Outcome::Failed(Errno::NOSPC));
            queue.ended(&write, Outcome::TimedOut);
            queue.waited(Duration::from_millis(2));
        }
        queues[0].waited(Duration::from_millis(5));
        let mut sum = IoStats::default();
        queues.iter().for_each(|queue| queue.add_to(&mut sum));
        let expected = IoStats {
            writes: 2,
            discards: 2,
            deferred_writes: 2,
            deferred_ns_total: 9_000_000,
            deferred_ns_max: 5_000_000,
            partial_requests: 2,
            enospc_errors: 2,
            starved_errors: 2,
            ..IoStats::default()
        };
        assert_eq!(sum, expected);
    }
}
