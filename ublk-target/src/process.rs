//! Makes the process fit to serve swap: it must not wait for the memory that it is there to free.
//!
//! [`prepare`] goes first in `main`, before any thread is started: what it sets is inherited by
//! threads (io_uring's workers too) but never given to those that run already. Each setting is
//! read back from the kernel and not assumed; [`verify_threads`] does so for every thread at
//! last. Threads that I/O needs are started with [`spawn_essential`]: if one dies, all die.
//!
//! This file has `unsafe` for calls into libc and nothing else.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{CString, OsString};
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Builder, JoinHandle};

use rustix::fs::{Mode, OFlags};
use rustix::mm::MlockAllFlags;
use rustix::mount::MountPropagationFlags;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// The nice value of the highest weight among ordinary threads.
pub const NICE_MIN: i32 = -20;

/// Stack of a thread. All of it is locked memory from the start, so it is small, and yet several times what any of ours has been seen to use.
const STACK_BYTES: usize = 128 << 10;

/// Allocations from this size on are mapped, and unmapped when freed, in place of glibc's rule
/// that learns: what is large and goes is given back.
const HEAP_MMAP_THRESHOLD: libc::c_int = 64 << 10;

/// The kernel's `PF_MEMALLOC_NOIO`: allocations on behalf of the thread start no I/O.
const PF_MEMALLOC_NOIO: u64 = 1 << 19;

/// The kernel's `PF_LOCAL_THROTTLE`: the thread is throttled only by what it dirties itself.
const PF_LOCAL_THROTTLE: u64 = 1 << 20;

/// Bit of `CAP_IPC_LOCK` in a capability set.
const CAP_IPC_LOCK: u64 = 1 << 14;

const OOM_SCORE_ADJ: &str = "-1000";

/// Why the process is not fit to serve swap.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// Threads that run already cannot be given what new ones inherit.
    #[error("{count} threads run already: the process must be hardened before it starts any")]
    Threads {
        /// How many run.
        count: usize,
    },
    /// The heap could not be kept small.
    #[error("the C library refused to limit the heap: run with MALLOC_ARENA_MAX=1 set")]
    Heap,
    /// Users of a device in the daemon's own mount namespace can deadlock its exit.
    #[error(
        "cannot get a mount namespace of its own ({source}): run as root with CAP_SYS_ADMIN, \
         outside of an unprivileged container"
    )]
    MountNamespace {
        /// The system call's error, or what was read back.
        source: io::Error,
    },
    /// Without it, memory allocated to serve a write may wait for that very write.
    #[error(
        "cannot set PR_SET_IO_FLUSHER ({source}): swap could deadlock under memory pressure; run \
         as root with CAP_SYS_RESOURCE on Linux 5.6 or newer"
    )]
    IoFlusher {
        /// The system call's error, or what was read back.
        source: io::Error,
    },
    /// The out-of-memory killer could take the daemon, and all that is swapped with it.
    #[error(
        "cannot set oom_score_adj to {OOM_SCORE_ADJ} ({source}): run as root with \
         CAP_SYS_RESOURCE, or let the service manager set it (OOMScoreAdjust={OOM_SCORE_ADJ})"
    )]
    OomScore {
        /// The system call's error, or what was read back.
        source: io::Error,
    },
    /// The daemon's own memory could be swapped out, to itself.
    #[error(
        "cannot lock all memory ({source}): run as root with CAP_IPC_LOCK, or raise the limit \
         (ulimit -l unlimited, LimitMEMLOCK=infinity)"
    )]
    LockMemory {
        /// The system call's error, or what was read back.
        source: io::Error,
    },
    /// A core dump would hold other users' memory, and keep the device waiting while it is written.
    #[error("cannot forbid core dumps ({source})")]
    Dumps {
        /// The system call's error, or what was read back.
        source: io::Error,
    },
    /// A thread that runs without what it should have inherited.
    #[error(
        "thread {tid} ({name}) may start I/O to get memory: it was started before the process \
         was hardened; this is a defect, please report it"
    )]
    Unprotected {
        /// The thread.
        tid: u32,
        /// Its name.
        name: String,
    },
    /// The threads could not be looked at.
    #[error("cannot read {path} ({source}): mount /proc")]
    Proc {
        /// What was to be read.
        path: String,
        /// The error.
        source: io::Error,
    },
}

