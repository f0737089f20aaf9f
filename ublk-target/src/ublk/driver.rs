//! Finds the kernel's ublk driver, loads it once if it is not there, and says what is missing.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

/// Where the driver takes orders.
const CONTROL: &str = "/dev/ublk-control";

/// How often to look for [`CONTROL`] after the module is loaded, and how long to wait between.
const LOOKS: u32 = 20;
const LOOK_PERIOD: Duration = Duration::from_millis(50);

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
}

/// Makes sure that the driver is there and may be used. Runs `modprobe` if it is not there.
pub fn ensure() -> Result<(), DriverError> {
    if !Path::new(CONTROL).exists() {
        load()?;
    }
    match OpenOptions::new().read(true).write(true).open(CONTROL) {
        Ok(_) => Ok(()),
        Err(source) => Err(DriverError::Denied { source }),
    }
}

fn load() -> Result<(), DriverError> {
    let reason = match Command::new("modprobe").arg("ublk_drv").output() {
        Ok(output) if output.status.success() => format!("{CONTROL} did not appear"),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    for _ in 0..LOOKS {
        if Path::new(CONTROL).exists() {
            return Ok(());
        }
        sleep(LOOK_PERIOD);
    }
    Err(DriverError::Missing { reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine without the driver the message says how to get it.
    #[test]
    fn a_missing_driver_is_explained() {
        match ensure() {
            Ok(()) | Err(DriverError::Denied { .. }) => {
                eprintln!("SKIPPED: this machine has the ublk driver");
            }
            Err(error) => assert!(error.to_string().contains("modprobe ublk_drv"), "{error}"),
        }
    }
}
