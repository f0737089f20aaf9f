//! An upgrade: the process that serves is ended for one of the program that has our name by now, while all goes on.
//!
//! First the new program has to make a standby ready, in a limited time; it refuses a memory file that it does
//! not know before it touches anything. Then the worker is killed, as by accident, and the new one goes on in its
//! place. The old program's standbys are stopped meanwhile, so that they are not first, and go on should the
//! new one fail even then.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{Standby, Supervisor};
use crate::exit::{Exit, Failure};
use crate::log::log;
use crate::notify;
use crate::supervisor::Order;
use crate::supervisor::child::Child;

/// How long the new program may take to make a process ready, and then for that to go on.
const LIMIT: Duration = Duration::from_secs(60);

/// What is under way.
pub(super) struct Upgrade {
    /// The process of the new program.
    pid: u32,
    deadline: Instant,
    /// Whether the worker has been killed for it.
    is_switching: bool,
}

impl Upgrade {
    pub fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl Supervisor<'_> {
    /// Begins, or says why not.
    pub(super) fn begin_upgrade(&mut self) {
        if let Err(why) = self.try_begin_upgrade() {
            self.tell_upgraded(Some(failure(why)));
        }
    }

    fn try_begin_upgrade(&mut self) -> Result<(), String> {
        let Some(successor) = self.setup.successor else {
            return Err("this daemon has no standbys".into());
        };
        if self.upgrade.is_some() {
            return Err("another upgrade is under way".into());
        }
        if self.patience.is_some() {
            return Err("the daemon is being stopped".into());
        }
        let standby = self.new_standby(successor());
        let standby = standby.map_err(|error| format!("cannot start the new program: {error}"))?;
        let (pid, deadline) = (standby.child.pid(), Instant::now() + LIMIT);
        self.standbys.push(standby);
        self.upgrade = Some(Upgrade { pid, deadline, is_switching: false });
        Ok(())
    }

    /// The daemon is being stopped: it does not matter by which program.
    pub(super) fn cancel_upgrade(&mut self) {
        if let Some(upgrade) = self.upgrade.as_mut().filter(|upgrade| !upgrade.is_switching) {
            upgrade.deadline = Instant::now();
        }
    }

    /// Ends a process that has not got on in its time. Whoever looks after the standbys sees to the rest.
    pub(super) fn check_upgrade(&mut self) {
        let Some(upgrade) = &self.upgrade else { return };
        if upgrade.deadline > Instant::now() {
            return;
        }
        log(format_args!("pid {} is given up: its time is over", upgrade.pid));
        if let Some(standby) = self.standbys.iter().find(|s| s.child.pid() == upgrade.pid) {
            // One that has ended is seen to have.
            let _ = standby.child.kill();
        }
    }

    /// A standby is ready. If it is of the new program, it gets to go on.
    pub(super) fn switch_to(&mut self, pid: u32) {
        let Some(upgrade) = self.upgrade.as_mut().filter(|upgrade| upgrade.pid == pid) else {
            return;
        };
        upgrade.is_switching = true;
        upgrade.deadline = Instant::now() + LIMIT;
        self.tell_others(pid, Child::halt);
        if let Err(error) = self.worker.kill() {
            log(format_args!("cannot end pid {}: {error}", self.worker.pid()));
        }
    }

    /// A standby has ended. If it is of the new program, the old one goes on.
    pub(super) fn upgrade_failed(&mut self, pid: u32, how: &str) {
        if self.upgrade.take_if(|upgrade| upgrade.pid == pid).is_none() {
            return;
        }
        self.tell_others(pid, |child| child.signal(Signal::CONT));
        let why =
            format!("the new program's process ended before it served ({how}); the log says why");
        self.tell_upgraded(Some(failure(why)));
    }

    /// Another process serves. If it is of the new program, we go on as that, too.
    pub(super) fn upgraded(&mut self) {
        let pid = self.worker.pid();
        if self.upgrade.take_if(|upgrade| upgrade.pid == pid).is_some() {
            self.dismiss_standbys();
            let error = self.become_successor();
            // The new one serves, and that is what was asked for.
            log(format_args!("this process goes on as the old program: {error}"));
            self.tell_upgraded(None);
        } else if let Some(failure) = self.upgrade_outcome.take() {
            self.tell_upgraded(failure);
        }
    }

    /// Goes on as the new program.
    fn become_successor(&self) -> std::io::Error {
        let mut command = (self.setup.supervisor)();
        let mut legacy = self.estate.bequeath_all();
        self.worker.bequeath(&mut legacy);
        command.env(super::RESUMED, self.worker.pid().to_string());
        legacy.exec(&mut command)
    }

    /// Tells who asked. If nobody serves now, the one that does next is told.
    pub(super) fn tell_upgraded(&mut self, outcome: Option<Failure>) {
        if let Some(failure) = &outcome {
            log(failure);
            notify::status(&failure.message);
        }
        let is_told = !self.worker.has_ended()
            && self.worker.link.send(&Order::Upgraded(outcome.clone())).is_ok();
        self.upgrade_outcome = (!is_told).then_some(outcome);
    }

    /// Has the other standbys do something.
    fn tell_others(&self, pid: u32, what: impl Fn(&Child) -> std::io::Result<()>) {
        for Standby { child, .. } in self.standbys.iter().filter(|s| s.child.pid() != pid) {
            if let Err(error) = what(child) {
                log(format_args!("cannot signal pid {}: {error}", child.pid()));
            }
        }
    }
}

fn failure(why: String) -> Failure {
    Failure::new(Exit::Failure, format!("not upgraded, and the old program goes on: {why}"))
}
