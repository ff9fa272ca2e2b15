//! What can be wrong with a ledger, in words.

use super::FORMAT;
use caravan_types::{Digest, Step};
use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why a ledger cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The disk said no.
    #[error("cannot {action} the ledger {}: {source}{}", path.display(), advice(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// A line is not what was written.
    #[error(
        "the ledger {} is not as it was written: line {line}: {flaw}. Without it nobody can prove what the run was \
         trained on. Restore the file from a copy; or move it away: the run then goes on from its newest checkpoint \
         with a ledger that begins there", path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The first bad line, from 1.
        line: u64,
        /// What is wrong with it.
        flaw: Flaw,
    },
    /// Another program wrote it.
    #[error(
        "the ledger {} has format {found}, this program reads {FORMAT}: go on with the version of caravan that wrote \
         it, or start with a new run folder", path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// It belongs to another run.
    #[error(
        "the ledger {} is that of another run (spec {found}, this run's is {ours}): put the right one back, or start \
         with a new run folder", path.display()
    )]
    OtherRun {
        /// The file.
        path: PathBuf,
        /// The spec's digest in it.
        found: Digest,
        /// That of the run.
        ours: Digest,
    },
    /// The history in it ends too early.
    #[error(
        "the ledger {} ends with step {last}, the run goes on from step {base}: an older copy of it was put here. \
         Restore the newest one; or move it away: the run then has a ledger that begins there", path.display()
    )]
    Behind {
        /// The file.
        path: PathBuf,
        /// Its newest step.
        last: Step,
        /// The step that the run goes on from.
        base: Step,
    },
    /// A committed step was not told.
    #[error(
        "step {step} was committed, but the newest step in the ledger {} is {last}: what lies between was never \
         told, and a history with a hole proves nothing. Start again: the run goes back to its newest checkpoint",
        path.display()
    )]
    Gap {
        /// The file.
        path: PathBuf,
        /// What was told.
        step: Step,
        /// The newest step in the ledger.
        last: Step,
    },
}

/// What to do about an error of the disk, where that is known.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ". Free some space and start again: the run goes on from its newest checkpoint, with the same bits"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            ". The run folder must be writable by the user who starts the coordinator"
        }
        _ => "",
    }
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// It is the last one and has no end.
    Torn,
    /// It does not look like a line of a ledger.
    Form,
    /// Its hash is not that of its entry behind the line before.
    Chain,
    /// Its hash fits, and its entry means nothing.
    Entry(String),
    /// Its entry cannot follow those before it.
    Order(Disorder),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Torn => f.write_str("it is cut off in the middle"),
            Self::Form => f.write_str("it is no hash with an entry"),
            Self::Chain => f.write_str(
                "its hash does not fit: it was changed, or what stands before it is not what stood there",
            ),
            Self::Entry(why) => write!(f, "its entry cannot be read: {why}"),
            Self::Order(disorder) => disorder.fmt(f),
        }
    }
}

/// Why an entry cannot follow those before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disorder {
    /// The first entry is another one.
    NotOpened,
    /// A second beginning.
    OpenedTwice,
    /// A step that is not the next one.
    Step {
        /// The newest step before it.
        last: Step,
        /// The step.
        found: Step,
    },
    /// A way back that leads from elsewhere or not back.
    Back {
        /// The newest step before it.
        last: Step,
        /// Where it says that it leads from.
        from: Step,
        /// Where it leads to.
        to: Step,
    },
}

impl fmt::Display for Disorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOpened => f.write_str("a ledger begins with the entry `open`, and this is another one"),
            Self::OpenedTwice => f.write_str("a second entry `open`: a ledger has one, in its first line"),
            Self::Step { last, found } if found <= last => {
                write!(f, "step {found} comes after step {last}, and no `back` lies between them")
            }
            Self::Step { last, found } if found.0 - last.0 == 2 => {
                write!(f, "step {found} follows step {last}: step {} is missing", last.0 + 1)
            }
            Self::Step { last, found } => {
                write!(
                    f,
                    "step {found} follows step {last}: steps {} to {} are missing",
                    last.0 + 1,
                    found.0 - 1
                )
            }
            Self::Back { last, from, to } => {
                write!(f, "the run went back from step {from} to step {to}, but its newest step was {last}")
            }
        }
    }
}
