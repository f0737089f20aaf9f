//! A region: a part of a memory file, mapped once, of which parts have memory behind them.
//!
//! Guarantees: the whole address range is reserved when the region is made; memory comes only
//! with [`Region::populate`] and goes with [`Region::release`]; what is populated is locked, or of a file that is never
//! swapped out, where the system allows one of these (ask [`Region::is_locked`]), and never faults afterwards. Unpopulated and
//! freshly populated memory reads as zeros.
//!
//! It hands out a raw pointer only; what may be done through it, and by whom, is for the owner
//! ([`crate::arena`], [`crate::directory`]) to say.
//!
//! Under Miri, which has no memory files, a region is a zeroed heap block.

use std::io;
use std::ptr::NonNull;

use crate::durable::crash_point;

#[cfg(not(miri))]
mod imp {
    use std::ffi::c_void;
    use std::io;
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::path::Path;
    use std::ptr::{self, NonNull};
    use std::sync::Arc;

    use rustix::fs::{CWD, FallocateFlags, MemfdFlags, Mode, OFlags, SeekFrom};
    use rustix::mm::{Advice, MapFlags, MlockFlags, MprotectFlags, ProtFlags};
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    };

    /// A memory file; a clone is the same one.
    #[derive(Clone)]
    pub(crate) struct MemoryFile {
        file: Arc<OwnedFd>,
        /// Whether the kernel never swaps it out, whoever has it mapped.
        stays: bool,
    }

    impl MemoryFile {
        /// A file of so many bytes, none of which has memory.
        pub(crate) fn new(name: &str, bytes: u64) -> io::Result<Self> {
            let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
            rustix::fs::ftruncate(&file, bytes)?;
            Ok(Self::from_file(file))
        }

        /// The same, of a kind that the kernel never swaps out, if that is to be had. Locked memory is not swapped either, but
        /// it is locked only while a process has it mapped: between the end of one process and the mapping by the
        /// next, a file of pages could be swapped out, to the device that is to be served from it.
        pub(crate) fn unswappable(name: &str, bytes: u64) -> io::Result<Self> {
            let Ok(file) = file_without_swap() else { return Self::new(name, bytes) };
            rustix::fs::ftruncate(&file, bytes)?;
            Ok(Self::from_file(file).that_stays())
        }

        /// The same, with a name: it is `name` in a file system of its own that is mounted on a directory.
        pub(crate) fn mounted(directory: &Path, name: &str, bytes: u64) -> io::Result<Self> {
            let root = file_system_without_swap()?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&root, name, flags, Mode::RUSR | Mode::WUSR)?;
            rustix::fs::ftruncate(&file, bytes)?;
            rustix::mount::move_mount(
                &root,
                "",
                CWD,
                directory,
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
            )?;
            Ok(Self::from_file(file).that_stays())
        }

        pub(crate) fn from_file(file: OwnedFd) -> Self {
            Self { file: Arc::new(file), stays: false }
        }

        /// The same, which whoever made it knows is never swapped out.
        pub(crate) fn that_stays(self) -> Self {
            Self { stays: true, ..self }
        }

        pub(crate) fn stays(&self) -> bool {
            self.stays
        }

        pub(crate) fn file(&self) -> BorrowedFd<'_> {
            self.file.as_fd()
        }

        pub(crate) fn bytes(&self) -> io::Result<u64> {
            Ok(rustix::fs::fstat(&*self.file)?.st_size as u64)
        }

        pub(crate) fn resize(&self, bytes: u64) -> io::Result<()> {
            Ok(rustix::fs::ftruncate(&*self.file, bytes)?)
        }

        /// Gives the memory of a range back.
        pub(crate) fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            Ok(rustix::fs::fallocate(&*self.file, mode, offset, bytes)?)
        }
    }

    /// A file without a name in a file system of its own, that nobody else sees, goes with it and has no swap.
    fn file_without_swap() -> rustix::io::Result<OwnedFd> {
        let root = file_system_without_swap()?;
        let flags = OFlags::TMPFILE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::openat(&root, ".", flags, Mode::RUSR | Mode::WUSR)
    }

    /// The root of a file system that is mounted nowhere. Linux has it from 6.4 on, for those with CAP_SYS_ADMIN.
    fn file_system_without_swap() -> rustix::io::Result<OwnedFd> {
        let system = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        // As large as it likes, as a memory file is.
        for (key, value) in [("size", "0"), ("nr_inodes", "0"), ("mode", "0700")] {
            fsconfig_set_string(system.as_fd(), key, value)?;
        }
        fsconfig_set_flag(system.as_fd(), "noswap")?;
        fsconfig_create(system.as_fd())?;
        let nothing_else = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        fsmount(system.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, nothing_else)
    }

    pub(super) struct Mapping {
        file: MemoryFile,
        /// Where in the file it begins.
        offset: u64,
        start: NonNull<c_void>,
        bytes: usize,
        pub(super) locked: bool,
    }

    impl Mapping {
        /// The order matters. With `mlockall(MCL_FUTURE)` in force the kernel populates every new
        /// mapping at once, the arena up to its maximum; it cannot populate `PROT_NONE`. Locking
        /// on fault comes next, and only then is the range made accessible.
        ///
        /// Of a file that is never swapped out a page stays mapped as a locked one does, for the kernel never looks for
        /// memory among its pages. To lock each of them as well takes longer, and so does to unlock them when the process ends,
        /// for which the one that goes on has to wait.
        pub(super) fn new(file: &MemoryFile, offset: u64, bytes: usize) -> io::Result<Self> {
            let flags = MapFlags::SHARED | MapFlags::NORESERVE;
            let (place, access) = (ptr::null_mut(), ProtFlags::empty());
            // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
            let start =
                unsafe { rustix::mm::mmap(place, bytes, access, flags, file.file(), offset)? };
            let start = NonNull::new(start).ok_or(io::ErrorKind::AddrNotAvailable)?;
            let mut mapping = Self { file: file.clone(), offset, start, bytes, locked: false };
            // SAFETY: the range is the mapping made above, which nobody else knows of yet.
            unsafe {
                if file.stays {
                    rustix::mm::munlock(mapping.start.as_ptr(), bytes)?;
                    mapping.locked = true;
                } else {
                    let locked =
                        rustix::mm::mlock_with(mapping.start.as_ptr(), bytes, MlockFlags::ONFAULT);
                    mapping.locked = locked.is_ok();
                }
                // Memory comes and goes by frames: a huge page would bring more than was asked for,
                // and a hole in it give nothing back. Kernels without huge pages refuse; no harm.
                let _ = rustix::mm::madvise(mapping.start.as_ptr(), bytes, Advice::LinuxNoHugepage);
                let access = MprotectFlags::READ | MprotectFlags::WRITE;
                rustix::mm::mprotect(mapping.start.as_ptr(), bytes, access)?;
            }
            Ok(mapping)
        }

        pub(super) fn start(&self) -> NonNull<u8> {
            self.start.cast()
        }

        pub(super) fn populate(&self, offset: usize, bytes: usize) -> io::Result<()> {
            // SAFETY: the caller has checked the range; populating changes no byte in it.
            unsafe {
                let at = self.start.as_ptr().byte_add(offset);
                Ok(rustix::mm::madvise(at, bytes, Advice::LinuxPopulateWrite)?)
            }
        }

        pub(super) fn release(&self, offset: usize, bytes: usize) -> io::Result<()> {
            self.file.punch(self.offset + offset as u64, bytes as u64)
        }

        pub(super) fn bring_in(&self, offset: usize, bytes: usize) -> io::Result<()> {
            // SAFETY: the caller has checked the range; reading changes no byte in it.
            unsafe {
                let at = self.start.as_ptr().byte_add(offset);
                Ok(rustix::mm::madvise(at, bytes, Advice::LinuxPopulateRead)?)
            }
        }

        pub(super) fn populated(&self, from: usize) -> io::Result<Option<(usize, usize)>> {
            let end = self.offset + self.bytes as u64;
            let at = self.offset + from as u64;
            let first = match rustix::fs::seek(self.file.file(), SeekFrom::Data(at)) {
                // Behind the last memory of the file.
                Err(rustix::io::Errno::NXIO) => return Ok(None),
                found => found?,
            };
            if first >= end {
                return Ok(None);
            }
            let past = rustix::fs::seek(self.file.file(), SeekFrom::Hole(first))?.min(end);
            Ok(Some(((first - self.offset) as usize, (past - self.offset) as usize)))
        }
    }

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: the mapping is ours, and the owner's borrows of it ended before this.
            let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.bytes) };
            debug_assert!(unmapped.is_ok());
        }
    }

    #[cfg(test)]
    mod tests {
        use rustix::io::Errno;

        use super::*;

        #[test]
        fn a_file_without_swap_is_like_any_other_or_refused() {
            let refused = match file_without_swap() {
                Ok(file) => {
                    let file = MemoryFile::from_file(file).that_stays();
                    file.resize(1 << 40).unwrap();
                    rustix::io::pwrite(file.file(), b"x", 1 << 30).unwrap();
                    let first = rustix::fs::seek(file.file(), SeekFrom::Data(0)).unwrap();
                    assert_eq!(first, 1 << 30);
                    file.punch(1 << 30, 4096).unwrap();
                    assert_eq!(rustix::fs::fstat(file.file()).unwrap().st_blocks, 0);
                    // What is mapped of it stays, without being locked.
                    let mapping = Mapping::new(&file, 1 << 30, 4096).unwrap();
                    assert!(mapping.locked);
                    mapping.populate(0, 4096).unwrap();
                    assert_eq!(mapping.populated(0).unwrap(), Some((0, 4096)));
                    return;
                }
                Err(errno) => errno,
            };
            let reasons = [Errno::PERM, Errno::INVAL, Errno::NOSYS, Errno::NODEV];
            assert!(reasons.contains(&refused), "{refused}");
        }
    }
}

