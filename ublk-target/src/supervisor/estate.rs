//! What outlives a worker, and also the supervisor: the sockets, and the memory file with all that is on the devices.
//!
//! A supervisor leaves it to the program that it goes on as ([`Estate::bequeath`]), and to systemd, which
//! keeps it for the next one should this one die ([`Estate::deposit`]). Without systemd the memory file has a name instead
//! ([`Keep`]), and who recovers has the sockets from the worker, if there is one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use tmem::Store;

use super::child::Child;
use super::keep::Keep;
use super::{SEARCH_PERIOD, WORKER_NAME, system};
use crate::config::RunConfig;
use crate::daemon::FrontEnd;
use crate::exit::{Exit, Failure};
use crate::inherited::{Inherited, Legacy, duplicate};
use crate::log::log;
use crate::notes::{NoNotes, Notes};
use crate::notify;
use crate::process::Mounts;
use crate::socket::{self, Listener};

/// All by which systemd keeps it.
const NAMES: [&str; 6] = ["control", "control-lock", "nbd", "nbd-lock", "store", MOUNTS];

/// By which name the mount namespaces go, each of them,
const MOUNTS: &str = "mounts";

/// and the lock on the store's name.
const KEEP: &str = "keep";

/// How long to wait for somebody to serve, where a process is at it to go on for one that died.
const SUCCESSION_LIMIT: Duration = Duration::from_secs(20);

/// See the module's description.
pub(super) struct Estate {
    pub control: Listener,
    pub nbd: Option<Listener>,
    pub store: Store,
    /// The store's name, if it has one.
    keep: Option<Keep>,
    /// The mount namespaces in which swap was switched on: ours is the last. As long as there are these, the kernel knows by
    /// which name.
    mounts: Vec<OwnedFd>,
}

/// So many mount namespaces are kept. There is another each time that all processes have died.
const MOUNTS_MAX: usize = 8;

impl Estate {
    /// A new one, for a daemon that has nothing yet.
    pub fn new(
        config: &RunConfig,
        harden: impl FnOnce(&RunConfig, Mounts) -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        // First of all, for it tells whether there is a daemon already.
        let control = Listener::bind(&config.control, "--control")?;
        let nbd = config.nbd.as_ref().map(|nbd| Listener::bind(nbd.path(), "--nbd")).transpose()?;
        refuse_to_forget(&config.control)?;
        // Where others see it: it is mounted before we go where they do not see what is.
        let (keep, store) = named_store(config).unzip();
        let finish = || {
            harden(config, Mounts::Leave)?;
            store.map_or_else(Store::new, Ok).map_err(|error| system("make a memory file", &error))
        };
        let store = finish().inspect_err(|_| keep.iter().for_each(Keep::remove))?;
        let mut estate = Self { control, nbd, store, keep, mounts: Vec::new() };
        estate.keep_mounts().inspect_err(|_| estate.keep.iter().for_each(Keep::remove))?;
        Ok(estate)
    }

    /// Keeps the mount namespace of this process.
    pub fn keep_mounts(&mut self) -> Result<(), Failure> {
        let own = File::open("/proc/self/ns/mnt");
        let own = own.map_err(|error| system("open the mount namespace", &error))?;
        if let Some(Err(error)) = self.keep.as_ref().map(|keep| keep.keep_mounts(own.as_fd())) {
            log(format_args!("if all processes die at once, swap loses its name: {error}"));
        }
        if self.mounts.len() == MOUNTS_MAX {
            // Swap that was switched on there loses its name, and nothing else.
            self.mounts.remove(0);
        }
        self.mounts.push(own.into());
        Ok(())
    }

