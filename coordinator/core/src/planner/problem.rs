//! From the cluster's data to a small pure problem of ordinals: workers `0..n` with speed,
//! room, and what each would have to get.

use super::costs::{Costs, Role};
use super::fit::Kind;
use super::{Candidate, Demand};
use caravan_types::cost::{FP32, STATE};
use caravan_types::{Pipeline, SliceId, SliceSet, SliceTable, Stage, WorkerId};
use std::ops::Range;

/// A worker that may compute.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    /// Its place among the candidates.
    pub(super) candidate: usize,
    pub(super) kind: Kind,
    /// Bytes of weights that it lacks of the units before each unit, and of all.
    missing: Vec<u64>,
}

/// The workers, and what everything costs.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    pub(super) costs: Costs,
    /// The number of stages of every pipeline, where it is fixed.
    pub(super) depth: Option<u32>,
    pub(super) workers: Vec<Worker>,
    /// Each unit's slices.
    pub(super) slices: Vec<Range<u32>>,
    /// Pipelines of the plan before whose workers are all there.
    pub(super) before: Vec<Vec<(usize, Range<u32>)>>,
}

/// A pipeline as it is found: its stages in order, each with its worker.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    pub(super) stages: Vec<(usize, Range<u32>)>,
    /// Lanes that it must be able to take in time.
    pub(super) lanes: u32,
}

/// A layout that takes no longer than `step_s`; the lanes of its lines are enough.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Layout {
    pub(super) step_s: f64,
    pub(super) lines: Vec<Line>,
}

/// Each unit's slices: the first one and one past the last.
fn slices_by_unit(table: &SliceTable, units: u32) -> Vec<Range<u32>> {
    let mut ranges: Vec<Range<u32>> = vec![0..0; units as usize];
    for (id, slice) in table.iter() {
        let range = &mut ranges[slice.unit.0 as usize];
        *range = if range.start == range.end { id.0..id.0 + 1 } else { range.start..id.0 + 1 };
    }
    ranges
}

/// Bytes of training state that each of `members` owners has at most, about.
fn share(parameters: u64, redundancy: u32, members: usize) -> u64 {
    let members = members.max(1) as u128;
    let marks = u128::from(redundancy.max(1)).min(members);
    (u128::from(STATE) * u128::from(parameters) * marks).div_ceil(members) as u64
}

/// What a candidate may use: all that there is where its memory is not known.
pub(super) fn memory(candidate: &Candidate) -> u64 {
    if candidate.memory == 0 { u64::MAX } else { candidate.memory }
}

/// Which of these memories hold their share of the training state, and the share. The fewer
/// they are, the larger it is; the smallest gives up first.
pub(super) fn owning(parameters: u64, redundancy: u32, memories: &[u64]) -> (Vec<bool>, u64) {
    let mut order: Vec<usize> = (0..memories.len()).collect();
    order.sort_by_key(|&i| (memories[i], i));
    let mut owns = vec![true; memories.len()];
    for (gone, i) in order.into_iter().enumerate() {
        let share = share(parameters, redundancy, memories.len() - gone);
        if memories[i] >= share {
            return (owns, share);
        }
        owns[i] = false;
    }
    (owns, 0)
}

impl Problem {
    /// The problem of those that own something. `staying` are candidates by their place.
    pub(super) fn new(
        demand: &Demand,
        table: &SliceTable,
        candidates: &[&Candidate],
        staying: &[usize],
        share: u64,
    ) -> Self {
        let costs = Costs::new(demand);
        let by_unit = slices_by_unit(table, costs.units());
        let weights: Vec<u64> = (0..costs.units()).map(|unit| costs.unit_bytes(unit)).collect();
        let worker = |&candidate: &usize| {
            let c = candidates[candidate];
            let memory = memory(c);
            let room = if memory == u64::MAX { memory } else { memory.saturating_sub(share) };
            let speed = if c.speed.is_finite() && c.speed > 0.0 { c.speed } else { 1.0 };
            let missing = missing(table, &by_unit, &weights, &c.state.union(&c.weights));
            Worker { candidate, kind: Kind { speed, room }, missing }
        };
        let workers: Vec<Worker> = staying.iter().map(worker).collect();
        let most = (workers.len() as u32).min(costs.units());
        let depth = demand.stages.map(|stages| stages.clamp(1, most.max(1)));
        Self { costs, depth, workers, slices: by_unit, before: Vec::new() }
    }

