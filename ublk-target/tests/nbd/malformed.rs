//! Options that are not what they should be: each gets the protocol's error, and the next one is
//! understood.

use crate::client::Client;
use crate::fuzzing::spec::*;
use crate::served::{ROOM, SWAP0, Served};

/// Checks that the server reads options where they begin.
#[track_caller]
fn assert_in_step(client: &mut Client) {
    let answers = client.ask(OPT_LIST, &[]);
    assert_eq!((answers.len(), answers[0].kind), (2, REP_SERVER));
    assert_eq!(answers[0].data, string(b"swap0"));
}

#[test]
fn unknown_options_are_unsupported() {
    let served = Served::start();
    for number in [0, 4, 5, 11, 12, 1000, 0x8000_0001, u32::MAX] {
        let mut client = Client::greeted(&served);
        for bytes in [0, 1, 16, 5000, 100_000, SKIP_BYTES_MAX as usize] {
            let answers = client.ask(number, &vec![0x49; bytes]);
            assert_eq!((answers.len(), answers[0].kind), (1, REP_ERR_UNSUP), "{number} {bytes}");
            assert_in_step(&mut client);
        }
        assert_eq!(client.go("swap0").bytes, SWAP0.1 * 4096);
    }
}

#[test]
fn known_options_with_more_data_than_any_has_are_too_big() {
    let served = Served::start();
    let others = [OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT];
    for number in [OPT_LIST, OPT_INFO, OPT_GO].into_iter().chain(others) {
        let mut client = Client::greeted(&served);
        for bytes in [OPTION_BYTES_MAX as usize + 1, 100_000, SKIP_BYTES_MAX as usize] {
            let answers = client.ask(number, &vec![0; bytes]);
            assert_eq!((answers.len(), answers[0].kind), (1, REP_ERR_TOO_BIG), "{number} {bytes}");
            assert_in_step(&mut client);
        }
        assert_ne!(client.kind_of(number, &vec![0; OPTION_BYTES_MAX as usize]), REP_ERR_TOO_BIG);
        assert_in_step(&mut client);
    }
}

#[test]
fn lengths_that_no_client_sends_end_the_connection() {
    let served = Served::start();
    for number in [OPT_LIST, OPT_EXPORT_NAME, 1234] {
        for length in [SKIP_BYTES_MAX + 1, 1 << 31, u32::MAX] {
            let mut client = Client::greeted(&served);
            client.send(&option_header(number, length));
            client.assert_sent_away();
        }
    }
}

#[test]
fn a_client_that_never_chooses_is_sent_away() {
    let served = Served::start();
    for number in [OPT_LIST, OPT_STRUCTURED_REPLY, 99] {
        let mut client = Client::greeted(&served);
        for _ in 0..OPTIONS_MAX {
            client.ask(number, &[]);
        }
        client.send(&option(OPT_GO, &inform(b"swap0", &[])));
        client.assert_ended();
    }
    let mut client = Client::greeted(&served);
    for _ in 1..OPTIONS_MAX {
        client.ask(OPT_LIST, b"wrong");
    }
    assert_eq!(client.go("swap0").bytes, SWAP0.1 * 4096);
}

#[test]
fn list_and_structured_reply_have_no_data() {
    let served = Served::start();
    let mut client = Client::greeted(&served);
    for data in [&b"x"[..], b"swap0", &[0; 8192]] {
        assert_eq!(client.kind_of(OPT_LIST, data), REP_ERR_INVALID);
        assert_eq!(client.kind_of(OPT_STRUCTURED_REPLY, data), REP_ERR_INVALID);
        assert_in_step(&mut client);
    }
    let flags = client.go("swap0").flags;
    assert_eq!(flags & 128, 0, "structured replies were refused, and then agreed upon");
    assert_eq!(client.read(0, 512), Ok(vec![0; 512]));
}

#[test]
fn info_and_go_whose_parts_do_not_add_up_are_invalid() {
    let served = Served::start();
    let mut cut = inform(b"swap0", &[INFO_NAME, INFO_BLOCK_SIZE]);
    let mut wrong = vec![[inform(b"swap0", &[INFO_NAME]), vec![0]].concat()];
    wrong.push([inform(b"", &[]), vec![0, 0]].concat());
    wrong.push([string(b"swap0"), be16(u16::MAX).to_vec()].concat());
    wrong.push([string(b"swap0"), be16(u16::MAX).to_vec(), vec![0; 8000]].concat());
    for length in [6, 7, 0x100, 0x8000_0005, u32::MAX] {
        wrong.push([&be32(length)[..], b"swap0", &be16(0)].concat());
    }
    while cut.pop().is_some() {
        wrong.push(cut.clone());
    }
    let mut client = Client::greeted(&served);
    for (number, data) in wrong.iter().enumerate() {
        if number % 40 == 39 {
            client = Client::greeted(&served);
        }
        for option in [OPT_INFO, OPT_GO] {
            let answers = client.ask(option, data);
            assert_eq!((answers.len(), answers[0].kind), (1, REP_ERR_INVALID), "{data:02x?}");
        }
    }
    assert_in_step(&mut client);
}

#[test]
fn contexts_whose_parts_do_not_add_up_are_invalid() {
    let served = Served::start();
    let mut cut = contexts(b"swap0", &[b"qemu:", BASE_ALLOCATION]);
    let mut wrong = vec![[&cut[..], &[0]].concat()];
    for count in [0, 1, 3, 4, 0x1_0002, u32::MAX] {
        let queries = [string(b"qemu:"), string(BASE_ALLOCATION)].concat();
        wrong.push([&string(b"swap0")[..], &be32(count), &queries].concat());
    }
    for length in [16, 0xffff, u32::MAX] {
        let query = [&be32(length)[..], BASE_ALLOCATION].concat();
        wrong.push([&string(b"swap0")[..], &be32(1), &query].concat());
        wrong.push([&be32(length)[..], b"swap0", &be32(0)].concat());
    }
    while cut.pop().is_some() {
        wrong.push(cut.clone());
    }
    let mut client = Client::greeted(&served);
    client.choose_structured();
    for (number, data) in wrong.iter().enumerate() {
        if number % 40 == 39 {
            client = Client::greeted(&served);
            client.choose_structured();
        }
        for option in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
            let answers = client.ask(option, data);
            assert_eq!((answers.len(), answers[0].kind), (1, REP_ERR_INVALID), "{data:02x?}");
        }
    }
    assert_in_step(&mut client);
}

#[test]
fn as_many_queries_as_fit_are_looked_at() {
    let served = Served::with(&[SWAP0], ROOM, 1);
    let mut client = Client::greeted(&served);
    client.choose_structured();
    let mut queries = vec![&b""[..]; 2000];
    queries.push(BASE_ALLOCATION);
    let data = contexts(b"swap0", &queries);
    assert!(data.len() <= OPTION_BYTES_MAX as usize);
    let answers = client.ask(OPT_SET_META_CONTEXT, &data);
    assert_eq!((answers.len(), answers[0].kind), (2, REP_META_CONTEXT));
}
