//! Writeback: cold frames go to the log.
//!
//! It moves blocks in *units* of up to 256 KiB, each with a buffer of its own:
//!
//! ```text
//!   frames --hold--> unit --write--> slots point at blocks, frames are free
//! ```
//!
//! It is a state machine: [`Writeback::next`] says what is to be written or read next, whoever does the I/O
//! tells [`Writeback::ended`] what became of it. Several jobs may be under way, and end in any order.
//! One thread has it. Nothing of what it does is on the I/O path, but puts wait for it when the pool
//! is full: so it allocates nothing once it is made, and each step is bounded.
//!
//! What fails is as if it had never begun: frames go back to where they were, what was alive in a
//! segment is there still. Writing then rests, longer with each failure ([`super::policy`]).
//!
//! Segments with little that is alive are cleaned meanwhile: [`super::cleaner`].

use std::ops::RangeInclusive;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::cleaner::{CLEAN_BELOW, RESERVE_SEGMENTS, VICTIMS, Victim};
use super::log::Log;
use super::policy::{self, Policy, Wanted};
use super::segments::{SEGMENT_BLOCKS, SEGMENT_FRAMES, SEGMENTS_MAX};
use super::stream::Stream;
use super::unit::{Buffers, State, Unit};
use crate::engine::Engine;
use crate::frame::FRAME_GRANULES;
use crate::handle::PAGE_SIZE;

/// Units for frames.
const EVICTING: usize = 4;

/// The unit that a segment is read with, behind them, and behind it those that what is alive is packed into.
pub(crate) const READER: usize = EVICTING;
const UNITS: usize = READER + 5;

/// Free segments that keep the frames of their entries.
const TRIM_KEEPS: usize = 4;

/// Frames that are kept for entries: a pair for each of two segments.
pub(super) const HAND_FRAMES: usize = 2 * SEGMENT_FRAMES;

/// I/O that takes longer is late, in nanoseconds: puts do not wait for a backing file that may never answer.
const LATE: u64 = 3_000_000_000;

/// The fewest segments that it works with.
pub(crate) const SEGMENTS_MIN: u32 = 2 * CLEAN_BELOW;

/// How many there can be.
pub(crate) const SEGMENTS: RangeInclusive<u32> = SEGMENTS_MIN..=SEGMENTS_MAX;

/// Frames with entries that there may be in any pool: for the smallest file, and in hand.
pub(crate) const ENTRIES_LEAST: u64 =
    SEGMENTS_MIN as u64 * SEGMENT_FRAMES as u64 + HAND_FRAMES as u64;

/// What is to be done with the backing file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Job {
    /// The unit, to be named at the end; its buffer is [`Writeback::buffer`].
    pub unit: usize,
    /// Whether to write the buffer, or to read into it.
    pub is_write: bool,
    /// Where in the file, in bytes; a multiple of the page size.
    pub offset: u64,
    /// How many bytes; a multiple of the page size.
    pub bytes: usize,
}

/// A job that failed, or did less than it should.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct JobFailed;

/// How the backing file fares.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Health {
    /// It takes what it is given.
    #[default]
    Good,
    /// It failed to write, and is left alone for a while.
    Failing,
    /// It failed to read what is to be cleaned, which is tried again later; it takes what it is given, while there is
    /// room.
    FailingReads,
    /// It does not answer.
    Late,
    /// As much was written as may be in a day.
    Spent,
}

/// See the module's description.
pub struct Writeback {
    pub(super) log: Arc<Log>,
    /// Blocks of a unit at most.
    pub(super) unit_blocks: u32,
    pub(super) buffers: Buffers,
    pub(super) units: Box<[Unit]>,
    pub(super) policy: Policy,
    evicting: Stream,
    pub(super) cleaning: Stream,
    pub(super) victims: Vec<Victim>,
    /// The segment that would be cleaned next, when free ones are few.
    pub(super) candidate: Option<u32>,
    /// Whether there may be segments that could not be read.
    pub(super) has_put_off: bool,
    /// Frames for the entries of the next segments. The last pair is the cleaner's: without it no room could be
    /// made.
    pub(super) hand: Vec<u32>,
    /// Where frames are looked for next.
    next_shard: usize,
    /// Whether frames were to go, and there was none that could: what is in use holds no zpages.
    is_dry: bool,
    /// Whether as much was written as may be in a day.
    is_spent: bool,
    /// What time it is, as far as it was told.
    now: u64,
}

