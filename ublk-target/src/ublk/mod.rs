//! The ublk front end: block devices through the kernel's ublk driver.

mod buffers;
mod control;
mod driver;
mod error;
mod helper;
mod job;
mod params;
mod port;
mod queue;
mod queues;
mod schedule;
mod server;
mod sizing;

pub use buffers::Room;
pub use control::forlorn;
pub use driver::{DriverError, broken, ring_advice};
pub use error::ServerError;
pub use helper::helpers_for;
pub use server::{Draft, Served, Started, UblkServer, Way};
pub use sizing::{QueuePlan, buffer_budget, plan};
