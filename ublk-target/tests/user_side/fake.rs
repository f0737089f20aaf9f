//! A daemon without devices, for tests of everything around one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tmem::WritebackSettings;
use tmem_ublk_target::backing::{BackingInfo, BackingSpec, BackingStats, WritebackChange};
use tmem_ublk_target::control::{Operations, Server};
use tmem_ublk_target::daemon::{DaemonStats, DeviceInfo, DeviceState, DeviceStats};
use tmem_ublk_target::device::IoStats;
use tmem_ublk_target::exit::{Exit, Failure};
use tmem_ublk_target::socket::Listener;
use tmem_ublk_target::watchdog::{Pulse, Watched};
use tmem_ublk_target::worker::Service;

/// A daemon that remembers what it is told and serves nothing. A device that is named `busy` cannot be
/// removed, and with one that is named `mounted` the daemon cannot be shut down.
#[derive(Default)]
pub struct Fake {
    devices: Mutex<Vec<DeviceInfo>>,
    backing: Mutex<Option<BackingStats>>,
    writeback: Mutex<WritebackSettings>,
    del_takes: Duration,
    shutdown_takes: Duration,
}

impl Fake {
    /// One whose removals take so long.
    pub fn slow_to_del(del_takes: Duration) -> Self {
        Self { del_takes, ..Self::default() }
    }

    /// One whose shutdown takes so long.
    pub fn slow_to_shut_down(shutdown_takes: Duration) -> Self {
        Self { shutdown_takes, ..Self::default() }
    }
}

impl Operations for Fake {
    fn add_swap(&self, name: Option<&str>, bytes: u64) -> Result<DeviceInfo, Failure> {
        let mut devices = self.devices.lock().unwrap();
        let name = name.map_or_else(|| format!("swap{}", devices.len()), str::to_owned);
        if devices.iter().any(|device| device.name == name) {
            let message = format!("'{name}' exists: choose another name");
            return Err(Failure::new(Exit::NameTaken, message));
        }
        let path = format!("/dev/ublkb{}", devices.len());
        let kind = "swap".to_owned();
        let info = DeviceInfo {
            name,
            kind,
            path,
            uri: None,
            connections: 0,
            bytes,
            queues: 2,
            depth: 128,
            swapped_on: true,
            state: DeviceState::Live,
            worker_pid: 0,
            takeovers: 0,
        };
        devices.push(info.clone());
        Ok(info)
    }

    fn del(&self, name: &str) -> Result<(), Failure> {
        thread::sleep(self.del_takes);
        let mut devices = self.devices.lock().unwrap();
        let at = devices.iter().position(|device| device.name == name);
        let at = at.ok_or_else(|| {
            Failure::new(Exit::NotFound, format!("there is no device '{name}': see 'tmem list'"))
        })?;
        if name == "busy" {
            return Err(Failure::new(Exit::InUse, "'busy' is mounted by pid 1: unmount it"));
        }
        devices.remove(at);
        Ok(())
    }

    fn list(&self) -> Vec<DeviceInfo> {
        self.devices.lock().unwrap().clone()
    }

    fn stats(&self) -> DaemonStats {
        let mut stats = DaemonStats::default();
        for info in self.list() {
            let mut pool = tmem::PoolCounters::default();
            pool.orig_data_size = 3 << 20;
            pool.compr_data_size = 1 << 20;
            stats.total.pools.add(&pool);
            stats.total.mem_used_total += 1 << 20;
            let latencies = tmem::Latencies::default();
            stats.devices.push(DeviceStats { info, pool, latencies, io: IoStats::default() });
        }
        stats.total.mem_limit = 1 << 30;
        stats.serving.has_supervisor = true;
        stats.serving.worker_pid = std::process::id();
        stats.backing = self.backing.lock().unwrap().clone();
        stats
    }

    fn set_pool_limit(&self, bytes: u64) -> Result<u64, Failure> {
        match bytes {
            0..1_048_576 => {
                let message =
                    format!("pool limit of {bytes} bytes is too low: use 1048576 or more");
                Err(Failure::new(Exit::Size, message))
            }
            _ => Ok(bytes),
        }
    }

    fn set_backing(&self, spec: &BackingSpec) -> Result<BackingInfo, Failure> {
        let path = spec.path.to_str().unwrap().to_owned();
        if path == "/dev/foreign" && !spec.force {
            let message = "/dev/foreign holds something else: erase it, or use --force";
            return Err(Failure::new(Exit::Foreign, message));
        }
        let bytes = spec.bytes.unwrap_or(1 << 30);
        let state = "ok".to_owned();
        *self.backing.lock().unwrap() =
            Some(BackingStats { path: path.clone(), state, last_errno: 0 });
        Ok(BackingInfo { path, bytes })
    }

    fn set_writeback(&self, change: WritebackChange) -> Result<WritebackSettings, Failure> {
        let mut settings = self.writeback.lock().unwrap();
        let changed = change.of(*settings);
        changed.check()?;
        *settings = changed;
        Ok(changed)
    }
}

impl Service for Fake {
    fn shutdown(&self) -> Result<(), Failure> {
        thread::sleep(self.shutdown_takes);
        if self.list().iter().any(|device| device.name == "mounted") {
            return Err(Failure::new(Exit::InUse, "'mounted' is used by pid 7: unmount it"));
        }
        Ok(())
    }

    fn swapped(&self) -> u64 {
        0
    }
}

impl Watched for Fake {
    fn pulses(&self) -> Vec<Pulse> {
        Vec::new()
    }

    fn reads_from_disk(&self) -> bool {
        false
    }
}

/// A control server over a [`Fake`], on a socket of its own.
pub struct Served {
    pub fake: Arc<Fake>,
    pub socket: PathBuf,
    server: Option<Server>,
    _home: tempfile::TempDir,
}

impl Served {
    pub fn start(fake: Fake) -> Self {
        let home = tempfile::tempdir().unwrap();
        let socket = home.path().join("control.sock");
        let fake = Arc::new(fake);
        let listener = Listener::bind(&socket, "--control").unwrap();
        let server = Some(Server::start(listener, fake.clone(), Arc::default()).unwrap());
        Self { fake, socket, server, _home: home }
    }

    pub fn stop(&mut self) {
        self.server.take().unwrap().stop();
    }

    /// Runs `tmem` with these words as a client of this server.
    pub fn tmem(&self, words: &[&str]) -> Output {
        tmem(&self.socket, words)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

/// Runs `tmem` with these words as a client of the daemon at `socket`.
pub fn tmem(socket: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tmem"));
    command.arg("--control").arg(socket).args(words).output().unwrap()
}

/// What a command printed.
pub fn stdout(output: &Output) -> &str {
    str::from_utf8(&output.stdout).unwrap()
}

/// Checks that a command failed with `exit`, printed nothing, and said why in one line.
pub fn assert_fails(output: &Output, exit: Exit, reason: &str) {
    let stderr = str::from_utf8(&output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(exit.code().into()), "{stderr}");
    assert_eq!(stdout(output), "", "{stderr}");
    assert!(stderr.starts_with("tmem: ") && stderr.contains(reason), "{stderr}");
    assert_eq!(stderr.matches('\n').count(), 1, "{stderr}");
}
