//! The session with the coordinator: being taken on, and what is said from then on.
//!
//! The coordinator may start after its workers, so joining is tried for a while. Stepping needs
//! no coordinator, so a session that broke off does not end the worker: it is opened again, with
//! the id that the worker has, for as long as [`Timing::orphaned`]. A coordinator that was restarted
//! takes the worker back; one that went on without it says so, and the worker ends. What is told
//! meanwhile is not kept here: the core tells again what still matters.

use crate::error::WorkerError;
use caravan_types::message::{FromWorker, Hello, ToWorker, Welcome};
use caravan_types::{Peak, Timing};
use caravan_wire::{CannotConnect, Down, Timeouts, Up, connect, pb};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// First pause between two attempts; doubled each time, up to [`Timing::retry`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// What waits to be sent: a commit a step, some heartbeats, and the answers to a regrouping.
/// At 20 steps a second this is as long as a silent coordinator is kept anyway.
const WAITING: usize = 2048;

/// A session, open or being opened again.
pub struct Session {
    address: String,
    hello: Hello,
    timing: Timing,
    /// What every coordinator is told first.
    peak: Option<Peak>,
    link: Link,
}

enum Link {
    Open(Box<Open>),
    /// A task looks for the coordinator.
    Opening(JoinHandle<Result<(Open, Welcome), WorkerError>>),
}

/// The streams of a session.
struct Open {
    up: mpsc::Sender<Up>,
    down: Streaming<pb::ToWorker>,
}

/// What comes of a session.
#[derive(Debug, PartialEq)]
pub enum Said {
    /// The coordinator says something.
    Message(ToWorker),
    /// The session broke off, and why; nobody hears what is told from here on.
    Lost(String),
    /// The coordinator has taken the worker back.
    Back(Box<Welcome>),
}

/// What an attempt to join came to, where it was not a welcome.
enum Attempt {
    /// Another one may do better.
    Again(String),
    /// No other one will.
    Final(WorkerError),
}

impl Session {
    /// Finds the coordinator and is taken on. The run's own times come with the welcome; until
    /// then, and for this first connection, `timing` is what counts.
    ///
    /// # Errors
    /// [`WorkerError::Unreachable`] where that did not happen within [`Timing::join`],
    /// [`WorkerError::Refused`], and [`WorkerError::Address`] or [`WorkerError::Protocol`]
    /// where trying again cannot help.
    pub async fn join(address: &str, hello: &Hello, timing: Timing) -> Result<(Self, Welcome), WorkerError> {
        let (open, welcome) = open(address, hello, timing, timing.join()).await?;
        let timing = welcome.timing;
        let hello = Hello { resume: Some(welcome.worker), ..hello.clone() };
        let (address, link) = (address.to_owned(), Link::Open(Box::new(open)));
        Ok((Self { address, hello, timing, peak: None, link }, welcome))
    }

    /// Says what this worker could compute at most, now and whenever it is taken back.
    pub fn measured(&mut self, peak: Peak) {
        self.peak = Some(peak.clone());
        self.tell(FromWorker::Peak(peak));
    }

