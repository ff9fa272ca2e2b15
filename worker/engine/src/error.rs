//! What can go wrong in the engine.

use caravan_types::peer::Key;
use caravan_types::{MicroId, Node, SliceId, Step, Subject};

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
    #[error("{key} has {got} values where {expected} are needed; the sender has another model")]
    Length {
        /// What it was stored as.
        key: Key,
        /// Values needed.
        expected: usize,
        /// Values given.
        got: usize,
    },
    /// A payload that was never put, or is used up.
    #[error("{0}: not here; never received or computed, or used up")]
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
    /// Units outside the model's.
    #[error("units {0}..{1} are not within the model's {2}")]
    Units(u32, u32, u32),
    /// A micro-batch outside the run's batch.
    #[error("{micro} is not within the run's {lanes} lanes of {micro_batches}")]
    Micro {
        /// The micro-batch.
        micro: MicroId,
        /// Lanes of the run.
        lanes: u32,
        /// Micro-batches of a lane.
        micro_batches: u32,
    },
    /// A micro-batch that goes back before it went forward, or before others of its lane.
    #[error("{micro} of step {step} cannot go back: {reason}")]
    OutOfTurn {
        /// The step.
        step: Step,
        /// The micro-batch.
        micro: MicroId,
        /// What should have been.
        reason: &'static str,
    },
    /// Data that could not be had or used.
    #[error("{micro} of step {step}: {reason}")]
    Batch {
        /// The step.
        step: Step,
        /// The micro-batch.
        micro: MicroId,
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
    /// Weights to start with that could not be had.
    #[error("the weights that slice {slice} starts with: {reason}")]
    Initial {
        /// The slice.
        slice: SliceId,
        /// What is wrong.
        reason: String,
    },
    /// Memory does not hold what was put there.
    #[error(
        "the {what} of slice {slice} at step {step} is not what was put there: memory of this machine was changed \
         behind the program's back. Where that happens again, test its memory"
    )]
    Corrupt {
        /// The slice.
        slice: SliceId,
        /// The step that it is at, or that the gradient is for.
        step: Step,
        /// What has changed.
        what: Subject,
    },
    /// A prompt that cannot be continued.
    #[error("cannot generate: {0}")]
    Prompt(String),
}

fn at(found: Option<Step>) -> String {
    found.map_or("there are none here".into(), |step| format!("are at {step}"))
}
