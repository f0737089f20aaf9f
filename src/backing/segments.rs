//! Segments: which parts of the backing file are free, and how much of the others is of use still.
//!
//! ```text
//!            open                       close, and nothing is live
//!   free ------------> in hand ------------------------------------> free
//!    ^                 |     ^
//!    |           close |     | take (to clean it)
//!    |                 v     |
//!    +---------------- sealed
//!     the last live zpage dies
//! ```
//!
//! One thread has segments *in hand*: it fills or cleans them. Everybody else may only make what is in
//! one of them dead, under the lock of the shard whose zpage that was; who does so to the last live one
//! of a sealed segment has freed it by that, and need do nothing for it but to say so. So state and live granules are
//! one word. Entries are memory that outlives the process.
//!
//! Which segments are free, and of which how much is dead, is in sets ([`Bits`]) beside the entries, which say nothing
//! that these do not: so neither a free segment nor the one to clean is looked for among all of them.

use std::io;
use std::sync::atomic::{AtomicU64 as Word, Ordering};

use crate::durable::{DurableU32, DurableU64};
use crate::frame::{FRAME_GRANULES, NIL};
use crate::handle::PAGE_SIZE;
use crate::region::Region;
use crate::store::Store;
use crate::sync::schedule_point;

use super::bits::Bits;
use super::block::BLOCKS_PER_FRAME;
use super::moves::{Moves, Records};

/// Blocks of a segment: 1 MiB.
pub(crate) const SEGMENT_BLOCKS: u32 = 256;

/// Bytes of a segment.
pub(crate) const SEGMENT_BYTES: u64 = SEGMENT_BLOCKS as u64 * PAGE_SIZE as u64;

/// Segments that a log can have, 256 GiB.
pub(crate) const SEGMENTS_MAX: u32 = 1 << 18;

/// Bytes of the largest table.
pub(crate) const SEGMENTS_BYTES_MAX: u64 = SEGMENTS_MAX as u64 * META_BYTES as u64;

/// Frames that hold the entries of a segment's blocks.
pub(crate) const SEGMENT_FRAMES: usize = SEGMENT_BLOCKS as usize / BLOCKS_PER_FRAME;

const META_BYTES: usize = size_of::<SegmentMeta>();

const IN_HAND: u64 = 1 << 63;
/// Beside that, in hand of a recovery, and was not before. So what is in hand without it when a process has died, that
/// process was writing or cleaning.
const FOUND: u64 = 1 << 62;
/// The rest of the word: live granules.
const LIVE: u64 = FOUND - 1;

/// The largest number of a use. It cannot be reached: a segment takes more than a microsecond.
const SEQUENCE_MAX: u64 = 1 << 60;

/// Granules of a segment.
const SEGMENT_GRANULES: u32 = SEGMENT_BLOCKS * FRAME_GRANULES as u32;

/// A segment is worth cleaning when at least this part of what is used up of it is dead. So no more than so many
/// bytes are written for each that comes, and when no segment is worth it the log is full.
const DEAD_PART: u64 = 12;

/// Nearly dead is a segment of which no more than such a part is alive.
const ALIVE_PART: u64 = 16;

/// Sealed segments are told apart by how many such parts of what is used up of them are dead.
const CLASSES: u64 = 2 * DEAD_PART;

/// Segments of a class that are looked at for the one to clean.
const CHOICES: u32 = 16;

/// The lowest class that is worth it.
const CLASS_MIN: u64 = CLASSES / DEAD_PART;

/// Of a segment that is not to be cleaned any more, and of one that is to be when others are.
const SPOILED: u32 = 1;
const PUT_OFF: u32 = 2;

const _: () = assert!(PAGE_SIZE.is_multiple_of(META_BYTES));

/// What is known of a segment.
#[repr(C)]
struct SegmentMeta {
    /// In hand or not, and granules of live zpages.
    word: DurableU64,
    /// How often any segment had been opened when this one was last: no two uses of one place share it.
    sequence: DurableU64,
    /// Where its blocks' entries are, less one as long as there are none.
    frames: [DurableU32; SEGMENT_FRAMES],
    /// Whether cleaning it has failed: 0, [`SPOILED`] or [`PUT_OFF`].
    spoiled: DurableU32,
    /// Granules that were used up since it was opened.
    used: DurableU32,
}

