//! A connection without its socket, on an export of which most is on the backing file. The file is in
//! memory: a test says when a block of it comes, or that it does not.

mod parked;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tmem::{BACKING_BYTES_MIN, Backed, Config, Engine, Image, Opened, PAGE_SIZE, Page, Writeback};
use tmem_ublk_target::bytes::{Part, Stored};
use tmem_ublk_target::device::{BlockDevice, IoStats};
use tmem_ublk_target::nbd::{Export, Exports, Progress, Protocol};

use crate::backing::{TABLES, carry_out};
use crate::fuzzing::reader::Reader;
use crate::fuzzing::spec::*;
use crate::served::noise;

/// Pages of the export, none of which compresses, and frames of memory.
const PAGES: u64 = 400;
const FRAMES: u64 = 160;

const PAGE: u64 = 4096;

struct Talk {
    protocol: Protocol,
    export: Arc<Export>,
    engine: Arc<Engine>,
    writeback: Writeback,
    file: Vec<u8>,
    /// What the export holds.
    plain: Vec<u8>,
    now: Instant,
    cookie: u64,
    is_structured: bool,
    /// What was heard and not looked at yet.
    heard: Vec<u8>,
    /// Blocks that have come.
    landed: usize,
}

/// What a read came to.
type Data = Result<Vec<u8>, u32>;

