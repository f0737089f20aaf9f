//! Pages that are lost, because the pool was full: nobody takes anything else for what was there.

use crate::client::Client;
use crate::fuzzing::spec::*;
use crate::served::{SWAP0, Served, noise};

const PAGE: u64 = 4096;
const PAGES: u64 = SWAP0.1;

/// A server whose pool is full, and the first page for which there was no room. All before it are
/// noise, and all after it are zeros but the last, which is a text.
fn filled() -> (Served, u64) {
    let served = Served::start();
    let mut client = Client::simple(&served, "swap0");
    assert_eq!(client.write((PAGES - 1) * PAGE, b"the last page"), 0);
    for page in 0..PAGES - 1 {
        match client.write(page * PAGE, &noise(4096, page)) {
            0 => {}
            error => {
                assert_eq!(error, ENOSPC);
                assert!(page > 40, "the pool was full at page {page}");
                return (served, page);
            }
        }
    }
    panic!("the pool takes more than it has room for");
}

fn visitors(served: &Served) -> [Client; 2] {
    [Client::simple(served, "swap0"), Client::structured(served, "swap0")]
}

#[track_caller]
fn assert_others_are_there(client: &mut Client, lost: u64) {
    for page in [0, lost / 2, lost - 1] {
        assert!(client.read(page * PAGE, 4096).unwrap() == noise(4096, page), "page {page}");
    }
    assert_eq!(client.read((lost + 1) * PAGE, 4096), Ok(vec![0; 4096]));
    assert_eq!(client.read((PAGES - 1) * PAGE, 13), Ok(b"the last page".to_vec()));
}

#[test]
fn a_lost_page_is_an_error_and_the_others_are_there() {
    let (served, lost) = filled();
    let at = lost * PAGE;
    for mut client in visitors(&served) {
        for (offset, length) in [
            (at, 4096),
            (at + 4095, 1),
            (at, 1),
            (at - 1, 2),
            (at + 4095, 2),
            // A buffer's worth, more, and more than a megabyte; the lost page first and last.
            (at - 100_000, 131_072),
            (at - 150_000, 200_000),
            (at, 300_000),
            (at - 131_072, 131_073),
            (at - 30 * PAGE, 2 << 20),
            (0, (at + 1) as u32),
            (at + 4095, 2 << 20),
        ] {
            assert_eq!(client.read(offset, length), Err(EIO), "{offset} {length}");
            assert_others_are_there(&mut client, lost);
        }
        let around = client.read(at - 8 * PAGE, 8 * 4096).unwrap();
        assert!(around.chunks(4096).zip(lost - 8..).all(|(it, page)| it == noise(4096, page)));
    }
}

#[test]
fn a_read_in_one_piece_has_no_data_if_any_is_lost() {
    let (served, lost) = filled();
    let at = lost * PAGE;
    let mut client = Client::structured(&served, "swap0");
    for (offset, length) in [(at, 4096), (at - 150_000, 200_000), (at - 30 * PAGE, 2 << 20)] {
        let cookie = client.request(CMD_READ, FLAG_DF, offset, length);
        let chunk = client.chunk(cookie);
        assert_eq!((chunk.flags, chunk.kind), (CHUNK_DONE, CHUNK_ERROR));
        assert_eq!(chunk.payload, [&be32(EIO)[..], &be16(0)].concat());
        assert_others_are_there(&mut client, lost);
    }
    let read = client.read_with(FLAG_DF, at - 40 * PAGE, 40 * 4096).unwrap();
    assert!(read.chunks(4096).zip(lost - 40..).all(|(it, page)| it == noise(4096, page)));
}

#[test]
fn many_requests_around_a_lost_page_are_answered_in_order() {
    let (served, lost) = filled();
    for mut client in visitors(&served) {
        let offsets = [lost - 1, lost, lost + 1, lost].map(|page| page * PAGE);
        let reads = (0..40).map(|cookie: u64| (cookie, offsets[cookie as usize % 4]));
        let all = reads.clone().map(|(cookie, at)| request(0, CMD_READ, cookie, at, 4096));
        client.send(&all.collect::<Vec<_>>().concat());
        for (cookie, at) in reads {
            let result = client.data_of(cookie, at, 4096);
            assert_eq!(result.is_err(), at == lost * PAGE);
        }
    }
}

