use std::cell::RefCell;
use std::collections::BTreeMap;

use super::*;
use crate::handle::PoolId;
use crate::zpage::Encoding;

struct Bench {
    arena: Arena,
    zbud: Zbud,
    spare: Option<u32>,
    slots: Places,
}

/// Where each page is.
#[derive(Default)]
struct Places(RefCell<BTreeMap<u64, Placed>>);

impl Slots for Places {
    fn names(&self, owner: Handle, placed: Placed) -> bool {
        self.0.borrow().get(&owner.page()) == Some(&placed)
    }

    fn move_to(&self, owner: Handle, from: Placed, to: Placed) {
        assert_eq!(self.0.borrow_mut().insert(owner.page(), to), Some(from));
    }
}

impl Bench {
    fn new() -> Self {
        Self::of(16)
    }

    fn of(frames: u32) -> Self {
        let arena = Arena::alone(frames, frames).unwrap();
        arena.grow(frames).unwrap();
        let spare = arena.pop();
        Self { arena, zbud: Zbud::new(Use::Persistent), spare, slots: Places::default() }
    }

    /// Puts a zpage of so many bytes in all; the page number is also its contents.
    fn put(&mut self, page: u64, bytes: usize) -> Placed {
        let payload = vec![page as u8; bytes - HEADER_BYTES];
        let header = Header::new(handle(page), Encoding::Lz4, &payload);
        let zpage = [&header.to_bytes()[..], &payload[..]].concat();
        let placed =
            self.zbud.place_beside(&self.arena, false, &zpage, &mut self.spare, &self.slots);
        let placed = placed.unwrap_or_else(|| {
            self.zbud.place_alone(&self.arena, self.arena.pop().unwrap(), &zpage)
        });
        self.slots.0.borrow_mut().insert(page, placed);
        placed
    }

    fn place(&self, page: u64) -> Placed {
        self.slots.0.borrow()[&page]
    }

    fn free(&mut self, page: u64) -> Freed {
        let placed = self.slots.0.borrow_mut().remove(&page).unwrap();
        self.zbud.free(&self.arena, placed)
    }

    /// A page was read; the frame that it left empty.
    fn retire(&mut self, page: u64) -> Option<u32> {
        let Self { arena, zbud, spare, slots } = self;
        let placed = slots.0.borrow()[&page];
        zbud.retire(arena, handle(page), placed, spare, slots, || arena.pop())
    }

    fn oldest(&mut self) -> Option<u32> {
        self.zbud.oldest(&self.arena, &self.slots, 0).map(|(_, frame)| frame)
    }

    fn check(&self, page: u64) {
        let placed = self.place(page);
        let (mut scratch, mut out) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        match self.zbud.fetch(&self.arena, placed, &mut scratch, &mut out) {
            Fetched::Payload(header, bytes) => {
                assert!(header.verify(handle(page), &scratch[..bytes]));
                assert!(scratch[..bytes].iter().all(|&b| b == page as u8));
            }
            _ => panic!("page {page} is not where it was put"),
        }
    }
}

fn handle(page: u64) -> Handle {
    Handle::from_page(PoolId(1), page)
}

#[test]
fn the_fullest_frame_that_fits_is_chosen() {
    let mut bench = Bench::new();
    let roomy = bench.put(1, 1024);
    let tight = bench.put(2, 3500);
    assert_ne!(roomy.frame, tight.frame);
    assert_eq!(bench.put(3, 500).frame, tight.frame);
    assert_eq!(bench.put(4, 500).frame, roomy.frame);
    assert_eq!(bench.zbud.counters().buddied_count, 2);
}

#[test]
#[cfg(not(feature = "seed-zbud"))]
fn a_frame_is_compacted_when_only_its_holes_together_are_large_enough() {
    let mut bench = Bench::new();
    let first = bench.put(1, 1000);
    let (second, third) = (bench.put(2, 1000), bench.put(3, 2000));
    assert!(first.frame == second.frame && second.frame == third.frame);
    bench.free(1);
    let spare = bench.spare.unwrap();
    assert_eq!(bench.put(4, 1072).frame, spare);
    assert_eq!(bench.spare, Some(first.frame));
    for page in 2..=4 {
        assert_eq!(bench.place(page).frame, spare);
        bench.check(page);
    }
    assert_eq!(bench.zbud.counters().compacted_pageframes, 1);
    assert_eq!(bench.zbud.counters().pageframes, 1);
}

