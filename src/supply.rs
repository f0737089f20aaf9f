//! Supply: memory for the arena ahead of demand, and back to the system when it is not needed.
//!
//! The I/O path only takes frames that are free already. One thread, which no I/O depends on, calls
//! [`Engine::supply`] when [`Engine::supply_wanted`] says so, after the limit was set and now and then,
//! and [`Engine::settle`] once a second.
//! Below the low watermark the arena grows, up to the pool limit; what was free more than a step
//! above that mark for a whole second is given back by and by, so that a burst does not make memory
//! go to and fro; or all at once, where memory is short ([`Engine::settle_all`]). Above a limit that was lowered, frames are given back as they become free, and
//! ephemeral frames are evicted for it.

use crate::arena::STEP_FRAMES;
use crate::backing::{ENTRIES_LEAST, LOG_BYTES_MIN, Log};
use crate::engine::{Config, Engine, FRAME_COST};
use crate::error::ConfigError;
use crate::registry::Registry;
use crate::shard::Shard;
use crate::sync::Ordering;

/// The low watermark is this part of the frames in use,
const LOW_PART_OF_USE: u32 = 64;
/// at most 32 MiB,
const LOW_FRAMES_MAX: u32 = 8192;
/// at least 4 MiB, which is some 10 ms of one thread's puts,
const LOW_FRAMES_USUAL: u32 = 1024;
/// unless that is more than this part of the pool limit,
const LOW_PART_OF_LIMIT: u32 = 16;
/// and never less than what one put can need, a leaf and a frame.
const LOW_FRAMES_MIN: u32 = 2;

/// What a step did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Supplied {
    /// Frames that got memory.
    pub grown: u32,
    /// Frames whose memory was given back.
    pub released: u32,
    /// Another step now would do more.
    pub more: bool,
}

/// What [`Engine::settle`] remembers.
#[derive(Default)]
pub(crate) struct Settling {
    /// Free frames when it was last called.
    free_before: u32,
}

impl Engine {
    /// Whether [`Engine::supply`] has something to do that does not wait. Cheap enough to ask after
    /// every put. (Above a limit that was lowered, frames that puts still free are given back as
    /// they come; ephemeral ones are evicted when it is called.)
    pub fn supply_wanted(&self) -> bool {
        let (allocated, limit) = (self.arena.allocated(), self.arena.limit());
        match allocated > limit {
            true => self.arena.free() > 0,
            false => allocated < limit && self.arena.free() < self.low(),
        }
    }

    /// One bounded step, of at most 1 MiB, towards the watermark or the limit. It may block in the
    /// kernel for memory: never call it on the I/O path.
    pub fn supply(&self) -> std::io::Result<Supplied> {
        let mut done = Supplied::default();
        let over = self.arena.allocated().saturating_sub(self.arena.limit());
        if over > 0 {
            self.evict(over.min(STEP_FRAMES));
            done.released = self.arena.release(over.min(STEP_FRAMES))?;
        } else if self.arena.free() < self.low() {
            done.grown = self.arena.grow(STEP_FRAMES)?;
        }
        let over = self.arena.allocated() > self.arena.limit();
        done.more = done.grown + done.released > 0 && (over || self.supply_wanted());
        self.sample_peaks();
        Ok(done)
    }

    /// Gives back some of what was free well above the low watermark both now and at the last call.
    /// To be called about once a second.
    pub fn settle(&self) -> std::io::Result<Supplied> {
        // Half of it each time: all but 1 MiB is gone in seconds, and a new burst finds the rest.
        self.give_back(|excess| if excess > STEP_FRAMES { excess / 2 } else { excess })
    }

    /// As [`Engine::settle`], but gives back all of it: others want memory now. (A swapoff does, which frees frames as fast
    /// as it needs memory for what was in them.) To be called again soon while there is more.
    pub fn settle_all(&self) -> std::io::Result<Supplied> {
        self.give_back(|excess| excess)
    }

