//! Figures: what the engine counts, and how the parts are added up.
//!
//! Names are the seed's (zcache and zbud of 2012) where it had one, zram's for what zram's users
//! know. Every `*_pageframes`, `*_zpages` and `*_pages` is a number, every `*_size`, `*_bytes`,
//! `*_zbytes` and `mem_*` is in bytes. Counters are kept in the shard that an operation locks
//! anyway, so that counting costs no shared cache line; reading adds the shards up and is
//! consistent per shard, not across shards.
//!
//! These of the seed's have no counterpart, and why:
//!
//! - `put_to_flush`: nothing freezes.
//! - `failed_alloc`: a put never allocates metadata.
//! - `mean_compress_poor`: a page that compresses poorly is stored raw, never refused.
//! - `objnode_count`: an object's slots are one leaf, so it would be `obj_count`.
//! - `zero_filled_pages`: they are among `same_pages`.
//! - `last_active_file_pageframes` and its like: the pool limit rules, not the sizes of the
//!   kernel's LRU lists.
//! - `pageframes_alloced`, `pageframes_freed`: [`FrameCounts`] is the account that they were for.
//! - `*_nonactive_puts_ignored` and all of RAMster's: they come with what they count.
//!
//! Its `evicted_eph_zpages` and `evicted_eph_pageframes` are `eph_evicted_*` here, `pers_zombie_count` is
//! `pers_held_pageframes`, and `writtenback_pages` is zram's `bd_writes`.

use serde::{Serialize, Serializer};

use crate::histogram::Latency;

