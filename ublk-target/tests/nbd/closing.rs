//! Exports that are closed, removed and opened again, and the end of the server, while clients visit.

use std::sync::Arc;

use crate::client::Client;
use crate::fuzzing::spec::*;
use crate::served::{PLACES, ROOM, Served};
use crate::watchdog::Watchdog;

const TWO: [(&str, u64, bool); 2] = [("swap0", 1024, true), ("swap1", 16, true)];

#[test]
fn a_closed_export_knows_who_is_left_and_serves_them() {
    let watchdog = Watchdog::new("a_closed_export_knows_who_is_left_and_serves_them");
    let served = Served::with(&TWO, ROOM, 2);
    let export = &served.exports[0];
    let mut visitors: Vec<_> = (0..3).map(|_| Client::simple(&served, "swap0")).collect();
    // Who only looks, or uses another, does not count.
    let mut looker = Client::greeted(&served);
    assert_eq!(looker.kind_of(OPT_INFO, &inform(b"swap0", &[])), REP_ACK);
    let mut other = Client::simple(&served, "swap1");
    assert_eq!(export.visitors(), 3);
    assert_eq!(export.close(), 3);
    assert_eq!(export.close(), 3);
    for visitor in &mut visitors {
        assert_eq!(visitor.write(0, b"still there"), 0);
    }
    assert_eq!(looker.kind_of(OPT_GO, &inform(b"swap0", &[])), REP_ERR_UNKNOWN);

    // One says good-bye, one is sent away, and one hangs up.
    visitors[0].request(CMD_DISC, 0, 0, 0);
    watchdog.retry(|| (export.close() == 2).then_some(()));
    visitors[1].send(&[0; 28]);
    watchdog.retry(|| (export.close() == 1).then_some(()));
    assert_eq!(visitors[2].read(0, 11), Ok(b"still there".to_vec()));
    visitors.pop();
    watchdog.retry(|| (export.close() == 0).then_some(()));
    assert_eq!(export.visitors(), 0);
    assert_eq!(other.plain(CMD_FLUSH, 0, 0, 0), 0);
    assert_eq!(served.exports[1].visitors(), 1);
}

#[test]
fn a_closed_export_is_unknown_until_it_is_opened_again() {
    let served = Served::with(&TWO, ROOM, 1);
    let mut visitor = Client::simple(&served, "swap0");
    assert_eq!(visitor.write(5, b"kept"), 0);
    served.exports[0].close();
    let mut client = Client::greeted(&served);
    client.choose_structured();
    for number in [OPT_INFO, OPT_GO] {
        assert_eq!(client.kind_of(number, &inform(b"swap0", &[])), REP_ERR_UNKNOWN);
    }
    for number in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        let data = contexts(b"swap0", &[BASE_ALLOCATION]);
        assert_eq!(client.kind_of(number, &data), REP_ERR_UNKNOWN);
    }
    let mut old = Client::greeted(&served);
    old.send(&option(OPT_EXPORT_NAME, b"swap0"));
    old.assert_sent_away();
    served.exports[0].reopen();
    client.go("swap0");
    assert_eq!(client.read(5, 4), Ok(b"kept".to_vec()));
    assert_eq!(visitor.read(5, 4), Ok(b"kept".to_vec()));
    assert_eq!(served.exports[0].close(), 2);
}

#[test]
fn a_removed_export_is_gone_and_the_one_that_is_left_needs_no_name() {
    let served = Served::with(&TWO, ROOM, 1);
    let mut client = Client::greeted(&served);
    client.choose_structured();
    client.choose_contexts("swap0");
    assert_eq!(served.exports[0].close(), 0);
    served.server().remove(&served.exports[0]);
    let answers = client.ask(OPT_LIST, &[]);
    assert_eq!(answers.len(), 2);
    assert_eq!(answers[0].data, string(b"swap1"));
    for number in [OPT_INFO, OPT_GO] {
        assert_eq!(client.kind_of(number, &inform(b"swap0", &[])), REP_ERR_UNKNOWN);
    }
    assert_eq!(client.go("").bytes, 16 * 4096);
    // The context was chosen for what is gone.
    assert_eq!(client.block_status(0, 0, 512), Err(EINVAL));
}

/// And whoever is let in stays counted until it has gone.
#[test]
fn clients_that_come_while_an_export_closes_are_let_in_or_told_that_it_is_unknown() {
    let watchdog = Watchdog::new("clients_that_come_while_an_export_closes");
    let served = Served::with(&TWO, ROOM, 2);
    let export = Arc::clone(&served.exports[0]);
    std::thread::scope(|scope| {
        let comer = scope.spawn(|| {
            let (mut welcome, mut unknown) = (0, 0);
            while welcome < 100 || unknown < 100 {
                let mut client = watchdog.retry(|| {
                    let mut client = Client::connect(&served);
                    client.try_greet().then_some(client)
                });
                match client.kind_of(OPT_GO, &inform(b"swap0", &[])) {
                    REP_ACK => {
                        assert_eq!(client.plain(CMD_FLUSH, 0, 0, 0), 0);
                        welcome += 1;
                    }
                    REP_ERR_UNKNOWN => unknown += 1,
                    kind => panic!("it is answered with {kind:#x}"),
                }
            }
        });
        while !comer.is_finished() {
            // From here on they only become fewer.
            let mut left = export.close();
            for _ in 0..20 {
                let now = export.visitors();
                assert!(now <= left, "somebody has come to what is closed");
                left = now;
                std::thread::yield_now();
            }
            export.reopen();
            std::thread::yield_now();
        }
        comer.join().unwrap();
    });
}

#[test]
fn the_end_of_the_server_is_the_end_of_every_connection() {
    let watchdog = Watchdog::new("the_end_of_the_server_is_the_end_of_every_connection");
    for workers in [1, 2, 8] {
        let mut served = Served::with(&TWO, ROOM, workers);
        let mut silent = Client::connect(&served);
        silent.take(18);
        let haggling = Client::greeted(&served);
        let idle = Client::structured(&served, "swap1");
        let mut half = Client::simple(&served, "swap0");
        half.send(&request(0, CMD_WRITE, 1, 0, 9000));
        let mut deaf = Client::simple(&served, "swap0");
        let reads = (0..50).map(|cookie| request(0, CMD_READ, cookie, 0, 1 << 20));
        deaf.send(&reads.collect::<Vec<_>>().concat());
        let socket = served.socket().to_owned();
        assert!(socket.exists());
        served.stop();
        [silent, haggling, idle, half].into_iter().for_each(Client::assert_ended);
        assert!(deaf.rest().len() < 50 << 20);
        assert!(!socket.exists());
        assert!(served.exports.iter().all(|export| export.visitors() == 0));
        assert!(served.exports.iter().all(|export| export.close() == 0));
    }
    const { assert!(PLACES > 5) };
    drop(watchdog);
}
