//! A process of ours that the supervisor has started.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child as Process, Command, ExitStatus, Stdio};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::link::Link;
use super::pulse::Pulse;
use crate::inherited::{Legacy, duplicate};

/// See the module's description. It lives on when this is dropped.
#[derive(Debug)]
pub struct Child {
    process: Process,
    pidfd: OwnedFd,
    ended: Option<ExitStatus>,
    /// Whether it runs.
    pub pulse: Pulse,
    /// What it and we say to each other.
    pub link: Link,
}

impl Child {
    /// Starts one by `command`, with these files.
    pub fn start(mut command: Command, legacy: Legacy<'_>) -> io::Result<Self> {
        let (link, far_end) = Link::pair()?;
        let pulse = Pulse::new()?;
        let far_pulse = duplicate(&pulse)?;
        let mut legacy = legacy;
        legacy.add("link", far_end.as_fd());
        legacy.add("pulse", far_pulse.as_fd());
        // What we print is ours alone to say.
        let process = legacy.spawn(command.stdin(Stdio::null()).stdout(Stdio::null()))?;
        let pidfd = pidfd_open(Pid::from_child(&process), PidfdFlags::empty())?;
        Ok(Self { process, pidfd, ended: None, pulse, link })
    }

    /// Readable once it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.ended = self.process.try_wait()?;
        Ok(self.ended)
    }

    /// Whether [`Child::ended`] has said that it has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.process.wait()
    }

    /// Ends it at once, whatever it does.
    pub fn kill(&self) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.pidfd, Signal::KILL)?)
    }
}
