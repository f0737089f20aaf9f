//! A listening socket in the file system: made, guarded, removed.
//!
//! The socket has mode 0600 from the moment its name exists: the mode is set on the unbound socket,
//! and bind gives it to the name. A lock on a file beside it says which daemon the name belongs to,
//! so that a second daemon is refused, while a name left by a daemon that died is replaced. The
//! lock file itself stays, for a lock on a removed file guards nothing.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::exit::{Exit, Failure};
use crate::hold;
use crate::inherited::{Inherited, Legacy};

/// Connections that the kernel keeps for us until we accept them.
const BACKLOG: i32 = 64;

/// Which option names the socket, for what messages say.
pub type OptionName = &'static str;

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Another daemon has the socket.
    #[error(
        "another tmem daemon{} serves {}: stop it first, or choose another socket with {option}",
        pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(), path.display()
    )]
    Running {
        /// The socket.
        path: PathBuf,
        /// Its process, if it could be found out.
        pid: Option<u32>,
        /// The option.
        option: OptionName,
    },
    /// The path is taken by something that is no socket.
    #[error(
        "{} exists and is not a socket: remove it, or choose another path with {option}",
        path.display()
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
        /// The option.
        option: OptionName,
    },
    /// The path cannot name a socket.
    #[error("{} cannot name a socket: use an absolute path of at most 107 bytes", .0.display())]
    BadPath(PathBuf),
    /// A system call failed.
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source, option))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system call's error.
        source: io::Error,
        /// The option.
        option: OptionName,
    },
}

fn advice(source: &io::Error, option: OptionName) -> String {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            format!(": run as root, or choose another socket with {option}")
        }
        _ => String::new(),
    }
}

impl From<BindError> for Failure {
    fn from(error: BindError) -> Self {
        let code = match &error {
            BindError::Running { .. } => Exit::Running,
            BindError::NotASocket { .. } | BindError::BadPath(_) => Exit::Usage,
            BindError::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => Exit::Permission,
                _ => Exit::Failure,
            },
        };
        Failure::new(code, error)
    }
}

/// A socket that is bound, locked and listening. Dropping it removes the name.
#[derive(Debug)]
pub struct Listener {
    pub(crate) socket: UnixListener,
    path: PathBuf,
    /// Holds the lock for as long as it is open, here or in a process that has inherited it.
    lock: File,
    /// Whether the name is ours to remove.
    is_owner: bool,
}

impl Listener {
    /// Makes the socket at `path`, which `option` names, and its directory with mode 0755 if there
    /// is none. Clients that connect wait until the listener is served. It does not block.
    pub fn bind(path: &Path, option: OptionName) -> Result<Self, BindError> {
        let address = SocketAddrUnix::new(path).ok().filter(|_| path.is_absolute());
        let address = address.ok_or_else(|| BindError::BadPath(path.to_owned()))?;
        let directory = path.parent().ok_or_else(|| BindError::BadPath(path.to_owned()))?;
        let on = |action, path: &Path| on(action, path, option);
        make_directory(directory).map_err(on("make the directory", directory))?;
        let lock = lock(path, option)?;
        remove_stale(path, option)?;
        let socket = listen(&address).map_err(on("bind the socket", path))?;
        Ok(Self { socket, path: path.to_owned(), lock, is_owner: true })
    }

    /// Leaves the socket and its lock, by these names, to a process that is to be started.
    pub fn bequeath<'a>(
        &'a self,
        socket: &'static str,
        lock: &'static str,
        legacy: &mut Legacy<'a>,
    ) {
        legacy.add(socket, self.socket.as_fd());
        legacy.add(lock, self.lock.as_fd());
    }

    /// Takes a socket at `path` that was left to us as `name`. Its name in the file system is not ours.
    pub fn inherited(inherited: &mut Inherited, name: &str, path: &Path) -> io::Result<Self> {
        let socket = inherited.file(name)?.into();
        let lock = inherited.file(&format!("{name}-lock"))?.into();
        Ok(Self { socket, path: path.to_owned(), lock, is_owner: false })
    }

    /// The same, and the lock says from now on that it is ours, in the place of whoever had it. The name stays until it is
    /// [removed](Self::remove): others may be asked by it.
    pub fn adopted(inherited: &mut Inherited, name: &str, path: &Path) -> io::Result<Self> {
        let listener = Self::inherited(inherited, name, path)?;
        // It is for people alone.
        let _ = write_pid(&listener.lock);
        Ok(listener)
    }

    /// Removes the name. Only for who has the lock, at the end of all.
    pub fn remove(&self) {
        remove(&self.path);
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // The lock is still ours here, so the name is too.
        if self.is_owner {
            remove(&self.path);
        }
    }
}

/// Removes the name of a socket, on which we have the lock. One that is gone already is no loss.
pub fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}

