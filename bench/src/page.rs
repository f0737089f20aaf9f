//! The page: everything that results files say, for a person to read.
//!
//! `index.md` and a plot for each metric are made from the files of a folder alone, and say the
//! same each time.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::aims::{AIMS, Against, Aim, Limit, limit_of};
use crate::plot::{Bar, Group, bars};
use crate::results::{Platform, Results, Series, Spread, Suite};
use crate::samples::Better;

/// What the engine is built on: its cases are compared with that as well.
const CODEC: &str = "lz4_flex";

const INTRODUCTION: &str = "\
How fast tmem is and what memory it takes, beside what else swaps to memory. Made by `scripts/bench` and nothing
else: run it (`scripts/bench --quick` for a first look) to have your own. What each part measures, and what it does not,
is in `bench/README.md`.

A figure is the median of all rounds, in which the contenders take turns; beside it are the lowest and the
highest. A ratio is made within each round and is the median of those.
";

/// Writes the page and the plots for the results files in a folder.
pub fn write(folder: &Path) -> Result<()> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => all.push(Results::read(&path)?),
            // What no results are behind any more.
            Some("svg") => fs::remove_file(path)?,
            _ => {}
        }
    }
    if all.is_empty() {
        bail!("{} has no results", folder.display());
    }
    all.sort_by_key(|results| (results.suite, results.platform));
    for results in &all {
        for metric in metrics(results) {
            let svg = plot(results, metric);
            fs::write(folder.join(plot_name(results, metric)), svg)?;
        }
    }
    fs::write(folder.join("index.md"), text(&all))?;
    Ok(())
}

fn text(all: &[Results]) -> String {
    let mut page = format!("# Figures\n\n{INTRODUCTION}\n");
    if all.iter().any(|results| results.quick) {
        page += "**From a quick run: few rounds, no more than a first look.**\n\n";
    }
    page += &aims(all);
    for results in all {
        page += &suite(results);
    }
    page
}

fn aims(all: &[Results]) -> String {
    let mut page = String::from(
        "## Aims\n\n\
         Against kernel zram (lz4) in the same run, by ublk; with a disk against what is named, each with its \
         better readahead.\n\n\
         | aim | limit | on | case | ratio | lowest - highest | |\n|---|---|---|---|---|---|---|\n",
    );
    for aim in &AIMS {
        let verdicts = aim.verdicts(all);
        if verdicts.is_empty() {
            let _ = writeln!(page, "| {} | {} | | | | | not measured |", aim.what, limit(aim));
        }
        for verdict in verdicts {
            let start = format!(
                "| {} | {} | {} | {}",
                aim.what,
                limit(aim),
                short_name(verdict.platform),
                verdict.case
            );
            let _ = match verdict.ratio {
                None => writeln!(page, "{start} | | | tmem was not measured |"),
                Some(ratio) => writeln!(
                    page,
                    "{start} | {:.2} | {} | {} |",
                    ratio.median,
                    range(ratio, |value| format!("{value:.2}")),
                    judged(aim, ratio.median)
                ),
            };
        }
    }
    page + "\n"
}

fn limit(aim: &Aim) -> String {
    let (direction, limit) = match aim.limit {
        Limit::AtLeast(limit) => ("at least", limit),
        Limit::AtMost(limit) => ("at most", limit),
    };
    let of = match aim.against {
        Against::Baseline => " times".to_owned(),
        Against::Best(against) => format!(" times {against}'s"),
        Against::Nothing => String::new(),
    };
    format!("{}, {direction} {limit}{of}", aim.metric)
}

fn judged(aim: &Aim, ratio: f64) -> String {
    let slack = aim.limit.slack(ratio);
    let percent = (slack.abs() * 100.0).round();
    match slack >= 0.0 {
        true => format!("met, {percent} % to spare"),
        false => format!("**missed** by {percent} %"),
    }
}

fn suite(results: &Results) -> String {
    let machine = &results.machine;
    let mut page = format!(
        "## {}, {}\n\n{}\n\n- {}, {} processors, {} MiB of memory; {}\n- kernel measured on: {}",
        suite_name(results.suite),
        platform_name(results.platform),
        about(results),
        machine.cpu,
        machine.cpus,
        machine.memory_mib,
        machine.date,
        machine.kernel,
    );
    if machine.kernel != machine.host_kernel {
        let _ = write!(page, "; the host's: {}", machine.host_kernel);
    }
    let _ =
        writeln!(page, "\n- tmem {}; again by `scripts/bench {}`", machine.revision, part(results));
    for missing in &results.not_run {
        let case = missing.case.as_ref().map_or(String::new(), |case| format!(" in {case}"));
        let _ =
            writeln!(page, "- **did not run{case}:** {}: {}", missing.contender, missing.not_run);
    }
    page += "\n";
    for metric in metrics(results) {
        page += &table(results, metric);
    }
    page
}

