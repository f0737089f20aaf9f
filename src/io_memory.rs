//! I/O memory: the buffers of a front end, in the store, so that all processes that may serve a device have the same ones.
//!
//! A process that waits for the death of the one that serves needs its buffers at hand, for there may be no memory by then. In
//! the store they are the same memory for all of them, which use it in turn: one at a time serves a pool, and
//! what a dead one left in a buffer is of no use to anybody.
//!
//! Guarantees: it is all there from the start, never swapped out where the system allows that, and stays where it is. What
//! is in it is not changed by making it or dropping it, for another process may be using it. Its memory goes when the
//! pool is destroyed ([`Engine::destroy_pool`](crate::Engine::destroy_pool)).
//!
//! It hands out a pointer only: the kernel, or another process, may write to it at any time that the owner does not
//! exclude.

use std::io;
use std::ptr::NonNull;

use crate::region::Region;
use crate::store::Store;

/// The most that the buffers of one pool can have, in bytes.
pub const IO_MEMORY_BYTES_MAX: u64 = 64 << 20;

/// See the module's description.
pub struct IoMemory(Region);

impl IoMemory {
    /// So many bytes from this one on, both of whole pages, of what the pool of this number has.
    ///
    /// Where they cannot be had in the store, because the memory is broken or the store is an older program's, they are
    /// of this process alone.
    ///
    /// # Panics
    ///
    /// If that is beyond [`IO_MEMORY_BYTES_MAX`].
    pub fn new(store: &Store, pool: u16, offset: u64, bytes: usize) -> io::Result<Self> {
        let all_there = |region: Region| region.populate(0, bytes).map(|()| Self(region));
        let shared = store.io_memory(pool, offset, bytes).and_then(all_there);
        shared.or_else(|_| all_there(Region::new("tmem-io", bytes)?))
    }

    /// Where it begins; page aligned.
    pub fn start(&self) -> NonNull<u8> {
        self.0.start()
    }

    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Whether it stays in memory.
    pub fn is_locked(&self) -> bool {
        self.0.is_locked()
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use rustix::fs::{SeekFrom, fstat, seek};

    use super::*;
    use crate::PAGE_SIZE;
    use crate::engine::{Config, Engine, POOLS_MAX};
    use crate::handle::PoolKind;
    use crate::region::faults;

    const BYTES: usize = 4 * PAGE_SIZE;

    #[allow(unsafe_code)]
    fn write(memory: &IoMemory, byte: u8) {
        // SAFETY: it is all there, and this thread alone uses it.
        unsafe { memory.start().as_ptr().write(byte) };
    }

    #[allow(unsafe_code)]
    fn read(memory: &IoMemory) -> u8 {
        // SAFETY: as in `write`.
        unsafe { memory.start().as_ptr().read() }
    }

    fn again(store: &Store) -> Store {
        let file = store.file().try_clone_to_owned();
        Store::from_file(file.expect("a file can be had twice")).expect("it is a store")
    }

    fn engine(store: &Store) -> Engine {
        let config = Config { limit: 8 << 20, limit_max: 8 << 20, shards: 1 };
        Engine::create(&config, store.clone()).expect("there is memory for it")
    }

    #[test]
    fn processes_have_the_same_and_pools_and_queues_another() {
        let store = Store::new().unwrap();
        let _engine = engine(&store);
        let at = |store: &Store, pool, offset| IoMemory::new(store, pool, offset, BYTES).unwrap();
        let last = (POOLS_MAX as u16 - 1, IO_MEMORY_BYTES_MAX - BYTES as u64);
        let places = [(0, 0), (0, BYTES as u64), (1, 0), last];
        let ours: Vec<_> = places.iter().map(|(pool, offset)| at(&store, *pool, *offset)).collect();
        for (memory, byte) in ours.iter().zip(1..) {
            write(memory, byte);
        }
        let other = again(&store);
        let theirs: Vec<_> =
            places.iter().map(|(pool, offset)| at(&other, *pool, *offset)).collect();
        assert_eq!(theirs.iter().map(read).collect::<Vec<_>>(), [1, 2, 3, 4]);
        write(&theirs[2], 9);
        assert_eq!(read(&ours[2]), 9);
        // Who only waited goes, and that is all.
        drop(theirs);
        assert_eq!(ours.iter().map(read).collect::<Vec<_>>(), [1, 2, 9, 4]);
    }

    #[test]
    fn a_store_that_was_made_without_room_for_it_gets_some() {
        let store = Store::new().unwrap();
        drop(engine(&store));
        let arena_end = store.io_at().unwrap();
        rustix::fs::ftruncate(store.file(), arena_end).unwrap();
        let (ours, other) = (IoMemory::new(&store, 1, 0, BYTES).unwrap(), again(&store));
        write(&ours, 3);
        assert_eq!(read(&IoMemory::new(&other, 1, 0, BYTES).unwrap()), 3);
        assert!(fstat(store.file()).unwrap().st_size as u64 > arena_end);
    }

    #[test]
    fn without_memory_of_the_store_it_is_of_the_process_alone() {
        let store = Store::new().unwrap();
        let _engine = engine(&store);
        let ours = IoMemory::new(&store, 0, 0, BYTES).unwrap();
        write(&ours, 1);
        faults::after(0);
        let alone = IoMemory::new(&store, 0, 0, BYTES).unwrap();
        faults::never();
        write(&alone, 2);
        assert_eq!((read(&ours), read(&alone)), (1, 2));
    }

    #[test]
    fn it_goes_with_its_pool() {
        let store = Store::new().unwrap();
        let engine = engine(&store);
        let client = engine.create_client().unwrap();
        let pools = [0, 1].map(|_| engine.create_pool(client, PoolKind::Persistent, 512).unwrap());
        let has_some = |from: u64| {
            let found = seek(store.file(), SeekFrom::Data(from));
            found.is_ok_and(|at| at < from + IO_MEMORY_BYTES_MAX)
        };
        let window = |pool: u16| store.io_at().unwrap() + u64::from(pool) * IO_MEMORY_BYTES_MAX;
        for pool in pools {
            drop(IoMemory::new(&store, pool.number(), 0, BYTES).unwrap());
        }
        assert!(pools.iter().all(|pool| has_some(window(pool.number()))));
        engine.destroy_pool(pools[0]).unwrap();
        assert!(!has_some(window(pools[0].number())) && has_some(window(pools[1].number())));
    }

    #[test]
    #[should_panic(expected = "beyond")]
    fn more_than_a_pool_has_is_refused() {
        let store = Store::new().unwrap();
        let _engine = engine(&store);
        drop(IoMemory::new(&store, 0, IO_MEMORY_BYTES_MAX, PAGE_SIZE));
    }
}
