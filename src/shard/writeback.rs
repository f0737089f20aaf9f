//! A shard and the log: frames are held while they are written, and their zpages' slots then point at
//! what was written; pages that are there only are found there, and come back.
//!
//! Whoever writes knows for each zpage the slot word that pointed at it when it was copied
//! ([`Passage`]). The slot is changed only if it still is that word. So a page that was rewritten or flushed
//! meanwhile stays what it has become. No other zpage can be where the word says: its frame is held, or its
//! segment in hand.

use std::sync::Arc;

use super::{Hand, Packed, Shard, Stock};
use crate::backing::{Found, Log};
use crate::handle::{Handle, Page, PoolKind};
use crate::owners::Owners;
use crate::pool::{Pool, find};
use crate::readback::Backed;
use crate::slot::{Place, Slot};
use crate::zbud::Placed;

/// A zpage that is being written to a block of the log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Passage {
    /// Whose it is.
    pub(crate) owner: Handle,
    /// What pointed at it when it was copied.
    pub(crate) slot: Slot,
    /// Where it is in the block.
    pub(crate) granule: u8,
}

impl Shard {
    /// From now on pages can be in this log.
    pub(crate) fn set_log(&mut self, log: Arc<Log>) {
        assert!(self.stock.log.is_none(), "there is a log already");
        self.stock.log = Some(log);
    }

    /// From now on frames are of this tick, when they are used.
    pub(crate) fn set_tick(&mut self, tick: u8) {
        self.stock.persistent.set_tick(tick);
    }

    /// Holds the coldest persistent frame, copies it to `image` and its layout to the block's entry, and
    /// tells of its zpages. None if there is none that can be held and is so many ticks old.
    pub(crate) fn hold_cold(
        &mut self,
        age: u8,
        block: u32,
        image: &mut Page,
        tell: impl FnMut(Passage),
    ) -> Option<u32> {
        self.stock.hold_cold(&self.pools, age, block, image, tell)
    }

    /// Lets a held frame go, which was written or was not. What is left in it is in memory as before; if nothing
    /// is, it is the caller's.
    pub(crate) fn let_go(&mut self, frame: u32, written: bool) -> Option<u32> {
        let (zbud, arena) = self.stock.zbud(PoolKind::Persistent);
        let empty = zbud.let_go(arena, frame);
        zbud.counters_mut().evicted_pageframes += u64::from(written && empty.is_some());
        empty
    }

    /// Lets a held frame go that was written to a block of a segment in hand, and keeps it: its zpages are in memory
    /// still, and those that are what was written are in the log, too. The frame, if nothing is left in it.
    pub(crate) fn keep(
        &mut self,
        frame: u32,
        block: u32,
        passages: impl Iterator<Item = Passage>,
    ) -> Option<u32> {
        for Passage { owner, slot, granule } in passages {
            let is_it = self.owners().cell(owner).is_some_and(|cell| cell.load() == slot);
            if is_it {
                self.stock.log().enliven(block, granule);
                self.stock.counters(owner).bd_writes += 1;
            }
        }
        let (zbud, arena) = self.stock.zbud(PoolKind::Persistent);
        let empty = zbud.let_go_clean(arena, frame, block);
        if empty.is_none() {
            self.stock.log().add_clean();
        }
        empty
    }

    /// Evicts the least recently used frame of which the log has a copy; it is the caller's.
    pub(crate) fn evict_clean(&mut self) -> Option<u32> {
        self.stock.evict_clean(&self.pools)
    }

    /// What points at a zpage in a block, if it is alive. One that is alive in a frame of which the block is a copy has
    /// no copy from now on, nor have the others in that frame: the block is to be given up.
    pub(crate) fn passage(&mut self, owner: Handle, block: u32, granule: u8) -> Option<Passage> {
        let slot = self.owners().cell(owner)?.load();
        match slot.place() {
            Place::Frame { frame, .. } if self.stock.arena.meta(frame).clean() == Some(block) => {
                self.stock.make_dirty(frame, block);
                None
            }
            place if place == (Place::Log { block, granule }) => {
                Some(Passage { owner, slot, granule })
            }
            _ => None,
        }
    }

    /// A zpage was written to a block of a segment in hand. If it is still what it was, the slot points there
    /// now, and what it pointed at is free.
    pub(crate) fn written(&mut self, block: u32, passage: Passage) -> bool {
        let Passage { owner, slot, granule } = passage;
        let owners =
            Owners { arena: &self.stock.arena, member: self.stock.member, pools: &self.pools };
        let Some(cell) = owners.cell(owner).filter(|cell| cell.load() == slot) else {
            return false;
        };
        self.stock.log().enliven(block, granule);
        cell.replace(slot, slot.moved_to(Place::Log { block, granule }));
        match slot.place() {
            Place::Frame { frame, granule } => {
                let placed = Placed { frame, granule };
                let freed = self.stock.free_zpage(PoolKind::Persistent, owner, placed);
                assert_eq!(freed, None, "a frame was written that was not held");
                let counters = self.stock.counters(owner);
                counters.bd_count += 1;
                counters.bd_writes += 1;
                self.stock.persistent.counters_mut().evicted_zpages += 1;
            }
            Place::Log { block, granule } => self.stock.log().deaden(block, granule),
            Place::Nowhere | Place::Same(_) => unreachable!("only zpages are written"),
        }
        true
    }