#[test]
fn a_lost_page_is_no_hole() {
    let (served, lost) = filled();
    let mut client = Client::structured(&served, "swap0");
    assert_eq!(client.block_status(0, lost * PAGE, 4096), Ok(vec![(4096, 0)]));
    let after = vec![(4096, 0), (4096, STATE_HOLE | STATE_ZERO)];
    assert_eq!(client.block_status(0, lost * PAGE, 8192), Ok(after));
}

#[test]
fn a_lost_page_is_whole_again_once_it_is_written_or_forgotten() {
    let (served, lost) = filled();
    let at = lost * PAGE;
    for mut client in visitors(&served) {
        // A part of it would leave the rest in the dark.
        assert_eq!(client.write(at + 10, b"patch"), EIO);
        assert_eq!(client.plain(CMD_WRITE_ZEROES, FLAG_NO_HOLE, at + 10, 5), EIO);
        assert_eq!(client.read(at, 4096), Err(EIO));
        assert_eq!(client.plain(CMD_TRIM, 0, at + 1, 4095), 0);
        assert_eq!(client.read(at, 4096), Err(EIO));

        assert_eq!(client.write(at, &[7; 4096]), 0);
        assert_eq!(client.read(at, 4096), Ok(vec![7; 4096]));
        assert_eq!(client.write(at, &noise(4096, lost)), ENOSPC);
        assert_eq!(client.read(at, 4096), Err(EIO));
        assert_eq!(client.plain(CMD_TRIM, 0, at, 4096), 0);
        assert_eq!(client.read(at, 4096), Ok(vec![0; 4096]));
        assert_eq!(client.write(at, &noise(4096, lost)), ENOSPC);
    }
}

#[test]
fn a_part_that_finds_no_room_leaves_its_page_as_it_was() {
    let (served, lost) = filled();
    for mut client in visitors(&served) {
        let mut refused = 0;
        for page in 0..lost {
            let patch = noise(2000, page + 1000);
            let mut expected = noise(4096, page);
            match client.write(page * PAGE + 1000, &patch) {
                0 => expected[1000..3000].copy_from_slice(&patch),
                error => {
                    assert_eq!(error, ENOSPC);
                    refused += 1;
                }
            }
            assert!(client.read(page * PAGE, 4096).unwrap() == expected, "page {page}");
            assert_eq!(client.write(page * PAGE, &noise(4096, page)), 0);
        }
        assert!(refused > 0, "a full pool takes what it has no room for");
    }
}

/// None of its pages reads as what it was before: a client that was told of an error could not
/// tell which are new.
#[test]
fn a_long_write_that_fails_leaves_nothing_old_behind_it() {
    let (served, lost) = filled();
    for mut client in visitors(&served) {
        let first = lost - 2;
        let old = [3; 8 * 4096];
        assert_eq!(client.write(lost * PAGE, &old), 0);
        let new = noise(10 * 4096, 77);
        assert_eq!(client.write(first * PAGE, &new), ENOSPC);
        let mut lost_pages = 0;
        for (page, new) in (first..).zip(new.chunks(4096)) {
            match client.read(page * PAGE, 4096) {
                Ok(found) => assert!(found == new, "page {page} is not what was written"),
                Err(error) => {
                    assert_eq!(error, EIO);
                    lost_pages += 1;
                }
            }
        }
        assert!(lost_pages > 0, "a write failed, and nothing was lost");
        assert_eq!(client.plain(CMD_TRIM, 0, first * PAGE, 10 * 4096), 0);
        for page in [first, first + 1] {
            assert_eq!(client.write(page * PAGE, &noise(4096, page)), 0);
        }
    }
}