impl Writeback {
    /// With units of so many blocks at most, see [`super::unit`].
    pub(crate) fn new(log: Arc<Log>, unit_blocks: u32) -> std::io::Result<Self> {
        Ok(Self {
            log,
            unit_blocks,
            buffers: Buffers::new(UNITS, unit_blocks)?,
            units: (0..UNITS).map(|_| Unit::new(unit_blocks, VICTIMS)).collect(),
            policy: Policy::default(),
            evicting: Stream::default(),
            cleaning: Stream::default(),
            victims: Vec::with_capacity(VICTIMS),
            candidate: None,
            has_put_off: false,
            hand: Vec::with_capacity(HAND_FRAMES),
            next_shard: 0,
            is_dry: false,
            is_spent: false,
            now: 0,
        })
    }

    /// What is to be done next, if there is anything. `now` is in nanoseconds since any moment, the same one for
    /// all who go on from a store. To be asked when
    /// [`Engine::writeback_wanted`] says so, after each job that has ended, and about once a second.
    ///
    /// # Panics
    ///
    /// If `engine` is not the one that this was attached to.
    pub fn next(&mut self, engine: &Engine, now: u64) -> Option<Job> {
        self.check(engine);
        self.now = now;
        self.fill_hand(engine);
        if let Some(tick) = self.policy.tick(engine, now) {
            engine.shards.iter().for_each(|shard| shard.0.lock().set_tick(tick));
        }
        let segments = self.log.segments();
        let is_short = segments.free() < CLEAN_BELOW || self.evicting_is_stuck();
        let is_to_clean = self.victims.len() < VICTIMS;
        self.candidate = match is_to_clean && (is_short || self.log.is_dear()) {
            true if is_short => self.emptiest(),
            true => segments.emptiest().filter(|one| segments.is_nearly_dead(*one)),
            false => None,
        };
        let job = match self.policy.writing.left(now) {
            Some(_) => None,
            None if !self.policy.is_due(engine, now) => None,
            None => self.ready().or_else(|| self.clean()).or_else(|| self.evict(engine)),
        };
        if let Some(job) = job.filter(|job| job.is_write) {
            self.policy.wrote(engine, job.bytes as u64, now);
        }
        self.announce(engine);
        job
    }

    /// A unit's buffer, page aligned and locked. While a job of the unit is under way it is the
    /// caller's.
    pub fn buffer(&self, unit: usize) -> NonNull<u8> {
        self.buffers.of(unit)
    }

    /// A job has ended: all of it is done, or it failed. (One that did a part may be gone on with by who does the
    /// I/O.)
    ///
    /// # Panics
    ///
    /// If no job of the unit is under way, or `engine` is not the one that this was attached to.
    pub fn ended(&mut self, engine: &Engine, unit: usize, result: Result<(), JobFailed>, now: u64) {
        self.check(engine);
        self.now = now;
        self.buffers.take_back(unit);
        let state = self.units[unit].state;
        if state == State::Writing {
            self.log.tally().sub_outstanding(self.units[unit].passages.len());
        }
        if result.is_err() {
            self.log.tally().add_failed();
        }
        match (state, result) {
            (State::Writing, Ok(())) => {
                self.policy.writing.succeeded(now);
                self.install(engine, unit);
            }
            (State::Writing, Err(JobFailed)) => {
                self.policy.writing.failed(now);
                if !self.retry(unit) {
                    self.give_up(engine, unit);
                }
            }
            (State::Reading, Ok(())) => {
                self.policy.reading.succeeded(now);
                self.sort(engine, unit);
            }
            (State::Reading, Err(JobFailed)) => {
                self.policy.reading.failed(now);
                self.give_up_reading(unit);
            }
            (State::Idle | State::Filling | State::Ready, _) => {
                panic!("no job of unit {unit} is under way")
            }
        }
        self.announce(engine);
    }

