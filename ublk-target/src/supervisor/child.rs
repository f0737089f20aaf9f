//! A process of ours that the supervisor looks after: one that it has started, or one that another supervisor had.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_getfd,
    pidfd_open, pidfd_send_signal, waitid,
};

use super::link::Link;
use super::pulse::Pulse;
use crate::inherited::{Inherited, Legacy, duplicate};
use crate::socket;

/// How often it is looked whether a process has ended that is not ours to wait for.
const LOOK_PERIOD: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// How long a process may take to stand still: one that waits in the kernel cannot.
const HALT_LIMIT: Duration = Duration::from_secs(1);
const HALT_PERIOD: Duration = Duration::from_millis(1);

/// See the module's description. It lives on when this is dropped.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    /// None of one that had ended when we came.
    pidfd: Option<OwnedFd>,
    ended: Option<ExitStatus>,
    /// Whether it runs.
    pub pulse: Pulse,
    /// What it and we say to each other.
    pub link: Link,
    /// Where it has a link to somebody else: ours leads nowhere, and this keeps it open.
    nowhere: Option<Link>,
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
        // What we print is ours alone to say, and what we were its concern.
        command.env_remove(super::RESUMED);
        let process = legacy.spawn(command.stdin(Stdio::null()).stdout(Stdio::null()))?;
        let pid = Pid::from_child(&process);
        let pidfd = Some(pidfd_open(pid, PidfdFlags::empty())?);
        Ok(Self { pid, pidfd, ended: None, pulse, link, nowhere: None })
    }

    /// One of that name which another supervisor has started, and that may have ended. Nothing is heard of it but its end.
    pub fn of_another(pid: Pid, name: &str) -> io::Result<Self> {
        let (link, nowhere) = Link::pair()?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok();
        // Its number may be another's by now.
        let pidfd = pidfd.filter(|_| name_of(pid).as_deref() == Some(name));
        let ended = pidfd.is_none().then(unknown_end);
        Ok(Self { pid, pidfd, ended, pulse: Pulse::new()?, link, nowhere: Some(nowhere) })
    }

    /// Leaves it to the program that this process goes on as.
    pub fn bequeath<'a>(&'a self, legacy: &mut Legacy<'a>) {
        legacy.add("worker-link", self.link.as_fd());
        legacy.add("worker-pulse", self.pulse.as_fd());
    }

    /// One that this process has started when it was another program.
    pub fn inherited(inherited: &mut Inherited, pid: Pid) -> io::Result<Self> {
        let link = Link::inherited(inherited.file("worker-link")?);
        let pulse = Pulse::inherited(inherited.file("worker-pulse")?);
        // It is ours to wait for, so the number is still its own.
        let pidfd = Some(pidfd_open(pid, PidfdFlags::empty())?);
        Ok(Self { pid, pidfd, ended: None, pulse, link, nowhere: None })
    }

    /// Readable once it has ended; none if it had when we came.
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_pid().cast_unsigned()
    }

    /// Whether another supervisor has started it.
    pub fn is_of_another(&self) -> bool {
        self.nowhere.is_some()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.look(WaitIdOptions::NOHANG)?;
        Ok(self.ended)
    }

    /// Whether [`Child::ended`] has said that it has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> io::Result<()> {
        while self.ended.is_none() {
            self.look(WaitIdOptions::empty())?;
        }
        Ok(())
    }

    /// Ends it at once, whatever it does.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Sends it a signal. One that has ended has no use for it.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match self.pidfd.as_ref().map(|pidfd| pidfd_send_signal(pidfd, signal)) {
            None | Some(Ok(()) | Err(Errno::SRCH)) => Ok(()),
            Some(Err(error)) => Err(error.into()),
        }
    }

    /// Has it stand still, and waits for a moment until it does. Only for one that is ours to wait for.
    pub fn halt(&self) -> io::Result<()> {
        self.signal(Signal::STOP)?;
        let Some(pidfd) = &self.pidfd else { return Ok(()) };
        // One that ends instead stays to be waited for.
        let states = WaitIdOptions::STOPPED | WaitIdOptions::EXITED;
        let options = states | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        let deadline = Instant::now() + HALT_LIMIT;
        while waitid(WaitId::PidFd(pidfd.as_fd()), options)?.is_none() {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            sleep(HALT_PERIOD);
        }
        Ok(())
    }

    /// Copies of the socket that it has at `path`, and of its lock.
    pub fn listener(&self, path: &Path) -> io::Result<(OwnedFd, OwnedFd)> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let pidfd = self.pidfd.as_ref().ok_or_else(gone)?;
        let (mut socket, mut lock) = (None, None);
        for entry in fs::read_dir(format!("/proc/{}/fd", self.pid()))? {
            let number = entry?.file_name().to_str().and_then(|name| name.parse().ok());
            let number = number.ok_or(io::ErrorKind::InvalidData)?;
            let file = match pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty()) {
                // It has been closed since.
                Err(Errno::BADF) => continue,
                file => file?,
            };
            if socket::listens_at(&file, path) {
                socket = Some(file);
            } else if socket::is_lock_of(&file, path) {
                lock = Some(file);
            }
        }
        socket.zip(lock).ok_or_else(gone)
    }

    /// Lets it go on.
    pub fn resume(&self) -> io::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Looks whether it has ended.
    fn look(&mut self, options: WaitIdOptions) -> io::Result<()> {
        let Some(pidfd) = self.pidfd.as_ref().filter(|_| self.ended.is_none()) else {
            return Ok(());
        };
        match waitid(WaitId::PidFd(pidfd.as_fd()), options | WaitIdOptions::EXITED) {
            Ok(status) => self.ended = status.as_ref().map(exit_status),
            // It is not ours to wait for.
            Err(Errno::CHILD) => {
                let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
                let limit = if options.contains(WaitIdOptions::NOHANG) {
                    Timespec::default()
                } else {
                    LOOK_PERIOD
                };
                if poll(&mut fds, Some(&limit)) == Ok(1) {
                    self.ended = Some(unknown_end());
                }
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

/// The same as the standard library has it.
fn exit_status(status: &WaitIdStatus) -> ExitStatus {
    let signal = status.terminating_signal();
    let raw = signal.or_else(|| status.exit_status().map(|code| code << 8)).unwrap_or_default();
    ExitStatus::from_raw(raw)
}

/// The name of a process.
fn name_of(pid: Pid) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_pid())).ok()?;
    Some(name.trim_end().to_owned())
}

