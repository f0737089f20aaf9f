//! `tmem run`: the process that sees to it that somebody serves.
//!
//! It starts a worker, and a standby that goes on when that one dies; the next standby it starts then. It
//! says on the worker's behalf what a person and systemd want to know, and passes on that it is to stop. It touches no
//! page, has one thread, and nobody's I/O waits for it: a worker goes on without it, and a standby takes over without
//! it. Signals are only noted, from before the worker starts until it has ended.
//!
//! A supervisor that finds what another has left ([`estate`]), or is told to (`tmem recover`), goes on from there. If that one's worker still serves, it
//! is replaced by one that listens to us, as in an [`upgrade`].

mod child;
mod estate;
pub mod keep;
mod link;
pub mod pulse;
mod upgrade;

use std::collections::HashSet;
use std::env;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal};

use self::child::{Child, parent_of};
use self::estate::Estate;
pub use self::link::{Link, News, Order, Received};
use self::upgrade::Upgrade;
use crate::config::RunConfig;
use crate::exit::{Exit, Failure};
use crate::inherited::Inherited;
use crate::log::log;
use crate::notes::{NoNotes, Notes};
use crate::notify::{self, Patience};
use crate::process::{self, Mounts};
use crate::signals::StopSignals;

/// How long to wait before a process is started in place of one that has failed. The wait doubles each time, up to
/// [`RETRY_MAX`].
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// So many standbys there shall be. The second is for when the worker dies before there is another in place of the first: it
/// may take a while to make one ready, when memory is short.
const STANDBYS: usize = 2;

/// So often systemd's watchdog is told that we run, in the time after which it takes us for dead.
const WATCHDOG_TIMES: u32 = 4;

/// A process that has lived so long has not failed at its start.
const LONG_ENOUGH: Duration = Duration::from_secs(10);

/// How often it is looked who serves, when that is not known.
const SEARCH_PERIOD: Duration = Duration::from_millis(50);

/// So many messages of a process that are not understood are passed over at a time.
const NEWS_MAX: usize = 16;

/// The name of a process that serves.
const WORKER_NAME: &str = "tmem-worker";

/// Says, to a program that a supervisor goes on as, which process is its worker.
const RESUMED: &str = "TMEM_RESUMED";

/// What the supervisor is made of that is not its own.
pub struct Setup<'a> {
    /// Makes the process fit to look after one that serves swap.
    pub harden: &'a dyn Fn(&RunConfig, Mounts) -> Result<(), Failure>,
    /// What a worker is started by.
    pub worker: &'a dyn Fn() -> Command,
    /// What a standby is started by, if there shall be one.
    pub standby: Option<&'a dyn Fn() -> Command>,
    /// The same, of the program that has our name by now; none if there are no upgrades.
    pub successor: Option<&'a dyn Fn() -> Command>,
    /// What this process goes on as then.
    pub supervisor: &'a dyn Fn() -> Command,
}

/// Runs the daemon until it is told to stop and has stopped. Each device is reported on `out` as a line
/// `NAME PATH BYTES` as soon as it is there. Where another supervisor has left a daemon, that one is gone on
/// with, as it was configured; else `config` says what it shall be.
pub fn run(
    config: impl FnOnce() -> Result<RunConfig, Failure>,
    setup: &Setup<'_>,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let signals = StopSignals::take().map_err(|error| system("handle signals", &error))?;
    if is_resumed() {
        // They were held for the time in between.
        process::hold_signals();
        // It may just have stopped.
        let Some((estate, notes, worker)) = resumed(setup)? else { return Ok(()) };
        let mut supervisor = Supervisor::new(setup, signals, &estate, worker, out);
        supervisor.is_ready = true;
        supervisor.announced = notes.devices.into_iter().map(|device| device.name).collect();
        supervisor.wants_standbys = setup.standby.is_some();
        supervisor.tell_upgraded(None);
        return supervisor.run();
    }
    if let Some((estate, notes)) = estate::deposited()? {
        // What can be tried again is: what was kept goes only with the service.
        let again = |failure: Failure| Failure::new(Exit::Failure, failure.message);
        return go_on(estate, &notes, signals, setup, out, again);
    }
    let config = config()?;
    let estate = Estate::new(&config, setup.harden)?;
    let start = || {
        let worker = Child::start((setup.worker)(), estate.bequeath())?;
        worker.link.send(&Order::Serve(Box::new(config.clone())))?;
        Ok(worker)
    };
    let worker = start().map_err(|error| {
        estate.withdraw();
        system("start a worker", &error)
    })?;
    Supervisor::new(setup, signals, &estate, worker, out).run()
}

