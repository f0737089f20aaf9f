//! Requests of a client: what 28 bytes ask for, and whether that makes sense.
//!
//! Pure: bytes in, verdict out. Nothing that a client says is trusted, and nothing that is refused
//! here reaches a device.

use tmem::PAGE_SIZE;

use super::wire::{Error, REQUEST_MAGIC, RequestHeader, command, flag};

/// Bytes of a block size that a client may use: smaller ones than a page cost a read of the page.
pub const BLOCK_BYTES_MIN: u32 = 512;

/// Bytes of the block size that a client should use.
pub const BLOCK_BYTES_PREFERRED: u32 = PAGE_SIZE as u32;

/// Bytes of data that one request may have.
pub const DATA_BYTES_MAX: u32 = 32 << 20;

/// What is asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Command {
    /// Say which extents are holes: the first one only, or as many as fit.
    BlockStatus { one: bool },
    /// Nothing to do: everything is in memory.
    Cache,
    /// The client goes.
    Disconnect,
    /// Nothing to do: there is no volatile cache.
    Flush,
    /// Hand data out, in one piece or in several.
    Read { in_one: bool },
    /// Forget what can be forgotten.
    Trim,
    /// Take data in.
    Write,
    /// Make it zeros, which hold their place or not.
    WriteZeroes { no_hole: bool },
}

/// A request that makes sense for its device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Request {
    /// What is asked for.
    pub command: Command,
    /// The client's name for the request.
    pub cookie: u64,
    /// The first byte.
    pub offset: u64,
    /// How many bytes.
    pub length: u32,
}

/// What was agreed upon, as far as requests depend on it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Terms {
    /// The device's size in bytes.
    pub bytes: u64,
    /// Whether FLUSH and FUA were offered.
    pub flush: bool,
    /// Whether reads are answered in chunks.
    pub structured: bool,
    /// Whether the client chose the context `base:allocation`.
    pub allocation: bool,
}

/// What comes of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// It can be served.
    Good(Request),
    /// It is answered with an error, once so many bytes of its data were skipped; in a chunk, if
    /// chunks were agreed upon and its answer would have been in some.
    Refused { cookie: u64, in_chunks: bool, error: Error, skip: u32 },
    /// The connection cannot go on: whatever follows means nothing.
    HangUp,
}

/// Judges a request.
pub fn judge(header: &RequestHeader, terms: &Terms) -> Verdict {
    if header.magic.get() != REQUEST_MAGIC {
        return Verdict::HangUp;
    }
    let (code, length) = (header.command.get(), header.length.get());
    let is_write = code == command::WRITE;
    // A client that does not keep to the block size it was told is no client, and its data could
    // be as long as it likes.
    if is_write && length > DATA_BYTES_MAX {
        return Verdict::HangUp;
    }
    match check(header, terms) {
        Ok(command) => {
            let (cookie, offset) = (header.cookie.get(), header.offset.get());
            Verdict::Good(Request { command, cookie, offset, length })
        }
        Err(error) => Verdict::Refused {
            cookie: header.cookie.get(),
            in_chunks: matches!(code, command::READ | command::BLOCK_STATUS),
            error,
            skip: if is_write { length } else { 0 },
        },
    }
}

