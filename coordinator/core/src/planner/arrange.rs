//! Gives each worker of many pipelines its place, near to what it holds.
//!
//! The pipelines are formed already: how many workers of which kind, and how many lanes. First
//! each gets a cut that is as even as it can be, the same for equal pipelines. A pipeline of the
//! plan before that is made of such workers, fits and has all that it needs stays as it is: so
//! nothing moves where nothing changed. Then, among the other pipelines, workers of one kind
//! change places: whoever holds a stage takes it. What still moves is made less pipeline by
//! pipeline: in small ones by the best order and cut there is, in deep ones by the best cut for
//! two orders. Else a heuristic.

use super::costs::{Costs, EQUAL, Role};
use super::fit::{bottleneck, kinds};
use super::place::{MOST, Table};
use super::problem::{Line, Problem};
use std::collections::BTreeMap;
use std::ops::Range;

/// Work on exact placements, in sets of workers: each costs about a microsecond for each unit
/// that can be the last one placed.
const MOST_SETS: usize = 1 << 13;

type Stages = Vec<(usize, Range<u32>)>;

/// Lines for groups of workers that take `lanes` within `step_s`.
pub(super) fn arrange(problem: &Problem, groups: &[Vec<usize>], lanes: &[u32], step_s: f64) -> Vec<Line> {
    let pairs = groups.iter().zip(lanes);
    let mut lines: Vec<Line> = pairs.filter_map(|(group, lanes)| even_cut(problem, group, *lanes)).collect();
    let kept = keep(problem, &mut lines, step_s);
    change_places(problem, &mut lines, &kept);
    let sets: usize = lines.iter().map(|line| 1usize << line.stages.len().min(MOST + 1)).sum();
    for line in &mut lines {
        if moved(problem, &line.stages) == 0 {
            continue;
        }
        let better = if line.stages.len() <= MOST && sets <= MOST_SETS {
            placed(problem, line, step_s)
        } else {
            recut(problem, line, step_s)
        };
        if let Some(stages) = better.filter(|stages| moved(problem, stages) < moved(problem, &line.stages)) {
            line.stages = stages;
        }
    }
    lines
}

/// Bytes that stages lack.
fn moved(problem: &Problem, stages: &Stages) -> u64 {
    stages.iter().map(|(worker, units)| problem.missing(*worker, units)).sum()
}

/// What makes workers equal.
type Key = (u64, u64);

fn key(problem: &Problem, worker: usize) -> Key {
    let kind = problem.workers[worker].kind;
    (kind.speed.to_bits(), kind.room)
}

/// Keeps pipelines of the plan before, in lines of such workers; which lines have one. The
/// others are manned anew, from whoever is left of each kind.
fn keep(problem: &Problem, lines: &mut [Line], step_s: f64) -> Vec<bool> {
    let kinds = |stages: &Stages| {
        let mut kinds: Vec<Key> = stages.iter().map(|(worker, _)| key(problem, *worker)).collect();
        kinds.sort_unstable();
        kinds
    };
    let mut like: BTreeMap<Vec<Key>, Vec<usize>> = BTreeMap::new();
    for (i, line) in lines.iter().enumerate().rev() {
        like.entry(kinds(&line.stages)).or_default().push(i);
    }
    let (mut kept, mut free) = (vec![false; lines.len()], vec![true; problem.workers.len()]);
    for stages in problem.before.iter().filter(|stages| moved(problem, stages) == 0) {
        let Some(places) = like.get_mut(&kinds(stages)) else { continue };
        let fits = |i: &usize| {
            let line = Line { stages: stages.clone(), lanes: lines[*i].lanes };
            problem.most_lanes(&line, step_s) >= line.lanes
        };
        if let Some(at) = places.iter().rposition(fits) {
            let i = places.remove(at);
            kept[i] = true;
            lines[i].stages.clone_from(stages);
            stages.iter().for_each(|(worker, _)| free[*worker] = false);
        }
    }
    let mut left: BTreeMap<Key, Vec<usize>> = BTreeMap::new();
    for worker in (0..free.len()).rev().filter(|worker| free[*worker]) {
        left.entry(key(problem, worker)).or_default().push(worker);
    }
    for (line, _) in lines.iter_mut().zip(&kept).filter(|(_, kept)| !**kept) {
        for (worker, _) in &mut line.stages {
            // There are as many of a kind as there were.
            if let Some(other) = left.get_mut(&key(problem, *worker)).and_then(Vec::pop) {
                *worker = other;
            }
        }
    }
    kept
}

