//! The kernel's own NBD client on one of our exports: how a kernel without ublk gets a block device.
//!
//! The kernel gets one end of a pair of sockets, and a worker of the server serves the other; no other program takes part. When
//! this process dies, that connection ends with it, and the device waits: who asks for something, for another connection; what was
//! under way, until its time limit is over, and then as well. Whoever goes on gives it another connection
//! ([`KernelClient::reconnect`]), and nothing is lost.
//!
//! There is one connection, for of several the driver (`nbd_xmit_timeout`) gives one up on which a request takes longer than its
//! time limit: what it asks for again on another, the first may carry out later still, over what has been written since. Of
//! one it asks only whether it has been replaced. So a daemon that is stopped for a while is late, and not dead.
//!
//! A connection can also end while we live: the driver may take the end of the old one for that of the new one (`recv_work`). So
//! whoever notices gives it another then, too.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::rand::GetRandomFlags;
use tmem::{NotesError, PAGE_SIZE};

use super::buffer::DATA_BYTES;
use super::netlink::{Connection, Netlink, NetlinkError};
use super::server::NoSeat;
use crate::module;

/// Devices that are looked at for a free one: the driver makes 16 unless told otherwise.
const DEVICES_MAX: u32 = 256;

/// Requests that the driver has under way on one connection.
pub const CONNECTION_DEPTH: u32 = 128;

/// The reserve that a connection needs, in bytes: twice what both its sockets hold, because the workers
/// get half; each skb takes up to twice what is in it; and as much again for what else is allocated
/// meanwhile.
const RESERVE_PER_CONNECTION: u64 = 4 << 20;

/// After how long, and again and again, the driver looks whether a request was sent on a connection that is no more, in
/// milliseconds; it rounds up to whole seconds. Each time it says so in the kernel's log.
const LOOK_MS: u32 = 1000;

/// What the driver has instead for whoever does not say.
const LOOK_MS_DEFAULT: u32 = 30_000;

/// How long a device waits for another connection, in seconds: eleven days, which as milliseconds fits 31 bits, whatever the
/// kernel's tick.
const PATIENCE_SECONDS: u64 = 1_000_000;

/// How long the kernel may take to let go of its connections, and how often to look.
const DETACH_LIMIT: Duration = Duration::from_secs(10);
const LOOK_PERIOD: Duration = Duration::from_millis(20);

/// How often to try to reconnect.
const RECONNECT_PERIOD: Duration = Duration::from_millis(1);

