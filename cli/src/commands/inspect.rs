//! `caravan inspect`: what a step was, or will be, trained on.

use crate::estimate::grouped;
use crate::run_dir::RunDir;
use crate::{Outcome, run_data};
use caravan_data::{SequenceView, StepBatch};
use caravan_types::Step;
use std::io::{self, Write};
use std::path::PathBuf;

/// What the subcommand takes.
#[derive(clap::Args)]
pub struct Args {
    /// The run's folder, or its name where it is in .caravan/runs.
    run: PathBuf,
    /// The step, from 1; it need not have been trained yet.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    step: u64,
    /// Print JSON, with everything.
    #[arg(long)]
    json: bool,
}

/// Why a batch cannot be shown.
#[derive(Debug, thiserror::Error)]
enum InspectError {
    #[error("the run {run} ends with step {steps}, there is no step {step}")]
    AfterTheEnd { run: String, steps: u64, step: u64 },
}

/// Prints the batch of a step.
pub fn run(args: &Args, out: &mut dyn Write) -> Outcome {
    let run = RunDir::find(&args.run)?;
    let spec = run.spec();
    if args.step > spec.recipe.steps {
        let (run, steps) = (spec.name.clone(), spec.recipe.steps);
        return Err(InspectError::AfterTheEnd { run, steps, step: args.step }.into());
    }
    let sampler = run_data::sampler(&run)?;
    let batch = sampler.describe(Step(args.step))?;
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &batch)?;
        writeln!(out)?;
    } else {
        print(&batch, spec.recipe.steps, out)?;
    }
    Ok(())
}

fn print(batch: &StepBatch, steps: u64, out: &mut dyn Write) -> io::Result<()> {
    let tokens: usize = batch.sequences.iter().map(|s| s.tokens.len()).sum();
    writeln!(
        out,
        "step {} of {steps}: {} sequences, {} tokens, of which {} count in the loss",
        batch.step,
        batch.sequences.len(),
        grouped(tokens as u64),
        grouped(batch.counted_tokens),
    )?;
    batch.sequences.iter().try_for_each(|sequence| print_sequence(sequence, out))
}

fn print_sequence(s: &SequenceView, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "\nlane {}, micro-batch {}, sequence {}: window {} of epoch {}, from token {} of the stream on",
        s.lane,
        s.micro_batch,
        s.sequence,
        s.window,
        s.epoch,
        grouped(s.position),
    )?;
    let uncounted = ranges(s.counted.iter().map(|c| !c));
    let uncounted = if uncounted.is_empty() { "none".to_owned() } else { uncounted.join(", ") };
    writeln!(out, "  positions that do not count: {uncounted}")?;
    for d in &s.documents {
        write!(out, "  {}..{}  {}", d.start, d.end, d.source)?;
        if d.row > 0 {
            write!(out, ", row {}", d.row)?;
        }
        if d.skipped_tokens > 0 {
            write!(out, ", from its token {} on", grouped(d.skipped_tokens))?;
        }
        writeln!(out)?;
        for line in d.text.iter().flat_map(|text| text.lines()) {
            // A terminal must not obey what is in somebody's data.
            let line: String =
                line.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect();
            writeln!(out, "    | {line}")?;
        }
        let tokens: Vec<_> = s.tokens[d.start..d.end].iter().map(u32::to_string).collect();
        writeln!(out, "    tokens {}", tokens.join(" "))?;
    }
    Ok(())
}

/// The positions at which something holds, as the fewest ranges.
fn ranges(holds: impl Iterator<Item = bool>) -> Vec<String> {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for (i, _) in holds.enumerate().filter(|(_, h)| *h) {
        match ranges.last_mut() {
            Some(last) if last.1 == i => last.1 = i + 1,
            _ => ranges.push((i, i + 1)),
        }
    }
    ranges.into_iter().map(|(a, b)| if a + 1 == b { a.to_string() } else { format!("{a}..{b}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::testing::Tiny;

    fn inspect(run: PathBuf, step: u64, json: bool) -> Result<String, String> {
        let mut out = Vec::new();
        run_text(&Args { run, step, json }, &mut out).map(|()| String::from_utf8(out).unwrap())
    }

    fn run_text(args: &Args, out: &mut Vec<u8>) -> Result<(), String> {
        run(args, out).map_err(|e| e.to_string())
    }

    #[test]
    fn a_step_is_shown_with_text_sources_tokens_and_mask() {
        let tiny = Tiny::new();
        let text = inspect(tiny.run.path().to_owned(), 10, false).unwrap();
        assert!(text.starts_with("step 10 of 10: 4 sequences, 128 tokens, of which "), "{text}");
        assert_eq!(text.matches("positions that do not count: ").count(), 4, "{text}");
        assert!(text.contains("lane 1, micro-batch 0, sequence 1: window "), "{text}");
        assert!(text.contains(".txt") && text.contains("    | ") && text.contains("    tokens "), "{text}");
        assert_eq!(
            inspect(tiny.run.path().to_owned(), 10, false).unwrap(),
            text,
            "a function of the step alone"
        );

        let json = inspect(tiny.run.path().to_owned(), 10, true).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let tokens = json["sequences"][3]["tokens"].as_array().unwrap();
        assert_eq!((json["step"].as_u64(), tokens.len()), (Some(10), 32));
        let line: Vec<_> = tokens.iter().map(ToString::to_string).collect();
        let shown: Vec<_> = text.lines().filter_map(|l| l.strip_prefix("    tokens ")).collect();
        assert!(shown.join(" ").ends_with(&line.join(" ")), "{text}");
    }

    #[test]
    fn a_step_after_the_end_and_a_folder_without_a_run_are_errors() {
        let tiny = Tiny::new();
        let error = inspect(tiny.run.path().to_owned(), 11, false).unwrap_err();
        assert_eq!(error, "the run tiny ends with step 10, there is no step 11");
        let error = inspect(tiny.dir.path().to_owned(), 1, false).unwrap_err();
        assert!(error.contains("is no run's folder"), "{error}");
    }

    #[test]
    fn ranges_are_the_fewest() {
        let holds = [true, false, true, true, true, false].into_iter();
        assert_eq!(ranges(holds), ["0", "2..5"]);
    }
}
