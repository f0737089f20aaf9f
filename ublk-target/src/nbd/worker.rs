//! A worker: one thread, one io_uring, and the connections that it serves.
//!
//! Guarantees: once the thread runs, no allocation, no lock but the engine's and those that nobody
//! else wants, no system call but io_uring's own (but for waking up to a new connection), and no wait
//! but for I/O. A client that sends nothing, takes nothing or asks for much holds up nobody else:
//! each has its turn, and a turn is bounded. Connections come from the server's thread and go back
//! there, which frees their memory. What connections want from the backing file comes by the same io_uring; a
//! connection that waits for it stays where it is, and sends what it has. A worker that cannot go on takes the
//! process down, for the kernel may swap to what it serves.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use tmem::Engine;

use super::protocol::{Progress, READS_MAX};
use super::ring::{Link, Outcome, Ring, Token};
use crate::backing::{Backing, Ended, FETCHES_MAX, Fetched, Fetches};
use crate::process;
use crate::waker::Waker;

/// How long a client may take to choose an export.
const NEGOTIATION_MAX: Duration = Duration::from_secs(10);

/// How often to look for those that take longer, while there are any.
const NEGOTIATION_PERIOD: Duration = Duration::from_secs(1);

/// How long to wait for other I/O before what the system had no memory for is tried again.
const STARVED_RETRY: Duration = Duration::from_millis(2);

/// Entries of a ring beside those of its links: the three signals, the watch, reads of the backing file.
const EXTRA_ENTRIES: usize = 8 + FETCHES_MAX;

/// Entries that a link can need at a time: receive, send, and a cancellation of each.
const LINK_ENTRIES: usize = 4;

/// What there is to do for the engine beside requests.
#[derive(Clone)]
pub struct EngineSide {
    /// Wakes the supply thread.
    pub waker: Arc<Waker>,
    /// The backing file, if there is one, and what wakes the thread that writes to it.
    pub backing: Arc<Backing>,
}

/// What a worker works with.
pub struct WorkerContext {
    /// Connections that come.
    pub arrivals: Receiver<Link>,
    /// Connections that go.
    pub retired: SyncSender<Link>,
    /// Wakes whoever takes those that go.
    pub retired_wake: Arc<OwnedFd>,
    /// Wakes the worker when a connection comes or it is to stop.
    pub wake: Arc<OwnedFd>,
    /// Whether it is to stop.
    pub stop: Arc<AtomicBool>,
    /// What is woken for the engine.
    pub side: EngineSide,
}

/// See the module's description.
pub struct Worker {
    context: WorkerContext,
    ring: Ring,
    places: Box<[Option<Place>]>,
    /// Pages that are read from the backing file: slot, and number among what the connection wants.
    fetches: Fetches<(usize, usize)>,
}

/// A connection's place.
struct Place {
    link: Link,
    state: State,
    /// The system had no memory for what it does: it is tried again after a pause.
    paused: bool,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum State {
    /// It goes once everything is sent.
    Ending,
    /// It goes as soon as the kernel lets go of it.
    Over,
    /// It goes on.
    Open,
}

impl Worker {
    /// A worker with places for so many connections, on the thread that will run it.
    pub fn new(context: WorkerContext, places: usize) -> std::io::Result<Self> {
        let ring = Ring::new((places * LINK_ENTRIES + EXTRA_ENTRIES) as u32)?;
        let fetches = Fetches::new(Arc::clone(&context.side.backing), places * READS_MAX);
        let places = std::iter::repeat_with(|| None).take(places).collect();
        Ok(Self { context, ring, places, fetches })
    }

    /// Serves connections to exports on this engine until it is told to stop and all are gone.
    pub fn run(mut self, engine: &Engine) {
        self.ring.watch(self.context.wake.as_raw_fd());
        // The first signal makes the kernel allocate what every later one uses again.
        self.ring.signal(self.context.side.waker.fd(), Token::Ignored);
        loop {
            let is_stopping = self.context.stop.load(Ordering::Acquire);
            let limit = self.turn(engine, is_stopping);
            if is_stopping && self.places.iter().all(Option::is_none) {
                return;
            }
            if let Err(error) = self.ring.wait(limit) {
                process::fatal(format_args!("io_uring failed: {error}"));
            }
            while let Some((token, result)) = self.ring.completed() {
                self.complete(token, result);
            }
        }
    }