/// Whether somebody has the lock of the socket at `path`.
pub fn is_served(path: &Path) -> bool {
    let lock = File::open(lock_path(path));
    lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Whether it is a socket that listens at `path`.
pub fn listens_at(file: impl AsFd, path: &Path) -> bool {
    let listens = rustix::net::sockopt::socket_acceptconn(&file).unwrap_or(false);
    let name = rustix::net::getsockname(file).ok().filter(|_| listens);
    let name = name.and_then(|name| SocketAddrUnix::try_from(name).ok());
    name.is_some_and(|name| name.path_bytes() == Some(path.as_os_str().as_bytes()))
}

/// Whether it is the file on which the lock is of the socket at `path`.
pub fn is_lock_of(file: impl AsFd, path: &Path) -> bool {
    let file = rustix::fs::fstat(file).map(|stat| (stat.st_dev, stat.st_ino));
    let lock = rustix::fs::lstat(lock_path(path)).map(|stat| (stat.st_dev, stat.st_ino));
    file.is_ok() && file == lock
}

fn lock_path(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

/// Makes `directory` and what is missing above it, each with mode 0755 whatever the umask is.
fn make_directory(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    if let Some(parent) = directory.parent() {
        make_directory(parent)?;
    }
    match DirBuilder::new().mode(0o755).create(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
        Ok(()) => fs::set_permissions(directory, fs::Permissions::from_mode(0o755)),
    }
}

/// Locks the file beside the socket and writes our process id into it.
fn lock(socket: &Path, option: OptionName) -> Result<File, BindError> {
    let on = |action, path: &Path| on(action, path, option);
    let path = lock_path(socket);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o600);
    options.custom_flags(i32::try_from(OFlags::NOFOLLOW.bits()).expect("flags fit an int"));
    let file = options.open(&path).map_err(on("open the lock file", &path))?;
    match hold::take(|| file.try_lock(), |error| matches!(error, TryLockError::WouldBlock)) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let read = file.take(16).read_to_string(&mut pid);
            let pid = read.ok().and_then(|_| pid.trim().parse().ok());
            return Err(BindError::Running { path: socket.to_owned(), pid, option });
        }
        Err(TryLockError::Error(error)) => return Err(on("lock", &path)(error)),
    }
    write_pid(&file).map_err(on("write the lock file", &path))?;
    Ok(file)
}

/// Says whose a lock is.
fn write_pid(lock: &File) -> io::Result<()> {
    lock.set_len(0)?;
    lock.write_all_at(format!("{}\n", std::process::id()).as_bytes(), 0)
}

/// Removes a socket that a dead daemon left. The caller holds the lock, so nobody serves it.
fn remove_stale(path: &Path, option: OptionName) -> Result<(), BindError> {
    let on = |action, path: &Path| on(action, path, option);
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(on("look at", path)(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(BindError::NotASocket { path: path.to_owned(), option })
        }
        Ok(_) => fs::remove_file(path).map_err(on("remove the stale socket", path)),
    }
}

/// A listening socket at `address` that only its owner can connect to.
fn listen(address: &SocketAddrUnix) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Turns a system call's error into ours.
fn on(
    action: &'static str,
    path: &Path,
    option: OptionName,
) -> impl FnOnce(io::Error) -> BindError + use<> {
    let path = path.to_owned();
    move |source| BindError::Io { action, path, source, option }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn the_socket_is_the_owners_and_its_directory_is_made() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a/b/control.sock");
        let listener = Listener::bind(&path, "--control").unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(&home.path().join("a")), 0o755);
        assert_eq!(mode(&home.path().join("a/b")), 0o755);
        assert_eq!(mode(&home.path().join("a/b/control.sock.lock")), 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn bind_gives_the_mode_of_the_unbound_socket() {
        // No umask is in force that would hide a window: bind alone must give 0600.
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("s");
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        fchmod(&socket, Mode::RUSR | Mode::WUSR).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_second_daemon_is_refused_with_the_pid_of_the_first() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("s");
        let first = Listener::bind(&path, "--control").unwrap();
        match Listener::bind(&path, "--control") {
            Err(BindError::Running { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        UnixStream::connect(&path).unwrap();
        drop(first);
        Listener::bind(&path, "--control").unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        // A child that another test starts has it open for a moment.
        let refused = || UnixStream::connect(&path).map_or_else(Ok, Err);
        hold::take(refused, |_| true).unwrap();
        let _listener = Listener::bind(&path, "--control").unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("s");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Listener::bind(&path, "--control"), Err(BindError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn paths_that_cannot_be_bound() {
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(200)));
        for path in [long.as_path(), Path::new("relative"), Path::new("/")] {
            let failure = Failure::from(Listener::bind(path, "--control").unwrap_err());
            assert!(failure.code != Exit::Ok && !failure.message.contains('\n'), "{failure}");
        }
    }
}
