//! Benchmarks of tmem: measures the engine, gathers what was measured elsewhere, and makes the page
//! of figures from it. `scripts/bench` runs all of it in turn.
//!
//! ```text
//! cargo run --release -p tmem-bench -- engine [--quick] [--json FILE] [--samples FILE]
//! cargo run --release -p tmem-bench -- density [--quick] [--json FILE] [--samples FILE]
//! cargo run --release -p tmem-bench -- attach [--gib N] [--quick] [--json FILE] [--samples FILE]
//! tmem-bench pages [FOLDER]
//! tmem-bench collect --suite device --platform uml --samples FILE.jsonl --output FILE.json
//! tmem-bench page FOLDER
//! ```
//!
//! The first three work on pages of real processes, which are gathered on the first run and kept in
//! `target/bench-pages`. They compare with zram only as root.

mod aims;
mod attach;
mod bare;
mod contenders;
mod density;
mod gather;
mod numbers;
mod page;
mod plot;
mod process;
mod report;
mod results;
mod samples;
mod speed;
mod timing;
mod workloads;
mod written;
mod zram;

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use crate::density::Point;
use crate::gather::{PageSet, Source, page_set};
use crate::report::{Machine, note};
use crate::results::{Platform, Results, Suite};
use crate::samples::{Line, NotRun};
use crate::speed::Effort;
use crate::written::Written;

const QUICK: Effort = Effort { pages: 4096, rounds: 5 };
const FULL: Effort = Effort { pages: usize::MAX, rounds: 9 };

/// Rounds of `density`, each of which churns in another way.
const DENSITY_ROUNDS: u64 = 5;

/// Rounds of `attach`.
const ATTACH_ROUNDS: usize = 9;

/// Where the page set is.
const PAGES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench-pages");

/// Measures tmem.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Time of puts and gets against bare lz4, and against zram by direct I/O.
    Engine(Common),
    /// Memory against kernel zram, and what is written to a backing file.
    Density(Common),
    /// Time of going on from the memory of a process that has died.
    Attach {
        #[command(flatten)]
        common: Common,
        /// The pool limit, in GiB.
        #[arg(long, default_value_t = 2)]
        gib: u64,
    },
    /// Gathers the page set, if there is none.
    Pages {
        /// Its folder.
        #[arg(default_value = PAGES)]
        folder: PathBuf,
    },
    /// Makes a results file of sample files.
    Collect(Collect),
    /// Writes the page and the plots for the results files in a folder.
    Page { folder: PathBuf },
}

#[derive(Args)]
struct Common {
    /// Fewer rounds, and for `engine` fewer pages.
    #[arg(long)]
    quick: bool,
    /// Writes the figures to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes every round's figures to a file for `collect`.
    #[arg(long, value_name = "FILE")]
    samples: Option<PathBuf>,
    /// The folder of the page set; gathered there if it has none.
    #[arg(long, value_name = "FOLDER", default_value = PAGES)]
    pages: PathBuf,
    /// Keeps all-zero pages in the set, which Linux since 6.12 does not swap out.
    #[arg(long)]
    with_zero_pages: bool,
    /// The pool limit, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    limit: u64,
}

#[derive(Args)]
struct Collect {
    #[arg(long)]
    suite: Suite,
    #[arg(long)]
    platform: Platform,
    /// Release of the kernel that was measured on, if it is not the one that runs here.
    #[arg(long, value_name = "RELEASE")]
    kernel: Option<String>,
    /// The commit that was measured, if it may no longer be the one that is checked out.
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// The samples are of a quick run.
    #[arg(long)]
    quick: bool,
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    samples: Vec<PathBuf>,
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Everything that a run found out.
#[derive(Serialize)]
struct Report<T> {
    machine: Machine,
    pages: usize,
    zero_pages_left_out: usize,
    sources: Vec<Source>,
    limit: u64,
    figures: T,
    not_run: Vec<NotRun>,
}

/// What `density` found, by round.
#[derive(Serialize)]
struct DensityFigures {
    points: Vec<Vec<Point>>,
    written: Vec<Written>,
}

/// What a kind of measurement gives: figures for the report, lines for `collect`, and who is missing.
struct Measured<T> {
    figures: T,
    lines: Vec<Line>,
    not_run: Vec<NotRun>,
}

fn main() -> Result<()> {
    match Arguments::parse().what {
        What::Engine(common) => {
            let effort = if common.quick { QUICK } else { FULL };
            report(&common, |set| {
                let (figures, not_run) = speed::run(&set.pages, &effort, common.limit << 20)?;
                speed::print(&figures);
                Ok(Measured { lines: speed::lines(&figures), figures, not_run })
            })
        }
        What::Density(common) => report(&common, |set| {
            let rounds = if common.quick { 1 } else { DENSITY_ROUNDS };
            let (points, not_run) = density::run(&set.pages, rounds, common.limit << 20)?;
            density::print(&points[0]);
            let mut lines = density::lines(&points);
            // The seed had no backing file.
            let rounds = if cfg!(feature = "seed-zbud") { 0 } else { rounds };
            let written = written::run(&set.pages, rounds, written::POOL_BYTES)?;
            written::print(&written);
            lines.extend(written::lines(&written));
            Ok(Measured { figures: DensityFigures { points, written }, lines, not_run })
        }),
        What::Attach { common, gib } => report(&common, |set| {
            let rounds = if common.quick { 3 } else { ATTACH_ROUNDS };
            let lines = attach::run(&set.pages, rounds, gib)?;
            Ok(Measured { figures: (), lines, not_run: Vec::new() })
        }),
        What::Pages { folder } => page_set(&folder, true).map(drop),
        What::Collect(collect) => {
            let mut lines = Vec::new();
            for path in &collect.samples {
                lines.extend(samples::read(path)?);
            }
            let Collect { suite, platform, kernel, revision, quick, .. } = collect;
            let mut results = Results::collect(suite, platform, quick, lines)?;
            if let Some(kernel) = kernel {
                results.machine.kernel = kernel;
            }
            if let Some(revision) = revision {
                results.machine.revision = revision;
            }
            results.write(&collect.output)
        }
        What::Page { folder } => page::write(&folder),
    }
}

/// Runs one kind of measurement on the page set, between what all have in common.
fn report<T: Serialize>(
    common: &Common,
    run: impl FnOnce(&PageSet) -> Result<Measured<T>>,
) -> Result<()> {
    let machine = Machine::new();
    let set = page_set(&common.pages, common.with_zero_pages)?;
    machine.print();
    for source in &set.sources {
        note(format!("  {:>6} pages of {}, {} all zero", source.pages, source.name, source.zero));
    }
    note(format!("{} pages, {} all-zero pages left out", set.pages.len(), set.zero_left_out));
    let Measured { figures, mut lines, not_run } = run(&set)?;
    for missing in &not_run {
        note(format!("{} did not run: {}", missing.contender, missing.not_run));
    }
    if let Some(path) = &common.samples {
        lines.extend(not_run.iter().cloned().map(Line::NotRun));
        samples::write(path, &lines)?;
    }
    let Some(path) = &common.json else { return Ok(()) };
    let report = Report {
        machine,
        pages: set.pages.len(),
        zero_pages_left_out: set.zero_left_out,
        sources: set.sources,
        limit: common.limit << 20,
        figures,
        not_run,
    };
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    serde_json::to_writer_pretty(BufWriter::new(file), &report)?;
    Ok(())
}
