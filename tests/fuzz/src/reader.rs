//! Numbers and runs of bytes, one after the other, of what one side of a conversation said.

use zerocopy::FromBytes;
use zerocopy::big_endian::{U16, U32, U64};

/// What has not been looked at yet.
#[derive(Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next so many bytes; none if there are fewer, and then none are taken.
    pub fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// The next 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| U16::read_from_bytes(bytes).expect("it has two bytes").get())
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.take(4).map(|bytes| U32::read_from_bytes(bytes).expect("it has four bytes").get())
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.take(8).map(|bytes| U64::read_from_bytes(bytes).expect("it has eight bytes").get())
    }

    /// A string that comes after its length.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.take(length as usize)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
