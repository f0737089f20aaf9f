//! When frames go to the file, and how many.

use tmem::{
    BACKING_BYTES_MIN, Got, Handle, Image, Opened, PAGE_SIZE, PoolKind, PutError, WritebackSettings,
};

use crate::contents::Contents;
use crate::sim::*;

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
    // Those that were used are so old from when that was.
    assert_eq!(pass(&mut sim, 30), 0);
    assert_eq!(pass(&mut sim, 20), 50 * BLOCK);
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
