//! The engine: puts, gets and flushes by handle.
//!
//! It routes each operation to the shard of the page's object, does the compressing outside the
//! shard's lock, and looks for a frame in other shards when one has none. Changing a part of a page
//! is in [`crate::update`], what is held where in [`crate::runs`]. Pools come and go in
//! [`crate::registry`], growing and shrinking is in [`crate::supply`], figures are in
//! [`crate::report`].

use std::sync::{Arc, OnceLock};

use slab::Slab;

use crate::arena::Arena;
use crate::backing::{Dials, Log, SEGMENT_FRAMES, is_low};
use crate::clock::{self, Clock};
use crate::error::{ConfigError, GetError, PutError};
use crate::frame::{FRAME_GRANULES, FrameMeta};
use crate::handle::{
    ClientId, Handle, OBJECT_PAGES, PAGE_SIZE, POOL_PAGES_MAX, Page, PoolId, PoolKind,
};
use crate::list::List;
use crate::owners::Member;
use crate::queue::{Ledger, Queue, Restored};
use crate::readback::Backed;
use crate::registry::Registry;
use crate::report::Peaks;
use crate::shard::{Hand, Packed, Refused, Shard, Unpacked};
use crate::stats::PoolCounters;
use crate::store::{Geometry, STORE_BYTES, Store};
use crate::supply::Settling;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering};

/// Pools that an engine can have at a time.
pub const POOLS_MAX: usize = 64;

/// Shards that an engine can have.
pub const SHARDS_MAX: usize = 64;

/// Bytes that a frame takes, with its entry in the frame table.
pub(crate) const FRAME_COST: u64 = (PAGE_SIZE + size_of::<FrameMeta>()) as u64;

/// Frames that the arena may get beyond the limit.
const FRAMES_BEYOND: u32 = 2 * SEGMENT_FRAMES as u32;

/// How an engine is built.
#[derive(Clone, Debug)]
pub struct Config {
    /// The pool limit, in bytes: what frames, and all that is kept to find pages in them, may take.
    pub limit: u64,
    /// The largest limit that may be set later, in bytes. It costs address space only.
    pub limit_max: u64,
    /// Shards: a power of two up to [`SHARDS_MAX`]. One for each queue
    /// is enough: a lock is held for a tenth of a put, and frames are not shared between shards.
    pub shards: usize,
}

impl Config {
    /// The smallest pool limit that so many shards can work with, in bytes: what the shards take,
    /// each one's spare frame, and a leaf and a frame for one page. A pool's directory comes to it.
    pub fn limit_min(shards: usize) -> u64 {
        let shard = size_of::<Shard>()
            + 4 * FRAME_GRANULES * size_of::<List>()
            + POOLS_MAX * size_of::<PoolCounters>();
        // The frame table grows by whole pages.
        STORE_BYTES + (shards * shard + PAGE_SIZE) as u64 + (shards as u64 + 2) * FRAME_COST
    }

    /// Checks a limit against what tables of so many bytes (see [`Engine::tables`]) leave of it, and turns it into
    /// frames.
    pub(crate) fn check_limit(&self, limit: u64, tables: u64) -> Result<u32, ConfigError> {
        let (minimum, maximum) = (Self::limit_min(self.shards) + tables, self.limit_max);
        if limit < minimum {
            return Err(ConfigError::LimitBelowReserve { limit, minimum });
        }
        let frames = (limit - minimum) / FRAME_COST + self.shards as u64 + 2;
        if limit > maximum || frames >= u64::from(u32::MAX - FRAMES_BEYOND) {
            return Err(ConfigError::LimitAboveMaximum { limit, maximum });
        }
        Ok(frames as u32)
    }
}

/// What a get found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Got {
    /// The page is on the backing file: the block there has to be read first.
    Backed(Backed),
    /// The page was copied out.
    Hit,
    /// There is no such page. The buffer holds nothing of use.
    Miss,
}

