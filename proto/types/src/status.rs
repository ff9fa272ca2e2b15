//! What people are shown of a run.

use crate::message::{Activity, Refusal};
use crate::non_finite::Finding;
use crate::progress::{Doing, Wait};
use crate::{Generation, NotFinite, SliceId, Step, Subject, WorkerId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a run is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Waiting for workers.
    #[default]
    Gathering,
    /// A restarted coordinator waits for the members of the plan in force, which go on meanwhile.
    Recovering,
    /// Stopping one generation and planning the next.
    Regrouping,
    /// Stepping.
    Running,
    /// Writing the last checkpoint before the end.
    Draining,
    /// Drained; goes on another time.
    Drained,
    /// All steps are done.
    Finished,
    /// Cannot go on.
    Failed,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gathering => "gathering",
            Self::Recovering => "recovering",
            Self::Regrouping => "regrouping",
            Self::Running => "running",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Finished => "finished",
            Self::Failed => "failed",
        })
    }
}

/// Something that happened in a run, for people to read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    /// A worker was taken on.
    Joined {
        /// Its id.
        worker: WorkerId,
        /// Its name.
        name: String,
    },
    /// A member is back after the coordinator was restarted.
    Reattached {
        /// Its id.
        worker: WorkerId,
        /// Its name.
        name: String,
    },
    /// All members are back, and nothing has changed.
    Recovered {
        /// The generation that was in force all the time.
        generation: Generation,
    },
    /// A worker was not taken on.
    Refused {
        /// Its name.
        name: String,
        /// Why.
        reason: Refusal,
    },
    /// A member makes no progress, though others wait for it: it is cut out.
    Hung {
        /// The first member that stands still.
        worker: WorkerId,
        /// For how long.
        still_ms: u64,
        /// What its engine is at.
        doing: Doing,
        /// What it waits for itself.
        wait: Wait,
        /// A member that waits for it.
        waiting: Option<WorkerId>,
    },
    /// A member computes slower than it said, compared with the others.
    Slow {
        /// The member.
        worker: WorkerId,
        /// How many times slower than the others, each measured against what it said.
        factor: f64,
    },
    /// A slow member is as fast as it said again.
    Recovers {
        /// The member.
        worker: WorkerId,
    },
    /// A worker is gone.
    Lost {
        /// Its id.
        worker: WorkerId,
        /// Why.
        reason: LossReason,
    },
    /// Everybody is told to stop for a new generation.
    Stopping {
        /// The generation to come.
        generation: Generation,
        /// Whether the step in flight is finished first.
        boundary: bool,
    },
    /// A new plan is in force.
    Planned {
        /// Its generation.
        generation: Generation,
        /// The step it starts from.
        base: Step,
        /// Its members.
        members: Vec<WorkerId>,
        /// Slices that move from members, with weights and state counted one each.
        moved: u64,
        /// How much that is, in bytes.
        #[serde(default)]
        bytes: u64,
    },
    /// Nobody alive had some slices: the run goes back.
    RolledBack {
        /// The newest step that was committed.
        from: Step,
        /// The step it goes back to.
        to: Step,
    },
    /// A checkpoint is complete.
    CheckpointWritten {
        /// Its step.
        step: Step,
    },
    /// A checkpoint could not be written; the run goes on.
    CheckpointFailed {
        /// Its step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// A damaged checkpoint was passed over.
    CheckpointRefused {
        /// Its name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A member could not load the checkpoint that the plan starts from; another one is looked
    /// for.
    LoadFailed {
        /// The member.
        worker: WorkerId,
        /// The checkpoint's step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// Owners of one slice differ, and no majority says who is right: it is computed again.
    Diverged {
        /// The slice.
        slice: SliceId,
        /// The step that the gradient is for, or that the training state is at.
        step: Step,
        /// What they differ about.
        subject: Subject,
        /// Who differs.
        owners: Vec<WorkerId>,
    },
    /// A step passed without an update.
    Skipped {
        /// The step.
        step: Step,
        /// Why.
        what: NotFinite,
    },
    /// A worker has found what went bad first in its lanes of a step that is not finite.
    NonFinite {
        /// The worker.
        worker: WorkerId,
        /// The step.
        step: Step,
        /// What it found.
        finding: Finding,
    },
    /// A worker had other bits than it must have.
    Corrupt {
        /// The worker.
        worker: WorkerId,
        /// What, and how that is known.
        what: String,
    },
    /// The run was asked to stop.
    Draining,
    /// The run was drained.
    Drained {
        /// The step of the last checkpoint.
        step: Step,
    },
    /// All steps are done.
    Finished {
        /// The last step.
        step: Step,
    },
    /// The run cannot go on.
    Failed {
        /// Why.
        reason: String,
    },
    /// The workers that are there cannot train the model; the run waits for others.
    NoPlan {
        /// Why, and what would do.
        reason: String,
    },
}

/// Why a worker is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossReason {
    /// Its session was closed: the process died or its host did.
    SessionClosed,
    /// It was silent for longer than the failure budget.
    Silent,
    /// It asked to leave.
    Left,
    /// It broke the protocol.
    Misbehaved,
    /// It did not come back after the coordinator was restarted.
    NotBack,
    /// It was alive and made no progress for longer than the failure budget.
    Hung,
    /// It could not load a checkpoint that the coordinator finds intact.
    CannotLoad,
    /// It was alive, and connections between it and other members broke again and again.
    Unreachable,
    /// It computed or kept other bits than it must.
    Corrupt,
}

impl fmt::Display for LossReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SessionClosed => "its session closed",
            Self::Silent => "it was silent for longer than the failure budget",
            Self::Left => "it asked to leave",
            Self::Misbehaved => "it broke the protocol",
            Self::Hung => "it made no progress for longer than the failure budget",
            Self::Unreachable => "connections between it and other workers broke, though all of them live",
            Self::CannotLoad => {
                "it cannot load a checkpoint that is intact here: see that its host reaches the same folder"
            }
            Self::NotBack => "it did not come back to the restarted coordinator",
            Self::Corrupt => "it had wrong bits",
        })
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Joined { worker, name } => write!(f, "{worker} ({name}) joined"),
            Self::Reattached { worker, name } => write!(f, "{worker} ({name}) is back"),
            Self::Recovered { generation } => {
                write!(f, "the coordinator is back: all members are there, {generation} goes on")
            }
            Self::Refused { name, reason } => write!(f, "{name} was refused: {reason}"),
            Self::Lost { worker, reason } => write!(f, "{worker} is gone: {reason}"),
            Self::Hung { worker, still_ms, doing, wait, waiting } => {
                if let Some(waiting) = waiting {
                    write!(f, "{waiting} waits for {worker}: ")?;
                }
                write!(f, "{worker} last moved {:.1} s ago {doing}", *still_ms as f64 / 1e3)?;
                match wait {
                    Wait::Peer { peer, what } => write!(f, "; it waits for {peer}: {what}"),
                    Wait::Engine | Wait::Plan => Ok(()),
                }
            }
            Self::Stopping { generation, boundary: true } => {
                write!(f, "stopping after this step for {generation}")
            }
            Self::Slow { worker, factor } => write!(
                f,
                "{worker} computes {factor} times slower than the others, for the speed that each one said it has"
            ),
            Self::Recovers { worker } => write!(f, "{worker} is not slow any more"),
            Self::Stopping { generation, boundary: false } => write!(f, "stopping at once for {generation}"),
            Self::Planned { generation, base, members, moved, bytes } => {
                let s = if members.len() == 1 { "" } else { "s" };
                write!(f, "{generation} goes on from step {base} with {} worker{s}", members.len())?;
                match *moved {
                    0 => Ok(()),
                    moved => write!(f, ", {moved} slices move ({:.1} MB)", *bytes as f64 / 1e6),
                }
            }
            Self::RolledBack { from, to } => {
                write!(f, "some slices have no owner left: the run goes back from step {from} to step {to}")
            }
            Self::CheckpointWritten { step } => write!(f, "checkpoint of step {step} written"),
            Self::CheckpointFailed { step, reason } => {
                write!(f, "checkpoint of step {step} failed: {reason}")
            }
            Self::LoadFailed { worker, step, reason } => {
                write!(f, "{worker} cannot load the checkpoint of step {step}: {reason}")
            }
            Self::CheckpointRefused { name, reason } => {
                write!(f, "checkpoint {name} is damaged and was passed over: {reason}")
            }
            Self::Diverged { slice, step, subject, owners } => {
                let owners: Vec<String> = owners.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "the owners of {slice} ({}) have different bits in its {subject} of step {step}: it is computed \
                     again to see who is wrong",
                    owners.join(", ")
                )
            }
            Self::Skipped { step, what } => {
                write!(f, "step {step} was skipped, and its samples are used up: {what}")
            }
            Self::NonFinite { worker, step, finding } => write!(f, "step {step} on {worker}: {finding}"),
            Self::Corrupt { worker, what } => write!(f, "{worker} is corrupt: {what}"),
            Self::Draining => f.write_str("asked to stop: a checkpoint is written after this step"),
            Self::Drained { step } => {
                write!(f, "stopped at step {step}; the same command goes on from there")
            }
            Self::Finished { step } => write!(f, "finished at step {step}"),
            Self::Failed { reason } => write!(f, "the run cannot go on: {reason}"),
            Self::NoPlan { reason } => write!(f, "waiting for workers: {reason}"),
        }
    }
}

