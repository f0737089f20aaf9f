//! The commands as a user meets them: the real binary, against a daemon without devices.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::fake::{Fake, Served, assert_fails, stdout, tmem};
use serde_json::Value;
use tmem_ublk_target::exit::{self, Exit};
use tmem_ublk_target::process;

/// A socket that nobody serves.
const NOWHERE: &str = "/nonexistent/control.sock";

#[test]
fn devices_come_and_go() {
    let served = Served::start(Fake::default());
    let added = served.tmem(&["add", "swap", "--size", "1.5G", "--name", "fast"]);
    assert_eq!(stdout(&added), "fast /dev/ublkb0 1610612736\n");
    assert_eq!(
        stdout(&served.tmem(&["add", "swap", "--size", "4M"])),
        "swap1 /dev/ublkb1 4194304\n"
    );
    assert_eq!(
        stdout(&served.tmem(&["list"])),
        "NAME  TYPE PATH        DISKSIZE MOUNTPOINT\n\
         fast  swap /dev/ublkb0     1.5G [SWAP]\n\
         swap1 swap /dev/ublkb1       4M [SWAP]\n"
    );
    assert_eq!(stdout(&served.tmem(&["del", "fast"])), "");
    assert_eq!(
        stdout(&served.tmem(&["list", "-n", "-o", "name,disksize", "-b"])),
        "swap1 4194304\n"
    );
}

#[test]
fn refusals_have_codes_of_their_own() {
    let served = Served::start(Fake::default());
    assert!(served.tmem(&["add", "swap", "--size", "4M", "--name", "busy"]).status.success());
    for (words, exit, reason) in [
        (&["add", "swap", "--size", "4M", "--name", "busy"][..], Exit::NameTaken, "exists"),
        (&["del", "busy"], Exit::InUse, "mounted by pid 1"),
        (&["del", "nosuch"], Exit::NotFound, "no device 'nosuch'"),
        (&["add", "swap", "--size", "0"], Exit::Size, "must have 40960 to 17592186044416"),
        (&["add", "swap", "--size", "1048577"], Exit::Size, "use 1048576"),
        (&["add", "swap", "--size", "17T"], Exit::Size, "it must have"),
        (&["set", "pool-limit=4K"], Exit::Size, "too low"),
        (&["set", "writeback-low=8%"], Exit::Size, "where it begins must be less"),
        (&["set", "writeback-high=51%"], Exit::Size, "use 50% or less"),
        (&["set", "writeback-rate=1K"], Exit::Size, "use 1048576 or more"),
        (&["set", "writeback-daily=1M"], Exit::Size, "use 67108864 or more"),
        (&["set", "writeback-age=0"], Exit::Size, "use 1 or more"),
        (&["set", "backing=/a,size=1M"], Exit::Size, "1048576 bytes is out of bounds"),
        (&["set", "backing=/dev/foreign"], Exit::Foreign, "--force"),
        (&["set", "pool-limit=1G", "--force"], Exit::Usage, "about a backing file"),
        (&["list", "-o", "NAME,SIZE"], Exit::Usage, "there is no column 'SIZE'"),
        (&["stats", "-o", "SIZE"], Exit::Usage, "NAME,PATH,DISKSIZE,DATA"),
    ] {
        assert_fails(&served.tmem(words), exit, reason);
    }
}

#[test]
fn wrong_words_are_refused_in_one_line() {
    let nowhere = Path::new(NOWHERE);
    for (words, reason) in [
        (&[][..], "tmem"),
        (&["frobnicate"], "unrecognized subcommand 'frobnicate'"),
        (&["add", "swap"], "--size"),
        (&["add", "swap", "--size", "4X"], "'4X' is not a size"),
        (&["add", "swap", "--size", "99999999999999E"], "too large"),
        (&["add", "swap", "--size", "-1"], "unexpected argument"),
        (&["add", "cache", "--size", "1G"], "cache"),
        (&["set", "colour=blue"], "there is no setting 'colour': these can be set: pool-limit"),
        (&["set", "writeback-low=6"], "'6' is not a share of the pool limit"),
        (&["set", "writeback-age=soon"], "'soon' is not an age"),
        (&["set", "writeback-rate=5%"], "'5%' is no amount of data"),
        (&["set", "backing=tmem.log"], "write one that begins with '/'"),
        (&["set", "backing=/a,size=4X"], "'4X' is not a size"),
        (&["del", "a b"], "cannot name a device"),
        (&["list", "--json", "--raw"], "cannot be used with"),
    ] {
        assert_fails(&tmem(nowhere, words), Exit::Usage, reason);
    }
}

#[test]
fn without_a_daemon_clients_say_so() {
    let home = tempfile::tempdir().unwrap();
    let stale = home.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    for socket in [Path::new(NOWHERE), &stale] {
        for words in [&["list"][..], &["stats"], &["del", "a"], &["set", "pool-limit=1G"]] {
            assert_fails(&tmem(socket, words), Exit::NoDaemon, "start one with 'tmem run'");
        }
    }
}

