//! The backing file, as a process opens it that goes on for one that has died.
//!
//! What the dead process was writing may still land. The file tells when that has ended: that process's hold on it (an
//! exclusive open of a device, a lock on a file) belongs to the open file that it wrote through, which is there as long as
//! anything is under way on it. So whoever goes on may read at once, by an open file of its own, and writes only when it
//! has got that hold ([`Claim`]); through which it then writes in turn.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::file::BackingFile;

/// How another process finds the file again, and knows that it is the same.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct BackingNote {
    path: PathBuf,
    /// {device, inode, number}, as `stat` has them.
    identity: (u64, u64, u64),
    /// Of the log.
    bytes: u64,
}

/// What is to be held before anything may be written.
#[derive(Debug)]
pub struct Claim {
    /// Not open for I/O.
    named: File,
    is_device: bool,
}

impl BackingNote {
    /// Of a file that is open.
    pub fn of(file: &BackingFile) -> io::Result<Self> {
        let identity = identity(file.file())?;
        Ok(Self { path: file.path().to_owned(), identity, bytes: file.bytes() })
    }

    /// Opens the file to be read, whoever has hold of it.
    pub fn reopen(&self) -> io::Result<(BackingFile, Claim)> {
        let named = open(&self.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let named = File::from(named);
        if identity(&named)? != self.identity {
            return Err(io::Error::other("there is another file of that name"));
        }
        let is_device = named.metadata()?.file_type().is_block_device();
        let claim = Claim { named, is_device };
        let file = File::from(claim.open(OFlags::empty())?);
        Ok((BackingFile::again(file, self.path.clone(), is_device, self.bytes), claim))
    }

    /// Stands for a file that cannot be opened: each read of it is an error.
    pub fn lost(&self) -> io::Result<BackingFile> {
        let file = File::options().read(true).open("/dev/null")?;
        Ok(BackingFile::again(file, self.path.clone(), false, self.bytes))
    }

    /// Where the file is.
    pub fn path(&self) -> std::path::Display<'_> {
        self.path.display()
    }
}

impl Claim {
    /// The file, open to be written, if nothing of anybody else's is under way on it. It asks no directory.
    pub fn try_take(&self) -> io::Result<Option<OwnedFd>> {
        if self.is_device {
            return match self.open(OFlags::EXCL) {
                Err(Errno::BUSY) => Ok(None),
                result => Ok(Some(result?)),
            };
        }
        let file = self.open(OFlags::empty())?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => Ok(None),
            result => Ok(result.map(|()| Some(file))?),
        }
    }

    fn open(&self, extra: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.named.as_raw_fd());
        open(path, OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC | extra, Mode::empty())
    }
}

fn identity(file: &File) -> io::Result<(u64, u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino(), metadata.rdev()))
}

#[cfg(test)]
mod tests {
    use tmem::BACKING_BYTES_MIN;

    use super::super::file::{BackingSpec, FILE_BYTES_MIN};
    use super::*;
    use crate::hold;

    fn spec(home: &tempfile::TempDir) -> BackingSpec {
        let bytes = Some(FILE_BYTES_MIN + BACKING_BYTES_MIN);
        BackingSpec { path: home.path().join("backing"), bytes, encrypt: true, force: false }
    }

    #[test]
    fn it_is_read_at_once_and_written_when_the_other_has_let_go() {
        let home = tempfile::tempdir().unwrap();
        let mut first = BackingFile::open(&spec(&home), &[]).unwrap();
        first.keep();
        let note = BackingNote::of(&first).unwrap();
        let (again, claim) = note.reopen().unwrap();
        assert_eq!((again.bytes(), again.info()), (first.bytes(), first.info()));
        let mut header = [0; 4096];
        let mut aligned = vec![0_u8; 8192];
        let offset = aligned.as_ptr().align_offset(4096);
        assert_eq!(
            rustix::io::pread(again.file(), &mut aligned[offset..][..4096], 0).unwrap(),
            4096
        );
        header.copy_from_slice(&aligned[offset..][..4096]);
        assert_ne!(header, [0; 4096]);
        assert!(claim.try_take().unwrap().is_none());
        drop(first);
        let held = hold::take(|| claim.try_take().unwrap().ok_or(()), |()| true).unwrap();
        assert!(claim.try_take().unwrap().is_none());
        drop(held);
    }

    #[test]
    fn another_file_of_the_same_name_is_not_it() {
        let home = tempfile::tempdir().unwrap();
        let mut file = BackingFile::open(&spec(&home), &[]).unwrap();
        file.keep();
        let note = BackingNote::of(&file).unwrap();
        let path = home.path().join("backing");
        std::fs::rename(&path, home.path().join("elsewhere")).unwrap();
        assert!(note.reopen().is_err());
        std::fs::write(&path, "another").unwrap();
        assert!(note.reopen().unwrap_err().to_string().contains("another file"));
        assert_eq!(note.lost().unwrap().bytes(), file.bytes());
    }
}
