//! The system calls: `bpf`, `perf_event_open`, and memory shared with the kernel.
//!
//! What the kernel is given the address of lives for as long as the call. Source: `include/uapi/linux/{bpf,perf_event}.h`.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::FreedError;
use super::program::{self, Instruction};

const MAP_CREATE: libc::c_long = 0;
const PROGRAM_LOAD: libc::c_long = 5;
const PROGRAM_RUN: libc::c_long = 10;

const MAP_KIND_ARRAY: u32 = 2;
const MAP_CAN_BE_MAPPED: u32 = 1 << 10;
const PROGRAM_MAY_SLEEP: u32 = 1 << 4;

const EVENT_CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;
const EVENT_ENABLE: libc::Ioctl = 0x2400;
const EVENT_SET_PROGRAM: libc::Ioctl = 0x4004_2408;

/// Some of the functions that a program of ours calls are for such only.
const LICENSE: &CStr = c"GPL";

/// What the kernel may say of a program that it does not take, and how much of that we pass on.
const LOG_BYTES: usize = 1 << 20;
const LOG_LINES: usize = 3;

/// What is needed to load programs.
pub(super) const NEEDS_BPF: &str = "CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN";

/// A kind of programs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(super) enum ProgramKind {
    /// Runs when a function of the kernel is called.
    Probe = 2,
    /// Runs when we run it.
    Call = 31,
}

#[derive(Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_bytes: u32,
    value_bytes: u32,
    elements: u32,
    flags: u32,
    inner: u32,
    node: u32,
    name: [u8; 16],
}

#[derive(Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct ProgramLoad {
    kind: u32,
    instructions: u32,
    first: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    version: u32,
    flags: u32,
    name: [u8; 16],
}

#[derive(Default, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct ProgramRun {
    program: u32,
    returned: u32,
    data_bytes: [u32; 2],
    data: [u64; 2],
    repeat: u32,
    duration: u32,
    context_bytes_in: u32,
    context_bytes_out: u32,
    context_in: u64,
    context_out: u64,
}

/// The first version of `struct perf_event_attr` that has all that we use.
#[derive(Default, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct Event {
    kind: u32,
    bytes: u32,
    config: u64,
    period: u64,
    sampled: u64,
    read: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    /// Of kprobes, the address of a function's name.
    function: u64,
    /// Where in the function.
    offset: u64,
}

/// # Safety
///
/// Addresses among the arguments are those of memory that lives, and is what the command takes for its own there.
unsafe fn bpf<T: IntoBytes>(command: libc::c_long, arguments: &mut T) -> io::Result<i32> {
    // SAFETY: `arguments` is so large, and the rest is the caller's to see to.
    let got = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(arguments), size_of::<T>())
    };
    if got < 0 { Err(io::Error::last_os_error()) } else { Ok(got as i32) }
}

/// # Safety
///
/// `fd` is open, and nobody else's.
unsafe fn own(fd: i32) -> OwnedFd {
    // SAFETY: as the caller promises.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn name(text: &str) -> [u8; 16] {
    let mut name = [0; 16];
    let length = text.len().min(15);
    name[..length].copy_from_slice(&text.as_bytes()[..length]);
    name
}

/// A map of so many words of 64 bits that can be mapped. Such descriptors are all closed when another program is executed.
pub(super) fn create_map(words: u32) -> io::Result<OwnedFd> {
    let mut arguments = MapCreate {
        kind: MAP_KIND_ARRAY,
        key_bytes: 4,
        value_bytes: 8,
        elements: words,
        flags: MAP_CAN_BE_MAPPED,
        inner: 0,
        node: 0,
        name: name("tmem_freed"),
    };
    // SAFETY: there are no addresses among the arguments.
    let fd = unsafe { bpf(MAP_CREATE, &mut arguments)? };
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { own(fd) })
}

/// Has the kernel look at a program, and keep it.
pub(super) fn load(
    kind: ProgramKind,
    what: &'static str,
    instructions: &[Instruction],
) -> Result<OwnedFd, FreedError> {
    let source = match load_once(kind, instructions, &mut []) {
        Ok(program) => return Ok(program),
        Err(source) if source.raw_os_error() == Some(libc::EPERM) => {
            return Err(FreedError::of("load a program into the kernel", NEEDS_BPF, source));
        }
        Err(source) => source,
    };
    let mut log = vec![0; LOG_BYTES];
    match load_once(kind, instructions, &mut log) {
        Ok(program) => Ok(program),
        Err(_) => Err(FreedError::Refused { what, source, log: last_lines(&log) }),
    }
}

fn load_once(
    kind: ProgramKind,
    instructions: &[Instruction],
    log: &mut [u8],
) -> io::Result<OwnedFd> {
    let flags = match kind {
        ProgramKind::Probe => 0,
        ProgramKind::Call => PROGRAM_MAY_SLEEP,
    };
    let mut arguments = ProgramLoad {
        kind: kind as u32,
        instructions: instructions.len() as u32,
        first: instructions.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        log_level: u32::from(!log.is_empty()),
        log_bytes: log.len() as u32,
        log: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
        version: 0,
        flags,
        name: name("tmem_freed"),
    };
    // SAFETY: instructions and license are read, and the log, which is ours alone, is written; each for as long as it is.
    let fd = unsafe { bpf(PROGRAM_LOAD, &mut arguments)? };
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { own(fd) })
}

