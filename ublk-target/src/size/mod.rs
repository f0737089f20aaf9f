//! Sizes as people write them: `4G`, `512M`, `1.5G`, `25%` of RAM, plain bytes, and arithmetic on these:
//! `min(ram / 2, 8G)`.
//!
//! Units are binary: `K`, `KB` and `KiB` are all 1024. A whole number is taken to the byte, so that
//! nothing is rounded behind the user's back; a fraction, a percentage or a part is inexact by nature and
//! is rounded down to whole pages. There is no floating point here.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use tmem::PAGE_SIZE;

use expression::{Expression, Wrong};

mod expression;

/// An amount of memory, as it was written. How much that is may depend on this machine's RAM.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Size {
    text: String,
    expression: Expression,
}

impl Size {
    /// Half of RAM.
    pub fn half_of_ram() -> Self {
        "50%".parse().expect("a size")
    }

    /// The number of bytes on a machine with `ram` bytes of memory.
    pub fn bytes(&self, ram: u64) -> Result<u64, SizeError> {
        let bytes = self.expression.value(ram).and_then(|value| value.bytes());
        let bytes = bytes.map_err(|wrong| SizeError::new(wrong, &self.text))?;
        Ok(if self.expression.is_exact() { bytes } else { whole_pages(bytes) })
    }

    /// The number of bytes, if that is the same on every machine.
    pub fn fixed_bytes(&self) -> Option<u64> {
        if self.expression.mentions_ram() {
            return None;
        }
        // A value that needs no RAM was computed when it was read.
        self.bytes(0).ok()
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Why a text is no size.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SizeError {
    /// Not a number with a unit, and nothing that is made of such.
    #[error(
        "'{0}' is not a size: write a number of bytes, or one like 512M, 1.5G, 25%, or arithmetic \
         like min(ram / 2, 8G)"
    )]
    Malformed(String),
    /// Too much to be read.
    #[error("'{0}' is too long or too deeply nested for a size: write it in a simpler way")]
    Complex(String),
    /// More bytes than can be counted.
    #[error("'{0}' is too large: the most is 18446744073709551615 bytes, or 10000% of RAM")]
    TooLarge(String),
    /// A division by zero.
    #[error("'{0}' divides by zero")]
    DividedByZero(String),
    /// Less than nothing.
    #[error("'{0}' is less than nothing on this machine: write max(0, ...) around what subtracts")]
    Negative(String),
}

impl SizeError {
    fn new(wrong: Wrong, text: &str) -> Self {
        // What is far too long is not repeated.
        let text = text.chars().take(80).collect();
        match wrong {
            Wrong::Malformed => Self::Malformed(text),
            Wrong::Complex => Self::Complex(text),
            Wrong::TooLarge => Self::TooLarge(text),
            Wrong::DividedByZero => Self::DividedByZero(text),
            Wrong::Negative => Self::Negative(text),
        }
    }
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let expression = Expression::parse(text).map_err(|wrong| SizeError::new(wrong, text))?;
        if matches!(expression, Expression::Factor(_)) {
            // It is a unit that was forgotten.
            return Err(SizeError::Malformed(text.to_owned()));
        }
        let size = Self { text: text.trim().to_owned(), expression };
        if !size.expression.mentions_ram() {
            size.bytes(0)?;
        }
        Ok(size)
    }
}

/// Splits `SIZE,OPTION` at the first comma that is not the size's own.
pub fn split_option(text: &str) -> (&str, Option<&str>) {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth <= 0 => return (&text[..at], Some(&text[at + 1..])),
            _ => {}
        }
    }
    (text, None)
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or a size in quotes like \"4G\", \"25%\" or \"min(ram / 2, 8G)\"")
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                let negative = E::custom(format_args!("{bytes} is not a size: it is negative"));
                self.visit_u64(u64::try_from(bytes).map_err(|_| negative)?)
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                self.visit_str(&bytes.to_string())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(SizeVisitor)
    }
}

/// A number with a decimal point: `digits / divisor`, exactly.
#[derive(Clone, Copy)]
struct Decimal {
    digits: u128,
    divisor: u128,
}

impl Decimal {
    /// Reads `12`, `12.5` and `.5`, with at most nine digits after the point.
    fn parse(text: &str) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        if text.is_empty() || text == "." || text.ends_with('.') || fraction.contains('.') {
            return None;
        }
        if fraction.len() > 9 {
            return None;
        }
        // More digits than can be counted saturate: whoever multiplies finds them too large.
        let whole = if whole.is_empty() { 0 } else { whole.parse().unwrap_or(u128::MAX) };
        let divisor = 10u128.pow(u32::try_from(fraction.len()).ok()?);
        let fraction = if fraction.is_empty() { 0 } else { fraction.parse::<u128>().ok()? };
        Some(Self { digits: whole.saturating_mul(divisor).saturating_add(fraction), divisor })
    }
}

/// The power of two that a unit stands for.
fn unit_shift(unit: &str) -> Option<u32> {
    let unit = unit.to_ascii_uppercase();
    if unit.is_empty() || unit == "B" {
        return Some(0);
    }
    let prefix = unit.strip_suffix("IB").or_else(|| unit.strip_suffix('B')).unwrap_or(&unit);
    let position = ["K", "M", "G", "T", "P", "E"].iter().position(|letter| *letter == prefix)?;
    Some(10 * (u32::try_from(position).ok()? + 1))
}

/// `bytes` rounded down to whole pages.
fn whole_pages(bytes: u64) -> u64 {
    bytes - bytes % PAGE_SIZE as u64
}

/// This machine's memory in bytes.
pub fn ram_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram * u64::from(info.mem_unit)
}

