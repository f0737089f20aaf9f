//! The transmission: requests and their replies, on one connection.
//!
//! Sans I/O: bytes come out of the inbox and go into the outbox, and where more of either is needed
//! it says so. Pages that are on the backing file it notes, and it goes on when all of them have landed;
//! what is in memory is got before that, once. Guarantees: a request is answered after it is effective, in the
//! order in which they came; data that could not be read is never sent as if it had been; what one call does is
//! bounded by [`EFFORT`], whatever a request asks for, so that no client holds up the others.

use std::time::{Duration, Instant};

use rustix::io::Errno;
use tmem::{Holding, Image, OBJECT_PAGES, PAGE_SIZE};
use zerocopy::{FromBytes, IntoBytes};

use super::buffer::{DATA_BYTES, Inbox, Outbox};
use super::exports::{Export, Visit};
use super::negotiation::Agreement;
use super::request::{Command, Request, Terms, Verdict, judge};
use super::wants::{Goal, Want, Wants};
use super::wire::{
    BASE_ALLOCATION_ID, CHUNK_MAGIC, ChunkHeader, Error, ErrorChunk, Extent, RequestHeader,
    SIMPLE_REPLY_MAGIC, SimpleReply, chunk, extent,
};
use crate::bytes::{Part, Stored};
use crate::device::{self, Op, Outcome};

/// What one call of [`Session::advance`] may do, in pages read or written; a request costs one too.
const EFFORT: usize = 256;

/// Pages that a trim drops for the effort of one: dropping takes a tenth of a put.
const TRIM_PAGES: usize = 8;

/// How long writes may wait for memory before they fail, from the first that finds none until one
/// finds some. A connection's requests are served in order, so all that is asked next waits too.
const STARVED_MAX: Duration = Duration::from_secs(1);

/// The same on an export for swap: who reads cannot go on without the page, and what a failed write
/// has not written is still in memory.
const SWAP_STARVED_MAX: Duration = Duration::from_millis(200);

/// What looking for the end of a run costs.
const RUN_EFFORT: usize = 4;

/// Extents that one reply names.
const EXTENTS_MAX: usize = 256;

/// Room for the longest reply that has no data from the device.
const REPLY_BYTES_MAX: usize =
    size_of::<ChunkHeader>() + size_of::<u32>() + EXTENTS_MAX * size_of::<Extent>();

/// What precedes a chunk's data.
const DATA_HEADER_BYTES: usize = size_of::<ChunkHeader>() + size_of::<u64>();

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

