//! Reading back what is on the backing file only.
//!
//! A get of such a page says where it is ([`Got::Backed`]). Whoever asked reads the block there, and comes
//! back with it: to get the page from it ([`Engine::get_backed`]), or to have it in memory again
//! ([`Engine::recall`]). Meanwhile the page may have been rewritten, flushed or moved: then the block is of no
//! use, which is found out before anything of it is believed, and the answer is that of a new get.

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
        let Place::Log { block, .. } = self.slot.place() else {
            unreachable!("it is made of slots that point at the log")
        };
        u64::from(block) * PAGE_SIZE as u64
    }
}

/// A zpage in an image of its block.
struct Zpage<'a> {
    header: Header,
    payload: &'a [u8],
}

impl<'a> Zpage<'a> {
    /// The zpage at a place; none if its header cannot be one.
    fn at(image: &'a Page, extent: Extent, raw: Option<Header>) -> Option<Self> {
        if let Some(header) = raw {
            return Some(Self { header, payload: image });
        }
        let bytes = &image[extent.offset * GRANULE..extent.end() * GRANULE];
        let (header, payload) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let header = Header::from_bytes(*header);
        Some(Self { header, payload: payload.get(..header.payload_bytes())? })
    }
}

impl Engine {
    /// Gets a page from the block that a get has named, read into `image`, which is of no use afterwards. It
    /// may name another one, because the page has been moved meanwhile.
    pub fn get_backed(
        &self,
        queue: &mut Queue,
        handle: Handle,
        backed: Backed,
        image: &mut Page,
        page: &mut Page,
    ) -> Result<Got, GetError> {
        let found = self.shard(handle).find_backed(handle, backed);
        let Some(found) = found else { return self.get(queue, handle, page) };
        let log = self.log().expect("a page is in the log, so there is one");
        let is_intact = log.unseal(&found.key, image)
            && Zpage::at(image, found.extent, found.raw)
                .is_some_and(|zpage| queue.unpack(handle, zpage.header, zpage.payload, page));
        self.shard(handle).count_backed(handle, is_intact);
        if is_intact { Ok(Got::Hit) } else { Err(GetError::Corrupt) }
    }

    /// Takes a page into memory from the block that a get has named, read into `image`, which is of no
    /// use afterwards. It is the same page all the while, and an operation on it that comes between
    /// wins.
    pub fn recall(
        &self,
        handle: Handle,
        backed: Backed,
        image: &mut Page,
    ) -> Result<(), UpdateError> {
        let found = self.shard(handle).find_backed(handle, backed);
        let Some(found) = found else { return Ok(()) };
        let log = self.log().expect("a page is in the log, so there is one");
        let zpage = Some(()).filter(|()| log.unseal(&found.key, image));
        let zpage = zpage.and_then(|()| Zpage::at(image, found.extent, found.raw));
        let zpage = zpage.filter(|zpage| zpage.header.verify(handle, zpage.payload));
        let Some(zpage) = zpage else {
            self.shard(handle).count_backed(handle, false);
            return Err(GetError::Corrupt.into());
        };
        let start = found.extent.offset * GRANULE;
        let packed = match found.raw {
            Some(header) => Packed::Raw(header, image),
            None => Packed::Zpage(&image[start..start + HEADER_BYTES + zpage.payload.len()]),
        };
        let mut hand = Hand::default();
        let mut is_done = self.shard(handle).recall(handle, backed, packed, &mut hand);
        if !is_done && let Some(frame) = self.frame_of_others(handle) {
            hand.add(frame);
            is_done = self.shard(handle).recall(handle, backed, packed, &mut hand);
        }
        hand.put_back(&self.arena);
        match is_done {
            true => Ok(()),
            false if self.is_full() => Err(PutError::Full.into()),
            false => Err(PutError::Starved.into()),
        }
    }
}