/// Goes on with what a daemon with this control socket has left whose supervisor died, or all of whose processes did, until
/// it is told to stop and has stopped.
///
/// Its backing file has to be there, unless what is on that may be lost (`without_backing`).
pub fn recover(
    control: &Path,
    without_backing: bool,
    setup: &Setup<'_>,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let signals = StopSignals::take().map_err(|error| system("handle signals", &error))?;
    let (estate, notes) = estate::left(control, without_backing)?;
    go_on(estate, &notes, signals, setup, out, |failure| failure)
}

/// The same with this. What fails before it runs is an error by `failed`.
fn go_on(
    estate: Estate,
    notes: &Notes,
    signals: StopSignals,
    setup: &Setup<'_>,
    out: &mut dyn Write,
    failed: impl FnOnce(Failure) -> Failure,
) -> Result<(), Failure> {
    let devices = notes.devices.len();
    log(format_args!("going on for a daemon that died, with its {devices} devices"));
    let (estate, worker) = adopt(estate, notes, setup).map_err(failed)?;
    let mut supervisor = Supervisor::new(setup, signals, &estate, worker, out);
    supervisor.wants_standbys = setup.standby.is_some();
    if !supervisor.worker.has_ended() {
        supervisor.is_ready = true;
        notify::ready("serving on");
    }
    supervisor.run()
}

/// Takes over what another supervisor has left, and whoever serves.
fn adopt(mut estate: Estate, notes: &Notes, setup: &Setup<'_>) -> Result<(Estate, Child), Failure> {
    // Whoever serves goes on; else it takes as long as it takes to make a process ready.
    notify::patience();
    (setup.harden)(&notes.config, Mounts::Leave)?;
    estate.keep_mounts()?;
    estate.deposit();
    let failed = |error| system("find the worker", &error);
    let pid = |number: u32| Pid::from_raw(number.cast_signed());
    let worker = pid(notes.worker).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
    // One that was to stop, could not, and was left by systemd would go on with what is ours now. Init, which has all whose
    // supervisor is gone, is none.
    let other = pid(notes.supervisor).filter(|other| {
        *other != Pid::INIT
            && *other != rustix::process::getpid()
            && parent_of(worker) == Some(*other)
    });
    if let Some(other) = other {
        log(format_args!(
            "pid {} is another supervisor of the same daemon: it is ended",
            notes.supervisor
        ));
        rustix::process::kill_process(other, Signal::KILL).map_err(|error| failed(error.into()))?;
    }
    let worker = Child::of_another(worker, WORKER_NAME).map_err(failed)?;
    Ok((estate, worker))
}

/// Whether this process was another program's supervisor before.
pub fn is_resumed() -> bool {
    env::var_os(RESUMED).is_some()
}

/// What it had then; none if nothing is in use any more.
fn resumed(setup: &Setup<'_>) -> Result<Option<(Estate, Notes, Child)>, Failure> {
    let pid = env::var(RESUMED).ok();
    let failed = |error| system("go on as another program", &error);
    let pid = pid.and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
    let mut inherited = Inherited::take().map_err(failed)?;
    let Some((estate, notes)) = Estate::inherited(&mut inherited)? else { return Ok(None) };
    (setup.harden)(&notes.config, Mounts::Left)?;
    let worker = Child::inherited(&mut inherited, pid).map_err(failed)?;
    Ok(Some((estate, notes, worker)))
}

