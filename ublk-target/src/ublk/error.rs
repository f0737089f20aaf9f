//! Why a ublk device could not be made or removed.

use std::io;
use std::time::Duration;

use super::driver::DriverError;

/// Why a device could not be made or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The driver cannot be used.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The driver refused.
    #[error("cannot {step}: {reason}")]
    Refused {
        /// What was asked of it.
        step: &'static str,
        /// What it said, and what may help.
        reason: String,
        /// Whether it was for want of a privilege.
        denied: bool,
        /// The number of the error, if it has one.
        errno: Option<i32>,
    },
    /// The device is there for the kernel, but not in /dev.
    #[error("{path} did not appear: mount devtmpfs on /dev")]
    NoNode {
        /// Where it should be.
        path: String,
    },
    /// The driver does not answer.
    #[error(
        "the kernel's ublk driver did not {step} within {} s: look at `dmesg` for an oops in \
         ublk_drv; such a kernel must be rebooted and should be replaced", limit.as_secs()
    )]
    Stuck {
        /// What it was to do.
        step: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// No thread for it.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    /// There is no such device any more, or none that can be used.
    #[error("the device is gone")]
    Gone,
    /// The control thread panicked, and has said why.
    #[error("the device's control thread died: see the daemon's log")]
    Died,
}

/// What the driver's refusal means.
pub(super) fn refused(step: &'static str, error: io::Error) -> ServerError {
    let errno = error.raw_os_error();
    let help = match errno {
        Some(libc::EPERM | libc::EACCES) => ": run as root with CAP_SYS_ADMIN and CAP_IPC_LOCK",
        Some(libc::ENOMEM) => ": free some memory, or raise the limit of locked memory",
        Some(libc::EINVAL | libc::EOPNOTSUPP) => ": Linux 6.1 or newer is needed",
        Some(libc::ENOSPC | libc::EEXIST) => ": remove ublk devices that nobody serves any more",
        _ => "",
    };
    let denied = matches!(errno, Some(libc::EPERM | libc::EACCES));
    ServerError::Refused { step, reason: format!("{error}{help}"), denied, errno }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_helps() {
        let message = refused("add it", io::Error::from_raw_os_error(libc::EPERM)).to_string();
        assert!(message.contains("CAP_SYS_ADMIN"), "{message}");
    }
}
