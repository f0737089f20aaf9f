//! The settings of writeback as people write them: `6.5%`, `20M`, `1h`, `none`.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};
use tmem::{SettingsError, WritebackSettings};

use crate::exit::{Exit, Failure};
use crate::size::{Size, SizeError};

/// The largest share that can be written, in thousandths; which of them make sense, the engine says.
const PERMILLE_MAX: u32 = 1000;

/// One setting of writeback, and what it is to be.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WritebackChange {
    /// See [`WritebackSettings::low_permille`].
    Low(u32),
    /// See [`WritebackSettings::high_permille`].
    High(u32),
    /// See [`WritebackSettings::bytes_per_second`].
    Rate(Option<u64>),
    /// See [`WritebackSettings::bytes_per_day`].
    Daily(Option<u64>),
    /// See [`WritebackSettings::age_seconds`].
    Age(Option<u32>),
    /// See [`WritebackSettings::keep_copies`].
    Keep(bool),
}

impl WritebackChange {
    /// What `tmem set` can set, behind `writeback-`.
    pub const KEYS: [&str; 6] = ["low", "high", "rate", "daily", "age", "keep"];

    /// The change of the setting `key`, one of [`Self::KEYS`], to `value`. None if there is no such setting.
    pub fn parse(key: &str, value: &str) -> Option<Result<Self, ValueError>> {
        Some(match key {
            "low" => value.parse().map(|Permille(permille)| Self::Low(permille)),
            "high" => value.parse().map(|Permille(permille)| Self::High(permille)),
            "rate" => value.parse().map(|Quota(bytes)| Self::Rate(bytes)),
            "daily" => value.parse().map(|Quota(bytes)| Self::Daily(bytes)),
            "age" => value.parse().map(|Age(seconds)| Self::Age(seconds)),
            "keep" => match value {
                "yes" => Ok(Self::Keep(true)),
                "no" => Ok(Self::Keep(false)),
                _ => Err(ValueError::Keep(value.to_owned())),
            },
            _ => return None,
        })
    }

    /// `settings` with this change.
    pub fn of(self, mut settings: WritebackSettings) -> WritebackSettings {
        match self {
            Self::Low(permille) => settings.low_permille = permille,
            Self::High(permille) => settings.high_permille = permille,
            Self::Rate(bytes) => settings.bytes_per_second = bytes,
            Self::Daily(bytes) => settings.bytes_per_day = bytes,
            Self::Age(seconds) => settings.age_seconds = seconds,
            Self::Keep(keep) => settings.keep_copies = keep,
        }
        settings
    }

    /// The same setting as it is in `settings`, as `tmem set` takes it.
    pub fn show(self, settings: &WritebackSettings) -> String {
        match self {
            Self::Low(_) => format!("writeback-low={}", Permille(settings.low_permille)),
            Self::High(_) => format!("writeback-high={}", Permille(settings.high_permille)),
            Self::Rate(_) => format!("writeback-rate={}", or_none(settings.bytes_per_second)),
            Self::Daily(_) => format!("writeback-daily={}", or_none(settings.bytes_per_day)),
            Self::Age(_) => format!("writeback-age={}", or_none(settings.age_seconds)),
            Self::Keep(_) if settings.keep_copies => "writeback-keep=yes".into(),
            Self::Keep(_) => "writeback-keep=no".into(),
        }
    }
}

impl From<SettingsError> for Failure {
    fn from(error: SettingsError) -> Self {
        Failure::new(Exit::Size, error)
    }
}

fn or_none(value: Option<impl fmt::Display>) -> String {
    value.map_or_else(|| "none".into(), |value| value.to_string())
}

/// Why a value is none of its setting's.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ValueError {
    /// Not a percentage.
    #[error("'{0}' is not a share of the pool limit: write one like 6% or 6.5%, up to 100%")]
    Permille(String),
    /// Not a number of bytes.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// A share of RAM.
    #[error(
        "'{0}' is no amount of data to write: write a number of bytes, or one like 20M, or none"
    )]
    Share(String),
    /// Not a time.
    #[error("'{0}' is not an age: write seconds, or a time like 90s, 30m or 2h, or none")]
    Age(String),
    /// Neither yes nor no.
    #[error("'{0}' does not say whether to keep copies: write yes or no")]
    Keep(String),
}

/// A share in thousandths, written as a percentage.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Permille(pub u32);

impl FromStr for Permille {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let number = text.trim().strip_suffix('%').map(str::trim_end);
        let parts = number.map(|number| number.split_once('.').unwrap_or((number, "0")));
        let permille = parts.and_then(|(whole, tenth)| {
            let tenth = digits(tenth).filter(|_| tenth.len() == 1)?;
            digits(whole)?.checked_mul(10)?.checked_add(tenth)
        });
        let permille = permille.filter(|permille| *permille <= PERMILLE_MAX);
        permille.map(Self).ok_or_else(|| ValueError::Permille(text.to_owned()))
    }
}

impl fmt::Display for Permille {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0 / 10, self.0 % 10) {
            (whole, 0) => write!(f, "{whole}%"),
            (whole, tenth) => write!(f, "{whole}.{tenth}%"),
        }
    }
}

/// A number of bytes that may be written, or `none`: any number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Quota(pub Option<u64>);

