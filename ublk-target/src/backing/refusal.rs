//! Why a file or device does not become the backing file, and what to do about it.

use std::io;
use std::path::PathBuf;

use tmem::PAGE_SIZE;

use super::file::{FILE_BYTES_MAX, FILE_BYTES_MIN};
use crate::exit::{Exit, Failure};
use crate::size::Human;

/// Why a file is not used as backing file.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {} as backing file: {refusal}", path.display())]
pub struct BackingFileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub refusal: Refusal,
}

/// What is wrong with a backing file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Nobody knows how large to make it.
    #[error("there is no such file; to have it made, give its size as well")]
    Absent,
    /// A relative path would depend on where the daemon runs.
    #[error("the path is not absolute: begin it with '/'")]
    Relative,
    /// A size that is of no use.
    #[error(
        "its size of {bytes} bytes is out of bounds: use {FILE_BYTES_MIN} bytes ({}) to {FILE_BYTES_MAX} \
         bytes",
        Human(FILE_BYTES_MIN)
    )]
    Size {
        /// The size.
        bytes: u64,
    },
    /// A device does not grow.
    #[error("it has {has} bytes, and {bytes} were asked for: ask for less, or give no size")]
    Larger {
        /// What was asked for.
        bytes: u64,
        /// What it has.
        has: u64,
    },
    /// A kind of file that has no blocks.
    #[error("it is {0}: use a block device or a regular file")]
    Kind(&'static str),
    /// The device has sectors that are larger than what is written at a time.
    #[error("its sectors are {bytes} bytes, and pages are {PAGE_SIZE}: use another device")]
    Sectors {
        /// Bytes of a sector.
        bytes: u32,
    },
    /// It is in memory itself.
    #[error(
        "its file system is in memory, which pages would not leave: use a block device, or a file on a disk"
    )]
    InMemory,
    /// It is on a device that is served by the same daemon.
    #[error("it is, or is on, a device of this daemon, whose pages would be written to themselves")]
    Own,
    /// Writes would go through the page cache.
    #[error(
        "its file system knows no direct I/O, and without it what is written takes the memory that it is to \
         free: use a block device, or a file on ext4, xfs or btrfs"
    )]
    NoDirect,
    /// Its room may be gone when it is needed.
    #[error(
        "its file system cannot reserve room for it: use a block device, or a file on ext4, xfs or btrfs"
    )]
    NoReserve,
    /// The file system has not so much room.
    #[error("there is no room for {bytes} bytes ({source}): use a smaller size, or make room")]
    NoRoom {
        /// The size.
        bytes: u64,
        /// What the file system said.
        source: io::Error,
    },
    /// Somebody has the device for himself.
    #[error("it is mounted, swapped on, or part of another device: see `lsblk`")]
    InUse,
    /// Somebody has locked the file.
    #[error("another process uses it")]
    Locked,
    /// There is something in it.
    #[error(
        "it holds {found}: erase it with `wipefs -a {}` (or otherwise), or use --force, by which what is \
         there is lost",
        path.display()
    )]
    Foreign {
        /// What.
        found: String,
        /// The file.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The error.
        source: io::Error,
    },
}

impl From<BackingFileError> for Failure {
    fn from(error: BackingFileError) -> Self {
        Failure::new(error.refusal.code(), error)
    }
}

impl Refusal {
    /// How a command ends for this.
    pub fn code(&self) -> Exit {
        match self {
            Self::Size { .. } | Self::Larger { .. } | Self::NoRoom { .. } => Exit::Size,
            Self::InUse | Self::Locked => Exit::InUse,
            Self::Foreign { .. } => Exit::Foreign,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Exit::Permission
            }
            Self::Io { .. } => Exit::Failure,
            _ => Exit::Usage,
        }
    }
}
