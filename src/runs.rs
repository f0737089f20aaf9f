//! Runs: which pages of a pool hold something, asked without reading any of them.
//!
//! For whoever copies a device and wants to leave out what was never written. The answer is of a
//! moment, of each object at another: a caller that wants more keeps writers away. The work of one
//! call is bounded, whatever the pool's size.

use crate::engine::Engine;
use crate::handle::{Handle, OBJECT_PAGES, PoolId};

/// What one call may look at: an object without pages costs 1, any other [`OBJECT_COST`].
const BUDGET: u32 = 8192;

/// An object with pages: its lock is taken, and up to all its slot words are looked at.
const OBJECT_COST: u32 = 128;

/// What is held of a page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Holding {
    /// A copy; or it was lost, and a get is an error.
    Data,
    /// Nothing: a get is a miss.
    Nothing,
    /// A page of zeros.
    Zeros,
}

impl Engine {
    /// What is held of page number `first`, and of how many pages from there on it is the same:
    /// 1 to `most`, and perhaps not all there are. None if the pool has no page `first`, or `most`
    /// is 0.
    pub fn run(&self, pool: PoolId, first: u64, most: u64) -> Option<(Holding, u64)> {
        let known = self.shards[0].0.lock().pool(pool)?;
        let end = first.saturating_add(most).min(known.pages());
        let mut run: Option<(Holding, u64)> = None;
        let (mut page, mut budget) = (first, BUDGET);
        while page < end && budget > 0 {
            let at = Handle::from_page(pool, page);
            let most = (end - page).min(u64::from(OBJECT_PAGES - at.index)) as u32;
            let (found, pages) = if known.directory.object(at.object).is_idle() {
                budget -= 1;
                (Holding::Nothing, most)
            } else {
                budget = budget.saturating_sub(OBJECT_COST);
                self.shard(at).holding(at, most)?
            };
            match &mut run {
                None => run = Some((found, u64::from(pages))),
                Some((holding, length)) if *holding == found => *length += u64::from(pages),
                Some(_) => break,
            }
            page += u64::from(pages);
            if pages < most {
                break;
            }
        }
        run
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, PAGE_SIZE, PoolKind};

    /// More than one call looks at.
    const PAGES: u64 = (BUDGET as u64 + 100) * OBJECT_PAGES as u64;

    fn engine() -> (Engine, PoolId, crate::Queue) {
        let limit = 16 << 20;
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: 2 }).unwrap();
        engine.supply().unwrap();
        let client = engine.create_client().unwrap();
        let pool = engine.create_pool(client, PoolKind::Persistent, PAGES).unwrap();
        let queue = engine.queue(client);
        (engine, pool, queue)
    }

    #[test]
    #[cfg_attr(miri, ignore = "too long for Miri, and the model asks for runs, too")]
    fn runs_end_where_something_else_begins() {
        let (engine, pool, mut queue) = engine();
        let mut put = |page, fill| {
            engine.put(&mut queue, Handle::from_page(pool, page), &[fill; PAGE_SIZE]).unwrap();
        };
        (510..1030).for_each(|page| put(page, 1));
        (1030..1040).for_each(|page| put(page, 0));
        engine.lose(Handle::from_page(pool, 1100));
        assert_eq!(engine.run(pool, 0, PAGES), Some((Holding::Nothing, 510)));
        assert_eq!(engine.run(pool, 509, 3), Some((Holding::Nothing, 1)));
        assert_eq!(engine.run(pool, 510, PAGES), Some((Holding::Data, 520)));
        assert_eq!(engine.run(pool, 510, 7), Some((Holding::Data, 7)));
        assert_eq!(engine.run(pool, 1030, PAGES), Some((Holding::Zeros, 10)));
        assert_eq!(engine.run(pool, 1040, PAGES), Some((Holding::Nothing, 60)));
        assert_eq!(engine.run(pool, 1100, PAGES), Some((Holding::Data, 1)));
        assert_eq!(engine.run(pool, PAGES - 1, PAGES), Some((Holding::Nothing, 1)));
        assert_eq!(engine.run(pool, PAGES, 1), None);
        assert_eq!(engine.run(pool, 0, 0), None);
        engine.destroy_pool(pool).unwrap();
        assert_eq!(engine.run(pool, 0, 1), None);
    }

    #[test]
    #[cfg_attr(miri, ignore = "too long for Miri, and it does nothing that the model does not")]
    fn a_call_looks_at_so_much_and_no_more() {
        let (engine, pool, _) = engine();
        let looked = u64::from(BUDGET) * u64::from(OBJECT_PAGES);
        assert_eq!(engine.run(pool, 0, PAGES), Some((Holding::Nothing, looked)));
    }
}
