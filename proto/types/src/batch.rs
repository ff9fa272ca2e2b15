//! The shape of a global batch, and one micro-batch of it.

use crate::Lane;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How a global batch is cut: lanes × micro-batches × sequences × tokens. Part of the run
/// spec, never of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchShape {
    /// Virtual replicas, a power of two.
    pub lanes: u32,
    /// Micro-batches per lane and step.
    pub micro_batches: u32,
    /// Sequences per micro-batch.
    pub sequences: u32,
    /// Tokens per sequence that are predicted.
    pub sequence_length: u32,
}

impl BatchShape {
    /// Sequences in a global batch.
    #[must_use]
    pub fn sequences_per_step(&self) -> u64 {
        u64::from(self.lanes) * u64::from(self.micro_batches) * u64::from(self.sequences)
    }

    /// Tokens in a micro-batch: rows of what two stages say to each other.
    #[must_use]
    pub fn tokens_per_micro_batch(&self) -> u64 {
        u64::from(self.sequences) * u64::from(self.sequence_length)
    }

    /// Tokens in a global batch.
    #[must_use]
    pub fn tokens_per_step(&self) -> u64 {
        self.sequences_per_step() * u64::from(self.sequence_length)
    }
}

/// Which micro-batch of a step: its lane, and its number within the lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MicroId {
    /// The lane.
    pub lane: Lane,
    /// `0..micro_batches`.
    pub index: u32,
}

impl fmt::Display for MicroId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lane {}, micro-batch {}", self.lane, self.index)
    }
}

/// The sequences of one micro-batch of one lane, ready for the engine. All vectors have
/// `sequences · length` elements, sequence by sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens per sequence.
    pub length: usize,
    /// Input tokens.
    pub tokens: Vec<u32>,
    /// The token that follows each input token.
    pub targets: Vec<u32>,
    /// Whether the prediction of that target counts in the loss.
    pub counted: Vec<bool>,
    /// For each position, where in its sequence the document that it belongs to starts: a
    /// token attends to positions `document_start..=position` only.
    pub document_start: Vec<u32>,
}
