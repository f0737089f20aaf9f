//! A shard: some of the objects of every pool, their zpages and frames, under one lock.
//!
//! Every operation on a page happens inside the lock of the shard that its object belongs to, so
//! operations on one page have an order, and each is effective before it returns; nothing above the
//! engine gives that. Compressing and decompressing, which take twenty times longer, happen outside:
//! a put comes here with the zpage made, a get leaves with the zpage copied.
//!
//! A shard never waits for another shard's lock while it holds its own. When it needs a frame that
//! it cannot find here, it says so ([`Refused`]) and the engine, holding no lock, asks the others.
//!
//! The order of a put is: write the zpage, then store the slot word, then free the old zpage.

mod recovery;
mod writeback;

pub(crate) use writeback::Passage;

use std::sync::Arc;

use crate::arena::Arena;
use crate::backing::Log;
use crate::directory::Object;
use crate::error::GetError;
use crate::frame::Use;
use crate::handle::{Handle, OBJECT_PAGES, PAGE_SIZE, Page, PoolId, PoolKind};
use crate::owners::{Member, Owners};
use crate::pool::{Pool, find};
use crate::readback::Backed;
use crate::reuse::Reuse;
use crate::runs::Holding;
use crate::slot::{Place, Slot};
use crate::stats::{AllocCounters, PoolCounters};
use crate::zbud::{Fetched, Placed, Zbud};
use crate::zpage::Header;

/// A page on its way in.
#[derive(Clone, Copy)]
pub(crate) enum Packed<'a> {
    /// It does not compress.
    Raw(Header, &'a Page),
    /// One word fills it.
    Same(u32),
    /// Header and payload.
    Zpage(&'a [u8]),
}

/// A page on its way out.
pub(crate) enum Unpacked {
    /// It has to be read from the log first.
    Backed(Backed),
    /// What is held cannot be what was put.
    Corrupt,
    /// Nothing is held.
    Miss,
    /// The page was copied to the page buffer.
    Raw(Header),
    /// One word fills it.
    Same(u32),
    /// So many bytes of payload were copied to the scratch buffer.
    Zpage(Header, usize),
}

/// Why a put did not happen. Nothing was changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Refused {
    /// A frame is needed and this shard has none.
    NoFrame,
    /// The handle names no page that can be put.
    NoPage,
}

/// Frames that a put brings along. A put needs two at most: for a leaf and for a zpage.
#[derive(Default)]
pub(crate) struct Hand {
    frames: [Option<u32>; 2],
}

impl Hand {
    /// Takes a frame along.
    pub(crate) fn add(&mut self, frame: u32) {
        let place = self.frames.iter_mut().find(|place| place.is_none());
        *place.expect("a put needs no more than two frames") = Some(frame);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.frames.iter().all(Option::is_some)
    }

    fn take(&mut self) -> Option<u32> {
        self.frames.iter_mut().find_map(Option::take)
    }

    /// Gives what is left back to the arena.
    pub(crate) fn put_back(mut self, arena: &Arena) {
        while let Some(frame) = self.take() {
            arena.push(frame);
        }
    }
}

/// See the module's description.
pub(crate) struct Shard {
    pools: Box<[Option<Arc<Pool>>]>,
    stock: Stock,
}

/// What a shard holds beside the pools' names, apart so that both can be borrowed at once.
struct Stock {
    arena: Arc<Arena>,
    /// What the backing file holds, if there is one.
    log: Option<Arc<Log>>,
    member: Member,
    ephemeral: Zbud,
    persistent: Zbud,
    /// The frame that the next compaction copies to. None only after a process has died with it in use.
    spare: Option<u32>,
    reuse: Reuse,
    /// Generation of the last put.
    generation: u32,
    /// Frames that hold slot words, by kind.
    leaves: [u64; 2],
    alloc: AllocCounters,
    counters: Box<[PoolCounters]>,
    /// What the pools that are gone counted.
    retired: PoolCounters,
}

