//! Writeback against a plain map, with a file that fails in every way a file can.
//!
//! One thread does it all, step by step, as a random number says: puts, gets, flushes and updates of pages
//! many times what memory holds; starts of what writeback wants done, and their ends, in any order, done,
//! done by half, or not; reads that see the file as it was some time ago; bits that flip. So reclaim,
//! writing, reading back and cleaning meet in every order, and each run is the same for the same seed.
//! `TMEM_SEED` replays one, `TMEM_STEPS` makes runs longer.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "support/backing.rs"]
mod backing;
#[path = "support/contents.rs"]
mod contents;

use std::collections::BTreeMap;

use backing::{TABLES, carry_out};
use contents::Contents;
use tmem::{
    BACKING_BYTES_MIN, Backed, ClientId, Config, ConfigError, Engine, GetError, Got, Handle,
    Health, Image, Job, JobFailed, KEY_BYTES, Opened, PAGE_SIZE, Page, PoolId, PoolKind, PutError,
    Queue, Stats, UpdateError, Writeback, WritebackSettings,
};

/// Random numbers that replay.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }
}

/// What a run is like.
#[derive(Clone, Copy)]
struct Profile {
    /// Frames below the pool limit.
    frames: u64,
    shards: usize,
    /// Pages that steps touch.
    pages: u64,
    /// Of a hundred pages, how many do not compress.
    raw: u64,
    encrypts: bool,
    /// One in so many jobs fails; 0 for none.
    failing: u64,
    /// One in so many steps flips a bit of the file; 0 for none.
    flipping: u64,
    /// Whether settings change now and then.
    setting: bool,
    /// Whether what was written stays in memory as long as there is room.
    keeping: bool,
    steps: u64,
}

const CALM: Profile = Profile {
    frames: 60,
    shards: 2,
    pages: 2000,
    raw: 20,
    encrypts: true,
    failing: 0,
    flipping: 0,
    setting: false,
    keeping: false,
    steps: 20_000,
};

/// The backing file.
struct File {
    bytes: Vec<u8>,
    under_way: Vec<Job>,
}

impl File {
    fn block(&self, backed: Backed) -> Page {
        let at = backed.offset() as usize;
        self.bytes[at..at + PAGE_SIZE].try_into().unwrap()
    }
}

#[derive(Clone)]
enum Held {
    Page(Box<Page>),
    Lost,
}

/// A read of the file that has been made and not been used yet.
struct Read {
    handle: Handle,
    backed: Backed,
    image: Page,
}

struct Sim {
    profile: Profile,
    rng: Rng,
    engine: Engine,
    queue: Queue,
    client: ClientId,
    pool: PoolId,
    writeback: Writeback,
    file: File,
    map: BTreeMap<u64, Held>,
    reads: Vec<Read>,
    now: u64,
    stale_reads: u64,
    corrupt_gets: u64,
}

impl Sim {
    fn new(profile: Profile, seed: u64) -> Self {
        Self::with_file(profile, seed, BACKING_BYTES_MIN)
    }

    fn with_file(profile: Profile, seed: u64, bytes: u64) -> Self {
        let directory = (profile.pages.div_ceil(512) * 80).next_multiple_of(PAGE_SIZE as u64);
        let frames = profile.frames * (PAGE_SIZE as u64 + 32);
        let limit = Config::limit_min(profile.shards) + directory + TABLES + frames;
        let config = Config { limit, limit_max: limit, shards: profile.shards };
        let engine = Engine::new(&config).unwrap();
        while engine.supply().unwrap().more {}
        let client = engine.create_client().unwrap();
        let pool = engine.create_pool(client, PoolKind::Persistent, profile.pages).unwrap();
        let key = [7; KEY_BYTES];
        let key = profile.encrypts.then_some(&key);
        let writeback = engine.attach_backing(bytes, key).unwrap();
        let settings = WritebackSettings { keep_copies: profile.keeping, ..Default::default() };
        engine.set_writeback_settings(&settings).unwrap();
        Self {
            profile,
            rng: Rng(seed),
            queue: engine.queue(client),
            engine,
            client,
            pool,
            writeback,
            file: File { bytes: vec![0xa5; bytes as usize], under_way: Vec::new() },
            map: BTreeMap::new(),
            reads: Vec::new(),
            now: 0,
            stale_reads: 0,
            corrupt_gets: 0,
        }
    }

    fn run(mut self) -> Stats {
        for step in 0..self.profile.steps {
            self.step();
            if step % 64 == 0 {
                self.check();
            }
        }
        self.end()
    }

    fn step(&mut self) {
        if self.profile.flipping > 0 && self.rng.one_in(self.profile.flipping) {
            let at = self.rng.below(self.file.bytes.len() as u64) as usize;
            self.file.bytes[at] ^= 1 << self.rng.below(8);
        }
        match self.rng.below(100) {
            0..40 => self.put(),
            40..55 => self.get(),
            55..58 => self.use_read(),
            58..62 => self.flush(),
            62..64 => self.update(),
            64..66 => self.recall(),
            66..80 => self.start_job(),
            80..95 => self.end_job(),
            95..97 => {
                self.engine.supply().unwrap();
            }
            97 => {
                self.engine.settle().unwrap();
                self.writeback.settle();
            }
            98 => {
                self.now += self.rng.below(2_000_000_000);
                if self.profile.setting && self.rng.one_in(3) {
                    self.set();
                }
            }
            _ => self.remake(),
        }
    }

