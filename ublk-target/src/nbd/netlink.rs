//! How the kernel's NBD client is told what to do: generic netlink, its family `nbd`.
//!
//! A command that is not answered has not been heard; one that is refused has changed nothing. Once this is open, nothing
//! here allocates. Sources: `include/uapi/linux/{netlink,genetlink,nbd-netlink}.h`; everything is in the machine's own
//! byte order, as netlink is.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The longest command; those here have some hundred bytes.
const COMMAND_BYTES_MAX: usize = 256;

/// The longest answer. The longest there is, a family's description, has some hundred bytes.
const ANSWER_BYTES_MAX: usize = 4096;

/// Messages to one command at most, the answer among them.
const ANSWERS_MAX: usize = 16;

/// Kinds and flags of messages.
const KIND_ERROR: u16 = 2;
const KIND_CONTROL: u16 = 0x10;
const FLAG_REQUEST: u16 = 1;
const FLAG_ACK: u16 = 4;

/// The family that knows the others.
const CONTROL_GET_FAMILY: u8 = 3;
const CONTROL_FAMILY_ID: u16 = 1;
const CONTROL_FAMILY_NAME: u16 = 2;
const FAMILY: &[u8] = b"nbd\0";

/// Commands of the family `nbd`, and what goes with them.
const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;
const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const DEAD_CONNECTION_TIMEOUT: u16 = 8;
const BACKEND: u16 = 10;
const SOCKET_ITEM: u16 = 1;
const SOCKET_FD: u16 = 1;

/// Before each message, `struct nlmsghdr`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct MessageHeader {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// Before each attribute, `struct nlattr`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct AttributeHeader {
    length: u16,
    kind: u16,
}

/// What a family's messages begin with, `struct genlmsghdr`.
const GENERIC_HEADER_BYTES: usize = 4;

/// Why the kernel's client does not do what it was told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetlinkError {
    /// There is no such client.
    #[error("the kernel does not know its NBD client by netlink ({source}): load the module nbd")]
    Absent {
        /// What it says.
        source: io::Error,
    },
    /// It cannot be told anything.
    #[error(
        "cannot tell the kernel's NBD client anything by netlink ({source}): where system calls or address families are \
         limited, allow AF_NETLINK"
    )]
    Mute {
        /// The system call's error.
        source: io::Error,
    },
    /// It was told, and refuses.
    #[error("the kernel's NBD client does not {what} /dev/nbd{number}: {source}")]
    Refused {
        /// What it was to do.
        what: &'static str,
        /// The device.
        number: u32,
        /// What it says.
        source: io::Error,
    },
}

impl NetlinkError {
    /// Whether we may not tell it anything.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Refused { source, .. } | Self::Mute { source }
            if source.kind() == io::ErrorKind::PermissionDenied)
    }

    /// Whether the device is not connected any more, or is not the one that was meant; somebody may have it open still.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Refused { source, .. } if source.kind() == io::ErrorKind::InvalidInput)
    }

    /// Whether somebody else has the device.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Refused { source, .. } if source.kind() == io::ErrorKind::ResourceBusy)
    }
}

/// What a device is connected with. Its requests have the time limit that its queue has, and what exceeds that is looked at, and
/// not given up.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// The device's size in bytes.
    pub bytes: u64,
    /// Its blocks, in bytes.
    pub block_bytes: u64,
    /// What the server can do: the transmission flags of the protocol.
    pub flags: u16,
    /// How long requests wait for another connection when the one that there was has ended, in seconds.
    pub patience: u64,
}

/// See the module's description.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    family: u16,
    /// Of the last command. Held until it is answered, for all answers come to one socket.
    sequence: Mutex<u32>,
}