/// Whose mount namespace this process has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mounts {
    /// The one that it was started with by others, which it is to leave.
    Leave,
    /// The one that its supervisor has moved to. They share it, for the kernel names swap by where its device was in the
    /// namespace of who switched it on, and only as long as there is that namespace.
    Left,
}

/// Hardens the process. Call it first in `main`.
///
/// With `best_effort` what cannot be had is returned as warnings, and is the caller's to tell
/// the user; otherwise the first such thing is an error.
pub fn prepare(best_effort: bool, mounts: Mounts) -> Result<Vec<ProcessError>, ProcessError> {
    let count = list_threads()?.len();
    if count != 1 {
        return Err(ProcessError::Threads { count });
    }
    hold_signals();
    let steps: [fn() -> Result<(), ProcessError>; 6] = [
        limit_heap,
        match mounts {
            Mounts::Leave => leave_mount_namespace,
            Mounts::Left => check_mount_namespace,
        },
        become_io_flusher,
        refuse_oom_kill,
        lock_memory,
        forbid_dumps,
    ];
    let mut warnings = Vec::new();
    for step in steps {
        match step() {
            Ok(()) => {}
            Err(error) if best_effort => warnings.push(error),
            Err(error) => return Err(error),
        }
    }
    open_last_words();
    HARDENED.store(true, Ordering::Relaxed);
    raise_session();
    Ok(warnings)
}

/// Checks that no thread of the process, io_uring's workers included, may start I/O to get memory.
pub fn verify_threads() -> Result<(), ProcessError> {
    for tid in list_threads()? {
        let path = format!("/proc/self/task/{tid}/stat");
        let stat = match fs::read_to_string(&path) {
            Ok(stat) => stat,
            // It has ended since.
            Err(error) if !fs::exists(&path).unwrap_or(true) => {
                drop(error);
                continue;
            }
            Err(source) => return Err(ProcessError::Proc { path, source }),
        };
        let Some((name, flags)) = parse_stat(&stat) else {
            let source = io::ErrorKind::InvalidData.into();
            return Err(ProcessError::Proc { path, source });
        };
        let wanted = PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE;
        if flags & wanted != wanted {
            return Err(ProcessError::Unprotected { tid, name: name.to_owned() });
        }
    }
    Ok(())
}

/// From now on the process ends if this thread panics: what it has made must not be taken down again by that.
pub fn become_essential() -> impl Drop {
    ESSENTIAL.set(true);
    FatalOnUnwind
}

/// Starts a thread with a small stack that takes no signals, which would interrupt io_uring.
pub fn spawn<T, F>(name: String, body: F) -> io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || {
        block_signals();
        body()
    })
}

/// As [`spawn`], for a thread without which the daemon is worse than dead: if it panics, the
/// process ends.
pub fn spawn_essential<T, F>(name: String, body: F) -> io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    spawn(name, move || {
        ESSENTIAL.set(true);
        let _guard = FatalOnUnwind;
        body()
    })
}

/// Makes this thread one that serves requests: of the highest weight (nice -20), at which it is next when its
/// processor is given up, and of the batch class, in which one that is woken lets who runs go on.
///
/// A class other than the ordinary one that somebody has given the daemon stays. Where the weight is
/// refused (CAP_SYS_NICE, or a limit on nice) nothing changes: the thread waits for its turn among all others
/// on its processor, and who waits for a page does so as well.
pub fn become_server() {
    if rustix::process::setpriority_process(None, NICE_MIN).is_err() {
        return;
    }
    // SAFETY: the call has no memory of ours, and 0 is this thread.
    if unsafe { libc::sched_getscheduler(0) } == libc::SCHED_OTHER {
        let _ = set_class(libc::SCHED_BATCH, 0);
    }
}

/// Gives the session the highest weight, if it is ours alone. Weights of threads count within a session only, where
/// the kernel schedules sessions as groups (`sched_autogroup_enabled`); it does so by default.
fn raise_session() {
    if rustix::process::getsid(None) == Ok(rustix::process::getpid()) {
        // Without such groups there is no file.
        let _ = std::fs::write("/proc/self/autogroup", NICE_MIN.to_string());
    }
}

