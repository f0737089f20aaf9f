//! Which process it is that serves: the one that has the lock on the memory file.
//!
//! The kernel lets go of the lock when the process that has it is dead: when no thread of it runs any more, and
//! none can change anything. So there is one at a time, however many wait.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use tmem::Store;

/// A process that could be the one.
pub struct Candidate {
    file: OwnedFd,
}

/// The process is the one that serves, as long as it has this.
pub struct Role {
    _file: OwnedFd,
}

impl Candidate {
    /// Makes ready to wait for the lock.
    pub fn new(store: &Store) -> io::Result<Self> {
        // Opened anew: a lock belongs to an open file, and the one that was passed on is everybody's.
        let path = format!("/proc/self/fd/{}", store.file().as_raw_fd());
        let file = open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { file })
    }

    /// Takes the lock, unless another process has it.
    pub fn try_take(self) -> Result<Role, Self> {
        match flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Role { _file: self.file }),
            // Also when it is interrupted, or there is no memory: it is tried again.
            Err(_) => Err(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hold;

    #[test]
    fn there_is_one_at_a_time() {
        let store = Store::new().unwrap();
        let take = |candidate: Candidate| candidate.try_take();
        let first = take(Candidate::new(&store).unwrap()).ok().unwrap();
        let second = take(Candidate::new(&store).unwrap()).err().unwrap();
        let mut second = Some(take(second).err().unwrap());
        drop(first);
        let try_take = || take(second.take().unwrap()).map_err(|refused| second = Some(refused));
        hold::take(try_take, |()| true).ok().unwrap();
    }
}
