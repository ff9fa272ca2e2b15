//! dispute.proto: what is compared to find silent corruption.

use super::variants;
use crate::error::Malformed;
use crate::limits::{self, MAX_MEMBERS, MAX_SLICES, count};
use crate::pb;
use caravan_types::{Checksum, Dispute, Opinion, SliceId, SliceSum, Subject, WorkerId};

variants!(Subject, pb::Subject, subject, [Gradient, State]);

pub(super) fn put_sums(sums: Vec<(SliceId, SliceSum)>) -> Vec<pb::SliceSum> {
    let sum = |(slice, sum): (SliceId, SliceSum)| pb::SliceSum {
        slice: slice.0,
        weights: sum.weights.0,
        moments: sum.moments.map(|m| m.0),
    };
    sums.into_iter().map(sum).collect()
}

pub(super) fn sums(
    sums: Vec<pb::SliceSum>,
    field: &'static str,
) -> Result<Vec<(SliceId, SliceSum)>, Malformed> {
    count(&sums, MAX_SLICES as usize, field)?;
    let sum = |sum: pb::SliceSum| {
        let slice = limits::slice(sum.slice, "SliceSum.slice")?;
        Ok((slice, SliceSum { weights: Checksum(sum.weights), moments: sum.moments.map(Checksum) }))
    };
    sums.into_iter().map(sum).collect()
}

pub(super) fn put_disputes(disputes: &[Dispute]) -> Vec<pb::Dispute> {
    let said = |(worker, opinion): &(WorkerId, Opinion)| pb::Said { worker: worker.0, opinion: opinion.0 };
    let dispute = |dispute: &Dispute| pb::Dispute {
        slice: dispute.slice.0,
        step: dispute.step.0,
        subject: pb::Subject::from(dispute.subject).into(),
        said: dispute.said.iter().map(said).collect(),
    };
    disputes.iter().map(dispute).collect()
}

pub(super) fn disputes(disputes: Vec<pb::Dispute>, field: &'static str) -> Result<Vec<Dispute>, Malformed> {
    count(&disputes, MAX_SLICES as usize, field)?;
    let said = |said: pb::Said| Ok((limits::worker(said.worker, "Said.worker")?, Opinion(said.opinion)));
    let dispute = |dispute: pb::Dispute| {
        count(&dispute.said, MAX_MEMBERS, "Dispute.said")?;
        Ok(Dispute {
            slice: limits::slice(dispute.slice, "Dispute.slice")?,
            step: limits::step(dispute.step, "Dispute.step")?,
            subject: subject(dispute.subject, "Dispute.subject")?,
            said: dispute.said.into_iter().map(said).collect::<Result<_, _>>()?,
        })
    };
    disputes.into_iter().map(dispute).collect()
}
