//! Cleaning: what is alive in a segment goes elsewhere, and the segment is free.
//!
//! ```text
//!   segment in hand --read--> unit --what is alive, packed anew--> unit --write--> slots point there
//! ```
//!
//! A segment that is being cleaned (a *victim*) is in hand until all that was alive in it has been written
//! elsewhere, so its place is not used again before, and a slot that points into it points at what was
//! read. It is let go unfinished when there is no room for what is alive in it, and is as it was then.
//!
//! There is always a segment that can be opened for it: some are in reserve, and one of these has frames for its
//! entries, or there are frames for them. As no victim has more alive than 11/12 of what it takes, each one
//! that is cleaned makes room for a part of the next. A process that dies meanwhile leaves as many free ones: what it
//! had moved of a victim is undone ([`super::moves`]) unless all of that was, and then the victim is free.

use std::ops::Range;

use super::segments::{SEGMENT_BLOCKS, SEGMENT_FRAMES};
use super::unit::{State, UNIT_BLOCKS, Unit};
use super::writeback::{Job, READER, Writeback};
use crate::engine::Engine;
use crate::frame::GRANULE;
use crate::shard::Passage;
use crate::zpage::{HEADER_BYTES, Header};

/// Segments that are opened for cleaning only: what is cleaned needs room before it makes any.
pub(crate) const RESERVE_SEGMENTS: u32 = 2;

/// Cleaning begins below so many free segments.
pub(super) const CLEAN_BELOW: u32 = RESERVE_SEGMENTS + 4;

/// Segments that can be in hand to be cleaned.
pub(super) const VICTIMS: usize = 4;

/// How often the write of what was packed is tried before it stays where it was.
const TRIES: u32 = 4;

// A segment is read part by part.
const _: () = assert!(SEGMENT_BLOCKS.is_multiple_of(UNIT_BLOCKS));

/// A segment that is being cleaned.
pub(super) struct Victim {
    segment: u32,
    /// Blocks that were read, or are being read, or are not to be read any more.
    read: u32,
    /// Units that what was alive in it is in.
    units: u32,
    /// Whether something that is alive in it was left there.
    is_cut: bool,
}

impl Victim {
    fn is_read(&self) -> bool {
        self.read == SEGMENT_BLOCKS
    }

    /// Leaves in it what is still there.
    fn cut(&mut self) {
        self.read = SEGMENT_BLOCKS;
        self.is_cut = true;
    }
}

impl Writeback {
    /// Reads a part of a segment that is to be cleaned, or writes what was packed.
    pub(super) fn clean(&mut self) -> Option<Job> {
        if self.units[READER].state != State::Idle {
            return None;
        }
        let may_read = self.may_read();
        if self.victims.iter().all(Victim::is_read) && !(may_read && self.choose_victim()) {
            return self.flush_packed();
        }
        if !may_read || !self.can_pack() {
            // What is packed already may make room when it is written; then others have a turn.
            self.victims.iter_mut().filter(|victim| !victim.is_read()).for_each(Victim::cut);
            self.close_victims();
            return self.flush_packed();
        }
        // A part of a segment may fill the rest of one unit and two more, at a segment's end.
        let idle = self.packing().iter().filter(|unit| unit.state == State::Idle).count();
        if idle < 2 {
            return None;
        }
        let Some(part) = self.next_part() else {
            // What was left of it has died meanwhile.
            self.close_victims();
            return self.flush_packed();
        };
        let unit = &mut self.units[READER];
        unit.begin(part.start, part.end - part.start);
        unit.blocks = part.end - part.start;
        Some(self.start(READER, State::Reading))
    }

    /// The next blocks to read of a segment that is being cleaned: those with anything alive in them, and what is between.
    /// None if there are no more.
    fn next_part(&mut self) -> Option<Range<u32>> {
        let is_alive = |block: &u32| self.log.entry(*block).layout.live() > 0;
        for victim in self.victims.iter_mut().filter(|victim| !victim.is_read()) {
            let segment = victim.segment * SEGMENT_BLOCKS;
            let end = segment + SEGMENT_BLOCKS;
            let Some(first) = (segment + victim.read..end).find(is_alive) else {
                victim.read = SEGMENT_BLOCKS;
                continue;
            };
            let end = end.min(first + self.unit_blocks);
            victim.read = end - segment;
            let last = (first..end).rev().find(is_alive).unwrap_or(first);
            return Some(first..last + 1);
        }
        None
    }

