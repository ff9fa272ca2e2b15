//! The settings, section by section, with their limits, defaults and contradictions.

use super::problem::{Fault, presets};
use super::reader::Reader;
use super::settings::{Cluster, Kernels, Note, Settings};
use super::start::{self, Given, Start};
use caravan_data::{LEAST_VOCAB, Request};
use caravan_kernels::Family;
use caravan_types::progress::Stragglers;
use caravan_types::timing::DETECT;
use caravan_types::{BatchShape, ModelShape, NonFinitePolicy, Precision, Recipe, RopeScaling, Timing};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// Limits: far above any Llama, low enough that products fit. Samples of a run are numbered
/// with 64 bits: 2^12 lanes · 2^10 micro-batches · 2^8 sequences · 2^32 steps = 2^62.
const MOST_DIM: u32 = 1 << 17;
const MOST_LAYERS: u32 = 1 << 10;
const MOST_HEADS: u32 = 1 << 12;
const MOST_HIDDEN: u32 = 1 << 20;
const MOST_TOKENS: u32 = 1 << 20;
const MOST_LANES: u32 = 1 << 12;
const MOST_MICRO_BATCHES: u32 = 1 << 10;
const MOST_SEQUENCES: u32 = 1 << 8;
const MOST_STEPS: u64 = 1 << 32;
const MOST_WORKERS: u32 = 1 << 12;

/// From here on the paper trains with half the peak rate (34B and 70B; arXiv 2307.09288,
/// table 1).
const LARGE_MODEL: u64 = 20_000_000_000;

/// Reads everything; none where a problem was noted that leaves a section open.
pub fn read(r: &mut Reader, file: &Path) -> Option<Settings> {
    let name = name(r, file);
    let seed = r.integer("seed", 0..=i64::MAX as u64);
    let precision = r.choice("precision", "\"fp32\", \"mixed\"", |name| match name {
        "fp32" => Some(Precision::Fp32),
        "mixed" => Some(Precision::Mixed),
        _ => None,
    });
    let recompute = r.boolean("recompute");
    let kernels = kernels(r);
    let length = r.integer32("batch.sequence_length", 1..=MOST_TOKENS);
    let init = r.text("init").map(|dir| r.base("init", file).join(dir));
    let (model, start) = model(r, length, init.as_deref()).unzip();
    let start = start.flatten();
    let batch = batch(r, length, model.as_ref());
    let recipe = recipe(r, model.as_ref());
    let data = data(r, file);
    let cluster = cluster(r, model.as_ref());
    let prompt = r.text("generate.prompt");
    let (model, batch, cluster) = (model?, batch?, cluster?);
    let mut notes = notes(&batch, &cluster);
    let mut data = data?;
    if let Some(start) = start {
        notes.extend(
            start
                .notes
                .into_iter()
                .filter(|n| !matches!(n, Note::NoTokenizer { .. }) || data.tokenizer.is_none()),
        );
        data.tokenizer = data.tokenizer.or(start.tokenizer);
    }
    Some(Settings {
        name: name?,
        seed: seed.unwrap_or(0),
        batch,
        recipe: recipe?,
        precision: precision.unwrap_or(Precision::Fp32),
        recompute: recompute.unwrap_or(false),
        kernels: kernels.unwrap_or(Kernels::Auto),
        data: Request { vocab_size: model.vocab, ..data },
        init,
        model,
        cluster,
        prompt: prompt.unwrap_or_default(),
        notes,
    })
}

/// The run's name; the file's name without its extension where it is not given.
fn name(r: &mut Reader, file: &Path) -> Option<String> {
    let given = r.text("name");
    let name = match given {
        Some(name) => name,
        None if r.has("name") => return None,
        None => file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned(),
    };
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(fits) {
        r.fault("name", Fault::NotAName);
        return None;
    }
    Some(name)
}