/// Transcendent memory: see the crate's description.
pub struct Engine {
    pub(crate) store: Store,
    pub(crate) arena: Arc<Arena>,
    pub(crate) config: Config,
    pub(crate) shards: Box<[Padded<Mutex<Shard>>]>,
    pub(crate) registry: Mutex<Registry>,
    /// What the clients' queues measure.
    pub(crate) ledger: Mutex<Ledger>,
    /// The pool limit in bytes; the arena knows what it leaves for frames. Changes only with the
    /// registry locked, like the two that follow.
    pub(crate) limit: AtomicU64,
    /// Bytes of all pools' directories, of those that are being made too, and of a backing file's tables and
    /// buffers.
    pub(crate) tables: AtomicU64,
    /// Pools that frames can be taken from, or that are being removed.
    pub(crate) ephemeral_pools: AtomicU64,
    /// Set once, when a backing file is attached.
    pub(crate) log: OnceLock<Arc<Log>>,
    pub(crate) dials: Dials,
    pub(crate) peaks: Mutex<Peaks>,
    pub(crate) settling: Mutex<Settling>,
    pub(crate) clock: Clock,
}

/// Keeps two shards' locks off one cache line.
#[repr(align(128))]
pub(crate) struct Padded<T>(pub(crate) T);

impl Engine {
    /// Makes an engine, with memory for the reserve; [`Engine::supply`] brings the rest. What it holds goes with
    /// the process.
    ///
    /// # Panics
    ///
    /// If the number of shards is not a power of two up to [`SHARDS_MAX`].
    pub fn new(config: &Config) -> Result<Self, ConfigError> {
        let memory = |source| ConfigError::Memory { what: "the store", bytes: STORE_BYTES, source };
        Self::create(config, Store::new().map_err(memory)?)
    }

    /// Makes an engine on an empty store. What it holds is there as long as anybody has the store's file: another
    /// process can go on with it, once this one is dead ([`Prepared`](crate::Prepared)).
    ///
    /// # Panics
    ///
    /// If the store is not empty, or as for [`Engine::new`].
    pub fn create(config: &Config, store: Store) -> Result<Self, ConfigError> {
        assert!(config.shards.is_power_of_two() && config.shards <= SHARDS_MAX);
        let bytes = rustix::param::page_size();
        if bytes != PAGE_SIZE {
            return Err(ConfigError::PageSize { bytes });
        }
        let limit = config.check_limit(config.limit, 0)?;
        // A backing file's first frames may have to come from beyond the limit.
        let frames_max = config.check_limit(config.limit_max, 0)? + FRAMES_BEYOND;
        let memory = |bytes| move |source| ConfigError::Memory { what: "the arena", bytes, source };
        let (shards, limit_max) = (config.shards as u32, config.limit_max);
        store.set_limit(config.limit);
        let format = || store.format(Geometry { frames_max, shards, limit_max });
        format().map_err(memory(STORE_BYTES))?;
        let arena = Arena::new(&store, frames_max, limit).map_err(memory(limit_max))?;
        arena.grow(shards).map_err(memory(u64::from(shards) * PAGE_SIZE as u64))?;
        Ok(Self::over(config, store, arena))
    }

    /// An engine without pools on a store and its arena.
    pub(crate) fn over(config: &Config, store: Store, arena: Arena) -> Self {
        let arena = Arc::new(arena);
        let shard = |number| {
            let member = Member { number, of: config.shards };
            Padded(Mutex::new(Shard::new(member, Arc::clone(&arena), POOLS_MAX)))
        };
        Self {
            shards: (0..config.shards).map(shard).collect(),
            store,
            arena,
            config: config.clone(),
            registry: Mutex::new(Registry::new(Slab::new())),
            ledger: Mutex::new(Ledger::default()),
            limit: AtomicU64::new(config.limit),
            tables: AtomicU64::new(0),
            ephemeral_pools: AtomicU64::new(0),
            log: OnceLock::new(),
            dials: Dials::new(),
            peaks: Mutex::new(Peaks::default()),
            settling: Mutex::new(Settling::default()),
            clock: Clock::calibrate(),
        }
    }

    /// All that outlives the process.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// A context for one thread that puts and gets for a client. What it measures counts for the
    /// client as long as there is that client, and for the engine always.
    pub fn queue(&self, client: ClientId) -> Queue {
        let queue = Queue::new();
        let registry = self.registry.lock();
        let client = Some(client).filter(|client| registry.clients.contains(client.0.into()));
        self.ledger.lock().enter(client, &queue);
        queue
    }

