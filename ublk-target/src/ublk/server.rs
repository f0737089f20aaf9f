//! A live ublk device: made or taken over, served, stopped and removed by a control thread of its own.
//!
//! All that a device needs of ours is made first, as a [`Draft`]: threads, rings, buffers. Then it is made, or
//! taken over from a process that has died; the latter takes no memory but the kernel's own. The driver is only
//! talked to on the control thread, because some kernels never return from it (6.17 and 6.18 had versions that oops
//! in ADD_DEV): whoever waits for that thread to make or remove a device does so with a limit. Guarantee: after
//! an error nothing is left of a new device, unless the error says so; of one that cannot be taken over nothing is
//! lost.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;

use super::buffers::Room;
use super::driver;
use super::error::ServerError;
use super::job::{Command, Event, Job, Live, say};
use super::sizing::QueuePlan;
use crate::backing::Backing;
use crate::device::{BlockDevice, IoCounters, IoStats};
use crate::process;
use crate::waker::Waker;

/// How long a device may take to come up.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long a device may take to go.
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// A ublk device that serves a [`BlockDevice`]. Call [`UblkServer::stop`] to remove it.
pub struct UblkServer {
    live: Live,
    counters: Arc<[IoCounters]>,
    ended: Arc<AtomicBool>,
    commands: Sender<Command>,
    /// None once the device is gone.
    control: Mutex<Option<Handle>>,
}

/// A control thread, from outside.
struct Handle {
    events: Receiver<Event>,
    thread: JoinHandle<()>,
}

/// How a device comes to be served by us.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// It is made, with this number.
    Add(u32),
    /// The one of this number is taken over from a process that has died.
    Recover(u32),
}

/// What is served, and who is told of it.
pub struct Served {
    /// The device.
    pub device: Arc<BlockDevice>,
    /// Wakes the supply thread.
    pub waker: Arc<Waker>,
    /// The backing file, if there is one, and what wakes the thread that writes to it.
    pub backing: Arc<Backing>,
}

/// All of ours that a device needs: see the module's description.
pub struct Draft {
    plan: QueuePlan,
    commands: Sender<Command>,
    control: Handle,
    ended: Arc<AtomicBool>,
    counters: Arc<[IoCounters]>,
}

/// What became of a draft.
pub enum Started {
    /// The device is live.
    Live(UblkServer),
    /// Another device has the number that it was to have.
    Taken(Draft),
}

impl Draft {
    /// Makes all that a device with these queues needs, and buffers in this room. If it `is_urgent` the device will be one
    /// that others wait for.
    pub fn new(plan: QueuePlan, room: Room, is_urgent: bool) -> Result<Self, ServerError> {
        driver::ensure()?;
        let counters: Arc<[IoCounters]> = (0..plan.queues).map(|_| IoCounters::default()).collect();
        let ended = Arc::new(AtomicBool::new(false));
        let (commands, from_server) = channel();
        let (to_server, events) = channel();
        let job = Job {
            plan,
            room,
            counters: Arc::clone(&counters),
            is_urgent,
            commands: commands.clone(),
            ended: Arc::clone(&ended),
        };
        let thread = process::spawn("tmem-ublk-ctl".into(), move || {
            let gone = job.run(from_server, &to_server);
            // Nobody listens if the start took too long.
            let _ = to_server.send(Event::Gone(gone));
        })
        .map_err(ServerError::Thread)?;
        let draft = Self { plan, commands, control: Handle { events, thread }, ended, counters };
        let events = &draft.control.events;
        // Who gets ready when memory is short may take its time.
        let event = match is_urgent {
            true => events.recv().ok(),
            false => events.recv_timeout(START_LIMIT).ok(),
        };
        match event {
            Some(Event::Drafted) => Ok(draft),
            event => Err(draft.failed(event)),
        }
    }

    /// The queues that it is for.
    pub fn plan(&self) -> QueuePlan {
        self.plan
    }

    /// Begins to make the device, or to take it over. [`Draft::finish`] is next.
    pub fn begin(&self, served: Served, way: Way) {
        // Fails if the thread has ended, and then its last word is waiting.
        let _ = self.commands.send(Command::Begin(served.into(), way));
    }

    /// Waits until that is done. To take a device over takes as long as it takes.
    pub fn finish(self, way: Way) -> Result<Started, ServerError> {
        let events = &self.control.events;
        let event = match way {
            Way::Add(_) => events.recv_timeout(START_LIMIT).ok(),
            Way::Recover(_) => events.recv().ok(),
        };
        match event {
            Some(Event::Live(live)) => {
                let Self { commands, control, ended, counters, .. } = self;
                let control = Mutex::new(Some(control));
                Ok(Started::Live(UblkServer { live, counters, ended, commands, control }))
            }
            Some(Event::Taken) => Ok(Started::Taken(self)),
            event => Err(self.failed(event)),
        }
    }

    /// What an event means that is not the one that was waited for.
    fn failed(&self, event: Option<Event>) -> ServerError {
        match event {
            Some(Event::Gone(Err(error))) => error,
            Some(_) => ServerError::Died,
            None if self.control.thread.is_finished() => ServerError::Died,
            // Without a listener the control thread removes the device should it come up yet.
            None => {
                // It may have come up this very moment. Fails if the thread has ended.
                let _ = self.commands.send(Command::Stop(None));
                ServerError::Stuck { step: "make a device", limit: START_LIMIT }
            }
        }
    }
}

impl UblkServer {
    /// The block device's node.
    pub fn path(&self) -> &str {
        &self.live.path
    }

    /// The device's number.
    pub fn id(&self) -> u32 {
        self.live.id
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
            Ok(Event::Live(_) | Event::Drafted | Event::Taken)
            | Err(RecvTimeoutError::Disconnected) => {
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
