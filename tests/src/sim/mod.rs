//! A whole caravan in one thread, under one seed: the real cores of a coordinator and its
//! workers, real engines on a tiny model, and a virtual network, clock, store and disk.
//!
//! A seed decides everything: sizes, delays, and when what goes wrong. Every event is followed by
//! the invariants (`checks`); when the faults are over the run must come to its end within a
//! bounded time (L-1). The same seed gives the same trace.
//!
//! `world` moves frames and time; `coordinator` and `worker` are the drivers around the cores, as
//! the real ones are; `faults` is what goes wrong.

mod checks;
mod coordinator;
mod engine;
mod faults;
mod network;
mod options;
pub(crate) mod random;
mod worker;
mod world;

pub use checks::Truth;
pub use options::{Bad, Fault, Mutant, Options};

use caravan_engine::Flaw;
use caravan_types::Step;
use caravan_types::message::Farewell;
use caravan_types::status::Event;
use std::fmt;
use world::World;

/// What came of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// How it ended.
    pub farewell: Option<Farewell>,
    /// The step of the last checkpoint.
    pub checkpoint: Option<Step>,
    /// What the coordinators said, in order.
    pub events: Vec<Event>,
    /// Faults that struck.
    pub faults: usize,
    /// Bits that came out wrong.
    pub flaws: Vec<Flaw>,
    /// Hash of everything that happened, in order.
    pub trace: u64,
    /// Virtual milliseconds.
    pub took_ms: u64,
}

/// An invariant that does not hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Broken {
    /// Which one, how, and when.
    pub reason: String,
    /// What the coordinators said until then.
    pub events: Vec<Event>,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// Runs a cluster to its end and checks every value that anybody applies against `truth`.
///
/// # Errors
/// What went wrong, with the moment; a run that does not end is one such thing.
pub fn run(options: &Options, truth: Option<&Truth>) -> Result<(Outcome, Truth), Broken> {
    let mut world = World::new(options.clone(), truth).map_err(|reason| Broken { reason, events: vec![] })?;
    match run_to_end(&mut world) {
        Ok(()) => Ok((world.outcome, world.checks.seen)),
        Err(reason) => Err(Broken { reason, events: world.outcome.events }),
    }
}

fn run_to_end(world: &mut World<'_>) -> Result<(), String> {
    // A step of four workers takes a few hundred events; a run that needs more than this many for
    // its dozen steps and faults goes round in circles.
    for number in 0..600_000u64 {
        if world.is_over() {
            return world.check_end();
        }
        world.step().map_err(|e| format!("event {number}, {} ms: {e}", world.now))?;
        world.check().map_err(|e| format!("event {number}, {} ms: {e}", world.now))?;
    }
    Err(format!("L-1: did not end: {}", world.situation()))
}
