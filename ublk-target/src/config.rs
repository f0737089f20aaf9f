//! What a daemon is to be: the command line and the configuration file made into one checked
//! [`RunConfig`].
//!
//! The file is TOML and knows the same settings as the command line, which wins over it;
//! `tmem.example.toml` shows all of them.
//!
//! A key that is not known is an error, and so is a value that cannot work: a daemon that starts
//! does what was asked for.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tmem::{SettingsError, WritebackSettings};
use toml::Spanned;

use crate::backing::{Age, BackingSpec, Permille, Quota, check_file_bytes};
use crate::cli::RunArgs;
use crate::control::DEFAULT_SOCKET;
use crate::daemon::{FrontEnd, check_name, check_swap_bytes, pool_limit_min};
use crate::exit::{Exit, Failure};
use crate::nbd::NbdAddress;
use crate::size::{Human, Size, ram_bytes};

/// What of the machine decides whether a setting can work.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Memory in bytes.
    pub ram: u64,
    /// The smallest pool limit that the engine takes here, in bytes.
    pub pool_limit_min: u64,
}

impl Machine {
    /// This machine.
    pub fn here() -> io::Result<Self> {
        Ok(Self { ram: ram_bytes(), pool_limit_min: pool_limit_min()? })
    }

    /// The pool limit in bytes, if it is one that works here.
    pub fn pool_limit(&self, size: Size) -> Result<u64, Failure> {
        let Machine { ram, pool_limit_min: min } = *self;
        let bytes = size.bytes(ram);
        if (min..=ram).contains(&bytes) {
            return Ok(bytes);
        }
        let message = format!(
            "pool limit of {bytes} bytes is out of bounds: use {min} bytes ({}) to {ram} bytes ({})",
            Human(min),
            Human(ram)
        );
        Err(Failure::new(Exit::Size, message))
    }

    /// The size of a backing file in bytes, if it is one that works.
    pub fn backing_bytes(&self, size: Size) -> Result<u64, Failure> {
        let bytes = size.bytes(self.ram);
        check_file_bytes(bytes).map_err(|refusal| {
            Failure::new(refusal.code(), format_args!("cannot have such a backing file: {refusal}"))
        })?;
        Ok(bytes)
    }

    /// The size of a swap device in bytes, if it is one that works.
    fn swap_bytes(&self, size: Size) -> Result<u64, Failure> {
        let bytes = size.bytes(self.ram);
        check_swap_bytes(bytes)?;
        Ok(bytes)
    }
}

/// A swap device to make at the start.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SwapSpec {
    /// Its size.
    pub bytes: u64,
    /// Its name; the daemon finds one if there is none.
    pub name: Option<String>,
}

/// A daemon as it shall be. Every value has been checked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RunConfig {
    /// The pool limit in bytes.
    pub pool_limit: u64,
    /// The control socket.
    pub control: PathBuf,
    /// Whether swap devices are put to use.
    pub swapon: bool,
    /// What gives devices their node.
    pub frontend: FrontEnd,
    /// Where devices are exported by NBD; always somewhere with the front end of that name.
    pub nbd: Option<NbdAddress>,
    /// Whether to run without the guards against deadlock if they cannot be had.
    pub best_effort: bool,
    /// The backing file.
    pub backing: Option<BackingSpec>,
    /// Whether what is written to a backing file is encrypted, also to one that is named later.
    pub encrypt_backing: bool,
    /// When pages are written to it, and how many.
    pub writeback: WritebackSettings,
    /// The swap devices.
    pub swaps: Vec<SwapSpec>,
}

