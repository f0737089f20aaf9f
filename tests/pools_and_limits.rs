//! What happens to pages and frames while pools come and go and the limit moves.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, Ordering};

use tmem::{
    Config, Engine, GetError, Got, Handle, OBJECT_PAGES, PAGE_SIZE, Page, PoolError, PoolKind,
    PutError, Queue,
};

/// Bytes of a frame with its entry in the frame table.
const FRAME_COST: u64 = PAGE_SIZE as u64 + 32;
const OBJECT: u64 = OBJECT_PAGES as u64;

fn engine(shards: usize, frames: u64, limit_max: u64) -> Engine {
    // Two pools' directories of a page or two each are part of the limit.
    let limit = Config::limit_min(shards) + frames * FRAME_COST + 4 * PAGE_SIZE as u64;
    Engine::new(&Config { limit, limit_max: limit_max.max(limit), shards }).unwrap()
}

fn raw(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut state = seed | 1;
    for byte in &mut page {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        *byte = (state >> 56) as u8;
    }
    page
}

fn put_patiently(engine: &Engine, queue: &mut Queue, handle: Handle, page: &Page) {
    while engine.put(queue, handle, page) == Err(PutError::Starved) {
        engine.supply().unwrap();
    }
}

/// Ends a thread's loop however the test ends: a scope waits for its threads, and a test that fails
/// must not hang.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn ephemeral_pages_of_one_word_leave_like_all_others() {
    let engine = engine(1, 64, 0);
    let client = engine.create_client().unwrap();
    let cache = engine.create_pool(client, PoolKind::Ephemeral, 100 * OBJECT).unwrap();
    let swap = engine.create_pool(client, PoolKind::Persistent, OBJECT).unwrap();
    let mut queue = engine.queue(client);
    // Each in an object of its own, so that each takes a frame for slot words.
    for object in 0..100 {
        let handle = Handle::from_page(cache, object * OBJECT);
        put_patiently(&engine, &mut queue, handle, &[7; PAGE_SIZE]);
    }
    for page in 0..40 {
        let handle = Handle::from_page(swap, page);
        assert_eq!(engine.put(&mut queue, handle, &raw(page)), Ok(()), "page {page}");
    }
    let handle = Handle::from_page(cache, 99 * OBJECT);
    let mut page = [0; PAGE_SIZE];
    if engine.get(&mut queue, handle, &mut page) == Ok(tmem::Got::Hit) {
        assert_eq!(page, [7; PAGE_SIZE]);
    }
}

/// Frames on their way back to the system are neither free nor in use: a put that comes meanwhile
/// may have to wait, but the pool is not full.
#[test]
fn a_shrinking_arena_is_not_a_full_one() {
    let (low, high) = (1000, 4000);
    let engine = engine(1, high, 0);
    let limit = |frames: u64| engine.limit() - (high - frames) * FRAME_COST;
    let (low, high) = (limit(low), limit(high));
    let client = engine.create_client().unwrap();
    let swap = engine.create_pool(client, PoolKind::Persistent, 16 * OBJECT).unwrap();
    let mut queue = engine.queue(client);
    for page in 0..900 {
        put_patiently(&engine, &mut queue, Handle::from_page(swap, page), &raw(page + 1));
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                engine.set_limit(high).unwrap();
                while engine.stats().frames.frames_free < 2000 {
                    // Growing stops at the watermark; filling and flushing gets it further.
                    let mut queue = engine.queue(client);
                    for page in 2000..4500 {
                        put_patiently(
                            &engine,
                            &mut queue,
                            Handle::from_page(swap, page),
                            &raw(page),
                        );
                    }
                    engine.flush_range(swap, 2000, 2500);
                }
                engine.set_limit(low).unwrap();
                while engine.supply().unwrap().more {}
            }
        });
        let page = raw(99);
        let handle = Handle::from_page(swap, 5);
        for _ in 0..200_000 {
            // The other thread's pages are gone whenever the limit is the lower one.
            let put = engine.put(&mut queue, handle, &page);
            assert!(matches!(put, Ok(()) | Err(PutError::Starved)), "{put:?}");
        }
    });
}

