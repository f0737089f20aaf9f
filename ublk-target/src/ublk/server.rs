//! A live ublk device: made, started, stopped and removed on a control thread of its own.
//!
//! All of libublk's control calls for a device are made on one thread, because libublk keeps
//! the control ring in a thread-local, and because some kernels never return from them (6.17 and
//! 6.18 had versions that oops in ADD_DEV): whoever waits for that thread does so with a limit.
//! Guarantee: after an error nothing is left of the device, unless the error says so.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{JoinHandle, available_parallelism};
use std::time::{Duration, Instant};

use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder, UblkQueueAffinity};
use libublk::io::{UblkDev, UblkQueue};
use libublk::{UblkError, UblkFlags, sys};
use parking_lot::Mutex;
use rustix::thread::{CpuSet, Pid};
use tmem::Batches;

use super::driver::{self, DriverError};
use super::helper::{Crew, Helpers, helpers_for};
use super::params::params;
use super::queue::{QueueContext, QueueWorker};
use super::sizing::{IO_BYTES, QueuePlan};
use crate::backing::Backing;
use crate::device::{BlockDevice, IoCounters, IoStats};
use crate::process;
use crate::waker::Waker;

/// How long a device may take to come up.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long its queues may take for their part of that.
const QUEUES_LIMIT: Duration = Duration::from_secs(20);

/// How long a device may take to go.
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// How long the device node may take to appear.
const NODE_LIMIT: Duration = Duration::from_secs(5);
const NODE_PERIOD: Duration = Duration::from_millis(10);

/// Why a device could not be made or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The driver cannot be used.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The driver refused.
    #[error("cannot {step}: {reason}")]
    Refused {
        /// What was asked of it.
        step: &'static str,
        /// What it said, and what may help.
        reason: String,
        /// Whether it was for want of a privilege.
        denied: bool,
    },
    /// The device is there for the kernel, but not in /dev.
    #[error("{path} did not appear: mount devtmpfs on /dev")]
    NoNode {
        /// Where it should be.
        path: String,
    },
    /// The driver does not answer.
    #[error(
        "the kernel's ublk driver did not {step} within {} s: look at `dmesg` for an oops in \
         ublk_drv; such a kernel must be rebooted and should be replaced", limit.as_secs()
    )]
    Stuck {
        /// What it was to do.
        step: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// No thread for it.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    /// The control thread panicked, and has said why.
    #[error("the device's control thread died: see the daemon's log")]
    Died,
}

/// A ublk device that serves a [`BlockDevice`]. Call [`UblkServer::stop`] to remove it.
pub struct UblkServer {
    live: Live,
    counters: Arc<[IoCounters]>,
    ended: Arc<AtomicBool>,
    commands: Sender<Command>,
    /// None once the device is gone.
    control: Mutex<Option<Control>>,
}

/// The far end of a control thread.
struct Control {
    events: Receiver<Event>,
    thread: JoinHandle<()>,
}

/// What the device turned out to be.
#[derive(Clone)]
struct Live {
    path: String,
    queues: u16,
    depth: u16,
    crew: Arc<Crew>,
}

enum Event {
    Live(Live),
    /// It could not be stopped, and goes on.
    Kept(ServerError),
    /// The control thread has ended.
    Gone(Result<(), ServerError>),
}

enum Command {
    QueueEnded,
    /// With what keeps others from using the device while it is stopped.
    Stop(Option<File>),
}

impl UblkServer {
    /// Makes a device and returns when it is live.
    pub fn start(
        device: Arc<BlockDevice>,
        waker: Arc<Waker>,
        backing: Arc<Backing>,
        plan: QueuePlan,
    ) -> Result<Self, ServerError> {
        driver::ensure()?;
        let counters: Arc<[IoCounters]> = (0..plan.queues).map(|_| IoCounters::default()).collect();
        let ended = Arc::new(AtomicBool::new(false));
        let (commands, from_server) = channel();
        let (to_server, events) = channel();
        let job = Job {
            context: QueueContext { device, counters: Arc::clone(&counters), waker, backing },
            plan,
            commands: commands.clone(),
            ended: Arc::clone(&ended),
        };
        let thread = process::spawn("tmem-ublk-ctl".into(), move || {
            let gone = job.run(from_server, &to_server);
            // Nobody listens if the start took too long.
            let _ = to_server.send(Event::Gone(gone));
        })
        .map_err(ServerError::Thread)?;
        let live = match events.recv_timeout(START_LIMIT) {
            Ok(Event::Live(live)) => live,
            Ok(Event::Gone(Err(error))) => return Err(error),
            Ok(Event::Gone(Ok(())) | Event::Kept(_)) | Err(RecvTimeoutError::Disconnected) => {
                return Err(ServerError::Died);
            }
            // Without a listener the control thread removes the device should it come up yet.
            Err(RecvTimeoutError::Timeout) => {
                // It may have come up this very moment. Fails if the thread has ended.
                let _ = commands.send(Command::Stop(None));
                return Err(ServerError::Stuck { step: "make a device", limit: START_LIMIT });
            }
        };
        let control = Mutex::new(Some(Control { events, thread }));
        Ok(Self { live, counters, ended, commands, control })
    }

