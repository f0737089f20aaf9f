//! What goes to the backing file, and when: the part that somebody may want otherwise.
//!
//! Frames go ahead of demand: when less than the low watermark is left of the pool limit, until as much as the
//! high watermark is (frames of ephemeral pools count as left, for they can be taken at once); when there has been no free frame for a while, whatever the pool limit; and where an age is set,
//! when they have not been used for so long. How much is written is
//! limited by the second and by the day, where that is set: then frames wait, and when the day's part is used up,
//! the pool is as one without a backing file. So it is for a while after a write that failed, twice as long
//! after each that follows. [`WritebackSettings`] can change at any time.
//!
//! *Which* frames go is the allocator's order: [`crate::zbud`], least recently used ones; first those of pages that were
//! read, then those with a raw page.

use super::log::Log;
use super::settings::{SettingsError, WritebackSettings};
use super::unit::UNIT_BLOCKS;
use crate::engine::Engine;
use crate::store::DayRecord;
use crate::sync::{AtomicU64, Ordering};

/// The low watermark is never less than what one put can need, a leaf and a frame.
const LOW_MIN: u32 = 2;

/// How long to rest after a failure, in nanoseconds, and at most.
const REST_MIN: u64 = 100_000_000;
const REST_MAX: u64 = 30_000_000_000;

const SECOND: u64 = 1_000_000_000;
const DAY: u64 = 24 * 60 * 60 * SECOND;

/// What is written at once after a time without writing, where bytes a second are limited, as a part of a second.
const BURST: u64 = SECOND / 4;

/// How long frames wait for their turn while puts wait for them: front ends give up after 1 s.
const PACE_MAX: u64 = SECOND / 2;

/// How long the arena may be without a free frame before some are made by writing: it grows by 1 MiB in less.
const DRY: u64 = SECOND / 100;

/// Ticks of an age: a frame goes when it is so much older, and an eighth at most.
const AGE_TICKS: u8 = 8;

/// The settings in force, for all who look at them.
pub(crate) struct Dials {
    /// The low watermark in thousandths, and above it the high one.
    watermarks: AtomicU64,
    /// The rest is 0 for none.
    bytes_per_second: AtomicU64,
    bytes_per_day: AtomicU64,
    age_seconds: AtomicU64,
    /// 1 or 0.
    keep_copies: AtomicU64,
}

impl Dials {
    pub(crate) fn new() -> Self {
        let dials = Self {
            watermarks: AtomicU64::new(0),
            bytes_per_second: AtomicU64::new(0),
            bytes_per_day: AtomicU64::new(0),
            age_seconds: AtomicU64::new(0),
            keep_copies: AtomicU64::new(0),
        };
        dials.set(&WritebackSettings::default());
        dials
    }

    fn set(&self, settings: &WritebackSettings) {
        let WritebackSettings { low_permille, high_permille, .. } = *settings;
        let watermarks = u64::from(high_permille) << 32 | u64::from(low_permille);
        self.watermarks.store(watermarks, Ordering::Release);
        self.bytes_per_second.store(settings.bytes_per_second.unwrap_or(0), Ordering::Release);
        self.bytes_per_day.store(settings.bytes_per_day.unwrap_or(0), Ordering::Release);
        self.age_seconds.store(settings.age_seconds.unwrap_or(0).into(), Ordering::Release);
        self.keep_copies.store(settings.keep_copies.into(), Ordering::Release);
    }

    /// The low watermark in thousandths: asked for after each put.
    fn low_permille(&self) -> u32 {
        self.watermarks.load(Ordering::Acquire) as u32
    }

    fn get(&self) -> WritebackSettings {
        let some = |of: &AtomicU64| Some(of.load(Ordering::Acquire)).filter(|value| *value != 0);
        let watermarks = self.watermarks.load(Ordering::Acquire);
        WritebackSettings {
            low_permille: watermarks as u32,
            high_permille: (watermarks >> 32) as u32,
            bytes_per_second: some(&self.bytes_per_second),
            bytes_per_day: some(&self.bytes_per_day),
            age_seconds: some(&self.age_seconds).map(|seconds| seconds as u32),
            keep_copies: some(&self.keep_copies).is_some(),
        }
    }
}

