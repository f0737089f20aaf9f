//! A pool of the engine as a block device of 4 KiB pages, whatever front end serves it.
//!
//! Guarantees: a read fills every byte that it reports as done; a write that fails leaves none of
//! its pages readable as what they were before; a discard is effective when [`BlockDevice::handle`]
//! returns. Nothing here allocates, blocks or makes a system call. It must not know of ublk, of
//! sockets or of threads: a front end brings its own [`tmem::Queue`] and its own buffer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use serde::Serialize;
use tmem::{ClientId, Engine, Got, Handle, PAGE_SIZE, PoolError, PoolId, PoolKind, PutError};

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

/// A request, and how far it has got.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Request {
    /// What is asked for.
    pub op: Op,
    /// The first page.
    pub first_page: u64,
    /// How many pages.
    pub pages: u32,
    /// How many of them were written before the engine was starved; 0 in a new request.
    pub done: u32,
}

impl Request {
    /// A request of which nothing has been done.
    pub fn new(op: Op, first_page: u64, pages: u32) -> Self {
        Self { op, first_page, pages, done: 0 }
    }
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
    /// The engine has no frame at the moment. `Request::done` says how far it got: hand the same
    /// request and buffer in again soon, or call [`BlockDevice::give_up`].
    Starved,
    /// It has waited too long for a frame and was given up; to the kernel that is ENOSPC, too.
    TimedOut,
}

/// One engine pool as a block device. Destroys its pool when dropped.
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

    /// Serves a request, or as much of it as can be served now.
    ///
    /// `buf` holds the request's pages from its start, also when it is handed in again; it is
    /// not looked at for requests without data.
    pub fn handle(
        &self,
        queue: &mut tmem::Queue,
        request: &mut Request,
        buf: &mut [u8],
    ) -> Outcome {
        let end = request.first_page.checked_add(u64::from(request.pages));
        if end.is_none_or(|end| end > self.pages) {
            return Outcome::Failed(Errno::INVAL);
        }
        match request.op {
            Op::Flush => Outcome::Done(0),
            Op::Discard | Op::WriteZeroes => {
                self.engine.flush_range(self.pool, request.first_page, u64::from(request.pages));
                Outcome::Done(0)
            }
            Op::Read => self.read(queue, request, buf),
            Op::Write => self.write(queue, request, buf),
        }
    }

    /// Ends a starved write as failed: what was not written is lost, never the older data.
    pub fn give_up(&self, request: &Request) -> Outcome {
        self.lose_from(request, request.done);
        Outcome::TimedOut
    }

    fn lose_from(&self, request: &Request, first: u32) {
        for page in first..request.pages {
            self.engine.lose(self.page(request, page));
        }
    }

    fn read(&self, queue: &mut tmem::Queue, request: &Request, buf: &mut [u8]) -> Outcome {
        let (pages, _) = buf.as_chunks_mut::<PAGE_SIZE>();
        let Some(pages) = pages.get_mut(..request.pages as usize) else {
            return Outcome::Failed(Errno::INVAL);
        };
        for (i, page) in (0..).zip(pages) {
            match self.engine.get(queue, self.page(request, i), page) {
                Ok(Got::Hit) => {}
                // The buffer still holds another request's data.
                Ok(Got::Miss) => page.fill(0),
                Err(_) if i > 0 => return Outcome::Done(bytes_of(i)),
                Err(_) => return Outcome::Failed(Errno::IO),
            }
        }
        Outcome::Done(bytes_of(request.pages))
    }

    fn write(&self, queue: &mut tmem::Queue, request: &mut Request, buf: &[u8]) -> Outcome {
        let (pages, _) = buf.as_chunks::<PAGE_SIZE>();
        let Some(pages) = pages.get(..request.pages as usize) else {
            return Outcome::Failed(Errno::INVAL);
        };
        let first = *request;
        let put = |i: u32| self.engine.put(queue, self.page(&first, i), &pages[i as usize]);
        match put_run(request, put) {
            Ok(()) => Outcome::Done(bytes_of(request.pages)),
            Err(PutError::Starved) => Outcome::Starved,
            // The rest comes back as a request of its own, and is then the first page.
            Err(PutError::Full) if request.done > 0 => Outcome::Done(bytes_of(request.done)),
            Err(PutError::Full) => {
                // That page the engine has lost, and counted.
                self.lose_from(request, request.done + 1);
                Outcome::Failed(Errno::NOSPC)
            }
            Err(_) => Outcome::Failed(Errno::IO),
        }
    }

    fn page(&self, request: &Request, page: u32) -> Handle {
        Handle::from_page(self.pool, request.first_page + u64::from(page))
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        // Fails only for a client that is not there, which leaves nothing to do.
        let _ = self.engine.destroy_client(self.client);
    }
}

