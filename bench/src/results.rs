//! Results: the samples of one suite on one platform, gathered, with the machine they are of.
//!
//! A results file holds every value, not only what is made of them; what `page` shows can be made
//! again from the files alone.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::numbers::{median, quantile};
use crate::report::Machine;
use crate::samples::{Better, Line, NotRun};

/// Rises when a reader of today would misread the files of tomorrow.
const FORMAT: u32 = 1;

/// What people use today: the one that all are compared with.
const BASELINE: &str = "zram-lz4";

/// The same where there is a disk behind it.
const BASELINE_WITH_DISK: &str = "zswap";

/// A part of the bench. The order is the page's.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Suite {
    Swap,
    Writeback,
    Device,
    Engine,
    Density,
}

impl Suite {
    fn baseline(self) -> &'static str {
        match self {
            Self::Writeback => BASELINE_WITH_DISK,
            _ => BASELINE,
        }
    }
}

/// What a suite ran on.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Platform {
    Host,
    QemuKvm,
    QemuTcg,
    /// Time is the number of instructions.
    QemuCounted,
    Uml,
}

/// The values of one metric of one contender in one case.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Series {
    pub case: String,
    pub contender: String,
    pub metric: String,
    pub unit: String,
    pub better: Better,
    pub values: Vec<f64>,
}

/// A results file.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Results {
    format: u32,
    pub suite: Suite,
    pub platform: Platform,
    /// Fewer rounds: good enough to see that all works.
    #[serde(default)]
    pub quick: bool,
    pub baseline: String,
    pub machine: Machine,
    pub samples: Vec<Series>,
    #[serde(default)]
    pub not_run: Vec<NotRun>,
}

/// Where values lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub lowest: f64,
    pub highest: f64,
}

impl Spread {
    /// # Panics
    ///
    /// If there are no values.
    pub fn of(values: &[f64]) -> Self {
        let mut values = values.to_vec();
        Self {
            median: median(&mut values),
            lowest: quantile(&mut values, 0.0),
            highest: quantile(&mut values, 1.0),
        }
    }
}

impl Series {
    pub fn spread(&self) -> Spread {
        Spread::of(&self.values)
    }

    /// Multiples of another series. Measurements of one round are compared with each other, so that
    /// what disturbed a round does not count; that takes as many of both.
    pub fn ratio_to(&self, base: &Self) -> Spread {
        if self.values.len() != base.values.len() {
            let ratio = self.spread().median / base.spread().median;
            return Spread { median: ratio, lowest: ratio, highest: ratio };
        }
        let pairs = self.values.iter().zip(&base.values);
        Spread::of(&pairs.map(|(value, base)| value / base).collect::<Vec<_>>())
    }
}

impl Results {
    /// Gathers samples of the machine that this runs on.
    pub fn collect(
        suite: Suite,
        platform: Platform,
        quick: bool,
        lines: Vec<Line>,
    ) -> Result<Self> {
        let (samples, not_run) = gather(lines)?;
        if samples.is_empty() {
            bail!("there are no samples");
        }
        let (machine, baseline) = (Machine::new(), suite.baseline().to_owned());
        Ok(Self { format: FORMAT, suite, platform, quick, baseline, machine, samples, not_run })
    }

    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let text = fs::read(path).with_context(|| format!("reading {name}"))?;
        let results: Self = serde_json::from_slice(&text).with_context(|| name.to_string())?;
        if results.format != FORMAT {
            bail!("{name} is of format {}, not {FORMAT}", results.format);
        }
        if let Some(series) = results.samples.iter().find(|series| series.values.is_empty()) {
            bail!("{name}: {} of {} has no values", series.metric, series.contender);
        }
        Ok(results)
    }

    /// Writes the file. Quick results do not take the place of others.
    pub fn write(&self, path: &Path) -> Result<()> {
        if self.quick && path.exists() && !Self::read(path)?.quick {
            bail!("{} holds results that are not quick ones", path.display());
        }
        let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
        serde_json::to_writer_pretty(BufWriter::new(file), self)?;
        Ok(())
    }

    pub fn series(&self, case: &str, contender: &str, metric: &str) -> Option<&Series> {
        let is_it = |series: &&Series| {
            series.case == case && series.contender == contender && series.metric == metric
        };
        self.samples.iter().find(is_it)
    }

    /// The baseline's series of the same case and metric.
    pub fn base_of(&self, series: &Series) -> Option<&Series> {
        self.series(&series.case, &self.baseline, &series.metric)
    }
}

