//! Clients and pools: made, found and destroyed.
//!
//! None of it is on the I/O path. A pool's directory is part of what the pool limit covers, so that
//! a pool is made only where there is room for one beside the pages that there are.

use std::sync::Arc;

use slab::Slab;

use crate::directory::Directory;
use crate::engine::{Engine, POOLS_MAX};
use crate::error::PoolError;
use crate::handle::{ClientId, POOL_PAGES_MAX, PoolId, PoolKind};
use crate::pool::Pool;
use crate::store::PoolInfo;
use crate::sync::Ordering;

/// Clients and pools by number. Who has it locked may allocate, and so wait for memory that only
/// swap can free: neither the I/O path nor the supply step locks it.
pub(crate) struct Registry {
    pub(crate) clients: Slab<()>,
    pools: [Place; POOLS_MAX],
}

/// What has a pool's number.
enum Place {
    Vacant,
    /// A pool that is being made.
    Taken,
    Pool(Arc<Pool>),
}

impl Registry {
    pub(crate) fn new(clients: Slab<()>) -> Self {
        Self { clients, pools: [const { Place::Vacant }; POOLS_MAX] }
    }

    pub(crate) fn pools(&self) -> impl Iterator<Item = &Arc<Pool>> {
        self.pools.iter().filter_map(|place| match place {
            Place::Pool(pool) => Some(pool),
            Place::Vacant | Place::Taken => None,
        })
    }

    pub(crate) fn pool(&self, id: PoolId) -> Option<&Arc<Pool>> {
        self.pools().find(|pool| pool.id == id)
    }

    /// A number that no pool has, nor will have until it is given back.
    fn take_number(&mut self) -> Option<PoolId> {
        let number = self.pools.iter().position(|place| matches!(place, Place::Vacant))?;
        self.pools[number] = Place::Taken;
        Some(PoolId(number as u16))
    }

    pub(crate) fn insert(&mut self, pool: Arc<Pool>) {
        let number = usize::from(pool.id.0);
        self.pools[number] = Place::Pool(pool);
    }

    fn give_back(&mut self, id: PoolId) {
        self.pools[usize::from(id.0)] = Place::Vacant;
    }
}

impl Engine {
    /// Registers a client: an owner of pools.
    pub fn create_client(&self) -> Result<ClientId, PoolError> {
        let mut registry = self.registry.lock();
        if registry.clients.len() == POOLS_MAX {
            return Err(PoolError::TooMany { limit: POOLS_MAX });
        }
        Ok(ClientId(registry.clients.insert(()) as u16))
    }

    /// Destroys a client and all its pools.
    pub fn destroy_client(&self, client: ClientId) -> Result<(), PoolError> {
        let mut registry = self.registry.lock();
        let known = registry.clients.try_remove(usize::from(client.0));
        known.ok_or(PoolError::NoClient)?;
        self.ledger.lock().forget(client);
        let pools: Vec<_> = registry.pools().cloned().collect();
        drop(registry);
        for pool in pools.iter().filter(|pool| pool.client == client && pool.close()) {
            self.destroy(pool);
        }
        Ok(())
    }

    /// Makes a pool of `pages` pages, numbered from zero.
    pub fn create_pool(
        &self,
        client: ClientId,
        kind: PoolKind,
        pages: u64,
    ) -> Result<PoolId, PoolError> {
        if pages == 0 || pages > POOL_PAGES_MAX {
            return Err(PoolError::Size { pages });
        }
        let bytes = Directory::bytes_for(pages);
        let id = self.make_room(client, bytes)?;
        // Without the registry: it may take long.
        let directory = Directory::new(&self.store, id, pages);
        let mut registry = self.registry.lock();
        let directory = match directory {
            Ok(directory) if registry.clients.contains(client.0.into()) => directory,
            result => {
                registry.give_back(id);
                self.resize_tables(&registry, |all| all - bytes);
                let directory = result.map_err(|source| PoolError::Memory { bytes, source })?;
                // What cannot be given back is when the number is used again.
                let _ = directory.release();
                return Err(PoolError::NoClient);
            }
        };
        self.store.pool(id).open(client, kind, pages);
        self.add_pool(&mut registry, Pool::new(id, client, kind, pages, directory));
        Ok(id)
    }

