//! Aims: what the project has set itself, and whether a run met it.
//!
//! Each aim is a ratio to something else in the same run on the same machine, by the default front
//! end: to kernel zram, or with a backing file to what the aim names; what is a ratio itself is against nothing. It is
//! judged by the median over the rounds, on every platform that it was measured on.
//!
//! With a backing file a program is run with and without the kernel's readahead, and each contender is judged by the
//! case in which it took less time: that is what its user would set.

use crate::results::{Platform, Results, Series, Spread, Suite};

const CONTENDER: &str = "tmem-ublk";
const CONTENDER_WITH_DISK: &str = "tmem-backed";
const ENGINE: &str = "tmem";

/// What says which case is a contender's better one.
const BETTER_BY: &str = "wall";

/// A bound on a ratio to the baseline.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    AtLeast(f64),
    AtMost(f64),
}

/// What an aim is against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Against {
    /// The suite's baseline, in the same case.
    Baseline,
    /// Another contender, each in its better case.
    Best(&'static str),
    /// Nothing: the metric is a ratio already.
    Nothing,
}

pub struct Aim {
    pub what: &'static str,
    pub metric: &'static str,
    pub limit: Limit,
    suite: Suite,
    /// None: every case of the suite that has the metric.
    case: Option<&'static str>,
    pub against: Against,
}

pub const AIMS: [Aim; 9] = [
    Aim {
        what: "random read at depth 1",
        metric: "latency_mean",
        limit: Limit::AtMost(2.5),
        suite: Suite::Device,
        case: Some("randread-4k-qd1"),
        against: Against::Baseline,
    },
    Aim {
        what: "random read at depth 32",
        metric: "iops",
        limit: Limit::AtLeast(0.6),
        suite: Suite::Device,
        case: Some("randread-4k-qd32"),
        against: Against::Baseline,
    },
    Aim {
        what: "sequential write, 128 KiB",
        metric: "throughput",
        limit: Limit::AtLeast(0.95),
        suite: Suite::Device,
        case: Some("write-128k"),
        against: Against::Baseline,
    },
    Aim {
        what: "swapping programs",
        metric: "wall",
        limit: Limit::AtMost(1.15),
        suite: Suite::Swap,
        case: None,
        against: Against::Baseline,
    },
    Aim {
        what: "programs beyond the pool",
        metric: "wall",
        limit: Limit::AtMost(0.6),
        suite: Suite::Writeback,
        case: None,
        against: Against::Best("disk"),
    },
    Aim {
        what: "programs beyond the pool",
        metric: "wall",
        limit: Limit::AtMost(1.0),
        suite: Suite::Writeback,
        case: None,
        against: Against::Best("zswap"),
    },
    Aim {
        what: "written to the disk",
        metric: "disk_written",
        limit: Limit::AtMost(0.5),
        suite: Suite::Writeback,
        case: None,
        against: Against::Best("zswap"),
    },
    Aim {
        what: "written for a byte of real heaps",
        metric: "written_per_byte",
        limit: Limit::AtMost(0.45),
        suite: Suite::Density,
        case: None,
        against: Against::Nothing,
    },
    Aim {
        what: "written for a byte that programs have written back",
        metric: "written_per_byte",
        limit: Limit::AtMost(0.45),
        suite: Suite::Writeback,
        case: None,
        against: Against::Nothing,
    },
];

/// An aim against a case of a run.
pub struct Verdict {
    pub platform: Platform,
    pub case: String,
    /// None where the baseline was measured and tmem was not.
    pub ratio: Option<Spread>,
}

impl Limit {
    /// How much a ratio stays on the good side, as a part of the limit; negative on the other.
    pub fn slack(self, ratio: f64) -> f64 {
        match self {
            Self::AtLeast(limit) => ratio / limit - 1.0,
            Self::AtMost(limit) => 1.0 - ratio / limit,
        }
    }

    pub fn ratio(self) -> f64 {
        match self {
            Self::AtLeast(limit) | Self::AtMost(limit) => limit,
        }
    }
}

impl Aim {
    fn is_about(&self, suite: Suite, case: &str, metric: &str) -> bool {
        self.suite == suite && self.metric == metric && self.case.is_none_or(|aim| aim == case)
    }

    /// The verdicts on this aim; none if nothing was measured that it is about.
    pub fn verdicts(&self, all: &[Results]) -> Vec<Verdict> {
        let verdicts = |results| match self.against {
            Against::Baseline => self.by_case(results),
            Against::Best(against) => self.by_program(results, against),
            Against::Nothing => self.by_itself(results),
        };
        all.iter().flat_map(verdicts).collect()
    }

