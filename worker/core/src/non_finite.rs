//! A step whose loss or gradient is not finite.
//!
//! All members count the same votes and see the same, so nobody is asked what to do. To skip the
//! step is to commit it with another verdict: state at the step before is state at this one, and
//! whoever was only prepared finishes it in the same way. To stop is to commit nothing: all wait at
//! the step before, which is intact, until the coordinator has heard of it from everybody.
//!
//! Either way the engine looks for the cause first, on the weights that the step was computed
//! with. The order of lanes decides who does: where losses are not finite, whoever had the first
//! such lane; where all are, a gradient has overflown on the way back, and everybody looks. A member
//! that is stopped meanwhile gives up looking.

use crate::{Core, Output};
use caravan_types::message::{Committed, FromWorker};
use caravan_types::non_finite::Finding;
use caravan_types::task::Task;
use caravan_types::{Generation, Lane, NonFinite, NonFinitePolicy, NotFinite, Step};

impl Core {
    /// Has the engine look for the cause where a step is not finite. `lane` is the first one whose
    /// loss is not. Whether the step is to be committed.
    pub(crate) fn look_for_cause(
        &mut self,
        committed: &Committed,
        lane: Option<Lane>,
        out: &mut Vec<Output>,
    ) -> bool {
        let Committed { generation, step, loss, norm, .. } = *committed;
        let (Some(what), Some(place)) = (NotFinite::of(norm, loss), &self.place) else { return true };
        let lanes = match lane {
            None => place.lanes.clone(),
            Some(lane) if place.lanes.contains(&lane) => lane..lane + 1,
            Some(_) => 0..0,
        };
        let skipped = self.config.non_finite == NonFinitePolicy::Skip;
        self.bad = Some(NonFinite { generation, step, what, skipped, finding: None });
        if lanes.is_empty() {
            self.diagnosed(generation, step, None, out);
        } else {
            out.push(Output::Task(Task::Diagnose { generation, step, lanes }));
        }
        skipped
    }

    /// The engine has looked: the coordinator is told. Of a skipped step it need not know more
    /// than that it was committed.
    pub(crate) fn diagnosed(
        &mut self,
        generation: Generation,
        step: Step,
        finding: Option<Finding>,
        out: &mut Vec<Output>,
    ) {
        let this = |bad: &mut NonFinite| (bad.generation, bad.step) == (generation, step);
        let Some(bad) = self.bad.take_if(this) else { return };
        let told = FromWorker::NonFinite(NonFinite { finding, ..bad });
        match &told {
            FromWorker::NonFinite(NonFinite { skipped: true, finding: None, .. }) => {}
            FromWorker::NonFinite(NonFinite { skipped: true, .. }) => out.push(Output::Tell(told)),
            _ => {
                self.memory.non_finite(told.clone());
                out.push(Output::Tell(told));
            }
        }
    }
}
