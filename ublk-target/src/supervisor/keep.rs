//! The name of a store: by it a daemon's pages outlive all of its processes, and `tmem recover` finds them again.
//!
//! ```text
//! SOCKET.pages/            a tmpfs without swap, mounted beside the control socket
//!              store       the store
//!              mounts-0    a mount namespace in which swap was switched on: the kernel knows the name of swap as long
//!              mounts-1    as there is that
//! ```
//!
//! It is mounted in the namespace that the daemon was started in, and taken away by whoever ends the daemon, which is in
//! another: when a file or directory is removed, the kernel detaches what others have mounted on it.
//!
//! One supervisor at a time has the directory's lock, and nobody else. Of a service systemd keeps the store
//! ([`super::estate`]), and then it has no name.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock, fstat, openat, statat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
use tmem::Store;

use crate::{hold, process};

/// The store's name in its directory.
const NAME: &str = "store";

/// So many mount namespaces are kept.
const MOUNTS_MAX: usize = 8;

/// See the module's description.
pub struct Keep {
    directory: PathBuf,
    /// The directory, with its lock.
    guard: OwnedFd,
    /// The mount namespace that it is mounted in; none in a process that needs it no more.
    home: Option<OwnedFd>,
}

impl Keep {
    /// Makes an empty store beside this control socket, of which the caller has the lock, in the place of any that is there.
    pub fn make(control: &Path) -> io::Result<(Self, Store)> {
        let directory = directory(control);
        if let Some(left) = open(&directory)? {
            clear(&directory, left.as_fd());
        }
        DirBuilder::new().mode(0o700).create(&directory)?;
        let mount = || {
            let store = Store::mounted(&directory, NAME)?;
            // For what is bound there, which must not be in the namespace that it is.
            mount_change(&directory, MountPropagationFlags::PRIVATE)?;
            let guard = open(&directory)?.ok_or(io::ErrorKind::NotFound)?;
            flock(&guard, FlockOperation::NonBlockingLockExclusive)?;
            Ok((store, guard, own_namespace()?))
        };
        let made = mount().inspect_err(|_: &io::Error| {
            let _ = unmount(&directory, UnmountFlags::DETACH);
            let _ = fs::remove_dir(&directory);
        });
        let (store, guard, home) = made?;
        Ok((Self { directory, guard, home: Some(home) }, store))
    }

    /// The store that is beside this control socket, if there is one that is ours.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if another supervisor has it.
    pub fn left(control: &Path) -> io::Result<Option<(Self, OwnedFd)>> {
        let directory = directory(control);
        let Some(guard) = open(&directory)? else { return Ok(None) };
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let store = match openat(&guard, NAME, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            store => store?,
        };
        check_owner(&store)?;
        let lock = || flock(&guard, FlockOperation::NonBlockingLockExclusive);
        hold::take(lock, |error| *error == Errno::WOULDBLOCK)?;
        let home = Some(own_namespace()?);
        Ok(Some((Self { directory, guard, home }, store)))
    }

    /// That of another program's supervisor, whose place we have taken.
    pub fn inherited(control: &Path, guard: OwnedFd) -> Self {
        Self { directory: directory(control), guard, home: None }
    }