/// Makes this thread one of the real-time class, of the lowest priority there.
///
/// That is for what the kernel allocates on its behalf: such a thread gets memory below the reserve
/// that everybody else has to leave, down to half of it.
pub fn become_urgent() -> io::Result<()> {
    // What the thread starts is not urgent.
    set_class(libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, 1)
}

/// Sees to it that so many bytes of the heap can be had from now on without asking the kernel. What is freed
/// stays with the process as well, however large it is.
pub fn keep_heap(bytes: usize) {
    #[cfg(target_env = "gnu")]
    {
        // The most that is taken.
        let settings = [(libc::M_MMAP_THRESHOLD, 32 << 20), (libc::M_TRIM_THRESHOLD, i32::MAX)];
        for (setting, value) in settings {
            // SAFETY: mallopt takes two numbers. Without it the heap is as it was.
            unsafe { libc::mallopt(setting, value) };
        }
    }
    // In pieces, for what is larger than that threshold does not come from the heap. All of it is locked, and so it is there
    // once the allocator has it.
    const PIECE: usize = 1 << 20;
    let pieces: Vec<_> = (0..bytes.div_ceil(PIECE)).map(|_| vec![1_u8; PIECE]).collect();
    drop(std::hint::black_box(pieces));
}

/// Makes this thread an ordinary one again.
pub fn become_calm() {
    // Nobody is refused that.
    let _ = set_class(libc::SCHED_OTHER, 0);
}

/// Names this thread.
pub fn name_thread(name: &str) {
    // It is for people alone; the kernel keeps fifteen bytes of it.
    if let Ok(name) = CString::new(name) {
        let _ = rustix::thread::set_name(&name);
    }
}

/// Sets this thread's scheduling class, and its priority there.
fn set_class(policy: i32, priority: i32) -> io::Result<()> {
    // SAFETY: all zeros is a scheduling parameter.
    let mut parameter: libc::sched_param = unsafe { std::mem::zeroed() };
    parameter.sched_priority = priority;
    // SAFETY: the call reads the parameter, and 0 is this thread.
    match unsafe { libc::sched_setscheduler(0, policy, &parameter) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A command that runs `program` without what it would inherit from this process and must not have:
/// the blocked signals, and the mark of one that writes out memory. A program that swaps off under
/// that mark could wait for ever for memory that only its own I/O can free.
///
/// Our own binary is run first, for [`become_program`]. The mark is not taken off here, for the time
/// that it takes to start a program: this thread would then reclaim memory like any other, and could
/// wait for our device with a lock held that the threads which serve it need.
pub fn program(program: &Path) -> Command {
    if !HARDENED.load(Ordering::Relaxed) {
        return Command::new(program);
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg(BECOME_PROGRAM).arg(program);
    command
}

/// The first argument with which our binary is to go on as another program.
pub const BECOME_PROGRAM: &str = "become-program";

/// Goes on as the program that the arguments name, its file first, unmarked and with no signal
/// blocked. Returns only if that fails.
pub fn become_program(mut args: impl Iterator<Item = OsString>) -> io::Error {
    let Some(program) = args.next() else {
        return io::Error::other("there is no program to become");
    };
    // Without the privilege to take the mark off there was none to set it.
    let _ = rustix::process::configure_io_flusher_behavior(false);
    set_signals(&no_signals());
    Command::new(program).args(args).exec()
}

/// Says something in the kernel's log. Neither allocates nor blocks nor fails.
pub fn note(what: fmt::Arguments<'_>) {
    let mut line = [0; 512];
    let used = format_line(&mut line, format_args!("<4>tmem: {what}"));
    last_word(&line[..used]);
}

/// Ends the process at once, saying why in the kernel's log. Neither allocates nor blocks.
pub fn fatal(why: fmt::Arguments<'_>) -> ! {
    let mut line = [0; 512];
    let used = format_line(&mut line, format_args!("<2>tmem: fatal: {why}"));
    last_word(&line[..used]);
    std::process::abort()
}

/// Writes as much of `what` as fits into `line`, with the end of a line, and says how much that is. (Without an end the
/// kernel shows a line only once there is another.)
fn format_line(line: &mut [u8], what: fmt::Arguments<'_>) -> usize {
    let whole = line.len() - 1;
    let mut rest = &mut line[..whole];
    // What does not fit is cut off.
    let _ = rest.write_fmt(what);
    let used = whole - rest.len();
    line[used] = b'\n';
    used + 1
}

fn last_word(line: &[u8]) {
    if let Some(kmsg) = LAST_WORDS.get() {
        let _ = rustix::io::write(kmsg, line);
    }
}

/// Whether [`prepare`] has been here.
static HARDENED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static ESSENTIAL: Cell<bool> = const { Cell::new(false) };
}

/// The kernel's log: writing to it never blocks. Standard error may be read by a process that
/// waits to be swapped in by us.
static LAST_WORDS: OnceLock<OwnedFd> = OnceLock::new();

struct FatalOnUnwind;

impl Drop for FatalOnUnwind {
    fn drop(&mut self) {
        if std::thread::panicking() {
            fatal(format_args!("a thread that I/O depends on panicked"));
        }
    }
}

fn open_last_words() {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    if let Ok(kmsg) = rustix::fs::open("/dev/kmsg", flags, Mode::empty()) {
        let _ = LAST_WORDS.set(kmsg);
    }
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if ESSENTIAL.get() {
            fatal(format_args!("{info}"));
        }
        default_hook(info);
    }));
}

