//! Reports: the shards' figures added up.

use crate::backing::Log;
use crate::engine::{Config, Engine, FRAME_COST};
use crate::handle::{ClientId, PAGE_SIZE, PoolId, PoolKind};
use crate::stats::{ClassCounters, FrameCounts, Latencies, LogCounters, PoolCounters, Stats};
use crate::sync::Ordering;

/// The largest values seen by the samples that the supply thread and each report take.
#[derive(Clone, Copy, Default)]
pub(crate) struct Peaks {
    mem_used: u64,
    obj_count: u64,
    eph: ClassPeaks,
    pers: ClassPeaks,
}

#[derive(Clone, Copy, Default)]
struct ClassPeaks {
    pageframes: u64,
    zpages: u64,
    zbytes: u64,
}

impl ClassPeaks {
    fn raise(&mut self, counters: &ClassCounters) {
        self.pageframes = self.pageframes.max(counters.pageframes);
        self.zpages = self.zpages.max(counters.zpages);
        self.zbytes = self.zbytes.max(counters.zbytes);
    }

    fn write_to(self, counters: &mut ClassCounters) {
        counters.pageframes_max = self.pageframes;
        counters.zpages_max = self.zpages;
        counters.zbytes_max = self.zbytes;
    }
}

impl Engine {
    /// All figures. Each shard is locked for a moment, one after the other: between shards the
    /// figures are of slightly different times unless nothing is under way.
    pub fn stats(&self) -> Stats {
        let mut stats = self.sample_peaks();
        stats.latencies = self.ledger.lock().totals().latencies();
        stats
    }

    /// The latencies of a client's puts and gets, on all its queues that there are and were; of a
    /// client that is gone, none.
    pub fn client_latencies(&self, client: ClientId) -> Latencies {
        self.ledger.lock().totals_of(client).latencies()
    }

    /// One pool's figures.
    pub fn pool_stats(&self, id: PoolId) -> Option<PoolCounters> {
        self.registry.lock().pool(id)?;
        let mut counters = PoolCounters::default();
        for shard in &self.shards {
            counters.add(shard.0.lock().counters(id));
        }
        Some(counters)
    }

    /// Counts everything but latencies, and remembers the largest values. It waits for no lock that
    /// is held for long, and for none whose holder allocates: the supply step comes here.
    pub(crate) fn sample_peaks(&self) -> Stats {
        let mut stats = Stats::default();
        self.add_shards(&mut stats);
        stats.log = self.log().map_or_else(LogCounters::default, Log::counters);
        stats.mem_limit = self.limit();
        stats.mem_used_total = self.mem_used();
        let mut peaks = self.peaks.lock();
        peaks.mem_used = peaks.mem_used.max(stats.mem_used_total);
        peaks.eph.raise(&stats.eph);
        peaks.pers.raise(&stats.pers);
        peaks.obj_count = peaks.obj_count.max(stats.pools.obj_count);
        stats.mem_used_max = peaks.mem_used;
        stats.obj_count_max = peaks.obj_count;
        peaks.eph.write_to(&mut stats.eph);
        peaks.pers.write_to(&mut stats.pers);
        stats
    }

    fn add_shards(&self, stats: &mut Stats) {
        let (mut leaves, mut spares) = ([0; 2], 0);
        for shard in &self.shards {
            let shard = shard.0.lock();
            shard.all_counters().for_each(|counters| stats.pools.add(counters));
            stats.alloc.add(shard.alloc());
            spares += u64::from(shard.has_spare());
            stats.eph.add(shard.zbud(PoolKind::Ephemeral).counters());
            stats.pers.add(shard.zbud(PoolKind::Persistent).counters());
            for kind in [PoolKind::Ephemeral, PoolKind::Persistent] {
                leaves[kind as usize] += shard.leaves(kind);
            }
        }
        stats.frames = FrameCounts {
            frames_allocated: u64::from(self.arena.allocated()),
            frames_free: u64::from(self.arena.free()),
            frames_ephemeral: stats.eph.pageframes + leaves[PoolKind::Ephemeral as usize],
            frames_persistent: stats.pers.pageframes + leaves[PoolKind::Persistent as usize],
            frames_reserve: spares,
            frames_log: self.log().map_or(0, Log::frames),
        };
    }

    /// Bytes of memory held for data: frames, free ones too, and what is kept to find pages in them.
    fn mem_used(&self) -> u64 {
        let reserve = (self.shards.len() as u64 + 2) * FRAME_COST;
        let shards = Config::limit_min(self.shards.len()) - reserve - PAGE_SIZE as u64;
        let frames = u64::from(self.arena.allocated()) * PAGE_SIZE as u64;
        frames + self.arena.table_bytes() + self.tables.load(Ordering::Acquire) + shards
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::{Handle, OBJECT_PAGES};

    #[test]
    fn peaks_outlive_what_they_count() {
        let limit = 1 << 20;
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: 2 }).unwrap();
        while engine.supply().unwrap().more {}
        let client = engine.create_client().unwrap();
        let pages = 3 * u64::from(OBJECT_PAGES);
        let pool = engine.create_pool(client, PoolKind::Persistent, pages).unwrap();
        let mut queue = engine.queue(client);
        for object in 0..3 {
            let handle = Handle { pool, object, index: 0 };
            engine.put(&mut queue, handle, &[1; PAGE_SIZE]).unwrap();
        }
        assert_eq!(engine.stats().obj_count_max, 3);
        engine.destroy_pool(pool).unwrap();
        let stats = engine.stats();
        assert_eq!((stats.pools.obj_count, stats.obj_count_max), (0, 3));
    }
}
