//! Transcendent memory: the engine.
//!
//! Pages are put under handles into pools and got back. A persistent pool keeps what was put until
//! it is flushed: swap. An ephemeral pool may forget anything at any time: cache. Both are held
//! compressed, several zpages to a frame, in one arena of locked memory with a limit; when it is
//! full, a put into a persistent pool takes the least recently used ephemeral frame.
//!
//! The engine knows no device, no socket and no command line. After it is set up, putting, getting
//! and flushing allocate nothing and make no system call, unless two threads want the same shard at
//! the same moment and one has to sleep. [`Engine::supply`] is what brings memory, and it belongs
//! into a thread of its own.
//!
//! ```
//! use tmem::{Config, Engine, Got, Handle, PAGE_SIZE, PoolKind};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = Engine::new(&Config { limit: 1 << 20, limit_max: 1 << 20, shards: 2 })?;
//! engine.supply()?;
//! let client = engine.create_client()?;
//! let mut queue = engine.queue(client);
//! let pool = engine.create_pool(client, PoolKind::Persistent, 1024)?;
//!
//! let handle = Handle::from_page(pool, 7);
//! engine.put(&mut queue, handle, &[42; PAGE_SIZE])?;
//! let mut page = [0; PAGE_SIZE];
//! assert_eq!(engine.get(&mut queue, handle, &mut page)?, Got::Hit);
//! assert_eq!(page, [42; PAGE_SIZE]);
//! assert!(engine.flush_page(handle));
//! assert_eq!(engine.get(&mut queue, handle, &mut page)?, Got::Miss);
//! # Ok(())
//! # }
//! ```

#![deny(unsafe_code)]

// Tests in here share code with those outside.
#[cfg(test)]
extern crate self as tmem;

#[allow(unsafe_code)]
mod arena;
mod backing;
mod batch;
#[allow(unsafe_code)]
mod board;
#[allow(unsafe_code)]
mod clock;
mod codec;
#[allow(unsafe_code)]
mod directory;
mod durable;
mod engine;
mod error;
mod frame;
mod freed;
mod handle;
mod histogram;
mod io_memory;
mod list;
#[allow(unsafe_code)]
mod owners;
mod pool;
mod queue;
mod readback;
mod recovery;
#[allow(unsafe_code)]
mod region;
mod registry;
mod report;
mod reuse;
mod runs;
#[allow(unsafe_code)]
mod shard;
mod slot;
mod stats;
#[allow(unsafe_code)]
mod store;
mod supply;
mod sync;
mod update;
#[allow(unsafe_code)]
mod zbud;
mod zpage;

pub use backing::{
    BACKING_BYTES_MIN, BackingError, Health, Job, JobFailed, KEY_BYTES, SettingsError, Writeback,
    WritebackSettings,
};
pub use batch::BATCH_PAGES;
pub use board::{BatchError, Batches, Board, Step, Way};
pub use engine::{Config, Engine, Got, POOLS_MAX, SHARDS_MAX};
pub use error::{ConfigError, GetError, PoolError, PutError, UpdateError};
pub use freed::FreedPages;
pub use handle::{
    ClientId, Handle, OBJECT_PAGES, PAGE_SIZE, POOL_PAGES_MAX, Page, PoolId, PoolKind,
};
pub use histogram::Latency;
pub use io_memory::{IO_MEMORY_BYTES_MAX, IoMemory};
pub use queue::Queue;
pub use readback::{Backed, Image, Opened};
pub use recovery::{AttachFailed, Attached, Prepared, Recovered};
pub use runs::Holding;
pub use stats::{
    AllocCounters, ClassCounters, FrameCounts, Latencies, LogCounters, PoolCounters, Stats,
};
pub use store::{AttachError, NOTES_BYTES_MAX, NotesError, PoolInfo, Store};
pub use supply::Supplied;
