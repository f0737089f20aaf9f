//! Clients that are given their connection, as the kernel's is: they have a place, and do not negotiate.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tmem::{Config, Engine};
use tmem_ublk_target::backing::Backing;
use tmem_ublk_target::device::BlockDevice;
use tmem_ublk_target::nbd::{EngineSide, Export, NbdAddress, NbdServer, NoSeat, Purpose};
use tmem_ublk_target::supply::Supply;

use crate::client::Client;
use crate::fuzzing::spec::*;
use crate::served::{PLACES, ROOM, SWAP0, Served};
use crate::watchdog::Watchdog;

#[test]
fn whoever_is_seated_makes_requests_at_once() {
    let _watchdog = Watchdog::new("whoever_is_seated_makes_requests_at_once");
    for workers in [1, 3] {
        let served = Served::with(&[SWAP0, ("other", 1024, false)], ROOM, workers);
        let mut seated = Client::on(served.seated(&served.exports[0]).unwrap());
        let mut other = Client::on(served.seated(&served.exports[1]).unwrap());
        assert_eq!(seated.write(4096, &[7; 8192]), 0);
        assert_eq!(other.read(4096, 8192), Ok(vec![0; 8192]));
        let mut guest = Client::simple(&served, "swap0");
        assert_eq!(guest.read(8192, 4096), Ok(vec![7; 4096]));
        // As each export offers it.
        assert_eq!(seated.plain(CMD_FLUSH, 0, 0, 0), 0);
        assert_ne!(other.plain(CMD_FLUSH, 0, 0, 0), 0);
        assert_eq!((served.exports[0].visitors(), served.exports[1].visitors()), (2, 1));
    }
}

#[test]
fn a_seat_is_a_place_and_is_given_back() {
    let watchdog = Watchdog::new("a_seat_is_a_place_and_is_given_back");
    let served = Served::with(&[SWAP0], ROOM, 2);
    let export = &served.exports[0];
    let seats: Vec<_> = (0..PLACES).map(|_| served.server().seat(export).ok().unwrap()).collect();
    let full = NoSeat::Full { connections: PLACES };
    assert_eq!(served.server().seat(export).err(), Some(full));
    Client::connect(&served).assert_ended();
    assert_eq!(export.visitors(), PLACES as u32);
    // Without a connection, or with one that ends.
    let mut clients = Vec::new();
    for (number, seat) in seats.into_iter().enumerate() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        if number % 2 == 0 {
            seat.take(ours.into(), None);
            clients.push(Client::on(theirs));
        }
    }
    assert_eq!(export.visitors(), PLACES as u32 / 2);
    assert!(clients.iter_mut().all(|client| client.read(0, 1) == Ok(vec![0])));
    drop(clients);
    watchdog.retry(|| (export.visitors() == 0).then_some(()));
    let again = watchdog.retry(|| {
        let seats: Vec<_> = (0..PLACES).map_while(|_| served.server().seat(export).ok()).collect();
        (seats.len() == PLACES).then_some(seats)
    });
    drop(again);
    assert_eq!(export.close(), 0);
    assert_eq!(served.server().seat(export).err(), Some(NoSeat::Closed));
}

/// A server that waits for its engine, and an export.
fn prepared(supply: &Supply, engine: &Arc<Engine>) -> (NbdServer, Arc<Export>) {
    let backing = Arc::new(Backing::new().unwrap());
    let side = EngineSide { waker: Arc::clone(supply.waker()), backing };
    let address: NbdAddress = "unix:/nobody/listens".parse().unwrap();
    let server = NbdServer::prepare(&address, &side, 2, 0, Purpose::Clients).unwrap();
    let device = Arc::new(BlockDevice::new(Arc::clone(engine), 64).unwrap());
    let export = Arc::new(Export::new("a", device, server.workers(), true));
    server.add(Arc::clone(&export));
    (server, export)
}

#[test]
fn a_server_serves_once_it_has_an_engine_and_ends_without_one() {
    let _watchdog = Watchdog::new("a_server_serves_once_it_has_an_engine_and_ends_without_one");
    let limit = Config::limit_min(1) + ROOM;
    let engine = Engine::new(&Config { limit, limit_max: limit, shards: 1 }).unwrap();
    let engine = Arc::new(engine);
    while engine.supply().unwrap().more {}
    let supply = Supply::start(Arc::clone(&engine)).unwrap();
    let (server, export) = prepared(&supply, &engine);
    let (ours, theirs) = UnixStream::pair().unwrap();
    server.seat(&export).ok().unwrap().take(ours.into(), None);
    let mut early = Client::on(theirs);
    let cookie = early.request(CMD_WRITE, 0, 0, 5);
    early.send(b"early");
    server.begin(&engine);
    assert_eq!(early.error_of(cookie), 0);
    assert_eq!(early.read(0, 5), Ok(b"early".to_vec()));
    drop(server);
    early.assert_ended();
    drop(prepared(&supply, &engine));
}
