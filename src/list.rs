//! A doubly linked list of frames through the frame table.
//!
//! The links are in the table, so that putting a frame on a list allocates nothing; the list
//! itself is two frame numbers. A frame can be on one list per pair of links. The caller holds the
//! lock of the shard whose frames these are.

use std::sync::atomic::Ordering::Relaxed;

use crate::arena::Arena;
use crate::frame::{Links, NIL};

/// Which pair of links a list uses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Through {
    Bin,
    Lru,
}

/// See the module's description.
#[derive(Debug)]
pub(crate) struct List {
    through: Through,
    head: u32,
    tail: u32,
}

impl List {
    pub(crate) fn new(through: Through) -> Self {
        Self { through, head: NIL, tail: NIL }
    }

    pub(crate) fn front(&self) -> Option<u32> {
        (self.head != NIL).then_some(self.head)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.head == NIL
    }

    pub(crate) fn push_back(&mut self, arena: &Arena, frame: u32) {
        self.link(arena, self.tail, frame, NIL);
    }

    pub(crate) fn push_front(&mut self, arena: &Arena, frame: u32) {
        self.link(arena, NIL, frame, self.head);
    }

    /// Puts `new` where `old` is, and takes `old` off.
    pub(crate) fn replace(&mut self, arena: &Arena, old: u32, new: u32) {
        let links = self.links(arena, old);
        let (prev, next) = (links.prev.load(Relaxed), links.next.load(Relaxed));
        self.remove(arena, old);
        self.link(arena, prev, new, next);
    }

    pub(crate) fn remove(&mut self, arena: &Arena, frame: u32) {
        let links = self.links(arena, frame);
        let (prev, next) = (links.prev.load(Relaxed), links.next.load(Relaxed));
        match prev {
            NIL => {
                assert_eq!(self.head, frame, "frame {frame} is not on this list");
                self.head = next;
            }
            _ => self.links(arena, prev).next.store(next, Relaxed),
        }
        match next {
            NIL => {
                assert_eq!(self.tail, frame, "frame {frame} is not on this list");
                self.tail = prev;
            }
            _ => self.links(arena, next).prev.store(prev, Relaxed),
        }
    }

    fn link(&mut self, arena: &Arena, prev: u32, frame: u32, next: u32) {
        let links = self.links(arena, frame);
        links.prev.store(prev, Relaxed);
        links.next.store(next, Relaxed);
        match prev {
            NIL => self.head = frame,
            _ => self.links(arena, prev).next.store(frame, Relaxed),
        }
        match next {
            NIL => self.tail = frame,
            _ => self.links(arena, next).prev.store(frame, Relaxed),
        }
    }

    fn links<'a>(&self, arena: &'a Arena, frame: u32) -> &'a Links {
        let meta = arena.meta(frame);
        match self.through {
            Through::Bin => &meta.bin,
            Through::Lru => &meta.lru,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn contents(list: &List, arena: &Arena) -> Vec<u32> {
        let mut frames = Vec::new();
        let mut at = list.head;
        while at != NIL {
            frames.push(at);
            at = list.links(arena, at).next.load(Relaxed);
        }
        frames
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]
        #[test]
        fn a_list_is_a_deque(steps in prop::collection::vec((0u8..4, 0u32..8), 0..60)) {
            let arena = Arena::alone(8, 8).unwrap();
            arena.grow(8).unwrap();
            let mut list = List::new(Through::Lru);
            let mut model = VecDeque::new();
            for (step, frame) in steps {
                let at = model.iter().position(|&f| f == frame);
                match (step, at) {
                    (0, None) => { list.push_back(&arena, frame); model.push_back(frame); }
                    (1, None) => { list.push_front(&arena, frame); model.push_front(frame); }
                    (2, Some(at)) => { list.remove(&arena, frame); model.remove(at); }
                    (3, Some(at)) => {
                        if let Some(new) = (0..8).find(|f| !model.contains(f)) {
                            list.replace(&arena, frame, new);
                            model[at] = new;
                        }
                    }
                    _ => {}
                }
                prop_assert_eq!(contents(&list, &arena), Vec::from(model.clone()));
                prop_assert_eq!(list.front(), model.front().copied());
            }
        }
    }
}
