//! Writeback against a plain map, with a file that fails in every way a file can.
//!
//! One thread does it all, step by step, as a random number says: puts, gets, flushes and updates of pages
//! many times what memory holds; starts of what writeback wants done, and their ends, in any order, done,
//! done by half, or not; reads that see the file as it was some time ago; bits that flip. So reclaim,
//! writing, reading back and cleaning meet in every order, and each run is the same for the same seed.
//! `TMEM_SEED` replays one, `TMEM_STEPS` makes runs longer.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../support/backing.rs"]
mod backing;
#[path = "../support/contents.rs"]
mod contents;
mod flight;
mod policy;
mod room;
mod sim;

use sim::{CALM, Profile, Sim};
use tmem::Stats;

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
