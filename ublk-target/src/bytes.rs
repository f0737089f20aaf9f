//! Access to a block device by bytes, for front ends whose clients do not keep to pages.
//!
//! Whole pages are put and got; a part of a page is changed by an update, which the engine orders
//! with everything else on that page. What is on the backing file is not there at once: the answer is
//! where, and whoever asked comes back with the block that he has read. As in [`crate::device`], nothing here
//! allocates, blocks or makes a system call.

use std::ops::Range;

use rustix::io::Errno;
use tmem::{
    Backed, GetError, Got, Handle, Holding, Image, PAGE_SIZE, Page, PutError, Queue, UpdateError,
};

use crate::device::BlockDevice;

const PAGE_BYTES: u64 = PAGE_SIZE as u64;

/// How storing into one page went.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stored {
    /// The page is on the backing file, and what is not stored of it would be missing: have it in memory
    /// first, with [`BlockDevice::recall_at`]. Nothing was changed.
    Backed(Backed),
    /// It is there.
    Done,
    /// It is not. A whole page is lost then: it does not read as what it was before. Of a part the
    /// page stays as it is.
    Failed(Errno),
    /// The engine has no frame at the moment, and nothing was changed: try again soon, or give up
    /// with [`BlockDevice::lose_at`].
    Starved,
}

/// The part of a page that the first of `left` bytes at `offset` are in: its page, where in it they
/// are, and whether they are all of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Part {
    /// The page's number.
    pub page: u64,
    /// The bytes in it.
    pub range: Range<usize>,
}

impl Part {
    /// See the type's description.
    pub fn first(offset: u64, left: u64) -> Self {
        let start = (offset % PAGE_BYTES) as usize;
        let end = (start as u64 + left).min(PAGE_BYTES) as usize;
        Self { page: offset / PAGE_BYTES, range: start..end }
    }

    /// The parts of `count` bytes from `offset` on, each with its place among these bytes.
    pub fn all(offset: u64, count: usize) -> impl Iterator<Item = (usize, Part)> {
        let mut place = 0;
        std::iter::from_fn(move || {
            let left = (count - place) as u64;
            let part = (left > 0).then(|| Part::first(offset + place as u64, left))?;
            place += part.bytes();
            Some((place - part.bytes(), part))
        })
    }

    /// How many bytes.
    pub fn bytes(&self) -> usize {
        self.range.len()
    }

    /// Whether it is the whole page.
    pub fn is_whole(&self) -> bool {
        self.range.len() == PAGE_SIZE
    }
}

impl BlockDevice {
    /// Reads a part of a page into `target`, which is as long as that. If it is on the backing file, where is
    /// the answer: [`BlockDevice::land_part`] goes on then. Unless it was read, `target` holds nothing of use.
    pub fn read_part(
        &self,
        queue: &mut Queue,
        part: &Part,
        target: &mut [u8],
    ) -> Result<Option<Backed>, Errno> {
        let handle = self.handle_of(part.page);
        get_part(part, target, |page| self.engine().get(queue, handle, page))
    }

    /// Goes on with [`BlockDevice::read_part`] when the block that it has named was read into `image`, or could not be read. The page may have been moved meanwhile, and the answer then be
    /// another block.
    pub fn land_part(
        &self,
        queue: &mut Queue,
        part: &Part,
        backed: Backed,
        image: Option<Image<'_>>,
        target: &mut [u8],
    ) -> Result<Option<Backed>, Errno> {
        let (engine, handle) = (self.engine(), self.handle_of(part.page));
        match image {
            Some(image) => {
                get_part(part, target, |page| engine.get_backed(queue, handle, backed, image, page))
            }
            None if engine.unreadable(handle, backed) => Err(Errno::IO),
            None => self.read_part(queue, part, target),
        }
    }

