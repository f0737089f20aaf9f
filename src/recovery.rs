//! Recovery: an engine goes on from the store of a process that has died.
//!
//! What there is, the slots say, and nothing else: a zpage is alive if a slot points at it and its frame, or its
//! block of the log, lists it. Everything else is found from that: which frames are free, what is on which list,
//! how much is alive in a segment, all figures of what is held. (Figures of what was done begin anew.) So it does
//! not matter where the process was: each change of a slot is one word, before which everything is as it was and
//! after which it is as it shall be. What was being written to the log is where it was, or there; a frame that was
//! held, or of which the log has a copy, is an ordinary one again, and the first to go.
//!
//! The order of the LRU queues is in the links that the lists left in the frame table. At most one
//! place of a queue was being changed: it is walked from both ends.
//!
//! [`Prepared`] is for a process that waits for another's death: it has all memory at hand that it will need, for
//! there may be none to be had at that moment. [`Prepared::attach`] allocates next to nothing. It changes nothing
//! that the slots say (but which of two copies it is, where a segment was being cleaned), so that it may be killed as
//! well, and begun again by the next.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::{fmt, io};

use slab::Slab;

use crate::arena::Arena;
use crate::backing::{Log, SEGMENTS, Segments, Writeback, noted_unit_blocks};
use crate::directory::Directory;
use crate::engine::{Config, Engine, POOLS_MAX, SHARDS_MAX};
use crate::frame::{NIL, Use};
use crate::handle::PoolId;
use crate::owners::Member;
use crate::pool::Pool;
use crate::registry::Registry;
use crate::store::{AttachError, PoolInfo, Store};
use crate::sync::Ordering;

/// All that an engine on a store needs, while another process may be at work on it.
pub struct Prepared {
    engine: Engine,
    directories: Vec<(PoolInfo, Directory)>,
    writeback: Option<Writeback>,
    /// Frames from this number on may not be at hand.
    at_hand: u32,
}

/// An engine that goes on from a store.
pub struct Attached {
    /// The engine.
    pub engine: Engine,
    /// What writes to its backing file, if it has one. No job may be begun before the dead process's I/O on that
    /// file has ended: what is still on its way may land where something else is written now.
    pub writeback: Option<Writeback>,
    /// What was found.
    pub recovered: Recovered,
}

/// An attach that has failed. All is in the store that was.
#[derive(thiserror::Error)]
#[error("{error}")]
#[non_exhaustive]
pub struct AttachFailed {
    /// Why.
    pub error: AttachError,
    /// What was to go on, for another try.
    pub prepared: Box<Prepared>,
}

impl fmt::Debug for AttachFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachFailed").field("error", &self.error).finish_non_exhaustive()
    }
}

impl From<AttachFailed> for AttachError {
    fn from(failed: AttachFailed) -> Self {
        failed.error
    }
}

/// What recovery has found.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Recovered {
    /// Frames that have memory.
    pub frames: u32,
    /// Pages that are held.
    pub pages: u64,
    /// Pages that are lost, because what should say where they are makes no sense.
    pub damaged: u64,
}

impl Prepared {
    /// Gets everything that an engine on this store needs. Another process may be at work on it: nothing in it is
    /// changed.
    pub fn new(store: Store) -> Result<Self, AttachError> {
        let geometry = store.geometry()?;
        let shards = geometry.shards as usize;
        if shards > SHARDS_MAX {
            return Err(AttachError::Damaged);
        }
        let config = Config { limit: store.limit(), limit_max: geometry.limit_max, shards };
        let arena = Arena::new(&store, geometry.frames_max, 0)?;
        let engine = Engine::over(&config, store, arena);
        let (directories, at_hand) = (Vec::with_capacity(POOLS_MAX), 0);
        let mut prepared = Self { engine, directories, writeback: None, at_hand };
        prepared.bring_in()?;
        Ok(prepared)
    }

    /// Brings what has come since to hand. To be called now and then.
    pub fn follow(&mut self) -> io::Result<()> {
        self.bring_in().map_err(|error| match error {
            AttachError::Memory { source } => source,
            error => io::Error::new(io::ErrorKind::InvalidData, error),
        })
    }

    fn bring_in(&mut self) -> Result<(), AttachError> {
        self.open_log()?;
        self.open_directories()?;
        self.at_hand = self.engine.arena.bring_in(self.at_hand)?;
        Ok(())
    }

