//! The ublk front end: block devices through the kernel's ublk driver.

mod buffers;
mod driver;
mod helper;
mod params;
mod queue;
mod ring;
mod schedule;
mod server;
mod sizing;

pub use driver::{DriverError, broken, ring_advice};
pub use server::{ServerError, UblkServer};
pub use sizing::{QueuePlan, buffer_budget, plan};