impl RunConfig {
    /// Makes one of the command line, the file it names, and the defaults.
    pub fn new(args: &RunArgs, control: Option<&Path>, machine: &Machine) -> Result<Self, Failure> {
        let file = match &args.config {
            Some(path) => File::load(path, machine)?,
            None => File::default(),
        };
        let pool_limit = match (args.pool_limit, file.pool_limit) {
            (Some(size), _) => machine.pool_limit(size)?,
            (None, Some(bytes)) => bytes,
            (None, None) => machine.pool_limit(Size::HALF_OF_RAM)?,
        };
        let mut swaps = Vec::new();
        for arg in &args.swap {
            let bytes = machine.swap_bytes(arg.size)?;
            swaps.push(SwapSpec { bytes, name: arg.name.clone() });
        }
        if swaps.is_empty() {
            swaps = file.swaps;
        }
        check_distinct(&swaps)?;
        let (backing, encrypt_backing) = backing(args, file.backing, machine)?;
        let control = control.map(Path::to_owned).or(file.control);
        let frontend = args.frontend.or(file.frontend).unwrap_or_default();
        let nbd = args.nbd.clone().or(file.nbd);
        let nbd = match frontend {
            FrontEnd::Ublk => nbd,
            FrontEnd::Nbd => Some(nbd.unwrap_or_default()),
        };
        let control = control.unwrap_or_else(|| DEFAULT_SOCKET.into());
        if nbd.as_ref().is_some_and(|nbd| nbd.path() == control) {
            let message = format!(
                "{} cannot be both the control socket and the NBD socket: choose another with --nbd",
                control.display()
            );
            return Err(Failure::new(Exit::Usage, message));
        }
        Ok(Self {
            frontend,
            nbd,
            pool_limit,
            control,
            swapon: args.swapon || file.swapon,
            best_effort: args.best_effort || file.best_effort,
            backing,
            encrypt_backing,
            writeback: file.writeback,
            swaps,
        })
    }
}

/// The backing file that the command line names, or else the file, and whether backing files are encrypted.
fn backing(
    args: &RunArgs,
    file: FileBacking,
    machine: &Machine,
) -> Result<(Option<BackingSpec>, bool), Failure> {
    let encrypt = file.encrypt && !args.no_encrypt_backing;
    let (path, bytes, force) = match &args.backing {
        Some(arg) => {
            let bytes = arg.size.map(|size| machine.backing_bytes(size)).transpose()?;
            // That the file may take what it names by force is not said of another.
            (Some(arg.path.clone()), bytes, args.force)
        }
        None => (file.path, file.bytes, args.force || file.force),
    };
    let spec = path.map(|path| BackingSpec { path, bytes, encrypt, force });
    if spec.is_none() && args.force {
        let message = "--force is about a backing file, and there is none: name one with --backing";
        return Err(Failure::new(Exit::Usage, message));
    }
    Ok((spec, encrypt))
}

/// Refuses two devices of one name.
fn check_distinct(swaps: &[SwapSpec]) -> Result<(), Failure> {
    let mut seen = HashSet::new();
    let twice = swaps.iter().filter_map(|swap| swap.name.as_ref()).find(|name| !seen.insert(*name));
    twice.map_or(Ok(()), |name| {
        let message = format!("two swap devices are named '{name}': give each its own name");
        Err(Failure::new(Exit::NameTaken, message))
    })
}

/// Why a configuration file was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system call's error.
        source: io::Error,
    },
    /// It says something that cannot be.
    #[error("{}: line {line}: {key}: {reason}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The key, or what the line has instead of one.
        key: String,
        /// What is wrong with it.
        reason: Failure,
    },
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let code = match &error {
            ConfigError::Read { .. } => Exit::Usage,
            ConfigError::Wrong { reason, .. } => reason.code,
        };
        Failure::new(code, error)
    }
}

/// A configuration file, checked.
#[derive(Debug, Default)]
struct File {
    pool_limit: Option<u64>,
    control: Option<PathBuf>,
    swapon: bool,
    frontend: Option<FrontEnd>,
    nbd: Option<NbdAddress>,
    best_effort: bool,
    backing: FileBacking,
    writeback: WritebackSettings,
    swaps: Vec<SwapSpec>,
}

/// What a configuration file says of the backing file.
#[derive(Debug)]
struct FileBacking {
    path: Option<PathBuf>,
    bytes: Option<u64>,
    encrypt: bool,
    force: bool,
}

impl Default for FileBacking {
    fn default() -> Self {
        Self { path: None, bytes: None, encrypt: true, force: false }
    }
}

