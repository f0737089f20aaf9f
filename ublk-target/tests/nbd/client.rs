//! A client of the NBD server, over a real socket: it sends what it is told to, right or wrong, and
//! takes what comes apart.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::fuzzing::reader::Reader;
use crate::fuzzing::spec::*;
use crate::served::Served;

/// How long a client waits for anything: long enough for any machine, and not for ever.
const PATIENCE: Duration = Duration::from_secs(50);

/// An answer to an option.
#[derive(Debug, Eq, PartialEq)]
pub struct Answer {
    pub kind: u32,
    pub data: Vec<u8>,
}

/// What a server says of an export that a client has chosen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Chosen {
    pub bytes: u64,
    pub flags: u16,
}

/// A piece of a structured reply.
#[derive(Debug, Eq, PartialEq)]
pub struct Chunk {
    pub flags: u16,
    pub kind: u16,
    pub payload: Vec<u8>,
}

/// See the module's description.
pub struct Client {
    pub stream: UnixStream,
    structured: bool,
    cookie: u64,
}

/// Connecting and negotiating.
impl Client {
    /// A client that has connected and said nothing.
    pub fn connect(served: &Served) -> Self {
        Self::on(UnixStream::connect(served.socket()).unwrap())
    }

    /// A client that has this connection.
    pub fn on(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream, structured: false, cookie: 0x1234_5678_9abc_def0 }
    }

    /// A client that has exchanged flags with the server.
    pub fn greeted(served: &Served) -> Self {
        let mut client = Self::connect(served);
        client.take(18);
        client.send(&be32(HANDSHAKE_FLAGS.into()));
        client
    }

    /// Exchanges flags with the server; false if it has no place for us.
    pub fn try_greet(&mut self) -> bool {
        let is_welcome = self.stream.read_exact(&mut [0; 18]).is_ok();
        if is_welcome {
            self.send(&be32(HANDSHAKE_FLAGS.into()));
        }
        is_welcome
    }

    pub fn is_structured(&self) -> bool {
        self.structured
    }

    /// A client that uses an export with simple replies.
    pub fn simple(served: &Served, name: &str) -> Self {
        let mut client = Self::greeted(served);
        client.go(name);
        client
    }

    /// A client that uses an export with structured replies and the metadata context.
    pub fn structured(served: &Served, name: &str) -> Self {
        let mut client = Self::greeted(served);
        client.choose_structured();
        client.choose_contexts(name);
        client.go(name);
        client
    }

    pub fn choose_structured(&mut self) {
        assert_eq!(self.kind_of(OPT_STRUCTURED_REPLY, &[]), REP_ACK);
        self.structured = true;
    }

    pub fn choose_contexts(&mut self, name: &str) {
        let data = contexts(name.as_bytes(), &[BASE_ALLOCATION]);
        let answers = self.ask(OPT_SET_META_CONTEXT, &data);
        assert_eq!(answers.len(), 2, "{answers:?}");
        assert_eq!((answers[0].kind, answers[1].kind), (REP_META_CONTEXT, REP_ACK));
        assert_eq!(&answers[0].data[4..], BASE_ALLOCATION);
    }

    /// Chooses an export, which must be there.
    pub fn go(&mut self, name: &str) -> Chosen {
        let answers = self.ask(OPT_GO, &inform(name.as_bytes(), &[]));
        assert_eq!(answers.last().unwrap().kind, REP_ACK, "{answers:?}");
        chosen(&answers)
    }

    /// Sends an option and takes all answers to it, the last of which is an ACK or an error.
    pub fn ask(&mut self, number: u32, data: &[u8]) -> Vec<Answer> {
        self.send(&option(number, data));
        self.answers(number)
    }

    /// What the last answer to an option is.
    pub fn kind_of(&mut self, number: u32, data: &[u8]) -> u32 {
        self.ask(number, data).pop().unwrap().kind
    }

    pub fn answers(&mut self, number: u32) -> Vec<Answer> {
        let mut answers = Vec::new();
        loop {
            let header = self.take(20);
            let mut header = Reader(&header);
            assert_eq!(header.u64(), Some(OPTION_REPLY_MAGIC));
            assert_eq!(header.u32(), Some(number));
            let (kind, length) = (header.u32().unwrap(), header.u32().unwrap());
            assert!(length < 10_000, "an answer of {length} bytes");
            answers.push(Answer { kind, data: self.take(length as usize) });
            if kind == REP_ACK || kind & 1 << 31 != 0 {
                return answers;
            }
        }
    }
}

/// What the INFO answers say of an export.
pub fn chosen(answers: &[Answer]) -> Chosen {
    let about = answers.iter().find(|it| it.kind == REP_INFO && it.data[..2] == [0, 0]);
    let mut about = Reader(&about.unwrap().data[2..]);
    let chosen = Chosen { bytes: about.u64().unwrap(), flags: about.u16().unwrap() };
    assert!(about.is_empty());
    chosen
}

