//! What is on its way to the file, and which frames go there first.

use tmem::{
    Got, Handle, Health, Image, Job, JobFailed, Opened, PAGE_SIZE, PutError, WritebackSettings,
};

use crate::contents::Contents;
use crate::sim::*;

/// A pool that is nearly full of pages that do not compress, one a frame, put in their order; the part of it that is to be
/// free is not free. What is written is not encrypted.
fn nearly_full(pages: u64) -> Sim {
    let profile = Profile { frames: 400, shards: 1, encrypts: false, ..CALM };
    let mut sim = Sim::new(profile, 1);
    fill(&mut sim, 0..pages);
    sim
}

/// Half of the pool is to be free.
fn let_half_go(sim: &Sim) {
    let settings =
        WritebackSettings { low_permille: 499, high_permille: 500, ..Default::default() };
    sim.engine.set_writeback_settings(&settings).unwrap();
}

/// Where a page is: in memory, on the file, or nowhere. It is what was put, if it is in memory.
fn is_backed(sim: &mut Sim, page: u64) -> Option<bool> {
    let handle = Handle::from_page(sim.pool, page);
    let mut bytes = [0; PAGE_SIZE];
    let got = sim.engine.get(&mut sim.queue, handle, &mut bytes);
    match got.unwrap() {
        Got::Hit => {
            sim.compare(handle, got, &bytes);
            Some(false)
        }
        Got::Backed(_) => Some(true),
        Got::Miss => None,
    }
}

/// Those of so many pages that are on the file.
fn on_file(sim: &mut Sim, pages: u64) -> Vec<u64> {
    (0..pages).filter(|page| is_backed(sim, *page) == Some(true)).collect()
}

/// What a job is to write, as a number for each of its blocks, in no order.
fn blocks(sim: &Sim, job: Job) -> Vec<u64> {
    let start = sim.writeback.buffer(job.unit).as_ptr();
    // SAFETY: the unit's buffer has the job's bytes, which nobody changes while the job is under way.
    let bytes = unsafe { std::slice::from_raw_parts(start, job.bytes) };
    let seed = |block: &[u8]| u64::from_le_bytes(*block.last_chunk().unwrap());
    let mut blocks: Vec<_> = bytes.chunks(PAGE_SIZE).map(seed).collect();
    blocks.sort_unstable();
    blocks
}

#[test]
fn what_is_on_its_way_is_in_memory_until_it_is_written() {
    let mut sim = nearly_full(370);
    let_half_go(&sim);
    sim.start_job();
    let [job] = sim.file.under_way[..] else { panic!("{:?}", sim.file.under_way) };
    let pages = (job.bytes / PAGE_SIZE) as u64;
    assert_eq!(sim.engine.stats().log.outstanding_writeback_pages, pages);
    // The file has nothing of them yet.
    assert_eq!(on_file(&mut sim, 370), [0; 0]);
    assert_eq!(sim.engine.stats().pools.bd_count, 0);
    // One is rewritten, and one discarded.
    let (rewritten, discarded) = (Handle::from_page(sim.pool, 3), Handle::from_page(sim.pool, 5));
    let contents = Contents::Random(4711).page();
    sim.engine.put(&mut sim.queue, rewritten, &contents).unwrap();
    sim.map.insert(3, Held::Page(Box::new(contents)));
    assert!(sim.engine.flush_page(discarded));
    sim.map.remove(&5);
    sim.end_job();
    let stats = sim.engine.stats();
    assert_eq!(stats.log.outstanding_writeback_pages, 0);
    assert_eq!((stats.pools.bd_count, stats.pools.bd_writes), (pages - 2, pages - 2));
    assert_eq!(stats.log.log_live_bytes, (pages - 2) * BLOCK);
    // Those that were put first.
    let expected: Vec<_> = (0..pages).filter(|page| *page != 3 && *page != 5).collect();
    assert_eq!(on_file(&mut sim, 370), expected);
    assert_eq!((is_backed(&mut sim, 3), is_backed(&mut sim, 5)), (Some(false), None));
    sim.end();
}

