//! More clients than there are places, and clients that come and go without end.

use std::fs;

use crate::client::Client;
use crate::fuzzing::spec::*;
use crate::served::{PLACES, ROOM, Served};
use crate::watchdog::Watchdog;

#[test]
fn whoever_finds_no_place_is_sent_away_at_once() {
    let watchdog = Watchdog::new("whoever_finds_no_place_is_sent_away_at_once");
    for workers in [1, 3] {
        let served = Served::with(&[crate::served::SWAP0], ROOM, workers);
        let mut visitor = Client::simple(&served, "swap0");
        let idle: Vec<_> = (1..PLACES).map(|_| Client::simple(&served, "swap0")).collect();
        for round in 0..5 * PLACES as u64 {
            Client::connect(&served).assert_ended();
            assert_eq!(visitor.write(round, b"x"), 0);
        }
        let surplus: Vec<_> = (0..5 * PLACES).map(|_| Client::connect(&served)).collect();
        surplus.into_iter().for_each(Client::assert_ended);
        drop(idle);
        // All places are to be had again.
        let mut guests = Vec::new();
        while guests.len() < PLACES - 1 {
            guests.push(watchdog.retry(|| {
                let mut client = Client::connect(&served);
                client.try_greet().then_some(client)
            }));
        }
        for guest in &mut guests {
            guest.go("swap0");
            assert_eq!(guest.read(0, 1), Ok(b"x".to_vec()));
        }
        assert_eq!(visitor.plain(CMD_FLUSH, 0, 0, 0), 0);
    }
}

/// Says something that is no use to anybody, if the server still listens.
fn blurt(mut client: Client, number: usize) {
    let hello = be32(3);
    let junk = [
        Vec::new(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 100],
        [&hello[..], &option(OPT_LIST, &[])].concat(),
        [&hello[..], &option(77, &[0; 1000])[..500]].concat(),
        [&hello[..], &option(OPT_GO, &inform(b"swap0", &[])), &[0; 40]].concat(),
        [&hello[..], &option(OPT_GO, &inform(b"swap0", &[])), &request(0, CMD_READ, 1, 0, 1 << 20)]
            .concat(),
    ];
    client.blurt(&junk[number % junk.len()]);
}

#[test]
fn ten_thousand_that_come_and_go_leave_nothing() {
    let watchdog = Watchdog::new("ten_thousand_that_come_and_go_leave_nothing");
    let served = Served::start();
    let mut visitor = Client::simple(&served, "swap0");
    for number in 0..10_000 {
        let client = Client::connect(&served);
        if number % 2 == 1 {
            blurt(client, number / 2);
        }
        if number % 500 == 0 {
            assert_eq!(visitor.write(number as u64, b"y"), 0);
        }
    }
    assert_eq!(visitor.read(9500, 1), Ok(b"y".to_vec()));
    watchdog.retry(|| (served.exports[0].visitors() == 1).then_some(()));
    // Those of other tests are among them.
    let open = fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(open < 2000, "{open} descriptors are open");
    let mut guests = Vec::new();
    while guests.len() < PLACES - 1 {
        guests.push(watchdog.retry(|| {
            let mut client = Client::connect(&served);
            client.try_greet().then_some(client)
        }));
    }
}
