//! A process that has the kernel run a probe's program, for as long as another process wants it to.
//!
//! When whoever has a probe ends, the kernel takes it out of its function, for which it takes locks of its own and waits until no
//! processor can be in there. A process that serves swap must not wait for that when it dies: until it is dead no other goes on in its
//! place, and whoever has these locks may wait for a page. So the probe is another process's, which nobody waits for. It has a
//! socket to the one that wants it, and ends when the other end is closed, by whatever.

use std::env;
use std::ffi::{CStr, CString, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::stdio::{stdin, stdout};

use super::{FreedError, bpf};
use crate::{inherited, process};

/// The first argument of a process that is to [`run`].
pub const OBSERVER: &str = "observer";

/// The program that we are, whatever has its name by now.
const OURSELVES: &str = "/proc/self/exe";

/// Where the kernel says what number kprobes have among events.
pub(super) const KPROBE_TYPE: &str = "/sys/bus/event_source/devices/kprobe/type";

/// How long it may take until it listens. There may be no memory, and it goes on without.
const BEGIN_LIMIT: Duration = Duration::from_secs(10);

/// How long is waited for its end, which nothing depends on.
const END_LIMIT: Duration = Duration::from_secs(5);
const END_PERIOD: Duration = Duration::from_millis(10);

/// The process, as who wants it has it. Ends it when dropped, which may take as long as [`END_LIMIT`].
#[derive(Debug)]
pub struct Observer {
    process: Child,
    /// None only while it is dropped.
    socket: Option<UnixStream>,
}

impl Observer {
    /// Has the program run from now on, whenever the kernel frees slots.
    pub(super) fn start(program: OwnedFd, function: &CStr) -> Result<Self, FreedError> {
        let kind = fs::read_to_string(KPROBE_TYPE);
        let kind = kind.map_err(|source| FreedError::NoProbes { source })?;
        let failed = |source| FreedError::Failed { what: "start a process that observes", source };
        let (socket, its_socket) = UnixStream::pair().map_err(failed)?;
        socket.set_read_timeout(Some(BEGIN_LIMIT)).map_err(failed)?;
        let name = env::args_os().next().unwrap_or_else(|| "tmem".into());
        let mut command = Command::new(OURSELVES);
        // What interrupts others from a terminal is not for it.
        command
            .arg0(name)
            .args([OBSERVER, kind.trim(), &function.to_string_lossy()])
            .process_group(0);
        command.stdin(program).stdout(OwnedFd::from(its_socket));
        let process = command.spawn().map_err(failed)?;
        // It has its ends of what it was given, and ours would keep it from seeing that we are gone.
        drop(command);
        let mut observer = Self { process, socket: Some(socket) };
        match observer.outcome().map_err(failed)? {
            0 => Ok(observer),
            errno => {
                let what = "listen where the kernel frees swap slots";
                let source = io::Error::from_raw_os_error(errno);
                Err(FreedError::of(what, "CAP_PERFMON, or CAP_SYS_ADMIN", source))
            }
        }
    }

    /// Waits until it listens: 0, or the number of the error for which it does not.
    fn outcome(&mut self) -> io::Result<i32> {
        let mut errno = [0; 4];
        let socket = self.socket.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        socket.read_exact(&mut errno)?;
        Ok(i32::from_le_bytes(errno))
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.socket = None;
        let deadline = Instant::now() + END_LIMIT;
        // One that has not ended by then is left alone: it will, and holds nothing of ours.
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < deadline {
            sleep(END_PERIOD);
        }
    }
}

/// The life of the process: with the program as its standard input, and the socket as its standard output.
pub fn run(mut args: impl Iterator<Item = OsString>) {
    process::block_signals();
    inherited::close_all();
    let mut socket = match stdout().try_clone_to_owned() {
        Ok(socket) => UnixStream::from(socket),
        Err(_) => return,
    };
    let event = listen(args.next(), args.next());
    let errno = event.as_ref().err().map_or(0, |e| e.raw_os_error().unwrap_or(libc::EIO));
    if socket.write_all(&errno.to_le_bytes()).is_err() || errno != 0 {
        return;
    }
    // Nothing comes but the end.
    let _ = io::copy(&mut socket, &mut io::sink());
}

fn listen(kind: Option<OsString>, function: Option<OsString>) -> io::Result<OwnedFd> {
    let kind = kind.and_then(|kind| kind.to_str()?.parse().ok());
    let function = function.and_then(|function| CString::new(function.into_encoded_bytes()).ok());
    let (kind, function) = kind.zip(function).ok_or(io::ErrorKind::InvalidInput)?;
    let event = bpf::open_probe(kind, &function)?;
    bpf::attach(event.as_fd(), stdin())?;
    Ok(event)
}
