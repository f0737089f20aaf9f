//! What `tmem list` and `tmem stats` show, under the names that zramctl gave such columns.
//!
//! The rows of `tmem stats` are read from the daemon's report; `control/report.rs` says what each
//! figure is. For people a few lines about the pool as a whole follow the table; scripts that ask
//! for columns, for a raw table or for one without headings get the table alone.

use std::fmt;
use std::io;

use serde::Deserialize;
use serde_json::Value;
use tmem::PAGE_SIZE;

use crate::cli::TableArgs;
use crate::control::REPORT_VERSION;
use crate::daemon::{DeviceInfo, DeviceState, TOTAL};
use crate::exit::{Exit, Failure};
use crate::size::Human;
use crate::table::{Cell, Column, Style, ratio, render, select};

/// Bytes of what the report counts as segments of the backing file.
const SEGMENT_BYTES: u64 = 1 << 20;

/// What `tmem list` shows if not told otherwise.
const DEVICE_DEFAULT: &[&str] = &["NAME", "TYPE", "PATH", "DISKSIZE", "MOUNTPOINT"];

/// What `tmem list` can show.
pub const DEVICE_COLUMNS: &[Column<DeviceInfo>] = &[
    Column {
        name: "NAME",
        help: "the name to use with tmem",
        cell: |device| Cell::Word(device.name.clone()),
    },
    Column { name: "TYPE", help: "swap", cell: |device| Cell::Word(device.kind.clone()) },
    Column {
        name: "PATH",
        help: "device node, or the URI of a device that has none",
        cell: |device| Cell::Word(device.path.clone()),
    },
    Column {
        name: "URI",
        help: "where it is exported by NBD",
        cell: |device| device.uri.clone().map_or(Cell::None, Cell::Word),
    },
    Column {
        name: "CONNECTIONS",
        help: "NBD connections that use it, the kernel's included",
        cell: |device| Cell::Count(device.connections.into()),
    },
    Column {
        name: "DISKSIZE",
        help: "most data that the device holds",
        cell: |device| Cell::Size(device.bytes),
    },
    Column {
        name: "QUEUES",
        help: "hardware queues, each with a thread of its own",
        cell: |device| Cell::Count(device.queues.into()),
    },
    Column {
        name: "DEPTH",
        help: "requests that a queue holds",
        cell: |device| Cell::Count(device.depth.into()),
    },
    Column {
        name: "MOUNTPOINT",
        help: "[SWAP] if the kernel swaps to it",
        cell: |device| mountpoint(Some(device.swapped_on)),
    },
    Column {
        name: "STATE",
        help: "live; dead: its node is of no use",
        cell: |device| Cell::Word(device.state.as_str().to_owned()),
    },
    Column {
        name: "WORKER",
        help: "process that serves it",
        cell: |device| Cell::Count(device.worker_pid.into()),
    },
    Column {
        name: "TAKEOVERS",
        help: "times that another process went on for one that had ended",
        cell: |device| Cell::Count(device.takeovers),
    },
];

/// What `tmem stats` shows if not told otherwise.
const USAGE_DEFAULT: &[&str] = &[
    "NAME",
    "DISKSIZE",
    "DATA",
    "COMPR",
    "TOTAL",
    "COMP-RATIO",
    "MEM-LIMIT",
    "MEM-USED",
    "MOUNTPOINT",
];