fn limit_heap() -> Result<(), ProcessError> {
    #[cfg(target_env = "gnu")]
    {
        let settings = [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, HEAP_MMAP_THRESHOLD)];
        for (setting, value) in settings {
            // SAFETY: mallopt takes two numbers, and no other thread runs.
            if unsafe { libc::mallopt(setting, value) } != 1 {
                return Err(ProcessError::Heap);
            }
        }
    }
    Ok(())
}

/// Moves to a mount namespace that still follows the system's mounts (so that what is unmounted
/// there is not kept busy here) but passes none on.
fn leave_mount_namespace() -> Result<(), ProcessError> {
    let attempt = || {
        let before = fs::read_link("/proc/self/ns/mnt")?;
        // SAFETY: only the mount namespace is left; file descriptors stay shared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
        let follow = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", follow)?;
        if fs::read_link("/proc/self/ns/mnt")? == before {
            return Err(io::Error::other("the namespace did not change"));
        }
        Ok(())
    };
    attempt().map_err(|source| ProcessError::MountNamespace { source })?;
    check_mount_namespace()
}

/// Does this in another mount namespace, in a thread of its own: the rest of the process stays where it is.
pub fn in_mount_namespace<T: Send>(
    namespace: BorrowedFd<'_>,
    what: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let inside = move || {
        // SAFETY: root and working directory are this thread's alone from here on; file descriptors stay shared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))?;
        what()
    };
    thread::scope(|scope| {
        // The C library keeps its stack for the next one.
        let thread = Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, inside)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

/// Sees to it that what is mounted or unmounted here is so nowhere else.
fn check_mount_namespace() -> Result<(), ProcessError> {
    let attempt = || {
        if fs::read_to_string("/proc/self/mountinfo")?.lines().any(is_shared_mount) {
            return Err(io::Error::other("mounts are still shared"));
        }
        Ok(())
    };
    attempt().map_err(|source| ProcessError::MountNamespace { source })
}

fn become_io_flusher() -> Result<(), ProcessError> {
    let attempt = || {
        rustix::process::configure_io_flusher_behavior(true)?;
        let stat = fs::read_to_string("/proc/thread-self/stat")?;
        let flags = parse_stat(&stat).map_or(0, |(_, flags)| flags);
        let wanted = PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE;
        if flags & wanted != wanted {
            return Err(io::Error::other(format!("thread flags are {flags:#x}")));
        }
        Ok(())
    };
    attempt().map_err(|source| ProcessError::IoFlusher { source })
}

fn refuse_oom_kill() -> Result<(), ProcessError> {
    const PATH: &str = "/proc/self/oom_score_adj";
    let attempt = || {
        // The service manager may have set it already, and we may not be allowed to.
        if fs::read_to_string(PATH)?.trim() != OOM_SCORE_ADJ {
            fs::write(PATH, OOM_SCORE_ADJ)?;
        }
        match fs::read_to_string(PATH)?.trim() {
            OOM_SCORE_ADJ => Ok(()),
            found => Err(io::Error::other(format!("it is {found}"))),
        }
    };
    attempt().map_err(|source| ProcessError::OomScore { source })
}

fn lock_memory() -> Result<(), ProcessError> {
    let attempt = || {
        let unlimited = Rlimit { current: None, maximum: None };
        let raised = rustix::process::setrlimit(Resource::Memlock, unlimited);
        let status = fs::read_to_string("/proc/self/status")?;
        let capable = status_hex(&status, "CapEff").is_some_and(|caps| caps & CAP_IPC_LOCK != 0);
        // With a limit in force, allocations would fail once it is reached.
        if !capable {
            raised?;
        }
        rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE)?;
        let status = fs::read_to_string("/proc/self/status")?;
        match status_kib(&status, "VmLck") {
            Some(locked) if locked > 0 => Ok(()),
            found => Err(io::Error::other(format!("VmLck is {found:?}"))),
        }
    };
    attempt().map_err(|source| ProcessError::LockMemory { source })
}

fn forbid_dumps() -> Result<(), ProcessError> {
    let attempt = || {
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
        match rustix::process::dumpable_behavior()? {
            DumpableBehavior::NotDumpable => Ok(()),
            found => Err(io::Error::other(format!("it is {found:?}"))),
        }
    };
    attempt().map_err(|source| ProcessError::Dumps { source })
}

/// Blocks what would stop or end the process by default: a daemon that Ctrl-Z suspends hangs whoever
/// swaps to it. What asks it to end is taken on this thread; faults cannot be blocked.
pub fn hold_signals() {
    let mut held = all_signals();
    for taken in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: the set is initialised, and the signal is one that exists.
        unsafe { libc::sigdelset(&raw mut held, taken) };
    }
    set_signals(&held);
}

