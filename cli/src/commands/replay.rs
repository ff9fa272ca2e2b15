//! `caravan replay`: whether the coordinator's core decides again what it decided.

use crate::Outcome;
use crate::estimate::grouped;
use crate::run_dir::RunDir;
use caravan_coordinator::control::{Difference, Replayed, Shown, Stop, replay};
use caravan_types::Digest;
use std::io::{self, Write};
use std::path::PathBuf;

/// What the subcommand takes.
#[derive(clap::Args)]
pub struct Args {
    /// The run's folder, or its name where it is in .caravan/runs.
    run: PathBuf,
}

/// Longest text of an input or an output that is printed: a plan of a large caravan is longer
/// than anybody reads in a terminal.
const LONGEST: usize = 2000;

/// What a replay that goes another way ends with.
#[derive(Debug, thiserror::Error)]
#[error(
    "the core decides otherwise in line {line} of {}: it is another version than the one that was recorded ({build}, \
     this is {}), or the recording was changed",
    path.display(),
    env!("CARGO_PKG_VERSION")
)]
struct Otherwise {
    line: u64,
    path: PathBuf,
    build: String,
}

/// Replays all starts of a run's coordinator.
pub fn run(args: &Args, out: &mut dyn Write) -> Outcome {
    let path = RunDir::find(&args.run)?.control();
    let mut first = None;
    for (replayed, number) in replay(&path)?.into_iter().zip(1..) {
        print(number, &replayed, out)?;
        if let (Some(difference), None) = (replayed.difference, &first) {
            let (line, build) = (difference.at.line, replayed.start.build);
            first = Some(Otherwise { line, path: path.clone(), build });
        }
    }
    first.map_or(Ok(()), |otherwise| Err(otherwise.into()))
}

fn print(number: u64, replayed: &Replayed, out: &mut dyn Write) -> io::Result<()> {
    let Replayed { start, line, inputs, until, stop, difference } = replayed;
    let build = &start.build;
    write!(out, "start {number} (line {line}, caravan {build}): {} inputs in ", grouped(*inputs))?;
    write!(out, "{:.1} s were decided the same", *until as f64 / 1e3)?;
    match stop {
        Stop::End => writeln!(out)?,
        Stop::Torn => writeln!(out, "; the last record is cut off")?,
        Stop::Full => writeln!(out, "; then the recording had its full size")?,
    }
    difference.as_ref().map_or(Ok(()), |difference| print_difference(difference, out))
}

fn print_difference(difference: &Difference, out: &mut dyn Write) -> io::Result<()> {
    let Difference { before, at, outputs, digest, after } = difference;
    writeln!(out, "  the first input that was decided otherwise is in line {}:", at.line)?;
    before.iter().try_for_each(|shown| print_input(' ', shown, out))?;
    print_input('>', at, out)?;
    writeln!(out, "      answered then: {}", digest_text(at.answered))?;
    writeln!(out, "      answered now:  {}", digest_text(*digest))?;
    outputs.iter().try_for_each(|output| writeln!(out, "        {}", cut(&format!("{output:?}"))))?;
    after.iter().try_for_each(|shown| print_input(' ', shown, out))
}

fn print_input(mark: char, shown: &Shown, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "  {mark} line {} at {} ms: {}", shown.line, shown.now, cut(&format!("{:?}", shown.input)))
}

fn digest_text(digest: Option<Digest>) -> String {
    digest.map_or("nothing".to_owned(), |digest| digest.to_string())
}

/// Debug texts escape control characters, so a terminal is safe from them.
fn cut(text: &str) -> String {
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}
