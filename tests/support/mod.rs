//! A plain map beside an engine, and the steps that both take.

mod contents;

use std::collections::BTreeMap;
use std::ops::Range;

pub use contents::Contents;
use tmem::{
    ClientId, Config, Engine, GetError, Got, Handle, Holding, OBJECT_PAGES, PAGE_SIZE, Page,
    PoolError, PoolId, PoolKind, PutError, Queue, Stats, UpdateError,
};

/// Pools: even ones are persistent, odd ones ephemeral.
pub const POOLS: usize = 4;
/// Objects that steps touch in each pool.
pub const OBJECTS: u32 = 3;
/// Pages that steps touch in each pool, spread over the objects.
pub const PAGES: u64 = 60;

/// Bytes of a page.
pub const PAGE_BYTES: usize = PAGE_SIZE;

/// Bytes of a pool's directory, which is a page for so few objects.
const DIRECTORY_BYTES: u64 = PAGE_SIZE as u64;
/// Bytes of a frame and its entry in the frame table.
const FRAME_COST: u64 = PAGE_SIZE as u64 + 32;

#[derive(Clone, Copy, Debug)]
pub enum Step {
    Put {
        pool: usize,
        page: u64,
        contents: Contents,
    },
    Get {
        pool: usize,
        page: u64,
    },
    FlushPage {
        pool: usize,
        page: u64,
    },
    FlushObject {
        pool: usize,
        object: u32,
    },
    FlushRange {
        pool: usize,
        first: u64,
        count: u64,
    },
    Lose {
        pool: usize,
        page: u64,
    },
    /// Fills a part of a page with a byte.
    Update {
        pool: usize,
        page: u64,
        first: usize,
        count: usize,
        fill: u8,
    },
    /// Destroys the pool and makes it anew.
    Remake {
        pool: usize,
    },
    Supply,
    Settle,
    SetLimit {
        frames: u64,
    },
}

/// What the map says of a page.
#[derive(Clone)]
enum Held {
    Page(Box<Page>),
    Lost,
}

pub struct Model {
    engine: Engine,
    queue: Queue,
    client: ClientId,
    shards: u64,
    limit_max: u64,
    pools: Vec<PoolId>,
    maps: Vec<BTreeMap<u64, Held>>,
    /// Puts that were refused, and puts of persistent pages that were given up.
    failed: (u64, u64),
    may_use: u64,
}

impl Model {
    pub fn new(shards: usize, frames: u64) -> Self {
        let limit_min = Config::limit_min(shards) + POOLS as u64 * DIRECTORY_BYTES;
        let limit = limit_min + frames * FRAME_COST;
        let limit_max = limit + frames * FRAME_COST;
        let config = Config { limit, limit_max, shards };
        let engine = Engine::new(&config).unwrap();
        let client = engine.create_client().unwrap();
        let pools = (0..POOLS).map(|pool| make_pool(&engine, client, pool).unwrap()).collect();
        let queue = engine.queue(client);
        let maps = vec![BTreeMap::new(); POOLS];
        let (shards, failed) = (shards as u64, (0, 0));
        Self { engine, queue, client, shards, limit_max, pools, maps, failed, may_use: 0 }
    }