/// What `tmem stats` can show.
pub const USAGE_COLUMNS: &[Column<Usage>] = &[
    Column { name: "NAME", help: "device, or total", cell: |row| Cell::Word(row.name.clone()) },
    Column {
        name: "PATH",
        help: "device node",
        cell: |row| row.path.clone().map_or(Cell::None, Cell::Word),
    },
    Column {
        name: "DISKSIZE",
        help: "most data that the device holds",
        cell: |row| row.bytes.map_or(Cell::None, Cell::Size),
    },
    Column {
        name: "DATA",
        help: "data held, uncompressed",
        cell: |row| Cell::Size(row.orig_data_size),
    },
    Column {
        name: "COMPR",
        help: "data held, compressed",
        cell: |row| Cell::Size(row.compr_data_size),
    },
    Column {
        name: "ALGORITHM",
        help: "what compresses it",
        // The engine has no other.
        cell: |_| Cell::Word("lz4".to_owned()),
    },
    Column {
        name: "STREAMS",
        help: "queues, each of which compresses by itself",
        cell: |row| row.queues.map_or(Cell::None, |queues| Cell::Count(queues.into())),
    },
    Column {
        name: "ZERO-PAGES",
        help: "pages of one repeated word, zeros or any other, which take no memory",
        cell: |row| Cell::Count(row.same_pages),
    },
    Column {
        name: "TOTAL",
        help: "memory it takes, overhead included; of a device, its share by COMPR",
        cell: |row| Cell::Size(row.mem_used_total),
    },
    Column {
        name: "COMP-RATIO",
        help: "DATA/TOTAL",
        cell: |row| Cell::Ratio(row.orig_data_size, row.mem_used_total),
    },
    Column {
        name: "MEM-LIMIT",
        help: "pool limit, which all devices share",
        cell: |row| Cell::Size(row.mem_limit),
    },
    Column {
        name: "MEM-USED",
        help: "most memory that all devices have taken",
        cell: |row| Cell::Size(row.mem_used_max),
    },
    Column {
        name: "MIGRATED",
        help: "frames rewritten to close their holes; of all devices together",
        cell: |row| row.migrated().map_or(Cell::None, Cell::Count),
    },
    Column {
        name: "HUGE-PAGES",
        help: "pages held as they are, because they do not compress",
        cell: |row| Cell::Count(row.huge_pages),
    },
    Column {
        name: "BACKED",
        help: "pages that are on the backing file alone",
        cell: |row| Cell::Count(row.bd_count),
    },
    Column {
        name: "BD-READS",
        help: "pages read back from the backing file",
        cell: |row| Cell::Count(row.bd_reads),
    },
    Column {
        name: "BD-WRITES",
        help: "pages written to the backing file",
        cell: |row| Cell::Count(row.bd_writes),
    },
    Column { name: "PUTS", help: "pages written", cell: |row| Cell::Count(row.succ_puts) },
    Column { name: "GETS", help: "pages read and found", cell: |row| Cell::Count(row.succ_gets) },
    Column {
        name: "FAILED",
        help: "pages whose write failed, each time that it did",
        cell: |row| Cell::Count(row.failed_puts + row.given_up_puts),
    },
    Column {
        name: "LOST",
        help: "pages that a failed write has lost",
        cell: |row| Cell::Count(row.lost_pages),
    },
    Column {
        name: "MOUNTPOINT",
        help: "[SWAP] if the kernel swaps to it",
        cell: |row| mountpoint(row.swapped_on),
    },
];

fn mountpoint(swapped_on: Option<bool>) -> Cell {
    if swapped_on == Some(true) { Cell::Word("[SWAP]".to_owned()) } else { Cell::None }
}

/// A row of `tmem stats`: a device, or all of them together.
#[derive(Debug, Deserialize)]
pub struct Usage {
    #[serde(default = "total_name")]
    name: String,
    path: Option<String>,
    bytes: Option<u64>,
    queues: Option<u32>,
    swapped_on: Option<bool>,
    orig_data_size: u64,
    compr_data_size: u64,
    mem_used_total: u64,
    mem_limit: u64,
    mem_used_max: u64,
    same_pages: u64,
    huge_pages: u64,
    bd_count: u64,
    bd_reads: u64,
    bd_writes: u64,
    succ_puts: u64,
    succ_gets: u64,
    failed_puts: u64,
    given_up_puts: u64,
    lost_pages: u64,
    eph_compacted_pageframes: Option<u64>,
    pers_compacted_pageframes: Option<u64>,
    io: Option<Io>,
}

/// What is needed of a device's I/O counters.
#[derive(Debug, Deserialize)]
struct Io {
    deferred_writes: u64,
}

impl Usage {
    /// The total's compacted frames; a frame is no single device's.
    fn migrated(&self) -> Option<u64> {
        Some(self.eph_compacted_pageframes? + self.pers_compacted_pageframes?)
    }
}

/// The report has the total under its own key, so it has no name there.
fn total_name() -> String {
    TOTAL.to_owned()
}

