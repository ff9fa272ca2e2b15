//! Steps whose loss or gradient is not finite: how such a step is passed, and what went bad first.
//!
//! All members count the same votes, so all see the same sums and come to the same [`Verdict`];
//! nobody has to be asked. A gradient is fp32 and norms are summed in fp64, so a norm is finite
//! exactly where every element of the gradient is.

use crate::{Generation, MicroId, Step};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is done with a step whose loss or gradient is not finite. It decides bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NonFinitePolicy {
    /// The run ends before the step, with a checkpoint.
    #[default]
    Stop,
    /// The step passes without an update: its samples are used up, weights and moments keep their
    /// bits. It counts as a step for the learning rate and for AdamW's bias correction.
    Skip,
}

impl fmt::Display for NonFinitePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stop => "stop",
            Self::Skip => "skip",
        })
    }
}

/// How a step is applied that everybody is prepared for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// AdamW, with the gradient clipped by its global norm.
    Update {
        /// The norm, which is finite.
        norm: f64,
    },
    /// Nothing is applied: state at the step before is state at this one.
    Skip,
}

impl Verdict {
    /// What follows from a step's global gradient norm and its loss.
    #[must_use]
    pub fn of(norm: f64, loss: f64) -> Self {
        if norm.is_finite() && loss.is_finite() { Self::Update { norm } } else { Self::Skip }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Update { norm } => write!(f, "norm {norm}"),
            Self::Skip => f.write_str("no update"),
        }
    }
}

/// What of a step is not finite, as all members see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotFinite {
    /// The loss; where it is not, the gradient is seldom.
    Loss,
    /// The gradient alone.
    Gradient,
}

impl NotFinite {
    /// What is wrong with a step's loss or gradient, if anything is.
    #[must_use]
    pub fn of(norm: f64, loss: f64) -> Option<Self> {
        match Verdict::of(norm, loss) {
            Verdict::Update { .. } => None,
            Verdict::Skip if loss.is_finite() => Some(Self::Gradient),
            Verdict::Skip => Some(Self::Loss),
        }
    }
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loss => "its loss is not finite",
            Self::Gradient => "its gradient is not finite",
        })
    }
}

/// A member tells of a step whose loss or gradient is not finite, once it has looked for the
/// first tensor that went bad in its own lanes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NonFinite {
    /// The generation.
    pub generation: Generation,
    /// The step.
    pub step: Step,
    /// What is not finite.
    pub what: NotFinite,
    /// Whether the step was passed without an update; else its members wait to be stopped.
    pub skipped: bool,
    /// What went bad first, where that was in its own lanes.
    pub finding: Option<Finding>,
}

/// The first value that is not finite, in the order of computing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The tensor.
    pub tensor: Tensor,
    /// The value's place in it: in the row of its position, where it belongs to a sample, else in
    /// the whole of it, row by row.
    pub element: u64,
    /// The value.
    pub value: Value,
    /// The sample that it belongs to; weights and sums over samples belong to none.
    pub sample: Option<Sample>,
}

/// A value that is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    /// Not a number.
    Nan,
    /// Too large.
    Infinity,
    /// Too small.
    NegativeInfinity,
}

impl Value {
    /// None for a finite one.
    #[must_use]
    pub fn of(value: f64) -> Option<Self> {
        match value {
            v if v.is_finite() => None,
            v if v.is_nan() => Some(Self::Nan),
            v if v > 0.0 => Some(Self::Infinity),
            _ => Some(Self::NegativeInfinity),
        }
    }
}

/// One sequence of a step, and a position in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Its micro-batch.
    pub micro: MicroId,
    /// Which sequence of the micro-batch.
    pub sequence: u32,
    /// Its number over the whole run, as the ledger counts.
    pub number: u64,
    /// The position; none for what is summed over all of them.
    pub position: Option<u32>,
}

/// A tensor of a training step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tensor {
    /// A parameter, by its name.
    Weight(String),
    /// What a part of the model puts out on the way forward.
    Activation(Module),
    /// The loss's gradient in that.
    ActivationGradient(Module),
    /// The loss's gradient in a parameter, by its name.
    WeightGradient(String),
}

