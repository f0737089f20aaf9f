//! How it begins: a process dies while it makes an engine, or attaches a backing file; and an attach that cannot get
//! what it needs.

use std::os::fd::OwnedFd;

use super::*;
use crate::region::faults;

const HELD: u64 = 60;

fn config() -> Config {
    let tables = TABLES + 2 * PAGE_SIZE as u64;
    let limit = Config::limit_min(SHARDS) + tables + FRAMES * FRAME_COST;
    Config { limit, limit_max: 2 * limit, shards: SHARDS }
}

/// What a process leaves that dies at any moment of this, with where that is.
fn left(store: &Store, what: impl FnOnce()) -> Vec<(OwnedFd, String)> {
    let file = store.file().try_clone_to_owned().unwrap();
    let all = Rc::new(RefCell::new(Vec::new()));
    let to = Rc::clone(&all);
    crash::watch(move |place| to.borrow_mut().push((copy(file.as_fd()), place.to_string())));
    what();
    crash::unwatch();
    all.take()
}

fn page(number: u64) -> Page {
    match number % 3 {
        0 => Contents::Mixed { seed: number as u32, noise: 900 }.page(),
        _ => Contents::Random(number as u32).page(),
    }
}

fn filled() -> Engine {
    let engine = Engine::new(&config()).unwrap();
    fill(&engine);
    engine
}

fn fill(engine: &Engine) {
    let client = engine.create_client().unwrap();
    engine.create_pool(client, PoolKind::Persistent, PAGES).unwrap();
    while engine.supply().unwrap().more {}
    let info = engine.pools()[0];
    let mut queue = engine.queue(info.client);
    for number in 0..HELD {
        engine.put(&mut queue, Handle::from_page(info.id, number), &page(number)).unwrap();
    }
}

/// Writes more than there is memory for, and finds all of it.
fn use_all(engine: &Engine, writeback: &mut Writeback, held: u64, what: &str) {
    let info = engine.pools()[0];
    let mut queue = engine.queue(info.client);
    let mut file = vec![0; BACKING_BYTES_MIN as usize];
    let mut now = 0;
    let more = held + 3 * FRAMES;
    for number in held..more {
        let at = Handle::from_page(info.id, number);
        for attempt in 0.. {
            match engine.put(&mut queue, at, &page(number)) {
                Ok(()) => break,
                put => assert!(put == Err(PutError::Starved) && attempt < 100, "{what}: {put:?}"),
            }
            now += 1_000_000;
            while let Some(job) = writeback.next(engine, now) {
                carry_out(writeback, job, &mut file, job.bytes);
                writeback.ended(engine, job.unit, Ok(()), now);
            }
            engine.supply().unwrap();
        }
    }
    let mut found = [0; PAGE_SIZE];
    for number in 0..more {
        let at = Handle::from_page(info.id, number);
        let held = get(engine, &mut queue, at, |backed| block(&file, backed), &mut found);
        assert!(held == Held::Page(Box::new(page(number))), "{what}: page {number}");
    }
}

#[test]
fn a_process_may_die_while_it_makes_an_engine() {
    let store = Store::new().unwrap();
    let of = store.clone();
    let all = left(&store, || drop(Engine::create(&config(), of).unwrap()));
    let mut empty = 0;
    for (file, place) in all {
        let store = Store::from_file(file).unwrap();
        let engine = if store.is_empty() {
            empty += 1;
            // What was being written of the header may be anything but the magic.
            rustix::io::pwrite(store.file(), &[7; 13], 8).unwrap();
            assert!(matches!(Prepared::new(store.clone()).err(), Some(AttachError::Empty)));
            Engine::create(&config(), store).unwrap()
        } else {
            let attached = Prepared::new(store).unwrap().attach().unwrap();
            assert_eq!(attached.recovered.pages, 0);
            attached.engine
        };
        assert_eq!(engine.limit(), config().limit, "{place}");
        while engine.supply().unwrap().more {}
        let client = engine.create_client().unwrap();
        engine.create_pool(client, PoolKind::Persistent, PAGES).unwrap();
        let mut writeback = engine.attach_backing(BACKING_BYTES_MIN, None).unwrap();
        use_all(&engine, &mut writeback, 0, &place);
    }
    assert!(empty > 2, "it was empty {empty} times");
}

