//! plan.proto: plans, slice sets, lane ranges.

use super::dispute::{disputes, put_disputes};
use super::variants;
use crate::error::{Malformed, Why};
use crate::limits::{
    self, MAX_LANES, MAX_MEMBERS, MAX_PLAN_SLICES, MAX_SLICES, MAX_UNITS, count, required, text,
};
use crate::pb;
use caravan_types::{
    IdleReason, Member, Part, Pipeline, Plan, SliceSet, Source, Stage, Transfer, Verdict, WorkerId,
};
use std::ops::Range;

variants!(Part, pb::Part, part, [Weights, State]);
variants!(
    IdleReason,
    pb::IdleReason,
    idle_reason,
    [MoreWorkersThanLanes, Leaving, TooSmall, NoRoomForAStage, WouldSlow, TooFewForAPipeline]
);

impl From<&SliceSet> for pb::SliceSet {
    fn from(set: &SliceSet) -> Self {
        Self { bounds: set.ranges().into_iter().flat_map(|range| [range.start, range.end]).collect() }
    }
}

impl From<Range<u32>> for pb::LaneRange {
    fn from(lanes: Range<u32>) -> Self {
        Self { start: lanes.start, end: lanes.end }
    }
}

/// A set that must be present.
pub(super) fn slice_set(set: Option<pb::SliceSet>, field: &'static str) -> Result<SliceSet, Malformed> {
    limits::slice_set(&required(set, field)?.bounds, MAX_SLICES, field)
}

/// A range of lanes that must be present and may be empty.
pub(super) fn lanes(lanes: Option<pb::LaneRange>, field: &'static str) -> Result<Range<u32>, Malformed> {
    let lanes = required(lanes, field)?;
    limits::range(lanes.start, lanes.end, MAX_LANES, field)
}

impl From<&Plan> for pb::Plan {
    fn from(plan: &Plan) -> Self {
        Self {
            generation: plan.generation.0,
            base: plan.base.0,
            verdict: plan.verdict.map(Into::into),
            recompute: plan.recompute,
            members: plan.members.iter().map(Into::into).collect(),
            pipelines: plan.pipelines.iter().map(Into::into).collect(),
            owners: plan.owners.iter().map(Into::into).collect(),
            transfers: plan.transfers.iter().map(Into::into).collect(),
            idle: plan.idle.iter().map(Into::into).collect(),
            disputes: put_disputes(&plan.disputes),
        }
    }
}

impl TryFrom<pb::Plan> for Plan {
    type Error = Malformed;

    fn try_from(plan: pb::Plan) -> Result<Self, Malformed> {
        count(&plan.members, MAX_MEMBERS, "Plan.members")?;
        count(&plan.pipelines, MAX_LANES as usize, "Plan.pipelines")?;
        count(&plan.owners, MAX_SLICES as usize, "Plan.owners")?;
        count(&plan.idle, MAX_MEMBERS, "Plan.idle")?;
        let members: Vec<Member> =
            plan.members.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        if !members.is_sorted_by(|a, b| a.worker < b.worker) {
            return Err(Why::NotAscending.at("Plan.members"));
        }
        Ok(Self {
            generation: limits::generation(plan.generation, "Plan.generation")?,
            base: limits::step(plan.base, "Plan.base")?,
            verdict: plan.verdict.map(TryInto::try_into).transpose()?,
            recompute: plan.recompute,
            members,
            pipelines: plan.pipelines.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            transfers: transfers(plan.transfers, plan.owners.len() as u32)?,
            owners: plan.owners.into_iter().map(owners).collect::<Result<_, _>>()?,
            idle: plan.idle.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            disputes: disputes(plan.disputes, "Plan.disputes")?,
        })
    }
}

impl From<Verdict> for pb::Verdict {
    fn from(verdict: Verdict) -> Self {
        use pb::verdict::How;
        let how = match verdict {
            Verdict::Update { norm } => How::Norm(norm),
            Verdict::Skip => How::Skip(pb::Skip {}),
        };
        Self { how: Some(how) }
    }
}

impl TryFrom<pb::Verdict> for Verdict {
    type Error = Malformed;

    fn try_from(verdict: pb::Verdict) -> Result<Self, Malformed> {
        use pb::verdict::How;
        match required(verdict.how, "Verdict.how")? {
            How::Norm(norm) if norm.is_finite() => Ok(Self::Update { norm }),
            How::Norm(_) => Err(Why::NotFinite.at("Verdict.norm")),
            How::Skip(pb::Skip {}) => Ok(Self::Skip),
        }
    }
}

