//! What the kernel frees of swap on our devices.
//!
//! A kernel that swaps tells a block device only of clusters that are wholly free, by discards. Where it can be found out which
//! single places are ([`crate::freed`]), their pages are flushed; where it cannot, they stay until they are written over,
//! which costs memory and nothing else.
//!
//! It is done for a device that is reached by nothing but its own ublk node: then nobody but the swap on it can have put a
//! page there.

use std::os::unix::fs::MetadataExt;

use super::{Daemon, DaemonError, Device, system};
use crate::freed::observer::Observer;
use crate::freed::{Plan, Probe};
use crate::log::log;

impl Daemon {
    /// Finds out how it is found out, and notes that for who goes on.
    pub(super) fn plan_freed(&self) {
        let plan = match Plan::make() {
            Ok(plan) => plan,
            Err(error) => {
                return log(format_args!("freed swap is kept until it is written over: {error}"));
            }
        };
        if let Err(error) = self.parts.notebook.update(|notes| notes.freed = Some(plan)) {
            log(format_args!("cannot note how to see what swap is freed: {error}"));
        }
    }

    /// From now on, what the kernel frees of swap on this device is flushed, if that can be seen.
    pub(super) fn follow_freed(&self, device: &Device) {
        let Some(path) = device.attachment.only_node().filter(|_| device.live_node().is_some())
        else {
            return;
        };
        let Some(plan) = self.parts.notebook.notes().freed else { return };
        match self.observe(&plan, path, device) {
            Ok(observer) => *device.observer.lock() = Some(observer),
            Err(error) => log(format_args!(
                "freed swap on '{}' is kept until it is written over: {error}",
                device.name
            )),
        }
    }

    fn observe(&self, plan: &Plan, path: &str, device: &Device) -> Result<Observer, DaemonError> {
        let node = std::fs::metadata(path).map_err(system("look at the device"))?.rdev();
        let number = (libc::major(node), libc::minor(node));
        let (probe, marks) = Probe::new(plan, number, device.block.pages())?;
        let watched = self.parts.engine.watch_freed(device.block.pool(), Box::new(marks))?;
        Ok(probe.observe(watched)?)
    }
}
