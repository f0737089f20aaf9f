//! A process dies at each moment at which memory that outlives it changes, and another goes on.
//!
//! An engine is driven at random, beside a plain map. Before each change of its store the store may be copied: what
//! a process that dies there would leave. Another engine is made of the copy, all its pages are compared with the
//! map, its figures with each other, and then it is used, and emptied. What the interrupted operation was about, is
//! as before or as after it. Recovery is interrupted in the same way.
//!
//! Which moments are tried: each place in the code that changes something, for each operation that comes there,
//! some times, and a few of all others. `TMEM_SEED` replays a run, `TMEM_STEPS` makes it longer.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::Location;
use std::rc::Rc;

use rustix::fs::{MemfdFlags, SeekFrom};

#[allow(unsafe_code)]
#[path = "../../tests/support/backing.rs"]
mod backing;
mod begin;
#[path = "../../tests/support/contents.rs"]
mod contents;
mod damage;
mod lives;

use backing::{TABLES, carry_out};
use contents::Contents;

use crate::durable::crash;
use crate::engine::FRAME_COST;
use crate::*;

const PAGES: u64 = 2400;
const FRAMES: u64 = 90;
const SHARDS: usize = 2;

/// Pages that the log is filled with at first, so that it has to be cleaned soon.
const FILLED: u64 = 2000;

/// Of so many steps, it may die in the first ones: so it does more than there would be time for.
const PERIOD: u64 = 100;
const MORTAL: u64 = 5;

/// How often each place in the code is tried for each operation, and one in how many of the other moments.
const EACH: u32 = 6;
const OTHERS: u64 = 400;

/// The same for recovery. There, each operation comes to all places.
const EACH_IN_RECOVERY: u32 = 40;
const OTHERS_IN_RECOVERY: u64 = 20_000;

/// Random numbers that replay.
#[derive(Clone)]
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (self.0 >> 33) ^ self.0;
        mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }
}

#[derive(Clone, PartialEq)]
enum Held {
    Nothing,
    Page(Box<Page>),
    Lost,
}

/// A page: of the pool in this place, with this number.
type Name = (usize, u64);

/// What there is, or may be.
#[derive(Clone)]
struct Map {
    /// The pools; none while one is made or removed, which may be there or not.
    pools: Vec<Option<PoolId>>,
    pages: BTreeMap<Name, Held>,
    /// What the operation under way is about may also be one of these.
    also: BTreeMap<Name, Vec<Held>>,
    /// The backing file, and what is under way there.
    file: Vec<u8>,
    jobs: Vec<Job>,
}

impl Map {
    fn held(&self, name: Name) -> &Held {
        self.pages.get(&name).unwrap_or(&Held::Nothing)
    }

    fn may_be(&self, name: Name, found: &Held) -> bool {
        let is_ephemeral = kind(name.0) == PoolKind::Ephemeral;
        self.held(name) == found
            || self.also.get(&name).is_some_and(|also| also.contains(found))
            || is_ephemeral && *found == Held::Nothing
    }
}

/// The file as a dead process leaves it, and as the next one changes it.
struct Left<'a> {
    file: &'a [u8],
    changed: BTreeMap<usize, Page>,
}

impl<'a> Left<'a> {
    /// What was being written may be anything.
    fn of(map: &'a Map) -> Self {
        let mut left = Self { file: &map.file, changed: BTreeMap::new() };
        for job in map.jobs.iter().filter(|job| job.is_write) {
            left.write(job.offset, &vec![0x5a; job.bytes]);
        }
        left
    }

    fn read(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut read = Vec::with_capacity(bytes);
        for at in (offset as usize..offset as usize + bytes).step_by(PAGE_SIZE) {
            let changed = self.changed.get(&at).map(|page| &page[..]);
            read.extend_from_slice(changed.unwrap_or(&self.file[at..at + PAGE_SIZE]));
        }
        read
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let offsets = (offset as usize..).step_by(PAGE_SIZE);
        for (at, block) in offsets.zip(bytes.chunks_exact(PAGE_SIZE)) {
            self.changed.insert(at, block.try_into().unwrap());
        }
    }

