//! Requests whose pages an owner and helpers share.
//!
//! One scenario, two schedulers, as in `concurrent.rs`. An owner opens batches of puts and gets in
//! buffers of its own, works on them as a front end does, and uses a buffer again as soon as its batch
//! has ended; helpers take what they find. What is checked: a page that was got is what was put last,
//! whoever did either; a helper never touches a buffer after its batch has ended; what fails,
//! fails at the first page that cannot be done, with all before it done; and nothing is left at work.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::Arc;

#[cfg(feature = "shuttle")]
use shuttle::{sync::atomic::AtomicBool, thread};
#[cfg(not(feature = "shuttle"))]
use std::{sync::atomic::AtomicBool, thread};

use std::sync::atomic::Ordering;

use tmem::{
    BATCH_PAGES, BatchError, Batches, Board, Config, Engine, GetError, PAGE_SIZE, PoolId, PoolKind,
    PutError, Queue, Step, Way,
};

const TAGS: usize = 3;

/// A buffer for each tag, that helpers reach by its address.
struct Buffers(Vec<UnsafeCell<Vec<[u8; PAGE_SIZE]>>>);

impl Buffers {
    fn new(pages: usize) -> Self {
        Self((0..TAGS).map(|_| UnsafeCell::new(vec![[0; PAGE_SIZE]; pages])).collect())
    }

    fn address(&self, tag: usize) -> NonNull<u8> {
        // SAFETY: only the owner's thread is here, and makes no reference.
        let first = unsafe { (*self.0[tag].get()).as_mut_ptr() };
        NonNull::new(first.cast()).unwrap()
    }

    /// Of a batch that has ended.
    fn page(&mut self, tag: usize, page: u32) -> &mut [u8; PAGE_SIZE] {
        &mut self.0[tag].get_mut()[page as usize]
    }
}

/// What a page holds: compresses, and differs for every page and version.
fn fill(page: &mut [u8; PAGE_SIZE], number: u64, version: u64) {
    for (at, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = (number << 32 | version << 8 | at as u64 & 3).to_le_bytes();
    }
}

struct Owner {
    // Goes first: nobody is at work in the buffers then.
    batches: Batches,
    buffers: Buffers,
    engine: Arc<Engine>,
    queue: Queue,
    pool: PoolId,
    random: u64,
}

struct Request {
    tag: usize,
    way: Way,
    first: u64,
    pages: u32,
    failed: Option<(u32, BatchError)>,
}

impl Owner {
    fn random(&mut self, below: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.random >> 33) % below
    }

    fn open(&mut self, request: &Request) {
        let buffer = self.buffers.address(request.tag);
        // SAFETY: the buffers outlive the batches, and are used again only after a batch has ended.
        unsafe {
            let Request { tag, way, first, pages, .. } = *request;
            self.batches.open(tag, way, self.pool, first, pages, buffer);
        }
    }

    /// Works until all of the requests have ended.
    fn work(&mut self, requests: &mut [Request]) {
        for way in [Way::Get, Way::Put] {
            while let Some(tag) = self.batches.first(way) {
                let request = requests.iter_mut().find(|request| request.tag == tag).unwrap();
                match self.batches.step(&self.engine, &mut self.queue, tag) {
                    Step::Done => continue,
                    Step::Taken => {}
                    Step::Failed { error: BatchError::Put(PutError::Starved), .. } => {
                        while self.engine.supply().unwrap().more {}
                        continue;
                    }
                    Step::Failed { page, error } => request.failed = Some((page, error)),
                    Step::Backed { .. } => unreachable!("there is no backing file"),
                }
                assert_eq!(self.batches.leave(way), tag);
                self.batches.close(tag);
                while !self.batches.has_ended(tag) {
                    thread::yield_now();
                }
                if request.failed.is_none() && self.batches.done(tag) != u32::MAX {
                    self.batches.rejoin(way, tag);
                }
            }
        }
        for Request { tag, pages, failed, .. } in requests {
            let done = failed.map_or(*pages, |(page, _)| page);
            assert!(self.batches.done(*tag).trailing_ones() >= done);
        }
    }
}

fn help(engine: &Engine, mut queue: Queue, board: &Board, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        if !engine.help(&mut queue, board) {
            thread::yield_now();
        }
    }
}

/// Runs a scenario with an owner's part and helpers.
fn with_helpers(helpers: usize, frames: u64, pages: usize, owner: impl FnOnce(Owner)) {
    let limit = Config::limit_min(2) + (2 + frames) * PAGE_SIZE as u64;
    let engine = Arc::new(Engine::new(&Config { limit, limit_max: limit, shards: 2 }).unwrap());
    let client = engine.create_client().unwrap();
    let pool = engine.create_pool(client, PoolKind::Persistent, 4096).unwrap();
    let batches = Batches::new(TAGS);
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..helpers)
        .map(|_| {
            let (engine, queue) = (Arc::clone(&engine), engine.queue(client));
            let (board, stop) = (Arc::clone(batches.board()), Arc::clone(&stop));
            thread::spawn(move || help(&engine, queue, &board, &stop))
        })
        .collect();
    let queue = engine.queue(client);
    owner(Owner { batches, buffers: Buffers::new(pages), engine, queue, pool, random: 1 });
    stop.store(true, Ordering::SeqCst);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Puts and gets the same few pages in requests of all sizes, in every tag at once.
