//! What a daemon can be asked to do.

use tmem::WritebackSettings;

use crate::backing::{BackingInfo, BackingSpec, WritebackChange};
use crate::daemon::{DaemonStats, DeviceInfo};
use crate::exit::Failure;

/// A daemon as the control plane sees it.
///
/// `list` and `stats` must answer at once, also while a call of `add_swap`, `del` or `set_backing` is under
/// way, which may take minutes: `del` waits for swapoff.
pub trait Operations: Send + Sync {
    /// Makes a swap device of `bytes` bytes, named `name` or else by the daemon.
    fn add_swap(&self, name: Option<&str>, bytes: u64) -> Result<DeviceInfo, Failure>;

    /// Removes a device; refused while anybody uses it.
    fn del(&self, name: &str) -> Result<(), Failure>;

    /// The devices, in the order in which they were added.
    fn list(&self) -> Vec<DeviceInfo>;

    /// All figures.
    fn stats(&self) -> DaemonStats;

    /// Sets the pool limit and returns the limit that is now in force, both in bytes.
    fn set_pool_limit(&self, bytes: u64) -> Result<u64, Failure>;

    /// Takes a backing file into use and returns it as it is in use. Whether it is encrypted is the daemon's
    /// own setting, whatever `spec` says.
    fn set_backing(&self, spec: &BackingSpec) -> Result<BackingInfo, Failure>;

    /// Changes one setting of writeback and returns all as they are now in force.
    fn set_writeback(&self, change: WritebackChange) -> Result<WritebackSettings, Failure>;
}
