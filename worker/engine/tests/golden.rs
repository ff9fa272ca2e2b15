//! Ten steps against Hugging Face's `LlamaForCausalLM` and PyTorch's AdamW in float64, from
//! `tests/golden/make.py`: logits, losses, every gradient, clipping, schedule, AdamW, and the
//! names and layouts of all tensors; each case in each precision on each instruction family.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

mod common;

use caravan_engine::{Executor, Model};
use caravan_kernels::adamw::{Trained, Update, adamw};
use caravan_kernels::{Bf16, Cpu, Element, Family};
use caravan_types::peer::Key;
use caravan_types::task::{Done, Task};
use caravan_types::{
    BatchShape, Generation, MicroBatch, ModelShape, NumericsClass, Part, Precision, Recipe, SliceSet,
    SliceTable, Step, Verdict,
};
use common::{Memory, NoCheckpoints, Numbers, batch, compute, spec};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;

const CASES: [&str; 6] = [
    "small",
    "heads8_kv8_size16",
    "heads8_kv2_size16",
    "heads8_kv1_size32",
    "heads4_kv2_size64",
    "heads2_kv1_size128",
];

/// A precision in which the engine is held against the reference, and how far it may be off:
/// another one is another row.
struct Row {
    name: &'static str,
    /// ‖ours − reference‖ / ‖reference‖ of the logits and of each tensor's gradient.
    tensor: f64,
    /// Of the losses and the norms of the ten steps, relative.
    loss: f64,
    /// ‖ours − reference‖ / ‖reference‖ of each tensor after the ten steps.
    after: f64,
    train: fn(&Golden, Family) -> Outcome,
}

const ROWS: [Row; 3] = [
    Row { name: "fp64", tensor: 1e-12, loss: 1e-12, after: 1e-12, train: by_hand },
    Row {
        name: "fp32",
        tensor: 1e-5,
        loss: 1e-5,
        after: 1e-5,
        train: |golden, family| trained::<f32>(golden, family, Precision::Fp32),
    },
    Row {
        name: "mixed",
        tensor: 1e-2,
        loss: 5e-3,
        after: 1e-2,
        train: |golden, family| trained::<Bf16>(golden, family, Precision::Mixed),
    },
];

/// What came of the ten steps.
struct Outcome {
    /// Of the first step.
    logits: Vec<f64>,
    /// Of the first step, flat.
    gradient: Vec<f64>,
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// Weights after the last step, flat.
    after: Vec<f64>,
}

struct Golden {
    shape: ModelShape,
    recipe: Recipe,
    seed: u64,
    /// Tensors with more elements are there as sketches of `sketch` numbers.
    raw: usize,
    sketch: usize,
    batches: Vec<MicroBatch>,
    losses: Vec<f64>,
    norms: Vec<f64>,
    tensors: Vec<u8>,
}

impl Golden {
    fn read(name: &str) -> Self {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden"));
        let json = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
        let json: Value = serde_json::from_str(&json).unwrap();
        let number = |name: &str| json[name].as_u64().unwrap();
        let steps = json["steps"].as_array().unwrap();
        let of_steps = |name: &str| steps.iter().map(|s| s[name].as_f64().unwrap()).collect();
        let shape: ModelShape = serde_json::from_value(json["shape"].clone()).unwrap();
        let (sequences, length) = (number("sequences") as usize, number("length") as usize);
        let seeds = (1..=steps.len() as u64).map(|step| number("seed") + step);
        Self {
            recipe: serde_json::from_value(json["recipe"].clone()).unwrap(),
            seed: number("seed"),
            raw: number("raw") as usize,
            sketch: number("sketch") as usize,
            batches: seeds.map(|seed| batch(&shape, sequences, length, seed)).collect(),
            losses: of_steps("loss"),
            norms: of_steps("norm"),
            tensors: std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap(),
            shape,
        }
    }

    /// Weights at step 0, as the script makes them.
    fn before(&self) -> Vec<f64> {
        let mut numbers = Numbers(self.seed);
        let mut flat = Vec::new();
        for p in self.shape.all_parameters() {
            let doubled = p.name.contains("q_proj") || p.name.contains("k_proj");
            let halvings = if p.name.contains("embed") { 0 } else { p.cols.ilog2().div_ceil(2) };
            let scale = f64::from(u8::from(doubled) + 1) / f64::from(1 << halvings);
            flat.extend((0..p.len()).map(|_| match numbers.next() {
                bits if p.vector => 1.0 + ((bits >> 58) as f64 - 32.0) / 128.0,
                bits => ((bits >> 56) as f64 - 128.0) / 128.0 * scale,
            }));
        }
        flat
    }

    /// A tensor as the script keeps it: as it is, or its sketch.
    fn kept(&self, tensor: &[f64]) -> Vec<f64> {
        if tensor.len() <= self.raw {
            return tensor.to_vec();
        }
        let (mut numbers, mut sketch) = (Numbers(self.seed), vec![0.0; self.sketch]);
        for (i, value) in tensor.iter().enumerate() {
            sketch[i % self.sketch] += if numbers.next() >> 63 == 0 { *value } else { -value };
        }
        sketch
    }