impl Talk {
    /// A client that has chosen the export, of which the first pages are on the file.
    fn new(is_structured: bool) -> Self {
        let limit = Config::limit_min(1) + TABLES + PAGE + FRAMES * (PAGE + 32);
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: 1 }).unwrap();
        let engine = Arc::new(engine);
        while engine.supply().unwrap().more {}
        let device = BlockDevice::new(Arc::clone(&engine), PAGES).unwrap();
        let writeback = engine.attach_backing(BACKING_BYTES_MIN, None).unwrap();
        let exports = Arc::new(Exports::default());
        let export = Arc::new(Export::new("swap0", Arc::new(device), 1, true));
        exports.add(Arc::clone(&export));
        let mut talk = Self {
            protocol: Protocol::new(exports, 0),
            export,
            engine,
            writeback,
            file: vec![0xa5; BACKING_BYTES_MIN as usize],
            plain: vec![0; (PAGES * PAGE) as usize],
            now: Instant::now(),
            cookie: 0,
            is_structured,
            heard: Vec::new(),
            landed: 0,
        };
        talk.haggle();
        (0..PAGES).for_each(|page| talk.put(page, page + 1));
        let is_backed = |page| talk.backed(page).is_some();
        assert!((0..PAGES / 2).all(is_backed), "what is cold is in memory still");
        talk
    }

    fn simple() -> Self {
        Self::new(false)
    }

    fn structured() -> Self {
        Self::new(true)
    }

    fn both() -> [Self; 2] {
        [Self::simple(), Self::structured()]
    }

    fn haggle(&mut self) {
        self.protocol.advance(self.now);
        self.say(&be32(HANDSHAKE_FLAGS.into()));
        if self.is_structured {
            self.say(&option(OPT_STRUCTURED_REPLY, &[]));
        }
        self.say(&option(OPT_GO, &inform(b"swap0", &[])));
        assert_eq!(self.advance(), Progress::Hungry);
        assert!(!self.protocol.is_negotiating());
        self.hear();
    }

    /// Has the page written by somebody else, and what there is no memory for go to the file.
    fn put(&mut self, page: u64, seed: u64) {
        let data = noise(PAGE_SIZE, seed);
        self.plain[(page * PAGE) as usize..][..PAGE_SIZE].copy_from_slice(&data);
        let part = Part::first(page * PAGE, PAGE);
        let store =
            |talk: &Self| talk.export.device().write_part(&mut talk.export.queue(0), &part, &data);
        while store(self) == Stored::Starved {
            self.write_back();
        }
        self.write_back();
    }

    /// Does all that writeback wants done.
    fn write_back(&mut self) {
        while let Some(job) = self.writeback.next(&self.engine, 0) {
            carry_out(&self.writeback, job, &mut self.file, job.bytes);
            self.writeback.ended(&self.engine, job.unit, Ok(()), 0);
        }
    }

    /// Has a page written again, and go to the file again: it is elsewhere there.
    fn move_page(&mut self, page: u64) {
        let before = self.backed(page);
        self.put(page, page + 5000);
        (PAGES / 2..PAGES).for_each(|other| self.put(other, other + 5000));
        assert!(self.backed(page).is_some() && self.backed(page) != before);
    }

    /// Has pages written until there is no memory for one more.
    fn exhaust(&mut self) {
        let data = noise(PAGE_SIZE, 77);
        for page in PAGES / 2..PAGES {
            let (part, mut queue) = (Part::first(page * PAGE, PAGE), self.export.queue(0));
            if self.export.device().write_part(&mut queue, &part, &data) == Stored::Starved {
                return;
            }
            self.plain[(page * PAGE) as usize..][..PAGE_SIZE].copy_from_slice(&data);
        }
        panic!("there is memory without end");
    }

    /// Where a page is on the file, if it is there.
    fn backed(&self, page: u64) -> Option<Backed> {
        let (part, mut target) = (Part::first(page * PAGE, PAGE), [0; PAGE_SIZE]);
        let mut queue = self.export.queue(0);
        self.export.device().read_part(&mut queue, &part, &mut target).unwrap()
    }

    fn block(&self, backed: Backed) -> Page {
        self.file[backed.offset() as usize..][..PAGE_SIZE].try_into().unwrap()
    }

    fn say(&mut self, bytes: &[u8]) {
        self.protocol.inbox.room()[..bytes.len()].copy_from_slice(bytes);
        self.protocol.inbox.filled(bytes.len());
    }

    fn ask(&mut self, command: u16, offset: u64, length: u32) {
        self.ask_with(command, 0, offset, length);
    }

    fn ask_with(&mut self, command: u16, flags: u16, offset: u64, length: u32) {
        self.cookie += 1;
        self.say(&request(flags, command, self.cookie, offset, length));
    }

    fn advance(&mut self) -> Progress {
        loop {
            match self.protocol.advance(self.now) {
                Progress::Busy => {}
                progress => return progress,
            }
        }
    }

    /// Takes what there is to send.
    fn hear(&mut self) -> Vec<u8> {
        let heard = self.protocol.outbox.unsent().to_vec();
        self.sent(heard.len());
        heard
    }

    /// So much was sent: what a connection's link does then.
    fn sent(&mut self, count: usize) {
        self.protocol.outbox.sent(count);
        self.protocol.deliver();
    }

    /// What it wants from the file.
    fn wants(&mut self) -> Vec<(usize, Backed)> {
        std::iter::from_fn(|| self.protocol.next_want()).collect()
    }

    /// Goes on until it waits for the file, and says what for.
    fn want(&mut self) -> Vec<(usize, Backed)> {
        while self.advance() == Progress::Flush {
            self.heard.extend(self.protocol.outbox.unsent());
            assert!(!self.hear().is_empty(), "it waits for nothing to be sent");
        }
        let wants = self.wants();
        assert!(!wants.is_empty() && self.protocol.is_reading());
        wants
    }

    /// The block of what it wants comes.
    fn land(&mut self, (want, backed): (usize, Backed)) -> Option<Backed> {
        self.landed += 1;
        let mut image = self.block(backed);
        self.protocol.landed(
            want,
            Some(Image::new(&mut image, &mut Opened::default())),
            Duration::from_micros(70),
        )
    }

    /// It cannot be read.
    fn fail(&mut self, (want, _): (usize, Backed)) -> Option<Backed> {
        self.protocol.landed(want, None, Duration::from_micros(70))
    }

    /// Goes on until it has done all that it was asked for, while all blocks come. Returns what was heard.
    fn finish(&mut self) -> Vec<u8> {
        let mut heard = std::mem::take(&mut self.heard);
        loop {
            let progress = self.advance();
            let sent = self.hear();
            heard.extend(&sent);
            match progress {
                Progress::Hungry => return heard,
                Progress::Flush => assert!(!sent.is_empty(), "it waits for nothing to be sent"),
                Progress::Reading => {
                    for want in self.wants() {
                        assert_eq!(self.land(want), None);
                    }
                }
                progress => panic!("{progress:?}"),
            }
        }
    }

    /// The error of a simple reply, or of a structured one without data.
    fn error(&mut self) -> u32 {
        let heard = self.finish();
        simple_error(&mut Reader(&heard), self.cookie)
    }

    /// Takes apart the reply to the last read.
    fn data(&self, heard: &[u8], offset: u64, length: u32) -> Data {
        let mut heard = Reader(heard);
        let data = self.data_of(&mut heard, self.cookie, offset, length);
        assert!(heard.is_empty(), "there is more than the reply");
        data
    }

    fn data_of(&self, heard: &mut Reader<'_>, cookie: u64, offset: u64, length: u32) -> Data {
        if !self.is_structured {
            return match simple_error(heard, cookie) {
                0 => Ok(heard.take(length as usize).unwrap().to_vec()),
                error => Err(error),
            };
        }
        let mut data = Vec::new();
        loop {
            assert_eq!(heard.u32(), Some(CHUNK_MAGIC));
            let (flags, kind) = (heard.u16().unwrap(), heard.u16().unwrap());
            assert_eq!(heard.u64(), Some(cookie));
            let bytes = heard.u32().unwrap() as usize;
            let mut payload = Reader(heard.take(bytes).unwrap());
            if kind == CHUNK_ERROR {
                assert_eq!(flags, CHUNK_DONE);
                return Err(payload.u32().unwrap());
            }
            assert_eq!(payload.u64(), Some(offset + data.len() as u64));
            data.extend(payload.0);
            if flags & CHUNK_DONE != 0 {
                assert_eq!(data.len(), length as usize);
                return Ok(data);
            }
        }
    }

    #[track_caller]
    fn assert_reads(&mut self, offset: u64, length: u32) {
        self.ask(CMD_READ, offset, length);
        let heard = self.finish();
        let data = self.data(&heard, offset, length).unwrap();
        assert!(data == self.plain[offset as usize..][..length as usize], "other data was read");
    }

    fn io(&self) -> IoStats {
        self.export.io_stats()
    }
}

