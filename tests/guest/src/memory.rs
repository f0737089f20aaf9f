//! The memory under test: pages that may be swapped out, the versions they should hold (which may
//! not be), and reads that survive a page the kernel cannot bring back.

use crate::pattern::{PAGE, Page};
use std::io::Error;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Locks all that this process has mapped by now, or that and what it will map.
pub fn lock_all(what: LockAll) -> Result<(), String> {
    let flags = match what {
        LockAll::Present => libc::MCL_CURRENT,
        LockAll::PresentAndFuture => libc::MCL_CURRENT | libc::MCL_FUTURE,
    };
    // SAFETY: changes nothing but where our pages live.
    match unsafe { libc::mlockall(flags) } {
        0 => Ok(()),
        _ => Err(format!("mlockall: {}", Error::last_os_error())),
    }
}

/// What `lock_all` locks.
pub enum LockAll {
    /// What is mapped by now; what is mapped later may be swapped out.
    Present,
    /// That, and all that will be mapped.
    PresentAndFuture,
}

/// An anonymous private mapping, unmapped when dropped.
struct Mapping {
    at: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(len: usize) -> Result<Self, String> {
        // SAFETY: a new anonymous mapping touches no memory of ours.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        match at == libc::MAP_FAILED {
            true => Err(format!("mmap of {len} bytes: {}", Error::last_os_error())),
            false => Ok(Mapping { at: at.cast(), len }),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// Pages of plain anonymous memory. Only whole pages are copied in and out.
pub struct Memory {
    mapping: Mapping,
}

/// Where the last read stumbled over a page that could not be read, and whether it did.
static UNREADABLE: AtomicBool = AtomicBool::new(false);
static GUARD_START: AtomicUsize = AtomicUsize::new(0);
static GUARD_END: AtomicUsize = AtomicUsize::new(0);

impl Memory {
    /// Maps `pages` pages; while this lives, a SIGBUS in them is survived and reported by `read`.
    pub fn new(pages: u64) -> Result<Self, String> {
        let mapping = Mapping::new(pages as usize * PAGE)?;
        GUARD_START.store(mapping.at as usize, Ordering::Relaxed);
        GUARD_END.store(mapping.at as usize + mapping.len, Ordering::Relaxed);
        // SAFETY: the handler makes only system calls and touches only atomics.
        let refused = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) != 0
        };
        match refused {
            true => Err(format!("sigaction: {}", Error::last_os_error())),
            false => Ok(Memory { mapping }),
        }
    }

    fn page(&self, number: u64) -> *mut u8 {
        let offset = number as usize * PAGE;
        assert!(offset < self.mapping.len, "page {number} is outside the memory under test");
        // SAFETY: the offset is inside the mapping.
        unsafe { self.mapping.at.add(offset) }
    }

    /// Copies a page out; `false` if the kernel could not bring it back. It is then zeros.
    #[must_use]
    pub fn read(&self, number: u64, page: &mut Page) -> bool {
        // SAFETY: the source is a whole page of the mapping, which is always mapped (the handler
        // of SIGBUS puts a fresh page in place of an unreadable one), and nothing else writes it.
        unsafe { ptr::copy_nonoverlapping(self.page(number), page.as_mut_ptr(), PAGE) };
        !UNREADABLE.swap(false, Ordering::SeqCst)
    }

    /// Reads the first byte of a page, and with it whatever it takes to have the page in memory.
    pub fn touch(&self, number: u64) {
        // SAFETY: a byte of the mapping, which is always mapped.
        unsafe { ptr::read_volatile(self.page(number)) };
    }

    /// Copies a page in. `false` if the old one could not be brought back for it.
    #[must_use]
    pub fn write(&mut self, number: u64, page: &Page) -> bool {
        // SAFETY: the target is a whole page of the mapping, and we hold it exclusively.
        unsafe { ptr::copy_nonoverlapping(page.as_ptr(), self.page(number), PAGE) };
        !UNREADABLE.swap(false, Ordering::SeqCst)
    }

