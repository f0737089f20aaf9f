//! Density: the memory that the engine takes for a page set, against kernel zram's.
//!
//! All stores get the same pages at the same places in the same order: first all of them, then
//! rounds in which half of all places, chosen at random, are overwritten by another page of the set
//! or freed, and at last new pages for all places that are empty.
//!
//! A build with the feature `seed-zbud` measures the engine with two buddies a frame.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tmem::{Config, Engine, Got, Handle, PAGE_SIZE, Page, PoolId, PoolKind, PutError, Queue};

use crate::bare::{HEADER_BYTES, Payloads, is_compressible, is_same_filled};
use crate::contenders::{Buffer, shards};
use crate::numbers::Random;
use crate::report::{Table, cell, mib};
use crate::samples::{BYTES_PER_BYTE, Line, NotRun};
use crate::zram::Zram;

/// Times that half of all places change.
const CHURN: usize = 10;

/// The engine as this build has it, counted with and without the free frames that it keeps ready.
const NAMES: [&str; 2] = if cfg!(feature = "seed-zbud") {
    ["tmem-2-buddies", "tmem-2-buddies-in-use"]
} else {
    ["tmem", "tmem-in-use"]
};

const ZRAM_ALGORITHMS: [&str; 2] = ["lz4", "lzo-rle"];

