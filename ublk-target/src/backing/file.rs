//! The backing file, opened: a block device, or a regular file that is made if there is none.
//!
//! What is looked at is what was opened, not what the name stands for by then. It is opened for direct I/O,
//! and held for ourselves as long as it is open. A file that was made is removed again if anything fails.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata, TryLockError};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    FallocateFlags, FsWord, IFlags, Mode, OFlags, SeekFrom, fallocate, fcntl_setfl, fstatfs,
    ftruncate, ioctl_blksszget, ioctl_getflags, ioctl_setflags, open, seek,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tmem::{BACKING_BYTES_MIN, PAGE_SIZE};

use super::contents::{self, Contents, END_BYTES, HEADER_BYTES};
use super::info::BackingInfo;
use super::refusal::{BackingFileError, Refusal};
use super::relatives::{Relatives, SYSFS};
use crate::{hold, program};

/// Smallest backing file, in bytes, what is around its log included.
pub const FILE_BYTES_MIN: u64 = HEADER_BYTES + BACKING_BYTES_MIN + END_BYTES;

/// Largest backing file, in bytes: what a file can have at all.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;

/// The log is whole segments of so many bytes.
const SEGMENT_BYTES: u64 = 1 << 20;

/// The numbers that tmpfs (devtmpfs too) and ramfs have among file systems.
const IN_MEMORY: [FsWord; 2] = [0x0102_1994, 0x8584_58f6];

/// A backing file as it is asked for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct BackingSpec {
    /// Its absolute path.
    pub path: PathBuf,
    /// Its size in bytes, all included. Without one it is what is there, which then has to be there.
    pub bytes: Option<u64>,
    /// Whether what is written is encrypted.
    pub encrypt: bool,
    /// Take it whatever is in it, which is lost.
    pub force: bool,
}

impl BackingSpec {
    /// Checks what can be checked without looking at the file.
    pub fn check(&self) -> Result<(), BackingFileError> {
        let checked = match self.path.is_absolute() {
            true => self.bytes.map_or(Ok(()), check_file_bytes),
            false => Err(Refusal::Relative),
        };
        checked.map_err(|refusal| BackingFileError { path: self.path.clone(), refusal })
    }
}

/// A backing file that is open: nobody else uses it, and its room is there. Dropping it closes it, and leaves
/// it where it is, but for one that was made for it and was never put to use ([`BackingFile::keep`]).
#[derive(Debug)]
pub struct BackingFile {
    file: File,
    path: PathBuf,
    is_device: bool,
    /// Of the log.
    bytes: u64,
    made: Made,
}

impl BackingFile {
    /// Opens what `spec` names, or makes it. `own` are the numbers (`st_rdev`) of the daemon's own devices.
    /// Takes as long as the file system takes to reserve the room, and runs `blkid` to name what it finds.
    pub fn open(spec: &BackingSpec, own: &[u64]) -> Result<Self, BackingFileError> {
        spec.check()?;
        let opened = open_or_make(spec, own);
        opened.map_err(|refusal| BackingFileError { path: spec.path.clone(), refusal })
    }

    /// One that is open already, and was checked by another process.
    pub(super) fn again(file: File, path: PathBuf, is_device: bool, bytes: u64) -> Self {
        Self { file, path, is_device, bytes, made: Made(None) }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// It is put to use: it stays, also if it was made for that.
    pub fn keep(&mut self) {
        self.made.0 = None;
    }

    /// The file, open for direct I/O.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where in it the log begins, in bytes.
    pub fn start(&self) -> u64 {
        HEADER_BYTES
    }

    /// What the log may use from there on, in bytes: whole MiB.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its path, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// What is told of it.
    pub fn info(&self) -> BackingInfo {
        let path = self.path.to_string_lossy().into_owned();
        BackingInfo { path, bytes: self.start() + self.bytes() + END_BYTES }
    }
}

impl AsFd for BackingFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd()
    }
}

/// Checks the size of a backing file, in bytes.
pub fn check_file_bytes(bytes: u64) -> Result<(), Refusal> {
    match (FILE_BYTES_MIN..=FILE_BYTES_MAX).contains(&bytes) {
        true => Ok(()),
        false => Err(Refusal::Size { bytes }),
    }
}

