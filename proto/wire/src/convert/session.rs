//! session.proto: what a worker and the coordinator say to each other.

use super::dispute::{disputes, put_disputes, put_sums, sums};
use super::plan::slice_set;
use super::variants;
use crate::error::{Malformed, Why};
use crate::limits::{self, MAX_RUN_SPEC, MAX_SLICES, count, cut, required, text, texts};
use crate::session::{Down, Up};
use crate::{pb, pb::from_worker, pb::to_worker};
use bytes::Bytes;
use caravan_types::message::{
    Activity, Committed, Farewell, FromWorker, Hello, Refusal, Report, ToWorker, Welcome,
};
use caravan_types::progress::EngineProgress;
use caravan_types::run_spec::RUN_SPEC_VERSION;
use caravan_types::task::SavedPart;
use caravan_types::timing::millis;
use caravan_types::{Digest, NonFinite, NotFinite, Peak, Plan, RunSpec, SliceId, Timing};
use prost::Message as _;
use std::sync::Arc;
use std::time::Duration;

variants!(
    Activity,
    pb::Activity,
    activity,
    [Waiting, Healing, Computing, Reducing, Preparing, Publishing, Finished]
);
variants!(Farewell, pb::Farewell, farewell, [Finished, Drained, Left, Fenced, Failed, Corrupt, NonFinite]);

impl TryFrom<pb::FromWorker> for Up {
    type Error = Malformed;

    fn try_from(up: pb::FromWorker) -> Result<Self, Malformed> {
        use from_worker::Message;
        Ok(Self::Message(match required(up.message, "FromWorker.message")? {
            Message::Hello(hello) => return Ok(Self::Hello(hello.try_into()?)),
            Message::Heartbeat(beat) => FromWorker::Heartbeat {
                applied: limits::step(beat.applied, "Heartbeat.applied")?,
                activity: activity(beat.activity, "Heartbeat.activity")?,
                wait: from_json(&beat.wait, "Heartbeat.wait")?,
                engine: EngineProgress {
                    moved: beat.engine_moved,
                    doing: from_json(&beat.engine_doing, "Heartbeat.engine_doing")?,
                    busy_ms: beat.busy_ms,
                    work: beat.work,
                },
            },
            Message::Peak(peak) => FromWorker::Peak(peak.try_into()?),
            Message::Report(report) => FromWorker::Report(report.try_into()?),
            Message::Committed(committed) => FromWorker::Committed(committed.try_into()?),
            Message::PeerLost(lost) => FromWorker::PeerLost {
                generation: limits::generation(lost.generation, "PeerLost.generation")?,
                peer: limits::worker(lost.peer, "PeerLost.peer")?,
            },
            Message::Diverged(diverged) => FromWorker::Diverged {
                generation: limits::generation(diverged.generation, "Diverged.generation")?,
                step: limits::step(diverged.step, "Diverged.step")?,
                disputes: disputes(diverged.disputes, "Diverged.disputes")?,
            },
            Message::Settled(settled) => FromWorker::Settled {
                generation: limits::generation(settled.generation, "Settled.generation")?,
                disputes: disputes(settled.disputes, "Settled.disputes")?,
            },
            Message::Corrupt(corrupt) => FromWorker::Corrupt { what: text(corrupt.what, "Corrupt.what")? },
            Message::Vouched(vouched) => FromWorker::Vouched {
                generation: limits::generation(vouched.generation, "Vouched.generation")?,
                step: limits::step(vouched.step, "Vouched.step")?,
                sums: sums(vouched.sums, "Vouched.sums")?,
            },
            Message::Saved(saved) => saved.try_into()?,
            Message::LoadFailed(failed) => FromWorker::LoadFailed {
                generation: limits::generation(failed.generation, "LoadFailed.generation")?,
                step: limits::step(failed.step, "LoadFailed.step")?,
                reason: text(failed.reason, "LoadFailed.reason")?,
            },
            Message::NonFinite(told) => FromWorker::NonFinite(told.try_into()?),
            Message::Leaving(pb::Leaving {}) => FromWorker::Leaving,
        }))
    }
}