    /// Gives pages back to the kernel; they read as zeros until they are written.
    pub fn free(&mut self, number: u64, pages: u64) -> Result<(), String> {
        self.page(number + pages - 1);
        // SAFETY: the range is inside the mapping, and no reference points into it.
        let rc = unsafe {
            libc::madvise(self.page(number).cast(), pages as usize * PAGE, libc::MADV_DONTNEED)
        };
        match rc {
            0 => Ok(()),
            _ => Err(format!("madvise: {}", Error::last_os_error())),
        }
    }
}

/// Puts a fresh page where the kernel has none, so that the access succeeds and can be reported.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo, which for SIGBUS has an address.
    let at = unsafe { (*info).si_addr() } as usize;
    let ours = at >= GUARD_START.load(Ordering::Relaxed) && at < GUARD_END.load(Ordering::Relaxed);
    // SAFETY: one page inside the memory under test is replaced; `_exit` is safe in a handler.
    unsafe {
        let fresh = libc::mmap(
            if ours { (at & !(PAGE - 1)) as *mut _ } else { ptr::null_mut() },
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | if ours { libc::MAP_FIXED } else { 0 },
            -1,
            0,
        );
        if !ours || fresh == libc::MAP_FAILED {
            libc::_exit(128 + libc::SIGBUS);
        }
    }
    UNREADABLE.store(true, Ordering::SeqCst);
}

const FREED: u32 = 1 << 31;

/// The version that each page should hold. Locked in memory: what is tested must not hold the
/// yardstick.
pub struct Versions {
    mapping: Mapping,
}

impl Versions {
    /// No page has been written yet.
    pub fn new(pages: u64) -> Result<Self, String> {
        let mapping = Mapping::new(pages as usize * size_of::<u32>())?;
        // SAFETY: locks a mapping of ours.
        match unsafe { libc::mlock(mapping.at.cast(), mapping.len) } {
            0 => Ok(Versions { mapping }),
            _ => Err(format!("mlock: {}", Error::last_os_error())),
        }
    }

    fn word(&self, number: u64) -> *mut u32 {
        let offset = number as usize * size_of::<u32>();
        assert!(offset < self.mapping.len, "page {number} is outside the memory under test");
        // SAFETY: inside the mapping, which is aligned to a page.
        unsafe { self.mapping.at.add(offset).cast() }
    }

    /// The version that the page holds, or `None` while it is zeros.
    pub fn get(&self, number: u64) -> Option<u32> {
        // SAFETY: a valid word; nothing writes it while we are borrowed.
        let word = unsafe { *self.word(number) };
        (word & FREED == 0 && word != 0).then_some(word)
    }

    /// The version for the next write of the page, higher than any before.
    pub fn bump(&mut self, number: u64) -> u32 {
        // SAFETY: a valid word, borrowed exclusively.
        let word = unsafe { &mut *self.word(number) };
        *word = (*word & !FREED) + 1;
        *word
    }

    /// The page is zeros from now on.
    pub fn free(&mut self, number: u64) {
        // SAFETY: a valid word, borrowed exclusively.
        unsafe { *self.word(number) |= FREED };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_pages_are_zeros_and_versions_only_grow() {
        let mut memory = Memory::new(4).unwrap();
        let mut versions = Versions::new(4).unwrap();
        let mut page = [7; PAGE];
        assert_eq!(versions.get(2), None);
        assert_eq!(versions.bump(2), 1);
        assert!(memory.write(2, &page));
        memory.free(1, 2).unwrap();
        versions.free(2);
        assert_eq!(versions.get(2), None);
        assert!(memory.read(2, &mut page));
        assert_eq!(page, [0; PAGE]);
        assert_eq!(versions.bump(2), 2);
        assert_eq!(versions.get(2), Some(2));
    }
}
