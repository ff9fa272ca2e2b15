//! Tokens per second of whole training steps: compute, reduce, apply, on one device.
//!
//! usage: bench PRESET [--precision fp32|mixed] [--recompute] [--batch SEQUENCES] [--length TOKENS]
//!              [--threads N] [--steps N] [--family NAME]
//!
//! Memory is the most that the process had so far, where the system tells, next to what was
//! predicted of it. FLOPs are those of the model: what is recomputed is not counted.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use caravan_engine::{Batches, Checkpoints, Executor, Watch};
use caravan_types::cost::Memory;
use caravan_types::task::{Done, Task};
use caravan_types::{
    BatchShape, DataSpec, Digest, Generation, Lane, MicroBatch, MicroId, ModelShape, NumericsClass, Part,
    Precision, Recipe, RunSpec, SliceId, SliceSet, SliceTable, Step, Verdict,
};
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

/// Random tokens, one document a sequence, everything counted.
struct Random {
    sequences: usize,
    length: usize,
    vocab: u32,
}

impl Batches for Random {
    fn micro_batch(&mut self, step: Step, _: Lane, _: u32) -> Result<MicroBatch, String> {
        let n = self.sequences * self.length;
        let token = |i: usize| (i as u64 + step.0).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        let tokens: Vec<u32> = (0..=n).map(|i| (token(i) % u64::from(self.vocab)) as u32).collect();
        Ok(MicroBatch {
            sequences: self.sequences,
            length: self.length,
            targets: tokens[1..].to_vec(),
            tokens: tokens[..n].to_vec(),
            counted: vec![true; n],
            document_start: vec![0; n],
        })
    }

    fn counted_tokens(&mut self, _: Step) -> Result<u64, String> {
        Ok((self.sequences * self.length) as u64)
    }
}

/// Nothing is saved here.
struct Nowhere;

impl Checkpoints for Nowhere {
    fn save(&mut self, _: Generation, _: Step, _: Vec<(SliceId, Vec<f32>)>) -> Option<Done> {
        None
    }

    fn load(&mut self, _: Step, _: &SliceSet) -> Result<Vec<(SliceId, Vec<f32>)>, String> {
        Err("a benchmark has no checkpoints".into())
    }
}

const ONE: Generation = Generation(1);
const MICRO: MicroId = MicroId { lane: 0, index: 0 };

fn option(name: &str) -> Option<String> {
    let mut args = std::env::args().skip_while(|a| a != name);
    args.nth(1)
}

fn preset() -> Result<(String, ModelShape), String> {
    let preset = std::env::args().nth(1).unwrap_or_else(|| "15m".into());
    let model = ModelShape::preset(&preset).ok_or_else(|| format!("no preset {preset:?}"))?;
    Ok((preset, model))
}

fn precision() -> Result<Precision, String> {
    match option("--precision").as_deref() {
        None | Some("fp32") => Ok(Precision::Fp32),
        Some("mixed") => Ok(Precision::Mixed),
        Some(other) => Err(format!("no precision {other:?}")),
    }
}

fn spec(model: &ModelShape, precision: Precision, family: &str, [sequences, length]: [usize; 2]) -> RunSpec {
    RunSpec {
        version: caravan_types::run_spec::RUN_SPEC_VERSION,
        name: "bench".into(),
        data: DataSpec { digest: Digest::default(), tokens: 0 },
        batch: BatchShape {
            lanes: 1,
            micro_batches: 1,
            sequences: sequences as u32,
            sequence_length: length as u32,
        },
        recipe: Recipe { learning_rate: 5e-4, warmup_steps: 0, ..Recipe::default() },
        init: caravan_types::Initial::Seed,
        seed: 0,
        numerics: NumericsClass { precision, family: family.to_owned() },
        model: model.clone(),
    }
}

