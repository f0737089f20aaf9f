//! The NBD server: its socket, its workers, and who may connect.
//!
//! One thread accepts connections, gives each its memory and a worker, and takes both back: none
//! of that is the workers' to wait for. There are so many connections at most, for their buffers have
//! a budget; who comes when all places are taken is sent away at once.
//!
//! A server is made in three steps: all that takes memory first, which a process that waits for the death of another does
//! long before ([`NbdServer::prepare`]); then it serves an engine ([`NbdServer::begin`]), the kernel's client before all; then it listens.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt::set_socket_send_buffer_size;
use tmem::Engine;

use super::address::NbdAddress;
use super::buffer::BUFFER_BYTES;
use super::exports::{Export, Exports, Visit};
use super::kernel::{KernelClient, KernelError};
use super::protocol::Protocol;
use super::ring::Link;
use super::worker::{EngineSide, Worker, WorkerContext};
use crate::process;
use crate::socket::Listener;

/// Workers at most: more than serve what memory can deliver would only wait for each other.
const WORKERS_MAX: usize = 8;

/// Connections at most, whatever the memory.
const CONNECTIONS_MAX: usize = 64;

/// Connections that there may be on the smallest machine.
const CONNECTIONS_MIN: usize = 8;

/// Bytes of replies that wait in a socket on an export for swap, as the system call has it: memory of
/// the kernel, which has none to spare just then.
pub const SWAP_SEND_BYTES: usize = 64 << 10;

/// How long to leave the listener alone after the system could not give us a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How soon to try again to give the kernel another connection.
const REPAIR_PERIOD: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Why there is no NBD server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdServerError {
    /// A thread, or what it needs, could not be had.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
    /// The workers could not be made urgent.
    #[error(
        "cannot make the NBD workers real-time threads ({source}): without that, swap could deadlock \
         when memory is short; run as root with CAP_SYS_NICE"
    )]
    Urgent {
        /// The system call's error.
        source: io::Error,
    },
    /// A worker could not set up its io_uring.
    #[error("io_uring cannot be used ({source}): {}", crate::ublk::ring_advice(source))]
    Ring {
        /// The error.
        source: io::Error,
    },
}

/// What a server is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Purpose {
    /// Clients that can wait.
    Clients,
    /// The kernel swaps to it. What the workers send takes little memory of the kernel at a time, and
    /// they get that from the reserve: see [`process::become_urgent`]. With the inner value they go
    /// on without where that cannot be had.
    Swap {
        /// Whether to go on.
        best_effort: bool,
    },
}

impl Purpose {
    /// Prepares a worker's thread.
    fn prepare(self) -> Result<(), NbdServerError> {
        let Purpose::Swap { best_effort } = self else { return Ok(()) };
        match process::become_urgent() {
            Err(source) if !best_effort => Err(NbdServerError::Urgent { source }),
            _ => Ok(()),
        }
    }

    /// Prepares a connection's socket.
    fn set_up(self, socket: &impl AsFd) {
        if self != Purpose::Clients {
            // The least that a socket takes is not refused.
            let _ = set_socket_send_buffer_size(socket, SWAP_SEND_BYTES);
        }
    }
}

