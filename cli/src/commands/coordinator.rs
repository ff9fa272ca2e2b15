//! `caravan coordinator`: a coordinator without workers of its own; they join with
//! `caravan worker --join ADDRESS`, and read data and checkpoints from the same folders. One that
//! is started on a finished run tells the workers that looked for it, and ends.

use crate::Outcome;
use crate::commands::train::{TrainError, start, watch};
use crate::job::{Args, Job};
use crate::say;
use caravan_types::message::Farewell;

/// Coordinates until the run has ended.
pub fn run(args: &Args) -> Outcome {
    let mut job = Job::prepare(args)?;
    let finished = job.finished();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let farewell = runtime.block_on(async {
        let mut running = start(&mut job, true).await?;
        if finished {
            let stays = job.settings.cluster.timing.reattach();
            say(&format!("this run is finished already; for {stays:?}, workers that come back are told so"));
        } else {
            say(&format!("workers join with: caravan worker --join {}", running.address));
        }
        let ended = watch(&mut running, job.settings.recipe.steps, None).await;
        running.shutdown().await;
        job.run.set_address(None)?;
        ended
    })?;
    match farewell {
        Farewell::Finished | Farewell::Drained => Ok(()),
        other => Err(TrainError::of(other, job.log).into()),
    }
}
