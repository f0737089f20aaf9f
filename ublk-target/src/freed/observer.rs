//! A process that has the kernel run a probe's program, and keeps the marks, for as long as somebody wants it to.
//!
//! When whoever has a probe ends, the kernel takes it out of its function, for which it takes locks of its own and waits until no
//! processor can be in there. A process that serves swap must not wait for that when it dies: until it is dead no other goes on in its
//! place, and whoever has these locks may wait for a page. So the probe is another process's, which nobody waits for, and who
//! goes on for a dead one has nothing done by the kernel: it asks the same process for the same marks.
//!
//! It is asked over a socket with a name of its own ("abstract": of no file system), and answers who runs as the same user. It ends when it is told to, or when
//! nobody has been connected for [`ALONE_LIMIT`].

use std::env;
use std::ffi::{CStr, CString, OsString};
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::MlockAllFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt,
};
use rustix::stdio::{stdin, stdout};

use super::{FreedError, bpf};
use crate::{inherited, process};

/// The first argument of a process that is to [`run`].
pub const OBSERVER: &str = "observer";

/// The program that we are, whatever has its name by now.
const OURSELVES: &str = "/proc/self/exe";

/// Where the kernel says what number kprobes have among events.
pub(super) const KPROBE_TYPE: &str = "/sys/bus/event_source/devices/kprobe/type";

/// How long it may take until it observes, or answers. There may be no memory, and it goes on without.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How long is waited for its end, which nothing depends on.
const END_LIMIT: Duration = Duration::from_secs(5);
const END_PERIOD: Duration = Duration::from_millis(10);

/// How long it goes on with nobody connected: who goes on for a dead process asks for it once I/O flows.
const ALONE_LIMIT: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// Who is connected at most. More than one there is only between a death and when that is seen.
const CONNECTIONS_MAX: usize = 4;

/// What comes with the marks: which form all of this has.
const FORM: [u8; 1] = [1];

/// What it is told when it is to end.
const END: [u8; 1] = [0];

/// The process, as who wants it has it. Ends it when dropped, which may take as long as [`END_LIMIT`].
#[derive(Debug)]
pub struct Observer {
    socket: UnixStream,
    /// Of who has started it.
    process: Option<Child>,
}

impl Observer {
    /// Has the program run from now on, whenever the kernel frees slots. `map` is where it marks them, and `name` for who goes
    /// on ([`Observer::of`]): no other has it.
    pub(super) fn start(
        program: OwnedFd,
        map: BorrowedFd<'_>,
        function: &CStr,
        name: &str,
    ) -> Result<Self, FreedError> {
        let kind = fs::read_to_string(KPROBE_TYPE);
        let kind = kind.map_err(|source| FreedError::NoProbes { source })?;
        let failed = |source| FreedError::Failed { what: "start a process that observes", source };
        let address = address(name).map_err(failed)?;
        let listener = UnixListener::bind_addr(&address).map_err(failed)?;
        // It waits there until it is accepted.
        let socket = connect(&address).map_err(failed)?;
        send_map(&socket, map).map_err(failed)?;
        let own_name = env::args_os().next().unwrap_or_else(|| "tmem".into());
        let mut command = Command::new(OURSELVES);
        // What interrupts others from a terminal is not for it.
        command
            .arg0(own_name)
            .args([OBSERVER, kind.trim(), &function.to_string_lossy()])
            .process_group(0);
        command.stdin(program).stdout(OwnedFd::from(listener));
        let process = command.spawn().map_err(failed)?;
        // It has its ends of what it was given.
        drop(command);
        let mut observer = Self { socket, process: Some(process) };
        match observer.outcome().map_err(failed)? {
            0 => Ok(observer),
            errno => {
                let what = "listen where the kernel frees swap slots";
                let source = io::Error::from_raw_os_error(errno);
                Err(FreedError::of(what, "CAP_PERFMON, or CAP_SYS_ADMIN", source))
            }
        }
    }

    /// The one that another process has started by that name, and where it has slots marked.
    pub(super) fn of(name: &str) -> Result<(Self, OwnedFd), FreedError> {
        let ask = || {
            let socket = connect(&address(name)?)?;
            let map = receive_map(&socket)?;
            Ok((Self { socket, process: None }, map))
        };
        let what = "ask the process that observes since before this one";
        ask().map_err(|source| FreedError::Failed { what, source })
    }

    /// Waits until it observes: 0, or the number of the error for which it does not.
    fn outcome(&mut self) -> io::Result<i32> {
        let mut errno = [0; 4];
        self.socket.read_exact(&mut errno)?;
        Ok(i32::from_le_bytes(errno))
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        let deadline = Instant::now() + END_LIMIT;
        // The connection ends with it.
        let told = self.socket.set_read_timeout(Some(END_LIMIT));
        if told.and_then(|()| self.socket.write_all(&END)).is_ok() {
            let _ = self.socket.read(&mut [0]);
        }
        let Some(process) = &mut self.process else { return };
        // One that has not ended by then is left alone: it will, and holds nothing of ours.
        while matches!(process.try_wait(), Ok(None)) && Instant::now() < deadline {
            sleep(END_PERIOD);
        }
    }
}

/// The life of the process: with the program as its standard input, and the socket where it is asked as its standard output.
pub fn run(mut args: impl Iterator<Item = OsString>) {
    process::block_signals();
    inherited::close_all();
    // It would have to wait for its own pages, and with it who asks it.
    let _ = rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE);
    let Ok(listener) = stdout().try_clone_to_owned().map(UnixListener::from) else { return };
    let Ok((mut first, map)) = first_connection(&listener) else { return };
    let event = observe(args.next(), args.next());
    let errno = event.as_ref().err().map_or(0, |e| e.raw_os_error().unwrap_or(libc::EIO));
    if first.write_all(&errno.to_le_bytes()).is_ok() && errno == 0 {
        serve(&listener, first, map.as_fd(), ALONE_LIMIT);
    }
}

