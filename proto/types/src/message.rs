//! What a worker and the coordinator say to each other in a session.

use crate::progress::{EngineProgress, Wait};
use crate::task::SavedPart;
use crate::{
    Dispute, Generation, NonFinite, Peak, Plan, RunSpec, SliceId, SliceSet, SliceSum, Step, Timing, Verdict,
    WorkerId,
};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Version of the session protocol and the fabric's frames. Both sides must have the same.
pub const PROTOCOL_VERSION: u32 = 7;

/// Speeds, relative to one ordinary core. A thousand of the fastest accelerators are some 10^8
/// cores; sums, ratios and products of a few such numbers stay far from the ends of fp64.
pub const SPEEDS: RangeInclusive<f64> = 1e-12..=1e12;

/// A worker introduces itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub protocol: u32,
    /// Version of the program.
    pub build: String,
    /// A name for people, such as host and process id.
    pub name: String,
    /// The host it runs on; owners of one slice sit on different hosts where they can.
    pub host: String,
    /// Host and port of its fabric listener, as the other workers reach it.
    pub fabric: String,
    /// The instruction families that it can run, its preferred one first.
    pub families: Vec<String>,
    /// Compute threads.
    pub threads: u32,
    /// Set where a worker that was taken on before has lost its session and wants to go on
    /// with the same id: the coordinator may have been restarted.
    pub resume: Option<WorkerId>,
    /// Memory that it may use, in bytes; 0 where that is not known.
    pub memory: u64,
    /// How fast it computes, relative to one ordinary core; one of [`SPEEDS`].
    pub speed: f64,
}

/// What the coordinator tells a worker that it takes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// The worker's id.
    pub worker: WorkerId,
    /// The run.
    pub spec: RunSpec,
    /// Owners per slice, where there are so many members.
    pub redundancy: u32,
    /// The failure budget, and what follows from it.
    pub timing: Timing,
    /// A checkpoint is written after each step that this divides; never where 0.
    pub checkpoint_every: u64,
    /// Folder of the prepared data.
    pub data: String,
    /// Folder of the checkpoints.
    pub checkpoints: String,
    /// The list of the weights that the run starts with, where these are not the seed's.
    pub init: Option<String>,
    /// The newest step that the coordinator knows to be committed. A worker that comes back
    /// tells those after it again.
    pub committed: Step,
}

/// Why a worker is not taken on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The two programs speak different protocols.
    Protocol {
        /// The coordinator's version.
        ours: u32,
        /// The worker's version.
        theirs: u32,
    },
    /// The worker cannot run the run's numerics class.
    Numerics {
        /// The instruction family that the run needs.
        needed: String,
        /// What the worker can run.
        offered: Vec<String>,
    },
    /// The run is over, in this way: there is nothing left to work for.
    Over(Farewell),
    /// The run is being drained.
    NotTaking,
    /// A worker wants to go on with an id that is no member's any more.
    Fenced {
        /// The id.
        worker: WorkerId,
        /// The generation that goes on without it.
        generation: Generation,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Protocol { ours, theirs } => write!(
                f,
                "the coordinator speaks protocol {ours}, this worker {theirs}: start a worker of the coordinator's version"
            ),
            Self::Numerics { needed, offered } => write!(
                f,
                "this run's numerics class needs the instruction family {needed:?}, this machine offers {offered:?}: \
                 start the worker on a machine that has {needed:?}, or start a new run with kernels = {:?}",
                offered.first().map_or("portable", String::as_str)
            ),
            Self::Over(farewell) => write!(f, "{farewell}"),
            Self::NotTaking => f.write_str("the run is stopping, and takes no more workers"),
            Self::Fenced { worker, generation } => write!(
                f,
                "{worker} was silent for longer than the failure budget, or not back in time, and {generation} goes \
                 on without it: start the worker again, and it joins anew"
            ),
        }
    }
}

