//! Reads that wait for the backing file while their connection goes on with what comes next.
//!
//! What a read has in memory already is taken over with it, and each page that comes from the file is put in its place;
//! when it is whole, or cannot become so any more, it is answered. Each of its pages has a place, and how many there are is said
//! beforehand: for what has none the connection waits ([`super::wants`]). Of each page that somebody was told to read he
//! says how that ended, and until then its read keeps its places. Nothing here allocates after [`Parked::new`].

use std::collections::VecDeque;

use rustix::io::Errno;
use tmem::{Backed, PAGE_SIZE};

use super::buffer::zeroed;
use super::wants::{Goal, Wants};
use crate::bytes::{Part, Stored};

/// Pages of reads that may be parked on the connection of a client that asks for many things at a time: half of what the
/// kernel's asks for, if each is a page.
pub const PARKED_PAGES: usize = 64;

/// See the module's description.
pub struct Parked {
    /// A page for each place.
    bytes: Box<[u8]>,
    places: Box<[Place]>,
    free: Vec<usize>,
    /// Places of wants that nobody was told of.
    untold: VecDeque<usize>,
    /// Reads that are to be answered.
    whole: usize,
    /// How many have become whole so far.
    turns: u64,
}

/// A place for a part of a read.
#[derive(Default)]
struct Place {
    /// The read's first place; none if nobody has this one.
    first: Option<usize>,
    /// The place of the read's next part.
    next: Option<usize>,
    /// Bytes of the part.
    bytes: usize,
    /// In its first place, the read.
    read: Option<Read>,
    /// What of it is waited for.
    want: Option<Want>,
}

/// A read that is parked.
struct Read {
    cookie: u64,
    bytes: usize,
    /// Its wants that have not ended.
    left: usize,
    failed: Option<Errno>,
    /// Nobody waits for its answer any more.
    is_given_up: bool,
    /// When it has become whole, of all that have: it is answered in that order.
    turn: Option<u64>,
}

/// A page that a read waits for.
struct Want {
    part: Part,
    backed: Backed,
}

/// A read that is to be answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Whole {
    /// The client's name for it.
    pub cookie: u64,
    /// Why it cannot be read, if it cannot.
    pub failed: Option<Errno>,
    first: usize,
}

impl Parked {
    /// None, and the memory for so many pages.
    pub fn new(pages: usize) -> Self {
        let places = std::iter::repeat_with(Place::default).take(pages).collect();
        let (bytes, free) = (zeroed(pages * PAGE_SIZE), (0..pages).collect());
        let untold = VecDeque::with_capacity(pages);
        Self { bytes, places, free, untold, whole: 0, turns: 0 }
    }

    /// Parks a read from `from` on that wants these pages, nobody having been told of them. Its data, as far as it is there, is
    /// at `start` of the outbox. False if there is no room for it, and nothing was done.
    pub fn park(
        &mut self,
        cookie: u64,
        from: u64,
        start: usize,
        data: &[u8],
        wants: &Wants,
    ) -> bool {
        if Part::all(from, data.len()).count() > self.free.len() {
            return false;
        }
        let mut wants = wants.list().iter().peekable();
        let (mut chain, mut left) = (None::<(usize, usize)>, 0);
        for (at, part) in Part::all(from, data.len()) {
            let place = self.free.pop().expect("they were counted");
            let (first, last) = chain.unwrap_or((place, place));
            if last != place {
                self.places[last].next = Some(place);
            }
            chain = Some((first, place));
            let want = wants.next_if(|want| want.goal == Goal::Outbox(start + at));
            if want.is_some() {
                self.untold.push_back(place);
                left += 1;
            } else {
                let target = &mut self.bytes[place * PAGE_SIZE..][..part.bytes()];
                target.copy_from_slice(&data[at..at + part.bytes()]);
            }
            self.places[place] = Place {
                first: Some(first),
                next: None,
                bytes: part.bytes(),
                read: None,
                want: want.map(|want| Want { part, backed: want.backed }),
            };
        }
        assert!(wants.next().is_none() && left > 0, "what is parked wants pages of its own");
        let (first, _) = chain.expect("what wants a page has one");
        let bytes = data.len();
        let read = Read { cookie, bytes, left, failed: None, is_given_up: false, turn: None };
        self.places[first].read = Some(read);
        true
    }

