//! The backing file, for pages that nobody uses: how it is opened, written to and read.
//!
//! What is in it is the engine's log, and what is to be written the engine says; here is whether a file or block device
//! may be used for that, so that nothing of anybody else's is overwritten, and all I/O to it.

mod change;
mod contents;
#[allow(unsafe_code)]
mod driver;
mod fetch;
pub mod file;
#[allow(unsafe_code)]
mod images;
mod info;
mod refusal;
mod relatives;
mod reopen;
mod shared;
mod transfer;
mod unanswered;

pub use change::{Age, Permille, Quota, ValueError, WritebackChange};
#[cfg(test)]
pub(crate) use driver::tests::attach;
pub use driver::{Driver, Ready};
pub use fetch::{Ended, FETCHES_MAX, Fetched, Fetches};
pub use file::{BackingFile, BackingSpec, check_file_bytes};
pub use info::{BackingInfo, BackingStats};
pub use refusal::{BackingFileError, Refusal};
pub use reopen::{BackingNote, Claim};
pub use shared::Backing;
