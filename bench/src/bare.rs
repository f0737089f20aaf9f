//! Bare compression: what the engine is held against.
//!
//! lz4_flex as the engine calls it, with a table that is kept, and the C library with its state
//! kept likewise. Nothing here stores, checks or counts anything.

use std::ffi::{c_char, c_int, c_void};

use anyhow::{Result, bail};
use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};
use tmem::{PAGE_SIZE, Page};

/// Bytes that a compressed page may take.
pub const OUTPUT_BYTES: usize = get_maximum_output_size(PAGE_SIZE);

/// The largest payload that the engine stores compressed: above, it stores the page raw.
pub const PAYLOAD_BYTES_MAX: usize = PAGE_SIZE / 8 * 7 - HEADER_BYTES;

/// Bytes of the header that the engine puts before each payload.
pub const HEADER_BYTES: usize = 12;

#[allow(unsafe_code)]
unsafe extern "C" {
    fn LZ4_sizeofState() -> c_int;
    fn LZ4_compress_fast_extState(
        state: *mut c_void,
        source: *const c_char,
        target: *mut c_char,
        source_bytes: c_int,
        target_bytes: c_int,
        acceleration: c_int,
    ) -> c_int;
}

/// lz4_flex.
pub struct Flex {
    table: CompressTable,
    out: Box<[u8; OUTPUT_BYTES]>,
}

impl Flex {
    pub fn new() -> Self {
        Self { table: CompressTable::small(), out: Box::new([0; OUTPUT_BYTES]) }
    }

    pub fn compress(&mut self, page: &Page) -> &[u8] {
        let bytes = compress_into_with_table(page, &mut self.out[..], &mut self.table);
        &self.out[..bytes.expect("the buffer holds the worst case")]
    }

    /// Decompresses what `compress` made.
    pub fn decompress(payload: &[u8], page: &mut Page) {
        assert_eq!(decompress_into(payload, page).ok(), Some(PAGE_SIZE));
    }
}

/// The C library.
pub struct C {
    /// Aligned as the library wants it.
    state: Vec<u64>,
    out: Box<[u8; OUTPUT_BYTES]>,
}

impl C {
    pub fn new() -> Self {
        // SAFETY: the function has no arguments and only returns a constant.
        let bytes = unsafe { LZ4_sizeofState() } as usize;
        Self { state: vec![0; bytes.div_ceil(8)], out: Box::new([0; OUTPUT_BYTES]) }
    }

    pub fn compress(&mut self, page: &Page) -> &[u8] {
        // SAFETY: the state has the size that the library asked for and is 8-byte aligned; source
        // and target are valid for the sizes given.
        let bytes = unsafe {
            LZ4_compress_fast_extState(
                self.state.as_mut_ptr().cast(),
                page.as_ptr().cast(),
                self.out.as_mut_ptr().cast(),
                PAGE_SIZE as c_int,
                OUTPUT_BYTES as c_int,
                1,
            )
        };
        assert!(bytes > 0, "the buffer holds the worst case");
        &self.out[..bytes as usize]
    }

    /// Decompresses what `compress` made.
    pub fn decompress(payload: &[u8], page: &mut Page) {
        // SAFETY: source and target are valid for the sizes given, which the library keeps to for
        // any input.
        let bytes = unsafe {
            lz4_sys::LZ4_decompress_safe(
                payload.as_ptr().cast(),
                page.as_mut_ptr().cast(),
                payload.len() as c_int,
                PAGE_SIZE as c_int,
            )
        };
        assert_eq!(bytes as usize, PAGE_SIZE);
    }
}

/// The payloads of a page set, one after the other in memory, as a lean store would have them.
pub struct Payloads {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Payloads {
    /// Compresses the pages with lz4_flex, and checks that they come back.
    pub fn of(pages: &[Page]) -> Result<Self> {
        let mut flex = Flex::new();
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(pages.len()));
        let mut back = [0; PAGE_SIZE];
        for page in pages {
            let payload = flex.compress(page);
            Flex::decompress(payload, &mut back);
            if back != *page {
                bail!("a page did not survive lz4_flex");
            }
            bytes.extend_from_slice(payload);
            ends.push(bytes.len());
        }
        Ok(Self { bytes, ends })
    }

    /// The payload of page `at`.
    pub fn get(&self, at: usize) -> &[u8] {
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..self.ends[at]]
    }
}

/// Whether the engine would store a page as a compressed zpage.
pub fn is_compressible(page: &Page, payload: &[u8]) -> bool {
    payload.len() <= PAYLOAD_BYTES_MAX && !is_same_filled(page)
}

/// Whether one 32-bit word fills the page.
pub fn is_same_filled(page: &Page) -> bool {
    page[4..] == page[..PAGE_SIZE - 4]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages() -> [Page; 3] {
        let mut text = [0; PAGE_SIZE];
        for (at, byte) in text.iter_mut().enumerate() {
            *byte = (at / 9 % 100) as u8;
        }
        let mut state = 1u64;
        let noise = std::array::from_fn(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        });
        [text, noise, [5; PAGE_SIZE]]
    }

    #[test]
    fn both_libraries_read_what_the_other_wrote() {
        let (mut flex, mut c) = (Flex::new(), C::new());
        let mut back = [0; PAGE_SIZE];
        for page in pages() {
            C::decompress(flex.compress(&page), &mut back);
            assert_eq!(back, page);
            Flex::decompress(c.compress(&page), &mut back);
            assert_eq!(back, page);
        }
    }

    #[test]
    fn payloads_are_told_apart_and_judged() {
        let pages = pages();
        let payloads = Payloads::of(&pages).unwrap();
        let judged = [0, 1, 2].map(|at| is_compressible(&pages[at], payloads.get(at)));
        assert_eq!(judged, [true, false, false]);
        let mut back = [0; PAGE_SIZE];
        Flex::decompress(payloads.get(1), &mut back);
        assert_eq!(back, pages[1]);
    }
}