#[cfg(miri)]
mod imp {
    use std::alloc::{Layout, alloc_zeroed, dealloc};
    use std::io;
    use std::ptr::NonNull;

    /// There are none: each region is by itself.
    #[derive(Clone)]
    pub(crate) struct MemoryFile;

    impl MemoryFile {
        pub(crate) fn new(_name: &str, _bytes: u64) -> io::Result<Self> {
            Ok(Self)
        }

        pub(crate) fn unswappable(_name: &str, _bytes: u64) -> io::Result<Self> {
            Ok(Self)
        }

        pub(crate) fn stays(&self) -> bool {
            false
        }

        pub(crate) fn bytes(&self) -> io::Result<u64> {
            Ok(u64::MAX)
        }

        pub(crate) fn resize(&self, _bytes: u64) -> io::Result<()> {
            Ok(())
        }

        pub(crate) fn punch(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
            Ok(())
        }
    }

    pub(super) struct Mapping {
        start: NonNull<u8>,
        layout: Layout,
        pub(super) locked: bool,
    }

    impl Mapping {
        pub(super) fn new(_file: &MemoryFile, _offset: u64, bytes: usize) -> io::Result<Self> {
            let layout = Layout::from_size_align(bytes, crate::PAGE_SIZE).expect("a sane size");
            // SAFETY: the layout is not empty, which `Region::new` checks.
            let start = NonNull::new(unsafe { alloc_zeroed(layout) });
            let start = start.ok_or(io::ErrorKind::OutOfMemory)?;
            Ok(Self { start, layout, locked: false })
        }