/// Bytes on the wire.
impl Client {
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends what the server may end the connection in the middle of.
    pub fn blurt(&mut self, bytes: &[u8]) {
        match self.stream.write_all(bytes) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            result => result.unwrap(),
        }
    }

    #[track_caller]
    pub fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Checks that the server has ended the connection and says nothing more.
    #[track_caller]
    pub fn assert_ended(self) {
        let rest = self.rest();
        assert!(rest.is_empty(), "it said {} bytes more: {:02x?}", rest.len(), rest);
    }

    /// The same of a connection that has not chosen an export. A server that waits for more would end
    /// it, too, in the end: so it is given more, to which it would have an answer.
    #[track_caller]
    pub fn assert_sent_away(mut self) {
        self.blurt(&option(OPT_LIST, &[]));
        self.assert_ended();
    }

    /// All that the server says until it ends the connection.
    #[track_caller]
    pub fn rest(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            // It did not read all that we sent.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            result => drop(result.unwrap()),
        }
        rest
    }
}

/// Requests and replies.
impl Client {
    /// Sends a request without its data, and returns its cookie.
    pub fn request(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> u64 {
        self.cookie = self.cookie.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.send(&request(flags, command, self.cookie, offset, length));
        self.cookie
    }

    /// Takes a simple reply, without its data, and returns its error.
    #[track_caller]
    pub fn error_of(&mut self, cookie: u64) -> u32 {
        let (answered, error) = self.error_of_any();
        assert_eq!(answered, cookie);
        error
    }

    /// The same of whatever is answered next, and the cookie of that.
    #[track_caller]
    pub fn error_of_any(&mut self) -> (u64, u32) {
        let reply = self.take(16);
        let mut reply = Reader(&reply);
        assert_eq!(reply.u32(), Some(SIMPLE_REPLY_MAGIC), "no simple reply");
        let error = reply.u32().unwrap();
        (reply.u64().unwrap(), error)
    }

    /// Takes a chunk of a structured reply.
    #[track_caller]
    pub fn chunk(&mut self, cookie: u64) -> Chunk {
        let header = self.take(20);
        let mut header = Reader(&header);
        assert_eq!(header.u32(), Some(CHUNK_MAGIC), "no chunk");
        let (flags, kind) = (header.u16().unwrap(), header.u16().unwrap());
        assert_eq!(header.u64(), Some(cookie));
        let payload = self.take(header.u32().unwrap() as usize);
        Chunk { flags, kind, payload }
    }

    /// Does something that is answered by a simple reply without data.
    #[track_caller]
    pub fn plain(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> u32 {
        let cookie = self.request(command, flags, offset, length);
        self.error_of(cookie)
    }

    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        let cookie = self.request(CMD_WRITE, 0, offset, data.len() as u32);
        self.send(data);
        self.error_of(cookie)
    }

    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.read_with(0, offset, length)
    }

    #[track_caller]
    pub fn read_with(&mut self, flags: u16, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        let cookie = self.request(CMD_READ, flags, offset, length);
        self.data_of(cookie, offset, length).map(|(data, _)| data)
    }

    /// Takes the reply to a read: its data, and in how many pieces it came.
    #[track_caller]
    pub fn data_of(
        &mut self,
        cookie: u64,
        offset: u64,
        length: u32,
    ) -> Result<(Vec<u8>, usize), u32> {
        if !self.structured {
            return match self.error_of(cookie) {
                0 => Ok((self.take(length as usize), 1)),
                error => Err(error),
            };
        }
        let (mut data, mut pieces, mut error) = (vec![0; length as usize], 0, None);
        let mut covered = 0;
        loop {
            let chunk = self.chunk(cookie);
            let mut payload = Reader(&chunk.payload);
            match chunk.kind {
                CHUNK_NONE => assert_eq!((chunk.payload.len(), chunk.flags), (0, CHUNK_DONE)),
                CHUNK_OFFSET_DATA => {
                    let at = (payload.u64().unwrap() - offset) as usize;
                    let piece = payload.0;
                    data[at..at + piece.len()].copy_from_slice(piece);
                    (pieces, covered) = (pieces + 1, covered + piece.len());
                }
                CHUNK_ERROR => error = payload.u32(),
                kind => panic!("a chunk of kind {kind}"),
            }
            if chunk.flags & CHUNK_DONE != 0 {
                break;
            }
        }
        assert!(error.is_some() || covered == length as usize, "{covered} bytes of {length}");
        error.map_or(Ok((data, pieces)), Err)
    }

    /// The extents of a BLOCK_STATUS reply: length and state.
    #[track_caller]
    pub fn block_status(
        &mut self,
        flags: u16,
        offset: u64,
        length: u32,
    ) -> Result<Vec<(u32, u32)>, u32> {
        let cookie = self.request(CMD_BLOCK_STATUS, flags, offset, length);
        let chunk = self.chunk(cookie);
        assert_eq!(chunk.flags, CHUNK_DONE);
        let mut payload = Reader(&chunk.payload);
        let first = payload.u32().unwrap();
        if chunk.kind == CHUNK_ERROR {
            return Err(first);
        }
        assert_eq!(chunk.kind, CHUNK_BLOCK_STATUS);
        let next = || payload.u32().map(|length| (length, payload.u32().unwrap()));
        Ok(std::iter::from_fn(next).collect())
    }
}
