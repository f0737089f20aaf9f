//! What a run prints: the machine it ran on, and tables.

use std::fmt::Display;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// The machine and the moment, without which a figure means nothing.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Machine {
    pub date: String,
    pub cpu: String,
    pub cpus: usize,
    pub memory_mib: u64,
    /// The kernel that was measured on: this machine's, or one that runs on it.
    pub kernel: String,
    pub host_kernel: String,
    /// Tasks ready to run, averaged over a minute: what else went on.
    pub load: String,
    /// The commit that was measured, and whether it was changed; nothing outside a repository.
    pub revision: String,
}

impl Machine {
    pub fn new() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or("").trim_start_matches([' ', '\t', ':']).trim().to_owned()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kernel = read("/proc/sys/kernel/osrelease").trim().to_owned();
        Self {
            date: said(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"])),
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory.trim_end_matches(" kB").parse().unwrap_or(0) / 1024,
            host_kernel: kernel.clone(),
            kernel,
            load: read("/proc/loadavg").split(' ').next().unwrap_or("").to_owned(),
            revision: said(Command::new("git").args([
                "-C",
                env!("CARGO_MANIFEST_DIR"),
                "describe",
                "--always",
                "--dirty",
            ])),
        }
    }

    pub fn print(&self) {
        let zbud = if cfg!(feature = "seed-zbud") { "seed-zbud" } else { "default" };
        println!(
            "{} | {} x {} | {} MiB | Linux {} | load {} | zbud: {zbud}",
            self.date, self.cpus, self.cpu, self.memory_mib, self.kernel, self.load
        );
    }
}

/// What a program says; nothing if it fails.
fn said(command: &mut Command) -> String {
    match command.output() {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => String::new(),
    }
}

/// Rows of cells under a heading; the first column is text, the others are numbers.
pub struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(title: &str, heads: &[&str]) -> Self {
        let heads = heads.iter().map(|&head| head.to_owned()).collect();
        Self { title: title.to_owned(), rows: vec![heads] }
    }

    pub fn row(&mut self, name: &str, cells: impl IntoIterator<Item = String>) {
        self.rows.push(std::iter::once(name.to_owned()).chain(cells).collect());
    }

    pub fn print(&self) {
        println!("\n{}\n{}", self.title, self.text());
    }

    fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut lines = Vec::new();
        for row in &self.rows {
            let mut line = format!("  {:<width$}", row[0], width = widths[0]);
            for (cell, width) in row.iter().zip(&widths).skip(1) {
                line += &format!("  {cell:>width$}");
            }
            lines.push(line.trim_end().to_owned());
        }
        lines.join("\n")
    }
}

/// A number as a cell, with so many decimals; a dash if there is none.
pub fn cell(value: Option<f64>, decimals: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.decimals$}"))
}

/// A count of bytes as a cell, in MiB.
pub fn mib(bytes: impl Into<Option<u64>>) -> String {
    cell(bytes.into().map(|bytes| bytes as f64 / f64::from(1 << 20)), 2)
}

/// What a run is about, before it starts.
pub fn note(text: impl Display) {
    println!("{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new("title", &["name", "a", "b"]);
        table.row("x", ["1".to_owned(), cell(Some(2.345), 1)]);
        table.row("longer", [mib(3 << 20), cell(None, 1)]);
        assert_eq!(table.text(), "  name       a    b\n  x          1  2.3\n  longer  3.00    -");
    }
}