/// A process that waits to go on in the worker's place.
struct Standby {
    child: Child,
    since: Instant,
    is_prepared: bool,
    /// Whether there are other devices than it knows.
    is_outdated: bool,
}

/// See the module's description.
struct Supervisor<'a> {
    setup: &'a Setup<'a>,
    signals: StopSignals,
    estate: &'a Estate,
    /// The one that serves, or did last.
    worker: Child,
    worker_since: Instant,
    /// When to feel next whether it runs.
    next_feel: Instant,
    /// In the order in which they were started. One stays until the next is prepared.
    standbys: Vec<Standby>,
    /// Whether there shall be standbys: there is something to go on with.
    wants_standbys: bool,
    /// When the next may be started.
    not_before: Instant,
    retry: Duration,
    out: &'a mut dyn Write,
    /// Devices that were reported.
    announced: HashSet<String>,
    /// Whether systemd knows that the daemon is ready.
    is_ready: bool,
    /// How often systemd's watchdog is told that we run, and when next.
    watchdog: Option<(Duration, Instant)>,
    /// Has systemd wait for the end; none before there is an end to wait for.
    patience: Option<Patience>,
    /// What the worker said when it had stopped.
    end: Option<Result<(), Failure>>,
    /// If there is one under way.
    upgrade: Option<Upgrade>,
    /// How the last one ended, if that is still to be told.
    upgrade_outcome: Option<Option<Failure>>,
}

impl<'a> Supervisor<'a> {
    fn new(
        setup: &'a Setup<'a>,
        signals: StopSignals,
        estate: &'a Estate,
        worker: Child,
        out: &'a mut dyn Write,
    ) -> Self {
        let now = Instant::now();
        Self {
            setup,
            signals,
            estate,
            worker,
            worker_since: now,
            next_feel: now + pulse::PERIOD,
            standbys: Vec::new(),
            wants_standbys: false,
            not_before: now,
            retry: RETRY_FIRST,
            out,
            announced: HashSet::new(),
            is_ready: false,
            watchdog: notify::watchdog_limit().map(|limit| (limit / WATCHDOG_TIMES, now)),
            patience: None,
            end: None,
            upgrade: None,
            upgrade_outcome: None,
        }
    }

    fn run(mut self) -> Result<(), Failure> {
        loop {
            self.tell_watchdog();
            self.pursue_upgrade();
            self.start_standby();
            self.wait();
            self.feel_pulse();
            if let Some(signal) = self.signals.came() {
                if self.patience.is_none() {
                    log(format_args!("stopping on {signal}"));
                    self.stopping();
                }
                self.stop_worker();
            }
            // Before the news, so that none that it left is missed.
            let ended =
                self.worker.ended().map_err(|error| system("wait for the worker", &error))?;
            self.hear_worker();
            if let Some(end) = self.end.take() {
                // It has nothing more to do than to end.
                self.dismiss_standbys();
                let _ = self.worker.wait();
                self.estate.withdraw();
                return end;
            }
            if let Some(status) = ended {
                self.upgrade_failed(self.worker.pid(), &status.to_string());
            }
            self.look_after_standbys();
            if let Some(status) = ended
                && !self.is_succeeded()
            {
                return self.nobody_goes_on(status);
            }
        }
    }

    /// The worker has ended, without another to go on.
    fn nobody_goes_on(&self, status: ExitStatus) -> Result<(), Failure> {
        match Notes::read(&self.estate.store) {
            // It listened to another supervisor, and has stopped as it was told to.
            Ok(notes) if notes.is_ended => {
                self.estate.withdraw();
                Ok(())
            }
            // It died before there was anything.
            Err(NoNotes::None) => {
                self.estate.withdraw();
                Err(died(status))
            }
            _ => Err(died(status)),
        }
    }

