//! Whether the votes for a step agree: equal work gives equal bits, or somebody is corrupt.

use crate::part::Place;
use caravan_types::peer::{Prepared, SliceVote};
use caravan_types::{Checksum, Dispute, Opinion, SliceId, Step, Subject, WorkerId};
use std::collections::BTreeMap;

/// The votes for one step, slice by slice.
pub(crate) struct Ballot<'a> {
    step: Step,
    votes: &'a BTreeMap<WorkerId, Prepared>,
    slices: BTreeMap<SliceId, Vec<(WorkerId, &'a SliceVote)>>,
}

impl<'a> Ballot<'a> {
    pub(crate) fn new(step: Step, votes: &'a BTreeMap<WorkerId, Prepared>) -> Self {
        let mut slices: BTreeMap<SliceId, Vec<(WorkerId, &SliceVote)>> = BTreeMap::new();
        for (worker, vote) in votes {
            for slice in &vote.slices {
                slices.entry(slice.slice).or_default().push((*worker, slice));
            }
        }
        Self { step, votes, slices }
    }

    /// What owners of one slice differ about: the training state that the last step has left, or
    /// else the gradient that is to change it.
    pub(crate) fn disputes(&self) -> Vec<Dispute> {
        let differ = |slice: &SliceId| {
            let about =
                |subject| Dispute::find(*slice, self.at(subject), subject, self.said(*slice, subject));
            about(Subject::State).or_else(|| about(Subject::Gradient))
        };
        self.slices.keys().filter_map(differ).collect()
    }

    /// The step that votes for this one say something about.
    fn at(&self, subject: Subject) -> Step {
        match subject {
            Subject::Gradient => self.step,
            Subject::State => Step(self.step.0.saturating_sub(1)),
        }
    }

    fn said(&self, slice: SliceId, subject: Subject) -> Vec<(WorkerId, Opinion)> {
        let opinion = |vote: &SliceVote| match subject {
            Subject::Gradient => Opinion::of_gradient(vote.gradient, &vote.norms),
            Subject::State => Opinion::of_state(vote.state),
        };
        self.slices.get(&slice).into_iter().flatten().map(|(worker, vote)| (*worker, opinion(vote))).collect()
    }

    /// A member that has computed with other weights than their owners have, who agree. Whatever
    /// it has added to gradients is wrong.
    pub(crate) fn misread(&self, place: &Place) -> Option<WorkerId> {
        let weights = |slice: SliceId| {
            let owner = self.slices.get(&slice).and_then(|votes| votes.first());
            owner.map_or(Checksum::default(), |(_, vote)| vote.state.weights)
        };
        place.computing().find_map(|(worker, slices)| {
            let right = Opinion::of_weights(slices.map(weights));
            self.votes.get(&worker).filter(|vote| vote.weights != right).map(|_| worker)
        })
    }

