//! Speed: puts and gets through the engine against bare compression and decompression.
//!
//! Every case runs on the same pages for all contestants: lz4_flex with the engine's options is
//! the base, the engine comes second, the C library third.

use std::sync::{Barrier, Mutex};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tmem::{
    ClientId, Config, Engine, Got, Handle, PAGE_SIZE, Page, PoolId, PoolKind, PutError, Queue,
};

use crate::bare::{C, Flex, Payloads, is_compressible};
use crate::numbers::Random;
use crate::report::{Table, cell};
use crate::timing::{BATCH, Contestant, Samples, Step, Timing, apart, round, time};

/// Shards: as many as the daemon has for two queues.
const SHARDS: usize = 2;

const NAMES: [&str; 3] = ["lz4_flex", "engine", "C lz4"];

/// Rounds of random overwriting before a store that has been used for long is measured.
const WARM_ROUNDS: usize = 4;

const THREADS: usize = 2;
/// Pages that each thread does between two meetings with the other.
const THREAD_PHASE: usize = 16 * BATCH;

/// How much is done.
pub struct Effort {
    pub pages: usize,
    pub rounds: usize,
}

/// One case of the comparison.
#[derive(Serialize)]
pub struct Case {
    pub name: String,
    pub timings: Vec<Timing>,
}

/// Runs all cases: over pages that compress, and over all.
pub fn run(pages: &[Page], effort: &Effort, limit: u64) -> Result<Vec<Case>> {
    let mut random = Random::new(1);
    let order = random.permutation(pages.len());
    let chosen: Vec<Page> = order.iter().take(effort.pages).map(|&at| pages[at]).collect();
    let payloads = Payloads::of(&chosen)?;
    let compress = |at: &usize| is_compressible(&chosen[*at], payloads.get(*at));
    let compressible: Vec<Page> = (0..chosen.len()).filter(compress).map(|at| chosen[at]).collect();
    let mut cases = Vec::new();
    for (set, pages) in [("compressible", &compressible), ("all", &chosen)] {
        if pages.len() < BATCH * 16 {
            bail!("{} {set} pages are too few", pages.len());
        }
        let mut bench = Bench::new(pages, effort.rounds, limit)?;
        let mut add = |name: &str, timings| {
            let name = format!("{name}, {set}");
            eprintln!("measured {name}");
            cases.push(Case { name, timings });
        };
        for (name, order) in [("sequential", Order::Sequential), ("random", Order::Random)] {
            let (puts, gets, flushes) = bench.fresh(order)?;
            add(&format!("put {name}"), puts);
            add(&format!("get {name}"), gets);
            add(&format!("flush {name}"), flushes);
        }
        let (puts, gets) = bench.churn()?;
        add("put overwriting", puts);
        add("get after that", gets);
        let (puts, gets) = bench.threads()?;
        add(&format!("put, {THREADS} threads"), puts);
        add(&format!("get, {THREADS} threads"), gets);
    }
    Ok(cases)
}

/// Prints the cases as a table.
pub fn print(cases: &[Case]) {
    let heads =
        ["", "by", "median ns", "p90 ns", "mean ns", "ratio", "of rounds", "ratio of means"];
    let mut table = Table::new("time a page; ratios are to the first of each case", &heads);
    for case in cases {
        for (at, timing) in case.timings.iter().enumerate() {
            let name = if at == 0 { case.name.as_str() } else { "" };
            let range = format!("{:.2}-{:.2}", timing.ratio_lowest, timing.ratio_highest);
            table.row(
                name,
                [
                    timing.name.to_owned(),
                    cell(Some(timing.median_ns), 0),
                    cell(Some(timing.p90_ns), 0),
                    cell(Some(timing.mean_ns), 0),
                    cell(Some(timing.ratio), 3),
                    range,
                    cell(Some(timing.mean_ratio), 3),
                ],
            );
        }
    }
    table.print();
}

#[derive(Clone, Copy)]
enum Order {
    Sequential,
    Random,
}

/// An engine, the pages, and the pages' payloads: a copy for each bare contestant, so that none
/// finds in the cache what another has just read.
struct Bench<'a> {
    engine: Engine,
    client: ClientId,
    pool: PoolId,
    pages: &'a [Page],
    payloads: [Payloads; 2],
    rounds: usize,
    random: Random,
}

