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
    assert!(!talk.protocol.is_reading() && talk.protocol.outbox.is_empty());
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

/// Reads of anything, whose blocks come in any order, or not; pages that are written, moved and dropped meanwhile.
#[test]
fn whatever_lands_when_each_read_gets_what_its_pages_have_held() {
    let (mut answers, mut all_failures, mut moved, mut waited) = (0, 0, 0, 0);
    for seed in 1..=8 {
        let mut state = seed;
        let mut random = |below: u64| {
            state = u64::wrapping_mul(state, 6_364_136_223_846_793_005).wrapping_add(1_442_695);
            (state >> 33) % below
        };
        let mut talk = Talk::seated();
        let (mut asked, mut wants) = (BTreeMap::<u64, Asked>::new(), Vec::new());
        let mut failures = 0;
        for step in 0..3000 {
            match random(10) {
                0..=3 if !talk.protocol.is_waiting() => {
                    let length = [1, 4096, 8192, 32_768, 131_072][random(5) as usize];
                    let bytes = random(2) * random(4096);
                    let offset = random(PAGES - 33) * PAGE + bytes;
                    talk.ask(CMD_READ, offset, length);
                    let page = |page| {
                        let at = (page * PAGE) as usize;
                        (page, vec![talk.plain[at..at + PAGE_SIZE].to_vec()])
                    };
                    let parts = Part::all(offset, length as usize);
                    let versions = parts.map(|(_, part)| page(part.page)).collect();
                    asked.insert(talk.cookie, Asked { offset, length, versions });
                }
                4 | 5 => {
                    for n in 0..8 {
                        let page = random(PAGES);
                        talk.put(page, step * 8 + n + 10_000);
                        let at = (page * PAGE) as usize;
                        let held = asked.values_mut().filter_map(|it| it.versions.get_mut(&page));
                        held.for_each(|held| held.push(talk.plain[at..at + PAGE_SIZE].to_vec()));
                    }
                }
                _ if wants.is_empty() => {}
                6 if random(4) == 0 => {
                    let (want, backed) = wants.swap_remove(random(wants.len() as u64) as usize);
                    if let Some(backed) = talk.fail((want, backed)) {
                        wants.push((want, backed));
                        moved += 1;
                    }
                }
                _ => {
                    for _ in 0..random(wants.len() as u64 + 1).min(12) {
                        let (want, backed) = wants.swap_remove(random(wants.len() as u64) as usize);
                        if let Some(backed) = talk.land((want, backed)) {
                            wants.push((want, backed));
                            moved += 1;
                        }
                    }
                }
            }
            let progress = talk.advance();
            waited += u32::from(progress == Progress::Reading);
            wants.extend(talk.wants());
            assert_eq!(talk.protocol.is_reading(), !wants.is_empty());
            let sent = talk.protocol.outbox.unsent().len() as u64;
            let sent = if random(3) == 0 { random(sent + 1) } else { sent };
            let unsent = talk.protocol.outbox.unsent()[..sent as usize].to_vec();
            talk.sent(sent as usize);
            talk.heard.extend(unsent);
            while let Some((cookie, error, length)) = whole_answer(&talk.heard, &asked) {
                let it = asked.remove(&cookie).unwrap();
                match error {
                    0 => it.assert_saw(&talk.heard[16..16 + length]),
                    error => assert_eq!(error, EIO),
                }
                talk.heard.drain(..16 + length);
                answers += 1;
                failures += u64::from(error != 0);
            }
            // What nobody has asked for is not answered.
            assert!(talk.heard.len() < 16 || !asked.is_empty());
        }
        assert_eq!(talk.io().io_errors, failures);
        all_failures += failures;
    }
    assert!(
        answers > 4000 && all_failures > 200 && moved > 20 && waited > 2000,
        "{answers} answers, {all_failures} errors, {moved} pages moved, waited {waited} times"
    );
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
