//! What a worker waits for, and how far its engine is: enough to name the first one that stands
//! still when everybody does.

use crate::peer::Key;
use crate::{MicroId, Step, WorkerId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a worker needs before it can go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wait {
    /// A plan.
    #[default]
    Plan,
    /// Its own engine, which has something to do.
    Engine,
    /// Something from another member.
    Peer {
        /// The member.
        peer: WorkerId,
        /// What it owes.
        what: Awaited,
    },
}

/// What one member owes another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Awaited {
    /// Tensor data.
    Data(Key),
    /// Its vote for a step.
    Vote(Step),
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(key) => write!(f, "{key}"),
            Self::Vote(step) => write!(f, "step {step}: its vote"),
        }
    }
}

/// How far an engine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineProgress {
    /// Rises with every task and every layer; says nothing else.
    pub moved: u64,
    /// What it is at, or was at last.
    pub doing: Doing,
    /// Milliseconds that it has spent in forward and backward tasks since it started.
    pub busy_ms: u64,
    /// Floating-point operations of these tasks, as [`cost`](crate::cost) counts them.
    pub work: u64,
}

/// What is done about a worker that computes slower than it said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stragglers {
    /// It is reported.
    #[default]
    Report,
    /// It is also planned with its measured speed, from a step boundary on.
    Rebalance,
}

impl fmt::Display for Stragglers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Report => "report",
            Self::Rebalance => "rebalance",
        })
    }
}

/// What an engine does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Doing {
    /// Nothing yet.
    #[default]
    Nothing,
    /// Anything that is over in a moment: storing, sending, installing.
    Moving,
    /// A micro-batch, forward.
    Forward(Place),
    /// A micro-batch, backward.
    Backward(Place),
    /// Adding up partial sums.
    Reducing,
    /// AdamW.
    Applying,
    /// Copying training state for a checkpoint.
    Saving,
    /// Reading a checkpoint, or making weights from the seed.
    Loading,
}

/// Where in a micro-batch's way an engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The micro-batch.
    pub micro: MicroId,
    /// The unit: 0 is the embedding, then the layers, then the head.
    pub unit: u32,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("before its first task"),
            Self::Moving => f.write_str("moving data"),
            Self::Forward(Place { micro, unit }) => write!(f, "in forward of unit {unit}, {micro}"),
            Self::Backward(Place { micro, unit }) => write!(f, "in backward of unit {unit}, {micro}"),
            Self::Reducing => f.write_str("adding up gradients"),
            Self::Applying => f.write_str("applying an update"),
            Self::Saving => f.write_str("copying a checkpoint"),
            Self::Loading => f.write_str("reading a checkpoint or making weights"),
        }
    }
}