    /// Whether all memory that holds pages is locked.
    pub fn is_locked(&self) -> bool {
        let registry = self.registry.lock();
        self.arena.is_locked()
            && registry.pools().all(|pool| pool.directory.is_locked())
            && self.log().is_none_or(|log| log.segments().is_locked())
    }

    /// Puts a page. It replaces an older copy; when it fails with [`PutError::Full`] the older copy
    /// is gone all the same.
    pub fn put(&self, queue: &mut Queue, handle: Handle, page: &Page) -> Result<(), PutError> {
        let start = clock::now();
        let packed = queue.pack(handle, page);
        let result = self.put_packed(handle, packed);
        // An attempt that is to be made again is not the put's latency, nor is one at no page.
        if matches!(result, Ok(()) | Err(PutError::Full)) {
            queue.latencies.put.record(self.clock.since(start));
        }
        result
    }

    fn put_packed(&self, handle: Handle, packed: Packed<'_>) -> Result<(), PutError> {
        let mut hand = Hand::default();
        let mut result = self.shard(handle).put(handle, packed, &mut hand);
        while result == Err(Refused::NoFrame) && !hand.is_full() {
            let Some(frame) = self.frame_of_others(handle) else { break };
            hand.add(frame);
            result = self.shard(handle).put(handle, packed, &mut hand);
        }
        if result == Err(Refused::NoFrame) && self.is_full() {
            // Nothing more is to be had, so the new copy may have the old one's room.
            let mut shard = self.shard(handle);
            shard.lose(handle);
            result = shard.put(handle, packed, &mut hand);
            if result == Err(Refused::NoFrame) {
                shard.refuse_put(handle);
                hand.put_back(&self.arena);
                return Err(PutError::Full);
            }
        }
        hand.put_back(&self.arena);
        match result {
            Ok(()) => Ok(()),
            Err(Refused::NoFrame) => {
                self.shard(handle).count(handle, |counters| counters.starved_puts += 1);
                Err(PutError::Starved)
            }
            Err(Refused::NoPage) => Err(PutError::NoPage),
        }
    }

    /// Whether no frame is to be had by waiting: the arena does not grow, and no log takes what is in it.
    pub(crate) fn is_full(&self) -> bool {
        let is_at_limit = self.arena.allocated() >= self.arena.limit();
        is_at_limit && !self.log().is_some_and(|log| log.accepts())
    }

    /// What the backing file holds, if there is one.
    pub(crate) fn log(&self) -> Option<&Log> {
        self.log.get().map(|log| &**log)
    }

    /// An ephemeral frame of another shard, or one of which the log has a copy. No lock is held meanwhile.
    pub(crate) fn frame_of_others(&self, handle: Handle) -> Option<u32> {
        let own = self.shard_number(handle);
        if self.ephemeral_pools.load(Ordering::Acquire) > 0
            && let Some(frame) = self.others(own).find_map(|mut shard| shard.evict_ephemeral())
        {
            self.shard(handle).count_eaten(handle);
            return Some(frame);
        }
        self.clean_frame(own)
    }

    /// A frame of which the log has a copy, of any shard but `own`; if there is none there, of that.
    pub(crate) fn clean_frame(&self, own: usize) -> Option<u32> {
        if self.log()?.clean() == 0 {
            return None;
        }
        let mut others = self.others(own);
        let frame = others.find_map(|mut shard| shard.evict_clean());
        frame.or_else(|| self.shards[own].0.lock().evict_clean())
    }