    /// The next that is wanted and that was not told: its number, and where it is.
    pub fn next(&mut self) -> Option<(usize, Backed)> {
        let number = self.untold.pop_front()?;
        let want = self.places[number].want.as_ref().expect("nobody knows of it");
        Some((number, want.backed))
    }

    /// Whether anybody was told to read something, or will be, and has not said how that ended.
    pub fn are_wanting(&self) -> bool {
        self.reads().any(|read| read.left > 0)
    }

    /// Whether all reads were answered.
    pub fn is_empty(&self) -> bool {
        self.reads().next().is_none()
    }

    fn reads(&self) -> impl Iterator<Item = &Read> {
        self.places.iter().filter_map(|place| place.read.as_ref())
    }

    /// Whether the read that a want is of has come to nothing.
    pub fn has_failed(&self, number: usize) -> bool {
        let read = &self.places[self.first_of(number)].read;
        read.as_ref().is_some_and(|read| read.failed.is_some())
    }

    fn first_of(&self, number: usize) -> usize {
        self.places[number].first.expect("what is wanted is of a read")
    }

    /// What is wanted by that number: of which page, where it is, and where its bytes are to be.
    pub fn get(&mut self, number: usize) -> (&Part, Backed, &mut [u8]) {
        let want = self.places[number].want.as_ref().expect("who is told of it knows its number");
        (&want.part, want.backed, &mut self.bytes[number * PAGE_SIZE..][..want.part.bytes()])
    }

    /// It has landed, and this came of it. Where it is to be waited for on, if it is.
    pub fn landed(&mut self, number: usize, landed: Stored) -> Option<Backed> {
        if let (Stored::Backed(backed), Some(want)) = (landed, &mut self.places[number].want) {
            want.backed = backed;
            return Some(backed);
        }
        let read = self.ended(number);
        match landed {
            Stored::Done => {}
            Stored::Failed(errno) => read.failed = Some(errno),
            Stored::Backed(_) | Stored::Starved => unreachable!("nothing was stored"),
        }
        self.conclude(number);
        None
    }

    /// It is not read, because the connection ends: its read is not answered.
    pub fn give_up(&mut self, number: usize) {
        self.ended(number).is_given_up = true;
        self.conclude(number);
    }

    /// It is wanted no more; the read that it was of.
    fn ended(&mut self, number: usize) -> &mut Read {
        self.places[number].want = None;
        let first = self.first_of(number);
        let read = self.places[first].read.as_mut().expect("a read waits for all that it wants");
        read.left -= 1;
        read
    }

    /// If it was the last that its read wanted, that is to be answered, or forgotten.
    fn conclude(&mut self, number: usize) {
        let first = self.first_of(number);
        let read = self.places[first].read.as_mut().filter(|read| read.left == 0);
        let Some(read) = read else { return };
        if read.is_given_up {
            return self.free(first);
        }
        read.turn = Some(self.turns);
        self.turns += 1;
        self.whole += 1;
    }

    /// The one that is to be answered next, if it has no more bytes of data than that: [`Parked::answered`] is told when it is.
    pub fn next_whole(&self, room: usize) -> Option<Whole> {
        if self.whole == 0 {
            return None;
        }
        let reads = self.places.iter().enumerate();
        let reads = reads.filter_map(|(first, place)| Some((first, place.read.as_ref()?)));
        let whole = reads.filter(|(_, read)| read.turn.is_some());
        let (first, read) = whole.min_by_key(|(_, read)| read.turn)?;
        let Read { cookie, failed, .. } = *read;
        (read.bytes <= room).then_some(Whole { cookie, failed, first })
    }

    /// The data of a read that is whole, piece by piece.
    pub fn data(&self, whole: Whole) -> impl Iterator<Item = &[u8]> {
        let next = |place: &usize| self.places[*place].next;
        let places = std::iter::successors(Some(whole.first), next);
        places.map(|place| &self.bytes[place * PAGE_SIZE..][..self.places[place].bytes])
    }

    /// It was answered, and is gone.
    pub fn answered(&mut self, whole: Whole) {
        self.whole -= 1;
        self.free(whole.first);
    }

    fn free(&mut self, first: usize) {
        let mut place = Some(first);
        while let Some(number) = place {
            let freed = std::mem::take(&mut self.places[number]);
            assert!(freed.want.is_none(), "a page is wanted for what is over");
            self.free.push(number);
            place = freed.next;
        }
    }
}