impl Shard {
    /// A shard that knows up to `pools` pools, and takes a free frame for its spare if there is one.
    pub(crate) fn new(member: Member, arena: Arc<Arena>, pools: usize) -> Self {
        let stock = Stock {
            arena,
            log: None,
            member,
            ephemeral: Zbud::new(Use::Ephemeral),
            persistent: Zbud::new(Use::Persistent),
            spare: None,
            reuse: Reuse::default(),
            generation: 0,
            leaves: [0; 2],
            alloc: AllocCounters::default(),
            counters: vec![PoolCounters::default(); pools].into(),
            retired: PoolCounters::default(),
        };
        let mut shard = Self { pools: vec![None; pools].into(), stock };
        shard.fill_spare();
        shard
    }

    pub(crate) fn add_pool(&mut self, pool: Arc<Pool>) {
        let at = usize::from(pool.id.0);
        assert!(self.pools[at].is_none(), "a pool's place is taken");
        self.stock.counters[at] = PoolCounters::default();
        self.pools[at] = Some(pool);
    }

    /// Forgets a pool that was flushed.
    pub(crate) fn remove_pool(&mut self, id: PoolId) {
        let at = usize::from(id.0);
        let left = std::mem::take(&mut self.stock.counters[at]);
        assert!(left.holds_nothing(), "a pool was removed with pages: {left:?}");
        self.stock.retired.add(&left);
        self.pools[at] = None;
    }

    pub(crate) fn put(
        &mut self,
        handle: Handle,
        packed: Packed<'_>,
        hand: &mut Hand,
    ) -> Result<(), Refused> {
        let pool = find(&self.pools, handle).filter(|pool| !pool.is_closing());
        let pool = pool.ok_or(Refused::NoPage)?;
        pool.unmark(handle);
        self.stock.put(&self.pools, pool, handle, packed, hand)
    }

    /// Copies a page out, raw into `page`, compressed into `scratch`. From an ephemeral pool it is
    /// gone then. A persistent one may be moved to others that were read, and take a free frame for that if it may.
    pub(crate) fn get(
        &mut self,
        handle: Handle,
        scratch: &mut [u8; PAGE_SIZE],
        page: &mut Page,
        may_take: bool,
    ) -> Result<(Unpacked, PoolKind), GetError> {
        let pool = find(&self.pools, handle).ok_or(GetError::NoPage)?;
        Ok((self.stock.get(&self.pools, pool, handle, scratch, page, may_take)?, pool.kind))
    }

    /// What the page's pool promises; none without a pool that takes pages.
    pub(crate) fn kind(&self, handle: Handle) -> Option<PoolKind> {
        find(&self.pools, handle).filter(|pool| !pool.is_closing()).map(|pool| pool.kind)
    }

    /// Drops a page's copy and remembers that it is lost; false if that is nothing to remember,
    /// because the page is ephemeral or its pool going.
    pub(crate) fn lose(&mut self, handle: Handle) -> bool {
        let pool = find(&self.pools, handle).filter(|pool| !pool.is_closing());
        let Some(pool) = pool else { return false };
        pool.unmark(handle);
        let object = pool.directory.object(handle.object);
        let was_idle = object.is_idle();
        // An ephemeral page may vanish: a miss is all there is to tell of it. Of a persistent one
        // it is noted first that it is lost, so that there is no instant at which it reads as
        // zeros; the slot goes before the note, as long as it points at something.
        let persistent = pool.kind == PoolKind::Persistent;
        if persistent && !object.set_lost(handle.index, true) {
            self.stock.counters(handle).lost_pages += 1;
        }
        self.stock.drop_page(pool, handle);
        pool.count_active(was_idle, object.is_idle());
        persistent
    }

    /// Loses a page because the front end gave its write up, and counts that.
    pub(crate) fn give_up(&mut self, handle: Handle) {
        if self.lose(handle) {
            self.stock.counters(handle).given_up_puts += 1;
        }
    }

    pub(crate) fn flush_page(&mut self, handle: Handle) -> bool {
        let Some(pool) = find(&self.pools, handle) else { return false };
        let object = pool.directory.object(handle.object);
        let was_idle = object.is_idle();
        let found = self.stock.flush_page(pool, handle);
        pool.count_active(was_idle, object.is_idle());
        found
    }

