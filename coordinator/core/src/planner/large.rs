//! A good layout of many workers.
//!
//! Workers stand in a line, like beside like, and a pipeline is a run of neighbours: then the
//! best way to cut the line, for a given time of a step, is a dynamic program over places, and
//! the least time is found by halving. Two lines are tried, one by speed and one by memory.
//! Where all workers are equal there is only one line, and the answer is the best there is.
//!
//! Workers left over are then taken in wherever that slows nothing down ([`take_in`]), and
//! `arrange` gives everybody the part of the model that is nearest to what it holds.

use super::arrange::arrange;
use super::costs::EQUAL;
use super::deal::even;
use super::fit::{Kind, Steps, bottleneck, kinds};
use super::least::least;
use super::problem::{Layout, Problem};
use std::collections::BTreeSet;
use std::ops::Range;

/// Workers that differ less than these count as equal while pipelines are formed. With fewer
/// kinds than this nobody is rounded.
const MOST_KINDS: usize = 512;

/// Cells of (place, depth) that are looked at: each costs some 10 ns in each of some twenty
/// turns, and some microseconds once. Beyond, only some depths are tried.
const MOST_CELLS: usize = 400_000;

/// Workers for which a third line is tried.
const MOST_MIXED: usize = 256;

/// The search ends where it can win no more than this part; what it has found by then is
/// improved as far as its own pipelines allow.
const PRECISION: f64 = 1e-4;

/// Doublings until a step is long enough, and halvings after that: 0.02 · 2^40 times the time
/// of a perfect split is beyond any cluster, and 2^-16 of the last doubling is [`PRECISION`].
const MOST_TURNS: u32 = 40;

/// Tries to take in workers that are left over, at some microseconds each.
const MOST_TRIES: usize = 20_000;

/// A good layout; none where no pipeline fits.
pub(super) fn search(problem: &Problem) -> Option<Layout> {
    let orders = [Order::by_speed(problem), Order::by_room(problem), Order::mixed(problem)];
    let mut best: Option<(f64, Vec<Group>)> = None;
    for mut order in orders.into_iter().flatten() {
        let Some((step_s, runs)) = order.least() else { continue };
        if best.as_ref().is_none_or(|(least, _)| step_s < *least / (1.0 + EQUAL)) {
            best = Some((step_s, order.groups(&runs, step_s)));
        }
    }
    let (step_s, mut groups) = best?;
    let bound = step_s * (1.0 + EQUAL);
    take_in(problem, &mut groups, bound);
    let most: Vec<u32> = groups.iter().map(|g| g.steps.lanes(&problem.costs, bound, g.depth())).collect();
    let done_s = |i: usize, lanes: u32| {
        let group: &Group = &groups[i];
        group.steps.step_s(&problem.costs, lanes, group.depth()).unwrap_or(f64::INFINITY)
    };
    let lanes = even(problem.costs.lanes, &most, done_s);
    let members: Vec<Vec<usize>> = groups.into_iter().map(|g| g.members).collect();
    Some(Layout { step_s, lines: arrange(problem, &members, &lanes, bound) })
}

/// Whether these workers can train the model at all, however slowly.
pub(super) fn fits(problem: &Problem) -> bool {
    let orders = [Order::by_speed(problem), Order::by_room(problem)];
    orders.into_iter().flatten().any(|mut order| order.cut(f64::MAX).is_some())
}

/// A pipeline to be: its members and the lanes that it takes.
struct Group {
    members: Vec<usize>,
    steps: Steps,
}

impl Group {
    fn depth(&self) -> u32 {
        self.members.len() as u32
    }
}

/// Workers in a line.
struct Order<'a> {
    problem: &'a Problem,
    /// The worker and the rounded kind at each place.
    workers: Vec<usize>,
    kinds: Vec<Kind>,
    /// For each place, where the run of its kind starts.
    starts: Vec<usize>,
    depths: Vec<u32>,
    /// What a run of neighbours takes, by depth and place. Where all are of one kind, the
    /// place is that where the kind starts.
    cells: Vec<Steps>,
}

impl<'a> Order<'a> {
    fn by_speed(problem: &'a Problem) -> Option<Self> {
        let key = |w: usize| (problem.workers[w].kind.speed.to_bits(), problem.workers[w].kind.room);
        Some(Self::new(problem, key))
    }

    /// None where memory does not matter, or speed does not: then it is the same line.
    fn by_room(problem: &'a Problem) -> Option<Self> {
        let first = problem.workers.first()?.kind;
        let differ = |same: fn(Kind, Kind) -> bool| problem.workers.iter().any(|w| !same(w.kind, first));
        let useful = differ(|a, b| a.room == b.room) && differ(|a, b| a.speed == b.speed);
        let key = |w: usize| (problem.workers[w].kind.room, problem.workers[w].kind.speed.to_bits());
        useful.then(|| Self::new(problem, key))
    }

