//! Whether a queue's thread takes the processor from who wakes it.
//!
//! Who reads a page and waits for it is served best by a thread that takes the processor at once, before
//! he has fallen asleep: *urgent*. Who sends many requests without waiting is served best by one that lets
//! him go on, and then finds all of them: *patient*. A thread that is urgent cannot tell the two apart, for it
//! is done with each request before the next is sent. So it tries: after many wake-ups it is patient for a
//! few, and stays so as long as requests come together.
//!
//! Guarantees: while requests come one by one, all but [`PATIENT_WAKES`] of [`URGENT_WAKES`] +
//! [`PATIENT_WAKES`] wake-ups are urgent, and the manner changes twice in so many. A thread that has served
//! [`AWAKE_TURNS`] turns without a sleep is patient. Nothing here makes a system call: whoever asks does.

/// Wake-ups after which an urgent thread tries whether requests come together.
const URGENT_WAKES: u32 = 256;

/// Wake-ups after which a patient one decides whether it stays so.
const PATIENT_WAKES: u32 = 8;

/// Turns of serving without a sleep after which an urgent thread becomes patient: some 5 ms. What an
/// endless stream of requests leaves of its processor is then others' again.
const AWAKE_TURNS: u32 = 64;

/// Requests a wake-up from which on they come together.
const TOGETHER: u32 = 2;

/// How a thread is to be scheduled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Manner {
    /// It lets who wakes it go on.
    Patient,
    /// It takes the processor from who wakes it.
    Urgent,
}

/// See the module's description.
pub struct Urgency {
    manner: Manner,
    /// Since the manner was chosen.
    wakes: u32,
    /// Since then.
    requests: u32,
    /// Since the last sleep.
    turns: u32,
}

impl Urgency {
    /// An urgent thread's.
    pub fn new() -> Self {
        Self::of(Manner::Urgent)
    }

    fn of(manner: Manner) -> Self {
        Self { manner, wakes: 0, requests: 0, turns: 0 }
    }

    /// Takes note that the thread goes on to another turn without a sleep. The manner to change to, if it
    /// is another one.
    pub fn goes_on(&mut self) -> Option<Manner> {
        self.turns = self.turns.saturating_add(1);
        if self.manner == Manner::Patient || self.turns < AWAKE_TURNS {
            return None;
        }
        *self = Self::of(Manner::Patient);
        Some(Manner::Patient)
    }

    /// Takes note that the thread is about to sleep, and has had so many requests since it slept last.
    /// The manner to change to, if it is another one.
    pub fn sleeps_after(&mut self, requests: u32) -> Option<Manner> {
        self.turns = 0;
        if requests == 0 {
            // Something else has woken it.
            return None;
        }
        self.wakes += 1;
        self.requests = self.requests.saturating_add(requests);
        let next = match self.manner {
            Manner::Urgent if self.wakes < URGENT_WAKES => return None,
            Manner::Patient if self.wakes < PATIENT_WAKES => return None,
            Manner::Urgent => Manner::Patient,
            Manner::Patient if self.requests >= TOGETHER * self.wakes => Manner::Patient,
            Manner::Patient => Manner::Urgent,
        };
        let before = std::mem::replace(self, Self::of(next));
        (before.manner != next).then_some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often a thread woke in each manner (urgent, patient) when it found so many requests in each.
    fn wakes(count: u32, found: impl Fn(Manner) -> u32) -> (u32, u32) {
        let (mut urgency, mut manner) = (Urgency::new(), Manner::Urgent);
        let mut wakes = (0, 0);
        for _ in 0..count {
            match manner {
                Manner::Urgent => wakes.0 += 1,
                Manner::Patient => wakes.1 += 1,
            }
            if let Some(next) = urgency.sleeps_after(found(manner)) {
                assert_ne!(next, manner);
                manner = next;
            }
        }
        wakes
    }

    #[test]
    fn requests_that_come_one_by_one_find_it_urgent() {
        assert_eq!(wakes(264 * 10, |_| 1), (2560, 80));
    }

    #[test]
    fn requests_that_come_together_find_it_patient_as_soon_as_it_has_tried() {
        let found = |manner| if manner == Manner::Urgent { 1 } else { 32 };
        assert_eq!(wakes(10_000, found), (256, 9744));
    }

    #[test]
    fn it_is_urgent_again_when_they_stop_coming_together() {
        let mut urgency = Urgency::new();
        let mut woke = |times: u32, requests| {
            (0..times).filter_map(|_| urgency.sleeps_after(requests)).collect::<Vec<_>>()
        };
        assert_eq!(woke(256, 1), [Manner::Patient]);
        assert_eq!(woke(800, 2), []);
        assert_eq!(woke(7, 1), []);
        assert_eq!(woke(1, 1), [Manner::Urgent]);
    }

    #[test]
    fn who_never_sleeps_is_patient() {
        let mut urgency = Urgency::new();
        let manners: Vec<_> = (0..64).map(|_| urgency.goes_on()).collect();
        assert!(manners[..63].iter().all(Option::is_none));
        assert_eq!(manners[63], Some(Manner::Patient));
        assert!((0..1000).all(|_| urgency.goes_on().is_none()));

        let mut urgency = Urgency::new();
        for _ in 0..100 {
            assert!((0..63).all(|_| urgency.goes_on().is_none()));
            assert_eq!(urgency.sleeps_after(1), None);
        }
    }

    #[test]
    fn a_wake_up_without_a_request_says_nothing() {
        assert_eq!(wakes(1000, |_| 0), (1000, 0));
    }
}