    /// All shards but one, each locked when it is its turn.
    fn others(&self, own: usize) -> impl Iterator<Item = MutexGuard<'_, Shard>> {
        let others = self.shards.iter().cycle().skip(own + 1).take(self.shards.len() - 1);
        others.map(|shard| shard.0.lock())
    }

    /// Gets a page. From an ephemeral pool it is gone then. On anything but a hit, `page` holds
    /// nothing of use.
    pub fn get(&self, queue: &mut Queue, handle: Handle, page: &mut Page) -> Result<Got, GetError> {
        let start = clock::now();
        let result = self.get_unpacked(queue, handle, page);
        // What has yet to be read is not got.
        if !matches!(result, Ok(Got::Backed(_))) {
            queue.latencies.get.record(self.clock.since(start));
        }
        result
    }

    fn get_unpacked(
        &self,
        queue: &mut Queue,
        handle: Handle,
        page: &mut Page,
    ) -> Result<Got, GetError> {
        // What was read is moved, but not to a frame that puts want: then a get would be the reason for a write.
        let may_take = self.log().is_some() && !is_low(self);
        let mut shard = self.shard(handle);
        let (unpacked, kind) = shard.get(handle, &mut queue.scratch, page, may_take)?;
        drop(shard);
        if let Unpacked::Backed(backed) = unpacked {
            return Ok(Got::Backed(backed));
        }
        match queue.restore(handle, &unpacked, page) {
            Restored::Hit => Ok(Got::Hit),
            Restored::Miss => Ok(Got::Miss),
            Restored::FoundCorrupt => corrupt(kind),
            Restored::Corrupt => {
                self.shard(handle).count(handle, PoolCounters::count_corrupt);
                corrupt(kind)
            }
        }
    }

    /// Gives up the put of a page: the older copy goes, and a get of the page is
    /// [`GetError::Lost`] until it is put or flushed. (An ephemeral page just goes.)
    pub fn lose(&self, handle: Handle) {
        self.shard(handle).give_up(handle);
    }

    /// Flushes a page; true if there was one.
    pub fn flush_page(&self, handle: Handle) -> bool {
        self.shard(handle).flush_page(handle)
    }

    /// Flushes all pages of an object; true if there were any.
    pub fn flush_object(&self, pool: PoolId, object: u32) -> bool {
        let first = Handle { pool, object, index: 0 };
        let mut shard = self.shard(first);
        let found = shard.flush_pages(first, 0..OBJECT_PAGES);
        shard.count(first, |counters| {
            counters.flobj_total += 1;
            counters.flobj_found += u64::from(found);
        });
        found
    }

    /// Flushes `count` pages from page number `first` on, as far as the pool reaches. Objects that
    /// hold nothing cost a look at their entry, and when no object is left that holds anything the
    /// rest costs nothing: a flush of a whole device walks what is in it, not its size.
    pub fn flush_range(&self, pool: PoolId, first: u64, count: u64) {
        let start = Handle::from_page(pool, first.min(POOL_PAGES_MAX - 1));
        let Some(known) = self.shard(start).pool(pool) else { return };
        let end = first.saturating_add(count).min(known.pages());
        let mut page = first;
        while page < end && known.is_active() {
            let at = Handle::from_page(pool, page);
            let past = (page - u64::from(at.index) + u64::from(OBJECT_PAGES)).min(end);
            let is_idle = known.directory.object(at.object).is_idle();
            match (is_idle, past - page) {
                (true, _) => {}
                (false, pages) if pages == u64::from(OBJECT_PAGES) => {
                    self.flush_object(pool, at.object);
                }
                (false, pages) => {
                    let indexes = at.index..at.index + pages as u32;
                    self.shard(at).flush_pages(at, indexes);
                }
            }
            page = past;
        }
    }

    pub(crate) fn shard(&self, handle: Handle) -> MutexGuard<'_, Shard> {
        self.shards[self.shard_number(handle)].0.lock()
    }

    fn shard_number(&self, handle: Handle) -> usize {
        Member::shard_of(handle, self.shards.len())
    }
}

