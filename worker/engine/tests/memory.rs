//! What `caravan config` says that a worker needs is what it takes: this process, at its largest.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]
#![cfg(target_os = "linux")]

mod common;

use caravan_engine::{Executor, fastest};
use caravan_types::cost;
use caravan_types::task::{Done, Task};
use caravan_types::{
    BatchShape, Generation, ModelShape, Part, Precision, RunSpec, SliceSet, SliceTable, Step, Verdict,
};
use common::{Memory, NoCheckpoints, compute, spec};
use std::process::Command;
use std::sync::Arc;

/// Bytes of this process in memory, at most so far.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

/// Two steps of a run.
fn train(run: &RunSpec, recompute: bool) {
    let mut engine = Executor::new(run, 2, Arc::default(), Memory::of(run), NoCheckpoints).unwrap();
    let slices = SliceSet::all(SliceTable::new(&run.model).len());
    engine.run(Task::Place { units: 0..run.model.units(), recompute }).unwrap();
    engine.run(Task::Init { slices: slices.clone(), part: Part::State }).unwrap();
    for step in [1, 2].map(Step) {
        let batch = run.batch;
        compute(&mut engine, Generation(1), step, (0..batch.lanes, batch.micro_batches)).unwrap();
        let mut norm = 0.0;
        for slice in slices.iter() {
            let done = engine.run(Task::Reduce { generation: Generation(1), step, slice }).unwrap();
            let Some(Done::Reduced { norms, .. }) = done else { panic!("{done:?}") };
            norm += norms.iter().sum::<f64>();
        }
        engine
            .run(Task::Apply { step, verdict: Verdict::Update { norm: norm.sqrt() }, slices: slices.clone() })
            .unwrap();
    }
}

/// Set in a process that is to measure itself, to the case's number.
const CASE: &str = "CARAVAN_TEST_MEMORY_CASE";

#[test]
fn a_worker_takes_what_was_predicted_within_a_tenth() {
    let shape = ModelShape { layers: 3, ..ModelShape::preset("15m").unwrap() };
    let two_lanes = BatchShape { lanes: 2, micro_batches: 2, sequences: 2, sequence_length: 128 };
    let long = BatchShape { lanes: 1, micro_batches: 1, sequences: 8, sequence_length: 256 };
    let with = |precision| [(two_lanes, false), (long, false), (long, true)].map(|(b, r)| (precision, b, r));
    let cases = [Precision::Fp32, Precision::Mixed].map(with).concat();
    let Ok(case) = std::env::var(CASE) else {
        // Each in a process of its own: what one run gives back would stay with the process.
        for case in 0..cases.len() {
            let name = "a_worker_takes_what_was_predicted_within_a_tenth";
            let mut child = Command::new(std::env::current_exe().unwrap());
            let out = child.args(["--exact", name]).env(CASE, case.to_string()).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        }
        return;
    };
    let (precision, batch, recompute) = cases[case.parse::<usize>().unwrap()];
    let mut run = spec(&shape, fastest(precision).name());
    run.numerics.precision = precision;
    run.batch = batch;
    let predicted = cost::Memory::estimate(&shape, &batch, precision, recompute, 1, 1).total();
    let before = peak();
    train(&run, recompute);
    let taken = peak() - before;
    let ratio = taken as f64 / predicted as f64;
    assert!(
        (0.9..1.1).contains(&ratio),
        "{precision} {batch:?}, recompute {recompute}: {taken} bytes, {predicted} predicted: {ratio:.3}"
    );
}