/// The instruction family: one that this machine has.
fn kernels(r: &mut Reader) -> Option<Kernels> {
    let families = Family::available();
    let names: Vec<_> = families.iter().map(|f| format!("{:?}", f.name())).collect();
    let choices = format!("\"auto\" and what this machine has: {}", names.join(", "));
    r.choice("kernels", &choices, |name| match name {
        "auto" => Some(Kernels::Auto),
        _ => Some(Kernels::Named(Family::named(name)?.name().to_owned())),
    })
}

/// The model: a preset, single keys, a preset with some keys changed, or that of the folder
/// whose weights the run starts with.
fn model(r: &mut Reader, length: Option<u32>, init: Option<&Path>) -> Option<(ModelShape, Option<Start>)> {
    let preset = r.choice("model.preset", &presets(), ModelShape::preset);
    let given = Given {
        dim: r.integer32("model.dim", 2..=MOST_DIM),
        layers: r.integer32("model.layers", 1..=MOST_LAYERS),
        heads: r.integer32("model.heads", 1..=MOST_HEADS),
        kv_heads: r.integer32("model.kv_heads", 1..=MOST_HEADS),
        hidden: r.integer32("model.hidden", 1..=MOST_HIDDEN),
        vocab: r.integer32("model.vocab", LEAST_VOCAB..=MOST_TOKENS),
        context: r.integer32("model.context", 1..=MOST_TOKENS),
        norm_eps: r.number("model.norm_eps", 1e-12..=1.0).map(|e| e as f32),
        rope_theta: r.number("model.rope_theta", 1.0..=1e9).map(|t| t as f32),
        rope_scaling: rope_scaling(r)?,
    };
    match init {
        Some(folder) => start::of_folder(r, folder, &given, preset.as_ref()).map(|(m, s)| (m, Some(s))),
        None if r.has("init") => None,
        None => Some((given.shape(r, length, preset.as_ref())?, None)),
    }
}

impl Given {
    /// The model that is meant.
    fn shape(&self, r: &mut Reader, length: Option<u32>, preset: Option<&ModelShape>) -> Option<ModelShape> {
        let examples = [
            ("model.dim", "the width of the model, such as 256; or name a model.preset"),
            ("model.layers", "the number of layers, such as 6; or name a model.preset"),
            ("model.heads", "the number of query heads, such as 8; or name a model.preset"),
            ("model.vocab", "the size of the vocabulary, such as 8192; or name a model.preset"),
        ];
        for (key, example) in examples {
            if !r.has("model.preset") && !r.has(key) {
                r.fault(key, Fault::Missing { example });
            }
        }
        let p = preset;
        // A preset's derived values fit the preset's own width and heads only.
        let kv_heads =
            self.kv_heads.or(p.filter(|_| self.heads.is_none()).map(|p| p.kv_heads)).or(self.heads);
        let hidden = self
            .hidden
            .or(p.filter(|_| self.dim.is_none()).map(|p| p.hidden))
            .or(self.dim.map(|d| ModelShape::ffn_hidden(d, 1.0, 256)));
        let (dim, heads) = (self.dim.or(p.map(|p| p.dim)), self.heads.or(p.map(|p| p.heads)));
        heads_fit(r, dim, heads, kv_heads)?;
        Some(ModelShape {
            dim: dim?,
            layers: self.layers.or(p.map(|p| p.layers))?,
            heads: heads?,
            kv_heads: kv_heads?,
            hidden: hidden?,
            vocab: self.vocab.or(p.map(|p| p.vocab))?,
            context: self.context.or(p.map(|p| p.context)).or(length).unwrap_or(1),
            norm_eps: self.norm_eps.or(p.map(|p| p.norm_eps)).unwrap_or(1e-5),
            rope_theta: self.rope_theta.or(p.map(|p| p.rope_theta)).unwrap_or(10_000.0),
            rope_scaling: self.rope_scaling,
        })
    }
}

