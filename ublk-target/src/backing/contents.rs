//! What is in a file before it becomes the backing file, and what says afterwards that it is one.
//!
//! ```text
//! 0                    1 MiB                            the last MiB
//! +--------+----------+---------------- - - -+ - - - - +---------+
//! | header | nothing  | the engine's log     | less    | nothing |
//! +--------+----------+---------------- - - -+ - - - - +---------+
//! ```
//!
//! File systems, RAID and partition tables have their marks in the first and in the last MiB: of those at the end there are
//! many (RAID of metadata 0.90 and 1.0, DDF, that of mainboards, the second copy of a GPT). So a file that
//! has nothing there is taken for an empty one, and of one that is overwritten these parts are erased. And nothing of ours
//! but the header is there ever: whatever else is, somebody has put it there since, and whoever that was the file is his.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rapidhash::v3::rapidhash_v3;
use tmem::PAGE_SIZE;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes in front of the log.
pub const HEADER_BYTES: u64 = 1 << 20;

/// Bytes behind the log, at least.
pub const END_BYTES: u64 = MARKS_BYTES;

/// Bytes at each end of a file where others have their marks.
const MARKS_BYTES: u64 = 1 << 20;

const _: () = assert!(HEADER_BYTES >= MARKS_BYTES && END_BYTES >= MARKS_BYTES);

const PAGE_BYTES: u64 = PAGE_SIZE as u64;

const MAGIC: [u8; 8] = *b"tmemlog\0";
const VERSION: u32 = 2;

/// The first page of a backing file. Where magic and checksum are is for every version the same.
#[repr(C)]
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout)]
struct Header {
    magic: [u8; 8],
    version: U32,
    reserved: U32,
    /// Where the log begins, and how long it is, in bytes.
    log_start: U64,
    log_bytes: U64,
    nothing: [u8; PAGE_SIZE - 40],
    /// Of all bytes before it.
    checksum: U64,
}

const _: () = assert!(size_of::<Header>() == PAGE_SIZE);

/// Whose a file's contents are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Contents {
    /// An earlier daemon's.
    Ours,
    /// Nobody's: nothing but zeros where it was looked.
    Blank,
    /// Somebody's.
    Foreign,
}

/// Looks at a file of `bytes` bytes, by direct I/O.
pub fn examine(file: &File, bytes: u64) -> io::Result<Contents> {
    let mut memory = Aligned::zeros(MARKS_BYTES + PAGE_BYTES);
    let memory = memory.bytes();
    let head = read(file, 0, bytes.min(MARKS_BYTES), memory)?;
    // Some leave the first page as it is (RAID members of metadata 1.2 do, and caches), so that it says nothing of what
    // came after us.
    let (is_ours, rest) = if is_header(head) { (true, &head[PAGE_SIZE..]) } else { (false, head) };
    if !is_zero(rest) {
        return Ok(Contents::Foreign);
    }
    let tail = tail_start(bytes);
    if !is_zero(read(file, tail, bytes - tail, memory)?) {
        return Ok(Contents::Foreign);
    }
    Ok(if is_ours { Contents::Ours } else { Contents::Blank })
}

/// Erases what tells what was in a file of `bytes` bytes, which are whole sectors, lest anybody take it for
/// that again.
pub fn erase(file: &File, bytes: u64) -> io::Result<()> {
    let mut memory = Aligned::zeros(MARKS_BYTES + PAGE_BYTES);
    let zeros = memory.bytes();
    file.write_all_at(&zeros[..MARKS_BYTES as usize], 0)?;
    let tail = tail_start(bytes);
    file.write_all_at(&zeros[..(bytes - tail) as usize], tail)
}

/// Writes the header of a file whose log has so many bytes, and waits until it is there.
pub fn write_header(file: &File, log_bytes: u64) -> io::Result<()> {
    let mut header = Header {
        magic: MAGIC,
        version: VERSION.into(),
        reserved: 0.into(),
        log_start: HEADER_BYTES.into(),
        log_bytes: log_bytes.into(),
        nothing: [0; _],
        checksum: 0.into(),
    };
    header.checksum = checksum(header.as_bytes()).into();
    let mut memory = Aligned::zeros(PAGE_BYTES);
    memory.bytes().copy_from_slice(header.as_bytes());
    file.write_all_at(memory.bytes(), 0)?;
    file.sync_data()
}

/// Whether a file begins with a header, of whichever version.
fn is_header(head: &[u8]) -> bool {
    let Ok((header, _)) = Header::ref_from_prefix(head) else { return false };
    header.magic == MAGIC && header.checksum == checksum(header.as_bytes())
}

/// The checksum of a header, whatever it has for one.
fn checksum(header: &[u8]) -> u64 {
    rapidhash_v3(&header[..PAGE_SIZE - size_of::<U64>()])
}