    /// Takes the page of a part into memory, from the block that storing has named ([`Stored::Backed`]): the
    /// block was read into `image`, or could not be read. When it is done, storing
    /// is to be tried again.
    pub fn recall_at(&self, part: &Part, backed: Backed, image: Option<Image<'_>>) -> Stored {
        let (engine, handle) = (self.engine(), self.handle_of(part.page));
        match image {
            Some(image) => stored(engine.recall(handle, backed, image)),
            None if engine.unreadable(handle, backed) => Stored::Failed(Errno::IO),
            None => Stored::Done,
        }
    }

    /// Writes a part of a page. `data` is as long as the part.
    pub fn write_part(&self, queue: &mut Queue, part: &Part, data: &[u8]) -> Stored {
        match data.as_array::<PAGE_SIZE>() {
            Some(page) => self.put_page(queue, part.page, page),
            None => self.edit(queue, part, |target| target.copy_from_slice(data)),
        }
    }

    /// Makes a part of a page zeros that are stored.
    pub fn zero_part(&self, queue: &mut Queue, part: &Part) -> Stored {
        if part.is_whole() {
            self.put_page(queue, part.page, &[0; PAGE_SIZE])
        } else {
            self.edit(queue, part, |target| target.fill(0))
        }
    }

    /// Whether a part of a page is known to read as zeros.
    pub fn is_zero_at(&self, part: &Part) -> bool {
        let run = self.engine().run(self.pool(), part.page, 1);
        matches!(run, Some((Holding::Nothing | Holding::Zeros, _)))
    }

    /// Gives up what was to be stored: a whole page is lost, of a part the page stays as it is.
    pub fn lose_at(&self, part: &Part) {
        if part.is_whole() {
            self.engine().lose(self.handle_of(part.page));
        }
    }

    /// Drops pages, which read as zeros then.
    pub fn discard_pages(&self, first: u64, count: u64) {
        self.engine().flush_range(self.pool(), first, count);
    }

    /// What is held of the page at `offset`, and of how many bytes from there on, `most` at most,
    /// it is the same.
    pub fn run_at(&self, offset: u64, most: u64) -> Option<(Holding, u64)> {
        let start = offset % PAGE_BYTES;
        let pages = (start + most).div_ceil(PAGE_BYTES);
        let (holding, pages) = self.engine().run(self.pool(), offset / PAGE_BYTES, pages)?;
        Some((holding, (pages * PAGE_BYTES - start).min(most)))
    }

    fn put_page(&self, queue: &mut Queue, number: u64, page: &Page) -> Stored {
        stored(self.engine().put(queue, self.handle_of(number), page).map_err(UpdateError::from))
    }

    fn edit(&self, queue: &mut Queue, part: &Part, mut edit: impl FnMut(&mut [u8])) -> Stored {
        let handle = self.handle_of(part.page);
        let range = part.range.clone();
        stored(self.engine().update(queue, handle, |page| edit(&mut page[range.clone()])))
    }

    fn handle_of(&self, page: u64) -> Handle {
        Handle::from_page(self.pool(), page)
    }
}

/// Gets a page by `get`, and a part of it into `target`.
fn get_part(
    part: &Part,
    target: &mut [u8],
    get: impl FnOnce(&mut Page) -> Result<Got, GetError>,
) -> Result<Option<Backed>, Errno> {
    if let Some(page) = target.as_mut_array::<PAGE_SIZE>() {
        return got(get(page), page);
    }
    let mut page = [0; PAGE_SIZE];
    let backed = got(get(&mut page), &mut page)?;
    target.copy_from_slice(&page[part.range.clone()]);
    Ok(backed)
}

/// What a get came to; a page that is not there reads as zeros.
fn got(result: Result<Got, GetError>, page: &mut Page) -> Result<Option<Backed>, Errno> {
    match result {
        Ok(Got::Backed(backed)) => return Ok(Some(backed)),
        Ok(Got::Hit) => {}
        Ok(Got::Miss) => page.fill(0),
        Err(_) => return Err(Errno::IO),
    }
    Ok(None)
}

