//! `pause`: runs a command again and again while a block device is read, and says how long reads stood still for each.
//!
//! One thread reads single pages of the device, past the page cache, one after the other. What counts for a run is the
//! longest that one of them took. The last line is `pause: count=N p50_ms=A p99_ms=B longest_ms=C quiet_ms=D`, where D is the longest read in
//! as much time without the command.

use crate::Outcome;
use crate::args::Args;
use crate::memory::{LockAll, lock_all};
use crate::pattern::{PAGE, Page, Random};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

/// How long to go on reading after the command, and between two of them.
const REST: Duration = Duration::from_secs(1);

/// What reads into, aligned as direct I/O wants it.
#[repr(align(4096))]
struct Buffer(Page);

/// Runs the subcommand.
pub fn run(mut args: Args) -> Outcome {
    let path = args.text("path").ok_or("which device? --path DEVICE")?;
    let pages: u64 = args.number("pages", 1)?;
    let count: usize = args.number("count", 1)?;
    let command = args.text("run").ok_or("what shall be run? --run 'PROGRAM ARGUMENTS'")?;
    args.finish()?;
    if count == 0 || pages == 0 {
        return Err("--count and --pages are at least 1".to_owned());
    }
    let words: Vec<&str> = command.split_whitespace().collect();
    let (program, arguments) = words.split_first().ok_or("--run: there is no program")?;
    let mut options = File::options();
    let file = options.read(true).custom_flags(libc::O_DIRECT).open(&path);
    let file = file.map_err(|error| format!("{path}: {error}"))?;
    // It must not wait for a page of its own.
    lock_all(LockAll::PresentAndFuture)?;
    let (longest, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut times = Vec::with_capacity(count);
    let mut quiet = 0;
    let outcome = scope(|scope| {
        let reader = scope.spawn(|| read(&file, pages, &longest, &is_over));
        let mut rounds = || {
            for round in 0..=count {
                sleep(REST);
                // Whatever is under way counts for what comes.
                let before = longest.swap(0, Ordering::Relaxed);
                if round > 0 {
                    quiet = quiet.max(before);
                    let status = Command::new(program).args(arguments).status();
                    let status = status.map_err(|error| format!("{program}: {error}"))?;
                    if !status.success() {
                        return Err(format!("run {round} of '{command}': {status}"));
                    }
                    sleep(REST);
                    times.push(longest.swap(0, Ordering::Relaxed));
                }
            }
            Ok(())
        };
        let ran = rounds();
        is_over.store(true, Ordering::Relaxed);
        let read = reader.join().map_err(|_| "the reader died".to_owned())?;
        ran.and(read.map_err(|error| format!("{path}: {error}")))
    });
    outcome?;
    times.sort_unstable();
    let ms = |us: u64| us as f64 / 1000.0;
    let at = |share: usize| ms(times[(times.len() - 1) * share / 100]);
    println!(
        "pause: count={count} p50_ms={:.1} p99_ms={:.1} longest_ms={:.1} quiet_ms={:.1}",
        at(50),
        at(99),
        at(100),
        ms(quiet)
    );
    Ok(true)
}

/// Reads until it is over, and notes the longest that a read takes, in microseconds.
fn read(file: &File, pages: u64, longest: &AtomicU64, is_over: &AtomicBool) -> io::Result<()> {
    let mut buffer = Box::new(Buffer([0; PAGE]));
    let mut random = Random::new([1, pages, 0]);
    while !is_over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        file.read_exact_at(&mut buffer.0, random.below(pages) * PAGE as u64)?;
        longest.fetch_max(begun.elapsed().as_micros() as u64, Ordering::Relaxed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::parse;

    fn pause(path: &str, command: &str) -> Outcome {
        let words = ["--path", path, "--count", "2", "--pages", "1", "--run", command];
        run(parse(words.map(str::to_owned).into_iter())?)
    }

    #[test]
    fn what_cannot_be_run_or_read_is_an_error() {
        let path = std::env::current_exe().unwrap();
        let path = path.to_str().unwrap();
        assert_eq!(pause(path, "true"), Ok(true));
        assert!(pause(path, "false").unwrap_err().contains("run 1"));
        assert!(pause("/proc/self/none", "true").is_err());
    }
}
