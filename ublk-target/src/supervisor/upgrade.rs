//! An upgrade: the process that serves is ended for one of the program that has our name by now, while all goes on.
//!
//! First the new program has to make a standby ready, in a limited time; it refuses a memory file that it does
//! not know before it touches anything. Then the worker is killed, as by accident, and the new one goes on in its
//! place. The old program's standbys are stopped meanwhile, so that they are not first, and go on should the
//! new one fail even then.

use std::time::{Duration, Instant};

use super::{Standby, Supervisor};
use crate::exit::{Exit, Failure};
use crate::log::log;
use crate::supervisor::Order;
use crate::supervisor::child::Child;
use crate::{notify, process};

/// How long the new program may take to make a process ready, and then for that to go on.
const LIMIT: Duration = Duration::from_secs(60);

/// What is under way.
pub(super) struct Upgrade {
    /// The process of the new program; none before a standby of the old one is ready, too.
    pid: Option<u32>,
    deadline: Instant,
    /// Whether the worker has been killed for it.
    is_switching: bool,
}

impl Upgrade {
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether it waits for a standby of the old program.
    pub fn wants_standby(&self) -> bool {
        self.pid.is_none()
    }

    fn is_of(&self, pid: u32) -> bool {
        self.pid == Some(pid)
    }
}

impl Supervisor<'_> {
    /// Begins, or says why not.
    pub(super) fn begin_upgrade(&mut self) {
        let refusal = if self.setup.successor.is_none() {
            "this daemon has no standbys"
        } else if self.upgrade.is_some() {
            "another upgrade is under way"
        } else if self.patience.is_some() {
            "the daemon is being stopped"
        } else {
            let deadline = Instant::now() + LIMIT;
            self.upgrade = Some(Upgrade { pid: None, deadline, is_switching: false });
            return;
        };
        self.tell_upgraded(Some(failure(refusal.into())));
    }

    /// Goes on as far as is possible now. The new program is started when there is a standby of the old one that could go on
    /// should it fail.
    pub(super) fn pursue_upgrade(&mut self) {
        let Some(upgrade) = &mut self.upgrade else { return };
        let is_late = upgrade.deadline <= Instant::now();
        match upgrade.pid {
            Some(pid) if is_late => {
                // Whoever looks after the standbys sees to the rest.
                upgrade.deadline += LIMIT;
                log(format_args!("pid {pid} is given up: its time is over"));
                let others = self.standbys.iter().map(|standby| &standby.child);
                if let Some(child) = others.chain([&self.worker]).find(|c| c.pid() == pid) {
                    let _ = child.kill();
                }
            }
            None if is_late => self.give_up_upgrade("no standby of the old one got ready"),
            None if self.standbys.iter().any(|s| s.is_prepared && !s.is_outdated) => {
                let Some(successor) = self.setup.successor else { return };
                match self.new_standby(successor()) {
                    Ok(standby) => {
                        let pid = Some(standby.child.pid());
                        self.standbys.push(standby);
                        let deadline = Instant::now() + LIMIT;
                        self.upgrade = Some(Upgrade { pid, deadline, is_switching: false });
                    }
                    Err(error) => self.give_up_upgrade(&format!("it cannot be started: {error}")),
                }
            }
            _ => {}
        }
    }

    /// The daemon is being stopped: it does not matter by which program.
    pub(super) fn cancel_upgrade(&mut self) {
        if let Some(upgrade) = self.upgrade.as_mut().filter(|upgrade| !upgrade.is_switching) {
            upgrade.deadline = Instant::now();
        }
    }

    /// A standby is ready. If it is of the new program, it gets to go on.
    pub(super) fn switch_to(&mut self, pid: u32) {
        let Some(upgrade) = self.upgrade.as_mut().filter(|upgrade| upgrade.is_of(pid)) else {
            return;
        };
        upgrade.is_switching = true;
        upgrade.deadline = Instant::now() + LIMIT;
        self.tell_others(pid, Child::halt);
        // If it has died by itself, one of the others may be going on already, and must get to.
        if !matches!(self.worker.ended(), Ok(None)) {
            return self.tell_others(pid, Child::resume);
        }
        if let Err(error) = self.worker.kill() {
            log(format_args!("cannot end pid {}: {error}", self.worker.pid()));
        }
    }

    /// A process has ended. If it is the new program's, the old one goes on.
    pub(super) fn upgrade_failed(&mut self, pid: u32, how: &str) {
        if self.upgrade.as_ref().is_some_and(|upgrade| upgrade.is_of(pid)) {
            self.tell_others(pid, Child::resume);
            let why = format!("its process ended before it served ({how}); the log says why");
            self.give_up_upgrade(&why);
        }
    }

    /// Another process goes on. If that is not the one of the new program, for that the old one was faster, then
    /// the new one is not needed.
    pub(super) fn succeeded(&mut self) {
        let pid = self.worker.pid();
        if self.upgrade.as_ref().is_some_and(|upgrade| upgrade.is_switching && !upgrade.is_of(pid))
        {
            self.tell_others(pid, Child::resume);
            let is_new = |s: &mut Standby| {
                self.upgrade.as_ref().is_some_and(|upgrade| upgrade.is_of(s.child.pid()))
            };
            self.standbys.extract_if(.., is_new).for_each(|standby| super::dismiss(standby.child));
            self.give_up_upgrade("a process of the old one went on first: try again");
        } else if let Some(failure) = self.upgrade_outcome.take() {
            self.tell_upgraded(failure);
        }
    }

    /// The worker serves whoever asks it. If it is of the new program, we go on as that, too.
    pub(super) fn upgraded(&mut self) {
        let pid = self.worker.pid();
        if self.upgrade.take_if(|upgrade| upgrade.is_of(pid)).is_some() {
            self.dismiss_standbys();
            let error = self.become_successor();
            // The new one serves, and that is what was asked for.
            log(format_args!("this process goes on as the old program: {error}"));
            self.tell_upgraded(None);
        }
    }

    fn give_up_upgrade(&mut self, why: &str) {
        self.upgrade = None;
        self.tell_upgraded(Some(failure(why.into())));
    }

    /// Goes on as the new program.
    fn become_successor(&self) -> std::io::Error {
        let mut command = (self.setup.supervisor)();
        let mut legacy = self.estate.bequeath_all();
        self.worker.bequeath(&mut legacy);
        command.env(super::RESUMED, self.worker.pid().to_string());
        // One that asks us to stop waits until the new program can be asked.
        process::block_signals();
        let error = legacy.exec(&mut command);
        process::hold_signals();
        error
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