    /// The fastest beside the slowest, the next beside the next: then all pipelines are about
    /// as fast, which fits better where lanes are few. None where that is many kinds of cells.
    fn mixed(problem: &'a Problem) -> Option<Self> {
        let first = problem.workers.first()?.kind;
        let differ = problem.workers.iter().any(|w| w.kind.speed != first.speed);
        (differ && problem.workers.len() <= MOST_MIXED).then(|| {
            let sorted = Self::sorted(problem, |w| {
                (problem.workers[w].kind.speed.to_bits(), problem.workers[w].kind.room)
            });
            let (fast, slow) = sorted.split_at(sorted.len().div_ceil(2));
            let mut workers = Vec::with_capacity(sorted.len());
            for (i, worker) in fast.iter().enumerate() {
                workers.push(*worker);
                workers.extend(slow.len().checked_sub(i + 1).map(|at| slow[at]));
            }
            Self::of(problem, workers)
        })
    }

    /// The workers, those with the largest keys first, equal ones in the order of their names.
    fn sorted(problem: &Problem, key: impl Fn(usize) -> (u64, u64)) -> Vec<usize> {
        let mut workers: Vec<usize> = (0..problem.workers.len()).collect();
        workers.sort_by_key(|&w| (std::cmp::Reverse(key(w)), w));
        workers
    }

    fn new(problem: &'a Problem, key: impl Fn(usize) -> (u64, u64)) -> Self {
        Self::of(problem, Self::sorted(problem, key))
    }

    fn of(problem: &'a Problem, workers: Vec<usize>) -> Self {
        let kinds = rounded(workers.iter().map(|w| problem.workers[*w].kind).collect());
        let mut starts = Vec::with_capacity(kinds.len());
        for place in 0..kinds.len() {
            let same = place > 0 && kinds[place] == kinds[place - 1];
            starts.push(if same { starts[place - 1] } else { place });
        }
        let depths = depths(problem, starts.last() == Some(&0));
        let cells = vec![Steps::default(); depths.len() * kinds.len()];
        Self { problem, workers, kinds, starts, depths, cells }
    }

    fn group(&self, places: Range<usize>) -> Vec<(Kind, u32)> {
        let mut group: Vec<(Kind, u32)> = Vec::new();
        for place in places {
            match group.last_mut() {
                Some((kind, count)) if *kind == self.kinds[place] => *count += 1,
                _ => group.push((self.kinds[place], 1)),
            }
        }
        group
    }

    fn cell(&self, depth: usize, start: usize) -> usize {
        let end = start + self.depths[depth] as usize - 1;
        let place = if self.starts[start] == self.starts[end] { self.starts[start] } else { start };
        depth * self.kinds.len() + place
    }

    /// The lanes that a run of neighbours takes within a time.
    fn lanes(&mut self, depth: usize, start: usize, step_s: f64) -> u32 {
        let (cell, stages) = (self.cell(depth, start), self.depths[depth]);
        if self.cells[cell].may_grow(&self.problem.costs, step_s, stages) {
            let group = self.group(start..start + stages as usize);
            self.cells[cell].grow(&self.problem.costs, &group, step_s);
        }
        self.cells[cell].lanes(&self.problem.costs, step_s, stages)
    }

    /// Cuts the line into pipelines that take all lanes within a time: depth and start of each.
    fn cut(&mut self, step_s: f64) -> Option<Vec<(usize, usize)>> {
        let wanted = self.problem.costs.lanes;
        // For each number of places, the most lanes, and the depth of the last pipeline.
        let mut most: Vec<(u32, Option<usize>)> = vec![(0, None)];
        for end in 1..=self.kinds.len() {
            let mut best = (most[end - 1].0, None);
            for depth in 0..self.depths.len() {
                let Some(start) = end.checked_sub(self.depths[depth] as usize) else { break };
                let lanes = self.lanes(depth, start, step_s);
                let sum = most[start].0.saturating_add(lanes);
                if lanes > 0 && sum > best.0 {
                    best = (sum, Some(depth));
                }
            }
            most.push(best);
            if best.0 >= wanted {
                break;
            }
        }
        if most.last().is_none_or(|(lanes, _)| *lanes < wanted) {
            return None;
        }
        let (mut end, mut runs) = (most.len() - 1, Vec::new());
        while end > 0 {
            match most[end].1 {
                Some(depth) => {
                    end -= self.depths[depth] as usize;
                    runs.push((depth, end));
                }
                None => end -= 1,
            }
        }
        runs.reverse();
        Some(runs)
    }