fn simple_error(heard: &mut Reader<'_>, cookie: u64) -> u32 {
    assert_eq!(heard.u32(), Some(SIMPLE_REPLY_MAGIC), "no simple reply");
    let error = heard.u32().unwrap();
    assert_eq!(heard.u64(), Some(cookie));
    error
}

#[test]
fn a_read_is_answered_when_its_last_page_has_landed_and_each_is_got_once() {
    for mut talk in Talk::both() {
        // Two of them are in memory.
        talk.put(3, 7000);
        talk.put(20, 7001);
        for (offset, length) in [(0, 131_072), (100, 131_072), (3 * PAGE + 5, 10_000)] {
            talk.ask(CMD_READ, offset, length);
            let before = talk.export.device().pool_stats();
            let mut wants = talk.want();
            let parts = Part::all(offset, length as usize).count();
            assert!((1..parts).contains(&wants.len()));
            while let Some(want) = wants.pop() {
                assert_eq!(talk.advance(), Progress::Reading);
                assert!(talk.protocol.outbox.is_empty());
                assert_eq!(talk.land(want), None);
            }
            let heard = talk.finish();
            let data = talk.data(&heard, offset, length).unwrap();
            assert!(data == talk.plain[offset as usize..][..length as usize]);
            let after = talk.export.device().pool_stats();
            assert_eq!(after.succ_gets - before.succ_gets, parts as u64);
        }
        assert!(talk.export.device().latencies().readback_latency.count > 60);
        assert_eq!(talk.io().io_errors, 0);
    }
}

