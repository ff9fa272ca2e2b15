//! How long planning takes: from nothing, and after a death.
//!
//! usage: plan [WORKERS...]

#![allow(clippy::print_stdout, clippy::print_stderr)]

use caravan_coordinator_core::{Candidate, Demand, LINK_BYTES_PER_S, NoPlan, Start, plan};
use caravan_types::{
    BatchShape, Generation, Member, ModelShape, Plan, Precision, SliceSet, SliceTable, Source, Step, WorkerId,
};
use std::time::Instant;

const GIB: u64 = 1 << 30;

/// A number from 0 to 1 that looks random.
fn chance(seed: u64) -> f64 {
    let mixed = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

fn worker(id: u64, mixed: bool) -> Candidate {
    let (speed, memory) = match mixed {
        false => (1.0, 80),
        true => (0.25 + 3.0 * chance(2 * id), 24 + (140.0 * chance(2 * id + 1)) as u64),
    };
    Candidate {
        member: Member { worker: WorkerId(id), fabric: format!("10.0.0.1:{id}") },
        host: format!("host-{}", id / 8),
        speed: 2e14 * speed,
        memory: memory * GIB,
        state: SliceSet::default(),
        weights: SliceSet::default(),
        leaving: false,
    }
}

/// The candidates once they have what a plan gives them.
fn healed(table: &SliceTable, plan: &Plan, candidates: &mut [Candidate]) {
    let mut units = std::collections::BTreeMap::new();
    for stage in plan.pipelines.iter().flat_map(|p| &p.stages) {
        units.insert(stage.worker, stage.units.clone());
    }
    for c in candidates.iter_mut() {
        let here = units.get(&c.member.worker).cloned().unwrap_or_default();
        let here = table.iter().filter(|(_, slice)| here.contains(&slice.unit.0));
        c.weights = here.map(|(id, _)| id).collect();
        c.state = SliceSet::default();
    }
    for (id, slice_owners) in table.iter().map(|(id, _)| id).zip(&plan.owners) {
        for owner in slice_owners {
            if let Ok(at) = candidates.binary_search_by_key(owner, |c| c.member.worker) {
                candidates[at].state.insert(id);
            }
        }
    }
}

fn measure(preset: &str, workers: u64, lanes: u32, mixed: bool) -> Result<(), NoPlan> {
    let Some(shape) = ModelShape::preset(preset) else { return Ok(()) };
    let table = SliceTable::new(&shape);
    let batch = BatchShape { lanes, micro_batches: 8, sequences: 1, sequence_length: shape.context };
    let link_bytes_per_s = 25.0 * LINK_BYTES_PER_S;
    let demand = Demand {
        shape,
        batch,
        precision: Precision::Fp32,
        recompute: false,
        redundancy: 2,
        stages: None,
        link_bytes_per_s,
    };
    let mut candidates: Vec<Candidate> = (0..workers).map(|id| worker(id, mixed)).collect();
    let start = Start { base: Step(0), verdict: None, origin: Source::Init };
    let clock = Instant::now();
    let first = plan(&demand, &table, Generation(1), start, &candidates, &[], &[])?;
    let fresh = clock.elapsed();
    healed(&table, &first, &mut candidates);
    candidates.remove(workers as usize / 2);
    let clock = Instant::now();
    let second = plan(&demand, &table, Generation(2), start, &candidates, &first.pipelines, &[])?;
    let after = clock.elapsed();
    let depths = first.pipelines.iter().map(|p| p.stages.len());
    let moved: usize = second.transfers.iter().map(|t| t.slices.len()).sum();
    println!(
        "{preset:>4} {workers:>6} {} workers, {lanes:>4} lanes, {:>5} slices: fresh {:>8.2} ms, after a death {:>8.2} ms; \
         {} pipelines of {} to {} stages, {} idle; {moved} slices move after the death",
        if mixed { "mixed" } else { "equal" },
        table.len(),
        fresh.as_secs_f64() * 1e3,
        after.as_secs_f64() * 1e3,
        first.pipelines.len(),
        depths.clone().min().unwrap_or(0),
        depths.max().unwrap_or(0),
        first.idle.len(),
    );
    Ok(())
}

fn main() {
    let given: Vec<u64> = std::env::args().skip(1).filter_map(|n| n.parse().ok()).collect();
    let sizes = if given.is_empty() { vec![4, 8, 16, 100, 1000, 10_000] } else { given };
    for preset in ["7b", "34b", "70b"] {
        for mixed in [false, true] {
            for workers in &sizes {
                let lanes = (workers.next_power_of_two() as u32 / 2).clamp(16, 512);
                if let Err(reason) = measure(preset, *workers, lanes, mixed) {
                    println!("{preset:>4} {workers:>6} workers: {reason}");
                }
            }
        }
    }
}
