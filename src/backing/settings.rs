//! What of writeback can be set, at any time.

use serde::{Deserialize, Serialize};

/// The most that may be kept free, in thousandths of the pool limit.
const PERMILLE_MAX: u32 = 500;

/// The least that writing may be limited to, in bytes a second: with less nothing would be gained by writing.
const RATE_MIN: u64 = 1 << 20;

/// The same in bytes a day.
const DAILY_MIN: u64 = 64 << 20;

/// When pages go to the backing file, and how many.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct WritebackSettings {
    /// Writing begins when less than this is left free, in thousandths of the pool limit,
    pub low_permille: u32,
    /// and goes on until this is.
    pub high_permille: u32,
    /// Bytes written in a second, at most.
    pub bytes_per_second: Option<u64>,
    /// Bytes written in a day, at most.
    pub bytes_per_day: Option<u64>,
    /// Frames that were not used for so many seconds go though there is room.
    pub age_seconds: Option<u32>,
    /// Whether what was written stays in memory too, until its frames are needed: then they are there at once, and what is
    /// read before that is not read from the file.
    pub keep_copies: bool,
}

impl Default for WritebackSettings {
    fn default() -> Self {
        Self {
            low_permille: 60,
            high_permille: 80,
            bytes_per_second: None,
            bytes_per_day: None,
            age_seconds: None,
            keep_copies: false,
        }
    }
}

/// Why settings of writeback are wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// Writing would never begin.
    #[error(
        "writing cannot begin when less than 0% of the pool limit is left free: use 0.1% or more"
    )]
    Low,
    /// Most of the pool would not be used.
    #[error(
        "{}.{}% of the pool limit cannot be kept free: use {}% or less",
        permille / 10, permille % 10, PERMILLE_MAX / 10
    )]
    High {
        /// What it was to be, in thousandths.
        permille: u32,
    },
    /// Writing would begin and end at once.
    #[error(
        "writing would begin when {}.{}% of the pool limit is left free, and end at {}.{}%: where it begins \
         must be less", low / 10, low % 10, high / 10, high % 10
    )]
    Order {
        /// Where it was to begin, in thousandths.
        low: u32,
        /// Where it was to end, in thousandths.
        high: u32,
    },
    /// So little in a second.
    #[error("{bytes} bytes a second are too few: use {RATE_MIN} or more, or none for no limit")]
    Rate {
        /// What it was to be.
        bytes: u64,
    },
    /// So little in a day.
    #[error("{bytes} bytes a day are too few: use {DAILY_MIN} or more, or none for no limit")]
    Daily {
        /// What it was to be.
        bytes: u64,
    },
    /// What is in use would go.
    #[error("an age of 0 seconds would be that of all pages: use 1 or more, or none")]
    Age,
}

impl WritebackSettings {
    /// Checks that they make sense together.
    pub fn check(&self) -> Result<(), SettingsError> {
        let (low, high) = (self.low_permille, self.high_permille);
        if low == 0 {
            return Err(SettingsError::Low);
        }
        if high > PERMILLE_MAX {
            return Err(SettingsError::High { permille: high });
        }
        if low >= high {
            return Err(SettingsError::Order { low, high });
        }
        if let Some(bytes) = self.bytes_per_second.filter(|bytes| *bytes < RATE_MIN) {
            return Err(SettingsError::Rate { bytes });
        }
        if let Some(bytes) = self.bytes_per_day.filter(|bytes| *bytes < DAILY_MIN) {
            return Err(SettingsError::Daily { bytes });
        }
        if self.age_seconds == Some(0) {
            return Err(SettingsError::Age);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_have_bounds() {
        let good = WritebackSettings::default();
        let least = WritebackSettings {
            low_permille: 1,
            high_permille: 2,
            bytes_per_second: Some(1 << 20),
            bytes_per_day: Some(64 << 20),
            age_seconds: Some(1),
            keep_copies: true,
        };
        let most = WritebackSettings { low_permille: 499, high_permille: 500, ..good };
        for settings in [good, least, most] {
            assert_eq!(settings.check(), Ok(()));
        }
        for (settings, error) in [
            (WritebackSettings { low_permille: 0, ..good }, SettingsError::Low),
            (
                WritebackSettings { high_permille: 501, ..good },
                SettingsError::High { permille: 501 },
            ),
            (
                WritebackSettings { low_permille: 80, ..good },
                SettingsError::Order { low: 80, high: 80 },
            ),
            (
                WritebackSettings { high_permille: 0, ..good },
                SettingsError::Order { low: 60, high: 0 },
            ),
            (
                WritebackSettings { bytes_per_second: Some((1 << 20) - 1), ..good },
                SettingsError::Rate { bytes: (1 << 20) - 1 },
            ),
            (
                WritebackSettings { bytes_per_day: Some(1 << 20), ..good },
                SettingsError::Daily { bytes: 1 << 20 },
            ),
            (WritebackSettings { age_seconds: Some(0), ..good }, SettingsError::Age),
        ] {
            assert_eq!(settings.check(), Err(error));
        }
        let message = SettingsError::Order { low: 85, high: 80 }.to_string();
        assert!(message.contains("8.5%") && message.contains("8.0%"), "{message}");
    }
}