impl From<FromWorker> for from_worker::Message {
    fn from(message: FromWorker) -> Self {
        match message {
            FromWorker::Heartbeat { applied, activity, wait, engine } => Self::Heartbeat(pb::Heartbeat {
                applied: applied.0,
                activity: pb::Activity::from(activity).into(),
                wait: to_json(&wait),
                engine_moved: engine.moved,
                engine_doing: to_json(&engine.doing),
                busy_ms: engine.busy_ms,
                work: engine.work,
            }),
            FromWorker::Peak(peak) => Self::Peak(peak.into()),
            FromWorker::Report(report) => Self::Report(report.into()),
            FromWorker::Committed(committed) => Self::Committed(committed.into()),
            FromWorker::PeerLost { generation, peer } => {
                Self::PeerLost(pb::PeerLost { generation: generation.0, peer: peer.0 })
            }
            FromWorker::Diverged { generation, step, disputes } => Self::Diverged(pb::Diverged {
                generation: generation.0,
                step: step.0,
                disputes: put_disputes(&disputes),
            }),
            FromWorker::Settled { generation, disputes } => {
                Self::Settled(pb::Settled { generation: generation.0, disputes: put_disputes(&disputes) })
            }
            FromWorker::Corrupt { what } => Self::Corrupt(pb::Corrupt { what: cut(what) }),
            FromWorker::Vouched { generation, step, sums } => {
                let sums = put_sums(sums);
                Self::Vouched(pb::Vouched { generation: generation.0, step: step.0, sums })
            }
            FromWorker::Saved { generation, step, part } => Self::Saved(pb::Saved {
                generation: generation.0,
                step: step.0,
                outcome: Some(match part {
                    Ok(part) => pb::saved::Outcome::Part(part.into()),
                    Err(reason) => pb::saved::Outcome::Failure(cut(reason)),
                }),
            }),
            FromWorker::LoadFailed { generation, step, reason } => Self::LoadFailed(pb::LoadFailed {
                generation: generation.0,
                step: step.0,
                reason: cut(reason),
            }),
            FromWorker::NonFinite(told) => Self::NonFinite(told.into()),
            FromWorker::Leaving => Self::Leaving(pb::Leaving {}),
        }
    }
}

/// Longest description of a wait, an activity or a finding: a dozen numbers with their names.
const MAX_PROGRESS: usize = 1 << 10;

#[expect(clippy::expect_used, reason = "only maps and hand-written serialisers fail; these have neither")]
fn to_json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data")
}

fn from_json<T: serde::de::DeserializeOwned>(json: &[u8], field: &'static str) -> Result<T, Malformed> {
    count(json, MAX_PROGRESS, field)?;
    serde_json::from_slice(json).map_err(|error| Why::Unreadable(error.to_string()).at(field))
}

fn decoded(plan: Bytes) -> Result<Plan, Malformed> {
    let plan = pb::Plan::decode(plan).map_err(|e| Why::Unreadable(e.to_string()).at("ToWorker.plan"))?;
    plan.try_into()
}

impl TryFrom<pb::ToWorker> for Down {
    type Error = Malformed;

    fn try_from(down: pb::ToWorker) -> Result<Self, Malformed> {
        use to_worker::Message;
        Ok(Self::Message(match required(down.message, "ToWorker.message")? {
            Message::Welcome(welcome) => return Ok(Self::Welcome(Box::new(welcome.try_into()?))),
            Message::Refused(refusal) => return Ok(Self::Refused(refusal.try_into()?)),
            Message::Stop(stop) => ToWorker::Stop {
                generation: limits::generation(stop.generation, "Stop.generation")?,
                boundary: stop.boundary,
            },
            Message::Plan(plan) => ToWorker::Plan(Arc::new(decoded(plan)?)),
            Message::Save(save) => ToWorker::Save {
                generation: limits::generation(save.generation, "Save.generation")?,
                step: limits::step(save.step, "Save.step")?,
                slices: slice_set(save.slices, "Save.slices")?,
            },
            Message::Goodbye(goodbye) => ToWorker::Goodbye(farewell(goodbye.reason, "Goodbye.reason")?),
        }))
    }
}

