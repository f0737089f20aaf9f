//! The thread that writes cold frames to the backing file, and cleans there.
//!
//! What is to be done the engine says ([`Writeback`]); this does it, by an io_uring of its own, several jobs at
//! a time. Queues wake it when the pool runs low; nobody's I/O waits for it longer than the front end's
//! bound. Once it runs it allocates nothing. It dies only with the process.
//!
//! This file has `unsafe` for the buffers that the kernel works on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use rustix::time::{ClockId, clock_gettime};
use tmem::{Engine, Job, JobFailed, Writeback};

use super::file::BackingFile;
use super::reopen::Claim;
use super::shared::{Backing, Condition};
use super::transfer::{Next, Transfer};
use super::unanswered::Lookout;
use crate::process;
use crate::uring::Uring;

/// How soon the thread looks again when nobody wakes it, and how often it gives back what it does not need.
const PERIOD: Duration = Duration::from_secs(1);

/// How often it looks for pages that the kernel has freed, at most: with a large device that is some work.
const FREED_PERIOD: Duration = Duration::from_millis(5);

/// How much of that it flushes at a time, in steps of the engine.
const FREED_STEPS: usize = 8;

/// How long it waits at its end for I/O that is under way.
const END_LIMIT: Duration = Duration::from_secs(5);

/// How soon it is tried again to get hold of a file, and from when on that is worth a word.
const CLAIM_PERIOD: Duration = Duration::from_millis(10);
const CLAIM_SLOW: Duration = Duration::from_secs(3);

/// More jobs than the engine has under way at a time.
const JOBS_MAX: usize = 16;

/// How long after a read that failed the file is said to be failing, in nanoseconds.
const FAILING_PERIOD: u64 = 5_000_000_000;

/// How often it is told how the file fares, in nanoseconds, at most.
const CHANGE_PERIOD: u64 = 5_000_000_000;

/// How often reads that fail are told of, in nanoseconds.
const TELL_PERIOD: u64 = 60_000_000_000;

/// Marks the completion of the watch of who wakes the thread; a job's is its unit.
const WOKEN: u64 = u64::MAX;