fn open_or_make(spec: &BackingSpec, own: &[u64]) -> Result<BackingFile, Refusal> {
    // Not for I/O: opening some devices does something.
    match open(&spec.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Ok(named) => take(spec, named, own),
        Err(Errno::NOENT) => make(spec, own),
        Err(error) => Err(failed("open it")(error)),
    }
}

/// Makes the file.
fn make(spec: &BackingSpec, own: &[u64]) -> Result<BackingFile, Refusal> {
    let bytes = spec.bytes.ok_or(Refusal::Absent)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = open(&spec.path, flags, Mode::RUSR | Mode::WUSR).map_err(failed("make it"))?;
    let made = Made(Some(spec.path.clone()));
    let file = File::from(file);
    lock(&file)?;
    let metadata = file.metadata().map_err(io_failed("look at it"))?;
    check_place(&file, &metadata, own)?;
    // Later only, for with this flag open() leaves a file behind where it refuses it.
    fcntl_setfl(&file, OFlags::DIRECT).map_err(no_direct)?;
    avoid_copies(&file);
    allocate(&file, bytes, 0)?;
    let mut backing = finish(spec, file, false, bytes)?;
    backing.made = made;
    Ok(backing)
}

/// Takes a file that is there.
fn take(spec: &BackingSpec, named: OwnedFd, own: &[u64]) -> Result<BackingFile, Refusal> {
    let named = File::from(named);
    let metadata = named.metadata().map_err(io_failed("look at it"))?;
    let is_device = is_device(&metadata)?;
    check_place(&named, &metadata, own)?;
    let file = reopen(&named, is_device)?;
    if is_device {
        check_sectors(&file)?;
    } else {
        lock(&file)?;
    }
    let has = seek(&file, SeekFrom::End(0)).map_err(failed("ask for its size"))?;
    let bytes = spec.bytes.unwrap_or(has);
    if is_device && bytes > has {
        return Err(Refusal::Larger { bytes, has });
    }
    check_file_bytes(bytes)?;
    if is_device {
        check_relatives(spec, metadata.rdev())?;
    }
    let contents = contents::examine(&file, has).map_err(io_failed("read it"))?;
    if contents == Contents::Foreign && !spec.force {
        return Err(Refusal::Foreign { found: describe(&spec.path), path: spec.path.clone() });
    }
    if !is_device {
        allocate(&file, bytes, has)?;
    }
    if contents == Contents::Foreign {
        // A file may end within a sector, and is as long as that sector then.
        let end = if is_device { has } else { has.next_multiple_of(PAGE_SIZE as u64) };
        contents::erase(&file, end).map_err(io_failed("erase what it holds"))?;
    }
    finish(spec, file, is_device, bytes)
}

/// Makes a file of so many bytes ours, when all else is done.
fn finish(
    spec: &BackingSpec,
    file: File,
    is_device: bool,
    bytes: u64,
) -> Result<BackingFile, Refusal> {
    let log_bytes = (bytes - HEADER_BYTES - END_BYTES) / SEGMENT_BYTES * SEGMENT_BYTES;
    contents::write_header(&file, log_bytes).map_err(io_failed("write to it"))?;
    let (path, made) = (spec.path.clone(), Made(None));
    Ok(BackingFile { file, path, is_device, bytes: log_bytes, made })
}

/// A file that was made, and is removed unless it is kept.
#[derive(Debug)]
struct Made(Option<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // What went wrong before is what the user has to know.
            let _ = fs::remove_file(path);
        }
    }
}

/// Opens again what was opened by its name, for I/O.
fn reopen(named: &File, is_device: bool) -> Result<File, Refusal> {
    let path = format!("/proc/self/fd/{}", named.as_raw_fd());
    let mut flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    // Of a device it means that nobody else may use it.
    flags.set(OFlags::EXCL, is_device);
    let try_open = || open(&*path, flags, Mode::empty());
    match hold::take(try_open, |error| is_device && *error == Errno::BUSY) {
        Ok(file) => Ok(file.into()),
        Err(Errno::BUSY) if is_device => Err(Refusal::InUse),
        Err(error) => Err(no_direct(error)),
    }
}

