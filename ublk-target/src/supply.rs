//! The supply thread: flushes what the kernel has freed, grows the arena ahead of demand and gives memory back.
//!
//! It is the only thread that may wait for the kernel's memory on the engine's behalf; no I/O
//! waits for it longer than the front end's bound. It dies only with the process: without it
//! writes would starve for ever.

use std::ffi::c_ulong;
use std::io;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use rustix::event::Timespec;
use serde::Serialize;
use tmem::Engine;

use crate::process;
use crate::waker::Waker;

/// How soon to look again: nobody tells of pages that the kernel has freed, or of frames that discards have, and during a swapoff there are many.
const PERIOD: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The same while memory is short, and there is something to give back.
const SHORT_PERIOD: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Memory is short when less than this part of it is free.
const SHORT_DIVISOR: c_ulong = 8;

/// How long it leaves the system alone after a failure: every queue would wake it again at once.
const FAILED_PERIOD: Duration = Duration::from_millis(20);

/// How the supply of frames fares.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct SupplyStats {
    /// Rounds that failed: the arena could not be resized, and writes may have failed for it.
    pub supply_errors: u64,
    /// The error number of the last of them; 0 if there was none, or it had no number.
    pub supply_errno: i32,
}

/// What is counted for [`SupplyStats`].
#[derive(Default)]
struct Faults {
    errors: AtomicU64,
    errno: AtomicI32,
}

impl Faults {
    fn count(&self, error: &io::Error) {
        self.errno.store(error.raw_os_error().unwrap_or(0), Ordering::Relaxed);
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    fn stats(&self) -> SupplyStats {
        SupplyStats {
            supply_errors: self.errors.load(Ordering::Relaxed),
            supply_errno: self.errno.load(Ordering::Relaxed),
        }
    }
}

/// The running thread. Stops it when dropped.
pub struct Supply {
    waker: Arc<Waker>,
    faults: Arc<Faults>,
    engine: Arc<OnceLock<Arc<Engine>>>,
    thread: Option<JoinHandle<()>>,
}

impl Supply {
    /// Starts the thread, which makes the first reserve of frames at once.
    pub fn start(engine: Arc<Engine>) -> io::Result<Self> {
        let supply = Self::prepare()?;
        supply.begin(engine);
        Ok(supply)
    }

    /// Starts the thread without anything to do.
    pub fn prepare() -> io::Result<Self> {
        let waker = Arc::new(Waker::new()?);
        let (faults, engine) = (Arc::new(Faults::default()), Arc::new(OnceLock::new()));
        let thread = {
            let (waker, faults) = (Arc::clone(&waker), Arc::clone(&faults));
            let engine = Arc::clone(&engine);
            process::spawn_essential("tmem-supply".into(), move || run(&engine, &waker, &faults))?
        };
        Ok(Self { waker, faults, engine, thread: Some(thread) })
    }

    /// From now on the thread supplies this engine.
    ///
    /// # Panics
    ///
    /// If it does another.
    pub fn begin(&self, engine: Arc<Engine>) {
        assert!(self.engine.set(engine).is_ok(), "it supplies another engine");
        self.waker.wake();
    }

    /// What wakes the thread.
    pub fn waker(&self) -> &Arc<Waker> {
        &self.waker
    }

    /// How it has fared so far.
    pub fn stats(&self) -> SupplyStats {
        self.faults.stats()
    }
}

impl Drop for Supply {
    fn drop(&mut self) {
        self.waker.stop();
        if let Some(thread) = self.thread.take() {
            // A panic in it would have ended the process.
            let _ = thread.join();
        }
    }
}

fn run(engine: &OnceLock<Arc<Engine>>, waker: &Waker, faults: &Faults) {
    // Writes wait for what it brings.
    process::become_server();
    let engine = loop {
        match engine.get() {
            Some(engine) => break engine,
            None if waker.is_stopped() => return,
            None => waker.wait(&PERIOD),
        }
    };
    waker.wake();
    let mut failing = false;
    let mut is_urgent = false;
    while !waker.is_stopped() {
        waker.wait(if is_urgent { &SHORT_PERIOD } else { &PERIOD });
        let done = round(engine, waker);
        is_urgent = done.as_ref().is_ok_and(|is_urgent| *is_urgent);
        if let Err(error) = &done {
            faults.count(error);
        }
        match done {
            Err(error) => {
                if !failing {
                    process::note(format_args!(
                        "cannot resize the arena: {error}; writes may fail"
                    ));
                }
                failing = true;
                sleep(FAILED_PERIOD);
            }
            Ok(_) => failing = false,
        }
    }
}

/// Flushes what the kernel has freed, brings the arena to its watermark, then gives back what is too much. Every step is bounded. True if others want what is
/// too much still.
fn round(engine: &Engine, waker: &Waker) -> io::Result<bool> {
    loop {
        let is_freed_left = engine.flush_freed();
        // Whatever there is to flush, writes wait for this.
        while engine.supply()?.more && !waker.is_stopped() {}
        if !is_freed_left || waker.is_stopped() {
            break;
        }
    }
    if is_memory_short() {
        return Ok(engine.settle_all()?.more);
    }
    engine.settle()?;
    Ok(false)
}

/// Whether others want memory. Where there is much page cache it looks so as well, and then what is given back is of use
/// there.
fn is_memory_short() -> bool {
    let system = rustix::system::sysinfo();
    // Both in the same unit.
    system.freeram < system.totalram / SHORT_DIVISOR
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_counted_with_the_last_ones_number() {
        let faults = Faults::default();
        assert_eq!(faults.stats(), SupplyStats::default());
        faults.count(&io::Error::from_raw_os_error(libc::EAGAIN));
        faults.count(&io::Error::from_raw_os_error(libc::ENOMEM));
        let expected = SupplyStats { supply_errors: 2, supply_errno: libc::ENOMEM };
        assert_eq!(faults.stats(), expected);
    }
}
