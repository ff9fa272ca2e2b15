//! What a part of a model costs to train: arithmetic and memory, from its shapes.
//!
//! Counted here once, for the plan that deals out the work and for the estimate that people
//! are shown before they start.

use crate::{BatchShape, ModelShape, Precision, UnitId};
use std::ops::Range;

/// Bytes of an fp32 number.
pub const FP32: u64 = 4;

/// Bytes of an element's training state: master weight and two moments, all fp32.
pub const STATE: u64 = 3 * FP32;

/// Logits that the engine has at a time, 32 MiB of f32: small enough for a last-level cache.
pub const LOGITS: u64 = 1 << 23;

/// Bytes of gradients of logits that it has at a time: so many that adding their share to the head's
/// gradient, a pass over all of it, costs little against computing it. That is summed share by
/// share: changing it changes bits.
pub const LOGIT_GRADIENTS: u64 = 1 << 26;

/// Either come in multiples of so many rows.
const ROWS: u64 = 256;

/// Rows of so many logits.
#[must_use]
pub fn logit_rows(logits: u64, vocab: u64) -> u64 {
    (logits / vocab / ROWS).max(1) * ROWS
}

/// Memory of the passes over one micro-batch, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activations {
    /// What one layer keeps from its forward to its backward pass: its input, queries, keys
    /// and values, what attention gives and its sums' logarithms, the residual stream in its
    /// middle, gate and up.
    pub layer: u64,
    /// What all layers share: gradients of those, two normed rows and a product.
    pub shared: u64,
    /// What the head takes: a chunk of logits, and its weights in two packed forms.
    pub head: u64,
}

impl Activations {
    /// The activations of one micro-batch.
    #[must_use]
    pub fn new(model: &ModelShape, batch: &BatchShape, precision: Precision) -> Self {
        let each = precision.bytes();
        let tokens = u64::from(batch.sequences) * u64::from(batch.sequence_length);
        let [d, h, v, heads] = [model.dim, model.hidden, model.vocab, model.heads].map(u64::from);
        let rows = |logits: u64| tokens.min(logit_rows(logits, v));
        let qkv = d + 2 * u64::from(model.kv_heads) * u64::from(model.head_dim());
        Self {
            layer: FP32 * tokens * (2 * d + heads) + each * tokens * (d + qkv + 2 * h),
            shared: FP32 * tokens * 3 * d + each * tokens * (3 * d + qkv + 3 * h),
            head: v * (FP32 * rows(LOGITS) + each * rows(LOGIT_GRADIENTS / each)) + each * 2 * d * v,
        }
    }
}

/// Memory of one worker, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The weights: the whole model, while pipelines have one stage.
    pub weights: u64,
    /// Sums of gradients: its own and those that it receives for the slices that it owns.
    pub gradients: u64,
    /// Both moments of the slices that it owns, and master weights that are not the weights.
    pub moments: u64,
    /// What the passes over one micro-batch need.
    pub activations: u64,
}

impl Memory {
    /// What one of `workers` workers needs, each with the whole model. Good to ten percent: buffers
    /// of the network and the allocator's waste are not in it.
    #[must_use]
    pub fn estimate(
        model: &ModelShape,
        batch: &BatchShape,
        precision: Precision,
        workers: u32,
        redundancy: u32,
    ) -> Self {
        let parameters = model.parameters();
        let workers = workers.min(batch.lanes).max(1);
        let sums = gradient_sums(batch.lanes.div_ceil(workers));
        let owners = u64::from(redundancy.min(workers));
        let owned = (parameters * owners).div_ceil(u64::from(workers));
        Self {
            weights: precision.bytes() * parameters,
            gradients: FP32 * (parameters * sums + owned * u64::from(workers - 1)),
            moments: owned * if precision == Precision::Fp32 { STATE - FP32 } else { STATE },
            activations: activations(model, batch, precision),
        }
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.moments + self.activations
    }
}

/// What the engine's passes over one micro-batch take in a worker that has the whole model.
fn activations(model: &ModelShape, batch: &BatchShape, precision: Precision) -> u64 {
    let part = Activations::new(model, batch, precision);
    u64::from(model.layers) * part.layer + part.shared + part.head
}

