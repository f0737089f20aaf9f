//! A worker's io_uring, and the connections whose buffers the kernel works on.
//!
//! A [`Link`] owns its socket and its buffers, and knows what the kernel is doing with them: while it
//! receives or sends, nobody else looks at them, but for what is behind the bytes that are being sent, and a link is not dropped. Nothing here
//! allocates after a ring is made. This is the only file of the front end with `unsafe`.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use tmem::{Backed, Image};

use super::exports::Export;
use super::kernel::KernelClient;
use super::protocol::Protocol;
use crate::backing::Fetches;
use crate::process;
use crate::uring::Uring;

/// What a completion is of: a link's slot and what was done, or one of these.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Token {
    /// A read of the backing file, by its number.
    Fetch(usize),
    /// Nothing that anybody waits for.
    Ignored,
    Receive(usize),
    Send(usize),
    /// The supply thread was woken, or not.
    Supply,
    /// The eventfd that is watched was written to.
    Woken,
    /// The thread that writes to the backing file was woken, or not.
    Writeback,
}

const IGNORED: u64 = 0;
const WOKEN: u64 = 1;
const RECEIVE: u64 = 2;
const SEND: u64 = 3;
const SUPPLY: u64 = 4;
const FETCH: u64 = 5;
const WRITEBACK: u64 = 6;
const KIND_BITS: u32 = 3;

impl Token {
    fn pack(self) -> u64 {
        let (slot, kind) = match self {
            Token::Fetch(read) => (read, FETCH),
            Token::Ignored => (0, IGNORED),
            Token::Receive(slot) => (slot, RECEIVE),
            Token::Send(slot) => (slot, SEND),
            Token::Supply => (0, SUPPLY),
            Token::Woken => (0, WOKEN),
            Token::Writeback => (0, WRITEBACK),
        };
        (slot as u64) << KIND_BITS | kind
    }

    fn unpack(data: u64) -> Self {
        let slot = (data >> KIND_BITS) as usize;
        match data & ((1 << KIND_BITS) - 1) {
            FETCH => Token::Fetch(slot),
            RECEIVE => Token::Receive(slot),
            SEND => Token::Send(slot),
            SUPPLY => Token::Supply,
            WOKEN => Token::Woken,
            WRITEBACK => Token::Writeback,
            _ => Token::Ignored,
        }
    }
}

/// See the module's description.
pub struct Ring {
    uring: Uring,
}

impl Ring {
    /// A ring that has so many entries. Only the thread that makes it may use it.
    pub fn new(entries: u32) -> io::Result<Self> {
        Ok(Self { uring: Uring::new(entries)? })
    }

    /// Queues a write that wakes whoever polls `eventfd`: [`Uring::signal`].
    pub fn signal(&mut self, eventfd: RawFd, token: Token) {
        self.uring.signal(eventfd, token.pack());
    }

    /// Asks to be told once when `eventfd` is written to.
    pub fn watch(&mut self, eventfd: RawFd) {
        self.uring.watch(eventfd, Token::Woken.pack());
    }

    /// Queues a read of the backing file, or the rest of one that did a part.
    pub fn fetch<W: Copy + Eq>(&mut self, fetches: &Fetches<W>, read: usize) {
        // SAFETY: they keep the memory until they are told of the completion, which is of what this thread has
        // taken from the ring; and where that never comes, for ever.
        unsafe { self.push(fetches.entry(read), Token::Fetch(read)) };
    }

    /// Cancels what is under way on a link: it completes soon, if it has not.
    pub fn cancel(&mut self, token: Token) {
        self.uring.cancel(token.pack(), Token::Ignored.pack());
    }

    /// Submits what is queued, and waits for a completion, but not longer than `limit`.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.uring.wait(limit)
    }

    /// Takes a completion.
    pub fn completed(&mut self) -> Option<(Token, i32)> {
        let (user_data, result) = self.uring.completed()?;
        Some((Token::unpack(user_data), result))
    }

    /// # Safety
    ///
    /// As for [`Uring::push`].
    unsafe fn push(&mut self, entry: Entry, token: Token) {
        // SAFETY: the caller's promise is the same.
        unsafe { self.uring.push(entry, token.pack()) };
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
    /// Who has to be given another when it ends.
    pub kernel: Option<(KernelClient, Arc<Export>)>,
}

impl Link {
    /// A link on a connected socket that blocks: io_uring hands back what would block otherwise.
    pub fn new(stream: OwnedFd, protocol: Protocol, worker: usize, since: Instant) -> Self {
        Self { stream, protocol, receiving: false, sending: false, since, worker, kernel: None }
    }

    /// Whether the kernel works on it, or reads the backing file for it.
    pub fn is_busy(&self) -> bool {
        self.receiving || self.sending || self.protocol.is_reading()
    }

    /// Whether the kernel sends what is in the outbox.
    pub fn is_sending(&self) -> bool {
        self.sending
    }

    /// Whether the client gets more without saying more: what is being sent, or waits for the backing file.
    pub fn has_answers(&self) -> bool {
        self.sending || self.protocol.is_reading()
    }

    /// The protocol, while the kernel does not work on its buffers and it can go on.
    pub fn protocol(&mut self) -> Option<&mut Protocol> {
        let goes_on = !self.receiving && !self.sending && !self.protocol.is_waiting();
        goes_on.then_some(&mut self.protocol)
    }

    /// The next page that it wants from the backing file: [`Protocol::next_want`].
    pub fn next_want(&mut self) -> Option<(usize, Backed)> {
        self.protocol.next_want()
    }

    /// A page that it wanted has landed: [`Protocol::landed`], which fills what is not being sent.
    pub fn landed(
        &mut self,
        want: usize,
        image: Option<Image<'_>>,
        took: Duration,
    ) -> Option<Backed> {
        self.protocol.landed(want, image, took)
    }

    /// A page that it wanted is not read, because the connection ends.
    pub fn give_up(&mut self, want: usize) {
        self.protocol.give_up(want);
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
        // to `received`, `receiving` keeps `protocol` from anybody, what is done with it here (`landed`, `sent`, `give_up`) does not
        // touch the inbox, and drop ends the process.
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
        // SAFETY: as in `receive`, for the outbox, which the kernel only reads. Here it is touched, but not these bytes: what
        // lands is written where the outbox is held back or appended to, behind all that may be sent, and it moves
        // nothing while bytes are unsent.
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
            self.protocol.deliver();
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
        for token in [
            Token::Fetch(63),
            Token::Ignored,
            Token::Supply,
            Token::Woken,
            Token::Writeback,
            Token::Receive(63),
            Token::Send(63),
        ] {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
