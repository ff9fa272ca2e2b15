//! What went bad first is named: the tensor, the layer, the sample, and where in it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

mod common;

use caravan_engine::{Executor, Watch};
use caravan_kernels::Family;
use caravan_types::non_finite::{Finding, LayerPart, Module, Sample, Tensor, Value};
use caravan_types::peer::Key;
use caravan_types::task::{Done, Task};
use caravan_types::{Generation, MicroId, Part, RunSpec, SliceId, SliceSet, SliceTable, Step, Verdict};
use common::{Memory, NoCheckpoints, compute, spec, tiny};
use std::ops::Range;
use std::sync::Arc;

const G: Generation = Generation(3);

type Engine = Executor<Memory, NoCheckpoints>;

fn run_spec() -> RunSpec {
    spec(&tiny(), Family::best().name())
}

fn all(run: &RunSpec) -> SliceSet {
    SliceSet::all(SliceTable::new(&run.model).len())
}

/// An executor with some units and everybody's training state from the seed, of which some
/// parameters are changed: `change` gets a parameter's name and its elements.
fn engine(run: &RunSpec, units: Range<u32>, change: impl Fn(&str, &mut [f32])) -> Engine {
    engine_on(run, Memory::of(run), (units, false), change)
}

fn engine_on(
    run: &RunSpec,
    batches: Memory,
    (units, recompute): (Range<u32>, bool),
    change: impl Fn(&str, &mut [f32]),
) -> Engine {
    let mut engine = Executor::new(run, 1, Arc::<Watch>::default(), batches, NoCheckpoints).unwrap();
    engine.run(Task::Place { units, recompute }).unwrap();
    engine.run(Task::Init { slices: all(run), part: Part::State }).unwrap();
    let mut weights = engine.weights(Step(0)).unwrap();
    for parameter in run.model.all_parameters() {
        let range = parameter.range();
        change(&parameter.name, &mut weights[range.start as usize..range.end as usize]);
    }
    for (slice, cut) in SliceTable::new(&run.model).iter() {
        let key = Key::State { step: Step(0), slice };
        let mut state = weights[cut.range.start as usize..cut.range.end as usize].to_vec();
        state.resize(3 * cut.len(), 0.0);
        engine.put(key, state).unwrap();
        engine.run(Task::Install(key)).unwrap();
    }
    engine
}

fn diagnose(engine: &mut Engine, lanes: Range<u32>) -> Option<Finding> {
    match engine.run(Task::Diagnose { generation: G, step: Step(1), lanes }).unwrap() {
        Some(Done::Diagnosed { finding, .. }) => finding,
        other => panic!("{other:?}"),
    }
}

/// Computes all lanes with a whole model, and diagnoses them.
fn cause(change: impl Fn(&str, &mut [f32])) -> Option<Finding> {
    let run = run_spec();
    let mut engine = engine(&run, 0..run.model.units(), change);
    compute(&mut engine, G, Step(1), (0..8, 2)).unwrap();
    diagnose(&mut engine, 0..8)
}

/// The first sequence of the run in which a token comes, as lane, micro-batch and sequence, and
/// the position.
fn first_with(run: &RunSpec, token: u32) -> (MicroId, u32, u32) {
    let mut batches = Memory::of(run);
    for lane in 0..8 {
        for index in 0..2 {
            let batch = (batches.0)(Step(1), lane, index);
            if let Some(at) = batch.tokens.iter().position(|t| *t == token) {
                let (sequence, position) = (at / batch.length, at % batch.length);
                return (MicroId { lane, index }, sequence as u32, position as u32);
            }
        }
    }
    panic!("token {token} is in no sequence");
}

#[test]
fn where_all_is_finite_nothing_is_found() {
    assert_eq!(cause(|_, _| {}), None);
}

#[test]
fn a_weight_that_is_not_finite_is_named_with_its_element() {
    for (bad, value) in [(f32::NAN, Value::Nan), (f32::NEG_INFINITY, Value::NegativeInfinity)] {
        let name = "model.layers.1.self_attn.k_proj.weight";
        let found = cause(|of, weights| {
            if of == name {
                weights[37] = bad;
            }
        });
        let expected = Finding { tensor: Tensor::Weight(name.into()), element: 37, value, sample: None };
        assert_eq!(found, Some(expected));
    }
}

#[test]
fn finite_weights_that_overflow_are_followed_to_the_tensor_the_sample_and_the_position() {
    let run = run_spec();
    let token = 29;
    let (micro, sequence, position) = first_with(&run, token);
    let number = (u64::from(micro.lane) * 2 + u64::from(micro.index)) * 2 + u64::from(sequence);
    // Element 3 of the embedding is zero but for that token, which has nothing else: its first
    // value overflows, and nobody else's does.
    let found = cause(|name, weights| match name {
        "model.embed_tokens.weight" => {
            weights.chunks_exact_mut(24).for_each(|row| row[3] = 0.0);
            weights[token as usize * 24..][..24].fill(0.0);
            weights[token as usize * 24 + 3] = 1.0;
        }
        "model.layers.0.self_attn.v_proj.weight" => {
            weights.fill(0.0);
            weights[3] = 1e38;
        }
        _ => {}
    })
    .unwrap();
    let sample = Sample { micro, sequence, number, position: Some(position) };
    let expected = Finding {
        tensor: Tensor::Activation(Module::Layer(0, LayerPart::Qkv)),
        // Behind 24 queries and 12 keys.
        element: 36,
        value: Value::Infinity,
        sample: Some(sample),
    };
    assert_eq!(found, expected);
}

