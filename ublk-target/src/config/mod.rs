//! What a daemon is to be: the command line and the configuration files made into one checked
//! [`RunConfig`].
//!
//! The files are TOML and know the same settings as the command line, which wins over them. There can be several
//! ([`files`] says which and in what order); a later one wins key by key, and of `swap` it is all that counts.
//! `tmem.toml.example` shows every key.
//!
//! A key that is not known is an error, and so is a value that cannot work: a daemon that starts
//! does what was asked for.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tmem::{SettingsError, WritebackSettings};

use crate::backing::{Age, BackingSpec, Permille, Quota, check_file_bytes};
use crate::cli::RunArgs;
use crate::control::DEFAULT_SOCKET;
use crate::daemon::{FrontEnd, check_name, check_swap_bytes, pool_limit_min};
use crate::exit::{Exit, Failure};
use crate::nbd::NbdAddress;
use crate::size::{Human, Size, ram_bytes};

use files::Source;
use written::{Layer, Said, Written, WrittenSwap, last};

mod files;
mod show;
mod written;

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
    pub fn here() -> Result<Self, Failure> {
        let pool_limit_min = pool_limit_min().map_err(|error| {
            Failure::new(Exit::Failure, format!("cannot count the CPUs: {error}"))
        })?;
        Ok(Self { ram: ram_bytes(), pool_limit_min })
    }

    /// The pool limit in bytes, if it is one that works here.
    pub fn pool_limit(&self, size: &Size) -> Result<u64, Failure> {
        let Machine { ram, pool_limit_min: min } = *self;
        let bytes = self.bytes(size)?;
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
    pub fn backing_bytes(&self, size: &Size) -> Result<u64, Failure> {
        let bytes = self.bytes(size)?;
        check_file_bytes(bytes).map_err(|refusal| {
            Failure::new(refusal.code(), format_args!("cannot have such a backing file: {refusal}"))
        })?;
        Ok(bytes)
    }

    /// The size of a swap device in bytes, if it is one that works.
    fn swap_bytes(&self, size: &Size) -> Result<u64, Failure> {
        let bytes = self.bytes(size)?;
        check_swap_bytes(bytes)?;
        Ok(bytes)
    }

    fn bytes(&self, size: &Size) -> Result<u64, Failure> {
        size.bytes(self.ram).map_err(|error| Failure::new(Exit::Size, error))
    }
}

/// A swap device to make at the start.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SwapSpec {
    /// Its size.
    pub bytes: u64,
    /// Its name; the daemon finds one if there is none.
    pub name: Option<String>,
}

/// A daemon as it shall be. Every value has been checked.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
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

/// What the configuration files say.
#[derive(Debug, Default)]
pub struct Files {
    layers: Vec<Layer>,
}

impl Files {
    /// Reads `file` and nothing else, or if there is none, all files of the system whose root directory is `root`.
    pub fn read(file: Option<&Path>, root: &Path) -> Result<Self, Failure> {
        let sources = match file {
            Some(path) => vec![Source::read(path)?],
            None => files::read_all(root)?,
        };
        let layers = sources.into_iter().map(Layer::new).collect::<Result<_, ConfigError>>()?;
        Ok(Self { layers })
    }