    /// The least time of a step that is found, and its pipelines.
    fn least(&mut self) -> Option<(f64, Vec<(usize, usize)>)> {
        let costs = &self.problem.costs;
        let speed: f64 = self.kinds.iter().map(|kind| kind.speed).sum();
        let mut low = costs.step_s(costs.lanes, 1, costs.least_stage_s(speed));
        let mut stride = 0.02;
        let mut found = None;
        for _ in 0..MOST_TURNS {
            found = self.within(low * (1.0 + stride));
            if found.is_some() || self.cells.iter().all(Steps::is_empty) {
                break;
            }
            low *= 1.0 + stride;
            stride *= 2.0;
        }
        let (mut high, mut runs) = found?;
        for _ in 0..MOST_TURNS {
            let last = high <= low * (1.0 + PRECISION);
            let bound = if last { high * (1.0 - EQUAL) } else { low + (high - low) / 2.0 };
            match self.within(bound) {
                Some(better) => (high, runs) = better,
                None if last => break,
                None => low = bound,
            }
        }
        Some((high, runs))
    }

    /// Pipelines that take all lanes within a time, and the time that they really take.
    fn within(&mut self, step_s: f64) -> Option<(f64, Vec<(usize, usize)>)> {
        let mut runs = self.cut(step_s)?;
        let costs = &self.problem.costs;
        let lanes = |run: &(usize, usize), step_s| {
            self.cells[self.cell(run.0, run.1)].lanes(costs, step_s, self.depths[run.0])
        };
        if runs.len() > costs.lanes as usize {
            // Each takes a lane: any of them are enough. Those that could take the most stay.
            runs.sort_by_key(|run| (std::cmp::Reverse(lanes(run, step_s)), run.1));
            runs.truncate(costs.lanes as usize);
            runs.sort_by_key(|run| run.1);
        }
        let time = |run: &(usize, usize), lanes| {
            self.cells[self.cell(run.0, run.1)].step_s(costs, lanes, self.depths[run.0])
        };
        let works = |bound: f64| {
            let each: Vec<u32> = runs.iter().map(|run| lanes(run, bound)).collect();
            let enough = each.iter().map(|lanes| u64::from(*lanes)).sum::<u64>() >= u64::from(costs.lanes);
            let times = runs.iter().zip(&each).filter_map(|(run, lanes)| time(run, *lanes));
            (enough && !each.contains(&0)).then(|| times.fold(0.0, f64::max))
        };
        let above = |bound: f64| {
            let times = runs.iter().filter_map(|run| time(run, lanes(run, bound) + 1));
            times.fold(f64::INFINITY, f64::min)
        };
        let high = works(step_s)?;
        Some((least((0.0, high), works, above), runs))
    }

    /// The pipelines with their real members.
    fn groups(&self, runs: &[(usize, usize)], step_s: f64) -> Vec<Group> {
        let group = |&(depth, start): &(usize, usize)| {
            let members = self.workers[start..start + self.depths[depth] as usize].to_vec();
            let mut steps = self.cells[self.cell(depth, start)].clone();
            steps.grow(&self.problem.costs, &self.group(start..start + members.len()), step_s);
            Group { members, steps }
        };
        runs.iter().map(group).collect()
    }
}

/// Rounds kinds down, in their order, so that there are few enough. Of each bucket the slowest
/// speed and the smallest room stand for all, so that what fits them fits everybody in it.
fn rounded(mut kinds: Vec<Kind>) -> Vec<Kind> {
    let distinct = |kinds: &[Kind]| kinds.chunk_by(|a, b| a == b).count();
    // Doubles from a thousandth on: after 12 turns everybody within a factor of 4 is equal.
    let mut grain = 1.001f64;
    for _ in 0..12 {
        if distinct(&kinds) <= MOST_KINDS {
            break;
        }
        let near = |a: f64, b: f64| a <= b * grain && b <= a * grain;
        let mut start = 0;
        while start < kinds.len() {
            let head = kinds[start];
            let like = |k: &&Kind| near(k.speed, head.speed) && near(k.room as f64, head.room as f64);
            let length = kinds[start..].iter().take_while(like).count().max(1);
            let bucket = &mut kinds[start..start + length];
            let speed = bucket.iter().map(|k| k.speed).fold(f64::INFINITY, f64::min);
            let room = bucket.iter().map(|k| k.room).min().unwrap_or(0);
            bucket.fill(Kind { speed, room });
            start += length;
        }
        grain *= grain;
    }
    kinds
}