/// Declares a struct of `u64` counters that can be added to another of its kind.
macro_rules! counters {
    ($(#[$meta:meta])* $name:ident { $($(#[$fmeta:meta])* $field:ident,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
        #[non_exhaustive]
        pub struct $name { $($(#[$fmeta])* pub $field: u64,)* }

        impl $name {
            /// Adds each of `other`'s counters to this one's.
            pub fn add(&mut self, other: &Self) {
                $(self.$field += other.$field;)*
            }

            /// Names and values, in order.
            pub fn fields(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($field), self.$field)),*].into_iter()
            }
        }
    };
}

counters! {
    /// What one pool holds, and what was asked of it.
    PoolCounters {
        /// Bytes of user data held: pages that a get would find, times the page size.
        orig_data_size,
        /// Bytes of zpages held, with headers and rounding; same-filled pages take none.
        compr_data_size,
        /// Pages held in their slot alone because one 32-bit word fills them.
        same_pages,
        /// Pages held raw because they do not compress.
        huge_pages,
        /// Pages held as zpages, raw ones included.
        zpages,
        /// Pages that are on the backing file, and nowhere else.
        bd_count,
        /// Objects with at least one page. Each has a frame for its slot words.
        obj_count,
        /// Pages whose last put failed: a get of them is an error.
        lost_pages,
        /// Puts that stored the page.
        succ_puts,
        /// Of those, puts that replaced an older copy.
        dup_puts_replaced,
        /// Puts refused because no frame was to be had.
        failed_puts,
        /// Persistent pages of writes that the front end gave up: their puts had been told to come back, or
        /// were never made because that of another page of the write had failed.
        given_up_puts,
        /// Times that a put was told to come back because the arena had not yet grown.
        starved_puts,
        /// Pages read back from the backing file.
        bd_reads,
        /// Times that a page could not be read back, because the backing file's device failed.
        bd_errors,
        /// Pages written to the backing file. What the cleaner wrote again does not count.
        bd_writes,
        /// Gets that found the page.
        succ_gets,
        /// Gets that found nothing.
        missed_gets,
        /// Gets of a page that a failed put had lost.
        lost_gets,
        /// Gets whose zpage did not match its checksum.
        corrupt_gets,
        /// Page flushes asked for.
        flush_total,
        /// Page flushes that found a page.
        flush_found,
        /// Pages dropped because they were marked as freed: nobody asked for a flush of them.
        freed_pages,
        /// Object flushes asked for.
        flobj_total,
        /// Object flushes that found the object.
        flobj_found,
    }
}

impl PoolCounters {
    /// Counts a get as one of a corrupt page that its shard has counted as a success. The pool may
    /// have been destroyed since, and its number be another's.
    pub(crate) fn count_corrupt(&mut self) {
        self.succ_gets = self.succ_gets.saturating_sub(1);
        self.corrupt_gets += 1;
    }

    /// Whether the pool holds nothing: all that goes down as well as up is at zero.
    pub(crate) fn holds_nothing(&self) -> bool {
        let pages = [self.zpages, self.same_pages, self.huge_pages, self.lost_pages, self.bd_count];
        let rest = [self.orig_data_size, self.compr_data_size, self.obj_count];
        pages.iter().chain(&rest).all(|&held| held == 0)
    }
}

counters! {
    /// What zbud holds in frames of one class (ephemeral or persistent).
    ClassCounters {
        /// Frames that hold zpages.
        pageframes,
        /// The most there were when it was looked at, about once a second.
        pageframes_max,
        /// Zpages held.
        zpages,
        /// The most there were.
        zpages_max,
        /// Bytes of zpages held, with headers and the rounding up to granules.
        zbytes,
        /// The most there were.
        zbytes_max,
        /// Zpages ever stored.
        cumul_zpages,
        /// Bytes of zpages ever stored.
        cumul_zbytes,
        /// Frames that are left alone until they are empty, because a header in them is corrupt.
        closed_pageframes,
        /// Frames on their way to the backing file.
        held_pageframes,
        /// Frames of which the backing file has a copy: the next to go, without being written.
        clean_pageframes,
        /// Frames with two zpages or more.
        buddied_count,
        /// Frames with one zpage.
        unbuddied_count,
        /// Frames evicted from the LRU end.
        evicted_pageframes,
        /// Zpages evicted with them.
        evicted_zpages,
        /// Frames rewritten without their holes to make room for one zpage more.
        compacted_pageframes,
    }
}

counters! {
    /// Where frames for puts came from, and why they did not.
    AllocCounters {
        /// Zpages that went into a frame beside others.
        partner_puts,
        /// Persistent puts that took an ephemeral frame.
        pers_ate_eph,
        /// Persistent puts that found no ephemeral frame to take.
        pers_ate_eph_failed,
        /// Ephemeral puts that took the LRU ephemeral frame.
        eph_ate_tail,
        /// Ephemeral puts that found no ephemeral frame to take.
        eph_ate_tail_failed,
        /// Times that no free frame was there when one was needed.
        failed_getfreepages,
        /// Persistent puts refused for want of a frame.
        failed_pers_puts,
        /// Ephemeral puts refused for want of a frame.
        failed_eph_puts,
        /// Pages stored raw because they compress poorly.
        compress_poor,
    }
}

counters! {
    /// What the backing file holds, and what was written for that. Zeros without one.
    LogCounters {
        /// Segments of 1 MiB that it has.
        log_segments,
        /// Segments that nothing is in.
        log_segments_free,
        /// Bytes of zpages in it that are alive, with headers and rounding.
        log_live_bytes,
        /// Bytes written to it: images of frames.
        log_written_bytes,
        /// Bytes written to it by the cleaner.
        log_cleaner_written_bytes,
        /// Segments cleaned.
        log_cleaned_segments,
        /// Writes that failed, and reads of the cleaner.
        log_failed_jobs,
        /// Pages that are being written to it, by the cleaner too.
        outstanding_writeback_pages,
    }
}

/// The frames of the arena at one moment. `allocated = free + ephemeral + persistent + reserve + log`
/// holds whenever no put is under way.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[non_exhaustive]
pub struct FrameCounts {
    /// Frames with memory behind them.
    pub frames_allocated: u64,
    /// Frames that wait for a put.
    pub frames_free: u64,
    /// Frames of ephemeral pools: zpages, and the objects' slot words.
    pub frames_ephemeral: u64,
    /// Frames of persistent pools: zpages, and the objects' slot words.
    pub frames_persistent: u64,
    /// Frames that the shards keep, one each, for rewriting a frame without its holes.
    pub frames_reserve: u64,
    /// Frames with what is known of blocks on the backing file.
    pub frames_log: u64,
}

/// Everything that the engine knows of itself.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// Sum over all pools that there are and were; those that are gone hold nothing.
    #[serde(flatten)]
    pub pools: PoolCounters,
    /// Most objects with pages at a time, when it was looked at.
    pub obj_count_max: u64,
    /// Bytes of memory held for data: frames, directories, tables.
    pub mem_used_total: u64,
    /// Largest `mem_used_total` seen.
    pub mem_used_max: u64,
    /// The pool limit: what `mem_used_total` may become.
    pub mem_limit: u64,
    /// The frames.
    #[serde(flatten)]
    pub frames: FrameCounts,
    /// Zbud's ephemeral class; serialised as `eph_pageframes` and so on.
    #[serde(flatten, serialize_with = "with_prefix_eph")]
    pub eph: ClassCounters,
    /// Zbud's persistent class; serialised as `pers_pageframes` and so on.
    #[serde(flatten, serialize_with = "with_prefix_pers")]
    pub pers: ClassCounters,
    /// Where frames came from.
    #[serde(flatten)]
    pub alloc: AllocCounters,
    /// The backing file.
    #[serde(flatten)]
    pub log: LogCounters,
    /// Latencies of all puts and gets ever.
    #[serde(flatten)]
    pub latencies: Latencies,
}

/// How long puts and gets take, per page.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Latencies {
    /// Puts that ended, stored or refused. Of one that had to be made again, the last attempt.
    pub put_latency: Latency,
    /// Gets, whatever they found; not those that had to be read from the backing file.
    pub get_latency: Latency,
    /// Gets of pages that had to be read from the backing file, reading included.
    pub readback_latency: Latency,
}

fn with_prefix_eph<S: Serializer>(counters: &ClassCounters, to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(counters.fields().map(|(name, value)| (format!("eph_{name}"), value)))
}

fn with_prefix_pers<S: Serializer>(counters: &ClassCounters, to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(counters.fields().map(|(name, value)| (format!("pers_{name}"), value)))
}
