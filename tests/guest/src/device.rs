//! `device`: writes pages of a block device from a pattern, or reads them and says how many are right, wrong and
//! unreadable. All of it past the page cache.
//!
//! A request of several pages that fails is made again page by page: so a page counts as unreadable only if
//! it cannot be read by itself. The last line on standard output is `device: pages=N right=N wrong=N
//! unreadable=N seconds=T`; pages that were written count as right.

use crate::Outcome;
use crate::args::Args;
use crate::pattern::{MAX_PAGES, Mix, PAGE, Page, Pattern};
use std::fs::File;
use std::io::Error;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

/// Most pages of a request.
const REQUEST_MAX: usize = 32;
/// Wrong pages that are described; all are counted.
const DESCRIBED: u64 = 20;

/// A request's buffer, aligned as direct I/O wants it.
#[repr(align(4096))]
struct Buffer([Page; REQUEST_MAX]);

/// What became of the pages.
#[derive(Default)]
struct Tally {
    right: u64,
    wrong: u64,
    unreadable: u64,
}

struct Device {
    file: File,
    pattern: Pattern,
    version: u32,
    tally: Tally,
}

/// Runs the subcommand.
pub fn run(mut args: Args) -> Outcome {
    let path = args.text("path").ok_or("which one? --path DEVICE")?;
    let pages: u64 = args.number("pages", 0)?;
    let request: usize = args.number("request", 1)?;
    let write: u32 = args.number("write", 0)?;
    let read: u32 = args.number("read", 0)?;
    let seed = args.number("seed", 1)?;
    let mix = args.text("fill").map_or(Ok(Mix::default()), |text| Mix::parse(&text))?;
    args.finish()?;
    if (write == 0) == (read == 0) {
        return Err("--write VERSION or --read VERSION, from 1 on".to_owned());
    }
    if pages == 0 || pages >= MAX_PAGES {
        return Err(format!("--pages {pages}: between 1 and {MAX_PAGES} can be told apart"));
    }
    if !(1..=REQUEST_MAX).contains(&request) {
        return Err(format!("--request is 1 to {REQUEST_MAX} pages"));
    }
    let mut options = File::options();
    options.read(true).write(write > 0).custom_flags(libc::O_DIRECT);
    let file = options.open(&path).map_err(|error| format!("{path}: {error}"))?;
    let started = Instant::now();
    let pattern = Pattern { seed, mix };
    let mut device = Device { file, pattern, version: read.max(write), tally: Tally::default() };
    let mut buffer = Box::new(Buffer([[0; PAGE]; REQUEST_MAX]));
    for first in (0..pages).step_by(request) {
        let count = request.min((pages - first) as usize);
        let pages = &mut buffer.0[..count];
        match write {
            0 => device.read(first, pages),
            _ => device.write(first, pages).map_err(|error| format!("page {first}: {error}"))?,
        }
    }
    let Tally { right, wrong, unreadable } = device.tally;
    println!(
        "device: pages={pages} right={right} wrong={wrong} unreadable={unreadable} seconds={:.1}",
        started.elapsed().as_secs_f64()
    );
    Ok(wrong + unreadable == 0)
}

impl Device {
    fn write(&mut self, first: u64, pages: &mut [Page]) -> Result<(), Error> {
        for (number, page) in (first..).zip(pages.iter_mut()) {
            self.pattern.fill(number, self.version, page);
        }
        self.file.write_all_at(pages.as_flattened(), first * PAGE as u64)?;
        self.tally.right += pages.len() as u64;
        Ok(())
    }

    fn read(&mut self, first: u64, pages: &mut [Page]) {
        // What a failed read leaves in a buffer must not be what an earlier one found.
        pages.as_flattened_mut().fill(0xa5);
        match self.file.read_exact_at(pages.as_flattened_mut(), first * PAGE as u64) {
            Ok(()) => {
                for (number, page) in (first..).zip(pages.iter()) {
                    self.verify(number, page);
                }
            }
            Err(error) if pages.len() == 1 => {
                self.tally.unreadable += 1;
                if self.tally.unreadable <= DESCRIBED {
                    println!("page {first} unreadable: {error}");
                }
            }
            Err(_) => {
                for (number, page) in (first..).zip(pages) {
                    self.read(number, std::slice::from_mut(page));
                }
            }
        }
    }

    fn verify(&mut self, number: u64, found: &Page) {
        let mut expected = [0; PAGE];
        self.pattern.fill(number, self.version, &mut expected);
        if *found == expected {
            self.tally.right += 1;
            return;
        }
        self.tally.wrong += 1;
        if self.tally.wrong <= DESCRIBED {
            let fault = self.pattern.diagnose(number, self.version, found);
            println!("page {number} (version {}) {fault}", self.version);
        }
    }
}
