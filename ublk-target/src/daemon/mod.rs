//! The daemon: one engine, its supply thread, and the devices on it.
//!
//! Guarantees: after an error nothing half made is left behind, unless the error says so; a device
//! that anybody uses is not removed. Calls may come from several threads: adding and removing take
//! turns, and looking never waits for them. None of it is on the I/O path, and no I/O waits for any
//! of it.

mod error;
mod freed;
mod info;
mod limits;
mod nodes;
mod role;
mod successor;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::available_parallelism;

use parking_lot::Mutex;
use rustix::process::{Pid, getppid};
use rustix::rand::GetRandomFlags;
use serde::{Deserialize, Serialize};
use tmem::{BackingError, Config, Engine, KEY_BYTES, PAGE_SIZE, Store, WritebackSettings};

pub use self::error::DaemonError;
use self::freed::observer_id;
pub use self::info::{DaemonStats, DeviceInfo, DeviceState, DeviceStats, ServingStats};
pub use self::limits::{
    NAME_MAX, SWAP_BYTES_MAX, SWAP_BYTES_MIN, TOTAL, check_name, check_swap_bytes, pool_limit_min,
};
use self::limits::{most_queues, plan_beside, shards, shorten};
use self::role::{Candidate, Role};
pub use self::successor::{Serving, Succession, Successor, SuccessorError};
use crate::attachment::{Attachment, DetachError, Node};
use crate::backing::{
    Backing, BackingFile, BackingInfo, BackingNote, BackingSpec, Driver, WritebackChange,
};
use crate::config::{RunConfig, SwapSpec};
use crate::device::BlockDevice;
use crate::freed::observer::Observer;
use crate::log::log;
use crate::nbd::{EngineSide, NbdServer, Purpose, check_reserve};
use crate::notes::{DeviceNote, NodeNote, Notebook};
use crate::process::{self, Mounts, ProcessError};
use crate::size::ram_bytes;
use crate::socket::Listener;
use crate::supervisor::keep;
use crate::supply::Supply;
use crate::swap::{self, Host, User};
use crate::ublk::{Draft, QueuePlan, Room, Served, Started, UblkServer, Way, buffer_budget};
use crate::watchdog::Pulse;

/// By what new devices get their node.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FrontEnd {
    /// The kernel's ublk driver.
    #[default]
    Ublk,
    /// None of their own: they are exported by NBD, and where swap is to be switched on, the
    /// kernel's NBD client is attached to the export.
    Nbd,
}

/// The daemon. Call [`Daemon::shutdown`] before dropping it.
pub struct Daemon {
    parts: Parts,
    /// Writes to the backing file, if there is one.
    driver: Mutex<Option<Driver>>,
    cpus: usize,
    /// What the I/O buffers of all devices may take, in bytes.
    buffer_budget: u64,
    host: Host,
    nbd: Option<Arc<NbdServer>>,
    /// In the order in which they were added.
    devices: Mutex<Vec<Arc<Device>>>,
    /// Held while a device is added or removed.
    turn: Mutex<()>,
    /// Held while a setting of writeback is changed.
    setting: Mutex<()>,
}

/// What pages are served with; the rest of a daemon can wait.
struct Parts {
    config: RunConfig,
    warnings: Vec<ProcessError>,
    /// The process that started this one.
    supervisor: Option<Pid>,
    /// That it is us who serve.
    _role: Role,
    notebook: Notebook,
    engine: Arc<Engine>,
    supply: Supply,
    backing: Arc<Backing>,
}

struct Device {
    name: String,
    block: Arc<BlockDevice>,
    attachment: Attachment,
    /// Whether it is for us to switch swap on it off.
    swapped_by_us: bool,
    /// Marks what the kernel frees of swap on it, if that can be seen.
    observer: Mutex<Option<Observer>>,
}

