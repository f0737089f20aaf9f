//! Changing a part of a page: read, modify and write as one operation.
//!
//! All of it happens under the shard's lock, compressing too, so that it has its place in the order
//! of everything else that is done to the page: two updates of one page are both in it afterwards.
//! That holds the shard up for as long as compressing takes; aligned I/O never comes here.

use crate::clock;
use crate::engine::Engine;
use crate::error::{GetError, PutError, UpdateError};
use crate::handle::{Handle, PAGE_SIZE, Page, PoolKind};
use crate::queue::{Queue, Restored};
use crate::shard::{Hand, Refused, Shard, Unpacked};
use crate::stats::PoolCounters;

impl Engine {
    /// Lets `edit` change a page of a persistent pool; one that is not there is zeros. `edit` may be
    /// called several times, each time with the page as it is then, and only the last counts.
    ///
    /// When it fails, whatever the error, the page stays as it was: unlike a put's, its older copy
    /// holds more than what was to be replaced. So it cannot make room for the new one, either.
    pub fn update(
        &self,
        queue: &mut Queue,
        handle: Handle,
        mut edit: impl FnMut(&mut Page),
    ) -> Result<(), UpdateError> {
        let start = clock::now();
        let mut hand = Hand::default();
        let result = self.update_with(queue, handle, &mut edit, &mut hand);
        hand.put_back(&self.arena);
        if matches!(result, Ok(()) | Err(UpdateError::Put(PutError::Full))) {
            queue.latencies.put.record(self.clock.since(start));
        }
        result
    }

    fn update_with(
        &self,
        queue: &mut Queue,
        handle: Handle,
        edit: &mut impl FnMut(&mut Page),
        hand: &mut Hand,
    ) -> Result<(), UpdateError> {
        let mut page = [0; PAGE_SIZE];
        loop {
            let mut shard = self.shard(handle);
            read(&mut shard, queue, handle, &mut page)?;
            edit(&mut page);
            match shard.put(handle, queue.pack(handle, &page), hand) {
                Ok(()) => return Ok(()),
                Err(Refused::NoPage) => return Err(PutError::NoPage.into()),
                Err(Refused::NoFrame) => {}
            }
            drop(shard);
            let frame = if hand.is_full() { None } else { self.frame_of_others(handle) };
            let Some(frame) = frame else { break };
            hand.add(frame);
        }
        let is_full = self.is_full();
        let mut shard = self.shard(handle);
        if is_full {
            shard.refuse_put(handle);
            return Err(PutError::Full.into());
        }
        shard.count(handle, |counters| counters.starved_puts += 1);
        Err(PutError::Starved.into())
    }
}