    /// Flushes the pages of an object that lie in `indexes`; true if there were any.
    pub(crate) fn flush_pages(&mut self, first: Handle, indexes: std::ops::Range<u32>) -> bool {
        let Some(pool) = find(&self.pools, first) else { return false };
        let object = pool.directory.object(first.object);
        let was_idle = object.is_idle();
        let mut found = false;
        for index in indexes {
            if object.is_idle() {
                break;
            }
            found |= self.stock.flush_page(pool, Handle { index, ..first });
        }
        pool.count_active(was_idle, object.is_idle());
        found
    }

    /// Flushes the pages of an object that are marked as freed, from `first` on.
    pub(crate) fn flush_freed(&mut self, first: Handle) {
        let Some(pool) = find(&self.pools, first) else { return };
        let Some(freed) = pool.freed() else { return };
        let object = pool.directory.object(first.object);
        let was_idle = object.is_idle();
        let base = first.page() - u64::from(first.index);
        let end = (base + u64::from(OBJECT_PAGES)).min(pool.pages());
        let mut from = first.page();
        while let Some(page) = freed.next(from..end) {
            freed.unmark(page);
            let handle = Handle { index: (page - base) as u32, ..first };
            let found = self.stock.empty_page(pool, handle);
            self.stock.counters(handle).freed_pages += u64::from(found);
            from = page + 1;
        }
        pool.count_active(was_idle, object.is_idle());
    }

    /// What is held of a page, and of how many from there on in its object, `most` at most, it is
    /// the same.
    pub(crate) fn holding(&self, first: Handle, most: u32) -> Option<(Holding, u32)> {
        let pool = find(&self.pools, first)?;
        let object = pool.directory.object(first.object);
        let leaf = object.leaf();
        let holding = |index| match leaf.map(|leaf| self.stock.slot(leaf, index).place()) {
            None | Some(Place::Nowhere) if object.has_lost() && object.is_lost(index) => {
                Holding::Data
            }
            None | Some(Place::Nowhere) => Holding::Nothing,
            Some(Place::Same(0)) => Holding::Zeros,
            Some(_) => Holding::Data,
        };
        let end = first.index.saturating_add(most).min(OBJECT_PAGES);
        let found = holding(first.index);
        let past = (first.index + 1..end).find(|&index| holding(index) != found).unwrap_or(end);
        Some((found, past - first.index))
    }

    /// Counts a put that no frame was found for, here or elsewhere.
    pub(crate) fn refuse_put(&mut self, handle: Handle) {
        let Some(pool) = find(&self.pools, handle) else { return };
        let alloc = &mut self.stock.alloc;
        match pool.kind {
            PoolKind::Ephemeral => {
                alloc.eph_ate_tail_failed += 1;
                alloc.failed_eph_puts += 1;
            }
            PoolKind::Persistent => {
                alloc.pers_ate_eph_failed += 1;
                alloc.failed_pers_puts += 1;
            }
        }
        self.stock.counters(handle).failed_puts += 1;
    }

    /// Counts an ephemeral frame that another shard gave up for a put here.
    pub(crate) fn count_eaten(&mut self, handle: Handle) {
        let Some(pool) = find(&self.pools, handle) else { return };
        self.stock.count_eaten(pool.kind);
    }

    /// The pool of that number.
    pub(crate) fn pool(&self, id: PoolId) -> Option<Arc<Pool>> {
        self.pools.get(usize::from(id.0))?.clone()
    }

    /// The pool with the lowest number from `from` on of which somebody tells what is freed.
    pub(crate) fn watched(&self, from: usize) -> Option<Arc<Pool>> {
        let mut pools = self.pools.iter().skip(from).flatten();
        pools.find(|pool| pool.freed().is_some()).cloned()
    }

    /// Counts for a pool; of one that is gone, what it counted is closed.
    pub(crate) fn count(&mut self, handle: Handle, count: impl FnOnce(&mut PoolCounters)) {
        if find(&self.pools, handle).is_some() {
            count(self.stock.counters(handle));
        }
    }

    pub(crate) fn counters(&self, pool: PoolId) -> &PoolCounters {
        &self.stock.counters[usize::from(pool.0)]
    }

    /// What all pools count, and what those counted that are gone.
    pub(crate) fn all_counters(&self) -> impl Iterator<Item = &PoolCounters> {
        let live = self.pools.iter().zip(&self.stock.counters).filter(|(pool, _)| pool.is_some());
        live.map(|(_, counters)| counters).chain([&self.stock.retired])
    }

