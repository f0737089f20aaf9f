//! The transmission: requests and their replies, on one connection.
//!
//! Sans I/O: bytes come out of the inbox and go into the outbox, and where more of either is needed
//! it says so. Pages that are on the backing file it notes; what is in memory is got before that, once. A read is parked
//! until all its pages have landed, if there is room for it, and else the session goes on only then. Guarantees: a request is answered after it is effective, and
//! in the order in which they came but for what is parked; data that could not be read is never sent as if it had been; what one call does is
//! bounded by [`EFFORT`], whatever a request asks for, so that no client holds up the others.

mod reading;
mod storing;

use std::time::{Duration, Instant};

use rustix::io::Errno;
use tmem::{Backed, Image};
use zerocopy::FromBytes;

use self::reading::{Manner, Piece, Reading};
use self::storing::{Store, Storing};
use super::buffer::{DATA_BYTES, Inbox, Outbox};
use super::exports::{Export, Visit};
use super::negotiation::Agreement;
use super::parked::Parked;
use super::reply::{
    DATA_HEADER_BYTES, EXTENTS_MAX, REPLY_BYTES_MAX, chunk_header, flags_of, simple_reply,
};
use super::request::{Command, Request, Terms, Verdict, judge};
use super::wants::{Goal, Want, Wants};
use super::wire::{
    BASE_ALLOCATION_ID, Error, ErrorChunk, Extent, RequestHeader, SimpleReply, chunk,
};
use crate::bytes::{Part, Stored};
use crate::device::{self, Op, Outcome};

/// What one call of [`Session::advance`] may do, in pages read or written; a request costs one too.
const EFFORT: usize = 256;

/// What looking for the end of a run costs.
const RUN_EFFORT: usize = 4;

const _: () =
    assert!(DATA_HEADER_BYTES + DATA_BYTES + REPLY_BYTES_MAX <= super::buffer::BUFFER_BYTES);

/// Why a session cannot go on by itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Progress {
    /// Nothing: it has done enough for one call.
    Busy,
    /// The connection ends once everything is sent.
    End,
    /// Everything must be sent first.
    Flush,
    /// More must come in first.
    Hungry,
    /// Pages must be read from the backing file first, and land.
    Reading,
    /// A write waits for memory: call again soon.
    Starved,
}

/// A client and its export.
pub struct Session {
    visit: Visit,
    terms: Terms,
    doing: Doing,
    /// What a read waits for.
    piece: Option<Piece>,
    /// Since when no write has found memory.
    starving_since: Option<Instant>,
}

/// What is under way.
#[derive(Clone, Copy)]
enum Doing {
    /// The client goes, once it has what was parked for it.
    Leave,
    /// A request comes next.
    Nothing,
    Read(Reading),
    /// Data of a refused write is skipped, and then the write is answered.
    Skip {
        cookie: u64,
        error: Error,
        left: u32,
    },
    Store(Storing),
}

/// What a session works with in one call.
pub struct Desk<'a> {
    /// Number of the worker thread that calls.
    pub worker: usize,
    /// What came in.
    pub inbox: &'a mut Inbox,
    /// What goes out.
    pub outbox: &'a mut Outbox,
    /// What has to be read from the backing file.
    pub wants: &'a mut Wants,
    /// Reads that wait for the backing file by themselves.
    pub parked: &'a mut Parked,
    /// The present.
    pub now: Instant,
}

impl Session {
    /// A session on what was agreed upon.
    pub fn new(agreement: Agreement) -> Self {
        let Agreement { visit, terms } = agreement;
        Self { visit, terms, doing: Doing::Nothing, piece: None, starving_since: None }
    }