/// From worker to coordinator, after the [`Hello`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromWorker {
    /// "I live": sent several times within the failure budget.
    Heartbeat {
        /// The newest step that it has applied.
        applied: Step,
        /// What it is doing.
        activity: Activity,
        /// What it needs before it can go on.
        wait: Wait,
        /// How far its engine is.
        engine: EngineProgress,
    },
    /// What it could compute at most: the first that it says after each [`Welcome`].
    Peak(Peak),
    /// The answer to [`ToWorker::Stop`], and a promise: nothing more is done in an older
    /// generation.
    Report(Report),
    /// A step was committed.
    Committed(Committed),
    /// A fabric connection of this generation broke.
    PeerLost {
        /// The generation.
        generation: Generation,
        /// The member at the other end.
        peer: WorkerId,
    },
    /// Owners of a slice differ: the step that was voted on is not committed.
    Diverged {
        /// The generation.
        generation: Generation,
        /// The step that was voted on.
        step: Step,
        /// What they differ about, and who says what: everything, in the order of slices.
        disputes: Vec<Dispute>,
    },
    /// What earlier owners differed about was computed again, as the plan's disputes say: now
    /// all owners say the same.
    Settled {
        /// The generation.
        generation: Generation,
        /// The plan's disputes that are settled, with what is said now by all.
        disputes: Vec<Dispute>,
    },
    /// Something in this worker's memory is not what it put there: it ends.
    Corrupt {
        /// What is not.
        what: String,
    },
    /// What this worker, as an owner, has of its slices at a step that a checkpoint is written
    /// of: it is complete only where all owners have the same.
    Vouched {
        /// The generation.
        generation: Generation,
        /// The step.
        step: Step,
        /// Each slice that it owns.
        sums: Vec<(SliceId, SliceSum)>,
    },
    /// A part of a checkpoint was written, or why not.
    Saved {
        /// The generation that it was asked in.
        generation: Generation,
        /// The step.
        step: Step,
        /// The part, or the reason.
        part: Result<SavedPart, String>,
    },
    /// The checkpoint that the plan starts from could not be loaded.
    LoadFailed {
        /// The plan's generation.
        generation: Generation,
        /// The checkpoint's step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// A step's loss or gradient is not finite.
    NonFinite(NonFinite),
    /// The worker was asked to go and wants to, at a step boundary.
    Leaving,
}

/// What a worker has, when it stops for a new generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The generation that the promise is for.
    pub generation: Generation,
    /// The newest step that it has applied.
    pub applied: Step,
    /// How that step was applied, where known.
    pub verdict: Option<Verdict>,
    /// The slices whose training state it holds at `applied`.
    pub state: SliceSet,
    /// The slices whose weights it holds at `applied`.
    pub weights: SliceSet,
    /// Where it is prepared for `applied + 1`: the slices whose final gradients it has.
    pub prepared: Option<SliceSet>,
    /// What it has of the slices in `state`, as far as it has looked.
    pub sums: Vec<(SliceId, SliceSum)>,
}

/// A committed step, as a member saw it. Where its loss or norm is not finite, it was skipped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Committed {
    /// The generation.
    pub generation: Generation,
    /// The step.
    pub step: Step,
    /// Mean loss over the counted tokens of the global batch, in nats.
    #[serde(with = "crate::exact")]
    pub loss: f64,
    /// Global gradient norm before clipping.
    #[serde(with = "crate::exact")]
    pub norm: f64,
    /// Counted tokens of the global batch.
    pub tokens: u64,
    /// Milliseconds since the member's last commit or the start of its generation.
    pub took_ms: u64,
}

impl Committed {
    /// How the step was applied.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        Verdict::of(self.norm, self.loss)
    }
}

/// What a worker is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Waiting for a plan.
    #[default]
    Waiting,
    /// Getting what the plan says it must have.
    Healing,
    /// Computing gradients.
    Computing,
    /// Adding gradients up, with the other owners.
    Reducing,
    /// Prepared, waiting for the others' votes.
    Preparing,
    /// Waiting for published weights.
    Publishing,
    /// The run is finished.
    Finished,
}

impl fmt::Display for Activity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waiting",
            Self::Healing => "healing",
            Self::Computing => "computing",
            Self::Reducing => "reducing",
            Self::Preparing => "preparing",
            Self::Publishing => "publishing",
            Self::Finished => "finished",
        })
    }
}

/// From coordinator to worker, after the [`Welcome`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToWorker {
    /// Stop for a new generation and send a [`Report`].
    Stop {
        /// The generation to come.
        generation: Generation,
        /// Whether to finish the step in flight first (a change that is wanted) or to stop
        /// at once (a change that is suffered).
        boundary: bool,
    },
    /// The plan of the generation that was stopped for. All members are told the same one.
    Plan(Arc<Plan>),
    /// Write these slices, which the worker reported at `step`, as a part of a checkpoint.
    Save {
        /// The generation that was stopped for.
        generation: Generation,
        /// The step.
        step: Step,
        /// The slices.
        slices: SliceSet,
    },
    /// End the process.
    Goodbye(Farewell),
}

/// Why a worker is told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Farewell {
    /// All steps are done.
    Finished,
    /// The run was drained; it goes on another time.
    Drained,
    /// The worker asked to leave, and is not needed any more.
    Left,
    /// The others went on without it; it may start again.
    Fenced,
    /// The run cannot go on.
    Failed,
    /// The worker had other bits than the others; they went on without it. It may start again.
    Corrupt,
    /// The run stopped before a step whose loss or gradient is not finite.
    NonFinite,
}

impl fmt::Display for Farewell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Finished => "the run is finished",
            Self::Drained => "the run was drained",
            Self::Left => "this worker asked to leave",
            Self::Fenced => "the others went on without this worker",
            Self::Failed => "the run cannot go on",
            Self::NonFinite => "the run stopped before a step whose loss or gradient is not finite",
            Self::Corrupt => {
                "this worker computed or kept other bits than the others, who went on without it: its memory or one \
                 of its cores may be broken"
            }
        })
    }
}
