//! Why the daemon did not do what it was asked.

use std::io;

use tmem::{BackingError, ConfigError, NotesError, PAGE_SIZE, PoolError, SettingsError};

use super::limits::{NAME_MAX, SWAP_BYTES_MAX, SWAP_BYTES_MIN, TOTAL};
use crate::backing::BackingFileError;
use crate::freed::FreedError;
use crate::nbd::{KernelError, NbdServerError};
use crate::process::ProcessError;
use crate::swap::{SwapError, User};
use crate::ublk::ServerError;

/// Why the daemon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The process is not fit to serve swap.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The engine could not be made, or not be given that limit.
    #[error(transparent)]
    Engine(#[from] ConfigError),
    /// The engine cannot use the backing file.
    #[error(transparent)]
    Attach(#[from] BackingError),
    /// No pool for the device.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The device could not be made or removed.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// NBD cannot be served.
    #[error(transparent)]
    Nbd(#[from] NbdServerError),
    /// The kernel's NBD client could not be attached or detached.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// NBD clients are connected.
    #[error(
        "the device '{name}' is in use by NBD clients ({connections} connections): disconnect them \
         first"
    )]
    Clients {
        /// The device.
        name: String,
        /// Their connections.
        connections: u32,
    },
    /// The backing file cannot be used.
    #[error(transparent)]
    Backing(#[from] BackingFileError),
    /// Settings of writeback that make no sense.
    #[error(transparent)]
    Writeback(#[from] SettingsError),
    /// Swap could not be switched on or off.
    #[error(transparent)]
    Swap(#[from] SwapError),
    /// What the kernel frees cannot be seen.
    #[error(transparent)]
    Freed(#[from] FreedError),
    /// What the next process has to know could not be noted.
    #[error(transparent)]
    Notes(#[from] NotesError),
    /// A file of the system or a thread could not be had.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
    /// A name that no device can have.
    #[error(
        "'{name}' cannot name a device: use 1 to {NAME_MAX} letters, digits, '.', '_' or '-', a \
         letter or digit first, and not '{TOTAL}'"
    )]
    BadName {
        /// The name, or the start of it.
        name: String,
    },
    /// There is one already.
    #[error("there is a device named '{name}' already: choose another name, or remove it first")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// There is none.
    #[error("there is no device named '{name}': see `tmem list`")]
    NoDevice {
        /// The name, or the start of it.
        name: String,
    },
    /// A size that no swap device can have.
    #[error(
        "a swap device of {bytes} bytes: it must have {SWAP_BYTES_MIN} to {SWAP_BYTES_MAX} bytes"
    )]
    SizeOutOfBounds {
        /// What was asked for.
        bytes: u64,
    },
    /// A size that is not whole pages.
    #[error(
        "a swap device of {bytes} bytes is not whole pages of {PAGE_SIZE}: use {}",
        bytes - bytes % PAGE_SIZE as u64
    )]
    SizeNotPages {
        /// What was asked for.
        bytes: u64,
    },
    /// The devices that there are have taken all memory that is for I/O buffers.
    #[error(
        "no memory is left for another device's I/O buffers: all devices together may have \
         {budget} bytes of them, and {left} are left; remove a device first"
    )]
    NoBuffers {
        /// What all devices may have, in bytes.
        budget: u64,
        /// What is left of it.
        left: u64,
    },
    /// A device could not be set up, and not be removed either.
    #[error("{failed}; the device '{name}' is kept, because it cannot be removed yet: {kept}")]
    Kept {
        /// The device.
        name: String,
        /// Why it could not be set up.
        failed: Box<DaemonError>,
        /// Why it could not be removed.
        kept: Box<DaemonError>,
    },
    /// Somebody uses the device.
    #[error("{}", user.explain(path))]
    InUse {
        /// The device's node.
        path: String,
        /// Who.
        user: User,
    },
}
