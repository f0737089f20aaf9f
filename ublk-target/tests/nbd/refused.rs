//! Requests that make no sense: each is answered with its error, in the form that the client chose,
//! and the next one is understood.

use crate::client::{Chunk, Client};
use crate::fuzzing::spec::*;
use crate::served::{ROOM, SWAP0, Served};

const END: u64 = SWAP0.1 * 4096;

/// Checks that the server reads requests where they begin.
#[track_caller]
fn assert_in_step(client: &mut Client) {
    assert_eq!(client.write(0, b"in step"), 0);
    assert_eq!(client.read(0, 7), Ok(b"in step".to_vec()));
}

fn visitors(served: &Served) -> [Client; 2] {
    [Client::simple(served, "swap0"), Client::structured(served, "swap0")]
}

#[test]
fn another_magic_ends_the_connection() {
    let served = Served::start();
    let mut wrong = request(0, CMD_READ, 1, 0, 512);
    wrong[3] ^= 1;
    let option = option(OPT_ABORT, &[0; 20]);
    for junk in [wrong, option, vec![0; 28], vec![0xff; 10_000], b"hello".repeat(10)] {
        for mut client in visitors(&served) {
            client.send(&junk);
            client.assert_ended();
        }
    }
}

#[test]
fn unknown_commands_are_invalid() {
    let served = Served::start();
    for mut client in visitors(&served) {
        for command in [8, 9, 0x100, 0x7fff, 0x8001, 0xffff] {
            assert_eq!(client.plain(command, 0, 0, 512), EINVAL, "{command}");
            assert_eq!(client.plain(command, 0, u64::MAX, u32::MAX), EINVAL, "{command}");
        }
        assert_in_step(&mut client);
    }
}

#[test]
fn flags_that_a_command_does_not_have_are_invalid() {
    let served = Served::start();
    for mut client in visitors(&served) {
        for (command, good) in [
            (CMD_WRITE, FLAG_FUA),
            (CMD_FLUSH, FLAG_FUA),
            (CMD_TRIM, FLAG_FUA),
            (CMD_CACHE, FLAG_FUA),
            (CMD_WRITE_ZEROES, FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO),
        ] {
            for flag in (0..16).map(|bit| 1 << bit).filter(|flag| flag & good == 0) {
                let cookie = client.request(command, flag, 0, 16);
                if command == CMD_WRITE {
                    client.send(&request(0, CMD_DISC, 0, 0, 0)[..16]);
                }
                assert_eq!(client.error_of(cookie), EINVAL, "{command} {flag}");
            }
        }
        for flag in (0..16).map(|bit| 1 << bit).filter(|flag| flag & (FLAG_DF | FLAG_FUA) == 0) {
            assert_eq!(client.read_with(flag, 0, 16), Err(EINVAL), "{flag}");
        }
        assert_in_step(&mut client);
    }
}

#[test]
fn what_was_not_offered_is_invalid() {
    let served = Served::with(&[("swap0", SWAP0.1, false)], ROOM, 1);
    for mut client in visitors(&served) {
        assert_eq!(client.plain(CMD_FLUSH, 0, 0, 0), EINVAL);
        for command in [CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES] {
            assert_eq!(client.plain(command, FLAG_FUA, 0, 4096), EINVAL);
        }
        let cookie = client.request(CMD_WRITE, FLAG_FUA, 4096, 100);
        client.send(&[1; 100]);
        assert_eq!(client.error_of(cookie), EINVAL);
        assert_eq!(client.read_with(FLAG_FUA, 4096, 100), Err(EINVAL));
        assert_eq!(client.read(4096, 100), Ok(vec![0; 100]));
        assert_in_step(&mut client);
    }
    let mut client = Client::simple(&served, "swap0");
    assert_eq!(client.read_with(FLAG_DF, 0, 100), Err(EINVAL));
    assert_eq!(client.plain(CMD_BLOCK_STATUS, 0, 0, 4096), EINVAL);
    assert_in_step(&mut client);
}

