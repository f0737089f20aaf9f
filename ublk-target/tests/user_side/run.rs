//! The daemon's life: ready, signals, stops that are refused, a second daemon, a sudden death.
//!
//! The daemon is a process of its own: this test binary, started once more for [`fake_daemon`].

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tmem_ublk_target::config::{RunConfig, SwapSpec};
use tmem_ublk_target::control::Client;
use tmem_ublk_target::daemon::FrontEnd;
use tmem_ublk_target::exit::{Exit, Failure};
use tmem_ublk_target::supervisor::{self, Setup};
use tmem_ublk_target::worker;

use crate::fake::Fake;
use crate::handover;

/// What the daemon's process is told: its socket, its devices, how long its shutdown takes.
const SOCKET: &str = "FAKE_DAEMON_SOCKET";
const DEVICES: &str = "FAKE_DAEMON_DEVICES";
const SHUTDOWN_MS: &str = "FAKE_DAEMON_SHUTDOWN_MS";

/// If it shall have standbys, what they and the program that its name stands for by now are:
/// `good`; `bad`, or `fails` when it serves, the latter; or `dies` as soon as it serves.
pub const SUCCESSOR: &str = "FAKE_DAEMON_SUCCESSOR";

#[test]
#[ignore = "this is the daemon that the other tests start"]
fn fake_daemon() {
    let Ok(socket) = env::var(SOCKET) else { return };
    let names = env::var(DEVICES).unwrap();
    let swap = |name: &str| SwapSpec { bytes: 1 << 30, name: Some(name.to_owned()) };
    let config = RunConfig {
        frontend: FrontEnd::Ublk,
        nbd: None,
        pool_limit: 1 << 30,
        control: socket.into(),
        swapon: false,
        best_effort: false,
        backing: None,
        encrypt_backing: true,
        writeback: tmem::WritebackSettings::default(),
        swaps: names.split_terminator(',').map(swap).collect(),
    };
    let start = |test| {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(harness(test));
        command
    };
    let standby = || start("handover::fake_standby");
    let successor = || match env::var(SUCCESSOR).as_deref() {
        Ok("bad") => Command::new("false"),
        Ok("fails") => {
            let mut command = standby();
            command.env(SUCCESSOR, "dies");
            command
        }
        _ => standby(),
    };
    let has_standbys = env::var_os(SUCCESSOR).is_some();
    let setup = Setup {
        harden: &|_, _| Ok(()),
        worker: &|| start("run::fake_worker"),
        standby: has_standbys.then_some(&standby),
        successor: has_standbys.then_some(&successor),
        supervisor: &|| start("run::fake_daemon"),
    };
    let exit = match supervisor::run(|| Ok(config), &setup, &mut io::stdout()) {
        Ok(()) => Exit::Ok,
        Err(failure) => {
            eprintln!("{failure}");
            failure.code
        }
    };
    process::exit(exit.code().into());
}

#[test]
#[ignore = "this is the worker that the daemon above starts"]
fn fake_worker() {
    let Ok(shutdown_ms) = env::var(SHUTDOWN_MS) else { return };
    let shutdown_takes = Duration::from_millis(shutdown_ms.parse().unwrap());
    let ended = worker::run(|start| match env::var(DEVICES).unwrap().as_str() {
        "refused" => Err(Failure::new(Exit::NoUblk, "no ublk: run 'modprobe ublk_drv'")),
        "dies" => process::abort(),
        _ => {
            if env::var_os(SUCCESSOR).is_some() {
                handover::begin(start);
            }
            Ok(Fake::slow_to_shut_down(shutdown_takes))
        }
    });
    process::exit(ended.is_err().into());
}

/// What makes this binary go on as one of the two above. With one thread, as on one processor, the harness would
/// begin the line that we read.
fn harness(test: &str) -> [&str; 5] {
    ["--ignored", "--exact", test, "--nocapture", "--test-threads=2"]
}

/// Where daemons run, and who is told of them.
pub struct Home {
    directory: TempDir,
    systemd: UnixDatagram,
    /// What it was told to keep so far.
    pub kept: RefCell<Vec<String>>,
}

