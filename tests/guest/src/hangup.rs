//! `hangup`: shuts down the nameless stream sockets of a process, as if whoever has the other ends had hung up.
//!
//! It says `hangup: sockets=N`; none is a failed check.

use crate::Outcome;
use crate::args::Args;
use crate::kill;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Runs the subcommand.
pub fn run(mut args: Args) -> Outcome {
    let name = args.text("name").ok_or("whose? --name NAME")?;
    args.finish()?;
    let process = kill::find(&name, None).ok_or_else(|| format!("there is no {name}"))?;
    let count = hang_up(process).map_err(|error| format!("process {process}: {error}"))?;
    println!("hangup: sockets={count}");
    Ok(count > 0)
}

fn hang_up(process: i32) -> io::Result<usize> {
    // SAFETY: the call takes numbers, and the file that it returns is nobody else's.
    let pidfd = unsafe { file(libc::syscall(libc::SYS_pidfd_open, process, 0))? };
    let mut count = 0;
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let number: RawFd = number;
        // SAFETY: as above.
        let socket = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
        // SAFETY: as above. What it has closed meanwhile is none.
        let Ok(socket) = (unsafe { file(socket) }) else { continue };
        if is_nameless_stream(&socket) {
            // SAFETY: the call takes numbers.
            match unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) } {
                0 => count += 1,
                _ => return Err(io::Error::last_os_error()),
            }
        }
    }
    Ok(count)
}

/// # Safety
///
/// What the system call has returned is a new file, or an error.
unsafe fn file(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

fn is_nameless_stream(socket: &OwnedFd) -> bool {
    let (mut kind, mut kind_bytes) = (0_i32, size_of::<i32>() as libc::socklen_t);
    let into = (&raw mut kind).cast();
    let (level, name) = (libc::SOL_SOCKET, libc::SO_TYPE);
    // SAFETY: the call writes as many bytes as there is room for.
    let known =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, into, &raw mut kind_bytes) };
    // SAFETY: all zeros is an address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let mut bytes = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: as above.
    let named =
        unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut bytes) };
    let is_unix = i32::from(address.sun_family) == libc::AF_UNIX;
    let is_nameless = bytes as usize == size_of::<libc::sa_family_t>();
    known == 0 && kind == libc::SOCK_STREAM && named == 0 && is_unix && is_nameless
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    #[test]
    fn nameless_streams_are_told_from_others() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(is_nameless_stream(&one.into()));
        let (one, _other) = UnixDatagram::pair().unwrap();
        assert!(!is_nameless_stream(&one.into()));
        let path = std::env::temp_dir().join(format!("hangup-{}", std::process::id()));
        let named = UnixListener::bind(&path).unwrap();
        fs::remove_file(path).unwrap();
        assert!(!is_nameless_stream(&named.into()));
        assert!(!is_nameless_stream(&fs::File::open("/dev/null").unwrap().into()));
    }
}
