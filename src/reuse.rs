//! How often pages are read once more, without a put between: what says where a page that was read is to go.
//!
//! Who swaps reads a page because it is not in his memory, and then it is. So what is held of it here is hardly ever
//! wanted again: it is written to, and put anew, or its place is used for another page, of which nobody tells. With a
//! working set that is only read, and read again, it is the other way round. This counts which it is.

/// Reads after which all that was counted counts half.
const WINDOW: u32 = 1 << 14;

/// Where pages are read again so often, each so many-th read is looked at all the same.
const PROBES: u32 = 16;

/// See the module's description.
#[derive(Default)]
pub(crate) struct Reuse {
    /// Reads of which it shows whether the page is read again,
    reads: u32,
    /// and how often that was.
    again: u32,
    /// Reads for which it was asked what to do.
    asked: u32,
}

impl Reuse {
    /// Counts the first read of a page since it was put, if a second one will be told of.
    pub(crate) fn first(&mut self) {
        self.reads += 1;
        if self.reads >= WINDOW {
            self.reads /= 2;
            self.again /= 2;
        }
    }

    /// Counts another one. A third one will be told of only as long as these are few: else the page counts as one that
    /// is in use.
    pub(crate) fn again(&mut self) {
        self.again += 1;
        if !self.is_common() {
            self.first();
        }
    }

    /// Whether what was read is read again, as a rule: seven times out of eight. With less, a page that was not read yet
    /// is more likely to be read next.
    pub(crate) fn is_common(&self) -> bool {
        self.reads >= WINDOW / 4 && 8 * self.again > 7 * self.reads
    }

    /// Whether a page that is read now is taken for one that is not wanted any more: as a rule, or to see
    /// whether it is.
    pub(crate) fn is_to_retire(&mut self) -> bool {
        self.asked = self.asked.wrapping_add(1);
        !self.is_common() || self.asked.is_multiple_of(PROBES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many reads, of which `again` in a hundred are not a page's first.
    fn read(reuse: &mut Reuse, reads: u32, again: u32) {
        for n in 0..reads {
            if n % 100 < again { reuse.again() } else { reuse.first() }
        }
    }

    #[test]
    fn pages_are_retired_until_nearly_all_are_read_again() {
        let mut reuse = Reuse::default();
        read(&mut reuse, 4 * WINDOW, 85);
        assert!((0..100).all(|_| reuse.is_to_retire()) && !reuse.is_common());
        read(&mut reuse, 4 * WINDOW, 90);
        assert!(reuse.is_common());
        assert_eq!((0..16 * PROBES).filter(|_| reuse.is_to_retire()).count(), 16);
    }

    /// Of what is retired then to see, each page is told of twice at most.
    #[test]
    fn it_lasts_as_long_as_what_is_retired_is_read_again() {
        for (part, lasts) in [(95, true), (50, false)] {
            let mut reuse = Reuse::default();
            read(&mut reuse, 4 * WINDOW, 95);
            for n in 0..4 * WINDOW {
                reuse.first();
                if n % 100 < part {
                    reuse.again();
                }
            }
            assert_eq!(reuse.is_common(), lasts);
        }
    }

    #[test]
    fn few_reads_say_nothing() {
        let mut reuse = Reuse::default();
        read(&mut reuse, WINDOW / 5, 100);
        assert!(!reuse.is_common());
    }
}
