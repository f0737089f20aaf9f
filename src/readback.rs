//! Reading back what is on the backing file only.
//!
//! A get of such a page says where it is ([`Got::Backed`]). Whoever asked reads the block there, and comes
//! back with it: to get the page from it ([`Engine::get_backed`]), or to have it in memory again
//! ([`Engine::recall`]). Meanwhile the page may have been rewritten, flushed or moved: then the block is of no
//! use, which is found out before anything of it is believed, and the answer is that of a new get.

use crate::backing::{BlockKey, Found, Log, SEGMENT_BLOCKS, is_low};
use crate::engine::{Engine, Got};
use crate::error::{GetError, PutError, UpdateError};
use crate::frame::{Extent, GRANULE};
use crate::handle::{Handle, PAGE_SIZE, Page};
use crate::queue::Queue;
use crate::shard::{Hand, Packed};
use crate::slot::{Place, Slot};
use crate::zpage::{HEADER_BYTES, Header};

/// Where a page is on the backing file: a whole block is read there, for the page to be got from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Backed {
    pub(crate) slot: Slot,
    /// Which use of the block's segment this is. By cleaning, a page can come back to a block that it was in
    /// before, with the same slot word.
    pub(crate) sequence: u64,
}

impl Backed {
    /// Where the block begins in the backing file, in bytes. It has [`PAGE_SIZE`] of them.
    pub fn offset(&self) -> u64 {
        u64::from(self.block()) * PAGE_SIZE as u64
    }

    /// Which use of the block's segment this is: as long as it is the same, a block that has been written is.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    fn block(&self) -> u32 {
        let Place::Log { block, .. } = self.slot.place() else {
            unreachable!("it is made of slots that point at the log")
        };
        block
    }
}

/// A block that was read. It is opened when a page of it is first got, and is as it was before it was sealed then, for
/// its other pages.
pub struct Image<'a> {
    bytes: &'a mut Page,
    opened: &'a mut Opened,
}

/// Whether the image of a block has been opened, and for which one. Anew for each time that an image is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opened(State);

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum State {
    /// Nobody has tried to.
    #[default]
    Sealed,
    Clear(BlockKey),
    /// It is not what was written.
    Bad,
}

impl Opened {
    /// Whether it could not be: what was read is not what was written. Another read may bring that.
    pub fn is_bad(&self) -> bool {
        self.0 == State::Bad
    }
}

impl<'a> Image<'a> {
    /// A block in `bytes`, and what is kept of it from page to page.
    pub fn new(bytes: &'a mut Page, opened: &'a mut Opened) -> Self {
        Self { bytes, opened }
    }

    /// What is in a block, or was before it was sealed; none if it is not what was written.
    fn open(self, log: &Log, key: &BlockKey) -> Option<&'a Page> {
        if self.opened.0 != State::Clear(*key) {
            let is_clear = log.unseal(key, self.bytes);
            self.opened.0 = if is_clear { State::Clear(*key) } else { State::Bad };
        }
        (!self.opened.is_bad()).then_some(self.bytes)
    }
}

/// A zpage in an image of its block.
struct Zpage<'a> {
    header: Header,
    payload: &'a [u8],
    stored: Stored<'a>,
}

/// What of an image is stored of a zpage.
enum Stored<'a> {
    /// A raw page is the whole image, and its header apart.
    Raw(&'a Page),
    /// Header and payload.
    Whole(&'a [u8]),
}

impl<'a> Zpage<'a> {
    /// The zpage at a place; none if its header cannot be one.
    fn at(image: &'a Page, extent: Extent, raw: Option<Header>) -> Option<Self> {
        if let Some(header) = raw {
            return Some(Self { header, payload: image, stored: Stored::Raw(image) });
        }
        let bytes = &image[extent.offset * GRANULE..extent.end() * GRANULE];
        let header = Header::from_bytes(*bytes.first_chunk::<HEADER_BYTES>()?);
        let stored = bytes.get(..HEADER_BYTES + header.payload_bytes())?;
        Some(Self { header, payload: &stored[HEADER_BYTES..], stored: Stored::Whole(stored) })
    }

    fn packed(&self) -> Packed<'a> {
        match self.stored {
            Stored::Raw(page) => Packed::Raw(self.header, page),
            Stored::Whole(bytes) => Packed::Zpage(bytes),
        }
    }
}

