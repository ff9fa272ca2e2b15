//! The model of the planner's head once more, as naively as can be: every set of pipelines,
//! every order, every cut and every deal of lanes is looked at. Shares no code with the search.

use super::super::{Candidate, Demand};
use caravan_types::{Plan, SliceTable, UnitId};
use std::ops::Range;

/// What a plan is judged by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Worth {
    pub(super) step_s: f64,
    pub(super) used: usize,
    pub(super) bytes: u64,
}

/// Formulae, from the shape.
pub(super) struct World<'a> {
    demand: &'a Demand,
    table: &'a SliceTable,
    /// The candidates that own and may compute.
    pub(super) workers: Vec<&'a Candidate>,
    share: u64,
}

impl<'a> World<'a> {
    pub(super) fn new(demand: &'a Demand, table: &'a SliceTable, candidates: &'a [Candidate]) -> Self {
        let mut workers: Vec<&Candidate> = candidates.iter().filter(|c| !c.leaving).collect();
        let memory = |c: &Candidate| if c.memory == 0 { u64::MAX } else { c.memory };
        let share = loop {
            let n = workers.len() as u64;
            if n == 0 {
                break 0;
            }
            let r = u64::from(demand.redundancy).min(n);
            let share = (12 * demand.shape.parameters() * r).div_ceil(n);
            let smallest = workers.iter().enumerate().min_by_key(|(i, c)| (memory(c), *i)).unwrap().0;
            if memory(workers[smallest]) >= share {
                break share;
            }
            workers.remove(smallest);
        };
        Self { demand, table, workers, share }
    }

    fn units(&self) -> u32 {
        self.demand.shape.layers + 2
    }

    fn parameters(&self, units: &Range<u32>) -> u64 {
        let first = self.demand.shape.unit_range(UnitId(units.start)).start;
        self.demand.shape.unit_range(UnitId(units.end - 1)).end - first
    }

    pub(super) fn stage_s(&self, worker: &Candidate, units: &Range<u32>) -> f64 {
        let (shape, batch) = (&self.demand.shape, &self.demand.batch);
        let tokens = f64::from(batch.sequences * batch.sequence_length);
        let d = f64::from(shape.dim);
        let flops: f64 = units
            .clone()
            .map(|u| match u {
                0 => 6.0 * d,
                u if u == self.units() - 1 => 6.0 * (d + d * f64::from(shape.vocab)),
                u => {
                    let layer = self.parameters(&(u..u + 1)) as f64;
                    let forward = 2.0 * layer + 2.0 * f64::from(batch.sequence_length) * d;
                    let down = 2.0 * f64::from(shape.hidden) * d;
                    3.0 * forward + if self.demand.recompute { forward - down } else { 0.0 }
                }
            })
            .sum();
        let neighbours = u32::from(units.start > 0) + u32::from(units.end < self.units());
        let border = 2.0 * tokens * d * 4.0 / self.demand.link_bytes_per_s;
        tokens * flops / worker.speed + f64::from(neighbours) * border
    }

    pub(super) fn fits(&self, worker: &Candidate, units: &Range<u32>, depth: u64, lanes: u32) -> bool {
        if worker.memory == 0 || worker.memory == u64::MAX {
            return true;
        }
        let (shape, batch) = (&self.demand.shape, &self.demand.batch);
        let sums = f64::from(lanes).log2().ceil() as u64 + 1;
        let weights = 4 * self.parameters(units);
        let tokens = u64::from(batch.sequences * batch.sequence_length);
        let [d, h, v, heads] = [shape.dim, shape.hidden, shape.vocab, shape.heads].map(u64::from);
        let qkv = d + 2 * u64::from(shape.kv_heads) * (d / heads);
        let layers = units.clone().filter(|u| *u > 0 && *u < self.units() - 1).count() as u64;
        let mut bytes = weights * (1 + sums) + self.share;
        // All but the input of a layer: for each layer of each flight, or once.
        let rest = 2 * d + qkv + heads + 2 * h;
        let rests = if self.demand.recompute { 1 } else { layers * depth };
        bytes += 4 * tokens * (d * (layers + 1) * depth + rest * rests);
        bytes += 4 * tokens * (6 * d + qkv + 3 * h) + 4 * d * (qkv + d + 3 * h);
        if units.end == self.units() {
            let rows = |logits: u64| tokens.min((logits / v / 256).max(1) * 256);
            bytes += 4 * v * (rows(1 << 23) + rows(1 << 24) + 2 * d);
        }
        bytes <= worker.memory
    }

