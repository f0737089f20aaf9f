//! Which page of which request a queue's thread serves next.
//!
//! Reads and writes are put in line, apart, and served page by page: reads first, but for
//! every [`READS_IN_ROW`] of their pages one of a write that waits; between two pages the thread looks
//! whether more has come. Helpers take pages off the other end. Pages that are on the backing file are fetched
//! when the rest of their request is done; it waits for them, and nothing else does.
//!
//! Guarantees: reads are served while writes wait for memory; no write waits longer than
//! [`STARVED_MAX`], and when waiting writes have taken most of the queue's tags, [`CROWDED_MAX`]; writes
//! that wait keep their order. A turn of serving has at most [`TURN_COST`] of work. Nothing here allocates,
//! blocks or makes a system call, but for reading the clock, or knows of the driver:
//! [`super::queue`] brings both together.

mod fetching;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tmem::{BATCH_PAGES, BatchError, Board, PutError, Step, Way};

use super::buffers::Buffers;
use crate::backing::{Backing, Fetches};
use crate::device::{BlockDevice, IoCounters, Op, Outcome, Request, Trouble};

/// How long a write may wait for the arena to grow before it fails.
const STARVED_MAX: Duration = Duration::from_secs(1);

/// How long it may wait while more than three quarters of the queue's tags wait with it. A request that has no
/// tag does not reach us, and a read is worth more than a write: who reads cannot go on without the
/// page, and what a failed write of swap has not written is still in memory.
const CROWDED_MAX: Duration = Duration::from_millis(200);

/// How long to wait for other I/O before starved writes are tried again.
const STARVED_RETRY: Duration = Duration::from_millis(2);

/// How long to wait for other I/O before what helpers have not finished is looked at again. They have
/// had the time of a page before that, so they are not running.
const HELPED_RETRY: Duration = Duration::from_micros(50);

/// Turns of waiting for a helper that is at its last page: some 5 us.
const HELPED_SPINS: u32 = 200;

/// What a page costs to get and to put, in about half microseconds.
const GET_COST: u32 = 3;
const PUT_COST: u32 = 10;

/// Work in line from which on a helper is called. It has to wake up first, which takes longer on a
/// virtual machine, and there must be something left for it then.
const HELP_COST: u32 = 12 * PUT_COST;

/// Work after which what is done goes to the kernel, though there is more.
const TURN_COST: u32 = 16 * PUT_COST;

/// Pages of reads that are served in a row while a write waits.
const READS_IN_ROW: u32 = 16;

/// For how long a queue's thread may wait for something to come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rest {
    /// It may not: there is work.
    None,
    /// Something has to be looked at again then.
    For(Duration),
    /// Without end.
    Forever,
}

/// The reads and writes of a queue that are under way.
pub struct Schedule {
    device: Arc<BlockDevice>,
    /// One set a queue; `id` is this one's.
    counters: Arc<[IoCounters]>,
    id: usize,
    engine_queue: tmem::Queue,
    buffers: Buffers,
    /// By tag.
    requests: Box<[Underway]>,
    /// Tags that have left their line, of which helpers may have a page still.
    leaving: Vec<u16>,
    /// What the reads and writes in line cost, those pages included that are done.
    in_line: u32,
    /// Whether puts are in line of which the last that was tried found no memory.
    starving: bool,
    /// Pages of reads since the last one of a write.
    reads_in_row: u32,
    /// Pages that are read from the backing file: tag, and place in the request.
    fetches: Fetches<(usize, u32)>,
}

/// A read or write under way.
#[derive(Clone, Copy)]
struct Underway {
    request: Request,
    /// What it met with.
    trouble: Option<Trouble>,
    /// Since when it has been waiting for memory.
    starved: Option<Instant>,
    /// Pages of it that are fetched, or are to be.
    fetching: u32,
}

impl Underway {
    fn new(request: Request) -> Self {
        Self { request, trouble: None, starved: None, fetching: 0 }
    }

    /// Notes that a page failed. The first of the request counts.
    fn note(&mut self, page: u32, error: BatchError) {
        match self.trouble {
            Some(Trouble::Page(first, _)) if first < page => {}
            _ => self.trouble = Some(Trouble::Page(page, error)),
        }
    }
}

impl Schedule {
    /// For the queue `id` of a device, which has these buffers.
    pub fn new(
        device: Arc<BlockDevice>,
        counters: Arc<[IoCounters]>,
        id: u16,
        buffers: Buffers,
        backing: Arc<Backing>,
    ) -> Self {
        let tags = buffers.tags();
        let none = Underway::new(Request::new(Op::Flush, 0, 0));
        Self {
            engine_queue: device.queue(),
            device,
            counters,
            id: id.into(),
            buffers,
            requests: vec![none; tags].into(),
            leaving: Vec::with_capacity(tags),
            in_line: 0,
            starving: false,
            reads_in_row: 0,
            fetches: Fetches::new(backing, tags * BATCH_PAGES as usize),
        }
    }