impl Netlink {
    /// Finds the kernel's client. Its module is there.
    pub fn open() -> Result<Self, NetlinkError> {
        let mute = |errno: Errno| NetlinkError::Mute { source: errno.into() };
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        let socket = socket_with(family, kind, SocketFlags::CLOEXEC, Some(netlink::GENERIC));
        let netlink = Self {
            socket: socket.map_err(mute)?,
            family: KIND_CONTROL,
            sequence: Mutex::default(),
        };
        let mut family = None;
        let mut command = Command::new(KIND_CONTROL, CONTROL_GET_FAMILY);
        command.add(CONTROL_FAMILY_NAME, FAMILY);
        let look = |content: &[u8]| {
            family = family.or(attribute(content, CONTROL_FAMILY_ID).and_then(|value| {
                let (id, _) = u16::read_from_prefix(value).ok()?;
                Some(id)
            }));
        };
        netlink.ask(command, look).map_err(|error| match error {
            Fault::Refused(source) => NetlinkError::Absent { source },
            Fault::Mute(source) => NetlinkError::Mute { source },
        })?;
        let absent = || NetlinkError::Absent { source: io::ErrorKind::NotFound.into() };
        Ok(Self { family: family.ok_or_else(absent)?, ..netlink })
    }

    /// Connects a device that is free to the other end of this socket, which the kernel has from then on. The device is known by
    /// `backend`, which it shows, and without which it is not connected again (from Linux 5.14 on).
    pub fn connect(
        &self,
        number: u32,
        connection: Connection,
        backend: &str,
        socket: BorrowedFd<'_>,
    ) -> Result<(), NetlinkError> {
        let mut command = Command::new(self.family, CONNECT);
        command.add(INDEX, number.as_bytes());
        command.add(SIZE_BYTES, connection.bytes.as_bytes());
        command.add(BLOCK_SIZE_BYTES, connection.block_bytes.as_bytes());
        command.add(SERVER_FLAGS, u64::from(connection.flags).as_bytes());
        command.add(DEAD_CONNECTION_TIMEOUT, connection.patience.as_bytes());
        command.add(BACKEND, backend.as_bytes());
        command.add_socket(socket);
        self.tell("connect", number, command)
    }

    /// Gives a device that is known by `backend` this socket for a connection that has ended. Where none has, the kernel does not
    /// take it, and does not say so.
    pub fn reconnect(
        &self,
        number: u32,
        backend: &str,
        socket: BorrowedFd<'_>,
    ) -> Result<(), NetlinkError> {
        let mut command = Command::new(self.family, RECONFIGURE);
        command.add(INDEX, number.as_bytes());
        command.add(BACKEND, backend.as_bytes());
        command.add_socket(socket);
        self.tell("take another connection for", number, command)
    }

    /// Ends a device's connections. It is free once nobody has it open.
    pub fn disconnect(&self, number: u32) -> Result<(), NetlinkError> {
        let mut command = Command::new(self.family, DISCONNECT);
        command.add(INDEX, number.as_bytes());
        self.tell("disconnect", number, command)
    }

    fn tell(&self, what: &'static str, number: u32, command: Command) -> Result<(), NetlinkError> {
        self.ask(command, |_| {}).map_err(|fault| match fault {
            Fault::Refused(source) => NetlinkError::Refused { what, number, source },
            Fault::Mute(source) => NetlinkError::Mute { source },
        })
    }

    /// Sends a command, has `look` see the attributes of what comes back, and waits until it is acknowledged.
    fn ask(&self, mut command: Command, mut look: impl FnMut(&[u8])) -> Result<(), Fault> {
        let mute = |errno: Errno| Fault::Mute(errno.into());
        // Nobody panics with it, and any number is as good as another.
        let mut last = self.sequence.lock().unwrap_or_else(PoisonError::into_inner);
        *last = last.wrapping_add(1);
        let sequence = *last;
        send(&self.socket, command.finish(sequence), SendFlags::empty()).map_err(mute)?;
        let mut answer = [0; ANSWER_BYTES_MAX];
        for _ in 0..ANSWERS_MAX {
            let got = loop {
                match recv(&self.socket, &mut answer[..], RecvFlags::empty()) {
                    Err(Errno::INTR) => {}
                    got => break got.map_err(mute)?.0,
                }
            };
            match parse(&answer[..got], sequence) {
                Answer::Acknowledged => return Ok(()),
                Answer::Refused(error) => return Err(Fault::Refused(error)),
                Answer::Content(content) => look(content),
                // Of a command that nobody waited for until it was answered.
                Answer::Other => {}
            }
        }
        Err(Fault::Mute(io::Error::other("it does not come to an end")))
    }
}

