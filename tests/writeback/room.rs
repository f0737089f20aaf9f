//! How much the file holds, and what is known of it in memory: what is full, and what only waits.

use tmem::{BACKING_BYTES_MIN, ConfigError, Handle, JobFailed, PutError};

use crate::contents::Contents;
use crate::sim::*;
use crate::{runs, total};

/// Nothing else than writes, of a log of which nine tenths are alive.
#[test]
fn a_file_filled_to_nine_tenths_is_rewritten_ten_times_over() {
    let bytes = 8 * BACKING_BYTES_MIN;
    // One a block, and what is in memory besides.
    let pages = bytes / BLOCK;
    let profile = Profile { pages, frames: 800, shards: 1, encrypts: false, ..CALM };
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
    let log = |sim: &Sim| sim.engine.stats().log;
    let mut filled = 0;
    while log(&sim).log_live_bytes < bytes / 10 * 9 {
        put(&mut sim, filled);
        filled += 1;
    }
    let before = log(&sim);
    while log(&sim).log_written_bytes - before.log_written_bytes < 10 * bytes {
        let page = sim.rng.below(filled);
        put(&mut sim, page);
    }
    let after = log(&sim);
    let written = after.log_written_bytes - before.log_written_bytes;
    let cleaned = after.log_cleaner_written_bytes - before.log_cleaner_written_bytes;
    let amplification = 1.0 + cleaned as f64 / written as f64;
    let alive = [before, after].map(|log| log.log_live_bytes as f64 / bytes as f64);
    println!("write amplification {amplification:.2}, {alive:.3?} of the file alive");
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
    // So large a pool has units of a quarter of a segment.
    let profile = Profile { frames: 34_000, pages: 40_000, shards: 1, ..CALM };
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
    let profile = Profile { pages: 8000, raw: 97, steps: 60_000, ..CALM };
    let stats = runs(profile, 3);
    assert!(total(&stats, |stats| stats.pools.failed_puts) > 100);
}