impl Home {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let systemd = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        systemd.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { directory, systemd, kept: RefCell::default() }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("run/control.sock")
    }

    pub fn client(&self) -> Client {
        Client::new(&self.socket())
    }

    pub fn start(&self, devices: &str, shutdown_ms: u32) -> Daemon {
        self.start_watched(devices, shutdown_ms, None)
    }

    /// With a watchdog that wants to hear of it each `watchdog`.
    fn start_watched(&self, devices: &str, shutdown_ms: u32, watchdog: Option<Duration>) -> Daemon {
        let variable = watchdog.map(|limit| ("WATCHDOG_USEC", limit.as_micros().to_string()));
        self.start_with(devices, shutdown_ms, variable)
    }

    /// With this in its environment.
    pub fn start_with(
        &self,
        devices: &str,
        shutdown_ms: u32,
        variable: Option<(&str, String)>,
    ) -> Daemon {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(harness("run::fake_daemon"));
        command.env(SOCKET, self.socket()).env(DEVICES, devices);
        command.env(SHUTDOWN_MS, shutdown_ms.to_string());
        command.env("NOTIFY_SOCKET", self.directory.path().join("notify"));
        command.envs(variable);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Daemon { child: Some(child), stdout }
    }

    /// Checks what systemd is told next.
    pub fn assert_told(&self, text: &str) {
        assert_eq!(self.told().unwrap(), text);
    }

    /// Takes what systemd was told to keep at last; it was told nothing else.
    pub fn assert_quiet(&self) {
        self.systemd.set_nonblocking(true).unwrap();
        assert_eq!(self.told().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    /// What systemd is told next, but for what it is to keep.
    fn told(&self) -> io::Result<String> {
        loop {
            let mut buffer = [0; 1024];
            let length = self.systemd.recv(&mut buffer)?;
            let text = str::from_utf8(&buffer[..length]).unwrap();
            match text.strip_prefix("FDSTORE") {
                None => return Ok(text.to_owned()),
                Some(kept) => self.kept.borrow_mut().push(kept.to_owned()),
            }
        }
    }
}

/// A daemon's process; killed if the test ends before it does.
pub struct Daemon {
    child: Option<Child>,
    stdout: BufReader<ChildStdout>,
}

impl Daemon {
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(self.child.as_ref().unwrap()), signal).unwrap();
    }

    /// The next line that names a device, which the test harness's own lines do not.
    pub fn device_line(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "no more lines");
            if line.contains("/dev/") {
                return line;
            }
        }
    }

    /// The process that serves.
    pub fn worker(&self) -> Pid {
        worker_of(self.child.as_ref().unwrap()).unwrap()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().unwrap().try_wait().unwrap().is_none()
    }

    /// Waits for the end of the supervisor alone, and returns the exit code.
    pub fn child_ended(mut self) -> Option<i32> {
        self.child.take().unwrap().wait().unwrap().code()
    }

    /// Waits for the end, and returns the exit code and the log.
    pub fn end(mut self) -> (Option<i32>, String) {
        let begun = Instant::now();
        while self.is_running() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the daemon does not end");
            thread::sleep(Duration::from_millis(5));
        }
        let Output { status, stderr, .. } = self.child.take().unwrap().wait_with_output().unwrap();
        (status.code(), String::from_utf8(stderr).unwrap())
    }
}

