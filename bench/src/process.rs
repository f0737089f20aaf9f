//! The anonymous memory of another process: which ranges it has, and their pages copied out.
//!
//! Only private writable anonymous mappings count, heap and `mmap` alike: what a kernel would swap.
//! Pages that the process never touched are left out, by what pagemap says of them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use tmem::{PAGE_SIZE, Page};

/// Pages that are copied in a row, so that neighbours stay neighbours in the sample.
const RUN_PAGES: usize = 64;

const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_SWAPPED: u64 = 1 << 62;

/// Copies the anonymous pages of a process, `most` of them at most: runs spread evenly over all of
/// its memory. The process has to stand still meanwhile for the copy to be of one moment.
pub fn copy_anonymous(process: u32, most: usize) -> io::Result<Vec<Page>> {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps"))?;
    let touched = touched_pages(process, &anonymous_ranges(&maps))?;
    let runs = spread(touched.chunks(RUN_PAGES).collect(), most.div_ceil(RUN_PAGES));
    let memory = File::open(format!("/proc/{process}/mem"))?;
    let mut pages = Vec::with_capacity(most.min(touched.len()));
    for &address in runs.into_iter().flatten().take(most) {
        let mut page = [0; PAGE_SIZE];
        // What is unmapped by now is no longer the process's.
        if memory.read_exact_at(&mut page, address).is_ok() {
            pages.push(page);
        }
    }
    Ok(pages)
}

/// Bytes of anonymous memory that a process holds; zero when it is gone.
pub fn anonymous_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// The address ranges of private writable anonymous mappings in the text of a `maps` file.
fn anonymous_ranges(maps: &str) -> Vec<Range<u64>> {
    maps.lines().filter_map(anonymous_range).collect()
}

fn anonymous_range(line: &str) -> Option<Range<u64>> {
    let mut fields = line.split_ascii_whitespace();
    let (range, access) = (fields.next()?, fields.next()?);
    let inode = fields.nth(2)?;
    let name = fields.next().unwrap_or("");
    let is_anonymous = name.is_empty() || name == "[heap]" || name.starts_with("[anon:");
    if !access.starts_with("rw") || !access.ends_with('p') || inode != "0" || !is_anonymous {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// Addresses of the pages in these ranges that the process has in memory or in swap.
fn touched_pages(process: u32, ranges: &[Range<u64>]) -> io::Result<Vec<u64>> {
    let pagemap = File::open(format!("/proc/{process}/pagemap"))?;
    let page_bytes = PAGE_SIZE as u64;
    let mut touched = Vec::new();
    for range in ranges {
        let pages = (range.end - range.start) / page_bytes;
        let mut entries = vec![0; pages as usize * 8];
        pagemap.read_exact_at(&mut entries, range.start / page_bytes * 8)?;
        let entries = entries.as_chunks::<8>().0;
        let present = (0..pages).zip(entries).filter(|(_, entry)| {
            u64::from_le_bytes(**entry) & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED) != 0
        });
        touched.extend(present.map(|(at, _)| range.start + at * page_bytes));
    }
    Ok(touched)
}

/// `most` of the items, at even distances; all of them if they are fewer.
fn spread<T: Copy>(items: Vec<T>, most: usize) -> Vec<T> {
    if items.len() <= most {
        return items;
    }
    (0..most).map(|at| items[at * items.len() / most]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_writable_anonymous_mappings_count() {
        let maps = "\
00400000-00401000 rw-p 00000000 fe:00 1234                       /usr/bin/true
01000000-01003000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000002000 rw-p 00000000 00:00 0
7f0000010000-7f0000011000 rw-p 00000000 00:00 0                  [anon:arena]
7f0000020000-7f0000021000 r--p 00000000 00:00 0
7f0000030000-7f0000031000 rw-s 00000000 00:01 77                 /memfd:x (deleted)
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                  [stack]
";
        let ranges = anonymous_ranges(maps);
        let starts: Vec<_> = ranges.iter().map(|range| range.start).collect();
        assert_eq!(starts, [0x0100_0000, 0x7f00_0000_0000, 0x7f00_0001_0000]);
        assert_eq!(ranges[0].end, 0x0100_3000);
    }

    #[test]
    fn own_pages_are_found_and_untouched_ones_are_not() {
        const PAGES: usize = 4096;
        let own = std::process::id();
        let mut memory = vec![0u8; PAGES * PAGE_SIZE];
        let start = memory.as_ptr().addr();
        let at = start.next_multiple_of(PAGE_SIZE) - start + 1000 * PAGE_SIZE;
        memory[at..at + PAGE_SIZE].fill(0xa7);
        memory[at..at + 4].copy_from_slice(b"mark");
        let ranges = anonymous_ranges(&std::fs::read_to_string("/proc/self/maps").unwrap());
        let touched = touched_pages(own, &ranges).unwrap();
        let start = start as u64;
        let inside =
            touched.iter().filter(|&&at| (start..start + memory.len() as u64).contains(&at));
        assert!((1..PAGES / 2).contains(&inside.count()));
        let copied = copy_anonymous(own, usize::MAX).unwrap();
        let marked = |page: &&Page| page[..4] == *b"mark" && page[4..].iter().all(|&b| b == 0xa7);
        assert!(copied.iter().any(|page| marked(&page)));
        assert!(copy_anonymous(own, 3).unwrap().len() == 3);
        assert!(anonymous_bytes(own) > PAGE_SIZE as u64);
        drop(memory);
    }

    #[test]
    fn a_spread_is_even_and_no_larger_than_asked() {
        assert_eq!(spread((0..10).collect(), 5), [0, 2, 4, 6, 8]);
        assert_eq!(spread(vec![1, 2], 5), [1, 2]);
    }
}
