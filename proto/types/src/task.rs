//! What a worker's core tells its engine, and what the engine answers.
//!
//! Tasks are executed in the order given. The engine stores tensor data under [`Key`]s and
//! knows lanes and tree nodes, but no ranks, peers or plans.

use crate::non_finite::Finding;
use crate::peer::{Key, LaneResult};
use crate::{Checksum, Digest, Generation, Lane, MicroId, Part, SliceId, SliceSet, SliceSum, Step, Verdict};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// One thing for the engine to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    /// A new generation starts: forget all gradients and stored payloads, and get ready to
    /// compute with these units. Weights and training state stay, those of other units too.
    Place {
        /// The units of this worker's stage; empty where it computes nothing.
        units: Range<u32>,
        /// Whether layers are computed again on the way back, to keep less of them.
        recompute: bool,
    },
    /// Take a micro-batch forward through the units, on the weights of the step before. Where
    /// another stage is before them, its [`Key::Activation`] was stored; where another one
    /// follows, the result is kept under that key to be sent. Given up silently once the fence
    /// is above `generation`, like all that computes.
    Forward {
        /// The generation that it is for.
        generation: Generation,
        /// The step.
        step: Step,
        /// The micro-batch.
        micro: MicroId,
    },
    /// Take it back, from the loss or from the next stage's [`Key::ActivationGradient`], and add
    /// up its gradients; what goes to the stage before is kept under that key. Micro-batches
    /// come in the order of lanes and numbers; the last one of a lane ends the lane, and the
    /// last lane of a sub-tree of [`cover`](crate::lanes::cover)`(lanes)` leaves its sum as
    /// [`Key::Partial`]s. Ends with [`Done::Lane`] where it ends a lane.
    Backward {
        /// The generation that it is for.
        generation: Generation,
        /// The step.
        step: Step,
        /// The micro-batch.
        micro: MicroId,
    },
    /// Add a slice's stored partial sums up to the root of the lane tree and keep the result
    /// as the slice's final gradient. Frees the received partial sums.
    Reduce {
        /// The generation that it is for.
        generation: Generation,
        /// The step.
        step: Step,
        /// The slice.
        slice: SliceId,
    },
    /// Check that the weights of these slices, which are at `step`, are what was put there, and
    /// the training state of those that have it. Ends with [`Done::Verified`]. Not given up by
    /// a fence.
    Verify {
        /// The generation that it is for.
        generation: Generation,
        /// The step that they are at.
        step: Step,
        /// The slices.
        slices: SliceSet,
    },
    /// Apply `step` to these slices with their final gradients, and set their weights; or, where
    /// it is skipped, have them as they are at this step. Checks first that gradients and
    /// training state are what was voted on. Ends with [`Done::Applied`].
    Apply {
        /// The step.
        step: Step,
        /// How.
        verdict: Verdict,
        /// The slices.
        slices: SliceSet,
    },
    /// Look for what went bad first in the lanes of a step that is not finite, on the weights of
    /// the step before. Ends with [`Done::Diagnosed`].
    Diagnose {
        /// The generation that it is for.
        generation: Generation,
        /// The step.
        step: Step,
        /// The lanes, which are this worker's.
        lanes: Range<Lane>,
    },
    /// Take a stored payload ([`Key::Weights`] or [`Key::State`]) into use.
    Install(Key),
    /// Get slices from the seed (step 0).
    Init {
        /// The slices.
        slices: SliceSet,
        /// Weights or training state.
        part: Part,
    },
    /// Get slices from the checkpoint of a step.
    Load {
        /// The generation that it is for.
        generation: Generation,
        /// The checkpoint's step.
        step: Step,
        /// The slices.
        slices: SliceSet,
        /// Weights or training state.
        part: Part,
    },
    /// Drop the training state of slices that are no longer owned.
    Drop(SliceSet),
    /// Drop the weights of units outside these, but for slices whose training state is here.
    Narrow {
        /// The units of this worker's stage.
        units: Range<u32>,
    },
    /// Write the training state of these slices, as it is now, as a part of a checkpoint.
    Save {
        /// The generation that writes it.
        generation: Generation,
        /// The step that the state is at.
        step: Step,
        /// The slices.
        slices: SliceSet,
    },
}

/// What the engine has done.
#[derive(Clone, Debug, PartialEq)]
pub enum Done {
    /// The last [`Task::Backward`] of a lane.
    Lane {
        /// The generation that it was for.
        generation: Generation,
        /// The step.
        step: Step,
        /// What came of it. Only the last stage knows the loss; it is 0 elsewhere.
        result: LaneResult,
    },
    /// A [`Task::Reduce`].
    Reduced {
        /// The generation that it was for.
        generation: Generation,
        /// The step.
        step: Step,
        /// The slice.
        slice: SliceId,
        /// Squared gradient norm of each block.
        norms: Vec<f64>,
        /// Of the final gradient.
        gradient: Checksum,
    },
    /// A [`Task::Apply`].
    Applied {
        /// The step.
        step: Step,
        /// What is here of each slice now.
        sums: Vec<(SliceId, SliceSum)>,
    },
    /// A [`Task::Diagnose`].
    Diagnosed {
        /// The generation that it was for.
        generation: Generation,
        /// The step.
        step: Step,
        /// What went bad first, where that is seen here.
        finding: Option<Finding>,
    },
    /// A [`Task::Verify`].
    Verified {
        /// The generation that it was for.
        generation: Generation,
        /// The step.
        step: Step,
        /// What is here of each slice.
        sums: Vec<(SliceId, SliceSum)>,
    },
    /// A [`Task::Load`].
    Loaded {
        /// The generation that it was for.
        generation: Generation,
        /// The slices.
        slices: SliceSet,
        /// Weights or training state.
        part: Part,
    },
    /// A [`Task::Load`] that could not be done: the checkpoint is damaged or not there.
    LoadFailed {
        /// The generation that it was for.
        generation: Generation,
        /// The checkpoint's step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// A [`Task::Save`].
    Saved {
        /// The generation that wrote it.
        generation: Generation,
        /// The step.
        step: Step,
        /// The part, or why it could not be written.
        part: Result<SavedPart, String>,
    },
}

/// One worker's part of a checkpoint, as it goes into the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedPart {
    /// File name within the checkpoint.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Hash of its content.
    pub digest: Digest,
    /// The slices in it, each with the hash of its master weights (little-endian fp32).
    pub slices: Vec<(SliceId, Digest)>,
}
