//! What systemd is told: ready, what is going on, stopping.
//!
//! Nothing happens without `$NOTIFY_SOCKET`. That systemd cannot be told is no reason to stop
//! serving devices, so a failure is logged and that is all.

use sd_notify::NotifyState;

use crate::log::log;

/// The daemon is ready: every device that was asked for is there.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The daemon goes on, and `status` is what there is to say of it.
pub fn status(status: &str) {
    tell(&[NotifyState::Status(status)]);
}

/// The daemon has begun to stop.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("taking devices out of use")]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log(format_args!("cannot notify systemd: {error}"));
    }
}
