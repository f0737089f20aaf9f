//! Streams: segments that are written from end to end, one after the other.

use super::segments::SEGMENT_BLOCKS;

/// Where units go.
#[derive(Default)]
pub(crate) struct Stream {
    /// The segment that is being written, and how many of its blocks are given out.
    open: Option<(u32, u32)>,
    /// The last one that was opened.
    last: u32,
}

impl Stream {
    /// Whether there is a segment to be written.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Whether this segment is being written.
    pub(crate) fn is_in(&self, segment: u32) -> bool {
        self.open.is_some_and(|(open, _)| open == segment)
    }

    /// Where the next segment is to be looked for: behind the last one, so that the file is written in order.
    pub(crate) fn next(&self, segments: u32) -> u32 {
        (self.last + 1) % segments
    }

    /// Goes on with a segment that was opened.
    pub(crate) fn begin(&mut self, segment: u32) {
        assert!(self.open.is_none(), "a segment is begun before the last one is written");
        self.open = Some((segment, 0));
        self.last = segment;
    }

    /// The next block, and how many there are from it on in its segment.
    pub(crate) fn room(&self) -> Option<(u32, u32)> {
        let (segment, given) = self.open?;
        Some((segment * SEGMENT_BLOCKS + given, SEGMENT_BLOCKS - given))
    }

    /// Takes the next so many blocks.
    pub(crate) fn take(&mut self, blocks: u32) {
        let (segment, given) = self.open.expect("blocks are taken of a segment that is open");
        let given = given + blocks;
        assert!(given <= SEGMENT_BLOCKS, "a segment has no so many blocks");
        self.open = (given < SEGMENT_BLOCKS).then_some((segment, given));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_given_out_in_order_until_the_segment_ends() {
        let mut stream = Stream::default();
        assert_eq!((stream.room(), stream.next(9)), (None, 1));
        stream.begin(8);
        stream.take(SEGMENT_BLOCKS - 10);
        let first = 9 * SEGMENT_BLOCKS - 10;
        assert_eq!((stream.room(), stream.is_in(8)), (Some((first, 10)), true));
        stream.take(10);
        assert_eq!((stream.is_open(), stream.is_in(8), stream.next(9)), (false, false, 0));
    }
}