/// Whether it is a block device; else it is a regular file.
fn is_device(metadata: &Metadata) -> Result<bool, Refusal> {
    let kind = metadata.file_type();
    let refused = match () {
        () if kind.is_file() => return Ok(false),
        () if kind.is_block_device() => return Ok(true),
        () if kind.is_dir() => "a directory",
        () if kind.is_char_device() => "a character device",
        () if kind.is_fifo() => "a pipe",
        () => "a socket",
    };
    Err(Refusal::Kind(refused))
}

/// Refuses what is no further away than the pool itself.
fn check_place(file: &File, metadata: &Metadata, own: &[u64]) -> Result<(), Refusal> {
    let is_device = metadata.file_type().is_block_device();
    let device = if is_device { metadata.rdev() } else { metadata.dev() };
    if own.contains(&device) {
        return Err(Refusal::Own);
    }
    // A device's node may be anywhere.
    if !is_device {
        let system = fstatfs(file).map_err(failed("look at its file system"))?;
        if IN_MEMORY.contains(&system.f_type) {
            return Err(Refusal::InMemory);
        }
    }
    Ok(())
}

/// Refuses a device that others are made of, and one with partitions, unless they are to be lost.
fn check_relatives(spec: &BackingSpec, device: u64) -> Result<(), Refusal> {
    let found = Relatives::of(Path::new(SYSFS), device);
    let Relatives { holders, partitions } = found.map_err(io_failed("look for its partitions"))?;
    if !holders.is_empty() {
        return Err(Refusal::InUse);
    }
    if !partitions.is_empty() && !spec.force {
        let found = format!("partitions ({})", partitions.join(", "));
        return Err(Refusal::Foreign { found, path: spec.path.clone() });
    }
    Ok(())
}

fn check_sectors(file: &File) -> Result<(), Refusal> {
    let bytes = ioctl_blksszget(file).map_err(failed("ask for its sectors"))?;
    if bytes as usize > PAGE_SIZE {
        return Err(Refusal::Sectors { bytes });
    }
    Ok(())
}

fn lock(file: &File) -> Result<(), Refusal> {
    let locked = hold::take(|| file.try_lock(), |error| matches!(error, TryLockError::WouldBlock));
    locked.map_err(|error| match error {
        TryLockError::WouldBlock => Refusal::Locked,
        TryLockError::Error(source) => Refusal::Io { action: "lock it", source },
    })
}

/// Asks btrfs and its like to write in place: each write would be an allocation, and blocks are checked by
/// the engine. Takes effect only as long as there are no data.
fn avoid_copies(file: &File) {
    if let Ok(flags) = ioctl_getflags(file) {
        // Other file systems know no such flag, and need none.
        let _ = ioctl_setflags(file, flags | IFlags::NOCOW);
    }
}

/// Reserves room for all of a file, which has so many bytes by now. After an error it is as long as before.
fn allocate(file: &File, bytes: u64, has: u64) -> Result<(), Refusal> {
    let Err(error) = fallocate(file, FallocateFlags::empty(), 0, bytes) else { return Ok(()) };
    if bytes > has {
        // What went wrong before is what the user has to know.
        let _ = ftruncate(file, has);
    }
    Err(match error {
        Errno::NOSPC | Errno::FBIG | Errno::DQUOT => {
            Refusal::NoRoom { bytes, source: error.into() }
        }
        Errno::OPNOTSUPP => Refusal::NoReserve,
        error => failed("reserve its room")(error),
    })
}

/// What a file holds, as far as `blkid` knows.
fn describe(path: &Path) -> String {
    let args = ["-p", "-o", "export"].map(OsStr::new).into_iter().chain([path.as_os_str()]);
    let known = program::output("blkid", args, &path.to_string_lossy()).ok();
    known.and_then(|export| describe_export(&export)).unwrap_or_else(|| "something else".into())
}