    /// The units that what is alive is packed into.
    fn packing(&self) -> &[Unit] {
        &self.units[READER + 1..]
    }

    fn filling(&self) -> Option<usize> {
        let at = self.packing().iter().position(|unit| unit.state == State::Filling)?;
        Some(READER + 1 + at)
    }

    /// Whether there is room for all that may be alive in a part of a segment.
    pub(super) fn can_pack(&self) -> bool {
        let filled = self.filling().map_or(0, |at| self.units[at].blocks);
        let left = self.cleaning.room().map_or(0, |(_, left)| left);
        left - filled >= self.unit_blocks || self.packable().is_some()
    }

    /// The segment that would be cleaned to next.
    pub(super) fn packable(&self) -> Option<u32> {
        let segments = self.log.segments();
        let from = self.cleaning.next(segments.count());
        let has_frames = self.hand.len() >= SEGMENT_FRAMES;
        let without = || has_frames.then(|| segments.find_free(from, false)).flatten();
        segments.find_free(from, true).or_else(without)
    }

    /// Takes the segment in hand of which the least is alive; false if none is to be cleaned.
    fn choose_victim(&mut self) -> bool {
        if self.victims.len() == VICTIMS {
            return false;
        }
        let Some(segment) = self.candidate.take() else { return false };
        if !self.log.segments().take(segment) {
            return false;
        }
        let segments = self.log.segments();
        segments.moves().begin(segment, segments.sequence(segment));
        self.victims.push(Victim { segment, read: 0, units: 0, is_cut: false });
        true
    }

    /// Writes what is packed though it does not fill a unit: segments wait for that.
    fn flush_packed(&mut self) -> Option<Job> {
        let at = self.filling()?;
        self.finish(at);
        Some(self.start(at, State::Writing))
    }

    /// Tries the write of what was packed again, if it was tried less than a few times: to the same blocks,
    /// sealed as it is. False for any other unit.
    pub(super) fn retry(&mut self, at: usize) -> bool {
        let unit = &mut self.units[at];
        let is_to_try = at > READER && unit.tries + 1 < TRIES;
        if is_to_try {
            unit.tries += 1;
            unit.state = State::Ready;
        }
        is_to_try
    }

    /// A part of a segment could not be read. What is alive there stays, and others are cleaned first: when there are no more,
    /// and after a rest, it is tried again.
    pub(super) fn give_up_reading(&mut self, at: usize) {
        let segment = self.units[at].first / SEGMENT_BLOCKS;
        self.log.segments().put_off(segment);
        self.has_put_off = true;
        let victim = self.victims.iter_mut().find(|victim| victim.segment == segment);
        victim.expect("it is being read").cut();
        self.units[at].clear();
        self.close_victims();
    }

    /// Looks through what was read of a segment, and packs what is alive anew.
    pub(super) fn sort(&mut self, engine: &Engine, at: usize) {
        let Unit { first, blocks, .. } = self.units[at];
        let segment = first / SEGMENT_BLOCKS;
        for n in 0..blocks {
            if !self.sort_block(engine, segment, n, first + n) {
                let victim = self.victims.iter_mut().find(|victim| victim.segment == segment);
                victim.expect("it is being read").cut();
                break;
            }
        }
        self.units[at].clear();
        self.close_victims();
    }

    /// Packs what is alive in a block that was read; false if there is no room for it.
    fn sort_block(&mut self, engine: &Engine, source: u32, n: u32, block: u32) -> bool {
        let layout = &self.log.entry(block).layout;
        if layout.live() == 0 {
            return true;
        }
        let buddies = layout.buddies();
        let raw = self.log.raw_header(block);
        let key = self.log.key_to(block);
        let mut image = *self.buffers.image(READER, n);
        if !self.log.unseal(&key, &mut image) {
            // What is alive in it cannot be moved; whoever gets it will be told.
            self.log.segments().spoil(source);
            return true;
        }
        for (zpage, extent) in buddies.as_slice().iter().enumerate() {
            let bytes = &image[extent.offset * GRANULE..extent.end() * GRANULE];
            let head =
                || Header::from_bytes(*bytes.first_chunk::<HEADER_BYTES>().expect("a zpage"));
            let owner = raw.unwrap_or_else(head).owner();
            let passage = engine.shard(owner).passage(owner, block, extent.offset as u8);
            if passage.is_some_and(|passage| !self.pack((block, zpage), passage, bytes, raw)) {
                return false;
            }
        }
        true
    }

