//! What every member lacks, each piece from the least busy of those that have it.
//!
//! A piece moves once to each member that lacks it and to nobody else, so the sum of bytes is
//! the least that the assignment allows. What nobody has comes from the plan's origin.

use super::Candidate;
use crate::around::Around;
use caravan_types::{Part, Pipeline, SliceId, SliceSet, SliceTable, Source, Transfer, WorkerId};
use std::collections::BTreeMap;
use std::ops::Range;

/// In how many pieces a member gets what it lacks of one part, where there are more candidates
/// than this: from so many others it gets as fast as it can take. Where there are fewer, each
/// slice is a piece.
const PIECES: usize = 64;

/// Holders of a slice that are compared.
const COMPARED: usize = 64;

/// The transfers of a plan. `candidates` are ascending by id, `owners` are theirs.
pub(super) fn transfers(
    table: &SliceTable,
    by_unit: &[Range<u32>],
    origin: Source,
    pipelines: &[Pipeline],
    owners: &[Vec<WorkerId>],
    candidates: &[&Candidate],
) -> Vec<Transfer> {
    let weights: Vec<SliceSet> = candidates.iter().map(|c| c.state.union(&c.weights)).collect();
    let mut lacks = lacking(by_unit, pipelines, owners, candidates, &weights);
    let state = || candidates.iter().map(|c| &c.state);
    let mut moved = BTreeMap::new();
    for (part, held) in [all(state()), all(weights.iter())].into_iter().enumerate() {
        for (candidate, lacks) in candidates.iter().zip(&mut lacks) {
            let nowhere = lacks[part].difference(&held);
            if !nowhere.is_empty() {
                lacks[part] = lacks[part].difference(&nowhere);
                moved.insert((candidate.member.worker, origin, PARTS[part]), nowhere);
            }
        }
    }
    let lacked = |part: usize| all(lacks.iter().map(|lacks| &lacks[part]));
    let mut holders =
        [Holders::new(by_unit, state(), &lacked(0)), Holders::new(by_unit, weights.iter(), &lacked(1))];
    let mut moves = Moves { table, candidates, busy: vec![0; candidates.len()], moved };
    if candidates.len() <= PIECES {
        for (id, slice) in table.iter() {
            for (to, lacks) in lacks.iter().enumerate() {
                for part in (0..2).filter(|part| lacks[*part].contains(id)) {
                    moves.piece(&mut holders[part], (to, PARTS[part]), slice.unit.0, id.0..id.0 + 1);
                }
            }
        }
    } else {
        for (to, lacks) in lacks.iter().enumerate() {
            for part in 0..2 {
                let longest = lacks[part].len().div_ceil(PIECES).max(1) as u32;
                for (unit, piece) in pieces(by_unit, &lacks[part], longest) {
                    moves.piece(&mut holders[part], (to, PARTS[part]), unit, piece);
                }
            }
        }
    }
    let transfer = |((to, from, part), slices)| Transfer { to, from, part, slices };
    moves.moved.into_iter().map(transfer).collect()
}

/// What is in any of these sets.
fn all<'a>(sets: impl Iterator<Item = &'a SliceSet>) -> SliceSet {
    let mut all = SliceSet::default();
    for set in sets.filter(|set| !set.is_empty()) {
        all = all.union(set);
    }
    all
}

/// The parts in the order of their numbers here.
const PARTS: [Part; 2] = [Part::State, Part::Weights];