/// The transfers of a plan over `slices` slices. A set of two bounds can stand for millions of
/// slices, so what all of them come to is counted before any is expanded.
fn transfers(transfers: Vec<pb::Transfer>, slices: u32) -> Result<Vec<Transfer>, Malformed> {
    let tops = transfers.iter().filter_map(|transfer| transfer.slices.as_ref()?.bounds.last());
    let total = tops.fold(0_u64, |sum, top| sum.saturating_add((*top).into()));
    limits::below(total, MAX_PLAN_SLICES + 1, "Plan.transfers")?;
    transfers.into_iter().map(|transfer| one_transfer(transfer, slices)).collect()
}

fn one_transfer(transfer: pb::Transfer, slices: u32) -> Result<Transfer, Malformed> {
    use pb::transfer::From;
    Ok(Transfer {
        to: limits::worker(transfer.to, "Transfer.to")?,
        from: match required(transfer.from, "Transfer.from")? {
            From::Peer(peer) => Source::Peer(limits::worker(peer, "Transfer.peer")?),
            From::Checkpoint(pb::FromCheckpoint {}) => Source::Checkpoint,
            From::Seed(pb::FromSeed {}) => Source::Init,
        },
        part: part(transfer.part, "Transfer.part")?,
        slices: {
            let set = required(transfer.slices, "Transfer.slices")?;
            limits::slice_set(&set.bounds, slices, "Transfer.slices")?
        },
    })
}

impl From<&Transfer> for pb::Transfer {
    fn from(transfer: &Transfer) -> Self {
        use pb::transfer::From;
        Self {
            to: transfer.to.0,
            from: Some(match transfer.from {
                Source::Peer(peer) => From::Peer(peer.0),
                Source::Checkpoint => From::Checkpoint(pb::FromCheckpoint {}),
                Source::Init => From::Seed(pb::FromSeed {}),
            }),
            part: pb::Part::from(transfer.part).into(),
            slices: Some((&transfer.slices).into()),
        }
    }
}

impl From<&Member> for pb::Member {
    fn from(member: &Member) -> Self {
        Self { worker: member.worker.0, fabric: member.fabric.clone() }
    }
}

impl TryFrom<pb::Member> for Member {
    type Error = Malformed;

    fn try_from(member: pb::Member) -> Result<Self, Malformed> {
        Ok(Self {
            worker: limits::worker(member.worker, "Member.worker")?,
            fabric: text(member.fabric, "Member.fabric")?,
        })
    }
}

impl From<&Pipeline> for pb::Pipeline {
    fn from(pipeline: &Pipeline) -> Self {
        let stage = |stage: &Stage| pb::Stage {
            worker: stage.worker.0,
            first_unit: stage.units.start,
            end_unit: stage.units.end,
        };
        Self {
            stages: pipeline.stages.iter().map(stage).collect(),
            lanes: Some(pipeline.lanes.clone().into()),
        }
    }
}

impl TryFrom<pb::Pipeline> for Pipeline {
    type Error = Malformed;

    fn try_from(pipeline: pb::Pipeline) -> Result<Self, Malformed> {
        count(&pipeline.stages, MAX_UNITS as usize, "Pipeline.stages")?;
        let stage = |stage: pb::Stage| {
            Ok(Stage {
                worker: limits::worker(stage.worker, "Stage.worker")?,
                units: limits::range(stage.first_unit, stage.end_unit, MAX_UNITS, "Stage.end_unit")?,
            })
        };
        Ok(Self {
            stages: pipeline.stages.into_iter().map(stage).collect::<Result<_, _>>()?,
            lanes: lanes(pipeline.lanes, "Pipeline.lanes")?,
        })
    }
}

impl From<&Vec<WorkerId>> for pb::Owners {
    fn from(owners: &Vec<WorkerId>) -> Self {
        Self { workers: owners.iter().map(|worker| worker.0).collect() }
    }
}

fn owners(owners: pb::Owners) -> Result<Vec<WorkerId>, Malformed> {
    limits::workers(owners.workers, "Owners.workers")
}

impl From<&(WorkerId, IdleReason)> for pb::Idle {
    fn from((worker, reason): &(WorkerId, IdleReason)) -> Self {
        Self { worker: worker.0, reason: pb::IdleReason::from(*reason).into() }
    }
}

impl TryFrom<pb::Idle> for (WorkerId, IdleReason) {
    type Error = Malformed;

    fn try_from(idle: pb::Idle) -> Result<Self, Malformed> {
        Ok((limits::worker(idle.worker, "Idle.worker")?, idle_reason(idle.reason, "Idle.reason")?))
    }
}