    /// What is said last of a key.
    fn last<T>(&self, key: impl Fn(&Written) -> &written::Value<T>) -> Option<Said<'_, T>> {
        last(&self.layers, key)
    }

    fn cloned<T: Clone>(&self, key: impl Fn(&Written) -> &written::Value<T>) -> Option<T> {
        self.last(key).map(|said| said.get().clone())
    }

    fn pool_limit(&self, machine: &Machine) -> Result<Option<u64>, ConfigError> {
        let said = self.last(|file| &file.pool_limit);
        let bytes =
            said.map(|said| machine.pool_limit(said.get()).map_err(|reason| said.wrong(reason)));
        bytes.transpose()
    }

    fn swaps(&self, machine: &Machine) -> Result<Vec<SwapSpec>, ConfigError> {
        let Some(said) = self.last(|file| &file.swap) else { return Ok(Vec::new()) };
        let specs = said.get().iter().map(|WrittenSwap { size, name }| {
            let wrong = |span, reason| said.source.wrong(&span, reason);
            let bytes = machine.swap_bytes(size.get_ref());
            let bytes = bytes.map_err(|reason| wrong(size.span(), reason))?;
            if let Some(name) = name {
                let checked = check_name(name.get_ref()).map_err(Failure::from);
                checked.map_err(|reason| wrong(name.span(), reason))?;
            }
            Ok(SwapSpec { bytes, name: name.as_ref().map(|name| name.get_ref().clone()) })
        });
        specs.collect()
    }

    fn backing(&self, machine: &Machine) -> Result<FileBacking, ConfigError> {
        let usage = |message: &str| Failure::new(Exit::Usage, message);
        let path = self.last(|file| &file.backing.path);
        let size = self.last(|file| &file.backing.size);
        let force = self.last(|file| &file.backing.force).filter(|force| *force.get());
        if let Some(path) = path.as_ref().filter(|path| !path.get().is_absolute()) {
            return Err(path.wrong(usage("the path of a backing file must begin with '/'")));
        }
        let without = "there is no path, and this is about what it names: set path too";
        match (&path, &size, &force) {
            (None, Some(size), _) => return Err(size.wrong(usage(without))),
            (None, _, Some(force)) => return Err(force.wrong(usage(without))),
            (Some(path), _, Some(force)) if force.rank < path.rank => {
                // What is there would be lost, of something that nobody meant.
                let message = format!(
                    "this is of another path than that in {}: set force there too, or not at all",
                    path.source.path.display()
                );
                return Err(force.wrong(usage(&message)));
            }
            _ => {}
        }
        let bytes =
            size.map(|size| machine.backing_bytes(size.get()).map_err(|reason| size.wrong(reason)));
        Ok(FileBacking {
            path: path.map(|path| path.get().clone()),
            bytes: bytes.transpose()?,
            encrypt: self.cloned(|file| &file.backing.encrypt).unwrap_or(true),
            force: force.is_some(),
        })
    }

    fn writeback(&self) -> Result<WritebackSettings, ConfigError> {
        let low = self.last(|file| &file.writeback.low);
        let high = self.last(|file| &file.writeback.high);
        let rate = self.last(|file| &file.writeback.rate);
        let daily = self.last(|file| &file.writeback.daily);
        let age = self.last(|file| &file.writeback.age);
        let value = |said: &Option<Said<'_, Permille>>| said.as_ref().map(|said| said.get().0);
        let quota = |said: &Option<Said<'_, Quota>>| said.as_ref().and_then(|said| said.get().0);
        let default = WritebackSettings::default();
        let settings = WritebackSettings {
            low_permille: value(&low).unwrap_or(default.low_permille),
            high_permille: value(&high).unwrap_or(default.high_permille),
            bytes_per_second: quota(&rate),
            bytes_per_day: quota(&daily),
            age_seconds: age.as_ref().and_then(|said: &Said<'_, Age>| said.get().0),
            keep_copies: self.cloned(|file| &file.writeback.keep).unwrap_or(default.keep_copies),
        };
        let Err(error) = settings.check() else { return Ok(settings) };
        let wrong = match &error {
            SettingsError::Rate { .. } => rate.map(|said| said.wrong(error.into())),
            SettingsError::Daily { .. } => daily.map(|said| said.wrong(error.into())),
            SettingsError::Age => age.map(|said| said.wrong(error.into())),
            SettingsError::High { .. } => high.map(|said| said.wrong(error.into())),
            _ => low.or(high).map(|said| said.wrong(error.into())),
        };
        // The defaults are right, so something was said.
        Err(wrong.expect("a setting that is wrong was set"))
    }
}

impl RunConfig {
    /// Makes one of the command line, the files, and the defaults.
    pub fn new(
        args: &RunArgs,
        control: Option<&Path>,
        files: &Files,
        machine: &Machine,
    ) -> Result<Self, Failure> {
        let pool_limit = match (&args.pool_limit, files.pool_limit(machine)?) {
            (Some(size), _) => machine.pool_limit(size)?,
            (None, Some(bytes)) => bytes,
            (None, None) => machine.pool_limit(&Size::half_of_ram())?,
        };
        let of_files = files.swaps(machine)?;
        let mut swaps = Vec::new();
        for arg in &args.swap {
            let bytes = machine.swap_bytes(&arg.size)?;
            swaps.push(SwapSpec { bytes, name: arg.name.clone() });
        }
        if swaps.is_empty() {
            swaps = of_files;
        }
        check_distinct(&swaps)?;
        let (backing, encrypt_backing) = backing(args, files.backing(machine)?, machine)?;
        let control = control.map(Path::to_owned).or(files.cloned(|file| &file.control));
        let frontend = args.frontend.or(files.cloned(|file| &file.frontend)).unwrap_or_default();
        let nbd = args.nbd.clone().or(files.cloned(|file| &file.nbd));
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
            swapon: args.swapon || files.cloned(|file| &file.swapon).unwrap_or(false),
            best_effort: args.best_effort
                || files.cloned(|file| &file.best_effort).unwrap_or(false),
            backing,
            encrypt_backing,
            writeback: files.writeback()?,
            swaps,
        })
    }
}

