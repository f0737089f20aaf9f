//! The machine as the doctor sees it: small text files below a root directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A machine, or a directory that looks like one.
pub struct Host {
    root: PathBuf,
}

impl Host {
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// A file's contents without white space at either end, if it can be read.
    pub fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path)).ok().map(|text| text.trim().to_owned())
    }

    /// A file that is not text.
    pub fn bytes(&self, path: &str) -> Option<Vec<u8>> {
        fs::read(self.root.join(path)).ok()
    }

    /// A file that is one number.
    pub fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.parse().ok()
    }

    pub fn exists(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    /// What stands first behind `key` on its line in `/proc/self/status`, `/proc/meminfo` and the
    /// like.
    pub fn field<T: FromStr>(&self, path: &str, key: &str) -> Option<T> {
        let text = self.read(path)?;
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse().ok()
    }

    /// The kernel's release, as `uname -r` says it.
    pub fn release(&self) -> Option<String> {
        self.read("proc/sys/kernel/osrelease")
    }

    /// True if this process has the capability of that number.
    pub fn can(&self, capability: Capability) -> bool {
        self.field::<String>("proc/self/status", "CapEff:")
            .and_then(|mask| u64::from_str_radix(&mask, 16).ok())
            .is_some_and(|mask| mask >> capability as u32 & 1 == 1)
    }
}

/// Capabilities that the daemon needs, by their numbers in the kernel's ABI.
#[derive(Clone, Copy)]
pub enum Capability {
    IpcLock = 14,
    SysAdmin = 21,
    SysNice = 23,
    SysResource = 24,
    Syslog = 34,
}