/// A cut with the fastest slowest stage. The first and the last worker are those that lose the
/// fewest layers by it.
fn even_cut(problem: &Problem, group: &[usize], lanes: u32) -> Option<Line> {
    let (costs, depth) = (&problem.costs, group.len() as u32);
    if depth == 1 {
        return Some(Line { stages: vec![(group[0], 0..costs.units())], lanes });
    }
    let bound = bottleneck(costs, &kinds(problem, group), lanes, 0.0)?;
    let most = |role, w: usize| problem.layers_in(role, w, (depth, lanes), bound).map_or(-1, i64::from);
    let worth = |role, w: usize| match most(role, w) {
        -1 => i64::MIN,
        layers => layers - most(Role::Middle, w).max(0) + if most(Role::Middle, w) < 1 { 1 << 32 } else { 0 },
    };
    // Small numbers of pairs: depth is at most the number of units.
    let pairs = (0..group.len()).flat_map(|f| (0..group.len()).rev().map(move |l| (f, l)));
    let pairs = pairs.filter(|(f, l)| f != l);
    let gain =
        |(f, l): (usize, usize)| worth(Role::First, group[f]).saturating_add(worth(Role::Last, group[l]));
    let (first, last) = pairs.reduce(|a, b| if gain(b) > gain(a) { b } else { a })?;
    let middle = (0..group.len()).filter(|i| *i != first && *i != last);
    let order: Vec<usize> = std::iter::once(first).chain(middle).chain([last]).map(|i| group[i]).collect();
    let role = |i: usize| match i {
        0 => Role::First,
        i if i + 1 == group.len() => Role::Last,
        _ => Role::Middle,
    };
    let most: Vec<i64> = (0..order.len()).map(|i| most(role(i), order[i])).collect();
    let layers = shares(
        costs,
        &most,
        |i| role(i).fewest(costs.layers),
        |i, layers| costs.stage_s(role(i), layers, problem.workers[order[i]].kind.speed),
    )?;
    Some(Line { stages: stages(&order, &layers), lanes })
}

/// Layers of each stage: as many as it may have, less, one by one, where that stage is the
/// slowest.
fn shares(
    costs: &Costs,
    most: &[i64],
    fewest: impl Fn(usize) -> u32,
    stage_s: impl Fn(usize, u32) -> f64,
) -> Option<Vec<u32>> {
    let mut layers: Vec<u32> = most.iter().map(|n| u32::try_from(*n).ok()).collect::<Option<_>>()?;
    let excess = layers.iter().sum::<u32>().checked_sub(costs.layers)?;
    for _ in 0..excess {
        let can = (0..layers.len()).filter(|i| layers[*i] > fewest(*i));
        let slowest =
            can.map(|i| (stage_s(i, layers[i]), i)).reduce(|a, b| if b.0 >= a.0 { b } else { a })?;
        layers[slowest.1] -= 1;
    }
    Some(layers)
}

fn stages(order: &[usize], layers: &[u32]) -> Stages {
    let mut start = 0;
    let last = order.len() - 1;
    let stage = |(i, (worker, layers)): (usize, (&usize, &u32))| {
        let end = start + layers + u32::from(i == 0) + u32::from(i == last);
        let units = start..end;
        start = end;
        (*worker, units)
    };
    order.iter().zip(layers).enumerate().map(stage).collect()
}

/// Workers of one kind change places, so that who holds a stage has it. Lines that are kept
/// and their workers have no part in it.
fn change_places(problem: &Problem, lines: &mut [Line], kept: &[bool]) {
    let mut free = vec![true; problem.workers.len()];
    let mut places: BTreeMap<Key, Vec<Place>> = BTreeMap::new();
    for (i, (line, kept)) in lines.iter().zip(kept).enumerate() {
        for (j, (worker, _)) in line.stages.iter().enumerate() {
            if *kept {
                free[*worker] = false;
            } else {
                places.entry(key(problem, *worker)).or_default().push((i, j));
            }
        }
    }
    let mut workers: BTreeMap<Key, Vec<usize>> = BTreeMap::new();
    for worker in (0..free.len()).filter(|worker| free[*worker]) {
        workers.entry(key(problem, worker)).or_default().push(worker);
    }
    for (kind, places) in places {
        let lacks = |(i, j): &Place| {
            let (worker, units) = &lines[*i].stages[*j];
            problem.missing(*worker, units) > 0
        };
        if places.iter().any(lacks) {
            let mut open: BTreeMap<(u32, u32), Vec<Place>> = BTreeMap::new();
            for (i, j) in places.into_iter().rev() {
                let units = &lines[i].stages[j].1;
                open.entry((units.start, units.end)).or_default().push((i, j));
            }
            for ((i, j), worker) in matched(problem, open, &workers[&kind]) {
                lines[i].stages[j].0 = worker;
            }
        }
    }
}

type Place = (usize, usize);