    /// Says something, without waiting. While the session is being opened again, and where the
    /// coordinator has not listened for very long, nobody hears it.
    pub fn tell(&mut self, message: FromWorker) {
        let Link::Open(open) = &self.link else { return };
        match open.up.try_send(Up::Message(message)) {
            // Where the session is over, `next` says why.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::warn!("{WAITING} messages wait for the coordinator and it reads none");
                self.reopen();
            }
        }
    }

    /// Waits for what comes next. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`WorkerError::CoordinatorGone`] where it broke the protocol, [`WorkerError::Refused`]
    /// where it goes on without this worker, and [`WorkerError::Unreachable`] where it was not
    /// found again.
    pub async fn next(&mut self) -> Result<Said, WorkerError> {
        match &mut self.link {
            Link::Open(open) => match open.down.next().await {
                None => Ok(self.lost("it closed the session".into())),
                Some(Err(status)) => Ok(self.lost(said(&status))),
                Some(Ok(message)) => Down::try_from(message)
                    .and_then(Down::message)
                    .map(Said::Message)
                    .map_err(|malformed| gone(format!("it broke the session's protocol: {malformed}"))),
            },
            Link::Opening(task) => {
                let opened = task.await.map_err(|_| gone("the search for it ended".into()))?;
                let (open, welcome) = opened?;
                self.link = Link::Open(Box::new(open));
                if let Some(peak) = self.peak.clone() {
                    self.tell(FromWorker::Peak(peak));
                }
                Ok(Said::Back(Box::new(welcome)))
            }
        }
    }

    fn lost(&mut self, reason: String) -> Said {
        tracing::warn!(reason, "lost the coordinator: stepping goes on while it is looked for");
        self.reopen();
        Said::Lost(reason)
    }

    fn reopen(&mut self) {
        let (address, hello, timing) = (self.address.clone(), self.hello.clone(), self.timing);
        let search = async move { open(&address, &hello, timing, timing.orphaned()).await };
        self.link = Link::Opening(tokio::spawn(search));
    }

    /// Closes the session, so that what was told is heard.
    pub async fn close(self) {
        let Link::Open(open) = self.link else { return };
        let Open { up, mut down } = *open;
        drop(up);
        // Whatever the coordinator still says or fails at, this worker ends.
        timeout(self.timing.close(), async { while down.next().await.is_some_and(|said| said.is_ok()) {} })
            .await
            .ok();
    }
}

/// Looks for the coordinator until it takes the worker on or turns it away.
async fn open(
    address: &str,
    hello: &Hello,
    timing: Timing,
    patience: Duration,
) -> Result<(Open, Welcome), WorkerError> {
    let deadline = Instant::now() + patience;
    let mut pause = FIRST_PAUSE;
    let mut reason = "it does not answer".to_owned();
    loop {
        match timeout_at(deadline, attempt(address, hello, timing)).await {
            Ok(Ok(joined)) => return Ok(joined),
            Ok(Err(Attempt::Final(error))) => return Err(error),
            Ok(Err(Attempt::Again(why))) => {
                tracing::debug!(reason = why, "could not join yet");
                reason = why;
            }
            Err(_) => {}
        }
        if Instant::now() + pause >= deadline {
            return Err(WorkerError::Unreachable { address: address.to_owned(), patience, reason });
        }
        sleep(pause).await;
        pause = (pause * 2).min(timing.retry());
    }
}

async fn attempt(address: &str, hello: &Hello, timing: Timing) -> Result<(Open, Welcome), Attempt> {
    let timeouts = Timeouts {
        connect: timing.connect(),
        keep_alive: timing.session_probe(),
        keep_alive_timeout: timing.session_answer(),
    };
    let again = |status: Status| match status.code() {
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => {
            Attempt::Again(said(&status))
        }
        _ => Attempt::Final(protocol(address, said(&status))),
    };
    let mut client = connect(address, timeouts).await.map_err(|cannot| match cannot {
        CannotConnect::Address { .. } => Attempt::Final(WorkerError::Address(cannot)),
        CannotConnect::Nobody { reason, .. } => Attempt::Again(reason),
    })?;
    let (up, queue) = mpsc::channel(WAITING);
    // The queue is new and has room.
    up.try_send(Up::Hello(hello.clone())).ok();
    let stream = ReceiverStream::new(queue).map(pb::FromWorker::from);
    let mut down = client.session(stream).await.map_err(again)?.into_inner();
    let first = down.message().await.map_err(again)?;
    let first = first.ok_or_else(|| Attempt::Again("it closed the session without an answer".into()))?;
    match Down::try_from(first).and_then(Down::answer) {
        Ok(Ok(welcome)) => Ok((Open { up, down }, *welcome)),
        Ok(Err(refusal)) => Err(Attempt::Final(WorkerError::Refused(refusal))),
        Err(malformed) => Err(Attempt::Final(protocol(address, malformed.to_string()))),
    }
}

fn protocol(address: &str, reason: String) -> WorkerError {
    WorkerError::Protocol { address: address.to_owned(), reason }
}

fn gone(reason: String) -> WorkerError {
    WorkerError::CoordinatorGone { reason }
}

/// A status as people read it.
fn said(status: &Status) -> String {
    match status.message() {
        "" => status.code().to_string(),
        message => message.to_owned(),
    }
}

#[cfg(test)]
mod tests;