    /// What [`Keep::inherited`] needs.
    pub fn guard(&self) -> BorrowedFd<'_> {
        self.guard.as_fd()
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Keeps a mount namespace; that of this process, in which the directory is another mount.
    pub fn keep_mounts(&self, namespace: BorrowedFd<'_>) -> io::Result<()> {
        let Some(home) = &self.home else { return Ok(()) };
        let number = self.mounts().len();
        if number == MOUNTS_MAX {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let place = self.directory.join(mounts_name(number));
        process::in_mount_namespace(home.as_fd(), || {
            File::create(&place)?;
            Ok(mount_bind(format!("/proc/self/fd/{}", namespace.as_raw_fd()), &place)?)
        })
    }

    /// The mount namespaces that are kept.
    pub fn mounts(&self) -> Vec<OwnedFd> {
        let open = |number| {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = openat(&self.guard, mounts_name(number), flags, Mode::empty()).ok()?;
            let is_bound = fstat(&file).ok()?.st_dev != fstat(&self.guard).ok()?.st_dev;
            is_bound.then_some(file)
        };
        (0..MOUNTS_MAX).map_while(open).collect()
    }

    /// Takes it away. Nothing need be there any more.
    pub fn remove(&self) {
        clear(&self.directory, self.guard());
    }
}

/// Takes a store's name away, if it has one beside this control socket.
pub fn forget(control: &Path, store: BorrowedFd<'_>) {
    let directory = directory(control);
    let Ok(Some(root)) = open(&directory) else { return };
    let named = statat(&root, NAME, AtFlags::SYMLINK_NOFOLLOW);
    let named = named.map(|stat| (stat.st_dev, stat.st_ino));
    if named.is_ok() && named == fstat(store).map(|stat| (stat.st_dev, stat.st_ino)) {
        clear(&directory, root.as_fd());
    }
}

/// Removes all that is in a keep, and it. What cannot be removed is not there, or in nobody's way.
fn clear(directory: &Path, root: BorrowedFd<'_>) {
    // Also where something has the mount yet, the memory is to go with the processes.
    let _ = unlinkat(root, NAME, AtFlags::empty());
    for number in 0..MOUNTS_MAX {
        let _ = unlinkat(root, mounts_name(number), AtFlags::empty());
    }
    let _ = unmount(directory, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    let _ = fs::remove_dir(directory);
}

/// The directory at this path, if there is one; an error if it is not ours.
fn open(directory: &Path) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags, Mode::empty()) {
        Err(Errno::NOENT) => Ok(None),
        opened => {
            let opened = opened?;
            check_owner(&opened)?;
            Ok(Some(opened))
        }
    }
}

/// What others have made is not to be trusted.
fn check_owner(file: &OwnedFd) -> io::Result<()> {
    match fstat(file)?.st_uid == rustix::process::geteuid().as_raw() {
        true => Ok(()),
        false => {
            let error = "it belongs to somebody else";
            Err(io::Error::new(io::ErrorKind::PermissionDenied, error))
        }
    }
}

fn own_namespace() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/self/ns/mnt")?.into())
}

fn mounts_name(number: usize) -> String {
    format!("mounts-{number}")
}

fn directory(control: &Path) -> PathBuf {
    let mut path = control.as_os_str().to_owned();
    path.push(".pages");
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// None where nobody may mount, and then nothing is left behind.
    fn make(control: &Path) -> Option<(Keep, Store)> {
        match Keep::make(control) {
            Ok(made) => Some(made),
            Err(error) => {
                let reasons = [libc::EPERM, libc::EINVAL, libc::ENOSYS, libc::ENODEV];
                assert!(reasons.contains(&error.raw_os_error().unwrap()), "{error}");
                assert!(!directory(control).exists());
                eprintln!("nothing is tested: {error}");
                None
            }
        }
    }

    #[test]
    fn a_store_is_found_by_its_name_until_that_is_taken_away() {
        let home = tempfile::tempdir().unwrap();
        let control = home.path().join("control.sock");
        assert!(Keep::left(&control).unwrap().is_none());
        let Some((keep, store)) = make(&control) else { return };
        store.set_notes(b"a note").unwrap();
        drop(store);
        let error = Keep::left(&control).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "another has it");
        drop(keep);
        let (keep, file) = Keep::left(&control).unwrap().unwrap();
        assert_eq!(Store::from_file(file).unwrap().notes().unwrap(), b"a note");
        // The place of one that nobody goes on with is free.
        drop(keep);
        let (keep, store) = make(&control).unwrap();
        assert_eq!(store.notes(), None);
        let own = own_namespace().unwrap();
        assert_eq!(keep.mounts().len(), 0);
        // Its own is the one that it must not be bound in.
        assert!(keep.keep_mounts(own.as_fd()).is_err());
        let other = Store::new().unwrap();
        forget(&control, other.file());
        assert!(directory(&control).join(NAME).exists());
        forget(&control, store.file());
        assert!(!directory(&control).exists());
        keep.remove();
    }

    #[test]
    fn what_is_a_link_is_not_followed() {
        let home = tempfile::tempdir().unwrap();
        let control = home.path().join("control.sock");
        let other = home.path().join("other");
        fs::create_dir(&other).unwrap();
        fs::write(other.join(NAME), "x").unwrap();
        std::os::unix::fs::symlink(&other, directory(&control)).unwrap();
        assert!(Keep::left(&control).is_err());
        assert!(Keep::make(&control).is_err());
        forget(&control, File::open(other.join(NAME)).unwrap().as_fd());
        assert!(other.join(NAME).exists());
    }
}
