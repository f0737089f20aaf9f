//! The report: every figure of a daemon as JSON, for `tmem stats --json` and for monitoring.
//!
//! ```text
//! {"version":1,
//!  "devices":[{"name":"swap0", ..., "orig_data_size":N, "compr_data_size":N, ...,
//!              "put_latency":{...}, "get_latency":{...}, "io":{"reads":N, ...}}, ...],
//!  "total":{"orig_data_size":N, ..., "frames_allocated":N, "put_latency":{...}, ...}}
//! ```
//!
//! zram's names are in each device and in the total: `orig_data_size`, `compr_data_size`,
//! `mem_used_total`, `mem_limit`, `mem_used_max`, `same_pages`, `huge_pages`. All devices share one
//! pool, and one frame may hold zpages of several, so three of them have no exact value for one
//! device. In a device, `mem_used_total` is its share of the daemon's `mem_used_total`, divided by
//! what each holds (`compr_data_size`, and a frame of slots for each of `obj_count`), rounded down;
//! `mem_limit` and `mem_used_max` are those of the shared pool. What the total counts, it counts
//! for devices that were removed as well. It also has `backing_path`, `backing_state` (`ok`, `failing`,
//! `slow`, or `spent`) and `backing_errno` (of the last error, or 0), which are null without a backing file.

use serde::Serialize;
use serde_json::Value;
use tmem::{Latencies, PAGE_SIZE, PoolCounters, Stats};

use crate::daemon::{DaemonStats, DeviceInfo, ServingStats};
use crate::device::IoStats;
use crate::supply::SupplyStats;

/// The version of the report. New fields do not change it; a changed or removed one does.
pub const REPORT_VERSION: u32 = 1;

#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    devices: Vec<DeviceReport<'a>>,
    total: TotalReport<'a>,
}

#[derive(Serialize)]
struct TotalReport<'a> {
    #[serde(flatten)]
    engine: &'a Stats,
    #[serde(flatten)]
    serving: &'a ServingStats,
    #[serde(flatten)]
    supply: &'a SupplyStats,
    backing_path: Option<&'a str>,
    backing_state: Option<&'a str>,
    backing_errno: Option<i32>,
}

#[derive(Serialize)]
struct DeviceReport<'a> {
    #[serde(flatten)]
    info: &'a DeviceInfo,
    #[serde(flatten)]
    pool: &'a PoolCounters,
    #[serde(flatten)]
    latencies: &'a Latencies,
    mem_used_total: u64,
    mem_limit: u64,
    mem_used_max: u64,
    io: &'a IoStats,
}

/// The report of `stats`.
pub fn report(stats: &DaemonStats) -> Value {
    let held_by_all: u64 = stats.devices.iter().map(|device| held(&device.pool)).sum();
    let devices = stats.devices.iter().map(|device| DeviceReport {
        info: &device.info,
        pool: &device.pool,
        latencies: &device.latencies,
        mem_used_total: share(stats.total.mem_used_total, held(&device.pool), held_by_all),
        mem_limit: stats.total.mem_limit,
        mem_used_max: stats.total.mem_used_max,
        io: &device.io,
    });
    let backing = stats.backing.as_ref();
    let total = TotalReport {
        engine: &stats.total,
        serving: &stats.serving,
        supply: &stats.supply,
        backing_path: backing.map(|backing| backing.path.as_str()),
        backing_state: backing.map(|backing| backing.state.as_str()),
        backing_errno: backing.map(|backing| backing.last_errno),
    };
    let report = Report { version: REPORT_VERSION, devices: devices.collect(), total };
    serde_json::to_value(report).expect("reports have string keys only")
}

/// Bytes that a pool's pages and their slots fill, whichever frames they are in.
fn held(pool: &PoolCounters) -> u64 {
    pool.compr_data_size + pool.obj_count * PAGE_SIZE as u64
}

/// `whole` times `part / parts`, rounded down; nothing of nothing is nothing.
fn share(whole: u64, part: u64, parts: u64) -> u64 {
    let share = (u128::from(whole) * u128::from(part)).checked_div(u128::from(parts)).unwrap_or(0);
    u64::try_from(share).unwrap_or(whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::BackingStats;
    use crate::daemon::{DeviceState, DeviceStats};

    fn device(name: &str, compr_data_size: u64, obj_count: u64) -> DeviceStats {
        let mut pool = PoolCounters::default();
        pool.orig_data_size = 3 * compr_data_size;
        pool.compr_data_size = compr_data_size;
        pool.obj_count = obj_count;
        let info = DeviceInfo {
            name: name.into(),
            kind: "swap".into(),
            path: "/dev/ublkb0".into(),
            uri: None,
            connections: 0,
            bytes: 1 << 30,
            queues: 1,
            depth: 128,
            swapped_on: true,
            state: DeviceState::Live,
            worker_pid: 0,
            takeovers: 0,
        };
        let mut latencies = Latencies::default();
        latencies.put_latency.count = compr_data_size;
        DeviceStats { info, pool, latencies, io: IoStats::default() }
    }

    #[test]
    fn zrams_names_are_in_each_device_and_in_the_total() {
        let stats = DaemonStats { devices: vec![device("a", 1, 0)], ..DaemonStats::default() };
        let report = report(&stats);
        for name in [
            "orig_data_size",
            "compr_data_size",
            "mem_used_total",
            "mem_limit",
            "mem_used_max",
            "same_pages",
            "huge_pages",
        ] {
            assert!(report["devices"][0][name].is_u64(), "{name}");
            assert!(report["total"][name].is_u64(), "{name}");
        }
        assert_eq!(report["total"]["supply_errors"], 0);
        assert_eq!(report["version"], 1);
        assert_eq!(report["devices"][0]["name"], "a");
        assert_eq!(report["devices"][0]["put_latency"]["count"], 1);
        for name in ["put_latency", "get_latency"] {
            assert!(report["devices"][0][name]["p999_ns"].is_u64(), "{name}");
            assert!(report["total"][name]["p999_ns"].is_u64(), "{name}");
        }
    }

    #[test]
    fn shares_follow_what_is_held_and_never_exceed_the_total() {
        let mut stats = DaemonStats::default();
        stats.total.mem_used_total = 100_001;
        stats.devices = vec![device("a", 4096, 1), device("b", 4096, 0), device("c", 0, 0)];
        let report = report(&stats);
        let shares: Vec<u64> =
            (0..3).map(|i| report["devices"][i]["mem_used_total"].as_u64().unwrap()).collect();
        assert_eq!(shares, [66667, 33333, 0]);
    }

    #[test]
    fn a_backing_file_is_in_the_total() {
        let names = ["backing_path", "backing_state", "backing_errno"];
        let without = report(&DaemonStats::default());
        for name in names {
            assert!(without["total"].as_object().unwrap().contains_key(name));
            assert!(without["total"][name].is_null());
        }
        let backing = BackingStats { path: "/a".into(), state: "failing".into(), last_errno: 5 };
        let with = report(&DaemonStats { backing: Some(backing), ..DaemonStats::default() });
        assert_eq!(
            names.map(|name| &with["total"][name]),
            ["\"/a\"", "\"failing\"", "5"]
                .map(|json| { serde_json::from_str::<Value>(json).unwrap() })
                .each_ref()
        );
    }

    #[test]
    fn an_empty_daemon_has_no_shares() {
        let stats = DaemonStats { devices: vec![device("a", 0, 0)], ..DaemonStats::default() };
        assert_eq!(report(&stats)["devices"][0]["mem_used_total"], 0);
    }
}
