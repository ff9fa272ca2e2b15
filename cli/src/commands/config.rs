//! `caravan config`: a run file as understood, every value of it, and what follows from it.
//!
//! The output is itself a run file that means the same, for the current folder: derived values
//! stand in comments.

use crate::config::{self, Kernels, Override, Settings};
use crate::estimate::{bytes, grouped, parameters_by_unit, si};
use crate::{Outcome, run_dir::RunDir};
use caravan_types::cost::Memory;
use caravan_types::{ModelShape, RopeScaling, SliceTable, Step};
use std::io::{self, Write};
use std::path::PathBuf;
use toml::Value;

/// What the subcommand takes.
#[derive(clap::Args)]
pub struct Args {
    /// The run file.
    file: PathBuf,
    /// Use this value instead of the file's; KEY is dotted, as in recipe.steps=100.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Prints the settings.
pub fn run(args: &Args, out: &mut dyn Write) -> Outcome {
    let overrides: Vec<_> = args.set.iter().map(|s| Override::set(s)).collect();
    let settings = config::load(&args.file, &overrides)?;
    writeln!(out, "# {}, as understood\n", args.file.display())?;
    print_settings(&settings, out)?;
    print_derived(&settings, out)?;
    for note in &settings.notes {
        writeln!(out, "\n# Note: {note}")?;
    }
    Ok(())
}

/// One `key = value` line.
fn line(out: &mut dyn Write, key: &str, value: impl Into<Value>, remark: &str) -> io::Result<()> {
    let line = format!("{key} = {}", value.into());
    if remark.is_empty() { writeln!(out, "{line}") } else { writeln!(out, "{line:<32}# {remark}") }
}

fn print_settings(s: &Settings, out: &mut dyn Write) -> io::Result<()> {
    line(out, "name", s.name.as_str(), "")?;
    line(out, "seed", s.seed as i64, "")?;
    if let Some(init) = &s.init {
        line(out, "init", init.display().to_string(), "its weights are those of step 0")?;
    }
    line(out, "precision", s.precision.to_string(), "")?;
    let again = if s.recompute {
        "of each layer its input is kept, the rest computed again"
    } else {
        "activations are kept"
    };
    line(out, "recompute", s.recompute, again)?;
    match &s.kernels {
        Kernels::Auto => {
            let fastest = caravan_engine::fastest(s.precision);
            line(out, "kernels", "auto", &format!("{fastest} on this machine"))?;
        }
        Kernels::Named(name) => line(out, "kernels", name.as_str(), "")?,
    }
    print_model(&s.model, out)?;

    writeln!(out, "\n[data]")?;
    line(out, "paths", texts(s.data.paths.iter().map(|p| p.display().to_string())), "")?;
    if let Some(include) = &s.data.extensions {
        line(out, "include", texts(include.iter().cloned()), "")?;
    }
    if let Some(tokenizer) = &s.data.tokenizer {
        line(out, "tokenizer", tokenizer.display().to_string(), "")?;
    }

    let b = &s.batch;
    writeln!(out, "\n[batch]")?;
    line(out, "lanes", i64::from(b.lanes), "")?;
    line(out, "micro_batches", i64::from(b.micro_batches), "of each lane")?;
    line(out, "sequences", i64::from(b.sequences), "of each micro-batch")?;
    line(out, "sequence_length", i64::from(b.sequence_length), "")?;

    let r = &s.recipe;
    writeln!(out, "\n[recipe]")?;
    line(out, "steps", r.steps as i64, "")?;
    line(out, "warmup_steps", r.warmup_steps as i64, "")?;
    line(out, "learning_rate", r.learning_rate, "")?;
    line(out, "final_ratio", r.final_ratio, "")?;
    line(out, "beta1", r.beta1, "")?;
    line(out, "beta2", r.beta2, "")?;
    line(out, "epsilon", r.epsilon, "")?;
    line(out, "weight_decay", r.weight_decay, "")?;
    line(out, "clip_norm", r.clip_norm, "")?;
    line(out, "non_finite", r.non_finite.to_string(), "a step whose loss or gradient is not finite")?;

    let c = &s.cluster;
    writeln!(out, "\n[cluster]")?;
    line(out, "workers", i64::from(c.workers), "")?;
    line(out, "threads", i64::from(c.threads), "of each worker")?;
    line(out, "redundancy", i64::from(c.redundancy), "owners a slice, where there are so many workers")?;
    let stages = if c.stages == 0 { "of each pipeline: as many as are best" } else { "of each pipeline" };
    line(out, "stages", i64::from(c.stages), stages)?;
    line(out, "detect", format!("{:?}", c.timing.detect()), "the failure budget")?;
    for (key, set) in [("heartbeat", c.timing.set_heartbeat()), ("reattach", c.timing.set_reattach())] {
        if let Some(time) = set {
            line(out, key, format!("{time:?}"), "instead of the derived one")?;
        }
    }
    line(out, "stragglers", c.stragglers.to_string(), "workers slower than they said")?;
    line(
        out,
        "checkpoint_every",
        c.checkpoint_every as i64,
        if c.checkpoint_every == 0 { "at the end only" } else { "" },
    )?;
    line(out, "keep", i64::from(c.keep), "")?;
    line(out, "listen", c.listen.to_string(), "")?;

    writeln!(out, "\n[generate]")?;
    line(out, "prompt", s.prompt.as_str(), "")
}

fn print_model(m: &ModelShape, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "\n[model]")?;
    line(out, "dim", i64::from(m.dim), "")?;
    line(out, "layers", i64::from(m.layers), "")?;
    line(out, "heads", i64::from(m.heads), &format!("of {} dimensions", m.head_dim()))?;
    line(out, "kv_heads", i64::from(m.kv_heads), "")?;
    line(out, "hidden", i64::from(m.hidden), "")?;
    line(out, "vocab", i64::from(m.vocab), "")?;
    line(out, "context", i64::from(m.context), "")?;
    line(out, "norm_eps", short(m.norm_eps), "")?;
    line(out, "rope_theta", short(m.rope_theta), "")?;
    m.rope_scaling.map_or(Ok(()), |scaling| print_scaling(scaling, out))
}

