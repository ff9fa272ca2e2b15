//! A machine whose memory or cores fail: the engine finds what was changed behind its back, and
//! what it computes wrong shows in what it says of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

mod common;

use caravan_engine::{EngineError, Executor, Flaw, fastest};
use caravan_types::peer::Key;
use caravan_types::task::{Done, Task};
use caravan_types::{
    Checksum, Generation, Part, Precision, SliceId, SliceSet, SliceSum, SliceTable, Step, Verdict,
};
use common::{Memory, NoCheckpoints, spec, tiny};
use proptest::prelude::*;
use std::sync::Arc;

type Engine = Executor<Memory, NoCheckpoints>;
const G: Generation = Generation(1);

/// All gradients of step 1 summed up, with what the engine says of each.
fn reduced(precision: Precision, flaw: Option<Flaw>) -> (Engine, SliceSet, Vec<Checksum>) {
    let mut run = spec(&tiny(), fastest(precision).name());
    run.numerics.precision = precision;
    let mut engine = Executor::new(&run, 1, Arc::default(), Memory::of(&run), NoCheckpoints).unwrap();
    let slices = SliceSet::all(SliceTable::new(&run.model).len());
    engine.run(Task::Place { units: 0..run.model.units(), recompute: false }).unwrap();
    engine.run(Task::Init { slices: slices.clone(), part: Part::State }).unwrap();
    common::compute(&mut engine, G, Step(1), (0..run.batch.lanes, 2)).unwrap();
    flaw.iter().for_each(|flaw| assert!(engine.fail(*flaw)));
    let mut sums = Vec::new();
    for slice in slices.iter() {
        let done = engine.run(Task::Reduce { generation: G, step: Step(1), slice }).unwrap();
        let Some(Done::Reduced { gradient, .. }) = done else { panic!("{done:?}") };
        sums.push(gradient);
    }
    (engine, slices, sums)
}

fn apply(engine: &mut Engine, slices: &SliceSet) -> Result<Vec<(SliceId, SliceSum)>, EngineError> {
    match engine.run(Task::Apply {
        step: Step(1),
        verdict: Verdict::Update { norm: 1.0 },
        slices: slices.clone(),
    })? {
        Some(Done::Applied { step: Step(1), sums }) => Ok(sums),
        other => panic!("{other:?}"),
    }
}

fn verify(
    engine: &mut Engine,
    step: Step,
    slices: &SliceSet,
) -> Result<Vec<(SliceId, SliceSum)>, EngineError> {
    match engine.run(Task::Verify { generation: G, step, slices: slices.clone() })? {
        Some(Done::Verified { generation: G, sums, .. }) => Ok(sums),
        other => panic!("{other:?}"),
    }
}

const PRECISIONS: [Precision; 2] = [Precision::Fp32, Precision::Mixed];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn one_flipped_bit_of_weights_or_moments_is_found_before_anything_depends_on_it(bit in any::<u64>(), precision in prop::sample::select(&PRECISIONS)) {
        let corrupt = |error| matches!(error, EngineError::Corrupt { .. });
        let flipped = || {
            let (mut engine, slices, _) = reduced(precision, None);
            assert!(engine.fail(Flaw::Memory(bit)));
            (engine, slices)
        };
        let (mut engine, slices) = flipped();
        // Before a vote only weights are looked at: moments are, before they are used.
        let weights = slices.iter().map(|slice| engine.get(Key::Weights { step: Step(0), slice }));
        let sound = weights.collect::<Result<Vec<_>, _>>().is_ok();
        prop_assert_eq!(verify(&mut engine, Step(0), &slices).is_err_and(corrupt), !sound);
        let (mut engine, slices) = flipped();
        prop_assert!(apply(&mut engine, &slices).is_err_and(corrupt));
        let (mut engine, slices) = flipped();
        let given = slices.iter().map(|slice| engine.get(Key::State { step: Step(0), slice }));
        prop_assert!(given.collect::<Result<Vec<_>, _>>().is_err_and(corrupt));
    }

    #[test]
    fn a_gradient_that_is_summed_up_wrong_has_another_checksum(bit in any::<u64>(), precision in prop::sample::select(&PRECISIONS)) {
        let (_, _, right) = reduced(precision, None);
        let (mut engine, slices, wrong) = reduced(precision, Some(Flaw::Sum(bit)));
        prop_assert_eq!(right.iter().zip(&wrong).filter(|(a, b)| a != b).count(), 1);
        prop_assert!(apply(&mut engine, &slices).is_ok(), "it holds what it has summed up");
    }

    #[test]
    fn weights_that_are_updated_wrong_have_another_checksum(bit in any::<u64>(), precision in prop::sample::select(&PRECISIONS)) {
        let (mut engine, slices, _) = reduced(precision, None);
        let right = apply(&mut engine, &slices).unwrap();
        let (mut engine, slices, _) = reduced(precision, None);
        prop_assert!(engine.fail(Flaw::Update(bit)));
        let wrong = apply(&mut engine, &slices).unwrap();
        let differ = right.iter().zip(&wrong).filter(|((_, a), (_, b))| a.weights != b.weights);
        prop_assert_eq!(differ.count(), 1);
        prop_assert_eq!(verify(&mut engine, Step(1), &slices).unwrap(), wrong, "nobody but the others can tell");
    }
}

#[test]
fn what_was_not_touched_is_sound() {
    for precision in PRECISIONS {
        let (mut engine, slices, _) = reduced(precision, None);
        let before = verify(&mut engine, Step(0), &slices).unwrap();
        assert!(before.iter().all(|(_, sum)| sum.moments.is_some()));
        let after = apply(&mut engine, &slices).unwrap();
        assert_eq!(verify(&mut engine, Step(1), &slices).unwrap(), after);
        assert!(before.iter().zip(&after).all(|(a, b)| a.1.moments != b.1.moments));
    }
}
