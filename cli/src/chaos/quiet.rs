//! The quiet run: what a run with faults is compared with. One is made, or one that is there is
//! taken, so that many seeds need only one.

use crate::Failure;
use crate::job::Job;
use crate::run_dir::{Difference, RunDir, RunDirError, differences};
use caravan_checkpoint::newest_intact;
use caravan_types::status::StepMetrics;
use caravan_types::{Digest, Step};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a quiet run has come to.
#[derive(Clone, Copy, Debug)]
pub struct Quiet {
    /// Its weights.
    pub weights: Digest,
    /// What its steps took together.
    pub time: Duration,
}

/// Why a run is nothing to compare with.
#[derive(Debug, thiserror::Error)]
pub enum NotQuiet {
    /// It does something else.
    #[error(
        "{} is another run, whose weights say nothing about this one's:{}\nName a run of the same file with --quiet, or \
         leave that out to have one made",
        .0.display(), list(.1)
    )]
    Other(PathBuf, Vec<Difference>),
    /// It has not done all its steps.
    #[error(
        "{} is at step {step} of {steps}: finish it first with `caravan train`, or leave out --quiet to have one made",
        path.display()
    )]
    Unfinished {
        /// The run's folder.
        path: PathBuf,
        /// The step of its newest checkpoint.
        step: Step,
        /// Those of the run.
        steps: u64,
    },
    /// Its metrics do not say how long it took.
    #[error("{} does not say how long the run took: {why}. Leave out --quiet to have one made", path.display())]
    Metrics {
        /// The metrics file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It cannot be opened.
    #[error(transparent)]
    Folder(#[from] RunDirError),
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(|d| format!("\n  {d}")).collect()
}

impl Quiet {
    /// What a run in this folder has come to, which must be finished and do what `job` does.
    ///
    /// # Errors
    /// Where it is not such a run.
    pub fn read(folder: &Path, job: &Job) -> Result<Self, Failure> {
        let run = RunDir::find(folder)?;
        let path = || run.path().to_owned();
        if run.spec() != job.run.spec() {
            return Err(NotQuiet::Other(path(), differences(run.spec(), job.run.spec())).into());
        }
        let steps = job.settings.recipe.steps;
        let newest = newest_intact(&run.checkpoints())?.checkpoint;
        let step = newest.as_ref().map_or(Step(0), |checkpoint| checkpoint.manifest().step);
        let checkpoint = newest.filter(|_| step.0 >= steps);
        let checkpoint = checkpoint.ok_or_else(|| NotQuiet::Unfinished { path: path(), step, steps })?;
        Ok(Self { weights: checkpoint.weights_hash(), time: time(&run.metrics())? })
    }
}

/// What the steps of a metrics file took together.
fn time(path: &Path) -> Result<Duration, NotQuiet> {
    let damaged = |why: String| NotQuiet::Metrics { path: path.to_owned(), why };
    let text = std::fs::read_to_string(path).map_err(|error| damaged(error.to_string()))?;
    let steps = text.lines().filter_map(|line| serde_json::from_str::<StepMetrics>(line).ok());
    let seconds: f64 = steps.map(|step| step.tokens as f64 / step.tokens_per_second).sum();
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err(damaged("it has no steps with their times".into())),
    }
}
