//! Decides: who is a member, which generation is in force, what the plan is, when the run ends.
//!
//! A total function of its inputs: no runtime, no clock, no I/O, no randomness; purity is a fact
//! of `Cargo.toml`. Time is an argument, outputs are data, bad input becomes an output.
//!
//! The driver's duties:
//! 1. One input at a time; its outputs are carried out in order before the next input.
//! 2. Nothing is sent or answered before every earlier [`Output::Persist`] is durable. A
//!    generation that was announced and then forgotten could be given twice.
//! 3. [`Core::next_deadline`] is asked after every input; an [`Input::Tick`] comes no earlier.
//! 4. `now` never goes back and has nothing to do with any other host's clock.
//! 5. Sessions are numbered once; after [`Input::Closed`] a session says nothing more.
//!
//! Reading order: [`Core`] turns inputs into a change of membership and asks `regroup` what the
//! survivors' reports add up to; `planner` turns that into a plan, `owners` deals out
//! the slices, `saves` watches checkpoints being written, `ending` is how a run ends. `hang` finds who
//! stands still, `accused` whose connections break, `pace` who is slow, `corrupt` who has wrong bits,
//! `away` that it was the coordinator itself; `non_finite` ends a run whose next step is not finite; `fallback` looks for an older checkpoint; `recover` is
//! what a restarted coordinator does first.

#[macro_use]
mod mutant;

mod accused;
mod around;
mod away;
mod core;
mod corrupt;
mod ending;
#[cfg(feature = "explore")]
mod explore;
mod fallback;
mod hang;
mod members;
mod non_finite;
mod owners;
mod pace;
mod planner;
mod recover;
mod regroup;
mod saves;

pub use crate::core::Core;
#[cfg(feature = "mutants")]
pub use crate::mutant::Mutant;
pub use crate::planner::{Candidate, Demand, LINK_BYTES_PER_S, NoPlan, Start, plan};

use caravan_types::message::{Committed, Farewell, FromWorker, Hello, Refusal, ToWorker};
use caravan_types::progress::Stragglers;
use caravan_types::status::Event;
use caravan_types::task::SavedPart;
use caravan_types::{
    BatchShape, Generation, ModelShape, NotFinite, NumericsClass, Plan, Step, Timing, WorkerId,
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Milliseconds on a clock that only goes forward, from any origin.
pub type Millis = u64;

/// A connection, numbered by the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Session(pub u64);

/// What the core needs to know of the run and its settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The model.
    pub shape: ModelShape,
    /// Its global batch.
    pub batch: BatchShape,
    /// Steps of the run.
    pub steps: u64,
    /// The run's numerics class.
    pub numerics: NumericsClass,
    /// Whether layers are recomputed on the way back, for less memory.
    pub recompute: bool,
    /// Owners per slice, where there are so many members.
    pub redundancy: u32,
    /// Stages of every pipeline; as many as are best where none.
    pub stages: Option<u32>,
    /// The first plan waits for this many workers, but no longer than the failure budget
    /// once the first one is there.
    pub workers: u32,
    /// The failure budget, and what follows from it.
    pub timing: Timing,
    /// What is done about members that are slower than they said.
    pub stragglers: Stragglers,
}

/// What is known from before this coordinator started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Restored {
    /// The newest generation that was ever announced.
    pub generation: Generation,
    /// The first worker id that was never given.
    pub next_worker: u64,
    /// The newest intact checkpoint.
    pub checkpoint: Option<Step>,
    /// The plan that was in force, where its members may be alive and stepping: they are waited
    /// for.
    pub plan: Option<Arc<Plan>>,
    /// The newest step that is known to have been committed.
    pub committed: Option<Committed>,
}

/// What the core is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Input {
    /// Somebody wants to be a worker.
    Hello {
        /// Where it speaks from.
        session: Session,
        /// Who it is.
        hello: Hello,
    },
    /// A worker says something.
    Message {
        /// The worker.
        worker: WorkerId,
        /// What it says.
        message: FromWorker,
    },
    /// A session ended.
    Closed {
        /// Which one.
        session: Session,
    },
    /// A manifest that was asked for is written, or not.
    Completed {
        /// As in [`Output::Complete`].
        generation: Generation,
        /// As in [`Output::Complete`].
        step: Step,
        /// Why it failed.
        result: Result<(), String>,
    },
    /// The answer to [`Output::Find`].
    Found {
        /// As in [`Output::Find`].
        until: Step,
        /// The step of the newest one that is intact, if any; or why none could be looked for.
        found: Result<Option<Step>, String>,
    },
    /// Stop after the step in flight, with a checkpoint.
    Drain,
    /// Time has passed.
    Tick,
}

/// What must be durable before anything after it happens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Record {
    /// This generation is about to be announced.
    Generation(Generation),
    /// The first worker id that was never given.
    Worker(u64),
    /// This plan is about to be in force.
    Plan(Arc<Plan>),
    /// No plan is in force any more: the run is over, or all members are gone.
    Disbanded,
    /// This checkpoint is complete.
    Checkpoint(Step),
}

/// What the driver is told to do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Output {
    /// Make it durable.
    Persist(Record),
    /// Take the worker on, with this id.
    Welcome {
        /// Where it speaks from.
        session: Session,
        /// Its id.
        worker: WorkerId,
        /// The newest step that is known to be committed.
        committed: Step,
    },
    /// Turn it away, and close the session.
    Refuse {
        /// Where it speaks from.
        session: Session,
        /// Why.
        refusal: Refusal,
    },
    /// Tell a worker something. After a [`ToWorker::Goodbye`] its session is closed.
    Send {
        /// The worker.
        worker: WorkerId,
        /// What it is told.
        message: ToWorker,
    },
    /// All parts of a checkpoint are written: write its manifest, then answer with
    /// [`Input::Completed`].
    Complete {
        /// The generation that wrote the parts.
        generation: Generation,
        /// The step.
        step: Step,
        /// The parts.
        parts: Vec<SavedPart>,
    },
    /// Find the newest intact checkpoint of this run that is not after `until`, then answer with
    /// [`Input::Found`].
    Find {
        /// The newest step that will do.
        until: Step,
    },
    /// Something that people want to know.
    Note(Event),
    /// A step was committed for the first time.
    Committed {
        /// The step, as the first member that spoke saw it.
        committed: Committed,
        /// Members of the plan that committed it, ascending.
        members: Vec<WorkerId>,
    },
    /// The run ends before a step that is not finite: to be written down as history.
    Halted {
        /// The step.
        step: Step,
        /// Why.
        what: NotFinite,
    },
    /// The run is over and everybody has been told.
    End(Farewell),
}
