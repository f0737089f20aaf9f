//! Attaching: how long a new process takes to go on from the memory of one that has died.
//!
//! A pool is filled with the page set, over and over, and churned a little; then it is attached again
//! and again by this same process, as another would. Preparing is what a process does that waits for
//! another's death; attaching is what its devices wait for.

use std::time::Instant;

use anyhow::{Context, Result};
use tmem::{Config, Engine, Handle, Page, PoolKind, Prepared, PutError, Store};

use crate::contenders::shards;
use crate::numbers::Random;
use crate::report::note;
use crate::samples::{ATTACH_TIME, Line, PREPARE_TIME};

/// One in so many places is flushed, so that there are holes.
const FLUSHED: u64 = 8;

pub fn run(pages: &[Page], rounds: usize, gib: u64) -> Result<Vec<Line>> {
    let engine = filled(pages, gib << 30)?;
    let stats = engine.stats();
    note(format!(
        "{} frames of memory, {} pages in them",
        stats.frames.frames_allocated, stats.pools.zpages
    ));
    let (case, per_gib) = (format!("attach-{gib}-gib"), gib as f64 / 1000.0);
    let mut lines = Vec::new();
    for _ in 0..rounds {
        let store = Store::from_file(engine.store().file().try_clone_to_owned()?)?;
        let start = Instant::now();
        let prepared = Prepared::new(store)?;
        let prepare = start.elapsed();
        let start = Instant::now();
        let attached = prepared.attach()?;
        let attach = start.elapsed();
        let found = attached.recovered;
        anyhow::ensure!(found.damaged == 0, "{} pages were not found", found.damaged);
        note(format!("prepared in {prepare:.2?}, attached in {attach:.2?}: {} pages", found.pages));
        lines.push(PREPARE_TIME.line(&case, "tmem", prepare.as_secs_f64() / per_gib));
        lines.push(ATTACH_TIME.line(&case, "tmem", attach.as_secs_f64() / per_gib));
    }
    Ok(lines)
}

/// An engine whose pool is full.
fn filled(pages: &[Page], limit: u64) -> Result<Engine> {
    let engine = Engine::new(&Config { limit, limit_max: limit, shards: shards() })?;
    let client = engine.create_client()?;
    // More than fit, whatever they are.
    let places = limit / 512;
    let pool = engine.create_pool(client, PoolKind::Persistent, places)?;
    let mut queue = engine.queue(client);
    let mut random = Random::new(1);
    for (place, page) in (0..places).zip(pages.iter().cycle()) {
        while engine.supply_wanted() && engine.supply().context("memory for the pool")?.grown > 0 {}
        match engine.put(&mut queue, Handle::from_page(pool, place), page) {
            Err(PutError::Full) => break,
            put => put?,
        }
        if random.below(FLUSHED as usize) == 0 {
            engine.flush_page(Handle::from_page(pool, random.below(place as usize + 1) as u64));
        }
    }
    Ok(engine)
}
