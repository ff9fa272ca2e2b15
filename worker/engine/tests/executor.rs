//! Tasks in, bits out: whoever computes which lanes and owns which slices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

mod common;

use caravan_engine::{Checkpoints, EngineError, Executor, Watch};
use caravan_kernels::Family;
use caravan_types::lanes::cover;
use caravan_types::peer::{Key, LaneResult};
use caravan_types::task::{Done, Task};
use caravan_types::{
    Generation, Lane, MicroId, Node, Part, RunSpec, SliceId, SliceSet, SliceTable, Step, Verdict,
};
use common::{Memory, NoCheckpoints, spec, tiny};
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

type Engine = Executor<Memory, NoCheckpoints>;
const G: Generation = Generation(3);

fn run_spec() -> RunSpec {
    spec(&tiny(), Family::best().name())
}

fn engine(run: &RunSpec, threads: usize) -> Engine {
    placed(Executor::new(run, threads, Arc::default(), Memory::of(run), NoCheckpoints), run)
}

/// An executor that computes with the whole model.
fn placed<C: Checkpoints>(
    engine: Result<Executor<Memory, C>, EngineError>,
    run: &RunSpec,
) -> Executor<Memory, C> {
    let mut engine = engine.unwrap();
    engine.run(Task::Place { units: 0..run.model.units(), recompute: false }).unwrap();
    engine
}

/// One executor with all training state at step 0.
fn whole(run: &RunSpec) -> (Engine, SliceSet) {
    let mut engine = engine(run, 1);
    let slices = SliceSet::all(SliceTable::new(&run.model).len());
    engine.run(Task::Init { slices: slices.clone(), part: Part::State }).unwrap();
    (engine, slices)
}

fn reduce(engine: &mut Engine, step: Step, slice: SliceId) -> Vec<f64> {
    match engine.run(Task::Reduce { generation: G, step, slice }).unwrap() {
        Some(Done::Reduced { norms, .. }) => norms,
        other => panic!("{other:?}"),
    }
}

fn compute(engine: &mut Engine, step: Step, lanes: Range<Lane>) -> Vec<LaneResult> {
    common::compute(engine, G, step, (lanes, 2)).unwrap()
}

fn step_alone(engine: &mut Engine, step: Step, slices: &SliceSet, lanes: u32) {
    compute(engine, step, 0..lanes);
    let square: f64 = slices.iter().flat_map(|s| reduce(engine, step, s)).sum();
    engine
        .run(Task::Apply { step, verdict: Verdict::Update { norm: square.sqrt() }, slices: slices.clone() })
        .unwrap();
}

/// Trains on several executors, of which each computes one range of lanes and each slice has
/// `redundancy` owners, and returns the weights that all of them have in the end.
fn train(run: &RunSpec, parts: &[Range<Lane>], redundancy: usize, steps: u64) -> (Vec<f32>, Vec<f64>) {
    let table = SliceTable::new(&run.model);
    let all = SliceSet::all(table.len());
    let n = parts.len();
    let owners = |slice: SliceId| (0..redundancy.min(n)).map(move |r| (slice.0 as usize + r) % n);
    let owned =
        |worker: usize| -> SliceSet { all.iter().filter(|s| owners(*s).any(|o| o == worker)).collect() };
    let mut engines: Vec<_> = (0..n).map(|i| engine(run, 1 + i % 2)).collect();
    for (i, engine) in engines.iter_mut().enumerate() {
        engine.run(Task::Init { slices: all.clone(), part: Part::Weights }).unwrap();
        engine.run(Task::Init { slices: owned(i), part: Part::State }).unwrap();
    }
    let mut history = Vec::new();
    for step in (1..=steps).map(Step) {
        let mut losses = Vec::new();
        for (engine, lanes) in engines.iter_mut().zip(parts) {
            losses.extend(compute(engine, step, lanes.clone()));
        }
        let mut square = 0.0;
        for slice in all.iter() {
            let mut votes = Vec::new();
            for owner in owners(slice) {
                for (from, lanes) in parts.iter().enumerate().filter(|(from, _)| *from != owner) {
                    for node in cover(lanes.clone()) {
                        let key = Key::Partial { step, slice, node };
                        let sum = engines[from].get(key).unwrap();
                        engines[owner].put(key, sum).unwrap();
                    }
                }
                votes.push(reduce(&mut engines[owner], step, slice));
            }
            assert!(votes.iter().all(|v| *v == votes[0]), "owners of slice {slice} disagree");
            square += votes[0].iter().sum::<f64>();
        }
        for (i, engine) in engines.iter_mut().enumerate() {
            engine
                .run(Task::Apply { step, verdict: Verdict::Update { norm: square.sqrt() }, slices: owned(i) })
                .unwrap();
        }
        for slice in all.iter() {
            let key = Key::Weights { step, slice };
            let weights = engines[owners(slice).next().unwrap()].get(key).unwrap();
            for (_, engine) in engines.iter_mut().enumerate().filter(|(i, _)| !owned(*i).contains(slice)) {
                engine.put(key, weights.clone()).unwrap();
                engine.run(Task::Install(key)).unwrap();
            }
        }
        history.push(losses.iter().map(|lane| lane.loss).sum());
    }
    let weights = engines[0].weights(Step(steps)).unwrap().to_vec();
    assert!(engines.iter().all(|e| e.weights(Step(steps)).unwrap() == weights));
    (weights, history)
}