impl From<ToWorker> for to_worker::Message {
    fn from(message: ToWorker) -> Self {
        match message {
            ToWorker::Stop { generation, boundary } => {
                Self::Stop(pb::Stop { generation: generation.0, boundary })
            }
            ToWorker::Plan(plan) => Self::Plan(pb::Plan::from(&*plan).encode_to_vec().into()),
            ToWorker::Save { generation, step, slices } => Self::Save(pb::Save {
                generation: generation.0,
                step: step.0,
                slices: Some((&slices).into()),
            }),
            ToWorker::Goodbye(reason) => {
                Self::Goodbye(pb::Goodbye { reason: pb::Farewell::from(reason).into() })
            }
        }
    }
}

impl From<Hello> for pb::Hello {
    fn from(hello: Hello) -> Self {
        let Hello { protocol, build, name, host, fabric, families, threads, memory, speed, resume } = hello;
        let resume = resume.map(|worker| worker.0);
        Self { protocol, build, name, host, fabric, families, threads, memory, speed, resume }
    }
}

impl TryFrom<pb::Hello> for Hello {
    type Error = Malformed;

    fn try_from(hello: pb::Hello) -> Result<Self, Malformed> {
        Ok(Self {
            protocol: hello.protocol,
            build: text(hello.build, "Hello.build")?,
            name: text(hello.name, "Hello.name")?,
            host: text(hello.host, "Hello.host")?,
            fabric: text(hello.fabric, "Hello.fabric")?,
            families: texts(hello.families, "Hello.families")?,
            threads: hello.threads,
            resume: hello.resume.map(|worker| limits::worker(worker, "Hello.resume")).transpose()?,
            memory: hello.memory,
            speed: limits::speed(hello.speed, "Hello.speed")?,
        })
    }
}

impl From<Peak> for pb::Peak {
    fn from(peak: Peak) -> Self {
        Self { thread: peak.thread, threads: peak.threads, cores: peak.cores, place: cut(peak.place) }
    }
}

impl TryFrom<pb::Peak> for Peak {
    type Error = Malformed;

    fn try_from(peak: pb::Peak) -> Result<Self, Malformed> {
        Ok(Self {
            thread: limits::flops(peak.thread, "Peak.thread")?,
            threads: limits::some(peak.threads, "Peak.threads")?,
            cores: limits::some(peak.cores, "Peak.cores")?,
            place: text(peak.place, "Peak.place")?,
        })
    }
}

impl From<Welcome> for pb::Welcome {
    fn from(welcome: Welcome) -> Self {
        Self {
            worker: welcome.worker.0,
            spec: Some((&welcome.spec).into()),
            redundancy: welcome.redundancy,
            detect_ms: millis(welcome.timing.detect()),
            heartbeat_ms: welcome.timing.set_heartbeat().map(millis),
            reattach_ms: welcome.timing.set_reattach().map(millis),
            checkpoint_every: welcome.checkpoint_every,
            data: welcome.data,
            checkpoints: welcome.checkpoints,
            init: welcome.init,
            committed: welcome.committed.0,
        }
    }
}

impl TryFrom<pb::Welcome> for Welcome {
    type Error = Malformed;

    fn try_from(welcome: pb::Welcome) -> Result<Self, Malformed> {
        let timing = Timing::from_millis(welcome.detect_ms)
            .with_heartbeat(welcome.heartbeat_ms.map(Duration::from_millis))
            .with_reattach(welcome.reattach_ms.map(Duration::from_millis));
        timing.validate().map_err(|disorder| Why::Disorder(disorder).at("Welcome.detect_ms"))?;
        Ok(Self {
            worker: limits::worker(welcome.worker, "Welcome.worker")?,
            spec: required(welcome.spec, "Welcome.spec")?.try_into()?,
            redundancy: welcome.redundancy,
            timing,
            checkpoint_every: welcome.checkpoint_every,
            data: text(welcome.data, "Welcome.data")?,
            checkpoints: text(welcome.checkpoints, "Welcome.checkpoints")?,
            init: welcome.init.map(|init| text(init, "Welcome.init")).transpose()?,
            committed: limits::step(welcome.committed, "Welcome.committed")?,
        })
    }
}

