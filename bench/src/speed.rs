//! Speed: puts and gets through the engine, beside bare compression and decompression and beside
//! kernel zram, which a process reaches by system calls.
//!
//! Every case runs on the same pages for all contenders; lz4_flex with the engine's options is the
//! base of what is printed. What a round stores is read back and compared, untimed, by all.

use std::sync::Barrier;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tmem::{ClientId, Config, Engine, Handle, Page, PoolId, PoolKind, PutError};

use crate::bare::{Payloads, is_compressible};
use crate::contenders::{BareC, BareFlex, Buffer, Contender, DirectZram, Step, Tmem, shards};
use crate::numbers::Random;
use crate::report::{Table, cell};
use crate::samples::{Line, NotRun, TIME_PER_PAGE};
use crate::timing::{
    BATCH, MIX, MIX_PUTS, PHASE, REQUEST, Samples, Timing, Work, add_thread_round, round,
    thread_round, time,
};
use crate::zram::Zram;

/// Rounds of random overwriting before a store that has been used for long is measured.
const WARM_ROUNDS: usize = 4;

/// A page set is a multiple of every batch's size.
const SET_UNIT: usize = REQUEST * MIX / 2;

const _: () = assert!(SET_UNIT.is_multiple_of(BATCH));
const _: () = assert!(SET_UNIT.is_multiple_of(REQUEST) && SET_UNIT.is_multiple_of(MIX));

/// As many threads are tried at least, however few processors there are.
const THREADS_LEAST: usize = 4;

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

/// Runs all cases on all pages, and those with one thread on the pages that compress. Without a
/// zram device there are figures of the others.
pub fn run(pages: &[Page], effort: &Effort, limit: u64) -> Result<(Vec<Case>, Vec<NotRun>)> {
    let chosen = choose(pages.len(), effort.pages);
    let all: Vec<Page> = chosen.iter().map(|&at| pages[at]).collect();
    let payloads = Payloads::of(&all)?;
    let compress = |&at: &usize| is_compressible(&all[at], payloads.get(at));
    let compressible = (0..all.len()).filter(compress).map(|at| chosen[at]).collect();
    let mut cases = Vec::new();
    let zram = Zram::new("lz4", chosen.len() as u64);
    let not_run = zram.as_ref().err().map(|error| NotRun::new("zram-lz4", error));
    let zram = zram.ok();
    for (suffix, mut chosen) in [("", chosen), ("-compressible", compressible)] {
        chosen.truncate(chosen.len() / SET_UNIT * SET_UNIT);
        if chosen.is_empty() {
            bail!("the set has too few pages");
        }
        let pages: Vec<Page> = chosen.iter().map(|&at| pages[at]).collect();
        let mut bench = Bench::new(&pages, zram.as_ref(), effort.rounds, limit)?;
        let mut add = |name: &str, timings| {
            let name = format!("{name}{suffix}");
            eprintln!("measured {name}");
            cases.push(Case { name, timings });
        };
        bench.one_thread(&mut add)?;
        if suffix.is_empty() {
            bench.requests(&chosen, &mut add)?;
            bench.mixed(&mut add)?;
            let processors = std::thread::available_parallelism()?.get();
            for threads in thread_counts(processors, pages.len() / PHASE) {
                bench.threads(threads, &mut add)?;
            }
        }
    }
    Ok((cases, not_run.into_iter().collect()))
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

/// The mean of every round, in the order in which they were measured.
pub fn lines(cases: &[Case]) -> Vec<Line> {
    let mut lines = Vec::new();
    for case in cases {
        for round in 0..case.timings[0].rounds_ns.len() {
            lines.extend(case.timings.iter().map(|timing| {
                TIME_PER_PAGE.line(&case.name, timing.name, timing.rounds_ns[round])
            }));
        }
    }
    lines
}

/// Numbers of pages in no order, taken from all over the set as requests' worths of neighbours.
fn choose(count: usize, most: usize) -> Vec<usize> {
    let mut random = Random::new(1);
    let mut requests = random.permutation(count / REQUEST);
    requests.truncate(most / REQUEST);
    let chosen: Vec<_> = requests.iter().flat_map(|at| at * REQUEST..(at + 1) * REQUEST).collect();
    random.permutation(chosen.len()).into_iter().map(|at| chosen[at]).collect()
}

/// 1, 2, 4 and so on up to the number of processors, and that number; no more than there is work for.
fn thread_counts(processors: usize, phases: usize) -> Vec<usize> {
    let most = processors.max(THREADS_LEAST).min(phases);
    let mut counts: Vec<_> = (0..).map(|power| 1 << power).take_while(|&n| n < most).collect();
    counts.push(most);
    counts
}

#[derive(Clone, Copy)]
enum Order {
    Sequential,
    Random,
}

/// Where a case's timings go, with its name.
type Add<'a> = &'a mut dyn FnMut(&str, Vec<Timing>);

/// An engine, perhaps a zram device, the pages, and the pages' payloads: a copy for each bare
/// contender, so that none finds in the cache what another has just read.
struct Bench<'a> {
    engine: Engine,
    client: ClientId,
    pool: PoolId,
    zram: Option<&'a Zram>,
    pages: &'a [Page],
    payloads: [Payloads; 2],
    /// What page of the set each position holds, once the stores are filled.
    held: Vec<usize>,
    rounds: usize,
    random: Random,
}

