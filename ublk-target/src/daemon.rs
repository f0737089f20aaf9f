//! The daemon: one engine, its supply thread, and the devices on it.
//!
//! Guarantees: after an error nothing half made is left behind, unless the error says so; a device
//! that anybody uses is not removed. Calls may come from several threads: adding and removing take
//! turns, and looking never waits for them. None of it is on the I/O path, and no I/O waits for any
//! of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::available_parallelism;

use parking_lot::Mutex;
use rustix::rand::GetRandomFlags;
use serde::{Deserialize, Serialize};
use tmem::{
    BackingError, Config, ConfigError, Engine, KEY_BYTES, Latencies, PAGE_SIZE, POOL_PAGES_MAX,
    PoolCounters, PoolError, SHARDS_MAX, SettingsError, Stats, WritebackSettings,
};

pub use crate::attachment::DeviceState;
use crate::attachment::{Attachment, DetachError, Node};
use crate::backing::{
    Backing, BackingFile, BackingFileError, BackingInfo, BackingSpec, BackingStats, Driver,
    WritebackChange,
};
use crate::device::{BlockDevice, IoStats};
use crate::log::log;
use crate::nbd::{
    EngineSide, KernelClient, KernelError, NbdAddress, NbdServer, NbdServerError, Purpose,
    check_reserve,
};
use crate::process::{self, ProcessError};
use crate::size::ram_bytes;
use crate::supply::{Supply, SupplyStats};
use crate::swap::{self, Host, SwapError, User};
use crate::ublk::{
    Draft, QueuePlan, Served, ServerError, Started, UblkServer, Way, buffer_budget, plan,
};
use crate::watchdog::Pulse;

/// Longest device name, in bytes.
pub const NAME_MAX: usize = 31;

/// The name of the row that adds up all devices in what `tmem stats` shows; no device may have it.
pub const TOTAL: &str = "total";

/// Smallest swap device: mkswap takes no less.
pub const SWAP_BYTES_MIN: u64 = 10 * PAGE_SIZE as u64;

/// Largest swap device: what one pool can name.
pub const SWAP_BYTES_MAX: u64 = POOL_PAGES_MAX * PAGE_SIZE as u64;

/// By what new devices get their node.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FrontEnd {
    /// The kernel's ublk driver.
    #[default]
    Ublk,
    /// None of their own: they are exported by NBD, and where swap is to be switched on, the
    /// kernel's NBD client is attached to the export.
    Nbd,
}

/// How a daemon is started.
#[derive(Clone, Debug)]
pub struct DaemonConfig {
    /// What the pages of all devices may take, in bytes.
    pub pool_limit: u64,
    /// The most that the limit may be set to later, in bytes.
    pub limit_max: u64,
    /// Go on, with warnings, where the process cannot be hardened. For tests and trials.
    pub best_effort: bool,
    /// Make a swap area on new swap devices and switch it on.
    pub swapon: bool,
    /// By what new devices get their node.
    pub frontend: FrontEnd,
    /// Where devices are exported by NBD; the front end of that name cannot do without.
    pub nbd: Option<NbdAddress>,
    /// The backing file.
    pub backing: Option<BackingSpec>,
    /// Whether a backing file that is set later is encrypted.
    pub encrypt_backing: bool,
    /// When pages are written to a backing file, and how many.
    pub writeback: WritebackSettings,
}

