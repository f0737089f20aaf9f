//! The kernel's kind of client, which asks for many things at a time: reads that wait for the file do not hold up what
//! comes behind them, as long as there is room for them.

use std::collections::BTreeMap;

use super::*;

/// Pages that there is room for.
const ROOM: u64 = 64;

impl Talk {
    fn seated() -> Self {
        let mut talk = Self::simple();
        let exports = Exports::default();
        exports.add(Arc::clone(&talk.export));
        let visit = exports.visit(b"swap0").unwrap();
        talk.protocol.end();
        talk.protocol = Protocol::agreed(Arc::new(exports), 0, visit);
        talk
    }

    fn read(&mut self, page: u64, pages: u64) -> u64 {
        self.ask(CMD_READ, page * PAGE, (pages * PAGE) as u32);
        self.cookie
    }

    /// Goes on until nothing is left of what was asked for but what waits for the file, and says what it wants from there.
    fn go_on(&mut self) -> Vec<(usize, Backed)> {
        assert_eq!(self.advance(), Progress::Hungry);
        self.wants()
    }

    /// Takes what there is to send, which must be the answer to a read of these pages, and what they hold.
    #[track_caller]
    fn assert_answer(&mut self, cookie: u64, page: u64, pages: u64) {
        let (heard, length) = (self.hear(), (pages * PAGE) as usize);
        assert_eq!(heard.len(), 16 + length, "not one answer");
        let mut heard = Reader(&heard);
        assert_eq!(simple_error(&mut heard, cookie), 0);
        assert!(heard.0 == &self.plain[(page * PAGE) as usize..][..length]);
    }
}

#[test]
fn what_comes_behind_a_read_that_waits_is_answered_at_once() {
    let mut talk = Talk::seated();
    let hot = PAGES - 1;
    // One of its pages is in memory.
    talk.put(11, 7000);
    let cold = talk.read(10, 3);
    let wants = talk.go_on();
    assert_eq!((wants.len(), talk.hear()), (2, vec![]));

    let cookie = talk.read(hot, 1);
    assert!(talk.go_on().is_empty());
    talk.assert_answer(cookie, hot, 1);
    let data = noise(PAGE_SIZE, 7001);
    talk.ask(CMD_WRITE, hot * PAGE, 4096);
    talk.say(&data);
    talk.plain[(hot * PAGE) as usize..].copy_from_slice(&data);
    assert!(talk.go_on().is_empty());
    assert_eq!(simple_error(&mut Reader(&talk.hear()), talk.cookie), 0);
    talk.ask(CMD_TRIM, 20 * PAGE, 4096);
    talk.plain[20 * PAGE_SIZE..][..PAGE_SIZE].fill(0);
    assert!(talk.go_on().is_empty());
    assert_eq!(simple_error(&mut Reader(&talk.hear()), talk.cookie), 0);

    let other = talk.read(30, 1);
    let other_wants = talk.go_on();
    assert_eq!((other_wants.len(), talk.hear()), (1, vec![]));
    // The one that came last is whole first.
    assert_eq!(talk.land(other_wants[0]), None);
    talk.assert_answer(other, 30, 1);
    assert_eq!(talk.land(wants[1]), None);
    assert!(talk.hear().is_empty() && talk.protocol.is_reading() && !talk.protocol.is_waiting());
    assert_eq!(talk.land(wants[0]), None);
    talk.assert_answer(cold, 10, 3);
    assert!(!talk.protocol.is_reading());
}