impl Engine {
    /// When pages go to the backing file, and how many.
    pub fn writeback_settings(&self) -> WritebackSettings {
        self.dials.get()
    }

    /// Sets that, for what is written from now on.
    pub fn set_writeback_settings(
        &self,
        settings: &WritebackSettings,
    ) -> Result<(), SettingsError> {
        settings.check()?;
        self.dials.set(settings);
        Ok(())
    }
}

/// See the module's description.
#[derive(Default)]
pub(crate) struct Policy {
    /// Whether frames are going.
    is_evicting: bool,
    /// After writes that failed.
    pub(crate) writing: Rest,
    /// After reads of what is to be cleaned that failed.
    pub(crate) reading: Rest,
    /// Until when what was written is enough, by the limit of a second.
    paced_until: u64,
    /// Since when there has been no free frame.
    dry_since: Option<u64>,
    clock: Clock,
}

/// What is to go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Wanted {
    /// So many frames,
    pub(crate) frames: u32,
    /// that are so many ticks old; any frames if it is 0.
    pub(crate) age: u8,
}

impl Wanted {
    const NOTHING: Self = Self { frames: 0, age: 0 };
}

impl Policy {
    /// What is to go now, when so many frames are on their way.
    pub(crate) fn wanted(&mut self, engine: &Engine, under_way: u32, now: u64) -> Wanted {
        let left = left(engine) + under_way;
        let low = low(engine);
        let settings = engine.writeback_settings();
        let high = part(engine, settings.high_permille).max(low + 1);
        self.is_evicting = left < if self.is_evicting { high } else { low };
        if self.is_evicting {
            return Wanted { frames: high - left, age: 0 };
        }
        if self.is_starving(engine, now) {
            return Wanted { frames: UNIT_BLOCKS.saturating_sub(under_way), age: 0 };
        }
        match self.clock.is_looking && settings.age_seconds.is_some() {
            true => Wanted { frames: UNIT_BLOCKS, age: AGE_TICKS },
            false => Wanted::NOTHING,
        }
    }

    /// Whether anything may be written or read for that now: by the limits of a second and of a day.
    pub(crate) fn is_due(&mut self, engine: &Engine, now: u64) -> bool {
        if engine.writeback_settings().bytes_per_second.is_none() {
            self.paced_until = 0;
        }
        now >= self.paced_until && !self.is_spent(engine, now)
    }

    /// Whether what is due next is due too late to be waited for.
    pub(crate) fn is_far(&self, now: u64) -> bool {
        self.paced_until > now + PACE_MAX
    }

    /// Whether there has been no free frame for a while though the pool limit allows more: the system has no memory for
    /// the arena to grow.
    fn is_starving(&mut self, engine: &Engine, now: u64) -> bool {
        if !is_dry(engine) {
            self.dry_since = None;
            return false;
        }
        now - *self.dry_since.get_or_insert(now) >= DRY
    }

    /// Nothing of that age was found: there is no need to look before the next tick.
    pub(crate) fn none_of_age(&mut self) {
        self.clock.is_looking = false;
    }

    /// The tick that it is, if another has begun.
    pub(crate) fn tick(&mut self, engine: &Engine, now: u64) -> Option<u8> {
        let Some(age) = engine.writeback_settings().age_seconds.map(u64::from) else {
            self.clock.next_at = 0;
            return None;
        };
        self.clock.advance(age * SECOND / u64::from(AGE_TICKS), now).then_some(self.clock.tick)
    }

    /// So many bytes are written.
    pub(crate) fn wrote(&mut self, engine: &Engine, bytes: u64, now: u64) {
        Day(engine.store.day()).add(bytes, now);
        if let Some(rate) = engine.writeback_settings().bytes_per_second {
            let from = self.paced_until.max(now.saturating_sub(BURST));
            self.paced_until =
                from + (u128::from(bytes) * u128::from(SECOND) / u128::from(rate)) as u64;
        }
    }