#[test]
#[cfg(not(feature = "seed-zbud"))]
fn a_frame_with_a_wrong_header_is_left_alone_until_it_is_empty() {
    for compact in [true, false] {
        let mut bench = Bench::new();
        let first = bench.put(1, 1000);
        let second = bench.put(2, 1000);
        bench.put(3, 2000);
        bench.free(1);
        // The second's header says that it is somebody else's.
        let at = usize::from(second.granule) * GRANULE;
        // SAFETY: the frame is the bench's.
        unsafe { bench.arena.write(second.frame, at, &99u32.to_le_bytes()) };
        if compact {
            assert_ne!(bench.put(4, 1072).frame, first.frame);
        } else {
            assert_eq!(bench.oldest(), None);
            assert_ne!(bench.put(4, 900).frame, first.frame);
        }
        let counters = *bench.zbud.counters();
        assert_eq!((counters.closed_pageframes, counters.pageframes), (1, 2));
        bench.check(3);
        assert_eq!(bench.oldest(), Some(bench.place(4).frame));
        assert_eq!(bench.free(3).frame, None);
        assert_eq!(bench.free(2).frame, Some(first.frame));
        assert_eq!(bench.zbud.counters().closed_pageframes, 0);
        bench.free(4);
        assert_eq!(bench.zbud.counters().pageframes, 0);
    }
}

#[test]
fn the_last_zpage_hands_the_frame_back() {
    let mut bench = Bench::new();
    bench.put(1, 200);
    let second = bench.put(2, 100);
    assert_eq!(bench.free(1).frame, None);
    bench.check(2);
    assert_eq!(bench.free(2).frame, Some(second.frame));
    let counters = *bench.zbud.counters();
    assert_eq!((counters.zpages, counters.zbytes, counters.pageframes), (0, 0, 0));
    assert_eq!((counters.buddied_count, counters.unbuddied_count), (0, 0));
    assert!(bench.oldest().is_none());
}

#[test]
fn a_read_gives_a_second_chance() {
    let mut bench = Bench::new();
    let (first, second) = (bench.put(1, 3000), bench.put(2, 3000));
    assert_eq!(bench.oldest(), Some(first.frame));
    bench.check(1);
    assert_eq!(bench.oldest(), Some(second.frame));
}

#[test]
fn a_put_beside_others_makes_their_frame_recent() {
    let mut bench = Bench::new();
    let (first, second) = (bench.put(1, 3000), bench.put(2, 3500));
    assert_eq!(bench.oldest(), Some(first.frame));
    assert_eq!(bench.put(3, 900).frame, first.frame);
    assert_eq!(bench.oldest(), Some(second.frame));
}

#[test]
#[cfg(not(feature = "seed-zbud"))]
fn what_was_read_is_moved_together_and_goes_first() {
    let mut bench = Bench::new();
    let first = bench.put(1, 1000);
    let (second, third) = (bench.put(2, 1000), bench.put(3, 2000));
    let other = bench.put(4, 3500);
    assert!(first.frame == second.frame && second.frame == third.frame);
    let cumulated = bench.zbud.counters().cumul_zbytes;
    for page in [2, 4] {
        bench.check(page);
        assert_eq!(bench.retire(page), None);
    }
    // One left its frame to the others; the other has its own, and does not fit beside the first.
    let spent = bench.place(2).frame;
    assert!(spent != first.frame && bench.place(4) == other);
    assert_eq!(bench.oldest(), Some(spent));
    bench.check(3);
    assert_eq!(bench.retire(3), None);
    assert_eq!(bench.place(3).frame, spent, "there is room beside the second");
    assert_eq!(bench.retire(1), Some(first.frame), "nothing is left there");
    for page in 1..=4 {
        bench.check(page);
    }
    // What is put comes beside none of them, unless that is asked for.
    let fresh = bench.put(5, 500).frame;
    assert!(fresh != spent && fresh != other.frame);
    let counters = *bench.zbud.counters();
    assert_eq!((counters.zpages, counters.pageframes), (5, 3));
    assert_eq!(counters.cumul_zbytes, cumulated + 512, "what is moved was stored before");
}

