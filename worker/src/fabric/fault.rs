//! Why a fabric connection is closed.

use caravan_types::peer::Key;
use caravan_types::{Digest, Generation, WorkerId};
use caravan_wire::frame::FrameError;
use std::io;
use std::time::Duration;

/// Why a fabric connection is closed.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The peer closed it.
    #[error("the peer closed it")]
    Closed,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// Nobody answers at a peer's address.
    #[error("no connection with {address} within {within:?}: {error}")]
    Unreachable {
        /// The address.
        address: String,
        /// How long it was tried.
        within: Duration,
        /// What the last attempt said.
        error: String,
    },
    /// It opened a connection and did not say who it is.
    #[error("it did not introduce itself within {0:?}")]
    Mute(Duration),
    /// What it sent is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Its first frame is no introduction.
    #[error("its first frame does not say who it is")]
    NoHello,
    /// It introduced itself twice.
    #[error("it introduced itself a second time")]
    SecondHello,
    /// A frame bears another name than the introduction.
    #[error("it sent a frame of {from} in {generation}, for which it did not introduce itself")]
    Impostor {
        /// The name on the frame.
        from: WorkerId,
        /// The generation on the frame.
        generation: Generation,
    },
    /// A message is longer than any of this run.
    #[error("it announced a message of {got} bytes; this run's have at most {limit}")]
    BodyLength {
        /// Bytes that were announced.
        got: usize,
        /// Bytes of the largest message.
        limit: usize,
    },
    /// It works on another run.
    #[error("it belongs to the run {theirs}, this worker to {ours}")]
    Run {
        /// Hash of our run spec.
        ours: Digest,
        /// Hash of theirs.
        theirs: Digest,
    },
    /// It wanted to talk with another worker.
    #[error("it looks for {to}, which is not here")]
    WrongDoor {
        /// Whom it looks for.
        to: WorkerId,
    },
    /// Its generation is over.
    #[error("its generation {generation} is over, the fence is at {fence}")]
    Fenced {
        /// Its generation.
        generation: Generation,
        /// The fence.
        fence: Generation,
    },
    /// It is no member of its generation.
    #[error("{from} is no member of {generation}")]
    Stranger {
        /// Who it says it is.
        from: WorkerId,
        /// Its generation.
        generation: Generation,
    },
    /// It has a connection already.
    #[error("{from} already has a connection in {generation}")]
    Twice {
        /// Who it says it is.
        from: WorkerId,
        /// Its generation.
        generation: Generation,
    },
    /// Too many connections wait for their generation or for their introduction.
    #[error("too many connections wait to be let in")]
    NoRoom,
    /// Its generation did not come.
    #[error("no plan for its generation came within {0:?}")]
    ParkedTooLong(Duration),
    /// A payload has not the length that its key has.
    #[error("{key:?} came with {got} bytes, not {expected}")]
    PayloadLength {
        /// The key.
        key: Key,
        /// Bytes that the key has.
        expected: usize,
        /// Bytes that were announced.
        got: usize,
    },
    /// A key names a slice that the model has not.
    #[error("{0:?} is not of this model")]
    UnknownKey(Key),
    /// The peer talks on a connection that it should only listen to.
    #[error("it sent something over a connection that only we send over")]
    OutOfTurn,
    /// It takes so little that more than two steps' data wait for it.
    #[error("{0} frames wait for it, more than two steps can have")]
    Overrun(usize),
}
