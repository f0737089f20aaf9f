//! Reads of the backing file that have no answer yet, so that it is seen when one is late.
//!
//! Those who read look at no clock for that. A read counts for the *period* in which it began, and who has a clock, the
//! thread that writes, begins a period about once a second and sees which of the earlier ones have reads left. As many
//! periods as there are at a time need no more memory than this, whoever reads.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// How long a period is at least, in nanoseconds.
const PERIOD: u64 = 1_000_000_000;

/// A read that takes longer is late, and noticed within a period more.
const LATE: u64 = 3 * PERIOD;

/// Periods that can have reads at a time: more than it takes until one is late.
const PERIODS: usize = 8;

/// See the module's description.
pub struct Unanswered {
    /// The period that it is.
    current: AtomicUsize,
    /// Reads that began in each and have no answer.
    reads: [AtomicU32; PERIODS],
}

/// When a read began.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Began(usize);

impl Unanswered {
    /// There is none.
    pub fn new() -> Self {
        let reads = [const { AtomicU32::new(0) }; PERIODS];
        Self { current: AtomicUsize::new(0), reads }
    }

    /// A read begins. It goes to [`Unanswered::ended`] once.
    pub fn began(&self) -> Began {
        let period = self.current.load(Ordering::Relaxed);
        self.reads[period].fetch_add(1, Ordering::Relaxed);
        Began(period)
    }

    /// A read has been answered, or nobody waits for that any more.
    pub fn ended(&self, began: Began) {
        let before = self.reads[began.0].fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "more reads end than have begun");
    }

    /// How many there are.
    #[cfg(test)]
    pub fn count(&self) -> u32 {
        self.reads.iter().map(|reads| reads.load(Ordering::Relaxed)).sum()
    }

    fn has_any(&self, period: usize) -> bool {
        self.reads[period].load(Ordering::Relaxed) > 0
    }
}

/// Looks for reads that are late. For one thread.
#[derive(Default)]
pub struct Lookout {
    /// When each period ended, in nanoseconds.
    ends: [u64; PERIODS],
    /// When the next one begins.
    next_at: u64,
}

impl Lookout {
    /// Whether a read is late. To be asked about once a second, or more often; `now` is in nanoseconds since any
    /// moment.
    pub fn sees_late(&mut self, unanswered: &Unanswered, now: u64) -> bool {
        let mut current = unanswered.current.load(Ordering::Relaxed);
        if now >= self.next_at {
            let after = (1..PERIODS).map(|n| (current + n) % PERIODS);
            // There is none if all have reads; then the oldest are late.
            if let Some(next) = after.into_iter().find(|period| !unanswered.has_any(*period)) {
                self.ends[current] = now;
                unanswered.current.store(next, Ordering::Relaxed);
                current = next;
            }
            self.next_at = now + PERIOD;
        }
        let is_late = |period: &usize| now - self.ends[*period] >= LATE;
        let earlier = (0..PERIODS).filter(|period| *period != current);
        earlier.filter(is_late).any(|period| unanswered.has_any(period))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TENTH: u64 = PERIOD / 10;

    /// Looks ten times a second until a read is late, and says when that is; none if it is not within a minute.
    fn late_at(lookout: &mut Lookout, unanswered: &Unanswered, from: u64) -> Option<u64> {
        (1..600).map(|n| from + n * TENTH).find(|now| lookout.sees_late(unanswered, *now))
    }

    #[test]
    fn a_read_without_an_answer_is_late_after_three_seconds_until_it_has_one() {
        let (unanswered, mut lookout) = (Unanswered::new(), Lookout::default());
        assert_eq!(late_at(&mut lookout, &unanswered, 0), None);
        let mut now = 60 * PERIOD;
        for _ in 0..20 {
            let began = unanswered.began();
            let late = late_at(&mut lookout, &unanswered, now).unwrap();
            assert!((LATE..=LATE + PERIOD).contains(&(late - now)), "{now} {late}");
            // It stays so, and others come and go meanwhile.
            for n in 0..100 {
                let other = unanswered.began();
                now = late + n * 3 * TENTH;
                assert!(lookout.sees_late(&unanswered, now));
                unanswered.ended(other);
            }
            unanswered.ended(began);
            now += 1;
            assert!(!lookout.sees_late(&unanswered, now));
        }
        assert_eq!(unanswered.count(), 0);
    }

    #[test]
    fn reads_that_are_answered_in_time_are_never_late() {
        let (unanswered, mut lookout) = (Unanswered::new(), Lookout::default());
        let mut under_way = std::collections::VecDeque::new();
        for n in 0..1000 {
            under_way.push_back(unanswered.began());
            // Each is answered after 2.9 s.
            if under_way.len() > 29 {
                unanswered.ended(under_way.pop_front().unwrap());
            }
            assert!(!lookout.sees_late(&unanswered, n * TENTH), "{n}");
        }
        assert_eq!(unanswered.count(), 29);
    }

    #[test]
    fn when_none_is_answered_the_last_one_ends_it() {
        let (unanswered, mut lookout) = (Unanswered::new(), Lookout::default());
        let mut under_way = Vec::new();
        for n in 0..300 {
            under_way.push(unanswered.began());
            assert_eq!(lookout.sees_late(&unanswered, n * TENTH), n >= 30, "{n}");
        }
        let (last, others) = under_way.split_last().unwrap();
        others.iter().for_each(|began| unanswered.ended(*began));
        let late = late_at(&mut lookout, &unanswered, 299 * TENTH).unwrap();
        assert!((LATE..=LATE + PERIOD).contains(&(late - 299 * TENTH)), "{late}");
        unanswered.ended(*last);
        assert_eq!(late_at(&mut lookout, &unanswered, late), None);
    }
}
