//! What can go wrong with a coordinator as a whole.

use crate::ledger::LedgerError;
use crate::store::StoreError;
use caravan_types::timing::Disorder;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why a coordinator could not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// Somebody else listens there.
    #[error(
        "cannot listen on {address}: another process does already. Stop it, or choose another port (port 0 takes \
         any free one)"
    )]
    PortTaken {
        /// The address.
        address: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error(
        "cannot listen on {address}: {source}. It must be an address of this machine; 127.0.0.1 always is one"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system answered.
        source: io::Error,
    },
    /// The store cannot be opened or written.
    #[error("the coordinator's store: {0}")]
    Store(#[from] StoreError),
    /// The ledger cannot be opened or written.
    #[error("{0}")]
    Ledger(#[from] LedgerError),
    /// The metrics file cannot be opened.
    #[error("cannot open the metrics file {}: {source}", path.display())]
    Metrics {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// Settings that cannot work.
    #[error("{0}")]
    Settings(#[from] BadSetting),
    /// A bug.
    #[error(
        "the coordinator crashed, which is a bug in it: the log says where. The same command goes on from the last \
         checkpoint"
    )]
    Crashed,
    /// Nobody is left who could ask it for anything.
    #[error(
        "the coordinator was shut down before the run was over; the same command goes on from its last checkpoint"
    )]
    Abandoned,
}

/// A setting that cannot work, with what would.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSetting {
    /// Times contradict each other.
    #[error("the failure budget and what follows from it do not fit together: {0}")]
    Timing(Disorder),
    /// Nobody owns anything.
    #[error("redundancy must be at least 1: every slice needs an owner")]
    Redundancy,
    /// Workers cannot be told of it.
    #[error("the folder {} has a name that is not UTF-8, in which workers are told of it: choose another one", .0.display())]
    Folder(PathBuf),
    /// No checkpoint is kept.
    #[error("keep_checkpoints must be at least 1: a run without a checkpoint starts from the beginning")]
    Keep,
}