/// Scaled rotary frequencies, where there is a `model.rope_scaling.type`; none at all where
/// what is given cannot be used.
fn rope_scaling(r: &mut Reader) -> Option<Option<RopeScaling>> {
    const KIND: &str = "model.rope_scaling.type";
    let kind = r.choice(KIND, "\"linear\", \"llama3\"", |kind| {
        ["linear", "llama3"].into_iter().find(|known| *known == kind)
    });
    let factor = r.number("model.rope_scaling.factor", 1.0..=1e6).map(|f| f as f32);
    let low = r.number("model.rope_scaling.low_freq_factor", 1e-3..=1e3).map(|f| f as f32);
    let high = r.number("model.rope_scaling.high_freq_factor", 1e-3..=1e3).map(|f| f as f32);
    let context = r.integer32("model.rope_scaling.original_context", 1..=MOST_TOKENS);
    let keys = ["factor", "low_freq_factor", "high_freq_factor", "original_context"];
    let any = keys.iter().any(|key| r.has(&format!("model.rope_scaling.{key}")));
    let scaling = match kind {
        None if r.has(KIND) => return None,
        None if any => {
            r.fault(
                KIND,
                Fault::Missing { example: "how the frequencies are scaled, \"linear\" or \"llama3\"" },
            );
            return None;
        }
        None => return Some(None),
        Some("linear") => RopeScaling::Linear { factor: factor? },
        // Without them, Llama 3.1's numbers.
        Some(_) => RopeScaling::Llama3 {
            factor: factor.unwrap_or(8.0),
            low_freq_factor: low.unwrap_or(1.0),
            high_freq_factor: high.unwrap_or(4.0),
            original_context: context.unwrap_or(8192),
        },
    };
    match scaling.fault() {
        Some(what) => {
            r.fault(KIND, Fault::RopeScaling { what });
            None
        }
        None => Some(Some(scaling)),
    }
}

/// Whether heads share the width, and key and value heads the heads; none where they do not.
fn heads_fit(r: &mut Reader, dim: Option<u32>, heads: Option<u32>, kv_heads: Option<u32>) -> Option<()> {
    let heads = heads?;
    let (key, fault) = match (dim, kv_heads) {
        (Some(dim), _) if !dim.is_multiple_of(heads) => {
            ("model.heads", Fault::HeadsDoNotDivide { dim, heads })
        }
        (Some(dim), _) if !(dim / heads).is_multiple_of(2) => ("model.heads", Fault::OddHead { dim, heads }),
        (_, Some(kv_heads)) if !heads.is_multiple_of(kv_heads) => {
            ("model.kv_heads", Fault::KvHeadsDoNotDivide { heads, kv_heads })
        }
        _ => return Some(()),
    };
    r.fault(key, fault);
    None
}

fn batch(r: &mut Reader, length: Option<u32>, model: Option<&ModelShape>) -> Option<BatchShape> {
    let lanes = r.integer32("batch.lanes", 1..=MOST_LANES);
    let micro_batches = r.integer32("batch.micro_batches", 1..=MOST_MICRO_BATCHES);
    let sequences = r.integer32("batch.sequences", 1..=MOST_SEQUENCES);
    let most = MOST_LANES * MOST_MICRO_BATCHES * MOST_SEQUENCES;
    let size = r.integer("batch.size", 1..=u64::from(most));
    let context = model.map(|m| m.context);
    let given =
        |r: &Reader, key: &str, value: Option<u32>| if r.has(key) { value } else { value.or(Some(1)) };
    if !r.has("batch.sequence_length") && !r.has("model.preset") && !r.has("model.context") {
        r.fault("batch.sequence_length", Fault::Missing { example: "tokens a sequence, such as 256" });
        return None;
    }
    let length = if r.has("batch.sequence_length") { length } else { context };
    let lanes = if r.has("batch.lanes") { lanes? } else { 8 };
    if !lanes.is_power_of_two() {
        r.fault("batch.lanes", Fault::NotAPowerOfTwo(lanes));
        return None;
    }
    let sequences = given(r, "batch.sequences", sequences)?;
    let mut micro_batches = given(r, "batch.micro_batches", micro_batches)?;
    if let Some(size) = size {
        let grain = u64::from(lanes) * u64::from(sequences);
        let parts = (lanes, micro_batches, sequences);
        if r.has("batch.micro_batches") && size != grain * u64::from(micro_batches) {
            r.fault("batch.size", Fault::BatchContradicts { parts });
            return None;
        }
        if !size.is_multiple_of(grain) {
            r.fault("batch.size", Fault::BatchDoesNotDivide { size, lanes, sequences });
            return None;
        }
        micro_batches = u32::try_from(size / grain).ok()?;
    }
    let sequence_length = length?;
    if let Some(context) = context.filter(|c| *c < sequence_length) {
        r.fault("batch.sequence_length", Fault::LongerThanContext { context });
        return None;
    }
    Some(BatchShape { lanes, micro_batches, sequences, sequence_length })
}

