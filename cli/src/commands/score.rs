//! `caravan score`: how likely a checkpoint finds given texts, token by token.
//!
//! A line of JSON in, a line of JSON out, in the same order. What is read ahead is a window of
//! some thousand tokens, of which the engine makes micro-batches of texts of similar length; a
//! line's result does not depend on its neighbours, to the bit. Where a line is bad, those
//! before it are scored and written first.
//!
//! A line is one document: `text` gets `<s>` in front, as in training; `tokens` are taken as
//! they are, and a `<s>` among them hides nothing that is before it.

mod lines;

use self::lines::{BadLine, Line, Lines, Why};
use super::open::open;
use crate::config::cores;
use crate::estimate::grouped;
use crate::{Outcome, say};
use caravan_checkpoint::Checkpoint;
use caravan_data::Tokenizer;
use caravan_engine::{Model, Score, fastest};
use caravan_kernels::{Bf16, Cpu, Element, Family};
use caravan_types::{ModelShape, Precision};
use serde::Serialize;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Tokens that are read ahead: some micro-batches, so that texts of similar length meet.
const WINDOW_TOKENS: usize = 1 << 14;

/// Lines that are read ahead, where they have few tokens.
const WINDOW_LINES: usize = 1 << 12;

/// What the subcommand takes.
#[derive(clap::Args)]
pub struct Args {
    /// A checkpoint, or a run's folder for its newest one.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// What to score, a line each: {"text": …, "continuation": …} or {"tokens": […], "from": …},
    /// the second field of each may be left out. Standard input unless given.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Where the scores go; standard output unless given.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Compute threads; all cores unless given.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

/// Why nothing, or not everything, is scored.
#[derive(Debug, thiserror::Error)]
enum ScoreError {
    #[error("cannot {action} {}: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is both input and output: writing it would lose what is to be read", .0.display())]
    Same(PathBuf),
    #[error("{bad}. The {before} lines before it are scored")]
    Line { bad: BadLine, before: u64 },
    #[error("cannot score: {0}")]
    Model(String),
}

/// What is written for a line.
#[derive(Serialize)]
struct Scored<'a> {
    /// Natural logarithms; nothing predicts the first token.
    logprobs: Vec<Option<f64>>,
    /// Of the continuation's logarithms.
    sum: f64,
    /// Whether each token is the likeliest one; of several alike, the lowest.
    greedy: Vec<Option<bool>>,
    /// Where the continuation starts.
    from: usize,
    tokens: &'a [u32],
}

/// What was scored so far.
#[derive(Default)]
struct Total {
    lines: u64,
    tokens: u64,
    continuation: u64,
    sum: f64,
}