    /// What the queue counts.
    pub fn counters(&self) -> &IoCounters {
        &self.counters[self.id]
    }

    /// The buffers.
    pub fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// What helpers look at.
    pub fn board(&self) -> &Board {
        self.buffers.board()
    }

    /// Puts a new read or write in line. Anything else is done at once, and this is how it ended.
    pub fn came(&mut self, tag: u16, request: Request) -> Option<Outcome> {
        self.counters[self.id].came(request.op);
        let Some(way) = way_of(request.op) else {
            return Some(self.count(&request, self.device.carry_out(&request)));
        };
        if !self.device.admits(&request) {
            return Some(self.count(&request, Outcome::Failed(Errno::INVAL)));
        }
        let mut underway = Underway::new(request);
        if way == Way::Put && self.starving {
            self.count(&request, Outcome::Starved);
            underway.starved = Some(Instant::now());
        }
        self.requests[usize::from(tag)] = underway;
        self.buffers.open(tag, way, self.device.pool(), &request);
        self.in_line += cost(way) * request.pages;
        None
    }

    /// Whether there is enough to do for two, and something that a helper may do.
    pub fn wants_help(&self) -> bool {
        self.in_line >= HELP_COST && !self.starving && self.board().needs_help()
    }

    /// For how long there is nothing to do.
    pub fn rest(&self) -> Rest {
        let is_put_in_line = self.buffers.first(Way::Put).is_some();
        if self.buffers.first(Way::Get).is_some() || is_put_in_line && !self.starving {
            return Rest::None;
        }
        // What is fetched says so when it has come.
        let is_helped = self.leaving.iter().any(|tag| !self.is_fetched(*tag));
        match (is_helped, is_put_in_line) {
            (true, _) => Rest::For(HELPED_RETRY),
            (false, true) => Rest::For(STARVED_RETRY),
            (false, false) => Rest::Forever,
        }
    }

    /// Serves pages until none are left, something has come, or it is time to hand over what is done.
    pub fn serve(&mut self, mut has_news: impl FnMut() -> bool) {
        let (mut spent, mut can_put) = (0, true);
        while spent < TURN_COST {
            let get = self.buffers.first(Way::Get);
            let put = self.buffers.first(Way::Put).filter(|_| can_put);
            let (way, tag) = match (get, put) {
                (Some(_), Some(tag)) if self.reads_in_row >= READS_IN_ROW => (Way::Put, tag),
                (Some(tag), _) => (Way::Get, tag),
                (None, Some(tag)) => (Way::Put, tag),
                (None, None) => break,
            };
            self.reads_in_row = if way == Way::Get { self.reads_in_row + 1 } else { 0 };
            can_put = self.step(way, tag) && can_put;
            spent += cost(way);
            if has_news() {
                return;
            }
        }
        self.spin_for_helpers(has_news);
    }

    /// Does a page of the first request in a line, or takes it out of the line if there is none left
    /// to do. False if there is no memory for a put.
    fn step(&mut self, way: Way, tag: usize) -> bool {
        let is_over = match self.buffers.step(self.device.engine(), &mut self.engine_queue, tag) {
            Step::Failed { error: BatchError::Put(PutError::Starved), .. } => {
                self.starve();
                return false;
            }
            Step::Failed { page, error } => {
                self.requests[tag].note(page, error);
                self.starving &= way == Way::Get;
                true
            }
            Step::Backed { page, backed } => {
                self.requests[tag].fetching += 1;
                self.fetches.want((tag, page), backed, Instant::now());
                self.buffers.is_taken(tag)
            }
            Step::Done => {
                self.starving &= way == Way::Get;
                self.buffers.is_taken(tag)
            }
            Step::Taken => true,
        };
        if is_over {
            self.leave(way, tag);
        }
        true
    }

    /// Notes that all writes in line wait for memory now.
    fn starve(&mut self) {
        self.starving = true;
        let now = Instant::now();
        for tag in self.buffers.waiting(Way::Put) {
            let underway = &mut self.requests[tag];
            if underway.starved.is_none() {
                underway.starved = Some(now);
                self.counters[self.id].ended(&underway.request, Outcome::Starved);
            }
        }
    }

