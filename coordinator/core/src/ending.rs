//! Checkpoints, and how a run ends: finished, drained or failed, with everything written down
//! that a later start needs.

use crate::regroup::Agreement;
use crate::{Core, Input, Millis, Output, Record};
use caravan_types::message::{Farewell, Refusal, ToWorker};
use caravan_types::status::{Event, LossReason, Phase};
use caravan_types::task::SavedPart;
use caravan_types::{Generation, SliceId, SliceSet, SliceSum, Step, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

impl Core {
    pub(crate) fn saved(
        &mut self,
        now: Millis,
        generation: Generation,
        step: Step,
        part: Result<SavedPart, String>,
        out: &mut Vec<Output>,
    ) {
        // Told again by members that do not know whether this coordinator has heard of it.
        if Some(step) <= self.checkpoint {
            if step.0 >= self.config.steps || self.saving == Some(step) {
                self.completed(now, generation, step, Ok(()), out);
            }
            return;
        }
        match part {
            Ok(part) => {
                self.open_checkpoint(generation, step);
                self.saves.add(generation, step, part);
                self.complete(now, generation, step, out);
            }
            Err(reason) => {
                self.saves.give_up(generation, step);
                self.completed(now, generation, step, Err(reason), out);
            }
        }
    }

    /// An owner says what it has of what is written.
    pub(crate) fn vouched(
        &mut self,
        now: Millis,
        worker: WorkerId,
        generation: Generation,
        step: Step,
        sums: Vec<(SliceId, SliceSum)>,
        out: &mut Vec<Output>,
    ) {
        let plan = self.plan.as_ref().filter(|plan| plan.generation == generation);
        let owns = |slice: SliceId| {
            plan.is_none_or(|p| p.owners.get(slice.0 as usize).is_some_and(|owners| owners.contains(&worker)))
        };
        if !sums.iter().all(|(slice, _)| owns(*slice)) {
            return self.lose(now, worker, LossReason::Misbehaved, out);
        }
        if Some(step) > self.checkpoint {
            self.open_checkpoint(generation, step);
            self.saves.vouch(generation, step, worker, sums);
            self.complete(now, generation, step, out);
        }
    }

    /// Who has to vouch is known while the plan is in force. What a run that stops writes, its
    /// owners have vouched for in their reports.
    fn open_checkpoint(&mut self, generation: Generation, step: Step) {
        match &self.plan {
            Some(plan) if plan.generation == generation => {
                let owners = || plan.owners.iter().flatten().copied().collect();
                self.saves.open(generation, step, owners);
            }
            _ if generation == self.generation && self.saving == Some(step) => {
                self.saves.open(generation, step, BTreeSet::new);
            }
            _ => {}
        }
    }

    fn complete(&mut self, now: Millis, generation: Generation, step: Step, out: &mut Vec<Output>) {
        let Some((parts, vouched)) = self.saves.take(generation, step, self.table.len()) else { return };
        if self.vouched_alike(now, generation, step, &vouched, out) {
            out.push(Output::Complete { generation, step, parts });
        }
    }

    pub(crate) fn completed(
        &mut self,
        now: Millis,
        generation: Generation,
        step: Step,
        result: Result<(), String>,
        out: &mut Vec<Output>,
    ) {
        let last = step.0 >= self.config.steps;
        // A part that is told again may be of files that are gone, and says nothing of those that
        // are being written.
        let ours = generation == self.generation;
        let stale = self.plan.as_ref().is_none_or(|plan| generation < plan.generation);
        match result {
            // The run went back behind it meanwhile: what is done again is saved again.
            Ok(()) if stale && step > self.step() => {}
            Ok(()) => {
                self.checkpoint = self.checkpoint.max(Some(step));
                out.push(Output::Persist(Record::Checkpoint(step)));
                out.push(Output::Note(Event::CheckpointWritten { step }));
                if last {
                    self.end(Phase::Finished, Event::Finished { step }, Farewell::Finished, out);
                } else if self.phase == Phase::Draining && self.saving == Some(step) {
                    self.release(now, step, out);
                }
            }
            Err(reason) => {
                out.push(Output::Note(Event::CheckpointFailed { step, reason: reason.clone() }));
                if ours && (last || self.phase == Phase::Draining) {
                    let reason =
                        format!("its last checkpoint, of step {step}, could not be written: {reason}");
                    if self.halt.is_some() {
                        return self.end_halted(Some(&reason), out);
                    }
                    self.end(Phase::Failed, Event::Failed { reason }, Farewell::Failed, out);
                }
            }
        }
    }

    pub(crate) fn drain(&mut self, now: Millis, out: &mut Vec<Output>) {
        if self.draining {
            return;
        }
        self.draining = true;
        out.push(Output::Note(Event::Draining));
        match self.phase {
            // No plan yet: there is nothing that a checkpoint would keep.
            Phase::Gathering => {
                let step = self.checkpoint.unwrap_or_default();
                self.end(Phase::Drained, Event::Drained { step }, Farewell::Drained, out);
            }
            _ => self.consider(now, out),
        }
    }

    /// Everybody has stopped at the same step: it is written down before they go.
    pub(crate) fn save(&mut self, now: Millis, agreement: &Agreement, out: &mut Vec<Output>) {
        let step = agreement.start.base;
        self.phase = Phase::Draining;
        self.saving = Some(step);
        if self.checkpoint == Some(step) {
            return self.release(now, step, out);
        }
        let mut share: BTreeMap<WorkerId, SliceSet> = BTreeMap::new();
        for (slice, _) in self.table.iter() {
            let holders = agreement.holdings.iter().filter(|(_, h)| h.state.contains(slice)).map(|(w, _)| *w);
            if let Some(worker) = holders.min_by_key(|w| (share.get(w).map_or(0, SliceSet::len), *w)) {
                share.entry(worker).or_default().insert(slice);
            }
        }
        for (worker, slices) in share {
            let message = ToWorker::Save { generation: self.generation, step, slices };
            out.push(Output::Send { worker, message });
        }
    }

    /// What was to be written is written: the run is drained, or, where all workers asked to
    /// leave, waits for others.
    fn release(&mut self, now: Millis, step: Step, out: &mut Vec<Output>) {
        if self.halt.is_some() {
            return self.end_halted(None, out);
        }
        if self.draining {
            return self.end(Phase::Drained, Event::Drained { step }, Farewell::Drained, out);
        }
        for worker in self.members.ids() {
            self.dismiss(worker, out);
        }
        self.consider(now, out);
    }

    /// Lets a worker go that asked to.
    pub(crate) fn dismiss(&mut self, worker: WorkerId, out: &mut Vec<Output>) {
        self.dismiss_as(worker, LossReason::Left, Farewell::Left, out);
    }

    pub(crate) fn dismiss_as(
        &mut self,
        worker: WorkerId,
        reason: LossReason,
        farewell: Farewell,
        out: &mut Vec<Output>,
    ) {
        out.push(Output::Send { worker, message: ToWorker::Goodbye(farewell) });
        out.push(Output::Note(Event::Lost { worker, reason }));
        self.members.remove(worker);
    }

    /// What a worker is told that comes when the run is over.
    #[must_use]
    pub fn not_taking(&self) -> Refusal {
        match self.phase {
            Phase::Finished => Refusal::Over(Farewell::Finished),
            Phase::Drained => Refusal::Over(Farewell::Drained),
            Phase::Failed => Refusal::Over(Farewell::Failed),
            _ => Refusal::NotTaking,
        }
    }

    /// The run is over. A coordinator that was started on a finished one stays until those are told
    /// that looked for it: the members of its last plan, where one is known to be in force, or
    /// whoever comes within the time that members have to come back.
    pub(crate) fn turn_away(&mut self, now: Millis, input: Input, out: &mut Vec<Output>) {
        let done = match input {
            Input::Hello { session, hello } => {
                out.push(Output::Refuse { session, refusal: self.not_taking() });
                let back = hello.resume.is_some_and(|worker| self.awaited.remove(&worker));
                back && self.awaited.is_empty()
            }
            Input::Drain => true,
            _ => false,
        };
        if done {
            self.deadline = self.deadline.map(|_| now);
        }
        if self.deadline.take_if(|deadline| now >= *deadline).is_some() {
            let step = self.checkpoint.unwrap_or_default();
            self.end(Phase::Finished, Event::Finished { step }, Farewell::Finished, out);
        }
    }

    pub(crate) fn end(&mut self, phase: Phase, event: Event, farewell: Farewell, out: &mut Vec<Output>) {
        self.phase = phase;
        self.deadline = None;
        if self.plan.is_some() {
            out.push(Output::Persist(Record::Disbanded));
        }
        out.push(Output::Note(event));
        for worker in self.members.ids() {
            out.push(Output::Send { worker, message: ToWorker::Goodbye(farewell) });
        }
        out.push(Output::End(farewell));
    }
}
