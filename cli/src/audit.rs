//! The audit of a run: from the ledger, the data and the checkpoints alone.
//!
//! Nothing that is written in the ledger is believed because it is there. The chain of hashes
//! says whether a line is the one that was written; what the lines say is recomputed: which
//! steps there are, which samples they had, which sequences of the data those are, and how many
//! tokens of them count. Whoever forges a ledger with hashes that fit still has to tell a
//! history that adds up.
//!
//! Checks go on behind the first thing that is wrong, since the second one often says what the
//! first one was: a line whose hash does not fit, together with a step that is missing, is a line
//! that was taken out.

mod data;
mod history;

#[cfg(test)]
mod tests;

use crate::run_dir::RunDir;
use crate::{Failure, run_data};
use caravan_checkpoint::{Checkpoint, complete_steps};
use caravan_coordinator::ledger::{Reader, spec_digest};
use caravan_types::{Digest, Step};
use history::{Counted, History};
use serde::Serialize;
use std::fmt;
use std::io;
use std::path::PathBuf;

/// What an audit found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The run's name.
    pub run: String,
    /// Whether all checks hold.
    pub holds: bool,
    /// Steps of the committed history.
    pub steps: u64,
    /// Those of them that passed without an update.
    pub skipped: u64,
    /// Samples of them, of skipped ones included.
    pub samples: u64,
    /// Counted tokens of them, as the ledger says.
    pub tokens: u64,
    /// Hash of the ledger's last line: whoever keeps it can tell later whether lines were taken
    /// from the end.
    pub head: Option<Digest>,
    /// The checks.
    pub checks: Vec<Check>,
}

/// One thing that was checked.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What.
    pub subject: Subject,
    /// Whether it holds.
    pub holds: bool,
    /// What was found, in words: one line where it holds.
    pub found: Vec<String>,
}

/// What an audit checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// Every line has the hash over the line before it and itself.
    Chain,
    /// The ledger is of a version that this program reads.
    Format,
    /// It is that of this run.
    RunSpec,
    /// Every step is there once, after ways back.
    History,
    /// Generations only rise.
    Generations,
    /// The sample numbers of the steps leave no gap and do not overlap.
    Samples,
    /// The samples of an epoch are distinct sequences.
    Sequences,
    /// The counted tokens are those of the data.
    Tokens,
    /// Checkpoints are of steps of the history.
    Checkpoints,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chain => "chain",
            Self::Format => "format",
            Self::RunSpec => "run spec",
            Self::History => "history",
            Self::Generations => "generations",
            Self::Samples => "samples",
            Self::Sequences => "sequences",
            Self::Tokens => "tokens",
            Self::Checkpoints => "checkpoints",
        })
    }
}

/// Faults of one kind that are told; a ledger that is wrong in one place is often wrong in all
/// places after it.
const MOST_TOLD: usize = 5;

/// What is wrong with one subject.
#[derive(Debug, Default)]
struct Faults {
    told: Vec<String>,
    more: u64,
}

impl Faults {
    fn add(&mut self, fault: impl FnOnce() -> String) {
        if self.told.len() < MOST_TOLD { self.told.push(fault()) } else { self.more += 1 }
    }

    /// The verdict; `good` is what is said where nothing is wrong.
    fn check(self, subject: Subject, good: impl FnOnce() -> String) -> Check {
        let Self { told: mut found, more } = self;
        let holds = found.is_empty();
        if holds {
            found.push(good());
        } else if more > 0 {
            found.push(format!("and {more} more"));
        }
        Check { subject, holds, found }
    }
}

/// Why there is nothing to audit.
#[derive(Debug, thiserror::Error)]
enum AuditError {
    #[error(
        "the run has no ledger at {}: it has not been started since there are ledgers, or the file was moved away",
        .0.display()
    )]
    NoLedger(PathBuf),
    #[error("cannot read the ledger {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
}

/// Audits a run.
///
/// # Errors
/// Where there is no ledger, or it cannot be read; what is wrong with it is in the report.
pub fn audit(run: &RunDir) -> Result<Report, Failure> {
    let path = run.ledger();
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => AuditError::NoLedger(path.clone()),
        _ => AuditError::Read { path: path.clone(), source },
    };
    // Checkpoints first: a run that is going on commits a step before it has a checkpoint of it.
    let checkpoints = complete_steps(&run.checkpoints())?;
    let mut history = History::new(spec_digest(run.spec()));
    let mut reader = Reader::open(&path).map_err(failed)?;
    while let Some(line) = reader.next_line().map_err(failed)? {
        history.read(line);
    }
    let told = history.finish(&path).map_err(failed)?;
    let per_step = run.spec().batch.sequences_per_step();
    let mut checks = told.checks;
    if told.readable {
        checks.extend(of_data(run, &told.steps, told.base, per_step));
        checks.push(of_checkpoints(run, &checkpoints, told.base, &told.steps));
    }
    let steps = told.steps.len() as u64;
    Ok(Report {
        run: run.spec().name.clone(),
        holds: checks.iter().all(|check| check.holds),
        steps,
        skipped: told.steps.iter().filter(|step| step.skipped).count() as u64,
        samples: steps.saturating_mul(per_step),
        tokens: told.steps.iter().fold(0, |sum, step| sum.saturating_add(step.tokens)),
        head: told.head,
        checks,
    })
}

/// The steps' samples are those of the data.
fn of_data(run: &RunDir, steps: &[Counted], base: Step, per_step: u64) -> [Check; 3] {
    let (samples, sound) = data::samples(steps, base, per_step);
    match run_data::sampler(run) {
        Ok(sampler) => [samples, data::sequences(&sampler, &sound), data::tokens(&sampler, &sound)],
        Err(error) => {
            let unknown = |subject| {
                let found = vec![format!("cannot be checked: {error}")];
                Check { subject, holds: false, found }
            };
            [samples, unknown(Subject::Sequences), unknown(Subject::Tokens)]
        }
    }
}

/// Complete checkpoints are of steps that were committed.
fn of_checkpoints(run: &RunDir, checkpoints: &[Step], base: Step, steps: &[Counted]) -> Check {
    let mut faults = Faults::default();
    let mut damaged = 0u64;
    let newest = steps.last().map_or(base, |s| s.step);
    for step in checkpoints {
        if *step == base || steps.binary_search_by_key(step, |s| s.step).is_ok() {
            continue;
        }
        // The run passes over a damaged one; it may be of a step that is still to come again.
        match Checkpoint::of_step(&run.checkpoints(), *step) {
            Ok(_) => faults.add(|| {
                format!(
                    "there is a checkpoint of step {step}, which is not in the history (its newest step is {newest})"
                )
            }),
            Err(_) => damaged += 1,
        }
    }
    faults.check(Subject::Checkpoints, || {
        let good: Vec<String> = checkpoints.iter().rev().map(ToString::to_string).collect();
        let passed = if damaged > 0 { format!("; {damaged} damaged") } else { String::new() };
        match good.as_slice() {
            [] => "there is none yet".to_owned(),
            [one] => format!("1, of step {one}{passed}"),
            all => format!("{}, of steps {}{passed}", all.len(), all.join(", ")),
        }
    })
}
