//! The worker: the process that serves, as long as it is told to.
//!
//! Once a device is in use it must not end before it is out of use again: whoever waits for a page would wait
//! for ever. So a stop that is refused, because somebody uses a device, leaves it serving. It is tried again
//! until it succeeds: at a system's shutdown others take their swap out of use at the same time as we, and
//! nobody sends a second signal but the one that kills. And it goes on without its supervisor: then it takes
//! signals itself.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tmem::Store;

use crate::config::RunConfig;
use crate::control::{Operations, Server};
use crate::exit::{Exit, Failure};
use crate::handover::Handover;
use crate::inherited::Inherited;
use crate::log::log;
use crate::signals::StopSignals;
use crate::socket::{self, Listener};
use crate::supervisor::pulse::{self, Heart};
use crate::supervisor::{Link, News, Order, Received};
use crate::watchdog::{Watchdog, Watched};
use crate::{notify, process};

/// How soon a stop that was refused is tried again. The wait doubles each time, up to
/// [`RETRY_MAX`]: a swapoff that fails for want of memory is work for the whole machine.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(32);

/// How long the supervisor may take to say what is to be served.
const ORDER_LIMIT: Duration = Duration::from_secs(60);

/// A daemon that has started.
pub trait Service: Operations + Watched {
    /// Takes every device out of use, removes it, and ends the daemon's threads. If that cannot be
    /// done, everything that could not be removed goes on as before, and the error says why and
    /// what to do.
    fn shutdown(&self) -> Result<(), Failure>;

    /// How much is swapped to its devices, in bytes.
    fn swapped(&self) -> u64;

    /// Has this called whenever there are other devices.
    fn watch(&self, _watcher: Box<dyn Fn() + Send + Sync>) {}

    /// All is over: no other process shall go on.
    fn ended(&self) {}
}

/// What a daemon is started with.
pub struct Start {
    /// What it shall be.
    pub config: RunConfig,
    /// The socket that it serves NBD on, if it does.
    pub nbd: Option<Listener>,
    /// Where all is kept that outlives the process.
    pub store: Store,
}

/// The sockets that outlive a worker.
pub struct Sockets {
    /// For the control plane.
    pub control: Listener,
    /// For NBD, if that is served.
    pub nbd: Option<Listener>,
}

impl Sockets {
    /// Those that were left to us.
    pub fn inherited(inherited: &mut Inherited, config: &RunConfig) -> Result<Self, Failure> {
        let mut listener = |name, path| {
            Listener::inherited(inherited, name, path)
                .map_err(|error| system("take over a socket", &error))
        };
        let control = listener("control", &config.control)?;
        let nbd = config.nbd.as_ref().map(|nbd| listener("nbd", nbd.path())).transpose()?;
        Ok(Self { control, nbd })
    }
}

/// A worker's life, as a process that the supervisor has started: serves what `start` starts until it is
/// told to stop and has stopped.
pub fn run<S: Service + 'static>(
    start: impl FnOnce(Start) -> Result<S, Failure>,
) -> Result<(), Failure> {
    // Before anything else, so that no signal ends us in the middle.
    let signals = StopSignals::take().map_err(|error| system("handle signals", &error))?;
    let start_failed = |error| system("start a worker", &error);
    let mut inherited = Inherited::take().map_err(start_failed)?;
    let link = Link::inherited(inherited.file("link").map_err(start_failed)?);
    let pulse = inherited.file("pulse").map_err(start_failed)?;
    let mut orders = Orders::new(link, signals, pulse);
    let serve = |orders: &mut Orders| {
        let config = orders.first()?;
        let sockets = Sockets::inherited(&mut inherited, &config)?;
        let store = inherited.file("store").map_err(start_failed)?;
        let store = Store::from_file(store).map_err(|e| Failure::new(Exit::Failure, e))?;
        let Sockets { control, nbd } = sockets;
        let service = Arc::new(start(Start { config: config.clone(), nbd, store })?);
        serve(service, control, &config, orders)
    };
    let ended = serve(&mut orders);
    orders.tell(&News::Stopped(ended.as_ref().err().cloned()));
    ended
}

