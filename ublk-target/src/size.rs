//! Sizes as people write them: `4G`, `512M`, `1.5G`, `25%` of RAM, plain bytes.
//!
//! Units are binary: `K`, `KB` and `KiB` are all 1024. A whole number is taken to the byte, so that
//! nothing is rounded behind the user's back; a fraction or a percentage is inexact by nature and
//! is rounded down to whole pages. There is no floating point here.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use tmem::PAGE_SIZE;

/// An amount of memory: a number of bytes, or a share of this machine's RAM.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Size {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of a percent of RAM.
    RamShare(u64),
}

/// The largest share of RAM that can be asked for: 10000 %.
const SHARE_MAX: u64 = 100 * 100 * 100;

impl Size {
    /// Half of RAM.
    pub const HALF_OF_RAM: Size = Size::RamShare(50 * 100);

    /// The number of bytes on a machine with `ram` bytes of memory.
    pub fn bytes(self, ram: u64) -> u64 {
        match self {
            Size::Bytes(bytes) => bytes,
            Size::RamShare(share) => {
                let bytes = u128::from(ram) * u128::from(share) / (100 * 100);
                whole_pages(u64::try_from(bytes).unwrap_or(u64::MAX))
            }
        }
    }
}

/// Why a text is no size.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SizeError {
    /// Not a number with a unit.
    #[error("'{0}' is not a size: write a number of bytes, or one like 512M, 1.5G, 25%")]
    Malformed(String),
    /// More bytes than can be counted.
    #[error("'{0}' is too large: the most is 18446744073709551615 bytes, or 10000% of RAM")]
    TooLarge(String),
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let malformed = || SizeError::Malformed(text.to_owned());
        let too_large = || SizeError::TooLarge(text.to_owned());
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (number, unit) = trimmed.split_at(split.unwrap_or(trimmed.len()));
        let number = Decimal::parse(number).ok_or_else(malformed)?;
        let unit = unit.trim_start();
        if unit == "%" {
            let share = number.times(100).filter(|share| *share <= SHARE_MAX);
            return share.map(Size::RamShare).ok_or_else(too_large);
        }
        let shift = unit_shift(unit).ok_or_else(malformed)?;
        if shift == 0 && number.divisor > 1 {
            return Err(malformed());
        }
        let bytes = number.times(1 << shift).ok_or_else(too_large)?;
        Ok(Size::Bytes(if number.divisor > 1 { whole_pages(bytes) } else { bytes }))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or a size in quotes like \"4G\" or \"25%\"")
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes)
                    .map(Size::Bytes)
                    .map_err(|_| E::custom(format_args!("{bytes} is not a size: it is negative")))
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size::Bytes(bytes))
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

    /// This number times `factor`, rounded down, if 64 bits hold it.
    fn times(self, factor: u64) -> Option<u64> {
        u64::try_from(self.digits.checked_mul(u128::from(factor))? / self.divisor).ok()
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
        match text.parse() {
            Ok(Size::Bytes(bytes)) => bytes,
            other => panic!("{text}: {other:?}"),
        }
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
        assert_eq!("25%".parse(), Ok(Size::RamShare(2500)));
        assert_eq!("12.5 %".parse(), Ok(Size::RamShare(1250)));
        assert_eq!(Size::RamShare(2500).bytes(16 << 30), 4 << 30);
        assert_eq!(Size::RamShare(3333).bytes(10_000 * 4096 + 1), 3333 * 4096);
        assert_eq!(Size::RamShare(SHARE_MAX).bytes(u64::MAX), whole_pages(u64::MAX));
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
