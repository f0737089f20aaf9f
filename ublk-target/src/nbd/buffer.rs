//! A connection's two buffers: what has come in, and what is to go out.
//!
//! Both are allocated whole when a connection is accepted and never grow: they are all that a
//! client can make the daemon hold for it. What has no room waits in the socket, or is made later.

use zerocopy::{Immutable, IntoBytes};

/// Bytes of data that are read or handed out at a time: the kernel's largest swap request.
pub const DATA_BYTES: usize = 128 << 10;

/// What may come with so much data: headers, of it and of what follows.
const MARGIN_BYTES: usize = 4 << 10;

/// Bytes that one buffer takes.
pub const BUFFER_BYTES: usize = DATA_BYTES + MARGIN_BYTES;

/// Bytes that came in and wait to be looked at.
pub struct Inbox {
    bytes: Box<[u8]>,
    first: usize,
    end: usize,
}

impl Inbox {
    /// An empty one. All its memory is there.
    pub fn new() -> Self {
        Self { bytes: zeroed(), first: 0, end: 0 }
    }

    /// What is there.
    pub fn unread(&self) -> &[u8] {
        &self.bytes[self.first..self.end]
    }

    /// Drops the first `count` bytes of what is there.
    ///
    /// # Panics
    ///
    /// If there are fewer.
    pub fn consume(&mut self, count: usize) {
        assert!(count <= self.end - self.first, "{count} bytes consumed of fewer");
        self.first += count;
        if self.first == self.end {
            (self.first, self.end) = (0, 0);
        }
    }

    /// Room for what comes next; empty if nothing was consumed of a full buffer.
    pub fn room(&mut self) -> &mut [u8] {
        if self.first > 0 {
            self.bytes.copy_within(self.first..self.end, 0);
            (self.first, self.end) = (0, self.end - self.first);
        }
        &mut self.bytes[self.end..]
    }

    /// Notes that `count` bytes came into the room.
    ///
    /// # Panics
    ///
    /// If that is more than there was.
    pub fn filled(&mut self, count: usize) {
        assert!(count <= self.bytes.len() - self.end, "{count} bytes came into less room");
        self.end += count;
    }
}

/// Bytes that wait to be sent.
pub struct Outbox {
    bytes: Box<[u8]>,
    sent: usize,
    end: usize,
}

impl Outbox {
    /// An empty one. All its memory is there.
    pub fn new() -> Self {
        Self { bytes: zeroed(), sent: 0, end: 0 }
    }

    /// What is to be sent.
    pub fn unsent(&self) -> &[u8] {
        &self.bytes[self.sent..self.end]
    }

    /// Whether nothing is to be sent.
    pub fn is_empty(&self) -> bool {
        self.sent == self.end
    }

    /// Notes that the first `count` bytes were sent.
    ///
    /// # Panics
    ///
    /// If there were fewer.
    pub fn sent(&mut self, count: usize) {
        assert!(count <= self.end - self.sent, "{count} bytes sent of fewer");
        self.sent += count;
        if self.sent == self.end {
            (self.sent, self.end) = (0, 0);
        }
    }

    /// Bytes that there is room for.
    pub fn room(&self) -> usize {
        self.bytes.len() - self.end
    }

    /// Appends a value.
    ///
    /// # Panics
    ///
    /// If there is no room for it.
    pub fn push(&mut self, value: &(impl IntoBytes + Immutable + ?Sized)) {
        let value = value.as_bytes();
        self.append(value.len()).copy_from_slice(value);
    }

    /// Appends `count` bytes for the caller to fill; they hold anything.
    ///
    /// # Panics
    ///
    /// If there is no room for them.
    pub fn append(&mut self, count: usize) -> &mut [u8] {
        assert!(count <= self.room(), "{count} bytes appended to less room");
        let start = self.end;
        self.end += count;
        &mut self.bytes[start..self.end]
    }

    /// Where the next append goes, for [`Outbox::take_back`].
    pub fn mark(&self) -> usize {
        self.end
    }

    /// Removes everything that was appended since `mark`, nothing of which was sent.
    pub fn take_back(&mut self, mark: usize) {
        assert!((self.sent..=self.end).contains(&mark), "taken back what was sent");
        self.end = mark;
    }
}

/// A buffer of which every page has been written, so that it is memory and not a promise of it.
fn zeroed() -> Box<[u8]> {
    let mut bytes = vec![0; BUFFER_BYTES].into_boxed_slice();
    // Memory fresh from the kernel is not touched by the line above.
    bytes.iter_mut().step_by(4096).for_each(|byte| *std::hint::black_box(byte) = 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_in_is_seen_once_and_in_order() {
        let mut inbox = Inbox::new();
        let (mut next, mut expected) = (0_u8, 0_u8);
        for step in 1..2000_usize {
            let count = (step * 7919 % 40_000).min(inbox.room().len());
            for byte in &mut inbox.room()[..count] {
                *byte = next;
                next = next.wrapping_add(1);
            }
            inbox.filled(count);
            let count = (step * 104_729 % 50_000).min(inbox.unread().len());
            for byte in &inbox.unread()[..count] {
                assert_eq!(*byte, expected);
                expected = expected.wrapping_add(1);
            }
            inbox.consume(count);
        }
        inbox.consume(inbox.unread().len());
        assert_eq!(inbox.room().len(), BUFFER_BYTES);
    }

    #[test]
    fn what_is_taken_back_is_never_sent() {
        let mut outbox = Outbox::new();
        outbox.push(b"kept");
        let mark = outbox.mark();
        outbox.append(100).fill(1);
        outbox.take_back(mark);
        outbox.push(b", too");
        assert_eq!(outbox.unsent(), b"kept, too");
        outbox.sent(6);
        assert_eq!(outbox.unsent(), b"too");
        outbox.sent(3);
        assert!(outbox.is_empty());
        assert_eq!(outbox.room(), BUFFER_BYTES);
    }

    #[test]
    #[should_panic(expected = "less room")]
    fn more_than_fits_is_refused() {
        Outbox::new().append(BUFFER_BYTES + 1);
    }
}
