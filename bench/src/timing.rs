//! Timing: several ways to do the same work, side by side, in small batches.
//!
//! Other programs, frequency changes and caches disturb any run, so nothing is measured in one go:
//! contenders take turns at batches of a few pages, in an order that rotates, and are compared
//! within a round. What disturbs hits all of them alike, or falls out with the median.
//!
//! In a round each contender does every batch, but never one that another has just done: the
//! branches that compressing a page takes stay in the processor's memory for a while, and whoever
//! came second would have them for nothing.

use std::sync::Barrier;
use std::time::Instant;

use serde::Serialize;
use tmem::Page;

use crate::contenders::{Buffer, Contender, Step, used};
use crate::numbers::{median, quantile};

/// Pages of a batch: few enough to stay in the first cache level, enough to dwarf the clock's cost.
pub const BATCH: usize = 8;

/// Pages of a request: 128 KiB, as the kernel writes what it swaps out.
pub const REQUEST: usize = 32;

/// Pages of a batch that puts and gets share, and which of them are puts.
pub const MIX: usize = 10;
pub const MIX_PUTS: [usize; 3] = [2, 5, 8];

/// Pages that each thread does between two meetings with the others: enough to dwarf the time that
/// waking them takes.
pub const PHASE: usize = 256;

/// The share of batches that count for a mean: the slowest are those that were interrupted.
const MEAN_SHARE: f64 = 0.98;

/// What is done with the pages of a batch, which have been copied to a buffer just before as the
/// kernel would have copied them.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    Put,
    Get,
    /// One put of all pages.
    PutRequest,
    /// Puts of those that `MIX_PUTS` names, gets of the others.
    Mixed,
}

impl Work {
    fn batch(self) -> usize {
        match self {
            Self::Put | Self::Get => BATCH,
            Self::PutRequest => REQUEST,
            Self::Mixed => MIX,
        }
    }

    fn run(self, contender: &mut dyn Contender, steps: &[Step], pages: &[Page]) {
        match self {
            Self::Put => {
                steps.iter().zip(pages).for_each(|(step, page)| contender.put(*step, page))
            }
            Self::Get => steps.iter().for_each(|step| used(contender.get(*step))),
            Self::PutRequest => contender.put_request(steps, pages),
            Self::Mixed => {
                for (at, (step, page)) in steps.iter().zip(pages).enumerate() {
                    match MIX_PUTS.contains(&at) {
                        true => contender.put(*step, page),
                        false => used(contender.get(*step)),
                    }
                }
            }
        }
    }
}

/// What a contender took.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    pub name: &'static str,
    /// Nanoseconds a page: the median over batches,
    pub median_ns: f64,
    /// what nine of ten batches stay below,
    pub p90_ns: f64,
    /// and the mean over all but the slowest batches.
    pub mean_ns: f64,
    /// The same mean of each round: of requests whose pages are alike, and those of the next one are
    /// not, the median says little.
    pub rounds_ns: Vec<f64>,
    /// The median as a multiple of the first contender's: the middle of all rounds,
    pub ratio: f64,
    /// the lowest of all rounds,
    pub ratio_lowest: f64,
    /// and the highest.
    pub ratio_highest: f64,
    /// The mean as a multiple of the first contender's: the middle of all rounds.
    pub mean_ratio: f64,
}

/// Nanoseconds a page of each batch: by contender, by round.
pub struct Samples(Vec<Vec<Vec<f64>>>);

impl Samples {
    pub fn new(contenders: usize) -> Self {
        Self(vec![Vec::new(); contenders])
    }

    /// Starts a round.
    pub fn start_round(&mut self) {
        self.0.iter_mut().for_each(|rounds| rounds.push(Vec::new()));
    }

    /// Adds a batch to the round.
    pub fn add(&mut self, contender: usize, nanoseconds: f64) {
        let round = self.0[contender].last_mut();
        round.expect("a round was started").push(nanoseconds);
    }

