//! Finds the kernel's ublk driver, loads it once if it is not there, and says what is missing.

use std::fs::OpenOptions;
use std::io;

use io_uring::IoUring;

use crate::module;

/// Where the driver takes orders.
const CONTROL: &str = "/dev/ublk-control";

/// Why the driver cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The kernel has no such driver, or it cannot be loaded.
    #[error(
        "the kernel's ublk driver is not there and `modprobe ublk_drv` did not help ({reason}): \
         install the kernel's modules package, or use a kernel (6.1 or newer) with \
         CONFIG_BLK_DEV_UBLK"
    )]
    Missing {
        /// What modprobe said.
        reason: String,
    },
    /// The driver is there but not for us.
    #[error("cannot open {CONTROL} ({source}): run as root with CAP_SYS_ADMIN")]
    Denied {
        /// The system call's error.
        source: io::Error,
    },
    /// The driver is there and does not answer.
    #[error("cannot open {CONTROL}: {source}")]
    Open {
        /// The system call's error.
        source: io::Error,
    },
    /// The driver is of a kernel that crashes in it.
    #[error("this kernel ({release}) {how}: boot another kernel")]
    Broken {
        /// The kernel's release.
        release: String,
        /// What it does.
        how: &'static str,
    },
    /// The driver takes its commands through io_uring only.
    #[error("io_uring cannot be used ({source}): {}", ring_advice(source))]
    Ring {
        /// The system call's error.
        source: io::Error,
    },
}

/// Makes sure that the driver is there and may be used. Runs `modprobe` if it is not there.
pub fn ensure() -> Result<(), DriverError> {
    module::ensure("ublk_drv", CONTROL).map_err(|reason| DriverError::Missing { reason })?;
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    if let Some(how) = broken(&release) {
        return Err(DriverError::Broken { release, how });
    }
    IoUring::new(1).map_err(|source| DriverError::Ring { source })?;
    match OpenOptions::new().read(true).write(true).open(CONTROL) {
        Ok(_) => Ok(()),
        Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
            Err(DriverError::Denied { source })
        }
        Err(source) => Err(DriverError::Open { source }),
    }
}

/// Why a kernel release that has ublk cannot be used, if it is known that it cannot.
pub fn broken(release: &str) -> Option<&'static str> {
    let upstream = release.split(['-', '+']).next();
    let ubuntu_aws = release.starts_with("6.17.") && release.ends_with("-aws");
    (upstream == Some("6.18.4") || ubuntu_aws)
        .then_some("is known to crash when a ublk device is added")
}

/// What to do where io_uring cannot be used.
pub fn ring_advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            "run 'sysctl kernel.io_uring_disabled=1', which leaves it to root, and allow it in the \
             service's system call filter"
        }
        io::ErrorKind::Unsupported => "use a kernel with CONFIG_IO_URING",
        _ => "free some memory, or raise the limit of locked memory",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_broken_kernels() {
        for release in ["6.18.4", "6.18.4-zabbly+", "6.17.0-1007-aws"] {
            assert!(broken(release).is_some(), "{release}");
        }
        for release in ["6.18.40", "6.18.5", "6.17.0-14-generic", "6.12.4-aws"] {
            assert!(broken(release).is_none(), "{release}");
        }
    }

    #[test]
    fn what_to_do_about_io_uring_depends_on_what_is_wrong() {
        let advice = |errno| ring_advice(&io::Error::from_raw_os_error(errno));
        assert!(advice(libc::EPERM).contains("io_uring_disabled"));
        assert!(advice(libc::ENOSYS).contains("CONFIG_IO_URING"));
    }

    /// On a machine without the driver the message says how to get it.
    #[test]
    fn a_missing_driver_is_explained() {
        match ensure() {
            Err(error @ DriverError::Missing { .. }) => {
                assert!(error.to_string().contains("modprobe ublk_drv"), "{error}");
            }
            _ => eprintln!("SKIPPED: this machine has the ublk driver"),
        }
    }
}