impl<'a> Bench<'a> {
    fn new(pages: &'a [Page], zram: Option<&'a Zram>, rounds: usize, limit: u64) -> Result<Self> {
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: shards() })?;
        let client = engine.create_client()?;
        let pool = engine.create_pool(client, PoolKind::Persistent, pages.len() as u64)?;
        let payloads = [Payloads::of(pages)?, Payloads::of(pages)?];
        let (held, random) = ((0..pages.len()).collect(), Random::new(2));
        let bench = Self { engine, client, pool, zram, pages, payloads, held, rounds, random };
        // All memory that a round needs is there before the first that counts.
        bench.put_all(&bench.steps_of(0..pages.len()))?;
        bench.engine.flush_range(bench.pool, 0, pages.len() as u64);
        bench.clear_zram()?;
        Ok(bench)
    }

    /// The contenders, for one thread. The base is the first.
    fn contenders(&self) -> Vec<Box<dyn Contender + '_>> {
        let mut contenders: Vec<Box<dyn Contender + '_>> = vec![
            Box::new(BareFlex::new(&self.payloads[0])),
            Box::new(Tmem::new(&self.engine, self.client, self.pool)),
            Box::new(BareC::new(&self.payloads[1])),
        ];
        if let Some(zram) = self.zram {
            contenders.push(Box::new(DirectZram::new(zram)));
        }
        contenders
    }

    /// Puts and gets of single pages: of stores that are filled and emptied in each round, then of
    /// stores that have been overwritten for a while. The stores are full after it.
    fn one_thread(&mut self, add: Add<'_>) -> Result<()> {
        for (name, order) in [("seq", Order::Sequential), ("random", Order::Random)] {
            let [puts, gets, flushes] = self.fresh(order)?;
            add(&format!("put-{name}"), puts);
            add(&format!("get-{name}"), gets);
            add(&format!("flush-{name}"), flushes);
        }
        let [puts, gets] = self.churn()?;
        add("put-over", puts);
        add("get-over", gets);
        Ok(())
    }

    /// Fills an empty pool, gets all of it, and flushes it page by page, round after round. How
    /// fast zram would be told that a page is free cannot be seen from a process.
    fn fresh(&mut self, order: Order) -> Result<[Vec<Timing>; 3]> {
        let count = self.contenders().len();
        let (mut puts, mut gets) = (Samples::new(count), Samples::new(count));
        let mut flushes = Samples::new(1);
        for _ in 0..self.rounds {
            let steps = self.steps(order);
            self.round(&mut puts, Work::Put, &steps);
            let steps = self.steps(order);
            self.round(&mut gets, Work::Get, &steps);
            self.check(&steps)?;
            flushes.start_round();
            for batch in self.steps(order).chunks(BATCH) {
                let nanoseconds = time(batch, || {
                    for step in batch {
                        assert!(self.engine.flush_page(self.handle(step.position)));
                    }
                });
                flushes.add(0, nanoseconds);
            }
            self.clear_zram()?;
        }
        Ok([self.timings(&puts), self.timings(&gets), flushes.timings(&["tmem"])])
    }

    /// Overwrites pages by other pages of the set, in random order, after that has been going on
    /// for a while; and gets pages in between.
    fn churn(&mut self) -> Result<[Vec<Timing>; 2]> {
        let count = self.contenders().len();
        let (mut puts, mut gets) = (Samples::new(count), Samples::new(count));
        for number in 0..WARM_ROUNDS + self.rounds {
            let positions = self.random.permutation(self.pages.len());
            let steps = self.other_contents(&positions);
            if number < WARM_ROUNDS {
                self.put_all(&steps)?;
                continue;
            }
            self.round(&mut puts, Work::Put, &steps);
            let steps = self.steps(Order::Random);
            self.round(&mut gets, Work::Get, &steps);
            self.check(&steps)?;
        }
        Ok([self.timings(&puts), self.timings(&gets)])
    }

    /// Overwrites pages in order, 32 to a request, which were neighbours in memory: what the kernel
    /// writes when it swaps out. `numbers` are those of our pages in the whole set.
    fn requests(&mut self, numbers: &[usize], add: Add<'_>) -> Result<()> {
        let mut samples = Samples::new(self.contenders().len());
        let mut neighbours: Vec<_> = (0..self.pages.len()).collect();
        neighbours.sort_unstable_by_key(|&at| numbers[at]);
        for _ in 0..self.rounds {
            // By other pages than the last time.
            let shift = self.random.below(neighbours.len() / REQUEST) * REQUEST;
            neighbours.rotate_left(shift);
            self.held.clone_from(&neighbours);
            let steps = self.steps(Order::Sequential);
            self.round(&mut samples, Work::PutRequest, &steps);
            self.check(&steps)?;
        }
        add("put-batch32", self.timings(&samples));
        Ok(())
    }

    /// Seven gets and three puts of ten, at random places.
    fn mixed(&mut self, add: Add<'_>) -> Result<()> {
        let mut samples = Samples::new(self.contenders().len());
        for _ in 0..self.rounds {
            let mut positions = self.random.permutation(self.pages.len());
            let puts = positions.split_off(positions.len() / MIX * (MIX - MIX_PUTS.len()));
            let mut gets = self.steps_of(positions).into_iter();
            let mut puts = self.other_contents(&puts).into_iter();
            let steps: Vec<_> = (0..self.pages.len())
                .filter_map(|at| match MIX_PUTS.contains(&(at % MIX)) {
                    true => puts.next(),
                    false => gets.next(),
                })
                .collect();
            self.round(&mut samples, Work::Mixed, &steps);
            self.check(&steps)?;
        }
        add("mixed-70-30", self.timings(&samples));
        Ok(())
    }

    /// Threads with a queue each, first putting, then getting, each its own part of the pages. All
    /// do the same thing at the same time.
    fn threads(&mut self, threads: usize, add: Add<'_>) -> Result<()> {
        let count = self.contenders().len();
        let (mut puts, mut gets) = (Samples::new(count), Samples::new(count));
        let share = self.pages.len() / threads / PHASE * PHASE;
        for _ in 0..self.rounds {
            let mut positions = self.random.permutation(self.pages.len());
            positions.truncate(share * threads);
            let steps = self.other_contents(&positions);
            self.thread_rounds(&mut puts, Work::Put, &steps, threads);
            self.thread_rounds(&mut gets, Work::Get, &steps, threads);
            self.check(&steps)?;
        }
        add(&format!("put-threads-{threads}"), self.timings(&puts));
        add(&format!("get-threads-{threads}"), self.timings(&gets));
        Ok(())
    }

    fn round(&self, samples: &mut Samples, work: Work, steps: &[Step]) {
        round(samples, work, steps, self.pages, &mut self.contenders(), || self.supply());
    }

    fn thread_rounds(&self, samples: &mut Samples, work: Work, steps: &[Step], threads: usize) {
        let barrier = Barrier::new(threads);
        let one = |steps| {
            let mut contenders = self.contenders();
            thread_round(work, steps, self.pages, &mut contenders, &barrier, || self.supply())
        };
        let spans: Vec<_> = std::thread::scope(|scope| {
            let shares = steps.chunks(steps.len() / threads);
            let started: Vec<_> = shares.map(|steps| scope.spawn(|| one(steps))).collect();
            started.into_iter().map(|thread| thread.join().expect("a thread panicked")).collect()
        });
        add_thread_round(samples, self.contenders().len(), &spans);
    }

    fn steps(&mut self, order: Order) -> Vec<Step> {
        match order {
            Order::Sequential => self.steps_of(0..self.pages.len()),
            Order::Random => {
                let positions = self.random.permutation(self.pages.len());
                self.steps_of(positions)
            }
        }
    }

    /// Steps to these positions, with what they hold.
    fn steps_of(&self, positions: impl IntoIterator<Item = usize>) -> Vec<Step> {
        let step = |position| Step { position, content: self.held[position] };
        positions.into_iter().map(step).collect()
    }

    /// Steps that put other pages of the set to these positions.
    fn other_contents(&mut self, positions: &[usize]) -> Vec<Step> {
        for (position, content) in positions.iter().zip(self.random.permutation(self.pages.len())) {
            self.held[*position] = content;
        }
        self.steps_of(positions.iter().copied())
    }

    fn timings(&self, samples: &Samples) -> Vec<Timing> {
        let names: Vec<_> = self.contenders().iter().map(|one| one.name()).collect();
        samples.timings(&names)
    }

    fn handle(&self, position: usize) -> Handle {
        Handle::from_page(self.pool, position as u64)
    }

    /// Puts to the stores untimed.
    fn put_all(&self, steps: &[Step]) -> Result<()> {
        let mut queue = self.engine.queue(self.client);
        let mut buffer = Buffer::new(1);
        for step in steps {
            self.supply();
            let page = &self.pages[step.content];
            match self.engine.put(&mut queue, self.handle(step.position), page) {
                Err(PutError::Starved | PutError::Full) => {
                    bail!("the limit is too low for the set")
                }
                other => other.context("putting a page")?,
            }
            if let Some(zram) = self.zram {
                buffer.pages_mut()[0] = *page;
                zram.write(step.position as u64, buffer.pages())?;
            }
        }
        Ok(())
    }

    fn clear_zram(&self) -> Result<()> {
        let Some(zram) = self.zram else { return Ok(()) };
        zram.discard(0..self.pages.len() as u64).context("discarding what zram holds")
    }

    /// Gets untimed from all contenders, and compares.
    fn check(&self, steps: &[Step]) -> Result<()> {
        for contender in &mut self.contenders() {
            for step in steps {
                if *contender.get(*step) != self.pages[step.content] {
                    bail!("{}: page {} is not what was put", contender.name(), step.position);
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_cases_run_and_give_figures() {
        let pages: Vec<Page> =
            (0..1400usize).map(|n| std::array::from_fn(|at| (at * n / 50) as u8)).collect();
        let effort = Effort { pages: 1300, rounds: 2 };
        let (cases, not_run) = run(&pages, &effort, 64 << 20).unwrap();
        let names: Vec<_> = cases.iter().map(|case| case.name.as_str()).collect();
        for name in ["put-seq", "get-over-compressible", "put-batch32", "mixed-70-30"] {
            assert!(names.contains(&name), "{name} of {names:?}");
        }
        for case in &cases {
            assert!(case.timings.iter().all(|t| t.median_ns > 0.0 && t.ratio > 0.0));
        }
        // Only root can have a zram device.
        let contenders = 4 - not_run.len();
        let put = cases.iter().find(|case| case.name == "put-threads-4").unwrap();
        assert_eq!(put.timings.len(), contenders);
        assert_eq!(lines(std::slice::from_ref(put)).len(), contenders * 2);
    }

    #[test]
    fn pages_are_chosen_by_requests_and_in_no_order() {
        let mut chosen = choose(32 * 10 + 5, 32 * 3 + 5);
        assert!(!chosen.is_sorted());
        chosen.sort_unstable();
        assert_eq!(chosen.len(), 96);
        assert!(chosen.chunks(32).all(|run| run[0] % 32 == 0 && run[31] == run[0] + 31));
    }

    #[test]
    fn threads_are_powers_of_two_up_to_the_processors_and_the_work() {
        assert_eq!(thread_counts(1, 100), [1, 2, 4]);
        assert_eq!(thread_counts(6, 100), [1, 2, 4, 6]);
        assert_eq!(thread_counts(8, 100), [1, 2, 4, 8]);
        assert_eq!(thread_counts(64, 20), [1, 2, 4, 8, 16, 20]);
    }
}
