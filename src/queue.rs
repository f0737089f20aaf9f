//! A queue's context: what one thread needs to put and get without sharing or allocating.

use std::sync::Arc;

use crate::codec::{Codec, Lz4, OUTPUT_BYTES, fill, same_filled};
use crate::handle::{Handle, PAGE_SIZE, Page};
use crate::histogram::{Histogram, Sum};
use crate::shard::Packed;
use crate::zbud::ZPAGE_BYTES_MAX;
use crate::zpage::{Encoding, HEADER_BYTES, Header};

/// Codec tables, scratch memory and latency histograms of one thread; some 30 KiB.
///
/// Made by [`crate::Engine::queue`] before the I/O starts; puts and gets through it allocate
/// nothing.
pub struct Queue {
    codec: Lz4,
    /// A zpage is made here: header, then payload.
    zpage: Box<ZpageBuffer>,
    /// A payload is copied here to be decompressed outside the shard's lock.
    pub(crate) scratch: Box<[u8; PAGE_SIZE]>,
    pub(crate) latencies: Arc<Latencies>,
}

struct ZpageBuffer {
    bytes: [u8; HEADER_BYTES + OUTPUT_BYTES],
}

/// What a queue measures; the statistics read it while the queue runs.
pub(crate) struct Latencies {
    pub(crate) get: Histogram,
    pub(crate) put: Histogram,
}

/// The latencies of all queues, those that ended included.
pub(crate) struct Ledger {
    live: Vec<Arc<Latencies>>,
    ended: Totals,
}

/// Latencies of several queues added up.
pub(crate) struct Totals {
    pub(crate) get: Sum,
    pub(crate) put: Sum,
}

impl Totals {
    fn new() -> Self {
        Self { get: Sum::new(), put: Sum::new() }
    }

    fn add(&mut self, latencies: &Latencies) {
        latencies.get.add_to(&mut self.get);
        latencies.put.add_to(&mut self.put);
    }
}

impl Ledger {
    pub(crate) fn new() -> Self {
        Self { live: Vec::new(), ended: Totals::new() }
    }

    /// Enters a queue, and closes the accounts of those that were dropped.
    pub(crate) fn enter(&mut self, queue: &Queue) {
        let Self { live, ended } = self;
        live.retain(|latencies| {
            let is_live = Arc::strong_count(latencies) > 1;
            if !is_live {
                ended.add(latencies);
            }
            is_live
        });
        live.push(Arc::clone(&queue.latencies));
    }

    pub(crate) fn totals(&self) -> Totals {
        let mut totals = Totals::new();
        totals.get.add(&self.ended.get);
        totals.put.add(&self.ended.put);
        self.live.iter().for_each(|latencies| totals.add(latencies));
        totals
    }
}

impl Queue {
    pub(crate) fn new() -> Self {
        Self {
            codec: Lz4::new(),
            zpage: Box::new(ZpageBuffer { bytes: [0; HEADER_BYTES + OUTPUT_BYTES] }),
            scratch: Box::new([0; PAGE_SIZE]),
            latencies: Arc::new(Latencies { get: Histogram::new(), put: Histogram::new() }),
        }
    }

    /// Turns a page into what is stored.
    pub(crate) fn pack<'a>(&'a mut self, handle: Handle, page: &'a Page) -> Packed<'a> {
        if let Some(fill) = same_filled(page) {
            return Packed::Same(fill);
        }
        let (head, out) = self.zpage.bytes.split_at_mut(HEADER_BYTES);
        let out = out.first_chunk_mut::<OUTPUT_BYTES>().expect("the buffer holds both");
        match self.codec.compress(page, out) {
            Some(bytes) if HEADER_BYTES + bytes <= ZPAGE_BYTES_MAX => {
                let header = Header::new(handle, Encoding::Lz4, &out[..bytes]);
                head.copy_from_slice(&header.to_bytes());
                Packed::Zpage(&self.zpage.bytes[..HEADER_BYTES + bytes])
            }
            _ => Packed::Raw(Header::new(handle, Encoding::Raw, page), page),
        }
    }

    /// Restores a page from the first `bytes` of the scratch buffer; false if they are not what
    /// was put.
    pub(crate) fn unpack(
        &self,
        handle: Handle,
        header: Header,
        bytes: usize,
        page: &mut Page,
    ) -> bool {
        let payload = &self.scratch[..bytes];
        if !header.verify(handle, payload) {
            return false;
        }
        match (header.encoding(), payload.try_into()) {
            (Some(Encoding::Fill), Ok(word)) => {
                fill(page, u32::from_le_bytes(word));
                true
            }
            (Some(Encoding::Lz4), _) => self.codec.decompress(payload, page),
            _ => false,
        }
    }
}
