//! A process that waits for the death of the one that serves, and goes on in its place.
//!
//! There may be no memory at that moment, and whoever should free some may wait for us. So all that takes much is made
//! beforehand: threads, rings, buffers, the mapping of the memory file and what the heap will need. What is
//! left is the kernel's own small allocations, and for these the threads that take over are real-time threads, which get them from the
//! kernel's reserve. Nothing is printed, started, looked up on a disk or waited for before I/O flows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::process::{Pid, getppid};
use tmem::{AttachError, Attached, Prepared, Store};

use super::error::DaemonError;
use super::nodes::Nodes;
use super::role::{Candidate, Role};
use super::{Daemon, Device, Parts, check_locked, prepare_nbd, system};
use crate::attachment::Attachment;
use crate::backing::{Backing, BackingFile, BackingNote, Claim, Driver, Ready};
use crate::device::BlockDevice;
use crate::log::log;
use crate::nbd::NbdServer;
use crate::notes::{DeviceNote, NoNotes, Notebook, Notes};
use crate::process::{self, Mounts, ProcessError};
use crate::socket::Listener;
use crate::supply::Supply;

/// What the heap is made to have beforehand, besides what each queue takes.
const HEAP_BYTES: usize = 1 << 20;

/// What somebody takes who serves a device beside its queues: a codec.
pub(super) const HELPER_BYTES: usize = 128 << 10;

/// Why a process cannot go on in the place of another.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SuccessorError {
    /// It does not know what to go on with.
    #[error(transparent)]
    Notes(#[from] NoNotes),
    /// The memory file is of no use.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// It could not get what it needs.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
}

/// See the module's description.
pub struct Successor {
    candidate: Candidate,
    waiting: Waiting,
}

/// What waits to be used.
struct Waiting {
    store: Store,
    warnings: Vec<ProcessError>,
    supervisor: Option<Pid>,
    prepared: Prepared,
    nodes: Nodes,
    supply: Supply,
    backing: Arc<Backing>,
    nbd: Option<NbdServer>,
    /// What writes to the backing file, and the file, if there is one and it could be opened.
    driver: Option<Ready>,
    file: Option<(BackingNote, BackingFile, Claim)>,
}

/// Whether there is anything to go on with.
pub enum Succession {
    /// There is, and I/O flows; the rest follows.
    Serving(Box<Serving>),
    /// The other had stopped.
    Over,
}

/// I/O flows.
pub struct Serving {
    parts: Parts,
    driver: Option<Driver>,
    nbd: Option<Arc<NbdServer>>,
    devices: Vec<Resumed>,
    /// Devices that are noted, and gone.
    gone: Vec<(DeviceNote, Arc<BlockDevice>, Attachment)>,
}

struct Resumed {
    note: DeviceNote,
    block: Arc<BlockDevice>,
    attachment: Attachment,
}

impl Successor {
    /// Hardens the process, and makes all that there will be no time and no memory to make. Call it before any thread is
    /// started.
    pub fn prepare(store: Store) -> Result<Self, SuccessorError> {
        let supervisor = getppid();
        let notes = Notes::read(&store)?;
        let warnings = process::prepare(notes.config.best_effort, Mounts::Left);
        let warnings = warnings.map_err(DaemonError::from)?;
        let candidate = Candidate::new(&store).map_err(system("open the memory file"))?;
        let prepared = Prepared::new(store.clone())?;
        let supply = Supply::prepare().map_err(system("start the supply thread"))?;
        let backing = Arc::new(Backing::new().map_err(system("make an eventfd"))?);
        let nodes = Nodes::prepare(&store, &notes, supply.waker(), &backing)?;
        let nbd = prepare_nbd(&notes.config, &supply, &backing)?;
        // A worker has a codec for each export.
        let exports = nbd.as_ref().map_or(0, |nbd| nbd.workers() * notes.devices.len());
        process::keep_heap(HEAP_BYTES + nodes.heap_bytes()? + exports * HELPER_BYTES);
        let (mut driver, mut file) = (None, None);
        if let Some(note) = notes.backing {
            let ready = Driver::prepare(Arc::clone(&backing));
            let what = "start the thread that writes to the backing file";
            driver = Some(ready.map_err(system(what))?);
            match note.reopen() {
                Ok((opened, claim)) => file = Some((note, opened, claim)),
                Err(error) => {
                    log(format_args!("cannot open {} beforehand: {error}", note.path()));
                }
            }
        }
        let waiting = Waiting {
            store,
            warnings,
            supervisor,
            prepared,
            nodes,
            supply,
            backing,
            nbd,
            driver,
            file,
        };
        Ok(Self { candidate, waiting })
    }

