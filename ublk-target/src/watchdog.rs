//! Whether the worker serves, as the kernel sees it; as long as it does, its heart beats ([`pulse`](crate::supervisor::pulse)). When
//! that stops, its supervisor kills it, and another goes on.
//!
//! Threads that run prove nothing: what counts is that requests come to an end. So the devices are looked at from
//! outside, by what the kernel counts of them. A device is stuck if requests wait in it and none has ended since the last look. That
//! covers every thread that serves (queues, helpers, NBD's workers), whatever they may wait for. A request can take long rightly only
//! if it reads from the backing file, so reads do not count where there is one; nor does a device by NBD while that file is slow, for there all waits that
//! comes behind many such reads. The supply thread is not asked for: it
//! may wait for memory as long as there is none, writes fail then and reads go on, and another worker would fare no better.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::process;
use crate::supervisor::pulse::Heart;

/// How often it is looked. The heart stops only when all looks for a minute have found a device stuck, or there was none.
const LOOK_PERIOD: Duration = Duration::from_secs(5);

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

/// Has the process's heart beat as long as it serves, until it is dropped.
pub struct Watchdog {
    /// Dropped to end the thread.
    alive: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Begins to watch. Without it the heart stops soon.
    pub fn start(watched: Arc<dyn Watched>, heart: Arc<Heart>) -> io::Result<Self> {
        let (alive, end) = channel();
        let watch = move || {
            // Who judges others must get to run as they do, and to memory before them.
            process::become_server();
            let _ = process::become_urgent();
            let mut watcher = Watcher::default();
            let mut was_stuck = None;
            loop {
                let stuck = look(&mut watcher, &*watched, &heart);
                if let Some(path) = stuck.as_ref().filter(|_| stuck != was_stuck) {
                    process::note(format_args!(
                        "{path} has not ended any request for {} s",
                        LOOK_PERIOD.as_secs()
                    ));
                }
                was_stuck = stuck;
                if end.recv_timeout(LOOK_PERIOD) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        let thread = process::spawn_essential("tmem-watchdog".into(), watch)?;
        Ok(Self { alive: Some(alive), thread: Some(thread) })
    }
}

/// Looks once, and returns what is stuck.
fn look(watcher: &mut Watcher, watched: &dyn Watched, heart: &Heart) -> Option<String> {
    let stuck = watcher.look(&watched.pulses(), watched.reads_from_disk());
    if stuck.is_none() {
        heart.is_well();
    }
    stuck
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
    use std::sync::atomic::{AtomicU64, Ordering};

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

    struct Writes {
        ended: AtomicU64,
    }

    impl Watched for Writes {
        fn pulses(&self) -> Vec<Pulse> {
            vec![pulse("a", 0, 1, self.ended.load(Ordering::Relaxed))]
        }

        fn reads_from_disk(&self) -> bool {
            true
        }
    }

    #[test]
    fn the_heart_beats_as_long_as_requests_end() {
        let (writes, heart) = (Writes { ended: AtomicU64::new(0) }, Heart::default());
        let mut watcher = Watcher::default();
        for is_ending in [true, false, true] {
            for _ in 0..100 {
                writes.ended.fetch_add(u64::from(is_ending), Ordering::Relaxed);
                assert_eq!(look(&mut watcher, &writes, &heart).is_none(), is_ending);
                heart.beats();
            }
            assert_eq!(heart.beats(), is_ending);
        }
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
