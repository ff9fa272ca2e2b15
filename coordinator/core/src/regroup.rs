//! What the survivors' reports add up to: the step that the next plan starts from.
//!
//! Let A be the largest applied step. Whoever is at A - 1 is prepared for A and can apply it
//! as those at A did: with their norm, or without an update. Where all who applied A are gone but
//! one of them told the coordinator how, the prepared ones can still finish it. Prepared by all but applied by
//! none that is known: the step is done again, with the same bits.

use crate::planner::Start;
use caravan_types::message::{Committed, Report};
use caravan_types::{SliceSet, Source, Step, WorkerId};
use std::collections::BTreeMap;

/// What a worker will hold at the agreed step, once it has applied what it is prepared for.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Holding {
    pub(crate) state: SliceSet,
    pub(crate) weights: SliceSet,
}

/// Where to go on from, and who has what there.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Agreement {
    pub(crate) start: Start,
    pub(crate) holdings: BTreeMap<WorkerId, Holding>,
    /// The newest step that is known to have been committed, where it cannot be kept.
    pub(crate) lost: Option<Step>,
    /// Whether everybody who holds anything is at `start.base` already.
    pub(crate) settled: bool,
}

/// Agrees on a step. `committed` is the newest step that any worker said to be committed,
/// `checkpoint` the newest intact one.
pub(crate) fn agree(
    reports: &BTreeMap<WorkerId, &Report>,
    committed: Option<&Committed>,
    checkpoint: Option<Step>,
    slices: usize,
) -> Agreement {
    let holders = || reports.values().filter(|r| !r.state.is_empty() || !r.weights.is_empty());
    let applied = holders().map(|r| r.applied).max();
    let told = committed.map(|c| c.step);
    if let Some(applied) = applied {
        let told_verdict = committed.filter(|c| c.step == applied.next()).map(Committed::verdict);
        let at_front = || holders().filter(|r| r.applied == applied);
        let finish = told_verdict.filter(|_| at_front().all(|r| r.prepared.is_some()));
        let base = if finish.is_some() { applied.next() } else { applied };
        let verdict = finish.or_else(|| at_front().find_map(|r| r.verdict));
        let holdings: BTreeMap<_, _> = reports.iter().map(|(w, r)| (*w, at(r, base))).collect();
        let kept: SliceSet = holdings.values().flat_map(|h| h.state.iter()).collect();
        if kept.len() == slices {
            let settled = holders().all(|r| r.applied == base);
            let start = Start { base, verdict, origin: Source::Init };
            return Agreement { start, holdings, lost: told.filter(|t| *t > base), settled };
        }
    }
    let base = checkpoint.unwrap_or_default();
    let origin = if checkpoint.is_some() { Source::Checkpoint } else { Source::Init };
    let start = Start { base, verdict: None, origin };
    let holdings = reports.keys().map(|w| (*w, Holding::default())).collect();
    let lost = applied.max(told).filter(|newest| *newest > base);
    Agreement { start, holdings, lost, settled: false }
}

/// What a reporter has at `base`: now, or after applying what it is prepared for.
fn at(report: &Report, base: Step) -> Holding {
    if report.applied == base {
        return Holding { state: report.state.clone(), weights: report.weights.clone() };
    }
    match &report.prepared {
        Some(prepared) if report.applied.next() == base => {
            Holding { state: prepared.clone(), weights: prepared.clone() }
        }
        _ => Holding::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caravan_types::{Generation, SliceId, Verdict};

    fn set(ids: &[u32]) -> SliceSet {
        ids.iter().copied().map(SliceId).collect()
    }

    fn report(applied: u64, state: &[u32], prepared: Option<&[u32]>) -> Report {
        Report {
            generation: Generation(2),
            applied: Step(applied),
            verdict: (applied > 0).then_some(Verdict::Update { norm: applied as f64 }),
            state: set(state),
            weights: set(&[0, 1]),
            prepared: prepared.map(set),
            sums: Vec::new(),
        }
    }

    fn committed(step: u64) -> Committed {
        Committed {
            generation: Generation(1),
            step: Step(step),
            loss: 1.0,
            norm: step as f64 + 0.5,
            tokens: 1,
            took_ms: 1,
        }
    }

    fn agree_on(reports: &[Report], told: Option<Committed>, checkpoint: Option<u64>) -> Agreement {
        let named = (1..).map(WorkerId).zip(reports).collect();
        agree(&named, told.as_ref(), checkpoint.map(Step), 2)
    }

    #[test]
    fn one_behind_and_prepared_finishes_the_step() {
        let a = agree_on(&[report(5, &[0], None), report(4, &[1], Some(&[1]))], None, None);
        let verdict = Some(Verdict::Update { norm: 5.0 });
        assert_eq!((a.start.base, a.start.verdict, a.settled), (Step(5), verdict, false));
        assert_eq!(a.holdings[&WorkerId(2)].state, set(&[1]));
        assert_eq!(a.holdings[&WorkerId(2)].weights, set(&[1]), "its other weights are a step old");
    }

    #[test]
    fn prepared_by_all_but_applied_by_none_is_done_again() {
        let a = agree_on(&[report(4, &[0], Some(&[0])), report(4, &[1], Some(&[1]))], None, None);
        assert_eq!((a.start.base, a.lost, a.settled), (Step(4), None, true));
    }

    #[test]
    fn a_step_whose_only_known_committer_died_is_finished_with_the_norm_it_told() {
        let both = [report(4, &[0], Some(&[0])), report(4, &[1], Some(&[1]))];
        let a = agree_on(&both, Some(committed(5)), None);
        let verdict = Some(Verdict::Update { norm: 5.5 });
        assert_eq!((a.start.base, a.start.verdict, a.lost), (Step(5), verdict, None));
        let a = agree_on(&both, Some(Committed { norm: f64::NAN, ..committed(5) }), None);
        assert_eq!((a.start.base, a.start.verdict), (Step(5), Some(Verdict::Skip)));
    }

    #[test]
    fn a_slice_without_an_owner_sends_the_run_back_to_the_checkpoint_or_to_the_seed() {
        let a = agree_on(&[report(5, &[0], None)], Some(committed(5)), Some(3));
        assert_eq!((a.start.base, a.start.origin, a.lost), (Step(3), Source::Checkpoint, Some(Step(5))));
        let a = agree_on(&[report(5, &[0], None)], None, None);
        assert_eq!((a.start.base, a.start.origin, a.lost), (Step(0), Source::Init, Some(Step(5))));
    }

    #[test]
    fn newcomers_alone_start_from_the_seed_and_lose_nothing() {
        let new = Report { weights: set(&[]), ..report(0, &[], None) };
        let a = agree_on(&[new.clone(), new], None, None);
        assert_eq!((a.start.base, a.start.origin, a.lost), (Step(0), Source::Init, None));
    }
}
