//! Density: the memory that the engine takes for a page set, against kernel zram's.
//!
//! Both get the same pages at the same places in the same order: first all of them, then rounds in
//! which half of all places, chosen at random, are overwritten by another page of the set or freed,
//! and at last new pages for all places that are empty.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tmem::{Config, Engine, Got, Handle, PAGE_SIZE, Page, PoolId, PoolKind, PutError, Queue};

use crate::bare::{HEADER_BYTES, Payloads, is_compressible, is_same_filled};
use crate::numbers::Random;
use crate::report::{Table, cell, mib, note};
use crate::zram::Zram;

/// Shards: as many as the daemon has for two queues.
const SHARDS: usize = 2;

const ROUNDS: usize = 10;

/// What both stores hold, and what they take for it, at one point.
#[derive(Serialize)]
pub struct Point {
    pub name: &'static str,
    pub pages: u64,
    pub engine: Parts,
    /// None without a zram device.
    pub zram: Option<ZramUse>,
}

/// Where the engine's bytes go.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Parts {
    /// Compressed data, and pages that do not compress.
    pub payload: u64,
    /// Headers of zpages.
    pub headers: u64,
    /// What rounding up to granules adds.
    pub rounding: u64,
    /// Free space in frames with zpages.
    pub holes: u64,
    /// Frames with slot words.
    pub leaves: u64,
    /// Frames that the shards keep for compacting.
    pub spares: u64,
    /// Frame table, directory and shards.
    pub tables: u64,
    /// All of the above.
    pub in_use: u64,
    /// Frames that wait for puts.
    pub free: u64,
    /// As the engine reports it: all of the above.
    pub mem_used_total: u64,
}

/// What zram takes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ZramUse {
    /// `mem_used_total` of `mm_stat`.
    pub mem_used: u64,
    /// The same after zsmalloc was told to compact.
    pub compacted: u64,
    /// Its table, which is in neither.
    pub table: u64,
}

/// One change to a store.
#[derive(Clone, Copy)]
enum Change {
    /// Puts a page of the set to a place.
    Put { place: usize, content: usize },
    /// Frees a place.
    Free { place: usize },
}

/// Runs the comparison. The zram side is left out, with a word why, where it is not to be had.
pub fn run(pages: &[Page], limit: u64) -> Result<Vec<Point>> {
    let payloads = Payloads::of(pages)?;
    let mut zram = match Zram::new(pages.len() as u64) {
        Ok(zram) => Some(zram),
        Err(error) => {
            note(format!("no comparison with kernel zram: {error:#}"));
            None
        }
    };
    let mut store = Store::new(pages.len(), limit)?;
    let mut places = vec![None; pages.len()];
    let mut points = Vec::new();
    for (name, changes) in script(pages.len()) {
        for change in changes {
            let (place, content) = match change {
                Change::Put { place, content } => (place, Some(content)),
                Change::Free { place } => (place, None),
            };
            places[place] = content;
            store.change(place, content.map(|content| &pages[content]))?;
            let Some(zram) = &mut zram else { continue };
            match content {
                Some(content) => zram.write(place as u64, &pages[content]),
                None => zram.discard(place as u64),
            }
            .context("writing to zram")?;
        }
        check(&mut store, zram.as_mut(), pages, &places)?;
        let engine = store.parts(pages, &payloads, &places)?;
        let held = places.iter().flatten().count() as u64;
        let zram = zram.as_ref().map(zram_use).transpose()?;
        points.push(Point { name, pages: held, engine, zram });
    }
    Ok(points)
}

/// Prints the points as tables.
pub fn print(points: &[Point]) {
    let names: Vec<_> = std::iter::once("MiB").chain(points.iter().map(|p| p.name)).collect();
    let mut table = Table::new("memory of the engine", &names);
    table.row("pages held", points.iter().map(|point| point.pages.to_string()));
    let mut add = |name, part: fn(&Parts) -> u64| {
        table.row(name, points.iter().map(|point| mib(part(&point.engine))));
    };
    add("payload", |parts| parts.payload);
    add("headers", |parts| parts.headers);
    add("rounding to granules", |parts| parts.rounding);
    add("holes in frames", |parts| parts.holes);
    add("slot words", |parts| parts.leaves);
    add("shards' spare frames", |parts| parts.spares);
    add("tables", |parts| parts.tables);
    add("in use", |parts| parts.in_use);
    add("free frames in reserve", |parts| parts.free);
    add("mem_used_total", |parts| parts.mem_used_total);
    table.print();

    let mut table = Table::new("memory of kernel zram, and the engine as a multiple of it", &names);
    let mut add = |name, figure: fn(&ZramUse) -> u64| {
        let zram = |point: &Point| point.zram.as_ref().map(figure);
        table.row(name, points.iter().map(|point| mib(zram(point))));
        for (part, bytes) in [
            ("  engine in use", (|parts| parts.in_use) as fn(&Parts) -> u64),
            ("  engine in all", |parts| parts.mem_used_total),
        ] {
            let ratio =
                |point: &Point| zram(point).map(|zram| bytes(&point.engine) as f64 / zram as f64);
            table.row(part, points.iter().map(|point| cell(ratio(point), 3)));
        }
    };
    add("mm_stat mem_used_total", |zram| zram.mem_used);
    add("with its table", |zram| zram.mem_used + zram.table);
    add("compacted, with its table", |zram| zram.compacted + zram.table);
    table.print();
}