/// Why the daemon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The process is not fit to serve swap.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The engine could not be made, or not be given that limit.
    #[error(transparent)]
    Engine(#[from] ConfigError),
    /// The engine cannot use the backing file.
    #[error(transparent)]
    Attach(#[from] BackingError),
    /// No pool for the device.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The device could not be made or removed.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// NBD cannot be served.
    #[error(transparent)]
    Nbd(#[from] NbdServerError),
    /// The kernel's NBD client could not be attached or detached.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// NBD clients are connected.
    #[error(
        "the device '{name}' is in use by NBD clients ({connections} connections): disconnect them \
         first"
    )]
    Clients {
        /// The device.
        name: String,
        /// Their connections.
        connections: u32,
    },
    /// The backing file cannot be used.
    #[error(transparent)]
    Backing(#[from] BackingFileError),
    /// Settings of writeback that make no sense.
    #[error(transparent)]
    Writeback(#[from] SettingsError),
    /// Swap could not be switched on or off.
    #[error(transparent)]
    Swap(#[from] SwapError),
    /// A file of the system or a thread could not be had.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
    /// A name that no device can have.
    #[error(
        "'{name}' cannot name a device: use 1 to {NAME_MAX} letters, digits, '.', '_' or '-', a \
         letter or digit first, and not '{TOTAL}'"
    )]
    BadName {
        /// The name, or the start of it.
        name: String,
    },
    /// There is one already.
    #[error("there is a device named '{name}' already: choose another name, or remove it first")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// There is none.
    #[error("there is no device named '{name}': see `tmem list`")]
    NoDevice {
        /// The name, or the start of it.
        name: String,
    },
    /// A size that no swap device can have.
    #[error(
        "a swap device of {bytes} bytes: it must have {SWAP_BYTES_MIN} to {SWAP_BYTES_MAX} bytes"
    )]
    SizeOutOfBounds {
        /// What was asked for.
        bytes: u64,
    },
    /// A size that is not whole pages.
    #[error(
        "a swap device of {bytes} bytes is not whole pages of {PAGE_SIZE}: use {}",
        bytes - bytes % PAGE_SIZE as u64
    )]
    SizeNotPages {
        /// What was asked for.
        bytes: u64,
    },
    /// The devices that there are have taken all memory that is for I/O buffers.
    #[error(
        "no memory is left for another device's I/O buffers: all devices together may have \
         {budget} bytes of them, and {left} are left; remove a device first"
    )]
    NoBuffers {
        /// What all devices may have, in bytes.
        budget: u64,
        /// What is left of it.
        left: u64,
    },
    /// A device could not be set up, and not be removed either.
    #[error("{failed}; the device '{name}' is kept, because it cannot be removed yet: {kept}")]
    Kept {
        /// The device.
        name: String,
        /// Why it could not be set up.
        failed: Box<DaemonError>,
        /// Why it could not be removed.
        kept: Box<DaemonError>,
    },
    /// Somebody uses the device.
    #[error("{}", user.explain(path))]
    InUse {
        /// The device's node.
        path: String,
        /// Who.
        user: User,
    },
}

/// A device.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct DeviceInfo {
    /// The name that the user knows it by.
    pub name: String,
    /// What it is for: `swap`.
    pub kind: String,
    /// Its block device node, or the URI of its export if it has none.
    pub path: String,
    /// The URI of its NBD export.
    #[serde(default)]
    pub uri: Option<String>,
    /// NBD connections that use it, the kernel's included.
    #[serde(default)]
    pub connections: u32,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its node's hardware queues; none without a node.
    pub queues: u32,
    /// Requests that each queue holds.
    pub depth: u32,
    /// Whether the kernel swaps to it now.
    pub swapped_on: bool,
    /// Whether its node can be used.
    #[serde(default)]
    pub state: DeviceState,
}

/// One device and what it counts.
#[derive(Clone, Debug)]
pub struct DeviceStats {
    /// The device.
    pub info: DeviceInfo,
    /// Its pool's counters.
    pub pool: PoolCounters,
    /// Its queues' latencies.
    pub latencies: Latencies,
    /// Its queues' counters.
    pub io: IoStats,
}

/// The figures of a whole daemon.
#[derive(Clone, Debug, Default)]
pub struct DaemonStats {
    /// The engine's figures.
    pub total: Stats,
    /// How the supply of memory fares.
    pub supply: SupplyStats,
    /// The devices.
    pub devices: Vec<DeviceStats>,
    /// How the backing file fares, if there is one.
    pub backing: Option<BackingStats>,
}

