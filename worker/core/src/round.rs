//! The life of one step: what has been computed, what has come in, who has voted.
//!
//! A peer can be one step ahead: it has applied the step that this member is prepared for, and
//! already sends its partial sums for the next one, or the weights that it publishes. Such
//! messages are kept by step and counted when their step begins here; anything further ahead or
//! behind is not of this protocol.

use crate::schedule::Schedule;
use caravan_types::peer::{LaneResult, Prepared};
use caravan_types::{Checksum, Lane, MicroId, Node, SliceId, SliceSet, Step, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// The step in flight.
#[derive(Clone, Debug, Default)]
pub(crate) struct Round {
    /// What is still to be computed, once computing was begun.
    pub(crate) schedule: Option<Schedule>,
    /// What came of this member's lanes, so far.
    pub(crate) lanes: Vec<LaneResult>,
    /// Slices whose reduction was ordered.
    pub(crate) reducing: SliceSet,
    /// Block norms and checksum of the slices that are reduced.
    pub(crate) reduced: BTreeMap<SliceId, (Vec<f64>, Checksum)>,
    /// Whether the engine was asked to look at what was computed with, and whether it has.
    pub(crate) verifying: bool,
    pub(crate) verified: bool,
    /// Whether this member has voted.
    pub(crate) voted: bool,
}

/// What came in for the step in flight and for the one after it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inbox {
    partials: BTreeMap<Step, BTreeMap<SliceId, BTreeSet<Node>>>,
    votes: BTreeMap<Step, BTreeMap<WorkerId, Prepared>>,
    /// Weights published for the step in flight, before it was applied here.
    early: BTreeMap<Step, SliceSet>,
    /// What came from the stages beside this one.
    streams: BTreeMap<Step, BTreeSet<Stream>>,
}

/// A micro-batch's residual stream or its gradient.
pub(crate) type Stream = (Direction, MicroId);

/// Where a micro-batch is going.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Direction {
    /// To the last stage: activations.
    Forward,
    /// To the first stage: their gradients.
    Backward,
}

impl Inbox {
    /// False where it was there already.
    pub(crate) fn partial(&mut self, step: Step, slice: SliceId, node: Node) -> bool {
        self.partials.entry(step).or_default().entry(slice).or_default().insert(node)
    }

    /// How many partial sums of a slice have come in.
    pub(crate) fn partials(&self, step: Step, slice: SliceId) -> usize {
        self.partials.get(&step).and_then(|s| s.get(&slice)).map_or(0, BTreeSet::len)
    }

    /// False where it was there already.
    pub(crate) fn vote(&mut self, from: WorkerId, vote: Prepared) -> bool {
        let votes = self.votes.entry(vote.step).or_default();
        if votes.contains_key(&from) {
            return false;
        }
        votes.insert(from, vote);
        true
    }

    /// Whether a member has voted for a step.
    pub(crate) fn has_vote(&self, step: Step, member: WorkerId) -> bool {
        self.votes.get(&step).is_some_and(|votes| votes.contains_key(&member))
    }

    /// Whether a partial sum has come in.
    pub(crate) fn has_partial(&self, step: Step, slice: SliceId, node: Node) -> bool {
        let of_slice = self.partials.get(&step).and_then(|s| s.get(&slice));
        of_slice.is_some_and(|nodes| nodes.contains(&node))
    }

    /// The votes for a step, if there are `members` of them.
    pub(crate) fn unanimous(&self, step: Step, members: usize) -> Option<&BTreeMap<WorkerId, Prepared>> {
        self.votes.get(&step).filter(|votes| votes.len() == members)
    }

    /// False where it was there already.
    pub(crate) fn stream(&mut self, step: Step, stream: Stream) -> bool {
        self.streams.entry(step).or_default().insert(stream)
    }

    /// Whether it has come in.
    pub(crate) fn has_stream(&self, step: Step, stream: Stream) -> bool {
        self.streams.get(&step).is_some_and(|s| s.contains(&stream))
    }

    /// False where they were there already.
    pub(crate) fn early(&mut self, step: Step, slice: SliceId) -> bool {
        self.early.entry(step).or_default().insert(slice)
    }

    /// The early weights of a step that is now applied.
    pub(crate) fn take_early(&mut self, step: Step) -> SliceSet {
        self.early.remove(&step).unwrap_or_default()
    }

    /// Forgets all up to and including `applied`.
    pub(crate) fn forget(&mut self, applied: Step) {
        self.partials = self.partials.split_off(&applied.next());
        self.votes = self.votes.split_off(&applied.next());
        self.early = self.early.split_off(&applied.next());
        self.streams = self.streams.split_off(&applied.next());
    }
}

/// What the votes for a step add up to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Tally {
    pub(crate) norm: f64,
    pub(crate) loss: f64,
    pub(crate) tokens: u64,
    /// The first lane whose loss is not finite.
    pub(crate) lane: Option<Lane>,
}

/// Adds the votes up: squared block norms in the order of the flat model, losses in the order
/// of the lanes, both in fp64, so that every member gets the same bits from the same votes.
///
/// `by_member` is a bug: sums member by member, as an all-reduce of sums would.
pub(crate) fn count(votes: &BTreeMap<WorkerId, Prepared>, by_member: bool) -> Tally {
    let mut blocks: BTreeMap<SliceId, &[f64]> = BTreeMap::new();
    let mut lanes: BTreeMap<Lane, LaneResult> = BTreeMap::new();
    for vote in votes.values() {
        blocks.extend(vote.slices.iter().map(|slice| (slice.slice, slice.norms.as_slice())));
        lanes.extend(vote.lanes.iter().map(|result| (result.lane, *result)));
    }
    let squares: f64 = if by_member {
        let mine = |vote: &Prepared| vote.slices.iter().flat_map(|slice| &slice.norms).sum::<f64>();
        votes.values().map(mine).sum()
    } else {
        blocks.values().flat_map(|b| b.iter()).sum()
    };
    let loss = lanes.values().map(|lane| lane.loss).sum();
    let tokens = lanes.values().map(|lane| lane.tokens).sum();
    let lane = lanes.values().find(|lane| !lane.loss.is_finite()).map(|lane| lane.lane);
    Tally { norm: squares.sqrt(), loss, tokens, lane }
}
