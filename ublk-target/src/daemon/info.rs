//! What the daemon says of its devices and itself.

use serde::{Deserialize, Serialize};
use tmem::{Latencies, PoolCounters, Stats};

pub use crate::attachment::DeviceState;
use crate::backing::BackingStats;
use crate::device::IoStats;
use crate::supply::SupplyStats;

/// A device.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct DeviceInfo {
    /// The name that the user knows it by.
    pub name: String,
    /// What it is for: `swap`.
    pub kind: String,
    /// Its block device node, or the URI of its export if it has none.
    pub path: String,
    /// The URI of its NBD export.
    #[serde(default)]
    pub uri: Option<String>,
    /// NBD connections that use it, the kernel's included.
    #[serde(default)]
    pub connections: u32,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its node's hardware queues; none without a node.
    pub queues: u32,
    /// Requests that each queue holds.
    pub depth: u32,
    /// Whether the kernel swaps to it now.
    pub swapped_on: bool,
    /// Whether its node can be used.
    #[serde(default)]
    pub state: DeviceState,
    /// The process that serves it.
    #[serde(default)]
    pub worker_pid: u32,
    /// How often another went on for one that had died.
    #[serde(default)]
    pub takeovers: u64,
}

/// One device and what it counts.
#[derive(Clone, Debug)]
pub struct DeviceStats {
    /// The device.
    pub info: DeviceInfo,
    /// Its pool's counters.
    pub pool: PoolCounters,
    /// Its queues' latencies.
    pub latencies: Latencies,
    /// Its queues' counters.
    pub io: IoStats,
}

/// Who serves, and since when.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct ServingStats {
    /// The process that serves.
    pub worker_pid: u32,
    /// How often another process went on for one that had died.
    pub takeovers: u64,
    /// How long the last one took, from when the death was seen until I/O went on.
    pub takeover_ns_last: u64,
    /// Requests that waited for that: those that the dead process had, and those that had come since.
    pub takeover_requests_last: u64,
    /// Whether there is a supervisor, which starts the next process that can go on.
    pub has_supervisor: bool,
}

/// The figures of a whole daemon.
#[derive(Clone, Debug, Default)]
pub struct DaemonStats {
    /// The engine's figures.
    pub total: Stats,
    /// Who serves.
    pub serving: ServingStats,
    /// How the supply of memory fares.
    pub supply: SupplyStats,
    /// The devices.
    pub devices: Vec<DeviceStats>,
    /// How the backing file fares, if there is one.
    pub backing: Option<BackingStats>,
}
