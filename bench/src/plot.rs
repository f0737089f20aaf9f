//! Plots: bars with whiskers, as SVG.
//!
//! Written by hand because it is one kind of plot; a plotting library would be larger than this
//! file in every respect. A plot needs nothing but a browser, and has a background of its own.

use std::fmt::Write;

use crate::results::Spread;

/// The bars of one case.
pub struct Group {
    pub name: String,
    pub bars: Vec<Bar>,
    /// Where a line is drawn across the bars, and what it is.
    pub mark: Option<(f64, String)>,
}

pub struct Bar {
    pub contender: String,
    pub spread: Spread,
    /// What is written behind the bar.
    pub text: String,
}

const COLUMNS: usize = 2;
const COLUMN_WIDTH: f64 = 500.0;
const MARGIN: f64 = 16.0;
const LABEL_WIDTH: f64 = 148.0;
/// The longest bar or whisker; behind it is room for the text.
const BAR_WIDTH: f64 = 200.0;
const BAR_HEIGHT: f64 = 14.0;
const BAR_STEP: f64 = 20.0;
const HEAD: f64 = 58.0;
const GROUP_HEAD: f64 = 24.0;
const GROUP_FOOT: f64 = 22.0;

/// Groups are drawn to one scale unless some would be too small to see.
const SCALE_MOST: f64 = 4.0;

/// Draws groups of bars.
pub fn bars(title: &str, subtitle: &str, groups: &[Group]) -> String {
    let largest: Vec<f64> = groups.iter().map(Group::largest).collect();
    let all = largest.iter().copied().fold(0.0, f64::max);
    let smallest = largest.iter().copied().fold(f64::INFINITY, f64::min);
    let is_shared = all <= smallest * SCALE_MOST;
    let scale = if is_shared { "one scale" } else { "each case to its own scale" };
    let subtitle = format!("{subtitle}; whiskers from lowest to highest; {scale}");
    let mut body = String::new();
    let mut top = HEAD;
    for (row, largest) in groups.chunks(COLUMNS).zip(largest.chunks(COLUMNS)) {
        for (column, group) in row.iter().enumerate() {
            let scale = BAR_WIDTH / if is_shared { all } else { largest[column] };
            group.draw(&mut body, MARGIN + column as f64 * COLUMN_WIDTH, top, scale);
        }
        top += row.iter().map(Group::height).fold(0.0, f64::max);
    }
    let width = MARGIN + COLUMN_WIDTH * groups.len().clamp(1, COLUMNS) as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{top}\" \
         viewBox=\"0 0 {width} {top}\" font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" \
         font-size=\"12\" fill=\"#222\">\n\
         <rect width=\"{width}\" height=\"{top}\" fill=\"#fff\"/>\n"
    );
    text(&mut svg, MARGIN, 24.0, "font-size=\"16\" font-weight=\"bold\"", title);
    text(&mut svg, MARGIN, 42.0, "fill=\"#666\" font-size=\"11\"", &subtitle);
    svg + &body + "</svg>\n"
}

impl Group {
    fn largest(&self) -> f64 {
        let mark = self.mark.as_ref().map_or(0.0, |mark| mark.0);
        // A scale is needed even where all is zero.
        self.bars.iter().map(|bar| bar.spread.highest).fold(mark, f64::max).max(f64::MIN_POSITIVE)
    }

    fn height(&self) -> f64 {
        GROUP_HEAD + self.bars.len() as f64 * BAR_STEP + GROUP_FOOT
    }