/// Why the kernel's client could not be attached or detached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The kernel has no NBD client.
    #[error(
        "the kernel's NBD client is not there and `modprobe nbd` did not help ({reason}): install \
         the kernel's modules package, or use a kernel with CONFIG_BLK_DEV_NBD"
    )]
    Missing {
        /// What modprobe said.
        reason: String,
    },
    /// The kernel keeps too little memory for replies.
    #[error(
        "the kernel's reserve of memory is not fit for swap by NBD, which could deadlock when memory is \
         short: run 'sysctl vm.watermark_boost_factor=0 vm.min_free_kbytes={need}' (now {boost} and \
         {have})"
    )]
    Reserve {
        /// What the reserve must be, in KiB.
        need: u64,
        /// What it is.
        have: u64,
        /// By how much it may be raised at any time, in 1/10000.
        boost: u64,
    },
    /// All its devices are in use.
    #[error("every /dev/nbd* is in use: free one, or load the module with a larger nbds_max")]
    NoDevice,
    /// The server has no place for its connection.
    #[error(transparent)]
    NoSeat(#[from] NoSeat),
    /// The kernel's client did not do it.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// It could not be noted for the process that goes on when this one dies.
    #[error(transparent)]
    Notes(#[from] NotesError),
    /// There is nothing to know a device by.
    #[error("cannot get random numbers: {source}")]
    Random {
        /// The system call's error.
        source: io::Error,
    },
    /// There are no sockets for it.
    #[error("cannot have a pair of sockets for the kernel's NBD client: {source}")]
    Sockets {
        /// The system call's error.
        source: io::Error,
    },
    /// Somebody else has disconnected it.
    #[error("somebody has disconnected {path}")]
    Gone {
        /// The device.
        path: String,
    },
    /// The device could not be told what its requests may be.
    #[error("cannot write {limit} to {path}: {source}")]
    Limit {
        /// The attribute.
        path: String,
        /// What it was to be.
        limit: u32,
        /// The system call's error.
        source: io::Error,
    },
    /// The kernel was told to let go and did not.
    #[error("{path} did not let go of its connection in {DETACH_LIMIT:?}: try again")]
    Stuck {
        /// The device.
        path: String,
    },
    /// The kernel does not see that the connection of the process that died has ended.
    #[error("{path} is connected still to a process that died")]
    Connected {
        /// The device.
        path: String,
    },
    /// It cannot be found out whether it is ours.
    #[error("cannot read {path}, by which it is known whose device it is: {source}")]
    Unknown {
        /// The attribute.
        path: String,
        /// The system call's error.
        source: io::Error,
    },
}

/// Checks that the kernel keeps a reserve that replies on so many connections can be sent from, with
/// its files under `proc`.
///
/// A reply takes memory of the kernel, and when there is none, only the reply can bring some: the
/// kernel waits for it to free what it has written. The workers get half of the reserve that all
/// others leave ([`crate::process::become_urgent`]). The kernel's own half of a connection
/// takes of it as well. When the kernel boosts its watermark, what is the reserve for all others moves
/// up, and half of it can be more than is left: so it must not.
pub fn check_reserve(proc: &Path, connections: u16) -> Result<(), KernelError> {
    let number = |name: &str| {
        let text = std::fs::read_to_string(proc.join("sys/vm").join(name)).ok();
        text.and_then(|text| text.trim().parse::<u64>().ok())
    };
    let have = number("min_free_kbytes").unwrap_or(0);
    // Kernels before 5.0 have no boost.
    let boost = number("watermark_boost_factor").unwrap_or(0);
    let need = (u64::from(connections) * RESERVE_PER_CONNECTION) >> 10;
    if have < need || boost > 0 {
        return Err(KernelError::Reserve { need: need.max(have), have, boost });
    }
    Ok(())
}

/// A `/dev/nbdN` that is connected to an export. A clone is the same one.
#[derive(Clone, Debug)]
pub struct KernelClient {
    path: String,
    number: u32,
    /// What the driver shows for as long as it is the device that we connected.
    backend: String,
    netlink: Arc<Netlink>,
    /// Whether it shall have no connection any more. Held while it is given one, or the last one is taken away.
    is_detached: Arc<Mutex<bool>>,
}

impl KernelClient {
    /// Connects a free device of `bytes` bytes to a server that offers `flags`, and returns it with the server's end of the
    /// connection. `note` is told of each device that is tried before it is: its number, and what it shall be known by.
    pub fn attach(
        bytes: u64,
        flags: u16,
        mut note: impl FnMut(u32, u64) -> Result<(), NotesError>,
    ) -> Result<(Self, OwnedFd), KernelError> {
        module::ensure("nbd", "/dev/nbd0").map_err(|reason| KernelError::Missing { reason })?;
        let netlink = Arc::new(Netlink::open()?);
        let id = new_id()?;
        let block_bytes = PAGE_SIZE as u64;
        let connection = Connection { bytes, block_bytes, flags, patience: PATIENCE_SECONDS };
        for number in 0..DEVICES_MAX {
            let client = Self::of(number, id, Arc::clone(&netlink));
            if !Path::new(&client.path).exists() {
                break;
            }
            if Path::new(&attribute(&client.path, "pid")).exists() {
                continue;
            }
            note(number, id)?;
            client.limit()?;
            let (ours, theirs) = sockets()?;
            match netlink.connect(number, connection, &client.backend, theirs.as_fd()) {
                Ok(()) => return Ok((client, ours)),
                // Somebody else took it in this moment.
                Err(error) if error.is_busy() => client.unlimit(),
                Err(error) => {
                    // It may have been done for all that.
                    let _ = client.detach(None);
                    client.unlimit();
                    return Err(error.into());
                }
            }
        }
        Err(KernelError::NoDevice)
    }

    /// The device that was connected and noted so.
    pub fn of(number: u32, id: u64, netlink: Arc<Netlink>) -> Self {
        let path = format!("/dev/nbd{number}");
        Self {
            path,
            number,
            backend: format!("tmem-{id:016x}"),
            netlink,
            is_detached: Arc::default(),
        }
    }

    /// The device's node.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether somebody else has disconnected it.
    pub fn has_ended(&self) -> bool {
        // One of which that cannot be found out may be of use.
        self.look_whether_ended().unwrap_or(false)
    }

    fn look_whether_ended(&self) -> Result<bool, KernelError> {
        let path = attribute(&self.path, "backend");
        match std::fs::read_to_string(&path) {
            Ok(backend) => Ok(backend.trim_end() != self.backend),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(source) => Err(KernelError::Unknown { path, source }),
        }
    }

    /// Gives the device another connection for the one that has ended, and returns the server's end. All that it
    /// waits for goes on once that is served. The kernel has to see first that the old one has ended, which it does by itself.
    pub fn reconnect(&self) -> Result<OwnedFd, KernelError> {
        let deadline = Instant::now() + DETACH_LIMIT;
        loop {
            if let Some(socket) = self.try_reconnect()? {
                return Ok(socket);
            }
            if Instant::now() >= deadline {
                return Err(KernelError::Connected { path: self.path.clone() });
            }
            sleep(RECONNECT_PERIOD);
        }
    }

    /// The same, if the kernel has seen that by now.
    pub fn try_reconnect(&self) -> Result<Option<OwnedFd>, KernelError> {
        let gone = || KernelError::Gone { path: self.path.clone() };
        let is_detached = lock(&self.is_detached);
        if *is_detached || self.look_whether_ended()? {
            return Err(gone());
        }
        let (ours, theirs) = sockets()?;
        match self.netlink.reconnect(self.number, &self.backend, theirs.as_fd()) {
            Err(error) if error.is_gone() => return Err(gone()),
            result => result?,
        }
        drop(theirs);
        // The kernel does not say whether it has taken it, but it is closed if it has not.
        Ok(if is_closed(&ours)? { None } else { Some(ours) })
    }

    /// Whether it needs no connection any more.
    pub fn is_over(&self) -> bool {
        *lock(&self.is_detached) || self.has_ended()
    }

    /// Disconnects the device. Requests under way fail: make sure that nobody uses it, by a `claim`
    /// on it (an exclusive open), which is let go once it is of no use to anybody: while anybody has
    /// it open, the driver keeps its connection.
    pub fn detach(&self, claim: Option<File>) -> Result<(), KernelError> {
        if self.has_ended() {
            return Ok(());
        }
        {
            let mut is_detached = lock(&self.is_detached);
            self.netlink.disconnect(self.number)?;
            *is_detached = true;
        }
        drop(claim);
        let deadline = Instant::now() + DETACH_LIMIT;
        while !self.has_ended() {
            if Instant::now() >= deadline {
                return Err(KernelError::Stuck { path: self.path.clone() });
            }
            sleep(LOOK_PERIOD);
        }
        self.unlimit();
        Ok(())
    }

    /// Tells a device that nobody has what requests it may make. It is for now, for the kernel waits with that until nothing is under way,
    /// and we can be what that waits for.
    fn limit(&self) -> Result<(), KernelError> {
        // To a request that is longer than what the server can answer with an error, it could only hang up.
        self.set("queue/max_sectors_kb", (DATA_BYTES >> 10) as u32)?;
        self.set("queue/io_timeout", LOOK_MS)
    }

    /// Leaves it to whoever has it next as it was.
    fn unlimit(&self) {
        // What they ask for themselves counts more.
        let _ = self.set("queue/io_timeout", LOOK_MS_DEFAULT);
    }

    fn set(&self, name: &str, limit: u32) -> Result<(), KernelError> {
        let path = attribute(&self.path, name);
        let written = std::fs::write(&path, limit.to_string());
        written.map_err(|source| KernelError::Limit { path, limit, source })
    }
}

/// Locks. Nobody panics with it.
fn lock(mutex: &Mutex<bool>) -> MutexGuard<'_, bool> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What no other device is known by.
fn new_id() -> Result<u64, KernelError> {
    let mut id = [0; 8];
    // So few bytes come at once, or not at all.
    let got = rustix::rand::getrandom(&mut id, GetRandomFlags::empty());
    got.map_err(|errno| KernelError::Random { source: errno.into() })?;
    Ok(u64::from_le_bytes(id))
}

/// Our end of a new connection, and the kernel's.
fn sockets() -> Result<(OwnedFd, OwnedFd), KernelError> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let pair = socketpair(family, kind, SocketFlags::CLOEXEC, None);
    pair.map_err(|errno| KernelError::Sockets { source: errno.into() })
}

