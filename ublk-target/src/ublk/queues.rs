//! The threads of a device's queues: made with their rings and buffers, before there is a device.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{JoinHandle, available_parallelism};
use std::time::Duration;

use rustix::thread::{CpuSet, Pid};
use tmem::Board;

use super::buffers::{Buffers, Room};
use super::control::Control;
use super::error::{ServerError, refused};
use super::helper::{Crew, Helpers, helpers_for};
use super::job::{Command, say};
use super::port::Port;
use super::queue::{QueueContext, QueueWorker};
use super::sizing::QueuePlan;
use crate::device::BlockDevice;
use crate::process;

/// How long a device's queues may take to be set up.
const QUEUES_LIMIT: Duration = Duration::from_secs(20);

/// A queue's thread, as the control thread knows it.
struct QueueDraft {
    orders: Sender<Open>,
    thread: JoinHandle<()>,
    tid: i32,
    board: Arc<Board>,
}

/// What a queue's thread is to serve.
struct Open {
    context: QueueContext,
    crew: Arc<Crew>,
    device: Arc<OwnedFd>,
    is_modern: bool,
    name: String,
}

/// What a queue's thread has to say.
enum Ready {
    /// It has its ring and its buffers.
    Drafted { tid: i32, board: Arc<Board> },
    /// It has asked for requests.
    Opened,
}

/// What a queue's thread does.
struct QueueThread {
    id: u16,
    depth: u16,
    room: Room,
    is_urgent: bool,
    open: Receiver<Open>,
    ready: Sender<io::Result<Ready>>,
    commands: Sender<Command>,
}

impl QueueThread {
    fn run(self) {
        process::become_server();
        let drafted = Port::new(self.id, self.depth)
            .and_then(|port| Ok((port, Buffers::new(&self.room, self.id, self.depth)?)));
        // Nobody listens where another queue has failed.
        let (port, buffers) = match drafted {
            Ok(drafted) => drafted,
            Err(error) => return drop(self.ready.send(Err(error))),
        };
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let board = Arc::clone(buffers.board());
        let _ = self.ready.send(Ok(Ready::Drafted { tid, board }));
        let _ = self.is_urgent.then(process::become_urgent);
        // None comes if there are fewer queues than were asked for, or the device is not made after all.
        let Ok(Open { context, crew, device, is_modern, name }) = self.open.recv() else { return };
        process::name_thread(&name);
        let device = (device.as_fd(), is_modern);
        let opened = QueueWorker::open(context, crew, (port, buffers), self.id, device);
        match opened {
            Err(error) => drop(self.ready.send(Err(error))),
            Ok(mut worker) => {
                let _ = self.ready.send(Ok(Ready::Opened));
                worker.run(self.is_urgent);
                let _ = self.commands.send(Command::QueueEnded);
            }
        }
    }
}

/// The threads of a device's queues, and their helpers. Who drops them has stopped the device, or it was not started.
pub(super) struct Queues {
    /// The device's number.
    id: u32,
    drafts: Vec<QueueDraft>,
    readiness: Receiver<io::Result<Ready>>,
    /// How long they may take for it.
    limit: Duration,
    /// Go after the threads that call them.
    helpers: Helpers,
}