    fn by_case(&self, results: &Results) -> Vec<Verdict> {
        let is_base = |one: &&Series| {
            one.contender == results.baseline
                && self.is_about(results.suite, &one.case, &one.metric)
        };
        let verdict = |base: &Series| Verdict {
            platform: results.platform,
            case: base.case.clone(),
            ratio: results
                .series(&base.case, CONTENDER, &base.metric)
                .map(|own| own.ratio_to(base)),
        };
        results.samples.iter().filter(is_base).map(verdict).collect()
    }

    fn by_itself(&self, results: &Results) -> Vec<Verdict> {
        let is_own = |one: &&Series| {
            [ENGINE, CONTENDER_WITH_DISK].contains(&one.contender.as_str())
                && self.is_about(results.suite, &one.case, &one.metric)
        };
        let verdict = |own: &Series| Verdict {
            platform: results.platform,
            case: own.case.clone(),
            ratio: Some(own.spread()),
        };
        results.samples.iter().filter(is_own).map(verdict).collect()
    }

    /// The verdicts for each program, whatever the readahead.
    fn by_program(&self, results: &Results, against: &str) -> Vec<Verdict> {
        let mut programs: Vec<&str> = Vec::new();
        for one in results.samples.iter().filter(|one| one.contender == against) {
            let program = program(&one.case);
            if self.is_about(results.suite, &one.case, &one.metric) && !programs.contains(&program)
            {
                programs.push(program);
            }
        }
        let verdict = |program| {
            let base = best(results, program, against, self.metric)?;
            let own = best(results, program, CONTENDER_WITH_DISK, self.metric);
            Some(Verdict {
                platform: results.platform,
                case: program.to_owned(),
                ratio: own.map(|own| own.ratio_to(base)),
            })
        };
        programs.into_iter().filter_map(verdict).collect()
    }
}

/// A case's program, without its readahead.
fn program(case: &str) -> &str {
    case.rsplit_once("-pc").map_or(case, |(program, _)| program)
}

/// A contender's metric in that case of a program in which it took the least time.
fn best<'a>(
    results: &'a Results,
    program_name: &str,
    contender: &str,
    metric: &str,
) -> Option<&'a Series> {
    let times = results.samples.iter().filter(|one| {
        let is_its = one.contender == contender && one.metric == BETTER_BY;
        is_its && program(&one.case) == program_name
    });
    let fastest = times.min_by(|a, b| a.spread().median.total_cmp(&b.spread().median))?;
    results.series(&fastest.case, contender, metric)
}