    fn block(&self, backed: Backed) -> Page {
        self.read(backed.offset(), PAGE_SIZE).try_into().unwrap()
    }
}

fn kind(pool: usize) -> PoolKind {
    if pool == 2 { PoolKind::Ephemeral } else { PoolKind::Persistent }
}

/// Chooses moments.
struct Chooser {
    tried: HashMap<(&'static str, &'static Location<'static>), u32>,
    each: u32,
    others: u64,
    rng: Rng,
}

impl Chooser {
    fn new(each: u32, others: u64, rng: Rng) -> Self {
        Self { tried: HashMap::new(), each, others, rng }
    }

    fn takes(&mut self, operation: &'static str, place: &'static Location<'static>) -> bool {
        let tried = self.tried.entry((operation, place)).or_default();
        let takes = *tried < self.each || self.rng.one_in(self.others);
        *tried += u32::from(takes);
        takes
    }
}

struct Sim {
    rng: Rng,
    engine: Engine,
    queue: Queue,
    client: ClientId,
    writeback: Option<Writeback>,
    map: Rc<RefCell<Map>>,
    operation: Rc<Cell<&'static str>>,
    is_mortal: Rc<Cell<bool>>,
    crashes: Rc<Cell<u64>>,
    now: u64,
}

impl Sim {
    fn new(seed: u64, with_log: bool, keep_copies: bool) -> Self {
        let mut rng = Rng(seed);
        let directories = 3 * PAGE_SIZE as u64;
        let tables = if with_log { TABLES } else { 0 };
        let limit = Config::limit_min(SHARDS) + directories + tables + FRAMES * FRAME_COST;
        let config = Config { limit, limit_max: 2 * limit, shards: SHARDS };
        let engine = Engine::new(&config).unwrap();
        while engine.supply().unwrap().more {}
        let client = engine.create_client().unwrap();
        let pools = (0..3).map(|pool| engine.create_pool(client, kind(pool), PAGES).ok()).collect();
        let (pages, also) = (BTreeMap::new(), BTreeMap::new());
        let file = vec![0xa5; BACKING_BYTES_MIN as usize];
        let map = Map { pools, pages, also, file, jobs: Vec::new() };
        let key = [9; KEY_BYTES];
        let key = rng.one_in(2).then_some(&key);
        let writeback = with_log.then(|| engine.attach_backing(BACKING_BYTES_MIN, key).unwrap());
        let settings = WritebackSettings { keep_copies, ..Default::default() };
        engine.set_writeback_settings(&settings).unwrap();
        Self {
            queue: engine.queue(client),
            rng,
            engine,
            client,
            writeback,
            map: Rc::new(RefCell::new(map)),
            operation: Rc::new(Cell::new("")),
            is_mortal: Rc::default(),
            crashes: Rc::default(),
            now: 0,
        }
    }

    /// Takes so many steps, and has the process die now and then; returns how often, and what was done.
    fn run(mut self, steps: u64) -> (u64, Stats) {
        let chooser = Chooser::new(EACH, OTHERS, self.rng.clone());
        let inner = Chooser::new(EACH_IN_RECOVERY, OTHERS_IN_RECOVERY, self.rng.clone());
        let (mut chooser, inner) = (chooser, Rc::new(RefCell::new(inner)));
        let file = self.engine.store().file().try_clone_to_owned().unwrap();
        let (map, operation) = (Rc::clone(&self.map), Rc::clone(&self.operation));
        let (crashes, is_mortal) = (Rc::clone(&self.crashes), Rc::clone(&self.is_mortal));
        let mut seed = self.rng.next();
        crash::watch(move |place| {
            if is_mortal.get() && chooser.takes(operation.get(), place) {
                crashes.set(crashes.get() + 1);
                seed = seed.wrapping_add(1);
                let what = format!("{} at {place}", operation.get());
                go_on(file.as_fd(), &map, Some(&inner), Rng(seed), &what);
            }
        });
        self.fill();
        for step in 0..steps {
            self.is_mortal.set(step % PERIOD < MORTAL);
            self.step();
        }
        crash::unwatch();
        let file = self.engine.store().file();
        go_on(file, &self.map, None, self.rng.clone(), "the end");
        (self.crashes.get(), self.engine.stats())
    }