    pub(super) fn step_s(&self, lanes: u32, depth: usize, stage_s: f64) -> f64 {
        (f64::from(lanes * self.demand.batch.micro_batches) + depth as f64 - 1.0) * stage_s
    }

    pub(super) fn missing(&self, worker: &Candidate, units: &Range<u32>) -> u64 {
        let lacks = self.table.iter().filter(|(id, slice)| {
            units.contains(&slice.unit.0) && !worker.state.contains(*id) && !worker.weights.contains(*id)
        });
        lacks.map(|(_, slice)| 4 * slice.len() as u64).sum()
    }

    /// What a plan is worth; panics where it is none.
    pub(super) fn judge(&self, plan: &Plan) -> Worth {
        let mut worth = Worth { step_s: 0.0, used: 0, bytes: 0 };
        let mut seen = Vec::new();
        let mut lane = 0;
        for pipeline in &plan.pipelines {
            assert_eq!(pipeline.lanes.start, lane);
            assert!(!pipeline.lanes.is_empty());
            lane = pipeline.lanes.end;
            let (lanes, depth) = (pipeline.lanes.len() as u32, pipeline.stages.len());
            let (mut unit, mut slowest) = (0, 0.0f64);
            for stage in &pipeline.stages {
                assert!(stage.units.start == unit && stage.units.end > unit, "{pipeline:?}");
                unit = stage.units.end;
                let worker = self.workers.iter().find(|c| c.member.worker == stage.worker).unwrap();
                assert!(self.fits(worker, &stage.units, depth as u64, lanes), "no room: {pipeline:?}");
                slowest = slowest.max(self.stage_s(worker, &stage.units));
                worth.bytes += self.missing(worker, &stage.units);
                worth.used += 1;
                assert!(!seen.contains(&stage.worker), "twice: {}", stage.worker);
                seen.push(stage.worker);
            }
            assert_eq!(unit, self.units());
            worth.step_s = worth.step_s.max(self.step_s(lanes, depth, slowest));
        }
        assert_eq!(lane, self.demand.batch.lanes);
        worth
    }

    /// The best that there is, for at most 8 workers, by looking at everything.
    pub(super) fn best(&self) -> Option<Worth> {
        let n = self.workers.len();
        let lanes = self.demand.batch.lanes;
        let placements: Vec<Vec<Placement>> = (0..1usize << n).map(|group| self.placements(group)).collect();
        let time = |group: usize, l: u32| {
            let all = placements[group].iter().filter(|p| p.most >= l);
            all.map(|p| self.step_s(l, group.count_ones() as usize, p.stage_s)).fold(f64::INFINITY, f64::min)
        };
        let times: Vec<Vec<f64>> =
            (0..1usize << n).map(|g| (0..=lanes).map(|l| time(g, l)).collect()).collect();
        let mut step_s = f64::INFINITY;
        deals((1 << n) - 1, lanes, &mut Vec::new(), &times, f64::MAX, &mut |deal| {
            let slowest = deal.iter().map(|(g, l)| times[*g][*l as usize]).fold(0.0, f64::max);
            step_s = step_s.min(slowest);
        });
        if step_s.is_infinite() {
            return None;
        }
        let bound = step_s * (1.0 + 1e-9);
        let price = |group: usize, l: u32| {
            let depth = group.count_ones() as usize;
            let all = placements[group].iter();
            let fit = all.filter(|p| p.most >= l && self.step_s(l, depth, p.stage_s) <= bound);
            fit.map(|p| p.bytes).min().unwrap_or(u64::MAX)
        };
        let prices: Vec<Vec<u64>> =
            (0..1usize << n).map(|g| (0..=lanes).map(|l| price(g, l)).collect()).collect();
        let mut best = (0, u64::MAX);
        deals((1 << n) - 1, lanes, &mut Vec::new(), &times, bound, &mut |deal| {
            let used: usize = deal.iter().map(|(g, _)| g.count_ones() as usize).sum();
            let bytes: u64 = deal.iter().map(|(g, l)| prices[*g][*l as usize]).sum();
            if used > best.0 || used == best.0 && bytes < best.1 {
                best = (used, bytes);
            }
        });
        Some(Worth { step_s, used: best.0, bytes: best.1 })
    }

