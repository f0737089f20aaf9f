//! A process that has the kernel run a probe's program, and keeps the marks, for as long as somebody wants it to.
//!
//! When whoever has a probe ends, the kernel takes it out of its function, for which it takes locks of its own and waits until no
//! processor can be in there. A process that serves swap must not wait for that when it dies: until it is dead no other goes on in its
//! place, and whoever has these locks may wait for a page. So the probe is another process's, which nobody waits for, and who
//! goes on for a dead one has nothing done by the kernel: it asks the same process for the same marks.
//!
//! It is asked over a socket that has a name in the file system, of which whoever goes on is told by other means, and which is no other
//! observer's; it answers who runs as the same user. It ends when it is told to, or when nobody has been connected for [`ALONE_LIMIT`].

use std::env;
use std::ffi::{CStr, CString, OsString};
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::mm::MlockAllFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recvmsg, sendmsg,
    socket_with, sockopt,
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

/// How long it may take until it observes. There may be no memory, and it goes on without.
const BEGIN_LIMIT: Duration = Duration::from_secs(10);

/// How long it may take to answer: it has all that it needs.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// How long is waited for its end, which nothing depends on.
const END_LIMIT: Duration = Duration::from_secs(5);
const END_PERIOD: Duration = Duration::from_millis(10);

/// How long it goes on with nobody connected: who goes on for a dead process asks for it once I/O flows.
const ALONE_LIMIT: Duration = Duration::from_secs(60);

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
    path: PathBuf,
    /// Of who has started it.
    process: Option<Child>,
}

impl Observer {
    /// Has the program run from now on, whenever the kernel frees slots. `map` is where it marks them; who goes on asks for it at
    /// `path` ([`Observer::of`]).
    pub(super) fn start(
        program: OwnedFd,
        map: BorrowedFd<'_>,
        function: &CStr,
        path: &Path,
    ) -> Result<Self, FreedError> {
        let kind = fs::read_to_string(KPROBE_TYPE);
        let kind = kind.map_err(|source| FreedError::NoProbes { source })?;
        let failed = |source| FreedError::Failed { what: "start a process that observes", source };
        let listener = listen(path).map_err(failed)?;
        // It waits there until it is accepted.
        let socket = connect(path, BEGIN_LIMIT).map_err(failed)?;
        send_map(&socket, map).map_err(failed)?;
        let name = env::args_os().next().unwrap_or_else(|| "tmem".into());
        let mut command = Command::new(OURSELVES);
        // What interrupts others from a terminal is not for it, and it outlives those who read what we say.
        command
            .arg0(name)
            .args([OBSERVER, kind.trim(), &function.to_string_lossy()])
            .arg(path)
            .process_group(0)
            .stderr(Stdio::null());
        command.stdin(program).stdout(OwnedFd::from(listener));
        let process = command.spawn().map_err(failed)?;
        // It has its ends of what it was given.
        drop(command);
        let mut observer = Self { socket, path: path.to_owned(), process: Some(process) };
        match observer.outcome().map_err(failed)? {
            0 => Ok(observer),
            errno => {
                let what = "listen where the kernel frees swap slots";
                let source = io::Error::from_raw_os_error(errno);
                Err(FreedError::of(what, "CAP_PERFMON, or CAP_SYS_ADMIN", source))
            }
        }
    }

    /// The one that another process has started, if what it has marked can be taken.
    pub(super) fn of<T>(
        path: &Path,
        take: impl FnOnce(BorrowedFd<'_>) -> Result<T, FreedError>,
    ) -> Result<(Self, T), FreedError> {
        let ask = || {
            let socket = connect(path, ANSWER_LIMIT)?;
            let map = receive_map(&socket)?;
            Ok((socket, map))
        };
        let what = "ask the process that observes since before this one";
        let (socket, map) = ask().map_err(|source| FreedError::Failed { what, source })?;
        let taken = take(map.as_fd())?;
        Ok((Self { socket, path: path.to_owned(), process: None }, taken))
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
        // Its last act is to let go of the connection.
        let told = self.socket.set_read_timeout(Some(END_LIMIT));
        if told.and_then(|()| self.socket.write_all(&END)).is_ok() {
            let _ = self.socket.read(&mut [0]);
        }
        // One that was killed has left it there.
        let _ = fs::remove_file(&self.path);
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
        let last = serve(&listener, first, map.as_fd(), ALONE_LIMIT);
        if let Some(path) = args.next() {
            let _ = fs::remove_file(path);
        }
        // The kernel takes its time for that.
        drop(event);
        drop(last);
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
            socket.set_read_timeout(Some(BEGIN_LIMIT))?;
            let map = receive_map(&socket)?;
            return Ok((socket, map));
        }
    }
}