impl Daemon {
    /// Hardens the process, makes the engine in an empty store and starts its supply thread. NBD is served on
    /// `nbd`. Call it before any thread is started; there are no devices yet.
    pub fn start(
        config: RunConfig,
        nbd: Option<Listener>,
        store: Store,
    ) -> Result<Self, DaemonError> {
        let supervisor = getppid();
        let mut warnings = process::prepare(config.best_effort, Mounts::Left)?;
        let candidate = Candidate::new(&store).map_err(system("open the memory file"))?;
        let taken = || io::Error::other("another process has the lock");
        let role = candidate.try_take().map_err(|_| system("lock the memory file")(taken()))?;
        let (_, most_queues) = resources(&config)?;
        let engine_config = Config {
            limit: config.pool_limit,
            limit_max: ram_bytes(),
            shards: shards(most_queues),
        };
        let engine = Arc::new(Engine::create(&engine_config, store.clone())?);
        warnings.extend(check_locked(engine.is_locked(), config.best_effort)?);
        let supply =
            Supply::start(Arc::clone(&engine)).map_err(system("start the supply thread"))?;
        let backing = Arc::new(Backing::new().map_err(system("make an eventfd"))?);
        let notebook = Notebook::new(store, config.clone())?;
        let parts =
            Parts { config, warnings, supervisor, _role: role, notebook, engine, supply, backing };
        let server = prepare_nbd(&parts.config, &parts.supply, &parts.backing)?;
        let daemon = Self::assemble(parts, server.map(Arc::new))?;
        if let Some(server) = &daemon.nbd {
            server.begin(&daemon.parts.engine);
        }
        daemon.listen(nbd);
        daemon.plan_freed();
        daemon.parts.engine.set_writeback_settings(&daemon.parts.config.writeback)?;
        if let Some(spec) = &daemon.parts.config.backing {
            daemon.set_backing(spec)?;
        }
        Ok(daemon)
    }

    /// What there is around the parts, without devices.
    fn assemble(parts: Parts, nbd: Option<Arc<NbdServer>>) -> Result<Self, DaemonError> {
        let (buffer_budget, _) = resources(&parts.config)?;
        let cpus = available_parallelism().map_err(system("count the CPUs"))?.get();
        let (devices, turn) = (Mutex::new(Vec::new()), Mutex::new(()));
        let (driver, setting) = (Mutex::new(None), Mutex::new(()));
        let host = Host::default();
        Ok(Self { parts, driver, cpus, buffer_budget, host, nbd, devices, turn, setting })
    }

    /// Lets NBD clients come, if there is somebody to serve them.
    fn listen(&self, nbd: Option<Listener>) {
        if let Some((server, listener)) = self.nbd.as_ref().zip(nbd) {
            server.listen(listener);
        }
    }

    /// What could not be had in hardening the process; empty unless best effort was asked for.
    pub fn warnings(&self) -> &[ProcessError] {
        &self.parts.warnings
    }

    /// What the daemon shall be, as it is noted: of the devices of the start, those that are still to be made.
    pub fn noted_config(&self) -> RunConfig {
        self.parts.notebook.notes().config
    }

    /// Has this called whenever there are other devices.
    pub fn watch(&self, watcher: Box<dyn Fn() + Send + Sync>) {
        self.parts.notebook.watch(watcher);
    }

    /// Notes that nobody shall go on.
    pub fn ended(&self) {
        if let Err(error) = self.parts.notebook.update(|notes| notes.is_ended = true) {
            log(format_args!("cannot note the end: {error}"));
        }
        keep::forget(&self.parts.config.control, self.parts.notebook.store().file());
    }