/// What `scripts/bench` calls the part that has measured it.
fn part(results: &Results) -> String {
    match (results.suite, results.platform) {
        (Suite::Device | Suite::Swap, Platform::Uml) => key(results.platform),
        // In the machine that the block devices are in.
        (Suite::Density, Platform::QemuKvm | Platform::QemuTcg) => key(Suite::Device),
        (suite, _) => key(suite),
    }
}

fn table(results: &Results, metric: &Series) -> String {
    let has_codec = results.samples.iter().any(|series| series.contender == CODEC);
    let (name, unit) = (&metric.metric, shown(metric, 0.0).1);
    let mut page = format!("### {name}{}\n\n", unit_and_direction(unit, metric.better));
    let _ = writeln!(page, "![{name}]({})\n", plot_name(results, metric));
    let (head, rule) =
        if has_codec { (format!(" to {CODEC} |"), "--:|") } else { Default::default() };
    let base = &results.baseline;
    let _ = writeln!(page, "| case | by | median | lowest - highest | rounds | to {base} |{head}");
    let _ = writeln!(page, "|---|---|--:|--:|--:|--:|{rule}");
    let mut case_before = "";
    for series in cases(results, metric).into_iter().flatten() {
        let spread = series.spread();
        let value = |value| shown(series, value).0;
        let _ = write!(
            page,
            "| {} | {} | {} | {} | {} | {} |",
            if series.case == case_before { "" } else { &series.case },
            series.contender,
            value(spread.median),
            range(spread, value),
            series.values.len(),
            ratio(series, results.base_of(series)),
        );
        if has_codec {
            let codec = results.series(&series.case, CODEC, &series.metric);
            let _ = write!(page, " {} |", ratio(series, codec));
        }
        page += "\n";
        case_before = &series.case;
    }
    page + "\n"
}

fn plot(results: &Results, metric: &Series) -> String {
    let group = |case: Vec<&Series>| {
        let base = results.base_of(case[0]);
        let bar = |series: &&Series| {
            let (value, unit) = shown(series, series.spread().median);
            let unit = if unit == "ratio" { String::new() } else { format!(" {unit}") };
            let other = base.filter(|base| base.contender != series.contender);
            let times =
                other.map(|base| series.ratio_to(base).median).filter(|one| one.is_finite());
            let times = times.map_or(String::new(), |times| format!(" ({times:.2}x)"));
            Bar {
                contender: series.contender.clone(),
                spread: series.spread(),
                text: format!("{value}{unit}{times}"),
            }
        };
        let limit = limit_of(results.suite, &case[0].case, &case[0].metric);
        let mark = limit.zip(base).map(|(limit, base)| {
            let times = limit.ratio();
            (base.spread().median * times, format!("aim: {times}x {}", results.baseline))
        });
        Group { name: case[0].case.clone(), bars: case.iter().map(bar).collect(), mark }
    };
    let mut cases = cases(results, metric);
    if cases.iter().any(|case| case.len() > 1) {
        // What there is nothing to compare with is in the table.
        cases.retain(|case| case.len() > 1);
    }
    let groups: Vec<_> = cases.into_iter().map(group).collect();
    let title = format!("{}: {}", suite_name(results.suite), metric.metric);
    let direction = direction(metric.better);
    let subtitle = format!(
        "{}, Linux {}; {direction}(x) is to {}",
        platform_name(results.platform),
        results.machine.kernel,
        results.baseline
    );
    bars(&title, &subtitle, &groups)
}

/// The first series of each metric.
fn metrics(results: &Results) -> Vec<&Series> {
    let mut metrics: Vec<&Series> = Vec::new();
    for series in &results.samples {
        if metrics.iter().all(|known| known.metric != series.metric) {
            metrics.push(series);
        }
    }
    metrics
}

/// The series of a metric, by case.
fn cases<'a>(results: &'a Results, metric: &Series) -> Vec<Vec<&'a Series>> {
    let mut cases: Vec<Vec<&Series>> = Vec::new();
    for series in results.samples.iter().filter(|series| series.metric == metric.metric) {
        match cases.iter_mut().find(|case| case[0].case == series.case) {
            Some(case) => case.push(series),
            None => cases.push(vec![series]),
        }
    }
    cases
}

fn plot_name(results: &Results, metric: &Series) -> String {
    let (suite, platform) = (key(results.suite), key(results.platform));
    format!("{suite}-{platform}-{}.svg", metric.metric)
}

/// The name that the command line knows.
fn key(value: impl ValueEnum) -> String {
    let value = value.to_possible_value().expect("no value is hidden");
    value.get_name().to_owned()
}