    /// The same with the pipelines of the plan before, where workers have these names.
    pub(super) fn with_before(mut self, pipelines: &[Pipeline], ids: &[WorkerId]) -> Self {
        let units = self.costs.units();
        let stage = |stage: &Stage| {
            let known = stage.units.start < stage.units.end && stage.units.end <= units;
            Some((ids.binary_search(&stage.worker).ok().filter(|_| known)?, stage.units.clone()))
        };
        let whole = |p: &Pipeline| p.stages.iter().map(stage).collect::<Option<Vec<_>>>();
        self.before = pipelines.iter().filter_map(whole).collect();
        self
    }

    /// Bytes of the weights of these units that a worker lacks.
    pub(super) fn missing(&self, worker: usize, units: &Range<u32>) -> u64 {
        let missing = &self.workers[worker].missing;
        missing[units.end as usize] - missing[units.start as usize]
    }

    /// Seconds that a worker takes for a stage, for one micro-batch.
    pub(super) fn stage_s(&self, worker: usize, units: &Range<u32>) -> f64 {
        let role = Role::of(units, self.costs.units());
        self.costs.stage_s(role, role.layers(units.end - units.start), self.workers[worker].kind.speed)
    }

    /// Whether a worker has room for a stage.
    pub(super) fn has_room(&self, worker: usize, units: &Range<u32>, depth: u32, lanes: u32) -> bool {
        let role = Role::of(units, self.costs.units());
        let layers = role.layers(units.end - units.start);
        self.costs.stage_bytes(role, layers, depth, lanes) <= self.workers[worker].kind.room
    }

    /// The most layers of a stage with this role in time and in memory.
    pub(super) fn layers_in(
        &self,
        role: Role,
        worker: usize,
        (depth, lanes): (u32, u32),
        stage_s: f64,
    ) -> Option<u32> {
        let kind = self.workers[worker].kind;
        let room = self.costs.layers_in_room(role, kind.room, depth, lanes)?;
        Some(room.min(self.costs.layers_in_time(role, kind.speed, stage_s)?))
    }

    /// Seconds that the slowest stage of a line takes for one micro-batch.
    pub(super) fn slowest_s(&self, line: &Line) -> f64 {
        line.stages.iter().map(|(w, units)| self.stage_s(*w, units)).fold(0.0, f64::max)
    }

    /// The most lanes that a line takes in time and in memory, with its stages as they are.
    pub(super) fn most_lanes(&self, line: &Line, step_s: f64) -> u32 {
        let depth = line.stages.len() as u32;
        let in_time = self.costs.lanes_in_time(step_s, depth, self.slowest_s(line), self.costs.lanes);
        let fits = |lanes: u32| line.stages.iter().all(|(w, units)| self.has_room(*w, units, depth, lanes));
        // Memory grows with each level of the lane tree only.
        let levels = (0..=self.costs.lanes.ilog2()).map(|level| 1 << level);
        levels.take_while(|lanes| fits(*lanes)).last().map_or(0, |most| most.min(in_time))
    }
}

/// For each unit the bytes that are missing of those before it; the last one is of all.
fn missing(table: &SliceTable, by_unit: &[Range<u32>], weights: &[u64], held: &SliceSet) -> Vec<u64> {
    let mut sum = 0;
    let mut sums = Vec::with_capacity(by_unit.len() + 1);
    sums.push(0);
    for (slices, bytes) in by_unit.iter().zip(weights) {
        let here = held.len_in(slices.clone());
        if here == 0 {
            sum += bytes;
        } else if here < slices.len() {
            let lacking = slices.clone().map(SliceId).filter(|id| !held.contains(*id));
            sum += lacking.filter_map(|id| table.get(id)).map(|s| FP32 * s.len() as u64).sum::<u64>();
        }
        sums.push(sum);
    }
    sums
}
