//! What must survive the coordinator, and the port to where it is kept.
//!
//! Very little has to: which generations and worker ids were given (so that none is given twice),
//! the plan in force and the newest checkpoint. It changes a few times per membership change and
//! never per step, so that every append can afford to wait for the disk.
//!
//! The port has one method beyond opening. [`FileStore`] is the embedded implementation; another
//! one (etcd, say) opens in its own way and gives back the same [`State`].

mod file;

pub use file::FileStore;

use caravan_coordinator_core::{Record, Restored};
use caravan_types::{Generation, Plan, Step};
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Where records are made durable.
pub trait Store: Send + 'static {
    /// Adds records, in order; when it returns `Ok`, they survive a crash of process and host.
    ///
    /// # Errors
    /// What happened. After an error nobody knows how much was kept: the store must not be used
    /// again, only opened anew.
    fn append(&mut self, records: &[Record]) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// What all records of a store add up to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// The newest generation that was announced.
    pub generation: Generation,
    /// The first worker id that was never given.
    pub next_worker: u64,
    /// The newest plan.
    pub plan: Option<Arc<Plan>>,
    /// The checkpoint that was completed last.
    pub checkpoint: Option<Step>,
}

impl State {
    /// Takes one more record into account. Fencing numbers and ids only rise, whatever the
    /// record says: to give one twice is the one mistake that a store must not help with.
    pub fn add(&mut self, record: Record) {
        match record {
            Record::Generation(generation) => self.generation = self.generation.max(generation),
            Record::Worker(next) => self.next_worker = self.next_worker.max(next),
            Record::Plan(plan) => {
                self.generation = self.generation.max(plan.generation);
                self.plan = Some(plan);
            }
            Record::Disbanded => self.plan = None,
            Record::Checkpoint(step) => self.checkpoint = Some(step),
        }
    }

    /// The fewest records that add up to this state.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        let mut records = vec![Record::Generation(self.generation), Record::Worker(self.next_worker)];
        records.extend(self.plan.clone().map(Record::Plan));
        records.extend(self.checkpoint.map(Record::Checkpoint));
        records
    }

    /// What the core has to know of it, with the checkpoint that was found intact (the store
    /// remembers which one was written, not whether its files are still whole). `alive` says
    /// whether workers of an earlier start may be alive.
    #[must_use]
    pub fn restored(&self, checkpoint: Option<Step>, alive: bool) -> Restored {
        let (generation, next_worker) = (self.generation, self.next_worker);
        let plan = self.plan.clone().filter(|_| alive);
        Restored { generation, next_worker, checkpoint, committed: None, plan }
    }
}

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk said no.
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// Another process has it open.
    #[error(
        "{} is in use by another coordinator: two of them on one run would give out the same generations. \
         Stop the other one, or start this one on another run folder", path.display()
    )]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// It was written by a program that keeps other records.
    #[error(
        "{} has store format {found}, this program reads {ours}: go on with the version of caravan that wrote it, \
         or start with a new run folder", path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The one that this program reads.
        ours: u32,
    },
    /// What it says is not what was written.
    #[error(
        "{} is damaged at byte {offset} ({what}): generations that were given could be given again. Restore the \
         file from a copy; or, when no worker of this run is alive any more, move it away: the run then goes on \
         from its newest checkpoint", path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the bad record starts.
        offset: u64,
        /// What is wrong with it.
        what: Damage,
    },
}

/// What is wrong with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// The file does not start as one of ours.
    Header,
    /// The checksum does not fit the text.
    Checksum,
    /// The checksum fits, the text is no record.
    Record,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Header => "it does not start with a store's first line",
            Self::Checksum => "the checksum does not match the record",
            Self::Record => "the checksum matches, but this is no record",
        })
    }
}

/// What to do about an error of the disk, where that is known.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ". Free some space and start again: nothing that was committed is lost"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            ". The run folder must be writable by the user who starts the coordinator"
        }
        _ => "",
    }
}
