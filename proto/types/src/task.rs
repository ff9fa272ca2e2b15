//! What a worker's core tells its engine, and what the engine answers.
//!
//! Tasks are executed in the order given. The engine stores tensor data under [`Key`]s and
//! knows lanes and tree nodes, but no ranks, peers or plans.

use crate::peer::Key;
use crate::{Digest, Generation, Lane, Part, SliceId, SliceSet, Step};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// One thing for the engine to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    /// Forget all gradients and stored payloads: a new generation starts. Weights and
    /// training state stay.
    Reset,
    /// Compute the gradients of these lanes for `step` on the weights of the step before;
    /// keep the partial sums of [`cover`](crate::lanes::cover)`(lanes)` as
    /// [`Key::Partial`]s. Given up silently once the fence is above `generation`.
    Compute {
        /// The generation that it is for.
        generation: Generation,
        /// The step.
        step: Step,
        /// The lanes.
        lanes: Range<Lane>,
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
    /// Apply `step` to these slices with their final gradients, and set their weights.
    Apply {
        /// The step.
        step: Step,
        /// The global gradient norm.
        norm: f64,
        /// The slices.
        slices: SliceSet,
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
    /// All lanes of a [`Task::Compute`].
    Computed {
        /// The generation that it was for.
        generation: Generation,
        /// The step.
        step: Step,
        /// Each lane's summed loss, divided by the tokens of the global batch.
        losses: Vec<(Lane, f64)>,
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
