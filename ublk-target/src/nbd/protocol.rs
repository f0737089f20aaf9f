//! One connection's protocol from its first byte to its last, without the socket.
//!
//! The negotiation, then the session, between an inbox and an outbox: whoever has a socket fills the
//! one and sends the other. Everything that parses what a client says is behind this, so this is
//! what the fuzzers drive.

use std::sync::Arc;
use std::time::Instant;

use super::buffer::{Inbox, Outbox};
use super::exports::Exports;
use super::negotiation::{self, Negotiation};
pub use super::session::Progress;
use super::session::{Desk, Session};

/// See the module's description.
pub struct Protocol {
    /// What came in.
    pub inbox: Inbox,
    /// What is to be sent.
    pub outbox: Outbox,
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
        let phase = Phase::Negotiation(Negotiation::new());
        Self { inbox: Inbox::new(), outbox: Outbox::new(), exports, worker, phase }
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
            now,
        })
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
}
