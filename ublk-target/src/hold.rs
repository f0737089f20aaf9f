//! Hold of what one process at a time may have (a lock on a file, a device opened exclusively), waited for a moment.
//!
//! Such a hold belongs to an open file, and may outlast whoever let go of it, or died: by the I/O that is under way on it,
//! and by a child that was just started, which has open all that its parent had until it runs its program. So a refusal is
//! believed only when it lasts. Who waits here is somebody whom no I/O depends on.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long a hold is waited for.
const LIMIT: Duration = Duration::from_secs(1);

/// How long until it is tried again.
const PERIOD: Duration = Duration::from_millis(10);

/// Tries to take a hold until nobody else has it, by `is_held`, or a moment has passed. Returns what the last try did.
pub fn take<T, E>(
    mut try_take: impl FnMut() -> Result<T, E>,
    is_held: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let begun = Instant::now();
    loop {
        match try_take() {
            Err(error) if is_held(&error) && begun.elapsed() < LIMIT => sleep(PERIOD),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs::{File, TryLockError};

    use super::*;

    #[test]
    fn what_is_let_go_of_within_a_moment_is_had() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("file");
        let other = File::create(&path).unwrap();
        other.try_lock().unwrap();
        let (mut other, mine) = (Some(other), File::open(&path).unwrap());
        let mut refusals = 0;
        let try_take = || {
            let result = mine.try_lock();
            refusals += usize::from(result.is_err());
            // The other lets go of it when it has been tried in vain.
            drop(other.take());
            result
        };
        take(try_take, |error| matches!(error, TryLockError::WouldBlock)).unwrap();
        assert!(refusals > 0);
        assert!(File::open(&path).unwrap().try_lock().is_err(), "it is had");
    }

    #[test]
    fn what_stays_held_is_refused_and_what_fails_is_not_tried_again() {
        let refused = take(|| Err::<(), _>("held"), |error| *error == "held");
        assert_eq!(refused, Err("held"));
        let tries = Cell::new(0);
        let try_take = || {
            tries.set(tries.get() + 1);
            Err::<(), _>("broken")
        };
        assert_eq!(take(try_take, |error| *error == "held"), Err("broken"));
        assert_eq!(tries.get(), 1);
    }
}
