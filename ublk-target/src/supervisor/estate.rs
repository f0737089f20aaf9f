//! What outlives a worker, and also the supervisor: the sockets, and the memory file with all that is on the devices.
//!
//! A supervisor leaves it to the program that it goes on as ([`Estate::bequeath`]), and to systemd, which
//! keeps it for the next one should this one die ([`Estate::deposit`]).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tmem::Store;

use super::system;
use crate::config::RunConfig;
use crate::exit::{Exit, Failure};
use crate::inherited::{Inherited, Legacy};
use crate::log::log;
use crate::notes::{NoNotes, Notes};
use crate::notify;
use crate::process::Mounts;
use crate::socket::Listener;

/// All by which systemd keeps it.
const NAMES: [&str; 6] = ["control", "control-lock", "nbd", "nbd-lock", "store", MOUNTS];

/// By which name the mount namespaces go, each of them.
const MOUNTS: &str = "mounts";

/// See the module's description.
pub(super) struct Estate {
    pub control: Listener,
    pub nbd: Option<Listener>,
    pub store: Store,
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
        harden(config, Mounts::Leave)?;
        let store = Store::new().map_err(|error| system("make a memory file", &error))?;
        let mut estate = Self { control, nbd, store, mounts: Vec::new() };
        estate.keep_mounts()?;
        Ok(estate)
    }

    /// Keeps the mount namespace of this process.
    pub fn keep_mounts(&mut self) -> Result<(), Failure> {
        let own = File::open("/proc/self/ns/mnt");
        let own = own.map_err(|error| system("open the mount namespace", &error))?;
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
        Ok(Some((Self { control, nbd, store, mounts }, notes)))
    }

    /// Leaves all of it to the program that this process goes on as.
    pub fn bequeath_all(&self) -> Legacy<'_> {
        let mut legacy = self.bequeath();
        self.mounts.iter().for_each(|namespace| legacy.add(MOUNTS, namespace.as_fd()));
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
    }
}

/// What systemd has kept of a supervisor that died.
pub(super) fn deposited() -> Result<Option<(Estate, Notes)>, Failure> {
    let kept = Inherited::kept_by_systemd();
    let mut kept = kept.map_err(|error: io::Error| system("take what systemd has kept", &error))?;
    let estate = Estate::inherited(&mut kept)?;
    if let Some((_, notes)) = &estate {
        log(format_args!(
            "going on for a daemon that died, with its {} devices",
            notes.devices.len()
        ));
    }
    Ok(estate)
}
