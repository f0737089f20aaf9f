//! Random requests at any alignment, on two connections at the same time, against a plain array.
//!
//! The seed of a run is printed; `TMEM_NBD_SEED` sets it.

use std::ops::Range;
use std::thread;

use crate::client::Client;
use crate::fuzzing::spec::*;
use crate::served::{PLACES, ROOM, Served};

const PAGE: usize = 4096;
/// Bytes of a connection's region: more than a reply's buffer holds.
const REGION: usize = 64 * PAGE;
/// Both regions always fit into [`ROOM`], whatever is written.
const PLAN: (&str, u64, bool) = ("swap0", 2 * (REGION / PAGE) as u64, true);
const STEPS: usize = 1500;

/// Random numbers.
struct Dice(u64);

impl Dice {
    fn from_environment() -> Self {
        let chosen = std::env::var("TMEM_NBD_SEED").ok().map(|text| text.parse().unwrap());
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
        let seed = chosen.unwrap_or(now);
        println!("TMEM_NBD_SEED={seed}");
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A part of `whole`: mostly short, now and then nearly all of it, often along pages.
    fn part(&mut self, whole: &Range<usize>) -> Range<usize> {
        let longest = [600, 3 * PAGE, 20 * PAGE, whole.len()][self.below(4)].min(whole.len());
        let length = self.below(longest + 1);
        let start = whole.start + self.below(whole.len() - length + 1);
        let part = start..start + length;
        let aligned = start.next_multiple_of(PAGE)..part.end / PAGE * PAGE;
        let is_good = aligned.start >= whole.start && aligned.start < aligned.end;
        if is_good && self.below(3) == 0 { aligned } else { part }
    }

    fn data(&mut self, bytes: usize) -> Vec<u8> {
        let fill = self.next() as u8;
        match self.below(4) {
            0 => vec![0; bytes],
            1 => vec![fill; bytes],
            2 => (0..bytes).map(|at| fill ^ (at / 24) as u8).collect(),
            _ => std::iter::repeat_with(|| self.next() as u8).take(bytes).collect(),
        }
    }
}

/// What a region must hold.
struct Model {
    /// Of the whole device; only what is in the region counts.
    bytes: Vec<u8>,
    /// Pages of which nothing is stored.
    holes: Vec<bool>,
}

impl Model {
    fn new() -> Self {
        Self { bytes: vec![0; 2 * REGION], holes: vec![true; 2 * REGION / PAGE] }
    }

    /// Notes that a run of bytes is stored.
    fn store(&mut self, part: &Range<usize>, data: &[u8]) {
        self.bytes[part.clone()].copy_from_slice(data);
        part.clone().for_each(|at| self.holes[at / PAGE] = false);
    }

    /// Notes that the whole pages of a run of bytes are dropped.
    fn drop_pages(&mut self, part: &Range<usize>) {
        for page in part.start.div_ceil(PAGE)..part.end / PAGE {
            self.bytes[page * PAGE..(page + 1) * PAGE].fill(0);
            self.holes[page] = true;
        }
    }

    /// Makes a run of bytes zeros, of which as little is stored as can be.
    fn punch(&mut self, part: &Range<usize>) {
        // What was a hole stays one, and what was not is stored as before.
        self.bytes[part.clone()].fill(0);
        self.drop_pages(part);
    }

    fn is_zero(&self, page: usize) -> bool {
        self.bytes[page * PAGE..(page + 1) * PAGE].iter().all(|byte| *byte == 0)
    }

    /// What BLOCK_STATUS must say of a part that is not empty.
    fn extents(&self, part: &Range<usize>) -> Vec<(u32, u32)> {
        let mut extents: Vec<(u32, u32)> = Vec::new();
        let mut at = part.start;
        while at < part.end {
            let page = at / PAGE;
            let end = part.end.min((page + 1) * PAGE);
            let state = match (self.holes[page], self.is_zero(page)) {
                (true, _) => STATE_HOLE | STATE_ZERO,
                (false, true) => STATE_ZERO,
                (false, false) => 0,
            };
            let length = (end - at) as u32;
            match extents.last_mut() {
                Some((sum, last)) if *last == state => *sum += length,
                _ => extents.push((length, state)),
            }
            at = end;
        }
        extents
    }

    /// Checks what BLOCK_STATUS says, from the first extent to the last of a part that is not empty.
    fn check_status(&self, client: &mut Client, part: &Range<usize>) {
        let (mut at, mut found) = (part.start, Vec::new());
        while at < part.end {
            let extents = client.block_status(0, at as u64, (part.end - at) as u32).unwrap();
            at += extents.iter().map(|(length, _)| *length as usize).sum::<usize>();
            assert!(!extents.is_empty() && at <= part.end, "{part:?}: {extents:?}");
            found.push(extents);
        }
        // One reply may end anywhere, and the next goes on with the same state.
        let mut joined: Vec<(u32, u32)> = Vec::new();
        for (length, state) in found.concat() {
            match joined.last_mut() {
                Some((sum, last)) if *last == state => *sum += length,
                _ => joined.push((length, state)),
            }
        }
        assert_eq!(joined, self.extents(part), "{part:?}");
        assert!(found.len() <= 8, "{} replies for {} extents", found.len(), joined.len());
    }

