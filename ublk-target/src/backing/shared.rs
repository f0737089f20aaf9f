//! What the threads of a daemon share of the backing file: whether there is one, and how it fares.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use tmem::Health;

use super::file::BackingFile;
use super::info::BackingStats;
use crate::waker::Waker;

/// See the module's description. It is there from the start, and the file comes later if at all.
pub struct Backing {
    file: OnceLock<BackingFile>,
    waker: Waker,
    health: AtomicU32,
    errno: AtomicI32,
}

impl Backing {
    /// There is no file yet.
    pub fn new() -> io::Result<Self> {
        let (health, errno) = (AtomicU32::new(0), AtomicI32::new(0));
        Ok(Self { file: OnceLock::new(), waker: Waker::new()?, health, errno })
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
        let state = match self.health.load(Ordering::Relaxed) {
            FAILING => "failing",
            LATE => "slow",
            SPENT => "spent",
            _ => "ok",
        };
        let last_errno = self.errno();
        Some(BackingStats { path: file.info().path, state: state.to_owned(), last_errno })
    }

    /// From now on this is the file.
    ///
    /// # Panics
    ///
    /// If there is one.
    pub(super) fn set_file(&self, file: BackingFile) {
        assert!(self.file.set(file).is_ok(), "there is a backing file already");
    }

    /// The number of the last error; 0 if there was none.
    pub(super) fn errno(&self) -> i32 {
        self.errno.load(Ordering::Relaxed)
    }

    /// Notes an I/O that failed.
    pub(super) fn failed(&self, errno: i32) {
        self.errno.store(errno, Ordering::Relaxed);
    }

    /// Notes how the file fares; false if that was known.
    pub(super) fn note(&self, health: Health) -> bool {
        let health = match health {
            Health::Good => GOOD,
            Health::Failing => FAILING,
            Health::Late => LATE,
            Health::Spent => SPENT,
        };
        self.health.swap(health, Ordering::Relaxed) != health
    }
}

const GOOD: u32 = 0;
const FAILING: u32 = 1;
const LATE: u32 = 2;
const SPENT: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_once() {
        let backing = Backing::new().unwrap();
        assert!(backing.stats().is_none());
        let told = [Health::Good, Health::Failing, Health::Failing, Health::Late, Health::Good]
            .map(|health| backing.note(health));
        assert_eq!(told, [false, true, false, true, true]);
    }
}
