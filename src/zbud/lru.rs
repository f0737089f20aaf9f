//! Which frame goes first: the least recently used one, after second chances, and those of which the log has a copy.
//!
//! A frame that is going is held: it is on no list, and what is in it stays where it is.

use super::{Slots, Zbud};
use crate::arena::Arena;
use crate::frame::{Buddies, FrameMeta, Use};
use crate::list::List;

/// Second chances that one search for the least recently used frame gives.
pub(super) const SECOND_CHANCES_MAX: u32 = 64;

impl Zbud {
    /// Takes the least recently used frame off all lists, a raw page's if there is one: its zpages stay
    /// where they are and may be read and freed; no other comes beside them, and it is not
    /// compacted. When its last zpage is freed it stays as well, so that whatever a slot points at in
    /// it is what was there when it was held. [`Zbud::let_go`] ends that.
    pub(crate) fn hold_oldest(
        &mut self,
        arena: &Arena,
        slots: &impl Slots,
        age: u8,
    ) -> Option<(Buddies, u32)> {
        let (buddies, frame) = self.oldest(arena, slots, age)?;
        let meta = self.own(arena, frame);
        let raw = meta.layout.is_raw();
        if !raw {
            self.unbin(arena, frame, &buddies);
        }
        self.queue(meta).remove(arena, frame);
        meta.set_held(true);
        self.counters.held_pageframes += 1;
        Some((buddies, frame))
    }

    /// Lets a frame go that was held: it is again the least recently used one, or the caller's if nothing is
    /// left in it.
    pub(crate) fn let_go(&mut self, arena: &Arena, frame: u32) -> Option<u32> {
        let meta = self.own(arena, frame);
        assert!(meta.is_held(), "frame {frame} is not held");
        meta.set_held(false);
        self.counters.held_pageframes -= 1;
        let buddies = meta.layout.buddies();
        if buddies.count() == 0 {
            self.counters.pageframes -= 1;
            meta.reset(Use::Free);
            return Some(frame);
        }
        let raw = meta.layout.is_raw();
        if !raw {
            self.bin(arena, frame, &buddies);
        }
        self.queue(meta).push_front(arena, frame);
        None
    }

    /// The same for a frame that was written: what is left in it is in memory as before, and in this block too.
    pub(crate) fn let_go_clean(&mut self, arena: &Arena, frame: u32, block: u32) -> Option<u32> {
        let meta = self.own(arena, frame);
        if meta.layout.buddies().count() == 0 {
            return self.let_go(arena, frame);
        }
        assert!(meta.is_held(), "frame {frame} is not held");
        meta.set_held(false);
        meta.set_clean(Some(block));
        self.counters.held_pageframes -= 1;
        self.counters.clean_pageframes += 1;
        self.clean.push_back(arena, frame);
        None
    }

    /// Holds the least recently used of the clean frames, after giving those that were read since a second chance; it
    /// is not clean any more. With the block that is a copy of it.
    pub(crate) fn hold_clean(&mut self, arena: &Arena, slots: &impl Slots) -> Option<(u32, u32)> {
        // Where more were read than second chances are given, one that was read goes.
        for chance in 0..2 * SECOND_CHANCES_MAX {
            let frame = self.clean.front()?;
            let meta = self.own(arena, frame);
            let is_read = meta.take_referenced() && chance < SECOND_CHANCES_MAX;
            // One whose owners are not known has to stay, and may be the only one.
            if !is_read && self.knows_owners(arena, frame, &meta.layout.buddies(), slots) {
                let block = meta.clean().expect("it is on the list of clean frames");
                self.take_off_clean(arena, frame);
                meta.set_held(true);
                self.counters.held_pageframes += 1;
                return Some((frame, block));
            }
            self.clean.remove(arena, frame);
            self.clean.push_back(arena, frame);
        }
        None
    }

    /// A clean frame has no copy any more: it is the least recently used of all others.
    pub(crate) fn make_dirty(&mut self, arena: &Arena, frame: u32) {
        self.take_off_clean(arena, frame);
        let meta = self.own(arena, frame);
        let (raw, buddies) = (meta.layout.is_raw(), meta.layout.buddies());
        if !raw {
            self.bin(arena, frame, &buddies);
        }
        self.queue(meta).push_front(arena, frame);
    }

    fn take_off_clean(&mut self, arena: &Arena, frame: u32) {
        self.clean.remove(arena, frame);
        self.counters.clean_pageframes -= 1;
        self.own(arena, frame).set_clean(None);
    }

    /// The LRU queue of a frame. Raw pages are apart where frames are written to the log.
    pub(super) fn queue(&mut self, meta: &FrameMeta) -> &mut List {
        match meta.is_spent() {
            true => &mut self.spent.lru,
            false if meta.layout.is_raw() && self.class == Use::Persistent => &mut self.raw,
            false => &mut self.fresh.lru,
        }
    }

    /// Puts a frame at the most recently used end of its queue.
    pub(super) fn push_back(&mut self, arena: &Arena, frame: u32) {
        let meta = arena.meta(frame);
        meta.set_tick(self.tick);
        self.queue(meta).push_back(arena, frame);
    }

    /// The least recently used frame whose zpages' owners are known, after giving frames that were
    /// read since a second chance: one that is spent, or else a raw page's, if there is any. None that has been there for
    /// fewer ticks than `age`.
    pub(crate) fn oldest(
        &mut self,
        arena: &Arena,
        slots: &impl Slots,
        age: u8,
    ) -> Option<(Buddies, u32)> {
        let queues: [fn(&Self) -> &List; 3] =
            [|zbud| &zbud.spent.lru, |zbud| &zbud.raw, |zbud| &zbud.fresh.lru];
        queues.into_iter().find_map(|queue| self.oldest_of(arena, slots, age, queue))
    }

    fn oldest_of(
        &mut self,
        arena: &Arena,
        slots: &impl Slots,
        age: u8,
        queue: fn(&Self) -> &List,
    ) -> Option<(Buddies, u32)> {
        // Each round but the last closes a frame.
        loop {
            let frame = self.front_unread(arena, queue)?;
            if self.tick.wrapping_sub(arena.meta(frame).tick()) < age {
                return None;
            }
            let buddies = self.own(arena, frame).layout.buddies();
            if self.knows_owners(arena, frame, &buddies, slots) {
                return Some((buddies, frame));
            }
            self.close(arena, frame);
        }
    }

    fn front_unread(&mut self, arena: &Arena, queue: fn(&Self) -> &List) -> Option<u32> {
        for _ in 0..SECOND_CHANCES_MAX {
            let frame = queue(self).front()?;
            let meta = arena.meta(frame);
            if !meta.take_referenced() {
                break;
            }
            self.queue(meta).remove(arena, frame);
            self.push_back(arena, frame);
        }
        queue(self).front()
    }
}
