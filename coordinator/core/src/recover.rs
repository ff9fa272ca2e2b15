//! What a restarted coordinator does first: it waits for the members of the plan in force.
//!
//! They go on stepping meanwhile, since stepping needs no coordinator. Each one comes back with
//! the id that it had. With all of them back nothing has changed, and nothing is changed. A
//! member that is not back within the failure budget, or that others have lost, is dead: the
//! rest is regrouped once, as after any death. Where one that others have lost is back, it lives,
//! and what broke is a connection (`accused`).

use crate::{Core, Millis, Output, Session};
use caravan_types::WorkerId;
use caravan_types::message::{Hello, ToWorker};
use caravan_types::status::{Event, LossReason, Phase};
use std::sync::Arc;

impl Core {
    /// A member is back.
    pub(crate) fn reattach(
        &mut self,
        now: Millis,
        session: Session,
        worker: WorkerId,
        hello: Hello,
        out: &mut Vec<Output>,
    ) {
        self.awaited.remove(&worker);
        out.push(Output::Welcome { session, worker, committed: self.step() });
        out.push(Output::Note(Event::Reattached { worker, name: hello.name.clone() }));
        self.members.add(worker, session, hello, now);
        self.recover(now, false, out);
    }

    /// Goes on where nobody is waited for any more: because all are back, because those who are
    /// not were lost by others, or because time is up.
    pub(crate) fn recover(&mut self, now: Millis, late: bool, out: &mut Vec<Output>) {
        let missed = |worker: &WorkerId| self.missed.iter().any(|(_, accused)| accused == worker);
        if !late && !self.awaited.iter().all(missed) {
            return;
        }
        for worker in std::mem::take(&mut self.awaited) {
            out.push(Output::Note(Event::Lost { worker, reason: LossReason::NotBack }));
        }
        let missed = std::mem::take(&mut self.missed);
        self.deadline = None;
        let Some(plan) = &self.plan else { return };
        // Where a newer generation was announced, members may have promised to stop.
        let whole = plan.members.iter().all(|m| self.members.has(m.worker));
        if whole && plan.generation == self.generation {
            self.phase = Phase::Running;
            out.push(Output::Note(Event::Recovered { generation: self.generation }));
            // The coordinator may have died after it wrote the plan down and before everybody had
            // it; who has it does not take it twice.
            let told = if mutant!(self, PlanToldOnce) { &[][..] } else { &plan.members };
            for worker in told.iter().map(|m| m.worker) {
                out.push(Output::Send { worker, message: ToWorker::Plan(Arc::clone(plan)) });
            }
            // Whoever was missed is back, but the connection to it is not.
            missed.into_iter().for_each(|accusation| self.accuse(now, accusation));
            match self.disputes.early.take() {
                Some((worker, generation, disputes)) => self.diverged(now, worker, generation, disputes, out),
                None => self.consider(now, out),
            }
            self.load_failed_before(now, out);
        } else if self.members.is_empty() {
            self.empty(out);
        } else {
            self.stop(now, false, out);
        }
    }
}
