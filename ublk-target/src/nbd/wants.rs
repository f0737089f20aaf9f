//! What a session waits for: pages that it needs and that are on the backing file.
//!
//! Each is noted with what it is for, handed out once to whoever reads the file, and ends when its block has
//! landed. They keep their numbers until all have ended. Nothing here allocates after [`Wants::new`].

use tmem::{Backed, PAGE_SIZE};

use super::buffer::DATA_BYTES;
use crate::bytes::{Part, Stored};

/// Pages that a session waits for at most: those of so much data that does not begin with a page.
pub const WANTS_MAX: usize = DATA_BYTES / PAGE_SIZE + 1;

/// A page that is waited for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Want {
    /// What of it is needed.
    pub part: Part,
    /// What for.
    pub goal: Goal,
    /// Where it is.
    pub backed: Backed,
}

/// What a page is waited for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Goal {
    /// A part of it is to be changed, which takes it in memory.
    Memory,
    /// A part of it is read, to this place in the outbox.
    Outbox(usize),
}

/// See the module's description.
pub struct Wants {
    list: Vec<Want>,
    /// So many were handed out.
    handed_out: usize,
    /// So many have not ended.
    left: usize,
    /// What one of them came to, if not to what it should.
    trouble: Stored,
}

impl Wants {
    /// None, and the memory for all that there can be.
    pub fn new() -> Self {
        let list = Vec::with_capacity(WANTS_MAX);
        Self { list, handed_out: 0, left: 0, trouble: Stored::Done }
    }

    /// Notes a page.
    ///
    /// # Panics
    ///
    /// If there are [`WANTS_MAX`].
    pub fn note(&mut self, part: Part, goal: Goal, backed: Backed) {
        assert!(self.list.len() < WANTS_MAX, "more is waited for than one call can read");
        self.list.push(Want { part, goal, backed });
        self.left += 1;
    }

    /// The next that was not handed out: its number, and where it is.
    pub fn next(&mut self) -> Option<(usize, Backed)> {
        let number = self.handed_out;
        let want = self.list.get(number)?;
        self.handed_out += 1;
        Some((number, want.backed))
    }

    /// All of them, those that have ended included.
    pub fn list(&self) -> &[Want] {
        &self.list
    }

    /// Whether any has not ended.
    pub fn are_left(&self) -> bool {
        self.left > 0
    }

    /// Whether one has come to nothing, so that the others are of no use.
    pub fn have_failed(&self) -> bool {
        self.trouble != Stored::Done
    }

    /// One of them.
    pub fn get(&self, number: usize) -> &Want {
        &self.list[number]
    }

    /// One has landed, and this came of it. Where it is to be waited for on, if it is.
    pub fn landed(&mut self, number: usize, landed: Stored) -> Option<Backed> {
        if let Stored::Backed(backed) = landed {
            self.list[number].backed = backed;
            return Some(backed);
        }
        self.left -= 1;
        if landed != Stored::Done {
            self.trouble = landed;
        }
        None
    }

    /// Forgets all of them, of which none is left or none was handed out. Returns what they came to: done, or what
    /// the last that was not came to.
    pub fn conclude(&mut self) -> Stored {
        assert!(self.left == 0 || self.handed_out == 0, "what is read is forgotten");
        self.list.clear();
        (self.handed_out, self.left) = (0, 0);
        std::mem::replace(&mut self.trouble, Stored::Done)
    }
}
