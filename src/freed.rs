//! Freed pages: those whose contents nobody will ask for again, where somebody outside knows.
//!
//! A kernel that swaps does not tell a block device which slots it has freed, unless a whole cluster is free. So we
//! would keep, compress and write to disk what is dead. Somebody who does know marks such pages
//! ([`FreedPages`]), at any time and without a lock; [`Engine::flush_freed`] flushes them.
//!
//! What makes that safe: a put takes the page's mark away, under its shard's lock, and a page is flushed under that lock
//! only while it is marked. A mark that was set before the put is gone with it, and one that was set after it is meant for
//! what the put has stored. Whoever marks must do so before the page can be written anew, and only then. Marks that were
//! there before puts knew of them are taken away unseen: nobody knows what was put since.

use std::ops::Range;

use crate::engine::Engine;
use crate::error::PoolError;
use crate::handle::{Handle, OBJECT_PAGES, PoolId};
use crate::pool::Pool;
use crate::sync::Ordering;

/// Objects of a pool of which marked pages are flushed in one call.
const OBJECTS_MAX: u32 = 16;

/// Pages of a pool whose contents nobody will ask for again, as somebody outside marks them, at any time.
///
/// Calls come with a shard's lock held: they must not wait, allocate or call the engine.
pub trait FreedPages: Send + Sync {
    /// The first marked one of these pages. What is marked meanwhile may be overlooked.
    fn next(&self, pages: Range<u64>) -> Option<u64>;

    /// Takes a page's mark away, if it has one. What was done before it was marked has happened before this returns.
    fn unmark(&self, page: u64);
}

impl Engine {
    /// From now on, pages of this pool are flushed that `freed` says are freed. The pool keeps it as long as there is the
    /// pool, and somewhat longer: whichever thread flushes at that moment drops it.
    ///
    /// What was marked before this returns may be forgotten. It goes through all marks, and waits for every shard's lock.
    ///
    /// # Errors
    ///
    /// [`PoolError::NoPool`] if there is no such pool.
    ///
    /// # Panics
    ///
    /// If somebody tells of this pool's pages already.
    pub fn watch_freed(&self, id: PoolId, freed: Box<dyn FreedPages>) -> Result<(), PoolError> {
        let pool = self.registry.lock().pool(id).cloned().ok_or(PoolError::NoPool)?;
        assert!(pool.watch(freed), "two tell of one pool's freed pages");
        // A put that did not know of marks has left its shard's lock by then, and whatever was marked before it is seen here.
        for shard in &self.shards {
            drop(shard.0.lock());
        }
        pool.believe();
        Ok(())
    }

    /// Flushes pages that are marked as freed, of some objects of each pool; true if there may be more. Called until that is
    /// false, it goes once through all pages, however many are marked meanwhile. Waits for nothing but shards' locks, and
    /// allocates nothing.
    pub fn flush_freed(&self) -> bool {
        let mut number = 0;
        let mut more = false;
        loop {
            let pool = self.shards[0].0.lock().watched(number);
            let Some(pool) = pool else { return more };
            more |= self.flush_freed_of(&pool);
            number = usize::from(pool.id.0) + 1;
        }
    }

