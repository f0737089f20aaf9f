//! Pools: what a device keeps its pages in.

use std::sync::{Arc, OnceLock};

use crate::directory::Directory;
use crate::freed::FreedPages;
use crate::handle::{ClientId, Handle, OBJECT_PAGES, PoolId, PoolKind};
use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// A pool's fixed properties and its directory.
pub(crate) struct Pool {
    pub(crate) id: PoolId,
    pub(crate) client: ClientId,
    pub(crate) kind: PoolKind,
    pub(crate) directory: Directory,
    pages: u64,
    /// Objects that are not idle: how soon a flush of everything is done.
    active: AtomicU64,
    closing: AtomicU64,
    /// Who knows which pages nobody will ask for again. Set once at most.
    freed: OnceLock<Box<dyn FreedPages>>,
    /// Whether their marks are all newer than what was put last.
    is_believed: AtomicBool,
    /// The page from which these are looked for next.
    pub(crate) freed_cursor: AtomicU64,
}

impl Pool {
    /// A pool of `pages` pages, for which `directory` was made.
    pub(crate) fn new(
        id: PoolId,
        client: ClientId,
        kind: PoolKind,
        pages: u64,
        directory: Directory,
    ) -> Self {
        let (active, closing) = (AtomicU64::new(0), AtomicU64::new(0));
        let (freed, is_believed, freed_cursor) =
            (OnceLock::new(), AtomicBool::new(false), AtomicU64::new(0));
        Self {
            id,
            client,
            kind,
            directory,
            pages,
            active,
            closing,
            freed,
            is_believed,
            freed_cursor,
        }
    }

    /// From now on marks of these pages are taken away when somebody writes to them. False if it is told of others already.
    pub(crate) fn watch(&self, freed: Box<dyn FreedPages>) -> bool {
        self.freed.set(freed).is_ok()
    }

    /// Takes all marks away that there are, and believes those that come from now on. Called when all who write see `watch`.
    pub(crate) fn believe(&self) {
        let Some(freed) = self.freed.get() else { return };
        let mut from = 0;
        while let Some(page) = freed.next(from..self.pages) {
            freed.unmark(page);
            from = page + 1;
        }
        self.is_believed.store(true, Ordering::Release);
    }

    /// Who marks freed pages, as far as that is believed.
    pub(crate) fn freed(&self) -> Option<&dyn FreedPages> {
        let freed = self.freed.get().filter(|_| self.is_believed.load(Ordering::Acquire));
        freed.map(|freed| &**freed)
    }

    /// Takes a page's mark away, if it has one: somebody has written to it. Called with its shard's lock held.
    pub(crate) fn unmark(&self, handle: Handle) {
        if let Some(freed) = self.freed.get() {
            freed.unmark(handle.page());
        }
    }

    /// Whether the handle names a page of this pool.
    pub(crate) fn contains(&self, handle: Handle) -> bool {
        handle.pool == self.id && handle.index < OBJECT_PAGES && handle.page() < self.pages
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire) > 0
    }

    /// Tells the pool that an object became idle, or ceased to be.
    pub(crate) fn count_active(&self, was_idle: bool, is_idle: bool) {
        match (was_idle, is_idle) {
            (true, false) => self.active.fetch_add(1, Ordering::AcqRel),
            (false, true) => self.active.fetch_sub(1, Ordering::AcqRel),
            _ => return,
        };
    }

    /// From now on nothing is put into the pool. Effective for a shard once its lock was taken.
    /// False if it was closed already.
    pub(crate) fn close(&self) -> bool {
        self.closing.swap(1, Ordering::AcqRel) == 0
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire) != 0
    }
}

/// The pool that holds the page, of those that a shard knows by their numbers.
pub(crate) fn find(pools: &[Option<Arc<Pool>>], handle: Handle) -> Option<&Pool> {
    let pool = pools.get(usize::from(handle.pool.0))?.as_deref()?;
    pool.contains(handle).then_some(pool)
}
