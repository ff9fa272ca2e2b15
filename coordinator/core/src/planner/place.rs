//! Puts the workers of a group in order and cuts the model among them, so that the fewest
//! bytes move: exactly, by dynamic programming over (set of workers placed, units placed).
//!
//! Among placements that move equally few bytes, the one whose slowest stage is fastest. Both
//! at once, (bytes, time) in that order, are what a prefix is judged by; neither gets better
//! where a prefix gets worse, so the best prefixes make the best whole.

use super::costs::{EQUAL, Role};
use super::problem::Problem;
use std::ops::Range;

/// The most workers of a table: 2^8 sets · 40 units, each looked at once for every worker.
pub(super) const MOST: usize = 8;

/// Bytes that move, and seconds of the slowest stage.
type Price = (u64, f64);

/// No placement.
const NONE: Price = (u64::MAX, f64::INFINITY);

fn cheaper(a: Price, b: Price) -> bool {
    a.0 < b.0 || a.0 == b.0 && a.1 < b.1
}

/// The best placements of all groups of one depth among some workers.
pub(super) struct Table<'a> {
    problem: &'a Problem,
    members: &'a [usize],
    depth: usize,
    /// The most layers of each member as middle, first and last stage.
    layers: Vec<[Option<u32>; 3]>,
    /// Price of the units `0..end` on a set of members, at `set * stride + end`.
    prices: Vec<Price>,
    stride: usize,
}

impl<'a> Table<'a> {
    /// Prices for pipelines of `depth` stages and `lanes` lanes whose steps take no longer
    /// than `step_s`. At most [`MOST`] members.
    pub(super) fn new(
        problem: &'a Problem,
        members: &'a [usize],
        (depth, lanes): (u32, u32),
        step_s: f64,
    ) -> Self {
        let bound = problem.costs.stage_bound_s(step_s * (1.0 + EQUAL), lanes, depth);
        let most = |role, w: &usize| problem.layers_in(role, *w, (depth, lanes), bound);
        let layers = members.iter().map(|w| match depth {
            1 => [most(Role::Only, w), None, None],
            _ => [most(Role::Middle, w), most(Role::First, w), most(Role::Last, w)],
        });
        let layers = layers.collect();
        let stride = problem.costs.units() as usize + 1;
        let mut table = Self { problem, members, depth: depth as usize, layers, prices: Vec::new(), stride };
        if depth > 1 {
            table.fill();
        }
        table
    }

    /// The price of a group, a set of members as bits; none where it does not fit.
    pub(super) fn price(&self, group: usize) -> Option<u64> {
        self.last(group).map(|(price, ..)| price.0)
    }

    /// The stages of a group, in order.
    pub(super) fn stages(&self, group: usize) -> Option<Vec<(usize, Range<u32>)>> {
        let (_, last, start) = self.last(group)?;
        let mut stages = vec![(self.members[last], start..self.problem.costs.units())];
        let (mut set, mut end) = (group & !(1 << last), start);
        while set != 0 {
            let price = self.prices[set * self.stride + end as usize];
            let mut steps = downwards(set).filter_map(|m| self.step_to(set, m, end).map(|(p, a)| (p, a, m)));
            let (_, start, member) = steps.find(|(p, ..)| *p == price)?;
            stages.push((self.members[member], start..end));
            (set, end) = (set & !(1 << member), start);
        }
        stages.reverse();
        Some(stages)
    }

    fn fill(&mut self) {
        self.prices = vec![NONE; self.stride << self.members.len()];
        for set in 1..1usize << self.members.len() {
            let placed = set.count_ones() as usize;
            if placed >= self.depth {
                continue;
            }
            // Those that follow take so many units at most.
            let rest = ((self.depth - placed) * self.widest()) as u32;
            let units = self.problem.costs.units();
            for end in units.saturating_sub(rest).max(placed as u32)..units {
                let steps = downwards(set).filter_map(|m| self.step_to(set, m, end));
                let best = steps.map(|(price, _)| price).reduce(|a, b| if cheaper(b, a) { b } else { a });
                self.prices[set * self.stride + end as usize] = best.unwrap_or(NONE);
            }
        }
    }

    /// The most units that anybody takes.
    fn widest(&self) -> usize {
        let all = self.layers.iter().flatten().flatten();
        all.max().map_or(0, |layers| *layers as usize + 1)
    }

    /// The best way to place `set` on `0..end` with `member` as the last one so far, and where
    /// its stage starts.
    fn step_to(&self, set: usize, member: usize, end: u32) -> Option<(Price, u32)> {
        let before = set & !(1 << member);
        let [middle, first, _] = self.layers[member];
        if before == 0 {
            let fits = first.is_some_and(|layers| end <= layers + 1);
            return fits.then(|| (self.stage(member, 0..end), 0));
        }
        let most = middle?;
        self.best(before, member, end.saturating_sub(most)..end, end)
    }

    /// The best way to place the last stage of a group: its price, member and start.
    fn last(&self, group: usize) -> Option<(Price, usize, u32)> {
        let units = self.problem.costs.units();
        if self.depth == 1 {
            let member = group.trailing_zeros() as usize;
            return self.layers[member][0].map(|_| (self.stage(member, 0..units), member, 0));
        }
        let mut best: Option<(Price, usize, u32)> = None;
        for member in downwards(group) {
            let Some(most) = self.layers[member][2] else { continue };
            let starts = units - 1 - most.min(units - 2)..units;
            let found = self.best(group & !(1 << member), member, starts, units);
            if let Some((price, start)) = found.filter(|f| best.is_none_or(|b| cheaper(f.0, b.0))) {
                best = Some((price, member, start));
            }
        }
        best
    }

    /// The best start of a member's stage that ends at `end`, behind the members of `before`.
    fn best(&self, before: usize, member: usize, starts: Range<u32>, end: u32) -> Option<(Price, u32)> {
        let mut best = (NONE, 0);
        for start in starts {
            let prefix = self.prices[before * self.stride + start as usize];
            if prefix.0 > best.0.0 || prefix.0 == u64::MAX {
                continue;
            }
            let stage = self.stage(member, start..end);
            let price = (prefix.0 + stage.0, prefix.1.max(stage.1));
            if cheaper(price, best.0) {
                best = (price, start);
            }
        }
        (best.0.0 < u64::MAX).then_some(best)
    }

    fn stage(&self, member: usize, units: Range<u32>) -> Price {
        let worker = self.members[member];
        (self.problem.missing(worker, &units), self.problem.stage_s(worker, &units))
    }
}

/// The members of a set, ascending.
pub(super) fn bits(set: usize) -> impl Iterator<Item = usize> {
    std::iter::successors((set != 0).then_some(set), |set| Some(set & (set - 1)).filter(|rest| *rest != 0))
        .map(|set| set.trailing_zeros() as usize)
}

/// The members of a set, descending.
fn downwards(set: usize) -> impl Iterator<Item = usize> {
    let highest = |set: usize| (set != 0).then(|| set.ilog2() as usize);
    std::iter::successors(highest(set), move |bit| highest(set & ((1 << bit) - 1)))
}
