//! A worker's io_uring, and the connections whose buffers the kernel works on.
//!
//! A [`Link`] owns its socket and its buffers, and knows what the kernel is doing with them: while it
//! receives or sends, nobody else can look at them, and a link is not dropped. Nothing here
//! allocates after a ring is made. This is the only file of the front end with `unsafe`.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;

use super::protocol::Protocol;
use crate::process;

/// What a completion is of: a link's slot and what was done, or one of these.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Token {
    /// Nothing that anybody waits for.
    Ignored,
    Receive(usize),
    Send(usize),
    /// The supply thread was woken, or not.
    Supply,
    /// The eventfd that is watched was written to.
    Woken,
}

const IGNORED: u64 = 0;
const WOKEN: u64 = 1;
const RECEIVE: u64 = 2;
const SEND: u64 = 3;
const SUPPLY: u64 = 4;
const KIND_BITS: u32 = 3;

impl Token {
    fn pack(self) -> u64 {
        let (slot, kind) = match self {
            Token::Ignored => (0, IGNORED),
            Token::Receive(slot) => (slot, RECEIVE),
            Token::Send(slot) => (slot, SEND),
            Token::Supply => (0, SUPPLY),
            Token::Woken => (0, WOKEN),
        };
        (slot as u64) << KIND_BITS | kind
    }

    fn unpack(data: u64) -> Self {
        let slot = (data >> KIND_BITS) as usize;
        match data & ((1 << KIND_BITS) - 1) {
            RECEIVE => Token::Receive(slot),
            SEND => Token::Send(slot),
            SUPPLY => Token::Supply,
            WOKEN => Token::Woken,
            _ => Token::Ignored,
        }
    }
}

/// What [`Ring::signal`] writes; an eventfd adds it to its count.
static ONE: u64 = 1;

/// See the module's description.
pub struct Ring {
    uring: IoUring,
}

impl Ring {
    /// A ring that has so many entries. Only the thread that makes it may use it.
    pub fn new(entries: u32) -> io::Result<Self> {
        // Completions are run when the thread asks for them and never interrupt a put.
        let modern = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            // Or who does not wait would not see that they are there to be run.
            .setup_taskrun_flag()
            .build(entries);
        let uring = match modern {
            // Linux before 6.1.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(entries)?,
            result => result?,
        };
        // To wait with a time limit.
        if !uring.params().is_feature_ext_arg() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { uring })
    }

    /// Queues a write that wakes whoever polls `eventfd`, which must be non-blocking. It leaves with
    /// the next [`Ring::wait`].
    pub fn signal(&mut self, eventfd: RawFd, token: Token) {
        let ptr = (&raw const ONE).cast::<u8>();
        let write = opcode::Write::new(types::Fd(eventfd), ptr, size_of_val(&ONE) as u32);
        // SAFETY: ONE is a static that is never written, so the kernel may read it at any time.
        unsafe { self.push(write.build(), token) };
    }

    /// Asks to be told once when `eventfd` is written to.
    pub fn watch(&mut self, eventfd: RawFd) {
        let poll = opcode::PollAdd::new(types::Fd(eventfd), libc::POLLIN as u32);
        // SAFETY: a poll works on no memory.
        unsafe { self.push(poll.build(), Token::Woken) };
    }

    /// Cancels what is under way on a link: it completes soon, if it has not.
    pub fn cancel(&mut self, token: Token) {
        let cancel = opcode::AsyncCancel::new(token.pack());
        // SAFETY: a cancellation works on no memory.
        unsafe { self.push(cancel.build(), Token::Ignored) };
    }

    /// Submits what is queued, and waits for a completion, but not longer than `limit`.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        let result = match limit {
            None => self.uring.submit_and_wait(1),
            Some(Duration::ZERO) => self.uring.submit_and_wait(0),
            Some(limit) => {
                let limit = types::Timespec::from(limit);
                let args = types::SubmitArgs::new().timespec(&limit);
                self.uring.submitter().submit_with_args(1, &args)
            }
        };
        match result {
            // Being traced or stopped, and sleep, interrupt a wait; the kernel may want its
            // completions taken first; or the time is over.
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::INTR | Errno::AGAIN | Errno::BUSY | Errno::TIME) => Ok(()),
                _ => Err(error),
            },
            Ok(_) => Ok(()),
        }
    }

    /// Takes a completion.
    pub fn completed(&mut self) -> Option<(Token, i32)> {
        let entry = self.uring.completion().next()?;
        Some((Token::unpack(entry.user_data()), entry.result()))
    }

    /// # Safety
    ///
    /// What the entry points at stays there, and is not used otherwise than the kernel's use allows,
    /// until it has completed.
    unsafe fn push(&mut self, entry: Entry, token: Token) {
        let entry = entry.user_data(token.pack());
        loop {
            // SAFETY: the caller's promise is the same.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                return;
            }
            // The ring has an entry for all that can be queued at a time, so this is rare.
            if let Err(error) = self.wait(Some(Duration::ZERO)) {
                process::fatal(format_args!("io_uring failed: {error}"));
            }
        }
    }
}

/// A connection: see the module's description.
pub struct Link {
    stream: OwnedFd,
    protocol: Protocol,
    receiving: bool,
    sending: bool,
    /// When it was accepted.
    pub since: Instant,
    /// The worker that serves it.
    pub worker: usize,
}

impl Link {
    /// A link on a connected socket that blocks: io_uring hands back what would block otherwise.
    pub fn new(stream: OwnedFd, protocol: Protocol, worker: usize, since: Instant) -> Self {
        Self { stream, protocol, receiving: false, sending: false, since, worker }
    }

