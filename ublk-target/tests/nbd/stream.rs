//! Requests as a stream of bytes: however they are cut or joined, and wherever they break off.

use std::net::Shutdown;
use std::thread;

use crate::client::Client;
use crate::fuzzing::spec::*;
use crate::served::{Served, noise};
use crate::watchdog::Watchdog;

#[test]
fn requests_in_single_bytes_are_understood() {
    let served = Served::start();
    let data = noise(600, 4);
    for mut client in [Client::simple(&served, "swap0"), Client::structured(&served, "swap0")] {
        let requests = [
            request(0, CMD_WRITE, 1, 4000, 600),
            data.clone(),
            request(0, CMD_WRITE, 2, u64::MAX, 40),
            vec![0; 40],
            request(0, CMD_READ, 3, 4000, 600),
        ];
        for byte in requests.concat() {
            client.send(&[byte]);
        }
        assert_eq!(client.error_of(1), 0);
        assert_eq!(client.error_of(2), ENOSPC);
        assert!(client.data_of(3, 4000, 600).unwrap().0 == data);
    }
}

#[test]
fn requests_in_pieces_of_any_size_are_understood() {
    let served = Served::start();
    let mut client = Client::simple(&served, "swap0");
    for size in [2, 3, 27, 28, 29, 4095, 4096, 4097, 135_167, 135_168, 135_169] {
        let data = noise(140_000, size as u64);
        let write = [request(0, CMD_WRITE, 1, 77, 140_000), data.clone()].concat();
        let all = [write, request(0, CMD_READ, 2, 77, 140_000)].concat();
        all.chunks(size).for_each(|piece| client.send(piece));
        assert_eq!(client.error_of(1), 0);
        assert!(client.data_of(2, 77, 140_000).unwrap().0 == data, "{size}");
    }
}

#[test]
fn many_requests_in_one_send_are_answered_in_order() {
    let served = Served::start();
    for mut client in [Client::simple(&served, "swap0"), Client::structured(&served, "swap0")] {
        let mut all = Vec::new();
        for number in 0..3000 {
            let data = [&be64(number)[..], &be64(!number)].concat();
            all.extend(request(0, CMD_WRITE, 2 * number, number % 500 * 16, 16));
            all.extend(data);
            all.extend(request(0, CMD_READ, 2 * number + 1, number % 500 * 16, 16));
        }
        let mut stream = client.stream.try_clone().unwrap();
        let sender = thread::spawn(move || std::io::Write::write_all(&mut stream, &all));
        for number in 0..3000 {
            assert_eq!(client.error_of(2 * number), 0);
            let (data, _) = client.data_of(2 * number + 1, number % 500 * 16, 16).unwrap();
            assert_eq!(data, [&be64(number)[..], &be64(!number)].concat());
        }
        sender.join().unwrap().unwrap();
    }
}

#[test]
fn many_long_reads_in_one_send_are_answered_in_full() {
    let served = Served::start();
    let data = noise(300_000, 8);
    for mut client in [Client::simple(&served, "swap0"), Client::structured(&served, "swap0")] {
        assert_eq!(client.write(1000, &data), 0);
        let flags = [0, if client.is_structured() { FLAG_DF } else { 0 }];
        let lengths = [1, 131_072, 131_073, 135_168, 4095, 262_144, 0, 300_000];
        let mut reads = Vec::new();
        for (cookie, length) in lengths.into_iter().cycle().take(80).enumerate() {
            reads.push((cookie as u64, flags[cookie / 8 % 2], length));
        }
        let ask = |&(cookie, flags, length)| request(flags, CMD_READ, cookie, 1000, length);
        client.send(&reads.iter().flat_map(ask).collect::<Vec<u8>>());
        for (cookie, flags, length) in reads {
            let (found, pieces) = client.data_of(cookie, 1000, length).unwrap();
            assert!(found == data[..length as usize], "{length}");
            assert!(flags == 0 || pieces <= 1, "{pieces} pieces where one was asked for");
        }
    }
}

#[test]
fn who_breaks_off_anywhere_leaves_the_others_alone() {
    let watchdog = Watchdog::new("who_breaks_off_anywhere_leaves_the_others_alone");
    let served = Served::start();
    let mut other = Client::simple(&served, "swap0");
    let write = [request(0, CMD_WRITE, 1, 0, 9000), noise(9000, 1)].concat();
    let refused = [request(0, CMD_WRITE, 1, u64::MAX, 9000), noise(9000, 1)].concat();
    let read = request(0, CMD_READ, 1, 0, 4 << 20);
    for whole in [write, refused, read] {
        for cut in [1, 4, 27, 28, 29, 4123, 4124, 8000, 9027].map(|cut| cut.min(whole.len())) {
            for half_open in [false, true] {
                let mut client = watchdog.retry(|| try_simple(&served));
                client.send(&whole[..cut]);
                if half_open {
                    client.stream.shutdown(Shutdown::Write).unwrap();
                    assert_eq!(other.plain(CMD_FLUSH, 0, 0, 0), 0);
                }
                drop(client);
                assert_eq!(other.plain(CMD_FLUSH, 0, 0, 0), 0);
            }
        }
    }
    watchdog.retry(|| (served.exports[0].visitors() == 1).then_some(()));
}

/// A visitor, unless those that have gone hold all places still.
fn try_simple(served: &Served) -> Option<Client> {
    let mut client = Client::connect(served);
    client.try_greet().then(|| {
        client.go("swap0");
        client
    })
}

#[test]
fn a_write_that_breaks_off_has_stored_what_came_or_nothing() {
    let watchdog = Watchdog::new("a_write_that_breaks_off_has_stored_what_came_or_nothing");
    let served = Served::start();
    let mut other = Client::simple(&served, "swap0");
    let old = noise(3 * 4096, 2);
    let new = noise(3 * 4096, 3);
    assert_eq!(other.write(0, &old), 0);
    let mut client = Client::simple(&served, "swap0");
    client.request(CMD_WRITE, 0, 0, 3 * 4096);
    client.send(&new[..4096 + 2000]);
    drop(client);
    watchdog.retry(|| (served.exports[0].visitors() == 1).then_some(()));
    let found = other.read(0, 3 * 4096).unwrap();
    for (page, found) in found.chunks(4096).enumerate() {
        let at = page * 4096;
        let is_new = page == 0 && *found == new[..4096];
        assert!(is_new || *found == old[at..at + 4096], "page {page} is neither old nor new");
    }
}