    /// Fills most of the log.
    fn fill(&mut self) {
        if self.writeback.is_none() {
            return;
        }
        for page in 0..FILLED {
            let id = self.map.borrow().pools[0].expect("it was made");
            let (name, contents) = ((0, page), Contents::Random(page as u32).page());
            // Where it is full already, it is full enough.
            for _ in 0..20 {
                if matches!(self.map.borrow().held(name), Held::Page(_)) {
                    break;
                }
                self.put_page(name, Handle::from_page(id, page), contents);
                // Longer than it rests after a failure.
                self.now += 100_000_000;
                (0..4).for_each(|_| self.write_back());
            }
        }
    }

    fn step(&mut self) {
        match self.rng.below(100) {
            0..50 => self.put(),
            50..58 => self.get(),
            58..62 => self.flush(),
            62..63 => self.lose(),
            63..66 => self.update(),
            // A unit of so small a pool is a small part of a segment.
            66..90 => (0..4).for_each(|_| self.write_back()),
            90..94 => {
                self.operation.set("supply");
                self.engine.supply().unwrap();
            }
            94..96 => {
                self.operation.set("settle");
                self.engine.settle().unwrap();
                self.writeback.iter_mut().for_each(Writeback::settle);
            }
            96 => self.set_limit(),
            97 => self.now += self.rng.below(2_000_000_000),
            _ => self.remake(),
        }
    }

    fn name(&mut self) -> (Name, Handle) {
        let pool = self.rng.below(3) as usize;
        let id = self.map.borrow().pools[pool].expect("between two steps all are there");
        // Most in one place, so that objects fill, and empty.
        let page = match self.rng.one_in(4) {
            true => self.rng.below(80),
            false => self.rng.below(PAGES),
        };
        ((pool, page), Handle::from_page(id, page))
    }

    fn contents(&mut self) -> Page {
        let seed = self.rng.next() as u32;
        let contents = match self.rng.below(10) {
            0 => Contents::Same(seed),
            1..4 => Contents::Random(seed),
            _ => Contents::Mixed { seed, noise: self.rng.below(2500) as usize },
        };
        contents.page()
    }

    /// Begins an operation after which a page may be one of these.
    fn begin(&self, operation: &'static str, also: impl IntoIterator<Item = (Name, Held)>) {
        self.operation.set(operation);
        let mut map = self.map.borrow_mut();
        for (name, held) in also {
            map.also.entry(name).or_default().push(held);
        }
    }

    /// The operation has ended: a page is what it is now.
    fn end(&self, now: impl IntoIterator<Item = (Name, Held)>) {
        let mut map = self.map.borrow_mut();
        map.also.clear();
        map.pages.extend(now);
    }

    fn lost(&self, name: Name) -> Held {
        match kind(name.0) {
            PoolKind::Ephemeral => Held::Nothing,
            PoolKind::Persistent => Held::Lost,
        }
    }

    fn put(&mut self) {
        let ((name, handle), page) = (self.name(), self.contents());
        self.put_page(name, handle, page);
    }

    fn put_page(&mut self, name: Name, handle: Handle, page: Page) {
        let held = Held::Page(Box::new(page));
        self.begin("put", [(name, held.clone()), (name, self.lost(name))]);
        let now = match self.engine.put(&mut self.queue, handle, &page) {
            Ok(()) => held,
            Err(PutError::Full) => self.lost(name),
            Err(PutError::Starved) => self.map.borrow().held(name).clone(),
            Err(error) => panic!("{error}"),
        };
        self.end([(name, now)]);
    }