        pub(super) fn start(&self) -> NonNull<u8> {
            self.start
        }

        pub(super) fn populate(&self, _offset: usize, _bytes: usize) -> io::Result<()> {
            Ok(())
        }

        pub(super) fn release(&self, offset: usize, bytes: usize) -> io::Result<()> {
            // SAFETY: the caller has checked the range and owns what is in it.
            unsafe { self.start.as_ptr().add(offset).write_bytes(0, bytes) };
            Ok(())
        }

        pub(super) fn bring_in(&self, _offset: usize, _bytes: usize) -> io::Result<()> {
            Ok(())
        }

        pub(super) fn populated(&self, from: usize) -> io::Result<Option<(usize, usize)>> {
            Ok((from < self.layout.size()).then(|| (from, self.layout.size())))
        }
    }

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: allocated in `new` with this very layout.
            unsafe { dealloc(self.start.as_ptr(), self.layout) };
        }
    }
}

pub(crate) use imp::MemoryFile;

/// Bytes of addresses that a page of the lowest page tables is for; where it is for more, nothing is wrong.
const TABLE_BYTES: usize = 2 << 20;

/// See the module's description.
pub(crate) struct Region {
    mapping: imp::Mapping,
    bytes: usize,
}

// SAFETY: a region is a pointer to memory that is not tied to a thread; the types that are built
// on it say who may touch which part of that memory, and when.
unsafe impl Send for Region {}
// SAFETY: as above; the methods of the region itself only pass ranges to the kernel.
unsafe impl Sync for Region {}