    /// Whether as much was written as may be in a day.
    pub(crate) fn is_spent(&self, engine: &Engine, now: u64) -> bool {
        let limit = engine.writeback_settings().bytes_per_day;
        limit.is_some_and(|limit| Day(engine.store.day()).written(now) >= limit)
    }

    /// For how long nothing is to be done, in nanoseconds.
    pub(crate) fn rests_for(&self, now: u64) -> Option<u64> {
        let paced = self.paced_until.checked_sub(now).filter(|left| *left > 0);
        self.writing.left(now).or(paced).or(self.reading.left(now))
    }
}

/// What was written in a day: from the first write on, until a day later. It is in the store, and goes on when another process
/// does.
struct Day<'a>(&'a DayRecord);

impl Day<'_> {
    fn written(&self, now: u64) -> u64 {
        let (since, written) = self.0.get();
        // One that has not begun yet is no day.
        if now.checked_sub(since).is_some_and(|age| age < DAY) { written } else { 0 }
    }

    fn add(&self, bytes: u64, now: u64) {
        let written = self.written(now);
        let since = if written == 0 { now } else { self.0.get().0 };
        self.0.set(since, written.saturating_add(bytes));
    }
}

/// Time in ticks, for ages. It stands still while no age is set.
#[derive(Default)]
struct Clock {
    tick: u8,
    next_at: u64,
    /// Whether there may be frames that are old enough.
    is_looking: bool,
}

impl Clock {
    /// Whether another tick of this length has begun, or several. It wraps: what is that old was looked at before.
    fn advance(&mut self, length: u64, now: u64) -> bool {
        // It may have been set when ticks were longer.
        self.next_at = self.next_at.min(now + length);
        let Some(late) = now.checked_sub(self.next_at) else { return false };
        // A long time without ages counts as one tick.
        let ticks = if self.next_at == 0 { 1 } else { 1 + late / length };
        self.tick = self.tick.wrapping_add(ticks.min(u64::from(AGE_TICKS)) as u8);
        self.next_at = now + length;
        self.is_looking = true;
        true
    }
}

/// Whether less is left than the low watermark, or nothing is to be had at the moment.
pub(crate) fn is_low(engine: &Engine) -> bool {
    left(engine) < low(engine) || is_dry(engine)
}

/// Whether no frame is to be had at the moment, whatever the pool limit.
fn is_dry(engine: &Engine) -> bool {
    engine.arena.free() == 0 && at_once(engine) == 0
}

/// Frames in use that can be had without any I/O: those that have a copy in the log, and those of which all may vanish.
fn at_once(engine: &Engine) -> u32 {
    engine.log().map_or(0, Log::clean) as u32 + engine.arena.evictable()
}

/// Frames that are left below the pool limit, or can be had at once.
fn left(engine: &Engine) -> u32 {
    let in_use = engine.arena.allocated().saturating_sub(engine.arena.free());
    engine.arena.limit().saturating_sub(in_use.saturating_sub(at_once(engine)))
}

/// The low watermark, in frames.
fn low(engine: &Engine) -> u32 {
    part(engine, engine.dials.low_permille()).max(LOW_MIN)
}

/// Thousandths of the pool limit, in frames.
fn part(engine: &Engine, permille: u32) -> u32 {
    // Not more than the limit, which is that small.
    (u64::from(engine.arena.limit()) * u64::from(permille) / 1000) as u32
}

/// For how long something that failed is not tried again.
#[derive(Default)]
pub(crate) struct Rest {
    until: u64,
    /// How long it is in all; 0 after a success.
    length: u64,
}

impl Rest {
    /// How long it lasts yet, in nanoseconds; none if it is over.
    pub(crate) fn left(&self, now: u64) -> Option<u64> {
        self.until.checked_sub(now).filter(|left| *left > 0)
    }

    /// Whether the last one failed, or it rests yet for one before.
    pub(crate) fn is_failing(&self, now: u64) -> bool {
        self.length > 0 || self.left(now).is_some()
    }