#[test]
fn a_process_may_die_while_it_attaches_a_backing_file() {
    let engine = filled();
    let key = Some(&[3; KEY_BYTES]);
    let attach = || drop(engine.attach_backing(BACKING_BYTES_MIN, key).unwrap());
    let (mut with, mut without) = (0, 0);
    for (file, place) in left(engine.store(), attach) {
        let prepared = Prepared::new(Store::from_file(file).unwrap()).unwrap();
        let Attached { engine, writeback, recovered } = prepared.attach().unwrap();
        assert_eq!((recovered.pages, recovered.damaged), (HELD, 0), "{place}");
        *if writeback.is_some() { &mut with } else { &mut without } += 1;
        let again = || engine.attach_backing(BACKING_BYTES_MIN, key).unwrap();
        let mut writeback = writeback.unwrap_or_else(again);
        use_all(&engine, &mut writeback, HELD, &place);
    }
    assert!(with > 0 && without > 5, "{with} with a log, {without} without");
}

#[test]
fn a_limit_that_does_not_fit_takes_nothing_more_in_until_it_is_raised() {
    let least = Config::limit_min(SHARDS);
    for limit in [0, 1, least, least + PAGE_SIZE as u64, 2 * config().limit + 1, u64::MAX] {
        let whole = filled();
        whole.store().set_limit(limit);
        let file = copy(whole.store().file());
        let prepared = Prepared::new(Store::from_file(file).unwrap()).unwrap();
        let Attached { engine, recovered, .. } = prepared.attach().unwrap();
        assert_eq!((recovered.pages, recovered.damaged), (HELD, 0), "{limit}");
        let info = engine.pools()[0];
        let made = engine.create_pool(info.client, PoolKind::Persistent, PAGES);
        let is_too_low = limit < least + 4 * PAGE_SIZE as u64;
        assert_eq!(made.is_err(), is_too_low, "{limit}: {made:?}");
        // What frees room is no reason to fail.
        engine.destroy_pool(info.id).unwrap();
        engine.set_limit(config().limit).unwrap();
        let client = engine.create_client().unwrap();
        engine.create_pool(client, PoolKind::Persistent, PAGES).unwrap();
    }
}

/// Whoever gets it may pass it on as any error.
const _: fn() = || {
    fn is_error<T: std::error::Error + Send + Sync + 'static>() {}
    is_error::<AttachFailed>();
};

#[test]
fn what_an_attach_cannot_get_it_may_get_later() {
    for calls in 0..100 {
        let engine = Engine::new(&config()).unwrap();
        let file = engine.store().file().try_clone_to_owned().unwrap();
        let prepared = Prepared::new(Store::from_file(file).unwrap()).unwrap();
        // What there was not when it was prepared, it has to get.
        fill(&engine);
        drop(engine.attach_backing(BACKING_BYTES_MIN, None).unwrap());
        drop(engine);
        faults::after(calls);
        let failed = prepared.attach();
        faults::never();
        let failed = match failed {
            Ok(_) => {
                assert!(calls > 4, "{calls} calls were made");
                return;
            }
            Err(failed) => failed,
        };
        assert!(matches!(failed.error, AttachError::Memory { .. }), "{failed:?}");
        let prepared = failed.prepared;
        let Attached { engine, writeback, recovered } = prepared.attach().unwrap();
        assert_eq!((recovered.pages, recovered.damaged), (HELD, 0));
        use_all(&engine, &mut writeback.unwrap(), HELD, "after a failure");
    }
    panic!("it always fails");
}
