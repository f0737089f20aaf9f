//! Bytes that are read from the backing file or written there, of which each I/O may do a part only.
//!
//! Pure: it says what is left to do, and when it is of no use to go on.

use rustix::io::Errno;
use tmem::PAGE_SIZE;

/// How often a transfer is tried again without any bytes done.
const TRIES: u32 = 16;

/// See the module's description.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Transfer {
    offset: u64,
    bytes: usize,
    done: usize,
    tries: u32,
}

/// What comes after an I/O of a transfer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// Another I/O, of what is left.
    Again,
    /// Nothing: all is done.
    Done,
    /// Nothing: it failed.
    Failed(Errno),
}

impl Transfer {
    /// One of so many bytes from `offset` on; both are whole pages.
    pub fn new(offset: u64, bytes: usize) -> Self {
        Self { offset, bytes, done: 0, tries: 0 }
    }

    /// Where in the file the next I/O begins, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset + self.done as u64
    }

    /// How many bytes are done.
    pub fn done(&self) -> usize {
        self.done
    }

    /// How many bytes are left.
    pub fn left(&self) -> usize {
        self.bytes - self.done
    }

    /// An I/O of what was left has ended with this: the bytes that it did, or an error's negative number.
    pub fn ended(&mut self, result: i32) -> Next {
        if let Ok(count) = usize::try_from(result) {
            assert!(count <= self.left(), "more was done than asked for");
            // Direct I/O goes on at whole pages only.
            let done = (self.done + count) / PAGE_SIZE * PAGE_SIZE;
            if done == self.bytes {
                self.done = done;
                return Next::Done;
            }
            if done > self.done {
                (self.done, self.tries) = (done, 0);
                return Next::Again;
            }
        }
        let errno = match result {
            // The file ends there, or its file system has nothing more to give.
            0.. => Errno::IO,
            _ => Errno::from_raw_os_error(-result),
        };
        self.tries += 1;
        let is_passing = result > 0 || matches!(errno, Errno::INTR | Errno::AGAIN);
        if is_passing && self.tries < TRIES { Next::Again } else { Next::Failed(errno) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: i32 = PAGE_SIZE as i32;

    #[test]
    fn what_was_done_is_not_done_again() {
        let mut transfer = Transfer::new(1 << 20, 4 * PAGE_SIZE);
        assert_eq!(transfer.ended(PAGE), Next::Again);
        assert_eq!((transfer.offset(), transfer.left()), ((1 << 20) + 4096, 3 * PAGE_SIZE));
        // What is not a whole page is done once more.
        assert_eq!(transfer.ended(PAGE + 512), Next::Again);
        assert_eq!((transfer.done(), transfer.left()), (2 * PAGE_SIZE, 2 * PAGE_SIZE));
        assert_eq!(transfer.ended(2 * PAGE), Next::Done);
        assert_eq!(transfer.left(), 0);
    }

    #[test]
    fn errors_end_it_and_passing_ones_only_when_they_do_not_pass() {
        let new = || Transfer::new(0, 2 * PAGE_SIZE);
        for errno in [Errno::IO, Errno::NOSPC, Errno::NODEV] {
            assert_eq!(new().ended(-errno.raw_os_error()), Next::Failed(errno));
        }
        assert_eq!(new().ended(0), Next::Failed(Errno::IO));
        let mut transfer = new();
        let again = -Errno::AGAIN.raw_os_error();
        let tries = (0..).take_while(|_| transfer.ended(again) == Next::Again).count() as u32;
        assert_eq!(tries, TRIES - 1);
        // Progress makes up for what was before.
        let mut transfer = new();
        (0..TRIES - 1).for_each(|_| assert_eq!(transfer.ended(512), Next::Again));
        assert_eq!(transfer.ended(PAGE), Next::Again);
        assert_eq!(transfer.ended(again), Next::Again);
    }
}