    /// The figures of each contender.
    pub fn timings(&self, names: &[&'static str]) -> Vec<Timing> {
        let all = self.0.iter().zip(names);
        all.map(|(rounds, name)| {
            let mut pages: Vec<_> = rounds.iter().flatten().copied().collect();
            let mut medians = ratios(rounds, &self.0[0], median);
            let mut means = ratios(rounds, &self.0[0], mean_of_most);
            Timing {
                name,
                median_ns: median(&mut pages),
                p90_ns: quantile(&mut pages, 0.9),
                mean_ns: mean_of_most(&mut pages),
                rounds_ns: rounds.iter().map(|round| mean_of_most(&mut round.clone())).collect(),
                ratio: median(&mut medians),
                ratio_lowest: quantile(&mut medians, 0.0),
                ratio_highest: quantile(&mut medians, 1.0),
                mean_ratio: median(&mut means),
            }
        })
        .collect()
    }
}

/// A figure of each round as a multiple of the same of the base's round.
fn ratios(rounds: &[Vec<f64>], base: &[Vec<f64>], figure: fn(&mut [f64]) -> f64) -> Vec<f64> {
    let of = |round: &Vec<f64>| figure(&mut round.clone());
    rounds.iter().zip(base).map(|(round, base)| of(round) / of(base)).collect()
}

fn mean_of_most(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let count = ((values.len() as f64 * MEAN_SHARE).ceil() as usize).max(1);
    values[..count].iter().sum::<f64>() / count as f64
}

/// Times one batch, in nanoseconds a step.
pub fn time(steps: &[Step], work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64 / steps.len() as f64
}

/// Does one round of steps by every contender, batch by batch. `between` runs after each turn,
/// untimed.
pub fn round(
    samples: &mut Samples,
    work: Work,
    steps: &[Step],
    source: &[Page],
    contenders: &mut [Box<dyn Contender + '_>],
    mut between: impl FnMut(),
) {
    let mut buffer = Buffer::new(work.batch());
    let batches: Vec<_> = steps.chunks_exact(work.batch()).collect();
    samples.start_round();
    for number in 0..batches.len() {
        for turn in 0..contenders.len() {
            let at = (number + turn) % contenders.len();
            let batch = batches[apart(number, at, contenders.len(), batches.len())];
            fill(&mut buffer, batch, source, work);
            let contender = contenders[at].as_mut();
            samples.add(at, time(batch, || work.run(contender, batch, buffer.pages())));
        }
        between();
    }
}

/// When a thread began and ended one turn.
type Span = (Instant, Instant);

/// Does one thread's part of a round that several threads do, each with contenders and steps of
/// its own: all do the same turn at the same time. `before` runs ahead of each turn, untimed.
pub fn thread_round(
    work: Work,
    steps: &[Step],
    source: &[Page],
    contenders: &mut [Box<dyn Contender + '_>],
    barrier: &Barrier,
    mut before: impl FnMut(),
) -> Vec<Span> {
    let mut buffer = Buffer::new(PHASE);
    let phases: Vec<_> = steps.chunks_exact(PHASE).collect();
    let mut spans = Vec::new();
    for number in 0..phases.len() {
        for turn in 0..contenders.len() {
            let at = (number + turn) % contenders.len();
            let phase = phases[apart(number, at, contenders.len(), phases.len())];
            fill(&mut buffer, phase, source, work);
            before();
            barrier.wait();
            let start = Instant::now();
            work.run(contenders[at].as_mut(), phase, buffer.pages());
            spans.push((start, Instant::now()));
        }
    }
    spans
}

/// Adds a round of threads to the samples. A page's time is that from the first thread's start to
/// the last one's end, divided by the pages of all.
pub fn add_thread_round(samples: &mut Samples, contenders: usize, threads: &[Vec<Span>]) {
    samples.start_round();
    for span in 0..threads[0].len() {
        let (number, turn) = (span / contenders, span % contenders);
        let starts = threads.iter().map(|spans| spans[span].0).min();
        let ends = threads.iter().map(|spans| spans[span].1).max();
        let (start, end) = starts.zip(ends).expect("there is a thread");
        let pages = threads.len() * PHASE;
        let nanoseconds = (end - start).as_nanos() as f64 / pages as f64;
        samples.add((number + turn) % contenders, nanoseconds);
    }
}

fn fill(buffer: &mut Buffer, steps: &[Step], source: &[Page], work: Work) {
    if matches!(work, Work::Get) {
        return;
    }
    for (page, step) in buffer.pages_mut().iter_mut().zip(steps) {
        page.copy_from_slice(&source[step.content]);
    }
}

/// Which of `count` parts of the work contender `at` does in turn `number`, so that each does all
/// of them, as far from the others as can be.
fn apart(number: usize, at: usize, contenders: usize, count: usize) -> usize {
    (number + at * count / contenders) % count
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::time::Duration;

    use tmem::PAGE_SIZE;

    use super::*;

    /// Notes what it is asked to do.
    struct Noting<'a> {
        name: &'static str,
        done: &'a RefCell<Vec<(&'static str, char, usize)>>,
        page: Page,
    }

    impl Contender for Noting<'_> {
        fn name(&self) -> &'static str {
            self.name
        }

