//! The invariants of ARCHITECTURE.md by their ids, checked as things happen.

use caravan_types::{Digest, Generation, Plan, SliceId, Step, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// By step and slice: the training state of a quiet run.
pub type Truth = BTreeMap<(Step, SliceId), Digest>;

/// What has been seen so far.
#[derive(Debug, Default)]
pub(super) struct Checks<'a> {
    truth: Option<&'a Truth>,
    /// Every state that was applied.
    pub(super) seen: Truth,
    plans: BTreeMap<Generation, Plan>,
    workers: BTreeSet<WorkerId>,
    /// The newest plan whose members have all been healed: one of its steps was committed.
    proven: Option<Plan>,
    /// The committed history: one entry a step, from the first.
    history: Vec<Step>,
    /// Workers that the coordinator has lost.
    gone: BTreeSet<WorkerId>,
    /// Owners of some slice have different training state, and nobody knows who is right.
    doubted: bool,
}

impl<'a> Checks<'a> {
    pub(super) fn new(truth: Option<&'a Truth>) -> Self {
        Self { truth, ..Self::default() }
    }

    /// N-1: what is applied is what a quiet run applies.
    pub(super) fn applied(
        &mut self,
        who: WorkerId,
        step: Step,
        states: &[(SliceId, Digest)],
    ) -> Result<(), String> {
        for (slice, digest) in states {
            let known = self.truth.map_or(self.seen.get(&(step, *slice)), |t| t.get(&(step, *slice)));
            if known.is_some_and(|known| known != digest) {
                return Err(format!("N-1: {who} has other bits in {slice} after step {step}"));
            }
            self.seen.insert((step, *slice), *digest);
        }
        Ok(())
    }

    /// N-1, for what is on disk.
    pub(super) fn saved(
        &self,
        step: Step,
        states: &[(SliceId, Digest)],
        slices: usize,
    ) -> Result<(), String> {
        if states.len() != slices {
            return Err(format!(
                "C-2: the checkpoint of step {step} has {} of {slices} slices",
                states.len()
            ));
        }
        let wrong = states.iter().find(|(slice, digest)| {
            let known = self.truth.and_then(|t| t.get(&(step, *slice)));
            known.is_some_and(|known| known != digest)
        });
        wrong.map_or(Ok(()), |(slice, _)| {
            Err(format!("N-1: the checkpoint of step {step} has other bits in {slice}"))
        })
    }

    /// G-1: a generation has one plan, whoever made it.
    pub(super) fn planned(&mut self, plan: &Plan) -> Result<(), String> {
        match self.plans.insert(plan.generation, plan.clone()) {
            Some(other) if other != *plan => Err(format!("G-1: two plans for {}", plan.generation)),
            _ => Ok(()),
        }
    }

    /// G-1: a worker's number is given once.
    pub(super) fn welcomed(&mut self, worker: WorkerId, again: bool) -> Result<(), String> {
        if self.workers.insert(worker) || again {
            return Ok(());
        }
        Err(format!("G-1: {worker} was given to two workers"))
    }

    /// D-1: every step is committed once, after the one before it.
    pub(super) fn committed(&mut self, generation: Generation, step: Step) -> Result<(), String> {
        self.proven = self.plans.get(&generation).cloned();
        let last = self.history.last().copied().unwrap_or_default();
        if step != last.next() {
            return Err(format!("D-1: step {step} follows step {last} in the committed history"));
        }
        self.history.push(step);
        Ok(())
    }

    /// D-1: a plan starts where the committed history ends.
    pub(super) fn starts(&self, plan: &Plan) -> Result<(), String> {
        let newest = self.newest();
        if newest == plan.base {
            return Ok(());
        }
        Err(format!(
            "D-1: {} starts after step {}, the history ends at step {newest}",
            plan.generation, plan.base
        ))
    }

    pub(super) fn lost(&mut self, worker: WorkerId) {
        self.gone.insert(worker);
    }

    pub(super) fn doubted(&mut self) {
        self.doubted = true;
    }

    /// C-2: the run goes back only where some slice has no owner left that the coordinator has
    /// not lost, or none that can be trusted.
    pub(super) fn rolled_back(
        &mut self,
        from: Step,
        to: Step,
        alive: impl Fn(WorkerId) -> bool,
    ) -> Result<(), String> {
        self.history.retain(|step| *step <= to);
        if std::mem::take(&mut self.doubted) {
            return Ok(());
        }
        let Some(plan) = &self.proven else { return Ok(()) };
        let lives = |w: &WorkerId| alive(*w) && !self.gone.contains(w);
        if plan.owners.iter().all(|owners| owners.iter().any(lives)) {
            return Err(format!(
                "C-2: went back from step {from} to {to}, though every slice had a living owner"
            ));
        }
        Ok(())
    }

    /// Whether a generation's plan gives every slice two owners, and all members live.
    pub(super) fn is_redundant(&self, generation: Generation, lives: impl Fn(WorkerId) -> bool) -> bool {
        let Some(plan) = self.plans.get(&generation) else { return false };
        plan.owners.iter().all(|owners| owners.len() > 1) && plan.members.iter().all(|m| lives(m.worker))
    }

    /// The newest step of the committed history.
    pub(super) fn newest(&self) -> Step {
        self.history.last().copied().unwrap_or_default()
    }
}

/// C-1: members of one generation are never more than one step apart.
pub(super) fn one_step_apart(
    steps: impl Iterator<Item = (Generation, WorkerId, Step)>,
) -> Result<(), String> {
    let mut by_generation: BTreeMap<Generation, (Step, Step)> = BTreeMap::new();
    for (generation, worker, step) in steps {
        let (least, most) = by_generation.entry(generation).or_insert((step, step));
        *least = step.min(*least);
        *most = step.max(*most);
        if most.0 - least.0 > 1 {
            return Err(format!(
                "C-1: members of {generation} are at steps {least} and {most}, {worker} at {step}"
            ));
        }
    }
    Ok(())
}
