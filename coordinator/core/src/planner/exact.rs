//! The best layout of a few workers, exactly.
//!
//! 1. How long a step of each group of workers takes with so many lanes ([`Steps`]), whatever
//!    the others do.
//! 2. The least time for which groups that share nobody can take all lanes: halving between
//!    the times that groups can have; for each, a dynamic program over sets of workers.
//! 3. Among the layouts of that time, those that use the most workers.
//! 4. Among those, the one that moves the fewest bytes: the price of each group for as many
//!    lanes as it may have to take ([`Table`]), then a dynamic program over sets of workers
//!    that keeps, for each, the layouts that are not beaten in lanes and bytes at once.
//!
//! Sets of workers are bits of a number. Everything is tried in ascending order and replaced
//! only by what is better, so the answer is a function of the problem.

use super::costs::{Costs, EQUAL};
use super::fit::{Steps, kinds};
use super::least::least;
use super::place::{MOST, Table, bits};
use super::problem::{Layout, Line, Problem};
use std::collections::BTreeMap;

/// The most workers: 3^8 pairs of a set and its part, a few microseconds to go through.
pub(super) const MOST_WORKERS: usize = MOST;

/// The best layout of at most [`MOST_WORKERS`] workers; none where no pipeline fits.
pub(super) fn search(problem: &Problem) -> Option<Layout> {
    let groups = Groups::new(problem);
    let step_s = groups.least_step_s()?;
    let choice = Choice::new(&groups, step_s * (1.0 + EQUAL));
    let lines = choice.cheapest()?;
    let lines = as_before(problem, &lines, step_s * (1.0 + EQUAL)).unwrap_or(lines);
    Some(Layout { step_s, lines })
}

/// The pipelines of the plan before, where they are as good as these: then nobody has to do
/// anything else than before.
fn as_before(problem: &Problem, lines: &[Line], step_s: f64) -> Option<Vec<Line>> {
    let before: Vec<Line> =
        problem.before.iter().map(|stages| Line { stages: stages.clone(), lanes: 1 }).collect();
    let used = |lines: &[Line]| lines.iter().map(|line| line.stages.len()).sum::<usize>();
    let stages = |lines: &[Line]| lines.iter().flat_map(|line| line.stages.clone()).collect::<Vec<_>>();
    let moved =
        |lines: &[Line]| stages(lines).iter().map(|(w, units)| problem.missing(*w, units)).sum::<u64>();
    let depths =
        before.iter().all(|line| problem.depth.is_none_or(|depth| depth as usize == line.stages.len()));
    let most: Vec<u32> = before.iter().map(|line| problem.most_lanes(line, step_s)).collect();
    let lanes: u64 = most.iter().map(|lanes| u64::from(*lanes)).sum();
    let fit = depths && !most.contains(&0) && lanes >= u64::from(problem.costs.lanes);
    let few = before.len() <= problem.costs.lanes as usize;
    (fit && few && used(&before) == used(lines) && moved(&before) <= moved(lines)).then_some(before)
}

/// Whether these workers can train the model at all, however slowly.
pub(super) fn fits(problem: &Problem) -> bool {
    let groups = Groups::new(problem);
    groups.most_lanes(&groups.lanes(f64::MAX)) >= problem.costs.lanes
}

/// All groups of workers, by the set of their members.
struct Groups<'a> {
    problem: &'a Problem,
    /// All workers, as a set and as a list.
    all: usize,
    members: Vec<usize>,
    steps: Vec<Steps>,
}

fn depth(group: usize) -> u32 {
    group.count_ones()
}

/// The parts of a set that have its lowest member, ascending; the empty set has none.
fn parts(set: usize) -> impl Iterator<Item = usize> {
    let lowest = set & set.wrapping_neg();
    let rest = set ^ lowest;
    let mut next = (set != 0).then_some(0);
    std::iter::from_fn(move || {
        let part = next?;
        // The next larger number with bits in `rest` only.
        let after = (part | !rest).wrapping_add(1) & rest;
        next = (after != 0).then_some(after);
        Some(part | lowest)
    })
}

impl<'a> Groups<'a> {
    fn new(problem: &'a Problem) -> Self {
        let all = (1usize << problem.workers.len()) - 1;
        let steps = |group: usize| {
            if group == 0 || problem.depth.is_some_and(|wanted| wanted != depth(group)) {
                return Steps::default();
            }
            let members: Vec<usize> = bits(group).collect();
            Steps::new(&problem.costs, &kinds(problem, &members))
        };
        let members = (0..problem.workers.len()).collect();
        Self { problem, all, members, steps: (0..=all).map(steps).collect() }
    }

