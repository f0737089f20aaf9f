//! Many processes in a row go on with a log that is nearly full, and each dies before long.
//!
//! What each leaves may not be worse than what it found: else the log has no free segment after some of them, and
//! then nothing can ever be cleaned or written.

use super::*;
use crate::backing::{READER, RESERVE_SEGMENTS};

/// Pages, each of which takes a block: of the smallest log, cleaning has to make nearly all the room there can be.
const HELD: u64 = 2150;

/// How often a put is tried, with all that can be written and cleaned in between.
const TRIES: u32 = 200;

/// Steps of a life that does not end before.
const STEPS: u64 = 400;

/// Where processes die.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Doom {
    /// Anywhere.
    Any,
    /// While slots are made to point at what the cleaner has moved.
    Moving,
}

/// A process, the memory file that it leaves when it dies, and the backing file.
struct Life {
    engine: Engine,
    queue: Queue,
    writeback: Writeback,
    pool: PoolId,
    jobs: Vec<Job>,
    /// What it left, once it is dead.
    left: Rc<RefCell<Option<std::os::fd::OwnedFd>>>,
    is_moving: Rc<Cell<bool>>,
    now: u64,
}

/// What is there from one life to the next.
struct World {
    rng: Rng,
    file: Vec<u8>,
    pages: BTreeMap<u64, Held>,
    /// What a page may also be, whose put was under way.
    also: Option<(u64, Held)>,
}

impl Life {
    fn first(key: Option<&[u8; KEY_BYTES]>) -> Self {
        let tables = TABLES + PAGE_SIZE as u64;
        let limit = Config::limit_min(SHARDS) + tables + FRAMES * FRAME_COST;
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: SHARDS }).unwrap();
        while engine.supply().unwrap().more {}
        let client = engine.create_client().unwrap();
        engine.create_pool(client, PoolKind::Persistent, PAGES).unwrap();
        let writeback = engine.attach_backing(BACKING_BYTES_MIN, key).unwrap();
        Self::over(engine, writeback)
    }

    fn next(left: std::os::fd::OwnedFd) -> Self {
        let prepared = Prepared::new(Store::from_file(left).unwrap()).unwrap();
        let Attached { engine, writeback, recovered } = prepared.attach().unwrap();
        assert_eq!(recovered.damaged, 0);
        Self::over(engine, writeback.unwrap())
    }

    fn over(engine: Engine, writeback: Writeback) -> Self {
        let info = engine.pools()[0];
        let (queue, pool) = (engine.queue(info.client), info.id);
        let (jobs, left, is_moving) = (Vec::new(), Rc::default(), Rc::default());
        Self { engine, queue, writeback, pool, jobs, left, is_moving, now: 0 }
    }

    /// It dies before so many changes of what outlives it.
    fn doom(&self, doom: Doom, mut changes: u64) {
        let (left, is_moving) = (Rc::clone(&self.left), Rc::clone(&self.is_moving));
        let file = self.engine.store().file().try_clone_to_owned().unwrap();
        crash::watch(move |_| {
            if left.borrow().is_some() || doom == Doom::Moving && !is_moving.get() {
                return;
            }
            if changes == 0 {
                *left.borrow_mut() = Some(copy(file.as_fd()));
            }
            changes = changes.saturating_sub(1);
        });
    }

    fn is_dead(&self) -> bool {
        self.left.borrow().is_some()
    }

    fn free(&self) -> u64 {
        self.engine.stats().log.log_segments_free
    }

    /// Begins or ends something on the backing file, if there is anything to be done.
    fn write_back(&mut self, world: &mut World) {
        self.now += 1_000_000;
        if self.jobs.is_empty() || world.rng.one_in(2) {
            let job = self.writeback.next(&self.engine, self.now);
            // What is begun by a dead process is not.
            self.jobs.extend(job.filter(|_| !self.is_dead()));
            return;
        }
        let job = self.jobs.swap_remove(world.rng.below(self.jobs.len() as u64) as usize);
        carry_out(&self.writeback, job, &mut world.file, job.bytes);
        self.is_moving.set(job.is_write && job.unit > READER);
        self.writeback.ended(&self.engine, job.unit, Ok(()), self.now);
        self.is_moving.set(false);
    }

    /// Puts a page, which has to succeed before long.
    fn put(&mut self, world: &mut World, number: u64) {
        let page = Contents::Random(world.rng.next() as u32).page();
        let handle = Handle::from_page(self.pool, number);
        for _ in 0..TRIES {
            world.also = Some((number, Held::Page(Box::new(page))));
            let put = self.engine.put(&mut self.queue, handle, &page);
            if self.is_dead() {
                return;
            }
            world.also = None;
            if put.is_ok() {
                world.pages.insert(number, Held::Page(Box::new(page)));
                return;
            }
            if put == Err(PutError::Full) {
                world.pages.insert(number, Held::Lost);
            }
            for _ in 0..20 {
                self.write_back(world);
                if self.is_dead() {
                    return;
                }
            }
        }
        panic!("nothing can be put any more: {:?}", self.engine.stats());
    }

    fn check(&mut self, world: &mut World) {
        let mut page = [0; PAGE_SIZE];
        for number in 0..HELD {
            let block = |backed| block(&world.file, backed);
            let handle = Handle::from_page(self.pool, number);
            let found = get(&self.engine, &mut self.queue, handle, block, &mut page);
            let also = world.also.take_if(|(also, _)| *also == number);
            if also.is_some_and(|(_, also)| also == found || found == Held::Lost) {
                world.pages.insert(number, found);
            } else {
                assert!(world.pages[&number] == found, "page {number}");
            }
        }
    }

    /// Lives until it dies; what it leaves.
    fn end(mut self, world: &mut World) -> Option<std::os::fd::OwnedFd> {
        for _ in 0..STEPS {
            if self.is_dead() {
                break;
            }
            self.put(world, world.rng.clone().below(HELD));
            world.rng.next();
        }
        crash::unwatch();
        // What was under way when it died may be anything.
        for job in self.jobs.iter().filter(|job| job.is_write) {
            world.file[job.offset as usize..][..job.bytes].fill(0x5a);
        }
        self.left.take()
    }
}

