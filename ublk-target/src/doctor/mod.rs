//! `tmem doctor`: is this machine fit for tmem, and if not, what to do.
//!
//! Each check looks at files below a root directory, which is `/` but for tests, and makes one
//! [`Finding`]. Nothing is changed and nothing is loaded.

mod examine;
mod finding;
mod host;
mod kernel;
mod memory;
mod privileges;

pub use examine::examine;
pub use finding::{Finding, Level, to_json, to_text};
