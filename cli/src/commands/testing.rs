//! A tiny run on disk, for the tests of the subcommands: real text, really prepared, and a
//! checkpoint of weights that were never trained.

use crate::run_dir::RunDir;
use caravan_checkpoint::{complete, write_part};
use caravan_data::{Request, prepare};
use caravan_types::{
    BatchShape, Generation, ModelShape, NumericsClass, Precision, Recipe, RunSpec, SliceId, SliceTable, Step,
    WorkerId,
};
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

/// The folder in which everything lies, and the run in it.
pub struct Tiny {
    pub dir: TempDir,
    pub run: RunDir,
}

impl Tiny {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let texts = dir.path().join("texts");
        fs::create_dir(&texts).unwrap();
        for n in 0..20 {
            let lines: String = (0..20).map(|i| format!("line {i} of text {n}: {}\n", i * n + i)).collect();
            fs::write(texts.join(format!("{n}.txt")), lines).unwrap();
        }
        let request = Request { paths: vec![texts], extensions: None, vocab_size: 300, tokenizer: None };
        let prepared = prepare(&request, &dir.path().join("data"), &()).unwrap();
        let small = ModelShape::preset("260k").unwrap();
        let model = ModelShape { dim: 32, layers: 1, hidden: 64, vocab: 300, context: 32, ..small };
        let spec = RunSpec {
            version: caravan_types::run_spec::RUN_SPEC_VERSION,
            name: "tiny".into(),
            model,
            data: prepared.spec,
            batch: BatchShape { lanes: 2, micro_batches: 1, sequences: 2, sequence_length: 32 },
            recipe: Recipe { steps: 10, ..Recipe::default() },
            init: caravan_types::Initial::Seed,
            seed: 1,
            numerics: NumericsClass { precision: Precision::Fp32, family: "portable".into() },
        };
        let run = RunDir::start(&dir.path().join("run"), &spec, &prepared.dir).unwrap();
        Self { dir, run }
    }

    /// Writes a checkpoint; its folder.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.checkpoint_of(step, |_, i| ((i * 7919 + step as usize) % 1000) as f32 / 5000.0 - 0.1)
    }

    /// Writes a checkpoint whose slices have these numbers, by slice and element of it.
    pub fn checkpoint_of(&self, step: u64, value: impl Fn(SliceId, usize) -> f32) -> PathBuf {
        self.write(step, value, true)
    }

    /// Writes a checkpoint as a run on ready tokens does.
    pub fn checkpoint_without_tokenizer(&self, step: u64) -> PathBuf {
        self.write(step, |_, i| (i % 1000) as f32 / 5000.0 - 0.1, false)
    }

    fn write(&self, step: u64, value: impl Fn(SliceId, usize) -> f32, with_tokenizer: bool) -> PathBuf {
        let (root, spec) = (self.run.checkpoints(), self.run.spec());
        let state = |id, len: usize| (0..3 * len).map(|i| value(id, i)).collect();
        let states: Vec<_> =
            SliceTable::new(&spec.model).iter().map(|(id, slice)| (id, state(id, slice.len()))).collect();
        let part = write_part(&root, Generation(1), Step(step), WorkerId(1), &states).unwrap();
        let tokenizer = with_tokenizer.then(|| self.run.data().unwrap().join("tokenizer.json"));
        complete(&root, Generation(1), Step(step), spec, &[part], tokenizer.as_deref()).unwrap();
        root.join(format!("step-{step:08}"))
    }
}
