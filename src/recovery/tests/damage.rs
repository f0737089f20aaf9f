//! A memory file is damaged, and a process shall go on from it.
//!
//! It may refuse. If it goes on, a page is what it was, or lost, or an error; and whatever is done then with it all
//! ends well. (What a slot word alone says has no check: a word that fills a page, and that there is no page.)

use std::os::fd::OwnedFd;

use super::*;
use crate::store::AttachError;

/// Memory files that are damaged, and places in each.
const FILES: u64 = 1500;
const PLACES: u64 = 6;

/// Pages of each pool that are held, at first.
const HELD: u64 = 700;

/// A memory file that is not damaged, its backing file, and what is in both.
struct Whole {
    store: OwnedFd,
    file: Vec<u8>,
    pools: Vec<PoolId>,
    pages: BTreeMap<Name, Page>,
    /// Where 4 KiB of memory are, and the first that is a frame.
    memory: Vec<u64>,
    first_frame: usize,
}

impl Whole {
    fn new(keep_copies: bool) -> Self {
        let mut sim = Sim::new(7, true, keep_copies);
        for number in 0..HELD {
            for pool in 0..3 {
                let contents = match number % 3 {
                    0 => Contents::Random(number as u32),
                    _ => Contents::Mixed { seed: number as u32, noise: 700 + 40 * pool },
                };
                let id = sim.map.borrow().pools[pool].unwrap();
                let handle = Handle::from_page(id, number);
                sim.put_page((pool, number), handle, contents.page());
            }
            sim.now += 100_000_000;
            (0..6).for_each(|_| sim.write_back());
            // Some are dead in the log.
            let at = Handle::from_page(sim.map.borrow().pools[0].unwrap(), number / 2);
            if number % 7 == 0 {
                sim.engine.flush_page(at);
                sim.map.borrow_mut().pages.remove(&(0, number / 2));
            }
        }
        let log = sim.engine.stats().log;
        assert!(log.log_live_bytes > 300 << 12, "{log:?}");
        let mut whole = Self::of(&sim);
        // Ephemeral ones may have gone.
        let mut all = Damaged::new(&whole, copy(whole.store.as_fd()), Rng(1)).unwrap();
        let names =
            whole.pages.keys().copied().filter(|name| all.is_right(*name)).collect::<Vec<_>>();
        drop(all);
        whole.pages.retain(|name, _| names.contains(name));
        whole
    }

    fn of(sim: &Sim) -> Self {
        let store = copy(sim.engine.store().file());
        let arena = Store::arena_at(sim.engine.store().geometry().unwrap().frames_max);
        let mut memory = Vec::new();
        let mut at = 0;
        while let Ok(first) = rustix::fs::seek(&store, SeekFrom::Data(at)) {
            at = rustix::fs::seek(&store, SeekFrom::Hole(first)).unwrap();
            memory.extend((first..at).step_by(PAGE_SIZE));
        }
        let first_frame = memory.partition_point(|at| *at < arena);
        let map = sim.map.borrow();
        let page = |(name, held): (&Name, &Held)| match held {
            Held::Page(page) => Some((*name, **page)),
            _ => None,
        };
        let pages = map.pages.iter().filter_map(page).collect();
        let file = Left::of(&map).read(0, map.file.len());
        let pools = map.pools.iter().copied().flatten().collect();
        Self { store, file, pools, pages, memory, first_frame }
    }

    /// A word of the memory file, of a table more often than of a frame; mostly one that is not zero.
    fn place(&self, rng: &mut Rng) -> u64 {
        let tables = self.first_frame as u64;
        let of =
            if rng.one_in(3) { rng.below(self.memory.len() as u64) } else { rng.below(tables) };
        let page = self.memory[of as usize];
        let mut words = [0; PAGE_SIZE];
        rustix::io::pread(&self.store, &mut words, page).unwrap();
        let at = rng.below(512) as usize;
        let is_zero = |at: &usize| words[8 * at..][..8] == [0; 8];
        let from = if rng.one_in(4) { at } else { (at..512).find(|at| !is_zero(at)).unwrap_or(at) };
        page + 8 * from as u64
    }
}

/// Damages a word.
fn damage(file: &OwnedFd, at: u64, rng: &mut Rng) {
    let mut bytes = [0; 8];
    rustix::io::pread(file, &mut bytes, at).unwrap();
    let word = u64::from_le_bytes(bytes);
    let halves = [word as u32, (word >> 32) as u32];
    let joined = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let word = match rng.below(7) {
        0..3 => word ^ 1 << rng.below(64),
        3 => rng.next() << 11 ^ rng.next(),
        4 => joined(rng.below(600) as u32, halves[1]),
        5 => joined(halves[0], rng.below(600) as u32),
        _ => [0, u64::MAX, word.swap_bytes(), word.wrapping_add(1)][rng.below(4) as usize],
    };
    rustix::io::pwrite(file, &word.to_le_bytes(), at).unwrap();
}

/// Whether one word fills a page.
fn is_filled(page: &Page) -> bool {
    page.chunks_exact(4).all(|word| word == &page[..4])
}

