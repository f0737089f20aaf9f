//! Swap areas on our devices: made, switched on and off with util-linux, and who uses them.
//!
//! Nothing here removes a device or forces anything. Paths of the host are under a root, so that
//! tests bring a directory tree.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::program::{self, ProgramError};

/// Priority of our first swap: above swap on disks, whose default is negative.
const PRIORITY: i32 = 100;

/// Why a swap area could not be switched on or off, or its users not be found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwapError {
    /// One of util-linux's programs did not do it.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file of the host that tells who uses a device could not be read.
    #[error("cannot read {path} ({source}): without it nobody knows who uses the device")]
    Read {
        /// The file.
        path: String,
        /// The error.
        source: io::Error,
    },
}

/// Who uses a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum User {
    /// Another block device is built on it.
    Holder(String),
    /// A file system on it is mounted here.
    Mount(String),
    /// The kernel swaps to it.
    Swap,
    /// Somebody that the host does not name has it open exclusively.
    Unknown,
}

impl User {
    /// Says who uses `path` and what to do about it.
    pub fn explain<'a>(&'a self, path: &'a str) -> impl fmt::Display + 'a {
        fmt::from_fn(move |f| match self {
            User::Holder(name) => {
                write!(f, "{path} is part of {name}: remove {name} first (see lsblk {path})")
            }
            User::Mount(point) => write!(f, "{path} is mounted: `umount {point}` first"),
            User::Swap => write!(f, "{path} is in use as swap: `swapoff {path}` first"),
            User::Unknown => {
                write!(f, "{path} is held open by another program: see `fuser -v {path}`")
            }
        })
    }
}

/// The host's files, and its util-linux.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { root: "/".into() }
    }
}

impl Host {
    /// True if the kernel swaps to `path`.
    pub fn is_swap(&self, path: &str) -> Result<bool, SwapError> {
        Ok(self.priority(path)?.is_some())
    }

    /// The priority of swap on `path`, if the kernel swaps to it.
    pub fn priority(&self, path: &str) -> Result<Option<i32>, SwapError> {
        Ok(self.entry(path)?.map(|(_, priority)| priority))
    }

    /// How much is swapped to `path`, in bytes, if the kernel swaps to it.
    pub fn swapped(&self, path: &str) -> Result<Option<u64>, SwapError> {
        Ok(self.entry(path)?.map(|(used, _)| used))
    }

    /// How much is swapped to `path`, in bytes, and its priority.
    fn entry(&self, path: &str) -> Result<Option<(u64, i32)>, SwapError> {
        let swaps = self.read("proc/swaps")?;
        Ok(swaps.lines().skip(1).find_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let is_it = fields.next().map(unescape).as_deref() == Some(Path::new(path));
            let priority = fields.next_back()?.parse().ok();
            let used: u64 = fields.next_back()?.parse().ok()?;
            is_it.then_some((used << 10, priority?))
        }))
    }

    /// Who uses the block device at `path`, as far as the host says.
    pub fn user(&self, path: &str) -> Result<Option<User>, SwapError> {
        if self.is_swap(path)? {
            return Ok(Some(User::Swap));
        }
        if let Some(point) = self.mount_point(path)? {
            return Ok(Some(User::Mount(point)));
        }
        let name = path.trim_start_matches("/dev/");
        let holders = self.root.join("sys/block").join(name).join("holders");
        match fs::read_dir(&holders).and_then(|mut entries| entries.next().transpose()) {
            Ok(first) => {
                Ok(first.map(|entry| User::Holder(entry.file_name().to_string_lossy().into())))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(SwapError::Read { path: holders.display().to_string(), source }),
        }
    }

    /// Where a file system on `path` is mounted. Asks for init's mounts: our own namespace may be
    /// another.
    fn mount_point(&self, path: &str) -> Result<Option<String>, SwapError> {
        let name = path.trim_start_matches("/dev/");
        let number = self.read(&format!("sys/block/{name}/dev")).ok();
        let number = number.as_deref().map(str::trim);
        let mounts = self.read("proc/1/mountinfo")?;
        Ok(mounts.lines().find_map(|line| {
            let (head, tail) = line.split_once(" - ")?;
            let mut fields = head.split(' ').skip(2);
            let device = fields.next();
            let point = fields.nth(1)?;
            let source = tail.split(' ').nth(1).map(unescape);
            // Some file systems have a number of their own, and some a source of their own.
            let ours = device == number || source.as_deref() == Some(Path::new(path));
            ours.then(|| unescape(point).to_string_lossy().into_owned())
        }))
    }

    fn read(&self, file: &str) -> Result<String, SwapError> {
        let path = self.root.join(file);
        fs::read_to_string(&path)
            .map_err(|source| SwapError::Read { path: path.display().to_string(), source })
    }
}

/// Takes the device at `path` for ourselves: while the file is open nobody can mount it or swap to
/// it. Finds users in other mount namespaces too.
pub fn claim(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path)
}