    /// ‖ours − reference‖ / ‖reference‖ of a tensor of this shape, or its estimate by sketches.
    fn distance(&self, name: &str, shape: &[usize], ours: &[f64]) -> f64 {
        assert_eq!(ours.len(), shape.iter().product::<usize>(), "{name}");
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let reference = tensors.tensor(name).unwrap();
        let sketched = ours.len() > self.raw;
        let shape = if sketched { &[self.sketch] } else { shape };
        assert_eq!(reference.shape(), shape, "{name}");
        let reference = reference.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b));
        let (mut error, mut size) = (0.0, 0.0);
        for (ours, reference) in self.kept(ours).iter().zip(reference) {
            error += (ours - reference).powi(2);
            size += reference.powi(2);
        }
        (error / size).sqrt()
    }

    /// The tensor of this kind that is furthest off, of a flat model, and how far.
    fn worst(&self, kind: &str, flat: &[f64]) -> (String, f64) {
        let parameters = self.shape.all_parameters();
        assert_eq!(flat.len() as u64, self.shape.parameters());
        let distances = parameters.iter().map(|p| {
            let rows = if p.vector { vec![] } else { vec![p.rows as usize] };
            let shape = [rows, vec![p.cols as usize]].concat();
            let part = &flat[p.offset as usize..p.range().end as usize];
            (p.name.clone(), self.distance(&format!("{kind}.{}", p.name), &shape, part))
        });
        distances.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap()
    }
}

fn wide(narrow: &[f32]) -> Vec<f64> {
    narrow.iter().map(|x| f64::from(*x)).collect()
}

/// The model in the type in which it can be compared closely, and kernels one by one.
fn by_hand(golden: &Golden, family: Family) -> Outcome {
    let cpu = Cpu::new(2, family).unwrap();
    let mut model = Model::<f64>::new(&golden.shape).unwrap();
    let mut w = golden.before();
    let logits = model.logits(&cpu, &w, &golden.batches[0]).unwrap();
    let (mut m, mut v) = (vec![0.0; w.len()], vec![0.0; w.len()]);
    let (mut gradient, mut losses, mut norms) = (Vec::new(), Vec::new(), Vec::new());
    for (step, batch) in (1..).zip(&golden.batches) {
        let counted = batch.counted.iter().filter(|c| **c).count() as f64;
        let mut g = vec![0.0; w.len()];
        let loss = model.gradient(&cpu, &w, &mut g, batch, 1.0 / counted, &|_| false);
        losses.push(loss.unwrap().unwrap());
        let norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
        norms.push(norm);
        let r = &golden.recipe;
        for p in golden.shape.all_parameters() {
            let part = p.offset as usize..p.range().end as usize;
            let update = Update {
                step,
                learning_rate: r.learning_rate_at(Step(step)),
                beta1: r.beta1,
                beta2: r.beta2,
                epsilon: r.epsilon,
                weight_decay: if p.decayed() { r.weight_decay } else { 0.0 },
                scale: r.clip_scale(norm),
            };
            let (m, v) = (&mut m[part.clone()], &mut v[part.clone()]);
            let trained = Trained { weights: &mut w[part.clone()], master: &mut [], m, v };
            adamw(&cpu, &[(0..part.len(), update)], &g[part], trained);
        }
        if step == 1 {
            gradient = g;
        }
    }
    Outcome { logits, gradient, losses, norms, after: w }
}

/// An executor of a run in this precision, and the model on its elements.
fn trained<E: Element<Sum = f32>>(golden: &Golden, family: Family, precision: Precision) -> Outcome {
    let before: Vec<f32> = golden.before().iter().map(|w| *w as f32).collect();
    let narrow: Vec<E> = before.iter().map(|w| E::narrow(*w)).collect();
    let cpu = Cpu::new(2, family).unwrap();
    let mut model = Model::<E>::new(&golden.shape).unwrap();
    let first = &golden.batches[0];
    let logits = wide(&model.logits(&cpu, &narrow, first).unwrap());
    let counted = first.counted.iter().filter(|c| **c).count() as f64;
    let mut gradient = vec![0.0; before.len()];
    model.gradient(&cpu, &narrow, &mut gradient, first, 1.0 / counted, &|_| false).unwrap();

    let mut engine = executor(golden, NumericsClass { precision, family: family.name().into() }, &before);
    let table = SliceTable::new(&golden.shape);
    let slices = SliceSet::all(table.len());
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for step in (1..=golden.losses.len() as u64).map(Step) {
        let generation = Generation(1);
        losses.push(compute(&mut engine, generation, step, (0..1, 1)).unwrap()[0].loss);
        let mut square = 0.0;
        for slice in slices.iter() {
            let done = engine.run(Task::Reduce { generation, step, slice }).unwrap();
            let Some(Done::Reduced { norms, .. }) = done else { panic!("{done:?}") };
            square += norms.iter().sum::<f64>();
        }
        let norm = square.sqrt();
        norms.push(norm);
        engine.run(Task::Apply { step, verdict: Verdict::Update { norm }, slices: slices.clone() }).unwrap();
    }
    let after = wide(&engine.weights(Step(golden.losses.len() as u64)).unwrap());
    Outcome { logits, gradient: wide(&gradient), losses, norms, after }
}

