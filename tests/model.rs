//! The engine against a plain map.
//!
//! Small pools and few frames, so that every way a frame is found, and every way it is not, happens
//! in every run: partner, free frame, compaction, Ouroboros in the own shard and in another one,
//! full, starved, growing, giving back, a limit set up and down. After each step the page touched is
//! compared with the map, frames are conserved, and the figures are those that the map implies; at
//! the end everything is flushed and nothing is left.
//!
//! A failure prints the steps that lead to it, shrunk, and `PROPTEST_RNG_SEED` replays a run.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

mod support;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use support::{Contents, Model, Step};

/// Handles are few and close together, so that steps meet.
fn step() -> impl Strategy<Value = Step> {
    let pool = 0..support::POOLS;
    let page = 0..support::PAGES;
    let contents = prop_oneof![
        6 => (any::<u32>(), 0usize..4000).prop_map(|(seed, noise)| Contents::Mixed { seed, noise }),
        1 => any::<u32>().prop_map(Contents::Same),
        2 => any::<u32>().prop_map(Contents::Random),
    ];
    prop_oneof![
        12 => (pool.clone(), page.clone(), contents)
            .prop_map(|(pool, page, contents)| Step::Put { pool, page, contents }),
        6 => (pool.clone(), page.clone()).prop_map(|(pool, page)| Step::Get { pool, page }),
        2 => (pool.clone(), page.clone()).prop_map(|(pool, page)| Step::FlushPage { pool, page }),
        1 => (pool.clone(), 0..support::OBJECTS)
            .prop_map(|(pool, object)| Step::FlushObject { pool, object }),
        1 => (pool.clone(), page.clone(), 1..support::PAGES)
            .prop_map(|(pool, first, count)| Step::FlushRange { pool, first, count }),
        1 => (pool.clone(), page.clone()).prop_map(|(pool, page)| Step::Lose { pool, page }),
        4 => (pool.clone(), page, 0..support::PAGE_BYTES, 1..=support::PAGE_BYTES, 0u8..3)
            .prop_map(|(pool, page, first, count, fill)| {
                Step::Update { pool, page, first, count, fill }
            }),
        1 => pool.prop_map(|pool| Step::Remake { pool }),
        2 => Just(Step::Supply),
        1 => Just(Step::Settle),
        1 => (0u64..24).prop_map(|frames| Step::SetLimit { frames }),
    ]
}

fn config(cases: u32) -> ProptestConfig {
    let cases = if cfg!(miri) { 1 } else { cases };
    let failure_persistence = None;
    ProptestConfig { cases, failure_persistence, max_shrink_iters: 2000, ..Default::default() }
}

fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..if cfg!(miri) { 12 } else { most })
}

proptest! {
    #![proptest_config(config(200))]

    #[test]
    fn one_shard_is_a_map(steps in steps(400)) {
        Model::new(1, 10).run(&steps);
    }

    #[test]
    fn four_shards_are_a_map(steps in steps(400)) {
        Model::new(4, 16).run(&steps);
    }
}

proptest! {
    #![proptest_config(config(8))]

    #[test]
    fn long_runs_are_a_map(steps in steps(10_000)) {
        Model::new(2, 24).run(&steps);
    }
}

/// The random steps are worth something only if they lead everywhere.
#[test]
#[cfg_attr(miri, ignore = "too long for Miri, and the other tests' paths are these")]
fn every_path_runs() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let steps = prop::collection::vec(step(), 20_000).new_tree(&mut runner).unwrap().current();
    let stats = Model::new(4, 16).run(&steps);
    let paths = [
        ("replaced", stats.pools.dup_puts_replaced),
        ("refused", stats.pools.failed_puts),
        ("starved", stats.pools.starved_puts),
        ("given up", stats.pools.given_up_puts),
        ("lost gets", stats.pools.lost_gets),
        ("missed", stats.pools.missed_gets),
        ("beside a partner", stats.alloc.partner_puts),
        ("raw", stats.alloc.compress_poor),
        ("ephemeral ate its tail", stats.alloc.eph_ate_tail),
        ("persistent ate ephemeral", stats.alloc.pers_ate_eph),
        ("ephemeral evicted", stats.eph.evicted_zpages),
        ("compacted", stats.pers.compacted_pageframes + stats.eph.compacted_pageframes),
    ];
    for (path, count) in paths {
        assert!(count > 10, "{path}: {count} times in {} steps", steps.len());
    }
}
