//! A job: a run file with what it leads to, ready to be started.

use crate::config::{self, Kernels, Override, Settings};
use crate::fits;
use crate::preparing::Preparing;
use crate::run_dir::{RunDir, RunDirError};
use crate::say;
use crate::telemetry::{self, Guard, LogTarget};
use caravan_checkpoint::{Found, Refused, newest_intact_until};
use caravan_coordinator::{Options, ledger};
use caravan_data::{DataError, Dataset, Prepared, Sampler, prepare};
use caravan_pretrained::Folder;
use caravan_types::{DataSpec, Initial, RunSpec, Step};
use caravan_worker::{InitialError, Listing};
use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Text became tokens that mean nothing to the weights.
#[derive(Debug, thiserror::Error)]
#[error(
    "the data is text, and {} has no tokenizer that could be used on it: tokens of any other mean nothing to its weights. \
     Give the right one as data.tokenizer, or train on tokens that are ready",
    .0.display()
)]
struct NoTokenizer(PathBuf);

/// What `train`, `coordinator` and `chaos` take.
#[derive(Clone, clap::Args)]
pub struct Args {
    /// The run file.
    pub file: PathBuf,
    /// Worker processes, instead of cluster.workers.
    #[arg(long, value_name = "N")]
    pub workers: Option<u32>,
    /// Length of the run in steps, instead of recipe.steps.
    #[arg(long, value_name = "N")]
    pub steps: Option<u32>,
    /// Folder of the run; by default .caravan/runs/NAME.
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// Train on these instead of data.paths: folders, text, JSONL or Parquet files.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// Use this value instead of the file's; KEY is dotted, as in recipe.learning_rate=1e-3.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// Everything that a coordinator needs, checked and at hand.
pub struct Job {
    /// The run file as understood.
    pub settings: Settings,
    /// The run's folder, with its spec.
    pub run: RunDir,
    /// The log file of this process.
    pub log: PathBuf,
    prepared: Prepared,
    found: Found,
    /// Where this job is what the process is for.
    #[allow(dead_code, reason = "it is kept to be dropped")]
    telemetry: Option<Guard>,
}

impl Args {
    /// The run file as understood, where all workers are to be on this machine and fit there.
    ///
    /// # Errors
    /// With what is wrong in the file, or what would fit.
    pub fn fits_here(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(fits::check(&config::load(&self.file, &self.overrides())?)?)
    }

    fn overrides(&self) -> Vec<Override> {
        let mut all: Vec<Override> = self.set.iter().map(|s| Override::set(s)).collect();
        if let Some(workers) = self.workers {
            all.push(Override::new("--workers", "cluster.workers", i64::from(workers)));
        }
        if let Some(steps) = self.steps {
            all.push(Override::new("--steps", "recipe.steps", i64::from(steps)));
        }
        if !self.data.is_empty() {
            let paths: Vec<String> = self.data.iter().map(|p| p.to_string_lossy().into_owned()).collect();
            all.push(Override::new("--data", "data.paths", paths));
        }
        all
    }
}

impl Job {
    /// Checks the run file, prepares the data, opens the run's folder and looks for a checkpoint
    /// to go on from.
    ///
    /// # Errors
    /// With the first of these that does not work; nothing was started then.
    pub fn prepare(args: &Args) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let mut job = Self::open(args)?;
        job.telemetry = Some(telemetry::init("coordinator", &LogTarget::File(job.log.clone()))?);
        for Refused { name, reason } in &job.found.refused {
            say(&format!("checkpoint {name} is damaged and was passed over: {reason}"));
        }
        Ok(job)
    }

