//! The command line: what can be written, and nothing of what is done about it.
//!
//! Everything that a text can be checked for by itself is checked here, so that a command starts
//! with values that make sense; what depends on the machine is checked in `config.rs`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::backing::{ValueError, WritebackChange};
use crate::control::DEFAULT_SOCKET;
use crate::daemon::{DaemonError, FrontEnd, check_name};
use crate::exit;
use crate::nbd::NbdAddress;
use crate::output;
use crate::size::{Size, SizeError, split_option};
use crate::table;

/// Transcendent memory: compressed swap in user space.
#[derive(Debug, Parser)]
#[command(name = "tmem", version, max_term_width = 100, after_help = exit::table())]
pub struct Cli {
    /// The daemon's control socket [default: /run/tmem/control.sock]
    #[arg(long, global = true, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The control socket of the daemon to ask.
    pub fn socket(&self) -> PathBuf {
        self.control.clone().unwrap_or_else(|| DEFAULT_SOCKET.into())
    }
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon in the foreground, until it is told to stop
    Run(RunArgs),
    /// Go on in the foreground with the devices of a daemon that died: all of its processes, or the one that looks after the
    /// others. A service is restarted instead
    Recover {
        /// Go on though the backing file cannot be opened: what is on it is lost
        #[arg(long)]
        without_backing: bool,
    },
    /// Add a device to the running daemon
    #[command(subcommand)]
    Add(AddCommand),
    /// Remove a device from the running daemon; refused while it is in use
    Del {
        /// The device's name
        #[arg(value_parser = name)]
        name: String,
    },
    /// List the daemon's devices
    #[command(after_help = table::help(output::DEVICE_COLUMNS))]
    List(TableArgs),
    /// Report what the devices hold and what it takes
    #[command(after_help = table::help(output::USAGE_COLUMNS))]
    Stats(TableArgs),
    /// Change a setting of the running daemon
    #[command(after_help = SETTINGS)]
    Set {
        /// The setting and its value
        #[arg(value_name = "KEY=VALUE")]
        setting: Setting,
        /// With backing=: use a file or device that holds something else, which is lost
        #[arg(long)]
        force: bool,
    },
    /// Have the running daemon go on as the program that has its name by now, without taking anything out of use
    Upgrade,
    /// Show the configuration as it is in force, every key and where it was said
    Config(ConfigArgs),
    /// Check whether this machine is fit for tmem, and say what to do where it is not
    Doctor(DoctorArgs),
    /// Print a shell's completions; for packaging
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// What `tmem set` can set, for its help.
const SETTINGS: &str = "\
Settings:
  pool-limit=SIZE           memory that pages may take: a size like 4G or 25%, or arithmetic like min(ram/2, 8G)
  backing=PATH[,size=SIZE]  file or block device for pages that are not used; a file that is not there
                            is made, if a size is given
  writeback-low=PERCENT     writing begins when less of the pool limit is left free,
  writeback-high=PERCENT    and goes on until so much is
  writeback-rate=SIZE       bytes written in a second at most, or none for no limit
  writeback-daily=SIZE      bytes written in a day at most, or none for no limit
  writeback-age=TIME        write what was not used for so long (90s, 30m, 2h) though there is room, or none
  writeback-keep=yes|no     keep in memory what was written, until there is something else for that memory";

/// Options of `tmem run`.
#[derive(Args, Debug, Default)]
pub struct RunArgs {
    /// Memory that pages may take: a size like 4G or 25% (of RAM), or arithmetic like min(ram/2, 8G)
    /// [default: 50%]
    #[arg(long, value_name = "SIZE")]
    pub pool_limit: Option<Size>,
    /// Make a swap device; may be given again. Takes the place of the file's swap devices
    #[arg(long, value_name = "SIZE[,name=NAME]")]
    pub swap: Vec<SwapArg>,
    /// Put each swap device to use with mkswap and swapon
    #[arg(long)]
    pub swapon: bool,
    /// What gives devices their node; with nbd it is the kernel's NBD client, and only to swap
    /// [default: ublk]
    #[arg(long, value_name = "FRONTEND")]
    pub frontend: Option<FrontEnd>,
    /// Export every device by NBD on this Unix socket, under its name [default with the nbd front
    /// end: unix:/run/tmem/nbd.sock]
    #[arg(long, value_name = "unix:PATH")]
    pub nbd: Option<NbdAddress>,
    /// Write pages that are not used to this file or block device when the pool gets full. A file that is
    /// not there is made, if a size is given. Takes the place of the file's backing file
    #[arg(long, value_name = "PATH[,size=SIZE]")]
    pub backing: Option<BackingArg>,
    /// Do not encrypt what is written to the backing file; without this it is, by a key that is never
    /// stored
    #[arg(long)]
    pub no_encrypt_backing: bool,
    /// Use a backing file or device that holds something else, which is lost
    #[arg(long)]
    pub force: bool,
    /// Read settings from this TOML file and no other; the command line wins over it [default:
    /// tmem.toml and tmem.toml.d/*.toml in /etc/tmem, /run/tmem, /usr/local/lib/tmem and /usr/lib/tmem]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Run even without locked memory or the I/O flusher flag: for trials only, may deadlock
    #[arg(long)]
    pub best_effort: bool,
}

/// What can be added.
#[derive(Debug, Subcommand)]
pub enum AddCommand {
    /// Add a swap device, and print its name, its node and its size in bytes
    Swap {
        /// Its size: bytes, a size like 4G or 25% (of RAM), or arithmetic like min(ram/2, 8G)
        #[arg(long)]
        size: Size,
        /// Its name; the daemon finds one if none is given
        #[arg(long, value_parser = name)]
        name: Option<String>,
    },
}

/// How a table is shown.
#[derive(Args, Debug, Default)]
pub struct TableArgs {
    /// Show sizes in bytes
    #[arg(short, long)]
    pub bytes: bool,
    /// Show no headings
    #[arg(short, long)]
    pub noheadings: bool,
    /// Show these columns, in this order
    #[arg(short, long, value_name = "COLUMN", value_delimiter = ',')]
    pub output: Vec<String>,
    /// Show all columns
    #[arg(long, conflicts_with = "output")]
    pub output_all: bool,
    /// Separate columns with one space and align nothing
    #[arg(long)]
    pub raw: bool,
    /// Print everything as JSON, sizes in bytes
    #[arg(
        short = 'J',
        long,
        conflicts_with_all = ["bytes", "noheadings", "output", "output_all", "raw"]
    )]
    pub json: bool,
}

