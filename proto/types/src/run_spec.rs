//! The run spec: everything that decides the bits of a run, and nothing else.

use crate::{BatchShape, Digest, ModelShape, Recipe};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Version of the run spec's format; a reader refuses any other.
pub const RUN_SPEC_VERSION: u32 = 2;

/// What a run is. Immutable: the weights after step s are a function of this alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    /// [`RUN_SPEC_VERSION`].
    pub version: u32,
    /// The run's name.
    pub name: String,
    /// The model.
    pub model: ModelShape,
    /// What its weights are at step 0.
    pub init: Initial,
    /// What it is trained on.
    pub data: DataSpec,
    /// How a global batch is cut.
    pub batch: BatchShape,
    /// The optimiser's recipe.
    pub recipe: Recipe,
    /// Key of all randomness.
    pub seed: u64,
    /// What may change bits besides.
    pub numerics: NumericsClass,
}

impl RunSpec {
    /// Model FLOPs utilisation of a step: the share of `peak`, in FLOP/s, that the run's model
    /// itself has needed where a step took so many seconds. docs/performance.md has the formula.
    #[must_use]
    pub fn mfu(&self, seconds: f64, peak: f64) -> f64 {
        let token = self.model.train_flops_per_token(self.batch.sequence_length);
        token * self.batch.tokens_per_step() as f64 / (seconds * peak)
    }
}

/// What the weights are at step 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Initial {
    /// Random numbers of the run's seed.
    Seed,
    /// Weights that were there before.
    Weights {
        /// Their hash, as the manifest of a checkpoint has it: BLAKE3 over the hashes of all
        /// slices, each of its values as little-endian fp32.
        digest: Digest,
    },
}

/// The prepared token stream, by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSpec {
    /// Hash of the token shards and the tokenizer.
    pub digest: Digest,
    /// Tokens in the stream.
    pub tokens: u64,
}

/// Number formats of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Everything in 32-bit floating point: the reference.
    Fp32,
    /// Weights, activations and the factors of matrix products in bf16; products are added up, and
    /// the residual stream, gradients, master weights and moments are, in fp32.
    Mixed,
}

impl Precision {
    /// Bytes of a weight or an activation.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::Fp32 => 4,
            Self::Mixed => 2,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fp32 => f.write_str("fp32"),
            Self::Mixed => f.write_str("mixed"),
        }
    }
}

/// What may change bits besides the rest of the run spec: number formats and the instruction
/// family that the kernels use. Workers of one run have one class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NumericsClass {
    /// Number formats.
    pub precision: Precision,
    /// Instruction family, as the kernels name it (`avx512`, `avx2`, `portable`, …).
    pub family: String,
}

impl fmt::Display for NumericsClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.precision, self.family)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utilisation_is_what_a_step_needs_of_what_its_time_would_have_been_enough_for() {
        let spec = RunSpec {
            version: RUN_SPEC_VERSION,
            name: "run".into(),
            model: ModelShape::preset("15m").unwrap(),
            init: Initial::Seed,
            data: DataSpec { digest: Digest::default(), tokens: 0 },
            batch: BatchShape { lanes: 4, micro_batches: 2, sequences: 8, sequence_length: 256 },
            recipe: Recipe::default(),
            seed: 1,
            numerics: NumericsClass { precision: Precision::Fp32, family: "portable".into() },
        };
        // 93,804,480 FLOPs a token, 16,384 tokens, 2 seconds of 1 TFLOP/s.
        assert_eq!(spec.mfu(2.0, 1e12), 93_804_480.0 * 16_384.0 / 2e12);
        assert_eq!(spec.mfu(4.0, 0.5e12), spec.mfu(2.0, 1e12));
    }
}