/// The daemon. Call [`Daemon::shutdown`] before dropping it.
pub struct Daemon {
    config: DaemonConfig,
    warnings: Vec<ProcessError>,
    engine: Arc<Engine>,
    supply: Supply,
    backing: Arc<Backing>,
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

struct Device {
    name: String,
    block: Arc<BlockDevice>,
    attachment: Attachment,
    /// Whether it is for us to switch swap on it off.
    swapped_by_us: bool,
}

impl Daemon {
    /// Hardens the process, makes the engine and starts its supply thread. Call it before any
    /// thread is started; there are no devices yet.
    pub fn start(config: DaemonConfig) -> Result<Self, DaemonError> {
        let mut warnings = process::prepare(config.best_effort)?;
        let system = |what| move |source| DaemonError::System { what, source };
        let cpus = available_parallelism().map_err(system("count the CPUs"))?.get();
        let front_ends = 1 + u64::from(config.nbd.is_some() && config.frontend == FrontEnd::Ublk);
        let buffer_budget = buffer_budget(ram_bytes(), front_ends);
        let engine = Arc::new(Engine::new(&Config {
            limit: config.pool_limit,
            limit_max: config.limit_max,
            shards: shards(most_queues(cpus, buffer_budget)),
        })?);
        warnings.extend(check_locked(engine.is_locked(), config.best_effort)?);
        let supply =
            Supply::start(Arc::clone(&engine)).map_err(system("start the supply thread"))?;
        let backing = Arc::new(Backing::new().map_err(system("make an eventfd"))?);
        let nbd = match &config.nbd {
            None => None,
            Some(address) => {
                let side = EngineSide {
                    engine: Arc::clone(&engine),
                    waker: Arc::clone(supply.waker()),
                    backing: Arc::clone(&backing),
                };
                let purpose = match config.swapon && config.frontend == FrontEnd::Nbd {
                    true => Purpose::Swap { best_effort: config.best_effort },
                    false => Purpose::Clients,
                };
                let server = NbdServer::start(address, side, cpus, buffer_budget, purpose)?;
                Some(Arc::new(server))
            }
        };
        let (devices, turn) = (Mutex::new(Vec::new()), Mutex::new(()));
        let host = Host::default();
        let driver = Mutex::new(None);
        let daemon = Self {
            config,
            warnings,
            engine,
            supply,
            backing,
            driver,
            cpus,
            buffer_budget,
            host,
            nbd,
            devices,
            turn,
            setting: Mutex::new(()),
        };
        daemon.engine.set_writeback_settings(&daemon.config.writeback)?;
        if let Some(spec) = &daemon.config.backing {
            daemon.set_backing(spec)?;
        }
        Ok(daemon)
    }

    /// What could not be had in hardening the process; empty unless best effort was asked for.
    pub fn warnings(&self) -> &[ProcessError] {
        &self.warnings
    }

    /// Makes a swap device, and switches swap on it on if so configured.
    pub fn add_swap(&self, name: Option<&str>, bytes: u64) -> Result<DeviceInfo, DaemonError> {
        check_swap_bytes(bytes)?;
        let _turn = self.turn.lock();
        let name = self.new_name(name)?;
        let block = BlockDevice::new(Arc::clone(&self.engine), bytes / PAGE_SIZE as u64)?;
        let block = Arc::new(block);
        if let Some(warning) = check_locked(self.engine.is_locked(), self.config.best_effort)? {
            log(format_args!("going on without a guard: {warning}"));
        }
        let (attachment, attached) = self.attach(&name, &block)?;
        let swapped_by_us = self.config.swapon;
        let device = Arc::new(Device { name, block, attachment, swapped_by_us });
        if attached.is_err() {
            // Of connections that were made for a node, before that failed.
            device.attachment.settle();
        }
        if let Err(failed) = attached.and_then(|()| self.set_up(&device.attachment)) {
            return Err(self.undo(device, failed));
        }
        self.devices.lock().push(Arc::clone(&device));
        Ok(self.info(&device))
    }

    /// Removes a device. Swap that we switched on is switched off first, which takes as long as
    /// reading all of it back; a device that anybody else uses is refused.
    pub fn del(&self, name: &str) -> Result<(), DaemonError> {
        let _turn = self.turn.lock();
        let device = self.find(name)?;
        self.take_out(&device)?;
        self.devices.lock().retain(|other| !Arc::ptr_eq(other, &device));
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
        let devices = self.snapshot().iter().map(of).collect();
        let (total, supply) = (self.engine.stats(), self.supply.stats());
        DaemonStats { total, supply, devices, backing: self.backing.stats() }
    }

    /// What the kernel counts of the devices that have a node. Waits for every lock of the engine.
    pub fn pulses(&self) -> Vec<Pulse> {
        let _ = self.engine.stats();
        let devices = self.snapshot();
        let nodes = devices.iter().filter_map(|device| device.live_node());
        nodes.filter_map(|node| Pulse::read(Path::new("/sys"), node)).collect()
    }

    /// Whether a read may wait for the backing file.
    pub fn reads_from_disk(&self) -> bool {
        self.backing.file().is_some()
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
        self.engine.set_limit(bytes)?;
        self.supply.waker().wake();
        self.backing.waker().wake();
        Ok(self.engine.limit())
    }

