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
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Which way a figure is good.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    Higher,
    Lower,
    None,
}

/// One measurement.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    pub case: String,
    pub contender: String,
    pub metric: String,
    pub unit: String,
    pub better: Better,
    pub value: f64,
}

/// A contender that did not take part.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
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
pub const ATTACH_TIME: Metric =
    Metric { name: "attach_per_gib", unit: "ms", better: Better::Lower };
pub const PREPARE_TIME: Metric =
    Metric { name: "prepare_per_gib", unit: "ms", better: Better::Lower };
pub const BYTES_PER_BYTE: Metric =
    Metric { name: "bytes_per_byte", unit: "ratio", better: Better::Lower };
pub const WRITTEN_PER_BYTE: Metric =
    Metric { name: "written_per_byte", unit: "ratio", better: Better::Lower };

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

pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let lines = text.lines().enumerate();
    lines
        .map(|(at, line)| {
            parse(line).with_context(|| format!("{}, line {}: {line}", path.display(), at + 1))
        })
        .collect()
}

/// Told apart by hand: what is wrong with a line is then said of the kind it is meant to be.
fn parse(line: &str) -> serde_json::Result<Line> {
    let value: Value = serde_json::from_str(line)?;
    Ok(match value.get("not_run") {
        Some(_) => Line::NotRun(serde_json::from_value(value)?),
        None => Line::Sample(serde_json::from_value(value)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_as_they_were_written() {
        let path = std::env::temp_dir().join(format!("tmem-samples-{}", std::process::id()));
        let lines = [
            TIME_PER_PAGE.line("put", "tmem", 5.25),
            Line::NotRun(NotRun::new("zram-lz4", "no root")),
        ];
        write(&path, &lines).unwrap();
        assert_eq!(read(&path).unwrap(), lines);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text.lines().next().unwrap(),
            r#"{"case":"put","contender":"tmem","metric":"time_per_page","unit":"ns","better":"lower","value":5.25}"#
        );
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_line_that_is_not_whole_is_an_error_that_says_what_is_missing() {
        for (line, said) in [
            ("{\"contender\":\"disk\",\"value\":1}", "case"),
            ("{\"not_run\":\"why\"}", "contender"),
            ("{\"contender\":\"disk\",\"not_run\":\"why\",\"metirc\":1}", "metirc"),
            ("", "EOF"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(said), "{line}: {error}");
        }
    }
}