fn print_scaling(scaling: RopeScaling, out: &mut dyn Write) -> io::Result<()> {
    match scaling {
        RopeScaling::Linear { factor } => {
            line(out, "rope_scaling.type", "linear", "")?;
            line(out, "rope_scaling.factor", short(factor), "")
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            line(out, "rope_scaling.type", "llama3", "")?;
            line(out, "rope_scaling.factor", short(factor), "")?;
            line(out, "rope_scaling.low_freq_factor", short(low_freq_factor), "")?;
            line(out, "rope_scaling.high_freq_factor", short(high_freq_factor), "")?;
            line(out, "rope_scaling.original_context", i64::from(original_context), "")
        }
    }
}

fn texts(items: impl Iterator<Item = String>) -> Value {
    Value::Array(items.map(Value::String).collect())
}

/// An fp32 number as the shortest fp64 that becomes it again, and not 0.000009999999747.
fn short(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn print_derived(s: &Settings, out: &mut dyn Write) -> io::Result<()> {
    let mut row = |name: &str, text: String| writeln!(out, "{}", format!("# {name:<22}{text}").trim_end());
    let (m, b, r, c) = (&s.model, &s.batch, &s.recipe, &s.cluster);
    row("", String::new())?;
    row("Derived", String::new())?;
    let parameters = m.parameters();
    let [embedding, layer, head] = parameters_by_unit(m).map(|p| si(p as f64));
    row("parameters", format!("{} ({})", grouped(parameters), si(parameters as f64)))?;
    row("", format!("embedding {embedding}, layers {} × {layer}, norm and head {head}", m.layers))?;
    let tokens = b.tokens_per_step();
    row("sequences a step", grouped(b.sequences_per_step()))?;
    row("tokens a step", grouped(tokens))?;
    row(
        "tokens in all",
        format!(
            "{}, {:.3} a parameter",
            grouped(tokens.saturating_mul(r.steps)),
            tokens as f64 * r.steps as f64 / parameters as f64
        ),
    )?;
    let flops = m.train_flops_per_token(b.sequence_length);
    row("FLOPs a token", si(flops))?;
    row("FLOPs a step", si(flops * tokens as f64))?;
    row("FLOPs in all", si(flops * tokens as f64 * r.steps as f64))?;
    let rate = |step: u64| format!("{:.3e}", r.learning_rate_at(Step(step)));
    row(
        "learning rate",
        format!(
            "step 1: {}, step {}: {}, step {}: {}",
            rate(1),
            r.warmup_steps.max(1),
            rate(r.warmup_steps.max(1)),
            r.steps,
            rate(r.steps)
        ),
    )?;
    let slices = SliceTable::new(m);
    let largest = slices.iter().map(|(_, s)| s.len()).max().unwrap_or(0);
    row("slices", format!("{} of at most {} parameters", slices.len(), grouped(largest as u64)))?;
    let memory = Memory::estimate(m, b, s.precision, s.recompute, c.workers, c.redundancy);
    row("memory of a worker", format!("about {}", bytes(memory.total())))?;
    row("", format!("weights {}, gradients {}", bytes(memory.weights), bytes(memory.gradients)))?;
    row("", format!("moments {}, activations {}", bytes(memory.moments), bytes(memory.activations)))?;
    row("a checkpoint", bytes(12 * parameters))?;
    row("", String::new())?;
    for (i, text) in redundancies(s).into_iter().enumerate() {
        row(if i == 0 { "by redundancy" } else { "" }, text)?;
    }
    row("", String::new())?;
    for (i, (time, what)) in c.timing.table().into_iter().enumerate() {
        row(if i == 0 { "times" } else { "" }, format!("{:<8} {what}", format!("{time:?}")))?;
    }
    row("", String::new())?;
    row("run folder", RunDir::default_path(&s.name).display().to_string())?;
    row("prepared data", RunDir::data_cache().display().to_string())
}

/// What a worker needs with one, two and three owners a slice and with all of them, and which
/// deaths each survives.
fn redundancies(s: &Settings) -> Vec<String> {
    let workers = s.cluster.workers;
    let mut counts: Vec<u32> = [1, 2, 3, workers].into_iter().filter(|r| *r <= workers).collect();
    let text = |r: u32| {
        let memory = Memory::estimate(&s.model, &s.batch, s.precision, s.recompute, workers, r).total();
        let survives = match r {
            1 => "one death goes back to the last checkpoint".to_owned(),
            2 => "any worker may die".to_owned(),
            r => format!("any {} workers may die at once", r - 1),
        };
        let all = if r == workers && r > 1 { ", all workers" } else { "" };
        let set = if r == s.cluster.redundancy.min(workers) { ", as set" } else { "" };
        format!("{r}{all}: {} a worker, {survives}{set}", bytes(memory))
    };
    counts.sort_unstable();
    counts.dedup();
    counts.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn example() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/dependencies.toml")
    }

    fn output(set: &[&str]) -> String {
        let args = Args { file: example(), set: set.iter().map(|s| (*s).to_owned()).collect() };
        let mut out = Vec::new();
        run(&args, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_output_is_a_run_file_that_means_the_same() {
        let dir = tempfile::TempDir::new().unwrap();
        for set in [
            &[][..],
            &[
                "model.preset=15m",
                "cluster.detect=1500ms",
                "cluster.heartbeat=100ms",
                "cluster.stragglers=rebalance",
                "recipe.learning_rate=0.30000000000000004",
                "recipe.non_finite=skip",
                "recompute=true",
            ],
            &["model.rope_theta=500000", "model.rope_scaling={type=\"llama3\",factor=32}"],
            &["model.rope_scaling={type=\"linear\",factor=2.5}"],
        ] {
            let file = dir.path().join("again.toml");
            fs::write(&file, output(set)).unwrap();
            let overrides: Vec<_> = set.iter().map(|s| Override::set(s)).collect();
            let before = config::load(&example(), &overrides).unwrap();
            assert_eq!(config::load(&file, &[]).unwrap(), before);
        }
    }

    #[test]
    fn each_redundancy_is_shown_with_what_it_costs_and_survives() {
        let text = output(&["cluster.workers=5", "cluster.redundancy=2"]);
        let line = |start: &str| text.lines().find(|l| l.contains(start)).unwrap_or_default();
        assert!(line("by redundancy").contains("one death goes back to the last checkpoint"), "{text}");
        assert!(line(" 2: ").ends_with("a worker, any worker may die, as set"), "{text}");
        assert!(line(" 3: ").ends_with("any 2 workers may die at once"), "{text}");
        assert!(line(" 5, all workers: ").ends_with("any 4 workers may die at once"), "{text}");
        assert!(!output(&["cluster.workers=1"]).contains("may die"));
    }

    #[test]
    fn every_derived_time_is_shown() {
        let text = output(&["cluster.detect=8s", "cluster.heartbeat=1s"]);
        assert!(text.contains("heartbeat = \"1s\""), "{text}");
        for line in [
            "# times                 1s       between a worker's heartbeats",
            "  32s      that a connection may wait",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn derived_values_are_those_of_the_tables() {
        let text = output(&[
            "model={preset=\"7b\"}",
            "model.dim=4096",
            "model.layers=32",
            "model.heads=32",
            "model.kv_heads=32",
            "model.vocab=32000",
            "batch.sequence_length=4096",
        ]);
        assert!(text.contains("6,738,415,616 (6.74 G)"), "{text}");
        assert!(text.contains("# tokens a step         32,768\n"), "{text}");
        assert!(text.lines().any(|l| l.starts_with("# times")), "{text}");
    }
}