/// The depths that are tried, ascending. All where that is little work, as it is where all
/// workers are equal; else the small ones, those around the number of workers for each lane,
/// and larger and larger ones.
fn depths(problem: &Problem, equal: bool) -> Vec<u32> {
    let (workers, costs) = (problem.workers.len() as u32, &problem.costs);
    let deepest = workers.min(costs.units());
    if let Some(depth) = problem.depth {
        return vec![depth];
    }
    let most = (MOST_CELLS / problem.workers.len().max(1)).max(8) as u32;
    if equal || deepest <= most {
        return (1..=deepest).collect();
    }
    let each = workers / costs.lanes;
    let near = each.saturating_sub(most / 8)..=each + most / 8;
    let grown = (0..most).map(|i| (f64::from(deepest).powf(f64::from(i) / f64::from(most - 1))) as u32);
    let all: BTreeSet<u32> = (1..=most / 4).chain(near).chain(grown).collect();
    all.into_iter().filter(|depth| (1..=deepest).contains(depth)).collect()
}

/// Gives workers that are left over pipelines of their own or stages in those that are there,
/// where all lanes are still done within `step_s`.
fn take_in(problem: &Problem, groups: &mut Vec<Group>, step_s: f64) {
    let costs = &problem.costs;
    let mut used = vec![false; problem.workers.len()];
    groups.iter().flat_map(|g| &g.members).for_each(|w| used[*w] = true);
    together(problem, groups, &mut used, step_s);
    let mut tries = 0;
    // Each turn but the last takes somebody in.
    for _ in 0..problem.workers.len() {
        if problem.depth.is_some() || groups.iter().all(|g| g.depth() == costs.units()) {
            return;
        }
        let mut changed = false;
        let mut refused: BTreeSet<(u64, u64)> = BTreeSet::new();
        for (worker, used) in used.iter_mut().enumerate() {
            let kind = problem.workers[worker].kind;
            let key = (kind.speed.to_bits(), kind.room);
            if *used || refused.contains(&key) || tries > MOST_TRIES {
                continue;
            }
            if join(problem, groups, worker, step_s, &mut tries) {
                *used = true;
                changed = true;
            } else {
                refused.insert(key);
            }
        }
        if !changed {
            return;
        }
    }
}

/// Makes pipelines of workers that are left over, the fastest first, as shallow as they can be,
/// while there are lanes for more.
fn together(problem: &Problem, groups: &mut Vec<Group>, used: &mut [bool], step_s: f64) {
    let costs = &problem.costs;
    let mut left: Vec<usize> = (0..used.len()).filter(|w| !used[*w]).collect();
    left.sort_by_key(|w| (std::cmp::Reverse(problem.workers[*w].kind.speed.to_bits()), *w));
    let depths = problem.depth.map_or(1..=costs.units() as usize, |depth| depth as usize..=depth as usize);
    let (mut start, mut tries) = (0, 0);
    while start < left.len() && groups.len() < costs.lanes as usize && tries < MOST_TRIES {
        let mut found = None;
        for depth in depths.clone().take_while(|depth| start + depth <= left.len()) {
            let members = &left[start..start + depth];
            let steps = Steps::within(costs, &kinds(problem, members), step_s);
            tries += depth;
            if steps.lanes(costs, step_s, depth as u32) > 0 {
                found = Some(Group { members: members.to_vec(), steps });
                break;
            }
        }
        start += found.as_ref().map_or(1, |group| group.members.len());
        if let Some(group) = found {
            group.members.iter().for_each(|w| used[*w] = true);
            groups.push(group);
        }
    }
}

/// Tries to add a worker to a pipeline that is there.
fn join(problem: &Problem, groups: &mut [Group], worker: usize, step_s: f64, tries: &mut usize) -> bool {
    let costs = &problem.costs;
    let lanes: Vec<u32> = groups.iter().map(|g| g.steps.lanes(costs, step_s, g.depth())).collect();
    let sum: u64 = lanes.iter().map(|lanes| u64::from(*lanes)).sum();
    let spare = sum.saturating_sub(u64::from(costs.lanes)) as u32;
    for (group, lanes) in groups.iter_mut().zip(lanes) {
        if group.depth() >= costs.units() {
            continue;
        }
        *tries += 1;
        let depth = group.depth() + 1;
        let needed = lanes.saturating_sub(spare).max(1);
        let with = kinds(problem, &[group.members.as_slice(), &[worker]].concat());
        let in_time =
            bottleneck(costs, &with, needed, 0.0).is_some_and(|s| costs.step_s(needed, depth, s) <= step_s);
        if in_time {
            group.members.push(worker);
            group.steps = Steps::within(costs, &with, step_s);
            return true;
        }
    }
    false
}
