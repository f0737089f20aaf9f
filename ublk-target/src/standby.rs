//! The standby: a process that has everything at hand to go on when the worker dies, and waits for that.
//!
//! It asks nobody then. What it is ready for are the devices that there were when it was started; where others have come
//! since, the supervisor starts another.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, set_parent_process_death_signal};
use tmem::Store;

use crate::daemon::{Serving, Succession, Successor};
use crate::exit::{Exit, Failure};
use crate::inherited::Inherited;
use crate::log::log;
use crate::notes::Notes;
use crate::process;
use crate::signals::StopSignals;
use crate::supervisor::{Link, News};
use crate::worker::{self, Orders, Sockets, system};

/// How often it brings to hand what has come since.
const FOLLOW_PERIOD: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// How long it waits for another that was first to say so.
const OTHER_PERIOD: Duration = Duration::from_millis(5);

/// A standby's life, as a process that the supervisor has started; when the worker has died, a worker's.
pub fn run() -> Result<(), Failure> {
    let signals = StopSignals::take().map_err(|error| system("handle signals", &error))?;
    // It may have stopped us for an upgrade. Where that is refused, somebody has to.
    let _ = set_parent_process_death_signal(Some(Signal::CONT));
    let start_failed = |error| system("start a standby", &error);
    let mut inherited = Inherited::take().map_err(start_failed)?;
    let link = Link::inherited(inherited.file("link").map_err(start_failed)?);
    // There is none if it is dead.
    let worker = inherited.file("worker").ok();
    let pulse = inherited.file("pulse").map_err(start_failed)?;
    let store = inherited.file("store").map_err(start_failed)?;
    let failed = |error: &dyn std::fmt::Display| Failure::new(Exit::Failure, error);
    let store = Store::from_file(store).map_err(|error| failed(&error))?;
    let notes = Notes::read(&store).map_err(|error| failed(&error))?;
    let sockets = Sockets::inherited(&mut inherited, &notes.config)?;
    let successor = Successor::prepare(store).map_err(|error| failed(&error))?;
    let orders = Orders::new(link, signals, pulse);
    orders.tell(&News::Prepared);
    process::name_thread("tmem-standby");
    match wait(successor, worker) {
        Succession::Over => Ok(()),
        Succession::Serving(serving) => serve(*serving, sockets, orders),
    }
}

/// Waits for the worker's death, and takes over; or if another was first, for the death of that one.
fn wait(successor: Successor, mut worker: Option<OwnedFd>) -> Succession {
    // For the kernel's small allocations. Where that is refused, they may have to wait.
    let _ = process::become_urgent();
    let mut successor = Box::new(successor);
    loop {
        successor = match successor.try_take_over() {
            Ok(succession) => return succession,
            Err(successor) => successor,
        };
        let is_dead = match &worker {
            None => true,
            Some(worker) => {
                let mut fds = [PollFd::from_borrowed_fd(worker.as_fd(), PollFlags::IN)];
                match poll(&mut fds, Some(&FOLLOW_PERIOD)) {
                    Ok(0) if successor.is_left_over() => return Succession::Over,
                    Ok(0) => successor.follow(),
                    // Interrupted, or for want of kernel memory: look again.
                    _ => {}
                }
                !fds[0].revents().is_empty()
            }
        };
        if is_dead {
            // But another was first, and tells soon who it is.
            sleep(OTHER_PERIOD);
            let pid = successor.worker().and_then(|pid| Pid::from_raw(pid.cast_signed()));
            let opened = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty()));
            if let Some(Ok(other)) = opened {
                worker = Some(other);
            }
        }
    }
}

/// Does what can wait, and goes on as a worker.
fn serve(serving: Serving, sockets: Sockets, mut orders: Orders) -> Result<(), Failure> {
    // A panic must not take down what others may go on with.
    let _guard = process::become_essential();
    process::name_thread("tmem-worker");
    let took = serving.took();
    orders.tell(&News::TookOver { took });
    log(format_args!("took over in {} us", took.as_micros()));
    let Sockets { control, nbd } = sockets;
    let daemon = serving.finish(nbd);
    // Another process may be able to.
    let daemon =
        daemon.unwrap_or_else(|error| process::fatal(format_args!("cannot go on: {error}")));
    for device in daemon.list() {
        let (name, path, bytes) = (device.name, device.path, device.bytes);
        orders.tell(&News::Added { name, path, bytes });
    }
    let config = daemon.noted_config();
    let daemon = Arc::new(daemon);
    daemon.follow_freed_on();
    let ended = worker::serve(daemon, control, &config, &mut orders);
    orders.tell(&News::Stopped(ended.as_ref().err().cloned()));
    ended
}