/// See the module's description. Dropping it ends all connections.
pub struct NbdServer {
    address: NbdAddress,
    exports: Arc<Exports>,
    purpose: Purpose,
    stop: Arc<AtomicBool>,
    acceptor_wake: Arc<OwnedFd>,
    worker_wakes: Vec<Arc<OwnedFd>>,
    /// Where the workers wait for the engine. Empty once they have it.
    starts: Mutex<Vec<SyncSender<Arc<Engine>>>>,
    /// For the acceptor, until it has taken it.
    listener: Arc<Mutex<Option<Listener>>>,
    desks: Arc<Desks>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl NbdServer {
    /// A server at `address` with a worker for each CPU, of which none does anything yet. All buffers together may take
    /// `buffer_budget` bytes, unless that is too little for [`CONNECTIONS_MIN`] connections. There are no exports yet.
    pub fn prepare(
        address: &NbdAddress,
        side: &EngineSide,
        cpus: usize,
        buffer_budget: u64,
        purpose: Purpose,
    ) -> Result<Self, NbdServerError> {
        let new_wake = || {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            let wake = eventfd(0, flags).map_err(io::Error::from);
            wake.map(Arc::new).map_err(system("make an eventfd"))
        };
        let most = connections_max(buffer_budget);
        let (retired, returns) = sync_channel(most);
        let desks = Arc::new(Desks { most, list: Mutex::default() });
        let mut server = Self {
            address: address.clone(),
            exports: Arc::default(),
            purpose,
            stop: Arc::default(),
            acceptor_wake: new_wake()?,
            worker_wakes: Vec::new(),
            starts: Mutex::default(),
            listener: Arc::default(),
            desks: Arc::clone(&desks),
            threads: Mutex::default(),
        };
        // From here on an error drops the server, which ends what has been started.
        for number in 0..cpus.clamp(1, WORKERS_MAX) {
            let (departures, arrivals) = sync_channel(most);
            let (start, engine) = sync_channel(1);
            let wake = new_wake()?;
            let context = WorkerContext {
                arrivals,
                retired: retired.clone(),
                retired_wake: Arc::clone(&server.acceptor_wake),
                wake: Arc::clone(&wake),
                stop: Arc::clone(&server.stop),
                side: side.clone(),
            };
            let thread = start_worker(number, context, purpose, engine, most)?;
            lock(&server.threads).push(thread);
            lock(&server.starts).push(start);
            server.worker_wakes.push(Arc::clone(&wake));
            lock(&server.desks.list).push(Desk { departures, wake, open: 0 });
        }
        let acceptor = Acceptor {
            listener: None,
            listener_to_come: Arc::clone(&server.listener),
            exports: Arc::clone(&server.exports),
            returns,
            wake: Arc::clone(&server.acceptor_wake),
            stop: Arc::clone(&server.stop),
            purpose,
            is_full: false,
            // No more than there are connections, so that there is no memory to wait for.
            broken: Vec::with_capacity(most),
            desks,
        };
        let thread = process::spawn_essential("tmem-nbd-accept".into(), move || acceptor.run());
        lock(&server.threads).push(thread.map_err(system("start the NBD server's thread"))?);
        Ok(server)
    }

    /// Serves exports on this engine from now on.
    pub fn begin(&self, engine: &Arc<Engine>) {
        for start in lock(&self.starts).drain(..) {
            // One that cannot go on has taken the process down.
            let _ = start.send(Arc::clone(engine));
        }
    }

    /// Accepts connections from now on, on `listener`, which is at the server's address.
    pub fn listen(&self, listener: Listener) {
        *lock(&self.listener) = Some(listener);
        ring_bell(&self.acceptor_wake);
    }

    /// Takes a place for a connection to this export by a client that does not negotiate.
    pub fn seat(&self, export: &Arc<Export>) -> Result<Seat, NoSeat> {
        Seat::reserve(&self.desks, &self.exports, export, self.purpose)
    }

    /// Where it is served.
    pub fn address(&self) -> &NbdAddress {
        &self.address
    }

    /// How many workers an export must be made for.
    pub fn workers(&self) -> usize {
        self.worker_wakes.len()
    }

    /// Lets clients use an export.
    pub fn add(&self, export: Arc<Export>) {
        self.exports.add(export);
    }

    /// Removes an export, which its owner has closed.
    pub fn remove(&self, export: &Arc<Export>) {
        self.exports.remove(export);
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Whoever still waits for an engine ends.
        lock(&self.starts).clear();
        for wake in self.worker_wakes.iter().chain([&self.acceptor_wake]) {
            ring_bell(wake);
        }
        for thread in lock(&self.threads).drain(..) {
            // A worker that panicked has ended the process, and the acceptor has said so itself.
            let _ = thread.join();
        }
    }
}

/// Connections that there may be at a time.
fn connections_max(buffer_budget: u64) -> usize {
    let affordable = buffer_budget / (2 * BUFFER_BYTES as u64);
    (affordable as usize).clamp(CONNECTIONS_MIN, CONNECTIONS_MAX)
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> NbdServerError {
    move |source| NbdServerError::System { what, source }
}

/// Starts a worker's thread, which waits for the engine, and waits until it can work.
fn start_worker(
    number: usize,
    context: WorkerContext,
    purpose: Purpose,
    engine: Receiver<Arc<Engine>>,
    places: usize,
) -> Result<JoinHandle<()>, NbdServerError> {
    let (ready, readiness) = sync_channel(1);
    let body = move || {
        // The ring belongs to the thread that makes it.
        let worker = purpose.prepare().and_then(|()| {
            Worker::new(context, places).map_err(|source| NbdServerError::Ring { source })
        });
        let (worker, report) = match worker {
            Ok(worker) => (Some(worker), Ok(())),
            Err(error) => (None, Err(error)),
        };
        // Its reader waits for nothing else.
        let _ = ready.send(report);
        if let Some(worker) = worker
            && let Ok(engine) = engine.recv()
        {
            worker.run(&engine);
        }
    };
    let thread = process::spawn_essential(format!("tmem-nbd{number}"), body);
    let what = "start an NBD worker";
    let thread = thread.map_err(|source| NbdServerError::System { what, source })?;
    match readiness.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            let source = io::Error::other("it ended at once");
            Err(NbdServerError::System { what, source })
        }
    }
}

