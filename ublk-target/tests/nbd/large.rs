//! The largest requests that there are: 32 MiB in one.

use crate::client::Client;
use crate::fuzzing::spec::*;
use crate::served::Served;

const BYTES: usize = DATA_BYTES_MAX as usize;

/// Pages that take little memory, each different.
fn pages() -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    for (number, page) in (0..).zip(bytes.chunks_exact_mut(4096)) {
        page.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&be64(number << 8 | 1)));
        if number % 16 == 0 {
            page[number as usize % 4096] ^= 0x55;
        }
    }
    bytes
}

#[test]
fn the_largest_write_and_reads_work() {
    let served = Served::with(&[("swap0", 3 * 8192, true)], 8 << 20, 1);
    let pages = pages();
    // Once where pages begin, and once where they do not.
    for offset in [0, (32 << 20) + 333] {
        let mut client = Client::simple(&served, "swap0");
        assert_eq!(client.write(offset, &pages), 0);
        assert!(client.read(offset, DATA_BYTES_MAX).unwrap() == pages);

        let mut client = Client::structured(&served, "swap0");
        assert!(client.read(offset, DATA_BYTES_MAX).unwrap() == pages);
        let cookie = client.request(CMD_READ, FLAG_DF, offset, DATA_BYTES_MAX);
        let (data, pieces) = client.data_of(cookie, offset, DATA_BYTES_MAX).unwrap();
        assert!(data == pages);
        assert_eq!(pieces, 1);
        assert_eq!(client.plain(CMD_WRITE_ZEROES, 0, offset, DATA_BYTES_MAX), 0);
        assert!(client.read(offset, DATA_BYTES_MAX).unwrap().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn the_largest_write_that_is_refused_is_taken_to_its_end() {
    let served = Served::start();
    for mut client in [Client::simple(&served, "swap0"), Client::structured(&served, "swap0")] {
        assert_eq!(client.write(4096, &vec![0x25; BYTES]), ENOSPC);
        assert_eq!(client.read(4096, 512), Ok(vec![0; 512]));
    }
}

#[test]
fn a_disk_of_64_gigabytes_is_zeroed_and_asked_about_in_bounded_pieces() {
    let served = Served::with(&[("swap0", 1 << 24, true)], 8 << 20, 1);
    let mut client = Client::structured(&served, "swap0");
    let end = 64 << 30;
    assert_eq!(client.write(end - 5, b"end"), 0);
    for command in [CMD_TRIM, CMD_WRITE_ZEROES] {
        let longest = u32::MAX - 4095;
        assert_eq!(client.plain(command, 0, end - u64::from(longest), longest), 0);
        assert_eq!(client.read(end - 5, 5), Ok(vec![0; 5]));
    }
    let mut at = 0;
    while at < end {
        let length = (end - at).min(1 << 31) as u32;
        let extents = client.block_status(0, at, length).unwrap();
        assert!(extents.iter().all(|(length, _)| *length > 0));
        at += extents.iter().map(|(length, _)| u64::from(*length)).sum::<u64>();
    }
    assert_eq!(at, end);
}
