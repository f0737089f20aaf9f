//! The backing file, for pages that nobody uses: how it is opened, set and described.
//!
//! What is in it is the engine's log; here is whether a file or block device may be used for that, and that
//! nothing of anybody else's is overwritten.

mod change;
mod contents;
pub mod file;
mod info;

pub use change::{Age, Permille, Quota, ValueError, WritebackChange};
pub use file::{BackingFile, BackingFileError, BackingSpec, Refusal, check_file_bytes};
pub use info::{BackingInfo, BackingStats};