    /// Makes a swap device, and switches swap on it on if so configured.
    pub fn add_swap(&self, name: Option<&str>, bytes: u64) -> Result<DeviceInfo, DaemonError> {
        check_swap_bytes(bytes)?;
        let _turn = self.turn.lock();
        let name = self.new_name(name)?;
        let block = BlockDevice::new(Arc::clone(&self.parts.engine), bytes / PAGE_SIZE as u64)?;
        let block = Arc::new(block);
        if let Some(warning) =
            check_locked(self.parts.engine.is_locked(), self.parts.config.best_effort)?
        {
            log(format_args!("going on without a guard: {warning}"));
        }
        let note = DeviceNote {
            name: name.clone(),
            pool: block.pool().number(),
            pages: block.pages(),
            swapped_by_us: self.parts.config.swapon,
            node: None,
            is_made: false,
            observer: Some(observer_id().map_err(system("get a random number"))?),
        };
        let made = self.parts.notebook.update(|notes| notes.devices.push(note));
        let made = made.map_err(DaemonError::from).and_then(|()| self.make(&name, &block));
        if let Err(error) = &made
            && !matches!(error, DaemonError::Kept { .. })
        {
            block.destroy();
            self.forget(&name);
        }
        let device = made?;
        // It is there, and is taken for what was asked for at the start if it is like it.
        self.parts.notebook.update(|notes| {
            notes.devices.iter_mut().filter(|d| d.name == name).for_each(|d| d.is_made = true);
            let asked = |swap: &SwapSpec| {
                swap.bytes == bytes && swap.name.as_ref().is_none_or(|asked| *asked == name)
            };
            if notes.config.swaps.first().is_some_and(asked) {
                notes.config.swaps.remove(0);
            }
        })?;
        Ok(self.info(&device))
    }

    /// Makes a device that is noted.
    fn make(&self, name: &str, block: &Arc<BlockDevice>) -> Result<Arc<Device>, DaemonError> {
        let (attachment, attached) = self.attach(name, block)?;
        let (name, block) = (name.to_owned(), Arc::clone(block));
        let swapped_by_us = self.parts.config.swapon;
        let observer = Mutex::new(None);
        let device = Arc::new(Device { name, block, attachment, swapped_by_us, observer });
        if attached.is_err() {
            // Of connections that were made for a node, before that failed.
            device.attachment.settle();
        }
        // Before anybody swaps to it.
        self.follow_freed(&device);
        if let Err(failed) = attached.and_then(|()| self.set_up(&device.attachment)) {
            return Err(self.undo(device, failed));
        }
        self.devices.lock().push(Arc::clone(&device));
        Ok(device)
    }

    /// Takes a device that is gone out of the notes.
    fn forget(&self, name: &str) {
        let forgotten = self.parts.notebook.update(|notes| {
            notes.devices.retain(|device| device.name != name);
        });
        // Who goes on sees that it is gone.
        if let Err(error) = forgotten {
            log(format_args!("cannot note that '{name}' is gone: {error}"));
        }
    }

    /// Removes a device. Swap that we switched on is switched off first, which takes as long as
    /// reading all of it back; a device that anybody else uses is refused.
    pub fn del(&self, name: &str) -> Result<(), DaemonError> {
        let _turn = self.turn.lock();
        let device = self.find(name)?;
        self.take_out(&device)?;
        self.devices.lock().retain(|other| !Arc::ptr_eq(other, &device));
        device.block.destroy();
        self.forget(name);
        Ok(())
    }

    /// The devices, in the order in which they were added.
    pub fn list(&self) -> Vec<DeviceInfo> {
        self.snapshot().iter().map(|device| self.info(device)).collect()
    }

    /// All figures.
    pub fn stats(&self) -> DaemonStats {
        let of = |device: &Arc<Device>| DeviceStats {
            info: self.info(device),
            pool: device.block.pool_stats(),
            latencies: device.block.latencies(),
            io: device.attachment.io_stats(),
        };
        let devices: Vec<DeviceStats> = self.snapshot().iter().map(of).collect();
        let (total, supply) = (self.parts.engine.stats(), self.parts.supply.stats());
        let mut serving = self.serving();
        if serving.takeovers > 0 {
            serving.takeover_requests_last =
                devices.iter().map(|device| device.io.first_requests).sum();
        }
        DaemonStats { total, serving, supply, devices, backing: self.parts.backing.stats() }
    }

    fn serving(&self) -> ServingStats {
        let notes = self.parts.notebook.notes();
        ServingStats {
            worker_pid: std::process::id(),
            takeovers: notes.takeovers.count,
            // A u64 holds centuries.
            takeover_ns_last: notes.takeovers.last.as_nanos() as u64,
            takeover_requests_last: 0,
            has_supervisor: getppid() == self.parts.supervisor,
        }
    }

