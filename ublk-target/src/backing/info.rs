//! What is told of a backing file.

use serde::{Deserialize, Serialize};

/// A backing file that is in use.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct BackingInfo {
    /// Its path.
    pub path: String,
    /// Bytes of it that are used, from its first one on.
    pub bytes: u64,
}

/// How a backing file fares.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BackingStats {
    /// Its path.
    pub path: String,
    /// `ok`; `failing`: what was written last failed, and it is left alone for a while; `slow`: it does not answer a
    /// write or a read; `spent`: as much was written as may be in a day.
    pub state: String,
    /// The number of the last error; 0 if there was none.
    pub last_errno: i32,
}
