//! Planning for ten thousand workers: whole, quick, and nothing moves that need not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use caravan_coordinator_core::{Candidate, Demand, LINK_BYTES_PER_S, Start, plan};
use caravan_types::{
    BatchShape, Generation, Member, ModelShape, Part, Plan, Precision, SliceSet, SliceTable, Source, Step,
    WorkerId,
};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

const WORKERS: u64 = 10_000;

/// A second is what is promised, and what `examples/plan.rs` measures for a release build. A
/// debug build on a busy machine takes far longer; what is quadratic takes longer than this.
const PATIENCE: Duration = Duration::from_secs(30);

fn demand() -> Demand {
    let shape = ModelShape::preset("7b").unwrap();
    let batch = BatchShape { lanes: 512, micro_batches: 8, sequences: 1, sequence_length: 4096 };
    Demand {
        shape,
        batch,
        precision: Precision::Fp32,
        recompute: false,
        redundancy: 2,
        stages: None,
        link_bytes_per_s: 25.0 * LINK_BYTES_PER_S,
    }
}

fn workers(mixed: bool) -> Vec<Candidate> {
    let worker = |id: u64| {
        // Numbers without a pattern: the fractional parts of multiples of the golden ratio.
        let chance = |n: u64| (n as f64 * 0.618_033_988_749_895).fract();
        let (speed, memory) =
            if mixed { (0.25 + 3.0 * chance(id), 24.0 + 140.0 * chance(7 * id + 3)) } else { (1.0, 80.0) };
        Candidate {
            member: Member { worker: WorkerId(id), fabric: format!("10.0.0.1:{id}") },
            host: format!("host-{}", id / 8),
            speed: 2e14 * speed,
            memory: (memory * (1u64 << 30) as f64) as u64,
            state: SliceSet::default(),
            weights: SliceSet::default(),
            leaving: false,
        }
    };
    (0..WORKERS).map(worker).collect()
}

/// Fails unless every lane, unit and slice has who it needs.
fn is_whole(demand: &Demand, table: &SliceTable, plan: &Plan) {
    let mut lane = 0;
    let mut seen = BTreeSet::new();
    for pipeline in &plan.pipelines {
        assert_eq!(pipeline.lanes.start, lane);
        lane = pipeline.lanes.end;
        let mut unit = 0;
        for stage in &pipeline.stages {
            assert!(stage.units.start == unit && stage.units.end > unit);
            unit = stage.units.end;
            assert!(seen.insert(stage.worker));
        }
        assert_eq!(unit, demand.shape.units());
    }
    assert_eq!(lane, demand.batch.lanes);
    assert_eq!(seen.len() + plan.idle.len(), plan.members.len());
    assert_eq!(plan.owners.len(), table.len());
    for owners in &plan.owners {
        let hosts: BTreeSet<u64> = owners.iter().map(|worker| worker.0 / 8).collect();
        assert_eq!((owners.len(), hosts.len()), (2, 2), "two owners on two hosts");
    }
}

fn heal(table: &SliceTable, plan: &Plan, candidates: &mut [Candidate]) {
    let stages = plan.pipelines.iter().flat_map(|p| &p.stages);
    let units: BTreeMap<WorkerId, _> = stages.map(|s| (s.worker, s.units.clone())).collect();
    for c in candidates.iter_mut() {
        let here = units.get(&c.member.worker).cloned().unwrap_or_default();
        c.weights = table.iter().filter(|(_, s)| here.contains(&s.unit.0)).map(|(id, _)| id).collect();
    }
    for ((id, _), owners) in table.iter().zip(&plan.owners) {
        for owner in owners {
            candidates[owner.0 as usize].state.insert(id);
        }
    }
}

#[test]
fn ten_thousand_workers_are_planned_for_and_a_death_moves_little() {
    let demand = demand();
    let table = SliceTable::new(&demand.shape);
    let start = Start { base: Step(1), verdict: None, origin: Source::Init };
    for mixed in [false, true] {
        let mut candidates = workers(mixed);
        let clock = Instant::now();
        let first = plan(&demand, &table, Generation(1), start, &candidates, &[], &[]).unwrap();
        assert!(clock.elapsed() < PATIENCE, "{:?}", clock.elapsed());
        is_whole(&demand, &table, &first);
        heal(&table, &first, &mut candidates);
        let again = plan(&demand, &table, Generation(2), start, &candidates, &first.pipelines, &[]).unwrap();
        assert_eq!(again.transfers, []);
        let dead = first.pipelines[7].stages[1].worker;
        candidates.remove(dead.0 as usize);
        let clock = Instant::now();
        let second = plan(&demand, &table, Generation(2), start, &candidates, &first.pipelines, &[]).unwrap();
        assert!(clock.elapsed() < PATIENCE, "{:?}", clock.elapsed());
        is_whole(&demand, &table, &second);
        let moved = |part| {
            let of = second.transfers.iter().filter(|t| t.part == part);
            of.map(|t| t.slices.len()).sum::<usize>()
        };
        let (state, weights) = (moved(Part::State), moved(Part::Weights));
        assert!(state <= 8, "{state} states: it owned one or two, and who is on a host changed");
        // With everybody else idle or equal, somebody takes its stage or its pipeline is cut anew.
        assert!(mixed || weights <= table.len(), "{weights} of {} weights", table.len());
    }
}
