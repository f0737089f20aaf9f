//! A process's pulse: it beats as long as the process runs and is found to be well, and its supervisor feels whether it does.
//!
//! Neither takes memory: one that waits for memory, as all may when there is none, is not dead.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use crate::process;

/// How often it beats, and how often the supervisor feels it.
pub const PERIOD: Duration = Duration::from_secs(2);

/// So many times in a row without a beat are death. They are counted each time that the supervisor has looked, so that it is
/// no death when nobody got to run.
const MISSED_MAX: u32 = 5;

/// So often it beats after the process was last found to be well: for a minute. It is counted in beats, so that a process that did not
/// get to run is not sick.
const BEATS_MAX: u32 = 30;

/// The supervisor's end.
#[derive(Debug)]
pub struct Pulse {
    eventfd: OwnedFd,
    /// None before the first beat.
    missed: Option<u32>,
}

impl Pulse {
    /// One that does not beat yet.
    pub fn new() -> io::Result<Self> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { eventfd, missed: None })
    }

    /// One that was felt by this process when it was another program, and beats.
    pub fn inherited(eventfd: OwnedFd) -> Self {
        Self { eventfd, missed: Some(0) }
    }

    /// Feels it. True if it has stopped. To be called every [`PERIOD`].
    pub fn has_stopped(&mut self) -> bool {
        let mut count = [0; 8];
        match rustix::io::read(&self.eventfd, &mut count) {
            Ok(_) => self.missed = Some(0),
            Err(_) => self.missed = self.missed.map(|missed| missed + 1),
        }
        self.missed.is_some_and(|missed| missed >= MISSED_MAX)
    }
}

impl AsFd for Pulse {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

/// What makes it beat.
#[derive(Debug, Default)]
pub struct Heart {
    /// Since the process was last found to be well.
    beats: AtomicU32,
}

impl Heart {
    /// The process has been found to be well.
    pub fn is_well(&self) {
        self.beats.store(0, Ordering::Relaxed);
    }

    /// Whether it beats this time.
    pub fn beats(&self) -> bool {
        let beats = self.beats.load(Ordering::Relaxed);
        // Overtaken by good news, this counts a beat too few or too many.
        self.beats.store((beats + 1).min(BEATS_MAX), Ordering::Relaxed);
        beats < BEATS_MAX
    }
}

/// Lets it beat from now on, for as long as the process runs and is well.
pub fn start(pulse: OwnedFd) -> io::Result<Arc<Heart>> {
    let heart = Arc::new(Heart::default());
    let of_thread = Arc::clone(&heart);
    let beat = move || {
        process::become_server();
        loop {
            if of_thread.beats() {
                // Fails only if the count is at its maximum: then nobody feels it.
                let _ = rustix::io::write(&pulse, &1_u64.to_le_bytes());
            }
            sleep(PERIOD);
        }
    };
    process::spawn_essential("tmem-pulse".into(), beat)?;
    Ok(heart)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heart_stops_when_the_process_has_not_been_well_for_long_and_goes_on_when_it_is() {
        let heart = Heart::default();
        for _ in 0..2 {
            assert!((0..BEATS_MAX).all(|_| heart.beats()));
            assert!((0..BEATS_MAX).all(|_| !heart.beats()));
            heart.is_well();
        }
    }

    #[test]
    fn what_never_beat_has_not_stopped_and_one_beat_makes_up_for_all_missed() {
        let mut pulse = Pulse::new().unwrap();
        for _ in 0..2 * MISSED_MAX {
            assert!(!pulse.has_stopped());
        }
        for _ in 0..2 {
            rustix::io::write(&pulse.eventfd, &1_u64.to_le_bytes()).unwrap();
            for _ in 0..MISSED_MAX {
                assert!(!pulse.has_stopped());
            }
        }
        assert!(pulse.has_stopped());
    }
}