#[test]
fn what_could_not_be_written_is_what_goes_next() {
    let mut sim = nearly_full(370);
    let_half_go(&sim);
    sim.start_job();
    let failed = sim.file.under_way.pop().unwrap();
    let pages = blocks(&sim, failed);
    sim.writeback.ended(&sim.engine, failed.unit, Err(JobFailed), sim.now);
    let stats = sim.engine.stats();
    assert_eq!((stats.log.outstanding_writeback_pages, stats.pools.bd_count), (0, 0));
    assert_eq!((stats.pers.held_pageframes, stats.log.log_failed_jobs), (0, 1));
    assert_eq!(sim.writeback.health(), Health::Failing);
    sim.now += sim.writeback.rests_for(sim.now).unwrap();
    sim.start_job();
    let again = sim.file.under_way[0];
    assert_eq!(blocks(&sim, again), pages);
    assert_ne!(again.offset, failed.offset, "what became of the first blocks nobody knows");
    sim.end_job();
    assert_eq!(sim.engine.stats().pools.bd_count, pages.len() as u64);
    assert_eq!(sim.writeback.health(), Health::Good);
    sim.end();
}

/// Also after it has failed for long.
#[test]
fn a_file_that_takes_one_thing_and_fails_with_another_is_soon_tried_again() {
    let mut sim = nearly_full(370);
    let_half_go(&sim);
    let two = |sim: &mut Sim| {
        sim.start_job();
        sim.start_job();
        [sim.file.under_way.pop().unwrap(), sim.file.under_way.pop().unwrap()]
    };
    for _ in 0..10 {
        for job in two(&mut sim) {
            sim.writeback.ended(&sim.engine, job.unit, Err(JobFailed), sim.now);
        }
        sim.now += sim.writeback.rests_for(sim.now).unwrap();
    }
    let [bad, good] = two(&mut sim);
    sim.writeback.ended(&sim.engine, bad.unit, Err(JobFailed), sim.now);
    assert_eq!(sim.writeback.rests_for(sim.now), Some(30 * SECOND));
    sim.file.under_way.push(good);
    sim.end_job();
    // As long as nothing is written nobody is to wait for it.
    assert_eq!(sim.writeback.health(), Health::Failing);
    assert!(!sim.engine.writeback_wanted());
    assert!(sim.writeback.next(&sim.engine, sim.now).is_none());
    let rest = sim.writeback.rests_for(sim.now).unwrap();
    assert!(rest <= SECOND / 10, "{rest}");
    sim.now += rest;
    sim.start_job();
    assert_eq!((sim.file.under_way.len(), sim.writeback.health()), (1, Health::Good));
    assert!(sim.engine.writeback_wanted());
    sim.end();
}

#[test]
fn a_file_that_does_not_answer_is_not_waited_for() {
    let mut sim = nearly_full(370);
    let_half_go(&sim);
    sim.start_job();
    sim.now += 3 * SECOND;
    sim.start_job();
    assert_eq!(sim.writeback.health(), Health::Good);
    sim.now += 1;
    sim.start_job();
    assert_eq!(sim.writeback.health(), Health::Late);
    assert!(!sim.engine.writeback_wanted());
    let put = |sim: &mut Sim, page: u64| {
        while sim.engine.supply().unwrap().more {}
        let contents = Contents::Random(page as u32).page();
        let handle = Handle::from_page(sim.pool, page);
        let put = sim.engine.put(&mut sim.queue, handle, &contents);
        if put == Ok(()) {
            sim.map.insert(page, Held::Page(Box::new(contents)));
        }
        put
    };
    let refused = (370..600).map(|page| (page, put(&mut sim, page))).find(|(_, put)| put.is_err());
    let (page, Err(error)) = refused.unwrap() else { unreachable!() };
    // It would be told to come back if anything was to be expected of the file.
    assert_eq!(error, PutError::Full);
    sim.map.insert(page, Held::Lost);
    while !sim.file.under_way.is_empty() {
        sim.end_job();
    }
    assert_eq!(sim.writeback.health(), Health::Good);
    assert_eq!(put(&mut sim, page), Ok(()));
    sim.end();
}

#[test]
fn what_was_read_goes_before_what_was_put_first_and_what_is_rewritten_stays() {
    let mut sim = nearly_full(300);
    // Again, so that others were put before these.
    fill(&mut sim, 0..50);
    let mut read: Vec<_> = (250..270).collect();
    for page in &read {
        assert_eq!(is_backed(&mut sim, *page), Some(false));
    }
    let_half_go(&sim);
    let count = written(&mut sim) / BLOCK;
    assert!((70..200).contains(&count), "{count}");
    read.splice(0..0, 50..50 + count - 20);
    assert_eq!(on_file(&mut sim, 300), read);
    sim.end();
}