    /// Makes a pool known.
    pub(crate) fn add_pool(&self, registry: &mut Registry, pool: Pool) {
        if pool.kind == PoolKind::Ephemeral {
            self.ephemeral_pools.fetch_add(1, Ordering::AcqRel);
        }
        let pool = Arc::new(pool);
        registry.insert(Arc::clone(&pool));
        for shard in &self.shards {
            shard.0.lock().add_pool(Arc::clone(&pool));
        }
    }

    /// The pools that there are.
    pub fn pools(&self) -> Vec<PoolInfo> {
        let registry = self.registry.lock();
        registry.pools().filter_map(|pool| self.store.pool(pool.id).pool(pool.id)).collect()
    }

    /// Takes a directory's bytes out of what the limit leaves for frames, and gives back the frames
    /// that are beyond that. Refused if frames in use would have to go that cannot: the new pool
    /// would take the room of those that there are, whose pages would be lost when they are put
    /// again. Returns the new pool's number.
    fn make_room(&self, client: ClientId, bytes: u64) -> Result<PoolId, PoolError> {
        let mut registry = self.registry.lock();
        if !registry.clients.contains(client.0.into()) {
            return Err(PoolError::NoClient);
        }
        let limit = self.limit();
        let no_room = PoolError::NoRoom { bytes, limit };
        let tables = self.tables.load(Ordering::Acquire) + bytes;
        let least = tables + self.log_least();
        let Ok(frames) =
            self.config.check_limit(limit, least).and(self.config.check_limit(limit, tables))
        else {
            return Err(no_room);
        };
        let fits = || {
            let now = self.sample_peaks().frames;
            now.frames_persistent + now.frames_reserve + now.frames_log <= u64::from(frames)
        };
        if !fits() {
            return Err(no_room);
        }
        self.resize_tables(&registry, |all| all + bytes);
        // From now on no put takes more than is left; one may have done so just before.
        if !fits() {
            self.resize_tables(&registry, |all| all - bytes);
            return Err(no_room);
        }
        let Some(id) = registry.take_number() else {
            self.resize_tables(&registry, |all| all - bytes);
            return Err(PoolError::TooMany { limit: POOLS_MAX });
        };
        drop(registry);
        while self.arena.allocated() > self.arena.limit()
            && self.supply().is_ok_and(|done| done.released > 0)
        {}
        Ok(id)
    }

    /// Changes what the tables take, and so what is left for frames. Whoever makes them larger has checked before that the
    /// limit leaves room for that.
    pub(crate) fn resize_tables(&self, registry: &Registry, resize: impl FnOnce(u64) -> u64) {
        let tables = resize(self.tables.load(Ordering::Acquire));
        self.tables.store(tables, Ordering::Release);
        self.keep_limit(registry, self.limit());
    }

    /// Flushes everything in a pool and removes it.
    pub fn destroy_pool(&self, id: PoolId) -> Result<(), PoolError> {
        let pool = self.registry.lock().pool(id).cloned();
        let pool = pool.filter(|pool| pool.close()).ok_or(PoolError::NoPool)?;
        self.destroy(&pool);
        Ok(())
    }

    /// Destroys a pool that the caller closed: nobody else does then, and its number is not given
    /// to another pool before this is done.
    fn destroy(&self, pool: &Pool) {
        self.store.pool(pool.id).close();
        // A put that saw the pool open before this has left its shard's lock after it.
        for shard in &self.shards {
            drop(shard.0.lock());
        }
        self.flush_range(pool.id, 0, pool.pages());
        for shard in &self.shards {
            shard.0.lock().remove_pool(pool.id);
        }
        // What cannot be given back is when the number is used again.
        let _ = pool.directory.release();
        let _ = self.store.clear_io_memory(pool.id);
        self.store.pool(pool.id).remove();
        let mut registry = self.registry.lock();
        registry.give_back(pool.id);
        if pool.kind == PoolKind::Ephemeral {
            self.ephemeral_pools.fetch_sub(1, Ordering::AcqRel);
        }
        self.resize_tables(&registry, |all| all - pool.directory.bytes());
    }
}