/// Makes a swap area on `path` and switches it on, telling the kernel to discard what it frees: that is
/// the only way in which we learn of it. `others` are the priorities of our other swap.
pub fn swap_on(path: &str, others: impl Iterator<Item = i32>) -> Result<(), SwapError> {
    program::run("mkswap", [path], path)?;
    let priority = below(others).to_string();
    Ok(program::run("swapon", ["--priority", &priority, "--discard=pages", path], path)?)
}

/// A priority below all of these. The kernel fills what has a higher one first, and places there that it
/// has freed before it goes on to the next: they are written over, which frees what we hold for
/// them. With the same priority it would use all in turn, and leave such places wherever they are
/// until it has no cluster left that is wholly free.
fn below(others: impl Iterator<Item = i32>) -> i32 {
    others.min().map_or(PRIORITY, |lowest| (lowest - 1).max(1))
}

/// Switches swap on `path` off; takes as long as it takes to read all of it back.
pub fn swap_off(path: &str) -> Result<(), SwapError> {
    Ok(program::run("swapoff", [path], path)?)
}

/// Undoes the kernel's octal escapes of blanks and backslashes in file names.
fn unescape(name: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|_| first == b'\\');
        let code = digits.and_then(|digits| str::from_utf8(digits).ok());
        match code.and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/dev/ublkb0";
    const NO_SWAPS: &str = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";

    /// A host of which the test writes the files, removed at the end.
    struct Tree(Host);

    impl Tree {
        fn new(name: &str, swaps: &str, mounts: &str) -> Self {
            let pid = std::process::id();
            let root = std::env::temp_dir().join(format!("tmem-swap-{name}-{pid}"));
            let tree = Self(Host { root });
            tree.write("proc/swaps", swaps);
            tree.write("proc/1/mountinfo", mounts);
            tree.write("sys/block/ublkb0/dev", "259:3\n");
            fs::create_dir_all(tree.0.root.join("sys/block/ublkb0/holders")).unwrap();
            tree
        }

        fn write(&self, file: &str, text: &str) {
            let path = self.0.root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0.root).unwrap();
        }
    }

    #[test]
    fn a_device_in_use_as_swap_is_told_from_its_neighbours() {
        let swaps = format!(
            "{NO_SWAPS}/swap\\040file  file 1 0 -2\n/dev/ublkb01  partition 1 0 5\n\
             /dev/ublkb0                             partition\t65532\t\t48\t\t100\n"
        );
        let tree = Tree::new("swap", &swaps, "");
        assert_eq!(tree.0.user(PATH).unwrap(), Some(User::Swap));
        assert!(tree.0.is_swap("/swap file").unwrap());
        assert!(!tree.0.is_swap("/dev/ublkb").unwrap());
        let priorities =
            [PATH, "/swap file", "/dev/ublkb"].map(|path| tree.0.priority(path).unwrap());
        assert_eq!(priorities, [Some(100), Some(-2), None]);
        let swapped = [PATH, "/swap file", "/dev/ublkb"].map(|path| tree.0.swapped(path).unwrap());
        assert_eq!(swapped, [Some(48 << 10), Some(0), None]);
        let message = User::Swap.explain(PATH).to_string();
        assert!(message.contains("`swapoff /dev/ublkb0`"), "{message}");
    }

    #[test]
    fn a_mounted_device_is_found_by_number_and_by_name() {
        let by_number = "36 25 259:3 / /mnt/a\\040b rw shared:1 - ext4 /dev/root rw\n";
        let tree = Tree::new("number", NO_SWAPS, by_number);
        assert_eq!(tree.0.user(PATH).unwrap(), Some(User::Mount("/mnt/a b".into())));
        let by_name =
            "25 1 8:1 / / rw - ext4 /dev/sda1 rw\n36 25 0:40 / /mnt rw - btrfs /dev/ublkb0 rw\n";
        let tree = Tree::new("name", NO_SWAPS, by_name);
        assert_eq!(tree.0.user(PATH).unwrap(), Some(User::Mount("/mnt".into())));
    }

    #[test]
    fn a_device_under_another_is_found() {
        let tree = Tree::new("holder", NO_SWAPS, "25 1 8:1 / / rw - ext4 /dev/sda1 rw\n");
        assert_eq!(tree.0.user(PATH).unwrap(), None);
        tree.write("sys/block/ublkb0/holders/dm-4", "");
        assert_eq!(tree.0.user(PATH).unwrap(), Some(User::Holder("dm-4".into())));
    }

    #[test]
    fn later_devices_are_filled_later_and_before_disks() {
        assert_eq!(below([].into_iter()), 100);
        assert_eq!(below([100, 98].into_iter()), 97);
        // One that was removed leaves its priority to nobody.
        assert_eq!(below([99].into_iter()), 98);
        assert_eq!([1, -2].map(|lowest| below([100, lowest].into_iter())), [1, 1]);
    }

    #[test]
    fn not_knowing_is_an_error() {
        let host = Host { root: "/nonexistent".into() };
        assert!(matches!(host.user(PATH), Err(SwapError::Read { .. })));
    }
}
