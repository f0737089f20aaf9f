//! The client's side of the control socket: one question, one answer.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use tmem::WritebackSettings;

use super::protocol::{RESPONSE_MAX, Request, Response};
use crate::backing::{BackingInfo, BackingSpec, WritebackChange};
use crate::daemon::DeviceInfo;
use crate::exit::{Exit, Failure};

/// How long the daemon may take to answer a question. Changes may take as long as a swapoff does.
const QUERY_PATIENCE: Duration = Duration::from_secs(10);

/// How long an upgrade may take after the old process is gone, and how often it is asked how it went.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(90);
const UPGRADE_PERIOD: Duration = Duration::from_millis(50);

/// Why the daemon could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// It did not answer in time.
    #[error("the daemon at {} does not answer: look at its log", .0.display())]
    Mute(PathBuf),
    /// Nobody listens.
    #[error(
        "no tmem daemon answers at {}: start one with 'tmem run', or name its socket with --control",
        .0.display()
    )]
    NoDaemon(PathBuf),
    /// It answered with something else.
    #[error("the daemon at {} gave no usable answer: {reason}", path.display())]
    Nonsense {
        /// The socket.
        path: PathBuf,
        /// What was wrong with it.
        reason: String,
    },
    /// The socket may not be used.
    #[error("not allowed to use {}: try again with sudo", .0.display())]
    Permission(PathBuf),
    /// A system call failed.
    #[error("cannot talk to the daemon at {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The system call's error.
        source: io::Error,
    },
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let code = match &error {
            ClientError::Mute(_) | ClientError::NoDaemon(_) => Exit::NoDaemon,
            ClientError::Permission(_) => Exit::Permission,
            ClientError::Nonsense { .. } | ClientError::Io { .. } => Exit::Failure,
        };
        Failure::new(code, error)
    }
}

/// A client of the daemon that serves a control socket.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client of the socket at `path`. Nothing is connected before something is asked.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Makes a swap device.
    pub fn add_swap(&self, name: Option<&str>, bytes: u64) -> Result<DeviceInfo, Failure> {
        match self.ask(&Request::AddSwap { name: name.map(str::to_owned), bytes })? {
            Response::Added(info) => Ok(info),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Removes a device.
    pub fn del(&self, name: &str) -> Result<(), Failure> {
        match self.ask(&Request::Del { name: name.to_owned() })? {
            Response::Deleted => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// The devices.
    pub fn list(&self) -> Result<Vec<DeviceInfo>, Failure> {
        match self.ask(&Request::List)? {
            Response::Devices(devices) => Ok(devices),
            other => Err(self.unexpected(&other)),
        }
    }

    /// The report of all figures.
    pub fn stats(&self) -> Result<Value, Failure> {
        match self.ask(&Request::Stats)? {
            Response::Stats(report) => Ok(report),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Sets the pool limit and returns the one that is now in force, in bytes.
    pub fn set_pool_limit(&self, bytes: u64) -> Result<u64, Failure> {
        match self.ask(&Request::SetPoolLimit { bytes })? {
            Response::PoolLimit(bytes) => Ok(bytes),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has a backing file taken into use and returns it as it is in use. `spec.encrypt` is not for a client
    /// to say, and is not sent.
    pub fn set_backing(&self, spec: &BackingSpec) -> Result<BackingInfo, Failure> {
        let path = spec.path.to_str().ok_or_else(|| {
            Failure::new(Exit::Usage, "the path of a backing file must be UTF-8: choose another")
        })?;
        let request =
            Request::SetBacking { path: path.to_owned(), bytes: spec.bytes, force: spec.force };
        match self.ask(&request)? {
            Response::Backing(info) => Ok(info),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Changes a setting of writeback and returns all as they are now in force.
    pub fn set_writeback(&self, change: WritebackChange) -> Result<WritebackSettings, Failure> {
        match self.ask(&Request::SetWriteback(change))? {
            Response::Writeback(settings) => Ok(settings),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has another process go on, of the program that has the daemon's name by now, and returns its number.
    pub fn upgrade(&self) -> Result<u32, Failure> {
        let answer = match self.exchange(&Request::Upgrade) {
            // The one that was asked is ended if all goes well, and the next one knows.
            Err(ClientError::Nonsense { .. } | ClientError::Io { .. }) => Response::UpgradePending,
            answer => self.understand(&answer?)?,
        };
        let deadline = Instant::now() + UPGRADE_PATIENCE;
        let mut answer = answer;
        loop {
            match answer {
                Response::Upgraded { pid } => return Ok(pid),
                Response::UpgradePending if Instant::now() < deadline => {}
                Response::UpgradePending => return Err(ClientError::Mute(self.path.clone()).into()),
                other => return Err(self.unexpected(&other)),
            }
            sleep(UPGRADE_PERIOD);
            answer = match self.exchange(&Request::UpgradeOutcome) {
                Err(ClientError::NoDaemon(path)) => {
                    return Err(ClientError::NoDaemon(path).into());
                }
                Err(_) => Response::UpgradePending,
                Ok(line) => self.understand(&line)?,
            };
        }
    }

    /// Sends a request and reads what comes back; a refusal is an error.
    fn ask(&self, request: &Request) -> Result<Response, Failure> {
        self.understand(&self.exchange(request)?)
    }

    fn understand(&self, line: &[u8]) -> Result<Response, Failure> {
        match Response::parse(line).map_err(|reason| self.nonsense(reason))? {
            Response::Failed(failure) => Err(Failure::new(failure.code, failure.message)),
            response => Ok(response),
        }
    }

    /// Sends a request and reads the line that comes back.
    fn exchange(&self, request: &Request) -> Result<Vec<u8>, ClientError> {
        let mut stream = UnixStream::connect(&self.path).map_err(|error| self.failed(error))?;
        if request.is_query() {
            let set = stream.set_read_timeout(Some(QUERY_PATIENCE));
            set.map_err(|error| self.failed(error))?;
        }
        // A server that refuses us may close before it has read all: its answer tells why, so a
        // failed write is not the end.
        let sent = stream.write_all(request.to_line().as_bytes());
        let _ = stream.shutdown(Shutdown::Write);
        let mut line = Vec::new();
        let mut reader = BufReader::new(&stream).take(RESPONSE_MAX as u64);
        let read = reader.read_until(b'\n', &mut line);
        if line.pop() == Some(b'\n') {
            return Ok(line);
        }
        sent.and(read).map_err(|error| self.failed(error))?;
        Err(self.nonsense("it closed the connection before the end of its answer".to_owned()))
    }

    fn failed(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NoDaemon(path)
            }
            io::ErrorKind::PermissionDenied => ClientError::Permission(path),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Mute(path),
            _ => ClientError::Io { path, source },
        }
    }

    fn nonsense(&self, reason: String) -> ClientError {
        ClientError::Nonsense { path: self.path.clone(), reason }
    }

    fn unexpected(&self, response: &Response) -> Failure {
        self.nonsense(format!("it answered another question: {}", response.to_line())).into()
    }
}