impl Engine {
    /// The block that a get has named cannot be read. If this is true the page is there all the same, which is
    /// counted; if not, it has been rewritten, flushed or moved meanwhile, and a new get says more.
    pub fn unreadable(&self, handle: Handle, backed: Backed) -> bool {
        let mut shard = self.shard(handle);
        let is_there = shard.find_backed(handle, backed).is_some();
        if is_there {
            shard.count(handle, |counters| counters.bd_errors += 1);
        }
        is_there
    }

    /// Gets a page from the block that a get has named, read into `image`. It
    /// may name another one, because the page has been moved meanwhile. A page that is got a second time is
    /// used, and comes back to memory, if there is room.
    pub fn get_backed(
        &self,
        queue: &mut Queue,
        handle: Handle,
        backed: Backed,
        image: Image<'_>,
        page: &mut Page,
    ) -> Result<Got, GetError> {
        let found = self.shard(handle).find_backed(handle, backed);
        let Some(found) = found else { return self.get(queue, handle, page) };
        let zpage = self.open(&found, image);
        let zpage = zpage.filter(|zpage| queue.unpack(handle, zpage.header, zpage.payload, page));
        let is_used = self.shard(handle).count_backed(handle, backed, zpage.is_some());
        let zpage = zpage.ok_or(GetError::Corrupt)?;
        if is_used && !is_low(self) {
            // Where it fails the page is where it was.
            self.take_in(handle, backed, zpage.packed());
        }
        Ok(Got::Hit)
    }

    /// How many blocks behind a page's are of the same use of its segment, and have been written: to read them
    /// with it is of use to who reads on. 0 if the page is not there any more.
    pub fn blocks_behind(&self, backed: Backed) -> u32 {
        let Some(segments) = self.log().map(Log::segments) else { return 0 };
        let (segment, at) = (backed.block() / SEGMENT_BLOCKS, backed.block() % SEGMENT_BLOCKS);
        let is_written =
            segments.is_sealed(segment) && segments.sequence(segment) == backed.sequence;
        if is_written { SEGMENT_BLOCKS - 1 - at } else { 0 }
    }

    /// Takes a page into memory from the block that a get has named, read into `image`. It is the same page all the while, and an operation on it that comes between
    /// wins.
    pub fn recall(
        &self,
        handle: Handle,
        backed: Backed,
        image: Image<'_>,
    ) -> Result<(), UpdateError> {
        let found = self.shard(handle).find_backed(handle, backed);
        let Some(found) = found else { return Ok(()) };
        let zpage = self.open(&found, image);
        let zpage = zpage.filter(|zpage| zpage.header.verify(handle, zpage.payload));
        let Some(zpage) = zpage else {
            self.shard(handle).count_backed(handle, backed, false);
            return Err(GetError::Corrupt.into());
        };
        match self.take_in(handle, backed, zpage.packed()) {
            true => Ok(()),
            false if self.is_full() => Err(PutError::Full.into()),
            false => Err(PutError::Starved.into()),
        }
    }

    /// The zpage that was looked for in an image; none if it is not what was written.
    fn open<'a>(&self, found: &Found, image: Image<'a>) -> Option<Zpage<'a>> {
        let log = self.log().expect("a page is in the log, so there is one");
        Zpage::at(image.open(log, &found.key)?, found.extent, found.raw)
    }

    /// Takes a page that was read into memory. True if it is there, or no longer is what was read.
    fn take_in(&self, handle: Handle, backed: Backed, packed: Packed<'_>) -> bool {
        let mut hand = Hand::default();
        let mut is_done = self.shard(handle).recall(handle, backed, packed, &mut hand);
        if !is_done && let Some(frame) = self.frame_of_others(handle) {
            hand.add(frame);
            is_done = self.shard(handle).recall(handle, backed, packed, &mut hand);
        }
        hand.put_back(&self.arena);
        is_done
    }
}