/// Why a command was not carried out.
enum Fault {
    Refused(io::Error),
    Mute(io::Error),
}

/// A command as it is made.
struct Command {
    bytes: [u8; COMMAND_BYTES_MAX],
    length: usize,
    kind: u16,
}

impl Command {
    /// One for that family, without attributes.
    fn new(family: u16, command: u8) -> Self {
        let mut made = Self {
            bytes: [0; COMMAND_BYTES_MAX],
            length: size_of::<MessageHeader>(),
            kind: family,
        };
        // Of its version nobody asks.
        made.put(&[command, 1, 0, 0]);
        made
    }

    /// Adds an attribute.
    fn add(&mut self, kind: u16, value: &[u8]) {
        let length = (size_of::<AttributeHeader>() + value.len()) as u16;
        self.put(AttributeHeader { length, kind }.as_bytes());
        self.put(value);
    }

    /// Adds a list of one socket.
    fn add_socket(&mut self, socket: BorrowedFd<'_>) {
        const HEADER: u16 = size_of::<AttributeHeader>() as u16;
        let fd = socket.as_fd().as_raw_fd();
        let value = HEADER + size_of_val(&fd) as u16;
        for (kind, length) in
            [(SOCKETS, 2 * HEADER + value), (SOCKET_ITEM, HEADER + value), (SOCKET_FD, value)]
        {
            self.put(AttributeHeader { length, kind }.as_bytes());
        }
        self.put(fd.as_bytes());
    }

    /// Adds bytes, and what is left to the next multiple of four.
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.length..][..bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len().next_multiple_of(4);
    }

    /// The whole of it.
    fn finish(&mut self, sequence: u32) -> &[u8] {
        let header = MessageHeader {
            length: self.length as u32,
            kind: self.kind,
            flags: FLAG_REQUEST | FLAG_ACK,
            sequence,
            port: 0,
        };
        self.bytes[..size_of::<MessageHeader>()].copy_from_slice(header.as_bytes());
        &self.bytes[..self.length]
    }
}

/// What came back.
#[derive(Debug)]
enum Answer<'a> {
    /// The command has been carried out.
    Acknowledged,
    /// It has not.
    Refused(io::Error),
    /// Attributes.
    Content(&'a [u8]),
    /// Nothing to do with the command.
    Other,
}

/// Looks at a message that may answer the command of this number. Each comes by itself.
fn parse(message: &[u8], sequence: u32) -> Answer<'_> {
    let Ok((header, _)) = MessageHeader::read_from_prefix(message) else { return Answer::Other };
    let whole = message.get(size_of::<MessageHeader>()..header.length as usize);
    let Some(rest) = whole.filter(|_| header.sequence == sequence) else { return Answer::Other };
    if header.kind != KIND_ERROR {
        return rest.get(GENERIC_HEADER_BYTES..).map_or(Answer::Other, Answer::Content);
    }
    match i32::read_from_prefix(rest) {
        Ok((0, _)) => Answer::Acknowledged,
        Ok((error, _)) => Answer::Refused(io::Error::from_raw_os_error(error.saturating_neg())),
        Err(_) => Answer::Other,
    }
}