/// The backing file that the command line names, or else the files, and whether backing files are encrypted.
fn backing(
    args: &RunArgs,
    file: FileBacking,
    machine: &Machine,
) -> Result<(Option<BackingSpec>, bool), Failure> {
    let encrypt = file.encrypt && !args.no_encrypt_backing;
    let (path, bytes, force) = match &args.backing {
        Some(arg) => {
            let bytes = arg.size.as_ref().map(|size| machine.backing_bytes(size)).transpose()?;
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

/// What the files say of the backing file, checked.
#[derive(Debug)]
struct FileBacking {
    path: Option<PathBuf>,
    bytes: Option<u64>,
    encrypt: bool,
    force: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::SwapArg;

    const MACHINE: Machine = Machine { ram: 16 << 30, pool_limit_min: 1 << 20 };

    /// The configuration that `args` and a file of `text` make.
    fn with_file(args: RunArgs, text: &str) -> Result<RunConfig, Failure> {
        let source = Source { path: "/etc/tmem/tmem.toml".into(), text: text.to_owned() };
        let files = Files { layers: vec![Layer::new(source)?] };
        RunConfig::new(&args, None, &files, &MACHINE)
    }

    /// The configuration that `args` make with no file.
    fn with_none(args: &RunArgs) -> Result<RunConfig, Failure> {
        RunConfig::new(args, None, &Files::default(), &MACHINE)
    }

    fn size(text: &str) -> Size {
        text.parse().unwrap()
    }

    #[test]
    fn defaults() {
        let config = with_none(&RunArgs::default()).unwrap();
        assert_eq!(config.pool_limit, 8 << 30);
        assert_eq!(config.control, PathBuf::from("/run/tmem/control.sock"));
        assert!(!config.swapon && !config.best_effort && config.swaps.is_empty());
        assert_eq!((config.frontend, config.nbd), (FrontEnd::Ublk, None));
    }

    #[test]
    fn the_nbd_front_end_is_always_somewhere() {
        let args = RunArgs { frontend: Some(FrontEnd::Nbd), ..RunArgs::default() };
        let config = with_none(&args).unwrap();
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
        let alone = with_none(&args).unwrap();
        let spec = BackingSpec { path: "/b".into(), bytes: None, encrypt: true, force: true };
        assert_eq!((alone.backing, alone.encrypt_backing), (Some(spec), true));
    }

    #[test]
    fn whether_to_encrypt_is_said_also_for_a_backing_file_that_is_named_later() {
        let args = RunArgs { no_encrypt_backing: true, ..RunArgs::default() };
        let config = with_none(&args).unwrap();
        assert_eq!((config.backing, config.encrypt_backing), (None, false));
        let config = with_file(RunArgs::default(), "[backing]\nencrypt = false\n").unwrap();
        assert_eq!((config.backing, config.encrypt_backing), (None, false));
        let config = with_file(RunArgs::default(), "").unwrap();
        assert_eq!((config.backing, config.encrypt_backing), (None, true));
    }

    #[test]
    fn force_is_about_a_backing_file() {
        let args = RunArgs { force: true, ..RunArgs::default() };
        let failure = with_none(&args).unwrap_err();
        assert_eq!(failure.code, Exit::Usage);
        assert!(failure.message.contains("--backing"), "{failure}");
    }

    #[test]
    fn a_backing_file_too_small_for_anything_is_refused() {
        let args = RunArgs { backing: Some("/a,size=1M".parse().unwrap()), ..RunArgs::default() };
        let failure = with_none(&args).unwrap_err();
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
            pool_limit: Some(size("1G")),
            swap: vec![SwapArg { size: size("2G"), name: None }],
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
        let failure =
            Files::read(Some(Path::new("/nonexistent/tmem.toml")), Path::new("/")).unwrap_err();
        assert_eq!(failure.code, Exit::Usage);
        assert!(failure.message.contains("/nonexistent/tmem.toml"), "{failure}");
    }

    #[test]
    fn pool_limits_have_bounds() {
        for (text, good) in
            [("1M - 1", false), ("1M", true), ("ram", true), ("16G + 1", false), ("0%", false)]
        {
            match MACHINE.pool_limit(&size(text)) {
                Ok(_) => assert!(good, "{text}"),
                Err(failure) => {
                    assert!(!good && failure.code == Exit::Size, "{text}");
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
        let failure = RunConfig::new(&args, Some(Path::new("/run/x")), &Files::default(), &MACHINE)
            .unwrap_err();
        assert_eq!(failure.code, Exit::Usage);
        assert!(failure.message.contains("cannot be both"), "{failure}");
    }

    #[test]
    fn one_name_is_for_one_device() {
        let swap = SwapArg { size: size("1G"), name: Some("a".into()) };
        let args = RunArgs { swap: vec![swap.clone(), swap], ..RunArgs::default() };
        let failure = with_none(&args).unwrap_err();
        assert_eq!(failure.code, Exit::NameTaken);
    }

    #[test]
    fn this_machine_has_memory() {
        let machine = Machine::here().unwrap();
        assert!(machine.ram > 1 << 20 && machine.pool_limit_min > 0);
    }
}