    fn open_log(&mut self) -> Result<(), AttachError> {
        let (engine, record) = (&self.engine, self.engine.store.log());
        if record.segments() == 0 || self.writeback.is_some() {
            return Ok(());
        }
        let segments = u32::try_from(record.segments()).ok();
        let segments = segments
            .filter(|segments| SEGMENTS.contains(segments))
            .ok_or(AttachError::Tables { what: "how large it says that the backing file is" })?;
        let segments = Segments::of_store(&engine.store, segments)?;
        segments.bring_in()?;
        let key = record.key();
        let log = Arc::new(Log::new(Arc::clone(&engine.arena), segments, key.as_ref()));
        let unit_blocks = noted_unit_blocks(engine.store.unit_blocks())
            .ok_or(AttachError::Tables { what: "how much it says is written at a time" })?;
        self.writeback = Some(Writeback::new(Arc::clone(&log), unit_blocks)?);
        engine.set_log(log);
        Ok(())
    }

    fn open_directories(&mut self) -> io::Result<()> {
        for id in (0..POOLS_MAX as u16).map(PoolId) {
            let Some(info) = self.engine.store.pool(id).pool(id) else { continue };
            if self.directories.iter().all(|(known, _)| *known != info) {
                let directory = Directory::of_store(&self.engine.store, id, info.pages)?;
                directory.bring_in()?;
                self.directories.push((info, directory));
            }
        }
        Ok(())
    }

    /// Goes on from what the other process has left. It is dead: no thread of it runs any more. What takes memory is
    /// done in here, all of it: page tables of what has come since, so that who serves requests afterwards never asks
    /// for any. So this is for a thread that may use the kernel's reserve.
    ///
    /// If something is not to be had, nothing is changed, and it can be tried again.
    pub fn attach(mut self) -> Result<Attached, AttachFailed> {
        match self.get_ready() {
            Ok(frames) => Ok(self.go_on(frames)),
            Err(error) => Err(AttachFailed { error, prepared: Box::new(self) }),
        }
    }

    /// Gets what may not be to be had. Returns the number past the last frame that has memory.
    fn get_ready(&mut self) -> Result<u32, AttachError> {
        self.open_log()?;
        self.check_tables()?;
        self.open_directories()?;
        Ok(self.engine.arena.find_frames()?)
    }

    fn go_on(mut self, frames: u32) -> Attached {
        let mut recovered = Recovered::default();
        self.engine.log().inspect(|log| log.recover());
        self.find_pools(&mut recovered);
        self.engine.readmit(frames);
        recovered.frames = self.engine.adopt_frames(frames);
        self.engine.log().inspect(|log| log.close_all());
        self.settle_account();
        self.clear_away();
        Attached { engine: self.engine, writeback: self.writeback, recovered }
    }

    /// Whether all that nothing else can be found without makes sense. What makes none elsewhere costs only what it is
    /// about.
    fn check_tables(&self) -> Result<(), AttachError> {
        let store = &self.engine.store;
        let mut ids = (0..POOLS_MAX as u16).map(PoolId);
        if !ids.all(|id| store.pool(id).is_sound()) {
            return Err(AttachError::Tables { what: "what it says of its pools" });
        }
        if !self.engine.log().is_none_or(|log| log.segments().is_sound()) {
            return Err(AttachError::Tables {
                what: "what it says of the backing file's segments",
            });
        }
        Ok(())
    }

    /// Makes the pools known, and finds what is in them.
    fn find_pools(&mut self, recovered: &mut Recovered) {
        let store = &self.engine.store;
        self.directories.retain(|(info, _)| store.pool(info.id).pool(info.id) == Some(*info));
        let clients = self.directories.iter().map(|(info, _)| (usize::from(info.client.0), ()));
        let mut registry = Registry::new(Slab::from_iter(clients));
        for (info, directory) in self.directories.drain(..) {
            let pool = Pool::new(info.id, info.client, info.kind, info.pages, directory);
            self.engine.add_pool(&mut registry, pool);
        }
        for pool in registry.pools() {
            for object in 0..pool.directory.objects() {
                let shard = Member::shard_of_object(pool.id, object, self.engine.shards.len());
                self.engine.shards[shard].0.lock().find_object(pool, object, recovered);
            }
        }
        *self.engine.registry.lock() = registry;
    }

