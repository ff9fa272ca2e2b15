//! What workers of one generation say to each other over the fabric.

use crate::{Checksum, Generation, Lane, MicroId, Node, Opinion, SliceId, SliceSum, Step};
use serde::{Deserialize, Serialize};
use std::fmt;

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
    /// The residual stream of a micro-batch on its way to the next stage: [tokens, dim], fp32.
    Activation {
        /// The step.
        step: Step,
        /// The micro-batch.
        micro: MicroId,
    },
    /// The loss's gradient in that residual stream, on its way back: [tokens, dim], fp32.
    ActivationGradient {
        /// The step.
        step: Step,
        /// The micro-batch.
        micro: MicroId,
    },
}

impl Key {
    /// The step that the data belongs to.
    #[must_use]
    pub fn step(&self) -> Step {
        match *self {
            Self::Partial { step, .. }
            | Self::Weights { step, .. }
            | Self::State { step, .. }
            | Self::Activation { step, .. }
            | Self::ActivationGradient { step, .. } => step,
        }
    }

    /// The slice that the data belongs to; none for what belongs to a micro-batch.
    #[must_use]
    pub fn slice(&self) -> Option<SliceId> {
        match *self {
            Self::Partial { slice, .. } | Self::Weights { slice, .. } | Self::State { slice, .. } => {
                Some(slice)
            }
            Self::Activation { .. } | Self::ActivationGradient { .. } => None,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Partial { step, slice, node } => {
                write!(f, "step {step}: the gradient of {slice} over {node}")
            }
            Self::Weights { step, slice } => write!(f, "step {step}: the weights of {slice}"),
            Self::State { step, slice } => write!(f, "step {step}: the training state of {slice}"),
            Self::Activation { step, micro } => write!(f, "step {step}: the activations of {micro}"),
            Self::ActivationGradient { step, micro } => {
                write!(f, "step {step}: the activations' gradient of {micro}")
            }
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

/// What came of one lane.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaneResult {
    /// The lane.
    pub lane: Lane,
    /// Its summed loss, divided by the counted tokens of the global batch, in nats.
    pub loss: f64,
    /// Its counted tokens.
    pub tokens: u64,
}

/// What a member that owns a slice has of it, before a step is applied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SliceVote {
    /// The slice.
    pub slice: SliceId,
    /// The squared norm of each block's final gradient.
    pub norms: Vec<f64>,
    /// Of the final gradient.
    pub gradient: Checksum,
    /// Of the training state, which the step before has left.
    pub state: SliceSum,
}

/// A member's vote for a step, and its part of the global norm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prepared {
    /// The step.
    pub step: Step,
    /// For each slice that the sender owns, what it has of it.
    pub slices: Vec<SliceVote>,
    /// Of the weights that the sender has computed with, slice by slice.
    pub weights: Opinion,
    /// What came of each lane whose last stage the sender is, in the lanes' order.
    pub lanes: Vec<LaneResult>,
    /// The generation for which the coordinator wants everyone to stop after this step.
    /// All members see the same votes, so all stop at the same step.
    pub stop_for: Option<Generation>,
}