/// What a limit that was lowered cannot be held to at once, it is held to as pages leave.
#[test]
fn a_lowered_limit_takes_effect_as_pages_leave() {
    for kind in [PoolKind::Persistent, PoolKind::Ephemeral] {
        let (low, high) = (300, 2000);
        let engine = engine(2, high, 0);
        let client = engine.create_client().unwrap();
        let pool = engine.create_pool(client, kind, 8 * OBJECT).unwrap();
        let mut queue = engine.queue(client);
        for page in 0..1500 {
            put_patiently(&engine, &mut queue, Handle::from_page(pool, page), &raw(page + 1));
        }
        // The frame table does not shrink.
        let table = engine.stats().frames.frames_allocated * 32;
        let limit = engine.limit() - (high - low) * FRAME_COST;
        engine.set_limit(limit).unwrap();
        while engine.supply().unwrap().more {}
        if kind == PoolKind::Persistent {
            let used = engine.stats().mem_used_total;
            assert!(used > limit + 1000 * PAGE_SIZE as u64, "{used} {limit}");
            assert!(!engine.supply_wanted(), "nothing can be given back yet");
            engine.flush_range(pool, 200, u64::MAX);
            assert!(engine.supply_wanted(), "frames wait to be given back");
            while engine.supply().unwrap().more {}
            let mut page = [0; PAGE_SIZE];
            for at in 0..200 {
                let handle = Handle::from_page(pool, at);
                assert_eq!(engine.get(&mut queue, handle, &mut page), Ok(Got::Hit));
                assert!(page == raw(at + 1), "page {at}");
            }
        }
        let used = engine.stats().mem_used_total;
        assert!(used <= limit + table, "{kind:?}: {used} bytes used, the limit is {limit}");
        assert!(!engine.supply_wanted());
    }
}

/// A new pool's directory comes out of what the limit leaves, never out of pages that are there.
#[test]
fn a_new_pool_takes_no_room_from_pages_that_are_there() {
    let engine = engine(1, 2000, 0);
    let client = engine.create_client().unwrap();
    let create = |kind, pages| engine.create_pool(client, kind, pages);
    let swap = create(PoolKind::Persistent, 8 * OBJECT).unwrap();
    let cache = create(PoolKind::Ephemeral, 8 * OBJECT).unwrap();
    let mut queue = engine.queue(client);
    for pool in [swap, cache] {
        for page in 0..1200 {
            put_patiently(&engine, &mut queue, Handle::from_page(pool, page), &raw(page + 1));
        }
    }
    // A directory of so many frames.
    let directory = |frames: u64| frames * PAGE_SIZE as u64 / 80 * OBJECT;
    let huge = create(PoolKind::Persistent, directory(1000));
    assert!(matches!(huge, Err(PoolError::NoRoom { .. })), "{huge:?}");
    let large = create(PoolKind::Persistent, directory(500)).unwrap();
    let table = engine.stats().frames.frames_allocated * 32;
    assert!(engine.stats().mem_used_total <= engine.limit() + table);
    for page in 0..1200 {
        let handle = Handle::from_page(swap, page);
        assert_eq!(engine.put(&mut queue, handle, &raw(page + 5)), Ok(()), "page {page}");
    }
    engine.destroy_pool(large).unwrap();
    let huge = create(PoolKind::Persistent, directory(1000));
    assert!(matches!(huge, Err(PoolError::NoRoom { .. })), "{huge:?}");
    create(PoolKind::Persistent, directory(700)).expect("a refusal reserves nothing");
}

/// Puts into a pool that is being destroyed end, one way or the other, and leave nothing.
#[test]
fn a_pool_goes_while_pages_come() {
    let engine = engine(4, 5000, 0);
    let client = engine.create_client().unwrap();
    for round in 0..100 {
        let pool = engine.create_pool(client, PoolKind::Persistent, 8 * OBJECT).unwrap();
        let started = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (engine, started) = (&engine, &started);
                scope.spawn(move || {
                    let mut queue = engine.queue(client);
                    for page in (thread..).step_by(2) {
                        let handle = Handle::from_page(pool, page * 37 % (8 * OBJECT));
                        match engine.put(&mut queue, handle, &raw(page + 1)) {
                            Ok(()) => started.store(true, Ordering::Release),
                            Err(PutError::Starved) => drop(engine.supply().unwrap()),
                            Err(PutError::NoPage) => break,
                            Err(error) => panic!("round {round}: {error}"),
                        }
                    }
                });
            }
            while !started.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            engine.destroy_pool(pool).unwrap();
        });
        let frames = engine.stats().frames;
        assert_eq!(frames.frames_persistent, 0, "round {round}: {frames:?}");
        assert_eq!(frames.frames_allocated, frames.frames_free + frames.frames_reserve);
    }
}

