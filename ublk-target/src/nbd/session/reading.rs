//! Reads: piece by piece into the outbox, and each piece as a whole.

use rustix::io::Errno;
use tmem::PAGE_SIZE;

use super::{Desk, Doing, Progress, Session};
use crate::bytes::{Part, Stored};
use crate::nbd::buffer::{DATA_BYTES, Outbox};
use crate::nbd::reply::{DATA_HEADER_BYTES, chunk_header, data_header, simple_reply};
use crate::nbd::wants::Goal;
use crate::nbd::wire::{Error, SimpleReply, chunk};

/// A read, which may be longer than the outbox.
#[derive(Clone, Copy)]
pub(super) struct Reading {
    pub(super) cookie: u64,
    pub(super) at: u64,
    pub(super) left: u32,
    pub(super) how: Manner,
}

#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum Manner {
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
pub(super) struct Piece {
    /// Where in the outbox it begins, with what precedes the data.
    mark: usize,
    from: u64,
    count: u32,
}

impl Session {
    pub(super) fn read_on(
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
            if reading.how == Manner::Short && park(desk, reading.cookie, &piece) {
                self.doing = Doing::Nothing;
                return None;
            }
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
            self.count_failed_read(desk.worker, errno);
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

/// Lets the connection go on without a read that waits for the backing file, if there is room for it.
fn park(desk: &mut Desk<'_>, cookie: u64, piece: &Piece) -> bool {
    let start = piece.mark + size_of::<SimpleReply>();
    let data = desk.outbox.since(start);
    let is_parked = desk.parked.park(cookie, piece.from, start, data, desk.wants);
    if is_parked {
        desk.wants.conclude();
        desk.outbox.take_back(piece.mark);
    }
    is_parked
}

/// Where the outbox ends, if it has so much room.
fn mark(outbox: &Outbox, bytes: usize) -> Option<usize> {
    (outbox.room() >= bytes).then(|| outbox.mark())
}