    fn costs(&self) -> &Costs {
        &self.problem.costs
    }

    /// The lanes that each group takes within a time.
    fn lanes(&self, step_s: f64) -> Vec<u32> {
        let within = |(group, steps): (usize, &Steps)| steps.lanes(self.costs(), step_s, depth(group));
        self.steps.iter().enumerate().map(within).collect()
    }

    /// The least time of a step with which all lanes can be taken.
    fn least_step_s(&self) -> Option<f64> {
        let time = |group: usize, lanes: u32| self.steps[group].step_s(self.costs(), lanes, depth(group));
        let longest = (1..=self.all).filter_map(|g| time(g, self.steps[g].most())).reduce(f64::max)?;
        let works = |step_s: f64| {
            let lanes = self.lanes(step_s);
            let enough = self.most_lanes(&lanes) >= self.costs().lanes;
            let reached = (1..=self.all).filter(|g| lanes[*g] > 0).filter_map(|g| time(g, lanes[g]));
            enough.then(|| reached.fold(0.0, f64::max))
        };
        works(longest)?;
        let above = |step_s: f64| {
            let lanes = self.lanes(step_s);
            let next = (1..=self.all).filter_map(|g| time(g, lanes[g] + 1));
            next.fold(f64::INFINITY, f64::min)
        };
        Some(least((0.0, longest), works, above))
    }

    /// The most lanes that groups of different workers can take, some idle perhaps. That may
    /// take more groups than there are lanes; then as many groups as lanes are enough.
    fn most_lanes(&self, lanes: &[u32]) -> u32 {
        let mut most = vec![0u32; self.all + 1];
        for set in 1..=self.all {
            let idle = most[set & (set - 1)];
            let used = parts(set).filter(|part| lanes[*part] > 0);
            let with = used.map(|part| lanes[part].saturating_add(most[set ^ part]));
            most[set] = with.fold(idle, u32::max).min(self.costs().lanes);
        }
        most[self.all]
    }
}

/// A layout of exactly the workers of a set.
#[derive(Clone, Copy, Debug)]
struct Point {
    pipelines: u32,
    lanes: u32,
    bytes: u64,
    /// Its first group with the lanes of its price, and the point of the other workers.
    group: usize,
    group_lanes: u32,
    rest: usize,
}

/// The choice among the layouts of a time.
struct Choice<'a> {
    groups: &'a Groups<'a>,
    step_s: f64,
    /// The lanes that each group can take.
    lanes: Vec<u32>,
    /// For each set, by number of pipelines: the most lanes of exactly these workers.
    most: Vec<Vec<Option<u32>>>,
    /// The sets of as many workers as can be used.
    finals: Vec<usize>,
}

impl<'a> Choice<'a> {
    fn new(groups: &'a Groups<'a>, step_s: f64) -> Self {
        let lanes = groups.lanes(step_s);
        let wanted = groups.costs().lanes;
        let pipelines = groups.problem.workers.len().min(wanted as usize);
        let mut most: Vec<Vec<Option<u32>>> = vec![vec![None; pipelines + 1]; groups.all + 1];
        most[0][0] = Some(0);
        for set in 1..=groups.all {
            for part in parts(set).filter(|part| lanes[*part] > 0) {
                for count in 0..pipelines {
                    let rest = most[set ^ part][count];
                    let sum = rest.map(|rest| rest.saturating_add(lanes[part]).min(wanted));
                    most[set][count + 1] = most[set][count + 1].max(sum);
                }
            }
        }
        let done = |set: &usize| most[*set].iter().flatten().any(|lanes| *lanes >= wanted);
        let used = (1..=groups.all).filter(done).map(depth).max().unwrap_or(0);
        let finals = (1..=groups.all).filter(|set| depth(*set) == used && done(set)).collect();
        Self { groups, step_s, lanes, most, finals }
    }

    /// The most lanes that the others of a used set can take beside these workers.
    fn others(&self, set: usize) -> Option<u32> {
        let wholes = self.finals.iter().filter(|whole| set & !**whole == 0);
        wholes.flat_map(|whole| self.most[whole ^ set].iter().flatten()).max().copied()
    }

