//! status.proto: what people are shown of a run.

use super::plan::lanes;
use super::session::activity;
use super::variants;
use crate::error::{Malformed, Why};
use crate::limits::{self, MAX_EVENT, MAX_MEMBERS, MAX_SLICES, below, count, cut, text};
use crate::pb;
use caravan_types::status::{LoggedEvent, Phase, Snapshot, StepMetrics, WorkerStatus};

variants!(
    Phase,
    pb::Phase,
    phase,
    [Gathering, Recovering, Regrouping, Running, Draining, Drained, Finished, Failed]
);

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
            skipped: snapshot.skipped,
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
            skipped: below(snapshot.skipped, limits::MAX_COUNT, "Snapshot.skipped")?,
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
            mfu: metrics.mfu,
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
            mfu: metrics.mfu,
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
    #[expect(
        clippy::expect_used,
        reason = "only maps and hand-written serialisers fail; an event has neither"
    )]
    fn from(logged: LoggedEvent) -> Self {
        Self {
            number: logged.number,
            unix_ms: logged.unix_ms,
            step: logged.step.0,
            text: cut(logged.text),
            event: serde_json::to_vec(&logged.event).expect("an event is plain data"),
        }
    }
}

impl TryFrom<pb::LoggedEvent> for LoggedEvent {
    type Error = Malformed;

    fn try_from(logged: pb::LoggedEvent) -> Result<Self, Malformed> {
        count(&logged.event, MAX_EVENT, "LoggedEvent.event")?;
        let event = serde_json::from_slice(&logged.event)
            .map_err(|error| Why::Unreadable(error.to_string()).at("LoggedEvent.event"))?;
        Ok(Self {
            number: logged.number,
            unix_ms: logged.unix_ms,
            step: limits::step(logged.step, "LoggedEvent.step")?,
            text: text(logged.text, "LoggedEvent.text")?,
            event,
        })
    }
}
