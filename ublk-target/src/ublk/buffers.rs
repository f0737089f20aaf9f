//! A queue's I/O buffers, one a tag, and the batches of the requests that are served in them.
//!
//! Guarantees: a buffer belongs to the kernel until its tag's batch is opened, then to the batch
//! until that has ended; only of an ended one is it handed back ([`Buffers::of_ended`]). Helpers are
//! out of all buffers before these are freed.
#![allow(unsafe_code)]

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use tmem::{Batches, IoMemory, PAGE_SIZE, PoolId, Store, Way};

use super::sizing::IO_BYTES;
use crate::device::Request;

/// See the module's description.
pub struct Buffers {
    // First, so that it is dropped first: then nobody is at work in the buffers any more.
    batches: Batches,
    memory: IoMemory,
}

/// Where the buffers of a device are: in this store, as those of the pool of this number.
#[derive(Clone)]
pub struct Room {
    /// The store.
    pub store: Store,
    /// The pool's number.
    pub pool: u16,
}

impl Buffers {
    /// Those of a device's queue with this number, each of which has so many tags. All of it is there and locked from now
    /// on, and is not touched before the device is served: another process may be serving it.
    pub fn new(room: &Room, queue: u16, depth: u16) -> io::Result<Self> {
        let bytes = usize::from(depth) * IO_BYTES as usize;
        let offset = u64::from(queue) * bytes as u64;
        let memory = IoMemory::new(&room.store, room.pool, offset, bytes)?;
        if !memory.is_locked() {
            let error = "I/O buffers cannot be locked in memory: allow the daemon CAP_IPC_LOCK";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, error));
        }
        Ok(Self { batches: Batches::new(depth.into()), memory })
    }

    /// How many tags there are.
    pub fn tags(&self) -> usize {
        self.memory.bytes() / IO_BYTES as usize
    }

    /// Writes into a tag's buffer what a kernel would.
    #[cfg(test)]
    pub fn fill(&mut self, tag: usize, data: &[u8; IO_BYTES as usize]) {
        assert!(self.batches.has_ended(tag));
        // SAFETY: the buffer is that long, and nobody is at work in it.
        unsafe { self.start(tag).as_ptr().copy_from_nonoverlapping(data.as_ptr(), data.len()) }
    }

    /// Where a tag's buffer is, for the driver.
    pub fn address(&self, tag: u16) -> u64 {
        self.start(tag.into()).as_ptr() as u64
    }

    fn start(&self, tag: usize) -> NonNull<u8> {
        let offset = tag * IO_BYTES as usize;
        assert!(offset < self.memory.bytes(), "there is no tag {tag}");
        // SAFETY: it is inside of the mapping.
        unsafe { self.memory.start().add(offset) }
    }

    /// Opens the batch of a read or write that the kernel has just handed over with its buffer.
    ///
    /// # Panics
    ///
    /// If the request is larger than the buffer.
    pub fn open(&mut self, tag: u16, way: Way, pool: PoolId, request: &Request) {
        let tag = usize::from(tag);
        let bytes = request.pages as usize * PAGE_SIZE;
        assert!(bytes <= IO_BYTES as usize, "a request beyond its buffer");
        let start = self.start(tag);
        // SAFETY: the buffer holds so many pages, as was just seen, and is freed after the batches
        // are dropped. The kernel touches it only between `of_ended`, which sees to it that the batch
        // has ended, and the tag's next request, which is when this is called.
        unsafe { self.batches.open(tag, way, pool, request.first_page, request.pages, start) }
    }

    /// A tag's buffer, to be handed back to the kernel.
    ///
    /// # Panics
    ///
    /// If the tag's batch has not ended.
    pub fn of_ended(&self, tag: u16) -> &[u8] {
        let batch = usize::from(tag);
        assert!(self.batches.has_ended(batch), "a request ends while its pages are worked on");
        // SAFETY: it is inside of the mapping, which is as long as this is; and who writes to it does so in a batch, or
        // is the kernel, once it has it back: no other process does, for the device is served by this one.
        unsafe { std::slice::from_raw_parts(self.start(batch).as_ptr(), IO_BYTES as usize) }
    }
}

impl Deref for Buffers {
    type Target = Batches;

    fn deref(&self) -> &Batches {
        &self.batches
    }
}

impl DerefMut for Buffers {
    fn deref_mut(&mut self) -> &mut Batches {
        &mut self.batches
    }
}
