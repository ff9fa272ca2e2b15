//! Why a worker ends other than by a farewell, and with which exit code.

use crate::engine::{Fault, Overrun};
use caravan_types::message::{Farewell, Refusal};
use caravan_wire::CannotConnect;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// Why a worker ends.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The coordinator's address cannot be one.
    #[error(transparent)]
    Address(CannotConnect),
    /// No coordinator took the worker on in time.
    #[error(
        "no coordinator at {address} took this worker on within {patience:?}: {reason}. \
         Check the address, and that the coordinator runs and prints it at its start"
    )]
    Unreachable {
        /// The address.
        address: String,
        /// How long it was tried.
        patience: Duration,
        /// What the last attempt said.
        reason: String,
    },
    /// The coordinator does not want this worker.
    #[error("the coordinator refused this worker: {0}")]
    Refused(Refusal),
    /// What answers is no coordinator of this version.
    #[error(
        "what answers at {address} breaks the session's protocol: {reason}. Check that the address is the one that \
         the coordinator prints at its start, and that both are of one version"
    )]
    Protocol {
        /// The address.
        address: String,
        /// What is wrong.
        reason: String,
    },
    /// The session ended.
    #[error("coordinator is gone: {reason}")]
    CoordinatorGone {
        /// How that was noticed.
        reason: String,
    },
    /// Another run's coordinator answers where this run's was.
    #[error(
        "another run's coordinator answers at this run's address, and nothing here belongs to it: start the worker \
         again to have it join that run, or start this run's coordinator at another address"
    )]
    OtherRun,
    /// The fabric's address cannot be listened on.
    #[error("cannot listen for other workers on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The system gave no thread or no signal handler.
    #[error("cannot start: {0}")]
    Start(io::Error),
    /// The engine cannot go on.
    #[error("the engine failed at {doing}: {fault}")]
    Engine {
        /// What it was doing.
        doing: String,
        /// Why it could not.
        fault: Fault,
    },
    /// Memory does not hold what was put there.
    #[error("corrupt, at {doing}: {what}")]
    Corrupt {
        /// What the engine was doing.
        doing: String,
        /// What has changed.
        what: String,
    },
    /// More was asked of the engine than the protocol allows.
    #[error(transparent)]
    Overrun(#[from] Overrun),
    /// A second signal: the user does not want to wait.
    #[error("interrupted a second time, so not waiting for the end of the step")]
    Interrupted,
}

/// How a process ends that is no worker any more, for whoever started it.
///
/// The numbers are part of the command line's interface. Restarting helps after
/// [`CoordinatorGone`](Self::CoordinatorGone), [`Fenced`](Self::Fenced),
/// [`Failed`](Self::Failed) and [`Corrupt`](Self::Corrupt), and nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Finished, drained, or left.
    Good = 0,
    /// Something went wrong here.
    Failed = 1,
    /// What was given on the command line cannot work.
    Usage = 2,
    /// The coordinator refused this worker.
    Refused = 10,
    /// There is no coordinator, or none any more.
    CoordinatorGone = 11,
    /// The engine failed.
    Engine = 12,
    /// The others went on without this worker.
    Fenced = 13,
    /// The run itself cannot go on.
    RunFailed = 14,
    /// This worker had wrong bits.
    Corrupt = 15,
    /// The run stopped before a step whose loss or gradient is not finite.
    NonFinite = 16,
    /// Ended by a second signal: 128 + SIGINT, as shells have it.
    Interrupted = 130,
}

impl From<&Result<Farewell, WorkerError>> for Exit {
    fn from(ended: &Result<Farewell, WorkerError>) -> Self {
        match ended {
            Ok(Farewell::Finished | Farewell::Drained | Farewell::Left) => Self::Good,
            Ok(Farewell::Fenced) => Self::Fenced,
            Ok(Farewell::Failed) => Self::RunFailed,
            Ok(Farewell::Corrupt) => Self::Corrupt,
            Ok(Farewell::NonFinite) => Self::NonFinite,
            Err(WorkerError::Corrupt { .. }) => Self::Corrupt,
            Err(WorkerError::Address(_) | WorkerError::Listen { .. }) => Self::Usage,
            Err(WorkerError::Refused(Refusal::Fenced { .. })) => Self::Fenced,
            Err(WorkerError::Refused(_) | WorkerError::Protocol { .. } | WorkerError::OtherRun) => {
                Self::Refused
            }
            Err(WorkerError::Unreachable { .. } | WorkerError::CoordinatorGone { .. }) => {
                Self::CoordinatorGone
            }
            Err(WorkerError::Engine { .. } | WorkerError::Overrun(_)) => Self::Engine,
            Err(WorkerError::Start(_)) => Self::Failed,
            Err(WorkerError::Interrupted) => Self::Interrupted,
        }
    }
}
