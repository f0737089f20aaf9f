//! Command lines of the form `--name value`, with sizes as `512M` or as a share of memory, `200%`.

use std::collections::HashMap;

/// The options of one command line; each is taken out once, and what is left over is an error.
pub struct Args(HashMap<String, String>);

/// Reads `--name value` pairs.
pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut options = HashMap::new();
    while let Some(word) = words.next() {
        let name = word.strip_prefix("--").ok_or(format!("what is {word:?}?"))?;
        let value = words.next().ok_or(format!("--{name} needs a value"))?;
        options.insert(name.to_owned(), value);
    }
    Ok(Args(options))
}

impl Args {
    /// The text of an option.
    pub fn text(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    /// A number, or `default` where the option is not given.
    pub fn number<T: std::str::FromStr>(&mut self, name: &str, default: T) -> Result<T, String> {
        match self.0.remove(name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| format!("--{name}: {text:?} is no number")),
        }
    }

    /// A size in bytes: `4096`, `512M`, or `200%` of this machine's memory.
    pub fn size(&mut self, name: &str) -> Result<Option<u64>, String> {
        self.0.remove(name).map(|text| size(&text, memory_total)).transpose()
    }

    /// Refuses what nobody asked for.
    pub fn finish(self) -> Result<(), String> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(format!("there is no option --{name}")),
        }
    }
}

fn size(text: &str, whole: impl Fn() -> Result<u64, String>) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size (4096, 512M, 2G, 150%)");
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let number: u64 = text[..text.len() - unit.len()].parse().map_err(|_| wrong())?;
    let bytes = match unit {
        "%" => whole()?.checked_mul(number).map(|bytes| bytes / 100),
        "" => Some(number),
        "K" => number.checked_mul(1 << 10),
        "M" => number.checked_mul(1 << 20),
        "G" => number.checked_mul(1 << 30),
        _ => None,
    };
    bytes.ok_or_else(wrong)
}

fn memory_total() -> Result<u64, String> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|e| e.to_string())?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok())
        .map(|kib: u64| kib << 10)
        .ok_or("no MemTotal in /proc/meminfo".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let whole = || Ok(1000 << 20);
        assert_eq!(size("4096", whole), Ok(4096));
        assert_eq!(size("3M", whole), Ok(3 << 20));
        assert_eq!(size("150%", whole), Ok(1500 << 20));
        for wrong in ["", "M", "3MB", "-1", "99999999999G"] {
            assert!(size(wrong, whole).is_err(), "{wrong}");
        }
    }

    #[test]
    fn unknown_options_are_refused() {
        let words = ["--seed", "7", "--sede", "8"].map(str::to_owned);
        let mut args = parse(words.into_iter()).unwrap();
        assert_eq!(args.number("seed", 0u64), Ok(7));
        assert!(args.finish().is_err());
    }
}
