//! What systemd is told: ready, what is going on, alive, stopping.
//!
//! Nothing happens without `$NOTIFY_SOCKET`. That systemd cannot be told is no reason to stop
//! serving devices, so a failure is logged and that is all.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use sd_notify::NotifyState;

use crate::log::log;

/// How much longer systemd shall wait for the end, each time that it is asked to.
const PATIENCE: Duration = Duration::from_secs(30);

/// The same for the start, where another daemon has left what is swapped.
const START_PATIENCE: Duration = Duration::from_secs(1800);

/// How often it may be asked.
pub const PATIENCE_PERIOD: Duration = Duration::from_secs(10);

/// Whether systemd has started us as a service, and keeps what we give it to keep.
pub fn is_service() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// The daemon is ready: every device that was asked for is there.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The daemon goes on, and `status` is what there is to say of it.
pub fn status(status: &str) {
    tell(&[NotifyState::Status(status)]);
}

/// The time after which systemd takes us for dead, if it is to be told that we are not.
pub fn watchdog_limit() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// The daemon runs.
pub fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// It takes long to get ready, and that is no failure.
pub fn patience() {
    tell(&[NotifyState::ExtendTimeoutUsec(START_PATIENCE.as_micros() as u32)]);
}

/// Has systemd keep a file by this name, for the next process of the service should this one die.
pub fn keep(name: &str, file: BorrowedFd<'_>) {
    let state = [NotifyState::FdStore, NotifyState::FdName(name)];
    if let Err(error) = sd_notify::notify_with_fds(&state, &[file]) {
        log(format_args!("cannot have systemd keep a file: {error}"));
    }
}

/// Has systemd keep no file by this name any more.
pub fn forget(name: &str) {
    tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

/// The daemon has begun to stop, which may take a while.
pub fn stopping() -> Patience {
    tell(&[
        NotifyState::Stopping,
        NotifyState::ExtendTimeoutUsec(PATIENCE.as_micros() as u32),
        NotifyState::Status("taking devices out of use"),
    ]);
    Patience { progress: None }
}

/// Has systemd go on waiting for the end as long as what is swapped becomes less: to swap off takes as long as it takes to read
/// everything back. When it becomes less no longer, for want of memory, waiting for it would only hold up the system's
/// shutdown; the daemon goes on trying.
pub struct Patience {
    /// None before it is known what there was at first.
    progress: Option<Progress>,
}

impl Patience {
    /// So many bytes are swapped now. To be said every [`PATIENCE_PERIOD`].
    pub fn left(&mut self, bytes: u64) {
        let Some(progress) = &mut self.progress else {
            self.progress = Some(Progress { least: bytes });
            return;
        };
        if progress.is_made(bytes) {
            tell(&[NotifyState::ExtendTimeoutUsec(PATIENCE.as_micros() as u32)]);
        }
    }
}

/// Whether swapping off gets on.
struct Progress {
    least: u64,
}

impl Progress {
    /// It does if less is left than ever, by a sixteenth or by 256 MiB. Each swapoff that fails reads some back, which is swapped
    /// again afterwards: a little less now and then is no progress.
    fn is_made(&mut self, left: u64) -> bool {
        let enough = self.least > 0 && left <= self.least - (self.least / 16).min(256 << 20);
        if enough && left < self.least {
            self.least = left;
            return true;
        }
        false
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log(format_args!("cannot notify systemd: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_and_goes_is_no_progress() {
        let mut progress = Progress { least: 1600 };
        let made = [1600, 1550, 1510, 1590, 1500, 1500, 1450, 1700, 1400, 5, 5, 4, 0, 0];
        let made = made.map(|left| progress.is_made(left));
        let expected = [4, 8, 9, 11, 12];
        for (at, made) in made.into_iter().enumerate() {
            assert_eq!(made, expected.contains(&at), "{at}");
        }
        assert!(!Progress { least: 0 }.is_made(0));
        // Of much, not so much has to go in the time,
        let mut progress = Progress { least: 1 << 36 };
        assert!(!progress.is_made((1 << 36) - (255 << 20)));
        assert!(progress.is_made((1 << 36) - (256 << 20)));
        // and however it goes down, it is not for ever.
        let mut progress = Progress { least: 1 << 40 };
        let mut left = 1_u64 << 40;
        let steps = std::iter::from_fn(|| {
            left -= left.div_ceil(16);
            progress.is_made(left).then_some(())
        });
        assert!(steps.count() < 5000);
    }
}
