//! `kill`: kills a process again and again, and measures how long it takes until another has its place.
//!
//! Processes are known by their names. None is killed before there is one that can go on. The last line is `kill: kills=N p50_ms=A p99_ms=B longest_ms=C`; it is there only
//! if each that was killed was succeeded.

use crate::Outcome;
use crate::args::Args;
use crate::memory::{LockAll, lock_all};
use crate::pattern::Random;
use std::fs;
use std::time::{Duration, Instant};

/// How long a place may be empty, and from when on the kernel is made to tell what everybody waits for.
const LIMIT: Duration = Duration::from_secs(120);
const SLOW: Duration = Duration::from_secs(30);

/// How often to look.
const PERIOD: Duration = Duration::from_millis(1);

/// Runs the subcommand.
pub fn run(mut args: Args) -> Outcome {
    let name = args.text("name").ok_or("whom? --name NAME")?;
    let other = args.text("while").ok_or("who can go on? --while NAME")?;
    let count: u64 = args.number("count", 1)?;
    let signal: i32 = args.number("signal", libc::SIGKILL)?;
    let (least, most): (u64, u64) = (args.number("least", 50)?, args.number("most", 2000)?);
    let mut random = Random::new([args.number("seed", 1)?, count, 0]);
    args.finish()?;
    if count == 0 || least > most {
        return Err("--count is at least 1, and --least at most --most".to_owned());
    }
    // It must not wait for what it has just killed.
    lock_all(LockAll::PresentAndFuture)?;
    let mut times = Vec::with_capacity(count as usize);
    let mut victim = wait_for(&name, None)?;
    for _ in 0..count {
        std::thread::sleep(Duration::from_millis(least + random.below(most - least + 1)));
        wait_for(&other, Some(victim))?;
        // SAFETY: the call has no memory of ours.
        if unsafe { libc::kill(victim, signal) } != 0 {
            return Err(format!(
                "pid {victim} is gone already: {}",
                std::io::Error::last_os_error()
            ));
        }
        let killed = Instant::now();
        victim = wait_for(&name, Some(victim))?;
        times.push(killed.elapsed().as_millis());
    }
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100];
    println!("kill: kills={count} p50_ms={} p99_ms={} longest_ms={}", at(50), at(99), at(100));
    Ok(true)
}

/// The process of that name, which is another than `old`.
fn wait_for(name: &str, old: Option<i32>) -> Result<i32, String> {
    let begun = Instant::now();
    let mut is_told = false;
    while begun.elapsed() < LIMIT {
        if let Some(pid) = find(name, old) {
            return Ok(pid);
        }
        if begun.elapsed() > SLOW && !is_told {
            is_told = true;
            for key in ["m", "t"] {
                // Without it, it is found out otherwise.
                let _ = fs::write("/proc/sysrq-trigger", key);
            }
        }
        std::thread::sleep(PERIOD);
    }
    Err(format!("there is no {name} after {LIMIT:?}"))
}

/// The process of that name, which is another than `old`.
pub fn find(name: &str, old: Option<i32>) -> Option<i32> {
    let processes = fs::read_dir("/proc").ok()?;
    processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).find(|pid| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm"));
        Some(*pid) != old && comm.is_ok_and(|comm| comm.trim_end() == name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_found_by_name() {
        let own = std::process::id() as i32;
        let name = fs::read_to_string(format!("/proc/{own}/comm")).unwrap();
        assert!(find(name.trim_end(), None).is_some());
        assert_ne!(find(name.trim_end(), Some(own)), Some(own));
        assert_eq!(find("no process has such a name", None), None);
    }
}