    /// Nothing can be done for now, until [`Writeback::next`] is asked: puts do not wait for room in the pool meanwhile.
    pub fn stand_still(&mut self, engine: &Engine) {
        self.check(engine);
        self.log.set_accepts(false);
    }

    /// How the backing file fares.
    pub fn health(&self) -> Health {
        let is_under_way = |unit: &Unit| matches!(unit.state, State::Writing | State::Reading);
        let is_late =
            |unit: &Unit| is_under_way(unit) && self.now.saturating_sub(unit.since) > LATE;
        match () {
            () if self.units.iter().any(is_late) => Health::Late,
            () if self.policy.writing.is_failing(self.now) => Health::Failing,
            () if self.is_spent => Health::Spent,
            () if self.cannot_clean() => Health::FailingReads,
            () => Health::Good,
        }
    }

    /// Whether what is to be cleaned could not be read, and has not been since. (When there is nothing to clean any more
    /// nobody knows.)
    fn cannot_clean(&self) -> bool {
        let reading = &self.policy.reading;
        reading.left(self.now).is_some() || reading.is_failing(self.now) && !self.victims.is_empty()
    }

    /// Gives back memory that the log has no use for. To be called about once a second.
    pub fn settle(&mut self) {
        self.log.trim(TRIM_KEEPS);
    }

    /// Whether the buffers are locked memory.
    pub fn is_locked(&self) -> bool {
        self.buffers.is_locked()
    }

    /// How long after `now`, in nanoseconds, [`Writeback::next`] should be asked again, if nothing else is a
    /// reason to; none if that is of no use.
    pub fn rests_for(&self, now: u64) -> Option<u64> {
        self.policy.rests_for(now)
    }

    /// Bytes of memory that the buffers take.
    pub(crate) fn bytes(&self) -> u64 {
        self.buffers.bytes()
    }

    fn check(&self, engine: &Engine) {
        let is_ours = engine.log().is_some_and(|log| ptr::eq(log, &*self.log));
        assert!(is_ours, "this is another engine's");
    }

    /// Tells puts whether to wait for the log.
    fn announce(&mut self, engine: &Engine) {
        let mut has_room = self.has_room();
        if !has_room {
            // The one that was chosen is cleaned, and there may be another by now.
            self.candidate = self.emptiest();
            has_room = self.has_room();
        }
        self.is_spent = self.policy.is_spent(engine, self.now);
        let is_far = self.policy.is_far(self.now);
        let takes = matches!(self.health(), Health::Good | Health::FailingReads);
        self.log.set_accepts(has_room && !is_far && takes);
    }

    /// Whether there is no segment that frames could go to.
    fn evicting_is_stuck(&self) -> bool {
        !self.evicting.is_open() && self.openable().is_none()
    }

    /// Whether frames are going to the log, or can go, if only after cleaning.
    fn has_room(&self) -> bool {
        self.under_way() > 0
            || !self.is_dry
                && (self.evicting.is_open()
                    || self.openable().is_some()
                    || !self.victims.is_empty()
                    || self.candidate.is_some() && self.may_read() && self.can_pack())
    }

    /// The segment that is best to clean. When there is none, those that could not be read have another turn.
    fn emptiest(&mut self) -> Option<u32> {
        let segments = self.log.segments();
        let found = segments.emptiest();
        if found.is_some() || !self.has_put_off || !self.may_read() {
            return found;
        }
        self.has_put_off = false;
        segments.forgive();
        segments.emptiest()
    }

    /// Whether what is to be cleaned may be read: not for a while after that has failed.
    pub(super) fn may_read(&self) -> bool {
        self.policy.reading.left(self.now).is_none()
    }

