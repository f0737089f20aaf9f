//! What a run prints: the machine it ran on, and tables.

use std::fmt::Display;
use std::process::Command;

use serde::Serialize;

/// The machine and the moment, without which a figure means nothing.
#[derive(Serialize)]
pub struct Machine {
    date: String,
    cpu: String,
    cpus: usize,
    memory_mib: u64,
    kernel: String,
    /// Tasks ready to run, averaged over a minute, before the run: what else went on.
    load: String,
    zbud: &'static str,
}

impl Machine {
    pub fn new() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or("").trim_start_matches([' ', '\t', ':']).trim().to_owned()
        };
        let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
        let date = date.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        Self {
            date: date.unwrap_or_default(),
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory.trim_end_matches(" kB").parse().unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: read("/proc/loadavg").split(' ').next().unwrap_or("").to_owned(),
            zbud: if cfg!(feature = "seed-zbud") { "seed-zbud" } else { "default" },
        }
    }

    pub fn print(&self) {
        println!(
            "{} | {} x {} | {} MiB | Linux {} | load {} | zbud: {}",
            self.date, self.cpus, self.cpu, self.memory_mib, self.kernel, self.load, self.zbud
        );
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