    fn flush_freed_of(&self, pool: &Pool) -> bool {
        let Some(freed) = pool.freed() else { return false };
        let mut from = pool.freed_cursor.load(Ordering::Relaxed);
        for _ in 0..OBJECTS_MAX {
            let Some(page) = freed.next(from..pool.pages()) else {
                pool.freed_cursor.store(0, Ordering::Relaxed);
                return false;
            };
            let first = Handle::from_page(pool.id, page);
            self.shard(first).flush_freed(first);
            from = page - u64::from(first.index) + u64::from(OBJECT_PAGES);
        }
        pool.freed_cursor.store(from, Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::engine::FRAME_COST;
    use crate::error::GetError;
    use crate::{ClientId, Config, Got, PAGE_SIZE, PoolKind, Queue};

    const PAGES: u64 = 40 * OBJECT_PAGES as u64 - 3;

    /// A mark for each page, and some beyond the pool.
    #[derive(Clone)]
    struct Marks(Arc<[AtomicBool]>);

    impl Marks {
        fn new() -> Self {
            Self((0..PAGES + 64).map(|_| AtomicBool::new(false)).collect())
        }

        fn mark(&self, page: u64) {
            self.0[page as usize].store(true, Ordering::SeqCst);
        }
    }

    impl FreedPages for Marks {
        fn next(&self, pages: Range<u64>) -> Option<u64> {
            let count = pages.end.saturating_sub(pages.start) as usize;
            let marks = self.0.iter().enumerate().skip(pages.start as usize).take(count);
            let mut marks = marks.filter(|(_, mark)| mark.load(Ordering::SeqCst));
            marks.next().map(|(page, _)| page as u64)
        }

        fn unmark(&self, page: u64) {
            self.0[page as usize].store(false, Ordering::SeqCst);
        }
    }

    struct Bench {
        engine: Engine,
        client: ClientId,
        queue: Queue,
        pool: PoolId,
        marks: Marks,
    }

    impl Bench {
        fn new() -> Self {
            let limit = Config::limit_min(2) + 128 * FRAME_COST;
            let engine = Engine::new(&Config { limit, limit_max: limit, shards: 2 }).unwrap();
            while engine.supply().unwrap().more {}
            let client = engine.create_client().unwrap();
            let pool = engine.create_pool(client, PoolKind::Persistent, PAGES).unwrap();
            let marks = Marks::new();
            engine.watch_freed(pool, Box::new(marks.clone())).unwrap();
            Self { queue: engine.queue(client), engine, client, pool, marks }
        }

        fn put(&mut self, page: u64) {
            let handle = Handle::from_page(self.pool, page);
            let mut contents = [page as u8; PAGE_SIZE];
            contents[..8].copy_from_slice(&page.to_le_bytes());
            self.engine.put(&mut self.queue, handle, &contents).unwrap();
        }

        fn holds(&mut self, page: u64) -> bool {
            let mut out = [0; PAGE_SIZE];
            let handle = Handle::from_page(self.pool, page);
            let got = self.engine.get(&mut self.queue, handle, &mut out).unwrap();
            assert!(got == Got::Miss || out[..8] == page.to_le_bytes());
            got == Got::Hit
        }

        fn flush(&self) {
            // The second time from the beginning.
            while self.engine.flush_freed() {}
            while self.engine.flush_freed() {}
        }
    }

    #[test]
    fn what_is_marked_goes_and_what_is_not_stays() {
        let mut watched = Bench::new();
        let pages = [0, 1, 511, 512, 1024, PAGES - 2, PAGES - 1];
        pages.iter().for_each(|page| watched.put(*page));
        for page in [1, 512, 700, PAGES - 1] {
            watched.marks.mark(page);
        }
        watched.flush();
        let held: Vec<_> = pages.into_iter().filter(|page| watched.holds(*page)).collect();
        assert_eq!(held, [0, 511, 1024, PAGES - 2]);
        assert_eq!(watched.marks.next(0..u64::MAX), None);
        let stats = watched.engine.pool_stats(watched.pool).unwrap();
        assert_eq!((stats.freed_pages, stats.flush_total), (3, 0));
        // What a mark said is true once.
        watched.put(1);
        watched.flush();
        assert!(watched.holds(1));
    }

    #[test]
    fn a_page_that_is_put_is_not_what_was_freed() {
        let mut watched = Bench::new();
        watched.put(7);
        watched.marks.mark(7);
        watched.put(7);
        watched.flush();
        assert!(watched.holds(7));
        watched.marks.mark(7);
        let handle = Handle::from_page(watched.pool, 7);
        watched.engine.update(&mut watched.queue, handle, |page| page[9] = 1).unwrap();
        watched.flush();
        assert!(watched.holds(7));
    }

    #[test]
    fn a_page_that_is_lost_stays_so() {
        let mut watched = Bench::new();
        let handle = Handle::from_page(watched.pool, 7);
        let get = |watched: &mut Bench| {
            watched.engine.get(&mut watched.queue, handle, &mut [0; PAGE_SIZE])
        };
        watched.put(7);
        watched.marks.mark(7);
        watched.engine.lose(handle);
        watched.flush();
        assert_eq!(get(&mut watched), Err(GetError::Lost));
        // Until it is freed in its turn.
        watched.marks.mark(7);
        watched.flush();
        assert_eq!(get(&mut watched), Ok(Got::Miss));
        assert_eq!(watched.engine.pool_stats(watched.pool).unwrap().lost_pages, 0);
    }

    #[test]
    fn what_is_marked_before_puts_know_of_it_is_not_believed() {
        let mut watched = Bench::new();
        let kind = PoolKind::Persistent;
        watched.pool = watched.engine.create_pool(watched.client, kind, PAGES).unwrap();
        let marks = Marks::new();
        [0, 7, PAGES - 1].into_iter().for_each(|page| {
            watched.put(page);
            marks.mark(page);
        });
        watched.flush();
        watched.engine.watch_freed(watched.pool, Box::new(marks.clone())).unwrap();
        watched.flush();
        assert!([0, 7, PAGES - 1].into_iter().all(|page| watched.holds(page)));
        // From then on it is.
        marks.mark(7);
        watched.flush();
        assert!(!watched.holds(7));
    }

    #[test]
    fn a_call_is_bounded_and_the_next_goes_on() {
        let mut watched = Bench::new();
        let of_each_object = (0..PAGES).step_by(OBJECT_PAGES as usize);
        for page in of_each_object.clone() {
            watched.put(page);
            watched.marks.mark(page);
        }
        assert!(watched.engine.flush_freed());
        let left = |watched: &Bench| watched.engine.pool_stats(watched.pool).unwrap().obj_count;
        assert_eq!(left(&watched), 40 - u64::from(OBJECTS_MAX));
        // What comes behind the cursor is not forgotten.
        watched.put(0);
        watched.marks.mark(0);
        watched.flush();
        assert_eq!(left(&watched), 0);
    }

    #[test]
    fn marks_beyond_the_pool_and_pools_that_are_gone_are_nobodys() {
        let mut watched = Bench::new();
        watched.put(PAGES - 1);
        watched.marks.mark(PAGES);
        watched.flush();
        assert!(watched.holds(PAGES - 1));
        watched.engine.destroy_pool(watched.pool).unwrap();
        watched.flush();
        let again = watched.engine.watch_freed(watched.pool, Box::new(watched.marks.clone()));
        assert!(matches!(again, Err(PoolError::NoPool)));
        // The number is another pool's now, of which nobody tells.
        let kind = PoolKind::Persistent;
        watched.pool = watched.engine.create_pool(watched.client, kind, PAGES).unwrap();
        watched.put(0);
        watched.marks.mark(0);
        watched.flush();
        assert!(watched.holds(0));
    }
}
