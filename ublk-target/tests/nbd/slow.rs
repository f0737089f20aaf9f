//! Clients that take nothing, or say half of what they have to: the others are served meanwhile, by
//! the same worker.

use std::io::{ErrorKind, Write};

use crate::client::Client;
use crate::fuzzing::spec::*;
use crate::served::{PLACES, Served, noise};
use crate::watchdog::Watchdog;

const LONG: u32 = 1 << 20;

/// Does some of everything, and checks what comes of it.
fn assert_served(client: &mut Client, at: u64) {
    for round in 0..100 {
        let data = noise(3000, round);
        assert_eq!(client.write(at + round, &data), 0);
        assert!(client.read(at + round, 3000).unwrap() == data);
    }
    assert!(client.read(0, LONG).is_ok());
    assert_eq!(client.plain(CMD_TRIM, 0, at, 8192), 0);
}

#[test]
fn who_never_reads_does_not_keep_others_waiting() {
    let watchdog = Watchdog::new("who_never_reads_does_not_keep_others_waiting");
    let served = Served::start();
    let data = noise(4096, 1);
    let mut other = Client::simple(&served, "swap0");
    assert_eq!(other.write(0, &data), 0);
    let flags = [0, 0, FLAG_DF];
    let mut deaf = flags.map(|flags| match flags {
        0 => Client::simple(&served, "swap0"),
        _ => Client::structured(&served, "swap0"),
    });
    for (client, flags) in deaf.iter_mut().zip(flags) {
        let reads = (0..64).map(|cookie| request(flags, CMD_READ, cookie, 0, LONG));
        client.send(&reads.collect::<Vec<_>>().concat());
    }
    for round in 1..4 {
        assert_served(&mut other, round * 65_536);
    }
    // Whoever begins to read finds everything.
    for client in &mut deaf {
        for cookie in 0..64 {
            let (found, _) = client.data_of(cookie, 0, LONG).unwrap();
            assert!(found[..4096] == data, "reply {cookie}");
        }
        assert_eq!(client.plain(CMD_FLUSH, 0, 0, 0), 0);
    }
    drop(watchdog);
}

/// While the rest of a reply has no room in the socket, the server waits for the next request, too.
#[test]
fn a_reply_that_the_socket_takes_in_part_is_finished() {
    let watchdog = Watchdog::new("a_reply_that_the_socket_takes_in_part_is_finished");
    let served = Served::start();
    let mut other = Client::simple(&served, "swap0");
    let data = noise(131_072, 2);
    assert_eq!(other.write(0, &data), 0);
    for reads in 1..8 {
        for mut slow in [Client::simple(&served, "swap0"), Client::structured(&served, "swap0")] {
            let all = (0..reads).map(|cookie| request(0, CMD_READ, cookie, 0, 131_072));
            slow.send(&all.collect::<Vec<_>>().concat());
            // The same worker has its turns meanwhile.
            for _ in 0..50 {
                assert_eq!(other.plain(CMD_FLUSH, 0, 0, 0), 0);
            }
            for cookie in 0..reads {
                assert!(slow.data_of(cookie, 0, 131_072).unwrap().0 == data);
            }
            assert_eq!(slow.plain(CMD_FLUSH, 0, 0, 0), 0);
        }
    }
    drop(watchdog);
}

/// Sends requests until the server takes no more of them.
fn stuff(client: &mut Client) {
    client.stream.set_nonblocking(true).unwrap();
    let request = request(0, CMD_READ, 7, 0, LONG);
    let mut refusals = 0;
    while refusals < 3 {
        match client.stream.write(&request) {
            Ok(sent) if sent < request.len() => return,
            Ok(_) => refusals = 0,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                refusals += 1;
                std::thread::yield_now();
            }
        }
    }
}

#[test]
fn who_asks_without_end_and_never_reads_is_left_at_that() {
    let watchdog = Watchdog::new("who_asks_without_end_and_never_reads_is_left_at_that");
    let mut served = Served::start();
    let mut other = Client::simple(&served, "swap0");
    let mut deaf: Vec<_> = (0..PLACES - 2).map(|_| Client::simple(&served, "swap0")).collect();
    deaf.iter_mut().for_each(stuff);
    assert_served(&mut other, 0);
    // Some go, and their places are free.
    deaf.truncate(2);
    let mut another = watchdog.retry(|| {
        let mut client = Client::connect(&served);
        client.try_greet().then_some(client)
    });
    another.go("swap0");
    assert_served(&mut another, 100_000);
    // Nor do those that stay keep the server from ending.
    served.stop();
    assert_eq!(served.exports[0].visitors(), 0);
    drop(watchdog);
}

#[test]
fn who_says_half_of_something_does_not_keep_others_waiting() {
    let watchdog = Watchdog::new("who_says_half_of_something_does_not_keep_others_waiting");
    let served = Served::start();
    let mut other = Client::simple(&served, "swap0");
    let write = [request(0, CMD_WRITE, 1, 0, 9000), noise(9000, 5)].concat();
    let refused = [request(0, CMD_WRITE, 1, u64::MAX, 9000), noise(9000, 6)].concat();
    let halves =
        [(&write, 14), (&write, 28), (&write, 28 + 100), (&write, 28 + 4096), (&refused, 5000)];
    let mut slow = halves.map(|(all, cut)| {
        let mut client = Client::simple(&served, "swap0");
        client.send(&all[..cut]);
        (client, &all[cut..])
    });
    let mut mute = Client::connect(&served);
    mute.take(18);
    assert_served(&mut other, 65_536);
    // The other half may come late.
    for (client, rest) in &mut slow {
        client.send(rest);
        assert!([0, ENOSPC].contains(&client.error_of(1)));
    }
    assert!(other.read(0, 9000).unwrap() == noise(9000, 5));
    drop(watchdog);
}