    fn get(&mut self) {
        let (name, handle) = self.name();
        let mut page = [0; PAGE_SIZE];
        self.begin("get", [(name, Held::Nothing)].into_iter().filter(|_| name.0 == 2));
        let map = self.map.borrow();
        let block = |backed| block(&map.file, backed);
        let found = get(&self.engine, &mut self.queue, handle, block, &mut page);
        assert!(map.may_be(name, &found), "{name:?}");
        drop(map);
        self.end((name.0 == 2).then_some((name, Held::Nothing)));
    }

    fn flush(&mut self) {
        let ((pool, page), handle) = self.name();
        let count = if self.rng.one_in(100) { self.rng.below(PAGES) } else { 1 };
        let pages = || (page..PAGES.min(page + count)).map(|page| ((pool, page), Held::Nothing));
        self.begin("flush", pages());
        self.engine.flush_range(handle.pool, page, count);
        self.end(pages());
    }

    fn lose(&mut self) {
        let (name, handle) = self.name();
        self.begin("lose", [(name, self.lost(name))]);
        self.engine.lose(handle);
        self.end([(name, self.lost(name))]);
    }

    fn update(&mut self) {
        let (name, handle) = self.name();
        let (at, fill) = (self.rng.below(4000) as usize, self.rng.next() as u8);
        let mut after = match self.map.borrow().held(name) {
            Held::Page(page) => page.clone(),
            _ => Box::new([0; PAGE_SIZE]),
        };
        after[at..at + 90].fill(fill);
        let after = Held::Page(after);
        self.begin("update", [(name, after.clone())]);
        let map = self.map.borrow();
        let edit = |page: &mut Page| page[at..at + 90].fill(fill);
        let updated = loop {
            match self.engine.update(&mut self.queue, handle, edit) {
                Err(UpdateError::Backed(backed)) => {
                    let (mut block, mut opened) = (block(&map.file, backed), Opened::default());
                    let image = Image::new(&mut block, &mut opened);
                    let recalled = self.engine.recall(handle, backed, image);
                    if recalled.is_err() {
                        break false;
                    }
                }
                updated => break updated.is_ok(),
            }
        };
        drop(map);
        self.end(updated.then_some((name, after)));
    }

    /// Begins or ends something on the backing file.
    fn write_back(&mut self) {
        let Some(writeback) = &mut self.writeback else { return };
        let jobs = self.map.borrow().jobs.len() as u64;
        if jobs == 0 || self.rng.one_in(2) {
            self.operation.set("next");
            let job = writeback.next(&self.engine, self.now);
            self.map.borrow_mut().jobs.extend(job);
            return;
        }
        let job = self.map.borrow_mut().jobs.swap_remove(self.rng.below(jobs) as usize);
        // It takes dozens to clean a segment, and one that fails may spoil that.
        let fails = self.rng.one_in(60);
        let done = if fails { self.rng.below(job.bytes as u64) as usize } else { job.bytes };
        carry_out(writeback, job, &mut self.map.borrow_mut().file, done);
        self.operation.set("ended");
        self.now += 1_000_000;
        let result = if fails { Err(JobFailed) } else { Ok(()) };
        writeback.ended(&self.engine, job.unit, result, self.now);
    }

    fn set_limit(&mut self) {
        self.operation.set("set_limit");
        let limit = self.engine.limit_min() + self.rng.below(2 * FRAMES) * FRAME_COST;
        // What is known of the backing file's pages may take more.
        if let Err(error) = self.engine.set_limit(limit) {
            assert!(matches!(error, ConfigError::LimitBelowLog { .. }), "{error}");
        }
    }

