//! From members and what they hold to a plan: pure, and the same answer every time.
//!
//! # What is the best plan
//!
//! A model is *units* `0..layers + 2`: embedding, layers, final norm with head. A pipeline is a
//! list of S workers, each with a non-empty range of units, its *stage*; together they have every
//! unit once. It takes l lanes of M micro-batches each, one forward and one backward in turn
//! (PipeDream-flush, arXiv 2006.09503), so its step takes
//!
//! ```text
//! t = (l · M + S − 1) · max over stages of b        b = FLOPs of the stage's units / speed
//!                                                     + neighbours · bytes of a border / link
//! ```
//!
//! A border costs the activations of a micro-batch and their gradients, 2 · sequences · length ·
//! dim · 4 bytes, and is not hidden behind computing: nobody splits for nothing. A stage fits
//! where the worker's memory holds
//!
//! ```text
//! weights · (1 + sums)        sums = ⌈log2 l⌉ + 1 gradient sums, one a level of the lane tree
//! + activations · S           of as many micro-batches as may be in flight
//! + 12 bytes · parameters · r / members       its share of the training state, on any slices
//! ```
//!
//! The best plan has the shortest step, the longest t of its pipelines; of equal ones (to a part
//! in 10^9) it is the one that uses the most workers, and of those the one that moves the fewest
//! bytes of weights to workers that lack them. For as many workers as `exact` takes this is
//! exact, for more it is good: `large` says what it leaves out, and its tests how good.
//!
//! # How it is found
//!
//! `problem` turns the cluster's data into ordinals; `costs` has the formulae above; `fit` says
//! how fast a group of workers is as one pipeline; `exact` or `large` choose groups; `place` and
//! `arrange` give everybody units, near to what it holds; `deal` gives lanes. Then owners are
//! dealt (`crate::owners`), and `transfers` says what moves. Candidates are sorted by id first
//! and every tie is broken by id, so the order in which they are given means nothing.

mod arrange;
mod costs;
mod deal;
mod error;
mod exact;
mod fit;
mod idle;
mod large;
mod least;
mod place;
mod problem;
#[cfg(test)]
mod tests;
mod transfers;

pub use error::NoPlan;

use crate::owners;
use caravan_types::{
    BatchShape, Dispute, Generation, IdleReason, Member, ModelShape, Pipeline, Plan, Precision, SliceId,
    SliceSet, SliceTable, Source, Step, Verdict, WorkerId,
};
use costs::EQUAL;
use problem::{Problem, memory, owning};
use std::collections::{BTreeMap, BTreeSet};

/// What a border's link carries where nobody says more, in bytes a second: 10 Gbit/s Ethernet
/// with what its protocols take.
pub const LINK_BYTES_PER_S: f64 = 1e9;

/// What is to be planned for, whoever is there.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand {
    /// The model.
    pub shape: ModelShape,
    /// The global batch.
    pub batch: BatchShape,
    /// Number formats.
    pub precision: Precision,
    /// Whether layers are recomputed on the way back.
    pub recompute: bool,
    /// Owners per slice, where there are so many members.
    pub redundancy: u32,
    /// Stages of every pipeline; as many as are best where none. Fewer only where there are
    /// fewer workers or units.
    pub stages: Option<u32>,
    /// Speed of the link between two stages, in bytes a second.
    pub link_bytes_per_s: f64,
}

/// A worker that the plan may use, and what it holds at the step the plan starts from.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// How the others reach it.
    pub member: Member,
    /// The host that it runs on; unknown where empty.
    pub host: String,
    /// How fast it computes, in FLOP/s.
    pub speed: f64,
    /// Memory that it may use, in bytes; 0 or the largest number where that is not known.
    pub memory: u64,
    /// Slices whose training state it has; it has their weights too.
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
    /// How it is applied, where a member may have to apply it first.
    pub verdict: Option<Verdict>,
    /// Where slices come from that no candidate holds.
    pub origin: Source,
}

