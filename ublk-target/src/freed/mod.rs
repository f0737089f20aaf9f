//! Swap slots that the kernel has freed: which pages of our devices nobody will ask for again.
//!
//! The kernel tells that to no block device but zram; others hear of it when whole clusters are discarded, or never. So we look
//! on where it frees slots: a [`Plan`] is what this kernel needs for that, as it says itself, and a [`Probe`] is a program in
//! the kernel that marks freed slots of one swap area in a map that we share with it. Both are exact or not to be had:
//! [`FreedError`] says why not, and nothing but memory is lost without them.

mod bits;
#[allow(unsafe_code)]
mod bpf;
mod btf;
pub mod observer;
mod plan;
mod probe;
mod program;

use std::io;

pub use btf::BtfError;
pub use plan::Plan;
pub use probe::{Marks, Probe, observed};

/// Why we do not hear of freed swap slots.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreedError {
    /// This was not made for such a machine.
    #[error(
        "freed swap slots are not heard of on {what}: only on x86-64 and AArch64, with pages of 4 KiB"
    )]
    Unsupported {
        /// What it is.
        what: &'static str,
    },
    /// The kernel does not describe its types.
    #[error(
        "cannot read what the kernel says of its types, /sys/kernel/btf/vmlinux ({source}): it needs a kernel with \
         CONFIG_DEBUG_INFO_BTF"
    )]
    NoTypes {
        /// The system call's error.
        source: io::Error,
    },
    /// Its description cannot be read.
    #[error("cannot make out what the kernel says of its types, /sys/kernel/btf/vmlinux: {source}")]
    Types {
        /// What is wrong with it.
        source: BtfError,
    },
    /// It frees slots in no way that we know.
    #[error(
        "this kernel frees swap slots in no place where tmem knows to listen ({what}): discards of whole clusters are all it \
         tells (swapon --discard=pages)"
    )]
    NoHook {
        /// What is missing, or is not as expected.
        what: &'static str,
    },
    /// It has no kprobes.
    #[error(
        "the kernel lets nobody look in at its functions ({source} at {path}): it needs CONFIG_KPROBE_EVENTS",
        path = observer::KPROBE_TYPE
    )]
    NoProbes {
        /// The system call's error.
        source: io::Error,
    },
    /// We may not.
    #[error("may not {what} ({source}): it needs {needs}")]
    Denied {
        /// What was tried.
        what: &'static str,
        /// The capability that is missing.
        needs: &'static str,
        /// The system call's error.
        source: io::Error,
    },
    /// The kernel does not take a program of ours.
    #[error("the kernel does not take the program that {what} ({source}){}", colon(log))]
    Refused {
        /// What the program does.
        what: &'static str,
        /// The system call's error.
        source: io::Error,
        /// What it says of it at the end.
        log: String,
    },
    /// Anything else does not work.
    #[error("cannot {what}: {source}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// The system call's error.
        source: io::Error,
    },
}

impl FreedError {
    /// Of something that was tried, for which that capability is needed.
    fn of(what: &'static str, needs: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::Denied { what, needs, source },
            _ => Self::Failed { what, source },
        }
    }
}

fn colon(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!(": {log}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_capability_is_told_from_the_rest() {
        let of = |errno| FreedError::of("do it", "CAP_X", io::Error::from_raw_os_error(errno));
        for (errno, is_denied) in [(libc::EPERM, true), (libc::EACCES, true), (libc::EINVAL, false)]
        {
            assert_eq!(matches!(of(errno), FreedError::Denied { .. }), is_denied);
        }
        assert!(of(libc::EPERM).to_string().ends_with("it needs CAP_X"));
    }

    #[test]
    fn what_the_kernel_says_follows_where_it_says_anything() {
        let refused = |log: &str| FreedError::Refused {
            what: "marks freed slots",
            source: io::Error::from_raw_os_error(libc::EINVAL),
            log: log.into(),
        };
        assert!(refused("").to_string().ends_with(')'));
        assert!(refused("R1 is wrong").to_string().ends_with("): R1 is wrong"));
    }
}