    /// Frames that are being written.
    fn under_way(&self) -> u32 {
        self.units.iter().map(|unit| unit.frames.len() as u32).sum()
    }

    /// Gets free frames for the entries of the next segments.
    fn fill_hand(&mut self, engine: &Engine) {
        while self.wants_frame() {
            let frame = engine.arena.pop().or_else(|| engine.clean_frame(0));
            let Some(frame) = frame else { return };
            self.keep(frame);
        }
    }

    /// Whether a frame is wanted for entries.
    pub(crate) fn wants_frame(&self) -> bool {
        self.hand.len() < HAND_FRAMES
    }

    /// Keeps a frame for entries.
    pub(crate) fn keep(&mut self, frame: u32) {
        self.log.count_frame();
        self.hand.push(frame);
    }

    /// A unit that was filled.
    fn ready(&mut self) -> Option<Job> {
        let unit = self.units.iter().position(|unit| unit.state == State::Ready)?;
        Some(self.start(unit, State::Writing))
    }

    /// Starts a unit's I/O.
    pub(super) fn start(&mut self, unit: usize, state: State) -> Job {
        if state == State::Writing {
            self.log.tally().add_outstanding(self.units[unit].passages.len());
        }
        self.buffers.lend(unit);
        self.units[unit].state = state;
        self.units[unit].since = self.now;
        let Unit { first, blocks, .. } = self.units[unit];
        Job {
            unit,
            is_write: state == State::Writing,
            offset: u64::from(first) * PAGE_SIZE as u64,
            bytes: blocks as usize * PAGE_SIZE,
        }
    }

    /// The segment that frames would go to next. Those in reserve are left to the cleaner, and so is the last one that it
    /// could open.
    fn openable(&self) -> Option<u32> {
        let segments = self.log.segments();
        if segments.free() <= RESERVE_SEGMENTS {
            return None;
        }
        let from = self.evicting.next(segments.count());
        let leaves_one =
            |one: &u32| self.hand.len() >= SEGMENT_FRAMES || segments.has_other_with_frames(*one);
        let with_frames = segments.find_free(from, true).filter(leaves_one);
        with_frames.or_else(|| match self.hand.len() {
            HAND_FRAMES if self.log.may_grow(ENTRIES_LEAST) => segments.find_free(from, false),
            _ => None,
        })
    }

    /// Fills a unit with cold frames, if frames are to go.
    fn evict(&mut self, engine: &Engine) -> Option<Job> {
        let Wanted { frames, age } = self.policy.wanted(engine, self.under_way(), self.now);
        if frames == 0 {
            self.is_dry = false;
            return None;
        }
        let at = self.units[..EVICTING].iter().position(|unit| unit.state == State::Idle)?;
        if !self.evicting.is_open() {
            let segment = self.openable()?;
            self.log.open(segment, &mut self.hand);
            self.evicting.begin(segment);
            // Looked for as before it was opened: others only add to what is free, and may be at it.
            let segments = self.log.segments();
            let leaves_one =
                self.hand.len() >= SEGMENT_FRAMES || segments.has_other_with_frames(segment);
            let is_left = leaves_one && segments.free() >= RESERVE_SEGMENTS;
            assert!(is_left, "frames took the cleaner's last segment");
        }
        let (first, room) = self.evicting.room()?;
        self.units[at].begin(first, room.min(frames));
        while self.units[at].has_room() && self.hold_cold(engine, age, at) {}
        let blocks = self.units[at].blocks;
        self.is_dry = age == 0 && blocks == 0 && self.under_way() == 0;
        if blocks == 0 {
            if age > 0 {
                self.policy.none_of_age();
            }
            self.units[at].clear();
            return None;
        }
        self.evicting.take(blocks);
        // Whatever becomes of these blocks, they can be written again only when the segment is opened again.
        self.log.segments().use_up(first / SEGMENT_BLOCKS, blocks as usize * FRAME_GRANULES);
        Some(self.start(at, State::Writing))
    }

