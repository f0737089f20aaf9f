//! A queue's I/O buffers, one a tag, and the batches of the requests that are served in them.
//!
//! Guarantees: a buffer belongs to the kernel until its tag's batch is opened, then to the batch
//! until that has ended; only of an ended one is it handed back ([`Buffers::of_ended`]). Helpers are
//! out of all buffers before these are freed.
#![allow(unsafe_code)]

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use libublk::UblkError;
use libublk::helpers::IoBuf;
use tmem::{Batches, PAGE_SIZE, PoolId, Way};

use crate::device::Request;

/// See the module's description.
pub struct Buffers {
    // First, so that it is dropped first: then nobody is at work in the buffers any more.
    batches: Batches,
    bufs: Vec<IoBuf<u8>>,
}

impl Buffers {
    /// For a queue whose requests `batches` has a tag for.
    pub fn new(batches: Batches, bufs: Vec<IoBuf<u8>>) -> Self {
        Self { batches, bufs }
    }

    /// Sees to it that there is memory behind the buffers, and locks it.
    pub fn lock(&mut self) -> Result<(), UblkError> {
        // libublk does not look whether it got the memory.
        if self.bufs.iter().any(|buf| buf.as_ptr().is_null()) {
            std::mem::forget(std::mem::take(&mut self.bufs));
            return Err(UblkError::OtherError(-libc::ENOMEM));
        }
        // Touches every page, and makes the memory initialised.
        self.bufs.iter_mut().for_each(IoBuf::zero_buf);
        // libublk would lock them too, but goes on when it cannot.
        if !self.bufs.iter().all(IoBuf::mlock) {
            return Err(UblkError::IOError(io::Error::last_os_error()));
        }
        Ok(())
    }

    /// What libublk wants of them before the first request.
    pub fn all(&self) -> &Vec<IoBuf<u8>> {
        &self.bufs
    }

    /// Opens the batch of a read or write that the kernel has just handed over with its buffer.
    ///
    /// # Panics
    ///
    /// If the request is larger than the buffer.
    pub fn open(&mut self, tag: u16, way: Way, pool: PoolId, request: &Request) {
        let tag = usize::from(tag);
        let buf = &self.bufs[tag];
        assert!(request.pages as usize * PAGE_SIZE <= buf.len(), "a request beyond its buffer");
        let start = NonNull::new(buf.as_mut_ptr()).expect("checked when it was locked");
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
        self.bufs[batch].as_slice()
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