    /// Takes the first request out of its line. Helpers take nothing more of it.
    fn leave(&mut self, way: Way, tag: usize) {
        let left = self.buffers.leave(way);
        assert_eq!(left, tag, "the first in line is another");
        self.buffers.close(tag);
        self.in_line -= cost(way) * self.requests[tag].request.pages;
        self.starving &= self.buffers.first(Way::Put).is_some();
        // Only now, so that neighbours are fetched together, and that nobody takes a page again that could not be.
        self.fetches.release(|(whose, _)| whose == tag);
        // Each tag is in it once at most, so it never grows.
        self.leaving.push(tag as u16);
    }

    /// Gives up the first writes in line that have waited for memory as long as they may.
    pub fn give_up_overdue(&mut self, now: impl FnOnce() -> Instant) {
        if !self.starving {
            return;
        }
        let now = now();
        let mut waiting = self.buffers.waiting(Way::Put).count();
        while let Some(tag) = self.buffers.first(Way::Put) {
            let limit = patience(waiting, self.requests.len());
            let is_overdue = |since: Instant| now.saturating_duration_since(since) >= limit;
            if !self.requests[tag].starved.is_some_and(is_overdue) {
                return;
            }
            self.requests[tag].trouble = Some(Trouble::Starved);
            self.leave(Way::Put, tag);
            waiting -= 1;
        }
    }

    /// If there is nothing else to do, gives helpers the time to finish the pages that they are at.
    fn spin_for_helpers(&self, mut has_news: impl FnMut() -> bool) {
        for _ in 0..HELPED_SPINS {
            let is_over =
                |tag: &u16| self.is_fetched(*tag) || self.buffers.has_ended((*tag).into());
            let is_over = self.leaving.iter().all(is_over);
            if is_over || self.rest() == Rest::None || has_news() {
                return;
            }
            std::hint::spin_loop();
        }
    }

    /// A read or write on which nobody is at work any more, and how it ended. Its buffer may go back.
    pub fn next_ended(&mut self) -> Option<(u16, Outcome)> {
        loop {
            let ended = |tag: &u16| self.buffers.has_ended((*tag).into());
            let at = self.leaving.iter().position(ended)?;
            let tag = self.leaving.swap_remove(at);
            let Underway { request, trouble, starved, .. } = self.requests[usize::from(tag)];
            let done = self.buffers.done(tag.into());
            // What a helper gave back: to be done yet, if it is before the page that failed, which then is met again.
            let is_left = match trouble {
                None => done != u32::MAX,
                Some(Trouble::Page(page, _)) => done.trailing_ones() < page,
                Some(Trouble::Starved) => false,
            };
            if is_left {
                self.requests[usize::from(tag)].trouble = None;
                self.rejoin(tag, &request);
                continue;
            }
            if let Some(since) = starved {
                let waited = Instant::now().saturating_duration_since(since);
                self.counters[self.id].waited(waited);
            }
            let outcome = self.device.conclude(&request, trouble, done);
            return Some((tag, self.count(&request, outcome)));
        }
    }

    /// Puts a request in line again of which a helper has given back a page that it could not do.
    fn rejoin(&mut self, tag: u16, request: &Request) {
        let way = way_of(request.op).expect("only reads and writes are in line");
        self.buffers.rejoin(way, tag.into());
        self.in_line += cost(way) * request.pages;
    }

    fn count(&self, request: &Request, outcome: Outcome) -> Outcome {
        self.counters[self.id].ended(request, outcome);
        outcome
    }
}

/// What is done with the pages of a request that has some.
fn way_of(op: Op) -> Option<Way> {
    match op {
        Op::Read => Some(Way::Get),
        Op::Write => Some(Way::Put),
        Op::Discard | Op::Flush | Op::WriteZeroes => None,
    }
}

fn cost(way: Way) -> u32 {
    match way {
        Way::Get => GET_COST,
        Way::Put => PUT_COST,
    }
}

