//! `caravan train`: the main job on this machine. Prepares the data, starts a coordinator in
//! this process and workers in processes of their own, shows how it goes, and ends with the
//! weights.

use crate::commands::generate;
use crate::config::Settings;
use crate::job::{Args, Job};
use crate::run_dir::RunDir;
use crate::supervisor::{GOOD_LIFE, Supervisor, Worker};
use crate::watch::{Seen, Watch};
use crate::{Failure, Outcome, say};
use caravan_checkpoint::{Checkpoint, newest_intact};
use caravan_coordinator::{Running, serve};
use caravan_types::Step;
use caravan_types::message::Farewell;
use std::io::Write;
use std::path::PathBuf;

/// Tokens of the sample at the end.
const SAMPLE: usize = 96;

/// Why a run did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The coordinator ended the run.
    #[error("the run cannot go on; its last events say why, and {} has the details", .0.display())]
    Failed(PathBuf),
    /// The coordinator ended the run before a step that is not finite.
    #[error(
        "the run stopped before a step whose loss or gradient is not finite; its last event says what went bad first, \
         and {} has the details", .0.display()
    )]
    NonFinite(PathBuf),
    /// All worker processes were given up.
    #[error("no worker is left: {0}")]
    NoWorkers(String),
    /// A second Ctrl-C.
    #[error(
        "interrupted a second time: stopped without a checkpoint; the same command goes on from the last one"
    )]
    Interrupted,
}

impl TrainError {
    /// The error of a run that has ended in this way; its log has the details.
    #[must_use]
    pub fn of(farewell: Farewell, log: PathBuf) -> Self {
        if farewell == Farewell::NonFinite { Self::NonFinite(log) } else { Self::Failed(log) }
    }
}

/// Trains.
pub fn run(args: &Args, out: &mut dyn Write) -> Outcome {
    args.fits_here()?;
    let mut job = Job::prepare(args)?;
    let farewell = if job.finished() {
        say("this run is finished already");
        Farewell::Finished
    } else {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(train(&mut job))?
    };
    match farewell {
        Farewell::Finished | Farewell::Drained => conclude(args, &job, farewell, out),
        other => Err(TrainError::of(other, job.log).into()),
    }
}

/// Coordinator, workers and view, until the run has ended.
pub async fn train(job: &mut Job) -> Result<Farewell, Failure> {
    let mut running = start(job, false).await?;
    let cluster = &job.settings.cluster;
    let worker = Worker {
        program: std::env::current_exe()?,
        coordinator: running.address,
        network: None,
        threads: cluster.threads,
        logs: job.run.logs(),
        good_life: GOOD_LIFE,
    };
    let mut supervisor = Supervisor::start(vec![worker; cluster.workers as usize]);
    let ended = watch(&mut running, job.settings.recipe.steps, Some(&mut supervisor)).await;
    supervisor.ended(job.settings.cluster.timing.farewell()).await;
    running.shutdown().await;
    job.run.set_address(None)?;
    ended
}

/// Starts the coordinator in this process and says where it is. `recover` says whether workers
/// of an earlier start may be alive.
pub async fn start(job: &mut Job, recover: bool) -> Result<Running, Failure> {
    let running = serve(job.options(recover)?).await?;
    job.run.set_address(Some(&format!("http://{}", running.address)))?;
    say(&format!("run folder: {}", job.run.path().display()));
    say(&format!("live page: http://{}", running.address));
    match job.checkpoint() {
        Some(_) if job.finished() => {}
        Some(step) => say(&format!("going on from the checkpoint of step {step}")),
        None => {
            let from = match &job.settings.init {
                Some(dir) => format!("the weights in {}", dir.display()),
                None => "its seed".into(),
            };
            say(&format!("a model of {} parameters starts from {from}", job.settings.model.parameters()));
        }
    }
    Ok(running)
}

/// Shows what happens until the run has ended. The first Ctrl-C or SIGTERM drains, the second
/// one stops.
pub async fn watch(
    running: &mut Running,
    steps: u64,
    supervisor: Option<&mut Supervisor>,
) -> Result<Farewell, Failure> {
    let mut watch = Watch::new(running, steps, supervisor)?;
    let mut asked = false;
    let outcome = loop {
        match watch.next().await {
            Seen::Update(_) => {}
            Seen::Asked if asked => break Err(TrainError::Interrupted.into()),
            Seen::Asked => {
                asked = true;
                watch.stop_restarting();
                running.handle.drain().await;
            }
            Seen::Ended(ended) => break ended,
        }
    };
    watch.rest().await;
    outcome
}

/// What the run has come to.
fn conclude(args: &Args, job: &Job, farewell: Farewell, out: &mut dyn Write) -> Outcome {
    let Some(checkpoint) = newest_intact(&job.run.checkpoints())?.checkpoint else {
        say("stopped before the first step; the same command starts it again");
        return Ok(());
    };
    let step = checkpoint.manifest().step;
    let loss = final_loss(&job.run, step).map_or(String::new(), |loss| format!(", loss {loss:.4}"));
    writeln!(out, "\nstep {step} of {}{loss}", job.settings.recipe.steps)?;
    sample(&job.settings, &checkpoint, out)?;
    let folder = checkpoint.dir().display();
    writeln!(out, "checkpoint: {folder}")?;
    writeln!(out, "next: caravan generate --checkpoint {folder} --prompt '…'")?;
    if farewell == Farewell::Drained {
        writeln!(out, "      caravan train {}   goes on from step {step}", args.file.display())?;
    } else {
        writeln!(out, "      caravan inspect {} --step {step}", job.run.path().display())?;
    }
    writeln!(out, "weights: {}", checkpoint.weights_hash())?;
    Ok(())
}

/// A text by the trained model, where its tokenizer is known.
fn sample(settings: &Settings, checkpoint: &Checkpoint, out: &mut dyn Write) -> Outcome {
    if checkpoint.tokenizer().is_none() {
        return Ok(());
    }
    writeln!(out, "\nsample:")?;
    let options = generate::Options {
        max_tokens: SAMPLE,
        temperature: 0.7,
        top_p: 0.9,
        seed: settings.seed,
        ..generate::Options::default()
    };
    generate::stream(checkpoint, &settings.prompt, &options, out)?;
    writeln!(out)?;
    Ok(())
}

/// The loss of a step, from the metrics file.
fn final_loss(run: &RunDir, step: Step) -> Option<f64> {
    let text = std::fs::read_to_string(run.metrics()).ok()?;
    let lines = text.lines().rev().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    let mut of_step = lines.filter(|v| v["step"].as_u64() == Some(step.0));
    of_step.find_map(|v| v["loss"].as_f64())
}