    fn handle(&mut self) -> Handle {
        Handle::from_page(self.pool, self.rng.below(self.profile.pages))
    }

    fn contents(&mut self) -> Page {
        let seed = self.rng.next() as u32;
        let contents = match self.rng.below(100) {
            0..3 => Contents::Same(seed),
            kind if kind < 3 + self.profile.raw => Contents::Random(seed),
            _ => Contents::Mixed { seed, noise: self.rng.below(3000) as usize },
        };
        contents.page()
    }

    fn put(&mut self) {
        let (handle, page) = (self.handle(), self.contents());
        let held = match self.engine.put(&mut self.queue, handle, &page) {
            Ok(()) => Held::Page(Box::new(page)),
            Err(PutError::Full) => {
                let is_calm = self.profile.failing == 0
                    && !self.profile.setting
                    && self.writeback.health() == Health::Good;
                let held = self.engine.stats().pers.held_pageframes;
                assert!(held == 0 || !is_calm, "full while frames are on their way");
                Held::Lost
            }
            // Nothing was changed.
            Err(PutError::Starved) => return self.check_progress(handle, &page),
            Err(error) => panic!("{error}"),
        };
        self.map.insert(handle.page(), held);
    }

    /// A put was told to come back: there must be something to wait for.
    fn check_progress(&mut self, handle: Handle, page: &Page) {
        while self.engine.supply().unwrap().more {}
        self.start_job();
        // There can be several reasons to rest, one after the other.
        while self.file.under_way.is_empty()
            && let Some(rest) = self.writeback.rests_for(self.now)
        {
            self.now += rest;
            self.start_job();
        }
        if !self.file.under_way.is_empty() {
            return;
        }
        let held = match self.engine.put(&mut self.queue, handle, page) {
            Ok(()) => Held::Page(Box::new(*page)),
            Err(PutError::Full) => Held::Lost,
            Err(error) => {
                panic!("{error}, and nothing is done about it: {:?}", self.engine.stats())
            }
        };
        self.map.insert(handle.page(), held);
    }

    fn get(&mut self) {
        let handle = self.handle();
        let mut page = [0; PAGE_SIZE];
        let got = self.engine.get(&mut self.queue, handle, &mut page);
        if let Ok(Got::Backed(backed)) = got {
            let image = self.file.block(backed);
            self.reads.push(Read { handle, backed, image });
            if self.rng.one_in(2) {
                self.use_read();
            }
            return;
        }
        self.compare(handle, got, &page);
    }

    /// Gets a page from what was read of the file some time ago.
    fn use_read(&mut self) {
        if self.reads.is_empty() {
            return;
        }
        let at = self.rng.below(self.reads.len() as u64) as usize;
        let Read { handle, mut backed, mut image } = self.reads.swap_remove(at);
        let mut page = [0; PAGE_SIZE];
        loop {
            let got = self.engine.get_backed(
                &mut self.queue,
                handle,
                backed,
                Image::new(&mut image, &mut Opened::default()),
                &mut page,
            );
            let Ok(Got::Backed(moved)) = got else {
                return self.compare(handle, got, &page);
            };
            self.stale_reads += 1;
            backed = moved;
            image = self.file.block(backed);
        }
    }

    fn compare(&mut self, handle: Handle, got: Result<Got, GetError>, page: &Page) {
        let at = handle.page();
        match (got, self.map.get(&at)) {
            (Ok(Got::Hit), Some(Held::Page(held))) => {
                assert!(**held == *page, "page {at} is not what was put")
            }
            (Ok(Got::Miss), None) | (Err(GetError::Lost), Some(Held::Lost)) => {}
            (Err(GetError::Corrupt), Some(Held::Page(_))) if self.profile.flipping > 0 => {
                self.corrupt_gets += 1;
            }
            (got, held) => panic!("page {at}: {got:?}, is there: {}", held.is_some()),
        }
    }

    fn flush(&mut self) {
        let handle = self.handle();
        if self.rng.one_in(100) {
            let count = self.rng.below(self.profile.pages / 4);
            self.engine.flush_range(self.pool, handle.page(), count);
            let end = handle.page() + count;
            self.map.retain(|page, _| !(handle.page()..end).contains(page));
            return;
        }
        let found = self.engine.flush_page(handle);
        let held = self.map.remove(&handle.page());
        assert_eq!(found, matches!(held, Some(Held::Page(_))), "page {}", handle.page());
    }