/// The aim's limit for a case's metric, if there is an aim for it against the baseline in the same case.
pub fn limit_of(suite: Suite, case: &str, metric: &str) -> Option<Limit> {
    let is_it = |aim: &&Aim| aim.against == Against::Baseline && aim.is_about(suite, case, metric);
    AIMS.iter().find(is_it).map(|aim| aim.limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::results;
    use crate::samples::Better;

    #[test]
    fn an_aim_is_met_up_to_its_limit() {
        assert!(Limit::AtMost(2.5).slack(2.5) == 0.0 && Limit::AtLeast(0.6).slack(0.6) == 0.0);
        assert!((Limit::AtMost(2.5).slack(5.0) + 1.0).abs() < 1e-9);
        assert!((Limit::AtMost(2.0).slack(1.0) - 0.5).abs() < 1e-9);
        assert!((Limit::AtLeast(0.6).slack(0.3) + 0.5).abs() < 1e-9);
        assert!((Limit::AtLeast(0.5).slack(1.0) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn verdicts_are_by_case_and_say_what_is_missing() {
        let device = results(
            Suite::Device,
            &[
                ("randread-4k-qd1", "zram-lz4", "latency_mean", Better::Lower, &[2.0, 3.0]),
                ("randread-4k-qd1", "tmem-ublk", "latency_mean", Better::Lower, &[4.0, 6.0]),
                ("randread-4k-qd1", "tmem-nbd", "latency_mean", Better::Lower, &[400.0, 600.0]),
                ("randread-4k-qd32", "zram-lz4", "latency_mean", Better::Lower, &[1.0]),
            ],
            &[],
        );
        let swap = results(
            Suite::Swap,
            &[
                ("touch-pc0", "zram-lz4", "wall", Better::Lower, &[10.0]),
                ("touch-pc0", "tmem-ublk", "wall", Better::Lower, &[12.0]),
                ("sort-pc0", "zram-lz4", "wall", Better::Lower, &[10.0]),
            ],
            &[],
        );
        let all = [device, swap];
        let depth_1 = AIMS[0].verdicts(&all);
        assert_eq!(depth_1.len(), 1);
        assert_eq!(depth_1[0].ratio.unwrap().median, 2.0);
        assert!(AIMS[1].verdicts(&all).is_empty());
        let programs = AIMS[3].verdicts(&all);
        let cases: Vec<_> = programs.iter().map(|one| (&one.case[..], one.ratio)).collect();
        assert!(cases[0].0 == "touch-pc0" && cases[0].1.unwrap().median == 1.2);
        assert_eq!(cases[1], ("sort-pc0", None));
    }

    #[test]
    fn with_a_disk_each_is_judged_by_its_better_readahead() {
        let (lower, none) = (Better::Lower, Better::None);
        let writeback = results(
            Suite::Writeback,
            &[
                ("touch-pc0", "tmem-backed", "wall", lower, &[10.0, 12.0]),
                ("touch-pc0", "tmem-backed", "disk_written", lower, &[3.0, 3.0]),
                ("touch-pc0", "zswap", "wall", lower, &[30.0, 30.0]),
                ("touch-pc0", "zswap", "disk_written", lower, &[1.0, 1.0]),
                ("touch-pc0", "zswap", "pages_in", none, &[1.0, 1.0]),
                ("touch-pc3", "tmem-backed", "wall", lower, &[15.0, 15.0]),
                ("touch-pc3", "tmem-backed", "disk_written", lower, &[9.0, 9.0]),
                ("touch-pc3", "zswap", "wall", lower, &[20.0, 24.0]),
                ("touch-pc3", "zswap", "disk_written", lower, &[6.0, 6.0]),
                ("sort-pc0", "zswap", "wall", lower, &[1.0]),
            ],
            &[],
        );
        let all = [writeback];
        assert!(AIMS[4].verdicts(&all).is_empty());
        let wall: Vec<_> = AIMS[5].verdicts(&all);
        assert_eq!((&wall[0].case[..], wall[0].ratio.unwrap().median), ("touch", 0.5));
        assert!(wall[1].case == "sort" && wall[1].ratio.is_none() && wall.len() == 2);
        let written = AIMS[6].verdicts(&all);
        assert_eq!((written.len(), written[0].ratio.unwrap().median), (1, 0.5));
        assert_eq!(limit_of(Suite::Writeback, "touch-pc0", "wall"), None);
    }

    #[test]
    fn what_is_a_ratio_is_judged_by_itself() {
        let lower = Better::Lower;
        let density = results(
            Suite::Density,
            &[
                ("in-order", "tmem", "written_per_byte", lower, &[0.5, 0.3, 0.4]),
                ("in-order", "tmem-encrypted", "written_per_byte", lower, &[0.9]),
                ("fresh", "tmem", "bytes_per_byte", lower, &[0.9]),
            ],
            &[],
        );
        let writeback = results(
            Suite::Writeback,
            &[
                ("sort-pc0", "tmem-backed", "written_per_byte", lower, &[0.6, 0.5, 0.4]),
                ("sort-pc0", "tmem-backed", "wall", lower, &[1.0]),
                ("sort-pc3", "tmem-backed", "written_per_byte", lower, &[0.2]),
            ],
            &[],
        );
        let all = [density, writeback];
        let verdicts = AIMS[7].verdicts(&all);
        assert_eq!((verdicts.len(), verdicts[0].ratio.unwrap().median), (1, 0.4));
        let verdicts = AIMS[8].verdicts(&all);
        let medians: Vec<_> = verdicts.iter().map(|one| one.ratio.unwrap().median).collect();
        assert_eq!(medians, [0.5, 0.2]);
        assert_eq!(limit_of(Suite::Density, "in-order", "written_per_byte"), None);
    }

    #[test]
    fn limits_are_found_by_case_and_metric() {
        let limit = |case, metric| limit_of(Suite::Device, case, metric);
        assert_eq!(limit("randread-4k-qd32", "iops"), Some(Limit::AtLeast(0.6)));
        assert_eq!(limit("randread-4k-qd32", "latency_mean"), None);
        assert_eq!(limit_of(Suite::Swap, "any", "wall"), Some(Limit::AtMost(1.15)));
    }
}