/// A part of the model that puts something out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Module {
    /// The token embedding.
    Embedding,
    /// A part of a transformer layer, counted from 0.
    Layer(u32, LayerPart),
    /// The norm after the last layer.
    FinalNorm,
    /// The head.
    Logits,
    /// Each position's cross-entropy.
    Loss,
}

/// A part of a transformer layer, in the order of computing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerPart {
    /// What comes into it from another stage.
    Input,
    /// The norm before attention.
    AttentionNorm,
    /// Queries, keys and values side by side, rotated.
    Qkv,
    /// Attention, before its output projection.
    Attention,
    /// The residual stream after attention's output projection.
    Output,
    /// The norm before the feed-forward network.
    MlpNorm,
    /// Gate and up projections side by side.
    GateUp,
    /// The product of up and the gate's SiLU.
    Activated,
    /// The residual stream after the down projection: what the layer puts out.
    Down,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nan => "NaN",
            Self::Infinity => "infinity",
            Self::NegativeInfinity => "-infinity",
        })
    }
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Weight(name) => write!(f, "the weight {name}"),
            Self::Activation(module) => write!(f, "{module}"),
            Self::ActivationGradient(module) => write!(f, "the gradient of {module}"),
            Self::WeightGradient(name) => write!(f, "the gradient of {name}"),
        }
    }
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("the embedding"),
            Self::Layer(layer, part) => write!(f, "{part} of layer {layer}"),
            Self::FinalNorm => f.write_str("the final norm"),
            Self::Logits => f.write_str("the logits"),
            Self::Loss => f.write_str("the loss"),
        }
    }
}

impl fmt::Display for LayerPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Input => "the input",
            Self::AttentionNorm => "the attention norm",
            Self::Qkv => "queries, keys and values",
            Self::Attention => "attention",
            Self::Output => "the residual stream after attention",
            Self::MlpNorm => "the feed-forward norm",
            Self::GateUp => "gate and up",
            Self::Activated => "the gated product",
            Self::Down => "the output",
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tensor, element, value, sample } = self;
        write!(f, "{tensor} went bad first: {value} at ")?;
        match sample {
            None => write!(f, "element {element}"),
            Some(Sample { micro, sequence, number, position }) => {
                if let Some(position) = position {
                    write!(f, "position {position}, ")?;
                }
                write!(f, "element {element}, in {micro}, sequence {sequence} (sample {number} of the run)")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_number_is_enough_and_a_bad_loss_is_named_first() {
        assert_eq!(Verdict::of(1.5, 2.5), Verdict::Update { norm: 1.5 });
        assert_eq!(NotFinite::of(1.5, 2.5), None);
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!((Verdict::of(bad, 1.0), Verdict::of(1.0, bad)), (Verdict::Skip, Verdict::Skip));
            assert_eq!(NotFinite::of(bad, 1.0), Some(NotFinite::Gradient));
            assert_eq!(NotFinite::of(bad, bad), Some(NotFinite::Loss));
            assert!(Value::of(bad).is_some());
        }
        assert_eq!(Value::of(f64::MAX), None);
    }

    #[test]
    fn a_finding_says_where_in_words_and_comes_back_from_json() {
        let micro = MicroId { lane: 2, index: 1 };
        let sample = Sample { micro, sequence: 3, number: 4711, position: Some(17) };
        let finding = Finding {
            tensor: Tensor::Activation(Module::Layer(3, LayerPart::GateUp)),
            element: 5,
            value: Value::Nan,
            sample: Some(sample),
        };
        assert_eq!(
            finding.to_string(),
            "gate and up of layer 3 went bad first: NaN at position 17, element 5, in lane 2, micro-batch 1, \
             sequence 3 (sample 4711 of the run)"
        );
        let weight = Finding {
            tensor: Tensor::Weight("lm_head.weight".into()),
            element: 9,
            value: Value::NegativeInfinity,
            sample: None,
        };
        assert_eq!(weight.to_string(), "the weight lm_head.weight went bad first: -infinity at element 9");
        for finding in [finding, weight] {
            let json = serde_json::to_string(&finding).unwrap();
            assert_eq!(serde_json::from_str::<Finding>(&json).unwrap(), finding);
        }
    }
}
