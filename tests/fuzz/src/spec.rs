//! The NBD protocol in numbers and messages, as its specification has them.
//!
//! Written down from `doc/proto.md` of the NetworkBlockDevice project and from nothing of ours, so
//! that a number that is wrong in the server is found. Whatever is tested with these must not use
//! the server's own.

use zerocopy::big_endian::{U16, U32, U64};

pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
pub const OPTION_REPLY_MAGIC: u64 = 0x3_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// What both sides say first: fixed newstyle, and no zeroes.
pub const HANDSHAKE_FLAGS: u16 = 3;
pub const NO_ZEROES: u32 = 2;

pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const OPT_LIST_META_CONTEXT: u32 = 9;
pub const OPT_SET_META_CONTEXT: u32 = 10;

pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
pub const REP_ERR_UNSUP: u32 = 0x8000_0001;
pub const REP_ERR_INVALID: u32 = 0x8000_0003;
pub const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
pub const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

pub const INFO_EXPORT: u16 = 0;
pub const INFO_NAME: u16 = 1;
pub const INFO_DESCRIPTION: u16 = 2;
pub const INFO_BLOCK_SIZE: u16 = 3;

pub const CMD_READ: u16 = 0;
pub const CMD_WRITE: u16 = 1;
pub const CMD_DISC: u16 = 2;
pub const CMD_FLUSH: u16 = 3;
pub const CMD_TRIM: u16 = 4;
pub const CMD_CACHE: u16 = 5;
pub const CMD_WRITE_ZEROES: u16 = 6;
pub const CMD_BLOCK_STATUS: u16 = 7;

pub const FLAG_FUA: u16 = 1;
pub const FLAG_NO_HOLE: u16 = 2;
pub const FLAG_DF: u16 = 4;
pub const FLAG_REQ_ONE: u16 = 8;
pub const FLAG_FAST_ZERO: u16 = 16;

pub const CHUNK_DONE: u16 = 1;
pub const CHUNK_NONE: u16 = 0;
pub const CHUNK_OFFSET_DATA: u16 = 1;
pub const CHUNK_BLOCK_STATUS: u16 = 5;
pub const CHUNK_ERROR: u16 = 0x8001;

pub const STATE_HOLE: u32 = 1;
pub const STATE_ZERO: u32 = 2;

pub const EIO: u32 = 5;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;

pub const BASE_ALLOCATION: &[u8] = b"base:allocation";

/// Bytes of data that a request may have. This and what follows is the server's own choice, which
/// its clients rely on.
pub const DATA_BYTES_MAX: u32 = 32 << 20;
/// Bytes of a known option that are looked at.
pub const OPTION_BYTES_MAX: u32 = 8 << 10;
/// Bytes that an option may have.
pub const SKIP_BYTES_MAX: u32 = 1 << 20;
/// Options that a client may send.
pub const OPTIONS_MAX: u32 = 128;

/// An option with its data.
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = option_header(number, data.len() as u32);
    bytes.extend_from_slice(data);
    bytes
}

/// The header of an option that claims so many bytes of data.
pub fn option_header(number: u32, length: u32) -> Vec<u8> {
    [&be64(IHAVEOPT)[..], &be32(number), &be32(length)].concat()
}

/// A request; what a write has to say comes after it.
pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let start = [&be32(REQUEST_MAGIC)[..], &be16(flags), &be16(command)];
    [&start.concat()[..], &be64(cookie), &be64(offset), &be32(length)].concat()
}

/// A string and, before it, its length.
pub fn string(text: &[u8]) -> Vec<u8> {
    [&be32(text.len() as u32)[..], text].concat()
}

/// The data of INFO and GO.
pub fn inform(name: &[u8], kinds: &[u16]) -> Vec<u8> {
    let mut data = [string(name), be16(kinds.len() as u16).to_vec()].concat();
    kinds.iter().for_each(|kind| data.extend(be16(*kind)));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn contexts(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = [string(name), be32(queries.len() as u32).to_vec()].concat();
    queries.iter().for_each(|query| data.extend(string(query)));
    data
}

pub fn be16(number: u16) -> [u8; 2] {
    U16::new(number).to_bytes()
}

pub fn be32(number: u32) -> [u8; 4] {
    U32::new(number).to_bytes()
}

pub fn be64(number: u64) -> [u8; 8] {
    U64::new(number).to_bytes()
}
