//! Words in memory that outlives the process.
//!
//! All that a new process goes on from ([`crate::store`]) is made of these, and of zpages. They are the standard
//! library's atomics, in the byte order of the machine, which does not change between two processes on it; every bit
//! pattern is valid, so that such memory needs no constructor. They are not how threads talk to each other:
//! what guards a word is for its owner to say.
//!
//! What they add: changes happen in the order of the program, whatever order the code asks for towards other
//! threads. A process dies between two instructions, and what a new one finds is what all instructions before have
//! written. And for tests, [`crash::watch`] is told of each moment before such a word changes.

use std::sync::atomic::{Ordering, compiler_fence};

macro_rules! durable {
    ($name:ident, $word:ty, $atomic:ty) => {
        /// See the module's description.
        #[derive(Debug)]
        #[repr(transparent)]
        pub(crate) struct $name($atomic);

        #[allow(dead_code, reason = "the two have the same methods")]
        impl $name {
            pub(crate) const fn new(value: $word) -> Self {
                Self(<$atomic>::new(value))
            }

            pub(crate) fn load(&self, order: Ordering) -> $word {
                self.0.load(order)
            }

            #[cfg_attr(test, track_caller)]
            pub(crate) fn store(&self, value: $word, order: Ordering) {
                crash_point();
                self.0.store(value, order);
            }

            #[cfg_attr(test, track_caller)]
            pub(crate) fn fetch_add(&self, value: $word, order: Ordering) -> $word {
                crash_point();
                self.0.fetch_add(value, order)
            }

            #[cfg_attr(test, track_caller)]
            pub(crate) fn fetch_sub(&self, value: $word, order: Ordering) -> $word {
                crash_point();
                self.0.fetch_sub(value, order)
            }

            #[cfg_attr(test, track_caller)]
            pub(crate) fn fetch_and(&self, value: $word, order: Ordering) -> $word {
                crash_point();
                self.0.fetch_and(value, order)
            }

            #[cfg_attr(test, track_caller)]
            pub(crate) fn fetch_or(&self, value: $word, order: Ordering) -> $word {
                crash_point();
                self.0.fetch_or(value, order)
            }

            #[cfg_attr(test, track_caller)]
            pub(crate) fn compare_exchange(
                &self,
                old: $word,
                new: $word,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$word, $word> {
                crash_point();
                self.0.compare_exchange(old, new, success, failure)
            }
        }
    };
}

durable!(DurableU32, u32, std::sync::atomic::AtomicU32);
durable!(DurableU64, u64, std::sync::atomic::AtomicU64);

/// Where a process may die: before memory that outlives it is changed. What was written before stays before.
#[inline]
#[cfg_attr(test, track_caller)]
pub(crate) fn crash_point() {
    compiler_fence(Ordering::Release);
    #[cfg(test)]
    crash::point(std::panic::Location::caller());
}

/// Moments at which a process may die, for tests: each thread has its own.
#[cfg(test)]
pub(crate) mod crash {
    use std::cell::RefCell;

    type Place = &'static std::panic::Location<'static>;
    type Witness = Box<dyn FnMut(Place)>;

    thread_local! {
        static WITNESS: RefCell<Option<Witness>> = const { RefCell::new(None) };
    }

    /// Has `witness` told of each moment from now on, and of where in the code that is. It may change such memory
    /// itself, of which it is not told; or have another told of that meanwhile.
    pub(crate) fn watch(witness: impl FnMut(Place) + 'static) {
        WITNESS.set(Some(Box::new(witness)));
    }

    /// Has nobody called any more.
    pub(crate) fn unwatch() {
        WITNESS.take();
    }

    pub(super) fn point(place: Place) {
        let Some(mut witness) = WITNESS.take() else { return };
        witness(place);
        WITNESS.set(Some(witness));
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn each_change_is_witnessed_before_it_is_made() {
        let word = Rc::new(DurableU32::new(1));
        let seen = Rc::new(Cell::new(Vec::new()));
        let (of, to) = (Rc::clone(&word), Rc::clone(&seen));
        crash::watch(move |_| {
            let mut seen = to.take();
            seen.push(of.load(Relaxed));
            to.set(seen);
        });
        word.store(2, Relaxed);
        word.fetch_add(3, Relaxed);
        crash::unwatch();
        word.store(7, Relaxed);
        assert_eq!(seen.take(), [1, 2]);
    }
}
