//! `caravan`, the one binary. Each subcommand is a module with its arguments and its `run`;
//! here they are only put together, and errors are told in one way.

mod audit;
mod chaos;
mod commands;
mod config;
mod engine_logits;
mod estimate;
mod fits;
mod job;
mod preparing;
mod run_data;
mod run_dir;
mod supervisor;
mod telemetry;
mod view;
mod watch;

use caravan_worker::Exit;
use clap::{Parser, Subcommand};
use commands::train::TrainError;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

/// Elastic training of Llama-family models: workers may come, go and die, and the weights
/// come out with the same bits.
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train: the main job, with a coordinator and worker processes on this machine.
    Train(job::Args),
    /// Coordinate a run whose workers are started elsewhere.
    Coordinator(job::Args),
    /// Join a run as a worker.
    Worker(commands::worker::Args),
    /// Print a run file as understood, with everything derived from it.
    Config(commands::config::Args),
    /// Show what a step was, or will be, trained on: tokens, text, sources, loss mask.
    Inspect(commands::inspect::Args),
    /// Prove from its ledger that every sample of a run counted exactly once.
    Audit(commands::audit::Args),
    /// Tell the coordinator's core again what it was told, and compare what it decides.
    Replay(commands::replay::Args),
    /// Kill, stop and cut off workers of a run on purpose, and compare its bits with a quiet run's.
    Chaos(commands::chaos::Args),
    /// Generate text from a checkpoint.
    Generate(commands::generate::Args),
    /// Score given texts: how likely a checkpoint finds each of their tokens.
    Score(commands::score::Args),
    /// Convert a model between checkpoints, Hugging Face's and Meta's layout.
    Convert(commands::convert::Args),
    /// Show a run at this moment.
    Status(commands::status::Args),
}

/// Why a subcommand does not end well.
type Failure = Box<dyn Error + Send + Sync>;

/// What a subcommand ends with.
type Outcome = Result<(), Failure>;

/// Says something to whoever is watching. Standard output is for results.
fn say(text: &str) {
    // Where standard error is closed, nobody is watching.
    writeln!(io::stderr(), "{text}").ok();
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = io::stdout();
    let outcome = match cli.command {
        Command::Train(args) => commands::train::run(&args, &mut out),
        Command::Coordinator(args) => commands::coordinator::run(&args),
        Command::Worker(args) => match commands::worker::run(&args) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Command::Config(args) => commands::config::run(&args, &mut out),
        Command::Inspect(args) => commands::inspect::run(&args, &mut out),
        Command::Audit(args) => commands::audit::run(&args, &mut out),
        Command::Replay(args) => commands::replay::run(&args, &mut out),
        Command::Chaos(args) => commands::chaos::run(&args, &mut out),
        Command::Generate(args) => commands::generate::run(&args, &mut out),
        Command::Score(args) => commands::score::run(&args, &mut out),
        Command::Convert(args) => commands::convert::run(&args, &mut out),
        Command::Status(args) => commands::status::run(&args, &mut out),
    };
    match outcome.and_then(|()| Ok(out.flush()?)) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads the output has seen enough, as in `caravan config … | head`.
        Err(error) if is_broken_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {}", with_causes(&*error)));
            exit_code(&*error)
        }
    }
}

/// 1, but for a run that stopped before a step that is not finite, which is no fault of a machine.
fn exit_code(error: &(dyn Error + 'static)) -> ExitCode {
    match error.downcast_ref() {
        Some(TrainError::NonFinite(_)) => ExitCode::from(Exit::NonFinite as u8),
        _ => ExitCode::FAILURE,
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    let io = error.downcast_ref::<io::Error>().map(io::Error::kind);
    let json = error.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind);
    io.or(json) == Some(io::ErrorKind::BrokenPipe)
}

/// An error with its causes, a line each; a cause that its effect has told already is left
/// out.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let told = error.to_string();
        if !text.contains(&told) {
            text.push_str("\n  because: ");
            text.push_str(&told);
        }
        cause = error.source();
    }
    text
}