    fn give_back(&self, share: impl FnOnce(u32) -> u32) -> std::io::Result<Supplied> {
        let free = self.arena.free();
        let before = std::mem::replace(&mut self.settling.lock().free_before, free);
        let keep = self.low() + STEP_FRAMES.min(self.low());
        let excess = free.min(before).saturating_sub(keep);
        let mut done = Supplied::default();
        let wanted = share(excess);
        // A burst may come meanwhile, and it has the first claim on what is free.
        while done.released < wanted && self.arena.free() > keep {
            let released = self.arena.release((wanted - done.released).min(STEP_FRAMES))?;
            if released == 0 {
                break;
            }
            done.released += released;
        }
        done.more = self.arena.free() > keep;
        self.sample_peaks();
        Ok(done)
    }

    /// Sets the pool limit, in bytes. Growth stops there at once; what is above it leaves as pages
    /// leave. A lower limit is refused of which what is known of the backing file's pages would be more than half.
    pub fn set_limit(&self, limit: u64) -> Result<(), ConfigError> {
        let registry = self.registry.lock();
        let minimum = self.limit_for_log();
        if limit < minimum && limit < self.limit() {
            let entries = self.log().map_or(0, Log::frames) * FRAME_COST;
            return Err(ConfigError::LimitBelowLog { limit, entries, minimum });
        }
        self.apply_limit(&registry, limit)
    }

    /// The least pool limit that is twice as much as the frames with what is known of the backing file's pages; 0 if
    /// there are few of them.
    fn limit_for_log(&self) -> u64 {
        let entries = self.log().map_or(0, Log::frames);
        let frames = (2 * entries).saturating_sub(self.config.shards as u64 + 2);
        match entries > ENTRIES_LEAST {
            true => self.reserve() + frames * FRAME_COST,
            false => 0,
        }
    }

    /// What frames for pages come on top of, in bytes.
    fn reserve(&self) -> u64 {
        Config::limit_min(self.config.shards) + self.tables.load(Ordering::Acquire)
    }

    /// The registry is locked, so that limit and tables do not change meanwhile.
    pub(crate) fn apply_limit(&self, _locked: &Registry, limit: u64) -> Result<(), ConfigError> {
        let tables = self.tables.load(Ordering::Acquire);
        self.config.check_limit(limit, tables + self.log_least())?;
        let frames = self.config.check_limit(limit, tables)?;
        self.limit.store(limit, Ordering::Release);
        self.store.set_limit(limit);
        // A store that another program has made may have been made for fewer.
        self.arena.set_limit(frames.min(self.arena.frames_max()));
        Ok(())
    }

    /// The same for a limit that was in force. An engine that goes on from another's store may find that it leaves no
    /// room: what is not in frames may take more with another program. Nothing more is taken in then, until it is raised.
    pub(crate) fn keep_limit(&self, locked: &Registry, limit: u64) {
        if self.apply_limit(locked, limit).is_err() {
            self.limit.store(limit, Ordering::Release);
            let in_use = self.arena.allocated().saturating_sub(self.arena.free());
            self.arena.set_limit(in_use.min(self.arena.frames_max()));
        }
    }

    /// The pool limit in bytes.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Acquire)
    }

    /// The smallest pool limit that the pools there are leave room for, and the backing file's pages, in bytes.
    pub fn limit_min(&self) -> u64 {
        (self.reserve() + self.log_least()).max(self.limit_for_log())
    }

    /// What a log cannot do without, in bytes, if there is one.
    pub(crate) fn log_least(&self) -> u64 {
        self.log().map_or(0, |_| LOG_BYTES_MIN)
    }

    /// Frees ephemeral frames, and then those of which the log has a copy, until so many frames are free or there are
    /// none.
    fn evict(&self, frames: u32) {
        for evict in [Shard::evict_ephemeral, Shard::evict_clean] {
            for shard in &self.shards {
                while self.arena.free() < frames {
                    let Some(frame) = evict(&mut shard.0.lock()) else { break };
                    self.arena.push(frame);
                }
            }
        }
    }

    /// The low watermark, in frames.
    fn low(&self) -> u32 {
        let in_use = self.arena.allocated().saturating_sub(self.arena.free());
        (in_use / LOW_PART_OF_USE)
            .clamp(LOW_FRAMES_USUAL, LOW_FRAMES_MAX)
            .min(self.arena.limit() / LOW_PART_OF_LIMIT)
            .max(LOW_FRAMES_MIN)
    }
}
