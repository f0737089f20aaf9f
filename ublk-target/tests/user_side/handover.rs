//! Processes that go on in the place of others: of one that was killed, of one of another program, and without a
//! supervisor.

use std::fs::{File, OpenOptions};
use std::os::unix::process::parent_id;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, mem, process, thread};

use rustix::process::{Pid, Signal, kill_process};
use tmem::Store;
use tmem_ublk_target::exit::Exit;
use tmem_ublk_target::inherited::Inherited;
use tmem_ublk_target::notes::{Notebook, Notes};
use tmem_ublk_target::signals::StopSignals;
use tmem_ublk_target::supervisor::{Link, News};
use tmem_ublk_target::worker::{self, Orders, Sockets, Start};

use crate::fake::Fake;
use crate::run::{Daemon, Home, READY, STOPPING, SUCCESSOR, wait_until_gone};

/// A worker begins to serve.
pub fn begin(start: Start) {
    play(&start.config.control);
    // The supervisor reads them.
    Notebook::new(start.store, start.config).unwrap();
}

/// Waits until no other process serves at this socket, and is the one from then on.
fn play(socket: &Path) {
    let path = socket.with_extension("role");
    let role = OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap();
    // One that waits in the kernel would get it though it is stopped.
    while File::try_lock(&role).is_err() {
        thread::sleep(Duration::from_millis(1));
    }
    // Until the end of the process.
    mem::forget(role);
}

#[test]
#[ignore = "this is the standby that the daemon starts"]
fn fake_standby() {
    if env::var_os(SUCCESSOR).is_none() {
        return;
    }
    let signals = StopSignals::take().unwrap();
    let mut inherited = Inherited::take().unwrap();
    let link = Link::inherited(inherited.file("link").unwrap());
    let pulse = inherited.file("pulse").unwrap();
    let store = Store::from_file(inherited.file("store").unwrap()).unwrap();
    let notes = Notes::read(&store).unwrap();
    let config = notes.config.clone();
    let sockets = Sockets::inherited(&mut inherited, &config).unwrap();
    let mut orders = Orders::new(link, signals, pulse);
    orders.tell(&News::Prepared);
    play(&config.control);
    let served = |notes: &mut Notes| {
        notes.worker = process::id();
        notes.supervisor = parent_id();
    };
    Notebook::resume(store, notes).update(served).unwrap();
    orders.tell(&News::TookOver { took: Duration::ZERO });
    if env::var(SUCCESSOR).as_deref() == Ok("dies") {
        process::abort();
    }
    let fake = Arc::new(Fake::default());
    let ended = worker::serve(fake, sockets.control, &config, &mut orders);
    orders.tell(&News::Stopped(ended.err()));
    process::exit(0);
}

impl Home {
    fn start_succeeded(&self, kind: &str) -> Daemon {
        let daemon = self.start_with("a,b", 0, Some((SUCCESSOR, kind.to_owned())));
        self.assert_told(READY);
        daemon
    }

    /// The process that serves, if one answers.
    fn serving(&self) -> Option<Pid> {
        let report = self.client().stats().ok()?;
        Pid::from_raw(report["total"]["worker_pid"].as_i64()?.try_into().ok()?)
    }