    /// That of a supervisor before us, and what is noted there; none if there is nothing to go on with.
    pub fn inherited(inherited: &mut Inherited) -> Result<Option<(Self, Notes)>, Failure> {
        let Ok(store) = inherited.file("store") else { return Ok(None) };
        let store = Store::from_file(store).map_err(|e| Failure::new(Exit::Failure, e))?;
        let notes = match Notes::read(&store) {
            Ok(notes) if notes.is_ended => return Ok(None),
            // Its first worker died before there was anything.
            Err(NoNotes::None) => return Ok(None),
            // There is something, which is not for us to throw away.
            notes => notes.map_err(|error| Failure::new(Exit::Failure, error))?,
        };
        let mut listener = |name: &str, path: &_, option| {
            let has_both = inherited.has(name) && inherited.has(&format!("{name}-lock"));
            match has_both {
                true => Listener::adopted(inherited, name, path)
                    .map_err(|error| system("take over a socket", &error)),
                false => Ok(Listener::bind(path, option)?),
            }
        };
        let control = listener("control", &notes.config.control, "--control")?;
        let nbd = notes.config.nbd.as_ref();
        let nbd = nbd.map(|nbd| listener("nbd", nbd.path(), "--nbd")).transpose()?;
        let mounts = std::iter::from_fn(|| inherited.file(MOUNTS).ok()).take(MOUNTS_MAX).collect();
        let keep = inherited.file(KEEP).ok();
        let keep = keep.map(|guard| Keep::inherited(&notes.config.control, guard));
        Ok(Some((Self { control, nbd, store, keep, mounts }, notes)))
    }

    /// Leaves all of it to the program that this process goes on as.
    pub fn bequeath_all(&self) -> Legacy<'_> {
        let mut legacy = self.bequeath();
        self.mounts.iter().for_each(|namespace| legacy.add(MOUNTS, namespace.as_fd()));
        self.keep.iter().for_each(|keep| legacy.add(KEEP, keep.guard()));
        legacy
    }

    /// Leaves what it needs to a process that is to be started.
    pub fn bequeath(&self) -> Legacy<'_> {
        let mut legacy = Legacy::default();
        self.control.bequeath("control", "control-lock", &mut legacy);
        if let Some(nbd) = &self.nbd {
            nbd.bequeath("nbd", "nbd-lock", &mut legacy);
        }
        legacy.add("store", self.store.file());
        legacy
    }

    /// Has systemd keep it, for the next supervisor, as long as the service is not stopped. What it has of it already, it has
    /// once.
    pub fn deposit(&self) {
        for (name, file) in self.bequeath_all().files() {
            notify::keep(name, *file);
        }
    }

    /// There is nothing more to keep.
    pub fn withdraw(&self) {
        self.control.remove();
        self.nbd.iter().for_each(Listener::remove);
        NAMES.into_iter().for_each(notify::forget);
        self.keep.iter().for_each(Keep::remove);
    }
}

/// What systemd has kept of a supervisor that died.
pub(super) fn deposited() -> Result<Option<(Estate, Notes)>, Failure> {
    let kept = Inherited::kept_by_systemd();
    let mut kept = kept.map_err(|error: io::Error| system("take what systemd has kept", &error))?;
    Estate::inherited(&mut kept)
}

/// What a daemon with this control socket has left whose supervisor died, or all of whose processes did. Its backing file has
/// to be there, unless what is on it may be lost.
pub(super) fn left(control: &Path, without_backing: bool) -> Result<(Estate, Notes), Failure> {
    let failed = |error| system("take what is left of a daemon", &error);
    let Some((keep, store, notes)) = left_store(control)? else {
        return Err(nothing_left(control));
    };
    let sockets = sockets(&store)?;
    if sockets.is_empty() && !without_backing {
        // Who goes on does so without, if it must.
        check_backing(&notes)?;
    }
    let mut files = vec![("store", duplicate(store.file()).map_err(failed)?)];
    files.extend(keep.mounts().into_iter().map(|mounts| (MOUNTS, mounts)));
    files.extend(sockets);
    let inherited = Estate::inherited(&mut Inherited::of(files))?;
    let (mut estate, notes) = inherited.ok_or_else(|| nothing_left(control))?;
    estate.keep = Some(keep);
    Ok((estate, notes))
}

/// A store with a name, and what is noted there; none if there is nothing to go on with.
fn left_store(control: &Path) -> Result<Option<(Keep, Store, Notes)>, Failure> {
    let left = Keep::left(control).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            let control = control.display();
            let message =
                format!("another process looks after the daemon that serves {control}: there is nothing to recover");
            Failure::new(Exit::Running, message)
        }
        io::ErrorKind::PermissionDenied => denied(&error),
        _ => system("take what is left of a daemon", &error),
    })?;
    let Some((keep, file)) = left else { return Ok(None) };
    let store = Store::from_file(file).map_err(|error| Failure::new(Exit::Failure, error))?;
    match Notes::read(&store) {
        Ok(notes) if notes.is_ended => Ok(None),
        Err(NoNotes::None) => Ok(None),
        notes => Ok(Some((keep, store, notes.map_err(|e| Failure::new(Exit::Failure, e))?))),
    }
}

