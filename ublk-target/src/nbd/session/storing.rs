//! Writes, trims and zeroings: page by page, as far as there is memory.

use std::time::{Duration, Instant};

use tmem::{OBJECT_PAGES, PAGE_SIZE};

use super::{Desk, Doing, Progress, Session};
use crate::bytes::{Part, Stored};
use crate::device::{self, Op, Outcome};
use crate::nbd::reply::{error_of, simple_reply};
use crate::nbd::wants::Goal;
use crate::nbd::wire::Error;

/// Pages that a trim drops for the effort of one: dropping takes a tenth of a put.
const TRIM_PAGES: usize = 8;

/// How long writes may wait for memory before they fail, from the first that finds none until one
/// finds some. A connection's requests are served in order, so all that is asked next waits too.
const STARVED_MAX: Duration = Duration::from_secs(1);

/// The same on an export for swap: who reads cannot go on without the page, and what a failed write
/// has not written is still in memory.
pub(super) const SWAP_STARVED_MAX: Duration = Duration::from_millis(200);

/// A write, a trim or a zeroing.
#[derive(Clone, Copy)]
pub(super) struct Storing {
    pub(super) cookie: u64,
    pub(super) at: u64,
    pub(super) left: u32,
    pub(super) what: Store,
    pub(super) failed: Option<Error>,
    /// Since when it waits for memory, if it does or did.
    pub(super) waiting_since: Option<Instant>,
}

#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum Store {
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
    pub(super) fn op(self) -> Op {
        match self {
            Store::Data => Op::Write,
            Store::Trim => Op::Discard,
            Store::Holes | Store::Zeros => Op::WriteZeroes,
        }
    }
}

impl Session {
    pub(super) fn store_on(
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
}