/// See the module's description.
pub(crate) struct Segments {
    table: Region,
    /// Of [`Moves`].
    records: Region,
    count: u32,
    free: Word,
    live: Word,
    sequence: Word,
    /// Free segments without frames for entries,
    bare: Bits,
    /// and with such.
    framed: Bits,
    /// Sealed segments by class, from [`CLASS_MIN`] on. One may also be in others, or not be sealed any more: it is looked
    /// at when it is found.
    classes: Box<[Bits]>,
}

impl Segments {
    /// So many segments, all of them free, for a store that has none yet.
    pub(crate) fn new(store: &Store, count: u32) -> io::Result<Self> {
        let segments = Self::of_store(store, count)?;
        for region in [&segments.table, &segments.records] {
            // What a process has left there that died before there was a log.
            region.release(0, region.bytes())?;
            region.populate(0, region.bytes())?;
        }
        Ok(segments)
    }

    /// The segments of a store that has so many. They are free as far as this knows: [`Segments::recover`] looks.
    pub(crate) fn of_store(store: &Store, count: u32) -> io::Result<Self> {
        assert!(count > 0 && count <= SEGMENTS_MAX);
        let table = store.segments(u64::from(count) * META_BYTES as u64)?;
        let records = store.moves()?;
        let (free, live, sequence) = (Word::new(count.into()), Word::new(0), Word::new(0));
        let (bare, framed) = (Bits::new(count, true), Bits::new(count, false));
        let classes = (CLASS_MIN..CLASSES).map(|_| Bits::new(count, false)).collect();
        Ok(Self { table, records, count, free, live, sequence, bare, framed, classes })
    }

    /// Makes the tables be at hand: see [`Region::bring_in`].
    pub(crate) fn bring_in(&self) -> io::Result<()> {
        self.table.bring_in(0, self.table.bytes())?;
        self.records.bring_in(0, self.records.bytes())
    }

