//! The worker's side of the step protocol.
//!
//! A total function of its inputs: no runtime, no clock, no I/O. It decides what to compute,
//! what to send to whom and when a step is committed; tensors stay with the engine and are
//! spoken of by [`Key`].
//!
//! The driver's duties:
//! 1. One input at a time; its outputs are carried out in order before the next input.
//! 2. [`Output::Task`], [`Output::Keep`] and [`Output::Send`] of data go to the engine through
//!    one queue, so that what is sent is what the tasks before it made.
//! 3. A fabric connection belongs to one generation. Messages of a generation that this worker
//!    has not been told to [`Output::Connect`] yet wait outside.
//! 4. [`Core::next_deadline`] is asked after every input; an [`Input::Tick`] comes no earlier.
//!
//! Reading order: [`Core`] is a member's life across generations: stop, report, plan, heal;
//! `step` is the life of one step: compute, reduce, prepare, commit, publish; `schedule` is the
//! order of its micro-batches, `round` what has come in for it, `look` whether memory still holds what
//! was put there, `ballot` whether the members' votes agree, `non_finite` what follows
//! where they add up to what is not finite; `heal` is what a member still
//! lacks; `part` is its place in a plan; `memory` is what a coordinator may have to be told again.

#[macro_use]
mod mutant;

mod ballot;
mod core;
#[cfg(feature = "explore")]
mod explore;
mod heal;
mod look;
mod memory;
mod non_finite;
mod part;
mod round;
mod schedule;
mod step;
mod wait;

pub use crate::core::Core;
#[cfg(feature = "mutants")]
pub use crate::mutant::Mutant;

use caravan_types::message::{Farewell, FromWorker, ToWorker};
use caravan_types::peer::{Key, PeerMessage};
use caravan_types::task::{Done, Task};
use caravan_types::{BatchShape, Generation, Member, ModelShape, NonFinitePolicy, Step, Timing, WorkerId};

/// Milliseconds on a clock that only goes forward, from any origin.
pub type Millis = u64;

/// What the core needs to know of the run, from the coordinator's welcome.
#[derive(Clone, Debug)]
pub struct Config {
    /// This worker.
    pub worker: WorkerId,
    /// The model.
    pub shape: ModelShape,
    /// How a global batch is cut.
    pub batch: BatchShape,
    /// Steps of the run.
    pub steps: u64,
    /// A checkpoint is written after each step that this divides; only at the end where 0.
    pub checkpoint_every: u64,
    /// The failure budget, and what follows from it.
    pub timing: Timing,
    /// What is done with a step whose loss or gradient is not finite.
    pub non_finite: NonFinitePolicy,
}

/// What the core is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The coordinator says something.
    Message(ToWorker),
    /// Another member says something.
    Peer {
        /// The generation of the connection.
        generation: Generation,
        /// The member.
        from: WorkerId,
        /// What it says. The payload of data stays with the driver.
        message: PeerMessage,
    },
    /// A fabric connection broke or could not be made.
    PeerLost {
        /// Its generation.
        generation: Generation,
        /// The member at the other end.
        peer: WorkerId,
    },
    /// The coordinator has taken this worker back after their session broke off. It knows of
    /// nothing that was told meanwhile.
    Attached {
        /// The newest step that it knows to be committed.
        committed: Step,
    },
    /// The engine has done something.
    Done(Done),
    /// The process was asked to go.
    Leave,
    /// Time has passed.
    Tick,
}

/// What the driver is told to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Tell the coordinator. The engine's progress in a heartbeat is the driver's to put in.
    Tell(FromWorker),
    /// Give up computing and close the connections of generations below this one.
    Fence(Generation),
    /// Open the fabric of a generation to these members; connections of older generations are
    /// of no use to anybody any more.
    Connect {
        /// The generation.
        generation: Generation,
        /// The other members.
        peers: Vec<Member>,
    },
    /// Tell another member of the generation that was connected last. The payload of data
    /// comes from the engine.
    Send {
        /// The member.
        to: WorkerId,
        /// The message.
        message: PeerMessage,
    },
    /// Hand the payload of the input just given to the engine. Without it, it is dropped.
    Keep(Key),
    /// Have the engine do something.
    Task(Task),
    /// End the process.
    Exit(Farewell),
}
