//! Pages of requests that are on the backing file: what is read there for them, and what comes of it.

use io_uring::squeue::Entry;
use tmem::Step;

use super::Schedule;
use crate::backing::{Ended, Fetched};

impl Schedule {
    /// Whether pages of a request are fetched.
    pub(super) fn is_fetched(&self, tag: u16) -> bool {
        self.requests[usize::from(tag)].fetching > 0
    }

    /// The next read of the backing file: its number, and what to queue for it.
    pub fn next_fetch(&mut self) -> Option<(usize, Entry)> {
        // Each turn but the last has pages of which the block is there already.
        loop {
            match self.fetches.begin(self.device.engine())? {
                (read, Some(entry)) => return Some((read, entry)),
                (read, None) => self.land_all(read),
            }
        }
    }

    /// A read of the backing file has completed with this; returns what to queue for the rest of it, if it
    /// did a part only.
    pub fn fetched(&mut self, read: usize, result: i32) -> Option<Entry> {
        if self.fetches.ended(read, result) == Ended::Again {
            return Some(self.fetches.entry(read));
        }
        self.land_all(read);
        None
    }

    /// Gets the pages whose blocks a read has brought.
    fn land_all(&mut self, read: usize) {
        while let Some(fetched) = self.fetches.take(read) {
            self.land(fetched);
        }
    }

    /// Gets a page from the block that was read for it.
    fn land(&mut self, fetched: Fetched<(usize, u32)>) {
        let Fetched { who: (tag, page), backed, since, image } = fetched;
        let (engine, queue) = (self.device.engine(), &mut self.engine_queue);
        let step = match image {
            Ok(image) => {
                let image = self.fetches.image(image);
                self.buffers.landed(engine, queue, tag, (page, backed), image)
            }
            Err(_) => self.buffers.not_landed(engine, queue, tag, (page, backed)),
        };
        match step {
            Step::Backed { page, backed } => {
                // It has been moved meanwhile.
                self.fetches.want((tag, page), backed, since);
                self.fetches.release(|who| who == (tag, page));
                return;
            }
            Step::Failed { page, error } => self.requests[tag].note(page, error),
            Step::Done => self.engine_queue.count_read_back(since.elapsed().as_nanos() as u64),
            Step::Taken => unreachable!("the page was taken before"),
        }
        self.requests[tag].fetching -= 1;
    }
}

