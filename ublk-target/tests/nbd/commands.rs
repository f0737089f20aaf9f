//! What each command does, with simple replies and with structured ones.

use crate::client::{Chunk, Client};
use crate::fuzzing::spec::*;
use crate::served::{Served, noise};

fn visitors(served: &Served) -> [Client; 2] {
    [Client::simple(served, "swap0"), Client::structured(served, "swap0")]
}

#[test]
fn what_was_written_is_read_and_the_rest_is_zeros() {
    let served = Served::start();
    for mut client in visitors(&served) {
        for (offset, bytes) in [(0, 512), (4096, 4096), (70_001, 1), (81_919, 130_000)] {
            let data = noise(bytes, offset);
            assert_eq!(client.write(offset, &data), 0);
            assert!(client.read(offset, bytes as u32).unwrap() == data);
            let around = client.read(offset.saturating_sub(100), bytes as u32 + 200).unwrap();
            let start = offset.min(100) as usize;
            assert!(around[start..start + bytes] == data);
            assert!(around[..start].iter().chain(&around[start + bytes..]).all(|it| *it == 0));
            assert_eq!(client.plain(CMD_WRITE_ZEROES, 0, offset, bytes as u32), 0);
            assert_eq!(client.read(offset, bytes as u32), Ok(vec![0; bytes]));
        }
    }
}

#[test]
fn a_write_is_seen_by_everybody_once_it_is_answered() {
    let served = Served::start();
    let [mut one, mut other] = visitors(&served);
    for round in 0..200 {
        let data = noise(700, round);
        assert_eq!(one.write(round * 300, &data), 0);
        assert!(other.read(round * 300, 700).unwrap() == data);
        assert_eq!(other.plain(CMD_TRIM, 0, 0, 4 << 20), 0);
        assert_eq!(one.read(round * 300, 700), Ok(vec![0; 700]));
    }
}

#[test]
fn trim_forgets_whole_pages_and_leaves_parts_alone() {
    let served = Served::start();
    for mut client in visitors(&served) {
        let data = noise(5 * 4096, 3);
        assert_eq!(client.write(0, &data), 0);
        assert_eq!(client.plain(CMD_TRIM, 0, 4095, 2 * 4096 + 2), 0);
        let mut expected = data;
        expected[4096..3 * 4096].fill(0);
        assert!(client.read(0, 5 * 4096).unwrap() == expected);
        assert_eq!(client.plain(CMD_TRIM, 0, 0, 5 * 4096), 0);
        assert_eq!(client.read(0, 5 * 4096), Ok(vec![0; 5 * 4096]));
    }
}

#[test]
fn zeroes_are_zeroes_to_the_byte_with_or_without_a_hole() {
    let served = Served::start();
    for mut client in visitors(&served) {
        for flags in [0, FLAG_NO_HOLE, FLAG_FAST_ZERO, FLAG_NO_HOLE | FLAG_FAST_ZERO | FLAG_FUA] {
            let mut data = noise(4 * 4096, 9);
            assert_eq!(client.write(8192, &data), 0);
            assert_eq!(client.plain(CMD_WRITE_ZEROES, flags, 8192 + 4000, 4096 + 97), 0);
            data[4000..4000 + 4096 + 97].fill(0);
            assert!(client.read(8192, 4 * 4096).unwrap() == data, "{flags}");
        }
    }
}

#[test]
fn block_status_tells_holes_from_zeroes_from_data() {
    let served = Served::start();
    let mut client = Client::structured(&served, "swap0");
    let (hole, zero, page) = (STATE_HOLE | STATE_ZERO, STATE_ZERO, 4096);
    assert_eq!(client.block_status(0, 5, 100_000), Ok(vec![(100_000, hole)]));
    assert_eq!(client.write(2 * 4096, &noise(2 * 4096, 1)), 0);
    assert_eq!(client.plain(CMD_WRITE_ZEROES, FLAG_NO_HOLE, 4 * 4096, 4096), 0);
    let all = vec![(2 * page, hole), (2 * page, 0), (page, zero), (3 * page, hole)];
    assert_eq!(client.block_status(0, 0, 8 * page), Ok(all.clone()));
    assert_eq!(client.block_status(FLAG_REQ_ONE, 0, 8 * page), Ok(all[..1].to_vec()));
    assert_eq!(client.block_status(FLAG_REQ_ONE, 2 * 4096 + 1, 8 * page), Ok(vec![(8191, 0)]));
    let cut = vec![(96, hole), (8192, 0), (4, zero)];
    assert_eq!(client.block_status(FLAG_FUA, 2 * 4096 - 96, 96 + 8192 + 4), Ok(cut));
    assert_eq!(client.plain(CMD_TRIM, 0, 0, 8 * page), 0);
    assert_eq!(client.block_status(0, 0, 8 * page), Ok(vec![(8 * page, hole)]));
    assert_eq!(client.block_status(0, 1024 * 4096 - 1, 1), Ok(vec![(1, hole)]));
}