#[test]
fn what_has_no_room_waits_and_all_behind_it() {
    let mut talk = Talk::seated();
    let cookies: Vec<_> = (0..ROOM / 8).map(|n| talk.read(n * 8, 8)).collect();
    let wants = talk.go_on();
    assert_eq!(wants.len() as u64, ROOM);
    let last = talk.read(ROOM, 1);
    talk.read(PAGES - 1, 1);
    assert_eq!(talk.advance(), Progress::Reading);
    let waits = talk.wants();
    assert_eq!(waits.len(), 1);
    assert!(talk.protocol.is_waiting() && talk.hear().is_empty());
    // A parked one is whole, and has to let the one that is on its way go first: so it is answered after that.
    for want in &wants[..8] {
        assert_eq!(talk.land(*want), None);
    }
    assert_eq!((talk.hear(), talk.advance()), (vec![], Progress::Reading));
    assert_eq!(talk.land(waits[0]), None);
    assert_eq!(talk.advance(), Progress::Hungry);
    let mut heard = talk.hear();
    heard.extend(talk.hear());
    let mut heard = Reader(&heard);
    for (cookie, page, pages) in [(last, ROOM, 1), (talk.cookie, PAGES - 1, 1), (cookies[0], 0, 8)]
    {
        assert_eq!(simple_error(&mut heard, cookie), 0);
        let length = (pages * PAGE) as usize;
        assert!(heard.take(length).unwrap() == &talk.plain[(page * PAGE) as usize..][..length]);
    }
    assert!(heard.is_empty());
    // And there is room again.
    talk.read(ROOM + 1, 8);
    assert_eq!(talk.go_on().len(), 8);
}

#[test]
fn answers_wait_for_room_and_go_in_the_order_in_which_they_are_whole() {
    let mut talk = Talk::seated();
    let (first, second) = (talk.read(0, 32), talk.read(32, 32));
    let wants = talk.go_on();
    for want in wants[32..].iter().chain(&wants[..32]) {
        assert_eq!(talk.land(*want), None);
    }
    // The socket takes it bit by bit, and the client says nothing meanwhile.
    for (cookie, page) in [(second, 32), (first, 0)] {
        let mut heard = Vec::new();
        while heard.len() < 16 + 32 * PAGE_SIZE {
            let unsent = talk.protocol.outbox.unsent();
            let count = unsent.len().min(50_000);
            assert!(count > 0, "there is room, and nothing comes");
            heard.extend(&unsent[..count]);
            talk.sent(count);
        }
        let mut heard = Reader(&heard);
        assert_eq!(simple_error(&mut heard, cookie), 0);
        assert!(heard.0 == &talk.plain[(page * PAGE) as usize..][..32 * PAGE_SIZE]);
    }
    assert!(talk.hear().is_empty());
}

#[test]
fn a_parked_read_that_fails_fails_alone() {
    let mut talk = Talk::seated();
    let (bad, good) = (talk.read(0, 3), talk.read(3, 1));
    let wants = talk.go_on();
    assert_eq!(talk.fail(wants[1]), None);
    // It is over only when nothing is read for it any more.
    assert!(talk.hear().is_empty());
    assert_eq!((talk.land(wants[0]), talk.land(wants[2])), (None, None));
    assert_eq!(simple_error(&mut Reader(&talk.hear()), bad), EIO);
    assert_eq!((talk.io().io_errors, talk.export.device().pool_stats().bd_errors), (1, 1));
    assert_eq!(talk.land(wants[3]), None);
    talk.assert_answer(good, 3, 1);
}

#[test]
fn who_goes_gets_what_was_parked_first() {
    let mut talk = Talk::seated();
    let cookie = talk.read(5, 1);
    talk.ask(CMD_DISC, 0, 0);
    assert_eq!(talk.advance(), Progress::Reading);
    let wants = talk.wants();
    assert_eq!(talk.advance(), Progress::Reading);
    assert_eq!(talk.land(wants[0]), None);
    talk.assert_answer(cookie, 5, 1);
    assert_eq!(talk.advance(), Progress::End);
    talk.protocol.end();
    assert_eq!(talk.export.visitors(), 0);
}

#[test]
fn a_connection_ends_without_what_is_parked() {
    let mut talk = Talk::seated();
    talk.read(0, 8);
    talk.read(8, 1);
    let wants = talk.go_on();
    assert_eq!(talk.land(wants[0]), None);
    wants[1..].iter().for_each(|(want, _)| talk.protocol.give_up(*want));
    talk.protocol.deliver();
    assert!(!talk.protocol.is_reading() && talk.protocol.outbox.is_empty());
    assert_eq!(talk.io().io_errors, 0);
}

/// Has the last 32 pages in memory, and a read of them fill the outbox, so that one behind it waits for room.
fn fill_outbox(talk: &mut Talk) -> u64 {
    (HOT..PAGES).for_each(|page| talk.put(page, page + 8000));
    talk.read(HOT, 32)
}