/// An [`Event`] with its time and place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoggedEvent {
    /// Running number from 0, for clients that poll.
    pub number: u64,
    /// Milliseconds since the Unix epoch, by the coordinator's clock; for people only.
    pub unix_ms: u64,
    /// The newest committed step then. Not called `step` in JSON, where several events have a
    /// step of their own beside it.
    #[serde(rename = "at_step")]
    pub step: Step,
    /// The event as a sentence.
    pub text: String,
    /// The event.
    #[serde(flatten)]
    pub event: Event,
}

/// One committed step, for curves and the metrics file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// The step.
    pub step: Step,
    /// The generation that committed it.
    pub generation: Generation,
    /// Mean loss, in nats a token.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Tokens in the global batch.
    pub tokens: u64,
    /// Tokens a second since the last commit.
    pub tokens_per_second: f64,
    /// Model FLOPs utilisation ([`RunSpec::mfu`](crate::RunSpec::mfu)): the share of what the
    /// members could compute at most; absent where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Members that committed it.
    pub workers: u32,
    /// Milliseconds since the Unix epoch, by the coordinator's clock; for people only.
    pub unix_ms: u64,
}

/// A worker as people are shown it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its id.
    pub worker: WorkerId,
    /// Its name.
    pub name: String,
    /// Whether it is a member of the current plan.
    pub member: bool,
    /// Its lanes, first and one past the last.
    pub lanes: (u32, u32),
    /// Slices that it owns.
    pub owned_slices: u32,
    /// What it is doing.
    pub activity: Activity,
    /// The newest step that it has applied.
    pub applied: Step,
    /// Milliseconds since it was last heard.
    pub silent_ms: u64,
}

/// A run at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The run's name.
    pub run: String,
    /// Where it is in its life.
    pub phase: Phase,
    /// The current generation.
    pub generation: Generation,
    /// The newest committed step.
    pub step: Step,
    /// Steps in all.
    pub steps: u64,
    /// Metrics of the newest step.
    pub last: Option<StepMetrics>,
    /// Seconds until the end, at the pace of the last steps.
    pub eta_seconds: Option<f64>,
    /// The newest checkpoint.
    pub checkpoint: Option<Step>,
    /// Steps of the history that passed without an update.
    #[serde(default)]
    pub skipped: u64,
    /// The workers, ascending by id.
    pub workers: Vec<WorkerStatus>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logged_event_keeps_its_own_step_and_that_of_the_event_through_json() {
        let event = Event::CheckpointWritten { step: Step(50) };
        let logged = LoggedEvent { number: 7, unix_ms: 1, step: Step(51), text: event.to_string(), event };
        let json = serde_json::to_string(&logged).expect("plain data serialises");
        assert!(json.contains("\"at_step\":51") && json.contains("\"step\":50"), "{json}");
        assert_eq!(serde_json::from_str::<LoggedEvent>(&json).expect("it reads its own text"), logged);
    }
}