/// Puts pages in order from where the request stands, and keeps count in it.
fn put_run(
    request: &mut Request,
    mut put: impl FnMut(u32) -> Result<(), PutError>,
) -> Result<(), PutError> {
    while request.done < request.pages {
        put(request.done)?;
        request.done += 1;
    }
    Ok(())
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
    /// Writes that waited for the arena to grow, those that still do included.
    pub deferred_writes: u64,
    /// How long they waited, added up, once each has ended.
    pub deferred_ns_total: u64,
    /// The longest that one of them waited.
    pub deferred_ns_max: u64,
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
    use super::*;

    fn run(request: &mut Request, answers: &[Result<(), PutError>]) -> Result<(), PutError> {
        let from = request.done;
        put_run(request, |i| answers[(i - from) as usize])
    }

    #[test]
    fn a_starved_run_goes_on_where_it_stopped() {
        let mut request = Request::new(Op::Write, 7, 4);
        assert_eq!(
            run(&mut request, &[Ok(()), Ok(()), Err(PutError::Starved)]),
            Err(PutError::Starved)
        );
        assert_eq!(request.done, 2);
        assert_eq!(run(&mut request, &[Err(PutError::Starved)]), Err(PutError::Starved));
        assert_eq!(request.done, 2);
        assert_eq!(run(&mut request, &[Ok(()), Ok(())]), Ok(()));
        assert_eq!(request.done, 4);
    }

    /// A device of 64 pages on a pool of so many bytes above the least, of which the supply step
    /// has brought all.
    pub(crate) fn device(room: u64) -> (BlockDevice, tmem::Queue) {
        let limit = tmem::Config::limit_min(1) + room;
        let config = tmem::Config { limit, limit_max: limit, shards: 1 };
        let engine = Arc::new(Engine::new(&config).unwrap());
        while engine.supply().unwrap().more {}
        let device = BlockDevice::new(engine, 64).unwrap();
        let queue = device.queue();
        (device, queue)
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
        let mut write = Request::new(Op::Write, 6, 1);
        assert_eq!(device.handle(&mut queue, &mut write, &mut buf), Outcome::Done(4096));
        buf.fill(0xee);
        let mut read = Request::new(Op::Read, 5, 3);
        assert_eq!(device.handle(&mut queue, &mut read, &mut buf), Outcome::Done(3 * 4096));
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
            let mut write = Request::new(Op::Write, 0, 8);
            assert_eq!(device.handle(&mut queue, &mut write, &mut buf), Outcome::Done(8 * 4096));
            let mut discard = Request::new(op, 0, 64);
            assert_eq!(device.handle(&mut queue, &mut discard, &mut []), Outcome::Done(0));
            let mut read = Request::new(Op::Read, 0, 8);
            assert_eq!(device.handle(&mut queue, &mut read, &mut buf), Outcome::Done(8 * 4096));
            assert!(buf.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn a_full_pool_takes_what_it_can_and_loses_the_rest() {
        let (device, mut queue) = device(128 << 10);
        // Old data everywhere that a failed write could expose.
        let mut same = vec![7; 64 * PAGE_SIZE];
        let mut write = Request::new(Op::Write, 0, 64);
        assert_eq!(device.handle(&mut queue, &mut write, &mut same), Outcome::Done(64 * 4096));

        let new = noise(64, 3);
        let mut buf = new.clone();
        let mut write = Request::new(Op::Write, 0, 64);
        let Outcome::Done(bytes) = device.handle(&mut queue, &mut write, &mut buf) else {
            panic!("not even one page was taken");
        };
        let stored = bytes / 4096;
        assert!((1..64).contains(&stored), "{stored}");
        // The kernel asks for the rest again.
        let mut rest = Request::new(Op::Write, stored.into(), 64 - stored);
        let buf_rest = &mut buf[bytes as usize..];
        let before = device.pool_stats();
        let failed = device.handle(&mut queue, &mut rest, buf_rest);
        assert_eq!(failed, Outcome::Failed(Errno::NOSPC));
        // Each page of it has failed once: the first was refused, and the others given up.
        let after = device.pool_stats();
        assert_eq!(after.failed_puts, before.failed_puts + 1);
        assert_eq!(after.given_up_puts, u64::from(64 - stored - 1));

        for page in 0..64 {
            let at = page as usize * PAGE_SIZE;
            let mut read = Request::new(Op::Read, page, 1);
            let outcome = device.handle(&mut queue, &mut read, &mut buf[at..]);
            if page < u64::from(stored) {
                assert_eq!(outcome, Outcome::Done(4096));
                assert_eq!(buf[at..at + PAGE_SIZE], new[at..at + PAGE_SIZE]);
            } else {
                assert_eq!(outcome, Outcome::Failed(Errno::IO), "page {page}");
            }
        }
        // A read that begins well ends short, and its rest is the error.
        let mut read = Request::new(Op::Read, 0, 64);
        assert_eq!(device.handle(&mut queue, &mut read, &mut buf), Outcome::Done(bytes));
    }

    #[test]
    fn giving_a_starved_write_up_loses_what_was_not_written() {
        let (device, mut queue) = device(1 << 20);
        let mut buf = vec![9; 4 * PAGE_SIZE];
        let mut write = Request::new(Op::Write, 0, 4);
        assert_eq!(device.handle(&mut queue, &mut write, &mut buf), Outcome::Done(4 * 4096));
        let starved = Request { done: 1, ..Request::new(Op::Write, 0, 4) };
        assert_eq!(device.give_up(&starved), Outcome::TimedOut);
        let counters = device.pool_stats();
        assert_eq!((counters.failed_puts, counters.given_up_puts), (0, 3));
        let mut read =
            |page| device.handle(&mut queue, &mut Request::new(Op::Read, page, 1), &mut buf);
        assert_eq!(read(0), Outcome::Done(4096));
        for page in 1..4 {
            assert_eq!(read(page), Outcome::Failed(Errno::IO));
        }
    }

    #[test]
    fn devices_on_one_engine_have_their_own_latencies() {
        let (device, mut queue) = device(1 << 20);
        let other = BlockDevice::new(Arc::clone(&device.engine), 64).unwrap();
        let mut buf = vec![9; 3 * PAGE_SIZE];
        device.handle(&mut queue, &mut Request::new(Op::Write, 0, 3), &mut buf);
        other.handle(&mut other.queue(), &mut Request::new(Op::Write, 0, 1), &mut buf);
        other.handle(&mut other.queue(), &mut Request::new(Op::Read, 0, 2), &mut buf);
        let counts =
            |latencies: tmem::Latencies| (latencies.put_latency.count, latencies.get_latency.count);
        assert_eq!(counts(device.latencies()), (3, 0));
        assert_eq!(counts(other.latencies()), (1, 2));
        assert_eq!(counts(device.engine.stats().latencies), (4, 2));
    }

    #[test]
    fn requests_beyond_the_device_or_its_buffer_are_refused() {
        let (device, mut queue) = device(1 << 20);
        let mut buf = vec![0; 2 * PAGE_SIZE];
        for (op, first_page, pages) in [
            (Op::Read, 64, 1),
            (Op::Write, 63, 2),
            (Op::Discard, u64::MAX, 1),
            (Op::Read, 0, 3),
            (Op::Write, 0, 3),
        ] {
            let mut request = Request::new(op, first_page, pages);
            let outcome = device.handle(&mut queue, &mut request, &mut buf);
            assert_eq!(outcome, Outcome::Failed(Errno::INVAL), "{op:?} {first_page} {pages}");
        }
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
