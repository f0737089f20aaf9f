//! A pool's directory: its objects, and through them the slot words.
//!
//! An object is 512 consecutive pages. While it has a page, it has a leaf: a frame of the arena
//! with its 512 slot words. So slot words cost memory only where there are pages, and a device
//! much larger than the memory costs [`OBJECT_BYTES`] for every 2 MiB. That entry is always there,
//! because a page's failed put must be remembered even when no frame is left for a leaf: one bit a
//! page says that its contents are lost.
//!
//! An object belongs to one shard; its entry and its leaf are read and changed under that shard's
//! lock, except [`Object::is_idle`], with which a discard of a whole device skips objects that have
//! nothing to discard.

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::handle::{OBJECT_PAGES, PAGE_SIZE};
use crate::region::Region;

/// Bytes of an object's entry.
pub(crate) const OBJECT_BYTES: usize = size_of::<Object>();

const LOST_WORDS: usize = OBJECT_PAGES as usize / 64;

const _: () = assert!(OBJECT_BYTES == 80);

/// The entry of one object. All zeros is an object without pages.
#[repr(C)]
pub(crate) struct Object {
    /// Number of the leaf's frame plus one; zero without a leaf.
    leaf: AtomicU32,
    /// Pages that the object holds, and puts under way in it.
    used: AtomicU32,
    /// Set bits in `lost`.
    lost_count: AtomicU32,
    _reserved: AtomicU32,
    lost: [AtomicU64; LOST_WORDS],
}

impl Object {
    /// Nothing to get and nothing to flush. May be asked without the lock: an operation that has
    /// been acknowledged before is seen.
    pub(crate) fn is_idle(&self) -> bool {
        self.leaf.load(Ordering::Acquire) == 0 && self.lost_count.load(Ordering::Acquire) == 0
    }

    pub(crate) fn leaf(&self) -> Option<u32> {
        self.leaf.load(Ordering::Acquire).checked_sub(1)
    }

    pub(crate) fn set_leaf(&self, frame: Option<u32>) {
        self.leaf.store(frame.map_or(0, |frame| frame + 1), Ordering::Release);
    }

    /// Counts a page, or a put under way; returns how many there were.
    pub(crate) fn use_one(&self) -> u32 {
        let used = self.used.load(Ordering::Relaxed);
        assert!(used <= OBJECT_PAGES, "an object of {OBJECT_PAGES} pages holds {used}");
        self.used.store(used + 1, Ordering::Relaxed);
        used
    }

    /// Takes one back; returns how many are left.
    pub(crate) fn disuse_one(&self) -> u32 {
        let used = self.used.load(Ordering::Relaxed);
        assert!(used > 0, "an object without pages lost one");
        self.used.store(used - 1, Ordering::Relaxed);
        used - 1
    }

    pub(crate) fn is_lost(&self, index: u32) -> bool {
        self.lost_word(index).load(Ordering::Relaxed) & bit(index) != 0
    }

    /// Marks a page as lost or not; returns whether it was.
    pub(crate) fn set_lost(&self, index: u32, lost: bool) -> bool {
        let word = self.lost_word(index);
        let old = word.load(Ordering::Relaxed);
        let was = old & bit(index) != 0;
        if was != lost {
            word.store(old ^ bit(index), Ordering::Relaxed);
            let count = self.lost_count.load(Ordering::Relaxed);
            let count = if lost { count + 1 } else { count - 1 };
            self.lost_count.store(count, Ordering::Release);
        }
        was
    }

    pub(crate) fn has_lost(&self) -> bool {
        self.lost_count.load(Ordering::Relaxed) > 0
    }

    fn lost_word(&self, index: u32) -> &AtomicU64 {
        &self.lost[index as usize / 64]
    }
}

fn bit(index: u32) -> u64 {
    1 << (index % 64)
}

/// See the module's description.
pub(crate) struct Directory {
    region: Region,
    objects: u32,
}

impl Directory {
    /// A directory for so many pages, all of it in memory.
    pub(crate) fn new(pages: u64) -> io::Result<Self> {
        let objects = pages.div_ceil(u64::from(OBJECT_PAGES)) as u32;
        let region = Region::new("tmem-objects", Self::bytes_for(pages) as usize)?;
        region.populate(0, region.bytes())?;
        Ok(Self { region, objects })
    }

    /// Bytes that a directory for so many pages takes: whole pages of memory.
    pub(crate) fn bytes_for(pages: u64) -> u64 {
        let bytes = pages.div_ceil(u64::from(OBJECT_PAGES)) * OBJECT_BYTES as u64;
        bytes.next_multiple_of(PAGE_SIZE as u64)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.region.bytes() as u64
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.region.is_locked()
    }

    pub(crate) fn object(&self, number: u32) -> &Object {
        assert!(number < self.objects, "object {number} is not in the pool");
        // SAFETY: the region has an entry for each of `objects` objects, page aligned at its
        // start; an entry consists of atomics, for which every bit pattern is valid.
        unsafe { self.region.start().cast::<Object>().add(number as usize).as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_start_idle_and_remember() {
        let directory = Directory::new(1025).unwrap();
        assert_eq!(directory.objects, 3);
        let object = directory.object(2);
        assert!(object.is_idle() && object.leaf().is_none());
        object.set_leaf(Some(0));
        assert!(!object.is_idle());
        assert_eq!(object.leaf(), Some(0));
        object.set_leaf(None);
        assert!(!object.set_lost(511, true));
        assert!(object.set_lost(511, true));
        assert!(object.is_lost(511) && !object.is_lost(510) && !object.is_idle());
        assert!(object.set_lost(511, false));
        assert!(object.is_idle() && !object.has_lost());
        assert_eq!((object.use_one(), object.use_one(), object.disuse_one()), (0, 1, 1));
    }

    #[test]
    #[should_panic(expected = "not in the pool")]
    fn an_object_beyond_the_pool_is_refused() {
        Directory::new(512).unwrap().object(1);
    }
}
