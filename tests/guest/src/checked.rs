//! Memory whose every page is known: it is written from a pattern, and verified in full against it.

use crate::memory::{LockAll, Memory, Versions, lock_all};
use crate::pattern::{MAX_PAGES, PAGE, Page, Pattern};
use std::io::Write;

/// Wrong pages that are described; all are counted.
const DESCRIBED: u64 = 20;

/// Pages under test, and what they should hold.
pub struct Checked {
    pattern: Pattern,
    memory: Memory,
    versions: Versions,
    /// How many pages there are.
    pub pages: u64,
    /// How often a page was read back and compared.
    pub verified: u64,
    /// How often a page was wrong or unreadable.
    pub errors: u64,
}

impl Checked {
    /// So many bytes of pages that nobody has written yet. Locks what the process has mapped till now.
    pub fn new(bytes: u64, pattern: Pattern) -> Result<Self, String> {
        let pages = bytes / PAGE as u64;
        if pages == 0 || pages >= MAX_PAGES {
            return Err(format!("{pages} pages: between 1 and {MAX_PAGES} can be told apart"));
        }
        be_the_victim();
        // Our own stack and data stay: an unreadable page there would end us before we could report.
        let versions = Versions::new(pages)?;
        lock_all(LockAll::Present)?;
        Ok(Checked {
            pattern,
            memory: Memory::new(pages)?,
            versions,
            pages,
            verified: 0,
            errors: 0,
        })
    }

    /// Writes a new version of a page.
    pub fn write(&mut self, number: u64) {
        let mut page = [0; PAGE];
        let version = self.versions.bump(number);
        self.pattern.fill(number, version, &mut page);
        if !self.memory.write(number, &page) {
            self.complain(number, &"unreadable when it was to be rewritten");
        }
    }

    /// Writes every page.
    pub fn fill(&mut self) {
        for number in 0..self.pages {
            self.write(number);
        }
    }

    /// Reads a page and compares all of it.
    pub fn verify(&mut self, number: u64) {
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

    /// Verifies every page.
    pub fn verify_all(&mut self) {
        for number in 0..self.pages {
            self.verify(number);
        }
    }

    /// Gives pages back to the kernel.
    pub fn free(&mut self, start: u64, pages: u64) -> Result<(), String> {
        self.memory.free(start, pages)?;
        (start..start + pages).for_each(|number| self.versions.free(number));
        Ok(())
    }

    /// Brings a page in, if it is not there, by reading one byte of it. Whether the byte is right
    /// is for `verify` to say.
    pub fn touch(&self, number: u64) {
        self.memory.touch(number);
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
}

/// When memory ends after all, it is this program that should die of it, not the test around it.
fn be_the_victim() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "1000") {
        eprintln!("oom_score_adj: {error}");
    }
}