#[test]
fn training_lowers_the_loss() {
    let mut run = run_spec();
    // The same batch every step.
    run.recipe.learning_rate = 0.02;
    let mut source = Memory::of(&run);
    let memory = Memory(
        Box::new(move |_, lane, index| (source.0)(Step(1), lane, index)),
        run.batch.lanes,
        run.batch.micro_batches,
    );
    let mut engine = placed(Executor::new(&run, 2, Default::default(), memory, NoCheckpoints), &run);
    let slices = SliceSet::all(SliceTable::new(&run.model).len());
    engine.run(Task::Init { slices: slices.clone(), part: Part::State }).unwrap();
    let mut losses = Vec::new();
    for step in (1..=30).map(Step) {
        losses.push(compute(&mut engine, step, 0..8).iter().map(|lane| lane.loss).sum::<f64>());
        let mut square = 0.0;
        for slice in slices.iter() {
            let done = engine.run(Task::Reduce { generation: G, step, slice }).unwrap();
            let Some(Done::Reduced { norms, .. }) = done else { panic!("{done:?}") };
            square += norms.iter().sum::<f64>();
        }
        engine
            .run(Task::Apply {
                step,
                verdict: Verdict::Update { norm: square.sqrt() },
                slices: slices.clone(),
            })
            .unwrap();
    }
    // 37 tokens: ln 37 = 3.61 at first.
    assert!((losses[0] - 3.61).abs() < 0.1 && losses[29] < 3.0, "{losses:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn whoever_computes_which_lanes_the_weights_have_the_same_bits(
        cuts in proptest::collection::btree_set(1u32..8, 0..5),
        redundancy in 1usize..4,
    ) {
        let run = run_spec();
        let mut borders: Vec<u32> = vec![0];
        borders.extend(cuts);
        borders.push(8);
        let parts: Vec<_> = borders.windows(2).map(|w| w[0]..w[1]).collect();
        let (alone, alone_losses) = train(&run, std::slice::from_ref(&(0..8)), 1, 2);
        let (together, losses) = train(&run, &parts, redundancy, 2);
        prop_assert!(alone.iter().zip(&together).all(|(a, b)| a.to_bits() == b.to_bits()));
        prop_assert_eq!(alone_losses, losses);
    }
}

