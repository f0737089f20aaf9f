//! What clients are told of the exports: LIST, INFO and GO.

use crate::client::{Answer, Chosen, Client, chosen};
use crate::fuzzing::spec::*;
use crate::served::{ROOM, SWAP0, Served};

/// It has flags, takes TRIM and WRITE_ZEROES, several connections, CACHE and FAST_ZERO.
const ALWAYS: u16 = 1 | 32 | 64 | 256 | 1024 | 2048;
const FLUSH_AND_FUA: u16 = 4 | 8;
const DF: u16 = 128;

const TWO: [(&str, u64, bool); 2] = [("swap0", 7, true), ("a.b_c-1", 1 << 20, false)];

fn block_sizes() -> Answer {
    let data = [&be16(INFO_BLOCK_SIZE)[..], &be32(512), &be32(4096), &be32(32 << 20)].concat();
    Answer { kind: REP_INFO, data }
}

#[test]
fn list_has_every_export_once() {
    let served = Served::with(&TWO, ROOM, 1);
    let mut client = Client::greeted(&served);
    let answers = client.ask(OPT_LIST, &[]);
    let server = |name| Answer { kind: REP_SERVER, data: string(name) };
    let ack = Answer { kind: REP_ACK, data: Vec::new() };
    assert_eq!(answers, [server(b"swap0"), server(b"a.b_c-1"), ack]);

    let none = Served::with(&[], ROOM, 1);
    let answers = Client::greeted(&none).ask(OPT_LIST, &[]);
    assert_eq!(answers, [Answer { kind: REP_ACK, data: Vec::new() }]);
}

#[test]
fn as_many_exports_as_there_can_be_are_listed() {
    let names: Vec<&str> = (10..10 + tmem::POOLS_MAX)
        .map(|number| &*format!("{number}{}", "x".repeat(29)).leak())
        .collect();
    let plans: Vec<_> = names.iter().map(|name| (*name, 16, true)).collect();
    let served = Served::with(&plans, ROOM, 1);
    let mut client = Client::greeted(&served);
    for _ in 0..10 {
        let answers = client.ask(OPT_LIST, &[]);
        assert_eq!(answers.len(), tmem::POOLS_MAX + 1);
        let all = answers.iter().zip(&names);
        assert!(all.into_iter().all(|(answer, name)| answer.data == string(name.as_bytes())));
    }
    assert_eq!(client.go(names[63]).bytes, 16 * 4096);
}

#[test]
fn info_and_go_describe_the_export_they_name() {
    let served = Served::with(&TWO, ROOM, 1);
    for (name, pages, flush) in TWO {
        for structured in [false, true] {
            let flush = if flush { FLUSH_AND_FUA } else { 0 };
            let flags = ALWAYS | flush | if structured { DF } else { 0 };
            let expected = Chosen { bytes: pages * 4096, flags };
            let mut client = Client::greeted(&served);
            if structured {
                client.choose_structured();
            }
            for number in [OPT_INFO, OPT_INFO, OPT_GO] {
                let answers = client.ask(number, &inform(name.as_bytes(), &[]));
                assert_eq!(chosen(&answers), expected);
                assert_eq!(answers.len(), 3, "{answers:?}");
                assert_eq!(answers[1], block_sizes());
                assert_eq!(answers[2], Answer { kind: REP_ACK, data: Vec::new() });
            }
            assert_eq!(client.read(expected.bytes - 1, 1), Ok(vec![0]));
        }
    }
}

#[test]
fn what_is_asked_for_is_told_once_and_what_is_not_known_is_left_out() {
    let served = Served::start();
    let mut client = Client::greeted(&served);
    let kinds = [INFO_NAME, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, 4, 0xffff];
    // The name is told as what it is, not as it was asked for.
    for name in [&b"swap0"[..], b""] {
        let answers = client.ask(OPT_INFO, &inform(name, &kinds));
        let name = [&be16(INFO_NAME)[..], b"swap0"].concat();
        assert_eq!(answers.len(), 4, "{answers:?}");
        assert_eq!(answers.iter().filter(|it| it.data == name).count(), 1);
        assert_eq!(answers.iter().filter(|it| **it == block_sizes()).count(), 1);
        assert_eq!(chosen(&answers).bytes, SWAP0.1 * 4096);
    }
    let many = inform(b"swap0", &[INFO_NAME; 4000]);
    assert_eq!(client.ask(OPT_INFO, &many).len(), 4);
}

#[test]
fn no_name_means_the_only_export() {
    let one = Served::start();
    let mut client = Client::greeted(&one);
    assert_eq!(client.kind_of(OPT_INFO, &inform(b"", &[])), REP_ACK);
    assert_eq!(client.go("").bytes, SWAP0.1 * 4096);

    let two = Served::with(&TWO, ROOM, 1);
    let none = Served::with(&[], ROOM, 1);
    for served in [&two, &none] {
        let mut client = Client::greeted(served);
        for number in [OPT_INFO, OPT_GO] {
            assert_eq!(client.kind_of(number, &inform(b"", &[])), REP_ERR_UNKNOWN);
        }
    }
}

#[test]
fn unknown_names_are_unknown_and_leave_the_choice_open() {
    let served = Served::with(&TWO, ROOM, 1);
    let mut client = Client::greeted(&served);
    let long = [b'x'; 4096];
    for name in [&b"swap"[..], b"swap00", b"SWAP0", b"swap0\0", b"\xff\xfe", b"/swap0", &long] {
        for number in [OPT_INFO, OPT_GO] {
            let answers = client.ask(number, &inform(name, &[INFO_NAME]));
            assert_eq!((answers.len(), answers[0].kind), (1, REP_ERR_UNKNOWN), "{name:02x?}");
        }
    }
    assert_eq!(client.go("a.b_c-1").bytes, 1 << 32);
}