#[test]
fn block_status_of_many_extents_begins_at_the_first() {
    let served = Served::start();
    let mut client = Client::structured(&served, "swap0");
    for page in 0..512 {
        assert_eq!(client.write(page * 8192, b"x"), 0);
    }
    let (mut at, mut replies) = (0, 0);
    while at < 4 << 20 {
        let extents = client.block_status(0, at, (4 << 20) - at as u32).unwrap();
        assert!(extents.len() >= 16, "{} extents", extents.len());
        for (length, state) in extents {
            let expected = if at % 8192 == 0 { 0 } else { STATE_HOLE | STATE_ZERO };
            assert_eq!((length, state), (4096, expected), "at {at}");
            at += u64::from(length);
        }
        replies += 1;
    }
    assert!(replies > 1, "there are more extents than one reply names");
}

#[test]
fn flush_and_cache_have_nothing_to_do() {
    let served = Served::start();
    for mut client in visitors(&served) {
        assert_eq!(client.plain(CMD_FLUSH, 0, 0, 0), 0);
        assert_eq!(client.plain(CMD_FLUSH, FLAG_FUA, 0, 0), 0);
        assert_eq!(client.plain(CMD_CACHE, 0, 4096, 4096), 0);
        assert_eq!(client.plain(CMD_CACHE, 0, 0, 4 << 20), 0);
    }
}

#[test]
fn fua_is_accepted_everywhere() {
    let served = Served::start();
    for mut client in visitors(&served) {
        let cookie = client.request(CMD_WRITE, FLAG_FUA, 9, 3);
        client.send(b"fua");
        assert_eq!(client.error_of(cookie), 0);
        assert_eq!(client.read_with(FLAG_FUA, 9, 3), Ok(b"fua".to_vec()));
        for command in [CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES] {
            assert_eq!(client.plain(command, FLAG_FUA, 0, 4096), 0);
        }
        assert_eq!(client.read(9, 3), Ok(vec![0; 3]));
    }
}

#[test]
fn disconnect_ends_the_connection_after_what_came_before_it() {
    let served = Served::start();
    for flags in [0, FLAG_FUA] {
        for mut client in visitors(&served) {
            let all = [
                request(0, CMD_READ, 1, 0, 200_000),
                request(0, CMD_READ, 2, 0, 1 << 20),
                request(flags, CMD_DISC, 3, 0, 0),
                request(0, CMD_FLUSH, 4, 0, 0),
            ];
            client.send(&all.concat());
            assert!(client.data_of(1, 0, 200_000).is_ok());
            assert!(client.data_of(2, 0, 1 << 20).is_ok());
            client.assert_ended();
        }
    }
}

#[test]
fn nothing_of_no_length_is_done() {
    let served = Served::start();
    let end = served.exports[0].device().bytes();
    for mut client in visitors(&served) {
        for offset in [0, 5, end] {
            assert_eq!(client.write(offset, &[]), 0);
            for command in [CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES] {
                assert_eq!(client.plain(command, 0, offset, 0), 0);
            }
            assert_eq!(client.read(offset, 0), Ok(vec![]));
        }
    }
    let mut client = Client::structured(&served, "swap0");
    let cookie = client.request(CMD_READ, FLAG_DF, 7, 0);
    let expected = Chunk { flags: CHUNK_DONE, kind: CHUNK_NONE, payload: vec![] };
    assert_eq!(client.chunk(cookie), expected);
    assert_eq!(client.block_status(0, 0, 0), Err(EINVAL));
}

#[test]
fn the_last_byte_is_there_and_none_after_it() {
    let served = Served::start();
    let end = served.exports[0].device().bytes();
    for mut client in visitors(&served) {
        assert_eq!(client.write(end - 1, b"z"), 0);
        assert_eq!(client.read(end - 1, 1), Ok(b"z".to_vec()));
        assert_eq!(client.read(end - 1, 2), Err(EINVAL));
        assert_eq!(client.plain(CMD_WRITE_ZEROES, 0, end - 1, 1), 0);
    }
}
