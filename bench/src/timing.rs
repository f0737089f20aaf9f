//! Timing: several ways to do the same work, side by side, in small batches.
//!
//! Other programs, frequency changes and caches disturb any run, so nothing is measured in one go:
//! contestants take turns at batches of a few pages, in an order that rotates, and are compared
//! within a round. What disturbs hits all of them alike, or falls out with the median.
//!
//! In a round each contestant does every batch, but never one that another has just done: the
//! branches that compressing a page takes stay in the processor's memory for a while, and whoever
//! came second would have them for nothing.

use std::time::Instant;

use serde::Serialize;
use tmem::{PAGE_SIZE, Page};

use crate::numbers::{median, quantile};

/// Pages of a batch: few enough to stay in the first cache level, enough to dwarf the clock's cost.
pub const BATCH: usize = 8;

/// The share of batches that count for a mean: the slowest are those that were interrupted.
const MEAN_SHARE: f64 = 0.98;

/// One step of work: a page of the set, and the position that it is put to or got from.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub position: usize,
    pub content: usize,
}

/// A way to do the work: does the steps, whose pages have been copied to the second argument, as
/// the kernel would have copied them to a buffer just before.
pub type Contestant<'a> = Box<dyn FnMut(&[Step], &[Page]) + 'a>;

/// What a contestant took.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    pub name: &'static str,
    /// Nanoseconds a page: the median over batches,
    pub median_ns: f64,
    /// what nine of ten batches stay below,
    pub p90_ns: f64,
    /// and the mean over all but the slowest batches.
    pub mean_ns: f64,
    /// The median as a multiple of the first contestant's: the middle of all rounds,
    pub ratio: f64,
    /// the lowest of all rounds,
    pub ratio_lowest: f64,
    /// and the highest.
    pub ratio_highest: f64,
    /// The mean as a multiple of the first contestant's: the middle of all rounds.
    pub mean_ratio: f64,
}

/// Nanoseconds a page of each batch: by contestant, by round.
pub struct Samples(Vec<Vec<Vec<f64>>>);

impl Samples {
    pub fn new(contestants: usize) -> Self {
        Self(vec![Vec::new(); contestants])
    }

    /// Starts a round.
    pub fn start_round(&mut self) {
        self.0.iter_mut().for_each(|rounds| rounds.push(Vec::new()));
    }

    /// Adds a batch to the round.
    pub fn add(&mut self, contestant: usize, nanoseconds: f64) {
        let round = self.0[contestant].last_mut();
        round.expect("a round was started").push(nanoseconds);
    }

    /// Adds all samples of another, round by round.
    pub fn append(&mut self, other: Self) {
        for (rounds, others) in self.0.iter_mut().zip(other.0) {
            rounds.extend(others);
        }
    }

    /// The figures of each contestant.
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

/// Does one round of steps by every contestant. With `source`, the pages of a batch are copied to
/// a buffer just before a contestant starts with it. `between` runs after each turn, untimed.
pub fn round(
    samples: &mut Samples,
    steps: &[Step],
    source: Option<&[Page]>,
    contestants: &mut [Contestant<'_>],
    mut between: impl FnMut(),
) {
    let mut buffer = vec![[0; PAGE_SIZE]; BATCH];
    let batches = steps.as_chunks::<BATCH>().0;
    samples.start_round();
    for number in 0..batches.len() {
        for turn in 0..contestants.len() {
            let at = (number + turn) % contestants.len();
            let batch = &batches[apart(number, at, contestants.len(), batches.len())];
            if let Some(pages) = source {
                for (page, step) in buffer.iter_mut().zip(batch) {
                    page.copy_from_slice(&pages[step.content]);
                }
            }
            let nanoseconds = time(batch, || contestants[at](batch, &buffer));
            samples.add(at, nanoseconds);
        }
        between();
    }
}

/// Which of `count` parts of the work contestant `at` does in turn `number`, so that each does all
/// of them, as far from the others as can be.
pub fn apart(number: usize, at: usize, contestants: usize, count: usize) -> usize {
    (number + at * count / contestants) % count
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn every_contestant_does_every_step_once_a_round_in_turn() {
        let steps: Vec<_> = (0..BATCH * 2).map(|n| Step { position: n, content: n % 2 }).collect();
        let pages = [[3; PAGE_SIZE], [4; PAGE_SIZE]];
        let done = RefCell::new(Vec::new());
        let contestant = |name: usize| -> Contestant<'_> {
            let done = &done;
            Box::new(move |steps, pages| {
                assert!(steps.iter().zip(pages).all(|(s, p)| usize::from(p[9]) == 3 + s.content));
                done.borrow_mut().push((name, steps[0].position));
            })
        };
        let mut samples = Samples::new(2);
        let mut contestants = [contestant(0), contestant(1)];
        let mut turns = 0;
        round(&mut samples, &steps, Some(&pages), &mut contestants, || turns += 1);
        assert_eq!(*done.borrow(), [(0, 0), (1, BATCH), (1, 0), (0, BATCH)]);
        assert_eq!(turns, 2);
        assert!(samples.0.iter().all(|rounds| rounds.len() == 1 && rounds[0].len() == 2));
    }

    #[test]
    fn ratios_are_taken_within_rounds() {
        let mut samples = Samples::new(2);
        // The second round is disturbed, and both contestants suffer alike.
        for (base, other) in [(10.0, 12.0), (100.0, 120.0), (10.0, 11.0)] {
            let mut part = Samples::new(2);
            part.start_round();
            for _ in 0..3 {
                part.add(0, base);
                part.add(1, other);
            }
            samples.append(part);
        }
        let timings = samples.timings(&["base", "other"]);
        assert_eq!((timings[0].ratio, timings[0].median_ns), (1.0, 10.0));
        let other = &timings[1];
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