/// Gradient sums that a worker of `lanes` lanes has at a time. Lanes are added up like a
/// binary counter: one sum for each level of the tree over its lanes, and the lane being
/// computed.
#[must_use]
pub fn gradient_sums(lanes: u32) -> u64 {
    u64::from(lanes.max(1).next_power_of_two().ilog2()) + 1
}

/// Floating-point operations to train one unit on one token: a unit's part of
/// [`ModelShape::train_flops_per_token`]. Looking up an embedding is free there; here it has
/// its copy and its addition, 6 · dim, so that no unit costs nothing.
#[must_use]
pub fn unit_flops_per_token(model: &ModelShape, unit: UnitId, sequence_length: u32) -> f64 {
    let d = f64::from(model.dim);
    let range = model.unit_range(unit);
    let parameters = (range.end - range.start) as f64;
    match unit.0 {
        0 => 6.0 * d,
        u if u <= model.layers => 6.0 * parameters + 6.0 * f64::from(sequence_length) * d,
        _ => 6.0 * parameters,
    }
}

/// Floating-point operations of one micro-batch's forward and backward pass through units. Of the
/// six for each parameter and token two are forward: backward has a product for the gradient of
/// the input and one for that of the weights.
#[must_use]
pub fn passes(model: &ModelShape, batch: &BatchShape, units: Range<u32>) -> (u64, u64) {
    let unit = |u| unit_flops_per_token(model, UnitId(u), batch.sequence_length);
    let flops = units.map(unit).sum::<f64>() * batch.tokens_per_micro_batch() as f64;
    let forward = (flops / 3.0) as u64;
    (forward, flops as u64 - forward)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_add_up_to_the_model() {
        let model = ModelShape::preset("7b").unwrap();
        let units: f64 = (0..model.units()).map(|u| unit_flops_per_token(&model, UnitId(u), 4096)).sum();
        let whole = model.train_flops_per_token(4096) + 6.0 * f64::from(model.dim);
        assert!((units / whole - 1.0).abs() < 1e-12, "{units} and {whole}");
    }

    #[test]
    fn passes_of_all_stages_are_those_of_the_model() {
        let model = ModelShape::preset("15m").unwrap();
        let batch = BatchShape { lanes: 4, micro_batches: 2, sequences: 3, sequence_length: 64 };
        let (forward, backward) = passes(&model, &batch, 0..model.units());
        let tokens = batch.tokens_per_micro_batch() as f64;
        let whole = tokens * (model.train_flops_per_token(64) + 6.0 * f64::from(model.dim));
        assert!(
            ((forward + backward) as f64 / whole - 1.0).abs() < 1e-6 && backward.abs_diff(2 * forward) < 4
        );
        let stages = [0..2, 2..model.units()].map(|units| passes(&model, &batch, units).0);
        assert!((stages[0] + stages[1]).abs_diff(forward) < 4);
    }

    #[test]
    fn the_memory_of_70b_is_16_bytes_a_parameter_and_is_shared_out() {
        let model = ModelShape::preset("70b").unwrap();
        let batch = BatchShape { lanes: 8, micro_batches: 1, sequences: 1, sequence_length: 4096 };
        let one = Memory::estimate(&model, &batch, Precision::Fp32, 1, 2);
        assert_eq!(one.moments + one.weights, 12 * model.parameters());
        let single = Memory::estimate(&model, &BatchShape { lanes: 1, ..batch }, Precision::Fp32, 1, 1);
        assert_eq!(single.weights + single.gradients + single.moments, 16 * model.parameters());
        let four = Memory::estimate(&model, &batch, Precision::Fp32, 4, 2);
        assert_eq!(four.moments, one.moments / 2);
        assert_eq!(
            Memory::estimate(&model, &batch, Precision::Fp32, 100, 2),
            Memory::estimate(&model, &batch, Precision::Fp32, 8, 2)
        );
    }

    #[test]
    fn a_sum_is_kept_for_each_level_of_the_lane_tree() {
        assert_eq!([1, 2, 3, 4, 5, 8, 9].map(gradient_sums), [1, 2, 3, 3, 4, 4, 5]);
    }
}
