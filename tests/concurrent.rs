//! The engine under several threads.
//!
//! One scenario, two schedulers. With the `shuttle` feature, shuttle decides every interleaving of
//! lock and free-stack operations, at random and by priorities that are known to find ordering bugs;
//! a failure prints a schedule that replays it. Without it, real threads run the scenario for longer.
//!
//! What is checked: a reader of a page that one writer rewrites never sees an older version after a
//! newer one, nor anything but a whole version (put-put-get); what a thread put, discarded or lost it
//! finds so afterwards, also where what it held there before was marked as freed; two writers of one page leave the last version of one of them; memory stays
//! within the limit; frames are conserved at the end and nothing is left after a flush. All that is so
//! with a backing file, too, to which pages go and from which they are read meanwhile.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "support/backing.rs"]
mod backing;

use std::ops::Range;
use std::sync::{Arc, Mutex};

#[cfg(feature = "shuttle")]
use shuttle::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
};
#[cfg(not(feature = "shuttle"))]
use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use backing::{TABLES, carry_out};
use tmem::{
    BACKING_BYTES_MIN, ClientId, Config, Engine, FreedPages, GetError, Got, Handle, Image,
    OBJECT_PAGES, Opened, PAGE_SIZE, Page, PoolId, PoolKind, PutError, Queue, Writeback,
    WritebackSettings,
};

/// How long a scenario is.
#[derive(Clone, Copy)]
struct Size {
    rounds: u32,
    frames: u64,
    backing: Backing,
}

/// What becomes of cold pages.
#[derive(Clone, Copy, PartialEq)]
enum Backing {
    /// They stay.
    None,
    /// They go to a backing file.
    Moved,
    /// They go there, and stay as long as there is room.
    Copied,
}

/// Frames that entries of a small backing file's blocks take at most.
const ENTRIES: u64 = 2 * 12;

/// Page of the single writer, of the two writers, and the first of each thread's own.
const WATCHED: u64 = 0;
const DISPUTED: u64 = 1;
const OWN: u64 = 8;

/// The first of the pages that are freed.
const FREED: u64 = 16;

struct Scenario {
    engine: Engine,
    client: ClientId,
    swap: PoolId,
    cache: PoolId,
    size: Size,
    freed: Marks,
    /// The backing file. The lock is not shuttle's, and held for a copy only.
    file: Mutex<Vec<u8>>,
    /// Whoever writes back takes it.
    writeback: Mutex<Option<Writeback>>,
}

/// Marks of the first 64 pages.
#[derive(Clone)]
struct Marks(Arc<AtomicU64>);

impl Marks {
    fn mark(&self, page: u64) {
        self.0.fetch_or(1 << page, Ordering::SeqCst);
    }
}

impl FreedPages for Marks {
    fn next(&self, pages: Range<u64>) -> Option<u64> {
        let marks = self.0.load(Ordering::SeqCst);
        (pages.start..pages.end.min(64)).find(|page| marks >> page & 1 == 1)
    }

    fn unmark(&self, page: u64) {
        if page < 64 {
            self.0.fetch_and(!(1 << page), Ordering::SeqCst);
        }
    }
}

/// All that a device does.
fn scenario(size: Size) {
    let all = Scenario::new(size);
    all.watch();
    let roles = [
        Scenario::write,
        Scenario::read,
        Scenario::dispute,
        Scenario::free,
        Scenario::cache,
        Scenario::supply,
        Scenario::write_back,
    ];
    all.run(&roles, Scenario::dispute);
    all.check_end();
}

/// Pages were put and marked before it is known of marks, as where a process goes on for another.
fn going_on(size: Size) {
    let all = Scenario::new(size);
    all.run(&[Scenario::free, Scenario::flush_freed], Scenario::watch);
    // Which of them were forgotten is nobody's business.
    (FREED..FREED + 2).for_each(|page| all.freed.mark(page));
    all.check_freed();
}