    /// The block device's node.
    pub fn path(&self) -> &str {
        &self.live.path
    }

    /// Hardware queues.
    pub fn queues(&self) -> u16 {
        self.live.queues
    }

    /// Requests that each queue holds.
    pub fn depth(&self) -> u16 {
        self.live.depth
    }

    /// True once the device is gone without [`UblkServer::stop`]: somebody told the driver.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// What all queues did.
    pub fn io_stats(&self) -> IoStats {
        let mut sum = IoStats::default();
        self.counters.iter().for_each(|queue| queue.add_to(&mut sum));
        sum.helped_pages = self.live.crew.helped();
        sum
    }

    /// Stops and removes the device. Requests under way fail: make sure that nobody uses it, by a
    /// `claim` on it (an exclusive open), which is let go when the device is stopped: before Linux
    /// 6.9 the driver does not remove a device that anybody has open. After an error it goes on as
    /// before, and it may be tried again.
    pub fn stop(&self, claim: Option<File>) -> Result<(), ServerError> {
        let mut place = self.control.lock();
        let Some(control) = place.as_ref() else { return Ok(()) };
        // Fails if the thread has ended, and then its last word is waiting.
        let _ = self.commands.send(Command::Stop(claim));
        match control.events.recv_timeout(STOP_LIMIT) {
            Ok(Event::Gone(Ok(()))) => {}
            // Nobody can use it any more, so this is nothing to be stopped by.
            Ok(Event::Gone(Err(error))) => {
                say(format_args!("{} is stopped, but {error}", self.path()))
            }
            Ok(Event::Kept(error)) => return Err(error),
            // It has panicked, and on its way out has stopped the device.
            Ok(Event::Live(_)) | Err(RecvTimeoutError::Disconnected) => {
                say(format_args!("{}: {}", self.path(), ServerError::Died));
            }
            Err(RecvTimeoutError::Timeout) => {
                return Err(ServerError::Stuck { step: "stop a device", limit: STOP_LIMIT });
            }
        }
        if let Some(control) = place.take() {
            // It has said its last word.
            let _ = control.thread.join();
        }
        Ok(())
    }
}

/// What the control thread does.
struct Job {
    context: QueueContext,
    plan: QueuePlan,
    commands: Sender<Command>,
    ended: Arc<AtomicBool>,
}

impl Job {
    fn run(self, commands: Receiver<Command>, events: &Sender<Event>) -> Result<(), ServerError> {
        let ctrl = self.add()?;
        let dev = Arc::new(self.open(&ctrl)?);
        let mut queues = self.start_queues(&ctrl, &dev)?;
        check(ctrl.start_dev(&dev), "start a ublk device")?;
        let path = ctrl.get_bdev_path();
        wait_for_node(&path)?;
        let info = ctrl.dev_info();
        let (queue_count, depth) = (info.nr_hw_queues, info.queue_depth);
        let crew = Arc::clone(queues.helpers.crew());
        let live = Live { path: path.clone(), queues: queue_count, depth, crew };
        let claim = match events.send(Event::Live(live)) {
            Ok(()) => self.serve(&path, &mut queues, &commands, events),
            // Nobody waits for the device any more.
            Err(_) => None,
        };
        queues.end()?;
        // A claim may be on its way here still: it goes with the receiver.
        drop((claim, commands, dev));
        remove(&ctrl)
    }

    /// Waits until the device is stopped, and returns the claim on it that came with the order.
    fn serve(
        &self,
        path: &str,
        queues: &mut Queues<'_>,
        commands: &Receiver<Command>,
        events: &Sender<Event>,
    ) -> Option<File> {
        loop {
            match commands.recv() {
                Ok(Command::QueueEnded) => {
                    self.ended.store(true, Ordering::Release);
                    say(format_args!("{path} was stopped by somebody else"));
                    return None;
                }
                Ok(Command::Stop(claim)) => match queues.end() {
                    Ok(()) => return claim,
                    Err(error) => drop(events.send(Event::Kept(error))),
                },
                Err(_) => return None,
            }
        }
    }

