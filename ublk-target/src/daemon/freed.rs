//! What the kernel frees of swap on our devices.
//!
//! A kernel that swaps tells a block device only of clusters that are wholly free, by discards. Where it can be found out which
//! single places are ([`crate::freed`]), their pages are flushed; where it cannot, they stay until they are written over,
//! which costs memory and nothing else.
//!
//! It is done for a device that is reached by nothing but its own ublk node: then nobody but the swap on it can have put a
//! page there.

use std::os::unix::fs::MetadataExt;

use tmem::Watched;

use super::{Daemon, DaemonError, Device, system};
use crate::freed::observer::Observer;
use crate::freed::{Marks, Plan, Probe};
use crate::log::log;
use crate::notes::{DeviceNote, NodeNote, Notes};
use crate::ublk::node_path;

/// What a process has ready to see what is freed of swap on a device, once it serves that.
pub(super) struct Lookout {
    pool: u16,
    node: NodeNote,
    pages: u64,
    /// The numbers of the device for which the probe marks.
    number: (u32, u32),
    probe: Probe,
    marks: Marks,
}

impl Lookout {
    /// For those devices of these notes of which it can be seen. Call it in a process that serves nothing yet.
    pub(super) fn prepare(notes: &Notes) -> Vec<Self> {
        let Some(plan) = &notes.freed else { return Vec::new() };
        // Others can reach all of them.
        if notes.config.nbd.is_some() {
            return Vec::new();
        }
        let prepared = |note: &DeviceNote| {
            let Some(node @ NodeNote::Ublk { id, .. }) = note.node else { return None };
            let (pool, pages, path) = (note.pool, note.pages, node_path(id));
            let prepared = number_of(&path).and_then(|number| {
                let (probe, marks) = Probe::new(plan, number, pages)?;
                Ok(Self { pool, node, pages, number, probe, marks })
            });
            match prepared {
                Ok(lookout) => Some(lookout),
                Err(error) => {
                    log(format_args!("freed swap on '{}' will be kept: {error}", note.name));
                    None
                }
            }
        };
        // Of one that is still being made there is no node yet, perhaps, and whoever waits for it is another.
        notes.devices.iter().filter(|note| note.is_made).filter_map(prepared).collect()
    }

    /// Whether it is for this device: not for one that had its place, of which the kernel's numbers were others.
    pub(super) fn is_for(&self, note: &DeviceNote) -> bool {
        let NodeNote::Ublk { id, .. } = self.node else { return false };
        (self.pool, self.pages, Some(self.node)) == (note.pool, note.pages, note.node)
            && number_of(&node_path(id)).is_ok_and(|number| number == self.number)
    }
}

/// The kernel's numbers of a device, major and minor.
fn number_of(path: &str) -> Result<(u32, u32), DaemonError> {
    let node = std::fs::metadata(path).map_err(system("look at the device"))?.rdev();
    Ok((libc::major(node), libc::minor(node)))
}

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
        let begin =
            |(probe, marks): (Probe, Marks)| Ok(probe.observe(self.watch_freed(device, marks)?)?);
        let ready =
            number_of(path).and_then(|number| Ok(Probe::new(&plan, number, device.block.pages())?));
        self.have(device, ready.and_then(begin));
    }

    /// The same with what was made ready for it, and without waiting.
    pub(super) fn go_on_following(&self, device: &Device, lookout: Lookout) {
        let Lookout { probe, marks, .. } = lookout;
        let watched = self.watch_freed(device, marks);
        self.have(device, watched.and_then(|watched| Ok(probe.observe_soon(watched)?)));
    }

    fn watch_freed(&self, device: &Device, marks: Marks) -> Result<Watched, DaemonError> {
        Ok(self.parts.engine.watch_freed(device.block.pool(), Box::new(marks))?)
    }

    fn have(&self, device: &Device, observer: Result<Observer, DaemonError>) {
        match observer {
            Ok(observer) => *device.observer.lock() = Some(observer),
            Err(error) => log(format_args!(
                "freed swap on '{}' is kept until it is written over: {error}",
                device.name
            )),
        }
    }
}
