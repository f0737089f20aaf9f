//! The I/O path does not allocate.
//!
//! A counting allocator stands in for the system's. After the engine, its pools and a queue are made,
//! puts of all kinds, gets, flushes, evictions, refusals and batches must leave its count where it was.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "support/backing.rs"]
mod backing;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use backing::{TABLES, carry_out};
use tmem::{
    BACKING_BYTES_MIN, Batches, ClientId, Config, Engine, FreedPages, Got, Handle, Image,
    OBJECT_PAGES, Opened, PAGE_SIZE, Page, PoolId, PoolKind, Queue, Step, Way,
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's obligations are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // Freeing may wait for the allocator's lock as well.
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const PAGES: u64 = 2 * OBJECT_PAGES as u64;

/// Every fifth page is freed, again and again, once the first was written.
struct Freed(AtomicBool);

impl FreedPages for Freed {
    fn next(&self, pages: Range<u64>) -> Option<u64> {
        let page = pages.start.next_multiple_of(5);
        Some(page).filter(|page| *page < pages.end && self.0.load(Ordering::Relaxed))
    }

    fn unmark(&self, _: u64) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Path {
    engine: Engine,
    client: ClientId,
    queue: Queue,
    swap: PoolId,
    cache: PoolId,
    pages: Vec<Page>,
}

impl Path {
    fn new() -> Self {
        Self::with_room(0)
    }

    /// With so many bytes more than a few pages need.
    fn with_room(bytes: u64) -> Self {
        let limit = Config::limit_min(4) + 200 * PAGE_SIZE as u64 + bytes;
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: 4 }).unwrap();
        let client = engine.create_client().unwrap();
        let swap = engine.create_pool(client, PoolKind::Persistent, PAGES).unwrap();
        let cache = engine.create_pool(client, PoolKind::Ephemeral, PAGES).unwrap();
        engine.watch_freed(swap, Box::new(Freed(AtomicBool::new(false)))).unwrap();
        while engine.supply().unwrap().more {}
        let queue = engine.queue(client);
        let pages = (0..8).map(page).collect();
        Self { engine, client, queue, swap, cache, pages }
    }

    /// Everything that a device does, in a pool that is too small for it.
    fn run(&mut self) {
        let mut out = [0; PAGE_SIZE];
        for page in 0..PAGES {
            let contents = &self.pages[page as usize % self.pages.len()];
            for pool in [self.cache, self.swap] {
                let handle = Handle::from_page(pool, page);
                let first = self.engine.put(&mut self.queue, handle, contents);
                let got = self.engine.get(&mut self.queue, handle, &mut out);
                let second = self.engine.put(&mut self.queue, handle, contents);
                assert!(first.is_err() || got.is_ok(), "{first:?} {got:?} {second:?}");
            }
        }
        for page in 0..PAGES / 4 {
            self.engine.flush_page(Handle::from_page(self.swap, page * 3));
            self.engine.lose(Handle::from_page(self.swap, page));
        }
        while self.engine.flush_freed() {}
        self.engine.supply_wanted();
        self.engine.flush_object(self.swap, 0);
        self.engine.flush_range(self.swap, 3, u64::MAX);
    }
}

fn page(kind: usize) -> Page {
    let mut page = [kind as u8; PAGE_SIZE];
    let mut state = kind as u64 | 1;
    for byte in &mut page[..kind * PAGE_SIZE / 7] {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        *byte = (state >> 56) as u8;
    }
    page
}

#[test]
fn puts_gets_and_flushes_do_not_allocate() {
    let mut path = Path::new();
    let before = ALLOCATIONS.with(Cell::get);
    path.run();
    path.run();
    let after = ALLOCATIONS.with(Cell::get);
    let stats = path.engine.stats();
    assert!(before > 0, "the allocator does not count");
    assert_eq!(after, before, "the I/O path allocated or freed");
    let happened = [
        stats.pools.succ_puts,
        stats.pools.failed_puts + stats.pools.starved_puts,
        stats.pools.given_up_puts,
        stats.pools.huge_pages + stats.alloc.compress_poor,
        stats.pools.flobj_found,
        stats.pools.freed_pages,
        stats.pers.cumul_zpages,
        stats.alloc.pers_ate_eph,
    ];
    assert!(happened.iter().all(|&count| count > 0), "not every path ran: {happened:?}");
}