#[test]
fn stats_as_table_and_as_json() {
    let served = Served::start(Fake::default());
    assert!(served.tmem(&["add", "swap", "--size", "1G"]).status.success());
    let table = served.tmem(&["stats"]);
    let table = stdout(&table);
    assert!(table.starts_with("NAME  DISKSIZE DATA COMPR TOTAL COMP-RATIO"), "{table}");
    assert!(table.contains("\nswap0       1G   3M    1M    1M       3.00"), "{table}");
    assert!(table.contains("\ntotal"), "{table}");
    let json: Value = serde_json::from_str(stdout(&served.tmem(&["stats", "--json"]))).unwrap();
    assert_eq!(json["version"], 1);
    assert_eq!(json["devices"][0]["orig_data_size"], 3 << 20);
    assert_eq!(json["total"]["mem_limit"], 1 << 30);
}

#[test]
fn settings_are_confirmed() {
    let served = Served::start(Fake::default());
    for (words, line) in [
        (&["pool-limit=2G"][..], "pool-limit=2147483648\n"),
        (&["writeback-high=10%"], "writeback-high=10%\n"),
        (&["writeback-low=8.5%"], "writeback-low=8.5%\n"),
        (&["writeback-rate=20M"], "writeback-rate=20971520\n"),
        (&["writeback-rate=none"], "writeback-rate=none\n"),
        (&["writeback-daily=100G"], "writeback-daily=107374182400\n"),
        (&["writeback-age=2h"], "writeback-age=7200\n"),
        (&["writeback-keep=yes"], "writeback-keep=yes\n"),
        (&["backing=/dev/sdb"], "backing=/dev/sdb,size=1073741824\n"),
        (&["backing=/a,b,size=64M"], "backing=/a,b,size=67108864\n"),
        (&["backing=/dev/foreign", "--force"], "backing=/dev/foreign,size=1073741824\n"),
    ] {
        let words: Vec<_> = ["set"].iter().chain(words).copied().collect();
        assert_eq!(stdout(&served.tmem(&words)), line);
    }
}

#[test]
fn a_backing_file_is_told_of() {
    let served = Served::start(Fake::default());
    let json =
        || -> Value { serde_json::from_str(stdout(&served.tmem(&["stats", "--json"]))).unwrap() };
    assert!(json()["total"]["backing_path"].is_null());
    assert!(served.tmem(&["set", "backing=/dev/sdb"]).status.success());
    assert_eq!(json()["total"]["backing_path"], "/dev/sdb");
    let table = served.tmem(&["stats"]);
    assert!(stdout(&table).contains("\nbacking: /dev/sdb (ok): "), "{}", stdout(&table));
    let columns = served.tmem(&["stats", "-n", "-o", "BACKED,BD-READS,BD-WRITES"]);
    assert_eq!(stdout(&columns), "0 0 0\n");
}

#[test]
fn help_documents_exit_codes_and_columns() {
    let nowhere = Path::new(NOWHERE);
    assert!(stdout(&tmem(nowhere, &["--help"])).contains(&exit::table()));
    assert!(stdout(&tmem(nowhere, &["stats", "--help"])).contains("COMP-RATIO  DATA/TOTAL"));
    assert!(stdout(&tmem(nowhere, &["set", "--help"])).contains("\n  writeback-low=PERCENT "));
    assert!(stdout(&tmem(nowhere, &["--version"])).starts_with("tmem "));
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let served = Served::start(Fake::default());
    let mut command = Command::new(env!("CARGO_BIN_EXE_tmem"));
    command.arg("list").arg("--control").arg(&served.socket);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn run_refuses_what_cannot_work_before_it_starts() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("tmem.toml");
    std::fs::write(&file, "swapon = true\nspeed = 'fast'\n").unwrap();
    let file = file.to_str().unwrap();
    let socket = home.path().join("control.sock");
    for (words, exit, reason) in [
        (&["run", "--swap", "0"][..], Exit::Size, "it must have"),
        (&["run", "--swap", "1048577"], Exit::Size, "whole pages of 4096"),
        (&["run", "--swap", "17T"], Exit::Size, "it must have"),
        (&["run", "--swap", "1G,name=a", "--swap", "1G,name=a"], Exit::NameTaken, "'a'"),
        (&["run", "--pool-limit", "0"], Exit::Size, "out of bounds: use "),
        (&["run", "--pool-limit", "101%"], Exit::Size, "out of bounds: use "),
        (&["run", "--backing", "/a,size=1M"], Exit::Size, "out of bounds: use "),
        (&["run", "--backing", "a"], Exit::Usage, "begins with '/'"),
        (&["run", "--force"], Exit::Usage, "--backing"),
        (&["run", "--config", file], Exit::Usage, "tmem.toml: line 2: 'speed'"),
        (&["run", "--config", "/nonexistent"], Exit::Usage, "/nonexistent"),
    ] {
        assert_fails(&tmem(&socket, words), exit, reason);
    }
    assert!(!socket.exists());
}

/// What the daemon starts is started by way of our own binary, from threads that block all signals.
#[test]
fn a_program_that_we_become_blocks_no_signals() {
    let become_program = |args: &'static [&str]| {
        let start = move || {
            let mut tmem = Command::new(env!("CARGO_BIN_EXE_tmem"));
            tmem.arg(process::BECOME_PROGRAM).args(args).output().unwrap()
        };
        process::spawn("tmem-test".into(), start).unwrap().join().unwrap()
    };
    let output = become_program(&["/bin/grep", "SigBlk", "/proc/self/status"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "SigBlk:\t0000000000000000\n");
    for wrong in [&["/nonexistent/program"] as &[_], &[]] {
        let output = become_program(wrong);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("cannot be run: "));
    }
}