    fn remake(&mut self) {
        if !self.rng.one_in(40) {
            return;
        }
        let pool = self.rng.below(3) as usize;
        let all = || (0..PAGES).map(|page| ((pool, page), Held::Nothing));
        let id = self.map.borrow_mut().pools[pool].take().unwrap();
        self.begin("destroy_pool", all());
        self.engine.destroy_pool(id).unwrap();
        self.end(all());
        self.operation.set("create_pool");
        self.engine.set_limit(self.engine.config.limit_max).unwrap();
        let id = self.engine.create_pool(self.client, kind(pool), PAGES).unwrap();
        self.map.borrow_mut().pools[pool] = Some(id);
    }
}

fn block(file: &[u8], backed: Backed) -> Page {
    file[backed.offset() as usize..][..PAGE_SIZE].try_into().unwrap()
}

/// Gets a page; `block` reads blocks of the file.
fn get(
    engine: &Engine,
    queue: &mut Queue,
    at: Handle,
    block: impl Fn(Backed) -> Page,
    page: &mut Page,
) -> Held {
    let mut got = engine.get(queue, at, page);
    while let Ok(Got::Backed(backed)) = got {
        let (mut block, mut opened) = (block(backed), Opened::default());
        got = engine.get_backed(queue, at, backed, Image::new(&mut block, &mut opened), page);
    }
    match got {
        Ok(Got::Hit) => Held::Page(Box::new(*page)),
        Ok(Got::Miss) => Held::Nothing,
        Err(GetError::Lost) => Held::Lost,
        other => panic!("{at:?}: {other:?}"),
    }
}

/// A copy of a store's file.
fn copy(file: BorrowedFd<'_>) -> std::os::fd::OwnedFd {
    let copy = rustix::fs::memfd_create("tmem-test", MemfdFlags::CLOEXEC).unwrap();
    let bytes = rustix::fs::fstat(file).unwrap().st_size as u64;
    rustix::fs::ftruncate(&copy, bytes).unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while let Ok(first) = rustix::fs::seek(file, SeekFrom::Data(at)) {
        at = rustix::fs::seek(file, SeekFrom::Hole(first)).unwrap();
        let mut from = first;
        while from < at {
            let most = buffer.len().min((at - from) as usize);
            let read = rustix::io::pread(file, &mut buffer[..most], from).unwrap();
            assert_eq!(rustix::io::pwrite(&copy, &buffer[..read], from).unwrap(), read);
            from += read as u64;
        }
    }
    copy
}

/// The process has died with this store; another goes on with it.
fn go_on(
    file: BorrowedFd<'_>,
    map: &Rc<RefCell<Map>>,
    inner: Option<&Rc<RefCell<Chooser>>>,
    rng: Rng,
    what: &str,
) {
    let left = copy(file);
    let watched = left.try_clone().unwrap();
    let prepared = Prepared::new(Store::from_file(left).unwrap()).unwrap();
    if let Some(inner) = inner {
        let (inner, map, rng) = (Rc::clone(inner), Rc::clone(map), rng.clone());
        let what = what.to_owned();
        crash::watch(move |place| {
            if inner.borrow_mut().takes("attach", place) {
                let what = format!("recovery at {place} from {what}");
                go_on(watched.as_fd(), &map, None, rng.clone(), &what);
            }
        });
    }
    let attached = prepared.attach().unwrap();
    crash::unwatch();
    let frames = attached.recovered.frames;
    assert_eq!(frames, attached.engine.arena.backed(), "{what}: frames that have memory");
    Next::new(attached, &map.borrow(), rng).check(&map.borrow(), what);
}

/// The process that goes on.
struct Next<'a> {
    engine: Engine,
    queue: Queue,
    writeback: Option<Writeback>,
    file: Left<'a>,
    pools: Vec<Option<PoolId>>,
    rng: Rng,
}

impl<'a> Next<'a> {
    fn new(attached: Attached, map: &'a Map, rng: Rng) -> Self {
        let Attached { engine, writeback, recovered } = attached;
        assert_eq!(recovered.damaged, 0);
        let there: Vec<_> = engine.pools();
        let pools = (0..3).map(|pool| {
            let id = map.pools[pool]?;
            let info = there.iter().find(|info| info.id == id).expect("a pool is gone");
            assert_eq!((info.kind, info.pages), (kind(pool), PAGES));
            Some(id)
        });
        let pools: Vec<_> = pools.collect();
        assert!(there.len() - pools.iter().flatten().count() <= 1, "a pool too many");
        let queue = engine.queue(there[0].client);
        Self { engine, queue, writeback, file: Left::of(map), pools, rng }
    }