impl Queues {
    /// Starts a thread per queue, with its ring and its buffers, and waits until all have them.
    pub fn draft(
        plan: QueuePlan,
        room: &Room,
        is_urgent: bool,
        commands: &Sender<Command>,
    ) -> Result<Self, ServerError> {
        let cpus = available_parallelism().map_err(ServerError::Thread)?.get();
        let helpers =
            Helpers::start(helpers_for(cpus), "tmem-ublk").map_err(ServerError::Thread)?;
        let (ready, readiness) = channel();
        // Who gets ready when memory is short may take its time.
        let limit = if is_urgent { Duration::MAX } else { QUEUES_LIMIT };
        let mut queues = Self { id: 0, drafts: Vec::new(), readiness, limit, helpers };
        for id in 0..plan.queues {
            let (orders, open) = channel();
            let thread = QueueThread {
                id,
                depth: plan.depth,
                room: room.clone(),
                is_urgent,
                open,
                ready: ready.clone(),
                commands: commands.clone(),
            };
            let thread = process::spawn_essential(format!("tmem-ublkq{id}"), || thread.run());
            let thread = thread.map_err(ServerError::Thread)?;
            match queues.hear()? {
                Ready::Drafted { tid, board } => {
                    if id == 0 {
                        check_weight(tid);
                    }
                    queues.drafts.push(QueueDraft { orders, thread, tid, board });
                }
                Ready::Opened => return Err(ServerError::Died),
            }
        }
        Ok(queues)
    }

    /// Lets the queues' threads ask for requests, and waits until all have.
    pub fn open(
        &mut self,
        id: u32,
        count: u16,
        context: &QueueContext,
        device: Arc<OwnedFd>,
        is_modern: bool,
    ) -> Result<(), ServerError> {
        self.id = id;
        self.drafts.truncate(count.into());
        for (number, draft) in self.drafts.iter().enumerate() {
            let open = Open {
                context: context.clone(),
                crew: Arc::clone(self.helpers.crew()),
                device: Arc::clone(&device),
                is_modern,
                name: format!("tmem-b{id}q{number}"),
            };
            // One that has ended has said why.
            let _ = draft.orders.send(open);
        }
        // Each has its say before any of them is told to stop: one that asks the driver for
        // requests after that is never told.
        let mut failed = Ok(());
        for _ in 0..self.drafts.len() {
            if let Err(error) = self.hear() {
                failed = Err(error);
            }
        }
        failed
    }

    /// Lets the helpers help them.
    pub fn help(&self, device: Arc<BlockDevice>) {
        let boards = self.drafts.iter().map(|draft| Arc::clone(&draft.board));
        self.helpers.help(device, boards.collect());
    }

    /// The helpers, as the queues see them.
    pub fn crew(&self) -> &Arc<Crew> {
        self.helpers.crew()
    }

    /// What one of the threads has to say.
    fn hear(&self) -> Result<Ready, ServerError> {
        match self.readiness.recv_timeout(self.limit) {
            Ok(ready) => ready.map_err(|error| refused("set up an I/O queue", error)),
            Err(_) => Err(ServerError::Stuck { step: "set up a queue", limit: self.limit }),
        }
    }

    /// Keeps the queues' threads on the CPUs whose requests they serve. Where that is not allowed (a cpuset
    /// without these CPUs) they serve them from another, which is slower and no worse.
    pub fn pin(&self, control: &mut Control) {
        for (number, draft) in (0..).zip(&self.drafts) {
            let tid = Pid::from_raw(draft.tid);
            let is_pinned = control.cpus(self.id, number).is_ok_and(|wanted| {
                let _ = rustix::thread::sched_setaffinity(tid, &wanted);
                let set = rustix::thread::sched_getaffinity(tid);
                let within = |set: CpuSet| {
                    (0..CpuSet::MAX_CPU).all(|cpu| !set.is_set(cpu) || wanted.is_set(cpu))
                };
                set.is_ok_and(within)
            });
            if !is_pinned {
                say(format_args!(
                    "queue {number} is served from other CPUs than its own: allow the daemon all CPUs"
                ));
            }
        }
    }

    /// Stops the device and waits for the threads. On an error both go on.
    pub fn end(&mut self, control: &mut Control) -> Result<(), ServerError> {
        if self.drafts.is_empty() {
            return Ok(());
        }
        control.stop(self.id).map_err(|error| refused("stop a ublk device", error))?;
        for QueueDraft { orders, thread, .. } in self.drafts.drain(..) {
            drop(orders);
            // A panic in it would have ended the process.
            let _ = thread.join();
        }
        Ok(())
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