    fn update(&mut self) {
        let handle = self.handle();
        let (at, fill) = (self.rng.below(4000) as usize, self.rng.next() as u8);
        let edit = |page: &mut Page| page[at..at + 90].fill(fill);
        loop {
            let backed = match self.engine.update(&mut self.queue, handle, edit) {
                Ok(()) => break,
                Err(UpdateError::Backed(backed)) => backed,
                Err(UpdateError::Put(PutError::Full | PutError::Starved)) => return,
                Err(UpdateError::Get(error)) => {
                    return self.compare(handle, Err(error), &[0; PAGE_SIZE]);
                }
                Err(error) => panic!("{error}"),
            };
            let mut image = self.file.block(backed);
            match self.engine.recall(handle, backed, Image::new(&mut image, &mut Opened::default()))
            {
                Ok(()) => {}
                Err(UpdateError::Put(PutError::Full | PutError::Starved)) => return,
                Err(UpdateError::Get(error)) => {
                    return self.compare(handle, Err(error), &[0; PAGE_SIZE]);
                }
                Err(error) => panic!("{error}"),
            }
        }
        let zeros = || Held::Page(Box::new([0; PAGE_SIZE]));
        let Held::Page(held) = self.map.entry(handle.page()).or_insert_with(zeros) else {
            panic!("a lost page was updated");
        };
        edit(held);
    }

    fn recall(&mut self) {
        let handle = self.handle();
        let mut page = [0; PAGE_SIZE];
        let got = self.engine.get(&mut self.queue, handle, &mut page);
        let Ok(Got::Backed(backed)) = got else { return self.compare(handle, got, &page) };
        let mut image = self.file.block(backed);
        if self.rng.one_in(3) {
            // Something comes between.
            self.put();
            self.end_job();
        }
        match self.engine.recall(handle, backed, Image::new(&mut image, &mut Opened::default())) {
            Ok(()) | Err(UpdateError::Put(PutError::Full | PutError::Starved)) => {}
            Err(UpdateError::Get(error)) => self.compare(handle, Err(error), &page),
            Err(error) => panic!("{error}"),
        }
    }

    /// Destroys the pool, with all that is under way for it.
    fn remake(&mut self) {
        if !self.rng.one_in(300) {
            return;
        }
        self.engine.destroy_pool(self.pool).unwrap();
        let made = self.engine.create_pool(self.client, PoolKind::Persistent, self.profile.pages);
        self.pool = made.unwrap();
        self.map.clear();
        for read in &mut self.reads {
            read.handle.pool = self.pool;
        }
    }

    fn set(&mut self) {
        let low_permille = 1 + self.rng.below(300) as u32;
        let settings = WritebackSettings {
            low_permille,
            high_permille: low_permille + 1 + self.rng.below(200) as u32,
            bytes_per_second: self.rng.one_in(2).then(|| (1 + self.rng.below(8)) << 20),
            bytes_per_day: self.rng.one_in(4).then(|| (64 + self.rng.below(64)) << 20),
            age_seconds: self.rng.one_in(2).then(|| 1 + self.rng.below(9) as u32),
            keep_copies: self.rng.one_in(2),
        };
        self.engine.set_writeback_settings(&settings).unwrap();
        assert_eq!(self.engine.writeback_settings(), settings);
    }

    fn start_job(&mut self) {
        if let Some(job) = self.writeback.next(&self.engine, self.now) {
            assert!(job.offset as usize + job.bytes <= self.file.bytes.len() && job.bytes > 0);
            let meets = |other: &Job| {
                let apart = job.offset + job.bytes as u64 <= other.offset
                    || other.offset + other.bytes as u64 <= job.offset;
                !apart && (job.is_write || other.is_write)
            };
            assert!(!self.file.under_way.iter().any(meets), "two jobs at one place");
            self.file.under_way.push(job);
        }
    }

    fn end_job(&mut self) {
        if self.file.under_way.is_empty() {
            return;
        }
        let at = self.rng.below(self.file.under_way.len() as u64) as usize;
        let job = self.file.under_way.swap_remove(at);
        let fails = self.profile.failing > 0 && self.rng.one_in(self.profile.failing);
        let done = if fails { self.rng.below(job.bytes as u64 + 1) as usize } else { job.bytes };
        carry_out(&self.writeback, job, &mut self.file.bytes, done);
        let result = if fails { Err(JobFailed) } else { Ok(()) };
        self.now += self.rng.below(1_000_000);
        self.writeback.ended(&self.engine, job.unit, result, self.now);
    }

    fn check(&self) {
        let stats = self.engine.stats();
        let frames = stats.frames;
        assert_eq!(
            frames.frames_allocated,
            frames.frames_free
                + frames.frames_ephemeral
                + frames.frames_persistent
                + frames.frames_reserve
                + frames.frames_log,
            "{frames:?}"
        );
        let held = self.map.values().filter(|held| matches!(held, Held::Page(_))).count() as u64;
        let pools = stats.pools;
        assert_eq!(pools.orig_data_size, held * PAGE_SIZE as u64);
        assert_eq!(pools.zpages + pools.same_pages + pools.bd_count, held);
        assert_eq!(pools.lost_pages, self.map.len() as u64 - held);
        let copied = pools.bd_count + stats.pers.clean_pageframes;
        assert!(copied > 0 || stats.log.log_live_bytes == 0);
    }

    /// Does what is to be done, without faults, until there is nothing.
    fn settle(&mut self) {
        loop {
            self.start_job();
            if self.file.under_way.is_empty() {
                match self.writeback.rests_for(self.now) {
                    Some(rest) => self.now += rest,
                    None => return,
                }
            }
            self.end_job();
        }
    }

