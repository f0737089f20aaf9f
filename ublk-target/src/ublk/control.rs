//! What the ublk driver is told through its control device, by an io_uring of its own.
//!
//! A command is waited for: nothing here is for the I/O path. The kernel carries commands out on a thread that it
//! makes for who sends the first, and keeps; so whoever cannot wait for memory later sends one before that.
//!
//! This file has `unsafe` for the buffers that the kernel works on.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use io_uring::{IoUring, opcode, squeue, types};
use libublk::sys;
use rustix::io::Errno;
use rustix::thread::CpuSet;

/// Where the driver takes orders.
pub const CONTROL: &str = "/dev/ublk-control";

/// What the driver says of a device.
pub type DeviceInfo = sys::ublksrv_ctrl_dev_info;

/// Bytes of a set of CPUs, as the driver fills it.
const CPU_BYTES: usize = CpuSet::MAX_CPU / 8;

/// See the module's description.
pub struct Control {
    file: File,
    ring: IoUring<squeue::Entry128>,
    /// Whether the driver knows commands by their modern numbers.
    is_modern: bool,
}

impl Control {
    /// Opens the control device, and sends a first command.
    pub fn open() -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        let ring = IoUring::<squeue::Entry128>::builder().build(4)?;
        let mut control = Self { file, ring, is_modern: true };
        let mut features = 0_u64;
        let command = sys::ublksrv_ctrl_cmd {
            addr: (&raw mut features) as u64,
            len: size_of_val(&features) as u16,
            ..command(u32::MAX)
        };
        // Linux before 6.5 has neither this command nor all of the modern numbers.
        control.is_modern = control.run(sys::UBLK_U_CMD_GET_FEATURES, command).is_ok();
        Ok(control)
    }

    /// Whether the driver knows I/O commands by their modern numbers, too.
    pub fn is_modern(&self) -> bool {
        self.is_modern
    }

    /// Makes a device, and says what it turned out to be.
    pub fn add(&mut self, mut info: DeviceInfo) -> io::Result<DeviceInfo> {
        let command = with_buffer(info.dev_id, &mut info);
        self.run(sys::UBLK_U_CMD_ADD_DEV, command)?;
        Ok(info)
    }

    /// What the driver knows of a device.
    pub fn info(&mut self, id: u32) -> io::Result<DeviceInfo> {
        let mut info = DeviceInfo::default();
        self.run(sys::UBLK_U_CMD_GET_DEV_INFO, with_buffer(id, &mut info))?;
        Ok(info)
    }

    /// Says what a new device is.
    pub fn set_params(&mut self, id: u32, mut params: sys::ublk_params) -> io::Result<()> {
        params.len = size_of_val(&params) as u32;
        self.run(sys::UBLK_U_CMD_SET_PARAMS, with_buffer(id, &mut params))
    }

    /// Makes a device's node, once this process has fetched for all its queues.
    pub fn start(&mut self, id: u32) -> io::Result<()> {
        self.run(sys::UBLK_U_CMD_START_DEV, with_pid(id))
    }

    /// Removes a device's node. What is under way fails.
    pub fn stop(&mut self, id: u32) -> io::Result<()> {
        self.run(sys::UBLK_U_CMD_STOP_DEV, command(id))
    }

    /// Removes a device that has no node, without waiting for those that have it open.
    pub fn remove(&mut self, id: u32) -> io::Result<()> {
        match self.run(sys::UBLK_U_CMD_DEL_DEV_ASYNC, command(id)) {
            // Linux before 6.9 knows only the command that waits.
            Err(_) => self.run(sys::UBLK_U_CMD_DEL_DEV, command(id)),
            removed => removed,
        }
    }

    /// Makes a device ready for another process than the one that served it. Busy as long as that is not all gone.
    pub fn begin_recovery(&mut self, id: u32) -> io::Result<()> {
        self.run(sys::UBLK_U_CMD_START_USER_RECOVERY, command(id))
    }

    /// Lets requests come to this process, once it has fetched for all queues: first those that the other had.
    pub fn end_recovery(&mut self, id: u32) -> io::Result<()> {
        self.run(sys::UBLK_U_CMD_END_USER_RECOVERY, with_pid(id))
    }

    /// The CPUs whose requests a queue has.
    pub fn cpus(&mut self, id: u32, queue: u16) -> io::Result<CpuSet> {
        let mut bytes = [0_u8; CPU_BYTES];
        let command = sys::ublksrv_ctrl_cmd { data: [queue.into()], ..with_buffer(id, &mut bytes) };
        self.run(sys::UBLK_U_CMD_GET_QUEUE_AFFINITY, command)?;
        let mut cpus = CpuSet::new();
        let is_set = |cpu: &usize| bytes[cpu / 8] & 1 << (cpu % 8) != 0;
        (0..CpuSet::MAX_CPU).filter(is_set).for_each(|cpu| cpus.set(cpu));
        Ok(cpus)
    }

    /// Sends a command, whose buffer is the caller's until this returns, and waits for it.
    fn run(&mut self, number: u32, command: sys::ublksrv_ctrl_cmd) -> io::Result<()> {
        /// As the kernel finds it in an entry.
        #[repr(C)]
        union Place {
            command: sys::ublksrv_ctrl_cmd,
            bytes: [u8; 80],
        }
        let mut place = Place { bytes: [0; 80] };
        place.command = command;
        let number = if self.is_modern { number } else { number & 0xff };
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), number)
            // SAFETY: all of it was set, by bytes first.
            .cmd(unsafe { place.bytes })
            .build();
        // SAFETY: the buffer is there until the command has completed, for which is waited below.
        unsafe { self.ring.submission().push(&entry) }.expect("nothing else is in the ring");
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::INTR | Errno::AGAIN | Errno::BUSY) => {}
                    // The kernel has the command, or has it not: nothing can be done with either.
                    _ => crate::process::fatal(format_args!("io_uring failed: {error}")),
                },
            }
            if let Some(entry) = self.ring.completion().next() {
                return match entry.result() {
                    0.. => Ok(()),
                    error => Err(io::Error::from_raw_os_error(-error)),
                };
            }
        }
    }
}