impl From<&RunSpec> for pb::RunSpec {
    #[expect(clippy::expect_used, reason = "only maps and hand-written serialisers fail; a spec has neither")]
    fn from(spec: &RunSpec) -> Self {
        let json = serde_json::to_vec(spec).expect("a run spec is plain data");
        Self { version: spec.version, json }
    }
}

impl TryFrom<pb::RunSpec> for RunSpec {
    type Error = Malformed;

    fn try_from(spec: pb::RunSpec) -> Result<Self, Malformed> {
        let version = |is: u32, field| match is {
            RUN_SPEC_VERSION => Ok(()),
            is => Err(Why::Version { is, must: RUN_SPEC_VERSION }.at(field)),
        };
        version(spec.version, "RunSpec.version")?;
        count(&spec.json, MAX_RUN_SPEC, "RunSpec.json")?;
        let spec: Self = serde_json::from_slice(&spec.json)
            .map_err(|error| Why::Unreadable(error.to_string()).at("RunSpec.json"))?;
        version(spec.version, "RunSpec.json")?;
        Ok(spec)
    }
}

impl From<Refusal> for pb::Refusal {
    fn from(refusal: Refusal) -> Self {
        use pb::refusal::Reason;
        Self {
            reason: Some(match refusal {
                Refusal::Protocol { ours, theirs } => Reason::Protocol(pb::ProtocolRefusal { ours, theirs }),
                Refusal::Numerics { needed, offered } => {
                    Reason::Numerics(pb::NumericsRefusal { needed, offered })
                }
                Refusal::Over(reason) => {
                    Reason::Over(pb::RunOver { reason: pb::Farewell::from(reason).into() })
                }
                Refusal::NotTaking => Reason::NotTaking(pb::NotTaking {}),
                Refusal::Fenced { worker, generation } => {
                    Reason::Fenced(pb::FencedRefusal { worker: worker.0, generation: generation.0 })
                }
            }),
        }
    }
}

impl TryFrom<pb::Refusal> for Refusal {
    type Error = Malformed;

    fn try_from(refusal: pb::Refusal) -> Result<Self, Malformed> {
        use pb::refusal::Reason;
        Ok(match required(refusal.reason, "Refusal.reason")? {
            Reason::Protocol(pb::ProtocolRefusal { ours, theirs }) => Self::Protocol { ours, theirs },
            Reason::Numerics(refusal) => Self::Numerics {
                needed: text(refusal.needed, "NumericsRefusal.needed")?,
                offered: texts(refusal.offered, "NumericsRefusal.offered")?,
            },
            Reason::Over(over) => Self::Over(farewell(over.reason, "RunOver.reason")?),
            Reason::NotTaking(pb::NotTaking {}) => Self::NotTaking,
            Reason::Fenced(pb::FencedRefusal { worker, generation }) => Self::Fenced {
                worker: limits::worker(worker, "FencedRefusal.worker")?,
                generation: limits::generation(generation, "FencedRefusal.generation")?,
            },
        })
    }
}

impl From<Report> for pb::Report {
    fn from(report: Report) -> Self {
        Self {
            generation: report.generation.0,
            applied: report.applied.0,
            verdict: report.verdict.map(Into::into),
            state: Some((&report.state).into()),
            weights: Some((&report.weights).into()),
            prepared: report.prepared.as_ref().map(Into::into),
            sums: put_sums(report.sums),
        }
    }
}

impl TryFrom<pb::Report> for Report {
    type Error = Malformed;

