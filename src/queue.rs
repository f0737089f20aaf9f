//! A queue's context: what one thread needs to put and get without sharing or allocating.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::codec::{Codec, Lz4, OUTPUT_BYTES, fill, same_filled};
use crate::handle::{ClientId, Handle, PAGE_SIZE, Page};
use crate::histogram::{Histogram, Sum};
use crate::shard::{Packed, Unpacked};
use crate::stats::Latencies;
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
    pub(crate) latencies: Arc<Histograms>,
}

struct ZpageBuffer {
    bytes: [u8; HEADER_BYTES + OUTPUT_BYTES],
}

/// What became of a page that was copied out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Restored {
    /// It is not what was put, which nobody has counted yet.
    Corrupt,
    /// The shard found that it is not what was put, and has counted that.
    FoundCorrupt,
    /// It is there.
    Hit,
    /// There is no such page.
    Miss,
}

/// What a queue measures; the statistics read it while the queue runs.
pub(crate) struct Histograms {
    pub(crate) get: Histogram,
    pub(crate) put: Histogram,
    pub(crate) read_back: Histogram,
}

/// The latencies of all queues that there are and were, by client.
#[derive(Default)]
pub(crate) struct Ledger {
    live: Vec<Account>,
    /// Those of queues that ended, one sum a client; under none, those of clients that are gone.
    ended: BTreeMap<Option<ClientId>, Totals>,
}

/// A queue and its client, or none when that is gone.
struct Account {
    client: Option<ClientId>,
    histograms: Arc<Histograms>,
}

/// Latencies of several queues added up.
#[derive(Default)]
pub(crate) struct Totals {
    get: Sum,
    put: Sum,
    read_back: Sum,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.get.add(&other.get);
        self.put.add(&other.put);
        self.read_back.add(&other.read_back);
    }

    fn add_histograms(&mut self, histograms: &Histograms) {
        histograms.get.add_to(&mut self.get);
        histograms.put.add_to(&mut self.put);
        histograms.read_back.add_to(&mut self.read_back);
    }

    pub(crate) fn latencies(&self) -> Latencies {
        Latencies {
            put_latency: self.put.latency(),
            get_latency: self.get.latency(),
            readback_latency: self.read_back.latency(),
        }
    }
}

impl Ledger {
    /// Enters a queue.
    pub(crate) fn enter(&mut self, client: Option<ClientId>, queue: &Queue) {
        self.close();
        self.live.push(Account { client, histograms: Arc::clone(&queue.latencies) });
    }

    /// Keeps what a client's queues measured for the totals alone: its number may be another's
    /// soon, while some of its queues still run.
    pub(crate) fn forget(&mut self, client: ClientId) {
        if let Some(totals) = self.ended.remove(&Some(client)) {
            self.ended.entry(None).or_default().add(&totals);
        }
        for account in self.live.iter_mut().filter(|account| account.client == Some(client)) {
            account.client = None;
        }
        self.close();
    }

    /// Closes the accounts of queues that were dropped.
    fn close(&mut self) {
        let Self { live, ended } = self;
        live.retain_mut(|account| {
            // This also sees to it that the queue's last records are visible here.
            let is_live = Arc::get_mut(&mut account.histograms).is_none();
            if !is_live {
                ended.entry(account.client).or_default().add_histograms(&account.histograms);
            }
            is_live
        });
    }

    /// Of one client's queues.
    pub(crate) fn totals_of(&self, client: ClientId) -> Totals {
        self.sum(|of| of == Some(client))
    }

    /// Of all queues.
    pub(crate) fn totals(&self) -> Totals {
        self.sum(|_| true)
    }

    fn sum(&self, wanted: impl Fn(Option<ClientId>) -> bool) -> Totals {
        let mut sum = Totals::default();
        for (_, totals) in self.ended.iter().filter(|(client, _)| wanted(**client)) {
            sum.add(totals);
        }
        for account in self.live.iter().filter(|account| wanted(account.client)) {
            sum.add_histograms(&account.histograms);
        }
        sum
    }
}