/// A configuration file as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written {
    pool_limit: Option<Spanned<Size>>,
    control: Option<PathBuf>,
    #[serde(default)]
    swapon: bool,
    frontend: Option<FrontEnd>,
    nbd: Option<NbdAddress>,
    #[serde(default)]
    best_effort: bool,
    #[serde(default)]
    backing: WrittenBacking,
    #[serde(default)]
    writeback: WrittenWriteback,
    #[serde(default)]
    swap: Vec<WrittenSwap>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct WrittenBacking {
    path: Option<Spanned<PathBuf>>,
    size: Option<Spanned<Size>>,
    encrypt: Option<bool>,
    force: Option<Spanned<bool>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct WrittenWriteback {
    low: Option<Spanned<Permille>>,
    high: Option<Spanned<Permille>>,
    rate: Option<Spanned<Quota>>,
    daily: Option<Spanned<Quota>>,
    age: Option<Spanned<Age>>,
    #[serde(default)]
    keep: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct WrittenSwap {
    size: Spanned<Size>,
    name: Option<Spanned<String>>,
}

impl File {
    fn load(path: &Path, machine: &Machine) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let wrong = |span: Range<usize>, reason| {
            let (line, key) = place(&text, span.start);
            ConfigError::Wrong { path: path.to_owned(), line, key, reason }
        };
        let written: Written = toml::from_str(&text).map_err(|error| {
            let span = error.span().unwrap_or(0..0);
            wrong(span, Failure::new(Exit::Usage, error.message()))
        })?;
        let pool_limit = written.pool_limit.map(|size| {
            machine.pool_limit(*size.get_ref()).map_err(|reason| wrong(size.span(), reason))
        });
        let swaps = written.swap.into_iter().map(|WrittenSwap { size, name }| {
            let bytes = machine.swap_bytes(*size.get_ref());
            let bytes = bytes.map_err(|reason| wrong(size.span(), reason))?;
            if let Some(name) = &name {
                let checked = check_name(name.get_ref()).map_err(Failure::from);
                checked.map_err(|reason| wrong(name.span(), reason))?;
            }
            Ok(SwapSpec { bytes, name: name.map(Spanned::into_inner) })
        });
        Ok(Self {
            pool_limit: pool_limit.transpose()?,
            swaps: swaps.collect::<Result<_, ConfigError>>()?,
            backing: written
                .backing
                .check(machine)
                .map_err(|(span, reason)| wrong(span, reason))?,
            writeback: written.writeback.check().map_err(|(span, reason)| wrong(span, reason))?,
            control: written.control,
            swapon: written.swapon,
            frontend: written.frontend,
            nbd: written.nbd,
            best_effort: written.best_effort,
        })
    }
}

/// A value that is wrong: where it is, and why.
type Wrong = (Range<usize>, Failure);

impl WrittenBacking {
    fn check(self, machine: &Machine) -> Result<FileBacking, Wrong> {
        let without = |span, key| {
            let message =
                format!("there is no path, and {key} is about what it names: set path too");
            Err((span, Failure::new(Exit::Usage, message)))
        };
        match (&self.path, &self.size, &self.force) {
            (Some(path), ..) if !path.get_ref().is_absolute() => {
                let message = "the path of a backing file must begin with '/'";
                return Err((path.span(), Failure::new(Exit::Usage, message)));
            }
            (None, Some(size), _) => return without(size.span(), "size"),
            (None, _, Some(force)) if *force.get_ref() => return without(force.span(), "force"),
            _ => {}
        }
        let bytes = self.size.map(|size| {
            machine.backing_bytes(*size.get_ref()).map_err(|reason| (size.span(), reason))
        });
        Ok(FileBacking {
            path: self.path.map(Spanned::into_inner),
            bytes: bytes.transpose()?,
            encrypt: self.encrypt.unwrap_or(true),
            force: self.force.is_some_and(Spanned::into_inner),
        })
    }
}

impl WrittenWriteback {
    fn check(&self) -> Result<WritebackSettings, Wrong> {
        let value = |key: &Option<Spanned<Permille>>| key.as_ref().map(|key| key.get_ref().0);
        let quota = |key: &Option<Spanned<Quota>>| key.as_ref().and_then(|key| key.get_ref().0);
        let default = WritebackSettings::default();
        let settings = WritebackSettings {
            low_permille: value(&self.low).unwrap_or(default.low_permille),
            high_permille: value(&self.high).unwrap_or(default.high_permille),
            bytes_per_second: quota(&self.rate),
            bytes_per_day: quota(&self.daily),
            age_seconds: self.age.as_ref().and_then(|age| age.get_ref().0),
            keep_copies: self.keep,
        };
        settings.check().map_err(|error| (self.place_of(&error), error.into()))?;
        Ok(settings)
    }

    /// Where in the file it is that `error` is about.
    fn place_of(&self, error: &SettingsError) -> Range<usize> {
        let [low, high] = [&self.low, &self.high].map(|key| key.as_ref().map(Spanned::span));
        let span = match error {
            SettingsError::Rate { .. } => self.rate.as_ref().map(Spanned::span),
            SettingsError::Daily { .. } => self.daily.as_ref().map(Spanned::span),
            SettingsError::Age => self.age.as_ref().map(Spanned::span),
            SettingsError::High { .. } => high,
            _ => low.or(high),
        };
        span.unwrap_or(0..0)
    }
}

/// Where in the file a byte is: the line, from 1, and the key that the line sets.
fn place(text: &str, at: usize) -> (usize, String) {
    let before = text.get(..at).unwrap_or(text);
    let number = before.matches('\n').count();
    let line = text.lines().nth(number).unwrap_or_default();
    let key = line.split('=').next().unwrap_or_default().trim();
    (number + 1, if key.is_empty() { "end of line".to_owned() } else { format!("'{key}'") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::SwapArg;

    const MACHINE: Machine = Machine { ram: 16 << 30, pool_limit_min: 1 << 20 };

    /// The configuration that `args` and a file of `text` make.
    fn with_file(mut args: RunArgs, text: &str) -> Result<RunConfig, Failure> {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("tmem.toml");
        fs::write(&path, text).unwrap();
        args.config = Some(path);
        RunConfig::new(&args, None, &MACHINE)
    }

    #[test]
    fn defaults() {
        let config = RunConfig::new(&RunArgs::default(), None, &MACHINE).unwrap();
        assert_eq!(config.pool_limit, 8 << 30);
        assert_eq!(config.control, PathBuf::from("/run/tmem/control.sock"));
        assert!(!config.swapon && !config.best_effort && config.swaps.is_empty());
        assert_eq!((config.frontend, config.nbd), (FrontEnd::Ublk, None));
    }

    #[test]
    fn the_nbd_front_end_is_always_somewhere() {
        let args = RunArgs { frontend: Some(FrontEnd::Nbd), ..RunArgs::default() };
        let config = RunConfig::new(&args, None, &MACHINE).unwrap();
        assert_eq!(config.nbd, Some(NbdAddress::default()));
        let text = "frontend = 'nbd'\nnbd = 'unix:/run/x'\n";
        let config = with_file(RunArgs::default(), text).unwrap();
        assert_eq!(config.frontend, FrontEnd::Nbd);
        assert_eq!(config.nbd, Some("unix:/run/x".parse().unwrap()));
        let args = RunArgs { frontend: Some(FrontEnd::Ublk), ..RunArgs::default() };
        let config = with_file(args, text).unwrap();
        assert_eq!(config.frontend, FrontEnd::Ublk);
        assert_eq!(config.nbd, Some("unix:/run/x".parse().unwrap()));
    }

    #[test]
    fn the_file_is_heard() {
        let text = "pool-limit = '25%'\ncontrol = '/run/x'\nswapon = true\nbest-effort = true\n\
                    [[swap]]\nsize = '1.5G'\nname = 'a'\n[[swap]]\nsize = 1073741824\n";
        let config = with_file(RunArgs::default(), text).unwrap();
        assert_eq!(config.pool_limit, 4 << 30);
        assert_eq!(config.control, PathBuf::from("/run/x"));
        assert!(config.swapon && config.best_effort);
        assert_eq!(config.swaps[0], SwapSpec { bytes: 3 << 29, name: Some("a".into()) });
        assert_eq!(config.swaps[1], SwapSpec { bytes: 1 << 30, name: None });
    }

    #[test]
    fn the_example_is_a_good_file() {
        let config = with_file(RunArgs::default(), include_str!("../tmem.example.toml")).unwrap();
        assert_eq!(config.pool_limit, 8 << 30);
        assert_eq!(config.swaps, [SwapSpec { bytes: 16 << 30, name: Some("swap0".into()) }]);
        assert_eq!((config.backing, config.nbd), (None, None));
        assert_eq!(config.writeback, WritebackSettings::default());
    }

    #[test]
    fn what_the_example_leaves_out_is_good_too() {
        let example = include_str!("../tmem.example.toml");
        let all = ["nbd", "path", "size"].iter().fold(example.to_owned(), |text, key| {
            text.replace(&format!("# {key} = "), &format!("{key} = "))
        });
        let config = with_file(RunArgs::default(), &all).unwrap();
        assert_eq!(config.nbd, Some(NbdAddress::default()));
        let path = "/var/lib/tmem/backing".into();
        let backing = BackingSpec { path, bytes: Some(64 << 30), encrypt: true, force: false };
        assert_eq!(config.backing, Some(backing));
    }

    #[test]
    fn the_example_has_every_key() {
        let example = include_str!("../tmem.example.toml");
        for key in [
            "pool-limit",
            "control",
            "swapon",
            "frontend",
            "nbd",
            "best-effort",
            "path",
            "size",
            "encrypt",
            "force",
            "low",
            "high",
            "rate",
            "daily",
            "age",
            "keep",
            "name",
        ] {
            let sets = |line: &str| line.trim_start_matches("# ").starts_with(&format!("{key} = "));
            assert!(example.lines().any(sets), "{key}");
        }
    }

    #[test]
    fn a_backing_file_is_named_by_either() {
        let text = "[backing]\npath = '/a'\nsize = '25%'\nencrypt = false\nforce = true\n";
        let of_the_file = with_file(RunArgs::default(), text).unwrap();
        let (path, bytes) = ("/a".into(), Some(4 << 30));
        let spec = BackingSpec { path, bytes, encrypt: false, force: true };
        assert_eq!((of_the_file.backing, of_the_file.encrypt_backing), (Some(spec), false));

        // The file's size, and that it may be taken by force, are about the file's path.
        let arg = || Some("/b".parse().unwrap());
        let of_the_line =
            with_file(RunArgs { backing: arg(), ..RunArgs::default() }, text).unwrap();
        let spec = BackingSpec { path: "/b".into(), bytes: None, encrypt: false, force: false };
        assert_eq!(of_the_line.backing, Some(spec));

        let args = RunArgs { backing: arg(), force: true, ..RunArgs::default() };
        let alone = RunConfig::new(&args, None, &MACHINE).unwrap();
        let spec = BackingSpec { path: "/b".into(), bytes: None, encrypt: true, force: true };
        assert_eq!((alone.backing, alone.encrypt_backing), (Some(spec), true));
    }

    #[test]
    fn whether_to_encrypt_is_said_also_for_a_backing_file_that_is_named_later() {
        let args = RunArgs { no_encrypt_backing: true, ..RunArgs::default() };
        let config = RunConfig::new(&args, None, &MACHINE).unwrap();
        assert_eq!((config.backing, config.encrypt_backing), (None, false));
        let config = with_file(RunArgs::default(), "[backing]\nencrypt = false\n").unwrap();
        assert_eq!((config.backing, config.encrypt_backing), (None, false));
        let config = with_file(RunArgs::default(), "").unwrap();
        assert_eq!((config.backing, config.encrypt_backing), (None, true));
    }

    #[test]
    fn force_is_about_a_backing_file() {
        let args = RunArgs { force: true, ..RunArgs::default() };
        let failure = RunConfig::new(&args, None, &MACHINE).unwrap_err();
        assert_eq!(failure.code, Exit::Usage);
        assert!(failure.message.contains("--backing"), "{failure}");
    }

    #[test]
    fn a_backing_file_too_small_for_anything_is_refused() {
        let args = RunArgs { backing: Some("/a,size=1M".parse().unwrap()), ..RunArgs::default() };
        let failure = RunConfig::new(&args, None, &MACHINE).unwrap_err();
        assert_eq!(failure.code, Exit::Size);
        assert!(failure.message.contains("1048576 bytes is out of bounds"), "{failure}");
    }

    #[test]
    fn writeback_is_set_by_the_file() {
        let text = "[writeback]\nlow = '1.5%'\nhigh = '20%'\nrate = '20M'\ndaily = 107374182400\nage = 60\nkeep = true\n";
        let settings = WritebackSettings {
            low_permille: 15,
            high_permille: 200,
            bytes_per_second: Some(20 << 20),
            bytes_per_day: Some(100 << 30),
            age_seconds: Some(60),
            keep_copies: true,
        };
        assert_eq!(with_file(RunArgs::default(), text).unwrap().writeback, settings);
        let text = "[writeback]\nrate = 'none'\nage = '2h'\n";
        let settings =
            WritebackSettings { age_seconds: Some(7200), ..WritebackSettings::default() };
        assert_eq!(with_file(RunArgs::default(), text).unwrap().writeback, settings);
    }

    #[test]
    fn the_command_line_wins() {
        let args = RunArgs {
            pool_limit: Some(Size::Bytes(1 << 30)),
            swap: vec![SwapArg { size: Size::Bytes(2 << 30), name: None }],
            ..RunArgs::default()
        };
        let text = "pool-limit = '25%'\n[[swap]]\nsize = '1G'\n[[swap]]\nsize = '1G'\n";
        let config = with_file(args, text).unwrap();
        assert_eq!(config.pool_limit, 1 << 30);
        assert_eq!(config.swaps, [SwapSpec { bytes: 2 << 30, name: None }]);
    }

    #[test]
    fn errors_name_the_file_the_line_and_the_key() {
        for (text, code, parts) in [
            ("swapon = true\nswap-on = 1\n", Exit::Usage, ["line 2: 'swap-on'", "pool-limit"]),
            ("swapon = 'yes'\n", Exit::Usage, ["line 1: 'swapon'", "expected a boolean"]),
            ("[[swap]]\nsize = '4X'\n", Exit::Usage, ["line 2: 'size'", "is not a size"]),
            ("[[swap]]\nname = 'a'\n", Exit::Usage, ["line 1:", "size"]),
            ("[[swap]]\nsize = '1G'\nname = 'a b'\n", Exit::Usage, ["line 3: 'name'", "letters"]),
            ("\n[[swap]]\nsize = 0\n", Exit::Size, ["line 3: 'size'", "it must have"]),
            ("[[swap]]\nsize = 1048577\n", Exit::Size, ["line 2: 'size'", "whole pages of 4096"]),
            ("pool-limit = '101%'\n", Exit::Size, ["line 1: 'pool-limit'", "(16G)"]),
            ("pool-limit = -1\n", Exit::Usage, ["line 1: 'pool-limit'", "negative"]),
            ("nbd = 'tcp:x'\n", Exit::Usage, ["line 1: 'nbd'", "only Unix sockets"]),
            ("frontend = 'x'\n", Exit::Usage, ["line 1: 'frontend'", "unknown variant"]),
            ("[backing]\npath = 'a'\n", Exit::Usage, ["line 2: 'path'", "begin with '/'"]),
            ("[backing]\nfile = '/a'\n", Exit::Usage, ["line 2: 'file'", "unknown field"]),
            ("[backing]\nsize = '1G'\n", Exit::Usage, ["line 2: 'size'", "set path too"]),
            ("[backing]\nforce = true\n", Exit::Usage, ["line 2: 'force'", "set path too"]),
            (
                "[backing]\npath = '/a'\nsize = '1M'\n",
                Exit::Size,
                ["line 3: 'size'", "out of bounds"],
            ),
            ("backing = '/a'\n", Exit::Usage, ["line 1: 'backing'", "invalid type"]),
            ("[writeback]\nlow = 6\n", Exit::Usage, ["line 2: 'low'", "like 6% or 6.5%"]),
            ("[writeback]\nlow = 6.5\n", Exit::Usage, ["line 2: 'low'", "in quotes like \"6.5%\""]),
            ("[writeback]\nlow = '9%'\n", Exit::Size, ["line 2: 'low'", "end at 8.0%"]),
            ("[writeback]\n\nhigh = '5%'\n", Exit::Size, ["line 3: 'high'", "must be less"]),
            ("[writeback]\nlow = '0%'\n", Exit::Size, ["line 2: 'low'", "0.1%"]),
            ("[writeback]\nlow = '1%'\nhigh = '51%'\n", Exit::Size, ["line 3: 'high'", "50%"]),
            ("[writeback]\nrate = '5%'\n", Exit::Usage, ["line 2: 'rate'", "no amount of data"]),
            ("[writeback]\nrate = 4096\n", Exit::Size, ["line 2: 'rate'", "too few"]),
            ("[writeback]\nage = '1d'\ndaily = 1\n", Exit::Usage, ["line 2: 'age'", "not an age"]),
            ("[writeback]\nage = '1h'\ndaily = 1\n", Exit::Size, ["line 3: 'daily'", "a day"]),
            ("[writeback]\nage = 0\n", Exit::Size, ["line 2: 'age'", "use 1 or more"]),
            ("swapon = \n", Exit::Usage, ["line 1: 'swapon'", "tmem.toml"]),
        ] {
            let failure = with_file(RunArgs::default(), text).unwrap_err();
            assert_eq!(failure.code, code, "{text}: {failure}");
            assert!(parts.iter().all(|part| failure.message.contains(part)), "{text}: {failure}");
            assert!(failure.message.contains("tmem.toml: "), "{failure}");
        }
    }

    #[test]
    fn a_file_that_is_not_there() {
        let args = RunArgs { config: Some("/nonexistent/tmem.toml".into()), ..RunArgs::default() };
        let failure = RunConfig::new(&args, None, &MACHINE).unwrap_err();
        assert_eq!(failure.code, Exit::Usage);
        assert!(failure.message.contains("/nonexistent/tmem.toml"), "{failure}");
    }

    #[test]
    fn pool_limits_have_bounds() {
        for (size, good) in [
            (Size::Bytes((1 << 20) - 1), false),
            (Size::Bytes(1 << 20), true),
            (Size::Bytes(16 << 30), true),
            (Size::Bytes((16 << 30) + 1), false),
            (Size::RamShare(0), false),
        ] {
            match MACHINE.pool_limit(size) {
                Ok(_) => assert!(good, "{size:?}"),
                Err(failure) => {
                    assert!(!good && failure.code == Exit::Size, "{size:?}");
                    let bounds = "use 1048576 bytes (1M) to 17179869184 bytes (16G)";
                    assert!(failure.message.ends_with(bounds), "{failure}");
                }
            }
        }
    }

    #[test]
    fn one_path_is_for_one_socket() {
        let nbd = Some("unix:/run/x".parse().unwrap());
        let args = RunArgs { nbd, ..RunArgs::default() };
        let failure = RunConfig::new(&args, Some(Path::new("/run/x")), &MACHINE).unwrap_err();
        assert_eq!(failure.code, Exit::Usage);
        assert!(failure.message.contains("cannot be both"), "{failure}");
    }

    #[test]
    fn one_name_is_for_one_device() {
        let swap = SwapArg { size: Size::Bytes(1 << 30), name: Some("a".into()) };
        let args = RunArgs { swap: vec![swap.clone(), swap], ..RunArgs::default() };
        let failure = RunConfig::new(&args, None, &MACHINE).unwrap_err();
        assert_eq!(failure.code, Exit::NameTaken);
    }

    #[test]
    fn this_machine_has_memory() {
        let machine = Machine::here().unwrap();
        assert!(machine.ram > 1 << 20 && machine.pool_limit_min > 0);
    }
}
