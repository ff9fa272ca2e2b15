//! What a run needs, checked and complete.

use caravan_data::Request;
use caravan_types::progress::Stragglers;
use caravan_types::run_spec::RUN_SPEC_VERSION;
use caravan_types::{
    BatchShape, DataSpec, Initial, ModelShape, NumericsClass, Precision, Recipe, RunSpec, Timing,
};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// A run file as understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The run's name.
    pub name: String,
    /// Key of all randomness.
    pub seed: u64,
    /// The folder whose weights it starts with; its seed's where none.
    pub init: Option<PathBuf>,
    /// The model.
    pub model: ModelShape,
    /// How a global batch is cut.
    pub batch: BatchShape,
    /// The optimiser's recipe.
    pub recipe: Recipe,
    /// Number formats.
    pub precision: Precision,
    /// Whether layers are recomputed on the way back, for less memory; decides no bits.
    pub recompute: bool,
    /// The instruction family.
    pub kernels: Kernels,
    /// What to train on.
    pub data: Request,
    /// How it is run; none of this decides any bits.
    pub cluster: Cluster,
    /// What the sample at the end starts with.
    pub prompt: String,
    /// Legal but maybe not meant.
    pub notes: Vec<Note>,
}

/// Which instruction family a run uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// The fastest one of the machine that starts the run.
    Auto,
    /// This one.
    Named(String),
}

/// How a run is run: nothing here changes its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Worker processes.
    pub workers: u32,
    /// Compute threads of each.
    pub threads: u32,
    /// Owners per slice, where there are so many workers.
    pub redundancy: u32,
    /// Stages of every pipeline; 0 for as many as are best.
    pub stages: u32,
    /// The failure budget, and what follows from it.
    pub timing: Timing,
    /// What is done about workers that are slower than they said.
    pub stragglers: Stragglers,
    /// Steps between checkpoints; 0 for one at the end only.
    pub checkpoint_every: u64,
    /// Checkpoints that are kept.
    pub keep: u32,
    /// Where the coordinator listens.
    pub listen: SocketAddr,
}

/// Something legal that may not be meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// Some workers have nothing to do.
    IdleWorkers {
        /// Workers.
        workers: u32,
        /// Lanes.
        lanes: u32,
    },
    /// One death rolls the run back.
    NoRedundancy,
    /// More threads than cores slow all of them down.
    TooManyThreads {
        /// Workers.
        workers: u32,
        /// Threads of each.
        threads: u32,
        /// Cores of this machine.
        cores: u32,
    },
    /// The head of the weights that the run starts with is their embedding.
    Tied(PathBuf),
    /// The weights that the run starts with have no tokenizer that can be used.
    NoTokenizer {
        /// Their folder.
        folder: PathBuf,
        /// Why not.
        why: String,
    },
    /// The live page and control port can be reached by others.
    NotLoopback(SocketAddr),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IdleWorkers { workers, lanes } => write!(
                f,
                "cluster.workers = {workers} is more than batch.lanes = {lanes}: {} would have nothing to compute",
                workers - lanes
            ),
            Self::NoRedundancy => f.write_str(
                "cluster.redundancy = 1: when a worker dies, the run goes back to its last checkpoint; 2 avoids that",
            ),
            Self::TooManyThreads { workers, threads, cores } => write!(
                f,
                "{workers} workers × {threads} threads are more than the {cores} cores of this machine"
            ),
            Self::Tied(folder) => write!(
                f,
                "the head of {} is its embedding (tie_word_embeddings): here it starts as a copy of it, and is trained on \
                 its own",
                folder.display()
            ),
            Self::NoTokenizer { folder, why } => write!(
                f,
                "{} has no tokenizer that can be used ({why}): train on its own tokens, or give data.tokenizer",
                folder.display()
            ),
            Self::NotLoopback(address) => write!(
                f,
                "cluster.listen = \"{address}\" can be reached from other machines, and there is no password"
            ),
        }
    }
}

impl Settings {
    /// The run spec, once the data is prepared and the instruction family known.
    #[must_use]
    pub fn spec(&self, init: Initial, data: DataSpec, family: &str) -> RunSpec {
        RunSpec {
            version: RUN_SPEC_VERSION,
            name: self.name.clone(),
            model: self.model.clone(),
            init,
            data,
            batch: self.batch,
            recipe: self.recipe.clone(),
            seed: self.seed,
            numerics: NumericsClass { precision: self.precision, family: family.to_owned() },
        }
    }
}
