//! A step whose loss or gradient is not finite, where the run is to end before it.
//!
//! Members see it by themselves and wait at the step before, whose state is intact. Each one tells
//! of it once it has looked for the cause, so when all have, everybody is stopped, the state is
//! written down as when a run is drained, and the run ends. Where a member is lost meanwhile, the
//! others are stopped at once: the reports say whether all that is needed is there. Where it is not,
//! a plan is made, the step is computed again, and is not finite again.

use crate::{Core, Millis, Output};
use caravan_types::message::Farewell;
use caravan_types::non_finite::Finding;
use caravan_types::status::{Event, Phase};
use caravan_types::{NonFinite, NotFinite, Step, WorkerId};
use std::collections::BTreeSet;

/// Why the run is to end.
#[derive(Clone, Debug)]
pub(crate) struct Halt {
    /// The step that is not finite.
    pub(crate) step: Step,
    what: NotFinite,
    /// Who has told of it.
    told: BTreeSet<WorkerId>,
    /// What went bad first, and where: of the first lane where somebody found something.
    finding: Option<(WorkerId, Finding)>,
}

impl Core {
    /// A member tells of a step that is not finite.
    pub(crate) fn non_finite(
        &mut self,
        now: Millis,
        worker: WorkerId,
        told: NonFinite,
        out: &mut Vec<Output>,
    ) {
        let NonFinite { generation, step, what, skipped, finding } = told;
        if self.plan.as_ref().is_none_or(|plan| plan.generation != generation) {
            return;
        }
        if let Some(finding) = finding.clone() {
            out.push(Output::Note(Event::NonFinite { worker, step, finding }));
        }
        // Members that have reported for a new generation have nothing to wait for.
        let stopping = self.phase == Phase::Regrouping && !self.boundary;
        if skipped || stopping || self.phase == Phase::Draining || step <= self.step() {
            return;
        }
        let new = Halt { step, what, told: BTreeSet::new(), finding: None };
        let halt = self.halt.get_or_insert(new);
        halt.told.insert(worker);
        let lane = |finding: &Finding| finding.sample.map(|sample| sample.micro);
        if let Some(finding) = finding {
            let before = halt.finding.as_ref().map(|(_, before)| lane(before));
            if before.is_none_or(|before| lane(&finding) < before) {
                halt.finding = Some((worker, finding));
            }
        }
        self.consider(now, out);
    }

    /// Whether all members have told of a step before which the run is to end.
    pub(crate) fn is_halted(&self) -> bool {
        let (Some(halt), Some(plan)) = (&self.halt, &self.plan) else { return false };
        plan.members.iter().all(|m| halt.told.contains(&m.worker))
    }

    /// The run ends before a step that is not finite; `unsaved` is why its state could not be
    /// written down, where it could not.
    pub(crate) fn end_halted(&mut self, unsaved: Option<&str>, out: &mut Vec<Output>) {
        let Some(Halt { step, what, finding, .. }) = self.halt.take() else { return };
        let found = finding.map(|(worker, finding)| format!(". On {worker}, {finding}"));
        let unsaved = unsaved.map(|reason| format!(". Besides, {reason}"));
        let reason = format!(
            "step {step} was not committed, since {what}{}{}. Doing it again gives the same: start a new run with a \
             lower recipe.learning_rate or another shape, or with recipe.non_finite = \"skip\", which passes such \
             steps without an update",
            found.unwrap_or_default(),
            unsaved.unwrap_or_default(),
        );
        out.push(Output::Halted { step, what });
        self.end(Phase::Failed, Event::Failed { reason }, Farewell::NonFinite, out);
    }
}
