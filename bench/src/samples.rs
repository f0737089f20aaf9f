//! Samples: what a measuring program says, here or in a guest, one JSON object a line.
//!
//! ```text
//! {"case":"touch-pc0","contender":"disk","metric":"wall","unit":"s","better":"lower","value":9.5}
//! {"contender":"nbdkit-zstd","not_run":"nbdkit is not installed"}
//! ```
//!
//! Each measurement is a line of its own, in the order in which they were made. A contender that
//! could not take part is named with the reason, and the case if it is missing from one only.

use std::fmt::Display;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// Which way a figure is good.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    Lower,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sample {
    pub case: String,
    pub contender: String,
    pub metric: String,
    pub unit: String,
    pub better: Better,
    pub value: f64,
}

/// A contender that did not take part.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct NotRun {
    pub contender: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub case: Option<String>,
    /// The reason.
    pub not_run: String,
}

impl NotRun {
    pub fn new(contender: &str, reason: impl Display) -> Self {
        Self { contender: contender.to_owned(), case: None, not_run: format!("{reason:#}") }
    }
}

/// A line of a sample file.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Line {
    NotRun(NotRun),
    Sample(Sample),
}

/// What is measured, apart from its value.
pub struct Metric {
    name: &'static str,
    unit: &'static str,
    better: Better,
}

pub const TIME_PER_PAGE: Metric =
    Metric { name: "time_per_page", unit: "ns", better: Better::Lower };
pub const BYTES_PER_BYTE: Metric =
    Metric { name: "bytes_per_byte", unit: "ratio", better: Better::Lower };
pub const MEMORY_USED: Metric =
    Metric { name: "memory_used", unit: "bytes", better: Better::Lower };

impl Metric {
    pub fn line(&self, case: &str, contender: &str, value: f64) -> Line {
        let [case, contender, metric, unit] =
            [case, contender, self.name, self.unit].map(str::to_owned);
        Line::Sample(Sample { case, contender, metric, unit, better: self.better, value })
    }
}

pub fn write(path: &Path, lines: &[Line]) -> Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let mut file = BufWriter::new(file);
    for line in lines {
        serde_json::to_writer(&mut file, line)?;
        writeln!(file)?;
    }
    Ok(file.into_inner()?.sync_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_a_line() {
        let path = std::env::temp_dir().join(format!("tmem-samples-{}", std::process::id()));
        let missing = Line::NotRun(NotRun::new("zram-lz4", "no root"));
        write(&path, &[TIME_PER_PAGE.line("put", "tmem", 5.25), missing]).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "{\"case\":\"put\",\"contender\":\"tmem\",\"metric\":\"time_per_page\",\
             \"unit\":\"ns\",\"better\":\"lower\",\"value\":5.25}\n\
             {\"contender\":\"zram-lz4\",\"not_run\":\"no root\"}\n"
        );
        std::fs::remove_file(path).unwrap();
    }
}
