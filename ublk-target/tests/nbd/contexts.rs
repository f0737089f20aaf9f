//! Metadata contexts: how they are listed and chosen, and what the choice is good for.

use crate::client::{Answer, Client};
use crate::fuzzing::spec::*;
use crate::served::{ROOM, Served};

const TWO: [(&str, u64, bool); 2] = [("swap0", 16, true), ("swap1", 16, true)];

fn names(answers: &[Answer]) -> Vec<&[u8]> {
    let (last, contexts) = answers.split_last().unwrap();
    assert_eq!(*last, Answer { kind: REP_ACK, data: Vec::new() });
    assert!(contexts.iter().all(|it| it.kind == REP_META_CONTEXT), "{contexts:?}");
    contexts.iter().map(|it| &it.data[4..]).collect()
}

#[test]
fn contexts_need_structured_replies() {
    let served = Served::start();
    let mut client = Client::greeted(&served);
    let data = contexts(b"swap0", &[BASE_ALLOCATION]);
    for number in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        let answers = client.ask(number, &data);
        assert_eq!((answers.len(), answers[0].kind), (1, REP_ERR_INVALID));
    }
    client.choose_structured();
    client.go("swap0");
    // The choice was refused, so there is none.
    assert_eq!(client.block_status(0, 0, 4096), Err(EINVAL));
}

#[test]
fn list_finds_what_the_queries_ask_for() {
    let served = Served::start();
    let mut client = Client::greeted(&served);
    client.choose_structured();
    let base = [BASE_ALLOCATION];
    for (queries, found) in [
        (&[][..], &base[..]),
        (&[BASE_ALLOCATION], &base),
        (&[b"base:"], &base),
        (&[b"base:", BASE_ALLOCATION, BASE_ALLOCATION], &base),
        (&[b"qemu:dirty-bitmap:x", BASE_ALLOCATION], &base),
        (&[b"qemu:"], &[]),
        (&[b"base"], &[]),
        (&[b""], &[]),
        (&[b"base:allocation2"], &[]),
        (&[b"base:alloc"], &[]),
    ] {
        let answers = client.ask(OPT_LIST_META_CONTEXT, &contexts(b"swap0", queries));
        assert_eq!(names(&answers), found, "{queries:?}");
    }
}

/// The specification reserves it: "SHOULD be set to zero".
#[test]
fn a_context_that_is_only_listed_has_no_number() {
    let served = Served::start();
    let mut client = Client::greeted(&served);
    client.choose_structured();
    let answers = client.ask(OPT_LIST_META_CONTEXT, &contexts(b"swap0", &[]));
    assert_eq!(answers[0].data[..4], [0; 4]);
}

#[test]
fn a_choice_takes_the_context_by_its_whole_name() {
    let served = Served::start();
    let base = [BASE_ALLOCATION];
    for (queries, found) in [
        (&[BASE_ALLOCATION][..], &base[..]),
        (&[b"x-a:b", BASE_ALLOCATION, b"qemu:c"], &base),
        (&[], &[]),
        (&[b"base:"], &[]),
        (&[b"base:allocation\0"], &[]),
    ] {
        let mut client = Client::greeted(&served);
        client.choose_structured();
        let answers = client.ask(OPT_SET_META_CONTEXT, &contexts(b"swap0", queries));
        assert_eq!(names(&answers), found, "{queries:?}");
        client.go("swap0");
        let expected = match found {
            [] => Err(EINVAL),
            _ => Ok(vec![(4096, STATE_HOLE | STATE_ZERO)]),
        };
        assert_eq!(client.block_status(0, 0, 4096), expected, "{queries:?}");
    }
}

#[test]
fn the_number_of_a_chosen_context_comes_with_its_extents() {
    let served = Served::start();
    let mut client = Client::greeted(&served);
    client.choose_structured();
    let data = contexts(b"swap0", &[BASE_ALLOCATION]);
    let number = client.ask(OPT_SET_META_CONTEXT, &data)[0].data[..4].to_vec();
    client.go("swap0");
    let cookie = client.request(CMD_BLOCK_STATUS, 0, 0, 512);
    let payload = client.chunk(cookie).payload;
    assert_eq!(payload, [&number[..], &be32(512), &be32(3)].concat());
}

#[test]
fn a_choice_for_an_unknown_export_is_refused() {
    let served = Served::with(&TWO, ROOM, 1);
    let mut client = Client::greeted(&served);
    client.choose_structured();
    for number in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        for name in [&b"swap2"[..], b"", &[b'x'; 4096]] {
            let answers = client.ask(number, &contexts(name, &[BASE_ALLOCATION]));
            assert_eq!((answers.len(), answers[0].kind), (1, REP_ERR_UNKNOWN));
        }
    }
}

#[test]
fn a_choice_for_another_export_does_not_count() {
    let served = Served::with(&TWO, ROOM, 1);
    let mut client = Client::greeted(&served);
    client.choose_structured();
    client.choose_contexts("swap1");
    client.go("swap0");
    assert_eq!(client.block_status(0, 0, 4096), Err(EINVAL));
    assert_eq!(client.read(0, 512), Ok(vec![0; 512]));
}

#[test]
fn the_last_choice_counts_whatever_came_of_it() {
    let served = Served::with(&TWO, ROOM, 1);
    let wrong = [
        contexts(b"swap0", &[]),
        contexts(b"swap0", &[b"qemu:x"]),
        contexts(b"swap9", &[BASE_ALLOCATION]),
        contexts(b"swap1", &[BASE_ALLOCATION]),
        b"junk".to_vec(),
    ];
    for data in wrong {
        let mut client = Client::greeted(&served);
        client.choose_structured();
        client.choose_contexts("swap0");
        client.ask(OPT_SET_META_CONTEXT, &data);
        client.go("swap0");
        assert_eq!(client.block_status(0, 0, 4096), Err(EINVAL), "{data:02x?}");
    }
    let mut client = Client::greeted(&served);
    client.choose_structured();
    client.choose_contexts("swap1");
    client.choose_contexts("swap0");
    client.ask(OPT_LIST_META_CONTEXT, &contexts(b"swap1", &[]));
    client.go("swap0");
    assert!(client.block_status(0, 0, 4096).is_ok());
}