/// The value of the first attribute of that kind.
fn attribute(mut content: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let (header, _) = AttributeHeader::read_from_prefix(content).ok()?;
        let length = usize::from(header.length);
        let value = content.get(size_of::<AttributeHeader>()..length)?;
        if header.kind == wanted {
            return Some(value);
        }
        content = content.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// Words as they are in memory.
    fn words(words: &[u32]) -> Vec<u8> {
        words.as_bytes().to_vec()
    }

    /// Two halves of a word.
    fn halves(first: u16, second: u16) -> u32 {
        zerocopy::transmute!([first, second])
    }

    /// A word of bytes.
    fn bytes(bytes: [u8; 4]) -> u32 {
        zerocopy::transmute!(bytes)
    }

    #[test]
    fn a_command_is_laid_out_as_the_kernel_reads_it() {
        let file = File::open("/dev/null").unwrap();
        let mut command = Command::new(0x1c, RECONFIGURE);
        command.add(INDEX, 5_u32.as_bytes());
        command.add_socket(file.as_fd());
        command.add(CONTROL_FAMILY_NAME, b"ab\0");
        let generic = bytes([RECONFIGURE, 1, 0, 0]);
        let expected = words(&[
            52,
            halves(0x1c, FLAG_REQUEST | FLAG_ACK),
            9,
            0,
            generic,
            halves(8, INDEX),
            5,
            halves(16, SOCKETS),
            halves(12, SOCKET_ITEM),
            halves(8, SOCKET_FD),
            file.as_raw_fd().cast_unsigned(),
            halves(7, CONTROL_FAMILY_NAME),
            bytes(*b"ab\0\0"),
        ]);
        assert_eq!(command.finish(9), expected);
    }

    #[test]
    fn the_longest_command_fits() {
        let mut command = Command::new(0, CONNECT);
        for kind in [INDEX, SIZE_BYTES, BLOCK_SIZE_BYTES, SERVER_FLAGS, DEAD_CONNECTION_TIMEOUT] {
            command.add(kind, &[0; 8]);
        }
        command.add(BACKEND, &[0; 64]);
        command.add_socket(File::open("/dev/null").unwrap().as_fd());
        assert!(command.finish(0).len() <= COMMAND_BYTES_MAX);
    }

    #[test]
    fn answers_are_told_apart() {
        let answer = |length, kind, sequence, rest: &[u32]| {
            let mut message = words(&[length, halves(kind, 0), sequence, 0]);
            message.extend(words(rest));
            message
        };
        let acknowledged = answer(20, KIND_ERROR, 7, &[0]);
        assert!(matches!(parse(&acknowledged, 7), Answer::Acknowledged));
        assert!(matches!(parse(&acknowledged, 8), Answer::Other));
        let busy = answer(20, KIND_ERROR, 7, &[(-libc::EBUSY).cast_unsigned()]);
        match parse(&busy, 7) {
            Answer::Refused(error) => assert_eq!(error.raw_os_error(), Some(libc::EBUSY)),
            other => panic!("{other:?}"),
        }
        let content = answer(24, 0x1c, 7, &[0, 3]);
        assert!(matches!(parse(&content, 7), Answer::Content([_, _, _, _])));
        // Cut off, longer than it is, and of an impossible error.
        for length in 0..content.len() {
            assert!(matches!(parse(&content[..length], 7), Answer::Other));
        }
        assert!(matches!(parse(&answer(17, KIND_ERROR, 7, &[0]), 7), Answer::Other));
        let odd = answer(20, KIND_ERROR, 7, &[i32::MIN.cast_unsigned()]);
        assert!(matches!(parse(&odd, 7), Answer::Refused(_)));
    }

    #[test]
    fn an_attribute_is_found_among_others() {
        let content =
            words(&[halves(6, CONTROL_FAMILY_NAME), 0x61, halves(6, CONTROL_FAMILY_ID), 0]);
        assert_eq!(attribute(&content, CONTROL_FAMILY_ID), Some(&[0, 0][..]));
        assert_eq!(attribute(&content, 9), None);
        // One that ends after the message, and one of no length, which would go on for ever.
        assert_eq!(attribute(&words(&[halves(60, 1), 0]), 1), None);
        assert_eq!(attribute(&words(&[halves(0, 2), halves(8, 1), 0]), 1), None);
    }

    #[test]
    fn whoever_is_not_there_is_told_of() {
        // Everywhere: either there is no such family, or a device that nobody has.
        match Netlink::open() {
            Ok(netlink) => {
                netlink.reconnect(u32::MAX, "nobody", File::open("/dev/null").unwrap().as_fd())
            }
            Err(error) => Err(error),
        }
        .unwrap_err();
    }
}