    /// Tells the worker to stop.
    fn stop_worker(&self) {
        // One that has ended meanwhile is seen to have.
        let _ = match self.worker.is_of_another() {
            true => self.worker.signal(Signal::TERM),
            false => self.worker.link.send(&Order::Stop),
        };
    }

    /// Waits for something to come.
    fn wait(&self) {
        let now = Instant::now();
        let wanted = self.wants_another().then_some(self.not_before);
        let feel = (!self.worker.has_ended()).then_some(self.next_feel);
        let watchdog = self.watchdog.map(|(_, next)| next);
        let upgrade = self.upgrade.as_ref().map(Upgrade::deadline);
        let search = self.is_searching().then_some(now + SEARCH_PERIOD);
        let others = [watchdog, feel, upgrade, search].into_iter().flatten();
        let next = wanted.into_iter().chain(others).min();
        let left = next.map(|next| next.saturating_duration_since(now));
        let limit = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = vec![self.signals.as_fd()];
        // Of one that has ended nothing more is to come.
        let others = self.standbys.iter().map(|standby| &standby.child);
        for child in others.chain([&self.worker]).filter(|child| !child.has_ended()) {
            fds.extend(child.pidfd());
            fds.push(child.link.as_fd());
        }
        let mut fds: Vec<_> =
            fds.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        // Interrupted, or for want of kernel memory: look again.
        let _ = poll(&mut fds, limit.as_ref());
    }

    /// Tells systemd that we run. Whether the worker serves is for us to see to: to start all anew would bring new
    /// swap, and not what was swapped, so as long as we run nothing is gained by that.
    fn tell_watchdog(&mut self) {
        let now = Instant::now();
        if let Some((period, next)) = &mut self.watchdog
            && *next <= now
        {
            *next = now + *period;
            notify::alive();
        }
    }

    /// Ends a worker that does not run or does not serve any more, for the standby to go on.
    fn feel_pulse(&mut self) {
        let now = Instant::now();
        if now < self.next_feel {
            return;
        }
        self.next_feel = now + pulse::PERIOD;
        if self.worker.pulse.has_stopped() && !self.worker.has_ended() {
            let pid = self.worker.pid();
            log(format_args!(
                "pid {pid} does not serve any more: it is killed, and another goes on"
            ));
            if let Err(error) = self.worker.kill() {
                log(format_args!("cannot kill pid {pid}: {error}"));
            }
        }
    }

    /// Takes what the worker has to say.
    fn hear_worker(&mut self) {
        while let Some(news) = hear(&self.worker) {
            self.heard(news);
        }
    }

    fn heard(&mut self, news: News) {
        match news {
            News::Added { name, path, bytes } => {
                // As soon as there is anything to keep.
                if self.announced.is_empty() {
                    self.estate.deposit();
                }
                if self.announced.insert(name.clone()) {
                    let line = format!("{name} {path} {bytes}");
                    let said = writeln!(self.out, "{line}").and_then(|()| self.out.flush());
                    if let Err(error) = said {
                        log(format_args!("cannot report '{line}': {error}"));
                    }
                }
            }
            News::Ready { devices } => {
                // The first time, that is; the next worker says it again.
                if !self.is_ready {
                    self.is_ready = true;
                    if self.announced.is_empty() {
                        self.estate.deposit();
                    }
                    notify::ready(&format!("serving {devices} devices"));
                    self.outdate_standbys();
                }
                self.upgraded();
            }
            News::Changed => self.outdate_standbys(),
            News::Upgrade => self.begin_upgrade(),
            News::Stopping => self.stopping(),
            News::Status(status) => notify::status(&status),
            News::Left(bytes) => {
                self.patience.iter_mut().for_each(|patience| patience.left(bytes));
            }
            News::Stopped(failure) => self.end = Some(failure.map_or(Ok(()), Err)),
            News::Prepared | News::TookOver { .. } => {}
        }
    }