/// What is swapped in is hardly ever read again; a page that is, is not what may go.
#[test]
fn a_read_is_a_second_chance_where_pages_are_read_again_and_again() {
    let mut sim = nearly_full(300);
    for _ in 0..200 {
        for page in 0..100 {
            assert_eq!(is_backed(&mut sim, page), Some(false));
        }
    }
    let_half_go(&sim);
    let count = written(&mut sim) / BLOCK;
    assert!((70..190).contains(&count), "{count}");
    let gone = on_file(&mut sim, 300);
    // Each sixteenth was taken for one that is not wanted any more, to see whether that is so.
    let (used, unused): (Vec<u64>, Vec<u64>) = gone.iter().copied().partition(|page| *page < 100);
    assert!(used.len() <= 10, "{used:?}");
    let expected: Vec<_> = (100..100 + unused.len() as u64).collect();
    assert_eq!(unused, expected);
    sim.end();
}

/// Frames that the file has copies of go without being written, and in the same order.
#[test]
fn a_copy_that_was_read_has_a_second_chance() {
    let mut sim = nearly_full(200);
    let settings =
        WritebackSettings { age_seconds: Some(1), keep_copies: true, ..Default::default() };
    sim.engine.set_writeback_settings(&settings).unwrap();
    for _ in 0..4 {
        sim.now += SECOND;
        written(&mut sim);
    }
    assert_eq!(sim.engine.stats().pers.clean_pageframes, 200);
    for page in 0..20 {
        assert_eq!(is_backed(&mut sim, page), Some(false));
    }
    // Until some of them are needed.
    fill(&mut sim, 200..450);
    let gone = sim.engine.stats().pools.bd_count;
    assert!((20..150).contains(&gone), "{gone}");
    assert_eq!(on_file(&mut sim, 200), (20..20 + gone).collect::<Vec<_>>());
    sim.end();
}

/// Pages that compress, and that do not, such that half of all frames are not all of the latter's.
const MIX: (u64, u64) = if cfg!(feature = "seed-zbud") { (300, 200) } else { (500, 100) };

/// Frames of pages that do not compress cost most: one more is free for each.
#[test]
fn what_does_not_compress_goes_first() {
    let profile = Profile { frames: 400, shards: 1, encrypts: false, ..CALM };
    let mut sim = Sim::new(profile, 1);
    let (first_raw, raw) = MIX;
    let pages = first_raw + raw;
    for page in 0..pages {
        while sim.engine.supply().unwrap().more {}
        let contents = match page {
            _ if page >= first_raw => Contents::Random(page as u32),
            _ => Contents::Mixed { seed: page as u32, noise: 1000 },
        };
        let (handle, contents) = (Handle::from_page(sim.pool, page), contents.page());
        sim.engine.put(&mut sim.queue, handle, &contents).unwrap();
        sim.map.insert(page, Held::Page(Box::new(contents)));
    }
    let_half_go(&sim);
    let count = written(&mut sim) / BLOCK;
    assert!((20..raw).contains(&count), "{count}");
    assert_eq!(on_file(&mut sim, pages), (first_raw..first_raw + count).collect::<Vec<_>>());
    // When none are left, the others do.
    fill(&mut sim, pages..pages + raw);
    written(&mut sim);
    let gone = on_file(&mut sim, pages + raw);
    assert!(gone.iter().any(|page| *page < first_raw), "{gone:?}");
    sim.end();
}

/// A block has one seal, so all of its pages are errors, and they alone.
#[test]
fn a_block_that_has_changed_is_an_error_of_its_pages_and_counted() {
    let mut sim = nearly_full(370);
    let_half_go(&sim);
    let count = written(&mut sim) / BLOCK;
    let changed = Handle::from_page(sim.pool, 7);
    let mut page = [0; PAGE_SIZE];
    let Ok(Got::Backed(backed)) = sim.engine.get(&mut sim.queue, changed, &mut page) else {
        panic!("it is not on the file")
    };
    sim.file.bytes[backed.offset() as usize + 77] ^= 4;
    let mut errors = 0;
    for number in 0..count {
        let handle = Handle::from_page(sim.pool, number);
        let Got::Backed(backed) = sim.engine.get(&mut sim.queue, handle, &mut page).unwrap() else {
            panic!("page {number} is not on the file")
        };
        let mut block = sim.file.block(backed);
        let mut opened = Opened::default();
        let image = Image::new(&mut block, &mut opened);
        let got = sim.engine.get_backed(&mut sim.queue, handle, backed, image, &mut page);
        if number == 7 {
            assert_eq!(got, Err(tmem::GetError::Corrupt));
            errors += 1;
        } else {
            sim.compare(handle, got, &page);
        }
    }
    let counters = sim.engine.stats().pools;
    assert_eq!((counters.bd_reads, counters.corrupt_gets), (count, errors));
}
