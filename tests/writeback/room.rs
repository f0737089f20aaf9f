//! How much the file holds, and what is known of it in memory: what is full, and what only waits.

use tmem::{
    BACKING_BYTES_MIN, ConfigError, Handle, Health, JobFailed, PutError, WritebackSettings,
};

use crate::backing::carry_out;
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

/// Does all that is to be done at the moment; a read of what is to be cleaned may fail.
fn work(sim: &mut Sim, reads_fail: bool) {
    loop {
        sim.start_job();
        let Some(job) = sim.file.under_way.pop() else { break };
        let fails = reads_fail && !job.is_write;
        carry_out(&sim.writeback, job, &mut sim.file.bytes, if fails { 0 } else { job.bytes });
        let result = if fails { Err(JobFailed) } else { Ok(()) };
        sim.writeback.ended(&sim.engine, job.unit, result, sim.now);
    }
}

/// Rewrites pages at random, so many times at most; how often until one was refused.
fn rewrite(sim: &mut Sim, pages: u64, times: u64, reads_fail: bool) -> u64 {
    for time in 0..times {
        let page = sim.rng.below(pages);
        let seed = sim.rng.next() as u32;
        if !put_by_working(sim, page, Contents::Random(seed), reads_fail) {
            return time;
        }
    }
    times
}

/// Puts a page, with whatever has to be done for it; false if it is refused.
fn put_by_working(sim: &mut Sim, page: u64, contents: Contents, reads_fail: bool) -> bool {
    let contents = contents.page();
    let handle = Handle::from_page(sim.pool, page);
    let mut put = sim.engine.put(&mut sim.queue, handle, &contents);
    for _ in 0..100 {
        if put != Err(PutError::Starved) {
            break;
        }
        sim.engine.supply().unwrap();
        work(sim, reads_fail);
        sim.now += 1_000_000;
        put = sim.engine.put(&mut sim.queue, handle, &contents);
    }
    let held = if put.is_ok() { Held::Page(Box::new(contents)) } else { Held::Lost };
    sim.map.insert(page, held);
    put.is_ok()
}

/// Who cannot write yet has nobody wait.
#[test]
fn a_put_does_not_wait_for_what_stands_still() {
    let mut sim = half_full();
    let free = sim.engine.stats().frames.frames_free;
    let full = |sim: &mut Sim, page: u64| {
        let contents = Contents::Random(page as u32).page();
        sim.engine.supply().unwrap();
        sim.engine.put(&mut sim.queue, Handle::from_page(sim.pool, page), &contents)
    };
    let mut page = 200;
    while full(&mut sim, page).is_ok() {
        let held = Held::Page(Box::new(Contents::Random(page as u32).page()));
        sim.map.insert(page, held);
        page += 1;
    }
    assert!(page > 200 + free / 2, "{page}");
    assert_eq!(full(&mut sim, page), Err(PutError::Starved));
    sim.writeback.stand_still(&sim.engine);
    assert_eq!(full(&mut sim, page), Err(PutError::Full));
    sim.map.insert(page, Held::Lost);
    // Until it goes on.
    work(&mut sim, false);
    assert!(put_when_there_is_room(&mut sim, page + 1, 0));
    sim.end();
}

/// Pages that compress, of all sizes: blocks are not full when they are written, and cleaning packs them anew.
#[test]
fn a_file_of_pages_that_compress_is_rewritten_as_well() {
    let bytes = 8 * BACKING_BYTES_MIN;
    let profile = Profile { pages: 60_000, frames: 800, shards: 1, encrypts: false, ..CALM };
    let mut sim = Sim::with_file(profile, 1, bytes);
    let contents = |sim: &mut Sim| {
        let (seed, noise) = (sim.rng.next() as u32, 200 + sim.rng.below(2600) as usize);
        Contents::Mixed { seed, noise }
    };
    // Two a block leave more of it empty.
    let tenths = if cfg!(feature = "seed-zbud") { 5 } else { 7 };
    let mut filled = 0;
    while sim.engine.stats().log.log_live_bytes < bytes / 10 * tenths {
        let contents = contents(&mut sim);
        assert!(put_by_working(&mut sim, filled, contents, false), "page {filled}");
        filled += 1;
    }
    let before = sim.engine.stats().log;
    while sim.engine.stats().log.log_written_bytes - before.log_written_bytes < 4 * bytes {
        let (page, contents) = (sim.rng.below(filled), contents(&mut sim));
        assert!(put_by_working(&mut sim, page, contents, false), "page {page}");
    }
    let after = sim.engine.stats().log;
    let cleaned = after.log_cleaner_written_bytes - before.log_cleaner_written_bytes;
    let amplification = 1.0 + cleaned as f64 / (4 * bytes) as f64;
    println!("write amplification {amplification:.2}");
    assert!((1.05..4.0).contains(&amplification), "{amplification}");
    sim.end();
}

/// While it cannot be read, nothing makes room; and when it can be, all of it is cleaned as before.
#[test]
fn a_full_file_that_could_not_be_read_for_a_while_has_room_afterwards() {
    let bytes = 8 * BACKING_BYTES_MIN;
    let profile = Profile { pages: bytes / BLOCK, frames: 800, shards: 1, encrypts: false, ..CALM };
    let mut sim = Sim::with_file(profile, 1, bytes);
    let mut filled = 0;
    while sim.engine.stats().log.log_live_bytes < bytes / 10 * 8 {
        assert!(put_when_there_is_room(&mut sim, filled, 0), "page {filled}");
        filled += 1;
    }
    assert_eq!(rewrite(&mut sim, filled, 2000, false), 2000);
    let before = sim.engine.stats().log;
    for _ in 0..3 {
        assert!(rewrite(&mut sim, filled, 20_000, true) < 20_000);
    }
    let failed = sim.engine.stats().log.log_failed_jobs - before.log_failed_jobs;
    assert!((1..400).contains(&failed), "{failed} reads were tried, all in vain");
    assert_eq!(sim.writeback.health(), Health::FailingReads);
    // When no more may be written nobody waits, whatever fails besides.
    let written = before.log_written_bytes;
    assert!(written > 64 << 20, "{written}");
    let settings = WritebackSettings { bytes_per_day: Some(64 << 20), ..Default::default() };
    sim.engine.set_writeback_settings(&settings).unwrap();
    work(&mut sim, true);
    assert_eq!(sim.writeback.health(), Health::Spent);
    assert!(!sim.engine.writeback_wanted());
    sim.engine.set_writeback_settings(&WritebackSettings::default()).unwrap();
    // As long as it can rest after a failure.
    sim.now += 30 * SECOND;
    work(&mut sim, false);
    let segments = bytes / BLOCK * 2;
    assert_eq!(rewrite(&mut sim, filled, segments, false), segments);
    assert_eq!(sim.writeback.health(), Health::Good);
    let cleaned = sim.engine.stats().log.log_cleaned_segments - before.log_cleaned_segments;
    assert!(cleaned > 2 * before.log_segments, "{cleaned} of {}", before.log_segments);
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
