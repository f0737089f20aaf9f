//! The log's blocks: what has to be known of a frame's image to read it back.
//!
//! ```text
//!  0                 16        20                      32
//! +-----------------+---------+------------------------+
//! |       tag       | state   |          body          |
//! +-----------------+---------+------------------------+
//! ```
//!
//! `tag` is the seal's; `state` and `body` are the layout of the frame that the block is an image of.
//!
//! The entries of a segment's blocks are in frames of the arena, which the segment has while it is in use:
//! they cost memory as the log fills, within the pool limit. An entry is written before the block
//! is, while no slot points there. After that nothing but the state's bits of
//! which zpages are alive and were read changes, until the segment is used again.

use std::sync::atomic::Ordering::Relaxed;

use crate::durable::DurableU32;
use crate::frame::Layout;
use crate::handle::PAGE_SIZE;

/// Bytes of a seal's tag.
pub(crate) const TAG_BYTES: usize = 16;

/// Entries in a frame.
pub(crate) const BLOCKS_PER_FRAME: usize = PAGE_SIZE / size_of::<BlockMeta>();

const _: () = assert!(size_of::<BlockMeta>() == 32);

/// See the module's description.
#[repr(C)]
pub(crate) struct BlockMeta {
    tag: [DurableU32; 4],
    pub(crate) layout: Layout,
}

impl BlockMeta {
    pub(crate) fn tag(&self) -> [u8; TAG_BYTES] {
        let mut tag = [0; TAG_BYTES];
        for (word, bytes) in self.tag.iter().zip(tag.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&word.load(Relaxed).to_le_bytes());
        }
        tag
    }

    pub(crate) fn set_tag(&self, tag: [u8; TAG_BYTES]) {
        for (word, bytes) in self.tag.iter().zip(tag.chunks_exact(4)) {
            word.store(u32::from_le_bytes(bytes.try_into().expect("chunks of 4")), Relaxed);
        }
    }
}