/// Scores the input.
pub fn run(args: &Args, out: &mut dyn Write) -> Outcome {
    let checkpoint = open(&args.checkpoint)?;
    let threads = args.threads.map_or(cores() as usize, usize::from);
    let stdin = Path::new("standard input");
    let (mut input, name): (Box<dyn BufRead>, &Path) = match &args.input {
        Some(path) => (Box::new(BufReader::new(File::open(path).map_err(failed("read", path))?)), path),
        None => (Box::new(io::stdin().lock()), stdin),
    };
    match &args.output {
        Some(path) => {
            let same = |input: &PathBuf| fs::canonicalize(input).ok() == fs::canonicalize(path).ok();
            if path.exists() && args.input.as_ref().is_some_and(same) {
                return Err(ScoreError::Same(path.clone()).into());
            }
            let mut file = File::create(path).map_err(failed("write", path))?;
            score(&checkpoint, threads, (&mut *input, name), (&mut file, path))
        }
        None => score(&checkpoint, threads, (&mut *input, name), (out, Path::new("standard output"))),
    }
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> ScoreError {
    move |source| ScoreError::File { action, path: path.to_owned(), source }
}

/// Scores the lines of an input into an output; both come with their names.
fn score(
    checkpoint: &Checkpoint,
    threads: usize,
    (input, name): (&mut dyn BufRead, &Path),
    (out, out_name): (&mut dyn Write, &Path),
) -> Outcome {
    let spec = &checkpoint.manifest().spec;
    let mut lines = Lines {
        input,
        name: name.display().to_string(),
        tokenizer: checkpoint.tokenizer().map(|path| Tokenizer::load(&path)).transpose()?,
        vocab: spec.model.vocab,
        context: spec.model.context,
        number: 0,
    };
    // The run's family gives its bits; another one's scores may differ in their last digits.
    let precision = spec.numerics.precision;
    let family = Family::named(&spec.numerics.family).unwrap_or_else(|| fastest(precision));
    let cpu = Cpu::new(threads, family)?;
    let weights = checkpoint.weights()?;
    match precision {
        Precision::Fp32 => score_in(&cpu, &spec.model, &weights, &mut lines, (out, out_name)),
        Precision::Mixed => {
            let weights: Vec<Bf16> = weights.into_iter().map(Bf16::narrow).collect();
            score_in(&cpu, &spec.model, &weights, &mut lines, (out, out_name))
        }
    }
}

/// Scores lines with weights as they are computed with, window by window.
fn score_in<E: Element>(
    cpu: &Cpu,
    shape: &ModelShape,
    weights: &[E],
    lines: &mut Lines<'_>,
    (out, out_name): (&mut dyn Write, &Path),
) -> Outcome {
    let mut model = Model::<E>::new(shape)?;
    let mut out = BufWriter::new(out);
    let (start, mut total) = (Instant::now(), Total::default());
    let bad = loop {
        let (window, end) = window(lines);
        let texts: Vec<&[u32]> = window.iter().map(|line| line.tokens.as_slice()).collect();
        let scores = model.score(cpu, weights, &texts).map_err(ScoreError::Model)?;
        let finite = |scores: &[Score]| scores.iter().all(|score| score.log_prob.is_finite());
        let sound = scores.iter().take_while(|scores| finite(scores)).count();
        let written = window.iter().zip(&scores).take(sound);
        let written = written.map(|(line, scores)| write(line, scores, &mut total, &mut out));
        let written = written.collect::<io::Result<()>>().and_then(|()| out.flush());
        written.map_err(|e| broken_or(e, out_name))?;
        match end {
            _ if sound < window.len() => break Some(lines.bad(window[sound].number, Why::NotFinite)),
            End::More => {}
            End::Done => break None,
            End::Bad(bad) => break Some(bad),
        }
    };
    total.tell(start.elapsed().as_secs_f64(), cpu.family());
    bad.map_or(Ok(()), |bad| Err(ScoreError::Line { bad, before: total.lines }.into()))
}

/// A reader who has seen enough is no failure, and is known by the error itself.
fn broken_or(error: io::Error, path: &Path) -> crate::Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => error.into(),
        _ => failed("write", path)(error).into(),
    }
}

/// Why a window has no more lines.
enum End {
    More,
    Done,
    Bad(BadLine),
}

fn window(lines: &mut Lines<'_>) -> (Vec<Line>, End) {
    let (mut window, mut tokens) = (Vec::new(), 0);
    while tokens < WINDOW_TOKENS && window.len() < WINDOW_LINES {
        match lines.next() {
            Ok(Some(line)) => {
                tokens += line.tokens.len();
                window.push(line);
            }
            Ok(None) => return (window, End::Done),
            Err(bad) => return (window, End::Bad(bad)),
        }
    }
    (window, End::More)
}

/// Writes what came of a line, whose scores are those of its tokens from the second on.
fn write(line: &Line, scores: &[Score], total: &mut Total, out: &mut dyn Write) -> io::Result<()> {
    let sum = scores[(line.from - 1).min(scores.len())..].iter().fold(0.0, |sum, s| sum + s.log_prob);
    let scored = Scored {
        logprobs: [None].into_iter().chain(scores.iter().map(|s| Some(s.log_prob))).collect(),
        sum,
        greedy: [None].into_iter().chain(scores.iter().map(|s| Some(s.greedy))).collect(),
        from: line.from,
        tokens: &line.tokens,
    };
    serde_json::to_writer(&mut *out, &scored)?;
    out.write_all(b"\n")?;
    total.lines += 1;
    total.tokens += line.tokens.len() as u64;
    total.continuation += (line.tokens.len() - line.from) as u64;
    total.sum += sum;
    Ok(())
}

impl Total {
    fn tell(&self, seconds: f64, family: Family) {
        let Self { lines, tokens, continuation, sum } = self;
        let speed = grouped((*tokens as f64 / seconds.max(1e-9)) as u64);
        say(&format!(
            "scored {} lines, {} tokens in {seconds:.1} s ({speed} tokens/s, {family})",
            grouped(*lines),
            grouped(*tokens),
        ));
        if *continuation > 0 {
            let mean = -sum / *continuation as f64;
            let perplexity = mean.exp();
            say(&format!(
                "{} tokens of continuations: {mean:.4} nats each, perplexity {perplexity:.4}",
                grouped(*continuation),
            ));
        }
    }
}

#[cfg(test)]
mod tests;