/// The workers, as whoever has connections for them knows them.
struct Desks {
    /// Connections at most.
    most: usize,
    list: Mutex<Vec<Desk>>,
}

struct Desk {
    departures: SyncSender<Link>,
    wake: Arc<OwnedFd>,
    /// Connections that it serves, or will.
    open: usize,
}

impl Desks {
    /// Takes a place at the worker that serves the fewest; or says how many connections have all places.
    fn reserve(&self) -> Result<usize, usize> {
        let mut list = lock(&self.list);
        let open: usize = list.iter().map(|desk| desk.open).sum();
        let least = (0..list.len()).min_by_key(|&number| list[number].open);
        let number = least.filter(|_| open < self.most).ok_or(open)?;
        list[number].open += 1;
        Ok(number)
    }

    /// Gives back a place.
    fn release(&self, worker: usize) {
        lock(&self.list)[worker].open -= 1;
    }

    /// Gives a connection to its worker, where a place has been taken for it.
    fn admit(&self, link: Link) {
        let worker = link.worker;
        let list = lock(&self.list);
        let desk = &list[worker];
        // There is room for all connections; a worker that is gone takes none.
        let is_taken = desk.departures.try_send(link).is_ok();
        if is_taken {
            ring_bell(&desk.wake);
        }
        drop(list);
        if !is_taken {
            self.release(worker);
        }
    }
}

/// A place for a connection of a client that does not negotiate. It is given back if there comes none.
pub struct Seat {
    desks: Arc<Desks>,
    export: Arc<Export>,
    worker: usize,
    /// All memory that the connection will have; none once it has it.
    protocol: Option<Protocol>,
    purpose: Purpose,
}

/// Why there is no place.
#[derive(Debug, thiserror::Error, Eq, PartialEq)]
#[non_exhaustive]
pub enum NoSeat {
    /// The export is closed.
    #[error("the device is being removed")]
    Closed,
    /// All are taken.
    #[error("all {connections} NBD connections are in use: disconnect a client")]
    Full {
        /// How many there are.
        connections: usize,
    },
}

impl Seat {
    fn reserve(
        desks: &Arc<Desks>,
        exports: &Arc<Exports>,
        export: &Arc<Export>,
        purpose: Purpose,
    ) -> Result<Self, NoSeat> {
        let visit = Visit::begin(export).ok_or(NoSeat::Closed)?;
        let worker = desks.reserve().map_err(|connections| NoSeat::Full { connections })?;
        let protocol = Some(Protocol::agreed(Arc::clone(exports), worker, visit));
        let (desks, export) = (Arc::clone(desks), Arc::clone(export));
        Ok(Self { desks, export, worker, protocol, purpose })
    }

