//! The shape of a Llama, and where each parameter lies.
//!
//! All parameters of a model form one flat vector: units in order, parameters in order within
//! a unit, each row-major as [out, in]. Engine, checkpoints and plans speak of elements by
//! their offset in this vector. Names and the rotary layout (halves, not interleaved pairs)
//! are those of Hugging Face's `LlamaForCausalLM`. Query, key and value lie side by side, as
//! do gate and up, so that each group can be used as one matrix.

use crate::UnitId;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// The shape of one Llama-2-type model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    /// Width of the residual stream.
    pub dim: u32,
    /// Number of transformer layers.
    pub layers: u32,
    /// Query heads; head size is `dim / heads`.
    pub heads: u32,
    /// Key and value heads; divides `heads` (grouped-query attention where smaller).
    pub kv_heads: u32,
    /// Width of the feed-forward network.
    pub hidden: u32,
    /// Number of tokens in the vocabulary.
    pub vocab: u32,
    /// Longest sequence, in tokens.
    pub context: u32,
    /// Epsilon of RMSNorm.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// How the rotary frequencies are scaled for a longer context; none for those of
    /// `rope_theta` as they are.
    pub rope_scaling: Option<RopeScaling>,
}

/// A way to stretch rotary frequencies to contexts longer than a model was first trained with,
/// as Hugging Face's `rope_scaling` names them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// All frequencies divided by a factor (position interpolation, arXiv 2306.15595).
    Linear {
        /// What they are divided by.
        factor: f32,
    },
    /// Llama 3.1's: long waves are divided by the factor, short ones stay, those between are
    /// mixed (Meta's llama-models, `apply_scaling`).
    Llama3 {
        /// What long waves' frequencies are divided by.
        factor: f32,
        /// Waves of which fewer than this fit into the original context are long.
        low_freq_factor: f32,
        /// Waves of which more than this fit into the original context are short.
        high_freq_factor: f32,
        /// The context that the model was first trained with, in tokens.
        original_context: u32,
    },
}

impl fmt::Display for RopeScaling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linear { factor } => write!(f, "linear {factor}"),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                write!(f, "llama3 {factor} ({low_freq_factor} to {high_freq_factor} of {original_context})")
            }
        }
    }
}

impl RopeScaling {
    /// A frequency, in radians a position, after scaling.
    #[must_use]
    pub fn scale(self, rate: f64) -> f64 {
        match self {
            Self::Linear { factor } => rate / f64::from(factor),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let (factor, low, high) =
                    (f64::from(factor), f64::from(low_freq_factor), f64::from(high_freq_factor));
                // How many waves fit into the original context.
                let waves = f64::from(original_context) * rate / std::f64::consts::TAU;
                if waves < low {
                    rate / factor
                } else if waves > high {
                    rate
                } else {
                    let share = (waves - low) / (high - low);
                    (1.0 - share) * rate / factor + share * rate
                }
            }
        }
    }

    /// What is wrong with its numbers; none where they can be used.
    #[must_use]
    pub fn fault(self) -> Option<&'static str> {
        let factor = match self {
            Self::Linear { factor } | Self::Llama3 { factor, .. } => factor,
        };
        match self {
            _ if !(factor.is_finite() && factor >= 1.0) => Some("factor must be a number of at least 1"),
            Self::Llama3 { low_freq_factor: low, high_freq_factor: high, .. }
                if !(low > 0.0 && high > low && high.is_finite()) =>
            {
                Some("low_freq_factor must be above 0 and high_freq_factor above that")
            }
            Self::Llama3 { original_context: 0, .. } => Some("the original context must be at least 1"),
            _ => None,
        }
    }
}

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All ones (norm gains).
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f32),
}

/// One named tensor of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Hugging Face's name, such as `model.layers.3.mlp.up_proj.weight`.
    pub name: String,
    /// The unit that it belongs to.
    pub unit: UnitId,
    /// Rows (output features); a vector has one row.
    pub rows: u64,
    /// Columns (input features).
    pub cols: u64,
    /// Whether it is a vector: stored with one dimension, and not decayed.
    pub vector: bool,
    /// How it starts.
    pub init: Init,
    /// Where it starts in the flat model, in elements.
    pub offset: u64,
}

impl Parameter {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.rows * self.cols
    }

    /// Whether it has no elements; never so in a valid shape.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its elements in the flat model.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len()
    }

    /// Whether AdamW decays it: matrices yes, norm gains no.
    #[must_use]
    pub fn decayed(&self) -> bool {
        !self.vector
    }
}

/// Names of the presets that [`ModelShape::preset`] knows, smallest first.
pub const PRESETS: [&str; 9] = ["260k", "15m", "42m", "110m", "1.1b", "7b", "13b", "34b", "70b"];