/// Who takes which of the free places: as many as can be take one of which they hold all, then
/// the others, those that hold most first, each where it lacks least.
fn matched(
    problem: &Problem,
    free: BTreeMap<(u32, u32), Vec<Place>>,
    workers: &[usize],
) -> Vec<(Place, usize)> {
    // Long stages first: who holds one may hold a shorter one too.
    let mut ranges: Vec<(Range<u32>, Vec<Place>)> =
        free.into_iter().map(|((start, end), places)| (start..end, places)).collect();
    ranges.sort_by_key(|(units, _)| (std::cmp::Reverse(units.len()), units.start));
    let lacks = |w: usize, i: usize| problem.missing(w, &ranges[i].0);
    let holds = |w: &usize| (0..ranges.len()).filter(|i| lacks(*w, *i) == 0).collect();
    let holds: Vec<Vec<usize>> = workers.iter().map(holds).collect();
    let mut takers = Takers {
        holds,
        room: ranges.iter().map(|(_, places)| places.len()).collect(),
        of: vec![Vec::new(); ranges.len()],
    };
    let mut rest: Vec<usize> =
        (0..workers.len()).filter(|i| !takers.take(*i, &mut vec![false; ranges.len()])).collect();
    rest.sort_by_key(|i| (problem.missing(workers[*i], &(0..problem.costs.units())), *i));
    for i in rest {
        let open = (0..ranges.len()).filter(|r| takers.of[*r].len() < takers.room[*r]);
        let Some(range) = open.min_by_key(|r| (lacks(workers[i], *r), *r)) else { break };
        takers.of[range].push(i);
    }
    let places = ranges.into_iter().zip(takers.of);
    places
        .flat_map(|((_, places), takers)| places.into_iter().rev().zip(takers))
        .map(|(place, i)| (place, workers[i]))
        .collect()
}

/// A matching of workers and ranges, of which each has room for some (Kuhn's augmenting paths).
struct Takers {
    /// The ranges that each worker holds.
    holds: Vec<Vec<usize>>,
    room: Vec<usize>,
    of: Vec<Vec<usize>>,
}

impl Takers {
    /// Finds room for a worker, if need be by moving others; no range is looked at twice.
    fn take(&mut self, worker: usize, seen: &mut [bool]) -> bool {
        for at in 0..self.holds[worker].len() {
            let range = self.holds[worker][at];
            if std::mem::replace(&mut seen[range], true) {
                continue;
            }
            if self.of[range].len() < self.room[range] {
                self.of[range].push(worker);
                return true;
            }
            for i in 0..self.of[range].len() {
                if self.take(self.of[range][i], seen) {
                    self.of[range][i] = worker;
                    return true;
                }
            }
        }
        false
    }
}

/// The best order and cut of a line, exactly.
fn placed(problem: &Problem, line: &Line, step_s: f64) -> Option<Stages> {
    let members: Vec<usize> = line.stages.iter().map(|(worker, _)| *worker).collect();
    let depth = members.len() as u32;
    Table::new(problem, &members, (depth, line.lanes), step_s).stages((1 << members.len()) - 1)
}

/// The best cut of a line for the order that it has, and for the order of what is held.
fn recut(problem: &Problem, line: &Line, step_s: f64) -> Option<Stages> {
    let order: Vec<usize> = line.stages.iter().map(|(worker, _)| *worker).collect();
    let mut held = order.clone();
    held.sort_by_key(|w| (middle(problem, *w), *w));
    let bound = problem.costs.stage_bound_s(step_s * (1.0 + EQUAL), line.lanes, order.len() as u32);
    let cuts = [order, held].map(|order| cut(problem, &order, line.lanes, bound));
    cuts.into_iter().flatten().min_by_key(|(moved, _)| *moved).map(|(_, stages)| stages)
}

/// Where in the model the units lie that a worker holds, on average, in units times 256; in the
/// end where it holds nothing.
fn middle(problem: &Problem, worker: usize) -> u64 {
    let units = 0..problem.costs.units();
    let held = |u: u32| u128::from(problem.costs.unit_bytes(u) - problem.missing(worker, &(u..u + 1)));
    let sum: u128 = units.clone().map(held).sum();
    let weighed: u128 = units.map(|u| held(u) * u128::from(u) * 256).sum();
    weighed.checked_div(sum).map_or(u64::MAX, |middle| middle as u64)
}

/// The cut that moves the fewest bytes, of those that keep within a bound; and these bytes.
fn cut(problem: &Problem, order: &[usize], lanes: u32, bound: f64) -> Option<(u64, Stages)> {
    let (units, depth) = (problem.costs.units() as usize, order.len());
    // For each number of stages and units: the bytes, and where the last stage starts.
    let mut best: Vec<Vec<Option<(u64, u32)>>> = vec![vec![None; units + 1]; depth + 1];
    best[0][0] = Some((0, 0));
    for (i, worker) in order.iter().enumerate() {
        let role = match i {
            0 => Role::First,
            i if i + 1 == depth => Role::Last,
            _ => Role::Middle,
        };
        let most = problem.layers_in(role, *worker, (depth as u32, lanes), bound)?;
        let longest = most as usize + usize::from(role != Role::Middle);
        for end in i + 1..=units {
            for start in end.saturating_sub(longest)..end {
                let Some((before, _)) = best[i][start] else { continue };
                let moved = before + problem.missing(*worker, &(start as u32..end as u32));
                if best[i + 1][end].is_none_or(|(least, _)| moved < least) {
                    best[i + 1][end] = Some((moved, start as u32));
                }
            }
        }
    }
    let moved = best[depth][units]?.0;
    let (mut end, mut stages) = (units as u32, Vec::with_capacity(depth));
    for (i, worker) in order.iter().enumerate().rev() {
        let start = best[i + 1][end as usize]?.1;
        stages.push((*worker, start..end));
        end = start;
    }
    stages.reverse();
    Some((moved, stages))
}
