//! The real machine behind the engine actor: an executor with its data and checkpoints.

use crate::engine::{Fault, Machine, Save, Saver};
use crate::initial::Start;
use caravan_checkpoint::{Checkpoint, write_part};
use caravan_data::{Dataset, Sampler};
use caravan_engine::{Batches, Checkpoints, Executor, Flaw, Watch};
use caravan_types::message::Welcome;
use caravan_types::peer::Key;
use caravan_types::task::{Done, Task};
use caravan_types::{DataSpec, Generation, Lane, MicroBatch, RunSpec, Slice, SliceId, SliceSet, Step};
use std::path::PathBuf;
use std::sync::Arc;

/// The data that was found is not the run's.
#[derive(Debug, thiserror::Error)]
#[error(
    "the data at {} is not what the run is trained on: it has {} tokens with the hash {}, \
     the run {} tokens with the hash {}. Give every worker the folder that the run was started with",
    dir.display(), found.tokens, found.digest, wanted.tokens, wanted.digest
)]
struct OtherData {
    dir: PathBuf,
    found: DataSpec,
    wanted: DataSpec,
}

/// A checkpoint that was found is another run's.
#[derive(Debug, thiserror::Error)]
#[error("{} is a checkpoint of another run ({:?}): its run spec differs", dir.display(), name)]
struct OtherRun {
    dir: PathBuf,
    name: String,
}

/// What starts the machine, on the engine's thread: opening data takes a while.
pub fn builder(
    welcome: &Welcome,
    threads: usize,
    watch: Arc<Watch>,
) -> impl FnOnce(Saver) -> Result<Device, Fault> + Send + use<> {
    let (spec, data) = (welcome.spec.clone(), PathBuf::from(&welcome.data));
    let (root, init) = (PathBuf::from(&welcome.checkpoints), welcome.init.clone());
    move |saver| {
        let dataset = Dataset::open(&data)?;
        let (found, wanted) = (dataset.spec(), spec.data.clone());
        if found != wanted {
            return Err(OtherData { dir: data, found, wanted }.into());
        }
        let batches = Sampled(Sampler::new(Arc::new(dataset), spec.seed, spec.batch)?);
        let start = Start::open(&spec, init.as_deref())?;
        let checkpoints = Folder { root, saver, spec: spec.clone(), start, open: None };
        Ok(Executor::new(&spec, threads, watch, batches, checkpoints)?)
    }
}

/// What writes this worker's parts of checkpoints.
pub fn writer(welcome: &Welcome) -> Save {
    let (root, worker) = (PathBuf::from(&welcome.checkpoints), welcome.worker);
    Box::new(move |generation, step, states| Ok(write_part(&root, generation, step, worker, &states)?))
}

/// Model and optimiser with the run's data and checkpoints.
pub type Device = Executor<Sampled, Folder>;

impl Machine for Device {
    fn run(&mut self, task: Task) -> Result<Option<Done>, Fault> {
        Ok(Executor::run(self, task)?)
    }

    fn put(&mut self, key: Key, payload: Vec<f32>) -> Result<(), Fault> {
        Ok(Executor::put(self, key, payload)?)
    }

    fn get(&mut self, key: Key) -> Result<Vec<f32>, Fault> {
        Ok(Executor::get(self, key)?)
    }

    fn fail(&mut self, flaw: Flaw) {
        tracing::warn!(?flaw, done = Executor::fail(self, flaw), "told to have something go wrong");
    }
}

/// Batches of the run's data.
pub struct Sampled(Sampler);

impl Batches for Sampled {
    fn micro_batch(&mut self, step: Step, lane: Lane, index: u32) -> Result<MicroBatch, String> {
        self.0.micro_batch(step, lane, index).map_err(|error| error.to_string())
    }

    fn counted_tokens(&mut self, step: Step) -> Result<u64, String> {
        self.0.counted_tokens(step).map_err(|error| error.to_string())
    }
}

/// The run's folder of checkpoints.
pub struct Folder {
    root: PathBuf,
    saver: Saver,
    spec: RunSpec,
    /// What the run starts with, where that is not its seed.
    start: Option<Start>,
    /// The one that was read last: opening one means hashing it, and a plan loads from one
    /// checkpoint several times.
    open: Option<(Step, Checkpoint)>,
}

impl Folder {
    fn of_step(&mut self, step: Step) -> Result<&Checkpoint, Fault> {
        let known = self.open.take_if(|(opened, _)| *opened == step);
        let (_, checkpoint) = match known {
            Some(known) => self.open.insert(known),
            None => {
                let checkpoint = Checkpoint::of_step(&self.root, step)?;
                let theirs = &checkpoint.manifest().spec;
                if *theirs != self.spec {
                    let (dir, name) = (checkpoint.dir().to_owned(), theirs.name.clone());
                    return Err(OtherRun { dir, name }.into());
                }
                self.open.insert((step, checkpoint))
            }
        };
        Ok(checkpoint)
    }
}

impl Checkpoints for Folder {
    fn save(&mut self, generation: Generation, step: Step, states: Vec<(SliceId, Vec<f32>)>) -> Option<Done> {
        self.saver.save(generation, step, states)
    }

    fn load(&mut self, step: Step, slices: &SliceSet) -> Result<Vec<(SliceId, Vec<f32>)>, String> {
        let checkpoint = self.of_step(step).map_err(|fault| fault.to_string())?;
        checkpoint.states(slices).map_err(|error| error.to_string())
    }

    fn initial(&mut self, id: SliceId, slice: &Slice) -> Result<Vec<f32>, String> {
        let start = self.start.as_ref().ok_or("the run starts from its seed")?;
        start.slice(id, slice).map_err(|error| error.to_string())
    }
}