/// The process that serves for a daemon, if there is one. The harness has the daemon run in any of its threads.
fn worker_of(daemon: &Child) -> Option<Pid> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.id())).ok()?;
    let children =
        tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    children.filter_map(|pid| Pid::from_raw(pid.trim().parse().ok()?)).next()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // A worker outlives its supervisor.
            if let Ok(None) = child.try_wait()
                && let Some(worker) = worker_of(&child)
            {
                let _ = kill_process(worker, Signal::KILL);
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub const READY: &str = "READY=1\nSTATUS=serving 2 devices\n";
pub const STOPPING: &str =
    "STOPPING=1\nEXTEND_TIMEOUT_USEC=30000000\nSTATUS=taking devices out of use\n";

const REFUSED: &str = "STATUS=still running: 'mounted' is used by pid 7: unmount it\n";

#[test]
fn each_signal_stops_a_ready_daemon() {
    for (signal, name) in [
        (Signal::TERM, "SIGTERM"),
        (Signal::INT, "SIGINT"),
        (Signal::HUP, "SIGHUP"),
        (Signal::QUIT, "SIGQUIT"),
    ] {
        let home = Home::new();
        let mut daemon = home.start("a,b", 0);
        home.assert_told(READY);
        assert_eq!(daemon.device_line(), "a /dev/ublkb0 1073741824\n");
        assert_eq!(daemon.device_line(), "b /dev/ublkb1 1073741824\n");
        assert_eq!(home.client().list().unwrap().len(), 2);
        daemon.signal(signal);
        home.assert_told(STOPPING);
        let (code, log) = daemon.end();
        assert_eq!((code, log.as_str()), (Some(0), &*format!("tmem: stopping on {name}\n")));
        assert!(!home.socket().exists());
    }
}

#[test]
fn a_stop_that_is_refused_leaves_the_daemon_running_until_it_can_stop() {
    let home = Home::new();
    let mut daemon = home.start("a,mounted", 0);
    home.assert_told(READY);
    daemon.signal(Signal::TERM);
    home.assert_told(STOPPING);
    home.assert_told(REFUSED);
    // Longer than until the first new try, which is refused as well and need not be told again.
    thread::sleep(Duration::from_millis(1500));
    assert!(daemon.is_running());
    assert_eq!(home.client().list().unwrap().len(), 2);
    // Whoever used it is done now, and sends no signal.
    home.client().del("mounted").unwrap();
    let (code, log) = daemon.end();
    assert_eq!(code, Some(0));
    assert_eq!(log.matches("tmem: still running: 'mounted' is used by pid 7").count(), 1, "{log}");
}

#[test]
fn the_watchdog_is_told_as_long_as_the_supervisor_runs() {
    const WATCHDOG: &str = "WATCHDOG=1\n";
    let home = Home::new();
    let daemon = home.start_watched("a,b", 0, Some(Duration::from_millis(80)));
    let told: Vec<_> = std::iter::from_fn(|| home.told().ok()).take(10).collect();
    assert_eq!(told.iter().filter(|text| *text == READY).count(), 1, "{told:?}");
    assert_eq!(told.iter().filter(|text| *text == WATCHDOG).count(), 9, "{told:?}");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn more_signals_do_not_cut_a_stop_short() {
    let home = Home::new();
    let mut daemon = home.start("a,b", 5000);
    home.assert_told(READY);
    daemon.signal(Signal::TERM);
    home.assert_told(STOPPING);
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::INT] {
        daemon.signal(signal);
        thread::sleep(Duration::from_millis(50));
        assert!(daemon.is_running());
    }
    assert_eq!(home.client().list().unwrap().len(), 2);
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn a_daemon_that_cannot_start_leaves_nothing() {
    let home = Home::new();
    assert_eq!(home.start("refused", 0).end().0, Some(Exit::NoUblk.code().into()));
    assert!(!home.socket().exists());
}

#[test]
fn a_device_that_cannot_be_made_stops_the_daemon() {
    let home = Home::new();
    let (code, log) = home.start("a,a", 0).end();
    assert_eq!(code, Some(Exit::NameTaken.code().into()));
    assert!(log.contains("tmem: stopping: 'a' exists"), "{log}");
    assert!(!home.socket().exists());
}

#[test]
fn a_second_daemon_leaves_the_first_alone() {
    let home = Home::new();
    let first = home.start("a,b", 0);
    home.assert_told(READY);
    assert_eq!(home.start("c", 0).end().0, Some(Exit::Running.code().into()));
    assert_eq!(home.client().list().unwrap().len(), 2);
    first.signal(Signal::TERM);
    assert_eq!(first.end().0, Some(0));
}

#[test]
fn a_daemon_whose_worker_is_killed_ends() {
    let home = Home::new();
    let first = home.start("a,b", 0);
    home.assert_told(READY);
    kill_process(first.worker(), Signal::KILL).unwrap();
    let (code, log) = first.end();
    assert_eq!(code, Some(Exit::Failure.code().into()));
    assert!(log.contains("SIGKILL"), "{log}");
}

#[test]
fn a_worker_serves_on_without_its_supervisor_and_stops_on_a_signal() {
    let home = Home::new();
    let first = home.start("a,b", 0);
    home.assert_told(READY);
    let worker = first.worker();
    first.signal(Signal::KILL);
    assert_eq!(first.child_ended(), None);
    assert_eq!(home.client().list().unwrap().len(), 2);
    // The socket is still its own.
    assert_eq!(home.start("c", 0).end().0, Some(Exit::Running.code().into()));
    kill_process(worker, Signal::TERM).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while home.socket().exists() {
        assert!(Instant::now() < deadline, "it does not stop");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_daemon_takes_the_place_of_one_that_was_killed_whole() {
    let home = Home::new();
    let first = home.start("a,b", 0);
    home.assert_told(READY);
    let worker = first.worker();
    first.signal(Signal::KILL);
    kill_process(worker, Signal::KILL).unwrap();
    assert_eq!(first.child_ended(), None);
    assert!(is_socket(&home.socket()));
    wait_until_gone(worker);
    assert_eq!(home.client().list().unwrap_err().code, Exit::NoDaemon);
    let second = home.start("c,d", 0);
    home.assert_told(READY);
    assert_eq!(home.client().list().unwrap()[0].name, "c");
    second.signal(Signal::TERM);
    assert_eq!(second.end().0, Some(0));
}

#[test]
fn a_worker_that_dies_at_its_start_is_said_to_have() {
    let home = Home::new();
    let (code, _) = home.start("dies", 0).end();
    assert_eq!(code, Some(Exit::Failure.code().into()));
    assert!(!home.socket().exists());
}

pub fn wait_until_gone(process: Pid) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while rustix::process::test_kill_process(process).is_ok() {
        assert!(Instant::now() < deadline, "it does not end");
        thread::sleep(Duration::from_millis(5));
    }
}

fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}
