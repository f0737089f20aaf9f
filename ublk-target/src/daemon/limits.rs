//! What names, sizes and queues devices may have.

use std::io;
use std::thread::available_parallelism;

use tmem::{Config, PAGE_SIZE, POOL_PAGES_MAX, SHARDS_MAX};

use super::error::DaemonError;
use crate::size::ram_bytes;
use crate::ublk::{QueuePlan, buffer_budget, plan};

/// Longest device name, in bytes.
pub const NAME_MAX: usize = 31;

/// The name of the row that adds up all devices in what `tmem stats` shows; no device may have it.
pub const TOTAL: &str = "total";

/// Smallest swap device: mkswap takes no less.
pub const SWAP_BYTES_MIN: u64 = 10 * PAGE_SIZE as u64;

/// Largest swap device: what one pool can name.
pub const SWAP_BYTES_MAX: u64 = POOL_PAGES_MAX * PAGE_SIZE as u64;

/// The queues of a new device beside others.
pub(super) fn plan_beside(
    cpus: usize,
    budget: u64,
    others: impl Iterator<Item = QueuePlan>,
) -> Result<QueuePlan, DaemonError> {
    let taken = others.map(QueuePlan::buffer_bytes).sum();
    let left = budget.saturating_sub(taken);
    plan(cpus, left).ok_or(DaemonError::NoBuffers { budget, left })
}

/// The queues of the first device, of which no other has more.
pub(super) fn most_queues(cpus: usize, buffer_budget: u64) -> u16 {
    plan(cpus, buffer_budget).map_or(1, |plan| plan.queues)
}

/// One for each queue: a lock is held for a small part of a put, so that two queues seldom wait
/// for each other, and pages are packed more densely in fewer shards.
pub(super) fn shards(queues: u16) -> usize {
    usize::from(queues).next_power_of_two().min(SHARDS_MAX)
}

/// Checks a device name.
pub fn check_name(name: &str) -> Result<(), DaemonError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts_well && name.len() <= NAME_MAX && name.chars().all(plain) && name != TOTAL {
        return Ok(());
    }
    Err(DaemonError::BadName { name: shorten(name) })
}

/// Checks the size of a swap device.
pub fn check_swap_bytes(bytes: u64) -> Result<(), DaemonError> {
    if !(SWAP_BYTES_MIN..=SWAP_BYTES_MAX).contains(&bytes) {
        return Err(DaemonError::SizeOutOfBounds { bytes });
    }
    if !bytes.is_multiple_of(PAGE_SIZE as u64) {
        return Err(DaemonError::SizeNotPages { bytes });
    }
    Ok(())
}

/// The smallest pool limit that the engine takes on this machine, in bytes.
pub fn pool_limit_min() -> io::Result<u64> {
    let cpus = available_parallelism()?.get();
    Ok(Config::limit_min(shards(most_queues(cpus, buffer_budget(ram_bytes(), 1)))))
}

pub(super) fn shorten(name: &str) -> String {
    name.chars().take(NAME_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_are_checked_with_reasons() {
        for good in ["swap0", "a", "A.b_c-1", &"x".repeat(NAME_MAX)] {
            check_name(good).unwrap();
        }
        for bad in
            ["", "total", "-a", ".a", "a b", "a/b", "a\n", "\u{e9}", &"x".repeat(NAME_MAX + 1)]
        {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_name(&"x".repeat(1 << 16)).unwrap_err().to_string().len() < 200);

        check_swap_bytes(SWAP_BYTES_MIN).unwrap();
        check_swap_bytes(SWAP_BYTES_MAX).unwrap();
        for bad in [0, 4096, SWAP_BYTES_MAX + 4096, u64::MAX] {
            let message = check_swap_bytes(bad).unwrap_err().to_string();
            assert!(message.contains(&format!(" {bad} ")), "{message}");
        }
        let message = check_swap_bytes((1 << 20) + 5).unwrap_err().to_string();
        assert!(message.ends_with("use 1048576"), "{message}");
    }

    #[test]
    fn shards_are_a_power_of_two_that_the_engine_takes() {
        for queues in 1..=512 {
            let shards = shards(queues);
            assert!(shards.is_power_of_two() && shards <= SHARDS_MAX, "{queues} {shards}");
        }
        assert_eq!([1, 2, 3, 4, 5].map(shards), [1, 2, 4, 4, 8]);
    }

    #[test]
    fn devices_share_the_buffers_until_one_must_go() {
        let budget = buffer_budget(64 << 30, 1);
        let mut plans = Vec::new();
        let full = loop {
            match plan_beside(8, budget, plans.iter().copied()) {
                Ok(plan) => plans.push(plan),
                Err(error) => break error,
            }
        };
        assert!(plans.len() >= 2, "{plans:?}");
        assert!(full.to_string().ends_with("remove a device first"), "{full}");
        let removed = plans.swap_remove(0);
        let again = plan_beside(8, budget, plans.iter().copied()).unwrap();
        assert!(again.buffer_bytes() <= removed.buffer_bytes());
    }

    #[test]
    fn there_is_room_for_a_device_on_the_smallest_machine() {
        for ram in [16 << 20, 64 << 20, 70 << 20, 256 << 20] {
            for front_ends in [1, 2] {
                let budget = buffer_budget(ram, front_ends);
                plan_beside(1, budget, std::iter::empty()).unwrap();
            }
        }
    }
}