/// What `blkid -o export` says, in a few words.
fn describe_export(export: &str) -> Option<String> {
    let value = |key: &str| {
        let mut pairs = export.lines().filter_map(|line| line.split_once('='));
        pairs.find(|(name, _)| *name == key).map(|(_, value)| value)
    };
    match (value("TYPE"), value("USAGE"), value("PTTYPE")) {
        (Some(kind), Some("filesystem"), _) => Some(format!("a file system ({kind})")),
        (Some("swap"), ..) => Some("a swap area".into()),
        (Some(kind), ..) => Some(format!("something of type {kind}")),
        (None, _, Some(table)) => Some(format!("a partition table ({table})")),
        (None, _, None) => None,
    }
}

fn failed(action: &'static str) -> impl Fn(Errno) -> Refusal {
    move |error| Refusal::Io { action, source: error.into() }
}

fn io_failed(action: &'static str) -> impl Fn(io::Error) -> Refusal {
    move |source| Refusal::Io { action, source }
}

/// Why a file cannot be opened for direct I/O.
fn no_direct(error: Errno) -> Refusal {
    match error {
        Errno::INVAL => Refusal::NoDirect,
        error => failed("open it for reading and writing")(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt, symlink};

    use tempfile::TempDir;

    use super::*;
    use crate::exit::{Exit, Failure};

    const MIB: u64 = 1 << 20;

    /// Where a test may make backing files; None, with a word about it, where that cannot be.
    fn home(test: &str) -> Option<TempDir> {
        let home = tempfile::tempdir().unwrap();
        match open_at(&home.path().join("probe"), Some(FILE_BYTES_MIN)) {
            Err(error) if matches!(error.refusal, Refusal::NoDirect | Refusal::InMemory) => {
                eprintln!("SKIPPED: {test}: {error}");
                None
            }
            probed => {
                probed.unwrap();
                Some(home)
            }
        }
    }

    fn spec(path: &Path, bytes: Option<u64>) -> BackingSpec {
        BackingSpec { path: path.to_owned(), bytes, encrypt: true, force: false }
    }

    /// Opens it and puts it to use.
    fn open_at(path: &Path, bytes: Option<u64>) -> Result<BackingFile, BackingFileError> {
        let mut file = BackingFile::open(&spec(path, bytes), &[])?;
        file.keep();
        Ok(file)
    }

    fn refusal(path: &Path, bytes: Option<u64>) -> Refusal {
        open_at(path, bytes).unwrap_err().refusal
    }

    /// A regular file of so many bytes with nothing in it.
    fn blank(path: &Path, bytes: u64) -> File {
        let file = File::create_new(path).unwrap();
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn a_file_is_made_with_all_its_room() {
        let Some(home) = home("a_file_is_made_with_all_its_room") else { return };
        let path = home.path().join("log");
        let backing = open_at(&path, Some(20 * MIB + 5)).unwrap();
        assert_eq!((backing.start(), backing.bytes()), (MIB, 18 * MIB));
        assert_eq!((backing.path(), backing.is_device()), (&*path, false));
        let info = backing.info();
        assert_eq!((info.path.as_str(), info.bytes), (path.to_str().unwrap(), 20 * MIB));
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), 20 * MIB + 5);
        assert!(metadata.blocks() * 512 >= 20 * MIB, "{}", metadata.blocks());
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
        let flags = rustix::fs::fcntl_getfl(backing.fd()).unwrap();
        assert!(flags.contains(OFlags::DIRECT | OFlags::RDWR));
        let at_exec = rustix::io::fcntl_getfd(backing.as_fd()).unwrap();
        assert!(at_exec.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn an_earlier_ones_file_is_used_again_whatever_the_log_left() {
        let Some(home) = home("an_earlier_ones_file_is_used_again_whatever_the_log_left") else {
            return;
        };
        let path = home.path().join("log");
        drop(open_at(&path, Some(20 * MIB)).unwrap());
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[7; 4096], 19 * MIB - 4096).unwrap();
        for (asked, log, file) in
            [(None, 18, 20), (Some(16), 14, 20), (Some(24), 22, 24), (None, 22, 24)]
        {
            let backing = open_at(&path, asked.map(|mib| mib * MIB)).unwrap();
            assert_eq!(backing.bytes(), log * MIB, "{asked:?}");
            assert_eq!(fs::metadata(&path).unwrap().len(), file * MIB, "{asked:?}");
        }
    }

    #[test]
    fn a_file_of_zeros_is_an_empty_one() {
        let Some(home) = home("a_file_of_zeros_is_an_empty_one") else { return };
        for (name, has, asked) in
            [("a", 20 * MIB, None), ("b", 0, Some(20 * MIB)), ("c", 3 * MIB + 1, Some(20 * MIB))]
        {
            let path = home.path().join(name);
            blank(&path, has);
            assert_eq!(open_at(&path, asked).unwrap().bytes(), 18 * MIB);
            let metadata = fs::metadata(&path).unwrap();
            assert!(metadata.blocks() * 512 >= 20 * MIB, "{name}: {}", metadata.blocks());
        }
    }

    #[test]
    fn what_others_have_written_is_left_alone() {
        let Some(home) = home("what_others_have_written_is_left_alone") else { return };
        // Of an ext4, a swap area, a GPT's copy, and of nothing known.
        let marks: [(u64, &[u8]); 4] = [
            (1080, &[0x53, 0xef]),
            (4086, b"SWAPSPACE2"),
            (20 * MIB - 512, b"EFI PART"),
            (99, b"x"),
        ];
        for (at, mark) in marks {
            let path = home.path().join(at.to_string());
            blank(&path, 20 * MIB).write_all_at(mark, at).unwrap();
            let before = fs::read(&path).unwrap();
            for asked in [None, Some(24 * MIB)] {
                let error = open_at(&path, asked).unwrap_err();
                let message = error.to_string();
                assert_eq!(Failure::from(error).code, Exit::Foreign);
                let advice = format!("`wipefs -a {}`", path.display());
                assert!(message.contains(&advice) && message.contains("--force"), "{message}");
            }
            assert!(fs::read(&path).unwrap() == before, "{at}");
        }
    }

    /// Also in what was a backing file before.
    #[test]
    fn a_raid_made_of_an_earlier_ones_file_is_left_alone() {
        let Some(home) = home("a_raid_made_of_an_earlier_ones_file_is_left_alone") else { return };
        let path = home.path().join("log");
        drop(open_at(&path, Some(20 * MIB)).unwrap());
        let file = File::options().read(true).write(true).open(&path).unwrap();
        // Metadata 1.0, which is all at the end.
        file.write_all_at(&[0xfc, 0x4e, 0x2b, 0xa9, 1, 0, 0, 0], 20 * MIB - 8192).unwrap();
        for asked in [None, Some(16 * MIB), Some(24 * MIB)] {
            assert!(matches!(refusal(&path, asked), Refusal::Foreign { .. }), "{asked:?}");
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 20 * MIB);
        let by_force = BackingSpec { force: true, ..spec(&path, None) };
        drop(BackingFile::open(&by_force, &[]).unwrap());
        let mut mark = [1; 8];
        file.read_exact_at(&mut mark, 20 * MIB - 8192).unwrap();
        assert_eq!(mark, [0; 8]);
        open_at(&path, None).unwrap();
    }

    #[test]
    fn by_force_it_is_taken_and_its_marks_are_erased() {
        let Some(home) = home("by_force_it_is_taken_and_its_marks_are_erased") else { return };
        let path = home.path().join("log");
        let bytes = 19 * MIB + 700;
        let file = blank(&path, bytes);
        for at in [65536 + 64, 10 * MIB, bytes - 1] {
            file.write_all_at(&[9], at).unwrap();
        }
        let by_force = BackingSpec { force: true, ..spec(&path, None) };
        assert_eq!(BackingFile::open(&by_force, &[]).unwrap().bytes(), 17 * MIB);
        let has = fs::read(&path).unwrap();
        let left: Vec<_> = (4096..has.len()).filter(|&at| has[at] != 0).collect();
        assert_eq!(left, [10 << 20]);
        assert_eq!(open_at(&path, None).unwrap().bytes(), 17 * MIB);
    }

    #[test]
    fn what_is_found_is_named() {
        for (export, found) in [
            ("DEVNAME=/dev/x\nLABEL=a=b\nTYPE=ext4\nUSAGE=filesystem\n", "a file system (ext4)"),
            ("TYPE=swap\nUSAGE=other\n", "a swap area"),
            ("TYPE=LVM2_member\nUSAGE=raid\n", "something of type LVM2_member"),
            ("PTUUID=7\nPTTYPE=gpt\n", "a partition table (gpt)"),
        ] {
            assert_eq!(describe_export(export).as_deref(), Some(found));
        }
        assert_eq!(describe_export("DEVNAME=/dev/x\n"), None);
        assert_eq!(describe(Path::new("/nonexistent/file")), "something else");
    }

    #[test]
    fn a_file_is_used_once_at_a_time() {
        let Some(home) = home("a_file_is_used_once_at_a_time") else { return };
        let path = home.path().join("log");
        let first = open_at(&path, Some(20 * MIB)).unwrap();
        let error = open_at(&path, Some(24 * MIB)).unwrap_err();
        assert!(matches!(error.refusal, Refusal::Locked), "{error}");
        assert_eq!(Failure::from(error).code, Exit::InUse);
        assert_eq!(fs::metadata(&path).unwrap().len(), 20 * MIB);
        drop(first);
        open_at(&path, None).unwrap();
    }

    #[test]
    fn a_file_that_was_made_and_not_used_is_removed() {
        let Some(home) = home("a_file_that_was_made_and_not_used_is_removed") else { return };
        let path = home.path().join("backing");
        let made = BackingFile::open(&spec(&path, Some(20 * MIB)), &[]).unwrap();
        assert!(path.exists());
        drop(made);
        assert!(!path.exists());
        // One that was there is not.
        drop(open_at(&path, Some(20 * MIB)).unwrap());
        drop(BackingFile::open(&spec(&path, None), &[]).unwrap());
        assert!(path.exists());
    }

    #[test]
    fn nothing_half_made_is_left() {
        let Some(home) = home("nothing_half_made_is_left") else { return };
        let path = home.path().join("log");
        assert!(matches!(refusal(&path, Some(1 << 55)), Refusal::NoRoom { .. }));
        assert!(!path.exists());
        blank(&path, 20 * MIB);
        assert!(matches!(refusal(&path, Some(1 << 55)), Refusal::NoRoom { .. }));
        assert_eq!(fs::metadata(&path).unwrap().len(), 20 * MIB);
    }

    #[test]
    fn sizes_have_bounds() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("log");
        for bytes in [0, FILE_BYTES_MIN - 1, FILE_BYTES_MAX + 1, u64::MAX] {
            assert!(matches!(refusal(&path, Some(bytes)), Refusal::Size { .. }), "{bytes}");
        }
        assert!(!path.exists());
        let error = open_at(&path, None).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("give its size") && message.contains("/log"), "{message}");
        assert_eq!(Failure::from(error).code, Exit::Usage);
    }

    #[test]
    fn a_file_that_is_too_small_is_left_as_it_is() {
        let Some(home) = home("a_file_that_is_too_small_is_left_as_it_is") else { return };
        let path = home.path().join("log");
        blank(&path, FILE_BYTES_MIN - 1);
        let error = open_at(&path, None).unwrap_err();
        assert!(error.to_string().contains(&format!("use {FILE_BYTES_MIN} bytes")), "{error}");
        assert_eq!(fs::metadata(&path).unwrap().len(), FILE_BYTES_MIN - 1);
    }

    #[test]
    fn only_files_and_block_devices_are_taken() {
        let home = tempfile::tempdir().unwrap();
        let fifo = home.path().join("fifo");
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, kind, Mode::RUSR, 0).unwrap();
        for (path, kind) in [
            (Path::new("/dev/null"), "a character device"),
            (home.path(), "a directory"),
            (&fifo, "a pipe"),
        ] {
            let message = open_at(path, None).unwrap_err().to_string();
            assert!(message.contains(&format!("it is {kind}: use")), "{message}");
        }
        assert!(matches!(refusal(Path::new("log"), None), Refusal::Relative));
    }

    #[test]
    fn a_file_in_memory_is_refused_and_none_is_made() {
        let home = match TempDir::new_in("/dev/shm") {
            Ok(home) => home,
            Err(error) => {
                return eprintln!("SKIPPED: a_file_in_memory_is_refused_and_none_is_made: {error}");
            }
        };
        let path = home.path().join("log");
        assert!(matches!(refusal(&path, Some(20 * MIB)), Refusal::InMemory));
        assert!(!path.exists());
        blank(&path, 20 * MIB);
        assert!(matches!(refusal(&path, None), Refusal::InMemory));
    }

    #[test]
    fn a_file_on_one_of_our_devices_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let own = [7, home.path().metadata().unwrap().dev()];
        let path = home.path().join("log");
        for _ in 0..2 {
            let error = BackingFile::open(&spec(&path, Some(20 * MIB)), &own).unwrap_err();
            assert!(matches!(error.refusal, Refusal::Own), "{error}");
            assert!(!path.exists());
        }
        blank(&path, 20 * MIB);
        let error = BackingFile::open(&spec(&path, None), &own).unwrap_err();
        assert!(matches!(error.refusal, Refusal::Own), "{error}");
    }

    /// A loop device, taken down at the end.
    struct Loop(String);

    impl Loop {
        fn new(file: &Path) -> Result<Self, program::ProgramError> {
            let file_name = file.to_string_lossy();
            let args = ["--find", "--show", &file_name];
            let made = program::output("losetup", args, &file_name)?;
            Ok(Self(made.trim().to_owned()))
        }

        fn path(&self) -> &Path {
            Path::new(&self.0)
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            program::run("losetup", ["-d", &self.0], &self.0).unwrap();
        }
    }

    #[test]
    fn a_block_device_is_ours_alone_and_does_not_grow() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("device");
        blank(&file, 20 * MIB + 512);
        let device = match Loop::new(&file) {
            Ok(device) => device,
            Err(error) => {
                let test = "a_block_device_is_ours_alone_and_does_not_grow";
                return eprintln!("SKIPPED: {test}: {error}");
            }
        };
        let path = device.path();
        let backing = open_at(path, None).unwrap();
        assert_eq!((backing.bytes(), backing.is_device()), (18 * MIB, true));
        let error = open_at(path, None).unwrap_err();
        assert!(matches!(error.refusal, Refusal::InUse), "{error}");
        drop(backing);
        assert_eq!(open_at(path, Some(16 * MIB)).unwrap().bytes(), 14 * MIB);
        let larger = refusal(path, Some(21 * MIB));
        assert!(matches!(larger, Refusal::Larger { has, .. } if has == 20 * MIB + 512), "{larger}");
        let own = [path.metadata().unwrap().rdev()];
        let error = BackingFile::open(&spec(path, None), &own).unwrap_err();
        assert!(matches!(error.refusal, Refusal::Own), "{error}");

        program::run("mkswap", [path], &device.0).unwrap();
        let last = File::options().write(true).open(path).unwrap();
        last.write_all_at(&[5; 512], 20 * MIB).unwrap();
        drop(last);
        let message = open_at(path, None).unwrap_err().to_string();
        assert!(message.contains("it holds a swap area: erase it with"), "{message}");
        let by_force = BackingSpec { force: true, ..spec(path, None) };
        BackingFile::open(&by_force, &[]).unwrap();
        let mut sector = [1; 512];
        File::open(path).unwrap().read_exact_at(&mut sector, 20 * MIB).unwrap();
        assert_eq!(sector, [0; 512]);
    }

    #[test]
    fn links_are_followed_to_what_is_there() {
        let Some(home) = home("links_are_followed_to_what_is_there") else { return };
        let [link, path] = ["link", "log"].map(|name| home.path().join(name));
        symlink(&path, &link).unwrap();
        assert!(matches!(refusal(&link, Some(20 * MIB)), Refusal::Io { action: "make it", .. }));
        assert!(!path.exists());
        blank(&path, 20 * MIB);
        assert_eq!(open_at(&link, None).unwrap().path(), link);
    }
}
