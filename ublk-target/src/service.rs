//! Where the user's side meets the daemon: how it is started, asked and stopped, and which exit
//! code each of its errors is.

use tmem::{BackingError, ConfigError, PoolError, WritebackSettings};

use crate::backing::{BackingInfo, BackingSpec, WritebackChange};
use crate::config::RunConfig;
use crate::control::Operations;
use crate::daemon::{Daemon, DaemonError, DaemonStats, DeviceInfo};
use crate::exit::{Exit, Failure};
use crate::log::log;
use crate::nbd::{KernelError, NbdServerError};
use crate::process::{self, Mounts, ProcessError};
use crate::ublk::{self, DriverError, ServerError};
use crate::watchdog::{Pulse, Watched};
use crate::worker::{Service, Start};

/// Starts the daemon of a worker, without devices yet. Call it before any thread is started.
pub fn start(start: Start) -> Result<Daemon, Failure> {
    let daemon = Daemon::start(start.config, start.nbd, start.store)?;
    for warning in daemon.warnings() {
        log(format_args!("going on without a guard: {warning}"));
    }
    for path in ublk::forlorn() {
        log(format_args!(
            "{path} has no server any more: if it was tmem's, all processes of a tmem died at once. Whoever reads it or swaps to \
             it waits until 'tmem recover' with that one's --control goes on; if it finds nothing, what was on it is lost, and \
             who waits for it needs a reboot"
        ));
    }
    Ok(daemon)
}

/// Makes this process fit to look after a worker.
pub fn harden(config: &RunConfig, mounts: Mounts) -> Result<(), Failure> {
    // What could not be had, the worker says.
    let _ = process::prepare(config.best_effort, mounts).map_err(DaemonError::from)?;
    Ok(())
}

impl Operations for Daemon {
    fn add_swap(&self, name: Option<&str>, bytes: u64) -> Result<DeviceInfo, Failure> {
        Ok(self.add_swap(name, bytes)?)
    }

    fn del(&self, name: &str) -> Result<(), Failure> {
        Ok(self.del(name)?)
    }

    fn list(&self) -> Vec<DeviceInfo> {
        self.list()
    }

    fn stats(&self) -> DaemonStats {
        self.stats()
    }

    fn set_pool_limit(&self, bytes: u64) -> Result<u64, Failure> {
        Ok(self.set_pool_limit(bytes)?)
    }

    fn set_backing(&self, spec: &BackingSpec) -> Result<BackingInfo, Failure> {
        Ok(self.set_backing(spec)?)
    }

    fn set_writeback(&self, change: WritebackChange) -> Result<WritebackSettings, Failure> {
        Ok(self.set_writeback(change)?)
    }
}

impl Service for Daemon {
    fn shutdown(&self) -> Result<(), Failure> {
        Ok(self.shutdown()?)
    }

    fn watch(&self, watcher: Box<dyn Fn() + Send + Sync>) {
        self.watch(watcher);
    }

    fn ended(&self) {
        self.ended();
    }

    fn swapped(&self) -> u64 {
        self.swapped()
    }
}

impl Watched for Daemon {
    fn pulses(&self) -> Vec<Pulse> {
        self.pulses()
    }

    fn reads_from_disk(&self) -> bool {
        self.reads_from_disk()
    }
}

impl From<DaemonError> for Failure {
    fn from(error: DaemonError) -> Self {
        let error = match error {
            DaemonError::Backing(error) => return error.into(),
            DaemonError::Writeback(error) => return error.into(),
            error => error,
        };
        let code = match &error {
            DaemonError::BadName { .. } => Exit::Usage,
            DaemonError::Clients { .. } | DaemonError::InUse { .. } => Exit::InUse,
            DaemonError::NameTaken { .. } => Exit::NameTaken,
            DaemonError::NoDevice { .. } => Exit::NotFound,
            DaemonError::SizeOutOfBounds { .. } | DaemonError::SizeNotPages { .. } => Exit::Size,
            DaemonError::Engine(
                ConfigError::LimitBelowReserve { .. } | ConfigError::LimitAboveMaximum { .. },
            )
            | DaemonError::Attach(BackingError::NoRoom { .. } | BackingError::Size { .. })
            | DaemonError::Pool(PoolError::NoRoom { .. } | PoolError::Size { .. }) => Exit::Size,
            DaemonError::Nbd(NbdServerError::Urgent { .. })
            | DaemonError::Process(
                ProcessError::IoFlusher { .. }
                | ProcessError::LockMemory { .. }
                | ProcessError::MountNamespace { .. }
                | ProcessError::OomScore { .. },
            )
            | DaemonError::Server(
                ServerError::Driver(DriverError::Denied { .. })
                | ServerError::Refused { denied: true, .. },
            ) => Exit::Permission,
            DaemonError::Server(ServerError::Driver(_)) => Exit::NoUblk,
            DaemonError::Kernel(KernelError::Netlink(error)) if error.is_denied() => {
                Exit::Permission
            }
            DaemonError::Kernel(KernelError::Missing { .. } | KernelError::Netlink(_)) => {
                Exit::NoNbd
            }
            _ => Exit::Failure,
        };
        Failure::new(code, error)
    }
}

#[cfg(test)]
mod tests {
    use tmem::SettingsError;

    use super::*;
    use crate::backing::{BackingFileError, Refusal};
    use crate::swap::User;

    #[test]
    fn errors_have_the_documented_codes() {
        let name = || "a".to_owned();
        let path = "/dev/ublkb0".to_owned();
        let source = std::io::ErrorKind::PermissionDenied.into();
        let backing = |refusal| BackingFileError { path: "/a".into(), refusal };
        for (error, code) in [
            (DaemonError::NoDevice { name: name() }, Exit::NotFound),
            (DaemonError::NameTaken { name: name() }, Exit::NameTaken),
            (DaemonError::SizeNotPages { bytes: 5 }, Exit::Size),
            (DaemonError::InUse { path, user: User::Swap }, Exit::InUse),
            (ConfigError::LimitAboveMaximum { limit: 2, maximum: 1 }.into(), Exit::Size),
            (ProcessError::IoFlusher { source }.into(), Exit::Permission),
            (ServerError::from(DriverError::Missing { reason: name() }).into(), Exit::NoUblk),
            (PoolError::NoRoom { bytes: 2, limit: 1 }.into(), Exit::Size),
            (ServerError::Died.into(), Exit::Failure),
            (DaemonError::Clients { name: name(), connections: 2 }, Exit::InUse),
            (KernelError::Missing { reason: name() }.into(), Exit::NoNbd),
            (KernelError::NoDevice.into(), Exit::Failure),
            (SettingsError::Age.into(), Exit::Size),
            (backing(Refusal::Locked).into(), Exit::InUse),
            (backing(Refusal::Absent).into(), Exit::Usage),
            (backing(Refusal::Size { bytes: 1 }).into(), Exit::Size),
        ] {
            let failure = Failure::from(error);
            assert_eq!(failure.code, code, "{failure}");
        }
    }
}
