//! How many queues a device gets, and how deep.
//!
//! Every slot of a queue has an I/O buffer of its own that is locked in memory for as long as the
//! device lives. A queue per CPU is best for latency; what all devices together may cost is bounded
//! here. Pure arithmetic: nothing here asks the system anything.

/// Bytes of one request at most, and of one I/O buffer: what the kernel's swap code sends.
pub const IO_BYTES: u32 = 128 << 10;

/// Memory that one I/O buffer takes.
const SLOT_BYTES: u64 = IO_BYTES as u64;

/// Depth below which a queue is not worth having: one request of each kind of reclaimer.
const DEPTH_MIN: u64 = 8;

/// Depth above which a queue only adds latency: 16 MiB under way on one CPU.
const DEPTH_MAX: u64 = 128;

/// What the smallest device takes: one queue.
const DEVICE_BYTES_MIN: u64 = DEPTH_MIN * SLOT_BYTES;

/// What the buffers of all devices may take, however much memory there is.
const BUFFER_BYTES_MAX: u64 = 64 << 20;

const _: () = assert!(BUFFER_BYTES_MAX <= tmem::IO_MEMORY_BYTES_MAX);

/// What the buffers of all devices may take, as a part of the memory.
const BUFFER_RAM_DIVISOR: u64 = 32;

/// Queues of a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QueuePlan {
    /// How many queues.
    pub queues: u16,
    /// How many requests each holds.
    pub depth: u16,
}

impl QueuePlan {
    /// What the I/O buffers take, in bytes.
    pub fn buffer_bytes(self) -> u64 {
        u64::from(self.queues) * u64::from(self.depth) * SLOT_BYTES
    }
}

/// What the I/O buffers of all devices together may take on a machine of so much memory, in bytes,
/// with each of so many front ends: an equal share, and enough for one device at least.
pub fn buffer_budget(ram_bytes: u64, front_ends: u64) -> u64 {
    let all = BUFFER_BYTES_MAX.min(ram_bytes / BUFFER_RAM_DIVISOR);
    // Below some 70 MiB of memory two shares are too small.
    (all / front_ends).max(DEVICE_BYTES_MIN)
}

/// Queues for a new device on a machine of so many CPUs, of whose budget so many bytes are left:
/// one per CPU, or fewer where they would be too shallow. It gets half of what is left, so that
/// there is something for the next one; none if not even the smallest device fits.
pub fn plan(cpus: usize, left: u64) -> Option<QueuePlan> {
    if left < DEVICE_BYTES_MIN {
        return None;
    }
    let slots = (left.min(BUFFER_BYTES_MAX) / 2).max(DEVICE_BYTES_MIN) / SLOT_BYTES;
    let queues = (cpus as u64).clamp(1, slots / DEPTH_MIN);
    let depth = (slots / queues).min(DEPTH_MAX);
    // Both are at most slots, which BUFFER_BYTES_MAX keeps far below 2^16.
    Some(QueuePlan { queues: queues as u16, depth: depth as u16 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn first(cpus: usize, ram: u64) -> QueuePlan {
        plan(cpus, buffer_budget(ram, 1)).unwrap()
    }

    #[test]
    fn all_devices_together_stay_within_the_budget() {
        for cpus in [1, 2, 8, 64, 256] {
            for ram in [GIB / 8, GIB / 4, GIB, 4 * GIB, 64 * GIB, 4096 * GIB] {
                let budget = buffer_budget(ram, 1);
                assert!(budget <= (64 << 20).min(ram / 32), "{ram}");
                let (mut left, mut devices) = (budget, 0);
                while let Some(plan) = plan(cpus, left) {
                    assert!(
                        plan.queues >= 1 && usize::from(plan.queues) <= cpus,
                        "{cpus} {plan:?}"
                    );
                    assert!((8..=128).contains(&plan.depth), "{cpus} {ram} {plan:?}");
                    left = left.checked_sub(plan.buffer_bytes()).unwrap();
                    devices += 1;
                }
                assert!(devices >= 2 && left < DEVICE_BYTES_MIN, "{cpus} {ram} {devices}");
            }
        }
    }

    #[test]
    fn two_front_ends_share_what_is_enough_for_both() {
        for ram in [GIB, 64 * GIB] {
            assert_eq!(2 * buffer_budget(ram, 2), buffer_budget(ram, 1));
        }
        assert_eq!(buffer_budget(64 << 20, 2), DEVICE_BYTES_MIN);
        assert!(plan(8, buffer_budget(0, 2)).is_some());
    }

    #[test]
    fn a_device_leaves_half_for_others_while_there_is_enough() {
        let budget = buffer_budget(64 * GIB, 1);
        assert_eq!(budget, 64 << 20);
        assert!(plan(256, budget).unwrap().buffer_bytes() <= budget / 2);
        let smallest = QueuePlan { queues: 1, depth: 8 };
        assert_eq!(plan(8, DEVICE_BYTES_MIN), Some(smallest));
        assert_eq!(plan(8, DEVICE_BYTES_MIN - 1), None);
    }

    #[test]
    fn a_queue_per_cpu_while_it_is_deep_enough() {
        assert_eq!(first(1, 64 * GIB), QueuePlan { queues: 1, depth: 128 });
        assert_eq!(first(8, 64 * GIB), QueuePlan { queues: 8, depth: 32 });
        assert_eq!(first(30, 64 * GIB), QueuePlan { queues: 30, depth: 8 });
        assert_eq!(first(256, 64 * GIB), QueuePlan { queues: 32, depth: 8 });
    }

    #[test]
    fn small_machines_get_fewer_queues_before_shallow_ones() {
        assert_eq!(first(2, GIB / 4), QueuePlan { queues: 2, depth: 16 });
        assert_eq!(first(8, GIB / 8), QueuePlan { queues: 2, depth: 8 });
        assert_eq!(first(1, 0), QueuePlan { queues: 1, depth: 8 });
    }
}
