//! How the rest of the process talks to a running coordinator.

use crate::CoordinatorError;
use crate::driver::Request;
use crate::journal::{JournalHandle, Update};
use caravan_types::Step;
use caravan_types::message::Farewell;
use caravan_types::status::{LoggedEvent, Phase, Snapshot, StepMetrics};
use std::sync::Arc;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

/// How a run ended.
pub type Outcome = Result<Farewell, Arc<CoordinatorError>>;

/// A cheap handle on a coordinator. It stays of use after the run's end, for what happened.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) journal: JournalHandle,
    pub(crate) outcome: watch::Receiver<Option<Outcome>>,
}

impl Handle {
    /// The run at this moment (at most a fraction of a second old).
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.journal.snapshot()
    }

    /// What happens from now on.
    #[must_use]
    pub fn subscribe(&self) -> Updates {
        Updates(self.journal.feed())
    }

    /// Steps after `since`; where they are too many for a screen, evenly thinned.
    pub async fn steps(&self, since: Step) -> Vec<StepMetrics> {
        self.journal.steps(since).await
    }

    /// Events with number `since` and later ones.
    pub async fn events(&self, since: u64) -> Vec<LoggedEvent> {
        self.journal.events(since).await
    }

    /// Asks for a checkpoint after the step in flight, and for the end of the run. Answers at
    /// once with where the run is then; harmless when repeated or too late.
    pub async fn drain(&self) -> Phase {
        let (reply, answer) = oneshot::channel();
        // What could not be sent is dropped here, and the answer with it.
        let _sent = self.requests.send(Request::Drain { reply }).await.is_ok();
        answer.await.unwrap_or_else(|_| self.snapshot().phase)
    }

    /// Waits for the end of the run: everybody has been told, and everything is written down.
    ///
    /// # Errors
    /// Why the coordinator had to stop before that.
    pub async fn ended(&self) -> Outcome {
        let mut outcome = self.outcome.clone();
        let ended = outcome.wait_for(Option::is_some).await;
        ended.ok().and_then(|o| o.clone()).unwrap_or_else(|| Err(Arc::new(CoordinatorError::Crashed)))
    }

    /// Whether the run is still going on.
    pub(crate) fn alive(&self) -> bool {
        self.outcome.borrow().is_none()
    }
}

/// A stream of [`Update`]s.
#[derive(Debug)]
pub struct Updates(pub(crate) broadcast::Receiver<Update>);

impl Updates {
    /// The next one; `None` after the end. Whoever comes too late misses some: the next snapshot
    /// has how things stand anyway.
    pub async fn next(&mut self) -> Option<Update> {
        loop {
            match self.0.recv().await {
                Ok(update) => return Some(update),
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        }
    }
}