#[test]
fn nothing_beyond_the_end_is_served() {
    let served = Served::start();
    let beyond = [(END, 1), (END - 512, 513), (END + 4096, 4096), (u64::MAX, 1), (1 << 63, 512)];
    for mut client in visitors(&served) {
        for (offset, length) in beyond {
            assert_eq!(client.read(offset, length), Err(EINVAL));
            assert_eq!(client.plain(CMD_TRIM, 0, offset, length), EINVAL);
            assert_eq!(client.plain(CMD_CACHE, 0, offset, length), EINVAL);
            assert_eq!(client.plain(CMD_WRITE_ZEROES, 0, offset, length), ENOSPC);
            assert_eq!(client.write(offset, &vec![7; length as usize]), ENOSPC);
            assert_in_step(&mut client);
        }
        for command in [CMD_TRIM, CMD_WRITE_ZEROES] {
            assert_ne!(client.plain(command, 0, 1, u32::MAX), 0);
        }
        assert_eq!(client.read(END - 512, 512), Ok(vec![0; 512]));
    }
    let mut client = Client::structured(&served, "swap0");
    for (offset, length) in beyond {
        assert_eq!(client.block_status(0, offset, length), Err(EINVAL));
    }
    assert_in_step(&mut client);
}

#[test]
fn the_data_of_a_refused_write_is_never_taken_for_requests() {
    let served = Served::start();
    let trap = request(0, CMD_DISC, 0, 0, 0).repeat(10_000);
    for mut client in visitors(&served) {
        assert_eq!(client.write(END - 1, &trap), ENOSPC);
        assert_eq!(client.write(u64::MAX, &trap[..1]), ENOSPC);
        let cookie = client.request(CMD_WRITE, 1 << 15, 0, trap.len() as u32);
        client.send(&trap);
        assert_eq!(client.error_of(cookie), EINVAL);
        assert_in_step(&mut client);
    }
}

#[test]
fn a_write_longer_than_was_agreed_upon_ends_the_connection() {
    let served = Served::start();
    for length in [DATA_BYTES_MAX + 1, 1 << 31, u32::MAX] {
        for offset in [0, END] {
            for mut client in visitors(&served) {
                client.request(CMD_WRITE, 0, offset, length);
                client.assert_ended();
            }
        }
    }
}

#[test]
fn a_read_longer_than_was_agreed_upon_is_invalid() {
    let served = Served::with(&[("swap0", 2 << 20, true)], ROOM, 1);
    for mut client in visitors(&served) {
        for length in [DATA_BYTES_MAX + 1, 1 << 31, u32::MAX] {
            assert_eq!(client.read(0, length), Err(EINVAL));
        }
        // What has no data may be as long as can be said.
        for command in [CMD_CACHE, CMD_TRIM, CMD_WRITE_ZEROES] {
            assert_eq!(client.plain(command, 0, 4097, u32::MAX - 4), 0);
        }
        assert_in_step(&mut client);
    }
}

/// Where replies are structured, those of a read always are, and those of commands without data are
/// as short as can be.
#[test]
fn errors_come_in_the_form_that_was_agreed_upon() {
    let served = Served::start();
    let mut client = Client::structured(&served, "swap0");
    for (command, flags, offset) in [
        (CMD_READ, 0, END),
        (CMD_READ, FLAG_NO_HOLE, 0),
        (CMD_BLOCK_STATUS, 0, END),
        (CMD_BLOCK_STATUS, FLAG_DF, 0),
    ] {
        let cookie = client.request(command, flags, offset, 1);
        let Chunk { flags, kind, payload } = client.chunk(cookie);
        assert_eq!((flags, kind), (CHUNK_DONE, CHUNK_ERROR));
        assert_eq!(payload, [&be32(EINVAL)[..], &be16(0)].concat());
    }
    assert_eq!(client.plain(99, 0, 0, 0), EINVAL);
    assert_eq!(client.write(END, b"x"), ENOSPC);
}