    /// Adds a zpage, by its block and its place among those of it, to the unit that is being filled; false if there is
    /// no room for it in the log.
    fn pack(
        &mut self,
        from: (u32, usize),
        passage: Passage,
        bytes: &[u8],
        raw: Option<Header>,
    ) -> bool {
        let (source, granules) = (from.0 / SEGMENT_BLOCKS, bytes.len() / GRANULE);
        loop {
            let Some(at) = self.filling().or_else(|| self.begin_packing()) else { return false };
            let unit = &mut self.units[at];
            let Some((n, offset)) = unit.place(granules, raw) else {
                self.finish(at);
                continue;
            };
            // Before a slot can point there.
            if !self.log.note_move(from, unit.first + n, offset as u8) {
                return false;
            }
            let start = offset * GRANULE;
            self.buffers.image(at, n)[start..start + bytes.len()].copy_from_slice(bytes);
            let passage = Passage { granule: offset as u8, ..passage };
            unit.passages.push((unit.first + n, passage));
            if !unit.sources.contains(&source) {
                unit.sources.push(source);
                let victim = self.victims.iter_mut().find(|victim| victim.segment == source);
                victim.expect("it is being read").units += 1;
            }
            return true;
        }
    }

    fn begin_packing(&mut self) -> Option<usize> {
        let idle = |unit: &Unit| unit.state == State::Idle;
        let at = READER + 1 + self.packing().iter().position(idle)?;
        if !self.cleaning.is_open() {
            let segment = self.packable()?;
            self.log.open(segment, &mut self.hand);
            self.cleaning.begin(segment);
        }
        let (first, room) = self.cleaning.room()?;
        self.units[at].begin(first, room);
        Some(at)
    }

    /// Makes a unit that was packed ready to be written.
    fn finish(&mut self, at: usize) {
        let unit = &mut self.units[at];
        self.cleaning.take(unit.blocks);
        let mut used = 0;
        for n in 0..unit.blocks {
            let block = unit.first + n;
            let (buddies, raw) = unit.draft(n);
            match raw {
                Some(raw) => self.log.entry(block).layout.lay_out_raw(raw.to_bytes()),
                None => self.log.entry(block).layout.lay_out(buddies),
            }
            used += buddies.used_granules();
            self.log.seal(block, self.buffers.image(at, n));
        }
        // Not what is left over in its blocks: to pack them once more would give nothing.
        self.log.segments().use_up(unit.first / SEGMENT_BLOCKS, used);
        unit.state = State::Ready;
    }

    /// A unit with what was alive in segments has ended; it was written, or what is in it stays where it was.
    pub(super) fn forget_sources(&mut self, at: usize, written: bool) {
        for source in &self.units[at].sources {
            let victim = self.victims.iter_mut().find(|victim| victim.segment == *source);
            let victim = victim.expect("a segment is in hand while what was in it is written");
            victim.units -= 1;
            victim.is_cut |= !written;
        }
    }

    /// Lets segments go that were read, and of which everything alive is elsewhere or has to stay; in the order in which
    /// they were begun, so that a segment that is being filled has to stay for no other one than the first.
    pub(super) fn close_victims(&mut self) {
        let reading = &self.units[READER];
        let read = (reading.state == State::Reading).then_some(reading.first / SEGMENT_BLOCKS);
        let is_over = |victim: &&Victim| {
            victim.is_read() && victim.units == 0 && read != Some(victim.segment)
        };
        let over = self.victims.iter().take_while(is_over).count();
        let (segments, tally) = (self.log.segments(), self.log.tally());
        for victim in self.victims.drain(..over) {
            // Before its place can be used again.
            segments.moves().end(victim.segment);
            match segments.close(victim.segment) {
                true => tally.add_cleaned(),
                // What is alive there is nobody's whose name is on it, as after damage: it would be read for ever.
                false if !victim.is_cut => segments.spoil(victim.segment),
                false => {}
            }
        }
    }
}