    fn draw(&self, svg: &mut String, left: f64, top: f64, scale: f64) {
        text(svg, left, top + 14.0, "font-weight=\"bold\"", &self.name);
        let (zero, first) = (left + LABEL_WIDTH, top + GROUP_HEAD);
        let middle = |at: usize| first + (at as f64 + 0.5) * BAR_STEP;
        for (at, bar) in self.bars.iter().enumerate() {
            text(svg, zero - 6.0, middle(at) + 4.0, "text-anchor=\"end\"", &bar.contender);
            bar.draw(svg, zero, middle(at), scale);
        }
        let bottom = first + self.bars.len() as f64 * BAR_STEP;
        line(svg, [zero, first, zero, bottom], "#888");
        if let Some((value, label)) = &self.mark {
            let at = zero + value * scale;
            line(svg, [at, first, at, bottom + 3.0], "#c00\" stroke-dasharray=\"4 3");
            let style = "fill=\"#c00\" font-size=\"10\" text-anchor=\"middle\"";
            text(svg, at, bottom + 13.0, style, label);
        }
        for (at, bar) in self.bars.iter().enumerate() {
            // Readable where the mark is behind it.
            let style =
                "font-size=\"11\" stroke=\"#fff\" stroke-width=\"4\" paint-order=\"stroke\"";
            text(svg, zero + bar.spread.highest * scale + 7.0, middle(at) + 4.0, style, &bar.text);
        }
    }
}

impl Bar {
    fn draw(&self, svg: &mut String, zero: f64, middle: f64, scale: f64) {
        let at = |value: f64| zero + value * scale;
        let (top, width) = (middle - BAR_HEIGHT / 2.0, self.spread.median * scale);
        let colour = colour(&self.contender);
        let bar = format!("<rect x=\"{zero:.1}\" y=\"{top:.1}\" width=\"{width:.1}\"");
        let _ = writeln!(svg, "{bar} height=\"{BAR_HEIGHT}\" fill=\"{colour}\"/>");
        let (low, high) = (at(self.spread.lowest), at(self.spread.highest));
        line(svg, [low, middle, high, middle], "#222");
        for end in [low, high] {
            line(svg, [end, middle - 3.0, end, middle + 3.0], "#222");
        }
    }
}

fn line(svg: &mut String, [x1, y1, x2, y2]: [f64; 4], stroke: &str) {
    let from = format!("<line x1=\"{x1:.1}\" y1=\"{y1:.1}\"");
    let _ = writeln!(svg, "{from} x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{stroke}\"/>");
}

fn text(svg: &mut String, x: f64, y: f64, style: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{text}</text>");
}

/// A contender has one colour everywhere: ours are warm, zram's blue, codecs' green.
fn colour(contender: &str) -> &'static str {
    match contender {
        "tmem" | "tmem-ublk" => "#e4572e",
        "tmem-nbd" | "tmem-in-use" => "#f3a27b",
        name if name.starts_with("tmem") => "#f2c14e",
        "zram-lz4" => "#2e6fb7",
        "zram-lzo-rle" => "#78a9d8",
        "zram-zstd" => "#1b3f66",
        name if name.starts_with("zram") => "#a9c6e5",
        "zswap" => "#2a9d8f",
        "lz4_flex" => "#7fb069",
        "lz4-c" => "#3f7d44",
        "nbdkit-zstd" => "#8e6bbf",
        "disk" => "#777777",
        _ => "#bbbbbb",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, median: f64) -> Group {
        let spread = Spread { median, lowest: median / 2.0, highest: median * 2.0 };
        let bar = Bar { contender: "a<b".to_owned(), spread, text: "1 us".to_owned() };
        Group { name: name.to_owned(), bars: vec![bar], mark: None }
    }

    #[test]
    fn bars_and_whiskers_are_as_long_as_their_values() {
        let svg = bars("title", "lower is better", &[group("one", 5.0), group("two", 10.0)]);
        assert!(svg.contains("width=\"50.0\"") && svg.contains("width=\"100.0\""), "{svg}");
        assert!(svg.contains("a&lt;b") && svg.contains("; one scale"));
        assert_eq!(svg.matches("<rect").count(), 3);
    }

    #[test]
    fn small_groups_get_a_scale_of_their_own_and_marks_count() {
        let mut small = group("small", 1.0);
        small.mark = Some((4.0, "aim".to_owned()));
        let svg = bars("title", "lower is better", &[small, group("large", 1000.0)]);
        assert!(svg.contains("each case to its own scale"));
        assert!(svg.contains("width=\"50.0\"") && svg.contains("width=\"100.0\""), "{svg}");
        assert!(svg.contains(">aim</text>"));
    }
}
