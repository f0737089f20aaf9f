//! An engine and its backing file beside a plain map, and the steps that all of them take.

use std::collections::BTreeMap;

use tmem::{
    BACKING_BYTES_MIN, Backed, ClientId, Config, Engine, GetError, Got, Handle, Health, Image, Job,
    JobFailed, KEY_BYTES, Opened, PAGE_SIZE, Page, PoolId, PoolKind, PutError, Queue, Stats,
    UpdateError, Writeback, WritebackSettings,
};

use crate::backing::{TABLES, carry_out};
use crate::contents::Contents;

/// Random numbers that replay.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }
}

/// What a run is like.
#[derive(Clone, Copy)]
pub struct Profile {
    /// Frames below the pool limit.
    pub frames: u64,
    pub shards: usize,
    /// Pages that steps touch.
    pub pages: u64,
    /// Of a hundred pages, how many do not compress.
    pub raw: u64,
    pub encrypts: bool,
    /// One in so many jobs fails; 0 for none.
    pub failing: u64,
    /// One in so many steps flips a bit of the file; 0 for none.
    pub flipping: u64,
    /// Whether settings change now and then.
    pub setting: bool,
    /// Whether what was written stays in memory as long as there is room.
    pub keeping: bool,
    pub steps: u64,
}

pub const CALM: Profile = Profile {
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
pub struct File {
    pub bytes: Vec<u8>,
    pub under_way: Vec<Job>,
}

impl File {
    pub fn block(&self, backed: Backed) -> Page {
        let at = backed.offset() as usize;
        self.bytes[at..at + PAGE_SIZE].try_into().unwrap()
    }
}

#[derive(Clone)]
pub enum Held {
    Page(Box<Page>),
    Lost,
}

/// A read of the file that has been made and not been used yet.
pub struct Read {
    pub handle: Handle,
    pub backed: Backed,
    pub image: Page,
}

pub struct Sim {
    pub profile: Profile,
    pub rng: Rng,
    pub engine: Engine,
    pub queue: Queue,
    pub client: ClientId,
    pub pool: PoolId,
    pub writeback: Writeback,
    pub file: File,
    pub map: BTreeMap<u64, Held>,
    pub reads: Vec<Read>,
    pub now: u64,
    pub stale_reads: u64,
    pub corrupt_gets: u64,
}

impl Sim {
    pub fn new(profile: Profile, seed: u64) -> Self {
        Self::with_file(profile, seed, BACKING_BYTES_MIN)
    }

    pub fn with_file(profile: Profile, seed: u64, bytes: u64) -> Self {
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

    pub fn run(mut self) -> Stats {
        for step in 0..self.profile.steps {
            self.step();
            if step % 64 == 0 {
                self.check();
            }
        }
        self.end()
    }

    pub fn step(&mut self) {
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

    pub fn handle(&mut self) -> Handle {
        Handle::from_page(self.pool, self.rng.below(self.profile.pages))
    }

    pub fn contents(&mut self) -> Page {
        let seed = self.rng.next() as u32;
        let contents = match self.rng.below(100) {
            0..3 => Contents::Same(seed),
            kind if kind < 3 + self.profile.raw => Contents::Random(seed),
            _ => Contents::Mixed { seed, noise: self.rng.below(3000) as usize },
        };
        contents.page()
    }

    pub fn put(&mut self) {
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
    pub fn check_progress(&mut self, handle: Handle, page: &Page) {
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

    pub fn get(&mut self) {
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
    pub fn use_read(&mut self) {
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

    pub fn compare(&mut self, handle: Handle, got: Result<Got, GetError>, page: &Page) {
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

    pub fn flush(&mut self) {
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

    pub fn update(&mut self) {
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

    pub fn recall(&mut self) {
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
    pub fn remake(&mut self) {
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

    pub fn set(&mut self) {
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

    pub fn start_job(&mut self) {
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

    pub fn end_job(&mut self) {
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

    pub fn check(&self) {
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
    pub fn settle(&mut self) {
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

    pub fn end(mut self) -> Stats {
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

/// A pool with room, half of it filled.
pub fn half_full() -> Sim {
    let mut sim = Sim::new(Profile { frames: 400, shards: 1, ..CALM }, 1);
    fill(&mut sim, 0..200);
    sim
}

/// Puts pages that do not compress, for which there is room.
pub fn fill(sim: &mut Sim, pages: std::ops::Range<u64>) {
    for page in pages {
        while sim.engine.supply().unwrap().more {}
        let contents = Contents::Random(page as u32).page();
        let handle = Handle::from_page(sim.pool, page);
        sim.engine.put(&mut sim.queue, handle, &contents).unwrap();
        sim.map.insert(page, Held::Page(Box::new(contents)));
    }
}

/// Does all that is to be done at the moment, and says how many bytes that wrote.
pub fn written(sim: &mut Sim) -> u64 {
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
pub fn put_when_there_is_room(sim: &mut Sim, page: u64, round: u32) -> bool {
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

pub const SECOND: u64 = 1_000_000_000;
pub const BLOCK: u64 = PAGE_SIZE as u64;