/// So many processes in a row die.
fn live_and_die(seed: u64, doom: Doom, lives: u64, changes: u64) {
    let file = vec![0; BACKING_BYTES_MIN as usize];
    let mut world = World { rng: Rng(seed), file, pages: BTreeMap::new(), also: None };
    let key = world.rng.one_in(2).then_some(&[9; KEY_BYTES]);
    let mut life = Life::first(key);
    for number in 0..HELD {
        life.put(&mut world, number);
    }
    let mut deaths = 0;
    for n in 0..lives {
        life.doom(doom, world.rng.below(changes));
        let file = life.engine.store().file().try_clone_to_owned().unwrap();
        let left = life.end(&mut world);
        deaths += u64::from(left.is_some());
        life = Life::next(left.unwrap_or(file));
        let reserve = u64::from(RESERVE_SEGMENTS);
        assert!(life.free() >= reserve, "{doom:?} {n}: {} segments are free", life.free());
        life.check(&mut world);
    }
    assert!(deaths > lives / 2, "{deaths} of {lives} died");
    // All is as it was: everything can be written anew, and so it goes through the log and its cleaner.
    for number in (0..HELD).chain(0..HELD) {
        life.put(&mut world, number);
    }
    let cleaned = life.engine.stats().log.log_cleaned_segments;
    assert!(cleaned > 10, "{cleaned} segments were cleaned");
    life.check(&mut world);
}

#[test]
fn however_many_die_in_a_row_a_full_log_is_cleaned() {
    (0..2).for_each(|seed| live_and_die(seed, Doom::Any, 100, 4_000));
}

#[test]
fn however_many_die_while_they_clean_the_log_is_cleaned_by_the_next() {
    (0..2).for_each(|seed| live_and_die(seed, Doom::Moving, 60, 300));
}