/// Plans for a demand with these workers. `table` is the demand's shape cut into slices; `before`
/// are the pipelines of the last plan, where there is one: of many workers those stay together
/// that can. What `disputes` are about is to be computed again.
///
/// # Errors
/// Where no pipeline fits into the memory of those that stay; the error says what would do.
pub fn plan(
    demand: &Demand,
    table: &SliceTable,
    generation: Generation,
    start: Start,
    candidates: &[Candidate],
    before: &[Pipeline],
    disputes: &[Dispute],
) -> Result<Plan, NoPlan> {
    let mut sorted: Vec<&Candidate> = candidates.iter().collect();
    sorted.sort_by_key(|c| c.member.worker);
    let candidates = sorted;
    let staying: Vec<usize> = (0..candidates.len()).filter(|i| !candidates[*i].leaving).collect();
    let memories: Vec<u64> = staying.iter().map(|i| memory(candidates[*i])).collect();
    let (owns, share) = owning(demand.shape.parameters(), demand.redundancy, &memories);
    let able: Vec<usize> = staying.iter().zip(owns).filter(|(_, owns)| *owns).map(|(i, _)| *i).collect();
    let ids: Vec<WorkerId> = able.iter().map(|i| candidates[*i].member.worker).collect();
    let problem = Problem::new(demand, table, &candidates, &able, share).with_before(before, &ids);
    let layout = if problem.workers.len() <= exact::MOST_WORKERS {
        exact::search(&problem)
    } else {
        large::search(&problem)
    };
    let Some(layout) = layout else { return Err(error::missing(demand, table, &candidates, &staying)) };
    let pipelines = deal::deal(&problem, &layout.lines, layout.step_s * (1.0 + EQUAL), &ids);
    let idle = idle_members(&candidates, &problem, &pipelines);
    let owning: Vec<&Candidate> = able.iter().map(|i| candidates[*i]).collect();
    let mut owners = owners(table, demand, &owning, &pipelines);
    add_judges(&mut owners, &owning, disputes);
    let (slices, origin) = (&problem.slices, start.origin);
    let transfers = transfers::transfers(table, slices, origin, &pipelines, &owners, &candidates);
    let members = candidates.iter().map(|c| c.member.clone()).collect();
    let (Start { base, verdict, .. }, disputes) = (start, disputes.to_vec());
    let recompute = demand.recompute;
    Ok(Plan { generation, base, verdict, recompute, members, pipelines, owners, transfers, idle, disputes })
}

/// Owners who differed about a slice's gradient get another one, who makes a majority. What it
/// costs is a slice's memory.
fn add_judges(owners: &mut [Vec<WorkerId>], owning: &[&Candidate], disputes: &[Dispute]) {
    let slices: BTreeSet<SliceId> = disputes.iter().map(|d| d.slice).collect();
    let mut turn = 0;
    for slice in slices {
        let Some(owners) = owners.get_mut(slice.0 as usize) else { continue };
        let others: Vec<WorkerId> =
            owning.iter().map(|c| c.member.worker).filter(|w| !owners.contains(w)).collect();
        if owners.len().is_multiple_of(2) && !others.is_empty() {
            owners.push(others[turn % others.len()]);
            turn += 1;
        }
    }
}

/// Those without a stage, ascending, each with the reason.
fn idle_members(
    candidates: &[&Candidate],
    problem: &Problem,
    pipelines: &[Pipeline],
) -> Vec<(WorkerId, IdleReason)> {
    let mut working: Vec<WorkerId> =
        pipelines.iter().flat_map(|p| &p.stages).map(|stage| stage.worker).collect();
    working.sort_unstable();
    let able: BTreeMap<usize, usize> = problem.workers.iter().map(|w| w.candidate).zip(0..).collect();
    let reasons = idle::Reasons::new(problem, pipelines);
    let mut idle = Vec::new();
    for (i, candidate) in candidates.iter().enumerate() {
        let worker = candidate.member.worker;
        if working.binary_search(&worker).is_err() {
            let reason = match able.get(&i) {
                _ if candidate.leaving => IdleReason::Leaving,
                None => IdleReason::TooSmall,
                Some(worker) => reasons.of(*worker),
            };
            idle.push((worker, reason));
        }
    }
    idle
}

/// Owners of every slice, the primary first; primaries are dealt as evenly as owners.
fn owners(
    table: &SliceTable,
    demand: &Demand,
    owning: &[&Candidate],
    pipelines: &[Pipeline],
) -> Vec<Vec<WorkerId>> {
    let place = |worker: WorkerId| owning.binary_search_by_key(&worker, |c| c.member.worker).ok();
    let mut computing: Vec<Vec<usize>> = vec![Vec::new(); demand.shape.units() as usize];
    for stage in pipelines.iter().flat_map(|p| &p.stages) {
        for unit in stage.units.clone() {
            computing[unit as usize].extend(place(stage.worker));
        }
    }
    computing.iter_mut().for_each(|members| members.sort_unstable());
    let mut names: BTreeMap<&str, usize> = BTreeMap::new();
    // A host that is not known is nobody else's. Numbers are those of the first on each host.
    let host = |(i, c): (usize, &&Candidate)| match c.host.as_str() {
        "" => i,
        _ => *names.entry(&owning[i].host).or_insert(i),
    };
    let hosts: Vec<usize> = owning.iter().enumerate().map(host).collect();
    let held: Vec<&SliceSet> = owning.iter().map(|c| &c.state).collect();
    let units: Vec<u32> = table.iter().map(|(_, slice)| slice.unit.0).collect();
    let question = owners::Question {
        redundancy: demand.redundancy.max(1) as usize,
        held: &held,
        hosts: &hosts,
        units: &units,
        computing: &computing,
    };
    let mut primaries = vec![0usize; owning.len()];
    let name = |mut owners: Vec<usize>| {
        owners.sort_by_key(|&m| (primaries[m], m));
        if let Some(&first) = owners.first() {
            primaries[first] += 1;
        }
        owners.into_iter().map(|m| owning[m].member.worker).collect()
    };
    owners::assign(&question).into_iter().map(name).collect()
}