    /// Gives each connection its turn, and says how long there is nothing to do but I/O.
    fn turn(&mut self, engine: &Engine, is_stopping: bool) -> Option<Duration> {
        let now = Instant::now();
        if is_stopping {
            self.give_up_fetches();
        }
        let mut limit: Option<Duration> = None;
        for slot in 0..self.places.len() {
            let Some(place) = &mut self.places[slot] else { continue };
            if is_stopping && place.state != State::Over {
                place.state = State::Over;
                place.link.cancel(&mut self.ring, slot);
            }
            let wanted = place.turn(&mut self.ring, &self.context, slot, now);
            limit = [limit, wanted].into_iter().flatten().min();
            while let Some((want, backed)) = place.link.next_want() {
                self.fetches.want((slot, want), backed, now);
            }
            if place.state == State::Over && !place.link.is_busy() {
                self.retire(slot);
            }
        }
        // What was kept from an earlier read has landed at once, and its connection goes on.
        if self.begin_fetches(engine) { Some(Duration::ZERO) } else { limit }
    }

    fn complete(&mut self, token: Token, result: i32) {
        let (slot, is_send) = match token {
            Token::Ignored => return,
            Token::Woken => return self.welcome(),
            Token::Supply if result < 0 => return self.context.side.waker.unclaim(),
            Token::Supply => return,
            Token::Writeback if result < 0 => return self.context.side.backing.waker().unclaim(),
            Token::Writeback => return,
            Token::Fetch(read) => return self.fetched(read, result),
            Token::Receive(slot) => (slot, false),
            Token::Send(slot) => (slot, true),
        };
        let place = self.places[slot].as_mut();
        let place = place.expect("a connection stays while the kernel works on it");
        let outcome = if is_send { place.link.sent(result) } else { place.link.received(result) };
        match outcome {
            _ if place.state == State::Over => {}
            Outcome::Later => place.paused = true,
            // The rest of it. The connection may be receiving meanwhile, and has no turn then.
            Outcome::Done if is_send && place.link.has_unsent() => {
                place.link.send(&mut self.ring, slot);
            }
            Outcome::Done => {}
            // It says nothing more, and may still listen to the rest of an answer.
            Outcome::Over if !is_send && result == 0 && place.link.has_answers() => {
                place.state = State::Ending;
            }
            Outcome::Over => {
                place.state = State::Over;
                place.link.cancel(&mut self.ring, slot);
            }
        }
    }

    /// Reads what is wanted from the backing file, as far as there is room for it; true if something had been read
    /// already.
    fn begin_fetches(&mut self, engine: &Engine) -> bool {
        self.fetches.release(|_| true);
        let mut has_landed = false;
        while let Some((read, entry)) = self.fetches.begin(engine) {
            match entry {
                Some(_) => self.ring.fetch(&self.fetches, read),
                None => {
                    self.land_all(read);
                    has_landed = true;
                }
            }
        }
        has_landed
    }

    /// A read of the backing file has completed with this.
    fn fetched(&mut self, read: usize, result: i32) {
        match self.fetches.ended(read, result) {
            Ended::Again => self.ring.fetch(&self.fetches, read),
            Ended::Over => self.land_all(read),
        }
    }

    /// Hands over the pages whose blocks a read has brought, or has not.
    fn land_all(&mut self, read: usize) {
        while let Some(fetched) = self.fetches.take(read) {
            let Fetched { who: (slot, want), since, image, .. } = fetched;
            let image = image.ok().map(|image| self.fetches.image(image));
            let place = waiting(&mut self.places, slot);
            if let Some(backed) = place.link.landed(want, image, since.elapsed()) {
                // It has been moved meanwhile.
                self.fetches.want((slot, want), backed, since);
            }
            place.answer(&mut self.ring, slot);
        }
    }

    /// Gives up what is read from the backing file: it is for connections that end now, and the file may never
    /// answer.
    fn give_up_fetches(&mut self) {
        while let Some((slot, want)) = self.fetches.give_up() {
            waiting(&mut self.places, slot).link.give_up(want);
        }
    }

