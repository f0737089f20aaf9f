//! Bad clients of the control socket: none may hurt the daemon or another client, and each is
//! told what it did wrong.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, thread};

use crate::fake::{Fake, Served, assert_fails, stdout};
use tmem_ublk_target::backing::BackingSpec;
use tmem_ublk_target::control::{CLIENTS_MAX, Client, Operations, REQUEST_MAX, Request};
use tmem_ublk_target::exit::{Exit, Failure};
use tmem_ublk_target::socket::Listener;

/// How soon a healthy daemon answers, on a machine that is busy with other tests.
const PROMPT: Duration = Duration::from_secs(3);

fn connect(served: &Served) -> UnixStream {
    let stream = UnixStream::connect(&served.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Reads all that the server answers.
fn answer(mut stream: &UnixStream) -> String {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        // The server closed before it had read all that we sent.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        result => drop(result.unwrap()),
    }
    let text = String::from_utf8(bytes).unwrap();
    assert!(text.matches('\n').count() <= 1, "{text}");
    text
}

fn assert_healthy(served: &Served) {
    let asked = Instant::now();
    Client::new(&served.socket).list().unwrap();
    assert!(asked.elapsed() < PROMPT, "{:?}", asked.elapsed());
}

#[test]
fn half_a_request_is_refused() {
    let served = Served::start(Fake::default());
    let mut stream = connect(&served);
    stream.write_all(b"{\"version\":1,\"req").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(answer(&stream).contains("ended before its newline"));
    assert_healthy(&served);
}

#[test]
fn half_a_request_and_then_silence_times_out() {
    let served = Served::start(Fake::default());
    let mut stream = connect(&served);
    stream.write_all(b"{\"version\":1,").unwrap();
    assert_healthy(&served);
    assert!(answer(&stream).contains("no whole request came in time"));
    assert_healthy(&served);
}

#[test]
fn a_request_in_single_bytes_is_understood() {
    let served = Served::start(Fake::default());
    let mut stream = connect(&served);
    for byte in Request::List.to_line().bytes() {
        stream.write_all(&[byte]).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(answer(&stream), "{\"version\":1,\"response\":{\"devices\":[]}}\n");
}

#[test]
fn ten_megabytes_of_junk_are_not_read() {
    let served = Served::start(Fake::default());
    for byte in [b'x', 0, b'['] {
        let mut stream = connect(&served);
        let error = stream.write_all(&vec![byte; 10 << 20]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset));
        assert!(answer(&stream).contains("longer than 65536 bytes"));
        assert_healthy(&served);
    }
}

#[test]
fn lines_of_junk_are_refused() {
    let served = Served::start(Fake::default());
    for junk in ["\n", "GET / HTTP/1.1\r\n", "{}\n", "null\n", "\u{0}\u{1}\n"] {
        let mut stream = connect(&served);
        stream.write_all(junk.as_bytes()).unwrap();
        assert!(answer(&stream).contains("\"failed\""), "{junk:?}");
    }
    let mut longest = vec![b' '; REQUEST_MAX];
    longest[REQUEST_MAX - 1] = b'\n';
    let mut stream = connect(&served);
    stream.write_all(&longest).unwrap();
    assert!(answer(&stream).contains("not a line of the control protocol"));
    assert_healthy(&served);
}

#[test]
fn clients_that_never_send_do_not_keep_others_out() {
    let served = Served::start(Fake::default());
    let idle: Vec<_> = (0..10 * CLIENTS_MAX).map(|_| connect(&served)).collect();
    for _ in 0..20 {
        assert_healthy(&served);
    }
    assert!(answer(&idle[0]).contains("this one is slow"));
}

#[test]
fn connects_that_are_dropped_at_once_leave_nothing() {
    let served = Served::start(Fake::default());
    for _ in 0..1000 {
        drop(connect(&served));
    }
    assert_healthy(&served);
    let open = fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(open < 600, "{open} descriptors are open");
}

#[test]
fn clients_that_never_read_do_not_keep_others_waiting() {
    let served = Served::start(Fake::default());
    for number in 0..100 {
        served.fake.add_swap(Some(&format!("swap-{number}")), 1 << 30).unwrap();
    }
    let deaf: Vec<_> = (0..CLIENTS_MAX)
        .map(|_| {
            let mut stream = connect(&served);
            stream.write_all(Request::Stats.to_line().as_bytes()).unwrap();
            stream
        })
        .collect();
    assert_healthy(&served);
    drop(deaf);
}

#[test]
fn a_slow_change_does_not_hold_up_questions() {
    let served = Served::start(Fake::slow_to_del(PROMPT));
    let client = Client::new(&served.socket);
    client.add_swap(Some("a"), 1 << 30).unwrap();
    let slow = client.clone();
    let removal = thread::spawn(move || slow.del("a"));
    thread::sleep(Duration::from_millis(100));
    let asked = Instant::now();
    assert_eq!(client.list().unwrap().len(), 1);
    client.stats().unwrap();
    assert!(asked.elapsed() < PROMPT / 2, "{:?}", asked.elapsed());
    removal.join().unwrap().unwrap();
    assert!(client.list().unwrap().is_empty());
}

#[test]
fn more_changes_than_can_wait_are_refused() {
    let served = Served::start(Fake::slow_to_del(Duration::from_millis(50)));
    let threads: Vec<_> = (0..4 * CLIENTS_MAX)
        .map(|_| {
            let client = Client::new(&served.socket);
            thread::spawn(move || client.del("nosuch").unwrap_err())
        })
        .collect();
    let failures: Vec<Failure> = threads.into_iter().map(|it| it.join().unwrap()).collect();
    let carried_out = failures.iter().filter(|it| it.code == Exit::NotFound).count();
    assert!(carried_out >= CLIENTS_MAX, "{failures:?}");
    assert!(
        failures.iter().all(|it| it.code == Exit::NotFound || it.message.contains("try again")),
        "{failures:?}"
    );
}

#[test]
fn the_server_trusts_no_client() {
    let served = Served::start(Fake::default());
    let client = Client::new(&served.socket);
    for (name, bytes, code) in [
        (Some("../etc"), 1 << 30, Exit::Usage),
        (Some("total"), 1 << 30, Exit::Usage),
        (None, 0, Exit::Size),
        (None, 4097 * 100, Exit::Size),
        (None, u64::MAX, Exit::Size),
    ] {
        assert_eq!(client.add_swap(name, bytes).unwrap_err().code, code, "{name:?} {bytes}");
    }
    assert_eq!(client.del("a\nb").unwrap_err().code, Exit::Usage);
    for (path, bytes, code) in [
        ("backing", None, Exit::Usage),
        ("", None, Exit::Usage),
        ("/a", Some(0), Exit::Size),
        ("/a", Some(u64::MAX), Exit::Size),
    ] {
        let spec = BackingSpec { path: path.into(), bytes, encrypt: true, force: false };
        assert_eq!(client.set_backing(&spec).unwrap_err().code, code, "{path} {bytes:?}");
    }
    assert!(client.list().unwrap().is_empty());
}

#[test]
fn a_second_daemon_is_refused_and_the_first_goes_on() {
    let mut served = Served::start(Fake::default());
    let failure = Failure::from(Listener::bind(&served.socket, "--control").unwrap_err());
    assert_eq!(failure.code, Exit::Running);
    let pid = format!("(pid {})", std::process::id());
    assert!(failure.message.contains(&pid), "{failure}");
    assert_healthy(&served);
    served.stop();
    assert!(!served.socket.exists());
}

#[test]
fn a_stop_answers_what_has_begun() {
    let mut served = Served::start(Fake::slow_to_del(Duration::from_secs(2)));
    let client = Client::new(&served.socket);
    client.add_swap(Some("a"), 1 << 30).unwrap();
    let removal = thread::spawn(move || client.del("a"));
    let _idle = connect(&served);
    thread::sleep(Duration::from_secs(1));
    served.stop();
    removal.join().unwrap().unwrap();
    assert_fails(&served.tmem(&["list"]), Exit::NoDaemon, "no tmem daemon answers");
}

#[test]
fn other_users_are_refused() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED other_users_are_refused: only root can try as another user");
        return;
    }
    let served = Served::start(Fake::default());
    let home = served.socket.parent().unwrap();
    fs::set_permissions(home, fs::Permissions::from_mode(0o755)).unwrap();
    let binary = home.join("tmem");
    // By a process of its own: a child that another test starts meanwhile would have it open for writing as well.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_tmem")).arg(&binary).status();
    assert!(copied.unwrap().success());
    let as_nobody = || {
        let mut command = Command::new(&binary);
        command.uid(65534).gid(65534).arg("list").arg("--control").arg(&served.socket);
        command.output().unwrap()
    };
    assert_fails(&as_nobody(), Exit::Permission, "not allowed");
    // Not even a socket that somebody has opened to all lets them in.
    fs::set_permissions(&served.socket, fs::Permissions::from_mode(0o666)).unwrap();
    assert_fails(&as_nobody(), Exit::Permission, "only root and the daemon's own user");
    assert_eq!(stdout(&served.tmem(&["list", "--noheadings"])), "");
}