const HOT: u64 = PAGES - 32;

#[test]
fn what_is_whole_does_not_wait_for_what_waits_for_room() {
    for goes in [false, true] {
        let mut talk = Talk::seated();
        let first = talk.read(0, 1);
        let wants = talk.go_on();
        let hot = fill_outbox(&mut talk);
        talk.read(5, 1);
        if goes {
            talk.ask(CMD_DISC, 0, 0);
        }
        assert_eq!(talk.advance(), Progress::Flush);
        // It lands while the other answer is sent.
        assert_eq!(talk.land(wants[0]), None);
        talk.assert_answer(hot, HOT, 32);
        talk.assert_answer(first, 0, 1);
        let progress = if goes { Progress::Reading } else { Progress::Hungry };
        assert_eq!((talk.advance(), talk.wants().len(), talk.hear()), (progress, 1, vec![]));
    }
}

#[test]
fn what_is_whole_makes_room_before_another_waits() {
    let mut talk = Talk::seated();
    let (first, second) = (talk.read(0, 32), talk.read(32, 32));
    let wants = talk.go_on();
    let hot = fill_outbox(&mut talk);
    talk.read(70, 1);
    let last = talk.read(HOT, 1);
    assert_eq!(talk.advance(), Progress::Flush);
    wants.iter().for_each(|want| assert_eq!(talk.land(*want), None));
    for (cookie, page) in [(hot, HOT), (first, 0), (second, 32)] {
        talk.assert_answer(cookie, page, 32);
    }
    assert_eq!((talk.advance(), talk.wants().len()), (Progress::Hungry, 1));
    talk.assert_answer(last, HOT, 1);
}

#[test]
fn places_are_free_again_wherever_they_are() {
    let mut talk = Talk::seated();
    let reads: Vec<_> = [(0, 21), (30, 1), (40, 21), (70, 1)]
        .map(|(page, pages)| (talk.read(page, pages), page, pages, talk.go_on()))
        .into();
    for (cookie, page, pages, wants) in reads.iter().step_by(2) {
        wants.iter().for_each(|want| assert_eq!(talk.land(*want), None));
        talk.assert_answer(*cookie, *page, *pages);
    }
    // Two pages wait.
    let rest = talk.read(100, 32);
    let wants = talk.go_on();
    assert_eq!(wants.len(), 32);
    assert!(talk.read(132, 30) > rest && talk.go_on().len() == 30);
    wants.iter().for_each(|want| assert_eq!(talk.land(*want), None));
    talk.assert_answer(rest, 100, 32);
}

#[test]
fn there_is_room_for_the_reply_to_what_is_under_way() {
    let mut talk = Talk::seated();
    // Their answers would fill the outbox to its last byte.
    let long = talk.read(0, 32);
    talk.ask(CMD_READ, 32 * PAGE, 4064);
    let wants = talk.go_on();
    assert_eq!(wants.len(), 33);
    let data = noise(PAGE_SIZE, 9000);
    talk.ask(CMD_WRITE, HOT * PAGE, 4096);
    assert_eq!(talk.advance(), Progress::Hungry);
    wants.iter().for_each(|want| assert_eq!(talk.land(*want), None));
    talk.say(&data);
    assert_eq!(talk.advance(), Progress::Hungry);
    let mut heard = talk.hear();
    heard.extend(talk.hear());
    let mut heard = Reader(&heard);
    for (cookie, length) in [(long, 32 * 4096), (talk.cookie, 0), (talk.cookie - 1, 4064)] {
        assert_eq!(simple_error(&mut heard, cookie), 0);
        heard.take(length).unwrap();
    }
    assert!(heard.is_empty());
}

/// A connection as its worker has it: it goes on when nothing is unsent and nothing is being received, and what lands
/// meanwhile is sent at once.
struct Worked {
    talk: Talk,
    is_receiving: bool,
    is_sending: bool,
    /// What the client has said and the socket has still.
    said: Vec<u8>,
    wants: Vec<(usize, Backed)>,
    asked: BTreeMap<u64, Asked>,
}