    /// How to read a page from the log; none if it is not there any more.
    pub(crate) fn find_backed(&self, handle: Handle, backed: Backed) -> Option<Found> {
        let owners = self.owners();
        let slot = owners.cell(handle)?.load();
        let Place::Log { block, granule } = slot.place() else { return None };
        let log = self.stock.log();
        let is_there = slot == backed.slot && log.sequence(block) == backed.sequence;
        is_there.then(|| log.find(block, granule))
    }

    /// Counts a page that was read from the log. Whether it had been got from there before, and still is there.
    pub(crate) fn count_backed(&mut self, handle: Handle, backed: Backed, is_intact: bool) -> bool {
        self.count(handle, |counters| {
            counters.bd_reads += 1;
            match is_intact {
                true => counters.succ_gets += 1,
                false => counters.corrupt_gets += 1,
            }
        });
        match backed.slot.place() {
            Place::Log { block, granule }
                if is_intact && self.find_backed(handle, backed).is_some() =>
            {
                let is_again = self.stock.log().note_read(block, granule);
                match is_again {
                    true => self.stock.reuse.again(),
                    false => self.stock.reuse.first(),
                }
                is_again
            }
            _ => false,
        }
    }

    /// Takes a page that was read from the log into a frame again. True if it is there, or is no longer what
    /// was read; false if there is no frame for it.
    pub(crate) fn recall(
        &mut self,
        handle: Handle,
        backed: Backed,
        packed: Packed<'_>,
        hand: &mut Hand,
    ) -> bool {
        let pool = find(&self.pools, handle).filter(|pool| !pool.is_closing());
        let Some(pool) = pool.filter(|_| self.find_backed(handle, backed).is_some()) else {
            return true;
        };
        self.stock.recall(&self.pools, pool, handle, backed, packed, hand)
    }

    fn owners(&self) -> Owners<'_> {
        Owners { arena: &self.stock.arena, member: self.stock.member, pools: &self.pools }
    }
}

impl Stock {
    fn hold_cold(
        &mut self,
        pools: &[Option<Arc<Pool>>],
        age: u8,
        block: u32,
        image: &mut Page,
        mut tell: impl FnMut(Passage),
    ) -> Option<u32> {
        let slots = Owners { arena: &self.arena, member: self.member, pools };
        let (buddies, frame) = self.persistent.hold_oldest(&self.arena, &slots, age)?;
        // SAFETY: the frame is this shard's, whose lock the caller holds.
        unsafe { self.arena.read(frame, 0, image) };
        let log = self.log.as_deref().expect("frames are held for the log");
        log.entry(block).layout.copy_from(&self.arena.meta(frame).layout);
        for extent in buddies.as_slice() {
            let granule = extent.offset as u8;
            let owner = self.persistent.owner(&self.arena, Placed { frame, granule });
            let cell = slots.cell(owner).expect("zbud has asked whether the owner is known");
            tell(Passage { owner, slot: cell.load(), granule });
        }
        Some(frame)
    }

    /// Evicts the least recently used clean frame: from now on its zpages are in the log only.
    pub(super) fn evict_clean(&mut self, pools: &[Option<Arc<Pool>>]) -> Option<u32> {
        let slots = Owners { arena: &self.arena, member: self.member, pools };
        let (frame, block) = self.persistent.hold_clean(&self.arena, &slots)?;
        let buddies = self.arena.meta(frame).layout.buddies();
        for extent in buddies.as_slice() {
            let placed = Placed { frame, granule: extent.offset as u8 };
            let owner = self.persistent.owner(&self.arena, placed);
            let slots = Owners { arena: &self.arena, member: self.member, pools };
            let cell = slots.cell(owner).expect("zbud has asked whether the owner is known");
            let slot = cell.load();
            cell.replace(slot, slot.moved_to(Place::Log { block, granule: placed.granule }));
            self.free_zpage(PoolKind::Persistent, owner, placed);
            self.counters(owner).bd_count += 1;
        }
        self.log().sub_clean();
        let (zbud, arena) = self.zbud(PoolKind::Persistent);
        let empty = zbud.let_go(arena, frame);
        let counters = zbud.counters_mut();
        counters.evicted_pageframes += 1;
        counters.evicted_zpages += buddies.count() as u64;
        assert_eq!(empty, Some(frame), "an evicted frame still holds something");
        empty
    }

    /// What is in a clean frame has no copy in the log any more.
    fn make_dirty(&mut self, frame: u32, block: u32) {
        for extent in self.arena.meta(frame).layout.buddies().as_slice() {
            self.log().deaden(block, extent.offset as u8);
        }
        self.log().sub_clean();
        let (zbud, arena) = self.zbud(PoolKind::Persistent);
        zbud.make_dirty(arena, frame);
    }

    /// Takes a page that is in the log into a frame; false if there is none.
    fn recall(
        &mut self,
        pools: &[Option<Arc<Pool>>],
        pool: &Pool,
        handle: Handle,
        backed: Backed,
        packed: Packed<'_>,
        hand: &mut Hand,
    ) -> bool {
        let slot = backed.slot;
        let Place::Log { block, granule } = slot.place() else {
            unreachable!("it was read from the log")
        };
        let leaf = pool.directory.object(handle.object).leaf();
        let leaf = leaf.expect("an object with a page has a leaf");
        let Some(place) = self.place(pools, pool.kind, handle, packed, hand) else { return false };
        self.set_slot(leaf, handle.index, slot, slot.moved_to(place));
        self.log().deaden(block, granule);
        self.counters(handle).bd_count -= 1;
        true
    }
}
