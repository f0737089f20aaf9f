//! The zpage: a page as it is stored, behind its header.
//!
//! ```text
//!  0        4          8      10           12
//! +--------+----------+------+------------+------------------
//! |  page  | checksum | pool |codec, bytes|  payload
//! +--------+----------+------+------------+------------------
//! ```
//!
//! All little endian. `page` and `pool` name the owner, so that whoever finds a zpage can find the
//! slot that points at it: eviction, compaction, recovery. `bytes` is the payload's length, `codec`
//! the two bits above its 13. `checksum` is the low half of the payload's rapidhash (version 3); it is
//! verified each time the page is got.

use rapidhash::v3::rapidhash_v3;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::frame::BODY_BYTES;
use crate::handle::{Handle, PAGE_SIZE, PoolId};

/// Bytes of the header.
pub(crate) const HEADER_BYTES: usize = 12;

const LENGTH_BITS: u32 = 13;
const CODEC_RAW: u16 = 0;
const CODEC_LZ4: u16 = 1;
const CODEC_FILL: u16 = 2;

/// Bytes of a zpage of one word, header included.
pub(crate) const FILLED_BYTES: usize = HEADER_BYTES + size_of::<u32>();

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);
const _: () = assert!(HEADER_BYTES == BODY_BYTES);
const _: () = assert!(PAGE_SIZE < 1 << LENGTH_BITS);

/// How a payload came about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Encoding {
    /// The 32-bit little-endian word that fills the page.
    Fill,
    /// One lz4 block.
    Lz4,
    /// The page itself.
    Raw,
}

/// See the module's description.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    page: U32,
    checksum: U32,
    pool: U16,
    length: U16,
}

impl Header {
    pub(crate) fn new(handle: Handle, encoding: Encoding, payload: &[u8]) -> Self {
        assert!(!payload.is_empty() && payload.len() <= PAGE_SIZE);
        let codec = match encoding {
            Encoding::Fill => CODEC_FILL,
            Encoding::Lz4 => CODEC_LZ4,
            Encoding::Raw => CODEC_RAW,
        };
        Self {
            page: U32::new(handle.page() as u32),
            checksum: U32::new(checksum(payload)),
            pool: U16::new(handle.pool.0),
            length: U16::new(payload.len() as u16 | codec << LENGTH_BITS),
        }
    }

    /// The whole zpage of a page that one word fills.
    pub(crate) fn filled(handle: Handle, word: u32) -> [u8; FILLED_BYTES] {
        let payload = word.to_le_bytes();
        let mut zpage = [0; FILLED_BYTES];
        zpage[..HEADER_BYTES]
            .copy_from_slice(&Self::new(handle, Encoding::Fill, &payload).to_bytes());
        zpage[HEADER_BYTES..].copy_from_slice(&payload);
        zpage
    }

    pub(crate) fn from_bytes(bytes: [u8; HEADER_BYTES]) -> Self {
        zerocopy::transmute!(bytes)
    }

    pub(crate) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        zerocopy::transmute!(self)
    }

    /// Whose zpage this is.
    pub(crate) fn owner(&self) -> Handle {
        Handle::from_page(PoolId(self.pool.get()), u64::from(self.page.get()))
    }

    /// Bytes of the payload. Not trustworthy until [`Header::verify`] has been asked.
    pub(crate) fn payload_bytes(&self) -> usize {
        usize::from(self.length.get() & ((1 << LENGTH_BITS) - 1))
    }

    pub(crate) fn encoding(&self) -> Option<Encoding> {
        match self.length.get() >> LENGTH_BITS {
            CODEC_FILL => Some(Encoding::Fill),
            CODEC_LZ4 => Some(Encoding::Lz4),
            CODEC_RAW => Some(Encoding::Raw),
            _ => None,
        }
    }

    /// Whether `payload` is what was put under `handle`.
    pub(crate) fn verify(&self, handle: Handle, payload: &[u8]) -> bool {
        self.owner() == handle
            && self.payload_bytes() == payload.len()
            && self.checksum.get() == checksum(payload)
    }
}

/// For payloads of this size this hash is about as fast as XXH3 with SSE2, and needs no vector registers:
/// where those are emulated, XXH3 takes many times as long.
fn checksum(payload: &[u8]) -> u32 {
    rapidhash_v3(payload) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_its_bytes_and_knows_its_payload() {
        let handle = Handle::from_page(PoolId(9), u64::from(u32::MAX));
        let header = Header::new(handle, Encoding::Lz4, b"payload");
        let header = Header::from_bytes(header.to_bytes());
        assert_eq!(header.owner(), handle);
        assert_eq!(header.encoding(), Some(Encoding::Lz4));
        assert!(header.verify(handle, b"payload"));
        assert!(!header.verify(handle, b"payloae"));
        assert!(!header.verify(handle, b"payloadd"));
        assert!(!header.verify(Handle::from_page(PoolId(8), handle.page()), b"payload"));
    }

    #[test]
    fn the_checksum_is_part_of_the_layout() {
        // As the crate had them; its own tests compare it with the C reference.
        assert_eq!(checksum(b"payload"), 3_406_634_484);
        assert_eq!(checksum(&[5; PAGE_SIZE]), 2_050_134_551);
    }

    #[test]
    fn a_whole_raw_page_has_a_length() {
        let handle = Handle::from_page(PoolId(0), 1);
        let header = Header::new(handle, Encoding::Raw, &[5; PAGE_SIZE]);
        assert_eq!(header.payload_bytes(), PAGE_SIZE);
        assert_eq!(header.encoding(), Some(Encoding::Raw));
    }
}
