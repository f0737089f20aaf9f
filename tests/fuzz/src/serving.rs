//! What a server must answer to the second half of a conversation: requests.
//!
//! A plain array takes the same requests as the server did, and says what reads must find.

use super::fixture::{BYTES, DRY, LOST_PAGE, PAGES, contents};
use super::haggling::Terms;
use super::reader::Reader;
use super::spec::*;

const PAGE: usize = 4096;

struct Asked {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

struct Serving {
    terms: Terms,
    bytes: Vec<u8>,
    lost: Vec<bool>,
}

/// Checks what the server said to a client's requests, and says whether it ends the connection.
pub fn check(terms: Terms, asked: &mut Reader<'_>, said: &mut Reader<'_>) -> bool {
    let lost = (0..PAGES).map(|page| page == LOST_PAGE).collect();
    let mut serving = Serving { terms, bytes: contents().to_vec(), lost };
    loop {
        let Some(header) = asked.take(28) else { return false };
        let Some(request) = parse(Reader(header)) else { return true };
        if request.command == CMD_DISC {
            return true;
        }
        let mut data: &[u8] = &[];
        if request.command == CMD_WRITE {
            if request.length > DATA_BYTES_MAX {
                return true;
            }
            let Some(payload) = asked.take(request.length as usize) else {
                return false;
            };
            data = payload;
        }
        serving.request(&request, data, said);
    }
}

fn parse(mut header: Reader<'_>) -> Option<Asked> {
    header.u32().filter(|magic| *magic == REQUEST_MAGIC)?;
    let (flags, command) = (header.u16()?, header.u16()?);
    let (cookie, offset, length) = (header.u64()?, header.u64()?, header.u32()?);
    Some(Asked { flags, command, cookie, offset, length })
}

impl Serving {
    fn request(&mut self, request: &Asked, data: &[u8], said: &mut Reader<'_>) {
        let refused = self.refusal(request);
        match request.command {
            CMD_READ => self.read(request, refused, said),
            CMD_BLOCK_STATUS => self.block_status(request, refused, said),
            _ => {
                let expected = refused.unwrap_or_else(|| self.store(request, data));
                let error = simple(said, request.cookie);
                if self.is_dry() && refused.is_none() {
                    assert!([0, EIO, ENOSPC].contains(&error), "{error}");
                } else {
                    assert_eq!(error, expected, "command {}", request.command);
                }
            }
        }
    }

    /// The export's pages come and go with memory that it may have or not.
    fn is_dry(&self) -> bool {
        self.terms.name == DRY
    }

    /// The error that a request meets for what it is, whatever is stored.
    fn refusal(&self, request: &Asked) -> Option<u32> {
        let allowed = match request.command {
            CMD_READ if self.terms.structured => FLAG_DF,
            CMD_READ | CMD_WRITE | CMD_TRIM | CMD_CACHE => 0,
            CMD_FLUSH if self.terms.flush() => 0,
            CMD_WRITE_ZEROES => FLAG_NO_HOLE | FLAG_FAST_ZERO,
            CMD_BLOCK_STATUS if self.terms.contexts => FLAG_REQ_ONE,
            _ => return Some(EINVAL),
        };
        let allowed = allowed | if self.terms.flush() { FLAG_FUA } else { 0 };
        if request.flags & !allowed != 0 {
            return Some(EINVAL);
        }
        let end = u128::from(request.offset) + u128::from(request.length);
        if end > BYTES as u128 {
            let writes = [CMD_WRITE, CMD_WRITE_ZEROES].contains(&request.command);
            return Some(if writes { ENOSPC } else { EINVAL });
        }
        let is_empty = request.command == CMD_BLOCK_STATUS && request.length == 0;
        is_empty.then_some(EINVAL)
    }

    fn read(&self, request: &Asked, refused: Option<u32>, said: &mut Reader<'_>) {
        let lost = || self.has_lost(request).then_some(EIO);
        let expected = refused.or_else(lost);
        let result = if self.terms.structured {
            chunks(request, said)
        } else {
            match simple(said, request.cookie) {
                0 => Ok(said.take(request.length as usize).expect("data follows").to_vec()),
                error => Err(error),
            }
        };
        match (result, expected) {
            (Err(error), _) if self.is_dry() && refused.is_none() => assert_eq!(error, EIO),
            (Err(error), expected) => assert_eq!(Some(error), expected),
            (Ok(_), Some(error)) if refused.is_some() || !self.is_dry() => {
                panic!("a read came back that must fail with {error}");
            }
            (Ok(data), _) => {
                let range = range(request);
                assert_eq!(data.len(), range.len());
                assert!(self.is_dry() || data == self.bytes[range], "other data was read");
            }
        }
    }

