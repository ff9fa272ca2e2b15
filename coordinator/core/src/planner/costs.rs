//! What a stage costs: time, memory, and how much of the model fits into a bound of either.
//!
//! Layers are equal, so a stage is its [`Role`] and its number of layers.

use super::Demand;
use caravan_types::UnitId;
use caravan_types::cost::{Activations, FP32, gradient_sums, unit_flops_per_token};
use std::ops::Range;

/// Times of plans that differ by less than this part count as equal: well above the rounding
/// of a few fp64 operations, well below what anybody can measure.
pub(super) const EQUAL: f64 = 1e-9;

/// Which ends of the model a stage has, beside layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The embedding.
    First,
    /// None: layers only.
    Middle,
    /// The head.
    Last,
    /// Both, and all layers.
    Only,
}

/// The roles of a pipeline of several stages.
pub(super) const ROLES: [Role; 3] = [Role::Middle, Role::First, Role::Last];

impl Role {
    /// The role of a stage with these units, of `units` in all.
    pub(super) fn of(stage: &Range<u32>, units: u32) -> Self {
        match (stage.start == 0, stage.end == units) {
            (true, true) => Self::Only,
            (true, false) => Self::First,
            (false, true) => Self::Last,
            (false, false) => Self::Middle,
        }
    }

    fn has_embedding(self) -> bool {
        matches!(self, Self::First | Self::Only)
    }

    fn has_head(self) -> bool {
        matches!(self, Self::Last | Self::Only)
    }

    /// Layers in a stage of so many units.
    pub(super) fn layers(self, units: u32) -> u32 {
        units.saturating_sub(u32::from(self.has_embedding()) + u32::from(self.has_head()))
    }

    /// The fewest layers: a stage is not empty.
    pub(super) fn fewest(self, layers: u32) -> u32 {
        match self {
            Self::Middle => 1,
            Self::Only => layers,
            _ => 0,
        }
    }
}

/// What units, activations and borders cost.
#[derive(Clone, Debug)]
pub(super) struct Costs {
    pub(super) layers: u32,
    pub(super) lanes: u32,
    micro_batches: u32,
    /// Of the embedding, a layer and the head, for one micro-batch forward and backward.
    flops: [f64; 3],
    /// Parameters of the same.
    parameters: [u64; 3],
    /// Bytes of a weight that is computed with.
    weight: u64,
    activations: Activations,
    /// Seconds for one micro-batch's activations and their gradients over one border.
    border_s: f64,
}

impl Costs {
    pub(super) fn new(demand: &Demand) -> Self {
        let (shape, batch) = (&demand.shape, &demand.batch);
        let tokens = f64::from(batch.sequences) * f64::from(batch.sequence_length);
        let kinds = [0, 1, shape.units() - 1].map(UnitId);
        let parameters = |unit| {
            let range = shape.unit_range(unit);
            range.end - range.start
        };
        let flops =
            |unit| tokens * unit_flops_per_token(shape, unit, batch.sequence_length, demand.recompute);
        Self {
            layers: shape.layers,
            lanes: batch.lanes,
            micro_batches: batch.micro_batches,
            flops: kinds.map(flops),
            parameters: kinds.map(parameters),
            weight: demand.precision.bytes(),
            activations: Activations::new(shape, batch, demand.precision, demand.recompute),
            border_s: 2.0 * tokens * f64::from(shape.dim) * FP32 as f64 / demand.link_bytes_per_s,
        }
    }

    pub(super) fn units(&self) -> u32 {
        self.layers + 2
    }

    /// Bytes of a unit's weights on their way to somebody.
    pub(super) fn unit_bytes(&self, unit: u32) -> u64 {
        match unit {
            0 => FP32 * self.parameters[0],
            u if u <= self.layers => FP32 * self.parameters[1],
            _ => FP32 * self.parameters[2],
        }
    }

    /// FLOPs of a micro-batch through the whole model.
    fn flops(&self, role: Role, layers: u32) -> f64 {
        let [embedding, layer, head] = self.flops;
        let ends = [(role.has_embedding(), embedding), (role.has_head(), head)];
        let ends: f64 = ends.iter().filter(|(has, _)| *has).map(|(_, flops)| flops).sum();
        ends + f64::from(layers) * layer
    }

    fn borders_s(&self, role: Role) -> f64 {
        match role {
            Role::Only => 0.0,
            Role::Middle => 2.0 * self.border_s,
            _ => self.border_s,
        }
    }

