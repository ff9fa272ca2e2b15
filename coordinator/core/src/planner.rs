//! From members and what they hold to a plan: pure, and the same answer every time.

use crate::owners;
use caravan_types::{
    Generation, IdleReason, Lane, Member, Part, Pipeline, Plan, SliceId, SliceSet, SliceTable, Source, Stage,
    Step, Transfer, WorkerId,
};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// A worker that the plan may use, and what it holds at the step the plan starts from.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// How the others reach it.
    pub member: Member,
    /// Slices whose training state it has.
    pub state: SliceSet,
    /// Slices whose weights it has.
    pub weights: SliceSet,
    /// It is about to leave: it gives what it has and takes nothing new.
    pub leaving: bool,
}

/// Where a plan starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Start {
    /// The step.
    pub base: Step,
    /// Its norm, where a member may have to apply it first.
    pub norm: Option<f64>,
    /// Where slices come from that no candidate holds.
    pub origin: Source,
}

/// Plans one-stage pipelines: every member with lanes holds the whole model.
///
/// Lanes are dealt in contiguous runs that differ by one at most, to members in the order of
/// their ids. `candidates` are ascending by id and not all leaving.
#[must_use]
pub fn plan(
    generation: Generation,
    start: Start,
    table: &SliceTable,
    units: u32,
    lanes: u32,
    redundancy: u32,
    candidates: &[Candidate],
) -> Plan {
    let staying: Vec<&Candidate> = candidates.iter().filter(|c| !c.leaving).collect();
    let working = staying.len().min(lanes as usize);
    let mut pipelines = Vec::with_capacity(working);
    for (i, candidate) in staying.iter().take(working).enumerate() {
        let stages = vec![Stage { worker: candidate.member.worker, units: 0..units }];
        pipelines.push(Pipeline { stages, lanes: share(lanes, working, i) });
    }
    let mut idle = Vec::new();
    for candidate in candidates {
        let worker = candidate.member.worker;
        if candidate.leaving {
            idle.push((worker, IdleReason::Leaving));
        } else if !pipelines.iter().any(|p| p.stages.iter().any(|s| s.worker == worker)) {
            idle.push((worker, IdleReason::MoreWorkersThanLanes));
        }
    }
    let owners = owners(table, redundancy, &staying);
    let transfers = transfers(table, start.origin, &pipelines, &owners, candidates);
    let members = candidates.iter().map(|c| c.member.clone()).collect();
    Plan { generation, base: start.base, norm: start.norm, members, pipelines, owners, transfers, idle }
}

/// The i-th of `parts` contiguous shares of `lanes`, as equal as can be, longer ones first.
fn share(lanes: u32, parts: usize, i: usize) -> Range<Lane> {
    let (parts, i) = (parts as u32, i as u32);
    let (size, longer) = (lanes / parts, lanes % parts);
    let start = i * size + i.min(longer);
    start..start + size + u32::from(i < longer)
}

/// Owners of every slice, the primary first; primaries are dealt as evenly as owners.
fn owners(table: &SliceTable, redundancy: u32, staying: &[&Candidate]) -> Vec<Vec<WorkerId>> {
    let held: Vec<SliceSet> = staying.iter().map(|c| c.state.clone()).collect();
    let mut primaries = vec![0usize; staying.len()];
    let assigned = owners::assign(table.len(), redundancy.max(1) as usize, &held);
    let name = |mut owners: Vec<usize>| {
        owners.sort_by_key(|&m| (primaries[m], m));
        if let Some(&first) = owners.first() {
            primaries[first] += 1;
        }
        owners.into_iter().map(|m| staying[m].member.worker).collect()
    };
    assigned.into_iter().map(name).collect()
}

/// What every member lacks, each piece from the least busy of those that have it.
fn transfers(
    table: &SliceTable,
    origin: Source,
    pipelines: &[Pipeline],
    owners: &[Vec<WorkerId>],
    candidates: &[Candidate],
) -> Vec<Transfer> {
    let mut busy: BTreeMap<WorkerId, u64> = BTreeMap::new();
    let mut moved: BTreeMap<(WorkerId, Source, Part), SliceSet> = BTreeMap::new();
    let computing = computing_units(pipelines);
    for (id, slice) in table.iter() {
        let owned: BTreeSet<WorkerId> = owners[id.0 as usize].iter().copied().collect();
        for taker in candidates {
            let to = taker.member.worker;
            let computes = computing.get(&to).is_some_and(|units| units.contains(&slice.unit.0));
            let (part, has) = match (owned.contains(&to), computes) {
                (true, _) => (Part::State, &taker.state),
                (false, true) => (Part::Weights, &taker.weights),
                (false, false) => continue,
            };
            if has.contains(id) {
                continue;
            }
            let from = holder(id, part, to, candidates, &busy).map_or(origin, Source::Peer);
            if let Source::Peer(giver) = from {
                *busy.entry(giver).or_default() +=
                    slice.len() as u64 * if part == Part::State { 3 } else { 1 };
            }
            moved.entry((to, from, part)).or_default().insert(id);
        }
    }
    moved.into_iter().map(|((to, from, part), slices)| Transfer { to, from, part, slices }).collect()
}