/// The last lines that say anything of the program itself, in one.
fn last_lines(log: &[u8]) -> String {
    let text = log.split(|&byte| byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    // The last one tells how long it took.
    let is_of_it = |line: &&str| !line.trim().is_empty() && !line.starts_with("processed ");
    let mut lines: Vec<&str> = text.lines().rev().filter(is_of_it).take(LOG_LINES).collect();
    lines.reverse();
    lines.join("; ")
}

/// Where the kernel has something of that name.
pub(super) fn symbol(name: &str) -> Result<u64, FreedError> {
    const WHAT: &str = "looks up where swap areas are, for which it has to be Linux 5.16 or later,";
    const TRY: &str = "look up where the kernel keeps its swap areas";
    const NEEDS: &str = "CAP_SYSLOG, and kernel.kptr_restrict below 2";
    let program = load(ProgramKind::Call, WHAT, &program::look_up(name))?;
    let [address, returned] =
        run(program.as_fd()).map_err(|source| FreedError::of(TRY, NEEDS_BPF, source))?;
    match returned.cast_signed() {
        0 if address != 0 => Ok(address),
        0 => Err(FreedError::NoHook { what: "it does not say where swap areas are" }),
        error if error == i64::from(-libc::ENOENT) => {
            Err(FreedError::NoHook { what: "it does not say where swap areas are" })
        }
        error => Err(FreedError::of(
            TRY,
            NEEDS,
            io::Error::from_raw_os_error(error.unsigned_abs() as i32),
        )),
    }
}

/// Runs a program once, with two words of its own.
fn run(program: BorrowedFd<'_>) -> io::Result<[u64; 2]> {
    let mut words = [0, 0];
    let mut arguments = ProgramRun {
        program: program.as_raw_fd() as u32,
        context_bytes_in: size_of_val(&words) as u32,
        context_in: words.as_mut_ptr() as u64,
        ..ProgramRun::default()
    };
    // SAFETY: the words are read and written, and are so large.
    unsafe { bpf(PROGRAM_RUN, &mut arguments)? };
    Ok(words)
}

/// Listens at a function, for nothing yet. `kind` is the number of that kind of events.
pub(super) fn open_probe(kind: u32, function: &CStr) -> io::Result<OwnedFd> {
    let event = Event {
        kind,
        bytes: size_of::<Event>() as u32,
        function: function.as_ptr() as u64,
        ..Event::default()
    };
    // All processes on one processor; a program that is attached runs on each.
    let (process, processor, group) = (-1, 0, -1);
    // SAFETY: the event says how large it is, and the name lives.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            std::ptr::from_ref(&event),
            process,
            processor,
            group,
            EVENT_CLOSE_ON_EXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { own(fd as i32) })
}

/// Runs the program from now on whenever the event happens, and until that is closed.
pub(super) fn attach(event: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    for (request, argument) in [(EVENT_SET_PROGRAM, program.as_raw_fd()), (EVENT_ENABLE, 0)] {
        // SAFETY: both take a number.
        if unsafe { libc::ioctl(event.as_raw_fd(), request, argument) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A map's words, which the kernel's programs write at any time. They are all there, and stay: it is memory of the kernel's own.
#[derive(Debug)]
pub(super) struct Mapping {
    words: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: all of it is atomic, and it belongs to no thread.
unsafe impl Send for Mapping {}
// SAFETY: as before.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a map of so many words.
    pub(super) fn new(map: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: it goes where nothing is mapped.
        let start = unsafe { mmap(std::ptr::null_mut(), count * 8, protection, flags, map, 0)? };
        let words = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { words, count })
    }

    /// The words.
    pub(super) fn words(&self) -> &[AtomicU64] {
        // SAFETY: so many are mapped until this is dropped, and whoever writes them does so atomically.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.count) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped so, and nobody borrows it any more.
        let _ = unsafe { munmap(self.words.as_ptr().cast(), self.count * 8) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_as_large_as_the_kernels() {
        assert_eq!(size_of::<MapCreate>(), 44);
        assert_eq!(std::mem::offset_of!(ProgramLoad, log), 32);
        assert_eq!(std::mem::offset_of!(ProgramLoad, flags), 44);
        assert_eq!(std::mem::offset_of!(ProgramRun, context_bytes_in), 40);
        assert_eq!(std::mem::offset_of!(ProgramRun, context_in), 48);
        assert_eq!(std::mem::offset_of!(Event, function), 56);
        // PERF_ATTR_SIZE_VER1.
        assert_eq!(size_of::<Event>(), 72);
    }

    #[test]
    fn the_end_of_what_the_kernel_says_is_kept() {
        let log = b"0: (b7) r0 = 0\n1: (61) r1 = *(u32 *)(r1 +0)\n\nR1 is wrong\nprocessed 2 insns\n\0\0\0";
        assert_eq!(last_lines(log), "0: (b7) r0 = 0; 1: (61) r1 = *(u32 *)(r1 +0); R1 is wrong");
        assert_eq!(last_lines(&[0; 8]), "");
        assert_eq!(last_lines(&[]), "");
    }

    #[test]
    fn names_end_and_are_cut() {
        assert_eq!(&name("tmem")[..5], b"tmem\0");
        assert_eq!(name("a name that is too long")[15], 0);
    }

    #[test]
    fn words_of_a_file_are_shared() {
        use std::os::unix::fs::FileExt;
        use std::sync::atomic::Ordering;
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let mapping = Mapping::new(file.as_fd(), 1000).unwrap();
        assert_eq!(mapping.words().len(), 1000);
        mapping.words()[999].store(u64::from_le(7), Ordering::SeqCst);
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 999 * 8).unwrap();
        assert_eq!(bytes, [7, 0, 0, 0, 0, 0, 0, 0]);
    }
}