    /// Whether the kernel works on it.
    pub fn is_busy(&self) -> bool {
        self.receiving || self.sending
    }

    /// Whether the kernel sends what is in the outbox.
    pub fn is_sending(&self) -> bool {
        self.sending
    }

    /// The protocol, while the kernel does not work on its buffers.
    pub fn protocol(&mut self) -> Option<&mut Protocol> {
        (!self.is_busy()).then_some(&mut self.protocol)
    }

    /// Whether the client has not chosen an export yet.
    pub fn is_negotiating(&self) -> bool {
        self.protocol.is_negotiating()
    }

    /// Asks the kernel for what the client says next. Must not be receiving.
    pub fn receive(&mut self, ring: &mut Ring, slot: usize) {
        assert!(!self.receiving, "a link receives one thing at a time");
        let room = self.protocol.inbox.room();
        assert!(!room.is_empty(), "a protocol is hungry with a full inbox");
        let fd = types::Fd(self.stream.as_raw_fd());
        let receive = opcode::Recv::new(fd, room.as_mut_ptr(), room.len() as u32);
        self.receiving = true;
        // SAFETY: the room is heap memory that belongs to this link. Until the completion is handed
        // to `received`, `receiving` keeps `protocol` from anybody, nothing here touches the inbox,
        // and drop ends the process.
        unsafe { ring.push(receive.build(), Token::Receive(slot)) };
    }

    /// Asks the kernel to send what is in the outbox. Must not be sending.
    pub fn send(&mut self, ring: &mut Ring, slot: usize) {
        assert!(!self.sending, "a link sends one thing at a time");
        let unsent = self.protocol.outbox.unsent();
        let fd = types::Fd(self.stream.as_raw_fd());
        let send = opcode::Send::new(fd, unsent.as_ptr(), unsent.len() as u32);
        self.sending = true;
        let send = send.flags(libc::MSG_NOSIGNAL).build();
        // SAFETY: as in `receive`, for the outbox, which the kernel only reads.
        unsafe { ring.push(send, Token::Send(slot)) };
    }

    /// Takes the result of a receive.
    pub fn received(&mut self, result: i32) -> Outcome {
        assert!(std::mem::take(&mut self.receiving), "received without asking");
        if result > 0 {
            self.protocol.inbox.filled(result as usize);
        }
        Outcome::of(result)
    }

    /// Takes the result of a send.
    pub fn sent(&mut self, result: i32) -> Outcome {
        assert!(std::mem::take(&mut self.sending), "sent without asking");
        if result > 0 {
            self.protocol.outbox.sent(result as usize);
        }
        Outcome::of(result)
    }

    /// Whether something is to be sent still. Must not be sending.
    pub fn has_unsent(&self) -> bool {
        assert!(!self.sending, "what is being sent is not looked at");
        !self.protocol.outbox.is_empty()
    }

    /// Cancels whatever the kernel does.
    pub fn cancel(&self, ring: &mut Ring, slot: usize) {
        if self.receiving {
            ring.cancel(Token::Receive(slot));
        }
        if self.sending {
            ring.cancel(Token::Send(slot));
        }
    }
}

/// What a result says of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It goes on.
    Done,
    /// The system lacked something: it should be tried again, a little later. (A cancellation that
    /// nobody asked for is one of a kernel that could not get a thread for it.)
    Later,
    /// The connection is over.
    Over,
}

impl Outcome {
    fn of(result: i32) -> Self {
        const PASSING: [i32; 5] =
            [libc::EINTR, libc::EAGAIN, libc::ENOMEM, libc::ENOBUFS, libc::ECANCELED];
        match result {
            1.. => Outcome::Done,
            _ if PASSING.contains(&-result) => Outcome::Later,
            _ => Outcome::Over,
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.is_busy() {
            process::fatal(format_args!("a connection was dropped while the kernel worked on it"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_packing() {
        for token in
            [Token::Ignored, Token::Supply, Token::Woken, Token::Receive(63), Token::Send(63)]
        {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }

    #[test]
    fn what_came_is_seen_without_waiting_for_it() {
        let mut ring = Ring::new(8).unwrap();
        let flags = rustix::event::EventfdFlags::NONBLOCK;
        let eventfd = rustix::event::eventfd(0, flags).unwrap();
        ring.watch(eventfd.as_raw_fd());
        ring.wait(Some(Duration::ZERO)).unwrap();
        assert_eq!(ring.completed(), None);
        rustix::io::write(&eventfd, &1_u64.to_le_bytes()).unwrap();
        let seen = (0..1000).find_map(|_| {
            ring.wait(Some(Duration::ZERO)).unwrap();
            ring.completed()
        });
        assert_eq!(seen.map(|(token, _)| token), Some(Token::Woken));
    }

    #[test]
    fn a_wait_ends_in_time_and_with_a_signal() {
        let mut ring = Ring::new(8).unwrap();
        ring.wait(Some(Duration::from_millis(1))).unwrap();
        assert_eq!(ring.completed(), None);
        let flags = rustix::event::EventfdFlags::NONBLOCK;
        let eventfd = rustix::event::eventfd(0, flags).unwrap();
        ring.watch(eventfd.as_raw_fd());
        ring.signal(eventfd.as_raw_fd(), Token::Supply);
        let mut seen = Vec::new();
        while seen.len() < 2 {
            ring.wait(None).unwrap();
            seen.extend(std::iter::from_fn(|| ring.completed()).map(|(token, _)| token));
        }
        assert!(seen.contains(&Token::Woken) && seen.contains(&Token::Supply), "{seen:?}");
    }
}