    /// Takes all steps and flushes everything; the figures before that are returned.
    pub fn run(mut self, steps: &[Step]) -> Stats {
        for step in steps {
            // Above a limit that was lowered it may only get less.
            self.may_use = self.engine.stats().mem_used_total;
            self.take(*step);
            // Miri takes seconds for it.
            if !cfg!(miri) {
                self.check_figures();
            }
        }
        self.check_figures();
        self.check_all();
        let stats = self.engine.stats();
        self.drain();
        stats
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Put { pool, page, contents } => self.put(pool, page, contents),
            Step::Get { pool, page } => self.get(pool, page),
            Step::FlushPage { pool, page } => {
                let found = self.engine.flush_page(self.handle(pool, page));
                match self.maps[pool].remove(&page) {
                    Some(Held::Page(_)) => assert!(found || is_ephemeral(pool)),
                    _ => assert!(!found),
                }
            }
            Step::FlushObject { pool, object } => {
                self.engine.flush_object(self.pools[pool], object);
                self.maps[pool]
                    .retain(|&page, _| number(page) / u64::from(OBJECT_PAGES) != object.into());
            }
            Step::FlushRange { pool, first, count } => {
                let (start, end) = (number(first), number(first + count));
                self.engine.flush_range(self.pools[pool], start, end - start);
                self.maps[pool].retain(|&page, _| !(first..first + count).contains(&page));
            }
            Step::Lose { pool, page } => {
                self.engine.lose(self.handle(pool, page));
                self.lost(pool, page);
                self.failed.1 += u64::from(!is_ephemeral(pool));
            }
            Step::Update { pool, page, first, count, fill } => {
                self.update(pool, page, first..(first + count).min(PAGE_SIZE), fill);
            }
            Step::Remake { pool } => {
                self.engine.destroy_pool(self.pools[pool]).unwrap();
                self.maps[pool].clear();
                self.remake(pool);
            }
            Step::Supply => drop(self.engine.supply().unwrap()),
            Step::Settle => drop(self.engine.settle().unwrap()),
            Step::SetLimit { frames } => {
                let frames = frames.min(2 * 10);
                let limit = self.engine.limit_min() + frames * FRAME_COST;
                let bytes_less = if frames == 0 { 1 } else { 0 };
                let set = self.engine.set_limit(limit - bytes_less);
                assert_eq!(set.is_ok(), frames > 0, "{set:?}");
            }
        }
    }

    /// Makes a pool that was destroyed. Under a limit that was lowered there may be no room for it
    /// beside the pages that are there.
    fn remake(&mut self, pool: usize) {
        self.pools[pool] = match make_pool(&self.engine, self.client, pool) {
            Ok(made) => made,
            Err(PoolError::NoRoom { .. }) => {
                let frames = self.engine.stats().frames;
                let held = frames.frames_persistent + frames.frames_reserve;
                let room = self.engine.limit().saturating_sub(self.engine.limit_min());
                let room = room.saturating_sub(DIRECTORY_BYTES) / FRAME_COST + self.shards + 2;
                assert!(held > room, "no room for a pool, with {held} frames in use of {room}");
                self.engine.set_limit(self.limit_max).unwrap();
                make_pool(&self.engine, self.client, pool).unwrap()
            }
            Err(error) => panic!("create_pool: {error}"),
        };
    }

    fn put(&mut self, pool: usize, page: u64, contents: Contents) {
        let (handle, data) = (self.handle(pool, page), contents.page());
        match self.engine.put(&mut self.queue, handle, &data) {
            Ok(()) => drop(self.maps[pool].insert(page, Held::Page(Box::new(data)))),
            Err(PutError::Full) => {
                self.check_full();
                self.lost(pool, page);
                self.failed.0 += 1;
            }
            Err(PutError::Starved) => assert!(self.engine.supply_wanted(), "starved for nothing"),
            Err(error) => panic!("put: {error}"),
        }
        // An ephemeral get would take the page out; its turn comes with the steps.
        if !is_ephemeral(pool) {
            self.get(pool, page);
        }
    }

    fn update(&mut self, pool: usize, page: u64, range: Range<usize>, fill: u8) {
        let handle = self.handle(pool, page);
        let edit = |data: &mut Page| data[range.clone()].fill(fill);
        let updated = self.engine.update(&mut self.queue, handle, edit);
        let held = self.maps[pool].get(&page);
        match updated {
            Err(UpdateError::Put(PutError::NoPage)) => assert!(is_ephemeral(pool)),
            Err(UpdateError::Get(GetError::Lost)) => assert!(matches!(held, Some(Held::Lost))),
            Ok(()) => {
                let mut data = match held {
                    None => Box::new([0; PAGE_SIZE]),
                    Some(Held::Page(data)) => data.clone(),
                    Some(Held::Lost) => panic!("a lost page was updated"),
                };
                edit(&mut data);
                self.maps[pool].insert(page, Held::Page(data));
            }
            Err(UpdateError::Put(PutError::Full)) => {
                self.check_full();
                self.failed.0 += 1;
            }
            Err(UpdateError::Put(PutError::Starved)) => {
                assert!(self.engine.supply_wanted(), "starved for nothing");
            }
            Err(error) => panic!("update: {error}"),
        }
        if !is_ephemeral(pool) {
            self.get(pool, page);
            self.check_run(pool, page);
        }
    }

    /// The run that begins at a page is as long as the map says, unless its object ends first.
    fn check_run(&self, pool: usize, page: u64) {
        let first = number(page);
        let (holding, pages) = self.engine.run(self.pools[pool], first, u64::MAX).unwrap();
        let numbers: BTreeMap<u64, &Held> =
            self.maps[pool].iter().map(|(&page, held)| (number(page), held)).collect();
        let expected = |at: u64| match numbers.get(&at) {
            None => Holding::Nothing,
            Some(Held::Page(data)) if **data == [0; PAGE_SIZE] => Holding::Zeros,
            Some(_) => Holding::Data,
        };
        assert!((first..first + pages).all(|at| expected(at) == holding), "{holding:?} {pages}");
        let past = first + pages;
        let ends = past.is_multiple_of(u64::from(OBJECT_PAGES)) || expected(past) != holding;
        assert!(ends, "a run of {pages} ends for nothing");
    }

    /// A put is refused only when a frame is nowhere to be had: not even two, which is what a put may
    /// need, free or to be taken from the ephemeral pools.
    fn check_full(&self) {
        let frames = self.engine.stats().frames;
        let used = frames.frames_allocated - frames.frames_free;
        let limit = (self.engine.limit() - self.engine.limit_min()) / FRAME_COST + self.shards + 2;
        let left = limit.saturating_sub(used) + frames.frames_ephemeral;
        assert!(left < 2, "refused, with {left} frames left: {frames:?}, limit {limit}");
    }

    fn get(&mut self, pool: usize, page: u64) {
        let mut data = [0xee; PAGE_SIZE];
        let handle = self.handle(pool, page);
        let got = self.engine.get(&mut self.queue, handle, &mut data);
        match (got, self.maps[pool].get(&page)) {
            (Ok(Got::Hit), Some(Held::Page(held))) => assert!(data == **held, "wrong contents"),
            (Ok(Got::Miss), None) => {}
            (Ok(Got::Miss), Some(Held::Page(_))) if is_ephemeral(pool) => {}
            (Err(GetError::Lost), Some(Held::Lost)) => {}
            (got, held) => panic!("got {got:?}, held: {}", held.is_some()),
        }
        if is_ephemeral(pool) {
            self.maps[pool].remove(&page);
        }
    }

    fn lost(&mut self, pool: usize, page: u64) {
        match is_ephemeral(pool) {
            true => drop(self.maps[pool].remove(&page)),
            false => drop(self.maps[pool].insert(page, Held::Lost)),
        }
    }

    fn check_figures(&self) {
        let stats = self.engine.stats();
        let frames = stats.frames;
        let accounted = frames.frames_free
            + frames.frames_ephemeral
            + frames.frames_persistent
            + frames.frames_reserve;
        assert_eq!(frames.frames_allocated, accounted, "frames are not conserved: {frames:?}");
        assert_eq!(stats.pools.zpages, stats.eph.zpages + stats.pers.zpages);
        assert_eq!(stats.pools.compr_data_size, stats.eph.zbytes + stats.pers.zbytes);
        for class in [stats.eph, stats.pers] {
            assert_eq!(class.pageframes, class.buddied_count + class.unbuddied_count);
            assert!(class.zbytes <= class.pageframes * PAGE_SIZE as u64);
        }
        // Of pools that were destroyed, too.
        assert_eq!((stats.pools.failed_puts, stats.pools.given_up_puts), self.failed);
        assert!(stats.mem_used_max >= stats.mem_used_total);
        assert!(stats.mem_used_total <= self.may_use.max(stats.mem_limit), "more than the limit");
        for pool in 0..POOLS {
            let counters = self.engine.pool_stats(self.pools[pool]).unwrap();
            let held = |held: &&Held| matches!(held, Held::Page(_));
            let pages = self.maps[pool].values().filter(held).count() as u64;
            let lost = self.maps[pool].len() as u64 - pages;
            let bytes = pages * PAGE_SIZE as u64;
            assert!(counters.orig_data_size <= bytes, "{counters:?}");
            assert!(is_ephemeral(pool) || counters.orig_data_size == bytes, "{counters:?}");
            assert_eq!(counters.lost_pages, lost);
            assert_eq!(
                counters.orig_data_size,
                (counters.zpages + counters.same_pages) * PAGE_SIZE as u64
            );
        }
    }

    fn check_all(&mut self) {
        for pool in 0..POOLS {
            (0..PAGES).for_each(|page| self.get(pool, page));
        }
    }

    /// After everything is flushed nothing is left but the reserve and free frames.
    fn drain(self) {
        for &pool in &self.pools {
            self.engine.flush_range(pool, 0, u64::MAX);
        }
        let stats = self.engine.stats();
        assert_eq!(stats.frames.frames_persistent, 0);
        assert_eq!(stats.frames.frames_ephemeral, 0);
        assert_eq!(stats.frames.frames_reserve, self.shards);
        let pools = stats.pools;
        let left = [pools.orig_data_size, pools.compr_data_size, pools.obj_count, pools.lost_pages];
        assert_eq!(left, [0; 4]);
        self.engine.destroy_client(self.client).unwrap();
        assert_eq!(self.engine.pool_stats(self.pools[0]), None);
    }

    fn handle(&self, pool: usize, page: u64) -> Handle {
        Handle::from_page(self.pools[pool], number(page))
    }
}

/// Spreads the pages that steps touch over the objects.
fn number(page: u64) -> u64 {
    let per_object = PAGES / u64::from(OBJECTS);
    page / per_object * u64::from(OBJECT_PAGES) + page % per_object
}

fn is_ephemeral(pool: usize) -> bool {
    pool % 2 == 1
}

fn make_pool(engine: &Engine, client: ClientId, pool: usize) -> Result<PoolId, PoolError> {
    let kind = if is_ephemeral(pool) { PoolKind::Ephemeral } else { PoolKind::Persistent };
    engine.create_pool(client, kind, u64::from(OBJECTS * OBJECT_PAGES))
}