    /// The lines that move the fewest bytes.
    fn cheapest(&self) -> Option<Vec<Line>> {
        let prices = Prices::new(self);
        let wanted = self.groups.costs().lanes;
        // With as many lanes as workers, there are never too many pipelines.
        let counted = (wanted as usize) < self.groups.problem.workers.len();
        let mut points: Vec<Vec<Point>> = vec![Vec::new(); self.groups.all + 1];
        let none = Point { pipelines: 0, lanes: 0, bytes: 0, group: 0, group_lanes: 0, rest: 0 };
        points[0].push(none);
        for set in 1..=self.groups.all {
            let Some(others) = self.others(set) else { continue };
            let mut here: Vec<Point> = Vec::new();
            for group in parts(set) {
                for (lanes, bytes) in prices.of(group) {
                    for (rest, point) in points[set ^ group].iter().enumerate() {
                        let lanes_here = point.lanes.saturating_add(*lanes).min(wanted);
                        let pipelines = point.pipelines + u32::from(counted);
                        if pipelines > wanted || lanes_here.saturating_add(others) < wanted {
                            continue;
                        }
                        let bytes = point.bytes + bytes;
                        let (group_lanes, lanes) = (*lanes, lanes_here);
                        add(&mut here, Point { pipelines, lanes, bytes, group, group_lanes, rest });
                    }
                }
            }
            points[set] = here;
        }
        let ends = self.finals.iter().flat_map(|set| points[*set].iter().map(move |p| (*set, p)));
        let (set, best) = ends.filter(|(_, p)| p.lanes >= wanted).min_by_key(|(_, p)| p.bytes)?;
        self.lines(&prices, &points, set, *best)
    }

    fn lines(
        &self,
        prices: &Prices<'_>,
        points: &[Vec<Point>],
        mut set: usize,
        mut point: Point,
    ) -> Option<Vec<Line>> {
        let mut lines = Vec::new();
        while point.group != 0 {
            let stages = prices.table(point.group, point.group_lanes)?.stages(point.group)?;
            lines.push(Line { stages, lanes: point.group_lanes });
            set ^= point.group;
            point = points[set][point.rest];
        }
        Some(lines)
    }
}

/// Adds a point unless one that is there is as good in everything; drops those that it beats.
fn add(points: &mut Vec<Point>, new: Point) {
    let beats = |a: &Point, b: &Point| a.pipelines <= b.pipelines && a.lanes >= b.lanes && a.bytes <= b.bytes;
    if !points.iter().any(|old| beats(old, &new)) {
        points.retain(|old| !beats(&new, old));
        points.push(new);
    }
}

/// What groups move, for each number of lanes that they may have to take.
struct Prices<'a> {
    /// Numbers of lanes with the bytes, both ascending; of groups that may be used.
    prices: Vec<Vec<(u32, u64)>>,
    tables: BTreeMap<(u32, u32), Table<'a>>,
}

impl<'a> Prices<'a> {
    fn new(choice: &Choice<'a>) -> Self {
        let groups = choice.groups;
        let mut all = Self { prices: vec![Vec::new(); groups.all + 1], tables: BTreeMap::new() };
        for group in (1..=groups.all).filter(|group| choice.lanes[*group] > 0) {
            let most = choice.lanes[group];
            let Some(others) = choice.others(group) else { continue };
            let least = groups.costs().lanes.saturating_sub(others).max(1);
            if least <= most {
                all.prices[group] = all.between(choice, group, least, most);
            }
        }
        all
    }

    /// For each number of bytes that the group moves with `least` to `most` lanes, the most
    /// lanes. More lanes never move less, so equal ends mean that all between are equal.
    fn between(&mut self, choice: &Choice<'a>, group: usize, least: u32, most: u32) -> Vec<(u32, u64)> {
        let mut found: Vec<(u32, u64)> = Vec::new();
        // At most one open range for each halving of 2^32 lanes.
        let mut open = vec![(least, most)];
        while let Some((low, high)) = open.pop() {
            let ends = [low, high].map(|lanes| self.price(choice, group, lanes));
            let [Some(cheap), Some(dear)] = ends else { continue };
            if cheap == dear || low == high {
                found.push((high, dear));
                continue;
            }
            let middle = low + (high - low) / 2;
            open.extend([(middle + 1, high), (low, middle)]);
        }
        found.dedup_by(|next, last| {
            next.1 == last.1 && {
                last.0 = next.0;
                true
            }
        });
        found
    }

    fn price(&mut self, choice: &Choice<'a>, group: usize, lanes: u32) -> Option<u64> {
        let (groups, key) = (choice.groups, (depth(group), lanes));
        let members = &groups.members;
        let table = self.tables.entry(key);
        table.or_insert_with(|| Table::new(groups.problem, members, key, choice.step_s)).price(group)
    }

    fn of(&self, group: usize) -> &[(u32, u64)] {
        &self.prices[group]
    }

    fn table(&self, group: usize, lanes: u32) -> Option<&Table<'a>> {
        self.tables.get(&(depth(group), lanes))
    }
}
