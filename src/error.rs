//! What the engine refuses, one enum per kind of call.
//!
//! "Full" is not "failed": [`PutError::Full`] and [`PutError::Starved`] are ordinary answers of a
//! bounded pool, and nothing is broken when they are given.

use crate::handle::{PAGE_SIZE, POOL_PAGES_MAX};
use crate::readback::Backed;

/// Why an engine could not be made or reconfigured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The pool limit leaves no room for a single page beside the reserve.
    #[error(
        "pool limit of {limit} bytes is below the reserve of {minimum} bytes: set it to at least that"
    )]
    LimitBelowReserve {
        /// What was asked for, in bytes.
        limit: u64,
        /// The least that works, in bytes.
        minimum: u64,
    },
    /// The pool limit leaves little beside what has to be known of pages on the backing file, which is there as long as
    /// these are.
    #[error(
        "pool limit of {limit} bytes leaves too little beside {entries} bytes of what is known of pages on the backing \
         file: set it to at least {minimum}, or have fewer pages there (swap off or remove a device, or discard what \
         is not used of it)"
    )]
    LimitBelowLog {
        /// What was asked for, in bytes.
        limit: u64,
        /// What is known of the pages there takes, in bytes.
        entries: u64,
        /// The least that works now, in bytes.
        minimum: u64,
    },
    /// The pool limit is above what the engine was built to address.
    #[error("pool limit of {limit} bytes is above the maximum of {maximum} bytes")]
    LimitAboveMaximum {
        /// What was asked for, in bytes.
        limit: u64,
        /// The largest limit, in bytes.
        maximum: u64,
    },
    /// The kernel's pages are of another size than the engine's.
    #[error(
        "this kernel's memory pages have {bytes} bytes, and only {PAGE_SIZE} will do: use a kernel with such"
    )]
    PageSize {
        /// What they have, in bytes.
        bytes: usize,
    },
    /// The kernel did not give the memory.
    #[error("cannot get {bytes} bytes of {what}: {source}")]
    Memory {
        /// What the memory was for.
        what: &'static str,
        /// How much of it, in bytes.
        bytes: u64,
        /// The system call's error.
        source: std::io::Error,
    },
}

/// Why a pool could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The kernel did not give the memory for the pool's directory.
    #[error("cannot get {bytes} bytes for the pool's directory: {source}")]
    Memory {
        /// How much was asked for, in bytes.
        bytes: u64,
        /// The system call's error.
        source: std::io::Error,
    },
    /// The pool limit leaves no room for pages beside the pool's directory.
    #[error(
        "the pool's directory takes {bytes} bytes of the pool limit of {limit}: raise the limit, or \
         make the pool smaller"
    )]
    NoRoom {
        /// What the directory takes, in bytes.
        bytes: u64,
        /// The pool limit, in bytes.
        limit: u64,
    },
    /// No such client.
    #[error("no such client")]
    NoClient,
    /// No such pool.
    #[error("no such pool")]
    NoPool,
    /// A size that no pool can have.
    #[error("a pool of {pages} pages: it must have 1 to {POOL_PAGES_MAX} pages")]
    Size {
        /// What was asked for, in pages.
        pages: u64,
    },
    /// As many pools or clients as there can be.
    #[error("too many pools: {limit} is the limit, remove one first")]
    TooMany {
        /// How many there can be.
        limit: usize,
    },
}

/// Why a page was not put.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PutError {
    /// The pool is at its limit and nothing in it may be dropped. The page's old copy is gone;
    /// until the page is put or flushed again a get of it is [`GetError::Lost`].
    #[error("the pool is full")]
    Full,
    /// The handle names no page of a live pool. Nothing was changed.
    #[error("no such page")]
    NoPage,
    /// There is no free frame at the moment, but the pool is below its limit and the supply step
    /// ([`crate::Engine::supply`]) will bring some. Nothing was changed, the page's old copy is
    /// intact: put again soon, or give up with [`crate::Engine::lose`].
    #[error("no free frame yet")]
    Starved,
}

/// Why a page was not got although it may exist.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GetError {
    /// The stored copy does not match its checksum.
    #[error("the stored page is corrupt")]
    Corrupt,
    /// The last put of this page failed, and the older copy is gone.
    #[error("the page was lost by a write that failed")]
    Lost,
    /// The handle names no page of a live pool.
    #[error("no such page")]
    NoPage,
}

/// Why a page was not updated.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// It is on the backing file: [`crate::Engine::recall`] it, and update it then.
    #[error("the page is on the backing file")]
    Backed(Backed),
    /// What it was could not be got. Nothing was changed.
    #[error(transparent)]
    Get(#[from] GetError),
    /// What it should become could not be put. Nothing was changed, by [`PutError::Full`] either.
    #[error(transparent)]
    Put(#[from] PutError),
}