    pub(crate) fn alloc(&self) -> &AllocCounters {
        &self.stock.alloc
    }

    pub(crate) fn zbud(&self, kind: PoolKind) -> &Zbud {
        match kind {
            PoolKind::Ephemeral => &self.stock.ephemeral,
            PoolKind::Persistent => &self.stock.persistent,
        }
    }

    /// Takes a free frame for its spare, if it has none.
    pub(crate) fn fill_spare(&mut self) {
        if self.stock.spare.is_none() {
            self.stock.set_spare(self.stock.arena.pop_any());
        }
    }

    /// Whether it has its spare.
    pub(crate) fn has_spare(&self) -> bool {
        self.stock.spare.is_some()
    }

    /// Frames that hold slot words of pools of this kind.
    pub(crate) fn leaves(&self, kind: PoolKind) -> u64 {
        self.stock.leaves[kind as usize]
    }

    /// Where a page is.
    #[cfg(test)]
    pub(crate) fn place(&self, handle: Handle) -> Place {
        let pool = find(&self.pools, handle).expect("a page of a live pool");
        let leaf = pool.directory.object(handle.object).leaf();
        leaf.map_or(Place::Nowhere, |leaf| self.stock.slot(leaf, handle.index).place())
    }

    /// Takes the least recently used ephemeral frame from its zpages.
    pub(crate) fn evict_ephemeral(&mut self) -> Option<u32> {
        self.stock.evict_ephemeral(&self.pools)
    }
}

impl Stock {
    fn put(
        &mut self,
        pools: &[Option<Arc<Pool>>],
        pool: &Pool,
        handle: Handle,
        packed: Packed<'_>,
        hand: &mut Hand,
    ) -> Result<(), Refused> {
        let object = pool.directory.object(handle.object);
        let was_idle = object.is_idle();
        // From here on the object has a page more, so that an eviction for this very put, which
        // may take the object's other pages, does not take its leaf as well.
        object.use_one();
        let place = self
            .leaf_for_put(pools, pool, object, hand)
            .and_then(|leaf| Some((leaf, self.place(pools, pool.kind, handle, packed, hand)?)));
        match place {
            Some((leaf, place)) => self.commit(pool, object, leaf, handle, place),
            // A leaf that was made for this put goes back to the hand: with one frame more, the next
            // try has what it needs.
            None => {
                if let Some(leaf) = self.disuse(pool, object) {
                    hand.add(leaf);
                }
            }
        }
        pool.count_active(was_idle, object.is_idle());
        place.map(drop).ok_or(Refused::NoFrame)
    }

    /// The object's leaf frame, made if there is none.
    fn leaf_for_put(
        &mut self,
        pools: &[Option<Arc<Pool>>],
        pool: &Pool,
        object: &Object,
        hand: &mut Hand,
    ) -> Option<u32> {
        if let Some(leaf) = object.leaf() {
            return Some(leaf);
        }
        let frame = self.take_frame(pools, pool.kind, hand)?;
        // SAFETY: the frame was taken just now, so it is this shard's and on no list.
        unsafe { self.arena.zero(frame) };
        self.arena.meta(frame).reset(Use::Leaf);
        object.set_leaf(Some(frame));
        self.leaves[pool.kind as usize] += 1;
        self.counters[usize::from(pool.id.0)].obj_count += 1;
        Some(frame)
    }

