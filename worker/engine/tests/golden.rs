//! Ten steps against PyTorch's, from `tests/golden/make.py`: losses, gradients, clipping,
//! schedule, AdamW, and the names and layouts of all tensors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

mod common;

use caravan_engine::{Executor, Model};
use caravan_kernels::adamw::{Update, adamw};
use caravan_kernels::{Cpu, Family};
use caravan_types::peer::Key;
use caravan_types::task::{Done, Task};
use caravan_types::{
    BatchShape, Generation, MicroBatch, ModelShape, Part, Recipe, SliceSet, SliceTable, Step, Verdict,
};
use common::{Memory, NoCheckpoints, compute, spec};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::PathBuf;

struct Golden {
    shape: ModelShape,
    recipe: Recipe,
    batches: Vec<MicroBatch>,
    losses: Vec<f64>,
    norms: Vec<f64>,
    tensors: Vec<u8>,
}

fn list<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Vec<T> {
    value.as_array().unwrap().iter().map(|v| read(v).unwrap()).collect()
}

impl Golden {
    fn read() -> Self {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden"));
        let json: Value =
            serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
        let size = |name: &str| json[name].as_u64().unwrap() as usize;
        let (sequences, length) = (size("sequences"), size("length"));
        let steps = json["steps"].as_array().unwrap();
        let number = |v: &Value| v.as_u64().map(|v| v as u32);
        let batch = |step: &Value| MicroBatch {
            sequences,
            length,
            tokens: list(&step["tokens"], number),
            targets: list(&step["targets"], number),
            counted: list(&step["counted"], Value::as_bool),
            document_start: list(&step["document_start"], number),
        };
        Self {
            shape: serde_json::from_value(json["shape"].clone()).unwrap(),
            recipe: serde_json::from_value(json["recipe"].clone()).unwrap(),
            batches: steps.iter().map(batch).collect(),
            losses: steps.iter().map(|s| s["loss"].as_f64().unwrap()).collect(),
            norms: steps.iter().map(|s| s["norm"].as_f64().unwrap()).collect(),
            tensors: std::fs::read(folder.join("golden.safetensors")).unwrap(),
        }
    }

    /// All tensors of one kind as a flat model.
    fn flat(&self, kind: &str) -> Vec<f64> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let mut flat = Vec::new();
        for p in self.shape.all_parameters() {
            let tensor = tensors.tensor(&format!("{kind}.{}", p.name)).unwrap();
            let shape = if p.vector { vec![p.cols as usize] } else { vec![p.rows as usize, p.cols as usize] };
            assert_eq!(tensor.shape(), shape, "{}", p.name);
            let values = tensor.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b));
            flat.extend(values);
        }
        flat
    }
}

/// |a − b| / |b| over a whole vector.
fn distance(a: impl IntoIterator<Item = f64>, b: &[f64]) -> f64 {
    let squares = a.into_iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
    (squares / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

#[test]
fn in_f64_the_model_is_pytorchs() {
    let golden = Golden::read();
    for family in Family::available() {
        let cpu = Cpu::new(2, family).unwrap();
        let mut model = Model::<f64>::new(&golden.shape).unwrap();
        let mut w = golden.flat("before");
        let (mut m, mut v) = (vec![0.0; w.len()], vec![0.0; w.len()]);
        for (i, batch) in golden.batches.iter().enumerate() {
            let counted = batch.counted.iter().filter(|c| **c).count() as f64;
            let mut g = vec![0.0; w.len()];
            let loss = model.gradient(&cpu, &w, &mut g, batch, 1.0 / counted, &|_| false).unwrap().unwrap();
            assert!((loss - golden.losses[i]).abs() < 1e-10 * loss, "step {}: {loss}", i + 1);
            if i == 0 {
                let expected = golden.flat("gradient");
                for p in golden.shape.all_parameters() {
                    let part = p.offset as usize..p.range().end as usize;
                    let d = distance(g[part.clone()].iter().copied(), &expected[part]);
                    assert!(d < 1e-10, "{}: {d}", p.name);
                }
            }
            let norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
            assert!((norm - golden.norms[i]).abs() < 1e-10 * norm, "step {}: norm {norm}", i + 1);
            let r = &golden.recipe;
            for p in golden.shape.all_parameters() {
                let part = p.offset as usize..p.range().end as usize;
                let update = Update {
                    step: i as u64 + 1,
                    learning_rate: r.learning_rate_at(Step(i as u64 + 1)),
                    beta1: r.beta1,
                    beta2: r.beta2,
                    epsilon: r.epsilon,
                    weight_decay: if p.decayed() { r.weight_decay } else { 0.0 },
                    scale: r.clip_scale(norm),
                };
                let (m, v) = (&mut m[part.clone()], &mut v[part.clone()]);
                adamw(&cpu, &update, &g[part.clone()], &mut w[part], m, v);
            }
        }
        let d = distance(w, &golden.flat("after"));
        assert!(d < 1e-10, "{family}: {d}");
    }
}

#[test]
fn in_f32_an_executor_trains_as_pytorch_does() {
    let golden = Golden::read();
    let before = golden.flat("before");
    for family in Family::available() {
        let mut run = spec(&golden.shape, family.name());
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
        engine.run(Task::Place { units: 0..golden.shape.units() }).unwrap();
        engine.run(Task::Init { slices: slices.clone(), part: Part::State }).unwrap();
        for (id, slice) in table.iter() {
            let part = &before[slice.range.start as usize..slice.range.end as usize];
            let mut state: Vec<f32> = part.iter().map(|w| *w as f32).collect();
            state.resize(3 * slice.len(), 0.0);
            let key = Key::State { step: Step(0), slice: id };
            engine.put(key, state).unwrap();
            engine.run(Task::Install(key)).unwrap();
        }
        for step in (1..=golden.losses.len() as u64).map(Step) {
            let (generation, i) = (Generation(1), step.0 as usize - 1);
            let loss = compute(&mut engine, generation, step, (0..1, 1)).unwrap()[0].loss;
            assert!((loss - golden.losses[i]).abs() < 1e-5 * loss, "{family}, step {step}: {loss}");
            let mut square = 0.0;
            for slice in slices.iter() {
                let done = engine.run(Task::Reduce { generation, step, slice }).unwrap();
                let Some(Done::Reduced { norms, .. }) = done else { panic!("{done:?}") };
                square += norms.iter().sum::<f64>();
            }
            let norm = square.sqrt();
            assert!((norm - golden.norms[i]).abs() < 1e-5 * norm, "{family}, step {step}: norm {norm}");
            engine
                .run(Task::Apply { step, verdict: Verdict::Update { norm }, slices: slices.clone() })
                .unwrap();
        }
        let weights = engine.weights(Step(golden.losses.len() as u64)).unwrap();
        let d = distance(weights.iter().map(|w| f64::from(*w)), &golden.flat("after"));
        assert!(d < 1e-5, "{family}: {d}");
    }
}
