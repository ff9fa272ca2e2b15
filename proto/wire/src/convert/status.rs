//! status.proto: what people are shown of a run.

use super::plan::lanes;
use super::session::activity;
use super::variants;
use crate::error::Malformed;
use crate::limits::{self, MAX_MEMBERS, MAX_SLICES, below, count, cut, required, text};
use crate::{pb, pb::logged_event};
use caravan_types::status::{Event, LoggedEvent, LossReason, Phase, Snapshot, StepMetrics, WorkerStatus};

variants!(Phase, pb::Phase, phase, [Gathering, Regrouping, Running, Draining, Drained, Finished, Failed]);
variants!(LossReason, pb::LossReason, loss_reason, [SessionClosed, Silent, Left, Misbehaved]);

impl From<Phase> for pb::DrainReply {
    fn from(phase: Phase) -> Self {
        Self { phase: pb::Phase::from(phase).into() }
    }
}

impl TryFrom<pb::DrainReply> for Phase {
    type Error = Malformed;

    fn try_from(reply: pb::DrainReply) -> Result<Self, Malformed> {
        phase(reply.phase, "DrainReply.phase")
    }
}

impl From<Snapshot> for pb::Snapshot {
    fn from(snapshot: Snapshot) -> Self {
        Self {
            run: cut(snapshot.run),
            phase: pb::Phase::from(snapshot.phase).into(),
            generation: snapshot.generation.0,
            step: snapshot.step.0,
            steps: snapshot.steps,
            last: snapshot.last.map(Into::into),
            eta_seconds: snapshot.eta_seconds,
            checkpoint: snapshot.checkpoint.map(|step| step.0),
            workers: snapshot.workers.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<pb::Snapshot> for Snapshot {
    type Error = Malformed;

    fn try_from(snapshot: pb::Snapshot) -> Result<Self, Malformed> {
        count(&snapshot.workers, MAX_MEMBERS, "Snapshot.workers")?;
        let checkpoint = snapshot.checkpoint.map(|step| limits::step(step, "Snapshot.checkpoint"));
        Ok(Self {
            run: text(snapshot.run, "Snapshot.run")?,
            phase: phase(snapshot.phase, "Snapshot.phase")?,
            generation: limits::generation(snapshot.generation, "Snapshot.generation")?,
            step: limits::step(snapshot.step, "Snapshot.step")?,
            steps: below(snapshot.steps, limits::MAX_COUNT, "Snapshot.steps")?,
            last: snapshot.last.map(TryInto::try_into).transpose()?,
            eta_seconds: snapshot.eta_seconds,
            checkpoint: checkpoint.transpose()?,
            workers: snapshot.workers.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}

impl From<StepMetrics> for pb::StepMetrics {
    fn from(metrics: StepMetrics) -> Self {
        Self {
            step: metrics.step.0,
            generation: metrics.generation.0,
            loss: metrics.loss,
            norm: metrics.norm,
            learning_rate: metrics.learning_rate,
            tokens: metrics.tokens,
            tokens_per_second: metrics.tokens_per_second,
            workers: metrics.workers,
            unix_ms: metrics.unix_ms,
        }
    }
}

impl TryFrom<pb::StepMetrics> for StepMetrics {
    type Error = Malformed;

    fn try_from(metrics: pb::StepMetrics) -> Result<Self, Malformed> {
        Ok(Self {
            step: limits::step(metrics.step, "StepMetrics.step")?,
            generation: limits::generation(metrics.generation, "StepMetrics.generation")?,
            loss: metrics.loss,
            norm: metrics.norm,
            learning_rate: metrics.learning_rate,
            tokens: metrics.tokens,
            tokens_per_second: metrics.tokens_per_second,
            workers: metrics.workers,
            unix_ms: metrics.unix_ms,
        })
    }
}

impl From<WorkerStatus> for pb::WorkerStatus {
    fn from(status: WorkerStatus) -> Self {
        Self {
            worker: status.worker.0,
            name: cut(status.name),
            member: status.member,
            lanes: Some((status.lanes.0..status.lanes.1).into()),
            owned_slices: status.owned_slices,
            activity: pb::Activity::from(status.activity).into(),
            applied: status.applied.0,
            silent_ms: status.silent_ms,
        }
    }
}

impl TryFrom<pb::WorkerStatus> for WorkerStatus {
    type Error = Malformed;

    fn try_from(status: pb::WorkerStatus) -> Result<Self, Malformed> {
        let lanes = lanes(status.lanes, "WorkerStatus.lanes")?;
        limits::range(0, status.owned_slices, MAX_SLICES, "WorkerStatus.owned_slices")?;
        Ok(Self {
            worker: limits::worker(status.worker, "WorkerStatus.worker")?,
            name: text(status.name, "WorkerStatus.name")?,
            member: status.member,
            lanes: (lanes.start, lanes.end),
            owned_slices: status.owned_slices,
            activity: activity(status.activity, "WorkerStatus.activity")?,
            applied: limits::step(status.applied, "WorkerStatus.applied")?,
            silent_ms: status.silent_ms,
        })
    }
}

impl From<LoggedEvent> for pb::LoggedEvent {
    fn from(logged: LoggedEvent) -> Self {
        Self {
            number: logged.number,
            unix_ms: logged.unix_ms,
            step: logged.step.0,
            text: cut(logged.text),
            event: Some(logged.event.into()),
        }
    }
}

impl TryFrom<pb::LoggedEvent> for LoggedEvent {
    type Error = Malformed;

    fn try_from(logged: pb::LoggedEvent) -> Result<Self, Malformed> {
        Ok(Self {
            number: logged.number,
            unix_ms: logged.unix_ms,
            step: limits::step(logged.step, "LoggedEvent.step")?,
            text: text(logged.text, "LoggedEvent.text")?,
            event: required(logged.event, "LoggedEvent.event")?.try_into()?,
        })
    }
}

impl From<Event> for logged_event::Event {
    fn from(event: Event) -> Self {
        match event {
            Event::Joined { worker, name } => {
                Self::Joined(pb::WorkerJoined { worker: worker.0, name: cut(name) })
            }
            Event::Refused { name, reason } => {
                Self::Refused(pb::WorkerRefused { name: cut(name), reason: Some(reason.into()) })
            }
            Event::Lost { worker, reason } => {
                Self::Lost(pb::WorkerLost { worker: worker.0, reason: pb::LossReason::from(reason).into() })
            }
            Event::Stopping { generation, boundary } => {
                Self::Stopping(pb::Stop { generation: generation.0, boundary })
            }
            Event::Planned { generation, base, members, moved } => Self::Planned(pb::Planned {
                generation: generation.0,
                base: base.0,
                members: members.into_iter().map(|worker| worker.0).collect(),
                moved,
            }),
            Event::RolledBack { from, to } => Self::RolledBack(pb::RolledBack { from: from.0, to: to.0 }),
            Event::CheckpointWritten { step } => Self::CheckpointWritten(pb::AtStep { step: step.0 }),
            Event::CheckpointFailed { step, reason } => {
                Self::CheckpointFailed(pb::CheckpointFailed { step: step.0, reason: cut(reason) })
            }
            Event::CheckpointRefused { name, reason } => {
                Self::CheckpointRefused(pb::CheckpointRefused { name: cut(name), reason: cut(reason) })
            }
            Event::Diverged { step, worker } => {
                Self::Diverged(pb::WorkerDiverged { step: step.0, worker: worker.0 })
            }
            Event::Draining => Self::Draining(pb::DrainAsked {}),
            Event::Drained { step } => Self::Drained(pb::AtStep { step: step.0 }),
            Event::Finished { step } => Self::Finished(pb::AtStep { step: step.0 }),
            Event::Failed { reason } => Self::Failed(pb::RunFailed { reason: cut(reason) }),
            Event::NoPlan { reason } => Self::NoPlan(pb::RunHasNoPlan { reason: cut(reason) }),
        }
    }
}

impl TryFrom<logged_event::Event> for Event {
    type Error = Malformed;

    fn try_from(event: logged_event::Event) -> Result<Self, Malformed> {
        use logged_event::Event as Wire;
        let at_step = |at: pb::AtStep| limits::step(at.step, "AtStep.step");
        Ok(match event {
            Wire::Joined(joined) => Self::Joined {
                worker: limits::worker(joined.worker, "WorkerJoined.worker")?,
                name: text(joined.name, "WorkerJoined.name")?,
            },
            Wire::Refused(refused) => Self::Refused {
                name: text(refused.name, "WorkerRefused.name")?,
                reason: required(refused.reason, "WorkerRefused.reason")?.try_into()?,
            },
            Wire::Lost(lost) => Self::Lost {
                worker: limits::worker(lost.worker, "WorkerLost.worker")?,
                reason: loss_reason(lost.reason, "WorkerLost.reason")?,
            },
            Wire::Stopping(stop) => Self::Stopping {
                generation: limits::generation(stop.generation, "Stop.generation")?,
                boundary: stop.boundary,
            },
            Wire::Planned(planned) => Self::Planned {
                generation: limits::generation(planned.generation, "Planned.generation")?,
                base: limits::step(planned.base, "Planned.base")?,
                members: limits::workers(planned.members, "Planned.members")?,
                moved: planned.moved,
            },
            Wire::RolledBack(back) => Self::RolledBack {
                from: limits::step(back.from, "RolledBack.from")?,
                to: limits::step(back.to, "RolledBack.to")?,
            },
            Wire::CheckpointWritten(at) => Self::CheckpointWritten { step: at_step(at)? },
            Wire::CheckpointFailed(failed) => Self::CheckpointFailed {
                step: limits::step(failed.step, "CheckpointFailed.step")?,
                reason: text(failed.reason, "CheckpointFailed.reason")?,
            },
            Wire::CheckpointRefused(refused) => Self::CheckpointRefused {
                name: text(refused.name, "CheckpointRefused.name")?,
                reason: text(refused.reason, "CheckpointRefused.reason")?,
            },
            Wire::Diverged(diverged) => Self::Diverged {
                step: limits::step(diverged.step, "WorkerDiverged.step")?,
                worker: limits::worker(diverged.worker, "WorkerDiverged.worker")?,
            },
            Wire::Draining(pb::DrainAsked {}) => Self::Draining,
            Wire::Drained(at) => Self::Drained { step: at_step(at)? },
            Wire::Finished(at) => Self::Finished { step: at_step(at)? },
            Wire::Failed(failed) => Self::Failed { reason: text(failed.reason, "RunFailed.reason")? },
            Wire::NoPlan(no) => Self::NoPlan { reason: text(no.reason, "RunHasNoPlan.reason")? },
        })
    }
}