impl Scenario {
    fn new(size: Size) -> Arc<Self> {
        const SHARDS: usize = 2;
        let is_backed = size.backing != Backing::None;
        let backing = if is_backed { TABLES + ENTRIES * PAGE_SIZE as u64 } else { 0 };
        let limit = Config::limit_min(SHARDS) + backing + (2 + size.frames) * PAGE_SIZE as u64;
        let config = Config { limit, limit_max: 2 * limit, shards: SHARDS };
        let engine = Engine::new(&config).unwrap();
        let client = engine.create_client().unwrap();
        let pages = u64::from(4 * OBJECT_PAGES);
        let swap = engine.create_pool(client, PoolKind::Persistent, pages).unwrap();
        let cache = engine.create_pool(client, PoolKind::Ephemeral, pages).unwrap();
        // Encrypting takes minutes under Miri.
        let key = Some(&[3; 32]).filter(|_| !cfg!(miri));
        let attach = || engine.attach_backing(BACKING_BYTES_MIN, key).unwrap();
        let keep_copies = size.backing == Backing::Copied;
        let settings = WritebackSettings { keep_copies, ..WritebackSettings::default() };
        engine.set_writeback_settings(&settings).unwrap();
        let writeback = Mutex::new(is_backed.then(attach));
        let file = Mutex::new(vec![0; if is_backed { BACKING_BYTES_MIN as usize } else { 0 }]);
        let freed = Marks(Arc::new(AtomicU64::new(0)));
        Arc::new(Self { engine, client, swap, cache, size, freed, file, writeback })
    }

