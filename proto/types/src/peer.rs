//! What workers of one generation say to each other over the fabric.

use crate::{Generation, Lane, Node, SliceId, Step};
use serde::{Deserialize, Serialize};

/// Names a piece of tensor data: what a frame carries and what the engine stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Key {
    /// The sum of a sub-tree's lane gradients in a slice, fp32: one value an element.
    Partial {
        /// The step that the gradient is for.
        step: Step,
        /// The slice.
        slice: SliceId,
        /// The sub-tree of lanes.
        node: Node,
    },
    /// A slice's weights as they are computed with, after `step`.
    Weights {
        /// The step.
        step: Step,
        /// The slice.
        slice: SliceId,
    },
    /// A slice's training state after `step`: master weights, first moments, second moments,
    /// fp32, one after the other.
    State {
        /// The step.
        step: Step,
        /// The slice.
        slice: SliceId,
    },
}

impl Key {
    /// The step that the data belongs to.
    #[must_use]
    pub fn step(&self) -> Step {
        match *self {
            Self::Partial { step, .. } | Self::Weights { step, .. } | Self::State { step, .. } => step,
        }
    }

    /// The slice that the data belongs to.
    #[must_use]
    pub fn slice(&self) -> SliceId {
        match *self {
            Self::Partial { slice, .. } | Self::Weights { slice, .. } | Self::State { slice, .. } => slice,
        }
    }
}

/// One message between two members.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PeerMessage {
    /// Tensor data; the payload travels beside it.
    Data(Key),
    /// "I have the final gradients of my slices."
    Prepared(Prepared),
}

/// A member's vote for a step, and its part of the global norm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prepared {
    /// The step.
    pub step: Step,
    /// For each slice that the sender owns, the squared norm of each block's gradient.
    pub norms: Vec<(SliceId, Vec<f64>)>,
    /// For each lane that the sender computed, its summed loss (already divided by the
    /// tokens of the global batch).
    pub losses: Vec<(Lane, f64)>,
    /// The generation for which the coordinator wants everyone to stop after this step.
    /// All members see the same votes, so all stop at the same step.
    pub stop_for: Option<Generation>,
}
