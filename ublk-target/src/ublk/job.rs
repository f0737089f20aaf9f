//! What a device's control thread does: see [`super::server`].

use std::fmt;
use std::fs;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::thread::sleep;
use std::time::{Duration, Instant};

use libublk::sys;
use rustix::io::Errno;

use super::buffers::Room;
use super::control::{Control, DeviceInfo, node_path};
use super::error::{ServerError, refused};
use super::helper::Crew;
use super::params::params;
use super::queue::QueueContext;
use super::queues::Queues;
use super::server::{Served, Way};
use super::sizing::{IO_BYTES, QueuePlan};
use crate::device::{BlockDevice, IoCounters};
use crate::process;

/// How long the device node may take to appear.
const NODE_LIMIT: Duration = Duration::from_secs(5);
const NODE_PERIOD: Duration = Duration::from_millis(10);

/// How long the kernel may be about the death of a process after it has said so: it is a thread of its own that has no more
/// to do by then than to be given a processor.
const RECOVERY_SETTLE: Duration = Duration::from_millis(10);

/// How soon it is tried again to take a device over from a process that has not gone yet, and from when on
/// that is worth a word.
const RECOVERY_PERIOD: Duration = Duration::from_millis(1);
const RECOVERY_SLOW: Duration = Duration::from_secs(10);

/// What the control thread has to say.
pub(super) enum Event {
    /// All that a device needs of ours is there.
    Drafted,
    /// A device has that number already.
    Taken,
    Live(Live),
    /// It could not be stopped, and goes on.
    Kept(ServerError),
    /// The control thread has ended.
    Gone(Result<(), ServerError>),
}

/// What it is told.
pub(super) enum Command {
    Begin(Box<Served>, Way),
    QueueEnded,
    /// With what keeps others from using the device while it is stopped.
    Stop(Option<File>),
}

/// What the device turned out to be.
#[derive(Clone)]
pub(super) struct Live {
    pub id: u32,
    pub path: String,
    pub queues: u16,
    pub depth: u16,
    pub crew: Arc<Crew>,
}

/// What the control thread does.
pub(super) struct Job {
    pub plan: QueuePlan,
    pub room: Room,
    pub counters: Arc<[IoCounters]>,
    pub is_urgent: bool,
    pub commands: Sender<Command>,
    pub ended: Arc<AtomicBool>,
}

impl Job {
    pub fn run(
        self,
        commands: Receiver<Command>,
        events: &Sender<Event>,
    ) -> Result<(), ServerError> {
        let mut control = Control::open().map_err(|error| refused("ask the ublk driver", error))?;
        let mut queues = Queues::draft(self.plan, &self.room, self.is_urgent, &self.commands)?;
        // Allowed or not: who is not urgent may have to wait for memory.
        let _ = self.is_urgent.then(process::become_urgent);
        // Without a listener the start took too long.
        let mut event = Event::Drafted;
        let (served, way, info) = loop {
            if events.send(event).is_err() {
                return Ok(());
            }
            let Ok(Command::Begin(served, way)) = commands.recv() else { return Ok(()) };
            let made = match way {
                Way::Add(id) => self.add(&mut control, id, &served.device),
                Way::Recover(id) => recover(&mut control, id),
            };
            match made {
                Ok(info) => break (served, way, info),
                Err(ServerError::Refused { errno: Some(libc::EEXIST), .. }) => {
                    event = Event::Taken;
                }
                Err(error) => return Err(error),
            }
        };
        let id = info.dev_id;
        let live = self.go_live(&mut control, &mut queues, *served, way, info);
        let (live, claim) = match live {
            Ok(live) => {
                process::become_calm();
                let path = live.path.clone();
                let claim = match events.send(Event::Live(live)) {
                    Ok(()) => self.serve((id, &path), &mut control, &mut queues, &commands, events),
                    // Nobody waits for the device any more.
                    Err(_) => None,
                };
                (Ok(()), claim)
            }
            // It is there for the next who tries.
            Err(error) if way == Way::Recover(id) => return Err(error),
            Err(error) => (Err(error), None),
        };
        let stopped = queues.end(&mut control);
        // A claim may be on its way here still: it goes with the receiver.
        drop((claim, commands, queues));
        let removed = control.remove(id).map_err(|error| refused("remove a ublk device", error));
        live.and(stopped).and(removed)
    }

    /// Waits until the device is stopped, and returns the claim on it that came with the order.
    fn serve(
        &self,
        (id, path): (u32, &str),
        control: &mut Control,
        queues: &mut Queues,
        commands: &Receiver<Command>,
        events: &Sender<Event>,
    ) -> Option<File> {
        loop {
            match commands.recv() {
                Ok(Command::QueueEnded) => {
                    end_unless_stopped(control, id);
                    self.ended.store(true, Ordering::Release);
                    say(format_args!("{path} was stopped by somebody else"));
                    return None;
                }
                Ok(Command::Stop(claim)) => match queues.end(control) {
                    Ok(()) => return claim,
                    Err(error) => drop(events.send(Event::Kept(error))),
                },
                Ok(Command::Begin(..)) => {}
                Err(_) => return None,
            }
        }
    }