    /// Seconds that a stage takes for one micro-batch.
    pub(super) fn stage_s(&self, role: Role, layers: u32, speed: f64) -> f64 {
        self.flops(role, layers) / speed + self.borders_s(role)
    }

    /// No set of stages with so much speed together has a slowest one that is faster.
    pub(super) fn least_stage_s(&self, speed: f64) -> f64 {
        self.flops(Role::Only, self.layers) / speed
    }

    /// Bytes of a stage in a pipeline of `depth` stages and `lanes` lanes: weights, gradient
    /// sums, and the activations of as many micro-batches as there are stages.
    pub(super) fn stage_bytes(&self, role: Role, layers: u32, depth: u32, lanes: u32) -> u64 {
        self.ends_bytes(role, depth, lanes)
            .saturating_add(self.layer_bytes(depth, lanes).saturating_mul(u64::from(layers)))
    }

    fn layer_bytes(&self, depth: u32, lanes: u32) -> u64 {
        self.parameters[1] * self.parameter_bytes(lanes) + self.activations.layer * u64::from(depth)
    }

    /// Bytes of a parameter of a stage: its weight, and the sums of its gradient.
    fn parameter_bytes(&self, lanes: u32) -> u64 {
        self.weight + FP32 * gradient_sums(lanes)
    }

    /// A stage's bytes without its layers.
    fn ends_bytes(&self, role: Role, depth: u32, lanes: u32) -> u64 {
        let each = self.parameter_bytes(lanes);
        let embedding = if role.has_embedding() { self.parameters[0] * each } else { 0 };
        let head = if role.has_head() { self.parameters[2] * each + self.activations.head } else { 0 };
        embedding + head + self.activations.stream * u64::from(depth) + self.activations.shared
    }

    /// The most layers, if any will do, of a stage that takes no longer than `bound_s`.
    pub(super) fn layers_in_time(&self, role: Role, speed: f64, bound_s: f64) -> Option<u32> {
        let flops = (bound_s - self.borders_s(role)) * speed - self.flops(role, 0);
        let guess = (flops / self.flops[1]).clamp(0.0, f64::from(self.layers)) as u32;
        // Division and multiplication round differently: the guess may be one off.
        let fits = |layers: &u32| self.stage_s(role, *layers, speed) <= bound_s;
        let near = (guess.saturating_sub(1)..=(guess + 1).min(self.layers)).rev();
        near.into_iter().find(fits).filter(|layers| *layers >= role.fewest(self.layers))
    }

    /// The most layers, if any will do, of a stage that fits into `room` bytes.
    pub(super) fn layers_in_room(&self, role: Role, room: u64, depth: u32, lanes: u32) -> Option<u32> {
        let left = room.checked_sub(self.ends_bytes(role, depth, lanes))?;
        let layers = (left / self.layer_bytes(depth, lanes)).min(u64::from(self.layers)) as u32;
        Some(layers).filter(|layers| *layers >= role.fewest(self.layers))
    }

    /// Seconds of a step of a pipeline: the pipeline fills once, then every micro-batch takes
    /// as long as the slowest stage (PipeDream-flush, arXiv 2006.09503, section 3.2).
    pub(super) fn step_s(&self, lanes: u32, depth: u32, stage_s: f64) -> f64 {
        self.slots(lanes, depth) * stage_s
    }

    /// How long its slowest stage may take where a step may take `step_s`.
    pub(super) fn stage_bound_s(&self, step_s: f64, lanes: u32, depth: u32) -> f64 {
        step_s / self.slots(lanes, depth)
    }

    fn slots(&self, lanes: u32, depth: u32) -> f64 {
        f64::from(lanes) * f64::from(self.micro_batches) + f64::from(depth) - 1.0
    }

    /// The most lanes, up to `most`, of a pipeline whose step takes no longer than `step_s`.
    pub(super) fn lanes_in_time(&self, step_s: f64, depth: u32, stage_s: f64, most: u32) -> u32 {
        let slots = step_s / stage_s - f64::from(depth) + 1.0;
        let guess = (slots / f64::from(self.micro_batches)).clamp(0.0, f64::from(most)) as u32;
        let fits = |lanes: &u32| self.step_s(*lanes, depth, stage_s) <= step_s;
        let near = (guess.saturating_sub(1)..=guess.saturating_add(1).min(most)).rev();
        near.into_iter().find(|lanes| *lanes == 0 || fits(lanes)).unwrap_or(0)
    }
}
