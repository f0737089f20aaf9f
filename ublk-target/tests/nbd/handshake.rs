//! The first words of a connection, and the ways in which a negotiation ends.

use crate::client::{Chosen, Client};
use crate::fuzzing::spec::*;
use crate::served::{PLACES, ROOM, SWAP0, Served};
use crate::watchdog::Watchdog;

/// What an export can do that offers FLUSH, without structured replies: it has flags, takes FLUSH,
/// FUA, TRIM and WRITE_ZEROES, several connections, CACHE and FAST_ZERO.
const FLAGS: u16 = 1 | 4 | 8 | 32 | 64 | 256 | 1024 | 2048;

#[test]
fn the_server_speaks_first() {
    let served = Served::start();
    let mut client = Client::connect(&served);
    assert_eq!(client.take(18), b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn client_flags_that_nobody_knows_end_the_connection() {
    let served = Served::start();
    for flags in [4, 7, 1 << 16, 1 << 31, u32::MAX] {
        let mut client = Client::connect(&served);
        client.take(18);
        client.send(&be32(flags));
        client.assert_sent_away();
    }
    for flags in 0..=3 {
        let mut client = Client::connect(&served);
        client.take(18);
        client.send(&be32(flags));
        assert_eq!(client.go("swap0").bytes, SWAP0.1 * 4096);
    }
}

#[test]
fn what_is_no_option_ends_the_connection() {
    let served = Served::start();
    let wrong_magic = [&be64(IHAVEOPT + 1)[..], &be32(OPT_LIST), &be32(0)].concat();
    let http = b"GET / HTTP/1.1\r\n\r\n".to_vec();
    let request = request(0, CMD_READ, 1, 0, 4096);
    for junk in [wrong_magic, http, request, vec![0; 5000], vec![0xff; 5000]] {
        let mut client = Client::greeted(&served);
        client.send(&junk);
        client.assert_sent_away();
    }
}

#[test]
fn a_negotiation_in_single_bytes_is_understood() {
    let served = Served::start();
    let mut client = Client::connect(&served);
    client.take(18);
    let options = [
        be32(3).to_vec(),
        option(OPT_STRUCTURED_REPLY, &[]),
        option(77, b"what"),
        option(OPT_GO, &inform(b"swap0", &[INFO_BLOCK_SIZE])),
    ];
    for byte in options.concat() {
        client.send(&[byte]);
    }
    assert_eq!(client.answers(OPT_STRUCTURED_REPLY).pop().unwrap().kind, REP_ACK);
    assert_eq!(client.answers(77).pop().unwrap().kind, REP_ERR_UNSUP);
    assert_eq!(client.answers(OPT_GO).pop().unwrap().kind, REP_ACK);
    assert_eq!(client.plain(CMD_FLUSH, 0, 0, 0), 0);
}

#[test]
fn a_negotiation_and_its_first_requests_in_one_send_are_understood() {
    let served = Served::start();
    let mut client = Client::connect(&served);
    let all = [
        be32(3).to_vec(),
        option(OPT_LIST, &[]),
        option(OPT_GO, &inform(b"swap0", &[])),
        request(0, CMD_WRITE, 5, 100, 3),
        b"abc".to_vec(),
        request(0, CMD_READ, 6, 99, 5),
    ];
    client.send(&all.concat());
    client.take(18);
    client.answers(OPT_LIST);
    client.answers(OPT_GO);
    assert_eq!(client.error_of(5), 0);
    assert_eq!(client.error_of(6), 0);
    assert_eq!(client.take(5), b"\0abc\0");
}

#[test]
fn abort_is_acknowledged_and_ends_the_connection() {
    let served = Served::start();
    for data in [&b""[..], b"never mind"] {
        let mut client = Client::greeted(&served);
        let answers = client.ask(OPT_ABORT, data);
        assert_eq!((answers.len(), answers[0].kind), (1, REP_ACK));
        client.assert_ended();
    }
}

/// Takes the answer to EXPORT_NAME without its zeros.
fn take_chosen(client: &mut Client) -> Chosen {
    let mut answer = client.take(10);
    let flags = u16::from(answer[8]) << 8 | u16::from(answer[9]);
    answer.truncate(8);
    let bytes = answer.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    Chosen { bytes, flags }
}

#[test]
fn export_name_chooses_with_and_without_zeroes() {
    let served = Served::start();
    for (flags, zeros, name) in [(0, 124, "swap0"), (1, 124, ""), (2, 0, ""), (3, 0, "swap0")] {
        let mut client = Client::connect(&served);
        client.take(18);
        client.send(&be32(flags));
        client.send(&option(OPT_EXPORT_NAME, name.as_bytes()));
        let expected = Chosen { bytes: SWAP0.1 * 4096, flags: FLAGS };
        assert_eq!(take_chosen(&mut client), expected);
        assert_eq!(client.take(zeros), vec![0; zeros]);
        assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]));
    }
}

