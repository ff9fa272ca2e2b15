//! What can go wrong in the engine.

use caravan_types::peer::Key;
use caravan_types::{Lane, Node, SliceId, Step};

/// Why a task could not be executed. Each of these means that the caller asked for something
/// that its own bookkeeping should have ruled out, or that data or a checkpoint is damaged;
/// an executor that has failed must not be used again.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The run pins an instruction family that this machine has not got.
    #[error(
        "the run computes with the instruction family {wanted:?}, but this machine has only {available}; \
         use a machine with {wanted:?}, or start a new run with one of these"
    )]
    Family {
        /// The run's family.
        wanted: String,
        /// This machine's families.
        available: String,
    },
    /// No threads.
    #[error(transparent)]
    Cpu(#[from] caravan_kernels::CpuError),
    /// A model that cannot be computed.
    #[error("the model's shape cannot be computed: {0}")]
    Shape(String),
    /// A slice number that the model has not got.
    #[error("slice {0} does not exist: the model has {1} slices")]
    UnknownSlice(SliceId, usize),
    /// A tree node that the run's lanes have not got.
    #[error("{node} (level {}) is no sub-tree of the run's {lanes} lanes", node.level)]
    UnknownNode {
        /// The node.
        node: Node,
        /// Lanes of the run.
        lanes: u32,
    },
    /// A payload of the wrong length.
    #[error("{key:?} has {got} values where the slice needs {expected}; the sender has another model")]
    Length {
        /// What it was stored as.
        key: Key,
        /// Values needed.
        expected: usize,
        /// Values given.
        got: usize,
    },
    /// A payload that was never put, or is used up.
    #[error("{0:?} is not here: it was never received or computed, or is used up")]
    Missing(Key),
    /// A sub-tree without gradient.
    #[error("cannot reduce slice {slice} of step {step}: the gradient of {node} is missing")]
    MissingPartial {
        /// The step.
        step: Step,
        /// The slice.
        slice: SliceId,
        /// The smallest sub-tree with nothing below it.
        node: Node,
    },
    /// A slice to apply without final gradient.
    #[error("cannot apply step {step} to slice {slice}: it has no final gradient; reduce it first")]
    NotReduced {
        /// The step.
        step: Step,
        /// The slice.
        slice: SliceId,
    },
    /// Weights that are not at the step where they must be.
    #[error("the weights of slice {slice} must be at step {expected}, but {}", at(*found))]
    WeightsAt {
        /// The slice.
        slice: SliceId,
        /// The step needed.
        expected: Step,
        /// The step that they are at.
        found: Option<Step>,
    },
    /// Training state that is not at the step where it must be.
    #[error("the training state of slice {slice} must be at step {expected}, but {}", at(*found))]
    StateAt {
        /// The slice.
        slice: SliceId,
        /// The step needed.
        expected: Step,
        /// The step that it is at.
        found: Option<Step>,
    },
    /// Lanes outside the run's.
    #[error("lanes {0}..{1} are not within the run's {2}")]
    Lanes(Lane, Lane, u32),
    /// Data that could not be had or used.
    #[error("micro-batch {index} of lane {lane} in step {step}: {reason}")]
    Batch {
        /// The step.
        step: Step,
        /// The lane.
        lane: Lane,
        /// The micro-batch's number in the lane.
        index: u32,
        /// What is wrong.
        reason: String,
    },
    /// The number of counted tokens could not be had.
    #[error("the number of counted tokens of step {step}: {reason}")]
    Counted {
        /// The step.
        step: Step,
        /// What is wrong.
        reason: String,
    },
    /// A checkpoint that could not be read.
    #[error("the checkpoint of step {step}: {reason}")]
    Checkpoint {
        /// Its step.
        step: Step,
        /// What is wrong.
        reason: String,
    },
    /// A prompt that cannot be continued.
    #[error("cannot generate: {0}")]
    Prompt(String),
}

fn at(found: Option<Step>) -> String {
    found.map_or("there are none here".into(), |step| format!("are at {step}"))
}