fn suite_name(suite: Suite) -> &'static str {
    match suite {
        Suite::Density => "Density",
        Suite::Device => "Block device",
        Suite::Engine => "Engine",
        Suite::Swap => "Swapping",
        Suite::Writeback => "Swapping with a disk behind it",
    }
}

fn platform_name(platform: Platform) -> &'static str {
    match platform {
        Platform::Host => "in a process on the host",
        Platform::QemuKvm => "under QEMU (KVM)",
        Platform::QemuTcg => "under QEMU with emulated processors (TCG)",
        Platform::QemuCounted => "under QEMU with counted instructions",
        Platform::Uml => "under User-mode Linux",
    }
}

fn short_name(platform: Platform) -> &'static str {
    match platform {
        Platform::Host => "host",
        Platform::QemuKvm => "QEMU, KVM",
        Platform::QemuTcg => "QEMU, TCG",
        Platform::QemuCounted => "QEMU, counted",
        Platform::Uml => "User-mode Linux",
    }
}

/// What to think of when reading a suite's figures.
fn about(results: &Results) -> &'static str {
    match (results.suite, results.platform) {
        (Suite::Engine, _) => {
            "A page through the engine, through the bare codecs, and through the kernel's zram by \
             direct reads and writes of a process, which costs a system call that swapping does not."
        }
        (Suite::Density, Platform::QemuKvm | Platform::QemuTcg) => {
            "Memory that block devices take for a byte stored, after the same pages were written to \
             each, with all tables and with the free frames that tmem keeps ready. The daemon's own \
             memory is not counted."
        }
        (Suite::Density, _) => {
            "Memory taken for a byte stored, with all tables. `tmem` counts the free frames that it \
             keeps ready as well, `tmem-in-use` does not."
        }
        (Suite::Swap, Platform::QemuTcg) => {
            "Emulated processors are ten to twenty times slower than real ones, and not evenly so: the \
             switches from one process to another, of which a page read from tmem needs two and one \
             from zram none, cost far more there than decompressing does. User-mode Linux is nearer to a \
             real machine. The disk is as fast as a real one, so beside the rest it looks faster than it \
             is."
        }
        (Suite::Writeback, Platform::QemuCounted) => {
            "Time is the number of instructions that the one processor has run, and stands for nothing else: what a real one \
             waits for memory does not count, nor what goes on beside it. An instruction is a nanosecond, some four times \
             slower than on a real one, and the disk is four times slower than a real one too. For sort and python everybody \
             has the same memory in all, programs and pool together, a quarter of it for the pool; touch has a whole small machine. zram \
             writes nothing back by itself: a shell loop has it do so each second."
        }
        (_, Platform::QemuCounted) => {
            "Time is the number of instructions that the processors have run, and stands for nothing else."
        }
        (Suite::Writeback, _) => {
            "For sort and python everybody has the same memory in all, programs and pool together, a quarter of it for the \
             pool; touch has a whole small machine. zram writes nothing back by itself: a shell loop has it do so each second."
        }
        (_, Platform::QemuTcg) => {
            "Emulated processors are ten to twenty times slower than real ones, and not evenly so: \
             ratios mean something, times do not."
        }
        (_, Platform::QemuKvm) => "Times are those of a virtual machine.",
        (_, Platform::Uml) => {
            "The kernel is a process of the host with one processor: code runs as fast as on the \
             host, system calls and wake-ups are slower, and nothing runs side by side."
        }
        (_, Platform::Host) => "Times are the host's.",
    }
}

fn unit_and_direction(unit: &str, better: Better) -> String {
    match direction(better).trim_end_matches("; ") {
        "" => format!(" ({unit})"),
        direction => format!(" ({unit}, {direction})"),
    }
}

fn direction(better: Better) -> &'static str {
    match better {
        Better::Higher => "higher is better; ",
        Better::Lower => "lower is better; ",
        Better::None => "",
    }
}

/// Nothing without a base, or where the base is zero.
fn ratio(series: &Series, base: Option<&Series>) -> String {
    let ratio = base.map(|base| series.ratio_to(base).median).filter(|ratio| ratio.is_finite());
    ratio.map_or(String::new(), |ratio| format!("{ratio:.3}"))
}

fn range(spread: Spread, shown: impl Fn(f64) -> String) -> String {
    format!("{} - {}", shown(spread.lowest), shown(spread.highest))
}

/// A value as it is shown, and its unit: bytes are shown as MiB.
fn shown(series: &Series, value: f64) -> (String, &str) {
    match series.unit.as_str() {
        "bytes" => (number(value / f64::from(1 << 20)), "MiB"),
        unit => (number(value), unit),
    }
}