    fn end(mut self) -> Stats {
        self.profile.failing = 0;
        // What may not be written today would stay as it is.
        self.engine.set_writeback_settings(&WritebackSettings::default()).unwrap();
        self.settle();
        while !self.reads.is_empty() {
            self.use_read();
        }
        for page in 0..self.profile.pages {
            let handle = Handle::from_page(self.pool, page);
            let mut bytes = [0; PAGE_SIZE];
            let got = self.engine.get(&mut self.queue, handle, &mut bytes);
            match got {
                Ok(Got::Backed(backed)) => {
                    let image = self.file.block(backed);
                    self.reads.push(Read { handle, backed, image });
                    self.use_read();
                }
                got => self.compare(handle, got, &bytes),
            }
        }
        self.check();
        let stats = self.engine.stats();
        self.engine.flush_range(self.pool, 0, u64::MAX);
        self.settle();
        self.writeback.settle();
        let end = self.engine.stats();
        assert_eq!(
            (end.pools.orig_data_size, end.pools.bd_count, end.log.log_live_bytes),
            (0, 0, 0)
        );
        assert_eq!((end.frames.frames_persistent, end.log.outstanding_writeback_pages), (0, 0));
        // Two are open at most, four keep their entries, and there are those for the next of both kinds.
        assert!(end.log.log_segments - end.log.log_segments_free <= 2, "{:?}", end.log);
        assert!(end.frames.frames_log <= 2 * (2 + 4 + 2), "{:?}", end.frames);
        stats
    }
}

fn runs(profile: Profile, seeds: u64) -> Vec<Stats> {
    let number = |name| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let steps = number("TMEM_STEPS").unwrap_or(profile.steps);
    let seeds = number("TMEM_SEED").map_or(0..seeds, |seed| seed..seed + 1);
    let run = |seed| {
        println!("seed {seed}, {steps} steps");
        let stats = Sim::new(Profile { steps, ..profile }, seed).run();
        println!("  {:?}", stats.log);
        stats
    };
    seeds.map(run).collect()
}

fn total(stats: &[Stats], of: impl Fn(&Stats) -> u64) -> u64 {
    stats.iter().map(of).sum()
}

#[test]
fn pages_go_and_come_back() {
    let stats = runs(CALM, 8);
    assert_eq!(total(&stats, |stats| stats.pools.corrupt_gets), 0);
    assert_eq!(total(&stats, |stats| stats.log.log_failed_jobs), 0);
    for (what, count) in [
        ("written", total(&stats, |stats| stats.pools.bd_writes)),
        ("read back", total(&stats, |stats| stats.pools.bd_reads)),
        ("frames evicted", total(&stats, |stats| stats.pers.evicted_pageframes)),
    ] {
        assert!(count > 1000, "{what}: {count}");
    }
}

#[test]
fn a_checksum_serves_where_nothing_is_encrypted() {
    runs(Profile { encrypts: false, shards: 1, ..CALM }, 4);
}

#[test]
fn a_file_that_fails_loses_nothing() {
    let stats = runs(Profile { failing: 4, ..CALM }, 8);
    assert!(total(&stats, |stats| stats.log.log_failed_jobs) > 100);
    assert_eq!(total(&stats, |stats| stats.pools.corrupt_gets), 0);
}

#[test]
fn segments_are_cleaned() {
    // Most of the log is alive, and rewritten again and again.
    let profile = Profile { pages: 2500, raw: 90, steps: 40_000, ..CALM };
    let stats = runs(profile, 4);
    assert!(total(&stats, |stats| stats.log.log_cleaned_segments) > 100);
    let stats = runs(Profile { failing: 60, ..profile }, 4);
    assert!(total(&stats, |stats| stats.log.log_failed_jobs) > 20);
    assert!(total(&stats, |stats| stats.log.log_cleaned_segments) > 50);
}

#[test]
fn a_flipped_bit_is_an_error_and_never_other_data() {
    for encrypts in [false, true] {
        let profile = Profile { encrypts, flipping: 40, raw: 60, steps: 40_000, ..CALM };
        let stats = runs(profile, 4);
        assert!(total(&stats, |stats| stats.pools.corrupt_gets) > 10);
    }
}

#[test]
fn copies_are_kept_and_given_up_when_frames_are_needed() {
    let keeping = Profile { keeping: true, ..CALM };
    let stats = runs(keeping, 8);
    assert_eq!(total(&stats, |stats| stats.pools.corrupt_gets), 0);
    assert!(total(&stats, |stats| stats.pools.bd_reads) > 1000);
    // Also where the cleaner meets them, or the file fails.
    let full = Profile { pages: 2500, raw: 90, steps: 40_000, ..keeping };
    for failing in [0, 60] {
        let stats = runs(Profile { failing, ..full }, 4);
        assert!(total(&stats, |stats| stats.log.log_cleaned_segments) > 50);
        assert_eq!(total(&stats, |stats| stats.pools.corrupt_gets), 0);
    }
    let stats = runs(Profile { flipping: 40, ..full }, 4);
    assert!(total(&stats, |stats| stats.pools.corrupt_gets) > 10);
}

