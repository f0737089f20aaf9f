//! Pages that go to a real backing file, written by the real thread, and come back to clients.

use std::fs::File;
use std::io::PipeWriter;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use tmem::{BACKING_BYTES_MIN, Config, Engine, KEY_BYTES};
use tmem_ublk_target::backing::file::FILE_BYTES_MIN;
use tmem_ublk_target::backing::{Backing, BackingFile, BackingSpec, Driver};

use crate::backing::TABLES;
use crate::client::Client;
use crate::fuzzing::spec::*;
use crate::served::{Served, noise};
use crate::watchdog::Watchdog;

const PAGES: u64 = 2048;
const BYTES: usize = PAGES as usize * 4096;

/// Memory for pages: less than a fourth of what is written.
const ROOM: u64 = 2 << 20;

/// A server with an export, most of which is on the file once it is filled.
struct Backed {
    served: Served,
    file: File,
    /// The server's own.
    fd: RawFd,
    driver: Option<Driver>,
    _home: tempfile::TempDir,
}

impl Backed {
    fn start(workers: usize) -> Self {
        let limit = Config::limit_min(1) + TABLES + ROOM;
        let engine = Engine::new(&Config { limit, limit_max: limit, shards: 1 }).unwrap();
        let engine = Arc::new(engine);
        while engine.supply().unwrap().more {}
        let backing = Arc::new(Backing::new().unwrap());
        let ready = Driver::prepare(Arc::clone(&backing)).unwrap();
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("backing");
        let bytes = Some(FILE_BYTES_MIN + BACKING_BYTES_MIN);
        let spec = BackingSpec { path: path.clone(), bytes, encrypt: true, force: false };
        let opened = BackingFile::open(&spec, &[]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let fd = opened.as_fd().as_raw_fd();
        let writeback = engine.attach_backing(opened.bytes(), Some(&[7; KEY_BYTES])).unwrap();
        let driver = Some(ready.drive(Arc::clone(&engine), opened, writeback));
        let served = Served::on(engine, backing, &[("swap0", PAGES, true)], workers);
        Self { served, file, fd, driver, _home: home }
    }

    /// Lets nothing more be written to the file.
    fn settle(&mut self) {
        drop(self.driver.take());
    }

    /// From now on the file does not answer, as long as what this returns is there.
    fn silence(&mut self) -> PipeWriter {
        self.settle();
        let (reader, writer) = std::io::pipe().unwrap();
        // SAFETY: both are open, and who has the old file's number reads from the pipe now.
        assert_eq!(unsafe { libc::dup2(reader.as_raw_fd(), self.fd) }, self.fd);
        writer
    }

    /// The same with all of it written.
    fn filled(workers: usize) -> (Self, Vec<u8>) {
        let backed = Self::start(workers);
        let plain = noise(BYTES, 1);
        let mut client = Client::simple(&backed.served, "swap0");
        for (at, piece) in (0..).step_by(128 << 10).zip(plain.chunks(128 << 10)) {
            // What found no memory in time, for the disk was slow, is written once more.
            let mut tries = (0..10).map(|_| client.write(at, piece));
            let written = tries.find(|error| *error != ENOSPC);
            assert_eq!(written, Some(0), "at {at}");
        }
        let on_file = backed.served.exports[0].device().pool_stats().bd_count;
        assert!(on_file > PAGES / 2, "{on_file} pages are on the file");
        (backed, plain)
    }
}

#[test]
fn what_memory_does_not_hold_is_read_back() {
    let watchdog = Watchdog::new("what_memory_does_not_hold_is_read_back");
    let (backed, plain) = Backed::filled(2);
    std::thread::scope(|scope| {
        for number in 0..4_usize {
            let (served, plain) = (&backed.served, &plain);
            scope.spawn(move || {
                let mut client = match number % 2 {
                    0 => Client::simple(served, "swap0"),
                    _ => Client::structured(served, "swap0"),
                };
                // Pieces of all kinds, other ones for each.
                let mut at = number * 1000;
                while at < BYTES {
                    let length = [4096, 131_072, 77, 300_000][(at / 512 + number) % 4];
                    let length = length.min(BYTES - at);
                    let data = client.read(at as u64, length as u32).unwrap();
                    assert!(data == plain[at..at + length], "client {number} at {at}");
                    at += length;
                }
            });
        }
    });
    let latencies = backed.served.exports[0].device().latencies();
    assert!(latencies.readback_latency.count > PAGES);
    drop(watchdog);
}

#[test]
fn parts_of_pages_are_written_wherever_these_are() {
    let watchdog = Watchdog::new("parts_of_pages_are_written_wherever_these_are");
    let (backed, mut plain) = Backed::filled(1);
    let mut client = Client::structured(&backed.served, "swap0");
    for step in 0..300_usize {
        let at = step * 1_234_577 % (BYTES - 9000);
        let data = noise(1 + step * 31 % 9000, step as u64);
        assert_eq!(client.write(at as u64, &data), 0);
        plain[at..at + data.len()].copy_from_slice(&data);
    }
    assert!(client.read(0, BYTES as u32).unwrap() == plain);
    drop(watchdog);
}

#[test]
fn a_file_that_cannot_be_read_fails_requests_and_no_connection() {
    let watchdog = Watchdog::new("a_file_that_cannot_be_read_fails_requests_and_no_connection");
    let (mut backed, plain) = Backed::filled(1);
    let (mut simple, mut structured) =
        (Client::simple(&backed.served, "swap0"), Client::structured(&backed.served, "swap0"));
    backed.settle();
    let mut kept = vec![0; backed.file.metadata().unwrap().len() as usize];
    backed.file.read_exact_at(&mut kept, 0).unwrap();
    backed.file.set_len(0).unwrap();
    let mut failed = 0;
    for page in (0..PAGES).step_by(7) {
        for client in [&mut simple, &mut structured] {
            match client.read(page * 4096, 4096) {
                Ok(data) => assert!(data == plain[page as usize * 4096..][..4096]),
                Err(error) => {
                    assert_eq!(error, EIO);
                    failed += 1;
                }
            }
        }
    }
    assert!(failed > PAGES / 7, "{failed} of {} reads failed", PAGES / 7 * 2);
    assert_eq!(simple.read(0, 131_072), Err(EIO));
    assert_eq!(structured.read(0, 131_072), Err(EIO));
    let io = backed.served.exports[0].io_stats();
    assert_eq!(io.io_errors, failed + 2);

    backed.file.write_all_at(&kept, 0).unwrap();
    assert!(simple.read(0, BYTES as u32).unwrap() == plain);
    assert!(structured.read(0, BYTES as u32).unwrap() == plain);
    drop(watchdog);
}

/// A client, as soon as the server has a place for one: those who have gone keep theirs until their reads end.
fn welcome(watchdog: &Watchdog, served: &Served) -> Client {
    let mut client = watchdog.retry(|| {
        let mut client = Client::connect(served);
        client.try_greet().then_some(client)
    });
    client.go("swap0");
    client
}

#[test]
fn clients_and_servers_go_while_pages_are_on_their_way() {
    let watchdog = Watchdog::new("clients_and_servers_go_while_pages_are_on_their_way");
    let (mut backed, plain) = Backed::filled(2);
    for round in 0..20 {
        let mut client = welcome(&watchdog, &backed.served);
        let reads = (0..10).map(|n| request(0, CMD_READ, n, (n + round) * 131_072, 131_072));
        client.send(&reads.collect::<Vec<_>>().concat());
        drop(client);
    }
    let export = Arc::clone(&backed.served.exports[0]);
    watchdog.retry(|| (export.visitors() == 0).then_some(()));
    let mut client = welcome(&watchdog, &backed.served);
    assert!(client.read(0, BYTES as u32).unwrap() == plain);

    let reads = (0..40).map(|n| request(0, CMD_READ, n, n * 131_072, 131_072));
    client.send(&reads.collect::<Vec<_>>().concat());
    backed.served.stop();
    assert!(client.rest().len() < 40 * 131_072);
    assert_eq!(export.visitors(), 0);
    drop(watchdog);
}

#[test]
fn a_file_that_never_answers_keeps_waiting_who_asks_for_its_pages_and_nobody_else() {
    let watchdog = Watchdog::new("a_file_that_never_answers_keeps_waiting_who_asks");
    let (mut backed, plain) = Backed::filled(1);
    let export = Arc::clone(&backed.served.exports[0]);
    let mut waiting = [
        Client::simple(&backed.served, "swap0"),
        Client::structured(&backed.served, "swap0"),
        Client::simple(&backed.served, "swap0"),
    ];
    let mut other = Client::simple(&backed.served, "swap0");
    let _writer = backed.silence();
    let before = export.io_stats().reads;
    for client in &mut waiting {
        client.request(CMD_READ, 0, 5000, 131_072);
    }
    watchdog.retry(|| (export.io_stats().reads == before + 3).then_some(()));
    let [gone, waiting @ ..] = waiting;
    drop(gone);
    for page in PAGES - 20..PAGES {
        let data = other.read(page * 4096, 4096).unwrap();
        assert!(data == plain[page as usize * 4096..][..4096]);
    }
    assert_eq!(export.visitors(), 4);
    // And the end of the server does not wait for it.
    backed.served.stop();
    assert_eq!(export.visitors(), 0);
    waiting.into_iter().for_each(Client::assert_ended);
    drop(watchdog);
}

#[test]
fn on_the_connection_of_the_kernels_client_what_is_in_memory_is_answered_though_the_file_is_silent()
{
    let watchdog = Watchdog::new("on_the_connection_of_the_kernels_client");
    let (mut backed, plain) = Backed::filled(1);
    let mut client = Client::on(backed.served.seated(&backed.served.exports[0]).unwrap());
    let writer = backed.silence();
    let cold: Vec<_> = (0..8).map(|page| client.request(CMD_READ, 0, page * 4096, 4096)).collect();
    for page in PAGES - 20..PAGES {
        let data = client.read(page * 4096, 4096).unwrap();
        assert!(data == plain[page as usize * 4096..][..4096]);
    }
    assert_eq!(client.plain(CMD_TRIM, 0, (PAGES - 1) * 4096, 4096), 0);
    // The file comes to nothing: who waits for it gets an error, and that is all.
    drop(writer);
    let mut errors: Vec<_> = cold.iter().map(|_| client.error_of_any()).collect();
    errors.sort_unstable();
    let mut expected: Vec<_> = cold.iter().map(|cookie| (*cookie, EIO)).collect();
    expected.sort_unstable();
    assert_eq!(errors, expected);
    assert_eq!(client.read((PAGES - 1) * 4096, 4096), Ok(vec![0; 4096]));
    drop(watchdog);
}

#[test]
fn who_says_nothing_more_gets_the_answers_to_what_was_said() {
    let watchdog = Watchdog::new("who_says_nothing_more_gets_the_answers");
    let (mut backed, plain) = Backed::filled(1);
    backed.settle();
    for page in 0..50_usize {
        let mut client = Client::on(backed.served.seated(&backed.served.exports[0]).unwrap());
        let at = page * 16 * 4096;
        let cookie = client.request(CMD_READ, 0, at as u64, 4096);
        client.stream.shutdown(Shutdown::Write).unwrap();
        let (data, _) = client.data_of(cookie, at as u64, 4096).unwrap();
        assert!(data == plain[at..at + 4096]);
        client.assert_ended();
    }
    drop(watchdog);
}