    /// Adds the image of a frame of that age to a unit; false if no shard has one.
    fn hold_cold(&mut self, engine: &Engine, age: u8, at: usize) -> bool {
        let unit = &mut self.units[at];
        let n = unit.blocks;
        let block = unit.first + n;
        for _ in 0..engine.shards.len() {
            let number = self.next_shard % engine.shards.len();
            self.next_shard = number + 1;
            let image = self.buffers.image(at, n);
            let mut shard = engine.shards[number].0.lock();
            let tell = |passage| unit.passages.push((block, passage));
            let Some(frame) = shard.hold_cold(age, block, image, tell) else { continue };
            drop(shard);
            self.log.seal(block, image);
            unit.frames.push((number, frame));
            unit.add();
            return true;
        }
        false
    }

    /// Makes the slots point at what was written.
    fn install(&mut self, engine: &Engine, at: usize) {
        self.log.tally().add_written(self.units[at].blocks, at > READER);
        if engine.writeback_settings().keep_copies && at < EVICTING {
            return self.keep_clean(engine, at);
        }
        for &(block, passage) in &self.units[at].passages {
            engine.shard(passage.owner).written(block, passage);
        }
        self.over(engine, at, true);
    }

    /// Leaves what was written in memory as well, for as long as there are frames for that.
    fn keep_clean(&mut self, engine: &Engine, at: usize) {
        for n in 0..self.units[at].frames.len() {
            let (shard, frame) = self.units[at].frames[n];
            let block = self.units[at].first + n as u32;
            let of_it = self.units[at].passages.iter().filter(|(whose, _)| *whose == block);
            let passages = of_it.map(|(_, passage)| *passage);
            let empty = engine.shards[shard].0.lock().keep(frame, block, passages);
            self.take_in(engine, empty);
        }
        self.units[at].frames.clear();
        self.over(engine, at, true);
    }

    /// Leaves everything as it was before a unit was filled.
    fn give_up(&mut self, engine: &Engine, at: usize) {
        let Unit { first, blocks, .. } = self.units[at];
        // What was not written there is not to be looked for.
        (first..first + blocks).for_each(|block| self.log.entry(block).layout.clear());
        self.over(engine, at, false);
    }

    /// Ends a unit that was written, or was to be.
    fn over(&mut self, engine: &Engine, at: usize, written: bool) {
        for n in 0..self.units[at].frames.len() {
            let (shard, frame) = self.units[at].frames[n];
            let empty = engine.shards[shard].0.lock().let_go(frame, written);
            self.take_in(engine, empty);
        }
        let segment = self.units[at].first / SEGMENT_BLOCKS;
        self.forget_sources(at, written);
        self.units[at].clear();
        self.close_victims();
        self.close_if_done(segment);
    }

    /// Takes a frame that is free now, or gives it to the arena. Nobody else gets it first: without it no other frame
    /// could go.
    fn take_in(&mut self, engine: &Engine, frame: Option<u32>) {
        match frame {
            Some(frame) if self.wants_frame() => self.keep(frame),
            Some(frame) => engine.arena.push(frame),
            None => {}
        }
    }

    /// Lets a segment go that is written to its end.
    fn close_if_done(&mut self, segment: u32) {
        let writes = |unit: &Unit| {
            !matches!(unit.state, State::Idle | State::Reading)
                && unit.first / SEGMENT_BLOCKS == segment
        };
        let is_open = self.evicting.is_in(segment) || self.cleaning.is_in(segment);
        if !is_open && !self.units.iter().any(writes) {
            self.log.segments().close(segment);
        }
    }
}

impl Engine {
    /// Whether frames are to go to the backing file, and can. Cheap enough to ask after every put.
    pub fn writeback_wanted(&self) -> bool {
        self.log().is_some_and(Log::accepts) && policy::is_low(self)
    }
}

impl Drop for Writeback {
    /// Nothing is written any more, so puts do not wait for it.
    fn drop(&mut self) {
        self.log.set_accepts(false);
        self.hand.drain(..).for_each(|frame| self.log.give_back(frame));
    }
}