/// Options of `tmem config`.
#[derive(Args, Debug)]
pub struct ConfigArgs {
    /// Read this TOML file and no other
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Read the files of the system whose root directory this is
    #[arg(long, value_name = "DIR", default_value = "/", conflicts_with = "config")]
    pub root: PathBuf,
}

/// Options of `tmem doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Print the findings as JSON
    #[arg(short = 'J', long)]
    pub json: bool,
    /// Examine the machine whose root directory this is
    #[arg(long, default_value = "/", hide = true)]
    pub root: PathBuf,
}

/// A swap device as `--swap` names it: `SIZE[,name=NAME]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SwapArg {
    /// Its size.
    pub size: Size,
    /// Its name.
    pub name: Option<String>,
}

/// Why a `--swap` is wrong.
#[derive(Debug, thiserror::Error)]
pub enum SwapArgError {
    /// The size is no size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The name is no name.
    #[error(transparent)]
    Name(#[from] DaemonError),
    /// There is something else behind the size.
    #[error("'{0}' is not an option of a swap device: after the size write name=NAME")]
    Unknown(String),
}

impl FromStr for SwapArg {
    type Err = SwapArgError;

    fn from_str(text: &str) -> Result<Self, SwapArgError> {
        let (size, option) = split_option(text);
        let size = size.parse()?;
        let Some(option) = option else {
            return Ok(Self { size, name: None });
        };
        let name = option.strip_prefix("name=");
        let name = name.ok_or_else(|| SwapArgError::Unknown(option.to_owned()))?;
        check_name(name)?;
        Ok(Self { size, name: Some(name.to_owned()) })
    }
}

/// A backing file as it is named: `PATH[,size=SIZE]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BackingArg {
    /// Its absolute path.
    pub path: PathBuf,
    /// Its size.
    pub size: Option<Size>,
}