/// Reads a page of a persistent pool, with its shard's lock held.
fn read(
    shard: &mut Shard,
    queue: &mut Queue,
    handle: Handle,
    page: &mut Page,
) -> Result<(), UpdateError> {
    // A get from an ephemeral pool would take the page out.
    if shard.kind(handle) != Some(PoolKind::Persistent) {
        return Err(PutError::NoPage.into());
    }
    let (unpacked, _) = shard.get(handle, &mut queue.scratch, page, false)?;
    if let Unpacked::Backed(backed) = unpacked {
        return Err(UpdateError::Backed(backed));
    }
    match queue.restore(handle, &unpacked, page) {
        Restored::Hit => Ok(()),
        Restored::Miss => {
            page.fill(0);
            Ok(())
        }
        Restored::FoundCorrupt => Err(GetError::Corrupt.into()),
        Restored::Corrupt => {
            shard.count(handle, PoolCounters::count_corrupt);
            Err(GetError::Corrupt.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::FRAME_COST;
    use crate::{Config, Got, PoolId};

    const FRAMES: u64 = 16;

    fn engine(kind: PoolKind) -> (Engine, Queue, PoolId) {
        // With room for the pool's directory.
        let limit = Config::limit_min(2) + FRAMES * FRAME_COST + PAGE_SIZE as u64;
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: 2 }).unwrap();
        let client = engine.create_client().unwrap();
        let pool = engine.create_pool(client, kind, 4096).unwrap();
        let queue = engine.queue(client);
        (engine, queue, pool)
    }

    fn get(engine: &Engine, queue: &mut Queue, handle: Handle) -> Page {
        let mut page = [0; PAGE_SIZE];
        assert_eq!(engine.get(queue, handle, &mut page), Ok(Got::Hit));
        page
    }

    fn noise(seed: u64) -> Page {
        let mut state = seed << 1 | 1;
        let mut page = [0; PAGE_SIZE];
        for word in page.as_chunks_mut::<8>().0 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *word = (state ^ state >> 32).to_le_bytes();
        }
        page
    }

    #[test]
    fn a_part_changes_and_the_rest_stays() {
        let (engine, mut queue, pool) = engine(PoolKind::Persistent);
        while engine.supply().unwrap().more {}
        let handle = Handle::from_page(pool, 700);
        engine.update(&mut queue, handle, |page| page[10..20].fill(1)).unwrap();
        let mut expected = [0; PAGE_SIZE];
        expected[10..20].fill(1);
        assert_eq!(get(&engine, &mut queue, handle), expected);

        expected = noise(3);
        engine.put(&mut queue, handle, &expected).unwrap();
        engine.update(&mut queue, handle, |page| page[4095] = 9).unwrap();
        expected[4095] = 9;
        assert_eq!(get(&engine, &mut queue, handle), expected);
        assert_eq!(engine.pool_stats(pool).unwrap().huge_pages, 1);
    }

    #[test]
    fn what_cannot_be_read_cannot_be_updated() {
        let (engine, mut queue, pool) = engine(PoolKind::Persistent);
        let handle = Handle::from_page(pool, 1);
        engine.lose(handle);
        let lost = engine.update(&mut queue, handle, |_| panic!("there is nothing to edit"));
        assert_eq!(lost, Err(GetError::Lost.into()));
        engine.destroy_pool(pool).unwrap();
        let gone = engine.update(&mut queue, handle, |_| panic!("there is nothing to edit"));
        assert_eq!(gone, Err(PutError::NoPage.into()));
        let (engine, mut queue, pool) = self::engine(PoolKind::Ephemeral);
        let handle = Handle::from_page(pool, 1);
        let ephemeral = engine.update(&mut queue, handle, |_| panic!("it may vanish"));
        assert_eq!(ephemeral, Err(PutError::NoPage.into()));
    }

    #[test]
    fn an_update_that_fails_changes_nothing() {
        let (engine, mut queue, pool) = engine(PoolKind::Persistent);
        let handle = Handle::from_page(pool, 1);
        let starved = engine.update(&mut queue, handle, |page| *page = noise(1));
        assert_eq!(starved, Err(PutError::Starved.into()));
        while engine.supply().unwrap().more {}
        engine.put(&mut queue, handle, &noise(1)).unwrap();
        let others = (2..).take_while(|&page| {
            engine.put(&mut queue, Handle::from_page(pool, page), &noise(page)).is_ok()
        });
        assert!((4..=FRAMES).contains(&(others.count() as u64)));
        let refused = engine.update(&mut queue, handle, |page| page[0] ^= 7);
        assert_eq!(refused, Err(PutError::Full.into()));
        assert_eq!(get(&engine, &mut queue, handle), noise(1));
        assert_eq!(engine.pool_stats(pool).unwrap().starved_puts, 1);
        // What takes no frame is not refused.
        engine.update(&mut queue, handle, |page| page.fill(3)).unwrap();
        assert_eq!(get(&engine, &mut queue, handle), [3; PAGE_SIZE]);
    }

    #[test]
    fn frames_of_other_shards_are_eaten_for_it() {
        let (engine, mut queue, swap) = engine(PoolKind::Persistent);
        while engine.supply().unwrap().more {}
        let client = engine.create_client().unwrap();
        let cache = engine.create_pool(client, PoolKind::Ephemeral, 4096).unwrap();
        for page in 0..4 * FRAMES {
            let page = page * 64;
            // Until it eats its own tail, so that some are there whatever becomes of this one.
            let _ = engine.put(&mut queue, Handle::from_page(cache, page), &noise(page));
        }
        for page in [0, 512, 1024] {
            let handle = Handle::from_page(swap, page);
            engine.update(&mut queue, handle, |held| *held = noise(page)).unwrap();
            assert_eq!(get(&engine, &mut queue, handle), noise(page));
        }
        assert!(engine.stats().alloc.pers_ate_eph > 0);
    }

    #[test]
    fn two_threads_lose_none_of_each_others_updates() {
        let (engine, _, pool) = engine(PoolKind::Persistent);
        while engine.supply().unwrap().more {}
        let handle = Handle::from_page(pool, 5);
        let rounds = if cfg!(miri) { 20 } else { 2000 };
        let add = |at: usize| {
            let client = engine.create_client().unwrap();
            let mut queue = engine.queue(client);
            for _ in 0..rounds {
                let add = |page: &mut Page| {
                    let count = page[at..].first_chunk_mut::<4>().unwrap();
                    *count = (u32::from_le_bytes(*count) + 1).to_le_bytes();
                };
                engine.update(&mut queue, handle, add).unwrap();
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| add(0));
            scope.spawn(|| add(4092));
        });
        let client = engine.create_client().unwrap();
        let page = get(&engine, &mut engine.queue(client), handle);
        let count = |at: usize| u32::from_le_bytes(*page[at..].first_chunk().unwrap());
        assert_eq!((count(0), count(4092)), (rounds, rounds));
    }
}