fn recipe(r: &mut Reader, model: Option<&ModelShape>) -> Option<Recipe> {
    let paper = Recipe::default();
    let example = "the length of the run in optimiser steps, such as 1000";
    let steps = r.require("recipe.steps", example, |r, key| r.integer(key, 1..=MOST_STEPS));
    let warmup = r.integer("recipe.warmup_steps", 0..=MOST_STEPS);
    let learning_rate = r.number("recipe.learning_rate", 1e-9..=10.0);
    let final_ratio = r.number("recipe.final_ratio", 0.0..=1.0);
    let beta1 = r.number("recipe.beta1", 0.0..=0.9999);
    let beta2 = r.number("recipe.beta2", 0.0..=0.99999);
    let epsilon = r.number("recipe.epsilon", 1e-15..=1.0);
    let weight_decay = r.number("recipe.weight_decay", 0.0..=10.0);
    let clip_norm = r.number("recipe.clip_norm", 1e-6..=1e6);
    let policies = [NonFinitePolicy::Stop, NonFinitePolicy::Skip];
    let non_finite = r.choice("recipe.non_finite", "\"stop\", \"skip\"", |name| {
        policies.into_iter().find(|policy| policy.to_string() == name)
    });
    let large = model.is_some_and(|m| m.parameters() >= LARGE_MODEL);
    let peak = if large { paper.learning_rate / 2.0 } else { paper.learning_rate };
    let steps = steps?;
    if warmup.is_some_and(|w| w >= steps) {
        r.fault("recipe.warmup_steps", Fault::WarmupTooLong { steps });
        return None;
    }
    Some(Recipe {
        steps,
        // The paper's 2,000, or a tenth of a run that is too short for them.
        warmup_steps: warmup.unwrap_or(paper.warmup_steps.min(steps / 10)),
        learning_rate: learning_rate.unwrap_or(peak),
        final_ratio: final_ratio.unwrap_or(paper.final_ratio),
        beta1: beta1.unwrap_or(paper.beta1),
        beta2: beta2.unwrap_or(paper.beta2),
        epsilon: epsilon.unwrap_or(paper.epsilon),
        weight_decay: weight_decay.unwrap_or(paper.weight_decay),
        clip_norm: clip_norm.unwrap_or(paper.clip_norm),
        non_finite: non_finite.unwrap_or(paper.non_finite),
    })
}

fn data(r: &mut Reader, file: &Path) -> Option<Request> {
    let example =
        "what to train on, such as [\"texts/\"] or [\"cargo:Cargo.lock\"]; --data PATH gives it too";
    let paths = r.require("data.paths", example, Reader::texts);
    let include = r.texts("data.include");
    let tokenizer = r.text("data.tokenizer").map(|t| r.base("data.tokenizer", file).join(t));
    if include.as_ref().is_some_and(Vec::is_empty) {
        r.fault("data.include", Fault::Empty { expected: "extensions, such as [\"rs\", \"md\"]" });
    }
    let paths = paths?;
    if paths.is_empty() || paths.iter().any(String::is_empty) {
        r.fault("data.paths", Fault::Empty { expected: "folders, files or \"cargo:LOCKFILE\"" });
        return None;
    }
    let base = r.base("data.paths", file);
    let resolve = |path: &String| match path.strip_prefix(CARGO) {
        Some(lock) => PathBuf::from(format!("{CARGO}{}", base.join(lock).display())),
        None => base.join(path),
    };
    let paths = paths.iter().map(resolve).collect();
    Some(Request { paths, extensions: include, vocab_size: 0, tokenizer })
}