impl FromStr for Quota {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text.trim() == "none" {
            return Ok(Self(None));
        }
        let bytes = text.parse::<Size>()?.fixed_bytes();
        bytes.map(|bytes| Self(Some(bytes))).ok_or_else(|| ValueError::Share(text.to_owned()))
    }
}

/// An age in seconds, or `none`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Age(pub Option<u32>);

impl FromStr for Age {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let trimmed = text.trim();
        if trimmed == "none" {
            return Ok(Self(None));
        }
        let split = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let unit = match unit.trim_start() {
            "" | "s" => Some(1),
            "m" => Some(60),
            "h" => Some(3600),
            _ => None,
        };
        let seconds = unit.and_then(|unit| digits(number)?.checked_mul(unit));
        seconds.map(|seconds| Self(Some(seconds))).ok_or_else(|| ValueError::Age(text.to_owned()))
    }
}

/// A number that is nothing but digits.
fn digits(text: &str) -> Option<u32> {
    text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Reads a value that is written as text, or as a plain number.
fn from_text<'de, D, T>(deserializer: D, what: &'static str) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = ValueError>,
{
    struct Text<T>(&'static str, PhantomData<T>);

    impl<T: FromStr<Err = ValueError>> Visitor<'_> for Text<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            text.parse().map_err(E::custom)
        }
    }

    deserializer.deserialize_any(Text(what, PhantomData))
}

impl<'de> Deserialize<'de> for Permille {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer, "a percentage in quotes like \"6.5%\"")
    }
}

impl<'de> Deserialize<'de> for Quota {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer, "a number of bytes, a size in quotes like \"20M\", or \"none\"")
    }
}

impl<'de> Deserialize<'de> for Age {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer, "a number of seconds, a time in quotes like \"2h\", or \"none\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_percentages_with_one_decimal() {
        for (text, permille, shown) in
            [("6%", 60, "6%"), ("6.5%", 65, "6.5%"), (" 0.1 %", 1, "0.1%"), ("100%", 1000, "100%")]
        {
            assert_eq!(text.parse(), Ok(Permille(permille)));
            assert_eq!(Permille(permille).to_string(), shown);
        }
        for text in ["", "%", "6", "6.%", ".5%", "6.55%", "+6%", "-1%", "100.1%", "5000000000%"] {
            let error = text.parse::<Permille>().unwrap_err();
            assert!(error.to_string().contains("like 6% or 6.5%"), "{error}");
        }
    }

    #[test]
    fn quotas_are_sizes_or_none() {
        assert_eq!("20M".parse(), Ok(Quota(Some(20 << 20))));
        assert_eq!("0".parse(), Ok(Quota(Some(0))));
        assert_eq!("2*10M".parse(), Ok(Quota(Some(20 << 20))));
        assert_eq!("none".parse(), Ok(Quota(None)));
        for (text, hint) in [
            ("ram/4", "no amount of data"),
            ("5%", "no amount of data"),
            ("nil", "not a size"),
            ("", "not a size"),
        ] {
            let error = text.parse::<Quota>().unwrap_err().to_string();
            assert!(error.contains(hint), "{error}");
        }
    }

    #[test]
    fn ages_are_seconds_or_have_a_unit() {
        for (text, seconds) in
            [("90", 90), ("90s", 90), ("30m", 1800), ("2 h", 7200), ("4294967295", u32::MAX)]
        {
            assert_eq!(text.parse(), Ok(Age(Some(seconds))));
        }
        assert_eq!("none".parse(), Ok(Age(None)));
        for text in ["", "h", "1d", "1.5h", "-1", "+1", "4294967296", "1193047h", "1hh"] {
            let error = text.parse::<Age>().unwrap_err();
            assert!(error.to_string().contains("not an age"), "{error}");
        }
    }

    #[test]
    fn a_change_changes_its_own_setting_and_shows_it() {
        let before = WritebackSettings::default();
        let all = [
            WritebackChange::Low(0),
            WritebackChange::High(0),
            WritebackChange::Rate(None),
            WritebackChange::Daily(None),
            WritebackChange::Age(None),
            WritebackChange::Keep(false),
        ];
        for (key, value, shown) in [
            ("low", "1.5%", "1.5%"),
            ("high", "10%", "10%"),
            ("rate", "1.5M", "1572864"),
            ("daily", "1G", "1073741824"),
            ("age", "1h", "3600"),
            ("keep", "yes", "yes"),
        ] {
            let change = WritebackChange::parse(key, value).unwrap().unwrap();
            let after = change.of(before);
            assert_ne!(before, after);
            assert_eq!(change.show(&after), format!("writeback-{key}={shown}"));
            // Nothing else is changed.
            let rest: Vec<_> =
                all.iter().filter(|other| other.show(&before) != other.show(&after)).collect();
            assert_eq!(rest.len(), 1, "{key}: {rest:?}");
        }
        for key in ["rate", "daily", "age"] {
            let change = WritebackChange::parse(key, "none").unwrap().unwrap();
            assert_eq!(change.show(&change.of(before)), format!("writeback-{key}=none"));
        }
        let change = WritebackChange::parse("keep", "no").unwrap().unwrap();
        assert_eq!(change.show(&change.of(before)), "writeback-keep=no");
        assert!(WritebackChange::parse("keep", "maybe").unwrap().is_err());
        assert_eq!(WritebackChange::parse("colour", "1"), None);
    }
}