impl Worked {
    fn turn(&mut self) {
        if self.is_receiving || self.is_sending || self.talk.protocol.is_waiting() {
            return;
        }
        let progress = self.talk.advance();
        self.is_sending = !self.talk.protocol.outbox.is_empty();
        self.is_receiving = progress == Progress::Hungry;
        let wants = self.talk.wants();
        let waits = !wants.is_empty();
        self.wants.extend(wants);
        assert!(
            self.is_sending || self.is_receiving || (waits && progress == Progress::Reading),
            "nobody wakes it: {progress:?}"
        );
    }

    fn receive(&mut self, most: usize) {
        let count = most.min(self.said.len()).min(self.talk.protocol.inbox.room().len());
        if self.is_receiving && count > 0 {
            let bytes: Vec<_> = self.said.drain(..count).collect();
            self.talk.say(&bytes);
            self.is_receiving = false;
        }
    }

    fn send(&mut self, most: usize) {
        if self.is_sending {
            let unsent = self.talk.protocol.outbox.unsent();
            let sent = unsent[..most.min(unsent.len())].to_vec();
            self.talk.sent(sent.len());
            self.talk.heard.extend(sent);
            self.is_sending = !self.talk.protocol.outbox.is_empty();
        }
    }

    /// A block comes, or cannot be read; true if the page has been moved meanwhile.
    fn land(&mut self, number: usize, is_bad: bool) -> bool {
        let want = self.wants.swap_remove(number);
        let moved = if is_bad { self.talk.fail(want) } else { self.talk.land(want) };
        self.wants.extend(moved.map(|backed| (want.0, backed)));
        self.is_sending |= !self.talk.protocol.outbox.is_empty();
        moved.is_some()
    }

    fn ask_for(&mut self, offset: u64, length: u32) {
        self.talk.cookie += 1;
        let cookie = self.talk.cookie;
        self.said.extend(request(0, CMD_READ, cookie, offset, length));
        let held = |page: u64| self.talk.plain[(page * PAGE) as usize..][..PAGE_SIZE].to_vec();
        let parts = Part::all(offset, length as usize);
        let versions = parts.map(|(_, part)| (part.page, vec![held(part.page)])).collect();
        self.asked.insert(cookie, Asked { offset, length, versions });
    }

    fn put(&mut self, page: u64, seed: u64) {
        self.talk.put(page, seed);
        let held = &self.talk.plain[(page * PAGE) as usize..][..PAGE_SIZE];
        let versions = self.asked.values_mut().filter_map(|it| it.versions.get_mut(&page));
        versions.for_each(|versions| versions.push(held.to_vec()));
    }

    /// Takes the answers that were heard whole, and says how many these are, and how many of them are errors.
    fn answers(&mut self) -> (u64, u64) {
        let (mut answers, mut errors) = (0, 0);
        while let Some((cookie, error, length)) = whole_answer(&self.talk.heard, &self.asked) {
            let asked = self.asked.remove(&cookie).unwrap();
            match error {
                0 => asked.assert_saw(&self.talk.heard[16..16 + length]),
                error => assert_eq!(error, EIO),
            }
            self.talk.heard.drain(..16 + length);
            answers += 1;
            errors += u64::from(error != 0);
        }
        (answers, errors)
    }

    /// Does all that needs no disk.
    fn settle(&mut self) {
        loop {
            self.turn();
            if self.is_sending {
                self.send(usize::MAX);
            } else if self.is_receiving && !self.said.is_empty() {
                self.receive(usize::MAX);
            } else {
                return;
            }
        }
    }
}

/// What a page may have held since a read of it was asked for.
type Versions = BTreeMap<u64, Vec<Vec<u8>>>;

/// A read that has no answer: its first byte, its length, and what it may see.
struct Asked {
    offset: u64,
    length: u32,
    versions: Versions,
}

impl Asked {
    #[track_caller]
    fn assert_saw(&self, data: &[u8]) {
        for (place, part) in Part::all(self.offset, self.length as usize) {
            let data = &data[place..place + part.bytes()];
            let mut versions = self.versions[&part.page].iter();
            assert!(versions.any(|page| &page[part.range.clone()] == data), "page {}", part.page);
        }
    }
}