/// Blocks all signals, on this thread. Those that come wait, also for another program that this process goes on as.
pub fn block_signals() {
    set_signals(&all_signals());
}

fn all_signals() -> libc::sigset_t {
    let mut all = MaybeUninit::uninit();
    // SAFETY: sigfillset initialises the set that it is given, and cannot fail.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        all.assume_init()
    }
}

fn no_signals() -> libc::sigset_t {
    let mut none = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set that it is given, and cannot fail.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        none.assume_init()
    }
}

/// Blocks these signals and no others on this thread.
fn set_signals(blocked: &libc::sigset_t) {
    // SAFETY: the set is initialised, and it cannot fail with these arguments.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, blocked, ptr::null_mut()) };
}

fn list_threads() -> Result<Vec<u32>, ProcessError> {
    const PATH: &str = "/proc/self/task";
    let attempt = || {
        let mut tids = Vec::new();
        for entry in fs::read_dir(PATH)? {
            tids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
        }
        Ok(tids)
    };
    attempt().map_err(|source| ProcessError::Proc { path: PATH.into(), source })
}

/// The name and the kernel's flags of a thread, from its `stat`. The name may hold anything.
fn parse_stat(stat: &str) -> Option<(&str, u64)> {
    let (head, tail) = stat.rsplit_once(')')?;
    let (_, name) = head.split_once('(')?;
    let flags = tail.split_ascii_whitespace().nth(6)?;
    Some((name, flags.parse().ok()?))
}

/// True for a line of `mountinfo` whose mount passes its events on.
fn is_shared_mount(line: &str) -> bool {
    line.split(' ').skip(6).take_while(|field| *field != "-").any(|f| f.starts_with("shared:"))
}

fn status_field<'a>(status: &'a str, field: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).map(str::trim)
}

fn status_kib(status: &str, field: &str) -> Option<u64> {
    status_field(status, field)?.strip_suffix(" kB")?.parse().ok()
}