/// Nor do requests of many pages, whoever does them, or what is given back of them.
#[test]
fn batches_do_not_allocate() {
    let mut path = Path::new();
    let mut helping = path.engine.queue(path.client);
    let mut batches = Batches::new(2);
    let mut pages = path.pages.clone();
    let start = NonNull::new(pages.as_mut_ptr()).unwrap().cast();
    let before = ALLOCATIONS.with(Cell::get);
    let (mut helped, mut refused) = (0, 0);
    // The pool is too small for all of them.
    for round in 0..PAGES / 8 {
        for (tag, way) in [Way::Put, Way::Get].into_iter().enumerate() {
            // SAFETY: `pages` are eight, outlive the batches, and are not looked at meanwhile.
            unsafe { batches.open(tag, way, path.swap, 8 * round, 8, start) };
            helped += u64::from(path.engine.help(&mut helping, batches.board()));
            while matches!(batches.step(&path.engine, &mut path.queue, tag), Step::Done) {}
            refused += u64::from(!batches.is_taken(tag));
            batches.close(tag);
            assert!(batches.has_ended(tag));
            assert_eq!(batches.leave(way), tag);
            if batches.done(tag) != u32::MAX {
                batches.rejoin(way, tag);
                assert_eq!(batches.leave(way), tag);
            }
        }
    }
    assert_eq!(ALLOCATIONS.with(Cell::get), before, "a batch allocated or freed");
    assert!(helped > 0 && refused > 0, "not every path ran: {helped} {refused}");
}

/// Nor does writing back and reading back: puts wait for the one, and readers for the other.
#[test]
fn writeback_does_not_allocate() {
    let mut path = Path::with_room(TABLES);
    let mut writeback = path.engine.attach_backing(BACKING_BYTES_MIN, Some(&[5; 32])).unwrap();
    let mut file = vec![0u8; BACKING_BYTES_MIN as usize];
    let (mut page, mut image) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    let before = ALLOCATIONS.with(Cell::get);
    let mut random = 1u64;
    for round in 0..20 * PAGES {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let handle = Handle::from_page(path.swap, (random >> 40) % PAGES);
        // It is full now and then, when nothing of the log is worth cleaning.
        let _ = path.engine.put(&mut path.queue, handle, &path.pages[round as usize % 8]);
        while let Some(job) = writeback.next(&path.engine, round) {
            carry_out(&writeback, job, &mut file, job.bytes);
            writeback.ended(&path.engine, job.unit, Ok(()), round);
        }
        // Not so often that all comes back to memory, and there is nothing to clean.
        if round % 8 > 0 {
            continue;
        }
        let handle = Handle::from_page(path.swap, round * 3 % PAGES);
        if let Ok(Got::Backed(backed)) = path.engine.get(&mut path.queue, handle, &mut page) {
            image.copy_from_slice(&file[backed.offset() as usize..][..PAGE_SIZE]);
            let got = path.engine.get_backed(
                &mut path.queue,
                handle,
                backed,
                Image::new(&mut image, &mut Opened::default()),
                &mut page,
            );
            assert_eq!(got, Ok(Got::Hit));
        }
    }
    assert_eq!(ALLOCATIONS.with(Cell::get), before, "writeback allocated or freed");
    let stats = path.engine.stats();
    let happened = [stats.pools.bd_writes, stats.pools.bd_reads, stats.log.log_cleaned_segments];
    assert!(happened.iter().all(|&count| count > 0), "not every path ran: {happened:?}");
}

/// Waiting for another thread's lock does not allocate either, not even the first time.
#[test]
fn contended_locks_do_not_allocate() {
    let path = Path::new();
    let handle = |page: u64| Handle::from_page(path.swap, page);
    let contents = page(3);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut queue = path.engine.queue(path.client);
                let mut out = [0; PAGE_SIZE];
                let before = ALLOCATIONS.with(Cell::get);
                for round in 0..20_000 {
                    // One object: every operation wants the same lock.
                    let handle = handle(round % 64);
                    let put = path.engine.put(&mut queue, handle, &contents);
                    let got = path.engine.get(&mut queue, handle, &mut out);
                    assert!(put.is_ok() && got.is_ok(), "{put:?} {got:?}");
                }
                assert_eq!(ALLOCATIONS.with(Cell::get), before, "a thread allocated");
            });
        }
    });
}