/// One step: its loss, and the seconds that computing, reducing and applying took.
fn train(
    engine: &mut Executor<Random, Nowhere>,
    step: Step,
    slices: &SliceSet,
) -> Result<(f64, [f64; 3]), Box<dyn Error>> {
    let start = Instant::now();
    engine.run(Task::Forward { generation: ONE, step, micro: MICRO })?;
    let done = engine.run(Task::Backward { generation: ONE, step, micro: MICRO })?;
    let loss = if let Some(Done::Lane { result, .. }) = done { result.loss } else { f64::NAN };
    let computed = start.elapsed();
    let mut norm = 0.0;
    for slice in slices.iter() {
        let done = engine.run(Task::Reduce { generation: ONE, step, slice })?;
        if let Some(Done::Reduced { norms, .. }) = done {
            norm += norms.iter().sum::<f64>();
        }
    }
    let reduced = start.elapsed();
    let verdict = Verdict::Update { norm: norm.sqrt() };
    engine.run(Task::Apply { step, verdict, slices: slices.clone() })?;
    let total = start.elapsed();
    Ok((loss, [computed, reduced - computed, total - reduced].map(|d| d.as_secs_f64())))
}

/// Bytes of this process in memory, at most so far, where Linux tells.
fn most_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

fn main() -> Result<(), Box<dyn Error>> {
    let (preset, model) = preset()?;
    let number = |name: &str, default: usize| option(name).map_or(Ok(default), |v| v.parse());
    let (sequences, threads) = (number("--batch", 16)?, number("--threads", 2)?);
    let steps = number("--steps", 6)? as u64;
    let length = number("--length", model.context as usize)?;
    let precision = precision()?;
    let family = option("--family").unwrap_or_else(|| caravan_engine::fastest(precision).name().into());
    let spec = spec(&model, precision, &family, [sequences, length]);
    let source = Random { sequences, length, vocab: model.vocab };
    let recompute = std::env::args().any(|a| a == "--recompute");
    let mut engine = Executor::new(&spec, threads, Arc::<Watch>::default(), source, Nowhere)?;
    let slices = SliceSet::all(SliceTable::new(&model).len());
    let start = Instant::now();
    engine.run(Task::Place { units: 0..model.units(), recompute })?;
    engine.run(Task::Init { slices: slices.clone(), part: Part::State })?;
    let init = start.elapsed();
    let (mut loss, mut times) = (0.0, [const { Vec::new() }; 4]);
    for step in (1..=steps + 2).map(Step) {
        let parts;
        (loss, parts) = train(&mut engine, step, &slices)?;
        let all: f64 = parts.iter().sum();
        if step.0 > 2 {
            times.iter_mut().zip([all].into_iter().chain(parts)).for_each(|(times, part)| times.push(part));
        }
    }
    let memory = Memory::estimate(&model, &spec.batch, precision, recompute, 1, 1);
    let cores = std::thread::available_parallelism().map_or(threads, |cores| threads.min(cores.get()));
    let peak = caravan_engine::peak(&spec.numerics, threads).unwrap_or(f64::NAN) * cores as f64;
    let [median, compute, reduce, apply] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    });
    let tokens = (sequences * length) as f64;
    let flops = model.train_flops_per_token(length as u32) * tokens;
    println!(
        "caravan {preset} {precision}/{family} threads={threads} batch={sequences}x{length} params={:.1}M loss={loss:.4} \
         step={:.0}ms tok/s={:.0} GFLOP/s={:.0}, {:.0} % of the tiles' peak (compute {:.0} reduce {:.0} apply {:.0} ms; init {:.0} ms) \
         recompute={recompute} memory={} MB, {:.0} predicted, of which activations {:.0}",
        model.parameters() as f64 / 1e6,
        median * 1e3,
        tokens / median,
        flops / median / 1e9,
        100.0 * spec.mfu(median, peak),
        compute * 1e3,
        reduce * 1e3,
        apply * 1e3,
        init.as_secs_f64() * 1e3,
        most_memory().map_or("?".into(), |bytes| format!("{:.0}", bytes as f64 / 1e6)),
        memory.total() as f64 / 1e6,
        memory.activations as f64 / 1e6,
    );
    Ok(())
}