#[test]
fn settings_change_while_pages_go_and_come_back() {
    let stats = runs(Profile { setting: true, failing: 50, steps: 40_000, ..CALM }, 6);
    assert_eq!(total(&stats, |stats| stats.pools.corrupt_gets), 0);
    assert!(total(&stats, |stats| stats.pools.bd_reads) > 1000);
}

/// A pool with room, half of it filled.
fn half_full() -> Sim {
    let mut sim = Sim::new(Profile { frames: 400, shards: 1, ..CALM }, 1);
    fill(&mut sim, 0..200);
    sim
}

/// Puts pages that do not compress, for which there is room.
fn fill(sim: &mut Sim, pages: std::ops::Range<u64>) {
    for page in pages {
        while sim.engine.supply().unwrap().more {}
        let contents = Contents::Random(page as u32).page();
        let handle = Handle::from_page(sim.pool, page);
        sim.engine.put(&mut sim.queue, handle, &contents).unwrap();
        sim.map.insert(page, Held::Page(Box::new(contents)));
    }
}

/// Does all that is to be done at the moment, and says how many bytes that wrote.
fn written(sim: &mut Sim) -> u64 {
    let before = sim.engine.stats().log.log_written_bytes;
    loop {
        sim.start_job();
        let Some(job) = sim.file.under_way.pop() else { break };
        carry_out(&sim.writeback, job, &mut sim.file.bytes, job.bytes);
        sim.writeback.ended(&sim.engine, job.unit, Ok(()), sim.now);
    }
    sim.engine.stats().log.log_written_bytes - before
}

/// Puts a page, with whatever writing it has to wait for; false if it was refused.
fn put_when_there_is_room(sim: &mut Sim, page: u64, round: u32) -> bool {
    let contents = Contents::Random(1000 * round + page as u32).page();
    let handle = Handle::from_page(sim.pool, page);
    let mut put = sim.engine.put(&mut sim.queue, handle, &contents);
    if put == Err(PutError::Starved) {
        sim.engine.supply().unwrap();
        written(sim);
        put = sim.engine.put(&mut sim.queue, handle, &contents);
    }
    let held = match put {
        Ok(()) => Held::Page(Box::new(contents)),
        Err(PutError::Full) => Held::Lost,
        Err(error) => panic!("{error}"),
    };
    sim.map.insert(page, held);
    put.is_ok()
}

const SECOND: u64 = 1_000_000_000;
const BLOCK: u64 = PAGE_SIZE as u64;

#[test]
fn what_is_not_used_for_its_age_goes_though_there_is_room() {
    let mut sim = half_full();
    assert_eq!(written(&mut sim), 0);
    let settings = WritebackSettings { age_seconds: Some(80), ..Default::default() };
    sim.engine.set_writeback_settings(&settings).unwrap();
    // As often as it is to be asked: an age is as exact as that.
    let pass = |sim: &mut Sim, seconds: u64| {
        let mut sum = 0;
        for _ in 0..seconds {
            sim.now += SECOND;
            sum += written(sim);
        }
        sum
    };
    assert_eq!(pass(&mut sim, 60), 0);
    let mut page = [0; PAGE_SIZE];
    for at in 0..50 {
        let handle = Handle::from_page(sim.pool, at);
        assert_eq!(sim.engine.get(&mut sim.queue, handle, &mut page), Ok(Got::Hit));
    }
    assert_eq!(pass(&mut sim, 40), 150 * BLOCK);
    // Those that were used had a second chance when it was their turn, soon after that.
    assert_eq!(pass(&mut sim, 40), 0);
    assert_eq!(pass(&mut sim, 40), 50 * BLOCK);
    sim.end();
}

#[test]
fn what_was_written_is_read_in_memory_until_its_frame_is_needed() {
    let mut sim = half_full();
    let settings =
        WritebackSettings { age_seconds: Some(1), keep_copies: true, ..Default::default() };
    sim.engine.set_writeback_settings(&settings).unwrap();
    let mut sum = 0;
    for _ in 0..4 {
        sim.now += SECOND;
        sum += written(&mut sim);
    }
    let stats = sim.engine.stats();
    assert_eq!((sum, stats.pers.clean_pageframes), (200 * BLOCK, 200));
    assert_eq!((stats.pools.bd_writes, stats.pools.bd_count), (200, 0));
    // What was rewritten has no copy any more, nor what was flushed.
    fill(&mut sim, 0..10);
    sim.engine.flush_range(sim.pool, 10, 10);
    (10..20).for_each(|page| drop(sim.map.remove(&page)));
    let stats = sim.engine.stats();
    assert_eq!((stats.pers.clean_pageframes, stats.log.log_live_bytes), (180, 180 * BLOCK));
    // More than there is memory for: without a write, as long as there are copies.
    fill(&mut sim, 200..550);
    assert_eq!(sim.engine.stats().log.log_written_bytes, sum);
    let stats = sim.engine.stats();
    assert!(stats.pools.bd_count > 100 && stats.pers.clean_pageframes > 0, "{stats:?}");
    sim.end();
}