#[test]
fn what_overflows_only_on_the_way_back_is_a_gradient() {
    let run = run_spec();
    // One target counts in all, so that nothing is divided; all logits are zero.
    let mut batches = Memory::of(&run);
    let mut make = batches.0;
    batches.0 = Box::new(move |step, lane, index| {
        let mut batch = make(step, lane, index);
        batch.counted.fill(false);
        batch.counted[9] = (lane, index) == (5, 1);
        batch.targets[9] = 0;
        batch
    });
    let mut engine = engine_on(&run, batches, (0..run.model.units(), false), |name, weights| match name {
        "model.norm.weight" => weights.fill(0.0),
        "lm_head.weight" => {
            weights.fill(f32::MAX);
            weights[..24].fill(f32::MIN);
        }
        _ => {}
    });
    let lanes = compute(&mut engine, G, Step(1), (0..8, 2)).unwrap();
    assert!(lanes.iter().all(|lane| lane.loss.is_finite()));
    let found = diagnose(&mut engine, 0..8).unwrap();
    assert_eq!(found.tensor, Tensor::ActivationGradient(Module::FinalNorm));
    // Position 9 of a micro-batch of sequences of 7.
    let micro = MicroId { lane: 5, index: 1 };
    let sample = Sample { micro, sequence: 1, number: (5 * 2 + 1) * 2 + 1, position: Some(2) };
    assert_eq!(found.sample, Some(sample));
}

#[test]
fn a_stage_looks_at_what_it_was_sent_and_only_the_guilty_one_finds_something() {
    let run = run_spec();
    let units = run.model.units();
    let overflow = |name: &str, weights: &mut [f32]| match name {
        "model.layers.1.mlp.down_proj.weight" => weights.fill(f32::MAX),
        "model.layers.1.mlp.gate_proj.weight" | "model.layers.1.mlp.up_proj.weight" => weights.fill(1e4),
        _ => {}
    };
    for recompute in [false, true] {
        let stage = |units| engine_on(&run, Memory::of(&run), (units, recompute), overflow);
        let mut stages = [stage(0..2), stage(2..units)];
        let (generation, step) = (G, Step(1));
        for lane in 0..8 {
            for index in 0..2 {
                let micro = MicroId { lane, index };
                let [first, last] = &mut stages;
                let (there, back) =
                    (Key::Activation { step, micro }, Key::ActivationGradient { step, micro });
                first.run(Task::Forward { generation, step, micro }).unwrap();
                last.put(there, first.get(there).unwrap()).unwrap();
                last.run(Task::Forward { generation, step, micro }).unwrap();
                last.run(Task::Backward { generation, step, micro }).unwrap();
                first.put(back, last.get(back).unwrap()).unwrap();
                first.run(Task::Backward { generation, step, micro }).unwrap();
            }
        }
        let [first, last] = &mut stages;
        let found = diagnose(last, 0..8).unwrap();
        assert_eq!(found.sample.unwrap().micro, MicroId { lane: 0, index: 0 });
        let Tensor::Activation(Module::Layer(1, _)) = found.tensor else { panic!("{found}") };
        // Its gradient sums are not finite either, but they came so.
        assert_eq!(diagnose(first, 0..8), None);
    }
}

#[test]
fn a_skipped_step_keeps_every_bit_of_weights_and_moments_and_the_next_one_goes_on_from_there() {
    let run = run_spec();
    let mut engine = engine(&run, 0..run.model.units(), |_, _| {});
    let slices = all(&run);
    let prepare = |engine: &mut Engine, step| {
        compute(engine, G, step, (0..8, 2)).unwrap();
        slices.iter().for_each(|slice| {
            engine.run(Task::Reduce { generation: G, step, slice }).unwrap();
        });
    };
    let state = |engine: &mut Engine, step| -> Vec<Vec<u32>> {
        let get = |slice: SliceId| engine.get(Key::State { step, slice }).unwrap();
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
        slices.iter().map(get).map(bits).collect()
    };
    let apply = |engine: &mut Engine, step, verdict| {
        engine.run(Task::Apply { step, verdict, slices: slices.clone() }).unwrap();
    };
    prepare(&mut engine, Step(1));
    apply(&mut engine, Step(1), Verdict::Update { norm: 1.0 });
    let before = state(&mut engine, Step(1));
    prepare(&mut engine, Step(2));
    apply(&mut engine, Step(2), Verdict::Skip);
    assert_eq!(state(&mut engine, Step(2)), before);
    prepare(&mut engine, Step(3));
    apply(&mut engine, Step(3), Verdict::Update { norm: 1.0 });
    assert_ne!(state(&mut engine, Step(3)), before);
}

#[test]
fn a_diagnosis_is_given_up_by_the_fence() {
    let run = run_spec();
    let watch = Arc::<Watch>::default();
    let mut engine = Executor::new(&run, 1, Arc::clone(&watch), Memory::of(&run), NoCheckpoints).unwrap();
    engine.run(Task::Place { units: 0..run.model.units(), recompute: false }).unwrap();
    engine.run(Task::Init { slices: all(&run), part: Part::State }).unwrap();
    watch.raise(Generation(G.0 + 1));
    assert_eq!(engine.run(Task::Diagnose { generation: G, step: Step(1), lanes: 0..8 }).unwrap(), None);
}
