//! Files that a process of ours is started with: named in an environment variable, and open; or kept for it by systemd.
//!
//! A process that is started anew takes each of them once, and closes none by accident: whatever it
//! runs in turn does not get them.
#![allow(unsafe_code)]

use std::env;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// Says which files a process was started with: `NAME=NUMBER,...`.
const VARIABLE: &str = "TMEM_INHERITED";

/// Files by name, for a process that is to be started.
#[derive(Debug, Default)]
pub struct Legacy<'a> {
    files: Vec<(&'static str, BorrowedFd<'a>)>,
}

impl<'a> Legacy<'a> {
    /// Adds a file.
    pub fn add(&mut self, name: &'static str, file: BorrowedFd<'a>) {
        self.files.push((name, file));
    }

    /// The files and their names.
    pub fn files(&self) -> &[(&'static str, BorrowedFd<'a>)] {
        &self.files
    }

    /// Starts a process that gets the files. Call it while no other thread starts one.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.name_in(command);
        let started = self.keep_open(true).and_then(|()| command.spawn());
        self.keep_open(false)?;
        started
    }

    /// Goes on as another program that gets the files; returns only if that fails. Call it in a process with one thread.
    pub fn exec(&self, command: &mut Command) -> io::Error {
        self.name_in(command);
        let error = match self.keep_open(true) {
            Ok(()) => command.exec(),
            Err(error) => error,
        };
        // They were as they are to be.
        let _ = self.keep_open(false);
        error
    }

    fn name_in(&self, command: &mut Command) {
        let pairs = self.files.iter().map(|(name, file)| format!("{name}={}", file.as_raw_fd()));
        command.env(VARIABLE, pairs.collect::<Vec<_>>().join(","));
    }

    /// Whether a program that is run now gets the files.
    fn keep_open(&self, keep: bool) -> io::Result<()> {
        let flags = if keep { FdFlags::empty() } else { FdFlags::CLOEXEC };
        Ok(self.files.iter().try_for_each(|(_, file)| fcntl_setfd(file, flags))?)
    }
}

/// Closes all files but the three that every process has. Call it in a process that has opened none.
pub fn close_all() {
    let first = 1 + libc::STDERR_FILENO.cast_unsigned();
    // SAFETY: nobody in this process has a file that could be taken away from under them. Where the call is not known (before
    // Linux 5.9), they stay open.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}

/// The files that this process was started with.
#[derive(Debug)]
pub struct Inherited {
    files: Vec<(String, OwnedFd)>,
}

impl Inherited {
    /// Takes all of them. Call it once, before anything else is opened.
    pub fn take() -> io::Result<Self> {
        let text = env::var(VARIABLE).map_err(|_| wrong(VARIABLE))?;
        let pairs = text.split_terminator(',').map(|pair| {
            let (name, number) = pair.split_once('=')?;
            Some((number.parse().ok()?, name.to_owned()))
        });
        Self::open(pairs.map(|pair| pair.ok_or_else(|| wrong(VARIABLE))))
    }

    /// Takes those that systemd keeps for the service that we are; none if there is no such thing. Call it once, before
    /// anything else is opened.
    pub fn kept_by_systemd() -> io::Result<Self> {
        Self::open(sd_notify::listen_fds_with_names()?.map(Ok))
    }

    /// Files that were found elsewhere.
    pub fn of(files: Vec<(&str, OwnedFd)>) -> Self {
        Self { files: files.into_iter().map(|(name, file)| (name.to_owned(), file)).collect() }
    }

    fn open(pairs: impl Iterator<Item = io::Result<(RawFd, String)>>) -> io::Result<Self> {
        let mut files = Vec::<(String, OwnedFd)>::new();
        for pair in pairs {
            let (number, name) = pair?;
            if number <= libc::STDERR_FILENO || files.iter().any(|(_, f)| f.as_raw_fd() == number) {
                return Err(wrong(&name));
            }
            // SAFETY: it is only looked at, and may well not be open.
            fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) })?;
            // SAFETY: it is open, which was just seen, and nobody else's: who started us opened it for us, and
            // each number is taken once.
            let file = unsafe { OwnedFd::from_raw_fd(number) };
            fcntl_setfd(&file, FdFlags::CLOEXEC)?;
            files.push((name, file));
        }
        Ok(Self { files })
    }

    /// Whether there is a file of that name.
    pub fn has(&self, name: &str) -> bool {
        self.files.iter().any(|(other, _)| other == name)
    }

    /// The file of that name, which is the caller's from now on.
    pub fn file(&mut self, name: &str) -> io::Result<OwnedFd> {
        let at = self.files.iter().position(|(other, _)| other == name);
        let missing = || io::Error::other(format!("no file '{name}' was inherited"));
        Ok(self.files.remove(at.ok_or_else(missing)?).1)
    }
}

/// It cannot be said what is inherited.
fn wrong(what: &str) -> io::Error {
    io::Error::other(format!("{what} does not say what is inherited"))
}

/// A second descriptor of the same open file.
pub fn duplicate(file: impl AsFd) -> io::Result<OwnedFd> {
    file.as_fd().try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_process_gets_what_it_is_given_and_the_next_one_nothing() {
        let file = File::open("/proc/self/status").unwrap();
        let script = format!("test -e /proc/self/fd/{} && echo ${VARIABLE}", file.as_raw_fd());
        let mut legacy = Legacy::default();
        legacy.add("status", file.as_fd());
        let mut command = Command::new("sh");
        let child = legacy.spawn(command.args(["-c", &script]).stdout(Stdio::piped())).unwrap();
        let output = child.wait_with_output().unwrap();
        let expected = format!("status={}\n", file.as_raw_fd());
        assert_eq!(str::from_utf8(&output.stdout).unwrap(), expected);
        let status = Command::new("sh").args(["-c", &script]).status().unwrap();
        assert!(!status.success());
    }
}
