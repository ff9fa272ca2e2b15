//! The session with the coordinator: being taken on, and what is said from then on.
//!
//! The coordinator may start after its workers, so joining is tried for a while. A session
//! that ended is not opened again: the worker's process ends with it (see
//! [`Session::next`], the one place where that is decided), and whoever started it starts
//! it again.

use crate::error::WorkerError;
use caravan_types::message::{FromWorker, Hello, ToWorker, Welcome};
use caravan_wire::{CannotConnect, Down, Timeouts, Up, connect, pb};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// For how long a coordinator is looked for: it may have to train a tokenizer first, but then
/// whoever started both waits for it; this is for a coordinator that starts beside us. The
/// failure budget, from which other times derive, comes with the welcome.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// First pause between two attempts; doubled each time, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// A newly started coordinator is found within this.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Stepping does not wait for the coordinator, so a busy or paused one is left in peace for
/// long; this is for one whose host is gone without a word.
const TIMEOUTS: Timeouts = Timeouts {
    connect: Duration::from_secs(5),
    keep_alive: Duration::from_secs(10),
    keep_alive_timeout: Duration::from_secs(60),
};

/// What waits to be sent: a commit a step, some heartbeats, and the answers to a regrouping.
/// At 20 steps a second this is as long as a silent coordinator is kept anyway.
const WAITING: usize = 2048;

/// How long a worker that says goodbye waits for the other end to have heard.
const CLOSING: Duration = Duration::from_millis(500);

/// An open session.
pub struct Session {
    up: mpsc::Sender<Up>,
    down: Streaming<pb::ToWorker>,
}

/// What an attempt to join came to, where it was not a welcome.
enum Attempt {
    /// Another one may do better.
    Again(String),
    /// No other one will.
    Final(WorkerError),
}

impl Session {
    /// Finds the coordinator and is taken on.
    ///
    /// # Errors
    /// [`WorkerError::Unreachable`] where that did not happen within [`PATIENCE`],
    /// [`WorkerError::Refused`], and [`WorkerError::Address`] or [`WorkerError::Protocol`]
    /// where trying again cannot help.
    pub async fn join(
        address: &str,
        hello: &Hello,
        patience: Duration,
    ) -> Result<(Self, Welcome), WorkerError> {
        let deadline = Instant::now() + patience;
        let mut pause = FIRST_PAUSE;
        let mut reason = "it does not answer".to_owned();
        loop {
            match timeout_at(deadline, attempt(address, hello)).await {
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
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Says something, without waiting.
    ///
    /// # Errors
    /// [`WorkerError::CoordinatorGone`] where it has not listened for very long.
    pub fn tell(&self, message: FromWorker) -> Result<(), WorkerError> {
        match self.up.try_send(Up::Message(message)) {
            Ok(()) => Ok(()),
            // The session is over, and `next` says why.
            Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(gone(format!("{WAITING} messages wait for it and it reads none")))
            }
        }
    }

    /// Waits for the coordinator's next message. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`WorkerError::CoordinatorGone`] where the session ended.
    pub async fn next(&mut self) -> Result<ToWorker, WorkerError> {
        match self.down.next().await {
            None => Err(gone("it closed the session".into())),
            Some(Err(status)) => Err(gone(said(&status))),
            Some(Ok(message)) => Down::try_from(message)
                .and_then(Down::message)
                .map_err(|malformed| gone(format!("it broke the session's protocol: {malformed}"))),
        }
    }

    /// Closes the session, so that what was told is heard.
    pub async fn close(self) {
        let Self { up, mut down } = self;
        drop(up);
        // Whatever the coordinator still says or fails at, this worker ends.
        timeout(CLOSING, async { while down.next().await.is_some_and(|said| said.is_ok()) {} }).await.ok();
    }
}

async fn attempt(address: &str, hello: &Hello) -> Result<(Session, Welcome), Attempt> {
    let again = |status: Status| match status.code() {
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => {
            Attempt::Again(said(&status))
        }
        _ => Attempt::Final(protocol(address, said(&status))),
    };
    let mut client = connect(address, TIMEOUTS).await.map_err(|cannot| match cannot {
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
        Ok(Ok(welcome)) => Ok((Session { up, down }, *welcome)),
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