/// Trains on a pipeline of executors, each with some units and the slices in them, the way
/// 1F1B goes: as many micro-batches in the air as stages follow.
fn train_in_stages(run: &RunSpec, borders: &[u32], steps: u64) -> (Vec<f32>, Vec<f64>) {
    let table = SliceTable::new(&run.model);
    let stages: Vec<Range<u32>> = borders.windows(2).map(|b| b[0]..b[1]).collect();
    let owned = |stage: &Range<u32>| -> SliceSet {
        table.iter().filter(|(_, s)| stage.contains(&s.unit.0)).map(|(id, _)| id).collect()
    };
    let start = |stage: &Range<u32>| {
        let mut e = engine(run, 1);
        e.run(Task::Place { units: stage.clone(), recompute: false }).unwrap();
        e.run(Task::Init { slices: owned(stage), part: Part::State }).unwrap();
        e.run(Task::Narrow { units: stage.clone() }).unwrap();
        e
    };
    let mut engines: Vec<Engine> = stages.iter().map(start).collect();
    let micros: Vec<MicroId> =
        (0..8).flat_map(|lane| (0..2).map(move |index| MicroId { lane, index })).collect();
    let mut history = Vec::new();
    for step in (1..=steps).map(Step) {
        let mut loss = 0.0;
        let forward = |engines: &mut [Engine], micro: MicroId| {
            for i in 0..engines.len() {
                engines[i].run(Task::Forward { generation: G, step, micro }).unwrap();
                if i + 1 < engines.len() {
                    let key = Key::Activation { step, micro };
                    let stream = engines[i].get(key).unwrap();
                    engines[i + 1].put(key, stream).unwrap();
                }
            }
        };
        let mut backward = |engines: &mut [Engine], micro: MicroId| {
            for i in (0..engines.len()).rev() {
                let done = engines[i].run(Task::Backward { generation: G, step, micro }).unwrap();
                if i + 1 == engines.len()
                    && let Some(Done::Lane { result, .. }) = done
                {
                    loss += result.loss;
                }
                if i > 0 {
                    let key = Key::ActivationGradient { step, micro };
                    let stream = engines[i].get(key).unwrap();
                    engines[i - 1].put(key, stream).unwrap();
                }
            }
        };
        let ahead = engines.len() - 1;
        micros[..ahead].iter().for_each(|m| forward(&mut engines, *m));
        for (i, micro) in micros.iter().enumerate() {
            if let Some(next) = micros.get(i + ahead) {
                forward(&mut engines, *next);
            }
            backward(&mut engines, *micro);
        }
        let mut square = 0.0;
        for (engine, stage) in engines.iter_mut().zip(&stages) {
            for slice in owned(stage).iter() {
                square += reduce(engine, step, slice).iter().sum::<f64>();
            }
        }
        let verdict = Verdict::Update { norm: square.sqrt() };
        for (engine, stage) in engines.iter_mut().zip(&stages) {
            engine.run(Task::Apply { step, verdict, slices: owned(stage) }).unwrap();
        }
        history.push(loss);
    }
    let weights = engines.iter_mut().zip(&stages).flat_map(|(engine, stage)| {
        let keys =
            owned(stage).iter().map(|slice| Key::Weights { step: Step(steps), slice }).collect::<Vec<_>>();
        keys.into_iter().flat_map(|key| engine.get(key).unwrap()).collect::<Vec<_>>()
    });
    (weights.collect(), history)
}

#[test]
fn however_the_units_are_cut_into_stages_the_weights_have_the_same_bits() {
    let run = run_spec();
    let (alone, alone_losses) = train(&run, std::slice::from_ref(&(0..8)), 1, 2);
    for borders in [&[0, 4][..], &[0, 1, 4], &[0, 2, 4], &[0, 3, 4], &[0, 1, 3, 4], &[0, 1, 2, 3, 4]] {
        let (staged, losses) = train_in_stages(&run, borders, 2);
        assert!(alone.iter().zip(&staged).all(|(a, b)| a.to_bits() == b.to_bits()), "{borders:?}");
        assert_eq!(alone.len(), staged.len());
        assert_eq!(alone_losses, losses, "{borders:?}");
    }
}