    /// Tells systemd that there is an end to wait for.
    fn stopping(&mut self) {
        if self.patience.is_none() {
            self.patience = Some(notify::stopping());
            self.cancel_upgrade();
        }
    }

    /// Whether another standby is to be started. One at a time is prepared.
    fn wants_another(&self) -> bool {
        let fit = self.standbys.iter().filter(|standby| !standby.is_outdated).count();
        let is_quiet = self.upgrade.as_ref().is_none_or(Upgrade::wants_standby)
            && self.standbys.iter().all(|s| s.is_prepared);
        self.wants_standbys && fit < STANDBYS && is_quiet
    }

    /// Starts a standby, if another is wanted and it is time.
    fn start_standby(&mut self) {
        let Some(command) = self.setup.standby else { return };
        if !self.wants_another() || Instant::now() < self.not_before {
            return;
        }
        match self.new_standby(command()) {
            Ok(standby) => self.standbys.push(standby),
            Err(error) => self.back_off(&format!("cannot start a standby: {error}")),
        }
    }

    fn new_standby(&self, command: Command) -> io::Result<Standby> {
        let mut legacy = self.estate.bequeath();
        if let Some(pidfd) = self.worker.pidfd() {
            legacy.add("worker", pidfd);
        }
        let child = Child::start(command, legacy)?;
        Ok(Standby { child, since: Instant::now(), is_prepared: false, is_outdated: false })
    }

    /// Has the next standby wait a while.
    fn back_off(&mut self, why: &str) {
        log(format_args!("{why}; another standby is started in {:?}", self.retry));
        self.not_before = Instant::now() + self.retry;
        self.retry = (self.retry * 2).min(RETRY_MAX);
    }

    /// The standbys do not know of what has changed.
    fn outdate_standbys(&mut self) {
        self.standbys.iter_mut().for_each(|standby| standby.is_outdated = true);
        self.wants_standbys = self.setup.standby.is_some();
    }

    /// Takes what the standbys have to say, and sees whether one has ended, or gone on in the worker's place.
    fn look_after_standbys(&mut self) {
        let mut at = 0;
        while at < self.standbys.len() {
            let ended = self.standbys[at].child.ended();
            let news = hear(&self.standbys[at].child);
            match (news, ended) {
                (Some(News::Prepared), _) => {
                    self.standbys[at].is_prepared = true;
                    self.switch_to(self.standbys[at].child.pid());
                    if !self.standbys[at].is_outdated {
                        self.dismiss_outdated();
                        at = 0;
                    }
                }
                (Some(News::TookOver { .. }), _) => {
                    let standby = self.standbys.remove(at);
                    self.promote(standby.child);
                }
                (Some(_), _) => {}
                (None, Ok(None)) => at += 1,
                (None, ended) => {
                    let standby = self.standbys.remove(at);
                    if standby.since.elapsed() >= LONG_ENOUGH {
                        self.retry = RETRY_FIRST;
                    }
                    let how =
                        ended.map_or_else(|e| e.to_string(), |s| s.unwrap_or_default().to_string());
                    self.upgrade_failed(standby.child.pid(), &how);
                    self.back_off(&format!("a standby ended unexpectedly: {how}"));
                }
            }
        }
        self.replace_worker_of_another();
    }