    /// Makes the device.
    fn add(
        &self,
        control: &mut Control,
        id: u32,
        device: &BlockDevice,
    ) -> Result<DeviceInfo, ServerError> {
        let flags = sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE;
        let wanted = DeviceInfo {
            nr_hw_queues: self.plan.queues,
            queue_depth: self.plan.depth,
            max_io_buf_bytes: IO_BYTES,
            dev_id: id,
            ublksrv_pid: std::process::id() as i32,
            flags: flags.into(),
            ..Default::default()
        };
        let info = control.add(wanted).map_err(|error| refused("add a ublk device", error))?;
        let set = control.set_params(id, params(device.bytes(), IO_BYTES));
        if let Err(error) = set {
            let _ = control.remove(id);
            return Err(refused("add a ublk device", error));
        }
        Ok(info)
    }

    /// Has the queues served, and lets requests come.
    fn go_live(
        &self,
        control: &mut Control,
        queues: &mut Queues,
        served: Served,
        way: Way,
        info: DeviceInfo,
    ) -> Result<Live, ServerError> {
        let id = info.dev_id;
        let device = open_device(id).map_err(|error| refused("open a ublk device", error))?;
        let Served { device: block, waker, backing } = served;
        let counters = Arc::clone(&self.counters);
        let context = QueueContext { device: Arc::clone(&block), counters, waker, backing };
        queues.open(id, info.nr_hw_queues, &context, device.into(), control.is_modern())?;
        queues.help(block);
        match way {
            Way::Add(_) => {
                queues.pin(control);
                control.start(id).map_err(|error| refused("start a ublk device", error))?;
            }
            Way::Recover(_) => {
                let ended = control.end_recovery(id);
                ended.map_err(|error| refused("take over a ublk device", error))?;
                queues.pin(control);
            }
        }
        let path = node_path(id);
        if let Way::Add(_) = way {
            wait_for_node(&path)?;
            keep_a_command_waiting(id, info.queue_depth);
        }
        let crew = Arc::clone(queues.crew());
        Ok(Live { id, path, queues: info.nr_hw_queues, depth: info.queue_depth, crew })
    }
}

/// Ends the process if the kernel has taken a queue's commands back though nobody has stopped the device: it does so at the
/// end of what it does about the death of the process before us (to Linux 6.14), which may be when we serve already. The next process
/// goes on then; whoever would take the device for stopped would remove it, with all that is on it.
fn end_unless_stopped(control: &mut Control, id: u32) {
    let state = control.info(id).map(|info| u32::from(info.state));
    if let Ok(sys::UBLK_S_DEV_LIVE | sys::UBLK_S_DEV_QUIESCED) = state {
        process::fatal(format_args!(
            "the kernel has taken back what it was to be served with, of a device that nobody has stopped (/dev/ublkb{id})"
        ));
    }
}

/// Waits until the kernel has done what it does about the death of the process that served a device. Nothing tells the end of
/// that (to Linux 6.14): it is some moments after the device's state is what it makes of it.
fn settle(control: &mut Control, id: u32) {
    let deadline = Instant::now() + RECOVERY_SLOW;
    let is_quiesced = |control: &mut Control| {
        // Whatever else it is, is found out by what follows.
        control.info(id).map_or(true, |info| u32::from(info.state) != sys::UBLK_S_DEV_LIVE)
    };
    while !is_quiesced(control) && Instant::now() < deadline {
        sleep(RECOVERY_PERIOD);
    }
    sleep(RECOVERY_SETTLE);
}

/// Makes a device ready to be taken over, as soon as the process that served it is all gone.
fn recover(control: &mut Control, id: u32) -> Result<DeviceInfo, ServerError> {
    let begun = Instant::now();
    let mut is_said = false;
    settle(control, id);
    loop {
        match control.begin_recovery(id) {
            Ok(()) => break,
            Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => {}
            // Somebody has begun before, and died before any queue was served: Linux 6.12 says so.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                let state = control.info(id).map(|info| u32::from(info.state));
                match state {
                    Ok(sys::UBLK_S_DEV_QUIESCED) => break,
                    Ok(sys::UBLK_S_DEV_DEAD) => return Err(ServerError::Gone),
                    _ => return Err(refused("take over a ublk device", error)),
                }
            }
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NODEV) => {
                return Err(ServerError::Gone);
            }
            Err(error) => return Err(refused("take over a ublk device", error)),
        }
        if begun.elapsed() > RECOVERY_SLOW && !is_said {
            is_said = true;
            process::note(format_args!(
                "/dev/ublkb{id} is still held by the process that served it"
            ));
        }
        sleep(RECOVERY_PERIOD);
    }
    control.info(id).map_err(|error| refused("take over a ublk device", error))
}

/// Opens a device to serve it, once nobody else has it. A new one's node may take a moment to be there.
fn open_device(id: u32) -> io::Result<OwnedFd> {
    let path = format!("/dev/ublkc{id}");
    let deadline = Instant::now() + NODE_LIMIT;
    loop {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => return Ok(file.into()),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => sleep(RECOVERY_PERIOD),
        }
    }
}

/// A line on standard error, or nothing: its reader may be gone, and that must not end a thread.
pub(super) fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "tmem: {line}");
}

/// Has the kernel never send a queue as many requests as it has commands there.
///
/// It learns that a server is dead by the commands that wait for requests, which are cancelled then. Where all of a queue's
/// commands have one, it notices only when a request has taken too long, after 30 s (`ublk_timeout()` in Linux 6.12).
fn keep_a_command_waiting(id: u32, depth: u16) {
    let path = format!("/sys/block/ublkb{id}/queue/nr_requests");
    if let Err(error) = fs::write(&path, (depth - 1).to_string()) {
        say(format_args!(
            "cannot set {path} ({error}): if the process that serves dies while a queue is full, I/O goes on only after 30 s; \
             let the daemon write there"
        ));
    }
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
