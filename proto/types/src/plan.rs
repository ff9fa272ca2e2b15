//! Plans: immutable, fully specific assignments. An executor has no choices left.

use crate::{Dispute, Generation, Lane, SliceId, SliceSet, Step, Verdict, WorkerId};
use serde::{Deserialize, Serialize};
use std::{fmt, ops::Range};

/// Who does what in one generation, and how everyone gets what it needs for that.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The fencing number; at most one plan has it.
    pub generation: Generation,
    /// The step at which everyone starts: its weights and state are the truth.
    pub base: Step,
    /// How step `base` is applied by a member that is one step behind and prepared. None where
    /// no member can be behind.
    pub verdict: Option<Verdict>,
    /// Whether members recompute layers on the way back; no bits depend on it.
    pub recompute: bool,
    /// The members, ascending by id.
    pub members: Vec<Member>,
    /// The pipelines; together they have every lane once.
    pub pipelines: Vec<Pipeline>,
    /// For each slice its owners; the first one is the primary, which publishes weights and
    /// writes checkpoints.
    pub owners: Vec<Vec<WorkerId>>,
    /// What has to move before a member can step.
    pub transfers: Vec<Transfer>,
    /// Members without lanes, and why.
    pub idle: Vec<(WorkerId, IdleReason)>,
    /// What owners differed about before: it is computed again, and they look at who was right.
    pub disputes: Vec<Dispute>,
}

/// A worker as the others reach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its id.
    pub worker: WorkerId,
    /// Host and port of its fabric listener.
    pub fabric: String,
}

/// An ordered list of workers that together hold the model once, and the lanes they process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipeline {
    /// The stages in order; their units tile the model.
    pub stages: Vec<Stage>,
    /// The lanes.
    pub lanes: Range<Lane>,
}

/// One worker's part of a pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// The worker.
    pub worker: WorkerId,
    /// The units that it holds.
    pub units: Range<u32>,
}

/// Something that moves to a member before it can step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Who needs it.
    pub to: WorkerId,
    /// Who has it.
    pub from: Source,
    /// Weights or training state.
    pub part: Part,
    /// Of which slices.
    pub slices: SliceSet,
}

/// What of a slice is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Part {
    /// The weights that are computed with.
    Weights,
    /// Master weights with both moments; whoever has them has the weights.
    State,
}

/// A holder of slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Source {
    /// A member that holds it.
    Peer(WorkerId),
    /// The checkpoint of the plan's base step.
    Checkpoint,
    /// Nobody: step 0 is computed from the seed.
    Init,
}

/// Why a member has no lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum IdleReason {
    /// Every lane has a pipeline of its own, and no pipeline may have one stage more.
    MoreWorkersThanLanes,
    /// It asked to leave, and stays until the others have what it holds.
    Leaving,
    /// Its memory does not hold its share of the training state; it owns nothing either.
    TooSmall,
    /// Its memory holds its share of the training state, but no stage besides.
    NoRoomForAStage,
    /// A lane or a stage on it would make every step take longer.
    WouldSlow,
    /// Pipelines have a fixed number of stages, and too few workers are left for one more.
    TooFewForAPipeline,
}

impl fmt::Display for IdleReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MoreWorkersThanLanes => f.write_str("there are more workers than lanes"),
            Self::Leaving => f.write_str("it leaves as soon as the others have what it holds"),
            Self::TooSmall => f.write_str("its memory is too small for a share of the training state"),
            Self::NoRoomForAStage => f.write_str("its memory has no room for a stage"),
            Self::WouldSlow => f.write_str("with a lane or a stage on it, every step would take longer"),
            Self::TooFewForAPipeline => f.write_str("too few workers are left for one more pipeline"),
        }
    }
}

impl Plan {
    /// Whether a worker is a member.
    #[must_use]
    pub fn has(&self, worker: WorkerId) -> bool {
        self.members.binary_search_by_key(&worker, |m| m.worker).is_ok()
    }

    /// The slices that a worker owns.
    #[must_use]
    pub fn owned_by(&self, worker: WorkerId) -> SliceSet {
        self.slices_where(|owners| owners.contains(&worker))
    }

    /// The slices whose primary owner a worker is.
    #[must_use]
    pub fn primary_of(&self, worker: WorkerId) -> SliceSet {
        self.slices_where(|owners| owners.first() == Some(&worker))
    }

    fn slices_where(&self, keep: impl Fn(&[WorkerId]) -> bool) -> SliceSet {
        let numbered = (0..).map(SliceId).zip(&self.owners);
        numbered.filter(|(_, owners)| keep(owners)).map(|(id, _)| id).collect()
    }
}