    fn add(&self) -> Result<UblkCtrl, ServerError> {
        let flags = sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE;
        UblkCtrlBuilder::default()
            .name("tmem")
            .nr_queues(self.plan.queues)
            .depth(self.plan.depth)
            .io_buf_bytes(IO_BYTES)
            .ctrl_flags(flags.into())
            .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV | UblkFlags::UBLK_DEV_F_MLOCK_IO_BUFFER)
            .build()
            .map_err(|error| refused("add a ublk device", error))
    }

    fn open(&self, ctrl: &UblkCtrl) -> Result<UblkDev, ServerError> {
        let bytes = self.context.device.bytes();
        let target = |dev: &mut UblkDev| {
            dev.tgt.dev_size = bytes;
            dev.tgt.params = params(bytes, IO_BYTES);
            Ok(())
        };
        UblkDev::new(ctrl.get_name(), target, ctrl)
            .map_err(|error| refused("open a ublk device", error))
    }

    /// Starts a thread per queue and waits until each has asked for requests: libublk would wait
    /// for ever for one that could not.
    fn start_queues<'a>(
        &self,
        ctrl: &'a UblkCtrl,
        dev: &Arc<UblkDev>,
    ) -> Result<Queues<'a>, ServerError> {
        let info = &dev.dev_info;
        let depth = usize::from(info.queue_depth);
        let batches: Vec<_> = (0..info.nr_hw_queues).map(|_| Batches::new(depth)).collect();
        let boards = batches.iter().map(|batches| Arc::clone(batches.board())).collect();
        let cpus = available_parallelism().map_err(ServerError::Thread)?.get();
        let device = &self.context.device;
        let helpers = Helpers::start(helpers_for(cpus), info.dev_id, device, boards)
            .map_err(ServerError::Thread)?;
        let mut queues = Queues { ctrl, threads: Vec::new(), helpers };
        let (ready, readiness) = channel();
        let mut failed = None;
        for (id, batches) in (0..).zip(batches) {
            let name = format!("tmem-b{}q{id}", info.dev_id);
            let (dev, context) = (Arc::clone(dev), self.context.clone());
            let crew = Arc::clone(queues.helpers.crew());
            let (ready, commands) = (ready.clone(), self.commands.clone());
            let body = move || {
                let prepare = |dev| QueueWorker::prepare(context, crew, batches, id, dev);
                queue_thread(prepare, id, &dev, &ready, &commands);
            };
            match process::spawn_essential(name, body) {
                Ok(thread) => queues.threads.push(thread),
                Err(error) => {
                    failed = Some(ServerError::Thread(error));
                    break;
                }
            }
        }
        // Each has its say before any of them is told to stop: one that asks the driver for
        // requests after that is never told.
        let deadline = Instant::now() + QUEUES_LIMIT;
        for _ in 0..queues.threads.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            match readiness.recv_timeout(left) {
                Ok(Ok((id, tid))) => {
                    pin(ctrl, id, tid);
                    if id == 0 {
                        check_weight(tid);
                    }
                }
                Ok(Err(error)) => failed = Some(refused("set up an I/O queue", error)),
                Err(_) => {
                    return Err(ServerError::Stuck { step: "set up a queue", limit: QUEUES_LIMIT });
                }
            }
        }
        failed.map_or(Ok(queues), Err)
    }
}

/// Keeps a queue's thread on the CPUs whose requests it serves. Where that is not allowed (a cpuset
/// without these CPUs) it serves them from another, which is slower and no worse.
fn pin(ctrl: &UblkCtrl, queue: u16, tid: i32) {
    ctrl.set_thread_affinity(queue, tid);
    // libublk does not say whether that worked.
    let mut wanted = UblkQueueAffinity::new();
    let known = ctrl.get_queue_affinity(queue.into(), &mut wanted).is_ok();
    let wanted = wanted.to_bits_vec();
    let set = rustix::thread::sched_getaffinity(Pid::from_raw(tid)).ok();
    let is_pinned =
        |set: &CpuSet| (0..CpuSet::MAX_CPU).all(|cpu| !set.is_set(cpu) || wanted.contains(&cpu));
    if !known || !set.as_ref().is_some_and(is_pinned) {
        say(format_args!(
            "queue {queue} is served from other CPUs than its own: allow the daemon all CPUs"
        ));
    }
}