/// Gives the map to all who ask for it, until there has been nobody for so long, or one says that it is enough: that connection is
/// returned.
fn serve(
    listener: &UnixListener,
    first: UnixStream,
    map: BorrowedFd<'_>,
    alone_limit: Duration,
) -> Option<UnixStream> {
    let mut sockets = vec![first];
    let mut deadline = None;
    loop {
        let left = deadline.map(|deadline: Instant| deadline.duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return None;
        }
        let mut events: Vec<_> =
            sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        events.push(PollFd::new(listener, PollFlags::IN));
        let limit = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut events, limit.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => sleep(END_PERIOD),
        }
        let ready: Vec<bool> = events.iter().map(|event| !event.revents().is_empty()).collect();
        // From the last on, so that those before it stay where they are.
        for at in (0..sockets.len()).rev().filter(|&at| ready[at]) {
            let mut socket = sockets.remove(at);
            // Whatever it says.
            if socket.read(&mut [0]).is_ok_and(|bytes| bytes > 0) {
                return Some(socket);
            }
        }
        if ready[ready.len() - 1] {
            match listener.accept() {
                Ok((socket, _)) if is_ours(&socket) && send_map(&socket, map).is_ok() => {
                    // All but the last are dead, or will be.
                    sockets.truncate(CONNECTIONS_MAX - 1);
                    sockets.insert(0, socket);
                }
                Ok(_) => {}
                Err(_) => sleep(END_PERIOD),
            }
        }
        deadline = match sockets.is_empty() {
            true => deadline.or_else(|| Instant::now().checked_add(alone_limit)),
            false => None,
        };
    }
}

/// Whether who is at the other end runs as the same user.
fn is_ours(socket: &UnixStream) -> bool {
    sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Waits for nobody who has no time for it; what is asked then is waited for as long as that.
fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    let socket = UnixStream::from(socket);
    if !is_ours(&socket) {
        return Err(io::Error::other("it is another user's"));
    }
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(limit))?;
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
    let mut bytes = [IoSliceMut::new(&mut form)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    retry_on_intr(|| recvmsg(socket, &mut bytes, &mut control, flags))?;
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
    use std::thread::{self, JoinHandle};

    fn number_of(file: BorrowedFd<'_>) -> u64 {
        fs::File::from(file.try_clone_to_owned().unwrap()).metadata().unwrap().ino()
    }

    /// The life of a process, but for what the kernel has a part in.
    struct Life {
        folder: tempfile::TempDir,
        map: fs::File,
        thread: JoinHandle<bool>,
    }

    impl Life {
        fn begin(alone_limit: Duration) -> (Self, UnixStream) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("socket");
            let listener = listen(&path).unwrap();
            let map = tempfile::tempfile().unwrap();
            let socket = connect(&path, BEGIN_LIMIT).unwrap();
            send_map(&socket, map.as_fd()).unwrap();
            let thread = thread::spawn(move || {
                let (first, map) = first_connection(&listener).unwrap();
                serve(&listener, first, map.as_fd(), alone_limit).is_some()
            });
            (Self { folder, map, thread }, socket)
        }

        fn ask(&self) -> Result<Observer, FreedError> {
            let path = self.folder.path().join("socket");
            let (observer, number) = Observer::of(&path, |map| Ok(number_of(map)))?;
            assert_eq!(number, number_of(self.map.as_fd()));
            Ok(observer)
        }

        /// Whether it was told to.
        fn has_ended(self) -> bool {
            self.thread.join().unwrap()
        }
    }

    /// As the kernel closes what a dead process had.
    fn die(observer: &Observer) {
        observer.socket.shutdown(std::net::Shutdown::Both).unwrap();
    }

    #[test]
    fn who_goes_on_gets_the_same_marks() {
        let (life, first) = Life::begin(ALONE_LIMIT);
        // While another is still there, after it, and where nobody is.
        let second = life.ask().unwrap();
        drop(first);
        let third = life.ask().unwrap();
        die(&second);
        die(&third);
        let last = life.ask().unwrap();
        drop(last);
        assert!(life.ask().is_err());
        assert!(life.has_ended());
    }

    #[test]
    fn the_newest_is_served_however_many_there_are() {
        let (life, _first) = Life::begin(ALONE_LIMIT);
        let all: Vec<_> = (0..3 * CONNECTIONS_MAX).map(|_| life.ask().unwrap()).collect();
        all.iter().for_each(die);
        drop(life.ask().unwrap());
        assert!(life.has_ended());
    }

    #[test]
    fn it_does_not_go_on_for_nobody() {
        let (life, first) = Life::begin(Duration::from_nanos(1));
        drop(first);
        assert!(!life.has_ended());
    }

    #[test]
    fn who_cannot_take_the_marks_leaves_them() {
        let (life, _first) = Life::begin(ALONE_LIMIT);
        let path = life.folder.path().join("socket");
        let refused = |_: BorrowedFd<'_>| Err::<(), _>(FreedError::Unsupported { what: "this" });
        assert!(matches!(Observer::of(&path, refused), Err(FreedError::Unsupported { .. })));
        drop(life.ask().unwrap());
        assert!(life.has_ended());
    }

    #[test]
    fn a_socket_is_one_observers() {
        let (life, _first) = Life::begin(ALONE_LIMIT);
        let path = life.folder.path().join("socket");
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(life.ask().unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_map_is_not_taken() {
        let (a, b) = UnixStream::pair().unwrap();
        let refused = || receive_map(&b).unwrap_err().kind();
        (&a).write_all(&FORM).unwrap();
        assert_eq!(refused(), io::ErrorKind::InvalidData);
        // One that means something else by it.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let maps = [a.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&maps)));
        sendmsg(&a, &[IoSlice::new(&[9])], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(refused(), io::ErrorKind::InvalidData);
        drop(a);
        assert_eq!(refused(), io::ErrorKind::InvalidData);
    }
}