/// An executor with these weights, one lane, and the batches of the reference.
fn executor(golden: &Golden, numerics: NumericsClass, before: &[f32]) -> Executor<Memory, NoCheckpoints> {
    let mut run = spec(&golden.shape, &numerics.family);
    run.numerics = numerics;
    let (sequences, length) = (golden.batches[0].sequences, golden.batches[0].length);
    run.batch = BatchShape {
        lanes: 1,
        micro_batches: 1,
        sequences: sequences as u32,
        sequence_length: length as u32,
    };
    run.recipe = golden.recipe.clone();
    let batches = golden.batches.clone();
    let source = Memory(Box::new(move |step, _, _| batches[step.0 as usize - 1].clone()), 1, 1);
    let mut engine = Executor::new(&run, 2, Default::default(), source, NoCheckpoints).unwrap();
    let table = SliceTable::new(&golden.shape);
    let slices = SliceSet::all(table.len());
    engine.run(Task::Place { units: 0..golden.shape.units(), recompute: false }).unwrap();
    engine.run(Task::Init { slices, part: Part::State }).unwrap();
    for (id, slice) in table.iter() {
        let mut state = before[slice.range.start as usize..slice.range.end as usize].to_vec();
        state.resize(3 * slice.len(), 0.0);
        let key = Key::State { step: Step(0), slice: id };
        engine.put(key, state).unwrap();
        engine.run(Task::Install(key)).unwrap();
    }
    engine
}

#[test]
fn the_model_and_its_training_are_those_of_transformers_and_pytorch() {
    for name in CASES {
        let golden = Golden::read(name);
        for Row { name: precision, tensor, loss, after, train } in ROWS {
            for family in Family::available() {
                let out = train(&golden, family);
                let at = format!("{name} in {precision}/{family}");
                let shape = [&golden.batches[0].sequences, &golden.batches[0].length];
                let shape = [*shape[0], *shape[1], golden.shape.vocab as usize];
                let d = golden.distance("logits", &shape, &out.logits);
                assert!(d <= tensor, "{at}: the logits are {d:e} off");
                let (worst, d) = golden.worst("gradient", &out.gradient);
                assert!(d <= tensor, "{at}: the gradient of {worst} is {d:e} off");
                for (what, ours, theirs) in
                    [("loss", &out.losses, &golden.losses), ("norm", &out.norms, &golden.norms)]
                {
                    assert_eq!((ours.len(), theirs.len()), (10, 10));
                    for (step, (ours, theirs)) in (1..).zip(ours.iter().zip(theirs)) {
                        let d = (ours - theirs).abs() / theirs;
                        assert!(d <= loss, "{at}: the {what} of step {step} is {d:e} off");
                    }
                }
                let (worst, d) = golden.worst("after", &out.after);
                assert!(d <= after, "{at}: after ten steps, {worst} is {d:e} off");
            }
        }
    }
}

#[test]
fn the_cases_have_what_implementations_get_wrong() {
    let shapes: Vec<Golden> = CASES.iter().map(|name| Golden::read(name)).collect();
    let of = |f: fn(&Golden) -> u32| shapes.iter().map(f).collect::<BTreeSet<u32>>();
    assert_eq!(of(|g| g.shape.kv_heads), [1, 2, 8].into());
    assert_eq!(of(|g| g.shape.head_dim()), [16, 32, 64, 128].into());
    assert_eq!(of(|g| g.batches[0].length as u32), [17, 33, 65, 127].into());
    assert!(shapes.iter().all(|g| g.batches[0].sequences % 2 == 1 && g.shape.vocab % 2 == 1));
    let documents = |b: &MicroBatch| b.document_start.iter().any(|start| *start > 0);
    let masked = |b: &MicroBatch| b.counted.iter().any(|counted| !counted);
    assert!(shapes.iter().flat_map(|g| &g.batches).all(|b| documents(b) && masked(b)));
}

#[test]
fn a_sketch_sees_one_wrong_element_and_estimates_a_difference_everywhere() {
    let golden = Golden::read(CASES[1]);
    let zero = vec![0.0; 100_000];
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut one = zero.clone();
    one[77_777] = 3.0;
    assert_eq!(norm(&golden.kept(&one)), 3.0);
    let mut numbers = Numbers(9);
    let many: Vec<f64> = zero.iter().map(|_| numbers.below(1000) as f64 - 499.5).collect();
    let ratio = norm(&golden.kept(&many)) / norm(&many);
    assert!((0.8..1.2).contains(&ratio), "{ratio}");
}