    /// As [`prepare`](Self::prepare), for a process that has several jobs and logs by itself.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    pub fn open(args: &Args) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let settings = config::load(&args.file, &args.overrides())?;
        for note in &settings.notes {
            say(&format!("note: {note}"));
        }
        let prepared = data(&settings)?;
        // What a worker would stumble over is better said before anything is started.
        let dataset = Dataset::open(&prepared.dir)?;
        if let (Some(dir), None, Some(_)) = (&settings.init, &settings.data.tokenizer, dataset.tokenizer()) {
            return Err(NoTokenizer(dir.clone()).into());
        }
        Sampler::new(Arc::new(dataset), settings.seed, settings.batch)?;
        let path = args.run.clone().unwrap_or_else(|| RunDir::default_path(&settings.name));
        let listing = settings.init.as_deref().map(|dir| listing(dir, &settings, &path)).transpose()?;
        let init = listing.as_ref().map_or(Initial::Seed, |l| Initial::Weights { digest: l.digest() });
        let spec = spec(&settings, init, prepared.spec.clone(), &path)?;
        let run = RunDir::start(&path, &spec, &prepared.dir)?;
        if let Some(listing) = listing {
            listing.write(&RunDir::init(&path))?;
        }
        let log = run.logs().join("coordinator.log");
        let history = ledger::newest(&run.ledger())?;
        let found = newest_intact_until(&run.checkpoints(), history)?;
        Ok(Self { settings, run, log, prepared, found, telemetry: None })
    }

    /// The step of the checkpoint that the run goes on from.
    #[must_use]
    pub fn checkpoint(&self) -> Option<Step> {
        self.found.checkpoint.as_ref().map(|c| c.manifest().step)
    }

    /// Whether all steps are done already.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.checkpoint().is_some_and(|step| step.0 >= self.settings.recipe.steps)
    }

    /// What the coordinator is started with; `recover` says whether workers of an earlier start
    /// may be alive.
    ///
    /// # Errors
    /// Where a folder is gone meanwhile.
    pub fn options(&mut self, recover: bool) -> io::Result<Options> {
        let cluster = &self.settings.cluster;
        Ok(Options {
            spec: self.run.spec().clone(),
            store: self.run.store(),
            checkpoints: self.run.checkpoints().canonicalize()?,
            ledger: self.run.ledger(),
            control: self.run.control(),
            metrics: self.run.metrics(),
            data: self.prepared.dir.canonicalize()?,
            init: self
                .settings
                .init
                .as_ref()
                .map(|_| RunDir::init(self.run.path()).canonicalize())
                .transpose()?,
            tokenizer: Some(self.prepared.dir.join("tokenizer.json")).filter(|t| t.exists()),
            listen: cluster.listen,
            recompute: self.settings.recompute,
            redundancy: cluster.redundancy,
            stages: Some(cluster.stages).filter(|stages| *stages > 0),
            workers: cluster.workers,
            timing: cluster.timing,
            stragglers: cluster.stragglers,
            checkpoint_every: cluster.checkpoint_every,
            keep_checkpoints: cluster.keep as usize,
            checkpoint: self.checkpoint(),
            refused: std::mem::take(&mut self.found.refused),
            recover,
        })
    }
}

/// The prepared data, found or made now.
fn data(settings: &Settings) -> Result<Prepared, DataError> {
    let prepared = prepare(&settings.data, &RunDir::data_cache(), &Preparing::new())?;
    say(&format!("data: {} tokens, {}; {}", prepared.spec.tokens, prepared.origin, prepared.report));
    Ok(prepared)
}

/// What the weights in a folder are: as the run's folder has it, or read now.
fn listing(dir: &Path, settings: &Settings, path: &Path) -> Result<Listing, InitialError> {
    let folder = Folder::open(dir, Some(settings.model.context))?;
    if let Some(known) = Listing::known(&RunDir::init(path), &folder) {
        return Ok(known);
    }
    say(&format!("reading the weights in {} …", dir.display()));
    Listing::new(&folder)
}

/// The run spec. A run that was started keeps its instruction family wherever it goes on.
fn spec(settings: &Settings, init: Initial, data: DataSpec, path: &Path) -> Result<RunSpec, RunDirError> {
    let family = match &settings.kernels {
        Kernels::Named(name) => name.clone(),
        Kernels::Auto => match RunDir::peek(path)? {
            Some(there) => there.numerics.family,
            None => caravan_engine::fastest(settings.precision).name().to_owned(),
        },
    };
    Ok(settings.spec(init, data, &family))
}
