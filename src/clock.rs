//! A clock for histograms: cheap enough to read twice for each page.
//!
//! `clock_gettime` costs a tenth of what it measures here, and where the kernel does not trust the
//! time stamp counter it is a system call, which the I/O path does not make. So the counter itself is
//! read, and scaled by what it did during the first moments; a counter that drifts makes a latency
//! figure wrong, and nothing else.

use std::time::{Duration, Instant};

/// How long the counter is compared with the system's clock.
const CALIBRATION: Duration = Duration::from_millis(5);

/// Converts counter readings to nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    /// Nanoseconds per tick, times 2^32.
    scale: u64,
}

impl Clock {
    /// Takes 5 ms to find the counter's rate. (Under shuttle, which makes thousands of engines and
    /// measures nothing, it is not looked for.)
    pub(crate) fn calibrate() -> Self {
        if cfg!(feature = "shuttle") {
            return Self { scale: 1 << 32 };
        }
        let (instant, ticks) = (Instant::now(), now());
        std::thread::sleep(CALIBRATION);
        let nanoseconds = instant.elapsed().as_nanos();
        let ticks = u128::from(now().wrapping_sub(ticks).max(1));
        Self { scale: ((nanoseconds << 32) / ticks) as u64 }
    }

    /// Nanoseconds since `start`; zero if the counter went backwards between two CPUs.
    pub(crate) fn since(&self, start: u64) -> u64 {
        let ticks = now().saturating_sub(start);
        ((u128::from(ticks) * u128::from(self.scale)) >> 32) as u64
    }
}

/// The counter.
#[cfg(all(target_arch = "x86_64", not(miri)))]
pub(crate) fn now() -> u64 {
    // SAFETY: reading the time stamp counter changes nothing, and every x86-64 has it; a kernel
    // can forbid it to user programs, but Linux does so only for a process that asks.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The counter.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
pub(crate) fn now() -> u64 {
    use std::sync::OnceLock;
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_runs_forward() {
        let clock = Clock::calibrate();
        assert!(clock.scale > 0);
        let start = now();
        std::thread::sleep(Duration::from_millis(2));
        assert!(clock.since(start) > 0);
        assert_eq!(clock.since(u64::MAX), 0);
    }
}