#[test]
fn what_is_read_where_such_are_stays_and_may_be_one_of_the_others_again() {
    let mut bench = Bench::new();
    let (first, second) = (bench.put(1, 3000), bench.put(2, 3000));
    bench.put(3, 3000);
    for page in [1, 2] {
        assert_eq!(bench.retire(page), None);
    }
    assert_eq!(bench.oldest(), Some(first.frame));
    assert_eq!(bench.retire(1), None);
    bench.check(1);
    assert_eq!(bench.oldest(), Some(second.frame), "a second chance as everywhere");
    bench.zbud.revive(&bench.arena, second.frame);
    bench.zbud.revive(&bench.arena, first.frame);
    assert_eq!(bench.oldest(), Some(bench.place(3).frame));
    bench.free(3);
    assert_eq!(bench.oldest(), Some(second.frame));
}

#[test]
fn a_raw_page_that_was_read_goes_before_others() {
    let mut bench = Bench::new();
    for page in [1, 2] {
        let contents = [page as u8; PAGE_SIZE];
        let header = Header::new(handle(page), Encoding::Raw, &contents);
        let frame = bench.arena.pop().unwrap();
        let placed = bench.zbud.place_raw(&bench.arena, frame, header, &contents);
        bench.slots.0.borrow_mut().insert(page, placed);
    }
    let read = bench.place(2);
    assert_ne!(bench.oldest(), Some(read.frame));
    assert_eq!(bench.retire(2), None);
    assert_eq!((bench.oldest(), bench.place(2)), (Some(read.frame), read));
    assert_eq!(bench.free(2).frame, Some(read.frame));
    assert_eq!(bench.oldest(), Some(bench.place(1).frame));
}

/// Held, written and let go: it is where it was, and what is in it is not moved meanwhile.
#[test]
fn what_is_held_is_not_moved() {
    let mut bench = Bench::new();
    let first = bench.put(1, 3000);
    let (_, held) = bench.zbud.hold_oldest(&bench.arena, &bench.slots, 0).unwrap();
    assert_eq!((held, bench.retire(1), bench.place(1)), (first.frame, None, first));
    bench.zbud.let_go(&bench.arena, held);
    assert_eq!(bench.retire(1), None);
    bench.zbud.hold_oldest(&bench.arena, &bench.slots, 0).unwrap();
    bench.put(2, 3000);
    bench.zbud.revive(&bench.arena, held);
    bench.zbud.let_go(&bench.arena, held);
    assert_eq!(bench.oldest(), Some(held), "it is one that was read yet");
    assert_eq!(bench.free(1).frame, Some(held));
}

#[test]
fn a_raw_page_fills_its_frame() {
    let mut bench = Bench::new();
    let page = [7; PAGE_SIZE];
    let header = Header::new(handle(5), Encoding::Raw, &page);
    let frame = bench.arena.pop().unwrap();
    let placed = bench.zbud.place_raw(&bench.arena, frame, header, &page);
    assert_ne!(bench.put(6, 20).frame, frame);
    let (mut scratch, mut out) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    match bench.zbud.fetch(&bench.arena, placed, &mut scratch, &mut out) {
        Fetched::Raw(header) => assert!(header.verify(handle(5), &out)),
        _ => panic!("not raw"),
    }
    assert_eq!(bench.zbud.owner(&bench.arena, placed), handle(5));
    let freed = bench.zbud.free(&bench.arena, placed);
    assert_eq!(
        freed,
        Freed { bytes: PAGE_SIZE as u64, raw: true, block: None, frame: Some(frame) }
    );
}

#[test]
fn however_many_copies_were_read_one_of_them_goes() {
    let frames = 2 * lru::SECOND_CHANCES_MAX;
    let mut bench = Bench::of(frames + 1);
    for page in 0..frames.into() {
        bench.put(page, 3500);
    }
    for block in 0..frames {
        let (_, frame) = bench.zbud.hold_oldest(&bench.arena, &bench.slots, 0).unwrap();
        assert_eq!(bench.zbud.let_go_clean(&bench.arena, frame, block), None);
    }
    (0..frames.into()).for_each(|page| bench.check(page));
    let held = bench.zbud.hold_clean(&bench.arena, &bench.slots);
    assert_eq!(held.map(|(_, block)| block), Some(lru::SECOND_CHANCES_MAX));
}