#[test]
fn parts_and_long_runs_of_pages_are_read() {
    for mut talk in Talk::both() {
        for (offset, length) in [
            (0, 1),
            (4095, 2),
            (5 * PAGE + 77, 300),
            (9 * PAGE, 4096),
            (50, 600_000),
            (190 * PAGE, 500_000),
            (PAGES * PAGE - 5, 5),
        ] {
            talk.assert_reads(offset, length);
        }
    }
    let mut talk = Talk::structured();
    talk.ask_with(CMD_READ, FLAG_DF, 50, 600_000);
    let heard = talk.finish();
    assert!(talk.data(&heard, 50, 600_000).unwrap() == talk.plain[50..600_050]);
}

#[test]
fn what_was_asked_before_is_answered_meanwhile_and_what_comes_after_is_not() {
    for mut talk in Talk::both() {
        let hot = PAGES - 1;
        talk.ask(CMD_READ, hot * PAGE, 4096);
        talk.ask(CMD_READ, 0, 4096);
        talk.ask(CMD_READ, hot * PAGE, 4096);
        let wants = talk.want();
        let first = talk.hear();
        let data = talk.data_of(&mut Reader(&first), 1, hot * PAGE, 4096).unwrap();
        assert!(data == talk.plain[(hot * PAGE) as usize..]);
        assert_eq!((talk.advance(), talk.hear()), (Progress::Reading, vec![]));
        wants.into_iter().for_each(|want| assert_eq!(talk.land(want), None));
        let rest = talk.finish();
        let mut rest = Reader(&rest);
        let data = talk.data_of(&mut rest, 2, 0, 4096).unwrap();
        assert!(data == talk.plain[..PAGE_SIZE]);
        assert!(talk.data_of(&mut rest, 3, hot * PAGE, 4096).is_ok() && rest.is_empty());
    }
}

#[test]
fn a_part_of_a_page_on_the_file_is_written_once_the_page_is_in_memory() {
    for mut talk in Talk::both() {
        let ends = 8 * PAGE - 1;
        for (offset, bytes, blocks) in
            [(10, 20, 1), (2 * PAGE + 4000, 200, 2), (ends, 4 * 4096 + 2, 2), (16 * PAGE, 4096, 0)]
        {
            let data = noise(bytes, offset);
            talk.plain[offset as usize..][..bytes].copy_from_slice(&data);
            talk.ask(CMD_WRITE, offset, bytes as u32);
            talk.say(&data);
            talk.write_back();
            assert_eq!((talk.error(), std::mem::take(&mut talk.landed)), (0, blocks));
            assert!(talk.backed(offset / PAGE).is_none());
            talk.assert_reads(offset / PAGE * PAGE, 6 * 4096);
            talk.landed = 0;
        }
        for (flags, offset) in [(0, 23 * PAGE + 5), (FLAG_NO_HOLE, 24 * PAGE + 6)] {
            talk.plain[offset as usize..][..70].fill(0);
            talk.ask_with(CMD_WRITE_ZEROES, flags, offset, 70);
            assert_eq!((talk.error(), std::mem::take(&mut talk.landed)), (0, 1));
            talk.assert_reads(offset - 1000, 5000);
            talk.landed = 0;
        }
        // Nothing has to be read for what leaves a part alone.
        talk.ask(CMD_TRIM, 30 * PAGE + 1, 4095);
        assert_eq!((talk.error(), talk.landed), (0, 0));
        talk.assert_reads(30 * PAGE, 4096);
        assert_eq!(talk.io().io_errors, 0);
    }
}

#[test]
fn a_write_to_a_page_that_is_written_meanwhile_changes_what_it_is_then() {
    for is_moved in [false, true] {
        let mut talk = Talk::simple();
        talk.ask(CMD_WRITE, 5 * PAGE + 10, 3);
        talk.say(b"new");
        let wants = talk.want();
        // The block as it was before.
        let mut image = talk.block(wants[0].1);
        if is_moved {
            talk.move_page(5);
        } else {
            talk.put(5, 9000);
        }
        let took = Duration::from_micros(70);
        assert_eq!(
            talk.protocol.landed(
                wants[0].0,
                Some(Image::new(&mut image, &mut Opened::default())),
                took
            ),
            None
        );
        assert_eq!(talk.error(), 0);
        assert_eq!(talk.landed, usize::from(is_moved));
        talk.plain[5 * PAGE_SIZE + 10..][..3].copy_from_slice(b"new");
        talk.assert_reads(5 * PAGE, 4096);
    }
}