/// What the lines below the table need of the total.
#[derive(Debug, Deserialize)]
struct Pool {
    orig_data_size: u64,
    mem_used_total: u64,
    mem_used_max: u64,
    mem_limit: u64,
    frames_allocated: u64,
    frames_free: u64,
    frames_ephemeral: u64,
    frames_persistent: u64,
    frames_reserve: u64,
    failed_puts: u64,
    given_up_puts: u64,
    lost_gets: u64,
    corrupt_gets: u64,
    put_latency: Latency,
    get_latency: Latency,
    bd_count: u64,
    bd_reads: u64,
    bd_errors: u64,
    log_segments: u64,
    log_segments_free: u64,
    log_written_bytes: u64,
    log_cleaner_written_bytes: u64,
    log_failed_jobs: u64,
    backing_path: Option<String>,
    backing_state: Option<String>,
    backing_errno: Option<i32>,
    worker_pid: u32,
    takeovers: u64,
    takeover_ns_last: u64,
    takeover_requests_last: u64,
    has_supervisor: bool,
}

#[derive(Debug, Deserialize)]
struct Latency {
    count: u64,
    p50_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
}

/// The devices as `args` want them shown.
pub fn devices(devices: &[DeviceInfo], args: &TableArgs) -> Result<String, Failure> {
    if args.json {
        let report = serde_json::json!({ "version": REPORT_VERSION, "devices": devices });
        return Ok(json(&report));
    }
    let columns = chosen(DEVICE_COLUMNS, DEVICE_DEFAULT, args)?;
    let mut text = render(&columns, devices, style(args));
    if !is_for_a_script(args) {
        text.extend(devices.iter().filter_map(warning));
    }
    Ok(text)
}

/// What a person must know of a device that is not well.
fn warning(device: &DeviceInfo) -> Option<String> {
    let DeviceInfo { name, path, .. } = device;
    let trouble = match device.state {
        DeviceState::Live => return None,
        DeviceState::Dead if device.swapped_on => {
            "nothing reaches it any more, and what is swapped out to it cannot be read: reboot"
                .into()
        }
        DeviceState::Dead => format!("nothing reaches it any more: `tmem del {name}`"),
    };
    Some(format!("warning: {name} ({path}): {trouble}\n"))
}

/// A report as `args` want it shown.
pub fn stats(report: &Value, args: &TableArgs) -> Result<String, Failure> {
    if report["version"] != REPORT_VERSION {
        return Err(unreadable("it is of another version"));
    }
    if args.json {
        return Ok(json(report));
    }
    let columns = chosen(USAGE_COLUMNS, USAGE_DEFAULT, args)?;
    let mut rows = Vec::<Usage>::deserialize(&report["devices"]).map_err(unreadable)?;
    let mut total = Usage::deserialize(&report["total"]).map_err(unreadable)?;
    total.bytes = Some(rows.iter().filter_map(|row| row.bytes).sum());
    let deferred = rows.iter().filter_map(|row| row.io.as_ref()).map(|io| io.deferred_writes).sum();
    rows.push(total);
    let mut text = render(&columns, &rows, style(args));
    if !is_for_a_script(args) {
        let pool = Pool::deserialize(&report["total"]).map_err(unreadable)?;
        text.push_str(&summary(&pool, deferred, args.bytes));
        text.extend(backing(&pool, args.bytes));
        text.extend(serving(&pool));
        let devices = Vec::<DeviceInfo>::deserialize(&report["devices"]).map_err(unreadable)?;
        text.extend(devices.iter().filter_map(warning));
    }
    Ok(text)
}

/// Whether the table is wanted, and nothing else.
fn is_for_a_script(args: &TableArgs) -> bool {
    args.raw || args.noheadings || args.output_all || !args.output.is_empty()
}

/// The lines below the table. `deferred` writes had to wait.
fn summary(pool: &Pool, deferred: u64, bytes: bool) -> String {
    let size = |value: u64| if bytes { value.to_string() } else { Human(value).to_string() };
    let frames = pool.frames_allocated * PAGE_SIZE as u64;
    format!(
        "\npool:   {} of {} taken, {} at most so far; holds {} times as much data\n\
         frames: {} ({}): {} free, {} ephemeral, {} persistent, {} in reserve\n\
         puts:   {}\n\
         gets:   {}\n\
         errors: {} puts failed, {} gets lost, {} gets corrupt; \
         {deferred} writes waited for memory\n",
        size(pool.mem_used_total),
        size(pool.mem_limit),
        size(pool.mem_used_max),
        ratio(pool.orig_data_size, pool.mem_used_total),
        pool.frames_allocated,
        size(frames),
        pool.frames_free,
        pool.frames_ephemeral,
        pool.frames_persistent,
        pool.frames_reserve,
        pool.put_latency,
        pool.get_latency,
        pool.failed_puts + pool.given_up_puts,
        pool.lost_gets,
        pool.corrupt_gets,
    )
}

