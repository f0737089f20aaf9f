//! What goes to the backing file, and when: the part that somebody may want otherwise.
//!
//! Frames go ahead of demand: when fewer than the low watermark are left below the pool limit, until there
//! are as many as the high watermark. After a write that failed none is tried for a while, twice as long
//! after each that follows, and the pool is meanwhile as one without a backing file.
//!
//! *Which* frames go is the allocator's order: [`crate::zbud`], least recently used ones, those with a raw
//! page first.

use crate::engine::Engine;

/// The low watermark is this part of the pool limit,
const LOW_PART: u32 = 16;
/// and the high one this.
const HIGH_PART: u32 = 12;
/// Neither is more than so many frames, 64 and 80 MiB,
const LOW_MAX: u32 = 16384;
const HIGH_MAX: u32 = 20480;
/// nor less than what one put can need, a leaf and a frame.
const LOW_MIN: u32 = 2;

/// How long to rest after a failure, in nanoseconds, and at most.
const REST_MIN: u64 = 100_000_000;
const REST_MAX: u64 = 30_000_000_000;

/// See the module's description.
#[derive(Default)]
pub(crate) struct Policy {
    /// Whether frames are going.
    is_evicting: bool,
    /// After writes that failed.
    pub(crate) writing: Rest,
}

impl Policy {
    /// How many frames are to go now, of which so many are on their way.
    pub(crate) fn frames_to_evict(&mut self, engine: &Engine, under_way: u32) -> u32 {
        let limit = engine.arena.limit();
        let in_use = engine.arena.allocated().saturating_sub(engine.arena.free());
        let left = limit.saturating_sub(in_use) + under_way;
        let low = (limit / LOW_PART).clamp(LOW_MIN, LOW_MAX);
        let high = (limit / HIGH_PART).clamp(low + 1, HIGH_MAX);
        self.is_evicting = left < if self.is_evicting { high } else { low };
        if self.is_evicting { high - left } else { 0 }
    }
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

    pub(crate) fn succeeded(&mut self) {
        self.length = 0;
    }

    pub(crate) fn failed(&mut self, now: u64) {
        // What was under way at the same time fails at the same time, and that is one failure.
        if self.left(now).is_none() {
            self.length = (2 * self.length).clamp(REST_MIN, REST_MAX);
            self.until = now + self.length;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            now += length;
            lengths.push(length);
        }
        assert_eq!(lengths[..3], [REST_MIN, 2 * REST_MIN, 4 * REST_MIN]);
        assert_eq!((lengths[11], rest.left(now)), (REST_MAX, None));
        rest.succeeded();
        rest.failed(now);
        assert_eq!(rest.left(now), Some(REST_MIN));
    }
}