    /// Goes on as far as possible, within bounds.
    pub fn advance(&mut self, desk: &mut Desk<'_>) -> Progress {
        if desk.wants.are_left() {
            return Progress::Reading;
        }
        self.deliver(desk.worker, desk.outbox, desk.parked);
        let mut effort = EFFORT;
        loop {
            if effort == 0 {
                return Progress::Busy;
            }
            let step = match self.doing {
                Doing::Leave if desk.parked.is_empty() => Some(Progress::End),
                // Or for room: what is in the outbox is sent in any case.
                Doing::Leave => Some(Progress::Reading),
                Doing::Nothing => self.take_request(desk, &mut effort),
                Doing::Read(reading) => self.read_on(desk, reading, &mut effort),
                Doing::Skip { cookie, error, left } => self.skip(desk, cookie, error, left),
                Doing::Store(storing) => self.store_on(desk, storing, &mut effort),
            };
            if let Some(progress) = step {
                return progress;
            }
            effort = effort.saturating_sub(1);
        }
    }

    /// A page that was wanted has landed: its block was read into `image`, or could not be read; `took` is how
    /// long that took. Says what came of it: it is wanted still if it has been moved meanwhile.
    pub fn land(
        &self,
        worker: usize,
        outbox: &mut Outbox,
        want: &Want,
        image: Option<Image<'_>>,
        took: Duration,
    ) -> Stored {
        let Want { part, goal, backed } = want;
        match *goal {
            Goal::Memory => self.export().device().recall_at(part, *backed, image),
            Goal::Outbox(start) => {
                let target = outbox.held(start..start + part.bytes());
                self.land_part(worker, part, *backed, image, target, took)
            }
        }
    }

    /// The same of one that a parked read wants.
    pub fn land_parked(
        &self,
        worker: usize,
        parked: &mut Parked,
        number: usize,
        image: Option<Image<'_>>,
        took: Duration,
    ) -> Stored {
        let (part, backed, target) = parked.get(number);
        self.land_part(worker, part, backed, image, target, took)
    }

    fn land_part(
        &self,
        worker: usize,
        part: &Part,
        backed: Backed,
        image: Option<Image<'_>>,
        target: &mut [u8],
        took: Duration,
    ) -> Stored {
        let mut queue = self.export().queue(worker);
        match self.export().device().land_part(&mut queue, part, backed, image, target) {
            Ok(None) => {
                queue.count_read_back(took.as_nanos() as u64);
                Stored::Done
            }
            Ok(Some(backed)) => Stored::Backed(backed),
            Err(errno) => Stored::Failed(errno),
        }
    }

    /// Answers parked reads that are whole, unless a part of another answer is in the outbox; as far as there is room, and
    /// still is then for the reply to what is under way, which has looked for it when it began.
    pub fn deliver(&self, worker: usize, outbox: &mut Outbox, parked: &mut Parked) {
        let is_raw = matches!(self.doing, Doing::Read(Reading { how: Manner::Raw, .. }));
        if is_raw || self.piece.is_some() {
            return;
        }
        while let Some(room) = outbox.room().checked_sub(size_of::<SimpleReply>() + REPLY_BYTES_MAX)
            && let Some(whole) = parked.next_whole(room)
        {
            if let Some(errno) = whole.failed {
                self.count_failed_read(worker, errno);
                simple_reply(outbox, whole.cookie, Some(Error::Io));
            } else {
                simple_reply(outbox, whole.cookie, None);
                parked.data(whole).for_each(|data| outbox.push(data));
            }
            parked.answered(whole);
        }
    }

    fn count_failed_read(&self, worker: usize, errno: Errno) {
        let request = device::Request::new(Op::Read, 0, 0);
        self.export().counters(worker).ended(&request, Outcome::Failed(errno));
    }

    /// Whether there is work for the supply step of the engine.
    pub fn supply_wanted(&self) -> bool {
        self.export().device().engine().supply_wanted()
    }

    /// Whether there is work for whoever writes to the backing file.
    pub fn writeback_wanted(&self) -> bool {
        self.export().device().engine().writeback_wanted()
    }

    /// Ends the visit. What it takes to forget the export is left to whoever drops the session.
    pub fn leave(&mut self) {
        self.visit.leave();
    }

    fn export(&self) -> &Export {
        self.visit.export()
    }