#[test]
fn no_more_is_written_than_is_set() {
    let mut sim = half_full();
    let all = WritebackSettings { low_permille: 499, high_permille: 500, ..Default::default() };
    let paced = WritebackSettings { bytes_per_second: Some(1 << 20), ..all };
    fill(&mut sim, 200..370);
    sim.engine.set_writeback_settings(&paced).unwrap();
    sim.now = 100 * SECOND;
    let first = written(&mut sim);
    assert!((1..=(1 << 20) / 4 + 64 * BLOCK).contains(&first), "{first}");
    let rest = sim.writeback.rests_for(sim.now).unwrap();
    assert!(sim.engine.writeback_wanted(), "what waits for its turn is wanted still");
    sim.now += rest - 1;
    assert_eq!(written(&mut sim), 0);
    sim.now += 1;
    assert!(written(&mut sim) > 0);

    // What a day may have is used up: as if there was no file, until the next one.
    sim.engine.set_writeback_settings(&all).unwrap();
    written(&mut sim);
    let daily = WritebackSettings { bytes_per_day: Some(64 << 20), ..all };
    sim.engine.set_writeback_settings(&daily).unwrap();
    let mut is_refused = false;
    for round in 0.. {
        assert!(round < 100, "there is no end to it");
        for page in 0..800 {
            is_refused |= !put_when_there_is_room(&mut sim, page, round);
        }
        if is_refused {
            break;
        }
    }
    let total = sim.engine.stats().log.log_written_bytes;
    assert!(total >= 64 << 20);
    assert!(!sim.engine.writeback_wanted());
    assert!(total < (64 << 20) + (1 << 20), "{total}");
    sim.now += 86_400 * SECOND;
    assert!(written(&mut sim) > 0);
    sim.end();
}

#[test]
fn a_page_that_is_read_twice_is_in_memory_again_if_there_is_room() {
    let mut sim = half_full();
    (0..800).for_each(|page| assert!(put_when_there_is_room(&mut sim, page, 0)));
    let handle = Handle::from_page(sim.pool, 3);
    let mut page = [0; PAGE_SIZE];
    let mut read = |sim: &mut Sim| match sim.engine.get(&mut sim.queue, handle, &mut page).unwrap()
    {
        Got::Backed(backed) => {
            let mut image = sim.file.block(backed);
            let (engine, queue) = (&sim.engine, &mut sim.queue);
            let got = engine.get_backed(
                queue,
                handle,
                backed,
                Image::new(&mut image, &mut Opened::default()),
                &mut page,
            );
            assert_eq!(got, Ok(Got::Hit));
            true
        }
        got => {
            assert_eq!(got, Got::Hit);
            false
        }
    };
    // While there is no room it stays where it is.
    assert!(sim.engine.writeback_wanted());
    assert_eq!([(); 3].map(|()| read(&mut sim)), [true; 3]);
    sim.engine.flush_range(sim.pool, 600, 200);
    sim.map.split_off(&600);
    assert!(!sim.engine.writeback_wanted());
    let backed = sim.engine.stats().pools.bd_count;
    assert_eq!([(); 3].map(|()| read(&mut sim)), [true, false, false]);
    assert_eq!(sim.engine.stats().pools.bd_count, backed - 1);
    sim.end();
}

/// The pool limit allows more, but the system has no memory for it.
#[test]
fn frames_go_where_the_arena_cannot_grow() {
    let mut sim = Sim::new(Profile { frames: 4000, shards: 1, ..CALM }, 1);
    let mut page = 0;
    let mut put = |sim: &mut Sim| {
        let handle = Handle::from_page(sim.pool, page);
        let contents = Contents::Random(page as u32).page();
        let put = sim.engine.put(&mut sim.queue, handle, &contents);
        if put.is_ok() {
            sim.map.insert(page, Held::Page(Box::new(contents)));
            page += 1;
        }
        put
    };
    while put(&mut sim) == Ok(()) {}
    let stats = sim.engine.stats();
    assert!(stats.frames.frames_allocated < 3000, "{stats:?}");
    assert!(sim.engine.writeback_wanted());
    // Not at once: it grows by and by when it can.
    assert_eq!(written(&mut sim), 0);
    sim.now += SECOND / 50;
    assert!(written(&mut sim) > 0);
    assert_eq!(put(&mut sim), Ok(()));
    assert_eq!(sim.engine.stats().frames.frames_allocated, stats.frames.frames_allocated);
    sim.end();
}