    /// Finds room for a page and writes it there.
    fn place(
        &mut self,
        pools: &[Option<Arc<Pool>>],
        kind: PoolKind,
        handle: Handle,
        packed: Packed<'_>,
        hand: &mut Hand,
    ) -> Option<Place> {
        let filled;
        let packed = match packed {
            Packed::Same(fill) if kind == PoolKind::Persistent => return Some(Place::Same(fill)),
            // Ephemeral frames leave by way of their zpages. A page without one would keep its
            // object's leaf for ever.
            Packed::Same(fill) => {
                filled = Header::filled(handle, fill);
                Packed::Zpage(&filled)
            }
            packed => packed,
        };
        let placed = match packed {
            Packed::Same(_) => unreachable!("placed above"),
            Packed::Raw(header, page) => {
                let frame = self.take_frame(pools, kind, hand)?;
                self.counters(handle).huge_pages += 1;
                self.alloc.compress_poor += 1;
                let (zbud, arena) = self.zbud(kind);
                zbud.place_raw(arena, frame, header, page)
            }
            Packed::Zpage(zpage) => match self.place_beside(pools, kind, zpage, false) {
                Some(placed) => placed,
                None => match self.take_frame(pools, kind, hand) {
                    Some(frame) => {
                        let (zbud, arena) = self.zbud(kind);
                        zbud.place_alone(arena, frame, zpage)
                    }
                    // Better with what goes first than nowhere.
                    None => self.place_beside(pools, kind, zpage, true)?,
                },
            },
        };
        let bytes = match packed {
            Packed::Zpage(zpage) => crate::zbud::granules(zpage.len()) * crate::frame::GRANULE,
            _ => PAGE_SIZE,
        };
        let counters = self.counters(handle);
        counters.zpages += 1;
        counters.compr_data_size += bytes as u64;
        Some(Place::Frame { frame: placed.frame, granule: placed.granule })
    }

    fn set_spare(&mut self, free: Option<u32>) {
        free.inspect(|frame| self.arena.meta(*frame).reset(Use::Spare));
        self.spare = free;
    }

    fn place_beside(
        &mut self,
        pools: &[Option<Arc<Pool>>],
        kind: PoolKind,
        zpage: &[u8],
        is_spent: bool,
    ) -> Option<Placed> {
        if self.spare.is_none() {
            self.set_spare(self.arena.pop());
        }
        let zbud = match kind {
            PoolKind::Ephemeral => &mut self.ephemeral,
            PoolKind::Persistent => &mut self.persistent,
        };
        let slots = Owners { arena: &self.arena, member: self.member, pools };
        let placed = zbud.place_beside(&self.arena, is_spent, zpage, &mut self.spare, &slots)?;
        self.alloc.partner_puts += 1;
        Some(placed)
    }

    /// A frame for a put: brought along, or free, or taken from the LRU ephemeral zpages, or one of which the log has a
    /// copy.
    fn take_frame(
        &mut self,
        pools: &[Option<Arc<Pool>>],
        kind: PoolKind,
        hand: &mut Hand,
    ) -> Option<u32> {
        if let Some(frame) = hand.take().or_else(|| self.arena.pop()) {
            return Some(frame);
        }
        self.alloc.failed_getfreepages += 1;
        if let Some(frame) = self.evict_ephemeral(pools) {
            self.count_eaten(kind);
            return Some(frame);
        }
        self.evict_clean(pools)
    }

    fn count_eaten(&mut self, kind: PoolKind) {
        match kind {
            PoolKind::Ephemeral => self.alloc.eph_ate_tail += 1,
            PoolKind::Persistent => self.alloc.pers_ate_eph += 1,
        }
    }

    /// The put's commit: the slot points at the new copy, and then the old one goes.
    fn commit(&mut self, pool: &Pool, object: &Object, leaf: u32, handle: Handle, place: Place) {
        self.generation = self.generation.wrapping_add(1);
        let new = Slot::new(place, self.generation);
        let old = self.slot(leaf, handle.index);
        self.set_slot(leaf, handle.index, old, new);
        let was_lost = object.has_lost() && object.set_lost(handle.index, false);
        let counters = self.counters(handle);
        counters.succ_puts += 1;
        counters.lost_pages -= u64::from(was_lost);
        counters.same_pages += u64::from(matches!(place, Place::Same(_)));
        counters.orig_data_size += PAGE_SIZE as u64;
        if !old.is_empty() {
            counters.dup_puts_replaced += 1;
            self.free_place(pool, handle, old.place());
            // The page was there before: the use counted at the start was not a new one.
            self.free_page(pool, object);
        }
    }

