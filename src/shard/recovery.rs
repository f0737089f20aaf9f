//! A shard and recovery: what the slots of its objects point at is found and counted.

use super::{Shard, Stock};
use crate::directory::{LOST_WORDS, Object};
use crate::frame::{GRANULE, Use};
use crate::handle::{Handle, OBJECT_PAGES, PAGE_SIZE, PoolKind};
use crate::pool::Pool;
use crate::recovery::Recovered;
use crate::slot::{Place, Slot};

impl Shard {
    /// Finds what the slots of an object of this shard point at. What makes no sense is a lost page.
    pub(crate) fn find_object(&mut self, pool: &Pool, number: u32, recovered: &mut Recovered) {
        let object = pool.directory.object(number);
        if object.is_empty() {
            return;
        }
        let first = Handle { pool: pool.id, object: number, index: 0 };
        let before = u64::from(number) * u64::from(OBJECT_PAGES);
        let pages = (pool.pages() - before).min(u64::from(OBJECT_PAGES)) as u32;
        let mut lost = object.lost_bits();
        let used = match object.leaf().map(|leaf| self.stock.claim_leaf(leaf)) {
            None => 0,
            Some(Some(leaf)) => self.stock.find_pages(pool, first, leaf, &mut lost, recovered),
            Some(None) => {
                // Any of them may have been there.
                (0..pages).for_each(|index| set(&mut lost, index, true));
                recovered.damaged += u64::from(pages);
                object.set_leaf(None);
                0
            }
        };
        // Nobody can have lost what is behind the pool's end.
        (pages..OBJECT_PAGES).for_each(|index| set(&mut lost, index, false));
        self.stock.end_object(pool, object, used);
        object.recount(used, &lost);
        let lost = lost.iter().map(|bits| u64::from(bits.count_ones())).sum::<u64>();
        self.stock.counters(first).lost_pages += lost;
        pool.count_active(true, object.is_idle());
        recovered.pages += u64::from(used);
    }

    /// Takes a frame in of which these zpages were found alive; it is the most recently used one then.
    pub(crate) fn adopt(&mut self, frame: u32, alive: u32) {
        let kind = match self.stock.arena.meta(frame).used_for() {
            Use::Ephemeral => PoolKind::Ephemeral,
            _ => PoolKind::Persistent,
        };
        let (zbud, arena) = self.stock.zbud(kind);
        zbud.adopt(arena, frame, alive);
    }
}

impl Stock {
    /// The frame of an object's leaf, if it is one, and only this object's.
    fn claim_leaf(&self, leaf: u32) -> Option<u32> {
        let is_leaf = self.arena.has(leaf) && self.arena.meta(leaf).known_use() == Some(Use::Leaf);
        (is_leaf && !self.arena.meta(leaf).claim()).then_some(leaf)
    }

    /// Finds an object's pages; returns how many there are, and changes `lost` where it was wrong.
    fn find_pages(
        &mut self,
        pool: &Pool,
        first: Handle,
        leaf: u32,
        lost: &mut [u64; LOST_WORDS],
        recovered: &mut Recovered,
    ) -> u32 {
        let mut used = 0;
        for index in 0..OBJECT_PAGES {
            let handle = Handle { index, ..first };
            let slot = self.slot(leaf, index);
            if slot.is_empty() {
                continue;
            }
            let slot = self.undo_move(leaf, index, slot);
            let found = slot.known_place().filter(|place| self.find_place(pool, handle, *place));
            if found.is_some() {
                used += 1;
                self.generation = self.generation.max(slot.generation());
            } else {
                recovered.damaged += 1;
                self.set_slot(leaf, index, slot, Slot::EMPTY);
            }
            // A put is over once the slot points at what was put; whether the page was lost before, is forgotten
            // next.
            set(lost, index, found.is_none());
        }
        used
    }

    /// A slot that points at what a cleaning has moved that was not over, points at where that was before again: it is
    /// there still. Returns the slot.
    fn undo_move(&mut self, leaf: u32, index: u32, slot: Slot) -> Slot {
        let Some(Place::Log { block, granule }) = slot.known_place() else { return slot };
        let origin = self.log.as_ref().and_then(|log| log.origin(block, granule));
        let Some((block, granule)) = origin else { return slot };
        let before = slot.moved_to(Place::Log { block, granule });
        self.set_slot(leaf, index, slot, before);
        before
    }

    /// Notes that a page is at a place, and counts it; false if it cannot be.
    fn find_place(&mut self, pool: &Pool, handle: Handle, place: Place) -> bool {
        let is_there = pool.contains(handle)
            && match place {
                Place::Nowhere => false,
                Place::Same(_) => {
                    self.counters(handle).same_pages += 1;
                    true
                }
                Place::Log { block, granule } => {
                    let found = self.log.as_ref().is_some_and(|log| log.find_alive(block, granule));
                    self.counters(handle).bd_count += u64::from(found);
                    found
                }
                Place::Frame { frame, granule } => self.find_zpage(pool, handle, frame, granule),
            };
        self.counters(handle).orig_data_size += if is_there { PAGE_SIZE as u64 } else { 0 };
        is_there
    }

    fn find_zpage(&mut self, pool: &Pool, handle: Handle, frame: u32, granule: u8) -> bool {
        let class = match pool.kind {
            PoolKind::Ephemeral => Use::Ephemeral,
            PoolKind::Persistent => Use::Persistent,
        };
        if !self.arena.has(frame) || self.arena.meta(frame).known_use() != Some(class) {
            return false;
        }
        let meta = self.arena.meta(frame);
        let (raw, buddies) = (meta.layout.is_raw(), meta.layout.known_buddies());
        let Some(buddies) = buddies else { return false };
        let Some(at) = buddies.position(granule) else { return false };
        if !meta.find(at, self.member.number, &buddies) {
            return false;
        }
        let extent = buddies.as_slice()[at];
        let counters = self.counters(handle);
        counters.zpages += 1;
        counters.compr_data_size += (extent.length * GRANULE) as u64;
        counters.huge_pages += u64::from(raw);
        true
    }

    /// Counts an object's leaf, or lets it go if it has no pages.
    fn end_object(&mut self, pool: &Pool, object: &Object, used: u32) {
        let Some(leaf) = object.leaf() else { return };
        if used > 0 {
            self.leaves[pool.kind as usize] += 1;
            self.counters[usize::from(pool.id.0)].obj_count += 1;
            return;
        }
        object.set_leaf(None);
        self.arena.meta(leaf).unclaim();
    }
}

fn set(lost: &mut [u64; LOST_WORDS], index: u32, is_lost: bool) {
    let (word, bit) = (&mut lost[index as usize / 64], 1 << (index % 64));
    *word = if is_lost { *word | bit } else { *word & !bit };
}