/// The running thread. Stops it when dropped.
pub struct Driver {
    backing: Arc<Backing>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A thread that waits for what it is to drive.
pub struct Ready {
    start: Sender<Start>,
    driver: Driver,
}

/// What it is to drive.
struct Start {
    engine: Arc<Engine>,
    writeback: Writeback,
    /// What it has to get hold of first, where another process has written before.
    claim: Option<Claim>,
}

impl Driver {
    /// Starts the thread, with all that it needs, so that a file that was attached is driven for certain.
    pub fn prepare(backing: Arc<Backing>) -> io::Result<Ready> {
        let (start, starts) = channel::<Start>();
        let (ready, readiness) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&backing), Arc::clone(&stop));
        let body = move || {
            // The ring is for the thread that makes it alone.
            match Uring::new(2 * JOBS_MAX as u32) {
                Ok(uring) => {
                    let _ = ready.send(Ok(()));
                    // Nothing comes if no file could be attached.
                    if let Ok(Start { engine, mut writeback, claim }) = starts.recv()
                        && let Some(held) =
                            hold(&shared, &stopped, claim, || writeback.stand_still(&engine))
                    {
                        let held = held.as_ref();
                        Loop::new(&engine, &shared, &stopped, uring, writeback, held).run();
                    }
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        };
        let thread = process::spawn_essential("tmem-writeback".into(), body)?;
        let driver = Driver { backing, stop, thread: Some(thread) };
        match readiness.recv() {
            Ok(Ok(())) => Ok(Ready { start, driver }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the thread ended")),
        }
    }
}

impl Ready {
    /// Lets the thread write to this file.
    pub fn drive(self, engine: Arc<Engine>, mut file: BackingFile, writeback: Writeback) -> Driver {
        file.keep();
        self.driver.backing.set_file(file);
        self.start(Start { engine, writeback, claim: None })
    }

    /// Lets the thread write to the file that is read already, as soon as it has hold of it.
    pub fn go_on(self, engine: Arc<Engine>, writeback: Writeback, claim: Claim) -> Driver {
        self.start(Start { engine, writeback, claim: Some(claim) })
    }

    fn start(self, start: Start) -> Driver {
        // The thread has nothing to do but wait for it.
        let _ = self.start.send(start);
        self.driver
    }
}

/// Waits for hold of a file that another process has written to; with none, it is ours already. None if the thread
/// is to stop first. Where it takes long, or fails, that is told of, and nobody is to wait for it.
fn hold(
    backing: &Backing,
    stop: &AtomicBool,
    claim: Option<Claim>,
    stand_still: impl FnOnce(),
) -> Option<Option<OwnedFd>> {
    let Some(claim) = claim else { return Some(None) };
    let begun = Instant::now();
    let (mut stand_still, mut told) = (Some(stand_still), None);
    while !stop.load(Ordering::SeqCst) {
        let error = match claim.try_take() {
            Ok(Some(file)) => return Some(Some(file)),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        let is_news = told != Some(error.is_some());
        if is_news && (error.is_some() || begun.elapsed() > CLAIM_SLOW) {
            told = Some(error.is_some());
            if let Some(stand_still) = stand_still.take() {
                stand_still();
            }
            tell_unheld(backing, error);
        }
        sleep(CLAIM_PERIOD);
    }
    None
}

/// Tells that a file is not to be had for writing: for an error, or because somebody else has it.
fn tell_unheld(backing: &Backing, error: Option<io::Error>) {
    match error {
        None => {
            let _ = backing.note(Condition::Late);
            process::note(format_args!(
                "the backing file is still held by the process that died: pages stay in memory"
            ));
        }
        Some(error) => {
            backing.failed(error.raw_os_error().unwrap_or(0));
            let _ = backing.note(Condition::Failing);
            process::note(format_args!(
                "the backing file cannot be opened to be written ({error}): pages stay in memory"
            ));
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.backing.waker().wake();
        if let Some(thread) = self.thread.take() {
            // A panic in it would have ended the process.
            let _ = thread.join();
        }
    }
}

/// What the thread does.
struct Loop<'a> {
    engine: &'a Engine,
    backing: &'a Backing,
    stop: &'a AtomicBool,
    file: &'a BackingFile,
    /// By which the file is written: it tells others that we do.
    held: BorrowedFd<'a>,
    uring: Uring,
    writeback: Writeback,
    /// Jobs under way, by unit.
    jobs: [Option<(Job, Transfer)>; JOBS_MAX],
    lookout: Lookout,
    failed_reads: FailedReads,
    told: Told,
}

impl<'a> Loop<'a> {
    fn new(
        engine: &'a Engine,
        backing: &'a Backing,
        stop: &'a AtomicBool,
        uring: Uring,
        writeback: Writeback,
        held: Option<&'a OwnedFd>,
    ) -> Self {
        let file = backing.file().expect("the file is there before what writes to it");
        let held = held.map_or(file.as_fd(), AsFd::as_fd);
        let jobs = [None; JOBS_MAX];
        let (lookout, failed_reads) = (Lookout::default(), FailedReads::default());
        let told = Told { condition: backing.condition(), next_at: 0 };
        Self {
            engine,
            backing,
            stop,
            file,
            held,
            uring,
            writeback,
            jobs,
            lookout,
            failed_reads,
            told,
        }
    }

    /// Drives it until it is to stop.
    fn run(mut self) {
        // Writes wait for what it makes room for.
        process::become_server();
        let mut settled = Instant::now();
        let mut flushed = None;
        self.watch();
        while !self.stop.load(Ordering::SeqCst) {
            // First, so that what comes from now on is claimed anew; also where a wake has got lost.
            self.backing.waker().take();
            if flushed.is_none_or(|flushed: Instant| flushed.elapsed() >= FREED_PERIOD) {
                // What is dead need not be written. Some of it: writes wait for the rest of what is done here.
                let mut steps = 0..FREED_STEPS;
                while steps.next().is_some() && self.engine.flush_freed() {}
                flushed = Some(Instant::now());
            }
            while let Some(job) = self.writeback.next(self.engine, now()) {
                self.jobs[job.unit] = Some((job, Transfer::new(job.offset, job.bytes)));
                self.submit(job.unit);
            }
            self.report();
            if settled.elapsed() >= PERIOD {
                settled = Instant::now();
                self.writeback.settle();
            }
            let rest = self.writeback.rests_for(now()).map(Duration::from_nanos);
            self.wait(rest.map_or(PERIOD, |rest| rest.min(PERIOD)));
        }
        self.end();
    }

    fn watch(&mut self) {
        self.uring.watch(self.backing.waker().fd(), WOKEN);
    }

    fn wait(&mut self, limit: Duration) {
        if let Err(error) = self.uring.wait(Some(limit)) {
            process::fatal(format_args!("io_uring failed: {error}"));
        }
        while let Some((user_data, result)) = self.uring.completed() {
            if user_data == WOKEN {
                self.watch();
            } else {
                self.completed(user_data as usize, result);
            }
        }
    }

    /// Submits what is left of a unit's job.
    fn submit(&mut self, unit: usize) {
        let (job, transfer) = self.jobs[unit].expect("a job that is under way");
        let fd = types::Fd(self.held.as_raw_fd());
        // SAFETY: the buffer holds the whole job, of which so much is done.
        let at = unsafe { self.writeback.buffer(unit).add(transfer.done()) };
        let (bytes, offset) = (transfer.left() as u32, self.file.start() + transfer.offset());
        let entry = match job.is_write {
            true => opcode::Write::new(fd, at.as_ptr(), bytes).offset(offset).build(),
            false => opcode::Read::new(fd, at.as_ptr(), bytes).offset(offset).build(),
        };
        // SAFETY: the buffer is the job's until the engine is told that it has ended, which is after the
        // completion; it is not freed before that either, whatever becomes of this thread.
        unsafe { self.uring.push(entry, unit as u64) };
    }

    fn completed(&mut self, unit: usize, result: i32) {
        let (job, transfer) = self.jobs[unit].as_mut().expect("a job that is under way");
        let outcome = match transfer.ended(result) {
            Next::Again => return self.submit(unit),
            Next::Done => Ok(()),
            Next::Failed(errno) => {
                match job.is_write {
                    true => self.backing.failed(errno.raw_os_error()),
                    false => self.backing.failed_read(errno.raw_os_error()),
                }
                Err(JobFailed)
            }
        };
        self.jobs[unit] = None;
        self.writeback.ended(self.engine, unit, outcome, now());
    }

    /// Says how the file fares, when that has changed, and that reads failed.
    fn report(&mut self) {
        let now = now();
        let is_read_late = self.lookout.sees_late(self.backing.unanswered(), now);
        let failed = self.backing.failed_reads();
        let is_read_failing = self.failed_reads.are_going_on(failed, now);
        let condition = Condition::of(self.writeback.health(), is_read_late, is_read_failing);
        let errno = self.backing.errno();
        let _ = self.backing.note(condition);
        if self.told.is_news(condition, now) {
            match condition {
                Condition::Good => process::note(format_args!("the backing file works again")),
                Condition::Failing => process::note(format_args!(
                    "the backing file fails (error {errno}): pages stay in memory, and it is tried again later"
                )),
                Condition::Spent => process::note(format_args!(
                    "as much was written to the backing file as may be in a day: pages stay in memory until it is over"
                )),
                Condition::Late => process::note(format_args!(
                    "the backing file does not answer: pages stay in memory until it does"
                )),
                Condition::LateReads => process::note(format_args!(
                    "the backing file does not answer: whoever needs a page that is on it waits until it does"
                )),
                Condition::FailingReads => unreachable!("it is told below"),
            }
        }
        if let Some(count) = self.failed_reads.news(failed, now) {
            process::note(format_args!(
                "{count} reads of the backing file failed (last error {errno}): whoever needs a page that is there \
                 gets an error"
            ));
        }
    }

    /// Waits for what is under way, if not for ever: what never ends keeps its buffer, which is never
    /// freed then.
    fn end(mut self) {
        let began = Instant::now();
        while self.jobs.iter().any(Option::is_some) && began.elapsed() < END_LIMIT {
            self.wait(END_LIMIT / 10);
        }
    }
}

/// How the file fares, as it was told: not each change, for a file of which a part fails may change all the time.
struct Told {
    condition: Condition,
    next_at: u64,
}

impl Told {
    /// Whether this is to be told now. (Of reads that fail it is told how many.)
    fn is_news(&mut self, condition: Condition, now: u64) -> bool {
        let is_news = condition != Condition::FailingReads
            && condition != self.condition
            && now >= self.next_at;
        if is_news {
            *self = Self { condition, next_at: now + CHANGE_PERIOD };
        }
        is_news
    }
}

/// Reads that failed, as far as they were told of: not each, for there may be any number.
#[derive(Default)]
struct FailedReads {
    told: u64,
    next_at: u64,
    seen: u64,
    until: u64,
}

impl FailedReads {
    /// How many to tell of now, of so many that there were in all.
    fn news(&mut self, all: u64, now: u64) -> Option<u64> {
        let new = all - self.told;
        if new == 0 || now < self.next_at {
            return None;
        }
        (self.told, self.next_at) = (all, now + TELL_PERIOD);
        Some(new)
    }

    /// Whether there were any lately, of so many in all.
    fn are_going_on(&mut self, all: u64, now: u64) -> bool {
        if all > self.seen {
            (self.seen, self.until) = (all, now + FAILING_PERIOD);
        }
        now < self.until
    }
}

/// Nanoseconds since the system started, but for those in which it slept: the same for all processes.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // It is never negative, and a u64 holds centuries.
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use tmem::{BACKING_BYTES_MIN, Got, Handle, PutError};

    use super::super::file::{BackingSpec, FILE_BYTES_MIN};
    use super::*;
    use crate::device::BlockDevice;
    use crate::device::tests::{engine, noise};

    /// Lets an engine write to a new file in a directory.
    pub(crate) fn attach(engine: &Arc<Engine>, home: &Path) -> (Arc<Backing>, Driver) {
        let bytes = FILE_BYTES_MIN + 4 * BACKING_BYTES_MIN;
        let path = home.join("backing");
        let spec = BackingSpec { path, bytes: Some(bytes), encrypt: true, force: false };
        let file = BackingFile::open(&spec, &[]).unwrap();
        let backing = Arc::new(Backing::new().unwrap());
        let ready = Driver::prepare(Arc::clone(&backing)).unwrap();
        let writeback = engine.attach_backing(file.bytes(), Some(&[7; 32])).unwrap();
        (backing, ready.drive(Arc::clone(engine), file, writeback))
    }

    /// A device on an engine with little room, whose backing file is driven.
    struct Driven {
        device: BlockDevice,
        queue: tmem::Queue,
        backing: Arc<Backing>,
        _driver: Driver,
        _home: tempfile::TempDir,
    }

    impl Driven {
        fn new() -> Self {
            let home = tempfile::tempdir().unwrap();
            let engine = engine(8 << 20);
            let (backing, driver) = attach(&engine, home.path());
            while engine.supply().unwrap().more {}
            let device = BlockDevice::new(engine, 1 << 16).unwrap();
            Self { queue: device.queue(), device, backing, _driver: driver, _home: home }
        }

        /// Puts a page that does not compress, as soon as there is memory for it.
        fn put(&mut self, page: u64) -> Result<(), PutError> {
            let handle = Handle::from_page(self.device.pool(), page);
            let data = noise(1, page);
            let deadline = Instant::now() + Duration::from_secs(60);
            loop {
                let engine = self.device.engine();
                match engine.put(&mut self.queue, handle, data.as_array().unwrap()) {
                    Err(PutError::Starved) => assert!(Instant::now() < deadline, "page {page}"),
                    put => return put,
                }
                if engine.writeback_wanted() {
                    self.backing.waker().wake();
                }
                let _ = engine.supply().unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        }

        fn state(&self) -> String {
            self.backing.stats().unwrap().state
        }

        fn wait_for(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
            let deadline = Instant::now() + Duration::from_secs(60);
            while !is_so(self) {
                assert!(Instant::now() < deadline, "{what}: {:?}", self.backing.stats());
                self.backing.waker().wake();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn what_changes_all_the_time_is_told_now_and_then() {
        use Condition::{Failing, FailingReads, Good};
        let mut told = Told { condition: Good, next_at: 0 };
        assert!(!told.is_news(Good, 5) && told.is_news(Failing, 6));
        assert!(!told.is_news(Good, 7) && !told.is_news(Failing, 8));
        // As it is by then; and what reads do meanwhile does not hide it.
        assert!(!told.is_news(Failing, 6 + CHANGE_PERIOD));
        assert!(!told.is_news(FailingReads, 6 + CHANGE_PERIOD));
        assert!(told.is_news(Good, 6 + CHANGE_PERIOD));
        assert!(!told.is_news(FailingReads, 6 + 2 * CHANGE_PERIOD));
        assert!(!told.is_news(Good, 6 + 2 * CHANGE_PERIOD));
    }

    #[test]
    fn reads_that_fail_are_told_of_at_once_and_then_together() {
        let mut failed = FailedReads::default();
        assert_eq!(failed.news(0, 0), None);
        assert_eq!(failed.news(2, 10), Some(2));
        assert_eq!(failed.news(2, 10 + TELL_PERIOD), None);
        assert_eq!(failed.news(5, 20 + TELL_PERIOD), Some(3));
        assert_eq!(failed.news(9, 19 + 2 * TELL_PERIOD), None);
        assert_eq!(failed.news(9, 20 + 2 * TELL_PERIOD), Some(4));
    }

    #[test]
    fn reads_fail_until_none_has_for_a_while() {
        let mut failed = FailedReads::default();
        assert!(!failed.are_going_on(0, 5));
        assert!(failed.are_going_on(2, 10));
        assert!(failed.are_going_on(2, 9 + FAILING_PERIOD));
        assert!(failed.are_going_on(3, 10 + FAILING_PERIOD));
        assert!(failed.are_going_on(3, 9 + 2 * FAILING_PERIOD));
        assert!(!failed.are_going_on(3, 10 + 2 * FAILING_PERIOD));
    }

    #[test]
    fn what_is_more_than_memory_holds_goes_to_the_file() {
        let mut driven = Driven::new();
        (0..8192).for_each(|page| driven.put(page).unwrap());
        assert!(driven.device.pool_stats().bd_writes > 5000);
        assert_eq!((driven.state().as_str(), driven.backing.errno()), ("ok", 0));
    }

    #[test]
    fn a_file_that_refuses_writes_is_left_alone_and_tried_again() {
        let mut driven = Driven::new();
        let number = driven.backing.file().unwrap().as_fd().as_raw_fd();
        let kept = driven.backing.file().unwrap().as_fd().try_clone_to_owned().unwrap();
        let refusing = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: all are open, and who has the file's number has another file by it.
        let take_by = |fd: i32| assert_eq!(unsafe { libc::dup2(fd, number) }, number);
        take_by(refusing.as_raw_fd());
        // As if there was none: what does not fit is refused, and not waited for without end.
        let held = (0..8192).find(|page| driven.put(*page) == Err(PutError::Full));
        let held = held.expect("more is held than there is memory");
        driven.wait_for("it is not said", |driven| driven.state() == "failing");
        assert_eq!(driven.backing.errno(), libc::EBADF);
        assert_eq!(driven.device.pool_stats().bd_writes, 0);
        take_by(kept.as_raw_fd());
        driven.wait_for("it is not tried again", |driven| driven.state() == "ok");
        driven.wait_for("nothing is written", |driven| driven.device.pool_stats().bd_writes > 0);
        assert!(driven.device.engine().stats().log.log_failed_jobs > 0);
        // Nothing of what was in memory is lost.
        let mut target = [0; tmem::PAGE_SIZE];
        for page in 0..held {
            let handle = Handle::from_page(driven.device.pool(), page);
            match driven.device.engine().get(&mut driven.queue, handle, &mut target).unwrap() {
                Got::Hit => assert!(target[..] == noise(1, page)),
                Got::Backed(_) => {}
                Got::Miss => panic!("page {page} is not there"),
            }
        }
    }
}