    /// What tables take, and so what is left for frames; and frames that are to be at hand, as far as there are free
    /// ones: this is no time to ask the kernel for memory, and what is missing is taken when there is some.
    fn settle_account(&mut self) {
        let engine = &self.engine;
        let registry = engine.registry.lock();
        let mut tables: u64 = registry.pools().map(|pool| pool.directory.bytes()).sum();
        if let (Some(log), Some(writeback)) = (engine.log(), &self.writeback) {
            tables += log.segments().bytes() + writeback.bytes();
        }
        engine.tables.store(tables, Ordering::Release);
        // None that is larger is ever in force.
        engine.keep_limit(&registry, engine.store.limit().min(engine.config.limit_max));
        drop(registry);
        // First what the log cannot make room without.
        if let Some(writeback) = &mut self.writeback {
            while writeback.wants_frame()
                && let Some(frame) = engine.arena.pop_any()
            {
                writeback.keep(frame);
            }
            engine.log().expect("it is the log's").set_accepts(true);
        }
        for shard in &engine.shards {
            shard.0.lock().fill_spare();
        }
    }

    /// Gives back what is left of pools that were being made or removed.
    fn clear_away(&self) {
        let store = &self.engine.store;
        for id in (0..POOLS_MAX as u16).map(PoolId) {
            if store.pool(id).pool(id).is_none() {
                // What cannot be given back is when the number is used again.
                let _ = store.clear_directory(id);
                let _ = store.clear_io_memory(id);
                if !store.pool(id).is_vacant() {
                    store.pool(id).remove();
                }
            }
        }
    }
}

impl Engine {
    /// Puts frames with zpages that were found alive into their queues, in the order in which they were there.
    fn readmit(&self, frames: u32) {
        let waits = |frame: u32| self.waits(frame);
        // Not in any queue, and the oldest of all.
        for frame in (0..frames).filter(|frame| waits(*frame)) {
            if self.arena.meta(frame).is_held() {
                self.readmit_frame(frame);
            }
        }
        // In a queue apart, and older than all in the others.
        for is_clean in [true, false] {
            for frame in (0..frames).filter(|frame| waits(*frame)) {
                let meta = self.arena.meta(frame);
                if meta.lru.prev.load(Relaxed) == NIL && meta.clean().is_some() == is_clean {
                    self.readmit_from(frame);
                }
            }
        }
        // Behind a place that was being changed.
        for frame in (0..frames).filter(|frame| waits(*frame)) {
            let mut first = frame;
            while let Some(before) = self.before(first).filter(|before| *before != frame) {
                first = before;
            }
            self.readmit_from(first);
        }
    }

    /// Whether a frame has zpages that were found alive, and is in no queue yet.
    fn waits(&self, frame: u32) -> bool {
        let meta = self.arena.meta(frame);
        !meta.is_claimed()
            && matches!(meta.known_use(), Some(Use::Ephemeral | Use::Persistent))
            && meta.found().0 != 0
    }

    fn readmit_from(&self, mut frame: u32) {
        loop {
            let next = self.after(frame);
            self.readmit_frame(frame);
            let Some(next) = next else { return };
            frame = next;
        }
    }

    /// The waiting frame behind a waiting one in its queue, if the links of both agree.
    fn after(&self, frame: u32) -> Option<u32> {
        let next = self.arena.meta(frame).lru.next.load(Relaxed);
        let fits = |next: &u32| self.arena.meta(*next).lru.prev.load(Relaxed) == frame;
        Some(next).filter(|next| self.arena.has(*next) && self.waits(*next)).filter(fits)
    }

    /// The same for the one before.
    fn before(&self, frame: u32) -> Option<u32> {
        let prev = self.arena.meta(frame).lru.prev.load(Relaxed);
        let fits = |prev: &u32| self.arena.meta(*prev).lru.next.load(Relaxed) == frame;
        Some(prev).filter(|prev| self.arena.has(*prev) && self.waits(*prev)).filter(fits)
    }

    fn readmit_frame(&self, frame: u32) {
        let meta = self.arena.meta(frame);
        let (alive, shard) = meta.found();
        meta.claim();
        self.shards[shard].0.lock().adopt(frame, alive);
    }

    /// Frames that something was found in are in use, and all others with memory free; returns how many there are. No
    /// mark of recovery is left on any.
    fn adopt_frames(&self, frames: u32) -> u32 {
        let mut adoption = self.arena.adopt();
        for frame in 0..frames {
            let meta = self.arena.meta(frame);
            if meta.is_claimed() {
                meta.unclaim();
                adoption.take_used(frame);
            } else if meta.found_memory() {
                adoption.take_free(frame);
            }
        }
        self.arena.allocated()
    }
}

#[cfg(all(test, not(any(miri, feature = "shuttle"))))]
mod tests;
