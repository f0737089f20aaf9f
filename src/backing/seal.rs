//! The seal on a block: what the backing file gives back is what was written there last, or an error.
//!
//! With a key it is AES-256-GCM: nobody who has the file can read it, or change it without notice. The
//! nonce is where and when the block was written: its place in its segment, and the number of that use of
//! the segment. No two blocks under a key share it, and an image that comes back from another place
//! or from an earlier use does not fit. So what a slot points at, in a generation, can be answered
//! by nothing else than what was put there for it.
//!
//! Without a key it is a checksum, which finds what the disk has lost or mixed up.
//!
//! Tags are in memory ([`super::block`]), not in the file.

use aes_gcm::aead::{AeadInOut, Nonce};
use aes_gcm::{Aes256Gcm, KeyInit};
use rapidhash::v3::rapidhash_v3;

use super::block::TAG_BYTES;
use crate::handle::Page;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;

/// Which use of which block.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Place {
    /// Number of the use of its segment.
    pub(crate) sequence: u64,
    /// Which block of the segment.
    pub(crate) block: u32,
}

impl Place {
    fn nonce(self) -> Nonce<Aes256Gcm> {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&self.sequence.to_le_bytes());
        nonce[8..].copy_from_slice(&self.block.to_le_bytes());
        nonce.into()
    }
}

/// See the module's description.
pub(crate) enum Seal {
    /// It encrypts.
    Key(Box<Aes256Gcm>),
    /// It is a checksum.
    Checksum,
}

impl Seal {
    /// Encrypts by a key that nobody else has and no other seal ever had; none for a checksum only.
    pub(crate) fn new(key: Option<&[u8; KEY_BYTES]>) -> Self {
        match key {
            Some(key) => Self::Key(Box::new(Aes256Gcm::new(key.into()))),
            None => Self::Checksum,
        }
    }

    /// Seals an image for its place, at which nothing was sealed before.
    pub(crate) fn close(&self, place: Place, image: &mut Page) -> [u8; TAG_BYTES] {
        match self {
            Self::Key(cipher) => {
                let tag =
                    cipher.encrypt_inout_detached(&place.nonce(), &[], image.as_mut_slice().into());
                tag.expect("a page is not too long for the cipher").into()
            }
            Self::Checksum => checksum(image),
        }
    }

    /// Opens what was read at a place. False if it is not what was sealed there.
    pub(crate) fn open(&self, place: Place, tag: [u8; TAG_BYTES], image: &mut Page) -> bool {
        match self {
            Self::Key(cipher) => {
                let (nonce, tag) = (place.nonce(), tag.into());
                cipher
                    .decrypt_inout_detached(&nonce, &[], image.as_mut_slice().into(), &tag)
                    .is_ok()
            }
            Self::Checksum => checksum(image) == tag,
        }
    }
}

fn checksum(image: &Page) -> [u8; TAG_BYTES] {
    let mut tag = [0; TAG_BYTES];
    tag[..8].copy_from_slice(&rapidhash_v3(image).to_le_bytes());
    tag
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::PAGE_SIZE;

    const PLACE: Place = Place { sequence: 7, block: 9 };

    fn seals() -> [Seal; 2] {
        [Seal::new(Some(&[3; KEY_BYTES])), Seal::new(None)]
    }

    fn image() -> Page {
        std::array::from_fn(|at| (at * at / 5) as u8)
    }

    #[test]
    #[cfg_attr(miri, ignore = "it takes minutes there")]
    fn what_was_sealed_comes_back() {
        for seal in seals() {
            let mut block = image();
            let tag = seal.close(PLACE, &mut block);
            assert_eq!(block != image(), matches!(seal, Seal::Key(_)));
            assert!(seal.open(PLACE, tag, &mut block));
            assert_eq!(block, image());
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "it takes minutes there")]
    fn a_flipped_bit_is_found() {
        for seal in seals() {
            for at in [0, 1, 2000, PAGE_SIZE - 1] {
                let mut block = image();
                let tag = seal.close(PLACE, &mut block);
                block[at] ^= 0x10;
                assert!(!seal.open(PLACE, tag, &mut block));
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "it takes minutes there")]
    fn what_was_sealed_for_another_place_or_another_time_does_not_fit() {
        let seal = Seal::new(Some(&[3; KEY_BYTES]));
        for other in [Place { sequence: 8, ..PLACE }, Place { block: 10, ..PLACE }] {
            let mut block = image();
            let tag = seal.close(PLACE, &mut block);
            assert!(!seal.open(other, tag, &mut block));
        }
        // The checksum tells what was there before from what is there now.
        let seal = Seal::new(None);
        let (mut old, mut new) = (image(), [1; PAGE_SIZE]);
        seal.close(PLACE, &mut old);
        let tag = seal.close(PLACE, &mut new);
        assert!(!seal.open(PLACE, tag, &mut old));
    }
}