impl Region {
    /// Reserves `bytes` of address space, rounded up to whole pages, with no memory behind it: a file of its own.
    pub(crate) fn new(name: &str, bytes: usize) -> io::Result<Self> {
        let bytes = bytes.next_multiple_of(crate::PAGE_SIZE);
        Self::of(&MemoryFile::new(name, bytes as u64)?, 0, bytes)
    }

    /// Maps `bytes`, rounded up to whole pages, of a file from a page-aligned offset on. What memory is there, stays.
    pub(crate) fn of(file: &MemoryFile, offset: u64, bytes: usize) -> io::Result<Self> {
        assert!(bytes > 0, "a region of no bytes");
        let bytes = bytes.next_multiple_of(crate::PAGE_SIZE);
        Ok(Self { mapping: imp::Mapping::new(file, offset, bytes)?, bytes })
    }

    /// Start of the region; page aligned.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.mapping.start()
    }

    /// Size of the reserved range in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether populated memory stays where it is.
    pub(crate) fn is_locked(&self) -> bool {
        self.mapping.locked
    }

    /// Puts memory behind a page-aligned range. May block in the kernel while it finds some, so
    /// this is never called on the I/O path.
    pub(crate) fn populate(&self, offset: usize, bytes: usize) -> io::Result<()> {
        self.check(offset, bytes);
        #[cfg(test)]
        faults::strike()?;
        crash_point();
        self.mapping.populate(offset, bytes)
    }

    /// Gives the memory of a page-aligned range back; it reads as zeros from then on, and must be
    /// populated again before it is used.
    pub(crate) fn release(&self, offset: usize, bytes: usize) -> io::Result<()> {
        self.check(offset, bytes);
        #[cfg(test)]
        faults::strike()?;
        crash_point();
        self.mapping.release(offset, bytes)
    }

    /// Makes what has memory in a page-aligned range be at hand, so that reading and writing it needs no page tables.
    /// Changes nothing; where there is no memory, there may be some afterwards. May block like [`Region::populate`].
    pub(crate) fn bring_in(&self, offset: usize, bytes: usize) -> io::Result<()> {
        self.check(offset, bytes);
        #[cfg(test)]
        faults::strike()?;
        match self.mapping.bring_in(offset, bytes) {
            Err(error) if is_poisoned(&error) => {
                // Nobody can have such a page at hand; the others, everybody.
                let pages = (offset..offset + bytes).step_by(crate::PAGE_SIZE);
                all_sound(pages, |at| self.mapping.bring_in(at, crate::PAGE_SIZE))
            }
            result => result,
        }
    }

    /// Makes page tables be there for all that has memory: then reading and writing it, whatever was brought in, takes
    /// no memory. Changes nothing, like [`Region::bring_in`], and costs little where there are tables already.
    pub(crate) fn bring_in_tables(&self) -> io::Result<()> {
        let mut from = 0;
        while let Some((first, past)) = self.populated(from)? {
            self.bring_in_tables_of(first, past)?;
            from = past;
        }
        Ok(())
    }

    /// The same for a range that has memory.
    pub(crate) fn bring_in_tables_of(&self, first: usize, past: usize) -> io::Result<()> {
        let start = self.start().as_ptr() as usize;
        let mut at = first;
        while at < past {
            let end = (start + at + 1).next_multiple_of(TABLE_BYTES) - start;
            let pages = (at..end.min(past)).step_by(crate::PAGE_SIZE);
            #[cfg(test)]
            faults::strike()?;
            first_sound(pages, |at| self.mapping.bring_in(at, crate::PAGE_SIZE))?;
            at = end;
        }
        Ok(())
    }

    /// The first range from `from` on that has memory, as its start and what is past it; none if there is no more. If
    /// memory comes or goes meanwhile, it may be any that there was.
    pub(crate) fn populated(&self, from: usize) -> io::Result<Option<(usize, usize)>> {
        if from >= self.bytes {
            return Ok(None);
        }
        self.mapping.populated(from)
    }

    /// Copies bytes from a populated part. While another process writes them, they may be anything.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) {
        assert!(offset <= self.bytes && out.len() <= self.bytes - offset);
        // SAFETY: the range is inside the region; no reference into it exists where this is used (`store`), but
        // the copy's own.
        unsafe {
            let from = self.start().add(offset).as_ptr();
            out.as_mut_ptr().copy_from_nonoverlapping(from, out.len());
        }
    }

    /// Copies bytes to a populated part, of which the caller is the only writer.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.bytes && bytes.len() <= self.bytes - offset);
        crash_point();
        // SAFETY: as in `read`.
        unsafe {
            let to = self.start().add(offset).as_ptr();
            to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    fn check(&self, offset: usize, bytes: usize) {
        assert!(offset.is_multiple_of(crate::PAGE_SIZE) && bytes.is_multiple_of(crate::PAGE_SIZE));
        assert!(bytes > 0 && offset <= self.bytes && bytes <= self.bytes - offset);
    }
}