    /// Ends a worker that does not listen to us, once there is another to go on. Its own standbys may be first then, and
    /// are ended in turn: nobody starts more of them.
    fn replace_worker_of_another(&mut self) {
        if self.is_searching()
            && let Ok(notes) = Notes::read(&self.estate.store)
            && notes.worker != self.worker.pid()
            && self.standbys.iter().all(|standby| standby.child.pid() != notes.worker)
            && let Some(Ok(worker)) = Pid::from_raw(notes.worker.cast_signed())
                .map(|pid| Child::of_another(pid, WORKER_NAME))
            && !worker.has_ended()
        {
            self.worker = worker;
            if self.patience.is_some() {
                self.stop_worker();
            }
        }
        let is_prepared = self.standbys.iter().any(|standby| standby.is_prepared);
        let is_foreign = self.worker.is_of_another() && !self.worker.has_ended();
        if is_foreign && is_prepared && self.patience.is_none() {
            log(format_args!(
                "pid {} had another supervisor: another goes on in its place",
                self.worker.pid()
            ));
            match self.worker.kill() {
                // So that it is said once.
                Ok(()) => drop(self.worker.wait()),
                Err(error) => log(format_args!("cannot end pid {}: {error}", self.worker.pid())),
            }
        }
    }

    /// Whether a process serves, or will, that is not known yet.
    fn is_searching(&self) -> bool {
        self.worker.has_ended()
    }

    /// A standby has gone on in the worker's place.
    fn promote(&mut self, child: Child) {
        let mut dead = std::mem::replace(&mut self.worker, child);
        // It may have been stopped for an upgrade.
        let _ = self.worker.resume();
        // The next one has what it needs of the dead one by now.
        let how = dead.ended().ok().flatten().unwrap_or_default();
        log(format_args!("pid {} serves in place of pid {}: {how}", self.worker.pid(), dead.pid()));
        let lived = std::mem::replace(&mut self.worker_since, Instant::now()).elapsed();
        // One that is killed has done nothing wrong.
        if lived < LONG_ENOUGH && how.signal() != Some(libc::SIGKILL) {
            self.back_off("the worker before it did not live long");
        } else if lived >= LONG_ENOUGH {
            self.retry = RETRY_FIRST;
        }
        if self.patience.is_some() {
            self.stop_worker();
        }
        self.succeeded();
    }

    /// Whether somebody goes on in the place of a worker that has died, or will.
    fn is_succeeded(&mut self) -> bool {
        let is_over = match Notes::read(&self.estate.store) {
            Ok(notes) => notes.is_ended,
            Err(error) => matches!(error, NoNotes::None),
        };
        if self.setup.standby.is_none() || is_over {
            return false;
        }
        self.wants_standbys = true;
        true
    }

    /// Ends the standbys that do not know of what has changed.
    fn dismiss_outdated(&mut self) {
        // One of them may have gone on in its place, and not said so yet; or may have to, should an upgrade fail.
        if self.worker.has_ended() || self.upgrade.is_some() {
            return;
        }
        for standby in self.standbys.extract_if(.., |standby| standby.is_outdated) {
            dismiss(standby.child);
        }
    }

    /// There is nothing to go on with.
    fn dismiss_standbys(&mut self) {
        self.standbys.drain(..).for_each(|standby| dismiss(standby.child));
    }
}

/// What a process has to say, if anything.
fn hear(child: &Child) -> Option<News> {
    // What another program says that this one does not know is no reason not to hear the rest.
    for _ in 0..NEWS_MAX {
        match child.link.receive() {
            Ok(Received::Message(news)) => return Some(news),
            Ok(Received::Nothing | Received::Closed) => return None,
            Err(error) => log(format_args!("cannot hear pid {}: {error}", child.pid())),
        }
    }
    None
}

/// Ends a standby.
fn dismiss(mut child: Child) {
    // One that has gone needs no end.
    let _ = child.kill();
    let _ = child.wait();
}

/// Why the daemon ends with a worker that said nothing.
fn died(status: ExitStatus) -> Failure {
    Failure::new(Exit::Failure, format!("the worker ended unexpectedly: {status}"))
}

/// A system call that failed.
fn system(action: &str, error: &io::Error) -> Failure {
    Failure::new(Exit::Failure, format!("cannot {action}: {error}"))
}
