//! `touch`: how long a program waits for a page that is swapped out.
//!
//! Fills its memory, then touches pages at random, nine of ten in a hot set that lies scattered. Each
//! touch is timed by itself, and counts as a fault if the kernel counted a major one in it: then the
//! page had to be fetched from the swap device. Pages that readahead had brought already, or that
//! were on their way out still, are minor faults or none; a limit in time instead would let a slow
//! hit in and leave a fast miss out. After it is timed the page is verified in full, and three in
//! ten are rewritten.
//!
//! The last line on standard output is `touch: touches=N faults=N minor=N mean_ns=N p50_ns=N p99_ns=N
//! clock_ns=N errors=N seconds=T`; `clock_ns` is what reading the clock adds to each of them.

use crate::Outcome;
use crate::args::Args;
use crate::checked::Checked;
use crate::pattern::{Mix, Pattern, Random};
use std::io::Error;
use std::time::Instant;

const HOT_TOUCHES: u64 = 90;
const REWRITES: u64 = 30;
/// Readings of the clock that tell what one costs.
const CLOCK_READINGS: u32 = 1000;

/// Faults of this thread so far.
#[derive(Clone, Copy)]
struct Faults {
    major: i64,
    minor: i64,
}

/// Runs the subcommand.
pub fn run(mut args: Args) -> Outcome {
    let bytes = args.size("memory")?.ok_or("how much? --memory SIZE")?;
    let touches: usize = args.number("touches", 0)?;
    let hot: f64 = args.number("hot", 0.2)?;
    let seed = args.number("seed", 1)?;
    let mix = args.text("fill").map_or(Ok(Mix::default()), |text| Mix::parse(&text))?;
    args.finish()?;
    if !(0.0..=1.0).contains(&hot) {
        return Err("--hot is a fraction, 0 to 1".to_owned());
    }
    let started = Instant::now();
    // Written now, so that it is locked in memory with all else that is not under test.
    let mut times = vec![u32::MAX; touches];
    let mut memory = Checked::new(bytes, Pattern { seed, mix })?;
    let mut random = Random::new([seed, memory.pages, 3]);
    let hot = ((memory.pages as f64 * hot) as u64).max(1);
    memory.fill();

    let (mut major, mut minor) = (0, 0);
    for _ in 0..touches {
        let number = match random.below(100) < HOT_TOUCHES {
            true => random.below(hot) * memory.pages / hot,
            false => random.below(memory.pages),
        };
        let before = faults()?;
        let touched = Instant::now();
        memory.touch(number);
        let time = touched.elapsed();
        let after = faults()?;
        if after.major > before.major {
            times[major] = time.as_nanos().try_into().unwrap_or(u32::MAX);
            major += 1;
        } else if after.minor > before.minor {
            minor += 1;
        }
        memory.verify(number);
        if random.below(100) < REWRITES {
            memory.write(number);
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let times = &mut times[..major];
    times.sort_unstable();
    println!(
        "touch: touches={touches} faults={major} minor={minor} mean_ns={} p50_ns={} p99_ns={} \
         clock_ns={} errors={} seconds={seconds:.1}",
        times.iter().map(|&time| u64::from(time)).sum::<u64>() / (major as u64).max(1),
        share(times, 50),
        share(times, 99),
        clock_ns(),
        memory.errors
    );
    Ok(memory.errors == 0)
}

/// The value that so many per cent of the sorted ones do not exceed; 0 if there are none.
fn share(sorted: &[u32], per_cent: usize) -> u32 {
    let rank = (sorted.len() * per_cent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0)
}

fn clock_ns() -> u128 {
    let started = Instant::now();
    for _ in 0..CLOCK_READINGS {
        std::hint::black_box(Instant::now());
    }
    started.elapsed().as_nanos() / u128::from(CLOCK_READINGS)
}

fn faults() -> Result<Faults, String> {
    // SAFETY: the kernel fills in a structure of ours, for which zeros are valid.
    let (refused, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::getrusage(libc::RUSAGE_THREAD, &mut usage), usage)
    };
    match refused {
        0 => Ok(Faults { major: usage.ru_majflt, minor: usage.ru_minflt }),
        _ => Err(format!("getrusage: {}", Error::last_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let hundred: Vec<u32> = (1..=100).collect();
        assert_eq!([share(&hundred, 50), share(&hundred, 99)], [50, 99]);
        assert_eq!([share(&[7], 50), share(&[7], 99)], [7, 7]);
        assert_eq!(share(&[], 50), 0);
    }
}
