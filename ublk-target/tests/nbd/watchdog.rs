//! Ends the process, loudly, if a test does not end.

use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// How long a test may take on a machine that is busy with other things.
const LIMIT: Duration = Duration::from_secs(60);

/// Watches over a test until it is dropped.
pub struct Watchdog(Sender<()>);

impl Watchdog {
    /// One that watches over the test of this name.
    pub fn new(test: &'static str) -> Self {
        let (alive, news) = channel();
        thread::spawn(move || {
            if news.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                // Past the capture of a test's output, which an abort would throw away.
                let message = format!("{test} has not ended in {LIMIT:?}: something hangs\n");
                let _ = std::io::stderr().write_all(message.as_bytes());
                std::process::abort();
            }
        });
        Self(alive)
    }

    /// Calls `attempt` until it returns something.
    pub fn retry<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        loop {
            if let Some(result) = attempt() {
                return result;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // The thread ends with its receiver either way.
        let _ = self.0.send(());
    }
}