/// Serves until told to stop, and stops. Of `config`, the devices are those that are still to be made.
pub fn serve<S: Service + 'static>(
    service: Arc<S>,
    control: Listener,
    config: &RunConfig,
    orders: &mut Orders,
) -> Result<(), Failure> {
    // A panic must not take down what others may go on with.
    let _guard = process::become_essential();
    let watched = orders.start_pulse().and_then(|heart| Watchdog::start(service.clone(), heart));
    let watchdog = watched.inspect_err(|error| {
        // No reason not to serve.
        log(format_args!("nobody will see whether requests end: {error}"));
    });
    let server = match Server::start(control, service.clone(), Arc::clone(&orders.handover)) {
        Ok(server) => server,
        Err(error) => {
            let failure = system("start the control threads", &error);
            if !service.list().is_empty() {
                // Another process may be able to; what is swapped must not go with this one.
                process::fatal(format_args!("{failure}"));
            }
            service.shutdown()?;
            return Err(failure);
        }
    };
    let added = add_devices(config, &*service, orders);
    let link = Arc::clone(&orders.link);
    // A supervisor that is gone needs no other standby.
    service.watch(Box::new(move || drop(link.send(&News::Changed))));
    match &added {
        Ok(Added::All) => {
            orders.tell(&News::Ready { devices: service.list().len() });
            orders.wait_for_stop(|| service.list().is_empty());
        }
        Ok(Added::UntilToldToStop) => {}
        Err(failure) => log(format_args!("stopping: {failure}")),
    }
    orders.tell(&News::Stopping);
    let leftovers = Leftovers::report(service.clone(), Arc::clone(&orders.link));
    stop(&*service, orders);
    server.stop();
    // Until just now a client could still add a device. Usually none has, and this does nothing.
    stop(&*service, orders);
    drop((leftovers, watchdog));
    service.ended();
    if orders.is_orphan {
        // The supervisor would have.
        socket::remove(&config.control);
        config.nbd.iter().for_each(|nbd| socket::remove(nbd.path()));
    }
    added.map(|_| ())
}

/// How far the adding of devices went.
enum Added {
    /// All are there.
    All,
    /// The order to stop came before the last one.
    UntilToldToStop,
}

/// Adds the devices that the daemon shall start with, until it is told to stop.
fn add_devices(
    config: &RunConfig,
    service: &dyn Operations,
    orders: &mut Orders,
) -> Result<Added, Failure> {
    for swap in &config.swaps {
        if orders.is_stop_wanted() {
            return Ok(Added::UntilToldToStop);
        }
        let info = service.add_swap(swap.name.as_deref(), swap.bytes)?;
        orders.tell(&News::Added { name: info.name, path: info.path, bytes: info.bytes });
    }
    Ok(Added::All)
}

/// Stops the daemon, however often that has to be tried.
fn stop(service: &dyn Service, orders: &mut Orders) {
    let mut said = String::new();
    let mut delay = RETRY_FIRST;
    while let Err(failure) = service.shutdown() {
        let message = format!("still running: {failure}");
        if message != said {
            log(&message);
            orders.tell(&News::Status(message.clone()));
            said = message;
        }
        // What came meanwhile asked for what has just been tried.
        let _ = orders.is_stop_wanted();
        orders.wait_for_stop_at_most(delay);
        delay = (delay * 2).min(RETRY_MAX);
    }
}