    /// One that ended well: what had failed beside it is soon tried again, however long that was to rest.
    pub(crate) fn succeeded(&mut self, now: u64) {
        self.length = 0;
        self.until = self.until.min(now + REST_MIN);
    }

    pub(crate) fn failed(&mut self, now: u64) {
        if self.left(now).is_none() {
            self.length = (2 * self.length).clamp(REST_MIN, REST_MAX);
            self.until = now + self.length;
        }
        // What was under way at the same time fails at the same time, and that is one failure; also behind one that
        // succeeded.
        self.length = self.length.max(REST_MIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    #[test]
    fn it_rests_longer_with_each_failure_until_one_succeeds() {
        let mut rest = Rest::default();
        let mut now = 5;
        let mut lengths = Vec::new();
        for _ in 0..12 {
            assert_eq!(rest.left(now), None);
            rest.failed(now);
            rest.failed(now + 1);
            let length = rest.left(now).unwrap();
            assert_eq!(rest.left(now + length - 1), Some(1));
            assert!(rest.is_failing(now + length));
            now += length;
            lengths.push(length);
        }
        assert_eq!(lengths[..3], [REST_MIN, 2 * REST_MIN, 4 * REST_MIN]);
        assert_eq!((lengths[11], rest.left(now)), (REST_MAX, None));
        rest.succeeded(now);
        assert!(!rest.is_failing(now));
        rest.failed(now);
        assert_eq!(rest.left(now), Some(REST_MIN));
    }

    /// What was under way together ends one way and the other.
    #[test]
    fn it_rests_no_longer_than_at_first_when_another_succeeds() {
        let mut rest = Rest::default();
        let mut now = 5;
        for _ in 0..4 {
            rest.failed(now);
            now += rest.left(now).unwrap();
        }
        rest.failed(now);
        assert!(rest.left(now) > Some(REST_MIN));
        rest.succeeded(now + 1);
        assert_eq!(rest.left(now + 1), Some(REST_MIN));
        assert!(rest.is_failing(now + 1) && !rest.is_failing(now + 1 + REST_MIN));
        rest.failed(now + 2);
        assert!(rest.is_failing(now + 1 + REST_MIN), "the last one failed");
    }

    #[test]
    fn a_day_begins_with_the_first_write() {
        let store = Store::new().unwrap();
        let day = Day(store.day());
        assert_eq!(day.written(0), 0);
        day.add(10, 3 * DAY);
        day.add(20, 4 * DAY - 1);
        assert_eq!((day.written(4 * DAY - 1), day.written(4 * DAY)), (30, 0));
        day.add(5, 5 * DAY);
        assert_eq!(day.written(5 * DAY), 5);
        // Nobody writes that, and memory may be broken.
        store.day().set(u64::MAX, u64::MAX);
        assert_eq!(day.written(6 * DAY), 0);
        day.add(7, 6 * DAY);
        assert_eq!(day.written(6 * DAY), 7);
    }

    #[test]
    #[cfg(not(miri))]
    fn a_day_goes_on_in_another_process() {
        let store = Store::new().unwrap();
        Day(store.day()).add(10, 3 * DAY);
        let file = store.file().try_clone_to_owned().unwrap();
        drop(store);
        let store = Store::from_file(file).unwrap();
        Day(store.day()).add(10, 4 * DAY - 2);
        assert_eq!(Day(store.day()).written(4 * DAY - 1), 20);
    }

    #[test]
    fn ticks_come_at_their_time_and_late_ones_together() {
        let mut clock = Clock::default();
        assert!(clock.advance(100, 7) && clock.is_looking);
        assert!(!clock.advance(100, 106));
        assert_eq!(clock.tick, 1);
        assert!(clock.advance(100, 310) && !clock.advance(100, 409));
        assert_eq!(clock.tick, 4);
        assert!(!clock.advance(10, 395) && clock.advance(10, 405), "shorter ones begin at once");
        assert_eq!(clock.tick, 5);
        // More than an age is not told apart.
        assert!(clock.advance(100, 100_000));
        assert_eq!(clock.tick, 5 + AGE_TICKS);
    }
}
