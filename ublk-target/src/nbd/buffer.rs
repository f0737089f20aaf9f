//! A connection's two buffers: what has come in, and what is to go out.
//!
//! Both are allocated whole when a connection is accepted and never grow: they are all that a
//! client can make the daemon hold for it. What has no room waits in the socket, or is made later.

use std::ops::Range;

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
        Self { bytes: zeroed(BUFFER_BYTES), first: 0, end: 0 }
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

/// Bytes that wait to be sent. The last of them can be held back until they are what they should be; what is
/// before them is sent meanwhile.
pub struct Outbox {
    bytes: Box<[u8]>,
    sent: usize,
    end: usize,
    /// Where what is held back begins.
    held: Option<usize>,
}

impl Outbox {
    /// An empty one. All its memory is there.
    pub fn new() -> Self {
        Self { bytes: zeroed(BUFFER_BYTES), sent: 0, end: 0, held: None }
    }

    /// What is to be sent.
    pub fn unsent(&self) -> &[u8] {
        &self.bytes[self.sent..self.whole()]
    }

    /// Whether nothing is to be sent.
    pub fn is_empty(&self) -> bool {
        self.sent == self.whole()
    }

    /// Notes that the first `count` bytes were sent.
    ///
    /// # Panics
    ///
    /// If there were fewer.
    pub fn sent(&mut self, count: usize) {
        assert!(count <= self.whole() - self.sent, "{count} bytes sent of fewer");
        self.sent += count;
        self.rewind();
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

    /// What was appended since `mark`, nothing of which was sent.
    pub fn since(&self, mark: usize) -> &[u8] {
        assert!(self.sent <= mark, "what was sent is not there any more");
        &self.bytes[mark..self.end]
    }

    /// Removes everything that was appended since `mark`, nothing of which was sent.
    pub fn take_back(&mut self, mark: usize) {
        assert!((self.sent..=self.end).contains(&mark), "taken back what was sent");
        self.end = mark;
        // What was before it may have been sent while it was held back.
        self.rewind();
    }

    /// Holds back what was appended since `mark`, until it is released. Nothing is appended meanwhile.
    pub fn hold(&mut self, mark: usize) {
        assert!(self.held.is_none() && (self.sent..self.end).contains(&mark), "nothing to hold");
        self.held = Some(mark);
    }

    /// Bytes that are held back, for the caller to fill: a range of places that marks have named. What is
    /// being sent meanwhile is not touched.
    ///
    /// # Panics
    ///
    /// If they are not held back.
    pub fn held(&mut self, places: Range<usize>) -> &mut [u8] {
        let is_held = self.held.is_some_and(|held| held <= places.start) && places.end <= self.end;
        assert!(is_held, "filled what is not held back");
        &mut self.bytes[places]
    }

    /// Holds nothing back any more.
    pub fn release(&mut self) {
        self.held = None;
    }

    /// Where what may be sent ends.
    fn whole(&self) -> usize {
        self.held.unwrap_or(self.end)
    }

    /// If nothing is left, all room is there again.
    fn rewind(&mut self) {
        if self.sent == self.end {
            (self.sent, self.end) = (0, 0);
        }
    }
}

/// A buffer of which every page has been written, so that it is memory and not a promise of it.
pub(super) fn zeroed(count: usize) -> Box<[u8]> {
    let mut bytes = vec![0; count].into_boxed_slice();
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
    fn what_is_held_back_is_sent_when_it_is_whole_and_what_is_before_it_at_once() {
        let mut outbox = Outbox::new();
        outbox.push(b"before");
        let mark = outbox.mark();
        outbox.push(b"held ");
        let place = outbox.mark();
        outbox.append(4);
        outbox.hold(mark);
        assert_eq!(outbox.unsent(), b"before");
        outbox.sent(6);
        assert!(outbox.is_empty());
        outbox.held(place..place + 4).copy_from_slice(b"back");
        assert!(outbox.is_empty());
        outbox.release();
        assert_eq!(outbox.unsent(), b"held back");
        outbox.sent(9);
        assert_eq!(outbox.room(), BUFFER_BYTES);
    }

    #[test]
    fn all_room_is_there_again_when_what_was_held_back_is_taken_back() {
        let mut outbox = Outbox::new();
        outbox.push(b"before");
        let mark = outbox.mark();
        outbox.append(100);
        outbox.hold(mark);
        outbox.sent(6);
        outbox.release();
        outbox.take_back(mark);
        assert!(outbox.is_empty());
        assert_eq!(outbox.room(), BUFFER_BYTES);
    }

    #[test]
    #[should_panic(expected = "not held back")]
    fn what_is_being_sent_is_not_filled() {
        let mut outbox = Outbox::new();
        outbox.push(b"before");
        let mark = outbox.mark();
        outbox.push(b"held");
        outbox.hold(mark);
        outbox.held(0..10);
    }

    #[test]
    #[should_panic(expected = "less room")]
    fn more_than_fits_is_refused() {
        Outbox::new().append(BUFFER_BYTES + 1);
    }
}
