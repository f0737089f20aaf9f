//! Latency histograms that a thread records into and another reads, without a lock.
//!
//! Log-linear: 16 buckets for each power of two of nanoseconds, so a quantile is at most 1/16 too
//! high. A queue's histogram has one writer, whose record is a load and a store; a general library
//! would need a lock between it and the reader, on the I/O path, or lose samples.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

const SUB_BITS: u32 = 4;
const SUB: usize = 1 << SUB_BITS;
/// Up to 2^36 ns, which is over a minute; longer counts as that.
const BUCKETS: usize = (36 - SUB_BITS as usize + 1) * SUB;

/// A latency summary in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Latency {
    /// Operations measured.
    pub count: u64,
    /// Median.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// 99.9th percentile.
    pub p999_ns: u64,
}

/// See the module's description.
pub(crate) struct Histogram {
    buckets: Box<[AtomicU64; BUCKETS]>,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self { buckets: Box::new([const { AtomicU64::new(0) }; BUCKETS]) }
    }

    /// Counts one operation. Only one thread may call this.
    pub(crate) fn record(&self, nanoseconds: u64) {
        let bucket = &self.buckets[bucket_of(nanoseconds)];
        bucket.store(bucket.load(Relaxed) + 1, Relaxed);
    }

    /// Adds these counts to `sum`.
    pub(crate) fn add_to(&self, sum: &mut Sum) {
        for (sum, bucket) in sum.0.iter_mut().zip(self.buckets.iter()) {
            *sum += bucket.load(Relaxed);
        }
    }
}

/// Several histograms added up.
pub(crate) struct Sum([u64; BUCKETS]);

impl Default for Sum {
    fn default() -> Self {
        Self([0; BUCKETS])
    }
}

impl Sum {
    pub(crate) fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, count)| *sum += count);
    }

    pub(crate) fn latency(&self) -> Latency {
        Latency {
            count: self.0.iter().sum(),
            p50_ns: self.quantile(500),
            p99_ns: self.quantile(990),
            p999_ns: self.quantile(999),
        }
    }

    /// Upper edge of the bucket in which the given per mille of all operations are reached.
    fn quantile(&self, per_mille: u64) -> u64 {
        let count: u64 = self.0.iter().sum();
        let rank = (count * per_mille).div_ceil(1000);
        let mut seen = 0;
        for (bucket, n) in self.0.iter().enumerate() {
            seen += n;
            if seen >= rank && seen > 0 {
                return upper_edge(bucket);
            }
        }
        0
    }
}

fn bucket_of(value: u64) -> usize {
    let value = value as usize;
    if value < SUB {
        return value;
    }
    let shift = value.ilog2() - SUB_BITS;
    let bucket = (shift as usize + 1) * SUB + (value >> shift) - SUB;
    bucket.min(BUCKETS - 1)
}

fn upper_edge(bucket: usize) -> u64 {
    if bucket < SUB {
        return bucket as u64;
    }
    let shift = bucket / SUB - 1;
    ((SUB + bucket % SUB + 1) << shift) as u64 - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_their_edges_say() {
        for value in (0..5000).chain([1 << 20, (1 << 30) + 12345, (1 << 36) - 1]) {
            let edge = upper_edge(bucket_of(value));
            assert!(edge >= value && edge <= value + value / SUB as u64, "{value} -> {edge}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_of_the_values_recorded() {
        let histogram = Histogram::new();
        let mut sum = Sum::default();
        histogram.add_to(&mut sum);
        assert_eq!(sum.latency(), Latency::default());
        (1..=1000).for_each(|value| histogram.record(value));
        histogram.add_to(&mut sum);
        let latency = sum.latency();
        assert_eq!(latency.count, 1000);
        assert!((500..=531).contains(&latency.p50_ns), "{latency:?}");
        assert!((990..=1052).contains(&latency.p99_ns), "{latency:?}");
    }
}