/// Whether nobody has the other end any more.
fn is_closed(socket: &OwnedFd) -> Result<bool, KernelError> {
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        match poll(&mut fds, Some(&now)) {
            Ok(_) => return Ok(fds[0].revents().contains(PollFlags::HUP)),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(KernelError::Sockets { source: errno.into() }),
        }
    }
}

fn attribute(path: &str, name: &str) -> String {
    format!("/sys/block/{}/{name}", path.trim_start_matches("/dev/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hold;

    #[test]
    fn a_reserve_is_large_enough_and_not_boosted() {
        let home = tempfile::tempdir().unwrap();
        let vm = home.path().join("sys/vm");
        std::fs::create_dir_all(&vm).unwrap();
        let check = |free: &str, boost: Option<&str>, connections| {
            std::fs::write(vm.join("min_free_kbytes"), free).unwrap();
            let _ = std::fs::remove_file(vm.join("watermark_boost_factor"));
            if let Some(boost) = boost {
                std::fs::write(vm.join("watermark_boost_factor"), boost).unwrap();
            }
            check_reserve(home.path(), connections).map_err(|error| error.to_string())
        };
        check("8192\n", Some("0\n"), 2).unwrap();
        check("8192\n", None, 2).unwrap();
        let small = check("8191\n", Some("0\n"), 2).unwrap_err();
        assert!(small.contains("vm.min_free_kbytes=8192'"), "{small}");
        let boosted = check("67584\n", Some("15000\n"), 2).unwrap_err();
        assert!(boosted.contains("boost_factor=0 vm.min_free_kbytes=67584'"), "{boosted}");
        check("8192\n", Some("0\n"), 3).unwrap_err();
    }

    #[test]
    fn a_socket_whose_other_end_is_dropped_is_closed() {
        let (ours, theirs) = sockets().unwrap();
        assert!(!is_closed(&ours).unwrap());
        let kept = theirs.try_clone().unwrap();
        drop(theirs);
        assert!(!is_closed(&ours).unwrap(), "somebody has it still");
        drop(kept);
        // A child that another test starts has it for a moment.
        hold::take(|| is_closed(&ours).unwrap().then_some(()).ok_or(()), |()| true).unwrap();
    }
}