fn overwrite_and_read(mut owner: Owner, rounds: u64, pages: u32) {
    while owner.engine.supply().unwrap().more {}
    let of = |tag: usize| 600 * tag as u64;
    let mut versions = [[0_u64; BATCH_PAGES as usize]; TAGS];
    for version in 1..=rounds {
        let mut requests = Vec::new();
        for (tag, versions) in versions.iter_mut().enumerate() {
            let first = owner.random(u64::from(pages)) as u32;
            let count = 1 + owner.random(u64::from(pages - first)) as u32;
            let way = if owner.random(3) == 0 { Way::Get } else { Way::Put };
            for page in 0..count {
                let buffer = owner.buffers.page(tag, page);
                match way {
                    Way::Put => {
                        fill(buffer, of(tag) + u64::from(first + page), version);
                        versions[(first + page) as usize] = version;
                    }
                    Way::Get => buffer.fill(0xee),
                }
            }
            let first = of(tag) + u64::from(first);
            requests.push(Request { tag, way, first, pages: count, failed: None });
        }
        requests.iter().for_each(|request| owner.open(request));
        owner.work(&mut requests);
        for request in &requests {
            assert_eq!(request.failed, None);
            for page in 0..request.pages {
                let number = request.first + u64::from(page);
                let version = versions[request.tag][(number - of(request.tag)) as usize];
                let mut expected = [0; PAGE_SIZE];
                if version > 0 {
                    fill(&mut expected, number, version);
                }
                // A put's buffer is what it was, and a get's what was put.
                assert!(*owner.buffers.page(request.tag, page) == expected, "page {number}");
                // Whoever comes late to this buffer puts, or overwrites, what the next round sees.
                owner.buffers.page(request.tag, page).fill(0xdd);
            }
        }
    }
}

/// A pool that is too small: the put fails, and where it fails all before it is done.
fn fail(mut owner: Owner, pages: u32) {
    while owner.engine.supply().unwrap().more {}
    let mut failures = 0;
    // What each page holds; none if it is lost.
    let mut held = vec![Some([0; PAGE_SIZE]); pages as usize];
    for round in 0..4 {
        for page in 0..pages {
            let buffer = owner.buffers.page(0, page);
            let mut state = u64::from(round * 100 + page) | 1 << 40;
            for word in buffer.as_chunks_mut::<8>().0 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                *word = (state ^ state >> 29).to_le_bytes();
            }
        }
        let mut put = [Request { tag: 0, way: Way::Put, first: 0, pages, failed: None }];
        owner.open(&put[0]);
        owner.work(&mut put);
        let done = put[0].failed.map_or(pages, |(page, error)| {
            assert_eq!(error, BatchError::Put(PutError::Full));
            failures += 1;
            page
        });
        let mut sent = Vec::new();
        for page in 0..pages {
            sent.push(*owner.buffers.page(0, page));
            owner.buffers.page(0, page).fill(0);
        }
        // Each alone. The first that failed is lost; one behind it is this version, where a helper did
        // it, or lost, where a helper was refused, or what it was.
        for page in 0..pages {
            let mut get =
                [Request { tag: 0, way: Way::Get, first: page.into(), pages: 1, failed: None }];
            owner.open(&get[0]);
            owner.work(&mut get);
            let found = match get[0].failed {
                None => Some(*owner.buffers.page(0, 0)),
                Some(failed) => {
                    assert_eq!(failed, (0, BatchError::Get(GetError::Lost)));
                    None
                }
            };
            let (sent, before) = (Some(sent[page as usize]), &mut held[page as usize]);
            let is_right = if page < done {
                found == sent
            } else {
                found.is_none() || page > done && (found == sent || found == *before)
            };
            assert!(is_right, "page {page} of {done} that were done");
            *before = found;
        }
    }
    assert!(failures > 0, "the pool is not too small");
}

#[cfg(not(feature = "shuttle"))]
#[test]
fn owner_and_helpers_do_each_page_once() {
    let (rounds, pages) = if cfg!(miri) { (4, 3) } else { (4000, BATCH_PAGES) };
    for helpers in if cfg!(miri) { 2..3 } else { 0..4 } {
        let owner = |owner| overwrite_and_read(owner, rounds, pages);
        with_helpers(helpers, 128, BATCH_PAGES as usize, owner);
    }
}

#[cfg(not(feature = "shuttle"))]
#[test]
fn a_failure_is_the_owners_to_find() {
    for helpers in if cfg!(miri) { 1..2 } else { 0..3 } {
        with_helpers(helpers, 4, 12, |owner| fail(owner, 12));
    }
}

#[cfg(feature = "shuttle")]
#[test]
fn owner_and_helpers_do_each_page_once_under_any_schedule() {
    let scenario = || with_helpers(2, 64, 4, |owner| overwrite_and_read(owner, 3, 3));
    shuttle::check_random(scenario, 1500);
    shuttle::check_pct(scenario, 1500, 4);
}

#[cfg(feature = "shuttle")]
#[test]
fn a_failure_is_the_owners_to_find_under_any_schedule() {
    shuttle::check_random(|| with_helpers(1, 4, 12, |owner| fail(owner, 12)), 300);
}
