//! Tables for people and for scripts, with the habits of util-linux.
//!
//! A [`Column`] is a name, a line of help and a way to show one row. Columns are chosen by name,
//! in any case and order. A cell is never empty and never has a space in it, so that a raw table
//! can be split at spaces.

use crate::exit::{Exit, Failure};
use crate::size::Human;

/// How a table is shown.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Style {
    /// Sizes in bytes.
    pub bytes: bool,
    /// No headings.
    pub noheadings: bool,
    /// One space between columns, nothing aligned.
    pub raw: bool,
}

/// A column of a table of `T`s.
#[derive(Debug)]
pub struct Column<T> {
    /// Its name, in capitals.
    pub name: &'static str,
    /// What it shows.
    pub help: &'static str,
    /// What it shows of one row.
    pub cell: fn(&T) -> Cell,
}

/// What is in one place of a table.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Cell {
    /// Nothing: this row has no such thing.
    None,
    /// A number of things.
    Count(u64),
    /// How many times the second number the first one is.
    Ratio(u64, u64),
    /// A number of bytes.
    Size(u64),
    /// A word.
    Word(String),
}

impl Cell {
    fn show(&self, style: Style) -> String {
        match self {
            Cell::None => "-".to_owned(),
            Cell::Count(count) => count.to_string(),
            Cell::Ratio(part, whole) => ratio(*part, *whole),
            Cell::Size(bytes) if style.bytes => bytes.to_string(),
            Cell::Size(bytes) => Human(*bytes).to_string(),
            Cell::Word(word) => word.clone(),
        }
    }

    fn is_word(&self) -> bool {
        matches!(self, Cell::Word(_))
    }
}

/// `part / whole` with two decimals, rounded down; `-` of nothing.
pub fn ratio(part: u64, whole: u64) -> String {
    match (u128::from(part) * 100).checked_div(u128::from(whole)) {
        None => "-".to_owned(),
        Some(hundredths) => format!("{}.{:02}", hundredths / 100, hundredths % 100),
    }
}

/// The columns of these names.
pub fn select<'a, T>(
    columns: &'a [Column<T>],
    names: &[impl AsRef<str>],
) -> Result<Vec<&'a Column<T>>, Failure> {
    let find = |name: &str| columns.iter().find(|column| column.name.eq_ignore_ascii_case(name));
    let unknown = |name: &str| {
        let all: Vec<_> = columns.iter().map(|column| column.name).collect();
        let message = format!("there is no column '{name}': these can be shown: {}", all.join(","));
        Failure::new(Exit::Usage, message)
    };
    names.iter().map(|name| find(name.as_ref()).ok_or_else(|| unknown(name.as_ref()))).collect()
}

/// What each column shows, for a command's help.
pub fn help<T>(columns: &[Column<T>]) -> String {
    let width = columns.iter().map(|column| column.name.len()).max().unwrap_or(0);
    let mut text = String::from("Columns:");
    for column in columns {
        text.push_str(&format!("\n  {:>width$}  {}", column.name, column.help));
    }
    text
}

/// The table as text, a line a row. Words are flush left and numbers right, as their headings are.
pub fn render<T>(columns: &[&Column<T>], rows: &[T], style: Style) -> String {
    let cells: Vec<Vec<Cell>> =
        rows.iter().map(|row| columns.iter().map(|column| (column.cell)(row)).collect()).collect();
    let left: Vec<bool> =
        (0..columns.len()).map(|at| cells.iter().any(|row| row[at].is_word())).collect();
    let mut lines: Vec<Vec<String>> = Vec::new();
    if !style.noheadings {
        lines.push(columns.iter().map(|column| column.name.to_owned()).collect());
    }
    lines.extend(cells.iter().map(|row| row.iter().map(|cell| cell.show(style)).collect()));
    if style.raw {
        return lines.iter().map(|line| line.join(" ") + "\n").collect();
    }
    let widths: Vec<usize> = (0..columns.len())
        .map(|at| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0))
        .collect();
    lines.iter().map(|line| align(line, &widths, &left)).collect()
}

/// One line, each cell at the width of its column.
fn align(cells: &[String], widths: &[usize], left: &[bool]) -> String {
    let padded = cells.iter().zip(widths).zip(left).map(|((cell, width), left)| match left {
        true => format!("{cell:<width$}"),
        false => format!("{cell:>width$}"),
    });
    let line = padded.collect::<Vec<_>>().join(" ");
    format!("{}\n", line.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: &[Column<(&str, u64)>] = &[
        Column { name: "NAME", help: "who", cell: |row| Cell::Word(row.0.into()) },
        Column { name: "DATA", help: "how much", cell: |row| Cell::Size(row.1) },
        Column { name: "HALF", help: "of two", cell: |row| Cell::Ratio(row.1, row.1 * 2) },
    ];
    const ROWS: &[(&str, u64)] = &[("swap0", 1 << 30), ("b", 0)];

    fn all() -> Vec<&'static Column<(&'static str, u64)>> {
        COLUMNS.iter().collect()
    }

    #[test]
    fn people_get_aligned_columns() {
        let text = render(&all(), ROWS, Style::default());
        assert_eq!(text, "NAME  DATA HALF\nswap0   1G 0.50\nb       0B    -\n");
    }

    #[test]
    fn scripts_get_one_space() {
        let style = Style { bytes: true, noheadings: true, raw: true };
        assert_eq!(render(&all(), ROWS, style), "swap0 1073741824 0.50\nb 0 -\n");
    }

    #[test]
    fn no_rows_are_a_heading_or_nothing() {
        assert_eq!(render(&all(), &[], Style::default()), "NAME DATA HALF\n");
        let style = Style { noheadings: true, ..Style::default() };
        assert_eq!(render(&all(), &[], style), "");
    }

    #[test]
    fn columns_are_chosen_by_name() {
        let chosen = select(COLUMNS, &["data", "NAME"]).unwrap();
        let style = Style { raw: true, ..Style::default() };
        assert_eq!(render(&chosen, &ROWS[..1], style), "DATA NAME\n1G swap0\n");
        let failure = select(COLUMNS, &["DATA", "SIZE"]).unwrap_err();
        assert_eq!(failure.code, Exit::Usage);
        let message = "there is no column 'SIZE': these can be shown: NAME,DATA,HALF";
        assert_eq!(failure.message, message);
    }

    #[test]
    fn ratios_round_down() {
        assert_eq!(ratio(2999, 1000), "2.99");
        assert_eq!(ratio(u64::MAX, 1), "18446744073709551615.00");
        assert_eq!(ratio(1, 0), "-");
    }

    #[test]
    fn help_lists_the_columns() {
        assert_eq!(help(COLUMNS), "Columns:\n  NAME  who\n  DATA  how much\n  HALF  of two");
    }
}
