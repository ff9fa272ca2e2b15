//! `caravan status`: a run at this moment, from its coordinator.

use crate::run_dir::RunDir;
use crate::{Failure, Outcome, view};
use caravan_checkpoint::newest_intact;
use caravan_types::status::Snapshot;
use caravan_wire::{Timeouts, connect, pb};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A coordinator that is there answers in milliseconds; a person waits this long.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the subcommand takes.
#[derive(clap::Args)]
pub struct Args {
    /// HOST:PORT of the coordinator, as it printed it.
    #[arg(conflicts_with = "run", required_unless_present = "run")]
    address: Option<String>,
    /// The run's folder, or its name where it is in .caravan/runs.
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Print JSON, with everything.
    #[arg(long)]
    json: bool,
}

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
enum StatusError {
    #[error("the run {run} is not running; it finished with step {steps}, whose checkpoint is in {}", dir.display())]
    Finished { run: String, steps: u64, dir: PathBuf },
    #[error(
        "the run {run} is not running; {last}. The `caravan train` command that started it goes on from there"
    )]
    NotRunning { run: String, last: String },
    #[error("the coordinator at {address} did not answer as it should: {reason}")]
    Refused { address: String, reason: String },
}

/// Prints the status.
pub fn run(args: &Args, out: &mut dyn Write) -> Outcome {
    let address = match (&args.address, &args.run) {
        (Some(address), _) => address.clone(),
        (None, Some(run)) => address_of(run)?,
        (None, None) => String::new(),
    };
    let address = address.trim_start_matches("http://").trim_end_matches('/').to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let snapshot = runtime.block_on(ask(&address))?;
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &snapshot)?;
        writeln!(out)?;
    } else {
        print(&snapshot, out)?;
    }
    Ok(())
}

fn address_of(run: &Path) -> Result<String, Failure> {
    let run = RunDir::find(run)?;
    if let Some(address) = run.address()? {
        return Ok(address);
    }
    let (name, steps) = (run.spec().name.clone(), run.spec().recipe.steps);
    let last = match newest_intact(&run.checkpoints())?.checkpoint {
        Some(checkpoint) if checkpoint.manifest().step.0 == steps => {
            return Err(StatusError::Finished { run: name, steps, dir: checkpoint.dir().to_owned() }.into());
        }
        Some(checkpoint) => {
            format!("its newest checkpoint is of step {} of {steps}", checkpoint.manifest().step)
        }
        None => "it has no checkpoint yet".to_owned(),
    };
    Err(StatusError::NotRunning { run: name, last }.into())
}

async fn ask(address: &str) -> Result<Snapshot, Failure> {
    let timeouts = Timeouts { connect: PATIENCE, keep_alive: PATIENCE, keep_alive_timeout: PATIENCE };
    let mut client = connect(address, timeouts).await?;
    let refused = |reason: String| StatusError::Refused { address: address.to_owned(), reason };
    let answer = tokio::time::timeout(PATIENCE, client.status(pb::StatusRequest {})).await;
    let answer = answer.map_err(|_| refused(format!("nothing came within {PATIENCE:?}")))?;
    let answer = answer.map_err(|status| refused(status.message().to_owned()))?;
    Ok(Snapshot::try_from(answer.into_inner())?)
}

fn print(s: &Snapshot, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "run {}: {}, {}", s.run, s.phase, s.generation)?;
    match &s.last {
        Some(last) => writeln!(out, "{}", view::step_line(last, s.steps, s.eta_seconds))?,
        None => writeln!(out, "step {}/{}", s.step, s.steps)?,
    }
    if let Some(step) = s.checkpoint {
        writeln!(out, "newest checkpoint: step {step}")?;
    }
    if s.skipped > 0 {
        let steps = if s.skipped == 1 { "step was" } else { "steps were" };
        writeln!(out, "{} {steps} skipped: a loss or gradient was not finite", s.skipped)?;
    }
    if s.workers.is_empty() {
        return writeln!(out, "no workers");
    }
    writeln!(
        out,
        "\n{:<8}{:<28}{:<10}{:>7}  {:<12}{:>8}  last heard",
        "worker", "name", "lanes", "slices", "activity", "step"
    )?;
    for w in &s.workers {
        let lanes = match w.lanes {
            _ if !w.member => "joining".to_owned(),
            (from, to) if from == to => "none".to_owned(),
            (from, to) => format!("{from}..{to}"),
        };
        writeln!(
            out,
            "{:<8}{:<28}{lanes:<10}{:>7}  {:<12}{:>8}  {:.1} s ago",
            w.worker.to_string(),
            w.name,
            w.owned_slices,
            w.activity.to_string(),
            w.applied.0,
            w.silent_ms as f64 / 1000.0,
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::testing::Tiny;
    use caravan_types::message::Activity;
    use caravan_types::status::{Phase, WorkerStatus};
    use caravan_types::{Generation, Step, WorkerId};

    #[test]
    fn a_run_that_is_not_running_says_from_where_it_would_go_on() {
        let tiny = Tiny::new();
        tiny.checkpoint(7);
        let args = Args { address: None, run: Some(tiny.run.path().to_owned()), json: false };
        let error = run(&args, &mut Vec::new()).unwrap_err().to_string();
        assert!(
            error.starts_with("the run tiny is not running; its newest checkpoint is of step 7 of 10."),
            "{error}"
        );
        tiny.checkpoint(10);
        let error = run(&args, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.starts_with("the run tiny is not running; it finished with step 10"), "{error}");
    }

    #[test]
    fn an_address_where_nobody_listens_is_named() {
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let args = Args { address: Some(format!("http://127.0.0.1:{port}/")), run: None, json: false };
        let error = run(&args, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains(&format!("no coordinator answers at 127.0.0.1:{port}")), "{error}");
    }

    #[test]
    fn every_worker_has_a_line() {
        let worker = WorkerStatus {
            worker: WorkerId(4),
            name: "host:12".into(),
            member: true,
            lanes: (0, 8),
            owned_slices: 20,
            activity: Activity::Computing,
            applied: Step(3),
            silent_ms: 120,
        };
        let joining = WorkerStatus { worker: WorkerId(5), member: false, ..worker.clone() };
        let snapshot = Snapshot {
            run: "r".into(),
            phase: Phase::Running,
            generation: Generation(2),
            step: Step(3),
            steps: 9,
            checkpoint: Some(Step(2)),
            skipped: 1,
            workers: vec![worker, joining],
            ..Snapshot::default()
        };
        let mut out = Vec::new();
        print(&snapshot, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.starts_with("run r: running, g2\nstep 3/9\nnewest checkpoint: step 2\n1 step was skipped: "),
            "{text}"
        );
        let row = text.lines().find(|l| l.starts_with("w4")).unwrap();
        assert_eq!(
            row.split_whitespace().collect::<Vec<_>>().join(" "),
            "w4 host:12 0..8 20 computing 3 0.1 s ago"
        );
        assert!(text.lines().any(|l| l.starts_with("w5") && l.contains("joining")), "{text}");
    }
}
