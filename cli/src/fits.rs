//! Whether a run whose workers all sit on this machine fits into its memory, asked before anything
//! is prepared: a machine that runs out of memory kills whatever it likes, in the middle of a step.
//!
//! Workers elsewhere say what memory they have, and the coordinator plans with that; here all of
//! them share one. What is estimated is what a worker takes as `caravan config` shows it.

use crate::config::Settings;
use crate::estimate::bytes;
use caravan_types::cost::Memory;
use caravan_types::model::PRESETS;
use caravan_types::{BatchShape, ModelShape, Precision};
use std::fs;

/// A run that does not fit.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the run does not fit into the memory of this machine: {workers} of its workers take about {}, and there are {}. \
     {}", bytes(*needed), bytes(*there), advice(would_fit)
)]
pub struct DoesNotFit {
    workers: u32,
    /// By all of them together.
    needed: u64,
    there: u64,
    /// Settings of which each one alone would do.
    would_fit: Vec<String>,
}

fn advice(would_fit: &[String]) -> String {
    let elsewhere = "start `caravan coordinator` with this run file, and its workers on other machines";
    match would_fit {
        [] => format!("No single setting makes it fit: choose a smaller model, or {elsewhere}"),
        some => format!("What would fit: {}. Or {elsewhere}", some.join(", or ")),
    }
}

/// Refuses a run that does not fit into this machine's memory, where that is known.
///
/// # Errors
/// With what would fit.
pub fn check(settings: &Settings) -> Result<(), DoesNotFit> {
    memory().map_or(Ok(()), |there| check_with(settings, there))
}

fn check_with(s: &Settings, there: u64) -> Result<(), DoesNotFit> {
    let (model, batch, workers) = (&s.model, &s.batch, s.cluster.workers);
    let needs = |model: &ModelShape, batch: &BatchShape, workers: u32| needed(s, model, batch, workers);
    let needed = needs(model, batch, workers);
    if needed <= there {
        return Ok(());
    }
    let halves = |n: u32| (0..32).map(move |i| n >> i).skip(1).take_while(|n| *n > 0);
    let mut would_fit = Vec::new();
    let fewer = (1..workers).rev().find(|workers| needs(model, batch, *workers) <= there);
    would_fit.extend(fewer.map(|workers| format!("cluster.workers = {workers}")));
    let mixed = Settings { precision: Precision::Mixed, ..s.clone() };
    if self::needed(&mixed, model, batch, workers) <= there {
        would_fit.push("precision = \"mixed\"".into());
    }
    let recomputed = Settings { recompute: true, ..s.clone() };
    if self::needed(&recomputed, model, batch, workers) <= there {
        would_fit.push("recompute = true".into());
    }
    let sequences = halves(batch.sequences);
    let fewer =
        { sequences }.find(|n| needs(model, &BatchShape { sequences: *n, ..*batch }, workers) <= there);
    would_fit.extend(fewer.map(|n| format!("batch.sequences = {n}")));
    let lengths = halves(batch.sequence_length);
    let shorter =
        { lengths }.find(|n| needs(model, &BatchShape { sequence_length: *n, ..*batch }, workers) <= there);
    would_fit.extend(shorter.map(|n| format!("batch.sequence_length = {n}")));
    let presets = PRESETS.iter().rev().filter_map(|name| Some((name, ModelShape::preset(name)?)));
    let smaller = presets.map(|(name, shape)| (name, ModelShape { vocab: model.vocab, ..shape })).filter(
        |(_, shape)| shape.context >= batch.sequence_length && shape.parameters() < model.parameters(),
    );
    let smaller = { smaller }.find(|(_, shape)| needs(shape, batch, workers) <= there);
    would_fit.extend(smaller.map(|(name, _)| format!("the shape of model.preset = {name:?}")));
    Err(DoesNotFit { workers, needed, there, would_fit })
}

/// Bytes that all workers take together. A stage has its part of the weights, and of all that is
/// as large as they are.
fn needed(s: &Settings, model: &ModelShape, batch: &BatchShape, workers: u32) -> u64 {
    let stages = u64::from(s.cluster.stages.clamp(1, workers));
    let Memory { weights, gradients, moments, activations } =
        Memory::estimate(model, batch, s.precision, s.recompute, workers, s.cluster.redundancy);
    let each = ((weights + gradients + activations) / stages).saturating_add(moments);
    each.saturating_mul(u64::from(workers))
}

/// Memory that processes of this machine can have, in bytes: all of it, or what the control group
/// allows where that is less.
fn memory() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let total = line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)?;
    // `max` where there is no limit.
    let limit =
        fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Some(limit.map_or(total, |limit: u64| limit.min(total)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Override};
    use std::path::Path;

    fn settings(set: &[&str]) -> Settings {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/dependencies.toml");
        let set: Vec<_> = set.iter().map(|s| Override::set(s)).collect();
        config::load(&file, &set).unwrap()
    }

    #[test]
    fn the_example_fits_into_a_gibibyte_and_a_model_for_a_hundred_machines_does_not() {
        assert_eq!(check_with(&settings(&[]), 1 << 30), Ok(()));
        let large = ["model.dim=8192", "model.layers=80", "model.heads=64", "model.hidden=28672"];
        let error = check_with(&settings(&large), 64 << 30).unwrap_err().to_string();
        for said in ["2 of its workers take about", "64.0 GiB", "model.preset = ", "caravan coordinator"] {
            assert!(error.contains(said), "{said}: {error}");
        }
        assert!(!error.contains("cluster.workers"), "one worker is too large, too: {error}");
    }

    #[test]
    fn whatever_is_said_to_fit_fits() {
        let set = ["model.preset=15m", "batch.sequences=16", "cluster.workers=4"];
        let there = {
            let s = settings(&set);
            needed(&s, &s.model, &s.batch, 4) - 1
        };
        let DoesNotFit { would_fit, .. } = check_with(&settings(&set), there).unwrap_err();
        let settable: Vec<_> = would_fit.iter().filter(|s| !s.contains("preset")).collect();
        assert!(settable.len() >= 3 && would_fit.contains(&"recompute = true".into()), "{would_fit:?}");
        for one in settable {
            let change = one.replace(" = ", "=");
            let with = settings(&[&set[..], &[change.as_str()]].concat());
            assert_eq!(check_with(&with, there), Ok(()), "{one}");
        }
    }

    #[test]
    fn this_machine_knows_its_memory() {
        assert!(memory().is_some_and(|bytes| bytes > 1 << 26));
    }
}