#[test]
fn slices_owned_without_their_unit_keep_their_state_while_units_come_and_go() {
    let run = run_spec();
    let (mut e, slices) = whole(&run);
    let (mut quiet, _) = whole(&run);
    step_alone(&mut e, Step(1), &slices, 8);
    step_alone(&mut quiet, Step(1), &slices, 8);
    for units in [2..3, 0..0, 1..4, 0..4] {
        e.run(Task::Place { units: units.clone(), recompute: false }).unwrap();
        e.run(Task::Narrow { units }).unwrap();
        assert_eq!(e.weights(Step(1)).unwrap(), quiet.weights(Step(1)).unwrap());
    }
    step_alone(&mut e, Step(2), &slices, 8);
    step_alone(&mut quiet, Step(2), &slices, 8);
    assert_eq!(e.weights(Step(2)).unwrap(), quiet.weights(Step(2)).unwrap());
    // What is neither owned nor computed with is gone.
    let first: SliceSet = [SliceId(0)].into_iter().collect();
    e.run(Task::Drop(first.clone())).unwrap();
    e.run(Task::Place { units: 1..4, recompute: false }).unwrap();
    assert!(e.get(Key::Weights { step: Step(2), slice: SliceId(0) }).is_ok());
    e.run(Task::Narrow { units: 1..4 }).unwrap();
    assert!(e.get(Key::Weights { step: Step(2), slice: SliceId(0) }).is_err());
}

#[test]
fn a_fence_above_the_generation_stops_computing_and_nothing_stays() {
    let run = run_spec();
    let fence = Arc::<Watch>::default();
    let mut source = Memory::of(&run);
    let raise = fence.clone();
    let at = Rc::new(RefCell::new(Some((5, 1))));
    let once = at.clone();
    let make = move |step, lane, index| {
        if *once.borrow() == Some((lane, index)) && step == Step(1) {
            raise.raise(G.next());
        }
        (source.0)(step, lane, index)
    };
    let memory = Memory(Box::new(make), run.batch.lanes, run.batch.micro_batches);
    let mut engine = placed(Executor::new(&run, 1, fence.clone(), memory, NoCheckpoints), &run);
    let slices = SliceSet::all(SliceTable::new(&run.model).len());
    engine.run(Task::Init { slices: slices.clone(), part: Part::State }).unwrap();
    // Counting tokens makes all batches once; only then does the trap count.
    let trap = at.borrow_mut().take();
    engine.run(Task::Forward { generation: G, step: Step(1), micro: MicroId { lane: 0, index: 0 } }).unwrap();
    *at.borrow_mut() = trap;
    assert_eq!(compute(&mut engine, Step(1), 0..8).len(), 5);
    for node in [Node::root(8), Node { level: 2, index: 0 }, Node::leaf(4)] {
        let key = Key::Partial { step: Step(1), slice: SliceId(0), node };
        assert!(matches!(engine.get(key), Err(EngineError::Missing(k)) if k == key));
    }
    assert_eq!(engine.run(Task::Reduce { generation: G, step: Step(1), slice: SliceId(0) }).unwrap(), None);
    // The next generation does the step again, with the bits of one that was never stopped.
    *at.borrow_mut() = None;
    engine.run(Task::Place { units: 0..run.model.units(), recompute: false }).unwrap();
    let results = common::compute(&mut engine, G.next(), Step(1), (0..8, 2)).unwrap();
    assert_eq!(results.len(), 8);
    let (mut quiet, _) = whole(&run);
    compute(&mut quiet, Step(1), 0..8);
    for slice in slices.iter() {
        let key = Key::Partial { step: Step(1), slice, node: Node::root(8) };
        assert_eq!(engine.get(key).unwrap(), quiet.get(key).unwrap());
    }
}

#[test]
fn a_new_place_forgets_gradients_and_payloads_but_no_state() {
    let run = run_spec();
    let (mut engine, slices) = whole(&run);
    compute(&mut engine, Step(1), 0..8);
    reduce(&mut engine, Step(1), SliceId(0));
    let weights = Key::Weights { step: Step(1), slice: SliceId(0) };
    engine.put(weights, vec![0.0; engine_len(&run, SliceId(0))]).unwrap();
    engine.run(Task::Place { units: 0..run.model.units(), recompute: false }).unwrap();
    let apply = Task::Apply { step: Step(1), verdict: Verdict::Update { norm: 1.0 }, slices: slices.clone() };
    assert!(matches!(engine.run(apply), Err(EngineError::NotReduced { .. })));
    assert!(matches!(engine.run(Task::Install(weights)), Err(EngineError::Missing(_))));
    step_alone(&mut engine, Step(1), &slices, 8);
    let (mut quiet, _) = whole(&run);
    step_alone(&mut quiet, Step(1), &slices, 8);
    assert_eq!(engine.weights(Step(1)).unwrap(), quiet.weights(Step(1)).unwrap());
}