/// The process that has started another.
pub fn parent_of(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).ok()?;
    // Behind the name, which may hold anything.
    let parent = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?;
    Pid::from_raw(parent.parse().ok()?)
}

/// Only its parent could learn how a process ended. Usually we have killed it.
fn unknown_end() -> ExitStatus {
    ExitStatus::from_raw(libc::SIGKILL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hold;

    fn start(script: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Child::start(command, Legacy::default()).unwrap()
    }

    #[test]
    fn its_end_is_told_as_it_was() {
        for (script, expected) in
            [("exit 3", "exit status: 3"), ("kill -9 $$", "signal: 9 (SIGKILL)")]
        {
            let mut child = start(script);
            child.wait().unwrap();
            assert!(child.has_ended() && !child.is_of_another());
            assert_eq!(child.ended().unwrap().unwrap().to_string(), expected);
            // There is nobody any more who could get the signal.
            child.kill().unwrap();
        }
        let mut child = start("exec sleep 1000");
        assert_eq!(child.ended().unwrap(), None);
        child.halt().unwrap();
        assert_eq!(child.ended().unwrap(), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn one_of_another_is_seen_to_end_and_one_that_had_ended_is_known_to() {
        // The shell has started it, and goes before it does.
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 >&- 2>&- & echo $!"]);
        let output = command.output().unwrap().stdout;
        let pid = str::from_utf8(&output).unwrap().trim().parse().ok().and_then(Pid::from_raw);
        // It has the shell's name until it runs its program.
        let is_asleep = || name_of(pid.unwrap()).filter(|name| name == "sleep").ok_or(());
        hold::take(is_asleep, |()| true).unwrap();
        let mut other = Child::of_another(pid.unwrap(), "sleep").unwrap();
        assert!(other.is_of_another() && other.ended().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
        let mut dead = start("exit 0");
        dead.wait().unwrap();
        let gone = Pid::from_raw(dead.pid().cast_signed()).unwrap();
        let mut dead = Child::of_another(gone, "sh").unwrap();
        assert!(dead.has_ended() && dead.ended().unwrap().is_some() && dead.pidfd().is_none());
        dead.kill().unwrap();
        // A number that is another's by now is not taken for it.
        let ours = rustix::process::getpid();
        assert!(Child::of_another(ours, "tmem-worker").unwrap().has_ended());
    }

    #[test]
    fn parents_are_known() {
        assert_eq!(parent_of(rustix::process::getpid()), rustix::process::getppid());
    }
}
