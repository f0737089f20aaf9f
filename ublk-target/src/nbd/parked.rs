//! Reads that wait for the backing file while their connection goes on with what comes next.
//!
//! What a read has in memory already is taken over with it, and each page that comes from the file is put in its place
//! there; when it is whole, or cannot become so any more, it is answered. How much may be parked is said beforehand: for what
//! has no place the connection waits ([`super::wants`]). Of each page that somebody was told to read he says how that
//! ended, and until then its read keeps its place. Nothing here allocates after [`Parked::new`].

use rustix::io::Errno;
use tmem::{Backed, PAGE_SIZE};

use super::buffer::zeroed;
use super::wants::{Goal, Wants};
use crate::bytes::{Part, Stored};

/// Pages of what may be parked on the connection of a client that asks for many things at a time: half of what the kernel's
/// asks for, if each is a page.
pub const PARKED_PAGES: usize = 64;

/// See the module's description.
pub struct Parked {
    /// A page for each place; the bytes of a read follow each other from its first place on.
    bytes: Box<[u8]>,
    places: Box<[Place]>,
    /// Wants that nobody was told of.
    untold: usize,
    /// Reads that are to be answered.
    whole: usize,
    /// How many have become whole so far.
    turns: u64,
}

/// Of two things: a read, if it is its first place, and one of its wants. Both are of the same read.
#[derive(Default)]
struct Place {
    /// It belongs to the read with this first place.
    first: Option<usize>,
    read: Option<Read>,
    want: Option<Want>,
}

/// A read that is parked.
struct Read {
    cookie: u64,
    bytes: usize,
    /// How many places it has.
    places: usize,
    /// Its wants that have not ended.
    left: usize,
    failed: Option<Errno>,
    /// When it has become whole, of all that have: it is answered in that order.
    turn: Option<u64>,
}

/// A page that a read waits for.
struct Want {
    part: Part,
    /// Where in the bytes it is to be.
    at: usize,
    backed: Backed,
    is_told: bool,
}

/// A read that is to be answered.
#[derive(Debug, Eq, PartialEq)]
pub struct Whole<'a> {
    /// The client's name for it.
    pub cookie: u64,
    /// What it reads.
    pub data: Result<&'a [u8], Errno>,
}

impl Parked {
    /// None, and the memory for so many pages.
    pub fn new(pages: usize) -> Self {
        let places = std::iter::repeat_with(Place::default).take(pages).collect();
        Self { bytes: zeroed(pages * PAGE_SIZE), places, untold: 0, whole: 0, turns: 0 }
    }

    /// Parks a read that wants these, of which nobody was told. Its data, as far as it is there, was at `start` of the outbox.
    /// False if there is no room for it, and nothing was done.
    pub fn park(&mut self, cookie: u64, start: usize, data: &[u8], wants: &Wants) -> bool {
        let left = wants.list().len();
        let count = data.len().div_ceil(PAGE_SIZE).max(left);
        let Some(first) = self.room_for(count) else { return false };
        let bytes = first * PAGE_SIZE;
        self.bytes[bytes..][..data.len()].copy_from_slice(data);
        for place in &mut self.places[first..first + count] {
            place.first = Some(first);
        }
        for (place, want) in self.places[first..].iter_mut().zip(wants.list()) {
            let Goal::Outbox(target) = want.goal else { panic!("a write is not parked") };
            let (part, backed) = (want.part.clone(), want.backed);
            place.want = Some(Want { part, at: bytes + target - start, backed, is_told: false });
        }
        let read =
            Read { cookie, bytes: data.len(), places: count, left, failed: None, turn: None };
        self.places[first].read = Some(read);
        self.untold += left;
        true
    }

    /// The first of so many free places in a row.
    fn room_for(&self, count: usize) -> Option<usize> {
        let mut free = 0;
        let end = self.places.iter().position(|place| {
            free = if place.first.is_none() { free + 1 } else { 0 };
            free == count
        })?;
        Some(end + 1 - count)
    }

    /// The next that is wanted and that was not told: its number, and where it is.
    pub fn next(&mut self) -> Option<(usize, Backed)> {
        if self.untold == 0 {
            return None;
        }
        self.untold -= 1;
        let mut wants = self.places.iter_mut().map(|place| place.want.as_mut()).enumerate();
        wants.find_map(|(number, want)| {
            let want = want.filter(|want| !want.is_told)?;
            want.is_told = true;
            Some((number, want.backed))
        })
    }

    /// Whether anybody was told to read something, or will be, and has not said how that ended.
    pub fn are_wanting(&self) -> bool {
        self.reads().any(|read| read.left > 0)
    }

    /// Whether there are reads that were not answered.
    pub fn is_empty(&self) -> bool {
        self.reads().next().is_none()
    }

    fn reads(&self) -> impl Iterator<Item = &Read> {
        self.places.iter().filter_map(|place| place.read.as_ref())
    }

    /// Whether the read that a want is of has come to nothing.
    pub fn has_failed(&self, number: usize) -> bool {
        let first = self.places[number].first.expect("what is wanted is of a read");
        self.places[first].read.as_ref().is_some_and(|read| read.failed.is_some())
    }

    /// What is wanted by that number: of which page, where it is, and where its bytes are to be.
    pub fn get(&mut self, number: usize) -> (&Part, Backed, &mut [u8]) {
        let want = self.places[number].want.as_ref().expect("who is told of it knows its number");
        (&want.part, want.backed, &mut self.bytes[want.at..][..want.part.bytes()])
    }

    /// It has landed, and this came of it. Where it is to be waited for on, if it is.
    pub fn landed(&mut self, number: usize, landed: Stored) -> Option<Backed> {
        let place = &mut self.places[number];
        if let (Stored::Backed(backed), Some(want)) = (landed, &mut place.want) {
            want.backed = backed;
            return Some(backed);
        }
        place.want = None;
        let first = place.first.expect("what is wanted is of a read");
        let read = self.places[first].read.as_mut().expect("a read waits for all that it wants");
        read.left -= 1;
        match landed {
            Stored::Done => {}
            Stored::Failed(errno) => read.failed = Some(errno),
            Stored::Backed(_) | Stored::Starved => unreachable!("nothing was stored"),
        }
        if read.left == 0 {
            read.turn = Some(self.turns);
            self.turns += 1;
            self.whole += 1;
        }
        None
    }

    /// The one that is to be answered next, if its answer has no more bytes of data than that. It is gone with
    /// [`Parked::answered`].
    pub fn next_whole(&self, room: usize) -> Option<(usize, Whole<'_>)> {
        if self.whole == 0 {
            return None;
        }
        let reads = self.places.iter().enumerate();
        let reads = reads.filter_map(|(first, place)| Some((first, place.read.as_ref()?)));
        let whole = reads.filter(|(_, read)| read.turn.is_some());
        let next = whole.min_by_key(|(_, read)| read.turn);
        let (first, read) = next.filter(|(_, read)| read.bytes <= room)?;
        let data = read.failed.map_or(Ok(&self.bytes[first * PAGE_SIZE..][..read.bytes]), Err);
        Some((first, Whole { cookie: read.cookie, data }))
    }

    /// What [`Parked::next_whole`] has named was answered.
    pub fn answered(&mut self, first: usize) {
        let read = self.places[first].read.take().expect("what is answered is parked");
        assert!(read.turn.is_some(), "answered before it was whole");
        self.whole -= 1;
        for place in &mut self.places[first..first + read.places] {
            assert!(place.want.is_none(), "a page is wanted for what was answered");
            place.first = None;
        }
    }
}
