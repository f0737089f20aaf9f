//! Signals that ask a process to end, as something that can be polled. They are noted, and nothing else.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::low_level::{pipe, signal_name};

/// See the module's description.
#[derive(Debug)]
pub struct StopSignals {
    bell: UnixStream,
    last: Arc<AtomicUsize>,
}

impl StopSignals {
    /// From now on these signals end nothing by themselves.
    pub fn take() -> io::Result<Self> {
        let (bell, ring) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        let last = Arc::new(AtomicUsize::new(0));
        for signal in [SIGTERM, SIGINT, SIGHUP, SIGQUIT] {
            // In this order, so that who hears the bell sees which it was.
            signal_hook::flag::register_usize(signal, Arc::clone(&last), signal as usize)?;
            pipe::register(signal, ring.try_clone()?)?;
        }
        Ok(Self { bell, last })
    }

    /// The name of the last signal that came since this was called.
    pub fn came(&self) -> Option<&'static str> {
        let mut bytes = [0; 64];
        // Would block when all is read; how many there were says nothing.
        while io::Read::read(&mut &self.bell, &mut bytes).is_ok_and(|count| count > 0) {}
        match self.last.swap(0, Ordering::SeqCst) {
            0 => None,
            signal => Some(signal_name(signal as i32).unwrap_or("a signal")),
        }
    }
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    #[test]
    fn a_signal_rings_and_is_named_once() {
        let signals = StopSignals::take().unwrap();
        assert_eq!(signals.came(), None);
        signal_hook::low_level::raise(SIGHUP).unwrap();
        let mut fds = [PollFd::new(&signals, PollFlags::IN)];
        assert_eq!(poll(&mut fds, None).unwrap(), 1);
        assert_eq!(signals.came(), Some("SIGHUP"));
        assert_eq!(signals.came(), None);
    }
}