/// Goes on with what is left of a damaged memory file.
struct Damaged<'a> {
    whole: &'a Whole,
    engine: Engine,
    queue: Queue,
    writeback: Option<Writeback>,
    file: Vec<u8>,
    rng: Rng,
}

impl<'a> Damaged<'a> {
    fn new(whole: &'a Whole, store: OwnedFd, rng: Rng) -> Result<Self, AttachError> {
        let Attached { engine, writeback, recovered } =
            Prepared::new(Store::from_file(store)?)?.attach()?;
        assert_eq!(recovered.frames, engine.arena.backed(), "frames that have memory");
        let client = engine.pools().first().map_or(ClientId(0), |info| info.client);
        let (queue, file) = (engine.queue(client), whole.file.clone());
        Ok(Self { whole, engine, queue, writeback, file, rng })
    }

    /// Gets a page; none if that is an error.
    fn get(&mut self, at: Handle) -> Option<Held> {
        let mut page = [0; PAGE_SIZE];
        let mut got = self.engine.get(&mut self.queue, at, &mut page);
        for _ in 0..3 {
            let Ok(Got::Backed(backed)) = got else { break };
            let (mut block, mut opened) = (block(&self.file, backed), Opened::default());
            let image = Image::new(&mut block, &mut opened);
            got = self.engine.get_backed(&mut self.queue, at, backed, image, &mut page);
        }
        match got {
            Ok(Got::Hit) => Some(Held::Page(Box::new(page))),
            Ok(Got::Miss) => Some(Held::Nothing),
            Ok(Got::Backed(_)) => panic!("{at:?} is told to be elsewhere for ever"),
            Err(_) => None,
        }
    }

    fn is_right(&mut self, name: Name) -> bool {
        let found = self.get(Handle::from_page(self.whole.pools[name.0], name.1));
        matches!(found, Some(Held::Page(found)) if *found == self.whole.pages[&name])
    }

    /// Pages that are right, and others.
    fn check_pages(&mut self, what: &str) -> (u64, u64) {
        let (mut right, mut gone) = (0, 0);
        for (name, page) in &self.whole.pages {
            match self.get(Handle::from_page(self.whole.pools[name.0], name.1)) {
                Some(Held::Page(found)) if *found == *page => right += 1,
                Some(Held::Page(found)) => assert!(is_filled(&found), "{what}: page {name:?}"),
                _ => gone += 1,
            }
        }
        (right, gone)
    }

    fn work(&mut self) {
        let mut now = 0;
        for _ in 0..200 {
            let pool = self.whole.pools[self.rng.below(3) as usize];
            let at = Handle::from_page(pool, self.rng.below(HELD));
            let seed = self.rng.next() as u32;
            let page = Contents::Mixed { seed, noise: self.rng.below(4000) as usize }.page();
            match self.rng.below(4) {
                0 => drop(self.engine.flush_page(at)),
                _ => drop(self.engine.put(&mut self.queue, at, &page)),
            }
            self.write_back(&mut now);
        }
        self.engine.supply().unwrap();
        self.engine.settle().unwrap();
    }

    fn write_back(&mut self, now: &mut u64) {
        let Some(writeback) = &mut self.writeback else { return };
        for _ in 0..8 {
            *now += 1_000_000;
            let Some(job) = writeback.next(&self.engine, *now) else { break };
            carry_out(writeback, job, &mut self.file, job.bytes);
            writeback.ended(&self.engine, job.unit, Ok(()), *now);
        }
    }

    /// Removes all that is there.
    fn empty(self) {
        for info in self.engine.pools() {
            self.engine.flush_range(info.id, 0, u64::MAX);
            self.engine.destroy_pool(info.id).unwrap();
        }
        let stats = self.engine.stats();
        let frames = stats.frames;
        assert_eq!((frames.frames_persistent, frames.frames_ephemeral), (0, 0));
        assert_eq!(stats.log.log_live_bytes, 0);
    }
}

fn damage_many(keep_copies: bool, seed: u64) {
    let whole = Whole::new(keep_copies);
    let (mut refused, mut right, mut gone) = (0, 0, 0);
    for n in 0..FILES {
        let what = format!("seed {seed}, file {n}");
        let mut rng = Rng(seed << 32 | n);
        rng.next();
        let store = copy(whole.store.as_fd());
        for _ in 0..=rng.below(PLACES) {
            damage(&store, whole.place(&mut rng), &mut rng);
        }
        match Damaged::new(&whole, store, rng) {
            Ok(mut damaged) => {
                let found = damaged.check_pages(&what);
                (right, gone) = (right + found.0, gone + found.1);
                damaged.work();
                damaged.empty();
            }
            Err(AttachError::Memory { source }) => panic!("{what}: {source}"),
            Err(_) => refused += 1,
        }
    }
    println!("of {FILES}, {refused} were refused; of the pages {right} were right, {gone} gone");
    assert!(refused > 5 && refused < FILES / 2, "{refused} were refused");
    assert!(right > 20 * gone && gone > 0, "{right} pages were right, {gone} gone");
}

#[test]
fn a_damaged_memory_file_is_refused_or_what_is_damaged_is_an_error() {
    damage_many(false, 1);
}

#[test]
fn so_it_is_where_copies_are_kept() {
    damage_many(true, 2);
}