/// A number of bytes that displays as util-linux shows it: `512M`, `1.2G`, `0B`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Human(pub u64);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Human(bytes) = *self;
        let mut power = bytes.checked_ilog2().unwrap_or(0) / 10;
        let mut tenths = tenths_of(bytes, power);
        if tenths == 10 * 1024 && power < 6 {
            power += 1;
            tenths = 10;
        }
        let letter = ["B", "K", "M", "G", "T", "P", "E"][power as usize];
        let text = match (tenths / 10, tenths % 10) {
            (whole, 0) => format!("{whole}{letter}"),
            (whole, tenth) => format!("{whole}.{tenth}{letter}"),
        };
        f.pad(&text)
    }
}

/// `bytes` in tenths of 1024 to the `power`, rounded half up.
fn tenths_of(bytes: u64, power: u32) -> u64 {
    let unit = 1u128 << (10 * power);
    u64::try_from((u128::from(bytes) * 10 + unit / 2) / unit).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> u64 {
        text.parse::<Size>().unwrap().fixed_bytes().unwrap()
    }

    #[test]
    fn units_are_binary_in_every_spelling() {
        assert_eq!(bytes("0"), 0);
        assert_eq!(bytes("4097"), 4097);
        for text in ["4G", "4g", "4GB", "4GiB", "4gib", " 4 GiB ", "4096M", "4194304K"] {
            assert_eq!(bytes(text), 4 << 30, "{text}");
        }
        assert_eq!(bytes("1T"), 1 << 40);
        assert_eq!(bytes("15E"), 15 << 60);
        assert_eq!(bytes("512B"), 512);
    }

    #[test]
    fn fractions_round_down_to_whole_pages() {
        assert_eq!(bytes("1.5G"), 3 << 29);
        assert_eq!(bytes(".5M"), 1 << 19);
        assert_eq!(bytes("1.1G"), 1181114368);
        assert_eq!(bytes("1.1G") % 4096, 0);
    }

    #[test]
    fn shares_of_ram() {
        let of = |text: &str, ram| text.parse::<Size>().unwrap().bytes(ram).unwrap();
        assert_eq!(of("25%", 16 << 30), 4 << 30);
        assert_eq!(of("12.5 %", 16 << 30), 2 << 30);
        assert_eq!(of("33.33%", 10_000 * 4096 + 1), 3333 * 4096);
        assert_eq!(of("100%", u64::MAX), whole_pages(u64::MAX));
        assert_eq!("25%".parse::<Size>().unwrap().fixed_bytes(), None);
    }

    #[test]
    fn arithmetic_is_rounded_only_where_something_is_divided() {
        let of = |text: &str| text.parse::<Size>().unwrap().bytes((16 << 30) + 4096).unwrap();
        assert_eq!(of("min(ram / 2, 8G)"), 8 << 30);
        assert_eq!(of("ram / 2"), (8 << 30));
        assert_eq!(of("1G + 1"), (1 << 30) + 1);
        assert_eq!(of("ram - 4097"), (16 << 30) - 4096);
        assert_eq!(bytes("2 * 10M"), 20 << 20);
    }

    #[test]
    fn what_depends_on_the_machine_fails_there() {
        let size: Size = "ram - 4G".parse().unwrap();
        assert_eq!(size.bytes(8 << 30), Ok(4 << 30));
        assert_eq!(size.bytes(2 << 30), Err(SizeError::Negative("ram - 4G".into())));
        let size: Size = "1G / (ram - 4G)".parse().unwrap();
        assert!(matches!(size.bytes(4 << 30), Err(SizeError::DividedByZero(_))));
        assert!(matches!("1G/0".parse::<Size>(), Err(SizeError::DividedByZero(_))));
        assert!(matches!("1G-2G".parse::<Size>(), Err(SizeError::Negative(_))));
        let long = "1+".repeat(1000);
        assert!(long.parse::<Size>().unwrap_err().to_string().len() < 200);
    }

    #[test]
    fn an_option_is_behind_the_size() {
        assert_eq!(split_option("4G"), ("4G", None));
        assert_eq!(split_option("4G,name=a,b"), ("4G", Some("name=a,b")));
        assert_eq!(
            split_option("min(1G,max(2G,3G)),name=a"),
            ("min(1G,max(2G,3G))", Some("name=a"))
        );
        assert_eq!(split_option("1G),a"), ("1G)", Some("a")));
    }

    #[test]
    fn junk_is_malformed() {
        for text in [
            "",
            " ",
            "G",
            "%",
            "-1G",
            "+1G",
            "1..5G",
            "1.G",
            ".",
            "1.5",
            "1.5B",
            "4X",
            "4GG",
            "0x10",
            "4iB",
            "1e9",
            "1,5G",
            "4 G B",
            "1.1234567891G",
            "\u{664}G",
        ] {
            assert!(matches!(text.parse::<Size>(), Err(SizeError::Malformed(_))), "{text:?}");
        }
    }

    #[test]
    fn overflow_is_too_large() {
        for text in ["16E", "18446744073709551616", "99999999999999999999999999G", "10000.01%"] {
            assert!(matches!(text.parse::<Size>(), Err(SizeError::TooLarge(_))), "{text:?}");
        }
        assert_eq!(bytes("18446744073709551615"), u64::MAX);
    }

    #[test]
    fn human_sizes_look_like_util_linux() {
        for (bytes, text) in [
            (0, "0B"),
            (1, "1B"),
            (1023, "1023B"),
            (1024, "1K"),
            (1536, "1.5K"),
            (4 << 30, "4G"),
            ((1 << 30) + (1 << 30) / 5, "1.2G"),
            ((512 << 20) + 1, "512M"),
            ((1 << 30) - 1, "1G"),
            (u64::MAX, "16E"),
        ] {
            assert_eq!(Human(bytes).to_string(), text, "{bytes}");
        }
    }
}
