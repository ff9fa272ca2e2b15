//! Every interleaving of a small caravan: a model checker over both cores.
//!
//! The real coordinator's core and three real workers' cores go over a step boundary, from step 1
//! committed everywhere until the run is over, with a bounded number of faults at any moments.
//! Every order in which what can happen may happen is tried, and every state that can be reached
//! is looked at once. The simulation ([`crate::sim`]) compares real weights of larger clusters at
//! random moments; this finds what needs two unlikely moments at once.
//!
//! # What can happen
//!
//! A frame is delivered (in order on each line; lines are a session's two directions, and an ordered
//! pair of members in a generation); an engine finishes its next task that has an answer; a part
//! of a checkpoint or a manifest is written; the end of a session or a connection is noticed by
//! either side, with what was on its way or without; a worker looks for the coordinator; a dead
//! coordinator is started again. Besides those, at most so many faults ([`Kind`]).
//!
//! # What is abstract
//!
//! - *Values.* Tensors are hashes of how they came about (`engine`); what is applied or saved must
//!   have the hash of a quiet run. The drivers (`node`, `leader`) are those of the simulation
//!   with what the real ones have besides: a worker that is told to stop closes its connections.
//! - *Time.* The cores are told the same moment all the time. A deadline of the coordinator passes
//!   for nothing where nothing else can happen; earlier than that it is a fault, since somebody
//!   needed longer than the failure budget ([`Kind::Late`], and [`Kind::Silence`] for one worker).
//!   The time in which accusations are collected, a tenth of the budget, may be over at any
//!   moment. Heartbeats are not sent: who is silent is chosen.
//! - *Equal states.* A core is known by its essence (`Core::essence`), from which what is never
//!   looked at again is left out; equal essences are met by their 128-bit hashes. A message to the
//!   coordinator that can change nothing any more is dropped (`Core::is_stale`).
//! - *Equal orders.* What may as well happen now happens now: `hurry` has the reasons. A test
//!   compares how runs can end with and without that.
//!
//! # What holds in every state
//!
//! N-1 whatever is applied or saved is what a quiet run has; C-1 members of a generation are at
//! most one step apart; C-2 the run goes back only where a slice has lost all owners; D-1 steps
//! are committed one after the other, and plans start where the history ends; G-1 generations of
//! plans rise and a worker's id is given once; L-1 no way goes in circles, and where one ends, the
//! run is over, or faults have cost all workers. Also, no engine is asked for what it does not have.
//!
//! # What is not covered
//!
//! More than three workers at the start, steps of several micro-batches, checkpoints before the
//! last step and disks that fail, stragglers and hangs (they need heartbeats), owners that differ,
//! a coordinator that stands still, clocks that jump, frames that come twice, an answer of an engine that comes after its
//! generation was given up, and a dead worker that is started again unless as the wish for one
//! more. A partition is covered as what comes of it: lateness, broken connections, silence.

mod choice;
mod effects;
mod engine;
mod frame;
mod hurry;
mod intern;
mod leader;
mod next;
mod node;
mod replay;
mod search;
mod setting;
mod state;
mod world;

pub use search::{Report, Violation, explore};
pub use setting::{Kind, MUTANTS, Options, mutant};

use search::first;

/// The instruction family of runs that are explored.
const FAMILY: &str = "portable";

/// A way through the states, a line for each choice, and what is wrong where it ends.
pub type Told = (Vec<String>, Result<(), String>);

/// Tells a way again that an exploration has found.
///
/// # Errors
/// Where the word is none.
pub fn replay(options: &Options, word: &str) -> Result<Told, String> {
    let (mut world, first) = first(options)?;
    let way = choice::read(word)?;
    Ok(replay::tell(&mut world, &first, &way))
}