    fn get(
        &mut self,
        pools: &[Option<Arc<Pool>>],
        pool: &Pool,
        handle: Handle,
        scratch: &mut [u8; PAGE_SIZE],
        page: &mut Page,
        may_take: bool,
    ) -> Result<Unpacked, GetError> {
        let object = pool.directory.object(handle.object);
        let slot = match object.leaf() {
            Some(leaf) => self.slot(leaf, handle.index),
            None => Slot::EMPTY,
        };
        let unpacked = match slot.place() {
            Place::Frame { frame, granule } => {
                let placed = Placed { frame, granule };
                let (zbud, arena) = self.zbud(pool.kind);
                let unpacked = match zbud.fetch(arena, placed, scratch, page) {
                    Fetched::Payload(header, bytes) => Unpacked::Zpage(header, bytes),
                    Fetched::Raw(header) => Unpacked::Raw(header),
                    Fetched::Corrupt => Unpacked::Corrupt,
                };
                let is_persistent = pool.kind == PoolKind::Persistent;
                if is_persistent && self.log.is_some() && !matches!(unpacked, Unpacked::Corrupt) {
                    self.was_read(pools, handle, placed, may_take);
                }
                unpacked
            }
            Place::Log { block, .. } => {
                let sequence = self.log().sequence(block);
                return Ok(Unpacked::Backed(Backed { slot, sequence }));
            }
            Place::Nowhere if object.has_lost() && object.is_lost(handle.index) => {
                self.counters(handle).lost_gets += 1;
                return Err(GetError::Lost);
            }
            Place::Nowhere => {
                self.counters(handle).missed_gets += 1;
                return Ok(Unpacked::Miss);
            }
            Place::Same(fill) => Unpacked::Same(fill),
        };
        match unpacked {
            Unpacked::Corrupt => self.counters(handle).corrupt_gets += 1,
            _ => self.counters(handle).succ_gets += 1,
        }
        if pool.kind == PoolKind::Ephemeral {
            let was_idle = object.is_idle();
            self.drop_page(pool, handle);
            pool.count_active(was_idle, object.is_idle());
        }
        Ok(unpacked)
    }

    /// A persistent page was read from its frame, and there is a log: what is held of it is the first to go there, as long
    /// as pages are hardly read again.
    fn was_read(
        &mut self,
        pools: &[Option<Arc<Pool>>],
        handle: Handle,
        placed: Placed,
        may_take: bool,
    ) {
        let is_again = self.arena.meta(placed.frame).is_spent();
        if is_again {
            self.reuse.again();
            if self.reuse.is_common() {
                self.persistent.revive(&self.arena, placed.frame);
            }
            return;
        }
        if !self.reuse.is_to_retire() {
            return;
        }
        self.reuse.first();
        let slots = Owners { arena: &self.arena, member: self.member, pools };
        let (arena, spare) = (&self.arena, &mut self.spare);
        let free = || if may_take { arena.pop() } else { None };
        let empty = self.persistent.retire(arena, handle, placed, spare, &slots, free);
        if let Some(frame) = empty {
            self.arena.push(frame);
        }
    }

    fn flush_page(&mut self, pool: &Pool, handle: Handle) -> bool {
        let found = self.empty_page(pool, handle);
        let counters = self.counters(handle);
        counters.flush_total += 1;
        counters.flush_found += u64::from(found);
        found
    }

    /// Drops a page, and what is remembered of one that was lost; true if there was a page.
    fn empty_page(&mut self, pool: &Pool, handle: Handle) -> bool {
        let object = pool.directory.object(handle.object);
        let found = self.drop_page(pool, handle);
        let was_lost = object.has_lost() && object.set_lost(handle.index, false);
        self.counters(handle).lost_pages -= u64::from(was_lost);
        found
    }

    /// Empties a slot and frees what it pointed at; true if it pointed at anything.
    fn drop_page(&mut self, pool: &Pool, handle: Handle) -> bool {
        let object = pool.directory.object(handle.object);
        let Some(leaf) = object.leaf() else { return false };
        let old = self.slot(leaf, handle.index);
        if old.is_empty() {
            return false;
        }
        self.set_slot(leaf, handle.index, old, Slot::EMPTY);
        self.free_place(pool, handle, old.place());
        self.free_page(pool, object);
        true
    }

    /// Frees what a slot pointed at until now.
    fn free_place(&mut self, pool: &Pool, handle: Handle, place: Place) {
        self.counters(handle).orig_data_size -= PAGE_SIZE as u64;
        match place {
            Place::Frame { frame, granule } => {
                if let Some(frame) = self.free_zpage(pool.kind, handle, Placed { frame, granule }) {
                    self.arena.push(frame);
                }
            }
            Place::Log { block, granule } => {
                self.log().deaden(block, granule);
                self.counters(handle).bd_count -= 1;
            }
            Place::Nowhere => {}
            Place::Same(_) => self.counters(handle).same_pages -= 1,
        }
    }