    /// What the kernel counts of the devices that have a node; but for those of which requests may rightly take any time, as all do by NBD
    /// that come behind many reads which the backing file does not answer. Waits for every lock of the engine.
    pub fn pulses(&self) -> Vec<Pulse> {
        let _ = self.parts.engine.stats();
        let devices = self.snapshot();
        let is_slow = self.parts.backing.is_slow();
        let judged = devices.iter().filter(|device| !(is_slow && device.attachment.has_nbd_node()));
        let nodes = judged.filter_map(|device| device.live_node());
        nodes.filter_map(|node| Pulse::read(Path::new("/sys"), node)).collect()
    }

    /// Whether a read may wait for the backing file.
    pub fn reads_from_disk(&self) -> bool {
        self.parts.backing.file().is_some()
    }

    /// How much is swapped to all devices, in bytes; what cannot be found out counts as nothing.
    pub fn swapped(&self) -> u64 {
        let devices = self.snapshot();
        let nodes = devices.iter().filter_map(|device| device.live_node());
        nodes.filter_map(|node| self.host.swapped(node).ok()?).sum()
    }

    /// Sets the pool limit, in bytes, and returns it as it is in force. Above it nothing more is
    /// taken in; what is there already leaves as it is freed.
    pub fn set_pool_limit(&self, bytes: u64) -> Result<u64, DaemonError> {
        self.parts.engine.set_limit(bytes)?;
        self.parts.supply.waker().wake();
        self.parts.backing.waker().wake();
        Ok(self.parts.engine.limit())
    }

    /// Attaches a backing file. There can be one, and it stays until the daemon ends.
    pub fn set_backing(&self, spec: &BackingSpec) -> Result<BackingInfo, DaemonError> {
        let _turn = self.turn.lock();
        if self.parts.backing.file().is_some() {
            return Err(BackingError::Attached.into());
        }
        let nodes: Vec<_> = self.snapshot().iter().filter_map(|device| device.number()).collect();
        let file = BackingFile::open(spec, &nodes)?;
        let info = file.info();
        // All that can fail first: what was attached stays.
        let ready = Driver::prepare(Arc::clone(&self.parts.backing));
        let ready = ready.map_err(system("start the thread that writes to the backing file"))?;
        let encrypts = self.parts.config.encrypt_backing;
        let key = encrypts.then(new_key).transpose().map_err(system("get random numbers"))?;
        let note = BackingNote::of(&file).map_err(system("look at the backing file"))?;
        self.parts.notebook.update(|notes| notes.backing = Some(note))?;
        let engine = &self.parts.engine;
        let writeback = match engine.attach_backing(file.bytes(), key.as_ref()) {
            Ok(writeback) => writeback,
            Err(error) => {
                self.parts.notebook.update(|notes| notes.backing = None)?;
                return Err(error.into());
            }
        };
        let locked = writeback.is_locked() && self.parts.engine.is_locked();
        *self.driver.lock() = Some(ready.drive(Arc::clone(engine), file, writeback));
        // Attached it is. All memory was locked when the daemon started, or that was warned of.
        if let Ok(Some(warning)) | Err(warning) =
            check_locked(locked, self.parts.config.best_effort)
        {
            log(format_args!("going on without a guard: {warning}"));
        }
        Ok(info)
    }

    /// Changes a setting of writeback, and returns all as they are in force.
    pub fn set_writeback(&self, change: WritebackChange) -> Result<WritebackSettings, DaemonError> {
        // Two changes at a time would undo one another.
        let _setting = self.setting.lock();
        let settings = change.of(self.parts.engine.writeback_settings());
        self.parts.engine.set_writeback_settings(&settings)?;
        self.parts.backing.waker().wake();
        self.parts.notebook.update(|notes| notes.config.writeback = settings)?;
        Ok(settings)
    }

