//! Kernel zram, as a device of its own for the time of a measurement.

use std::fs::{self, File, OpenOptions};
use std::io;
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

/// A page that direct I/O can use.
#[repr(align(4096))]
struct Aligned(Page);

/// A zram device with lz4. It is reset, and removed if it was added, when this goes.
pub struct Zram {
    file: Option<File>,
    number: u32,
    was_added: bool,
    buffer: Box<Aligned>,
    pub pages: u64,
}

impl Zram {
    /// Adds a device, or takes one that nobody uses.
    pub fn new(pages: u64) -> Result<Self> {
        let added = fs::read_to_string(format!("{CONTROL}/hot_add"));
        let (number, was_added) = match added {
            Ok(number) => (number.trim().parse().context("hot_add gave no number")?, true),
            Err(_) => (unused_device()?, false),
        };
        let buffer = Box::new(Aligned([0; PAGE_SIZE]));
        let mut zram = Self { file: None, number, was_added, buffer, pages };
        zram.set("comp_algorithm", "lz4")?;
        zram.set("disksize", &(pages * PAGE_SIZE as u64).to_string())?;
        let flags = (OFlags::DIRECT | OFlags::EXCL).bits() as i32;
        let device = format!("/dev/zram{number}");
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&device);
        zram.file = Some(file.with_context(|| format!("opening {device}"))?);
        Ok(zram)
    }

    pub fn write(&mut self, at: u64, page: &Page) -> io::Result<()> {
        self.buffer.0.copy_from_slice(page);
        self.file().write_all_at(&self.buffer.0, at * PAGE_SIZE as u64)
    }

    pub fn read(&mut self, at: u64, page: &mut Page) -> io::Result<()> {
        let file = self.file.as_ref().expect("open as long as this lives");
        file.read_exact_at(&mut self.buffer.0, at * PAGE_SIZE as u64)?;
        page.copy_from_slice(&self.buffer.0);
        Ok(())
    }

    #[allow(unsafe_code)]
    pub fn discard(&self, at: u64) -> io::Result<()> {
        let range = [at * PAGE_SIZE as u64, PAGE_SIZE as u64];
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

    #[test]
    fn pages_are_written_read_and_discarded_where_there_is_zram() {
        // Only root can have a device; where there is none, nothing can be tested.
        let Ok(mut zram) = Zram::new(64) else { return };
        let mut page: Page = std::array::from_fn(|at| (at / 3) as u8);
        zram.write(5, &page).unwrap();
        assert!(zram.mem_used().unwrap() > 0);
        zram.read(5, &mut page).unwrap();
        assert_eq!(page[4000], (4000 / 3) as u8);
        zram.discard(5).unwrap();
        zram.read(5, &mut page).unwrap();
        assert_eq!(page, [0; PAGE_SIZE]);
        zram.compact().unwrap();
        assert_eq!(zram.table_bytes(), 1024);
    }
}