/// The line about who serves, if that is not as it was at the start.
fn serving(pool: &Pool) -> Option<String> {
    let count = (pool.takeovers > 0).then(|| {
        let last = duration(pool.takeover_ns_last);
        let Pool { takeovers, takeover_requests_last: requests, .. } = pool;
        format!(", in the place of {takeovers} that ended, the last time after {last}, for which {requests} requests waited")
    });
    let supervisor = (!pool.has_supervisor)
        .then_some("; without a supervisor: if it dies twice, nobody goes on (see 'tmem recover')");
    if count.is_none() && supervisor.is_none() {
        return None;
    }
    let (count, supervisor) = (count.unwrap_or_default(), supervisor.unwrap_or_default());
    Some(format!("served: by pid {}{count}{supervisor}\n", pool.worker_pid))
}

/// The line about the backing file, if there is one.
fn backing(pool: &Pool, bytes: bool) -> Option<String> {
    let path = pool.backing_path.as_ref()?;
    let size = |value: u64| if bytes { value.to_string() } else { Human(value).to_string() };
    let used = pool.log_segments.saturating_sub(pool.log_segments_free);
    let error = pool.backing_errno.filter(|errno| *errno != 0).map(io::Error::from_raw_os_error);
    Some(format!(
        "backing: {path} ({}): {} of {} in use, for {} pages; {} written, {} of these in cleaning, \
         {} pages read back and {} that could not be, {} jobs failed{}\n",
        pool.backing_state.as_deref().unwrap_or("unknown"),
        size(used * SEGMENT_BYTES),
        size(pool.log_segments * SEGMENT_BYTES),
        pool.bd_count,
        size(pool.log_written_bytes + pool.log_cleaner_written_bytes),
        size(pool.log_cleaner_written_bytes),
        pool.bd_reads,
        pool.bd_errors,
        pool.log_failed_jobs,
        error.map(|error| format!("; last error: {error}")).unwrap_or_default(),
    ))
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Latency { count, p50_ns, p99_ns, p999_ns } = *self;
        if count == 0 {
            return f.write_str("none yet");
        }
        let [p50, p99, p999] = [p50_ns, p99_ns, p999_ns].map(duration);
        write!(f, "{count} pages, median {p50}, p99 {p99}, p99.9 {p999}")
    }
}

/// Nanoseconds as people read them, with one decimal, rounded down.
fn duration(ns: u64) -> String {
    let (unit, name) = match ns {
        0..1_000 => return format!("{ns}ns"),
        1_000..1_000_000 => (1_000, "us"),
        1_000_000..1_000_000_000 => (1_000_000, "ms"),
        _ => (1_000_000_000, "s"),
    };
    format!("{}.{}{name}", ns / unit, ns % unit * 10 / unit)
}

fn chosen<'a, T>(
    columns: &'a [Column<T>],
    default: &[&str],
    args: &TableArgs,
) -> Result<Vec<&'a Column<T>>, Failure> {
    if args.output_all {
        Ok(columns.iter().collect())
    } else if args.output.is_empty() {
        select(columns, default)
    } else {
        select(columns, &args.output)
    }
}

fn style(args: &TableArgs) -> Style {
    Style { bytes: args.bytes, noheadings: args.noheadings, raw: args.raw }
}

fn json(value: &Value) -> String {
    format!("{value:#}\n")
}

