//! What the kernel frees of swap on our devices.
//!
//! A kernel that swaps tells a block device only of clusters that are wholly free, by discards. Where it can be found out which
//! single places are ([`crate::freed`]), their pages are flushed; where it cannot, they stay until they are written over,
//! which costs memory and nothing else.
//!
//! It is done for a device that is reached by nothing but its own ublk node: then nobody but the swap on it can have put a
//! page there.

use std::os::unix::fs::MetadataExt;

use rustix::rand::GetRandomFlags;

use super::{Daemon, DaemonError, Device, system};
use crate::freed::observer::Observer;
use crate::freed::{Plan, Probe, observed};
use crate::log::log;

impl Daemon {
    /// Finds out how it is found out, and notes that for who goes on.
    pub(super) fn plan_freed(&self) {
        let planned = || {
            let plan = Plan::make()?;
            let mut name = [0; 16];
            rustix::rand::getrandom(&mut name, GetRandomFlags::empty())
                .map_err(|error| system("get a random number")(error.into()))?;
            self.parts.notebook.update(|notes| {
                notes.freed = Some(plan);
                notes.observers = Some(format!("{:032x}", u128::from_le_bytes(name)));
            })?;
            Ok::<(), DaemonError>(())
        };
        if let Err(error) = planned() {
            log(format_args!("freed swap is kept until it is written over: {error}"));
        }
    }

    /// From now on, what the kernel frees of swap on this device is flushed, if that can be seen.
    pub(super) fn follow_freed(&self, device: &Device) {
        self.have_freed(device, |daemon, path, name| {
            let Some(plan) = daemon.parts.notebook.notes().freed else { return Ok(None) };
            let node = std::fs::metadata(path).map_err(system("look at the device"))?.rdev();
            let number = (libc::major(node), libc::minor(node));
            let (probe, marks) = Probe::new(&plan, number, device.block.pages())?;
            daemon.parts.engine.watch_freed(device.block.pool(), Box::new(marks))?;
            Ok(Some(probe.observe(name)?))
        });
    }

    /// The same for a device of which a process that is dead saw it.
    pub(super) fn follow_freed_on(&self, device: &Device) {
        self.have_freed(device, |daemon, _, name| {
            let (observer, marks) = observed(name, device.block.pages())?;
            daemon.parts.engine.watch_freed(device.block.pool(), Box::new(marks))?;
            Ok(Some(observer))
        });
    }

    fn have_freed(
        &self,
        device: &Device,
        observer: impl FnOnce(&Self, &str, &str) -> Result<Option<Observer>, DaemonError>,
    ) {
        let path = device.attachment.only_node().filter(|_| device.live_node().is_some());
        let Some((path, names)) = path.zip(self.parts.notebook.notes().observers) else { return };
        let name = format!("{names}-{}", device.block.pool().number());
        match observer(self, path, &name) {
            Ok(observer) => *device.observer.lock() = observer,
            Err(error) => log(format_args!(
                "freed swap on '{}' is kept until it is written over: {error}",
                device.name
            )),
        }
    }
}