    /// Serves the connection of which this socket is the server's end, from now on. When it ends, the kernel's client gets another.
    pub fn take(mut self, socket: OwnedFd, kernel: Option<&KernelClient>) {
        self.purpose.set_up(&socket);
        if let Some(protocol) = self.protocol.take() {
            let mut link = Link::new(socket, protocol, self.worker, Instant::now());
            link.kernel = kernel.map(|client| (client.clone(), Arc::clone(&self.export)));
            self.desks.admit(link);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.protocol.is_some() {
            self.desks.release(self.worker);
        }
    }
}

/// The thread that accepts.
struct Acceptor {
    /// None before there is one.
    listener: Option<Listener>,
    listener_to_come: Arc<Mutex<Option<Listener>>>,
    exports: Arc<Exports>,
    returns: Receiver<Link>,
    desks: Arc<Desks>,
    wake: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    purpose: Purpose,
    /// Whether somebody was sent away since there was last a place.
    is_full: bool,
    /// Those of the kernel whose connection has ended, and who need another.
    broken: Vec<(KernelClient, Arc<Export>)>,
}

impl Acceptor {
    fn run(mut self) {
        while !self.stop.load(Ordering::Acquire) {
            let wake = PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN);
            let socket = self.listener.as_ref().map_or(self.wake.as_fd(), |l| l.socket.as_fd());
            let mut fds = [wake, PollFd::from_borrowed_fd(socket, PollFlags::IN)];
            let limit = (!self.broken.is_empty()).then_some(REPAIR_PERIOD);
            if poll(&mut fds, limit.as_ref()).is_err() {
                // For want of kernel memory only: look again a little later.
                sleep(ACCEPT_PAUSE);
            }
            let mut count = [0; 8];
            // Would block unless somebody rang; the count itself says nothing.
            let _ = rustix::io::read(&self.wake, &mut count);
            let come = lock(&self.listener_to_come).take();
            self.listener = self.listener.take().or(come);
            self.take_back();
            self.repair();
            if !self.accept() {
                sleep(ACCEPT_PAUSE);
            }
        }
    }

    /// Frees what connections had that are over.
    fn take_back(&mut self) {
        while let Ok(mut link) = self.returns.try_recv() {
            self.desks.release(link.worker);
            self.broken.extend(link.kernel.take());
        }
    }

    /// Gives the kernel another connection for each that has ended, unless it shall have none.
    fn repair(&mut self) {
        if self.broken.is_empty() {
            return;
        }
        let (desks, exports, purpose) = (&self.desks, &self.exports, self.purpose);
        if purpose != Purpose::Clients {
            // For what the kernel allocates. Where it is refused, that may have to wait.
            let _ = process::become_urgent();
        }
        self.broken.retain(|(client, export)| {
            if self.stop.load(Ordering::Acquire) {
                return false;
            }
            let seat = match Seat::reserve(desks, exports, export, purpose) {
                Ok(seat) => seat,
                // It may be opened again, or there may be a place, as long as the device is of use.
                Err(NoSeat::Closed | NoSeat::Full { .. }) => return !client.is_over(),
            };
            match client.try_reconnect() {
                Ok(Some(socket)) => {
                    seat.take(socket, Some(client));
                    process::note(format_args!("{} has another connection", client.path()));
                    false
                }
                Err(KernelError::Gone { .. }) => false,
                // The kernel has not seen yet that it has ended, or has no memory.
                Ok(None) | Err(_) => true,
            }
        });
        process::become_calm();
    }

    /// Accepts whoever connects; false when the system cannot give us more connections now.
    fn accept(&mut self) -> bool {
        // As many as there are places for, and then those that are over are looked for again.
        for _ in 0..self.desks.most {
            let Some(listener) = &self.listener else { return true };
            match listener.socket.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return true,
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {}
                    _ => return false,
                },
            }
        }
        true
    }

    /// Gives a connection to the worker that has the fewest, if there is a place for it.
    fn admit(&mut self, stream: UnixStream) {
        let reserved = self.desks.reserve();
        let was_full = std::mem::replace(&mut self.is_full, reserved.is_err());
        let number = match reserved {
            Ok(number) => number,
            Err(open) => {
                if !was_full {
                    // Not where it may have to wait: the kernel may need another connection meanwhile.
                    process::note(format_args!(
                        "all {open} NBD connections are in use: others are sent away"
                    ));
                }
                return;
            }
        };
        // io_uring hands back at once what would block on a socket that does not.
        if stream.set_nonblocking(false).is_err() {
            return self.desks.release(number);
        }
        self.purpose.set_up(&stream);
        let protocol = Protocol::new(Arc::clone(&self.exports), number);
        self.desks.admit(Link::new(stream.into(), protocol, number, Instant::now()));
    }
}

/// Locks. What is behind these locks is whole whenever somebody panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ring_bell(wake: &OwnedFd) {
    // Fails only if the count is at its maximum, and then whoever waits is awake.
    let _ = rustix::io::write(wake, &1_u64.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_fit_the_memory() {
        assert_eq!(connections_max(64 << 20), 64);
        assert_eq!(connections_max(8 << 20), 31);
        assert_eq!(connections_max(0), 8);
    }
}