fn engine_len(run: &RunSpec, id: SliceId) -> usize {
    SliceTable::new(&run.model).get(id).unwrap().len()
}

#[test]
fn a_sum_of_the_next_step_may_come_before_this_one_is_applied() {
    let run = run_spec();
    let table = SliceTable::new(&run.model);
    let (mut ahead, slices) = whole(&run);
    step_alone(&mut ahead, Step(1), &slices, 8);
    compute(&mut ahead, Step(2), 4..8);

    let (mut behind, _) = whole(&run);
    compute(&mut behind, Step(1), 0..8);
    let square: f64 = slices.iter().flat_map(|s| reduce(&mut behind, Step(1), s)).sum();
    for (slice, _) in table.iter() {
        let key = Key::Partial { step: Step(2), slice, node: Node { level: 2, index: 1 } };
        behind.put(key, ahead.get(key).unwrap()).unwrap();
    }
    behind
        .run(Task::Apply {
            step: Step(1),
            verdict: Verdict::Update { norm: square.sqrt() },
            slices: slices.clone(),
        })
        .unwrap();
    compute(&mut behind, Step(2), 0..4);
    let norms: Vec<f64> = slices.iter().flat_map(|s| reduce(&mut behind, Step(2), s)).collect();

    let (mut alone, _) = whole(&run);
    step_alone(&mut alone, Step(1), &slices, 8);
    compute(&mut alone, Step(2), 0..8);
    assert_eq!(norms, slices.iter().flat_map(|s| reduce(&mut alone, Step(2), s)).collect::<Vec<_>>());
}

#[test]
fn state_moves_to_another_executor_and_goes_on_with_the_same_bits() {
    let run = run_spec();
    let (mut first, slices) = whole(&run);
    step_alone(&mut first, Step(1), &slices, 8);
    let mut second = engine(&run, 2);
    for slice in slices.iter() {
        let key = Key::State { step: Step(1), slice };
        second.put(key, first.get(key).unwrap()).unwrap();
        second.run(Task::Install(key)).unwrap();
    }
    step_alone(&mut first, Step(2), &slices, 8);
    step_alone(&mut second, Step(2), &slices, 8);
    assert_eq!(first.weights(Step(2)).unwrap(), second.weights(Step(2)).unwrap());
}