impl<'a> Bench<'a> {
    fn new(pages: &'a [Page], rounds: usize, limit: u64) -> Result<Self> {
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: SHARDS })?;
        let client = engine.create_client()?;
        let pool = engine.create_pool(client, PoolKind::Persistent, pages.len() as u64)?;
        let payloads = [Payloads::of(pages)?, Payloads::of(pages)?];
        let bench = Self { engine, client, pool, pages, payloads, rounds, random: Random::new(2) };
        // All memory that a round needs is there before the first that counts.
        let mut queue = bench.engine.queue(client);
        let steps: Vec<_> = (0..pages.len()).map(same).collect();
        bench.put_all(&mut queue, &steps)?;
        bench.engine.flush_range(bench.pool, 0, pages.len() as u64);
        Ok(bench)
    }

    fn handle(&self, position: usize) -> Handle {
        Handle::from_page(self.pool, position as u64)
    }

    /// Fills an empty pool, gets all of it, and flushes it page by page, round after round.
    fn fresh(&mut self, order: Order) -> Result<(Vec<Timing>, Vec<Timing>, Vec<Timing>)> {
        let mut queue = self.engine.queue(self.client);
        let (mut puts, mut gets) = (Samples::new(NAMES.len()), Samples::new(NAMES.len()));
        let mut flushes = Samples::new(1);
        for _ in 0..self.rounds {
            let steps = self.steps(order);
            self.put_round(&mut puts, &steps, &mut queue);
            self.put_all(&mut queue, steps.chunks_exact(BATCH).remainder())?;
            let steps = self.steps(order);
            self.get_round(&mut gets, &steps, &mut queue);
            self.check(&mut queue, &steps)?;
            flushes.start_round();
            for batch in self.steps(order).chunks(BATCH) {
                let nanoseconds = time(batch, || {
                    for step in batch {
                        assert!(self.engine.flush_page(self.handle(step.position)));
                    }
                });
                flushes.add(0, nanoseconds);
            }
        }
        Ok((puts.timings(&NAMES), gets.timings(&NAMES), flushes.timings(&["engine"])))
    }

    /// Overwrites pages by other pages of the set, in random order, after that has been going on
    /// for a while; and gets pages in between.
    fn churn(&mut self) -> Result<(Vec<Timing>, Vec<Timing>)> {
        let mut queue = self.engine.queue(self.client);
        let (mut puts, mut gets) = (Samples::new(NAMES.len()), Samples::new(NAMES.len()));
        let count = self.pages.len();
        for number in 0..WARM_ROUNDS + self.rounds {
            let contents = self.random.permutation(count);
            let positions = self.random.permutation(count).into_iter();
            let steps: Vec<_> = positions.zip(contents).map(Step::from).collect();
            if number < WARM_ROUNDS {
                self.put_all(&mut queue, &steps)?;
                continue;
            }
            self.put_round(&mut puts, &steps, &mut queue);
            self.put_all(&mut queue, steps.chunks_exact(BATCH).remainder())?;
            let order = self.random.permutation(count);
            let steps: Vec<_> = order.into_iter().map(|at| steps[at]).collect();
            self.get_round(&mut gets, &steps, &mut queue);
            self.check(&mut queue, &steps)?;
        }
        Ok((puts.timings(&NAMES), gets.timings(&NAMES)))
    }

    fn steps(&mut self, order: Order) -> Vec<Step> {
        let count = self.pages.len();
        match order {
            Order::Sequential => (0..count).map(same).collect(),
            Order::Random => self.random.permutation(count).into_iter().map(same).collect(),
        }
    }

    fn put_round(&self, samples: &mut Samples, steps: &[Step], queue: &mut Queue) {
        let (mut flex, mut c) = (Flex::new(), C::new());
        let mut contestants: [Contestant<'_>; 3] = [
            Box::new(|_, pages| pages.iter().for_each(|page| used(flex.compress(page)))),
            Box::new(|steps, pages| self.put(queue, steps, pages)),
            Box::new(|_, pages| pages.iter().for_each(|page| used(c.compress(page)))),
        ];
        round(samples, steps, Some(self.pages), &mut contestants, || self.supply());
    }

    fn get_round(&self, samples: &mut Samples, steps: &[Step], queue: &mut Queue) {
        let (mut page, mut other, mut third) = ([0; PAGE_SIZE], [0; PAGE_SIZE], [0; PAGE_SIZE]);
        let mut contestants: [Contestant<'_>; 3] = [
            Box::new(|steps, _| decompress(&self.payloads[0], steps, Flex::decompress, &mut page)),
            Box::new(|steps, _| self.get(queue, steps, &mut other)),
            Box::new(|steps, _| decompress(&self.payloads[1], steps, C::decompress, &mut third)),
        ];
        round(samples, steps, None, &mut contestants, || ());
    }

    fn put(&self, queue: &mut Queue, steps: &[Step], pages: &[Page]) {
        for (step, page) in steps.iter().zip(pages) {
            let result = self.engine.put(queue, self.handle(step.position), page);
            assert_eq!(result, Ok(()), "the limit is too low for the set");
        }
    }

    fn get(&self, queue: &mut Queue, steps: &[Step], page: &mut Page) {
        for step in steps {
            let got = self.engine.get(queue, self.handle(step.position), page);
            assert_eq!(got, Ok(Got::Hit));
            used(page);
        }
    }

    /// Two threads with a queue each, first putting, then getting, each its own half of the pages.
    /// Both do the same thing at the same time.
    fn threads(&mut self) -> Result<(Vec<Timing>, Vec<Timing>)> {
        let (mut puts, mut gets) = (Samples::new(2), Samples::new(2));
        for _ in 0..self.rounds {
            let steps = self.steps(Order::Random);
            let share = steps.len() / THREADS / THREAD_PHASE * THREAD_PHASE;
            if share == 0 {
                bail!("{} pages are too few for {THREADS} threads", steps.len());
            }
            let barrier = Barrier::new(THREADS);
            let all = Mutex::new((&mut puts, &mut gets));
            std::thread::scope(|scope| {
                for steps in steps.chunks(share).take(THREADS) {
                    scope.spawn(|| {
                        let (put, get) = self.thread_round(steps, &barrier);
                        let mut all = all.lock().expect("no thread panicked");
                        all.0.append(put);
                        all.1.append(get);
                    });
                }
            });
            let mut queue = self.engine.queue(self.client);
            self.check(&mut queue, &steps[..share * THREADS])?;
        }
        Ok((puts.timings(&NAMES[..2]), gets.timings(&NAMES[..2])))
    }

    fn thread_round(&self, steps: &[Step], barrier: &Barrier) -> (Samples, Samples) {
        let mut queue = self.engine.queue(self.client);
        let (mut flex, mut page) = (Flex::new(), [0; PAGE_SIZE]);
        let (mut puts, mut gets) = (Samples::new(2), Samples::new(2));
        puts.start_round();
        gets.start_round();
        let phase = |samples: &mut Samples, at, steps: &[Step], work: &mut dyn FnMut()| {
            barrier.wait();
            samples.add(at, time(steps, work));
        };
        let parts: Vec<_> = steps.chunks(THREAD_PHASE).collect();
        let of = |number, at| parts[apart(number, at, 2, parts.len())];
        let pages_of = |steps: &[Step]| -> Vec<Page> {
            steps.iter().map(|step| self.pages[step.content]).collect()
        };
        for number in 0..parts.len() {
            let (first, second) = (pages_of(of(number, 0)), pages_of(of(number, 1)));
            self.supply();
            let compress = &mut || first.iter().for_each(|page| used(flex.compress(page)));
            phase(&mut puts, 0, of(number, 0), compress);
            let put = &mut || self.put(&mut queue, of(number, 1), &second);
            phase(&mut puts, 1, of(number, 1), put);
        }
        for number in 0..parts.len() {
            let (payloads, steps) = (&self.payloads[0], of(number, 0));
            let bare = &mut || decompress(payloads, steps, Flex::decompress, &mut page);
            phase(&mut gets, 0, steps, bare);
            let get = &mut || self.get(&mut queue, of(number, 1), &mut page);
            phase(&mut gets, 1, of(number, 1), get);
        }
        (puts, gets)
    }

    /// Puts untimed.
    fn put_all(&self, queue: &mut Queue, steps: &[Step]) -> Result<()> {
        for step in steps {
            self.supply();
            let result =
                self.engine.put(queue, self.handle(step.position), &self.pages[step.content]);
            match result {
                Err(PutError::Starved | PutError::Full) => {
                    bail!("the limit is too low for the set")
                }
                other => other.context("putting a page")?,
            }
        }
        Ok(())
    }

    /// Gets untimed, and compares.
    fn check(&self, queue: &mut Queue, steps: &[Step]) -> Result<()> {
        let mut page = [0; PAGE_SIZE];
        for step in steps {
            let got = self.engine.get(queue, self.handle(step.position), &mut page)?;
            if got != Got::Hit || page != self.pages[step.content] {
                bail!("page {} is not what was put there", step.position);
            }
        }
        Ok(())
    }

    /// What the supply thread of a server would do.
    fn supply(&self) {
        while self.engine.supply_wanted() {
            self.engine.supply().expect("the system has memory for the limit");
        }
    }
}

impl From<(usize, usize)> for Step {
    fn from((position, content): (usize, usize)) -> Self {
        Self { position, content }
    }
}

fn decompress(from: &Payloads, steps: &[Step], how: fn(&[u8], &mut Page), page: &mut Page) {
    for step in steps {
        how(from.get(step.content), page);
        used(page);
    }
}

fn same(at: usize) -> Step {
    Step { position: at, content: at }
}

/// Keeps the compiler from leaving out what made the bytes.
fn used(bytes: &[u8]) {
    std::hint::black_box(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_cases_run_and_give_figures() {
        let pages: Vec<Page> =
            (0..1024usize).map(|n| std::array::from_fn(|at| (at * n / 50) as u8)).collect();
        let cases = run(&pages, &Effort { pages: 800, rounds: 1 }, 64 << 20).unwrap();
        assert_eq!(cases.len(), 20);
        for case in &cases {
            assert!(case.timings.iter().all(|t| t.median_ns > 0.0 && t.ratio > 0.0));
        }
    }
}