impl ModelShape {
    /// The shape of a preset by name (see [`PRESETS`]), from the tables of the Llama 2 paper
    /// (arXiv 2307.09288), TinyLlama and the llama2.c family.
    #[must_use]
    pub fn preset(name: &str) -> Option<Self> {
        let (dim, layers, heads, kv_heads, hidden, vocab, context) = match name {
            "260k" => (64, 5, 8, 4, 172, 512, 512),
            "15m" => (288, 6, 6, 6, 768, 32000, 256),
            "42m" => (512, 8, 8, 8, 1376, 32000, 1024),
            "110m" => (768, 12, 12, 12, 2048, 32000, 1024),
            "1.1b" => (2048, 22, 32, 4, 5632, 32000, 2048),
            "7b" => (4096, 32, 32, 32, 11008, 32000, 4096),
            "13b" => (5120, 40, 40, 40, 13824, 32000, 4096),
            "34b" => (8192, 48, 64, 8, 22016, 32000, 4096),
            "70b" => (8192, 80, 64, 8, 28672, 32000, 4096),
            _ => return None,
        };
        Some(Self {
            dim,
            layers,
            heads,
            kv_heads,
            hidden,
            vocab,
            context,
            norm_eps: 1e-5,
            rope_theta: 10000.0,
            rope_scaling: None,
        })
    }

    /// The paper's rule for the feed-forward width: floor(2/3 · 4·dim), times `multiplier`,
    /// rounded up to a multiple of `multiple_of`.
    #[must_use]
    pub fn ffn_hidden(dim: u32, multiplier: f64, multiple_of: u32) -> u32 {
        let h = (f64::from(8 * u64::from(dim) as u32 / 3) * multiplier) as u32;
        h.div_ceil(multiple_of) * multiple_of
    }

    /// Size of one attention head.
    #[must_use]
    pub fn head_dim(&self) -> u32 {
        self.dim / self.heads
    }

    /// The rotary frequencies, in radians a position: θ^(−2i / head size) for i below half a
    /// head, scaled where the shape says so.
    #[must_use]
    pub fn rope_rates(&self) -> Vec<f64> {
        let (head, theta) = (f64::from(self.head_dim()), f64::from(self.rope_theta));
        let rate = |i: u32| libm::pow(theta, -2.0 * f64::from(i) / head);
        let scaled = |rate: f64| self.rope_scaling.map_or(rate, |scaling| scaling.scale(rate));
        (0..self.head_dim() / 2).map(|i| scaled(rate(i))).collect()
    }

    /// Number of units: embedding, layers, final norm with head.
    #[must_use]
    pub fn units(&self) -> u32 {
        self.layers + 2
    }