fn denied(error: &io::Error) -> Failure {
    let message = format!("cannot take what is left of a daemon: {error}: run as root");
    Failure::new(Exit::Permission, message)
}

/// Why there is nothing to go on with.
fn nothing_left(control: &Path) -> Failure {
    let shown = control.display();
    match socket::is_served(control) {
        true => {
            let message = format!(
                "a daemon serves {shown}, and nobody can go on with what it has but its own processes: a service's is kept by \
                 systemd; else it has no block devices, or the kernel is older than 6.4"
            );
            Failure::new(Exit::Running, message)
        }
        false => {
            let message = format!(
                "no daemon that served {shown} has left anything: start one with 'tmem run', or name its socket with --control"
            );
            Failure::new(Exit::NoDaemon, message)
        }
    }
}

/// The sockets of who serves; none if nobody does. A process that is just going on for another is waited for.
fn sockets(store: &Store) -> Result<Vec<(&'static str, OwnedFd)>, Failure> {
    let deadline = Instant::now() + SUCCESSION_LIMIT;
    loop {
        let notes = Notes::read(store).map_err(|error| Failure::new(Exit::Failure, error))?;
        match sockets_of_worker(&notes) {
            Ok(sockets) => return Ok(sockets),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(denied(&error));
            }
            Err(_) if !socket::is_served(&notes.config.control) => return Ok(Vec::new()),
            Err(error) if Instant::now() >= deadline => {
                return Err(system(
                    "find the process that goes on for the daemon that died",
                    &error,
                ));
            }
            Err(_) => sleep(SEARCH_PERIOD),
        }
    }
}

fn sockets_of_worker(notes: &Notes) -> io::Result<Vec<(&'static str, OwnedFd)>> {
    let pid = Pid::from_raw(notes.worker.cast_signed()).ok_or(io::ErrorKind::NotFound)?;
    let mut worker = Child::of_another(pid, WORKER_NAME)?;
    if worker.ended()?.is_some() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let nbd = notes.config.nbd.as_ref().map(|nbd| ("nbd", "nbd-lock", nbd.path()));
    let control = ("control", "control-lock", notes.config.control.as_path());
    let mut files = Vec::new();
    for (name, lock, path) in [control].into_iter().chain(nbd) {
        let (socket, its_lock) = worker.listener(path)?;
        files.extend([(name, socket), (lock, its_lock)]);
    }
    Ok(files)
}

/// Whether the backing file can be opened.
fn check_backing(notes: &Notes) -> Result<(), Failure> {
    let Some(note) = &notes.backing else { return Ok(()) };
    note.reopen().map(|_| ()).map_err(|error| {
        let message = format!(
            "cannot open {}, which has pages that somebody may wait for: {error}; see to it that it is there, or lose them with \
             --without-backing",
            note.path()
        );
        Failure::new(Exit::Failure, message)
    })
}

/// A daemon that died has left what somebody may wait for: that is not thrown away for a new one.
fn refuse_to_forget(control: &Path) -> Result<(), Failure> {
    let Some((keep, _, notes)) = left_store(control)? else { return Ok(()) };
    if notes.devices.is_empty() {
        return Ok(());
    }
    let (devices, directory) = (notes.devices.len(), keep.directory().display());
    let message = format!(
        "a daemon that died has left {devices} devices with what was on them: go on with 'tmem recover', or throw it all away \
         with 'rm {directory}/store'"
    );
    Err(Failure::new(Exit::InUse, message))
}

/// A store with a name, for a daemon whose devices outlive it and of which nobody else keeps it.
fn named_store(config: &RunConfig) -> Option<(Keep, Store)> {
    let has_nodes = config.frontend == FrontEnd::Ublk || config.swapon;
    if !has_nodes || notify::is_service() {
        return None;
    }
    let made = Keep::make(&config.control);
    made.inspect_err(|error| {
        log(format_args!("if all processes die at once, there is no 'tmem recover': {error}"));
    })
    .ok()
}
