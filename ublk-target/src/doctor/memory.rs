//! Whether the kernel's memory management is set for compressed swap.

use super::Finding;
use super::host::Host;
use crate::size::Human;

/// Free memory that the kernel should keep, as a share of RAM: one part in so many, up to
/// [`MIN_FREE_ENOUGH`]. The daemon's own small needs are met from it under pressure.
const MIN_FREE_DIVISOR: u64 = 128;

/// As much free memory as is enough on any machine, in KiB.
const MIN_FREE_ENOUGH: u64 = 64 << 10;

/// Zswap, which compresses the same pages before they come to us.
pub fn zswap(host: &Host) -> Finding {
    let check = "zswap";
    match host.read("sys/module/zswap/parameters/enabled").as_deref() {
        Some("Y" | "1") => Finding::warn(
            check,
            "on, so pages are compressed twice",
            "run 'echo N > /sys/module/zswap/parameters/enabled'",
        ),
        _ => Finding::ok(check, "off"),
    }
}

/// Swap on kernel zram, which takes the pages that were meant for us.
pub fn other_zram(host: &Host) -> Finding {
    let check = "zram";
    let swaps = host.read("proc/swaps").unwrap_or_default();
    let names = swaps.lines().filter_map(|line| line.split_whitespace().next());
    let zram: Vec<_> = names.filter(|name| name.starts_with("/dev/zram")).collect();
    if zram.is_empty() {
        return Finding::ok(check, "no swap on zram");
    }
    let found = format!("swap on {}, which shares memory and pages with tmem", zram.join(", "));
    Finding::warn(check, found, format!("run 'swapoff {}'", zram.join(" ")))
}

/// How many pages the kernel reads around the one that it wants.
pub fn page_cluster(host: &Host) -> Finding {
    let check = "page-cluster";
    match host.number("proc/sys/vm/page-cluster") {
        Some(0) => Finding::ok(check, "0"),
        None => Finding::ok(check, "the kernel has no such setting"),
        Some(order) => Finding::warn(
            check,
            format!("{order}, so up to {} pages are read for one", 1u64 << order.min(63)),
            "run 'sysctl vm.page-cluster=0'",
        ),
    }
}

/// How much the kernel likes to swap.
pub fn swappiness(host: &Host) -> Finding {
    let check = "swappiness";
    match host.number("proc/sys/vm/swappiness") {
        Some(value) if value < 100 => Finding::warn(
            check,
            format!("{value}, so files are dropped before memory is swapped"),
            "run 'sysctl vm.swappiness=150', since swap in memory is faster than files",
        ),
        Some(value) => Finding::ok(check, value.to_string()),
        None => Finding::ok(check, "the kernel has no such setting"),
    }
}

/// How much memory the kernel keeps free.
pub fn min_free(host: &Host) -> Finding {
    let check = "min-free";
    let kept = host.number("proc/sys/vm/min_free_kbytes");
    let ram = host.field::<u64>("proc/meminfo", "MemTotal:");
    let (Some(kept), Some(ram)) = (kept, ram) else {
        return Finding::warn(check, "unknown", "mount /proc");
    };
    let wanted = (ram / MIN_FREE_DIVISOR).min(MIN_FREE_ENOUGH);
    let found = format!("{} of {} kept free", kib(kept), kib(ram));
    if kept >= wanted {
        return Finding::ok(check, found);
    }
    Finding::warn(check, found, format!("run 'sysctl vm.min_free_kbytes={wanted}'"))
}

fn kib(count: u64) -> Human {
    Human(count.saturating_mul(1024))
}