        fn put(&mut self, step: Step, page: &Page) {
            assert_eq!(usize::from(page[9]), 3 + step.content);
            self.done.borrow_mut().push((self.name, 'p', step.position));
        }

        fn get(&mut self, step: Step) -> &Page {
            self.done.borrow_mut().push((self.name, 'g', step.position));
            &self.page
        }
    }

    const PAGES: [Page; 2] = [[3; PAGE_SIZE], [4; PAGE_SIZE]];

    fn steps(count: usize) -> Vec<Step> {
        (0..count).map(|at| Step { position: at, content: at % 2 }).collect()
    }

    fn noting<'a>(
        done: &'a RefCell<Vec<(&'static str, char, usize)>>,
    ) -> Vec<Box<dyn Contender + 'a>> {
        let one = |name| Box::new(Noting { name, done, page: PAGES[0] }) as Box<dyn Contender>;
        vec![one("a"), one("b")]
    }

    #[test]
    fn every_contender_does_every_step_once_a_round_in_turn() {
        let done = RefCell::new(Vec::new());
        let mut samples = Samples::new(2);
        let mut turns = 0;
        let mut contenders = noting(&done);
        let steps = steps(BATCH * 2);
        round(&mut samples, Work::Put, &steps, &PAGES, &mut contenders, || turns += 1);
        let firsts: Vec<_> = done.borrow().iter().step_by(BATCH).copied().collect();
        assert_eq!(firsts, [("a", 'p', 0), ("b", 'p', BATCH), ("b", 'p', 0), ("a", 'p', BATCH)]);
        assert_eq!((turns, done.borrow().len()), (2, BATCH * 4));
        assert!(samples.0.iter().all(|rounds| rounds.len() == 1 && rounds[0].len() == 2));
    }

    #[test]
    fn a_mixed_batch_puts_three_pages_of_ten() {
        let done = RefCell::new(Vec::new());
        let mut contenders = noting(&done);
        round(&mut Samples::new(2), Work::Mixed, &steps(MIX), &PAGES, &mut contenders, || ());
        let kinds: String = done.borrow().iter().take(MIX).map(|(_, kind, _)| kind).collect();
        assert_eq!(kinds, "ggpggpggpg");
    }

    #[test]
    fn threads_are_timed_from_the_first_start_to_the_last_end() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        // Two threads, two contenders, two phases; the second phase is done in the other order.
        let one = vec![(at(0), at(4)), (at(10), at(11)), (at(20), at(23)), (at(30), at(31))];
        let other = vec![(at(1), at(5)), (at(10), at(12)), (at(20), at(21)), (at(30), at(35))];
        let mut samples = Samples::new(2);
        add_thread_round(&mut samples, 2, &[one, other]);
        let of = |ms: f64| ms * 1e6 / (2 * PHASE) as f64;
        assert_eq!(samples.0, [[[of(5.0), of(5.0)]], [[of(2.0), of(3.0)]]]);
    }

    #[test]
    fn a_thread_does_its_steps_by_every_contender() {
        let done = RefCell::new(Vec::new());
        let mut contenders = noting(&done);
        let (steps, barrier) = (steps(PHASE * 2), Barrier::new(1));
        let spans = thread_round(Work::Get, &steps, &PAGES, &mut contenders, &barrier, || ());
        assert_eq!((spans.len(), done.borrow().len()), (4, PHASE * 4));
    }

    #[test]
    fn ratios_are_taken_within_rounds() {
        let mut samples = Samples::new(2);
        // The second round is disturbed, and both contenders suffer alike.
        for (base, other) in [(10.0, 12.0), (100.0, 120.0), (10.0, 11.0)] {
            samples.start_round();
            for _ in 0..3 {
                samples.add(0, base);
                samples.add(1, other);
            }
        }
        let timings = samples.timings(&["base", "other"]);
        assert_eq!((timings[0].ratio, timings[0].median_ns), (1.0, 10.0));
        let other = &timings[1];
        assert_eq!(other.rounds_ns, [12.0, 120.0, 11.0]);
        assert!((other.ratio - 1.2).abs() < 1e-9 && (other.mean_ratio - 1.2).abs() < 1e-9);
        assert!((other.ratio_lowest - 1.1).abs() < 1e-9);
        assert!((other.ratio_highest - 1.2).abs() < 1e-9);
    }

    #[test]
    fn the_slowest_do_not_count_for_the_mean() {
        let mut values = [1.0; 100];
        values[7] = 1e9;
        assert_eq!(mean_of_most(&mut values), 1.0);
    }
}
