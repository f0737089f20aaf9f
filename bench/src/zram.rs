//! Kernel zram, as a device of its own for the time of a measurement.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;
use rustix::ioctl::{Setter, ioctl};
use tmem::{PAGE_SIZE, Page};

/// Bytes that zram's table takes for each page of the device, used or not, on 64-bit kernels. It
/// is not in `mm_stat`.
pub const TABLE_BYTES: u64 = 16;

const CONTROL: &str = "/sys/class/zram-control";

/// `_IO(0x12, 119)`; its argument is {offset, bytes}.
const BLKDISCARD: rustix::ioctl::Opcode = 0x1277;

/// A zram device. It is reset, and removed if it was added, when this goes.
pub struct Zram {
    file: Option<File>,
    number: u32,
    was_added: bool,
    pages: u64,
}

impl Zram {
    /// Adds a device, or takes one that nobody uses.
    pub fn new(algorithm: &str, pages: u64) -> Result<Self> {
        let added = fs::read_to_string(format!("{CONTROL}/hot_add"));
        let (number, was_added) = match added {
            Ok(number) => (number.trim().parse().context("hot_add gave no number")?, true),
            Err(_) => (unused_device()?, false),
        };
        let mut zram = Self { file: None, number, was_added, pages };
        zram.set("comp_algorithm", algorithm)?;
        zram.set("disksize", &(pages * PAGE_SIZE as u64).to_string())?;
        let flags = (OFlags::DIRECT | OFlags::EXCL).bits() as i32;
        let device = format!("/dev/zram{number}");
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&device);
        zram.file = Some(file.with_context(|| format!("opening {device}"))?);
        Ok(zram)
    }

    /// Writes pages, which have to be of a `Buffer`, with one system call.
    pub fn write(&self, at: u64, pages: &[Page]) -> io::Result<()> {
        self.file().write_all_at(pages.as_flattened(), at * PAGE_SIZE as u64)
    }

    /// Reads a page into one of a `Buffer`.
    pub fn read(&self, at: u64, page: &mut Page) -> io::Result<()> {
        self.file().read_exact_at(page, at * PAGE_SIZE as u64)
    }

    #[allow(unsafe_code)]
    pub fn discard(&self, pages: Range<u64>) -> io::Result<()> {
        let bytes = PAGE_SIZE as u64;
        let range = [pages.start * bytes, (pages.end - pages.start) * bytes];
        // SAFETY: the operation reads two 64-bit numbers, and touches the device only.
        let done = unsafe { ioctl(self.file(), Setter::<BLKDISCARD, _>::new(range)) };
        Ok(done?)
    }

    /// Has zsmalloc give back what its holes allow.
    pub fn compact(&self) -> Result<()> {
        self.set("compact", "1")
    }

    /// `mem_used_total` of `mm_stat`.
    pub fn mem_used(&self) -> Result<u64> {
        let stat = fs::read_to_string(self.attribute("mm_stat"))?;
        let field = stat.split_ascii_whitespace().nth(2).context("mm_stat has no third field")?;
        field.parse().context("mm_stat")
    }

    pub fn table_bytes(&self) -> u64 {
        self.pages * TABLE_BYTES
    }

    fn file(&self) -> &File {
        self.file.as_ref().expect("open as long as this lives")
    }

    fn set(&self, name: &str, value: &str) -> Result<()> {
        let path = self.attribute(name);
        fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))
    }

    fn attribute(&self, name: &str) -> PathBuf {
        Path::new(&format!("/sys/block/zram{}", self.number)).join(name)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        self.file = None;
        // Whatever of this fails, there is nobody to tell but the person who looks.
        if let Err(error) = self.set("reset", "1") {
            eprintln!("zram{} is left as it is: {error:#}", self.number);
        } else if self.was_added
            && let Err(error) = fs::write(format!("{CONTROL}/hot_remove"), self.number.to_string())
        {
            eprintln!("zram{} is left: {error}", self.number);
        }
    }
}

/// A device that has no size yet.
fn unused_device() -> Result<u32> {
    let entries = fs::read_dir("/sys/block").context("zram needs /sys")?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(number) = name.strip_prefix("zram") else { continue };
        if fs::read_to_string(entry.path().join("initstate"))?.trim() == "0" {
            return Ok(number.parse()?);
        }
    }
    bail!("there is no unused zram device, and none can be added: load zram, and be root")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contenders::Buffer;

    #[test]
    fn pages_are_written_read_and_discarded_where_there_is_zram() {
        // Only root can have a device; where there is none, nothing can be tested.
        let Ok(zram) = Zram::new("lz4", 64) else { return };
        let mut buffer = Buffer::new(3);
        for (number, page) in buffer.pages_mut().iter_mut().enumerate() {
            *page = std::array::from_fn(|at| (at / (3 + number)) as u8);
        }
        zram.write(5, buffer.pages()).unwrap();
        assert!(zram.mem_used().unwrap() > 0);
        zram.read(6, &mut buffer.pages_mut()[0]).unwrap();
        assert_eq!(buffer.pages()[0], buffer.pages()[1]);
        zram.discard(5..7).unwrap();
        zram.read(6, &mut buffer.pages_mut()[0]).unwrap();
        assert_eq!(buffer.pages()[0], [0; PAGE_SIZE]);
        zram.read(7, &mut buffer.pages_mut()[0]).unwrap();
        assert_eq!(buffer.pages()[0], buffer.pages()[2]);
        zram.compact().unwrap();
        assert_eq!(zram.table_bytes(), 1024);
        assert!(Zram::new("no-such-algorithm", 64).is_err());
    }
}
