//! What the core was told and what it answered, so that it can be told again.
//!
//! The core is a total function of its inputs. With all of them written down, whatever it decided
//! in a run can be looked at again at any desk: [`replay()`] tells them to the same core once
//! more, and says whether it decided the same.
//!
//! `control.jsonl` has a [`Record`] a line: a start for each coordinator, then every input with
//! the moment, and a digest of what the core answered. Heartbeats, most of all inputs, are short
//! lists. Nothing depends on the file: a task of its own writes it within a moment, and where
//! that fails the run goes on without.

mod record;
mod replay;

pub(crate) use record::Recorder;
pub use replay::{Difference, ReplayError, Replayed, Shown, Stop, replay};

use caravan_coordinator_core::{Config, Input, Millis, Output, Record as Durable, Restored};
use caravan_types::message::{Activity, FromWorker, ToWorker};
use caravan_types::progress::{EngineProgress, Wait};
use caravan_types::{Digest, Plan, Step, WorkerId};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Version of the file's format; a reader refuses any other. It changes with what the core is
/// told, too: the inputs stand in the file as they are in the program.
pub const FORMAT: u32 = 6;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// A coordinator started.
    Start(Box<Start>),
    /// [`FromWorker::Heartbeat`]: when, from whom, and what it said.
    Beat(Millis, WorkerId, Step, Activity, Wait, EngineProgress, Option<Digest>),
    /// [`Input::Tick`].
    Tick(Millis, Option<Digest>),
    /// Any other input.
    Input(Millis, Box<Input>, Option<Digest>),
    /// The file has this many bytes, and gets no more of this start.
    Full(u64),
}

/// What a coordinator started with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// [`FORMAT`].
    pub version: u32,
    /// Version of the program.
    pub build: String,
    /// Milliseconds since the Unix epoch, for people.
    pub unix_ms: u64,
    /// What the core was made with.
    pub config: Config,
    /// What it knew from before.
    pub restored: Restored,
}

impl Record {
    /// The record of an input that has not been answered yet.
    pub(crate) fn of(now: Millis, input: &Input) -> Self {
        match input {
            Input::Message { worker, message: FromWorker::Heartbeat { applied, activity, wait, engine } } => {
                Self::Beat(now, *worker, *applied, *activity, *wait, *engine, None)
            }
            Input::Tick => Self::Tick(now, None),
            other => Self::Input(now, Box::new(other.clone()), None),
        }
    }

    /// Notes what the core answered.
    pub(crate) fn answered(mut self, digest: Option<Digest>) -> Self {
        match &mut self {
            Self::Beat(.., answer) | Self::Tick(.., answer) | Self::Input(.., answer) => *answer = digest,
            Self::Start(_) | Self::Full(_) => {}
        }
        self
    }

    /// When the core was told what, and the digest of its answer; none where this is no input.
    pub(crate) fn told(&self) -> Option<(Millis, Input, Option<Digest>)> {
        Some(match self {
            Self::Beat(now, worker, applied, activity, wait, engine, answer) => {
                let (applied, activity, wait, engine) = (*applied, *activity, *wait, *engine);
                let message = FromWorker::Heartbeat { applied, activity, wait, engine };
                (*now, Input::Message { worker: *worker, message }, *answer)
            }
            Self::Tick(now, answer) => (*now, Input::Tick, *answer),
            Self::Input(now, input, answer) => (*now, (**input).clone(), *answer),
            Self::Start(_) | Self::Full(_) => return None,
        })
    }
}

/// A digest of what the core answered; none where that was nothing. BLAKE3 over the outputs as
/// JSON, a line each; a plan is told to every member, and is taken into account with its own
/// digest, which is made once.
pub(crate) fn digest(outputs: &[Output]) -> Option<Digest> {
    if outputs.is_empty() {
        return None;
    }
    let mut hasher = blake3::Hasher::new();
    let mut last: Option<(&Arc<Plan>, Digest)> = None;
    for output in outputs {
        match output {
            Output::Persist(Durable::Plan(plan)) => {
                let plan = plan_digest(plan, &mut last);
                hasher.update(b"persist plan ").update(&plan.0);
            }
            Output::Send { worker, message: ToWorker::Plan(plan) } => {
                let plan = plan_digest(plan, &mut last);
                hasher.update(b"send plan ").update(&worker.0.to_le_bytes()).update(&plan.0);
            }
            // Text keys and plain values: this always becomes JSON.
            other => _ = hasher.update(&serde_json::to_vec(other).unwrap_or_default()),
        }
        hasher.update(b"\n");
    }
    Some(Digest(*hasher.finalize().as_bytes()))
}

fn plan_digest<'a>(plan: &'a Arc<Plan>, last: &mut Option<(&'a Arc<Plan>, Digest)>) -> Digest {
    match last {
        Some((same, digest)) if Arc::ptr_eq(same, plan) => *digest,
        _ => {
            let digest = Digest(*blake3::hash(&serde_json::to_vec(plan).unwrap_or_default()).as_bytes());
            *last = Some((plan, digest));
            digest
        }
    }
}

#[cfg(test)]
mod tests;