fn unreadable(reason: impl fmt::Display) -> Failure {
    let message = format!(
        "the daemon's report cannot be read: {reason}; use the tmem that the daemon was started \
         from, or --json"
    );
    Failure::new(Exit::Failure, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report;
    use crate::daemon::{DaemonStats, DeviceStats};
    use crate::device::IoStats;

    fn info() -> DeviceInfo {
        DeviceInfo {
            name: "swap0".into(),
            kind: "swap".into(),
            path: "/dev/ublkb0".into(),
            uri: None,
            connections: 0,
            bytes: 4 << 30,
            queues: 2,
            depth: 128,
            swapped_on: true,
            state: DeviceState::Live,
            worker_pid: 77,
            takeovers: 3,
        }
    }

    fn a_report() -> Value {
        let (pool, latencies) = (tmem::PoolCounters::default(), tmem::Latencies::default());
        let mut device = DeviceStats { info: info(), pool, latencies, io: IoStats::default() };
        device.pool.orig_data_size = 300 << 20;
        device.pool.compr_data_size = 100 << 20;
        device.pool.same_pages = 5;
        device.pool.bd_count = 7;
        device.pool.bd_reads = 1;
        device.pool.bd_errors = 2;
        device.pool.bd_writes = 9;
        device.pool.failed_puts = 20;
        device.pool.given_up_puts = 3;
        device.pool.starved_puts = 1000;
        device.io.deferred_writes = 4;
        let mut stats = DaemonStats { devices: vec![device], ..DaemonStats::default() };
        stats.total.pools = stats.devices[0].pool;
        stats.serving.has_supervisor = true;
        // There was a device that is removed now.
        stats.total.pools.given_up_puts += 1;
        stats.total.eph.compacted_pageframes = 8;
        stats.total.pers.compacted_pageframes = 2;
        stats.total.mem_used_total = 110 << 20;
        stats.total.mem_used_max = 120 << 20;
        stats.total.mem_limit = 2 << 30;
        stats.total.frames.frames_allocated = 256;
        stats.total.latencies.put_latency.count = 7;
        stats.total.latencies.put_latency.p99_ns = 1_550;
        report(&stats)
    }

    fn args() -> TableArgs {
        TableArgs::default()
    }

    #[test]
    fn list_shows_devices() {
        assert_eq!(
            devices(&[info()], &args()).unwrap(),
            "NAME  TYPE PATH        DISKSIZE MOUNTPOINT\nswap0 swap /dev/ublkb0       4G [SWAP]\n"
        );
        let all = TableArgs { output_all: true, raw: true, bytes: true, ..args() };
        assert_eq!(
            devices(&[info()], &all).unwrap(),
            "NAME TYPE PATH URI CONNECTIONS DISKSIZE QUEUES DEPTH MOUNTPOINT STATE WORKER TAKEOVERS\n\
             swap0 swap /dev/ublkb0 - 0 4294967296 2 128 [SWAP] live 77 3\n"
        );
    }

    #[test]
    fn a_device_that_nothing_reaches_is_warned_of() {
        let list = |device: &DeviceInfo, args: &TableArgs| {
            devices(std::slice::from_ref(device), args).unwrap()
        };
        let live = DeviceInfo { path: "/dev/nbd0".into(), connections: 1, ..info() };
        assert!(!list(&live, &args()).contains("warning"));
        let dead = DeviceInfo { connections: 0, state: DeviceState::Dead, ..live };
        let text = list(&dead, &args());
        assert!(text.ends_with("what is swapped out to it cannot be read: reboot\n"), "{text}");
        let raw = TableArgs { raw: true, ..args() };
        assert!(!list(&dead, &raw).contains("warning"));

        let mut of_stats = a_report();
        of_stats["devices"][0]["state"] = "dead".into();
        let text = stats(&of_stats, &args()).unwrap();
        assert!(text.contains("\nwarning: swap0 (/dev/ublkb0): nothing reaches it"), "{text}");
        let unused = DeviceInfo { swapped_on: false, ..dead };
        assert!(list(&unused, &args()).ends_with("`tmem del swap0`\n"));
    }

    #[test]
    fn stats_shows_devices_the_total_and_the_pool() {
        let text = stats(&a_report(), &args()).unwrap();
        let mut lines = text.lines();
        assert_eq!(
            lines.next().unwrap(),
            "NAME  DISKSIZE DATA COMPR TOTAL COMP-RATIO MEM-LIMIT MEM-USED MOUNTPOINT"
        );
        let row = "swap0       4G 300M  100M  110M       2.72        2G     120M [SWAP]";
        assert_eq!(lines.next().unwrap(), row);
        let row = "total       4G 300M  100M  110M       2.72        2G     120M -";
        assert_eq!(lines.next().unwrap(), row);
        assert!(text.contains("\npool:   110M of 2G taken, 120M at most so far"), "{text}");
        assert!(text.contains("\nframes: 256 (1M): 0 free"), "{text}");
        assert!(text.contains("puts:   7 pages, median 0ns, p99 1.5us"), "{text}");
        assert!(text.contains("\ngets:   none yet\n"), "{text}");
        let errors =
            "errors: 24 puts failed, 0 gets lost, 0 gets corrupt; 4 writes waited for memory";
        assert_eq!(text.lines().last(), Some(errors));
    }

    #[test]
    fn who_serves_is_told_when_it_has_changed() {
        let mut report = a_report();
        assert!(!stats(&report, &args()).unwrap().contains("served:"));
        report["total"]["takeovers"] = 2.into();
        report["total"]["takeover_ns_last"] = 12_300_000.into();
        report["total"]["takeover_requests_last"] = 9.into();
        report["total"]["worker_pid"] = 77.into();
        let line = "\nserved: by pid 77, in the place of 2 that ended, the last time after 12.3ms, for which 9 requests waited\n";
        assert!(stats(&report, &args()).unwrap().contains(line));
        report["total"]["has_supervisor"] = false.into();
        assert!(stats(&report, &args()).unwrap().contains("waited; without a supervisor"));
    }

    #[test]
    fn zramctls_other_columns_are_there() {
        let output = "ALGORITHM,STREAMS,ZERO-PAGES,MIGRATED,FAILED";
        let output = output.split(',').map(str::to_owned).collect();
        let args = TableArgs { raw: true, noheadings: true, output, ..args() };
        assert_eq!(stats(&a_report(), &args).unwrap(), "lz4 2 5 - 23\nlz4 - 5 10 24\n");
    }

    #[test]
    fn the_backing_file_has_columns_and_a_line() {
        let mut report = a_report();
        let output = "BACKED,BD-READS,BD-WRITES".split(',').map(str::to_owned).collect();
        let columns = TableArgs { raw: true, noheadings: true, output, ..args() };
        assert_eq!(stats(&report, &columns).unwrap(), "7 1 9\n7 1 9\n");
        assert!(!stats(&report, &args()).unwrap().contains("backing:"));
        let total = &mut report["total"];
        total["backing_path"] = "/var/log".into();
        total["backing_state"] = "ok".into();
        total["backing_errno"] = 0.into();
        total["log_segments"] = 63.into();
        total["log_segments_free"] = 31.into();
        total["log_written_bytes"] = (5 << 20).into();
        total["log_cleaner_written_bytes"] = (1 << 20).into();
        let text = stats(&report, &args()).unwrap();
        let line = "\nbacking: /var/log (ok): 32M of 63M in use, for 7 pages; 6M written, \
                    1M of these in cleaning, 1 pages read back and 2 that could not be, 0 jobs failed\n";
        assert!(text.ends_with(line), "{text}");
        report["total"]["backing_state"] = "failing".into();
        report["total"]["backing_errno"] = libc::EIO.into();
        report["total"]["log_failed_jobs"] = 3.into();
        let text = stats(&report, &TableArgs { bytes: true, ..args() }).unwrap();
        assert!(text.contains("/var/log (failing): 33554432 of 66060288 in use"), "{text}");
        assert!(text.contains("3 jobs failed; last error: Input/output error"), "{text}");
    }

    #[test]
    fn scripts_get_the_table_alone() {
        let output = vec!["NAME".to_owned(), "DATA".to_owned()];
        let args = TableArgs { raw: true, noheadings: true, bytes: true, output, ..args() };
        assert_eq!(stats(&a_report(), &args).unwrap(), "swap0 314572800\ntotal 314572800\n");
    }

    #[test]
    fn json_is_the_whole_report() {
        let args = TableArgs { json: true, ..args() };
        let text = stats(&a_report(), &args).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), a_report());
        let list: Value = serde_json::from_str(&devices(&[info()], &args).unwrap()).unwrap();
        assert_eq!(list["devices"][0]["swapped_on"], true);
    }

    #[test]
    fn a_report_that_is_none_is_refused() {
        for report in [Value::Null, serde_json::json!({ "version": 1, "devices": 7 })] {
            assert_eq!(stats(&report, &args()).unwrap_err().code, Exit::Failure);
        }
    }

    #[test]
    fn the_default_columns_exist() {
        select(DEVICE_COLUMNS, DEVICE_DEFAULT).unwrap();
        select(USAGE_COLUMNS, USAGE_DEFAULT).unwrap();
    }

    #[test]
    fn durations() {
        assert_eq!(duration(999), "999ns");
        assert_eq!(duration(1_999), "1.9us");
        assert_eq!(duration(12_300_000), "12.3ms");
        assert_eq!(duration(u64::MAX), "18446744073.7s");
    }
}