fn status_hex(status: &str, field: &str) -> Option<u64> {
    u64::from_str_radix(status_field(status, field)?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field 41 of the line: the policy of this thread.
    fn policy() -> String {
        let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
        let fields = stat.rsplit_once(')').unwrap().1;
        fields.split_ascii_whitespace().nth(38).unwrap().to_owned()
    }

    fn nice() -> i32 {
        rustix::process::getpriority_process(None).unwrap()
    }

    #[test]
    fn a_thread_that_serves_requests_is_one_alone() {
        let before = (policy(), nice());
        let server = std::thread::spawn(|| {
            become_server();
            (policy(), nice())
        });
        let may = || rustix::process::setpriority_process(None, NICE_MIN).is_ok();
        let expected = match std::thread::spawn(may).join().unwrap() {
            // SCHED_BATCH takes the place of the ordinary class, and of no other.
            true if before.0 == "0" => ("3".to_owned(), NICE_MIN),
            true => (before.0.clone(), NICE_MIN),
            false => before.clone(),
        };
        assert_eq!(server.join().unwrap(), expected);
        assert_eq!((policy(), nice()), before);
    }

    #[test]
    fn an_urgent_thread_is_one_alone() {
        match become_urgent() {
            Ok(()) => {
                // SCHED_RR.
                assert_eq!(policy(), "2");
                assert_eq!(std::thread::spawn(policy).join().unwrap(), "0");
            }
            // Not allowed here: then nothing has changed.
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
                assert_eq!(policy(), "0");
            }
        }
    }

    #[test]
    fn thread_flags_are_found_after_any_name() {
        let stat = "12 (tmem) q) 0) S 1 12 12 0 -1 1572928 45 0 0 0 0 0 0 0 20 0 4 0 81";
        assert_eq!(parse_stat(stat), Some(("tmem) q) 0", 0x18_0040)));
        assert_eq!(parse_stat("12 (x) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn status_fields_are_read_with_their_units() {
        let status = "Name:\tVmLck: 7\nVmLck:\t     132 kB\nCapEff:\t000001fffeffffff\n";
        assert_eq!(status_kib(status, "VmLck"), Some(132));
        assert_eq!(status_hex(status, "CapEff"), Some(0x1ff_feff_ffff));
        assert_eq!(status_kib(status, "VmPin"), None);
    }

    #[test]
    fn shared_mounts_are_told_from_names() {
        let slave = "25 30 0:22 / /shared:1 rw,nosuid master:7 - sysfs shared:3 rw";
        assert!(!is_shared_mount(slave));
        assert!(is_shared_mount("25 30 0:22 / /sys rw,nosuid shared:7 master:3 - sysfs sysfs rw"));
    }

    #[test]
    fn a_process_with_threads_cannot_be_hardened() {
        // The test harness has a thread of its own beside this one.
        let waits = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| waits.wait());
            assert!(matches!(
                prepare(true, Mounts::Leave),
                Err(ProcessError::Threads { count: 2.. })
            ));
            waits.wait();
        });
    }

    /// Without CAP_SYS_RESOURCE this is refused, and must say what is missing.
    #[test]
    fn io_flusher_is_set_or_says_what_it_needs() {
        match become_io_flusher() {
            Ok(()) => assert!(rustix::process::is_io_flusher().unwrap()),
            Err(error @ ProcessError::IoFlusher { .. }) => {
                assert!(error.to_string().contains("CAP_SYS_RESOURCE"), "{error}");
                let ProcessError::IoFlusher { source } = &error else { unreachable!() };
                assert_eq!(source.raw_os_error(), Some(libc::EPERM), "{error}");
                assert!(matches!(verify_threads(), Err(ProcessError::Unprotected { .. })));
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_long_line_is_cut_and_ended() {
        let mut line = [0; 8];
        assert_eq!(format_line(&mut line, format_args!("{}", 123)), 4);
        assert_eq!(format_line(&mut line, format_args!("{}-{}", 12345, 67890)), 8);
        assert_eq!(&line, b"12345-6\n");
    }

    #[test]
    fn essential_threads_take_no_signals() {
        let status = spawn_essential("tmem-test".into(), || {
            fs::read_to_string("/proc/thread-self/status").unwrap()
        });
        let status = status.unwrap().join().unwrap();
        let blocked = status_hex(&status, "SigBlk").unwrap();
        assert_ne!(blocked & 1 << (libc::SIGTERM - 1), 0, "{blocked:x}");
        assert_eq!(status_field(&status, "Name"), Some("tmem-test"));
    }
}
