//! What pages of tests are filled with.

use tmem::{PAGE_SIZE, Page};

/// What a page is filled with.
#[derive(Clone, Copy, Debug)]
pub enum Contents {
    /// So many bytes that do not compress, then some that do.
    Mixed { seed: u32, noise: usize },
    /// Nothing that compresses.
    Random(u32),
    /// One word.
    Same(u32),
}

impl Contents {
    pub fn page(self) -> Page {
        let (seed, noise) = match self {
            Contents::Mixed { seed, noise } => (seed, noise),
            Contents::Random(seed) => (seed, PAGE_SIZE),
            Contents::Same(word) => {
                let mut page = [0; PAGE_SIZE];
                page.chunks_exact_mut(4).for_each(|w| w.copy_from_slice(&word.to_le_bytes()));
                return page;
            }
        };
        let mut state = u64::from(seed) | 1 << 40;
        let mut page = [seed as u8; PAGE_SIZE];
        for byte in &mut page[..noise] {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = (state >> 32) as u8;
        }
        // Two pages of one seed differ, and none is filled with one word by accident.
        page[PAGE_SIZE - 8..]
            .copy_from_slice(&(u64::from(seed) << 32 | noise as u64).to_le_bytes());
        page
    }
}
