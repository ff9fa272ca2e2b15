//! A member's place in a plan, worked out once when the plan is adopted.

use caravan_types::lanes::cover;
use caravan_types::peer::{Prepared, SliceVote};
use caravan_types::{
    Generation, Lane, Node, Part, Plan, SliceId, SliceSet, SliceTable, Source, Step, WorkerId,
};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// What one worker is to do and to expect in one generation.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) me: WorkerId,
    pub(crate) plan: Arc<Plan>,
    /// Its own lanes; empty for a member without any.
    pub(crate) lanes: Range<Lane>,
    /// Its own units; empty for a member without lanes.
    pub(crate) stage: Range<u32>,
    /// Who has the stage before its own, and the one after it.
    pub(crate) before: Option<WorkerId>,
    pub(crate) after: Option<WorkerId>,
    /// Everybody's stage.
    stages: BTreeMap<WorkerId, Range<u32>>,
    /// Stages from its own to the last.
    pub(crate) depth: u32,
    /// Slices that it owns.
    pub(crate) owned: SliceSet,
    /// Slices whose weights it publishes and saves.
    pub(crate) primary: SliceSet,
    /// Slices that it computes with.
    pub(crate) computed: SliceSet,
    /// For each unit, which worker sends the partial sum of which sub-tree of lanes.
    senders: Vec<BTreeMap<Node, WorkerId>>,
    /// For each slice, who computes with it and does not own it.
    readers: Vec<Vec<WorkerId>>,
    units: Vec<u32>,
}

impl Place {
    /// None where the worker is not a member, or where the plan does not fit the model.
    pub(crate) fn new(me: WorkerId, plan: Arc<Plan>, table: &SliceTable, units: u32) -> Option<Self> {
        if !plan.has(me) || plan.owners.len() != table.len() || plan.owners.iter().any(Vec::is_empty) {
            return None;
        }
        let mut senders = vec![BTreeMap::new(); units as usize];
        let mut stages: BTreeMap<WorkerId, Range<u32>> = BTreeMap::new();
        let (mut lanes, mut mine, mut before, mut after, mut depth) = (0..0, 0..0, None, None, 0);
        for pipeline in &plan.pipelines {
            for (i, stage) in pipeline.stages.iter().enumerate() {
                if stage.units.end > units {
                    return None;
                }
                stages.insert(stage.worker, stage.units.clone());
                for unit in stage.units.clone() {
                    let nodes = cover(pipeline.lanes.clone());
                    senders[unit as usize].extend(nodes.into_iter().map(|n| (n, stage.worker)));
                }
                if stage.worker == me {
                    (lanes, mine) = (pipeline.lanes.clone(), stage.units.clone());
                    before = i.checked_sub(1).map(|i| pipeline.stages[i].worker);
                    after = pipeline.stages.get(i + 1).map(|s| s.worker);
                    depth = (pipeline.stages.len() - i) as u32;
                }
            }
        }
        let computes = |w: &WorkerId, unit: u32| stages.get(w).is_some_and(|s| s.contains(&unit));
        let mut readers = Vec::with_capacity(table.len());
        let mut computed = SliceSet::default();
        for (id, slice) in table.iter() {
            let owners = &plan.owners[id.0 as usize];
            let others = stages.keys().filter(|w| computes(w, slice.unit.0) && !owners.contains(w));
            readers.push(others.copied().collect());
            if computes(&me, slice.unit.0) {
                computed.insert(id);
            }
        }
        let units = table.iter().map(|(_, s)| s.unit.0).collect();
        let (owned, primary) = (plan.owned_by(me), plan.primary_of(me));
        let stage = mine;
        Some(Self {
            me,
            plan,
            lanes,
            stage,
            before,
            after,
            stages,
            depth,
            owned,
            primary,
            computed,
            senders,
            readers,
            units,
        })
    }

    pub(crate) fn generation(&self) -> Generation {
        self.plan.generation
    }

    /// All members.
    pub(crate) fn members(&self) -> impl Iterator<Item = WorkerId> + '_ {
        self.plan.members.iter().map(|m| m.worker)
    }

    /// All members but this one.
    pub(crate) fn peers(&self) -> impl Iterator<Item = WorkerId> + '_ {
        self.members().filter(|w| *w != self.me)
    }

    /// The partial sums that make up a slice's gradient, and who sends each.
    pub(crate) fn senders(&self, slice: SliceId) -> Option<&BTreeMap<Node, WorkerId>> {
        self.senders.get(*self.units.get(slice.0 as usize)? as usize)
    }

    /// Who owns a slice.
    pub(crate) fn owners(&self, slice: SliceId) -> &[WorkerId] {
        self.plan.owners.get(slice.0 as usize).map_or(&[], Vec::as_slice)
    }

    /// Who computes, with which slices.
    pub(crate) fn computing(&self) -> impl Iterator<Item = (WorkerId, impl Iterator<Item = SliceId> + '_)> {
        self.stages.iter().map(|(worker, units)| {
            let first = self.units.partition_point(|unit| *unit < units.start);
            let end = self.units.partition_point(|unit| *unit < units.end);
            (*worker, (first..end).map(|slice| SliceId(slice as u32)))
        })
    }

    /// Who has to be sent a slice's new weights by its primary owner.
    pub(crate) fn readers(&self, slice: SliceId) -> &[WorkerId] {
        self.readers.get(slice.0 as usize).map_or(&[], Vec::as_slice)
    }

    /// What a member has to get before it can step, by source.
    pub(crate) fn wanted(&self) -> impl Iterator<Item = (Source, Part, &SliceSet)> {
        self.plan.transfers.iter().filter(|t| t.to == self.me).map(|t| (t.from, t.part, &t.slices))
    }

    /// What it has to give to others before they can step.
    pub(crate) fn given(&self) -> impl Iterator<Item = (WorkerId, Part, &SliceSet)> {
        let mine = |t: &&caravan_types::Transfer| t.from == Source::Peer(self.me);
        self.plan.transfers.iter().filter(mine).map(|t| (t.to, t.part, &t.slices))
    }

    /// Whether a vote covers exactly what its sender owns, block by block.
    pub(crate) fn vote_fits(&self, from: WorkerId, vote: &Prepared, table: &SliceTable) -> bool {
        let slices = &vote.slices;
        let owned = self.plan.owned_by(from);
        let sets: BTreeSet<SliceId> = slices.iter().map(|vote| vote.slice).collect();
        let blocks_fit =
            |vote: &SliceVote| table.get(vote.slice).is_some_and(|s| s.blocks() == vote.norms.len());
        let ends = self.plan.pipelines.iter().filter(|p| p.stages.last().is_some_and(|s| s.worker == from));
        let lanes = ends.flat_map(|p| p.lanes.clone());
        slices.len() == owned.len()
            && sets.len() == slices.len()
            && sets.iter().all(|id| owned.contains(*id))
            && slices.iter().all(blocks_fit)
            && vote.lanes.iter().map(|result| result.lane).eq(lanes)
    }

    /// The step that the plan starts from.
    pub(crate) fn base(&self) -> Step {
        self.plan.base
    }
}