    fn take_request(&mut self, desk: &mut Desk<'_>, effort: &mut usize) -> Option<Progress> {
        if desk.outbox.room() < REPLY_BYTES_MAX {
            return Some(Progress::Flush);
        }
        let Ok((header, _)) = RequestHeader::read_from_prefix(desk.inbox.unread()) else {
            return Some(Progress::Hungry);
        };
        desk.inbox.consume(size_of::<RequestHeader>());
        match judge(&header, &self.terms) {
            Verdict::HangUp => Some(Progress::End),
            Verdict::Refused { cookie, in_chunks, error, skip } => {
                let request = device::Request::new(Op::Read, 0, 0);
                let outcome = Outcome::Failed(Errno::INVAL);
                self.export().counters(desk.worker).ended(&request, outcome);
                if skip > 0 {
                    self.doing = Doing::Skip { cookie, error, left: skip };
                } else {
                    self.refuse(desk.outbox, cookie, in_chunks, error);
                }
                None
            }
            Verdict::Good(request) => self.begin(desk, request, effort),
        }
    }

    fn begin(
        &mut self,
        desk: &mut Desk<'_>,
        request: Request,
        effort: &mut usize,
    ) -> Option<Progress> {
        let Request { command, cookie, offset, length } = request;
        let what = match command {
            Command::Disconnect => {
                self.doing = Doing::Leave;
                return None;
            }
            Command::BlockStatus { one } => {
                self.block_status(desk.outbox, &request, one, effort);
                return None;
            }
            Command::Cache | Command::Flush => {
                simple_reply(desk.outbox, cookie, None);
                return None;
            }
            Command::Read { in_one } => {
                self.export().counters(desk.worker).came(Op::Read);
                let is_long = length as usize > DATA_BYTES;
                let how = match self.terms.structured {
                    true if !(in_one && is_long) => Manner::Chunks,
                    in_chunk if is_long => Manner::Checking { left: length, in_chunk },
                    _ => Manner::Short,
                };
                self.doing = Doing::Read(Reading { cookie, at: offset, left: length, how });
                return None;
            }
            Command::Trim => Store::Trim,
            Command::Write => Store::Data,
            Command::WriteZeroes { no_hole: false } => Store::Holes,
            Command::WriteZeroes { no_hole: true } => Store::Zeros,
        };
        self.export().counters(desk.worker).came(what.op());
        let (failed, waiting_since) = (None, None);
        let storing = Storing { cookie, at: offset, left: length, what, failed, waiting_since };
        self.doing = Doing::Store(storing);
        None
    }

    fn skip(
        &mut self,
        desk: &mut Desk<'_>,
        cookie: u64,
        error: Error,
        left: u32,
    ) -> Option<Progress> {
        let count = desk.inbox.unread().len().min(left as usize);
        desk.inbox.consume(count);
        let left = left - count as u32;
        self.doing = Doing::Skip { cookie, error, left };
        if left > 0 {
            return Some(Progress::Hungry);
        }
        simple_reply(desk.outbox, cookie, Some(error));
        self.doing = Doing::Nothing;
        None
    }

    /// Says what is a hole, from the request's first byte on and perhaps not to its last.
    fn block_status(&self, outbox: &mut Outbox, request: &Request, one: bool, effort: &mut usize) {
        let (mut extents, mut count) = ([(0_u32, 0_u32); EXTENTS_MAX], 0);
        let (mut at, mut left) = (request.offset, u64::from(request.length));
        let most = if one { 1 } else { EXTENTS_MAX };
        // The first always, so that there is an answer; as many more as the call may do.
        while count == 0 || *effort > 0 {
            *effort = effort.saturating_sub(RUN_EFFORT);
            let Some((holding, bytes)) = self.export().device().run_at(at, left) else { break };
            let flags = flags_of(holding);
            if count > 0 && extents[count - 1].1 == flags {
                extents[count - 1].0 += bytes as u32;
            } else if count < most {
                extents[count] = (bytes as u32, flags);
                count += 1;
            } else {
                break;
            }
            (at, left) = (at + bytes, left - bytes);
            if left == 0 {
                break;
            }
        }
        if count == 0 {
            // The pool is going, and the connection with it.
            return self.refuse(outbox, request.cookie, true, Error::Io);
        }
        let length = size_of::<u32>() + count * size_of::<Extent>();
        chunk_header(outbox, request.cookie, chunk::BLOCK_STATUS, true, length);
        outbox.push(&zerocopy::big_endian::U32::new(BASE_ALLOCATION_ID));
        for (length, flags) in &extents[..count] {
            outbox.push(&Extent { length: (*length).into(), flags: (*flags).into() });
        }
    }