#[test]
fn export_name_after_structured_replies_says_so() {
    let served = Served::with(&[("plain", 1, false)], ROOM, 1);
    let mut client = Client::greeted(&served);
    client.choose_structured();
    client.send(&option(OPT_EXPORT_NAME, b"plain"));
    let expected = Chosen { bytes: 4096, flags: FLAGS & !(4 | 8) | 128 };
    assert_eq!(take_chosen(&mut client), expected);
    assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]));
}

#[test]
fn export_name_has_no_answer_to_a_wrong_name_but_the_end() {
    let one = Served::start();
    let two = Served::with(&[("a", 1, true), ("b", 1, true)], ROOM, 1);
    let long = "x".repeat(4096);
    for (served, name) in [(&one, "swap1"), (&one, "swap"), (&one, &long), (&two, ""), (&two, "c")]
    {
        let mut client = Client::greeted(served);
        client.send(&option(OPT_EXPORT_NAME, name.as_bytes()));
        client.assert_sent_away();
    }
}

/// Whatever came here in place of the end would be taken for the size of an export.
#[test]
fn export_name_has_no_answer_to_a_name_that_is_too_long_but_the_end() {
    let served = Served::start();
    for bytes in [OPTION_BYTES_MAX as usize + 1, 100_000] {
        let mut client = Client::greeted(&served);
        client.blurt(&option(OPT_EXPORT_NAME, &vec![b'x'; bytes]));
        client.assert_sent_away();
    }
}

#[test]
fn who_says_nothing_for_too_long_gives_up_its_place() {
    let watchdog = Watchdog::new("who_says_nothing_for_too_long_gives_up_its_place");
    let served = Served::start();
    let mut visitor = Client::simple(&served, "swap0");
    let silent = (0..PLACES - 1).map(|number| {
        let mut client = Client::connect(&served);
        client.take(18);
        let option = [&be32(3)[..], &option(OPT_LIST, &[])].concat();
        client.send(&option[..number * 2]);
        client
    });
    let silent: Vec<_> = silent.collect();
    silent.into_iter().for_each(Client::assert_ended);
    assert_eq!(visitor.plain(CMD_FLUSH, 0, 0, 0), 0);
    drop(watchdog);
}

#[test]
fn who_takes_no_answers_for_too_long_gives_up_its_place() {
    let watchdog = Watchdog::new("who_takes_no_answers_for_too_long_gives_up_its_place");
    let names: Vec<&str> = (0..64).map(|number| &*format!("swap{number}").leak()).collect();
    let plans: Vec<_> = names.iter().map(|name| (*name, 1, true)).collect();
    let served = Served::with(&plans, ROOM, 1);
    let deaf: Vec<_> = (0..PLACES)
        .map(|_| {
            let mut client = Client::greeted(&served);
            client.send(&option(OPT_LIST, &[]).repeat(OPTIONS_MAX as usize));
            client
        })
        .collect();
    Client::connect(&served).assert_ended();
    let mut welcome = watchdog.retry(|| {
        let mut client = Client::connect(&served);
        client.try_greet().then_some(client)
    });
    welcome.go("swap63");
    drop(deaf);
}