/// What a get of a corrupt page is: an ephemeral one has just vanished, as it may.
fn corrupt(kind: PoolKind) -> Result<Got, GetError> {
    match kind {
        PoolKind::Ephemeral => Ok(Got::Miss),
        PoolKind::Persistent => Err(GetError::Corrupt),
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use crate::error::PoolError;
    use crate::slot::Place;
    use crate::stats::Latencies;

    struct Small {
        engine: Engine,
        client: ClientId,
        queue: Queue,
        pool: PoolId,
    }

    impl Small {
        fn new(kind: PoolKind) -> Self {
            let limit = Config::limit_min(1) + 64 * FRAME_COST;
            let engine = Engine::new(&Config { limit, limit_max: limit, shards: 1 }).unwrap();
            while engine.supply().unwrap().more {}
            let client = engine.create_client().unwrap();
            let pool = engine.create_pool(client, kind, 1024).unwrap();
            Self { queue: engine.queue(client), engine, client, pool }
        }

        fn put(&mut self, number: u64, page: &Page) {
            let handle = Handle::from_page(self.pool, number);
            self.engine.put(&mut self.queue, handle, page).unwrap();
        }

        fn get(&mut self, number: u64) -> Result<Page, GetError> {
            let mut page = [0; PAGE_SIZE];
            let handle = Handle::from_page(self.pool, number);
            assert_eq!(self.engine.get(&mut self.queue, handle, &mut page)?, Got::Hit);
            Ok(page)
        }

        /// Flips a bit of what is stored for a page, `offset` bytes into its zpage.
        fn corrupt(&self, number: u64, offset: usize) {
            let handle = Handle::from_page(self.pool, number);
            let shard = self.engine.shard(handle);
            let Place::Frame { frame, granule } = shard.place(handle) else {
                panic!("page {number} is not in a frame");
            };
            let at = usize::from(granule) * crate::frame::GRANULE + offset;
            let mut byte = [0];
            // SAFETY: the shard's lock is held.
            unsafe {
                self.engine.arena.read(frame, at, &mut byte);
                self.engine.arena.write(frame, at, &[byte[0] ^ 4]);
            }
        }
    }

    fn page(fill: u8) -> Page {
        let mut page = [fill; PAGE_SIZE];
        for (at, byte) in page[..600].iter_mut().enumerate() {
            *byte = (at * at / 7) as u8 ^ fill;
        }
        page
    }

    #[test]
    fn a_flipped_bit_is_an_error_for_that_page_alone() {
        for offset in [0, 3, 4, 8, 10, 11, 12, 100] {
            let mut small = Small::new(PoolKind::Persistent);
            small.put(1, &page(1));
            small.put(2, &page(2));
            small.corrupt(1, offset);
            assert_eq!(small.get(1), Err(GetError::Corrupt), "offset {offset}");
            assert_eq!(small.get(2), Ok(page(2)));
            assert_eq!(small.engine.stats().pools.corrupt_gets, 1);
            small.put(1, &page(3));
            assert_eq!(small.get(1), Ok(page(3)));
        }
    }

    /// Incompressible bytes, then zeros.
    fn partly_noise(bytes: usize, seed: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        let mut state = seed;
        for byte in &mut page[..bytes] {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *byte = (state >> 56) as u8;
        }
        page
    }

    #[test]
    #[cfg(not(feature = "seed-zbud"))]
    fn a_flipped_bit_in_a_header_does_not_hurt_the_frames_compaction() {
        for offset in [0, 1, 2, 3, 8, 9] {
            let mut small = Small::new(PoolKind::Persistent);
            for (number, bytes) in [(1, 900), (2, 900), (3, 1800)] {
                small.put(number, &partly_noise(bytes, number));
            }
            small.corrupt(2, offset);
            assert!(small.engine.flush_page(Handle::from_page(small.pool, 1)));
            small.put(4, &partly_noise(1150, 4));
            assert_eq!(small.engine.stats().pers.closed_pageframes, 1, "offset {offset}");
            assert_eq!(small.get(2), Err(GetError::Corrupt));
            assert_eq!(small.get(3), Ok(partly_noise(1800, 3)));
            assert_eq!(small.get(4), Ok(partly_noise(1150, 4)));
            small.engine.flush_range(small.pool, 0, 1024);
            let stats = small.engine.stats();
            assert_eq!((stats.frames.frames_persistent, stats.pers.closed_pageframes), (0, 0));
        }
    }

    #[test]
    fn a_flipped_bit_in_a_header_does_not_hurt_an_eviction() {
        for offset in [0, 1, 2, 3, 8, 9] {
            let mut small = Small::new(PoolKind::Ephemeral);
            let pages = 300;
            (0..10).for_each(|number| small.put(number, &partly_noise(3000, number)));
            small.corrupt(4, offset);
            // Far more than there is room for.
            (10..pages).for_each(|number| small.put(number, &partly_noise(3000, number)));
            let stats = small.engine.stats();
            assert!(stats.eph.evicted_pageframes > 100, "{stats:?}");
            assert_eq!(stats.eph.closed_pageframes, 1);
            let evictable = u64::from(small.engine.arena.evictable());
            assert_eq!(evictable, stats.eph.pageframes - 1, "one is closed");
            let mut page = [0; PAGE_SIZE];
            let handle = Handle::from_page(small.pool, 4);
            // A corrupt page of a cache has vanished.
            assert_eq!(small.engine.get(&mut small.queue, handle, &mut page), Ok(Got::Miss));
            let stats = small.engine.stats();
            assert_eq!((stats.pools.corrupt_gets, stats.eph.closed_pageframes), (1, 0));
            assert_eq!(u64::from(small.engine.arena.evictable()), stats.eph.pageframes);
            small.engine.flush_range(small.pool, 0, pages - 1);
            assert_eq!(small.engine.arena.evictable(), 1);
            assert_eq!(small.get(pages - 1), Ok(partly_noise(3000, pages - 1)));
        }
    }

    #[test]
    fn a_flipped_bit_in_a_raw_page_is_found() {
        let mut small = Small::new(PoolKind::Persistent);
        let noise = partly_noise(PAGE_SIZE, 7);
        small.put(9, &noise);
        assert_eq!(small.get(9), Ok(noise));
        assert_eq!(small.engine.stats().pools.huge_pages, 1);
        small.corrupt(9, 4000);
        assert_eq!(small.get(9), Err(GetError::Corrupt));
    }

    #[test]
    fn a_discard_of_a_terabyte_walks_only_what_is_there() {
        let limit = 128 << 20;
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: 4 }).unwrap();
        engine.supply().unwrap();
        let client = engine.create_client().unwrap();
        let pages = (1 << 40) / PAGE_SIZE as u64;
        let pool = engine.create_pool(client, PoolKind::Persistent, pages).unwrap();
        let mut queue = engine.queue(client);
        for at in [0, 700, pages - 1] {
            engine.put(&mut queue, Handle::from_page(pool, at), &page(1)).unwrap();
        }
        engine.flush_range(pool, 0, u64::MAX);
        let counters = engine.pool_stats(pool).unwrap();
        assert_eq!(counters.orig_data_size, 0);
        // Each object that held something was flushed as a whole, and no other was looked into.
        assert_eq!((counters.flobj_total, counters.flobj_found, counters.flush_found), (3, 3, 3));
        assert!(counters.flush_total <= 3 * u64::from(OBJECT_PAGES));
    }

    #[test]
    fn limits_and_sizes_out_of_bounds_are_refused() {
        let config = |limit, limit_max| Config { limit, limit_max, shards: 4 };
        let least = Config::limit_min(4);
        assert!(Engine::new(&config(least, least)).is_ok());
        let below = Engine::new(&config(least - 1, least));
        assert!(matches!(below, Err(ConfigError::LimitBelowReserve { .. })));
        let above = Engine::new(&config(least + 1, least));
        assert!(matches!(above, Err(ConfigError::LimitAboveMaximum { .. })));
        let engine = Engine::new(&config(least, least)).unwrap();
        let client = engine.create_client().unwrap();
        let make = |pages| engine.create_pool(client, PoolKind::Persistent, pages);
        assert!(matches!(make(0), Err(PoolError::Size { .. })));
        assert!(matches!(make(POOL_PAGES_MAX + 1), Err(PoolError::Size { .. })));
        assert!(matches!(make(1), Err(PoolError::NoRoom { .. })));
        assert!(matches!(engine.destroy_pool(PoolId(0)), Err(PoolError::NoPool)));
    }

    #[test]
    fn latencies_outlive_their_queue_and_their_client() {
        let mut small = Small::new(PoolKind::Persistent);
        let counts = |small: &Small, client| {
            let of = small.engine.client_latencies(client).put_latency.count;
            (of, small.engine.stats().latencies.put_latency.count)
        };
        let client = small.client;
        small.put(1, &page(1));
        small.queue = small.engine.queue(client);
        small.put(2, &page(2));
        drop(small.engine.queue(client));
        assert_eq!(counts(&small, client), (2, 2));

        small.engine.destroy_client(client).unwrap();
        assert_eq!(counts(&small, client), (0, 2));
        let next = small.engine.create_client().unwrap();
        assert_eq!(next, client, "a client's number is used again");
        small.pool = small.engine.create_pool(next, PoolKind::Persistent, 1024).unwrap();
        // The old client's queue still works, and counts for nobody but the engine.
        small.put(3, &page(3));
        assert_eq!(counts(&small, next), (0, 3));
        small.queue = small.engine.queue(next);
        small.put(4, &page(4));
        assert_eq!(counts(&small, next), (1, 4));
        // A queue for a client that is gone counts for no later one either.
        small.engine.destroy_client(next).unwrap();
        small.queue = small.engine.queue(next);
        assert_eq!(small.get(4), Err(GetError::NoPage));
        assert_eq!(small.engine.client_latencies(next), Latencies::default());
        assert_eq!(small.engine.stats().latencies.get_latency.count, 1);
    }

    #[test]
    fn puts_are_timed_once_they_end() {
        let limit = Config::limit_min(1) + 64 * FRAME_COST;
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: 1 }).unwrap();
        let client = engine.create_client().unwrap();
        let pool = engine.create_pool(client, PoolKind::Persistent, 1024).unwrap();
        let mut queue = engine.queue(client);
        let mut put = |at| engine.put(&mut queue, Handle { pool, object: 0, index: at }, &page(1));
        assert_eq!(put(0), Err(PutError::Starved));
        assert_eq!(put(OBJECT_PAGES), Err(PutError::NoPage));
        assert_eq!(engine.stats().latencies.put_latency.count, 0);
        while engine.supply().unwrap().more {}
        let ended = (0..OBJECT_PAGES).take_while(|&at| put(at) == Ok(())).count() as u64 + 1;
        assert_eq!(put(OBJECT_PAGES - 1), Err(PutError::Full));
        assert_eq!(engine.stats().latencies.put_latency.count, ended + 1);
    }

    /// Whatever cannot be had when a pool is made, nothing of it is left.
    #[test]
    fn a_pool_that_cannot_be_made_reserves_nothing() {
        let small = Small::new(PoolKind::Persistent);
        let before = small.engine.limit_min();
        // The first call gives back a frame for the directory, the second fails to bring it.
        crate::region::faults::after(1);
        let made = small.engine.create_pool(small.client, PoolKind::Persistent, 1024);
        assert!(matches!(made, Err(PoolError::Memory { .. })), "{made:?}");
        assert_eq!(small.engine.limit_min(), before);
        let frames = small.engine.stats().frames;
        assert_eq!(frames.frames_allocated, frames.frames_free + frames.frames_reserve);
        small.engine.create_pool(small.client, PoolKind::Persistent, 1024).unwrap();
    }

    #[test]
    fn idle_memory_is_given_back() {
        let mut small = Small::new(PoolKind::Persistent);
        (0..1024).for_each(|number| small.put(number % 60, &page(number as u8)));
        let held = small.engine.stats().frames;
        small.engine.flush_range(small.pool, 0, 1024);
        assert_eq!(small.engine.stats().frames.frames_allocated, held.frames_allocated);
        assert_eq!(small.engine.settle().unwrap().released, 0, "it was free for a moment only");
        let released = |_| small.engine.settle().unwrap().released;
        assert!((0..9).map(released).sum::<u32>() > 0);
        let left = small.engine.stats().frames;
        assert!(left.frames_allocated <= 1 + 2 * 4, "{left:?}");
    }

    #[test]
    fn where_memory_is_short_all_that_is_idle_is_given_back_at_once() {
        let mut small = Small::new(PoolKind::Persistent);
        (0..1024).for_each(|number| small.put(number % 60, &page(number as u8)));
        small.engine.flush_range(small.pool, 0, 1024);
        assert_eq!(small.engine.settle_all().unwrap().released, 0, "it was free for a moment only");
        small.engine.settle_all().unwrap();
        let left = small.engine.stats().frames;
        assert!(left.frames_allocated <= 1 + 2 * 4, "{left:?}");
        assert_eq!(small.engine.settle_all().unwrap().released, 0);
    }
}