/// Says so if a queue's thread could not be given the highest weight. One speaks for all.
fn check_weight(tid: i32) {
    let nice = rustix::process::getpriority_process(Pid::from_raw(tid));
    if nice != Ok(process::NICE_MIN) {
        say(format_args!(
            "I/O waits until other programs on its CPU have had their turn: allow the daemon CAP_SYS_NICE"
        ));
    }
}

/// Serves one queue until the device is stopped.
fn queue_thread<'a>(
    prepare: impl FnOnce(&'a UblkDev) -> Result<(QueueWorker, UblkQueue<'a>), UblkError>,
    id: u16,
    dev: &'a UblkDev,
    ready: &Sender<Result<(u16, i32), UblkError>>,
    commands: &Sender<Command>,
) {
    process::become_server();
    match prepare(dev) {
        Err(error) => {
            let _ = ready.send(Err(error));
        }
        Ok((mut worker, queue)) => {
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            let _ = ready.send(Ok((id, tid)));
            worker.run(&queue);
            let _ = commands.send(Command::QueueEnded);
        }
    }
}

/// Running queue threads. Stops the device and waits for them when dropped.
struct Queues<'a> {
    ctrl: &'a UblkCtrl,
    threads: Vec<JoinHandle<()>>,
    /// Go after the threads that call them.
    helpers: Helpers,
}

impl Queues<'_> {
    /// Stops the device and waits for the threads. On an error both go on.
    fn end(&mut self) -> Result<(), ServerError> {
        if self.threads.is_empty() {
            return Ok(());
        }
        check(self.ctrl.kill_dev(), "stop a ublk device")?;
        for thread in self.threads.drain(..) {
            // A panic in it would have ended the process.
            let _ = thread.join();
        }
        Ok(())
    }
}

impl Drop for Queues<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            say(format_args!("{error}"));
        }
    }
}

/// Removes a stopped device. The block device is gone already; whoever still has it open keeps only
/// its number taken, and must not keep us waiting.
fn remove(ctrl: &UblkCtrl) -> Result<(), ServerError> {
    match ctrl.del_dev_async() {
        // Linux before 6.9 knows only the command that waits.
        Err(_) => check(ctrl.del_dev(), "remove a ublk device"),
        result => check(result, "remove a ublk device"),
    }
}

/// A line on standard error, or nothing: its reader may be gone, and that must not end a thread.
fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "tmem: {line}");
}

fn wait_for_node(path: &str) -> Result<(), ServerError> {
    let deadline = Instant::now() + NODE_LIMIT;
    loop {
        if std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device()) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(ServerError::NoNode { path: path.into() });
        }
        std::thread::sleep(NODE_PERIOD);
    }
}

/// libublk passes some refusals on as successes with a negative number.
fn check(result: Result<i32, UblkError>, step: &'static str) -> Result<(), ServerError> {
    match result {
        Ok(0..) => Ok(()),
        Ok(errno) => Err(refused(step, UblkError::OtherError(errno))),
        Err(error) => Err(refused(step, error)),
    }
}

fn refused(step: &'static str, error: UblkError) -> ServerError {
    let errno = match &error {
        UblkError::OtherError(errno) | UblkError::UringIOError(errno) => Some(-errno),
        UblkError::IOError(error) => error.raw_os_error(),
        _ => None,
    };
    let what = errno
        .map_or_else(|| error.to_string(), |errno| io::Error::from_raw_os_error(errno).to_string());
    let help = match errno {
        Some(libc::EPERM | libc::EACCES) => ": run as root with CAP_SYS_ADMIN and CAP_IPC_LOCK",
        Some(libc::ENOMEM) => ": free some memory, or raise the limit of locked memory",
        Some(libc::EINVAL | libc::EOPNOTSUPP) => ": Linux 6.1 or newer is needed",
        Some(libc::ENOSPC | libc::EEXIST) => ": remove ublk devices that nobody serves any more",
        _ => "",
    };
    let denied = matches!(errno, Some(libc::EPERM | libc::EACCES));
    ServerError::Refused { step, reason: format!("{what}{help}"), denied }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_success_is_a_refusal() {
        assert!(check(Ok(0), "x").is_ok());
        let error = check(Ok(-libc::EBUSY), "stop it").unwrap_err().to_string();
        assert!(error.starts_with("cannot stop it: "), "{error}");
        assert!(error.contains("busy"), "{error}");
    }

    #[test]
    fn refusals_say_what_helps() {
        for error in [
            UblkError::UringIOError(-libc::EPERM),
            UblkError::IOError(io::Error::from_raw_os_error(libc::EPERM)),
        ] {
            let message = refused("add it", error).to_string();
            assert!(message.contains("CAP_SYS_ADMIN"), "{message}");
        }
    }
}