/// What the stores hold, and what they take for it, at one point.
#[derive(Serialize)]
pub struct Point {
    pub name: &'static str,
    pub pages: u64,
    pub engine: Parts,
    /// Of those that there is a device for.
    pub zram: Vec<ZramUse>,
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
#[derive(Clone, Debug, Serialize)]
pub struct ZramUse {
    pub algorithm: &'static str,
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

/// Runs the comparison several times, with other changes each time. What zram there is not is left
/// out, and named with the reason.
pub fn run(pages: &[Page], rounds: u64, limit: u64) -> Result<(Vec<Vec<Point>>, Vec<NotRun>)> {
    let payloads = Payloads::of(pages)?;
    let mut all = Vec::new();
    let mut not_run = Vec::new();
    for seed in 0..rounds {
        let mut zrams = Vec::new();
        not_run.clear();
        for algorithm in ZRAM_ALGORITHMS {
            match Zram::new(algorithm, pages.len() as u64) {
                Ok(zram) => zrams.push((algorithm, zram)),
                Err(error) => not_run.push(NotRun::new(&format!("zram-{algorithm}"), error)),
            }
        }
        let stores = Stores {
            engine: Store::new(pages.len(), limit)?,
            zrams,
            buffer: Buffer::new(1),
            pages,
            places: vec![None; pages.len()],
        };
        all.push(stores.run(seed, &payloads)?);
    }
    Ok((all, not_run))
}

/// Prints the points of a round as tables.
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
    for (at, zram) in points[0].zram.iter().enumerate() {
        let title = format!("memory of zram ({}), and the engine's to it", zram.algorithm);
        print_zram(&title, &names, points, at);
    }
}

fn print_zram(title: &str, names: &[&str], points: &[Point], at: usize) {
    let mut table = Table::new(title, names);
    let mut add = |name, figure: fn(&ZramUse) -> u64| {
        let zram = |point: &Point| figure(&point.zram[at]);
        table.row(name, points.iter().map(|point| mib(zram(point))));
        for (part, bytes) in [
            ("  engine in use", (|parts| parts.in_use) as fn(&Parts) -> u64),
            ("  engine in all", |parts| parts.mem_used_total),
        ] {
            let ratio = |point: &Point| bytes(&point.engine) as f64 / zram(point) as f64;
            table.row(part, points.iter().map(|point| cell(Some(ratio(point)), 3)));
        }
    };
    add("mm_stat mem_used_total", |zram| zram.mem_used);
    add("with its table", |zram| zram.mem_used + zram.table);
    add("compacted, with its table", |zram| zram.compacted + zram.table);
    table.print();
}

/// Every point of every round. Of a build with the seed's zbud only the engine counts: what zram
/// takes is the other build's to say.
pub fn lines(rounds: &[Vec<Point>]) -> Vec<Line> {
    let mut lines = Vec::new();
    for point in rounds.iter().flatten() {
        let mut used = vec![
            (NAMES[0].to_owned(), point.engine.mem_used_total),
            (NAMES[1].to_owned(), point.engine.in_use),
        ];
        if !cfg!(feature = "seed-zbud") {
            let zram =
                |one: &ZramUse| (format!("zram-{}", one.algorithm), one.mem_used + one.table);
            used.extend(point.zram.iter().map(zram));
        }
        let stored = (point.pages * PAGE_SIZE as u64) as f64;
        for (contender, bytes) in used {
            lines.push(BYTES_PER_BYTE.line(point.name, &contender, bytes as f64 / stored));
        }
    }
    lines
}

/// The points, and the changes that lead to each from the one before.
fn script(count: usize, seed: u64) -> Vec<(&'static str, Vec<Change>)> {
    let mut random = Random::new(7 + seed);
    let mut held = vec![true; count];
    let fresh = (0..count).map(|at| Change::Put { place: at, content: at }).collect();
    let mut churn = Vec::new();
    for _ in 0..CHURN {
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
    vec![("fresh", fresh), ("after-churn", churn), ("filled-again", filled)]
}

/// All stores, and what each place of theirs holds.
struct Stores<'a> {
    engine: Store,
    zrams: Vec<(&'static str, Zram)>,
    buffer: Buffer,
    pages: &'a [Page],
    places: Vec<Option<usize>>,
}

impl Stores<'_> {
    fn run(mut self, seed: u64, payloads: &Payloads) -> Result<Vec<Point>> {
        let mut points = Vec::new();
        for (name, changes) in script(self.pages.len(), seed) {
            for change in changes {
                match change {
                    Change::Put { place, content } => self.put(place, content)?,
                    Change::Free { place } => self.free(place)?,
                }
            }
            self.check()?;
            let engine = self.engine.parts(self.pages, payloads, &self.places)?;
            let pages = self.places.iter().flatten().count() as u64;
            let zram = self.zrams.iter().map(|(name, zram)| zram_use(name, zram));
            points.push(Point { name, pages, engine, zram: zram.collect::<Result<_>>()? });
        }
        Ok(points)
    }

    fn put(&mut self, place: usize, content: usize) -> Result<()> {
        self.places[place] = Some(content);
        self.engine.put(place, &self.pages[content])?;
        self.buffer.pages_mut()[0] = self.pages[content];
        for (name, zram) in &self.zrams {
            let written = zram.write(place as u64, self.buffer.pages());
            written.with_context(|| format!("writing to zram ({name})"))?;
        }
        Ok(())
    }

    fn free(&mut self, place: usize) -> Result<()> {
        self.places[place] = None;
        self.engine.free(place);
        for (name, zram) in &self.zrams {
            let freed = zram.discard(place as u64..place as u64 + 1);
            freed.with_context(|| format!("discarding from zram ({name})"))?;
        }
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        let mut page = [0; PAGE_SIZE];
        for (place, &content) in self.places.iter().enumerate() {
            let found = self.engine.get(place, &mut page)?;
            let expected = content.map(|content| &self.pages[content]);
            if found != expected.is_some() || expected.is_some_and(|expected| page != *expected) {
                bail!("the engine does not hold page {place} as it was put");
            }
            let Some(expected) = expected else { continue };
            for (name, zram) in &self.zrams {
                let read = &mut self.buffer.pages_mut()[0];
                zram.read(place as u64, read)?;
                if read != expected {
                    bail!("zram ({name}) does not hold page {place} as it was written");
                }
            }
        }
        Ok(())
    }
}

fn zram_use(algorithm: &'static str, zram: &Zram) -> Result<ZramUse> {
    let mem_used = zram.mem_used()?;
    zram.compact()?;
    Ok(ZramUse { algorithm, mem_used, compacted: zram.mem_used()?, table: zram.table_bytes() })
}

/// The engine with one pool.
struct Store {
    engine: Engine,
    queue: Queue,
    pool: PoolId,
}

impl Store {
    fn new(pages: usize, limit: u64) -> Result<Self> {
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: shards() })?;
        let client = engine.create_client()?;
        let pool = engine.create_pool(client, PoolKind::Persistent, pages as u64)?;
        let store = Self { queue: engine.queue(client), engine, pool };
        store.supply()?;
        Ok(store)
    }

    fn put(&mut self, place: usize, page: &Page) -> Result<()> {
        let handle = Handle::from_page(self.pool, place as u64);
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

    fn free(&mut self, place: usize) {
        self.engine.flush_page(Handle::from_page(self.pool, place as u64));
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
        let (rounds, not_run) = run(&pages, 2, 64 << 20).unwrap();
        // Only root can have zram devices.
        assert_eq!(rounds[0][0].zram.len() + not_run.len(), ZRAM_ALGORITHMS.len());
        let held: Vec<_> = rounds[0].iter().map(|point| point.pages).collect();
        assert_eq!((held[0], held[2]), (1500, 1500));
        assert!((600..900).contains(&held[1]));
        assert_ne!(held[1], rounds[1][1].pages);
        for point in rounds.iter().flatten() {
            let parts = point.engine;
            let zpages = parts.payload + parts.headers + parts.rounding + parts.holes;
            assert_eq!(parts.in_use, zpages + parts.leaves + parts.spares + parts.tables);
            assert_eq!(parts.in_use + parts.free, parts.mem_used_total);
        }
        let others = if cfg!(feature = "seed-zbud") { 0 } else { rounds[0][0].zram.len() };
        assert_eq!(lines(&rounds).len(), (NAMES.len() + others) * 3 * 2);
    }
}
