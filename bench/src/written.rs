//! Written: bytes that go to a backing file for a byte of the user's pages, where the pool holds a small part of them.
//!
//! The file is in memory, so a page that is to go is written at once. It has room for everything, and pages are put once:
//! what a cleaner would write again is another question. Every page is read back and compared.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tmem::{
    Config, Engine, Got, Handle, Image, Job, KEY_BYTES, Opened, PAGE_SIZE, Page, PoolId, PoolKind,
    PutError, Queue, Writeback,
};

use crate::contenders::shards;
use crate::numbers::Random;
use crate::report::{Table, cell, mib};
use crate::samples::{Line, WRITTEN_PER_BYTE};

/// A pool limit for the page set: a fourth of what all of it takes.
pub const POOL_BYTES: u64 = 12 << 20;

/// What a round found.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Written {
    pub case: &'static str,
    pub contender: &'static str,
    /// Pages that were written, some after others: all but those that are in memory in the end.
    pub pages: u64,
    /// Bytes that were written for them.
    pub bytes: u64,
}

impl Written {
    fn ratio(&self) -> f64 {
        self.bytes as f64 / (self.pages * PAGE_SIZE as u64) as f64
    }
}

/// Puts all pages to an engine of a pool limit, in their order and at random, with and without encryption.
pub fn run(pages: &[Page], rounds: u64, limit: u64) -> Result<Vec<Written>> {
    let mut all = Vec::new();
    for seed in 0..rounds {
        let in_order: Vec<usize> = (0..pages.len()).collect();
        let at_random = Random::new(11 + seed).permutation(pages.len());
        for (case, order) in [("written-in-order", &in_order), ("written-at-random", &at_random)] {
            for (contender, encrypts) in [("tmem", false), ("tmem-encrypted", true)] {
                let mut store = Store::new(pages.len(), limit, encrypts)?;
                for (place, &content) in order.iter().enumerate() {
                    store.put(place, &pages[content])?;
                }
                let stats = store.engine.stats();
                let bytes = stats.log.log_written_bytes + stats.log.log_cleaner_written_bytes;
                all.push(Written { case, contender, pages: stats.pools.bd_writes, bytes });
                for (place, &content) in order.iter().enumerate() {
                    store.check(place, &pages[content])?;
                }
            }
        }
    }
    Ok(all)
}

/// Prints the first round.
pub fn print(all: &[Written]) {
    let mut table = Table::new(
        "written to a backing file",
        &["", "pages written", "MiB written", "bytes a byte"],
    );
    for one in all.iter().take(4) {
        let name = format!("{}, {}", one.case, one.contender);
        table.row(&name, [one.pages.to_string(), mib(one.bytes), cell(Some(one.ratio()), 3)]);
    }
    table.print();
}

pub fn lines(all: &[Written]) -> Vec<Line> {
    let line = |one: &Written| WRITTEN_PER_BYTE.line(one.case, one.contender, one.ratio());
    all.iter().map(line).collect()
}

/// An engine with one pool and a backing file.
struct Store {
    engine: Engine,
    queue: Queue,
    pool: PoolId,
    writeback: Writeback,
    file: Vec<u8>,
    now: u64,
}

impl Store {
    fn new(pages: usize, limit: u64, encrypts: bool) -> Result<Self> {
        let config = Config { limit, limit_max: limit, shards: shards() };
        let engine = Engine::new(&config)?;
        let client = engine.create_client()?;
        let pool = engine.create_pool(client, PoolKind::Persistent, pages as u64)?;
        // Room for all of it raw, and for the cleaner to have nothing to do.
        let bytes = (pages * PAGE_SIZE) as u64 * 5 / 4 + tmem::BACKING_BYTES_MIN;
        let key = encrypts.then_some(&[7; KEY_BYTES]);
        let writeback = engine.attach_backing(bytes, key)?;
        let queue = engine.queue(client);
        Ok(Self { engine, queue, pool, writeback, file: vec![0; bytes as usize], now: 0 })
    }

    fn put(&mut self, place: usize, page: &Page) -> Result<()> {
        let handle = Handle::from_page(self.pool, place as u64);
        // Several times: what is written first need not be what has room for this page.
        for _ in 0..100 {
            if self.engine.supply_wanted() {
                while self.engine.supply()?.more {}
            }
            if self.engine.writeback_wanted() {
                self.write_out();
            }
            match self.engine.put(&mut self.queue, handle, page) {
                Err(PutError::Starved) => self.now += 1_000_000,
                result => return result.context("putting a page"),
            }
        }
        bail!("page {place} waits for memory without end")
    }

    fn write_out(&mut self) {
        while let Some(job) = self.writeback.next(&self.engine, self.now) {
            self.carry_out(job);
            self.now += 1_000_000;
            self.writeback.ended(&self.engine, job.unit, Ok(()), self.now);
        }
    }

    #[allow(unsafe_code)]
    fn carry_out(&mut self, job: Job) {
        let place = &mut self.file[job.offset as usize..][..job.bytes];
        let buffer = self.writeback.buffer(job.unit).as_ptr();
        // SAFETY: the unit's buffer has the job's bytes, and is ours until the job has ended.
        let buffer = unsafe { std::slice::from_raw_parts_mut(buffer, job.bytes) };
        match job.is_write {
            true => place.copy_from_slice(buffer),
            false => buffer.copy_from_slice(place),
        }
    }

    fn check(&mut self, place: usize, expected: &Page) -> Result<()> {
        let handle = Handle::from_page(self.pool, place as u64);
        let mut page = [0; PAGE_SIZE];
        let mut got = self.engine.get(&mut self.queue, handle, &mut page)?;
        while let Got::Backed(backed) = got {
            let at = backed.offset() as usize;
            let mut block = [0; PAGE_SIZE];
            block.copy_from_slice(&self.file[at..at + PAGE_SIZE]);
            let mut opened = Opened::default();
            let image = Image::new(&mut block, &mut opened);
            got = self.engine.get_backed(&mut self.queue, handle, backed, image, &mut page)?;
        }
        if got != Got::Hit || page != *expected {
            bail!("page {place} is not what was put");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_frames_hold() {
        // Three of a kind fill a frame, and a raw page another: two frames for four pages.
        let mut random = Random::new(3);
        let pages: Vec<Page> = (0..12_000usize)
            .map(|n| {
                let noise = if n % 4 == 3 { PAGE_SIZE } else { 1250 };
                std::array::from_fn(|at| if at < noise { random.below(256) as u8 } else { 5 })
            })
            .collect();
        let found = run(&pages, 1, 3 << 20).unwrap();
        assert_eq!((found.len(), lines(&found).len()), (4, 4));
        for one in &found {
            assert!((9000..12_000).contains(&one.pages), "{one:?}");
            assert!((0.49..0.55).contains(&one.ratio()), "{one:?}");
        }
    }
}
