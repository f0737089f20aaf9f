//! How the supervisor and its workers talk: whole messages over a pair of sockets.
//!
//! Nobody waits for the other side for long: what it has no room for, because it is stopped or stuck, is
//! not sent, and the sender is told.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::RunConfig;
use crate::exit::Failure;

/// Longest message, in bytes.
const MESSAGE_MAX: usize = 64 << 10;

/// How long to wait for room, for messages that matter.
const ROOM_LIMIT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// What a worker is told.
#[derive(Debug, Deserialize, Serialize)]
pub enum Order {
    /// Serve this. It is the first that a worker is told.
    Serve(Box<RunConfig>),
    /// Take all out of use and end, or try that again now.
    Stop,
    /// How the upgrade ended: why the old program goes on, if it does.
    Upgraded(Option<Failure>),
}

/// What a worker tells.
#[derive(Debug, Deserialize, Serialize)]
pub enum News {
    /// A standby has all at hand to go on when the worker dies.
    Prepared,
    /// It has done that, and is the worker now.
    TookOver {
        /// How long it took.
        took: Duration,
    },
    /// There are other devices than there were.
    Changed,
    /// Somebody wants another process to go on, of the program that has our name by now.
    Upgrade,
    /// A device that was asked for at the start is there.
    Added {
        /// Its name.
        name: String,
        /// Where it is reached.
        path: String,
        /// Its size.
        bytes: u64,
    },
    /// All of them are.
    Ready {
        /// How many.
        devices: usize,
    },
    /// It has begun to stop, told to or not.
    Stopping,
    /// What there is to say of it.
    Status(String),
    /// So many bytes are still swapped to its devices. Told now and then while it stops.
    Left(u64),
    /// Nothing is in use any more, and it ends now.
    Stopped(Option<Failure>),
}

/// One end of the pair.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
}

/// What was received.
#[derive(Debug)]
pub enum Received<T> {
    /// A message.
    Message(T),
    /// There is nothing now.
    Nothing,
    /// The other side is gone, and there will be nothing more.
    Closed,
}

impl Link {
    /// Both ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// The end that a process was started with.
    pub fn inherited(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends a message, if there is room for it soon.
    pub fn send(&self, message: &impl Serialize) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MESSAGE_MAX {
            return Err(Errno::MSGSIZE.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match send(&self.socket, &bytes, flags) {
            Err(Errno::AGAIN) => {
                poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&ROOM_LIMIT))?;
                send(&self.socket, &bytes, flags)?;
            }
            sent => drop(sent?),
        }
        Ok(())
    }

    /// Takes the next message, if there is one.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Received<T>> {
        // Not from the heap, which would ask the kernel for as much each time.
        let mut buffer = [0; MESSAGE_MAX];
        let received = recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT);
        match received.map(|(_, length)| length) {
            Ok(0) | Err(Errno::CONNRESET) => Ok(Received::Closed),
            Ok(length) => Ok(Received::Message(serde_json::from_slice(&buffer[..length])?)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Received::Nothing),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for the next message, but not longer than `limit`.
    pub fn wait<T: DeserializeOwned>(&self, limit: Duration) -> io::Result<Received<T>> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => self.receive(),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_whole_and_an_end_is_seen_after_the_last() {
        let (supervisor, worker) = Link::pair().unwrap();
        assert!(matches!(supervisor.receive::<News>().unwrap(), Received::Nothing));
        worker.send(&News::Ready { devices: 2 }).unwrap();
        worker.send(&News::Status("x".into())).unwrap();
        drop(worker);
        let next = || supervisor.wait::<News>(Duration::from_secs(5)).unwrap();
        assert!(matches!(next(), Received::Message(News::Ready { devices: 2 })));
        assert!(matches!(next(), Received::Message(News::Status(_))));
        assert!(matches!(next(), Received::Closed));
        assert!(supervisor.send(&Order::Stop).is_err());
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let (_supervisor, worker) = Link::pair().unwrap();
        worker.send(&News::Status("x".repeat(MESSAGE_MAX))).unwrap_err();
    }
}