/// The first answer that was heard, if it is whole: to what, with which error, and how many bytes of data.
fn whole_answer(heard: &[u8], asked: &BTreeMap<u64, Asked>) -> Option<(u64, u32, usize)> {
    let mut reader = Reader(heard);
    let magic = reader.u32()?;
    assert_eq!(magic, SIMPLE_REPLY_MAGIC, "no simple reply");
    let (error, cookie) = (reader.u32()?, reader.u64()?);
    let asked = asked.get(&cookie).expect("it answers what nobody has asked for, or twice");
    let length = if error == 0 { asked.length as usize } else { 0 };
    (heard.len() >= 16 + length).then_some((cookie, error, length))
}

/// Reads of anything, whose blocks come in any order, or not; pages that are written and moved meanwhile; answers that are
/// sent bit by bit. Each read gets what its pages have held, and whenever all is done that needs no disk, whoever has
/// no answer waits for a page.
#[test]
fn whatever_lands_when_each_read_is_answered_with_what_its_pages_have_held() {
    let (mut answers, mut errors, mut moved, mut waited) = (0, 0, 0, 0);
    for seed in 1..=12 {
        let mut state = seed;
        let mut random = |below: u64| {
            state = u64::wrapping_mul(state, 6_364_136_223_846_793_005).wrapping_add(1_442_695);
            (state >> 33) % below
        };
        let mut it = Worked {
            talk: Talk::seated(),
            is_receiving: false,
            is_sending: false,
            said: Vec::new(),
            wants: Vec::new(),
            asked: BTreeMap::new(),
        };
        let mut failed = 0;
        for step in 0..3000 {
            match random(12) {
                0..=2 if it.asked.len() < 100 => {
                    for _ in 0..=random(12) {
                        // Of most what is in memory.
                        let page = if random(15) == 0 { random(HOT) } else { HOT + random(24) };
                        let length = [4096, 4096, 4096, 8192, 1, 32_768];
                        let bytes = random(2) * random(2) * random(4096);
                        it.ask_for(page * PAGE + bytes, length[random(6) as usize]);
                    }
                }
                // The longest, over pages of which most are on the file.
                3 if it.asked.len() < 100 => it.ask_for(random(HOT) * PAGE, 131_072),
                4 if random(4) == 0 => {
                    (0..8).for_each(|n| it.put(random(PAGES), step * 8 + n + 10_000))
                }
                5 | 6 => it.receive(1 + random(300) as usize * random(300) as usize),
                7 | 8 => {
                    for _ in 0..random(it.wants.len() as u64 + 1).min(24) {
                        let number = random(it.wants.len() as u64) as usize;
                        moved += u64::from(it.land(number, random(20) == 0));
                    }
                }
                _ => it.send(1 + random(200) as usize * random(1000) as usize),
            }
            it.turn();
            if step % 300 == 299 {
                // Much of what is waited for is elsewhere then, or in memory.
                (0..PAGES).for_each(|n| it.put(random(PAGES), step * PAGES + n + 1_000_000));
            }
            if step % 40 == 0 {
                it.settle();
            }
            waited += u64::from(it.talk.protocol.is_waiting());
            let (heard, bad) = it.answers();
            (answers, failed) = (answers + heard, failed + bad);
            if step % 40 == 0 && !it.talk.protocol.is_waiting() {
                assert!(it.asked.len() <= it.wants.len(), "a read is forgotten");
                assert!(it.is_receiving, "it is done and does not listen");
            }
        }
        while !it.wants.is_empty() || !it.asked.is_empty() {
            while !it.wants.is_empty() {
                it.land(0, false);
            }
            it.settle();
            let (heard, bad) = it.answers();
            (answers, failed) = (answers + heard, failed + bad);
        }
        assert!(it.talk.heard.is_empty() && !it.talk.protocol.is_reading());
        assert_eq!(it.talk.io().io_errors, failed);
        errors += failed;
    }
    assert!(
        answers > 10_000 && errors > 100 && moved > 20 && waited > 2000,
        "{answers} answers, {errors} errors, {moved} pages moved, waited {waited} times"
    );
}
