//! `pressure`: fills, touches, frees and forks more memory than the machine has, and verifies it.
//!
//! Every page is read and compared in full at least twice: after the fill and at the end. The last
//! line on standard output is `pressure: pages=N verified=M rewritten=K freed=F errors=E seconds=T`;
//! the run is good only if it is there with `errors=0` and the status is 0.

use crate::Outcome;
use crate::args::Args;
use crate::memory::{LockAll, Memory, Versions, lock_all};
use crate::pattern::{MAX_PAGES, Mix, PAGE, Page, Pattern, Random};
use std::io::{Error, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Wrong pages that are described; all are counted.
const DESCRIBED: u64 = 20;
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
    pattern: Pattern,
    memory: Memory,
    versions: Versions,
    random: Random,
    pages: u64,
    hot: u64,
    verified: u64,
    rewritten: u64,
    freed: u64,
    errors: u64,
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
    args.finish()?;

    let pages = bytes / PAGE as u64;
    if pages == 0 || pages >= MAX_PAGES {
        return Err(format!("{pages} pages: between 1 and {MAX_PAGES} can be told apart"));
    }
    if !(0.0..=100.0).contains(&touches) {
        return Err("--touches is a multiple of the pages, 0 to 100".to_owned());
    }
    if !(0.0..=1.0).contains(&hot) {
        return Err("--hot is a fraction, 0 to 1".to_owned());
    }
    be_the_victim();
    // Our own stack and data stay: an unreadable page there would end us before we could report.
    let versions = Versions::new(pages)?;
    lock_all(LockAll::Present)?;
    let mut run = Run {
        pattern: Pattern { seed, mix },
        memory: Memory::new(pages)?,
        versions,
        random: Random::new([seed, pages, 0]),
        pages,
        hot: ((pages as f64 * hot) as u64).max(1),
        verified: 0,
        rewritten: 0,
        freed: 0,
        errors: 0,
        started: Instant::now(),
    };
    run.fill();
    run.say("filled");
    let end = seconds.map(|s| run.started + Duration::from_secs(s));
    let mut pass = 0;
    while end.map_or(pass < passes, |end| Instant::now() < end) {
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
    run.verify_all();
    println!("pressure: {}", run.figures());
    Ok(run.errors == 0)
}

/// When memory ends after all, it is this program that should die of it, not the test around it.
fn be_the_victim() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "1000") {
        eprintln!("pressure: oom_score_adj: {error}");
    }
}

impl Run {
    fn figures(&self) -> String {
        format!(
            "pages={} verified={} rewritten={} freed={} errors={} seconds={:.1}",
            self.pages,
            self.verified,
            self.rewritten,
            self.freed,
            self.errors,
            self.started.elapsed().as_secs_f64()
        )
    }

    fn say(&self, what: &str) {
        eprintln!("  {what}: {}", self.figures());
    }

    fn complain(&mut self, number: u64, what: &dyn std::fmt::Display) {
        self.errors += 1;
        if self.errors <= DESCRIBED {
            let version = self.versions.get(number).unwrap_or(0);
            println!("page {number} (version {version}) {what}");
            // A page that cannot be printed is still counted.
            let _ = std::io::stdout().flush();
        }
    }

    fn write(&mut self, number: u64) {
        let mut page = [0; PAGE];
        let version = self.versions.bump(number);
        self.pattern.fill(number, version, &mut page);
        if !self.memory.write(number, &page) {
            self.complain(number, &"unreadable when it was to be rewritten");
        }
    }

    fn verify(&mut self, number: u64) {
        let mut found = [0; PAGE];
        let mut expected: Page = [0; PAGE];
        if !self.memory.read(number, &mut found) {
            self.complain(number, &"unreadable");
            return;
        }
        self.verified += 1;
        let version = self.versions.get(number);
        if let Some(version) = version {
            self.pattern.fill(number, version, &mut expected);
        }
        if found == expected {
            return;
        }
        match version {
            Some(version) => {
                let fault = self.pattern.diagnose(number, version, &found);
                self.complain(number, &fault);
            }
            None => self.complain(number, &"not zeros though it was freed"),
        }
    }

    fn fill(&mut self) {
        for number in 0..self.pages {
            self.write(number);
        }
    }

    fn verify_all(&mut self) {
        for number in 0..self.pages {
            self.verify(number);
        }
    }

    /// The hot set lies scattered, as it does in real programs.
    fn pick(&mut self) -> u64 {
        if self.random.below(100) < HOT_TOUCHES {
            let nth = self.random.below(self.hot);
            nth * self.pages / self.hot
        } else {
            self.random.below(self.pages)
        }
    }

    /// So many touches: reads that verify, and rewrites.
    fn touch(&mut self, touches: u64) {
        for _ in 0..touches {
            let number = self.pick();
            self.verify(number);
            if self.random.below(100) < REWRITES {
                self.write(number);
                self.rewritten += 1;
            }
        }
    }

    /// Frees ranges, looks at them, and writes every second one anew.
    fn free_ranges(&mut self) -> Result<(), String> {
        let mut left = self.pages / FREED_SHARE;
        while left > 0 {
            let start = self.random.below(self.pages);
            let pages = (1 + self.random.below(FREE_RANGE)).min(self.pages - start).min(left);
            self.memory.free(start, pages)?;
            (start..start + pages).for_each(|number| self.versions.free(number));
            self.freed += pages;
            left -= pages;
            let rewrite = self.random.below(2) == 0;
            for number in start..start + pages {
                if self.random.below(4) == 0 {
                    self.verify(number);
                }
                if rewrite {
                    self.write(number);
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
                let before = self.errors;
                self.random = Random::new([self.pattern.seed, self.verified, 1]);
                for _ in 0..self.pages / CHILD_VERIFIES {
                    let number = self.random.below(self.pages);
                    self.verify(number);
                }
                self.rewrite_some();
                // SAFETY: ends the child without running the parent's exit handlers.
                unsafe { libc::_exit((self.errors != before).into()) };
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
        self.errors += u64::from(libc::WEXITSTATUS(status) != 0);
        Ok(())
    }

    fn rewrite_some(&mut self) {
        for _ in 0..self.pages / CHILD_WRITES {
            let number = self.random.below(self.pages);
            self.write(number);
            self.verify(number);
            self.rewritten += 1;
        }
    }
}
