//! A tiny model and batches for it, made of arithmetic.

// Each test file uses a part of this.
#![allow(dead_code)]
#![allow(clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use caravan_engine::{Batches, Checkpoints, EngineError, Executor, init};
use caravan_kernels::Real;
use caravan_types::peer::LaneResult;
use caravan_types::task::{Done, Task};
use caravan_types::{
    BatchShape, DataSpec, Digest, Generation, Lane, MicroBatch, MicroId, ModelShape, NumericsClass, Part,
    Precision, Recipe, RunSpec, SliceId, SliceSet, SliceTable, Step, Verdict,
};
use std::ops::Range;

/// Grouped-query attention, two layers, and sizes that are no multiples of any vector.
pub fn tiny() -> ModelShape {
    ModelShape {
        dim: 24,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        hidden: 20,
        vocab: 37,
        context: 128,
        norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: None,
    }
}

/// A small deterministic stream of numbers (SplitMix64).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Sequences of a few documents each, of which some targets do not count.
pub fn batch(shape: &ModelShape, sequences: usize, length: usize, seed: u64) -> MicroBatch {
    let mut numbers = Numbers(seed);
    let mut b = MicroBatch { sequences, length, ..MicroBatch::default() };
    for _ in 0..sequences {
        let mut start = 0;
        for position in 0..length as u32 {
            if numbers.below(9) == 0 {
                start = position;
            }
            b.document_start.push(start);
            b.tokens.push(numbers.below(u64::from(shape.vocab)) as u32);
            b.targets.push(numbers.below(u64::from(shape.vocab)) as u32);
            b.counted.push(numbers.below(4) != 0);
        }
    }
    b
}

/// Initial weights; large, so that no gradient is lost in noise, and gains that are not 1.
pub fn weights<R: Real>(shape: &ModelShape, seed: u64) -> Vec<R> {
    let mut w = vec![0.0; shape.parameters() as usize];
    init::fill(shape, seed, 0..shape.parameters(), &mut w);
    let mut numbers = Numbers(seed);
    for p in shape.all_parameters() {
        for w in &mut w[p.offset as usize..p.range().end as usize] {
            *w = if p.vector { 0.5 + numbers.below(1000) as f32 * 1e-3 } else { *w * 10.0 };
        }
    }
    w.into_iter().map(|w| R::from_f64(f64::from(w))).collect()
}

/// A run of that model on 8 lanes of two micro-batches.
pub fn spec(shape: &ModelShape, family: &str) -> RunSpec {
    RunSpec {
        version: caravan_types::run_spec::RUN_SPEC_VERSION,
        name: "test".into(),
        model: shape.clone(),
        data: DataSpec { digest: Digest::default(), tokens: 0 },
        batch: BatchShape { lanes: 8, micro_batches: 2, sequences: 2, sequence_length: 7 },
        recipe: Recipe { steps: 10, warmup_steps: 2, learning_rate: 0.01, ..Recipe::default() },
        init: caravan_types::Initial::Seed,
        seed: 11,
        numerics: NumericsClass { precision: Precision::Fp32, family: family.into() },
    }
}

/// Computes lanes on one executor that holds the whole model, micro-batch by micro-batch; what
/// came of each lane, or none where it was given up.
pub fn compute<B: Batches, C: Checkpoints>(
    engine: &mut Executor<B, C>,
    generation: Generation,
    step: Step,
    (lanes, micro_batches): (Range<Lane>, u32),
) -> Result<Vec<LaneResult>, EngineError> {
    let mut results = Vec::new();
    for lane in lanes {
        for index in 0..micro_batches {
            let micro = MicroId { lane, index };
            engine.run(Task::Forward { generation, step, micro })?;
            match engine.run(Task::Backward { generation, step, micro })? {
                Some(Done::Lane { result, .. }) => results.push(result),
                other => assert_eq!(other, None),
            }
        }
    }
    Ok(results)
}

/// Has an executor hold the whole model, as it is before the first step.
pub fn begin<B: Batches, C: Checkpoints>(engine: &mut Executor<B, C>, model: &ModelShape) {
    let slices = SliceSet::all(SliceTable::new(model).len());
    engine.run(Task::Place { units: 0..model.units(), recompute: false }).expect("place");
    engine.run(Task::Init { slices, part: Part::State }).expect("init");
}

/// A whole step on an executor that holds the whole model.
pub fn train_step<B: Batches, C: Checkpoints>(engine: &mut Executor<B, C>, run: &RunSpec, step: Step) {
    let generation = Generation(1);
    compute(engine, generation, step, (0..run.batch.lanes, run.batch.micro_batches)).expect("compute");
    let slices = SliceSet::all(SliceTable::new(&run.model).len());
    let mut norm = 0.0;
    for slice in slices.iter() {
        let done = engine.run(Task::Reduce { generation, step, slice }).expect("reduce");
        let Some(Done::Reduced { norms, .. }) = done else { panic!("{done:?}") };
        norm += norms.iter().sum::<f64>();
    }
    let verdict = Verdict::Update { norm: norm.sqrt() };
    engine.run(Task::Apply { step, verdict, slices }).expect("apply");
}

/// What makes a micro-batch of (step, lane, index).
type Make = Box<dyn FnMut(Step, Lane, u32) -> MicroBatch>;

/// Batches from a function; then lanes and micro-batches per lane.
pub struct Memory(pub Make, pub u32, pub u32);

impl Memory {
    /// Those of [`spec`], by [`batch`].
    pub fn of(spec: &RunSpec) -> Self {
        let (shape, b) = (spec.model.clone(), spec.batch);
        let make = move |step: Step, lane: Lane, index: u32| {
            let seed = step.0 << 32 | u64::from(lane) << 8 | u64::from(index);
            batch(&shape, b.sequences as usize, b.sequence_length as usize, seed)
        };
        Self(Box::new(make), b.lanes, b.micro_batches)
    }
}

impl Batches for Memory {
    fn micro_batch(&mut self, step: Step, lane: Lane, index: u32) -> Result<MicroBatch, String> {
        Ok((self.0)(step, lane, index))
    }

    fn counted_tokens(&mut self, step: Step) -> Result<u64, String> {
        let (lanes, micro_batches) = (self.1, self.2);
        let all = (0..lanes).flat_map(|lane| (0..micro_batches).map(move |index| (lane, index)));
        let counted = |b: MicroBatch| b.counted.iter().filter(|c| **c).count() as u64;
        Ok(all.map(|(lane, index)| counted((self.0)(step, lane, index))).sum())
    }
}

/// For runs that save nothing.
pub struct NoCheckpoints;

impl Checkpoints for NoCheckpoints {
    fn save(&mut self, _: Generation, _: Step, _: Vec<(SliceId, Vec<f32>)>) -> Option<Done> {
        None
    }

    fn load(&mut self, _: Step, _: &SliceSet) -> Result<Vec<(SliceId, Vec<f32>)>, String> {
        Err("there are no checkpoints".into())
    }
}