#[test]
fn what_is_not_here_is_named() {
    let run = run_spec();
    let (mut e, slices) = whole(&run);
    let (slice, n) = (SliceId(0), engine_len(&run, SliceId(0)));
    compute(&mut e, Step(1), 0..6);
    let error = e.run(Task::Reduce { generation: G, step: Step(1), slice }).unwrap_err().to_string();
    assert!(error.contains("the gradient of lanes 6..7 is missing"), "{error}");

    let partial = |node| Key::Partial { step: Step(1), slice, node };
    let long = e.put(partial(Node::leaf(6)), vec![0.0; n + 1]).unwrap_err().to_string();
    assert!(long.contains(&format!("{} values where {n} are needed", n + 1)), "{long}");
    let outside = e.put(partial(Node::leaf(8)), vec![0.0; n]);
    assert!(matches!(outside, Err(EngineError::UnknownNode { .. })));
    let high = e.put(partial(Node { level: 4, index: 0 }), vec![0.0; n]);
    assert!(matches!(high, Err(EngineError::UnknownNode { .. })));
    let unknown = Key::Weights { step: Step(1), slice: SliceId(9999) };
    assert!(matches!(e.put(unknown, vec![]), Err(EngineError::UnknownSlice(SliceId(9999), _))));
    assert!(matches!(e.get(unknown), Err(EngineError::UnknownSlice(..))));
    let state = e.put(Key::State { step: Step(0), slice }, vec![0.0; n]);
    assert!(matches!(state, Err(EngineError::Length { expected, .. }) if expected == 3 * n));

    let future = common::compute(&mut e, G, Step(3), (0..8, 2));
    assert!(matches!(future, Err(EngineError::WeightsAt { expected: Step(2), found: Some(Step(0)), .. })));
    let lanes = common::compute(&mut e, G, Step(1), (8..9, 2));
    assert!(matches!(lanes, Err(EngineError::Micro { lanes: 8, .. })));
    let (generation, step) = (G, Step(1));
    let back = e.run(Task::Backward { generation, step, micro: MicroId { lane: 0, index: 1 } });
    assert!(matches!(back, Err(EngineError::OutOfTurn { .. })));
    assert!(matches!(e.run(Task::Place { units: 1..5, recompute: false }), Err(EngineError::Units(1, 5, 4))));
    step_alone(&mut e, Step(1), &slices, 8);
    let again =
        e.run(Task::Apply { step: Step(1), verdict: Verdict::Update { norm: 1.0 }, slices: slices.clone() });
    assert!(matches!(again, Err(EngineError::NotReduced { .. })));
    e.run(Task::Drop(slices.clone())).unwrap();
    assert!(matches!(
        e.get(Key::State { step: Step(1), slice }),
        Err(EngineError::StateAt { found: None, .. })
    ));
    assert!(e.get(Key::Weights { step: Step(1), slice }).is_ok());
    assert!(matches!(e.get(Key::Weights { step: Step(0), slice }), Err(EngineError::WeightsAt { .. })));
}

#[test]
fn weights_of_another_step_end_the_training_state_under_them() {
    let run = run_spec();
    let (mut e, _) = whole(&run);
    let (slice, n) = (SliceId(0), engine_len(&run, SliceId(0)));
    let same = Key::Weights { step: Step(0), slice };
    e.put(same, vec![9.0; n]).unwrap();
    e.run(Task::Install(same)).unwrap();
    assert!(e.get(same).unwrap() != vec![9.0; n], "an owner's own weights are the truth");
    assert!(e.get(Key::State { step: Step(0), slice }).is_ok());
    let other = Key::Weights { step: Step(7), slice };
    e.put(other, vec![9.0; n]).unwrap();
    e.run(Task::Install(other)).unwrap();
    assert_eq!(e.get(other).unwrap(), vec![9.0; n]);
    assert!(matches!(e.get(Key::State { step: Step(0), slice }), Err(EngineError::StateAt { .. })));
}

#[test]
fn a_run_that_this_machine_cannot_compute_is_refused() {
    let refuse = |change: fn(&mut RunSpec)| {
        let mut run = run_spec();
        change(&mut run);
        match Executor::new(&run, 1, Default::default(), Memory::of(&run), NoCheckpoints) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("accepted"),
        }
    };
    let family = refuse(|run| run.numerics.family = "cuda-sm90".into());
    assert!(family.contains("\"cuda-sm90\"") && family.contains("portable"), "{family}");
    assert!(refuse(|run| run.batch.lanes = 6).contains("lanes 6 is no power of two"));
    assert!(refuse(|run| run.model.heads = 5).contains("dim 24 must be an even multiple of heads 5"));
    assert!(refuse(|run| run.model.kv_heads = 3).contains("heads 4 must be a multiple of kv_heads 3"));
    assert!(refuse(|run| run.model.layers = 0).contains("layers is 0"));
}

/// Checkpoints in memory; what `load` answers may be damaged.
#[derive(Clone, Default)]
struct Shelf(Rc<RefCell<BTreeMap<SliceId, Vec<f32>>>>);

impl Checkpoints for Shelf {
    fn save(&mut self, _: Generation, _: Step, states: Vec<(SliceId, Vec<f32>)>) -> Option<Done> {
        self.0.borrow_mut().extend(states);
        None
    }