/// How long the first of so many waiting writes may wait for memory, in a queue of so many tags.
fn patience(waiting: usize, tags: usize) -> Duration {
    if waiting > tags * 3 / 4 { CROWDED_MAX } else { STARVED_MAX }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tmem::{PAGE_SIZE, Store};

    use super::super::buffers::Room;
    use super::super::sizing::IO_BYTES;
    use super::*;
    use crate::device::IoStats;
    use crate::device::tests::{device, dry_device, noise};

    pub(super) const TAGS: usize = 8;

    fn schedule(device: BlockDevice) -> Schedule {
        schedule_on(device, Arc::new(Backing::new().unwrap()))
    }

    pub(super) fn schedule_on(device: BlockDevice, backing: Arc<Backing>) -> Schedule {
        let room = Room { store: Store::new().unwrap(), pool: 0 };
        let mut buffers = Buffers::new(&room, 0, TAGS as u16).unwrap();
        for (tag, seed) in (0..TAGS).zip(1..) {
            let data = noise(IO_BYTES as usize / PAGE_SIZE, seed);
            buffers.fill(tag, data.as_array().unwrap());
        }
        let counters = Arc::new([IoCounters::default()]);
        Schedule::new(Arc::new(device), counters, 0, buffers, backing)
    }

    fn wet() -> Schedule {
        schedule(device(1 << 20).0)
    }

    pub(super) fn stats(schedule: &Schedule) -> IoStats {
        let mut stats = IoStats::default();
        schedule.counters[0].add_to(&mut stats);
        stats
    }

    pub(super) fn write(first: u64, pages: u32) -> Request {
        Request::new(Op::Write, first, pages)
    }

    pub(super) fn read(first: u64, pages: u32) -> Request {
        Request::new(Op::Read, first, pages)
    }

    pub(super) fn ended(schedule: &mut Schedule) -> Vec<(u16, Outcome)> {
        std::iter::from_fn(|| schedule.next_ended()).collect()
    }

    /// Serves to the end.
    fn finish(schedule: &mut Schedule) -> Vec<(u16, Outcome)> {
        let mut all = Vec::new();
        while schedule.rest() == Rest::None {
            schedule.serve(|| false);
            all.extend(ended(schedule));
        }
        all
    }

    fn puts(schedule: &Schedule) -> u64 {
        schedule.device.pool_stats().succ_puts
    }

    #[test]
    fn a_read_waits_for_one_page_of_a_write() {
        let mut schedule = wet();
        assert_eq!(schedule.rest(), Rest::Forever);
        assert_eq!(schedule.came(0, write(0, 32)), None);
        schedule.serve(|| true);
        assert_eq!((puts(&schedule), schedule.rest()), (1, Rest::None));
        assert_eq!(schedule.came(1, read(0, 2)), None);
        schedule.serve(|| false);
        assert_eq!(ended(&mut schedule), [(1, Outcome::Done(8192))]);
        let page = ..PAGE_SIZE;
        assert_eq!(schedule.buffers.of_ended(1)[page], noise(32, 1)[page]);
        assert!(schedule.buffers.of_ended(1)[PAGE_SIZE..2 * PAGE_SIZE].iter().all(|b| *b == 0));
        // What is done is handed over though there is more.
        let done = puts(&schedule);
        assert!((2..32).contains(&done), "{done}");
        assert_eq!(finish(&mut schedule), [(0, Outcome::Done(32 * 4096))]);
        assert_eq!((puts(&schedule), schedule.rest(), schedule.in_line), (32, Rest::Forever, 0));
    }

    #[test]
    fn a_write_has_its_turn_while_reads_keep_coming() {
        let mut schedule = wet();
        schedule.came(0, write(0, 3));
        for turn in 1..=3 {
            schedule.came(1, read(32, 2 * READS_IN_ROW));
            let mut pages = 0;
            while puts(&schedule) < turn {
                schedule.serve(|| true);
                pages += 1;
            }
            assert_eq!(pages, READS_IN_ROW + 1);
            while schedule.buffers.first(Way::Get).is_some() {
                schedule.step(Way::Get, 1);
            }
            ended(&mut schedule);
        }
    }

    #[test]
    fn reads_are_served_while_writes_wait_for_memory() {
        let mut schedule = schedule(dry_device(1 << 20));
        schedule.came(0, write(0, 32));
        schedule.came(1, write(40, 1));
        schedule.serve(|| false);
        assert_eq!((ended(&mut schedule), schedule.rest()), (vec![], Rest::For(STARVED_RETRY)));
        schedule.came(2, write(41, 1));
        schedule.came(3, read(50, 1));
        assert_eq!(schedule.rest(), Rest::None);
        schedule.serve(|| false);
        assert_eq!(ended(&mut schedule), [(3, Outcome::Done(4096))]);
        assert_eq!(stats(&schedule).deferred_writes, 3);
        // Nobody is called to what cannot be done.
        assert!(!schedule.wants_help());

        while schedule.device.engine().supply().unwrap().more {}
        schedule.serve(|| false);
        let order: Vec<_> = finish(&mut schedule).iter().map(|(tag, _)| *tag).collect();
        assert_eq!(order, [0, 1, 2]);
        assert_eq!((stats(&schedule).starved_errors, schedule.rest()), (0, Rest::Forever));
        assert!(stats(&schedule).deferred_ns_total > 0);
    }

    #[test]
    fn a_write_waits_no_longer_than_its_limit() {
        let mut schedule = schedule(dry_device(1 << 20));
        let start = Instant::now();
        schedule.came(0, write(0, 2));
        schedule.serve(|| false);
        schedule.give_up_overdue(|| start + CROWDED_MAX);
        assert_eq!(ended(&mut schedule), []);
        schedule.give_up_overdue(|| Instant::now() + STARVED_MAX);
        assert_eq!(ended(&mut schedule), [(0, Outcome::TimedOut)]);
        assert_eq!(schedule.device.pool_stats().given_up_puts, 2);
        assert_eq!((schedule.rest(), schedule.in_line), (Rest::Forever, 0));
        // The next one is tried, and waits only if there is no memory for it either.
        schedule.came(0, write(0, 2));
        assert_eq!((stats(&schedule).deferred_writes, schedule.rest()), (1, Rest::None));
        schedule.serve(|| false);
        assert_eq!(stats(&schedule).deferred_writes, 2);
        assert_eq!(schedule.rest(), Rest::For(STARVED_RETRY));
    }

    #[test]
    fn waiting_writes_leave_tags_for_reads() {
        let mut schedule = schedule(dry_device(1 << 20));
        for tag in 0..TAGS as u16 {
            assert_eq!(schedule.came(tag, write(tag.into(), 1)), None);
        }
        schedule.serve(|| false);
        schedule.give_up_overdue(|| Instant::now() + CROWDED_MAX);
        // The oldest ones, until three quarters of the tags are left.
        assert_eq!(ended(&mut schedule), [(0, Outcome::TimedOut), (1, Outcome::TimedOut)]);
    }

    #[test]
    fn what_a_helper_gives_back_is_done_all_the_same() {
        let mut schedule = schedule(dry_device(1 << 20));
        let device = Arc::clone(&schedule.device);
        schedule.came(0, write(0, 32));
        assert!(schedule.wants_help());
        // It finds no memory.
        assert!(!device.engine().help(&mut device.queue(), schedule.board()));
        assert!(!schedule.wants_help());
        while device.engine().supply().unwrap().more {}
        assert_eq!(finish(&mut schedule), [(0, Outcome::Done(32 * 4096))]);
        assert_eq!(puts(&schedule), 32);
    }

    #[test]
    fn a_helpers_pages_are_done_once() {
        let mut schedule = wet();
        let device = Arc::clone(&schedule.device);
        schedule.came(0, write(0, 32));
        let mut queue = device.queue();
        for _ in 0..20 {
            assert!(device.engine().help(&mut queue, schedule.board()));
        }
        assert_eq!(finish(&mut schedule), [(0, Outcome::Done(32 * 4096))]);
        assert_eq!(puts(&schedule), 32);
        schedule.came(1, read(0, 32));
        while device.engine().help(&mut queue, schedule.board()) {}
        assert_eq!(finish(&mut schedule), [(1, Outcome::Done(32 * 4096))]);
        assert_eq!(*schedule.buffers.of_ended(1), *noise(32, 1));
    }

    #[test]
    fn what_is_not_of_the_device_is_refused_at_once() {
        let mut schedule = wet();
        for request in [write(33, 32), read(64, 1), Request::new(Op::Discard, 60, 5)] {
            assert_eq!(schedule.came(0, request), Some(Outcome::Failed(Errno::INVAL)));
        }
        assert_eq!(schedule.came(0, Request::new(Op::Discard, 60, 4)), Some(Outcome::Done(0)));
        assert_eq!(stats(&schedule).io_errors, 3);
        assert_eq!(schedule.rest(), Rest::Forever);
    }

    /// A helper is at a page before the one that fails, and gives it back then.
    #[test]
    fn a_page_that_is_given_back_before_one_that_failed_is_done() {
        let mut schedule = wet();
        let device = Arc::clone(&schedule.device);
        (2..4).for_each(|page| device.engine().lose(tmem::Handle::from_page(device.pool(), page)));
        let (board, stop) = (Arc::clone(schedule.buffers.board()), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut queue = device.queue();
                    while !stop.load(Ordering::Relaxed) {
                        device.engine().help(&mut queue, &board);
                    }
                });
            }
            for _ in 0..200_000 {
                assert_eq!(schedule.came(0, read(0, 4)), None);
                let ended = loop {
                    schedule.serve(|| false);
                    if let Some(ended) = schedule.next_ended() {
                        break ended;
                    }
                };
                assert_eq!(ended, (0, Outcome::Done(2 * 4096)));
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