    /// Removes all devices: first all swap that we switched on is switched off, then the devices
    /// go. Stops at the first that somebody else uses; what is left goes on being served.
    pub fn shutdown(&self) -> Result<(), DaemonError> {
        for device in self.snapshot() {
            let _turn = self.turn.lock();
            self.swap_off(&device)?;
        }
        for device in self.snapshot() {
            match self.del(&device.name) {
                // Removed by another caller meanwhile.
                Err(DaemonError::NoDevice { .. }) => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Makes all by which a new device is reached; with the second error it is not all.
    #[allow(clippy::type_complexity, reason = "the second result is about the first's value")]
    fn attach(
        &self,
        name: &str,
        block: &Arc<BlockDevice>,
    ) -> Result<(Attachment, Result<(), DaemonError>), DaemonError> {
        // A flush of swap is for nothing.
        let flush = !self.parts.config.swapon;
        let export = |nbd: &Arc<NbdServer>| Attachment::export(nbd, name, Arc::clone(block), flush);
        let attachment = match (self.parts.config.frontend, &self.nbd) {
            (FrontEnd::Ublk, nbd) => {
                let server = self.add_ublk(name, block)?;
                let node = Node::Ublk(server);
                match nbd {
                    None => Attachment::new(node),
                    Some(nbd) => export(nbd).with_node(node),
                }
            }
            (FrontEnd::Nbd, None) => unreachable!("the NBD front end has an address"),
            (FrontEnd::Nbd, Some(nbd)) if self.parts.config.swapon => {
                let others: u32 = self.snapshot().iter().map(|d| d.attachment.connections()).sum();
                match check_reserve(Path::new("/proc"), 1 + others as u16) {
                    Err(warning) if self.parts.config.best_effort => {
                        log(format_args!("going on without a guard: {warning}"));
                    }
                    checked => checked?,
                }
                let exported = export(nbd);
                // First of all, so that nobody has to guess whose it is.
                let note = |number, id| {
                    let node = Some(NodeNote::Nbd { number, id });
                    self.parts.notebook.update_device(name, |note| note.node = node)
                };
                match exported.connect_kernel(note) {
                    Ok(client) => exported.with_node(Node::Nbd(client)),
                    Err(error) => return Ok((exported, Err(error.into()))),
                }
            }
            (FrontEnd::Nbd, Some(nbd)) => export(nbd),
        };
        Ok((attachment, Ok(())))
    }

    /// Makes a ublk device: with the first number that nobody has.
    fn add_ublk(&self, name: &str, block: &Arc<BlockDevice>) -> Result<UblkServer, DaemonError> {
        let mut draft = {
            let store = self.parts.notebook.store().clone();
            let room = Room { store, pool: block.pool().number() };
            Draft::new(self.plan()?, room, false)?
        };
        let QueuePlan { queues, depth } = draft.plan();
        for id in (0..).filter(|id| !Path::new(&format!("/dev/ublkc{id}")).exists()) {
            // First of all, so that nobody has to guess whose it is.
            let node = Some(NodeNote::Ublk { id, queues, depth });
            self.parts.notebook.update_device(name, |note| note.node = node)?;
            draft.begin(self.served(block), Way::Add(id));
            match draft.finish(Way::Add(id))? {
                Started::Live(server) => return Ok(server),
                // In just this moment.
                Started::Taken(again) => draft = again,
            }
        }
        unreachable!("the driver has an end of numbers, and says so otherwise")
    }

    fn served(&self, block: &Arc<BlockDevice>) -> Served {
        Served {
            device: Arc::clone(block),
            waker: Arc::clone(self.parts.supply.waker()),
            backing: Arc::clone(&self.parts.backing),
        }
    }

    /// What a new device needs once it is live: threads that are fit for it, and swap.
    fn set_up(&self, attachment: &Attachment) -> Result<(), DaemonError> {
        match process::verify_threads() {
            Err(warning) if self.parts.config.best_effort => {
                log(format_args!("going on without a guard: {warning}"));
            }
            verified => verified?,
        }
        if let Some(node) = attachment.node().filter(|_| self.parts.config.swapon) {
            let devices = self.snapshot();
            let nodes = devices.iter().filter_map(|device| device.attachment.node());
            let others =
                nodes.map(|node| self.host.priority(node)).collect::<Result<Vec<_>, _>>()?;
            swap::swap_on(node, others.into_iter().flatten())?;
        }
        Ok(())
    }

    /// The queues of a new device.
    fn plan(&self) -> Result<QueuePlan, DaemonError> {
        // Counted anew each time, so that whatever becomes of a device, nothing is lost.
        let devices = self.snapshot();
        let plans = devices.iter().filter_map(|device| device.attachment.plan());
        plan_beside(self.cpus, self.buffer_budget, plans)
    }

    /// Removes a device that could not be set up. The kernel may swap to it for all that: then it
    /// must be served, and is kept.
    fn undo(&self, device: Arc<Device>, failed: DaemonError) -> DaemonError {
        let Err(kept) = self.take_out(&device) else { return failed };
        let name = device.name.clone();
        self.devices.lock().push(device);
        DaemonError::Kept { name, failed: failed.into(), kept: kept.into() }
    }

    /// Takes a device out of use and removes it, if nobody else uses it.
    fn take_out(&self, device: &Device) -> Result<(), DaemonError> {
        self.swap_off(device)?;
        // Held until the device is stopped, so that nobody can begin to use it meanwhile.
        let claim = self.claim(device)?;
        device.attachment.detach(claim).map_err(|error| match error {
            DetachError::Clients { connections } => {
                DaemonError::Clients { name: device.name.clone(), connections }
            }
            DetachError::Kernel(error) => error.into(),
            DetachError::Ublk(error) => error.into(),
        })?;
        self.unfollow_freed(device);
        Ok(())
    }

    fn swap_off(&self, device: &Device) -> Result<(), DaemonError> {
        let Some(path) = device.live_node().filter(|_| device.swapped_by_us) else {
            return Ok(());
        };
        if !self.host.is_swap(path)? {
            return Ok(());
        }
        match swap::swap_off(path) {
            // Somebody else's swapoff was under way, and is done.
            Err(_) if !self.host.is_swap(path)? => Ok(()),
            result => Ok(result?),
        }
    }

    /// Takes a device for ourselves, or says who has it. None for a device that is gone already.
    fn claim(&self, device: &Device) -> Result<Option<File>, DaemonError> {
        let Some(path) = device.live_node() else { return Ok(None) };
        let in_use = |user| DaemonError::InUse { path: path.into(), user };
        if let Some(user) = self.host.user(path)? {
            return Err(in_use(user));
        }
        match swap::claim(path) {
            Ok(claim) => Ok(Some(claim)),
            // It has gone just now, or was stopped before and not removed.
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(in_use(User::Unknown)),
            Err(source) => Err(DaemonError::System { what: "open the device", source }),
        }
    }

    fn find(&self, name: &str) -> Result<Arc<Device>, DaemonError> {
        let found = self.snapshot().into_iter().find(|device| device.name == name);
        found.ok_or_else(|| DaemonError::NoDevice { name: shorten(name) })
    }

    /// Checks a name, or finds the first free one.
    fn new_name(&self, name: Option<&str>) -> Result<String, DaemonError> {
        let devices = self.devices.lock();
        let taken = |name: &str| devices.iter().any(|device| device.name == name);
        match name {
            Some(name) => {
                check_name(name)?;
                if taken(name) {
                    return Err(DaemonError::NameTaken { name: name.into() });
                }
                Ok(name.into())
            }
            // One more candidate than there are devices: one of them is free.
            None => Ok((0..=devices.len())
                .map(|i| format!("swap{i}"))
                .find(|name| !taken(name))
                .unwrap_or_default()),
        }
    }

    fn snapshot(&self) -> Vec<Arc<Device>> {
        self.devices.lock().clone()
    }

    fn info(&self, device: &Device) -> DeviceInfo {
        let (queues, depth) = device.attachment.queues();
        let is_swap = |node| self.host.is_swap(node).unwrap_or(false);
        DeviceInfo {
            name: device.name.clone(),
            kind: "swap".into(),
            path: device.attachment.path(),
            uri: device.attachment.uri(),
            connections: device.attachment.connections(),
            bytes: device.block.bytes(),
            queues,
            depth,
            swapped_on: device.attachment.node().is_some_and(is_swap),
            state: device.attachment.state(),
            worker_pid: std::process::id(),
            takeovers: self.parts.notebook.notes().takeovers.count,
        }
    }
}

impl Device {
    /// Its node's number.
    fn number(&self) -> Option<u64> {
        Some(std::fs::metadata(self.live_node()?).ok()?.rdev())
    }

    /// Its node, while it is there.
    fn live_node(&self) -> Option<&str> {
        self.attachment.node().filter(|_| !self.attachment.node_has_ended())
    }
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> DaemonError {
    move |source| DaemonError::System { what, source }
}

/// What the I/O buffers of all devices may take, in bytes, and the most queues that one has.
fn resources(config: &RunConfig) -> Result<(u64, u16), DaemonError> {
    let cpus = available_parallelism().map_err(system("count the CPUs"))?.get();
    let front_ends = 1 + u64::from(config.nbd.is_some() && config.frontend == FrontEnd::Ublk);
    let budget = buffer_budget(ram_bytes(), front_ends);
    Ok((budget, most_queues(cpus, budget)))
}

/// An NBD server that has all that it needs, and waits for the engine; none if there shall be none.
fn prepare_nbd(
    config: &RunConfig,
    supply: &Supply,
    backing: &Arc<Backing>,
) -> Result<Option<NbdServer>, DaemonError> {
    let Some(address) = &config.nbd else { return Ok(None) };
    let side = EngineSide { waker: Arc::clone(supply.waker()), backing: Arc::clone(backing) };
    let purpose = match config.swapon && config.frontend == FrontEnd::Nbd {
        true => Purpose::Swap { best_effort: config.best_effort },
        false => Purpose::Clients,
    };
    let (buffer_budget, _) = resources(config)?;
    let cpus = available_parallelism().map_err(system("count the CPUs"))?.get();
    Ok(Some(NbdServer::prepare(address, &side, cpus, buffer_budget, purpose)?))
}

/// A key that nobody else has, and nobody will have again.
fn new_key() -> io::Result<[u8; KEY_BYTES]> {
    let mut key = [0; KEY_BYTES];
    let got = rustix::rand::getrandom(&mut key, GetRandomFlags::empty())?;
    // So few bytes come at once.
    assert_eq!(got, KEY_BYTES);
    Ok(key)
}

/// True if an open failed because there is no such device: no node, or a node of none.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV))
}

/// Refuses memory that is not locked, or warns of it. Whether all of it is, is the engine's word.
fn check_locked(locked: bool, best_effort: bool) -> Result<Option<ProcessError>, ProcessError> {
    if locked {
        return Ok(None);
    }
    let source = io::Error::other("the memory that holds pages is not locked");
    let error = ProcessError::LockMemory { source };
    if best_effort { Ok(Some(error)) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_not_locked_is_refused_or_warned_of() {
        assert!(matches!(check_locked(true, false), Ok(None)));
        assert!(matches!(check_locked(false, true), Ok(Some(ProcessError::LockMemory { .. }))));
        assert!(matches!(check_locked(false, false), Err(ProcessError::LockMemory { .. })));
    }

    #[test]
    fn a_device_without_a_node_is_gone() {
        assert!(is_gone(&swap::claim("/nonexistent/device").unwrap_err()));
        assert!(!is_gone(&io::Error::from_raw_os_error(libc::EBUSY)));
    }

    #[test]
    fn a_device_that_is_kept_is_named_with_both_reasons() {
        let in_use = DaemonError::InUse { path: "/dev/ublkb0".into(), user: User::Swap };
        let failed = DaemonError::NameTaken { name: "x".into() };
        let (failed, kept) = (failed.into(), in_use.into());
        let message = DaemonError::Kept { name: "swap0".into(), failed, kept }.to_string();
        assert!(message.contains("'swap0'") && message.contains("swapoff"), "{message}");
    }

    #[test]
    fn a_refusal_says_who_and_what_to_do() {
        let error = DaemonError::InUse { path: "/dev/ublkb0".into(), user: User::Swap };
        assert!(error.to_string().contains("`swapoff /dev/ublkb0`"), "{error}");
    }
}