#[test]
fn a_page_that_is_moved_meanwhile_is_read_where_it_is_then() {
    for mut talk in Talk::both() {
        talk.ask(CMD_READ, 0, 4 * 4096);
        let wants = talk.want();
        assert_eq!(wants.len(), 4);
        // One is in memory then, one is elsewhere on the file, and one is nowhere.
        talk.move_page(1);
        talk.put(2, 9000);
        talk.plain[3 * PAGE_SIZE..][..PAGE_SIZE].fill(0);
        talk.export.device().discard_pages(3, 1);
        let landed: Vec<_> = wants.iter().map(|want| talk.land(*want)).collect();
        assert_eq!(landed, [None, talk.backed(1), None, None]);
        assert_eq!(talk.advance(), Progress::Reading);
        assert!(talk.wants().is_empty());
        assert_eq!(talk.land((wants[1].0, landed[1].unwrap())), None);
        let heard = talk.finish();
        assert!(talk.data(&heard, 0, 4 * 4096).unwrap() == talk.plain[..4 * PAGE_SIZE]);
    }
}

#[test]
fn a_block_that_cannot_be_read_is_an_error_of_that_request_alone() {
    for mut talk in Talk::both() {
        // Each of other pages: what is read twice is in memory again.
        for (offset, length) in [(0, 4096), (PAGE + 33, 131_072), (40 * PAGE + 7, 5)] {
            let before = (talk.io().io_errors, talk.export.device().pool_stats().bd_errors);
            talk.ask(CMD_READ, offset, length);
            talk.ask(CMD_READ, offset, length);
            let (first, second) = (talk.cookie - 1, talk.cookie);
            let mut wants = talk.want();
            assert_eq!(talk.fail(wants.remove(0)), None);
            // The others come all the same, and only then it is over.
            for want in wants {
                assert_eq!((talk.advance(), talk.hear()), (Progress::Reading, vec![]));
                assert_eq!(talk.land(want), None);
            }
            let heard = talk.finish();
            let mut heard = Reader(&heard);
            assert_eq!(talk.data_of(&mut heard, first, offset, length), Err(EIO));
            let data = talk.data_of(&mut heard, second, offset, length).unwrap();
            assert!(data == talk.plain[offset as usize..][..length as usize]);
            assert!(heard.is_empty());
            let after = (talk.io().io_errors, talk.export.device().pool_stats().bd_errors);
            assert_eq!(after, (before.0 + 1, before.1 + 1));
        }
    }
}

#[test]
fn a_block_that_cannot_be_read_keeps_a_page_as_it_was() {
    let mut talk = Talk::simple();
    talk.ask(CMD_WRITE, 2 * PAGE + 9, 3);
    talk.say(b"new");
    let wants = talk.want();
    assert_eq!(talk.fail(wants[0]), None);
    assert_eq!((talk.error(), talk.io().io_errors), (EIO, 1));
    talk.assert_reads(2 * PAGE, 4096);
}

#[test]
fn a_page_that_was_moved_is_found_though_its_old_block_cannot_be_read() {
    for mut talk in Talk::both() {
        talk.ask(CMD_READ, 0, 2 * 4096);
        let wants = talk.want();
        talk.move_page(0);
        talk.put(1, 9000);
        assert_eq!(talk.fail(wants[0]), talk.backed(0));
        assert_eq!(talk.fail(wants[1]), None);
        assert_eq!(talk.land((wants[0].0, talk.backed(0).unwrap())), None);
        let heard = talk.finish();
        assert!(talk.data(&heard, 0, 2 * 4096).unwrap() == talk.plain[..2 * PAGE_SIZE]);
        assert_eq!(talk.export.device().pool_stats().bd_errors, 0);
        // And so it is written to.
        talk.ask(CMD_WRITE, 5, 1);
        talk.say(b"x");
        let wants = talk.want();
        talk.put(0, 9001);
        assert_eq!((talk.fail(wants[0]), talk.error()), (None, 0));
        talk.plain[5] = b'x';
        talk.assert_reads(0, 4096);
    }
}