fn check(header: &RequestHeader, terms: &Terms) -> Result<Command, Error> {
    let (flags, length) = (header.flags.get(), header.length.get());
    let has = |flag| flags & flag != 0;
    let (command, known) = match header.command.get() {
        command::READ => {
            (Command::Read { in_one: has(flag::DF) }, if terms.structured { flag::DF } else { 0 })
        }
        command::WRITE => (Command::Write, 0),
        command::DISCONNECT => return Ok(Command::Disconnect),
        command::FLUSH if terms.flush => (Command::Flush, 0),
        command::TRIM => (Command::Trim, 0),
        command::CACHE => (Command::Cache, 0),
        command::WRITE_ZEROES => {
            let command = Command::WriteZeroes { no_hole: has(flag::NO_HOLE) };
            (command, flag::NO_HOLE | flag::FAST_ZERO)
        }
        command::BLOCK_STATUS if terms.allocation => {
            (Command::BlockStatus { one: has(flag::REQ_ONE) }, flag::REQ_ONE)
        }
        _ => return Err(Error::Invalid),
    };
    let known = if terms.flush { known | flag::FUA } else { known };
    if flags & !known != 0 {
        return Err(Error::Invalid);
    }
    let end = header.offset.get().checked_add(u64::from(length));
    if end.is_none_or(|end| end > terms.bytes) {
        let writes = matches!(command, Command::Write | Command::WriteZeroes { .. });
        return Err(if writes { Error::NoSpace } else { Error::Invalid });
    }
    let without_data = matches!(command, Command::BlockStatus { .. }) && length == 0;
    let too_long = matches!(command, Command::Read { .. }) && length > DATA_BYTES_MAX;
    if without_data || too_long { Err(Error::Invalid) } else { Ok(command) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms { bytes: 1 << 30, flush: true, structured: true, allocation: true };

    fn header(command: u16, flags: u16, offset: u64, length: u32) -> RequestHeader {
        RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: 7.into(),
            offset: offset.into(),
            length: length.into(),
        }
    }

    fn refused(error: Error, in_chunks: bool, skip: u32) -> Verdict {
        Verdict::Refused { cookie: 7, in_chunks, error, skip }
    }

    #[test]
    fn commands_and_their_flags() {
        let plain = Terms { flush: false, structured: false, allocation: false, ..TERMS };
        for (code, flags, command) in [
            (command::READ, 0, Command::Read { in_one: false }),
            (command::WRITE, 0, Command::Write),
            (command::TRIM, 0, Command::Trim),
            (command::CACHE, 0, Command::Cache),
            (command::WRITE_ZEROES, flag::FAST_ZERO, Command::WriteZeroes { no_hole: false }),
            (command::WRITE_ZEROES, flag::NO_HOLE, Command::WriteZeroes { no_hole: true }),
            (command::DISCONNECT, 0, Command::Disconnect),
        ] {
            let expected = Verdict::Good(Request { command, cookie: 7, offset: 4096, length: 512 });
            assert_eq!(judge(&header(code, flags, 4096, 512), &plain), expected);
            assert_eq!(judge(&header(code, flags | flag::FUA, 4096, 512), &TERMS), expected);
        }
        // What was not agreed upon is refused, and the data of a write with it.
        for (code, flags, in_chunks, skip) in [
            (command::READ, flag::DF, true, 0),
            (command::WRITE, flag::FUA, false, 512),
            (command::WRITE, flag::NO_HOLE, false, 512),
            (command::FLUSH, 0, false, 0),
            (command::BLOCK_STATUS, 0, true, 0),
            (99, 0, false, 0),
        ] {
            let verdict = judge(&header(code, flags, 0, 512), &plain);
            assert_eq!(verdict, refused(Error::Invalid, in_chunks, skip), "{code} {flags}");
        }
    }

    #[test]
    fn nothing_beyond_the_end_is_served() {
        let end = TERMS.bytes;
        for (code, offset, length, error, skip) in [
            (command::READ, end - 1, 2, Error::Invalid, 0),
            (command::READ, u64::MAX, 1, Error::Invalid, 0),
            (command::TRIM, end, 1, Error::Invalid, 0),
            (command::BLOCK_STATUS, end, 1, Error::Invalid, 0),
            (command::WRITE, end - 512, 1024, Error::NoSpace, 1024),
            (command::WRITE_ZEROES, 1, u32::MAX, Error::NoSpace, 0),
        ] {
            let verdict = judge(&header(code, 0, offset, length), &TERMS);
            let in_chunks = matches!(code, command::READ | command::BLOCK_STATUS);
            assert_eq!(verdict, refused(error, in_chunks, skip), "{code}");
        }
        let all = header(command::TRIM, 0, 0, 1 << 30);
        assert!(matches!(judge(&all, &TERMS), Verdict::Good(_)));
    }

    #[test]
    fn lengths_have_a_limit() {
        let verdict = judge(&header(command::READ, 0, 0, DATA_BYTES_MAX + 1), &TERMS);
        assert_eq!(verdict, refused(Error::Invalid, true, 0));
        let verdict = judge(&header(command::WRITE, 0, 0, DATA_BYTES_MAX + 1), &TERMS);
        assert_eq!(verdict, Verdict::HangUp);
        let verdict = judge(&header(command::WRITE, 0, 0, u32::MAX), &TERMS);
        assert_eq!(verdict, Verdict::HangUp);
        let verdict = judge(&header(command::BLOCK_STATUS, 0, 0, 0), &TERMS);
        assert_eq!(verdict, refused(Error::Invalid, true, 0));
    }

    #[test]
    fn what_is_no_request_ends_the_connection() {
        let mut junk = header(command::READ, 0, 0, 512);
        junk.magic = 0x2560_9514.into();
        assert_eq!(judge(&junk, &TERMS), Verdict::HangUp);
    }
}
