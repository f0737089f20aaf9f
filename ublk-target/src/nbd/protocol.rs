//! One connection's protocol from its first byte to its last, without the socket.
//!
//! The negotiation, then the session, between an inbox and an outbox: whoever has a socket fills the
//! one and sends the other. Everything that parses what a client says is behind this, so this is
//! what the fuzzers drive.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tmem::{Backed, Image, PAGE_SIZE};

use super::buffer::{BUFFER_BYTES, Inbox, Outbox};
use super::exports::{Exports, Visit};
use super::negotiation::{self, Agreement, Negotiation};
use super::parked::{PARKED_PAGES, Parked};
pub use super::session::Progress;
use super::session::{Desk, Session};
use super::wants::{WANTS_MAX, Wants};
use crate::bytes::Stored;

/// Pages that are read for a connection at most.
pub const READS_MAX: usize = WANTS_MAX + PARKED_PAGES;

/// Bytes of the buffers that [`Protocol::agreed`] allocates.
pub const AGREED_BYTES: usize = 2 * BUFFER_BYTES + PARKED_PAGES * PAGE_SIZE;

/// See the module's description.
pub struct Protocol {
    /// What came in.
    pub inbox: Inbox,
    /// What is to be sent.
    pub outbox: Outbox,
    /// What has to be read from the backing file before it can go on.
    wants: Wants,
    /// What it goes on without meanwhile.
    parked: Parked,
    exports: Arc<Exports>,
    worker: usize,
    phase: Phase,
}

enum Phase {
    Negotiation(Negotiation),
    Session(Session),
}

impl Protocol {
    /// The protocol for a client that has just connected, served by that worker. Allocates all
    /// memory that the connection will ever have.
    pub fn new(exports: Arc<Exports>, worker: usize) -> Self {
        Self::begin(exports, worker, Phase::Negotiation(Negotiation::new()), 0)
    }

    /// The same for a client that knows all that it needs, and makes requests at once, many at a time: some of its reads may
    /// be parked.
    pub fn agreed(exports: Arc<Exports>, worker: usize, visit: Visit) -> Self {
        let session = Session::new(Agreement::without_negotiation(visit));
        Self::begin(exports, worker, Phase::Session(session), PARKED_PAGES)
    }

    fn begin(exports: Arc<Exports>, worker: usize, phase: Phase, parked: usize) -> Self {
        let (inbox, outbox) = (Inbox::new(), Outbox::new());
        let (wants, parked) = (Wants::new(), Parked::new(parked));
        Self { inbox, outbox, wants, parked, exports, worker, phase }
    }

    /// Whether the client has not chosen an export yet.
    pub fn is_negotiating(&self) -> bool {
        matches!(self.phase, Phase::Negotiation(_))
    }

    /// Goes on as far as possible, within bounds. What is in the outbox is whole and may be sent.
    pub fn advance(&mut self, now: Instant) -> Progress {
        if let Phase::Negotiation(negotiation) = &mut self.phase {
            match negotiation.advance(&mut self.inbox, &mut self.outbox, &self.exports) {
                negotiation::Progress::Agreed(agreement) => {
                    self.phase = Phase::Session(Session::new(agreement));
                }
                negotiation::Progress::End => return Progress::End,
                negotiation::Progress::Flush => return Progress::Flush,
                negotiation::Progress::Hungry => return Progress::Hungry,
            }
        }
        let Phase::Session(session) = &mut self.phase else {
            unreachable!("a negotiation that goes on has agreed");
        };
        session.advance(&mut Desk {
            worker: self.worker,
            inbox: &mut self.inbox,
            outbox: &mut self.outbox,
            wants: &mut self.wants,
            parked: &mut self.parked,
            now,
        })
    }

    /// The next page that has to be read from the backing file: a number for it, below [`READS_MAX`], and where
    /// it is. Each is told once, and ends with [`Protocol::landed`] or [`Protocol::give_up`].
    pub fn next_want(&mut self) -> Option<(usize, Backed)> {
        let parked = |(place, backed)| (WANTS_MAX + place, backed);
        self.wants.next().or_else(|| self.parked.next().map(parked))
    }

    /// Whether it waits for pages of the backing file. Meanwhile it does not go on, and what is in the outbox may
    /// be sent.
    pub fn is_waiting(&self) -> bool {
        self.wants.are_left()
    }

    /// Whether pages are read for it, those of parked reads included.
    pub fn is_reading(&self) -> bool {
        self.wants.are_left() || self.parked.are_wanting()
    }

    /// Puts answers of parked reads into the outbox, as far as they are whole and there is room.
    pub fn deliver(&mut self) {
        if let Phase::Session(session) = &self.phase {
            session.deliver(self.worker, &mut self.outbox, &mut self.parked);
        }
    }

    /// The block of a page that was wanted was read into `image`, or could not be read; `took` is how long that took from the moment that it was wanted. Returns where to read it, if it
    /// is wanted still: it has been moved meanwhile. Touches nothing of what is being sent.
    ///
    /// # Panics
    ///
    /// If there is no such page.
    pub fn landed(
        &mut self,
        want: usize,
        image: Option<Image<'_>>,
        took: Duration,
    ) -> Option<Backed> {
        let Phase::Session(session) = &self.phase else {
            unreachable!("who has not chosen an export wants nothing of it");
        };
        let Some(place) = want.checked_sub(WANTS_MAX) else {
            let landed = match self.wants.have_failed() {
                true => Stored::Done,
                false => {
                    let want = self.wants.get(want);
                    session.land(self.worker, &mut self.outbox, want, image, took)
                }
            };
            return self.wants.landed(want, landed);
        };
        let landed = match self.parked.has_failed(place) {
            true => Stored::Done,
            false => session.land_parked(self.worker, &mut self.parked, place, image, took),
        };
        let moved = self.parked.landed(place, landed);
        self.deliver();
        moved
    }

    /// A page that was wanted is not read, because the connection ends.
    pub fn give_up(&mut self, want: usize) {
        match want.checked_sub(WANTS_MAX) {
            None => drop(self.wants.landed(want, Stored::Failed(Errno::CANCELED))),
            Some(place) => self.parked.give_up(place),
        }
    }

    /// Ends the client's use of its export. Freed is what it held when this is dropped.
    pub fn end(&mut self) {
        if let Phase::Session(session) = &mut self.phase {
            session.leave();
        }
    }

    /// Whether the engine behind it has work for the supply step.
    pub fn supply_wanted(&self) -> bool {
        matches!(&self.phase, Phase::Session(session) if session.supply_wanted())
    }

    /// Whether the engine behind it has work for whoever writes to the backing file.
    pub fn writeback_wanted(&self) -> bool {
        matches!(&self.phase, Phase::Session(session) if session.writeback_wanted())
    }
}
