//! How fast a group of workers can be as one pipeline.
//!
//! For a bound on the slowest stage each worker can take so many layers as a stage in the
//! middle, so many with the embedding, so many with the head. Somebody must be first and
//! somebody else last; then the group fits the bound where the layers add up. The least bound
//! is one of the times that some stage can take, and is found by halving between them.

use super::costs::{Costs, ROLES, Role};
use super::problem::Problem;

/// Workers that are as good as each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Kind {
    /// FLOP/s.
    pub(super) speed: f64,
    /// Bytes for stages.
    pub(super) room: u64,
}

/// The kinds of some workers, each once with its number.
pub(super) fn kinds(problem: &Problem, members: &[usize]) -> Vec<(Kind, u32)> {
    let mut kinds: Vec<(Kind, u32)> = Vec::with_capacity(members.len());
    for worker in members {
        let kind = problem.workers[*worker].kind;
        match kinds.iter_mut().find(|(same, _)| *same == kind) {
            Some((_, count)) => *count += 1,
            None => kinds.push((kind, 1)),
        }
    }
    kinds
}

/// Halvings of a bound: each drops at least one time that a stage can take and, a few steps
/// of the first search for an upper end apart, half of the range, which fp64 allows some 64
/// times for numbers of one magnitude.
const MOST_HALVINGS: u32 = 200;

/// Stands for "not at all" in sums of layers; smaller than any sum of real ones.
const NEVER: i64 = -(1 << 40);

/// What a kind can take, in layers, as a stage in the middle, the first and the last one.
type Layers = [Option<u32>; 3];

/// The shortest time in seconds that the slowest stage takes for a micro-batch, where these
/// workers, each kind so often, are one pipeline of `lanes` lanes. None where they are more
/// than the stages that the model has units for, or their memory is too small. It is known to be
/// `floor` at least.
pub(super) fn bottleneck(costs: &Costs, group: &[(Kind, u32)], lanes: u32, floor: f64) -> Option<f64> {
    let depth: u32 = group.iter().map(|(_, count)| count).sum();
    if depth > costs.units() {
        return None;
    }
    if let ([(kind, _)], 1) = (group, depth) {
        let role = Role::Only;
        costs.layers_in_room(role, kind.room, depth, lanes)?;
        return Some(costs.stage_s(role, costs.layers, kind.speed));
    }
    let rooms: Vec<Layers> = group
        .iter()
        .map(|(kind, _)| ROLES.map(|role| costs.layers_in_room(role, kind.room, depth, lanes)))
        .collect();
    if most_layers(group, &rooms) < i64::from(costs.layers) {
        return None;
    }
    let most = rooms.clone();
    Some(Search { costs, group, rooms, most }.least(depth, floor))
}

struct Search<'a> {
    costs: &'a Costs,
    group: &'a [(Kind, u32)],
    /// What each kind has room for.
    rooms: Vec<Layers>,
    /// What each kind takes within the bound that was looked at last.
    most: Vec<Layers>,
}

impl Search<'_> {
    /// The least bound that fits; one does.
    fn least(&mut self, depth: u32, floor: f64) -> f64 {
        let speed = self.group.iter().map(|(kind, count)| kind.speed * f64::from(*count)).sum();
        // All candidates below `low` fail; `high` is one that fits.
        let (mut low, mut high) = (self.costs.least_stage_s(speed).max(floor), f64::INFINITY);
        // The floor itself is likely where there is one. Else, rounding up to whole layers costs
        // one in layers / depth of them, at first sight.
        let mut stride = if low == floor { 0.0 } else { f64::from(depth) / f64::from(self.costs.layers) };
        for _ in 0..MOST_HALVINGS {
            let bound = if high.is_finite() { low + (high - low) / 2.0 } else { low * (1.0 + stride) };
            stride = (2.0 * stride).max(1.0 / 64.0);
            if self.fits(bound) {
                high = self.below();
            } else {
                low = self.above();
            }
            if low >= high {
                return high;
            }
        }
        high
    }

    /// Whether the group fits a bound.
    fn fits(&mut self, bound: f64) -> bool {
        for ((kind, _), (rooms, most)) in self.group.iter().zip(self.rooms.iter().zip(&mut self.most)) {
            for (slot, role) in ROLES.into_iter().enumerate() {
                let time = rooms[slot].and_then(|_| self.costs.layers_in_time(role, kind.speed, bound));
                most[slot] = rooms[slot].zip(time).map(|(room, time)| room.min(time));
            }
        }
        most_layers(self.group, &self.most) >= i64::from(self.costs.layers)
    }

    /// The longest time of a stage that has as many layers as it may.
    fn below(&self) -> f64 {
        self.times(|_, most, _| most).fold(0.0, f64::max)
    }

    /// The shortest time of a stage that has one layer more than it may.
    fn above(&self) -> f64 {
        let more = |role: Role, most: Option<u32>, room: Option<u32>| {
            let next = most.map_or(role.fewest(self.costs.layers), |most| most + 1);
            room.filter(|room| next <= *room).map(|_| next)
        };
        self.times(more).fold(f64::INFINITY, f64::min)
    }

    fn times(
        &self,
        pick: impl Fn(Role, Option<u32>, Option<u32>) -> Option<u32>,
    ) -> impl Iterator<Item = f64> {
        let all = (0..self.group.len()).flat_map(|i| (0..ROLES.len()).map(move |slot| (i, slot)));
        all.filter_map(move |(i, slot)| {
            let layers = pick(ROLES[slot], self.most[i][slot], self.rooms[i][slot])?;
            Some(self.costs.stage_s(ROLES[slot], layers, self.group[i].0.speed))
        })
    }
}

