//! The one binary: reads the command line, carries it out, and says how it ended.
//!
//! Whatever goes wrong is one line on standard error, and an exit code of its own.

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Parser;
use clap::error::ErrorKind;
use tmem_ublk_target::cli::{Cli, RunArgs};
use tmem_ublk_target::config::{Files, Machine, RunConfig};
use tmem_ublk_target::exit::{Exit, Failure};
use tmem_ublk_target::freed::observer::{self, OBSERVER};
use tmem_ublk_target::supervisor::{self, Setup};
use tmem_ublk_target::{commands, logger, process, service, standby, worker};

/// The first argument of a process that the supervisor starts.
const WORKER: &str = "worker";
const STANDBY: &str = "standby";
const LOGGER: &str = "logger";

/// The program that we are, whatever has its name by now.
const OURSELVES: &str = "/proc/self/exe";

fn main() -> ExitCode {
    let mut args = env::args_os().skip(1);
    if args.next().is_some_and(|first| first == process::BECOME_PROGRAM) {
        let error = process::become_program(args);
        // Nobody can be told that nobody can be told.
        let _ = writeln!(io::stderr(), "cannot be run: {error}");
        return Exit::Failure.into();
    }
    // One that was started through /proc has no name of its own.
    match env::args_os().nth(1) {
        Some(first) if first == WORKER => {
            process::name_thread("tmem-worker");
            return end(worker::run(service::start).map(|()| Exit::Ok));
        }
        Some(first) if first == STANDBY => {
            process::name_thread("tmem-preparing");
            return end(standby::run().map(|()| Exit::Ok));
        }
        Some(first) if first == LOGGER => {
            process::name_thread("tmem-logger");
            logger::run();
            return Exit::Ok.into();
        }
        Some(first) if first == OBSERVER => {
            process::name_thread("tmem-observer");
            observer::run(env::args_os().skip(2));
            return Exit::Ok.into();
        }
        // It knows what it is to do, whatever the command line says that another program was started with.
        _ if supervisor::is_resumed() => {
            let run = run(&RunArgs::default(), None, &mut io::stdout());
            let code = end(run.map(|()| Exit::Ok));
            logger::end();
            return code;
        }
        _ => {}
    }
    let code = end(match Cli::try_parse() {
        Ok(cli) => commands::execute(&cli, &mut io::stdout(), run, recover),
        Err(error) => usage(&error),
    });
    logger::end();
    code
}

/// Says what went wrong, if anything did.
fn end(outcome: Result<Exit, Failure>) -> ExitCode {
    let exit = outcome.unwrap_or_else(|failure| {
        // In one piece, for it may not wait. Nobody can be told that nobody can be told.
        let _ = io::stderr().write_all(format!("tmem: {failure}\n").as_bytes());
        failure.code
    });
    exit.into()
}

/// Answers a command line that asks for help, or is wrong.
fn usage(error: &clap::Error) -> Result<Exit, Failure> {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // Whoever pipes the help into a pager may leave early.
        let _ = error.print();
        return Ok(Exit::Ok);
    }
    let text = error.render().to_string();
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let line = lines.join("; ");
    Err(Failure::new(Exit::Usage, line.strip_prefix("error: ").unwrap_or(&line)))
}

/// `tmem run`: everything is checked before anything is done.
fn run(args: &RunArgs, control: Option<&Path>, out: &mut dyn Write) -> Result<(), Failure> {
    let config = || {
        let files = Files::read(args.config.as_deref(), Path::new("/"))?;
        RunConfig::new(args, control, &files, &Machine::here()?)
    };
    with_setup(|setup| supervisor::run(config, setup, out))
}

/// `tmem recover`.
fn recover(control: &Path, without_backing: bool, out: &mut dyn Write) -> Result<(), Failure> {
    with_setup(|setup| supervisor::recover(control, without_backing, setup, out))
}

/// With what a supervisor is made of in this program.
fn with_setup(supervise: impl FnOnce(&Setup<'_>) -> Result<(), Failure>) -> Result<(), Failure> {
    if !supervisor::is_resumed() {
        logger::begin(command(Path::new(OURSELVES), [LOGGER.into()]));
    }
    // Before anybody replaces it.
    let name = env::current_exe();
    let successor = || command(name.as_deref().unwrap_or(Path::new(OURSELVES)), [STANDBY.into()]);
    supervise(&Setup {
        harden: &service::harden,
        worker: &|| command(Path::new(OURSELVES), [WORKER.into()]),
        standby: Some(&|| command(Path::new(OURSELVES), [STANDBY.into()])),
        successor: name.as_ref().ok().map(|_| &successor as &dyn Fn() -> Command),
        supervisor: &|| {
            let path = name.as_deref().unwrap_or(Path::new(OURSELVES));
            let mut command = command(path, env::args_os().skip(1));
            logger::bequeath(&mut command);
            command
        },
    })
}

/// A process of the program at `path`. By a name that begins with '@' systemd-shutdown is told to leave us; then it
/// shall leave them.
fn command(path: &Path, args: impl IntoIterator<Item = OsString>) -> Command {
    let mut command = Command::new(path);
    command.arg0(env::args_os().next().unwrap_or_else(|| "tmem".into())).args(args);
    command
}