/// What each candidate lacks: state of what it owns, weights of what it computes with and does
/// not own.
fn lacking(
    by_unit: &[Range<u32>],
    pipelines: &[Pipeline],
    owners: &[Vec<WorkerId>],
    candidates: &[&Candidate],
    weights: &[SliceSet],
) -> Vec<[SliceSet; 2]> {
    let place = |worker: WorkerId| candidates.binary_search_by_key(&worker, |c| c.member.worker).ok();
    let mut owned = vec![SliceSet::default(); candidates.len()];
    for (id, owners) in (0..).map(SliceId).zip(owners) {
        for owner in owners.iter().filter_map(|owner| place(*owner)) {
            owned[owner].insert(id);
        }
    }
    let mut needed = vec![SliceSet::default(); candidates.len()];
    for stage in pipelines.iter().flat_map(|p| &p.stages) {
        if let Some(worker) = place(stage.worker) {
            let slices = by_unit[stage.units.start as usize].start..by_unit[stage.units.end as usize - 1].end;
            needed[worker] = SliceSet::from(vec![slices]);
        }
    }
    let lacks = |i: usize| {
        let weights = needed[i].difference(&owned[i]).difference(&weights[i]);
        [owned[i].difference(&candidates[i].state), weights]
    };
    (0..candidates.len()).map(lacks).collect()
}

/// The slices of a set as runs that stay within a unit and are at most `longest` long.
fn pieces(by_unit: &[Range<u32>], slices: &SliceSet, longest: u32) -> Vec<(u32, Range<u32>)> {
    let mut pieces = Vec::new();
    let mut unit = 0;
    for run in slices.ranges() {
        let mut start = run.start;
        while start < run.end {
            while by_unit[unit].end <= start {
                unit += 1;
            }
            let end = (start + longest).min(run.end).min(by_unit[unit].end);
            pieces.push((unit as u32, start..end));
            start = end;
        }
    }
    pieces
}

/// Who has what: those that have a unit whole, and for each slice that is lacked those that
/// have it without the whole of its unit.
struct Holders {
    whole: Vec<Around>,
    single: BTreeMap<u32, Around>,
}

impl Holders {
    fn new<'a>(by_unit: &[Range<u32>], held: impl Iterator<Item = &'a SliceSet>, lacked: &SliceSet) -> Self {
        let wanted: Vec<bool> = by_unit.iter().map(|unit| lacked.len_in(unit.clone()) > 0).collect();
        let mut whole = vec![Vec::new(); by_unit.len()];
        let mut single: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (holder, held) in held.enumerate() {
            for (unit, slices) in by_unit.iter().enumerate().filter(|(unit, _)| wanted[*unit]) {
                let count = held.len_in(slices.clone());
                if count == slices.len() {
                    whole[unit].push(holder);
                } else if count > 0 {
                    let here = |id: &u32| held.contains(SliceId(*id)) && lacked.contains(SliceId(*id));
                    slices.clone().filter(here).for_each(|id| single.entry(id).or_default().push(holder));
                }
            }
        }
        let single = single.into_iter().map(|(id, holders)| (id, Around::new(holders))).collect();
        Self { whole: whole.into_iter().map(Around::new).collect(), single }
    }
}

/// Transfers as they come together.
struct Moves<'a> {
    table: &'a SliceTable,
    candidates: &'a [&'a Candidate],
    /// Elements that each candidate gives so far.
    busy: Vec<u64>,
    moved: BTreeMap<(WorkerId, Source, Part), SliceSet>,
}

impl Moves<'_> {
    /// Finds who gives a piece, a run of slices of one unit, to a candidate.
    fn piece(&mut self, holders: &mut Holders, (to, part): (usize, Part), unit: u32, slices: Range<u32>) {
        if slices.len() > 1 && holders.whole[unit as usize].is_empty() {
            for id in slices {
                self.piece(holders, (to, part), unit, id..id + 1);
            }
            return;
        }
        let single = holders.single.get_mut(&slices.start).filter(|_| slices.len() == 1);
        let single = single.into_iter().flat_map(|single| single.next(COMPARED));
        let all = holders.whole[unit as usize].next(COMPARED).chain(single);
        // What nobody has is not looked for here.
        let Some(giver) = all.min_by_key(|holder| (self.busy[*holder], *holder)) else { return };
        let from = Source::Peer(self.candidates[giver].member.worker);
        let moved = self.moved.entry((self.candidates[to].member.worker, from, part)).or_default();
        for id in slices.map(SliceId) {
            moved.insert(id);
            let values = if part == Part::State { 3 } else { 1 };
            self.busy[giver] += values * self.table.get(id).map_or(0, |slice| slice.len() as u64);
        }
    }
}
