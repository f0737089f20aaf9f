//! A client's bytes into a connection's protocol, in pieces, and all that comes out of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tmem_ublk_target::nbd::{Progress, Protocol};

use super::fixture::Fixture;

/// How much later it is each time a write was found waiting for memory.
const STARVED_STEP: Duration = Duration::from_millis(150);

/// Calls that a request can need: those of a read of the whole export, and of a write that waits.
const CALLS_PER_REQUEST: usize = 64;

/// Bytes of the smallest thing that can need so many.
const REQUEST_BYTES: usize = 28;

/// What came of it.
pub struct Heard {
    /// All that the server said.
    pub output: Vec<u8>,
    /// Whether it ended the connection, rather than wait for more.
    pub ended: bool,
}

/// A conversation under way.
struct Feed {
    protocol: Protocol,
    heard: Heard,
    now: Instant,
    calls_left: usize,
}

/// Says all of `input` to a new connection, in pieces of which `how` says the sizes: 0 is all at
/// once, up to 127 the size, and above a start for sizes that vary.
pub fn feed(fixture: &Fixture, input: &[u8], how: u8) -> Heard {
    let mut sizes = piece_sizes(how);
    let mut feed = Feed {
        protocol: Protocol::new(Arc::clone(&fixture.exports), 0),
        heard: Heard { output: Vec::new(), ended: false },
        now: Instant::now(),
        calls_left: CALLS_PER_REQUEST * (input.len() / REQUEST_BYTES + 2),
    };
    feed.run();
    let mut rest = input;
    while !rest.is_empty() && !feed.heard.ended {
        let (piece, tail) = rest.split_at(sizes().min(rest.len()));
        feed.say(piece);
        rest = tail;
    }
    feed.protocol.end();
    assert_eq!(fixture.visitors(), 0, "an export is in use after its connection has ended");
    feed.heard
}

impl Feed {
    fn say(&mut self, piece: &[u8]) {
        let mut rest = piece;
        while !rest.is_empty() && !self.heard.ended {
            let room = self.protocol.inbox.room();
            let count = room.len().min(rest.len());
            assert!(count > 0, "it wants more and has no room for it");
            room[..count].copy_from_slice(&rest[..count]);
            self.protocol.inbox.filled(count);
            rest = &rest[count..];
            // What comes in pieces costs a call for each.
            self.calls_left += 1;
            self.run();
        }
    }

    /// Lets the protocol go on for as long as it can.
    fn run(&mut self) {
        loop {
            assert!(self.calls_left > 0, "it goes on and on");
            self.calls_left -= 1;
            let progress = self.protocol.advance(self.now);
            let outbox = &mut self.protocol.outbox;
            let sent = outbox.unsent().len();
            self.heard.output.extend_from_slice(outbox.unsent());
            outbox.sent(sent);
            match progress {
                Progress::Busy => {}
                Progress::End => return self.heard.ended = true,
                Progress::Flush => assert!(sent > 0, "it waits for nothing to be sent"),
                Progress::Hungry => return,
                Progress::Reading => panic!("it waits for a backing file, and there is none"),
                Progress::Starved => self.now += STARVED_STEP,
            }
        }
    }
}

fn piece_sizes(how: u8) -> impl FnMut() -> usize {
    let mut state = u32::from(how) << 8 | 1;
    move || match how {
        0 => usize::MAX,
        1..128 => how.into(),
        _ => {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Mostly small ones.
            1 + (state >> 16) as usize % (1 << (state >> 29))
        }
    }
}
