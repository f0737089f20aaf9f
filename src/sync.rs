//! The locks and shared counters that the engine's concurrency rests on, behind one door.
//!
//! In production these are the standard library's: a futex mutex, which is one word and allocates
//! nothing even when a thread has to sleep on it for the first time (parking_lot's does), and
//! atomics. Under the `shuttle` feature they are shuttle's, so that its scheduler decides every
//! interleaving. Words inside mapped memory (frame table, slots) are plain standard atomics in both
//! cases: they are only touched under a shard's lock, or for the free stack's link, between two
//! operations on its head, which is one of these. The log's segments are touched under any shard's lock, and
//! have [`schedule_point`]s.

#[cfg(feature = "shuttle")]
use shuttle::{sync as imp, thread};
#[cfg(not(feature = "shuttle"))]
use std::{sync as imp, thread};

pub(crate) use imp::MutexGuard;
pub(crate) use imp::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
pub(crate) use thread::yield_now;

/// Where another thread may come between, for shuttle: before a word inside mapped memory is changed that several
/// threads change without a lock in common.
pub(crate) fn schedule_point() {
    #[cfg(feature = "shuttle")]
    thread::yield_now();
}

/// A mutex without poisoning to handle: who panics with it locked has left half a change behind,
/// and nobody may go on from there.
pub(crate) struct Mutex<T>(imp::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().expect("a thread panicked while it held this lock")
    }
}
