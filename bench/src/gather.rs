//! Page sets: gathers the workloads' pages once, keeps them in a folder, reads them from there.
//!
//! The folder holds `pages.bin`, the pages one after the other, and `sources.json`, what they are
//! of. All-zero pages are in it; whether they are used is decided when the set is read.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tmem::{PAGE_SIZE, Page};

use crate::process::{anonymous_bytes, copy_anonymous};
use crate::workloads::{ALL, Moment, Workload};

/// Pages of one workload at most.
const PAGES_EACH: usize = 4500;

/// No workload takes longer to be ready.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);
/// A program that has not grown for so long does not grow any more.
const GROWN: Duration = Duration::from_secs(2);

/// Where some of the pages came from.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Source {
    pub name: String,
    /// Pages, all-zero ones included.
    pub pages: usize,
    /// Of those, pages that are all zero.
    pub zero: usize,
}

/// Pages of real heaps.
pub struct PageSet {
    pub pages: Vec<Page>,
    pub sources: Vec<Source>,
    /// All-zero pages that were left out.
    pub zero_left_out: usize,
}

/// Reads the page set in `folder`, which is gathered first if it is not there. Without
/// `with_zero`, all-zero pages are left out: since 6.12 Linux never swaps them out.
pub fn page_set(folder: &Path, with_zero: bool) -> Result<PageSet> {
    let (data, sources) = (folder.join("pages.bin"), folder.join("sources.json"));
    if !sources.exists() {
        gather(folder, &data, &sources).context("gathering pages")?;
    }
    let sources: Vec<Source> = serde_json::from_reader(BufReader::new(File::open(sources)?))?;
    let mut pages = Vec::with_capacity(sources.iter().map(|source| source.pages).sum());
    let mut zero_left_out = 0;
    let mut data = BufReader::new(File::open(data)?);
    let mut page = [0; PAGE_SIZE];
    for _ in 0..sources.iter().map(|source| source.pages).sum() {
        data.read_exact(&mut page).context("pages.bin is shorter than sources.json says")?;
        if !with_zero && is_zero(&page) {
            zero_left_out += 1;
        } else {
            pages.push(page);
        }
    }
    Ok(PageSet { pages, sources, zero_left_out })
}

fn is_zero(page: &Page) -> bool {
    page.iter().all(|&byte| byte == 0)
}

/// Runs each workload and writes its pages; the sources last, as they make the set complete.
fn gather(folder: &Path, data: &Path, sources: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let mut file = BufWriter::new(File::create(data)?);
    let mut known = Vec::new();
    for workload in &ALL {
        match pages_of(workload, folder) {
            Ok(pages) => {
                let zero = pages.iter().filter(|page| is_zero(page)).count();
                eprintln!("gathered {} pages of {}", pages.len(), workload.name);
                file.write_all(pages.as_flattened())?;
                known.push(Source { name: workload.name.to_owned(), pages: pages.len(), zero });
            }
            Err(error) => eprintln!("left out {}: {error:#}", workload.name),
        }
    }
    if known.is_empty() {
        bail!("no workload ran");
    }
    file.into_inner()?.sync_all()?;
    fs::write(sources, serde_json::to_string_pretty(&known)?)?;
    Ok(())
}

/// Starts a workload, stops it at its moment, copies its pages and ends it.
fn pages_of(workload: &Workload, folder: &Path) -> Result<Vec<Page>> {
    let (name, text) = workload.file;
    fs::write(folder.join(name), text())?;
    let child = Command::new(workload.program)
        .args(workload.arguments)
        .current_dir(folder)
        // Hashes of strings, and with them where things lie, are the same in every run.
        .env("PYTHONHASHSEED", "0")
        .env("PERL_HASH_SEED", "0")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {}", workload.program))?;
    let mut running = Running(child);
    let process = match workload.moment {
        Moment::Ready => running.wait_ready()?,
        Moment::Grown(bytes) => running.wait_grown(bytes)?,
    };
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw).context("no such process")?;
    kill_process(pid, Signal::STOP)?;
    let pages = copy_anonymous(process, PAGES_EACH);
    kill_process(pid, Signal::KILL)?;
    let pages = pages.context("copying its memory")?;
    if pages.is_empty() {
        bail!("it has no anonymous memory");
    }
    Ok(pages)
}

/// A started program, ended when it goes out of scope.
struct Running(Child);

impl Running {
    /// Waits for the line `ready`; returns the process that does the work.
    fn wait_ready(&mut self) -> Result<u32> {
        let output = self.0.stdout.take().context("no output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        if line.trim_end() != "ready" {
            bail!("it ended, or said {line:?}");
        }
        Ok(self.largest())
    }

    /// Waits until a process holds so much, or none grows any more.
    fn wait_grown(&mut self, bytes: u64) -> Result<u32> {
        let start = Instant::now();
        let (mut most, mut since) = (0, start);
        while start.elapsed() < PATIENCE {
            let process = self.largest();
            let held = anonymous_bytes(process);
            if held > most {
                (most, since) = (held, Instant::now());
            }
            if held >= bytes || (held > 0 && since.elapsed() > GROWN) {
                return Ok(process);
            }
            if let Some(status) = self.0.try_wait()? {
                bail!("it ended ({status}) with {most} bytes at most");
            }
            std::thread::sleep(POLL);
        }
        bail!("it did not grow to {bytes} bytes in time");
    }

    /// The process with the most memory of the one started and its children: a compiler's driver
    /// starts the compiler proper.
    fn largest(&self) -> u32 {
        let own = self.0.id();
        let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children"));
        let children = children.unwrap_or_default();
        let children = children.split_ascii_whitespace().filter_map(|child| child.parse().ok());
        children.chain([own]).max_by_key(|&process| anonymous_bytes(process)).unwrap_or(own)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_read_as_it_was_written_with_or_without_zero_pages() {
        let folder = std::env::temp_dir().join(format!("tmem-bench-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let pages = [[1; PAGE_SIZE], [0; PAGE_SIZE], [2; PAGE_SIZE]];
        fs::write(folder.join("pages.bin"), pages.as_flattened()).unwrap();
        let source = Source { name: "test".to_owned(), pages: 3, zero: 1 };
        let sources = serde_json::to_string(&[source]).unwrap();
        fs::write(folder.join("sources.json"), sources).unwrap();
        let without = page_set(&folder, false).unwrap();
        assert_eq!((without.pages, without.zero_left_out), (vec![pages[0], pages[2]], 1));
        let with = page_set(&folder, true).unwrap();
        assert_eq!((with.pages.as_slice(), with.zero_left_out), (&pages[..], 0));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_program_that_says_it_is_ready_gives_its_pages() {
        let folder = std::env::temp_dir().join(format!("tmem-bench-run-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let workload = Workload {
            name: "shell",
            program: "sh",
            arguments: &["ready.sh"],
            file: ("ready.sh", || "echo ready; read wait".to_owned()),
            moment: Moment::Ready,
        };
        let pages = pages_of(&workload, &folder).unwrap();
        assert!(!pages.is_empty() && !pages.iter().all(is_zero));
        let silent = Workload { file: ("ready.sh", || "exit 3".to_owned()), ..workload };
        assert!(pages_of(&silent, &folder).is_err());
        fs::remove_dir_all(&folder).unwrap();
    }
}
