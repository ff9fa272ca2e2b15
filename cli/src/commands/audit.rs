//! `caravan audit`: the proof that every sample counted exactly once.

use crate::Outcome;
use crate::audit::{Report, audit};
use crate::estimate::grouped;
use crate::run_dir::RunDir;
use std::io::{self, Write};
use std::path::PathBuf;

/// What the subcommand takes.
#[derive(clap::Args)]
pub struct Args {
    /// The run's folder, or its name where it is in .caravan/runs.
    run: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What an audit that finds something ends with.
#[derive(Debug, thiserror::Error)]
#[error("{failed} of {all} checks do not hold: the history of {run} is not proved")]
struct NotProved {
    failed: usize,
    all: usize,
    run: String,
}

/// Audits a run and prints what was found.
pub fn run(args: &Args, out: &mut dyn Write) -> Outcome {
    let report = audit(&RunDir::find(&args.run)?)?;
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &report)?;
        writeln!(out)?;
    } else {
        print(&report, out)?;
    }
    let failed = report.checks.iter().filter(|check| !check.holds).count();
    if failed > 0 {
        return Err(NotProved { failed, all: report.checks.len(), run: report.run }.into());
    }
    Ok(())
}

fn print(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    for check in &report.checks {
        let verdict = if check.holds { "holds" } else { "FAILS" };
        let name = check.subject.to_string();
        let mut lines = check.found.iter();
        writeln!(out, "{verdict}  {name:<12}  {}", lines.next().map_or("", String::as_str))?;
        lines.try_for_each(|line| writeln!(out, "{:21}{line}", ""))?;
    }
    if report.holds {
        writeln!(
            out,
            "{}: each of the {} samples of its {} steps counted exactly once",
            report.run,
            grouped(report.samples),
            grouped(report.steps),
        )?;
    }
    Ok(())
}