/// The most layers that a group takes, with the best choice of its first and its last worker;
/// negative where there is none.
fn most_layers(group: &[(Kind, u32)], layers: &[Layers]) -> i64 {
    let count = |layers: Option<u32>| layers.map_or(NEVER, i64::from);
    let mut sum = 0i64;
    // What the best two gain as first and as last, over being in the middle.
    let mut first = [(NEVER * 4, usize::MAX); 2];
    let mut last = first;
    let put = |best: &mut [(i64, usize); 2], gain: i64, i: usize| {
        if gain > best[0].0 {
            *best = [(gain, i), best[0]];
        } else if gain > best[1].0 {
            best[1] = (gain, i);
        }
    };
    for (i, ((_, n), layers)) in group.iter().zip(layers).enumerate() {
        let [middle, as_first, as_last] = layers.map(count);
        sum = sum.saturating_add(middle.saturating_mul(i64::from(*n)));
        // Of a kind that is there twice, one can be the first and another the last.
        for twin in 0..(*n).min(2) as usize {
            put(&mut first, as_first - middle, 2 * i + twin);
            put(&mut last, as_last - middle, 2 * i + twin);
        }
    }
    let pairs = first.iter().flat_map(|f| last.iter().map(move |l| (f, l)));
    let best = pairs.filter(|(f, l)| f.1 != l.1).map(|(f, l)| f.0.saturating_add(l.0)).max();
    sum.saturating_add(best.unwrap_or(NEVER * 4))
}

/// What a group takes of lanes: with at most so many, its slowest stage takes so long. More
/// lanes mean more gradient sums, so both ascend.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Steps {
    steps: Vec<(u32, f64)>,
    complete: bool,
}

impl Steps {
    /// All steps of a group.
    pub(super) fn new(costs: &Costs, group: &[(Kind, u32)]) -> Self {
        Self::within(costs, group, f64::INFINITY)
    }

    /// The steps for as many lanes as are done within `step_s`.
    pub(super) fn within(costs: &Costs, group: &[(Kind, u32)], step_s: f64) -> Self {
        let mut steps = Self::default();
        steps.grow(costs, group, step_s);
        steps
    }

    /// Adds the steps that may be needed for as many lanes as are done within `step_s`.
    pub(super) fn grow(&mut self, costs: &Costs, group: &[(Kind, u32)], step_s: f64) {
        let depth = group.iter().map(|(_, count)| count).sum();
        let bounded = group.iter().any(|(kind, _)| kind.room < u64::MAX);
        // Each turn doubles the lanes or is the last one.
        while self.may_grow(costs, step_s, depth) {
            let most = self.steps.last().map_or(1, |(most, _)| most.saturating_mul(2));
            let most = if bounded { most.min(costs.lanes) } else { costs.lanes };
            let floor = self.steps.last().map_or(0.0, |(_, stage_s)| *stage_s);
            let stage_s = bottleneck(costs, group, most, floor);
            self.complete = stage_s.is_none() || most == costs.lanes;
            match (self.steps.last_mut(), stage_s) {
                (_, None) => {}
                (Some((lanes, same)), Some(stage_s)) if *same == stage_s => *lanes = most,
                (_, Some(stage_s)) => self.steps.push((most, stage_s)),
            }
        }
    }

    /// Whether there may be steps that are not known yet and whose lanes are done within `step_s`.
    pub(super) fn may_grow(&self, costs: &Costs, step_s: f64, depth: u32) -> bool {
        let within = |(most, stage_s): &(u32, f64)| costs.step_s(*most, depth, *stage_s) <= step_s;
        !self.complete && self.steps.last().is_none_or(within)
    }

    /// Whether no lane is taken, or none is known to be.
    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// The most lanes for which a step takes no longer than `step_s`.
    pub(super) fn lanes(&self, costs: &Costs, step_s: f64, depth: u32) -> u32 {
        let within = |(most, stage_s): &(u32, f64)| costs.lanes_in_time(step_s, depth, *stage_s, *most);
        self.steps.iter().map(within).max().unwrap_or(0)
    }

    /// Seconds of a step with so many lanes; none where they are too many.
    pub(super) fn step_s(&self, costs: &Costs, lanes: u32, depth: u32) -> Option<f64> {
        let (_, stage_s) = self.steps.iter().find(|(most, _)| lanes <= *most)?;
        Some(costs.step_s(lanes, depth, *stage_s))
    }

    /// The most lanes at all.
    pub(super) fn most(&self) -> u32 {
        self.steps.last().map_or(0, |(most, _)| *most)
    }
}
