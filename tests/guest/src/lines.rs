//! `lines`: writes lines of a web server's log in no order, the same ones for the same seed: data to sort.
//!
//! A line begins with a number of ten digits, so a comparison is decided in the first bytes, and has 140
//! bytes, which are moved and kept like any other text and compress like it.

use crate::Outcome;
use crate::args::Args;
use crate::pattern::Random;
use std::io::{BufWriter, Write};

const WHAT: [&str; 4] = ["item", "cart", "list", "help"];
const BROWSERS: [&str; 3] = [
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/131.0.0.0",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 Safari/605.1.15",
];

/// Runs the subcommand.
pub fn run(mut args: Args) -> Outcome {
    let count: u64 = args.number("count", 0)?;
    let mut random = Random::new([args.number("seed", 1)?, count, 2]);
    args.finish()?;
    let mut out = BufWriter::with_capacity(64 << 10, std::io::stdout().lock());
    for _ in 0..count {
        let (number, bits) = (random.below(10_000_000_000), random.next());
        let (what, browser) =
            (WHAT[(bits & 3) as usize], BROWSERS[(bits >> 2) as usize % BROWSERS.len()]);
        let (minute, item, bytes) = (bits >> 8 & 31, bits >> 16 & 0xfff, bits >> 32 & 0x7fff);
        writeln!(
            out,
            "{number:010} 2026-11-24T21:{minute:02} web-{} GET /shop/{what}/{item} HTTP/1.1 200 {bytes} {browser}",
            bits >> 60 & 7
        )
        .map_err(|e| e.to_string())?;
    }
    out.flush().map_err(|e| e.to_string())?;
    Ok(true)
}