fn stored(result: Result<(), UpdateError>) -> Stored {
    match result {
        Ok(()) => Stored::Done,
        Err(UpdateError::Backed(backed)) => Stored::Backed(backed),
        Err(UpdateError::Put(PutError::Starved)) => Stored::Starved,
        Err(UpdateError::Put(PutError::Full)) => Stored::Failed(Errno::NOSPC),
        Err(UpdateError::Get(GetError::Lost | GetError::Corrupt) | _) => Stored::Failed(Errno::IO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::tests::{device, noise};

    fn read(device: &BlockDevice, queue: &mut Queue, offset: u64, buf: &mut [u8]) {
        for (place, part) in Part::all(offset, buf.len()) {
            let target = &mut buf[place..place + part.bytes()];
            assert_eq!(device.read_part(queue, &part, target), Ok(None));
        }
    }

    #[test]
    fn parts_cover_a_run_of_bytes_page_by_page() {
        for (offset, length) in [(0, 0), (0, 4096), (0, 1), (4095, 2), (100, 20_000), (8191, 4098)]
        {
            let (mut at, mut parts) = (offset, 0);
            for (place, part) in Part::all(offset, length) {
                assert_eq!(place as u64, at - offset);
                assert_eq!(part.page * 4096 + part.range.start as u64, at);
                assert!(part.range.end <= 4096 && part.bytes() > 0);
                at += part.bytes() as u64;
                parts += 1;
            }
            let end = offset + length as u64;
            assert_eq!(at, end);
            assert_eq!(parts, end.div_ceil(4096) - offset / 4096);
        }
    }

    #[test]
    fn any_run_of_bytes_is_written_and_read_as_in_a_plain_array() {
        let (device, mut queue) = device(1 << 20);
        let mut plain = vec![0; 16 * PAGE_SIZE];
        let data = noise(4, 5);
        for step in 0..400_usize {
            let offset = step * 7919 % plain.len();
            let length = (step * 1543 % 9000).min(plain.len() - offset).min(data.len());
            for (place, part) in Part::all(offset as u64, length) {
                let target = &mut plain[offset + place..][..part.bytes()];
                let stored = if step % 5 == 4 {
                    target.fill(0);
                    device.zero_part(&mut queue, &part)
                } else {
                    let source = &data[place..place + part.bytes()];
                    target.copy_from_slice(source);
                    device.write_part(&mut queue, &part, source)
                };
                assert_eq!(stored, Stored::Done);
            }
            let mut read = vec![0xee; (length + 50).min(plain.len() - offset)];
            self::read(&device, &mut queue, offset as u64, &mut read);
            assert!(read == plain[offset..offset + read.len()], "step {step}");
        }
    }

    #[test]
    fn runs_are_cut_to_the_bytes_asked_for() {
        let (device, mut queue) = device(1 << 20);
        assert_eq!(device.run_at(100, 5000), Some((Holding::Nothing, 5000)));
        device.write_part(&mut queue, &Part::first(8192, 4096), &noise(1, 1));
        assert_eq!(device.run_at(100, 20_000), Some((Holding::Nothing, 8092)));
        assert_eq!(device.run_at(8200, 20_000), Some((Holding::Data, 4088)));
        assert_eq!(device.run_at(64 * 4096, 1), None);
    }

    #[test]
    fn a_lost_page_can_be_overwritten_and_not_patched() {
        let (device, mut queue) = device(1 << 20);
        device.lose_at(&Part::first(0, 4096));
        device.lose_at(&Part::first(4096, 100));
        let mut buf = [0; 10];
        assert_eq!(device.read_part(&mut queue, &Part::first(0, 10), &mut buf), Err(Errno::IO));
        assert_eq!(device.read_part(&mut queue, &Part::first(4096, 10), &mut buf), Ok(None));
        let part = Part::first(5, 10);
        assert_eq!(device.write_part(&mut queue, &part, &buf), Stored::Failed(Errno::IO));
        assert_eq!(device.zero_part(&mut queue, &Part::first(0, 4096)), Stored::Done);
        assert_eq!(device.write_part(&mut queue, &part, &buf), Stored::Done);
    }
}
