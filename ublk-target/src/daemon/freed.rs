//! What the kernel frees of swap on our devices.
//!
//! A kernel that swaps tells a block device only of clusters that are wholly free, by discards. Where it can be found out which
//! single places are ([`crate::freed`]), their pages are flushed; where it cannot, they stay until they are written over,
//! which costs memory and nothing else.
//!
//! It is done for a device that is reached by nothing but its own ublk node: then nobody but the swap on it can have put a
//! page there.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::rand::GetRandomFlags;

use super::{Daemon, DaemonError, Device, system};
use crate::freed::observer::Observer;
use crate::freed::{Plan, Probe, observed};
use crate::log::log;
use crate::process;

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
        self.have_observed(device, |plan, node, observer| {
            let number = std::fs::metadata(node).map_err(system("look at the device"))?.rdev();
            let number = (libc::major(number), libc::minor(number));
            let (probe, marks) = Probe::new(plan, number, device.block.pages())?;
            self.parts.engine.watch_freed(device.block.pool(), Box::new(marks))?;
            Ok(probe.observe(observer)?)
        });
    }

    /// The same for all devices that a process that is dead had observed, in a thread of its own: nobody waits for it.
    pub fn follow_freed_on(self: &Arc<Self>) {
        // Not those that are added from now on: they get an observer then.
        let (daemon, devices) = (Arc::clone(self), self.snapshot());
        let follow = move || {
            for device in devices {
                // It may have been removed meanwhile.
                let _turn = daemon.turn.lock();
                if daemon.snapshot().iter().any(|other| Arc::ptr_eq(other, &device)) {
                    daemon.have_observed(&device, |_, _, observer| {
                        let (observer, marks) = observed(observer, device.block.pages())?;
                        daemon.parts.engine.watch_freed(device.block.pool(), Box::new(marks))?;
                        Ok(observer)
                    });
                }
            }
        };
        if let Err(error) = process::spawn("tmem-freed".into(), follow) {
            log(format_args!("freed swap is kept until it is written over: {error}"));
        }
    }

    /// `observe` is called with the device's node, and where its observer is asked.
    fn have_observed(
        &self,
        device: &Device,
        observe: impl FnOnce(&Plan, &str, &Path) -> Result<Observer, DaemonError>,
    ) {
        let node = device.attachment.only_node().filter(|_| device.live_node().is_some());
        let Some((node, plan)) = node.zip(self.parts.notebook.notes().freed) else { return };
        let observer = self.observer_path(device).ok_or_else(|| {
            system("know who observes a device that an older program has made")(
                io::ErrorKind::NotFound.into(),
            )
        });
        match observer.and_then(|observer| observe(&plan, node, &observer)) {
            Ok(observer) => *device.observer.lock() = Some(observer),
            Err(error) => log(format_args!(
                "freed swap on '{}' is kept until it is written over: {error}",
                device.name
            )),
        }
    }

    /// Where a device's observer is asked, beside the control socket; none if it was made by a program that knew of no such
    /// place.
    fn observer_path(&self, device: &Device) -> Option<PathBuf> {
        let notes = self.parts.notebook.notes();
        let id = notes.devices.iter().find(|note| note.name == device.name)?.observer?;
        let mut path = self.parts.config.control.clone().into_os_string();
        path.push(format!(".freed-{id:016x}"));
        Some(path.into())
    }

    /// The device is gone.
    pub(super) fn unfollow_freed(&self, device: &Device) {
        if device.observer.lock().take().is_some() {
            return;
        }
        // What one that was killed, or did not answer, has left.
        if let Some(path) = self.observer_path(device) {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// By what a device's observer is to be known.
pub(super) fn observer_id() -> io::Result<u64> {
    let mut id = [0; 8];
    rustix::rand::getrandom(&mut id, GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(id))
}
