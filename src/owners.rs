//! From a zpage to its owner's slot: what zbud asks before it moves or evicts a zpage.
//!
//! The way there begins at the zpage's header, which may be corrupt and then names any page. So
//! nothing on the way is taken for granted, and no slot is touched but one of the shard whose lock
//! the caller holds.

use std::sync::Arc;

use crate::arena::Arena;
use crate::handle::{Handle, PoolId};
use crate::pool::{Pool, find};
use crate::slot::{Place, SlotCell};
use crate::zbud::{Placed, Slots};

/// Which shard of how many. The number of shards is a power of two.
#[derive(Clone, Copy)]
pub(crate) struct Member {
    pub(crate) number: usize,
    pub(crate) of: usize,
}

impl Member {
    /// The shard of a page's object. Neighbouring objects of a pool, and the same object of two
    /// pools, go to different shards.
    pub(crate) fn shard_of(handle: Handle, shards: usize) -> usize {
        Self::shard_of_object(handle.pool, handle.object, shards)
    }

    pub(crate) fn shard_of_object(pool: PoolId, object: u32, shards: usize) -> usize {
        (object as usize).wrapping_add(usize::from(pool.0) * 7) & (shards - 1)
    }

    fn has(self, handle: Handle) -> bool {
        Self::shard_of(handle, self.of) == self.number
    }
}

/// The slots of a shard's zpages. Whoever has it holds the shard's lock.
pub(crate) struct Owners<'a> {
    pub(crate) arena: &'a Arena,
    pub(crate) member: Member,
    pub(crate) pools: &'a [Option<Arc<Pool>>],
}

impl Owners<'_> {
    /// The owner's slot. A header that is corrupt may name any page: of another shard, of another
    /// pool, or none.
    pub(crate) fn cell(&self, owner: Handle) -> Option<&SlotCell> {
        let pool = find(self.pools, owner).filter(|_| self.member.has(owner))?;
        let leaf = pool.directory.object(owner.object).leaf()?;
        // SAFETY: the leaf is this shard's, whose lock the caller holds.
        let leaf = unsafe { self.arena.leaf(leaf) };
        Some(&leaf[owner.index as usize])
    }
}

impl Slots for Owners<'_> {
    fn names(&self, owner: Handle, placed: Placed) -> bool {
        self.cell(owner).is_some_and(|cell| cell.load().place() == place_of(placed))
    }

    fn move_to(&self, owner: Handle, from: Placed, to: Placed) {
        let cell = self.cell(owner).expect("zbud has asked whether the owner is known");
        let slot = cell.load();
        assert_eq!(slot.place(), place_of(from), "a zpage's owner does not point at it");
        cell.replace(slot, slot.moved_to(place_of(to)));
    }
}

fn place_of(placed: Placed) -> Place {
    Place::Frame { frame: placed.frame, granule: placed.granule }
}