fn observe(kind: Option<OsString>, function: Option<OsString>) -> io::Result<OwnedFd> {
    let kind = kind.and_then(|kind| kind.to_str()?.parse().ok());
    let function = function.and_then(|function| CString::new(function.into_encoded_bytes()).ok());
    let (kind, function) = kind.zip(function).ok_or(io::ErrorKind::InvalidInput)?;
    let event = bpf::open_probe(kind, &function)?;
    bpf::attach(event.as_fd(), stdin())?;
    Ok(event)
}

/// Who has started it, and the map that comes from there.
fn first_connection(listener: &UnixListener) -> io::Result<(UnixStream, OwnedFd)> {
    loop {
        let (socket, _) = listener.accept()?;
        if is_ours(&socket) {
            socket.set_read_timeout(Some(ANSWER_LIMIT))?;
            let map = receive_map(&socket)?;
            return Ok((socket, map));
        }
    }
}

/// Gives the map to all who ask for it, until there is nobody, or one says that it is enough.
fn serve(listener: &UnixListener, first: UnixStream, map: BorrowedFd<'_>, alone_limit: Timespec) {
    let mut sockets = vec![first];
    loop {
        let mut events: Vec<_> =
            sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        events.push(PollFd::new(listener, PollFlags::IN));
        let limit = sockets.is_empty().then_some(&alone_limit);
        match poll(&mut events, limit) {
            Ok(0) => return,
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
        }
        let ready: Vec<bool> = events.iter().map(|event| !event.revents().is_empty()).collect();
        let (comes, ready) = ready.split_last().expect("the listener is there");
        let mut said = ready.iter();
        let mut is_over = false;
        sockets.retain_mut(|socket| {
            if !said.next().expect("one for each") {
                return true;
            }
            // Whatever it says.
            let is_told = socket.read(&mut [0]).is_ok_and(|bytes| bytes > 0);
            is_over |= is_told;
            false
        });
        if is_over {
            return;
        }
        if *comes
            && let Ok((socket, _)) = listener.accept()
            && is_ours(&socket)
            && sockets.len() < CONNECTIONS_MAX
            && send_map(&socket, map).is_ok()
        {
            sockets.push(socket);
        }
    }
}

/// Whether who is at the other end runs as the same user.
fn is_ours(socket: &UnixStream) -> bool {
    sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}

fn address(name: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("tmem-{OBSERVER}-{name}"))
}

/// Anybody may have a name that is free.
fn connect(address: &SocketAddr) -> io::Result<UnixStream> {
    let socket = UnixStream::connect_addr(address)?;
    if !is_ours(&socket) {
        return Err(io::Error::other("another user's process has its name"));
    }
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    Ok(socket)
}

fn send_map(socket: &UnixStream, map: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let maps = [map];
    assert!(control.push(SendAncillaryMessage::ScmRights(&maps)), "there is space for one");
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(&FORM)], &mut control, flags)?;
    Ok(())
}

fn receive_map(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut form = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let bytes = [IoSliceMut::new(&mut form)];
    recvmsg(socket, &mut { bytes }, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut maps = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let map = maps.next().and_then(|mut files| files.next());
    match map {
        Some(map) if form == FORM => Ok(map),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it says something else")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::thread;

    fn ino(file: impl AsFd) -> u64 {
        let file = file.as_fd().try_clone_to_owned().unwrap();
        fs::File::from(file).metadata().unwrap().ino()
    }

    fn own_name(test: &str) -> String {
        format!("test-{}-{test}", std::process::id())
    }

    /// The life of the process, but for what the kernel has a part in.
    fn live(name: &str, alone_limit: Timespec) -> (UnixStream, fs::File, thread::JoinHandle<()>) {
        let address = address(name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let file = tempfile::tempfile().unwrap();
        let socket = connect(&address).unwrap();
        send_map(&socket, file.as_fd()).unwrap();
        let life = thread::spawn(move || {
            let (first, map) = first_connection(&listener).unwrap();
            serve(&listener, first, map.as_fd(), alone_limit);
        });
        (socket, file, life)
    }

    #[test]
    fn who_goes_on_gets_the_same_marks() {
        let name = own_name("same");
        let (first, file, life) = live(&name, ALONE_LIMIT);
        // While the first is still there, after it, and after another.
        let (second, map) = Observer::of(&name).unwrap();
        assert_eq!(ino(map), ino(&file));
        drop(first);
        second.socket.shutdown(std::net::Shutdown::Both).unwrap();
        let (third, map) = Observer::of(&name).unwrap();
        assert_eq!(ino(map), ino(&file));
        assert!(!life.is_finished());
        // It is told to end.
        drop(third);
        life.join().unwrap();
        assert!(matches!(Observer::of(&name), Err(FreedError::Failed { .. })));
    }

    #[test]
    fn it_does_not_go_on_for_nobody() {
        let (first, _, life) = live(&own_name("nobody"), Timespec { tv_sec: 0, tv_nsec: 1 });
        drop(first);
        life.join().unwrap();
    }

    #[test]
    fn what_is_no_map_is_not_taken() {
        let (a, b) = UnixStream::pair().unwrap();
        (&a).write_all(&FORM).unwrap();
        assert_eq!(receive_map(&b).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(a);
        assert_eq!(receive_map(&b).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