    /// Number of parameters.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let head = self.unit(UnitId(self.units() - 1));
        head.last().map_or(0, |p| p.range().end)
    }

    /// Elements of one unit, given without walking the others.
    fn unit_len(&self, unit: UnitId) -> u64 {
        let (d, v) = (u64::from(self.dim), u64::from(self.vocab));
        let kv = u64::from(self.kv_heads) * u64::from(self.head_dim());
        match unit.0 {
            0 => v * d,
            u if u <= self.layers => 2 * d + 2 * d * d + 2 * kv * d + 3 * d * u64::from(self.hidden),
            _ => d + v * d,
        }
    }

    /// The elements of a unit in the flat model.
    #[must_use]
    pub fn unit_range(&self, unit: UnitId) -> Range<u64> {
        let layers = u64::from(unit.0.saturating_sub(1).min(self.layers));
        let start = match unit.0 {
            0 => 0,
            _ => self.unit_len(UnitId(0)) + layers * self.unit_len(UnitId(1)),
        };
        start..start + self.unit_len(unit)
    }

    /// The parameters of a unit, in the order in which they lie.
    #[must_use]
    pub fn unit(&self, unit: UnitId) -> Vec<Parameter> {
        let (d, v, h) = (u64::from(self.dim), u64::from(self.vocab), u64::from(self.hidden));
        let kv = u64::from(self.kv_heads) * u64::from(self.head_dim());
        let std = Init::Normal(0.02);
        let scaled = Init::Normal(0.02 / (2.0 * self.layers as f32).sqrt());
        let list: Vec<(String, u64, u64, bool, Init)> = match unit.0 {
            0 => vec![("model.embed_tokens.weight".into(), v, d, false, std)],
            u if u <= self.layers => {
                let n = |part: &str| format!("model.layers.{}.{part}.weight", u - 1);
                vec![
                    (n("input_layernorm"), 1, d, true, Init::Ones),
                    (n("self_attn.q_proj"), d, d, false, std),
                    (n("self_attn.k_proj"), kv, d, false, std),
                    (n("self_attn.v_proj"), kv, d, false, std),
                    (n("self_attn.o_proj"), d, d, false, scaled),
                    (n("post_attention_layernorm"), 1, d, true, Init::Ones),
                    (n("mlp.gate_proj"), h, d, false, std),
                    (n("mlp.up_proj"), h, d, false, std),
                    (n("mlp.down_proj"), d, h, false, scaled),
                ]
            }
            _ => vec![
                ("model.norm.weight".into(), 1, d, true, Init::Ones),
                ("lm_head.weight".into(), v, d, false, std),
            ],
        };
        let mut offset = self.unit_range(unit).start;
        let mut parameters = Vec::with_capacity(list.len());
        for (name, rows, cols, vector, init) in list {
            parameters.push(Parameter { name, unit, rows, cols, vector, init, offset });
            offset += rows * cols;
        }
        parameters
    }

    /// All parameters in the order of the flat model.
    #[must_use]
    pub fn all_parameters(&self) -> Vec<Parameter> {
        (0..self.units()).flat_map(|u| self.unit(UnitId(u))).collect()
    }

    /// Floating-point operations to train on one token: 6 for each parameter but the embedding's,
    /// whose rows are only looked up, and 6 · layers · length · dim for attention. That is the
    /// count of the PaLM paper (arXiv 2204.02311, appendix B) with attention's part of it,
    /// 12 · layers · length · dim, halved: a causal mask leaves half of all pairs. What is computed
    /// again or masked besides does not count, nor do norms, rotations and softmax.
    #[must_use]
    pub fn train_flops_per_token(&self, sequence_length: u32) -> f64 {
        let table = f64::from(self.vocab) * f64::from(self.dim);
        let matrices = self.parameters() as f64 - table;
        let attention = f64::from(self.layers) * f64::from(sequence_length) * f64::from(self.dim);
        6.0 * matrices + 6.0 * attention
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flops_of_a_token_are_six_a_parameter_and_half_of_attention() {
        let model = ModelShape::preset("15m").unwrap();
        let layer = 288 * 3 * 288 + 288 * 288 + 3 * 288 * 768 + 2 * 288;
        let head = 32_000 * 288 + 288;
        let full = 12 * 6 * 256 * 288;
        assert_eq!(model.train_flops_per_token(256), f64::from(6 * (6 * layer + head) + full / 2));
    }

    #[test]
    fn presets_have_the_parameter_counts_of_the_paper() {
        let count = |name| ModelShape::preset(name).map(|m| m.parameters());
        assert_eq!(count("7b"), Some(6_738_415_616));
        assert_eq!(count("13b"), Some(13_015_864_320));
        assert_eq!(count("34b"), Some(33_743_970_304));
        assert_eq!(count("70b"), Some(68_976_648_192));
        assert!(PRESETS.iter().all(|p| count(p).is_some()));
        assert_eq!(count("8b"), None);
    }

    #[test]
    fn the_ffn_rule_gives_all_four_sizes() {
        assert_eq!(ModelShape::ffn_hidden(4096, 1.0, 256), 11008);
        assert_eq!(ModelShape::ffn_hidden(5120, 1.0, 256), 13824);
        assert_eq!(ModelShape::ffn_hidden(8192, 1.0, 256), 22016);
        assert_eq!(ModelShape::ffn_hidden(8192, 1.3, 4096), 28672);
    }

    /// By hand from Llama 3.1's numbers: a head of 128, factor 8 on 8,192 tokens.
    #[test]
    fn rotary_frequencies_are_scaled_by_how_many_waves_fit() {
        let plain = ModelShape { rope_theta: 5e5, ..ModelShape::preset("7b").unwrap() };
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let with = |scaling| ModelShape { rope_scaling: Some(scaling), ..plain.clone() }.rope_rates();
        let (before, after) = (plain.rope_rates(), with(llama3));
        assert_eq!(before.len(), 64);
        assert_eq!(before[0], 1.0);
        // 8192 · θ^(−2i/128) / 2π is above 4 up to i = 28 and below 1 from i = 35 on.
        assert_eq!(after[..29], before[..29]);
        for i in 35..64 {
            assert_eq!(after[i], before[i] / 8.0);
        }
        for i in 29..35 {
            let share = (8192.0 * before[i] / std::f64::consts::TAU - 1.0) / 3.0;
            assert!(0.0 < share && share < 1.0);
            assert_eq!(after[i], (1.0 - share) * before[i] / 8.0 + share * before[i]);
        }
        let linear = with(RopeScaling::Linear { factor: 4.0 });
        assert!(linear.iter().zip(&before).all(|(a, b)| *a == b / 4.0));
    }

    #[test]
    fn scalings_of_other_kinds_or_with_other_keys_are_refused() {
        let read = |json| serde_json::from_str::<RopeScaling>(json);
        assert_eq!(read(r#"{"type":"linear","factor":2}"#).unwrap(), RopeScaling::Linear { factor: 2.0 });
        assert!(read(r#"{"type":"yarn","factor":2}"#).is_err());
        assert!(read(r#"{"type":"linear","factor":2,"beta":1}"#).is_err());
        assert!(RopeScaling::Linear { factor: 0.5 }.fault().is_some());
    }

    #[test]
    fn parameters_tile_the_flat_model_unit_by_unit() {
        let shape = ModelShape::preset("260k").unwrap();
        let mut at = 0;
        for parameter in shape.all_parameters() {
            assert_eq!(parameter.offset, at, "{}", parameter.name);
            let unit = shape.unit_range(parameter.unit);
            assert!(unit.start <= at && parameter.range().end <= unit.end);
            at = parameter.range().end;
        }
        assert_eq!(at, shape.parameters());
    }
}