    fn try_from(report: pb::Report) -> Result<Self, Malformed> {
        let prepared = |set: pb::SliceSet| limits::slice_set(&set.bounds, MAX_SLICES, "Report.prepared");
        Ok(Self {
            generation: limits::generation(report.generation, "Report.generation")?,
            applied: limits::step(report.applied, "Report.applied")?,
            verdict: report.verdict.map(TryInto::try_into).transpose()?,
            state: slice_set(report.state, "Report.state")?,
            weights: slice_set(report.weights, "Report.weights")?,
            prepared: report.prepared.map(prepared).transpose()?,
            sums: sums(report.sums, "Report.sums")?,
        })
    }
}

impl From<Committed> for pb::Committed {
    fn from(committed: Committed) -> Self {
        let Committed { generation, step, loss, norm, tokens, took_ms } = committed;
        Self { generation: generation.0, step: step.0, loss, norm, tokens, took_ms }
    }
}

impl TryFrom<pb::Committed> for Committed {
    type Error = Malformed;

    fn try_from(committed: pb::Committed) -> Result<Self, Malformed> {
        let pb::Committed { generation, step, loss, norm, tokens, took_ms } = committed;
        Ok(Self {
            generation: limits::generation(generation, "Committed.generation")?,
            step: limits::step(step, "Committed.step")?,
            loss,
            norm,
            tokens,
            took_ms,
        })
    }
}

impl From<NonFinite> for pb::NonFinite {
    fn from(told: NonFinite) -> Self {
        let NonFinite { generation, step, what, skipped, finding } = told;
        let (loss, finding) = (what == NotFinite::Loss, finding.as_ref().map(to_json).unwrap_or_default());
        Self { generation: generation.0, step: step.0, loss, skipped, finding }
    }
}

impl TryFrom<pb::NonFinite> for NonFinite {
    type Error = Malformed;

    fn try_from(told: pb::NonFinite) -> Result<Self, Malformed> {
        let finding = Some(&told.finding).filter(|json| !json.is_empty());
        Ok(Self {
            generation: limits::generation(told.generation, "NonFinite.generation")?,
            step: limits::step(told.step, "NonFinite.step")?,
            what: if told.loss { NotFinite::Loss } else { NotFinite::Gradient },
            skipped: told.skipped,
            finding: finding.map(|json| from_json(json, "NonFinite.finding")).transpose()?,
        })
    }
}

impl TryFrom<pb::Saved> for FromWorker {
    type Error = Malformed;

    fn try_from(saved: pb::Saved) -> Result<Self, Malformed> {
        use pb::saved::Outcome;
        Ok(Self::Saved {
            generation: limits::generation(saved.generation, "Saved.generation")?,
            step: limits::step(saved.step, "Saved.step")?,
            part: match required(saved.outcome, "Saved.outcome")? {
                Outcome::Part(part) => Ok(part.try_into()?),
                Outcome::Failure(reason) => Err(text(reason, "Saved.failure")?),
            },
        })
    }
}

impl From<SavedPart> for pb::SavedPart {
    fn from(part: SavedPart) -> Self {
        let slice =
            |(slice, digest): (SliceId, Digest)| pb::SavedSlice { slice: slice.0, digest: digest.0.to_vec() };
        Self {
            file: part.file,
            bytes: part.bytes,
            digest: part.digest.0.to_vec(),
            slices: part.slices.into_iter().map(slice).collect(),
        }
    }
}

impl TryFrom<pb::SavedPart> for SavedPart {
    type Error = Malformed;

    fn try_from(part: pb::SavedPart) -> Result<Self, Malformed> {
        count(&part.slices, MAX_SLICES as usize, "SavedPart.slices")?;
        let slice = |saved: pb::SavedSlice| {
            Ok((
                limits::slice(saved.slice, "SavedSlice.slice")?,
                limits::digest(&saved.digest, "SavedSlice.digest")?,
            ))
        };
        Ok(Self {
            file: text(part.file, "SavedPart.file")?,
            bytes: part.bytes,
            digest: limits::digest(&part.digest, "SavedPart.digest")?,
            slices: part.slices.into_iter().map(slice).collect::<Result<_, _>>()?,
        })
    }
}