/// What is ephemeral goes first, for nothing is lost and nothing written by that.
#[test]
fn frames_of_a_cache_are_room() {
    let mut sim = half_full();
    let cache = sim.engine.create_pool(sim.client, PoolKind::Ephemeral, 512).unwrap();
    for page in 0..512 {
        while sim.engine.supply().unwrap().more {}
        let contents = Contents::Random(page as u32).page();
        let handle = Handle::from_page(cache, page);
        sim.engine.put(&mut sim.queue, handle, &contents).unwrap();
    }
    let ephemeral = |sim: &Sim| sim.engine.stats().frames.frames_ephemeral;
    let most = ephemeral(&sim);
    assert!(most > 150 && sim.engine.stats().frames.frames_free < 8, "{:?}", sim.engine.stats());
    let settings = WritebackSettings { low_permille: 60, ..Default::default() };
    sim.engine.set_writeback_settings(&settings).unwrap();
    sim.now += SECOND;
    assert!(!sim.engine.writeback_wanted());
    assert_eq!(written(&mut sim), 0);
    fill(&mut sim, 200..340);
    assert!(ephemeral(&sim) < most - 130, "the cache has made room");
    sim.now += SECOND;
    assert!(!sim.engine.writeback_wanted());
    assert_eq!(written(&mut sim), 0);
    // Little is left of it.
    fill(&mut sim, 340..385);
    assert!(sim.engine.writeback_wanted());
    assert!(written(&mut sim) > 0);
    assert!(ephemeral(&sim) > 0);
    sim.engine.destroy_pool(cache).unwrap();
    sim.end();
}

#[test]
fn an_age_that_is_set_to_none_is_none() {
    let mut sim = half_full();
    let rate = Some(1 << 20);
    let aged =
        WritebackSettings { age_seconds: Some(8), bytes_per_second: rate, ..Default::default() };
    sim.engine.set_writeback_settings(&aged).unwrap();
    while written(&mut sim) == 0 {
        sim.now += SECOND;
    }
    sim.engine.set_writeback_settings(&WritebackSettings::default()).unwrap();
    sim.now += 10 * SECOND;
    assert_eq!(written(&mut sim), 0);
}

/// Of a log that is nine tenths full the cleaner writes more than the frames that come.
#[test]
fn a_limit_of_a_second_holds_for_the_cleaner_too() {
    let bytes = 8 * BACKING_BYTES_MIN;
    let blocks = bytes / BLOCK;
    let pages = blocks * 9 / 10;
    let profile = Profile { pages, frames: 800, shards: 1, encrypts: false, ..CALM };
    let mut sim = Sim::with_file(profile, 1, bytes);
    let put = |sim: &mut Sim, page| {
        let contents = Contents::Random(sim.rng.next() as u32).page();
        let handle = Handle::from_page(sim.pool, page);
        while let Err(error) = sim.engine.put(&mut sim.queue, handle, &contents) {
            assert_eq!(error, PutError::Starved, "page {page}");
            sim.engine.supply().unwrap();
            sim.start_job();
            if sim.file.under_way.is_empty()
                && let Some(rest) = sim.writeback.rests_for(sim.now)
            {
                assert!(rest < SECOND / 2, "{rest} ns are too long for a put");
                sim.now += rest;
            }
            sim.end_job();
        }
        sim.map.insert(page, Held::Page(Box::new(contents)));
    };
    (0..pages).for_each(|page| put(&mut sim, page));
    let paced = WritebackSettings { bytes_per_second: Some(1 << 20), ..Default::default() };
    sim.engine.set_writeback_settings(&paced).unwrap();
    let (before, began) = (sim.engine.stats().log, sim.now);
    for _ in 0..2 * pages {
        let page = sim.rng.below(pages);
        put(&mut sim, page);
    }
    let after = sim.engine.stats().log;
    let cleaned = after.log_cleaner_written_bytes - before.log_cleaner_written_bytes;
    let written = cleaned + after.log_written_bytes - before.log_written_bytes;
    assert!(cleaned > 16 << 20);
    let seconds = (sim.now - began) / SECOND;
    assert!(written <= (seconds + 2) << 20, "{written} bytes in {seconds} s");
    sim.end();
}

/// Nothing else than writes, of a log that is nine tenths full.
#[test]
fn a_file_filled_to_nine_tenths_is_rewritten_ten_times_over() {
    let bytes = 8 * BACKING_BYTES_MIN;
    let blocks = bytes / PAGE_SIZE as u64;
    let profile =
        Profile { pages: blocks * 9 / 10, frames: 800, shards: 1, encrypts: false, ..CALM };
    let mut sim = Sim::with_file(profile, 1, bytes);
    let put = |sim: &mut Sim, page| {
        let contents = Contents::Random(sim.rng.next() as u32).page();
        let handle = Handle::from_page(sim.pool, page);
        let mut waits = 0;
        while let Err(error) = sim.engine.put(&mut sim.queue, handle, &contents) {
            assert_eq!(error, PutError::Starved, "page {page}");
            waits += 1;
            assert!(waits < 10_000, "page {page} waits without end: {:?}", sim.engine.stats());
            sim.engine.supply().unwrap();
            sim.start_job();
            sim.end_job();
        }
        sim.map.insert(page, Held::Page(Box::new(contents)));
    };
    (0..profile.pages).for_each(|page| put(&mut sim, page));
    let filled = sim.engine.stats().log;
    for _ in 0..10 * profile.pages {
        let page = sim.rng.below(profile.pages);
        put(&mut sim, page);
    }
    let log = sim.engine.stats().log;
    let cleaned = log.log_cleaner_written_bytes - filled.log_cleaner_written_bytes;
    let amplification =
        1.0 + cleaned as f64 / (log.log_written_bytes - filled.log_written_bytes) as f64;
    println!("write amplification {amplification:.2}");
    assert!((1.5..12.0).contains(&amplification), "{amplification}");
    sim.end();
}

