//! `cargo run -p tests --release -- sim --seeds N [--first SEED]`: more of the simulation than a
//! test run has time for. `--seed SEED` replays one and prints what happened in it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

use std::process::ExitCode;
use std::time::Instant;
use tests::sim::{Options, run};
use tests::sweep::{Sweep, Truths};

fn number(name: &str) -> Option<u64> {
    let mut args = std::env::args().skip_while(|arg| arg != name);
    args.nth(1).and_then(|value| value.parse().ok())
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() != Some("sim") {
        eprintln!("usage: sim --seeds N [--first SEED]   or   sim --seed SEED");
        return ExitCode::from(2);
    }
    if let Some(seed) = number("--seed") {
        return replay(seed);
    }
    let (first, seeds) = (number("--first").unwrap_or(0), number("--seeds").unwrap_or(1000));
    let begin = Instant::now();
    match Sweep::run(first..first + seeds, None) {
        Ok(sweep) => {
            let seconds = begin.elapsed().as_secs_f64();
            println!("{sweep}");
            println!("{seeds} seeds in {seconds:.1} s: {:.0} an hour", seeds as f64 / seconds * 3600.0);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            println!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn replay(seed: u64) -> ExitCode {
    let options = Options::random(seed);
    println!("{options}");
    let truth = Truths::default().of(&options);
    match run(&options, Some(&truth)) {
        Ok((outcome, _)) => {
            outcome.events.iter().for_each(|event| println!("{event}"));
            println!(
                "{:?} after {} virtual ms, trace {:016x}",
                outcome.farewell, outcome.took_ms, outcome.trace
            );
            ExitCode::SUCCESS
        }
        Err(broken) => {
            broken.events.iter().for_each(|event| println!("{event}"));
            println!("{broken}");
            ExitCode::FAILURE
        }
    }
}
