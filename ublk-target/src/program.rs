//! Programs of the host that the daemon runs: found, started unmarked, and quoted when they fail.
//!
//! They do I/O to the devices that we serve, so they are run by threads that no I/O depends on.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Stdio;

use crate::process;

/// Where system programs are on systems that leave it out of a service's PATH.
const SBIN: &str = "/usr/local/sbin:/usr/sbin:/sbin";

/// Why a program did not do what it was run for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// The program is not installed.
    #[error("there is no {program} in PATH or {SBIN}: install util-linux")]
    Missing {
        /// The program.
        program: &'static str,
    },
    /// The program is there and could not be started.
    #[error("cannot run {}: {source}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why it does not run.
        source: io::Error,
    },
    /// The program failed.
    #[error("{program} {path} failed: {said}{}", hint(program))]
    Failed {
        /// The program.
        program: &'static str,
        /// The device.
        path: String,
        /// What it said.
        said: String,
    },
}

fn hint(program: &str) -> &'static str {
    match program {
        "swapoff" => "; its pages must fit into memory or other swap: stop programs or add swap",
        _ => "",
    }
}

/// Runs `program` with `args`, for the device at `path`.
pub fn run(
    program: &'static str,
    args: impl IntoIterator<Item = impl Into<OsString>>,
    path: &str,
) -> Result<(), ProgramError> {
    execute(program, args, path, Stdio::null()).map(|_| ())
}

/// Runs `program` with `args`, for the device at `path`, and returns what it printed.
pub fn output(
    program: &'static str,
    args: impl IntoIterator<Item = impl Into<OsString>>,
    path: &str,
) -> Result<String, ProgramError> {
    let printed = execute(program, args, path, Stdio::piped())?;
    Ok(String::from_utf8_lossy(&printed).into_owned())
}

fn execute(
    program: &'static str,
    args: impl IntoIterator<Item = impl Into<OsString>>,
    path: &str,
    stdout: Stdio,
) -> Result<Vec<u8>, ProgramError> {
    let given = env::var_os("PATH").unwrap_or_default();
    let file = find_program(program, &given).ok_or(ProgramError::Missing { program })?;
    // With a path, and PATH as it is, std does not fork: a fork copies all page tables of the
    // daemon, just when there is no memory.
    let mut command = process::program(&file);
    command
        .args(args.into_iter().map(Into::into))
        .env("LC_ALL", "C")
        // An interrupt from the terminal is for us alone: it must not cut a swapoff short.
        .process_group(0)
        .stdin(Stdio::null());
    let spawn = |source| ProgramError::Spawn { program: file, source };
    let child = command.stdout(stdout).stderr(Stdio::piped()).spawn().map_err(spawn)?;
    let output = child
        .wait_with_output()
        .map_err(|source| ProgramError::Spawn { program: program.into(), source })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let said = match stderr.trim() {
        "" => output.status.to_string(),
        text => text.to_owned(),
    };
    Err(ProgramError::Failed { program, path: path.into(), said })
}

/// The program's file: the first in `path` or in the usual places for root's programs that can be
/// run.
pub fn find_program(program: &str, path: &OsStr) -> Option<PathBuf> {
    env::split_paths(path)
        .chain(env::split_paths(SBIN))
        // What a relative directory has depends on where we happen to be.
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(program))
        .find(|file| {
            fs::metadata(file)
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const PATH: &str = "/dev/ublkb0";

    #[test]
    fn programs_are_found_by_absolute_path_or_said_to_be_missing() {
        let home = tempfile::tempdir().unwrap();
        let root = home.path();
        for directory in ["a", "b"] {
            fs::create_dir(root.join(directory)).unwrap();
            fs::write(root.join(directory).join("tmem-tool"), "#!/bin/sh\n").unwrap();
        }
        fs::set_permissions(root.join("b/tmem-tool"), fs::Permissions::from_mode(0o755)).unwrap();
        let path = env::join_paths([Path::new(""), &root.join("a"), &root.join("b")]).unwrap();
        assert_eq!(find_program("tmem-tool", &path), Some(root.join("b/tmem-tool")));
        assert_eq!(find_program("tmem-tool", OsStr::new("")), None);
        let message = run("tmem-tool", [PATH], PATH).unwrap_err().to_string();
        assert!(message.contains("install util-linux"), "{message}");
    }

    #[test]
    fn a_program_that_cannot_start_is_not_called_missing() {
        let source = io::Error::from_raw_os_error(libc::ENOMEM);
        let message = ProgramError::Spawn { program: "/sbin/mkswap".into(), source }.to_string();
        assert!(message.starts_with("cannot run /sbin/mkswap: "), "{message}");
        assert!(!message.contains("util-linux"), "{message}");
    }

    #[test]
    fn what_a_program_prints_is_returned() {
        assert_eq!(output("echo", ["a", "b"], PATH).unwrap(), "a b\n");
    }

    #[test]
    fn a_program_that_fails_is_quoted() {
        let path = "/nonexistent/device";
        let message = run("mkswap", [path], path).unwrap_err().to_string();
        assert!(message.contains(path) || message.contains("util-linux"), "{message}");
    }
}