    fn block_status(&self, request: &Asked, refused: Option<u32>, said: &mut Reader<'_>) {
        if !self.terms.structured {
            assert_eq!(simple(said, request.cookie), EINVAL);
            return;
        }
        let (flags, kind, mut payload) = chunk(said, request.cookie);
        assert_eq!(flags, CHUNK_DONE);
        if let Some(error) = refused {
            assert_eq!((kind, payload.u32()), (CHUNK_ERROR, Some(error)));
            return;
        }
        assert_eq!(kind, CHUNK_BLOCK_STATUS);
        assert!(payload.u32().is_some(), "the context has a number");
        let (mut at, mut count) = (request.offset as usize, 0);
        while let Some(length) = payload.u32() {
            let state = payload.u32().expect("an extent has a state");
            assert!(length > 0 && state <= STATE_HOLE | STATE_ZERO, "{length} {state}");
            let extent = at..at + length as usize;
            assert!(extent.end <= range(request).end, "more is described than was asked for");
            if state & STATE_ZERO != 0 && !self.is_dry() {
                assert!(self.bytes[extent.clone()].iter().all(|byte| *byte == 0));
                let mut pages = extent.start / PAGE..=(extent.end - 1) / PAGE;
                assert!(!pages.any(|page| self.lost[page]), "what is lost is not zeros");
            }
            (at, count) = (extent.end, count + 1);
        }
        assert!(payload.is_empty() && count > 0);
        assert!(count == 1 || request.flags & FLAG_REQ_ONE == 0, "{count} extents, not one");
    }

    /// Does to the array what a request does to the export, and says how that ends.
    fn store(&mut self, request: &Asked, data: &[u8]) -> u32 {
        let (mut error, mut at) = (0, request.offset as usize);
        let end = match request.command {
            CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES => range(request).end,
            _ => at,
        };
        let keeps_place = request.command == CMD_WRITE || request.flags & FLAG_NO_HOLE != 0;
        while at < end {
            let page = at / PAGE;
            let part = at..end.min((page + 1) * PAGE);
            let is_whole = part.len() == PAGE;
            let source = data.get(part.start - request.offset as usize..).unwrap_or_default();
            at = part.end;
            match request.command {
                CMD_TRIM if !is_whole => {}
                // Of a write that has failed nothing reads as what it was before.
                _ if error != 0 && keeps_place => self.lost[page] |= is_whole,
                _ if self.lost[page] && !is_whole => error = EIO,
                CMD_WRITE => {
                    self.bytes[part.clone()].copy_from_slice(&source[..part.len()]);
                    self.lost[page] = false;
                }
                _ => {
                    self.bytes[part].fill(0);
                    self.lost[page] = false;
                }
            }
        }
        error
    }

    fn has_lost(&self, request: &Asked) -> bool {
        let range = range(request);
        !range.is_empty()
            && (range.start / PAGE..=(range.end - 1) / PAGE).any(|page| self.lost[page])
    }
}

fn range(request: &Asked) -> std::ops::Range<usize> {
    request.offset as usize..request.offset as usize + request.length as usize
}

/// Takes a simple reply, without data, and returns its error.
fn simple(said: &mut Reader<'_>, cookie: u64) -> u32 {
    assert_eq!(said.u32(), Some(SIMPLE_REPLY_MAGIC), "no simple reply");
    let error = said.u32().expect("a reply has an error");
    assert_eq!(said.u64(), Some(cookie));
    error
}

/// Takes a chunk of a structured reply: its flags, its kind, its payload.
fn chunk<'a>(said: &mut Reader<'a>, cookie: u64) -> (u16, u16, Reader<'a>) {
    assert_eq!(said.u32(), Some(CHUNK_MAGIC), "no chunk");
    let (flags, kind) = (said.u16().expect("flags"), said.u16().expect("a kind"));
    assert_eq!(said.u64(), Some(cookie));
    assert_eq!(flags & !CHUNK_DONE, 0);
    (flags, kind, Reader(said.string().expect("a chunk has its payload")))
}

/// Takes a structured reply to a read, whose chunks come in order.
fn chunks(request: &Asked, said: &mut Reader<'_>) -> Result<Vec<u8>, u32> {
    let (mut data, mut error, mut pieces) = (Vec::new(), None, 0);
    loop {
        let (flags, kind, mut payload) = chunk(said, request.cookie);
        match kind {
            CHUNK_NONE => assert!(payload.is_empty() && flags == CHUNK_DONE),
            CHUNK_OFFSET_DATA => {
                let at = request.offset + data.len() as u64;
                assert_eq!(payload.u64(), Some(at));
                assert!(!payload.is_empty(), "a chunk with no data");
                data.extend_from_slice(payload.0);
                pieces += 1;
            }
            CHUNK_ERROR => {
                error = payload.u32();
                let message = payload.u16().and_then(|length| payload.take(length.into()));
                assert!(message.is_some() && payload.is_empty() && error > Some(0));
            }
            kind => panic!("a chunk of kind {kind}"),
        }
        assert!(data.len() <= request.length as usize, "more than was asked for");
        if flags & CHUNK_DONE != 0 {
            break;
        }
    }
    assert!(pieces <= 1 || request.flags & FLAG_DF == 0, "in {pieces} pieces, not one");
    error.map_or(Ok(data), Err)
}
