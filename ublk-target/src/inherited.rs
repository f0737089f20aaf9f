//! Files that a process of ours is started with: named in an environment variable, and open.
//!
//! A process that is started anew takes each of them once, and closes none by accident: whatever it
//! runs in turn does not get them.
#![allow(unsafe_code)]

use std::env;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
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

    /// Starts a process that gets the files. Call it while no other thread starts one.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let pairs = self.files.iter().map(|(name, file)| format!("{name}={}", file.as_raw_fd()));
        command.env(VARIABLE, pairs.collect::<Vec<_>>().join(","));
        let set = |flags| self.files.iter().try_for_each(|(_, file)| fcntl_setfd(file, flags));
        let started = set(FdFlags::empty()).map_err(io::Error::from).and_then(|()| command.spawn());
        set(FdFlags::CLOEXEC)?;
        started
    }
}

/// The files that this process was started with.
#[derive(Debug)]
pub struct Inherited {
    files: Vec<(String, OwnedFd)>,
}

impl Inherited {
    /// Takes all of them. Call it once, before anything else is opened.
    pub fn take() -> io::Result<Self> {
        let wrong = || io::Error::other(format!("{VARIABLE} does not say what is inherited"));
        let text = env::var(VARIABLE).map_err(|_| wrong())?;
        let mut files = Vec::<(String, OwnedFd)>::new();
        for pair in text.split_terminator(',') {
            let (name, number) = pair.split_once('=').ok_or_else(wrong)?;
            let number: RawFd = number.parse().map_err(|_| wrong())?;
            if number <= libc::STDERR_FILENO || files.iter().any(|(_, f)| f.as_raw_fd() == number) {
                return Err(wrong());
            }
            // SAFETY: it is only looked at, and may well not be open.
            fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) })?;
            // SAFETY: it is open, which was just seen, and nobody else's: who started us opened it for us, and
            // each number is taken once.
            let file = unsafe { OwnedFd::from_raw_fd(number) };
            fcntl_setfd(&file, FdFlags::CLOEXEC)?;
            files.push((name.to_owned(), file));
        }
        Ok(Self { files })
    }

    /// The file of that name, which is the caller's from now on.
    pub fn file(&mut self, name: &str) -> io::Result<OwnedFd> {
        let at = self.files.iter().position(|(other, _)| other == name);
        let missing = || io::Error::other(format!("no file '{name}' was inherited"));
        Ok(self.files.swap_remove(at.ok_or_else(missing)?).1)
    }
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
