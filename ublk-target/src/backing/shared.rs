//! What the threads of a daemon share of the backing file: whether there is one, and how it fares.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use tmem::Health;

use super::file::BackingFile;
use super::info::BackingStats;
use super::unanswered::Unanswered;
use crate::waker::Waker;

/// See the module's description. It is there from the start, and the file comes later if at all.
pub struct Backing {
    file: OnceLock<BackingFile>,
    waker: Waker,
    /// A [`Condition`].
    condition: AtomicU32,
    errno: AtomicI32,
    unanswered: Unanswered,
    failed_reads: AtomicU64,
}

/// How a file fares, as it is told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(super) enum Condition {
    /// It does what it is asked to.
    Good,
    /// It failed, and is left alone for a while.
    Failing,
    /// What was written is not answered.
    Late,
    /// What is read is not answered.
    LateReads,
    /// What was read just now could not be, or what is to be cleaned.
    FailingReads,
    /// As much was written as may be in a day.
    Spent,
}

impl Condition {
    /// By what the engine has met with, and whether reads are late, or failing.
    pub(super) fn of(health: Health, is_read_late: bool, is_read_failing: bool) -> Self {
        match health {
            Health::Late => Self::Late,
            _ if is_read_late => Self::LateReads,
            Health::Failing => Self::Failing,
            _ if is_read_failing => Self::FailingReads,
            Health::FailingReads => Self::FailingReads,
            Health::Spent => Self::Spent,
            Health::Good => Self::Good,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Failing | Self::FailingReads => "failing",
            Self::Late | Self::LateReads => "slow",
            Self::Spent => "spent",
        }
    }
}

impl Backing {
    /// There is no file yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            file: OnceLock::new(),
            waker: Waker::new()?,
            condition: AtomicU32::new(Condition::Good as u32),
            errno: AtomicI32::new(0),
            unanswered: Unanswered::new(),
            failed_reads: AtomicU64::new(0),
        })
    }

    /// The file.
    pub fn file(&self) -> Option<&BackingFile> {
        self.file.get()
    }

    /// What wakes the thread that writes.
    pub fn waker(&self) -> &Waker {
        &self.waker
    }

    /// How the file fares.
    pub fn stats(&self) -> Option<BackingStats> {
        let file = self.file()?;
        let (path, state) = (file.info().path, self.condition().name().to_owned());
        Some(BackingStats { path, state, last_errno: self.errno() })
    }

    /// Whether something is not answered, for so long that it may never be.
    pub fn is_slow(&self) -> bool {
        matches!(self.condition(), Condition::Late | Condition::LateReads)
    }

    /// How it fares, as it was noted last.
    pub(super) fn condition(&self) -> Condition {
        let noted = self.condition.load(Ordering::Relaxed);
        let is_it = |condition: &Condition| *condition as u32 == noted;
        CONDITIONS.into_iter().find(is_it).expect("one that was noted")
    }

    /// From now on this is the file.
    ///
    /// # Panics
    ///
    /// If there is one.
    pub fn set_file(&self, file: BackingFile) {
        assert!(self.file.set(file).is_ok(), "there is a backing file already");
    }

    /// From now on this stands for the file, which cannot be opened: nothing is written any more, and what is read
    /// is an error.
    ///
    /// # Panics
    ///
    /// If there is one.
    pub fn set_lost(&self, file: BackingFile, errno: i32) {
        self.set_file(file);
        self.failed(errno);
        let _ = self.note(Condition::Failing);
    }

    /// The number of the last error; 0 if there was none.
    pub(super) fn errno(&self) -> i32 {
        self.errno.load(Ordering::Relaxed)
    }

    /// Notes what failed.
    pub(super) fn failed(&self, errno: i32) {
        self.errno.store(errno, Ordering::Relaxed);
    }

    /// Notes a read that failed.
    pub(super) fn failed_read(&self, errno: i32) {
        self.failed(errno);
        self.failed_reads.fetch_add(1, Ordering::Relaxed);
    }

    /// How many of these there were.
    pub(super) fn failed_reads(&self) -> u64 {
        self.failed_reads.load(Ordering::Relaxed)
    }

    /// Reads that have no answer yet.
    pub(super) fn unanswered(&self) -> &Unanswered {
        &self.unanswered
    }

    /// Notes how the file fares; false if that was known.
    pub(super) fn note(&self, condition: Condition) -> bool {
        self.condition.swap(condition as u32, Ordering::Relaxed) != condition as u32
    }
}

const CONDITIONS: [Condition; 6] = [
    Condition::Good,
    Condition::Failing,
    Condition::Late,
    Condition::LateReads,
    Condition::FailingReads,
    Condition::Spent,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_once() {
        let backing = Backing::new().unwrap();
        assert!(backing.stats().is_none());
        let healths = [Health::Good, Health::Failing, Health::Failing, Health::Late, Health::Good];
        let told = healths.map(|health| backing.note(Condition::of(health, false, false)));
        assert_eq!(told, [false, true, false, true, true]);
    }

    #[test]
    fn what_is_not_answered_is_slow() {
        let backing = Backing::new().unwrap();
        let slow = CONDITIONS.map(|condition| {
            let _ = backing.note(condition);
            backing.is_slow()
        });
        assert_eq!(slow, [false, false, true, true, false, false]);
    }

    #[test]
    fn a_read_without_an_answer_is_told_before_what_failed_and_after_a_write_without() {
        let conditions = [Health::Good, Health::Failing, Health::Spent, Health::Late]
            .map(|health| [false, true].map(|is_late| Condition::of(health, is_late, false)));
        use Condition::*;
        let reads = [[Good, LateReads], [Failing, LateReads], [Spent, LateReads], [Late, Late]];
        assert_eq!(conditions, reads);
    }

    #[test]
    fn reads_that_fail_are_told_where_nothing_is_worse() {
        use Condition::*;
        let healths =
            [Health::Good, Health::Failing, Health::Spent, Health::Late, Health::FailingReads];
        let conditions = healths.map(|health| Condition::of(health, false, true));
        assert_eq!(conditions, [FailingReads, Failing, FailingReads, Late, FailingReads]);
        assert_eq!(Condition::of(Health::FailingReads, false, false), FailingReads);
        assert_eq!(Condition::of(Health::Good, true, true), LateReads);
        let names = CONDITIONS.map(Condition::name);
        assert_eq!(names, ["ok", "failing", "slow", "slow", "failing", "spent"]);
    }
}