/// Why a backing file is named wrongly.
#[derive(Debug, thiserror::Error)]
pub enum BackingArgError {
    /// The size is no size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The daemon may run elsewhere.
    #[error("'{0}' is not the path of a backing file: write one that begins with '/'")]
    Relative(String),
}

impl FromStr for BackingArg {
    type Err = BackingArgError;

    fn from_str(text: &str) -> Result<Self, BackingArgError> {
        // The path may have a comma, or even this.
        let (path, size) = match text.rsplit_once(",size=") {
            Some((path, size)) => (path, Some(size.parse()?)),
            None => (text, None),
        };
        let path = PathBuf::from(path);
        if !path.is_absolute() {
            return Err(BackingArgError::Relative(path.display().to_string()));
        }
        Ok(Self { path, size })
    }
}

/// A setting as `tmem set` names it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Setting {
    /// The pool limit.
    PoolLimit(Size),
    /// The backing file.
    Backing(BackingArg),
    /// One of writeback's.
    Writeback(WritebackChange),
}

/// Why a setting is wrong.
#[derive(Debug, thiserror::Error)]
pub enum SettingError {
    /// No `=`.
    #[error("'{0}' has no value: write KEY=VALUE, with one of these keys: {keys}", keys = keys())]
    NoValue(String),
    /// No such key.
    #[error("there is no setting '{0}': these can be set: {keys}", keys = keys())]
    UnknownKey(String),
    /// The value is no size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The value is no backing file.
    #[error(transparent)]
    Backing(#[from] BackingArgError),
    /// The value is none of this setting of writeback.
    #[error(transparent)]
    Writeback(#[from] ValueError),
}

/// All keys of settings, for messages.
fn keys() -> String {
    let writeback = WritebackChange::KEYS.map(|key| format!("writeback-{key}"));
    format!("pool-limit, backing, {}", writeback.join(", "))
}

impl FromStr for Setting {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        let no_value = || SettingError::NoValue(text.to_owned());
        let (key, value) = text.split_once('=').ok_or_else(no_value)?;
        match key {
            "pool-limit" => Ok(Self::PoolLimit(value.parse()?)),
            "backing" => Ok(Self::Backing(value.parse()?)),
            _ => {
                let writeback = key.strip_prefix("writeback-");
                let change = writeback.and_then(|key| WritebackChange::parse(key, value));
                let change = change.ok_or_else(|| SettingError::UnknownKey(key.to_owned()))?;
                Ok(Self::Writeback(change?))
            }
        }
    }
}

/// Takes a device name that can be one.
fn name(text: &str) -> Result<String, DaemonError> {
    check_name(text).map(|()| text.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn shells_complete_every_command() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tmem", &mut text);
            let text = String::from_utf8(text).unwrap();
            for word in ["run", "stats", "doctor", "pool-limit"] {
                assert!(text.contains(word), "{shell}: {word}");
            }
        }
    }

    #[test]
    fn run_takes_its_options() {
        let line = "tmem run --pool-limit 25% --swap 4G --swap 1G,name=b --swapon --control /x";
        let cli = parse(line).unwrap();
        assert_eq!(cli.socket(), PathBuf::from("/x"));
        let Command::Run(args) = cli.command else { panic!("not run") };
        assert_eq!(args.pool_limit, Some("25%".parse().unwrap()));
        assert_eq!(args.swap[0], SwapArg { size: "4G".parse().unwrap(), name: None });
        assert_eq!(args.swap[1].name.as_deref(), Some("b"));
        assert!(args.swapon && !args.best_effort);
    }

