//! What happens to pages and frames while pools come and go and the limit moves.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, Ordering};

use tmem::{
    Config, Engine, GetError, Handle, OBJECT_PAGES, PAGE_SIZE, Page, PoolKind, PutError, Queue,
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

#[test]
fn ephemeral_pages_of_one_word_leave_like_all_others() {
    let engine = engine(1, 64, 0);
    let client = engine.create_client().unwrap();
    let cache = engine.create_pool(client, PoolKind::Ephemeral, 100 * OBJECT).unwrap();
    let swap = engine.create_pool(client, PoolKind::Persistent, OBJECT).unwrap();
    let mut queue = engine.queue();
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
    let mut queue = engine.queue();
    for page in 0..900 {
        put_patiently(&engine, &mut queue, Handle::from_page(swap, page), &raw(page + 1));
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                engine.set_limit(high).unwrap();
                while engine.stats().frames.frames_free < 2000 {
                    // Growing stops at the watermark; filling and flushing gets it further.
                    let mut queue = engine.queue();
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
        stop.store(true, Ordering::Relaxed);
    });
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
        let mut queue = engine.queue();
        put_patiently(&engine, &mut queue, Handle::from_page(pool, round), &raw(round));
        let destroyed: usize = std::thread::scope(|scope| {
            let destroy = || usize::from(engine.destroy_pool(pool).is_ok());
            let threads = [scope.spawn(destroy), scope.spawn(destroy)];
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(destroyed, 1);
    }
    assert_eq!(engine.stats().frames.frames_persistent, 0);
    engine.destroy_client(client).unwrap();
    assert!(engine.create_pool(client, PoolKind::Persistent, OBJECT).is_err());
}

/// At a limit with no room at all, a page whose rewrite fails is lost, and one whose rewrite fits
/// into its own old room is not.
#[test]
fn a_rewrite_in_a_full_pool_takes_the_old_copys_room() {
    let engine = engine(1, 8, 0);
    let client = engine.create_client().unwrap();
    let swap = engine.create_pool(client, PoolKind::Persistent, OBJECT).unwrap();
    let mut queue = engine.queue();
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
