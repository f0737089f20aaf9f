//! The kernel's own NBD client on one of our exports: how a kernel without ublk gets a block device.
//!
//! `nbd-client` makes the connections, hands them to the kernel and ends; from then on nobody stands
//! between the kernel and us. Requests have no time limit that matters: a daemon that is stopped for
//! a while is late, and not dead.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::address::NbdAddress;
use super::buffer::DATA_BYTES;
use crate::module;
use crate::program::{self, ProgramError};

/// Devices that are looked at for a free one: the driver makes 16 unless told otherwise.
const DEVICES_MAX: u32 = 256;

/// Requests that the driver has under way on one connection.
pub const CONNECTION_DEPTH: u32 = 128;

/// The reserve that a connection needs, in bytes: twice what both its sockets hold, because the workers
/// get half; each skb takes up to twice what is in it; and as much again for what else is allocated
/// meanwhile.
const RESERVE_PER_CONNECTION: u64 = 4 << 20;

/// Time limit of a request, in seconds. To the driver 0 means none only while there is one connection:
/// of several it drops the one on which a request takes longer than the 30 s that are then in force,
/// and fails the I/O when none is left (`nbd_xmit_timeout`). So it is eleven days, which as
/// milliseconds fits 31 bits, whatever the kernel's tick.
const TIMEOUT_SECONDS: u32 = 1_000_000;

/// How long the kernel may take to let go of its connections, and how often to look.
const DETACH_LIMIT: Duration = Duration::from_secs(10);
const LOOK_PERIOD: Duration = Duration::from_millis(20);

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
    /// `nbd-client` did not do it.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The device did not get the size that it should have.
    #[error("{path} did not become a device of {bytes} bytes: look into the kernel's log")]
    NotReady {
        /// The device.
        path: String,
        /// The size that it should have.
        bytes: u64,
    },
    /// The device could not be told how long its requests may be.
    #[error("cannot write {limit} to {path}: {source}")]
    Limit {
        /// The attribute.
        path: String,
        /// The length, in KiB.
        limit: usize,
        /// The system call's error.
        source: io::Error,
    },
    /// The kernel was told to let go and did not.
    #[error("{path} did not let go of its connections in {DETACH_LIMIT:?}: try again")]
    Stuck {
        /// The device.
        path: String,
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

/// A `/dev/nbdN` that is connected to an export.
#[derive(Debug)]
pub struct KernelClient {
    path: String,
    connections: u16,
    /// What the driver shows for as long as the connections are those that we asked for.
    owner: Option<String>,
}

impl KernelClient {
    /// Connects a free device with so many connections to the export `name` of `bytes` bytes.
    pub fn attach(
        address: &NbdAddress,
        name: &str,
        bytes: u64,
        connections: u16,
    ) -> Result<Self, KernelError> {
        module::ensure("nbd", "/dev/nbd0").map_err(|reason| KernelError::Missing { reason })?;
        let mut failed = None;
        for number in 0..DEVICES_MAX {
            let path = format!("/dev/nbd{number}");
            if !Path::new(&path).exists() {
                break;
            }
            if owner(&path).is_some() {
                continue;
            }
            match program::run("nbd-client", arguments(address, name, &path, connections), &path) {
                Ok(()) => {
                    let client = Self { owner: owner(&path), path, connections };
                    return client.set_up(bytes);
                }
                Err(error @ ProgramError::Failed { pid, .. }) => match owner(&path) {
                    None => return Err(error.into()),
                    // It had done it before it failed.
                    Some(owner) if owner.trim() == pid.to_string() => {
                        Self { path, connections, owner: Some(owner) }.detach(None)?;
                        return Err(error.into());
                    }
                    // Somebody else took the device in this moment.
                    Some(_) => failed = Some(error),
                },
                Err(error) => return Err(error.into()),
            }
        }
        Err(failed.map_or(KernelError::NoDevice, KernelError::from))
    }

    /// The device's node.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Its connections.
    pub fn connections(&self) -> u16 {
        self.connections
    }

    /// Whether somebody else has disconnected it.
    pub fn has_ended(&self) -> bool {
        self.owner.is_none() || owner(&self.path) != self.owner
    }

    /// Disconnects the device. Requests under way fail: make sure that nobody uses it, by a `claim`
    /// on it (an exclusive open), which is let go once it is of no use to anybody: while anybody has
    /// it open, the driver keeps its connections.
    pub fn detach(&self, claim: Option<File>) -> Result<(), KernelError> {
        if self.has_ended() {
            return Ok(());
        }
        program::run("nbd-client", ["-d", &self.path], &self.path)?;
        drop(claim);
        let deadline = Instant::now() + DETACH_LIMIT;
        while !self.has_ended() {
            if Instant::now() >= deadline {
                return Err(KernelError::Stuck { path: self.path.clone() });
            }
            sleep(LOOK_PERIOD);
        }
        Ok(())
    }

    /// Waits until the device has its size, and sees to it that no request is longer than what the
    /// server can answer with an error: to a longer one it can only hang up, and the driver has no
    /// other use for a connection that ends than to let its requests wait for their time limit.
    fn set_up(self, bytes: u64) -> Result<Self, KernelError> {
        let deadline = Instant::now() + DETACH_LIMIT;
        let size = attribute(&self.path, "size");
        let is_ready = || {
            let sectors = std::fs::read_to_string(&size).ok()?.trim().parse::<u64>().ok()?;
            (sectors * 512 == bytes).then_some(())
        };
        while is_ready().is_none() {
            if Instant::now() >= deadline {
                let error = KernelError::NotReady { path: self.path.clone(), bytes };
                // It is not what it should be, whether or not it can be disconnected.
                let _ = self.detach(None);
                return Err(error);
            }
            sleep(LOOK_PERIOD);
        }
        let attribute = attribute(&self.path, "queue/max_sectors_kb");
        let limit = DATA_BYTES >> 10;
        match std::fs::write(&attribute, limit.to_string()) {
            Ok(()) => Ok(self),
            Err(source) => {
                // What it is told here is what matters.
                let _ = self.detach(None);
                Err(KernelError::Limit { path: attribute, limit, source })
            }
        }
    }
}

fn arguments(address: &NbdAddress, name: &str, path: &str, connections: u16) -> Vec<OsString> {
    let connections = connections.to_string();
    let mut arguments = vec![OsString::from("-unix"), address.path().into()];
    let timeout = TIMEOUT_SECONDS.to_string();
    let rest = [path, "-N", name, "-b", "4096", "-C", &connections, "-timeout", &timeout];
    arguments.extend(rest.map(OsString::from));
    arguments
}

/// The process that connected a device, which the driver shows for as long as it is connected.
fn owner(path: &str) -> Option<String> {
    std::fs::read_to_string(attribute(path, "pid")).ok()
}

fn attribute(path: &str, name: &str) -> String {
    format!("/sys/block/{}/{name}", path.trim_start_matches("/dev/"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn the_client_is_told_everything_that_matters() {
        let address = "unix:/run/a b".parse().unwrap();
        let arguments = arguments(&address, "swap0", "/dev/nbd3", 4);
        let text: Vec<_> = arguments.iter().map(|argument| argument.to_str().unwrap()).collect();
        let expected = "-unix|/run/a b|/dev/nbd3|-N|swap0|-b|4096|-C|4|-timeout|1000000";
        assert_eq!(text.join("|"), expected);
    }
}