    #[test]
    fn a_size_may_have_commas_of_its_own() {
        let cli = parse("tmem run --swap min(ram/2,8G),name=b").unwrap();
        let Command::Run(args) = cli.command else { panic!("not run") };
        let (size, name) = ("min(ram/2,8G)".parse().unwrap(), Some("b".to_owned()));
        assert_eq!(args.swap, [SwapArg { size, name }]);
    }

    #[test]
    fn a_backing_file_is_a_path_and_perhaps_a_size() {
        for (text, path, size) in [
            ("/dev/sdb", "/dev/sdb", None),
            ("/var/a,b,size=64G", "/var/a,b", Some("64G")),
            ("/a,size=1G,size=25%", "/a,size=1G", Some("25%")),
            ("/a,size=max(ram,1G)", "/a", Some("max(ram,1G)")),
            ("/a,sizes=1G", "/a,sizes=1G", None),
        ] {
            let size = size.map(|size| size.parse().unwrap());
            let arg = BackingArg { path: path.into(), size };
            let cli = parse(&format!("tmem run --backing {text} --force")).unwrap();
            let Command::Run(args) = cli.command else { panic!("not run") };
            assert_eq!(args.backing, Some(arg.clone()));
            assert!(args.force && !args.no_encrypt_backing);
            let cli = parse(&format!("tmem set backing={text}")).unwrap();
            let Command::Set { setting, force } = cli.command else { panic!("not set") };
            assert_eq!((setting, force), (Setting::Backing(arg), false));
        }
    }

    #[test]
    fn every_setting_is_in_the_help_and_can_be_set() {
        for (key, value) in [
            ("pool-limit", "1G"),
            ("backing", "/a"),
            ("writeback-low", "6%"),
            ("writeback-high", "8.5%"),
            ("writeback-rate", "20M"),
            ("writeback-daily", "none"),
            ("writeback-age", "2h"),
            ("writeback-keep", "yes"),
        ] {
            assert!(SETTINGS.contains(&format!("\n  {key}=")), "{key}");
            assert!(keys().split(", ").any(|name| name == key), "{key}");
            parse(&format!("tmem set {key}={value}")).unwrap();
        }
        assert_eq!(SETTINGS.matches('=').count(), keys().split(", ").count() + 1);
    }

    #[test]
    fn the_default_socket_is_the_documented_one() {
        assert_eq!(parse("tmem list").unwrap().socket(), PathBuf::from("/run/tmem/control.sock"));
    }

    #[test]
    fn wrong_words_say_what_is_right() {
        for (line, hint) in [
            ("tmem run --swap 4X", "is not a size"),
            ("tmem run --swap 4G/0", "divides by zero"),
            ("tmem run --swap 4G,nam=b", "name=NAME"),
            ("tmem run --swap 4G,name=", "cannot name a device"),
            ("tmem set swappiness=1", "these can be set: pool-limit, backing, writeback-low, "),
            ("tmem set writeback-colour=1", "there is no setting 'writeback-colour'"),
            ("tmem set writeback-low=6", "like 6% or 6.5%"),
            ("tmem set writeback-rate=x", "is not a size"),
            ("tmem set writeback-age=1d", "is not an age"),
            ("tmem set backing=log", "begins with '/'"),
            ("tmem set backing=/log,size=x", "is not a size"),
            ("tmem run --backing ,size=1G", "begins with '/'"),
            ("tmem set pool-limit", "KEY=VALUE"),
            ("tmem set pool-limit=", "is not a size"),
            ("tmem run --nbd tcp:localhost:10809", "TCP"),
            ("tmem run --frontend fuse", "ublk, nbd"),
            ("tmem del a/b", "cannot name a device"),
            ("tmem add swap --size 16E", "too large"),
            ("tmem add cache --size 1G", "cache"),
            ("tmem list --json --raw", "cannot be used with"),
        ] {
            let message = parse(line).unwrap_err().to_string();
            assert!(message.contains(hint), "{line}: {message}");
        }
    }
}