    /// Those of earlier disputes that are about what was voted on now, with what all say now.
    pub(crate) fn settle(&self, disputes: &[Dispute]) -> Vec<Dispute> {
        let ours = disputes.iter().filter(|d| d.step == self.at(d.subject));
        ours.map(|d| Dispute { said: self.said(d.slice, d.subject), ..d.clone() }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caravan_types::{Generation, Member, ModelShape, Pipeline, Plan, SliceSum, SliceTable, Stage};
    use std::sync::Arc;

    fn votes(given: &[(f64, u32, u32)]) -> BTreeMap<WorkerId, Prepared> {
        let vote = |(norm, gradient, weights): &(f64, u32, u32)| Prepared {
            step: Step(4),
            slices: vec![SliceVote {
                slice: SliceId(2),
                norms: vec![*norm],
                gradient: Checksum(*gradient),
                state: SliceSum { weights: Checksum(*weights), moments: Some(Checksum(1)) },
            }],
            weights: Opinion(0),
            lanes: Vec::new(),
            stop_for: None,
        };
        (1..).map(WorkerId).zip(given.iter().map(vote)).collect()
    }

    fn differ(given: &[(f64, u32, u32)]) -> Option<(Subject, Step)> {
        let votes = votes(given);
        let disputes = Ballot::new(Step(4), &votes).disputes();
        assert!(disputes.len() < 2);
        disputes.first().map(|d| (d.subject, d.step))
    }

    #[test]
    fn one_bit_of_state_gradient_or_norm_is_a_dispute() {
        assert_eq!(differ(&[(1.0, 5, 7), (1.0, 5, 7)]), None);
        assert_eq!(differ(&[(1.0, 5, 7), (1.0, 5, 8)]), Some((Subject::State, Step(3))));
        assert_eq!(differ(&[(1.0, 5, 7), (1.0, 6, 7)]), Some((Subject::Gradient, Step(4))));
        assert_eq!(differ(&[(1.0, 5, 7), (1.0 + f64::EPSILON, 5, 7)]), Some((Subject::Gradient, Step(4))));
        assert_eq!(differ(&[(1.0, 5, 7)]), None, "there is nobody to differ from");
    }

    /// Both compute with everything, and the first one owns it.
    fn place(table: &SliceTable, shape: &ModelShape) -> Place {
        let [a, b] = [1, 2].map(WorkerId);
        let pipeline = |worker, lane: u32| Pipeline {
            stages: vec![Stage { worker, units: 0..shape.units() }],
            lanes: lane..lane + 1,
        };
        let plan = Plan {
            generation: Generation(1),
            base: Step(3),
            verdict: None,
            recompute: false,
            members: [a, b].map(|worker| Member { worker, fabric: String::new() }).into(),
            pipelines: vec![pipeline(a, 0), pipeline(b, 1)],
            owners: vec![vec![a]; table.len()],
            transfers: Vec::new(),
            idle: Vec::new(),
            disputes: Vec::new(),
        };
        Place::new(a, Arc::new(plan), table, shape.units()).unwrap()
    }

    #[test]
    fn a_member_that_has_computed_with_other_weights_than_their_owners_have_is_named() {
        let shape = ModelShape::preset("260k").unwrap();
        let table = SliceTable::new(&shape);
        let place = place(&table, &shape);
        let state = |slice: SliceId| SliceSum { weights: Checksum(slice.0 * 7), moments: None };
        let slice = |slice| SliceVote { slice, norms: vec![], gradient: Checksum(0), state: state(slice) };
        let weights = |flip: u32| {
            Opinion::of_weights(
                table.iter().map(|(id, _)| Checksum(state(id).weights.0 ^ (u32::from(id.0 == 5) * flip))),
            )
        };
        let vote =
            |slices, weights| Prepared { step: Step(4), slices, weights, lanes: vec![], stop_for: None };
        let misread = |flip: [u32; 2]| {
            let owned = table.iter().map(|(id, _)| slice(id)).collect();
            let a = (WorkerId(1), vote(owned, weights(flip[0])));
            let votes = [a, (WorkerId(2), vote(Vec::new(), weights(flip[1])))].into();
            Ballot::new(Step(4), &votes).misread(&place)
        };
        assert_eq!(misread([0, 0]), None);
        assert_eq!(misread([0, 1]), Some(WorkerId(2)));
        assert_eq!(misread([1, 0]), Some(WorkerId(1)));
    }

    #[test]
    fn an_earlier_dispute_is_settled_by_the_votes_of_its_step() {
        let votes = votes(&[(1.0, 5, 7), (1.0, 5, 7)]);
        let ballot = Ballot::new(Step(4), &votes);
        let dispute =
            |step, subject| Dispute { slice: SliceId(2), step: Step(step), subject, said: Vec::new() };
        let old = [dispute(4, Subject::Gradient), dispute(3, Subject::State), dispute(4, Subject::State)];
        let settled = ballot.settle(&old);
        assert_eq!(settled.len(), 2);
        assert_eq!(settled[0].said[0].1, Opinion::of_gradient(Checksum(5), &[1.0]));
        assert_eq!(settled[1].said.len(), 2);
    }
}
