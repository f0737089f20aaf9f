//! A program in the kernel that marks freed slots of one swap area.
//!
//! The area has to be the whole of the device: not a partition of it, nor a file on it. Slots are the device's pages then, one
//! for one. Marks are set before the kernel can give a slot away again, and so before whatever is written to it next.

use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use tmem::FreedPages;

use super::bits::{self, Bits};
use super::bpf::{self, Mapping, NEEDS_BPF, ProgramKind};
use super::observer::Observer;
use super::plan::Plan;
use super::{FreedError, program};

/// Pages that a device can have, of which freed slots are marked: 256 GiB. All marks are looked through again and again, and
/// with more that would be felt.
const PAGES_MAX: u64 = 1 << 26;

/// The largest numbers of devices.
const MAJOR_BITS: u32 = 12;
const MINOR_BITS: u32 = 20;

/// A program that would mark freed slots of one swap area, and marks none before [`Probe::observe`].
#[derive(Debug)]
pub struct Probe {
    program: OwnedFd,
    map: OwnedFd,
    function: &'static CStr,
}

/// What it marks. A mark may be older than what was put into its slot last, unless whoever puts has taken it away.
#[derive(Debug)]
pub struct Marks {
    words: Mapping,
    pages: u64,
}

impl Probe {
    /// For freed slots of the device of those numbers (major and minor), which has so many pages.
    ///
    /// It needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN.
    pub fn new(plan: &Plan, device: (u32, u32), pages: u64) -> Result<(Self, Marks), FreedError> {
        let unsupported = FreedError::Unsupported { what: "this processor" };
        let arguments = program::ARGUMENTS.ok_or(unsupported)?;
        let invalid =
            |what| FreedError::Failed { what, source: io::ErrorKind::InvalidInput.into() };
        let number =
            device_number(device).ok_or(invalid("mark slots of a device without number"))?;
        if pages == 0 || pages > PAGES_MAX {
            return Err(invalid("mark slots of a device of more than 256 GiB"));
        }
        let map = bpf::create_map(bits::words_for(pages) as u32)
            .map_err(|source| FreedError::of("make a map in the kernel", NEEDS_BPF, source))?;
        let marks = Marks::of(map.as_fd(), pages)?;
        let instructions = program::mark(plan, arguments, number, pages, map.as_fd());
        let program = bpf::load(ProgramKind::Probe, "marks freed swap slots", &instructions)?;
        Ok((Self { program, map, function: plan.hook.function() }, marks))
    }

    /// From now on, and until what is returned is dropped, freed slots are marked; who goes on when this process dies asks for
    /// it at that path ([`observed`]), which is no other's.
    pub fn observe(self, path: &Path) -> Result<Observer, FreedError> {
        Observer::start(self.program, self.map.as_fd(), self.function, path)
    }
}

/// What a process that is dead had marked, for a device of so many pages, and who goes on with marking.
pub fn observed(path: &Path, pages: u64) -> Result<(Observer, Marks), FreedError> {
    Observer::of(path, |map| Marks::of(map, pages))
}

impl Marks {
    /// In a map for so many pages.
    fn of(map: BorrowedFd<'_>, pages: u64) -> Result<Self, FreedError> {
        let words = Mapping::new(map, bits::words_for(pages) as usize);
        let words = words.map_err(|source| FreedError::Failed {
            what: "map the marks of freed slots",
            source,
        })?;
        Ok(Self { words, pages })
    }

    fn bits(&self) -> Bits<'_> {
        Bits(self.words.words())
    }
}

impl FreedPages for Marks {
    fn next(&self, pages: Range<u64>) -> Option<u64> {
        self.bits().next(pages.start..pages.end.min(self.pages))
    }

    fn unmark(&self, page: u64) {
        self.bits().unmark(page);
    }
}

/// A device's number as the kernel has it inside, `MKDEV`.
fn device_number((major, minor): (u32, u32)) -> Option<u32> {
    let fits = major < 1 << MAJOR_BITS && minor < 1 << MINOR_BITS;
    let number = major << MINOR_BITS | minor;
    (fits && number != 0).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_those_inside_the_kernel() {
        assert_eq!(device_number((259, 3)), Some(0x1030_0003));
        assert_eq!(device_number((4095, 0xf_ffff)), Some(u32::MAX));
        assert_eq!(device_number((4096, 0)), None);
        assert_eq!(device_number((8, 1 << 20)), None);
        assert_eq!(device_number((0, 0)), None);
    }
}