/// Where the last MiB begins, and less than a page before it.
fn tail_start(bytes: u64) -> u64 {
    let start = bytes.saturating_sub(MARKS_BYTES);
    start - start % PAGE_BYTES
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Reads so many bytes from `offset` on, all of which the file has, and returns them.
fn read<'a>(file: &File, offset: u64, bytes: u64, memory: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let wanted = bytes as usize;
    let mut length = 0;
    while length < wanted {
        // Direct I/O goes by whole sectors, also where a file ends within one.
        let rest = &mut memory[length..wanted.next_multiple_of(PAGE_SIZE)];
        match file.read_at(rest, offset + length as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(&memory[..wanted])
}

/// Memory that begins with a page, as direct I/O wants it.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    fn zeros(bytes: u64) -> Self {
        let length = bytes as usize;
        let memory = vec![0; length + PAGE_SIZE];
        let start = memory.as_ptr().align_offset(PAGE_SIZE);
        Self { memory, start, length }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_known_by_magic_and_checksum() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        assert_eq!(examine(&file, 4 << 20).unwrap(), Contents::Blank);
        write_header(&file, 3 << 20).unwrap();
        assert_eq!(examine(&file, 4 << 20).unwrap(), Contents::Ours);
        let mut page = [0; PAGE_SIZE];
        file.read_exact_at(&mut page, 0).unwrap();
        assert_eq!(page[..8], *b"tmemlog\0");
        assert_eq!(page[8..16], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[16..32], [0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 48, 0, 0, 0, 0, 0]);
        for at in [0, 8, 24, 2000, PAGE_SIZE - 1] {
            let mut changed = page;
            changed[at] ^= 1;
            assert!(!is_header(&changed), "{at}");
        }
        // A later version may have other fields.
        page[8] = 3;
        page[40] = 7;
        let sum = checksum(&page).to_le_bytes();
        page[PAGE_SIZE - 8..].copy_from_slice(&sum);
        assert!(is_header(&page));
        assert!(!is_header(&page[..PAGE_SIZE - 1]));
    }

    #[test]
    fn marks_are_found_at_both_ends_and_erased() {
        let bytes = (5 << 20) + 512;
        for at in [0, 1024, 4086, (1 << 20) - 1, bytes - (1 << 20), bytes - 512, bytes - 1] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            file.write_all_at(&[1], at).unwrap();
            assert_eq!(examine(&file, bytes).unwrap(), Contents::Foreign, "{at}");
            erase(&file, bytes).unwrap();
            assert_eq!(examine(&file, bytes).unwrap(), Contents::Blank, "{at}");
            assert_eq!(file.metadata().unwrap().len(), bytes);
        }
    }

    #[test]
    fn files_shorter_than_where_marks_are_can_be_looked_at() {
        for bytes in [0, 1, 512, PAGE_BYTES, (1 << 20) - 3] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            assert_eq!(examine(&file, bytes).unwrap(), Contents::Blank, "{bytes}");
        }
    }

    #[test]
    fn memory_is_aligned() {
        for bytes in [PAGE_BYTES, MARKS_BYTES, 3 * PAGE_BYTES] {
            let mut memory = Aligned::zeros(bytes);
            assert_eq!(memory.bytes().as_ptr().align_offset(PAGE_SIZE), 0);
            assert_eq!(memory.bytes().len() as u64, bytes);
        }
    }

    #[test]
    fn somebody_elses_mark_behind_a_header_of_ours_is_found() {
        let bytes: u64 = (20 << 20) + 512;
        let sectors = bytes / 512;
        let marks: [(&str, u64, &[u8]); 8] = [
            ("RAID 1.2, bcache", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
            ("RAID 1.0", ((sectors - 16) & !7) * 512, &[0xfc, 0x4e, 0x2b, 0xa9]),
            ("RAID 0.90", (bytes & !0xffff) - 0x1_0000, &[0xfc, 0x4e, 0x2b, 0xa9]),
            ("DDF", bytes - 512, &[0xde, 0x11, 0xde, 0x11]),
            ("DDF, elsewhere", bytes - 257 * 512, &[0xde, 0x11, 0xde, 0x11]),
            ("IMSM", bytes - 1024, b"Intel Raid ISM Cfg Sig. "),
            ("a GPT's copy", bytes - 512, b"EFI PART"),
            ("ZFS", (bytes & !0x3_ffff) - 0x8_0000 + 0x2_0000, &[0x0c, 0xb1, 0xba]),
        ];
        for (whose, at, mark) in marks {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            let log_bytes = 18 << 20;
            write_header(&file, log_bytes).unwrap();
            // What the log leaves is no mark.
            file.write_all_at(&[7; 4096], HEADER_BYTES).unwrap();
            file.write_all_at(&[7; 4096], HEADER_BYTES + log_bytes - PAGE_BYTES).unwrap();
            assert_eq!(examine(&file, bytes).unwrap(), Contents::Ours);
            file.write_all_at(mark, at).unwrap();
            assert_eq!(examine(&file, bytes).unwrap(), Contents::Foreign, "{whose}");
            erase(&file, bytes).unwrap();
            assert_eq!(examine(&file, bytes).unwrap(), Contents::Blank, "{whose}");
        }
    }
}
