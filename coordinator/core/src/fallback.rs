//! A checkpoint that cannot be loaded, though it was intact when it was chosen: a disk was lost
//! or damaged meanwhile, or somebody removed it.
//!
//! The member that cannot load it says so and waits. Everybody is stopped, and an older checkpoint
//! is looked for, which takes as long as it takes to read one; no plan is made before. Where the
//! one in question is intact as the coordinator sees it, the fault is the member's, and it is cut
//! out: else the same plan would fail again and again.

use crate::regroup::Agreement;
use crate::{Core, Millis, Output};
use caravan_types::message::Farewell;
use caravan_types::status::{Event, LossReason, Phase};
use caravan_types::{Generation, Step, WorkerId};

/// A checkpoint that a member cannot load.
#[derive(Clone, Debug)]
struct Failure {
    worker: WorkerId,
    generation: Generation,
    step: Step,
    reason: String,
}

/// What is known of checkpoints that cannot be loaded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fallback {
    /// Told while a restarted coordinator waits for its members.
    told: Option<Failure>,
    /// What another checkpoint is looked for because of.
    looking: Option<Failure>,
    /// The step of one that is gone for good, and why.
    gone: Option<(Step, String)>,
}

impl Fallback {
    /// Whether a checkpoint is being looked for.
    pub(crate) fn is_looking(&self) -> bool {
        self.looking.is_some()
    }

    /// Where the members have no state to go on with: says that steps are lost, or, where there
    /// is no checkpoint any more, why the run cannot go on.
    pub(crate) fn falls_back(
        &mut self,
        agreement: &mut Agreement,
        checkpoint: Option<Step>,
    ) -> Result<(), String> {
        let Some((step, reason)) = self.gone.take() else { return Ok(()) };
        if agreement.holdings.values().any(|holding| !holding.state.is_empty()) {
            return Ok(());
        }
        if checkpoint.is_none() {
            return Err(format!(
                "the checkpoint of step {step} cannot be loaded ({reason}), and there is no other one that is \
                 intact: put a copy of one back and start the run again, or start it again as it is, and it begins \
                 from its seed"
            ));
        }
        agreement.lost = agreement.lost.or(Some(step)).filter(|lost| *lost > agreement.start.base);
        Ok(())
    }
}

impl Core {
    /// A member cannot load the checkpoint of its plan.
    pub(crate) fn load_failed(
        &mut self,
        now: Millis,
        worker: WorkerId,
        (generation, step): (Generation, Step),
        reason: String,
        out: &mut Vec<Output>,
    ) {
        let planned = self.plan.as_ref().is_some_and(|p| p.generation == generation && p.base == step);
        if !planned {
            return;
        }
        let failure = Failure { worker, generation, step, reason };
        match self.phase {
            Phase::Recovering => self.fallback.told = Some(failure),
            // Several members say so at once. A plan that a death has stopped is not made again.
            Phase::Regrouping if !self.boundary => {}
            _ => {
                let reason = failure.reason.clone();
                out.push(Output::Note(Event::LoadFailed { worker, step, reason }));
                out.push(Output::Find { until: step });
                self.fallback.looking = Some(failure);
                self.stop(now, false, out);
            }
        }
    }

    /// All members are back: what one of them said meanwhile still holds.
    pub(crate) fn load_failed_before(&mut self, now: Millis, out: &mut Vec<Output>) {
        if let Some(Failure { worker, generation, step, reason }) = self.fallback.told.take() {
            self.load_failed(now, worker, (generation, step), reason, out);
        }
    }

    /// The search for a checkpoint is over.
    pub(crate) fn found(
        &mut self,
        now: Millis,
        until: Step,
        found: Result<Option<Step>, String>,
        out: &mut Vec<Output>,
    ) {
        let Some(failure) = self.fallback.looking.take_if(|failure| failure.step == until) else { return };
        let found = match found {
            Ok(found) => found,
            Err(why) => {
                let reason = format!(
                    "the checkpoint of step {until} cannot be loaded ({}), and another one cannot be looked for: {why}",
                    failure.reason
                );
                return self.end(Phase::Failed, Event::Failed { reason }, Farewell::Failed, out);
            }
        };
        if found == Some(until) {
            self.lose(now, failure.worker, LossReason::CannotLoad, out);
        } else {
            if self.checkpoint <= Some(until) {
                self.checkpoint = found;
            }
            self.fallback.gone = Some((until, failure.reason));
        }
        // Whoever was lost may have been the last one that it was waited for.
        if self.phase == Phase::Regrouping {
            self.decide(now, out);
        }
    }
}
