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
use std::sync::atomic::Ordering;

use crate::durable::{DurableU32, DurableU64};
use crate::handle::{OBJECT_PAGES, PAGE_SIZE, PoolId};
use crate::region::Region;
use crate::store::Store;

/// Bytes of an object's entry.
pub(crate) const OBJECT_BYTES: usize = size_of::<Object>();

pub(crate) const LOST_WORDS: usize = OBJECT_PAGES as usize / 64;

const _: () = assert!(OBJECT_BYTES == 80);

/// The entry of one object. All zeros is an object without pages.
#[repr(C)]
pub(crate) struct Object {
    /// Number of the leaf's frame plus one; zero without a leaf.
    leaf: DurableU32,
    /// Pages that the object holds, and puts under way in it.
    used: DurableU32,
    /// Set bits in `lost`.
    lost_count: DurableU32,
    _reserved: DurableU32,
    lost: [DurableU64; LOST_WORDS],
}

impl Object {
    /// Nothing to get and nothing to flush. May be asked without the lock: an operation that has
    /// been acknowledged before is seen.
    pub(crate) fn is_idle(&self) -> bool {
        self.leaf.load(Ordering::Acquire) == 0 && self.lost_count.load(Ordering::Acquire) == 0
    }

    /// Whether there is nothing in it at all, whatever was counted.
    pub(crate) fn is_empty(&self) -> bool {
        let words = [&self.leaf, &self.used, &self.lost_count];
        words.iter().all(|word| word.load(Ordering::Relaxed) == 0)
            && self.lost_bits() == [0; LOST_WORDS]
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

    /// Counts anew, and from what there is: so many pages, and each of these lost (a bit a page).
    pub(crate) fn recount(&self, used: u32, lost: &[u64; LOST_WORDS]) {
        self.used.store(used, Ordering::Relaxed);
        for (word, bits) in self.lost.iter().zip(lost) {
            if word.load(Ordering::Relaxed) != *bits {
                word.store(*bits, Ordering::Relaxed);
            }
        }
        let count = lost.iter().map(|bits| bits.count_ones()).sum();
        self.lost_count.store(count, Ordering::Release);
    }

    /// Which pages are lost, a bit a page, whatever was counted.
    pub(crate) fn lost_bits(&self) -> [u64; LOST_WORDS] {
        std::array::from_fn(|at| self.lost[at].load(Ordering::Relaxed))
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

    fn lost_word(&self, index: u32) -> &DurableU64 {
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
    /// A directory for so many pages of a pool that there is not yet, all of it in memory.
    pub(crate) fn new(store: &Store, pool: PoolId, pages: u64) -> io::Result<Self> {
        let directory = Self::of_store(store, pool, pages)?;
        // What a process has left there that died while it made or removed such a pool.
        directory.release()?;
        directory.region.populate(0, directory.region.bytes())?;
        Ok(directory)
    }

    /// The directory of a pool that there is.
    pub(crate) fn of_store(store: &Store, pool: PoolId, pages: u64) -> io::Result<Self> {
        let region = store.directory(pool, Self::bytes_for(pages))?;
        Ok(Self { region, objects: Self::objects_for(pages) as u32 })
    }

    /// Gives its memory back. Who looks at it nonetheless sees objects without pages.
    pub(crate) fn release(&self) -> io::Result<()> {
        self.region.release(0, self.region.bytes())
    }

    /// Makes it be at hand: see [`Region::bring_in`].
    pub(crate) fn bring_in(&self) -> io::Result<()> {
        self.region.bring_in(0, self.region.bytes())
    }

    pub(crate) fn objects(&self) -> u32 {
        self.objects
    }

    const fn objects_for(pages: u64) -> u64 {
        pages.div_ceil(OBJECT_PAGES as u64)
    }

    /// Bytes that a directory for so many pages takes: whole pages of memory.
    pub(crate) const fn bytes_for(pages: u64) -> u64 {
        let bytes = Self::objects_for(pages) * OBJECT_BYTES as u64;
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
        let directory = Directory::new(&Store::new().unwrap(), PoolId(1), 1025).unwrap();
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
        Directory::new(&Store::new().unwrap(), PoolId(0), 512).unwrap().object(1);
    }
}