    /// What is noted of segments that are being cleaned.
    pub(crate) fn moves(&self) -> Moves<'_> {
        // SAFETY: the region has the bytes of the records, page-aligned at its start; they consist of atomics, for
        // which every bit pattern is valid.
        Moves(unsafe { self.records.start().cast::<Records>().as_ref() })
    }

    /// Whether what is not made anew by recovery can be. So many uses there never are, and each has to have a number of
    /// its own.
    pub(crate) fn is_sound(&self) -> bool {
        (0..self.count).all(|segment| self.sequence(segment) <= SEQUENCE_MAX)
    }

    /// Takes all segments in hand that have frames, and counts nothing in them as live: what is, is told next, and
    /// then each is closed. With what `takes` accepts for frames with entries; without, a segment is free.
    pub(crate) fn recover(&self, takes: impl Fn(&[u32; SEGMENT_FRAMES]) -> bool) {
        for segment in 0..self.count {
            let meta = self.meta(segment);
            self.sequence.fetch_max(meta.sequence.load(Ordering::Acquire), Ordering::AcqRel);
            let frames = self.frames(segment).filter(&takes);
            if frames.is_none() {
                self.set_frames(segment, None);
            }
            let was_in_hand = meta.word.load(Ordering::Acquire) & (IN_HAND | FOUND) == IN_HAND;
            let word = match (frames.is_some(), was_in_hand) {
                (true, true) => IN_HAND,
                (true, false) => IN_HAND | FOUND,
                (false, _) => 0,
            };
            meta.word.store(word, Ordering::Release);
            // As if each had been opened; which set it belongs to, closing it says.
            match frames.is_some() {
                true => self.bare.remove(segment),
                false => self.bare.add(segment),
            }
            self.free.fetch_sub(u64::from(frames.is_some()), Ordering::AcqRel);
        }
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Segments that can be opened.
    pub(crate) fn free(&self) -> u32 {
        // One that was opened before it was counted makes it negative for a moment.
        u32::try_from(self.free.load(Ordering::Acquire) as i64).unwrap_or(0)
    }

    /// Granules of live zpages in all of them.
    pub(crate) fn live(&self) -> u64 {
        self.live.load(Ordering::Acquire)
    }

    /// Bytes of memory that the tables and the sets take.
    pub(crate) fn bytes(&self) -> u64 {
        let sets = self.classes.iter().chain([&self.bare, &self.framed]);
        let tables = self.table.bytes() + self.records.bytes();
        tables as u64 + sets.map(Bits::bytes).sum::<u64>()
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.table.is_locked() && self.records.is_locked()
    }

    /// The sequence number that a block's segment was opened with.
    pub(crate) fn sequence(&self, segment: u32) -> u64 {
        self.meta(segment).sequence.load(Ordering::Acquire)
    }

    /// Whether a segment has been written to its end, and is not in hand.
    pub(crate) fn is_sealed(&self, segment: u32) -> bool {
        let word = self.meta(segment).word.load(Ordering::Acquire);
        word & IN_HAND == 0 && word & LIVE > 0
    }

    /// The frames with a segment's entries.
    pub(crate) fn frames(&self, segment: u32) -> Option<[u32; SEGMENT_FRAMES]> {
        let mut frames = [NIL; SEGMENT_FRAMES];
        for (frame, kept) in frames.iter_mut().zip(&self.meta(segment).frames) {
            *frame = kept.load(Ordering::Acquire).checked_sub(1)?;
        }
        Some(frames)
    }

    /// Gives a segment in hand, or a free one, frames for its entries, or takes them from it.
    pub(crate) fn set_frames(&self, segment: u32, frames: Option<[u32; SEGMENT_FRAMES]>) {
        for (at, kept) in self.meta(segment).frames.iter().enumerate() {
            kept.store(frames.map_or(0, |frames| frames[at] + 1), Ordering::Release);
        }
        if self.is_free(segment) {
            let (from, to) = match frames {
                Some(_) => (&self.bare, &self.framed),
                None => (&self.framed, &self.bare),
            };
            from.remove(segment);
            to.add(segment);
        }
    }

    /// A free segment that has frames for its entries, or one that has none, looked for from number `from`
    /// on and then round. It stays free until it is opened.
    pub(crate) fn find_free(&self, from: u32, with_frames: bool) -> Option<u32> {
        let set = if with_frames { &self.framed } else { &self.bare };
        set.next(from).or_else(|| set.next(0))
    }

    /// Whether a free segment other than this one has frames.
    pub(crate) fn has_other_with_frames(&self, one: u32) -> bool {
        let first = self.framed.next(0);
        first.filter(|first| *first != one).or_else(|| self.framed.next(one + 1)).is_some()
    }

    /// Free segments that have frames, in order. Each may have lost them when the next is asked for.
    pub(crate) fn free_with_frames(&self) -> impl Iterator<Item = u32> {
        std::iter::successors(self.framed.next(0), |last| self.framed.next(last + 1))
    }

    /// Takes a free segment in hand.
    pub(crate) fn open(&self, segment: u32) {
        let meta = self.meta(segment);
        let opened = meta.word.compare_exchange(0, IN_HAND, Ordering::AcqRel, Ordering::Relaxed);
        assert!(opened.is_ok(), "segment {segment} is opened and not free");
        self.bare.remove(segment);
        self.framed.remove(segment);
        self.free.fetch_sub(1, Ordering::AcqRel);
        let sequence = self.sequence.fetch_add(1, Ordering::AcqRel) + 1;
        meta.sequence.store(sequence, Ordering::Release);
        meta.spoiled.store(0, Ordering::Release);
        meta.used.store(0, Ordering::Release);
    }

    /// Takes a sealed segment in hand, so that it does not become free; false if it is free now.
    pub(crate) fn take(&self, segment: u32) -> bool {
        schedule_point();
        let word = &self.meta(segment).word;
        let mut now = word.load(Ordering::Acquire);
        while now != 0 {
            assert_eq!(now & IN_HAND, 0, "segment {segment} is in hand already");
            let taken = now | IN_HAND;
            match word.compare_exchange(now, taken, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(changed) => now = changed,
            }
        }
        false
    }

    /// Lets a segment in hand go: it is sealed, or free if nothing in it is live; true if it is free.
    pub(crate) fn close(&self, segment: u32) -> bool {
        schedule_point();
        let before = self.meta(segment).word.fetch_and(LIVE, Ordering::AcqRel);
        assert_ne!(before & IN_HAND, 0, "segment {segment} is not in hand");
        let is_free = before & LIVE == 0;
        if is_free {
            self.freed(segment);
        } else if let Some(class) = self.class(segment, before & LIVE) {
            self.classes[class].add(segment);
        }
        is_free
    }

    /// The same at the end of a recovery, when all that is alive was told. What a process was writing when it died is not gone on with, so all of it is
    /// used up, and what was never written in it is as good as dead. (Of what was being cleaned, more may be counted so
    /// than cleaning gives: it is cleaned once more, at most, than it is worth.)
    pub(crate) fn close_found(&self, segment: u32) {
        let meta = self.meta(segment);
        let word = meta.word.load(Ordering::Acquire);
        // Whatever was counted: no less is used up than lives.
        let can_be = (word & LIVE)..=SEGMENT_GRANULES.into();
        // Another process may read what that one could not.
        self.forgive_one(segment);
        if word & FOUND == 0 || !can_be.contains(&meta.used.load(Ordering::Acquire).into()) {
            meta.used.store(SEGMENT_GRANULES, Ordering::Release);
        }
        self.close(segment);
    }

    /// Counts so many granules of a segment in hand as used up: nothing else can be there until it is opened
    /// again. All that is to be alive there is counted before it is.
    pub(crate) fn use_up(&self, segment: u32, granules: usize) {
        self.meta(segment).used.fetch_add(granules as u32, Ordering::AcqRel);
    }

    /// Counts so many granules of a segment in hand as live.
    pub(crate) fn enliven(&self, segment: u32, granules: usize) {
        let before = self.meta(segment).word.fetch_add(granules as u64, Ordering::AcqRel);
        assert_ne!(before & IN_HAND, 0, "segment {segment} is not in hand");
        self.live.fetch_add(granules as u64, Ordering::AcqRel);
    }

    /// Counts so many granules as dead.
    pub(crate) fn deaden(&self, segment: u32, granules: usize) {
        schedule_point();
        let granules = granules as u64;
        self.live.fetch_sub(granules, Ordering::AcqRel);
        schedule_point();
        let before = self.meta(segment).word.fetch_sub(granules, Ordering::AcqRel);
        assert!(before & LIVE >= granules, "segment {segment} has less than nothing live");
        if before == granules {
            schedule_point();
            self.freed(segment);
        } else if before & IN_HAND == 0
            && let Some(class) = self.class(segment, before - granules)
            && self.class(segment, before) != Some(class)
        {
            schedule_point();
            self.classes[class].add(segment);
        }
    }

    /// Makes known that a segment is free.
    fn freed(&self, segment: u32) {
        let has_frames = self.frames(segment).is_some();
        if has_frames { &self.framed } else { &self.bare }.add(segment);
        // Only now, so that as many are found as are counted.
        self.free.fetch_add(1, Ordering::AcqRel);
    }

    /// The class of a segment with so many live granules, as the place of its set; none if it is not worth cleaning.
    fn class(&self, segment: u32, live: u64) -> Option<usize> {
        let meta = self.meta(segment);
        let used = u64::from(meta.used.load(Ordering::Acquire));
        // What is used up may have been lost with a process that died, and then less than what lives.
        let class = (used.saturating_sub(live) * CLASSES).checked_div(used)?;
        let is_worth_it = class >= CLASS_MIN && meta.spoiled.load(Ordering::Acquire) == 0;
        is_worth_it.then(|| (class - CLASS_MIN) as usize)
    }

    /// Granules of a segment's live zpages; none if it is free or in hand.
    fn sealed_live(&self, segment: u32) -> Option<u64> {
        let word = self.meta(segment).word.load(Ordering::Acquire);
        (word != 0 && word & IN_HAND == 0).then_some(word)
    }

    /// A sealed segment of which hardly more is alive than of any other, so that cleaning it costs least and gives most; none
    /// if none is worth it. One whose cleaning has failed never is.
    pub(crate) fn emptiest(&self) -> Option<u32> {
        let sets = self.classes.iter().enumerate().rev();
        sets.filter_map(|(class, set)| self.emptiest_of(class, set)).next()
    }

    /// Whether next to nothing is alive in a sealed segment.
    pub(crate) fn is_nearly_dead(&self, segment: u32) -> bool {
        let used = u64::from(self.meta(segment).used.load(Ordering::Acquire));
        self.sealed_live(segment).is_some_and(|live| live * ALIVE_PART <= used)
    }

    /// The emptiest of the first few of a class.
    fn emptiest_of(&self, class: usize, set: &Bits) -> Option<u32> {
        let (mut from, mut choices, mut best) = (0, 0, None);
        while choices < CHOICES
            && let Some(segment) = set.next(from)
        {
            from = segment + 1;
            let live = self.sealed_live(segment);
            // What has died since may have put it above.
            match live.filter(|live| self.class(segment, *live) >= Some(class)) {
                Some(live) => {
                    choices += 1;
                    let used = u64::from(self.meta(segment).used.load(Ordering::Acquire));
                    let this = ((live << 32) / used, segment);
                    best = Some(best.map_or(this, |best: (u64, u32)| best.min(this)));
                }
                // It is in the set where it belongs, or will be when it is let go; unless that was just now.
                None => {
                    set.remove(segment);
                    let live = self.sealed_live(segment);
                    if live.is_some_and(|live| self.class(segment, live) >= Some(class)) {
                        set.add(segment);
                    }
                }
            }
        }
        best.map(|(_, segment)| segment)
    }

    /// Notes that a segment cannot be cleaned: not all that is alive in it is as it was written, or has an owner.
    pub(crate) fn spoil(&self, segment: u32) {
        self.meta(segment).spoiled.store(SPOILED, Ordering::Release);
    }

    /// Notes that what is alive in a segment could not be read: others come first, until it is [forgiven](Self::forgive).
    pub(crate) fn put_off(&self, segment: u32) {
        let spoiled = &self.meta(segment).spoiled;
        if spoiled.load(Ordering::Acquire) == 0 {
            spoiled.store(PUT_OFF, Ordering::Release);
        }
    }

    /// What could not be read may be by now.
    pub(crate) fn forgive(&self) {
        for segment in 0..self.count {
            if self.forgive_one(segment)
                && let Some(live) = self.sealed_live(segment)
                && let Some(class) = self.class(segment, live)
            {
                self.classes[class].add(segment);
            }
        }
    }

    fn forgive_one(&self, segment: u32) -> bool {
        let spoiled = &self.meta(segment).spoiled;
        let is_put_off = spoiled.load(Ordering::Acquire) == PUT_OFF;
        if is_put_off {
            spoiled.store(0, Ordering::Release);
        }
        is_put_off
    }

    pub(crate) fn is_free(&self, segment: u32) -> bool {
        self.meta(segment).word.load(Ordering::Acquire) == 0
    }

    fn meta(&self, segment: u32) -> &SegmentMeta {
        assert!(segment < self.count, "segment {segment} is not in the log");
        // SAFETY: the table has an entry for each of `count` segments, page-aligned at its start; an
        // entry consists of atomics, for which every bit pattern is valid.
        unsafe { self.table.start().cast::<SegmentMeta>().add(segment as usize).as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_free_when_its_last_zpage_dies_and_not_before() {
        let segments = Segments::new(&Store::new().unwrap(), 3).unwrap();
        segments.open(1);
        assert_eq!((segments.free(), segments.sealed_live(1)), (2, None));
        segments.use_up(1, 300);
        segments.enliven(1, 300);
        segments.deaden(1, 100);
        segments.close(1);
        assert_eq!(
            (segments.free(), segments.live(), segments.sealed_live(1)),
            (2, 200, Some(200))
        );
        segments.deaden(1, 150);
        assert_eq!(segments.free(), 2);
        segments.deaden(1, 50);
        assert_eq!((segments.free(), segments.live(), segments.sealed_live(1)), (3, 0, None));
        assert!(!segments.take(1));
    }

    #[test]
    fn what_is_in_hand_is_not_free_though_nothing_in_it_lives() {
        let segments = Segments::new(&Store::new().unwrap(), 2).unwrap();
        segments.open(0);
        segments.use_up(0, 5);
        segments.enliven(0, 5);
        segments.close(0);
        assert!(segments.take(0));
        segments.deaden(0, 5);
        assert_eq!((segments.free(), segments.find_free(0, false)), (1, Some(1)));
        segments.open(1);
        assert_eq!(segments.find_free(0, false), None);
        segments.close(0);
        segments.close(1);
        assert_eq!(segments.free(), 2);
        // Each use has a number of its own.
        let first = segments.sequence(0);
        segments.open(0);
        assert!(segments.sequence(0) > segments.sequence(1) && segments.sequence(1) > first);
    }

    #[test]
    fn free_ones_are_found_in_order_and_with_frames_if_need_be() {
        let segments = Segments::new(&Store::new().unwrap(), 3).unwrap();
        assert_eq!((segments.frames(1), segments.find_free(0, true)), (None, None));
        segments.set_frames(1, Some([0, 77]));
        assert_eq!((segments.frames(1), segments.find_free(2, true)), (Some([0, 77]), Some(1)));
        assert!(segments.has_other_with_frames(0) && !segments.has_other_with_frames(1));
        assert_eq!(segments.find_free(1, false), Some(2));
        segments.open(2);
        assert_eq!(segments.find_free(1, false), Some(0));
        segments.set_frames(1, None);
        assert_eq!(segments.frames(1), None);
    }

    /// What is in the sets is made anew from the entries.
    #[test]
    #[cfg_attr(miri, ignore = "it has no memory files, in which what is there is found again")]
    fn free_ones_and_the_emptiest_are_found_after_recovery() {
        let store = Store::new().unwrap();
        let segments = Segments::new(&store, 4).unwrap();
        for (segment, live) in [(0, 500), (1, 300), (3, 0)] {
            segments.open(segment);
            segments.set_frames(segment, Some([7, 8]));
            segments.use_up(segment, 600);
            segments.enliven(segment, live);
            segments.close(segment);
        }
        let found = |segments: &Segments| {
            let free = [false, true].map(|framed| segments.find_free(0, framed));
            (segments.free(), free, segments.emptiest())
        };
        let before = found(&segments);
        assert_eq!(before, (2, [Some(2), Some(3)], Some(1)));
        let again = Segments::of_store(&store, 4).unwrap();
        again.recover(|frames| frames.iter().all(|frame| *frame < 9));
        for (segment, live) in [(0, 500), (1, 300)] {
            again.enliven(segment, live);
        }
        assert_eq!(again.free(), 1);
        for segment in [0, 1, 3] {
            again.close_found(segment);
        }
        assert_eq!(found(&again), before);
    }

    #[test]
    fn the_emptiest_is_cleaned_unless_that_failed() {
        let segments = Segments::new(&Store::new().unwrap(), 4).unwrap();
        for (segment, dead) in [(0, 300), (1, 400), (2, 10)] {
            segments.open(segment);
            segments.use_up(segment, 600);
            segments.enliven(segment, 600);
            segments.deaden(segment, dead);
            segments.close(segment);
        }
        assert_eq!(segments.emptiest(), Some(1));
        assert_eq!(segments.emptiest(), Some(1), "it was looked for only");
        assert!(segments.take(1));
        assert_eq!(segments.emptiest(), Some(0));
        segments.spoil(1);
        segments.close(1);
        assert_eq!(segments.emptiest(), Some(0));
        segments.deaden(0, 262);
        assert!(!segments.is_nearly_dead(0), "of 600 granules 38 are alive");
        segments.deaden(0, 1);
        assert!(segments.is_nearly_dead(0));
        segments.deaden(0, 37);
        assert!(!segments.is_nearly_dead(0), "it is free");
        assert_eq!(segments.emptiest(), None, "little is dead in the third");
        // It is as good as any when it was free once.
        segments.deaden(1, 200);
        segments.open(1);
        segments.use_up(1, 12);
        segments.enliven(1, 11);
        segments.close(1);
        assert_eq!(segments.emptiest(), Some(1));
    }

    #[test]
    fn what_could_not_be_read_is_put_off_and_what_is_wrong_is_not_cleaned() {
        let store = Store::new().unwrap();
        let segments = Segments::new(&store, 4).unwrap();
        for segment in 0..3 {
            segments.open(segment);
            segments.use_up(segment, 600);
            segments.enliven(segment, 600);
            segments.deaden(segment, 400 - segment as usize);
            segments.close(segment);
        }
        for segment in [0, 1] {
            assert_eq!(segments.emptiest(), Some(segment));
            assert!(segments.take(segment));
            segments.put_off(segment);
            segments.close(segment);
        }
        segments.spoil(1);
        segments.put_off(1);
        assert_eq!(segments.emptiest(), Some(2));
        segments.forgive();
        assert_eq!(segments.emptiest(), Some(0));
        // A process that goes on tries it as well, and what is wrong stays so.
        assert!(segments.take(0) && segments.take(1) && segments.take(2));
        segments.put_off(0);
        [0, 1].into_iter().for_each(|segment| segments.close_found(segment));
        assert_eq!(segments.emptiest(), Some(0));
        assert!(segments.take(0));
        assert_eq!(segments.emptiest(), None);
    }

    /// All that a log can have, of which one is free, or worth cleaning.
    #[test]
    #[cfg_attr(miri, ignore = "it takes an hour there")]
    fn one_of_all_there_can_be_is_found_in_a_few_steps() {
        let segments = Segments::new(&Store::new().unwrap(), SEGMENTS_MAX).unwrap();
        for segment in 0..SEGMENTS_MAX {
            segments.open(segment);
            segments.set_frames(segment, Some([7, 8]));
            segments.use_up(segment, 600);
            segments.enliven(segment, 600);
            segments.close(segment);
        }
        let looks = || segments.classes.iter().map(Bits::looks).sum::<u64>();
        for segment in [0, 77, SEGMENTS_MAX / 2, SEGMENTS_MAX - 1] {
            looks();
            // What is left of the one before is taken out of each set, once.
            assert_eq!(segments.emptiest(), None);
            assert!(looks() <= 10 * CLASSES);
            assert_eq!(segments.emptiest(), None);
            assert!(looks() <= 3 * CLASSES);
            // It goes through all classes, a granule at a time.
            (0..500).for_each(|_| segments.deaden(segment, 1));
            looks();
            assert_eq!(segments.emptiest(), Some(segment));
            assert!(looks() <= 3 * CLASSES);
            segments.deaden(segment, 100);
            segments.framed.looks();
            assert_eq!(segments.find_free(SEGMENTS_MAX / 3, true), Some(segment));
            assert!(segments.framed.looks() <= 10);
            assert_eq!(segments.find_free(0, false), None);
            assert!(segments.bare.looks() <= 6);
            assert!(!segments.has_other_with_frames(segment));
            assert!(segments.free_with_frames().eq([segment]));
            assert!(segments.framed.looks() <= 20);
            segments.open(segment);
            segments.use_up(segment, 600);
            segments.enliven(segment, 600);
            segments.close(segment);
        }
    }

    #[test]
    #[should_panic(expected = "less than nothing")]
    fn more_cannot_die_than_lives() {
        let segments = Segments::new(&Store::new().unwrap(), 1).unwrap();
        segments.open(0);
        segments.enliven(0, 5);
        segments.deaden(0, 6);
    }
}