fn computing_units(pipelines: &[Pipeline]) -> BTreeMap<WorkerId, Range<u32>> {
    pipelines.iter().flat_map(|p| &p.stages).map(|s| (s.worker, s.units.clone())).collect()
}

/// The least busy holder of a part of a slice; the lowest id among equals.
fn holder(
    slice: SliceId,
    part: Part,
    to: WorkerId,
    candidates: &[Candidate],
    busy: &BTreeMap<WorkerId, u64>,
) -> Option<WorkerId> {
    let has = |c: &&Candidate| match part {
        Part::State => c.state.contains(slice),
        Part::Weights => c.weights.contains(slice),
    };
    let holders = candidates.iter().filter(has).map(|c| c.member.worker).filter(|w| *w != to);
    holders.min_by_key(|w| (busy.get(w).copied().unwrap_or(0), *w))
}

#[cfg(test)]
mod tests {
    use super::*;
    use caravan_types::ModelShape;
    use proptest::prelude::*;

    fn candidate(id: u64, state: SliceSet, weights: SliceSet) -> Candidate {
        let member = Member { worker: WorkerId(id), fabric: format!("127.0.0.1:{id}") };
        Candidate { member, state, weights, leaving: false }
    }

    fn table() -> (ModelShape, SliceTable) {
        let shape = ModelShape::preset("260k").unwrap();
        let table = SliceTable::new(&shape);
        (shape, table)
    }

    proptest! {
        #[test]
        fn a_plan_has_every_lane_once_and_leaves_nobody_without_what_it_needs(
            workers in 1u64..9, log_lanes in 0u32..5, redundancy in 1u32..4,
            held in proptest::collection::vec((any::<u64>(), any::<u64>()), 9),
        ) {
            let (shape, table) = table();
            let n = table.len();
            let pick = |bits: u64| (0..n as u32).filter(|s| bits >> s & 1 == 1).map(SliceId).collect::<SliceSet>();
            let candidates: Vec<Candidate> = (0..workers).map(|w| {
                let (a, b) = held[w as usize];
                candidate(w, pick(a), pick(a | b))
            }).collect();
            let start = Start { base: Step(7), norm: None, origin: Source::Checkpoint };
            let plan = plan(Generation(3), start, &table, shape.units(), 1 << log_lanes, redundancy, &candidates);
            let lanes: Vec<u32> = plan.pipelines.iter().flat_map(|p| p.lanes.clone()).collect();
            prop_assert_eq!(lanes, (0..1 << log_lanes).collect::<Vec<_>>());
            let mut state: Vec<SliceSet> = candidates.iter().map(|c| c.state.clone()).collect();
            let mut weights: Vec<SliceSet> = candidates.iter().map(|c| c.weights.clone()).collect();
            for t in &plan.transfers {
                for slice in t.slices.iter() {
                    if let Source::Peer(WorkerId(from)) = t.from {
                        let source = &candidates[from as usize];
                        let has = if t.part == Part::State { &source.state } else { &source.weights };
                        prop_assert!(has.contains(slice));
                    }
                    let to = t.to.0 as usize;
                    let gets = if t.part == Part::State { &mut state } else { &mut weights };
                    prop_assert!(gets[to].insert(slice), "moved twice");
                    weights[to].insert(slice);
                }
            }
            for (w, c) in candidates.iter().enumerate() {
                prop_assert!(state[w].is_superset(&plan.owned_by(c.member.worker)));
                if plan.pipelines.iter().any(|p| p.stages[0].worker == c.member.worker) {
                    prop_assert!(weights[w].is_superset(&SliceSet::all(n)));
                }
            }
        }
    }

    #[test]
    fn a_leaving_member_gives_but_gets_no_lanes_and_no_slices() {
        let (shape, table) = table();
        let all = SliceSet::all(table.len());
        let mut leaver = candidate(1, all.clone(), all.clone());
        leaver.leaving = true;
        let candidates = [leaver, candidate(2, SliceSet::default(), all)];
        let start = Start { base: Step(1), norm: None, origin: Source::Init };
        let plan = plan(Generation(2), start, &table, shape.units(), 4, 2, &candidates);
        assert_eq!(plan.idle, [(WorkerId(1), IdleReason::Leaving)]);
        assert_eq!(plan.pipelines.len(), 1);
        assert!(plan.owned_by(WorkerId(1)).is_empty());
        assert_eq!(plan.transfers.len(), 1);
        assert_eq!(plan.transfers[0].from, Source::Peer(WorkerId(1)));
        assert_eq!(plan.transfers[0].part, Part::State);
    }
}