    fn check(mut self, map: &Map, what: &str) {
        self.check_figures(what);
        let mut held = self.check_pages(map, what);
        self.check_figures(what);
        self.work(&mut held, what);
        self.check_figures(what);
        self.empty(what);
    }

    /// Compares each page with the map; returns what there is.
    fn check_pages(&mut self, map: &Map, what: &str) -> BTreeMap<Name, Held> {
        let mut held = BTreeMap::new();
        let mut page = [0; PAGE_SIZE];
        let names = map.pages.keys().chain(map.also.keys()).copied();
        for name in names.collect::<std::collections::BTreeSet<_>>() {
            let Some(id) = self.pools[name.0] else { continue };
            let handle = Handle::from_page(id, name.1);
            let block = |backed| self.file.block(backed);
            let found = get(&self.engine, &mut self.queue, handle, block, &mut page);
            assert!(map.may_be(name, &found), "{what}: page {name:?}, {:?}", {
                match &found {
                    Held::Nothing => "nothing",
                    Held::Lost => "lost",
                    Held::Page(_) => "another page",
                }
            });
            if kind(name.0) == PoolKind::Persistent {
                held.insert(name, found);
            }
        }
        held
    }

    fn check_figures(&self, what: &str) {
        let stats = self.engine.stats();
        let frames = stats.frames;
        let accounted = frames.frames_free
            + frames.frames_ephemeral
            + frames.frames_persistent
            + frames.frames_reserve
            + frames.frames_log;
        assert_eq!(frames.frames_allocated, accounted, "{what}: {frames:?}");
        let evictable = u64::from(self.engine.arena.evictable());
        assert_eq!(evictable, stats.eph.pageframes - stats.eph.closed_pageframes, "{what}");
        let pools = stats.pools;
        assert_eq!(pools.zpages, stats.eph.zpages + stats.pers.zpages, "{what}");
        assert_eq!(pools.compr_data_size, stats.eph.zbytes + stats.pers.zbytes, "{what}");
        let pages = pools.zpages + pools.same_pages + pools.bd_count;
        assert_eq!(pools.orig_data_size, pages * PAGE_SIZE as u64, "{what}");
        let is_claimed = |frame: u32| self.engine.arena.meta(frame).is_claimed();
        let claimed = (0..self.engine.arena.frames_max()).find(|frame| is_claimed(*frame));
        assert_eq!(claimed, None, "{what}: a frame has recovery's mark");
        for class in [stats.eph, stats.pers] {
            assert_eq!(class.pageframes, class.buddied_count + class.unbuddied_count, "{what}");
        }
    }

    /// Puts and flushes, writes back and cleans, and looks whether all is right after that.
    fn work(&mut self, held: &mut BTreeMap<Name, Held>, what: &str) {
        while self.engine.supply().unwrap().more {}
        let mut now = 0;
        for _ in 0..150 {
            let (pool, number) = (self.rng.below(2) as usize, self.rng.below(100));
            let (Some(id), name) = (self.pools[pool], (pool, number)) else { continue };
            let handle = Handle::from_page(id, number);
            if self.rng.one_in(4) {
                self.engine.flush_page(handle);
                held.insert(name, Held::Nothing);
                continue;
            }
            let seed = self.rng.next() as u32;
            let page = Contents::Mixed { seed, noise: self.rng.below(4000) as usize }.page();
            match self.engine.put(&mut self.queue, handle, &page) {
                Ok(()) => drop(held.insert(name, Held::Page(Box::new(page)))),
                Err(PutError::Full) => drop(held.insert(name, Held::Lost)),
                Err(PutError::Starved) => {}
                Err(error) => panic!("{what}: {error}"),
            }
            self.write_back(&mut now);
        }
        let mut page = [0; PAGE_SIZE];
        for (name, held) in held {
            let handle = Handle::from_page(self.pools[name.0].unwrap(), name.1);
            let block = |backed| self.file.block(backed);
            let found = get(&self.engine, &mut self.queue, handle, block, &mut page);
            assert!(found == *held, "{what}: page {name:?} later");
        }
    }

