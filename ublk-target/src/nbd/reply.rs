//! Replies, as they go into the outbox: what there is of them beside data.

use rustix::io::Errno;
use tmem::Holding;
use zerocopy::IntoBytes;

use super::buffer::Outbox;
use super::wire::{
    CHUNK_MAGIC, ChunkHeader, Error, Extent, SIMPLE_REPLY_MAGIC, SimpleReply, chunk, extent,
};

/// Extents that one reply names.
pub(super) const EXTENTS_MAX: usize = 256;

/// Room for the longest reply that has no data from the device.
pub(super) const REPLY_BYTES_MAX: usize =
    size_of::<ChunkHeader>() + size_of::<u32>() + EXTENTS_MAX * size_of::<Extent>();

/// What precedes a chunk's data.
pub(super) const DATA_HEADER_BYTES: usize = size_of::<ChunkHeader>() + size_of::<u64>();

pub(super) fn simple_reply(outbox: &mut Outbox, cookie: u64, error: Option<Error>) {
    outbox.push(&SimpleReply {
        magic: SIMPLE_REPLY_MAGIC.into(),
        error: error.map_or(0, |error| error as u32).into(),
        cookie: cookie.into(),
    });
}

pub(super) fn chunk_header(
    outbox: &mut Outbox,
    cookie: u64,
    kind: u16,
    is_last: bool,
    length: usize,
) {
    outbox.push(&ChunkHeader {
        magic: CHUNK_MAGIC.into(),
        flags: if is_last { chunk::DONE } else { 0 }.into(),
        kind: kind.into(),
        cookie: cookie.into(),
        length: (length as u32).into(),
    });
}

/// What precedes so many bytes of data from `offset` on.
pub(super) fn data_header(
    outbox: &mut Outbox,
    cookie: u64,
    offset: u64,
    bytes: u32,
    is_last: bool,
) {
    let length = size_of::<u64>() + bytes as usize;
    chunk_header(outbox, cookie, chunk::OFFSET_DATA, is_last, length);
    outbox.push(zerocopy::big_endian::U64::new(offset).as_bytes());
}

pub(super) fn flags_of(holding: Holding) -> u32 {
    match holding {
        Holding::Data => 0,
        Holding::Nothing => extent::HOLE | extent::ZERO,
        Holding::Zeros => extent::ZERO,
    }
}

pub(super) fn error_of(errno: Errno) -> Error {
    match errno {
        Errno::NOSPC => Error::NoSpace,
        Errno::INVAL => Error::Invalid,
        _ => Error::Io,
    }
}
