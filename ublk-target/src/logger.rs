//! Log lines on their way to a file, which a process of its own writes.
//!
//! To write to a file takes memory, and the page at its end may be swapped out, to us (a tmpfs has no other place for it). Whoever waits
//! for that page cannot be killed, and as long as a process of ours is not dead, no other goes on in its place; but another is what
//! the page waits for. So where standard error is a file, our processes write to a pipe, which takes what there is room for and never
//! makes them wait, and what comes out of it is written by a process that nobody waits for.

use std::env;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat, open};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};
use rustix::stdio::{dup2_stderr, stderr};

use crate::log::log;
use crate::{inherited, process};

/// Says which process it is, to the program that a supervisor goes on as.
const VARIABLE: &str = "TMEM_LOGGER";

/// How long it may take to write the last lines.
const END_LIMIT: Duration = Duration::from_secs(2);
const END_PERIOD: Duration = Duration::from_millis(2);

/// The longest piece that is written at a time: what a pipe holds.
const PIECE_BYTES: usize = 64 << 10;

static LOGGER: OnceLock<Pid> = OnceLock::new();

/// Where standard error is a file, has what this process and all that it starts say there written by a process that `program`
/// starts, which is to [`run`]. Call it before anything else is started.
pub fn begin(program: Command) {
    match try_begin(program) {
        Ok(Some(logger)) => drop(LOGGER.set(logger)),
        Ok(None) => {}
        // It is written as ever.
        Err(error) => log(format_args!(
            "cannot start a process that writes the log: whoever waits for its file may hold up who goes on: {error}"
        )),
    }
}

fn try_begin(mut program: Command) -> io::Result<Option<Pid>> {
    if FileType::from_raw_mode(fstat(stderr())?.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let (from, to) = pipe_with(PipeFlags::CLOEXEC)?;
    // The end for those who write: the other one has flags of its own.
    fcntl_setfl(&to, fcntl_getfl(&to)? | OFlags::NONBLOCK)?;
    // What interrupts others from a terminal is not for it.
    let logger = program.stdin(from).stdout(Stdio::null()).process_group(0).spawn()?;
    dup2_stderr(&to)?;
    Ok(Some(Pid::from_child(&logger)))
}

/// Has the program that `command` goes on as know of it.
pub fn bequeath(command: &mut Command) {
    if let Some(logger) = logger() {
        command.env(VARIABLE, logger.to_string());
    }
}

/// Waits a while until all that was said is written. Nothing can be said any more.
pub fn end() {
    let Some(logger) = logger() else { return };
    let closed = open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    if closed.and_then(dup2_stderr).is_err() {
        // Then it does not see an end, and has to be left to see ours.
        return;
    }
    let deadline = Instant::now() + END_LIMIT;
    while matches!(waitpid(Some(logger), WaitOptions::NOHANG), Ok(None))
        && Instant::now() < deadline
    {
        sleep(END_PERIOD);
    }
}

fn logger() -> Option<Pid> {
    let named = || Pid::from_raw(env::var(VARIABLE).ok()?.parse().ok()?);
    LOGGER.get().copied().or_else(named)
}

/// The life of the process that writes: until nobody can say anything any more.
pub fn run() {
    // Who says that all shall end, has more to say until they have.
    process::block_signals();
    // What systemd keeps for the daemon is not for us to keep.
    inherited::close_all();
    // As those have it whose words it writes.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    copy(&mut io::stdin().lock(), &mut io::stderr());
}

fn copy(from: &mut impl Read, to: &mut impl Write) {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match from.read(&mut piece) {
            Ok(0) => return,
            // A file that is full may have room again, and until then nobody else shall wait.
            Ok(got) => drop(to.write_all(&piece[..got])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is full for a while.
    struct Full {
        writes: usize,
        written: Vec<u8>,
    }

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.writes += 1;
            if self.writes == 2 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.written.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Says one line at a time, and is interrupted before each.
    struct Lines(Vec<&'static str>, bool);

    impl Read for Lines {
        fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let Some(line) = self.0.pop() else { return Ok(0) };
            room[..line.len()].copy_from_slice(line.as_bytes());
            Ok(line.len())
        }
    }

    #[test]
    fn what_cannot_be_written_is_left_out_and_the_rest_is_not() {
        let mut full = Full { writes: 0, written: Vec::new() };
        copy(&mut Lines(vec!["three\n", "two\n", "one\n"], false), &mut full);
        assert_eq!(full.written, b"one\nthree\n");
    }
}