    fn write_back(&mut self, now: &mut u64) {
        let Some(writeback) = &mut self.writeback else { return };
        while let Some(job) = writeback.next(&self.engine, *now) {
            *now += 1_000_000;
            let mut bytes = self.file.read(job.offset, job.bytes);
            carry_out(writeback, Job { offset: 0, ..job }, &mut bytes, job.bytes);
            self.file.write(job.offset, &bytes);
            writeback.ended(&self.engine, job.unit, Ok(()), *now);
        }
    }

    /// After everything is flushed nothing is left.
    fn empty(mut self, what: &str) {
        let flush = |info: &PoolInfo| self.engine.flush_range(info.id, 0, u64::MAX);
        self.engine.pools().iter().for_each(flush);
        self.engine.set_limit(self.engine.config.limit_max).unwrap();
        while self.engine.supply().unwrap().more {}
        for info in self.engine.pools() {
            // A spare that was in use when the process died is replaced when one is wanted next.
            for object in 0..SHARDS as u32 {
                let handle = Handle { pool: info.id, object, index: 0 };
                let page = Contents::Mixed { seed: 1, noise: 1000 }.page();
                self.engine.put(&mut self.queue, handle, &page).unwrap();
                self.engine.flush_page(handle);
            }
        }
        self.writeback.iter_mut().for_each(Writeback::settle);
        let stats = self.engine.stats();
        let frames = stats.frames;
        assert_eq!((frames.frames_persistent, frames.frames_ephemeral), (0, 0), "{what}");
        assert_eq!(frames.frames_reserve, SHARDS as u64, "{what}");
        let pools = stats.pools;
        let left = [pools.orig_data_size, pools.obj_count, pools.lost_pages, pools.bd_count];
        assert_eq!((left, stats.log.log_live_bytes), ([0; 4], 0), "{what}");
        for info in self.engine.pools() {
            self.engine.destroy_pool(info.id).unwrap();
        }
    }
}

fn runs(with_log: bool, keep_copies: bool, seeds: u64, steps: u64) -> Vec<Stats> {
    let number = |name| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let steps = number("TMEM_STEPS").unwrap_or(steps);
    let run = |seed| {
        let (crashes, stats) = Sim::new(seed, with_log, keep_copies).run(steps);
        println!("seed {seed}, {steps} steps, died {crashes} times; {stats:?}");
        assert!(crashes > 100, "{crashes}");
        stats
    };
    number("TMEM_SEED").map_or(0..seeds, |seed| seed..seed + 1).map(run).collect()
}

/// Fails unless this was done: else nobody died while it was.
fn check_done(stats: &[Stats], what: &str, of: impl Fn(&Stats) -> u64) {
    assert!(stats.iter().map(of).sum::<u64>() > 10, "{what} was hardly ever done");
}

#[test]
fn a_process_may_die_at_any_moment() {
    let stats = runs(false, false, 2, 4_000);
    check_done(&stats, "compacting", |stats| stats.pers.compacted_pageframes);
    check_done(&stats, "evicting", |stats| stats.eph.evicted_pageframes);
    check_done(&stats, "losing", |stats| stats.pools.failed_puts);
}

#[test]
fn a_process_that_writes_back_may_die_at_any_moment() {
    let stats = runs(true, false, 3, 3_000);
    check_done(&stats, "writing", |stats| stats.pers.evicted_pageframes);
    check_done(&stats, "failing", |stats| stats.log.log_failed_jobs);
    check_done(&stats, "cleaning", |stats| stats.log.log_cleaned_segments);
}

#[test]
fn a_process_that_keeps_copies_may_die_at_any_moment() {
    let stats = runs(true, true, 3, 3_000);
    check_done(&stats, "evicting", |stats| stats.pers.evicted_pageframes);
    check_done(&stats, "cleaning", |stats| stats.log.log_cleaned_segments);
}