    /// Has each of these done by a thread, and the last by this one.
    fn run(self: &Arc<Self>, roles: &[fn(&Self)], own: fn(&Self)) {
        let threads: Vec<_> = roles
            .iter()
            .map(|&role| {
                let all = Arc::clone(self);
                thread::spawn(move || role(&all))
            })
            .collect();
        own(self);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    /// From now on, what is marked is flushed.
    fn watch(&self) {
        self.engine.watch_freed(self.swap, Box::new(self.freed.clone())).unwrap();
    }

    /// Rewrites the watched page, and keeps pages of its own.
    fn write(&self) {
        let mut queue = self.engine.queue(self.client);
        for round in 1..=self.size.rounds {
            self.put(&mut queue, WATCHED, 1, round);
            let own = OWN + u64::from(round % 3);
            let stored = self.put(&mut queue, own, 2, round);
            let expected = if stored { Ok(Some((2, round))) } else { Err(GetError::Lost) };
            assert_eq!(self.get(&mut queue, self.swap, own), expected);
            if round % 4 == 0 {
                self.engine.flush_page(Handle::from_page(self.swap, own));
                assert_eq!(self.get(&mut queue, self.swap, own), Ok(None));
            }
        }
    }

    fn read(&self) {
        let mut queue = self.engine.queue(self.client);
        let mut newest = 0;
        for _ in 0..self.size.rounds {
            match self.get(&mut queue, self.swap, WATCHED) {
                Ok(Some((1, version))) => {
                    assert!(version >= newest, "version {version} after {newest}");
                    newest = version;
                }
                Ok(None) => assert_eq!(newest, 0, "a page that was put is missing"),
                Err(GetError::Lost) => {}
                other => panic!("the watched page holds {other:?}"),
            }
        }
    }

    /// Run by two threads.
    fn dispute(&self) {
        let mut queue = self.engine.queue(self.client);
        for round in 1..=self.size.rounds {
            self.put(&mut queue, DISPUTED, 3, round);
            match self.get(&mut queue, self.swap, DISPUTED) {
                Ok(Some((3, _))) | Err(GetError::Lost) => {}
                other => panic!("the disputed page holds {other:?}"),
            }
        }
    }

    /// Uses pages, and marks them as freed when it has no more use for them, as a kernel does with swap slots.
    fn free(&self) {
        let mut queue = self.engine.queue(self.client);
        for round in 1..=self.size.rounds {
            let page = FREED + u64::from(round % 2);
            let stored = self.put(&mut queue, page, 5, round);
            let expected = if stored { Ok(Some((5, round))) } else { Err(GetError::Lost) };
            for _ in 0..2 {
                assert_eq!(self.get(&mut queue, self.swap, page), expected);
            }
            self.freed.mark(page);
            match self.get(&mut queue, self.swap, page) {
                Ok(None) => {}
                held => assert_eq!(held, expected),
            }
        }
    }

    /// Fills the ephemeral pool, so that the others have something to eat.
    fn cache(&self) {
        let mut queue = self.engine.queue(self.client);
        for round in 1..=self.size.rounds {
            let page = u64::from(round) * 100 % u64::from(4 * OBJECT_PAGES);
            let handle = Handle::from_page(self.cache, page);
            let put = self.engine.put(&mut queue, handle, &contents(4, round));
            assert_ne!(put, Err(PutError::NoPage));
            match self.get(&mut queue, self.cache, page) {
                Ok(None) => {}
                Ok(Some(held)) => assert_eq!(held, (4, round)),
                Err(error) => panic!("an ephemeral get failed: {error}"),
            }
            let put = self.engine.put(&mut queue, handle, &contents(4, round));
            assert_ne!(put, Err(PutError::NoPage));
        }
    }

    fn supply(&self) {
        let limit = self.engine.limit();
        for round in 0..self.size.rounds {
            let limit = if round % 4 == 3 { limit - 2 * PAGE_SIZE as u64 } else { limit };
            let before = self.engine.stats();
            self.engine.set_limit(limit).unwrap();
            self.engine.flush_freed();
            self.engine.supply().unwrap();
            self.engine.settle().unwrap();
            let stats = self.engine.stats();
            // Above a limit that was lowered it may only get less.
            assert!(stats.mem_used_total <= before.mem_used_total.max(limit), "{stats:?}");
            assert!(stats.mem_used_max >= before.mem_used_total, "{stats:?}");
            assert!(stats.pools.succ_puts >= before.pools.succ_puts, "{stats:?}");
            thread::yield_now();
        }
        self.engine.set_limit(limit).unwrap();
        while self.engine.supply().unwrap().more {}
    }

    /// Writes cold frames to the backing file, if there is one.
    fn write_back(&self) {
        let Some(mut writeback) = self.writeback.lock().unwrap().take() else { return };
        for round in 0..4 * self.size.rounds {
            let Some(job) = writeback.next(&self.engine, round.into()) else {
                thread::yield_now();
                continue;
            };
            carry_out(&writeback, job, &mut self.file.lock().unwrap(), job.bytes);
            thread::yield_now();
            writeback.ended(&self.engine, job.unit, Ok(()), round.into());
        }
        *self.writeback.lock().unwrap() = Some(writeback);
    }

    /// True if it was stored, false if it was lost.
    fn put(&self, queue: &mut Queue, page: u64, writer: u32, version: u32) -> bool {
        let handle = Handle::from_page(self.swap, page);
        for _ in 0..20 {
            match self.engine.put(queue, handle, &contents(writer, version)) {
                Ok(()) => return true,
                Err(PutError::Full) => return false,
                Err(PutError::Starved) => thread::yield_now(),
                Err(error) => panic!("put: {error}"),
            }
        }
        self.engine.lose(handle);
        false
    }

    fn get(
        &self,
        queue: &mut Queue,
        pool: PoolId,
        page: u64,
    ) -> Result<Option<(u32, u32)>, GetError> {
        let mut out = [0; PAGE_SIZE];
        let handle = Handle::from_page(pool, page);
        let mut got = self.engine.get(queue, handle, &mut out)?;
        while let Got::Backed(backed) = got {
            let at = backed.offset() as usize;
            let mut image: Page = self.file.lock().unwrap()[at..at + PAGE_SIZE].try_into().unwrap();
            thread::yield_now();
            got = self.engine.get_backed(
                queue,
                handle,
                backed,
                Image::new(&mut image, &mut Opened::default()),
                &mut out,
            )?;
        }
        match got {
            Got::Backed(_) => unreachable!("it was read"),
            Got::Miss => Ok(None),
            Got::Hit => {
                let word = |at: usize| u32::from_le_bytes(out[at..at + 4].try_into().unwrap());
                let (writer, version) = (word(0), word(4));
                assert!(out == contents(writer, version), "a page that nobody put");
                Ok(Some((writer, version)))
            }
        }
    }

    fn flush_freed(&self) {
        for _ in 0..2 * self.size.rounds {
            self.engine.flush_freed();
            thread::yield_now();
        }
    }

    /// Nothing is held of what is marked.
    fn check_freed(&self) {
        for _ in 0..2 {
            while self.engine.flush_freed() {}
        }
        let mut queue = self.engine.queue(self.client);
        let pages = (FREED..FREED + 2).map(|page| self.get(&mut queue, self.swap, page));
        assert!({ pages }.all(|held| held == Ok(None)), "what is freed is held");
    }

    fn check_end(&self) {
        let mut queue = self.engine.queue(self.client);
        match self.get(&mut queue, self.swap, DISPUTED) {
            Ok(Some(held)) => assert_eq!(held, (3, self.size.rounds)),
            Err(GetError::Lost) => {}
            other => panic!("the disputed page holds {other:?}"),
        }
        self.check_freed();
        for pool in [self.swap, self.cache] {
            self.engine.flush_range(pool, 0, u64::MAX);
        }
        let frames = self.engine.stats().frames;
        assert_eq!((frames.frames_persistent, frames.frames_ephemeral), (0, 0));
        let kept = frames.frames_reserve + frames.frames_log;
        assert_eq!(frames.frames_allocated, frames.frames_free + kept);
    }
}

/// A page that says who wrote which version of it; every third does not compress.
fn contents(writer: u32, version: u32) -> Page {
    let mut page = [version as u8; PAGE_SIZE];
    let noise = if version.is_multiple_of(3) { PAGE_SIZE } else { version as usize * 307 % 3000 };
    let mut state = u64::from(version) << 8 | 1;
    for byte in &mut page[..noise] {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        *byte = (state >> 56) as u8;
    }
    page[..4].copy_from_slice(&writer.to_le_bytes());
    page[4..8].copy_from_slice(&version.to_le_bytes());
    page
}

#[cfg(not(feature = "shuttle"))]
#[test]
fn marks_that_were_left_free_nothing() {
    for _ in 0..if cfg!(miri) { 1 } else { 200 } {
        going_on(Size {
            rounds: if cfg!(miri) { 8 } else { 200 },
            frames: 8,
            backing: Backing::None,
        });
    }
}

#[cfg(feature = "shuttle")]
#[test]
fn random_schedules_free_nothing_by_marks_that_were_left() {
    let size = Size { rounds: 4, frames: 8, backing: Backing::None };
    shuttle::check_random(move || going_on(size), 3000);
    shuttle::check_pct(move || going_on(size), 3000, 3);
}

#[cfg(not(feature = "shuttle"))]
#[test]
fn real_threads_keep_order_and_frames() {
    for backing in [Backing::None, Backing::Moved, Backing::Copied] {
        if cfg!(miri) {
            scenario(Size { rounds: 4, frames: 8, backing });
            continue;
        }
        for frames in [2, 4, 6, 10, 14, 30] {
            for _ in 0..6 {
                scenario(Size { rounds: 2000, frames, backing });
            }
        }
    }
}

#[cfg(feature = "shuttle")]
#[test]
fn random_schedules_keep_order_and_frames() {
    let scenario = |rounds, frames, backing| move || scenario(Size { rounds, frames, backing });
    shuttle::check_random(scenario(5, 3, Backing::None), 6000);
    shuttle::check_random(scenario(8, 7, Backing::None), 6000);
    shuttle::check_random(scenario(6, 5, Backing::Moved), 1500);
    shuttle::check_random(scenario(6, 5, Backing::Copied), 1500);
}

#[cfg(feature = "shuttle")]
#[test]
fn schedules_by_priority_keep_order_and_frames() {
    let scenario = |frames, backing| move || scenario(Size { rounds: 5, frames, backing });
    shuttle::check_pct(scenario(3, Backing::None), 6000, 4);
    shuttle::check_pct(scenario(5, Backing::Moved), 1500, 4);
    shuttle::check_pct(scenario(5, Backing::Copied), 1500, 4);
}
