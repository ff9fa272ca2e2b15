//! Activation recomputation changes no bit, of any gradient, loss or weight.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

mod common;

use caravan_engine::{Executor, Model, fastest};
use caravan_kernels::{Bf16, Cpu, Element, Family, Real};
use caravan_types::task::{Done, Task};
use caravan_types::{
    Generation, MicroBatch, MicroId, ModelShape, Part, Precision, RunSpec, SliceSet, SliceTable, Step,
    Verdict,
};
use common::{Memory, NoCheckpoints, batch, spec, tiny, weights};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::ops::Range;

/// What a stage makes of some micro-batches.
#[derive(Debug, PartialEq)]
struct Made {
    /// Bits of each micro-batch's loss, and of its gradient in the stage's input.
    losses: Vec<u64>,
    inputs: Vec<Vec<u64>>,
    /// Bits of the gradient of the weights.
    gradient: Vec<u64>,
}

fn bits<E: Element>(values: &[E]) -> Vec<u64> {
    values.iter().map(|v| v.widen().to_f64().to_bits()).collect()
}

/// Takes all micro-batches forward and back through a stage of which `ahead` are in the air.
fn made<E: Element>(
    shape: &ModelShape,
    family: Family,
    batches: &[MicroBatch],
    (stage, ahead, recompute): (Range<usize>, usize, bool),
) -> Made {
    let cpu = Cpu::new(2, family).unwrap();
    let weights: Vec<E> = weights::<E::Sum>(shape, 9).into_iter().map(E::narrow).collect();
    let mut model = Model::<E>::new(shape).unwrap();
    model.place(stage, recompute);
    let layout = model.layout().clone();
    let mut gradient = vec![E::Sum::ZERO; weights.len()];
    // What other stages would send: any numbers.
    let stream = |batch: &MicroBatch| -> Vec<E::Sum> {
        (0..batch.tokens.len() * layout.dim).map(|i| E::Sum::from_f64((i as f64).sin())).collect()
    };
    let mut made = Made { losses: Vec::new(), inputs: Vec::new(), gradient: Vec::new() };
    let mut air = VecDeque::new();
    let units = layout.split(&weights);
    for (i, batch) in batches.iter().enumerate() {
        let input = (!model.is_first()).then(|| stream(batch));
        let flight = model.forward(&cpu, &units, batch.clone(), input.as_deref(), &|_| false);
        air.push_back((batch, flight.unwrap().unwrap()));
        while air.len() > if i + 1 < batches.len() { ahead } else { 0 } {
            let (batch, flight) = air.pop_front().unwrap();
            let coming = (!model.is_last()).then(|| stream(batch));
            let into = &mut layout.split_mut(&mut gradient);
            let loss = model.backward(&cpu, &units, into, flight, coming.as_deref(), 0.01, &|_| false);
            made.losses.push(loss.unwrap().unwrap().to_bits());
            made.inputs.push(bits(model.input_gradient(batch.tokens.len())));
        }
    }
    made.gradient = bits(&gradient);
    made
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_stage_that_recomputes_its_layers_has_the_bits_of_one_that_keeps_them(
        layers in 1u32..4,
        ends in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        ahead in 0usize..4,
        batches in prop::collection::vec((1usize..4, 1usize..40, any::<u64>()), 1..5),
        family in prop::sample::select(Family::available()),
    ) {
        let shape = ModelShape { layers, ..tiny() };
        let batches: Vec<_> =
            batches.into_iter().map(|(n, length, seed)| batch(&shape, n, length, seed)).collect();
        let units = shape.units() as usize;
        let start = ends.0.index(units);
        let end = start + 1 + ends.1.index(units - start);
        let [kept, again] = [false, true].map(|recompute| {
            let how = || (start..end, ahead, recompute);
            (
                made::<f32>(&shape, family, &batches, how()),
                made::<Bf16>(&shape, family, &batches, how()),
                made::<f64>(&shape, family, &batches, how()),
            )
        });
        prop_assert_eq!(kept, again);
    }
}

/// The weights after three steps of two micro-batches in the air, and the losses on the way.
fn trained(run: &RunSpec, recompute: bool) -> (Vec<f32>, Vec<f64>) {
    let engine = Executor::new(run, 2, Default::default(), Memory::of(run), NoCheckpoints);
    let mut engine = engine.unwrap();
    let slices = SliceSet::all(SliceTable::new(&run.model).len());
    let generation = Generation(1);
    engine.run(Task::Place { units: 0..run.model.units(), recompute }).unwrap();
    engine.run(Task::Init { slices: slices.clone(), part: Part::State }).unwrap();
    let mut losses = Vec::new();
    for step in (1..=3).map(Step) {
        for lane in 0..run.batch.lanes {
            let micros: Vec<_> = (0..run.batch.micro_batches).map(|index| MicroId { lane, index }).collect();
            for micro in &micros {
                engine.run(Task::Forward { generation, step, micro: *micro }).unwrap();
            }
            for micro in micros {
                let done = engine.run(Task::Backward { generation, step, micro }).unwrap();
                if let Some(Done::Lane { result, .. }) = done {
                    losses.push(result.loss);
                }
            }
        }
        let mut square = 0.0;
        for slice in slices.iter() {
            let done = engine.run(Task::Reduce { generation, step, slice }).unwrap();
            let Some(Done::Reduced { norms, .. }) = done else { panic!("{done:?}") };
            square += norms.iter().sum::<f64>();
        }
        let verdict = Verdict::Update { norm: square.sqrt() };
        engine.run(Task::Apply { step, verdict, slices: slices.clone() }).unwrap();
    }
    (engine.weights(Step(3)).unwrap(), losses)
}

#[test]
fn weights_after_some_steps_are_the_same_with_and_without() {
    for precision in [Precision::Fp32, Precision::Mixed] {
        let mut run = spec(&ModelShape { layers: 3, ..tiny() }, fastest(precision).name());
        run.numerics.precision = precision;
        let (kept, losses) = trained(&run, false);
        let (again, same) = trained(&run, true);
        assert!(kept.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()), "{precision}");
        assert_eq!((kept.len(), losses), (again.len(), same), "{precision}");
    }
}