    /// Attaches a backing file. There can be one, and it stays until the daemon ends.
    pub fn set_backing(&self, spec: &BackingSpec) -> Result<BackingInfo, DaemonError> {
        let system = |what| move |source| DaemonError::System { what, source };
        let _turn = self.turn.lock();
        if self.backing.file().is_some() {
            return Err(BackingError::Attached.into());
        }
        let nodes: Vec<_> = self.snapshot().iter().filter_map(|device| device.number()).collect();
        let file = BackingFile::open(spec, &nodes)?;
        let info = file.info();
        // All that can fail first: what was attached stays.
        let ready = Driver::prepare(Arc::clone(&self.engine), Arc::clone(&self.backing));
        let ready = ready.map_err(system("start the thread that writes to the backing file"))?;
        let encrypts = self.config.encrypt_backing;
        let key = encrypts.then(new_key).transpose().map_err(system("get random numbers"))?;
        let writeback = self.engine.attach_backing(file.bytes(), key.as_ref())?;
        let locked = writeback.is_locked() && self.engine.is_locked();
        *self.driver.lock() = Some(ready.drive(file, writeback));
        // Attached it is. All memory was locked when the daemon started, or that was warned of.
        if let Ok(Some(warning)) | Err(warning) = check_locked(locked, self.config.best_effort) {
            log(format_args!("going on without a guard: {warning}"));
        }
        Ok(info)
    }

    /// Changes a setting of writeback, and returns all as they are in force.
    pub fn set_writeback(&self, change: WritebackChange) -> Result<WritebackSettings, DaemonError> {
        // Two changes at a time would undo one another.
        let _setting = self.setting.lock();
        let settings = change.of(self.engine.writeback_settings());
        self.engine.set_writeback_settings(&settings)?;
        self.backing.waker().wake();
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
        let flush = !self.config.swapon;
        let export = |nbd: &Arc<NbdServer>| Attachment::export(nbd, name, Arc::clone(block), flush);
        let attachment = match (self.config.frontend, &self.nbd) {
            (FrontEnd::Ublk, nbd) => {
                let server = self.add_ublk(block)?;
                let node = Node::Ublk(server);
                match nbd {
                    None => Attachment::new(node),
                    Some(nbd) => export(nbd).with_node(node),
                }
            }
            (FrontEnd::Nbd, None) => unreachable!("the NBD front end has an address"),
            (FrontEnd::Nbd, Some(nbd)) if self.config.swapon => {
                // As many as there are workers to serve them at the same time.
                let connections = nbd.workers() as u16;
                let others: u32 = self.snapshot().iter().map(|d| d.attachment.connections()).sum();
                match check_reserve(Path::new("/proc"), connections + others as u16) {
                    Err(warning) if self.config.best_effort => {
                        log(format_args!("going on without a guard: {warning}"));
                    }
                    checked => checked?,
                }
                let exported = export(nbd);
                match KernelClient::attach(nbd.address(), name, block.bytes(), connections) {
                    Ok(client) => exported.with_node(Node::Nbd(client)),
                    Err(error) => return Ok((exported, Err(error.into()))),
                }
            }
            (FrontEnd::Nbd, Some(nbd)) => export(nbd),
        };
        Ok((attachment, Ok(())))
    }

    /// Makes a ublk device: with the first number that nobody has.
    fn add_ublk(&self, block: &Arc<BlockDevice>) -> Result<UblkServer, DaemonError> {
        let mut draft = Draft::new(self.plan()?, false)?;
        for id in (0..).filter(|id| !Path::new(&format!("/dev/ublkc{id}")).exists()) {
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
            waker: Arc::clone(self.supply.waker()),
            backing: Arc::clone(&self.backing),
        }
    }

