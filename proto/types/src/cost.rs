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
    /// What one layer keeps from its forward to its backward pass: its input and, where it is
    /// not recomputed, queries, keys and values, what attention gives and its sums' logarithms,
    /// the residual stream in its middle, gate and up.
    pub layer: u64,
    /// The residual stream after the last layer, which is kept, too.
    pub stream: u64,
    /// What all layers share: the matrices of one, packed, gradients of those, two normed rows and a
    /// product and, where they are recomputed, what one of them has besides its input.
    pub shared: u64,
    /// What the head takes: a chunk of logits, and its weights in two packed forms.
    pub head: u64,
}

impl Activations {
    /// The activations of one micro-batch, with or without recomputation.
    #[must_use]
    pub fn new(model: &ModelShape, batch: &BatchShape, precision: Precision, recompute: bool) -> Self {
        let each = precision.bytes();
        let tokens = u64::from(batch.sequences) * u64::from(batch.sequence_length);
        let [d, h, v, heads] = [model.dim, model.hidden, model.vocab, model.heads].map(u64::from);
        let rows = |logits: u64| tokens.min(logit_rows(logits, v));
        let qkv = d + 2 * u64::from(model.kv_heads) * u64::from(model.head_dim());
        let input = FP32 * tokens * d;
        let rest = FP32 * tokens * (d + heads) + each * tokens * (d + qkv + 2 * h);
        let shared = FP32 * tokens * 2 * d + each * tokens * (4 * d + qkv + 3 * h);
        let packed = each * d * (qkv + d + 3 * h);
        Self {
            layer: if recompute { input } else { input + rest },
            stream: input,
            shared: packed + if recompute { shared + rest } else { shared },
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
        recompute: bool,
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
            activations: activations(model, batch, precision, recompute),
        }
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.moments + self.activations
    }
}

/// What the engine's passes over one micro-batch take in a worker that has the whole model.
fn activations(model: &ModelShape, batch: &BatchShape, precision: Precision, recompute: bool) -> u64 {
    let part = Activations::new(model, batch, precision, recompute);
    u64::from(model.layers) * part.layer + part.stream + part.shared + part.head
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
/// its copy and its addition, 6 · dim, so that no unit costs nothing. To recompute a layer is its
/// forward pass, a third of all, but for the product that only the next layer needs; the ends of
/// the model keep what they need.
#[must_use]
pub fn unit_flops_per_token(model: &ModelShape, unit: UnitId, sequence_length: u32, recompute: bool) -> f64 {
    let d = f64::from(model.dim);
    let range = model.unit_range(unit);
    let parameters = (range.end - range.start) as f64;
    match unit.0 {
        0 => 6.0 * d,
        u if u <= model.layers => {
            let flops = 6.0 * parameters + 6.0 * f64::from(sequence_length) * d;
            let again = flops / 3.0 - 2.0 * f64::from(model.hidden) * d;
            if recompute { flops + again } else { flops }
        }
        _ => 6.0 * parameters,
    }
}

/// Floating-point operations of one micro-batch's forward and backward pass through units. Of the
/// six for each parameter and token two are forward: backward has a product for the gradient of
/// the input and one for that of the weights. What is recomputed is part of backward.
#[must_use]
pub fn passes(model: &ModelShape, batch: &BatchShape, recompute: bool, units: Range<u32>) -> (u64, u64) {
    let flops = |recompute| {
        let unit = |u| unit_flops_per_token(model, UnitId(u), batch.sequence_length, recompute);
        units.clone().map(unit).sum::<f64>() * batch.tokens_per_micro_batch() as f64
    };
    let forward = (flops(false) / 3.0) as u64;
    (forward, flops(recompute) as u64 - forward)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_add_up_to_the_model() {
        let model = ModelShape::preset("7b").unwrap();
        let units: f64 =
            (0..model.units()).map(|u| unit_flops_per_token(&model, UnitId(u), 4096, false)).sum();
        let whole = model.train_flops_per_token(4096) + 6.0 * f64::from(model.dim);
        assert!((units / whole - 1.0).abs() < 1e-12, "{units} and {whole}");
    }

    #[test]
    fn passes_of_all_stages_are_those_of_the_model() {
        let model = ModelShape::preset("15m").unwrap();
        let batch = BatchShape { lanes: 4, micro_batches: 2, sequences: 3, sequence_length: 64 };
        let (forward, backward) = passes(&model, &batch, false, 0..model.units());
        let tokens = batch.tokens_per_micro_batch() as f64;
        let whole = tokens * (model.train_flops_per_token(64) + 6.0 * f64::from(model.dim));
        assert!(
            ((forward + backward) as f64 / whole - 1.0).abs() < 1e-6 && backward.abs_diff(2 * forward) < 4
        );
        let stages = [0..2, 2..model.units()].map(|units| passes(&model, &batch, false, units).0);
        assert!((stages[0] + stages[1]).abs_diff(forward) < 4);
    }

    #[test]
    fn the_memory_of_70b_is_16_bytes_a_parameter_and_is_shared_out() {
        let model = ModelShape::preset("70b").unwrap();
        let batch = BatchShape { lanes: 8, micro_batches: 1, sequences: 1, sequence_length: 4096 };
        let one = Memory::estimate(&model, &batch, Precision::Fp32, false, 1, 2);
        assert_eq!(one.moments + one.weights, 12 * model.parameters());
        let single =
            Memory::estimate(&model, &BatchShape { lanes: 1, ..batch }, Precision::Fp32, false, 1, 1);
        assert_eq!(single.weights + single.gradients + single.moments, 16 * model.parameters());
        let four = Memory::estimate(&model, &batch, Precision::Fp32, false, 4, 2);
        assert_eq!(four.moments, one.moments / 2);
        assert_eq!(
            Memory::estimate(&model, &batch, Precision::Fp32, false, 100, 2),
            Memory::estimate(&model, &batch, Precision::Fp32, false, 8, 2)
        );
    }

    #[test]
    fn recomputing_costs_less_than_a_third_more_and_keeps_inputs_only() {
        let model = ModelShape::preset("7b").unwrap();
        let batch = BatchShape { lanes: 1, micro_batches: 1, sequences: 1, sequence_length: 4096 };
        let [(forward, backward), (same, longer)] =
            [false, true].map(|recompute| passes(&model, &batch, recompute, 0..model.units()));
        assert_eq!(forward, same);
        let more = (longer - backward) as f64 / (forward + backward) as f64;
        assert!((0.2..1.0 / 3.0).contains(&more), "{more}");
        let ends = [0..1, model.units() - 1..model.units()];
        assert!(ends.iter().all(
            |end| passes(&model, &batch, true, end.clone()) == passes(&model, &batch, false, end.clone())
        ));
        let [kept, again] =
            [false, true].map(|recompute| Activations::new(&model, &batch, Precision::Mixed, recompute));
        assert_eq!(again.layer, 4 * 4096 * 4096);
        assert_eq!(again.layer + again.shared, kept.layer + kept.shared);
    }

    #[test]
    fn a_sum_is_kept_for_each_level_of_the_lane_tree() {
        assert_eq!([1, 2, 3, 4, 5, 8, 9].map(gradient_sums), [1, 2, 3, 3, 4, 4, 5]);
    }
}