#[test]
fn a_long_read_that_fails_on_its_way_says_no_other_data() {
    // In chunks, those before it are whole.
    let mut talk = Talk::structured();
    talk.ask(CMD_READ, 0, 200_000);
    for want in talk.want() {
        talk.land(want);
    }
    let mut wants = talk.want();
    assert_eq!(talk.fail(wants.remove(3)), None);
    wants.into_iter().for_each(|want| assert_eq!(talk.land(want), None));
    let heard = talk.finish();
    assert_eq!(talk.data(&heard, 0, 200_000), Err(EIO));
    assert!(heard[28..28 + 131_072] == talk.plain[..131_072]);
    talk.assert_reads(0, 4096);

    // In one piece, all was well when it was looked at, so the connection ends.
    let mut talk = Talk::simple();
    talk.ask(CMD_READ, 0, 200_000);
    for _ in 0..2 {
        for want in talk.want() {
            talk.land(want);
        }
        assert!(talk.hear().is_empty());
    }
    for want in talk.want() {
        assert_eq!(talk.land(want), None);
    }
    let wants = talk.want();
    let mut heard = std::mem::take(&mut talk.heard);
    wants.iter().for_each(|want| assert_eq!(talk.fail(*want), None));
    assert_eq!(talk.advance(), Progress::End);
    heard.extend(talk.hear());
    assert_eq!(simple_error(&mut Reader(&heard), 1), 0);
    assert!(heard.len() < 200_000 && heard[16..] == talk.plain[..heard.len() - 16]);
}

#[test]
fn a_block_that_is_not_what_was_written_is_an_error_and_never_data() {
    for mut talk in Talk::both() {
        let at = talk.backed(4).unwrap().offset() as usize;
        talk.file[at + 100] ^= 1;
        talk.ask(CMD_READ, 4 * PAGE, 4096);
        let heard = talk.finish();
        assert_eq!(talk.data(&heard, 4 * PAGE, 4096), Err(EIO));
        talk.ask(CMD_WRITE, 4 * PAGE + 1, 1);
        talk.say(b"x");
        assert_eq!((talk.error(), talk.io().io_errors), (EIO, 2));
        talk.assert_reads(5 * PAGE, 4096);
    }
}

#[test]
fn a_write_waits_for_the_memory_that_its_page_needs() {
    let mut talk = Talk::simple();
    for is_late in [false, true] {
        talk.exhaust();
        talk.ask(CMD_WRITE, 3 * PAGE + 10, 3);
        talk.say(b"new");
        for _ in 0..3 {
            let wants = talk.want();
            assert_eq!(talk.land(wants[0]), None);
            assert_eq!(talk.advance(), Progress::Starved);
        }
        if is_late {
            talk.now += Duration::from_secs(1);
            assert_eq!(talk.error(), ENOSPC);
        } else {
            talk.now += Duration::from_millis(900);
            talk.write_back();
            assert_eq!(talk.error(), 0);
            talk.plain[3 * PAGE_SIZE + 10..][..3].copy_from_slice(b"new");
        }
        talk.assert_reads(3 * PAGE, 4096);
        talk.move_page(3);
    }
    let io = talk.io();
    assert_eq!((io.deferred_writes, io.starved_errors, io.io_errors), (2, 1, 0));
}

#[test]
fn a_connection_ends_without_what_it_waits_for() {
    for mut talk in Talk::both() {
        talk.ask(CMD_READ, 0, 131_072);
        let wants = talk.want();
        assert_eq!(talk.land(wants[0]), None);
        wants[1..].iter().for_each(|(want, _)| talk.protocol.give_up(*want));
        assert!(!talk.protocol.is_reading() && talk.protocol.outbox.is_empty());
        talk.protocol.end();
        assert_eq!(talk.export.visitors(), 0);
    }
}
