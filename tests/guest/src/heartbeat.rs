//! Programs that stay awake while everything else waits for memory: both are locked in memory.

use crate::Outcome;
use crate::args::Args;
use crate::memory::{LockAll, lock_all};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const BEAT: Duration = Duration::from_millis(100);

static ENOUGH: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_: libc::c_int) {
    ENOUGH.store(true, Ordering::Relaxed);
}

/// Beats ten times a second until SIGTERM, then reports the longest time between two beats:
/// `heartbeat: beats=N longest_gap_ms=M`. With `--log` each beat also writes its time to a file.
pub fn heartbeat(mut args: Args) -> Outcome {
    let log = args.text("log");
    args.finish()?;
    let mut log = match log {
        Some(path) => Some(File::create(&path).map_err(|e| format!("{path}: {e}"))?),
        None => None,
    };
    lock_all(LockAll::PresentAndFuture)?;
    // SAFETY: the handler only stores to an atomic.
    unsafe { libc::signal(libc::SIGTERM, stop as *const () as usize) };
    let started = Instant::now();
    let (mut beats, mut last, mut longest) = (0u64, started, Duration::ZERO);
    while !ENOUGH.load(Ordering::Relaxed) {
        std::thread::sleep(BEAT);
        let now = Instant::now();
        longest = longest.max(now - last);
        last = now;
        beats += 1;
        if let Some(log) = &mut log {
            writeln!(log, "{:.1}", (now - started).as_secs_f64()).map_err(|e| e.to_string())?;
        }
    }
    println!("heartbeat: beats={beats} longest_gap_ms={}", longest.as_millis());
    Ok(true)
}

/// Sleeps, then has the kernel print its memory and every blocked task on its console.
pub fn watchdog(mut args: Args) -> Outcome {
    let seconds = args.number("after", 0)?;
    args.finish()?;
    lock_all(LockAll::PresentAndFuture)?;
    std::thread::sleep(Duration::from_secs(seconds));
    for key in ["m", "w"] {
        std::fs::write("/proc/sysrq-trigger", key).map_err(|e| format!("sysrq {key}: {e}"))?;
    }
    Ok(true)
}