impl Drop for Schedule {
    /// What is still fetched nobody waits for: the device is gone.
    fn drop(&mut self) {
        while let Some((tag, page)) = self.fetches.give_up() {
            self.buffers.abandon(tag, page);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use rustix::io::Errno;
    use tmem::PAGE_SIZE;

    use super::super::Rest;
    use super::super::tests::{TAGS, ended, read, schedule_on, stats, write};
    use super::*;
    use crate::backing::{Backing, Driver, attach};
    use crate::device::tests::{engine, noise};
    use crate::device::{BlockDevice, Op, Outcome, Request};
    use crate::uring::Uring;

    /// A device larger than its pool, and the file that takes the rest, with its directory.
    fn backed() -> (Schedule, (Arc<Backing>, Driver), tempfile::TempDir) {
        let home = tempfile::tempdir().unwrap();
        let engine = engine(8 << 20);
        let attached = attach(&engine, home.path());
        while engine.supply().unwrap().more {}
        let device = BlockDevice::new(engine, PAGES.into()).unwrap();
        (schedule_on(device, Arc::clone(&attached.0)), attached, home)
    }

    /// What is in that device, far more than 8 MiB.
    const PAGES: u32 = 4096;

    /// Fills the device: with the tag's noise, whichever it is.
    fn fill(schedule: &mut Schedule, backing: &Backing) {
        for first in (0..PAGES).step_by(32) {
            let tag = (first / 32 % TAGS as u32) as u16;
            assert_eq!(schedule.came(tag, write(first.into(), 32)), None);
            let deadline = Instant::now() + Duration::from_secs(60);
            loop {
                schedule.serve(|| false);
                if let Some(ended) = schedule.next_ended() {
                    assert_eq!(ended, (tag, Outcome::Done(32 * 4096)));
                    break;
                }
                assert!(Instant::now() < deadline, "nothing makes room");
                backing.waker().wake();
                let _ = schedule.device.engine().supply().unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Does a read of the backing file.
    #[allow(unsafe_code)]
    fn carry_out(uring: &mut Uring, entry: Entry) -> i32 {
        // SAFETY: the schedule keeps the memory until it is told of the completion.
        unsafe { uring.push(entry, 0) };
        uring.wait(None).unwrap();
        uring.completed().unwrap().1
    }

    #[test]
    fn what_is_on_the_backing_file_comes_back_neighbours_together() {
        let (mut schedule, attached, _home) = backed();
        fill(&mut schedule, &attached.0);
        assert!(schedule.device.pool_stats().bd_count > 1024);
        let mut uring = Uring::new(8).unwrap();
        let mut reads = 0;
        for first in (0..PAGES).step_by(8) {
            assert_eq!(schedule.came(0, read(first.into(), 8)), None);
            let ended = loop {
                schedule.serve(|| false);
                if let Some(ended) = schedule.next_ended() {
                    break ended;
                }
                // It waits for nothing but the file.
                assert_eq!(schedule.rest(), Rest::Forever);
                while let Some((number, mut entry)) = schedule.next_fetch() {
                    reads += 1;
                    while let Some(rest) = schedule.fetched(number, carry_out(&mut uring, entry)) {
                        entry = rest;
                    }
                }
            };
            assert_eq!(ended, (0, Outcome::Done(8 * 4096)));
            let at = first as usize % 32 * PAGE_SIZE;
            let expected = noise(32, u64::from(first / 32 % TAGS as u32) + 1);
            let got = &schedule.buffers.of_ended(0)[..8 * PAGE_SIZE];
            // What was in tag 0's own buffer is overwritten by what is read into it.
            assert!(got == &expected[at..at + 8 * PAGE_SIZE], "{first}");
        }
        let counters = schedule.device.pool_stats();
        assert!(counters.bd_reads > 1024 && counters.bd_errors == 0, "{counters:?}");
        assert!(reads * 4 < counters.bd_reads, "{reads} reads of {} pages", counters.bd_reads);
        let latency = schedule.device.latencies().readback_latency;
        assert_eq!(latency.count, counters.bd_reads);
    }

    #[test]
    fn who_reads_on_in_the_order_of_the_log_has_it_read_ahead() {
        let (mut schedule, attached, _home) = backed();
        fill(&mut schedule, &attached.0);
        let mut uring = Uring::new(8).unwrap();
        let mut read_page = |schedule: &mut Schedule, page: u32| {
            assert_eq!(schedule.came(0, read(page.into(), 1)), None);
            schedule.serve(|| false);
            let mut reads = 0;
            while let Some((number, entry)) = schedule.next_fetch() {
                assert!(schedule.fetched(number, carry_out(&mut uring, entry)).is_none());
                reads += 1;
            }
            assert_eq!(ended(schedule), [(0, Outcome::Done(4096))]);
            let at = page as usize % 32 * PAGE_SIZE;
            let expected = noise(32, u64::from(page / 32 % TAGS as u32) + 1);
            let got = &schedule.buffers.of_ended(0)[..PAGE_SIZE];
            assert!(got == &expected[at..at + PAGE_SIZE], "{page}");
            reads
        };
        let pages = 2048;
        let reads: u32 = (0..pages).map(|page| read_page(&mut schedule, page)).sum();
        assert!(reads * 16 < pages, "{reads} reads of {pages} pages");
        // Not so of who reads here and there.
        let apart = (0..64).map(|n| n * 997 % pages);
        let reads: u32 = apart.map(|page| read_page(&mut schedule, page)).sum();
        assert!(reads > 60, "{reads}");
        assert_eq!(schedule.device.pool_stats().corrupt_gets, 0);
    }

    #[test]
    fn a_block_that_cannot_be_read_is_an_error_of_its_pages_alone() {
        let (mut schedule, attached, _home) = backed();
        fill(&mut schedule, &attached.0);
        let mut uring = Uring::new(8).unwrap();
        assert_eq!(schedule.came(0, read(0, 8)), None);
        schedule.serve(|| false);
        let eio = -libc::EIO;
        // All of it in one read, which fails; then block by block, of which the first fails for good.
        let (number, _) = schedule.next_fetch().unwrap();
        assert_eq!(schedule.next_fetch().map(|(number, _)| number), None);
        assert!(schedule.fetched(number, eio).is_none());
        let mut alone = 0;
        while let Some((number, entry)) = schedule.next_fetch() {
            let result = if alone == 0 { eio } else { carry_out(&mut uring, entry) };
            assert!(schedule.fetched(number, result).is_none());
            alone += 1;
        }
        assert_eq!(alone, 8);
        let counters = schedule.device.pool_stats();
        assert_eq!((counters.bd_errors, counters.bd_reads), (1, 7));
        // The pages before the one that failed are handed over: none, or some.
        let (_, outcome) = schedule.next_ended().unwrap();
        assert_eq!(outcome, Outcome::Failed(Errno::IO));
        assert_eq!(stats(&schedule).io_errors, 1);
        // It may be better the next time.
        assert_eq!(schedule.came(1, read(0, 1)), None);
        schedule.serve(|| false);
        let (number, entry) = schedule.next_fetch().unwrap();
        assert!(schedule.fetched(number, carry_out(&mut uring, entry)).is_none());
        assert_eq!(ended(&mut schedule), [(1, Outcome::Done(4096))]);
    }

    #[test]
    fn a_page_that_is_rewritten_while_it_is_read_is_the_new_one() {
        let (mut schedule, attached, _home) = backed();
        fill(&mut schedule, &attached.0);
        let mut uring = Uring::new(8).unwrap();
        assert_eq!(schedule.came(0, read(0, 1)), None);
        schedule.serve(|| false);
        let (number, entry) = schedule.next_fetch().unwrap();
        let result = carry_out(&mut uring, entry);
        let discard = Request::new(Op::Discard, 0, 1);
        assert_eq!(schedule.came(1, discard), Some(Outcome::Done(0)));
        assert!(schedule.fetched(number, result).is_none());
        assert_eq!(ended(&mut schedule), [(0, Outcome::Done(4096))]);
        assert!(schedule.buffers.of_ended(0)[..PAGE_SIZE].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_device_goes_while_pages_are_read() {
        let (mut schedule, attached, _home) = backed();
        fill(&mut schedule, &attached.0);
        assert_eq!(schedule.came(0, read(0, 8)), None);
        schedule.serve(|| false);
        assert!(schedule.next_fetch().is_some());
        // Ends, that is.
        drop(schedule);
    }
}