    /// Brings what has come since to hand. It is for the thread that will take over, which is urgent.
    pub fn follow(&mut self) {
        if let Err(error) = self.waiting.prepared.follow() {
            process::note(format_args!("a process that waits cannot get memory to hand: {error}"));
        }
    }

    /// The process that serves, as far as is noted.
    pub fn worker(&self) -> Option<u32> {
        Some(Notes::read(&self.waiting.store).ok()?.worker)
    }

    /// Whether the supervisor that has started us is gone, and another has all in hand, and processes of its own that wait.
    pub fn is_left_over(&self) -> bool {
        let supervisor = self.waiting.supervisor;
        getppid() != supervisor
            && Notes::read(&self.waiting.store)
                .is_ok_and(|notes| Pid::from_raw(notes.supervisor.cast_signed()) != supervisor)
    }

    /// Goes on in the place of a process that is dead, if it is, and no other process was first. What cannot be gone on
    /// with now, another process may: so this one ends then, and leaves everything as it is.
    pub fn try_take_over(mut self) -> Result<Succession, Box<Self>> {
        match self.candidate.try_take() {
            Ok(role) => Ok(self.waiting.take_over(role)),
            Err(candidate) => {
                self.candidate = candidate;
                Err(Box::new(self))
            }
        }
    }
}

impl Waiting {
    fn take_over(mut self, role: Role) -> Succession {
        let begun = Instant::now();
        let notes = Notes::read(&self.store).unwrap_or_else(|error| cannot("go on", &error));
        if notes.is_ended {
            return Succession::Over;
        }
        let attached = self.prepared.attach().unwrap_or_else(|error| cannot("go on", &error));
        let Attached { engine, writeback, .. } = attached;
        let engine = Arc::new(engine);
        // Before anything is written. They were in force before, so they are valid.
        if let Err(error) = engine.set_writeback_settings(&notes.config.writeback) {
            process::note(format_args!("settings of writeback are not in force: {error}"));
        }
        self.supply.begin(Arc::clone(&engine));
        let driver = writeback.zip(notes.backing.as_ref()).and_then(|(writeback, note)| {
            let claim = Self::open_backing(&self.backing, self.file.take(), note)?;
            let ready =
                self.driver.take().map_or_else(|| Driver::prepare(Arc::clone(&self.backing)), Ok);
            let ready = ready.unwrap_or_else(|error| cannot("go on", &error));
            Some(ready.go_on(Arc::clone(&engine), writeback, claim))
        });
        let nbd = self.nbd.take().map(Arc::new);
        if let Some(server) = &nbd {
            server.begin(&engine);
        }
        let pools = engine.pools();
        let mut under_way = Vec::new();
        for note in &notes.devices {
            let is_its = |pool: &&tmem::PoolInfo| pool.id.number() == note.pool;
            let Some(pool) = pools.iter().find(is_its) else { continue };
            let block = Arc::new(BlockDevice::resume(Arc::clone(&engine), pool));
            let begun = note.node.map(|node| self.nodes.begin(node, &block));
            under_way.push((note, block, begun));
        }
        let flush = !notes.config.swapon;
        let (mut devices, mut gone) = (Vec::new(), Vec::new());
        for (note, block, begun) in under_way {
            let exported = nbd.as_ref().map_or_else(Attachment::none, |server| {
                Attachment::export(server, &note.name, Arc::clone(&block), flush)
            });
            match begun.map(|begun| self.nodes.finish(begun, &exported)) {
                None => devices.push(Resumed { note: note.clone(), block, attachment: exported }),
                Some(Some(node)) => {
                    let attachment = exported.with_node(node);
                    devices.push(Resumed { note: note.clone(), block, attachment });
                }
                Some(None) => gone.push((note.clone(), block, exported)),
            }
        }
        process::become_calm();
        let took = begun.elapsed();
        let mut notes = notes;
        notes.takeovers.count += 1;
        notes.takeovers.last = took;
        notes.worker = std::process::id();
        notes.supervisor = self.supervisor.map_or(0, |pid| pid.as_raw_pid().cast_unsigned());
        let parts = Parts {
            config: notes.config.clone(),
            warnings: self.warnings,
            supervisor: self.supervisor,
            _role: role,
            notebook: Notebook::resume(self.store, notes),
            engine,
            supply: self.supply,
            backing: self.backing,
        };
        Succession::Serving(Box::new(Serving { parts, driver, nbd, devices, gone }))
    }

