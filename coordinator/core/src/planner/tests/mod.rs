//! Properties of plans: against everything there is for few workers, and what must hold for any.

mod brute;
mod many;
mod properties;

use super::*;
use brute::World;
use caravan_types::{Precision, SliceId};
use proptest::prelude::*;

/// A tiny model: a slice a unit, units of different sizes.
pub(super) fn shape(layers: u32) -> ModelShape {
    ModelShape {
        dim: 16,
        layers,
        heads: 2,
        kv_heads: 1,
        hidden: 24,
        vocab: 40,
        context: 8,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
    }
}

pub(super) fn demand(layers: u32, lanes: u32, micro_batches: u32) -> Demand {
    Demand {
        shape: shape(layers),
        batch: BatchShape { lanes, micro_batches, sequences: 2, sequence_length: 8 },
        precision: Precision::Fp32,
        recompute: false,
        redundancy: 2,
        stages: None,
        link_bytes_per_s: 1e9,
    }
}

pub(super) fn candidate(id: u64, speed: f64, memory: u64) -> Candidate {
    Candidate {
        member: Member { worker: WorkerId(id), fabric: format!("127.0.0.1:{id}") },
        host: String::new(),
        speed,
        memory,
        state: SliceSet::default(),
        weights: SliceSet::default(),
        leaving: false,
    }
}

pub(super) const START: Start = Start { base: Step(7), verdict: None, origin: Source::Init };

pub(super) fn planned(demand: &Demand, candidates: &[Candidate]) -> Result<Plan, NoPlan> {
    after(demand, candidates, &[])
}

pub(super) fn after(demand: &Demand, candidates: &[Candidate], before: &[Pipeline]) -> Result<Plan, NoPlan> {
    plan(demand, &SliceTable::new(&demand.shape), Generation(3), START, candidates, before, &[])
}

/// The candidates as they are once a plan is healed.
pub(super) fn healed(demand: &Demand, plan: &Plan, candidates: &[Candidate]) -> Vec<Candidate> {
    let table = SliceTable::new(&demand.shape);
    let heal = |c: &Candidate| {
        let worker = c.member.worker;
        let mut stages = plan.pipelines.iter().flat_map(|p| &p.stages);
        let units = stages.find(|s| s.worker == worker).map_or(0..0, |s| s.units.clone());
        let here = table.iter().filter(|(_, slice)| units.contains(&slice.unit.0));
        Candidate { state: plan.owned_by(worker), weights: here.map(|(id, _)| id).collect(), ..c.clone() }
    };
    candidates.iter().map(heal).collect()
}

/// Random workers: few speeds, so that there are ties, and memory around what is needed.
pub(super) fn workers(
    most: usize,
    demand: impl Strategy<Value = Demand>,
) -> impl Strategy<Value = (Demand, Vec<Candidate>)> {
    let speed = prop_oneof![Just(1e6), Just(2e6), Just(3e6), 5e5..5e6f64];
    let memory = prop_oneof![Just(0.0), Just(0.7), 0.2..1.5f64];
    let worker = (speed, memory, any::<u8>(), any::<u8>());
    let some = proptest::collection::vec(worker, 1..=most);
    let options = (any::<bool>(), prop_oneof![3 => Just(None), 1 => (1u32..5).prop_map(Some)]);
    (demand, some, options).prop_map(|(mut demand, some, (equal, stages))| {
        demand.stages = stages;
        // What one worker needs for everything, without activations.
        let whole = demand.shape.parameters() as f64 * 24.0;
        let build = |(i, (speed, memory, state, weights)): (usize, &(f64, f64, u8, u8))| {
            let (speed, memory) = if equal { (some[0].0, some[0].1) } else { (*speed, *memory) };
            let bits = |bits: u8| (0..8u32).filter(|b| bits >> b & 1 == 1).map(SliceId).collect::<SliceSet>();
            let held = SliceSet::all(demand.shape.units() as usize);
            let only = |set: SliceSet| set.difference(&set.difference(&held));
            Candidate {
                state: only(bits(state & state.rotate_left(3))),
                weights: only(bits(*weights)),
                ..candidate(i as u64 + 1, speed, (whole * memory) as u64)
            }
        };
        let candidates = some.iter().enumerate().map(build).collect();
        (demand, candidates)
    })
}

pub(super) fn demands(
    layers: std::ops::Range<u32>,
    log_lanes: std::ops::Range<u32>,
) -> impl Strategy<Value = Demand> {
    (layers, log_lanes, 1u32..4, prop_oneof![Just(1e12), Just(1e7), 1e5..1e8f64], (1u32..4, any::<bool>()))
        .prop_map(|(layers, log_lanes, micro_batches, link_bytes_per_s, (redundancy, recompute))| Demand {
            link_bytes_per_s,
            redundancy,
            recompute,
            ..demand(layers, 1 << log_lanes, micro_batches)
        })
}

/// Fails unless the plan is the best there is.
fn is_best(demand: &Demand, candidates: &[Candidate]) -> Result<(), TestCaseError> {
    let table = SliceTable::new(&demand.shape);
    let world = World::new(demand, &table, candidates);
    let best = world.best();
    match (planned(demand, candidates), best) {
        (Ok(plan), Some(best)) => {
            let ours = world.judge(&plan);
            prop_assert!(
                (ours.step_s / best.step_s - 1.0).abs() < 2e-9,
                "{ours:?} against {best:?}\n{plan:#?}"
            );
            prop_assert_eq!(ours.used, best.used, "{:?} against {:?}", ours, best);
            prop_assert_eq!(ours.bytes, best.bytes, "{:?} against {:?}", ours, best);
        }
        (Err(NoPlan::DoesNotFit { .. }), None) => {}
        (ours, best) => prop_assert!(false, "{ours:?} against {best:?}"),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn a_plan_for_few_workers_is_the_best_there_is(
        (demand, candidates) in workers(4, demands(1..5, 0..4)),
    ) {
        is_best(&demand, &candidates)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_plan_for_five_and_six_workers_is_the_best_there_is(
        (demand, candidates) in workers(6, demands(2..5, 0..4)).prop_filter("many", |(_, c)| c.len() > 4),
    ) {
        is_best(&demand, &candidates)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn a_plan_for_eight_workers_is_the_best_there_is(
        (demand, candidates) in workers(8, demands(1..4, 0..3)).prop_filter("many", |(_, c)| c.len() > 6),
    ) {
        is_best(&demand, &candidates)?;
    }
}
