//! Attaching a backing file to an engine.

use std::io;
use std::sync::Arc;

use super::log::Log;
use super::seal::KEY_BYTES;
use super::segments::{SEGMENT_BYTES, SEGMENT_FRAMES, SEGMENTS_MAX, Segments};
use super::unit::unit_blocks;
use super::writeback::{HAND_FRAMES, SEGMENTS_MIN, Writeback};
use crate::engine::{Engine, FRAME_COST};
use crate::sync::Ordering;

/// Bytes of the smallest backing file that works.
pub const BACKING_BYTES_MIN: u64 = SEGMENTS_MIN as u64 * SEGMENT_BYTES;

/// Bytes of the pool limit that a log cannot do without: frames for entries, in hand and of a segment that is open for
/// each kind of writing.
pub(crate) const LOG_BYTES_MIN: u64 = (HAND_FRAMES + 2 * SEGMENT_FRAMES) as u64 * FRAME_COST;

/// Segments are this part of the pool's frames at most.
const ENTRIES_PART: u32 = 4 * SEGMENT_FRAMES as u32;

/// Why no backing file was attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackingError {
    /// There is one, and an engine has one at most.
    #[error("there is a backing file already")]
    Attached,
    /// The kernel did not give the memory for what has to be known of it.
    #[error("cannot get the memory for a backing file of {bytes} bytes: {source}")]
    Memory {
        /// Its size, in bytes.
        bytes: u64,
        /// The system call's error.
        source: io::Error,
    },
    /// The pool limit leaves no room for pages beside what has to be known of it.
    #[error(
        "a backing file takes {bytes} bytes of the pool limit of {limit} for its tables and buffers: raise the \
         limit"
    )]
    NoRoom {
        /// What it takes, in bytes.
        bytes: u64,
        /// The pool limit, in bytes.
        limit: u64,
    },
    /// It is of no use.
    #[error("a backing file of {bytes} bytes: it must have at least {BACKING_BYTES_MIN}")]
    Size {
        /// What it has, in bytes.
        bytes: u64,
    },
}

impl Engine {
    /// Attaches a backing file of so many bytes, for persistent pages that are not used. Of one that is more than 32 times
    /// the pool limit the rest is not used. Nothing is read from it
    /// that was not written by what this returns, whoever drives that. With a key, which nobody else
    /// may have and no other engine ever had, what is written is encrypted.
    pub fn attach_backing(
        &self,
        bytes: u64,
        key: Option<&[u8; KEY_BYTES]>,
    ) -> Result<Writeback, BackingError> {
        // Held throughout, so that of two who come at the same time one is refused.
        let registry = self.registry.lock();
        if self.log().is_some() {
            return Err(BackingError::Attached);
        }
        // Entries of blocks take a quarter of the pool at most.
        let most = (self.arena.limit() / ENTRIES_PART).clamp(SEGMENTS_MIN, SEGMENTS_MAX);
        let segments = (bytes / SEGMENT_BYTES).min(u64::from(most)) as u32;
        if segments < SEGMENTS_MIN {
            return Err(BackingError::Size { bytes });
        }
        let memory = |source| BackingError::Memory { bytes, source };
        let table = Segments::new(&self.store, segments).map_err(memory)?;
        let log = Arc::new(Log::new(Arc::clone(&self.arena), table, key));
        let unit_blocks = unit_blocks(self.limit());
        let mut writeback = Writeback::new(Arc::clone(&log), unit_blocks).map_err(memory)?;
        let tables = log.segments().bytes() + writeback.bytes();
        let limit = self.limit();
        let all = self.tables.load(Ordering::Acquire) + tables;
        if self.config.check_limit(limit, all + LOG_BYTES_MIN).is_err() {
            return Err(BackingError::NoRoom { bytes: tables + LOG_BYTES_MIN, limit });
        }
        self.fill_hand(&mut writeback).map_err(memory)?;
        self.resize_tables(&registry, |all| all + tables);
        log.set_accepts(true);
        self.set_log(log);
        // From now on slots may point there.
        self.store.set_unit_blocks(unit_blocks);
        self.store.log().open(segments, key);
        Ok(writeback)
    }

    /// Gets the frames that a log cannot do without.
    fn fill_hand(&self, writeback: &mut Writeback) -> io::Result<()> {
        while writeback.wants_frame() {
            // The pool may be full, and just therefore a backing file be attached.
            let frame = self.arena.pop().map_or_else(|| self.arena.grow_beyond(), Ok);
            writeback.keep(frame?);
        }
        Ok(())
    }

    /// Pages can be in this log.
    pub(crate) fn set_log(&self, log: Arc<Log>) {
        for shard in &self.shards {
            shard.0.lock().set_log(Arc::clone(&log));
        }
        let is_first = self.log.set(log).is_ok();
        assert!(is_first, "an engine has one log");
    }
}
