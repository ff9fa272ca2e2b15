//! `cargo run -p tests --release -- sim --seeds N [--first SEED]`: more of the simulation than a
//! test run has time for. `--seed SEED` replays one and prints what happened in it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

use std::process::ExitCode;
use std::time::Instant;
use tests::explore;
use tests::sim::{Options, run};
use tests::sweep::{Sweep, Truths};

fn word(name: &str) -> Option<String> {
    std::env::args().skip_while(|arg| arg != name).nth(1)
}

fn number(name: &str) -> Option<u64> {
    word(name)?.parse().ok()
}

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("sim") => {}
        Some("explore") => return exploration(),
        _ => {
            eprintln!("usage: sim --seeds N [--first SEED]   or   sim --seed SEED   or   explore --faults N");
            return ExitCode::from(2);
        }
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

fn exploration() -> ExitCode {
    let usual = explore::Options::default();
    let small = |name: &str, usual: u32| number(name).map_or(usual, |n| n.min(64) as u32);
    let kinds = word("--kinds").map(|kinds| kinds.split(',').filter_map(explore::Kind::named).collect());
    let options = explore::Options {
        faults: small("--faults", usual.faults as u32) as usize,
        kinds: kinds.unwrap_or(usual.kinds),
        steps: u64::from(small("--steps", usual.steps as u32)),
        lanes: small("--lanes", usual.lanes),
        stages: small("--stages", usual.stages),
        redundancy: small("--owners", usual.redundancy),
        skipped: number("--skipped"),
        mutant: word("--mutant").and_then(|name| explore::mutant(&name)),
        eager: !std::env::args().any(|arg| arg == "--all"),
        most_states: number("--states").map_or(usual.most_states, |n| n as usize),
    };
    println!("{options}");
    if let Some(way) = word("--replay") {
        return match explore::replay(&options, &way) {
            Ok((trace, end)) => {
                (1..).zip(&trace).for_each(|(number, line)| println!("{number:3}. {line}"));
                println!("{}", end.as_ref().err().map_or("nothing is wrong", String::as_str));
                if end.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
            }
            Err(wrong) => {
                eprintln!("{wrong}");
                ExitCode::from(2)
            }
        };
    }
    match explore::explore(&options, |report| eprintln!("so far {report}")) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(violation) => {
            println!("{violation}");
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
