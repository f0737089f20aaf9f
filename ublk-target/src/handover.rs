//! An upgrade as the worker sees it: somebody asks for one, the supervisor sees to it, and tells how it ended.
//!
//! If it succeeds, who asked this worker is not answered: the worker is killed, and the one of the new program is told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::exit::{Exit, Failure};
use crate::supervisor::{Link, News};

/// How long the supervisor may take: somewhat longer than it gives the new program.
const LIMIT: Duration = Duration::from_secs(150);

/// See the module's description.
#[derive(Debug, Default)]
pub struct Handover {
    /// None where there is no supervisor.
    link: Option<Arc<Link>>,
    outcome: Mutex<Outcome>,
    changed: Condvar,
}

/// What became of an upgrade.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Outcome {
    /// Nobody has asked this process for one, and nobody has told it of one.
    #[default]
    None,
    /// It is under way.
    Pending,
    /// This process is of the new program.
    Done,
    /// The old one goes on, and why.
    Failed(Failure),
}

impl Handover {
    /// By this supervisor.
    pub fn by(link: Arc<Link>) -> Self {
        Self { link: Some(link), ..Self::default() }
    }

    /// Asks for an upgrade, and waits for how it ends. If it succeeds, this process has ended by then.
    pub fn ask(&self) -> Result<(), Failure> {
        let mut outcome = self.outcome.lock();
        *outcome = Outcome::Pending;
        let sent = self.link.as_ref().map(|link| link.send(&News::Upgrade));
        if !matches!(sent, Some(Ok(()))) {
            *outcome = Outcome::None;
            let message = "not upgraded: the daemon has no supervisor any more: 'tmem recover' brings one, and of a service a restart";
            return Err(Failure::new(Exit::Failure, message));
        }
        let deadline = Instant::now() + LIMIT;
        while *outcome == Outcome::Pending {
            if self.changed.wait_until(&mut outcome, deadline).timed_out() {
                *outcome = Outcome::None;
            }
        }
        match &*outcome {
            Outcome::Failed(failure) => Err(failure.clone()),
            Outcome::Done => Ok(()),
            _ => Err(Failure::new(Exit::Failure, "not upgraded: the supervisor does not answer")),
        }
    }

    /// What became of the last one that this process knows of.
    pub fn outcome(&self) -> Outcome {
        self.outcome.lock().clone()
    }

    /// The supervisor has told: why the old program goes on, if it does.
    pub fn ended(&self, failure: Option<Failure>) {
        *self.outcome.lock() = failure.map_or(Outcome::Done, Outcome::Failed);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::{Order, Received};

    #[test]
    fn who_asks_is_told_what_the_supervisor_says() {
        let (supervisor, worker) = Link::pair().unwrap();
        let handover = Handover::by(Arc::new(worker));
        assert_eq!(handover.outcome(), Outcome::None);
        for failure in [Some(Failure::new(Exit::Failure, "because")), None] {
            std::thread::scope(|scope| {
                let asked = scope.spawn(|| handover.ask());
                let news = supervisor.wait::<News>(Duration::from_secs(20)).unwrap();
                assert!(matches!(news, Received::Message(News::Upgrade)));
                assert_eq!(handover.outcome(), Outcome::Pending);
                handover.ended(failure.clone());
                assert_eq!(asked.join().unwrap().err(), failure);
            });
        }
        assert_eq!(handover.outcome(), Outcome::Done);
    }

    #[test]
    fn without_a_supervisor_nobody_waits() {
        assert!(Handover::default().ask().is_err());
        let (supervisor, worker) = Link::pair().unwrap();
        drop(supervisor);
        // A child that another test starts has it for a moment.
        let received = worker.wait::<Order>(Duration::from_secs(20)).unwrap();
        assert!(matches!(received, Received::Closed));
        let handover = Handover::by(Arc::new(worker));
        assert!(handover.ask().unwrap_err().message.contains("no supervisor"));
        assert_eq!(handover.outcome(), Outcome::None);
    }
}
