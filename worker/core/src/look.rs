//! Whether memory still holds what was put there, asked before anything depends on it: a vote, a
//! stop after which others heal from here, a checkpoint.

use crate::{Core, Millis, Output};
use caravan_types::message::FromWorker;
use caravan_types::task::Task;
use caravan_types::{SliceId, SliceSet, SliceSum};

impl Core {
    /// Once everything is computed: has the engine look at what it was computed with.
    pub(crate) fn verify(&mut self, out: &mut Vec<Output>) {
        let (Some(place), Some(schedule)) = (&self.place, &self.round.schedule) else { return };
        if self.round.verifying || !schedule.is_done() {
            return;
        }
        self.round.verifying = true;
        let slices: SliceSet = place.computed.union(&place.owned);
        let (generation, step) = (place.generation(), self.applied);
        out.push(Output::Task(Task::Verify { generation, step, slices }));
    }

    /// Whether the engine has looked at all that is owned.
    pub(crate) fn has_sums(&self) -> bool {
        let owned = self.place.iter().flat_map(|place| place.owned.iter());
        owned.into_iter().all(|slice| self.sums.contains_key(&slice))
    }

    /// Whether the engine has looked at all that is owned; else it is asked to. Applying a step
    /// does it anyway.
    pub(crate) fn has_looked(&mut self, out: &mut Vec<Output>) -> bool {
        let Some(place) = self.place.as_ref().filter(|_| !self.has_sums()) else { return true };
        let applying = self.applied > place.base();
        if self.looking != Some(self.applied) && !applying {
            self.looking = Some(self.applied);
            let (generation, step, slices) = (place.generation(), self.applied, place.owned.clone());
            out.push(Output::Task(Task::Verify { generation, step, slices }));
        }
        false
    }

    /// The engine has looked, at the step that is applied.
    pub(crate) fn looked(&mut self, now: Millis, sums: Vec<(SliceId, SliceSum)>, out: &mut Vec<Output>) {
        self.sums.extend(sums);
        let due =
            self.config.checkpoint_every > 0 && self.applied.0.is_multiple_of(self.config.checkpoint_every);
        let saved = self.place.as_ref().is_some_and(|place| self.applied > place.base());
        if due && saved && self.applied.0 < self.config.steps {
            self.vouch(out);
        }
        if self.stopping.is_some() || self.finished {
            self.go_on(now, out);
        }
    }

    /// Tells the coordinator, as an owner, what is written in this step's checkpoint; once.
    pub(crate) fn vouch(&mut self, out: &mut Vec<Output>) {
        let Some(place) = &self.place else { return };
        let sums: Option<Vec<_>> = place.owned.iter().map(|id| Some((id, *self.sums.get(&id)?))).collect();
        let Some(sums) = sums else { return };
        let vouched = FromWorker::Vouched { generation: place.generation(), step: self.applied, sums };
        if self.memory.vouched(&vouched) {
            out.push(Output::Tell(vouched));
        }
    }
}