    /// What a new device needs once it is live: threads that are fit for it, and swap.
    fn set_up(&self, attachment: &Attachment) -> Result<(), DaemonError> {
        match process::verify_threads() {
            Err(warning) if self.config.best_effort => {
                log(format_args!("going on without a guard: {warning}"));
            }
            verified => verified?,
        }
        if let Some(node) = attachment.node().filter(|_| self.config.swapon) {
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
        })
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

/// The queues of a new device beside others.
fn plan_beside(
    cpus: usize,
    budget: u64,
    others: impl Iterator<Item = QueuePlan>,
) -> Result<QueuePlan, DaemonError> {
    let taken = others.map(QueuePlan::buffer_bytes).sum();
    let left = budget.saturating_sub(taken);
    plan(cpus, left).ok_or(DaemonError::NoBuffers { budget, left })
}

/// The queues of the first device, of which no other has more.
fn most_queues(cpus: usize, buffer_budget: u64) -> u16 {
    plan(cpus, buffer_budget).map_or(1, |plan| plan.queues)
}

/// One for each queue: a lock is held for a small part of a put, so that two queues seldom wait
/// for each other, and pages are packed more densely in fewer shards.
fn shards(queues: u16) -> usize {
    usize::from(queues).next_power_of_two().min(SHARDS_MAX)
}

/// Checks a device name.
pub fn check_name(name: &str) -> Result<(), DaemonError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts_well && name.len() <= NAME_MAX && name.chars().all(plain) && name != TOTAL {
        return Ok(());
    }
    Err(DaemonError::BadName { name: shorten(name) })
}

/// Checks the size of a swap device.
pub fn check_swap_bytes(bytes: u64) -> Result<(), DaemonError> {
    if !(SWAP_BYTES_MIN..=SWAP_BYTES_MAX).contains(&bytes) {
        return Err(DaemonError::SizeOutOfBounds { bytes });
    }
    if !bytes.is_multiple_of(PAGE_SIZE as u64) {
        return Err(DaemonError::SizeNotPages { bytes });
    }
    Ok(())
}

/// The smallest pool limit that the engine takes on this machine, in bytes.
pub fn pool_limit_min() -> io::Result<u64> {
    let cpus = available_parallelism()?.get();
    Ok(Config::limit_min(shards(most_queues(cpus, buffer_budget(ram_bytes(), 1)))))
}

fn shorten(name: &str) -> String {
    name.chars().take(NAME_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_are_checked_with_reasons() {
        for good in ["swap0", "a", "A.b_c-1", &"x".repeat(NAME_MAX)] {
            check_name(good).unwrap();
        }
        for bad in
            ["", "total", "-a", ".a", "a b", "a/b", "a\n", "\u{e9}", &"x".repeat(NAME_MAX + 1)]
        {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_name(&"x".repeat(1 << 16)).unwrap_err().to_string().len() < 200);

        check_swap_bytes(SWAP_BYTES_MIN).unwrap();
        check_swap_bytes(SWAP_BYTES_MAX).unwrap();
        for bad in [0, 4096, SWAP_BYTES_MAX + 4096, u64::MAX] {
            let message = check_swap_bytes(bad).unwrap_err().to_string();
            assert!(message.contains(&format!(" {bad} ")), "{message}");
        }
        let message = check_swap_bytes((1 << 20) + 5).unwrap_err().to_string();
        assert!(message.ends_with("use 1048576"), "{message}");
    }

    #[test]
    fn shards_are_a_power_of_two_that_the_engine_takes() {
        for queues in 1..=512 {
            let shards = shards(queues);
            assert!(shards.is_power_of_two() && shards <= SHARDS_MAX, "{queues} {shards}");
        }
        assert_eq!([1, 2, 3, 4, 5].map(shards), [1, 2, 4, 4, 8]);
    }

    #[test]
    fn devices_share_the_buffers_until_one_must_go() {
        let budget = buffer_budget(64 << 30, 1);
        let mut plans = Vec::new();
        let full = loop {
            match plan_beside(8, budget, plans.iter().copied()) {
                Ok(plan) => plans.push(plan),
                Err(error) => break error,
            }
        };
        assert!(plans.len() >= 2, "{plans:?}");
        assert!(full.to_string().ends_with("remove a device first"), "{full}");
        let removed = plans.swap_remove(0);
        let again = plan_beside(8, budget, plans.iter().copied()).unwrap();
        assert!(again.buffer_bytes() <= removed.buffer_bytes());
    }

    #[test]
    fn there_is_room_for_a_device_on_the_smallest_machine() {
        for ram in [16 << 20, 64 << 20, 70 << 20, 256 << 20] {
            for front_ends in [1, 2] {
                let budget = buffer_budget(ram, front_ends);
                plan_beside(1, budget, std::iter::empty()).unwrap();
            }
        }
    }

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