/// Sorts samples into series, in the order in which each first appeared.
fn gather(lines: Vec<Line>) -> Result<(Vec<Series>, Vec<NotRun>)> {
    let (mut all, mut not_run): (Vec<Series>, Vec<NotRun>) = (Vec::new(), Vec::new());
    let mut known = HashMap::new();
    for line in lines {
        let sample = match line {
            Line::Sample(sample) => sample,
            Line::NotRun(one) if not_run.contains(&one) => continue,
            Line::NotRun(one) => {
                not_run.push(one);
                continue;
            }
        };
        let key = (sample.case.clone(), sample.contender.clone(), sample.metric.clone());
        let at = *known.entry(key).or_insert_with(|| {
            all.push(Series {
                case: sample.case,
                contender: sample.contender,
                metric: sample.metric,
                unit: sample.unit.clone(),
                better: sample.better,
                values: Vec::new(),
            });
            all.len() - 1
        });
        let series = &mut all[at];
        if series.unit != sample.unit || series.better != sample.better {
            bail!("{} of {} has two units or directions", series.metric, series.contender);
        }
        series.values.push(sample.value);
    }
    Ok((all, not_run))
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::samples::{BYTES_PER_BYTE, Sample, TIME_PER_PAGE};

    /// Results of a suite made of (case, contender, metric, better, values).
    pub fn results(
        suite: Suite,
        series: &[(&str, &str, &str, Better, &[f64])],
        not_run: &[(&str, &str)],
    ) -> Results {
        let mut lines = Vec::new();
        for &(case, contender, metric, better, values) in series {
            lines.extend(values.iter().map(|&value| {
                let [case, contender, metric, unit] =
                    [case, contender, metric, "us"].map(str::to_owned);
                Line::Sample(Sample { case, contender, metric, unit, better, value })
            }));
        }
        lines.extend(not_run.iter().map(|(who, why)| Line::NotRun(NotRun::new(who, why))));
        let mut results = Results::collect(suite, Platform::QemuTcg, false, lines).unwrap();
        results.machine.kernel = "6.12.0-test".to_owned();
        results
    }

    #[test]
    fn interleaved_samples_become_series_in_their_order() {
        let lines = vec![
            TIME_PER_PAGE.line("put", "tmem", 3.0),
            TIME_PER_PAGE.line("put", "zram-lz4", 7.0),
            Line::NotRun(NotRun::new("disk", "none")),
            TIME_PER_PAGE.line("put", "tmem", 1.0),
            TIME_PER_PAGE.line("put", "zram-lz4", 8.0),
            BYTES_PER_BYTE.line("put", "tmem", 9.0),
            Line::NotRun(NotRun::new("disk", "none")),
        ];
        let results = Results::collect(Suite::Engine, Platform::Host, true, lines).unwrap();
        let values: Vec<_> = results.samples.iter().map(|series| &series.values[..]).collect();
        assert_eq!(values, [&[3.0, 1.0][..], &[7.0, 8.0], &[9.0]]);
        assert_eq!(results.not_run.len(), 1);
        assert_eq!(results.machine.kernel, results.machine.host_kernel);
        let base = results.base_of(&results.samples[0]).unwrap();
        assert_eq!(base.values, [7.0, 8.0]);
        assert!(results.base_of(&results.samples[2]).is_none());
    }

    #[test]
    fn samples_that_contradict_each_other_or_are_none_are_refused() {
        let collect = |lines| Results::collect(Suite::Engine, Platform::Host, true, lines);
        assert!(collect(vec![Line::NotRun(NotRun::new("tmem", "why"))]).is_err());
        let mut other = TIME_PER_PAGE.line("put", "tmem", 1.0);
        let Line::Sample(sample) = &mut other else { unreachable!() };
        sample.better = Better::Higher;
        assert!(collect(vec![TIME_PER_PAGE.line("put", "tmem", 1.0), other]).is_err());
    }

    #[test]
    fn ratios_are_of_the_same_round_where_there_are_as_many() {
        let one = |values: &[f64]| Series {
            case: "a".to_owned(),
            contender: "b".to_owned(),
            metric: "c".to_owned(),
            unit: "us".to_owned(),
            better: Better::Lower,
            values: values.to_vec(),
        };
        let base = one(&[10.0, 100.0, 10.0]);
        let ratio = one(&[12.0, 120.0, 11.0]).ratio_to(&base);
        assert!((ratio.median - 1.2).abs() < 1e-9 && (ratio.lowest - 1.1).abs() < 1e-9);
        assert_eq!(one(&[20.0]).ratio_to(&base).highest, 2.0);
        let spread = base.spread();
        assert_eq!((spread.lowest, spread.median, spread.highest), (10.0, 10.0, 100.0));
    }

    #[test]
    fn quick_results_do_not_replace_full_ones() {
        let path = std::env::temp_dir().join(format!("tmem-results-{}", std::process::id()));
        let mut results =
            results(Suite::Device, &[("a", "tmem-ublk", "wall", Better::Lower, &[1.0])], &[]);
        results.write(&path).unwrap();
        assert_eq!(Results::read(&path).unwrap().machine.kernel, "6.12.0-test");
        results.quick = true;
        assert!(results.write(&path).is_err());
        fs::remove_file(&path).unwrap();
        results.write(&path).unwrap();
        assert!(Results::read(&path).unwrap().quick);
        fs::write(
            &path,
            fs::read_to_string(&path).unwrap().replace("\"format\": 1", "\"format\": 2"),
        )
        .unwrap();
        assert!(Results::read(&path).is_err());
        fs::remove_file(path).unwrap();
    }
}