/// Whether the kernel says that memory is broken: who touches it is killed, and nothing else is wrong.
fn is_poisoned(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::HWPOISON.raw_os_error())
}

/// Brings in all pages but those that are broken.
fn all_sound(
    mut pages: impl Iterator<Item = usize>,
    mut bring_in: impl FnMut(usize) -> io::Result<()>,
) -> io::Result<()> {
    pages.try_for_each(|page| bring_in(page).or_else(unless_poisoned))
}

/// Brings in the first page that is not broken, if there is one.
fn first_sound(
    pages: impl Iterator<Item = usize>,
    mut bring_in: impl FnMut(usize) -> io::Result<()>,
) -> io::Result<()> {
    for page in pages {
        match bring_in(page) {
            Err(error) if is_poisoned(&error) => {}
            result => return result,
        }
    }
    Ok(())
}

fn unless_poisoned(error: io::Error) -> io::Result<()> {
    if is_poisoned(&error) { Ok(()) } else { Err(error) }
}

/// Failures of the system calls, for tests: each thread has its own.
#[cfg(test)]
pub(crate) mod faults {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        static CALLS_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// After so many calls that succeed, one fails for want of memory.
    pub(crate) fn after(calls: u32) {
        CALLS_LEFT.set(Some(calls));
    }

    /// None fails any more.
    #[cfg(not(any(miri, feature = "shuttle")))]
    pub(crate) fn never() {
        CALLS_LEFT.set(None);
    }

    pub(super) fn strike() -> io::Result<()> {
        match CALLS_LEFT.get() {
            Some(0) => {
                CALLS_LEFT.set(None);
                Err(io::ErrorKind::OutOfMemory.into())
            }
            left => {
                CALLS_LEFT.set(left.map(|calls| calls - 1));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;

    #[test]
    fn released_memory_reads_as_zeros() {
        let region = Region::new("tmem-test", 3 * PAGE_SIZE).unwrap();
        region.populate(0, 3 * PAGE_SIZE).unwrap();
        // SAFETY: the offset is inside the populated region, and this thread alone uses it.
        unsafe {
            let at = region.start().as_ptr().add(PAGE_SIZE);
            at.write(7);
            assert_eq!(at.read(), 7);
            region.release(PAGE_SIZE, PAGE_SIZE).unwrap();
            region.populate(PAGE_SIZE, PAGE_SIZE).unwrap();
            assert_eq!(at.read(), 0);
        }
    }

    #[test]
    fn broken_pages_are_passed_over_and_nothing_else_is() {
        let poisoned = || Err(rustix::io::Errno::HWPOISON.into());
        let mut seen = Vec::new();
        let mut bring_in = |page| {
            seen.push(page);
            if page < 3 { poisoned() } else { Ok(()) }
        };
        assert!(first_sound(1..9, &mut bring_in).is_ok());
        assert!(all_sound(2..5, &mut bring_in).is_ok());
        assert!(first_sound(0..2, &mut bring_in).is_ok(), "there is no page that is not broken");
        assert_eq!(seen, [1, 2, 3, 2, 3, 4, 0, 1]);
        let short = |_| Err(io::ErrorKind::OutOfMemory.into());
        assert!(first_sound(0..2, short).is_err() && all_sound(0..2, short).is_err());
    }

    #[test]
    fn a_size_is_rounded_up_to_pages() {
        assert_eq!(Region::new("tmem-test", 1).unwrap().bytes(), PAGE_SIZE);
    }

    #[test]
    #[should_panic]
    fn a_range_beyond_the_end_is_refused() {
        let region = Region::new("tmem-test", PAGE_SIZE).unwrap();
        drop(region.release(PAGE_SIZE, PAGE_SIZE));
    }
}