/// Nodes of devices whose server has died, and that can be taken over, if anybody had what was on them.
pub fn forlorn() -> Vec<String> {
    let (Ok(mut control), Ok(nodes)) = (Control::open(), fs::read_dir("/dev")) else {
        return Vec::new();
    };
    let number = |node: io::Result<fs::DirEntry>| {
        node.ok()?.file_name().to_str()?.strip_prefix("ublkc")?.parse::<u32>().ok()
    };
    let mut is_forlorn = |id: &u32| {
        control.info(*id).is_ok_and(|info| {
            let is_waiting = u32::from(info.state) == sys::UBLK_S_DEV_QUIESCED;
            is_waiting && !Path::new(&format!("/proc/{}", info.ublksrv_pid)).exists()
        })
    };
    let ids = nodes.filter_map(number).filter(|id| is_forlorn(id));
    ids.map(node_path).collect()
}

/// The node of the device of this number.
pub fn node_path(id: u32) -> String {
    format!("/dev/ublkb{id}")
}

fn command(id: u32) -> sys::ublksrv_ctrl_cmd {
    sys::ublksrv_ctrl_cmd { dev_id: id, queue_id: u16::MAX, ..Default::default() }
}

fn with_buffer<T>(id: u32, buffer: &mut T) -> sys::ublksrv_ctrl_cmd {
    let len = size_of_val(buffer) as u16;
    sys::ublksrv_ctrl_cmd { addr: ptr_of(buffer), len, ..command(id) }
}

fn ptr_of<T>(buffer: &mut T) -> u64 {
    (&raw mut *buffer) as u64
}

fn with_pid(id: u32) -> sys::ublksrv_ctrl_cmd {
    sys::ublksrv_ctrl_cmd { data: [std::process::id().into()], ..command(id) }
}
