//! Why there is no plan, and what would make one.

use super::problem::{Problem, memory, owning};
use super::{Candidate, Demand, exact, large};
use caravan_types::SliceTable;
use std::fmt;

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoPlan {
    /// Nobody is there who does not leave.
    NobodyStays,
    /// The memory of all workers together does not hold one pipeline.
    DoesNotFit {
        /// Workers that stay.
        workers: usize,
        /// Bytes more on each of them with which the model would fit; none where no memory
        /// is enough.
        more_bytes: Option<u64>,
        /// How many more workers like the one with the most memory would do, and the bytes that
        /// it has; none where no number is enough.
        more_workers: Option<(u32, u64)>,
        /// Whether the model would fit into what there is if layers were recomputed.
        recompute: bool,
    },
}

impl fmt::Display for NoPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::DoesNotFit { workers, more_bytes, more_workers, recompute } = self else {
            return f.write_str("every worker is about to leave");
        };
        let them = if *workers == 1 { "the worker".to_owned() } else { format!("the {workers} workers") };
        write!(f, "the model with its training state does not fit into the memory of {them}")?;
        let bytes = more_bytes.map(|bytes| format!("{} more memory on each", gib(bytes)));
        let others = more_workers.map(|(count, bytes)| {
            let s = if count == 1 { "" } else { "s" };
            format!("{count} more worker{s} with {} each", gib(bytes))
        });
        // As the run file has it.
        let setting = recompute.then(|| "recompute = true".to_owned());
        let mut ways = bytes.into_iter().chain(others).chain(setting);
        ways.next().map_or(Ok(()), |first| write!(f, ": {first} would do"))?;
        ways.try_for_each(|way| write!(f, ", or {way}"))
    }
}

impl std::error::Error for NoPlan {}

/// Bytes as people read them, rounded up: less would not do.
fn gib(bytes: u64) -> String {
    let (size, unit) = if bytes >= 1 << 30 { (1u64 << 30, "GiB") } else { (1 << 20, "MiB") };
    let tenths = (u128::from(bytes) * 10).div_ceil(u128::from(size));
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

/// Workers that are looked at: the deepest pipeline of the presets has 82 stages. What would do
/// for those with the most memory would do for all.
const MOST_LOOKED_AT: usize = 128;

/// Says what would do for those that stay, by their place among the candidates.
pub(super) fn missing(
    demand: &Demand,
    table: &SliceTable,
    candidates: &[&Candidate],
    staying: &[usize],
) -> NoPlan {
    if staying.is_empty() {
        return NoPlan::NobodyStays;
    }
    let mut largest: Vec<Candidate> = staying.iter().map(|i| candidates[*i].clone()).collect();
    largest.sort_by_key(|c| (std::cmp::Reverse(memory(c)), c.member.worker));
    let recomputed = Demand { recompute: true, ..demand.clone() };
    let recompute = !demand.recompute && fits(&recomputed, table, &largest, largest.len());
    let fits = |workers: &[Candidate]| fits(demand, table, workers, workers.len());
    let with_bytes = |bytes: u64| {
        let more = |c: &Candidate| Candidate { memory: memory(c).saturating_add(bytes), ..c.clone() };
        fits(&largest.iter().map(more).collect::<Vec<_>>())
    };
    // From a MiB on; to a hundredth.
    let more_bytes = least(1 << 20, 1 << 50, |bytes| bytes / 100, with_bytes);
    let with_workers = |count: u64| {
        let more = std::iter::repeat_n(&largest[0], count as usize).chain(&largest).cloned();
        fits(&more.collect::<Vec<_>>())
    };
    let more_workers = least(1, 1 << 12, |_| 1, with_workers);
    let more_workers = more_workers.map(|count| (count as u32, memory(&largest[0])));
    NoPlan::DoesNotFit { workers: staying.len(), more_bytes, more_workers, recompute }
}

/// The least number from `first` to `last` that will do, to within `grain` of it.
fn least(first: u64, last: u64, grain: impl Fn(u64) -> u64, will_do: impl Fn(u64) -> bool) -> Option<u64> {
    let mut high = first;
    while !will_do(high) {
        high = high.checked_mul(2).filter(|high| *high <= last)?;
    }
    let mut low = if high == first { 0 } else { high / 2 };
    while high - low > grain(high).max(1) {
        let middle = low + (high - low) / 2;
        if will_do(middle) { high = middle } else { low = middle }
    }
    Some(high)
}

/// Whether workers, those with the most memory first, can train the model.
fn fits(demand: &Demand, table: &SliceTable, workers: &[Candidate], members: usize) -> bool {
    let memories: Vec<u64> = workers.iter().map(memory).collect();
    let (owns, share) = owning(demand.shape.parameters(), demand.redundancy, &memories);
    let owning: Vec<usize> = (0..members.min(MOST_LOOKED_AT)).filter(|i| owns[*i]).collect();
    if owning.is_empty() {
        return false;
    }
    let candidates: Vec<&Candidate> = workers.iter().collect();
    let problem = Problem::new(demand, table, &candidates, &owning, share);
    if problem.workers.len() <= exact::MOST_WORKERS { exact::fits(&problem) } else { large::fits(&problem) }
}