/// Three digits that count, or all before the point.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 99.95 => thousands(value.round()),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.9995 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::results;

    fn device() -> Results {
        results(
            Suite::Device,
            &[
                ("randread-4k-qd1", "zram-lz4", "latency_mean", Better::Lower, &[2.0, 4.0, 3.0]),
                ("randread-4k-qd1", "tmem-ublk", "latency_mean", Better::Lower, &[6.0, 8.0, 9.0]),
                ("randread-4k-qd32", "zram-lz4", "iops", Better::Higher, &[40000.0]),
                ("randread-4k-qd32", "tmem-ublk", "iops", Better::Higher, &[30000.0]),
                ("touch", "zram-lz4", "pages_in", Better::None, &[0.0]),
                ("touch", "tmem-ublk", "pages_in", Better::None, &[0.0]),
            ],
            &[("nbdkit-zstd", "nbdkit has no such allocator")],
        )
    }

    #[test]
    fn tables_have_median_spread_rounds_and_ratio() {
        let page = text(&[device()]);
        for row in [
            "### latency_mean (us, lower is better)",
            "| case | by | median | lowest - highest | rounds | to zram-lz4 |",
            "| randread-4k-qd1 | zram-lz4 | 3.00 | 2.00 - 4.00 | 3 | 1.000 |",
            "|  | tmem-ublk | 8.00 | 6.00 - 9.00 | 3 | 3.000 |",
            "|  | tmem-ublk | 30,000 | 30,000 - 30,000 | 1 | 0.750 |",
            "### pages_in (us)",
            "|  | tmem-ublk | 0.00 | 0.00 - 0.00 | 1 |  |",
            "- **did not run:** nbdkit-zstd: nbdkit has no such allocator",
            "kernel measured on: 6.12.0-test; the host's: ",
            "; again by `scripts/bench device`",
        ] {
            assert!(page.contains(row), "{row}\n{page}");
        }
    }

    #[test]
    fn the_aims_table_says_met_missed_and_not_measured() {
        let page = aims(&[device()]);
        for row in [
            "at most 2.5 times | QEMU, TCG | randread-4k-qd1 | 3.00 | 2.00 - 3.00 | **missed** by 20 % |",
            "at least 0.6 times | QEMU, TCG | randread-4k-qd32 | 0.75 | 0.75 - 0.75 | met, 25 % to spare |",
            "| sequential write, 128 KiB | throughput, at least 0.95 times | | | | | not measured |",
        ] {
            assert!(page.contains(row), "{row}\n{page}");
        }
    }

    #[test]
    fn density_of_the_host_and_of_devices_are_told_apart() {
        let series = [("fresh", "zram-zstd", "bytes_per_byte", Better::Lower, &[0.3][..])];
        let (mut host, device) =
            (results(Suite::Density, &series, &[]), results(Suite::Density, &series, &[]));
        host.platform = Platform::Host;
        let page = text(&[host, device]);
        for line in [
            "## Density, in a process on the host",
            "; again by `scripts/bench density`",
            "## Density, under QEMU with emulated processors (TCG)",
            "; again by `scripts/bench device`",
        ] {
            assert!(page.contains(line), "{line}\n{page}");
        }
    }

    #[test]
    fn engine_cases_are_compared_with_the_codec_too() {
        let engine = results(
            Suite::Engine,
            &[
                ("put", "lz4_flex", "time_per_page", Better::Lower, &[5.0]),
                ("put", "tmem", "time_per_page", Better::Lower, &[6.0]),
            ],
            &[],
        );
        let page = text(&[engine]);
        assert!(page.contains("| to zram-lz4 | to lz4_flex |"), "{page}");
        assert!(page.contains("|  | tmem | 6.00 | 6.00 - 6.00 | 1 |  | 1.200 |"), "{page}");
    }

    #[test]
    fn a_folder_gets_a_page_and_a_plot_for_each_metric() {
        let folder = std::env::temp_dir().join(format!("tmem-page-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        assert!(write(&folder).is_err());
        fs::write(folder.join("old.svg"), "").unwrap();
        device().write(&folder.join("device.json")).unwrap();
        write(&folder).unwrap();
        let plot = fs::read_to_string(folder.join("device-qemu-tcg-latency_mean.svg")).unwrap();
        assert!(plot.contains("aim: 2.5x zram-lz4"));
        assert!(folder.join("index.md").exists() && !folder.join("old.svg").exists());
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn numbers_keep_three_digits() {
        let shown = [0.0, 0.0123, 0.9999, 1.234, 12.34, 99.99, 123.4, 1234567.8].map(number);
        assert_eq!(shown, ["0.00", "0.012", "1.00", "1.23", "12.3", "100", "123", "1,234,568"]);
    }
}