    fn load(&mut self, step: Step, slices: &SliceSet) -> Result<Vec<(SliceId, Vec<f32>)>, String> {
        if step != Step(1) {
            return Err("there is none".into());
        }
        let shelf = self.0.borrow();
        Ok(slices.iter().filter_map(|id| Some((id, shelf.get(&id)?.clone()))).collect())
    }
}

#[test]
fn a_checkpoint_brings_back_the_state_and_a_damaged_one_is_refused() {
    let run = run_spec();
    let shelf = Shelf::default();
    let make = || placed(Executor::new(&run, 1, Default::default(), Memory::of(&run), shelf.clone()), &run);
    let (mut first, slices) = (make(), SliceSet::all(SliceTable::new(&run.model).len()));
    let (mut plain, _) = whole(&run);
    step_alone(&mut plain, Step(1), &slices, 8);
    for slice in slices.iter() {
        let key = Key::State { step: Step(1), slice };
        first.put(key, plain.get(key).unwrap()).unwrap();
        first.run(Task::Install(key)).unwrap();
    }
    let save = Task::Save { generation: G, step: Step(1), slices: slices.clone() };
    assert_eq!(first.run(save).unwrap(), None);
    let early = Task::Save { generation: G, step: Step(0), slices: slices.clone() };
    assert!(matches!(first.run(early), Err(EngineError::StateAt { .. })));

    let load = |step, part| Task::Load { generation: G, step, slices: slices.clone(), part };
    let mut second = make();
    let done = second.run(load(Step(1), Part::State)).unwrap();
    assert_eq!(done, Some(Done::Loaded { generation: G, slices: slices.clone(), part: Part::State }));
    for slice in slices.iter() {
        let key = Key::State { step: Step(1), slice };
        assert_eq!(second.get(key).unwrap(), first.get(key).unwrap());
    }
    let mut third = make();
    third.run(load(Step(1), Part::Weights)).unwrap();
    assert_eq!(third.weights(Step(1)).unwrap(), first.weights(Step(1)).unwrap());
    assert!(third.get(Key::State { step: Step(1), slice: SliceId(0) }).is_err());

    let failure = |executor: &mut Executor<_, _>, step| match executor.run(load(step, Part::State)) {
        Ok(Some(Done::LoadFailed { generation: G, step: of, reason })) if of == step => reason,
        done => panic!("{done:?}"),
    };
    assert_eq!(failure(&mut make(), Step(2)), "there is none");
    let whole = shelf.0.borrow().clone();
    shelf.0.borrow_mut().get_mut(&SliceId(0)).unwrap().pop();
    let mut fourth = make();
    assert!(failure(&mut fourth, Step(1)).contains("slice s0 has"));
    shelf.0.borrow_mut().remove(&SliceId(0));
    assert!(failure(&mut fourth, Step(1)).contains("slice s0 is not in it"));
    *shelf.0.borrow_mut() = whole;
    fourth.run(load(Step(1), Part::State)).unwrap();
    assert_eq!(fourth.weights(Step(1)).unwrap(), first.weights(Step(1)).unwrap());
}

#[test]
fn a_step_in_which_nothing_counts_has_no_loss_and_no_gradient() {
    let run = run_spec();
    let mut source = Memory::of(&run);
    let make = move |step, lane, index| {
        let mut batch = (source.0)(step, lane, index);
        batch.counted.fill(false);
        batch
    };
    let memory = Memory(Box::new(make), 8, 2);
    let mut e = placed(Executor::new(&run, 1, Default::default(), memory, NoCheckpoints), &run);
    let slices = SliceSet::all(SliceTable::new(&run.model).len());
    e.run(Task::Init { slices: slices.clone(), part: Part::State }).unwrap();
    let results = compute(&mut e, Step(1), 0..8);
    assert!(results.iter().all(|lane| lane.loss == 0.0 && lane.tokens == 0));
    for slice in slices.iter() {
        let done = e.run(Task::Reduce { generation: G, step: Step(1), slice }).unwrap();
        let Some(Done::Reduced { norms, .. }) = done else { panic!("{done:?}") };
        assert!(norms.iter().all(|norm| *norm == 0.0));
    }
}
