//! The state as an exhaustive exploration compares it: without what decides nothing, so that
//! what was reached in different ways can be seen to be the same.

use crate::Core;
use std::fmt::Debug;

impl Core {
    /// All that decides what it will do with the inputs to come, but for its configuration and
    /// times. Without a plan nothing of a step is looked at again: the next plan starts it anew.
    pub fn essence(&self) -> impl Debug + '_ {
        let held = (
            self.promised,
            self.applied,
            self.verdict,
            &self.state,
            &self.weights,
            (&self.prepared, &self.sums, &self.bad),
        );
        let step = self.place.as_ref().map(|place| {
            let stop = (self.wanted, self.stopping, self.finished, self.looking);
            (&place.plan, &self.heal, &self.round, &self.inbox, stop)
        });
        (held, step, self.memory.essence(self.place.is_some()))
    }

    /// Whether it has voted for the next step, and may yet have to apply it.
    #[must_use]
    pub fn is_prepared(&self) -> bool {
        self.prepared.is_some()
    }
}