    /// Answers with an error. A request whose answer comes in chunks gets it in one.
    fn refuse(&self, outbox: &mut Outbox, cookie: u64, in_chunks: bool, error: Error) {
        if !(in_chunks && self.terms.structured) {
            return simple_reply(outbox, cookie, Some(error));
        }
        chunk_header(outbox, cookie, chunk::ERROR, true, size_of::<ErrorChunk>());
        outbox.push(&ErrorChunk { error: (error as u32).into(), message_length: 0.into() });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use zerocopy::big_endian::U64;

    use tmem::PAGE_SIZE;
    use zerocopy::IntoBytes;

    use super::super::exports::Exports;
    use super::super::wire::{REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, SimpleReply, command, flag};
    use super::storing::SWAP_STARVED_MAX;
    use super::*;
    use crate::device::BlockDevice;
    use crate::device::tests::{device, noise};

    struct Talk {
        session: Session,
        inbox: Inbox,
        outbox: Outbox,
        wants: Wants,
        parked: Parked,
        now: Instant,
    }

    impl Talk {
        fn new(device: BlockDevice, terms: Terms) -> Self {
            let exports = Exports::default();
            exports.add(Arc::new(Export::new("a", Arc::new(device), 1, terms.flush)));
            let visit = exports.visit(b"a").unwrap();
            let session = Session::new(Agreement { visit, terms });
            let (inbox, outbox) = (Inbox::new(), Outbox::new());
            let (wants, parked) = (Wants::new(), Parked::new(0));
            Self { session, inbox, outbox, wants, parked, now: Instant::now() }
        }

        fn say(&mut self, bytes: &[u8]) {
            self.inbox.room()[..bytes.len()].copy_from_slice(bytes);
            self.inbox.filled(bytes.len());
        }

        fn ask(&mut self, command: u16, offset: u64, length: u32) {
            self.ask_with(0, command, offset, length);
        }

        fn ask_with(&mut self, flags: u16, command: u16, offset: u64, length: u32) {
            let header = RequestHeader {
                magic: REQUEST_MAGIC.into(),
                flags: flags.into(),
                command: command.into(),
                cookie: 9.into(),
                offset: offset.into(),
                length: length.into(),
            };
            self.say(header.as_bytes());
        }

        fn advance(&mut self) -> Progress {
            self.session.advance(&mut Desk {
                worker: 0,
                inbox: &mut self.inbox,
                outbox: &mut self.outbox,
                wants: &mut self.wants,
                parked: &mut self.parked,
                now: self.now,
            })
        }

        /// Takes what there is to send.
        fn hear(&mut self) -> Vec<u8> {
            let heard = self.outbox.unsent().to_vec();
            self.outbox.sent(heard.len());
            heard
        }

        /// The error of the simple reply that there is to send.
        fn error(&mut self) -> u32 {
            let heard = self.hear();
            let reply = SimpleReply::read_from_bytes(&heard).unwrap();
            assert_eq!((reply.magic.get(), reply.cookie.get()), (SIMPLE_REPLY_MAGIC, 9));
            reply.error.get()
        }
    }

    const TERMS: Terms =
        Terms { bytes: 64 * PAGE_SIZE as u64, flush: true, structured: false, allocation: false };

    #[test]
    fn data_that_cannot_be_read_after_all_is_not_sent() {
        let (device, mut queue) = device(1 << 20);
        let data = noise(64, 1);
        for (page, bytes) in (0..).zip(data.chunks(PAGE_SIZE)) {
            let part = Part::first(page * PAGE_SIZE as u64, PAGE_SIZE as u64);
            assert_eq!(device.write_part(&mut queue, &part, bytes), Stored::Done);
        }
        let mut talk = Talk::new(device, TERMS);
        talk.ask(command::READ, 0, data.len() as u32);
        assert_eq!(talk.advance(), Progress::Flush);
        let mut heard = talk.hear();
        // All was well when it was looked at.
        assert_eq!(U64::read_from_prefix(&heard[8..]).unwrap().0.get(), 9);
        talk.session.export().device().lose_at(&Part::first(60 * 4096, 4096));
        let ended = std::iter::repeat_with(|| {
            let progress = talk.advance();
            heard.extend(talk.hear());
            progress
        });
        assert_eq!(ended.take(10).last(), Some(Progress::End));
        let sent = &heard[size_of::<SimpleReply>()..];
        assert!(sent.len() <= 60 * PAGE_SIZE && *sent == data[..sent.len()]);
    }

    #[test]
    fn one_call_does_so_much_and_no_more() {
        let (device, _) = device(1 << 20);
        let mut talk = Talk::new(device, TERMS);
        let (requests, bytes) = (16 * EFFORT / 64, 64 * PAGE_SIZE);
        for _ in 0..requests {
            // Not as holes, which cost next to nothing.
            talk.ask_with(flag::NO_HOLE, command::WRITE_ZEROES, 0, bytes as u32);
        }
        let (mut calls, mut heard) = (0, 0);
        loop {
            calls += 1;
            let progress = talk.advance();
            heard += talk.hear().len();
            if progress == Progress::Hungry {
                break;
            }
            assert_eq!(progress, Progress::Busy);
        }
        assert_eq!(heard, requests * size_of::<SimpleReply>());
        assert!(calls >= requests * bytes / PAGE_SIZE / EFFORT, "{calls} calls");
    }

    #[test]
    fn writes_wait_for_memory_once_a_connection() {
        let limit = tmem::Config::limit_min(1) + (1 << 20);
        let config = tmem::Config { limit, limit_max: limit, shards: 1 };
        let engine = Arc::new(tmem::Engine::new(&config).unwrap());
        let device = BlockDevice::new(Arc::clone(&engine), 64).unwrap();
        let mut talk = Talk::new(device, Terms { flush: false, ..TERMS });
        let data = noise(8, 1);
        talk.ask(command::WRITE, 0, data.len() as u32);
        talk.say(&data);
        assert_eq!(talk.advance(), Progress::Starved);
        talk.now += SWAP_STARVED_MAX / 2;
        assert_eq!(talk.advance(), Progress::Starved);
        talk.now += SWAP_STARVED_MAX / 2;
        // It fails, and what comes next does not wait again.
        assert_eq!(talk.advance(), Progress::Hungry);
        assert_eq!(talk.error(), Error::NoSpace as u32);
        talk.ask(command::WRITE, 8 * 4096, data.len() as u32);
        talk.say(&data);
        assert_eq!(talk.advance(), Progress::Hungry);
        assert_eq!(talk.error(), Error::NoSpace as u32);
        // What was not written does not read as zeros.
        talk.ask(command::READ, 5 * 4096, 4096);
        assert_eq!(talk.advance(), Progress::Hungry);
        assert_eq!(talk.error(), Error::Io as u32);
        // Once there is memory, all is as before.
        while engine.supply().unwrap().more {}
        talk.ask(command::WRITE, 0, data.len() as u32);
        talk.say(&data);
        assert_eq!(talk.advance(), Progress::Hungry);
        assert_eq!(talk.error(), 0);
        assert_eq!(talk.session.starving_since, None);
    }
}