/// Tells the supervisor how much is left to swap off, now and then until it is dropped.
struct Leftovers {
    /// Dropped to end the thread.
    stopping: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Leftovers {
    fn report<S: Service + 'static>(service: Arc<S>, link: Arc<Link>) -> Self {
        let (stopping, end) = channel();
        let report = move || {
            loop {
                // A supervisor that is gone has nobody to tell.
                let _ = link.send(&News::Left(service.swapped()));
                if end.recv_timeout(notify::PATIENCE_PERIOD) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        let thread = match process::spawn("tmem-leftovers".into(), report) {
            Ok(thread) => Some(thread),
            Err(error) => {
                log(format_args!("cannot ask for patience: {error}"));
                None
            }
        };
        Self { stopping: Some(stopping), thread }
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        drop(self.stopping.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

/// Who tells the worker what to do: its supervisor, and when that is gone, signals.
pub struct Orders {
    link: Arc<Link>,
    /// For whom it is to tell how an upgrade ended.
    handover: Arc<Handover>,
    signals: StopSignals,
    /// Not beating yet.
    pulse: Option<OwnedFd>,
    is_orphan: bool,
    is_stop_wanted: bool,
}

impl Orders {
    /// They come by this link and these signals.
    pub fn new(link: Link, signals: StopSignals, pulse: OwnedFd) -> Self {
        let link = Arc::new(link);
        let handover = Arc::new(Handover::by(Arc::clone(&link)));
        let pulse = Some(pulse);
        Self { link, handover, signals, pulse, is_orphan: false, is_stop_wanted: false }
    }

    /// From now on the supervisor may feel that we run, and serve.
    fn start_pulse(&mut self) -> io::Result<Arc<Heart>> {
        self.pulse.take().map_or_else(|| Ok(Arc::default()), pulse::start)
    }

    /// What is to be served.
    fn first(&mut self) -> Result<RunConfig, Failure> {
        match self.link.wait(ORDER_LIMIT) {
            Ok(Received::Message(Order::Serve(config))) => Ok(*config),
            Ok(other) => {
                let message = format!("the supervisor did not say what to serve: {other:?}");
                Err(Failure::new(Exit::Failure, message))
            }
            Err(error) => Err(system("hear from the supervisor", &error)),
        }
    }

    /// Tells the supervisor, if there is one.
    pub fn tell(&self, news: &News) {
        if self.is_orphan {
            return;
        }
        // One that has gone is noticed when it is listened to.
        if let Err(error) = self.link.send(news) {
            log(format_args!("cannot tell the supervisor {news:?}: {error}"));
        }
    }

    /// Whether the order to stop came since this was asked.
    fn is_stop_wanted(&mut self) -> bool {
        while !self.is_orphan {
            match self.link.receive() {
                Ok(Received::Message(Order::Stop)) => self.is_stop_wanted = true,
                Ok(Received::Nothing) => break,
                Ok(Received::Message(Order::Upgraded(failure))) => self.handover.ended(failure),
                Ok(Received::Message(Order::Serve(_))) => {}
                Ok(Received::Closed) => {
                    self.is_orphan = true;
                    log("the supervisor is gone: serving on without it");
                }
                // One of another program may know orders that this one does not.
                Err(error) => {
                    log(format_args!("cannot hear the supervisor: {error}"));
                    break;
                }
            }
        }
        // Whoever signals a whole group means the supervisor, which passes it on.
        if let Some(signal) = self.signals.came().filter(|_| self.is_orphan) {
            log(format_args!("stopping on {signal}"));
            self.is_stop_wanted = true;
        }
        std::mem::take(&mut self.is_stop_wanted)
    }

    /// Waits for the order to stop. Without a supervisor and without anything to serve (`is_idle`) it does
    /// not come any more.
    fn wait_for_stop(&mut self, is_idle: impl Fn() -> bool) {
        while !(self.is_stop_wanted() || self.is_orphan && is_idle()) {
            self.wait(None);
        }
    }

    /// The same, but not longer than `limit`.
    fn wait_for_stop_at_most(&mut self, limit: Duration) {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_stop_wanted() {
                return;
            }
            self.wait(Some(left));
        }
    }

    /// Waits for anything to come.
    fn wait(&self, limit: Option<Duration>) {
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if !self.is_orphan {
            fds.push(PollFd::new(&*self.link, PollFlags::IN));
        }
        // Interrupted, or for want of kernel memory: whoever waits looks again.
        let _ = poll(&mut fds, limit.as_ref());
    }
}

/// A system call that failed.
pub(crate) fn system(action: &str, error: &io::Error) -> Failure {
    Failure::new(Exit::Failure, format!("cannot {action}: {error}"))
}