    /// Has the backing file read from now on, and returns what is to be held before it is written; none if the file
    /// is lost, and with it what is on it.
    fn open_backing(
        backing: &Backing,
        file: Option<(BackingNote, BackingFile, Claim)>,
        note: &BackingNote,
    ) -> Option<Claim> {
        // One that was named after this process had made itself ready has to be looked up.
        let opened = match file.filter(|(opened, _, _)| opened == note) {
            Some((_, file, claim)) => Ok((file, claim)),
            None => note.reopen(),
        };
        match opened {
            Ok((file, claim)) => {
                backing.set_file(file);
                Some(claim)
            }
            Err(error) => {
                process::note(format_args!(
                    "{} cannot be opened ({error}): pages on it are lost",
                    note.path()
                ));
                let lost = note.lost().unwrap_or_else(|error| cannot("go on", &error));
                backing.set_lost(lost, error.raw_os_error().unwrap_or(0));
                None
            }
        }
    }
}

impl Serving {
    /// How long it took.
    pub fn took(&self) -> Duration {
        self.parts.notebook.notes().takeovers.last
    }

    /// Makes what can wait.
    pub fn finish(self, listener: Option<Listener>) -> Result<Daemon, DaemonError> {
        let Self { parts, driver, nbd, devices, gone } = self;
        let best_effort = parts.config.best_effort;
        for (note, block, exported) in gone {
            // Nobody has come to it yet.
            let _ = exported.detach(None);
            block.destroy();
            log(format_args!("'{}' is gone: somebody removed it", note.name));
            parts.notebook.update(|notes| notes.devices.retain(|other| other.name != note.name))?;
        }
        // That this process serves, and what it found.
        parts.notebook.update(|_| {})?;
        // Pools of devices that were being made or removed.
        let known = |pool: &tmem::PoolInfo| {
            devices.iter().any(|device| device.note.pool == pool.id.number())
        };
        for pool in parts.engine.pools().iter().filter(|pool| !known(pool)) {
            BlockDevice::resume(Arc::clone(&parts.engine), pool).destroy();
        }
        if let Some(warning) = check_locked(parts.engine.is_locked(), best_effort)? {
            log(format_args!("going on without a guard: {warning}"));
        }
        let daemon = Daemon::assemble(parts, nbd)?;
        *daemon.driver.lock() = driver;
        let mut half_made = Vec::new();
        for Resumed { note, block, attachment } in devices {
            let (name, swapped_by_us) = (note.name, note.swapped_by_us);
            let observer = Mutex::new(None);
            let device = Arc::new(Device { name, block, attachment, swapped_by_us, observer });
            if !note.is_made {
                half_made.push(Arc::clone(&device));
            }
            daemon.devices.lock().push(device);
        }
        for device in half_made {
            daemon.settle_half_made(&device);
        }
        daemon.listen(listener);
        Ok(daemon)
    }
}

impl Daemon {
    /// Removes a device that the dead process was making, unless somebody uses it already.
    fn settle_half_made(&self, device: &Device) {
        let path = device.live_node();
        let is_used = path.is_some_and(|path| self.host.is_swap(path).unwrap_or(true));
        match is_used {
            false => match self.del(&device.name) {
                Ok(()) => {
                    return log(format_args!("'{}' was never made, and is removed", device.name));
                }
                Err(error) => {
                    log(format_args!("'{}' was half made, and is kept: {error}", device.name))
                }
            },
            true => log(format_args!("'{}' is in use, and is kept", device.name)),
        }
        let noted = self.parts.notebook.update_device(&device.name, |note| note.is_made = true);
        if let Err(error) = noted {
            log(format_args!("cannot note that: {error}"));
        }
    }
}

/// Ends the process, for another to try.
pub(super) fn cannot(what: &str, error: &dyn std::fmt::Display) -> ! {
    process::fatal(format_args!("cannot {what} in the place of the process that died: {error}"))
}