#[test]
fn the_limit_in_force_can_be_set_again() {
    let limit = Config::limit_min(1) + 2 * PAGE_SIZE as u64;
    let engine = Engine::new(&Config { limit, limit_max: limit, shards: 1 }).unwrap();
    let client = engine.create_client().unwrap();
    engine.create_pool(client, PoolKind::Persistent, OBJECT).unwrap();
    assert!(engine.limit() >= engine.limit_min());
    engine.set_limit(engine.limit()).unwrap();
}

#[test]
fn a_pool_is_destroyed_once_however_many_try() {
    let engine = engine(4, 2000, 0);
    let client = engine.create_client().unwrap();
    for round in 0..200 {
        let pool = engine.create_pool(client, PoolKind::Persistent, 8 * OBJECT).unwrap();
        let mut queue = engine.queue(client);
        put_patiently(&engine, &mut queue, Handle::from_page(pool, round), &raw(round));
        let destroyed: usize = std::thread::scope(|scope| {
            let destroy = || usize::from(engine.destroy_pool(pool).is_ok());
            let threads = [scope.spawn(destroy), scope.spawn(destroy)];
            // What was counted for the pool is in the sum before, meanwhile and afterwards.
            while !threads.iter().all(|thread| thread.is_finished()) {
                assert_eq!(engine.stats().pools.succ_puts, round + 1);
            }
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(destroyed, 1);
        assert_eq!(engine.stats().pools.succ_puts, round + 1);
    }
    let stats = engine.stats();
    assert_eq!(stats.frames.frames_persistent, 0);
    let held = [stats.pools.orig_data_size, stats.pools.zpages, stats.pools.obj_count];
    assert_eq!(held, [0; 3]);
    engine.destroy_client(client).unwrap();
    assert!(engine.create_pool(client, PoolKind::Persistent, OBJECT).is_err());
}

/// A page that is lost while its pool goes leaves nothing behind.
#[test]
fn a_pool_may_go_while_its_pages_are_given_up() {
    let engine = engine(2, 200, 0);
    let client = engine.create_client().unwrap();
    for _ in 0..200 {
        let pool = engine.create_pool(client, PoolKind::Persistent, OBJECT).unwrap();
        let given_up = || engine.pool_stats(pool).map(|counters| counters.given_up_puts);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _stop = StopOnDrop(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    (0..1000).for_each(|_| engine.lose(Handle::from_page(pool, 7)));
                }
            });
            while given_up() == Some(0) {}
            engine.destroy_pool(pool).unwrap();
        });
    }
    let pools = engine.stats().pools;
    assert_eq!(pools.lost_pages, 0);
    assert!(pools.given_up_puts >= 200, "{pools:?}");
}

/// At a limit with no room at all, a page whose rewrite fails is lost, and one whose rewrite fits
/// into its own old room is not.
#[test]
fn a_rewrite_in_a_full_pool_takes_the_old_copys_room() {
    let engine = engine(1, 8, 0);
    let client = engine.create_client().unwrap();
    let swap = engine.create_pool(client, PoolKind::Persistent, OBJECT).unwrap();
    let mut queue = engine.queue(client);
    let handle = |page| Handle::from_page(swap, page);
    let mut stored = 0;
    loop {
        match engine.put(&mut queue, handle(stored), &raw(stored + 1)) {
            Ok(()) => stored += 1,
            Err(PutError::Starved) => drop(engine.supply().unwrap()),
            Err(PutError::Full) => break,
            Err(error) => panic!("{error}"),
        }
    }
    let mut page = [0; PAGE_SIZE];
    assert_eq!(engine.get(&mut queue, handle(stored), &mut page), Err(GetError::Lost));
    assert_eq!(engine.put(&mut queue, handle(2), &raw(1000)), Ok(()));
    engine.get(&mut queue, handle(2), &mut page).unwrap();
    assert_eq!(page, raw(1000));
    assert_eq!(engine.stats().pools.lost_pages, 1);
    engine.flush_page(handle(0));
    assert_eq!(engine.put(&mut queue, handle(stored), &raw(5)), Ok(()));
    assert_eq!(engine.stats().pools.lost_pages, 0);
}