/// A read, which may be longer than the outbox.
#[derive(Clone, Copy)]
struct Reading {
    cookie: u64,
    at: u64,
    left: u32,
    how: Manner,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Manner {
    /// The reply's header says that all is well, so all is looked at before it is sent. So many
    /// bytes are to be looked at still.
    Checking { left: u32, in_chunk: bool },
    /// Several chunks, of which each can be an error.
    Chunks,
    /// Data that follows a header.
    Raw,
    /// A simple reply that fits, with its data.
    Short,
}

/// Bytes of the device that are gathered in the outbox.
#[derive(Clone, Copy)]
struct Piece {
    /// Where in the outbox it begins, with what precedes the data.
    mark: usize,
    from: u64,
    count: u32,
}

/// A write, a trim or a zeroing.
#[derive(Clone, Copy)]
struct Storing {
    cookie: u64,
    at: u64,
    left: u32,
    what: Store,
    failed: Option<Error>,
    /// Since when it waits for memory, if it does or did.
    waiting_since: Option<Instant>,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Store {
    Data,
    /// Zeros, by dropping pages where they are whole.
    Holes,
    /// Pages are dropped, and what is not whole is left alone.
    Trim,
    /// Zeros that are stored.
    Zeros,
}

impl Store {
    /// What it counts as.
    fn op(self) -> Op {
        match self {
            Store::Data => Op::Write,
            Store::Trim => Op::Discard,
            Store::Holes | Store::Zeros => Op::WriteZeroes,
        }
    }
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
        let mut effort = EFFORT;
        loop {
            if effort == 0 {
                return Progress::Busy;
            }
            let step = match self.doing {
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
        let device = self.export().device();
        let Want { part, goal, backed } = want;
        let start = match *goal {
            Goal::Memory => return device.recall_at(part, *backed, image),
            Goal::Outbox(start) => start,
        };
        let target = outbox.held(start..start + part.bytes());
        let mut queue = self.export().queue(worker);
        match device.land_part(&mut queue, part, *backed, image, target) {
            Ok(None) => {
                queue.count_read_back(took.as_nanos() as u64);
                Stored::Done
            }
            Ok(Some(backed)) => Stored::Backed(backed),
            Err(errno) => Stored::Failed(errno),
        }
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
            Command::Disconnect => return Some(Progress::End),
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

    fn read_on(
        &mut self,
        desk: &mut Desk<'_>,
        reading: Reading,
        effort: &mut usize,
    ) -> Option<Progress> {
        if let Some(piece) = self.piece.take() {
            // All that it waited for has landed.
            desk.outbox.release();
            let gathered = match desk.wants.conclude() {
                Stored::Done => Ok(()),
                Stored::Failed(errno) => Err(errno),
                Stored::Backed(_) | Stored::Starved => unreachable!("nothing was stored"),
            };
            return self.end_piece(desk, reading, &piece, gathered);
        }
        let outbox = &mut *desk.outbox;
        let piece = match reading.how {
            Manner::Checking { left: 0, in_chunk } => {
                return self.begin_raw(outbox, reading, in_chunk);
            }
            Manner::Checking { left, .. } => reading.checked_piece(outbox, left),
            Manner::Chunks => reading.chunk(outbox),
            Manner::Raw => reading.raw_piece(outbox),
            Manner::Short => reading.short_reply(outbox),
        };
        let Some(piece) = piece else { return Some(Progress::Flush) };
        let fetched = self.fetch(desk, &piece, effort);
        if desk.wants.are_left() {
            desk.outbox.hold(piece.mark);
            self.piece = Some(piece);
            return Some(Progress::Reading);
        }
        self.end_piece(desk, reading, &piece, fetched)
    }

    /// Says that all is well of what was looked at, and sends it next.
    fn begin_raw(
        &mut self,
        outbox: &mut Outbox,
        reading: Reading,
        in_chunk: bool,
    ) -> Option<Progress> {
        if outbox.room() < DATA_HEADER_BYTES {
            return Some(Progress::Flush);
        }
        let Reading { cookie, at, left, .. } = reading;
        if in_chunk {
            data_header(outbox, cookie, at, left, true);
        } else {
            simple_reply(outbox, cookie, None);
        }
        self.doing = Doing::Read(Reading { how: Manner::Raw, ..reading });
        None
    }

    /// Appends a piece's data to the outbox: what is in memory, for the rest is wanted.
    fn fetch(&self, desk: &mut Desk<'_>, piece: &Piece, effort: &mut usize) -> Result<(), Errno> {
        let export = self.export();
        let start = desk.outbox.mark();
        let data = desk.outbox.append(piece.count as usize);
        *effort = effort.saturating_sub(data.len() / PAGE_SIZE);
        let mut queue = export.queue(desk.worker);
        for (place, part) in Part::all(piece.from, data.len()) {
            let target = &mut data[place..place + part.bytes()];
            match export.device().read_part(&mut queue, &part, target) {
                Ok(None) => {}
                Ok(Some(backed)) => desk.wants.note(part, Goal::Outbox(start + place), backed),
                Err(errno) => {
                    // The others are of no use.
                    desk.wants.conclude();
                    return Err(errno);
                }
            }
        }
        Ok(())
    }

    /// Goes on when a piece is whole in the outbox, or cannot be. If that is data that was looked at before, the
    /// client must not take what it gets for it: the connection ends.
    fn end_piece(
        &mut self,
        desk: &mut Desk<'_>,
        mut reading: Reading,
        piece: &Piece,
        gathered: Result<(), Errno>,
    ) -> Option<Progress> {
        if let Err(errno) = gathered {
            let request = device::Request::new(Op::Read, 0, 0);
            let counters = self.export().counters(desk.worker);
            counters.ended(&request, Outcome::Failed(errno));
            desk.outbox.take_back(piece.mark);
            if reading.how == Manner::Raw {
                return Some(Progress::End);
            }
            self.refuse(desk.outbox, reading.cookie, true, Error::Io);
            self.doing = Doing::Nothing;
            return None;
        }
        if let Manner::Checking { left, .. } = &mut reading.how {
            // It was only looked at.
            desk.outbox.take_back(piece.mark);
            *left -= piece.count;
        } else {
            reading.at += u64::from(piece.count);
            reading.left -= piece.count;
        }
        self.doing = if reading.left > 0 { Doing::Read(reading) } else { Doing::Nothing };
        None
    }

    fn store_on(
        &mut self,
        desk: &mut Desk<'_>,
        mut storing: Storing,
        effort: &mut usize,
    ) -> Option<Progress> {
        let mut stop = None;
        while storing.left > 0 && stop.is_none() {
            if *effort == 0 {
                stop = Some(Progress::Busy);
                break;
            }
            stop = self.store_some(desk, &mut storing, effort);
        }
        if stop.is_none() {
            if let Some(since) = storing.waiting_since {
                let waited = desk.now.saturating_duration_since(since);
                self.export().counters(desk.worker).waited(waited);
            }
            self.doing = Doing::Nothing;
            simple_reply(desk.outbox, storing.cookie, storing.failed);
        } else {
            self.doing = Doing::Store(storing);
        }
        stop
    }

    /// Stores into one page, or drops several.
    fn store_some(
        &mut self,
        desk: &mut Desk<'_>,
        storing: &mut Storing,
        effort: &mut usize,
    ) -> Option<Progress> {
        let part = Part::first(storing.at, storing.left.into());
        let is_data = storing.what == Store::Data;
        if is_data && desk.inbox.unread().len() < part.bytes() {
            return Some(Progress::Hungry);
        }
        let mut count = part.bytes();
        // The page is in memory now if it had to be, or could not be had there.
        let stored = match desk.wants.conclude() {
            Stored::Done => self.store(desk, storing, &part, &mut count, effort),
            trouble => trouble,
        };
        *effort = effort.saturating_sub(1);
        if let Some(progress) = self.note(desk, storing, &part, stored) {
            return Some(progress);
        }
        if is_data {
            desk.inbox.consume(count);
        }
        storing.at += count as u64;
        storing.left -= count as u32;
        None
    }

    /// Stores into a part of a page, or drops pages from there on; `count` is how many bytes are done then.
    fn store(
        &self,
        desk: &Desk<'_>,
        storing: &Storing,
        part: &Part,
        count: &mut usize,
        effort: &mut usize,
    ) -> Stored {
        let device = self.export().device();
        match storing.what {
            Store::Data | Store::Zeros if storing.failed.is_some() => {
                // Nothing of it reads as what it was before.
                device.lose_at(part);
                Stored::Done
            }
            Store::Trim if !part.is_whole() => Stored::Done,
            Store::Holes | Store::Trim if part.is_whole() => {
                // An object as a whole if possible: that is the least work.
                let object_pages = u64::from(OBJECT_PAGES);
                let in_object = object_pages - part.page % object_pages;
                let pages = (u64::from(storing.left) / PAGE_SIZE as u64).min(in_object);
                device.discard_pages(part.page, pages);
                *count = pages as usize * PAGE_SIZE;
                *effort = effort.saturating_sub(pages as usize / TRIM_PAGES);
                Stored::Done
            }
            Store::Holes if device.is_zero_at(part) => Stored::Done,
            Store::Data => {
                let data = &desk.inbox.unread()[..*count];
                device.write_part(&mut self.export().queue(desk.worker), part, data)
            }
            Store::Holes | Store::Trim | Store::Zeros => {
                device.zero_part(&mut self.export().queue(desk.worker), part)
            }
        }
    }

    /// Notes how storing into a part went; where it is to be tried again, says so.
    fn note(
        &mut self,
        desk: &mut Desk<'_>,
        storing: &mut Storing,
        part: &Part,
        stored: Stored,
    ) -> Option<Progress> {
        let export = self.visit.export();
        let counters = export.counters(desk.worker);
        let request = device::Request::new(storing.what.op(), 0, 0);
        match stored {
            Stored::Backed(backed) => {
                desk.wants.note(part.clone(), Goal::Memory, backed);
                return Some(Progress::Reading);
            }
            Stored::Done if storing.failed.is_some() => {}
            Stored::Done => self.starving_since = None,
            Stored::Failed(errno) => {
                counters.ended(&request, Outcome::Failed(errno));
                storing.failed = Some(error_of(errno));
            }
            Stored::Starved => {
                storing.waiting_since.get_or_insert_with(|| {
                    counters.ended(&request, Outcome::Starved);
                    desk.now
                });
                let since = *self.starving_since.get_or_insert(desk.now);
                let limit = if self.terms.flush { STARVED_MAX } else { SWAP_STARVED_MAX };
                if desk.now.saturating_duration_since(since) < limit {
                    return Some(Progress::Starved);
                }
                export.device().lose_at(part);
                counters.ended(&request, Outcome::TimedOut);
                storing.failed = Some(Error::NoSpace);
            }
        }
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

/// The next piece of each manner: what precedes its data is in the outbox then. None if there is no room.
impl Reading {
    /// All of it.
    fn short_reply(&self, outbox: &mut Outbox) -> Option<Piece> {
        let mark = mark(outbox, size_of::<SimpleReply>() + self.left as usize)?;
        simple_reply(outbox, self.cookie, None);
        Some(Piece { mark, from: self.at, count: self.left })
    }

    /// A chunk of a structured reply.
    fn chunk(&self, outbox: &mut Outbox) -> Option<Piece> {
        let count = self.left.min(DATA_BYTES as u32);
        let mark = mark(outbox, DATA_HEADER_BYTES + count as usize)?;
        if count == 0 {
            chunk_header(outbox, self.cookie, chunk::NONE, true, 0);
        } else {
            data_header(outbox, self.cookie, self.at, count, count == self.left);
        }
        Some(Piece { mark, from: self.at, count })
    }

    /// Some of what is to be looked at, of which so much is left.
    fn checked_piece(&self, outbox: &mut Outbox, left: u32) -> Option<Piece> {
        let mark = mark(outbox, DATA_BYTES)?;
        let from = self.at + u64::from(self.left - left);
        Some(Piece { mark, from, count: left.min(DATA_BYTES as u32) })
    }

    /// Some of what was looked at.
    fn raw_piece(&self, outbox: &mut Outbox) -> Option<Piece> {
        let count = (self.left as usize).min(outbox.room()).min(DATA_BYTES);
        // Not in small pieces, unless it is the last.
        let is_worth_it = count >= PAGE_SIZE || count == self.left as usize;
        let mark = outbox.mark();
        is_worth_it.then_some(Piece { mark, from: self.at, count: count as u32 })
    }
}

/// Where the outbox ends, if it has so much room.
fn mark(outbox: &Outbox, bytes: usize) -> Option<usize> {
    (outbox.room() >= bytes).then(|| outbox.mark())
}

fn simple_reply(outbox: &mut Outbox, cookie: u64, error: Option<Error>) {
    outbox.push(&SimpleReply {
        magic: SIMPLE_REPLY_MAGIC.into(),
        error: error.map_or(0, |error| error as u32).into(),
        cookie: cookie.into(),
    });
}

fn chunk_header(outbox: &mut Outbox, cookie: u64, kind: u16, is_last: bool, length: usize) {
    outbox.push(&ChunkHeader {
        magic: CHUNK_MAGIC.into(),
        flags: if is_last { chunk::DONE } else { 0 }.into(),
        kind: kind.into(),
        cookie: cookie.into(),
        length: (length as u32).into(),
    });
}

/// What precedes so many bytes of data from `offset` on.
fn data_header(outbox: &mut Outbox, cookie: u64, offset: u64, bytes: u32, is_last: bool) {
    let length = size_of::<u64>() + bytes as usize;
    chunk_header(outbox, cookie, chunk::OFFSET_DATA, is_last, length);
    outbox.push(zerocopy::big_endian::U64::new(offset).as_bytes());
}

fn flags_of(holding: Holding) -> u32 {
    match holding {
        Holding::Data => 0,
        Holding::Nothing => extent::HOLE | extent::ZERO,
        Holding::Zeros => extent::ZERO,
    }
}

fn error_of(errno: Errno) -> Error {
    match errno {
        Errno::NOSPC => Error::NoSpace,
        Errno::INVAL => Error::Invalid,
        _ => Error::Io,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use zerocopy::big_endian::U64;

    use super::super::exports::Exports;
    use super::super::wire::{REQUEST_MAGIC, command, flag};
    use super::*;
    use crate::device::BlockDevice;
    use crate::device::tests::{device, noise};

    struct Talk {
        session: Session,
        inbox: Inbox,
        outbox: Outbox,
        wants: Wants,
        now: Instant,
    }

    impl Talk {
        fn new(device: BlockDevice, terms: Terms) -> Self {
            let exports = Exports::default();
            exports.add(Arc::new(Export::new("a", Arc::new(device), 1, terms.flush)));
            let visit = exports.visit(b"a").unwrap();
            let session = Session::new(Agreement { visit, terms });
            let (inbox, outbox, wants) = (Inbox::new(), Outbox::new(), Wants::new());
            Self { session, inbox, outbox, wants, now: Instant::now() }
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
            let (inbox, outbox, wants) = (&mut self.inbox, &mut self.outbox, &mut self.wants);
            self.session.advance(&mut Desk { worker: 0, inbox, outbox, wants, now: self.now })
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