    /// Frees a zpage and counts that; returns its frame if nothing is left in it.
    fn free_zpage(&mut self, kind: PoolKind, handle: Handle, placed: Placed) -> Option<u32> {
        let (zbud, arena) = self.zbud(kind);
        let freed = zbud.free(arena, placed);
        let counters = self.counters(handle);
        counters.zpages -= 1;
        counters.compr_data_size -= freed.bytes;
        counters.huge_pages -= u64::from(freed.raw);
        if let Some(block) = freed.block {
            self.log().deaden(block, placed.granule);
            if freed.frame.is_some() {
                self.log().sub_clean();
            }
        }
        freed.frame
    }

    /// Counts a page less in an object; without pages it has no leaf, whose frame is free then.
    fn free_page(&mut self, pool: &Pool, object: &Object) {
        if let Some(leaf) = self.disuse(pool, object) {
            self.arena.push(leaf);
        }
    }

    /// The same, with the frame for the caller.
    fn disuse(&mut self, pool: &Pool, object: &Object) -> Option<u32> {
        if object.disuse_one() > 0 {
            return None;
        }
        let leaf = object.leaf()?;
        object.set_leaf(None);
        self.arena.meta(leaf).reset(Use::Free);
        self.leaves[pool.kind as usize] -= 1;
        self.counters[usize::from(pool.id.0)].obj_count -= 1;
        Some(leaf)
    }

    fn evict_ephemeral(&mut self, pools: &[Option<Arc<Pool>>]) -> Option<u32> {
        let slots = Owners { arena: &self.arena, member: self.member, pools };
        let (buddies, frame) = self.ephemeral.oldest(&self.arena, &slots, 0)?;
        let mut empty = None;
        for extent in buddies.as_slice() {
            let placed = Placed { frame, granule: extent.offset as u8 };
            let owner = self.ephemeral.owner(&self.arena, placed);
            let pool = find(pools, owner).expect("a zpage's owner is a live pool");
            let object = pool.directory.object(owner.object);
            let was_idle = object.is_idle();
            let leaf = object.leaf().expect("a zpage's object has a leaf");
            let slot = self.slot(leaf, owner.index);
            self.set_slot(leaf, owner.index, slot, Slot::EMPTY);
            self.counters(owner).orig_data_size -= PAGE_SIZE as u64;
            empty = self.free_zpage(PoolKind::Ephemeral, owner, placed);
            self.free_page(pool, object);
            pool.count_active(was_idle, object.is_idle());
        }
        let counters = self.ephemeral.counters_mut();
        counters.evicted_pageframes += 1;
        counters.evicted_zpages += buddies.count() as u64;
        assert_eq!(empty, Some(frame), "an evicted frame still holds something");
        empty
    }

    /// A slot word of an object that has a leaf.
    fn slot(&self, leaf: u32, index: u32) -> Slot {
        // SAFETY: the leaf is this shard's, whose lock the caller holds.
        let leaf = unsafe { self.arena.leaf(leaf) };
        leaf[index as usize].load()
    }

    /// Changes a slot word; see [`crate::slot::SlotCell::replace`].
    fn set_slot(&self, leaf: u32, index: u32, old: Slot, new: Slot) {
        // SAFETY: the leaf is this shard's, whose lock the caller holds.
        let leaf = unsafe { self.arena.leaf(leaf) };
        leaf[index as usize].replace(old, new);
    }

    fn zbud(&mut self, kind: PoolKind) -> (&mut Zbud, &Arena) {
        match kind {
            PoolKind::Ephemeral => (&mut self.ephemeral, &self.arena),
            PoolKind::Persistent => (&mut self.persistent, &self.arena),
        }
    }

    fn log(&self) -> &Log {
        self.log.as_deref().expect("a page is in the log, so there is one")
    }

    fn counters(&mut self, handle: Handle) -> &mut PoolCounters {
        &mut self.counters[usize::from(handle.pool.0)]
    }
}