    /// The process that serves, as soon as it is another than `old`.
    fn other_than(&self, old: Pid) -> Pid {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(pid) = self.serving().filter(|pid| *pid != old) {
                return pid;
            }
            assert!(Instant::now() < deadline, "nobody goes on");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn another_goes_on_each_time_that_a_worker_is_killed_and_systemd_hears_nothing_of_it() {
    let home = Home::new();
    let daemon = home.start_succeeded("good");
    let mut worker = home.serving().unwrap();
    for _ in 0..4 {
        kill_process(worker, Signal::KILL).unwrap();
        worker = home.other_than(worker);
        assert_eq!(home.client().list().unwrap().len(), 2);
    }
    daemon.signal(Signal::TERM);
    home.assert_told(STOPPING);
    let (code, log) = daemon.end();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(log.matches("in place of pid").count(), 4, "{log}");
    assert!(!home.socket().exists());
}

#[test]
fn systemd_keeps_what_outlives_a_daemon_until_it_has_stopped() {
    let home = Home::new();
    let daemon = home.start_succeeded("good");
    let told = |what: &str, names: &[&str]| -> Vec<String> {
        names.iter().map(|name| format!("{what}\nFDNAME={name}\n")).collect()
    };
    assert_eq!(*home.kept.borrow(), told("=1", &["control", "control-lock", "store", "mounts"]));
    home.kept.borrow_mut().clear();
    daemon.signal(Signal::TERM);
    home.assert_told(STOPPING);
    assert_eq!(daemon.end().0, Some(0));
    home.assert_quiet();
    let all = ["control", "control-lock", "nbd", "nbd-lock", "store", "mounts"];
    assert_eq!(*home.kept.borrow(), told("REMOVE=1", &all));
}

#[test]
fn an_upgrade_has_another_program_serve_and_look_after_that() {
    let home = Home::new();
    let mut daemon = home.start_succeeded("good");
    let [a, b] = ["a", "b"].map(|_| daemon.device_line());
    assert!(a.starts_with("a ") && b.starts_with("b "), "{a}{b}");
    for _ in 0..2 {
        let old = home.serving().unwrap();
        let new = home.client().upgrade().unwrap();
        assert_eq!(home.serving().map(|pid| pid.as_raw_pid().cast_unsigned()), Some(new));
        wait_until_gone(old);
        assert!(daemon.is_running());
        // It is looked after as before.
        let worker = home.serving().unwrap();
        kill_process(worker, Signal::KILL).unwrap();
        home.other_than(worker);
    }
    assert_eq!(home.client().list().unwrap().len(), 2);
    daemon.signal(Signal::TERM);
    home.assert_told(STOPPING);
    let (code, log) = daemon.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(!home.socket().exists());
}

#[test]
fn while_the_new_program_cannot_serve_the_old_one_goes_on() {
    let home = Home::new();
    let daemon = home.start_succeeded("bad");
    let worker = home.serving().unwrap();
    for _ in 0..2 {
        let failure = home.client().upgrade().unwrap_err();
        assert_eq!(failure.code, Exit::Failure);
        assert!(failure.message.contains("the old program goes on"), "{failure}");
        assert_eq!(home.serving(), Some(worker));
    }
    // Its standbys as well.
    kill_process(worker, Signal::KILL).unwrap();
    home.other_than(worker);
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn a_new_program_that_ends_before_it_can_be_asked_is_succeeded_by_the_old_one() {
    let home = Home::new();
    let daemon = home.start_succeeded("fails");
    for _ in 0..2 {
        let old = home.serving().unwrap();
        let failure = home.client().upgrade().unwrap_err();
        assert!(failure.message.contains("the old program goes on"), "{failure}");
        assert_eq!(home.client().list().unwrap().len(), 2);
        home.other_than(old);
    }
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn who_dies_again_and_again_is_replaced_less_and_less_often_and_that_is_said() {
    let home = Home::new();
    let mut daemon = home.start_succeeded("dies");
    kill_process(home.serving().unwrap(), Signal::KILL).unwrap();
    // Much longer than the first waits.
    thread::sleep(Duration::from_secs(4));
    assert!(daemon.is_running(), "there is always a next one");
    daemon.signal(Signal::KILL);
    let (_, log) = daemon.end();
    let waits = ["200ms", "400ms", "800ms"];
    let said = waits
        .map(|wait| log.matches(&format!("long; another standby is started in {wait}")).count());
    assert_eq!(said, [1; 3], "{log}");
}

#[test]
fn a_daemon_without_standbys_is_not_upgraded() {
    let home = Home::new();
    let daemon = home.start("a,b", 0);
    home.assert_told(READY);
    let failure = home.client().upgrade().unwrap_err();
    assert!(failure.message.contains("no standbys"), "{failure}");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.end().0, Some(0));
}