    /// One random request on a part of `region`, here and there.
    fn step(&mut self, client: &mut Client, dice: &mut Dice, region: &Range<usize>, whole: bool) {
        let part = dice.part(region);
        let (at, length) = (part.start as u64, part.len() as u32);
        match dice.below(10) {
            0..4 => {
                let data = dice.data(part.len());
                assert_eq!(client.write(at, &data), 0, "{part:?}");
                self.store(&part, &data);
            }
            4 if whole => {
                assert_eq!(client.plain(CMD_TRIM, 0, at, length), 0, "{part:?}");
                self.drop_pages(&part);
            }
            5 | 6 => {
                let flags = [0, FLAG_NO_HOLE][dice.below(2)];
                assert_eq!(client.plain(CMD_WRITE_ZEROES, flags, at, length), 0, "{part:?}");
                match flags {
                    0 => self.punch(&part),
                    _ => self.store(&part, &vec![0; part.len()]),
                }
            }
            7 if whole && client.is_structured() && !part.is_empty() => {
                self.check_status(client, &part);
            }
            _ => {
                let flags = if client.is_structured() && dice.below(2) == 0 { FLAG_DF } else { 0 };
                let found = client.read_with(flags, at, length).unwrap();
                assert!(found == self.bytes[part.clone()], "{part:?} read as something else");
            }
        }
    }
}

fn client(served: &Served, structured: bool) -> Client {
    match structured {
        false => Client::simple(served, "swap0"),
        true => Client::structured(served, "swap0"),
    }
}

/// Lets two connections do so many steps each, at the same time, on what `regions` gives them.
fn both(
    served: &Served,
    dice: &mut Dice,
    whole: bool,
    regions: impl Fn(usize, &mut Dice) -> Range<usize> + Copy + Send + Sync,
) -> [Model; 2] {
    const { assert!(PLACES > 2) };
    thread::scope(|scope| {
        let run = |number: usize| {
            let mut dice = Dice(dice.next());
            let mut client = client(served, dice.below(2) == number);
            scope.spawn(move || {
                let mut model = Model::new();
                for _ in 0..STEPS {
                    let region = regions(number, &mut dice);
                    model.step(&mut client, &mut dice, &region, whole);
                }
                model
            })
        };
        [0, 1].map(run).map(|thread| thread.join().unwrap())
    })
}

#[test]
fn two_connections_on_regions_of_their_own() {
    let mut dice = Dice::from_environment();
    for workers in [1, 2] {
        let served = Served::with(&[PLAN], ROOM, workers);
        let region = |number: usize| number * REGION..(number + 1) * REGION;
        let models = both(&served, &mut dice, true, |number, _| region(number));
        let mut client = client(&served, true);
        for (number, model) in models.iter().enumerate() {
            let all = region(number);
            let found = client.read(all.start as u64, REGION as u32).unwrap();
            assert!(found == model.bytes[all.clone()], "region {number} is not as it was left");
            model.check_status(&mut client, &all);
        }
    }
}

/// Bytes of the slots that belong to the two connections by turns: several to a page, and over the
/// edges of pages.
const SLOT: usize = 700;

#[test]
fn two_connections_on_neighbouring_parts_of_the_same_pages() {
    let mut dice = Dice::from_environment();
    for workers in [1, 2] {
        let served = Served::with(&[PLAN], ROOM, workers);
        // Few pages, so that the two meet.
        let slots = 8 * PAGE / SLOT;
        let slot = |number: usize| number * SLOT..(number + 1) * SLOT;
        let models = both(&served, &mut dice, false, |number, dice| {
            slot(dice.below(slots / 2) * 2 + number)
        });
        let found = client(&served, false).read(0, (slots * SLOT) as u32).unwrap();
        for number in 0..slots / 2 * 2 {
            let expected = &models[number % 2].bytes[slot(number)];
            assert!(found[slot(number)] == *expected, "slot {number} is not as it was left");
        }
    }
}

/// Writes parts of the first page, many in one send, wherever `is_mine` says, and checks after each
/// send that they are all there.
fn hammer(mut client: Client, mut dice: Dice, is_mine: impl Fn(usize) -> bool) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    for _ in 0..150 {
        let mut all = Vec::new();
        for cookie in 0..60 {
            let slot = dice.below(PAGE / 64);
            let slot = if is_mine(slot) { slot } else { slot ^ 1 };
            let part = dice.part(&(slot * 64..(slot + 1) * 64));
            let data = dice.data(part.len());
            page[part.clone()].copy_from_slice(&data);
            all.extend(request(0, CMD_WRITE, cookie, part.start as u64, part.len() as u32));
            all.extend(data);
        }
        client.send(&all);
        (0..60).for_each(|cookie| assert_eq!(client.error_of(cookie), 0));
        let found = client.read(0, PAGE as u32).unwrap();
        let is_right = |at: &usize| !is_mine(at / 64) || found[*at] == page[*at];
        assert_eq!((0..PAGE).find(|at| !is_right(at)), None, "a write was undone by another");
    }
    page
}

#[test]
fn two_connections_lose_nothing_of_one_page() {
    let mut dice = Dice::from_environment();
    let served = Served::with(&[PLAN], ROOM, 2);
    let pages = thread::scope(|scope| {
        let run = |number: usize| {
            let (client, dice) = (client(&served, number == 1), Dice(dice.next()));
            scope.spawn(move || hammer(client, dice, |slot| slot % 2 == number))
        };
        [0, 1].map(run).map(|thread| thread.join().unwrap())
    });
    let found = client(&served, false).read(0, PAGE as u32).unwrap();
    let expected: Vec<u8> = (0..PAGE).map(|at| pages[at / 64 % 2][at]).collect();
    assert!(found == expected, "the page is not as it was left");
}
