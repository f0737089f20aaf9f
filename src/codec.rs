//! Codecs: how a page becomes a zpage's payload and back.
//!
//! A codec owns its tables and allocates nothing after it is made. There is one per queue, so none
//! is shared.

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into};

use crate::handle::{PAGE_SIZE, Page};

/// Bytes that a codec's output buffer must have.
pub(crate) const OUTPUT_BYTES: usize = lz4_flex::block::get_maximum_output_size(PAGE_SIZE);

/// Compresses pages one by one.
pub(crate) trait Codec {
    /// Compresses `page` to the front of `out` and returns the bytes it takes; `None` if it does
    /// not get smaller.
    fn compress(&mut self, page: &Page, out: &mut [u8; OUTPUT_BYTES]) -> Option<usize>;

    /// Restores a page from what `compress` wrote. False if that cannot be done or gives anything
    /// but a whole page; `page` then holds nothing of use. Any input is safe.
    fn decompress(&self, payload: &[u8], page: &mut Page) -> bool;
}

/// lz4 blocks, by lz4_flex, with a hash table that is kept.
pub(crate) struct Lz4 {
    table: CompressTable,
}

impl Lz4 {
    pub(crate) fn new() -> Self {
        Self { table: CompressTable::small() }
    }
}

impl Codec for Lz4 {
    fn compress(&mut self, page: &Page, out: &mut [u8; OUTPUT_BYTES]) -> Option<usize> {
        let bytes = compress_into_with_table(page, out, &mut self.table).ok()?;
        (bytes < PAGE_SIZE).then_some(bytes)
    }

    fn decompress(&self, payload: &[u8], page: &mut Page) -> bool {
        decompress_into(payload, page).is_ok_and(|bytes| bytes == PAGE_SIZE)
    }
}

/// The 32-bit little-endian word that fills the page, if one does.
pub(crate) fn same_filled(page: &Page) -> Option<u32> {
    // Most pages that are not filled differ between the ends already.
    if page[..4] != page[PAGE_SIZE - 4..] || page[4..] != page[..PAGE_SIZE - 4] {
        return None;
    }
    Some(u32::from_le_bytes([page[0], page[1], page[2], page[3]]))
}

/// Fills a page with one word; the inverse of [`same_filled`].
pub(crate) fn fill(page: &mut Page, word: u32) {
    for bytes in page.chunks_exact_mut(4) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_filled_means_every_word() {
        let mut page = [0; PAGE_SIZE];
        assert_eq!(same_filled(&page), Some(0));
        fill(&mut page, 0x0102_0304);
        assert_eq!(same_filled(&page), Some(0x0102_0304));
        for at in [0, 1, 2047, 4092, 4095] {
            let mut other = page;
            other[at] ^= 1;
            assert_eq!(same_filled(&other), None, "at {at}");
        }
    }

    #[test]
    fn lz4_restores_what_it_compressed_and_refuses_the_rest() {
        let mut codec = Lz4::new();
        let mut out = [0; OUTPUT_BYTES];
        let mut page = [0; PAGE_SIZE];
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = (at / 7) as u8;
        }
        let bytes = codec.compress(&page, &mut out).unwrap();
        let mut back = [0; PAGE_SIZE];
        assert!(codec.decompress(&out[..bytes], &mut back));
        assert_eq!(page, back);
        assert!(!codec.decompress(&out[..bytes - 1], &mut back));
        assert!(!codec.decompress(b"", &mut back));
        assert!(!codec.decompress(&[0xff; 3000], &mut back));
    }

    #[test]
    fn what_does_not_compress_says_so() {
        let mut page = [0; PAGE_SIZE];
        let mut state = 1u64;
        for byte in &mut page {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *byte = (state >> 56) as u8;
        }
        assert_eq!(Lz4::new().compress(&page, &mut [0; OUTPUT_BYTES]), None);
    }
}
