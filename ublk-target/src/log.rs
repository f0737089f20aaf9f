//! The daemon's log: lines on standard error, for the main and control threads.
//!
//! Standard error may be a pipe to a logger that waits for memory, so no thread that I/O depends
//! on may come here. In the daemon's processes it is no file: see
//! [`crate::logger`].

use std::fmt::Display;
use std::io::{self, Write};

/// Writes a line. There is nobody to tell if that fails.
pub fn log(message: impl Display) {
    // In one piece: several processes write there.
    let _ = io::stderr().write_all(format!("tmem: {message}\n").as_bytes());
}