/// Prefix of a path to a lock file whose packages' sources are the data.
const CARGO: &str = "cargo:";

fn cluster(r: &mut Reader, model: Option<&ModelShape>) -> Option<Cluster> {
    let workers = r.integer32("cluster.workers", 1..=MOST_WORKERS);
    let threads = r.integer32("cluster.threads", 1..=1 << 10);
    let redundancy = r.integer32("cluster.redundancy", 1..=MOST_WORKERS);
    let stages = r.integer32("cluster.stages", 0..=MOST_LAYERS + 2);
    let timing = timing(r);
    let known = [Stragglers::Report, Stragglers::Rebalance];
    let stragglers = r.choice("cluster.stragglers", "\"report\", \"rebalance\"", |name| {
        known.into_iter().find(|s| s.to_string() == name)
    });
    let every = r.integer("cluster.checkpoint_every", 0..=MOST_STEPS);
    let keep = r.integer32("cluster.keep", 1..=1 << 20);
    let address =
        "an address of this machine with a port, such as \"127.0.0.1:7070\" (port 0 takes any free one)";
    let listen = r.parsed("cluster.listen", address, |t| t.parse().ok());
    if r.has("cluster.workers") && workers.is_none() {
        return None;
    }
    let workers = workers.unwrap_or(2);
    if let Some(units) = model.map(ModelShape::units).filter(|units| stages.is_some_and(|s| s > *units)) {
        r.fault("cluster.stages", Fault::MoreStagesThanUnits { units });
        return None;
    }
    Some(Cluster {
        workers,
        threads: threads.unwrap_or_else(|| (cores() / workers).max(1)),
        redundancy: redundancy.unwrap_or(2),
        stages: stages.unwrap_or(0),
        timing: timing?,
        stragglers: stragglers.unwrap_or_default(),
        checkpoint_every: every.unwrap_or(100),
        keep: keep.unwrap_or(3),
        listen: listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0))),
    })
}

/// The failure budget, and the times that may be set besides: each is refused where it does not
/// fit to the budget.
fn timing(r: &mut Reader) -> Option<Timing> {
    let any = Duration::from_millis(1)..=*DETECT.end() * 1000;
    let detect = r.duration("cluster.detect", DETECT);
    let heartbeat = r.duration("cluster.heartbeat", any.clone());
    let reattach = r.duration("cluster.reattach", any);
    if r.has("cluster.detect") && detect.is_none() {
        return None;
    }
    let derived = detect.map_or_else(Timing::default, Timing::from);
    let mut fits = true;
    for (key, timing, range) in [
        ("cluster.heartbeat", derived.with_heartbeat(heartbeat), derived.heartbeats()),
        ("cluster.reattach", derived.with_reattach(reattach), derived.reattaches()),
    ] {
        if let Err(disorder) = timing.validate() {
            r.fault(key, Fault::Disorder { disorder, range, detect: derived.detect() });
            fits = false;
        }
    }
    fits.then(|| derived.with_heartbeat(heartbeat).with_reattach(reattach))
}

/// Cores that this process may use.
pub fn cores() -> u32 {
    thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

fn notes(batch: &BatchShape, cluster: &Cluster) -> Vec<Note> {
    let (workers, threads, cores) = (cluster.workers, cluster.threads, cores());
    let mut notes = Vec::new();
    if workers > batch.lanes {
        notes.push(Note::IdleWorkers { workers, lanes: batch.lanes });
    }
    if workers > 1 && cluster.redundancy == 1 {
        notes.push(Note::NoRedundancy);
    }
    if workers.saturating_mul(threads) > cores && threads > 1 {
        notes.push(Note::TooManyThreads { workers, threads, cores });
    }
    if !cluster.listen.ip().is_loopback() {
        notes.push(Note::NotLoopback(cluster.listen));
    }
    notes
}
