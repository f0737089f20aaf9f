//! The control server: answers clients, whatever they do.
//!
//! Three threads and nothing that grows. One reads: it polls all clients, so that a client that
//! never sends, sends half a request or sends junk costs a buffer of [`REQUEST_MAX`] bytes for
//! [`PATIENCE`] and no thread. Of more than [`CLIENTS_MAX`] such clients the one that has waited
//! longest has to go. Whole requests go to two workers: one for questions, one for changes, so
//! that figures can be read while a swapoff takes its time. No I/O depends on any of them.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::operations::Operations;
use super::protocol::{REQUEST_MAX, Request, Response};
use super::report::report;
use crate::backing::BackingSpec;
use crate::daemon::{check_name, check_swap_bytes};
use crate::exit::{Exit, Failure};
use crate::handover::{Handover, Outcome};
use crate::process::spawn;
use crate::socket::Listener;

/// Clients whose request is being read at a time, and changes that may wait for their worker.
pub const CLIENTS_MAX: usize = 8;

/// Questions that may wait for their worker: more, for a question is no more than a descriptor.
const QUERIES_MAX: usize = 64;

/// How long a client may take to send its request.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a client may take to make room for its response.
const WRITE_PATIENCE: Duration = Duration::from_secs(1);

/// How long to leave the listener alone after the system could not give us a client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A control server at work. Stop it with [`Server::stop`].
#[derive(Debug)]
pub struct Server {
    wake: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Serves `operations` to the clients of `listener`, and upgrades by `handover`.
    pub fn start(
        listener: Listener,
        operations: Arc<dyn Operations>,
        handover: Arc<Handover>,
    ) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (queries, query_jobs) = sync_channel(QUERIES_MAX);
        let (changes, change_jobs) = sync_channel(CLIENTS_MAX);
        let reader = Reader { listener, wake: wake.clone(), clients: Vec::new(), queries, changes };
        let (for_changes, handover_for_changes) = (operations.clone(), handover.clone());
        // A thread that cannot be started drops its end of a channel, and with it those that were.
        let threads = vec![
            spawn("tmem-query".into(), move || work(&query_jobs, &*operations, &handover))?,
            spawn("tmem-change".into(), move || {
                work(&change_jobs, &*for_changes, &handover_for_changes);
            })?,
            spawn("tmem-control".into(), move || reader.run())?,
        ];
        Ok(Self { wake, threads })
    }

    /// Removes the socket and ends the threads, after the requests that they have begun.
    pub fn stop(self) {
        // An eventfd refuses only when it is full, and then it wakes the reader just as well.
        let _ = rustix::io::write(&*self.wake, &1u64.to_le_bytes());
        for thread in self.threads {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

/// A request on its way to a worker, and whom to answer.
struct Job {
    client: UnixStream,
    request: Request,
}

/// A client whose request is not complete.
struct Client {
    stream: UnixStream,
    received: Vec<u8>,
    deadline: Instant,
}

/// What one look at a client showed.
enum Progress {
    /// Its request is not complete.
    Waiting,
    /// Its request is complete.
    Line(Vec<u8>),
    /// Its request will not be completed.
    Broken(&'static str),
}

/// The thread that accepts and reads.
struct Reader {
    listener: Listener,
    wake: Arc<OwnedFd>,
    clients: Vec<Client>,
    queries: SyncSender<Job>,
    changes: SyncSender<Job>,
}

impl Reader {
    fn run(mut self) {
        while let Some((connecting, ready)) = self.wait() {
            self.read(&ready);
            self.expire();
            if connecting && !self.accept() {
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }

    /// Waits for something to do: whether somebody connects, and which clients have news. None
    /// when the server is to stop.
    fn wait(&self) -> Option<(bool, Vec<bool>)> {
        let deadline = self.clients.iter().map(|client| client.deadline).min();
        let timeout = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec::try_from(left).expect("patience fits a timespec")
        });
        let fds = [self.wake.as_fd(), self.listener.socket.as_fd()];
        let fds = fds.into_iter().chain(self.clients.iter().map(|client| client.stream.as_fd()));
        let mut fds: Vec<PollFd> =
            fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // Poll fails for want of kernel memory only: look again a little later.
            Err(_) => thread::sleep(ACCEPT_PAUSE),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        (!ready[0]).then(|| (ready[1], ready[2..].to_vec()))
    }

    /// Reads from the clients that have news, and passes on what is complete.
    fn read(&mut self, ready: &[bool]) {
        let clients = std::mem::take(&mut self.clients);
        for (mut client, ready) in clients.into_iter().zip(ready) {
            match if *ready { client.read() } else { Progress::Waiting } {
                Progress::Waiting => self.clients.push(client),
                Progress::Line(line) => self.dispatch(client.stream, &line),
                Progress::Broken(why) => refuse(&client.stream, Exit::Failure, why),
            }
        }
    }

    /// Ends the clients whose time is up.
    fn expire(&mut self) {
        let now = Instant::now();
        self.clients.retain(|client| {
            if client.deadline <= now {
                refuse(
                    &client.stream,
                    Exit::Failure,
                    "no whole request came in time: send it again",
                );
            }
            client.deadline > now
        });
    }

    /// Accepts whoever connects; false when the system cannot give us more clients now.
    fn accept(&mut self) -> bool {
        // As many as there is room for, and then the clients are looked at again.
        for _ in 0..CLIENTS_MAX {
            match self.listener.socket.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Takes a client in if it may ask, at the cost of the one that has waited longest.
    fn admit(&mut self, stream: UnixStream) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if !may_ask(&stream) {
            let message = "only root and the daemon's own user may control it: use sudo";
            return refuse(&stream, Exit::Permission, message);
        }
        if self.clients.len() == CLIENTS_MAX {
            let slow = self.clients.remove(0);
            refuse(
                &slow.stream,
                Exit::Failure,
                "too many clients, and this one is slow: try again",
            );
        }
        let deadline = Instant::now() + PATIENCE;
        self.clients.push(Client { stream, received: Vec::new(), deadline });
    }

    /// Hands a request line to the worker for its kind.
    fn dispatch(&self, client: UnixStream, line: &[u8]) {
        let request = match Request::parse(line) {
            Ok(request) => request,
            Err(failure) => return answer(&client, &Response::Failed(failure)),
        };
        let worker = if request.is_query() { &self.queries } else { &self.changes };
        match worker.try_send(Job { client, request }) {
            Ok(()) => {}
            Err(TrySendError::Full(job)) => {
                refuse(
                    &job.client,
                    Exit::Failure,
                    "too many requests are waiting: try again later",
                );
            }
            Err(TrySendError::Disconnected(job)) => {
                let message = "the control thread has died: look for its panic in the daemon's log";
                refuse(&job.client, Exit::Failure, message);
            }
        }
    }
}

impl Client {
    /// Reads once, so that no client keeps the others waiting.
    fn read(&mut self) -> Progress {
        let mut chunk = [0; 16 << 10];
        match (&self.stream).read(&mut chunk) {
            Ok(0) => Progress::Broken("the request ended before its newline"),
            Ok(count) => {
                let searched = self.received.len();
                self.received.extend_from_slice(&chunk[..count]);
                let newline = chunk[..count].iter().position(|byte| *byte == b'\n');
                let length = newline.map_or(self.received.len(), |at| searched + at + 1);
                if length > REQUEST_MAX || (newline.is_none() && length == REQUEST_MAX) {
                    return Progress::Broken("the request is longer than 65536 bytes");
                }
                if newline.is_none() {
                    return Progress::Waiting;
                }
                self.received.truncate(length - 1);
                Progress::Line(std::mem::take(&mut self.received))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Progress::Waiting,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Progress::Waiting,
            Err(_) => Progress::Broken("the connection broke"),
        }
    }
}

/// A worker: carries out requests one at a time, until there can be no more.
fn work(jobs: &Receiver<Job>, operations: &dyn Operations, handover: &Handover) {
    for Job { client, request } in jobs {
        let response = carry_out(operations, handover, request).unwrap_or_else(Response::Failed);
        answer(&client, &response);
    }
}

/// Carries out one request. Nothing that a client says is trusted.
fn carry_out(
    operations: &dyn Operations,
    handover: &Handover,
    request: Request,
) -> Result<Response, Failure> {
    Ok(match request {
        Request::AddSwap { name, bytes } => {
            name.as_deref().map_or(Ok(()), check_name)?;
            check_swap_bytes(bytes)?;
            Response::Added(operations.add_swap(name.as_deref(), bytes)?)
        }
        Request::Del { name } => {
            check_name(&name)?;
            operations.del(&name)?;
            Response::Deleted
        }
        Request::List => Response::Devices(operations.list()),
        Request::SetBacking { path, bytes, force } => {
            // Whether to encrypt is the daemon's own setting; this is the safe side.
            let spec = BackingSpec { path: path.into(), bytes, encrypt: true, force };
            spec.check()?;
            Response::Backing(operations.set_backing(&spec)?)
        }
        Request::SetWriteback(change) => Response::Writeback(operations.set_writeback(change)?),
        Request::SetPoolLimit { bytes } => Response::PoolLimit(operations.set_pool_limit(bytes)?),
        Request::Stats => Response::Stats(report(&operations.stats())),
        Request::Upgrade => {
            handover.ask()?;
            Response::Upgraded { pid: std::process::id() }
        }
        Request::UpgradeOutcome => match handover.outcome() {
            Outcome::Done => Response::Upgraded { pid: std::process::id() },
            Outcome::Failed(failure) => return Err(failure),
            Outcome::None | Outcome::Pending => Response::UpgradePending,
        },
    })
}

/// True if the peer is root or runs as the same user as we do.
fn may_ask(stream: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(stream)
        .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

/// Answers with a failure.
fn refuse(client: &UnixStream, code: Exit, message: &str) {
    answer(client, &Response::Failed(Failure::new(code, message)));
}

/// Sends a response. It fits the socket's buffer, so this waits only for a client that reads
/// nothing, and not for long; a client that has gone has no use for its answer.
fn answer(mut client: &UnixStream, response: &Response) {
    let _ = client
        .set_nonblocking(false)
        .and_then(|()| client.set_write_timeout(Some(WRITE_PATIENCE)))
        .and_then(|()| client.write_all(response.to_line().as_bytes()));
}