/// The points, and the changes that lead to each from the one before.
fn script(count: usize) -> Vec<(&'static str, Vec<Change>)> {
    let mut random = Random::new(7);
    let mut held = vec![true; count];
    let fresh = (0..count).map(|at| Change::Put { place: at, content: at }).collect();
    let mut churn = Vec::new();
    for _ in 0..ROUNDS {
        for place in random.permutation(count).into_iter().take(count / 2) {
            held[place] = random.below(2) == 0;
            churn.push(match held[place] {
                true => Change::Put { place, content: random.below(count) },
                false => Change::Free { place },
            });
        }
    }
    let mut filled = Vec::new();
    for place in random.permutation(count) {
        if !held[place] {
            filled.push(Change::Put { place, content: random.below(count) });
        }
    }
    vec![("fresh", fresh), ("after churn", churn), ("filled again", filled)]
}

fn check(
    store: &mut Store,
    mut zram: Option<&mut Zram>,
    pages: &[Page],
    places: &[Option<usize>],
) -> Result<()> {
    let mut page = [0; PAGE_SIZE];
    for (place, content) in places.iter().enumerate() {
        let found = store.get(place, &mut page)?;
        if found != content.is_some() || content.is_some_and(|content| page != pages[content]) {
            bail!("the engine does not hold page {place} as it was put");
        }
        if let (Some(zram), Some(content)) = (zram.as_mut(), content) {
            zram.read(place as u64, &mut page)?;
            if page != pages[*content] {
                bail!("zram does not hold page {place} as it was written");
            }
        }
    }
    Ok(())
}

fn zram_use(zram: &Zram) -> Result<ZramUse> {
    let mem_used = zram.mem_used()?;
    zram.compact()?;
    Ok(ZramUse { mem_used, compacted: zram.mem_used()?, table: zram.table_bytes() })
}

/// The engine with one pool.
struct Store {
    engine: Engine,
    queue: Queue,
    pool: PoolId,
}

impl Store {
    fn new(pages: usize, limit: u64) -> Result<Self> {
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: SHARDS })?;
        let client = engine.create_client()?;
        let pool = engine.create_pool(client, PoolKind::Persistent, pages as u64)?;
        let store = Self { queue: engine.queue(client), engine, pool };
        store.supply()?;
        Ok(store)
    }

    fn change(&mut self, place: usize, page: Option<&Page>) -> Result<()> {
        let handle = Handle::from_page(self.pool, place as u64);
        let Some(page) = page else {
            self.engine.flush_page(handle);
            return Ok(());
        };
        if self.engine.supply_wanted() {
            self.supply()?;
        }
        let mut result = self.engine.put(&mut self.queue, handle, page);
        if result == Err(PutError::Starved) {
            self.supply()?;
            result = self.engine.put(&mut self.queue, handle, page);
        }
        result.context("putting a page")
    }

    fn get(&mut self, place: usize, page: &mut Page) -> Result<bool> {
        let handle = Handle::from_page(self.pool, place as u64);
        Ok(self.engine.get(&mut self.queue, handle, page)? == Got::Hit)
    }

    fn supply(&self) -> Result<()> {
        while self.engine.supply()?.more {}
        Ok(())
    }

    /// Where the bytes go, after the engine has given back what it does not keep.
    fn parts(
        &self,
        pages: &[Page],
        payloads: &Payloads,
        places: &[Option<usize>],
    ) -> Result<Parts> {
        // The first call only notes what is free.
        self.engine.settle()?;
        while self.engine.settle()?.released > 0 {}
        let stats = self.engine.stats();
        let page_bytes = PAGE_SIZE as u64;
        let (mut payload, mut headers) = (0, 0);
        for &content in places.iter().flatten() {
            let (page, bytes) = (&pages[content], payloads.get(content));
            if is_compressible(page, bytes) {
                payload += bytes.len() as u64;
                headers += HEADER_BYTES as u64;
            } else if !is_same_filled(page) {
                payload += page_bytes;
            }
        }
        let frames = &stats.frames;
        let free = frames.frames_free * page_bytes;
        Ok(Parts {
            payload,
            headers,
            rounding: stats.pers.zbytes - payload - headers,
            holes: stats.pers.pageframes * page_bytes - stats.pers.zbytes,
            leaves: (frames.frames_persistent - stats.pers.pageframes) * page_bytes,
            spares: frames.frames_reserve * page_bytes,
            tables: stats.mem_used_total - frames.frames_allocated * page_bytes,
            in_use: stats.mem_used_total - free,
            free,
            mem_used_total: stats.mem_used_total,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_the_whole() {
        let pages: Vec<Page> =
            (0..1500usize).map(|n| std::array::from_fn(|at| (at * n / 70) as u8)).collect();
        let points = run(&pages, 64 << 20).unwrap();
        let held: Vec<_> = points.iter().map(|point| point.pages).collect();
        assert_eq!((held[0], held[2]), (1500, 1500));
        assert!((600..900).contains(&held[1]));
        for point in points {
            let parts = point.engine;
            let zpages = parts.payload + parts.headers + parts.rounding + parts.holes;
            assert_eq!(parts.in_use, zpages + parts.leaves + parts.spares + parts.tables);
            assert_eq!(parts.in_use + parts.free, parts.mem_used_total);
        }
    }
}