    /// Takes in connections that have come.
    fn welcome(&mut self) {
        let mut count = [0; 8];
        // Would block if it was spurious; the count itself says nothing.
        let _ = rustix::io::read(&self.context.wake, &mut count);
        self.ring.watch(self.context.wake.as_raw_fd());
        while let Ok(link) = self.context.arrivals.try_recv() {
            // The server knows how many places there are.
            let free = self.places.iter_mut().find(|place| place.is_none());
            let free = free.expect("a connection came that there is no place for");
            *free = Some(Place { link, state: State::Open, paused: false });
        }
    }

    /// Lets a connection go.
    fn retire(&mut self, slot: usize) {
        let Some(mut place) = self.places[slot].take() else { return };
        if let Some(protocol) = place.link.protocol() {
            protocol.end();
        }
        // There is room for all connections, so that it fails only if nobody is there to take it;
        // then it is freed here.
        let _ = self.context.retired.try_send(place.link);
        self.ring.signal(self.context.retired_wake.as_raw_fd(), Token::Ignored);
    }
}

/// A place whose connection something is read for.
fn waiting(places: &mut [Option<Place>], slot: usize) -> &mut Place {
    places[slot].as_mut().expect("a connection stays while something is read for it")
}

impl Place {
    /// Goes on as far as possible, and says how long there is nothing to do but I/O.
    fn turn(
        &mut self,
        ring: &mut Ring,
        context: &WorkerContext,
        slot: usize,
        now: Instant,
    ) -> Option<Duration> {
        let in_time = self.is_in_time(now);
        if !in_time && self.state != State::Over {
            self.state = State::Over;
            self.link.cancel(ring, slot);
        }
        let waiting = self.link.is_negotiating().then_some(NEGOTIATION_PERIOD);
        // A pause ends with the next turn, for which this asks.
        let was_paused = std::mem::take(&mut self.paused);
        if was_paused {
            return Some(STARVED_RETRY);
        }
        if self.resend(ring, slot) {
            return waiting;
        }
        let Some(protocol) = self.link.protocol() else { return waiting };
        match self.state {
            State::Open => {}
            State::Ending if protocol.is_reading() => return waiting,
            State::Ending | State::Over => {
                // What was to be sent has been, or cannot be.
                self.state = State::Over;
                return waiting;
            }
        }
        let progress = protocol.advance(now);
        let has_output = !protocol.outbox.is_empty();
        // Whoever wins the claim wakes the thread for all.
        if protocol.supply_wanted() && context.side.waker.claim() {
            ring.signal(context.side.waker.fd(), Token::Supply);
        }
        let writer = context.side.backing.waker();
        if protocol.writeback_wanted() && writer.claim() {
            ring.signal(writer.fd(), Token::Writeback);
        }
        self.state = match progress {
            Progress::End if has_output => State::Ending,
            Progress::End => State::Over,
            Progress::Busy
            | Progress::Flush
            | Progress::Hungry
            | Progress::Reading
            | Progress::Starved => State::Open,
        };
        if has_output {
            self.link.send(ring, slot);
        }
        match progress {
            Progress::Hungry => {
                self.link.receive(ring, slot);
                waiting
            }
            Progress::Starved if !has_output => Some(STARVED_RETRY),
            Progress::Busy if !has_output => Some(Duration::ZERO),
            _ => waiting,
        }
    }

    /// Sends the answer that a page has made whole: the connection may be receiving meanwhile, and has no turn then.
    fn answer(&mut self, ring: &mut Ring, slot: usize) {
        if self.state != State::Over && !self.paused {
            self.resend(ring, slot);
        }
    }

    /// Sends what a send that failed for want of memory has left; true if there is any.
    fn resend(&mut self, ring: &mut Ring, slot: usize) -> bool {
        let left = self.state != State::Over && !self.link.is_sending() && self.link.has_unsent();
        if left {
            self.link.send(ring, slot);
        }
        left
    }

    fn is_in_time(&self, now: Instant) -> bool {
        !self.link.is_negotiating()
            || now.saturating_duration_since(self.link.since) < NEGOTIATION_MAX
    }
}
