//! Benchmarks of the tmem engine: how much time it adds to bare compression, and how much memory
//! it takes where kernel zram would take so much.
//!
//! ```text
//! cargo run --release -p tmem-bench -- engine [--quick] [--json FILE]
//! cargo run --release -p tmem-bench -- density [--quick] [--json FILE]
//! ```
//!
//! Both work on pages of real processes, which are gathered on the first run and kept in
//! `target/bench-pages`. `density` compares with zram only as root.

mod bare;
mod density;
mod gather;
mod numbers;
mod process;
mod report;
mod speed;
mod timing;
mod workloads;
mod zram;

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use crate::gather::{PageSet, Source, page_set};
use crate::report::{Machine, note};
use crate::speed::Effort;

const QUICK: Effort = Effort { pages: 4096, rounds: 3 };
const FULL: Effort = Effort { pages: usize::MAX, rounds: 9 };

/// Measures the tmem engine.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Time of puts and gets against bare lz4.
    Engine(Common),
    /// Memory against kernel zram.
    Density(Common),
}

#[derive(Args)]
struct Common {
    /// Fewer pages and rounds.
    #[arg(long)]
    quick: bool,
    /// Writes the figures to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The folder of the page set; gathered there if it has none.
    #[arg(long, value_name = "FOLDER",
          default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench-pages"))]
    pages: PathBuf,
    /// Keeps all-zero pages in the set, which Linux since 6.12 does not swap out.
    #[arg(long)]
    with_zero_pages: bool,
    /// The pool limit, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    limit: u64,
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
}

fn main() -> Result<()> {
    match Arguments::parse().what {
        What::Engine(common) => {
            let effort = if common.quick { QUICK } else { FULL };
            report(&common, |set| {
                let cases = speed::run(&set.pages, &effort, common.limit << 20)?;
                speed::print(&cases);
                Ok(cases)
            })
        }
        What::Density(common) => report(&common, |set| {
            let count =
                if common.quick { QUICK.pages.min(set.pages.len()) } else { set.pages.len() };
            // From all workloads, and no two neighbours apart that need not be.
            let step = set.pages.len() / count;
            let pages: Vec<_> = set.pages.iter().step_by(step).take(count).copied().collect();
            let points = density::run(&pages, common.limit << 20)?;
            density::print(&points);
            Ok(points)
        }),
    }
}

/// Runs one kind of measurement on the page set, between what all have in common.
fn report<T: Serialize>(common: &Common, run: impl FnOnce(&PageSet) -> Result<T>) -> Result<()> {
    let machine = Machine::new();
    let set = page_set(&common.pages, common.with_zero_pages)?;
    machine.print();
    for source in &set.sources {
        note(format!("  {:>6} pages of {}, {} all zero", source.pages, source.name, source.zero));
    }
    note(format!("{} pages, {} all-zero pages left out", set.pages.len(), set.zero_left_out));
    let figures = run(&set)?;
    let Some(path) = &common.json else { return Ok(()) };
    let report = Report {
        machine,
        pages: set.pages.len(),
        zero_pages_left_out: set.zero_left_out,
        sources: set.sources,
        limit: common.limit << 20,
        figures,
    };
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    serde_json::to_writer_pretty(BufWriter::new(file), &report)?;
    Ok(())
}
