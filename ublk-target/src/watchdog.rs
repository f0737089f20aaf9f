//! Whether the daemon serves, as the kernel sees it; as long as it does, systemd's watchdog is told so.
//!
//! Threads that run prove nothing: what counts is that requests come to an end. So the devices are looked at from
//! outside, by what the kernel counts of them. A device is stuck if requests wait in it and none has ended since the last look. That
//! covers every thread that serves (queues, helpers, NBD's workers), whatever they may wait for. A request can take long rightly only
//! if it reads from the backing file, so reads do not count where there is one. The supply thread is not asked for: it
//! may wait for memory as long as there is none, writes fail then and reads go on, and a new daemon would fare no better.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;

use crate::log::log;
use crate::{notify, process};

/// How many looks there are in the time after which systemd takes us for dead. The daemon is killed if
/// all of them find it stuck.
const LOOKS: u32 = 4;

/// What the kernel counts of a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pulse {
    /// The device's node.
    pub path: String,
    /// Reads that wait.
    pub reads_waiting: u64,
    /// Writes and discards that wait.
    pub writes_waiting: u64,
    /// Requests that have ended.
    pub ended: u64,
}

impl Pulse {
    /// Reads it below `sys`; none if there is no such device.
    pub fn read(sys: &Path, node: &str) -> Option<Self> {
        let block = sys.join("block").join(node.trim_start_matches("/dev/"));
        let numbers = |file: &str| -> Option<Vec<u64>> {
            let text = std::fs::read_to_string(block.join(file)).ok()?;
            text.split_ascii_whitespace().map(|number| number.parse().ok()).collect()
        };
        let (waiting, stat) = (numbers("inflight")?, numbers("stat")?);
        // Reads, writes, discards and flushes; the last two came with later kernels.
        let ended = [0, 4, 11, 15].iter().filter_map(|&field| stat.get(field)).sum();
        Some(Self {
            path: node.to_owned(),
            reads_waiting: *waiting.first()?,
            writes_waiting: *waiting.get(1)?,
            ended,
        })
    }
}

/// What was seen at the last look.
#[derive(Debug, Default)]
struct Watcher {
    ended: HashMap<String, u64>,
}

impl Watcher {
    /// Looks again, and says which device is stuck. `slow_reads` is whether a read may take any time.
    fn look(&mut self, pulses: &[Pulse], slow_reads: bool) -> Option<String> {
        let stuck = pulses.iter().find(|pulse| {
            let reads = if slow_reads { 0 } else { pulse.reads_waiting };
            let waits = reads + pulse.writes_waiting > 0;
            waits && self.ended.get(&pulse.path) == Some(&pulse.ended)
        });
        let stuck = stuck.map(|pulse| pulse.path.clone());
        self.ended = pulses.iter().map(|pulse| (pulse.path.clone(), pulse.ended)).collect();
        stuck
    }
}

/// Who can be watched.
pub trait Watched: Send + Sync {
    /// The pulses of all devices. If the daemon's own locks are stuck, so is this.
    fn pulses(&self) -> Vec<Pulse>;

    /// Whether a read may wait for a disk.
    fn reads_from_disk(&self) -> bool;
}

/// Tells systemd that the daemon serves, until it is dropped. Nothing happens without `$WATCHDOG_USEC`.
pub struct Watchdog {
    /// Dropped to end the thread.
    alive: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Begins to watch.
    pub fn start(watched: Arc<dyn Watched>) -> Self {
        let Some(limit) = notify::watchdog_limit() else {
            return Self { alive: None, thread: None };
        };
        let period = limit / LOOKS;
        let (alive, end) = channel();
        let watch = move || {
            let mut watcher = Watcher::default();
            loop {
                match watcher.look(&watched.pulses(), watched.reads_from_disk()) {
                    None => notify::alive(),
                    Some(path) => log(format_args!(
                        "{path} has not ended any request for {} s: the watchdog is not told that it works",
                        period.as_secs()
                    )),
                }
                if end.recv_timeout(period) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        match process::spawn("tmem-watchdog".into(), watch) {
            Ok(thread) => Self { alive: Some(alive), thread: Some(thread) },
            Err(error) => {
                log(format_args!(
                    "cannot serve systemd's watchdog, which will end the daemon: {error}"
                ));
                Self { alive: None, thread: None }
            }
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.alive.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pulse(path: &str, reads_waiting: u64, writes_waiting: u64, ended: u64) -> Pulse {
        Pulse { path: path.into(), reads_waiting, writes_waiting, ended }
    }

    #[test]
    fn a_device_is_stuck_when_requests_wait_and_none_ends() {
        let mut watcher = Watcher::default();
        // At the first look nobody knows for how long they have waited.
        assert_eq!(watcher.look(&[pulse("a", 3, 3, 7)], false), None);
        assert_eq!(watcher.look(&[pulse("a", 3, 3, 7)], false).as_deref(), Some("a"));
        assert_eq!(watcher.look(&[pulse("a", 3, 3, 7)], false).as_deref(), Some("a"));
        assert_eq!(watcher.look(&[pulse("a", 3, 3, 8)], false), None);
        // Nothing to do is no fault.
        assert_eq!(watcher.look(&[pulse("a", 0, 0, 8)], false), None);
        assert_eq!(watcher.look(&[pulse("a", 0, 0, 8)], false), None);
    }

    #[test]
    fn each_device_is_looked_at() {
        let mut watcher = Watcher::default();
        watcher.look(&[pulse("a", 1, 0, 1), pulse("b", 0, 1, 1)], false);
        let stuck = watcher.look(&[pulse("a", 1, 0, 2), pulse("b", 0, 1, 1)], false);
        assert_eq!(stuck.as_deref(), Some("b"));
        // One that is removed and made anew is another.
        assert_eq!(watcher.look(&[], false), None);
        assert_eq!(watcher.look(&[pulse("b", 0, 1, 1)], false), None);
    }

    #[test]
    fn reads_may_take_long_where_a_disk_serves_them() {
        let mut watcher = Watcher::default();
        watcher.look(&[pulse("a", 5, 0, 1)], true);
        assert_eq!(watcher.look(&[pulse("a", 5, 0, 1)], true), None);
        assert_eq!(watcher.look(&[pulse("a", 5, 1, 1)], true).as_deref(), Some("a"));
    }

    #[test]
    fn the_kernels_figures_are_read() {
        let home = tempfile::tempdir().unwrap();
        let block = home.path().join("block/ublkb0");
        std::fs::create_dir_all(&block).unwrap();
        std::fs::write(block.join("inflight"), "       2        5\n").unwrap();
        let stat = "100 1 2 3 200 5 6 7 8 9 10 400 12 13 14 800 16\n";
        std::fs::write(block.join("stat"), stat).unwrap();
        let read = Pulse::read(home.path(), "/dev/ublkb0").unwrap();
        assert_eq!(read, pulse("/dev/ublkb0", 2, 5, 1500));
        std::fs::write(block.join("stat"), "100 1 2 3 200 5 6 7 8 9 10\n").unwrap();
        assert_eq!(Pulse::read(home.path(), "/dev/ublkb0").unwrap().ended, 300);
        assert_eq!(Pulse::read(home.path(), "/dev/ublkb1"), None);
    }
}