/// Most of the log at a time is on its way when it is filled first.
#[test]
fn a_pool_larger_than_its_log_is_not_refused_while_there_is_room() {
    let profile = Profile { frames: 3100, pages: 5000, raw: 97, steps: 100_000, ..CALM };
    let stats = runs(profile, 3);
    assert!(total(&stats, |stats| stats.pools.bd_writes) > 500);
    assert_eq!(total(&stats, |stats| stats.pools.failed_puts), 0);
}

/// Entries of blocks are there until all in their segment is dead.
#[test]
fn a_limit_that_leaves_little_beside_what_is_known_of_the_log_is_refused() {
    let profile = Profile { frames: 400, pages: 12_000, shards: 1, encrypts: false, ..CALM };
    let mut sim = Sim::with_file(profile, 1, 50 << 20);
    for page in 0..10_000 {
        assert!(put_when_there_is_room(&mut sim, page, 0), "page {page}");
    }
    let entries = sim.engine.stats().frames.frames_log;
    assert!(entries > 70, "{entries}");
    let (limit, few) = (sim.engine.limit(), sim.engine.limit() - 330 * 4128);
    let refused = sim.engine.set_limit(few);
    let Err(ConfigError::LimitBelowLog { entries: bytes, minimum, .. }) = &refused else {
        panic!("{refused:?}")
    };
    assert_eq!(*bytes, entries * 4128);
    assert_eq!((*minimum, sim.engine.limit()), (sim.engine.limit_min(), limit));
    assert!(refused.as_ref().unwrap_err().to_string().contains("swap off"), "{refused:?}");
    assert!(sim.engine.set_limit(*minimum - 1).is_err());
    sim.engine.set_limit(*minimum).unwrap();
    // It can always be raised, and when pages have gone from there be lowered.
    sim.engine.set_limit(*minimum + 4128).unwrap();
    sim.engine.flush_range(sim.pool, 0, 9000);
    sim.map.retain(|page, _| *page >= 9000);
    sim.writeback.settle();
    sim.engine.set_limit(few).unwrap();
    sim.end();
}

/// The log was made for a pool of four times as much.
#[test]
fn entries_take_no_more_than_half_of_a_pool_whose_limit_was_lowered() {
    let profile = Profile { frames: 400, pages: 12_000, shards: 1, encrypts: false, ..CALM };
    let mut sim = Sim::with_file(profile, 1, 50 << 20);
    let frames = 100;
    sim.engine.set_limit(sim.engine.limit() - (profile.frames - frames) * 4128).unwrap();
    while sim.engine.supply().unwrap().more {}
    let held = (0..12_000).take_while(|page| put_when_there_is_room(&mut sim, *page, 0)).count();
    let stats = sim.engine.stats();
    assert!(stats.frames.frames_log <= (frames + 8) / 2, "{stats:?}");
    assert!(held as u64 > (frames / 2 - 10) / 2 * 256, "{held} pages");
    assert!(stats.log.log_segments_free > 20, "{stats:?}");
    // All the same, what is written anew has room as soon as something else has gone.
    sim.engine.flush_range(sim.pool, 0, 1024);
    sim.map.retain(|page, _| *page >= 1024);
    // As the thread does that drives it, each second.
    written(&mut sim);
    (0..500).for_each(|page| assert!(put_when_there_is_room(&mut sim, page, 1), "page {page}"));
    sim.end();
}

/// A segment is used up, and nothing that was written to it has freed a frame yet.
#[test]
fn frames_wait_rather_than_take_what_the_cleaner_needs() {
    let profile = Profile { frames: 4000, pages: 6000, shards: 1, ..CALM };
    let mut sim = Sim::with_file(profile, 1, 2 * BACKING_BYTES_MIN);
    for page in 0.. {
        while sim.engine.supply().unwrap().more {}
        let contents = Contents::Random(page as u32).page();
        let handle = Handle::from_page(sim.pool, page);
        if let Err(error) = sim.engine.put(&mut sim.queue, handle, &contents) {
            assert_eq!(error, PutError::Starved);
            break;
        }
        sim.map.insert(page, Held::Page(Box::new(contents)));
    }
    (0..4).for_each(|_| sim.start_job());
    let bytes: usize = sim.file.under_way.iter().map(|job| job.bytes).sum();
    assert_eq!(bytes, 1 << 20);
    let failed = sim.file.under_way.pop().unwrap();
    sim.writeback.ended(&sim.engine, failed.unit, Err(JobFailed), sim.now);
    sim.now += sim.writeback.rests_for(sim.now).unwrap();
    assert_eq!(sim.writeback.next(&sim.engine, sim.now), None);
    // One that succeeds gives what the next segment needs.
    sim.end_job();
    assert!(
        sim.writeback.next(&sim.engine, sim.now).map(|job| sim.file.under_way.push(job)).is_some()
    );
    sim.end();
}

#[test]
fn a_full_log_is_a_full_pool() {
    // Far more than both hold.
    let profile = Profile { pages: 6000, raw: 97, steps: 60_000, ..CALM };
    let stats = runs(profile, 3);
    assert!(total(&stats, |stats| stats.pools.failed_puts) > 100);
}
