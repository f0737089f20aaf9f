//! `pressure`: fills, touches, frees and forks more memory than the machine has, and verifies it.
//!
//! Every page is read and compared in full at least twice: after the fill and at the end. The last
//! line on standard output is `pressure: pages=N verified=M rewritten=K freed=F errors=E seconds=T`;
//! the run is good only if it is there with `errors=0` and the status is 0.

use crate::Outcome;
use crate::args::Args;
use crate::checked::Checked;
use crate::pattern::{Mix, Pattern, Random};
use std::io::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Of a hundred touches, how many go to the hot set, and how many of all rewrite the page.
const HOT_TOUCHES: u64 = 90;
const REWRITES: u64 = 30;
/// One page in so many is freed in a pass, in ranges of up to `FREE_RANGE` pages.
const FREED_SHARE: u64 = 20;
const FREE_RANGE: u64 = 700;
/// One page in so many is verified, and then rewritten, by a forked child in a pass.
const CHILD_VERIFIES: u64 = 8;
const CHILD_WRITES: u64 = 128;

struct Run {
    memory: Checked,
    random: Random,
    seed: u64,
    hot: u64,
    rewritten: u64,
    freed: u64,
    started: Instant,
}

/// Runs the subcommand.
pub fn run(mut args: Args) -> Outcome {
    let bytes = args.size("memory")?.ok_or("how much? --memory SIZE")?;
    let hot: f64 = args.number("hot", 0.2)?;
    let seconds: Option<u64> = args
        .text("seconds")
        .map(|s| s.parse())
        .transpose()
        .map_err(|_| "--seconds wants a number".to_owned())?;
    let passes: u64 = args.number("passes", 1)?;
    let touches: f64 = args.number("touches", 1.0)?;
    let seed = args.number("seed", 1)?;
    let mix = args.text("fill").map_or(Ok(Mix::default()), |text| Mix::parse(&text))?;
    let until = args.text("until").map(PathBuf::from);
    let going = args.text("while").map(PathBuf::from);
    args.finish()?;

    if !(0.0..=100.0).contains(&touches) {
        return Err("--touches is a multiple of the pages, 0 to 100".to_owned());
    }
    if !(0.0..=1.0).contains(&hot) {
        return Err("--hot is a fraction, 0 to 1".to_owned());
    }
    let memory = Checked::new(bytes, Pattern { seed, mix })?;
    let pages = memory.pages;
    let mut run = Run {
        random: Random::new([seed, pages, 0]),
        seed,
        hot: ((pages as f64 * hot) as u64).max(1),
        rewritten: 0,
        freed: 0,
        started: Instant::now(),
        memory,
    };
    run.memory.fill();
    run.say("filled");
    let end = seconds.map(|s| run.started + Duration::from_secs(s));
    let mut pass = 0;
    let goes_on = |pass| match (&going, end) {
        (Some(file), _) => file.exists(),
        (None, Some(end)) => Instant::now() < end,
        (None, None) => pass < passes,
    };
    while goes_on(pass) {
        pass += 1;
        run.free_ranges()?;
        run.fork_child()?;
        run.touch((pages as f64 * touches) as u64);
        run.say(&format!("pass {pass}"));
    }
    if let Some(file) = until {
        println!("pressure: waiting for {}", file.display());
        while !file.exists() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    run.memory.verify_all();
    println!("pressure: {}", run.figures());
    Ok(run.memory.errors == 0)
}

impl Run {
    fn figures(&self) -> String {
        format!(
            "pages={} verified={} rewritten={} freed={} errors={} seconds={:.1}",
            self.memory.pages,
            self.memory.verified,
            self.rewritten,
            self.freed,
            self.memory.errors,
            self.started.elapsed().as_secs_f64()
        )
    }

    fn say(&self, what: &str) {
        eprintln!("  {what}: {}", self.figures());
    }

    /// The hot set lies scattered, as it does in real programs.
    fn pick(&mut self) -> u64 {
        if self.random.below(100) < HOT_TOUCHES {
            let nth = self.random.below(self.hot);
            nth * self.memory.pages / self.hot
        } else {
            self.random.below(self.memory.pages)
        }
    }

    /// So many touches: reads that verify, and rewrites.
    fn touch(&mut self, touches: u64) {
        for _ in 0..touches {
            let number = self.pick();
            self.memory.verify(number);
            if self.random.below(100) < REWRITES {
                self.memory.write(number);
                self.rewritten += 1;
            }
        }
    }

    /// Frees ranges, looks at them, and writes every second one anew.
    fn free_ranges(&mut self) -> Result<(), String> {
        let mut left = self.memory.pages / FREED_SHARE;
        while left > 0 {
            let start = self.random.below(self.memory.pages);
            let pages =
                (1 + self.random.below(FREE_RANGE)).min(self.memory.pages - start).min(left);
            self.memory.free(start, pages)?;
            self.freed += pages;
            left -= pages;
            let rewrite = self.random.below(2) == 0;
            for number in start..start + pages {
                if self.random.below(4) == 0 {
                    self.memory.verify(number);
                }
                if rewrite {
                    self.memory.write(number);
                    self.rewritten += 1;
                }
            }
        }
        Ok(())
    }

    /// Forks a child that verifies and rewrites its copy, while the parent rewrites its own.
    fn fork_child(&mut self) -> Result<(), String> {
        // SAFETY: this process has one thread, so the child may do all that the parent may.
        let child = unsafe { libc::fork() };
        match child {
            -1 => return Err(format!("fork: {}", Error::last_os_error())),
            0 => {
                let before = self.memory.errors;
                self.random = Random::new([self.seed, self.memory.verified, 1]);
                for _ in 0..self.memory.pages / CHILD_VERIFIES {
                    let number = self.random.below(self.memory.pages);
                    self.memory.verify(number);
                }
                self.rewrite_some();
                // SAFETY: ends the child without running the parent's exit handlers.
                unsafe { libc::_exit((self.memory.errors != before).into()) };
            }
            _ => {}
        }
        self.rewrite_some();
        let mut status = 0;
        // SAFETY: waits for our own child.
        while unsafe { libc::waitpid(child, &mut status, 0) } < 0 {
            let error = Error::last_os_error();
            if error.raw_os_error() != Some(libc::EINTR) {
                return Err(format!("waitpid: {error}"));
            }
        }
        if libc::WIFSIGNALED(status) {
            return Err(format!("the child died of signal {}", libc::WTERMSIG(status)));
        }
        self.memory.errors += u64::from(libc::WEXITSTATUS(status) != 0);
        Ok(())
    }

    fn rewrite_some(&mut self) {
        for _ in 0..self.memory.pages / CHILD_WRITES {
            let number = self.random.below(self.memory.pages);
            self.memory.write(number);
            self.memory.verify(number);
            self.rewritten += 1;
        }
    }
}