    /// Every order and cut of a group.
    fn placements(&self, group: usize) -> Vec<Placement> {
        let members: Vec<usize> = (0..self.workers.len()).filter(|w| group >> w & 1 == 1).collect();
        let depth = members.len();
        let forced =
            self.demand.stages.map(|s| (s as usize).min(self.workers.len()).min(self.units() as usize));
        let mut all = Vec::new();
        if depth == 0 || depth > self.units() as usize || forced.is_some_and(|forced| forced != depth) {
            return all;
        }
        for order in permutations(&members) {
            for cut in cuts(self.units(), depth) {
                let stages = || order.iter().map(|w| self.workers[*w]).zip(&cut);
                let fits = |l: u32| stages().all(|(w, units)| self.fits(w, units, depth as u64, l));
                let most = (1..=self.demand.batch.lanes).rev().find(|l| fits(*l)).unwrap_or(0);
                let stage_s = stages().map(|(w, units)| self.stage_s(w, units)).fold(0.0, f64::max);
                let bytes = stages().map(|(w, units)| self.missing(w, units)).sum();
                all.push(Placement { stage_s, most, bytes });
            }
        }
        all
    }
}

/// One order and cut of a group.
struct Placement {
    stage_s: f64,
    most: u32,
    bytes: u64,
}

/// Every set of groups of different workers, each with at least one lane, all lanes together,
/// where each group's time is at most `bound`.
fn deals(
    left: usize,
    lanes: u32,
    deal: &mut Vec<(usize, u32)>,
    times: &[Vec<f64>],
    bound: f64,
    seen: &mut impl FnMut(&[(usize, u32)]),
) {
    if left == 0 {
        if lanes == 0 {
            seen(deal);
        }
        return;
    }
    let lowest = left & left.wrapping_neg();
    deals(left ^ lowest, lanes, deal, times, bound, seen);
    for group in (1..=left).filter(|g| g & !left == 0 && g & lowest != 0) {
        for l in 1..=lanes {
            if times[group][l as usize] <= bound {
                deal.push((group, l));
                deals(left ^ group, lanes - l, deal, times, bound, seen);
                deal.pop();
            }
        }
    }
}

fn permutations(items: &[usize]) -> Vec<Vec<usize>> {
    if items.is_empty() {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (i, first) in items.iter().enumerate() {
        let rest: Vec<usize> = items.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, x)| *x).collect();
        for mut tail in permutations(&rest) {
            tail.insert(0, *first);
            all.push(tail);
        }
    }
    all
}

/// Every cut of `0..units` into `parts` ranges.
fn cuts(units: u32, parts: usize) -> Vec<Vec<Range<u32>>> {
    fn go(start: u32, units: u32, parts: usize) -> Vec<Vec<Range<u32>>> {
        if parts == 1 {
            return vec![vec![start..units]];
        }
        let mut all = Vec::new();
        for end in start + 1..=units - (parts as u32 - 1) {
            for mut tail in go(end, units, parts - 1) {
                tail.insert(0, start..end);
                all.push(tail);
            }
        }
        all
    }
    go(0, units, parts)
}
