//! Reports: the shards' figures added up.

use crate::engine::{Config, Engine, FRAME_COST};
use crate::handle::{PAGE_SIZE, PoolId, PoolKind};
use crate::stats::{ClassCounters, FrameCounts, PoolCounters, Stats};

/// The largest values seen by the samples that the supply thread and each report take.
#[derive(Clone, Copy, Default)]
pub(crate) struct Peaks {
    mem_used: u64,
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
        let totals = self.latencies.lock().totals();
        stats.put_latency = totals.put.latency();
        stats.get_latency = totals.get.latency();
        stats
    }

    /// One pool's figures.
    pub fn pool_stats(&self, id: PoolId) -> Option<PoolCounters> {
        self.registry.lock().pools.get(usize::from(id.0))?;
        let mut counters = PoolCounters::default();
        for shard in &self.shards {
            counters.add(shard.0.lock().counters(id));
        }
        Some(counters)
    }

    /// Counts everything but latencies, and remembers the largest values.
    pub(crate) fn sample_peaks(&self) -> Stats {
        let mut stats = Stats::default();
        self.add_shards(&mut stats);
        stats.mem_limit = self.limit();
        stats.mem_used_total = self.mem_used();
        let mut peaks = self.peaks.lock();
        peaks.mem_used = peaks.mem_used.max(stats.mem_used_total);
        peaks.eph.raise(&stats.eph);
        peaks.pers.raise(&stats.pers);
        stats.mem_used_max = peaks.mem_used;
        peaks.eph.write_to(&mut stats.eph);
        peaks.pers.write_to(&mut stats.pers);
        stats
    }

    fn add_shards(&self, stats: &mut Stats) {
        let ids: Vec<_> = self.registry.lock().pools.iter().map(|(_, pool)| pool.id).collect();
        let mut leaves = [0; 2];
        for shard in &self.shards {
            let shard = shard.0.lock();
            for &id in &ids {
                stats.pools.add(shard.counters(id));
            }
            stats.alloc.add(shard.alloc());
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
            frames_reserve: self.shards.len() as u64,
        };
    }

    /// Bytes of memory held for data: frames, free ones too, and what is kept to find pages in them.
    fn mem_used(&self) -> u64 {
        let reserve = (self.shards.len() as u64 + 2) * FRAME_COST;
        let shards = Config::limit_min(self.shards.len()) - reserve - PAGE_SIZE as u64;
        let frames = u64::from(self.arena.allocated()) * PAGE_SIZE as u64;
        frames + self.arena.table_bytes() + self.registry.lock().directories() + shards
    }
}
