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
