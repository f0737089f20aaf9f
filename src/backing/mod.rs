//! What is held of pages on the backing file: a log.
//!
//! The backing file is cut into segments, and a segment into blocks of 4 KiB. A block is a frame's
//! image, zpages as they were, sealed. Segments are written from end to end, and never in place: what
//! becomes of a page afterwards makes its zpage in the log dead. A segment without a live zpage is
//! free again; one with few is cleaned, by writing those few elsewhere.
//!
//! Nothing of this outlives the machine: what says where a page is, and the key without which it
//! cannot be read, are in memory only. So the file has no metadata. They outlive the process ([`crate::store`]), and a new
//! one goes on with the log ([`crate::recovery`]).
//!
//! Nobody in here does I/O: [`writeback`] says what is to be written and read, and is told what became of it.
//! With it and [`cleaner`] the shards are asked for frames, and whether a zpage is alive; what is below them
//! knows of neither.

mod attach;
mod bits;
mod block;
mod cleaner;
#[allow(unsafe_code)]
mod log;
mod moves;
mod policy;
mod seal;
#[allow(unsafe_code)]
mod segments;
mod settings;
mod stream;
#[allow(unsafe_code)]
mod unit;
mod writeback;

pub(crate) use attach::LOG_BYTES_MIN;
pub use attach::{BACKING_BYTES_MIN, BackingError};
pub(crate) use block::{BLOCKS_PER_FRAME, BlockMeta};
pub(crate) use log::{BlockKey, Found, Log};
pub(crate) use moves::MOVES_BYTES;
pub(crate) use policy::{Dials, is_low};
pub use seal::KEY_BYTES;
pub(crate) use segments::{SEGMENT_BLOCKS, SEGMENT_FRAMES, SEGMENTS_BYTES_MAX, Segments};
pub use settings::{SettingsError, WritebackSettings};
pub(crate) use unit::noted_unit_blocks;
pub(crate) use writeback::{ENTRIES_LEAST, SEGMENTS};
pub use writeback::{Health, Job, JobFailed, Writeback};
#[cfg(all(test, not(any(miri, feature = "shuttle"))))]
pub(crate) use {cleaner::RESERVE_SEGMENTS, writeback::READER};
