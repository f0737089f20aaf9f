//! The commands that ask a running daemon, and those that look at the machine and its configuration.

use std::io::{self, Write};
use std::path::Path;

use clap::CommandFactory;

use crate::backing::BackingSpec;
use crate::cli::{AddCommand, BackingArg, Cli, Command, ConfigArgs, DoctorArgs, RunArgs, Setting};
use crate::config::{Files, Machine};
use crate::control::Client;
use crate::daemon::check_swap_bytes;
use crate::doctor;
use crate::exit::{Exit, Failure};
use crate::output;
use crate::size::{SizeError, ram_bytes};

/// Carries out the command line, with `run` and `recover` for the daemon. What a command has to say goes to
/// `out`; how it ended is returned.
pub fn execute(
    cli: &Cli,
    out: &mut dyn Write,
    run: impl FnOnce(&RunArgs, Option<&Path>, &mut dyn Write) -> Result<(), Failure>,
    recover: impl FnOnce(&Path, bool, &mut dyn Write) -> Result<(), Failure>,
) -> Result<Exit, Failure> {
    let client = Client::new(&cli.socket());
    match &cli.command {
        Command::Run(args) => run(args, cli.control.as_deref(), out)?,
        Command::Recover { without_backing } => recover(&cli.socket(), *without_backing, out)?,
        Command::Add(AddCommand::Swap { size, name }) => {
            let bytes = size.bytes(ram_bytes()).map_err(unusable)?;
            check_swap_bytes(bytes)?;
            let info = client.add_swap(name.as_deref(), bytes)?;
            print(out, &format!("{} {} {}\n", info.name, info.path, info.bytes))?;
        }
        Command::Del { name } => client.del(name)?,
        Command::List(args) => print(out, &output::devices(&client.list()?, args)?)?,
        Command::Stats(args) => print(out, &output::stats(&client.stats()?, args)?)?,
        Command::Set { setting, force } => print(out, &set(&client, setting, *force)?)?,
        Command::Upgrade => print(out, &format!("pid {} serves\n", client.upgrade()?))?,
        Command::Config(ConfigArgs { config, root }) => {
            let files = Files::read(config.as_deref(), root)?;
            print(out, &files.show(&Machine::here()?)?)?;
        }
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "tmem", &mut text);
            print(out, &String::from_utf8_lossy(&text))?;
        }
        Command::Doctor(args) => return examine(args, out),
    }
    Ok(Exit::Ok)
}

/// Changes a setting, and returns the line that says what is now in force.
fn set(client: &Client, setting: &Setting, force: bool) -> Result<String, Failure> {
    if force && !matches!(setting, Setting::Backing(_)) {
        let message = "--force is about a backing file: leave it out, or set backing=PATH";
        return Err(Failure::new(Exit::Usage, message));
    }
    Ok(match setting {
        Setting::PoolLimit(size) => {
            let bytes = client.set_pool_limit(size.bytes(ram_bytes()).map_err(unusable)?)?;
            format!("pool-limit={bytes}\n")
        }
        Setting::Backing(BackingArg { path, size }) => {
            let bytes = size.as_ref().map(|size| size.bytes(ram_bytes()));
            let bytes = bytes.transpose().map_err(unusable)?;
            // Whether to encrypt, the daemon knows.
            let spec = BackingSpec { path: path.clone(), bytes, encrypt: true, force };
            let info = client.set_backing(&spec)?;
            format!("backing={},size={}\n", info.path, info.bytes)
        }
        Setting::Writeback(change) => {
            let settings = client.set_writeback(*change)?;
            format!("{}\n", change.show(&settings))
        }
    })
}

/// A size that is none on this machine.
fn unusable(error: SizeError) -> Failure {
    Failure::new(Exit::Size, error)
}

/// Reports the doctor's findings; one that is a failure makes the command one.
fn examine(args: &DoctorArgs, out: &mut dyn Write) -> Result<Exit, Failure> {
    let findings = doctor::examine(&args.root);
    let text = if args.json { doctor::to_json(&findings) } else { doctor::to_text(&findings) };
    print(out, &text)?;
    let failed = findings.iter().any(|finding| finding.level == doctor::Level::Fail);
    Ok(if failed { Exit::Failure } else { Exit::Ok })
}

/// Prints a command's whole output. A reader that has seen enough is no error.
fn print(out: &mut dyn Write, text: &str) -> Result<(), Failure> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Failure, format!("cannot write the output: {error}")))
        }
        _ => Ok(()),
    }
}