impl Queue {
    pub(crate) fn new() -> Self {
        Self {
            codec: Lz4::new(),
            zpage: Box::new(ZpageBuffer { bytes: [0; HEADER_BYTES + OUTPUT_BYTES] }),
            scratch: Box::new([0; PAGE_SIZE]),
            latencies: Arc::new(Histograms {
                get: Histogram::new(),
                put: Histogram::new(),
                read_back: Histogram::new(),
            }),
        }
    }

    /// Counts how long a page took that had to be read from the backing file, in nanoseconds: from the get that
    /// said so until it was got.
    pub fn count_read_back(&self, ns: u64) {
        self.latencies.read_back.record(ns);
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

    /// Restores a page from what its shard copied out, into this queue's scratch buffer or `page`.
    pub(crate) fn restore(&self, handle: Handle, unpacked: &Unpacked, page: &mut Page) -> Restored {
        let intact = match *unpacked {
            Unpacked::Corrupt => return Restored::FoundCorrupt,
            Unpacked::Miss => return Restored::Miss,
            Unpacked::Raw(header) => header.verify(handle, page),
            Unpacked::Same(word) => {
                fill(page, word);
                true
            }
            Unpacked::Zpage(header, bytes) => {
                self.unpack(handle, header, &self.scratch[..bytes], page)
            }
            Unpacked::Backed(_) => unreachable!("it is asked for before"),
        };
        if intact { Restored::Hit } else { Restored::Corrupt }
    }

    /// Restores a page from a payload; false if that is not what was put.
    pub(crate) fn unpack(
        &self,
        handle: Handle,
        header: Header,
        payload: &[u8],
        page: &mut Page,
    ) -> bool {
        if !header.verify(handle, payload) {
            return false;
        }
        match (header.encoding(), payload.try_into()) {
            (Some(Encoding::Fill), Ok(word)) => {
                fill(page, u32::from_le_bytes(word));
                true
            }
            (Some(Encoding::Lz4), _) => self.codec.decompress(payload, page),
            (Some(Encoding::Raw), _) if payload.len() == PAGE_SIZE => {
                page.copy_from_slice(payload);
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_what_its_queues_measured_and_the_total_has_all() {
        const FIRST: ClientId = ClientId(0);
        const SECOND: ClientId = ClientId(1);
        let mut ledger = Ledger::default();
        let queue = |ledger: &mut Ledger, client| {
            let queue = Queue::new();
            ledger.enter(client, &queue);
            queue.latencies.put.record(10);
            queue
        };
        let counts = |ledger: &Ledger| {
            let count = |totals: Totals| totals.latencies().put_latency.count;
            let of = |client| count(ledger.totals_of(client));
            (of(FIRST), of(SECOND), count(ledger.totals()))
        };
        let long = queue(&mut ledger, Some(FIRST));
        drop(queue(&mut ledger, Some(FIRST)));
        drop(queue(&mut ledger, Some(SECOND)));
        drop(queue(&mut ledger, None));
        assert_eq!(counts(&ledger), (2, 1, 4));

        // Of the first one's queues one has ended, and the other goes on when the client is gone.
        ledger.forget(FIRST);
        long.latencies.put.record(10);
        assert_eq!(counts(&ledger), (0, 1, 5));
        let other = queue(&mut ledger, Some(FIRST));
        drop(long);
        drop(queue(&mut ledger, Some(FIRST)));
        assert_eq!(counts(&ledger), (2, 1, 7));
        drop(other);

        // However many queues come and go, one sum a client is kept.
        (0..100).for_each(|_| drop(queue(&mut ledger, Some(SECOND))));
        assert!(ledger.live.len() <= 1 && ledger.ended.len() <= 3);
        assert_eq!(counts(&ledger), (2, 101, 107));
    }
}
