//! A configuration file as it is written, and where in it each value is.

use std::ops::Range;
use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use super::ConfigError;
use super::files::Source;
use crate::backing::{Age, Permille, Quota};
use crate::daemon::FrontEnd;
use crate::exit::{Exit, Failure};
use crate::nbd::NbdAddress;
use crate::size::Size;

/// A value and where it is; none if the file does not say it.
pub(super) type Value<T> = Option<Spanned<T>>;

/// All that a file can say.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Written {
    pub pool_limit: Value<Size>,
    pub control: Value<PathBuf>,
    pub swapon: Value<bool>,
    pub frontend: Value<FrontEnd>,
    pub nbd: Value<NbdAddress>,
    pub best_effort: Value<bool>,
    #[serde(default)]
    pub backing: WrittenBacking,
    #[serde(default)]
    pub writeback: WrittenWriteback,
    pub swap: Value<Vec<WrittenSwap>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct WrittenBacking {
    pub path: Value<PathBuf>,
    pub size: Value<Size>,
    pub encrypt: Value<bool>,
    pub force: Value<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct WrittenWriteback {
    pub low: Value<Permille>,
    pub high: Value<Permille>,
    pub rate: Value<Quota>,
    pub daily: Value<Quota>,
    pub age: Value<Age>,
    pub keep: Value<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct WrittenSwap {
    pub size: Spanned<Size>,
    pub name: Value<String>,
}

/// A file that was read and understood.
#[derive(Debug)]
pub(super) struct Layer {
    pub source: Source,
    pub written: Written,
}

impl Layer {
    pub(super) fn new(source: Source) -> Result<Self, ConfigError> {
        match toml::from_str(&source.text) {
            Ok(written) => Ok(Self { source, written }),
            Err(error) => {
                let span = error.span().unwrap_or(0..0);
                Err(source.wrong(&span, Failure::new(Exit::Usage, error.message())))
            }
        }
    }
}

/// A value that counts, and the file that says it.
pub(super) struct Said<'a, T> {
    pub source: &'a Source,
    pub value: &'a Spanned<T>,
    /// The place of the file among all.
    pub rank: usize,
}

/// The last that is said of a key.
pub(super) fn last<T>(
    layers: &[Layer],
    key: impl Fn(&Written) -> &Value<T>,
) -> Option<Said<'_, T>> {
    layers.iter().enumerate().rev().find_map(|(rank, layer)| {
        let value = key(&layer.written).as_ref()?;
        Some(Said { source: &layer.source, value, rank })
    })
}

impl<T> Said<'_, T> {
    pub(super) fn get(&self) -> &T {
        self.value.get_ref()
    }

    /// That the value cannot be.
    pub(super) fn wrong(&self, reason: Failure) -> ConfigError {
        self.source.wrong(&self.value.span(), reason)
    }
}

impl Source {
    /// That what is at `span` cannot be.
    pub(super) fn wrong(&self, span: &Range<usize>, reason: Failure) -> ConfigError {
        let (line, key) = self.place(span.start);
        ConfigError::Wrong { path: self.path.clone(), line, key, reason }
    }

    /// Where in the file a byte is: the line, from 1, and the key that the line sets.
    fn place(&self, at: usize) -> (usize, String) {
        let line = self.line(at);
        let text = self.text.lines().nth(line - 1).unwrap_or_default();
        let key = text.split('=').next().unwrap_or_default().trim();
        (line, if key.is_empty() { "end of line".to_owned() } else { format!("'{key}'") })
    }

    /// The line of a byte, from 1.
    pub(super) fn line(&self, at: usize) -> usize {
        self.text.get(..at).unwrap_or(&self.text).matches('\n').count() + 1
    }
}
